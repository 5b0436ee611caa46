//! `generate`: text in, text out, and what it shares with `chat`. It does not depend on any stage. Read `chat.rs` next.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::generate::{Response, SamplingParams, generate as sample};
use crate::model::roles::Policy;
use crate::run::Model;
use crate::tokenizer::chat_template::{GenerationPrompt, Message};
use crate::tokenizer::{SpecialTokens, TextStream, Tokenizer};

#[derive(Args)]
pub(super) struct Weights {
    /// Model directory or .gguf file.
    #[arg(long)]
    base: PathBuf,
    /// PEFT adapter directory.
    #[arg(long)]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    on: super::OnDevice,
    #[command(flatten)]
    cache: super::KvCache,
}

impl Weights {
    pub(super) fn open(&self) -> Result<(Model, Option<Adapter>)> {
        let model = Model::open_on(&self.base, self.on.device, self.cache.kind())?;
        let adapter = self.adapter.as_deref().map(|path| model.policy_adapter(path)).transpose()?;
        Ok((model, adapter))
    }
}

#[derive(Args)]
pub(super) struct How {
    /// At most this many tokens.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Divides the logits; 0 takes the most likely token.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Only the k most likely tokens; 0 is all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the most likely tokens that reach this probability together.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
}

impl How {
    pub(super) fn sampling(&self, stop: &[u32]) -> Result<SamplingParams> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(invalid!("--temperature = {} must be 0 or a positive number", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(invalid!("--top-p = {} must be above 0 and at most 1", self.top_p));
        }
        if self.max_new_tokens == 0 {
            return Err(invalid!("--max-new-tokens = 0 leaves nothing to generate"));
        }
        Ok(SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            max_new_tokens: self.max_new_tokens,
            stop: stop.to_vec(),
        })
    }
}

#[derive(Args)]
pub(super) struct Generate {
    #[command(flatten)]
    weights: Weights,
    /// The user's message; the model's chat template is applied to it.
    #[arg(long)]
    prompt: String,
    /// Sends the prompt as it is, without a chat template.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    how: How,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// Ids of a prompt: through the template where there is one and the text is not raw. Other text gets what the tokenizer puts
/// before a text, and nothing behind it, since the response follows there.
pub(super) fn encode(model: &Model, messages: &[Message], raw: Option<&str>) -> Result<Vec<u32>> {
    let tokenizer = model.checkpoint.tokenizer();
    let plain = |text: &str| {
        Ok::<_, anyhow::Error>([tokenizer.front(), &tokenizer.encode(text, SpecialTokens::None)?].concat())
    };
    let ids = match raw {
        None if tokenizer.chat_template().is_some() => {
            let text = tokenizer.apply_chat_template(messages, GenerationPrompt::Add)?;
            tokenizer.encode(&text, SpecialTokens::None)?
        }
        None => {
            let text = messages.iter().map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n");
            plain(&text)?
        }
        Some(text) => plain(text)?,
    };
    if ids.is_empty() {
        return Err(invalid!("the prompt is empty; write a message"));
    }
    Ok(ids)
}

pub(super) fn generate(args: &Generate) -> Result<()> {
    let (model, adapter) = args.weights.open()?;
    let tokenizer = model.checkpoint.tokenizer();
    let ends = tokenizer.ends(None);
    let sampling = args.how.sampling(&ends)?;
    let raw = args.raw.then_some(args.prompt.as_str());
    let ids = encode(&model, &[Message::new("user", &args.prompt)], raw)?;
    let mut printer = Printer::new(tokenizer, &ends, args.json);
    let never = AtomicBool::new(false);
    let response = response((&model, adapter.as_ref()), &ids, args.how.seed, &sampling, &mut printer, &never)?;
    if args.json {
        super::print_json(&json!({
            "text": tokenizer.decode(&response.tokens)?,
            "token_ids": response.tokens,
            "logprobs": response.logprobs,
            "finish_reason": response.finish.name(),
            "prompt_token_ids": ids,
        }))
    } else {
        printer.finish()
    }
}

/// Prints text as its tokens come.
pub(super) struct Printer<'t> {
    stream: TextStream<'t>,
    stop: &'t [u32],
    quiet: bool,
}

impl<'t> Printer<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, stop: &'t [u32], quiet: bool) -> Self {
        Self { stream: tokenizer.stream(), stop, quiet }
    }

    fn push(&mut self, token: u32) -> Result<()> {
        if !self.quiet && !self.stop.contains(&token) {
            super::say(&self.stream.push(token)?)?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<()> {
        if self.quiet {
            return Ok(());
        }
        super::say(&format!("{}\n", self.stream.finish()?))
    }
}

/// One response, printed as it comes; it ends with the token after which `stop` is set, too.
pub(super) fn response(
    (model, adapter): (&Model, Option<&Adapter>),
    ids: &[u32],
    seed: u64,
    sampling: &SamplingParams,
    printer: &mut Printer<'_>,
    stop: &AtomicBool,
) -> Result<Response> {
    let mut printed = Ok(());
    let policy = Policy::new(&model.base, adapter);
    let prompts = [ids.to_vec()];
    let responses = sample(policy, &prompts, &[seed], sampling, |_, token| {
        printed = printer.push(token);
        match stop.load(Ordering::Relaxed) || printed.is_err() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })?;
    printed?;
    responses.into_iter().next().context("one prompt has one response")
}
