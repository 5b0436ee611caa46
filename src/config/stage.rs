//! The stages of a run by name. It does not depend on a model. Read `mod.rs` for what a config has of each.

/// The stages of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Supervised fine-tuning.
    Sft,
    /// Reward modelling.
    Reward,
    /// Direct preference optimisation.
    Dpo,
    /// Kahneman-Tversky optimisation.
    Kto,
    /// On-policy distillation.
    Distill,
    /// Proximal policy optimisation.
    Ppo,
    /// Group relative policy optimisation.
    Grpo,
    /// REINFORCE with a leave-one-out baseline.
    Rloo,
}

impl Stage {
    /// Whether the policy is trained on responses that it samples: the stages that PPO's loop runs.
    pub fn has_rollouts(self) -> bool {
        matches!(self, Self::Ppo | Self::Grpo | Self::Rloo)
    }

    /// The name of its section and of its default output folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Reward => "reward",
            Self::Dpo => "dpo",
            Self::Kto => "kto",
            Self::Distill => "distill",
            Self::Ppo => "ppo",
            Self::Grpo => "grpo",
            Self::Rloo => "rloo",
        }
    }
}
