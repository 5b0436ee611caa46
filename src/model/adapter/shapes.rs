//! The linear maps of a decoder by path and size, and the modules that can carry a LoRA branch.
//!
//! This is all that an adapter must agree on with its base. It does not depend on tensors or files. Read `targets.rs` next.

/// The most linear maps of a block of any supported family; adapters and gradients have one entry for each.
pub const MAX_LINEARS: usize = 7;

/// One linear map of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Path within a block, as the family's files name it: `self_attn.q_proj`, `attn.c_attn`.
    pub path: &'static str,
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
}

impl Linear {
    /// The module's own name: `q_proj`.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }
}

/// A module outside of the blocks that can carry a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NonBlockModule {
    /// The embedding matrix; its input features are the vocabulary.
    Embedding,
    /// The projection from a narrower embedding to the hidden size (OPT-350M).
    ProjectIn,
    /// The projection from the hidden size to the width of the embedding (OPT-350M).
    ProjectOut,
    /// The lm_head. It may share its matrix with the embedding; a branch is then on one of the two only.
    Head,
}

impl NonBlockModule {
    /// All modules outside of the blocks, in the order in which adapters list them.
    pub const ALL: [Self; 4] = [Self::Embedding, Self::ProjectIn, Self::ProjectOut, Self::Head];
}

/// A module that can carry a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetModule {
    /// A linear map of a block.
    Block {
        /// Index of the block.
        layer: usize,
        /// Index of the map in [`LinearShapes::linears`].
        linear: usize,
    },
    /// A module outside of the blocks.
    NonBlockModule(NonBlockModule),
}

/// How the matrices of a block's linear maps are stored in a Hugging Face file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixLayout {
    /// (out, in): `nn.Linear`.
    OutIn,
    /// (in, out): GPT-2's `Conv1D`; PEFT's `fan_in_fan_out`.
    InOut,
}

/// The linear maps of a decoder, by path and size. Every block has the same list; adapters list their branches in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShapes {
    /// Number of decoder blocks.
    pub layers: usize,
    /// Width of the hidden states that a scalar head is applied to, D.
    pub hidden: usize,
    /// Path of the list of blocks within the model: `model.layers`.
    pub blocks: &'static str,
    /// How their matrices are stored in a Hugging Face file.
    pub layout: MatrixLayout,
    linears: [Linear; MAX_LINEARS],
    count: usize,
    /// Maps outside of the blocks, by [`NonBlockModule`], with paths from the root of the model.
    outer: [Option<Linear>; 4],
}

impl LinearShapes {
    /// Shapes of blocks with these linear maps, at most [`MAX_LINEARS`]; further ones are ignored.
    pub fn new(layers: usize, hidden: usize, blocks: &'static str, layout: MatrixLayout, maps: &[Linear]) -> Self {
        debug_assert!(maps.len() <= MAX_LINEARS);
        let mut linears = [Linear { path: "", in_features: 0, out_features: 0 }; MAX_LINEARS];
        for (entry, map) in linears.iter_mut().zip(maps) {
            *entry = *map;
        }
        Self { layers, hidden, blocks, layout, linears, count: maps.len().min(MAX_LINEARS), outer: [None; 4] }
    }

    /// The same shapes with a map outside of the blocks; its path starts at the root of the model: `model.embed_tokens`.
    #[must_use]
    pub const fn with_outer(mut self, outer: NonBlockModule, map: Linear) -> Self {
        self.outer[outer as usize] = Some(map);
        self
    }

    /// The seven maps of a Llama: q, k, v, o, gate, up, down. `q_out` is heads x head size, `kv_out` is key-value heads x
    /// head size.
    pub const fn llama(layers: usize, hidden: usize, q_out: usize, kv_out: usize, intermediate: usize) -> Self {
        let linears = [
            Linear { path: "self_attn.q_proj", in_features: hidden, out_features: q_out },
            Linear { path: "self_attn.k_proj", in_features: hidden, out_features: kv_out },
            Linear { path: "self_attn.v_proj", in_features: hidden, out_features: kv_out },
            Linear { path: "self_attn.o_proj", in_features: q_out, out_features: hidden },
            Linear { path: "mlp.gate_proj", in_features: hidden, out_features: intermediate },
            Linear { path: "mlp.up_proj", in_features: hidden, out_features: intermediate },
            Linear { path: "mlp.down_proj", in_features: intermediate, out_features: hidden },
        ];
        let layout = MatrixLayout::OutIn;
        Self { layers, hidden, blocks: "model.layers", layout, linears, count: 7, outer: [None; 4] }
    }

