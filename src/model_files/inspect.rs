//! Describes a model directory, a GGUF file of a model or an adapter, or a PEFT adapter directory, as JSON and as text for people.
//!
//! It serves the command `inspect`. It does not depend on `ModelFiles`: a model without a readable tokenizer can be
//! described. Read `contents.rs` next.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Result;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use crate::invalid;
use crate::model::config::RopeScaling;
use crate::model_files::contents::{FileContents, FileOrigin};
use crate::model_files::convert;
use crate::model_files::gguf::Gguf;
use crate::model_files::peft::VALUE_HEAD_FILE;
use crate::model_files::tensor_table::map;

/// Describes the files at `path`: an adapter if there is an adapter_config.json or it is a GGUF file of one, otherwise a model.
///
/// # Errors
/// If they cannot be read. A model whose tokenizer cannot be read is described with the reason.
pub fn inspect(path: &Path) -> Result<Value> {
    if path.join("adapter_config.json").exists() {
        return inspect_adapter(path);
    }
    // A file that cannot be read is the model's to report.
    let file = Some(path).filter(|path| path.is_file()).and_then(|path| Gguf::open(path).ok());
    match file {
        Some(file) if file.is_adapter() => inspect_gguf_adapter(path, &file),
        Some(file) => inspect_model(path, &FileContents::of_gguf(path, file)?),
        None => inspect_model(path, &FileContents::open(path)?),
    }
}

/// Describes an adapter that llama.cpp reads: two matrices `NAME.lora_a` and `NAME.lora_b` for each tensor of the base that has a
/// branch.
fn inspect_gguf_adapter(path: &Path, file: &Gguf) -> Result<Value> {
    let mut by_type: BTreeMap<&str, Count> = BTreeMap::new();
    let mut total = Count::default();
    let (mut layers, mut targets, mut ranks) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::<usize>::new());
    for tensor in file.tensors() {
        let parameters: usize = tensor.shape.iter().product();
        let bytes = tensor.range.len();
        by_type.entry(tensor.dtype.name()).or_default().add(parameters, bytes);
        total.add(parameters, bytes);
        let Some((of, factor)) = tensor.name.rsplit_once(".lora_") else { continue };
        if factor == "a" {
            ranks.extend(tensor.shape.first());
        }
        let of = of.trim_end_matches(".weight");
        match of.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((layer, name)) => {
                layers.insert(layer);
                targets.insert(name);
            }
            None => drop(targets.insert(of)),
        }
    }
    Ok(json!({
        "path": path.display().to_string(),
        "kind": "gguf-lora",
        "container": format!("GGUF version {}", file.version()),
        "architecture": file.string("general.architecture")?,
        "name": file.string("general.name")?,
        "adapter_type": file.string("adapter.type")?,
        "r": ranks,
        "lora_alpha": file.float("adapter.lora.alpha")?,
        "target_tensors": targets,
        "layers": layers.len(),
        "parameters": total.parameters,
        "bytes": total.bytes,
        "tensors": total.tensors,
        "types": counts_json(&by_type),
        "notes": ["an adapter for llama.cpp (--lora) beside the GGUF file of its base; commands here take the folder with \
                   adapter_config.json that it was made from"],
    }))
}

/// Names of scalar and classification heads beside a decoder: transformers' and TRL's.
const HEADS: [&str; 3] = ["score", "classifier", "v_head"];

