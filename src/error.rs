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

/// Builds an `anyhow::Error` that `main` turns into exit code 2.
#[macro_export]
macro_rules! invalid {
    ($($arg:tt)*) => {
        anyhow::Error::new($crate::error::Invalid::new(format!($($arg)*)))
    };
}

/// 2 where any cause in the chain is [`Invalid`], 1 otherwise.
pub fn exit_code(error: &anyhow::Error) -> i32 {
    if error.chain().any(|cause| cause.is::<Invalid>()) { 2 } else { 1 }
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
