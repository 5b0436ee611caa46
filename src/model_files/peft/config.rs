//! `adapter_config.json`: which settings are honoured, which have no effect, and which are refused by name.
//!
//! A setting that is silently ignored would change the model. It does not depend on tensors. Its tests are in `peft/tests.rs`,
//! on whole directories.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use crate::invalid;
use crate::model::adapter::{Adapter, LoraConfig, MatrixLayout, TargetModules};

/// Settings that do not affect what a trained adapter computes.
const HARMLESS: [&str; 13] = [
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    // PEFT itself corrects it by the type of layer.
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Names of a scalar head: transformers' classifiers use the first two, TRL's value models the third.
const HEADS: [&str; 3] = ["score", "classifier", "v_head"];

/// The contents of `adapter_config.json`.
pub(crate) struct FileConfig {
    /// Hyperparameters.
    pub(crate) lora: LoraConfig,
    /// Names of the scalar head in `modules_to_save`; empty if there is none.
    pub(crate) heads: Vec<String>,
    /// `base_model_name_or_path`.
    pub(crate) base_model: Option<String>,
}

/// Parses `adapter_config.json`.
///
/// # Errors
/// If it is not a JSON object, or a setting is invalid or not supported.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<FileConfig> {
    let value: Value = serde_json::from_slice(bytes).map_err(|e| invalid!("not a JSON file: {e}"))?;
    let map = value.as_object().ok_or_else(|| invalid!("not a JSON object"))?;
    let get = |key: &str| map.get(key).filter(|v| !v.is_null());
    if get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(invalid!("peft_type = {} is not LORA, the only supported kind", shown(get("peft_type"))));
    }
    if !matches!(get("task_type").and_then(Value::as_str), None | Some("CAUSAL_LM" | "SEQ_CLS")) {
        return Err(invalid!("task_type = {} is neither CAUSAL_LM nor SEQ_CLS", shown(get("task_type"))));
    }
    let mut heads = vec![];
    for (key, value) in map {
        let honoured = match key.as_str() {
            "peft_type"
            | "r"
            | "lora_alpha"
            | "use_rslora"
            | "target_modules"
            | "exclude_modules"
            | "layers_to_transform"
            | "layers_pattern"
            | "rank_pattern"
            | "alpha_pattern" => true,
            "use_dora" => value.is_null() || value.is_boolean(),
            "bias" => value.is_null() || value == "none",
            "init_lora_weights" => keeps_the_base(value),
            "modules_to_save" => {
                // PEFT lists both names of a classifier's head, whichever the model uses.
                let names: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                if let Some(other) = names.iter().find(|n| !HEADS.contains(n)) {
                    return Err(invalid!(
                        "modules_to_save = {value}: {other} would be a trained copy of a whole layer, and only a scalar \
                         head ({}) can be one; a LoRA branch there is a name in target_modules",
                        HEADS.join(", ")
                    ));
                }
                heads = names.into_iter().map(String::from).collect();
                is_unset(value) || value.is_array()
            }
            key if HARMLESS.contains(&key) => true,
            _ => is_unset(value),
        };
        if !honoured {
            return Err(invalid!(
                "{key} = {value} asks for something that is not supported, and ignoring it would change the model; \
                 only LoRA and DoRA on linear maps, embedding and lm_head, with or without a score head, are supported"
            ));
        }
    }
    let r = get("r").and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok());
    let lora = LoraConfig {
        r: r.ok_or_else(|| invalid!("r = {} is not a rank", shown(get("r"))))?,
        lora_alpha: get("lora_alpha")
            .and_then(Value::as_f64)
            .ok_or_else(|| invalid!("lora_alpha = {} is not a number", shown(get("lora_alpha"))))?,
        use_rslora: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        target_modules: parse_targets("target_modules", get("target_modules"))?,
        exclude_modules: get("exclude_modules").map(|v| parse_targets("exclude_modules", Some(v))).transpose()?,
        layers_to_transform: parse_layers(get("layers_to_transform"))?,
        layers_pattern: parse_layers_pattern(get("layers_pattern"))?,
        rank_pattern: parse_pattern("rank_pattern", get("rank_pattern"), |v| usize::try_from(v.as_u64()?).ok())?,
        alpha_pattern: parse_pattern("alpha_pattern", get("alpha_pattern"), Value::as_f64)?,
        use_dora: get("use_dora").and_then(Value::as_bool).unwrap_or(false),
        ..LoraConfig::default()
    };
    Ok(FileConfig { lora, heads, base_model: get("base_model_name_or_path").and_then(Value::as_str).map(Into::into) })
}

fn parse_targets(key: &str, value: Option<&Value>) -> Result<TargetModules> {
    let bad = || invalid!("{key} = {} is neither a list of names nor a string", shown(value));
    Ok(match value {
        Some(Value::String(all)) if all == "all-linear" && key == "target_modules" => TargetModules::AllLinear,
        Some(Value::String(pattern)) => TargetModules::Regex(pattern.clone()),
        Some(Value::Array(names)) => TargetModules::List(
            names.iter().map(|n| n.as_str().map(Into::into)).collect::<Option<_>>().ok_or_else(bad)?,
        ),
        _ => return Err(bad()),
    })
}

