//! Reading one tensor of a PEFT adapter's file as f32.
//!
//! It does not depend on what the values are for. Read `peft/mod.rs` next.

use anyhow::Result;
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::invalid;

/// File of an adapter's hyperparameters.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File of an adapter's tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Reads a tensor of this name and shape, stored as f32, f16 or bf16.
///
/// # Errors
/// If it is missing, of another shape or type, or holds NaN or infinite numbers.
pub(super) fn read_tensor(file: &SafeTensors<'_>, name: &str, dims: &[usize]) -> Result<Tensor> {
    let view = file.tensor(name).map_err(|e| invalid!("{name}: {e}"))?;
    if view.shape() != dims {
        return Err(invalid!(
            "{name} is {:?} and this base with this config needs {dims:?}: the adapter was trained over another base; \
             point it at the base named in its {CONFIG_FILE}, or train it again over this one",
            view.shape()
        ));
    }
    let bytes = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        other => return Err(invalid!("{name} is stored as {other:?}; f32, f16 and bf16 can be read")),
    };
    if let Some(at) = values.iter().position(|x| !x.is_finite()) {
        return Err(invalid!("{name} holds {} at position {at}: the training that wrote it diverged", values[at]));
    }
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}
