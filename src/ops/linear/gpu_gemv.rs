//! gemv on a device: products of few rows with stored weights, for decoding. They read each stored byte once,
//! where dequantising and a gemm would write and read the numbers too. Maps of one input share a launch, and their low-rank
//! branches are part of it. It does not depend on layers. Read gpu_gemv.cu next.

use anyhow::{Result, ensure};

use super::gpu_low_rank::DeviceLora;
use crate::device::{Arguments, Element, Matrix, Ptr, Variant};
use crate::ops::launch::size;
use crate::ops::storage::gpu::DeviceWeight;
use crate::ops::storage::gpu::Planes;
use crate::ops::weight::StorageDType;

/// The most rows of x for weights of any type.
pub const MAX_ROWS: usize = 16;

/// The most rows of x where tensor cores can multiply.
pub const MAX_TENSOR_ROWS: usize = 64;

/// The most maps of a launch.
const MAX_MAPS: usize = 3;

#[repr(C)]
#[derive(Clone, Copy)]
struct MapFields {
    weight: Planes,
    y_f32: Ptr,
    y: Ptr,
    residual_f32: Ptr,
    residual: Ptr,
    bias: Ptr,
    z: Ptr,
    b: Ptr,
    n: u32,
    rank: u32,
    z_stride: u32,
    first_block: u32,
}

#[repr(C)]
struct Fields {
    maps: [MapFields; MAX_MAPS],
    x: Ptr,
    count: u32,
    rows: u32,
    k: u32,
}

#[repr(C)]
struct LowRankInputs {
    a: [Ptr; MAX_MAPS],
    x: Ptr,
    z: Ptr,
    scale: [f32; MAX_MAPS],
    end: [u32; MAX_MAPS],
    rows: u32,
    k: u32,
    stride: u32,
    wide: u32,
}

// SAFETY: the fields are those of `LowRankInputs` in gpu_gemv.cu.
unsafe impl Arguments for LowRankInputs {
    const NAME: &'static str = "low_rank_inputs";
    const BLOCK: u32 = 256;
}

/// The kernel that takes every type.
#[repr(transparent)]
struct Plain(Fields);

// SAFETY: the fields are those of `Gemv` in gpu_gemv.cu.
unsafe impl Arguments for Plain {
    const NAME: &'static str = "gemv";
    const BLOCK: u32 = 256;
}

/// The kernel that uses tensor cores.
#[repr(transparent)]
struct Tensor(Fields);

// SAFETY: the fields are those of `Gemv` in gpu_gemv.cu.
unsafe impl Arguments for Tensor {
    const NAME: &'static str = "gemv_tensor";
    const BLOCK: u32 = 256;
}

/// The kernel that uses tensor cores for more rows.
#[repr(transparent)]
struct Wide(Fields);

// SAFETY: the fields are those of `Gemv` in gpu_gemv.cu.
unsafe impl Arguments for Wide {
    const NAME: &'static str = "gemv_wide";
    const BLOCK: u32 = 256;
}

/// Can `gemv` multiply so many rows of `element` by all these weights? Otherwise dequantise and call `Device::gemm`.
pub fn supports<'w>(rows: usize, element: Element, weights: impl IntoIterator<Item = &'w DeviceWeight>) -> bool {
    (1..=MAX_ROWS).contains(&rows)
        || (1..=MAX_TENSOR_ROWS).contains(&rows) && weights.into_iter().all(|w| uses_tensor_cores(w, element))
}

/// Tensor cores multiply numbers of two bytes, 64 columns at a time. The types are those that weights usually have;
/// every further one would lengthen the compilation of the kernels.
fn uses_tensor_cores(weight: &DeviceWeight, element: Element) -> bool {
    let (n, k) = (weight.rows(), weight.cols());
    let usual = matches!(
        weight.dtype(),
        StorageDType::F16
            | StorageDType::BF16
            | StorageDType::Q8_0
            | StorageDType::Q4_0
            | StorageDType::Q4K
            | StorageDType::Q6K
            | StorageDType::NF4
    );
    // The kernel counts units of sixteen numbers in 32 bits.
    usual && element != Element::F32 && k.is_multiple_of(64) && n.saturating_mul(k / 16) < 1 << 32
}

