//! The configuration of a decoder, checked: its sizes, and every choice in which the model families differ.
//!
//! One decoder computes all families; these fields select its variant. It does not depend on tensors or on reading files.
//! Read `names.rs` for names of tensors, `hf.rs` and `model_files/gguf_config.rs` for where the fields come from,
//! `model/block/mod.rs` for how they are used.

use anyhow::Result;

use crate::invalid;
use crate::ops::activation::Activation;

pub mod gguf_names;
mod hf;
mod names;
mod rope;
mod write;

pub use names::{Family, Names, PROJECT_IN, PROJECT_OUT};
pub use rope::RopeScaling;
pub(crate) use rope::yarn_attention_factor;

/// Kind of norm, and how its weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormStyle {
    /// RMSNorm.
    Rms,
    /// RMSNorm whose Hugging Face files store the weight minus 1 (Gemma).
    RmsPlusOne,
    /// LayerNorm with bias.
    Layer,
}

/// Where the norms of a block are applied. f is attention, then the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// x + f(norm(x)).
    Before,
    /// x + norm(f(x)) (OLMo 2).
    Inner,
    /// x + norm(f(norm(x))) (Gemma 2 and 3).
    Around,
    /// norm(x + f(x)) (OPT-350M).
    AfterSum,
    /// x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX).
    Parallel,
}

/// How q, k and v are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qkv {
    /// Three linear maps.
    Separate,
    /// One linear map: all of q, all of k, all of v.
    EndToEnd,
    /// One linear map: q, k and v of the first head, of the second head, and so on.
    PerHead,
}

/// The kind of MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// down(act(gate(x)) * up(x)).
    Gated,
    /// As `Gated`, with gate and up in one linear map, gate first.
    GatedFused,
    /// down(act(up(x))).
    Plain,
}

/// Which linear maps have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// The projections to q, k and v.
    pub qkv: bool,
    /// The output projection of attention.
    pub attention_out: bool,
    /// All maps of the MLP.
    pub mlp: bool,
}

/// Norms of q and k before rotary embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// No norm.
    None,
    /// One norm per head (Qwen 3, Gemma 3).
    PerHead,
    /// One norm over all heads (OLMo 2).
    Whole,
}

/// Rotary embeddings of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerRope {
    /// With `rope_theta` and `rope_scaling`.
    Global,
    /// With `local_rope_theta`, unscaled.
    Local,
    /// No rotary embeddings: every fourth layer of SmolLM 3, and all layers where positions are learned.
    None,
}

/// Window and positions of a layer's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerAttention {
    /// Sliding window: the most keys that a query attends to, its own included; `None` is all previous ones.
    pub window: Option<usize>,
    /// Its rotary embeddings.
    pub rope: LayerRope,
}

/// Configuration of a decoder. Every number has been checked.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct DecoderConfig {
    /// Model family, which decides the names of tensors.
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub norm: NormStyle,
    pub norm_eps: f64,
    pub placement: Placement,
    /// Whether there is a norm after the last block.
    pub final_norm: bool,
    pub qkv: Qkv,
    pub qk_norm: QkNorm,
    pub biases: Biases,
    pub mlp: Mlp,
    pub activation: Activation,
    /// One entry per layer.
    pub layers: Vec<LayerAttention>,
    /// Number of leading dimensions of each head that rotary embeddings rotate.
    pub rotary_dim: usize,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub local_rope_theta: Option<f64>,
    /// Row of the position embedding for position 0; `None` where positions are not learned.
    pub learned_positions: Option<usize>,
    /// Width of the embedding matrix; where it is not `hidden_size`, there are projections in and out (OPT-350M).
    pub embedding_width: usize,
    pub embedding_multiplier: f64,
    /// Factor of q . k.
    pub attention_multiplier: f64,
    /// Factor of the outputs of attention and MLP before they are added to the residual stream.
    pub residual_multiplier: f64,
    pub logits_multiplier: f64,
    /// Soft cap of attention scores s: cap tanh(s / cap).
    pub attention_soft_cap: Option<f64>,
    pub logits_soft_cap: Option<f64>,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens: any of them ends a response. From config.json and generation_config.json, without repeats.
    pub eos_token_ids: Vec<u32>,
    pub model_name: String,
}

/// Upper bounds far above any model's sizes, so that products of two dimensions cannot overflow.
const MAX_DIM: usize = 1 << 22;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;

/// The sizes that every decoder has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) positions: usize,
}

