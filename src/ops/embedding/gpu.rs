//! The embedding on a device, straight from the stored table, and its low-rank branch as PEFT has it on `nn.Embedding`.
//! It does not depend on layers. Read gpu.cu for the kernel, and `linear/gpu_low_rank.rs` for the branch: a lookup is the
//! product with one-hot rows.
//!
//! x_i = W\[t_i\] + z_i B^T with z_i = s A\[:, t_i\], A (r, V) and B (D, r). With DoRA that sum is u_i, and
//! x = (m / norm) u over the D numbers of a row, with the norms of the columns of W + s (B A)^T. Saved for the
//! backward: z, and with DoRA u.

use anyhow::{Result, ensure};

use crate::device::{Arguments, Device, Element, Matrix, Ptr, Strided, Variant};
use crate::ops::columns::gpu::{add_sums, affine, cast, magnitude_gradient, scale};
use crate::ops::launch::shape;
use crate::ops::linear::gpu::{product, sum_over_rows};
use crate::ops::linear::gpu_low_rank::{DeviceLora, DoraScales, LoraGradient};
use crate::ops::linear::gpu_strips::dequantised_strips;
use crate::ops::rows::gpu::{DeviceIndex, gather, scatter};
use crate::ops::storage::gpu::DeviceWeight;
use crate::ops::storage::gpu::Planes;

#[repr(C)]
struct Embedding {
    table: Planes,
    ids: Ptr,
    out: Ptr,
    rows: u32,
    cols: u32,
}

// SAFETY: the fields are those of `Embedding` in gpu.cu.
unsafe impl Arguments for Embedding {
    const NAME: &'static str = "embedding";
    const BLOCK: u32 = 128;
}

/// out (tokens, cols) = the rows of `table` (rows, cols) that `ids` name, as f32. `ids` are u32. An id of `rows` or
/// more gives a row of NaN.
///
/// Errors: an `out` of another shape or type, or operands on two devices.
pub fn embedding(table: &DeviceWeight, ids: &Matrix, out: &Matrix) -> Result<()> {
    let (tokens, cols) = (ids.len(), table.cols());
    let one_device = [ids, out].iter().all(|m| m.device().ptr_eq(table.device()));
    ensure!(one_device, "embedding: table, ids and result lie on two devices");
    let fits = (out.rows(), out.cols()) == (tokens, cols);
    ensure!(fits, "embedding: {tokens} rows of {cols} numbers into ({}, {})", out.rows(), out.cols());
    let arguments = Embedding {
        table: table.planes()?,
        ids: ids.input("ids", Element::U32, tokens)?,
        out: out.output("out", Element::F32, tokens * cols)?,
        rows: u32::try_from(table.rows())?,
        cols: u32::try_from(cols)?,
    };
    table.counts_as_rows(tokens);
    table.device().launch(Variant::named(table.dtype().name()), [u32::try_from(tokens)?, 1, 1], arguments)
}

/// What `backward` needs of `forward`.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Where A's numbers of the tokens lie: number q V + t_i of A for rank q of token i, token by token.
    index: DeviceIndex,
    /// (N, r) of the operands' type.
    z: Matrix,
    /// With DoRA, u (N, D) f32.
    direction: Option<Matrix>,
}

/// The rows (N, D) f32 of a table (V, D) for N token ids, and what `backward` needs where there is a branch. The ids
/// come from the host, where tokens are.
///
/// # Errors
/// If an id is past the table, the branch does not fit it, or memory is short.
pub fn forward(table: &DeviceWeight, ids: &[u32], lora: Option<&DeviceLora>) -> Result<(Matrix, Option<Saved>)> {
    let (device, vocabulary, d) = (table.device(), table.rows(), table.cols());
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
        anyhow::bail!("embedding: token id {id} is past the vocabulary of {vocabulary}");
    }
    if let Some(lora) = lora {
        check(table, lora)?;
    }
    let x = device.matrix(Element::F32, ids.len(), d)?;
    embedding(table, &device.input("embedding", ids)?, &x)?;
    let Some(lora) = lora else { return Ok((x, None)) };
    let r = lora.rank();
    let index = factor_index(device, ids, r, vocabulary)?;
    let columns = gather(&lora.exact()?.0.reshape(r * vocabulary, 1)?, &index, Element::F32)?.reshape(ids.len(), r)?;
    let z = scale(&columns, lora.scale(), lora.operand())?;
    let b = lora.b_operand().whole();
    product((ids.len(), d, r), (z.whole(), false), (b, true), x.whole(), (1.0, 1.0))?;
    Ok(match column_scales(table, lora)? {
        None => (x, Some(Saved { index, z, direction: None })),
        Some(scales) => {
            let scaled = affine(&x, Some(&scales.factors), None, Element::F32)?;
            (scaled, Some(Saved { index, z, direction: Some(x) }))
        }
    })
}

