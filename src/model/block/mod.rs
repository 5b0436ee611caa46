//! One decoder block: the operations' pairs run forward, and in reverse. What it keeps for the reverse is
//! `Recompute`'s choice; elementwise parts are always computed again. Knows its own weights and branches, no files
//! and no family: where families differ, a field says how. Read attention.rs and mlp.rs beside, then base.rs.

use candle_core::{Result, Tensor};

use super::adapter::MAX_LINEARS;
use super::batch::Batch;
use super::config::{Mlp, Qkv};
use crate::model::adapter::{LoraLayer, LoraLayers};
use crate::ops::activation::Activation;
use crate::ops::attention::{Cached, Heads, Sequences};
use crate::ops::linear;
use crate::ops::linear::{BranchGradient, InputGradient, LinearWithLora};
use crate::ops::norm::Norm;
use crate::ops::rope::RopeTable;
use crate::ops::weight::Weight;
use crate::ops::{columns, cpu};

mod attention;
mod mlp;
mod residual;

use attention::AttentionSaved;
use mlp::{GateUp, MlpSaved};
use residual::Join;

/// What a block keeps for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// All inputs of its linears and attention: most memory, least time.
    Off,
    /// All of that but the MLP's widened products, gate and up, which the backward computes again.
    Mlp,
    /// Its input alone; the backward runs the block forward once more.
    Block,
}

impl Recompute {
    /// All, the one that keeps most first.
    pub const ALL: [Self; 3] = [Self::Off, Self::Mlp, Self::Block];

    /// As the `checkpoint` key has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "none",
            Self::Mlp => "mlp",
            Self::Block => "block",
        }
    }
}

/// One frozen linear map.
pub struct FrozenLinear {
    /// W (out, in), as stored.
    pub weight: Weight,
    /// b (out).
    pub bias: Option<Vec<f32>>,
}

/// The norms around one of a block's two halves f: x + inner(f(before(x))), then after(..) of the sum.
#[derive(Default)]
pub struct Norms {
    /// Of f's input.
    pub before: Option<Norm>,
    /// Of f's output.
    pub inner: Option<Norm>,
    /// Of the sum.
    pub after: Option<Norm>,
}

/// The frozen weights of one block.
pub struct Block {
    /// In the order of `LinearShapes::linears`.
    pub linears: Vec<FrozenLinear>,
    /// Around attention.
    pub attention_norms: Norms,
    /// Around the MLP.
    pub mlp_norms: Norms,
    /// Of q and of k, before they turn.
    pub qk_norms: Option<[Norm; 2]>,
    /// Heads, and what they see.
    pub heads: Heads,
    /// Which of the geometry's rotations, if any.
    pub rotation: Option<usize>,
}

/// What all blocks of a base share.
pub struct Geometry {
    /// How q, k and v are stored.
    pub qkv: Qkv,
    /// The kind of MLP.
    pub mlp: Mlp,
    /// Its nonlinearity.
    pub activation: Activation,
    /// The MLP reads the block's input, beside attention and not after it.
    pub parallel: bool,
    /// Each half is multiplied by it before it joins the residual stream.
    pub residual_multiplier: f32,
    /// Rotations of every position, one set for each rope base.
    pub angles: Vec<RopeTable>,
}

/// Where a batch's tokens stand.
#[derive(Clone, Copy)]
pub struct Layout<'a> {
    /// Rows of the sequences.
    pub spans: Sequences<'a>,
    /// (N) positions.
    pub positions: &'a [u32],
}

impl<'a> Layout<'a> {
    /// Of a batch.
    pub fn of(batch: &'a Batch) -> Self {
        let spans = Sequences { offsets: batch.offsets(), readable: batch.readable() };
        Self { spans, positions: batch.positions() }
    }
}

/// Inputs of the backward, (N, ..) each.
pub struct Saved {
    x: Tensor,
    rest: Option<(AttentionSaved, MlpSaved)>,
}

