//! The small weights: low-rank factors for some of a decoder's linear maps, and the scalar head of a scorer.
//! [`Adapter`] is read-only; [`TrainableAdapter`] is the one place in the program whose weights can change. Knows no
//! base, no file and no optimizer. Read peft.rs for its files and train/adamw.rs for what steps it.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

pub use super::gradients::Gradients;
pub use super::lora::{Linear, LinearShapes, LoraConfig, MAX_LINEARS, MatrixLayout, TargetModules};
use crate::invalid;
use crate::rng::{SplitMix64, derive};

/// One low-rank branch: `y += scale * (x Aᵀ) Bᵀ`.
#[derive(Clone, Debug)]
pub struct LoraPair {
    /// (r, in) f32.
    pub a: Tensor,
    /// (out, r) f32.
    pub b: Tensor,
    /// alpha / r, or alpha / sqrt(r).
    pub scale: f64,
}

/// The scalar head of a reward model or critic: `score = weight · hidden + bias`, hidden after the final norm.
#[derive(Clone, Debug)]
pub struct ScoreHead {
    /// (1, D) f32.
    pub weight: Tensor,
    /// In score units. PEFT's head has none; a file carries it only where it is not 0.
    pub bias: f32,
}

/// What an adapter was trained over, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Provenance {
    /// PEFT's `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// A digest of the base's weights.
    pub base_fingerprint: Option<String>,
}

/// The branches of one block, in the order of [`LinearShapes::linears`].
pub type LayerPairs = [Option<LoraPair>; MAX_LINEARS];

/// Read-only adapter. A tensor's storage is never written here (an optimizer makes new tensors), so a clone is a
/// frozen deep copy in effect and costs nothing.
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
/// A frozen adapter has no such method:
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
    layers: Vec<LayerPairs>,
    head: Option<ScoreHead>,
    provenance: Provenance,
    frozen_half: bool,
}

/// The start of a branch's A; B starts at zero, so that the adapted model starts as the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// PEFT's default, kaiming-uniform with a = sqrt(5) over the inputs: U(±1/sqrt(in)).
    #[default]
    KaimingUniform,
    /// PEFT's "gaussian": normal of standard deviation 1/r.
    Gaussian,
    /// DeepSpeed-Chat's, which draws the same over a matrix that lies the other way round: U(±1/sqrt(r)). Its scale is
    /// `lora_alpha` = 1.
    DeepSpeedChat,
}

/// Streams of [`Adapter::init`]'s random numbers.
const HEAD_STREAM: u64 = u64::MAX;

impl Adapter {
    /// [`Adapter::init_as`] with PEFT's default.
    ///
    /// # Errors
    /// Those of [`LoraConfig::select`].
    pub fn init(config: LoraConfig, shapes: LinearShapes, seed: u64) -> Result<Self> {
        Self::init_as(config, shapes, seed, Init::default())
    }

    /// A fresh adapter. Each matrix has its own random stream: adding a target leaves the others as they were.
    ///
    /// # Errors
    /// Those of [`LoraConfig::select`].
    pub fn init_as(config: LoraConfig, shapes: LinearShapes, seed: u64, init: Init) -> Result<Self> {
        let mut layers = Vec::new();
        for (layer, selected) in config.select(&shapes)?.into_iter().enumerate() {
            let mut pairs: LayerPairs = Default::default();
            for linear in (0..shapes.linears().len()).filter(|&i| selected[i]) {
                let (inp, out) = shapes.dims(linear);
                let path = shapes.module_path(layer, linear);
                let (r, scale) = (config.rank_of(&path), config.scaling_of(&path));
                let mut rng = SplitMix64::new(derive(seed, &[layer as u64, linear as u64]));
                let uniform = |rng: &mut SplitMix64, n: usize| (2.0 * rng.uniform() - 1.0) * (1.0 / (n as f64).sqrt());
                let draw = |_| match init {
                    Init::KaimingUniform => uniform(&mut rng, inp) as f32,
                    Init::DeepSpeedChat => uniform(&mut rng, r) as f32,
                    Init::Gaussian => (standard_normal(&mut rng) / r as f64) as f32,
                };
                let a: Vec<f32> = (0..r * inp).map(draw).collect();
                pairs[linear] = Some(LoraPair {
                    a: Tensor::from_vec(a, (r, inp), &Device::Cpu)?,
                    b: Tensor::zeros((out, r), DType::F32, &Device::Cpu)?,
                    scale,
                });
            }
            layers.push(pairs);
        }
        Ok(Self { config, shapes, layers, head: None, provenance: Provenance::default(), frozen_half: false })
    }

