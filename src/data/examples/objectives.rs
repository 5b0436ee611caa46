//! Records -> the training examples of SFT, reward modelling and DPO, KTO, and PPO; each [`Objective`] is one of them.
//! Every truncated or dropped record is counted in a [`Report`].
//!
//! Prompt and response are encoded as one text, as transformers and TRL do, and told apart by the tokens' places in it.
//! This file does not depend on `files` or `formats`. Read `data/examples/batch_sampler.rs` next.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};

use crate::config::{Compat, Data, Truncation};
use crate::data::examples::compat;
use crate::data::examples::dschat;
use crate::data::examples::dschat::Share;
pub use crate::data::examples::encoder::TextEncoder;
use crate::data::examples::example::Example;
pub use crate::data::examples::example::{PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::examples::render::Renderer;
pub use crate::data::examples::report::{Outcome, Report};
use crate::data::examples::sequence::{self, Continued, Sequence};
use crate::data::record::{Entry, PairLabel, Record, Text};
use crate::tokenizer::chat_template::Message;

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

    /// A remark for each thing that the record's dialogue gives beside roles and texts, and neither the run's template nor the
    /// objective `T` reads.
    pub(crate) fn unread<T: Objective>(&self, record: &Record) -> Vec<String> {
        let reads_weights = T::READS_WEIGHTS && self.data.compat.is_none();
        let remarks = record.texts().into_iter().flat_map(|text| self.renderer.unread(text, reads_weights));
        remarks.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// The tokens that end a response under `[data]`: every stage stops, learns and scores at the first of them. See
/// [`Tokenizer::ends`](crate::tokenizer::Tokenizer::ends).
///
/// # Errors
/// The config asks for a chat template and there is none.
pub fn ends_of_responses(encoder: &dyn TextEncoder, data: &Data) -> Result<Vec<u32>> {
    Ok(Renderer::new(encoder, data)?.ends().iter().map(|(id, _)| *id).collect())
}

/// The one of [`ends_of_responses`] with which the run's template ends a response.
///
/// # Errors
/// Those of [`ends_of_responses`]; the template rejects a dialogue of one round.
pub fn end_of_responses(encoder: &dyn TextEncoder, data: &Data) -> Result<u32> {
    Renderer::new(encoder, data)?.end_of_response()
}

/// A training objective: a type of example, and how a record becomes examples of it.
pub trait Objective: Example + Send + Sync + 'static {
    /// The objective's name in the key of a cache file.
    const NAME: &'static str;
    /// The objective's share of the records under `compat = "dschat"`; None = all of them.
    const SHARE: Option<Share> = None;
    /// Whether a turn of weight 0 is not learnt.
    const READS_WEIGHTS: bool = false;

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
        let Entry { place, record, remarks } = &entries[row];
        report.remark(remarks.iter().cloned().chain(with.unread::<T>(record)));
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

/// Token ids of a prompt, after the ids `front`.
fn encode_prompt(text: &str, front: &[u32], encoder: &dyn TextEncoder) -> Result<Vec<u32>> {
    let tokens = [front, &encoder.encode(text)?].concat();
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
    const READS_WEIGHTS: bool = true;

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, completion_only } = with;
        if data.compat.is_some() {
            return compat::sft(record, renderer, *encoder, data);
        }
        let layouts = match record {
            Record::LanguageModeling(Text::Verbatim(text)) => {
                return Ok(blocks(&whole_text(text, with)?, data.max_length));
            }
            Record::LanguageModeling(Text::Dialogue(turns)) if is_unlearnt(turns) => {
                return Ok(Outcome::Drop(UNLEARNT.into()));
            }
            Record::PromptCompletion { completion: Text::Dialogue(turns), .. } if is_unlearnt(turns) => {
                return Ok(Outcome::Drop(UNLEARNT.into()));
            }
            Record::LanguageModeling(Text::Dialogue(turns)) => renderer.conversation(turns, 0)?,
            Record::PromptCompletion { prompt, completion: response }
            | Record::Unpaired { prompt, completion: response, label: true } => renderer.response(prompt, response)?,
            Record::Ranked { prompt, responses, .. } => renderer.response(prompt, &responses[0])?,
            Record::Unpaired { label: false, .. } => return Ok(Outcome::Drop("judged bad".to_owned())),
            Record::PromptOnly(_) => bail!("SFT needs a response, and a prompt_only record has none"),
        };
        let (mut examples, mut truncated, mut remarks) = (vec![], false, BTreeSet::new());
        let mut dropped = None;
        for layout in layouts {
            let sequence = sequence::encode(layout, renderer.ends(), *encoder)?;
            remarks.extend(&sequence.remarks);
            match truncate(sequence, *completion_only, data, *encoder) {
                Ok((example, cut)) => {
                    truncated |= cut;
                    examples.push(example);
                }
                Err(outcome) => dropped = dropped.or(Some(outcome)),
            }
        }
        Ok(match dropped {
            Some(outcome) if examples.is_empty() => outcome,
            _ => Outcome::Keep { examples, truncated, remarks },
        })
    }
}

