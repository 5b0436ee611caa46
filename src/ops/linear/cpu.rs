//! The linear group on the CPU: the split of the work into panels of output or input columns, and the gradients of LoRA
//! and DoRA. Panels go through one of three kernels: `cpu_gemv.rs` for decoding, `cpu_bf16.rs` for bf16, otherwise the
//! f32 gemm. Read `mod.rs` beside it for the formulas.

use candle_core::{Result, Tensor};

use super::cpu_bf16::{self, PackedLhs};
use super::cpu_gemv::{self, FEW_ROWS, gemv};
use super::low_rank::{self, BranchGradient, NormAxis};
use super::{Gradients, HostSaved, InputGradient, LinearWithLora};
use crate::device::Array;
use crate::ops::cpu::gemm::{Into, MR, Mat, NR, gemm};
use crate::ops::cpu::pack::{columns, rows_as_columns};
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{Buffer, Isa, Out, View, parallel, tensor, view};

/// Whether the group computes in bf16.
fn is_bf16(k: usize, parts: &[LinearWithLora<'_>]) -> bool {
    cpu_bf16::applies(k, parts.iter().map(|p| p.weight))
}

/// Outputs (N, out_p) of each part, and the tensors saved for `backward`.
pub fn forward(
    x: &Tensor,
    parts: &[LinearWithLora<'_>],
    residual: Option<&Tensor>,
) -> Result<(Vec<Tensor>, HostSaved)> {
    let (m, k) = x.dims2()?;
    let rank: usize = parts.iter().map(LinearWithLora::rank).sum();
    let xs = view(x)?;
    let residual = residual.map(view).transpose()?;
    let (lhs, z) = if is_bf16(k, parts) {
        let (lhs, z) = PackedLhs::of(&xs, m, k, &stacked_a(parts, k, rank)?, rank);
        (Some(lhs), z)
    } else {
        (None, low_rank_inputs(&xs, m, k, parts, rank)?)
    };
    let mut ys: Vec<Buffer> = parts.iter().map(|p| Buffer::new(m * p.weight.rows())).collect();
    let outs: Vec<Out> = ys.iter_mut().map(Buffer::out).collect();
    let bs = parts.iter().map(|p| p.lora.map(|l| view(l.b)).transpose()).collect::<Result<Vec<_>>>()?;

    // Work items are panels of `wide` output columns, over all parts.
    let wide = if m <= FEW_ROWS && lhs.is_none() { cpu_gemv::PANEL } else { NR };
    let panels: Vec<(usize, usize)> = parts
        .iter()
        .enumerate()
        .flat_map(|(p, part)| (0..part.weight.rows()).step_by(wide).map(move |n| (p, n)))
        .collect();
    let cost = m * k * parts.iter().map(|p| p.weight.rows()).sum::<usize>();
    let isa = Isa::detect();
    parallel(panels.len(), cost, |range| {
        for &(p, n0) in &panels[range] {
            let (part, n) = (&parts[p], parts[p].weight.rows());
            let width = wide.min(n - n0);
            let into = match (&residual, part.bias.map(|b| &b.values[..])) {
                _ if part.dora().is_some() => Into::Fresh,
                (None, None) => Into::Fresh,
                (residual, bias) => {
                    for i in 0..m {
                        // SAFETY: rows i < m and columns n0..n0+width belong to this panel alone; each is written here
                        // before it is read.
                        let y = unsafe { outs[p].slice(i * n + n0, width) };
                        match residual {
                            Some(s) => y.copy_from_slice(&s[i * n + n0..i * n + n0 + width]),
                            None => y.fill(0.0),
                        }
                        for (y, b) in y.iter_mut().zip(bias.into_iter().flat_map(|b| &b[n0..])) {
                            *y += b;
                        }
                    }
                    Into::Add
                }
            };
            let r = part.rank();
            let offset: usize = parts[..p].iter().map(LinearWithLora::rank).sum();
            if let Some(lhs) = &lhs {
                let b = bs[p].as_ref().map(|b| (&b[..], r, offset));
                // SAFETY: columns n0..n0 + width of this output belong to this panel alone.
                unsafe { lhs.forward_columns(part.weight, b, (n0, width), (outs[p].at(n0), n), into) };
                continue;
            }
            if m <= FEW_ROWS {
                gemv(isa, &xs, m, part.weight, n0..n0 + width, outs[p], into);
            } else {
                with_scratch(k * NR, |panel| {
                    rows_as_columns(part.weight, n0..n0 + width, panel);
                    // SAFETY: x is m x k, the panel k x NR, the output m x n with this panel's columns inside.
                    unsafe { gemm(isa, m, width, k, Mat::rows(&xs, k), Mat::rows(panel, NR), outs[p].at(n0), n, into) };
                });
            }
            if let Some(b) = &bs[p] {
                with_scratch(r * wide, |panel| {
                    for (i, row) in b[n0 * r..(n0 + width) * r].chunks_exact(r).enumerate() {
                        for (j, &v) in row.iter().enumerate() {
                            panel[j * wide + i] = v;
                        }
                    }
                    // SAFETY: z is m x rank with this part's r columns at offset; the output as above.
                    unsafe {
                        let z = Mat::rows(&z, rank).from(0, offset);
                        gemm(isa, m, width, r, z, Mat::rows(panel, wide), outs[p].at(n0), n, Into::Add);
                    }
                });
            }
        }
    });
    let ys = ys
        .into_iter()
        .zip(parts)
        // SAFETY: the panels cover every row and column of each output.
        .map(|(y, p)| tensor(unsafe { y.finish() }, (m, p.weight.rows())))
        .collect::<Result<Vec<_>>>()?;
    let mut saved = HostSaved { z: tensor(z, (m, rank))?, directions: vec![] };
    let mut done = Vec::with_capacity(parts.len());
    for (y, part) in ys.into_iter().zip(parts) {
        let (y, direction) = match part.dora() {
            Some((lora, dora)) => {
                let (g, _) = dora.scales(part.weight, lora, NormAxis::Rows)?;
                (scale_and_add(&y, &g, part.bias.map(|b| &b.values[..]), residual.as_deref())?, Some(y))
            }
            None => (y, None),
        };
        done.push(y);
        saved.directions.push(direction);
    }
    Ok((done, saved))
}

/// What [`forward`] saves for parts without DoRA, without the outputs.
pub fn saved_alone(x: &Tensor, parts: &[LinearWithLora<'_>]) -> Result<HostSaved> {
    let (m, k) = x.dims2()?;
    let rank: usize = parts.iter().map(LinearWithLora::rank).sum();
    let xs = view(x)?;
    let z = match is_bf16(k, parts) {
        true => PackedLhs::of(&xs, m, k, &stacked_a(parts, k, rank)?, rank).1,
        false => low_rank_inputs(&xs, m, k, parts, rank)?,
    };
    Ok(HostSaved { z: tensor(z, (m, rank))?, directions: vec![None; parts.len()] })
}

/// g u + bias + residual, of u (N, out).
fn scale_and_add(u: &Tensor, g: &[f32], bias: Option<&[f32]>, residual: Option<&[f32]>) -> Result<Tensor> {
    let y = low_rank::scale_columns(u, g)?;
    if bias.is_none() && residual.is_none() {
        return Ok(y);
    }
    let (n, mut all) = (g.len().max(1), view(&y)?.to_vec());
    if let Some(bias) = bias {
        all.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    }
    if let Some(residual) = residual {
        all.iter_mut().zip(residual).for_each(|(y, r)| *y += r);
    }
    tensor(all, u.dims2()?)
}

/// s_p A_p of all parts, stacked: (rank, k).
fn stacked_a(parts: &[LinearWithLora<'_>], k: usize, rank: usize) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(rank * k);
    for l in parts.iter().filter_map(|p| p.lora) {
        all.extend(view(l.a)?.iter().map(|v| v * l.scale as f32));
    }
    Ok(all)
}

/// z (m, rank): s_p x A_p^T for all parts side by side.
fn low_rank_inputs(xs: &[f32], m: usize, k: usize, parts: &[LinearWithLora<'_>], rank: usize) -> Result<Vec<f32>> {
    let mut z = vec![0f32; m * rank];
    if rank == 0 {
        return Ok(z);
    }
    // All A as one scaled panel (k, rank).
    let mut a_t = vec![0f32; k * rank];
    let mut offset = 0;
    for l in parts.iter().filter_map(|p| p.lora) {
        let a = view(l.a)?;
        for row in a.chunks_exact(k) {
            for (j, &v) in row.iter().enumerate() {
                a_t[j * rank + offset] = v * l.scale as f32;
            }
            offset += 1;
        }
    }
    let out = Out::of(&mut z);
    let isa = Isa::detect();
    parallel(m.div_ceil(MR), m * k * rank, |tiles| {
        let (i0, i1) = (tiles.start * MR, m.min(tiles.end * MR));
        // SAFETY: rows i0..i1 of z belong to this part of the work.
        unsafe {
            let x = Mat::rows(xs, k).from(i0, 0);
            gemm(isa, i1 - i0, rank, k, x, Mat::rows(&a_t, rank), out.at(i0 * rank), rank, Into::Fresh);
        }
    });
    Ok(z)
}

/// The gradients of the group.
pub fn backward(
    x: &Tensor,
    parts: &[LinearWithLora<'_>],
    saved: &HostSaved,
    dys: &[&Tensor],
    wanted: InputGradient,
) -> Result<Gradients> {
    let (m, k) = x.dims2()?;
    let rank: usize = parts.iter().map(LinearWithLora::rank).sum();
    let (xs, zs) = (view(x)?, view(&saved.z)?);
    let mut magnitudes = Vec::with_capacity(parts.len());
    let mut d_products = Vec::with_capacity(parts.len());
    for ((part, dy), direction) in parts.iter().zip(dys).zip(&saved.directions) {
        let (Some((lora, dora)), Some(u)) = (part.dora(), direction) else {
            magnitudes.push(None);
            d_products.push((*dy).clone());
            continue;
        };
        let (g, norms) = dora.scales(part.weight, lora, NormAxis::Rows)?;
        magnitudes.push(Some(low_rank::magnitude_gradient(&view(dy)?, &view(u)?, &norms)?));
        d_products.push(low_rank::scale_columns(dy, &g)?);
    }
    let dys = d_products.iter().map(view).collect::<Result<Vec<_>>>()?;
    let isa = Isa::detect();
    let (dz, lhs) = if is_bf16(k, parts) {
        let (dz, lhs) = packed_output_gradients(&dys, m, parts, rank)?;
        (dz, Some(lhs))
    } else {
        (low_rank_output_gradients(&dys, m, parts, rank)?, None)
    };

    let input = match wanted {
        InputGradient::Wanted => Some(tensor(input_gradient(&dys, &dz, m, k, parts, rank, lhs.as_deref())?, (m, k))?),
        InputGradient::Unused => None,
    };

    drop(lhs);

    let mut lora = Vec::with_capacity(parts.len());
    let mut offset = 0;
    for ((part, dy), magnitude) in parts.iter().zip(&dys).zip(magnitudes) {
        let (n, r) = (part.weight.rows(), part.rank());
        if r == 0 {
            lora.push(None);
            continue;
        }
        // Both are products of r rows over all tokens; dB results transposed.
        let mut da = vec![0f32; r * k];
        let mut db_t = vec![0f32; r * n];
        for (out, width, left, right) in [(&mut da, k, &dz[..], &xs[..]), (&mut db_t, n, &zs[..], &dy[..])] {
            let out = Out::of(out);
            parallel(width.div_ceil(NR), m * r * width, |strips| {
                let (j0, j1) = (strips.start * NR, width.min(strips.end * NR));
                // SAFETY: columns j0..j1 of the output belong to this part of the work; both factors have m rows.
                unsafe {
                    let a = Mat::rows(left, rank).from(0, offset).t();
                    let b = Mat::rows(right, width).from(0, j0);
                    gemm(isa, r, j1 - j0, m, a, b, out.at(j0), width, Into::Fresh);
                }
            });
        }
        let mut db = vec![0f32; n * r];
        for (i, row) in db_t.chunks_exact(n).enumerate() {
            for (j, &v) in row.iter().enumerate() {
                db[j * r + i] = v;
            }
        }
        lora.push(Some(BranchGradient::on_host(tensor(da, (r, k))?, tensor(db, (n, r))?, magnitude)));
        offset += r;
    }
    Ok(Gradients { input: input.map(Array::Host), lora })
}

/// dz (m, rank) = s_p dy_p B_p, side by side, and each dy_p, packed with its own part of dz.
fn packed_output_gradients(
    dys: &[View<'_>],
    m: usize,
    parts: &[LinearWithLora<'_>],
    rank: usize,
) -> Result<(Vec<f32>, Vec<PackedLhs>)> {
    let mut dz = vec![0f32; m * rank];
    let (mut lhs, mut offset) = (Vec::with_capacity(parts.len()), 0);
    for (part, dy) in parts.iter().zip(dys) {
        let (n, r) = (part.weight.rows(), part.rank());
        let mut factor = vec![0f32; r * n];
        if let Some(l) = part.lora {
            for (j, row) in view(l.b)?.chunks_exact(r).enumerate() {
                for (i, &v) in row.iter().enumerate() {
                    factor[i * n + j] = v * l.scale as f32;
                }
            }
        }
        let (packed, own) = PackedLhs::of(dy, m, n, &factor, r);
        for (all, own) in dz.chunks_exact_mut(rank.max(1)).zip(own.chunks_exact(r.max(1))) {
            all[offset..offset + r].copy_from_slice(own);
        }
        lhs.push(packed);
        offset += r;
    }
    Ok((dz, lhs))
}

/// dz (m, rank) = s_p dy_p B_p, side by side.
fn low_rank_output_gradients(
    dys: &[View<'_>],
    m: usize,
    parts: &[LinearWithLora<'_>],
    rank: usize,
) -> Result<Vec<f32>> {
    let mut dz = vec![0f32; m * rank];
    let out = Out::of(&mut dz);
    let isa = Isa::detect();
    let mut offset = 0;
    for (part, dy) in parts.iter().zip(dys) {
        let Some(l) = part.lora else { continue };
        let (n, r) = (part.weight.rows(), part.rank());
        let b: Vec<f32> = view(l.b)?.iter().map(|v| v * l.scale as f32).collect();
        parallel(m.div_ceil(MR), m * n * r, |tiles| {
            let (i0, i1) = (tiles.start * MR, m.min(tiles.end * MR));
            // SAFETY: rows i0..i1, columns offset..offset+r of dz belong to this part of the work.
            unsafe {
                let dy = Mat::rows(dy, n).from(i0, 0);
                gemm(isa, i1 - i0, r, n, dy, Mat::rows(&b, r), out.at(i0 * rank + offset), rank, Into::Fresh);
            }
        });
        offset += r;
    }
    Ok(dz)
}

/// dx (m, k). Panels are columns of W as stored, so nothing is transposed.
fn input_gradient(
    dys: &[View<'_>],
    dz: &[f32],
    m: usize,
    k: usize,
    parts: &[LinearWithLora<'_>],
    rank: usize,
    lhs: Option<&[PackedLhs]>,
) -> Result<Vec<f32>> {
    let mut dx = Buffer::new(m * k);
    let out = dx.out();
    let isa = Isa::detect();
    let a = parts.iter().map(|p| p.lora.map(|l| view(l.a)).transpose()).collect::<Result<Vec<_>>>()?;
    // Columns are dequantised in whole blocks.
    let group = parts.iter().map(|p| p.weight.dtype().block().0).max().unwrap_or(1).max(NR);
    let cost = m * k * parts.iter().map(|p| p.weight.rows()).sum::<usize>();
    parallel(k.div_ceil(group), cost, |groups| {
        for g in groups {
            let (j0, width) = (g * group, group.min(k - g * group));
            let mut offset = 0;
            for (p, part) in parts.iter().enumerate() {
                let (n, r) = (part.weight.rows(), part.rank());
                let into = if p == 0 { Into::Fresh } else { Into::Add };
                if let Some(lhs) = lhs {
                    let a = a[p].as_ref().map(|a| (&a[..], r));
                    // SAFETY: columns j0..j0+width of dx belong to this group.
                    unsafe { lhs[p].backward_columns(part.weight, 0..n, a, (j0, width), (out.at(j0), k), into) };
                    continue;
                }
                // Columns are copied even if they are stored as f32: reading W with a stride would touch a page per
                // term.
                with_scratch(n * width, |panel| {
                    columns(part.weight, j0..j0 + width, panel);
                    let panel = Mat::rows(panel, width);
                    // SAFETY: columns j0..j0+width of dx belong to this group; dy is m x n, the panel n x width.
                    unsafe { gemm(isa, m, width, n, Mat::rows(&dys[p], n), panel, out.at(j0), k, into) };
                });
                if let Some(a) = &a[p] {
                    // SAFETY: dz is m x rank with this part's r columns at offset; A is r x k.
                    unsafe {
                        let dz = Mat::rows(dz, rank).from(0, offset);
                        gemm(isa, m, width, r, dz, Mat::rows(a, k).from(0, j0), out.at(j0), k, Into::Add);
                    }
                }
                offset += r;
            }
        }
    });
    // SAFETY: the groups cover all columns of all rows.
    Ok(unsafe { dx.finish() })
}
