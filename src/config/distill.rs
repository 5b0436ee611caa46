//! The section `[distill]`: on-policy distillation from a teacher.
//!
//! Names and defaults are those of TRL's GKDConfig (1.16) where no other source is given. It does not depend on a model. Read
//! `validate.rs` next.

use std::path::PathBuf;

use anyhow::Result;

use super::optimisation::{optimised_section, supervised_section};
use crate::invalid;

supervised_section! {
    /// `[distill]`: on-policy distillation (GKD, arXiv:2306.13649): the policy's adapter learns a teacher's distribution
    /// over the whole vocabulary, at every token of responses that the policy samples itself.
    pub struct Distill;
    first {
        /// Adapter folder (PEFT layout) to continue from; absent = a fresh one shaped by `[lora]`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adapter: Option<PathBuf> = None,
        /// TRL's name for `[teacher] path`, under which it is kept. Absent = the section `[teacher]`, or, with a
        /// `teacher_adapter`, the policy's base.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub teacher_model_name_or_path: Option<PathBuf> = None,
        /// The teacher's adapter folder (PEFT layout) over its base; absent = the bare base.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub teacher_adapter: Option<PathBuf> = None,
        /// Divides the logits where responses are sampled; the loss is at temperature 1, as TRL's. Default 0.9.
        pub temperature: f64 = 0.9,
        /// Share of the optimizer steps whose responses the policy samples; the others have the responses of the records,
        /// or with `seq_kd` the teacher's. Default 0.5. With 1, or `seq_kd`, records need no response.
        pub lmbda: f64 = 0.5,
        /// The loss: 0 = the forward KL, from the teacher to the policy; 1 = the reverse KL, from the policy to the teacher;
        /// between them the generalized Jensen-Shannon divergence. Default 0.5.
        pub beta: f64 = 0.5,
        /// Most tokens of a sampled response. Default 128.
        pub max_new_tokens: usize = 128,
        /// Whether the teacher samples the responses of steps in which the policy does not. Default false.
        pub seq_kd: bool = false,
        /// Responses that samples.jsonl gets of each logged step, and of the held-out prompts before and after training.
        /// Default 2.
        pub save_samples: usize = 2,
    }
    /// Peak learning rate. Default 2e-4, as for SFT (TRL's 2e-5 is for full fine-tuning).
    learning_rate = 2e-4;
    batch {}
    after_norm {}
}

impl Distill {
    /// Whether every response is sampled, so that a record needs a prompt alone.
    pub fn samples_all(&self) -> bool {
        self.seq_kd || self.lmbda == 1.0
    }

    /// The keys that are set and change nothing beside the others, each as a sentence with the reason.
    /// `evaluates`: whether records are held out, whose prompts the policy continues in evaluations.
    pub(super) fn idle_keys(&self, has_teacher: bool, evaluates: bool) -> Vec<String> {
        let all = "with lmbda = 1: the policy samples every response";
        let mut idle = vec![];
        if self.seq_kd && self.lmbda == 1.0 {
            idle.push(format!("[distill] seq_kd has no effect {all}"));
        }
        let samples = self.seq_kd || self.lmbda > 0.0 || evaluates;
        if self.max_new_tokens != Self::default().max_new_tokens && !samples {
            idle.push(
                "[distill] max_new_tokens has no effect with lmbda = 0, no seq_kd and no held-out records: no response is sampled"
                    .into(),
            );
        }
        if !has_teacher && self.teacher_adapter.is_some() && self.teacher_adapter == self.adapter {
            idle.push(
                "[distill] the teacher is the very adapter that the policy begins with: there is nothing to learn"
                    .into(),
            );
        }
        idle
    }

    /// What an error about the records stands behind in a message: the section, and which records it needs.
    pub fn about_records(&self) -> String {
        match self.samples_all() {
            true => "[distill]".to_owned(),
            false => format!(
                "[distill] lmbda = {} takes some responses from the records (with lmbda = 1 or seq_kd = true none)",
                self.lmbda
            ),
        }
    }

    /// Checks that there is a teacher; `has_teacher`: whether there is a `[teacher]`.
    ///
    /// # Errors
    /// If there is none.
    pub fn check(&self, has_teacher: bool) -> Result<()> {
        if !has_teacher && self.teacher_adapter.is_none() {
            return Err(invalid!(
                "[distill] has no teacher: add [teacher] path = \"a model\", or teacher_adapter for an adapter of [base]"
            ));
        }
        Ok(())
    }
}
