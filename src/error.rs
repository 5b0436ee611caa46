//! The line between "your input is wrong" (exit code 2) and "this program failed" (exit code 1).
//! Knows nothing of what was wrong; every reader of user input returns `invalid!(..)`.

use std::fmt;

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
}
