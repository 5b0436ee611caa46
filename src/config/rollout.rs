//! The section `[ppo.rollout]`: what samples the responses of a rollout, this process or servers that load the actor's adapter.
//!
//! Read `ppo.rs` before this file and `ppo/sampler.rs` for what a sampler does.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ImportanceSamplingCorrection, Origin, Ppo, url};
use crate::invalid;

/// What samples the responses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// This process.
    #[default]
    #[serde(rename = "self")]
    Own,
    /// vLLM's server: `/v1/completions` with token ids, `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`.
    Vllm,
    /// Another server with these three, and no sampling parameter beyond OpenAI's.
    Openai,
    /// llama.cpp's server, a child process of this one. It loads no adapter while it runs, so it is started anew with each version
    /// of the actor's: `/completion` with token ids, `/health`.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

/// Which log-probabilities a server returns (vLLM's `--logprobs-mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
pub enum LogprobsMode {
    /// Those of the logits as they are, before temperature, top-k and top-p.
    #[default]
    #[serde(rename = "raw_logprobs")]
    Raw,
    /// Those after them.
    #[serde(rename = "processed_logprobs")]
    Processed,
}

/// `[ppo.rollout]`: what samples the responses of a rollout. Evaluations are always sampled by this process.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutEngine {
    /// What samples. Default `self`, this process.
    pub engine: Engine,
    /// The servers' addresses, `http://host:port/v1`: requests go to them in turn, and each loads the adapter. `https://` needs a
    /// build with the feature `hub`.
    pub urls: Vec<String>,
    /// llama.cpp's server and its arguments, started without a shell: `["llama-server", "-m", "base.gguf"]` with the GGUF file of
    /// `[base]`. `--lora`, `--host` and `--port` are added.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub server: Vec<String>,
    /// The environment variable that holds the servers' bearer token; absent = none is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// The log-probabilities that the servers return, by which their samples are checked and corrected. Default `raw_logprobs`
    /// (vLLM's), which need temperature 0 or 1.
    pub logprobs_mode: LogprobsMode,
    /// Where the actor's adapter is written for the servers to read, one folder per iteration (for llama.cpp one GGUF-LoRA file),
    /// the last one alone kept. Absent = `rollout` in the run's folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_dir: Option<PathBuf>,
    /// The path of that folder on the servers' machine, where it is another there. Absent = the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_adapter_dir: Option<String>,
    /// The run stops, its state kept, where the servers' log-probabilities are further than this from the actor's on average over
    /// a rollout's tokens: they sampled from other weights. Default 0.2; other number formats differ by some hundredths.
    pub max_mismatch: f64,
    /// Requests at once, one per response. Default 32.
    pub concurrency: NonZeroUsize,
    /// Longest wait for a reply, and for llama.cpp's server to load its model. Default 600.
    pub timeout_seconds: f64,
    /// Rollouts that are sampled ahead, 0 or 1. With 1 the servers sample the next rollout while the updates of this one run, from
    /// the actor before those updates: `importance_sampling_correction` weights it by what they moved. Default 0.
    pub async_rollouts: usize,
    /// Tries after a failed one, at the next server, half a second later and then twice as long each time. Default 3.
    pub retries: usize,
}

impl Default for RolloutEngine {
    fn default() -> Self {
        Self {
            engine: Engine::Own,
            urls: Vec::new(),
            server: Vec::new(),
            api_key_env: None,
            logprobs_mode: LogprobsMode::Raw,
            adapter_dir: None,
            server_adapter_dir: None,
            max_mismatch: 0.2,
            concurrency: NonZeroUsize::new(32).expect("32 is not 0"),
            timeout_seconds: 600.0,
            async_rollouts: 0,
            retries: 3,
        }
    }
}

impl Ppo {
    /// The servers that sample the rollouts, if this process does not.
    pub fn servers(&self) -> Option<&RolloutEngine> {
        self.rollout.as_ref().filter(|rollout| rollout.engine != Engine::Own)
    }

    /// Whether the next rollout is sampled while the updates of this one run.
    pub fn samples_ahead(&self) -> bool {
        self.servers().is_some_and(|servers| servers.async_rollouts > 0)
    }
}

