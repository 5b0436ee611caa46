//! Cuts, sums and scales of matrices on a device: fused projections, the residual path, biases, casts, and what DoRA
//! needs of columns. Kernels are in gpu.cu. It does not depend on layers. Read `activation/gpu.rs` next.

use anyhow::{Result, ensure};

use super::Fusion;
use crate::device::{Arguments, Device, Element, Matrix, Ptr, Variant};
use crate::ops::launch::{TILE_THREADS, blocks, device, shape, size, tiles, variant};

/// Threads of a block, and numbers of a block whose threads take four each.
const THREADS: usize = TILE_THREADS;
const EACH: usize = 4 * THREADS;
/// Rows that one thread sums, and columns of a block. Longer sums go in several launches.
const CHUNK: usize = 128;
/// Rows of a block that takes squares.
const SQUARE_ROWS: usize = 8;

#[repr(C)]
struct ColumnsPart {
    from: Ptr,
    to: Ptr,
    fused: u32,
    width: u32,
    run: u32,
    all: u32,
    before: u32,
    join: u32,
    tiles: u32,
}
// SAFETY: the fields are those of `ColumnsPart` in gpu.cu.
unsafe impl Arguments for ColumnsPart {
    const NAME: &'static str = "columns_part";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct ColumnsAdd {
    x: Ptr,
    y: Ptr,
    out: Ptr,
    count: u64,
    factor: f32,
}
// SAFETY: the fields are those of `ColumnsAdd` in gpu.cu.
unsafe impl Arguments for ColumnsAdd {
    const NAME: &'static str = "columns_add";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct ColumnsScale {
    x: Ptr,
    y: Ptr,
    count: u64,
    factor: f32,
}
// SAFETY: the fields are those of `ColumnsScale` in gpu.cu.
unsafe impl Arguments for ColumnsScale {
    const NAME: &'static str = "columns_scale";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct ColumnsAffine {
    x: Ptr,
    factor: Ptr,
    bias: Ptr,
    y: Ptr,
    cols: u32,
    tiles: u32,
}
// SAFETY: the fields are those of `ColumnsAffine` in gpu.cu.
unsafe impl Arguments for ColumnsAffine {
    const NAME: &'static str = "columns_affine";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct ColumnsSum {
    x: Ptr,
    u: Ptr,
    weight: Ptr,
    out: Ptr,
    rows: u64,
    cols: u32,
    add: u32,
}
// SAFETY: the fields are those of `ColumnsSum` in gpu.cu.
unsafe impl Arguments for ColumnsSum {
    const NAME: &'static str = "columns_sum";
    const BLOCK: u32 = CHUNK as u32;
}

#[repr(C)]
struct ColumnsSquares {
    w: Ptr,
    factor_a: Ptr,
    factor_b: Ptr,
    squares: Ptr,
    rows: u32,
    cols: u32,
    rank: u32,
    scale: f32,
}
// SAFETY: the fields are those of `ColumnsSquares` in gpu.cu.
unsafe impl Arguments for ColumnsSquares {
    const NAME: &'static str = "columns_squares";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct ColumnsDora {
    squares: Ptr,
    magnitudes: Ptr,
    norms: Ptr,
    factors: Ptr,
    count: u32,
}
// SAFETY: the fields are those of `ColumnsDora` in gpu.cu.
unsafe impl Arguments for ColumnsDora {
    const NAME: &'static str = "columns_dora";
    const BLOCK: u32 = THREADS as u32;
}

#[repr(C)]
struct ColumnsRatio {
    sums: Ptr,
    norms: Ptr,
    y: Ptr,
    count: u32,
}
// SAFETY: the fields are those of `ColumnsRatio` in gpu.cu.
unsafe impl Arguments for ColumnsRatio {
    const NAME: &'static str = "columns_ratio";
    const BLOCK: u32 = THREADS as u32;
}

/// The parts (N, `widths[p]`) of x (N, sum of widths).
///
/// # Errors
/// If widths and x do not fit.
pub fn split(x: &Matrix, widths: &[usize], fusion: Fusion) -> Result<Vec<Matrix>> {
    let device = x.device();
    let parts = widths.iter().map(|&w| device.matrix(x.element(), x.rows(), w)).collect::<Result<Vec<_>>>()?;
    copy_parts(device, x, &parts.iter().collect::<Vec<_>>(), fusion, false)?;
    Ok(parts)
}

