//! Records -> the training examples of SFT, reward modelling and DPO, KTO, and PPO; each [`Objective`] is one of them.
//! Every truncated or dropped record is counted in a [`Report`].
//!
//! Prompt and response are encoded separately, so the response mask is exact, and the prompt's tokens are those after
//! which PPO samples. This file does not depend on `files` or `formats`. Read `data/examples/batch_sampler.rs` next.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};

use crate::config::{Compat, Data, Truncation};
use crate::data::examples::compat;
use crate::data::examples::dschat;
use crate::data::examples::dschat::Share;
pub use crate::data::examples::encoder::TextEncoder;
use crate::data::examples::example::Example;
pub use crate::data::examples::example::{PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::examples::render::{Renderer, Segment};
pub use crate::data::examples::report::{Outcome, Report};
use crate::data::record::{Entry, Record, Text};

/// The settings with which records become examples.
pub struct Encoding<'e> {
    encoder: &'e dyn TextEncoder,
    renderer: Renderer<'e>,
    data: &'e Data,
    completion_only: bool,
}

impl<'e> Encoding<'e> {
    /// The settings of `[data]`. `completion_only` matters for SFT only: the loss is on the responses (true), or on
    /// every token but the first (false).
    ///
    /// # Errors
    /// The config asks for a chat template and there is none.
    pub fn new(encoder: &'e dyn TextEncoder, data: &'e Data, completion_only: bool) -> Result<Self> {
        Ok(Self { encoder, renderer: Renderer::new(encoder, data)?, data, completion_only })
    }
}

/// A training objective: a type of example, and how a record becomes examples of it.
pub trait Objective: Example + Send + Sync + 'static {
    /// The objective's name in the key of a cache file.
    const NAME: &'static str;
    /// The objective's share of the records under `compat = "dschat"`; None = all of them.
    const SHARE: Option<Share> = None;

    /// The examples of a record, or the reason for dropping it.
    ///
    /// # Errors
    /// The record's type does not fit the objective, or the template rejects its dialogue.
    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>>;

    /// Stores the number of the example's record, from 0, among all usable records.
    fn with_entry(self, _number: usize) -> Self {
        self
    }
}

/// Passes the examples of the objective's share of the records to `sink`, each with its record. `sources` = number of
/// records per source.
///
/// # Errors
/// A bad record (unless `on_bad_record = "skip"`); no example is left; an error of `sink`.
pub(crate) fn for_each<T: Objective>(
    entries: &[Entry],
    sources: &[usize],
    with: &Encoding,
    report: &mut Report,
    sink: &mut dyn FnMut(T, &Record) -> Result<()>,
) -> Result<()> {
    for row in compat::rows_of(sources, with.data, T::SHARE)? {
        let Entry { place, record } = &entries[row];
        for example in report.add(place, T::of(record, with), with.data.on_bad_record)? {
            sink(example.with_entry(row), record)?;
        }
    }
    report.check()
}

/// The examples of records in memory.
fn collect<T: Objective>(entries: &[Entry], with: &Encoding) -> Result<(Vec<T>, Report)> {
    let (mut report, mut all) = (Report::default(), vec![]);
    for_each(entries, &[entries.len()], with, &mut report, &mut |example, _| {
        all.push(example);
        Ok(())
    })?;
    Ok((all, report))
}