/// The branch's gradients from dL/dx (N, D), f32 or the operands' type: dB = dx^T z, and s dx_i B joins
/// dA\[:, t_i\] for each token, in the order of the tokens. With DoRA, dx is first multiplied by m / norm, and
/// dm = (sum over tokens of dx u) / norm: the norms count as constants.
///
/// # Errors
/// If shapes or types do not fit, operands lie on two devices, or memory is short.
pub fn backward(table: &DeviceWeight, lora: &DeviceLora, saved: &Saved, dx: &Matrix) -> Result<LoraGradient> {
    check(table, lora)?;
    let (device, operand, n) = (table.device(), lora.operand(), saved.z.rows());
    let (vocabulary, d, r) = (table.rows(), table.cols(), lora.rank());
    let element = dx.element();
    let fits = element == Element::F32 || element == operand;
    ensure!(fits, "embedding backward: a gradient of {element} meets products of {operand}");
    let one_device = [&saved.z, dx].iter().all(|matrix| matrix.device().ptr_eq(device));
    ensure!(one_device, "embedding backward: the table and a gradient or saved tensor lie on two devices");
    shape("embedding backward: the gradient", dx, n, d)?;
    shape("embedding backward: the saved z", &saved.z, n, r)?;
    let (dx, magnitude) = match (column_scales(table, lora)?, &saved.direction) {
        (None, None) => (cast(dx, operand)?, None),
        (Some(scales), Some(u)) => {
            let magnitude = magnitude_gradient(dx, u, &scales.norms)?;
            (affine(dx, Some(&scales.factors), None, operand)?, Some(magnitude))
        }
        _ => anyhow::bail!("embedding backward: what was saved does not tell of DoRA what the branch does"),
    };
    let dz = device.matrix(Element::F32, n, r)?;
    product((n, r, d), (dx.whole(), false), (lora.b_operand().whole(), false), dz.whole(), (lora.scale(), 0.0))?;
    let a = scatter(&dz.reshape(n * r, 1)?, &saved.index, Element::F32)?.reshape(r, vocabulary)?;
    Ok(LoraGradient { a, b: sum_over_rows((dx.whole(), dx.cols(), dx.rows()), saved.z.whole(), r)?, magnitude })
}

fn check(table: &DeviceWeight, lora: &DeviceLora) -> Result<()> {
    let (vocabulary, d, inputs, outputs) = (table.rows(), table.cols(), lora.inputs(), lora.outputs());
    let fits = (inputs, outputs) == (vocabulary, d);
    ensure!(fits, "embedding: LoRA for a table of ({inputs}, {outputs}) meets one of ({vocabulary}, {d})");
    ensure!(lora.device().ptr_eq(table.device()), "embedding: the table and LoRA's factors lie on two devices");
    Ok(())
}

/// The places in A (r, V) of the columns that `ids` name.
fn factor_index(device: &Device, ids: &[u32], r: usize, vocabulary: usize) -> Result<DeviceIndex> {
    let places: Vec<usize> = ids.iter().flat_map(|&id| (0..r).map(move |q| q * vocabulary + id as usize)).collect();
    DeviceIndex::new(device, &places, r * vocabulary)
}

/// DoRA's norms of the columns of W + s (B A)^T, and magnitudes over them; `None` if it is not DoRA.
fn column_scales<'a>(table: &DeviceWeight, lora: &'a DeviceLora) -> Result<Option<&'a DoraScales>> {
    lora.scales(|| {
        let (vocabulary, d, r) = (table.rows(), table.cols(), lora.rank());
        let squares = table.device().zeros(Element::F32, 1, d)?;
        let (a, b) = lora.exact()?;
        dequantised_strips(table, Element::F32, lora.scratch(), |rows, w| {
            let a = Strided { matrix: a, offset: rows.start, row: vocabulary, next: 0 };
            let factors = (lora.scale(), 1.0);
            product((rows.len(), d, r), (a, true), (b.whole(), true), w.whole(), factors)?;
            add_sums(w, Some(w), None, &squares)
        })?;
        Ok(squares)
    })
}
