//! Roles: a policy (actor, reference) and a value model (critic, reward model), both views of a base through an
//! adapter. Nothing is switched on or off, and a view borrows its adapter, so it cannot outlive an optimiser step. It
//! does not depend on losses. Read `generate.rs` next.

use anyhow::{Context, Result};

use crate::device::Array;

use super::adapter::{Adapter, Gradients};
use super::base::Base;
use super::batch::{Batch, Targets};
use super::readers::Reader;
use crate::invalid;
use crate::model::adapter::NonBlockModule;
use crate::model::adapter::gradients::sum;
use crate::model::block::Recompute;
use crate::ops::columns;
use crate::ops::divergence::{self, Divergence};
use crate::ops::kl::{self, Side};
use crate::ops::logprobs::{self, TokenStats};
use crate::ops::rows::{gather_rows, scatter_rows};
use crate::ops::score;

/// The derivatives of a loss over tokens, (R) each.
#[derive(Clone, Debug, Default)]
pub struct HeadGradients {
    /// dL/dlogp of the targets.
    pub logprobs: Vec<f32>,
    /// dL/dH of the entropies.
    pub entropy: Vec<f32>,
    /// dL/dKL of the exact KLs, if the loss depends on them.
    pub kl: Option<Vec<f32>>,
}

impl HeadGradients {
    fn all(&self) -> impl Iterator<Item = &f32> {
        self.logprobs.iter().chain(&self.entropy).chain(self.kl.iter().flatten())
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut f32> {
        self.logprobs.iter_mut().chain(&mut self.entropy).chain(self.kl.iter_mut().flatten())
    }
}

/// A power of two that a loss's derivatives are multiplied by before a backward pass in f16, and its gradients divided by
/// after it. A loss that is a mean over many tokens has derivatives of 1e-7, which f16 would round to zero; a power of
/// two changes no bit of an f32's fraction. What overflows f16 becomes infinite, and the guard skips the step.
struct GradientScale(f32);

impl GradientScale {
    /// The scale that brings the largest of the derivatives to 1 or more and below 2; 1 if all are zero, or one is NaN or
    /// infinite.
    fn of<'a>(derivatives: impl Iterator<Item = &'a f32>) -> Self {
        let (mut largest, mut finite) = (0f32, true);
        for d in derivatives {
            largest = largest.max(d.abs());
            finite &= d.is_finite();
        }
        // The exponent's bits of a normal f32; smaller numbers count as the smallest normal one.
        let exponent = (largest.max(f32::MIN_POSITIVE).to_bits() >> 23) as i32 - 127;
        Self(if finite && largest > 0.0 { 2f32.powi((-exponent).clamp(-126, 126)) } else { 1.0 })
    }

    fn apply<'a>(&self, derivatives: impl Iterator<Item = &'a mut f32>) {
        derivatives.for_each(|d| *d *= self.0);
    }

    fn undo(&self, gradients: &mut Gradients) -> Result<()> {
        if self.0 == 1.0 { Ok(()) } else { gradients.scale(f64::from(self.0).recip()) }
    }
}

/// A language model: the base, or the base with an adapter.
#[derive(Clone, Copy)]
pub struct Policy<'w> {
    base: &'w Base,
    adapter: Option<&'w Adapter>,
}

impl<'w> Policy<'w> {
    /// A policy; without an adapter it is the bare base.
    pub fn new(base: &'w Base, adapter: Option<&'w Adapter>) -> Self {
        Self { base, adapter }
    }

