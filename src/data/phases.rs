//! Records -> the token sequences of SFT, reward modelling and PPO, with every loss counted in a [`Report`].
//!
//! Prompt and answer are tokenised apart, so the mask of the answer is exact and the prompt's tokens are the very ones
//! PPO will sample after. Knows the tokenizer only as a [`TextEncoder`]. Read the stages next.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Result, bail, ensure};

use super::compat::{self, Part};
use super::render::{Renderer, Segment};
use super::{Entry, Message, Record, Text};
use crate::config::{Compat, Data, OnBadRecord, Truncation};
use crate::invalid;
use crate::model::chat_template::{GenerationPrompt, TemplateTokens, render};

/// What the data needs of a tokenizer.
pub trait TextEncoder {
    /// Token ids of a text, nothing added in front or behind. The text of a special token (a template's markup) becomes
    /// that token. Called on pieces of a sequence: a tokenizer that puts a space before the first word must not do so.
    ///
    /// # Errors
    /// The tokenizer's own.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// A dialogue through the tokenizer's chat template; `add_generation_prompt` = up to where the next assistant turn begins.
    ///
    /// # Errors
    /// The template's own, such as two user turns in a row.
    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String>;

    /// A dialogue through a template that the config gives.
    ///
    /// # Errors
    /// The template's own.
    fn chat_with(&self, template: &str, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let prompt = if add_generation_prompt { GenerationPrompt::Add } else { GenerationPrompt::None };
        let eos = Some(self.eos_text()).filter(|text| !text.is_empty());
        render(template, messages, prompt, TemplateTokens { bos: self.bos_text(), eos })
    }

    /// The token that opens a text, as templates write it.
    fn bos_text(&self) -> Option<&str> {
        None
    }

    /// Does the tokenizer bring a chat template?
    fn has_chat_template(&self) -> bool;

    /// The token that ends an answer.
    fn eos_id(&self) -> u32;

    /// That token as templates write it; empty where it has no text.
    fn eos_text(&self) -> &str;

    /// The token that opens a text, for tokenizers that add one. A chat template writes its own.
    fn bos_id(&self) -> Option<u32> {
        None
    }
}

/// A sequence of supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftExample {
    /// (N,) token ids, N >= 2.
    pub tokens: Vec<u32>,
    /// (N,) true = this token is predicted for the loss, from those before it. Never true at 0, true somewhere.
    pub loss_mask: Vec<bool>,
}

/// A ranking of answers; a preference is two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankedExample {
    /// Token ids, ready for an answer to follow; not empty.
    pub prompt: Vec<u32>,
    /// (K,) of token ids, K >= 2, best first, all different, each with its end token unless cut by `truncation = "right"`.
    pub answers: Vec<Vec<u32>>,
}

/// An answer that was judged by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JudgedExample {
    /// Token ids, ready for an answer to follow; not empty.
    pub prompt: Vec<u32>,
    /// Token ids, with the end token unless cut by `truncation = "right"`; not empty.
    pub answer: Vec<u32>,
    /// The verdict.
    pub good: bool,
}

/// A prompt to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptExample {
    /// Token ids, not empty.
    pub tokens: Vec<u32>,
    /// The text they stand for.
    pub text: String,
    /// The answer that the record gives, where it gives exactly one: for verifiers.
    pub answer: Option<String>,
    /// Which of the entries given it is of.
    pub entry: usize,
}

/// What became of the records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Records given.
    pub read: usize,
    /// Sequences made. More than `read - dropped` only where a long raw text was cut into blocks.
    pub kept: usize,
    /// Kept sequences that lost tokens.
    pub truncated: usize,
    /// Records not used, by reason.
    pub dropped: BTreeMap<String, usize>,
    /// What was wrong with the first record dropped under `on_bad_record = "skip"`.
    pub first_bad: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} records, {} sequences", self.read, self.kept)?;
        if self.truncated > 0 {
            write!(f, " ({} truncated)", self.truncated)?;
        }
        let dropped: usize = self.dropped.values().sum();
        if dropped > 0 {
            let reasons: Vec<String> = self.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            write!(f, "; {dropped} dropped: {}", reasons.join(", "))?;
        }
        if let Some(first) = &self.first_bad {
            write!(f, " (first: {first})")?;
        }
        Ok(())
    }
}

/// What one record gives.
enum Outcome<T> {
    Keep { examples: Vec<T>, truncated: bool },
    Drop(String),
}

impl<T> Outcome<T> {
    fn keep(example: T, truncated: bool) -> Self {
        Self::Keep { examples: vec![example], truncated }
    }

