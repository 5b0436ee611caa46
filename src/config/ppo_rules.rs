//! Rules of `[ppo]` that depend on the advantage estimator and on other keys: GRPO's values for the keys that a file leaves
//! open, what `bootstrap_truncated` needs, and the keys that are set and have no effect.
//!
//! GRPO's values are written into the file's table before it is read, so explicit keys take precedence and the resolved
//! config shows every value. It does not depend on a stage. Read `rewards.rs` next.

use anyhow::Result;
use toml::{Table, Value};

use super::{
    AdvantageEstimator, ColumnsRead, Compat, CriticStart, EnsembleScore, ImportanceSamplingCorrection,
    ImportanceSamplingLevel, KlEstimator, KlIn, PolicyLoss, Ppo, REWARD_ADAPTER, RewardPart, ScaleRewards,
};
use crate::invalid;

/// Fills in `kl_in = "loss"`, `kl_estimator = "k3"` and `kl_coef = 0.04` where `advantage_estimator = "grpo"` and the keys
/// are absent: the KL of arXiv:2402.03300, eq. 3 and 4 and section 4.2. `kl_estimator = "k1"` has no gradient in the loss, so
/// a file that names it keeps the KL in the reward.
pub(super) fn fill(table: &mut Table) {
    let Some(ppo) = table.get_mut("ppo").and_then(Value::as_table_mut) else { return };
    let text = |table: &Table, key: &str| table.get(key).and_then(Value::as_str).map(str::to_owned);
    if text(ppo, "advantage_estimator").as_deref() != Some("grpo") {
        return;
    }
    if text(ppo, "kl_estimator").as_deref() != Some("k1") {
        ppo.entry("kl_in").or_insert_with(|| "loss".into());
    }
    if text(ppo, "kl_in").as_deref() == Some("loss") {
        ppo.entry("kl_estimator").or_insert_with(|| "k3".into());
    }
    ppo.entry("kl_coef").or_insert_with(|| 0.04.into());
}

impl Ppo {
    /// Checks that the critic has something to start as; `has_reward`: whether there is one `reward_adapter`, over the policy's
    /// tokens.
    ///
    /// # Errors
    /// If it starts as one that is not there.
    pub fn check_critic(&self, has_reward: bool) -> Result<()> {
        if has_reward || !self.advantage_estimator.has_critic() || self.critic != CriticStart::Reward {
            return Ok(());
        }
        let of_main =
            self.reward.iter().find(|part| part.name() == REWARD_ADAPTER).map_or(0, |part| part.adapters.len());
        let what = match of_main {
            _ if !self.reward_adapter.is_blank() => "this one reads other tokens than the policy".to_owned(),
            0 => "there is none".to_owned(),
            n => format!("there are {n}"),
        };
        Err(invalid!(
            "[ppo] critic = \"reward\" starts as the one reward_adapter, and {what}; use critic = \"actor\" or \"own\", or an \
             advantage_estimator without a critic"
        ))
    }

    /// Checks `bootstrap_truncated` against the other keys.
    ///
    /// # Errors
    /// If there is no critic whose value could be taken, or the rows are DeepSpeed-Chat's.
    pub(super) fn check_bootstrap(&self) -> Result<()> {
        if self.bootstrap_truncated && !self.advantage_estimator.has_critic() {
            return Err(invalid!(
                "[ppo] bootstrap_truncated = true takes the critic's value, and advantage_estimator = \"{}\" has no critic; \
                 use gae or a2c, or remove bootstrap_truncated",
                self.advantage_estimator.name()
            ));
        }
        if self.bootstrap_truncated && self.compat == Some(Compat::Dschat) {
            return Err(invalid!(
                "[ppo] bootstrap_truncated = true beside compat = \"dschat\", whose responses all end; remove one of them"
            ));
        }
        Ok(())
    }

