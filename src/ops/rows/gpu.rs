//! Rows of a matrix picked by number on a device, the transpose of that, and the value head. Kernels are in gpu.cu.
//! Sums have one order, so that results are the same bits every time. It does not depend on models.
//! Read `columns/gpu.rs` for sums over rows.

use anyhow::{Result, ensure};

use crate::device::{Arguments, Device, Element, Matrix, Ptr};
use crate::ops::columns::gpu::sums;
use crate::ops::launch::{TILE_THREADS, blocks, device, shape, size, tiles, variant};

const THREADS: usize = TILE_THREADS;
/// Rows of a block of the value head, a warp each.
const WARPS: usize = 8;

#[repr(C)]
struct RowsGather {
    x: Ptr,
    index: Ptr,
    y: Ptr,
    cols: u32,
    tiles: u32,
}
// SAFETY: the fields are those of `RowsGather` in gpu.cu.
unsafe impl Arguments for RowsGather {
    const NAME: &'static str = "rows_gather";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct RowsScatter {
    x: Ptr,
    targets: Ptr,
    starts: Ptr,
    order: Ptr,
    y: Ptr,
    cols: u32,
    tiles: u32,
}
// SAFETY: the fields are those of `RowsScatter` in gpu.cu.
unsafe impl Arguments for RowsScatter {
    const NAME: &'static str = "rows_scatter";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct RowsValue {
    h: Ptr,
    weight: Ptr,
    bias: Ptr,
    values: Ptr,
    rows: u64,
    cols: u32,
}
// SAFETY: the fields are those of `RowsValue` in gpu.cu.
unsafe impl Arguments for RowsValue {
    const NAME: &'static str = "rows_value";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct RowsValueBackward {
    dvalues: Ptr,
    weight: Ptr,
    dh: Ptr,
    cols: u32,
    tiles: u32,
}
// SAFETY: the fields are those of `RowsValueBackward` in gpu.cu.
unsafe impl Arguments for RowsValueBackward {
    const NAME: &'static str = "rows_value_backward";
    const BLOCK: u32 = THREADS as u32;
}

/// Which rows of a matrix with `n` rows are picked, on the device. A row may be picked more than once.
#[derive(Clone, Debug)]
pub struct DeviceIndex {
    n: usize,
    /// (R, 1) u32: the rows.
    rows: Matrix,
    /// Each row that is picked at all, (U, 1); where its places begin in `order`, (U + 1, 1); the places, (R, 1).
    targets: Matrix,
    starts: Matrix,
    order: Matrix,
}

impl DeviceIndex {
    /// Copies the picked rows, and for [`scatter`] the places of each row, to the device: once for all layers.
    ///
    /// # Errors
    /// If a row does not exist.
    pub fn new(device: &Device, rows: &[usize], n: usize) -> Result<Self> {
        if let Some(row) = rows.iter().find(|&&row| row >= n) {
            anyhow::bail!("row {row} of {n}");
        }
        size("rows", n)?;
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&i| rows[i]); // Stable: a row's places stay in order.
        let (mut targets, mut starts) = (vec![], vec![]);
        for (k, &i) in order.iter().enumerate() {
            if k == 0 || rows[order[k - 1]] != rows[i] {
                targets.push(rows[i] as u32);
                starts.push(size("rows", k)?);
            }
        }
        starts.push(size("rows", rows.len())?);
        let (r, u) = (rows.len(), targets.len());
        let mut all: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        all.extend(order.iter().map(|&i| i as u32));
        all.extend(targets.into_iter().chain(starts));
        let all = device.upload_u32(&all)?.reshape(2 * r + 2 * u + 1, 1)?;
        Ok(Self {
            n,
            rows: all.row_range(0..r)?,
            order: all.row_range(r..2 * r)?,
            targets: all.row_range(2 * r..2 * r + u)?,
            starts: all.row_range(2 * r + u..2 * r + 2 * u + 1)?,
        })
    }

    /// How many rows are picked, R.
    pub fn len(&self) -> usize {
        self.rows.rows()
    }

    /// Is no row picked?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The picked rows (R, D) of x (n, D), rounded to `to`.
