//! An adapter that a stage goes on training. Its own shape counts, so the keys of `[lora]` that ask for another are named once.
//! It does not depend on a stage. Read `model.rs` for how an adapter is opened.

use std::path::Path;

use anyhow::Result;

use super::{Model, lora_config};
use crate::config::{Config, InitLoraWeights, Lora, Stage};
use crate::error::counted;
use crate::model::adapter::Adapter;
use crate::warning;

/// Opens the adapter that a stage starts from: a policy's, or for the reward stage any.
///
/// # Errors
/// If it is not over this base, or has a score head where a policy is needed.
pub(super) fn continued(model: &Model, path: &Path, config: &Config, stage: Stage) -> Result<Adapter> {
    let adapter = if stage == Stage::Reward { model.adapter(path)? } else { model.policy_adapter(path)? };
    if let Some(text) = overruled(&config.lora, &adapter, path) {
        warning!("{}: warning: {text}", stage.name());
    }
    Ok(adapter.with_loraplus_lr_ratio(config.lora.loraplus_lr_ratio))
}

/// A sentence on the keys of `[lora]` in the file that ask for another shape than the adapter's; `None` if there are none.
fn overruled(lora: &Lora, adapter: &Adapter, path: &Path) -> Option<String> {
    let (wanted, shapes) = (lora_config(lora), adapter.shapes());
    let of_all = |differs: &dyn Fn(&str, usize, f64) -> bool| {
        adapter.pairs().any(|(slot, pair)| differs(&shapes.path(slot), pair.rank(), pair.scale))
    };
    let ranks = of_all(&|path, rank, _| wanted.rank_of(path) != rank);
    let scales = of_all(&|path, _, scale| (wanted.scaling_of(path) - scale).abs() > 1e-6 * scale.abs());
    let slots = wanted.select(shapes).ok().is_none_or(|mut slots| {
        let mut theirs: Vec<String> = adapter.pairs().map(|(slot, _)| shapes.path(slot)).collect();
        let mut ours: Vec<String> = slots.drain(..).map(|slot| shapes.path(slot)).collect();
        theirs.sort_unstable();
        ours.sort_unstable();
        ours != theirs
    });
    let dora = adapter.pairs().any(|(_, pair)| pair.magnitude.is_some()) != lora.use_dora;
    let keys: Vec<&str> = [
        ("r", ranks),
        ("rank_pattern", ranks),
        ("lora_alpha", scales),
        ("alpha_pattern", scales),
        ("use_rslora", scales),
        ("target_modules", slots),
        ("exclude_modules", slots),
        ("layers_to_transform", slots),
        ("use_dora", dora),
        ("init_lora_weights", lora.init() != InitLoraWeights::Default),
    ]
    .into_iter()
    .filter(|(key, differs)| *differs && lora.given.0.iter().any(|given| given == key))
    .map(|(key, _)| key)
    .collect();
    let (_, first) = adapter.pairs().next()?;
    let (last, before) = keys.split_last()?;
    let keys = if before.is_empty() { (*last).to_owned() } else { format!("{} and {last}", before.join(", ")) };
    Some(format!(
        "[lora] {keys} {} no effect: {} goes on in its own shape (r = {}, scale {}, on {})",
        if before.is_empty() { "has" } else { "have" },
        path.display(),
        first.rank(),
        first.scale,
        counted(adapter.pairs().count(), "linear map")
    ))
}
