//! Warnings about the course of a PPO run, each with its likely cause and a remedy. Pure functions of the last iterations'
//! metrics; the thresholds are rules of thumb, written beside each. It does not depend on the model. Read `state.rs` for
//! where they are logged.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Origin;
use crate::report::Metrics;
use crate::stats::{mean, standard_error};

/// The metrics of one iteration that warnings are based on. `None` if a metric was not logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WatchedMetrics {
    /// KL to the reference, nats per response.
    pub kl: f64,
    /// Mean number of tokens per response.
    pub length: f64,
    /// Entropy of the policy, nats per token; none while only the critic trains.
    pub entropy: Option<f64>,
    /// Mean score of the reward source that the policy is trained on.
    pub score: f64,
    /// Mean gold score of the held-out responses, in iterations with an evaluation.
    pub gold: Option<f64>,
    /// Mean standard deviation between the reward models of an ensemble.
    pub disagreement: Option<f64>,
    /// Explained variance of the critic.
    pub explained_variance: Option<f64>,
    /// Whether all advantages are 0.
    pub flat_advantages: bool,
    /// Share of responses that were truncated.
    pub truncated: f64,
    /// Share of responses whose score was clipped.
    #[serde(default)]
    pub clipped: f64,
    /// Share of groups whose rewards were all equal.
    #[serde(default)]
    pub flat_groups: f64,
    /// Share of optimizer steps of which every response was left out of the loss.
    #[serde(default)]
    pub masked_steps: f64,
    /// Norm of the actor's gradient, the mean over the iteration's steps; none where none was computed.
    #[serde(default)]
    pub gradient: Option<f64>,
    /// Whether every LoRA B is 0 after [`FIRST_STEPS`] optimizer steps of the actor.
    #[serde(default)]
    pub zero_b: bool,
}

/// Optimizer steps after which a B that is 0 has not moved at all: the first one may have a learning rate of 0 (warm-up).
pub const FIRST_STEPS: usize = 3;

impl WatchedMetrics {
    /// Reads them from an iteration's metrics. `responses`: the size of the rollout.
    pub fn of(metrics: &Metrics, responses: usize, flat_advantages: bool) -> Self {
        let get = |key: &str| metrics.get(key).and_then(Value::as_f64);
        let known = |key: &str| get(key).unwrap_or(f64::NAN);
        let ended = known("val/num_eos_tokens");
        Self {
            // Not NaN where no KL is measured: a checkpoint holds these numbers, and JSON has no NaN.
            kl: get("objective/kl").unwrap_or(0.0),
            length: known("response_length"),
            entropy: get("policy/entropy_avg"),
            score: known("objective/scores"),
            gold: get("eval/gold"),
            disagreement: metrics.iter().find(|(key, _)| key.ends_with("/disagreement")).and_then(|(_, v)| v.as_f64()),
            explained_variance: get("val/explained_variance"),
            flat_advantages,
            truncated: 1.0 - ended / responses as f64,
            clipped: get("objective/score_clipfrac").unwrap_or(0.0),
            flat_groups: get("frac_reward_zero_std").unwrap_or(0.0),
            masked_steps: get("policy/masked_steps").unwrap_or(0.0),
            gradient: get("grad_norm/actor"),
            zero_b: false,
        }
    }
}

/// A likely problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warning {
    /// The KL more than tripled within the window, to over 5 nats.
    KlBlowUp,
    /// Responses are more than twice as long as at the start.
    LengthBlowUp,
    /// The entropy is less than a tenth of the initial entropy.
    EntropyCollapse,
    /// The score rose while the gold score fell, or the ensemble's disagreement doubled.
    RewardHacking,
    /// The critic predicted worse than a constant in five consecutive iterations.
    UselessCritic,
    /// All advantages are 0: the policy gradient is zero.
    FlatAdvantages,
    /// More than half of the responses were truncated.
    Truncated,
    /// The scores of more than a quarter of the responses were clipped.
    SaturatedScores,
    /// The rewards of more than half of the groups were all equal in three consecutive iterations.
    EqualGroups,
    /// Every response of an optimizer step was left out of the loss: the step trained nothing.
    MaskedSteps,
    /// The actor's gradient is exactly 0 although advantages are not.
    ZeroGradient,
    /// Every LoRA B is still 0 after the first steps: the actor is the model that it started as.
    ZeroB,
}

