//! Token log-probabilities and entropy from hidden states, and their gradient, without ever holding (N, vocab) logits:
//! the vocabulary goes by in strips, and only running maxima and sums stay.
//!
//! l = c tanh(m h W^T / c) / T (l = m h W^T / T where there is no cap c); logp = l_target - lse(l);
//! H = lse(l) - sum_j p_j l_j. Kept for the backward: the numbers returned.
//! W may have a low-rank branch (head_branch.rs). Knows no sampling; read `model::generate` for that.

pub mod branch;

use candle_core::{Result, Tensor};

use crate::ops::cpu::bf16::Cores;
use crate::ops::cpu::gemm::{Into, Mat, NR, gemm};
use crate::ops::cpu::pack::{rows_as_columns, with_scratch};
use crate::ops::cpu::{Isa, Out, exp, lane_sum, max, parallel, tanh, tensor, view};
use crate::ops::linear::cpu_bf16::PackedLhs;
use crate::ops::linear::{BranchGradient, LowRank};
use crate::ops::logprobs::branch::{BranchSums, HeadBranch};
use crate::ops::weight::{ComputeDtype, Weight};

/// The table that logits are taken with, and what is done to them before the softmax.
#[derive(Clone, Copy)]
pub struct LmHead<'a> {
    /// W (vocab, D).
    pub weight: &'a Weight,
    /// m: logits are multiplied by it (Granite's 1 / logits_scaling).
    pub multiplier: f32,
    /// c: logits are bent to stay within it (Gemma 2).
    pub soft_cap: Option<f32>,
    /// The table's branch, if the role's adapter has one there.
    pub lora: Option<LowRank<'a>>,
}

/// Gradients of the head.
pub struct Gradients {
    /// dL/dh (R, D).
    pub hidden: Tensor,
    /// Of the table's branch, where it has one.
    pub branch: Option<BranchGradient>,
}

impl<'a> LmHead<'a> {
    /// Logits as they come out of the product.
    pub fn plain(weight: &'a Weight) -> Self {
        Self { weight, multiplier: 1.0, soft_cap: None, lora: None }
    }

    /// Products h W^T -> logits at temperature 1, in place.
    pub fn shape(&self, logits: &mut [f32]) {
        match self.soft_cap {
            Some(cap) => bend(logits, self.multiplier / cap, cap),
            None if self.multiplier != 1.0 => logits.iter_mut().for_each(|l| *l *= self.multiplier),
            None => {}
        }
    }

    /// What is left to multiply once the cap is applied.
    pub(crate) fn inverse(&self, temperature: f64) -> f32 {
        let inverse = (1.0 / temperature) as f32;
        if self.soft_cap.is_some() { inverse } else { inverse * self.multiplier }
    }
}

crate::ops::cpu::vectorised! {
    /// x -> cap tanh(inner x).
    pub(crate) fn bend(logits: &mut [f32], inner: f32, cap: f32) {
        for l in logits {
            *l = cap * tanh(*l * inner);
        }
    }
}

crate::ops::cpu::vectorised! {
    /// Gradients of bent logits -> gradients of the products: times m (1 - (l / c)^2).
    pub(crate) fn unbend(bent: &[f32], gradient: &mut [f32], multiplier: f32, cap: f32) {
        for (g, &l) in gradient.iter_mut().zip(bent) {
            let t = l / cap;
            *g *= multiplier * (1.0 - t * t);
        }
    }
}

/// Vocabulary rows whose logits exist at once, per thread.
pub(crate) const STRIP: usize = 4 * NR;
/// The vocabulary is always cut into this many runs, whose sums meet in order: the same bits on any number of cores.
pub(crate) const RUNS: usize = 8;

/// What is known of each position after one pass over the vocabulary. All (R).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenStats {
    /// Log-probability of the target, nats.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution, nats.
    pub entropy: Vec<f32>,
    /// log of the sum of e^l.
    pub lse: Vec<f32>,
    /// The most likely token (the lowest id of equals).
    pub argmax: Vec<u32>,
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

/// Of one position's sums in one run.
pub(crate) const RUN_BYTES: usize = size_of::<Run>();

impl Run {
    const EMPTY: Self = Self { top: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0, best: 0, target: f32::NAN };

