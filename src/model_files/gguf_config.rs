//! Metadata of a GGUF file -> [`DecoderConfig`].
//!
//! What the format leaves to the reader (which layers have a window, the second rope base of Gemma 3) is as in llama.cpp. It
//! does not depend on tokenizers or weights. Read `model/config/hf.rs` for Hugging Face's config.json.

use anyhow::Result;

use crate::invalid;
use crate::model::config::{
    Biases, DecoderConfig, Family, LayerRope, Mlp, NormStyle, Placement, QkNorm, Qkv, RopeScaling, Sizes, whole_heads,
    yarn_attention_factor,
};
use crate::model_files::gguf::{Gguf, Value};
use crate::ops::activation::Activation;
use crate::ops::weight::StorageDType;

/// Supported architectures, by `general.architecture`.
const ARCHITECTURES: [(&str, Family); 12] = [
    ("llama", Family::Llama),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("gemma", Family::Gemma),
    ("gemma2", Family::Gemma2),
    ("gemma3", Family::Gemma3),
    ("phi3", Family::Phi3),
    ("gpt2", Family::Gpt2),
    ("gptneox", Family::GptNeoX),
    ("olmo2", Family::Olmo2),
    ("granite", Family::Granite),
    ("smollm3", Family::SmolLm3),
];

