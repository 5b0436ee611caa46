//! Records -> the examples of each phase under `compat = "dschat"`. The arithmetic is in dschat.rs; this puts a record's
//! texts through it. Knows no file. Read phases.rs next.

use anyhow::{Result, bail};

use crate::config::{Compat, Data};
use crate::data::examples::dschat;
use crate::data::examples::objectives::{RankedExample, SftExample, TextEncoder};
use crate::data::examples::render::Renderer;
use crate::data::{Record, Text};

/// DeepSpeed-Chat's split of the records over SFT, reward model and PPO.
pub(crate) const DEFAULT_SPLIT: &str = "2,4,4";

/// A phase, in the order of `data_split`.
#[derive(Clone, Copy)]
pub enum Part {
    /// Supervised fine-tuning.
    Sft = 0,
    /// Reward modelling.
    Reward = 1,
    /// Prompts to answer.
    Ppo = 2,
}

/// An example and whether it was cut, or why there is none.
pub(crate) type Made<T> = Result<(T, bool), String>;

/// Which records a phase gets of sources of so many `records` each, as numbers over all sources: all, or under `compat`
/// those that DeepSpeed-Chat gives it, in its order. It splits every set by itself, and shuffles what comes of several
/// once more.
///
/// # Errors
/// Those of [`dschat::phase_rows`].
pub(crate) fn rows_of(records: &[usize], data: &Data, part: Option<Part>) -> Result<Vec<usize>> {
    let (Some(Compat::Dschat), Some(part)) = (data.compat, part) else {
        return Ok((0..records.iter().sum()).collect());
    };
    let shares = dschat::shares(data.data_split.as_deref().unwrap_or(DEFAULT_SPLIT))
        .map_err(|fault| crate::invalid!("[data] data_split: {fault}"))?;
    let (mut rows, mut first) = (vec![], 0);
    for &records in records {
        let of_set = dschat::phase_rows(data.seed, records, &shares, part as usize)?;
        rows.extend(of_set.into_iter().map(|row| first + row as usize));
        first += records;
    }
    if records.len() > 1 {
        let order = dschat::shuffled_rows(data.seed, rows.len())?;
        rows = order.into_iter().map(|at| rows[at as usize]).collect();
    }
    Ok(rows)
}

/// Prompt, answer and the tokenizer's end, learnt at every token: there is no mask of the prompt.
pub(crate) fn sft(
    record: &Record,
    renderer: &Renderer,
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<Made<SftExample>> {
    let text = match record {
        Record::LanguageModeling(Text::Verbatim(text)) => text.clone(),
        Record::LanguageModeling(Text::Dialogue(turns)) => renderer.whole(turns)?,
        Record::PromptCompletion { prompt, completion: answer }
        | Record::Unpaired { prompt, completion: answer, label: true } => joined(renderer, prompt, answer)?,
        Record::Ranked { prompt, answers } => joined(renderer, prompt, &answers[0])?,
        Record::Unpaired { label: false, .. } => return Ok(Err("judged bad".to_owned())),
        Record::PromptOnly(_) => bail!("SFT needs an answer, and a prompt_only record has none"),
    };
    let whole = dschat::sequence(&text, encoder.eos_text(), usize::MAX, encoder)?;
    let tokens = whole[..whole.len().min(data.max_length)].to_vec();
    if tokens.len() < 2 {
        return Ok(Err("of a single token".to_owned()));
    }
    let loss_mask = (0..tokens.len()).map(|place| place > 0).collect();
    let cut = tokens.len() < whole.len();
    Ok(Ok((SftExample { tokens, loss_mask }, cut)))
}

/// Both sequences from where they differ, each with `<|endoftext|>` behind it as the tokenizer reads that text.
pub(crate) fn ranked(
    record: &Record,
    renderer: &Renderer,
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<Made<RankedExample>> {
    let Record::Ranked { prompt, answers } = record else {
        bail!("reward modelling needs comparisons, and this record is {}", record.kind());
    };
    let mut cut = false;
    let mut sequence = |answer| -> Result<Vec<u32>> {
        let text = joined(renderer, prompt, answer)?;
        let mut tokens = dschat::sequence(&text, dschat::REWARD_END, usize::MAX, encoder)?;
        cut |= tokens.len() > data.max_length;
        tokens.truncate(data.max_length);
        Ok(tokens)
    };
    // DeepSpeed-Chat compares two: of a longer ranking the best and the worst.
    let (chosen, rejected) = (sequence(&answers[0])?, sequence(&answers[answers.len() - 1])?);
    // Equal ones stay: a constant loss without gradient, which counts among its batch's and is never right.
    let (prompt, answers) = dschat::diverge(chosen, rejected);
    match prompt.is_empty() {
        true => Ok(Err("with answers that share no first token".to_owned())),
        false => Ok(Ok((RankedExample { prompt, answers: answers.into() }, cut))),
    }
}

/// A prompt's text and its tokens, filtered where they are too many.
pub(crate) fn prompt(
    prompt: &Text,
    renderer: &Renderer,
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<Result<(Vec<u32>, String), String>> {
    let text = renderer.prompt(prompt)?;
    Ok(match dschat::prompt(&text, data.max_prompt_length, encoder)? {
        Some(tokens) if tokens.is_empty() => bail!("the prompt has no token"),
        Some(tokens) => Ok((tokens, text)),
        None => Err(format!("longer than max_prompt_length = {} (filtered)", data.max_prompt_length)),
    })
}

fn joined(renderer: &Renderer, prompt: &Text, answer: &Text) -> Result<String> {
    match (prompt, answer) {
        (Text::Dialogue(turns), Text::Dialogue(more)) => renderer.whole(&[turns.as_slice(), more].concat()),
        _ => {
            let (mut text, segments) = renderer.answer(prompt, answer)?;
            segments.iter().for_each(|segment| text.push_str(&segment.text));
            Ok(text)
        }
    }
}
