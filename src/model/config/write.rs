//! [`DecoderConfig`] -> a config.json that transformers reads.
//!
//! Exports need it for models that were opened from a GGUF file. It does not depend on writing files. Read `hf.rs` for the
//! inverse.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{DecoderConfig, Family, LayerRope, Placement};
use crate::invalid;

impl DecoderConfig {
    /// This configuration as a config.json, with the keys of its family.
    ///
    /// # Errors
    /// If the rope scaling is a list of divisors that config.json cannot express.
    pub fn to_hf_json(&self) -> Result<String> {
        let scaling = self.rope_scaling.to_json(self.rope_theta, self.rotary_dim).ok_or_else(|| {
            invalid!(
                "{}: its factors of rotary frequencies are not Llama 3.1's scaling of a context of 8192, so no \
                 config.json can be written; start from the Hugging Face release of the model instead",
                self.model_name
            )
        })?;
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        let names = self.names();
        let mut keys: Map<String, Value> = Map::new();
        let mut put = |key: &str, value: Value| {
            keys.insert(key.into(), value);
        };
        put("architectures", json!([names.architecture]));
        put("model_type", json!(names.model_type));
        put("_name_or_path", json!(self.model_name));
        put("vocab_size", json!(self.vocab_size));
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("bos_token_id", json!(self.bos_token_id));
        put("eos_token_id", eos);
        let window = self.layers.iter().find_map(|l| l.window);
        let sliding = |l: &super::LayerAttention| l.window.is_some();
        let types = self.layers.iter().map(|l| if sliding(l) { "sliding_attention" } else { "full_attention" });
        match self.family {
            Family::Gpt2 => {
                put("n_embd", json!(self.hidden_size));
                put("n_layer", json!(self.num_hidden_layers));
                put("n_head", json!(self.num_attention_heads));
                put("n_inner", json!(self.intermediate_size));
                put("n_positions", json!(self.max_position_embeddings));
                put("layer_norm_epsilon", json!(self.norm_eps));
                put("activation_function", json!("gelu_new"));
                return Ok(serde_json::to_string_pretty(&keys)?);
            }
            Family::GptNeo => {
                let kinds = self.layers.iter().map(|l| if sliding(l) { "local" } else { "global" });
                put("hidden_size", json!(self.hidden_size));
                put("intermediate_size", json!(self.intermediate_size));
                put("num_layers", json!(self.num_hidden_layers));
                put("num_heads", json!(self.num_attention_heads));
                put("attention_types", json!([[kinds.collect::<Vec<_>>(), 1]]));
                put("window_size", json!(window.unwrap_or(256)));
                put("max_position_embeddings", json!(self.max_position_embeddings));
                put("layer_norm_epsilon", json!(self.norm_eps));
                put("activation_function", json!("gelu_new"));
                return Ok(serde_json::to_string_pretty(&keys)?);
            }
            Family::Opt => put("ffn_dim", json!(self.intermediate_size)),
            _ => put("intermediate_size", json!(self.intermediate_size)),
        }
        put("hidden_size", json!(self.hidden_size));
        put("num_hidden_layers", json!(self.num_hidden_layers));
        put("num_attention_heads", json!(self.num_attention_heads));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        if self.family == Family::GptNeoX {
            put("layer_norm_eps", json!(self.norm_eps));
            put("hidden_act", json!("gelu"));
            put("rotary_pct", json!(self.rotary_dim as f64 / self.head_dim as f64));
            put("rotary_emb_base", json!(self.rope_theta));
            put("use_parallel_residual", json!(self.placement == Placement::Parallel));
            put("attention_bias", json!(self.biases.qkv));
            return Ok(serde_json::to_string_pretty(&keys)?);
        }
        put("num_key_value_heads", json!(self.num_key_value_heads));
        put("head_dim", json!(self.head_dim));
        put("rms_norm_eps", json!(self.norm_eps));
        put("rope_theta", json!(self.rope_theta));
        put("rope_scaling", scaling);
        match self.family {
            Family::Gemma | Family::Gemma2 | Family::Gemma3 => {
                put("hidden_activation", json!("gelu_pytorch_tanh"));
                put("attention_bias", json!(self.biases.qkv));
            }
            _ => put("hidden_act", json!("silu")),
        }
        match self.family {
            Family::Llama => {
                put("attention_bias", json!(self.biases.qkv));
                put("mlp_bias", json!(self.biases.mlp));
            }
            Family::Mistral | Family::Phi3 => put("sliding_window", json!(window)),
            Family::Qwen2 | Family::Qwen3 => {
                put("use_sliding_window", json!(window.is_some()));
                put("sliding_window", json!(window));
                put("layer_types", json!(types.collect::<Vec<_>>()));
                if self.family == Family::Qwen3 {
                    put("attention_bias", json!(self.biases.qkv));
                }
            }
            Family::Gemma2 | Family::Gemma3 => {
                put("query_pre_attn_scalar", json!((1.0 / self.attention_multiplier.powi(2)).round()));
                put("sliding_window", json!(window));
                put("layer_types", json!(types.collect::<Vec<_>>()));
                put("attn_logit_softcapping", json!(self.attention_soft_cap));
                put("final_logit_softcapping", json!(self.logits_soft_cap));
                if let Some(theta) = self.local_rope_theta {
                    put("rope_local_base_freq", json!(theta));
                }
            }
            Family::SmolLm3 => {
                let turns = self.layers.iter().map(|l| u8::from(l.rope != LayerRope::None));
                put("no_rope_layers", json!(turns.collect::<Vec<_>>()));
            }
            Family::Granite => {
                put("embedding_multiplier", json!(self.embedding_multiplier));
                put("attention_multiplier", json!(self.attention_multiplier));
                put("residual_multiplier", json!(self.residual_multiplier));
                put("logits_scaling", json!(1.0 / self.logits_multiplier));
            }
            _ => {}
        }
        if self.rotary_dim != self.head_dim {
            put("partial_rotary_factor", json!(self.rotary_dim as f64 / self.head_dim as f64));
        }
        Ok(serde_json::to_string_pretty(&keys)?)
    }
}