    /// From finished parts: a file's reader and tests.
    ///
    /// # Errors
    /// If a branch is missing or too many for the config, or a tensor is not f32 of the shape that the base asks for.
    pub fn from_parts(
        config: LoraConfig,
        shapes: LinearShapes,
        layers: Vec<LayerPairs>,
        head: Option<ScoreHead>,
        provenance: Provenance,
    ) -> Result<Self> {
        let selected = config.select(&shapes)?;
        if layers.len() != shapes.layers {
            return Err(invalid!("the adapter has {} layers, the base {}", layers.len(), shapes.layers));
        }
        for (layer, (pairs, selected)) in layers.iter().zip(&selected).enumerate() {
            for linear in 0..shapes.linears().len() {
                let path = shapes.module_path(layer, linear);
                let (inp, out) = shapes.dims(linear);
                match (&pairs[linear], selected[linear]) {
                    (None, false) => {}
                    (None, true) => return Err(invalid!("the config selects {path}, but it has no LoRA factors")),
                    (Some(_), false) => return Err(invalid!("{path} has LoRA factors, but the config leaves it out")),
                    (Some(pair), true) => {
                        let r = config.rank_of(&path);
                        check_tensor(&pair.a, &[r, inp], &format!("{path}.lora_A"))?;
                        check_tensor(&pair.b, &[out, r], &format!("{path}.lora_B"))?;
                    }
                }
            }
        }
        if let Some(head) = &head {
            check_tensor(&head.weight, &[1, shapes.hidden], "score.weight")?;
        }
        Ok(Self { config, shapes, layers, head, provenance, frozen_half: false })
    }

    /// With a fresh scalar head: normal weights of standard deviation 1/sqrt(D), bias 0. Replaces a head that is there.
    ///
    /// # Errors
    /// Only if the tensor cannot be made.
    pub fn with_head(mut self, seed: u64) -> Result<Self> {
        let d = self.shapes.hidden;
        let mut rng = SplitMix64::new(derive(seed, &[HEAD_STREAM]));
        let std = 1.0 / (d as f64).sqrt();
        let weight: Vec<f32> = (0..d).map(|_| (std * standard_normal(&mut rng)) as f32).collect();
        self.head = Some(ScoreHead { weight: Tensor::from_vec(weight, (1, d), &Device::Cpu)?, bias: 0.0 });
        Ok(self)
    }

    /// With this head, or none.
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

    /// With the second half of every branch's rank frozen: what PiSSA and OLoRA take from the base at the start, kept as
    /// a branch of its own since a base is never written. See init.rs.
    ///
    /// # Errors
    /// If a rank is odd.
    pub fn with_frozen_half(mut self) -> Result<Self> {
        if let Some(pair) = self.layers.iter().flatten().flatten().find(|p| !p.a.dims()[0].is_multiple_of(2)) {
            return Err(invalid!("a branch of rank {} has no half that could be frozen", pair.a.dims()[0]));
        }
        self.frozen_half = true;
        Ok(self)
    }

    /// With this LoRA+ ratio; see [`LoraConfig::loraplus_lr_ratio`].
    #[must_use]
    pub fn with_loraplus_lr_ratio(mut self, ratio: f64) -> Self {
        self.config.loraplus_lr_ratio = ratio;
        self
    }

    /// Whether the second half of every branch's rank never trains.
    pub fn frozen_half(&self) -> bool {
        self.frozen_half
    }

    /// With this origin.
    #[must_use]
    pub fn with_provenance(mut self, provenance: Provenance) -> Self {
        self.provenance = provenance;
        self
    }

