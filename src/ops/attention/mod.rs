//! Causal attention over ragged batches, with grouped key/value heads; and one query a sequence over a cache.
//!
//! o_i = sum_{j <= i} p_ij v_j, p_i = softmax_j(s_ij), s_ij = scale q_i . k_j, within each sequence and head; with a window
//! w only j > i - w is seen, with a soft cap c the scores are c tanh(s / c). Scores live 48 queries at a time: never
//! T x T for a long sequence. Kept for the backward: q, k, v alone. Read head.rs next.

use candle_core::{Result, Tensor};

use std::ops::Range;

use super::cpu::{Buffer, Isa, Out, dot_plain, exp, four_dots, lane_sum, max, parallel, tanh, tensor, view};
use crate::ops::cpu::gemm::{Into, Mat, gemm};
use crate::ops::cpu::pack::with_scratch;

/// Queries whose scores are held at once.
pub(crate) const QUERIES: usize = 48;

/// Heads of one attention layer, and what they see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key/value heads; `q` is a multiple of it.
    pub kv: usize,
    /// Width of one head.
    pub dim: usize,
    /// What products of queries and keys are multiplied by.
    pub scale: f32,
    /// Each query sees so many keys at the most, its own included; `None` is all before it.
    pub window: Option<usize>,
    /// Scores are bent to stay within this (Gemma 2).
    pub soft_cap: Option<f32>,
}

impl Heads {
    /// Heads that see everything before them, scaled by 1 / sqrt(dim).
    pub fn full(q: usize, kv: usize, dim: usize) -> Self {
        Self { q, kv, dim, scale: 1.0 / (dim as f32).sqrt(), window: None, soft_cap: None }
    }

    /// The first key that query `i` sees.
    fn first(self, i: usize) -> usize {
        self.window.map_or(0, |w| (i + 1).saturating_sub(w))
    }

    /// The keys that query `i` sees where only the first `readable` may be seen: one at least.
    fn seen(self, i: usize, readable: usize) -> Range<usize> {
        let end = readable.min(i + 1);
        self.first(i).min(end - 1)..end
    }

    /// The factor that the softmax itself applies: 1 where the cap has applied the scale.
    fn softmax_scale(self) -> f32 {
        if self.soft_cap.is_some() { 1.0 } else { self.scale }
    }

    fn check(self, q: &Tensor, k: &Tensor, v: &Tensor, offsets: &[usize]) -> Result<usize> {
        let (n, width) = q.dims2()?;
        let kv = [n, self.kv * self.dim];
        if width != self.q * self.dim || k.dims() != kv || v.dims() != kv || offsets.last() != Some(&n) {
            candle_core::bail!(
                "attention {self:?}: q {:?}, k {:?}, v {:?}, {} tokens by offsets",
                q.dims(),
                k.dims(),
                v.dims(),
                offsets.last().copied().unwrap_or(0)
            );
        }
        Ok(n)
    }
}

/// Where the sequences of a batch lie, and what of them may be seen.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// (S + 1): sequence s is rows offsets[s]..offsets[s + 1].
    pub offsets: &'a [usize],
    /// (S): only so many of a sequence's first tokens are keys, one or more; `None` is all.
    pub readable: Option<&'a [usize]>,
}

impl<'a> Sequences<'a> {
    /// Whole sequences.
    pub fn whole(offsets: &'a [usize]) -> Self {
        Self { offsets, readable: None }
    }

    fn readable(self, s: usize) -> usize {
        self.readable.map_or(usize::MAX, |readable| readable[s])
    }
}

super::cpu::vectorised! {
    /// x -> cap tanh(scale x / cap).
    fn bend(row: &mut [f32], scale: f32, cap: f32) {
        let inner = scale / cap;
        for x in row {
            *x = cap * tanh(*x * inner);
        }
    }
}

super::cpu::vectorised! {
    /// The bend's slope scale (1 - (s / cap)^2) of bent scores s.
    fn unbend(bent: &[f32], d: &mut [f32], scale: f32, cap: f32) {
        for (d, &s) in d.iter_mut().zip(bent) {
            let t = s / cap;
            *d *= scale * (1.0 - t * t);
        }
    }
}