///
/// # Errors
/// If shapes do not fit.
pub fn gather(x: &Matrix, index: &DeviceIndex, to: Element) -> Result<Matrix> {
    let device = device("gather", x, &[&index.rows])?;
    shape("gather: x", x, index.n, x.cols())?;
    let y = device.matrix(to, index.len(), x.cols())?;
    let (grid, tiles) = tiles(y.rows(), y.cols())?;
    let arguments = RowsGather {
        x: x.input("gather x", x.element(), x.len())?,
        index: index.rows.input("gather rows", Element::U32, index.len())?,
        y: y.output("gather y", to, y.len())?,
        cols: size("columns", x.cols())?,
        tiles,
    };
    device.launch(variant("gather", &[x.element(), to])?, grid, arguments)?;
    Ok(y)
}

/// The transpose of [`gather`]: (n, D) of type `to` with the rows of `values` (R, D) added at the picked rows, zeros
/// elsewhere.
///
/// # Errors
/// If shapes do not fit.
pub fn scatter(values: &Matrix, index: &DeviceIndex, to: Element) -> Result<Matrix> {
    let y = values.device().zeros(to, index.n, values.cols())?;
    scatter_add(values, index, &y)?;
    Ok(y)
}

/// Adds the rows of `values` (R, D) to the picked rows of y (n, D), in their order where a row is picked more than
/// once.
///
/// # Errors
/// If shapes do not fit.
pub fn scatter_add(values: &Matrix, index: &DeviceIndex, y: &Matrix) -> Result<()> {
    let device = device("scatter", values, &[&index.rows, y])?;
    let cols = values.cols();
    shape("scatter: values", values, index.len(), cols)?;
    shape("scatter: y", y, index.n, cols)?;
    let targets = index.targets.rows();
    let (grid, tiles) = tiles(targets, cols)?;
    let arguments = RowsScatter {
        x: values.input("scatter values", values.element(), values.len())?,
        targets: index.targets.input("scatter targets", Element::U32, targets)?,
        starts: index.starts.input("scatter starts", Element::U32, targets + 1)?,
        order: index.order.input("scatter order", Element::U32, index.len())?,
        y: y.output("scatter y", y.element(), y.len())?,
        cols: size("columns", cols)?,
        tiles,
    };
    device.launch(variant("scatter", &[values.element(), y.element()])?, grid, arguments)
}

/// values (R, 1) f32: w . h_i + b of hidden states h (R, D), w D f32 numbers and b one.
///
/// # Errors
/// If shapes do not fit.
pub fn value(h: &Matrix, weight: &Matrix, bias: &Matrix) -> Result<Matrix> {
    let device = device("value head", h, &[weight, bias])?;
    let (rows, cols) = (h.rows(), h.cols());
    ensure!(weight.len() == cols && bias.len() == 1, "value head: {} weights for rows of {cols}", weight.len());
    let values = device.matrix(Element::F32, rows, 1)?;
    let arguments = RowsValue {
        h: h.input("value h", h.element(), h.len())?,
        weight: weight.input("value weight", Element::F32, cols)?,
        bias: bias.input("value bias", Element::F32, 1)?,
        values: values.output("values", Element::F32, rows)?,
        rows: rows as u64,
        cols: size("columns", cols)?,
    };
    device.launch(variant("value head", &[h.element()])?, blocks(rows, WARPS)?, arguments)?;
    Ok(values)
}

/// Gradients of the value head.
#[derive(Clone, Debug)]
pub struct ValueGradient {
    /// dL/dh (R, D).
    pub hidden: Matrix,
    /// dL/dw (1, D) f32.
    pub weight: Matrix,
    /// dL/db (1, 1) f32.
    pub bias: Matrix,
}

/// The gradients of dL/dvalue (R, 1) f32; dL/dh has type `to`.
///
/// # Errors
/// If shapes do not fit.
pub fn value_backward(h: &Matrix, weight: &Matrix, dvalues: &Matrix, to: Element) -> Result<ValueGradient> {
    let device = device("value head backward", h, &[weight, dvalues])?;
    let (rows, cols) = (h.rows(), h.cols());
    ensure!(weight.len() == cols, "value head backward: {} weights for rows of {cols}", weight.len());
    shape("value head backward: the gradient", dvalues, rows, 1)?;
    let hidden = device.matrix(to, rows, cols)?;
    let (grid, tiles) = tiles(rows, cols)?;
    let arguments = RowsValueBackward {
        dvalues: dvalues.input("dvalues", Element::F32, rows)?,
        weight: weight.input("value weight", Element::F32, cols)?,
        dh: hidden.output("value dh", to, h.len())?,
        cols: size("columns", cols)?,
        tiles,
    };
    device.launch(variant("value head backward", &[to])?, grid, arguments)?;
    Ok(ValueGradient { hidden, weight: sums(h, None, Some(dvalues))?, bias: sums(dvalues, None, None)? })
}
