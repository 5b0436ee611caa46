//! Summary statistics: means with standard errors, proportions with confidence intervals, and distinct-n.
//!
//! Evaluations report them, so that a reader can judge a difference between runs. It does not depend on what was measured.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::report::number;

/// A proportion with its 95% confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// The proportion.
    pub rate: f64,
    /// Lower end of Wilson's score interval at z = 1.96.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Share {
    /// The proportion `rate` of `n` trials, with E. B. Wilson's score interval (1927), which is valid at 0 and 1, too, where
    /// the normal approximation is not.
    pub fn of(rate: f64, n: usize) -> Self {
        let (n, z) = (n as f64, 1.96f64);
        let z2 = z * z;
        let middle = (rate + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = z / (1.0 + z2 / n) * (rate * (1.0 - rate) / n + z2 / (4.0 * n * n)).sqrt();
        Self { rate, low: middle - half, high: middle + half }
    }

    /// Win rate of `ours` against `theirs`, pair by pair; a tie counts half. NaN for empty slices.
    pub fn of_wins(ours: &[f64], theirs: &[f64]) -> Self {
        let won = |(a, b): (&f64, &f64)| match a.total_cmp(b) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        };
        let wins: f64 = ours.iter().zip(theirs).map(won).sum();
        Self::of(wins / ours.len() as f64, ours.len())
    }
}

/// Mean of the values; NaN for an empty slice.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard error of [`mean`], from the standard deviation with n - 1; NaN for fewer than two values.
pub fn standard_error(values: &[f64]) -> f64 {
    let (n, middle) = (values.len() as f64, mean(values));
    let variance = values.iter().map(|v| (v - middle).powi(2)).sum::<f64>() / (n - 1.0);
    (variance / n).sqrt()
}

/// `{"mean", "standard_error"}`; null where a number is NaN.
pub fn mean_and_error(values: &[f64]) -> Value {
    json!({ "mean": number(mean(values)), "standard_error": number(standard_error(values)) })
}

/// distinct-n (arXiv:1510.03055): distinct n-grams of tokens over all n-grams in `texts`; 1 if none repeats, NaN if there is
/// none.
pub fn distinct_n<T: AsRef<[u32]>>(texts: &[T], n: usize) -> f64 {
    let runs = texts.iter().flat_map(|text| text.as_ref().windows(n.max(1)));
    let (mut all, mut seen) = (0usize, HashSet::new());
    for run in runs {
        all += 1;
        seen.insert(run);
    }
    seen.len() as f64 / all as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_is_wilsons_and_ties_count_half() {
        let w = Share::of_wins(&[2.0, 2.0, 4.0, 1.0], &[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(w.rate, 0.625);
        // Wilson for p = 0.625, n = 4, z = 1.96, in another arrangement.
        let (n, p, z) = (4.0f64, 0.625f64, 1.96f64);
        let centre = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z * ((p * (1.0 - p) + z * z / (4.0 * n)) / n).sqrt() / (1.0 + z * z / n);
        assert!((w.low - (centre - half)).abs() < 1e-12 && (w.high - (centre + half)).abs() < 1e-12);
        let all = Share::of(1.0, 50);
        assert!(all.low > 0.9 && all.low < 0.95 && (all.high - 1.0).abs() < 1e-12, "{all:?}");
    }

    #[test]
    fn standard_errors_shrink_with_the_square_root_of_n() {
        assert_eq!((mean(&[1.0, 3.0]), standard_error(&[1.0, 3.0])), (2.0, 1.0));
        let many: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        assert!((standard_error(&many) - 0.025).abs() < 1e-4);
        assert!(mean_and_error(&[])["mean"].is_null() && mean_and_error(&[1.0])["standard_error"].is_null());
    }

    #[test]
    fn repeated_n_grams_lower_distinct_n() {
        assert_eq!(distinct_n(&[vec![1u32, 2, 3], vec![4, 5]], 2), 1.0);
        assert_eq!(distinct_n(&[vec![1u32, 2, 1, 2, 1]], 2), 0.5);
        assert_eq!(distinct_n(&[vec![7u32], vec![7]], 1), 0.5);
        assert!(distinct_n(&[vec![7u32]], 2).is_nan());
    }
}