/// One map of a group, and where its product goes.
#[derive(Clone, Copy, Debug)]
pub struct FewRows<'a> {
    /// W (n, k), as stored.
    pub weight: &'a DeviceWeight,
    /// The result (rows, n) of f32 or T. It overlaps no operand but the residual.
    pub y: &'a Matrix,
    /// (1, n) f32.
    pub bias: Option<&'a Matrix>,
    /// (rows, n) of f32 or T. It may be y itself, and then the product is added to what y held.
    pub residual: Option<&'a Matrix>,
    /// The low-rank branch, with z of [`low_rank_inputs`] and the branch's first column there.
    pub branch: Option<(&'a DeviceLora, &'a Matrix, usize)>,
}

/// y (rows, n) = x (rows, k) W^T [+ bias (n)] [+ residual (rows, n)] of one map, see [`gemv_group`].
///
/// # Errors
/// As for [`gemv_group`].
pub fn gemv(
    weight: &DeviceWeight,
    x: &Matrix,
    y: &Matrix,
    bias: Option<&Matrix>,
    residual: Option<&Matrix>,
) -> Result<()> {
    gemv_group(x, &[FewRows { weight, y, bias, residual, branch: None }])
}

/// y = x W^T [+ z B^T] [+ bias] [+ residual] for each map of x (rows, k), with W as it is stored and few rows (see
/// [`supports`]). Neighbouring maps of one stored type go in one launch.
///
/// x has the type T of f32, bf16 or f16, to which W's values are rounded before they are multiplied: the operands
/// are those of `DeviceWeight::dequantise` and `Device::gemm`. Sums are f32, the branch's included.
///
/// # Errors
/// No rows or too many, operands whose shapes or types do not fit, or operands on two devices.
pub fn gemv_group(x: &Matrix, maps: &[FewRows<'_>]) -> Result<()> {
    for alike in maps.chunk_by(|one, next| one.weight.dtype() == next.weight.dtype()) {
        alike.chunks(MAX_MAPS).try_for_each(|maps| launch(x, maps))?;
    }
    Ok(())
}

fn launch(x: &Matrix, maps: &[FewRows<'_>]) -> Result<()> {
    let Some(first) = maps.first() else { return Ok(()) };
    let (rows, k, element, device) = (x.rows(), x.cols(), x.element(), x.device());
    let fits = supports(rows, element, maps.iter().map(|map| map.weight));
    ensure!(fits, "gemv: {rows} rows are none or too many for these weights; use dequantise and gemm");
    ensure!(element.is_float(), "gemv: x is {element}; f32, bf16 or f16 is needed");
    let tensor = maps.iter().all(|map| uses_tensor_cores(map.weight, element));
    let columns_of_block = match tensor {
        false => 8,
        true if rows <= MAX_ROWS => 16,
        true => 64,
    };
    let (mut fields, mut blocks) = (vec![], 0);
    for map in maps {
        fields.push(map.fields(x, size("blocks", blocks)?)?);
        blocks += map.weight.rows().div_ceil(columns_of_block);
    }
    let at = x.input("x", element, rows * k)?;
    let fields = Fields {
        maps: std::array::from_fn(|i| fields[i.min(fields.len() - 1)]),
        // Rows of whole units are loaded sixteen bytes at a time.
        x: if k.is_multiple_of(16) { at.aligned("gemv: x", 16)? } else { at },
        count: maps.len() as u32,
        rows: rows as u32,
        k: size("columns", k)?,
    };
    let (variant, grid): (Variant, _) = (first.weight.variant(element), [size("blocks", blocks)?, 1, 1]);
    match columns_of_block {
        8 => device.launch(variant, grid, Plain(fields)),
        16 => device.launch(variant, grid, Tensor(fields)),
        _ => device.launch(variant, grid, Wide(fields)),
    }
}

impl FewRows<'_> {
    fn fields(&self, x: &Matrix, first_block: u32) -> Result<MapFields> {
        let (rows, element, device) = (x.rows(), x.element(), x.device());
        let (n, k) = (self.weight.rows(), self.weight.cols());
        let others = [Some(self.y), self.bias, self.residual, self.branch.map(|(_, z, _)| z)];
        let one_device = others.into_iter().flatten().all(|m| m.device().ptr_eq(device));
        ensure!(one_device && self.weight.device().ptr_eq(device), "gemv: the operands lie on two devices");
        ensure!(x.cols() == k, "gemv: rows of {} numbers times a weight with rows of {k}", x.cols());
        let result = |what: &'static str, matrix: Option<&Matrix>| -> Result<(Ptr, Ptr)> {
            let Some(matrix) = matrix else { return Ok((Ptr::NULL, Ptr::NULL)) };
            let fits = (matrix.rows(), matrix.cols()) == (rows, n);
            ensure!(fits, "gemv: {what} is ({}, {}); ({rows}, {n}) is needed", matrix.rows(), matrix.cols());
            match matrix.element() {
                Element::F32 => Ok((matrix.output(what, Element::F32, rows * n)?, Ptr::NULL)),
                _ => Ok((Ptr::NULL, matrix.output(what, element, rows * n)?)),
            }
        };
        let (y_f32, y) = result("y", Some(self.y))?;
        let (residual_f32, residual) = result("residual", self.residual)?;
        let bias = match self.bias {
            None => Ptr::NULL,
            Some(bias) => {
                ensure!(bias.len() == n, "gemv: a bias of {} numbers; {n} are needed", bias.len());
                bias.input("bias", Element::F32, n)?
            }
        };
        let (mut z_at, mut b_at, mut rank, mut z_stride) = (Ptr::NULL, Ptr::NULL, 0, 0);
        if let Some((lora, z, column)) = self.branch {
            let (b, r) = (lora.b_operand(), lora.rank());
            let fits = lora.outputs() == n && z.rows() == rows && column + r <= z.cols();
            ensure!(fits, "gemv: B ({}, {r}) and z ({}, {}) from {column} on", lora.outputs(), z.rows(), z.cols());
            z_at = z.input("z", element, z.len())?.offset(column, element);
            (b_at, rank, z_stride) = (b.input("B", element, b.len())?, size("rank", r)?, size("ranks", z.cols())?);
        }
        Ok(MapFields {
            weight: self.weight.planes()?,
            y_f32,
            y,
            residual_f32,
            residual,
            bias,
            z: z_at,
            b: b_at,
            n: size("rows of a weight", n)?,
            rank,
            z_stride,
            first_block,
        })
    }
}

