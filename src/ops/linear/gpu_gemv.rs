//! gemv on a device: the product of few rows with a stored weight, for decoding. It reads each stored byte once,
//! where dequantising and a gemm would write and read the numbers too. It does not depend on
//! layers. Read gpu_gemv.cu next.

use anyhow::{Result, ensure};

use crate::device::{Arguments, Element, Matrix, Ptr, Variant};
use crate::ops::storage::gpu::DeviceWeight;
use crate::ops::storage::gpu::Planes;
use crate::ops::weight::StorageDType;

/// The most rows of x.
pub const MAX_ROWS: usize = 16;

#[repr(C)]
struct Fields {
    weight: Planes,
    x: Ptr,
    y_f32: Ptr,
    y: Ptr,
    residual_f32: Ptr,
    residual: Ptr,
    bias: Ptr,
    rows: u32,
    n: u32,
    k: u32,
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

/// Can `gemv` multiply so many rows? With more, dequantise the weight and call `Device::gemm`.
pub fn supports(rows: usize) -> bool {
    (1..=MAX_ROWS).contains(&rows)
}

/// Tensor cores multiply numbers of two bytes, 64 columns at a time. The types are those that weights usually have;
/// every further one would lengthen the compilation of the kernels.
fn uses_tensor_cores(dtype: StorageDType, element: Element, k: usize) -> bool {
    let usual = matches!(
        dtype,
        StorageDType::F16
            | StorageDType::BF16
            | StorageDType::Q8_0
            | StorageDType::Q4_0
            | StorageDType::Q4K
            | StorageDType::Q6K
            | StorageDType::NF4
    );
    usual && element != Element::F32 && k.is_multiple_of(64)
}

/// y (rows, n) = x (rows, k) W^T [+ bias (n)] [+ residual (rows, n)] with W (n, k) as it is stored and at most 16
/// rows.
///
/// x has the type T of f32, bf16 or f16, to which W's values are rounded before they are multiplied: the operands
/// are those of `DeviceWeight::dequantise` and `Device::gemm`. Sums are f32. y and residual are f32 or T each; bias
/// is f32. residual may be y itself, and then the product is added to what y held. Otherwise y overlaps no operand.
///
/// Errors: more than 16 rows or none, operands whose shapes or types do not fit, or operands on two devices.
pub fn gemv(
    weight: &DeviceWeight,
    x: &Matrix,
    y: &Matrix,
    bias: Option<&Matrix>,
    residual: Option<&Matrix>,
) -> Result<()> {
    let (rows, n, k, element) = (x.rows(), weight.rows(), weight.cols(), x.element());
    let device = weight.device();
    let one_device = [Some(x), Some(y), bias, residual].into_iter().flatten().all(|m| m.device().ptr_eq(device));
    ensure!(one_device, "gemv: the operands lie on two devices");
    ensure!(supports(rows), "gemv: {rows} rows; 1 to {MAX_ROWS} are possible, use dequantise and gemm for more");
    ensure!(element.is_float(), "gemv: x is {element}; f32, bf16 or f16 is needed");
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
    let (y_f32, y) = result("y", Some(y))?;
    let (residual_f32, residual) = result("residual", residual)?;
    let bias = match bias {
        None => Ptr::NULL,
        Some(bias) => {
            ensure!(bias.len() == n, "gemv: a bias of {} numbers; {n} are needed", bias.len());
            bias.input("bias", Element::F32, n)?
        }
    };
    let x = x.input("x", element, rows * k)?;
    let fields = Fields {
        weight: weight.planes()?,
        // Rows of whole units are loaded sixteen bytes at a time.
        x: if k.is_multiple_of(16) { x.aligned("gemv: x", 16)? } else { x },
        y_f32,
        y,
        residual_f32,
        residual,
        bias,
        rows: rows as u32,
        n: u32::try_from(n)?,
        k: u32::try_from(k)?,
    };
    let variant: Variant = weight.variant(element);
    if uses_tensor_cores(weight.dtype(), element, k) {
        device.launch(variant, [n.div_ceil(16) as u32, 1, 1], Tensor(fields))
    } else {
        device.launch(variant, [n.div_ceil(8) as u32, 1, 1], Plain(fields))
    }
}