fn parse_pattern<T>(key: &str, value: Option<&Value>, of: impl Fn(&Value) -> Option<T>) -> Result<Vec<(String, T)>> {
    let bad = || invalid!("{key} = {} is not a table from names to numbers", shown(value));
    match value {
        None => Ok(vec![]),
        Some(Value::Object(table)) => {
            table.iter().map(|(name, v)| of(v).map(|v| (name.clone(), v)).ok_or_else(bad)).collect()
        }
        Some(_) => Err(bad()),
    }
}

fn parse_layers(value: Option<&Value>) -> Result<Option<Vec<usize>>> {
    let index = |v: &Value| v.as_u64().and_then(|i| usize::try_from(i).ok());
    let layers = match value {
        None => return Ok(None),
        Some(Value::Array(layers)) => layers.iter().map(index).collect(),
        Some(one) => index(one).map(|i| vec![i]),
    };
    layers.map(Some).ok_or_else(|| invalid!("layers_to_transform = {} is not a list of layers", shown(value)))
}

fn parse_layers_pattern(value: Option<&Value>) -> Result<Vec<String>> {
    let bad = || invalid!("layers_pattern = {} is neither a name nor a list of names", shown(value));
    match value {
        None => Ok(vec![]),
        Some(Value::String(name)) if name.is_empty() => Ok(vec![]),
        Some(Value::String(name)) => Ok(vec![name.clone()]),
        Some(Value::Array(names)) => {
            names.iter().map(|name| name.as_str().map(Into::into)).collect::<Option<_>>().ok_or_else(bad)
        }
        Some(_) => Err(bad()),
    }
}

/// Whether an initialisation keeps the base's weights. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the initial factors
/// from the base, so their adapters do not fit the published base.
fn keeps_the_base(init: &Value) -> bool {
    match init {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => ["gaussian", "eva", "orthogonal"].contains(&name.as_str()),
        _ => false,
    }
}

fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

fn shown(value: Option<&Value>) -> String {
    value.map_or("(missing)".to_string(), Value::to_string)
}

/// Writes `adapter_config.json`.
///
/// # Errors
/// If the config does not fit the adapter's shapes.
pub(crate) fn config_json(adapter: &Adapter) -> Result<Vec<u8>> {
    let config = adapter.config();
    let targets: Value = match (&config.target_modules, &config.layers_to_transform) {
        // As PEFT does, "all-linear" is written as a list; PEFT accepts layers_to_transform only with a list.
        (TargetModules::AllLinear, _) => json!(adapter.shapes().all_linear()),
        (TargetModules::List(list), _) => json!(list),
        (TargetModules::Regex(pattern), None) => json!(pattern),
        (TargetModules::Regex(_), Some(_)) => {
            let selected = config.select(adapter.shapes())?;
            json!(selected.into_iter().map(|slot| adapter.shapes().path(slot)).collect::<Vec<_>>())
        }
    };
    let head = adapter.head().is_some();
    // PEFT declares alpha as an integer; a fractional one is written as it is.
    let alpha = |alpha: f64| match alpha.fract() == 0.0 && alpha < 1e15 {
        true => json!(alpha as i64),
        false => json!(alpha),
    };
    let ranks: serde_json::Map<_, _> = config.rank_pattern.iter().map(|(k, r)| (k.clone(), json!(r))).collect();
    let alphas: serde_json::Map<_, _> = config.alpha_pattern.iter().map(|(k, a)| (k.clone(), alpha(*a))).collect();
    let mut fields: BTreeMap<&str, Value> = BTreeMap::from([
        ("base_model_name_or_path", json!(adapter.provenance().base_model)),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(adapter.shapes().layout == MatrixLayout::InOut)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("layers_to_transform", json!(config.layers_to_transform)),
        ("alpha_pattern", json!(alphas)),
        ("lora_alpha", alpha(config.lora_alpha)),
        ("rank_pattern", json!(ranks)),
        ("lora_dropout", json!(0.0)),
        ("modules_to_save", if head { json!(["score"]) } else { Value::Null }),
        ("peft_type", json!("LORA")),
        ("r", json!(config.r)),
        ("target_modules", targets),
        ("task_type", json!(if head { "SEQ_CLS" } else { "CAUSAL_LM" })),
        ("use_dora", json!(config.use_dora)),
        ("use_rslora", json!(config.use_rslora)),
    ]);
    // Only where they are set: most adapters have neither.
    if let Some(excluded) = &config.exclude_modules {
        fields.insert(
            "exclude_modules",
            match excluded {
                TargetModules::List(list) => json!(list),
                TargetModules::Regex(pattern) => json!(pattern),
                TargetModules::AllLinear => Value::Null,
            },
        );
    }
    if !config.layers_pattern.is_empty() {
        fields.insert("layers_pattern", json!(config.layers_pattern));
    }
    let mut text = serde_json::to_vec_pretty(&fields)?;
    text.push(b'\n');
    Ok(text)
}