    /// A copy whose tensors live on `device`.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut moved = self.clone();
        for pair in moved.layers.iter_mut().flatten().flatten() {
            pair.a = pair.a.to_device(device)?;
            pair.b = pair.b.to_device(device)?;
        }
        if let Some(head) = &mut moved.head {
            head.weight = head.weight.to_device(device)?;
        }
        Ok(moved)
    }

    /// The hyperparameters.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The sizes of the base that it fits.
    pub fn shapes(&self) -> &LinearShapes {
        &self.shapes
    }

    /// The branches of every block.
    pub fn layers(&self) -> &[LayerPairs] {
        &self.layers
    }

    /// The branch of one map, if it has one. `None` for a layer that does not exist, too.
    pub fn pair(&self, layer: usize, linear: usize) -> Option<&LoraPair> {
        self.layers.get(layer)?.get(linear)?.as_ref()
    }

    /// The scalar head of a scorer.
    pub fn head(&self) -> Option<&ScoreHead> {
        self.head.as_ref()
    }

    /// Where it comes from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Every tensor under the name that PEFT's file gives it: by layer, then by [`LinearShapes::linears`], A before B, the
    /// head's weight last. The head's bias is a number, not a tensor, and is not in this list.
    pub fn named_tensors(&self) -> Vec<(String, &Tensor)> {
        let mut named = Vec::new();
        for (layer, pairs) in self.layers.iter().enumerate() {
            for (linear, pair) in pairs.iter().enumerate() {
                if let Some(pair) = pair {
                    named.push((factor_name(&self.shapes, layer, linear, 'A'), &pair.a));
                    named.push((factor_name(&self.shapes, layer, linear, 'B'), &pair.b));
                }
            }
        }
        named.extend(self.head.iter().map(|head| (HEAD_WEIGHT.to_string(), &head.weight)));
        named
    }

    /// Numbers in all its tensors; the head's bias counts where it is not 0.
    pub fn num_parameters(&self) -> usize {
        let tensors: usize = self.named_tensors().iter().map(|(_, t)| t.elem_count()).sum();
        tensors + usize::from(self.head.as_ref().is_some_and(|h| h.bias != 0.0))
    }

    /// A trainable copy; this adapter stays as it is. The head's bias does not train (see [`HeadBias`]).
    pub fn to_trainable(&self) -> TrainableAdapter {
        TrainableAdapter { adapter: self.clone(), head_bias: HeadBias::Fixed }
    }
}

/// The name in PEFT's file of factor `A` or `B`.
pub fn factor_name(shapes: &LinearShapes, layer: usize, linear: usize, factor: char) -> String {
    format!("base_model.model.{}.lora_{factor}.weight", shapes.module_path(layer, linear))
}

/// The head's weight in PEFT's file.
pub const HEAD_WEIGHT: &str = "base_model.model.score.weight";
/// The head's bias; ours, not PEFT's.
pub const HEAD_BIAS: &str = "base_model.model.score.bias";

/// Whether the scalar head's bias is a parameter. Fixed is the default: a pairwise loss is blind to it, so what
/// reaches it is rounding noise, and Adam would scale that noise up to full steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadBias {
    /// It keeps its value.
    Fixed,
    /// It is the last parameter, of shape (1,). For a critic.
    Trained,
}

/// An adapter under training: the only weights that can change.
#[derive(Debug)]
pub struct TrainableAdapter {
    adapter: Adapter,
    head_bias: HeadBias,
}

impl TrainableAdapter {
    /// With the head's bias trained or not.
    ///
    /// # Errors
    /// If it shall train and there is no head.
    pub fn with_head_bias(mut self, head_bias: HeadBias) -> Result<Self> {
        if head_bias == HeadBias::Trained && self.adapter.head.is_none() {
            return Err(invalid!("this adapter has no scalar head whose bias could train; make one with with_head"));
        }
        self.head_bias = head_bias;
        Ok(self)
    }

    /// The weights as they are now. The borrow ends before the next [`Self::replace`].
    pub fn view(&self) -> &Adapter {
        &self.adapter
    }

    /// The weights as they are now, frozen.
    pub fn snapshot(&self) -> Adapter {
        self.adapter.clone()
    }

