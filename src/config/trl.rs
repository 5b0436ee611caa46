//! Keys of other trainers (TRL's configs of 1.16, LLaMA-Factory, OpenRLHF, verl, PEFT) that mean nothing here, each with the reason
//! or with what stands for it. A file that has one is refused with these words. It does not depend on a stage. Read `synonyms.rs`
//! for keys that are here by another name, `group.rs` for the sections of TRL's names.

/// Keys' names, and what is said of them.
type Reasons = &'static [(&'static [&'static str], &'static str)];

/// Where the revision of a base is named.
const REVISION: &str = "a model's revision is a part of its path: path = \"owner/name@revision\"";

/// Of any section.
const ANYWHERE: Reasons = &[
    (&["lora_dropout", "dropout"], "adapters have no dropout here; remove the key"),
    (&["disable_dropout"], "there is no dropout; remove the key"),
    (&["bf16", "fp16", "tf32", "dtype", "torch_dtype", "precision"], "products are computed in [base] compute_dtype"),
    (
        &[
            "load_in_4bit",
            "load_in_8bit",
            "bnb_4bit_quant_type",
            "quantization",
            "quantization_bit",
            "quantization_config",
            "quantization_method",
            "use_qlora",
        ],
        "[base] quantize = \"nf4\", \"q4_k\" or \"q8_0\" quantises the base as it is opened",
    ),
    (
        &["tokenizer", "tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"],
        "the tokenizer is the base's; remove the key",
    ),
    (&["model_init_kwargs"], "[base] path, quantize, compute_dtype and device describe the model"),
    (&["trust_remote_code"], "no code of a model's folder is run; remove the key"),
    (&["model_revision"], REVISION),
    (
        &["gpu", "gpus", "cuda", "device_map", "no_cuda", "use_cpu", "use_cuda"],
        "[base] device says where the base lies",
    ),
    (
        &[
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
            "use_gradient_checkpointing",
            "activation_checkpointing",
        ],
        "checkpoint in the stage's section says what is recomputed: auto, none, mlp, block or offload",
    ),
    (
        &[
            "use_liger_kernel",
            "enable_liger_kernel",
            "attn_implementation",
            "flash_attn",
            "flash_attention",
            "use_flash_attention",
            "use_unsloth",
        ],
        "attention and losses are computed by the program's own kernels; remove the key",
    ),
    (&["optim", "optim_args", "optimizer", "optimizer_type"], "the optimizer is AdamW; remove the key"),
    (
        &[
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "zero_stage",
            "ddp_timeout",
            "ddp_find_unused_parameters",
            "local_rank",
            "num_gpus",
        ],
        "several processes train together where `mpirun` starts them; remove the key",
    ),
    (&["stage", "task_type"], "the command says which stage is run, as in `fourfold sft FILE`; remove the key"),
    (
        &["finetuning_type", "use_peft", "use_lora", "peft_type"],
        "what is trained is an adapter, which [lora] shapes; remove the key",
    ),
    (&["do_train", "do_eval", "do_predict", "inference_mode"], "the command says what is done; remove the key"),
    (&["modules_to_save", "bias", "additional_target"], "nothing of the base itself is trained; remove the key"),
    (&["lora_bias"], "the branches have no biases, and the base's are not trained; remove the key"),
    (&["fan_in_fan_out"], "the base's files say which way round a matrix is stored; remove the key"),
    (
        &["target_parameters"],
        "branches are of linear layers and of the embedding, which [lora] target_modules names, not of single parameters; remove the key",
    ),
    (
        &["use_qalora", "qalora_group_size"],
        "QA-LoRA is not here: [base] quantize = \"nf4\" with an adapter over it is QLoRA; remove the key",
    ),
    (
        &["adam_offload", "optimizer_offload", "offload_optimizer"],
        "adapters and the optimizer's moments are always in the host's memory; remove the key",
    ),
    (
        &["warmup_ratio", "lr_warmup_ratio", "warmup_share", "lr_warmup_steps_ratio"],
        "warmup_steps in the stage's section is a number of optimizer steps, not a share of them",
    ),
    (
        &["lr_scheduler_kwargs", "lr_scheduler_args"],
        "the courses of lr_scheduler_type (linear, cosine, constant) have no parameters; remove the key",
    ),
    (&["betas", "adam_betas"], "they are adam_beta1 and adam_beta2"),
    (
        &["resume", "resume_from_checkpoint", "ignore_data_skip"],
        "`--resume` on the command line goes on from a checkpoint; remove the key",
    ),
    (&["overwrite", "overwrite_output_dir"], "`--overwrite` on the command line replaces a run; remove the key"),
    (&["overwrite_cache"], "tokens are read anew wherever records or settings have changed; remove the key"),
    (&["save_strategy"], "[checkpoint] save_steps says after how many optimizer steps a checkpoint is saved"),
    (
        &["save_only_model"],
        "a checkpoint has the optimizer's state, from which `--resume` goes on, and the result is the adapter alone; remove the key",
    ),
    (&["save_safetensors"], "adapters are always saved as safetensors; remove the key"),
    (
        &["load_best_model_at_end", "metric_for_best_model", "greater_is_better"],
        "the result is the adapter after the last step; remove the key",
    ),
    (
        &["plot_loss", "logging_dir", "run_name", "logging_strategy", "logging_first_step"],
        "a run is named by its folder, which has metrics.jsonl and report.html with the curves; remove the key",
    ),
    (
        &["disable_tqdm", "log_level"],
        "`--quiet` on the command line leaves errors and warnings alone on stderr; remove the key",
    ),
    (&["wandb", "use_wandb", "wandb_project"], "`wandb sync` reads the tb folder of a run (report_to); remove the key"),
    (&["push_to_hub", "hub_model_id", "hub_token", "hub_strategy"], "nothing is uploaded; remove the key"),
    (
        &[
            "packing",
            "neat_packing",
            "eval_packing",
            "packing_samples",
            "packing_strategy",
            "use_packing",
            "use_remove_padding",
            "padding_free",
            "pad_to_multiple_of",
            "padding_side",
            "group_by_length",
            "length_column_name",
        ],
        "sequences are packed and have no pads; remove the key",
    ),
    (
        &[
            "val_size",
            "val_set_size",
            "test_size",
            "eval_size",
            "eval_ratio",
            "eval_split",
            "eval_dataset",
            "eval_file",
            "validation_split",
            "validation_file",
        ],
        "[data] eval_fraction or eval_rows says how many records are held out to evaluate with",
    ),
    (
        &[
            "num_workers",
            "num_proc",
            "dataset_num_proc",
            "preprocessing_num_workers",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_drop_last",
            "remove_unused_columns",
        ],
        "records are read by their columns and by this process; remove the key",
    ),
    (
        &[
            "dataset_text_field",
            "text_field",
            "text_column",
            "prompt_column",
            "response_column",
            "prompt_key",
            "input_key",
            "output_key",
            "answer_key",
            "label_key",
            "chosen_key",
            "rejected_key",
        ],
        "[data.columns] says which columns of a record are read",
    ),
    (
        &["apply_chat_template", "chat_template_kwargs", "chat_template_path"],
        "[data] chat_template and template say how a dialogue is written",
    ),
    (&["shuffle", "shuffle_dataset", "data_seed"], "records are shuffled in every pass, by the seed; remove the key"),
    (
        &[
            "ref",
            "ref_model",
            "ref_model_path",
            "ref_model_name_or_path",
            "ref_model_init_kwargs",
            "ref_adapter",
            "ref_adapter_name",
            "model_adapter_name",
            "reference",
            "reference_model",
            "reference_adapter",
        ],
        "the reference is what training starts from: the section's adapter over [base], or without one the bare base; remove the key",
    ),
    (&["reference_free"], "every preference loss here compares with the reference; remove the key"),
    (
        &["remote_rm_url", "reward_url", "reward_model_url", "rm_url", "reward_api_url", "reward_server"],
        "a reward that a server computes is a table [[ppo.reward]], [[grpo.reward]] or [[rloo.reward]] with kind = \"http\" and url \
         (`fourfold keys ppo.reward`)",
    ),
    (
        &["reward_model_type"],
        "a reward model is an adapter, reward_adapter of the stage's section; the kind of a table [[ppo.reward]], [[grpo.reward]] or \
         [[rloo.reward]] names what else computes a reward (`fourfold keys ppo.reward`)",
    ),
    (
        &["train_on_prompt", "train_on_inputs", "train_on_input"],
        "[sft] completion_only_loss = false learns the prompts, too",
    ),
    (
        &["mask_history"],
        "SFT learns every response of a dialogue, or what [data] multi_turn says where the chat template renders earlier ones \
         differently; remove the key",
    ),
    (
        &[
            "critic_adapter",
            "critic_model",
            "critic_path",
            "critic_pretrain",
            "value_adapter",
            "value_model",
            "value_model_path",
        ],
        "no file is read for a critic: [ppo] critic = \"reward\", \"actor\" or \"own\" says what it starts as",
    ),
    (
        &["token_level_kl"],
        "the KL of a response is taken from its reward as one sum (TRL's token_level_kl = False); remove the key",
    ),
    (&["router_aux_loss_coef"], "mixtures of experts are not among the model families; remove the key"),
];