/// The reason for dropping a dialogue that holds nothing to learn.
const UNLEARNT: &str = "whose assistant turns all have the weight 0";

/// Whether the assistant speaks, and the loss includes none of it.
fn is_unlearnt(turns: &[Message]) -> bool {
    let mut spoken = turns.iter().filter(|turn| turn.role == "assistant").peekable();
    spoken.peek().is_some() && spoken.all(|turn| !turn.is_learnt())
}

/// Token ids of a raw text between what the tokenizer puts before a text and the end token, which the text may hold.
fn whole_text(text: &str, with: &Encoding) -> Result<Vec<u32>> {
    let Encoding { encoder, renderer, .. } = with;
    let mut tokens = [encoder.front(), &encoder.encode(renderer.ended(text).unwrap_or(text))?].concat();
    if !tokens.last().is_some_and(|last| renderer.ends().iter().any(|(end, _)| end == last)) {
        tokens.push(encoder.eos_id());
    }
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
                    None => whole_text(text, with)?,
                }),
                Record::LanguageModeling(Text::Dialogue(turns)) => {
                    Self(sequence::encode(renderer.transcript(turns)?, renderer.ends(), *encoder)?.tokens)
                }
                other => bail!("the ptx mixture needs texts, and this record is {}", other.kind()),
            },
            false,
        ))
    }
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
        false => Outcome::Keep { examples, truncated: false, remarks: BTreeSet::new() },
    }
}

/// Applies `max_length` and `truncation` to one SFT sequence: its example and whether it lost tokens, or the outcome
/// that drops it.
fn truncate(
    sequence: Sequence,
    completion_only: bool,
    data: &Data,
    encoder: &dyn TextEncoder,
) -> Result<(SftExample, bool), Outcome<SftExample>> {
    let mut mask = sequence.mask(completion_only);
    let Sequence { mut tokens, learnt, .. } = sequence;
    let over = tokens.len().saturating_sub(data.max_length);
    if over > 0 {
        match data.truncation {
            Truncation::Drop => return Err(Outcome::too_long("max_length", data.max_length, tokens.len())),
            Truncation::Left => {
                // The last response must stay whole, with a token before it.
                if let Some(response) = learnt.last().filter(|response| response.len() >= data.max_length) {
                    return Err(Outcome::response_too_long(data.max_length, response.len() + 1));
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
        return Err(Outcome::prompt_fills(data.max_length, data.max_length + over));
    }
    Ok((SftExample { tokens, loss_mask: mask }, over > 0))
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
        let Record::Ranked { prompt, responses, label } = record else {
            bail!(
                "reward modelling needs comparisons (\"chosen\" and \"rejected\", or ranked \"responses\"), and this record is {}",
                record.kind()
            );
        };
        let layouts = responses.iter().map(|response| renderer.pair(prompt, response)).collect::<Result<_>>()?;
        let Continued { prompt: mut tokens, responses: mut encoded, remarks } =
            sequence::continued(layouts, renderer.ends(), *encoder)?;
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
        let examples = vec![RankedExample { prompt: tokens, responses: encoded, label: *label }];
        Ok(Outcome::Keep { examples, truncated: over > 0, remarks })
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
            Record::Ranked { prompt, responses, .. } if responses.len() == 2 => {
                (prompt, vec![(&responses[0], true), (&responses[1], false)])
            }
            _ => bail!(
                "KTO needs labelled responses (\"label\": true or false, or \"chosen\" and \"rejected\"), and this record is {}",
                record.kind()
            ),
        };
        let layouts = labelled.iter().map(|(response, _)| renderer.pair(prompt, response)).collect::<Result<_>>()?;
        let Continued { prompt: tokens, responses, mut remarks } =
            sequence::continued(layouts, renderer.ends(), *encoder)?;
        if matches!(record, Record::Ranked { label, .. } if *label != PairLabel::default()) {
            remarks.insert("with \"chosen_probability\" or \"margin\", which only the reward stage reads");
        }
        let (mut examples, mut truncated) = (Vec::new(), false);
        for (mut response, (_, desirable)) in responses.into_iter().zip(labelled) {
            let mut prompt = tokens.clone();
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
        Ok(Outcome::Keep { examples, truncated, remarks })
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
                (encode_prompt(&text, renderer.front(prompt), *encoder)?, text)
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
