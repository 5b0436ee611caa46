//! What numbers over some answers say about all: means with their errors, shares with their intervals, how varied texts
//! are. Pure; knows nothing of what was measured.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::report::number;

/// A share with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// The share itself.
    pub rate: f64,
    /// Wilson's interval at z = 1.96.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Share {
    /// Of `rate * n` among `n`, by E. B. Wilson's score interval (1927): sensible at 0 and 1, where the normal one is not.
    pub fn of(rate: f64, n: usize) -> Self {
        let (n, z) = (n as f64, 1.96f64);
        let z2 = z * z;
        let middle = (rate + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = z / (1.0 + z2 / n) * (rate * (1.0 - rate) / n + z2 / (4.0 * n * n)).sqrt();
        Self { rate, low: middle - half, high: middle + half }
    }

    /// How often `ours` beats `theirs`, answer by answer; a tie counts half. NaN of none.
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

/// NaN of none.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard error of [`mean`], from the deviation that divides by n - 1; NaN of fewer than two.
pub fn standard_error(values: &[f64]) -> f64 {
    let (n, middle) = (values.len() as f64, mean(values));
    let variance = values.iter().map(|v| (v - middle).powi(2)).sum::<f64>() / (n - 1.0);
    (variance / n).sqrt()
}

/// `{"mean", "standard_error"}`, nulls of nothing.
pub fn mean_and_error(values: &[f64]) -> Value {
    json!({ "mean": number(mean(values)), "standard_error": number(standard_error(values)) })
}

/// Different runs of `n` tokens over all runs of `n` tokens in `texts`: 1 where nothing comes twice. NaN where there is
/// none. Source: distinct-n of arXiv:1510.03055.
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
    fn an_interval_is_wilsons_and_ties_count_half() {
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
    fn errors_shrink_with_the_square_root_of_the_number() {
        assert_eq!((mean(&[1.0, 3.0]), standard_error(&[1.0, 3.0])), (2.0, 1.0));
        let many: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        assert!((standard_error(&many) - 0.025).abs() < 1e-4);
        assert!(mean_and_error(&[])["mean"].is_null() && mean_and_error(&[1.0])["standard_error"].is_null());
    }

    #[test]
    fn texts_that_repeat_are_less_distinct() {
        assert_eq!(distinct_n(&[vec![1u32, 2, 3], vec![4, 5]], 2), 1.0);
        assert_eq!(distinct_n(&[vec![1u32, 2, 1, 2, 1]], 2), 0.5);
        assert_eq!(distinct_n(&[vec![7u32], vec![7]], 1), 0.5);
        assert!(distinct_n(&[vec![7u32]], 2).is_nan());
    }
}
