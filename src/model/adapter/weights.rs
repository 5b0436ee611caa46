//! A read-only adapter: low-rank factors for some of a decoder's linear maps, and the scalar head of a value model.
//!
//! Each role of a run (actor, critic, reward model) is one adapter over the same frozen base. It does not depend on the base,
//! on files or on the optimizer. Read `trainable.rs` next.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use crate::invalid;
use crate::model::adapter::branch::{Factor, HEAD_WEIGHT, LoraLayer, factor_name};
use crate::model::adapter::shapes::{LinearShapes, MAX_LINEARS, NonBlockModule, TargetModule};
use crate::model::adapter::targets::{LoraConfig, TargetModules};
use crate::ops::cpu;
use crate::rng::{SplitMix64, derive};

/// The scalar head of a reward model or critic: `score = weight · hidden + bias`, on hidden states after the final norm.
#[derive(Clone, Debug)]
pub struct ScoreHead {
    /// Weight, (1, D) f32.
    pub weight: Tensor,
    /// Bias, in score units. PEFT's head has none; a file contains it only if it is not 0.
    pub bias: f32,
}

/// The base that an adapter was trained over, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Provenance {
    /// PEFT's `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// Digest of the base's weights: `Base::fingerprint`.
    pub base_fingerprint: Option<String>,
}

/// Branches of one block, in the order of [`LinearShapes::linears`].
pub type LoraLayers = [Option<LoraLayer>; MAX_LINEARS];

/// Branches outside of the blocks, in the order of [`NonBlockModule::ALL`].
pub type NonBlockLayers = [Option<LoraLayer>; 4];

/// A read-only adapter. The storage of a tensor is never written (an optimizer creates new tensors), so a clone is in
/// effect a frozen deep copy and costs nothing.
///
/// ```
/// # use fourfold::model::adapter::*;
/// # let shapes = LinearShapes::llama(1, 4, 4, 4, 8);
/// # let config = LoraConfig { r: 2, lora_alpha: 4.0, use_rslora: false,
/// #     target_modules: TargetModules::AllLinear, layers_to_transform: None, ..LoraConfig::default() };
/// let adapter = Adapter::init(config, shapes, 7)?;
/// let mut learner = adapter.to_trainable();
/// let stepped = learner.parameters()?;
/// learner.replace(stepped)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
/// A read-only adapter has no `replace`:
/// ```compile_fail,E0599
/// # use fourfold::model::adapter::*;
/// # let shapes = LinearShapes::llama(1, 4, 4, 4, 8);
/// # let config = LoraConfig { r: 2, lora_alpha: 4.0, use_rslora: false,
/// #     target_modules: TargetModules::AllLinear, layers_to_transform: None, ..LoraConfig::default() };
/// let mut adapter = Adapter::init(config, shapes, 7)?;
/// let stepped = adapter.to_trainable().parameters()?;
/// adapter.replace(stepped)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Adapter {
    config: LoraConfig,
    shapes: LinearShapes,
    layers: Vec<LoraLayers>,
    outer: NonBlockLayers,
    pub(crate) head: Option<ScoreHead>,
    provenance: Provenance,
    pub(crate) frozen_half: bool,
}

/// Initial values of factor A; factor B starts at zero, so that the adapted model starts equal to the base. On the
/// embedding matrix it is the other way round, as in PEFT: A starts at zero, B standard normal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// PEFT's default, kaiming-uniform with a = sqrt(5) over the inputs: U(±1/sqrt(in)).
    #[default]
    KaimingUniform,
    /// PEFT's "gaussian": normal of standard deviation 1/r.
    Gaussian,
    /// DeepSpeed-Chat's: kaiming-uniform of the transposed matrix, U(±1/sqrt(r)). DeepSpeed-Chat's scale corresponds to
    /// `lora_alpha` = 1.
    DeepSpeedChat,
}

/// Random stream of the scalar head; no layer has this number.
const HEAD_STREAM: u64 = u64::MAX;
/// Random stream of the branches outside of the blocks; no layer has this number.
const OUTER_STREAM: u64 = u64::MAX - 1;

impl Adapter {
    /// [`Adapter::init_as`] with PEFT's default.
    ///
    /// # Errors
    /// Those of [`LoraConfig::select`].
    pub fn init(config: LoraConfig, shapes: LinearShapes, seed: u64) -> Result<Self> {
        Self::init_as(config, shapes, seed, Init::default())
    }