/// Token ids and mask of a response's segments.
///
/// # Errors
/// The end token is inside a response.
fn encode(segments: &[Segment], encoder: &dyn TextEncoder) -> Result<(Vec<u32>, Vec<bool>)> {
    let (mut tokens, mut mask) = (Vec::new(), Vec::new());
    for segment in segments {
        let piece = encoder.encode(&segment.text)?;
        // For the reward model and for PPO the response would end there.
        ensure!(
            !segment.target || !piece.contains(&encoder.eos_id()),
            "a response has the end token {:?} inside it",
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

/// Token ids of a prompt, after the token `first` if there is one.
fn encode_prompt(text: &str, first: Option<u32>, encoder: &dyn TextEncoder) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = first.into_iter().collect();
    tokens.extend(encoder.encode(text)?);
    ensure!(!tokens.is_empty(), "the prompt has no token");
    Ok(tokens)
}

/// Examples for supervised fine-tuning; `completion_only` as for [`Encoding::new`].
///
/// # Errors
/// A record without a response, or one that the template rejects (unless `on_bad_record = "skip"`); no example is left.
pub fn sft_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
    completion_only: bool,
) -> Result<(Vec<SftExample>, Report)> {
    collect(entries, &Encoding::new(encoder, data, completion_only)?)
}

/// The loss is on all assistant turns of a dialogue with their end tokens, on the best response of a ranking, and on an
/// unpaired response that is desirable; without `completion_only`, on every token but the first. Raw text gets an end
/// token and a loss on every token; a longer text than `max_length` is cut into blocks of that length.
impl Objective for SftExample {
    const NAME: &'static str = "sft";
    const SHARE: Option<Share> = Some(Share::Sft);

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, completion_only } = with;
        if data.compat.is_some() {
            return compat::sft(record, renderer, *encoder, data);
        }
        let (start, segments) = match record {
            Record::LanguageModeling(Text::Verbatim(text)) => {
                return Ok(blocks(&whole_text(text, *encoder)?, data.max_length));
            }
            Record::LanguageModeling(dialogue @ Text::Dialogue(turns)) => {
                (renderer.first_token(dialogue), renderer.conversation(turns, 0)?)
            }
            Record::PromptCompletion { prompt, completion: response }
            | Record::Unpaired { prompt, completion: response, label: true } => {
                (renderer.first_token(prompt), sequence(renderer.response(prompt, response)?))
            }
            Record::Ranked { prompt, responses } => {
                (renderer.first_token(prompt), sequence(renderer.response(prompt, &responses[0])?))
            }
            Record::Unpaired { label: false, .. } => return Ok(Outcome::Drop("judged bad".to_owned())),
            Record::PromptOnly(_) => bail!("SFT needs a response, and a prompt_only record has none"),
        };
        let (mut tokens, mut mask) = encode(&segments, *encoder)?;
        if let Some(first) = start {
            tokens.insert(0, first);
            mask.insert(0, false);
        }
        if !completion_only {
            mask.fill(true);
        }
        truncate(tokens, mask, &segments, data, *encoder)
    }
}

/// Token ids of a raw text between the beginning-of-sequence token, if the tokenizer adds one, and the end token.
fn whole_text(text: &str, encoder: &dyn TextEncoder) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = encoder.bos_id().into_iter().collect();
    tokens.extend(encoder.encode(text)?);
    tokens.push(encoder.eos_id());
    Ok(tokens)
}

/// Token ids of a raw text for the ptx mixture; `data/stream/pipeline.rs` joins the texts and cuts them into blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawText(pub(crate) Vec<u32>);

impl Example for RawText {
    fn tokens(&self) -> usize {
        self.0.len()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.0);
    }
}

impl Objective for RawText {
    const NAME: &'static str = "ptx";

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, .. } = with;
        Ok(Outcome::keep(
            match record {
                Record::LanguageModeling(Text::Verbatim(text)) => Self(match data.compat {
                    Some(Compat::Dschat) => dschat::sequence(text, "", usize::MAX, *encoder)?,
                    None => whole_text(text, *encoder)?,
                }),
                Record::LanguageModeling(dialogue @ Text::Dialogue(turns)) => {
                    let mut tokens: Vec<u32> = renderer.first_token(dialogue).into_iter().collect();
                    tokens.extend(encode(&renderer.conversation(turns, 0)?, *encoder)?.0);
                    Self(tokens)
                }
                other => bail!("the ptx mixture needs texts, and this record is {}", other.kind()),
            },
            false,
        ))
    }
}

/// The segments of prompt and response together.
fn sequence((prompt, mut segments): (String, Vec<Segment>)) -> Vec<Segment> {
    segments.insert(0, Segment { text: prompt, target: false, ends: false });
    segments
}

/// Raw text in blocks of `length` tokens; a last block of one token has nothing to predict and is left out.
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

