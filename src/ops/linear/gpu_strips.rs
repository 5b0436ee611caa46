//! A stored weight as the operand of matrix products: its own numbers where they have the right type, and otherwise
//! strips of dequantised rows in a scratch matrix of bounded size. It does not depend on layers.
//! Read `gpu.rs` beside it next.

use std::ops::Range;

use anyhow::{Result, ensure};

use crate::device::{Element, Matrix};
use crate::ops::storage::gpu::DeviceWeight;

/// The most bytes that a scratch matrix of dequantised rows takes.
pub const SCRATCH: usize = 256 << 20;

/// Whole strips have a multiple of so many rows, because products prefer columns that begin at aligned addresses.
const ALIGNED_ROWS: usize = 128;

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// The element type T of both operands: f32, bf16 or f16.
    pub operand: Element,
    /// The most bytes of a scratch matrix. One row of a weight is taken even where it is longer.
    pub scratch: usize,
}

impl Compute {
    /// Products of this type with the usual limit of the scratch matrix.
    pub fn new(operand: Element) -> Self {
        Self { operand, scratch: SCRATCH }
    }
}

/// Calls `each` for consecutive strips that together are all rows of `weight`, with the rows' range and their numbers
/// (rows, cols) as `element`. A weight that is stored with this element type is one strip and is read in place, so
/// `each` only reads. `scratch` bounds the bytes of the scratch matrix.
///
/// # Errors
/// If `element` is no float, memory is short, or `each` fails.
pub(crate) fn read_strips(
    weight: &DeviceWeight,
    element: Element,
    scratch: usize,
    mut each: impl FnMut(Range<usize>, &Matrix) -> Result<()>,
) -> Result<()> {
    match weight.dense(element) {
        Some(dense) => each(0..weight.rows(), &dense),
        None => dequantised_strips(weight, element, scratch, each),
    }
}

/// The same with a scratch matrix in every case, so that `each` may write over the numbers.
///
/// # Errors
/// As for [`read_strips`].
pub(crate) fn dequantised_strips(
    weight: &DeviceWeight,
    element: Element,
    scratch: usize,
    mut each: impl FnMut(Range<usize>, &Matrix) -> Result<()>,
) -> Result<()> {
    ensure!(element.is_float(), "weights become f32, bf16 or f16 for products, not {element}");
    let (rows, cols) = (weight.rows(), weight.cols());
    let at_once = match scratch / (cols * element.bytes()) {
        all if all >= rows => rows,
        many if many >= ALIGNED_ROWS => many / ALIGNED_ROWS * ALIGNED_ROWS,
        few => few.max(1),
    };
    let scratch = weight.device().matrix(element, at_once, cols)?;
    for start in (0..rows).step_by(at_once) {
        let strip = start..rows.min(start + at_once);
        let numbers = scratch.row_range(0..strip.len())?;
        weight.dequantise(strip.clone(), &numbers)?;
        each(strip, &numbers)?;
    }
    Ok(())
}
