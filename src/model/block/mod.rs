//! One decoder block: calls the operations forward, and backward in reverse order. `Recompute` chooses which
//! activations are saved; elementwise parts are always recomputed. Fields describe how families differ. It does not
//! depend on files. Read `attention.rs`, `mlp.rs` and `residual.rs` beside it, then `base.rs`.

use anyhow::{Result, anyhow};

use crate::device::{Array, Element};

use super::adapter::MAX_LINEARS;
use super::batch::Batch;
use super::config::{Mlp, Qkv};
use crate::model::adapter::{LoraLayer, LoraLayers};
use crate::ops::activation::Activation;
use crate::ops::attention::{Heads, KvCache, Sequences};
use crate::ops::columns;
use crate::ops::linear::gpu::{Dequantised, Dequantising};
use crate::ops::linear::{self, Bias, BranchGradient, InputGradient, LinearWithLora};
use crate::ops::norm::Norm;
use crate::ops::rope::RopeTable;
use crate::ops::weight::Weight;

mod attention;
mod dequantised;
mod mlp;
mod residual;

use attention::AttentionSaved;
use mlp::{GateUp, MlpSaved};
use residual::Join;

pub use dequantised::{BlockNumbers, Setting};

/// Activation recomputation: which activations a block saves for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// The inputs of all linear layers and attention: most memory, least time.
    Off,
    /// All of that except gate and up, which the backward recomputes.
    Mlp,
    /// The block's input only; the backward repeats the block's forward.
    Block,
    /// As `Block`. On a device, the inputs wait in memory of the host: see `Base::forward`.
    Offload,
}

impl Recompute {
    /// All settings, the one that saves most first.
    pub const ALL: [Self; 4] = [Self::Off, Self::Mlp, Self::Block, Self::Offload];
    /// Those that `checkpoint = "auto"` chooses from.
    pub const AUTO: [Self; 3] = [Self::Off, Self::Mlp, Self::Block];

    /// Its value of the `checkpoint` key.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "none",
            Self::Mlp => "mlp",
            Self::Block => "block",
            Self::Offload => "offload",
        }
    }
}

/// One frozen linear layer.
pub struct FrozenLinear {
    /// W (out, in), as stored.
    pub weight: Weight,
    /// b (out).
    pub bias: Option<Bias>,
}

/// The norms around one of a block's two halves f: x + inner(f(before(x))), then after(..) of the sum.
#[derive(Default)]
pub struct Norms {
    /// Of f's input.
    pub before: Option<Norm>,
    /// Norm of f's output.
    pub inner: Option<Norm>,
    /// Norm of the sum.
    pub after: Option<Norm>,
}

/// The frozen weights of one block.
pub struct Block {
    /// In the order of `LinearShapes::linears`.
    pub linears: Vec<FrozenLinear>,
    /// Norms around attention.
    pub attention_norms: Norms,
    /// Norms around the MLP.
    pub mlp_norms: Norms,
    /// Norms of q and of k, before the rotation.
    pub qk_norms: Option<[Norm; 2]>,
    /// Heads, and which keys they attend to.
    pub heads: Heads,
    /// Index of the RoPE table in `Geometry::rope_tables`; `None`: no rotation.
    pub rotation: Option<usize>,
}

/// Settings that all blocks of a base share.
pub struct Geometry {
    /// Layout of q, k and v.
    pub qkv: Qkv,
    /// Kind of MLP.
    pub mlp: Mlp,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Whether the MLP's input is the block's input, in parallel with attention.
    pub parallel: bool,
    /// Factor on each sublayer's output before it is added to the residual stream.
    pub residual_multiplier: f32,
    /// RoPE tables, one per rope base.
    pub rope_tables: Vec<RopeTable>,
    /// How a device dequantises the weights.
    pub dequantise: Setting,
}

/// Sequences and positions of a batch's tokens.
#[derive(Clone, Copy)]
pub struct Layout<'a> {
    /// The sequences.
    pub sequences: Sequences<'a>,
    /// Position of each token (N).
    pub positions: &'a [u32],
}

impl<'a> Layout<'a> {
    /// The layout of a batch.
    pub fn of(batch: &'a Batch) -> Self {
        let sequences = Sequences { cu_seqlens: batch.offsets(), key_len: batch.readable() };
        Self { sequences, positions: batch.positions() }
    }
}

/// Tensors saved for the backward, (N, ..) each.
pub struct Saved {
    x: Array,
    rest: Option<(AttentionSaved, MlpSaved)>,
}

