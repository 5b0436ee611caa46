//! One decoder block: the operations' pairs run forward, and in reverse. What it keeps for the reverse is
//! `Checkpointing`'s choice; elementwise parts are always computed again. Knows its own weights and branches, no files.
//! Read base.rs next.

use candle_core::{Result, Tensor};

use super::adapter::{LayerPairs, MAX_LINEARS};
use crate::ops::attention::{self, Cached, Heads};
use crate::ops::linear::{self, InputGradient, LowRank, Part};
use crate::ops::rope::{self, Angles, Turn};
use crate::ops::weight::Weight;
use crate::ops::{cpu, norm, swiglu};

/// What a block keeps for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checkpointing {
    /// All inputs of its linears and attention: most memory, least time.
    Off,
    /// Its input alone; the backward runs the block forward once more.
    Block,
}

/// The frozen weights of one block.
pub struct Block {
    /// In the order of `LinearShapes::linears`.
    pub linears: Vec<Weight>,
    /// (D) weight of the norm before attention.
    pub input_norm: Vec<f32>,
    /// (D) weight of the norm before the MLP.
    pub post_attention_norm: Vec<f32>,
}

/// What all blocks of a base share.
pub struct Geometry {
    /// Heads of the attention.
    pub heads: Heads,
    /// Epsilon of the norms.
    pub eps: f64,
    /// Rotations of every position.
    pub angles: Angles,
}

/// Where a batch's tokens stand.
#[derive(Clone, Copy)]
pub struct Layout<'a> {
    /// (S + 1) row offsets of the sequences.
    pub offsets: &'a [usize],
    /// (N) positions.
    pub positions: &'a [u32],
}

/// Inputs of the backward, (N, ..) each.
pub struct Kept {
    x: Tensor,
    rest: Option<Activations>,
}

struct Activations {
    z_qkv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    z_o: Tensor,
    x2: Tensor,
    z_gate_up: Tensor,
    gate: Tensor,
    up: Tensor,
    z_down: Tensor,
}

/// (dA, dB) of each map that has a branch, in the order of `LinearShapes::linears`.
pub type BlockGradients = [Option<(Tensor, Tensor)>; MAX_LINEARS];

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

impl Block {
    fn part<'a>(&'a self, pairs: Option<&'a LayerPairs>, linear: usize) -> Part<'a> {
        let pair = pairs.and_then(|p| p[linear].as_ref());
        Part { weight: &self.linears[linear], lora: pair.map(|p| LowRank { a: &p.a, b: &p.b, scale: p.scale }) }
    }

