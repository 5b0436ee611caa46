//! A reward source that asks a reward model behind a model server, in the server's own dialect: vLLM's `/classify`, `/pooling` and
//! `/score`, SGLang's `/classify` and `/v1/score`. It does not depend on the policy's model. Read `reply.rs` for which number of
//! a reply is the score, and `retry.rs` for how failures are handled.

use std::cell::RefCell;
use std::collections::HashMap;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::endpoint::Endpoint;
use super::reply;
use super::template::{self, check_template};
use super::{RewardInputs, RewardSource, without_leading};
use crate::data::stream::columns::Columns;
use crate::error::counted;
use crate::report::Metrics;
use crate::reward::source::retry::{Failure, RetryPolicy, Troubles};

/// The text of a sequence without a template.
pub const TEMPLATE: &str = "{{ prompt }}{{ response }}";
/// Responses per request: a server batches as it likes, and a request stays below a few megabytes.
const BATCH: usize = 256;

/// The requests and replies that a model server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// vLLM's `/classify` and SGLang's `/v1/classify`: `{"input"}`, replied to by `{"data": [{"index", "probs"}]}`.
    Classify,
    /// vLLM's `/pooling`: `{"input"}`, replied to by `{"data": [{"index", "data"}]}`.
    Pooling,
    /// vLLM's `/score` and `/v1/score`: `{"text_1", "text_2"}`, replied to by `{"data": [{"index", "score"}]}`.
    Score,
    /// SGLang's `/classify`: `{"input_ids"}` or `{"text"}`, replied to by `[{"embedding"}]`.
    SglangClassify,
    /// SGLang's `/v1/score`: `{"query", "items"}` of one prompt, replied to by `{"scores": [[…]]}`.
    SglangScore,
}

/// How a reward model is asked.
#[derive(Clone, Debug)]
pub struct ServedRules {
    /// The requests and replies.
    pub dialect: Dialect,
    /// Name of the served model; empty leaves it to the server.
    pub model: String,
    /// Jinja template of a sequence's text; see [`check_template`]. `None` sends the policy's token ids.
    pub template: Option<String>,
    /// Which number of a list is the score; `None` accepts lists of one number alone.
    pub index: Option<usize>,
    /// More keys of the request, in place of ours where they have the same name.
    pub request: Map<String, Value>,
    /// Pad token that prompts begin with under `compat`; the model does not read it.
    pub pad: Option<u32>,
}

/// A reward model behind a server.
pub struct ServedReward<'w> {
    endpoint: Endpoint,
    rules: ServedRules,
    columns: Option<&'w Columns>,
    retry: RetryPolicy,
    troubles: RefCell<Troubles>,
}

/// What the responses of one batch are asked by.
enum Asked {
    /// Token ids of each sequence.
    Ids(Vec<Vec<u32>>),
    /// Text of each sequence.
    Texts(Vec<String>),
    /// Texts of each prompt and response.
    Pairs(Vec<(String, String)>),
    /// Token ids of each prompt and response.
    IdPairs(Vec<(Vec<u32>, Vec<u32>)>),
}

impl<'w> ServedReward<'w> {
    /// Creates the client; the first request is sent with the first rollout. `key`: the bearer token of the
    /// `Authorization` header.
    ///
    /// # Errors
    /// Those of [`check_template`].
    pub fn new(
        url: String,
        key: Option<String>,
        rules: ServedRules,
        columns: Option<&'w Columns>,
        retry: RetryPolicy,
    ) -> Result<Self> {
        rules.template.as_deref().map(check_template).transpose()?;
        let endpoint = Endpoint::new(url, key, retry.timeout);
        Ok(Self { endpoint, rules, columns, retry, troubles: RefCell::default() })
    }

    /// Failures so far.
    pub fn troubles(&self) -> Troubles {
        *self.troubles.borrow()
    }

    fn asked(&self, inputs: &RewardInputs<'_>) -> Result<Asked> {
        let prompt = |prompt: &Vec<u32>| match self.rules.pad {
            Some(pad) => without_leading(prompt, pad).to_vec(),
            None => prompt.clone(),
        };
        let both = || inputs.prompts.iter().zip(inputs.responses);
        Ok(match (self.rules.dialect, &self.rules.template) {
            (Dialect::Score, _) => Asked::Pairs(both().map(|(p, r)| ((inputs.decode)(p), inputs.text(r))).collect()),
            (Dialect::SglangScore, None) => {
                Asked::IdPairs(both().map(|(p, r)| (prompt(p), r.tokens.clone())).collect())
            }
            (Dialect::SglangScore, Some(_)) => {
                Asked::Pairs(both().map(|(p, r)| ((inputs.decode)(p), inputs.text(r))).collect())
            }
            (_, Some(template)) => Asked::Texts(template::texts(template, "http", inputs, self.columns)?),
            (_, None) => Asked::Ids(both().map(|(p, r)| [&prompt(p)[..], &r.tokens].concat()).collect()),
        })
    }