impl Saved {
    /// The input of a block that saved nothing else.
    pub fn input(x: Array) -> Self {
        Self { x, rest: None }
    }
}

/// Gradients of each linear layer's LoRA weights, in the order of `LinearShapes::linears`.
pub type BlockGradients = [Option<BranchGradient>; MAX_LINEARS];

/// A block with the adapter's LoRA weights and the shared settings, for one pass.
#[derive(Clone, Copy)]
struct Pass<'a> {
    block: &'a Block,
    lora: Option<&'a LoraLayers>,
    geometry: &'a Geometry,
    /// The weights that are dequantised on a device.
    numbers: &'a BlockNumbers,
    /// Whether those of a forward are kept for later products.
    keeps: bool,
}

impl<'a> Pass<'a> {
    fn part_with(self, linear: usize, dequantised: Option<Dequantised<'a, Weight>>) -> LinearWithLora<'a> {
        let frozen = &self.block.linears[linear];
        let lora = self.lora.and_then(|layers| layers[linear].as_ref()).map(LoraLayer::low_rank);
        LinearWithLora { weight: &frozen.weight, dequantised, bias: frozen.bias.as_ref(), lora }
    }

    /// The element type of a device's products.
    fn operand(self) -> Element {
        self.block.linears.first().map_or(Element::F32, |linear| linear.weight.compute().element())
    }

    /// Index of attention's output projection; the MLP's linear layers follow it.
    fn attention_out(self) -> usize {
        match self.geometry.qkv {
            Qkv::Separate => 3,
            Qkv::EndToEnd | Qkv::PerHead => 1,
        }
    }

    /// Index of the MLP's last linear layer.
    fn mlp_out(self) -> usize {
        self.block.linears.len() - 1
    }

    fn join(self, norms: &'a Norms) -> Join<'a> {
        Join { norms, multiplier: self.geometry.residual_multiplier }
    }

    /// The MLP's input: the block's input x or attention's sum x2.
    fn mlp_input<'t>(self, x: &'t Array, x2: &'t Array) -> &'t Array {
        if self.geometry.parallel { x } else { x2 }
    }

    /// y (N, D) of x (N, D); saves nothing. `read_kv` gets the keys and values, (N, kv * dim) each.
    fn forward(
        self,
        layout: Layout<'_>,
        x: &Array,
        read_kv: impl FnOnce(&Array, &Array) -> Result<()>,
    ) -> Result<Array> {
        let x2 = self.attention_only(layout, x, read_kv)?;
        self.mlp_only(self.mlp_input(x, &x2), &x2)
    }

    /// y (N, D) of x (N, D), and the tensors saved for the backward.
    fn run(self, layout: Layout<'_>, x: &Array, gate_up: GateUp) -> Result<(Array, AttentionSaved, MlpSaved)> {
        let (x2, attention) = self.attention(layout, x)?;
        let (y, mlp) = self.mlp(self.mlp_input(x, &x2), &x2, gate_up)?;
        Ok((y, attention, mlp))
    }

    /// The tensors saved for the backward, of x (N, D), without y.
    fn run_again(self, layout: Layout<'_>, x: &Array) -> Result<(AttentionSaved, MlpSaved)> {
        let (x2, attention) = self.attention(layout, x)?;
        let mlp = self.mlp_again(self.mlp_input(x, &x2), &x2)?;
        Ok((attention, mlp))
    }
}

impl Block {
    fn pass<'a>(&'a self, lora: Option<&'a LoraLayers>, geometry: &'a Geometry, numbers: &'a BlockNumbers) -> Pass<'a> {
        Pass { block: self, lora, geometry, numbers, keeps: false }
    }

    /// y (N, D) of x (N, D); saves nothing.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        lora: Option<&LoraLayers>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: &Array,
    ) -> Result<Array> {
        self.pass(lora, geometry, &BlockNumbers::default()).forward(layout, x, |_, _| Ok(()))
    }

    /// As [`Block::forward`]. On a device, dequantised weights are found in `numbers`, or left there for the next call.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_keeping(
        &self,
        numbers: &BlockNumbers,
        lora: Option<&LoraLayers>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: &Array,
    ) -> Result<Array> {
        Pass { keeps: true, ..self.pass(lora, geometry, numbers) }.forward(layout, x, |_, _| Ok(()))
    }

