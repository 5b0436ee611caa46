//! Names of each model family in Hugging Face's files: its tensors, its `model_type` and its class.
//!
//! How a family computes is in the fields of [`super::DecoderConfig`]. It does not depend on reading files. Read `hf.rs` next,
//! which fills the fields.

use super::{DecoderConfig, LayerRope, Mlp, QkNorm, Qkv};
use crate::model::adapter::{Linear, LinearShapes, MatrixLayout, NonBlockModule};
use crate::ops::attention::Heads;

/// A model family. It decides names only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma,
    Gemma2,
    Gemma3,
    Phi3,
    Olmo2,
    Granite,
    SmolLm3,
    Gpt2,
    GptNeo,
    GptNeoX,
    Opt,
}

/// The names of one family in Hugging Face's files.
#[derive(Debug)]
pub struct Names {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// `architectures` in config.json.
    pub architecture: &'static str,
    /// Prefix of every name except the lm_head's; some files omit it.
    pub prefix: &'static str,
    /// Path of the list of blocks.
    pub blocks: &'static str,
    /// The embedding matrix.
    pub embedding: &'static str,
    /// The position embedding; empty where positions are not learned.
    pub positions: &'static str,
    /// The norm after the last block.
    pub final_norm: &'static str,
    /// The lm_head.
    pub output: &'static str,
    /// The norms before attention, on its output, before the MLP, on its output; empty where the family has none.
    pub norms: [&'static str; 4],
    /// The projections to q, k and v, or the fused one.
    pub qkv: &'static [&'static str],
    /// The output projection of attention.
    pub attention_out: &'static str,
    /// The MLP's input projections: gate and up, the two fused, or the only one.
    pub mlp_in: &'static [&'static str],
    /// The MLP's output projection.
    pub mlp_out: &'static str,
}

const LLAMA: Names = Names {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    prefix: "model.",
    blocks: "model.layers",
    embedding: "model.embed_tokens.weight",
    positions: "",
    final_norm: "model.norm",
    output: "lm_head.weight",
    norms: ["input_layernorm", "", "post_attention_layernorm", ""],
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    attention_out: "self_attn.o_proj",
    mlp_in: &["mlp.gate_proj", "mlp.up_proj"],
    mlp_out: "mlp.down_proj",
};
const AROUND: [&str; 4] =
    ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"];

