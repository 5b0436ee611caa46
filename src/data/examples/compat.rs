//! Records -> examples under `compat = "dschat"`, for each objective that DeepSpeed-Chat has.
//!
//! `dschat.rs` holds the rules for rows and tokens; this file applies them to a record's texts. It does not depend on
//! `files` or `formats`. Read `data/examples/objectives.rs` next.

use anyhow::{Result, bail};

use crate::config::{Compat, Data};
use crate::data::examples::dschat;
use crate::data::examples::dschat::Share;
use crate::data::examples::encoder::TextEncoder;
use crate::data::examples::example::{RankedExample, SftExample};
use crate::data::examples::render::Renderer;
use crate::data::examples::report::Outcome;
use crate::data::record::{PairLabel, Record, Text};

/// DeepSpeed-Chat's default split of the records into shares for SFT, reward modelling and PPO.
pub(crate) const DEFAULT_SPLIT: &str = "2,4,4";

/// The rows of the records in `share`, where `records` holds the number of records per source and a row counts over all
/// sources. Without `compat` or a share, these are all rows. DeepSpeed-Chat splits every data set by itself, and
/// shuffles the rows of several data sets once more.
///
/// # Errors
/// Those of [`dschat::share_rows`].
pub(crate) fn rows_of(records: &[usize], data: &Data, share: Option<Share>) -> Result<Vec<usize>> {
    let (Some(Compat::Dschat), Some(share)) = (data.compat, share) else {
        return Ok((0..records.iter().sum()).collect());
    };
    let shares = dschat::parse_shares(data.data_split.as_deref().unwrap_or(DEFAULT_SPLIT))
        .map_err(|fault| crate::invalid!("[data] data_split: {fault}"))?;
    let (mut rows, mut first) = (vec![], 0);
    for &records in records {
        let own = dschat::share_rows(data.seed, records, &shares, share as usize)?;
        rows.extend(own.into_iter().map(|row| first + row as usize));
        first += records;
    }
    if records.len() > 1 {
        let order = dschat::shuffled_rows(data.seed, rows.len())?;
        rows = order.into_iter().map(|at| rows[at as usize]).collect();
    }
    Ok(rows)
}

/// An SFT example: prompt, response and the tokenizer's end token, with a loss on every token but the first
/// (DeepSpeed-Chat does not mask the prompt).
pub(crate) fn sft(
    record: &Record,
    renderer: &Renderer,
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<Outcome<SftExample>> {
    let text = match record {
        Record::LanguageModeling(Text::Verbatim(text)) => text.clone(),
        Record::LanguageModeling(Text::Dialogue(turns)) => renderer.whole(turns)?,
        Record::PromptCompletion { prompt, completion: response }
        | Record::Unpaired { prompt, completion: response, label: true } => joined(renderer, prompt, response)?,
        Record::Ranked { prompt, responses, .. } => joined(renderer, prompt, &responses[0])?,
        Record::Unpaired { label: false, .. } => return Ok(Outcome::Drop("judged bad".to_owned())),
        Record::PromptOnly(_) => bail!("SFT needs a response, and a prompt_only record has none"),
    };
    let whole = dschat::sequence(&text, encoder.eos_text(), usize::MAX, encoder)?;
    let tokens = whole[..whole.len().min(data.max_length)].to_vec();
    if tokens.len() < 2 {
        return Ok(Outcome::Drop("of a single token".to_owned()));
    }
    let loss_mask = (0..tokens.len()).map(|position| position > 0).collect();
    let cut = tokens.len() < whole.len();
    Ok(Outcome::keep(SftExample { tokens, loss_mask }, cut))
}

/// A comparison: both sequences from where they differ, each ending with the tokens of the text `<|endoftext|>`.
pub(crate) fn ranked(
    record: &Record,
    renderer: &Renderer,
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<Outcome<RankedExample>> {
    let Record::Ranked { prompt, responses, label } = record else {
        bail!("reward modelling needs comparisons, and this record is {}", record.kind());
    };
    if *label != PairLabel::default() {
        bail!(
            "DeepSpeed-Chat's loss has neither \"chosen_probability\" nor \"margin\": remove these columns, or compat"
        );
    }
    let mut cut = false;
    let mut sequence = |response| -> Result<Vec<u32>> {
        let text = joined(renderer, prompt, response)?;
        let mut tokens = dschat::sequence(&text, dschat::REWARD_END, usize::MAX, encoder)?;
        cut |= tokens.len() > data.max_length;
        tokens.truncate(data.max_length);
        Ok(tokens)
    };
    // DeepSpeed-Chat compares two responses: of a longer ranking, the best and the worst.
    let (chosen, rejected) = (sequence(&responses[0])?, sequence(&responses[responses.len() - 1])?);
    // Equal sequences stay, as in DeepSpeed-Chat: their loss is constant without a gradient, and they count as wrong.
    let (prompt, responses) = dschat::diverge(chosen, rejected);
    match prompt.is_empty() {
        true => Ok(Outcome::Drop("with responses that share no first token".to_owned())),
        false => Ok(Outcome::keep(RankedExample { prompt, responses: responses.into(), label: *label }, cut)),
    }
}

/// A prompt's tokens and text, or the reason for dropping it: too many tokens.
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

/// The text of prompt and response together, as it is: DeepSpeed-Chat adds its end to an end that is written there too.
fn joined(renderer: &Renderer, prompt: &Text, response: &Text) -> Result<String> {
    match (renderer.joined_turns(prompt, response)?, prompt, response) {
        (Some((turns, _)), ..) => renderer.whole(&turns),
        (None, Text::Verbatim(prompt), Text::Verbatim(response)) => Ok(format!("{prompt}{response}")),
        _ => unreachable!("joined_turns refuses a text beside a dialogue"),
    }
}