    /// A freshly initialised adapter. Each matrix has its own random stream, so that adding a target does not change the
    /// others. DoRA's magnitudes are computed from the base: [`crate::model::init::dora::with_magnitudes`].
    ///
    /// # Errors
    /// Those of [`LoraConfig::select`]; if the config has `use_dora`.
    pub fn init_as(config: LoraConfig, shapes: LinearShapes, seed: u64, init: Init) -> Result<Self> {
        let mut pairs = vec![];
        for slot in config.select(&shapes)? {
            let (in_features, out) = shapes.dims_of(slot);
            let path = shapes.path(slot);
            let (r, scale) = (config.rank_of(&path), config.scaling_of(&path));
            let stream = match slot {
                TargetModule::Block { layer, linear } => [layer as u64, linear as u64],
                TargetModule::NonBlockModule(outer) => [OUTER_STREAM, outer as u64],
            };
            let mut rng = SplitMix64::new(derive(seed, &stream));
            let (a, b) = if slot == TargetModule::NonBlockModule(NonBlockModule::Embedding) {
                (vec![0f32; r * in_features], (0..out * r).map(|_| standard_normal(&mut rng) as f32).collect())
            } else {
                let uniform = |rng: &mut SplitMix64, n: usize| (2.0 * rng.uniform() - 1.0) * (1.0 / (n as f64).sqrt());
                let draw = |_| match init {
                    Init::KaimingUniform => uniform(&mut rng, in_features) as f32,
                    Init::DeepSpeedChat => uniform(&mut rng, r) as f32,
                    Init::Gaussian => (standard_normal(&mut rng) / r as f64) as f32,
                };
                ((0..r * in_features).map(draw).collect::<Vec<f32>>(), vec![0f32; out * r])
            };
            let tensor = |values, dims: (usize, usize)| Tensor::from_vec(values, dims, &Device::Cpu);
            pairs.push((slot, LoraLayer::new(tensor(a, (r, in_features))?, tensor(b, (out, r))?, scale)));
        }
        Self::from_pairs(config, shapes, pairs, None, Provenance::default())
    }

    /// From finished branches of the blocks; [`Adapter::from_pairs`] also takes those outside of the blocks.
    ///
    /// # Errors
    /// Those of [`Adapter::from_pairs`]; if the number of blocks differs.
    pub fn from_parts(
        config: LoraConfig,
        shapes: LinearShapes,
        layers: Vec<LoraLayers>,
        head: Option<ScoreHead>,
        provenance: Provenance,
    ) -> Result<Self> {
        if layers.len() != shapes.layers {
            return Err(invalid!("the adapter has {} layers, the base {}", layers.len(), shapes.layers));
        }
        let slots = |layer| {
            move |(linear, pair): (usize, Option<LoraLayer>)| Some((TargetModule::Block { layer, linear }, pair?))
        };
        let rows = layers.into_iter().enumerate();
        let pairs = rows.flat_map(|(layer, row)| row.into_iter().enumerate().filter_map(slots(layer))).collect();
        Self::from_pairs(config, shapes, pairs, head, provenance)
    }

    /// From finished branches, as read from a file.
    ///
    /// # Errors
    /// If the config selects a module without a branch, or does not select one with a branch, or if a tensor is not f32 of
    /// the base's shape.
    pub fn from_pairs(
        config: LoraConfig,
        shapes: LinearShapes,
        pairs: Vec<(TargetModule, LoraLayer)>,
        head: Option<ScoreHead>,
        provenance: Provenance,
    ) -> Result<Self> {
        let selected = config.select(&shapes)?;
        let mut layers: Vec<LoraLayers> = (0..shapes.layers).map(|_| Default::default()).collect();
        let mut outer = NonBlockLayers::default();
        for (slot, pair) in pairs {
            let path = shapes.path(slot);
            if !selected.contains(&slot) {
                return Err(invalid!("{path} has LoRA factors, but the config leaves it out"));
            }
            let ((in_features, out), r) = (shapes.dims_of(slot), config.rank_of(&path));
            check_tensor(&pair.a, &[r, in_features], &format!("{path}.lora_A"))?;
            check_tensor(&pair.b, &[out, r], &format!("{path}.lora_B"))?;
            match (&pair.magnitude, config.use_dora) {
                (Some(m), true) => check_tensor(m, &[out], &format!("{path}.lora_magnitude_vector"))?,
                (None, false) => {}
                (None, true) => return Err(invalid!("use_dora: {path} has no magnitude")),
                (Some(_), false) => return Err(invalid!("{path} has a magnitude, but the config is not of DoRA")),
            }
            match slot {
                TargetModule::Block { layer, linear } => layers[layer][linear] = Some(pair),
                TargetModule::NonBlockModule(at) => outer[at as usize] = Some(pair),
            }
        }
        if let Some(head) = &head {
            check_tensor(&head.weight, &[1, shapes.hidden], "score.weight")?;
        }
        let adapter = Self { config, shapes, layers, outer, head, provenance, frozen_half: false };
        if let Some(&slot) = selected.iter().find(|&&slot| adapter.at(slot).is_none()) {
            return Err(invalid!("the config selects {}, but it has no LoRA factors", shapes.path(slot)));
        }
        Ok(adapter)
    }

