//! The architecture keys of a GGUF file made from a Hugging Face model, as llama.cpp's converter writes them.
//!
//! A decoder that the format cannot express is refused by name. It does not depend on weights or on a tokenizer. Read `gguf.rs`
//! for the file, `model_files/gguf_config.rs` for the reader of these keys.

use anyhow::Result;
use serde_json::Value;

use super::gguf_container::KeyValue;
use crate::invalid;
use crate::model::config::{DecoderConfig, Family, LayerAttention, Placement, RopeScaling};
use crate::model_files::ModelFiles;

/// Metadata keys, in the order in which they are written.
pub(super) type Keys = Vec<(String, KeyValue)>;

/// Appends a key.
pub(super) fn put(keys: &mut Keys, key: &str, value: KeyValue) {
    keys.push((key.to_string(), value));
}

fn number(value: usize) -> KeyValue {
    KeyValue::U32(u32::try_from(value).unwrap_or(u32::MAX))
}

/// `general.architecture` of a Hugging Face model of this family.
///
/// # Errors
/// If llama.cpp does not have the architecture.
pub(super) fn name(config: &DecoderConfig) -> Result<&'static str> {
    Ok(match config.family {
        // Mistral differs from Llama by the window only, which llama.cpp ignores.
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
        Family::Gemma => "gemma",
        Family::Gemma2 => "gemma2",
        Family::Gemma3 => "gemma3",
        Family::Phi3 => "phi3",
        Family::Olmo2 => "olmo2",
        Family::Granite => "granite",
        Family::SmolLm3 => "smollm3",
        Family::Gpt2 => "gpt2",
        Family::GptNeoX => "gptneox",
        Family::Opt | Family::GptNeo => {
            return Err(invalid!(
                "{}: llama.cpp has no {} architecture, so there is no GGUF of it; use `--format safetensors`",
                config.model_name,
                config.names().model_type
            ));
        }
    })
}

/// The context length for which llama.cpp computes this model: where it ignores windows, at most the window.
fn context(config: &DecoderConfig) -> usize {
    let window = match config.family {
        Family::Gemma2 | Family::Gemma3 | Family::Phi3 => None,
        _ => config.layers.iter().filter_map(|l| l.window).min(),
    };
    config.max_position_embeddings.min(window.unwrap_or(usize::MAX))
}

/// The keys of the architecture.
///
/// # Errors
/// If llama.cpp has no architecture of the family.
pub(super) fn keys(config: &DecoderConfig) -> Result<Keys> {
    let architecture = name(config)?;
    let mut keys = vec![];
    put(&mut keys, "general.architecture", KeyValue::String(architecture.into()));
    put(&mut keys, "general.type", KeyValue::String("model".into()));
    put(&mut keys, "general.name", KeyValue::String(config.model_name.clone()));
    let mut own = |key: &str, value: KeyValue| put(&mut keys, &format!("{architecture}.{key}"), value);
    for (key, value) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", context(config)),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("vocab_size", config.vocab_size),
    ] {
        own(key, number(value));
    }
    let eps = match config.family {
        Family::Gpt2 | Family::GptNeoX => "attention.layer_norm_epsilon",
        _ => "attention.layer_norm_rms_epsilon",
    };
    own(eps, KeyValue::F32(config.norm_eps as f32));
    if config.family != Family::Gpt2 {
        own("rope.dimension_count", number(config.rotary_dim));
        own("rope.freq_base", KeyValue::F32(config.rope_theta as f32));
    }
    if let Some(theta) = config.local_rope_theta {
        own("rope.freq_base_swa", KeyValue::F32(theta as f32));
    }
    match config.family {
        Family::GptNeoX => own("use_parallel_residual", KeyValue::Bool(config.placement == Placement::Parallel)),
        Family::Granite => {
            for (key, value) in [
                ("embedding_scale", config.embedding_multiplier),
                ("residual_scale", config.residual_multiplier),
                ("attention.scale", config.attention_multiplier),
                ("logit_scale", 1.0 / config.logits_multiplier),
            ] {
                own(key, KeyValue::F32(value as f32));
            }
        }
        // 0 means no window.
        Family::Phi3 => {
            own("attention.sliding_window", number(config.layers.iter().find_map(|l| l.window).unwrap_or(0)));
        }
        Family::Gemma2 | Family::Gemma3 => {
            if let Some(window) = config.layers.iter().find_map(|l| l.window) {
                own("attention.sliding_window", number(window));
            }
            let slides: Vec<bool> = config.layers.iter().map(|l| l.window.is_some()).collect();
            let every = if config.family == Family::Gemma2 { 2 } else { 6 };
            if slides.iter().enumerate().any(|(i, &slides)| slides == (i + 1).is_multiple_of(every)) {
                own("attention.sliding_window_pattern", KeyValue::Bools(slides));
            }
            for (key, cap) in [
                ("attn_logit_softcapping", config.attention_soft_cap),
                ("final_logit_softcapping", config.logits_soft_cap),
            ] {
                if let Some(cap) = cap {
                    own(key, KeyValue::F32(cap as f32));
                }
            }
        }
        _ => {}
    }
    match &config.rope_scaling {
        RopeScaling::Linear { factor } => {
            own("rope.scaling.type", KeyValue::String("linear".into()));
            own("rope.scaling.factor", KeyValue::F32(*factor as f32));
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, .. } => {
            own("rope.scaling.type", KeyValue::String("yarn".into()));
            own("rope.scaling.factor", KeyValue::F32(*factor as f32));
            own("rope.scaling.original_context_length", number(*original_max_position_embeddings));
            own("rope.scaling.yarn_beta_fast", KeyValue::F32(*beta_fast as f32));
            own("rope.scaling.yarn_beta_slow", KeyValue::F32(*beta_slow as f32));
        }
        RopeScaling::Divisors { attention_factor, .. } if config.family == Family::Phi3 => {
            own("rope.scaling.original_context_length", number(config.max_position_embeddings));
            own("rope.scaling.attn_factor", KeyValue::F32(*attention_factor as f32));
        }
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Divisors { .. } => {}
    }
    Ok(keys)
}

