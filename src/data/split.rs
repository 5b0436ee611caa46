//! Which records train and which are held out. Pure. Read phases.rs next.

use anyhow::Result;

use crate::config::EvalSize;
use crate::invalid;
use crate::rng::{SplitMix64, derive};

/// Splits into (train, eval): disjoint, together everything, each in the original order, the same for the same seed and
/// number of records. A fraction above 0 holds out at least one record and leaves at least one.
///
/// # Errors
/// Nothing would be left to train on.
pub fn split<T>(records: Vec<T>, eval: EvalSize, seed: u64) -> Result<(Vec<T>, Vec<T>)> {
    let n = records.len();
    let held_out = match eval {
        EvalSize::Rows(rows) if rows >= n => {
            return Err(invalid!("[data] eval_rows = {rows} leaves nothing of {n} records to train on; use fewer"));
        }
        EvalSize::Rows(rows) => rows,
        EvalSize::Fraction(fraction) if fraction > 0.0 && n >= 2 => {
            ((n as f64 * fraction).round() as usize).clamp(1, n - 1)
        }
        EvalSize::Fraction(_) => 0,
    };
    let mut is_eval = vec![false; n];
    // A stream of its own, so that the split does not follow from, or change, any other draw of the run.
    for &index in &SplitMix64::new(derive(seed, &[0x73706c6974])).permutation(n)[..held_out] {
        is_eval[index] = true;
    }
    let mut parts = (Vec::with_capacity(n - held_out), Vec::with_capacity(held_out));
    for (record, is_eval) in records.into_iter().zip(is_eval) {
        if is_eval { parts.1.push(record) } else { parts.0.push(record) }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_disjoint_cover_everything_and_depend_on_the_seed_alone() {
        for (size, expected) in [(EvalSize::Fraction(0.05), 5), (EvalSize::Rows(17), 17), (EvalSize::Fraction(0.0), 0)]
        {
            let (train, eval) = split((0..100).collect(), size, 3).unwrap();
            assert_eq!(eval.len(), expected);
            let mut all: Vec<i32> = train.iter().chain(&eval).copied().collect();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
            assert_eq!((train, eval.clone()), split((0..100).collect(), size, 3).unwrap());
            if expected > 0 {
                assert_ne!(eval, split((0..100).collect(), size, 4).unwrap().1);
                assert_ne!(eval, (0..expected as i32).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn something_is_always_left_to_train_on() {
        assert_eq!(split(vec![1, 2], EvalSize::Fraction(0.01), 0).unwrap().1.len(), 1);
        assert_eq!(split(vec![1, 2], EvalSize::Fraction(0.99), 0).unwrap().0.len(), 1);
        assert_eq!(split(vec![1], EvalSize::Fraction(0.5), 0).unwrap(), (vec![1], vec![]));
        let message = split(vec![1, 2], EvalSize::Rows(2), 0).unwrap_err().to_string();
        assert!(message.contains("eval_rows = 2 leaves nothing of 2 records"), "{message}");
    }
}