    /// The scores of responses `from..to`, asked once.
    fn ask(&self, asked: &Asked, from: usize, to: usize) -> Result<Vec<Option<f32>>, Failure> {
        let send = |keys: Value, count: usize| {
            let mut body = keys;
            if !self.rules.model.is_empty() {
                body["model"] = self.rules.model.clone().into();
            }
            // A probability is flat where the model is sure; a reward is the number before it.
            if matches!(self.rules.dialect, Dialect::Classify | Dialect::Pooling | Dialect::Score) {
                body["use_activation"] = false.into();
            }
            self.rules.request.iter().for_each(|(key, value)| body[key] = value.clone());
            reply::scores(self.rules.dialect, &self.endpoint.post(&body)?, count, self.rules.index)
        };
        let count = to - from;
        match (self.rules.dialect, asked) {
            (Dialect::SglangClassify, Asked::Ids(ids)) => send(json!({ "input_ids": ids[from..to] }), count),
            (Dialect::SglangClassify, Asked::Texts(texts)) => send(json!({ "text": texts[from..to] }), count),
            (_, Asked::Ids(ids)) => send(json!({ "input": ids[from..to] }), count),
            (_, Asked::Texts(texts)) => send(json!({ "input": texts[from..to] }), count),
            (Dialect::SglangScore, Asked::Pairs(pairs)) => by_query(&pairs[from..to], send),
            (_, Asked::Pairs(pairs)) => {
                let (prompts, responses): (Vec<&str>, Vec<&str>) =
                    pairs[from..to].iter().map(|(prompt, response)| (prompt.as_str(), response.as_str())).unzip();
                send(json!({ "text_1": prompts, "text_2": responses }), count)
            }
            (_, Asked::IdPairs(pairs)) => by_query(&pairs[from..to], send),
        }
    }
}

/// Asks about the responses of each prompt by one request, `{"query": prompt, "items": responses}`. The labels whose
/// probabilities are returned are keys of `request`.
fn by_query<T: Clone + Eq + std::hash::Hash + Serialize>(
    pairs: &[(T, T)],
    send: impl Fn(Value, usize) -> Result<Vec<Option<f32>>, Failure>,
) -> Result<Vec<Option<f32>>, Failure> {
    let mut places = HashMap::<&T, usize>::new();
    let mut groups: Vec<(&T, Vec<usize>)> = Vec::new();
    for (i, (prompt, _)) in pairs.iter().enumerate() {
        let at = *places.entry(prompt).or_insert(groups.len());
        match groups.get_mut(at) {
            Some((_, rows)) => rows.push(i),
            None => groups.push((prompt, vec![i])),
        }
    }
    let mut scores = vec![None; pairs.len()];
    for (prompt, rows) in groups {
        let items: Vec<&T> = rows.iter().map(|&row| &pairs[row].1).collect();
        let found = send(json!({ "query": prompt, "items": items }), rows.len())?;
        if found.len() != rows.len() {
            let (found, asked) = (counted(found.len(), "score"), counted(rows.len(), "response"));
            return Err(Failure::Passing(format!("it returned {found} for {asked} of one prompt")));
        }
        rows.into_iter().zip(found).for_each(|(row, score)| scores[row] = score);
    }
    Ok(scores)
}

impl RewardSource for ServedReward<'_> {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let asked = self.asked(inputs)?;
        let name = match self.rules.model.as_str() {
            "" => format!("reward model at {}", self.endpoint.url),
            model => format!("reward model {model} at {}", self.endpoint.url),
        };
        let mut troubles = self.troubles.borrow_mut();
        let mut scores = Vec::with_capacity(inputs.responses.len());
        for from in (0..inputs.responses.len()).step_by(BATCH) {
            let to = (from + BATCH).min(inputs.responses.len());
            scores.extend(self.retry.scores(&name, to - from, &mut troubles, || self.ask(&asked, from, to))?);
        }
        Ok(scores)
    }

    fn metrics(&self) -> Metrics {
        self.troubles().metrics()
    }

    fn state(&self) -> Value {
        self.troubles().metrics().into()
    }

    fn restore(&self, state: &Value) {
        *self.troubles.borrow_mut() = Troubles::of(state);
    }
}
