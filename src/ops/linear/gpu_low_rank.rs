//! The low-rank branch of one frozen matrix on a device: LoRA's factors, and with DoRA the magnitudes and the row norms
//! that they are divided by; and the low-rank parts of products of many rows. It does not depend on names of layers. Read `gpu.rs`
//! beside it for the use in linear layers, or `embedding/gpu.rs` for the use on an embedding matrix.

use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use super::gpu_strips::{SCRATCH, read_strips};
use crate::device::{Arguments, Device, Element, Matrix, Ptr};
use crate::ops::columns::gpu::{cast, dora_factors, squared_row_norms};
use crate::ops::launch::{shape, size, variant};
use crate::ops::storage::gpu::DeviceWeight;

/// LoRA's branch of one frozen matrix: it adds s B A, with A (r, k) and B (n, r), to a linear map W (n, k), and
/// s (B A)^T to a token table (k, n). With magnitudes it is DoRA: W' = m (W + s B A) / ||W + s B A||, where the norms
/// are those of W's rows, or of the table's columns.
///
/// Its numbers never change: a training step makes new branches. It belongs to one weight, because DoRA's norms are
/// taken at the first use and kept.
#[derive(Debug)]
pub struct DeviceLora {
    /// A and B in f32, where something needs them so.
    exact: Option<(Matrix, Matrix)>,
    a_operand: Matrix,
    b_operand: Matrix,
    scale: f32,
    dora: Option<Dora>,
    scratch: usize,
}

#[derive(Debug)]
struct Dora {
    magnitude: Matrix,
    scales: OnceLock<DoraScales>,
}

/// What DoRA needs of the norms, a number for each output.
#[derive(Clone, Debug)]
pub struct DoraScales {
    /// The norms (1, n) f32.
    pub norms: Matrix,
    /// Magnitude over norm (1, n) f32; 0 where the norm is 0.
    pub factors: Matrix,
}

/// The gradients of one branch.
#[derive(Clone, Debug)]
pub struct LoraGradient {
    /// dL/dA (r, k) f32.
    pub a: Matrix,
    /// dL/dB (n, r) f32.
    pub b: Matrix,
    /// dL/dm (1, n) f32, where it is DoRA.
    pub magnitude: Option<Matrix>,
}