fn inspect_model(path: &Path, contents: &FileContents) -> Result<Value> {
    let config = &contents.config;
    let mut by_type: BTreeMap<&str, Count> = BTreeMap::new();
    let mut total = Count::default();
    for (name, shape, dtype) in contents.tensors() {
        let parameters: usize = shape.iter().product();
        // The container was checked against the file's size when it was opened.
        let bytes = dtype.bytes_for(parameters).ok_or_else(|| invalid!("tensor {name} is of no whole blocks"))?;
        by_type.entry(dtype.name()).or_default().add(parameters, bytes);
        total.add(parameters, bytes);
    }
    let tokenizer = match contents.read_tokenizer() {
        Ok(t) => json!({
            "kind": t.kind(),
            "size": t.vocab_size(),
            "bos": t.bos_id().and_then(|id| t.token(id)),
            "eos": t.eos_id().and_then(|id| t.token(id)),
            "chat_template": t.chat_template().is_some(),
        }),
        Err(e) => json!({"error": format!("{e:#}")}),
    };
    let (kind, container) = match &contents.origin {
        FileOrigin::Gguf(_, gguf) => ("gguf", format!("GGUF version {}", gguf.version())),
        _ => ("huggingface", "safetensors".to_owned()),
    };
    let rope_scaling = match &config.rope_scaling {
        RopeScaling::None => json!("none"),
        RopeScaling::Linear { factor } => json!(format!("linear, factor {factor}")),
        RopeScaling::Llama3 { factor, .. } => json!(format!("llama3, factor {factor}")),
        RopeScaling::Yarn { factor, .. } => json!(format!("yarn, factor {factor}")),
        RopeScaling::Divisors { .. } => json!("divisors"),
    };
    let unread = match contents.unread() {
        Ok(unread) => {
            let entries = unread.into_iter().map(|(name, kind)| (name.to_owned(), kind.describe().into()));
            Value::Object(entries.collect())
        }
        Err(e) => json!({"error": format!("{e:#}")}),
    };
    let head: Vec<Value> = contents
        .tensors()
        .filter(|(name, ..)| HEADS.iter().any(|head| name.strip_prefix(head).is_some_and(|rest| rest.starts_with('.'))))
        .map(|(name, shape, _)| json!({"name": name, "shape": shape}))
        .collect();
    let mut described = json!({
        "path": path.display().to_string(),
        "kind": kind,
        "container": container,
        "architecture": config.names().model_type,
        "name": config.model_name,
        "dimensions": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": config.tie_word_embeddings,
        },
        "parameters": total.parameters,
        "bytes": total.bytes,
        "tensors": total.tensors,
        "types": counts_json(&by_type),
        "unread_tensors": unread,
        "notes": contents.notes,
        "tokenizer": tokenizer,
        "files": contents.files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>(),
        "fingerprint": contents.fingerprint(),
    });
    if !head.is_empty() {
        described["head"] = head.into();
    }
    Ok(described)
}

fn inspect_adapter(dir: &Path) -> Result<Value> {
    let config_path = dir.join("adapter_config.json");
    let text =
        fs::read_to_string(&config_path).map_err(|e| invalid!("{} cannot be read: {e}", config_path.display()))?;
    let config: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| invalid!("{} is not a JSON object: {e}", config_path.display()))?;
    let weights = dir.join("adapter_model.safetensors");
    if !weights.exists() {
        return Err(invalid!(
            "{} has an adapter_config.json and no adapter_model.safetensors{}",
            dir.display(),
            convert::pickled(dir, "adapter_model.bin")
        ));
    }
    let mut by_type: BTreeMap<String, Count> = BTreeMap::new();
    let mut total = Count::default();
    let mut head = Vec::new();
    let mut layers = BTreeSet::new();
    let mut count = |name: &str, view: &TensorView<'_>| {
        // A matrix of the base, which PEFT saves with a branch on the embedding or lm_head.
        if name.contains(".base_layer.") {
            return;
        }
        let parameters: usize = view.shape().iter().product();
        by_type.entry(format!("{:?}", view.dtype()).to_lowercase()).or_default().add(parameters, view.data().len());
        total.add(parameters, view.data().len());
        // PEFT saves a sequence classifier's head with the factors, under the model's name for it.
        if !name.contains(".lora_") && !name.contains("lora_embedding") {
            head.push(json!({"name": name, "shape": view.shape()}));
        }
        if let Some((_, rest)) = name.split_once("layers.") {
            layers.extend(rest.split('.').next().and_then(|n| n.parse::<u32>().ok()));
        }
    };
    // TRL and LLaMA-Factory keep a scalar head in a file of its own.
    let value_head = Some(dir.join(VALUE_HEAD_FILE)).filter(|path| path.is_file());
    for path in [Some(weights), value_head].into_iter().flatten() {
        let bytes = map(&path)?;
        let file = SafeTensors::deserialize(bytes.get())
            .map_err(|e| invalid!("{} is not a whole safetensors file ({e})", path.display()))?;
        file.iter().for_each(|(name, view)| count(name, &view));
    }
    head.sort_by_key(|h| h["name"].to_string());
    let get = |key: &str| config.get(key).cloned().unwrap_or(Value::Null);
    Ok(json!({
        "path": dir.display().to_string(),
        "kind": "adapter",
        "peft_type": get("peft_type"),
        "task_type": get("task_type"),
        "base_model": get("base_model_name_or_path"),
        "r": get("r"),
        "lora_alpha": get("lora_alpha"),
        "use_dora": get("use_dora"),
        "target_modules": get("target_modules"),
        "modules_to_save": get("modules_to_save"),
        "layers": layers.len(),
        "parameters": total.parameters,
        "bytes": total.bytes,
        "tensors": total.tensors,
        "types": counts_json(&by_type),
        "head": head,
    }))
}

