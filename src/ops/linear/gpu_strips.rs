//! A stored weight as the operand of matrix products: its own numbers where they have the right type, and otherwise
//! strips of dequantised rows in a scratch matrix of bounded size. It does not depend on layers.
//! Read `gpu.rs` beside it next.

use std::ops::Range;
use std::sync::OnceLock;

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

/// The numbers of a weight, kept from the first product on that dequantises them: for others that read the same weight soon
/// after. They take the memory of the whole matrix until the value is dropped.
#[derive(Debug, Default)]
pub struct Kept(OnceLock<Matrix>);

impl Kept {
    /// All numbers (rows, cols) of `weight` as `element`.
    fn of(&self, weight: &DeviceWeight, element: Element) -> Result<&Matrix> {
        let kept = match self.0.get() {
            Some(kept) => kept,
            None => {
                let numbers = weight.device().matrix(element, weight.rows(), weight.cols())?;
                weight.dequantise(0..weight.rows(), &numbers)?;
                self.0.get_or_init(|| numbers)
            }
        };
        let fits = (kept.rows(), kept.cols(), kept.element()) == (weight.rows(), weight.cols(), element);
        ensure!(fits, "numbers were kept of another weight, or as another type than {element}");
        Ok(kept)
    }
}

/// Calls `each` for consecutive strips that together are all rows of `weight`, with the rows' range and their numbers
/// (rows, cols) as `element`. A weight that is stored with this element type is one strip and is read in place, so
/// `each` only reads. `scratch` bounds the bytes of the scratch matrix, which is not needed where the numbers are `kept`.
///
/// # Errors
/// If `element` is no float, memory is short, or `each` fails.
pub(crate) fn read_strips(
    weight: &DeviceWeight,
    kept: Option<&Kept>,
    element: Element,
    scratch: usize,
    mut each: impl FnMut(Range<usize>, &Matrix) -> Result<()>,
) -> Result<()> {
    match (weight.dense(element), kept) {
        (Some(dense), _) => each(0..weight.rows(), &dense),
        (None, None) => dequantised_strips(weight, element, scratch, each),
        (None, Some(kept)) => {
            let numbers = kept.of(weight, element)?;
            // The same strips: a product over other columns at once may round otherwise.
            strips(weight, element, scratch).try_for_each(|rows| each(rows.clone(), &numbers.row_range(rows)?))
        }
    }
}

/// The rows of a weight that a scratch matrix has room for at a time.
fn rows_at_once(weight: &DeviceWeight, element: Element, scratch: usize) -> usize {
    match scratch / (weight.cols() * element.bytes()) {
        all if all >= weight.rows() => weight.rows(),
        many if many >= ALIGNED_ROWS => many / ALIGNED_ROWS * ALIGNED_ROWS,
        few => few.max(1),
    }
}

fn strips(weight: &DeviceWeight, element: Element, scratch: usize) -> impl Iterator<Item = Range<usize>> {
    let (rows, at_once) = (weight.rows(), rows_at_once(weight, element, scratch));
    (0..rows).step_by(at_once).map(move |start| start..rows.min(start + at_once))
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
    let scratch_rows = rows_at_once(weight, element, scratch);
    let numbers = weight.device().matrix(element, scratch_rows, weight.cols())?;
    for strip in strips(weight, element, scratch) {
        let numbers = numbers.row_range(0..strip.len())?;
        weight.dequantise(strip.clone(), &numbers)?;
        each(strip, &numbers)?;
    }
    Ok(())
}