/// Of `[base]`, `[reward_base]` and `[teacher]`.
const OF_BASES: Reasons = &[(&["revision"], REVISION)];

/// Of the sections that learn records' own responses.
const OF_RECORDS: Reasons = &[(
    &["max_completion_length", "max_prompt_length", "max_target_length", "max_response_length"],
    "[data] max_length bounds prompt and response together, and truncation says what becomes of longer ones",
)];

/// Of the sections whose training is one of passes over the records.
const OF_PASSES: Reasons = &[
    (
        &["max_steps", "max_train_steps", "num_train_steps", "total_steps", "num_steps", "steps", "iterations"],
        "num_train_epochs says how long a run is",
    ),
    (&["eval_strategy", "evaluation_strategy", "do_eval"], "eval_steps says when the held-out records are evaluated"),
];

/// Of the sections with rollouts.
const OF_ROLLOUTS: Reasons = &[
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
         urls and timeout_seconds (`fourfold keys ppo.rollout`)",
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
        &[
            "reward_func",
            "reward_funcs",
            "reward_fn",
            "reward_function",
            "reward_functions",
            "reward_models",
            "reward_weights",
            "rewards",
        ],
        "each source of the reward is a table of its own with its kind and weight: [[ppo.reward]], [[grpo.reward]] or [[rloo.reward]] \
         (`fourfold keys ppo.reward`)",
    ),
    (
        &["eval_strategy", "evaluation_strategy", "eval_steps"],
        "eval_prompts and eval_every say how many held-out prompts are answered and when",
    ),
    (
        &[
            "log_completions",
            "num_completions_to_print",
            "log_unique_prompts",
            "log_completions_hub_repo",
            "num_sample_generations",
        ],
        "save_samples says how many responses go to samples.jsonl",
    ),
    (&["logging_steps", "log_interval"], "every iteration is logged to metrics.jsonl; remove the key"),
    (&["num_generations_eval"], "a held-out prompt is answered once; remove the key"),
    (
        &["per_device_eval_batch_size", "eval_batch_size"],
        "local_rollout_forward_batch_size says how many prompts are answered at once, held-out ones, too",
    ),
    (&["min_p", "repetition_penalty", "generation_kwargs", "do_sample"], "sampling has temperature, top_k and top_p"),
    (
        &["stop_token", "stop_token_id", "stop_sequences", "stop"],
        "a response ends at the end tokens that the base's files name; remove the key",
    ),
    (&["cast_lm_head_to_fp32"], "logits are in f32 whatever the products are computed in; remove the key"),
    (&["ds3_gather_for_generation"], "the base is whole in every process; remove the key"),
    (&["log_multimodal"], "records are texts; remove the key"),
    (&["max_tool_calling_iterations"], "responses call no tools; remove the key"),
];

