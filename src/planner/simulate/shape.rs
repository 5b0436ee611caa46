//! The shapes of a network: the decoder's configuration, the stored type of each matrix, and the ranks of an adapter's LoRA
//! layers. They come from the headers of model files, or from a configuration alone.

use std::collections::HashMap;

use anyhow::Result;

use crate::config::{Dequantising, KvCacheType, Offload};
use crate::model::adapter::TargetModule;
use crate::model::adapter::{Adapter, LinearShapes, LoraConfig, LoraLayer, LoraLayers, MAX_LINEARS, NonBlockModule};
use crate::model::base::Base;
use crate::model::config::{DecoderConfig, LayerRope, NormStyle, Placement, QkNorm, Qkv};
use crate::model::stream::is_streamed;
use crate::model_files::{FileContents, ModelFiles};
use crate::ops::rope;
use crate::ops::storage::gpu::{DeviceWeight, dense_element};
use crate::ops::weight::{ComputeDtype, StorageDType};
use crate::{config, invalid};

/// The shapes of one decoder.
#[derive(Clone, Debug)]
pub struct Network {
    /// Sizes of the decoder.
    pub config: DecoderConfig,
    /// Its linear maps.
    pub maps: LinearShapes,
    /// Stored types of each layer's maps.
    pub stored: Vec<[StorageDType; MAX_LINEARS]>,
    /// Stored type of lm_head.
    pub table: StorageDType,
    /// Type in which products are computed.
    pub compute: ComputeDtype,
    /// Bytes of matrices in mapped files.
    pub mapped: usize,
    /// Bytes of matrices in memory.
    pub owned: usize,
    /// The largest matrix that is quantised as it opens: numbers per row, 0 where none is.
    pub quantised_cols: usize,
    /// Stored type of each matrix by its Hugging Face name, after quantisation.
    pub dtypes: HashMap<String, StorageDType>,
    /// The layers that a device does not keep.
    pub offload: Offload,
    /// What keys and values are cached as.
    pub kv_cache_type: KvCacheType,
    /// How a device dequantises weights.
    pub dequantise: Dequantising,
}

impl Network {
    /// Shapes of opened model files, whose dense matrices become `quantise`.
    ///
    /// # Errors
    /// If a matrix that the configuration asks for is missing or of another shape.
    pub(crate) fn of(contents: &FileContents, quantise: Option<StorageDType>, compute: ComputeDtype) -> Result<Self> {
        let config = contents.config.clone();
        let find = |name: &str, rows: usize, cols: usize| -> Result<(StorageDType, bool)> {
            let found = contents.tensors().find(|(n, ..)| *n == name);
            let (_, shape, dtype) =
                found.ok_or_else(|| invalid!("{}: the tensor {name} is missing", contents.name()))?;
            // Conv1D matrices are stored transposed, and are transposed as they are read.
            let turned = config.lies_transposed(name);
            let want = if turned { [cols, rows] } else { [rows, cols] };
            match *shape == want {
                true => Ok((dtype, turned)),
                false => Err(invalid!(
                    "{}: tensor {name} is {shape:?}, and the configuration asks for {want:?}",
                    contents.name()
                )),
            }
        };
        Self::made(config.clone(), quantise, compute, contents.is_mapped(), find)
    }

    /// Shapes of the model files that a section of the config names.
    ///
    /// # Errors
    /// As for opening the model files.
    pub fn of_section(checkpoint: &ModelFiles, section: &config::Base) -> Result<Self> {
        let quantise = section.quantize.map(config::Quantize::stored);
        let net = Self::of(checkpoint.contents(), quantise, section.compute_dtype())?;
        Ok(net.of_device_keys(section))
    }

    /// The same shapes with what a section says about a device.
    #[must_use]
    pub fn of_device_keys(self, section: &config::Base) -> Self {
        let (offload, kv_cache_type, dequantise) = (section.offload(), section.kv_cache_type(), section.dequantise());
        Self { offload, kv_cache_type, dequantise, ..self }
    }

