//! Combinations of reward sources: a weighted sum of any sources, and a conservative ensemble of reward models. It does not
//! depend on how a source computes its scores. Read `command.rs` next.

use std::cell::{Cell, RefCell};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{PartScores, RewardInputs, RewardSource};
use crate::error::counted;
use crate::model::roles::ValueModel;
use crate::report::{Metrics, number};

/// One term of a weighted sum.
pub struct Part<'w> {
    /// Name in the metrics.
    pub name: String,
    /// Weight of its scores in the first iteration.
    pub weight: f64,
    /// Weight in the last one, to which it goes in a straight line; none where it stays.
    pub weight_end: Option<f64>,
    /// Source of the scores.
    pub source: Box<dyn RewardSource + 'w>,
}

impl Part<'_> {
    /// Its weight at a share of the run.
    fn weight_at(&self, share: f64) -> f64 {
        self.weight_end.map_or(self.weight, |end| self.weight + (end - self.weight) * share)
    }
}

/// `sum_i weight_i * score_i`. Metrics: each part's mean score as `rewards/<name>/mean`, TRL's name for it, its weight as
/// `rewards/<name>/weight` where it moves, and the part's own metrics.
pub struct WeightedSum<'w> {
    parts: Vec<Part<'w>>,
    last: RefCell<Vec<Vec<f32>>>,
    share: Cell<f64>,
}

impl<'w> WeightedSum<'w> {
    /// Combines one or more parts.
    pub fn new(parts: Vec<Part<'w>>) -> Self {
        Self { last: RefCell::new(vec![vec![]; parts.len()]), share: Cell::new(0.0), parts }
    }
}

impl RewardSource for WeightedSum<'_> {
    fn models(&self) -> Vec<ValueModel<'_>> {
        self.parts.iter().flat_map(|part| part.source.models()).collect()
    }

    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let mut sums = vec![0f64; inputs.responses.len()];
        for (part, last) in self.parts.iter().zip(self.last.borrow_mut().iter_mut()) {
            let scores = part.source.scores(inputs)?;
            ensure!(
                scores.len() == sums.len(),
                "{} returned {} for {}",
                part.name,
                counted(scores.len(), "score"),
                counted(sums.len(), "response")
            );
            let weight = part.weight_at(self.share.get());
            for (sum, &score) in sums.iter_mut().zip(&scores) {
                *sum += weight * f64::from(score);
            }
            *last = scores;
        }
        Ok(sums.into_iter().map(|s| s as f32).collect())
    }

    fn set_progress(&self, share: f64) {
        self.share.set(share);
        self.parts.iter().for_each(|part| part.source.set_progress(share));
    }

    fn parts(&self) -> Vec<PartScores> {
        let (last, share) = (self.last.borrow(), self.share.get());
        let both = self.parts.iter().zip(last.iter().cloned());
        both.map(|(part, scores)| PartScores { name: part.name.clone(), weight: part.weight_at(share), scores })
            .collect()
    }

    fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::new();
        for (part, scores) in self.parts.iter().zip(self.last.borrow().iter()) {
            let mean = scores.iter().map(|&s| f64::from(s)).sum::<f64>() / scores.len() as f64;
            metrics.insert(format!("rewards/{}/mean", part.name), number(mean));
            if part.weight_end.is_some() {
                metrics.insert(format!("rewards/{}/weight", part.name), number(part.weight_at(self.share.get())));
            }
            let more = part.source.metrics().into_iter();
            metrics.extend(more.map(|(key, value)| (format!("rewards/{}/{key}", part.name), value)));
        }
        metrics
    }

    fn state(&self) -> Value {
        self.parts.iter().map(|part| part.source.state()).collect()
    }

    fn restore(&self, state: &Value) {
        self.parts
            .iter()
            .zip(state.as_array().into_iter().flatten())
            .for_each(|(part, state)| part.source.restore(state));
    }
}

