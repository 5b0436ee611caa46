//! The frozen base: embedding, blocks, final norm, output table, exactly as their file stores them. It is never
//! written and cannot be cloned; adapters are lent to each pass. Knows no role. Read roles.rs next.

use anyhow::Result;
use candle_core::Tensor;

use std::borrow::Cow;

use super::adapter::{Adapter, Gradients, LinearShapes};
use super::batch::Batch;
use super::block::{Block, Geometry, Layout};
use super::config::{DecoderConfig, LayerRope, NormStyle, PROJECT_IN, PROJECT_OUT, Placement, RopeScaling};
use crate::invalid;
use crate::model::adapter::{LoraLayer, LoraLayers, NonBlockModule, TargetModule};
use crate::model::block::{Recompute, Saved};
use crate::model::embeddings;
use crate::model::embeddings::Embeddings;
use crate::ops::attention::Cached;
use crate::ops::cpu;
use crate::ops::linear::{InputGradient, LinearWithLora};
use crate::ops::logprobs::LmHead;
use crate::ops::norm::{Norm, NormKind};
use crate::ops::rope::RopeTable;
use crate::ops::weight::{ComputeDtype, Weight};

/// Frozen weights of one decoder.
pub struct Base {
    config: DecoderConfig,
    weights: Weights,
    geometry: Geometry,
    fingerprint: String,
}

/// All weights of a decoder.
pub struct Weights {
    /// The token table (vocab, E).
    pub embedding: Weight,
    /// The table of learned positions (positions, D).
    pub positions: Option<Weight>,
    /// (D, E) into the blocks and (E, D) out of them, where E is not D.
    pub projections: Option<[Weight; 2]>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// After the last block.
    pub norm: Option<Norm>,
    /// The table of the logits (vocab, E); `None`: the embedding serves both ends.
    pub output: Option<Weight>,
}

/// What a training pass keeps between forward and backward.
pub struct Tape {
    kept: Vec<Saved>,
    /// Output of the last block.
    last: Tensor,
    /// The first block that was kept: below it no block has a branch, nor the way into it.
    first: usize,
    ends: embeddings::Saved,
}

/// Keys and values of a batch under generation, layer by layer, sequence by sequence.
pub struct KvCache {
    layers: Vec<Vec<Cached>>,
}

impl KvCache {
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
    /// From finished parts.
    ///
    /// # Errors
    /// If a matrix or a norm is not of the shape that the config asks for.
    pub fn from_parts(config: DecoderConfig, weights: Weights, fingerprint: String) -> Result<Self> {
        let factor = config.rope_scaling.attention_factor() as f32;
        let turns = |inv_freq: &[f32], factor: f32| {
            RopeTable::new(inv_freq, config.head_dim, config.max_position_embeddings, factor)
        };
        let mut angles = vec![];
        if config.layers.iter().any(|l| l.rope != LayerRope::None) {
            angles.push(turns(&config.inv_freq(), factor));
        }
        if config.layers.iter().any(|l| l.rope == LayerRope::Local) {
            angles.push(turns(&config.local_inv_freq(), 1.0));
        }
        let geometry = Geometry {
            qkv: config.qkv,
            mlp: config.mlp,
            activation: config.activation,
            parallel: config.placement == Placement::Parallel,
            residual_multiplier: config.residual_multiplier as f32,
            angles,
        };
        let base = Self { config, weights, geometry, fingerprint };
        let (shapes, d, e) = (base.shapes(), base.config.hidden_size, base.config.embedding_width);
        let check = |name: &str, have: [usize; 2], want: [usize; 2]| {
            anyhow::ensure!(have == want, "{name} is {have:?}, the config asks for {want:?}");
            Ok(())
        };
        let size = |w: &Weight| [w.rows(), w.cols()];
        let table = [base.config.vocab_size, e];
        check("the embedding", size(&base.weights.embedding), table)?;
        if let Some(output) = &base.weights.output {
            check("the output table", size(output), table)?;
        }
        if let Some([into, out]) = &base.weights.projections {
            check("the map into the blocks", size(into), [d, e])?;
            check("the map out of the blocks", size(out), [e, d])?;
        }
        anyhow::ensure!(base.weights.projections.is_some() == (d != e), "maps in and out of the blocks, or none");
        check("the number of blocks", [1, base.weights.blocks.len()], [1, base.config.num_hidden_layers])?;
        for (layer, block) in base.weights.blocks.iter().enumerate() {
            check("the number of linear maps", [1, block.linears.len()], [1, shapes.linears().len()])?;
            for (i, (map, linear)) in shapes.linears().iter().zip(&block.linears).enumerate() {
                check(&shapes.module_path(layer, i), size(&linear.weight), [map.out_features, map.in_features])?;
            }
            let norms = [&block.attention_norms, &block.mlp_norms];
            for norm in norms.into_iter().flat_map(|n| [&n.before, &n.inner, &n.after]).flatten() {
                check("a norm", [1, norm.width()], [1, d])?;
            }
        }
        Ok(base)
    }

