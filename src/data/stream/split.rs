//! The split into training and held-out examples.
//!
//! All examples of one prompt are on the same side: a model must not be evaluated on a prompt whose responses it was
//! trained on. This file does not depend on `examples`. Read `data/stream/cache.rs` next.

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use crate::config::EvalSize;
use crate::data::record::{Record, Text};
use crate::error::counted;
use crate::invalid;
use crate::rng::derive;
use crate::tokenizer::chat_template::Message;

/// The split's own random stream, independent of every other draw of the run.
const STREAM: u64 = 0x0073_706c_6974;

/// The group of a record, which is equal for records with the same prompt: a hash of the prompt, or of the whole text
/// if there is none. A verbatim prompt equals one user turn with the same text.
pub(crate) fn group(record: &Record) -> u64 {
    let mut hash = Sha256::new();
    let mut turn = |role: &str, content: &str| {
        // With the lengths, different lists of turns never hash the same bytes.
        for part in [role, content] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    };
    let (text, until_response) = match record {
        Record::LanguageModeling(text) => (text, true),
        Record::PromptCompletion { prompt, .. }
        | Record::Ranked { prompt, .. }
        | Record::Unpaired { prompt, .. }
        | Record::PromptOnly(prompt) => (prompt, false),
    };
    match text {
        Text::Verbatim(text) => turn("user", text),
        Text::Dialogue(turns) => {
            for Message { role, content, .. } in turns.iter().take_while(|t| !until_response || t.role != "assistant") {
                turn(role, content);
            }
        }
    }
    let digest = hash.finalize();
    digest.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Training rows, held-out rows, and the number of groups if it was counted.
pub type Split = (Vec<u32>, Vec<u32>, Option<usize>);

/// Training and held-out rows of `groups`, and how many groups there are if rows are held out. The rows are disjoint, complete,
/// each in the original order, with no group on both sides, and the same for the same seed and groups. Whole groups are held
/// out, in a shuffled order, while they fit: the held-out part has the requested size if every group has one row, otherwise
/// it may be smaller. It is never larger than the training part, whatever size is requested. A fraction above 0 holds out at
/// least one row. Memory: 16 bytes per row during the call.
///
/// # Errors
/// No row would remain for training.
pub fn split(groups: impl ExactSizeIterator<Item = u64>, eval: EvalSize, seed: u64) -> Result<Split> {
    let n = groups.len();
    ensure!(u32::try_from(n).is_ok(), "{n} examples are more than the 4294967295 that a run can have");
    let mut remaining = match eval {
        EvalSize::Rows(rows) if rows >= n => {
            let examples = counted(n, "example");
            return Err(invalid!("[data] eval_rows = {rows} leaves nothing of {examples} to train on; use fewer"));
        }
        EvalSize::Rows(rows) => rows,
        EvalSize::Fraction(fraction) if fraction > 0.0 && n >= 2 => {
            ((n as f64 * fraction).round() as usize).clamp(1, n - 1)
        }
        EvalSize::Fraction(_) => 0,
    };
    // Evaluation must not starve training.
    remaining = remaining.min(n / 2);
    if remaining == 0 {
        return Ok(((0..n as u32).collect(), vec![], None));
    }
    let mut shuffled: Vec<(u64, u32)> = groups.map(|group| derive(seed, &[STREAM, group])).zip(0..).collect();
    shuffled.sort_unstable();
    let number = shuffled.chunk_by(|a, b| a.0 == b.0).count();
    let mut held_out = vec![];
    for group in shuffled.chunk_by(|a, b| a.0 == b.0) {
        if group.len() <= remaining {
            held_out.extend(group.iter().map(|(_, row)| *row));
            remaining -= group.len();
        }
        if remaining == 0 {
            break;
        }
    }
    drop(shuffled);
    held_out.sort_unstable();
    let mut next = held_out.iter().copied().peekable();
    let train = (0..n as u32).filter(|row| next.next_if_eq(row).is_none()).collect();
    Ok((train, held_out, Some(number)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use std::collections::BTreeSet;

    #[test]
    fn the_parts_are_disjoint_complete_and_the_same_for_the_same_seed() {
        let distinct_groups = || 0..100u64;
        for (size, expected) in [(EvalSize::Fraction(0.05), 5), (EvalSize::Rows(17), 17), (EvalSize::Fraction(0.0), 0)]
        {
            let groups = || distinct_groups().collect::<Vec<_>>().into_iter();
            let (train, held_out, prompts) = split(groups(), size, 3).unwrap();
            assert_eq!(prompts, (expected > 0).then_some(100));
            assert_eq!(held_out.len(), expected);
            let mut all = [&train[..], &held_out].concat();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
            assert_eq!((train, held_out.clone(), prompts), split(groups(), size, 3).unwrap());
            if expected > 0 {
                assert_ne!(held_out, split(groups(), size, 4).unwrap().1);
                assert_ne!(held_out, (0..expected as u32).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn examples_of_one_prompt_stay_on_one_side() {
        let mut rng = SplitMix64::new(1);
        for most in [1, 2, 5] {
            let groups: Vec<u64> = (0..200).map(|_| rng.below(200 / most) as u64).collect();
            for seed in 0..20 {
                let (train, held_out, prompts) = split(groups.iter().copied(), EvalSize::Rows(20), seed).unwrap();
                assert_eq!(train.len() + held_out.len(), 200);
                assert!((10..=20).contains(&held_out.len()), "{}", held_out.len());
                let of = |rows: &[u32]| rows.iter().map(|&r| groups[r as usize]).collect::<BTreeSet<_>>();
                assert!(of(&train).is_disjoint(&of(&held_out)));
                assert_eq!(prompts, Some(of(&train).len() + of(&held_out).len()));
            }
        }
    }

    #[test]
    fn a_fraction_leaves_rows_for_training_and_too_many_eval_rows_are_refused() {
        let two = || [1u64, 2].into_iter();
        assert_eq!(split(two(), EvalSize::Fraction(0.01), 0).unwrap().1.len(), 1);
        assert_eq!(split(two(), EvalSize::Fraction(0.99), 0).unwrap().0.len(), 1);
        assert_eq!(split([1u64].into_iter(), EvalSize::Fraction(0.5), 0).unwrap(), (vec![0], vec![], None));
        for most in [EvalSize::Rows(6), EvalSize::Fraction(0.9)] {
            let (train, held_out, _) = split((0..7u64).collect::<Vec<_>>().into_iter(), most, 0).unwrap();
            assert_eq!((train.len(), held_out.len()), (4, 3), "held-out rows never outnumber training rows");
        }
        let message = split(two(), EvalSize::Rows(2), 0).unwrap_err().to_string();
        assert!(message.contains("eval_rows = 2 leaves nothing of 2 examples"), "{message}");
    }

    #[test]
    fn a_prompt_has_the_same_group_in_every_type_of_record() {
        let dialogue = |turns: &[(&str, &str)]| {
            Text::Dialogue(turns.iter().map(|(role, content)| Message::new(*role, *content)).collect())
        };
        let text = |text: &str| Text::Verbatim(text.to_owned());
        let expected = group(&Record::PromptOnly(text("why?")));
        let responses = vec![dialogue(&[("assistant", "a")]), dialogue(&[("assistant", "b")])];
        assert_eq!(
            group(&Record::Ranked { prompt: dialogue(&[("user", "why?")]), responses, label: Default::default() }),
            expected
        );
        let whole = dialogue(&[("user", "why?"), ("assistant", "x"), ("user", "and?"), ("assistant", "y")]);
        assert_eq!(group(&Record::LanguageModeling(whole)), expected);
        assert_ne!(group(&Record::PromptOnly(dialogue(&[("system", "s"), ("user", "why?")]))), expected);
        assert_ne!(group(&Record::PromptOnly(text("why"))), expected);
    }
}
