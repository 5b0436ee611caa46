//! The frozen tables that PEFT saves below an adapter's branches on them. Nothing is computed with them: they tell another
//! base of the same shape. Read peft.rs first.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;
use safetensors::SafeTensors;

use crate::invalid;
use crate::model::adapter::{Adapter, LinearShapes, NonBlockModule, TargetModule};
use crate::model_files::peft::{TENSORS_FILE, read_tensor};

/// What PEFT calls the frozen table below a branch on it.
pub(crate) fn table_name(shapes: &LinearShapes, slot: TargetModule) -> String {
    match slot {
        TargetModule::NonBlockModule(NonBlockModule::Embedding | NonBlockModule::Head) => {
            format!("base_model.model.{}.base_layer.weight", shapes.path(slot))
        }
        _ => String::new(),
    }
}

/// The tables of the base that PEFT saved beside the adapter's branches on them, (V, E) f32: they tell another base of the
/// same shape.
///
/// # Errors
/// As for [`Adapter::load`].
pub fn base_tables(dir: &Path, adapter: &Adapter) -> Result<Vec<(TargetModule, Tensor)>> {
    let path = dir.join(TENSORS_FILE);
    let shapes = adapter.shapes();
    let places: Vec<(TargetModule, String)> = adapter
        .pairs()
        .map(|(slot, _)| (slot, table_name(shapes, slot)))
        .filter(|(_, name)| !name.is_empty())
        .collect();
    if places.is_empty() {
        return Ok(vec![]);
    }
    let bytes = fs::read(&path).map_err(|e| invalid!("{}: {e}", path.display()))?;
    let damaged = |e| invalid!("{}: truncated or damaged ({e})", path.display());
    let file = SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let there = places.into_iter().filter(|(_, name)| file.names().contains(&name.as_str()));
    there
        .map(|(slot, name)| {
            let (inp, out) = shapes.dims_of(slot);
            let dims =
                if slot == TargetModule::NonBlockModule(NonBlockModule::Embedding) { [inp, out] } else { [out, inp] };
            Ok((slot, read_tensor(&file, &name, &dims).with_context(|| path.display().to_string())?))
        })
        .collect()
}
