//! The bodies of `/score` and `/classify` -> sequences for a reward adapter, and their replies. `/score` reads prompts with
//! responses or dialogues as `fourfold score` reads its records; `/classify` is vLLM's. It does not depend on HTTP. Read
//! `data/examples/objectives.rs` for how a record becomes tokens.

use serde_json::{Value, json};

use super::fault::Fault;
use super::fields::Fields;
use super::request::{token_ids, usage};
use crate::config::{Data, Tags, Truncation};
use crate::data::examples::objectives::{Encoding, Objective, Outcome, RankedExample};
use crate::data::formats::dialogue::{paired, text_of};
use crate::data::{self, ModelEncoder, Record};
use crate::error::counted;
use crate::host::allocator::without_limits;
use crate::run::Model;
use crate::tokenizer::SpecialTokens;

/// Sequences of one request.
const MOST: usize = 4096;

/// How a reply is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// `/score`: fourfold's list and vLLM's, of rewards.
    Score,
    /// `/classify`: vLLM's, of rewards or, with `use_activation`, their sigmoids.
    Classify { use_activation: bool },
}

/// A request for scores.
#[derive(Debug)]
pub(super) struct Scoring {
    pub model: Option<String>,
    pub sequences: Vec<Vec<u32>>,
    pub style: Style,
}

/// One value, or a list of them; a list of objects is one dialogue.
fn many(value: Value) -> Vec<Value> {
    match value {
        Value::Array(list) if !list.first().is_some_and(Value::is_object) => list,
        one => vec![one],
    }
}

impl Scoring {
    /// The body of `/score`.
    ///
    /// # Errors
    /// 400 for a body of another form, or a sequence that is longer than the context.
    pub fn score(body: &[u8], model: &Model) -> Result<Self, Fault> {
        let mut fields = Fields::parse(body)?;
        let name = fields.text("model")?;
        if fields.flag("use_activation", false)? {
            return Err(Fault::field("use_activation", "is not supported here: a score is the reward itself"));
        }
        let forms = [("prompts", "responses"), ("prompt", "response"), ("text_1", "text_2")];
        let form = forms.into_iter().find(|(prompts, responses)| fields.has(prompts) || fields.has(responses));
        let mut pairs = vec![];
        let mut place = "messages";
        match (form, fields.take("messages")) {
            (Some((prompts, responses)), None) => {
                place = responses;
                let missing = |name: &str| Fault::field(name, "is missing");
                let given = many(fields.take(prompts).ok_or_else(|| missing(prompts))?);
                let replies = many(fields.take(responses).ok_or_else(|| missing(responses))?);
                // One prompt may have several responses.
                let repeat = given.len() == 1 && replies.len() > 1;
                if given.len() != replies.len() && !repeat {
                    let (n, m) = (counted(given.len(), "prompt"), counted(replies.len(), "response"));
                    return Err(Fault::field(responses, format!("{n} and {m}")));
                }
                for (i, response) in replies.iter().enumerate() {
                    let read = |name: &str, value: &Value| {
                        text_of(value, &Tags::default())
                            .map_err(|said| Fault::field(name, format!("entry {i}: {said}")))
                    };
                    let prompt = read(prompts, &given[if repeat { 0 } else { i }])?;
                    pairs.push((prompt, read(responses, response)?));
                }
            }
            (None, Some(messages)) => {
                for (i, dialogue) in many(messages).iter().enumerate() {
                    let fault = |said: String| Fault::field("messages", format!("dialogue {i}: {said}"));
                    let data::Text::Dialogue(mut turns) = text_of(dialogue, &Tags::default()).map_err(fault)? else {
                        return Err(fault("expected a list of {\"role\", \"content\"}".into()));
                    };
                    if turns.len() < 2 || turns.last().is_none_or(|turn| turn.role != "assistant") {
                        return Err(fault(
                            "expected a prompt and an assistant's turn at the end, which is scored".into(),
                        ));
                    }
                    let response = turns.split_off(turns.len() - 1);
                    pairs.push((data::Text::Dialogue(turns), data::Text::Dialogue(response)));
                }
            }
            _ => {
                return Err(Fault::bad(
                    "expected \"prompts\" and \"responses\" (or \"prompt\" and \"response\", or \"text_1\" and \"text_2\"), or \
                     \"messages\" that end with the assistant's turn",
                ));
            }
        }
        fields.end()?;
        let sequences = sequences(pairs, place, model)?;
        Self { model: name, sequences, style: Style::Score }.checked(model)
    }

