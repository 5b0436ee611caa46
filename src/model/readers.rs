//! Several readers of one base: policies and value models of which only hidden states are wanted, no gradients. On a device they go
//! over its blocks together: a block that is streamed is copied once for all of them, and its weights can be dequantised
//! once. Each reader has its own adapter and its own activations, and its numbers are the bits of a pass of its own.
//!
//! It does not depend on losses. Read `roles.rs` for what is computed of the hidden states, and `base.rs` for passes of one.

use anyhow::Result;

use super::adapter::Adapter;
use super::base::{Base, layer_lora};
use super::batch::Batch;
use super::block::{BlockNumbers, Layout};
use super::embeddings::{self, Embeddings};
use super::stream::Course;
use crate::device::Array;
use crate::ops::rows::gather_rows;

/// What readers of one base on a device have in common. On the host each of them reads by itself: there is no copy to save, and
/// the hidden states of all of them would take memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sharing {
    /// Nothing: each goes over all blocks by itself.
    #[default]
    Apart,
    /// The visit of each block. The device holds the hidden states of all readers.
    Blocks,
    /// The visit of each block, and its dequantised weights, which the device holds for the time of the visit.
    Weights,
}

impl Sharing {
    /// All of them, the one that needs least memory first.
    pub const ALL: [Self; 3] = [Self::Apart, Self::Blocks, Self::Weights];

    /// What is shared, in a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Apart => "nothing",
            Self::Blocks => "blocks",
            Self::Weights => "weights",
        }
    }
}

/// One reader of a base.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// Its adapter; `None` is the bare base.
    pub adapter: Option<&'a Adapter>,
    /// The rows of the batch whose hidden states it wants.
    pub rows: &'a [usize],
}

impl Base {
    /// Calls `found` with the number of each reader and its hidden states (R, D) after the final norm, in the order of the readers.
    ///
    /// # Errors
    /// As for [`Base::hidden`]; if a row does not exist; the error of `found`.
    pub fn read(
        &self,
        batch: &Batch,
        readers: &[Reader<'_>],
        sharing: Sharing,
        mut found: impl FnMut(usize, Array) -> Result<()>,
    ) -> Result<()> {
        let together = self.place().is_some() && sharing != Sharing::Apart && readers.len() > 1;
        let outputs = if together { self.outputs_of_blocks(batch, readers, sharing)? } else { vec![] };
        let mut outputs = outputs.into_iter();
        readers.iter().enumerate().try_for_each(|(i, reader)| {
            let hidden = match outputs.next() {
                Some(x) => Embeddings::of(self, reader.adapter).output(x, &mut embeddings::Saved::default())?,
                None => self.hidden(batch, reader.adapter)?,
            };
            let rows = gather_rows(&hidden, reader.rows)?;
            drop(hidden);
            found(i, rows)
        })
    }

    /// The last block's output (N, D) for each reader.
    fn outputs_of_blocks(&self, batch: &Batch, readers: &[Reader<'_>], sharing: Sharing) -> Result<Vec<Array>> {
        let _pass = self.pass();
        let (layout, mut unused) = (Layout::of(batch), embeddings::Saved::default());
        let mut xs = Vec::with_capacity(readers.len());
        for reader in readers {
            self.check(reader.adapter, batch.longest())?;
            xs.push(Embeddings::of(self, reader.adapter).input(batch.tokens(), batch.positions(), &mut unused)?);
        }
        for layer in 0..self.config().num_hidden_layers {
            let block = self.block(layer, Course::Forward)?;
            let numbers = (sharing == Sharing::Weights).then(BlockNumbers::default);
            for (reader, x) in readers.iter().zip(&mut xs) {
                let lora = layer_lora(reader.adapter, layer);
                *x = match &numbers {
                    Some(numbers) => block.forward_keeping(numbers, lora, &self.geometry, layout, x)?,
                    None => block.forward(lora, &self.geometry, layout, x)?,
                };
            }
        }
        Ok(xs)
    }
}
