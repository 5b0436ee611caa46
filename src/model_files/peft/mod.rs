//! Adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Python's `PeftModel.from_pretrained` reads what this program writes, and the reverse. A setting that would change the model
//! and is not supported is refused by name. It does not depend on the base, only on its [`LinearShapes`]. Read
//! `model/adapter/mod.rs` first.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::model::adapter::{Adapter, Factor, HEAD_BIAS, LinearShapes, LoraLayer, Provenance, ScoreHead, factor_name};

mod config;
mod tables;
mod tensors;

use self::config::{FileConfig, config_json, parse_config};
pub use self::tables::base_tables;
use self::tables::table_name;
pub use self::tensors::{CONFIG_FILE, TENSORS_FILE};
use self::tensors::{names, read_tensor};
use crate::invalid;
use crate::model_files::convert;

/// TRL's and LLaMA-Factory's file of a scalar head, beside the adapter of a language model.
pub const VALUE_HEAD_FILE: &str = "value_head.safetensors";
/// Names of the head's tensors in [`VALUE_HEAD_FILE`].
const VALUE_HEAD: [&str; 2] = ["v_head.summary.weight", "v_head.summary.bias"];
/// Key of the base's fingerprint in the tensor file's `__metadata__`: an extension of this program.
const FINGERPRINT_KEY: &str = "fourfold.base_fingerprint";
/// Key in `__metadata__` of adapters whose second half of every rank is frozen (PiSSA, OLoRA).
const FROZEN_KEY: &str = "fourfold.frozen_half";

/// The error for a file of an adapter that cannot be read.
fn unreadable(dir: &Path, file: &str, why: &std::io::Error) -> anyhow::Error {
    let pickled = if file == TENSORS_FILE { convert::pickled(dir, "adapter_model.bin") } else { String::new() };
    let path = dir.join(file);
    invalid!("{}: {why}; a PEFT adapter is a directory with {CONFIG_FILE} and {TENSORS_FILE}{pickled}", path.display())
}

impl Adapter {
    /// Reads a PEFT directory for a base of these shapes. Factors may be stored as f64, f32, f16 or bf16; they become f32.
    ///
    /// # Errors
    /// Invalid input if a file is missing or damaged, has an unsupported setting, was trained over another base, lacks a
    /// factor, or has an unknown tensor or one with NaN or infinite numbers.
    pub fn load(dir: &Path, shapes: LinearShapes) -> Result<Self> {
        let read = |file: &str| fs::read(dir.join(file)).map_err(|e| unreadable(dir, file, &e));
        let (config_bytes, tensor_bytes) = (read(CONFIG_FILE)?, read(TENSORS_FILE)?);
        let config = parse_config(&config_bytes).with_context(|| dir.join(CONFIG_FILE).display().to_string())?;
        let adapter = read_tensors(&tensor_bytes, config, shapes)
            .with_context(|| dir.join(TENSORS_FILE).display().to_string())?;
        let path = dir.join(VALUE_HEAD_FILE);
        if adapter.head().is_some() {
            return Ok(adapter);
        }
        if !path.exists() {
            let pickled = convert::pickled(dir, "value_head.bin");
            return match pickled.is_empty() {
                true => Ok(adapter),
                false => Err(invalid!("{}: the value head is not there{pickled}", path.display())),
            };
        }
        let bytes = fs::read(&path).map_err(|e| invalid!("{}: {e}", path.display()))?;
        let head = read_value_head(&bytes, shapes.hidden).with_context(|| path.display().to_string())?;
        adapter.with_score_head(Some(head))
    }

    /// Checks that a folder has the files of an adapter; nothing is read of them.
    ///
    /// # Errors
    /// As for [`Adapter::load`] where one cannot be opened.
    pub fn check_files(dir: &Path) -> Result<()> {
        let open = |file: &str| fs::File::open(dir.join(file)).map(drop).map_err(|e| unreadable(dir, file, &e));
        [CONFIG_FILE, TENSORS_FILE].into_iter().try_for_each(open)
    }

    /// Checks that an adapter can be saved in a folder: it is new, empty or an adapter's.
    ///
    /// # Errors
    /// If it holds other files, which would be lost.
    pub fn check_replaceable(dir: &Path) -> Result<()> {
        let entries = match fs::read_dir(dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(|e| invalid!("{}: {e}; an adapter is saved as a directory", dir.display()))?,
        };
        for entry in entries {
            let name = entry?.file_name();
            if name != CONFIG_FILE && name != TENSORS_FILE && name != VALUE_HEAD_FILE {
                return Err(invalid!(
                    "{} holds {}, which does not belong to an adapter and would be lost; choose a directory that is new, \
                     empty, or holds only {CONFIG_FILE} and {TENSORS_FILE}",
                    dir.display(),
                    name.display()
                ));
            }
        }
        Ok(())
    }

