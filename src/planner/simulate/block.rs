//! Allocations of a decoder block (`model::block`): forward, forward with saved tensors, backward, one decoding step.
//! Buffers are dropped at the same points as in `model::block`. Read network.rs next.

use crate::model::block::Recompute;
use crate::model::config::{Mlp, Placement, QkNorm, Qkv};
use crate::planner::sim_allocator::{Allocation, MemoryCategory};
use crate::planner::simulate::ops::{Part, Simulator, Tensor};
use crate::planner::simulate::shape::{Branches, Network};

/// Saved tensors of a block beside its input.
pub struct Inside {
    attention: Vec<Tensor>,
    x2: Tensor,
    mlp: Vec<Tensor>,
    /// Gate and up with their z; `None` where they are recomputed.
    wide: Option<Vec<Tensor>>,
}

/// Inputs of the backward.
pub struct Kept {
    _x: Tensor,
    rest: Option<Inside>,
}

/// A layer of a network with an adapter's branches.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// The simulated allocator's user.
    pub walk: &'a Simulator,
    /// The network's shapes.
    pub net: &'a Network,
    /// The branches; `None` is the bare base.
    pub branches: Option<&'a Branches>,
    /// Index of the layer.
    pub index: usize,
}

impl Layer<'_> {
    fn parts(&self, range: std::ops::Range<usize>) -> Vec<Part> {
        let part = |i: usize| Part {
            out: self.net.maps.dims(i).1,
            rank: self.branches.map_or(0, |b| b.ranks[self.index][i]),
            dora: self.branches.is_some_and(|b| b.dora),
            stored: self.net.stored[self.index][i],
        };
        range.map(part).collect()
    }

    fn last_map(&self) -> usize {
        self.net.maps.linears().len() - 1
    }

    fn d(&self) -> usize {
        self.net.config.hidden_size
    }

    fn has_before(&self) -> bool {
        matches!(self.net.config.placement, Placement::Before | Placement::Around | Placement::Parallel)
    }

    fn has_inner(&self) -> bool {
        matches!(self.net.config.placement, Placement::Inner | Placement::Around)
    }

    fn rows(&self, m: usize, width: usize) -> Tensor {
        self.walk.rows(MemoryCategory::Blocks, m, width)
    }

    /// `residual::before`: the norm of x, or x itself.
    fn before(&self, m: usize, x: &Tensor) -> Tensor {
        if self.has_before() { self.rows(m, self.d()) } else { x.clone() }
    }

    fn turns(&self) -> bool {
        self.net.config.rotation(self.index).is_some()
    }

    /// `attention::project`: its saved tensors, with q, k and v last.
    fn project(&self, m: usize, x: &Tensor) -> Vec<Tensor> {
        let heads = self.net.config.heads(self.index);
        let h = self.before(m, x);
        let (mut outputs, z) = self.walk.linear(m, self.d(), &self.parts(0..self.net.attention_out()));
        drop(h);
        if self.net.config.qkv != Qkv::Separate {
            let fused = outputs;
            outputs = [heads.q, heads.kv, heads.kv].map(|n| self.rows(m, n * heads.dim)).to_vec();
            drop(fused);
        }
        let v = outputs.pop();
        let (mut kept, mut turned) = (z, vec![]);
        if self.net.config.qk_norm != QkNorm::None {
            let normed = [heads.q, heads.kv].map(|n| self.rows(m, n * heads.dim));
            kept.extend(std::mem::replace(&mut outputs, normed.to_vec()));
        }
        for (x, n) in outputs.into_iter().zip([heads.q, heads.kv]) {
            turned.push(if self.turns() { self.rows(m, n * heads.dim) } else { x.clone() });
        }
        kept.extend(turned);
        kept.extend(v);
        kept
    }

    /// `Join::forward`: the sum, z, and the saved inputs of its norms.
    fn join(&self, m: usize, k: usize, map: usize) -> (Tensor, Vec<Tensor>) {
        let (mut out, z) = self.walk.linear(m, k, &self.parts(map..map + 1));
        let f = out.swap_remove(0);
        let mut kept = z;
        let c = &self.net.config;
        let mut sum = f.clone();
        if self.has_inner() || c.residual_multiplier != 1.0 {
            let normed = self.has_inner().then(|| self.rows(m, self.d()));
            sum = self.rows(m, self.d());
            drop(normed);
            if self.has_inner() {
                kept.push(f);
            }
        }
        if c.placement == Placement::AfterSum {
            let y = self.rows(m, self.d());
            kept.push(sum);
            return (y, kept);
        }
        (sum, kept)
    }

    /// The attention half: x2 and its saved tensors.
    fn attention(&self, lengths: &[usize], x: &Tensor, keep: bool) -> (Tensor, Vec<Tensor>) {
        let m = lengths.iter().sum();
        let heads = self.net.config.heads(self.index);
        let mut kept = self.project(m, x);
        let o = self.walk.attention(lengths, heads);
        if !keep {
            kept.clear();
        }
        let (x2, ends) = self.join(m, heads.q * heads.dim, self.net.attention_out());
        if keep {
            kept.push(o);
            kept.extend(ends);
        }
        (x2, kept)
    }

    /// `mlp::widened`.
    fn widened(&self, m: usize, x: &Tensor) -> Vec<Tensor> {
        let f = self.net.config.intermediate_size;
        let h = self.before(m, x);
        let first = self.net.attention_out() + 1;
        let (mut outputs, z) = self.walk.linear(m, self.d(), &self.parts(first..self.last_map()));
        drop(h);
        if self.net.config.mlp == Mlp::GatedFused {
            let fused = outputs;
            outputs = vec![self.rows(m, f), self.rows(m, f)];
            drop(fused);
        }
        outputs.extend(z);
        outputs
    }

    /// The MLP half: y, the saved tensors of its end, and gate and up if `keep` is set.
    fn mlp(&self, m: usize, x: &Tensor, keep: bool) -> (Tensor, Vec<Tensor>, Option<Vec<Tensor>>) {
        let f = self.net.config.intermediate_size;
        let wide = self.widened(m, x);
        let activated = self.rows(m, f);
        let wide = Some(wide).filter(|_| keep);
        let (y, ends) = self.join(m, f, self.last_map());
        drop(activated);
        (y, ends, wide)
    }

    /// y of x, without saved tensors.
    pub fn forward(&self, lengths: &[usize], x: &Tensor) -> Tensor {
        let m = lengths.iter().sum();
        let (x2, _) = self.attention(lengths, x, false);
        self.mlp(m, if self.net.config.placement == Placement::Parallel { x } else { &x2 }, false).0
    }

    /// `mlp::mlp_again`: gate and up, and the saved tensors of the MLP's end.
    fn mlp_again(&self, m: usize, x: &Tensor) -> (Vec<Tensor>, Vec<Tensor>) {
        let (f, parts) = (self.net.config.intermediate_size, self.parts(self.last_map()..self.last_map() + 1));
        if self.has_inner()
            || self.net.config.placement == Placement::AfterSum
            || parts.iter().any(|part| part.dora && part.rank > 0)
        {
            let (_, ends, wide) = self.mlp(m, x, true);
            return (ends, wide.unwrap_or_default());
        }
        let wide = self.widened(m, x);
        let activated = self.rows(m, f);
        let ends = self.walk.linear_saved_alone(m, f, &parts);
        drop(activated);
        (ends, wide)
    }

    fn run_again(&self, lengths: &[usize], x: &Tensor) -> Inside {
        let m = lengths.iter().sum();
        let (x2, attention) = self.attention(lengths, x, true);
        let (mlp, wide) = self.mlp_again(m, &x2);
        Inside { attention, x2, mlp, wide: Some(wide) }
    }

    fn run(&self, lengths: &[usize], x: &Tensor, keep_wide: bool) -> (Tensor, Inside) {
        let m = lengths.iter().sum();
        let (x2, attention) = self.attention(lengths, x, true);
        let (y, mlp, wide) = self.mlp(m, &x2, keep_wide);
        (y, Inside { attention, x2, mlp, wide })
    }

    /// y of x, with saved tensors.
    pub fn forward_kept(&self, lengths: &[usize], x: Tensor, checkpoint: Recompute) -> (Tensor, Kept) {
        if matches!(checkpoint, Recompute::Block | Recompute::Offload) {
            let y = self.forward(lengths, &x);
            return (y, Kept { _x: x.becomes(MemoryCategory::Inputs), rest: None });
        }
        let (y, inside) = self.run(lengths, &x, checkpoint == Recompute::Off);
        (y, Kept { _x: x.becomes(MemoryCategory::Inputs), rest: Some(inside) })
    }

    /// y of the prompts; keys and values for each response's prompt, of `responses` lengths, go into `cache`, with capacity
    /// for `room` more tokens.
    pub fn prefill(
        &self,
        lengths: &[usize],
        responses: &[usize],
        x: &Tensor,
        room: usize,
        cache: &mut Vec<Allocation>,
    ) -> Tensor {
        let m = lengths.iter().sum();
        let heads = self.net.config.heads(self.index);
        let kept = self.project(m, x);
        let o = self.walk.attention(lengths, heads);
        for t in responses {
            let bytes = (t + room) * heads.kv * heads.dim * size_of::<f32>();
            cache.extend([
                self.walk.ledger.take(MemoryCategory::Cache, bytes),
                self.walk.ledger.take(MemoryCategory::Cache, bytes),
            ]);
        }
        drop(kept);
        let (x2, _) = self.join(m, heads.q * heads.dim, self.net.attention_out());
        drop(o);
        self.mlp(m, if self.net.config.placement == Placement::Parallel { x } else { &x2 }, false).0
    }

    /// y of one token per sequence over caches of `tokens` each.
    pub fn decode(&self, tokens: &[usize], x: &Tensor) -> Tensor {
        let s = tokens.len();
        let heads = self.net.config.heads(self.index);
        let kept = self.project(s, x);
        let o = self.walk.attention_decode(tokens, heads);
        drop(kept);
        let (x2, _) = self.join(s, heads.q * heads.dim, self.net.attention_out());
        drop(o);
        self.mlp(s, if self.net.config.placement == Placement::Parallel { x } else { &x2 }, false).0
    }

    /// dx where it is wanted; the branches' gradients go to `grads`.
    pub fn backward(
        &self,
        lengths: &[usize],
        kept: Kept,
        dy: Tensor,
        wanted: bool,
        grads: &mut Vec<Tensor>,
    ) -> Option<Tensor> {
        let (m, d, c) = (lengths.iter().sum(), self.d(), &self.net.config);
        let (f, heads) = (c.intermediate_size, c.heads(self.index));
        let width = heads.q * heads.dim;
        let Kept { _x: x, rest } = kept;
        let Inside { attention, x2, mlp, wide } = rest.unwrap_or_else(|| self.run_again(lengths, &x));
        let (first, last) = (self.net.attention_out() + 1, self.last_map());
        let is_parallel = c.placement == Placement::Parallel;
        // The MLP's backward.
        let (past, df) = self.join_backward(m, dy);
        let made = wide.is_none().then(|| self.widened(m, &x2));
        let activated = self.rows(m, f);
        let (dm, lora) = self.walk.linear_backward(m, f, &self.parts(last..last + 1), true);
        drop((activated, df));
        grads.extend(lora);
        let mut d_in: Vec<Tensor> = match c.mlp {
            Mlp::Plain => vec![self.rows(m, f)],
            Mlp::Gated | Mlp::GatedFused => vec![self.rows(m, f), self.rows(m, f)],
        };
        if c.mlp == Mlp::GatedFused {
            d_in = vec![self.rows(m, 2 * f)];
        }
        drop(dm);
        let h = self.before(m, &x2);
        let (dh, lora) = self.walk.linear_backward(m, d, &self.parts(first..last), true);
        drop((h, d_in, made));
        grads.extend(lora);
        // Into the residual stream, and through attention.
        let dx2 = if is_parallel { None } else { Some(self.rows(m, d)) };
        drop((dh, mlp, wide));
        let (past, df) = match dx2 {
            Some(dx2) => {
                drop(past);
                self.join_backward(m, dx2)
            }
            None => {
                let (_, df) = self.join_backward(m, past);
                (self.rows(m, d), df)
            }
        };
        let out = first - 1;
        let (d_o, lora) = self.walk.linear_backward(m, width, &self.parts(out..out + 1), true);
        drop(df);
        grads.extend(lora);
        let [mut dq, mut dk, dv] = self.walk.attention_backward(lengths, heads);
        if self.turns() {
            dq = self.rows(m, width);
            dk = self.rows(m, heads.kv * heads.dim);
        }
        if c.qk_norm != QkNorm::None {
            (dq, dk) = (self.rows(m, width), self.rows(m, heads.kv * heads.dim));
        }
        let h = self.before(m, &x);
        let fused = (c.qkv != Qkv::Separate).then(|| self.rows(m, width + 2 * heads.kv * heads.dim));
        let (dh, lora) = self.walk.linear_backward(m, d, &self.parts(0..out), wanted);
        grads.extend(lora);
        drop((h, fused));
        let dx = wanted.then(|| self.rows(m, d));
        drop((d_o, dq, dk, dv, dh, past, attention, x2, x));
        dx
    }

    /// `Join::backward`: (dL/dx on the residual path, dL/df).
    fn join_backward(&self, m: usize, dy: Tensor) -> (Tensor, Tensor) {
        let c = &self.net.config;
        let dsum = if c.placement == Placement::AfterSum { self.rows(m, self.d()) } else { dy };
        let scaled = if c.residual_multiplier == 1.0 { dsum.clone() } else { self.rows(m, self.d()) };
        let df = if self.has_inner() { self.rows(m, self.d()) } else { scaled };
        (dsum, df)
    }
}
