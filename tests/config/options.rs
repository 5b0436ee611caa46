//! Every key of the stages' sections has an effect, tested one key at a time.
//!
//! A run of the stage without the key and a run with it, from a config as a user writes it, must differ in what they
//! leave behind, or must not where the key says so. A key of the schema without a row here fails the tests. Whether the
//! difference is right is tested beside the formulas.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use fourfold::config;
use fourfold::config::{Stage, known_keys};
use fourfold::report::clocks;
use fourfold::run;
use fourfold::run::RunOptions;
use serde_json::{Value, json};
use toml::Table;

use crate::vllm;

/// A row: the key, what else is set on both sides, the key's other value.
type Row = (&'static str, &'static str, &'static str);

const SFT: &[Row] = &[
    ("compat", "", "'dschat'"),
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("completion_only_loss", "", "false"),
    ("max_tokens_per_batch", "", "64"),
];

const REWARD: &[Row] = &[
    ("compat", "loss = 'divergence_to_end'", "'dschat'"),
    ("num_padding_at_beginning", "compat = 'dschat'", "1"),
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("loss", "", "'divergence_to_end'"),
    ("center", "", "false"),
    ("ensemble", "", "2"),
    ("max_tokens_per_batch", "", "64"),
];

const DPO: &[Row] = &[
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("loss_type", "", "'ipo'"),
    ("loss_type", "", "'hinge'"),
    ("loss_type", "label_smoothing = 0.2", "'robust'"),
    ("label_smoothing", "", "0.2"),
    ("beta", "", "0.5"),
    ("precompute_ref_log_probs", "", "SAME true"),
];

const KTO: &[Row] = &[
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("beta", "", "0.5"),
    ("desirable_weight", "", "0.5"),
    ("undesirable_weight", "", "0.5"),
    ("precompute_ref_log_probs", "", "SAME true"),
];

const DISTILL: &[Row] = &[
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("teacher_model_name_or_path", "", "SAME 'WORLD/copy'"),
    ("teacher_adapter", "", "'WORLD/taught/adapter'"),
    ("temperature", "", "0.5"),
    ("lmbda", "", "1.0"),
    ("beta", "", "0.0"),
    ("beta", "", "1.0"),
    ("max_new_tokens", "", "3"),
    ("seq_kd", "", "true"),
    ("save_samples", "", "1"),
];

const LORA: &[Row] = &[
    ("compat", "", "'dschat'"),
    ("use_dora", "", "true"),
    ("r", "", "4"),
    ("lora_alpha", "", "4.0"),
    ("target_modules", "", "['q_proj']"),
    ("use_rslora", "", "true"),
    ("exclude_modules", "", "['q_proj']"),
    ("layers_to_transform", "", "[0]"),
    ("rank_pattern", "", "{ q_proj = 4 }"),
    ("alpha_pattern", "", "{ q_proj = 4.0 }"),
    ("init_lora_weights", "", "'gaussian'"),
    ("init_lora_weights", "", "'pissa'"),
    ("init_lora_weights", "", "'olora'"),
    ("init_lora_weights", "", "'dschat'"),
    ("loraplus_lr_ratio", "", "4.0"),
];

const BASE: &[Row] = &[
    ("path", "", "SAME 'WORLD/copy'"),
    ("quantize", "", "'q8_0'"),
    ("compute_dtype", "", "'bf16'"),
    ("device", "", "SAME 'cpu'"),
    ("offload", "", "SAME 1"),
];

/// Of the stages with one learner.
const OF_ALL: &[Row] = &[
    ("num_train_epochs", "", "2"),
    ("per_device_train_batch_size", "", "2"),
    ("gradient_accumulation_steps", "", "2"),
    ("logging_steps", "", "2"),
    ("eval_steps", "", "1"),
];

/// Of every stage.
const OPTIMIZER: &[Row] = &[
    ("learning_rate", "", "1e-3"),
    ("warmup_steps", "", "2"),
    ("lr_scheduler_type", "", "'constant'"),
    ("lr_scheduler_type", "", "'cosine'"),
    ("weight_decay", "", "0.5"),
    ("adam_beta1", "", "0.5"),
    ("adam_beta2", "", "0.9"),
    ("adam_epsilon", "", "1e-2"),
    ("max_grad_norm", "", "0.01"),
    ("checkpoint", "checkpoint = 'none'", "SAME 'mlp'"),
    ("checkpoint", "checkpoint = 'none'", "SAME 'block'"),
];

const PPO: &[Row] = &[
    ("local_rollout_forward_batch_size", "", "SAME 3"),
    ("kl_penalty_target", "policy_loss = 'kl_penalty'", "1e3"),
    ("target_kl", "", "1e-9"),
    ("entropy_coef", "", "0.1"),
    ("cliprange_value", "", "1e-4"),
    ("vf_coef", "shared_optimizer = true", "0.01"),
    ("shared_optimizer", "max_grad_norm = 0.01", "true"),
    ("gamma", "", "0.9"),
    ("lam", "", "0.5"),
    ("bootstrap_truncated", "", "true"),
    ("whiten_rewards", "", "'keep_mean'"),
    ("whiten_rewards", "whiten_rewards = 'keep_mean'", "'remove_mean'"),
    ("whiten_advantages", "", "false"),
    ("use_score_scaling", "", "true"),
    ("use_score_norm", "use_score_scaling = true", "true"),
    ("score_clip", "", "0.05"),
    ("missing_eos_penalty", "", "1.0"),
    ("min_response_length", "response_length = 40", "39"),
    ("short_response_penalty", "response_length = 40\nmin_response_length = 39", "3.0"),
    ("length_penalty", "", "0.2"),
    ("overlong_buffer_len", "", "6"),
    ("overlong_penalty_factor", "overlong_buffer_len = 6", "3.0"),
    ("ema_decay", "", "0.9"),
    ("ref_model_sync_iterations", "", "1"),
    ("ref_model_mixup_alpha", "ref_model_sync_iterations = 1", "0.5"),
    ("eval_prompts", "", "2"),
    ("eval_every", "eval_prompts = 2", "1"),
    ("save_samples", "", "3"),
    ("compat", "", "'dschat'"),
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("reward_adapter", "", "'WORLD/reward/adapter_of_sft'"),
    ("reward", "", "[{ kind = 'length', max_tokens = 4 }]"),
    ("gold", "eval_prompts = 2", "{ kind = 'regex', pattern = 'a' }"),
    ("ptx", "", "{ path = 'WORLD/text.txt' }"),
    ("rollout", "", "{ engine = 'vllm', urls = ['VLLM'] }"),
    ("critic_learning_rate", "", "1e-4"),
    ("advantage_estimator", "", "'reinforce'"),
    ("advantage_estimator", "", "'a2c'"),
    ("advantage_estimator", "", "'reinforce_plus_plus'"),
    ("advantage_estimator", "num_generations = 4", "'rloo'"),
    ("advantage_estimator", "num_generations = 4", "'grpo'"),
    ("critic", "", "'actor'"),
    ("critic", "", "'own'"),
    ("critic_warmup", "", "1"),
    ("total_episodes", "", "24"),
    ("batch_size", "", "4"),
    ("num_generations", "", "2"),
    ("num_mini_batches", "", "4"),
    ("num_ppo_epochs", "", "3"),
    ("micro_batch_size", "", "1"),
    ("response_length", "", "9"),
    ("temperature", "", "0.7"),
    ("temperature", "", "0.0"),
    ("top_k", "", "3"),
    ("top_p", "", "0.5"),
    ("kl_coef", "", "0.5"),
    ("adap_kl_ctrl", "", "true"),
    ("target", "adap_kl_ctrl = true\ntotal_episodes = 24", "0.001"),
    ("horizon", "adap_kl_ctrl = true", "100.0"),
    ("kl_estimator", "", "'k2'"),
    ("kl_estimator", "", "'k3'"),
    ("kl_estimator", "", "'exact'"),
    ("kl_in", "kl_estimator = 'k2'", "'loss'"),
    ("policy_loss", "", "'kl_penalty'"),
    ("policy_loss", "", "'gradient'"),
    ("cliprange", "", "0.001"),
    ("cliprange_high", "", "0.001"),
    ("dual_clip", "", "1.001"),
    ("ratio_threshold", "", "1.0000001"),
    ("log_ratio_clamp", "", "0.001"),
    ("kl_penalty_coef", "policy_loss = 'kl_penalty'", "9.0"),
    ("loss_type", "", "'grpo'"),
    ("loss_type", "", "'dr_grpo'"),
    ("importance_sampling_level", "num_ppo_epochs = 2", "'sequence'"),
    ("importance_sampling_level", "num_ppo_epochs = 2", "'product'"),
    ("measure_kl", "kl_coef = 0.0", "false"),
    ("normalize_advantages", "advantage_estimator = 'rloo'\nnum_generations = 2", "true"),
    ("mask_truncated_completions", "", "true"),
    ("top_entropy_quantile", "", "0.5"),
    ("importance_sampling_correction", "", "'token_mask'"),
    ("importance_sampling_clip_max", "importance_sampling_correction = 'token_truncate'", "0.5"),
    ("importance_sampling_clip_min", "importance_sampling_correction = 'sequence_mask'", "2.0"),
    ("dynamic_sampling_rollouts", EQUAL, "2"),
    ("policy_loss", "", "'cispo'"),
    ("policy_loss", "", "'sapo'"),
    ("sapo_temperature_pos", "policy_loss = 'sapo'", "9.0"),
    ("sapo_temperature_neg", "policy_loss = 'sapo'", "9.0"),
    ("use_bias_correction_kl", "kl_estimator = 'k3'\nkl_in = 'loss'\nnum_ppo_epochs = 2", "true"),
    ("scale_rewards", "advantage_estimator = 'grpo'\nnum_generations = 2", "'none'"),
    ("scale_rewards", "advantage_estimator = 'grpo'\nnum_generations = 2", "'batch'"),
];

/// A rule by which the rewards of many groups are all equal.
const EQUAL: &str = "advantage_estimator = 'grpo'\nnum_generations = 2\nreward_adapter = ''\nreward = [{ kind = 'length', max_tokens = 4 }]";

/// Of the group methods.
const GROUPS: &[Row] = &[
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("reward_adapter", "", "'WORLD/reward/adapter_of_sft'"),
    ("reward", "", "[{ kind = 'length', max_tokens = 4 }]"),
    ("gold", "eval_prompts = 2", "{ kind = 'regex', pattern = 'a' }"),
    ("rollout", "", "{ engine = 'vllm', urls = ['VLLM'] }"),
    ("num_generations", "", "4"),
    ("num_train_epochs", "", "2"),
    ("max_steps", "", "4"),
    ("per_device_train_batch_size", "", "8"),
    ("gradient_accumulation_steps", "", "1"),
    ("steps_per_generation", "", "4"),
    ("generation_batch_size", "", "16"),
    ("num_iterations", "", "1"),
    ("local_rollout_forward_batch_size", "", "SAME 3"),
    ("max_completion_length", "", "9"),
    ("temperature", "", "0.7"),
    ("top_k", "", "3"),
    ("top_p", "", "0.5"),
    ("beta", "", "0.5"),
    ("epsilon", "learning_rate = 5e-2", "0.001"),
    ("epsilon_high", "learning_rate = 5e-2", "0.001"),
    ("mask_truncated_completions", "", "true"),
    ("dynamic_sampling_rollouts", "reward_adapter = ''\nreward = [{ kind = 'length', max_tokens = 4 }]", "2"),
    ("sync_ref_model", "beta = 0.5\nref_model_sync_steps = 4", "true"),
    ("ref_model_mixup_alpha", "beta = 0.5\nref_model_sync_steps = 4\nsync_ref_model = true", "0.1"),
    ("ref_model_sync_steps", "beta = 0.5\nref_model_sync_steps = 4\nsync_ref_model = true", "8"),
    ("eval_prompts", "", "2"),
    ("eval_every", "eval_prompts = 2", "1"),
    ("save_samples", "", "3"),
];

const GRPO: &[Row] = &[
    ("delta", "learning_rate = 5e-2", "1.001"),
    ("loss_type", "", "'grpo'"),
    ("loss_type", "", "'dr_grpo'"),
    ("loss_type", "", "SAME 'bnpo'"),
    ("loss_type", "", "'cispo'"),
    ("loss_type", "", "'sapo'"),
    ("sapo_temperature_pos", "loss_type = 'sapo'", "9.0"),
    ("sapo_temperature_neg", "loss_type = 'sapo'", "9.0"),
    ("importance_sampling_level", "", "'sequence'"),
    ("scale_rewards", "", "'none'"),
    ("scale_rewards", "", "'batch'"),
    ("multi_objective_aggregation", "reward = [{ kind = 'length', max_tokens = 6 }]", "'normalize_then_sum'"),
    ("top_entropy_quantile", "", "0.5"),
    ("importance_sampling_correction", "", "'sequence_truncate'"),
    ("importance_sampling_clip_max", "importance_sampling_correction = 'token_truncate'", "0.5"),
    ("importance_sampling_clip_min", "importance_sampling_correction = 'sequence_mask'", "2.0"),
    ("entropy_coef", "", "0.1"),
    ("use_bias_correction_kl", "beta = 0.5", "false"),
];

const RLOO: &[Row] = &[("normalize_advantages", "", "true"), ("reward_clip_range", "", "[-0.05, 0.05]")];

const PTX: &[Row] = &[
    ("path", "path = 'WORLD/text.txt'", "'WORLD/other.txt'"),
    ("coef", "path = 'WORLD/text.txt'", "1.0"),
    ("block_size", "path = 'WORLD/text.txt'", "9"),
    ("separate_step", "path = 'WORLD/text.txt'", "true"),
];

const DEAD: &str = "kind = 'command'\ncommand = ['/bin/sh', '-c', 'exit 1']\nfallback_score = 0.5\nretries = 0";
const PAIR: &str = "kind = 'adapter'\nadapters = ['WORLD/reward/adapter', 'WORLD/reward/adapter_of_sft']";
const MEAN_OF_PAIR: &str =
    "kind = 'adapter'\nadapters = ['WORLD/reward/adapter', 'WORLD/reward/adapter_of_sft']\naggregate = 'mean'";

const SERVED: &str = "kind = 'http'\nurl = 'SERVER/1'\ninput = 'text'\nscore_index = 0\napi = 'score'";

const JUDGE: &str =
    "kind = 'judge'\nurl = 'SERVER/3'\nmodel = 'a'\ntemplate = '{{ response }}'\nfallback_score = 0.5\nretries = 0";

const PART: &[Row] = &[
    ("kind", "kind = 'length'", "'json_valid'"),
    ("name", "kind = 'length'\nmax_tokens = 4", "'brevity'"),
    ("weight", "kind = 'length'", "3.0"),
    ("weight_end", "kind = 'length'", "3.0"),
    ("adapters", "kind = 'adapter'\nadapters = ['WORLD/reward/adapter']", "['WORLD/reward/adapter_of_sft']"),
    ("std_coef", PAIR, "5.0"),
    ("aggregate", PAIR, "'mean'"),
    // Of two scores the lower one is their mean less their deviation.
    ("aggregate", MEAN_OF_PAIR, "'min'"),
    ("command", DEAD, "['/bin/sh', '-c', 'while read -r line; do echo 2; done']"),
    ("url", "kind = 'http'\nurl = 'SERVER/1'", "'SERVER/2'"),
    ("api", SERVED, "'pooling'"),
    ("input", "kind = 'http'\nurl = 'SERVER/1'\napi = 'pooling'\nscore_index = 0\ninput = 'ids'", "'text'"),
    ("score_index", "kind = 'http'\nurl = 'SERVER/1'\napi = 'pooling'\ninput = 'ids'\nscore_index = 0", "1"),
    ("api_key_env", SERVED, "'PATH'"),
    ("pattern", "kind = 'regex'\npattern = 'a'", "'zzz'"),
    // The quickstart's base writes neither numbers nor JSON.
    ("column", "kind = 'math'\ncolumn = 'chosen'", "SAME 'prompt'"),
    ("schema", "kind = 'json_schema'\nschema = '{}'", "SAME 'true'"),
    ("min_tokens", "kind = 'length'", "9"),
    ("max_tokens", "kind = 'length'", "4"),
    (
        "timeout_seconds",
        "kind = 'command'\ncommand = ['/bin/sh', '-c', 'read -r line; sleep 1; echo 2; while read -r line; do echo 2; done']\nfallback_score = 0.5\nretries = 0",
        "0.2",
    ),
    ("api_key_env", JUDGE, "'PATH'"),
    ("model", JUDGE, "'abc'"),
    ("template", JUDGE, "'x{{ response }}'"),
    ("min_score", JUDGE, "5.0"),
    ("max_score", JUDGE, "2.0"),
    ("request", JUDGE, "{ temperature = 0.75 }"),
    ("concurrency", JUDGE, "SAME 1"),
    ("input_price", JUDGE, "1.0"),
    ("output_price", JUDGE, "1.0"),
    ("retries", DEAD, "1"),
    ("fallback_score", DEAD, "-4.0"),
];

const SERVER: &str = "engine = 'vllm'\nurls = ['VLLM']";

/// Servers sample from the same weights, so that none of these keys moves a result.
const ROLLOUT: &[Row] = &[
    ("engine", SERVER, "SAME 'openai'"),
    ("urls", SERVER, "SAME ['VLLM', 'VLLM/']"),
    ("api_key_env", SERVER, "SAME 'PATH'"),
    ("logprobs_mode", SERVER, "SAME 'processed_logprobs'"),
    ("adapter_dir", SERVER, "SAME 'WORLD/rollouts'"),
    (
        "server_adapter_dir",
        "engine = 'vllm'\nurls = ['VLLM']\nadapter_dir = 'WORLD/rollouts'",
        "SAME 'WORLD/rollouts/'",
    ),
    ("max_mismatch", SERVER, "SAME 9.0"),
    ("concurrency", SERVER, "SAME 1"),
    ("timeout_seconds", SERVER, "SAME 300.0"),
    ("retries", SERVER, "SAME 1"),
];

/// What a run leaves: files and their bytes.
type Left = BTreeMap<PathBuf, Vec<u8>>;

/// Records, texts and adapters that every run starts from.
struct World {
    dir: tempfile::TempDir,
    server: String,
    vllm: String,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let record = |i: usize| {
        json!({
            "prompt": format!("How was the soup at place {i}?"),
            "chosen": "The soup was lovely and warm.",
            "rejected": format!("The soup number {i} was awful."),
        })
    };
    let lines: Vec<String> = (0..20).map(|i| record(i).to_string()).collect();
    fs::write(dir.path().join("data.jsonl"), lines.join("\n")).unwrap();
    fs::create_dir(dir.path().join("copy")).unwrap();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quickstart/assets/base")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join("copy").join(path.file_name().unwrap())).unwrap();
    }
    fs::write(dir.path().join("text.txt"), "The soup at the Blue Door was lovely and warm. ".repeat(20)).unwrap();
    fs::write(dir.path().join("other.txt"), "Nobody names a place where the coffee was cold. ".repeat(20)).unwrap();
    let world = World { dir, server: server(), vllm: vllm::server(|_, _, _| vllm::Deed::Answer).0 };
    for (out, section, keys) in [
        ("sft", "sft", "learning_rate = 5e-3"),
        ("taught", "sft", "learning_rate = 1e-2"),
        ("reward", "reward", "learning_rate = 5e-3"),
        ("other", "reward", "learning_rate = 5e-3\nadapter = 'WORLD/sft/adapter'"),
    ] {
        let table = world.table(&format!("[{section}]\nper_device_train_batch_size = 4\n{keys}"));
        world.run(stage_of(section), &table, &world.dir.path().join(out)).unwrap();
    }
    fs::rename(world.dir.path().join("other/adapter"), world.dir.path().join("reward/adapter_of_sft")).unwrap();
    world
});