    /// The same adapter with a fresh scalar head: normal weights of standard deviation 1/sqrt(D), bias 0. It replaces an
    /// existing head. A branch on the lm_head is dropped, because a score does not depend on it.
    ///
    /// # Errors
    /// If the lm_head has the only branch.
    pub fn with_head(self, seed: u64) -> Result<Self> {
        let mut scorer = self.without_output_branch()?;
        let d = scorer.shapes.hidden;
        let mut rng = SplitMix64::new(derive(seed, &[HEAD_STREAM]));
        let std = 1.0 / (d as f64).sqrt();
        let weight: Vec<f32> = (0..d).map(|_| (std * standard_normal(&mut rng)) as f32).collect();
        scorer.head = Some(ScoreHead { weight: Tensor::from_vec(weight, (1, d), &Device::Cpu)?, bias: 0.0 });
        Ok(scorer)
    }

    fn without_output_branch(self) -> Result<Self> {
        if self.outer(NonBlockModule::Head).is_none() {
            return Ok(self);
        }
        let kept = |slot: &TargetModule| *slot != TargetModule::NonBlockModule(NonBlockModule::Head);
        let paths: Vec<String> = self.pairs().map(|(slot, _)| slot).filter(kept).map(|s| self.shapes.path(s)).collect();
        if paths.is_empty() {
            return Err(invalid!(
                "the only branch is on {}, which a score does not depend on; add other modules to target_modules",
                self.shapes.path(TargetModule::NonBlockModule(NonBlockModule::Head))
            ));
        }
        let config = LoraConfig { target_modules: TargetModules::List(paths), ..self.config.clone() };
        let mut outer = self.outer.clone();
        outer[NonBlockModule::Head as usize] = None;
        Ok(Self { config, outer, ..self })
    }

    /// The same adapter with this scalar head, or without one.
    ///
    /// # Errors
    /// If its weight is not (1, D) f32.
    pub fn with_score_head(mut self, head: Option<ScoreHead>) -> Result<Self> {
        if let Some(head) = &head {
            check_tensor(&head.weight, &[1, self.shapes.hidden], "score.weight")?;
        }
        self.head = head;
        Ok(self)
    }

    /// The same adapter with the second half of every branch's rank frozen: PiSSA and OLoRA subtract the initial branch from
    /// the base, and since the base is never written, the subtraction is such a half. See `model/init/pissa_olora.rs`.
    ///
    /// # Errors
    /// If a rank is odd.
    pub fn with_frozen_half(mut self) -> Result<Self> {
        if let Some((_, pair)) = self.pairs().find(|(_, pair)| !pair.rank().is_multiple_of(2)) {
            return Err(invalid!("a branch of rank {} has no half that could be frozen", pair.rank()));
        }
        self.frozen_half = true;
        Ok(self)
    }

    /// The same adapter with this LoRA+ ratio; see [`LoraConfig::loraplus_lr_ratio`].
    #[must_use]
    pub fn with_loraplus_lr_ratio(mut self, ratio: f64) -> Self {
        self.config.loraplus_lr_ratio = ratio;
        self
    }

    /// Whether the second half of every branch's rank is frozen.
    pub fn frozen_half(&self) -> bool {
        self.frozen_half
    }