impl RolloutEngine {
    /// What an engine needs, from its own keys and from the section's sampling parameters.
    ///
    /// # Errors
    /// If it cannot sample what the section asks for, with what to do.
    pub(super) fn check(&self, section: &Ppo) -> Result<()> {
        let name = section.origin.name();
        let says = |text: String| Err(invalid!("[{name}.rollout] {text}"));
        let engine = serde_json::to_value(self.engine)?;
        match self.engine {
            Engine::Own if self.async_rollouts > 0 => {
                return says(
                    "async_rollouts = 1 has a server sample while this process updates, and engine = \"self\" has none; set engine = \
                     \"vllm\" with urls, or async_rollouts = 0"
                        .into(),
                );
            }
            Engine::Own if *self != Self::default() => {
                return says(
                    "has keys of a server, and engine = \"self\"; set engine = \"vllm\", or remove them".into(),
                );
            }
            Engine::Own => return Ok(()),
            Engine::LlamaCpp => {
                if let Some(problem) = self.of_llama_cpp() {
                    return says(format!("engine = \"llama.cpp\" {problem}"));
                }
            }
            Engine::Vllm | Engine::Openai if !self.server.is_empty() => {
                return says(format!(
                    "server is a command that engine = \"llama.cpp\" starts, and engine = {engine} asks servers that run; set urls in \
                     its place"
                ));
            }
            Engine::Vllm | Engine::Openai => {}
        }
        if self.engine != Engine::LlamaCpp && self.urls.is_empty() {
            return says(format!("engine = {engine} needs urls = [\"http://host:port/v1\"]"));
        }
        self.urls.iter().try_for_each(|address| url::check(&format!("[{name}.rollout] urls"), address))?;
        if self.server_adapter_dir.is_some() && self.adapter_dir.is_none() {
            return says("server_adapter_dir is another path of adapter_dir, which is absent; set it".into());
        }
        if section.compat.is_some() {
            return says(format!("engine = {engine} samples no padded rows; remove compat = \"dschat\""));
        }
        if self.engine == Engine::Openai && section.top_k > 0 {
            return says(format!("engine = \"openai\" has no top_k = {}; set it to 0, or use \"vllm\"", section.top_k));
        }
        let corrected = section.importance_sampling_correction != ImportanceSamplingCorrection::None;
        if self.async_rollouts > 0 && !corrected {
            return says(format!(
                "async_rollouts = 1 samples from the actor before its last updates, which importance_sampling_correction weights; {}",
                match section.origin {
                    Origin::Rloo => "RLOO has none: use `fourfold grpo`, or async_rollouts = 0",
                    _ => "set it to \"token_truncate\", or async_rollouts to 0",
                }
            ));
        }
        let temperature = section.temperature;
        match self.logprobs_mode {
            LogprobsMode::Raw if temperature != 0.0 && temperature != 1.0 && self.engine == Engine::LlamaCpp => {
                says(format!(
                    "llama.cpp's log-probabilities are those of temperature 1, and temperature = {temperature}; set it to 1 or 0, or \
                     engine to \"self\""
                ))
            }
            LogprobsMode::Raw if temperature != 0.0 && temperature != 1.0 => says(format!(
                "raw_logprobs are those of temperature 1, and temperature = {temperature}; set it to 1, or start vLLM with \
                 --logprobs-mode processed_logprobs and set logprobs_mode = \"processed_logprobs\""
            )),
            LogprobsMode::Processed if temperature == 0.0 || section.top_k > 0 || section.top_p < 1.0 => says(
                "processed_logprobs are those of the tokens that greedy decoding, top_k and top_p leave; set temperature above 0, \
                 top_k = 0 and top_p = 1, or use raw_logprobs"
                    .into(),
            ),
            _ => Ok(()),
        }
    }

    /// What a config for llama.cpp's server lacks or has too much of.
    fn of_llama_cpp(&self) -> Option<String> {
        let command = "server = [\"llama-server\", \"-m\", \"base.gguf\"]";
        let is_set = [
            ("urls", !self.urls.is_empty()),
            ("api_key_env", self.api_key_env.is_some()),
            ("server_adapter_dir", self.server_adapter_dir.is_some()),
            ("logprobs_mode", self.logprobs_mode != LogprobsMode::Raw),
        ];
        if self.server.first().is_none_or(String::is_empty) {
            return Some(format!(
                "starts the server itself, anew for each version of the adapter, and needs its command: {command}"
            ));
        }
        if let Some((key, _)) = is_set.iter().find(|(_, is_set)| *is_set) {
            return Some(format!("starts the server itself and has no use for {key}; remove it"));
        }
        let refused = [
            (&["--lora", "--lora-scaled"][..], "gives the server the actor's adapter, and no other beside it"),
            (
                &["--host", "--port", "--api-key", "--api-key-file", "--api-prefix"],
                "asks the server at an address that it chooses, without a key",
            ),
            // What they leave out is in the log-probabilities, and so no check would find it.
            (
                &["--grammar", "--grammar-file", "-j", "--json-schema", "-jf", "--json-schema-file"],
                "samples from all tokens",
            ),
        ];
        let is_in = |argument: &String, names: &[&str]| names.contains(&argument.split('=').next().unwrap_or_default());
        self.server.iter().find_map(|argument| {
            let (_, why) = refused.iter().find(|(names, _)| is_in(argument, names))?;
            Some(format!("{why}; remove {argument} from server"))
        })
    }
}
