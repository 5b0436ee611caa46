//! The embedding on the CPU. Read `mod.rs` beside it for the formulas.

use candle_core::{Result, Tensor};

use super::HostSaved;
use crate::ops::cpu::gemm::{Into, Mat, gemm};
use crate::ops::cpu::{Isa, tensor, view};
use crate::ops::linear::low_rank::{
    BranchGradient, LowRank, NormAxis, magnitude_gradient, scale_columns, transpose_scaled,
};
use crate::ops::weight::Weight;

/// Rows `ids` of the table, and the tensors saved for `backward`.
pub fn forward(table: &Weight, ids: &[u32], lora: Option<LowRank<'_>>) -> Result<(Tensor, Option<HostSaved>)> {
    let (v, d, n) = (table.rows(), table.cols(), ids.len());
    let mut x = vec![0f32; n * d];
    for (row, &id) in x.chunks_exact_mut(d).zip(ids) {
        table.row(id as usize, row);
    }
    let Some(lora) = lora else { return Ok((tensor(x, (n, d))?, None)) };
    let r = lora.a.dims()[0];
    let (a, b_t) = (view(lora.a)?, transpose_scaled(&view(lora.b)?, d, r, 1.0));
    let mut z = vec![0f32; n * r];
    for (z, &id) in z.chunks_exact_mut(r).zip(ids) {
        for (j, z) in z.iter_mut().enumerate() {
            *z = lora.scale as f32 * a[j * v + id as usize];
        }
    }
    // SAFETY: z is n x r, B^T is r x d, x is n x d.
    unsafe {
        gemm(Isa::detect(), n, d, r, Mat::rows(&z, r), Mat::rows(&b_t, d), x.as_mut_ptr(), d, Into::Add);
    }
    let (x, z) = (tensor(x, (n, d))?, tensor(z, (n, r))?);
    Ok(match lora.dora {
        None => (x, Some(HostSaved { z, direction: None })),
        Some(dora) => {
            let (g, _) = dora.scales(table, lora, NormAxis::Columns)?;
            (scale_columns(&x, &g)?, Some(HostSaved { z, direction: Some(x) }))
        }
    })
}

/// The gradients of the LoRA weights.
pub fn backward(
    table: &Weight,
    ids: &[u32],
    lora: LowRank<'_>,
    saved: &HostSaved,
    dx: &Tensor,
) -> Result<BranchGradient> {
    let (v, d, n) = (table.rows(), table.cols(), ids.len());
    let r = lora.a.dims()[0];
    let (dx, magnitude) = match (lora.dora, &saved.direction) {
        (Some(dora), Some(u)) => {
            let (g, norms) = dora.scales(table, lora, NormAxis::Columns)?;
            (scale_columns(dx, &g)?, Some(magnitude_gradient(&view(dx)?, &view(u)?, &norms)?))
        }
        _ => (dx.clone(), None),
    };
    let (dx, z, b, isa) = (view(&dx)?, view(&saved.z)?, view(lora.b)?, Isa::detect());
    let (mut dz, mut db_t) = (vec![0f32; n * r], vec![0f32; r * d]);
    // SAFETY: dx is n x d, B d x r, z n x r; no other thread uses the outputs.
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
    let db = transpose_scaled(&db_t, r, d, 1.0);
    Ok(BranchGradient::on_host(tensor(da, (r, v))?, tensor(db, (d, r))?, magnitude))
}
