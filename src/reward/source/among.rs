//! Reward sources among several ranks: models score each a share of the responses, and what lies outside the process is asked by
//! rank 0 alone. Every rank returns all scores. It does not depend on how a source computes them. Read `train/world/mod.rs` for
//! the ranks.

use anyhow::Result;
use serde_json::Value;

use super::{PartScores, RewardInputs, RewardSource};
use crate::model::roles::ValueModel;
use crate::report::Metrics;
use crate::train::world::World;

/// A source whose score of a response depends on that response alone: each rank scores its share.
pub struct Shared<'w> {
    /// The source.
    pub source: Box<dyn RewardSource + 'w>,
    /// The ranks.
    pub world: &'w World,
}

impl RewardSource for Shared<'_> {
    /// Of several ranks each reads its share of the responses, and not that of the other roles.
    fn models(&self) -> Vec<ValueModel<'_>> {
        if self.world.is_alone() { self.source.models() } else { vec![] }
    }

    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        self.world.share(inputs.responses.len(), |mine| {
            if mine.is_empty() {
                return Ok(vec![]);
            }
            let (prompts, responses) = (&inputs.prompts[mine.clone()], &inputs.responses[mine.clone()]);
            let entries = inputs.entries.get(mine).unwrap_or_default();
            self.source.scores(&RewardInputs { prompts, responses, entries, ..*inputs })
        })
    }

    fn set_progress(&self, share: f64) {
        self.source.set_progress(share);
    }

    fn parts(&self) -> Vec<PartScores> {
        self.source.parts()
    }

    fn metrics(&self) -> Metrics {
        self.source.metrics()
    }

    fn state(&self) -> Value {
        self.source.state()
    }

    fn restore(&self, state: &Value) {
        self.source.restore(state);
    }
}

/// A source that rank 0 alone has, as a program or a server: it scores all responses, and the others get its scores.
pub struct OfFirst<'w> {
    source: Option<Box<dyn RewardSource + 'w>>,
    world: &'w World,
}

impl<'w> OfFirst<'w> {
    /// Opens the source on rank 0.
    ///
    /// # Errors
    /// Those of `open`, on rank 0.
    pub fn new(world: &'w World, open: impl FnOnce() -> Result<Box<dyn RewardSource + 'w>>) -> Result<Self> {
        Ok(Self { source: world.is_first().then(open).transpose()?, world })
    }
}

impl RewardSource for OfFirst<'_> {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        self.world.first(|| self.source.as_ref().map_or(Ok(vec![]), |source| source.scores(inputs)))
    }

    fn set_progress(&self, share: f64) {
        self.source.iter().for_each(|source| source.set_progress(share));
    }

    fn metrics(&self) -> Metrics {
        self.source.as_ref().map_or_else(Metrics::new, |source| source.metrics())
    }

    fn state(&self) -> Value {
        self.source.as_ref().map_or(Value::Null, |source| source.state())
    }

    fn restore(&self, state: &Value) {
        self.source.iter().for_each(|source| source.restore(state));
    }
}