    /// Whether a device has to dequantise a matrix of a block: one that is stored in another type than the products'.
    pub fn has_to_dequantise(&self) -> bool {
        let (maps, element) = (self.maps.linears().len(), Some(self.compute.element()));
        self.stored.iter().flat_map(|layer| &layer[..maps]).any(|&dtype| dense_element(dtype) != element)
    }

    /// Bytes of pinned memory of the host that hold those layers while the others lie on a device.
    pub fn pinned(&self) -> usize {
        let (count, of) = (self.offload.layers(), self.config.num_hidden_layers);
        let layers = self.stored.iter().enumerate().filter(|(layer, _)| is_streamed(*layer, count.min(of), of));
        let maps = |stored: &[StorageDType; MAX_LINEARS]| -> usize {
            let maps = self.maps.linears().iter().zip(stored);
            maps.map(|(map, &dtype)| DeviceWeight::packed_bytes(dtype, map.out_features, map.in_features)).sum()
        };
        layers.map(|(_, stored)| maps(stored)).sum()
    }

    /// Shapes of an open base.
    ///
    /// # Errors
    /// None in practice: a base has all its matrices.
    pub fn of_base(base: &Base) -> Result<Self> {
        let all = base.weights();
        let compute = base.lm_head(None).weight.compute();
        let find = |name: &str, _: usize, _: usize| {
            let found = all.iter().find(|(n, _)| n == name).ok_or_else(|| invalid!("the base has no {name}"))?;
            Ok((found.1.dtype(), false))
        };
        let offload = match base.streamed_layers() {
            0 => Offload::None,
            layers => Offload::Layers(layers),
        };
        let net = Self::made(base.config().clone(), None, compute, true, find)?;
        Ok(Self { offload, kv_cache_type: base.kv_cache_type(), ..net })
    }

    /// Shapes from a configuration alone, all matrices stored as `dtype` and then quantised.
    ///
    /// # Errors
    /// If sizes overflow.
    pub fn planned(
        config: DecoderConfig,
        dtype: StorageDType,
        quantise: Option<StorageDType>,
        compute: ComputeDtype,
    ) -> Result<Self> {
        Self::made(config, quantise, compute, true, |_, _, _| Ok((dtype, false)))
    }

    fn made(
        config: DecoderConfig,
        quantise: Option<StorageDType>,
        compute: ComputeDtype,
        is_mapped: bool,
        find: impl Fn(&str, usize, usize) -> Result<(StorageDType, bool)>,
    ) -> Result<Self> {
        let (maps, names) = (config.shapes(), config.names());
        let (d, e, vocab) = (config.hidden_size, config.embedding_width, config.vocab_size);
        let (mut mapped, mut owned, mut quantised_cols, mut dtypes) = (0, 0, 0, HashMap::new());
        let mut put = |name: &str, rows: usize, cols: usize| -> Result<StorageDType> {
            let (stored, turned) = find(name, rows, cols)?;
            let wanted = quantise.filter(|_| stored.is_dense());
            let wanted = wanted.map(|q| if rows == vocab { StorageDType::Q8_0 } else { q });
            let dtype = wanted.and_then(|q| q.for_width(cols));
            let bytes = |dtype: StorageDType| {
                let all = dtype.bytes_for(cols).and_then(|row| row.checked_mul(rows));
                all.ok_or_else(|| invalid!("{name}: rows of {cols} numbers are no whole blocks of {}", dtype.name()))
            };
            match dtype {
                Some(dtype) => {
                    owned += bytes(dtype)?;
                    quantised_cols = quantised_cols.max(cols);
                }
                None if turned => owned += bytes(stored)?,
                None => mapped += bytes(stored)?,
            }
            dtypes.insert(name.to_owned(), dtype.unwrap_or(stored));
            Ok(dtype.unwrap_or(stored))
        };
        let mut table = put(names.embedding, vocab, e)?;
        if let Some(first) = config.learned_positions {
            put(names.positions, first + config.max_position_embeddings, d)?;
        }
        if d != e {
            put(crate::model::config::PROJECT_IN, d, e)?;
            put(crate::model::config::PROJECT_OUT, e, d)?;
        }
        let mut stored = vec![];
        for layer in 0..config.num_hidden_layers {
            let mut row = [StorageDType::F32; MAX_LINEARS];
            for (i, map) in maps.linears().iter().enumerate() {
                row[i] = put(&format!("{}.weight", maps.module_path(layer, i)), map.out_features, map.in_features)?;
            }
            stored.push(row);
        }
        if !config.tie_word_embeddings {
            // Model files may leave lm_head out where it is tied to the embedding.
            table = put(names.output, vocab, e)?;
        }
        if !is_mapped {
            // Compiled in: neither mapped by us nor of the heap.
            mapped = 0;
        }
        let (offload, kv_cache_type, dequantise) = Default::default();
        Ok(Self {
            config,
            maps,
            stored,
            table,
            compute,
            mapped,
            owned,
            quantised_cols,
            dtypes,
            offload,
            kv_cache_type,
            dequantise,
        })
    }

