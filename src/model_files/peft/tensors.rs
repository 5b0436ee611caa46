//! Reading one tensor of a PEFT adapter's file as f32, under PEFT's name for it.
//!
//! It does not depend on what the values are for. Read `peft/mod.rs` next.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::invalid;

/// File of an adapter's hyperparameters.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File of an adapter's tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// The tensors of an adapter's file: PEFT's name -> name in the file.
///
/// `save_pretrained` leaves the adapter's name out. A saved state dict of the whole model has it, mostly `default`:
/// `lora_A.default.weight`, `score.modules_to_save.default.weight`, beside the untrained copy `score.original_module.weight`,
/// which is left out here, since nothing computes with it.
///
/// # Errors
/// If the file holds factors of two adapters, or one tensor under two names.
pub(super) fn names<'f>(file: &'f SafeTensors<'_>) -> Result<BTreeMap<String, &'f str>> {
    let mut adapter: Option<&str> = None;
    let mut all = BTreeMap::new();
    for name in file.names() {
        if name.contains(".original_module.") {
            continue;
        }
        let mut plain = name.to_owned();
        if let Some((before, named, after)) = named_part(name) {
            match adapter {
                Some(other) if other != named => {
                    return Err(invalid!(
                        "it holds the adapters {other:?} and {named:?}; save one of them with save_pretrained"
                    ));
                }
                _ => adapter = Some(named),
            }
            plain = format!("{before}{after}");
        }
        if let Some(other) = all.insert(plain, name) {
            return Err(invalid!("{other} and {name} are the same tensor of the adapter"));
        }
    }
    Ok(all)
}

/// The name of the adapter inside a tensor's name, and what stands around it in PEFT's own files.
fn named_part(name: &str) -> Option<(&str, &str, &str)> {
    const FACTORS: [&str; 5] =
        [".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector."];
    if let Some((before, rest)) = name.split_once(".modules_to_save.") {
        let (named, _) = rest.split_once('.')?;
        return Some((before, named, &rest[named.len()..]));
    }
    let factor = FACTORS.into_iter().find(|factor| name.contains(factor))?;
    let at = name.rfind(factor)? + factor.len();
    let rest = &name[at..];
    let (named, weight) = match rest.split_once('.') {
        Some((named, _)) => (named, &rest[named.len()..]),
        None => (rest, ""),
    };
    // `lora_A.weight` has no name in it; embeddings and magnitudes are parameters, whose names end with the adapter's.
    let weight = if factor.starts_with(".lora_magnitude") && weight == ".weight" { "" } else { weight };
    (named != "weight").then_some((&name[..at - 1], named, weight))
}

/// Reads a tensor of this name and shape, stored as f64, f32, f16 or bf16.
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
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        other => return Err(invalid!("{name} is stored as {other:?}; f64, f32, f16 and bf16 can be read")),
    };
    if let Some(at) = values.iter().position(|x| !x.is_finite()) {
        return Err(invalid!("{name} holds {} at position {at}: the training that wrote it diverged", values[at]));
    }
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}