static NAMES: [(Family, Names); 15] = [
    (Family::Llama, LLAMA),
    (Family::Mistral, Names { model_type: "mistral", architecture: "MistralForCausalLM", ..LLAMA }),
    (Family::Qwen2, Names { model_type: "qwen2", architecture: "Qwen2ForCausalLM", ..LLAMA }),
    (Family::Qwen3, Names { model_type: "qwen3", architecture: "Qwen3ForCausalLM", ..LLAMA }),
    (Family::Gemma, Names { model_type: "gemma", architecture: "GemmaForCausalLM", ..LLAMA }),
    (Family::Gemma2, Names { model_type: "gemma2", architecture: "Gemma2ForCausalLM", norms: AROUND, ..LLAMA }),
    (Family::Gemma3, Names { model_type: "gemma3_text", architecture: "Gemma3ForCausalLM", norms: AROUND, ..LLAMA }),
    (
        Family::Phi3,
        Names {
            model_type: "phi3",
            architecture: "Phi3ForCausalLM",
            qkv: &["self_attn.qkv_proj"],
            mlp_in: &["mlp.gate_up_proj"],
            ..LLAMA
        },
    ),
    (
        Family::Olmo2,
        Names {
            model_type: "olmo2",
            architecture: "Olmo2ForCausalLM",
            norms: ["", "post_attention_layernorm", "", "post_feedforward_layernorm"],
            ..LLAMA
        },
    ),
    (Family::Granite, Names { model_type: "granite", architecture: "GraniteForCausalLM", ..LLAMA }),
    (Family::SmolLm3, Names { model_type: "smollm3", architecture: "SmolLM3ForCausalLM", ..LLAMA }),
    (
        Family::Gpt2,
        Names {
            model_type: "gpt2",
            architecture: "GPT2LMHeadModel",
            prefix: "transformer.",
            blocks: "transformer.h",
            embedding: "transformer.wte.weight",
            positions: "transformer.wpe.weight",
            final_norm: "transformer.ln_f",
            output: "lm_head.weight",
            norms: ["ln_1", "", "ln_2", ""],
            qkv: &["attn.c_attn"],
            attention_out: "attn.c_proj",
            mlp_in: &["mlp.c_fc"],
            mlp_out: "mlp.c_proj",
        },
    ),
    (
        Family::GptNeo,
        Names {
            model_type: "gpt_neo",
            architecture: "GPTNeoForCausalLM",
            prefix: "transformer.",
            blocks: "transformer.h",
            embedding: "transformer.wte.weight",
            positions: "transformer.wpe.weight",
            final_norm: "transformer.ln_f",
            output: "lm_head.weight",
            norms: ["ln_1", "", "ln_2", ""],
            qkv: &["attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"],
            attention_out: "attn.attention.out_proj",
            mlp_in: &["mlp.c_fc"],
            mlp_out: "mlp.c_proj",
        },
    ),
    (
        Family::GptNeoX,
        Names {
            model_type: "gpt_neox",
            architecture: "GPTNeoXForCausalLM",
            prefix: "gpt_neox.",
            blocks: "gpt_neox.layers",
            embedding: "gpt_neox.embed_in.weight",
            positions: "",
            final_norm: "gpt_neox.final_layer_norm",
            output: "embed_out.weight",
            norms: ["input_layernorm", "", "post_attention_layernorm", ""],
            qkv: &["attention.query_key_value"],
            attention_out: "attention.dense",
            mlp_in: &["mlp.dense_h_to_4h"],
            mlp_out: "mlp.dense_4h_to_h",
        },
    ),
    (
        Family::Opt,
        Names {
            model_type: "opt",
            architecture: "OPTForCausalLM",
            prefix: "model.",
            blocks: "model.decoder.layers",
            embedding: "model.decoder.embed_tokens.weight",
            positions: "model.decoder.embed_positions.weight",
            final_norm: "model.decoder.final_layer_norm",
            output: "lm_head.weight",
            norms: ["self_attn_layer_norm", "", "final_layer_norm", ""],
            qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            attention_out: "self_attn.out_proj",
            mlp_in: &["fc1"],
            mlp_out: "fc2",
        },
    ),
];

/// OPT's projection from the width of its embedding to its hidden size.
pub const PROJECT_IN: &str = "model.decoder.project_in.weight";
/// OPT's projection from its hidden size to the width of its embedding.
pub const PROJECT_OUT: &str = "model.decoder.project_out.weight";

/// The module that a weight belongs to. In transformers 5 the output layer of every family is `lm_head`, although GPT-NeoX's
/// files call it `embed_out`.
fn module(weight: &'static str) -> &'static str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

impl Family {
    /// Names of this family.
    pub fn names(self) -> &'static Names {
        // One row for each variant, in order.
        &NAMES[self as usize].1
    }

    /// The family of a config.json's `model_type`.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        NAMES.iter().find(|(_, n)| n.model_type == model_type).map(|(family, _)| *family)
    }

    /// All `model_type`s, for error messages.
    pub fn model_types() -> String {
        NAMES.iter().map(|(_, n)| n.model_type).collect::<Vec<_>>().join(", ")
    }
}

