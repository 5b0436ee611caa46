//! Several reward sources as one: a weighted sum of any, or a cautious mean over adapters of one base. Knows no pipe, no
//! socket and no rule.

use std::cell::RefCell;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Answers, RewardSource};
use crate::report::{Figures, number};

/// One part of a sum.
pub struct Part<'w> {
    /// What its figures are called by.
    pub name: String,
    /// What its scores are multiplied by.
    pub weight: f64,
    /// Gives them.
    pub source: Box<dyn RewardSource + 'w>,
}

/// `sum_i weight_i * score_i`. Figures: each part's mean score as `rewards/<name>/mean`, TRL's name for it, and what else
/// the part tells.
pub struct WeightedSum<'w> {
    parts: Vec<Part<'w>>,
    means: RefCell<Vec<f64>>,
}

impl<'w> WeightedSum<'w> {
    /// Of one part or more.
    pub fn new(parts: Vec<Part<'w>>) -> Self {
        Self { means: RefCell::new(vec![f64::NAN; parts.len()]), parts }
    }
}

impl RewardSource for WeightedSum<'_> {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let mut sums = vec![0f64; answers.responses.len()];
        for (part, mean) in self.parts.iter().zip(self.means.borrow_mut().iter_mut()) {
            let scores = part.source.scores(answers)?;
            ensure!(scores.len() == sums.len(), "{} gave {} scores for {}", part.name, scores.len(), sums.len());
            for (sum, &score) in sums.iter_mut().zip(&scores) {
                *sum += part.weight * f64::from(score);
            }
            *mean = scores.iter().map(|&s| f64::from(s)).sum::<f64>() / scores.len() as f64;
        }
        Ok(sums.into_iter().map(|s| s as f32).collect())
    }

    fn figures(&self) -> Figures {
        let mut figures = Figures::new();
        for (part, &mean) in self.parts.iter().zip(self.means.borrow().iter()) {
            figures.insert(format!("rewards/{}/mean", part.name), number(mean));
            let more = part.source.figures().into_iter();
            figures.extend(more.map(|(key, value)| (format!("rewards/{}/{key}", part.name), value)));
        }
        figures
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

/// `mean - std_coef * deviation` over reward models: an answer on which they disagree is worth less, so that a policy
/// gains little where one of them can be fooled. The deviation divides by their number. Source: arXiv:2310.02743.
pub struct Ensemble<'w> {
    members: Vec<Box<dyn RewardSource + 'w>>,
    std_coef: f64,
    disagreement: RefCell<f64>,
}

impl<'w> Ensemble<'w> {
    /// Of two members or more, to mean anything.
    pub fn new(members: Vec<Box<dyn RewardSource + 'w>>, std_coef: f64) -> Self {
        Self { members, std_coef, disagreement: RefCell::new(f64::NAN) }
    }
}

impl RewardSource for Ensemble<'_> {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let all = self.members.iter().map(|m| m.scores(answers)).collect::<Result<Vec<_>>>()?;
        let (mut scores, mut disagreement) = (Vec::with_capacity(answers.responses.len()), 0.0);
        for i in 0..answers.responses.len() {
            let (mean, deviation) = mean_and_deviation(all.iter().map(|member| f64::from(member[i])));
            scores.push((mean - self.std_coef * deviation) as f32);
            disagreement += deviation / answers.responses.len() as f64;
        }
        *self.disagreement.borrow_mut() = disagreement;
        Ok(scores)
    }

    fn figures(&self) -> Figures {
        Figures::from_iter([("disagreement".to_owned(), number(*self.disagreement.borrow()))])
    }
}

fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
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
        fn scores(&self, _: &Answers<'_>) -> Result<Vec<f32>> {
            Ok(self.0.clone())
        }

        fn figures(&self) -> Figures {
            Figures::from_iter([("bad_scores".to_owned(), 3.into())])
        }
    }

    fn asked() -> (Vec<Vec<u32>>, Vec<Response>) {
        let response = |tokens: &[u32]| Response {
            tokens: tokens.to_vec(),
            logprobs: vec![0.0; tokens.len()],
            finish: FinishReason::Length,
        };
        (vec![vec![1, 2], vec![3]], vec![response(&[4, 5]), response(&[6])])
    }

    #[test]
    fn a_weighted_sum_adds_its_parts_and_tells_each_ones_mean() {
        let part = |name: &str, weight, scores: [f32; 2]| Part {
            name: name.into(),
            weight,
            source: Box::new(Fixed(scores.to_vec())),
        };
        let sum = WeightedSum::new(vec![part("a", 1.0, [1.0, 2.0]), part("b", -0.5, [4.0, 8.0])]);
        let (prompts, responses) = asked();
        let answers = Answers { prompts: &prompts, responses: &responses, decode: &|_| String::new() };
        assert_eq!(sum.scores(&answers).unwrap(), [-1.0, -2.0]);
        let figures = sum.figures();
        assert_eq!((&figures["rewards/a/mean"], &figures["rewards/b/mean"]), (&1.5.into(), &6.0.into()));
        assert_eq!(figures["rewards/b/bad_scores"], 3);
        let wrong = WeightedSum::new(vec![Part { source: Box::new(Fixed(vec![1.0])), ..part("c", 1.0, [0.0; 2]) }]);
        assert!(wrong.scores(&answers).unwrap_err().to_string().contains("c gave 1 scores for 2"));
    }

    #[test]
    fn an_ensemble_is_its_members_mean_less_their_deviation() {
        let base = tiny_base();
        let adapters = [adapter(&base, None, 3), adapter(&base, None, 4), adapter(&base, None, 5)];
        let members: Vec<_> = adapters.iter().map(|a| RewardModel(ValueModel::new(&base, a).unwrap())).collect();
        let (prompts, responses) = asked();
        let answers = Answers { prompts: &prompts, responses: &responses, decode: &|_| String::new() };
        let alone: Vec<Vec<f32>> = members.iter().map(|m| m.scores(&answers).unwrap()).collect();
        let boxed = || members.iter().map(|&m| Box::new(m) as Box<dyn RewardSource>).collect();
        let bold = Ensemble::new(boxed(), 0.0).scores(&answers).unwrap();
        let cautious = Ensemble::new(boxed(), 2.0);
        let scores = cautious.scores(&answers).unwrap();
        let mut disagreement = 0.0;
        for i in 0..2 {
            let x: Vec<f64> = alone.iter().map(|s| f64::from(s[i])).collect();
            let mean = x.iter().sum::<f64>() / 3.0;
            let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
            assert!((f64::from(bold[i]) - mean).abs() < 1e-6);
            assert!((f64::from(scores[i]) - (mean - 2.0 * deviation)).abs() < 1e-6 && deviation > 1e-3);
            disagreement += deviation / 2.0;
        }
        assert!((cautious.figures()["disagreement"].as_f64().unwrap() - disagreement).abs() < 1e-6);
    }
}
