//! The sections `[dpo]` and `[kto]`: preference optimisation without a reward model.
//!
//! Names and defaults are those of TRL's DPOConfig and KTOConfig (1.16) where no other source is given. Read
//! `validate.rs` next.

use std::path::PathBuf;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::optimisation::{optimised_section, supervised_section};
use crate::invalid;

/// How a pair of responses is compared. With h = the log-ratio to the reference of the chosen response less that of the
/// rejected one, and s = label_smoothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
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

supervised_section! {
    /// `[dpo]`: direct preference optimisation of the policy's adapter on comparisons.
    pub struct Dpo;
    first {
        /// The SFT adapter (folder, PEFT layout): training starts from it and the reference stays it. Absent = the bare
        /// base is the reference and training starts from a fresh adapter shaped by `[lora]`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adapter: Option<PathBuf> = None,
        /// Loss of a pair. Default `sigmoid`.
        pub loss_type: DpoLoss = DpoLoss::Sigmoid,
        /// Assumed share of wrong labels, for `sigmoid` and `robust`. Default 0.
        pub label_smoothing: f64 = 0.0,
        /// Strength of the penalty for leaving the reference; IPO's tau. Default 0.1.
        pub beta: f64 = 0.1,
        /// Compute the reference's log-probabilities once, before training, rather than in every step: less work from
        /// the second epoch on, for 8 bytes per response. It does not change a result. Default false.
        pub precompute_ref_log_probs: bool = false,
    }
    /// Peak learning rate. Default 1e-5: ten times TRL's 1e-6, since only low-rank factors are trained.
    learning_rate = 1e-5;
    batch {}
    after_norm {}
}

impl Dpo {
    /// Rules between keys.
    pub(super) fn check(&self) -> Result<()> {
        match self.loss_type {
            DpoLoss::Ipo | DpoLoss::Hinge if self.label_smoothing > 0.0 => Err(invalid!(
                "[dpo] label_smoothing = {} has no meaning for this loss_type; use \"sigmoid\" or \"robust\", or leave it out",
                self.label_smoothing
            )),
            _ => Ok(()),
        }
    }
}

supervised_section! {
    /// `[kto]`: Kahneman-Tversky optimisation of the policy's adapter on responses judged good or bad,
    /// arXiv:2402.01306.
    pub struct Kto;
    first {
        /// The SFT adapter (folder, PEFT layout): training starts from it and the reference stays it. Absent = the bare
        /// base is the reference and training starts from a fresh adapter shaped by `[lora]`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adapter: Option<PathBuf> = None,
        /// Strength of the penalty for leaving the reference. Default 0.1.
        pub beta: f64 = 0.1,
        /// Weight of the losses of good responses. Where good and bad are not equally many, the paper wants the weights
        /// so that weight times count of one kind is 1 to 4/3 times the other's. Default 1.0.
        pub desirable_weight: f64 = 1.0,
        /// Weight of the losses of bad responses. Default 1.0.
        pub undesirable_weight: f64 = 1.0,
        /// Compute the reference's log-probabilities once, before training. Those of the KL term's mismatched pairs
        /// come with every step all the same: the pairs change with the shuffle. It does not change a result. Default
        /// false.
        pub precompute_ref_log_probs: bool = false,
    }
    /// Peak learning rate. Default 1e-5: ten times TRL's 1e-6, since only low-rank factors are trained.
    learning_rate = 1e-5;
    batch {}
    after_norm {}
}

impl Kto {
    /// Rules between keys.
    pub(super) fn check(&self) -> Result<()> {
        if self.desirable_weight == 0.0 && self.undesirable_weight == 0.0 {
            return Err(invalid!("[kto] desirable_weight and undesirable_weight are both 0; give one a weight"));
        }
        if self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps) < 2 {
            return Err(invalid!(
                "[kto] an optimizer step of one response has no other response to estimate its KL term from; raise \
                 per_device_train_batch_size or gradient_accumulation_steps"
            ));
        }
        Ok(())
    }
}
