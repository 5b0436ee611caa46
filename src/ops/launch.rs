//! What every operation's launches check and count in the same way. It does not depend on operations. Read
//! `norm/gpu.rs` for a first use.

use anyhow::{Context, Result, ensure};

use crate::device::{Device, Element, Matrix, Variant};

/// A one-dimensional grid for `items`, `each` of which a block takes.
///
/// # Errors
/// If there are more blocks than a grid holds.
pub(crate) fn blocks(items: usize, each: usize) -> Result<[u32; 3]> {
    let count = items.div_ceil(each);
    ensure!(count < 1 << 31, "{items} numbers are more than one launch can take");
    Ok([count as u32, 1, 1])
}

/// Threads of a block that takes a tile of a row, four columns a thread.
pub(crate) const TILE_THREADS: usize = 256;

/// A grid for a matrix whose rows are cut into tiles, a block each, and the number of tiles of a row.
///
/// # Errors
/// As for [`blocks`].
pub(crate) fn tiles(rows: usize, cols: usize) -> Result<([u32; 3], u32)> {
    let tiles = cols.div_ceil(4 * TILE_THREADS).max(1);
    Ok((blocks(rows * tiles, 1)?, size("columns", tiles)?))
}

/// A size as kernels take it.
///
/// # Errors
/// If it does not fit.
pub(crate) fn size(what: &str, n: usize) -> Result<u32> {
    u32::try_from(n).ok().with_context(|| format!("{what}: {n} does not fit 32 bits"))
}

/// The one device of all these matrices.
///
/// # Errors
/// If they lie on several.
pub(crate) fn device(what: &str, first: &Matrix, others: &[&Matrix]) -> Result<Device> {
    let device = first.device();
    for other in others {
        let (here, there) = (device.name(), other.device().name());
        ensure!(other.device().ptr_eq(device), "{what}: its operands lie on {here} and on {there}");
    }
    Ok(device.clone())
}

/// The kernel for these types, of which there is one narrow type (bf16 or f16) beside f32 at the most.
///
/// # Errors
/// If a type is not a float or both narrow types meet.
pub(crate) fn variant(what: &str, elements: &[Element]) -> Result<Variant> {
    let mut narrow = None;
    for &element in elements {
        match element {
            Element::F32 => {}
            Element::Bf16 | Element::F16 => {
                let other = *narrow.get_or_insert(element);
                ensure!(other == element, "{what}: {other} and {element} do not meet; use one of them beside f32");
            }
            Element::U8 | Element::U32 => anyhow::bail!("{what}: it needs f32, bf16 or f16, not {element}"),
        }
    }
    Ok(Variant::of(elements))
}

/// Whether a matrix has this shape.
///
/// # Errors
/// If not.
pub(crate) fn shape(what: &str, matrix: &Matrix, rows: usize, cols: usize) -> Result<()> {
    let (r, c) = (matrix.rows(), matrix.cols());
    ensure!((r, c) == (rows, cols), "{what} is ({r}, {c}), where ({rows}, {cols}) is needed");
    Ok(())
}
