//! Rollouts that servers sample: the actor's adapter is written and loaded under a new name per version, responses come back as
//! token ids with their log-probabilities, one request each. It does not depend on rewards or updates. Read `rollout_servers.rs`
//! before it, `ppo/sampler.rs` for what is made of the responses.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::Model;
use super::rewards::key_of;
use super::rollout_servers::{
    RolloutServer, adapters_folder, check_tokens, remove_abandoned, said, sample, tag, tries, whole,
};
use crate::config::{Engine, RolloutEngine};
use crate::model::adapter::Adapter;
use crate::model::generate::{Response, SamplingParams};
use crate::ppo::sampler::{Asked, Sampler, Started};
use crate::reward::source::endpoint::Endpoint;
use crate::reward::source::retry::{Failure, excerpt};

/// Longest wait for a server that is asked to forget an adapter, which nothing depends on.
const FORGETTING: Duration = Duration::from_secs(10);

/// The endpoints of a server.
struct Server {
    completions: Endpoint,
    load: Endpoint,
    unload: Endpoint,
}

/// The adapter that servers have.
struct Loaded {
    version: usize,
    name: String,
    /// Those that have it, by number.
    servers: Vec<usize>,
}

/// The servers and what they are asked by: what a thread that samples ahead needs.
struct Clients {
    servers: Vec<Server>,
    settings: RolloutEngine,
    /// The adapters' folder as the servers see it.
    folder_there: String,
    /// Token ids of the base.
    vocab: usize,
}

/// Servers that sample.
pub(super) struct ServedSampler<'w> {
    /// ppo, grpo or rloo.
    section: &'static str,
    clients: Arc<Clients>,
    model: &'w Model,
    folder: PathBuf,
    /// Another one in each process: a server may still have the adapters of a run that was killed.
    tag: String,
    loaded: Mutex<Option<Loaded>>,
    /// Whether the folder of adapters was written to.
    has_written: AtomicBool,
}

impl<'w> ServedSampler<'w> {
    /// Creates the clients; nothing is sent yet. `out`: the run's folder. `asks`: whether this process will ask them, and not
    /// another rank for it.
    ///
    /// # Errors
    /// If the key's variable is not set, or the run's folder has no absolute path.
    pub(super) fn new(
        settings: &RolloutEngine,
        model: &'w Model,
        section: &'static str,
        out: &Path,
        asks: bool,
    ) -> Result<Self> {
        let key = key_of(settings.api_key_env.as_deref().filter(|_| asks), &format!("[{section}.rollout]"))?;
        let timeout = Duration::from_secs_f64(settings.timeout_seconds);
        let server = |url: &String| {
            let base = url.trim_end_matches('/');
            let at = |path: &str, timeout| Endpoint::new(format!("{base}/{path}"), key.clone(), timeout);
            Server {
                completions: at("completions", timeout),
                load: at("load_lora_adapter", timeout),
                unload: at("unload_lora_adapter", FORGETTING.min(timeout)),
            }
        };
        let folder = adapters_folder(settings, out)?;
        let folder_there = match &settings.server_adapter_dir {
            Some(there) => there.trim_end_matches('/').to_owned(),
            None => folder.display().to_string(),
        };
        let servers = settings.urls.iter().map(server).collect();
        let vocab = model.base.config().vocab_size;
        let clients = Clients { servers, settings: settings.clone(), folder_there, vocab };
        let (loaded, has_written) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { section, clients: clients.into(), model, folder, tag: tag(), loaded, has_written })
    }

    /// Loads the adapter on every server unless they have it, and has them forget the one before. A server that is dead is left
    /// out until the next version where another one lives.
    ///
    /// # Errors
    /// If the adapter cannot be written, a server refuses it, or all servers are dead.
    fn load(&self, adapter: &Adapter, version: usize) -> Result<(String, Vec<usize>)> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = loaded.as_ref().filter(|loaded| loaded.version == version) {
            return Ok((loaded.name.clone(), loaded.servers.clone()));
        }
        let name = format!("fourfold-{}-{version}", self.tag);
        self.has_written.store(true, Ordering::Relaxed);
        super::save(adapter.clone(), self.model, &self.folder.join(&name))?;
        let (mut servers, mut dead) = (vec![], vec![]);
        for (number, server) in self.clients.servers.iter().enumerate() {
            let outcome = tries(self.clients.settings.retries, |_| {
                let outcome = match self.clients.load(server, &name) {
                    Err(Failure::Final(text)) if text.contains("status 404") => Err(Failure::Final(format!(
                        "{text}; it has no such endpoint, or no such folder: start vLLM with --enable-lora --max-lora-rank {} and \
                         VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on a machine that sees {}, or set server_adapter_dir",
                        adapter.config().r,
                        self.folder.display()
                    ))),
                    Err(Failure::Final(text)) if text.contains("max_lora_rank") => {
                        Err(Failure::Final(format!("{text}; start vLLM with --max-lora-rank {}", adapter.config().r)))
                    }
                    outcome => outcome,
                };
                (server.load.url.clone(), outcome)
            });
            match outcome {
                Ok(()) => servers.push(number),
                Err(Failure::Passing(text) | Failure::Unscored(text)) => dead.push(text),
                Err(failure) => {
                    self.forget(&name, &servers);
                    return Err(said(failure));
                }
            }
        }
        if servers.is_empty() {
            self.forget(&name, &[]);
            return Err(said(Failure::Passing(dead.join("; "))));
        }
        for text in dead {
            crate::tell!("{}: warning: {text}; it is left out until the next version is loaded", self.section);
        }
        if let Some(before) = loaded.replace(Loaded { version, name: name.clone(), servers: servers.clone() }) {
            self.forget(&before.name, &before.servers);
        }
        Ok((name, servers))
    }

    /// Has servers forget an adapter and removes its folder. Nothing depends on it: names are never used again.
    fn forget(&self, name: &str, servers: &[usize]) {
        for &number in servers {
            let _ = self.clients.servers[number].unload.send(&json!({ "lora_name": name }));
        }
        let _ = fs::remove_dir_all(self.folder.join(name));
    }
}