/// Of each map that has a branch, in the order of `LinearShapes::linears`.
pub type BlockGradients = [Option<BranchGradient>; MAX_LINEARS];

/// A block as one pass sees it: its weights, the adapter's branches, what all blocks share.
#[derive(Clone, Copy)]
struct Pass<'a> {
    block: &'a Block,
    pairs: Option<&'a LoraLayers>,
    geometry: &'a Geometry,
}

impl<'a> Pass<'a> {
    fn part(self, linear: usize) -> LinearWithLora<'a> {
        let frozen = &self.block.linears[linear];
        let pair = self.pairs.and_then(|p| p[linear].as_ref());
        LinearWithLora { weight: &frozen.weight, bias: frozen.bias.as_deref(), lora: pair.map(LoraLayer::low_rank) }
    }

    fn parts(self, linears: std::ops::Range<usize>) -> Vec<LinearWithLora<'a>> {
        linears.map(|i| self.part(i)).collect()
    }

    /// Index of attention's output map; the MLP's follow it.
    fn attention_out(self) -> usize {
        match self.geometry.qkv {
            Qkv::Separate => 3,
            Qkv::EndToEnd | Qkv::PerHead => 1,
        }
    }

    /// Index of the MLP's last map.
    fn mlp_out(self) -> usize {
        self.block.linears.len() - 1
    }

    fn join(self, norms: &'a Norms) -> Join<'a> {
        Join { norms, multiplier: self.geometry.residual_multiplier }
    }

    /// What the MLP reads of the block's input x and attention's sum x2.
    fn mlp_input<'t>(self, x: &'t Tensor, x2: &'t Tensor) -> &'t Tensor {
        if self.geometry.parallel { x } else { x2 }
    }

    /// y (N, D) of x (N, D), keeping nothing; `seen` is shown the keys and values.
    fn forward(self, layout: Layout<'_>, x: &Tensor, seen: impl FnOnce(&[f32], &[f32])) -> Result<Tensor> {
        let x2 = self.attention_only(layout, x, seen)?;
        self.mlp_only(self.mlp_input(x, &x2), &x2)
    }

    /// y (N, D) of x (N, D), with everything between, or all but what the MLP is widened to.
    fn run(self, layout: Layout<'_>, x: &Tensor, widened: GateUp) -> Result<(Tensor, AttentionSaved, MlpSaved)> {
        let (x2, attention) = self.attention(layout, x)?;
        let (y, mlp) = self.mlp(self.mlp_input(x, &x2), &x2, widened)?;
        Ok((y, attention, mlp))
    }
}

