//! Which linear maps of a decoder carry a low-rank branch, and how strongly: PEFT's selection and scaling rules.
//! Knows no tensor and no file. Read adapter.rs next: it holds the factors.

use anyhow::Result;

use crate::invalid;

/// No supported block has more linear maps than this; adapters and gradients keep one place for each.
pub const MAX_LINEARS: usize = 7;

/// One linear map of a decoder block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Path inside a block, as the family's checkpoints name it: `self_attn.q_proj`, `attn.c_attn`.
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

/// A map outside of the blocks that can carry a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NonBlockModule {
    /// The token table: its "inputs" are the vocabulary.
    Embedding,
    /// From a narrower token table into the blocks (OPT-350M).
    ProjectIn,
    /// Out of the blocks to the width of the table.
    ProjectOut,
    /// The table of the logits, which may be the token table itself: a branch is on one end alone.
    Head,
}

impl NonBlockModule {
    /// All of them, in the order in which adapters list them.
    pub const ALL: [Self; 4] = [Self::Embedding, Self::ProjectIn, Self::ProjectOut, Self::Head];
}

/// Where a branch sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetModule {
    /// Map `linear` of a block, in the order of [`LinearShapes::linears`].
    Block {
        /// Which block.
        layer: usize,
        /// Which map.
        linear: usize,
    },
    /// Outside of the blocks.
    NonBlockModule(NonBlockModule),
}

/// How the matrices of a block's linear maps lie in a Hugging Face file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixLayout {
    /// (out, in): `nn.Linear`.
    OutIn,
    /// (in, out): GPT-2's `Conv1D`; PEFT's `fan_in_fan_out`.
    InOut,
}

/// The linear maps of a decoder, by name and size: all that an adapter must agree on with its base. Every block has the
/// same list, whose order is the order in which adapters list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShapes {
    /// Decoder blocks.
    pub layers: usize,
    /// Width of the hidden states that a scalar head reads, D.
    pub hidden: usize,
    /// Path of the list of blocks inside the model: `model.layers`.
    pub blocks: &'static str,
    /// How their matrices lie in a Hugging Face file.
    pub layout: MatrixLayout,
    linears: [Linear; MAX_LINEARS],
    count: usize,
    /// By [`NonBlockModule`]; paths are whole.
    outer: [Option<Linear>; 4],
}

impl LinearShapes {
    /// From a list of at most [`MAX_LINEARS`] maps; the rest is left out.
    pub fn new(layers: usize, hidden: usize, blocks: &'static str, layout: MatrixLayout, maps: &[Linear]) -> Self {
        debug_assert!(maps.len() <= MAX_LINEARS);
        let mut linears = [Linear { path: "", in_features: 0, out_features: 0 }; MAX_LINEARS];
        for (slot, map) in linears.iter_mut().zip(maps) {
            *slot = *map;
        }
        Self { layers, hidden, blocks, layout, linears, count: maps.len().min(MAX_LINEARS), outer: [None; 4] }
    }

    /// With a map outside of the blocks, its path whole: `model.embed_tokens`.
    #[must_use]
    pub const fn with_outer(mut self, outer: NonBlockModule, map: Linear) -> Self {
        self.outer[outer as usize] = Some(map);
        self
    }

    /// The seven maps of a Llama: q, k, v, o, gate, up, down. `q_out`: heads x head size, `kv_out`: key-value heads x
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

    /// The maps of one block, in order.
    pub fn linears(&self) -> &[Linear] {
        &self.linears[..self.count]
    }

    /// (input features, output features) of one map.
    pub fn dims(&self, linear: usize) -> (usize, usize) {
        (self.linears[linear].in_features, self.linears[linear].out_features)
    }

    /// Path inside the model, the string that PEFT's rules are matched against: `model.layers.3.self_attn.q_proj`.
    pub fn module_path(&self, layer: usize, linear: usize) -> String {
        format!("{}.{layer}.{}", self.blocks, self.linears[linear].path)
    }

    /// A map outside of the blocks, if this decoder has it.
    pub fn outer(&self, outer: NonBlockModule) -> Option<&Linear> {
        self.outer[outer as usize].as_ref()
    }