/// The inverse of [`split`]: (N, sum of widths) of the parts (N, width), one at least.
///
/// # Errors
/// If the parts do not fit.
pub fn join(parts: &[&Matrix], fusion: Fusion) -> Result<Matrix> {
    let Some((first, rest)) = parts.split_first() else { anyhow::bail!("a join of no parts") };
    let device = device("join", first, rest)?;
    let whole = device.matrix(first.element(), first.rows(), parts.iter().map(|p| p.cols()).sum())?;
    copy_parts(&device, &whole, parts, fusion, true)?;
    Ok(whole)
}

fn copy_parts(device: &Device, whole: &Matrix, parts: &[&Matrix], fusion: Fusion, join: bool) -> Result<()> {
    let (n, fused) = (whole.rows(), whole.cols());
    let groups = match fusion {
        Fusion::EndToEnd => 1,
        Fusion::Grouped { groups } => groups,
    };
    let widths = parts.iter().map(|p| p.cols()).collect::<Vec<_>>();
    let fits = groups > 0 && widths.iter().all(|w| w % groups == 0) && widths.iter().sum::<usize>() == fused;
    ensure!(fits, "a row of {fused} cannot be cut into {widths:?} {fusion:?}");
    let mut before = 0;
    for part in parts {
        shape("a part of a fused projection", part, n, part.cols())?;
        let (from, to) = if join { (*part, whole) } else { (whole, *part) };
        let (grid, tiles) = tiles(n, part.cols())?;
        let arguments = ColumnsPart {
            from: from.input("fused projection", whole.element(), from.len())?,
            to: to.output("fused projection", whole.element(), to.len())?,
            fused: size("columns", fused)?,
            width: size("columns", part.cols())?,
            run: size("columns", part.cols() / groups)?,
            all: size("columns", fused / groups)?,
            before: size("columns", before)?,
            join: u32::from(join),
            tiles,
        };
        let kernel = variant("fused projection", &[whole.element()])?;
        device.launch(kernel, grid, arguments)?;
        before += part.cols() / groups;
    }
    Ok(())
}

/// x + factor * y (N, D), rounded to `to`. x, y and the sum are f32 or one narrow type.
///
/// # Errors
/// If shapes or types do not fit.
pub fn add(x: &Matrix, y: &Matrix, factor: f32, to: Element) -> Result<Matrix> {
    let out = x.device().matrix(to, x.rows(), x.cols())?;
    add_into(x, y, factor, &out)?;
    Ok(out)
}

/// x += factor * y, both (N, D).
///
/// # Errors
/// As for [`add`].
pub fn add_assign(x: &Matrix, y: &Matrix, factor: f32) -> Result<()> {
    add_into(x, y, factor, x)
}

fn add_into(x: &Matrix, y: &Matrix, factor: f32, out: &Matrix) -> Result<()> {
    shape("add: the second term", y, x.rows(), x.cols())?;
    let device = device("add", x, &[y, out])?;
    let len = x.len();
    let arguments = ColumnsAdd {
        x: x.input("add x", x.element(), len)?,
        y: y.input("add y", y.element(), len)?,
        out: out.output("add sum", out.element(), len)?,
        count: len as u64,
        factor,
    };
    device.launch(variant("add", &[x.element(), y.element(), out.element()])?, blocks(len, EACH)?, arguments)
}

/// factor * x (N, D), rounded to `to`.
///
/// # Errors
/// If x or `to` is no float.
pub fn scale(x: &Matrix, factor: f32, to: Element) -> Result<Matrix> {
    let y = x.device().matrix(to, x.rows(), x.cols())?;
    let arguments = ColumnsScale {
        x: x.input("scale x", x.element(), x.len())?,
        y: y.output("scale y", to, x.len())?,
        count: x.len() as u64,
        factor,
    };
    for element in [x.element(), to] {
        variant("scale", &[element])?;
    }
    x.device().launch(Variant::of(&[x.element(), to]), blocks(x.len(), EACH)?, arguments)?;
    Ok(y)
}

