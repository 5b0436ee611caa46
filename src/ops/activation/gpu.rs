//! An MLP's activation on a device, gated and plain, forward and backward. Formulas are in mod.rs, kernels in gpu.cu.
//! Saved for the backward pass: the inputs. It does not depend on layers. Read `attention/gpu.rs` next.

use anyhow::Result;

use super::Activation;
use crate::device::{Arguments, Matrix, Ptr};
use crate::ops::launch::{blocks, device, shape, variant};

/// Numbers per block: four per thread.
const EACH: usize = 1024;

#[repr(C)]
struct ActivationForward {
    gate: Ptr,
    up: Ptr,
    m: Ptr,
    count: u64,
    kind: u32,
}
// SAFETY: the fields are those of `ActivationForward` in gpu.cu.
unsafe impl Arguments for ActivationForward {
    const NAME: &'static str = "activation_forward";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct ActivationBackward {
    gate: Ptr,
    up: Ptr,
    dm: Ptr,
    dgate: Ptr,
    dup: Ptr,
    count: u64,
    kind: u32,
}
// SAFETY: the fields are those of `ActivationBackward` in gpu.cu.
unsafe impl Arguments for ActivationBackward {
    const NAME: &'static str = "activation_backward";
    const BLOCK: u32 = 256;
}

/// The number that the kernels know an activation by.
fn kind(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
    }
}

/// m (N, F) = act(gate) * up of `gate` and `up` (N, F), or act(up) without a gate. All have one type.
///
/// # Errors
/// If shapes or types differ.
pub fn forward(activation: Activation, gate: Option<&Matrix>, up: &Matrix) -> Result<Matrix> {
    let device = device("activation", up, &[gate.unwrap_or(up)])?;
    let (element, len) = (up.element(), up.len());
    if let Some(gate) = gate {
        shape("activation: gate", gate, up.rows(), up.cols())?;
    }
    let m = device.matrix(element, up.rows(), up.cols())?;
    let arguments = ActivationForward {
        gate: gate.map_or(Ok(Ptr::NULL), |gate| gate.input("activation gate", element, len))?,
        up: up.input("activation up", element, len)?,
        m: m.output("activation m", element, len)?,
        count: len as u64,
        kind: kind(activation),
    };
    device.launch(variant("activation", &[element])?, blocks(len, EACH)?, arguments)?;
    Ok(m)
}

/// (dL/dgate, dL/dup) of dL/dm (N, F): dup = dm act(gate), dgate = dm up act'(gate).
///
/// # Errors
/// If shapes or types differ.
pub fn gated_backward(activation: Activation, gate: &Matrix, up: &Matrix, dm: &Matrix) -> Result<(Matrix, Matrix)> {
    shape("activation backward: gate", gate, up.rows(), up.cols())?;
    let dgate = gate.device().matrix(gate.element(), gate.rows(), gate.cols())?;
    let dup = backward(activation, Some((gate, &dgate)), up, dm)?;
    Ok((dgate, dup))
}

/// dL/dx of dL/dm (N, F) for m = act(x): dx = dm act'(x).
///
/// # Errors
/// If shapes or types differ.
pub fn plain_backward(activation: Activation, x: &Matrix, dm: &Matrix) -> Result<Matrix> {
    backward(activation, None, x, dm)
}

fn backward(activation: Activation, gate: Option<(&Matrix, &Matrix)>, up: &Matrix, dm: &Matrix) -> Result<Matrix> {
    let device = device("activation backward", up, &[dm, gate.map_or(up, |(gate, _)| gate)])?;
    let (element, len) = (up.element(), up.len());
    shape("activation backward: dm", dm, up.rows(), up.cols())?;
    let dup = device.matrix(element, up.rows(), up.cols())?;
    let (gate, dgate) = match gate {
        Some((gate, dgate)) => {
            (gate.input("activation gate", element, len)?, dgate.output("activation dgate", element, len)?)
        }
        None => (Ptr::NULL, Ptr::NULL),
    };
    let arguments = ActivationBackward {
        gate,
        up: up.input("activation up", element, len)?,
        dm: dm.input("activation dm", element, len)?,
        dgate,
        dup: dup.output("activation dup", element, len)?,
        count: len as u64,
        kind: kind(activation),
    };
    device.launch(variant("activation", &[element])?, blocks(len, EACH)?, arguments)?;
    Ok(dup)
}