    /// Every place that can carry a branch, in the order in which adapters list them: block by block, then outside.
    pub fn slots(&self) -> impl Iterator<Item = TargetModule> + '_ {
        let blocks =
            (0..self.layers).flat_map(|layer| (0..self.count).map(move |linear| TargetModule::Block { layer, linear }));
        blocks.chain(
            NonBlockModule::ALL.into_iter().filter(|&o| self.outer(o).is_some()).map(TargetModule::NonBlockModule),
        )
    }

    /// Path inside the model, the string that PEFT's rules are matched against; empty for a place that is not there.
    pub fn path(&self, slot: TargetModule) -> String {
        match slot {
            TargetModule::Block { layer, linear } => self.module_path(layer, linear),
            TargetModule::NonBlockModule(outer) => self.outer(outer).map_or("", |map| map.path).to_string(),
        }
    }

    /// (input features, output features) of a place.
    pub fn dims_of(&self, slot: TargetModule) -> (usize, usize) {
        match slot {
            TargetModule::Block { linear, .. } => self.dims(linear),
            TargetModule::NonBlockModule(outer) => {
                self.outer(outer).map_or((0, 0), |map| (map.in_features, map.out_features))
            }
        }
    }

    /// Of what PEFT's `"all-linear"` comes to, the names: all linear maps but the output table's.
    pub fn all_linear(&self) -> Vec<&'static str> {
        let outer = [NonBlockModule::ProjectIn, NonBlockModule::ProjectOut].into_iter().filter_map(|o| self.outer(o));
        self.names().into_iter().chain(outer.map(Linear::name)).collect()
    }

    /// The names of the blocks' maps: `q_proj` and so on. The path inside the block where two maps share a name.
    pub fn names(&self) -> Vec<&'static str> {
        let shared = |name: &str| self.linears().iter().filter(|l| l.name() == name).count() > 1;
        self.linears().iter().map(|l| if shared(l.name()) { l.path } else { l.name() }).collect()
    }

    /// (layer, slot) of the map whose matrix has this Hugging Face name: `model.layers.3.mlp.up_proj.weight`.
    pub fn find(&self, weight_name: &str) -> Option<(usize, usize)> {
        let path = weight_name.strip_suffix(".weight")?;
        let (layer, inside) = path.strip_prefix(self.blocks)?.strip_prefix('.')?.split_once('.')?;
        let layer = layer.parse().ok().filter(|&layer| layer < self.layers)?;
        Some((layer, self.linears().iter().position(|l| l.path == inside)?))
    }

    /// The place whose matrix has this Hugging Face name, outside of the blocks too.
    pub fn slot_of(&self, weight_name: &str) -> Option<TargetModule> {
        if let Some((layer, linear)) = self.find(weight_name) {
            return Some(TargetModule::Block { layer, linear });
        }
        // GPT-NeoX's files have another name for the matrix of its `lm_head`.
        let path = if weight_name == "embed_out.weight" { "lm_head" } else { weight_name.strip_suffix(".weight")? };
        NonBlockModule::ALL
            .into_iter()
            .find(|&o| self.outer(o).is_some_and(|map| map.path == path))
            .map(TargetModule::NonBlockModule)
    }

    /// The slot of the map of this name or path inside the block.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.linears().iter().position(|l| l.path == name || l.name() == name)
    }

    /// Width of what attention puts out: the input of the last map of the first map's module.
    pub fn attention_width(&self) -> usize {
        let module = |l: &Linear| l.path.split('.').next();
        let first = self.linears().first().and_then(module);
        self.linears().iter().rev().find(|l| module(l) == first).map_or(0, |l| l.in_features)
    }

    fn widest(&self) -> usize {
        self.linears()
            .iter()
            .chain(self.outer.iter().flatten())
            .flat_map(|l| [l.in_features, l.out_features])
            .max()
            .unwrap_or(0)
    }
}

/// Which maps get a branch. Source: PEFT `tuners_utils.check_target_module_exists`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// All linear maps (PEFT's `"all-linear"`; the token table, the output layer and the score head stay out).
    AllLinear,
    /// A module matches if its path is an entry or ends with `.` and an entry.
    List(Vec<String>),
    /// A module matches if the expression matches its whole path.
    Regex(String),
}

/// The hyperparameters of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Divide by sqrt(r) instead of r (arXiv:2312.03732).
    pub use_rslora: bool,
    /// Which maps.
    pub target_modules: TargetModules,
    /// Only these blocks; `None` is all of them.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Ranks of single maps: (name ending or regular expression, rank); the first that matches a path counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of single maps, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// DoRA (arXiv:2402.09353): every branch has a magnitude.
    pub use_dora: bool,
    /// LoRA+: how many times the learning rate B factors and magnitudes learn with; the token table's branch is left out.
    /// Of the training, not of what is saved.
    pub loraplus_lr_ratio: f64,
}

