//! The rows: every key of the sections with a value that must show, and what else it needs. Read `../options.rs` for what is done
//! with them.

/// A row: the key, what else is set on both sides, the key's other value.
pub(super) type Row = (&'static str, &'static str, &'static str);

pub(super) const SFT: &[Row] = &[
    ("compat", "", "'dschat'"),
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("completion_only_loss", "", "false"),
    ("max_tokens_per_batch", "", "64"),
];

pub(super) const REWARD: &[Row] = &[
    ("compat", "loss = 'divergence_to_end'", "'dschat'"),
    ("num_padding_at_beginning", "compat = 'dschat'", "1"),
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("loss", "", "'divergence_to_end'"),
    ("center", "", "false"),
    ("ensemble", "", "2"),
    ("max_tokens_per_batch", "", "64"),
];

pub(super) const DPO: &[Row] = &[
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("loss_type", "", "'ipo'"),
    ("loss_type", "", "'hinge'"),
    ("loss_type", "label_smoothing = 0.2", "'robust'"),
    ("label_smoothing", "", "0.2"),
    ("beta", "", "0.5"),
    ("precompute_ref_log_probs", "", "SAME true"),
];

pub(super) const KTO: &[Row] = &[
    ("adapter", "", "'WORLD/sft/adapter'"),
    ("beta", "", "0.5"),
    ("desirable_weight", "", "0.5"),
    ("undesirable_weight", "", "0.5"),
    ("precompute_ref_log_probs", "", "SAME true"),
];

pub(super) const DISTILL: &[Row] = &[
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

pub(super) const LORA: &[Row] = &[
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

pub(super) const BASE: &[Row] = &[
    ("path", "", "SAME 'WORLD/copy'"),
    ("quantize", "", "'q8_0'"),
    ("compute_dtype", "", "'bf16'"),
    ("device", "", "SAME 'cpu'"),
    ("offload", "", "SAME 1"),
    ("dequantise", "", "SAME 'ahead'"),
    // On the CPU there is no other; tests/gpu/kv_cache.rs has what the other changes.
    ("kv_cache_type", "", "SAME 'auto'"),
];

/// Of the stages with one learner.
pub(super) const OF_ALL: &[Row] = &[
    ("num_train_epochs", "", "2"),
    ("per_device_train_batch_size", "", "2"),
    ("gradient_accumulation_steps", "", "2"),
    ("logging_steps", "", "2"),
    ("eval_steps", "", "1"),
    // The held-out records of an evaluation are one pass or several; tests/memory.rs has what that changes.
    ("per_device_eval_batch_size", "eval_steps = 1", "SAME 1"),
    ("per_device_eval_batch_size", "eval_steps = 1", "SAME 3"),
];

/// Of every stage.
pub(super) const OPTIMIZER: &[Row] = &[
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

pub(super) const PPO: &[Row] = &[
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
pub(super) const EQUAL: &str = "advantage_estimator = 'grpo'\nnum_generations = 2\nreward_adapter = ''\nreward = [{ kind = 'length', max_tokens = 4 }]";

/// Of the group methods.
pub(super) const GROUPS: &[Row] = &[
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

pub(super) const GRPO: &[Row] = &[
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

pub(super) const RLOO: &[Row] = &[("normalize_advantages", "", "true"), ("reward_clip_range", "", "[-0.05, 0.05]")];

pub(super) const PTX: &[Row] = &[
    ("path", "path = 'WORLD/text.txt'", "'WORLD/other.txt'"),
    ("coef", "path = 'WORLD/text.txt'", "1.0"),
    ("block_size", "path = 'WORLD/text.txt'", "9"),
    ("separate_step", "path = 'WORLD/text.txt'", "true"),
];

pub(super) const DEAD: &str =
    "kind = 'command'\ncommand = ['/bin/sh', '-c', 'exit 1']\nfallback_score = 0.5\nretries = 0";
pub(super) const PAIR: &str = "kind = 'adapter'\nadapters = ['WORLD/reward/adapter', 'WORLD/reward/adapter_of_sft']";
pub(super) const MEAN_OF_PAIR: &str =
    "kind = 'adapter'\nadapters = ['WORLD/reward/adapter', 'WORLD/reward/adapter_of_sft']\naggregate = 'mean'";

pub(super) const SERVED: &str = "kind = 'http'\nurl = 'SERVER/1'\ninput = 'text'\nscore_index = 0\napi = 'score'";

pub(super) const JUDGE: &str =
    "kind = 'judge'\nurl = 'SERVER/3'\nmodel = 'a'\ntemplate = '{{ response }}'\nfallback_score = 0.5\nretries = 0";

pub(super) const PART: &[Row] = &[
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

const LLAMA_CPP: &str = "engine = 'llama.cpp'\nserver = LLAMA_SERVER";
pub(super) const SERVER: &str = "engine = 'vllm'\nurls = ['VLLM']";

/// Servers sample from the same weights, so that none of these keys moves a result.
pub(super) const ROLLOUT: &[Row] = &[
    ("engine", SERVER, "SAME 'openai'"),
    ("urls", SERVER, "SAME ['VLLM', 'VLLM/']"),
    ("server", LLAMA_CPP, "SAME LLAMA_OTHER"),
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
    ("async_rollouts", SERVER, "1"),
    ("retries", SERVER, "SAME 1"),
];