/// Answers every request at /N with N as the score of each response, and every question at /N/chat/completions with a score
/// that is N and more for the model, the temperature, the key and a question that begins with x.
fn server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut first, mut length, mut has_key) = (String::new(), 0, false);
            reader.read_line(&mut first).unwrap();
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
                has_key |= line.to_ascii_lowercase().starts_with("authorization: bearer ");
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let asked: Value = serde_json::from_slice(&body).unwrap();
            let score: f64 = first.split([' ', '/']).nth(2).unwrap().parse().unwrap();
            let body = match asked["messages"][0]["content"].as_str() {
                None if asked["responses"].is_array() => {
                    json!({ "scores": vec![score; asked["responses"].as_array().unwrap().len()] })
                }
                // A reward model behind vLLM: one number for a pair, two for a sequence, others for text and with a key.
                None => {
                    let score = score + f64::from(u8::from(has_key)) / 4.0;
                    let entry = |of: &Value| match asked["text_1"].is_array() {
                        true => json!({ "score": score }),
                        false => json!({ "data": [score + if of.is_string() { 2.0 } else { 1.0 }, score + 3.0] }),
                    };
                    let asked = asked["text_1"].as_array().or(asked["input"].as_array()).unwrap();
                    json!({ "data": asked.iter().map(entry).collect::<Vec<_>>() })
                }
                Some(question) => {
                    let model = asked["model"].as_str().unwrap().len() as f64 / 8.0;
                    let more =
                        f64::from(u8::from(has_key)) / 4.0 + f64::from(u8::from(question.starts_with('x'))) / 2.0;
                    let text = format!("Score: {}", score + model + more + asked["temperature"].as_f64().unwrap());
                    let usage = json!({ "prompt_tokens": 9, "completion_tokens": 2 });
                    json!({ "choices": [{ "message": { "content": text } }], "usage": usage })
                }
            };
            let body = body.to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        }
    });
    address
}