impl Warning {
    /// Name in metrics.jsonl.
    pub fn name(self) -> &'static str {
        match self {
            Self::KlBlowUp => "kl_blow_up",
            Self::LengthBlowUp => "length_blow_up",
            Self::EntropyCollapse => "entropy_collapse",
            Self::RewardHacking => "reward_hacking",
            Self::UselessCritic => "useless_critic",
            Self::FlatAdvantages => "flat_advantages",
            Self::Truncated => "truncated",
            Self::SaturatedScores => "saturated_scores",
            Self::EqualGroups => "equal_groups",
            Self::MaskedSteps => "masked_steps",
            Self::ZeroGradient => "zero_gradient",
            Self::ZeroB => "zero_b",
        }
    }

    /// Description, likely cause and remedy, in the keys of the section that the run was made from.
    pub fn text(self, origin: Origin) -> String {
        let is_ppo = origin == Origin::Ppo;
        let of = |ppo: &'static str, group: &'static str| if is_ppo { ppo } else { group };
        let kl = of("kl_coef", "beta");
        match self {
            Self::KlBlowUp => format!(
                "the KL to the reference more than tripled within ten iterations: the policy is diverging from it; raise {kl}, or \
                 lower learning_rate or {}",
                of("num_ppo_epochs", "num_iterations")
            ),
            Self::LengthBlowUp => format!(
                "responses are more than twice as long as at the start: the reward favours length; {}, or look at the longest \
                 samples",
                match origin {
                    Origin::Ppo => "set length_penalty or missing_eos_penalty",
                    Origin::Grpo => "add a [[grpo.reward]] of kind = \"length\"",
                    Origin::Rloo => "add a [[rloo.reward]] of kind = \"length\"",
                }
            ),
            Self::EntropyCollapse => format!(
                "the policy's entropy is less than a tenth of its initial value: its responses are all alike; raise {kl}{}, or \
                 lower learning_rate",
                if origin == Origin::Rloo { "" } else { " or entropy_coef" }
            ),
            Self::RewardHacking => format!(
                "the score rises while the gold score falls or the reward models disagree ever more: the policy exploits the \
                 reward model; stop at an earlier checkpoint, raise {kl}, or use an ensemble with std_coef"
            ),
            Self::UselessCritic => "the critic has explained none of the returns' variance for five iterations: advantages are \
                                    noise; raise critic_learning_rate, warm the critic up, or use an estimator without critic"
                .into(),
            Self::FlatAdvantages => format!(
                "all advantages are 0, so the policy does not learn: every response got the same reward; check the reward \
                 source{} and fallback_score",
                match origin {
                    Origin::Ppo => ", score_clip",
                    Origin::Grpo => "",
                    Origin::Rloo => ", reward_clip_range",
                }
            ),
            Self::Truncated => {
                let length = of("response_length", "max_completion_length");
                format!(
                    "more than half of the responses were truncated at {length}: their end is never scored; raise {length} or set {}",
                    of("missing_eos_penalty", "mask_truncated_completions = true")
                )
            }
            Self::SaturatedScores => format!(
                "the scores of more than a quarter of the responses lie beyond {}, or look whether the reward model fits these \
                 responses",
                of(
                    "score_clip: clipped, they no longer say which is better; raise score_clip, set use_score_scaling = true",
                    "reward_clip_range: clipped, they no longer say which is better; widen reward_clip_range"
                )
            ),
            Self::EqualGroups => "in more than half of the groups every response has had the same reward for three iterations, and \
                                  those teach nothing: the prompts are too easy or too hard, or the reward is too coarse; set \
                                  dynamic_sampling_rollouts, raise num_generations, or change the prompts"
                .into(),
            Self::MaskedSteps => format!(
                "every response of an optimizer step was truncated, and mask_truncated_completions leaves those out of the loss: the \
                 step trained nothing; raise {}, or set mask_truncated_completions = false",
                of("response_length", "max_completion_length")
            ),
            Self::ZeroGradient => format!(
                "the actor's gradient is exactly 0 although advantages are not: every token is clipped or has a weight of 0; look \
                 at {}",
                match origin {
                    Origin::Ppo => "cliprange, log_ratio_clamp, importance_sampling_correction and its bounds",
                    Origin::Grpo => "epsilon, importance_sampling_correction and its bounds",
                    Origin::Rloo => "epsilon",
                }
            ),
            Self::ZeroB => "every LoRA B is still 0 after the first optimizer steps, so the actor is the model that it started as: \
                            most often all rewards of a group are equal, or learning_rate is 0 or too small to be stored"
                .into(),
        }
    }
}