super::cpu::vectorised! {
    /// Softmax of scale * row over the numbers `seen`; zeros beside them.
    fn softmax(row: &mut [f32], seen: Range<usize>, scale: f32) {
        let (live, dead) = row.split_at_mut(seen.end);
        let (before, live) = live.split_at_mut(seen.start);
        before.fill(0.0);
        let top = max(live) * scale;
        let mut lanes = [0f32; 16];
        let (blocks, rest) = live.as_chunks_mut::<16>();
        for block in blocks {
            for (x, sum) in block.iter_mut().zip(&mut lanes) {
                *x = exp(*x * scale - top);
                *sum += *x;
            }
        }
        for (x, sum) in rest.iter_mut().zip(&mut lanes) {
            *x = exp(*x * scale - top);
            *sum += *x;
        }
        let inv = 1.0 / lane_sum(&lanes);
        for x in live {
            *x *= inv;
        }
        dead.fill(0.0);
    }
}

super::cpu::vectorised! {
    /// dS = scale * P (dP - sum_j P dP), in dP's place; zeros beside `seen`.
    fn softmax_backward(p: &[f32], dp: &mut [f32], seen: Range<usize>, scale: f32) {
        let (live, dead) = dp.split_at_mut(seen.end);
        let (before, live) = live.split_at_mut(seen.start);
        before.fill(0.0);
        let p = &p[seen];
        let sum = dot_plain(p, live);
        for (p, d) in p.iter().zip(live) {
            *d = scale * p * (*d - sum);
        }
        dead.fill(0.0);
    }
}

/// One head's columns of `rows` rows, transposed: out[d * rows + t].
fn transposed(values: &[f32], width: usize, column: usize, dim: usize, rows: usize, out: &mut [f32]) {
    for t in 0..rows {
        for d in 0..dim {
            out[d * rows + t] = values[t * width + column + d];
        }
    }
}

/// (sequence, head) pairs: the items that threads take.
fn items(offsets: &[usize], heads: usize) -> Vec<(usize, usize)> {
    (0..offsets.len().saturating_sub(1)).flat_map(|s| (0..heads).map(move |h| (s, h))).collect()
}

fn cost(offsets: &[usize], heads: Heads) -> usize {
    offsets.windows(2).map(|w| (w[1] - w[0]).pow(2) * heads.q * heads.dim).sum()
}

/// o (N, q * dim) of q (N, q * dim), k and v (N, kv * dim).
///
/// # Errors
/// If shapes do not fit.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, spans: Sequences<'_>, heads: Heads) -> Result<Tensor> {
    let offsets = spans.offsets;
    let n = heads.check(q, k, v, offsets)?;
    let (qs, ks, vs) = (view(q)?, view(k)?, view(v)?);
    let (wq, wkv, dim, isa) = (heads.q * heads.dim, heads.kv * heads.dim, heads.dim, Isa::detect());
    let mut o = Buffer::new(n * wq);
    let out = o.out();
    let items = items(offsets, heads.kv);
    parallel(items.len(), cost(offsets, heads), |range| {
        for &(s, g) in &items[range] {
            let (start, t, readable) = (offsets[s], offsets[s + 1] - offsets[s], spans.readable(s));
            with_scratch(dim * t + QUERIES * t, |scratch| {
                let (k_t, scores) = scratch.split_at_mut(dim * t);
                transposed(&ks[start * wkv..], wkv, g * dim, dim, t, k_t);
                for h in g * heads.q / heads.kv..(g + 1) * heads.q / heads.kv {
                    for i0 in (0..t).step_by(QUERIES) {
                        let rows = QUERIES.min(t - i0);
                        // Keys that any of these queries sees; columns of the scores count from j0.
                        let j0 = heads.seen(i0, readable).start;
                        let seen = i0 + rows - j0;
                        // SAFETY: all blocks lie inside this sequence's rows and this head's columns, which this item
                        // alone writes.
                        unsafe {
                            let (q, k) = (Mat::rows(&qs, wq).from(start + i0, h * dim), Mat::rows(k_t, t).from(0, j0));
                            gemm(isa, rows, seen, dim, q, k, scores.as_mut_ptr(), t, Into::Fresh);
                            for r in 0..rows {
                                let row = &mut scores[r * t..r * t + seen];
                                if let Some(cap) = heads.soft_cap {
                                    bend(row, heads.scale, cap);
                                }
                                let live = heads.seen(i0 + r, readable);
                                softmax(row, live.start - j0..live.end - j0, heads.softmax_scale());
                            }
                            let v = Mat::rows(&vs, wkv).from(start + j0, g * dim);
                            let to = out.at((start + i0) * wq + h * dim);
                            gemm(isa, rows, dim, seen, Mat::rows(scores, t), v, to, wq, Into::Fresh);
                        }
                    }
                }
            });
        }
    });
    // SAFETY: every row of every head is written.
    tensor(unsafe { o.finish() }, (n, wq))
}

