//! An adapter under training: the only weights of the program that can change, as one flat list of parameters.
//!
//! The optimizer reads and replaces that list and does not need to know which tensor is which. It does not depend on the
//! optimizer or the base. Read `train/adamw.rs` next.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use crate::device::Array;
use crate::invalid;
use crate::model::adapter::branch::{Factor, HEAD_BIAS, HEAD_WEIGHT, factor_name};
use crate::model::adapter::gradients::Gradients;
use crate::model::adapter::shapes::{MAX_LINEARS, NonBlockModule, TargetModule};
use crate::model::adapter::weights::{Adapter, check_tensor};

impl Adapter {
    /// A trainable copy of this adapter, which itself stays frozen. The head's bias is fixed (see [`HeadBias`]).
    pub fn to_trainable(&self) -> TrainableAdapter {
        TrainableAdapter::of(self.clone())
    }
}

/// Whether the scalar head's bias is a parameter. It is fixed by default: a pairwise loss does not depend on it, so its
/// gradient is rounding noise, which Adam would scale up to full steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadBias {
    /// The bias keeps its value.
    Fixed,
    /// The bias is the last parameter, of shape (1): for a critic.
    Trained,
}

/// An adapter under training: the only weights that can change.
#[derive(Debug)]
pub struct TrainableAdapter {
    adapter: Adapter,
    head_bias: HeadBias,
}

impl TrainableAdapter {
    pub(crate) fn of(adapter: Adapter) -> Self {
        Self { adapter, head_bias: HeadBias::Fixed }
    }

    /// The same adapter with the head's bias trained or fixed.
    ///
    /// # Errors
    /// If the bias is to be trained and there is no head.
    pub fn with_head_bias(mut self, head_bias: HeadBias) -> Result<Self> {
        if head_bias == HeadBias::Trained && self.adapter.head.is_none() {
            return Err(invalid!("this adapter has no scalar head whose bias could train; make one with with_head"));
        }
        self.head_bias = head_bias;
        Ok(self)
    }

    /// The current weights. The borrow must end before the next [`Self::replace`].
    pub fn view(&self) -> &Adapter {
        &self.adapter
    }

    /// The current weights as a frozen adapter.
    pub fn snapshot(&self) -> Adapter {
        self.adapter.clone()
    }