impl Clients {
    /// Loads the written adapter `name` on a server.
    fn load(&self, server: &Server, name: &str) -> Result<(), Failure> {
        let body = json!({ "lora_name": name, "lora_path": format!("{}/{name}", self.folder_there) });
        match server.load.send(&body) {
            // The reply to an earlier try did not arrive, or another request was first.
            Err(Failure::Final(text)) if text.contains("already") => Ok(()),
            // vLLM's status is 500 for an adapter that it cannot take, as one of a larger rank than it was started with.
            Err(Failure::Passing(text)) if text.contains("add_lora") => Err(Failure::Final(text)),
            outcome => outcome.map(drop),
        }
    }

    /// A server that was started again while a rollout was sampled has no adapter: it loads it, and the request may be sent again.
    fn reload(&self, server: &Server, name: &str, failure: Failure) -> Failure {
        match failure {
            Failure::Final(text) if text.contains("status 404") && self.load(server, name).is_ok() => {
                Failure::Passing(text)
            }
            failure => failure,
        }
    }

    /// Every parameter is given, so that no default of the server's or of its model's generation_config.json holds.
    fn request(&self, adapter: &str, prompt: &[u32], seed: u64, sampling: &SamplingParams) -> Value {
        let mut body = json!({
            "model": adapter,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed as i64,
            "logprobs": 1,
            "return_token_ids": true,
            "stream": false,
        });
        if self.settings.engine == Engine::Vllm {
            body["top_k"] = if sampling.top_k == 0 { (-1).into() } else { sampling.top_k.into() };
            body["min_p"] = 0.0.into();
            body["min_tokens"] = 0.into();
            body["repetition_penalty"] = 1.0.into();
            // The tokens that end a response are ours, not the model's.
            body["ignore_eos"] = true.into();
            body["stop_token_ids"] = sampling.stop.clone().into();
            body["skip_special_tokens"] = false.into();
            body["add_special_tokens"] = false.into();
        }
        body
    }

    /// Gets a response from those of the servers that have the adapter `name`, in turn; `i`: the prompt's number.
    fn response(
        &self,
        (name, servers): (&str, &[usize]),
        (i, prompt, seed): (usize, &[u32], u64),
        sampling: &SamplingParams,
    ) -> Result<Response, Failure> {
        let body = self.request(name, prompt, seed, sampling);
        tries(self.settings.retries, |tried| {
            let server = &self.servers[servers[(i + tried) % servers.len()]];
            let reply = server.completions.post(&body).map_err(|failure| self.reload(server, name, failure));
            let sampled = reply.and_then(|reply| response(&reply, prompt, sampling, self.vocab));
            (server.completions.url.clone(), sampled)
        })
    }
}

