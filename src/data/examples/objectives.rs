//! Records -> the token sequences of SFT, reward modelling and PPO, with every loss counted in a [`Report`].
//!
//! Prompt and answer are tokenised apart, so the mask of the answer is exact and the prompt's tokens are the very ones
//! PPO will sample after. Knows the tokenizer only as a [`TextEncoder`]. Read pipeline.rs next.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};

use crate::config::{Compat, Data, Truncation};
use crate::data::examples::Example;
use crate::data::examples::compat;
use crate::data::examples::compat::Part;
use crate::data::examples::dschat;
use crate::data::examples::render::{Renderer, Segment};
pub use crate::data::examples::report::{Outcome, Report};
use crate::data::{Entry, Message, Record, Text};
use crate::tokenizer::chat_template::{GenerationPrompt, TemplateTokens, render};

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

impl RankedExample {
    /// The first position, counted from the prompt's start, at which answers `a` and `b` differ.
    pub fn divergence(&self, a: usize, b: usize) -> usize {
        let pairs = self.answers[a].iter().zip(&self.answers[b]);
        self.prompt.len() + pairs.take_while(|(x, y)| x == y).count()
    }
}

/// An answer that was judged by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpairedExample {
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
    /// Number of its record, from 0, among all that could be read.
    pub entry: usize,
}

/// How records become examples.
pub struct Encoding<'e> {
    encoder: &'e dyn TextEncoder,
    renderer: Renderer<'e>,
    data: &'e Data,
    completion_only: bool,
}

impl<'e> Encoding<'e> {
    /// `completion_only` concerns SFT alone: is the loss on the answers, or on every token but the first?
    ///
    /// # Errors
    /// A template that the tokenizer does not have.
    pub fn new(encoder: &'e dyn TextEncoder, data: &'e Data, completion_only: bool) -> Result<Self> {
        Ok(Self { encoder, renderer: Renderer::new(encoder, data)?, data, completion_only })
    }
}

/// A kind of example, and how a record becomes some.
pub trait Objective: Example + Send + Sync + 'static {
    /// Its name in a cache's key.
    const NAME: &'static str;
    /// Whose share of the records it gets under `compat = "dschat"`; None = all of them.
    const PART: Option<Part> = None;

    /// What a record gives.
    ///
    /// # Errors
    /// The record is not one for this phase, or its dialogue is one the template refuses.
    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>>;

    /// Notes that it is of the record of this number, from 0, among all that could be read.
    fn of_record(self, _number: usize) -> Self {
        self
    }
}

/// Hands the examples of the phase's records to `sink`, each with its record; `sources` = how many records each has.
pub(crate) fn each<T: Objective>(
    entries: &[Entry],
    sources: &[usize],
    with: &Encoding,
    report: &mut Report,
    sink: &mut dyn FnMut(T, &Record) -> Result<()>,
) -> Result<()> {
    for row in compat::rows_of(sources, with.data, T::PART)? {
        let Entry { place, record } = &entries[row];
        for example in report.take(place, T::of(record, with), with.data.on_bad_record)? {
            sink(example.of_record(row), record)?;
        }
    }
    report.check()
}

/// Runs a phase over records in memory.
fn over<T: Objective>(entries: &[Entry], with: &Encoding) -> Result<(Vec<T>, Report)> {
    let (mut report, mut all) = (Report::default(), vec![]);
    each(entries, &[entries.len()], with, &mut report, &mut |example, _| {
        all.push(example);
        Ok(())
    })?;
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

/// Sequences for supervised fine-tuning; `completion_only` as for [`Encoding::new`].
///
/// # Errors
/// A record without answer or one the template refuses (unless `on_bad_record = "skip"`); no sequence left.
pub fn sft_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
    completion_only: bool,
) -> Result<(Vec<SftExample>, Report)> {
    over(entries, &Encoding::new(encoder, data, completion_only)?)
}

