//! What a Llama-family checkpoint says about its own shape: from config.json or from GGUF metadata, checked.
//! Knows no tensor and no file; it computes one thing, the rotary frequencies. Read checkpoint.rs next.

use std::f64::consts::PI;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::invalid;
use crate::model::gguf::Gguf;

/// How the rotary frequencies 1 / theta^(2i/d) are changed to reach longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by `factor` (arXiv:2306.15595).
    Linear {
        /// New context over old.
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// What the longest wavelengths are stretched by.
        factor: f64,
        /// Wavelengths past `original_max_position_embeddings / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before the stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// Frequency i divided by the i-th number: what a GGUF keeps of the kind above (`rope_freqs.weight`).
    Divisors(Vec<f32>),
}

/// The shape of a Llama-family decoder. Every number has been checked.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// Any of these ends a response. From config.json and generation_config.json, without repeats.
    pub eos_token_ids: Vec<u32>,
    pub model_name: String,
}

/// Upper bounds that no llama comes near: they keep products of two dimensions far from overflow.
const MAX_DIM: usize = 1 << 22;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;

impl DecoderConfig {
    /// Reads config.json and, where there is one, generation_config.json. `source` is what errors call the model.
    ///
    /// # Errors
    /// If either is no JSON object, the architecture is not Llama's, or a number is missing or cannot be.
    pub fn from_hf(config: &str, generation_config: Option<&str>, source: &str) -> Result<Self> {
        let file = format!("{source}/config.json");
        let root = object(config, &file)?;
        let json = Reader { json: &root, file: &file };
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
        if !matches!(model_type, "llama" | "mistral") {
            return Err(invalid!(
                "{file}: model_type = {model_type:?} is not supported; llama, and mistral without a sliding window, are"
            ));
        }
        if model_type == "mistral" && !matches!(json.get("sliding_window"), Some(Value::Null)) {
            // A missing key is no absent window: transformers' default for mistral is a window of 4096.
            return Err(invalid!("{file}: mistral with a sliding window is not supported; null is, in newer releases"));
        }
        for bias in ["attention_bias", "mlp_bias"] {
            if json.get(bias).and_then(Value::as_bool) == Some(true) {
                return Err(invalid!("{file}: {bias} = true is not supported: the decoder's linear layers have none"));
            }
        }
        if let Some(act) = json.get("hidden_act").and_then(Value::as_str).filter(|&a| a != "silu") {
            return Err(invalid!("{file}: hidden_act = {act:?} is not supported; silu is"));
        }
        if json.get("quantization_config").is_some_and(|q| !q.is_null()) {
            return Err(invalid!(
                "{file}: it has a quantization_config; use the unquantised release of the model, or a GGUF file of it"
            ));
        }
        let (hidden_size, heads) = (json.size("hidden_size")?, json.size("num_attention_heads")?);
        let generation = generation_config.map(|text| object(text, &format!("{source}/generation_config.json")));
        let generation = generation.transpose()?.unwrap_or_default();
        let mut eos = Vec::new();
        for (from, name) in [(&generation, "generation_config.json"), (&root, "config.json")] {
            for id in token_ids(from.get("eos_token_id"), &format!("{source}/{name}: eos_token_id"))? {
                if !eos.contains(&id) {
                    eos.push(id);
                }
            }
        }
        let name = json.get("_name_or_path").and_then(Value::as_str).filter(|n| !n.is_empty()).unwrap_or(source);
        let (rope_theta, rope_scaling) = json.rope()?;
        Self {
            vocab_size: json.size("vocab_size")?,
            hidden_size,
            intermediate_size: json.size("intermediate_size")?,
            num_hidden_layers: json.size("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: json.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: match json.optional_size("head_dim")? {
                Some(dim) => dim,
                None => whole_heads(hidden_size, heads, &file)?,
            },
            max_position_embeddings: json.optional_size("max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: json.float("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: json.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            bos_token_id: token_ids(json.get("bos_token_id"), &format!("{file}: bos_token_id"))?.first().copied(),
            eos_token_ids: eos,
            model_name: name.rsplit('/').next().unwrap_or(name).to_owned(),
        }
        .checked(&file)
    }

    /// Reads a GGUF file's metadata (`llama.*`, `tokenizer.ggml.*_token_id`) and its `rope_freqs.weight`.
    ///
    /// # Errors
    /// If the architecture is not llama, or a number is missing or cannot be.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let file = gguf.name();
        let architecture = gguf.string("general.architecture")?.unwrap_or("(none)");
        if architecture != "llama" {
            return Err(invalid!("{file}: general.architecture = {architecture:?} is not supported; llama is"));
        }
        let optional = |key: &str| -> Result<Option<usize>> {
            let value = gguf.unsigned(&format!("llama.{key}"))?;
            Ok(value.map(|v| usize::try_from(v).unwrap_or(usize::MAX)))
        };
        let required = |key: &str| -> Result<usize> {
            optional(key)?.ok_or_else(|| invalid!("{file}: the metadata key llama.{key} is missing"))
        };
        if optional("expert_count")?.unwrap_or(0) > 0 {
            return Err(invalid!("{file}: a mixture of experts is not supported; dense llama models are"));
        }
        let (hidden_size, heads) = (required("embedding_length")?, required("attention.head_count")?);
        let head_dim = match optional("attention.key_length")? {
            Some(dim) => dim,
            None => whole_heads(hidden_size, heads, file)?,
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(dim) = optional(key)?.filter(|&d| d != head_dim) {
                return Err(invalid!(
                    "{file}: llama.{key} = {dim} differs from the head size {head_dim}: not supported"
                ));
            }
        }
        let embedding = gguf.tensor("token_embd.weight").filter(|t| t.shape.len() == 2);
        let embedding = embedding.ok_or_else(|| invalid!("{file}: the tensor token_embd.weight is missing"))?;
        let token = |key: &str| -> Result<Option<u32>> {
            let id = gguf.unsigned(&format!("tokenizer.ggml.{key}"))?;
            id.map(|id| u32::try_from(id).map_err(|_| invalid!("{file}: tokenizer.ggml.{key} = {id} is no token")))
                .transpose()
        };
        let mut eos = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            if let Some(id) = token(key)?.filter(|id| !eos.contains(id)) {
                eos.push(id);
            }
        }
        Self {
            vocab_size: embedding.shape[0],
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_hidden_layers: required("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            max_position_embeddings: required("context_length")?,
            rms_norm_eps: gguf
                .float("llama.attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| invalid!("{file}: llama.attention.layer_norm_rms_epsilon is missing"))?,
            rope_theta: gguf.float("llama.rope.freq_base")?.unwrap_or(10_000.0),
            rope_scaling: gguf_rope_scaling(gguf)?,
            tie_word_embeddings: gguf.tensor("output.weight").is_none(),
            bos_token_id: token("bos_token_id")?,
            eos_token_ids: eos,
            model_name: gguf.string("general.name")?.unwrap_or("llama").to_owned(),
        }
        .checked(file)
    }

    fn checked(self, file: &str) -> Result<Self> {
        for (name, value, most) in [
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("hidden_size", self.hidden_size, MAX_DIM),
            ("intermediate_size", self.intermediate_size, MAX_DIM),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_DIM),
            ("num_key_value_heads", self.num_key_value_heads, MAX_DIM),
            ("head_dim", self.head_dim, 1 << 14),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 31),
        ] {
            if value == 0 || value > most {
                return Err(invalid!("{file}: {name} = {value} is not between 1 and {most}"));
            }
        }
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv != 0 {
            return Err(invalid!("{file}: {heads} attention heads cannot share {kv} key/value heads evenly"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid!("{file}: head_dim = {} is odd; rotary embeddings turn pairs", self.head_dim));
        }
        if heads * self.head_dim > MAX_DIM {
            return Err(invalid!("{file}: {heads} heads of {} are more than {MAX_DIM} wide", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(invalid!("{file}: rms_norm_eps = {} is not between 0 and 1", self.rms_norm_eps));
        }
        if !(self.rope_theta > 1.0 && self.rope_theta < 1e12) {
            return Err(invalid!("{file}: rope_theta = {} is not between 1 and 1e12", self.rope_theta));
        }
        let scaling_is_usable = match &self.rope_scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => positive(*factor) && positive(*low) && positive(*high) && high > low && *original > 0,
            RopeScaling::Divisors(d) => {
                d.len() == self.head_dim / 2 && d.iter().all(|&x| x > 0.0 && f64::from(x).is_finite())
            }
        };
        if !scaling_is_usable {
            return Err(invalid!(
                "{file}: the rope scaling {:?} cannot be: factors are positive and finite, high_freq_factor is above \
                 low_freq_factor, and a GGUF's rope_freqs.weight has head_dim / 2 = {} numbers",
                self.rope_scaling,
                self.head_dim / 2
            ));
        }
        let ids = self.eos_token_ids.iter().chain(&self.bos_token_id);
        if let Some(id) = ids.into_iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(invalid!("{file}: the special token {id} is outside of the vocabulary of {}", self.vocab_size));
        }
        Ok(self)
    }

