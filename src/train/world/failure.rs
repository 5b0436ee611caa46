//! A failure as one rank sends it to the others: its message, and the kinds that training treats differently. It does not
//! depend on a stage. Read `mod.rs` next.

use anyhow::{Error, anyhow};
use serde::{Deserialize, Serialize};

use crate::error::{Diverged, F16Overflow, Interrupted, Invalid};
use crate::{diverged, invalid};

/// What the program does about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    /// The guard may skip the step.
    Diverged,
    /// Another type of products is taken.
    F16Overflow,
    /// The process was asked to stop.
    Interrupted,
    /// Exit code 2.
    Invalid,
    /// Exit code 1.
    Other,
}

/// A failure of some rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    kind: Kind,
    text: String,
}

impl Failure {
    pub(super) fn of(error: &Error) -> Self {
        let kind = match error {
            _ if error.chain().any(|cause| cause.is::<Diverged>()) => Kind::Diverged,
            _ if error.chain().any(|cause| cause.is::<F16Overflow>()) => Kind::F16Overflow,
            _ if error.chain().any(|cause| cause.is::<Interrupted>()) => Kind::Interrupted,
            _ if error.chain().any(|cause| cause.is::<Invalid>()) => Kind::Invalid,
            _ => Kind::Other,
        };
        Self { kind, text: format!("{error:#}") }
    }

    /// The error on another rank than `rank`, which had it.
    pub(super) fn error(self, rank: usize) -> Error {
        match self.kind {
            // The reason is written into the metrics, wherever the step diverged.
            Kind::Diverged => diverged!("{}", self.text),
            Kind::F16Overflow => Error::new(F16Overflow(self.text)),
            Kind::Interrupted => Error::new(Interrupted(self.text)),
            Kind::Invalid => invalid!("rank {rank}: {}", self.text),
            Kind::Other => anyhow!("rank {rank}: {}", self.text),
        }
    }
}