    /// The same adapter with this provenance.
    #[must_use]
    pub fn with_provenance(mut self, provenance: Provenance) -> Self {
        self.provenance = provenance;
        self
    }

    /// A copy whose tensors are on `device`.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut moved = self.clone();
        for pair in moved.pairs_mut() {
            *pair = pair.to_device(device)?;
        }
        if let Some(head) = &mut moved.head {
            head.weight = head.weight.to_device(device)?;
        }
        Ok(moved)
    }

    /// The same weights with copies on devices of their own.
    #[must_use]
    pub(crate) fn with_own_caches(mut self) -> Self {
        for pair in self.pairs_mut() {
            *pair = pair.clone().with_own_caches();
        }
        self
    }

    /// The hyperparameters.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Linear maps of the base that the adapter fits.
    pub fn shapes(&self) -> &LinearShapes {
        &self.shapes
    }

    /// Branches of all blocks.
    pub fn layers(&self) -> &[LoraLayers] {
        &self.layers
    }

    /// The branch of one linear map of a block; `None` if it has none or does not exist.
    pub fn pair(&self, layer: usize, linear: usize) -> Option<&LoraLayer> {
        self.layers.get(layer)?.get(linear)?.as_ref()
    }

    /// The branch on one module outside of the blocks.
    pub fn outer(&self, outer: NonBlockModule) -> Option<&LoraLayer> {
        self.outer[outer as usize].as_ref()
    }

    /// The branch on one target module.
    pub fn at(&self, slot: TargetModule) -> Option<&LoraLayer> {
        match slot {
            TargetModule::Block { layer, linear } => self.pair(layer, linear),
            TargetModule::NonBlockModule(outer) => self.outer(outer),
        }
    }

    /// All branches with their target modules, in the order of [`LinearShapes::slots`].
    pub fn pairs(&self) -> impl Iterator<Item = (TargetModule, &LoraLayer)> {
        self.shapes.slots().filter_map(|slot| Some((slot, self.at(slot)?)))
    }

    /// All branches, mutable, in the order of [`Adapter::pairs`].
    pub(crate) fn pairs_mut(&mut self) -> impl Iterator<Item = &mut LoraLayer> {
        self.layers.iter_mut().flatten().chain(&mut self.outer).flatten()
    }

    /// The scalar head of a value model.
    pub fn head(&self) -> Option<&ScoreHead> {
        self.head.as_ref()
    }

    /// The base it was trained over.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// All tensors under their names in PEFT's files: by layer, then by [`LinearShapes::linears`], then outside of the blocks;
    /// A before B before the magnitude; the head's weight last. The head's bias is not a tensor and is not in this list.
    pub fn named_tensors(&self) -> Vec<(String, &Tensor)> {
        let mut named = Vec::new();
        for (slot, pair) in self.pairs() {
            let name = |factor| factor_name(&self.shapes, slot, factor);
            named.extend([(name(Factor::A), &pair.a), (name(Factor::B), &pair.b)]);
            named.extend(pair.magnitude.iter().map(|m| (name(Factor::Magnitude), m)));
        }
        named.extend(self.head.iter().map(|head| (HEAD_WEIGHT.to_string(), &head.weight)));
        named
    }

    /// Whether every factor B is 0, so that the adapter changes nothing: as a fresh one starts.
    ///
    /// # Errors
    /// If a factor is not on the host.
    pub fn is_unmoved(&self) -> Result<bool> {
        for (_, pair) in self.pairs() {
            if cpu::view(&pair.b)?.iter().any(|&b| b != 0.0) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Number of parameters; the head's bias is counted if it is not 0.
    pub fn num_parameters(&self) -> usize {
        let tensors: usize = self.named_tensors().iter().map(|(_, t)| t.elem_count()).sum();
        tensors + usize::from(self.head.as_ref().is_some_and(|h| h.bias != 0.0))
    }
}

/// Checks that a tensor is f32 of this shape.
pub(crate) fn check_tensor(tensor: &Tensor, dims: &[usize], name: &str) -> Result<()> {
    if tensor.dims() != dims || tensor.dtype() != DType::F32 {
        return Err(invalid!("{name} is {:?} {:?}, and must be {dims:?} F32", tensor.dims(), tensor.dtype()));
    }
    Ok(())
}

/// Box-Muller; 1 - u keeps the logarithm's argument above 0.
fn standard_normal(rng: &mut SplitMix64) -> f64 {
    let radius = (-2.0 * (1.0 - rng.uniform()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.uniform()).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: LinearShapes = LinearShapes::llama(3, 64, 96, 32, 128);
    const Q: usize = 0;
    const K: usize = 1;
    const V: usize = 2;
    const DOWN: usize = 6;

    fn config() -> LoraConfig {
        LoraConfig {
            r: 8,
            lora_alpha: 4.0,
            use_rslora: false,
            target_modules: TargetModules::AllLinear,
            layers_to_transform: None,
            ..LoraConfig::default()
        }
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn fresh_factors_are_pefts_kaiming_uniform_and_zero() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap();
        let down = adapter.pair(1, DOWN).unwrap();
        assert_eq!((down.a.dims(), down.b.dims(), down.scale), (&[8, 128][..], &[64, 8][..], 0.5));
        assert!(values(&down.b).iter().all(|&x| x == 0.0));
        let (a, bound) = (values(&down.a), 1.0 / 128f32.sqrt());
        assert!(a.iter().all(|x| x.abs() <= bound));
        let (low, high) = a.iter().fold((0f32, 0f32), |(l, h), &x| (l.min(x), h.max(x)));
        assert!(low < -0.97 * bound && high > 0.97 * bound, "1024 draws reach both ends: {low} {high}");
        // A uniform variable's variance is bound^2 / 3; 1024 draws estimate it within 10 % (4 sigma are 11 %).
        let variance = a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32;
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.1, "{variance}");
    }

    #[test]
    fn each_matrix_has_its_own_random_stream() {
        let all = Adapter::init(config(), SHAPES, 3).unwrap();
        let one = LoraConfig { target_modules: TargetModules::List(vec!["v_proj".into()]), ..config() };
        let one = Adapter::init(one, SHAPES, 3).unwrap();
        assert_eq!(values(&all.pair(2, V).unwrap().a), values(&one.pair(2, V).unwrap().a));
        assert!(one.pair(2, Q).is_none() && one.pair(3, V).is_none());
        let (v, k) = (all.pair(2, V).unwrap(), all.pair(2, K).unwrap());
        assert_ne!(values(&v.a), values(&k.a));
    }

    #[test]
    fn the_head_is_normal_with_deviation_one_over_root_d() {
        let wide = LinearShapes::llama(1, 4096, 8, 8, 8);
        let one = LoraConfig { target_modules: TargetModules::List(vec!["k_proj".into()]), ..config() };
        let adapter = Adapter::init(one, wide, 1).unwrap().with_head(5).unwrap();
        let w = values(&adapter.head().unwrap().weight);
        let mean = w.iter().sum::<f32>() / 4096.0;
        let second = w.iter().map(|x| x * x).sum::<f32>(); // expected 4096 * 1/4096 = 1, deviation sqrt(2/4096) = 0.022
        assert!(mean.abs() < 4.0 / 4096.0 && (second - 1.0).abs() < 0.09, "{mean} {second}");
        assert_eq!(adapter.num_parameters(), 8 * (4096 + 8) + 4096);
    }

    #[test]
    fn named_tensors_are_ordered_by_layer_projection_and_factor_with_the_head_last() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap().with_head(1).unwrap();
        let names: Vec<String> = adapter.named_tensors().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names.len(), 3 * 7 * 2 + 1);
        assert_eq!(names[0], "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
        assert_eq!(names[13], "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight");
        assert_eq!(names[14], "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight");
        assert_eq!(names[42], "base_model.model.score.weight");
    }

    #[test]
    fn parts_that_do_not_fit_the_config_or_the_base_are_refused() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap();
        let build = |layers: Vec<LoraLayers>, shapes| {
            Adapter::from_parts(config(), shapes, layers, None, Provenance::default())
        };
        assert!(build(adapter.layers().to_vec(), SHAPES).is_ok());
        let mut holes = adapter.layers().to_vec();
        holes[2][3] = None;
        assert!(build(holes, SHAPES).unwrap_err().to_string().contains("layers.2.self_attn.o_proj"));
        let other = LinearShapes::llama(3, 64, 96, 32, 120);
        let message = build(adapter.layers().to_vec(), other).unwrap_err().to_string();
        assert!(message.contains("gate_proj.lora_B") && message.contains("[120, 8]"), "{message}");
    }
}