    /// Checks `measure_kl = false` against the keys that read a KL or a reference.
    ///
    /// # Errors
    /// If one of them is set.
    pub(super) fn check_measured(&self) -> Result<()> {
        if self.measure_kl {
            return Ok(());
        }
        let needs = [
            (format!("kl_coef = {}", self.kl_coef), self.kl_coef != 0.0),
            ("adap_kl_ctrl = true".into(), self.adap_kl_ctrl),
            ("kl_estimator = \"exact\"".into(), self.kl_estimator == KlEstimator::Exact),
            ("ref_model_sync_iterations".into(), self.ref_model_sync_iterations > 0),
            ("compat = \"dschat\"".into(), self.compat.is_some()),
        ];
        match needs.into_iter().find(|(_, set)| *set) {
            Some((key, _)) => Err(invalid!(
                "[ppo] {key} reads the reference, which measure_kl = false leaves out; remove one of them"
            )),
            None => Ok(()),
        }
    }

    /// The columns of the records that a source of the reward or the gold reward reads.
    pub fn columns_read(&self) -> ColumnsRead {
        let parts = self.reward.iter().chain(&self.gold).map(RewardPart::columns_read);
        parts.fold(ColumnsRead::Named(vec![]), |all, part| match (all, part) {
            (ColumnsRead::Named(all), ColumnsRead::Named(part)) => ColumnsRead::Named([all, part].concat()),
            _ => ColumnsRead::All,
        })
    }

    /// What the sources of the reward make of the run beside what one would expect, each as a sentence: one source named
    /// twice, and a gold reward that judges nothing.
    pub fn reward_remarks(&self) -> Vec<String> {
        let (section, mut said) = (self.origin.name(), vec![]);
        // The same in all but name and weight.
        let bare = |part: &RewardPart| RewardPart { name: None, weight: 1.0, weight_end: None, ..part.clone() };
        for (at, part) in self.reward.iter().enumerate() {
            let before = self.reward[..at].iter().find(|before| bare(before) == bare(part));
            if let Some(before) = before {
                said.push(format!(
                    "[[{section}.reward]] {:?} is the same source as {:?}, so its scores count with both weights",
                    part.name(),
                    before.name()
                ));
            }
        }
        // A source and one before it, or reward_adapter, with a member in common.
        let main = self.reward_adapter.as_slice();
        for (at, part) in self.reward.iter().enumerate() {
            let distinct = part.adapters.iter().enumerate().filter(|(i, path)| !part.adapters[..*i].contains(path));
            for (_, path) in distinct {
                let of_other = self.reward[..at]
                    .iter()
                    .find(|before| bare(before) != bare(part) && before.adapters.contains(path))
                    .map(|before| format!("{:?} has too", before.name()));
                let of_main = main.contains(path).then(|| "is reward_adapter too".to_owned());
                if let Some(other) = of_main.or(of_other) {
                    said.push(format!(
                        "[[{section}.reward]] {:?} has {}, which {other}: it counts in both",
                        part.name(),
                        path.display()
                    ));
                }
            }
        }
        for part in self.reward.iter().chain(&self.gold) {
            let twice = part.adapters.iter().enumerate().find(|(at, path)| part.adapters[..*at].contains(path));
            if let Some((_, path)) = twice {
                said.push(format!(
                    "{:?} has {} twice among its adapters: it counts twice",
                    part.name(),
                    path.display()
                ));
            }
        }
        let usual = RewardPart::default();
        for part in self.reward.iter().chain(&self.gold) {
            if part.std_coef != usual.std_coef && part.aggregate != EnsembleScore::MeanMinusStd {
                said.push(format!("{:?}: std_coef has no effect without aggregate = \"mean_minus_std\"", part.name()));
            }
            if part.std_coef != usual.std_coef
                && part.aggregate == EnsembleScore::MeanMinusStd
                && part.adapters.len() == 1
            {
                said.push(format!("{:?}: std_coef has no effect on a single adapter", part.name()));
            }
            if part.aggregate != usual.aggregate && part.adapters.len() == 1 {
                said.push(format!("{:?}: aggregate has no effect on a single adapter", part.name()));
            }
        }
        if self.gold.as_ref().is_some_and(|gold| gold.weight_end.is_some()) {
            said.push(format!("[{section}.gold] weight_end has no effect: the policy is not trained on it"));
        }
        if self.gold.is_some() && self.eval_prompts == 0 {
            said.push(format!("[{section}.gold] has no effect without eval_prompts, whose responses it judges"));
        }
        said
    }

