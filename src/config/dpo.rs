//! The sections of preference optimisation without a reward model: `[dpo]` and `[kto]`. Names and defaults are those of
//! TRL's DPOConfig and KTOConfig (1.16) where no other source is given. Read validate.rs next.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::LrScheduler;
use super::validate::Section;
use crate::config::RecomputeSetting;
use crate::invalid;

/// How a pair of answers is compared. With h = the log-ratio to the reference of the chosen answer less that of the
/// rejected one, and s = label_smoothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DpoLoss {
    /// `-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)`: DPO, with s > 0 conservative DPO, arXiv:2305.18290.
    #[default]
    Sigmoid,
    /// `(-(1 - s) log sigmoid(beta h) + s log sigmoid(-beta h)) / (1 - 2 s)`: unbiased where a share s of the labels is
    /// wrong, arXiv:2403.00409.
    Robust,
    /// `(h' - 1 / (2 beta))²`, h' with log-ratios per token, as TRL has it: arXiv:2310.12036.
    Ipo,
    /// `max(0, 1 - beta h)`: arXiv:2305.10425.
    Hinge,
}

/// `[dpo]`: direct preference optimisation of the policy's adapter on comparisons.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dpo {
    /// The SFT adapter (folder, PEFT layout): training starts from it and the reference stays it. Absent = the bare base
    /// is the reference and training starts from a fresh adapter shaped by `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Loss of a pair. Default `sigmoid`.
    pub loss_type: DpoLoss,
    /// Share of the labels taken to be wrong, for `sigmoid` and `robust`. Default 0.
    pub label_smoothing: f64,
    /// How dear it is to leave the reference; IPO's tau. Default 0.1.
    pub beta: f64,
    /// Compute the reference's log-probabilities once, before training, rather than in every step: less work from the
    /// second epoch on, and 8 bytes an answer. Changes no number. Default false.
    pub precompute_ref_log_probs: bool,
    /// Peak learning rate. Default 1e-5: ten times TRL's 1e-6, since only low-rank factors move.
    pub learning_rate: f64,
    /// Passes over the training comparisons. Default 1 (TRL: 3).
    pub num_train_epochs: usize,
    /// Comparisons of one forward and backward pass, each with all its answers. Default 8.
    pub per_device_train_batch_size: usize,
    /// Passes summed into one optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Optimizer steps over which the learning rate rises from 0. Default 0.
    pub warmup_steps: usize,
    /// Course of the learning rate after the warm-up. Default `linear`.
    pub lr_scheduler_type: LrScheduler,
    /// AdamW's decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment. Default 0.9.
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment. Default 0.999.
    pub adam_beta2: f64,
    /// AdamW's term in the denominator. Default 1e-8.
    pub adam_epsilon: f64,
    /// Largest norm of an optimizer step's gradient; 0 = no clipping. Default 1.0.
    pub max_grad_norm: f64,
    /// What a block keeps for the backward pass. Default `auto`.
    pub checkpoint: RecomputeSetting,
    /// Optimizer steps between two log lines. Default 1.
    pub logging_steps: usize,
    /// Optimizer steps between two evaluations; 0 = only after training. Default 0.
    pub eval_steps: usize,
}

impl Default for Dpo {
    fn default() -> Self {
        Self {
            adapter: None,
            loss_type: DpoLoss::Sigmoid,
            label_smoothing: 0.0,
            beta: 0.1,
            precompute_ref_log_probs: false,
            learning_rate: 1e-5,
            num_train_epochs: 1,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            warmup_steps: 0,
            lr_scheduler_type: LrScheduler::Linear,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            checkpoint: RecomputeSetting::Auto,
            logging_steps: 1,
            eval_steps: 0,
        }
    }
}

impl Dpo {
    /// Ranges, and rules between keys.
    pub(super) fn check(&self) -> Result<()> {
        let check = Section("dpo");
        let betas = [self.adam_beta1, self.adam_beta2];
        check.optimizer(self.learning_rate, self.weight_decay, betas, self.adam_epsilon, self.max_grad_norm)?;
        check.at_least_one("num_train_epochs", self.num_train_epochs)?;
        check.at_least_one("per_device_train_batch_size", self.per_device_train_batch_size)?;
        check.at_least_one("gradient_accumulation_steps", self.gradient_accumulation_steps)?;
        check.at_least_one("logging_steps", self.logging_steps)?;
        check.positive("beta", self.beta, "0.01 to 0.5")?;
        let share = "a share from 0 to below 0.5, usually 0 to 0.2";
        check.within("label_smoothing", self.label_smoothing, |s| (0.0..0.5).contains(&s), share)?;
        match self.loss_type {
            DpoLoss::Ipo | DpoLoss::Hinge if self.label_smoothing > 0.0 => Err(invalid!(
                "[dpo] label_smoothing = {} has no meaning for this loss_type; use \"sigmoid\" or \"robust\", or leave it out",
                self.label_smoothing
            )),
            _ => Ok(()),
        }
    }
}

