//! Summary statistics: means with standard errors, proportions with confidence intervals, and distinct-n.
//!
//! Evaluations report them, so that a reader can judge a difference between runs. It does not depend on what was measured.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
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

/// Bins of a [`Histogram`].
const BINS: usize = 20;

/// A distribution in bins of equal width from the least to the greatest value, as metrics.jsonl has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// The least value.
    pub min: f64,
    /// The greatest value.
    pub max: f64,
    /// Number of values.
    pub num: usize,
    /// Sum of the values.
    pub sum: f64,
    /// Sum of the values' squares.
    pub sum_squares: f64,
    /// Values in each bin; one bin if all values are equal.
    pub counts: Vec<usize>,
}

impl Histogram {
    /// The distribution of the values that are finite; `None` if there is none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        let min = values.iter().copied().min_by(f64::total_cmp)?;
        let max = values.iter().copied().max_by(f64::total_cmp)?;
        let bins = if max > min { BINS } else { 1 };
        let mut counts = vec![0; bins];
        for value in &values {
            let bin = ((value - min) / (max - min) * bins as f64) as usize; // of equal values, NaN, which is bin 0
            counts[bin.min(bins - 1)] += 1;
        }
        let (sum, sum_squares) = (values.iter().sum(), values.iter().map(|v| v * v).sum());
        Some(Self { min, max, num: values.len(), sum, sum_squares, counts })
    }

    /// The object of metrics.jsonl.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Reads the object of metrics.jsonl; `None` if it is none.
    pub fn from_json(value: &Value) -> Option<Self> {
        Self::deserialize(value).ok().filter(|found| !found.counts.is_empty())
    }

    /// Lower and upper end of the bin `i`.
    pub fn bin(&self, i: usize) -> (f64, f64) {
        let width = (self.max - self.min) / self.counts.len() as f64;
        let upper = if i + 1 == self.counts.len() { self.max } else { self.min + width * (i + 1) as f64 };
        (self.min + width * i as f64, upper)
    }

    /// The mean's 95% interval by the normal approximation; `None` for fewer than two values.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let n = self.num as f64;
        let mean = self.sum / n;
        let variance = (self.sum_squares - n * mean * mean).max(0.0) / (n - 1.0);
        let half = 1.96 * (variance / n).sqrt();
        (self.num > 1).then_some((mean - half, mean + half))
    }
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
    fn a_histogram_has_every_finite_value_once_and_the_interval_of_their_mean() {
        let values: Vec<f64> = (0..40).map(f64::from).chain([f64::NAN, f64::INFINITY]).collect();
        let found = Histogram::of(values.iter().copied()).unwrap();
        assert_eq!((found.num, found.min, found.max, found.counts.len()), (40, 0.0, 39.0, 20));
        assert_eq!(found.counts.iter().sum::<usize>(), 40);
        assert!(found.counts.iter().all(|&count| count == 2), "{found:?}");
        assert_eq!((found.bin(0).0, found.bin(19).1), (0.0, 39.0));
        let (low, high) = found.interval().unwrap();
        let half = 1.96 * standard_error(&values[..40]);
        assert!((low - (19.5 - half)).abs() < 1e-9 && (high - (19.5 + half)).abs() < 1e-9);
        assert_eq!(Histogram::from_json(&found.to_json()), Some(found));
        assert_eq!(Histogram::of([2.0; 3]).unwrap().counts, [3]);
        assert_eq!(Histogram::of([f64::NAN]), None);
    }

    #[test]
    fn repeated_n_grams_lower_distinct_n() {
        assert_eq!(distinct_n(&[vec![1u32, 2, 3], vec![4, 5]], 2), 1.0);
        assert_eq!(distinct_n(&[vec![1u32, 2, 1, 2, 1]], 2), 0.5);
        assert_eq!(distinct_n(&[vec![7u32], vec![7]], 1), 0.5);
        assert!(distinct_n(&[vec![7u32]], 2).is_nan());
    }
}