fn stage_of(section: &str) -> Stage {
    match section {
        "sft" | "lora" | "base" => Stage::Sft,
        "reward" => Stage::Reward,
        "dpo" => Stage::Dpo,
        "kto" => Stage::Kto,
        "distill" => Stage::Distill,
        "grpo" => Stage::Grpo,
        "rloo" => Stage::Rloo,
        _ => Stage::Ppo,
    }
}

impl World {
    fn table(&self, text: &str) -> Table {
        let dir = self.dir.path().display().to_string();
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quickstart/assets/base");
        let head = format!(
            "seed = 3\n[base]\npath = '{}'\n[lora]\nr = 2\n[data]\npath = '{dir}/data.jsonl'\neval_rows = 4\nmax_prompt_length = 64\n",
            base.display()
        );
        let text =
            format!("{head}{text}").replace("WORLD", &dir).replace("SERVER", &self.server).replace("VLLM", &self.vllm);
        text.parse().unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    /// What the stage leaves in `out`: every file's bytes, without those that hold paths and times.
    fn run(&self, stage: Stage, table: &Table, out: &Path) -> anyhow::Result<Left> {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), table.to_string())?;
        let config = config::load(file.path(), &[])?;
        let mut summary = run::stage(stage, &config, out, &RunOptions::default())?;
        for untold in ["wall_s", "peak_rss_mib", "memory", "output_dir", "adapter", "actor", "critic", "actor_ema"] {
            summary.as_object_mut().unwrap().remove(untold);
        }
        let mut found = BTreeMap::from([("summary".into(), summary.to_string().into_bytes())]);
        let mut folders = vec![out.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                let kept = ["adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"];
                if path.is_dir() {
                    folders.push(path);
                } else if kept.iter().any(|name| path.ends_with(name)) {
                    let bytes = if path.ends_with("metrics.jsonl") {
                        clocks::without(&fs::read_to_string(&path)?).into_bytes()
                    } else {
                        fs::read(&path)?
                    };
                    found.insert(path.strip_prefix(out)?.into(), bytes);
                }
            }
        }
        Ok(found)
    }

    /// As [`World::run`] in a folder of its own, once for each config.
    fn result(&self, stage: Stage, table: &Table) -> Left {
        static KNOWN: LazyLock<Mutex<HashMap<String, Left>>> = LazyLock::new(Mutex::default);
        let key = format!("{} {table}", stage.name());
        if let Some(known) = KNOWN.lock().unwrap().get(&key) {
            return known.clone();
        }
        let dir = tempfile::tempdir().unwrap();
        let found = self.run(stage, table, &dir.path().join("out"));
        let found = found.unwrap_or_else(|error| panic!("{error:#}\n{table}"));
        KNOWN.lock().unwrap().insert(key, found.clone());
        found
    }
}

