//! What the clients of rollout servers share: which of them a config asks for, one request per prompt with several at once, tries,
//! and what a response is once its tokens have come. It does not depend on rewards or updates. Read `served_rollouts.rs` for
//! servers that load adapters, `llama_cpp.rs` for one that is started anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::Model;
use super::llama_cpp::LlamaCppSampler;
use super::llama_process;
use super::served_rollouts::ServedSampler;
use crate::config::{Engine, Ppo, RolloutEngine};
use crate::model::adapter::Adapter;
use crate::model::generate::{FinishReason, Response, SamplingParams};
use crate::planner::plan::text;
use crate::ppo::sampler::{Asked, Sampler};
use crate::report::progress::{Progress, Unit};
use crate::reward::source::retry::{Failure, LONGEST_WAIT};

/// Wait before the first retry.
const BACKOFF: Duration = Duration::from_millis(500);

/// A sampler that is a server.
pub(super) trait RolloutServer: Sampler {
    /// Gives it the adapter that the run begins with, so that a server which cannot sample is found before minutes of work.
    /// `stays`: whether the run's folder does where that fails.
    ///
    /// # Errors
    /// As for a rollout.
    fn begin(&self, first: &Adapter, stays: bool) -> Result<()>;
}

/// The client of the servers that a section names; nothing is sent, started or written yet. `section`: ppo, grpo or rloo. `out`:
/// the run's folder. `asks`: whether this process will ask them, and not another rank for it.
///
/// # Errors
/// If a key's variable is not set, the run's folder has no absolute path, or a program that is to be started is not there.
pub(super) fn open<'w>(
    settings: &RolloutEngine,
    model: &'w Model,
    section: &'static str,
    out: &Path,
    asks: bool,
) -> Result<Box<dyn RolloutServer + 'w>> {
    Ok(match settings.engine {
        Engine::LlamaCpp => Box::new(LlamaCppSampler::new(settings, model, section, out, asks)?),
        Engine::Own | Engine::Vllm | Engine::Openai => {
            Box::new(ServedSampler::new(settings, model, section, out, asks)?)
        }
    })
}

/// The folder in which adapters are written for servers.
///
/// # Errors
/// If it has no absolute path.
pub(super) fn adapters_folder(settings: &RolloutEngine, out: &Path) -> Result<PathBuf> {
    let folder = settings.adapter_dir.clone().unwrap_or_else(|| out.join("rollout"));
    std::path::absolute(&folder).with_context(|| folder.display().to_string())
}