impl Default for LoraConfig {
    /// PEFT's: rank 8, alpha 8; over all linear maps.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            target_modules: TargetModules::AllLinear,
            layers_to_transform: None,
            rank_pattern: vec![],
            alpha_pattern: vec![],
            use_dora: false,
            loraplus_lr_ratio: 1.0,
        }
    }
}

impl LoraConfig {
    /// alpha / r, or alpha / sqrt(r) with `use_rslora`, of a map that no pattern names.
    pub fn scaling(&self) -> f64 {
        self.scale(self.lora_alpha, self.r)
    }

    fn scale(&self, alpha: f64, r: usize) -> f64 {
        let r = r as f64;
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// The rank of the map at this path inside the model.
    pub fn rank_of(&self, path: &str) -> usize {
        pattern(&self.rank_pattern, path).unwrap_or(self.r)
    }

    /// The scale of the map at this path inside the model.
    pub fn scaling_of(&self, path: &str) -> f64 {
        self.scale(pattern(&self.alpha_pattern, path).unwrap_or(self.lora_alpha), self.rank_of(path))
    }

    /// The same scales for maps whose ranks are all `factor` times as large: (rank, alpha) and both patterns.
    #[must_use]
    pub fn with_ranks_times(mut self, factor: usize) -> Self {
        let more = if self.use_rslora { (factor as f64).sqrt() } else { factor as f64 };
        self.r *= factor;
        self.lora_alpha *= more;
        self.rank_pattern.iter_mut().for_each(|(_, r)| *r *= factor);
        self.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= more);
        self
    }

    /// The places that get a branch, in the order of [`LinearShapes::slots`]. With `layers_to_transform` only maps of
    /// those blocks (as in PEFT, which finds no layer's number outside).
    ///
    /// # Errors
    /// If the rank or alpha cannot be used with these shapes, a layer does not exist, or a target matches nothing.
    pub fn select(&self, shapes: &LinearShapes) -> Result<Vec<TargetModule>> {
        self.check(shapes)?;
        // PEFT reads an empty list as "all".
        let only = self.layers_to_transform.as_deref().filter(|layers| !layers.is_empty());
        let within = |slot: TargetModule| match slot {
            TargetModule::Block { layer, .. } => only.is_none_or(|layers| layers.contains(&layer)),
            TargetModule::NonBlockModule(_) => only.is_none(),
        };
        let matcher = Matcher::new(&self.target_modules, shapes)?;
        let mut hits = vec![0usize; matcher.targets()];
        let picked = |&slot: &TargetModule| within(slot) && matcher.matches(slot, &shapes.path(slot), &mut hits);
        let selected: Vec<TargetModule> = shapes.slots().filter(picked).collect();
        if let Some(miss) = hits.iter().position(|&h| h == 0) {
            let outer: Vec<&str> = shapes.outer.iter().flatten().map(Linear::name).collect();
            return Err(invalid!(
                "target_modules: {} matches no linear map of this model; there are {} in layers 0 to {} \
                 (as in {}){}{}",
                matcher.describe(miss),
                shapes.names().join(", "),
                shapes.layers.saturating_sub(1),
                shapes.module_path(0, 0),
                if outer.is_empty() { String::new() } else { format!(", and outside of them {}", outer.join(", ")) },
                if only.is_some() { "; layers_to_transform leaves only some of them" } else { "" },
            ));
        }
        Ok(selected)
    }

