//! Rollouts that llama.cpp's server samples. It reads adapters when it starts and loads none later, so this process starts it, one
//! child at a time, anew for each version of the actor's adapter, which it writes as a GGUF-LoRA file. It does not depend on
//! rewards or updates. Read `rollout_servers.rs` and `llama_process.rs` before it, `ppo/sampler.rs` for what is made of the
//! responses.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Error, Result};
use serde_json::{Value, json};

use super::Model;
use super::llama_process::{self, ServerProcess};
use super::output::SERVER_LOG;
use super::rollout_servers::{
    RolloutServer, adapters_folder, check_tokens, remove_abandoned, said, sample, tag, tries, whole,
};
use crate::config::{Engine, RolloutEngine};
use crate::error::Interrupted;
use crate::export::{Source, gguf};
use crate::host::meter;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::generate::{Response, SamplingParams};
use crate::ppo::sampler::{Asked, Sampler, Started, UNREPORTED};
use crate::reward::source::endpoint::Endpoint;
use crate::reward::source::retry::{Failure, excerpt};
use crate::rng::derive;
use crate::train::stop;

/// A running server and what it is asked by: what a thread that samples ahead needs.
struct Client {
    process: ServerProcess,
    completion: Endpoint,
    settings: RolloutEngine,
    /// Token ids of the base.
    vocab: usize,
}

/// A server with an adapter.
struct Running {
    version: usize,
    /// The adapter's file.
    file: PathBuf,
    client: Arc<Client>,
}

/// llama.cpp's server, started anew per version of the adapter.
pub(super) struct LlamaCppSampler<'w> {
    /// ppo, grpo or rloo.
    section: &'static str,
    settings: RolloutEngine,
    model: &'w Model,
    folder: PathBuf,
    log: PathBuf,
    tag: String,
    running: Mutex<Option<Running>>,
    /// Whether the folder of adapters was written to.
    has_written: AtomicBool,
}

/// What an adapter is exported from. Log-probabilities are compared in each rollout, and so no prompts are here.
fn source<'a>(model: &'a Model, adapter: &'a Adapter) -> Source<'a> {
    Source { files: &model.checkpoint, base: &model.base, adapter, prompts: &[], about: "" }
}

/// Checks that the engine can be given the actor's adapters, where it is llama.cpp.
///
/// # Errors
/// If a GGUF-LoRA file cannot express them, with what to do.
pub(super) fn check(settings: &RolloutEngine, model: &Model, first: &Adapter, section: &str) -> Result<()> {
    let engine = settings.engine == Engine::LlamaCpp;
    match source(model, first).gguf_lora_obstacle().filter(|_| engine) {
        Some(what) => Err(invalid!(
            "[{section}.rollout] engine = \"llama.cpp\" cannot be given the actor: {what}; train LoRA of the layers' linear maps, or \
             set engine = \"self\""
        )),
        None => Ok(()),
    }
}

impl<'w> LlamaCppSampler<'w> {
    /// As [`super::rollout_servers::open`].
    ///
    /// # Errors
    /// If the run's folder has no absolute path, or the server's program or model file is not there.
    pub(super) fn new(
        settings: &RolloutEngine,
        model: &'w Model,
        section: &'static str,
        out: &Path,
        asks: bool,
    ) -> Result<Self> {
        let folder = adapters_folder(settings, out)?;
        // `--lora` takes several files with commas between them.
        if folder.display().to_string().contains(',') {
            return Err(invalid!(
                "[{section}.rollout] llama.cpp takes no comma in the path of an adapter, {}; set adapter_dir to a folder without one",
                folder.display()
            ));
        }
        if asks {
            llama_process::check(&settings.server).with_context(|| format!("[{section}.rollout]"))?;
        }
        let (settings, running, log) = (settings.clone(), Mutex::default(), out.join(SERVER_LOG));
        Ok(Self { section, settings, model, folder, log, tag: tag(), running, has_written: AtomicBool::new(false) })
    }