    /// The body of `/classify`: texts or token ids, scored as they are.
    ///
    /// # Errors
    /// As for [`Scoring::score`].
    pub fn classify(body: &[u8], model: &Model) -> Result<Self, Fault> {
        let mut fields = Fields::parse(body)?;
        let (name, tokenizer) = (fields.text("model")?, model.checkpoint.tokenizer());
        let special = match fields.flag("add_special_tokens", true)? {
            true => SpecialTokens::Add,
            false => SpecialTokens::None,
        };
        let style = Style::Classify { use_activation: fields.flag("use_activation", true)? };
        let fault = || Fault::field("input", "expected a string, a list of strings, token ids or a list of such lists");
        let inputs = match fields.take("input") {
            Some(ids @ Value::Array(_)) if token_ids(&ids).is_some_and(|ids| !ids.is_empty()) => vec![ids],
            Some(Value::Array(list)) if !list.is_empty() => list,
            Some(text @ Value::String(_)) => vec![text],
            _ => return Err(fault()),
        };
        fields.end()?;
        let sequence = |input: &Value| match input {
            Value::String(text) => tokenizer.encode(text, special).map_err(|error| Fault::of(&error)),
            ids => token_ids(ids).ok_or_else(fault),
        };
        let sequences = inputs.iter().map(sequence).collect::<Result<_, _>>()?;
        Self { model: name, sequences, style }.checked(model)
    }

    fn checked(self, model: &Model) -> Result<Self, Fault> {
        let config = model.base.config();
        let (vocab, context) = (config.vocab_size, config.max_position_embeddings);
        if self.sequences.is_empty() || self.sequences.len() > MOST {
            return Err(Fault::bad(format!(
                "{} sequences, where 1 to {MOST} can be scored at once",
                self.sequences.len()
            )));
        }
        for (i, sequence) in self.sequences.iter().enumerate() {
            if let Some(id) = sequence.iter().find(|&&id| id as usize >= vocab) {
                return Err(Fault::bad(format!("sequence {i} has token {id}, and the model has {vocab}")));
            }
            if sequence.is_empty() || sequence.len() > context {
                let found = sequence.len();
                return Err(Fault::bad(format!(
                    "sequence {i} has {found} tokens, where 1 to {context} fit the context"
                )));
            }
        }
        Ok(self)
    }

    /// The reply.
    ///
    /// # Errors
    /// 500 if a score is NaN or infinite.
    pub fn reply(&self, id: &str, created: u64, name: &str, scores: &[f32]) -> Result<Value, Fault> {
        if let Some(i) = scores.iter().position(|score| !score.is_finite()) {
            return Err(Fault::new(500, format!("the score of sequence {i} is {}; check the adapter", scores[i])));
        }
        let data: Vec<Value> = scores
            .iter()
            .enumerate()
            .map(|(index, &score)| match self.style {
                Style::Score => json!({ "index": index, "object": "score", "score": score }),
                Style::Classify { use_activation } => {
                    let value = if use_activation { 1.0 / (1.0 + (-score).exp()) } else { score };
                    json!({ "index": index, "label": "LABEL_0", "probs": [value], "num_classes": 1 })
                }
            })
            .collect();
        let tokens = self.sequences.iter().map(Vec::len).sum();
        let mut reply = json!({ "id": id, "object": "list", "created": created, "model": name, "data": data });
        if self.style == Style::Score {
            reply["scores"] = json!(scores);
        }
        reply["usage"] = usage(tokens, 0);
        Ok(reply)
    }
}

/// Token ids of each prompt with its response, as `fourfold score` and the reward stage have them.
fn sequences(pairs: Vec<(data::Text, data::Text)>, place: &'static str, model: &Model) -> Result<Vec<Vec<u32>>, Fault> {
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer()).map_err(|error| Fault::of(&error))?;
    let data = Data {
        max_length: model.base.config().max_position_embeddings,
        truncation: Truncation::Drop,
        ..Data::default()
    };
    let encoding = Encoding::new(&encoder, &data, true).map_err(|error| Fault::of(&error))?;
    let mut found = Vec::with_capacity(pairs.len());
    for (i, (prompt, response)) in pairs.into_iter().enumerate() {
        let fault = |said: String| Fault::field(place, format!("entry {i}: {said}"));
        let (prompt, responses) = paired(prompt, vec![(place, response)]).map_err(fault)?;
        let record = Record::Ranked { prompt, responses, label: Default::default() };
        let outcome = without_limits(|| RankedExample::of(&record, &encoding)).map_err(|e| fault(format!("{e:#}")))?;
        match outcome {
            Outcome::Keep { examples, .. } => {
                found.extend(examples.into_iter().flat_map(|RankedExample { prompt, responses, .. }| {
                    responses.into_iter().map(move |response| [&prompt[..], &response].concat())
                }));
            }
            Outcome::Drop(reason) => return Err(fault(reason)),
            Outcome::TooLong { needs, .. } => {
                let context = data.max_length;
                return Err(fault(format!("it has {needs} tokens, and the model's context {context}; shorten it")));
            }
        }
    }
    Ok(found)
}
