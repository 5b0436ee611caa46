//! Attention on the CPU. One work item is a (sequence, kv head) pair; 48 queries at a time have their scores in a
//! scratch buffer. Read `mod.rs` beside it for the formulas.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::kv_cache::CachedSequence;
use super::kv_cache::HostCache;
use super::{Heads, QUERIES, Sequences};
use crate::ops::cpu::gemm::{Into, Mat, gemm};
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{
    Buffer, Isa, Out, dot_plain, exp, four_dots, lane_sum, max, parallel, soft_cap, soft_cap_backward, tensor,
    vectorised, view,
};

/// o (N, q * dim) of q, k and v.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, sequences: Sequences<'_>, heads: Heads) -> Result<Tensor> {
    let cu_seqlens = sequences.cu_seqlens;
    let n = cu_seqlens.last().copied().unwrap_or(0);
    let (qs, ks, vs) = (view(q)?, view(k)?, view(v)?);
    let (wq, wkv, dim, isa) = (heads.q * heads.dim, heads.kv * heads.dim, heads.dim, Isa::detect());
    let mut o = Buffer::new(n * wq);
    let out = o.out();
    let items = items(cu_seqlens, heads.kv);
    parallel(items.len(), cost(cu_seqlens, heads), |range| {
        for &(s, g) in &items[range] {
            let (start, t, key_len) = (cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s], sequences.key_len(s));
            with_scratch(dim * t + QUERIES * t, |scratch| {
                let (k_t, scores) = scratch.split_at_mut(dim * t);
                transpose_head(&ks[start * wkv..], wkv, g * dim, dim, t, k_t);
                for h in g * heads.q / heads.kv..(g + 1) * heads.q / heads.kv {
                    for i0 in (0..t).step_by(QUERIES) {
                        let rows = QUERIES.min(t - i0);
                        // The scores' columns are the keys from j0, the first that any of these queries attends to.
                        let j0 = heads.attended(i0, key_len).start;
                        let columns = i0 + rows - j0;
                        // SAFETY: all blocks lie inside this sequence's rows and this head's columns, which this item
                        // alone writes.
                        unsafe {
                            let (q, k) = (Mat::rows(&qs, wq).from(start + i0, h * dim), Mat::rows(k_t, t).from(0, j0));
                            gemm(isa, rows, columns, dim, q, k, scores.as_mut_ptr(), t, Into::Fresh);
                            for r in 0..rows {
                                let row = &mut scores[r * t..r * t + columns];
                                if let Some(cap) = heads.soft_cap {
                                    soft_cap(row, heads.scale / cap, cap);
                                }
                                let attended = heads.attended(i0 + r, key_len);
                                softmax(row, attended.start - j0..attended.end - j0, heads.softmax_scale());
                            }
                            let v = Mat::rows(&vs, wkv).from(start + j0, g * dim);
                            let to = out.at((start + i0) * wq + h * dim);
                            gemm(isa, rows, dim, columns, Mat::rows(scores, t), v, to, wq, Into::Fresh);
                        }
                    }
                }
            });
        }
    });
    // SAFETY: every row of every head is written.
    tensor(unsafe { o.finish() }, (n, wq))
}