/// (dL/dq, dL/dk, dL/dv) of dL/do (N, q * dim). Probabilities are computed again.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: Sequences<'_>,
    heads: Heads,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let offsets = spans.offsets;
    let n = heads.check(q, k, v, offsets)?;
    let (wq, wkv, dim, isa) = (heads.q * heads.dim, heads.kv * heads.dim, heads.dim, Isa::detect());
    if d_o.dims() != [n, wq] {
        candle_core::bail!("attention backward: a gradient {:?} for {n} x {wq}", d_o.dims());
    }
    let (qs, ks, vs, gs) = (view(q)?, view(k)?, view(v)?, view(d_o)?);
    let mut dq = Buffer::new(n * wq);
    let (mut dk, mut dv) = (vec![0f32; n * wkv], vec![0f32; n * wkv]);
    let (oq, ok, ov) = (dq.out(), Out::of(&mut dk), Out::of(&mut dv));
    let items = items(offsets, heads.kv);
    parallel(items.len(), 3 * cost(offsets, heads), |range| {
        for &(s, g) in &items[range] {
            let (start, t, readable) = (offsets[s], offsets[s + 1] - offsets[s], spans.readable(s));
            let bent = if heads.soft_cap.is_some() { t } else { 0 };
            with_scratch(2 * dim * t + 2 * QUERIES * t + bent, |scratch| {
                let (k_t, rest) = scratch.split_at_mut(dim * t);
                let (v_t, rest) = rest.split_at_mut(dim * t);
                let (p, rest) = rest.split_at_mut(QUERIES * t);
                let (dp, bent) = rest.split_at_mut(QUERIES * t);
                transposed(&ks[start * wkv..], wkv, g * dim, dim, t, k_t);
                transposed(&vs[start * wkv..], wkv, g * dim, dim, t, v_t);
                for h in g * heads.q / heads.kv..(g + 1) * heads.q / heads.kv {
                    for i0 in (0..t).step_by(QUERIES) {
                        let rows = QUERIES.min(t - i0);
                        let j0 = heads.seen(i0, readable).start;
                        let seen = i0 + rows - j0;
                        // SAFETY: as in the forward; dk and dv of this sequence and group are this item's own.
                        unsafe {
                            let q = Mat::rows(&qs, wq).from(start + i0, h * dim);
                            let g_o = Mat::rows(&gs, wq).from(start + i0, h * dim);
                            let k = Mat::rows(&ks, wkv).from(start + j0, g * dim);
                            let (k_t, v_t) = (Mat::rows(k_t, t).from(0, j0), Mat::rows(v_t, t).from(0, j0));
                            gemm(isa, rows, seen, dim, q, k_t, p.as_mut_ptr(), t, Into::Fresh);
                            gemm(isa, rows, seen, dim, g_o, v_t, dp.as_mut_ptr(), t, Into::Fresh);
                            for r in 0..rows {
                                let (p, dp) = (&mut p[r * t..r * t + seen], &mut dp[r * t..r * t + seen]);
                                let live = heads.seen(i0 + r, readable);
                                let live = live.start - j0..live.end - j0;
                                match heads.soft_cap {
                                    None => {
                                        softmax(p, live.clone(), heads.scale);
                                        softmax_backward(p, dp, live, heads.scale);
                                    }
                                    Some(cap) => {
                                        bend(p, heads.scale, cap);
                                        let bent = &mut bent[..seen];
                                        bent.copy_from_slice(p);
                                        softmax(p, live.clone(), 1.0);
                                        softmax_backward(p, dp, live, 1.0);
                                        unbend(bent, dp, heads.scale, cap);
                                    }
                                }
                            }
                            let (p, ds) = (Mat::rows(p, t), Mat::rows(dp, t));
                            let at = (start + j0) * wkv + g * dim;
                            gemm(isa, rows, dim, seen, ds, k, oq.at((start + i0) * wq + h * dim), wq, Into::Fresh);
                            gemm(isa, seen, dim, rows, ds.t(), q, ok.at(at), wkv, Into::Add);
                            gemm(isa, seen, dim, rows, p.t(), g_o, ov.at(at), wkv, Into::Add);
                        }
                    }
                }
            });
        }
    });
    // SAFETY: every row of every head of dq is written.
    let dq = unsafe { dq.finish() };
    Ok((tensor(dq, (n, wq))?, tensor(dk, (n, wkv))?, tensor(dv, (n, wkv))?))
}

