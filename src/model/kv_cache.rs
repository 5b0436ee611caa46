//! The KV cache of a batch under generation: one of `ops::attention` per layer. It does not depend on weights. Read `decoding.rs`
//! beside it for the use, and `ops/attention/kv_cache.rs` for a layer's.

use anyhow::Result;

use crate::ops::attention;

/// Keys and values of a batch under generation, one cache per layer.
pub struct KvCache {
    pub(super) layers: Vec<attention::KvCache>,
}

impl KvCache {
    /// Keeps the sequences s for which `keep[s]` is true and frees the memory of the others.
    pub fn retain(&mut self, keep: &[bool]) {
        self.layers.iter_mut().for_each(|layer| layer.retain(keep));
    }

    /// Takes over the sequences of another cache of the same base; they come after its own. After an error neither is usable.
    ///
    /// # Errors
    /// If the caches are of different bases or machines, or device memory is out.
    pub fn join(&mut self, other: Self) -> Result<()> {
        anyhow::ensure!(self.layers.len() == other.layers.len(), "caches of different bases cannot be joined");
        self.layers.iter_mut().zip(other.layers).try_for_each(|(ours, theirs)| ours.join(theirs))
    }

    /// Allocated bytes of keys and values.
    pub fn size_in_bytes(&self) -> usize {
        self.layers.iter().map(attention::KvCache::size_in_bytes).sum()
    }

    /// What the next step, or the `ahead`-th after it, reads of the cache, the same in all layers; `None` if it cannot be repeated.
    pub(super) fn next_step(&self, ahead: usize) -> Result<Option<attention::NextStep>> {
        self.layers.first().map_or(Ok(None), |layer| layer.next_step(ahead))
    }

    /// Whether the next step takes memory of another size than this one, in any layer.
    pub(crate) fn next_step_differs(&self) -> bool {
        self.layers.iter().any(attention::KvCache::next_step_differs)
    }

    /// Counts one more token per sequence, for a plan, or for a step that was issued again.
    pub(crate) fn advance(&mut self) -> Result<()> {
        self.layers.iter_mut().try_for_each(attention::KvCache::advance)
    }
}