/// How the scores of several reward models become one. Source: arXiv:2310.02743.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aggregate {
    /// `mean - coef * deviation`, with their number as the deviation's divisor: a response on which they disagree scores lower,
    /// so that a policy gains little by exploiting one of them. (The paper takes the variance in place of the deviation.)
    MeanMinusStd(f64),
    /// The mean.
    Mean,
    /// The lowest score: worst-case optimisation.
    Min,
}

impl Aggregate {
    /// One score of those that the members give a response, and their deviation, with their number as its divisor. There is one
    /// member or more.
    pub fn of(self, scores: impl Iterator<Item = f32> + Clone) -> (f32, f64) {
        let scores = scores.map(f64::from);
        let (mean, deviation) = mean_and_deviation(scores.clone());
        let score = match self {
            Self::MeanMinusStd(coef) => mean - coef * deviation,
            Self::Mean => mean,
            Self::Min => scores.fold(f64::INFINITY, f64::min),
        };
        (score as f32, deviation)
    }
}

/// Several reward models as one source. Metrics: the mean over the last responses of the scores' deviation, `disagreement`.
pub struct Ensemble<'w> {
    members: Vec<Box<dyn RewardSource + 'w>>,
    aggregate: Aggregate,
    disagreement: RefCell<f64>,
}

impl<'w> Ensemble<'w> {
    /// Combines reward models; disagreement is meaningful for two or more.
    pub fn new(members: Vec<Box<dyn RewardSource + 'w>>, aggregate: Aggregate) -> Self {
        Self { members, aggregate, disagreement: RefCell::new(f64::NAN) }
    }
}

impl RewardSource for Ensemble<'_> {
    fn models(&self) -> Vec<ValueModel<'_>> {
        self.members.iter().flat_map(|member| member.models()).collect()
    }

    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let all = self.members.iter().map(|m| m.scores(inputs)).collect::<Result<Vec<_>>>()?;
        let (mut scores, mut disagreement) = (Vec::with_capacity(inputs.responses.len()), 0.0);
        for i in 0..inputs.responses.len() {
            let (score, deviation) = self.aggregate.of(all.iter().map(|member| member[i]));
            scores.push(score);
            disagreement += deviation / inputs.responses.len() as f64;
        }
        *self.disagreement.borrow_mut() = disagreement;
        Ok(scores)
    }

    fn metrics(&self) -> Metrics {
        Metrics::from_iter([("disagreement".to_owned(), number(*self.disagreement.borrow()))])
    }
}