    /// The parameters' names in flat order: [`Adapter::named_tensors`], then the head's bias where it trains.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.adapter.named_tensors().into_iter().map(|(name, _)| name).collect();
        names.extend(self.trained_bias().map(|_| HEAD_BIAS.to_string()));
        names
    }

    /// The parameters in flat order, for an optimizer to replace.
    ///
    /// # Errors
    /// Only if the bias's tensor cannot be made.
    pub fn parameters(&self) -> Result<Vec<Tensor>> {
        let mut flat = Vec::new();
        for pair in self.adapter.layers.iter().flatten().flatten() {
            flat.extend([self.trained(&pair.a, 0)?, self.trained(&pair.b, 1)?]);
        }
        flat.extend(self.adapter.head.iter().map(|head| head.weight.clone()));
        if let Some(bias) = self.trained_bias() {
            let device = self.adapter.head.as_ref().map_or(&Device::Cpu, |h| h.weight.device());
            flat.push(Tensor::from_vec(vec![bias], 1, device)?);
        }
        Ok(flat)
    }

    /// Takes stepped parameters in flat order. All or nothing.
    ///
    /// # Errors
    /// If their number, a shape or a type differs from [`Self::parameters`].
    pub fn replace(&mut self, parameters: Vec<Tensor>) -> Result<()> {
        let names = self.names();
        anyhow::ensure!(
            parameters.len() == names.len(),
            "{} parameters given, this adapter has {}",
            parameters.len(),
            names.len()
        );
        for ((new, old), name) in parameters.iter().zip(self.parameters()?).zip(&names) {
            check_tensor(new, old.dims(), name)?;
        }
        let bias = match self.trained_bias() {
            Some(_) => Some(parameters[names.len() - 1].to_vec1::<f32>()?[0]),
            None => None,
        };
        let mut new = parameters.into_iter();
        let adapter = &mut self.adapter;
        let frozen = adapter.frozen_half;
        let slots = adapter.layers.iter_mut().flatten().flatten().flat_map(|p| [(&mut p.a, 0), (&mut p.b, 1)]);
        // All are made before any is put in its place.
        let mut made = vec![];
        for ((slot, dim), tensor) in slots.zip(&mut new) {
            let tensor = match frozen {
                true => {
                    let half = slot.dims()[dim] / 2;
                    Tensor::cat(&[&tensor, &slot.narrow(dim, half, half)?], dim)?
                }
                false => tensor,
            };
            made.push((slot, tensor));
        }
        for (slot, tensor) in made {
            *slot = tensor;
        }
        if let (Some(head), Some(weight)) = (&mut adapter.head, new.next()) {
            head.weight = weight;
        }
        if let (Some(head), Some(bias)) = (&mut adapter.head, bias) {
            head.bias = bias;
        }
        Ok(())
    }

    /// The part of a factor, or of its gradient, that trains: all of it, or the first half of the rank.
    pub(super) fn trained(&self, factor: &Tensor, rank_dim: usize) -> Result<Tensor> {
        Ok(match self.adapter.frozen_half {
            true => factor.narrow(rank_dim, 0, factor.dims()[rank_dim] / 2)?.contiguous()?,
            false => factor.clone(),
        })
    }

    pub(super) fn trained_bias(&self) -> Option<f32> {
        self.adapter.head.as_ref().filter(|_| self.head_bias == HeadBias::Trained).map(|head| head.bias)
    }
}

pub(super) fn check_tensor(tensor: &Tensor, dims: &[usize], name: &str) -> Result<()> {
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
    fn each_matrix_has_its_own_stream_of_numbers() {
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
    fn names_come_by_layer_then_projection_then_factor_with_the_head_last() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap().with_head(1).unwrap();
        let names: Vec<String> = adapter.named_tensors().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names.len(), 3 * 7 * 2 + 1);
        assert_eq!(names[0], "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
        assert_eq!(names[13], "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight");
        assert_eq!(names[14], "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight");
        assert_eq!(names[42], "base_model.model.score.weight");
    }

    #[test]
    fn a_snapshot_and_the_source_stay_when_the_learner_steps() {
        let source = Adapter::init(config(), SHAPES, 3).unwrap().with_head(1).unwrap();
        let mut learner = source.to_trainable().with_head_bias(HeadBias::Trained).unwrap();
        let snapshot = learner.snapshot();
        let stepped = learner.parameters().unwrap().iter().map(|t| (t + 1.0).unwrap()).collect();
        learner.replace(stepped).unwrap();
        assert_eq!(learner.view().head().unwrap().bias, 1.0);
        for ((new, old), (name, start)) in
            learner.view().named_tensors().iter().zip(snapshot.named_tensors()).zip(source.named_tensors())
        {
            assert_eq!(values(old.1), values(start), "{name}");
            let want: Vec<f32> = values(start).iter().map(|x| x + 1.0).collect();
            assert_eq!(values(new.1), want, "{name}");
        }
    }

    #[test]
    fn a_wrong_replacement_is_refused_and_changes_nothing() {
        let source = Adapter::init(config(), SHAPES, 3).unwrap();
        let mut learner = source.to_trainable();
        let mut bad: Vec<Tensor> = learner.parameters().unwrap().iter().map(|t| (t + 1.0).unwrap()).collect();
        let last = bad.len() - 1;
        bad[last] = bad[last].t().unwrap();
        let message = learner.replace(bad).unwrap_err().to_string();
        assert!(message.contains("layers.2.mlp.down_proj.lora_B"), "{message}");
        assert!(learner.replace(vec![]).is_err());
        let (a, b) = (learner.view().pair(0, Q).unwrap(), source.pair(0, Q).unwrap());
        assert_eq!(values(&a.a), values(&b.a));
    }

    #[test]
    fn parts_that_do_not_fit_the_config_or_the_base_are_refused() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap();
        let build = |layers: Vec<LayerPairs>, shapes| {
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