    fn check(&self, shapes: &LinearShapes) -> Result<()> {
        // The bound also keeps a number from a file from sizing an allocation.
        let ranks = self.rank_pattern.iter().map(|(_, r)| *r);
        if let Some(r) = ranks.chain([self.r]).find(|&r| r == 0 || r > shapes.widest()) {
            return Err(invalid!(
                "LoRA rank r = {r} cannot be used: it must be between 1 and {}, the widest map of this model",
                shapes.widest()
            ));
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha);
        if let Some(alpha) = alphas.chain([self.lora_alpha]).find(|alpha| !(alpha.is_finite() && *alpha > 0.0)) {
            return Err(invalid!("lora_alpha = {alpha} cannot be used: it must be a positive number"));
        }
        let keys = self.rank_pattern.iter().map(|(key, _)| key).chain(self.alpha_pattern.iter().map(|(key, _)| key));
        for key in keys {
            pattern_regex(key).map_err(|e| {
                invalid!("rank_pattern, alpha_pattern: {key:?} is no regular expression that can be used: {e}")
            })?;
        }
        if let Some(&layer) = self.layers_to_transform.iter().flatten().find(|&&layer| layer >= shapes.layers) {
            return Err(invalid!(
                "layers_to_transform names layer {layer}; this model has layers 0 to {}",
                shapes.layers.saturating_sub(1)
            ));
        }
        Ok(())
    }
}

/// Source: PEFT `get_pattern_key`: a key matches a whole path, or what follows a dot in it.
fn pattern_regex(key: &str) -> Result<regex::Regex, regex::Error> {
    regex::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

/// The value of the first key that matches `path`. Keys that are no regular expression were refused before.
fn pattern<T: Copy>(pattern: &[(String, T)], path: &str) -> Option<T> {
    let matches = |key: &str| pattern_regex(key).is_ok_and(|regex| regex.is_match(path));
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, value)| *value)
}

