//! What the figures of the last iterations say when a run goes wrong, each with its likely cause and what to do. Pure
//! functions of the figures; knows no model. The thresholds are rules of thumb, written beside each.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::report::Figures;
use crate::stats::{mean, standard_error};

/// The signs of one iteration. `None` where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Vitals {
    /// KL to the reference, nats an answer.
    pub kl: f64,
    /// Mean tokens of an answer.
    pub length: f64,
    /// Entropy of the policy, nats a token.
    pub entropy: f64,
    /// Mean score that the policy is trained on.
    pub score: f64,
    /// Mean gold score of the held-out answers, in iterations that were evaluated.
    pub gold: Option<f64>,
    /// Mean deviation between the reward models of an ensemble.
    pub disagreement: Option<f64>,
    /// Of the critic.
    pub explained_variance: Option<f64>,
    /// Are all advantages 0?
    pub flat_advantages: bool,
    /// Share of answers that were cut off.
    pub truncated: f64,
}

impl Vitals {
    /// Out of an iteration's figures.
    pub fn of(figures: &Figures, answers: usize, flat_advantages: bool) -> Self {
        let get = |key: &str| figures.get(key).and_then(Value::as_f64);
        let known = |key: &str| get(key).unwrap_or(f64::NAN);
        let ended = known("val/num_eos_tokens");
        Self {
            kl: known("objective/kl"),
            length: known("response_length"),
            entropy: known("policy/entropy_avg"),
            score: known("objective/scores"),
            gold: get("eval/gold"),
            disagreement: figures.iter().find(|(key, _)| key.ends_with("/disagreement")).and_then(|(_, v)| v.as_f64()),
            explained_variance: get("val/explained_variance"),
            flat_advantages,
            truncated: 1.0 - ended / answers as f64,
        }
    }
}

/// What may be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warning {
    /// The KL more than trebled within the window, to over 5 nats.
    KlBlowUp,
    /// Answers more than doubled in length since the start.
    LengthBlowUp,
    /// Less than a tenth of the entropy of the start is left.
    EntropyCollapse,
    /// The score rose while the gold score fell, or the ensemble's disagreement doubled.
    RewardHacking,
    /// The critic predicted worse than a constant five times running.
    UselessCritic,
    /// All advantages are 0: nothing is learnt.
    FlatAdvantages,
    /// More than half of the answers were cut off.
    Truncated,
}

impl Warning {
    /// In metrics.jsonl.
    pub fn name(self) -> &'static str {
        match self {
            Self::KlBlowUp => "kl_blow_up",
            Self::LengthBlowUp => "length_blow_up",
            Self::EntropyCollapse => "entropy_collapse",
            Self::RewardHacking => "reward_hacking",
            Self::UselessCritic => "useless_critic",
            Self::FlatAdvantages => "flat_advantages",
            Self::Truncated => "truncated",
        }
    }

    /// What was seen, why that may be, what to do.
    pub fn text(self) -> &'static str {
        match self {
            Self::KlBlowUp => {
                "the KL to the reference more than trebled within ten iterations: the policy runs away from it; raise \
                 kl_coef, or lower learning_rate or num_ppo_epochs"
            }
            Self::LengthBlowUp => {
                "answers are more than twice as long as at the start: the reward favours length; set a length or \
                 missing_eos penalty, or look at the longest samples"
            }
            Self::EntropyCollapse => {
                "less than a tenth of the policy's entropy is left: it gives one answer to everything; raise kl_coef or \
                 an entropy bonus, or lower learning_rate"
            }
            Self::RewardHacking => {
                "the score rises while the gold score falls or the reward models disagree ever more: the policy exploits \
                 the reward model; stop at an earlier checkpoint, raise kl_coef, or use an ensemble with std_coef"
            }
            Self::UselessCritic => {
                "the critic explains nothing of the returns for five iterations: advantages are noise; raise \
                 critic_learning_rate, warm the critic up, or use an estimator without critic"
            }
            Self::FlatAdvantages => {
                "all advantages are 0, so nothing is learnt: every answer got the same reward; check the reward source, \
                 score_clip and fallback_score"
            }
            Self::Truncated => {
                "more than half of the answers were cut off at response_length: their end is never scored; raise \
                 response_length or set missing_eos_penalty"
            }
        }
    }
}

/// Iterations that a trend is read over.
pub const WINDOW: usize = 10;

/// What a run remembers of its iterations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// The first iteration's.
    first: Option<Vitals>,
    /// Of the last [`WINDOW`], oldest first.
    recent: Vec<Vitals>,
    /// What held after the last one.
    holding: Vec<Warning>,
}

impl Watch {
    /// After an iteration: what holds now, and what of it is new.
    pub fn see(&mut self, vitals: Vitals) -> (Vec<Warning>, Vec<Warning>) {
        self.first.get_or_insert(vitals);
        if self.recent.len() == WINDOW {
            self.recent.remove(0);
        }
        self.recent.push(vitals);
        let holding = warnings(self.first.as_ref().unwrap_or(&vitals), &self.recent);
        let new = holding.iter().copied().filter(|w| !self.holding.contains(w)).collect();
        self.holding.clone_from(&holding);
        (holding, new)
    }
}

