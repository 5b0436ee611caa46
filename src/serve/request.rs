//! The bodies of `/v1/completions` and `/v1/chat/completions` -> prompts and sampling parameters, with vLLM's fields and
//! defaults. It does not depend on HTTP. Read `fields.rs` beside it for types and ranges, and `configs/serve.md` for the list.

use serde_json::{Map, Value, json};

use super::fault::Fault;
use super::fields::Fields;
use super::prompt::{self, Prompt};
use crate::run::Model;

/// Responses that one request may ask for.
const MOST_CHOICES: usize = 1024;
/// Most likely tokens that a request may ask for with each token.
const MOST_LOGPROBS: i64 = 20;
/// Strings and tokens that may end a response.
const MOST_STOPS: usize = 64;
/// `max_tokens` of completions where a request gives none, as OpenAI and vLLM have it.
const COMPLETION_TOKENS: usize = 16;

/// How tokens become text, and what ends it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Text {
    /// Strings that end a response.
    pub stop: Vec<String>,
    /// Tokens that end a response beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// The model's tokens that end a response; none under `ignore_eos`.
    pub ends: Vec<u32>,
    /// Whether the text has what ended it.
    pub include_stop: bool,
    /// Whether the text is without special tokens.
    pub skip_special_tokens: bool,
}

impl Default for Text {
    fn default() -> Self {
        Self { stop: vec![], stop_token_ids: vec![], ends: vec![], include_stop: false, skip_special_tokens: true }
    }
}

/// Sampling parameters as the request gives them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sampling {
    /// `None`: up to the end of the context.
    pub max_tokens: Option<usize>,
    pub temperature: f64,
    pub top_p: f64,
    /// 0: all.
    pub top_k: usize,
    pub n: usize,
    /// `None`: another one for each request.
    pub seed: Option<u64>,
    /// Most likely tokens that are reported with each token; `None`: no log-probabilities.
    pub logprobs: Option<usize>,
}

/// What a reply holds beside its text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub chat: bool,
    pub stream: bool,
    /// Whether a stream ends with the usage.
    pub include_usage: bool,
    pub return_token_ids: bool,
    /// Whether a token in log-probabilities is named by its id.
    pub tokens_as_ids: bool,
}

/// A request for text.
#[derive(Debug)]
pub(super) struct Request {
    /// The model's name; `None` is the base.
    pub model: Option<String>,
    pub prompts: Vec<Prompt>,
    /// Whether what the tokenizer puts before a text is put before a prompt that is text.
    pub add_special_tokens: bool,
    pub sampling: Sampling,
    pub text: Text,
    pub shape: Shape,
}

/// A list of whole numbers that are tokens.
pub(super) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

impl Request {
    /// The body of `/v1/completions`. `ends`: the model's tokens that end a response.
    ///
    /// # Errors
    /// 400 for a field of another type or range, or one that is not supported.
    pub fn completion(body: &[u8], model: &Model, ends: &[u32]) -> Result<Self, Fault> {
        let mut fields = Fields::parse(body)?;
        let prompts = match fields.take("prompt") {
            None => return Err(Fault::field("prompt", "is missing; give a string or a list of token ids")),
            Some(value) => prompt::prompts(&value)?,
        };
        let most = fields.integer("logprobs", 0..=MOST_LOGPROBS)?;
        let mut request = Self::common(fields, (model, ends), prompts, most, true, |fields| {
            Ok(Some(fields.integer("max_tokens", 1..=i64::MAX)?.unwrap_or(COMPLETION_TOKENS as i64)))
        })?;
        request.shape.chat = false;
        Ok(request)
    }