/// Keys and values of one sequence in one layer, in the order of its tokens.
#[derive(Clone, Default)]
pub struct Cached {
    /// (tokens, kv * dim), after rotation.
    pub keys: Vec<f32>,
    /// (tokens, kv * dim).
    pub values: Vec<f32>,
}

/// A list grows by so many numbers at least: doubling would leave half of a long one unused.
const GROWTH: usize = 1 << 14;

impl Cached {
    /// Empty, with room for so many numbers in each list.
    pub fn with_room(numbers: usize) -> Self {
        Self { keys: Vec::with_capacity(numbers), values: Vec::with_capacity(numbers) }
    }

    /// Adds the keys and values of some tokens, as many numbers of each.
    pub fn extend(&mut self, keys: &[f32], values: &[f32]) {
        for (list, more) in [(&mut self.keys, keys), (&mut self.values, values)] {
            if list.capacity() - list.len() < more.len() {
                list.reserve_exact(more.len().max(GROWTH));
            }
            list.extend_from_slice(more);
        }
    }
}

super::cpu::vectorised! {
    fn attend_one(q: &[f32], cache: &Cached, heads: Heads, h: usize, scores: &mut [f32], o: &mut [f32]) {
        let (width, column) = (heads.kv * heads.dim, h * heads.kv / heads.q * heads.dim);
        // The last of all keys is the query's own.
        let first = heads.first((cache.keys.len() / width).saturating_sub(1));
        let own = column..column + heads.dim;
        let keys = &cache.keys[first * width..];
        let (fours, rest) = scores.as_chunks_mut::<4>();
        for (four, keys) in fours.iter_mut().zip(keys.chunks_exact(4 * width)) {
            *four = four_dots(q, std::array::from_fn(|i| &keys[i * width..][own.clone()]));
        }
        let done = 4 * fours.len() * width;
        for (score, key) in rest.iter_mut().zip(keys[done..].chunks_exact(width)) {
            *score = dot_plain(q, &key[own.clone()]);
        }
        if let Some(cap) = heads.soft_cap {
            bend(scores, heads.scale, cap);
        }
        let len = scores.len();
        softmax(scores, 0..len, heads.softmax_scale());
        let values = &cache.values[first * width..];
        // So many columns stay in registers over all values.
        let (blocks, rest) = o.as_chunks_mut::<32>();
        for (b, block) in blocks.iter_mut().enumerate() {
            let mut sum = [0f32; 32];
            for (&p, value) in scores.iter().zip(values.chunks_exact(width)) {
                let value = &value[column + 32 * b..][..32];
                for (sum, &v) in sum.iter_mut().zip(value) {
                    *sum += p * v;
                }
            }
            *block = sum;
        }
        let past = column + 32 * blocks.len();
        rest.fill(0.0);
        for (&p, value) in scores.iter().zip(values.chunks_exact(width)) {
            for (o, &v) in rest.iter_mut().zip(&value[past..]) {
                *o += p * v;
            }
        }
    }
}

/// Decoding: o (S, q * dim) for one new query a sequence, q (S, q * dim), over caches that already hold its own key.
///
/// # Errors
/// If shapes do not fit.
pub fn decode(q: &Tensor, caches: &[&Cached], heads: Heads) -> Result<Tensor> {
    let (n, width) = q.dims2()?;
    if n != caches.len() || width != heads.q * heads.dim {
        candle_core::bail!("decode {heads:?}: q {:?} and {} caches", q.dims(), caches.len());
    }
    let qs = view(q)?;
    let mut o = vec![0f32; n * width];
    let out = Out::of(&mut o);
    let kv = heads.kv * heads.dim;
    let cost = caches.iter().map(|c| c.keys.len()).sum::<usize>() * 2 * heads.q / heads.kv;
    parallel(n * heads.q, cost, |range| {
        for i in range {
            let (s, h) = (i / heads.q, i % heads.q);
            let keys = caches[s].keys.len() / kv;
            with_scratch(keys - heads.first(keys.saturating_sub(1)), |scores| {
                // SAFETY: head h of row s belongs to this item.
                let o = unsafe { out.slice(i * heads.dim, heads.dim) };
                attend_one(&qs[i * heads.dim..(i + 1) * heads.dim], caches[s], heads, h, scores, o);
            });
        }
    });
    tensor(o, (n, width))
}
