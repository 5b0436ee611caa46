//! Log-probabilities and entropy on the CPU: running maxima and sums over strips of logits. Read `mod.rs` beside it for
//! the formulas, `cpu_strips.rs` for the strips.

use candle_core::{Result, Tensor};

use super::cpu_lora::{HeadLora, LoraSums, RUNS, STRIP};
use super::cpu_strips::{Hidden, strips, strips_and_products};
use super::{Gradients, LmHead, TokenStats};
use crate::ops::cpu::bf16::Cores;
use crate::ops::cpu::gemm::{Into, Mat, gemm};
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{Isa, Out, exp, lane_sum, max, parallel, soft_cap, soft_cap_backward, tensor, vectorised, view};
use crate::ops::linear::cpu_bf16::PackedLhs;

/// Log-probability and entropy of each position.
pub fn forward(h: &Tensor, head: &LmHead<'_>, targets: &[u32], temperature: f64) -> Result<TokenStats> {
    let weight = head.weight;
    let (r, d) = h.dims2()?;
    let hs = view(h)?;
    let inverse = head.softmax_scale(temperature);
    let lora = HeadLora::of(weight, head.lora, &hs, d, 0..r)?;
    let hidden = Hidden::of(&hs, r, d, weight, lora.as_slice());
    let mut runs = vec![Run::EMPTY; RUNS * r];
    let out = RunsOut(runs.as_mut_ptr());
    parallel(RUNS, r * d * weight.rows(), |range| {
        for run in range {
            // SAFETY: the positions of run `run` belong to this item.
            let stats = unsafe { std::slice::from_raw_parts_mut(out.at(run * r), r) };
            strips(&hidden, weight, run, |v0, width, logits| {
                for ((row, stat), &target) in logits.chunks_exact_mut(STRIP).zip(&mut *stats).zip(targets) {
                    let row = &mut row[..width];
                    if let Some(cap) = head.soft_cap {
                        soft_cap(row, head.multiplier / cap, cap);
                    }
                    let (top, sum, weighted) = strip_sums(row, inverse);
                    let best = row.iter().position(|&l| l == top).unwrap_or(0);
                    let target = (target as usize).checked_sub(v0).and_then(|t| row.get(t)).copied();
                    let here = Run { top, sum, weighted, best: (v0 + best) as u32, target: target.unwrap_or(f32::NAN) };
                    *stat = stat.merge(here);
                }
            });
        }
    });
    let mut stats = TokenStats::default();
    for i in 0..r {
        let all = (0..RUNS).fold(Run::EMPTY, |acc, run| acc.merge(runs[run * r + i]));
        let lse = all.top + all.sum.ln();
        stats.logprobs.push(all.target - lse);
        stats.entropy.push(lse - all.weighted / all.sum);
        stats.lse.push(lse);
        stats.argmax.push(all.best);
    }
    Ok(stats)
}

/// dL/dh and LoRA's gradients.
pub fn backward(
    h: &Tensor,
    head: &LmHead<'_>,
    targets: &[u32],
    temperature: f64,
    stats: &TokenStats,
    dlogprobs: &[f32],
    dentropy: &[f32],
) -> Result<Gradients> {
    let weight = head.weight;
    let (r, d) = h.dims2()?;
    let hs = view(h)?;
    let inverse = head.softmax_scale(temperature);
    let isa = Isa::detect();
    let lora = HeadLora::of(weight, head.lora, &hs, d, 0..r)?;
    let hidden = Hidden::of(&hs, r, d, weight, lora.as_slice());
    let mut sums = lora.as_ref().map(LoraSums::new);
    let sums_out = sums.as_mut().map(LoraSums::out);
    // One sum per run; they are added in order afterwards.
    let mut partial = vec![0f32; RUNS * r * d];
    let out = Out::of(&mut partial);
    parallel(RUNS, 2 * r * d * weight.rows(), |range| {
        let mut capped = [0f32; STRIP];
        for run in range {
            let mut products = hidden.products();
            strips_and_products(&hidden, weight, run, &mut products, |v0, width, logits, products| {
                for (i, row) in logits.chunks_exact_mut(STRIP).enumerate() {
                    let row = &mut row[..width];
                    if let Some(cap) = head.soft_cap {
                        soft_cap(row, head.multiplier / cap, cap);
                        capped[..width].copy_from_slice(row);
                    }
                    strip_gradient(row, inverse, stats.lse[i], stats.entropy[i], dlogprobs[i], dentropy[i]);
                    if let Some(l) = (targets[i] as usize).checked_sub(v0).and_then(|t| row.get_mut(t)) {
                        *l += dlogprobs[i] * inverse;
                    }
                    if let Some(cap) = head.soft_cap {
                        soft_cap_backward(&capped, row, head.multiplier, cap);
                    }
                }
                if let (Some(lora), Some(sums)) = (&lora, sums_out) {
                    // SAFETY: each strip and each run belongs to one thread.
                    unsafe { sums.add(lora, run, (v0, width), logits, products) };
                }
                if hidden.packed.is_some() && width.is_multiple_of(2) {
                    // Columns past the last still hold another strip's logits.
                    logits.chunks_exact_mut(STRIP).for_each(|row| row[width..].fill(0.0));
                    let lhs = PackedLhs::plain(logits, r, STRIP, Cores::This);
                    // SAFETY: the (r, d) sum of run `run` belongs to this item.
                    unsafe {
                        lhs.backward_columns(weight, v0..v0 + width, None, (0, d), (out.at(run * r * d), d), Into::Add)
                    };
                    return;
                }
                with_scratch(width * d, |rows| {
                    for (j, row) in rows.chunks_exact_mut(d).enumerate() {
                        weight.row(v0 + j, row);
                    }
                    // SAFETY: the (r, d) sum of run `run` belongs to this item.
                    unsafe {
                        let (g, w) = (Mat::rows(logits, STRIP), Mat::rows(rows, d));
                        gemm(isa, r, d, width, g, w, out.at(run * r * d), d, Into::Add);
                    }
                });
            });
        }
    });
    let (first, rest) = partial.split_at_mut(r * d);
    for run in rest.chunks_exact(r * d) {
        for (a, b) in first.iter_mut().zip(run) {
            *a += b;
        }
    }
    // The memory of the other runs' sums is freed: the result lives through the whole backward.
    partial.truncate(r * d);
    partial.shrink_to_fit();
    let lora = sums.map(|sums| sums.finish(&hs, &mut partial)).transpose()?;
    Ok(Gradients { hidden: tensor(partial, (r, d))?.into(), lora })
}