impl Block {
    fn pass<'a>(&'a self, pairs: Option<&'a LoraLayers>, geometry: &'a Geometry) -> Pass<'a> {
        Pass { block: self, pairs, geometry }
    }

    /// y (N, D) of x (N, D), keeping nothing.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        pairs: Option<&LoraLayers>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: &Tensor,
    ) -> Result<Tensor> {
        self.pass(pairs, geometry).forward(layout, x, |_, _| {})
    }

    /// y (N, D) of x (N, D), with what `backward` wants.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_kept(
        &self,
        pairs: Option<&LoraLayers>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: Tensor,
        checkpoint: Recompute,
    ) -> Result<(Tensor, Saved)> {
        let pass = self.pass(pairs, geometry);
        let widened = match checkpoint {
            Recompute::Off => GateUp::Saved,
            Recompute::Mlp => GateUp::Recomputed,
            Recompute::Block => {
                let y = pass.forward(layout, &x, |_, _| {})?;
                return Ok((y, Saved { x, rest: None }));
            }
        };
        let (y, attention, mlp) = pass.run(layout, &x, widened)?;
        Ok((y, Saved { x, rest: Some((attention, mlp)) }))
    }

    /// y (N, D) of x (N, D) for prompts. Keys and values of prompt `sources[s]` go into `caches[s]` (S), empty before, with
    /// room for `room` tokens more.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn prefill(
        &self,
        pairs: Option<&LoraLayers>,
        geometry: &Geometry,
        (layout, sources): (Layout<'_>, &[usize]),
        x: &Tensor,
        room: usize,
        caches: &mut [Cached],
    ) -> Result<Tensor> {
        let width = self.heads.kv * self.heads.dim;
        self.pass(pairs, geometry).forward(layout, x, |k, v| {
            for (cache, &source) in caches.iter_mut().zip(sources) {
                let [start, end] = [source, source + 1].map(|i| layout.spans.offsets[i] * width);
                let rows = start..end;
                *cache = Cached::with_room(rows.len() + room * width);
                cache.extend(&k[rows.clone()], &v[rows]);
            }
        })
    }

    /// y (S, D) of x (S, D): one new token a sequence, at `positions` (S), over the caches, which grow by it.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn decode(
        &self,
        pairs: Option<&LoraLayers>,
        geometry: &Geometry,
        positions: &[u32],
        x: &Tensor,
        caches: &mut [Cached],
    ) -> Result<Tensor> {
        let pass = self.pass(pairs, geometry);
        let x2 = pass.attention_step(positions, x, caches)?;
        pass.mlp_only(pass.mlp_input(x, &x2), &x2)
    }

    /// dL/dx (N, D), `None` where unused, and the gradients of this block's branches, of dL/dy (N, D).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        pairs: Option<&LoraLayers>,
        geometry: &Geometry,
        layout: Layout<'_>,
        kept: Saved,
        dy: Tensor,
        wanted: InputGradient,
    ) -> Result<(Option<Tensor>, BlockGradients)> {
        let pass = self.pass(pairs, geometry);
        let Saved { x, rest } = kept;
        let (attention, mlp) = match rest {
            Some(rest) => rest,
            None => {
                let (_, attention, mlp) = pass.run(layout, &x, GateUp::Saved)?;
                (attention, mlp)
            }
        };
        let mut grads = BlockGradients::default();
        // y = x2 + mlp(its input), x2 = x + attention(x)
        let (past, dh) = pass.mlp_backward(pass.mlp_input(&x, &mlp.x2), &mlp, &dy, &mut grads)?;
        drop(dy);
        let norm = &self.mlp_norms.before;
        if geometry.parallel {
            // dy reaches x through x2, and through the MLP's input, which is x itself.
            let (dsum, da) = pass.join(&self.attention_norms).backward(&attention.join, &past)?;
            let past = residual::before_backward(norm, &x, &dh, &dsum)?;
            return Ok((pass.attention_backward(layout, &x, &attention, &da, &past, wanted, &mut grads)?, grads));
        }
        let dx2 = residual::before_backward(norm, &mlp.x2, &dh, &past)?;
        drop((mlp, dh, past));
        let (dsum, da) = pass.join(&self.attention_norms).backward(&attention.join, &dx2)?;
        Ok((pass.attention_backward(layout, &x, &attention, &da, &dsum, wanted, &mut grads)?, grads))
    }
}

/// The N outputs of a group of N.
fn take<const N: usize>(outputs: Vec<Tensor>) -> [Tensor; N] {
    <[Tensor; N]>::try_from(outputs).unwrap_or_else(|_| unreachable!("a group gives one output a part"))
}

fn store(grads: &mut BlockGradients, first: usize, lora: Vec<Option<BranchGradient>>) {
    for (i, pair) in lora.into_iter().enumerate() {
        grads[first + i] = pair;
    }
}

/// Stores the branches' gradients of the maps from `first` on, and gives the input's.
fn keep(grads: &mut BlockGradients, first: usize, g: linear::Gradients) -> Result<Tensor> {
    store(grads, first, g.lora);
    g.input.ok_or_else(|| candle_core::Error::Msg("an input gradient was asked for and not made".into()))
}