    /// Names of the parameters in flat order: [`Adapter::named_tensors`], then the head's bias if it is trained.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.adapter.named_tensors().into_iter().map(|(name, _)| name).collect();
        names.extend(self.trained_bias().map(|_| HEAD_BIAS.to_string()));
        names
    }

    /// Parameters in flat order, for an optimizer to replace.
    ///
    /// # Errors
    /// If a tensor cannot be created.
    pub fn parameters(&self) -> Result<Vec<Tensor>> {
        let mut flat = Vec::new();
        for (_, pair) in self.adapter.pairs() {
            flat.extend([self.trained(&pair.a, 0)?, self.trained(&pair.b, 1)?]);
            flat.extend(pair.magnitude.clone());
        }
        flat.extend(self.adapter.head.iter().map(|head| head.weight.clone()));
        if let Some(bias) = self.trained_bias() {
            let device = self.adapter.head.as_ref().map_or(&Device::Cpu, |h| h.weight.device());
            flat.push(Tensor::from_vec(vec![bias], 1, device)?);
        }
        Ok(flat)
    }

    /// Replaces all parameters, in flat order, after an optimizer step. On error none is replaced.
    ///
    /// # Errors
    /// If the number of parameters, a shape or a type differs from [`Self::parameters`].
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
        // All new branches are built before the first is replaced.
        let mut made = vec![];
        for slot in adapter.pairs_mut() {
            let mut pair = slot.clone().with_own_caches();
            for (factor, dim) in [(&mut pair.a, 0), (&mut pair.b, 1)] {
                let tensor = new.next().context("as many parameters as names")?;
                *factor = match frozen {
                    true => {
                        let half = factor.dims()[dim] / 2;
                        Tensor::cat(&[&tensor, &factor.narrow(dim, half, half)?], dim)?
                    }
                    false => tensor,
                };
            }
            if pair.magnitude.is_some() {
                pair.magnitude = new.next();
            }
            made.push((slot, pair));
        }
        for (slot, pair) in made {
            *slot = pair;
        }
        if let (Some(head), Some(weight)) = (&mut adapter.head, new.next()) {
            head.weight = weight;
        }
        if let (Some(head), Some(bias)) = (&mut adapter.head, bias) {
            head.bias = bias;
        }
        Ok(())
    }

    /// The trained part of a factor or of its gradient: all of it, or the first half of the rank where the second is frozen.
    pub(crate) fn trained(&self, factor: &Tensor, rank_dim: usize) -> Result<Tensor> {
        Ok(match self.adapter.frozen_half {
            true => factor.narrow(rank_dim, 0, factor.dims()[rank_dim] / 2)?.contiguous()?,
            false => factor.clone(),
        })
    }

    pub(crate) fn trained_bias(&self) -> Option<f32> {
        self.adapter.head.as_ref().filter(|_| self.head_bias == HeadBias::Trained).map(|head| head.bias)
    }

    /// Reduces every factor's gradient to its trained part: for an adapter with a frozen half, the first half of the rank.
    ///
    /// # Errors
    /// If a gradient is not a matrix.
    pub fn without_frozen(&self, mut gradients: Gradients) -> Result<Gradients> {
        if self.view().frozen_half() {
            for g in gradients.layers.iter_mut().flatten().chain(&mut gradients.outer).flatten() {
                (g.a, g.b) = (self.trained(g.a.host()?, 0)?.into(), self.trained(g.b.host()?, 1)?.into());
            }
        }
        Ok(gradients)
    }

    /// Gradients in the flat order of [`Self::parameters`], after [`Self::without_frozen`].
    ///
    /// # Errors
    /// If a gradient lies on a device, a parameter has no gradient, a gradient has no parameter, or a shape differs; the
    /// message names the tensor.
    /// The gradient of a fixed bias is ignored, because the backward pass of a head always returns one.
    pub fn flat_gradients<'g>(&self, gradients: &'g Gradients) -> Result<Vec<&'g Tensor>> {
        let adapter = self.view();
        anyhow::ensure!(
            gradients.layers.len() == adapter.layers().len(),
            "gradients of {} layers for an adapter of {}",
            gradients.layers.len(),
            adapter.layers().len()
        );
        let mut flat = Vec::new();
        let mut take = |dims: &[usize], gradient: Option<&'g Tensor>, name: String| -> Result<()> {
            let gradient = gradient.with_context(|| format!("{name} got no gradient from the backward pass"))?;
            check_tensor(gradient, dims, &format!("the gradient of {name}"))?;
            flat.push(gradient);
            Ok(())
        };
        let shapes = adapter.shapes();
        let places = (0..shapes.layers)
            .flat_map(|layer| (0..MAX_LINEARS).map(move |linear| TargetModule::Block { layer, linear }));
        for slot in places.chain(NonBlockModule::ALL.map(TargetModule::NonBlockModule)) {
            let grads = gradients.at(slot);
            let Some(pair) = adapter.at(slot) else {
                anyhow::ensure!(grads.is_none(), "a gradient for {slot:?}, which has no branch");
                continue;
            };
            let ((r, in_features), (out, _)) = (pair.a.dims2()?, pair.b.dims2()?);
            let r = if adapter.frozen_half() { r / 2 } else { r };
            let name = |factor| factor_name(shapes, slot, factor);
            let host = |gradient: Option<&'g Array>| gradient.map(Array::host).transpose();
            take(&[r, in_features], host(grads.map(|g| &g.a))?, name(Factor::A))?;
            take(&[out, r], host(grads.map(|g| &g.b))?, name(Factor::B))?;
            if pair.magnitude.is_some() {
                take(&[out], host(grads.and_then(|g| g.magnitude.as_ref()))?, name(Factor::Magnitude))?;
            }
        }
        match adapter.head() {
            Some(head) => take(head.weight.dims(), gradients.head_weight.as_ref(), HEAD_WEIGHT.to_string())?,
            None => anyhow::ensure!(gradients.head_weight.is_none(), "a gradient for {HEAD_WEIGHT}: there is no head"),
        }
        if self.trained_bias().is_some() {
            let gradient = gradients.head_bias.as_ref().with_context(|| format!("{HEAD_BIAS} got no gradient"))?;
            check_tensor(gradient, &[1], &format!("the gradient of {HEAD_BIAS}"))?;
            flat.push(gradient);
        }
        Ok(flat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::{BranchGradient, LinearShapes, LoraConfig, TargetModules};

    const Q: usize = 0;
    const SHAPES: LinearShapes = LinearShapes::llama(3, 64, 96, 32, 128);

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

    fn ones(adapter: &Adapter, factor: f64) -> Gradients {
        let like = |t: &Tensor| (t.ones_like().unwrap() * factor).unwrap();
        Gradients {
            layers: adapter
                .layers()
                .iter()
                .map(|row| std::array::from_fn(|i| row[i].as_ref().map(|p| (like(&p.a), like(&p.b)).into())))
                .collect(),
            outer: Default::default(),
            head_weight: adapter.head().map(|h| like(&h.weight)),
            head_bias: adapter.head().map(|_| Tensor::new(&[factor as f32], &Device::Cpu).unwrap()),
        }
    }

    #[test]
    fn gradients_are_summed_and_scaled_in_the_order_of_the_parameters() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap().with_head(1).unwrap();
        let mut sum = Gradients::none(3);
        sum.add(ones(&adapter, 1.0)).unwrap();
        sum.add(ones(&adapter, 2.0)).unwrap();
        sum.scale(0.5).unwrap();
        let learner = adapter.to_trainable();
        let flat = learner.flat_gradients(&sum).unwrap();
        assert_eq!(flat.len(), learner.parameters().unwrap().len(), "a fixed bias is not a parameter");
        for (gradient, parameter) in flat.iter().zip(learner.parameters().unwrap()) {
            assert_eq!(gradient.dims(), parameter.dims());
            assert!(values(gradient).iter().all(|&g| g == 1.5));
        }
        let learner = learner.with_head_bias(HeadBias::Trained).unwrap();
        assert_eq!(learner.flat_gradients(&sum).unwrap().len(), learner.names().len());
    }

    #[test]
    fn missing_surplus_and_misshapen_gradients_are_refused_by_name() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap().with_head(1).unwrap();
        let learner = adapter.to_trainable();
        let refusal = |gradients: &Gradients| learner.flat_gradients(gradients).unwrap_err().to_string();
        let mut g = ones(&adapter, 1.0);
        g.layers[1][SHAPES.index_of("up_proj").unwrap()] = None;
        assert!(refusal(&g).contains("layers.1.mlp.up_proj.lora_A"), "{}", refusal(&g));
        let mut g = ones(&adapter, 1.0);
        g.head_weight = None;
        assert!(refusal(&g).contains("score.weight"));
        let mut g = ones(&adapter, 1.0);
        let BranchGradient { a, b, .. } = g.layers[0][0].take().unwrap();
        g.layers[0][0] = Some(BranchGradient { a: b, b: a, magnitude: None });
        assert!(refusal(&g).contains("layers.0.self_attn.q_proj.lora_A"));
        let headless = Adapter::init(config(), SHAPES, 3).unwrap().to_trainable();
        assert!(headless.flat_gradients(&ones(&adapter, 1.0)).is_err());
        assert!(headless.with_head_bias(HeadBias::Trained).is_err());
    }

    #[test]
    fn snapshot_and_source_do_not_change_when_the_learner_steps() {
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
    fn refused_parameters_change_nothing() {
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
}
