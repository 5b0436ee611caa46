//! A stored weight as the operand of matrix products: its own numbers where they have the right type, and otherwise
//! strips of dequantised rows in a scratch matrix of bounded size. Where a pass has memory for more, the next weight is
//! dequantised while a product runs, and numbers are kept for later products. It does not depend on layers.
//! Read `gpu.rs` beside it next.

use std::ops::Range;
use std::sync::Mutex;

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::{Beside, Element, Matrix, lock};
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

/// How passes over many rows dequantise a block's weights on a device. The numbers are the same bits; memory and time differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Dequantising {
    /// As much of the below as the planned run has room for; `InTurn` until a plan has chosen.
    #[default]
    Auto,
    /// One at a time, before its product.
    InTurn,
    /// The next one while a product runs: two at a time.
    Ahead,
    /// As `Ahead`, and a backward that recomputes activations keeps what the recomputation dequantised: most of a block at a time.
    Kept,
}

impl Dequantising {
    /// The value of the `dequantise` key.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::InTurn => "in_turn",
            Self::Ahead => "ahead",
            Self::Kept => "kept",
        }
    }

    /// Whether the next weight is dequantised while a product runs.
    pub const fn is_ahead(self) -> bool {
        matches!(self, Self::Ahead | Self::Kept)
    }
}

/// The numbers of one weight, dequantised for products that read it. They take the memory of the whole matrix.
#[derive(Debug, Default)]
pub struct Numbers(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    #[default]
    Absent,
    /// They are written beside the order of work.
    Coming(Beside),
    Present(Matrix),
}

impl Numbers {
    /// Begins to dequantise `weight` beside the order of work, unless its numbers are there or products need none.
    fn begin(&self, weight: &DeviceWeight, element: Element) -> Result<()> {
        let mut state = lock(&self.0);
        if matches!(*state, State::Absent) && weight.dense(element).is_none() {
            *state = State::Coming(weight.dequantise_beside(element)?);
        }
        Ok(())
    }

    /// All numbers (rows, cols) of `weight` as `element`, if they were begun, or are there.
    fn of(&self, weight: &DeviceWeight, element: Element) -> Result<Option<Matrix>> {
        let mut state = lock(&self.0);
        let numbers = match std::mem::take(&mut *state) {
            State::Absent => return Ok(None),
            State::Coming(beside) => beside.join()?,
            State::Present(numbers) => numbers,
        };
        let fits = (numbers.rows(), numbers.cols(), numbers.element()) == (weight.rows(), weight.cols(), element);
        ensure!(fits, "numbers were kept of another weight, or as another type than {element}");
        *state = State::Present(numbers.clone());
        Ok(Some(numbers))
    }
}

/// How the products of one weight go about its numbers, and what they begin for the product after them. `W` is a weight.
#[derive(Debug)]
pub struct Dequantised<'a, W> {
    /// Where this weight's numbers are, if an earlier product kept or began them.
    pub numbers: &'a Numbers,
    /// Whether they are kept for later products.
    pub keeps: bool,
    /// The weight that the next product reads, and its numbers: they are dequantised while this product runs.
    pub next: Option<(&'a W, &'a Numbers)>,
}

impl<W> Clone for Dequantised<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Dequantised<'_, W> {}

impl Dequantised<'_, DeviceWeight> {
    fn begin_next(&self, element: Element, scratch: usize) -> Result<()> {
        // What is larger than a scratch matrix may be is dequantised in strips, in its turn.
        let next = self.next.filter(|(weight, _)| weight.rows() * weight.cols() * element.bytes() <= scratch);
        next.map_or(Ok(()), |(weight, numbers)| numbers.begin(weight, element))
    }
}

/// Calls `each` for consecutive strips that together are all rows of `weight`, with the rows' range and their numbers
/// (rows, cols) as `element`. A weight that is stored with this element type is one strip and is read in place, so
/// `each` only reads. `scratch` bounds the bytes of the scratch matrix, which is not needed where the numbers are there.
///
/// # Errors
/// If `element` is no float, memory is short, or `each` fails.
pub(crate) fn read_strips(
    weight: &DeviceWeight,
    dequantised: Option<Dequantised<'_, DeviceWeight>>,
    element: Element,
    scratch: usize,
    mut each: impl FnMut(Range<usize>, &Matrix) -> Result<()>,
) -> Result<()> {
    let dense = weight.dense(element);
    let Some(it) = dequantised else {
        return match dense {
            Some(dense) => each(0..weight.rows(), &dense),
            None => dequantised_strips(weight, element, scratch, each),
        };
    };
    let mut numbers = if dense.is_some() { None } else { it.numbers.of(weight, element)? };
    if it.keeps && dense.is_none() && numbers.is_none() {
        let all = weight.device().matrix(element, weight.rows(), weight.cols())?;
        weight.dequantise(0..weight.rows(), &all)?;
        *lock(&it.numbers.0) = State::Present(all.clone());
        numbers = Some(all);
    }
    // After this one's numbers, which the product below waits for, and before that product.
    it.begin_next(element, scratch)?;
    match (dense, numbers) {
        (Some(dense), _) => each(0..weight.rows(), &dense)?,
        (None, None) => dequantised_strips(weight, element, scratch, each)?,
        // The same strips: a product over other columns at once may round otherwise.
        (None, Some(numbers)) => {
            strips(weight, element, scratch).try_for_each(|rows| each(rows.clone(), &numbers.row_range(rows)?))?
        }
    }
    if !it.keeps {
        *lock(&it.numbers.0) = State::Absent;
    }
    Ok(())
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
