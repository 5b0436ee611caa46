//! The base's embedding and lm_head that PEFT saves with an adapter that has branches on them.
//!
//! They are not used in computation. Comparing them with the base detects another base of the same shape. It does not depend
//! on the base. Read `peft/mod.rs` first.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;
use safetensors::SafeTensors;

use crate::invalid;
use crate::model::adapter::{Adapter, LinearShapes, NonBlockModule, TargetModule};
use crate::model_files::peft::tensors::{TENSORS_FILE, names, read_tensor};

/// PEFT's name of the frozen matrix under a branch on embedding or lm_head; empty for other modules.
pub(crate) fn table_name(shapes: &LinearShapes, slot: TargetModule) -> String {
    match slot {
        TargetModule::NonBlockModule(NonBlockModule::Embedding | NonBlockModule::Head) => {
            format!("base_model.model.{}.base_layer.weight", shapes.path(slot))
        }
        _ => String::new(),
    }
}

/// The base's embedding and lm_head as saved with the adapter's branches on them, (V, E) f32.
///
/// # Errors
/// Those of [`Adapter::load`].
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
    let stored = names(&file)?;
    let there = places.into_iter().filter_map(|(slot, name)| Some((slot, *stored.get(&name)?)));
    there
        .map(|(slot, name)| {
            let (in_features, out_features) = shapes.dims_of(slot);
            let dims = if slot == TargetModule::NonBlockModule(NonBlockModule::Embedding) {
                [in_features, out_features]
            } else {
                [out_features, in_features]
            };
            Ok((slot, read_tensor(&file, name, &dims).with_context(|| path.display().to_string())?))
        })
        .collect()
}