    /// The server that has the adapter, started if it is another one than before; it may not be healthy yet.
    ///
    /// # Errors
    /// If the adapter cannot be written, or the server not be started.
    fn serve(&self, adapter: &Adapter, version: usize) -> Result<Arc<Client>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.as_ref().filter(|running| running.version == version) {
            return Ok(running.client.clone());
        }
        let file = self.folder.join(format!("fourfold-{}-{version}.gguf", self.tag));
        let saving = meter::within(meter::Phase::Save);
        self.has_written.store(true, Ordering::Relaxed);
        fs::create_dir_all(&self.folder).with_context(|| self.folder.display().to_string())?;
        gguf::write_lora(&source(self.model, adapter), &file)?;
        drop(saving);
        // While the critic alone trains, an iteration's actor is that of the one before.
        if let Some(running) = running.as_mut().filter(|running| same_bytes(&running.file, &file)) {
            running.version = version;
            let _ = fs::remove_file(file);
            return Ok(running.client.clone());
        }
        end(running.take());
        let process = ServerProcess::start(&self.settings.server, &file, &self.log)
            .inspect_err(|_| drop(fs::remove_file(&file)))
            .with_context(|| format!("[{}.rollout]", self.section))?;
        let timeout = Duration::from_secs_f64(self.settings.timeout_seconds);
        let client = Arc::new(Client {
            completion: Endpoint::new(format!("{}/completion", process.url), None, timeout),
            process,
            settings: self.settings.clone(),
            vocab: self.model.base.config().vocab_size,
        });
        *running = Some(Running { version, file, client: client.clone() });
        Ok(client)
    }
}

/// Ends a server at once, whoever still asks it, and removes its adapter.
fn end(running: Option<Running>) {
    if let Some(running) = running {
        running.client.process.end();
        let _ = fs::remove_file(running.file);
    }
}

fn same_bytes(one: &Path, other: &Path) -> bool {
    fs::read(one).ok().zip(fs::read(other).ok()).is_some_and(|(one, other)| one == other)
}

impl Client {
    /// Waits until the server is healthy.
    fn wait(&self, abandoned: &dyn Fn() -> bool) -> Result<(), Failure> {
        let timeout = Duration::from_secs_f64(self.settings.timeout_seconds);
        self.process.wait(timeout, abandoned).map_err(|failure| match failure {
            Failure::Final(text) => Failure::Final(format!("rollout server {}: {text}", self.process.name)),
            failure => failure,
        })
    }

    /// A response to a prompt. The server ends a text at each token that its file names as an end, whatever it is asked for; one
    /// that is no end here is a token like others, after which another request goes on.
    fn response(&self, prompt: &[u32], seed: u64, sampling: &SamplingParams) -> Result<Response, Failure> {
        let (mut tokens, mut logprobs) = (vec![], vec![]);
        loop {
            let (before, left) = ([prompt, &tokens].concat(), sampling.max_new_tokens.saturating_sub(tokens.len()));
            let seed = if tokens.is_empty() { seed } else { derive(seed, &[tokens.len() as u64]) };
            let body = request(&before, left, seed, sampling);
            let (more, of_more) = tries(self.settings.retries, |_| {
                let reply = self.completion.post(&body).map_err(|failure| self.process.cause(failure));
                let found = reply.and_then(|reply| part(&reply, before.len(), left, self.vocab));
                (self.process.name.clone(), found)
            })?;
            tokens.extend(more);
            logprobs.extend(of_more);
            if let Some(response) = whole(&tokens, &logprobs, sampling) {
                return Ok(response);
            }
        }
    }
}