/// `[kto]`: Kahneman-Tversky optimisation of the policy's adapter on answers judged good or bad, arXiv:2402.01306.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kto {
    /// The SFT adapter (folder, PEFT layout): training starts from it and the reference stays it. Absent = the bare base
    /// is the reference and training starts from a fresh adapter shaped by `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// How dear it is to leave the reference. Default 0.1.
    pub beta: f64,
    /// Weight of the losses of good answers. Where good and bad are not equally many, the paper wants the weights so that
    /// weight times count of one kind is 1 to 4/3 times the other's. Default 1.0.
    pub desirable_weight: f64,
    /// Weight of the losses of bad answers. Default 1.0.
    pub undesirable_weight: f64,
    /// Compute the reference's log-probabilities once, before training. Those of the KL term's mismatched pairs come
    /// with every step all the same: the pairs change with the shuffle. Changes no number. Default false.
    pub precompute_ref_log_probs: bool,
    /// Peak learning rate. Default 1e-5: ten times TRL's 1e-6, since only low-rank factors move.
    pub learning_rate: f64,
    /// Passes over the training records. Default 1 (TRL: 3).
    pub num_train_epochs: usize,
    /// Answers of one forward and backward pass. Bounds the memory, changes no result: the KL term is over the whole
    /// optimizer step, which must hold two or more. Default 8.
    pub per_device_train_batch_size: usize,
    /// Passes summed into one optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Optimizer steps over which the learning rate rises from 0. Default 0.
    pub warmup_steps: usize,
    /// Course of the learning rate after the warm-up. Default `linear`.
    pub lr_scheduler_type: LrScheduler,
    /// AdamW's decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment. Default 0.9.
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment. Default 0.999.
    pub adam_beta2: f64,
    /// AdamW's term in the denominator. Default 1e-8.
    pub adam_epsilon: f64,
    /// Largest norm of an optimizer step's gradient; 0 = no clipping. Default 1.0.
    pub max_grad_norm: f64,
    /// What a block keeps for the backward pass. Default `auto`.
    pub checkpoint: RecomputeSetting,
    /// Optimizer steps between two log lines. Default 1.
    pub logging_steps: usize,
    /// Optimizer steps between two evaluations; 0 = only after training. Default 0.
    pub eval_steps: usize,
}

impl Default for Kto {
    fn default() -> Self {
        Self {
            adapter: None,
            beta: 0.1,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
            precompute_ref_log_probs: false,
            learning_rate: 1e-5,
            num_train_epochs: 1,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            warmup_steps: 0,
            lr_scheduler_type: LrScheduler::Linear,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            checkpoint: RecomputeSetting::Auto,
            logging_steps: 1,
            eval_steps: 0,
        }
    }
}

impl Kto {
    /// Ranges, and rules between keys.
    pub(super) fn check(&self) -> Result<()> {
        let check = Section("kto");
        let betas = [self.adam_beta1, self.adam_beta2];
        check.optimizer(self.learning_rate, self.weight_decay, betas, self.adam_epsilon, self.max_grad_norm)?;
        check.at_least_one("num_train_epochs", self.num_train_epochs)?;
        check.at_least_one("per_device_train_batch_size", self.per_device_train_batch_size)?;
        check.at_least_one("gradient_accumulation_steps", self.gradient_accumulation_steps)?;
        check.at_least_one("logging_steps", self.logging_steps)?;
        check.positive("beta", self.beta, "0.01 to 0.5")?;
        check.not_negative("desirable_weight", self.desirable_weight)?;
        check.not_negative("undesirable_weight", self.undesirable_weight)?;
        if self.desirable_weight == 0.0 && self.undesirable_weight == 0.0 {
            return Err(invalid!("[kto] desirable_weight and undesirable_weight are both 0; give one a weight"));
        }
        if self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps) < 2 {
            return Err(invalid!(
                "[kto] an optimizer step of one answer has no other answer to estimate its KL term from; raise \
                 per_device_train_batch_size or gradient_accumulation_steps"
            ));
        }
        Ok(())
    }
}