impl DecoderConfig {
    /// Names of the decoder's family.
    pub fn names(&self) -> &'static Names {
        self.family.names()
    }

    /// Linear maps of a block and outside of the blocks, by path and size.
    pub fn shapes(&self) -> LinearShapes {
        let (d, f, names) = (self.hidden_size, self.intermediate_size, self.names());
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let qkv: &[usize] = match self.qkv {
            Qkv::Separate => &[q, kv, kv],
            Qkv::EndToEnd | Qkv::PerHead => &[q + 2 * kv],
        };
        let mlp: &[usize] = match self.mlp {
            Mlp::Gated => &[f, f],
            Mlp::GatedFused => &[2 * f],
            Mlp::Plain => &[f],
        };
        let mut maps = vec![];
        maps.extend(names.qkv.iter().zip(qkv).map(|(path, &out)| Linear { path, in_features: d, out_features: out }));
        maps.push(Linear { path: names.attention_out, in_features: q, out_features: d });
        maps.extend(names.mlp_in.iter().zip(mlp).map(|(path, &out)| Linear {
            path,
            in_features: d,
            out_features: out,
        }));
        maps.push(Linear { path: names.mlp_out, in_features: f, out_features: d });
        let layout = if self.family == Family::Gpt2 { MatrixLayout::InOut } else { MatrixLayout::OutIn };
        let (v, e) = (self.vocab_size, self.embedding_width);
        let outer = |weight: &'static str, in_features, out_features| Linear {
            path: module(weight),
            in_features,
            out_features,
        };
        let shapes = LinearShapes::new(self.num_hidden_layers, e, names.blocks, layout, &maps)
            .with_outer(NonBlockModule::Embedding, outer(names.embedding, v, e))
            .with_outer(NonBlockModule::Head, outer("lm_head.weight", e, v));
        if d == e {
            return shapes;
        }
        shapes
            .with_outer(NonBlockModule::ProjectIn, outer(PROJECT_IN, e, d))
            .with_outer(NonBlockModule::ProjectOut, outer(PROJECT_OUT, d, e))
    }

    /// Whether each map of a block has a bias, in the order of [`DecoderConfig::shapes`].
    pub fn has_bias(&self) -> Vec<bool> {
        let (names, biases) = (self.names(), self.biases);
        let mut all = vec![biases.qkv; names.qkv.len()];
        all.push(biases.attention_out);
        all.resize(all.len() + names.mlp_in.len() + 1, biases.mlp);
        all
    }

    /// Widths of the norms of q and k, if the decoder has them.
    pub fn qk_norm_widths(&self) -> Option<[usize; 2]> {
        match self.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some([self.head_dim; 2]),
            QkNorm::Whole => Some([self.num_attention_heads, self.num_key_value_heads].map(|n| n * self.head_dim)),
        }
    }

    /// Attention heads of a layer, with its window, scale and soft cap.
    pub fn heads(&self, layer: usize) -> Heads {
        Heads {
            q: self.num_attention_heads,
            kv: self.num_key_value_heads,
            dim: self.head_dim,
            scale: self.attention_multiplier as f32,
            window: self.layers[layer].window,
            soft_cap: self.attention_soft_cap.map(|c| c as f32),
        }
    }

    /// Index of the rope table that a layer uses: 0 is the global one, 1 the local one.
    pub fn rotation(&self, layer: usize) -> Option<usize> {
        match self.layers[layer].rope {
            LayerRope::None => None,
            LayerRope::Global => Some(0),
            LayerRope::Local => Some(1),
        }
    }

    /// Whether Hugging Face's files store this matrix as (in, out).
    pub fn lies_transposed(&self, name: &str) -> bool {
        let shapes = self.shapes();
        let inside = name.strip_prefix(shapes.blocks).and_then(|n| n.strip_prefix('.')).and_then(|n| n.split_once('.'));
        let path = inside.and_then(|(_, part)| part.strip_suffix(".weight"));
        shapes.layout == MatrixLayout::InOut && shapes.linears().iter().any(|l| Some(l.path) == path)
    }

    /// Whether a tensor of this name, which ends in `.bias`, belongs to this decoder or is an attention mask of an old file.
    pub(crate) fn expects_bias(&self, name: &str) -> bool {
        let names = self.names();
        let layered = self.norm == super::NormStyle::Layer;
        if ["attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias"]
            .iter()
            .any(|m| name.ends_with(m))
        {
            return matches!(self.family, Family::Gpt2 | Family::GptNeo | Family::GptNeoX);
        }
        let Some(path) = name.strip_suffix(".bias") else { return false };
        if path == names.final_norm {
            return layered;
        }
        let inside = path.strip_prefix(names.blocks).and_then(|p| p.strip_prefix('.')).and_then(|p| p.split_once('.'));
        inside.is_some_and(|(_, part)| {
            let map = self.shapes().linears().iter().position(|l| l.path == part);
            map.is_some_and(|i| self.has_bias()[i]) || (layered && names.norms.contains(&part))
        })
    }
}