    /// The base.
    pub fn base(&self) -> &'w Base {
        self.base
    }

    /// The adapter.
    pub fn adapter(&self) -> Option<&'w Adapter> {
        self.adapter
    }

    /// Log-probability and entropy (R) of each target, nats, under softmax(logits / temperature).
    ///
    /// # Errors
    /// If the adapter is another base's, or a sequence is longer than the context.
    pub fn logprobs(&self, batch: &Batch, targets: &Targets, temperature: f64) -> Result<TokenStats> {
        self.logprobs_of(&self.rows(batch, targets)?, targets, temperature)
    }

    /// Hidden states (R, D) from which the targets are predicted.
    ///
    /// # Errors
    /// As for [`Policy::logprobs`].
    pub fn rows(&self, batch: &Batch, targets: &Targets) -> Result<Array> {
        let hidden = self.base.hidden(batch, self.adapter)?;
        gather_rows(&hidden, &targets.rows)
    }

    /// This policy as a reader of its base at some rows of a batch.
    pub fn reader<'a>(&self, rows: &'a [usize]) -> Reader<'a>
    where
        'w: 'a,
    {
        Reader { adapter: self.adapter, rows }
    }

    /// As [`Policy::logprobs`], from the result of [`Policy::rows`].
    ///
    /// # Errors
    /// If the number of rows is not that of the targets.
    pub fn logprobs_of(&self, rows: &Array, targets: &Targets, temperature: f64) -> Result<TokenStats> {
        logprobs::forward(rows, &self.base.lm_head(self.adapter), &targets.tokens, temperature)
    }

    fn side<'a>(&'a self, hidden: &'a Array) -> Side<'a> {
        Side { hidden, head: self.base.lm_head(self.adapter) }
    }

    /// Exact KL (R), nats, from this policy with hidden states `rows` (R, D) to another policy of the same base with
    /// its own.
    ///
    /// # Errors
    /// If shapes or bases differ.
    pub fn kl(&self, rows: &Array, other: (Policy<'_>, &Array), temperature: f64) -> Result<Vec<f32>> {
        Ok(kl::forward(self.side(rows), other.0.side(other.1), temperature)?.kl)
    }

    /// One forward and backward pass: `loss` gets the targets' statistics and returns dL/dlogp and dL/dentropy, (R)
    /// each.
    ///
    /// # Errors
    /// As for [`Policy::logprobs`]; if the policy has no adapter; the error of `loss`.
    pub fn gradients(
        &self,
        batch: &Batch,
        targets: &Targets,
        temperature: f64,
        recompute: Recompute,
        loss: impl FnOnce(&TokenStats) -> Result<(Vec<f32>, Vec<f32>)>,
    ) -> Result<(TokenStats, Gradients)> {
        self.gradients_against(batch, targets, None, temperature, recompute, |stats, _| {
            let (logprobs, entropy) = loss(stats)?;
            Ok(HeadGradients { logprobs, entropy, kl: None })
        })
    }

    /// As [`Policy::gradients`], for a loss that may also depend on the exact KL (R) to another policy of this base,
    /// which is given with its hidden states (R, D). Without another policy, `loss` gets an empty slice.
    ///
    /// # Errors
    /// As for [`Policy::gradients`]; if `loss` returns dL/dKL and there is no other policy.
    pub fn gradients_against(
        &self,
        batch: &Batch,
        targets: &Targets,
        other: Option<(Policy<'_>, &Array)>,
        temperature: f64,
        recompute: Recompute,
        loss: impl FnOnce(&TokenStats, &[f32]) -> Result<HeadGradients>,
    ) -> Result<(TokenStats, Gradients)> {
        let adapter = self.adapter.context("a bare base has nothing to train")?;
        let (hidden, tape) = self.base.forward(batch, adapter, recompute)?;
        let rows = gather_rows(&hidden, &targets.rows)?;
        let (n, _) = hidden.dims2()?;
        drop(hidden);
        let head = &self.base.lm_head(self.adapter);
        let stats = logprobs::forward(&rows, head, &targets.tokens, temperature)?;
        let saved = match &other {
            Some((policy, theirs)) => Some(kl::forward(self.side(&rows), policy.side(theirs), temperature)?),
            None => None,
        };
        let mut d = loss(&stats, saved.as_ref().map_or(&[], |saved| &saved.kl))?;
        let scale = self.base.scales_gradients().then(|| GradientScale::of(d.all()));
        if let Some(scale) = &scale {
            scale.apply(d.all_mut());
        }
        let logprobs::Gradients { hidden: mut d_rows, mut lora } =
            logprobs::backward(&rows, head, &targets.tokens, temperature, &stats, &d.logprobs, &d.entropy)?;
        if let Some(dkl) = &d.kl {
            let ((policy, theirs), saved) =
                other.as_ref().zip(saved.as_ref()).context("a KL's gradient needs the other policy")?;
            let more = kl::backward(self.side(&rows), policy.side(theirs), temperature, saved, dkl)?;
            d_rows = columns::add(&d_rows, &more.hidden, 1.0)?;
            lora = sum(lora, more.lora)?;
        }
        drop((rows, saved));
        let dh = scatter_rows(&d_rows, &targets.rows, n)?;
        drop(d_rows);
        let mut grads = self.base.backward(batch, adapter, tape, dh)?;
        grads.outer[NonBlockModule::Head as usize] = lora;
        if let Some(scale) = scale {
            scale.undo(&mut grads)?;
        }
        Ok((stats, grads))
    }
}

/// Distillation: the student's side.
impl Policy<'_> {
    fn divergence_side<'a>(&'a self, hidden: &'a Array) -> divergence::Side<'a> {
        divergence::Side { hidden, head: self.base.lm_head(self.adapter) }
    }

    /// The divergence (R), nats, between this policy with hidden states `rows` (R, D) and a teacher with its own, which may
    /// be of another base with the same tokens.
    ///
    /// # Errors
    /// If shapes do not fit, or the two lie on different machines.
    pub fn divergence(&self, rows: &Array, teacher: (Policy<'_>, &Array), of: Divergence) -> Result<Vec<f32>> {
        Ok(divergence::forward(self.divergence_side(rows), teacher.0.divergence_side(teacher.1), of)?.value)
    }

    /// One forward and backward pass of `weight` times the sum of the divergences to a teacher at the targets' rows. The
    /// teacher is given with its hidden states (R, D). Returns the divergences (R) and the gradients.
    ///
    /// # Errors
    /// As for [`Policy::divergence`]; if the policy has no adapter, or a sequence is longer than the context.
    pub fn divergence_gradients(
        &self,
        batch: &Batch,
        targets: &Targets,
        teacher: (Policy<'_>, &Array),
        of: Divergence,
        recompute: Recompute,
        weight: f32,
    ) -> Result<(Vec<f32>, Gradients)> {
        let adapter = self.adapter.context("a bare base has nothing to train")?;
        let (hidden, tape) = self.base.forward(batch, adapter, recompute)?;
        let rows = gather_rows(&hidden, &targets.rows)?;
        let (n, _) = hidden.dims2()?;
        drop(hidden);
        let (ours, theirs) = (self.divergence_side(&rows), teacher.0.divergence_side(teacher.1));
        let saved = divergence::forward(ours, theirs, of)?;
        let mut d = vec![weight; saved.value.len()];
        let scale = self.base.scales_gradients().then(|| GradientScale::of(d.iter()));
        if let Some(scale) = &scale {
            scale.apply(d.iter_mut());
        }
        let logprobs::Gradients { hidden: d_rows, lora } = divergence::backward(ours, theirs, of, &saved, &d)?;
        drop(rows);
        let dh = scatter_rows(&d_rows, &targets.rows, n)?;
        drop(d_rows);
        let mut grads = self.base.backward(batch, adapter, tape, dh)?;
        grads.outer[NonBlockModule::Head as usize] = lora;
        if let Some(scale) = scale {
            scale.undo(&mut grads)?;
        }
        Ok((saved.value, grads))
    }
}

/// A backbone (base and adapter) with a scalar head: value(row) = w . h + b.
#[derive(Clone, Copy)]
pub struct ValueModel<'w> {
    base: &'w Base,
    adapter: &'w Adapter,
}

impl<'w> ValueModel<'w> {
    /// A value model.
    ///
    /// # Errors
    /// If the adapter has no scalar head.
    pub fn new(base: &'w Base, adapter: &'w Adapter) -> Result<Self> {
        if adapter.head().is_none() {
            return Err(invalid!(
                "this adapter has no scalar head (`base_model.model.score.weight`), so it cannot score; train one with \
                 `fourfold reward`"
            ));
        }
        Ok(Self { base, adapter })
    }

    /// The base.
    pub fn base(&self) -> &'w Base {
        self.base
    }

    /// Whether both are the same base through the same adapter.
    pub fn is_same(&self, other: &ValueModel<'_>) -> bool {
        std::ptr::eq(self.base, other.base) && std::ptr::eq(self.adapter, other.adapter)
    }

    /// This model as a reader of its base at some rows of a batch.
    pub fn reader<'a>(&self, rows: &'a [usize]) -> Reader<'a>
    where
        'w: 'a,
    {
        Reader { adapter: Some(self.adapter), rows }
    }

    /// Values (R) of hidden states (R, D).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn values_of(&self, rows: &Array) -> Result<Vec<f32>> {
        let head = self.adapter.head().context("checked in new")?;
        score::forward(rows, &head.weight, head.bias)
    }

    /// Values (R) at the rows `rows` of the batch.
    ///
    /// # Errors
    /// If the adapter is another base's, a sequence is longer than the context, or a row does not exist.
    pub fn values(&self, batch: &Batch, rows: &[usize]) -> Result<Vec<f32>> {
        let hidden = self.base.hidden(batch, Some(self.adapter))?;
        self.values_of(&gather_rows(&hidden, rows)?)
    }

    /// Scores (S): the value at each sequence's last token.
    ///
    /// # Errors
    /// As for [`ValueModel::values`].
    pub fn scores(&self, batch: &Batch) -> Result<Vec<f32>> {
        self.values(batch, &batch.last_rows())
    }

    /// One forward and backward pass: `loss` gets the values (R) at `rows` and returns dL/dvalue (R).
    ///
    /// # Errors
    /// As for [`ValueModel::values`]; the error of `loss`.
    pub fn gradients(
        &self,
        batch: &Batch,
        rows: &[usize],
        recompute: Recompute,
        loss: impl FnOnce(&[f32]) -> Result<Vec<f32>>,
    ) -> Result<(Vec<f32>, Gradients)> {
        let head = self.adapter.head().context("checked in new")?;
        if self.adapter.outer(NonBlockModule::Head).is_some() {
            return Err(invalid!(
                "this adapter has LoRA weights on the lm_head, which a score does not depend on, so they cannot be \
                 trained here; leave {} out of target_modules",
                self.base.shapes().outer(NonBlockModule::Head).map_or("lm_head", |map| map.path)
            ));
        }
        let (hidden, tape) = self.base.forward(batch, self.adapter, recompute)?;
        let (n, _) = hidden.dims2()?;
        let picked = gather_rows(&hidden, rows)?;
        drop(hidden);
        let values = self.values_of(&picked)?;
        let mut dvalues = loss(&values)?;
        anyhow::ensure!(dvalues.len() == values.len(), "{} gradients for {} values", dvalues.len(), values.len());
        let scale = self.base.scales_gradients().then(|| GradientScale::of(dvalues.iter()));
        if let Some(scale) = &scale {
            scale.apply(dvalues.iter_mut());
        }
        let score::Gradients { hidden: d_rows, weight, bias } = score::backward(&picked, &head.weight, &dvalues)?;
        drop(picked);
        let dh = scatter_rows(&d_rows, rows, n)?;
        drop(d_rows);
        let mut grads = self.base.backward(batch, self.adapter, tape, dh)?;
        grads.head_weight = Some(weight);
        grads.head_bias = Some(bias);
        if let Some(scale) = scale {
            scale.undo(&mut grads)?;
        }
        Ok((values, grads))
    }
}
