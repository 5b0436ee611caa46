//! Which examples train and which are held out. Those of one prompt stay together: a model that has seen a prompt's
//! answers in training must not be judged on it. Pure. Read pipeline.rs next.

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use crate::config::EvalSize;
use crate::data::{Message, Record, Text};
use crate::invalid;
use crate::rng::derive;

/// A stream of its own, so that the split does not follow from, or change, any other draw of the run.
const STREAM: u64 = 0x0073_706c_6974;

/// The same for records that ask the same: a hash of the prompt, or of the whole where there is none. A plain prompt
/// equals one user turn of the same words.
pub(crate) fn group(record: &Record) -> u64 {
    let mut hash = Sha256::new();
    let mut turn = |role: &str, content: &str| {
        // Lengths keep the borders: no two lists of turns hash the same bytes.
        for part in [role, content] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    };
    let (text, until_answer) = match record {
        Record::LanguageModeling(text) => (text, true),
        Record::PromptCompletion { prompt, .. }
        | Record::Ranked { prompt, .. }
        | Record::Unpaired { prompt, .. }
        | Record::PromptOnly(prompt) => (prompt, false),
    };
    match text {
        Text::Verbatim(text) => turn("user", text),
        Text::Dialogue(turns) => {
            for Message { role, content } in turns.iter().take_while(|t| !until_answer || t.role != "assistant") {
                turn(role, content);
            }
        }
    }
    let digest = hash.finalize();
    digest.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// (training, held-out) rows of `groups`: disjoint, together everything, each in the original order, no group on both
/// sides, the same for the same seed and groups. Groups are held out whole, in a shuffled order, as long as they fit: the
/// held-out part is as large as asked where no group is larger than one, else it may be a little smaller. A fraction above
/// 0 asks for at least one row and leaves at least one. Takes 16 bytes a row while it runs.
///
/// # Errors
/// Nothing would be left to train on.
pub fn split(groups: impl ExactSizeIterator<Item = u64>, eval: EvalSize, seed: u64) -> Result<(Vec<u32>, Vec<u32>)> {
    let n = groups.len();
    ensure!(u32::try_from(n).is_ok(), "{n} examples are more than a run can number");
    let mut room = match eval {
        EvalSize::Rows(rows) if rows >= n => {
            return Err(invalid!("[data] eval_rows = {rows} leaves nothing of {n} examples to train on; use fewer"));
        }
        EvalSize::Rows(rows) => rows,
        EvalSize::Fraction(fraction) if fraction > 0.0 && n >= 2 => {
            ((n as f64 * fraction).round() as usize).clamp(1, n - 1)
        }
        EvalSize::Fraction(_) => 0,
    };
    if room == 0 {
        return Ok(((0..n as u32).collect(), vec![]));
    }
    let mut shuffled: Vec<(u64, u32)> = groups.map(|group| derive(seed, &[STREAM, group])).zip(0..).collect();
    shuffled.sort_unstable();
    let mut held_out = vec![];
    for group in shuffled.chunk_by(|a, b| a.0 == b.0) {
        if group.len() <= room {
            held_out.extend(group.iter().map(|(_, row)| *row));
            room -= group.len();
        }
        if room == 0 {
            break;
        }
    }
    drop(shuffled);
    held_out.sort_unstable();
    let mut next = held_out.iter().copied().peekable();
    let train = (0..n as u32).filter(|row| next.next_if_eq(row).is_none()).collect();
    Ok((train, held_out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use std::collections::BTreeSet;

    #[test]
    fn the_parts_are_disjoint_cover_everything_and_depend_on_the_seed_alone() {
        let everyone_apart = || 0..100u64;
        for (size, expected) in [(EvalSize::Fraction(0.05), 5), (EvalSize::Rows(17), 17), (EvalSize::Fraction(0.0), 0)]
        {
            let groups = || everyone_apart().collect::<Vec<_>>().into_iter();
            let (train, held_out) = split(groups(), size, 3).unwrap();
            assert_eq!(held_out.len(), expected);
            let mut all = [&train[..], &held_out].concat();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
            assert_eq!((train, held_out.clone()), split(groups(), size, 3).unwrap());
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
                let (train, held_out) = split(groups.iter().copied(), EvalSize::Rows(20), seed).unwrap();
                assert_eq!(train.len() + held_out.len(), 200);
                assert!((10..=20).contains(&held_out.len()), "{}", held_out.len());
                let of = |rows: &[u32]| rows.iter().map(|&r| groups[r as usize]).collect::<BTreeSet<_>>();
                assert!(of(&train).is_disjoint(&of(&held_out)));
            }
        }
    }

    #[test]
    fn something_is_always_left_to_train_on() {
        let two = || [1u64, 2].into_iter();
        assert_eq!(split(two(), EvalSize::Fraction(0.01), 0).unwrap().1.len(), 1);
        assert_eq!(split(two(), EvalSize::Fraction(0.99), 0).unwrap().0.len(), 1);
        assert_eq!(split([1u64].into_iter(), EvalSize::Fraction(0.5), 0).unwrap(), (vec![0], vec![]));
        let message = split(two(), EvalSize::Rows(2), 0).unwrap_err().to_string();
        assert!(message.contains("eval_rows = 2 leaves nothing of 2 examples"), "{message}");
    }

    #[test]
    fn a_prompt_is_known_again_in_every_kind_of_record() {
        let dialogue = |turns: &[(&str, &str)]| {
            Text::Dialogue(turns.iter().map(|(role, content)| Message::new(*role, *content)).collect())
        };
        let text = |text: &str| Text::Verbatim(text.to_owned());
        let asked = group(&Record::PromptOnly(text("why?")));
        let answers = vec![dialogue(&[("assistant", "a")]), dialogue(&[("assistant", "b")])];
        assert_eq!(group(&Record::Ranked { prompt: dialogue(&[("user", "why?")]), answers }), asked);
        let whole = dialogue(&[("user", "why?"), ("assistant", "x"), ("user", "and?"), ("assistant", "y")]);
        assert_eq!(group(&Record::LanguageModeling(whole)), asked);
        assert_ne!(group(&Record::PromptOnly(dialogue(&[("system", "s"), ("user", "why?")]))), asked);
        assert_ne!(group(&Record::PromptOnly(text("why"))), asked);
    }
}
