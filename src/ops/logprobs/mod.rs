//! Token log-probabilities and entropy from hidden states, and their gradient (fused linear + log-softmax): formula,
//! checks, dispatch. (N, vocab) logits are never allocated: the vocabulary is processed in strips, with running maxima
//! and sums.
//!
//! l = c tanh(m h W^T / c) / T (without a soft cap c: l = m h W^T / T); logp = l_target - lse(l);
//! H = lse(l) - sum_j p_j l_j. Saved for backward: the results. W may have LoRA weights. It does not depend on
//! sampling: read `sample/mod.rs` for that. Read `cpu.rs`, `cpu_strips.rs` and `cpu_lora.rs` beside it, then
//! `kl/mod.rs`.

mod cpu;
pub(crate) mod cpu_lora;
pub(crate) mod cpu_strips;
pub mod gpu;
pub mod gpu_head;

use std::ops::Range;

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::device::{Array, Matrix};

use crate::ops::cpu::{tensor, view};
use crate::ops::linear::{self, BranchGradient, LinearWithLora, LowRank};
use crate::ops::weight::Weight;

pub(crate) use cpu::RUN_BYTES;
pub(crate) use cpu_lora::{RUNS, STRIP};

/// The lm_head, and what is applied to its products before the softmax.
#[derive(Clone, Copy)]
pub struct LmHead<'a> {
    /// W (vocab, D).
    pub weight: &'a Weight,
    /// m: the products are multiplied by it (Granite's 1 / logits_scaling).
    pub multiplier: f32,
    /// c: soft cap of the logits (Gemma 2).
    pub soft_cap: Option<f32>,
    /// LoRA weights, if the role's adapter has them on the lm_head.
    pub lora: Option<LowRank<'a>>,
}

/// Gradients of hidden states and lm_head.
pub struct Gradients {
    /// dL/dh (R, D).
    pub hidden: Array,
    /// Gradients of the lm_head's LoRA weights, if it has any.
    pub lora: Option<BranchGradient>,
}

/// Statistics of each position, (R) each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenStats {
    /// Log-probability of the target, nats.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution, nats.
    pub entropy: Vec<f32>,
    /// log of the sum of e^l.
    pub lse: Vec<f32>,
    /// The most likely token (the lowest id among equals).
    pub argmax: Vec<u32>,
}

impl<'a> LmHead<'a> {
    /// An lm_head without multiplier, soft cap and LoRA.
    pub fn plain(weight: &'a Weight) -> Self {
        Self { weight, multiplier: 1.0, soft_cap: None, lora: None }
    }

    /// The factor on logits that the softmax applies: 1 / T, times the multiplier unless the soft cap has applied it.
    pub(crate) fn softmax_scale(&self, temperature: f64) -> f32 {
        let inverse = (1.0 / temperature) as f32;
        if self.soft_cap.is_some() { inverse } else { inverse * self.multiplier }
    }
}

/// Logits (S, vocab) at temperature 1, where they were computed.
pub struct Logits {
    /// h W^T, before multiplier and soft cap.
    products: Array,
    /// m of [`LmHead`].
    pub(crate) multiplier: f32,
    /// c of [`LmHead`].
    pub(crate) soft_cap: Option<f32>,
}

impl Logits {
    /// Logits of products (S, vocab), f32 if they lie on a device.
    pub fn new(products: Array, multiplier: f32, soft_cap: Option<f32>) -> Self {
        Self { products, multiplier, soft_cap }
    }

    /// (S, vocab).
    ///
    /// # Errors
    /// If a tensor is not a matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        self.products.dims2()
    }

    /// The products, if they lie on a device.
    pub(crate) fn on_device(&self) -> Option<&Matrix> {
        self.products.device().ok()
    }

    /// The logits of one sequence, (1, vocab).
    pub(crate) fn row(&self, row: usize) -> Result<Self> {
        self.rows(row..row + 1)
    }

    /// The logits of some neighbouring sequences.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let products = match &self.products {
            Array::Host(tensor) => tensor.narrow(0, rows.start, rows.len())?.into(),
            Array::Device(matrix) => matrix.row_range(rows)?.into(),
        };
        Ok(Self { products, ..*self })
    }

    /// The logits as a tensor on the host.
    ///
    /// # Errors
    /// If the download fails.
    pub fn to_host(&self) -> Result<Tensor> {
        let products = self.products.to_host()?;
        if self.multiplier == 1.0 && self.soft_cap.is_none() {
            return Ok(products);
        }
        let mut shaped = view(&products)?.to_vec();
        cpu::shape(self.multiplier, self.soft_cap, &mut shaped);
        Ok(tensor(shaped, products.dims2()?)?)
    }
}

/// Logits (S, vocab) at temperature 1 of hidden states h (S, D): for sampling, where S is small.
///
/// # Errors
/// If shapes do not fit.
pub fn logits(h: &Array, head: &LmHead<'_>) -> Result<Logits> {
    let products = match h {
        Array::Host(_) => {
            let part = LinearWithLora { weight: head.weight, dequantised: None, bias: None, lora: head.lora };
            let (mut logits, _) = linear::forward(h, &[part], None)?;
            let Some(logits) = logits.pop() else { bail!("a linear group of one part has one output") };
            logits
        }
        Array::Device(h) => gpu_head::products(h, head)?.into(),
    };
    Ok(Logits::new(products, head.multiplier, head.soft_cap))
}

/// Log-probability of `targets` (R) and the entropy at each of the hidden states h (R, D), which are already normed.
/// `temperature` divides the logits, after the soft cap.
///
/// # Errors
/// If shapes do not fit or a target is outside the vocabulary.
pub fn forward(h: &Array, head: &LmHead<'_>, targets: &[u32], temperature: f64) -> Result<TokenStats> {
    check(h, head.weight, targets)?;
    match h {
        Array::Host(h) => Ok(cpu::forward(h, head, targets, temperature)?),
        Array::Device(h) => gpu_head::forward(h, head, targets, temperature),
    }
}

/// dL/dh (R, D), and the gradients of LoRA, of dL/dlogp (R) and dL/dH (R); `stats` is the result of `forward` for the
/// same inputs.
///
/// dL/dl_j = dlogp (1[j = target] - p_j) - dH p_j (log p_j + H), over T, times the derivative of multiplier and soft
/// cap; dL/dh = dL/dl W.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(
    h: &Array,
    head: &LmHead<'_>,
    targets: &[u32],
    temperature: f64,
    stats: &TokenStats,
    dlogprobs: &[f32],
    dentropy: &[f32],
) -> Result<Gradients> {
    let (r, _) = check(h, head.weight, targets)?;
    if [stats.lse.len(), stats.entropy.len(), dlogprobs.len(), dentropy.len()] != [r; 4] {
        bail!("logprobs backward: {r} positions, {} gradients", dlogprobs.len());
    }
    match h {
        Array::Host(h) => Ok(cpu::backward(h, head, targets, temperature, stats, dlogprobs, dentropy)?),
        Array::Device(h) => gpu_head::backward(h, head, targets, temperature, stats, dlogprobs, dentropy),
    }
}

fn check(h: &Array, weight: &Weight, targets: &[u32]) -> Result<(usize, usize)> {
    let (r, d) = h.dims2()?;
    if weight.cols() != d || targets.len() != r {
        bail!("logprobs: h ({r}, {d}), {} targets, lm_head width {}", targets.len(), weight.cols());
    }
    if let Some(t) = targets.iter().find(|&&t| t as usize >= weight.rows()) {
        bail!("target id {t} is past the vocabulary of {}", weight.rows());
    }
    Ok((r, d))
}