/// The response in a server's reply: our stop token ends it, whatever the server sampled after it.
///
/// # Errors
/// If the reply has no ids or log-probabilities, is about another prompt, or ends where no response does.
fn response(reply: &Value, prompt: &[u32], sampling: &SamplingParams, vocab: usize) -> Result<Response, Failure> {
    let choice = &reply["choices"][0];
    let ids = |value: &Value| -> Option<Vec<u32>> {
        value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
    };
    if !choice.is_object() {
        return Err(Failure::Passing(format!("its reply has no choices[0]: {}", excerpt(&reply.to_string()))));
    }
    let Some(tokens) = ids(&choice["token_ids"]) else {
        return Err(Failure::Final(
            "its reply has no choices[0].token_ids, and text does not give them back: it needs return_token_ids (vLLM 0.10.2 or \
             newer); use such a server, or engine = \"self\""
                .into(),
        ));
    };
    let read = [&choice["prompt_token_ids"], &reply["prompt_token_ids"]].into_iter().find_map(ids);
    if read.is_some_and(|read| read != prompt) {
        return Err(Failure::Final("it read other prompt tokens than it was sent; add no special tokens there".into()));
    }
    let logprobs = choice["logprobs"]["token_logprobs"].as_array();
    let logprobs: Option<Vec<f32>> =
        logprobs.and_then(|all| all.iter().map(|value| value.as_f64().map(|value| value as f32)).collect());
    let Some(logprobs) = logprobs.filter(|all| all.len() == tokens.len()) else {
        return Err(Failure::Final(
            "its reply has no choices[0].logprobs.token_logprobs, one number per token, by which its samples are checked".into(),
        ));
    };
    check_tokens(&tokens, vocab)?;
    whole(&tokens, &logprobs, sampling).ok_or_else(|| {
        let (found, most, why) =
            (tokens.len(), sampling.max_new_tokens, choice["finish_reason"].as_str().unwrap_or("none"));
        Failure::Final(format!(
            "it ended a response after {found} of {most} tokens at none of the tokens that end one here (finish_reason {why}); raise \
             its --max-model-len, and give its base the same end of sequence"
        ))
    })
}

impl Sampler for ServedSampler<'_> {
    fn start(&self, adapter: &Adapter, version: usize, asked: Asked, shown: bool) -> Result<Started> {
        let (name, servers) = self.load(adapter, version)?;
        let clients = self.clients.clone();
        Started::new(move |abandoned| {
            sample(&asked, &clients.settings, abandoned, shown, |i, prompt, seed| {
                clients.response((&name, &servers), (i, prompt, seed), &asked.sampling)
            })
        })
    }

    fn max_mismatch(&self) -> f64 {
        self.clients.settings.max_mismatch
    }

    fn to_check(&self) -> &'static str {
        "its base, its log and logprobs_mode"
    }
}

impl RolloutServer for ServedSampler<'_> {
    fn begin(&self, first: &Adapter, _: bool) -> Result<()> {
        remove_abandoned(&self.clients.settings, &self.folder);
        self.load(first, 0).map(drop)
    }
}

impl Drop for ServedSampler<'_> {
    fn drop(&mut self) {
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(loaded) = loaded {
            self.forget(&loaded.name, &loaded.servers);
        }
        // Empty, unless it holds what is not ours.
        if self.has_written.load(Ordering::Relaxed) {
            let _ = fs::remove_dir(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::generate::FinishReason;

    fn read(reply: Value) -> Result<Response, Failure> {
        let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 3, stop: vec![0, 9] };
        response(&reply, &[5, 6], &sampling, 20)
    }

    fn reply(ids: Value, logprobs: Value) -> Value {
        json!({ "choices": [{ "token_ids": ids, "logprobs": { "token_logprobs": logprobs }, "finish_reason": "length" }] })
    }

    #[test]
    fn a_response_ends_at_our_stop_token_or_at_its_limit() {
        let whole = read(reply(json!([1, 2, 3]), json!([-0.5, -1.0, -2.0]))).unwrap();
        assert_eq!((whole.tokens, whole.finish), (vec![1, 2, 3], FinishReason::Length));
        let ended = read(reply(json!([1, 9, 3]), json!([-0.5, -1.0, -2.0]))).unwrap();
        assert_eq!((ended.tokens, ended.logprobs, ended.finish), (vec![1, 9], vec![-0.5, -1.0], FinishReason::Stop));
    }

    #[test]
    fn what_is_no_response_to_the_prompt_is_refused_with_the_reason() {
        let mut other = reply(json!([1, 2, 3]), json!([0, 0, 0]));
        other["choices"][0]["prompt_token_ids"] = json!([1, 5, 6]);
        for (reply, said) in [
            (json!({ "choices": [{ "text": "abc", "logprobs": null }] }), "no choices[0].token_ids"),
            (reply(json!([1, 2, 3]), json!([0, 0])), "no choices[0].logprobs.token_logprobs"),
            (reply(json!([1, 2, 3]), json!([0, null, 0])), "no choices[0].logprobs.token_logprobs"),
            (reply(json!([1, 2]), json!([0, 0])), "after 2 of 3 tokens"),
            (reply(json!([1, 2, 3, 4]), json!([0, 0, 0, 0])), "after 4 of 3 tokens"),
            (reply(json!([1, 20, 3]), json!([0, 0, 0])), "sampled token 20"),
            (other, "other prompt tokens"),
        ] {
            match read(reply) {
                Err(Failure::Final(text)) => assert!(text.contains(said), "{said}: {text}"),
                found => panic!("{said}: {found:?}"),
            }
        }
        assert!(matches!(read(json!({ "choices": [] })), Err(Failure::Passing(_))));
    }
}