    /// Writes a PEFT directory, atomically: the files are written into a sibling directory, which is then renamed. Equal
    /// adapters give equal bytes.
    ///
    /// # Errors
    /// Invalid input if `dir` exists and is not an adapter's directory (its files would be lost); otherwise if writing fails.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_as(dir, |new| self.write_into(new))
    }

    /// As [`Adapter::save`], with the scalar head, bias included, in TRL's and LLaMA-Factory's
    /// `value_head.safetensors` beside an adapter of a language model.
    ///
    /// # Errors
    /// As for [`Adapter::save`], and if there is no head.
    pub fn save_with_value_head(&self, dir: &Path) -> Result<()> {
        let head = self.head().ok_or_else(|| invalid!("the adapter has no scalar head to write as a value head"))?;
        let bias = Tensor::new(&[head.bias], &Device::Cpu)?;
        let tensors = BTreeMap::from([(VALUE_HEAD[0].to_string(), &head.weight), (VALUE_HEAD[1].to_string(), &bias)]);
        let bytes = safetensors_bytes(&tensors, &BTreeMap::from([("format", "pt")]))?;
        let bare = self.clone().with_score_head(None)?;
        self.save_as(dir, |new| {
            bare.write_into(new)?;
            write_synced(&new.join(VALUE_HEAD_FILE), &bytes)
        })
    }

    fn save_as(&self, dir: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        Self::check_replaceable(dir)?;
        let name = dir
            .file_name()
            .ok_or_else(|| invalid!("{}: an adapter needs a directory name of its own", dir.display()))?
            .to_string_lossy();
        let sibling = |role: &str| dir.with_file_name(format!(".{name}.{role}-{}", std::process::id()));
        let (new, old) = (sibling("new"), sibling("old"));
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        let done = write(&new).and_then(|()| swap(&new, &old, dir));
        if done.is_err() {
            fs::remove_dir_all(&new).ok();
        }
        done.with_context(|| format!("saving the adapter {}", dir.display()))
    }

    fn write_into(&self, dir: &Path) -> Result<()> {
        fs::remove_dir_all(dir).ok(); // left by a killed process with the same id
        fs::create_dir(dir)?;
        write_synced(&dir.join(CONFIG_FILE), &config_json(self)?)?;
        write_synced(&dir.join(TENSORS_FILE), &tensors_bytes(self)?)
    }
}

fn read_tensors(bytes: &[u8], config: FileConfig, shapes: LinearShapes) -> Result<Adapter> {
    let damaged = |e| invalid!("truncated or damaged ({e}); save or download it again");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let FileConfig { lora, heads, base_model } = config;

    let mut unread = names(&file)?;
    let there = unread.clone();
    let mut take = |name: &str, dims: &[usize]| -> Result<Tensor> {
        let Some(stored) = unread.remove(name) else {
            return Err(invalid!("{name} is missing, and {CONFIG_FILE} promises it; the adapter is incomplete"));
        };
        read_tensor(&file, stored, dims)
    };
    let mut pairs = vec![];
    for slot in lora.select(&shapes)? {
        let (in_features, out_features) = shapes.dims_of(slot);
        let path = shapes.path(slot);
        let (r, scale) = (lora.rank_of(&path), lora.scaling_of(&path));
        let name = |factor| factor_name(&shapes, slot, factor);
        if let Some(stored) = there.get(&name(Factor::A)).and_then(|name| file.tensor(name).ok()) {
            check_rank(&name(Factor::A), stored.shape(), [r, in_features])?;
        }
        let (a, b) = (take(&name(Factor::A), &[r, in_features])?, take(&name(Factor::B), &[out_features, r])?);
        let magnitude = lora.use_dora.then(|| take(&name(Factor::Magnitude), &[out_features])).transpose()?;
        pairs.push((slot, LoraLayer::new(a, b, scale).with_magnitude(magnitude)));
    }
    let head = match &heads[..] {
        [] => None,
        heads => {
            let places =
                heads.iter().flat_map(|head| ["", ".summary"].map(|of| format!("base_model.model.{head}{of}")));
            let there = |place: &String| there.contains_key(&format!("{place}.weight"));
            // If there is no head, the error message names the first place.
            let place = places.clone().find(there).or(places.clone().next()).unwrap_or_default();
            let (weight, bias) = (format!("{place}.weight"), format!("{place}.bias"));
            let weight = take(&weight, &[1, shapes.hidden])?;
            let bias = match unread.remove(bias.as_str()) {
                Some(stored) => read_tensor(&file, stored, &[1])?.to_vec1::<f32>()?[0],
                None => 0.0,
            };
            Some(ScoreHead { weight, bias })
        }
    };
    // PEFT also saves the matrices under branches on embedding and lm_head; `base_tables` reads them.
    for (slot, _) in &pairs {
        unread.remove(table_name(&shapes, *slot).as_str());
    }
    if let Some(name) = unread.values().next() {
        return Err(invalid!(
            "{name}: nothing in {CONFIG_FILE} and in a base of {} layers asks for this tensor ({} such); \
             the adapter belongs to another base or to a variant that is not supported",
            shapes.layers,
            unread.len()
        ));
    }
    let of_ours = |key: &str| header.metadata().as_ref().and_then(|m| m.get(key).cloned());
    let (fingerprint, frozen) = (of_ours(FINGERPRINT_KEY), of_ours(FROZEN_KEY).is_some());
    let provenance = Provenance { base_model, base_fingerprint: fingerprint };
    let adapter = Adapter::from_pairs(lora, shapes, pairs, head, provenance)?;
    if frozen { adapter.with_frozen_half() } else { Ok(adapter) }
}