/// Every parameter is given, so that no default of the server's or of its command line holds.
fn request(prompt: &[u32], most: usize, seed: u64, sampling: &SamplingParams) -> Value {
    json!({
        "prompt": prompt,
        "n_predict": most,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "samplers": ["top_k", "top_p", "temperature"],
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "dynatemp_range": 0.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "dry_multiplier": 0.0,
        "mirostat": 0,
        "logit_bias": [],
        "backend_sampling": false,
        // What is negative as a number of 32 bits may ask for a random one.
        "seed": seed % (1 << 31),
        // It would make the end tokens impossible.
        "ignore_eos": false,
        "stop": [],
        "n_probs": 1,
        "post_sampling_probs": false,
        "return_tokens": true,
        "cache_prompt": false,
        "stream": false,
    })
}

/// The sampled tokens in a reply, `left` at most, and their log-probabilities or [`UNREPORTED`]. `read`: the prompt's tokens.
///
/// # Errors
/// If there are no ids or no log-probabilities, they are of another prompt or of other tokens, or the text ends for another reason
/// than its length or an end token.
fn part(reply: &Value, read: usize, left: usize, vocab: usize) -> Result<(Vec<u32>, Vec<f32>), Failure> {
    let fault = |text: String| Err(Failure::Final(text));
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    if !reply["tokens"].is_array() && !reply["content"].is_string() {
        return Err(Failure::Passing(format!("its reply is no completion: {}", excerpt(&reply.to_string()))));
    }
    let tokens: Option<Vec<u32>> = reply["tokens"].as_array().and_then(|tokens| tokens.iter().map(id).collect());
    let Some(tokens) = tokens.filter(|tokens| !tokens.is_empty()) else {
        return fault(
            "its reply has no tokens, and text does not give them back: it needs return_tokens; use llama.cpp of 2025 or newer".into(),
        );
    };
    if let Some(found) = reply["tokens_evaluated"].as_u64().filter(|&found| found != read as u64) {
        return fault(format!("it read {found} prompt tokens and was sent {read}; its base or its options are others"));
    }
    check_tokens(&tokens, vocab)?;
    let why = reply["stop_type"].as_str().unwrap_or("none");
    if tokens.len() > left || (tokens.len() < left && why != "eos") {
        return fault(format!(
            "it ended a response after {} of {left} tokens (stop_type {why}); give server a larger context for each of its slots, \
             --ctx-size by --parallel",
            tokens.len()
        ));
    }
    let reported = reply["completion_probabilities"].as_array().and_then(|all| {
        let of = |one: &Value| Some((id(&one["id"])?, one["logprob"].as_f64()? as f32));
        all.iter().map(of).collect::<Option<Vec<(u32, f32)>>>()
    });
    let Some(reported) = reported else {
        return fault(
            "its reply has no completion_probabilities with id and logprob, by which its samples are checked; use llama.cpp of 2025 \
             or newer"
                .into(),
        );
    };
    match aligned(&tokens, &reported) {
        Some(logprobs) => Ok((tokens, logprobs)),
        None => fault("the tokens of completion_probabilities are not those that it sampled".into()),
    }
}

/// (R,) the log-probabilities that were reported for `tokens` (R,), in their order. llama.cpp reports none for a token that ends in
/// the middle of a character, and where it cannot be said which of two equal tokens one is of, both are [`UNREPORTED`]. `None` if
/// they are of other tokens.
fn aligned(tokens: &[u32], reported: &[(u32, f32)]) -> Option<Vec<f32>> {
    // The first place that each can have, and the last one.
    let (mut first, mut last) = (Vec::with_capacity(reported.len()), Vec::with_capacity(reported.len()));
    for &(id, _) in reported {
        let from = first.last().map_or(0, |at| at + 1);
        first.push((from..tokens.len()).find(|&at| tokens[at] == id)?);
    }
    for &(id, _) in reported.iter().rev() {
        let before = last.last().copied().unwrap_or(tokens.len());
        last.push((0..before).rfind(|&at| tokens[at] == id)?);
    }
    last.reverse();
    let mut logprobs = vec![UNREPORTED; tokens.len()];
    for ((&first, &last), &(_, logprob)) in first.iter().zip(&last).zip(reported) {
        if first == last {
            logprobs[first] = logprob;
        }
    }
    Some(logprobs)
}

