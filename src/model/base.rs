//! The frozen base: embedding, blocks, final norm, output table, exactly as their file stores them. It is never
//! written and cannot be cloned; adapters are lent to each pass. Knows no role. Read roles.rs next.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::adapter::{Adapter, Gradients, LayerPairs, Linear, LinearShapes};
use super::batch::Batch;
use super::block::{Block, Checkpointing, Geometry, Kept, Layout};
use super::checkpoint::Checkpoint;
use super::config::DecoderConfig;
use crate::invalid;
use crate::ops::attention::{Cached, Heads};
use crate::ops::linear::{self, InputGradient, Part};
use crate::ops::rope::Angles;
use crate::ops::weight::{Compute, Weight};
use crate::ops::{cpu, norm};

/// Frozen weights of one decoder.
pub struct Base {
    config: DecoderConfig,
    embedding: Weight,
    blocks: Vec<Block>,
    norm: Vec<f32>,
    /// `None`: the embedding serves both ends.
    output: Option<Weight>,
    geometry: Geometry,
    fingerprint: String,
}

/// What a training pass keeps between forward and backward.
pub struct Tape {
    kept: Vec<Kept>,
    /// Input of the final norm.
    last: Tensor,
    /// The first block that was kept: below it nothing trains.
    first: usize,
}

/// Keys and values of a batch under generation, layer by layer, sequence by sequence.
pub struct Cache {
    layers: Vec<Vec<Cached>>,
}

impl Cache {
    /// Keeps the sequences for which `keep` holds; the others' memory is given back.
    pub fn retain(&mut self, keep: &[bool]) {
        for layer in &mut self.layers {
            let mut flags = keep.iter();
            layer.retain(|_| *flags.next().unwrap_or(&true));
        }
    }

    /// Bytes of keys and values.
    pub fn size_in_bytes(&self) -> usize {
        self.layers.iter().flatten().map(|c| (c.keys.capacity() + c.values.capacity()) * size_of::<f32>()).sum()
    }
}

