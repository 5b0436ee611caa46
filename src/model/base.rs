//! The frozen base: embedding, blocks, final norm, lm_head, exactly as its files store them. It is never modified and
//! cannot be cloned, so that all roles share one copy; adapters are passed to each forward and backward. It does not
//! depend on roles. Read `embeddings.rs` and `block/mod.rs` beside it, then `roles.rs`.

use anyhow::{Context, Result};

use crate::device::{Array, Device, Pass};

use std::borrow::Cow;
use std::sync::Arc;

use super::adapter::{Adapter, Gradients, LinearShapes};
use super::batch::Batch;
use super::block::{Block, Geometry, Layout, Setting};
use super::config::{DecoderConfig, LayerRope, NormStyle, PROJECT_IN, PROJECT_OUT, Placement, RopeScaling};
use super::inputs::{self, HostInputs};
use super::kv_cache::KvCache;
use super::stream::{self, Course, LayerStream, Visit};
use crate::invalid;
use crate::model::adapter::{LoraLayer, LoraLayers, NonBlockModule, TargetModule};
use crate::model::block::{Recompute, Saved};
use crate::model::embeddings::{self, Embeddings};
use crate::ops::attention::{self, KvCacheType};
use crate::ops::linear::InputGradient;
use crate::ops::linear::gpu::Dequantising;
use crate::ops::logprobs::{self, LmHead, Logits};
use crate::ops::norm::{Norm, NormKind};
use crate::ops::rope::RopeTable;
use crate::ops::rope::gpu::DeviceRopeTable;
use crate::ops::rows::gather_rows;
use crate::ops::weight::{ComputeDtype, Weight};

/// Frozen weights of one decoder.
pub struct Base {
    config: DecoderConfig,
    weights: Weights,
    pub(super) geometry: Geometry,
    fingerprint: String,
    /// What keys and values are cached as.
    kv_cache_type: KvCacheType,
    /// The layers that a device does not keep.
    stream: Option<LayerStream>,
    /// Pinned memory of the inputs of blocks under `Recompute::Offload`.
    inputs: inputs::Pool,
}

/// All weights of a decoder.
pub struct Weights {
    /// The embedding matrix (vocab, E).
    pub embedding: Weight,
    /// The embedding matrix of learned positions (positions, D), if the family has one.
    pub positions: Option<Weight>,
    /// The projections into the blocks (D, E) and out of them (E, D), if E is not D.
    pub projections: Option<[Weight; 2]>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// The final norm, after the last block.
    pub norm: Option<Norm>,
    /// The lm_head (vocab, E); `None`: it is tied to the embedding matrix.
    pub output: Option<Weight>,
}

/// Tensors that a training pass saves between forward and backward.
pub struct Tape {
    /// Empty where the blocks' inputs wait on the host.
    blocks: Vec<Saved>,
    inputs: Option<HostInputs>,
    /// Output of the last block.
    last: Array,
    /// The first block that saved tensors: blocks below it need no backward, as neither they nor the embedding have LoRA
    /// weights.
    first: usize,
    embeddings: embeddings::Saved,
}