    /// Rotary inverse frequencies, radians per position, (head_dim / 2): 1 / theta^(2i / head_dim), scaled.
    /// Source: transformers `modeling_rope_utils.py`; computed in f64, so the last bits are better than its f32.
    pub fn inv_freq(&self) -> Vec<f32> {
        let plain = |i: usize| self.rope_theta.powf(-((2 * i) as f64) / self.head_dim as f64);
        (0..self.head_dim / 2)
            .map(|i| match &self.rope_scaling {
                RopeScaling::None => plain(i),
                RopeScaling::Linear { factor } => plain(i) / factor,
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                    let original = *original_max_position_embeddings as f64;
                    llama3(plain(i), *factor, *low_freq_factor, *high_freq_factor, original)
                }
                RopeScaling::Divisors(divisors) => plain(i) / f64::from(divisors[i]),
            } as f32)
            .collect()
    }

    /// This configuration as a config.json that transformers reads: for exports, and for models read from a GGUF.
    ///
    /// # Errors
    /// If the scaling is a list of divisors that no config.json can express.
    pub fn to_hf_json(&self) -> Result<String> {
        let scaling = match &self.rope_scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                llama3_json(*factor, *low_freq_factor, *high_freq_factor, *original_max_position_embeddings)
            }
            RopeScaling::Divisors(divisors) => self.divisors_as_llama3(divisors).ok_or_else(|| {
                invalid!(
                    "{}: its rope_freqs.weight is not Llama 3.1's scaling of a context of 8192, so no config.json can \
                     be written; start from the Hugging Face release of the model instead",
                    self.model_name
                )
            })?,
        };
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        Ok(serde_json::to_string_pretty(&json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "_name_or_path": self.model_name,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "attention_bias": false,
            "mlp_bias": false,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
        }))?)
    }

    /// The llama3 scaling whose divisors these are, with the constants every published model uses (1, 4, 8192).
    fn divisors_as_llama3(&self, divisors: &[f32]) -> Option<Value> {
        let (low, high, original) = (1.0, 4.0, 8192);
        let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
        let fits = divisors.iter().enumerate().all(|(i, &d)| {
            let plain = self.rope_theta.powf(-((2 * i) as f64) / self.head_dim as f64);
            let want = plain / llama3(plain, factor, low, high, original as f64);
            // llama.cpp computes the divisors in f32 through a cancelling difference: four digits are what is left.
            (f64::from(d) - want).abs() < 1e-3 * want
        });
        fits.then(|| llama3_json(factor, low, high, original))
    }
}