impl Base {
    /// The weights of an opened checkpoint, as they lie in its files.
    ///
    /// # Errors
    /// If a tensor is missing, of another shape than the configuration says, or of a type that cannot be unpacked.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config().clone();
        let shapes = shapes_of(&config);
        let (d, vocab) = (config.hidden_size, config.vocab_size);
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| {
                let weight = |(i, map): (usize, &Linear)| {
                    checkpoint.weight(&format!("{}.weight", shapes.module_path(layer, i)), map.out, map.inp)
                };
                let norm = |name: &str| checkpoint.vector(&format!("model.layers.{layer}.{name}.weight"), d);
                Ok(Block {
                    linears: shapes.linears().iter().enumerate().map(weight).collect::<Result<_>>()?,
                    input_norm: norm("input_layernorm")?,
                    post_attention_norm: norm("post_attention_layernorm")?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let embedding = checkpoint.weight("model.embed_tokens.weight", vocab, d)?;
        let output = match config.tie_word_embeddings {
            true => None,
            false => Some(checkpoint.weight("lm_head.weight", vocab, d)?),
        };
        let norm = checkpoint.vector("model.norm.weight", d)?;
        Self::from_parts(config, embedding, blocks, norm, output, checkpoint.fingerprint())
    }

    /// From finished parts.
    ///
    /// # Errors
    /// If a matrix or a norm is not of the shape that the config asks for.
    pub fn from_parts(
        config: DecoderConfig,
        embedding: Weight,
        blocks: Vec<Block>,
        norm: Vec<f32>,
        output: Option<Weight>,
        fingerprint: String,
    ) -> Result<Self> {
        let heads = Heads { q: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim };
        let angles = Angles::new(&config.inv_freq(), config.max_position_embeddings);
        let geometry = Geometry { heads, eps: config.rms_norm_eps, angles };
        let base = Self { config, embedding, blocks, norm, output, geometry, fingerprint };
        let (shapes, d) = (base.shapes(), base.config.hidden_size);
        let check = |name: &str, have: [usize; 2], want: [usize; 2]| {
            anyhow::ensure!(have == want, "{name} is {have:?}, the config asks for {want:?}");
            Ok(())
        };
        let table = [base.config.vocab_size, d];
        check("the embedding", [base.embedding.rows(), base.embedding.cols()], table)?;
        if let Some(output) = &base.output {
            check("the output table", [output.rows(), output.cols()], table)?;
        }
        check("the final norm", [1, base.norm.len()], [1, d])?;
        check("the number of blocks", [1, base.blocks.len()], [1, base.config.num_hidden_layers])?;
        for (layer, block) in base.blocks.iter().enumerate() {
            check("the number of linear maps", [1, block.linears.len()], [1, shapes.linears().len()])?;
            for (i, (map, w)) in shapes.linears().iter().zip(&block.linears).enumerate() {
                check(&shapes.module_path(layer, i), [w.rows(), w.cols()], [map.out, map.inp])?;
            }
            check("a norm", [block.input_norm.len(), block.post_attention_norm.len()], [d, d])?;
        }
        Ok(base)
    }

    /// The same base, its products computed in `compute`.
    #[must_use]
    pub fn computing_in(mut self, compute: Compute) -> Self {
        let linears = self.blocks.iter_mut().flat_map(|b| &mut b.linears);
        for weight in linears.chain([&mut self.embedding]).chain(&mut self.output) {
            *weight = weight.clone().with_compute(compute);
        }
        self
    }

    /// Sizes and constants.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The sizes that an adapter must fit.
    pub fn shapes(&self) -> LinearShapes {
        shapes_of(&self.config)
    }

    /// A digest of the stored weights: equal for equal bytes, wherever they lie.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The (vocab, D) table that logits are taken with.
    pub fn output(&self) -> &Weight {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// All stored matrices under their Hugging Face names, in file order of a decoder.
    pub fn weights(&self) -> Vec<(String, &Weight)> {
        let mut all = vec![("model.embed_tokens.weight".to_string(), &self.embedding)];
        for (layer, block) in self.blocks.iter().enumerate() {
            for (i, weight) in block.linears.iter().enumerate() {
                all.push((format!("{}.weight", self.shapes().module_path(layer, i)), weight));
            }
        }
        all.extend(self.output.iter().map(|w| ("lm_head.weight".to_string(), w)));
        all
    }

    /// All norms under their Hugging Face names.
    pub fn norms(&self) -> Vec<(String, &[f32])> {
        let mut all = vec![];
        for (layer, block) in self.blocks.iter().enumerate() {
            all.push((format!("model.layers.{layer}.input_layernorm.weight"), &block.input_norm[..]));
            let name = format!("model.layers.{layer}.post_attention_layernorm.weight");
            all.push((name, &block.post_attention_norm[..]));
        }
        all.push(("model.norm.weight".to_string(), &self.norm));
        all
    }

    /// Bytes of the base as it is held: matrices as stored, norms in f32.
    pub fn size_in_bytes(&self) -> usize {
        self.weights().iter().map(|(_, w)| w.size_in_bytes()).sum::<usize>()
            + self.norms().iter().map(|(_, n)| size_of_val(*n)).sum::<usize>()
    }

    fn check(&self, adapter: Option<&Adapter>, longest: usize) -> Result<()> {
        if let Some(adapter) = adapter
            && *adapter.shapes() != self.shapes()
        {
            return Err(invalid!(
                "the adapter was made for another base: it fits {:?}, this base is {:?}",
                adapter.shapes(),
                self.shapes()
            ));
        }
        if longest > self.config.max_position_embeddings {
            return Err(invalid!(
                "a sequence of {longest} tokens is longer than the model's context of {}; shorten prompts or responses",
                self.config.max_position_embeddings
            ));
        }
        Ok(())
    }

    /// Hidden states (N, D) after the final norm; keeps nothing.
    ///
    /// # Errors
    /// If the adapter is another base's, or a sequence is longer than the context.
    pub fn hidden(&self, batch: &Batch, adapter: Option<&Adapter>) -> Result<Tensor> {
        self.check(adapter, batch.longest())?;
        let layout = Layout { offsets: batch.offsets(), positions: batch.positions() };
        let mut x = linear::embed(&self.embedding, batch.tokens())?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(pairs(adapter, layer), &self.geometry, layout, &x)?;
        }
        Ok(norm::forward(&x, &self.norm, self.geometry.eps)?)
    }

    /// Hidden states (N, D) after the final norm, with what `backward` wants. Blocks below the adapter's first branch
    /// keep nothing.
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn hidden_kept(&self, batch: &Batch, adapter: &Adapter, checkpoint: Checkpointing) -> Result<(Tensor, Tape)> {
        self.check(Some(adapter), batch.longest())?;
        let layout = Layout { offsets: batch.offsets(), positions: batch.positions() };
        let first = adapter.layers().iter().position(|p| p.iter().any(Option::is_some)).unwrap_or(self.blocks.len());
        let mut x = linear::embed(&self.embedding, batch.tokens())?;
        let mut kept = Vec::with_capacity(self.blocks.len() - first);
        for (layer, block) in self.blocks.iter().enumerate() {
            let pairs = pairs(Some(adapter), layer);
            if layer < first {
                x = block.forward(pairs, &self.geometry, layout, &x)?;
            } else {
                let (y, k) = block.forward_kept(pairs, &self.geometry, layout, x, checkpoint)?;
                kept.push(k);
                x = y;
            }
        }
        let h = norm::forward(&x, &self.norm, self.geometry.eps)?;
        Ok((h, Tape { kept, last: x, first }))
    }

    /// Gradients of the adapter's branches, of dL/dh (N, D). The blocks' activations are given back as it goes.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, batch: &Batch, adapter: &Adapter, tape: Tape, dh: &Tensor) -> Result<Gradients> {
        let layout = Layout { offsets: batch.offsets(), positions: batch.positions() };
        let mut grads = Gradients::none(self.blocks.len());
        let zero = dh.zeros_like()?;
        let mut dy = norm::backward(&tape.last, &self.norm, self.geometry.eps, dh, &zero)?;
        drop(zero);
        let kept = tape.kept.into_iter().enumerate().map(|(i, k)| (tape.first + i, k));
        for (layer, kept) in kept.collect::<Vec<_>>().into_iter().rev() {
            let wanted = if layer == tape.first { InputGradient::Unused } else { InputGradient::Wanted };
            let pairs = pairs(Some(adapter), layer);
            let (dx, g) = self.blocks[layer].backward(pairs, &self.geometry, layout, kept, &dy, wanted)?;
            grads.layers[layer] = g;
            match dx {
                Some(dx) => dy = dx,
                None => break,
            }
        }
        Ok(grads)
    }

    /// Starts generation: runs the prompts, fills a cache, and returns the hidden state (S, D) of each last token.
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn prefill(&self, batch: &Batch, adapter: Option<&Adapter>) -> Result<(Tensor, Cache)> {
        self.check(adapter, batch.longest())?;
        let layout = Layout { offsets: batch.offsets(), positions: batch.positions() };
        let mut cache = Cache { layers: vec![vec![Cached::default(); batch.len()]; self.blocks.len()] };
        let mut x = linear::embed(&self.embedding, batch.tokens())?;
        for ((layer, block), caches) in self.blocks.iter().enumerate().zip(&mut cache.layers) {
            x = block.prefill(pairs(adapter, layer), &self.geometry, layout, &x, caches)?;
        }
        let last = select_rows(&x, &batch.last_rows())?;
        Ok((norm::forward(&last, &self.norm, self.geometry.eps)?, cache))
    }

    /// Hidden state (S, D) after one more token a sequence, at `positions` (S).
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn decode(
        &self,
        tokens: &[u32],
        positions: &[u32],
        adapter: Option<&Adapter>,
        cache: &mut Cache,
    ) -> Result<Tensor> {
        self.check(adapter, positions.iter().max().map_or(0, |&p| p as usize + 1))?;
        let mut x = linear::embed(&self.embedding, tokens)?;
        for ((layer, block), caches) in self.blocks.iter().enumerate().zip(&mut cache.layers) {
            x = block.decode(pairs(adapter, layer), &self.geometry, positions, &x, caches)?;
        }
        Ok(norm::forward(&x, &self.norm, self.geometry.eps)?)
    }

    /// Logits (S, vocab) of hidden states (S, D): for sampling, where S is small. Scoring goes through `ops::head`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let (mut logits, _) = linear::forward(hidden, &[Part { weight: self.output(), lora: None }], None)?;
        logits.pop().context("a linear gives one output a part")
    }
}