impl DeviceLora {
    /// Copies A (`a_shape` = (r, k)), B (n, r) and DoRA's n magnitudes to the device, row by row. `operand` is the
    /// element type T of the products that the branch takes part in, and the factors are kept as T; of DoRA, whose norms
    /// are taken in f32, they are kept as f32, too. `scale` is s: lora_alpha / r, or lora_alpha / sqrt(r).
    ///
    /// # Errors
    /// If lengths do not fit the shapes, a dimension is 0, `operand` is no float, or memory is short.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        device: &Device,
        operand: Element,
        a: &[f32],
        a_shape: (usize, usize),
        b: &[f32],
        n: usize,
        scale: f32,
        magnitude: Option<&[f32]>,
    ) -> Result<Self> {
        let mut lora = Self::new_exact(device, operand, a, a_shape, b, n, scale, magnitude)?;
        lora.exact = lora.exact.filter(|_| lora.dora.is_some());
        Ok(lora)
    }

    /// The same with factors in f32, too.
    ///
    /// # Errors
    /// As for [`DeviceLora::new`].
    #[allow(clippy::too_many_arguments)]
    pub fn new_exact(
        device: &Device,
        operand: Element,
        a: &[f32],
        a_shape: (usize, usize),
        b: &[f32],
        n: usize,
        scale: f32,
        magnitude: Option<&[f32]>,
    ) -> Result<Self> {
        let (r, k) = a_shape;
        ensure!(operand.is_float(), "LoRA: products need operands of f32, bf16 or f16, not {operand}");
        ensure!(r > 0 && k > 0 && n > 0, "LoRA: A ({r}, {k}) and B ({n}, {r}) need dimensions of at least 1");
        let (a, b) = (device.upload_f32(a, r, k).context("LoRA's A")?, device.upload_f32(b, n, r).context("LoRA's B")?);
        let magnitude = magnitude.map(|m| device.upload_f32(m, 1, n).context("DoRA's magnitudes")).transpose()?;
        let (a_operand, b_operand) = (cast(&a, operand)?, cast(&b, operand)?);
        let dora = magnitude.map(|magnitude| Dora { magnitude, scales: OnceLock::new() });
        Ok(Self { exact: Some((a, b)), a_operand, b_operand, scale, dora, scratch: SCRATCH })
    }

    /// The same branch whose DoRA norms are taken over strips of at most so many bytes of dequantised rows.
    #[must_use]
    pub fn with_scratch(self, bytes: usize) -> Self {
        Self { scratch: bytes, ..self }
    }

    /// A (r, k) and B (n, r) in f32.
    ///
    /// # Errors
    /// If they were not kept.
    pub fn exact(&self) -> Result<(&Matrix, &Matrix)> {
        self.exact.as_ref().map(|(a, b)| (a, b)).context("LoRA: the factors were kept in the operands' type alone")
    }

    /// A rounded to the operands' type.
    pub fn a_operand(&self) -> &Matrix {
        &self.a_operand
    }

    /// B rounded to the operands' type.
    pub fn b_operand(&self) -> &Matrix {
        &self.b_operand
    }

    /// s.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// DoRA's magnitudes (1, n) f32.
    pub fn magnitude(&self) -> Option<&Matrix> {
        self.dora.as_ref().map(|dora| &dora.magnitude)
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.a_operand.rows()
    }

    /// k.
    pub fn inputs(&self) -> usize {
        self.a_operand.cols()
    }

    /// n.
    pub fn outputs(&self) -> usize {
        self.b_operand.rows()
    }

    /// The element type of the products.
    pub fn operand(&self) -> Element {
        self.a_operand.element()
    }

    /// The device that it lies on.
    pub fn device(&self) -> &Device {
        self.a_operand.device()
    }

    /// The most bytes of dequantised rows while norms are taken.
    pub(crate) fn scratch(&self) -> usize {
        self.scratch
    }

    /// DoRA's norms and factors for the linear map with this weight (n, k): those of the rows of W + s B A. `None` if
    /// it is not DoRA.
    ///
    /// # Errors
    /// If the factors do not fit the weight or memory is short.
    pub fn row_scales(&self, weight: &DeviceWeight) -> Result<Option<&DoraScales>> {
        self.scales(|| {
            let (n, k) = (weight.rows(), weight.cols());
            let fits = (self.outputs(), self.inputs()) == (n, k);
            ensure!(fits, "DoRA: B A is ({}, {}), where ({n}, {k}) is needed", self.outputs(), self.inputs());
            let squares = self.device().matrix(Element::F32, n, 1)?;
            let (a, b) = self.exact()?;
            // Numbers of the operands' type are used as they lie; all others become exact f32.
            let element = weight.dense(self.operand()).map_or(Element::F32, |dense| dense.element());
            read_strips(weight, None, element, self.scratch, |rows, w| {
                let (b, squares) = (b.row_range(rows.clone())?, squares.row_range(rows)?);
                squared_row_norms(w, a, &b, self.scale, &squares)
            })?;
            Ok(squares)
        })
    }

    /// What is kept, or the scales from the n squared norms that `squares` computes.
    pub(crate) fn scales(&self, squares: impl FnOnce() -> Result<Matrix>) -> Result<Option<&DoraScales>> {
        let Some(dora) = &self.dora else { return Ok(None) };
        if let Some(scales) = dora.scales.get() {
            return Ok(Some(scales));
        }
        let (norms, factors) = dora_factors(&squares()?, &dora.magnitude)?;
        // Of two threads that come here at once, both have computed the same numbers.
        Ok(Some(dora.scales.get_or_init(|| DoraScales { norms, factors })))
    }
}

/// The most parts of one launch of [`low_rank_outputs`].
pub const MAX_PARTS: usize = 3;
/// Rows and columns of y that a block takes.
const TILE: (usize, usize) = (32, 256);

/// One low-rank part of a result: `rank` columns of z from `column` on, times F.
#[derive(Clone, Copy, Debug)]
pub struct LowRankPart<'a> {
    /// Its first column of z.
    pub column: usize,
    /// F: B (n, rank), or A (rank, n).
    pub factor: &'a Matrix,
    /// Its rank.
    pub rank: usize,
}

