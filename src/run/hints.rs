//! What was meant by a path that is no adapter or no model: the adapter in a run's folder, the base of an adapter. It does
//! not depend on a stage. Read `describe.rs` for a run's folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::output;
use crate::invalid;
use crate::model_files::gguf::Gguf;

const ADAPTER: &str = "adapter_config.json";
const MODEL: &str = "config.json";

/// The folders directly below `dir` that hold a file of that name, in the order of their names.
fn below(dir: &Path, file: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.join(file).is_file()).collect();
    found.sort();
    found
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" or ")
}

/// The message for a LoRA adapter in GGUF: it is an export, which nothing here reads back.
const GGUF_ADAPTER: &str = "is a LoRA adapter in GGUF, which llama.cpp reads (--lora); give the folder with \
                            adapter_config.json that it was made from as the adapter, and a model as the base";

fn is_gguf_adapter(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "gguf") && Gguf::open(path).is_ok_and(|file| file.is_adapter())
}

/// Checks that a path given as an adapter is not something else that is known.
///
/// # Errors
/// If it is a folder with adapters below it, such as a run's, or a model; the message says what to give.
pub fn check_adapter_path(path: &Path) -> Result<()> {
    let shown = path.display();
    if path.join(ADAPTER).is_file() {
        return Ok(());
    }
    let adapters = below(path, ADAPTER);
    if !adapters.is_empty() {
        let what = if output::stage_of(path).is_some() { "the folder of a run" } else { "no adapter" };
        return Err(invalid!("{shown} is {what}; did you mean {}?", listed(&adapters)));
    }
    if is_gguf_adapter(path) {
        return Err(invalid!("{shown} {GGUF_ADAPTER}"));
    }
    if path.join(MODEL).is_file() || path.extension().is_some_and(|ending| ending == "gguf") {
        return Err(invalid!("{shown} is a model, not an adapter; give it as the base"));
    }
    if path.is_file() && path.with_file_name(ADAPTER).is_file() {
        return Err(invalid!("{shown} is a file; an adapter is its folder: {}", folder_of(path)));
    }
    Ok(())
}

/// Checks that a path given as a base is not something else that is known.
///
/// # Errors
/// If it is an adapter, or a folder with models below it, such as a run's; the message says what to give.
pub fn check_base_path(path: &Path) -> Result<()> {
    let shown = path.display();
    if is_gguf_adapter(path) {
        return Err(invalid!("{shown} {GGUF_ADAPTER}"));
    }
    if path.join(MODEL).is_file() || !path.is_dir() {
        return Ok(());
    }
    if let Ok(text) = fs::read_to_string(path.join(ADAPTER)) {
        let config: Value = serde_json::from_str(&text).unwrap_or_default();
        let base = config["base_model_name_or_path"].as_str().unwrap_or("its base");
        return Err(invalid!("{shown} is an adapter; give {base} as the base, and this as the adapter"));
    }
    let models = below(path, MODEL);
    if !models.is_empty() {
        return Err(invalid!("{shown} is no model; did you mean {}?", listed(&models)));
    }
    if output::stage_of(path).is_some() {
        return Err(invalid!(
            "{shown} is the folder of a run, not a model; give its base ({}) as the base, and {} as the adapter",
            output::base_of(path).unwrap_or_else(|| "see its config.toml".into()),
            listed(&below(path, ADAPTER))
        ));
    }
    Ok(())
}

fn folder_of(path: &Path) -> String {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.display().to_string()
}