    /// Bytes of norms, biases and the rotations of the first positions, which are made together.
    pub fn vectors(&self) -> usize {
        let c = &self.config;
        let d = c.hidden_size;
        let norm = |width: usize| width * if c.norm == NormStyle::Layer { 2 } else { 1 };
        let norms = if c.placement == Placement::Around { 4 } else { 2 };
        let qk = match c.qk_norm {
            QkNorm::None => 0,
            QkNorm::PerHead => 2 * c.head_dim,
            QkNorm::Whole => (c.num_attention_heads + c.num_key_value_heads) * c.head_dim,
        };
        let biases: usize =
            c.has_bias().iter().zip(self.maps.linears()).map(|(&b, map)| if b { map.out_features } else { 0 }).sum();
        let blocks = c.num_hidden_layers * (norms * norm(d) + qk + biases);
        (blocks + if c.final_norm { norm(d) } else { 0 }) * size_of::<f32>() + self.rotations(1)
    }

    /// Bytes of the rotations that are there once a sequence of `longest` tokens was seen.
    pub fn rotations(&self, longest: usize) -> usize {
        let c = &self.config;
        let turning = usize::from(c.layers.iter().any(|l| l.rope != LayerRope::None))
            + usize::from(c.layers.iter().any(|l| l.rope == LayerRope::Local));
        let positions = longest.next_multiple_of(rope::BLOCK).min(c.max_position_embeddings);
        turning * positions * c.rotary_dim * size_of::<f32>()
    }

    /// Numbers in all matrices and vectors.
    pub fn parameters(&self) -> usize {
        let c = &self.config;
        let block: usize = self.maps.linears().iter().map(|map| map.in_features * map.out_features).sum();
        let tables = if c.tie_word_embeddings { 1 } else { 2 };
        c.vocab_size * c.embedding_width * tables + c.num_hidden_layers * (block + 2 * c.hidden_size)
    }

    /// Index of attention's output map.
    pub fn attention_out(&self) -> usize {
        match self.config.qkv {
            Qkv::Separate => 3,
            Qkv::EndToEnd | Qkv::PerHead => 1,
        }
    }
}

/// The LoRA layers of an adapter.
#[derive(Clone, Debug)]
pub struct Branches {
    /// Rank of the LoRA layer on each layer's maps; 0 without one.
    pub ranks: Vec<[usize; MAX_LINEARS]>,
    /// Whether the adapter has a scalar head.
    pub head: bool,
    /// Whether its LoRA layers in blocks are DoRA.
    pub dora: bool,
    /// Bytes of each tensor beside the blocks' factors: magnitudes, and branches outside of the blocks.
    pub more: Vec<usize>,
    /// Rank of the LoRA layer on lm_head; 0 without one.
    pub table: usize,
    /// Rank of the LoRA layer on the token embedding; 0 without one.
    pub tokens: usize,
}

