//! A group of frozen linear maps with their low-rank branches on a device. Maps that read one input (q, k, v; gate, up)
//! go together. It does not depend on names of layers. Read `gpu_low_rank.rs` beside it for the branches, `gpu_strips.rs` for
//! how weights become operands, and `gpu_gemv.rs` for products of few rows.
//!
//! y_p = x W_p^T + s_p (x A_p^T) B_p^T + bias_p + residual. Saved for the backward: z = s x A^T of all maps. With DoRA,
//! the two products together, u, are saved as well, and y_p = (m / norm) u + bias_p + residual.

use anyhow::{Result, ensure};

use super::gpu_gemv;
pub use super::gpu_low_rank::{DeviceLora, DoraScales, LoraGradient};
use super::gpu_low_rank::{FactorLayout, LowRankPart, MAX_PARTS, low_rank_outputs};
use super::gpu_strips::read_strips;
pub use super::gpu_strips::{Compute, Dequantised, Dequantising, Numbers, SCRATCH};
use crate::device::{Device, Element, Gemm, Matrix, Strided};
use crate::ops::columns::gpu::{add_assign, affine, affine_in_place, cast, magnitude_gradient};
use crate::ops::launch::shape;
use crate::ops::storage::gpu::DeviceWeight;

/// One frozen linear map of a group.
#[derive(Clone, Copy, Debug)]
pub struct Map<'a> {
    /// W (n, k), as stored.
    pub weight: &'a DeviceWeight,
    /// Where W's numbers are found or left, for passes that dequantise ahead or keep what they dequantised.
    pub dequantised: Option<Dequantised<'a, DeviceWeight>>,
    /// The bias (1, n) f32, where there is one. It is frozen: the backward does not see it.
    pub bias: Option<&'a Matrix>,
    /// The low-rank branch, where the adapter has one here.
    pub lora: Option<&'a DeviceLora>,
}

impl<'a> Map<'a> {
    fn rank(&self) -> usize {
        self.lora.map_or(0, DeviceLora::rank)
    }

    /// What DoRA scales the output by.
    fn scales(&self) -> Result<Option<&'a DoraScales>> {
        self.lora.map_or(Ok(None), |lora| lora.row_scales(self.weight))
    }
}

/// What `backward` needs of `forward`, beside x.
#[derive(Clone, Debug)]
pub struct Saved {
    /// (m, sum of ranks) of type T: s x A^T of all maps side by side. `None` if no map has a branch.
    pub z: Option<Matrix>,
    /// For each map with DoRA, its output u (m, n) of type T before the scale, the bias and the residual.
    pub directions: Vec<Option<Matrix>>,
}

/// The gradients of a group.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// dL/dx (m, k) f32; `None` where it was not wanted.
    pub input: Option<Matrix>,
    /// One for each map; `None` where the map has no branch.
    pub lora: Vec<Option<LoraGradient>>,
}