/// Tells a rank that the config has wrong from a base that the adapter was not trained over: only the first dimension of the
/// factor A differs.
///
/// # Errors
/// If the rank is another.
fn check_rank(name: &str, stored: &[usize], [r, in_features]: [usize; 2]) -> Result<()> {
    match *stored {
        [rank, width] if width == in_features && rank != r => Err(invalid!(
            "{name} has rank {rank}, and {CONFIG_FILE} says {r}: its \"r\" or \"rank_pattern\" was changed after the \
             training; put {rank} back"
        )),
        _ => Ok(()),
    }
}

/// Reads the head of a [`VALUE_HEAD_FILE`]: TRL's linear map from hidden states to one number.
fn read_value_head(bytes: &[u8], hidden: usize) -> Result<ScoreHead> {
    let damaged = |e| invalid!("truncated or damaged ({e}); save or download it again");
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    if let Some(name) = file.names().into_iter().find(|name| !VALUE_HEAD.contains(name)) {
        return Err(invalid!("{name} does not belong to a value head; {} and {} are", VALUE_HEAD[0], VALUE_HEAD[1]));
    }
    let weight = read_tensor(&file, VALUE_HEAD[0], &[1, hidden])?;
    let bias = match file.names().contains(&VALUE_HEAD[1]) {
        true => read_tensor(&file, VALUE_HEAD[1], &[1])?.to_vec1::<f32>()?[0],
        false => 0.0,
    };
    Ok(ScoreHead { weight, bias })
}

/// The bytes of the tensor file, with sorted keys. The safetensors crate is not used, because it writes `__metadata__` from
/// a hash map, in random order.
fn tensors_bytes(adapter: &Adapter) -> Result<Vec<u8>> {
    let bias = adapter.head().map_or(0.0, |h| h.bias);
    let bias_tensor = Tensor::new(&[bias], &Device::Cpu)?;
    let mut tensors: BTreeMap<String, &Tensor> = adapter.named_tensors().into_iter().collect();
    if bias != 0.0 {
        tensors.insert(HEAD_BIAS.to_string(), &bias_tensor);
    }
    let mut metadata: BTreeMap<&str, &str> = BTreeMap::from([("format", "pt")]); // PEFT refuses a file without it
    if let Some(fingerprint) = &adapter.provenance().base_fingerprint {
        metadata.insert(FINGERPRINT_KEY, fingerprint);
    }
    if adapter.frozen_half() {
        metadata.insert(FROZEN_KEY, "true");
    }
    safetensors_bytes(&tensors, &metadata)
}

fn safetensors_bytes(tensors: &BTreeMap<String, &Tensor>, metadata: &BTreeMap<&str, &str>) -> Result<Vec<u8>> {
    let mut header: BTreeMap<&str, Value> = BTreeMap::from([("__metadata__", json!(metadata))]);
    let mut offset = 0usize;
    for (name, tensor) in tensors {
        let end = offset + 4 * tensor.elem_count();
        header.insert(name, json!({"dtype": "F32", "shape": tensor.dims(), "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = Vec::with_capacity(8 + text.len() + offset);
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text);
    for tensor in tensors.values() {
        bytes.extend(tensor.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()));
    }
    Ok(bytes)
}

/// Replaces `dir` by `new`; between two renames the former `dir` is at `old`.
fn swap(new: &PathBuf, old: &PathBuf, dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(fs::rename(new, dir)?);
    }
    fs::rename(dir, old)?;
    if let Err(e) = fs::rename(new, dir) {
        fs::rename(old, dir).with_context(|| format!("the previous adapter is now at {}", old.display()))?;
        return Err(e.into());
    }
    Ok(fs::remove_dir_all(old)?)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = fs::File::create_new(path)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

#[cfg(test)]
mod tests;