    fn too_long(limit: &str, tokens: usize) -> Self {
        Self::Drop(format!("longer than {limit} = {tokens}"))
    }
}

impl<T> From<compat::Made<T>> for Outcome<T> {
    fn from(made: compat::Made<T>) -> Self {
        match made {
            Ok((example, truncated)) => Self::keep(example, truncated),
            Err(reason) => Self::Drop(reason),
        }
    }
}

/// Runs `make` over the records of `rows`, in that order; an error of it is a bad record.
fn over<T>(
    entries: &[Entry],
    rows: &[usize],
    data: &Data,
    make: impl Fn(usize, &Record) -> Result<Outcome<T>>,
) -> Result<(Vec<T>, Report)> {
    let mut report = Report { read: rows.len(), ..Report::default() };
    let mut all = Vec::new();
    for &row in rows {
        let Entry { place, record } = &entries[row];
        let reason = match make(row, record) {
            Ok(Outcome::Keep { mut examples, truncated }) => {
                report.truncated += usize::from(truncated);
                all.append(&mut examples);
                continue;
            }
            Ok(Outcome::Drop(reason)) => reason,
            Err(error) if data.on_bad_record == OnBadRecord::Error => return Err(invalid!("{place}: {error:#}")),
            Err(error) => {
                report.first_bad.get_or_insert_with(|| format!("{place}: {error:#}"));
                "bad".to_owned()
            }
        };
        *report.dropped.entry(reason).or_default() += 1;
    }
    report.kept = all.len();
    if all.is_empty() && !rows.is_empty() {
        return Err(invalid!("[data] leaves no sequence: {report}; raise the limit, set truncation or use other data"));
    }
    Ok((all, report))
}

/// Token ids of an answer's segments; the end token never stands inside one.
fn encode(segments: &[Segment], encoder: &dyn TextEncoder) -> Result<(Vec<u32>, Vec<bool>)> {
    let (mut tokens, mut mask) = (Vec::new(), Vec::new());
    for segment in segments {
        let piece = encoder.encode(&segment.text)?;
        // Such an answer would end there for the reward model and for PPO, whatever follows.
        ensure!(
            !segment.target || !piece.contains(&encoder.eos_id()),
            "an answer has the end token {:?} inside it",
            encoder.eos_text()
        );
        tokens.extend(&piece);
        if segment.ends {
            tokens.push(encoder.eos_id());
        }
        mask.resize(tokens.len(), segment.target);
    }
    Ok((tokens, mask))
}

/// Opening token and prompt.
fn encode_prompt(text: &str, first: Option<u32>, encoder: &dyn TextEncoder) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = first.into_iter().collect();
    tokens.extend(encoder.encode(text)?);
    ensure!(!tokens.is_empty(), "the prompt has no token");
    Ok(tokens)
}

/// Sequences for supervised fine-tuning.
///
/// A dialogue is learnt at all its assistant turns with their end tokens, a ranking at its best answer, a judged answer
/// where it was judged good; with `completion_only` false, at every token but the first. Raw text is learnt at every
/// token, with an end token behind it, and cut into blocks of `max_length` where it is longer.
///
/// # Errors
/// A record without answer or one the template refuses (unless `on_bad_record = "skip"`); no sequence left.
pub fn sft_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
    completion_only: bool,
) -> Result<(Vec<SftExample>, Report)> {
    let renderer = Renderer::new(encoder, data)?;
    let rows = compat::rows_of(entries.len(), data, Part::Sft)?;
    over(entries, &rows, data, |_, record| {
        if data.compat.is_some() {
            return compat::sft(record, &renderer, encoder, data).map(Outcome::from);
        }
        let (start, segments) = match record {
            Record::LanguageModeling(Text::Verbatim(text)) => {
                let mut tokens: Vec<u32> = encoder.bos_id().into_iter().collect();
                tokens.extend(encoder.encode(text)?);
                tokens.push(encoder.eos_id());
                return Ok(blocks(&tokens, data.max_length));
            }
            Record::LanguageModeling(dialogue @ Text::Dialogue(turns)) => {
                (renderer.first_token(dialogue), renderer.conversation(turns, 0)?)
            }
            Record::PromptCompletion { prompt, completion: answer }
            | Record::Unpaired { prompt, completion: answer, label: true } => {
                (renderer.first_token(prompt), sequence(renderer.answer(prompt, answer)?))
            }
            Record::Ranked { prompt, answers } => {
                (renderer.first_token(prompt), sequence(renderer.answer(prompt, &answers[0])?))
            }
            Record::Unpaired { label: false, .. } => return Ok(Outcome::Drop("judged bad".to_owned())),
            Record::PromptOnly(_) => bail!("SFT needs an answer, and a prompt_only record has none"),
        };
        let (mut tokens, mut mask) = encode(&segments, encoder)?;
        if let Some(first) = start {
            tokens.insert(0, first);
            mask.insert(0, false);
        }
        if !completion_only {
            mask.fill(true);
        }
        fit(tokens, mask, &segments, data, encoder)
    })
}