    /// The same base, its products computed in `compute`.
    #[must_use]
    pub fn computing_in(mut self, compute: ComputeDtype) -> Self {
        let w = &mut self.weights;
        let linears = w.blocks.iter_mut().flat_map(|b| &mut b.linears).map(|l| &mut l.weight);
        let projections = w.projections.iter_mut().flatten();
        for weight in linears.chain([&mut w.embedding]).chain(projections).chain(&mut w.output) {
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
        self.config.shapes()
    }

    /// A digest of the stored weights: equal for equal bytes, wherever they lie.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The table that logits are taken with, the adapter's branch on it, and what is done to them.
    pub fn table<'a>(&'a self, adapter: Option<&'a Adapter>) -> LmHead<'a> {
        LmHead {
            weight: self.weights.output.as_ref().unwrap_or(&self.weights.embedding),
            multiplier: self.config.logits_multiplier as f32,
            soft_cap: self.config.logits_soft_cap.map(|c| c as f32),
            lora: adapter.and_then(|a| a.outer(NonBlockModule::Head)).map(LoraLayer::low_rank),
        }
    }

    /// The matrix at a place that can carry a branch, (out, in); the token table as it is, (vocab, E).
    pub fn matrix(&self, slot: TargetModule) -> Option<&Weight> {
        let w = &self.weights;
        match slot {
            TargetModule::Block { layer, linear } => w.blocks.get(layer)?.linears.get(linear).map(|l| &l.weight),
            TargetModule::NonBlockModule(NonBlockModule::Embedding) => Some(&w.embedding),
            TargetModule::NonBlockModule(NonBlockModule::ProjectIn) => w.projections.as_ref().map(|p| &p[0]),
            TargetModule::NonBlockModule(NonBlockModule::ProjectOut) => w.projections.as_ref().map(|p| &p[1]),
            TargetModule::NonBlockModule(NonBlockModule::Head) => Some(w.output.as_ref().unwrap_or(&w.embedding)),
        }
    }

    pub(super) fn parts(&self) -> &Weights {
        &self.weights
    }

    /// All stored matrices under their Hugging Face names, (out, in) each, in file order of a decoder.
    pub fn weights(&self) -> Vec<(String, &Weight)> {
        let (w, names) = (&self.weights, self.config.names());
        let mut all = vec![(names.embedding.to_string(), &w.embedding)];
        all.extend(w.positions.iter().map(|p| (names.positions.to_string(), p)));
        if let Some([into, out]) = &w.projections {
            all.extend([(PROJECT_IN.to_string(), into), (PROJECT_OUT.to_string(), out)]);
        }
        let shapes = self.shapes();
        for (layer, block) in w.blocks.iter().enumerate() {
            for (i, linear) in block.linears.iter().enumerate() {
                all.push((format!("{}.weight", shapes.module_path(layer, i)), &linear.weight));
            }
        }
        all.extend(w.output.iter().map(|w| (names.output.to_string(), w)));
        all
    }

    /// Whether Hugging Face's files keep this matrix as (in, out).
    pub fn lies_transposed(&self, name: &str) -> bool {
        self.config.lies_transposed(name)
    }

    /// All norms and biases under their Hugging Face names, with the numbers of Hugging Face's files.
    pub fn vectors(&self) -> Vec<(String, Cow<'_, [f32]>)> {
        let (names, shapes) = (self.config.names(), self.shapes());
        let mut all = vec![];
        let plus_one = self.config.norm == NormStyle::RmsPlusOne;
        fn put<'a>(all: &mut Vec<(String, Cow<'a, [f32]>)>, path: &str, norm: &'a Norm, plus_one: bool) {
            let weight = match plus_one {
                true => Cow::Owned(norm.weight.iter().map(|w| w - 1.0).collect()),
                false => Cow::Borrowed(&norm.weight[..]),
            };
            all.push((format!("{path}.weight"), weight));
            if let NormKind::Layer { bias } = &norm.kind {
                all.push((format!("{path}.bias"), Cow::Borrowed(&bias[..])));
            }
        }
        for (layer, block) in self.weights.blocks.iter().enumerate() {
            for (i, linear) in block.linears.iter().enumerate() {
                let name = || format!("{}.bias", shapes.module_path(layer, i));
                all.extend(linear.bias.iter().map(|b| (name(), Cow::Borrowed(&b[..]))));
            }
            let path = |part: &str| format!("{}.{layer}.{part}", names.blocks);
            for (half, name) in [(&block.attention_norms, 0), (&block.mlp_norms, 2)] {
                for (norm, name) in [(&half.before, name), (&half.inner, name + 1), (&half.after, name)] {
                    if let Some(norm) = norm {
                        put(&mut all, &path(names.norms[name]), norm, plus_one);
                    }
                }
            }
            if let Some([q, k]) = &block.qk_norms {
                put(&mut all, &path("self_attn.q_norm"), q, plus_one);
                put(&mut all, &path("self_attn.k_norm"), k, plus_one);
            }
        }
        if let Some(norm) = &self.weights.norm {
            put(&mut all, names.final_norm, norm, plus_one);
        }
        all
    }

    /// Bytes of the base as it is held: matrices as stored, norms and biases in f32.
    pub fn size_in_bytes(&self) -> usize {
        self.weights().iter().map(|(_, w)| w.size_in_bytes()).sum::<usize>()
            + self.vectors().iter().map(|(_, v)| size_of_val(&v[..])).sum::<usize>()
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
            let why = match self.config.rope_scaling {
                RopeScaling::Divisors { .. } => " (longrope's long factors, for more, are not supported)",
                _ => "",
            };
            return Err(invalid!(
                "a sequence of {longest} tokens is longer than the model's context of {}{why}; shorten prompts or \
                 responses",
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
        let layout = Layout::of(batch);
        let (ends, mut unused) = (Embeddings::of(self, adapter), embeddings::Saved::default());
        let mut x = ends.start(batch.tokens(), batch.positions(), &mut unused)?;
        for (layer, block) in self.weights.blocks.iter().enumerate() {
            x = block.forward(pairs(adapter, layer), &self.geometry, layout, &x)?;
        }
        ends.finish(x, &mut unused)
    }

    /// Hidden states (N, D) after the final norm, with what `backward` wants. Blocks below the adapter's first branch
    /// keep nothing.
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn hidden_kept(&self, batch: &Batch, adapter: &Adapter, checkpoint: Recompute) -> Result<(Tensor, Tape)> {
        self.check(Some(adapter), batch.longest())?;
        let layout = Layout::of(batch);
        let (ends, mut kept_ends) = (Embeddings::of(self, Some(adapter)), embeddings::Saved::default());
        let lowest = adapter.layers().iter().position(|p| p.iter().any(Option::is_some));
        let first = match ends.trains_before() {
            true => 0,
            false => lowest.unwrap_or(self.weights.blocks.len()),
        };
        let mut x = ends.start(batch.tokens(), batch.positions(), &mut kept_ends)?;
        let mut kept = Vec::with_capacity(self.weights.blocks.len() - first);
        for (layer, block) in self.weights.blocks.iter().enumerate() {
            let pairs = pairs(Some(adapter), layer);
            if layer < first {
                x = block.forward(pairs, &self.geometry, layout, &x)?;
            } else {
                let (y, k) = block.forward_kept(pairs, &self.geometry, layout, x, checkpoint)?;
                kept.push(k);
                x = y;
            }
        }
        let h = ends.finish(x.clone(), &mut kept_ends)?;
        Ok((h, Tape { kept, last: x, first, ends: kept_ends }))
    }

    /// Gradients of the adapter's branches but the output table's, which is the head's to give, of dL/dh (N, D). The
    /// blocks' activations are given back as it goes.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, batch: &Batch, adapter: &Adapter, tape: Tape, dh: Tensor) -> Result<Gradients> {
        let layout = Layout::of(batch);
        let mut grads = Gradients::none(self.weights.blocks.len());
        let ends = Embeddings::of(self, Some(adapter));
        let mut dy = ends.finish_backward(&tape.last, &tape.ends, &dh, &mut grads)?;
        drop((tape.last, dh));
        let kept = tape.kept.into_iter().enumerate().map(|(i, k)| (tape.first + i, k));
        for (layer, kept) in kept.collect::<Vec<_>>().into_iter().rev() {
            let unused = layer == tape.first && !ends.trains_before();
            let wanted = if unused { InputGradient::Unused } else { InputGradient::Wanted };
            let pairs = pairs(Some(adapter), layer);
            let (dx, g) = self.weights.blocks[layer].backward(pairs, &self.geometry, layout, kept, dy, wanted)?;
            grads.layers[layer] = g;
            match dx {
                Some(dx) => dy = dx,
                None => return Ok(grads),
            }
        }
        if ends.trains_before() {
            ends.start_backward(batch.tokens(), &tape.ends, &dy, &mut grads)?;
        }
        Ok(grads)
    }

    /// Starts generation: runs the prompts, fills a cache with room for `room` tokens more of each answer, and returns the
    /// hidden state (S, D) of each one's last prompt token. `sources` (S): which prompt of the batch an answer is to.
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn prefill(
        &self,
        batch: &Batch,
        sources: &[usize],
        adapter: Option<&Adapter>,
        room: usize,
    ) -> Result<(Tensor, KvCache)> {
        self.check(adapter, batch.longest())?;
        let layout = Layout::of(batch);
        let mut cache = KvCache { layers: vec![vec![Cached::default(); sources.len()]; self.weights.blocks.len()] };
        let (ends, mut unused) = (Embeddings::of(self, adapter), embeddings::Saved::default());
        let mut x = ends.start(batch.tokens(), batch.positions(), &mut unused)?;
        for ((layer, block), caches) in self.weights.blocks.iter().enumerate().zip(&mut cache.layers) {
            x = block.prefill(pairs(adapter, layer), &self.geometry, (layout, sources), &x, room, caches)?;
        }
        let last = batch.last_rows();
        let last = select_rows(&x, &sources.iter().map(|&i| last[i]).collect::<Vec<_>>())?;
        drop(x);
        Ok((ends.finish(last, &mut unused)?, cache))
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
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        self.check(adapter, positions.iter().max().map_or(0, |&p| p as usize + 1))?;
        let (ends, mut unused) = (Embeddings::of(self, adapter), embeddings::Saved::default());
        let mut x = ends.start(tokens, positions, &mut unused)?;
        for ((layer, block), caches) in self.weights.blocks.iter().enumerate().zip(&mut cache.layers) {
            x = block.decode(pairs(adapter, layer), &self.geometry, positions, &x, caches)?;
        }
        ends.finish(x, &mut unused)
    }

    /// Logits (S, vocab) of hidden states (S, D), with the adapter's branch on the output table: for sampling, where S
    /// is small. Scoring goes through `ops::head`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn logits(&self, hidden: &Tensor, adapter: Option<&Adapter>) -> Result<Tensor> {
        let table = self.table(adapter);
        let (logits, _) =
            embeddings::one(hidden, LinearWithLora { weight: table.weight, bias: None, lora: table.lora })?;
        if table.multiplier == 1.0 && table.soft_cap.is_none() {
            return Ok(logits);
        }
        let mut shaped = cpu::view(&logits)?.to_vec();
        table.shape(&mut shaped);
        Ok(cpu::tensor(shaped, logits.dims2()?)?)
    }
}

fn pairs(adapter: Option<&Adapter>, layer: usize) -> Option<&LoraLayers> {
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
