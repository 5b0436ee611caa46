//! What each endpoint does with a body. It does not depend on connections. Read `request.rs` beside it for a body's fields, and
//! `engine.rs` for who generates.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use hyper::Response;
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::State;
use super::adapters::now;
use super::choice::{Choice, Piece, Token};
use super::engine::{Event, Flags, Generation};
use super::fault::Fault;
use super::fields::Fields;
use super::http::{self, Asked, Reply};
use super::reply::{Frame, Written};
use super::request::{Request, Text};
use super::score::Scoring;
use super::tokens;
use crate::model::adapter::Adapter;
use crate::model::generate::SamplingParams;
use crate::rng::derive;
use crate::run::Model;
use crate::tokenizer::Tokenizer;

/// Chunks that wait for a client to read them.
const CHUNKS: usize = 64;

type Answer = Result<Response<Reply>, Fault>;

/// Answers a request.
///
/// # Errors
/// What the client is told.
pub(super) async fn of(state: &Arc<State>, asked: Asked, body: Bytes) -> Answer {
    match asked {
        Asked::Health => {
            let (running, waiting) = state.engine.load();
            let (status, word) = if state.engine.is_running() { (200, "ok") } else { (503, "ended") };
            Ok(http::json(status, &json!({ "status": word, "running": running, "waiting": waiting })))
        }
        Asked::Models => {
            Ok(http::json(200, &state.adapters.list(&state.root, state.model.base.config().max_position_embeddings)))
        }
        Asked::Completion | Asked::Chat => text(state, asked == Asked::Chat, body).await,
        Asked::Load | Asked::Unload => {
            let state = state.clone();
            elsewhere(move || adapter(&state, asked == Asked::Load, &body)).await.map(http::sentence)
        }
        Asked::Score | Asked::Classify => score(state, asked == Asked::Score, body).await,
        Asked::Tokenize | Asked::Detokenize => {
            let state = state.clone();
            let reply = elsewhere(move || {
                let of = if asked == Asked::Tokenize { tokens::tokenize } else { tokens::detokenize };
                let (name, reply) = of(&body, &state.model)?;
                state.adapters.find(name.as_deref()).map(|_| reply)
            });
            Ok(http::json(200, &reply.await?))
        }
    }
}

/// Does what may take long on another thread.
async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> Result<T, Fault> + Send + 'static) -> Result<T, Fault> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Fault::new(500, "a fault of the program while it read the request")))
}

fn adapter(state: &State, load: bool, body: &[u8]) -> Result<String, Fault> {
    let mut fields = Fields::parse(body)?;
    let missing = |name: &str| Fault::field(name, "is missing; give a string");
    let name = fields.text("lora_name")?.ok_or_else(|| missing("lora_name"))?;
    if !load {
        state.adapters.unload(&name)?;
        return Ok(format!("Success: LoRA adapter '{name}' removed successfully."));
    }
    let path = fields.text("lora_path")?.ok_or_else(|| missing("lora_path"))?;
    let in_place = fields.flag("load_inplace", false)?;
    state.adapters.load(&state.model, &name, path.as_ref(), in_place)?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully."))
}

async fn score(state: &Arc<State>, is_score: bool, body: Bytes) -> Answer {
    let theirs = state.clone();
    let (scoring, name, adapter) = elsewhere(move || {
        let scoring = match is_score {
            true => Scoring::score(&body, &theirs.model)?,
            false => Scoring::classify(&body, &theirs.model)?,
        };
        let (name, adapter) = theirs.adapters.reward(scoring.model.as_deref())?;
        Ok((scoring, name, adapter))
    })
    .await?;
    let scores = state.engine.score(adapter, scoring.sequences.clone())?.await;
    let scores = scores.map_err(|_| Fault::new(503, "the server is ending"))?.map_err(|error| Fault::of(&error))?;
    let id = state.id(if is_score { "score" } else { "classify" });
    Ok(http::json(200, &scoring.reply(&id, now(), &name, &scores)?))
}

/// A request for text with its prompts as ids.
struct Prepared {
    request: Request,
    prompts: Vec<Vec<u32>>,
    adapter: Option<Arc<Adapter>>,
}

impl Prepared {
    fn new(state: &State, chat: bool, body: &[u8]) -> Result<Self, Fault> {
        let model: &Model = &state.model;
        let request = match chat {
            true => Request::chat(body, model, &state.ends)?,
            false => Request::completion(body, model, &state.ends)?,
        };
        let adapter = state.adapters.policy(request.model.as_deref())?;
        let ids = |prompt: &super::prompt::Prompt| prompt.ids(model, request.add_special_tokens);
        let prompts = request.prompts.iter().map(ids).collect::<anyhow::Result<Vec<_>>>();
        let prompts = prompts.map_err(|error| Fault::of(&error))?;
        let context = model.base.config().max_position_embeddings;
        if let Some(most) = request.sampling.max_tokens {
            let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
            if most > context - longest {
                return Err(Fault::field(
                    "max_tokens",
                    format!(
                        "the model's context is {context} tokens; {longest} of the prompt leave {}, and {most} were asked for",
                        context - longest
                    ),
                ));
            }
        }
        Ok(Self { request, prompts, adapter })
    }

