//! An adapter under training: the only weights of the program that can change, as one flat list of parameters. Knows no
//! optimizer. Read adapter.rs first, gradients.rs beside.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use crate::invalid;
use crate::model::adapter::{Adapter, HEAD_BIAS, check_tensor};

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
    pub(crate) fn of(adapter: Adapter) -> Self {
        Self { adapter, head_bias: HeadBias::Fixed }
    }

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
        // All are made before any is put in its place.
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

    /// The part of a factor, or of its gradient, that trains: all of it, or the first half of the rank.
    pub(crate) fn trained(&self, factor: &Tensor, rank_dim: usize) -> Result<Tensor> {
        Ok(match self.adapter.frozen_half {
            true => factor.narrow(rank_dim, 0, factor.dims()[rank_dim] / 2)?.contiguous()?,
            false => factor.clone(),
        })
    }

    pub(crate) fn trained_bias(&self) -> Option<f32> {
        self.adapter.head.as_ref().filter(|_| self.head_bias == HeadBias::Trained).map(|head| head.bias)
    }
}
