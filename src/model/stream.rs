//! Layers of a frozen base that a device has no room for. Their matrices lie in pinned memory of the host, and two buffers of a
//! layer's size take turns on the device: while one layer computes, the next one that the pass needs is copied beside it. A
//! pass goes through its layers in a known order, so each visit of a layer knows the next. Numbers do not change: the bytes are
//! those that a resident layer has.
//!
//! It does not depend on adapters or roles. Read `device/landing.rs` for the buffers, and `base.rs` for the passes.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use super::block::Block;
use crate::device::{Device, HostCopy, Landing};
use crate::ops::weight::Weight;

/// Buffers of a layer's size. More would not hide more of the copies, which are as long as the link is slow.
pub(super) const BUFFERS: usize = 2;

/// Whether a layer of `of` layers is streamed if `count` are: they lie as far apart as they can, so that layers which stay on the
/// device compute during the copies.
pub fn is_streamed(layer: usize, count: usize, of: usize) -> bool {
    (layer + 1) * count / of > layer * count / of
}

/// Bytes of a layer's matrices in a buffer.
pub fn layer_bytes<'w>(matrices: impl IntoIterator<Item = &'w Weight>) -> usize {
    matrices.into_iter().map(Weight::packed_bytes).sum()
}

/// The way that a pass takes through the layers, and where the pass after it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// From the first layer to the last; the next pass begins at the first layer again.
    Forward,
    /// From the first layer to the last; the backward over the same layers follows.
    ThenBack,
    /// From the last layer down to this one; the next pass begins at the first layer.
    Back {
        /// The last layer that the pass needs.
        to: usize,
    },
}

/// The streamed layers of a base on a device.
pub(super) struct LayerStream {
    /// Dropped before the host's copies: each buffer waits for its last fill.
    buffers: Mutex<Buffers>,
    /// The streamed layers, lowest first, each with the host's copy of its matrices.
    layers: Vec<(usize, HostCopy)>,
}

struct Buffers {
    all: Vec<Buffer>,
    /// The one that was visited last.
    latest: usize,
}

struct Buffer {
    landing: Landing,
    /// Index in `LayerStream::layers` of the layer that it holds, or that is on its way.
    holds: Option<usize>,
}

impl LayerStream {
    /// Takes `count` of the blocks off to pinned memory. `done` is called with the bytes of each matrix.
    ///
    /// # Errors
    /// If the host has not so much pinned memory, the device no room for the buffers, or a matrix cannot be read.
    pub fn new(device: &Device, blocks: &mut [Block], count: usize, mut done: impl FnMut(usize)) -> Result<Self> {
        let of = blocks.len();
        let (mut layers, mut largest) = (vec![], 0);
        for (layer, block) in blocks.iter_mut().enumerate().filter(|(layer, _)| is_streamed(*layer, count, of)) {
            let bytes = layer_bytes(block.linears.iter().map(|linear| &linear.weight));
            let mut copy = device.host_copy(bytes)?;
            let mut at = 0;
            for linear in &mut block.linears {
                let size = linear.weight.packed_bytes();
                if let Some(content) = copy.content() {
                    linear.weight.pack(&mut content[at..at + size])?;
                }
                at += size;
                linear.weight = linear.weight.clone().streamed(device.clone());
                done(linear.weight.size_in_bytes());
            }
            largest = largest.max(bytes);
            layers.push((layer, copy));
        }
        let buffer = |_| Ok(Buffer { landing: device.landing(largest)?, holds: None });
        let all = (0..BUFFERS.min(layers.len())).map(buffer).collect::<Result<_>>()?;
        Ok(Self { buffers: Mutex::new(Buffers { all, latest: 0 }), layers })
    }

    /// The number of streamed layers.
    pub fn count(&self) -> usize {
        self.layers.len()
    }

    /// Bytes of pinned memory.
    pub fn pinned_bytes(&self) -> usize {
        self.layers.iter().map(|(_, copy)| copy.bytes()).sum()
    }

    /// The streamed layer that is needed after the one with this index.
    fn following(&self, index: usize, course: Course) -> usize {
        let last = self.layers.len() - 1;
        match course {
            Course::Forward if index == last => 0,
            Course::ThenBack if index == last => last.saturating_sub(1),
            Course::Forward | Course::ThenBack => index + 1,
            Course::Back { to } if index > 0 && self.layers[index - 1].0 >= to => index - 1,
            Course::Back { .. } => 0,
        }
    }