impl Sampler for LlamaCppSampler<'_> {
    /// The server is started by the calling thread, with which it ends, and waited for by the other one.
    fn start(&self, adapter: &Adapter, version: usize, asked: Asked, shown: bool) -> Result<Started> {
        let client = self.serve(adapter, version)?;
        Started::new(move |abandoned| {
            client.wait(&|| abandoned.load(Ordering::Relaxed)).map_err(said)?;
            sample(&asked, &client.settings, abandoned, shown, |_, prompt, seed| {
                client.response(prompt, seed, &asked.sampling)
            })
        })
    }

    fn max_mismatch(&self) -> f64 {
        self.settings.max_mismatch
    }

    fn to_check(&self) -> &'static str {
        "that the model file in its command, server, is that of [base], and its log, llama-server.log in the run's folder"
    }
}

impl RolloutServer for LlamaCppSampler<'_> {
    fn begin(&self, first: &Adapter, stays: bool) -> Result<()> {
        remove_abandoned(&self.settings, &self.folder);
        let client = self.serve(first, 0)?;
        client.process.set_log_stays(stays);
        match client.wait(&stop::requested) {
            Ok(()) => {
                client.process.set_log_stays(true);
                Ok(())
            }
            Err(_) if stop::requested() => {
                Err(Error::new(Interrupted("stopped while the rollout server was started".into())))
            }
            Err(Failure::Final(text) | Failure::Passing(text) | Failure::Unscored(text)) => Err(invalid!("{text}")),
        }
    }
}

