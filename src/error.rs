//! The line between "your input is wrong" (exit code 2) and "this program failed" (exit code 1).
//! Knows nothing of what was wrong; every reader of user input returns `invalid!(..)`.

use std::cell::Cell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

/// An input or configuration that cannot be used. The message says what, where and what to do.
#[derive(Debug)]
pub struct Invalid(String);

impl Invalid {
    /// Wraps a finished message.
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

/// A number that stopped being one, or ran away: a step that the guard may skip.
#[derive(Debug)]
pub struct Diverged(pub String);

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Diverged {}

/// Builds an `anyhow::Error` that the guard of a training run may skip a step for.
#[macro_export]
macro_rules! diverged {
    ($($arg:tt)*) => {
        anyhow::Error::new($crate::error::Diverged(format!($($arg)*)))
    };
}

/// A run that was asked to stop and did. The message says where its state is.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}

/// Builds an `anyhow::Error` that `main` turns into exit code 2.
#[macro_export]
macro_rules! invalid {
    ($($arg:tt)*) => {
        anyhow::Error::new($crate::error::Invalid::new(format!($($arg)*)))
    };
}

/// 130 where any cause in the chain is [`Interrupted`], 2 where one is [`Invalid`] or [`Diverged`] (which leaves a command
/// only where nothing is trained, so that the weights given are at fault), 1 otherwise.
pub fn exit_code(error: &anyhow::Error) -> i32 {
    match error {
        _ if error.chain().any(|cause| cause.is::<Interrupted>()) => 130,
        _ if error.chain().any(|cause| cause.is::<Invalid>() || cause.is::<Diverged>()) => 2,
        _ => 1,
    }
}

/// The longest word, and the longest message, that is still read.
const WORD: usize = 240;
const MESSAGE: usize = 4000;

/// A message for people: the control characters of whatever it quotes are spelled out (a file's bytes do not command a
/// terminal), and what is longer than anybody reads is cut in its middle.
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

/// Runs a library that panics on some damaged bytes; `None` where it did, and nothing is printed then.
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
    }

    #[test]
    fn a_panic_of_a_library_is_none_and_the_next_run_is_as_before() {
        assert_eq!(unless_it_panics(|| 1), Some(1));
        assert_eq!(unless_it_panics(|| -> i32 { panic!("on purpose") }), None);
        assert_eq!(unless_it_panics(|| 2), Some(2));
    }

    #[test]
    fn what_nobody_reads_is_cut_and_what_to_do_stays() {
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
    fn what_a_message_quotes_commands_no_terminal() {
        assert_eq!(printable("a\n\tb: \u{1b}[2J\u{7} é𝄞"), "a\n\tb: \\u{1b}[2J\\u{7} é𝄞");
    }
}