fn shapes_of(c: &DecoderConfig) -> LinearShapes {
    let (q_out, kv_out) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    LinearShapes::llama(c.num_hidden_layers, c.hidden_size, q_out, kv_out, c.intermediate_size)
}

fn pairs(adapter: Option<&Adapter>, layer: usize) -> Option<&LayerPairs> {
    adapter.and_then(|a| a.layers().get(layer))
}

/// Rows `rows` of x (N, D), in that order.
///
/// # Errors
/// If a row does not exist.
pub fn select_rows(x: &Tensor, rows: &[usize]) -> candle_core::Result<Tensor> {
    let (n, d) = x.dims2()?;
    let xs = cpu::view(x)?;
    let mut out = Vec::with_capacity(rows.len() * d);
    for &row in rows {
        if row >= n {
            candle_core::bail!("row {row} of {n}");
        }
        out.extend_from_slice(&xs[row * d..(row + 1) * d]);
    }
    cpu::tensor(out, (rows.len(), d))
}

/// The transpose of [`select_rows`]: (n, D) with `values`' rows added at `rows`, zeros elsewhere.
///
/// # Errors
/// If a row does not exist.
pub fn scatter_rows(values: &Tensor, rows: &[usize], n: usize) -> candle_core::Result<Tensor> {
    let (r, d) = values.dims2()?;
    let vs = cpu::view(values)?;
    let mut out = vec![0f32; n * d];
    if r != rows.len() || rows.iter().any(|&row| row >= n) {
        candle_core::bail!("{r} rows of values for {} rows of {n}", rows.len());
    }
    for (value, &row) in vs.chunks_exact(d).zip(rows) {
        for (o, v) in out[row * d..(row + 1) * d].iter_mut().zip(value) {
            *o += v;
        }
    }
    cpu::tensor(out, (n, d))
}