/// x (N, D) rounded to `to`; x itself if it has that type.
///
/// # Errors
/// As for [`scale`].
pub fn cast(x: &Matrix, to: Element) -> Result<Matrix> {
    if x.element() == to { Ok(x.clone()) } else { scale(x, 1.0, to) }
}

/// y\[i, j\] = x\[i, j\] factor\[j\] + bias\[j\] of x (N, D), rounded to `to`. Both vectors are D f32 numbers, and
/// either may be absent: DoRA's scale, a layer's bias, or one after the other.
///
/// # Errors
/// If lengths do not fit.
pub fn affine(x: &Matrix, factor: Option<&Matrix>, bias: Option<&Matrix>, to: Element) -> Result<Matrix> {
    let y = x.device().matrix(to, x.rows(), x.cols())?;
    affine_into(x, factor, bias, &y)?;
    Ok(y)
}

/// The same, written over x.
///
/// # Errors
/// As for [`affine`].
pub fn affine_in_place(x: &Matrix, factor: Option<&Matrix>, bias: Option<&Matrix>) -> Result<()> {
    affine_into(x, factor, bias, x)
}

fn affine_into(x: &Matrix, factor: Option<&Matrix>, bias: Option<&Matrix>, y: &Matrix) -> Result<()> {
    let device = device("column scale", x, &[factor.unwrap_or(x), bias.unwrap_or(x)])?;
    let (grid, tiles) = tiles(x.rows(), x.cols())?;
    let vector = |v: Option<&Matrix>| v.map_or(Ok(Ptr::NULL), |v| f32_vector("column scale", v, x.cols()));
    let arguments = ColumnsAffine {
        x: x.input("column scale x", x.element(), x.len())?,
        factor: vector(factor)?,
        bias: vector(bias)?,
        y: y.output("column scale y", y.element(), x.len())?,
        cols: size("columns", x.cols())?,
        tiles,
    };
    device.launch(variant("column scale", &[x.element(), y.element()])?, grid, arguments)
}

fn f32_vector(what: &'static str, vector: &Matrix, len: usize) -> Result<Ptr> {
    ensure!(vector.len() == len, "{what}: a vector of {} numbers, where {len} are needed", vector.len());
    vector.input(what, Element::F32, len)
}

/// The sums (1, D) f32 over the rows of weight\[i\] x\[i, j\] u\[i, j\], of x and u (N, D) and N f32 weights; u and the
/// weights may be absent. The order of the sum depends on the shape alone.
///
/// # Errors
/// If shapes do not fit.
pub fn sums(x: &Matrix, u: Option<&Matrix>, weights: Option<&Matrix>) -> Result<Matrix> {
    let out = x.device().matrix(Element::F32, 1, x.cols())?;
    sums_into(x, u, weights, &out, false)?;
    Ok(out)
}

/// Adds the [`sums`] to those in `out` (1, D) f32.
///
/// # Errors
/// As for [`sums`].
pub fn add_sums(x: &Matrix, u: Option<&Matrix>, weights: Option<&Matrix>, out: &Matrix) -> Result<()> {
    sums_into(x, u, weights, out, true)
}

fn sums_into(x: &Matrix, u: Option<&Matrix>, weights: Option<&Matrix>, out: &Matrix, add: bool) -> Result<()> {
    let device = device("column sums", x, &[u.unwrap_or(x), weights.unwrap_or(x), out])?;
    let (rows, cols) = (x.rows(), x.cols());
    if let Some(u) = u {
        shape("column sums: the second factor", u, rows, cols)?;
    }
    ensure!(out.len() == cols, "column sums: {} results for {cols} columns", out.len());
    // Without rows there is still one chunk, whose sums are 0.
    let chunks = rows.div_ceil(CHUNK).max(1);
    let partial = if chunks > 1 { Some(device.matrix(Element::F32, chunks, cols)?) } else { None };
    let to = partial.as_ref().unwrap_or(out);
    let arguments = ColumnsSum {
        x: x.input("column sums x", x.element(), x.len())?,
        u: u.map_or(Ok(Ptr::NULL), |u| u.input("column sums u", u.element(), x.len()))?,
        weight: weights.map_or(Ok(Ptr::NULL), |w| f32_vector("column sums weights", w, rows))?,
        out: to.output("column sums", Element::F32, chunks * cols)?,
        rows: rows as u64,
        cols: size("columns", cols)?,
        add: u32::from(add && partial.is_none()),
    };
    let kernel = variant("column sums", &[x.element(), u.unwrap_or(x).element()])?;
    device.launch(kernel, [blocks(cols, CHUNK)?[0], size("columns", chunks)?, 1], arguments)?;
    partial.map_or(Ok(()), |partial| sums_into(&partial, None, None, out, add))
}