    /// y (N, D) of x (N, D), and the tensors saved for `backward`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_saving(
        &self,
        lora: Option<&LoraLayers>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: Array,
        recompute: Recompute,
    ) -> Result<(Array, Saved)> {
        let numbers = BlockNumbers::default();
        let pass = self.pass(lora, geometry, &numbers);
        let gate_up = match recompute {
            Recompute::Off => GateUp::Saved,
            Recompute::Mlp => GateUp::Recomputed,
            Recompute::Block | Recompute::Offload => {
                let y = pass.forward(layout, &x, |_, _| Ok(()))?;
                return Ok((y, Saved::input(x)));
            }
        };
        let (y, attention, mlp) = pass.run(layout, &x, gate_up)?;
        Ok((y, Saved { x, rest: Some((attention, mlp)) }))
    }

    /// y (N, D) of x (N, D) for prompts. The keys and values of prompt prompts\[s\] become sequence s of the empty
    /// `cache`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn prefill(
        &self,
        lora: Option<&LoraLayers>,
        geometry: &Geometry,
        (layout, prompts): (Layout<'_>, &[usize]),
        x: &Array,
        cache: &mut KvCache,
    ) -> Result<Array> {
        let read_kv = |k: &Array, v: &Array| cache.append_prompts(k, v, layout.sequences.cu_seqlens, prompts);
        self.pass(lora, geometry, &BlockNumbers::default()).forward(layout, x, read_kv)
    }

    /// y (S, D) of x (S, D): one new token per sequence, at `positions` (S). Its keys and values are appended to the
    /// cache.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn decode(
        &self,
        lora: Option<&LoraLayers>,
        geometry: &Geometry,
        positions: &[u32],
        x: &Array,
        cache: &mut KvCache,
    ) -> Result<Array> {
        let numbers = BlockNumbers::default();
        let pass = self.pass(lora, geometry, &numbers);
        let x2 = pass.attention_step(positions, x, cache)?;
        pass.mlp_only(pass.mlp_input(x, &x2), &x2)
    }

    /// dL/dx (N, D), `None` if unused, and the gradients of this block's LoRA weights, of dL/dy (N, D).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        lora: Option<&LoraLayers>,
        geometry: &Geometry,
        layout: Layout<'_>,
        saved: Saved,
        dy: Array,
        wanted: InputGradient,
    ) -> Result<(Option<Array>, BlockGradients)> {
        let numbers = BlockNumbers::default();
        let keeps = geometry.dequantise.get() == Dequantising::Kept;
        let pass = Pass { keeps, ..self.pass(lora, geometry, &numbers) };
        let Saved { x, rest } = saved;
        let (attention, mlp) = match rest {
            Some(rest) => rest,
            None => pass.run_again(layout, &x)?,
        };
        let mut grads = BlockGradients::default();
        // y = x2 + mlp(its input), x2 = x + attention(x)
        let (skip, dh) = pass.mlp_backward(pass.mlp_input(&x, &mlp.x2), &mlp, &dy, &mut grads)?;
        drop(dy);
        let norm = &self.mlp_norms.before;
        if geometry.parallel {
            // dy reaches x through x2 and through the MLP's input, which is x itself.
            let (dsum, da) = pass.join(&self.attention_norms).backward(&attention.join, &skip)?;
            let skip = residual::before_backward(norm, &x, &dh, &dsum)?;
            return Ok((pass.attention_backward(layout, &x, &attention, &da, &skip, wanted, &mut grads)?, grads));
        }
        let dx2 = residual::before_backward(norm, &mlp.x2, &dh, &skip)?;
        drop((mlp, dh, skip));
        let (dsum, da) = pass.join(&self.attention_norms).backward(&attention.join, &dx2)?;
        Ok((pass.attention_backward(layout, &x, &attention, &da, &dsum, wanted, &mut grads)?, grads))
    }
}

/// The N outputs of a group of N linear layers.
fn take<const N: usize>(outputs: Vec<Array>) -> [Array; N] {
    <[Array; N]>::try_from(outputs).unwrap_or_else(|_| unreachable!("a linear group has one output per part"))
}

/// Stores the LoRA gradients of the linear layers from `first` on.
fn store(grads: &mut BlockGradients, first: usize, lora: Vec<Option<BranchGradient>>) {
    for (i, gradient) in lora.into_iter().enumerate() {
        grads[first + i] = gradient;
    }
}

/// Stores the LoRA gradients of the linear layers from `first` on, and returns the input gradient.
fn store_and_take_input(grads: &mut BlockGradients, first: usize, g: linear::Gradients) -> Result<Array> {
    store(grads, first, g.lora);
    g.input.ok_or_else(|| anyhow!("a requested input gradient is missing"))
}