/// (dL/dq, dL/dk, dL/dv) of dL/do; probabilities are recomputed.
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: Sequences<'_>,
    heads: Heads,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let cu_seqlens = sequences.cu_seqlens;
    let n = cu_seqlens.last().copied().unwrap_or(0);
    let (wq, wkv, dim, isa) = (heads.q * heads.dim, heads.kv * heads.dim, heads.dim, Isa::detect());
    let (qs, ks, vs, gs) = (view(q)?, view(k)?, view(v)?, view(d_o)?);
    let mut dq = Buffer::new(n * wq);
    let (mut dk, mut dv) = (vec![0f32; n * wkv], vec![0f32; n * wkv]);
    let (oq, ok, ov) = (dq.out(), Out::of(&mut dk), Out::of(&mut dv));
    let items = items(cu_seqlens, heads.kv);
    parallel(items.len(), 3 * cost(cu_seqlens, heads), |range| {
        for &(s, g) in &items[range] {
            let (start, t, key_len) = (cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s], sequences.key_len(s));
            let capped = if heads.soft_cap.is_some() { t } else { 0 };
            with_scratch(2 * dim * t + 2 * QUERIES * t + capped, |scratch| {
                let (k_t, rest) = scratch.split_at_mut(dim * t);
                let (v_t, rest) = rest.split_at_mut(dim * t);
                let (p, rest) = rest.split_at_mut(QUERIES * t);
                let (dp, capped) = rest.split_at_mut(QUERIES * t);
                transpose_head(&ks[start * wkv..], wkv, g * dim, dim, t, k_t);
                transpose_head(&vs[start * wkv..], wkv, g * dim, dim, t, v_t);
                for h in g * heads.q / heads.kv..(g + 1) * heads.q / heads.kv {
                    for i0 in (0..t).step_by(QUERIES) {
                        let rows = QUERIES.min(t - i0);
                        let j0 = heads.attended(i0, key_len).start;
                        let columns = i0 + rows - j0;
                        // SAFETY: as in the forward; dk and dv of this sequence and kv head belong to this item.
                        unsafe {
                            let q = Mat::rows(&qs, wq).from(start + i0, h * dim);
                            let g_o = Mat::rows(&gs, wq).from(start + i0, h * dim);
                            let k = Mat::rows(&ks, wkv).from(start + j0, g * dim);
                            let (k_t, v_t) = (Mat::rows(k_t, t).from(0, j0), Mat::rows(v_t, t).from(0, j0));
                            gemm(isa, rows, columns, dim, q, k_t, p.as_mut_ptr(), t, Into::Fresh);
                            gemm(isa, rows, columns, dim, g_o, v_t, dp.as_mut_ptr(), t, Into::Fresh);
                            for r in 0..rows {
                                let (p, dp) = (&mut p[r * t..r * t + columns], &mut dp[r * t..r * t + columns]);
                                let attended = heads.attended(i0 + r, key_len);
                                let attended = attended.start - j0..attended.end - j0;
                                match heads.soft_cap {
                                    None => {
                                        softmax(p, attended.clone(), heads.scale);
                                        softmax_backward(p, dp, attended, heads.scale);
                                    }
                                    Some(cap) => {
                                        soft_cap(p, heads.scale / cap, cap);
                                        let capped = &mut capped[..columns];
                                        capped.copy_from_slice(p);
                                        softmax(p, attended.clone(), 1.0);
                                        softmax_backward(p, dp, attended, 1.0);
                                        soft_cap_backward(capped, dp, heads.scale, cap);
                                    }
                                }
                            }
                            let (p, ds) = (Mat::rows(p, t), Mat::rows(dp, t));
                            let at = (start + j0) * wkv + g * dim;
                            gemm(isa, rows, dim, columns, ds, k, oq.at((start + i0) * wq + h * dim), wq, Into::Fresh);
                            gemm(isa, columns, dim, rows, ds.t(), q, ok.at(at), wkv, Into::Add);
                            gemm(isa, columns, dim, rows, p.t(), g_o, ov.at(at), wkv, Into::Add);
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

/// o (S, q * dim) of one query per cached sequence.
pub fn decode(q: &Tensor, cache: &HostCache, heads: Heads) -> Result<Tensor> {
    let (n, width) = q.dims2()?;
    let caches = &cache.sequences;
    let qs = view(q)?;
    let mut o = vec![0f32; n * width];
    let out = Out::of(&mut o);
    let kv = heads.kv * heads.dim;
    let cost = caches.iter().map(|c| c.keys.len()).sum::<usize>() * 2 * heads.q / heads.kv;
    parallel(n * heads.q, cost, |range| {
        for i in range {
            let (s, h) = (i / heads.q, i % heads.q);
            let keys = caches[s].keys.len() / kv;
            with_scratch(keys - heads.first_key(keys.saturating_sub(1)), |scores| {
                // SAFETY: head h of row s belongs to this item.
                let o = unsafe { out.slice(i * heads.dim, heads.dim) };
                attend_one(&qs[i * heads.dim..(i + 1) * heads.dim], &caches[s], heads, h, scores, o);
            });
        }
    });
    tensor(o, (n, width))
}

/// (sequence, kv head) pairs: the work items.
fn items(cu_seqlens: &[usize], heads: usize) -> Vec<(usize, usize)> {
    (0..cu_seqlens.len().saturating_sub(1)).flat_map(|s| (0..heads).map(move |h| (s, h))).collect()
}

/// Multiply-adds of one product of queries and keys.
fn cost(cu_seqlens: &[usize], heads: Heads) -> usize {
    cu_seqlens.windows(2).map(|w| (w[1] - w[0]).pow(2) * heads.q * heads.dim).sum()
}

/// Transposes one head's columns of `rows` rows: out[d * rows + t].
fn transpose_head(values: &[f32], width: usize, column: usize, dim: usize, rows: usize, out: &mut [f32]) {
    for t in 0..rows {
        for d in 0..dim {
            out[d * rows + t] = values[t * width + column + d];
        }
    }
}

vectorised! {
    /// Softmax of scale * row over the columns `attended`, in place; zeros elsewhere.
    fn softmax(row: &mut [f32], attended: Range<usize>, scale: f32) {
        let (inside, after) = row.split_at_mut(attended.end);
        let (before, inside) = inside.split_at_mut(attended.start);
        before.fill(0.0);
        let top = max(inside) * scale;
        let mut lanes = [0f32; 16];
        let (blocks, rest) = inside.as_chunks_mut::<16>();
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
        for x in inside {
            *x *= inv;
        }
        after.fill(0.0);
    }
}

vectorised! {
    /// dS = scale * P (dP - sum_j P dP), in place of dP; zeros outside `attended`.
    fn softmax_backward(p: &[f32], dp: &mut [f32], attended: Range<usize>, scale: f32) {
        let (inside, after) = dp.split_at_mut(attended.end);
        let (before, inside) = inside.split_at_mut(attended.start);
        before.fill(0.0);
        let p = &p[attended];
        let sum = dot_plain(p, inside);
        for (p, d) in p.iter().zip(inside) {
            *d = scale * p * (*d - sum);
        }
        after.fill(0.0);
    }
}

vectorised! {
    /// Attention of one query of head `h` over a sequence's keys and values; `scores` has one element per attended key.
    fn attend_one(q: &[f32], cache: &CachedSequence, heads: Heads, h: usize, scores: &mut [f32], o: &mut [f32]) {
        let (width, column) = (heads.kv * heads.dim, h * heads.kv / heads.q * heads.dim);
        // The last key is the query's own.
        let first = heads.first_key((cache.keys.len() / width).saturating_sub(1));
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
            soft_cap(scores, heads.scale / cap, cap);
        }
        let len = scores.len();
        softmax(scores, 0..len, heads.softmax_scale());
        let values = &cache.values[first * width..];
        // 32 columns at a time stay in registers over all values.
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