    /// The sequences, n for each prompt.
    fn sequences(&self, raw_logprobs: bool, context: usize) -> Vec<Generation> {
        let (sampling, text) = (&self.request.sampling, &self.request.text);
        let seed = sampling.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let one = |prompt: &Arc<[u32]>, i: usize| Generation {
            adapter: self.adapter.clone(),
            prompt: prompt.clone(),
            sampling: SamplingParams {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                max_new_tokens: sampling.max_tokens.unwrap_or(context - prompt.len()),
                stop: [&text.ends[..], &text.stop_token_ids].concat(),
            },
            // The first response is that of the same request with n = 1.
            seed: if i == 0 { seed } else { derive(seed, &[i as u64]) },
            top: sampling.logprobs.unwrap_or(0),
            raw_logprobs: raw_logprobs && sampling.logprobs.is_some(),
        };
        let prompts = self.prompts.iter().map(|prompt| Arc::from(&prompt[..]));
        prompts.flat_map(|prompt| (0..sampling.n).map(|i| one(&prompt, i)).collect::<Vec<_>>()).collect()
    }
}

/// Responses on their way from tokens to text.
struct Responses<'t> {
    choices: Vec<Choice<'t>>,
    ended: Vec<bool>,
    flags: Flags,
    tokens: usize,
}

impl<'t> Responses<'t> {
    fn new(count: usize, tokenizer: &'t Tokenizer, text: &'t Text, flags: Flags) -> Self {
        let choices = (0..count).map(|_| Choice::new(tokenizer, text)).collect();
        Self { choices, ended: vec![false; count], flags, tokens: 0 }
    }

    fn are_ended(&self) -> bool {
        self.ended.iter().all(|ended| *ended)
    }

    /// The piece that an event completes; none after the end of its response.
    fn on(&mut self, index: usize, event: Event) -> Result<Option<Piece>, Fault> {
        if self.ended[index] {
            return Ok(None);
        }
        let choice = &mut self.choices[index];
        let piece = match event {
            Event::Token { token, logprob, top } => {
                self.tokens += 1;
                choice.token(Token { id: token, logprob, top })
            }
            Event::Done(reason) => choice.finish(reason),
            Event::Failed(said) => return Err(Fault::new(500, said)),
        };
        let piece = piece.map_err(|error| Fault::new(500, format!("{error:#}")))?;
        if piece.end.is_some() {
            self.ended[index] = true;
            self.flags.end(index);
        }
        Ok(Some(piece))
    }
}

async fn text(state: &Arc<State>, chat: bool, body: Bytes) -> Answer {
    let theirs = state.clone();
    let prepared = elsewhere(move || Prepared::new(&theirs, chat, &body)).await?;
    let context = state.model.base.config().max_position_embeddings;
    let sequences = prepared.sequences(state.options.raw_logprobs, context);
    let count = sequences.len();
    let (mut events, cancel) = state.engine.generate(sequences)?;
    let flags = cancel.flags();
    if prepared.request.shape.stream {
        let (chunks, received) = mpsc::channel(CHUNKS);
        let state = state.clone();
        tokio::spawn(async move {
            // A client that is gone needs no more chunks.
            let _ = stream(&state, &prepared, events, flags, &chunks).await;
        });
        return Ok(http::events(received, cancel));
    }
    let tokenizer = state.model.checkpoint.tokenizer();
    let mut responses = Responses::new(count, tokenizer, &prepared.request.text, flags);
    let mut pieces = vec![Piece::default(); count];
    while !responses.are_ended() {
        let (index, event) = events.recv().await.ok_or_else(|| Fault::new(503, "the server is ending"))?;
        if let Some(piece) = responses.on(index, event)? {
            pieces[index].add(piece);
        }
    }
    drop(cancel);
    Ok(http::json(200, &frame(state, &prepared).whole(&pieces)))
}

fn frame<'r>(state: &'r State, prepared: &'r Prepared) -> Frame<'r> {
    let request = &prepared.request;
    Frame {
        id: state.id(if request.shape.chat { "chatcmpl" } else { "cmpl" }),
        created: now(),
        model: request.model.clone().unwrap_or_else(|| state.adapters.base.clone()),
        shape: request.shape,
        logprobs: request.sampling.logprobs.is_some(),
        tokenizer: state.model.checkpoint.tokenizer(),
        prompts: &prepared.prompts,
        n: request.sampling.n,
    }
}

/// The client of a stream is gone.
struct Gone;

async fn send(chunks: &mpsc::Sender<Bytes>, value: &Value) -> Result<(), Gone> {
    chunks.send(format!("data: {value}\n\n").into()).await.map_err(|_| Gone)
}

async fn stream(
    state: &State,
    prepared: &Prepared,
    mut events: mpsc::UnboundedReceiver<(usize, Event)>,
    flags: Flags,
    chunks: &mpsc::Sender<Bytes>,
) -> Result<(), Gone> {
    let (frame, count) = (frame(state, prepared), prepared.prompts.len() * prepared.request.sampling.n);
    let tokenizer = state.model.checkpoint.tokenizer();
    let mut responses = Responses::new(count, tokenizer, &prepared.request.text, flags);
    let mut written = vec![Written::default(); count];
    let mut opened = vec![!frame.shape.chat; count];
    while !responses.are_ended() {
        let found = match events.recv().await {
            Some((index, event)) => responses.on(index, event).map(|piece| (index, piece)),
            None => Err(Fault::new(503, "the server is ending")),
        };
        match found {
            Ok((index, Some(piece))) => {
                if !std::mem::replace(&mut opened[index], true) {
                    send(chunks, &frame.opening(index)).await?;
                }
                if let Some(chunk) = frame.chunk(index, &piece, &mut written[index]) {
                    send(chunks, &chunk).await?;
                }
            }
            Ok((_, None)) => {}
            // The head of the reply is sent, so the fault is a chunk.
            Err(fault) => {
                send(chunks, &fault.body()).await?;
                break;
            }
        }
    }
    if responses.are_ended()
        && let Some(closing) = frame.closing(responses.tokens)
    {
        send(chunks, &closing).await?;
    }
    chunks.send(Bytes::from_static(b"data: [DONE]\n\n")).await.map_err(|_| Gone)
}
