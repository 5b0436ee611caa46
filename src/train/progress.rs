//! The state of a stage with one learner: weights, position in the data, step and token counts.
//!
//! It does not depend on a stage. Read `supervised.rs` next.

use anyhow::Result;

use super::learner::Learner;
use super::snapshot::Snapshot;
use crate::data::examples::batch_sampler::Cursor;

const LEARNER: &str = "learner";

/// The state that a step changes.
#[derive(Debug)]
pub struct Progress {
    /// The weights under training and their optimizer.
    pub learner: Learner,
    /// Position of the next step in the data.
    pub cursor: Cursor,
    /// Finished steps.
    pub step: usize,
    /// Tokens trained on in the finished steps.
    pub tokens: usize,
}

impl Progress {
    /// The state before the first step.
    pub fn new(learner: Learner) -> Self {
        Self { learner, cursor: Cursor::default(), step: 0, tokens: 0 }
    }

    /// A copy of the state.
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

    /// Restores a snapshot.
    ///
    /// # Errors
    /// If the snapshot is of another shape.
    pub fn load(&mut self, from: &Snapshot) -> Result<()> {
        from.restore_learner(LEARNER, &mut self.learner)?;
        (self.cursor, self.step, self.tokens) = (from.get("cursor")?, from.get("step")?, from.get("tokens")?);
        Ok(())
    }
}