    /// Sums as they would be against a larger maximum `top`.
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

crate::ops::cpu::vectorised! {
    /// Scales the logits in place and returns (max, sum of e^(l - max), sum of l e^(l - max)).
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

crate::ops::cpu::vectorised! {
    /// dL/dh W-side factor, in the logits' place: ((dlogp + dH (l - lse + H)) * -p) / T; the target's one is added after.
    fn strip_gradient(logits: &mut [f32], inverse_temperature: f32, lse: f32, entropy: f32, dlogp: f32, dentropy: f32) {
        for l in logits {
            let log_p = *l * inverse_temperature - lse;
            *l = -exp(log_p) * (dlogp + dentropy * (log_p + entropy)) * inverse_temperature;
        }
    }
}

/// Log-probability of `targets` (R) and the entropy at each of the hidden states h (R, D), already normed.
/// `temperature` divides the logits, after the cap.
///
/// # Errors
/// If shapes do not fit or a target is past the vocabulary.
pub fn forward(h: &Tensor, table: &LmHead<'_>, targets: &[u32], temperature: f64) -> Result<TokenStats> {
    let weight = table.weight;
    let (r, d) = check(h, weight, targets)?;
    let hs = view(h)?;
    let inverse = table.inverse(temperature);
    let branch = HeadBranch::of(table, &hs, d, 0..r)?;
    let hidden = Hidden::of(&hs, r, d, weight, branch.as_slice());
    let mut runs = vec![Run::EMPTY; RUNS * r];
    let out = RunsOut(runs.as_mut_ptr());
    parallel(RUNS, r * d * weight.rows(), |range| {
        for run in range {
            // SAFETY: run `run`'s positions belong to this item.
            let stats = unsafe { std::slice::from_raw_parts_mut(out.at(run * r), r) };
            strips(&hidden, weight, run, |v0, width, logits| {
                for ((row, stat), &target) in logits.chunks_exact_mut(STRIP).zip(&mut *stats).zip(targets) {
                    let row = &mut row[..width];
                    if let Some(cap) = table.soft_cap {
                        bend(row, table.multiplier / cap, cap);
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

/// dL/dh (R, D), and the branch's gradients, of dL/dlogp (R) and dL/dH (R); `stats` is what `forward` gave for the same
/// inputs.
///
/// dL/dl_j = dlogp (1[j = target] - p_j) - dH p_j (log p_j + H), over T, times the slope of multiplier and cap;
/// dL/dh = dL/dl W.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(
    h: &Tensor,
    table: &LmHead<'_>,
    targets: &[u32],
    temperature: f64,
    stats: &TokenStats,
    dlogprobs: &[f32],
    dentropy: &[f32],
) -> Result<Gradients> {
    let weight = table.weight;
    let (r, d) = check(h, weight, targets)?;
    if [stats.lse.len(), stats.entropy.len(), dlogprobs.len(), dentropy.len()] != [r; 4] {
        candle_core::bail!("head backward: {r} positions, {} gradients", dlogprobs.len());
    }
    let hs = view(h)?;
    let inverse = table.inverse(temperature);
    let isa = Isa::detect();
    let branch = HeadBranch::of(table, &hs, d, 0..r)?;
    let hidden = Hidden::of(&hs, r, d, weight, branch.as_slice());
    let mut sums = branch.as_ref().map(BranchSums::new);
    let sums_out = sums.as_mut().map(BranchSums::out);
    // A sum of its own for each run, added in order afterwards.
    let mut partial = vec![0f32; RUNS * r * d];
    let out = Out::of(&mut partial);
    parallel(RUNS, 2 * r * d * weight.rows(), |range| {
        let mut bent = [0f32; STRIP];
        for run in range {
            let mut products = hidden.products();
            strips_and_products(&hidden, weight, run, &mut products, |v0, width, logits, products| {
                for (i, row) in logits.chunks_exact_mut(STRIP).enumerate() {
                    let row = &mut row[..width];
                    if let Some(cap) = table.soft_cap {
                        bend(row, table.multiplier / cap, cap);
                        bent[..width].copy_from_slice(row);
                    }
                    strip_gradient(row, inverse, stats.lse[i], stats.entropy[i], dlogprobs[i], dentropy[i]);
                    if let Some(l) = (targets[i] as usize).checked_sub(v0).and_then(|t| row.get_mut(t)) {
                        *l += dlogprobs[i] * inverse;
                    }
                    if let Some(cap) = table.soft_cap {
                        unbend(&bent, row, table.multiplier, cap);
                    }
                }
                if let (Some(branch), Some(sums)) = (&branch, sums_out) {
                    // SAFETY: each strip and each run is one thread's.
                    unsafe { sums.add(branch, run, (v0, width), logits, products) };
                }
                if hidden.rounded.is_some() && width.is_multiple_of(2) {
                    // What stands past the last of fewer columns is another strip's.
                    logits.chunks_exact_mut(STRIP).for_each(|row| row[width..].fill(0.0));
                    let left = PackedLhs::plain(logits, r, STRIP, Cores::This);
                    // SAFETY: run `run`'s (r, d) sum belongs to this item.
                    unsafe { left.inputs(weight, v0..v0 + width, None, (0, d), (out.at(run * r * d), d), Into::Add) };
                    return;
                }
                with_scratch(width * d, |rows| {
                    for (j, row) in rows.chunks_exact_mut(d).enumerate() {
                        weight.row(v0 + j, row);
                    }
                    // SAFETY: run `run`'s (r, d) sum belongs to this item.
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
    // The sums of the other runs are given back: what is returned lives through the whole backward.
    partial.truncate(r * d);
    partial.shrink_to_fit();
    let branch = sums.map(|sums| sums.finish(&hs, &mut partial)).transpose()?;
    Ok(Gradients { hidden: tensor(partial, (r, d))?, branch })
}

/// Hidden states (r, d) in the numbers that products with the table take.
pub(crate) struct Hidden<'a> {
    hs: &'a [f32],
    r: usize,
    rounded: Option<PackedLhs>,
    branches: &'a [HeadBranch<'a>],
}

impl<'a> Hidden<'a> {
    /// `branches`: over some of the rows each.
    pub(crate) fn of(hs: &'a [f32], r: usize, d: usize, table: &Weight, branches: &'a [HeadBranch<'a>]) -> Self {
        let bf16 = table.compute() == ComputeDtype::Bf16 && d.is_multiple_of(2);
        Self { hs, r, rounded: bf16.then(|| PackedLhs::plain(hs, r, d, Cores::All)), branches }
    }

    /// Room for a strip's products before their scale, where a branch wants them.
    pub(crate) fn products(&self) -> Vec<f32> {
        let wanted = self.branches.iter().any(HeadBranch::wants_products);
        vec![0.0; if wanted { self.r * STRIP } else { 0 }]
    }
}

/// Calls `f(first id, width, logits (r, STRIP))` for each strip of run `run`, in order.
pub(crate) fn strips(hidden: &Hidden<'_>, weight: &Weight, run: usize, mut f: impl FnMut(usize, usize, &mut [f32])) {
    strips_and_products(hidden, weight, run, &mut [], |v0, width, logits, _| f(v0, width, logits));
}

/// As [`strips`]; `f` sees in `products` (r, STRIP) what the logits were before DoRA's scale, unless it is empty.
pub(crate) fn strips_and_products(
    hidden: &Hidden<'_>,
    weight: &Weight,
    run: usize,
    products: &mut [f32],
    mut f: impl FnMut(usize, usize, &mut [f32], &[f32]),
) {
    let (r, vocab, d, isa) = (hidden.r, weight.rows(), weight.cols(), Isa::detect());
    let all = vocab.div_ceil(STRIP);
    let (first, last) = (all * run / RUNS, all * (run + 1) / RUNS);
    with_scratch(r * STRIP + d * NR, |scratch| {
        let (logits, panel) = scratch.split_at_mut(r * STRIP);
        for v0 in (first..last).map(|s| s * STRIP) {
            let width = STRIP.min(vocab - v0);
            for j in (0..width).step_by(NR) {
                let (from, columns) = (v0 + j, NR.min(width - j));
                // SAFETY: logits holds r rows of STRIP numbers, of which columns j.. are written.
                unsafe {
                    let c = logits.as_mut_ptr().add(j);
                    match &hidden.rounded {
                        Some(left) => left.outputs(weight, None, (from, columns), (c, STRIP), Into::Fresh),
                        None => {
                            rows_as_columns(weight, from..from + columns, panel);
                            let (h, b) = (Mat::rows(hidden.hs, d), Mat::rows(panel, NR));
                            gemm(isa, r, columns, d, h, b, c, STRIP, Into::Fresh);
                        }
                    }
                    for branch in hidden.branches {
                        branch.add(v0, from, columns, logits.as_mut_ptr());
                    }
                }
            }
            if !products.is_empty() {
                products.copy_from_slice(logits);
            }
            for branch in hidden.branches {
                branch.scale(v0, width, logits);
            }
            f(v0, width, logits, products);
        }
    });
}

fn check(h: &Tensor, weight: &Weight, targets: &[u32]) -> Result<(usize, usize)> {
    let (r, d) = h.dims2()?;
    if weight.cols() != d || targets.len() != r {
        candle_core::bail!("head: h {:?}, {} targets, table width {}", h.dims(), targets.len(), weight.cols());
    }
    if let Some(t) = targets.iter().find(|&&t| t as usize >= weight.rows()) {
        candle_core::bail!("target id {t} is past the vocabulary of {}", weight.rows());
    }
    Ok((r, d))
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
        // SAFETY: the caller's duty.
        unsafe { self.0.add(i) }
    }
}