    /// The linear maps of one block, in order.
    pub fn linears(&self) -> &[Linear] {
        &self.linears[..self.count]
    }

    /// (input features, output features) of one map of a block.
    pub fn dims(&self, linear: usize) -> (usize, usize) {
        (self.linears[linear].in_features, self.linears[linear].out_features)
    }

    /// Path of a map within the model, which PEFT's rules are matched against: `model.layers.3.self_attn.q_proj`.
    pub fn module_path(&self, layer: usize, linear: usize) -> String {
        format!("{}.{layer}.{}", self.blocks, self.linears[linear].path)
    }

    /// A map outside of the blocks, if the decoder has it.
    pub fn outer(&self, outer: NonBlockModule) -> Option<&Linear> {
        self.outer[outer as usize].as_ref()
    }

    /// All modules that can carry a branch, in the order in which adapters list them: block by block, then outside.
    pub fn slots(&self) -> impl Iterator<Item = TargetModule> + '_ {
        let blocks =
            (0..self.layers).flat_map(|layer| (0..self.count).map(move |linear| TargetModule::Block { layer, linear }));
        blocks.chain(
            NonBlockModule::ALL.into_iter().filter(|&o| self.outer(o).is_some()).map(TargetModule::NonBlockModule),
        )
    }

    /// Path of a module within the model, which PEFT's rules are matched against; empty if the decoder does not have it.
    pub fn path(&self, slot: TargetModule) -> String {
        match slot {
            TargetModule::Block { layer, linear } => self.module_path(layer, linear),
            TargetModule::NonBlockModule(outer) => self.outer(outer).map_or("", |map| map.path).to_string(),
        }
    }

    /// (input features, output features) of a module.
    pub fn dims_of(&self, slot: TargetModule) -> (usize, usize) {
        match slot {
            TargetModule::Block { linear, .. } => self.dims(linear),
            TargetModule::NonBlockModule(outer) => {
                self.outer(outer).map_or((0, 0), |map| (map.in_features, map.out_features))
            }
        }
    }

    /// Names of the modules that PEFT's `"all-linear"` stands for: all linear maps except the lm_head.
    pub fn all_linear(&self) -> Vec<&'static str> {
        let outer = [NonBlockModule::ProjectIn, NonBlockModule::ProjectOut].into_iter().filter_map(|o| self.outer(o));
        self.names().into_iter().chain(outer.map(Linear::name)).collect()
    }

    /// Names of a block's maps, `q_proj` and so on; the path within the block where two maps share a name.
    pub fn names(&self) -> Vec<&'static str> {
        let shared = |name: &str| self.linears().iter().filter(|l| l.name() == name).count() > 1;
        self.linears().iter().map(|l| if shared(l.name()) { l.path } else { l.name() }).collect()
    }

    /// (layer, index) of the map whose matrix has this Hugging Face name: `model.layers.3.mlp.up_proj.weight`.
    pub fn find(&self, weight_name: &str) -> Option<(usize, usize)> {
        let path = weight_name.strip_suffix(".weight")?;
        let (layer, inside) = path.strip_prefix(self.blocks)?.strip_prefix('.')?.split_once('.')?;
        let layer = layer.parse().ok().filter(|&layer| layer < self.layers)?;
        Some((layer, self.linears().iter().position(|l| l.path == inside)?))
    }

    /// The module whose matrix has this Hugging Face name, in a block or outside.
    pub fn slot_of(&self, weight_name: &str) -> Option<TargetModule> {
        if let Some((layer, linear)) = self.find(weight_name) {
            return Some(TargetModule::Block { layer, linear });
        }
        // GPT-NeoX's files call the matrix of the `lm_head` `embed_out`.
        let path = if weight_name == "embed_out.weight" { "lm_head" } else { weight_name.strip_suffix(".weight")? };
        NonBlockModule::ALL
            .into_iter()
            .find(|&o| self.outer(o).is_some_and(|map| map.path == path))
            .map(TargetModule::NonBlockModule)
    }

    /// Index of the map with this name or path within a block.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.linears().iter().position(|l| l.path == name || l.name() == name)
    }

    /// Maps outside of the blocks, in order.
    pub(super) fn non_block_linears(&self) -> impl Iterator<Item = &Linear> {
        self.outer.iter().flatten()
    }

    /// The largest number of input or output features of any map.
    pub(super) fn widest(&self) -> usize {
        self.linears()
            .iter()
            .chain(self.non_block_linears())
            .flat_map(|l| [l.in_features, l.out_features])
            .max()
            .unwrap_or(0)
    }
}