fn sequence((prompt, mut segments): (String, Vec<Segment>)) -> Vec<Segment> {
    segments.insert(0, Segment { text: prompt, target: false, ends: false });
    segments
}

/// Raw text in blocks of `length` tokens; a rest of one token has nothing to predict and is left out.
fn blocks(tokens: &[u32], length: usize) -> Outcome<SftExample> {
    let examples: Vec<SftExample> = tokens
        .chunks(length)
        .filter(|block| block.len() >= 2)
        .map(|block| SftExample { tokens: block.to_vec(), loss_mask: (0..block.len()).map(|i| i > 0).collect() })
        .collect();
    match examples.is_empty() {
        true => Outcome::Drop("of a single token".to_owned()),
        false => Outcome::Keep { examples, truncated: false },
    }
}

/// Applies `max_length` to one SFT sequence.
fn fit(
    mut tokens: Vec<u32>,
    mut mask: Vec<bool>,
    segments: &[Segment],
    data: &Data,
    encoder: &dyn TextEncoder,
) -> Result<Outcome<SftExample>> {
    let over = tokens.len().saturating_sub(data.max_length);
    if over > 0 {
        match data.truncation {
            Truncation::Drop => return Ok(Outcome::too_long("max_length", data.max_length)),
            Truncation::Left => {
                // The last answer must stay whole with a token before it.
                let (answer, _) = encode(&segments[segments.len() - 1..], encoder)?;
                if answer.len() >= data.max_length {
                    return Ok(Outcome::Drop(format!("with an answer longer than max_length = {}", data.max_length)));
                }
                tokens.drain(..over);
                mask.drain(..over);
            }
            Truncation::Right => {
                tokens.truncate(data.max_length);
                mask.truncate(data.max_length);
            }
        }
    }
    if let Some(first) = mask.first_mut() {
        *first = false; // nothing before it to predict it from
    }
    if !mask.contains(&true) {
        return Ok(Outcome::Drop(format!("with a prompt that fills max_length = {}", data.max_length)));
    }
    Ok(Outcome::keep(SftExample { tokens, loss_mask: mask }, over > 0))
}

/// Rankings for the reward model, from preferences and ranked answers.
///
/// Under `truncation = "left"` the prompt loses its first tokens until the longest answer fits, under `"right"` the
/// answers lose their last; the prompt is the same for all answers either way.
///
/// # Errors
/// A record that compares nothing or one the template refuses (unless `on_bad_record = "skip"`); no sequence left.
pub fn ranked_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<RankedExample>, Report)> {
    let renderer = Renderer::new(encoder, data)?;
    let limit = data.max_length;
    let rows = compat::rows_of(entries.len(), data, Part::Reward)?;
    over(entries, &rows, data, |_, record| {
        if data.compat.is_some() {
            return compat::ranked(record, &renderer, encoder, data).map(Outcome::from);
        }
        let Record::Ranked { prompt, answers } = record else {
            bail!(
                "reward modelling needs comparisons (\"chosen\" and \"rejected\", or ranked \"responses\"), and this record is {}",
                record.kind()
            );
        };
        let mut tokens = encode_prompt(&renderer.prompt(prompt)?, renderer.first_token(prompt), encoder)?;
        let mut encoded = Vec::with_capacity(answers.len());
        for answer in answers {
            encoded.push(encode(&renderer.answer(prompt, answer)?.1, encoder)?.0);
        }
        let longest = encoded.iter().map(Vec::len).max().unwrap_or(0);
        let over = (tokens.len() + longest).saturating_sub(limit);
        match data.truncation {
            _ if over == 0 => {}
            Truncation::Drop => return Ok(Outcome::too_long("max_length", limit)),
            Truncation::Left if over < tokens.len() => drop(tokens.drain(..over)),
            Truncation::Left => return Ok(Outcome::Drop(format!("with an answer longer than max_length = {limit}"))),
            Truncation::Right if tokens.len() >= limit => {
                return Ok(Outcome::Drop(format!("with a prompt that fills max_length = {limit}")));
            }
            Truncation::Right => encoded.iter_mut().for_each(|answer| answer.truncate(limit - tokens.len())),
        }
        if encoded.iter().collect::<BTreeSet<_>>().len() < encoded.len() {
            // Different texts: only a cut, or a tokenizer that normalises, makes them equal.
            return Ok(Outcome::Drop("with answers that are the same tokens".to_owned()));
        }
        Ok(Outcome::keep(RankedExample { prompt: tokens, answers: encoded }, over > 0))
    })
}

