//! Roles are views: a policy (actor, reference) and a scorer (critic, reward) of a base through an adapter. Nothing is
//! switched on or off; a view borrows its adapter, so it cannot outlive a step. Read generate.rs next.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::adapter::{Adapter, Gradients};
use super::base::{Base, scatter_rows, select_rows};
use super::batch::{Batch, Targets};
use crate::invalid;
use crate::model::adapter::NonBlockModule;
use crate::model::adapter::gradients::sum;
use crate::model::block::Recompute;
use crate::ops::cpu;
use crate::ops::kl;
use crate::ops::kl::Side;
use crate::ops::logprobs;
use crate::ops::logprobs::TokenStats;

/// What a loss over tokens asks to be carried back: its derivatives, (R) each.
#[derive(Clone, Debug, Default)]
pub struct HeadGradients {
    /// By the targets' log-probabilities.
    pub logprobs: Vec<f32>,
    /// By the entropies.
    pub entropy: Vec<f32>,
    /// By the exact KLs, where they count.
    pub kl: Option<Vec<f32>>,
}

/// A language model: the base, or the base with an adapter's branches.
#[derive(Clone, Copy)]
pub struct Policy<'w> {
    base: &'w Base,
    adapter: Option<&'w Adapter>,
}

impl<'w> Policy<'w> {
    /// `None` is the bare base.
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

    /// Hidden states (R, D) that the targets are predicted from.
    ///
    /// # Errors
    /// As for [`Policy::logprobs`].
    pub fn rows(&self, batch: &Batch, targets: &Targets) -> Result<Tensor> {
        let hidden = self.base.hidden(batch, self.adapter)?;
        Ok(select_rows(&hidden, &targets.rows)?)
    }

    /// [`Policy::logprobs`] of what [`Policy::rows`] gave.
    ///
    /// # Errors
    /// If the rows are not those of the targets.
    pub fn logprobs_of(&self, rows: &Tensor, targets: &Targets, temperature: f64) -> Result<TokenStats> {
        Ok(logprobs::forward(rows, &self.base.table(self.adapter), &targets.tokens, temperature)?)
    }

    fn side<'a>(&'a self, hidden: &'a Tensor) -> Side<'a> {
        Side { hidden, table: self.base.table(self.adapter) }
    }

    /// Exact KL (R), nats, from this policy with hidden states `rows` (R, D) to `other` with its own, over the same base.
    ///
    /// # Errors
    /// If shapes differ, or the bases.
    pub fn divergence(&self, rows: &Tensor, other: (Policy<'_>, &Tensor), temperature: f64) -> Result<Vec<f32>> {
        Ok(kl::forward(self.side(rows), other.0.side(other.1), temperature)?.kl)
    }

    /// One forward and backward: `loss` sees the targets' statistics and returns dL/dlogp and dL/dentropy, (R) each.
    ///
    /// # Errors
    /// As for [`Policy::logprobs`]; if the policy has no adapter; what `loss` returns.
    pub fn gradients(
        &self,
        batch: &Batch,
        targets: &Targets,
        temperature: f64,
        checkpoint: Recompute,
        loss: impl FnOnce(&TokenStats) -> Result<(Vec<f32>, Vec<f32>)>,
    ) -> Result<(TokenStats, Gradients)> {
        self.gradients_against(batch, targets, None, temperature, checkpoint, |stats, _| {
            let (logprobs, entropy) = loss(stats)?;
            Ok(HeadGradients { logprobs, entropy, kl: None })
        })
    }

    /// As [`Policy::gradients`], where the loss may read the exact KL (R) to another policy of this base, too, which is
    /// given with its hidden states (R, D); without it it sees none.
    ///
    /// # Errors
    /// As for [`Policy::gradients`]; if there is a gradient by a KL and no other policy.
    pub fn gradients_against(
        &self,
        batch: &Batch,
        targets: &Targets,
        other: Option<(Policy<'_>, &Tensor)>,
        temperature: f64,
        checkpoint: Recompute,
        loss: impl FnOnce(&TokenStats, &[f32]) -> Result<HeadGradients>,
    ) -> Result<(TokenStats, Gradients)> {
        let adapter = self.adapter.context("a bare base has nothing to train")?;
        let (hidden, tape) = self.base.hidden_kept(batch, adapter, checkpoint)?;
        let rows = select_rows(&hidden, &targets.rows)?;
        let (n, _) = hidden.dims2()?;
        drop(hidden);
        let output = &self.base.table(self.adapter);
        let stats = logprobs::forward(&rows, output, &targets.tokens, temperature)?;
        let kept = match &other {
            Some((policy, theirs)) => Some(kl::forward(self.side(&rows), policy.side(theirs), temperature)?),
            None => None,
        };
        let d = loss(&stats, kept.as_ref().map_or(&[], |kept| &kept.kl))?;
        let logprobs::Gradients { hidden: mut d_rows, mut branch } =
            logprobs::backward(&rows, output, &targets.tokens, temperature, &stats, &d.logprobs, &d.entropy)?;
        if let Some(dkl) = &d.kl {
            let ((policy, theirs), kept) =
                other.as_ref().zip(kept.as_ref()).context("a KL's gradient needs the other policy")?;
            let more = kl::backward(self.side(&rows), policy.side(theirs), temperature, kept, dkl)?;
            d_rows = (d_rows + more.hidden)?;
            branch = sum(branch, more.branch)?;
        }
        drop((rows, kept));
        let dh = scatter_rows(&d_rows, &targets.rows, n)?;
        drop(d_rows);
        let mut grads = self.base.backward(batch, adapter, tape, dh)?;
        grads.outer[NonBlockModule::Head as usize] = branch;
        Ok((stats, grads))
    }
}

/// A base with an adapter and its scalar head: value(row) = w . h + b.
#[derive(Clone, Copy)]
pub struct ValueModel<'w> {
    base: &'w Base,
    adapter: &'w Adapter,
}

impl<'w> ValueModel<'w> {
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