/// Applies `max_length` and `truncation` to one SFT sequence.
fn truncate(
    mut tokens: Vec<u32>,
    mut mask: Vec<bool>,
    segments: &[Segment],
    data: &Data,
    encoder: &dyn TextEncoder,
) -> Result<Outcome<SftExample>> {
    let over = tokens.len().saturating_sub(data.max_length);
    if over > 0 {
        match data.truncation {
            Truncation::Drop => return Ok(Outcome::too_long("max_length", data.max_length, tokens.len())),
            Truncation::Left => {
                // The last response must stay whole, with a token before it.
                let (response, _) = encode(&segments[segments.len() - 1..], encoder)?;
                if response.len() >= data.max_length {
                    return Ok(Outcome::response_too_long(data.max_length, response.len() + 1));
                }
                tokens.drain(..over);
                mask.drain(..over);
            }
            Truncation::Right | Truncation::KeepEnd => {
                tokens.truncate(data.max_length);
                mask.truncate(data.max_length);
                if data.truncation == Truncation::KeepEnd && mask.last() == Some(&true) {
                    tokens[data.max_length - 1] = encoder.eos_id();
                }
            }
        }
    }
    if let Some(first) = mask.first_mut() {
        *first = false; // no token precedes it
    }
    if !mask.contains(&true) {
        return Ok(Outcome::prompt_fills(data.max_length, data.max_length + over));
    }
    Ok(Outcome::keep(SftExample { tokens, loss_mask: mask }, over > 0))
}

/// Examples for reward modelling and DPO, from preferences and ranked responses.
///
/// # Errors
/// A record without a comparison, or one that the template rejects (unless `on_bad_record = "skip"`); no example is left.
pub fn ranked_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<RankedExample>, Report)> {
    collect(entries, &Encoding::new(encoder, data, true)?)
}

/// Under `truncation = "left"` the prompt loses its first tokens until the longest response fits; under `"right"` and
/// `"keep_end"` the responses lose their last tokens. The prompt is the same for all responses either way.
impl Objective for RankedExample {
    const NAME: &'static str = "ranked";
    const SHARE: Option<Share> = Some(Share::Reward);

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, .. } = with;
        let limit = data.max_length;
        if data.compat.is_some() {
            return compat::ranked(record, renderer, *encoder, data);
        }
        let Record::Ranked { prompt, responses } = record else {
            bail!(
                "reward modelling needs comparisons (\"chosen\" and \"rejected\", or ranked \"responses\"), and this record is {}",
                record.kind()
            );
        };
        let mut tokens = encode_prompt(&renderer.prompt(prompt)?, renderer.first_token(prompt), *encoder)?;
        let mut encoded = Vec::with_capacity(responses.len());
        for response in responses {
            encoded.push(encode(&renderer.response(prompt, response)?.1, *encoder)?.0);
        }
        let longest = encoded.iter().map(Vec::len).max().unwrap_or(0);
        let over = (tokens.len() + longest).saturating_sub(limit);
        match data.truncation {
            _ if over == 0 => {}
            Truncation::Drop => return Ok(Outcome::too_long("max_length", limit, limit + over)),
            Truncation::Left if over < tokens.len() => drop(tokens.drain(..over)),
            Truncation::Left => return Ok(Outcome::response_too_long(limit, longest + 1)),
            Truncation::Right | Truncation::KeepEnd if tokens.len() >= limit => {
                return Ok(Outcome::prompt_fills(limit, limit + over));
            }
            Truncation::Right => encoded.iter_mut().for_each(|response| response.truncate(limit - tokens.len())),
            Truncation::KeepEnd => {
                let most = limit - tokens.len();
                for response in encoded.iter_mut().filter(|response| response.len() > most) {
                    response.truncate(most);
                    response[most - 1] = encoder.eos_id();
                }
            }
        }
        if encoded.iter().collect::<BTreeSet<_>>().len() < encoded.len() {
            // The texts differ: only truncation, or a tokenizer that normalises, makes the tokens equal.
            return Ok(Outcome::Drop("with responses that are the same tokens".to_owned()));
        }
        Ok(Outcome::keep(RankedExample { prompt: tokens, responses: encoded }, over > 0))
    }
}