/// Typed access to the metadata of one architecture, with errors that name the key.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// A size: one number, or a list of one number per layer if all are equal.
    fn optional(&self, key: &str) -> Result<Option<usize>> {
        let (name, file) = (self.name(key), self.gguf.name());
        let Some(Value::Integers(listed)) = self.gguf.get(&name) else {
            let value = self.gguf.unsigned(&name)?;
            return Ok(value.map(|v| usize::try_from(v).unwrap_or(usize::MAX)));
        };
        let first = listed.first().ok_or_else(|| invalid!("{file}: the list {name} is empty"))?;
        if let Some((layer, other)) = listed.iter().enumerate().find(|(_, value)| *value != first) {
            return Err(invalid!(
                "{file}: {name} is {first} in layer 0 and {other} in layer {layer}; models whose layers differ in it are \
                 not supported"
            ));
        }
        let value = usize::try_from(*first).map_err(|_| invalid!("{file}: {name} holds {first}, which is no size"))?;
        Ok(Some(value))
    }

    fn required(&self, key: &str) -> Result<usize> {
        self.optional(key)?
            .ok_or_else(|| invalid!("{}: the metadata key {} is missing", self.gguf.name(), self.name(key)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.float(&self.name(key))
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        let id = self.gguf.unsigned(&format!("tokenizer.ggml.{key}"))?;
        id.map(|id| {
            u32::try_from(id).map_err(|_| invalid!("{}: tokenizer.ggml.{key} = {id} is no token", self.gguf.name()))
        })
        .transpose()
    }
}

/// Reads the metadata of a GGUF file (`{architecture}.*`, `tokenizer.ggml.*_token_id`) and its factors of rotary
/// frequencies.
///
/// # Errors
/// If the architecture is not supported, or a number is missing or out of range.
pub fn decoder_config(gguf: &Gguf) -> Result<DecoderConfig> {
    let file = gguf.name();
    let architecture = gguf.string("general.architecture")?.unwrap_or("(none)");
    let family = ARCHITECTURES.iter().find(|(name, _)| *name == architecture).map(|(_, family)| *family);
    let family = family.ok_or_else(|| {
        let known = ARCHITECTURES.map(|(name, _)| name).join(", ");
        invalid!("{file}: general.architecture = {architecture:?} is not supported; {known} are")
    })?;
    let keys = Keys { gguf, architecture };
    if keys.optional("expert_count")?.unwrap_or(0) > 0 {
        return Err(invalid!("{file}: a mixture of experts is not supported; dense models are"));
    }
    let (hidden, heads) = (keys.required("embedding_length")?, keys.required("attention.head_count")?);
    let head_dim = match keys.optional("attention.key_length")? {
        Some(dim) => dim,
        None => whole_heads(hidden, heads, file)?,
    };
    let rotary_dim = keys.optional("rope.dimension_count")?.unwrap_or(head_dim);
    let whole = !matches!(family, Family::GptNeoX | Family::Phi3);
    for (key, dim) in [
        ("attention.value_length", keys.optional("attention.value_length")?),
        ("rope.dimension_count", whole.then_some(rotary_dim)),
    ] {
        if let Some(dim) = dim.filter(|&d| d != head_dim) {
            let key = keys.name(key);
            return Err(invalid!("{file}: {key} = {dim} differs from the head size {head_dim}: not supported"));
        }
    }
    let embedding = gguf.tensor("token_embd.weight").filter(|t| t.shape.len() == 2);
    let embedding = embedding.ok_or_else(|| invalid!("{file}: the tensor token_embd.weight is missing"))?;
    let mut c = DecoderConfig::llama(
        Sizes {
            vocab: embedding.shape[0],
            hidden,
            intermediate: keys.required("feed_forward_length")?,
            layers: keys.required("block_count")?,
            heads,
            kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            positions: keys.required("context_length")?,
        },
        file,
    )?;
    c.family = family;
    c.rotary_dim = rotary_dim;
    let layered = matches!(family, Family::Gpt2 | Family::GptNeoX);
    let eps = if layered { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    c.norm_eps = keys.float(eps)?.ok_or_else(|| invalid!("{file}: {} is missing", keys.name(eps)))?;
    let theta = if family == Family::Gemma3 { 1e6 } else { 1e4 };
    c.rope_theta = keys.float("rope.freq_base")?.unwrap_or(theta);
    c.rope_scaling = keys.rope_scaling(&mut c.max_position_embeddings)?;
    keys.depart(&mut c)?;
    c.tie_word_embeddings = gguf.tensor("output.weight").is_none();
    c.bos_token_id = keys.token("bos_token_id")?;
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        if let Some(id) = keys.token(key)?.filter(|id| !c.eos_token_ids.contains(id)) {
            c.eos_token_ids.push(id);
        }
    }
    c.model_name = gguf.string("general.name")?.unwrap_or(architecture).to_owned();
    c.checked(file)
}

impl Keys<'_> {
    /// Sets the fields in which the family differs from Llama.
    fn depart(&self, c: &mut DecoderConfig) -> Result<()> {
        match c.family {
            Family::Llama => self.biases(c),
            Family::Qwen2 => c.biases.qkv = true,
            Family::Olmo2 => (c.placement, c.qk_norm) = (Placement::Inner, QkNorm::Whole),
            Family::Granite => {
                self.biases(c);
                c.embedding_multiplier = self.float("embedding_scale")?.unwrap_or(1.0);
                c.residual_multiplier = self.float("residual_scale")?.unwrap_or(1.0);
                c.attention_multiplier = self.float("attention.scale")?.unwrap_or(c.attention_multiplier);
                c.logits_multiplier = 1.0 / self.float("logit_scale")?.unwrap_or(1.0);
            }
            Family::SmolLm3 => {
                self.biases(c);
                // The file does not list the layers without rotary embeddings: every fourth.
                c.layers.iter_mut().skip(3).step_by(4).for_each(|l| l.rope = LayerRope::None);
            }
            Family::Qwen3 => c.qk_norm = QkNorm::PerHead,
            Family::Gemma | Family::Gemma2 | Family::Gemma3 => {
                (c.norm, c.activation) = (NormStyle::RmsPlusOne, Activation::GeluTanh);
                c.embedding_multiplier = (c.hidden_size as f64).sqrt();
            }
            Family::Phi3 => {
                (c.qkv, c.mlp) = (Qkv::EndToEnd, Mlp::GatedFused);
                let window = self.optional("attention.sliding_window")?.filter(|&w| w > 0);
                c.layers.iter_mut().for_each(|l| l.window = window);
            }
            Family::Gpt2 => {
                (c.qkv, c.mlp, c.activation) = (Qkv::EndToEnd, Mlp::Plain, Activation::GeluTanh);
                c.learned_positions = Some(0);
                c.layers.iter_mut().for_each(|l| l.rope = LayerRope::None);
            }
            Family::GptNeoX => {
                (c.qkv, c.mlp, c.activation) = (Qkv::PerHead, Mlp::Plain, Activation::Gelu);
                if self.gguf.boolean(&self.name("use_parallel_residual"))?.unwrap_or(true) {
                    c.placement = Placement::Parallel;
                }
            }
            _ => {}
        }
        if matches!(c.family, Family::Gpt2 | Family::GptNeoX) {
            c.norm = NormStyle::Layer;
            c.biases = Biases { qkv: true, attention_out: true, mlp: true };
        }
        if matches!(c.family, Family::Gemma2 | Family::Gemma3) {
            c.placement = Placement::Around;
            // Only the largest model of each family scales by hidden size / heads.
            let largest = if c.family == Family::Gemma2 { 46 } else { 62 };
            let scalar =
                if c.num_hidden_layers == largest { c.hidden_size / c.num_attention_heads } else { c.head_dim };
            c.attention_multiplier = 1.0 / (scalar as f64).sqrt();
            let window = self.optional("attention.sliding_window")?.unwrap_or(4096);
            let every = if c.family == Family::Gemma2 { 2 } else { 6 };
            self.windows(c, window, every)?;
        }
        if c.family == Family::Gemma2 {
            c.attention_soft_cap = Some(self.float("attn_logit_softcapping")?.unwrap_or(50.0));
            c.logits_soft_cap = Some(self.float("final_logit_softcapping")?.unwrap_or(30.0));
        }
        if c.family == Family::Gemma3 {
            c.qk_norm = QkNorm::PerHead;
            c.local_rope_theta = Some(self.float("rope.freq_base_swa")?.unwrap_or(1e4));
            c.layers.iter_mut().filter(|l| l.window.is_some()).for_each(|l| l.rope = LayerRope::Local);
        }
        Ok(())
    }

    /// Sets which maps have a bias from the tensors in the file, since files of one architecture differ.
    fn biases(&self, c: &mut DecoderConfig) {
        let there = |part: &str| self.gguf.tensor(&format!("blk.0.{part}.bias")).is_some();
        c.biases = Biases { qkv: there("attn_q"), attention_out: there("attn_output"), mlp: there("ffn_up") };
    }

    /// Sets windows on the layers that `sliding_window_pattern` selects, as a list or as all but every n-th; on all but every
    /// `usual`-th if it is missing.
    fn windows(&self, c: &mut DecoderConfig, window: usize, usual: usize) -> Result<()> {
        let key = self.name("attention.sliding_window_pattern");
        let listed: Vec<bool> = match self.gguf.get(&key) {
            Some(Value::Bools(list)) => list.clone(),
            other => {
                let every = if other.is_some() { self.required("attention.sliding_window_pattern")? } else { usual };
                (1..=c.layers.len()).map(|i| every > 0 && !i.is_multiple_of(every)).collect()
            }
        };
        if listed.len() != c.layers.len() {
            return Err(invalid!("{}: {key} names {} of {} layers", self.gguf.name(), listed.len(), c.layers.len()));
        }
        for (layer, slides) in c.layers.iter_mut().zip(listed) {
            layer.window = slides.then_some(window);
        }
        Ok(())
    }

    /// Reads the rope scaling. `context` is limited to the original context if other factors apply above it.
    fn rope_scaling(&self, context: &mut usize) -> Result<RopeScaling> {
        let (gguf, file) = (self.gguf, self.gguf.name());
        for (name, long) in [("rope_freqs.weight", false), ("rope_factors_short.weight", true)] {
            let Some(tensor) = gguf.tensor(name) else { continue };
            let bytes = gguf.tensor_bytes(tensor).filter(|_| tensor.dtype == StorageDType::F32);
            let bytes = bytes.ok_or_else(|| invalid!("{file}: {name} is not stored as f32"))?;
            let divisors = bytes.get().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            if long {
                let original = self.optional("rope.scaling.original_context_length")?.unwrap_or(*context);
                *context = (*context).min(original);
            }
            let attention_factor = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
            return Ok(RopeScaling::Divisors { divisors, attention_factor });
        }
        let (kind, factor) = (self.name("rope.scaling.type"), self.float("rope.scaling.factor")?);
        let need = || factor.ok_or_else(|| invalid!("{file}: {} is missing", self.name("rope.scaling.factor")));
        match gguf.string(&kind)? {
            None | Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: need()? }),
            Some("yarn") => Ok(RopeScaling::Yarn {
                factor: need()?,
                attention_factor: yarn_attention_factor(need()?)
                    * self.float("rope.scaling.attn_factor")?.unwrap_or(1.0),
                beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                truncate: true,
                original_max_position_embeddings: self
                    .optional("rope.scaling.original_context_length")?
                    .unwrap_or(*context),
            }),
            Some(other) => Err(invalid!("{file}: {kind} = {other:?} is not supported; linear and yarn are")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model_files::gguf::tests::Writer;
    use crate::ops::weight::Bytes;

    fn gguf_bytes(divisors: Option<&[f32]>) -> Vec<u8> {
        let w = Writer::default()
            .string("general.architecture", "llama")
            .string("general.name", "tiny")
            .u32("llama.block_count", 2)
            .u32("llama.context_length", 131_072)
            .u32("llama.embedding_length", 128)
            .u32("llama.feed_forward_length", 96)
            .u32("llama.attention.head_count", 2)
            .u32("llama.attention.head_count_kv", 1)
            .u32("tokenizer.ggml.eos_token_id", 2)
            .f32("llama.rope.freq_base", 500_000.0)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .f32_tensor("token_embd.weight", &[5, 128], &[0.; 5 * 128]);
        match divisors {
            Some(d) => w.f32_tensor("rope_freqs.weight", &[d.len()], d),
            None => w,
        }
        .finish()
    }

    /// llama.cpp's converter writes a list where a family's layers may differ.
    #[test]
    fn a_list_of_equal_sizes_is_that_size_and_of_different_ones_is_refused_with_the_layer() {
        let with = |kv: &[i32], feed: &[i32]| {
            let w = Writer::default()
                .string("general.architecture", "llama")
                .u32("llama.block_count", 2)
                .u32("llama.context_length", 2048)
                .u32("llama.embedding_length", 128)
                .i32s("llama.feed_forward_length", feed)
                .i32s("llama.attention.head_count", &[2, 2])
                .i32s("llama.attention.head_count_kv", kv)
                .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
                .f32_tensor("token_embd.weight", &[5, 128], &[0.; 5 * 128]);
            from_gguf(w.finish())
        };
        let read = with(&[1, 1], &[96, 96]).unwrap();
        assert_eq!((read.num_attention_heads, read.num_key_value_heads, read.intermediate_size), (2, 1, 96));
        let message = with(&[1, 2], &[96, 96]).unwrap_err().to_string();
        assert!(message.contains("head_count_kv is 1 in layer 0 and 2 in layer 1"), "{message}");
        assert!(with(&[], &[96]).unwrap_err().to_string().contains("is empty"));
        assert!(with(&[1, 1], &[-96, -96]).unwrap_err().to_string().contains("no size"));
    }

    fn from_gguf(bytes: Vec<u8>) -> Result<DecoderConfig> {
        decoder_config(&Gguf::parse(Bytes::new(Arc::new(bytes)), "x.gguf")?)
    }

    #[test]
    fn gguf_metadata_gives_the_same_config_and_divisors_become_llama3_again() {
        let plain = from_gguf(gguf_bytes(None)).unwrap();
        assert_eq!((plain.vocab_size, plain.head_dim, plain.norm_eps), (5, 64, 1e-5));
        assert!(plain.tie_word_embeddings && plain.rope_scaling == RopeScaling::None);
        let llama3 = DecoderConfig {
            rope_scaling: RopeScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
            ..plain.clone()
        };
        let divisors: Vec<f32> = plain.inv_freq().iter().zip(llama3.inv_freq()).map(|(p, s)| p / s).collect();
        let read = from_gguf(gguf_bytes(Some(&divisors))).unwrap();
        for (a, b) in read.inv_freq().iter().zip(llama3.inv_freq()) {
            assert!((a - b).abs() <= 1e-6 * b);
        }
        let exported = DecoderConfig::from_hf(&read.to_hf_json().unwrap(), None, "m").unwrap();
        assert_eq!(exported.rope_scaling, llama3.rope_scaling);
        let odd: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
        assert!(from_gguf(gguf_bytes(Some(&odd))).unwrap().to_hf_json().is_err());
        assert!(from_gguf(gguf_bytes(Some(&odd[..31]))).is_err());
    }
}
