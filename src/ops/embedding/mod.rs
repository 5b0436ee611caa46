//! Rows of a token table with its low-rank branch, as PEFT has it on `nn.Embedding`.
//!
//! x_i = W[t_i] + z_i B^T, z_i = s A[:, t_i]; A (r, V), B (D, r). Saved for the backward: z. With DoRA, x = (m / n) u over
//! the D numbers of a row. The table is frozen; a token that stands in the batch twice gets both gradients.
//! Read linear.rs first: a lookup is its product with one-hot rows.

use candle_core::{Result, Tensor};

use crate::ops::cpu::gemm::{Into, Mat, gemm};
use crate::ops::cpu::{Isa, tensor, view};
use crate::ops::linear::low_rank::{Lines, magnitude_gradient, scaled, transposed};
use crate::ops::linear::{BranchGradient, LowRank};
use crate::ops::weight::Weight;

/// What `backward` wants of `forward`.
pub struct Saved {
    /// (N, r).
    z: Tensor,
    /// With DoRA, the rows before their scale: (N, D).
    direction: Option<Tensor>,
}

/// Rows `ids` (N) of a table (V, D): (N, D), and what `backward` wants where there is a branch.
///
/// # Errors
/// If an id is past the table, or the branch does not fit.
pub fn forward(table: &Weight, ids: &[u32], lora: Option<LowRank<'_>>) -> Result<(Tensor, Option<Saved>)> {
    let (v, d, n) = (table.rows(), table.cols(), ids.len());
    if let Some(id) = ids.iter().find(|&&id| id as usize >= v) {
        candle_core::bail!("token id {id} is past the vocabulary of {v}");
    }
    let mut x = vec![0f32; n * d];
    for (row, &id) in x.chunks_exact_mut(d).zip(ids) {
        table.row(id as usize, row);
    }
    let Some(lora) = lora else { return Ok((tensor(x, (n, d))?, None)) };
    let r = check(lora, v, d)?;
    let (a, b_t) = (view(lora.a)?, transposed(&view(lora.b)?, d, r, 1.0));
    let mut z = vec![0f32; n * r];
    for (z, &id) in z.chunks_exact_mut(r).zip(ids) {
        for (j, z) in z.iter_mut().enumerate() {
            *z = lora.scale as f32 * a[j * v + id as usize];
        }
    }
    // SAFETY: z is n x r, B^T r x d, x n x d.
    unsafe {
        gemm(Isa::detect(), n, d, r, Mat::rows(&z, r), Mat::rows(&b_t, d), x.as_mut_ptr(), d, Into::Add);
    }
    let (x, z) = (tensor(x, (n, d))?, tensor(z, (n, r))?);
    Ok(match lora.dora {
        None => (x, Some(Saved { z, direction: None })),
        Some(dora) => {
            let (g, _) = dora.scales(table, lora, Lines::Columns)?;
            (scaled(&x, &g)?, Some(Saved { z, direction: Some(x) }))
        }
    })
}

/// The branch's gradients of dL/dx (N, D): dB = dx^T z, dA[:, t_i] += s dx_i B, in the order of the rows.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(table: &Weight, ids: &[u32], lora: LowRank<'_>, kept: &Saved, dx: &Tensor) -> Result<BranchGradient> {
    let (v, d, n) = (table.rows(), table.cols(), ids.len());
    let r = check(lora, v, d)?;
    if dx.dims() != [n, d] || kept.z.dims() != [n, r] || ids.iter().any(|&id| id as usize >= v) {
        candle_core::bail!("a gradient {:?} and z {:?} for {n} rows of {d}", dx.dims(), kept.z.dims());
    }
    let (dx, magnitude) = match (lora.dora, &kept.direction) {
        (Some(dora), Some(u)) => {
            let (g, norms) = dora.scales(table, lora, Lines::Columns)?;
            (scaled(dx, &g)?, Some(magnitude_gradient(&view(dx)?, &view(u)?, &norms)?))
        }
        _ => (dx.clone(), None),
    };
    let (dx, z, b, isa) = (view(&dx)?, view(&kept.z)?, view(lora.b)?, Isa::detect());
    let (mut dz, mut db_t) = (vec![0f32; n * r], vec![0f32; r * d]);
    // SAFETY: dx is n x d, B d x r, z n x r; both outputs are this call's own.
    unsafe {
        gemm(isa, n, r, d, Mat::rows(&dx, d), Mat::rows(&b, r), dz.as_mut_ptr(), r, Into::Fresh);
        gemm(isa, r, d, n, Mat::rows(&z, r).t(), Mat::rows(&dx, d), db_t.as_mut_ptr(), d, Into::Fresh);
    }
    let mut da = vec![0f32; r * v];
    for (dz, &id) in dz.chunks_exact(r).zip(ids) {
        for (j, dz) in dz.iter().enumerate() {
            da[j * v + id as usize] += lora.scale as f32 * dz;
        }
    }
    let db = transposed(&db_t, r, d, 1.0);
    Ok(BranchGradient { a: tensor(da, (r, v))?, b: tensor(db, (d, r))?, magnitude })
}

fn check(lora: LowRank<'_>, v: usize, d: usize) -> Result<usize> {
    let r = lora.a.dims2()?.0;
    if lora.a.dims() != [r, v] || lora.b.dims() != [d, r] || r == 0 {
        candle_core::bail!("A {:?} and B {:?} do not fit a ({v}, {d}) table", lora.a.dims(), lora.b.dims());
    }
    Ok(r)
}