fn positive(x: f64) -> bool {
    x > 0.0 && x.is_finite()
}

/// Llama 3.1's stretch of one frequency.
fn llama3(freq: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / freq;
    if wavelength < original / high {
        freq
    } else if wavelength > original / low {
        freq / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * freq / factor + smooth * freq
    }
}

fn llama3_json(factor: f64, low: f64, high: f64, original: usize) -> Value {
    json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    })
}

fn gguf_rope_scaling(gguf: &Gguf) -> Result<RopeScaling> {
    let file = gguf.name();
    if let Some(tensor) = gguf.tensor("rope_freqs.weight") {
        let bytes = gguf.tensor_bytes(tensor).filter(|_| tensor.dtype == crate::ops::weight::StoredType::F32);
        let bytes = bytes.ok_or_else(|| invalid!("{file}: rope_freqs.weight is not stored as f32"))?;
        let divisors = bytes.get().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        return Ok(RopeScaling::Divisors(divisors.collect()));
    }
    match gguf.string("llama.rope.scaling.type")? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => match gguf.float("llama.rope.scaling.factor")? {
            Some(factor) => Ok(RopeScaling::Linear { factor }),
            None => Err(invalid!("{file}: llama.rope.scaling.factor is missing")),
        },
        Some(other) => Err(invalid!("{file}: llama.rope.scaling.type = {other:?} is not supported; linear is")),
    }
}

fn whole_heads(hidden: usize, heads: usize, file: &str) -> Result<usize> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(invalid!("{file}: a hidden size of {hidden} cannot be split over {heads} attention heads"));
    }
    Ok(hidden / heads)
}

fn object(text: &str, file: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(invalid!("{file} is not a JSON object")),
        Err(e) => Err(invalid!("{file} is not JSON: {e}")),
    }
}

/// One token id or a list of them; null and absent are none.
fn token_ids(value: Option<&Value>, what: &str) -> Result<Vec<u32>> {
    let one = |v: &Value| {
        v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| invalid!("{what}: {v} is not a token id"))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => Ok(vec![one(id)?]),
    }
}

/// config.json with errors that name the key.
struct Reader<'a> {
    json: &'a Map<String, Value>,
    file: &'a str,
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let size = value.as_u64().and_then(|v| usize::try_from(v).ok());
                size.map(Some).ok_or_else(|| invalid!("{}: {key} = {value} is not a positive integer", self.file))
            }
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| invalid!("{}: the key {key} is missing", self.file))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                value.as_f64().map(Some).ok_or_else(|| invalid!("{}: {key} = {value} is not a number", self.file))
            }
        }
    }

    /// (theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        let empty = Map::new();
        let new = self.get("rope_parameters").and_then(Value::as_object);
        let old = self.get("rope_scaling").and_then(Value::as_object);
        let rope = Reader { json: new.or(old).unwrap_or(&empty), file: self.file };
        let theta = match rope.float("rope_theta")? {
            Some(theta) => theta,
            None => self.float("rope_theta")?.unwrap_or(10_000.0),
        };
        if let Some(part) = rope.float("partial_rotary_factor")?.filter(|&p| p != 1.0) {
            return Err(invalid!("{}: partial_rotary_factor = {part} is not supported; 1 is", self.file));
        }
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        let need = |key: &str| -> Result<f64> {
            rope.float(key)?.ok_or_else(|| invalid!("{}: rope scaling {kind:?} needs {key}", self.file))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: rope.size("original_max_position_embeddings")?,
            },
            other => {
                return Err(invalid!(
                    "{}: rope scaling {other:?} is not supported; default, linear and llama3 are",
                    self.file
                ));
            }
        };
        Ok((theta, scaling))
    }
}

#[cfg(test)]
mod tests;