    /// A block with its matrices on the device for the time of the visit; the next one's copy begins. Blocks that are not
    /// streamed are there anyway.
    ///
    /// # Errors
    /// If a copy cannot be started.
    pub fn visit<'s>(&'s self, block: &'s Block, layer: usize, course: Course) -> Result<Visit<'s>> {
        let Ok(index) = self.layers.binary_search_by_key(&layer, |(layer, _)| *layer) else {
            return Ok(Visit { block, lent: None });
        };
        // Visits of other threads' passes wait; what they find in the buffers afterwards may be another layer.
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let at = match buffers.holding(index) {
            Some(at) => at,
            None => {
                let at = buffers.other();
                self.fill(&mut buffers.all[at], index)?;
                at
            }
        };
        buffers.latest = at;
        buffers.all[at].landing.arrive()?;
        // From here on the buffer is released again whatever fails.
        let visit = Visit { block, lent: Some((buffers, at)) };
        let Some((buffers, _)) = &visit.lent else { return Ok(visit) };
        let mut offset = 0;
        for linear in &block.linears {
            linear.weight.lend(buffers.all[at].landing.buffer(), offset)?;
            offset += linear.weight.packed_bytes();
        }
        self.prefetch(visit, self.following(index, course))
    }

    fn prefetch<'s>(&self, mut visit: Visit<'s>, next: usize) -> Result<Visit<'s>> {
        if let Some((buffers, at)) = &mut visit.lent
            && buffers.holding(next).is_none()
        {
            let other = buffers.other();
            if other != *at {
                self.fill(&mut buffers.all[other], next)?;
            }
        }
        Ok(visit)
    }

    fn fill(&self, buffer: &mut Buffer, index: usize) -> Result<()> {
        buffer.holds = None;
        // SAFETY: the host's copies live as long as this value, whose buffers are dropped first.
        unsafe { buffer.landing.fill(&self.layers[index].1)? };
        buffer.holds = Some(index);
        Ok(())
    }
}

impl Buffers {
    fn holding(&self, index: usize) -> Option<usize> {
        self.all.iter().position(|buffer| buffer.holds == Some(index))
    }

    /// The buffer that was not visited last, if there are two.
    fn other(&self) -> usize {
        (self.latest + 1) % self.all.len()
    }
}

/// A block whose matrices can be used as long as the value lives.
pub(super) struct Visit<'s> {
    block: &'s Block,
    /// The buffers, and which of them holds the matrices.
    lent: Option<(MutexGuard<'s, Buffers>, usize)>,
}

impl<'s> Visit<'s> {
    /// Of a block that is not streamed.
    pub fn resident(block: &'s Block) -> Self {
        Self { block, lent: None }
    }
}

impl Deref for Visit<'_> {
    type Target = Block;
    fn deref(&self) -> &Block {
        self.block
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let Some((buffers, at)) = &mut self.lent else { return };
        self.block.linears.iter().for_each(|linear| linear.weight.take_back());
        let buffer = &mut buffers.all[*at];
        if buffer.landing.release().is_err() {
            // The machine is broken, and says so at the next call.
            buffer.holds = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_layers_are_as_many_as_asked_for_and_lie_apart() {
        for of in 1..40 {
            for count in 0..=of {
                let layers: Vec<usize> = (0..of).filter(|&layer| is_streamed(layer, count, of)).collect();
                assert_eq!(layers.len(), count);
                let least = layers.windows(2).map(|pair| pair[1] - pair[0]).min();
                assert!(least.is_none_or(|least| least >= of / count), "{count} of {of}: {layers:?}");
            }
        }
    }

    #[test]
    fn the_next_layer_is_the_one_that_the_course_needs() {
        let device = Device::dry();
        // Of eight layers: 1, 3, 5 and 7.
        let layers = [1, 3, 5, 7].map(|layer| (layer, device.host_copy(0).unwrap()));
        let stream = LayerStream { buffers: Mutex::new(Buffers { all: vec![], latest: 0 }), layers: layers.into() };
        let next = |course| [0, 1, 2, 3].map(|index| stream.following(index, course));
        assert_eq!(next(Course::Forward), [1, 2, 3, 0]);
        assert_eq!(next(Course::ThenBack), [1, 2, 3, 2]);
        assert_eq!(next(Course::Back { to: 0 }), [0, 0, 1, 2]);
        assert_eq!(next(Course::Back { to: 4 }), [0, 0, 0, 2]);
    }
}