/// Of `[ppo]` alone.
const OF_PPO: Reasons = &[
    (&["reward_clip_range"], "it is score_clip here: one number c for scores between -c and c"),
    (
        &["kl_penalty"],
        "kl_coef is the weight of the KL penalty, kl_estimator what estimates it, and kl_in whether it is taken from the reward or added \
         to the loss",
    ),
    (
        &[
            "max_steps",
            "max_train_steps",
            "num_train_steps",
            "num_train_epochs",
            "num_epochs",
            "total_epochs",
            "max_epochs",
            "n_epochs",
            "num_episodes",
            "total_steps",
            "num_iterations",
            "iterations",
            "steps",
        ],
        "total_episodes says how long a run is: in responses, batch_size of them per iteration; num_ppo_epochs is the passes over each \
         rollout",
    ),
    (
        &["gradient_accumulation_steps", "mini_batch_size", "ppo_mini_batch_size", "train_batch_size"],
        "a rollout has batch_size responses, an optimizer step batch_size / num_mini_batches of them, and a pass micro_batch_size",
    ),
    (&["eps"], "cliprange is the clip of the probability ratio, and adam_epsilon the optimizer's"),
];

/// Of TRL's GRPOConfig and RLOOConfig.
const OF_GROUPS: Reasons = &[
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
    (
        &["use_adaptive_entropy", "entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"],
        "entropy_coef is the weight of the entropy bonus for the whole run",
    ),
    (
        &["vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg", "off_policy_mask_threshold"],
        "that loss is not here; loss_type has dapo, bnpo, grpo, dr_grpo, cispo and sapo",
    ),
    (
        &["adv_estimator", "advantage_estimator", "advantage_type"],
        "the section itself names the estimator, and [ppo] advantage_estimator has others",
    ),
    (&["kl_coef", "kl_penalty"], "it is beta here, as in TRL"),
    (&["response_length", "max_new_tokens"], "it is max_completion_length here, as in TRL"),
    (
        &["batch_size", "rollout_batch_size", "mini_batch_size"],
        "a rollout has per_device_train_batch_size times steps_per_generation responses",
    ),
    (
        &["total_episodes", "num_episodes", "total_steps", "steps", "iterations"],
        "num_train_epochs or max_steps says how long a run is",
    ),
    (
        &[
            "critic",
            "critic_adapter",
            "critic_model",
            "critic_learning_rate",
            "critic_lr",
            "critic_warmup",
            "freezing_actor_steps",
            "cliprange_value",
            "vf_coef",
            "lam",
            "gamma",
            "value_model",
        ],
        "a group method has no critic",
    ),
];

