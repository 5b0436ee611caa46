//! What each family calls its tensors and its classes: the one place in which a family's name matters. How it computes
//! is in the fields of [`super::DecoderConfig`]. Knows no file. Read hf.rs and gguf.rs next: they fill the fields.

use super::{DecoderConfig, LayerRope, Mlp, QkNorm, Qkv};
use crate::model::adapter::targets::{Linear, LinearShapes, MatrixLayout, NonBlockModule};
use crate::ops::attention::Heads;

/// A model family, which decides names alone.
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
    /// What stands before every name but the output table's; some files leave it out.
    pub prefix: &'static str,
    /// The list of blocks.
    pub blocks: &'static str,
    /// The token table.
    pub embedding: &'static str,
    /// The table of learned positions.
    pub positions: &'static str,
    /// The last norm.
    pub final_norm: &'static str,
    /// The table that logits are taken with.
    pub output: &'static str,
    /// The norms before attention, on its output, before the MLP, on its output; empty where there is none.
    pub norms: [&'static str; 4],
    /// q, k and v, or the one map for all three.
    pub qkv: &'static [&'static str],
    /// Attention's output map.
    pub attention_out: &'static str,
    /// The MLP's maps from the residual stream: gate and up, or one for both, or the only one.
    pub mlp_in: &'static [&'static str],
    /// The MLP's map back.
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

/// OPT's maps between the width of its token table and its hidden size.
pub const PROJECT_IN: &str = "model.decoder.project_in.weight";
/// And back.
pub const PROJECT_OUT: &str = "model.decoder.project_out.weight";

/// The module that a weight belongs to. Every family's output layer is `lm_head` in transformers 5, GPT-NeoX's too, whose
/// files go on to call it `embed_out`.
fn module(weight: &'static str) -> &'static str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

impl Family {
    /// Its names.
    pub fn names(self) -> &'static Names {
        // One row for each variant, in order.
        &NAMES[self as usize].1
    }

    /// The family of a config.json's `model_type`.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        NAMES.iter().find(|(_, n)| n.model_type == model_type).map(|(family, _)| *family)
    }

    /// All `model_type`s, for messages.
    pub fn model_types() -> String {
        NAMES.iter().map(|(_, n)| n.model_type).collect::<Vec<_>>().join(", ")
    }
}

impl DecoderConfig {
    /// The family's names.
    pub fn names(&self) -> &'static Names {
        self.family.names()
    }

    /// The linear maps of a block and those outside of the blocks, by name and size.
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

    /// For each map of [`DecoderConfig::shapes`], in order, whether it has a bias.
    pub fn has_bias(&self) -> Vec<bool> {
        let (names, biases) = (self.names(), self.biases);
        let mut all = vec![biases.qkv; names.qkv.len()];
        all.push(biases.attention_out);
        all.resize(all.len() + names.mlp_in.len() + 1, biases.mlp);
        all
    }

    /// Widths of the norms of q and k, where there are any.
    pub fn qk_norm_widths(&self) -> Option<[usize; 2]> {
        match self.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some([self.head_dim; 2]),
            QkNorm::Whole => Some([self.num_attention_heads, self.num_key_value_heads].map(|n| n * self.head_dim)),
        }
    }

    /// The heads of a layer, and what they see.
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

    /// Which set of rotations a layer uses: 0 is the global one, 1 the local one.
    pub fn rotation(&self, layer: usize) -> Option<usize> {
        match self.layers[layer].rope {
            LayerRope::None => None,
            LayerRope::Global => Some(0),
            LayerRope::Local => Some(1),
        }
    }

    /// Whether Hugging Face's files keep this matrix as (in, out).
    pub fn lies_transposed(&self, name: &str) -> bool {
        let shapes = self.shapes();
        let inside = name.strip_prefix(shapes.blocks).and_then(|n| n.strip_prefix('.')).and_then(|n| n.split_once('.'));
        let path = inside.and_then(|(_, part)| part.strip_suffix(".weight"));
        shapes.layout == MatrixLayout::InOut && shapes.linears().iter().any(|l| Some(l.path) == path)
    }

    /// Whether a tensor of this name, which ends in `.bias`, belongs to this decoder, or is a mask that old files keep.
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