/// Number of iterations over which trends are computed.
pub const WINDOW: usize = 10;

/// The metrics and warnings of a run's past iterations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// Metrics of the first iteration.
    first: Option<WatchedMetrics>,
    /// Metrics of the last [`WINDOW`] iterations, oldest first.
    recent: Vec<WatchedMetrics>,
    /// The number of iterations in which each warning applied.
    #[serde(default)]
    counts: BTreeMap<Warning, usize>,
}

impl Monitor {
    /// The warnings of the run so far, each with the number of iterations in which it applied.
    pub fn counts(&self) -> impl Iterator<Item = (Warning, usize)> {
        self.counts.iter().map(|(&warning, &count)| (warning, count))
    }

    /// Adds an iteration. Returns the warnings that apply now, and those of them that never applied before: a warning
    /// that comes and goes is new once.
    pub fn add(&mut self, metrics: WatchedMetrics) -> (Vec<Warning>, Vec<Warning>) {
        let first = self.first.get_or_insert(metrics);
        first.entropy = first.entropy.or(metrics.entropy);
        if self.recent.len() == WINDOW {
            self.recent.remove(0);
        }
        self.recent.push(metrics);
        let active = warnings(self.first.as_ref().unwrap_or(&metrics), &self.recent);
        let new = active.iter().copied().filter(|w| !self.counts.contains_key(w)).collect();
        active.iter().for_each(|&warning| *self.counts.entry(warning).or_default() += 1);
        (active, new)
    }
}

/// Warnings that apply after the last of `recent` (oldest first); `first` is the run's first iteration.
pub fn warnings(first: &WatchedMetrics, recent: &[WatchedMetrics]) -> Vec<Warning> {
    let Some(now) = recent.last() else { return vec![] };
    let mut found = vec![];
    let mut check = |holds: bool, warning| {
        if holds {
            found.push(warning);
        }
    };
    // Below 5 nats per response, a factor of three is noise.
    let lowest = recent.iter().map(|v| v.kl).fold(f64::INFINITY, f64::min);
    check(recent.len() > 1 && now.kl > 5.0 && now.kl > 3.0 * lowest.max(1.0), Warning::KlBlowUp);
    check(now.length > 2.0 * first.length && now.length > 16.0, Warning::LengthBlowUp);
    check(now.entropy.zip(first.entropy).is_some_and(|(now, first)| now < 0.1 * first), Warning::EntropyCollapse);
    let score = trend(&known(recent, |v| Some(v.score)));
    let gold = trend(&known(recent, |v| v.gold));
    let disagreement = known(recent, |v| v.disagreement);
    let doubled = disagreement.len() >= 4 && disagreement[disagreement.len() - 1] > 2.0 * disagreement[0];
    check(score > 2.0 && (gold < -2.0 || doubled), Warning::RewardHacking);
    let useless = recent.iter().rev().take_while(|v| v.explained_variance.is_some_and(|e| e < 0.0)).count();
    check(useless >= 5, Warning::UselessCritic);
    check(now.flat_advantages, Warning::FlatAdvantages);
    check(now.truncated > 0.5, Warning::Truncated);
    check(now.clipped > 0.25, Warning::SaturatedScores);
    let equal = recent.iter().rev().take_while(|v| v.flat_groups > 0.5).count();
    check(equal >= 3, Warning::EqualGroups);
    check(now.masked_steps > 0.0, Warning::MaskedSteps);
    check(now.gradient == Some(0.0) && !now.flat_advantages, Warning::ZeroGradient);
    check(now.zero_b, Warning::ZeroB);
    found
}

fn known(recent: &[WatchedMetrics], of: impl Fn(&WatchedMetrics) -> Option<f64>) -> Vec<f64> {
    recent.iter().filter_map(of).collect()
}