/// Which of LoRA's factors are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactorLayout {
    /// B (n, rank): y = z B^T.
    ByColumn,
    /// A (rank, n): y = z A.
    ByRank,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Part {
    z: Ptr,
    factor: Ptr,
    rank: u32,
    unused: u32,
}

#[repr(C)]
struct LowRankOutputs {
    parts: [Part; MAX_PARTS],
    residual: Ptr,
    bias: Ptr,
    y: Ptr,
    count: u32,
    rows: u32,
    cols: u32,
    z_stride: u32,
    by_rank: u32,
    unused: u32,
}
// SAFETY: the fields are those of `LowRankOutputs` in gpu_low_rank.cu.
unsafe impl Arguments for LowRankOutputs {
    const NAME: &'static str = "low_rank_outputs";
    const BLOCK: u32 = 128;
}

/// y (m, n) = residual + bias + the sum over the parts of Z F, with sums in f32. z (m, ranks) and the factors have one type of bf16
/// and f16, y has that type or f32, the residual (m, n) and the bias (n) are f32. Products with frozen weights are added to it.
///
/// # Errors
/// If there are more parts than [`MAX_PARTS`], shapes or types do not fit, or operands lie on two devices.
pub fn low_rank_outputs(
    operand: Element,
    (z, parts): (Option<&Matrix>, &[LowRankPart<'_>]),
    layout: FactorLayout,
    (residual, bias): (Option<&Matrix>, Option<&Matrix>),
    y: &Matrix,
) -> Result<()> {
    let (m, n, device, to) = (y.rows(), y.cols(), y.device(), y.element());
    ensure!(operand.is_float() && operand != Element::F32, "low-rank outputs: factors of {operand}; use bf16 or f16");
    ensure!(parts.len() <= MAX_PARTS, "low-rank outputs: {} parts; {MAX_PARTS} are possible", parts.len());
    let others = [z, residual, bias].into_iter().flatten().chain(parts.iter().map(|part| part.factor));
    for other in others {
        ensure!(other.device().ptr_eq(device), "low-rank outputs: its operands lie on two devices");
    }
    let mut fields = [Part { z: Ptr::NULL, factor: Ptr::NULL, rank: 0, unused: 0 }; MAX_PARTS];
    for (field, part) in fields.iter_mut().zip(parts) {
        let (z, rank) = (z.context("low-rank outputs: parts without z")?, part.rank);
        let fits = z.rows() == m && part.column + rank <= z.cols();
        ensure!(
            fits,
            "low-rank outputs: z is ({}, {}), where ({m}, {}) is needed",
            z.rows(),
            z.cols(),
            part.column + rank
        );
        let (rows, cols) = if layout == FactorLayout::ByColumn { (n, rank) } else { (rank, n) };
        shape("low-rank outputs: a factor", part.factor, rows, cols)?;
        *field = Part {
            z: z.input("z", operand, z.len())?.offset(part.column, operand),
            factor: part.factor.input("a factor", operand, n * rank)?,
            rank: size("rank", rank)?,
            unused: 0,
        };
    }
    let optional = |what: &'static str, matrix: Option<&Matrix>, len: usize| match matrix {
        Some(matrix) => {
            ensure!(
                matrix.len() == len,
                "low-rank outputs: {what} has {} numbers, where {len} are needed",
                matrix.len()
            );
            matrix.input(what, Element::F32, len)
        }
        None => Ok(Ptr::NULL),
    };
    let arguments = LowRankOutputs {
        parts: fields,
        residual: optional("the residual", residual, m * n)?,
        bias: optional("the bias", bias, n)?,
        y: y.output("y", to, m * n)?,
        count: parts.len() as u32,
        rows: size("rows", m)?,
        cols: size("columns", n)?,
        z_stride: size("ranks", z.map_or(0, Matrix::cols))?,
        by_rank: u32::from(layout == FactorLayout::ByRank),
        unused: 0,
    };
    let grid = [size("columns", n.div_ceil(TILE.1))?, size("rows", m.div_ceil(TILE.0))?, 1];
    device.launch(variant("low-rank outputs", &[operand, to])?, grid, arguments)
}