#[derive(Default)]
struct Count {
    tensors: usize,
    parameters: usize,
    bytes: usize,
}

impl Count {
    fn add(&mut self, parameters: usize, bytes: usize) {
        self.tensors += 1;
        self.parameters += parameters;
        self.bytes += bytes;
    }
}

fn counts_json<K: AsRef<str>>(counts: &BTreeMap<K, Count>) -> Value {
    let entry = |c: &Count| json!({"tensors": c.tensors, "parameters": c.parameters, "bytes": c.bytes});
    Value::Object(counts.iter().map(|(dtype, c)| (dtype.as_ref().to_owned(), entry(c))).collect())
}

/// The JSON of [`inspect`] as lines for people: `name  value`, nested names indented.
pub fn render(described: &Value) -> String {
    let mut out = String::new();
    if let Some(map) = described.as_object() {
        render_map(map, 0, &mut out);
    }
    out
}

fn render_map(map: &Map<String, Value>, depth: usize, out: &mut String) {
    let width = map.keys().map(String::len).max().unwrap_or(0);
    for (key, value) in map {
        let label = format!("{:indent$}{key:width$}", "", indent = 2 * depth);
        // Writing to a string cannot fail.
        let _ = match value {
            Value::Object(inner) if key == "types" => {
                let line = |(dtype, c): (&String, &Value)| {
                    format!("{dtype} x{} ({})", c["tensors"], human_bytes(c["bytes"].as_u64().unwrap_or(0)))
                };
                writeln!(out, "{label}  {}", inner.iter().map(line).collect::<Vec<_>>().join(", "))
            }
            Value::Object(inner) if inner.is_empty() => writeln!(out, "{label}  -"),
            Value::Object(inner) => {
                let _ = writeln!(out, "{}", label.trim_end());
                render_map(inner, depth + 1, out);
                Ok(())
            }
            Value::Number(n) if key == "bytes" => writeln!(out, "{label}  {}", human_bytes(n.as_u64().unwrap_or(0))),
            Value::Number(n) if key == "parameters" => writeln!(out, "{label}  {}", grouped(n.as_u64().unwrap_or(0))),
            other => writeln!(out, "{label}  {}", plain(other)),
        };
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(b) => if *b { "yes" } else { "no" }.to_owned(),
        Value::String(s) => s.clone(),
        Value::Array(list) if list.is_empty() => "-".to_owned(),
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Object(map) => map.values().map(plain).collect::<Vec<_>>().join(" "),
        Value::Number(n) => n.to_string(),
    }
}

fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