impl Branches {
    /// No LoRA layer: the bare base.
    pub fn none(network: &Network) -> Self {
        Self {
            ranks: vec![[0; MAX_LINEARS]; network.config.num_hidden_layers],
            head: false,
            dora: false,
            more: vec![],
            table: 0,
            tokens: 0,
        }
    }

    /// The LoRA layers that `config` selects.
    ///
    /// # Errors
    /// If `config` selects no map of this network.
    pub fn of(config: &LoraConfig, network: &Network) -> Result<Self> {
        let mut branches = Self::none(network);
        for slot in config.select(&network.maps)? {
            let r = config.rank_of(&network.maps.path(slot));
            match slot {
                TargetModule::Block { layer, linear } => {
                    branches.ranks[layer][linear] = r;
                    if config.use_dora {
                        branches.more.push(network.maps.dims(linear).1 * size_of::<f32>());
                    }
                }
                TargetModule::NonBlockModule(outer) => {
                    let Some(map) = network.maps.outer(outer) else { continue };
                    match outer {
                        NonBlockModule::Head => branches.table = r,
                        NonBlockModule::Embedding => branches.tokens = r,
                        NonBlockModule::ProjectIn | NonBlockModule::ProjectOut => {}
                    }
                    branches.more.extend([r * map.in_features, map.out_features * r].map(|n| n * size_of::<f32>()));
                    branches.more.extend(config.use_dora.then_some(map.out_features * size_of::<f32>()));
                }
            }
        }
        branches.dora = config.use_dora;
        Ok(branches)
    }

    /// The LoRA layers of an adapter.
    pub fn of_adapter(adapter: &Adapter) -> Self {
        let rank = |pair: &Option<LoraLayer>| pair.as_ref().map_or(0, |pair| pair.a.dims()[0]);
        let row = |pairs: &LoraLayers| std::array::from_fn(|i| rank(&pairs[i]));
        let bytes = |tensor: &candle_core::Tensor| tensor.elem_count() * size_of::<f32>();
        let pairs = adapter.layers().iter().flatten().flatten();
        let mut more: Vec<usize> = pairs.filter_map(|pair| pair.magnitude.as_ref()).map(bytes).collect();
        let dora = !more.is_empty();
        for pair in NonBlockModule::ALL.into_iter().filter_map(|outer| adapter.outer(outer)) {
            more.extend([&pair.a, &pair.b].into_iter().chain(&pair.magnitude).map(bytes));
        }
        let outer = |outer: NonBlockModule| adapter.outer(outer).map_or(0, |pair| pair.a.dims()[0]);
        Self {
            ranks: adapter.layers().iter().map(row).collect(),
            head: adapter.head().is_some(),
            dora,
            more,
            table: outer(NonBlockModule::Head),
            tokens: outer(NonBlockModule::Embedding),
        }
    }

    /// The same with a scalar head.
    #[must_use]
    pub fn with_head(mut self) -> Self {
        self.head = true;
        self
    }

    /// Bytes of each tensor, in the order in which they are stepped.
    pub fn tensors(&self, network: &Network) -> Vec<usize> {
        let maps = network.maps.linears();
        let mut all = vec![];
        for (map, &r) in self.ranks.iter().flat_map(|row| maps.iter().zip(row)).filter(|(_, r)| **r > 0) {
            all.extend([r * map.in_features, map.out_features * r].map(|n| n * size_of::<f32>()));
        }
        all.extend(&self.more);
        if self.head {
            all.push(network.config.embedding_width * size_of::<f32>());
        }
        all
    }

    /// Bytes of all tensors.
    pub fn bytes(&self, network: &Network) -> usize {
        self.tensors(network).iter().sum()
    }
}