/// Products h W^T -> logits at temperature 1: the multiplier and the soft cap, in place.
pub fn shape(multiplier: f32, soft_cap_at: Option<f32>, logits: &mut [f32]) {
    match soft_cap_at {
        Some(cap) => soft_cap(logits, multiplier / cap, cap),
        None if multiplier != 1.0 => logits.iter_mut().for_each(|l| *l *= multiplier),
        None => {}
    }
}

/// Running softmax sums of one position over one run of the vocabulary.
#[derive(Clone, Copy)]
struct Run {
    top: f32,
    sum: f32,
    weighted: f32,
    best: u32,
    target: f32,
}

/// Bytes of one position's sums in one run.
pub(crate) const RUN_BYTES: usize = size_of::<Run>();

impl Run {
    const EMPTY: Self = Self { top: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0, best: 0, target: f32::NAN };

    /// The sums relative to a larger maximum `top`.
    fn rescaled(self, top: f32) -> (f32, f32) {
        let factor = if self.top == f32::NEG_INFINITY { 0.0 } else { exp(self.top - top) };
        (self.sum * factor, self.weighted * factor)
    }

    fn merge(self, later: Self) -> Self {
        let top = self.top.max(later.top);
        let ((s0, w0), (s1, w1)) = (self.rescaled(top), later.rescaled(top));
        let best = if later.top > self.top { later.best } else { self.best };
        let target = if later.target.is_nan() { self.target } else { later.target };
        Self { top, sum: s0 + s1, weighted: w0 + w1, best, target }
    }
}

vectorised! {
    /// Divides the logits by the temperature, in place, and returns (max, sum of e^(l - max), sum of l e^(l - max)).
    fn strip_sums(logits: &mut [f32], inverse_temperature: f32) -> (f32, f32, f32) {
        for l in logits.iter_mut() {
            *l *= inverse_temperature;
        }
        let top = max(logits);
        let (mut sum, mut weighted) = ([0f32; 16], [0f32; 16]);
        let (blocks, rest) = logits.as_chunks::<16>();
        for block in blocks {
            for i in 0..16 {
                let e = exp(block[i] - top);
                sum[i] += e;
                weighted[i] += e * block[i];
            }
        }
        for (i, &l) in rest.iter().enumerate() {
            let e = exp(l - top);
            sum[i] += e;
            weighted[i] += e * l;
        }
        (top, lane_sum(&sum), lane_sum(&weighted))
    }
}

vectorised! {
    /// dL/dlogits in place of the logits: -p (dlogp + dH (log p + H)) / T. The caller adds the target's dlogp / T.
    fn strip_gradient(logits: &mut [f32], inverse_temperature: f32, lse: f32, entropy: f32, dlogp: f32, dentropy: f32) {
        for l in logits {
            let log_p = *l * inverse_temperature - lse;
            *l = -exp(log_p) * (dlogp + dentropy * (log_p + entropy)) * inverse_temperature;
        }
    }
}

/// The address of the running sums.
#[derive(Clone, Copy)]
struct RunsOut(*mut Run);

// SAFETY: a plain address; each item writes its own run.
unsafe impl Send for RunsOut {}
// SAFETY: as above.
unsafe impl Sync for RunsOut {}

impl RunsOut {
    /// # Safety
    /// `i` lies inside the allocation.
    unsafe fn at(self, i: usize) -> *mut Run {
        // SAFETY: guaranteed by the caller.
        unsafe { self.0.add(i) }
    }
}