/// What holds after the last of `recent`, oldest first; `first` is the run's first iteration.
pub fn warnings(first: &Vitals, recent: &[Vitals]) -> Vec<Warning> {
    let Some(now) = recent.last() else { return vec![] };
    let mut found = vec![];
    let mut check = |holds: bool, warning| {
        if holds {
            found.push(warning);
        }
    };
    // Below 5 nats an answer a factor of three is noise.
    let lowest = recent.iter().map(|v| v.kl).fold(f64::INFINITY, f64::min);
    check(recent.len() > 1 && now.kl > 5.0 && now.kl > 3.0 * lowest.max(1.0), Warning::KlBlowUp);
    check(now.length > 2.0 * first.length && now.length > 16.0, Warning::LengthBlowUp);
    check(now.entropy < 0.1 * first.entropy, Warning::EntropyCollapse);
    let score = trend(&known(recent, |v| Some(v.score)));
    let gold = trend(&known(recent, |v| v.gold));
    let disagreement = known(recent, |v| v.disagreement);
    let doubled = disagreement.len() >= 4 && disagreement[disagreement.len() - 1] > 2.0 * disagreement[0];
    check(score > 2.0 && (gold < -2.0 || doubled), Warning::RewardHacking);
    let useless = recent.iter().rev().take_while(|v| v.explained_variance.is_some_and(|e| e < 0.0)).count();
    check(useless >= 5, Warning::UselessCritic);
    check(now.flat_advantages, Warning::FlatAdvantages);
    check(now.truncated > 0.5, Warning::Truncated);
    found
}

fn known(recent: &[Vitals], of: impl Fn(&Vitals) -> Option<f64>) -> Vec<f64> {
    recent.iter().filter_map(of).collect()
}

/// How many standard errors the later half lies above the earlier; 0 of fewer than four numbers.
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

    fn healthy() -> Vitals {
        Vitals { kl: 2.0, length: 20.0, entropy: 1.5, score: 0.5, explained_variance: Some(0.4), ..Vitals::default() }
    }

    /// What holds after a healthy start and then these.
    fn after(course: impl IntoIterator<Item = Vitals>) -> Vec<Warning> {
        let mut watch = Watch::default();
        watch.see(healthy());
        course.into_iter().map(|v| watch.see(v).0).last().unwrap_or_default()
    }

    #[test]
    fn a_healthy_run_that_learns_is_left_in_peace() {
        let learning = |i: usize| {
            let t = i as f64;
            let gold = i.is_multiple_of(2).then_some(3.0 + 0.1 * t);
            Vitals { kl: 2.0 + 0.2 * t, score: 0.5 + 0.05 * t, entropy: 1.5 - 0.01 * t, gold, ..healthy() }
        };
        let mut watch = Watch::default();
        for i in 0..40 {
            assert_eq!(watch.see(learning(i)), (vec![], vec![]), "iteration {i}");
        }
    }

    #[test]
    fn each_sign_has_its_warning() {
        let is = |vitals: Vitals, warning| assert_eq!(after([vitals]), [warning]);
        is(Vitals { kl: 12.0, ..healthy() }, Warning::KlBlowUp);
        is(Vitals { length: 41.0, ..healthy() }, Warning::LengthBlowUp);
        is(Vitals { entropy: 0.1, ..healthy() }, Warning::EntropyCollapse);
        is(Vitals { flat_advantages: true, ..healthy() }, Warning::FlatAdvantages);
        is(Vitals { truncated: 0.6, ..healthy() }, Warning::Truncated);
        let bad = Vitals { explained_variance: Some(-0.2), ..healthy() };
        assert_eq!(after([bad; 4]), []);
        assert_eq!(after([bad; 5]), [Warning::UselessCritic]);
        let unknown = Vitals { explained_variance: None, ..healthy() };
        assert_eq!(after([bad, bad, unknown, bad, bad]), [], "five running");
    }

    #[test]
    fn a_score_that_rises_while_gold_falls_or_the_models_part_is_hacking() {
        let course = |gold: f64, disagreement: f64| {
            (0..10).map(move |i| {
                let t = f64::from(i);
                let wobble = if i % 2 == 0 { 0.01 } else { -0.01 };
                Vitals {
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
        let falling = course(-0.1, 0.0).map(|v| Vitals { score: -v.score, ..v });
        assert_eq!(after(falling), [], "both fall: no hacking, only a bad run");
    }

    #[test]
    fn a_warning_is_new_once_and_again_after_it_was_gone() {
        let mut watch = Watch::default();
        let cut = Vitals { truncated: 0.9, ..healthy() };
        let new: Vec<usize> = [cut, cut, healthy(), cut].into_iter().map(|v| watch.see(v).1.len()).collect();
        assert_eq!(new, [1, 0, 0, 1]);
    }

    #[test]
    fn a_course_of_kl_that_climbs_slowly_is_no_blow_up() {
        assert_eq!(after((0..40).map(|i| Vitals { kl: 2.0 + 0.5 * f64::from(i), ..healthy() })), []);
    }

    #[test]
    fn figures_are_read_under_their_names_and_unknown_ones_say_nothing() {
        let figures: Figures = serde_json::from_str(
            r#"{"objective/kl": 3.5, "response_length": 9, "policy/entropy_avg": 1.0, "objective/scores": 0.2,
                "val/num_eos_tokens": 2, "val/explained_variance": null, "rewards/adapter/disagreement": 0.3}"#,
        )
        .unwrap();
        let vitals = Vitals::of(&figures, 8, false);
        assert_eq!((vitals.kl, vitals.length, vitals.truncated), (3.5, 9.0, 0.75));
        assert_eq!((vitals.explained_variance, vitals.gold, vitals.disagreement), (None, None, Some(0.3)));
        let nothing = Vitals::of(&Figures::new(), 8, false);
        assert_eq!(warnings(&nothing, &[nothing; 10]), []);
    }
}
