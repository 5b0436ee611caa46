//! Keys of TRL's GRPOConfig, RLOOConfig and GKDConfig (1.16) that mean nothing here, each with the reason or with what stands for
//! it. A file that has one is refused with these words. It does not depend on a stage. Read `group.rs` for the keys that are there.

/// The keys' names, and what is said of them.
const REASONS: &[(&[&str], &str)] = &[
    (
        &[
            "use_vllm",
            "vllm_mode",
            "vllm_server_base_url",
            "vllm_server_host",
            "vllm_server_port",
            "vllm_server_timeout",
        ],
        "responses are sampled by this program, or by a vLLM server whose address is in the section's table rollout: engine = \"vllm\", \
         urls and timeout_seconds (`fourfold keys grpo.rollout`)",
    ),
    (
        &[
            "vllm_model_impl",
            "vllm_enable_sleep_mode",
            "vllm_structured_outputs_regex",
            "vllm_group_port",
            "vllm_gpu_memory_utilization",
            "vllm_max_model_length",
            "vllm_tensor_parallel_size",
            "use_transformers_paged",
            "use_transformers_continuous_batching",
            "transformers_continuous_batching_config",
            "cache_implementation",
        ],
        "responses are sampled by this program itself, or by a server that is started with its own options; remove the key",
    ),
    (
        &["reward_funcs", "reward_weights"],
        "each source of the reward is a table of its own with its weight: [[grpo.reward]] or [[rloo.reward]] (`fourfold keys \
         grpo.reward`)",
    ),
    (&["gradient_checkpointing"], "checkpoint says what is recomputed: auto, none, mlp or block"),
    (&["bf16", "fp16", "tf32"], "products are computed in [base] compute_dtype"),
    (&["optim", "use_liger_kernel"], "the optimizer is AdamW with the program's own kernels; remove the key"),
    (
        &["eval_strategy", "eval_steps"],
        "eval_prompts and eval_every say how many held-out prompts are answered and when",
    ),
    (&["save_steps", "save_strategy", "save_total_limit"], "it is in the section [checkpoint]"),
    (
        &["log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"],
        "save_samples says how many responses go to samples.jsonl",
    ),
    (&["logging_steps"], "every iteration is logged to metrics.jsonl; remove the key"),
    (&["num_generations_eval", "per_device_eval_batch_size"], "a held-out prompt is answered once; remove the key"),
    (&["min_p", "repetition_penalty", "generation_kwargs"], "sampling has temperature, top_k and top_p"),
    (
        &[
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
            "vllm_importance_sampling_cap",
        ],
        "the keys are importance_sampling_correction, _clip_max and _clip_min, without vllm",
    ),
    (&["router_aux_loss_coef"], "mixtures of experts are not among the model families; remove the key"),
    (&["cast_lm_head_to_fp32"], "logits are in f32 whatever the products are computed in; remove the key"),
    (&["ds3_gather_for_generation"], "one process trains; remove the key"),
    (&["pad_to_multiple_of"], "sequences are packed and have no pads; remove the key"),
    (&["log_multimodal"], "records are texts; remove the key"),
    (&["disable_dropout"], "there is no dropout; remove the key"),
    (&["shuffle_dataset"], "prompts are shuffled in every pass, by the seed; remove the key"),
    (&["dataloader_drop_last", "remove_unused_columns"], "records are read by their columns; remove the key"),
    (&["max_prompt_length"], "it is [data] max_prompt_length here"),
    (&["model_init_kwargs", "trust_remote_code"], "the model is described in [base]"),
    (&["chat_template_kwargs"], "[data] chat_template and template say how a dialogue is written"),
    (
        &["use_adaptive_entropy", "entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"],
        "entropy_coef is the weight of the entropy bonus for the whole run",
    ),
    (&["max_tool_calling_iterations"], "responses call no tools; remove the key"),
    (
        &["vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg", "off_policy_mask_threshold"],
        "that loss is not here; loss_type has dapo, bnpo, grpo, dr_grpo, cispo and sapo",
    ),
    (&["kl_coef"], "it is beta here, as in TRL"),
    (&["response_length", "max_new_tokens"], "it is max_completion_length here, as in TRL"),
    (&["batch_size"], "a rollout has per_device_train_batch_size times steps_per_generation responses"),
    (&["total_episodes"], "num_train_epochs or max_steps says how long a run is"),
    (&["critic_learning_rate", "cliprange_value", "vf_coef", "lam", "gamma"], "a group method has no critic"),
];

/// The same of GKDConfig.
const OF_DISTILLATION: &[(&[&str], &str)] = &[
    (&["teacher_model_init_kwargs"], "the teacher is described in [teacher]"),
    (&["disable_dropout"], "there is no dropout; remove the key"),
    (&["max_length"], "it is [data] max_length here"),
    (&["gradient_checkpointing"], "checkpoint says what is recomputed: auto, none, mlp or block"),
    (&["max_steps"], "num_train_epochs says how long a run is"),
];

/// Keys that other trainers have in any section.
const NOWHERE: &[(&[&str], &str)] = &[
    (&["lora_dropout"], "adapters have no dropout here; remove the key"),
    (&["rloo_k"], "it is num_generations here, as in TRL's RLOOConfig today"),
    (
        &["token_level_kl"],
        "the KL of a response is taken from its reward as one sum (TRL's token_level_kl = False); remove the key",
    ),
];

/// Why a key is in no section, or what stands for it; `None` for a key that is not known.
pub(super) fn nowhere(key: &str) -> Option<&'static str> {
    NOWHERE.iter().find(|(keys, _)| keys.contains(&key)).map(|(_, reason)| *reason)
}

/// Why a key is none of `[grpo]`, `[rloo]` and `[distill]`; `None` in another section, or for a key that TRL does not have
/// either.
pub(super) fn reason(section: &str, key: &str) -> Option<&'static str> {
    let reasons = match section {
        "grpo" | "rloo" => REASONS,
        "distill" => OF_DISTILLATION,
        _ => &[],
    };
    reasons.iter().find(|(keys, _)| keys.contains(&key)).map(|(_, reason)| *reason)
}