/// From unpaired records, and from preferences, whose chosen response is desirable and whose rejected one is
/// undesirable (as in TRL).
impl Objective for UnpairedExample {
    const NAME: &'static str = "judged";

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, .. } = with;
        let limit = data.max_length;
        let (prompt, labelled) = match record {
            Record::Unpaired { prompt, completion, label } => (prompt, vec![(completion, *label)]),
            Record::Ranked { prompt, responses } if responses.len() == 2 => {
                (prompt, vec![(&responses[0], true), (&responses[1], false)])
            }
            _ => bail!(
                "KTO needs labelled responses (\"label\": true or false, or \"chosen\" and \"rejected\"), and this record is {}",
                record.kind()
            ),
        };
        let tokens = encode_prompt(&renderer.prompt(prompt)?, renderer.first_token(prompt), *encoder)?;
        let (mut examples, mut truncated) = (Vec::new(), false);
        for (response, desirable) in labelled {
            let (mut prompt, mut response) =
                (tokens.clone(), encode(&renderer.response(prompt, response)?.1, *encoder)?.0);
            let over = (prompt.len() + response.len()).saturating_sub(limit);
            match data.truncation {
                _ if over == 0 => {}
                Truncation::Drop => return Ok(Outcome::too_long("max_length", limit, limit + over)),
                Truncation::Left if over < prompt.len() => drop(prompt.drain(..over)),
                Truncation::Left => return Ok(Outcome::response_too_long(limit, response.len() + 1)),
                Truncation::Right | Truncation::KeepEnd if prompt.len() >= limit => {
                    return Ok(Outcome::prompt_fills(limit, limit + over));
                }
                Truncation::Right => response.truncate(limit - prompt.len()),
                Truncation::KeepEnd => {
                    response.truncate(limit - prompt.len() - 1);
                    response.push(encoder.eos_id());
                }
            }
            truncated |= over > 0;
            examples.push(UnpairedExample { prompt, response, desirable });
        }
        Ok(Outcome::Keep { examples, truncated })
    }
}

/// Prompts for PPO, from any record that has a prompt.
///
/// # Errors
/// A record without a prompt, or one that the template rejects (unless `on_bad_record = "skip"`); no prompt is left.
pub fn prompt_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<PromptExample>, Report)> {
    collect(entries, &Encoding::new(encoder, data, true)?)
}

/// A prompt longer than `max_prompt_length` is dropped and counted, not truncated, as in DeepSpeed-Chat.
impl Objective for PromptExample {
    const NAME: &'static str = "prompt";
    const SHARE: Option<Share> = Some(Share::Ppo);

    fn with_entry(self, number: usize) -> Self {
        Self { entry: number, ..self }
    }

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, .. } = with;
        let until_response;
        let prompt = match record {
            Record::PromptCompletion { prompt, .. }
            | Record::Ranked { prompt, .. }
            | Record::Unpaired { prompt, .. } => prompt,
            Record::PromptOnly(prompt) => prompt,
            Record::LanguageModeling(Text::Dialogue(turns)) => {
                let end = turns.iter().rposition(|turn| turn.role == "user" || turn.role == "tool");
                let Some(end) = end else { bail!("the conversation has no user turn to respond to") };
                until_response = Text::Dialogue(turns[..=end].to_vec());
                &until_response
            }
            Record::LanguageModeling(Text::Verbatim(_)) => bail!("PPO needs prompts, and raw text has none"),
        };
        let (tokens, text) = match data.compat {
            Some(Compat::Dschat) => match compat::prompt(prompt, renderer, *encoder, data)? {
                Ok(prompt) => prompt,
                Err(reason) => return Ok(Outcome::Drop(reason)),
            },
            None => {
                let text = renderer.prompt(prompt)?;
                (encode_prompt(&text, renderer.first_token(prompt), *encoder)?, text)
            }
        };
        if tokens.len() > data.max_prompt_length {
            return Ok(Outcome::too_long("max_prompt_length", data.max_prompt_length, tokens.len()));
        }
        let answer = match record {
            Record::PromptCompletion { completion: Text::Verbatim(text), .. } => Some(text.trim().to_owned()),
            Record::PromptCompletion { completion: Text::Dialogue(turns), .. } => {
                turns.last().map(|turn| turn.content.trim().to_owned())
            }
            _ => None,
        };
        Ok(Outcome::keep(PromptExample { tokens, text, answer, entry: 0 }, false))
    }
}