    /// The body of `/v1/chat/completions`.
    ///
    /// # Errors
    /// As for [`Request::completion`].
    pub fn chat(body: &[u8], model: &Model, ends: &[u32]) -> Result<Self, Fault> {
        let mut fields = Fields::parse(body)?;
        let Some(messages) = fields.take("messages") else {
            return Err(Fault::field("messages", "is missing; give a list of {\"role\", \"content\"}"));
        };
        let tools = fields.take("tools").filter(|tools| tools.as_array().is_none_or(|list| !list.is_empty()));
        let tools = match fields.take("tool_choice") {
            Some(choice) if choice == "none" => None,
            Some(choice) if choice != "auto" => {
                return Err(Fault::field("tool_choice", "only \"auto\" and \"none\" are supported by this server"));
            }
            _ => tools,
        };
        let mut variables = Map::new();
        if let Some(tools) = tools {
            if !tools.as_array().is_some_and(|list| list.iter().all(Value::is_object)) {
                return Err(Fault::field("tools", "expected a list of objects"));
            }
            variables.insert("tools".into(), tools);
        }
        variables.extend(fields.take("documents").map(|documents| ("documents".to_owned(), documents)));
        variables.extend(fields.object("chat_template_kwargs")?.unwrap_or_default());
        let open = fields.flag("add_generation_prompt", true)?;
        let prompts = vec![prompt::dialogue(&messages, variables, open)?];
        let most = fields.integer("top_logprobs", 0..=MOST_LOGPROBS)?;
        let most = match (fields.flag("logprobs", false)?, most) {
            (true, most) => Some(most.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => return Err(Fault::field("top_logprobs", "needs \"logprobs\": true")),
        };
        let mut request = Self::common(fields, (model, ends), prompts, most, false, |fields| {
            let new = fields.integer("max_completion_tokens", 1..=i64::MAX)?;
            let old = fields.integer("max_tokens", 1..=i64::MAX)?;
            Ok(new.or(old))
        })?;
        request.shape.chat = true;
        Ok(request)
    }

    fn common(
        mut fields: Fields,
        (model, ends): (&Model, &[u32]),
        prompts: Vec<Prompt>,
        logprobs: Option<i64>,
        add_special_tokens: bool,
        max_tokens: impl FnOnce(&mut Fields) -> Result<Option<i64>, Fault>,
    ) -> Result<Self, Fault> {
        let max_tokens = max_tokens(&mut fields)?.map(|tokens| tokens as usize);
        let n = fields.integer("n", 1..=MOST_CHOICES as i64)?.unwrap_or(1) as usize;
        if fields.integer("best_of", 1..=i64::MAX)?.is_some_and(|best| best as usize != n) {
            return Err(Fault::field("best_of", "is not supported by this server; leave it out or set it to n"));
        }
        if prompts.len() * n > MOST_CHOICES {
            return Err(Fault::field("n", format!("asks for more than {MOST_CHOICES} responses in one request")));
        }
        let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0).max(0) as usize;
        let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
        if top_p <= 0.0 {
            return Err(Fault::field("top_p", "must be above 0 and at most 1"));
        }
        let seed = match fields.take("seed") {
            None => None,
            // A seed that does not fit 63 bits may come as either sign.
            Some(value) => match value.as_u64().or(value.as_i64().map(|seed| seed as u64)) {
                Some(seed) => Some(seed),
                None => return Err(Fault::field("seed", "expected a whole number of 64 bits")),
            },
        };
        let sampling = Sampling {
            max_tokens,
            temperature: fields.number("temperature", 0.0..=100.0)?.unwrap_or(1.0),
            top_p,
            top_k,
            n,
            seed,
            logprobs: logprobs.map(|most| most as usize),
        };
        let stop = match fields.take("stop") {
            None => vec![],
            Some(Value::String(one)) => vec![one],
            Some(value) => {
                let list = value.as_array().and_then(|list| {
                    list.iter().map(|stop| stop.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
                });
                list.ok_or_else(|| Fault::field("stop", "expected a string or a list of strings"))?
            }
        };
        if stop.iter().any(String::is_empty) {
            return Err(Fault::field("stop", "holds an empty string, which every text ends at"));
        }
        let vocab = model.base.config().vocab_size;
        let stop_token_ids = match fields.take("stop_token_ids") {
            None => vec![],
            Some(value) => token_ids(&value)
                .filter(|ids| ids.iter().all(|&id| (id as usize) < vocab))
                .ok_or_else(|| Fault::field("stop_token_ids", format!("expected a list of token ids below {vocab}")))?,
        };
        if stop.len() + stop_token_ids.len() > MOST_STOPS {
            return Err(Fault::field("stop", format!("more than {MOST_STOPS} strings and tokens end a response")));
        }
        let ends = match fields.flag("ignore_eos", false)? {
            true => vec![],
            false => ends.to_vec(),
        };
        let text = Text {
            stop,
            stop_token_ids,
            ends,
            include_stop: fields.flag("include_stop_str_in_output", false)?,
            skip_special_tokens: fields.flag("skip_special_tokens", true)?,
        };
        let stream = fields.flag("stream", false)?;
        let include_usage = match fields.object("stream_options")? {
            None => false,
            Some(_) if !stream => return Err(Fault::field("stream_options", "needs \"stream\": true")),
            Some(options) => {
                let mut options = Fields::of(options);
                let include_usage = options.flag("include_usage", false)?;
                if options.flag("continuous_usage_stats", false)? {
                    return Err(Fault::field(
                        "stream_options",
                        "continuous_usage_stats is not supported by this server",
                    ));
                }
                include_usage
            }
        };
        let request = Self {
            model: fields.text("model")?,
            prompts,
            add_special_tokens: fields.flag("add_special_tokens", add_special_tokens)?,
            sampling,
            text,
            shape: Shape {
                chat: false,
                stream,
                include_usage,
                return_token_ids: fields.flag("return_token_ids", false)?,
                tokens_as_ids: fields.flag("return_tokens_as_token_ids", false)?,
            },
        };
        fields.end()?;
        Ok(request)
    }
}

/// The usage object of a reply.
pub(super) fn usage(prompt_tokens: usize, completion_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}
