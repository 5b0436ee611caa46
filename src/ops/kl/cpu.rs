//! The exact KL on the CPU: running maxima and sums over strips of both sides' logits. Read `mod.rs` beside it for the
//! formulas, `logprobs/cpu_strips.rs` for the strips.

use candle_core::{Result, Tensor};

use super::TokenKl;
use crate::ops::cpu::gemm::{Into, Mat, gemm};
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{Isa, Out, exp, lane_sum, max, parallel, soft_cap, soft_cap_backward, tensor, vectorised, view};
use crate::ops::logprobs::cpu_lora::{HeadLora, LoraSums, RUNS, STRIP};
use crate::ops::logprobs::cpu_strips::{Hidden, strips, strips_and_products};
use crate::ops::logprobs::{Gradients, LmHead};

/// One of the two distributions on the host.
#[derive(Clone, Copy)]
pub struct HostSide<'a> {
    /// Hidden states (R, D).
    pub hidden: &'a Tensor,
    /// The lm_head.
    pub head: LmHead<'a>,
}

/// KL of each position.
pub fn forward(p: HostSide<'_>, q: HostSide<'_>, temperature: f64) -> Result<TokenKl> {
    let (head, weight) = (&p.head, p.head.weight);
    let (both, r, d) = stack(p, q)?;
    let loras = loras(&p, &q, &both, r, d)?;
    let (hidden, inverse) = (Hidden::of(&both, 2 * r, d, weight, &loras), head.softmax_scale(temperature));
    // (RUNS, R): one set of sums per run, merged in order, so that the bits are the same on any number of cores.
    let sums: Vec<std::sync::Mutex<Vec<Sums>>> = (0..RUNS).map(|_| vec![Sums::EMPTY; r].into()).collect();
    parallel(RUNS, 2 * r * d * weight.rows(), |range| {
        for run in range {
            let mut mine = vec![Sums::EMPTY; r];
            strips(&hidden, weight, run, |_, width, logits| {
                if let Some(cap) = head.soft_cap {
                    soft_cap(logits, head.multiplier / cap, cap);
                }
                let (p, q) = logits.split_at_mut(r * STRIP);
                for ((p, q), sums) in p.chunks_exact_mut(STRIP).zip(q.chunks_exact_mut(STRIP)).zip(&mut mine) {
                    let (top_p, sum_p, gap, top_q, sum_q) = strip_sums(&mut p[..width], &mut q[..width], inverse);
                    *sums = sums.merge(Sums { top_p, sum_p, gap, top_q, sum_q });
                }
            });
            if let Ok(mut slot) = sums[run].lock() {
                *slot = mine;
            }
        }
    });
    let mut all = vec![Sums::EMPTY; r];
    for run in sums {
        let run = run.into_inner().unwrap_or_default();
        all.iter_mut().zip(run).for_each(|(all, run)| *all = all.merge(run));
    }
    let mut out = TokenKl::default();
    for s in all {
        let (lse_p, lse_q) = (s.top_p + s.sum_p.ln(), s.top_q + s.sum_q.ln());
        // Rounding may give a tiny negative number. Not f32::max, which would turn NaN into 0.
        let kl = s.gap / s.sum_p - (lse_p - lse_q);
        out.kl.push(if kl < 0.0 { 0.0 } else { kl });
        out.lse_p.push(lse_p);
        out.lse_q.push(lse_q);
    }
    Ok(out)
}

/// dL/dh of p, and the gradients of its LoRA weights.
pub fn backward(p: HostSide<'_>, q: HostSide<'_>, temperature: f64, saved: &TokenKl, dkl: &[f32]) -> Result<Gradients> {
    let (head, weight) = (&p.head, p.head.weight);
    let (both, r, d) = stack(p, q)?;
    let loras = loras(&p, &q, &both, r, d)?;
    let own = loras.first().filter(|_| head.lora.is_some());
    let mut sums = own.map(LoraSums::new);
    let sums_out = sums.as_mut().map(LoraSums::out);
    let (hidden, inverse) = (Hidden::of(&both, 2 * r, d, weight, &loras), head.softmax_scale(temperature));
    let isa = Isa::detect();
    let mut partial = vec![0f32; RUNS * r * d];
    let out = Out::of(&mut partial);
    parallel(RUNS, 3 * r * d * weight.rows(), |range| {
        for run in range {
            let mut products = hidden.products();
            strips_and_products(&hidden, weight, run, &mut products, |v0, width, logits, products| {
                let mut capped = [0f32; STRIP];
                if let Some(cap) = head.soft_cap {
                    soft_cap(logits, head.multiplier / cap, cap);
                }
                let (p, q) = logits.split_at_mut(r * STRIP);
                for (i, (p, q)) in p.chunks_exact_mut(STRIP).zip(q.chunks_exact(STRIP)).enumerate() {
                    let lse = (saved.lse_p[i], saved.lse_q[i]);
                    let (kl, scale) = (saved.kl[i], dkl[i] * inverse);
                    capped[..width].copy_from_slice(&p[..width]);
                    strip_gradient(&mut p[..width], &q[..width], inverse, lse, kl, scale);
                    if let Some(cap) = head.soft_cap {
                        soft_cap_backward(&capped[..width], &mut p[..width], head.multiplier, cap);
                    }
                }
                if let (Some(lora), Some(sums)) = (own, sums_out) {
                    // SAFETY: each strip and each run belongs to one thread.
                    unsafe { sums.add(lora, run, (v0, width), p, products) };
                }
                with_scratch(width * d, |rows| {
                    for (j, row) in rows.chunks_exact_mut(d).enumerate() {
                        weight.row(v0 + j, row);
                    }
                    // SAFETY: the (r, d) sum of run `run` belongs to this item.
                    unsafe {
                        let (g, w) = (Mat::rows(p, STRIP), Mat::rows(rows, d));
                        gemm(isa, r, d, width, g, w, out.at(run * r * d), d, Into::Add);
                    }
                });
            });
        }
    });
    let (first, rest) = partial.split_at_mut(r * d);
    for run in rest.chunks_exact(r * d) {
        first.iter_mut().zip(run).for_each(|(a, b)| *a += b);
    }
    partial.truncate(r * d);
    partial.shrink_to_fit();
    let lora = sums.map(|sums| sums.finish(&both, &mut partial)).transpose()?;
    Ok(Gradients { hidden: tensor(partial, (r, d))?.into(), lora })
}