/// y_p (m, n_p) of type `to` for each map of x (m, k).
///
/// x is f32 or T, the operands' type, and is rounded to T first. `to` is T or f32. A residual (m, n) f32 may join the
/// output of a single map, and then `to` is f32. Few rows (`gpu_gemv::supports`) are multiplied straight from the
/// stored bytes. With more rows, each weight is dequantised into a scratch matrix of T, or read in place if T is its
/// stored type.
///
/// # Errors
/// If there are no maps, shapes or types do not fit, operands lie on two devices, or memory is short.
pub fn forward(
    x: &Matrix,
    maps: &[Map<'_>],
    residual: Option<&Matrix>,
    to: Element,
    compute: Compute,
) -> Result<(Vec<Matrix>, Saved)> {
    let operand = compute.operand;
    check(x, maps, operand)?;
    ensure!(
        to == Element::F32 || to == operand,
        "linear: outputs of {to} from products of {operand}; use f32 or both alike"
    );
    if let Some(residual) = residual {
        let (count, element) = (maps.len(), residual.element());
        ensure!(count == 1, "linear: a residual joins the output of one map, and the group has {count}");
        let both = element == Element::F32 && to == Element::F32;
        ensure!(both, "linear: a residual of {element} joins outputs of {to}; both need to be f32");
        operand_of(x, "the residual", residual)?;
        shape("linear: the residual", residual, x.rows(), maps[0].weight.rows())?;
    }
    let x = &cast(x, operand)?;
    let z = low_rank_inputs(x, maps, operand)?;
    let mut saved = Saved { z, directions: Vec::with_capacity(maps.len()) };
    // With DoRA, bias and residual join after the scale.
    let mut parts = vec![];
    for map in maps {
        parts.push(match map.scales()? {
            None => Part { map: *map, residual, to },
            Some(_) => Part { map: Map { bias: None, ..*map }, residual: None, to: operand },
        });
    }
    let (outputs, mut ys) = (outputs(x, &parts, saved.z.as_ref(), compute)?, Vec::with_capacity(maps.len()));
    for (map, y) in maps.iter().zip(outputs) {
        let (y, direction) = match map.scales()? {
            None => (y, None),
            Some(scales) => {
                let u = y;
                let y = affine(&u, Some(&scales.factors), map.bias, to)?;
                if let Some(residual) = residual {
                    add_assign(&y, residual, 1.0)?;
                }
                (y, Some(u))
            }
        };
        ys.push(y);
        saved.directions.push(direction);
    }
    Ok((ys, saved))
}

/// What [`forward`] saves for maps without DoRA, without the outputs.
///
/// # Errors
/// As for [`forward`].
pub fn saved_alone(x: &Matrix, maps: &[Map<'_>], compute: Compute) -> Result<Saved> {
    check(x, maps, compute.operand)?;
    let z = low_rank_inputs(&cast(x, compute.operand)?, maps, compute.operand)?;
    Ok(Saved { z, directions: vec![None; maps.len()] })
}

/// A map of a group, what joins its product, and the element type of the result.
struct Part<'a> {
    map: Map<'a>,
    residual: Option<&'a Matrix>,
    to: Element,
}

/// The gradients of the branches and, if `wants_input`, of x, from dL/dy_p (m, n_p), each f32 or T.
///
/// dx = sum over p of dy_p W_p + dz_p A_p with dz_p = s_p dy_p B_p; dA_p = dz_p^T x; dB_p = dy_p^T z_p. With DoRA, dy_p
/// is first multiplied by m / norm, and dm = (sum over rows of dy_p u_p) / norm: the norms count as constants.
///
/// x, the maps and `compute` are those of `forward`, which gave `saved`. Sums are f32, and gradients are rounded to T
/// only as operands of products.
///
/// # Errors
/// If shapes or types do not fit, operands lie on two devices, or memory is short.
pub fn backward(
    x: &Matrix,
    maps: &[Map<'_>],
    saved: &Saved,
    dys: &[&Matrix],
    wants_input: bool,
    compute: Compute,
) -> Result<Gradients> {
    let operand = compute.operand;
    check(x, maps, operand)?;
    check_gradients(x, maps, saved, dys, operand)?;
    let (device, m, k) = (x.device(), x.rows(), x.cols());
    // Only the branches' gradients need x.
    let x = saved.z.as_ref().map(|_| cast(x, operand)).transpose()?;
    let ranks = maps.iter().map(Map::rank).sum();
    let dz = saved.z.as_ref().map(|_| device.matrix(operand, m, ranks)).transpose()?;
    let (mut lora_gradients, mut scaled, mut offset) = (Vec::with_capacity(maps.len()), vec![], 0);
    for ((map, dy), direction) in maps.iter().zip(dys).zip(&saved.directions) {
        let n = map.weight.rows();
        if map.lora.is_none() && !wants_input {
            lora_gradients.push(None);
            continue;
        }
        let scales = map.scales()?;
        let (dy, magnitude) = match scales.zip(direction.as_ref()) {
            None => (cast(dy, operand)?, None),
            Some((scales, u)) => {
                let magnitude = magnitude_gradient(dy, u, &scales.norms)?;
                (affine(dy, Some(&scales.factors), None, operand)?, Some(magnitude))
            }
        };
        match (map.lora, &saved.z, &dz, &x) {
            (Some(lora), Some(z), Some(dz), Some(x)) => {
                let (r, b, mine) = (lora.rank(), lora.b_operand().whole(), columns_from(dz, offset));
                product((m, r, n), (dy.whole(), false), (b, false), mine, (lora.scale(), 0.0))?;
                let da = sum_over_rows((mine, r, m), x.whole(), k)?;
                let db = sum_over_rows((dy.whole(), n, m), columns_from(z, offset), r)?;
                lora_gradients.push(Some(LoraGradient { a: da, b: db, magnitude }));
                offset += r;
            }
            _ => lora_gradients.push(None),
        }
        if wants_input {
            scaled.push((map, dy));
        }
    }
    let input = if wants_input { Some(input_gradient((m, k), &scaled, dz.as_ref(), device, compute)?) } else { None };
    Ok(Gradients { input, lora: lora_gradients })
}

/// dL/dx (m, k) f32 of each map's dL/dy and of dz, which has the branches side by side.
fn input_gradient(
    (m, k): (usize, usize),
    maps: &[(&Map<'_>, Matrix)],
    dz: Option<&Matrix>,
    device: &Device,
    compute: Compute,
) -> Result<Matrix> {
    let dx = device.matrix(Element::F32, m, k)?;
    let mut parts = vec![];
    for lora in maps.iter().filter_map(|(map, _)| map.lora) {
        let column = parts.last().map_or(0, |last: &LowRankPart<'_>| last.column + last.rank);
        parts.push(LowRankPart { column, factor: lora.a_operand(), rank: lora.rank() });
    }
    // In f32, which tensor cores do not have, the branches are products of their own.
    let by_products = compute.operand == Element::F32 || parts.len() > MAX_PARTS;
    let is_first = !by_products && !parts.is_empty() && m > 0;
    if is_first {
        low_rank_outputs(compute.operand, (dz, &parts), FactorLayout::ByRank, (None, None), &dx)?;
    }
    let mut joins = if is_first { 1.0 } else { 0.0 };
    for (map, dy) in maps {
        read_strips(map.weight, map.dequantised, compute.operand, compute.scratch, |rows, w| {
            let part = columns_from(dy, rows.start);
            product((m, k, rows.len()), (part, false), (w.whole(), false), dx.whole(), (1.0, joins))?;
            joins = 1.0;
            Ok(())
        })?;
    }
    for (part, dz) in parts.iter().filter(|_| by_products).filter_map(|part| Some((part, dz?))) {
        let (dz, a) = (columns_from(dz, part.column), part.factor.whole());
        product((m, k, part.rank), (dz, false), (a, false), dx.whole(), (1.0, 1.0))?;
    }
    Ok(dx)
}

/// left^T right (p, q) f32 of p columns of m rows and of q columns of m rows.
pub(crate) fn sum_over_rows((left, p, m): (Strided<'_>, usize, usize), right: Strided<'_>, q: usize) -> Result<Matrix> {
    let device = left.matrix.device();
    if m == 0 {
        return device.zeros(Element::F32, p, q);
    }
    let sum = device.matrix(Element::F32, p, q)?;
    product((p, q, m), (left, true), (right, false), sum.whole(), (1.0, 0.0))?;
    Ok(sum)
}

/// One product of `Gemm`: its shape (m, n, k), both factors and whether they are read transposed, the result, and
/// (alpha, beta).
pub(crate) fn product(
    (m, n, k): (usize, usize, usize),
    (x, x_transposed): (Strided<'_>, bool),
    (w, w_transposed): (Strided<'_>, bool),
    y: Strided<'_>,
    (alpha, beta): (f32, f32),
) -> Result<()> {
    let device = y.matrix.device();
    device.gemm(Gemm { m, n, k, batch: 1, x, x_transposed, w, w_transposed, y, alpha, beta })
}

/// The columns of a matrix from one on, as an operand.
fn columns_from(matrix: &Matrix, first: usize) -> Strided<'_> {
    Strided { offset: first, ..matrix.whole() }
}

/// z (m, sum of ranks): s x A^T of all maps side by side.
fn low_rank_inputs(x: &Matrix, maps: &[Map<'_>], operand: Element) -> Result<Option<Matrix>> {
    let (m, k, ranks) = (x.rows(), x.cols(), maps.iter().map(Map::rank).sum());
    if ranks == 0 {
        return Ok(None);
    }
    if (1..=gpu_gemv::MAX_TENSOR_ROWS).contains(&m) {
        return gpu_gemv::low_rank_inputs(x, &maps.iter().filter_map(|map| map.lora).collect::<Vec<_>>()).map(Some);
    }
    let z = x.device().matrix(operand, m, ranks)?;
    let mut offset = 0;
    for lora in maps.iter().filter_map(|map| map.lora) {
        let (r, a) = (lora.rank(), lora.a_operand().whole());
        product((m, r, k), (x.whole(), false), (a, true), columns_from(&z, offset), (lora.scale(), 0.0))?;
        offset += r;
    }
    Ok(Some(z))
}

/// x W^T + bias + residual + z B^T (m, n) of each part. x has the operands' type; z has the branches side by side.
fn outputs(x: &Matrix, parts: &[Part<'_>], z: Option<&Matrix>, compute: Compute) -> Result<Vec<Matrix>> {
    let (device, m) = (x.device(), x.rows());
    if gpu_gemv::supports(m, x.element(), parts.iter().map(|part| part.map.weight)) {
        // All results are there before the launch that several of them share.
        let room = |part: &Part<'_>| device.matrix(part.to, m, part.map.weight.rows());
        let ys = parts.iter().map(room).collect::<Result<Vec<_>>>()?;
        let mut column = 0;
        let few = parts.iter().zip(&ys).map(|(Part { map, residual, .. }, y)| {
            let branch = map.lora.zip(z).map(|(lora, z)| (lora, z, column));
            column += map.rank();
            gpu_gemv::FewRows { weight: map.weight, y, bias: map.bias, residual: *residual, branch }
        });
        gpu_gemv::gemv_group(x, &few.collect::<Vec<_>>())?;
        return Ok(ys);
    }
    let mut column = 0;
    let many = |part: &Part<'_>| {
        let branch = part.map.lora.zip(z).map(|(lora, z)| (lora, column, z));
        column += part.map.rank();
        output_of_many_rows(x, part, branch, compute)
    };
    parts.iter().map(many).collect()
}

/// The same of one part, whose weight is dequantised in strips. The product is added to all the rest, which one kernel writes.
fn output_of_many_rows(
    x: &Matrix,
    Part { map, residual, to }: &Part<'_>,
    branch: Option<(&DeviceLora, usize, &Matrix)>,
    compute: Compute,
) -> Result<Matrix> {
    let (m, n, k) = (x.rows(), map.weight.rows(), x.cols());
    let y = x.device().matrix(*to, m, n)?;
    if m == 0 {
        return Ok(y);
    }
    // In f32, which tensor cores do not have, the branch is a product of its own, and the bias comes last.
    let by_products = compute.operand == Element::F32;
    let joins = match (residual, branch, map.bias) {
        (None, None, None) => 0.0,
        (residual, _, _) if by_products => match residual {
            Some(residual) => y.copy_from(residual).map(|()| 1.0)?,
            None => 0.0,
        },
        (residual, branch, bias) => {
            let part =
                branch.map(|(lora, column, _)| LowRankPart { column, factor: lora.b_operand(), rank: lora.rank() });
            let (z, parts) = (branch.map(|(.., z)| z), part.as_slice());
            low_rank_outputs(compute.operand, (z, parts), FactorLayout::ByColumn, (*residual, bias), &y)?;
            1.0
        }
    };
    read_strips(map.weight, map.dequantised, compute.operand, compute.scratch, |rows, w| {
        let part = columns_from(&y, rows.start);
        product((m, rows.len(), k), (x.whole(), false), (w.whole(), true), part, (1.0, joins))
    })?;
    if by_products {
        if let Some((lora, column, z)) = branch {
            let (z, b) = (columns_from(z, column), lora.b_operand().whole());
            product((m, n, lora.rank()), (z, false), (b, true), y.whole(), (1.0, 1.0))?;
        }
        if map.bias.is_some() {
            affine_in_place(&y, None, map.bias)?;
        }
    }
    Ok(y)
}

fn operand_of(x: &Matrix, what: &str, matrix: &Matrix) -> Result<()> {
    ensure!(matrix.device().ptr_eq(x.device()), "linear: x and {what} lie on two devices");
    Ok(())
}

fn float(what: &str, matrix: &Matrix, operand: Element) -> Result<()> {
    let element = matrix.element();
    let fits = element == Element::F32 || element == operand;
    ensure!(fits, "linear: {what} of {element} meets products of {operand}; f32 or {operand} is needed");
    Ok(())
}

fn check(x: &Matrix, maps: &[Map<'_>], operand: Element) -> Result<()> {
    let (device, k) = (x.device(), x.cols());
    ensure!(operand.is_float(), "linear: products need operands of f32, bf16 or f16, not {operand}");
    ensure!(!maps.is_empty(), "linear: a group of no maps");
    float("x", x, operand)?;
    for map in maps {
        let (n, cols) = (map.weight.rows(), map.weight.cols());
        ensure!(cols == k, "linear: an input of width {k} meets a weight of ({n}, {cols})");
        ensure!(map.weight.device().ptr_eq(device), "linear: x and a weight lie on two devices");
        if let Some(bias) = map.bias {
            let (len, element) = (bias.len(), bias.element());
            ensure!(len == n && element == Element::F32, "linear: a bias of {len} {element}; {n} f32 are needed");
            operand_of(x, "a bias", bias)?;
        }
        if let Some(lora) = map.lora {
            let (outputs, inputs, element) = (lora.outputs(), lora.inputs(), lora.operand());
            ensure!((outputs, inputs) == (n, k), "linear: LoRA's B A of ({outputs}, {inputs}) meets ({n}, {k})");
            ensure!(element == operand, "linear: LoRA's operands of {element} meet products of {operand}");
            operand_of(x, "LoRA's factors", lora.a_operand())?;
        }
    }
    Ok(())
}

fn check_gradients(x: &Matrix, maps: &[Map<'_>], saved: &Saved, dys: &[&Matrix], operand: Element) -> Result<()> {
    let (m, count, ranks) = (x.rows(), maps.len(), maps.iter().map(Map::rank).sum::<usize>());
    let (gradients, directions) = (dys.len(), saved.directions.len());
    ensure!(gradients == count, "linear backward: {gradients} gradients for {count} maps");
    ensure!(directions == count, "linear backward: saved tensors of {directions} maps, where there are {count}");
    match &saved.z {
        Some(z) => {
            shape("linear backward: the saved z", z, m, ranks)?;
            ensure!(z.element() == operand, "linear backward: the saved z is {}, not {operand}", z.element());
            operand_of(x, "the saved z", z)?;
        }
        None => ensure!(ranks == 0, "linear backward: no z was saved, and the ranks' sum is {ranks}"),
    }
    for ((map, dy), direction) in maps.iter().zip(dys).zip(&saved.directions) {
        float("a gradient", dy, operand)?;
        operand_of(x, "a gradient", dy)?;
        shape("linear backward: a gradient", dy, m, map.weight.rows())?;
        let dora = map.lora.is_some_and(|lora| lora.magnitude().is_some());
        ensure!(dora == direction.is_some(), "linear backward: what was saved does not tell of DoRA what the maps do");
        if let Some(u) = direction {
            shape("linear backward: the saved direction", u, m, map.weight.rows())?;
            operand_of(x, "the saved direction", u)?;
        }
    }
    Ok(())
}