/// The stage's section before a row's own settings: a run of some steps, off the first ratio.
fn before(section: &str) -> &'static str {
    match section {
        "ppo" | "ppo.ptx" | "ppo.reward" | "ppo.rollout" => {
            "learning_rate = 5e-3\ntotal_episodes = 16\nbatch_size = 8\nnum_mini_batches = 2\nnum_ppo_epochs = 2\n\
             response_length = 12\nreward_adapter = 'WORLD/reward/adapter'"
        }
        "grpo" | "rloo" => {
            "learning_rate = 5e-3\nper_device_train_batch_size = 4\ngradient_accumulation_steps = 2\nnum_generations = 2\n\
             num_iterations = 2\nnum_train_epochs = 1\nmax_completion_length = 12\nreward_adapter = 'WORLD/reward/adapter'"
        }
        "distill" => {
            "learning_rate = 5e-3\nper_device_train_batch_size = 4\nmax_new_tokens = 5\n\
             teacher_adapter = 'WORLD/sft/adapter'"
        }
        _ => "learning_rate = 5e-3\nper_device_train_batch_size = 4",
    }
}

/// Tries every row, and looks whether the schema has a key without one.
fn check(section: &str, rows: &[&[Row]]) {
    let world = &*WORLD;
    let (root, inner) = section.split_once('.').unwrap_or((section, ""));
    let mut tried = BTreeSet::new();
    for &(key, given, value) in rows.iter().flat_map(|rows| rows.iter()) {
        tried.insert(key);
        let mut table = world.table(&format!("[{}]\n{}", stage_of(root).name(), before(section)));
        // What a row sets stands in place of what all have.
        let given = world.table(&format!("[given]\n{given}")).remove("given").unwrap();
        let outer = table[root].as_table_mut().unwrap();
        match inner {
            "" => outer.extend(given.as_table().unwrap().clone()),
            "reward" => drop(outer.insert(inner.into(), vec![given].into())),
            _ => drop(outer.insert(inner.into(), given)),
        }
        let (same, value) = value.strip_prefix("SAME ").map_or((false, value), |value| (true, value));
        let value = world.table(&format!("[given]\nvalue = {value}"))["given"]["value"].clone();
        let mut changed = table.clone();
        let outer = changed[root].as_table_mut().unwrap();
        let of = match inner {
            "" => outer,
            "reward" => outer[inner].as_array_mut().unwrap()[0].as_table_mut().unwrap(),
            _ => outer[inner].as_table_mut().unwrap(),
        };
        let was = of.insert(key.into(), value.clone());
        assert_ne!(was.as_ref(), Some(&value), "{section}.{key}: {value} is what it was");
        let (without, with) = (world.result(stage_of(root), &table), world.result(stage_of(root), &changed));
        assert_eq!(without == with, same, "{section}.{key} = {value}: the runs with it and without it");
    }
    let known = known_keys();
    let keys = known.iter().find(|(name, _)| *name == section).unwrap().1;
    for key in keys {
        assert!(tried.contains(key), "{section}.{key} has no row: say here what it changes");
    }
    for key in tried {
        assert!(keys.contains(&key), "{section} has no key {key} any more");
    }
}

#[test]
fn every_key_of_sft_has_an_effect() {
    check("sft", &[SFT, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_lora_and_base_has_an_effect() {
    check("lora", &[LORA]);
    check("base", &[BASE]);
}

#[test]
fn every_key_of_reward_has_an_effect() {
    check("reward", &[REWARD, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_dpo_has_an_effect() {
    check("dpo", &[DPO, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_kto_has_an_effect() {
    check("kto", &[KTO, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_distill_has_an_effect() {
    check("distill", &[DISTILL, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_ppo_has_an_effect() {
    check("ppo", &[PPO, OPTIMIZER]);
}

#[test]
fn every_key_of_grpo_and_rloo_has_an_effect() {
    check("grpo", &[GROUPS, GRPO, OPTIMIZER]);
    check("rloo", &[GROUPS, RLOO, OPTIMIZER]);
}

#[test]
fn every_key_of_ptx_has_an_effect() {
    check("ppo.ptx", &[PTX]);
}

#[test]
fn every_key_of_a_rollouts_engine_has_an_effect() {
    check("ppo.rollout", &[ROLLOUT]);
}

#[test]
fn every_key_of_a_reward_part_has_an_effect() {
    check("ppo.reward", &[PART]);
}
