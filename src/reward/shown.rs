//! What a trained reward model cannot show: warnings by the numbers of comparisons, the held-out accuracy and the scores.
//! It does not depend on the model. Read `train.rs` for where they are logged.

use super::center::{Centering, LEAST_DEVIATION};
use super::train::Evaluation;
use crate::error::counted;
use crate::stats::Share;

/// Fewer training comparisons than this teach nothing that can be shown.
const FEW: usize = 20;
/// A mean score so many deviations from 0 is outside of what centring was computed on; PPO clips scores there.
const FAR: f64 = 5.0;

/// Warnings about a model trained on `comparisons`, with its results on the held-out ones.
pub(super) fn warnings(comparisons: usize, after: &Evaluation, center: Option<&Centering>) -> Vec<String> {
    let mut warnings = vec![];
    if comparisons < FEW {
        warnings.push(format!(
            "it was trained on {}; a reward model from fewer than {FEW} has learned nothing that can \
             be shown: use more records",
            counted(comparisons, "comparison")
        ));
    }
    let accuracy = Share::of(after.accuracy, after.pairs);
    if after.pairs > 0 && accuracy.low <= 0.5 {
        warnings.push(format!(
            "its held-out accuracy of {:.3} on {} (95% interval {:.3} to {:.3}) does not differ from a coin's 0.5; \
             use more or cleaner comparisons, or train longer",
            after.accuracy,
            counted(after.pairs, "pair"),
            accuracy.low.max(0.0),
            accuracy.high.min(1.0)
        ));
    }
    if let Some(center) = center.filter(|center| !center.is_scaled) {
        warnings.push(format!(
            "center only shifts the scores: those of the training responses deviate by {:.1e}, less than {LEAST_DEVIATION}, \
             so the model separates nothing, and division would multiply its noise; train longer, or with a higher \
             learning_rate",
            center.deviation
        ));
    }
    let scores = [after.mean_chosen, after.mean_rejected];
    if let (Some(center), Some(far)) = (center, scores.into_iter().find(|score| score.abs() > FAR)) {
        warnings.push(format!(
            "the held-out responses have a mean score of {far:.1} where the training responses have 0 with a deviation of 1 \
             (raw: {:.3} and {:.3}): center was computed on responses unlike them; use more comparisons, or center = false",
            center.mean, center.deviation
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(accuracy: f64, pairs: usize) -> Evaluation {
        Evaluation { accuracy, mean_chosen: 0.8, mean_rejected: -0.8, pairs }
    }

    const USUAL: Centering = Centering { mean: 0.1, deviation: 0.9, is_scaled: true };

    #[test]
    fn a_model_that_learned_raises_no_warning_and_each_lack_its_own() {
        assert_eq!(warnings(20, &evaluation(0.7, 200), Some(&USUAL)), Vec::<String>::new());
        let one = |found: Vec<String>, says: &str| assert!(found.len() == 1 && found[0].contains(says), "{found:?}");
        one(warnings(19, &evaluation(0.7, 200), Some(&USUAL)), "19 comparisons");
        // Wilson's interval of 4 in 6 reaches from 0.30 to 0.90.
        one(warnings(100, &evaluation(4.0 / 6.0, 6), Some(&USUAL)), "0.300 to 0.903");
        let nothing = Centering { deviation: 1e-3, is_scaled: false, ..USUAL };
        one(warnings(100, &evaluation(0.9, 100), Some(&nothing)), "center only shifts");
        let far = Evaluation { mean_rejected: -26.0, ..evaluation(0.9, 100) };
        one(warnings(100, &far, Some(&USUAL)), "mean score of -26.0");
        assert!(warnings(100, &far, None).is_empty(), "raw scores have no scale");
        let none = Evaluation { accuracy: f64::NAN, mean_chosen: f64::NAN, mean_rejected: f64::NAN, pairs: 0 };
        assert!(warnings(100, &none, Some(&USUAL)).is_empty());
    }
}
