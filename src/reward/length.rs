//! How far a reward model's scores follow the length of a response. Raters like longer responses, so a model may learn length
//! alone, and a policy then learns to write at length. Pure functions of numbers; it does not depend on the model. Read
//! `train.rs` for where they are logged.

use serde_json::{Map, Value};

use crate::report::number;

/// Scores against lengths, over the responses of comparisons.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LengthReport {
    /// Pearson's correlation of score and length over all responses; NaN where either is constant.
    pub correlation: f64,
    /// Share of pairs with the higher score for the better response, among those whose better response is the shorter one;
    /// NaN without such a pair.
    pub accuracy_chosen_shorter: f64,
    /// The same among those whose better response is the longer one.
    pub accuracy_chosen_longer: f64,
}

impl LengthReport {
    /// `scores` and `lengths`: one list per comparison, best response first; lengths in tokens.
    pub fn of(scores: &[Vec<f32>], lengths: &[Vec<usize>]) -> Self {
        let (mut points, mut shorter, mut longer) = (vec![], [0usize; 2], [0usize; 2]);
        for (scores, lengths) in scores.iter().zip(lengths) {
            points.extend(scores.iter().zip(lengths).map(|(&score, &length)| (f64::from(score), length as f64)));
            for i in 0..scores.len() {
                for j in i + 1..scores.len() {
                    let counts = match lengths[i].cmp(&lengths[j]) {
                        std::cmp::Ordering::Less => &mut shorter,
                        std::cmp::Ordering::Greater => &mut longer,
                        std::cmp::Ordering::Equal => continue,
                    };
                    counts[0] += usize::from(scores[i] > scores[j]);
                    counts[1] += 1;
                }
            }
        }
        let share = |[right, all]: [usize; 2]| right as f64 / all as f64;
        Self {
            correlation: correlation(&points),
            accuracy_chosen_shorter: share(shorter),
            accuracy_chosen_longer: share(longer),
        }
    }

    /// `(accuracy_chosen_shorter + accuracy_chosen_longer) / 2`: the accuracy if the better response were as often the shorter
    /// as the longer one. Scores that follow length alone have 1/2, whichever way they follow it. Pairs of equal length are
    /// not counted; NaN without a pair of either kind.
    pub fn controlled(&self) -> f64 {
        (self.accuracy_chosen_shorter + self.accuracy_chosen_longer) / 2.0
    }

    /// The numbers by their names in metrics, `prefix` before each; null where one is NaN.
    pub fn named(&self, prefix: &str) -> Map<String, Value> {
        [
            ("score_length_correlation", self.correlation),
            ("accuracy_chosen_shorter", self.accuracy_chosen_shorter),
            ("accuracy_chosen_longer", self.accuracy_chosen_longer),
            ("length_controlled_accuracy", self.controlled()),
        ]
        .map(|(name, value)| (format!("{prefix}{name}"), number(value)))
        .into_iter()
        .collect()
    }
}

/// `sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2)`.
fn correlation(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / n, y + point.1 / n));
    let sum = |of: fn(f64, f64) -> f64| points.iter().map(|point| of(point.0 - x, point.1 - y)).sum::<f64>();
    let (xy, xx, yy) = (sum(|x, y| x * y), sum(|x, _| x * x), sum(|_, y| y * y));
    if xx > 0.0 && yy > 0.0 { xy / (xx * yy).sqrt() } else { f64::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_that_is_the_length_correlates_fully_and_controlled_is_a_coin() {
        let lengths = vec![vec![5, 2], vec![3, 9], vec![7, 1], vec![4, 4]];
        let of_length: Vec<Vec<f32>> =
            lengths.iter().map(|l| l.iter().map(|&l| 0.5 * l as f32 - 3.0).collect()).collect();
        let found = LengthReport::of(&of_length, &lengths);
        assert!((found.correlation - 1.0).abs() < 1e-12, "{found:?}");
        assert_eq!((found.accuracy_chosen_shorter, found.accuracy_chosen_longer, found.controlled()), (0.0, 1.0, 0.5));
        let against: Vec<Vec<f32>> = of_length.iter().map(|s| s.iter().map(|s| -s).collect()).collect();
        let found = LengthReport::of(&against, &lengths);
        assert!((found.correlation + 1.0).abs() < 1e-12 && found.controlled() == 0.5, "{found:?}");
    }

    #[test]
    fn pairs_are_told_apart_by_which_response_is_the_shorter_and_ties_of_length_left_out() {
        // The pairs of the first: 1 > 0 (shorter, right), 1 against 2 (longer, wrong), 0 against 2 (longer, wrong). Of the
        // second: longer, right. The third has equal lengths.
        let scores = [vec![1.0, 0.0, 2.0], vec![3.0, -1.0], vec![0.0, 1.0]];
        let lengths = [vec![4, 6, 2], vec![8, 5], vec![3, 3]];
        let found = LengthReport::of(&scores, &lengths);
        assert_eq!((found.accuracy_chosen_shorter, found.accuracy_chosen_longer), (1.0, 1.0 / 3.0));
        assert_eq!(found.controlled(), (1.0 + 1.0 / 3.0) / 2.0);
        // numpy.corrcoef([1, 0, 2, 3, -1, 0, 1], [4, 6, 2, 8, 5, 3, 3])[0, 1]
        assert!((found.correlation - CORRELATION).abs() < 1e-12, "{found:?}");
        let named = found.named("eval_");
        assert_eq!(named["eval_accuracy_chosen_shorter"], 1.0);
        assert_eq!(named.len(), 4);
    }

    const CORRELATION: f64 = 0.205_195_670_417_030_8;

    #[test]
    fn what_cannot_be_told_is_null() {
        for (scores, lengths) in
            [(vec![vec![1.0, 0.0]], vec![vec![3, 3]]), (vec![vec![1.0, 1.0]], vec![vec![3, 4]]), (vec![], vec![])]
        {
            let named = LengthReport::of(&scores, &lengths).named("");
            assert!(named["score_length_correlation"].is_null() && named["length_controlled_accuracy"].is_null());
        }
    }
}