/// Removes the adapters that a killed run left in that folder, where it is the run's own.
pub(super) fn remove_abandoned(settings: &RolloutEngine, folder: &Path) {
    let entries = settings.adapter_dir.is_none().then(|| fs::read_dir(folder));
    for entry in entries.into_iter().flatten().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("fourfold-") {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

/// What a server that the run starts takes of the machine's memory beside it, in words, and the bytes of its model file where they
/// are known; `None` where no server is started.
pub fn memory_beside(ppo: &Ppo) -> Option<(String, Option<u64>)> {
    let servers = ppo.servers().filter(|servers| servers.engine == Engine::LlamaCpp)?;
    let (program, arguments) = servers.server.split_first()?;
    let file = llama_process::model_file(program, arguments);
    let bytes = file.and_then(|file| Some(fs::metadata(file).ok()?.len()));
    let of = match (file, bytes) {
        (Some(file), Some(bytes)) => format!("{file} of {}", text(bytes as usize)),
        _ => "its GGUF file".into(),
    };
    Some((
        format!(
            "llama.cpp's server loads the base once more beside the run: {of} and a KV cache, which are not counted here"
        ),
        bytes,
    ))
}

/// A part of names that is another one in each process: the adapters of a run that was killed may still be there.
pub(super) fn tag() -> String {
    let started = (crate::report::clocks::now() * 1e6) as u64;
    format!("{:x}-{:x}", std::process::id(), started)
}

/// Tries until one succeeds or none can. `of(tried)`: the address for messages, and the outcome.
pub(super) fn tries<T>(retries: usize, of: impl Fn(usize) -> (String, Result<T, Failure>)) -> Result<T, Failure> {
    let (mut wait, mut last) = (BACKOFF, String::new());
    for tried in 0..=retries {
        if tried > 0 {
            thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
        let (at, outcome) = of(tried);
        match outcome {
            Ok(found) => return Ok(found),
            Err(Failure::Final(text)) => return Err(Failure::Final(format!("rollout server {at}: {text}"))),
            Err(Failure::Passing(text) | Failure::Unscored(text)) => last = format!("rollout server {at}: {text}"),
        }
    }
    Err(Failure::Passing(last))
}

/// What is said of a failure that ends the run.
pub(super) fn said(failure: Failure) -> anyhow::Error {
    match failure {
        Failure::Final(text) => anyhow!("{text}"),
        Failure::Passing(text) | Failure::Unscored(text) => {
            anyhow!("{text}; fix it, or raise timeout_seconds or retries of the rollout's section")
        }
    }
}

/// Gets a response per prompt by `one(number, prompt, seed)`, as many at once as the settings allow. No more are asked for once one
/// has failed or `abandoned` is set. `shown`: the progress is.
///
/// # Errors
/// The first failure of a response.
pub(super) fn sample(
    asked: &Asked,
    settings: &RolloutEngine,
    abandoned: &AtomicBool,
    shown: bool,
    one: impl Fn(usize, &[u32], u64) -> Result<Response, Failure> + Sync,
) -> Result<Vec<Response>> {
    let Asked { prompts, seeds, .. } = asked;
    let progress = Mutex::new(shown.then(|| Progress::new("rollout", prompts.len(), Unit::Of("response"))));
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let found: Vec<Mutex<Option<Result<Response>>>> = prompts.iter().map(|_| Mutex::default()).collect();
    // Each thread takes the next prompt.
    let work = || {
        while !failed.load(Ordering::Relaxed) && !abandoned.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some((prompt, &seed)) = prompts.get(i).zip(seeds.get(i)) else { return };
            let sampled = one(i, prompt, seed);
            failed.fetch_or(sampled.is_err(), Ordering::Relaxed);
            if let Some(progress) = &mut *progress.lock().unwrap_or_else(PoisonError::into_inner) {
                progress.add(1);
            }
            *found[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(sampled.map_err(said));
        }
    };
    let more = settings.concurrency.get().min(prompts.len()).saturating_sub(1);
    thread::scope(|scope| {
        for _ in 0..more {
            // Where no further thread can be started, those that there are do the work.
            if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let found = found.into_iter().filter_map(|one| one.into_inner().unwrap_or_else(PoisonError::into_inner));
    let sampled = found.collect::<Result<Vec<Response>>>()?;
    (sampled.len() == prompts.len()).then_some(sampled).context("a prompt was not sent")
}

/// The response that the tokens are, if they are a whole one: our stop token ends it, whatever the server sampled after it, or its
/// limit does.
pub(super) fn whole(tokens: &[u32], logprobs: &[f32], sampling: &SamplingParams) -> Option<Response> {
    let (end, finish) = match tokens.iter().position(|token| sampling.stop.contains(token)) {
        Some(at) => (at + 1, FinishReason::Stop),
        None if tokens.len() == sampling.max_new_tokens => (tokens.len(), FinishReason::Length),
        None => return None,
    };
    Some(Response { tokens: tokens[..end].to_vec(), logprobs: logprobs[..end].to_vec(), finish })
}

/// Checks that a server's tokens are the base's.
///
/// # Errors
/// If one is not.
pub(super) fn check_tokens(tokens: &[u32], vocab: usize) -> Result<(), Failure> {
    match tokens.iter().find(|&&token| token as usize >= vocab) {
        Some(token) => {
            Err(Failure::Final(format!("it sampled token {token}, and [base] has {vocab}: it serves another base")))
        }
        None => Ok(()),
    }
}
