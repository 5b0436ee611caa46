//! The exact KL divergence between two distributions over the vocabulary, from two rows of hidden states and the output
//! table, and its gradient by the first. Logits go by in strips, as in head.rs; nothing (N, vocab) is held.
//!
//! l = c tanh(k h W^T / c) / T, m = c tanh(k g W^T / c) / T (head.rs); KL = sum_j p_j (log p_j - log q_j) = sum_j p_j (l_j - m_j) - lse(l) + lse(m).
//! Each side may have its own branch on W. Saved for the backward: KL and both lse. Knows no actor and no reference; read
//! `model::roles` for those.

use candle_core::{Result, Tensor};

use crate::ops::cpu::gemm::{Into, Mat, gemm};
use crate::ops::cpu::pack::with_scratch;
use crate::ops::cpu::{Isa, Out, exp, lane_sum, max, parallel, tensor, view};
use crate::ops::logprobs::branch::{BranchSums, HeadBranch};
use crate::ops::logprobs::{Gradients, Hidden, LmHead, RUNS, STRIP, bend, strips, strips_and_products, unbend};

/// Of each position. All (R).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Divergence {
    /// KL(p || q), nats; never negative.
    pub kl: Vec<f32>,
    lse_p: Vec<f32>,
    lse_q: Vec<f32>,
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

crate::ops::cpu::vectorised! {
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

crate::ops::cpu::vectorised! {
    /// dKL/dl in l's place, times `scale`: p_j (log p_j - log q_j - KL).
    fn strip_gradient(p: &mut [f32], q: &[f32], inverse_temperature: f32, lse: (f32, f32), kl: f32, scale: f32) {
        for (l, m) in p.iter_mut().zip(q) {
            let log_p = *l * inverse_temperature - lse.0;
            let log_q = *m * inverse_temperature - lse.1;
            *l = scale * exp(log_p) * (log_p - log_q - kl);
        }
    }
}

/// Hidden states (R, D), already normed, and the table that they meet.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// (R, D).
    pub hidden: &'a Tensor,
    /// The same matrix, multiplier and cap on both sides; each with its own branch.
    pub table: LmHead<'a>,
}

