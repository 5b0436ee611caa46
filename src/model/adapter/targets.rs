//! Which linear maps of a decoder carry a LoRA branch, and how strongly: PEFT's selection and scaling rules.
//!
//! Source: PEFT `tuners_utils.check_target_module_exists` and `get_pattern_key`. It does not depend on tensors or files. Read
//! `branch.rs` next.

use anyhow::Result;

use crate::invalid;
use crate::model::adapter::shapes::{Linear, LinearShapes, NonBlockModule, TargetModule};

/// Which modules get a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// All linear maps (PEFT's `"all-linear"`) except the lm_head; the embedding matrix and the scalar head are not included.
    AllLinear,
    /// A module matches if its path is an entry or ends with `.` and an entry.
    List(Vec<String>),
    /// A module matches if the expression matches its whole path.
    Regex(String),
}

/// The hyperparameters of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r.
    pub r: usize,
    /// Alpha, the numerator of the scale.
    pub lora_alpha: f64,
    /// rsLoRA: whether alpha is divided by sqrt(r) instead of r (arXiv:2312.03732).
    pub use_rslora: bool,
    /// Which modules get a branch.
    pub target_modules: TargetModules,
    /// Modules that get no branch although a target matches them; matched like targets, but need not exist.
    pub exclude_modules: Option<TargetModules>,
    /// Blocks whose modules get a branch; `None` is all of them.
    pub layers_to_transform: Option<Vec<usize>>,
    /// With `layers_to_transform`: names of the lists of blocks that its numbers count in (`layers`, `h`); empty is any list.
    pub layers_pattern: Vec<String>,
    /// Ranks of single modules: (path suffix or regular expression, rank); the first match is used.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of single modules: (path suffix or regular expression, alpha); the first match is used.
    pub alpha_pattern: Vec<(String, f64)>,
    /// DoRA (arXiv:2402.09353): whether every branch has a magnitude.
    pub use_dora: bool,
    /// LoRA+ (arXiv:2402.12354): multiple of the learning rate for B factors and magnitudes, except on the embedding matrix.
    /// It is a setting of training and is not saved with the adapter.
    pub loraplus_lr_ratio: f64,
}

impl Default for LoraConfig {
    /// PEFT's defaults: rank 8, alpha 8; on all linear maps.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: vec![],
            rank_pattern: vec![],
            alpha_pattern: vec![],
            use_dora: false,
            loraplus_lr_ratio: 1.0,
        }
    }
}

impl LoraConfig {
    /// Scale of a module that no pattern matches: alpha / r, or alpha / sqrt(r) with `use_rslora`.
    pub fn scaling(&self) -> f64 {
        self.scale(self.lora_alpha, self.r)
    }

    fn scale(&self, alpha: f64, r: usize) -> f64 {
        let r = r as f64;
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Rank of the module at this path of the model.
    pub fn rank_of(&self, path: &str) -> usize {
        pattern(&self.rank_pattern, path).unwrap_or(self.r)
    }

    /// Scale of the module at this path of the model.
    pub fn scaling_of(&self, path: &str) -> f64 {
        self.scale(pattern(&self.alpha_pattern, path).unwrap_or(self.lora_alpha), self.rank_of(path))
    }

    /// The same scales with all ranks multiplied by `factor`: rank, alpha and both patterns are adjusted.
    #[must_use]
    pub fn with_ranks_times(mut self, factor: usize) -> Self {
        let more = if self.use_rslora { (factor as f64).sqrt() } else { factor as f64 };
        self.r *= factor;
        self.lora_alpha *= more;
        self.rank_pattern.iter_mut().for_each(|(_, r)| *r *= factor);
        self.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= more);
        self
    }