/// z (rows, sum of ranks) of x's type T: s x A^T of all branches side by side, for up to 64 rows of x (rows, k).
///
/// # Errors
/// If shapes or types do not fit, or memory is out.
pub fn low_rank_inputs(x: &Matrix, branches: &[&DeviceLora]) -> Result<Matrix> {
    let (rows, k, element, device) = (x.rows(), x.cols(), x.element(), x.device());
    let fits = (1..=MAX_TENSOR_ROWS).contains(&rows);
    ensure!(fits, "low-rank inputs: {rows} rows; 1 to {MAX_TENSOR_ROWS} are possible");
    let total: usize = branches.iter().map(|lora| lora.rank()).sum();
    let z = device.matrix(element, rows, total)?;
    let variant = Variant::of(&[element]);
    let mut column = 0;
    for some in branches.chunks(MAX_MAPS) {
        let (mut a, mut scale, mut end, mut columns) = ([Ptr::NULL; MAX_MAPS], [0.0; MAX_MAPS], [0; MAX_MAPS], 0);
        for (i, lora) in some.iter().enumerate() {
            ensure!(lora.inputs() == k, "low-rank inputs: A of width {} meets x of {k}", lora.inputs());
            ensure!(lora.device().ptr_eq(device), "low-rank inputs: x and A lie on two devices");
            a[i] = lora.a_operand().input("A", element, lora.rank() * k)?;
            columns += lora.rank();
            (scale[i], end[i]) = (lora.scale(), size("ranks", columns)?);
        }
        end[some.len()..].fill(u32::MAX);
        let arguments = LowRankInputs {
            a,
            x: x.input("x", element, rows * k)?,
            z: z.output("z", element, z.len())?.offset(column, element),
            scale,
            end,
            rows: rows as u32,
            k: size("columns", k)?,
            stride: size("ranks", total)?,
            wide: u32::from(k.is_multiple_of(8) && x.input("x", element, 0)?.aligned("x", 16).is_ok()),
        };
        let grid = [size("ranks", columns)?, rows.div_ceil(8) as u32, 1];
        device.launch(variant.clone(), grid, arguments)?;
        column += columns;
    }
    Ok(z)
}