/// Mean of the later half minus mean of the earlier half, in standard errors; 0 for fewer than four values.
fn trend(values: &[f64]) -> f64 {
    if values.len() < 4 {
        return 0.0;
    }
    let (early, late) = values.split_at(values.len() / 2);
    let error = standard_error(early).hypot(standard_error(late));
    (mean(late) - mean(early)) / error.max(1e-12)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> WatchedMetrics {
        WatchedMetrics {
            kl: 2.0,
            length: 20.0,
            entropy: Some(1.5),
            score: 0.5,
            explained_variance: Some(0.4),
            ..WatchedMetrics::default()
        }
    }

    /// Warnings after a healthy first iteration and then `course`.
    fn after(course: impl IntoIterator<Item = WatchedMetrics>) -> Vec<Warning> {
        let mut monitor = Monitor::default();
        monitor.add(healthy());
        course.into_iter().map(|v| monitor.add(v).0).last().unwrap_or_default()
    }

    #[test]
    fn healthy_run_raises_no_warning() {
        let learning = |i: usize| {
            let t = i as f64;
            let gold = i.is_multiple_of(2).then_some(3.0 + 0.1 * t);
            WatchedMetrics {
                kl: 2.0 + 0.2 * t,
                score: 0.5 + 0.05 * t,
                entropy: Some(1.5 - 0.01 * t),
                gold,
                ..healthy()
            }
        };
        let mut monitor = Monitor::default();
        for i in 0..40 {
            assert_eq!(monitor.add(learning(i)), (vec![], vec![]), "iteration {i}");
        }
    }

    #[test]
    fn each_problem_has_its_warning() {
        let is = |metrics: WatchedMetrics, warning| assert_eq!(after([metrics]), [warning]);
        is(WatchedMetrics { kl: 12.0, ..healthy() }, Warning::KlBlowUp);
        is(WatchedMetrics { length: 41.0, ..healthy() }, Warning::LengthBlowUp);
        is(WatchedMetrics { entropy: Some(0.1), ..healthy() }, Warning::EntropyCollapse);
        is(WatchedMetrics { flat_advantages: true, ..healthy() }, Warning::FlatAdvantages);
        is(WatchedMetrics { truncated: 0.6, ..healthy() }, Warning::Truncated);
        is(WatchedMetrics { clipped: 0.3, ..healthy() }, Warning::SaturatedScores);
        is(WatchedMetrics { masked_steps: 0.25, ..healthy() }, Warning::MaskedSteps);
        is(WatchedMetrics { gradient: Some(0.0), ..healthy() }, Warning::ZeroGradient);
        is(WatchedMetrics { zero_b: true, ..healthy() }, Warning::ZeroB);
        let flat = WatchedMetrics { gradient: Some(0.0), flat_advantages: true, ..healthy() };
        assert_eq!(after([flat]), [Warning::FlatAdvantages], "its cause is named already");
        assert_eq!(after([WatchedMetrics { gradient: Some(1e-12), ..healthy() }]), []);
        let bad = WatchedMetrics { explained_variance: Some(-0.2), ..healthy() };
        assert_eq!(after([bad; 4]), []);
        assert_eq!(after([bad; 5]), [Warning::UselessCritic]);
        let equal = WatchedMetrics { flat_groups: 0.6, ..healthy() };
        assert_eq!((after([equal; 2]), after([equal; 3])), (vec![], vec![Warning::EqualGroups]));
        assert_eq!(after([equal, equal, WatchedMetrics { flat_groups: 0.5, ..healthy() }, equal]), []);
        let unknown = WatchedMetrics { explained_variance: None, ..healthy() };
        assert_eq!(after([bad, bad, unknown, bad, bad]), [], "five consecutive iterations");
    }

    #[test]
    fn rising_score_with_falling_gold_or_growing_disagreement_is_reward_hacking() {
        let course = |gold: f64, disagreement: f64| {
            (0..10).map(move |i| {
                let t = f64::from(i);
                let wobble = if i % 2 == 0 { 0.01 } else { -0.01 };
                WatchedMetrics {
                    score: 0.5 + 0.1 * t + wobble,
                    gold: Some(5.0 + gold * t + wobble),
                    disagreement: Some(0.2 + disagreement * t),
                    ..healthy()
                }
            })
        };
        assert_eq!(after(course(0.1, 0.0)), []);
        assert_eq!(after(course(-0.1, 0.0)), [Warning::RewardHacking]);
        assert_eq!(after(course(0.1, 0.05)), [Warning::RewardHacking]);
        let falling = course(-0.1, 0.0).map(|v| WatchedMetrics { score: -v.score, ..v });
        assert_eq!(after(falling), [], "both fall: no hacking, only a bad run");
    }

    #[test]
    fn the_entropy_is_compared_with_the_first_that_was_measured() {
        let with = |entropy| WatchedMetrics { entropy, ..healthy() };
        let mut monitor = Monitor::default();
        let active = [None, None, Some(1.5), Some(0.1)].map(|entropy| monitor.add(with(entropy)).0);
        assert_eq!(active, [vec![], vec![], vec![], vec![Warning::EntropyCollapse]]);
        // It is part of the state that a checkpoint holds.
        let mut warm = Monitor::default();
        warm.add(with(None));
        let resumed: Monitor = serde_json::from_value(serde_json::to_value(&warm).unwrap()).unwrap();
        assert_eq!(resumed, warm);
    }

    #[test]
    fn a_warning_that_comes_and_goes_is_new_once_and_counted() {
        let mut monitor = Monitor::default();
        let truncated = WatchedMetrics { truncated: 0.9, ..healthy() };
        let new: Vec<usize> =
            [truncated, truncated, healthy(), truncated].into_iter().map(|v| monitor.add(v).1.len()).collect();
        assert_eq!(new, [1, 0, 0, 0]);
        // The count outlives the process: it is part of the state that a checkpoint holds.
        let resumed: Monitor = serde_json::from_value(serde_json::to_value(&monitor).unwrap()).unwrap();
        assert_eq!(resumed.counts().collect::<Vec<_>>(), [(Warning::Truncated, 3)]);
    }

    #[test]
    fn slowly_rising_kl_raises_no_warning() {
        assert_eq!(after((0..40).map(|i| WatchedMetrics { kl: 2.0 + 0.5 * f64::from(i), ..healthy() })), []);
    }

    #[test]
    fn metrics_are_read_by_name_and_missing_ones_raise_no_warning() {
        let logged: Metrics = serde_json::from_str(
            r#"{"objective/kl": 3.5, "response_length": 9, "policy/entropy_avg": 1.0, "objective/scores": 0.2,
                "val/num_eos_tokens": 2, "frac_reward_zero_std": 0.5, "val/explained_variance": null, "rewards/adapter/disagreement": 0.3}"#,
        )
        .unwrap();
        let metrics = WatchedMetrics::of(&logged, 8, false);
        assert_eq!((metrics.kl, metrics.length, metrics.truncated), (3.5, 9.0, 0.75));
        assert_eq!(metrics.flat_groups, 0.5);
        assert_eq!((metrics.explained_variance, metrics.gold, metrics.disagreement), (None, None, Some(0.3)));
        let nothing = WatchedMetrics::of(&Metrics::new(), 8, false);
        assert_eq!(warnings(&nothing, &[nothing; 10]), []);
    }

    /// Every word with an underscore in a warning is a key of the section that the run was made from.
    #[test]
    fn a_warning_names_keys_of_the_section_that_the_run_has() {
        use Warning::{
            EntropyCollapse, EqualGroups, FlatAdvantages, KlBlowUp, LengthBlowUp, MaskedSteps, RewardHacking,
            SaturatedScores, Truncated, UselessCritic, ZeroB, ZeroGradient,
        };
        let all = [
            KlBlowUp,
            LengthBlowUp,
            EntropyCollapse,
            RewardHacking,
            UselessCritic,
            FlatAdvantages,
            Truncated,
            SaturatedScores,
            EqualGroups,
            MaskedSteps,
            ZeroGradient,
            ZeroB,
        ];
        for origin in [Origin::Ppo, Origin::Grpo, Origin::Rloo] {
            let section = origin.name();
            let of = |name: &str| crate::config::known_keys().into_iter().find(|(of, _)| *of == name).unwrap().1;
            let keys = [of(section), of(&format!("{section}.reward"))].concat();
            for warning in all {
                // There is no critic in a group method, and GRPO clips no score.
                let is_possible = match warning {
                    UselessCritic => origin == Origin::Ppo,
                    SaturatedScores => origin != Origin::Grpo,
                    _ => true,
                };
                let text = warning.text(origin);
                let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                for word in words.filter(|word| word.contains('_') && is_possible) {
                    assert!(keys.contains(&word), "[{section}] has no {word}: {text}");
                }
            }
        }
    }
}
