//! config.json and generation_config.json -> [`DecoderConfig`], for every supported family.
//!
//! A missing key has transformers' default. It does not depend on reading files: it takes their texts. Read
//! `model_files/gguf_config.rs` for GGUF files.

use std::sync::LazyLock;

use anyhow::Result;
use serde_json::{Map, Value};

use super::rope::yarn_attention_factor;
use super::{
    Biases, DecoderConfig, Family, LayerRope, Mlp, NormStyle, Placement, QkNorm, Qkv, RopeScaling, Sizes, whole_heads,
};
use crate::invalid;
use crate::ops::activation::Activation;

impl DecoderConfig {
    /// Parses config.json and, if there is one, generation_config.json. `source` is the model's name in error messages: its folder,
    /// or the path of a JSON file that stands alone.
    ///
    /// # Errors
    /// If either is not a JSON object, the family is not supported, or a number is missing or out of range.
    pub fn from_hf(config: &str, generation_config: Option<&str>, source: &str) -> Result<Self> {
        let of_folder =
            |name: &str| if source.ends_with(".json") { source.to_owned() } else { format!("{source}/{name}") };
        let file = of_folder("config.json");
        let root = object(config, &file)?;
        let json = Reader { json: &root, file: &file };
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
        let family = Family::of_model_type(model_type).ok_or_else(|| {
            invalid!("{file}: model_type = {model_type:?} is not supported; {} are", Family::model_types())
        })?;
        if json.get("quantization_config").is_some_and(|q| !q.is_null()) {
            return Err(invalid!(
                "{file}: it has a quantization_config; use the unquantised release of the model, or a GGUF file of it"
            ));
        }
        let mut c = json.family(family)?;
        let generation = generation_config.map(|text| object(text, &of_folder("generation_config.json")));
        let generation = generation.transpose()?.unwrap_or_default();
        for (from, name) in [(&generation, "generation_config.json"), (&root, "config.json")] {
            for id in token_ids(from.get("eos_token_id"), &format!("{}: eos_token_id", of_folder(name)))? {
                if !c.eos_token_ids.contains(&id) {
                    c.eos_token_ids.push(id);
                }
            }
        }
        c.bos_token_id = token_ids(json.get("bos_token_id"), &format!("{file}: bos_token_id"))?.first().copied();
        let name = json.get("_name_or_path").and_then(Value::as_str).filter(|n| !n.is_empty()).unwrap_or(source);
        c.model_name = name.rsplit('/').next().unwrap_or(name).to_owned();
        c.checked(&file)
    }
}

pub(super) fn object(text: &str, file: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(invalid!("{file} is not a JSON object")),
        Err(e) => Err(invalid!("{file} is not JSON: {e}")),
    }
}

/// Parses one token id or a list of them; null or a missing key is an empty list.
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

/// Typed access to config.json, with errors that name the key.
struct Reader<'a> {
    json: &'a Map<String, Value>,
    file: &'a str,
}