/// The hidden states of both sides in one list, p's before q's.
fn stack(p: HostSide<'_>, q: HostSide<'_>) -> Result<(Vec<f32>, usize, usize)> {
    let (r, d) = p.hidden.dims2()?;
    Ok(([&view(p.hidden)?[..], &view(q.hidden)?[..]].concat(), r, d))
}

/// The LoRA weights of both sides, p's first.
fn loras<'a>(p: &HostSide<'a>, q: &HostSide<'a>, both: &[f32], r: usize, d: usize) -> Result<Vec<HeadLora<'a>>> {
    let sides = [
        HeadLora::of(p.head.weight, p.head.lora, both, d, 0..r)?,
        HeadLora::of(q.head.weight, q.head.lora, both, d, r..2 * r)?,
    ];
    Ok(sides.into_iter().flatten().collect())
}

/// Running sums of one position over one run of the vocabulary.
#[derive(Clone, Copy)]
struct Sums {
    top_p: f32,
    sum_p: f32,
    /// sum of e^(l - top_p) (l - m).
    gap: f32,
    top_q: f32,
    sum_q: f32,
}

impl Sums {
    const EMPTY: Self = Self { top_p: f32::NEG_INFINITY, sum_p: 0.0, gap: 0.0, top_q: f32::NEG_INFINITY, sum_q: 0.0 };

    fn merge(self, other: Self) -> Self {
        let factor = |from: f32, to: f32| if from == f32::NEG_INFINITY { 0.0 } else { exp(from - to) };
        let (top_p, top_q) = (self.top_p.max(other.top_p), self.top_q.max(other.top_q));
        let (p0, p1) = (factor(self.top_p, top_p), factor(other.top_p, top_p));
        let (q0, q1) = (factor(self.top_q, top_q), factor(other.top_q, top_q));
        Self {
            top_p,
            sum_p: self.sum_p * p0 + other.sum_p * p1,
            gap: self.gap * p0 + other.gap * p1,
            top_q,
            sum_q: self.sum_q * q0 + other.sum_q * q1,
        }
    }
}

vectorised! {
    /// Scales both rows of logits in place and returns (max l, sum e^(l - max), sum e^(l - max) (l - m), max m, sum).
    fn strip_sums(p: &mut [f32], q: &mut [f32], inverse_temperature: f32) -> (f32, f32, f32, f32, f32) {
        for l in p.iter_mut().chain(q.iter_mut()) {
            *l *= inverse_temperature;
        }
        let (top_p, top_q) = (max(p), max(q));
        let (mut sum_p, mut gap, mut sum_q) = ([0f32; 16], [0f32; 16], [0f32; 16]);
        for (p, q) in p.chunks(16).zip(q.chunks(16)) {
            for (i, (&l, &m)) in p.iter().zip(q).enumerate() {
                let e = exp(l - top_p);
                sum_p[i] += e;
                gap[i] += e * (l - m);
                sum_q[i] += exp(m - top_q);
            }
        }
        (top_p, lane_sum(&sum_p), lane_sum(&gap), top_q, lane_sum(&sum_q))
    }
}

vectorised! {
    /// dKL/dl in l's place, times `scale`: p_j (log p_j - log q_j - KL).
    fn strip_gradient(p: &mut [f32], q: &[f32], inverse_temperature: f32, lse: (f32, f32), kl: f32, scale: f32) {
        for (l, m) in p.iter_mut().zip(q) {
            let log_p = *l * inverse_temperature - lse.0;
            let log_q = *m * inverse_temperature - lse.1;
            *l = scale * exp(log_p) * (log_p - log_q - kl);
        }
    }
}