    /// The modules that get a branch, in the order of [`LinearShapes::slots`]. With `layers_to_transform`, only modules of
    /// those blocks (as in PEFT, since other modules have no layer index).
    ///
    /// # Errors
    /// If the rank or alpha is out of range for these shapes, a layer does not exist, or a target matches no module.
    pub fn select(&self, shapes: &LinearShapes) -> Result<Vec<TargetModule>> {
        self.check(shapes)?;
        // PEFT treats an empty list as "all".
        let only = self.layers_to_transform.as_deref().filter(|layers| !layers.is_empty());
        let lists = self.layers_pattern.iter().map(|name| layers_regex(name)).collect::<Result<Vec<_>>>()?;
        // The list of blocks has one path in a decoder, so that a name matches all of its blocks or none.
        let counted = |path: &str| lists.is_empty() || lists.iter().any(|list| list.is_match(path));
        let within = |slot: TargetModule, path: &str| match slot {
            TargetModule::Block { layer, .. } => only.is_none_or(|layers| layers.contains(&layer) && counted(path)),
            TargetModule::NonBlockModule(_) => only.is_none(),
        };
        let matcher = Matcher::new("target_modules", &self.target_modules, shapes)?;
        let excluded = self.exclude_modules.as_ref().filter(|names| **names != TargetModules::List(vec![]));
        let excluded = excluded.map(|names| Matcher::new("exclude_modules", names, shapes)).transpose()?;
        let mut hits = vec![0usize; matcher.targets()];
        let picked = |&slot: &TargetModule| {
            let path = shapes.path(slot);
            within(slot, &path) && matcher.matches(slot, &path, &mut hits)
        };
        let mut selected: Vec<TargetModule> = shapes.slots().filter(picked).collect();
        if let Some(miss) = hits.iter().position(|&h| h == 0) {
            let outer: Vec<&str> = shapes.non_block_linears().map(Linear::name).collect();
            return Err(invalid!(
                "target_modules: {} matches no linear map of this model; there are {} in layers 0 to {} \
                 (as in {}){}{}",
                matcher.describe(miss),
                shapes.names().join(", "),
                shapes.layers.saturating_sub(1),
                shapes.module_path(0, 0),
                if outer.is_empty() { String::new() } else { format!(", and outside of them {}", outer.join(", ")) },
                if only.is_some() { "; layers_to_transform and layers_pattern select only some of them" } else { "" },
            ));
        }
        if let Some(excluded) = excluded {
            let mut ignored = vec![0usize; excluded.targets()];
            selected.retain(|&slot| !excluded.matches(slot, &shapes.path(slot), &mut ignored));
            if selected.is_empty() {
                return Err(invalid!("exclude_modules excludes every module that target_modules matches"));
            }
        }
        Ok(selected)
    }