pub(crate) fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    (mean, (values.map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::generate::{FinishReason, Response};
    use crate::model::gradcheck::{adapter, tiny_base};
    use crate::model::roles::ValueModel;
    use crate::reward::source::RewardModel;

    struct Fixed(Vec<f32>);

    impl RewardSource for Fixed {
        fn scores(&self, _: &RewardInputs<'_>) -> Result<Vec<f32>> {
            Ok(self.0.clone())
        }

        fn metrics(&self) -> Metrics {
            Metrics::from_iter([("bad_scores".to_owned(), 3.into())])
        }
    }

    fn responses() -> (Vec<Vec<u32>>, Vec<Response>) {
        let response = |tokens: &[u32]| Response {
            tokens: tokens.to_vec(),
            logprobs: vec![0.0; tokens.len()],
            finish: FinishReason::Length,
        };
        (vec![vec![1, 2], vec![3]], vec![response(&[4, 5]), response(&[6])])
    }

    fn inputs<'a>(prompts: &'a [Vec<u32>], responses: &'a [Response]) -> RewardInputs<'a> {
        RewardInputs { prompts, responses, entries: &[], decode: &|_| String::new(), known: &[] }
    }

    #[test]
    fn a_weighted_sum_adds_its_parts_and_reports_the_mean_of_each() {
        let part = |name: &str, weight, scores: [f32; 2]| Part {
            name: name.into(),
            weight,
            weight_end: None,
            source: Box::new(Fixed(scores.to_vec())),
        };
        let sum = WeightedSum::new(vec![part("a", 1.0, [1.0, 2.0]), part("b", -0.5, [4.0, 8.0])]);
        let (prompts, responses) = self::responses();
        let inputs = inputs(&prompts, &responses);
        assert_eq!(sum.scores(&inputs).unwrap(), [-1.0, -2.0]);
        let parts = sum.parts();
        assert_eq!((parts[1].name.as_str(), parts[1].weight, &parts[1].scores[..]), ("b", -0.5, &[4.0, 8.0][..]));
        let metrics = sum.metrics();
        assert_eq!((&metrics["rewards/a/mean"], &metrics["rewards/b/mean"]), (&1.5.into(), &6.0.into()));
        assert_eq!(metrics["rewards/b/bad_scores"], 3);
        let wrong = WeightedSum::new(vec![Part { source: Box::new(Fixed(vec![1.0])), ..part("c", 1.0, [0.0; 2]) }]);
        assert!(wrong.scores(&inputs).unwrap_err().to_string().contains("c returned 1 score for 2 responses"));
    }

    #[test]
    fn a_weight_goes_in_a_straight_line_from_the_first_iteration_to_the_last() {
        let part = |name: &str, weight, weight_end| Part {
            name: name.into(),
            weight,
            weight_end,
            source: Box::new(Fixed(vec![1.0, 2.0])),
        };
        let sum = WeightedSum::new(vec![part("moves", 2.0, Some(-1.0)), part("stays", 1.0, None)]);
        let (prompts, responses) = self::responses();
        let inputs = inputs(&prompts, &responses);
        for (share, weight) in [(0.0, 2.0), (0.5, 0.5), (1.0, -1.0)] {
            sum.set_progress(share);
            assert_eq!(sum.scores(&inputs).unwrap(), [1.0 + weight as f32, 2.0 + 2.0 * weight as f32], "{share}");
            assert_eq!(sum.parts().iter().map(|part| part.weight).collect::<Vec<_>>(), [weight, 1.0]);
            let metrics = sum.metrics();
            assert_eq!(metrics["rewards/moves/weight"], weight);
            assert!(metrics.get("rewards/stays/weight").is_none());
        }
    }

    #[test]
    fn an_ensemble_is_its_members_mean_less_their_deviation() {
        let base = tiny_base();
        let adapters = [adapter(&base, None, 3), adapter(&base, None, 4), adapter(&base, None, 5)];
        let members: Vec<_> = adapters.iter().map(|a| RewardModel(ValueModel::new(&base, a).unwrap())).collect();
        let (prompts, responses) = self::responses();
        let inputs = inputs(&prompts, &responses);
        let alone: Vec<Vec<f32>> = members.iter().map(|m| m.scores(&inputs).unwrap()).collect();
        let boxed = || members.iter().map(|&m| Box::new(m) as Box<dyn RewardSource>).collect();
        let bold = Ensemble::new(boxed(), Aggregate::Mean).scores(&inputs).unwrap();
        let worst = Ensemble::new(boxed(), Aggregate::Min).scores(&inputs).unwrap();
        let cautious = Ensemble::new(boxed(), Aggregate::MeanMinusStd(2.0));
        let scores = cautious.scores(&inputs).unwrap();
        let mut disagreement = 0.0;
        for i in 0..2 {
            let x: Vec<f64> = alone.iter().map(|s| f64::from(s[i])).collect();
            let mean = x.iter().sum::<f64>() / 3.0;
            let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
            assert!((f64::from(bold[i]) - mean).abs() < 1e-6);
            assert_eq!(worst[i], alone.iter().map(|s| s[i]).fold(f32::INFINITY, f32::min));
            assert!((f64::from(scores[i]) - (mean - 2.0 * deviation)).abs() < 1e-6 && deviation > 1e-3);
            disagreement += deviation / 2.0;
        }
        assert!((cautious.metrics()["disagreement"].as_f64().unwrap() - disagreement).abs() < 1e-6);
    }
}
