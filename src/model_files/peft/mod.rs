//! Adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Python's `PeftModel.from_pretrained` reads what this program writes, and the reverse. A setting that would change the model
//! and is not supported is refused by name. It does not depend on the base, only on its [`LinearShapes`]. Read
//! `model/adapter/mod.rs` first.

use std::collections::{BTreeMap, BTreeSet};
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
use self::tensors::read_tensor;
pub use self::tensors::{CONFIG_FILE, TENSORS_FILE};
use crate::invalid;

/// TRL's and LLaMA-Factory's file of a scalar head, beside the adapter of a language model.
pub const VALUE_HEAD_FILE: &str = "value_head.safetensors";
/// Names of the head's tensors in [`VALUE_HEAD_FILE`].
const VALUE_HEAD: [&str; 2] = ["v_head.summary.weight", "v_head.summary.bias"];
/// Key of the base's fingerprint in the tensor file's `__metadata__`: an extension of this program.
const FINGERPRINT_KEY: &str = "fourfold.base_fingerprint";
/// Key in `__metadata__` of adapters whose second half of every rank is frozen (PiSSA, OLoRA).
const FROZEN_KEY: &str = "fourfold.frozen_half";

impl Adapter {
    /// Reads a PEFT directory for a base of these shapes. Factors may be stored as f32, f16 or bf16; they become f32.
    ///
    /// # Errors
    /// Invalid input if a file is missing or damaged, has an unsupported setting, was trained over another base, lacks a
    /// factor, or has an unknown tensor or one with NaN or infinite numbers.
    pub fn load(dir: &Path, shapes: LinearShapes) -> Result<Self> {
        let read = |file: &str| {
            let path = dir.join(file);
            fs::read(&path).map_err(|e| {
                invalid!("{}: {e}; a PEFT adapter is a directory with {CONFIG_FILE} and {TENSORS_FILE}", path.display())
            })
        };
        let (config_bytes, tensor_bytes) = (read(CONFIG_FILE)?, read(TENSORS_FILE)?);
        let config = parse_config(&config_bytes).with_context(|| dir.join(CONFIG_FILE).display().to_string())?;
        let adapter = read_tensors(&tensor_bytes, config, shapes)
            .with_context(|| dir.join(TENSORS_FILE).display().to_string())?;
        let path = dir.join(VALUE_HEAD_FILE);
        if adapter.head().is_some() || !path.exists() {
            return Ok(adapter);
        }
        let bytes = fs::read(&path).map_err(|e| invalid!("{}: {e}", path.display()))?;
        let head = read_value_head(&bytes, shapes.hidden).with_context(|| path.display().to_string())?;
        adapter.with_score_head(Some(head))
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
        check_replaceable(dir)?;
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

    let mut unread: BTreeSet<&str> = file.names().into_iter().collect();
    let mut take = |name: &str, dims: &[usize]| -> Result<Tensor> {
        if !unread.remove(name) {
            return Err(invalid!("{name} is missing, and {CONFIG_FILE} promises it; the adapter is incomplete"));
        }
        read_tensor(&file, name, dims)
    };
    let mut pairs = vec![];
    for slot in lora.select(&shapes)? {
        let (in_features, out_features) = shapes.dims_of(slot);
        let path = shapes.path(slot);
        let (r, scale) = (lora.rank_of(&path), lora.scaling_of(&path));
        let name = |factor| factor_name(&shapes, slot, factor);
        let (a, b) = (take(&name(Factor::A), &[r, in_features])?, take(&name(Factor::B), &[out_features, r])?);
        let magnitude = lora.use_dora.then(|| take(&name(Factor::Magnitude), &[out_features])).transpose()?;
        pairs.push((slot, LoraLayer::new(a, b, scale).with_magnitude(magnitude)));
    }
    let head = match &heads[..] {
        [] => None,
        heads => {
            let places =
                heads.iter().flat_map(|head| ["", ".summary"].map(|of| format!("base_model.model.{head}{of}")));
            let there = |place: &String| file.names().contains(&format!("{place}.weight").as_str());
            // If there is no head, the error message names the first place.
            let place = places.clone().find(there).or(places.clone().next()).unwrap_or_default();
            let (weight, bias) = (format!("{place}.weight"), format!("{place}.bias"));
            let weight = take(&weight, &[1, shapes.hidden])?;
            let bias = match unread.remove(bias.as_str()) {
                true => read_tensor(&file, &bias, &[1])?.to_vec1::<f32>()?[0],
                false => 0.0,
            };
            Some(ScoreHead { weight, bias })
        }
    };
    // PEFT also saves the matrices under branches on embedding and lm_head; `base_tables` reads them.
    for (slot, _) in &pairs {
        unread.remove(table_name(&shapes, *slot).as_str());
    }
    if let Some(name) = unread.first() {
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

fn check_replaceable(dir: &Path) -> Result<()> {
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
mod tests {
    use half::{bf16, f16};
    use safetensors::Dtype;

    use super::*;
    use crate::error::exit_code;
    use crate::model::adapter::{HEAD_WEIGHT, LoraConfig, TargetModules};

    /// The shapes of tests/golden/peft_tiny.py.
    const TINY: LinearShapes = LinearShapes::llama(2, 32, 32, 16, 48);

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft_tiny")
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A copy of the golden reward model's directory, to be damaged.
    struct Spoilt(tempfile::TempDir);

    impl Spoilt {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for file in [CONFIG_FILE, TENSORS_FILE] {
                fs::copy(golden().join("rm").join(file), dir.path().join(file)).unwrap();
            }
            Self(dir)
        }

        fn with(self, key: &str, value: Value) -> Self {
            let path = self.0.path().join(CONFIG_FILE);
            let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            config[key] = value;
            fs::write(&path, config.to_string()).unwrap();
            self
        }

        fn refusal(&self, shapes: LinearShapes) -> String {
            let error = Adapter::load(self.0.path(), shapes).unwrap_err();
            assert_eq!(exit_code(&error), 2, "{error:#}");
            format!("{error:#}")
        }
    }

    #[test]
    fn what_peft_saved_loads_with_every_number() {
        let want: Value = serde_json::from_slice(&fs::read(golden().join("values.json")).unwrap()).unwrap();
        for name in ["lm", "rm"] {
            let adapter = Adapter::load(&golden().join(name), TINY).unwrap();
            let named = adapter.named_tensors();
            assert_eq!(named.len(), want[name].as_object().unwrap().len());
            for (key, tensor) in named {
                let want = &want[name][&key];
                assert_eq!(json!(tensor.dims()), want["shape"], "{key}");
                let sum: f64 = values(tensor).iter().map(|&x| f64::from(x)).sum();
                assert!((sum - want["sum"].as_f64().unwrap()).abs() < 1e-9, "{key}: both sums are of exact f64 terms");
                assert_eq!(*values(tensor).last().unwrap(), want["last"].as_f64().unwrap() as f32, "{key}");
            }
        }
    }

    #[test]
    fn settings_of_peft_are_honoured() {
        let lm = Adapter::load(&golden().join("lm"), TINY).unwrap();
        assert_eq!(lm.pair(1, 6).unwrap().scale, 3.0, "rslora: 6 / sqrt(4)");
        assert!(lm.pair(0, 6).is_none() && lm.pair(1, 1).is_none() && lm.head().is_none());
        let rm = Adapter::load(&golden().join("rm"), TINY).unwrap();
        assert_eq!(rm.pair(0, 1).unwrap().scale, 1.5);
        assert_eq!(rm.head().unwrap().bias, 0.0);
    }

    #[test]
    fn saved_adapters_are_read_back_equal_and_have_equal_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let head = ScoreHead { weight: Tensor::full(0.25f32, (1, 32), &Device::Cpu).unwrap(), bias: -1.5 };
        let config = LoraConfig {
            r: 3,
            lora_alpha: 4.5,
            use_rslora: true,
            target_modules: TargetModules::Regex(r".*\.(k|up)_proj".into()),
            layers_to_transform: Some(vec![1]),
            ..LoraConfig::default()
        };
        let origin = Provenance { base_model: Some("a/base".into()), base_fingerprint: Some("sha256:ab".into()) };
        let start =
            Adapter::init(config, TINY, 9).unwrap().with_provenance(origin).with_score_head(Some(head)).unwrap();
        let bytes = |dir: &Path| [CONFIG_FILE, TENSORS_FILE].map(|f| fs::read(dir.join(f)).unwrap());
        let (one, two) = (dir.path().join("deep/one"), dir.path().join("two"));
        start.save(&one).unwrap();
        start.save(&two).unwrap();
        assert_eq!(bytes(&one), bytes(&two));

        let back = Adapter::load(&one, TINY).unwrap();
        assert_eq!(back.provenance(), start.provenance());
        assert_eq!((back.config().scaling(), back.head().unwrap().bias), (start.config().scaling(), -1.5));
        let (a, b) = (start.named_tensors(), back.named_tensors());
        assert_eq!((a.len(), b.len()), (5, 5));
        for ((name, tensor), (other_name, other)) in a.into_iter().zip(b) {
            assert_eq!((name, values(tensor)), (other_name, values(other)));
        }
        Adapter::load(&golden().join("rm"), TINY).unwrap().save(&one).unwrap();
        assert_eq!(Adapter::load(&one, TINY).unwrap().config().r, 2, "an adapter's directory is replaced");
        let left: Vec<_> = fs::read_dir(dir.path().join("deep")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["one"], "no temporary file is left");
    }

    #[test]
    fn without_bias_and_fingerprint_the_file_has_pefts_tensors_only() {
        let dir = tempfile::tempdir().unwrap();
        Adapter::load(&golden().join("rm"), TINY).unwrap().save(&dir.path().join("rm")).unwrap();
        let ours = fs::read(dir.path().join("rm").join(TENSORS_FILE)).unwrap();
        let theirs = fs::read(golden().join("rm").join(TENSORS_FILE)).unwrap();
        let names = |bytes: &[u8]| {
            let mut names: Vec<String> =
                SafeTensors::deserialize(bytes).unwrap().names().into_iter().map(Into::into).collect();
            names.sort();
            names
        };
        assert_eq!(names(&ours), names(&theirs));
    }

    #[test]
    fn saving_over_other_files_is_refused_and_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let adapter = Adapter::load(&golden().join("lm"), TINY).unwrap();
        let thesis = dir.path().join("thesis.txt");
        fs::write(&thesis, "years").unwrap();
        for target in [dir.path(), thesis.as_path()] {
            let error = adapter.save(target).unwrap_err();
            assert_eq!(exit_code(&error), 2, "{error:#}");
        }
        assert_eq!(fs::read_to_string(&thesis).unwrap(), "years");
    }

    #[test]
    fn settings_that_would_change_the_model_are_refused_by_name() {
        for (key, value) in [
            ("use_dora", json!("yes")),
            ("rank_pattern", json!({"q_proj": "many"})),
            ("alpha_pattern", json!({"q_proj": null})),
            ("rank_pattern", json!(["q_proj"])),
            ("bias", json!("all")),
            ("modules_to_save", json!(["score", "embed_tokens"])),
            ("init_lora_weights", json!("pissa")),
            ("layer_replication", json!([[0, 1]])),
            ("a_setting_of_next_year", json!(7)),
            ("peft_type", json!("LOHA")),
            ("task_type", json!("TOKEN_CLS")),
            ("r", json!(-2)),
            ("lora_alpha", json!("much")),
            ("target_modules", json!(null)),
            ("layers_to_transform", json!(["first"])),
        ] {
            let message = Spoilt::new().with(key, value).refusal(TINY);
            assert!(message.contains(&format!("{key} = ")) && message.contains(CONFIG_FILE), "{message}");
        }
    }

    #[test]
    fn an_adapter_of_another_base_is_refused_with_both_shapes() {
        let message = Spoilt::new().refusal(LinearShapes::llama(2, 32, 32, 16, 64));
        assert!(
            message.contains("gate_proj.lora_B.weight is [48, 2]") && message.contains("needs [64, 2]"),
            "{message}"
        );
        // Shallower base: the second layer's targets match nothing. Wider rank than the base: bounded.
        assert!(Spoilt::new().refusal(LinearShapes::llama(1, 32, 32, 16, 48)).contains("layers.1."));
        assert!(Spoilt::new().with("r", json!(1u64 << 60)).refusal(TINY).contains("rank"));
        let list = json!(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
        let message =
            Spoilt::new().with("target_modules", list.clone()).refusal(LinearShapes::llama(1, 32, 32, 16, 48));
        assert!(message.contains("layers.1.") && message.contains("another base"), "{message}");
        let message = Spoilt::new().with("target_modules", list).refusal(LinearShapes::llama(3, 32, 32, 16, 48));
        assert!(message.contains("layers.2.") && message.contains("missing"), "{message}");
    }

    #[test]
    fn heads_are_read_under_every_name_of_peft_and_trl() {
        let source = fs::read(golden().join("rm").join(TENSORS_FILE)).unwrap();
        let file = SafeTensors::deserialize(&source).unwrap();
        let want = values(&Adapter::load(&golden().join("rm"), TINY).unwrap().head().unwrap().weight);
        for (listed, name) in [
            (json!(["score"]), "score"),
            (json!(["classifier", "score"]), "score"),
            (json!(["classifier", "score"]), "classifier"),
            (json!(["classifier"]), "classifier"),
            (json!(["v_head"]), "v_head.summary"),
            (json!(["v_head"]), "v_head"),
        ] {
            let spoilt = Spoilt::new().with("modules_to_save", listed);
            let renamed: Vec<(String, _)> = file
                .tensors()
                .into_iter()
                .map(|(key, view)| (key.replace("model.score.", &format!("model.{name}.")), view))
                .collect();
            let bytes = safetensors::serialize(renamed, None).unwrap();
            fs::write(spoilt.0.path().join(TENSORS_FILE), bytes).unwrap();
            let adapter = Adapter::load(spoilt.0.path(), TINY).unwrap();
            assert_eq!(values(&adapter.head().unwrap().weight), want, "{name}");
        }
        let message = Spoilt::new().with("modules_to_save", json!(["lm_head"])).refusal(TINY);
        assert!(message.contains("target_modules") && message.contains("score, classifier"), "{message}");
    }

    #[test]
    fn heads_missing_from_the_config_or_the_file_are_refused() {
        let message = Spoilt::new().with("modules_to_save", Value::Null).refusal(TINY);
        assert!(message.contains(HEAD_WEIGHT), "{message}");
        let lm = Spoilt::new();
        fs::copy(golden().join("lm").join(TENSORS_FILE), lm.0.path().join(TENSORS_FILE)).unwrap();
        assert!(lm.refusal(TINY).contains("missing"));
    }

    #[test]
    fn truncated_files_and_nan_are_refused() {
        let spoilt = Spoilt::new();
        let path = spoilt.0.path().join(TENSORS_FILE);
        let whole = fs::read(&path).unwrap();
        for keep in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..keep]).unwrap();
            assert!(spoilt.refusal(TINY).contains("truncated or damaged"), "{keep}");
        }
        let mut nan = whole.clone();
        let end = nan.len();
        nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(&path, &nan).unwrap();
        assert!(spoilt.refusal(TINY).contains("holds NaN"));
        fs::remove_file(&path).unwrap();
        assert!(spoilt.refusal(TINY).contains(TENSORS_FILE));
        fs::write(spoilt.0.path().join(CONFIG_FILE), "{").unwrap();
        fs::write(&path, &whole).unwrap();
        assert!(spoilt.refusal(TINY).contains("JSON"));
    }

    #[test]
    fn half_precision_files_are_read_as_f32() {
        let spoilt = Spoilt::new();
        let path = spoilt.0.path().join(TENSORS_FILE);
        let whole = fs::read(&path).unwrap();
        let source = SafeTensors::deserialize(&whole).unwrap();
        let exact = Adapter::load(spoilt.0.path(), TINY).unwrap();
        for (dtype, relative) in [(Dtype::F16, 1e-3f32), (Dtype::BF16, 8e-3)] {
            let halves: Vec<(String, Vec<usize>, Vec<u8>)> = source
                .tensors()
                .into_iter()
                .map(|(name, view)| {
                    let floats = view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
                    let bytes = floats.flat_map(|x| match dtype {
                        Dtype::F16 => f16::from_f32(x).to_le_bytes(),
                        _ => bf16::from_f32(x).to_le_bytes(),
                    });
                    (name, view.shape().to_vec(), bytes.collect())
                })
                .collect();
            let views = halves.iter().map(|(name, shape, bytes)| {
                (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
            });
            fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
            let half = Adapter::load(spoilt.0.path(), TINY).unwrap();
            for ((name, full), (_, read)) in exact.named_tensors().into_iter().zip(half.named_tensors()) {
                for (x, y) in values(full).into_iter().zip(values(read)) {
                    // Half a unit in the last place of f16 (2^-11) and bf16 (2^-8), and f16's subnormal step.
                    assert!((x - y).abs() <= relative * x.abs() + 6e-8, "{name}: {x} {y}");
                }
            }
        }
    }

    /// `PEFT_OUT=dir cargo test --release --lib -- --ignored writes_adapters_for_python`, then
    /// `python tests/golden/check_peft_loads_ours.py dir/*`.
    #[test]
    #[ignore = "writes files for tests/golden/check_peft_loads_ours.py into $PEFT_OUT"]
    fn writes_adapters_for_python() {
        let out = PathBuf::from(std::env::var("PEFT_OUT").expect("PEFT_OUT names a directory"));
        for (name, targets, layers) in [
            ("lm", TargetModules::Regex(r".*\.(q|gate)_proj".into()), Some(vec![1])),
            ("rm", TargetModules::AllLinear, None),
            ("rm_bias", TargetModules::List(vec!["mlp.up_proj".into()]), Some(vec![0])),
        ] {
            let config = LoraConfig {
                r: 4,
                lora_alpha: 6.0,
                use_rslora: true,
                target_modules: targets,
                layers_to_transform: layers,
                ..LoraConfig::default()
            };
            let mut learner = Adapter::init(config, TINY, 11).unwrap().to_trainable();
            let moved = learner.parameters().unwrap().iter().map(|t| (t + 0.125).unwrap()).collect();
            learner.replace(moved).unwrap();
            let adapter = learner.snapshot();
            let adapter = if name == "lm" { adapter } else { adapter.with_head(3).unwrap() };
            let head = adapter.head().map(|h| ScoreHead { bias: if name == "rm" { 0.0 } else { 2.5 }, ..h.clone() });
            let adapter = adapter.with_score_head(head).unwrap();
            adapter.save(&out.join(name)).unwrap();
        }
    }
}
