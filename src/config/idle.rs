//! What of a config a stage does not read: keys and sections that change nothing, each with the reason. It does not depend on a
//! model or data. Read `ppo_rules.rs` and `group.rs` for the keys of single sections.

use super::{Config, CriticStart, Data, EvalSize, Grpo, KvCacheType, Origin, Ppo, RewardKind, Rloo, Stage};

impl Config {
    /// The keys of a stage's section, and the sections, that are set and change nothing, each as a sentence with the reason.
    pub fn idle_keys(&self, stage: Stage) -> Vec<String> {
        let mut idle = match stage {
            Stage::Ppo => self.ppo.as_ref().map(Ppo::idle_keys).unwrap_or_default(),
            Stage::Grpo => self.grpo.as_ref().map(Grpo::idle_keys).unwrap_or_default(),
            Stage::Rloo => self.rloo.as_ref().map(Rloo::idle_keys).unwrap_or_default(),
            Stage::Distill => self.distill().idle_keys(self.teacher.is_some(), self.evaluates()),
            _ => vec![],
        };
        // A file may hold the sections of several stages, each with what it reads.
        if self.teacher.is_some() && self.distill.is_none() && stage != Stage::Distill {
            idle.push(format!("[teacher] has no effect on {}: `fourfold distill` alone has a teacher", stage.name()));
        }
        let others = self.reward.is_some() || self.ppo.as_ref().is_some_and(Ppo::reads_reward_base);
        if self.reward_base.is_some() && !others && !self.reads_reward_base(stage) {
            idle.push(match stage.has_rollouts() {
                true => format!(
                    "[reward_base] has no effect on {}: no source of its reward is an adapter, and no critic is over it",
                    stage.name()
                ),
                false => format!("[reward_base] has no effect on {}, which has no reward model", stage.name()),
            });
        }
        if self.base.kv_cache_type() == KvCacheType::Q8_0 {
            let served = || self.rollouts(stage).is_ok_and(|rollouts| rollouts.servers().is_some());
            if stage == Stage::Distill && !self.distill_generates_with_base() {
                idle.push("[base] kv_cache_type has no effect on distill: the policy samples no response".into());
            } else if !stage.has_rollouts() && stage != Stage::Distill {
                idle.push(format!("[base] kv_cache_type has no effect on {}, which generates nothing", stage.name()));
            } else if stage.has_rollouts() && served() {
                idle.push(
                    "[base] kv_cache_type is for evaluations alone: the servers that sample have caches of their own"
                        .into(),
                );
            }
        }
        let is_sampled_from = self.distill().seq_kd && self.distill().lmbda < 1.0;
        if let Some(teacher) = self.teacher.as_ref().filter(|_| stage == Stage::Distill && !is_sampled_from)
            && teacher.kv_cache_type() == KvCacheType::Q8_0
            && !teacher.is_generated_with_as(&self.base)
        {
            idle.push(
                "[teacher] kv_cache_type has no effect: without seq_kd, or with lmbda = 1, the teacher samples nothing"
                    .into(),
            );
        }
        idle.extend(self.ppo.as_ref().filter(|_| stage.has_rollouts()).map(Ppo::reward_remarks).unwrap_or_default());
        idle
    }

    /// Whether records are held out to evaluate with.
    fn evaluates(&self) -> bool {
        let holds_out = |data: &Data| ![EvalSize::Rows(0), EvalSize::Fraction(0.0)].contains(&data.eval_size());
        self.data.as_ref().is_some_and(holds_out)
    }

    /// Whether `distill` generates with `[base]`: as the policy, or as a teacher over it.
    fn distill_generates_with_base(&self) -> bool {
        let section = self.distill();
        section.lmbda > 0.0 || self.evaluates() || (section.seq_kd && self.teacher.is_none())
    }

    /// Whether a stage reads the reward model's checkpoint.
    fn reads_reward_base(&self, stage: Stage) -> bool {
        match stage {
            Stage::Reward => true,
            // The stage ends without its section.
            _ if stage.has_rollouts() => self.rollouts(stage).map_or(true, Ppo::reads_reward_base),
            _ => false,
        }
    }

    /// The config without the checkpoints that a stage does not read, so that they are not opened.
    #[must_use]
    pub fn read_by(&self, stage: Stage) -> Self {
        let mut read = self.clone();
        if !self.reads_reward_base(stage) {
            read.reward_base = None;
        }
        if stage != Stage::Distill {
            read.teacher = None;
        }
        read
    }

    /// That a stage will run with the defaults of every key of its section, where the file has no such section and those of
    /// others.
    pub fn without_section(&self, stage: Stage) -> Option<String> {
        let ppo = self.ppo.as_ref().filter(|ppo| ppo.origin == Origin::Ppo);
        let there = [
            (Stage::Sft, self.sft.is_some()),
            (Stage::Reward, self.reward.is_some()),
            (Stage::Dpo, self.dpo.is_some()),
            (Stage::Kto, self.kto.is_some()),
            (Stage::Distill, self.distill.is_some()),
            (Stage::Ppo, ppo.is_some()),
            (Stage::Grpo, self.grpo.is_some()),
            (Stage::Rloo, self.rloo.is_some()),
        ];
        let others: Vec<&str> = there.iter().filter(|(_, is_there)| *is_there).map(|(of, _)| of.name()).collect();
        let listed = |of: fn(&&str) -> String, between: &str| others.iter().map(of).collect::<Vec<_>>().join(between);
        // A stage with rollouts does not run without its section.
        (!others.is_empty() && !others.contains(&stage.name()) && !stage.has_rollouts()).then(|| {
            format!(
                "the file has no [{}], so all of its keys have their defaults; it has {}, for {}",
                stage.name(),
                listed(|name| format!("[{name}]"), " and "),
                listed(|name| format!("`fourfold {name}`"), " and ")
            )
        })
    }
}

impl Ppo {
    /// Whether a reward model, of the reward or of the gold reward, or a critic is over `[reward_base]`.
    fn reads_reward_base(&self) -> bool {
        let is_adapter = self.reward.iter().chain(&self.gold).any(|part| part.kind == RewardKind::Adapter);
        let is_critic = self.advantage_estimator.has_critic() && self.critic != CriticStart::Actor;
        is_adapter || !self.reward_adapter.is_blank() || is_critic
    }
}