/// A dialogue is learnt at all its assistant turns with their end tokens, a ranking at its best answer, a judged answer
/// where it was judged good; without `completion_only`, at every token but the first. Raw text is learnt at every token,
/// with an end token behind it, and cut into blocks of `max_length` where it is longer.
impl Objective for SftExample {
    const NAME: &'static str = "sft";
    const PART: Option<Part> = Some(Part::Sft);

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, completion_only } = with;
        if data.compat.is_some() {
            return compat::sft(record, renderer, *encoder, data).map(Outcome::from);
        }
        let (start, segments) = match record {
            Record::LanguageModeling(Text::Verbatim(text)) => {
                return Ok(blocks(&whole_text(text, *encoder)?, data.max_length));
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
        let (mut tokens, mut mask) = encode(&segments, *encoder)?;
        if let Some(first) = start {
            tokens.insert(0, first);
            mask.insert(0, false);
        }
        if !completion_only {
            mask.fill(true);
        }
        fit(tokens, mask, &segments, data, *encoder)
    }
}

/// A text in its tokenizer's frame: opening token where there is one, end token behind.
fn whole_text(text: &str, encoder: &dyn TextEncoder) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = encoder.bos_id().into_iter().collect();
    tokens.extend(encoder.encode(text)?);
    tokens.push(encoder.eos_id());
    Ok(tokens)
}

/// A raw text for the ptx mixture; pipeline.rs joins them and cuts the blocks.
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
        *first = false; // nothing before it to predict it from
    }
    if !mask.contains(&true) {
        return Ok(Outcome::Drop(format!("with a prompt that fills max_length = {}", data.max_length)));
    }
    Ok(Outcome::keep(SftExample { tokens, loss_mask: mask }, over > 0))
}

/// Rankings for the reward model, from preferences and ranked answers.
///
/// # Errors
/// A record that compares nothing or one the template refuses (unless `on_bad_record = "skip"`); no sequence left.
pub fn ranked_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<RankedExample>, Report)> {
    over(entries, &Encoding::new(encoder, data, true)?)
}

/// Under `truncation = "left"` the prompt loses its first tokens until the longest answer fits, under `"right"` and
/// `"keep_end"` the answers lose their last; the prompt is the same for all answers either way.
impl Objective for RankedExample {
    const NAME: &'static str = "ranked";
    const PART: Option<Part> = Some(Part::Reward);

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, .. } = with;
        let limit = data.max_length;
        if data.compat.is_some() {
            return compat::ranked(record, renderer, *encoder, data).map(Outcome::from);
        }
        let Record::Ranked { prompt, answers } = record else {
            bail!(
                "reward modelling needs comparisons (\"chosen\" and \"rejected\", or ranked \"responses\"), and this record is {}",
                record.kind()
            );
        };
        let mut tokens = encode_prompt(&renderer.prompt(prompt)?, renderer.first_token(prompt), *encoder)?;
        let mut encoded = Vec::with_capacity(answers.len());
        for answer in answers {
            encoded.push(encode(&renderer.answer(prompt, answer)?.1, *encoder)?.0);
        }
        let longest = encoded.iter().map(Vec::len).max().unwrap_or(0);
        let over = (tokens.len() + longest).saturating_sub(limit);
        match data.truncation {
            _ if over == 0 => {}
            Truncation::Drop => return Ok(Outcome::too_long("max_length", limit)),
            Truncation::Left if over < tokens.len() => drop(tokens.drain(..over)),
            Truncation::Left => return Ok(Outcome::Drop(format!("with an answer longer than max_length = {limit}"))),
            Truncation::Right | Truncation::KeepEnd if tokens.len() >= limit => {
                return Ok(Outcome::Drop(format!("with a prompt that fills max_length = {limit}")));
            }
            Truncation::Right => encoded.iter_mut().for_each(|answer| answer.truncate(limit - tokens.len())),
            Truncation::KeepEnd => {
                let room = limit - tokens.len();
                for answer in encoded.iter_mut().filter(|answer| answer.len() > room) {
                    answer.truncate(room);
                    answer[room - 1] = encoder.eos_id();
                }
            }
        }
        if encoded.iter().collect::<BTreeSet<_>>().len() < encoded.len() {
            // Different texts: only a cut, or a tokenizer that normalises, makes them equal.
            return Ok(Outcome::Drop("with answers that are the same tokens".to_owned()));
        }
        Ok(Outcome::keep(RankedExample { prompt: tokens, answers: encoded }, over > 0))
    }
}