/// Tensors of divisors of the rotary frequencies: (name, (rotary_dim / 2) numbers).
///
/// # Errors
/// If llama.cpp's architecture does not read any, or config.json lacks Phi-3's factors for long contexts.
pub(super) fn rope_factors(files: &ModelFiles) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let config = files.config();
    match (&config.rope_scaling, config.family) {
        (RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn { .. }, _) => Ok(vec![]),
        (RopeScaling::Divisors { divisors, .. }, Family::Phi3) => Ok(vec![
            ("rope_factors_long.weight", long_factors(files)?),
            ("rope_factors_short.weight", divisors.clone()),
        ]),
        (_, Family::Llama | Family::Mistral | Family::Granite) if config.rope_scaling.attention_factor() == 1.0 => {
            let plain = |i: usize| config.rope_theta.powf(-((2 * i) as f64) / config.rotary_dim as f64);
            let divisors = |(i, f): (usize, f32)| (plain(i) / f64::from(f)) as f32;
            Ok(vec![("rope_freqs.weight", config.inv_freq().into_iter().enumerate().map(divisors).collect())])
        }
        _ => Err(cannot(config, "its scaling of the rotary frequencies")),
    }
}

/// Phi-3's divisors above its original context, from config.json: the decoder's configuration does not have them.
fn long_factors(files: &ModelFiles) -> Result<Vec<f32>> {
    let side_files = files.side_files()?;
    let json = side_files.iter().find(|(name, _)| name == "config.json").map(|(_, bytes)| &bytes[..]);
    let json: Value = json.and_then(|bytes| serde_json::from_slice(bytes).ok()).unwrap_or_default();
    let of = |key: &str| json[key]["long_factor"].as_array();
    let factors = of("rope_parameters").or_else(|| of("rope_scaling")).into_iter().flatten();
    let factors: Vec<f32> = factors.filter_map(|f| Some(f.as_f64()? as f32)).collect();
    if factors.len() != files.config().rotary_dim / 2 {
        return Err(invalid!("config.json: long_factor has not {} numbers", files.config().rotary_dim / 2));
    }
    Ok(factors)
}

fn cannot(config: &DecoderConfig, what: &str) -> anyhow::Error {
    invalid!(
        "{}: {what} cannot be expressed in a GGUF file of a {} model; use `--format safetensors`",
        config.model_name,
        config.names().model_type
    )
}

/// Compares the decoder's configuration with the one read back from the written file. It also finds differences that appear
/// only beyond the lengths at which logits are compared.
///
/// # Errors
/// If anything differs; the message names it.
pub(super) fn same_decoder(config: &DecoderConfig, written: &DecoderConfig) -> Result<()> {
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * a.abs();
    let maybe = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => close(a, b),
        (a, b) => a.is_none() && b.is_none(),
    };
    let frequencies = |a: Vec<f32>, b: Vec<f32>| {
        // Divisors are stored as f32.
        a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs())
    };
    // A window not shorter than the written context has no effect.
    let effective = |c: &DecoderConfig| -> Vec<LayerAttention> {
        let whole = |w: &usize| *w < written.max_position_embeddings;
        c.layers.iter().map(|l| LayerAttention { window: l.window.filter(whole), ..*l }).collect()
    };
    let rotary = config.learned_positions.is_none();
    for (same, what) in [
        (config.activation == written.activation, "its activation"),
        (config.biases == written.biases, "which of its maps have a bias"),
        (config.placement == written.placement && config.norm == written.norm, "the placement of its norms"),
        (config.qk_norm == written.qk_norm, "its norms of queries and keys"),
        (effective(config) == effective(written), "which layers have a window or rotary embeddings"),
        (maybe(config.attention_soft_cap, written.attention_soft_cap), "its soft cap of attention"),
        (maybe(config.logits_soft_cap, written.logits_soft_cap), "its soft cap of the logits"),
        (close(config.attention_multiplier, written.attention_multiplier), "what it multiplies attention by"),
        (close(config.embedding_multiplier, written.embedding_multiplier), "what it multiplies embeddings by"),
        (close(config.residual_multiplier, written.residual_multiplier), "what it multiplies residuals by"),
        (close(config.logits_multiplier, written.logits_multiplier), "what it multiplies logits by"),
        (close(config.norm_eps, written.norm_eps), "the epsilon of its norms"),
        (!rotary || config.rotary_dim == written.rotary_dim, "its number of rotary dimensions"),
        (!rotary || frequencies(config.inv_freq(), written.inv_freq()), "its rotary frequencies"),
        (!rotary || frequencies(config.local_inv_freq(), written.local_inv_freq()), "its local rotary frequencies"),
        (
            close(config.rope_scaling.attention_factor(), written.rope_scaling.attention_factor()),
            "the factor that its rope scaling multiplies attention by",
        ),
    ] {
        if !same {
            return Err(cannot(config, what));
        }
    }
    Ok(())
}
