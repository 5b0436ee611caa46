//! What llama.cpp's GGUF files call a decoder's tensors, and how they order their rows.
//!
//! Source: llama.cpp `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`. It does not depend on the GGUF container.
//! Read `names.rs` for Hugging Face's names, `model_files/gguf.rs` for the container.

use super::{DecoderConfig, Family, NormStyle, QkNorm};
use crate::ops::weight::RowOrder;

/// Hugging Face's name of a GGUF file's tensor; `None` for a tensor that a decoder of this configuration does not have.
pub fn hf_name(config: &DecoderConfig, gguf_name: &str) -> Option<String> {
    let names = config.names();
    match gguf_name {
        "token_embd.weight" => return Some(names.embedding.into()),
        "output.weight" => return Some(names.output.into()),
        "position_embd.weight" if config.learned_positions.is_some() => return Some(names.positions.into()),
        _ => {}
    }
    let (path, kind) = gguf_name.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let hf = match path {
        "output_norm" => format!("{}.{kind}", names.final_norm),
        _ => {
            let (layer, part) = path.strip_prefix("blk.")?.split_once('.')?;
            // The layer is parsed and printed again, so that `blk.007` cannot stand for layer 7 beside `blk.7`.
            let layer = layer.parse::<u32>().ok().filter(|n| n.to_string() == layer)?;
            format!("{}.{layer}.{}.{kind}", names.blocks, block_part(config, part)?)
        }
    };
    (kind == "weight" || config.expects_bias(&hf)).then_some(hf)
}

/// llama.cpp's name of the tensor with this Hugging Face name: the inverse of [`hf_name`].
pub fn gguf_name(config: &DecoderConfig, hf: &str) -> Option<String> {
    let names = config.names();
    let (path, kind) = hf.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let inside = path.strip_prefix(names.blocks).and_then(|rest| rest.strip_prefix('.')?.split_once('.'));
    let found = match inside {
        Some((layer, part)) => {
            let part = BLOCK_PARTS.into_iter().find(|known| block_part(config, known) == Some(part))?;
            format!("blk.{layer}.{part}.{kind}")
        }
        None if path == names.final_norm => format!("output_norm.{kind}"),
        None => ["token_embd.weight", "output.weight", "position_embd.weight"]
            .into_iter()
            .find(|known| hf_name(config, known).as_deref() == Some(hf))?
            .to_owned(),
    };
    (kind == "weight" || config.expects_bias(hf)).then_some(found)
}

/// The order in which a GGUF file stores the rows of the tensor with this Hugging Face name.
pub fn row_order(config: &DecoderConfig, hf_name: &str) -> RowOrder {
    let is = |path: &str| hf_name.contains(path);
    let head_dim = config.head_dim;
    match config.family {
        // llama.cpp rotates neighbouring pairs in these architectures.
        Family::Llama | Family::Mistral | Family::Granite | Family::SmolLm3 if is(".q_proj.") || is(".k_proj.") => {
            RowOrder::RopeInterleaved { head_dim }
        }
        Family::GptNeoX if is(".query_key_value.") => {
            RowOrder::HeadsApart { head_dim, heads: config.num_attention_heads }
        }
        _ => RowOrder::AsStored,
    }
}

/// Whether a GGUF file stores this tensor with 1 added: the norms of Gemma.
pub fn adds_one(config: &DecoderConfig, hf_name: &str) -> bool {
    config.norm == NormStyle::RmsPlusOne && hf_name.ends_with("norm.weight")
}

/// llama.cpp's names of the modules of a block.
const BLOCK_PARTS: [&str; 14] = [
    "attn_norm",
    "post_attention_norm",
    "ffn_norm",
    "post_ffw_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_qkv",
    "attn_q_norm",
    "attn_k_norm",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
];

/// Hugging Face's path within a block of the module that llama.cpp calls `part`.
fn block_part(config: &DecoderConfig, part: &str) -> Option<&'static str> {
    let names = config.names();
    let of = |paths: &'static [&'static str], i: usize, fused: bool| {
        (fused == (paths.len() == 1)).then(|| paths.get(i).copied()).flatten()
    };
    let norm = |i: usize| Some(names.norms[i]).filter(|n| !n.is_empty());
    match part {
        "attn_norm" => norm(0),
        "post_attention_norm" => norm(1),
        "ffn_norm" => norm(2),
        "post_ffw_norm" => norm(3),
        "attn_q" => of(names.qkv, 0, false),
        "attn_k" => of(names.qkv, 1, false),
        "attn_v" => of(names.qkv, 2, false),
        "attn_qkv" => of(names.qkv, 0, true),
        "attn_q_norm" if config.qk_norm != QkNorm::None => Some("self_attn.q_norm"),
        "attn_k_norm" if config.qk_norm != QkNorm::None => Some("self_attn.k_norm"),
        "attn_output" => Some(names.attention_out),
        "ffn_gate" => of(names.mlp_in, 0, false),
        "ffn_up" => of(names.mlp_in, 1, false).or(of(names.mlp_in, 0, true)),
        "ffn_down" => Some(names.mlp_out),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::Sizes;

    #[test]
    fn gguf_names_map_to_hugging_face_names_and_back() {
        let sizes = Sizes {
            vocab: 8,
            hidden: 8,
            intermediate: 8,
            layers: 13,
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            positions: 8,
        };
        let config = DecoderConfig::llama(sizes, "x").unwrap();
        let hf_name = |name: &str| hf_name(&config, name);
        assert_eq!(hf_name("blk.12.attn_q.weight").unwrap(), "model.layers.12.self_attn.q_proj.weight");
        assert_eq!(hf_name("output.weight").unwrap(), "lm_head.weight");
        for unknown in
            ["blk.1.attn_q.bias", "blk.01.attn_q.weight", "blk.x.attn_q.weight", "blk.1.ffn_gate_exps.weight"]
        {
            assert_eq!(hf_name(unknown), None);
        }
        for name in ["blk.12.attn_q.weight", "blk.0.attn_norm.weight", "token_embd.weight", "output_norm.weight"] {
            assert_eq!(gguf_name(&config, &hf_name(name).unwrap()).unwrap(), name);
        }
        assert_eq!(gguf_name(&config, "model.layers.1.self_attn.q_proj.bias"), None);
        assert_eq!(gguf_name(&config, "model.layers.1.self_attn.rotary.weight"), None);
    }
}