impl<'a> Reader<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(|value| {
                let size = value.as_u64().and_then(|v| usize::try_from(v).ok());
                size.ok_or_else(|| invalid!("{}: {key} = {value} is not a positive integer", self.file))
            })
            .transpose()
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| invalid!("{}: the key {key} is missing", self.file))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|value| value.as_f64().ok_or_else(|| invalid!("{}: {key} = {value} is not a number", self.file)))
            .transpose()
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |value| {
            value.as_bool().ok_or_else(|| invalid!("{}: {key} = {value} is neither true nor false", self.file))
        })
    }

    fn unsupported(&self, key: &str, supported: &str) -> anyhow::Error {
        let value = self.json.get(key).map_or("(missing)".to_owned(), Value::to_string);
        invalid!("{}: {key} = {value} is not supported; {supported} is", self.file)
    }

    /// An activation by transformers' name (`ACT2FN`).
    fn activation(&self, key: &str, default: Activation) -> Result<Activation> {
        match self.get(key).map(|v| v.as_str().unwrap_or_default()) {
            None => Ok(default),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            Some(_) => Err(self.unsupported(key, "one of silu, gelu, gelu_new, gelu_pytorch_tanh, relu")),
        }
    }

    fn family(&self, family: Family) -> Result<DecoderConfig> {
        let mut c = self.common(family)?;
        c.family = family;
        c.tie_word_embeddings = self.flag(
            "tie_word_embeddings",
            matches!(
                family,
                Family::Gemma
                    | Family::Gemma2
                    | Family::Gemma3
                    | Family::SmolLm3
                    | Family::Gpt2
                    | Family::GptNeo
                    | Family::Opt
            ),
        )?;
        match family {
            Family::Llama => {
                let attention = self.flag("attention_bias", false)?;
                c.biases = Biases { qkv: attention, attention_out: attention, mlp: self.flag("mlp_bias", false)? };
            }
            Family::Mistral => {
                // A missing key does not mean no window: transformers' default is a window of 4096.
                let window = match self.json.get("sliding_window") {
                    None => Some(4096),
                    Some(_) => self.optional_size("sliding_window")?,
                };
                c.layers.iter_mut().for_each(|l| l.window = window);
            }
            Family::Qwen2 => {
                c.biases.qkv = true;
                self.late_windows(&mut c)?;
            }
            Family::Qwen3 => {
                let bias = self.flag("attention_bias", false)?;
                (c.biases.qkv, c.biases.attention_out) = (bias, bias);
                c.qk_norm = QkNorm::PerHead;
                self.late_windows(&mut c)?;
            }
            Family::Gemma | Family::Gemma2 | Family::Gemma3 => self.gemma(&mut c)?,
            Family::Phi3 => {
                (c.qkv, c.mlp) = (Qkv::EndToEnd, Mlp::GatedFused);
                let window = self.optional_size("sliding_window")?;
                c.layers.iter_mut().for_each(|l| l.window = window);
            }
            Family::Olmo2 => {
                (c.placement, c.qk_norm) = (Placement::Inner, QkNorm::Whole);
                let bias = self.flag("attention_bias", false)?;
                (c.biases.qkv, c.biases.attention_out) = (bias, bias);
            }
            Family::Granite => {
                let bias = self.flag("attention_bias", false)?;
                c.biases = Biases { qkv: bias, attention_out: bias, mlp: self.flag("mlp_bias", false)? };
                c.embedding_multiplier = self.float("embedding_multiplier")?.unwrap_or(1.0);
                c.attention_multiplier = self.float("attention_multiplier")?.unwrap_or(1.0);
                c.residual_multiplier = self.float("residual_multiplier")?.unwrap_or(1.0);
                c.logits_multiplier = 1.0 / self.float("logits_scaling")?.unwrap_or(1.0);
            }
            Family::SmolLm3 => {
                let bias = self.flag("attention_bias", false)?;
                c.biases = Biases { qkv: bias, attention_out: bias, mlp: self.flag("mlp_bias", false)? };
                self.layers_without_rope(&mut c)?;
            }
            Family::Gpt2 => {
                for (key, usual) in [
                    ("scale_attn_weights", true),
                    ("scale_attn_by_inverse_layer_idx", false),
                    ("add_cross_attention", false),
                ] {
                    if self.flag(key, usual)? != usual {
                        return Err(self.unsupported(key, if usual { "true" } else { "false" }));
                    }
                }
                (c.qkv, c.mlp) = (Qkv::EndToEnd, Mlp::Plain);
                c.learned_positions = Some(0);
            }
            Family::GptNeo => {
                c.mlp = Mlp::Plain;
                c.biases = Biases { qkv: false, attention_out: true, mlp: true };
                c.learned_positions = Some(0);
                // GPT-Neo does not scale attention scores.
                c.attention_multiplier = 1.0;
                self.global_and_local(&mut c)?;
            }
            Family::GptNeoX => {
                (c.qkv, c.mlp) = (Qkv::PerHead, Mlp::Plain);
                if self.flag("use_parallel_residual", true)? {
                    c.placement = Placement::Parallel;
                }
                let bias = self.flag("attention_bias", true)?;
                c.biases = Biases { qkv: bias, attention_out: bias, mlp: true };
            }
            Family::Opt => {
                if !self.flag("layer_norm_elementwise_affine", true)? {
                    return Err(self.unsupported("layer_norm_elementwise_affine", "true"));
                }
                c.mlp = Mlp::Plain;
                let bias = self.flag("enable_bias", true)?;
                c.biases = Biases { qkv: bias, attention_out: bias, mlp: bias };
                let before = self.flag("do_layer_norm_before", true)?;
                c.placement = if before { Placement::Before } else { Placement::AfterSum };
                c.final_norm = before && !self.flag("_remove_final_layer_norm", false)?;
                c.learned_positions = Some(2);
                c.embedding_width = self.optional_size("word_embed_proj_dim")?.unwrap_or(c.hidden_size);
            }
        }
        if matches!(family, Family::Gpt2 | Family::GptNeo | Family::GptNeoX | Family::Opt) {
            c.norm = NormStyle::Layer;
        }
        if matches!(family, Family::Gpt2) {
            c.biases = Biases { qkv: true, attention_out: true, mlp: true };
        }
        if c.learned_positions.is_some() {
            c.layers.iter_mut().for_each(|l| l.rope = LayerRope::None);
        }
        Ok(c)
    }

    /// The fields that all families have, under each family's keys and with its defaults.
    fn common(&self, family: Family) -> Result<DecoderConfig> {
        let classic = family == Family::Gpt2;
        let key = |usual: &'static str, gpt2: &'static str| if classic { gpt2 } else { usual };
        let hidden = self.size(key("hidden_size", "n_embd"))?;
        let neo = |usual: &'static str, own: &'static str| if family == Family::GptNeo { own } else { usual };
        let heads = self.size(neo(key("num_attention_heads", "n_head"), "num_heads"))?;
        let intermediate = match family {
            Family::Gpt2 => self.optional_size("n_inner")?.unwrap_or(hidden.saturating_mul(4)),
            Family::GptNeo => self.optional_size("intermediate_size")?.unwrap_or(hidden.saturating_mul(4)),
            Family::Opt => self.size("ffn_dim")?,
            _ => self.size("intermediate_size")?,
        };
        let head_dim = match (self.optional_size("head_dim")?, family) {
            (Some(dim), _) => dim,
            (None, Family::Gemma | Family::Gemma2 | Family::Gemma3) => 256,
            (None, Family::Qwen3) => 128,
            (None, _) => whole_heads(hidden, heads, self.file)?,
        };
        let sizes = Sizes {
            vocab: self.size("vocab_size")?,
            hidden,
            intermediate,
            layers: self.size(neo(key("num_hidden_layers", "n_layer"), "num_layers"))?,
            heads,
            kv_heads: match family {
                Family::Gpt2 | Family::GptNeo | Family::GptNeoX | Family::Opt => heads,
                _ => self.optional_size("num_key_value_heads")?.unwrap_or(heads),
            },
            head_dim,
            positions: match self.optional_size(key("max_position_embeddings", "n_positions"))? {
                Some(n) => n,
                None if classic => 1024,
                None => 2048,
            },
        };
        let mut c = DecoderConfig::llama(sizes, self.file)?;
        let (eps, default) = match family {
            Family::Gpt2 | Family::GptNeo => ("layer_norm_epsilon", 1e-5),
            Family::GptNeoX => ("layer_norm_eps", 1e-5),
            Family::Opt => ("", 1e-5),
            Family::Phi3 | Family::Olmo2 => ("rms_norm_eps", 1e-5),
            _ => ("rms_norm_eps", 1e-6),
        };
        c.norm_eps = self.float(eps)?.unwrap_or(default);
        c.activation = match family {
            Family::Gpt2 | Family::GptNeo => self.activation("activation_function", Activation::GeluTanh)?,
            Family::Opt => self.activation("activation_function", Activation::Relu)?,
            Family::GptNeoX => self.activation("hidden_act", Activation::Gelu)?,
            Family::Gemma | Family::Gemma2 | Family::Gemma3 => Activation::GeluTanh,
            _ => self.activation("hidden_act", Activation::Silu)?,
        };
        if !matches!(family, Family::Gpt2 | Family::GptNeo | Family::Opt) {
            self.rope(family, &mut c)?;
        }
        Ok(c)
    }

    fn gemma(&self, c: &mut DecoderConfig) -> Result<()> {
        // Every release uses the tanh approximation, even where its config.json says gelu.
        for key in ["hidden_activation", "hidden_act"] {
            if !matches!(self.activation(key, Activation::GeluTanh)?, Activation::Gelu | Activation::GeluTanh) {
                return Err(self.unsupported(key, "gelu_pytorch_tanh"));
            }
        }
        if self.flag("use_bidirectional_attention", false)? {
            return Err(self.unsupported("use_bidirectional_attention", "false"));
        }
        c.norm = NormStyle::RmsPlusOne;
        c.embedding_multiplier = (c.hidden_size as f64).sqrt();
        let bias = self.flag("attention_bias", false)?;
        (c.biases.qkv, c.biases.attention_out) = (bias, bias);
        if c.family == Family::Gemma {
            return Ok(());
        }
        c.placement = Placement::Around;
        c.attention_multiplier = 1.0 / self.float("query_pre_attn_scalar")?.unwrap_or(256.0).sqrt();
        let (attention, logits) = if c.family == Family::Gemma2 { (Some(50.0), Some(30.0)) } else { (None, None) };
        // null means no cap; a missing key means the family's default.
        let cap = |key: &str, default| if self.json.contains_key(key) { self.float(key) } else { Ok(default) };
        c.attention_soft_cap = cap("attn_logit_softcapping", attention)?;
        c.logits_soft_cap = cap("final_logit_softcapping", logits)?;
        let every = match c.family {
            Family::Gemma2 => 2,
            _ => self.optional_size("sliding_window_pattern")?.unwrap_or(6),
        };
        self.windows(c, Some(4096), |i| !(i + 1).is_multiple_of(every.max(1)))?;
        if c.family == Family::Gemma3 {
            c.qk_norm = QkNorm::PerHead;
            c.layers.iter_mut().filter(|l| l.window.is_some()).for_each(|l| l.rope = LayerRope::Local);
        }
        Ok(())
    }

    /// Sets windows on the layers that `layer_types` lists, or, if it is missing, on those for which `usually` holds.
    fn windows(&self, c: &mut DecoderConfig, default: Option<usize>, usually: impl Fn(usize) -> bool) -> Result<()> {
        let window = self.optional_size("sliding_window")?.or(default);
        let types = self.get("layer_types").and_then(Value::as_array);
        if types.is_some_and(|t| t.len() != c.layers.len()) {
            return Err(invalid!("{}: layer_types does not name {} layers", self.file, c.layers.len()));
        }
        for (i, layer) in c.layers.iter_mut().enumerate() {
            let sliding = match types.map(|t| t[i].as_str().unwrap_or_default()) {
                None => usually(i),
                Some("sliding_attention") => true,
                Some("full_attention") => false,
                Some(_) => return Err(self.unsupported("layer_types", "sliding_attention and full_attention")),
            };
            layer.window = window.filter(|_| sliding);
        }
        Ok(())
    }

    /// Sets Qwen's windows: from layer `max_window_layers` on, if `use_sliding_window` is set.
    fn late_windows(&self, c: &mut DecoderConfig) -> Result<()> {
        if !self.flag("use_sliding_window", false)? {
            return Ok(());
        }
        let first = self.optional_size("max_window_layers")?.unwrap_or(28);
        self.windows(c, Some(4096), |i| i >= first)
    }

    /// Parses GPT-Neo's `attention_types`: (list of kinds, repetitions); a local layer has a window of `window_size` keys.
    fn global_and_local(&self, c: &mut DecoderConfig) -> Result<()> {
        let window = self.optional_size("window_size")?.unwrap_or(256);
        let mut kinds: Vec<&str> = vec![];
        match self.get("attention_types").and_then(Value::as_array) {
            None => kinds.extend(["global", "local"].repeat(12)),
            Some(runs) => {
                for run in runs {
                    let names = run.get(0).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
                    let names: Vec<&str> = names.collect();
                    let times = run.get(1).and_then(Value::as_u64).unwrap_or(0);
                    // Repetitions are bounded by the number of layers.
                    for _ in 0..times.min(c.layers.len() as u64) {
                        kinds.extend(&names);
                    }
                }
            }
        }
        if kinds.len() != c.layers.len() || kinds.iter().any(|k| !["global", "local"].contains(k)) {
            return Err(invalid!(
                "{}: attention_types does not name global or local for each of {} layers",
                self.file,
                c.layers.len()
            ));
        }
        for (layer, kind) in c.layers.iter_mut().zip(kinds) {
            layer.window = (kind == "local").then_some(window);
        }
        Ok(())
    }

    /// Parses SmolLM 3's `no_rope_layers`: 0 is a layer without rotary embeddings.
    fn layers_without_rope(&self, c: &mut DecoderConfig) -> Result<()> {
        let every = self.optional_size("no_rope_layer_interval")?.unwrap_or(4).max(1);
        let list = self.get("no_rope_layers").and_then(Value::as_array);
        if list.is_some_and(|l| l.len() != c.layers.len()) {
            return Err(invalid!("{}: no_rope_layers does not name {} layers", self.file, c.layers.len()));
        }
        for (i, layer) in c.layers.iter_mut().enumerate() {
            let turns = list.map_or(!(i + 1).is_multiple_of(every), |l| l[i] != 0);
            layer.rope = if turns { LayerRope::Global } else { LayerRope::None };
        }
        if self.flag("use_sliding_window", false)? {
            let without: Vec<bool> = c.layers.iter().map(|l| l.rope == LayerRope::None).collect();
            self.windows(c, None, |i| without[i])?;
        }
        Ok(())
    }

    /// Parses theta, scaling and rotary dimensions, from `rope_parameters` (transformers 5) or the older keys.
    fn rope(&self, family: Family, c: &mut DecoderConfig) -> Result<()> {
        static EMPTY: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        let map = |v: &'a Value| v.as_object();
        let new = self.get("rope_parameters").and_then(map);
        let mut rope =
            Reader { json: new.or(self.get("rope_scaling").and_then(map)).unwrap_or(&EMPTY), file: self.file };
        let theta = match family {
            Family::SmolLm3 => 2e6,
            Family::Gemma3 => 1e6,
            _ => 1e4,
        };
        let theta_key = if family == Family::GptNeoX { "rotary_emb_base" } else { "rope_theta" };
        if family == Family::Gemma3 {
            c.local_rope_theta = Some(self.float("rope_local_base_freq")?.unwrap_or(1e4));
            // Gemma 3 has one set of parameters per kind of layer.
            if let Some(local) = rope.get("sliding_attention").and_then(map) {
                let local = Reader { json: local, file: self.file };
                if local.get("rope_type").is_some_and(|t| t != "default") {
                    return Err(invalid!("{}: scaled rope on layers with a window is not supported", self.file));
                }
                c.local_rope_theta = local.float("rope_theta")?.or(c.local_rope_theta);
            }
            if let Some(full) = rope.get("full_attention").and_then(map) {
                rope.json = full;
            }
        }
        c.rope_theta = match rope.float("rope_theta")? {
            Some(theta) => theta,
            None => self.float(theta_key)?.unwrap_or(theta),
        };
        let partial = match (rope.float("partial_rotary_factor")?, family) {
            (Some(part), _) => part,
            (None, Family::GptNeoX) => self.float("rotary_pct")?.unwrap_or(0.25),
            (None, _) => self.float("partial_rotary_factor")?.unwrap_or(1.0),
        };
        if !(partial > 0.0 && partial <= 1.0) {
            return Err(invalid!("{}: partial_rotary_factor = {partial} is not between 0 and 1", self.file));
        }
        c.rotary_dim = (c.head_dim as f64 * partial) as usize;
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        let need = |key: &str| -> Result<f64> {
            rope.float(key)?.ok_or_else(|| invalid!("{}: rope scaling {kind:?} needs {key}", self.file))
        };
        let original = || -> Result<usize> {
            match rope.optional_size("original_max_position_embeddings")? {
                Some(n) => Ok(n),
                None => {
                    Ok(self.optional_size("original_max_position_embeddings")?.unwrap_or(c.max_position_embeddings))
                }
            }
        };
        c.rope_scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: rope.size("original_max_position_embeddings")?,
            },
            "yarn" if family != Family::Phi3 => {
                if rope.get("mscale").is_some() || rope.get("mscale_all_dim").is_some() {
                    return Err(invalid!("{}: yarn with mscale is not supported; attention_factor is", self.file));
                }
                let original = original()?;
                let factor = match rope.float("factor")? {
                    Some(factor) => factor,
                    None => c.max_position_embeddings as f64 / original.max(1) as f64,
                };
                RopeScaling::Yarn {
                    factor,
                    attention_factor: match rope.float("attention_factor")? {
                        Some(given) => given,
                        None => yarn_attention_factor(factor),
                    },
                    beta_fast: rope.float("beta_fast")?.unwrap_or(32.0),
                    beta_slow: rope.float("beta_slow")?.unwrap_or(1.0),
                    truncate: rope.flag("truncate", true)?,
                    original_max_position_embeddings: original,
                }
            }
            // Phi-3's first releases call longrope "su" or "yarn".
            "longrope" | "su" | "yarn" => {
                let original = original()?;
                let factors = rope.get("short_factor").and_then(Value::as_array);
                let factors = factors.and_then(|f| f.iter().map(|x| x.as_f64().map(|x| x as f32)).collect());
                let divisors: Vec<f32> =
                    factors.ok_or_else(|| invalid!("{}: rope scaling {kind:?} needs short_factor", self.file))?;
                let factor = c.max_position_embeddings as f64 / original.max(1) as f64;
                let attention_factor = match rope.float("attention_factor")? {
                    Some(given) => given,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
                };
                // The long factors apply above the original context and would change the rotations of a sequence's first
                // tokens while it grows; so the context is limited to the original one.
                c.max_position_embeddings = c.max_position_embeddings.min(original);
                RopeScaling::Divisors { divisors, attention_factor }
            }
            other => {
                return Err(invalid!(
                    "{}: rope scaling {other:?} is not supported; default, linear, llama3, yarn and longrope are",
                    self.file
                ));
            }
        };
        Ok(())
    }
}