    /// The keys that differ from their defaults and change nothing beside the other keys, each as a sentence with the
    /// reason.
    pub fn idle_keys(&self) -> Vec<String> {
        let (usual, estimator) = (Self::default(), self.advantage_estimator);
        let with_estimator = format!("with advantage_estimator = \"{}\"", estimator.name());
        let mut idle = vec![];
        let mut add = |key: &str, is_set: bool, reason: &str| {
            if is_set {
                idle.push(format!("[ppo] {key} has no effect {reason}"));
            }
        };
        if estimator.has_groups() {
            let reason = format!("{with_estimator}: a response has one advantage, from the sum of its rewards");
            add(&format!("gamma = {}", self.gamma), self.gamma != usual.gamma, &reason);
        }
        if estimator != AdvantageEstimator::Gae {
            add(&format!("lam = {}", self.lam), self.lam != usual.lam, &format!("{with_estimator}; it is GAE's"));
        }
        if !estimator.has_critic() {
            let reason = format!("{with_estimator}, which has no critic");
            add("critic", self.critic != CriticStart::Reward, &reason);
            add("critic_learning_rate", self.critic_learning_rate.is_some(), &reason);
            add("cliprange_value", self.cliprange_value != usual.cliprange_value, &reason);
            add("vf_coef", self.vf_coef != usual.vf_coef, &reason);
            add("shared_optimizer", self.shared_optimizer, &reason);
        }
        if self.policy_loss != PolicyLoss::Clip {
            let reason = "without policy_loss = \"clip\"";
            add("cliprange", self.cliprange != usual.cliprange, reason);
            let is_cap = self.policy_loss == PolicyLoss::Cispo;
            add("cliprange_high", self.cliprange_high.is_some() && !is_cap, reason);
            add("dual_clip", self.dual_clip.is_some(), reason);
        }
        if self.policy_loss != PolicyLoss::Sapo {
            let reason = "without policy_loss = \"sapo\"";
            add("sapo_temperature_pos", self.sapo_temperature_pos.is_some(), reason);
            add("sapo_temperature_neg", self.sapo_temperature_neg.is_some(), reason);
        }
        let is_sequence = self.importance_sampling_level != ImportanceSamplingLevel::Token;
        let reads_ratio = self.policy_loss != PolicyLoss::Gradient || self.use_bias_correction_kl;
        let reason = "with policy_loss = \"gradient\", which reads no ratio";
        add("importance_sampling_level", is_sequence && !reads_ratio, reason);
        if self.importance_sampling_correction == ImportanceSamplingCorrection::None {
            let reason = "without importance_sampling_correction";
            let is_moved = self.importance_sampling_clip_max != usual.importance_sampling_clip_max;
            add("importance_sampling_clip_max", is_moved, reason);
            add("importance_sampling_clip_min", self.importance_sampling_clip_min.is_some(), reason);
        }
        if !estimator.has_groups() {
            let reason = format!("{with_estimator}, which compares no group");
            add("dynamic_sampling_rollouts", self.dynamic_sampling_rollouts > 0, &reason);
        }
        if estimator != AdvantageEstimator::Grpo {
            let reason = format!("{with_estimator}; it is GRPO's");
            add("scale_rewards", self.scale_rewards != ScaleRewards::Group, &reason);
        }
        if estimator != AdvantageEstimator::Rloo {
            let reason = format!("{with_estimator}; it is RLOO's");
            add("normalize_advantages", self.normalize_advantages, &reason);
        }
        let has_estimate_in_loss = self.kl_in == KlIn::Loss && self.kl_estimator != KlEstimator::Exact;
        let reason = "without kl_in = \"loss\" and an estimate from the sampled tokens (k2 or k3)";
        add("use_bias_correction_kl", self.use_bias_correction_kl && !has_estimate_in_loss, reason);
        if self.policy_loss != PolicyLoss::KlPenalty {
            let reason = "without policy_loss = \"kl_penalty\"";
            add("kl_penalty_coef", self.kl_penalty_coef != usual.kl_penalty_coef, reason);
            add("kl_penalty_target", self.kl_penalty_target != usual.kl_penalty_target, reason);
        }
        let given = [
            ("target", self.target != usual.target, !self.adap_kl_ctrl, "without adap_kl_ctrl = true"),
            ("horizon", self.horizon != usual.horizon, !self.adap_kl_ctrl, "without adap_kl_ctrl = true"),
            (
                "short_response_penalty",
                self.short_response_penalty != usual.short_response_penalty,
                self.min_response_length == 0,
                "without min_response_length",
            ),
            (
                "overlong_penalty_factor",
                self.overlong_penalty_factor != usual.overlong_penalty_factor,
                self.overlong_buffer_len == 0,
                "without overlong_buffer_len",
            ),
            (
                "ref_model_mixup_alpha",
                self.ref_model_mixup_alpha != usual.ref_model_mixup_alpha,
                self.ref_model_sync_iterations == 0,
                "without ref_model_sync_iterations",
            ),
        ];
        given.into_iter().for_each(|(key, is_set, is_idle, reason)| add(key, is_set && is_idle, reason));
        idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{KlEstimator, KlIn};

    fn read(keys: &str) -> Ppo {
        let mut table: Table = format!("[ppo]\n{keys}").parse().unwrap();
        fill(&mut table);
        table["ppo"].clone().try_into().unwrap()
    }

    fn kl_of(keys: &str) -> (KlEstimator, KlIn, f64) {
        let ppo = read(keys);
        (ppo.kl_estimator, ppo.kl_in, ppo.kl_coef)
    }

    #[test]
    fn grpo_has_its_papers_kl_unless_the_file_says_otherwise() {
        use KlEstimator::{Exact, K1, K2, K3};
        let grpo = |more: &str| kl_of(&format!("advantage_estimator = 'grpo'\n{more}"));
        assert_eq!(grpo(""), (K3, KlIn::Loss, 0.04));
        assert_eq!(grpo("kl_coef = 0.2"), (K3, KlIn::Loss, 0.2));
        assert_eq!(grpo("kl_in = 'reward'"), (K1, KlIn::Reward, 0.04));
        assert_eq!(grpo("kl_estimator = 'k1'"), (K1, KlIn::Reward, 0.04));
        assert_eq!(grpo("kl_estimator = 'k2'"), (K2, KlIn::Loss, 0.04));
        assert_eq!(grpo("kl_estimator = 'exact'\nkl_in = 'reward'"), (Exact, KlIn::Reward, 0.04));
        for other in ["", "advantage_estimator = 'rloo'", "advantage_estimator = 'gae'"] {
            assert_eq!(kl_of(other), (K1, KlIn::Reward, 0.05), "{other}");
        }
    }

    #[test]
    fn keys_without_an_effect_are_named_with_the_reason() {
        let idle = |keys: &str| read(keys).idle_keys();
        assert!(idle("").is_empty() && idle("advantage_estimator = 'rloo'\nnum_generations = 2").is_empty());
        for estimator in ["rloo", "grpo"] {
            let said = idle(&format!("advantage_estimator = '{estimator}'\ngamma = 0.9"));
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(said[0].starts_with("[ppo] gamma = 0.9 has no effect with advantage_estimator = "), "{said:?}");
            assert!(said[0].contains(estimator), "{said:?}");
        }
        for (with, key, without) in [
            ("advantage_estimator = 'a2c'", "lam = 0.5", ""),
            ("advantage_estimator = 'reinforce'", "vf_coef = 0.5", "advantage_estimator = 'a2c'"),
            ("advantage_estimator = 'reinforce'", "cliprange_value = 0.5", ""),
            ("advantage_estimator = 'grpo'", "critic_learning_rate = 1e-4", ""),
            ("advantage_estimator = 'grpo'", "critic = 'own'", ""),
            ("advantage_estimator = 'grpo'", "shared_optimizer = true", ""),
            ("policy_loss = 'kl_penalty'", "dual_clip = 3.0", ""),
            ("policy_loss = 'gradient'", "cliprange = 0.1", ""),
            ("policy_loss = 'gradient'", "cliprange_high = 0.1", "policy_loss = 'cispo'"),
            ("", "sapo_temperature_pos = 2.0", "policy_loss = 'sapo'"),
            ("", "sapo_temperature_neg = 2.0", "policy_loss = 'sapo'"),
            ("policy_loss = 'gradient'", "importance_sampling_level = 'sequence'", ""),
            ("", "scale_rewards = 'none'", "advantage_estimator = 'grpo'"),
            ("", "normalize_advantages = true", "advantage_estimator = 'rloo'"),
            ("", "importance_sampling_clip_max = 2.0", "importance_sampling_correction = 'token_mask'"),
            ("", "importance_sampling_clip_min = 0.5", "importance_sampling_correction = 'token_mask'"),
            ("", "dynamic_sampling_rollouts = 2", "advantage_estimator = 'rloo'"),
            ("", "use_bias_correction_kl = true", "kl_in = 'loss'\nkl_estimator = 'k3'"),
            ("", "kl_penalty_coef = 2.0", "policy_loss = 'kl_penalty'"),
            ("", "kl_penalty_target = 2.0", "policy_loss = 'kl_penalty'"),
            ("", "target = 4.0", "adap_kl_ctrl = true"),
            ("", "horizon = 4.0", "adap_kl_ctrl = true"),
            ("", "short_response_penalty = 4.0", "min_response_length = 3"),
            ("", "overlong_penalty_factor = 4.0", "overlong_buffer_len = 3"),
            ("", "ref_model_mixup_alpha = 0.5", "ref_model_sync_iterations = 1"),
        ] {
            let name = key.split(' ').next().unwrap();
            let said = idle(&format!("{with}\n{key}"));
            assert!(said.len() == 1 && said[0].starts_with(&format!("[ppo] {name}")), "{with} {key}: {said:?}");
            assert!(idle(&format!("{without}\n{key}")).is_empty(), "{without} {key}");
        }
    }

    #[test]
    fn without_a_reference_nothing_may_read_one() {
        let refusal = |keys: &str| read(&format!("measure_kl = false\n{keys}")).check_measured();
        assert!(refusal("kl_coef = 0.0").is_ok() && read("kl_coef = 0.0").check_measured().is_ok());
        for (keys, named) in [
            ("", "kl_coef = 0.05"),
            ("kl_coef = 0.0\nadap_kl_ctrl = true", "adap_kl_ctrl"),
            ("kl_coef = 0.0\nkl_estimator = 'exact'", "kl_estimator"),
            ("kl_coef = 0.0\nref_model_sync_iterations = 2", "ref_model_sync_iterations"),
            ("kl_coef = 0.0\ncompat = 'dschat'", "compat"),
        ] {
            let said = refusal(keys).unwrap_err().to_string();
            assert!(said.starts_with(&format!("[ppo] {named}")), "{keys}: {said}");
        }
    }

    #[test]
    fn bootstrapping_needs_a_critic_and_rows_without_pads() {
        let refusal = |keys: &str| read(&format!("bootstrap_truncated = true\n{keys}")).check_bootstrap();
        assert!(refusal("").is_ok() && refusal("advantage_estimator = 'a2c'").is_ok());
        let said = refusal("advantage_estimator = 'reinforce_plus_plus'").unwrap_err().to_string();
        assert!(said.contains("\"reinforce_plus_plus\" has no critic"), "{said}");
        assert!(refusal("compat = 'dschat'").unwrap_err().to_string().contains("dschat"));
    }
}