    /// Checks that every name of a new adapter's settings means something: each key of the patterns one of the modules that get
    /// a branch, and each of `exclude_modules` a linear map. An adapter from a file may name more than this model has.
    ///
    /// # Errors
    /// If one matches nothing; those of [`Self::select`].
    pub fn check_names(&self, shapes: &LinearShapes) -> Result<()> {
        let paths: Vec<String> = self.select(shapes)?.into_iter().map(|slot| shapes.path(slot)).collect();
        let ranks = self.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key));
        for (name, key) in ranks.chain(self.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key))) {
            let regex = pattern_regex(key)?;
            if !paths.iter().any(|path| regex.is_match(path)) {
                return Err(invalid!(
                    "{name}: {key:?} matches none of the modules that get a branch; those of layer 0 are {}",
                    shapes.names().join(", ")
                ));
            }
        }
        let Some(excluded) = self.exclude_modules.as_ref().filter(|names| **names != TargetModules::List(vec![]))
        else {
            return Ok(());
        };
        let matcher = Matcher::new("exclude_modules", excluded, shapes)?;
        let mut hits = vec![0usize; matcher.targets()];
        for slot in shapes.slots() {
            matcher.matches(slot, &shapes.path(slot), &mut hits);
        }
        match hits.iter().position(|&h| h == 0) {
            Some(miss) => Err(invalid!(
                "exclude_modules: {} matches no linear map of this model; those of a layer are {}",
                matcher.describe(miss),
                shapes.names().join(", ")
            )),
            None => Ok(()),
        }
    }

    fn check(&self, shapes: &LinearShapes) -> Result<()> {
        // The bound also prevents a number in a file from determining the size of an allocation.
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
            pattern_regex(key)
                .map_err(|e| invalid!("rank_pattern, alpha_pattern: {key:?} is not a valid regular expression: {e}"))?;
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

/// What a path inside a list of blocks of this name begins with; PEFT treats the name as a regular expression.
fn layers_regex(name: &str) -> Result<regex::Regex> {
    regex::Regex::new(&format!(r"^(?:.*?\.)?(?:{name})\.\d+\."))
        .map_err(|e| invalid!("layers_pattern: {name:?} is not a valid regular expression: {e}"))
}

/// A key of a pattern as a regular expression: it matches a whole path, or a suffix after a dot.
fn pattern_regex(key: &str) -> Result<regex::Regex, regex::Error> {
    regex::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

/// The value of the first key that matches `path`. Invalid regular expressions were refused by `check`.
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
    /// A matcher of the setting `key`.
    fn new(key: &str, targets: &'a TargetModules, shapes: &LinearShapes) -> Result<Self> {
        Ok(match targets {
            TargetModules::AllLinear => Self::All,
            TargetModules::List(list) if list.is_empty() => {
                return Err(invalid!(
                    "{key} is empty; name at least one of {} or write \"all-linear\"",
                    shapes.names().join(", ")
                ));
            }
            TargetModules::List(list) => Self::List(list),
            TargetModules::Regex(pattern) => {
                let whole = regex::Regex::new(&format!("^(?:{pattern})$"))
                    .map_err(|e| invalid!("{key}: {pattern:?} is not a valid regular expression: {e}"))?;
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

    /// Whether a module is selected. Counts the matches of every target, so that one without any can be named.
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
    fn list_entries_match_names_suffixes_and_whole_paths_but_not_parts_of_names() {
        assert_eq!(picked(&config(list(&["q_proj"]))).len(), 12);
        assert_eq!(picked(&config(list(&["mlp.up_proj", "q_proj"]))).len(), 24);
        assert_eq!(picked(&config(list(&["model.layers.3.self_attn.v_proj"]))), [(3, "v_proj")]);
        assert_eq!(
            picked(&config(list(&["1.self_attn.k_proj"]))),
            [(1, "k_proj")],
            "layer 11 ends with 1, but not with .1"
        );
        assert!(config(list(&["proj"])).select(&SHAPES).is_err());
    }

    #[test]
    fn a_name_of_a_new_adapter_that_matches_nothing_is_refused() {
        let mut c = config(list(&["q_proj", "o_proj"]));
        (c.rank_pattern, c.exclude_modules) = (vec![("q_proj".into(), 4)], Some(list(&["down_proj"])));
        c.check_names(&SHAPES).unwrap();
        let refused = |c: &LoraConfig| c.check_names(&SHAPES).unwrap_err().to_string();
        // A linear map of this model, which gets no branch.
        c.rank_pattern.push(("down_proj".into(), 4));
        assert!(refused(&c).contains("rank_pattern: \"down_proj\" matches none"), "{}", refused(&c));
        c.rank_pattern.pop();
        c.alpha_pattern = vec![("qproj".into(), 4.0)];
        assert!(refused(&c).contains("alpha_pattern: \"qproj\""), "{}", refused(&c));
        c.alpha_pattern.clear();
        c.exclude_modules = Some(list(&["o_proj", "gate"]));
        assert!(refused(&c).contains("exclude_modules: \"gate\" matches no linear map"), "{}", refused(&c));
        c.exclude_modules = Some(list(&[]));
        c.check_names(&SHAPES).unwrap();
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
    fn embedding_and_lm_head_are_targets_only_by_name_and_projections_also_by_all_linear() {
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
            "as in PEFT, modules outside of the blocks have no layer"
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

    /// PEFT's rules (tests/golden/peft_variants.py compares whole adapters).
    #[test]
    fn excluded_modules_get_no_branch_and_layers_are_counted_in_the_lists_of_that_name() {
        let mut c = config(list(&["q_proj", "o_proj"]));
        c.exclude_modules = Some(list(&["3.self_attn.q_proj", "o_proj", "absent"]));
        let q_but_3: Vec<_> = (0..12).filter(|l| *l != 3).map(|l| (l, "q_proj")).collect();
        assert_eq!(picked(&c), q_but_3);
        c.exclude_modules = Some(TargetModules::Regex(r".*layers\.\d+\.self_attn\.(o|q)_proj".into()));
        assert!(c.select(&SHAPES).unwrap_err().to_string().contains("excludes every module"));
        c.exclude_modules = Some(list(&[]));
        assert_eq!(picked(&c).len(), 24, "an empty list excludes nothing");
        (c.layers_to_transform, c.exclude_modules) = (Some(vec![1]), None);
        for (pattern, count) in [(&["layers"][..], 2), (&["h", "layers"], 2), (&["model.layers"], 2), (&[], 2)] {
            c.layers_pattern = pattern.iter().map(|s| s.to_string()).collect();
            assert_eq!(picked(&c).len(), count, "{pattern:?}");
        }
        c.layers_pattern = vec!["h".into()];
        assert!(c.select(&SHAPES).unwrap_err().to_string().contains("layers_pattern"));
    }

    #[test]
    fn a_target_without_a_match_is_named_with_the_existing_modules() {
        let message = config(list(&["q_proj", "query_key_value"])).select(&SHAPES).unwrap_err().to_string();
        assert!(message.contains("query_key_value") && message.contains("gate_proj"), "{message}");
    }

    #[test]
    fn a_rank_above_the_widest_map_is_refused() {
        for r in [0, 65, usize::MAX] {
            let c = LoraConfig { r, ..config(TargetModules::AllLinear) };
            assert!(c.select(&SHAPES).unwrap_err().to_string().contains("between 1 and 64"));
        }
        let c = LoraConfig { lora_alpha: f64::NAN, ..config(TargetModules::AllLinear) };
        assert!(c.select(&SHAPES).is_err());
    }
}