/// Judged answers for KTO.
///
/// # Errors
/// A record without a verdict, a ranking of more than two, one the template refuses (unless `on_bad_record = "skip"`); no
/// sequence left.
pub fn judged_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<UnpairedExample>, Report)> {
    over(entries, &Encoding::new(encoder, data, true)?)
}

/// From unpaired records, and from preferences, whose chosen answer counts as good and whose rejected one as bad (as in
/// TRL).
impl Objective for UnpairedExample {
    const NAME: &'static str = "judged";

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, .. } = with;
        let limit = data.max_length;
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
        let tokens = encode_prompt(&renderer.prompt(prompt)?, renderer.first_token(prompt), *encoder)?;
        let (mut examples, mut truncated) = (Vec::new(), false);
        for (answer, good) in judged {
            let (mut prompt, mut answer) = (tokens.clone(), encode(&renderer.answer(prompt, answer)?.1, *encoder)?.0);
            let over = (prompt.len() + answer.len()).saturating_sub(limit);
            match data.truncation {
                _ if over == 0 => {}
                Truncation::Drop => return Ok(Outcome::too_long("max_length", limit)),
                Truncation::Left if over < prompt.len() => drop(prompt.drain(..over)),
                Truncation::Left => {
                    return Ok(Outcome::Drop(format!("with an answer longer than max_length = {limit}")));
                }
                Truncation::Right | Truncation::KeepEnd if prompt.len() >= limit => {
                    return Ok(Outcome::Drop(format!("with a prompt that fills max_length = {limit}")));
                }
                Truncation::Right => answer.truncate(limit - prompt.len()),
                Truncation::KeepEnd => {
                    answer.truncate(limit - prompt.len() - 1);
                    answer.push(encoder.eos_id());
                }
            }
            truncated |= over > 0;
            examples.push(UnpairedExample { prompt, answer, good });
        }
        Ok(Outcome::Keep { examples, truncated })
    }
}

/// Prompts for PPO, from any record that has one.
///
/// # Errors
/// A record without prompt or one the template refuses (unless `on_bad_record = "skip"`); no prompt left.
pub fn prompt_examples(
    entries: &[Entry],
    encoder: &dyn TextEncoder,
    data: &Data,
) -> Result<(Vec<PromptExample>, Report)> {
    over(entries, &Encoding::new(encoder, data, true)?)
}

/// A prompt longer than `max_prompt_length` is dropped and counted, never cut, as in DeepSpeed-Chat.
impl Objective for PromptExample {
    const NAME: &'static str = "prompt";
    const PART: Option<Part> = Some(Part::Ppo);

    fn of_record(self, number: usize) -> Self {
        Self { entry: number, ..self }
    }

    fn of(record: &Record, with: &Encoding) -> Result<Outcome<Self>> {
        let Encoding { encoder, renderer, data, .. } = with;
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
            Some(Compat::Dschat) => match compat::prompt(prompt, renderer, *encoder, data)? {
                Ok(made) => made,
                Err(reason) => return Ok(Outcome::Drop(reason)),
            },
            None => {
                let text = renderer.prompt(prompt)?;
                (encode_prompt(&text, renderer.first_token(prompt), *encoder)?, text)
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
        Ok(Outcome::keep(PromptExample { tokens, text, answer, entry: 0 }, false))
    }
}