impl Base {
    /// A base of existing weights.
    ///
    /// # Errors
    /// If a matrix or a norm has another shape than the configuration requires.
    pub fn from_parts(config: DecoderConfig, weights: Weights, fingerprint: String) -> Result<Self> {
        let factor = config.rope_scaling.attention_factor() as f32;
        let table = |inv_freq: &[f32], factor: f32| {
            RopeTable::new(inv_freq, config.head_dim, config.max_position_embeddings, factor)
        };
        let mut rope_tables = vec![];
        if config.layers.iter().any(|l| l.rope != LayerRope::None) {
            rope_tables.push(table(&config.inv_freq(), factor));
        }
        if config.layers.iter().any(|l| l.rope == LayerRope::Local) {
            rope_tables.push(table(&config.local_inv_freq(), 1.0));
        }
        let geometry = Geometry {
            qkv: config.qkv,
            mlp: config.mlp,
            activation: config.activation,
            parallel: config.placement == Placement::Parallel,
            residual_multiplier: config.residual_multiplier as f32,
            rope_tables,
            dequantise: Setting::default(),
        };
        let kv_cache_type = KvCacheType::Auto;
        let base = Self {
            config,
            weights,
            geometry,
            fingerprint,
            kv_cache_type,
            stream: None,
            inputs: inputs::Pool::default(),
        };
        let (shapes, d, e) = (base.shapes(), base.config.hidden_size, base.config.embedding_width);
        let check = |name: &str, have: [usize; 2], want: [usize; 2]| {
            anyhow::ensure!(have == want, "{name} is {have:?}, the configuration requires {want:?}");
            Ok(())
        };
        let size = |w: &Weight| [w.rows(), w.cols()];
        let vocab = [base.config.vocab_size, e];
        check("the embedding", size(&base.weights.embedding), vocab)?;
        if let Some(output) = &base.weights.output {
            check("the lm_head", size(output), vocab)?;
        }
        if let Some([into, out]) = &base.weights.projections {
            check("the projection into the blocks", size(into), [d, e])?;
            check("the projection out of the blocks", size(out), [e, d])?;
        }
        anyhow::ensure!(
            base.weights.projections.is_some() == (d != e),
            "projections into and out of the blocks are needed exactly if the embedding has another width"
        );
        check("the number of blocks", [1, base.weights.blocks.len()], [1, base.config.num_hidden_layers])?;
        for (layer, block) in base.weights.blocks.iter().enumerate() {
            check("the number of linear layers", [1, block.linears.len()], [1, shapes.linears().len()])?;
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

    /// The same base, with products computed in `compute`.
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

    /// The same base, whose caches of keys and values are stored as `kind`; only a device's can be other than `Auto`.
    ///
    /// # Errors
    /// If the model's heads are no whole number of blocks.
    pub fn caching_in(self, kind: KvCacheType) -> Result<Self> {
        let dim = self.config.head_dim;
        if kind == KvCacheType::Q8_0 && !dim.is_multiple_of(attention::device_cache::BLOCK) {
            return Err(invalid!(
                "kv_cache_type = \"q8_0\" has blocks of 32 numbers along a head, and the heads of this model have {dim}; remove it"
            ));
        }
        Ok(Self { kv_cache_type: kind, ..self })
    }

    /// What keys and values are cached as.
    pub fn kv_cache_type(&self) -> KvCacheType {
        self.kv_cache_type
    }

    /// How passes that begin from now on dequantise weights on a device. No number depends on it.
    pub fn set_dequantise(&self, how: Dequantising) {
        self.geometry.dequantise.set(how);
    }

    /// The same base on a device, or on the host for `None`: the device's passes read copies of the weights there, which are
    /// uploaded in the order of the files. `progress` is called with the number of uploaded and of all bytes.
    ///
    /// # Errors
    /// If the device does not support the type that products are computed in, device memory is out, or a copy fails.
    pub fn on(self, device: Option<Device>, progress: impl FnMut(usize, usize)) -> Result<Self> {
        self.streaming(device, 0, progress)
    }

    /// The same base on a device that keeps all but `layers` of its layers. Those lie in pinned memory of the host and are copied
    /// while the layers before them compute, whenever a pass needs them. On the host, `layers` has no effect.
    ///
    /// # Errors
    /// As for [`Base::on`]; if the base has fewer layers, or the host has too little memory to pin.
    pub fn streaming(
        mut self,
        device: Option<Device>,
        layers: usize,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        self.stream = None;
        let w = &mut self.weights;
        if layers > w.blocks.len() {
            return Err(invalid!(
                "offload = {layers} is more than the base's {} layers; use \"auto\", or {} to keep none on the device",
                w.blocks.len(),
                w.blocks.len()
            ));
        }
        let linears = w.blocks.iter_mut().flat_map(|b| &mut b.linears).map(|l| &mut l.weight);
        let outside = [&mut w.embedding].into_iter().chain(&mut w.positions).chain(w.projections.iter_mut().flatten());
        for weight in outside.chain(linears).chain(&mut w.output) {
            *weight = weight.clone().with_place(device.clone());
        }
        let Some(device) = device else { return Ok(self) };
        let element = self.weights.embedding.compute().element();
        if !device.supports(element) {
            return Err(invalid!(
                "{} does not compute in {element}; set [base] compute_dtype = \"f16\" or \"f32\"",
                device.name()
            ));
        }
        let bytes = self.weights().iter().map(|(_, weight)| weight.size_in_bytes()).sum();
        let (mut done, of) = (0, self.weights.blocks.len());
        let mut more = |size: usize| {
            done += size;
            progress(done, bytes);
        };
        let is_streamed = |layer: usize| stream::is_streamed(layer, layers, of);
        let kept = self.weights.blocks.iter().enumerate().filter(|(layer, _)| !is_streamed(*layer));
        let kept = kept.flat_map(|(_, block)| &block.linears).map(|linear| &linear.weight);
        let w = &self.weights;
        let outside = [&w.embedding].into_iter().chain(&w.positions).chain(w.projections.iter().flatten());
        for weight in outside.chain(kept).chain(&w.output) {
            weight.on(&device)?;
            more(weight.size_in_bytes());
        }
        if layers > 0 {
            self.stream = Some(LayerStream::new(&device, &mut self.weights.blocks, layers, more)?);
        }
        Ok(self)
    }

    /// Bytes that a device needs for the matrices if it does not keep `layers` of the layers.
    pub fn bytes_on_device(&self, layers: usize) -> usize {
        let bytes = |block: &Block| block.linears.iter().map(|linear| linear.weight.size_in_bytes()).sum::<usize>();
        let blocks = &self.weights.blocks;
        let streamed = blocks.iter().enumerate().filter(|(i, _)| stream::is_streamed(*i, layers, blocks.len()));
        let streamed: Vec<usize> = streamed.map(|(_, block)| bytes(block)).collect();
        let all = self.weights().iter().map(|(_, weight)| weight.size_in_bytes()).sum::<usize>();
        let buffers = stream::BUFFERS.min(streamed.len()) * streamed.iter().max().copied().unwrap_or(0);
        all - streamed.iter().sum::<usize>() + buffers
    }

    /// The number of layers that the device does not keep.
    pub fn streamed_layers(&self) -> usize {
        self.stream.as_ref().map_or(0, LayerStream::count)
    }

    /// Whether passes copy layers to the device. Such a pass waits for copies of a second stream, so it cannot be recorded once
    /// and replayed.
    pub fn streams(&self) -> bool {
        self.stream.is_some()
    }

    /// Bytes of pinned memory of the host that hold layers which the device does not keep, and inputs of blocks between passes.
    pub fn pinned_bytes(&self) -> usize {
        self.stream.as_ref().map_or(0, LayerStream::pinned_bytes) + self.inputs.bytes()
    }

    /// A block for one step of a pass: the only place where a block's matrices come from.
    pub(super) fn block(&self, layer: usize, course: Course) -> Result<Visit<'_>> {
        let block = &self.weights.blocks[layer];
        match &self.stream {
            Some(stream) => stream.visit(block, layer, course),
            None => Ok(Visit::resident(block)),
        }
    }

    /// The device that passes run on; `None` is the host.
    pub fn place(&self) -> Option<&Device> {
        self.weights.embedding.place()
    }

    /// Whether gradients pass through f16, whose smallest numbers a loss's derivatives may be below.
    pub(super) fn scales_gradients(&self) -> bool {
        self.place().is_some() && self.weights.embedding.compute() == ComputeDtype::F16
    }

    /// The tables on the device that rotate positions up to `last`.
    pub(super) fn rope_tables_on(&self, device: &Device, last: usize) -> Result<Vec<Arc<DeviceRopeTable>>> {
        self.geometry.rope_tables.iter().map(|table| table.on(device, last)).collect()
    }

    /// Begins a pass on the base's device, which lasts as long as the value.
    pub(super) fn pass(&self) -> Option<Pass> {
        self.place().map(Device::pass)
    }

    /// The configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The shapes that an adapter must fit.
    pub fn shapes(&self) -> LinearShapes {
        self.config.shapes()
    }

    /// A digest of the stored weights: equal for equal bytes, whatever the path of the files.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The lm_head, with the adapter's LoRA weights on it.
    pub fn lm_head<'a>(&'a self, adapter: Option<&'a Adapter>) -> LmHead<'a> {
        LmHead {
            weight: self.weights.output.as_ref().unwrap_or(&self.weights.embedding),
            multiplier: self.config.logits_multiplier as f32,
            soft_cap: self.config.logits_soft_cap.map(|c| c as f32),
            lora: adapter.and_then(|a| a.outer(NonBlockModule::Head)).map(LoraLayer::low_rank),
        }
    }

    /// The weight of a target module, (out, in); the embedding matrix as stored, (vocab, E).
    pub fn matrix(&self, module: TargetModule) -> Option<&Weight> {
        let w = &self.weights;
        match module {
            TargetModule::Block { layer, linear } => w.blocks.get(layer)?.linears.get(linear).map(|l| &l.weight),
            TargetModule::NonBlockModule(NonBlockModule::Embedding) => Some(&w.embedding),
            TargetModule::NonBlockModule(NonBlockModule::ProjectIn) => w.projections.as_ref().map(|p| &p[0]),
            TargetModule::NonBlockModule(NonBlockModule::ProjectOut) => w.projections.as_ref().map(|p| &p[1]),
            TargetModule::NonBlockModule(NonBlockModule::Head) => Some(w.output.as_ref().unwrap_or(&w.embedding)),
        }
    }

    pub(super) fn frozen(&self) -> &Weights {
        &self.weights
    }

    /// All matrices, (out, in) each, under their Hugging Face names, in the order of a decoder.
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

    /// Whether Hugging Face's files store this matrix as (in, out).
    pub fn lies_transposed(&self, name: &str) -> bool {
        self.config.lies_transposed(name)
    }

    /// All norms and biases under their Hugging Face names, with the values of Hugging Face's files.
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
                all.extend(linear.bias.iter().map(|b| (name(), Cow::Borrowed(&b.values[..]))));
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

    /// Bytes of the base in memory: matrices as stored, norms and biases in f32.
    pub fn size_in_bytes(&self) -> usize {
        self.weights().iter().map(|(_, w)| w.size_in_bytes()).sum::<usize>()
            + self.vectors().iter().map(|(_, v)| size_of_val(&v[..])).sum::<usize>()
    }

    pub(super) fn check(&self, adapter: Option<&Adapter>, longest: usize) -> Result<()> {
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

    /// Hidden states (N, D) after the final norm; saves nothing.
    ///
    /// # Errors
    /// If the adapter was made for another base, or a sequence is longer than the context.
    pub fn hidden(&self, batch: &Batch, adapter: Option<&Adapter>) -> Result<Array> {
        let _pass = self.pass();
        self.check(adapter, batch.longest())?;
        let layout = Layout::of(batch);
        let (embeddings, mut unused) = (Embeddings::of(self, adapter), embeddings::Saved::default());
        let mut x = embeddings.input(batch.tokens(), batch.positions(), &mut unused)?;
        for layer in 0..self.weights.blocks.len() {
            let block = self.block(layer, Course::Forward)?;
            x = block.forward(layer_lora(adapter, layer), &self.geometry, layout, &x)?;
        }
        embeddings.output(x, &mut unused)
    }

    /// Hidden states (N, D) after the final norm, and the tensors saved for `backward`. Blocks below the adapter's
    /// first LoRA weights save nothing.
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn forward(&self, batch: &Batch, adapter: &Adapter, recompute: Recompute) -> Result<(Array, Tape)> {
        let _pass = self.pass();
        self.check(Some(adapter), batch.longest())?;
        let layout = Layout::of(batch);
        let (embeddings, mut saved) = (Embeddings::of(self, Some(adapter)), embeddings::Saved::default());
        let lowest = adapter.layers().iter().position(|p| p.iter().any(Option::is_some));
        let first = match embeddings.train_below_blocks() {
            true => 0,
            false => lowest.unwrap_or(self.weights.blocks.len()),
        };
        let mut x = embeddings.input(batch.tokens(), batch.positions(), &mut saved)?;
        let trained = self.weights.blocks.len() - first;
        let mut inputs = match x.place().filter(|_| recompute == Recompute::Offload && trained > 0) {
            Some(device) => Some(HostInputs::new(device, &self.inputs, trained, x.dims2()?)?),
            None => None,
        };
        let mut blocks = Vec::with_capacity(trained);
        for layer in 0..self.weights.blocks.len() {
            let (block, lora) = (self.block(layer, Course::ThenBack)?, layer_lora(Some(adapter), layer));
            if let (Some(inputs), Some(index)) = (&mut inputs, layer.checked_sub(first)) {
                inputs.store(index, &x)?;
                x = block.forward(lora, &self.geometry, layout, &x)?;
            } else if layer < first {
                x = block.forward(lora, &self.geometry, layout, &x)?;
            } else {
                let (y, saved) = block.forward_saving(lora, &self.geometry, layout, x, recompute)?;
                blocks.push(saved);
                x = y;
            }
        }
        let h = embeddings.output(x.clone(), &mut saved)?;
        Ok((h, Tape { blocks, inputs, last: x, first, embeddings: saved }))
    }

    /// Gradients of the adapter's LoRA weights of dL/dh (N, D), except those on the lm_head, which `ops::logprobs`
    /// returns. Each block's activations are freed after its backward.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, batch: &Batch, adapter: &Adapter, mut tape: Tape, dh: Array) -> Result<Gradients> {
        let _pass = self.pass();
        let layout = Layout::of(batch);
        let mut grads = Gradients::none(self.weights.blocks.len());
        let embeddings = Embeddings::of(self, Some(adapter));
        let mut dy = embeddings.output_backward(&tape.last, &tape.embeddings, &dh, &mut grads)?;
        drop((tape.last, dh));
        tape.inputs.as_ref().map_or(Ok(()), HostInputs::turn_back)?;
        for layer in (tape.first..self.weights.blocks.len()).rev() {
            let index = layer - tape.first;
            let saved = match &tape.inputs {
                Some(inputs) => Saved::input(inputs.get(index)?),
                None => tape.blocks.pop().context("a block saved nothing")?,
            };
            let unused = layer == tape.first && !embeddings.train_below_blocks();
            let wanted = if unused { InputGradient::Unused } else { InputGradient::Wanted };
            let lora = layer_lora(Some(adapter), layer);
            let block = self.block(layer, Course::Back { to: tape.first })?;
            let (dx, g) = block.backward(lora, &self.geometry, layout, saved, dy, wanted)?;
            grads.layers[layer] = g;
            tape.inputs.as_ref().map_or(Ok(()), |inputs| inputs.done(index))?;
            match dx {
                Some(dx) => dy = dx,
                None => return Ok(grads),
            }
        }
        if embeddings.train_below_blocks() {
            embeddings.input_backward(batch.tokens(), &tape.embeddings, &dy, &mut grads)?;
        }
        Ok(grads)
    }

    /// Starts generation: runs the prompts, fills a cache with a capacity of `capacity` further tokens per response,
    /// and returns the hidden state (S, D) of the last prompt token of each. `prompts` (S): each response's prompt in
    /// the batch.
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn prefill(
        &self,
        batch: &Batch,
        prompts: &[usize],
        adapter: Option<&Adapter>,
        capacity: usize,
    ) -> Result<(Array, KvCache)> {
        let _pass = self.pass();
        self.check(adapter, batch.longest())?;
        let layout = Layout::of(batch);
        let mut layers = Vec::with_capacity(self.weights.blocks.len());
        let (embeddings, mut unused) = (Embeddings::of(self, adapter), embeddings::Saved::default());
        let mut x = embeddings.input(batch.tokens(), batch.positions(), &mut unused)?;
        for layer in 0..self.weights.blocks.len() {
            let block = self.block(layer, Course::Forward)?;
            let mut cache = attention::KvCache::new(capacity, self.kv_cache_type);
            x = block.prefill(layer_lora(adapter, layer), &self.geometry, (layout, prompts), &x, &mut cache)?;
            layers.push(cache);
        }
        let last = batch.last_rows();
        let last = gather_rows(&x, &prompts.iter().map(|&i| last[i]).collect::<Vec<_>>())?;
        drop(x);
        Ok((embeddings.output(last, &mut unused)?, KvCache { layers }))
    }

    /// Hidden state (S, D) after one more token per sequence, at `positions` (S).
    ///
    /// # Errors
    /// As for [`Base::hidden`].
    pub fn decode(
        &self,
        tokens: &[u32],
        positions: &[u32],
        adapter: Option<&Adapter>,
        cache: &mut KvCache,
    ) -> Result<Array> {
        let _pass = self.pass();
        self.check(adapter, positions.iter().max().map_or(0, |&p| p as usize + 1))?;
        let (embeddings, mut unused) = (Embeddings::of(self, adapter), embeddings::Saved::default());
        let mut x = embeddings.input(tokens, positions, &mut unused)?;
        for (layer, cache) in cache.layers.iter_mut().enumerate() {
            let block = self.block(layer, Course::Forward)?;
            x = block.decode(layer_lora(adapter, layer), &self.geometry, positions, &x, cache)?;
        }
        embeddings.output(x, &mut unused)
    }

    /// Logits (S, vocab) of hidden states (S, D) on the host, with the adapter's LoRA weights on the lm_head. Log-probabilities
    /// are computed by `ops::logprobs`, without logits.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn logits(&self, hidden: &Array, adapter: Option<&Adapter>) -> Result<candle_core::Tensor> {
        self.logits_in_place(hidden, adapter)?.to_host()
    }

    /// As [`Base::logits`], where they were computed: for sampling, where S is small.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn logits_in_place(&self, hidden: &Array, adapter: Option<&Adapter>) -> Result<Logits> {
        logprobs::logits(hidden, &self.lm_head(adapter))
    }
}

/// The adapter's LoRA weights of one layer.
pub(super) fn layer_lora(adapter: Option<&Adapter>, layer: usize) -> Option<&LoraLayers> {
    adapter.and_then(|a| a.layers().get(layer))
}