    fn values_of(&self, rows: &Tensor) -> Result<Vec<f32>> {
        let head = self.adapter.head().context("checked in new")?;
        let (_, d) = rows.dims2()?;
        let (h, w) = (cpu::view(rows)?, cpu::view(&head.weight)?);
        Ok(h.chunks_exact(d).map(|h| cpu::dot_plain(h, &w) + head.bias).collect())
    }

    /// Values (R) at the rows `rows` of the batch.
    ///
    /// # Errors
    /// If the adapter is another base's, a sequence is longer than the context, or a row does not exist.
    pub fn values(&self, batch: &Batch, rows: &[usize]) -> Result<Vec<f32>> {
        let hidden = self.base.hidden(batch, Some(self.adapter))?;
        self.values_of(&select_rows(&hidden, rows)?)
    }

    /// Scores (S): the value at each sequence's last token.
    ///
    /// # Errors
    /// As for [`ValueModel::values`].
    pub fn scores(&self, batch: &Batch) -> Result<Vec<f32>> {
        self.values(batch, &batch.last_rows())
    }

    /// One forward and backward: `loss` sees the values (R) at `rows` and returns dL/dvalue (R).
    ///
    /// # Errors
    /// As for [`ValueModel::values`]; what `loss` returns.
    pub fn gradients(
        &self,
        batch: &Batch,
        rows: &[usize],
        checkpoint: Recompute,
        loss: impl FnOnce(&[f32]) -> Result<Vec<f32>>,
    ) -> Result<(Vec<f32>, Gradients)> {
        let head = self.adapter.head().context("checked in new")?;
        if self.adapter.outer(NonBlockModule::Head).is_some() {
            return Err(invalid!(
                "this adapter has a branch on the output table, which a score does not read, so it cannot train here; \
                 leave {} out of target_modules",
                self.base.shapes().outer(NonBlockModule::Head).map_or("lm_head", |map| map.path)
            ));
        }
        let (hidden, tape) = self.base.hidden_kept(batch, self.adapter, checkpoint)?;
        let (n, d) = hidden.dims2()?;
        let picked = select_rows(&hidden, rows)?;
        drop(hidden);
        let values = self.values_of(&picked)?;
        let dvalues = loss(&values)?;
        anyhow::ensure!(dvalues.len() == values.len(), "{} gradients for {} values", dvalues.len(), values.len());
        // value = w . h + b
        let (mut dw, mut db) = (vec![0f64; d], 0f64);
        let mut d_rows = Vec::with_capacity(rows.len() * d);
        {
            let (h, w) = (cpu::view(&picked)?, cpu::view(&head.weight)?);
            for (h, &dv) in h.chunks_exact(d).zip(&dvalues) {
                db += f64::from(dv);
                for (dw, &h) in dw.iter_mut().zip(h) {
                    *dw += f64::from(dv) * f64::from(h);
                }
                d_rows.extend(w.iter().map(|w| w * dv));
            }
        }
        drop(picked);
        let dh = scatter_rows(&cpu::tensor(d_rows, (rows.len(), d))?, rows, n)?;
        let mut grads = self.base.backward(batch, self.adapter, tape, dh)?;
        grads.head_weight = Some(cpu::tensor(dw.into_iter().map(|v| v as f32).collect(), (1, d))?);
        grads.head_bias = Some(cpu::tensor(vec![db as f32], 1)?);
        Ok((values, grads))
    }
}
