//! Where a stage with one learner stands. Knows no loss. Read sft.rs for a loop over it.

use anyhow::Result;

use super::learner::Learner;
use super::snapshot::Snapshot;
use crate::data::examples::batch_sampler::Cursor;

const LEARNER: &str = "learner";

/// Everything that a step changes.
#[derive(Debug)]
pub struct Progress {
    /// The weights under training and their optimizer.
    pub learner: Learner,
    /// The next step's data.
    pub cursor: Cursor,
    /// Steps that are over.
    pub step: usize,
    /// Tokens that went through the network in them.
    pub tokens: usize,
}

impl Progress {
    /// Before the first step.
    pub fn new(learner: Learner) -> Self {
        Self { learner, cursor: Cursor::default(), step: 0, tokens: 0 }
    }

    /// A copy of everything.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        snapshot.put_learner(LEARNER, &self.learner)?;
        snapshot.put("cursor", &self.cursor)?;
        snapshot.put("step", &self.step)?;
        snapshot.put("tokens", &self.tokens)?;
        Ok(snapshot)
    }

    /// Goes back to one.
    ///
    /// # Errors
    /// If it is of another shape.
    pub fn load(&mut self, from: &Snapshot) -> Result<()> {
        from.restore_learner(LEARNER, &mut self.learner)?;
        (self.cursor, self.step, self.tokens) = (from.get("cursor")?, from.get("step")?, from.get("tokens")?);
        Ok(())
    }
}
