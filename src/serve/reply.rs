//! Pieces of responses -> the JSON objects that OpenAI's clients read, whole or as chunks of a stream, with vLLM's additions. It
//! does not depend on HTTP. Read `choice.rs` beside it for pieces.

use serde_json::{Map, Value, json};

use super::choice::{End, Piece, Token};
use super::request::{Shape, usage};
use crate::tokenizer::Tokenizer;

/// The least log-probability that is written: JSON has no infinity.
const LEAST: f32 = -9999.0;

/// What all objects of one reply share.
pub(super) struct Frame<'r> {
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name, as the request has it.
    pub model: String,
    pub shape: Shape,
    /// Whether log-probabilities are wanted.
    pub logprobs: bool,
    pub tokenizer: &'r Tokenizer,
    /// Token ids of each prompt.
    pub prompts: &'r [Vec<u32>],
    /// Responses per prompt.
    pub n: usize,
}

/// What was written of a response.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Written {
    /// Characters of the tokens so far.
    offset: usize,
    /// Whether a chunk was written.
    begun: bool,
}

impl End {
    fn reason(&self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Eos | Self::StopToken(_) | Self::StopText(_) => "stop",
        }
    }

    /// What ended the response, where that is not the model's own token.
    fn stop_reason(&self) -> Value {
        match self {
            Self::Length | Self::Eos => Value::Null,
            Self::StopToken(id) => (*id).into(),
            Self::StopText(text) => text.as_str().into(),
        }
    }
}

impl Frame<'_> {
    /// A token as log-probabilities name it.
    fn name(&self, id: u32) -> String {
        if self.shape.tokens_as_ids {
            return format!("token_id:{id}");
        }
        let text = self.tokenizer.decode_with_special_tokens(&[id]).unwrap_or_default();
        // SentencePiece drops the space at the beginning of a text.
        match self.tokenizer.token(id) {
            Some(spelled) if spelled.starts_with('▁') && !text.starts_with(' ') => format!(" {text}"),
            _ => text,
        }
    }

    fn logprobs(&self, tokens: &[Token], offset: &mut usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let number = |logprob: f32| logprob.max(LEAST);
        if self.shape.chat {
            let entry = |id: u32, logprob: f32| {
                let token = self.name(id);
                json!({ "token": token, "logprob": number(logprob), "bytes": token.as_bytes() })
            };
            let content = tokens.iter().map(|token| {
                let mut of = entry(token.id, token.logprob);
                of["top_logprobs"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
                of
            });
            return json!({ "content": content.collect::<Vec<_>>() });
        }
        let (mut names, mut offsets, mut tops) = (vec![], vec![], vec![]);
        for token in tokens {
            let name = self.name(token.id);
            let mut top: Map<String, Value> = Map::new();
            for (id, logprob) in [(token.id, token.logprob)].iter().chain(&token.top) {
                top.entry(self.name(*id)).or_insert_with(|| json!(number(*logprob)));
            }
            offsets.push(*offset);
            *offset += name.chars().count();
            names.push(name);
            tops.push(top);
        }
        let logprobs: Vec<f32> = tokens.iter().map(|token| number(token.logprob)).collect();
        json!({ "tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets })
    }

    fn head(&self, object: &str) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model })
    }

    /// A choice of either kind, whole or in part.
    fn choice(&self, index: usize, piece: &Piece, written: &mut Written, content: (&str, Value)) -> Value {
        let mut choice = json!({ "index": index });
        choice[content.0] = content.1;
        choice["logprobs"] = self.logprobs(&piece.tokens, &mut written.offset);
        choice["finish_reason"] = piece.end.as_ref().map(End::reason).into();
        choice["stop_reason"] = piece.end.as_ref().map_or(Value::Null, End::stop_reason);
        if self.shape.return_token_ids {
            choice["token_ids"] = piece.tokens.iter().map(|token| token.id).collect();
            if !self.shape.chat && !written.begun {
                choice["prompt_token_ids"] = self.prompts[index / self.n].clone().into();
            }
        }
        written.begun = true;
        choice
    }

    /// Tokens of the prompts, and of the responses.
    fn usage(&self, completion_tokens: usize) -> Value {
        usage(self.prompts.iter().map(Vec::len).sum(), completion_tokens)
    }

    /// The whole reply.
    pub fn whole(&self, pieces: &[Piece]) -> Value {
        let choices = pieces.iter().enumerate().map(|(index, piece)| {
            let content = match self.shape.chat {
                true => ("message", json!({ "role": "assistant", "content": piece.text, "refusal": null })),
                false => ("text", piece.text.as_str().into()),
            };
            self.choice(index, piece, &mut Written::default(), content)
        });
        let choices: Vec<Value> = choices.collect();
        let mut reply = self.head(if self.shape.chat { "chat.completion" } else { "text_completion" });
        reply["choices"] = choices.into();
        reply["usage"] = self.usage(pieces.iter().map(|piece| piece.tokens.len()).sum());
        if self.shape.chat && self.shape.return_token_ids {
            reply["prompt_token_ids"] = self.prompts[0].clone().into();
        }
        reply
    }

    fn chunk_of(&self, choices: Vec<Value>) -> Value {
        let mut chunk = self.head(if self.shape.chat { "chat.completion.chunk" } else { "text_completion" });
        chunk["choices"] = choices.into();
        if self.shape.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// The chunk that opens a chat's response.
    pub fn opening(&self, index: usize) -> Value {
        let delta = json!({ "role": "assistant", "content": "" });
        let mut chunk =
            self.chunk_of(vec![json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null })]);
        if self.shape.return_token_ids {
            chunk["prompt_token_ids"] = self.prompts[0].clone().into();
        }
        chunk
    }

    /// The chunk of a piece; `None` if nobody would see it.
    pub fn chunk(&self, index: usize, piece: &Piece, written: &mut Written) -> Option<Value> {
        let shows_tokens = (self.logprobs || self.shape.return_token_ids) && !piece.tokens.is_empty();
        if piece.text.is_empty() && piece.end.is_none() && !shows_tokens {
            return None;
        }
        let content = match self.shape.chat {
            true if piece.text.is_empty() && piece.end.is_some() => ("delta", json!({})),
            true => ("delta", json!({ "content": piece.text })),
            false => ("text", piece.text.as_str().into()),
        };
        Some(self.chunk_of(vec![self.choice(index, piece, written, content)]))
    }

    /// The last chunk, if the request asks for it: the usage.
    pub fn closing(&self, completion_tokens: usize) -> Option<Value> {
        self.shape.include_usage.then(|| {
            let mut chunk = self.chunk_of(vec![]);
            chunk["usage"] = self.usage(completion_tokens);
            chunk
        })
    }
}
