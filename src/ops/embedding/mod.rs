//! Rows of an embedding matrix, with LoRA as PEFT defines it for `nn.Embedding`: formula, checks, dispatch.
//!
//! x_i = W[t_i] + z_i B^T, z_i = s A[:, t_i]; A (r, V), B (D, r). Saved for backward: z. With DoRA, x = (m / n) u over
//! the D elements of a row. The matrix is frozen; a token that occurs twice in the batch adds both gradients. It does
//! not depend on `linear`, except for its LoRA types: read `linear/low_rank.rs` first, and `cpu.rs` beside it next.

mod cpu;
pub mod gpu;

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::device::Array;

use crate::ops::linear::low_rank::{BranchGradient, LowRank};
use crate::ops::weight::Weight;

/// Tensors saved for `backward`.
pub enum Saved {
    /// Tensors on the host.
    Host(HostSaved),
    /// Matrices on a device.
    Device(Box<gpu::Saved>),
}

/// Tensors on the host that are saved for `backward`.
pub struct HostSaved {
    /// s A[:, t_i] (N, r).
    z: Tensor,
    /// The rows before DoRA's scale (N, D), with DoRA.
    direction: Option<Tensor>,
}

/// Rows `ids` (N) of an embedding matrix (V, D): (N, D), and the tensors saved for `backward` if there is LoRA.
///
/// # Errors
/// If an id is outside the vocabulary, or the LoRA weights do not fit.
pub fn forward(table: &Weight, ids: &[u32], lora: Option<LowRank<'_>>) -> Result<(Array, Option<Saved>)> {
    let (v, d) = (table.rows(), table.cols());
    if let Some(id) = ids.iter().find(|&&id| id as usize >= v) {
        bail!("token id {id} is past the vocabulary of {v}");
    }
    if let Some(lora) = lora {
        check(lora, v, d)?;
    }
    Ok(match table.place() {
        None => {
            let (x, saved) = cpu::forward(table, ids, lora)?;
            (x.into(), saved.map(Saved::Host))
        }
        Some(device) => {
            let lora = lora.map(|lora| lora.exact_on(device, table.compute().element())).transpose()?;
            let (x, saved) = gpu::forward(&*table.on(device)?, ids, lora.as_deref())?;
            (x.into(), saved.map(|saved| Saved::Device(Box::new(saved))))
        }
    })
}

/// The gradients of the LoRA weights of dL/dx (N, D): dB = dx^T z, dA[:, t_i] += s dx_i B, in the order of the rows.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(table: &Weight, ids: &[u32], lora: LowRank<'_>, saved: &Saved, dx: &Array) -> Result<BranchGradient> {
    let (v, d, n) = (table.rows(), table.cols(), ids.len());
    let r = check(lora, v, d)?;
    if dx.dims2()? != (n, d) || ids.iter().any(|&id| id as usize >= v) {
        bail!("a gradient {:?} for {n} rows of {d}", dx.dims2()?);
    }
    match (saved, dx) {
        (Saved::Host(saved), Array::Host(dx)) => {
            if saved.z.dims() != [n, r] {
                bail!("z {:?} for {n} rows and rank {r}", saved.z.dims());
            }
            Ok(cpu::backward(table, ids, lora, saved, dx)?)
        }
        (Saved::Device(saved), Array::Device(dx)) => {
            let device = dx.device();
            let copy = lora.exact_on(device, table.compute().element())?;
            Ok(gpu::backward(&*table.on(device)?, &copy, saved, dx)?.into())
        }
        _ => bail!("the gradient and the saved tensors of an embedding lie on two machines"),
    }
}

fn check(lora: LowRank<'_>, v: usize, d: usize) -> Result<usize> {
    let r = lora.a.dims2()?.0;
    if lora.a.dims() != [r, v] || lora.b.dims() != [d, r] || r == 0 {
        bail!("A {:?} and B {:?} do not fit a ({v}, {d}) table", lora.a.dims(), lora.b.dims());
    }
    Ok(r)
}
