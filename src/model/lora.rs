//! Which linear maps of a decoder carry a low-rank branch, and how strongly: PEFT's selection and scaling rules.
//! Knows no tensor and no file. Read adapter.rs next: it holds the factors.

use anyhow::Result;

use crate::invalid;

/// The seven linear maps of a decoder block, in the order in which every adapter lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// All seven, in order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Position in [`Self::ALL`] and in every `[_; 7]` of an adapter.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The module's own name: `q_proj`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Path inside a block: `self_attn.q_proj`, `mlp.gate_proj`.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Path inside the model, the string that PEFT's rules are matched against: `model.layers.3.self_attn.q_proj`.
    pub fn module_path(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.path())
    }
}

/// The sizes of a decoder's linear maps: all that an adapter must agree on with its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShapes {
    /// Decoder blocks.
    pub layers: usize,
    /// Width of the residual stream, D.
    pub hidden: usize,
    /// Heads x head size.
    pub q_out: usize,
    /// Key-value heads x head size.
    pub kv_out: usize,
    /// Width of the MLP.
    pub intermediate: usize,
}

impl LinearShapes {
    /// (input features, output features) of one map.
    pub const fn dims(&self, projection: Projection) -> (usize, usize) {
        match projection {
            Projection::Q => (self.hidden, self.q_out),
            Projection::K | Projection::V => (self.hidden, self.kv_out),
            Projection::O => (self.q_out, self.hidden),
            Projection::Gate | Projection::Up => (self.hidden, self.intermediate),
            Projection::Down => (self.intermediate, self.hidden),
        }
    }

    fn widest(&self) -> usize {
        self.hidden.max(self.q_out).max(self.kv_out).max(self.intermediate)
    }
}

/// Which maps get a branch. Source: PEFT `tuners_utils.check_target_module_exists`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// All seven of every block (PEFT's `"all-linear"`; the output layer and the score head stay out).
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
}

impl LoraConfig {
    /// alpha / r, or alpha / sqrt(r) with `use_rslora`.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// For every block, which of the seven maps get a branch.
    ///
    /// # Errors
    /// If the rank or alpha cannot be used with these shapes, a layer does not exist, or a target matches nothing.
    pub fn select(&self, shapes: &LinearShapes) -> Result<Vec<[bool; 7]>> {
        self.check(shapes)?;
        let in_layers = |layer: usize| match self.layers_to_transform.as_deref() {
            None | Some([]) => true, // PEFT reads an empty list as "all"
            Some(layers) => layers.contains(&layer),
        };
        let matcher = Matcher::new(&self.target_modules)?;
        let mut hits = vec![0usize; matcher.targets()];
        let selected = (0..shapes.layers)
            .map(|layer| {
                Projection::ALL
                    .map(|projection| in_layers(layer) && matcher.matches(&projection.module_path(layer), &mut hits))
            })
            .collect();
        if let Some(miss) = hits.iter().position(|&h| h == 0) {
            return Err(invalid!(
                "target_modules: {} matches no linear map of this model; there are {} in layers 0 to {} \
                 (as in {}){}",
                matcher.describe(miss),
                Projection::ALL.map(Projection::name).join(", "),
                shapes.layers.saturating_sub(1),
                Projection::Q.module_path(0),
                if self.layers_to_transform.is_some() { "; layers_to_transform leaves only some of them" } else { "" },
            ));
        }
        Ok(selected)
    }

    fn check(&self, shapes: &LinearShapes) -> Result<()> {
        // The bound also keeps a number from a file from sizing an allocation.
        if self.r == 0 || self.r > shapes.widest() {
            return Err(invalid!(
                "LoRA rank r = {} cannot be used: it must be between 1 and {}, the widest map of this model",
                self.r,
                shapes.widest()
            ));
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return Err(invalid!("lora_alpha = {} cannot be used: it must be a positive number", self.lora_alpha));
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

enum Matcher<'a> {
    All,
    List(&'a [String]),
    Regex(&'a str, regex::Regex),
}

impl<'a> Matcher<'a> {
    fn new(targets: &'a TargetModules) -> Result<Self> {
        Ok(match targets {
            TargetModules::AllLinear => Self::All,
            TargetModules::List(list) if list.is_empty() => {
                return Err(invalid!(
                    "target_modules is empty; name at least one of {} or write \"all-linear\"",
                    Projection::ALL.map(Projection::name).join(", ")
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
    fn matches(&self, path: &str, hits: &mut [usize]) -> bool {
        match self {
            Self::All => {
                hits[0] += 1;
                true
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

    const SHAPES: LinearShapes = LinearShapes { layers: 12, hidden: 32, q_out: 48, kv_out: 16, intermediate: 64 };

    fn config(target_modules: TargetModules) -> LoraConfig {
        LoraConfig { r: 4, lora_alpha: 6.0, use_rslora: false, target_modules, layers_to_transform: None }
    }

    fn list(names: &[&str]) -> TargetModules {
        TargetModules::List(names.iter().map(|s| s.to_string()).collect())
    }

    fn picked(config: &LoraConfig) -> Vec<(usize, &'static str)> {
        let rows = config.select(&SHAPES).unwrap();
        let pairs =
            rows.iter().enumerate().flat_map(|(layer, row)| Projection::ALL.map(|p| (layer, p, row[p.index()])));
        pairs.filter(|x| x.2).map(|x| (x.0, x.1.name())).collect()
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