fn human_bytes(n: u64) -> String {
    match n {
        0..=9_999 => format!("{n} B"),
        10_000..=9_999_999 => format!("{:.1} kB", n as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_files::tests::{directory, gguf};
    use safetensors::Dtype;

    #[test]
    fn directories_and_gguf_files_are_described_with_their_counts() {
        let dir = directory();
        let described = inspect(dir.path()).unwrap();
        assert_eq!(described["kind"], "huggingface");
        assert_eq!((&described["parameters"], &described["tensors"]), (&json!(32 + 8 + 64), &json!(3)));
        assert_eq!(described["types"], json!({"f32": {"tensors": 3, "parameters": 104, "bytes": 416}}));
        assert_eq!(described["tokenizer"]["kind"], "WordLevel");
        assert_eq!(described["tokenizer"]["chat_template"], false);
        let path = dir.path().join("m.gguf");
        fs::write(&path, gguf()).unwrap();
        let described = inspect(&path).unwrap();
        assert_eq!((&described["kind"], &described["name"]), (&json!("gguf"), &json!("tiny")));
        assert_eq!(described["tokenizer"]["eos"], "<end>");
        let text = render(&described);
        assert!(text.contains("f32 x3 (416 B)") && text.contains("  hidden_size"), "{text}");
    }

    #[test]
    fn a_model_without_a_tokenizer_is_described_with_the_reason() {
        let dir = directory();
        fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        let described = inspect(dir.path()).unwrap();
        assert!(described["tokenizer"]["error"].as_str().unwrap().contains("no tokenizer.json"));
    }

    #[test]
    fn an_adapter_is_described_with_rank_targets_and_head() {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]});
        fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        assert!(inspect(dir.path()).unwrap_err().to_string().contains("adapter_model.safetensors"));
        let prefix = "base_model.model.model.layers.4.self_attn.q_proj";
        let (a, b, head) = (vec![0u8; 2 * 8 * 4], vec![0u8; 8 * 2 * 4], vec![0u8; 8 * 4]);
        let views = [
            (format!("{prefix}.lora_A.weight"), TensorView::new(Dtype::F32, vec![2, 8], &a).unwrap()),
            (format!("{prefix}.lora_B.weight"), TensorView::new(Dtype::F32, vec![8, 2], &b).unwrap()),
            ("base_model.model.score.weight".to_owned(), TensorView::new(Dtype::F32, vec![1, 8], &head).unwrap()),
        ];
        let bytes = safetensors::serialize(views, None).unwrap();
        fs::write(dir.path().join("adapter_model.safetensors"), &bytes).unwrap();
        let described = inspect(dir.path()).unwrap();
        assert_eq!(
            (&described["r"], &described["lora_alpha"], &described["layers"]),
            (&json!(2), &json!(8), &json!(1))
        );
        assert_eq!(described["parameters"], 16 + 16 + 8);
        assert_eq!(described["head"], json!([{"name": "base_model.model.score.weight", "shape": [1, 8]}]));
        assert!(render(&described).contains("q_proj"));
        // TRL's file beside it.
        let bias = 1.5f32.to_le_bytes();
        let views = [
            ("v_head.summary.weight", TensorView::new(Dtype::F32, vec![1, 8], &head).unwrap()),
            ("v_head.summary.bias", TensorView::new(Dtype::F32, vec![1], &bias).unwrap()),
        ];
        let value_head = dir.path().join(VALUE_HEAD_FILE);
        fs::write(&value_head, safetensors::serialize(views, None).unwrap()).unwrap();
        let described = inspect(dir.path()).unwrap();
        let names: Vec<&Value> = described["head"].as_array().unwrap().iter().map(|head| &head["name"]).collect();
        assert_eq!(names, ["base_model.model.score.weight", "v_head.summary.bias", "v_head.summary.weight"]);
        assert_eq!(described["parameters"], 16 + 16 + 8 + 8 + 1);
        fs::remove_file(value_head).unwrap();
        for len in (0..bytes.len()).step_by(64) {
            fs::write(dir.path().join("adapter_model.safetensors"), &bytes[..len]).unwrap();
            assert!(inspect(dir.path()).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn numbers_are_formatted_for_people() {
        assert_eq!((grouped(134_515_008).as_str(), grouped(7).as_str()), ("134 515 008", "7"));
        assert_eq!((human_bytes(98_362_432).as_str(), human_bytes(416).as_str()), ("98.4 MB", "416 B"));
    }
}