impl DecoderConfig {
    /// The configuration of a Llama of these sizes, which each family's reader then changes.
    ///
    /// # Errors
    /// If a size is 0 or above its bound, since some of them determine the lengths of lists.
    pub(crate) fn llama(sizes: Sizes, file: &str) -> Result<Self> {
        for (name, value, most) in [
            ("vocab_size", sizes.vocab, MAX_VOCAB),
            ("hidden_size", sizes.hidden, MAX_DIM),
            ("intermediate_size", sizes.intermediate, MAX_DIM),
            ("num_hidden_layers", sizes.layers, MAX_LAYERS),
            ("num_attention_heads", sizes.heads, MAX_DIM),
            ("num_key_value_heads", sizes.kv_heads, MAX_DIM),
            ("head_dim", sizes.head_dim, 1 << 14),
            ("max_position_embeddings", sizes.positions, 1 << 31),
        ] {
            if value == 0 || value > most {
                return Err(invalid!("{file}: {name} = {value} is not between 1 and {most}"));
            }
        }
        Ok(Self {
            family: Family::Llama,
            vocab_size: sizes.vocab,
            hidden_size: sizes.hidden,
            intermediate_size: sizes.intermediate,
            num_hidden_layers: sizes.layers,
            num_attention_heads: sizes.heads,
            num_key_value_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            max_position_embeddings: sizes.positions,
            norm: NormStyle::Rms,
            norm_eps: 1e-6,
            placement: Placement::Before,
            final_norm: true,
            qkv: Qkv::Separate,
            qk_norm: QkNorm::None,
            biases: Biases::default(),
            mlp: Mlp::Gated,
            activation: Activation::Silu,
            layers: vec![LayerAttention { window: None, rope: LayerRope::Global }; sizes.layers],
            rotary_dim: sizes.head_dim,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            local_rope_theta: None,
            learned_positions: None,
            embedding_width: sizes.hidden,
            embedding_multiplier: 1.0,
            attention_multiplier: f64::from(1.0 / (sizes.head_dim as f32).sqrt()),
            residual_multiplier: 1.0,
            logits_multiplier: 1.0,
            attention_soft_cap: None,
            logits_soft_cap: None,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: vec![],
            model_name: String::new(),
        })
    }

    /// This configuration, if all its fields are consistent.
    ///
    /// # Errors
    /// If they are not; the message names the field.
    pub(crate) fn checked(self, file: &str) -> Result<Self> {
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv != 0 {
            return Err(invalid!("{file}: {heads} attention heads cannot share {kv} key/value heads evenly"));
        }
        if self.qkv == Qkv::PerHead && heads != kv {
            return Err(invalid!(
                "{file}: q, k and v in turn for each head need as many of each, not {heads} and {kv}"
            ));
        }
        let rotary = self.layers.iter().any(|l| l.rope != LayerRope::None);
        if rotary && !(self.rotary_dim.is_multiple_of(2) && (2..=self.head_dim).contains(&self.rotary_dim)) {
            return Err(invalid!(
                "{file}: {} rotary dimensions of a head_dim of {}: rotary embeddings rotate pairs within a head",
                self.rotary_dim,
                self.head_dim
            ));
        }
        if heads * self.head_dim > MAX_DIM || 2 * self.intermediate_size > 2 * MAX_DIM {
            return Err(invalid!("{file}: {heads} heads of {} are more than {MAX_DIM} wide", self.head_dim));
        }
        if self.embedding_width == 0 || self.embedding_width > MAX_DIM {
            return Err(invalid!("{file}: an embedding matrix of width {} is not possible", self.embedding_width));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(invalid!("{file}: the norms' epsilon {} is not between 0 and 1", self.norm_eps));
        }
        for theta in [Some(self.rope_theta), self.local_rope_theta].into_iter().flatten() {
            if !(theta > 1.0 && theta < 1e12) {
                return Err(invalid!("{file}: rope_theta = {theta} is not between 1 and 1e12"));
            }
        }
        if rotary && !self.rope_scaling.is_usable(self.rotary_dim) {
            return Err(invalid!(
                "{file}: the rope scaling {:?} is not valid: factors are positive and finite, high_freq_factor is above \
                 low_freq_factor, and a list of factors has head_dim / 2 = {} numbers",
                self.rope_scaling,
                self.rotary_dim / 2
            ));
        }
        for (name, value) in [
            ("embedding multiplier", Some(self.embedding_multiplier)),
            ("attention multiplier", Some(self.attention_multiplier)),
            ("residual multiplier", Some(self.residual_multiplier)),
            ("logits multiplier", Some(self.logits_multiplier)),
            ("soft cap of attention", self.attention_soft_cap),
            ("soft cap of the logits", self.logits_soft_cap),
        ] {
            if value.is_some_and(|v| !(v > 0.0 && v < 1e9)) {
                return Err(invalid!("{file}: the {name} {value:?} is not a positive number"));
            }
        }
        if self.layers.len() != self.num_hidden_layers || self.layers.iter().any(|l| l.window == Some(0)) {
            return Err(invalid!(
                "{file}: {} kinds of layers for {} layers, or a sliding window of 0",
                self.layers.len(),
                self.num_hidden_layers
            ));
        }
        let ids = self.eos_token_ids.iter().chain(&self.bos_token_id);
        if let Some(id) = ids.into_iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(invalid!("{file}: the special token {id} is outside of the vocabulary of {}", self.vocab_size));
        }
        Ok(self)
    }

    /// Rotary inverse frequencies of the layers with `rope_theta`, radians per position, (rotary_dim / 2).
    pub fn inv_freq(&self) -> Vec<f32> {
        self.rope_scaling.inv_freq(self.rope_theta, self.rotary_dim)
    }

    /// Inverse frequencies of the layers with `local_rope_theta`, which are never scaled.
    pub fn local_inv_freq(&self) -> Vec<f32> {
        RopeScaling::None.inv_freq(self.local_rope_theta.unwrap_or(self.rope_theta), self.rotary_dim)
    }
}

/// The head size where a file does not state it: hidden size / heads.
///
/// # Errors
/// If the heads do not divide the hidden size.
pub(crate) fn whole_heads(hidden: usize, heads: usize, file: &str) -> Result<usize> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(invalid!("{file}: a hidden size of {hidden} cannot be split over {heads} attention heads"));
    }
    Ok(hidden / heads)
}

#[cfg(test)]
mod tests;
