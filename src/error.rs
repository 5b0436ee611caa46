//! Error kinds and exit codes: invalid input is 2, an interrupted run 130, any other failure 1.
//!
//! Every reader of user input returns `invalid!(..)`. It does not depend on any other file of the program.

use std::cell::Cell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

/// An input or configuration that cannot be used. The message names the problem, its place and a remedy.
#[derive(Debug)]
pub struct Invalid(String);

impl Invalid {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

/// A value that became NaN, infinite or far too large in training: the guard may skip such a step.
#[derive(Debug)]
pub struct Diverged(pub String);

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Diverged {}

/// A base whose numbers exceed those of half precision: exit code 2, unless the type was not asked for and another is taken.
#[derive(Debug)]
pub struct F16Overflow(pub String);

impl fmt::Display for F16Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for F16Overflow {}

/// A device that cannot be used, as `doctor` found it: exit code 1.
#[derive(Debug)]
pub struct Unusable(pub String);

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unusable {}

/// Builds an `anyhow::Error` of kind [`Diverged`](crate::error::Diverged).
#[macro_export]
macro_rules! diverged {
    ($($arg:tt)*) => {
        anyhow::Error::new($crate::error::Diverged(format!($($arg)*)))
    };
}

/// A run that stopped on request. The message names where its state was saved.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}

/// The reader of stdout is gone, as `head` is after its lines: no fault, and nobody is there to be told.
#[derive(Debug)]
pub struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stdout was closed")
    }
}

impl std::error::Error for StdoutClosed {}

/// Builds an `anyhow::Error` of kind [`Invalid`](crate::error::Invalid): exit code 2.
#[macro_export]
macro_rules! invalid {
    ($($arg:tt)*) => {
        anyhow::Error::new($crate::error::Invalid::new(format!($($arg)*)))
    };
}

fn is_of_input(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.is::<Invalid>() || cause.is::<Diverged>() || cause.is::<F16Overflow>()
}

/// Whether an error is of the machine and not of the input: a device that is out of memory, or a launch or copy that
/// failed. The learners are as they were before the step.
pub fn is_of_machine(error: &anyhow::Error) -> bool {
    !error.chain().any(|cause| is_of_input(cause) || cause.is::<Interrupted>())
}

/// A path that cannot be read or written as it was given.
fn is_of_path(cause: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind;
    cause.downcast_ref::<std::io::Error>().is_some_and(|cause| {
        matches!(
            cause.kind(),
            ErrorKind::NotFound
                | ErrorKind::PermissionDenied
                | ErrorKind::NotADirectory
                | ErrorKind::IsADirectory
                | ErrorKind::ReadOnlyFilesystem
                | ErrorKind::InvalidFilename
        )
    })
}

/// The exit code of an error: 130 if any cause in its chain is [`Interrupted`], 141 if it is [`StdoutClosed`] (as a shell
/// reports SIGPIPE), 2 if one is [`Invalid`], [`Diverged`],
/// [`F16Overflow`] or a path that cannot be used, 1 otherwise. (A training run handles [`Diverged`] itself; elsewhere the given
/// weights are the cause.)
pub fn exit_code(error: &anyhow::Error) -> i32 {
    match error {
        _ if error.chain().any(|cause| cause.is::<Interrupted>()) => 130,
        _ if error.is::<StdoutClosed>() => 141,
        _ if error.chain().any(|cause| is_of_input(cause) || is_of_path(cause)) => 2,
        _ => 1,
    }
}

/// A number with its noun, which has a regular plural: `1 record`, `2 records`.
pub fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// The most characters of a word that are printed.
const WORD: usize = 240;
/// The most characters of a message that are printed.
const MESSAGE: usize = 4000;

/// A message made safe to print: control characters are escaped, since a quoted file must not control the terminal, and
/// overlong words and messages are shortened in the middle.
pub fn printable(text: &str) -> String {
    let cut = |part: &str, most: usize| -> String {
        let count = part.chars().count();
        if count <= most {
            return part.to_owned();
        }
        let (head, tail) = (most * 3 / 4, most / 4);
        let start: String = part.chars().take(head).collect();
        let end: String = part.chars().skip(count - tail).collect();
        format!("{start}[… {} more …]{end}", count - head - tail)
    };
    let spell = |c: char| match c {
        '\n' | '\t' => c.to_string(),
        c if c.is_control() => c.escape_unicode().to_string(),
        c => c.to_string(),
    };
    let words: Vec<String> = text.split(' ').map(|word| cut(word, WORD)).collect();
    cut(&words.join(" ").chars().map(spell).collect::<String>(), MESSAGE)
}

/// Runs a library that panics on some damaged input; returns `None`, and prints nothing, if it did.
pub fn unless_it_panics<T>(run: impl FnOnce() -> T) -> Option<T> {
    thread_local! { static GUARDED: Cell<bool> = const { Cell::new(false) } }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                usual(info);
            }
        }));
    });
    GUARDED.set(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    GUARDED.set(false);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn invalid_input_exits_with_2_through_any_context() {
        let wrapped = Err::<(), _>(invalid!("no such key")).context("reading run.toml").unwrap_err();
        assert_eq!(exit_code(&wrapped), 2);
        assert_eq!(exit_code(&anyhow::anyhow!("disk on fire")), 1);
        let io =
            |kind: std::io::ErrorKind| exit_code(&anyhow::Error::new(std::io::Error::from(kind)).context("writing x"));
        assert_eq!([io(std::io::ErrorKind::PermissionDenied), io(std::io::ErrorKind::StorageFull)], [2, 1]);
    }

    #[test]
    fn a_panic_gives_none_and_later_runs_are_unaffected() {
        assert_eq!(unless_it_panics(|| 1), Some(1));
        assert_eq!(unless_it_panics(|| -> i32 { panic!("on purpose") }), None);
        assert_eq!(unless_it_panics(|| 2), Some(2));
    }

    #[test]
    fn overlong_messages_are_shortened_in_the_middle_and_keep_the_remedy() {
        let long = "x".repeat(5000);
        let text = printable(&format!("run.toml: {long:?} is no path; name one"));
        assert!(
            text.len() < 400 && text.starts_with("run.toml: \"xxx") && text.ends_with("x\" is no path; name one"),
            "{text}"
        );
        assert!(text.contains("more"));
        let many = printable(&format!("a {}; do this", "é é ".repeat(5000)));
        assert!(many.chars().count() < 4100 && many.ends_with("; do this"));
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("a\n\tb: \u{1b}[2J\u{7} é𝄞"), "a\n\tb: \\u{1b}[2J\\u{7} é𝄞");
    }
}
