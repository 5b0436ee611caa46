//! A block's weights as a pass over many rows needs them on a device: dequantised, each before its product or while the product
//! before it runs, and kept for a second use where there is memory. It does not depend on formulas. Read
//! `ops/linear/gpu_strips.rs` for what a product does with it.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Pass;
use crate::model::adapter::MAX_LINEARS;
use crate::ops::linear::gpu::{Dequantised, Dequantising, Numbers};
use crate::ops::linear::{InputGradient, LinearWithLora};
use crate::ops::weight::Weight;

/// A base's setting, which a plan chooses after the base was opened.
#[derive(Debug, Default)]
pub struct Setting(AtomicU8);

const ALL: [Dequantising; 4] = [Dequantising::Auto, Dequantising::InTurn, Dequantising::Ahead, Dequantising::Kept];

impl Setting {
    /// Passes that begin from now on go by it.
    pub fn set(&self, how: Dequantising) {
        self.0.store(how as u8, Ordering::Relaxed);
    }

    /// What passes go by.
    pub fn get(&self) -> Dequantising {
        ALL[usize::from(self.0.load(Ordering::Relaxed)) % ALL.len()]
    }
}

/// The dequantised weights of one block on a device, while a pass goes through it.
#[derive(Debug, Default)]
pub struct BlockNumbers([Numbers; MAX_LINEARS]);

impl<'a> Pass<'a> {
    /// One linear layer of a forward. The layers of a block are used in their order.
    pub(super) fn part(self, linear: usize) -> LinearWithLora<'a> {
        let next = Some(linear + 1).filter(|next| *next < self.block.linears.len());
        self.part_with(linear, self.dequantised(linear, self.keeps, next))
    }

    pub(super) fn parts(self, linears: Range<usize>) -> Vec<LinearWithLora<'a>> {
        linears.map(|i| self.part(i)).collect()
    }

    /// One linear layer of a backward, which is the last to read its numbers. The down projection comes first, then the MLP's
    /// others, attention's output, and q, k and v, whose product is left out where the block's input gradient is unused.
    pub(super) fn part_back(self, linear: usize, wanted: InputGradient) -> LinearWithLora<'a> {
        let (attention, mlp) = (self.attention_out(), self.mlp_out());
        let next = match linear {
            i if i == mlp => Some(attention + 1),
            i if i + 1 == mlp => Some(attention),
            i if i == attention => (wanted == InputGradient::Wanted).then_some(0),
            i => Some(i + 1).filter(|next| *next != attention),
        };
        self.part_with(linear, self.dequantised(linear, false, next))
    }

    pub(super) fn parts_back(self, linears: Range<usize>, wanted: InputGradient) -> Vec<LinearWithLora<'a>> {
        linears.map(|i| self.part_back(i, wanted)).collect()
    }

    fn dequantised(self, linear: usize, keeps: bool, next: Option<usize>) -> Option<Dequantised<'a, Weight>> {
        let ahead = self.geometry.dequantise.get().is_ahead();
        let numbers = |i: usize| &self.numbers.0[i];
        let next = next.filter(|_| ahead).map(|i| (&self.block.linears[i].weight, numbers(i)));
        (keeps || ahead).then(|| Dequantised { numbers: numbers(linear), keeps, next })
    }
}
