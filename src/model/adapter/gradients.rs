//! The gradients of an adapter: summed over micro-batches, then laid out flat in the parameters' order, where a
//! missing one is an error. Knows no backward pass and no optimizer. Read train/adamw.rs next.

use anyhow::{Context, Result};
use candle_core::Tensor;

use crate::model::adapter::targets::MAX_LINEARS;
use crate::model::adapter::{
    Factor, HEAD_BIAS, HEAD_WEIGHT, NonBlockModule, TargetModule, TrainableAdapter, check_tensor, factor_name,
};
pub use crate::ops::linear::BranchGradient;

/// Gradients in an adapter's layout. What is `None` counts as zero in a sum; [`TrainableAdapter::flat_gradients`]
/// refuses it when it comes to the step.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// Of each branch, indexed like `Adapter::layers`.
    pub layers: Vec<[Option<BranchGradient>; MAX_LINEARS]>,
    /// Of those outside of the blocks, by [`NonBlockModule`].
    pub outer: [Option<BranchGradient>; 4],
    /// (1, D) f32.
    pub head_weight: Option<Tensor>,
    /// (1,) f32.
    pub head_bias: Option<Tensor>,
}

impl Gradients {
    /// Nothing yet, for `layers` blocks.
    pub fn none(layers: usize) -> Self {
        Self { layers: (0..layers).map(|_| Default::default()).collect(), ..Self::default() }
    }

    /// Adds another micro-batch's gradients.
    ///
    /// # Errors
    /// If the layers or a shape differ.
    pub fn add(&mut self, other: Self) -> Result<()> {
        let (have, more) = (self.layers.len(), other.layers.len());
        anyhow::ensure!(have == more, "gradients of {have} and of {more} layers cannot be added");
        let theirs = other.layers.into_iter().flatten().chain(other.outer);
        for (mine, theirs) in self.layers.iter_mut().flatten().chain(&mut self.outer).zip(theirs) {
            *mine = sum(mine.take(), theirs)?;
        }
        for (mine, theirs) in [(&mut self.head_weight, other.head_weight), (&mut self.head_bias, other.head_bias)] {
            *mine = match (mine.take(), theirs) {
                (Some(one), Some(more)) => Some((one + more)?),
                (one, other) => one.or(other),
            };
        }
        Ok(())
    }

    /// Multiplies every gradient.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn scale(&mut self, factor: f64) -> Result<()> {
        let branches = self.layers.iter_mut().flatten().chain(&mut self.outer).flatten();
        let tensors = branches.flat_map(|g| [Some(&mut g.a), Some(&mut g.b), g.magnitude.as_mut()]).flatten();
        for gradient in tensors.chain(&mut self.head_weight).chain(&mut self.head_bias) {
            *gradient = (&*gradient * factor)?;
        }
        Ok(())
    }

    /// That of the branch at a place.
    pub fn at(&self, slot: TargetModule) -> Option<&BranchGradient> {
        match slot {
            TargetModule::Block { layer, linear } => self.layers.get(layer)?.get(linear)?.as_ref(),
            TargetModule::NonBlockModule(outer) => self.outer[outer as usize].as_ref(),
        }
    }
}

/// What is `None` counts as zero.
pub(crate) fn sum(one: Option<BranchGradient>, other: Option<BranchGradient>) -> Result<Option<BranchGradient>> {
    Ok(match (one, other) {
        (Some(one), Some(other)) => Some(BranchGradient {
            a: (one.a + other.a)?,
            b: (one.b + other.b)?,
            magnitude: match (one.magnitude, other.magnitude) {
                (Some(m), Some(more)) => Some((m + more)?),
                (one, other) => one.or(other),
            },
        }),
        (one, other) => one.or(other),
    })
}

impl TrainableAdapter {
    /// Leaves of every factor's gradient only what trains: for an adapter with a frozen half, the first half of the rank.
    ///
    /// # Errors
    /// If a gradient is no matrix.
    pub fn without_frozen(&self, mut gradients: Gradients) -> Result<Gradients> {
        if self.view().frozen_half() {
            for g in gradients.layers.iter_mut().flatten().chain(&mut gradients.outer).flatten() {
                (g.a, g.b) = (self.trained(&g.a, 0)?, self.trained(&g.b, 1)?);
            }
        }
        Ok(gradients)
    }

    /// The gradients in flat order, after [`Self::without_frozen`].
    ///
    /// # Errors
    /// If a parameter has no gradient, a gradient has no parameter, or a shape differs; the message names the tensor.
    /// A gradient for a fixed bias is left out, because every backward of a head has one.
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
            let gradient =
                gradient.with_context(|| format!("{name} got no gradient: the backward pass left it out"))?;
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
            let ((r, inp), (out, _)) = (pair.a.dims2()?, pair.b.dims2()?);
            let r = if adapter.frozen_half() { r / 2 } else { r };
            let name = |factor| factor_name(shapes, slot, factor);
            take(&[r, inp], grads.map(|g| &g.a), name(Factor::A))?;
            take(&[out, r], grads.map(|g| &g.b), name(Factor::B))?;
            if pair.magnitude.is_some() {
                take(&[out], grads.and_then(|g| g.magnitude.as_ref()), name(Factor::Magnitude))?;
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
    use candle_core::Device;

    use super::*;
    use crate::model::adapter::{Adapter, HeadBias, LinearShapes, LoraConfig, TargetModules};

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
    fn gradients_add_up_and_scale_in_the_parameters_order() {
        let adapter = Adapter::init(config(), SHAPES, 3).unwrap().with_head(1).unwrap();
        let mut sum = Gradients::none(3);
        sum.add(ones(&adapter, 1.0)).unwrap();
        sum.add(ones(&adapter, 2.0)).unwrap();
        sum.scale(0.5).unwrap();
        let learner = adapter.to_trainable();
        let flat = learner.flat_gradients(&sum).unwrap();
        assert_eq!(flat.len(), learner.parameters().unwrap().len(), "a fixed bias has no place");
        for (gradient, parameter) in flat.iter().zip(learner.parameters().unwrap()) {
            assert_eq!(gradient.dims(), parameter.dims());
            assert!(values(gradient).iter().all(|&g| g == 1.5));
        }
        let learner = learner.with_head_bias(HeadBias::Trained).unwrap();
        assert_eq!(learner.flat_gradients(&sum).unwrap().len(), learner.names().len());
    }

    #[test]
    fn a_missing_a_surplus_and_a_misshapen_gradient_are_named() {
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
        g.layers[0][0] = Some((b, a).into());
        assert!(refusal(&g).contains("layers.0.self_attn.q_proj.lora_A"));
        let headless = Adapter::init(config(), SHAPES, 3).unwrap().to_trainable();
        assert!(headless.flat_gradients(&ones(&adapter, 1.0)).is_err());
        assert!(headless.with_head_bias(HeadBias::Trained).is_err());
    }
}