/// Judged answers for KTO: from unpaired records, and from preferences, whose chosen answer counts as good and whose
/// rejected one as bad (as in TRL).
///
/// # Errors
/// A record without a verdict, a ranking of more than two, one the template refuses (unless `on_bad_record = "skip"`); no
/// sequence left.
pub fn judged_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<JudgedExample>, Report)> {
    let renderer = Renderer::new(encoder, data)?;
    let limit = data.max_length;
    let rows: Vec<usize> = (0..entries.len()).collect();
    over(entries, &rows, data, |_, record| {
        let (prompt, judged) = match record {
            Record::Unpaired { prompt, completion, label } => (prompt, vec![(completion, *label)]),
            Record::Ranked { prompt, answers } if answers.len() == 2 => {
                (prompt, vec![(&answers[0], true), (&answers[1], false)])
            }
            _ => bail!(
                "KTO needs judged answers (\"label\": true or false, or \"chosen\" and \"rejected\"), and this record is {}",
                record.kind()
            ),
        };
        let tokens = encode_prompt(&renderer.prompt(prompt)?, renderer.first_token(prompt), encoder)?;
        let (mut examples, mut truncated) = (Vec::new(), false);
        for (answer, good) in judged {
            let (mut prompt, mut answer) = (tokens.clone(), encode(&renderer.answer(prompt, answer)?.1, encoder)?.0);
            let over = (prompt.len() + answer.len()).saturating_sub(limit);
            match data.truncation {
                _ if over == 0 => {}
                Truncation::Drop => return Ok(Outcome::too_long("max_length", limit)),
                Truncation::Left if over < prompt.len() => drop(prompt.drain(..over)),
                Truncation::Left => {
                    return Ok(Outcome::Drop(format!("with an answer longer than max_length = {limit}")));
                }
                Truncation::Right if prompt.len() >= limit => {
                    return Ok(Outcome::Drop(format!("with a prompt that fills max_length = {limit}")));
                }
                Truncation::Right => answer.truncate(limit - prompt.len()),
            }
            truncated |= over > 0;
            examples.push(JudgedExample { prompt, answer, good });
        }
        Ok(Outcome::Keep { examples, truncated })
    })
}

/// Prompts for PPO, from any record that has one. A prompt longer than `max_prompt_length` is dropped and counted, never
/// cut, as in DeepSpeed-Chat.
///
/// # Errors
/// A record without prompt or one the template refuses (unless `on_bad_record = "skip"`); no prompt left.
pub fn prompt_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<PromptExample>, Report)> {
    let renderer = Renderer::new(encoder, data)?;
    let rows = compat::rows_of(entries.len(), data, Part::Ppo)?;
    over(entries, &rows, data, |entry, record| {
        let opening;
        let prompt = match record {
            Record::PromptCompletion { prompt, .. }
            | Record::Ranked { prompt, .. }
            | Record::Unpaired { prompt, .. } => prompt,
            Record::PromptOnly(prompt) => prompt,
            Record::LanguageModeling(Text::Dialogue(turns)) => {
                let end = turns.iter().rposition(|turn| turn.role == "user" || turn.role == "tool");
                let Some(end) = end else { bail!("the conversation has no user turn to answer") };
                opening = Text::Dialogue(turns[..=end].to_vec());
                &opening
            }
            Record::LanguageModeling(Text::Verbatim(_)) => bail!("PPO needs prompts, and raw text has none"),
        };
        let (tokens, text) = match data.compat {
            Some(Compat::Dschat) => match compat::prompt(prompt, &renderer, encoder, data)? {
                Ok(made) => made,
                Err(reason) => return Ok(Outcome::Drop(reason)),
            },
            None => {
                let text = renderer.prompt(prompt)?;
                (encode_prompt(&text, renderer.first_token(prompt), encoder)?, text)
            }
        };
        if tokens.len() > data.max_prompt_length {
            return Ok(Outcome::too_long("max_prompt_length", data.max_prompt_length));
        }
        let answer = match record {
            Record::PromptCompletion { completion: Text::Verbatim(text), .. } => Some(text.trim().to_owned()),
            Record::PromptCompletion { completion: Text::Dialogue(turns), .. } => {
                turns.last().map(|turn| turn.content.trim().to_owned())
            }
            _ => None,
        };
        Ok(Outcome::keep(PromptExample { tokens, text, answer, entry }, false))
    })
}
