//! Several reward models as one: how well the mean of their scores ranks held-out comparisons, and how far the models are
//! apart. A policy that exploits one of them leaves the others behind. Pure functions of numbers; it does not depend on the
//! model. Source: arXiv:2310.02743. Read `train.rs` for how they are trained, `source/combine.rs` for the reward.

use anyhow::Result;
use serde_json::{Value, json};

use super::source::combine::mean_and_deviation;
use super::train::{Evaluation, summarise};
use crate::report::number;

/// What the members of an ensemble make of held-out comparisons.
#[derive(Clone, Debug, PartialEq)]
pub struct Agreement {
    /// The mean of the members' scores of each response, a list per comparison with the best response first.
    pub means: Vec<Vec<f32>>,
    /// Results of these means.
    pub of_mean: Evaluation,
    /// Mean over all responses of the deviation of the members' scores, in score units.
    pub disagreement: f64,
    /// Each member's accuracy.
    pub accuracies: Vec<f64>,
}

impl Agreement {
    /// `members`: each one's scores, a list per comparison with the best response first.
    ///
    /// # Errors
    /// If a score is NaN or infinite.
    pub fn of(members: &[Vec<Vec<f32>>]) -> Result<Self> {
        let (mut means, mut deviations) = (vec![], vec![]);
        for (i, comparison) in members.first().into_iter().flatten().enumerate() {
            let of = |j: usize| mean_and_deviation(members.iter().map(move |all| f64::from(all[i][j])));
            let both: Vec<(f64, f64)> = (0..comparison.len()).map(of).collect();
            deviations.extend(both.iter().map(|(_, deviation)| *deviation));
            means.push(both.into_iter().map(|(mean, _)| mean as f32).collect::<Vec<_>>());
        }
        let accuracies = members.iter().map(|scores| Ok(summarise(scores)?.accuracy)).collect::<Result<_>>()?;
        let disagreement = deviations.iter().sum::<f64>() / deviations.len() as f64;
        Ok(Self { of_mean: summarise(&means)?, means, disagreement, accuracies })
    }

    /// Its part of the summary.
    pub fn to_json(&self) -> Value {
        json!({
            "accuracy": number(self.of_mean.accuracy),
            "disagreement": number(self.disagreement),
            "members": self.accuracies.iter().map(|&accuracy| number(accuracy)).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_the_scores_is_ranked_and_the_deviation_averaged() {
        // Two comparisons. The second member is wrong on the first one, by less than the first is right.
        let members = [vec![vec![3.0, 0.0], vec![1.0, 0.0]], vec![vec![-1.0, 0.0], vec![2.0, 1.0]]];
        let found = Agreement::of(&members).unwrap();
        assert_eq!(found.means, [[1.0, 0.0], [1.5, 0.5]]);
        assert_eq!((found.of_mean.accuracy, found.of_mean.pairs), (1.0, 2));
        assert_eq!((found.of_mean.mean_chosen, found.of_mean.mean_rejected), (1.25, 0.25));
        assert_eq!(found.accuracies, [1.0, 0.5]);
        // Deviations 2, 0, 1/2 and 1/2.
        assert_eq!(found.disagreement, 0.75);
        let one = Agreement::of(&members[..1]).unwrap();
        assert_eq!((one.disagreement, one.of_mean.mean_chosen), (0.0, 2.0));
        let none = Agreement::of(&[vec![], vec![]]).unwrap();
        assert!(none.disagreement.is_nan() && none.of_mean.accuracy.is_nan(), "nothing is held out");
    }
}