/// Of TRL's GKDConfig.
const OF_DISTILLATION: Reasons =
    &[(&["teacher_model_init_kwargs"], "[teacher] path, quantize, compute_dtype and device describe the teacher")];

/// Values of `[dpo] loss_type` that other trainers have, and what is said of them.
const DPO_LOSSES: Reasons = &[
    (&["simpo", "orpo", "cpo"], "that loss has no reference, and every loss here compares with one"),
    (&["kto_pair", "kto"], "KTO is a stage of its own, `fourfold kto`, on responses with a label each"),
    (
        &[
            "aot",
            "aot_pair",
            "aot_unpaired",
            "apo_down",
            "apo_zero",
            "bco_pair",
            "discopo",
            "exo_pair",
            "nca_pair",
            "sft",
            "sigmoid_norm",
            "sppo_hard",
        ],
        "that loss is not here",
    ),
];

/// Why a value of a key is none here; `None` for one that is not known.
pub(super) fn reason_of_value(section: &str, key: &str, value: &str) -> Option<&'static str> {
    let found = DPO_LOSSES.iter().filter(|_| (section, key) == ("dpo", "loss_type"));
    found.into_iter().find(|(values, _)| values.contains(&value)).map(|(_, reason)| *reason)
}

/// Why a key is in no section, or what stands for it, in the words for `section`; `None` for a key that is not known.
pub(super) fn reason(section: &str, key: &str) -> Option<&'static str> {
    let tables: &[Reasons] = match section {
        "ppo" => &[OF_PPO, OF_ROLLOUTS],
        "grpo" | "rloo" => &[OF_GROUPS, OF_ROLLOUTS],
        "distill" => &[OF_DISTILLATION, OF_PASSES],
        "sft" | "reward" | "dpo" | "kto" => &[OF_RECORDS, OF_PASSES],
        "base" | "reward_base" | "teacher" => &[OF_BASES],
        _ => &[],
    };
    let found = tables.iter().copied().flatten().find(|(keys, _)| keys.contains(&key));
    found.map(|(_, reason)| *reason)
}

/// The same for a key that has the same reason in any section, of those that have it not.
pub(super) fn anywhere(key: &str) -> Option<&'static str> {
    ANYWHERE.iter().find(|(keys, _)| keys.contains(&key)).map(|(_, reason)| *reason)
}

/// Every key that is in a table here.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    let all = [ANYWHERE, OF_BASES, OF_RECORDS, OF_PASSES, OF_ROLLOUTS, OF_PPO, OF_GROUPS, OF_DISTILLATION]
        .into_iter()
        .flatten();
    all.flat_map(|(keys, _)| keys.iter().copied())
}