enum Matcher<'a> {
    All,
    List(&'a [String]),
    Regex(&'a str, regex::Regex),
}

impl<'a> Matcher<'a> {
    fn new(targets: &'a TargetModules, shapes: &LinearShapes) -> Result<Self> {
        Ok(match targets {
            TargetModules::AllLinear => Self::All,
            TargetModules::List(list) if list.is_empty() => {
                return Err(invalid!(
                    "target_modules is empty; name at least one of {} or write \"all-linear\"",
                    shapes.names().join(", ")
                ));
            }
            TargetModules::List(list) => Self::List(list),
            TargetModules::Regex(pattern) => {
                let whole = regex::Regex::new(&format!("^(?:{pattern})$"))
                    .map_err(|e| invalid!("target_modules: {pattern:?} is no regular expression we can use: {e}"))?;
                Self::Regex(pattern, whole)
            }
        })
    }

    fn targets(&self) -> usize {
        match self {
            Self::List(list) => list.len(),
            Self::All | Self::Regex(..) => 1,
        }
    }

    fn describe(&self, target: usize) -> String {
        match self {
            Self::All => "all-linear".to_string(),
            Self::List(list) => format!("{:?}", list[target]),
            Self::Regex(pattern, _) => format!("the regular expression {pattern:?}"),
        }
    }

    /// Counts every target that matches, so that one that never does can be named.
    fn matches(&self, slot: TargetModule, path: &str, hits: &mut [usize]) -> bool {
        match self {
            Self::All => {
                hits[0] += 1;
                !matches!(slot, TargetModule::NonBlockModule(NonBlockModule::Embedding | NonBlockModule::Head))
            }
            Self::List(list) => {
                let mut any = false;
                for (target, hit) in list.iter().zip(hits) {
                    let head = path.strip_suffix(target.as_str());
                    if head.is_some_and(|h| h.is_empty() || h.ends_with('.')) {
                        *hit += 1;
                        any = true;
                    }
                }
                any
            }
            Self::Regex(_, whole) => {
                let found = whole.is_match(path);
                hits[0] += usize::from(found);
                found
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: LinearShapes = LinearShapes::llama(12, 32, 48, 16, 64);

    fn config(target_modules: TargetModules) -> LoraConfig {
        LoraConfig { r: 4, lora_alpha: 6.0, target_modules, ..LoraConfig::default() }
    }

    fn list(names: &[&str]) -> TargetModules {
        TargetModules::List(names.iter().map(|s| s.to_string()).collect())
    }

    fn picked(config: &LoraConfig) -> Vec<(usize, &'static str)> {
        let slots = config.select(&SHAPES).unwrap().into_iter();
        let named = slots.filter_map(|slot| match slot {
            TargetModule::Block { layer, linear } => Some((layer, SHAPES.linears()[linear].name())),
            TargetModule::NonBlockModule(_) => None,
        });
        named.collect()
    }

    #[test]
    fn scaling_is_alpha_over_r_and_over_its_root_with_rslora() {
        let mut c = config(TargetModules::AllLinear);
        assert_eq!(c.scaling(), 1.5);
        c.use_rslora = true;
        assert_eq!(c.scaling(), 3.0);
    }

    #[test]
    fn a_list_entry_matches_a_name_a_suffix_or_a_whole_path_but_no_part_of_a_name() {
        assert_eq!(picked(&config(list(&["q_proj"]))).len(), 12);
        assert_eq!(picked(&config(list(&["mlp.up_proj", "q_proj"]))).len(), 24);
        assert_eq!(picked(&config(list(&["model.layers.3.self_attn.v_proj"]))), [(3, "v_proj")]);
        assert_eq!(picked(&config(list(&["1.self_attn.k_proj"]))), [(1, "k_proj")], "11 ends with 1 but not with .1");
        assert!(config(list(&["proj"])).select(&SHAPES).is_err());
    }

    #[test]
    fn a_regex_must_match_the_whole_path() {
        let c = config(TargetModules::Regex(r".*\.[01]\..*\.(q|down)_proj".into()));
        assert_eq!(picked(&c), [(0, "q_proj"), (0, "down_proj"), (1, "q_proj"), (1, "down_proj")]);
        assert!(config(TargetModules::Regex("q_proj".into())).select(&SHAPES).is_err());
        assert!(config(TargetModules::Regex("(".into())).select(&SHAPES).is_err());
        // An alternation must not escape the anchors.
        assert!(config(TargetModules::Regex("model|q_proj".into())).select(&SHAPES).is_err());
    }

    #[test]
    fn both_ends_are_targets_by_name_alone_and_the_projections_by_all_linear_too() {
        let map = |path, in_features, out_features| Linear { path, in_features, out_features };
        let shapes = SHAPES
            .with_outer(NonBlockModule::Embedding, map("model.embed_tokens", 100, 24))
            .with_outer(NonBlockModule::ProjectIn, map("model.project_in", 24, 32))
            .with_outer(NonBlockModule::Head, map("lm_head", 24, 100));
        let outer = |c: &LoraConfig| -> Vec<NonBlockModule> {
            let slots = c.select(&shapes).unwrap().into_iter();
            slots.filter_map(|s| if let TargetModule::NonBlockModule(o) = s { Some(o) } else { None }).collect()
        };
        assert_eq!(outer(&config(TargetModules::AllLinear)), [NonBlockModule::ProjectIn]);
        assert_eq!(
            outer(&config(list(&["lm_head", "q_proj", "embed_tokens"]))),
            [NonBlockModule::Embedding, NonBlockModule::Head]
        );
        assert_eq!(outer(&config(TargetModules::Regex(".*(q_proj|head)".into()))), [NonBlockModule::Head]);
        let mut c = config(list(&["q_proj", "lm_head"]));
        c.layers_to_transform = Some(vec![1]);
        assert!(
            c.select(&shapes).unwrap_err().to_string().contains("layers_to_transform"),
            "as PEFT finds nothing there"
        );
        assert_eq!(shapes.slot_of("lm_head.weight"), Some(TargetModule::NonBlockModule(NonBlockModule::Head)));
        assert_eq!(shapes.all_linear().last(), Some(&"project_in"));
    }

    #[test]
    fn layers_to_transform_keeps_only_those_layers() {
        let mut c = config(list(&["o_proj"]));
        c.layers_to_transform = Some(vec![11, 2]);
        assert_eq!(picked(&c), [(2, "o_proj"), (11, "o_proj")]);
        c.layers_to_transform = Some(vec![12]);
        let message = c.select(&SHAPES).unwrap_err().to_string();
        assert!(message.contains("layer 12") && message.contains("0 to 11"), "{message}");
    }

    #[test]
    fn a_target_that_matches_nothing_is_named_beside_what_exists() {
        let message = config(list(&["q_proj", "query_key_value"])).select(&SHAPES).unwrap_err().to_string();
        assert!(message.contains("query_key_value") && message.contains("gate_proj"), "{message}");
    }

    #[test]
    fn a_rank_that_no_map_can_hold_is_refused() {
        for r in [0, 65, usize::MAX] {
            let c = LoraConfig { r, ..config(TargetModules::AllLinear) };
            assert!(c.select(&SHAPES).unwrap_err().to_string().contains("between 1 and 64"));
        }
        let c = LoraConfig { lora_alpha: f64::NAN, ..config(TargetModules::AllLinear) };
        assert!(c.select(&SHAPES).is_err());
    }
}