/// Squared Euclidean norms of the rows of W + scale B A into `squares`, R f32 numbers: W (R, K) is a block of a
/// dequantised matrix, B (R, r) the same rows of its factor, A (r, K). W and the factors are f32 or one narrow type.
///
/// # Errors
/// If shapes or types do not fit.
pub fn squared_row_norms(w: &Matrix, a: &Matrix, b: &Matrix, scale: f32, squares: &Matrix) -> Result<()> {
    let device = device("row norms", w, &[a, b, squares])?;
    let (rows, cols, rank) = (w.rows(), w.cols(), a.rows());
    shape("row norms: A", a, rank, cols)?;
    shape("row norms: B", b, rows, rank)?;
    ensure!(squares.len() == rows, "row norms: {} results for {rows} rows", squares.len());
    let arguments = ColumnsSquares {
        w: w.input("row norms W", w.element(), w.len())?,
        factor_a: a.input("row norms A", a.element(), a.len())?,
        factor_b: b.input("row norms B", a.element(), b.len())?,
        squares: squares.output("row norms", Element::F32, rows)?,
        rows: size("rows", rows)?,
        cols: size("columns", cols)?,
        rank: size("rank", rank)?,
        scale,
    };
    device.launch(variant("row norms", &[w.element(), a.element()])?, blocks(rows, SQUARE_ROWS)?, arguments)
}

/// DoRA's norms n and factors g = m / n (1, D), of squared norms and magnitudes m, D f32 numbers each. Where n is 0, so
/// is g.
///
/// # Errors
/// If lengths differ.
pub fn dora_factors(squares: &Matrix, magnitudes: &Matrix) -> Result<(Matrix, Matrix)> {
    let device = device("DoRA", squares, &[magnitudes])?;
    let len = squares.len();
    let (norms, factors) = (device.matrix(Element::F32, 1, len)?, device.matrix(Element::F32, 1, len)?);
    let arguments = ColumnsDora {
        squares: f32_vector("DoRA squares", squares, len)?,
        magnitudes: f32_vector("DoRA magnitudes", magnitudes, len)?,
        norms: norms.output("DoRA norms", Element::F32, len)?,
        factors: factors.output("DoRA factors", Element::F32, len)?,
        count: size("DoRA", len)?,
    };
    device.launch(variant("DoRA", &[])?, blocks(len, THREADS)?, arguments)?;
    Ok((norms, factors))
}

/// dL/dm (1, D) f32 of DoRA: the sums over rows of dy u, over the norms n; 0 where a norm is 0. dy and u are (N, D).
///
/// # Errors
/// If shapes do not fit.
pub fn magnitude_gradient(dy: &Matrix, u: &Matrix, norms: &Matrix) -> Result<Matrix> {
    over_norms(&sums(dy, Some(u), None)?, norms)
}

/// sums / norms (1, D), and 0 where a norm is 0: the last step of [`magnitude_gradient`] for sums taken strip by strip.
///
/// # Errors
/// If lengths differ.
pub fn over_norms(sums: &Matrix, norms: &Matrix) -> Result<Matrix> {
    let device = device("DoRA", sums, &[norms])?;
    let len = sums.len();
    let y = device.matrix(Element::F32, 1, len)?;
    let arguments = ColumnsRatio {
        sums: f32_vector("DoRA sums", sums, len)?,
        norms: f32_vector("DoRA norms", norms, len)?,
        y: y.output("DoRA gradient", Element::F32, len)?,
        count: size("DoRA", len)?,
    };
    device.launch(variant("DoRA", &[])?, blocks(len, THREADS)?, arguments)?;
    Ok(y)
}
