//! Frozen linear layers with LoRA: several that read the same input (q, k, v; gate, up) are one group. Formula, checks,
//! dispatch.
//!
//! y_p = x W_p^T + s_p (x A_p^T) B_p^T [+ bias_p] [+ residual]. Saved for backward: x and z = s x A^T. With DoRA, the sum of
//! both products is scaled before bias and residual are added; see `low_rank.rs`. It does not depend on names of layers.
//! Read `low_rank.rs` and `cpu.rs` beside it, then `embedding/mod.rs`.

mod cpu;
pub(crate) mod cpu_bf16;
pub(crate) mod cpu_gemv;
pub mod low_rank;

use candle_core::{Result, Tensor};

use crate::ops::linear::low_rank::Dora;
pub use crate::ops::linear::low_rank::{BranchGradient, LowRank};
use crate::ops::weight::Weight;

/// One frozen linear layer of a group that shares its input.
#[derive(Clone, Copy)]
pub struct LinearWithLora<'a> {
    /// W, (out, in), as stored.
    pub weight: &'a Weight,
    /// b, (out), if the layer has one. It is frozen and has no gradient.
    pub bias: Option<&'a [f32]>,
    /// LoRA weights, if the role's adapter has them here.
    pub lora: Option<LowRank<'a>>,
}

impl<'a> LinearWithLora<'a> {
    fn rank(&self) -> usize {
        self.lora.map_or(0, |l| l.a.dims()[0])
    }

    fn dora(&self) -> Option<(LowRank<'a>, Dora<'a>)> {
        self.lora.and_then(|l| l.dora.map(|d| (l, d)))
    }
}

/// Tensors saved for `backward`, apart from x.
pub struct Saved {
    /// s x A^T of all parts side by side: (N, sum of ranks).
    z: Tensor,
    /// The output of each part with DoRA, before its scale: (N, out).
    directions: Vec<Option<Tensor>>,
}

/// Gradients of a group.
pub struct Gradients {
    /// dL/dx (N, in); `None` if it was not requested.
    pub input: Option<Tensor>,
    /// LoRA gradients, one element per part.
    pub lora: Vec<Option<BranchGradient>>,
}

/// Whether anything below the group needs a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    /// dL/dx is computed.
    Wanted,
    /// Only the LoRA gradients are computed: nothing below the group is trained.
    Unused,
}

/// Outputs (N, out_p) of each part, and the tensors saved for `backward`.
///
/// x: (N, in). With `residual` (N, out), which requires a single part: y = residual + ...
///
/// # Errors
/// If shapes do not fit.
pub fn forward(x: &Tensor, parts: &[LinearWithLora<'_>], residual: Option<&Tensor>) -> Result<(Vec<Tensor>, Saved)> {
    let (m, k) = x.dims2()?;
    check(k, parts)?;
    if let Some(residual) = residual
        && (parts.len() != 1 || residual.elem_count() != m * parts[0].weight.rows())
    {
        candle_core::bail!("a residual of {} elements for {} parts", residual.elem_count(), parts.len());
    }
    cpu::forward(x, parts, residual)
}

/// dx = sum_p dy_p W_p + s (dy_p B_p) A_p;  dB_p = dy_p^T z_p;  dA_p = (s dy_p B_p)^T x.
///
/// x (N, in) and `saved` are the input and the result of `forward`; dys: (N, out_p) each. With DoRA, dy is first scaled as
/// y was.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(
    x: &Tensor,
    parts: &[LinearWithLora<'_>],
    saved: &Saved,
    dys: &[&Tensor],
    wanted: InputGradient,
) -> Result<Gradients> {
    let (m, k) = x.dims2()?;
    check(k, parts)?;
    let rank: usize = parts.iter().map(LinearWithLora::rank).sum();
    let z = &saved.z;
    if z.dims() != [m, rank] || dys.len() != parts.len() || saved.directions.len() != parts.len() {
        candle_core::bail!("z {:?} and {} gradients for {} parts of rank {rank}", z.dims(), dys.len(), parts.len());
    }
    for (p, dy) in parts.iter().zip(dys) {
        if dy.dims() != [m, p.weight.rows()] {
            candle_core::bail!("a gradient {:?} for an output ({m}, {})", dy.dims(), p.weight.rows());
        }
    }
    cpu::backward(x, parts, saved, dys, wanted)
}

fn check(k: usize, parts: &[LinearWithLora<'_>]) -> Result<()> {
    for p in parts {
        let n = p.weight.rows();
        if p.weight.cols() != k {
            candle_core::bail!("an input of width {k} for a ({n}, {}) matrix", p.weight.cols());
        }
        if let Some(bias) = p.bias.filter(|b| b.len() != n) {
            candle_core::bail!("a bias of {} numbers for {n} outputs", bias.len());
        }
        if let Some(l) = p.lora {
            let r = l.a.dims()[0];
            if l.a.dims() != [r, k] || l.b.dims() != [n, r] {
                candle_core::bail!("A {:?} and B {:?} do not fit a ({n}, {k}) matrix", l.a.dims(), l.b.dims());
            }
        }
    }
    Ok(())
}