impl Drop for LlamaCppSampler<'_> {
    fn drop(&mut self) {
        end(self.running.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        // Empty, unless it holds what is not ours.
        if self.has_written.load(Ordering::Relaxed) {
            let _ = fs::remove_dir(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(ids: &[u32], reported: &[u32], why: &str) -> Value {
        let of = |id: &u32| json!({ "id": id, "token": "x", "logprob": -f64::from(*id), "top_logprobs": [] });
        let reported: Vec<Value> = reported.iter().map(of).collect();
        json!({ "content": "", "tokens": ids, "tokens_evaluated": 2, "stop_type": why, "completion_probabilities": reported })
    }

    #[test]
    fn a_reply_is_a_response_or_the_beginning_of_one_up_to_an_end_token_of_the_servers() {
        let (tokens, logprobs) = part(&reply(&[1, 2, 3], &[1, 2, 3], "limit"), 2, 3, 20).unwrap();
        assert_eq!((tokens, logprobs), (vec![1, 2, 3], vec![-1.0, -2.0, -3.0]));
        assert_eq!(part(&reply(&[1, 2], &[1, 2], "eos"), 2, 3, 20).unwrap().0, [1, 2]);
    }

    #[test]
    fn what_is_no_response_to_the_prompt_is_refused_with_the_reason() {
        let mut without = reply(&[1, 2, 3], &[1, 2, 3], "limit");
        without.as_object_mut().unwrap().remove("completion_probabilities");
        let mut unknown = reply(&[1, 2, 3], &[1, 2, 3], "limit");
        unknown["completion_probabilities"][1]["logprob"] = Value::Null;
        for (reply, said) in [
            (reply(&[], &[], "limit"), "no tokens"),
            (json!({ "content": "abc" }), "no tokens"),
            (without, "no completion_probabilities"),
            (unknown, "no completion_probabilities"),
            (reply(&[1, 2], &[1, 2], "limit"), "after 2 of 3 tokens (stop_type limit)"),
            (reply(&[1, 2, 3, 4], &[1, 2, 3, 4], "limit"), "after 4 of 3 tokens"),
            (reply(&[1, 20, 3], &[1, 20, 3], "limit"), "sampled token 20"),
            (reply(&[1, 2, 3], &[1, 4], "limit"), "not those that it sampled"),
            (reply(&[1, 2, 3], &[2, 1], "limit"), "not those that it sampled"),
        ] {
            match part(&reply, 2, 3, 20) {
                Err(Failure::Final(text)) => assert!(text.contains(said), "{said}: {text}"),
                found => panic!("{said}: {found:?}"),
            }
        }
        let other = part(&reply(&[1, 2, 3], &[1, 2, 3], "limit"), 1, 3, 20);
        assert!(
            matches!(&other, Err(Failure::Final(text)) if text.contains("read 2 prompt tokens and was sent 1")),
            "{other:?}"
        );
        assert!(matches!(part(&json!({ "choices": [] }), 2, 3, 20), Err(Failure::Passing(_))));
    }

    #[test]
    fn log_probabilities_that_are_not_reported_leave_the_others_at_their_tokens() {
        let of = |tokens: &[u32], reported: &[u32]| -> Option<Vec<Option<f32>>> {
            let reported: Vec<(u32, f32)> = reported.iter().zip(1u8..).map(|(&id, n)| (id, f32::from(n))).collect();
            let known = aligned(tokens, &reported)?.into_iter();
            Some(known.map(|logprob| (logprob != UNREPORTED).then_some(logprob)).collect())
        };
        let (one, two) = (Some(1.0), Some(2.0));
        assert_eq!(of(&[5, 6, 7], &[5, 7]), Some(vec![one, None, two]));
        assert_eq!(of(&[5, 6, 7], &[7]), Some(vec![None, None, one]));
        assert_eq!(of(&[5, 6, 6, 7], &[5, 6, 7]).unwrap(), [one, None, None, Some(3.0)], "which 6 it is, is not said");
        assert_eq!(of(&[5, 6, 5], &[5, 5]), Some(vec![one, None, two]));
        assert_eq!(of(&[5, 6, 5, 5], &[5, 5]), Some(vec![None; 4]));
        assert_eq!(of(&[5, 6], &[]), Some(vec![None, None]));
        assert_eq!((of(&[5, 6], &[6, 5]), of(&[5], &[5, 5])), (None, None));
    }

    /// llama-server 0.5.0-dev (0c1e570) over the quickstart's base in f32, prompt [200, 300], seed 6, temperature 60: the last
    /// token is the first byte of a character.
    #[test]
    fn a_recorded_reply_has_no_log_probability_of_the_beginning_of_a_character() {
        let tokens = [971, 217, 66, 382, 1008, 102, 624, 544, 496, 848, 773, 403, 246, 159];
        let logprobs = [
            -17.762, -16.593, -14.903, -11.655, -8.296, -11.608, -9.678, -9.555, -10.232, -20.286, -13.239, -14.16,
            -10.607,
        ];
        let reported: Vec<Value> =
            tokens.iter().zip(logprobs).map(|(id, logprob)| json!({ "id": id, "logprob": logprob })).collect();
        let reply = json!({
            "index": 0, "content": " ri\u{1b}a diMoon\u{fffd} cleiet foundsy dullked\u{fffd}\u{fffd}", "tokens": tokens,
            "id_slot": 14, "stop": true, "tokens_predicted": 14, "tokens_evaluated": 2, "has_new_line": false,
            "truncated": false, "stop_type": "limit", "stopping_word": "", "tokens_cached": 15,
            "completion_probabilities": reported,
        });
        let (read, of_read) = part(&reply, 2, 14, 1024).unwrap();
        assert_eq!(read, tokens);
        assert_eq!(of_read[..13], logprobs.map(|logprob| logprob as f32));
        assert_eq!(of_read[13], UNREPORTED);
    }

    #[test]
    fn seeds_have_31_bits() {
        let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 3, stop: vec![] };
        for (seed, sent) in [(7, 7u64), (u64::MAX, (1 << 31) - 1), (1 << 40, 0)] {
            assert_eq!(request(&[1], 3, seed, &sampling)["seed"], sent, "{seed}");
        }
    }
}