    fn qkv<'a>(&'a self, pairs: Option<&'a LayerPairs>) -> [Part<'a>; 3] {
        [Q, K, V].map(|p| self.part(pairs, p))
    }

    fn gate_up<'a>(&'a self, pairs: Option<&'a LayerPairs>) -> [Part<'a>; 2] {
        [GATE, UP].map(|p| self.part(pairs, p))
    }

    /// y (N, D) = x2 + mlp(norm(x2)), x2 = x + attention(norm(x)), with everything between.
    fn run(
        &self,
        pairs: Option<&LayerPairs>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: &Tensor,
    ) -> Result<(Tensor, Activations)> {
        let h = norm::forward(x, &self.input_norm, geometry.eps)?;
        let (qkv, z_qkv) = linear::forward(&h, &self.qkv(pairs), None)?;
        let [q, k, v] = take(qkv);
        let q = rope::rotate(&q, layout.positions, &geometry.angles, Turn::Forward)?;
        let k = rope::rotate(&k, layout.positions, &geometry.angles, Turn::Forward)?;
        let o = attention::forward(&q, &k, &v, layout.offsets, geometry.heads)?;
        let (x2, z_o) = linear::forward(&o, &[self.part(pairs, O)], Some(x))?;
        let [x2] = take(x2);
        let (y, z_gate_up, gate, up, z_down) = self.mlp(pairs, geometry, &x2)?;
        Ok((y, Activations { z_qkv, q, k, v, o, z_o, x2, z_gate_up, gate, up, z_down }))
    }

    fn mlp(
        &self,
        pairs: Option<&LayerPairs>,
        geometry: &Geometry,
        x2: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor, Tensor, Tensor)> {
        let h = norm::forward(x2, &self.post_attention_norm, geometry.eps)?;
        let (gate_up, z_gate_up) = linear::forward(&h, &self.gate_up(pairs), None)?;
        let [gate, up] = take(gate_up);
        let m = swiglu::forward(&gate, &up)?;
        let (y, z_down) = linear::forward(&m, &[self.part(pairs, DOWN)], Some(x2))?;
        let [y] = take(y);
        Ok((y, z_gate_up, gate, up, z_down))
    }

    /// y (N, D) of x (N, D), keeping nothing.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        pairs: Option<&LayerPairs>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: &Tensor,
    ) -> Result<Tensor> {
        Ok(self.run(pairs, geometry, layout, x)?.0)
    }

    /// y (N, D) of x (N, D), with what `backward` wants.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_kept(
        &self,
        pairs: Option<&LayerPairs>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: Tensor,
        checkpoint: Checkpointing,
    ) -> Result<(Tensor, Kept)> {
        let (y, rest) = self.run(pairs, geometry, layout, &x)?;
        Ok((y, Kept { x, rest: (checkpoint == Checkpointing::Off).then_some(rest) }))
    }

    /// y (N, D) of x (N, D) for the prompts of sequences, whose keys and values go into `caches` (S), empty before.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn prefill(
        &self,
        pairs: Option<&LayerPairs>,
        geometry: &Geometry,
        layout: Layout<'_>,
        x: &Tensor,
        caches: &mut [Cached],
    ) -> Result<Tensor> {
        let (y, kept) = self.run(pairs, geometry, layout, x)?;
        let (k, v) = (cpu::view(&kept.k)?, cpu::view(&kept.v)?);
        let width = geometry.heads.kv * geometry.heads.dim;
        for (cache, bounds) in caches.iter_mut().zip(layout.offsets.windows(2)) {
            cache.keys.extend_from_slice(&k[bounds[0] * width..bounds[1] * width]);
            cache.values.extend_from_slice(&v[bounds[0] * width..bounds[1] * width]);
        }
        Ok(y)
    }

    /// y (S, D) of x (S, D): one new token a sequence, at `positions` (S), over the caches, which grow by it.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn decode(
        &self,
        pairs: Option<&LayerPairs>,
        geometry: &Geometry,
        positions: &[u32],
        x: &Tensor,
        caches: &mut [Cached],
    ) -> Result<Tensor> {
        let h = norm::forward(x, &self.input_norm, geometry.eps)?;
        let [q, k, v] = take(linear::forward(&h, &self.qkv(pairs), None)?.0);
        let q = rope::rotate(&q, positions, &geometry.angles, Turn::Forward)?;
        let k = rope::rotate(&k, positions, &geometry.angles, Turn::Forward)?;
        let width = geometry.heads.kv * geometry.heads.dim;
        {
            let (k, v) = (cpu::view(&k)?, cpu::view(&v)?);
            for ((cache, k), v) in caches.iter_mut().zip(k.chunks_exact(width)).zip(v.chunks_exact(width)) {
                cache.keys.extend_from_slice(k);
                cache.values.extend_from_slice(v);
            }
        }
        let o = attention::decode(&q, &caches.iter().collect::<Vec<_>>(), geometry.heads)?;
        let [x2] = take(linear::forward(&o, &[self.part(pairs, O)], Some(x))?.0);
        Ok(self.mlp(pairs, geometry, &x2)?.0)
    }

    /// dL/dx (N, D), `None` where unused, and the gradients of this block's branches, of dL/dy (N, D).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(
        &self,
        pairs: Option<&LayerPairs>,
        geometry: &Geometry,
        layout: Layout<'_>,
        kept: Kept,
        dy: &Tensor,
        wanted: InputGradient,
    ) -> Result<(Option<Tensor>, BlockGradients)> {
        let Kept { x, rest } = kept;
        let a = match rest {
            Some(a) => a,
            None => self.run(pairs, geometry, layout, &x)?.1,
        };
        let mut grads = BlockGradients::default();
        // y = x2 + down(swiglu(gate, up))
        let m = swiglu::forward(&a.gate, &a.up)?;
        let down = self.part(pairs, DOWN);
        let g = linear::backward(&m, &[down], &a.z_down, &[dy], InputGradient::Wanted)?;
        drop(m);
        let dm = keep(&mut grads, &[DOWN], g)?;
        let (dgate, dup) = swiglu::backward(&a.gate, &a.up, &dm)?;
        // gate, up of norm(x2)
        let h2 = norm::forward(&a.x2, &self.post_attention_norm, geometry.eps)?;
        let g = linear::backward(&h2, &self.gate_up(pairs), &a.z_gate_up, &[&dgate, &dup], InputGradient::Wanted)?;
        let dh2 = keep(&mut grads, &[GATE, UP], g)?;
        let dx2 = norm::backward(&a.x2, &self.post_attention_norm, geometry.eps, &dh2, dy)?;
        // x2 = x + o_proj(attention)
        let o_proj = self.part(pairs, O);
        let g = linear::backward(&a.o, &[o_proj], &a.z_o, &[&dx2], InputGradient::Wanted)?;
        let d_o = keep(&mut grads, &[O], g)?;
        let (dq, dk, dv) = attention::backward(&a.q, &a.k, &a.v, layout.offsets, geometry.heads, &d_o)?;
        let dq = rope::rotate(&dq, layout.positions, &geometry.angles, Turn::Back)?;
        let dk = rope::rotate(&dk, layout.positions, &geometry.angles, Turn::Back)?;
        // q, k, v of norm(x)
        let h = norm::forward(&x, &self.input_norm, geometry.eps)?;
        let g = linear::backward(&h, &self.qkv(pairs), &a.z_qkv, &[&dq, &dk, &dv], wanted)?;
        let qkv = [Q, K, V];
        if wanted == InputGradient::Unused {
            store(&mut grads, &qkv, g.lora);
            return Ok((None, grads));
        }
        let dh = keep(&mut grads, &qkv, g)?;
        let dx = norm::backward(&x, &self.input_norm, geometry.eps, &dh, &dx2)?;
        Ok((Some(dx), grads))
    }
}

/// The N outputs of a group of N.
fn take<const N: usize>(outputs: Vec<Tensor>) -> [Tensor; N] {
    <[Tensor; N]>::try_from(outputs).unwrap_or_else(|_| unreachable!("a group gives one output a part"))
}

fn store(grads: &mut BlockGradients, linears: &[usize], lora: Vec<Option<(Tensor, Tensor)>>) {
    for (&i, pair) in linears.iter().zip(lora) {
        grads[i] = pair;
    }
}

fn keep(grads: &mut BlockGradients, linears: &[usize], g: linear::Gradients) -> Result<Tensor> {
    store(grads, linears, g.lora);
    g.input.ok_or_else(|| candle_core::Error::Msg("an input gradient was asked for and not made".into()))
}