/// KL (R) from the distribution of p to that of q, at temperature T.
///
/// # Errors
/// If shapes do not fit, or the tables are not of one matrix.
pub fn forward(p: Side<'_>, q: Side<'_>, temperature: f64) -> Result<Divergence> {
    let (table, weight) = (&p.table, p.table.weight);
    let (both, r, d) = stacked(p, q)?;
    let branches = branches(&p, &q, &both, r, d)?;
    let (hidden, inverse) = (Hidden::of(&both, 2 * r, d, weight, &branches), table.inverse(temperature));
    // (RUNS, R): each run its own sums, merged in order, so that the bits are the same on any number of cores.
    let sums: Vec<std::sync::Mutex<Vec<Sums>>> = (0..RUNS).map(|_| vec![Sums::EMPTY; r].into()).collect();
    parallel(RUNS, 2 * r * d * weight.rows(), |range| {
        for run in range {
            let mut mine = vec![Sums::EMPTY; r];
            strips(&hidden, weight, run, |_, width, logits| {
                if let Some(cap) = table.soft_cap {
                    bend(logits, table.multiplier / cap, cap);
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
    let mut out = Divergence::default();
    for s in all {
        let (lse_p, lse_q) = (s.top_p + s.sum_p.ln(), s.top_q + s.sum_q.ln());
        // Rounding may leave a zero a hair below. Not f32::max, which would make a zero of NaN.
        let kl = s.gap / s.sum_p - (lse_p - lse_q);
        out.kl.push(if kl < 0.0 { 0.0 } else { kl });
        out.lse_p.push(lse_p);
        out.lse_q.push(lse_q);
    }
    Ok(out)
}

/// dL/dh (R, D), h p's hidden states, and the gradients of its branch, of dL/dKL (R): dKL/dl_j = p_j (log p_j - log q_j -
/// KL) / T, times the slope of multiplier and cap; dL/dh = dL/dl W. `divergence` is what `forward` gave for the same
/// inputs; q is held fixed.
///
/// # Errors
/// As for [`forward`].
pub fn backward(p: Side<'_>, q: Side<'_>, temperature: f64, divergence: &Divergence, dkl: &[f32]) -> Result<Gradients> {
    let (table, weight) = (&p.table, p.table.weight);
    let (both, r, d) = stacked(p, q)?;
    if [divergence.kl.len(), dkl.len()] != [r; 2] {
        candle_core::bail!("divergence backward: {r} positions, {} gradients", dkl.len());
    }
    let branches = branches(&p, &q, &both, r, d)?;
    let own = branches.first().filter(|_| table.lora.is_some());
    let mut sums = own.map(BranchSums::new);
    let sums_out = sums.as_mut().map(BranchSums::out);
    let (hidden, inverse) = (Hidden::of(&both, 2 * r, d, weight, &branches), table.inverse(temperature));
    let isa = Isa::detect();
    let mut partial = vec![0f32; RUNS * r * d];
    let out = Out::of(&mut partial);
    parallel(RUNS, 3 * r * d * weight.rows(), |range| {
        for run in range {
            let mut products = hidden.products();
            strips_and_products(&hidden, weight, run, &mut products, |v0, width, logits, products| {
                let mut bent = [0f32; STRIP];
                if let Some(cap) = table.soft_cap {
                    bend(logits, table.multiplier / cap, cap);
                }
                let (p, q) = logits.split_at_mut(r * STRIP);
                for (i, (p, q)) in p.chunks_exact_mut(STRIP).zip(q.chunks_exact(STRIP)).enumerate() {
                    let lse = (divergence.lse_p[i], divergence.lse_q[i]);
                    let (kl, scale) = (divergence.kl[i], dkl[i] * inverse);
                    bent[..width].copy_from_slice(&p[..width]);
                    strip_gradient(&mut p[..width], &q[..width], inverse, lse, kl, scale);
                    if let Some(cap) = table.soft_cap {
                        unbend(&bent[..width], &mut p[..width], table.multiplier, cap);
                    }
                }
                if let (Some(branch), Some(sums)) = (own, sums_out) {
                    // SAFETY: each strip and each run is one thread's.
                    unsafe { sums.add(branch, run, (v0, width), p, products) };
                }
                with_scratch(width * d, |rows| {
                    for (j, row) in rows.chunks_exact_mut(d).enumerate() {
                        weight.row(v0 + j, row);
                    }
                    // SAFETY: run `run`'s (r, d) sum belongs to this item.
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
    let branch = sums.map(|sums| sums.finish(&both, &mut partial)).transpose()?;
    Ok(Gradients { hidden: tensor(partial, (r, d))?, branch })
}

/// Both rows of hidden states as one list, p's before q's.
fn stacked(p: Side<'_>, q: Side<'_>) -> Result<(Vec<f32>, usize, usize)> {
    let ((r, d), weight) = (p.hidden.dims2()?, p.table.weight);
    if q.hidden.dims2()? != (r, d) || weight.cols() != d || q.table.weight.id() != weight.id() {
        candle_core::bail!(
            "divergence: {:?}, {:?}, table width {}, or two tables",
            p.hidden.dims(),
            q.hidden.dims(),
            weight.cols()
        );
    }
    Ok(([&view(p.hidden)?[..], &view(q.hidden)?[..]].concat(), r, d))
}

/// The sides' branches, p's first.
fn branches<'a>(p: &Side<'a>, q: &Side<'a>, both: &[f32], r: usize, d: usize) -> Result<Vec<HeadBranch<'a>>> {
    let sides = [HeadBranch::of(&p.table, both, d, 0..r)?, HeadBranch::of(&q.table, both, d, r..2 * r)?];
    Ok(sides.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::weight::Weight;
    use crate::rng::SplitMix64;

    const R: usize = 3;
    const D: usize = 5;
    /// More than a strip a run, and no multiple of anything.
    const V: usize = 1237;

    struct Case {
        h: Vec<f32>,
        g: Vec<f32>,
        table: Vec<f32>,
    }

    fn case() -> Case {
        let mut rng = SplitMix64::new(9);
        let mut draw =
            |n: usize, scale: f64| -> Vec<f32> { (0..n).map(|_| (scale * (rng.uniform() - 0.5)) as f32).collect() };
        Case { h: draw(R * D, 4.0), g: draw(R * D, 4.0), table: draw(V * D, 2.0) }
    }

    fn weight(table: &[f32]) -> Weight {
        Weight::from_f32(table, V, D).unwrap()
    }

    /// As most decoders', and as Granite's and Gemma 2's at once.
    fn tables(weight: &Weight) -> [LmHead<'_>; 2] {
        [LmHead::plain(weight), LmHead { multiplier: 0.75, soft_cap: Some(1.5), ..LmHead::plain(weight) }]
    }

    /// The sum over the full softmax, in f64.
    fn full(h: &[f32], g: &[f32], table: &[f32], of: &LmHead<'_>, temperature: f64) -> Vec<f64> {
        let shape = |l: f64| match of.soft_cap.map(f64::from) {
            Some(cap) => cap * (l * f64::from(of.multiplier) / cap).tanh(),
            None => l * f64::from(of.multiplier),
        };
        let log_softmax = |h: &[f32]| -> Vec<f64> {
            let dot = |w: &[f32]| w.iter().zip(h).map(|(&w, &h)| f64::from(w) * f64::from(h)).sum::<f64>();
            let logits: Vec<f64> = table.chunks(D).map(|w| shape(dot(w)) / temperature).collect();
            let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            logits.into_iter().map(|l| l - lse).collect()
        };
        let rows = h.chunks(D).zip(g.chunks(D));
        rows.map(|(h, g)| log_softmax(h).iter().zip(log_softmax(g)).map(|(p, q)| p.exp() * (p - q)).sum()).collect()
    }

    fn side<'a>(hidden: &'a Tensor, table: &LmHead<'a>) -> Side<'a> {
        Side { hidden, table: *table }
    }

    #[test]
    fn the_streamed_kl_is_the_sum_over_the_full_softmax_and_never_negative() {
        let Case { h, g, table } = case();
        let weight = weight(&table);
        let tensors = |h: &[f32]| tensor(h.to_vec(), (R, D)).unwrap();
        for (of, temperature) in tables(&weight).into_iter().flat_map(|of| [(of, 1.0), (of, 0.7)]) {
            let (h_rows, g_rows) = (tensors(&h), tensors(&g));
            let streamed = forward(side(&h_rows, &of), side(&g_rows, &of), temperature).unwrap().kl;
            for (got, want) in streamed.iter().zip(full(&h, &g, &table, &of, temperature)) {
                // Sums of 1237 f32 terms of magnitude 1.
                assert!((f64::from(*got) - want).abs() < 1e-5 * want.max(1.0) && *got > 0.0, "{got} {want}");
            }
            let same = forward(side(&h_rows, &of), side(&h_rows, &of), temperature).unwrap().kl;
            assert_eq!(same, [0.0; R], "of a distribution to itself");
        }
        let (plain, short, h) = (LmHead::plain(&weight), tensor(vec![0.0; D], (1, D)).unwrap(), tensors(&h));
        assert!(forward(side(&h, &plain), side(&short, &plain), 1.0).is_err());
    }

    #[test]
    fn the_kl_of_what_is_no_number_is_none() {
        let Case { h, g, table } = case();
        let weight = weight(&table);
        let plain = LmHead::plain(&weight);
        for at in [0, R * D - 1] {
            let mut spoilt = h.clone();
            spoilt[at] = f32::NAN;
            let (spoilt, g) = (tensor(spoilt, (R, D)).unwrap(), tensor(g.clone(), (R, D)).unwrap());
            for (p, q) in [(&spoilt, &g), (&g, &spoilt)] {
                let kl = forward(side(p, &plain), side(q, &plain), 1.0).unwrap().kl;
                for (row, kl) in kl.iter().enumerate() {
                    assert_eq!(kl.is_nan(), row == at / D, "row {row}: {kl}");
                }
            }
        }
    }

    #[test]
    fn the_gradient_is_the_central_difference_of_the_full_sum() {
        let Case { h, g, table } = case();
        let weight = weight(&table);
        let tensors = |h: &[f32]| tensor(h.to_vec(), (R, D)).unwrap();
        let dkl = [0.5f32, -1.0, 2.0];
        for of in tables(&weight) {
            let (h_rows, g_rows) = (tensors(&h), tensors(&g));
            let kept = forward(side(&h_rows, &of), side(&g_rows, &of), 0.7).unwrap();
            let grad = backward(side(&h_rows, &of), side(&g_rows, &of), 0.7, &kept, &dkl).unwrap();
            let grad = grad.hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for at in 0..R * D {
                let moved = |by: f32| {
                    let mut h = h.clone();
                    h[at] += by;
                    full(&h, &g, &table, &of, 0.7).iter().zip(dkl).map(|(kl, d)| kl * f64::from(d)).sum::<f64>()
                };
                let step = 1.0 / 1024.0;
                let want = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
                assert!((f64::from(grad[at]) - want).abs() < 1e-4 * want.abs().max(1.0), "{at}: {} {want}", grad[at]);
            }
        }
    }
}
