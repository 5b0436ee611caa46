//! What other trainers (TRL, LLaMA-Factory, OpenRLHF, verl, trlX, DeepSpeed-Chat, PEFT) call the keys that are here by another
//! name. It does not depend on what the keys do. Read `describe.rs` for the messages, `trl.rs` for keys that mean nothing here.

use super::describe::{has, owners};

/// Their names, and our keys: `section.key`, `.key` outside the sections, or `key` in whatever section of a stage it is asked for.
const NAMES: &[(&[&str], &[&str])] = &[
    // The base and the adapters over it.
    (
        &[
            "model_name_or_path",
            "model",
            "model_path",
            "model_name",
            "model_id",
            "base",
            "base_model",
            "base_model_name_or_path",
            "pretrain",
            "pretrained_model_name_or_path",
            "actor_model_name_or_path",
            "student_model",
            "student_model_name_or_path",
        ],
        &["base.path"],
    ),
    (&["critic_model_name_or_path", "reward_model_base"], &["reward_base.path"]),
    (&["teacher", "teacher_model", "teacher_name_or_path", "teacher_path"], &["teacher.path"]),
    (
        &[
            "actor",
            "actor_adapter",
            "actor_model",
            "actor_path",
            "adapter_name_or_path",
            "adapter_path",
            "initial_adapter",
            "lora_path",
            "peft_model",
            "peft_model_id",
            "policy",
            "policy_adapter",
            "policy_model",
            "sft_adapter",
            "sft_model",
            "sft_model_path",
            "student",
            "student_adapter",
        ],
        &["adapter"],
    ),
    (
        &[
            "reward_model",
            "reward_model_path",
            "reward_model_id",
            "reward_model_name_or_path",
            "reward_model_adapter",
            "reward_adapters",
            "reward_pretrain",
            "rm",
            "rm_adapter",
            "rm_path",
        ],
        &["ppo.reward_adapter", "grpo.reward_adapter", "rloo.reward_adapter"],
    ),
    // [lora].
    (&["lora_r", "lora_rank", "lora_dim", "actor_lora_dim", "rank"], &["lora.r"]),
    (&["alpha"], &["lora.lora_alpha"]),
    (
        &[
            "target",
            "lora_target",
            "lora_targets",
            "lora_target_modules",
            "lora_modules",
            "lora_target_linear",
            "modules",
            "targets",
        ],
        &["lora.target_modules"],
    ),
    (&["dora"], &["lora.use_dora"]),
    (&["rslora"], &["lora.use_rslora"]),
    (&["init_weights", "pissa_init"], &["lora.init_lora_weights"]),
    // [data].
    (
        &[
            "data_path",
            "data",
            "data_files",
            "data_file",
            "file",
            "files",
            "dataset",
            "dataset_name",
            "dataset_path",
            "dataset_dir",
            "datasets",
            "prompt_data",
            "train_data",
            "train_dataset",
            "train_file",
            "train_files",
            "train_path",
        ],
        &["data.path", "base.path"],
    ),
    (&["formatting", "dataset_format"], &["data.format"]),
    (&["dataset_split", "train_split"], &["data.split"]),
    (&["interleave_probs", "dataset_probs"], &["data.sources.weight"]),
    (&["max_samples", "max_train_samples", "max_examples"], &["data.max_rows"]),
    (
        &[
            "cutoff_len",
            "max_seq_len",
            "max_seq_length",
            "max_sequence_length",
            "max_len",
            "model_max_length",
            "seq_len",
            "seq_length",
            "sequence_len",
            "context_length",
        ],
        &["data.max_length"],
    ),
    (&["max_prompt_seq_len", "max_prompt_len", "prompt_max_len", "prompt_length"], &["data.max_prompt_length"]),
    // Steps, batches and the optimizer.
    (&["lr"], &["learning_rate"]),
    (&["actor_learning_rate", "actor_lr", "policy_lr", "lr_actor"], &["learning_rate"]),
    (&["critic_lr", "lr_critic", "value_lr"], &["ppo.critic_learning_rate"]),
    (&["num_warmup_steps", "lr_warmup_steps"], &["warmup_steps"]),
    (&["scheduler", "lr_scheduler", "lr_schedule", "lr_decay_style"], &["lr_scheduler_type"]),
    (&["wd"], &["weight_decay"]),
    (&["adam_eps"], &["adam_epsilon"]),
    (
        &["grad_clip", "gradient_clipping", "clip_grad", "clip_grad_norm", "max_norm", "grad_norm_clip"],
        &["max_grad_norm"],
    ),
    (
        &["bs", "batch", "batchsize", "batch_size", "train_batch_size"],
        &["ppo.batch_size", "per_device_train_batch_size"],
    ),
    (
        &[
            "micro_train_batch_size",
            "ppo_micro_batch_size",
            "ppo_micro_batch_size_per_gpu",
            "micro_bs",
            "micro_batch_size",
        ],
        &["ppo.micro_batch_size", "per_device_train_batch_size"],
    ),
    (&["per_device_train_batch_size"], &["ppo.micro_batch_size"]),
    (&["eval_batch_size", "eval_micro_batch_size"], &["per_device_eval_batch_size"]),
    (
        &["grad_accum", "grad_acc_steps", "gradient_accumulation", "accumulation_steps", "accumulate_grad_batches"],
        &["gradient_accumulation_steps"],
    ),
    (&["epochs"], &["ppo.num_ppo_epochs", "num_train_epochs"]),
    (&["epoch", "n_epochs", "total_epochs", "max_epochs", "num_epochs"], &["num_train_epochs"]),
    (&["ppo_epochs"], &["ppo.num_ppo_epochs", "grpo.num_iterations", "rloo.num_iterations"]),
    // Rollouts.
    (&["rollout_batch_size", "num_rollouts", "chunk_size"], &["ppo.batch_size"]),
    (
        &["micro_rollout_batch_size", "rollout_micro_batch_size"],
        &[
            "ppo.local_rollout_forward_batch_size",
            "grpo.local_rollout_forward_batch_size",
            "rloo.local_rollout_forward_batch_size",
        ],
    ),
    (
        &["group_size", "n_samples_per_prompt", "num_return_sequences", "rloo_k"],
        &["ppo.num_generations", "grpo.num_generations", "rloo.num_generations"],
    ),
    (
        &[
            "max_new_tokens",
            "max_answer_seq_len",
            "max_answer_len",
            "max_response_length",
            "max_completion_length",
            "max_tokens",
            "max_gen_len",
            "generate_max_len",
            "completion_length",
            "response_len",
        ],
        &["ppo.response_length", "grpo.max_completion_length", "rloo.max_completion_length", "distill.max_new_tokens"],
    ),
    // The objective.
    (
        &["kl", "kl_coef", "kl_ctl", "kl_loss_coef", "kl_weight", "init_kl_coef", "beta"],
        &["ppo.kl_coef", "grpo.beta", "rloo.beta"],
    ),
    (&["kl_target"], &["ppo.target"]),
    (&["kl_horizon"], &["ppo.horizon"]),
    (&["adaptive_kl", "use_adaptive_kl"], &["ppo.adap_kl_ctrl"]),
    (&["kl_type", "kl_loss_type", "kl_estimator_type"], &["ppo.kl_estimator"]),
    (&["use_kl_loss"], &["ppo.kl_in"]),
    (
        &["clip", "clip_eps", "clip_param", "clip_range", "clip_ratio", "cliprange", "eps_clip", "epsilon"],
        &["ppo.cliprange", "grpo.epsilon", "rloo.epsilon"],
    ),
    (
        &["clip_ratio_high", "clip_eps_high", "eps_clip_high", "cliprange_high", "epsilon_high"],
        &["ppo.cliprange_high", "grpo.epsilon_high", "rloo.epsilon_high"],
    ),
    (&["value_clip", "value_clip_range", "vf_clip", "clip_range_value"], &["ppo.cliprange_value"]),
    (&["adv_estimator", "advantage_type"], &["ppo.advantage_estimator"]),
    (&["freezing_actor_steps"], &["ppo.critic_warmup"]),
    (&["vf_coeff", "value_coef", "value_loss_coef", "critic_coef"], &["ppo.vf_coef"]),
    (&["entropy_coeff", "ent_coef", "entropy_weight", "entropy_bonus"], &["ppo.entropy_coef", "grpo.entropy_coef"]),
    (&["lambda", "lambd", "gae_lambda"], &["ppo.lam"]),
    (&["discount", "discount_factor"], &["ppo.gamma"]),
    (&["scale_reward", "normalize_reward", "reward_normalization"], &["ppo.use_score_scaling", "grpo.scale_rewards"]),
    (&["clip_reward_value", "cliprange_reward", "reward_clip"], &["ppo.score_clip", "rloo.reward_clip_range"]),
    (&["eos_penalty", "eos_token_penalty", "non_eos_penalty"], &["ppo.missing_eos_penalty"]),
    (&["ptx_coef", "unsupervised_coef"], &["ppo.ptx.coef"]),
    (&["center_rewards_coefficient"], &["reward.center"]),
    (&["dpo_beta", "kto_beta", "pref_beta"], &["dpo.beta", "kto.beta"]),
    (&["pref_loss"], &["dpo.loss_type"]),
    (&["assistant_only_loss"], &["sft.completion_only_loss"]),
    // What stands at the top, and checkpoints.
    (&["random_seed", "manual_seed"], &[".seed"]),
    (&["out", "out_dir", "output", "output_path", "save_dir", "save_path"], &[".output_dir"]),
    (&["log_with", "logger", "use_tensorboard"], &[".report_to"]),
    (&["save_every", "save_freq", "save_interval", "checkpoint_interval"], &["checkpoint.save_steps"]),
    (&["max_checkpoints", "keep_checkpoints", "max_ckpt_num"], &["checkpoint.save_total_limit"]),
];

/// The same for tables inside sections and for small sections: the tables, their names, and the table's own key.
const INSIDE: &[(&[&str], &[&str], &str)] = &[
    (
        &["rollout"],
        &["address", "base_url", "endpoint", "host", "port", "server_url", "vllm_server_base_url", "vllm_server_host"],
        "urls",
    ),
    (&["rollout"], &["backend", "kind", "sampler", "type", "vllm"], "engine"),
    (&["rollout"], &["vllm_server_timeout", "request_timeout"], "timeout_seconds"),
    (&["reward", "gold"], &["type"], "kind"),
    (&["reward", "gold"], &["address", "base_url", "endpoint", "server"], "url"),
    (&["reward", "gold"], &["prompt", "prompt_template"], "template"),
    (&["reward", "gold"], &["regex", "regexp"], "pattern"),
    (&["reward", "gold"], &["coef", "scale"], "weight"),
    (
        &["reward", "gold"],
        &["adapter", "path", "reward_adapter", "reward_adapters", "reward_model", "reward_model_path", "rm"],
        "adapters",
    ),
    (&["reward", "gold"], &["func", "function", "program", "script"], "command"),
    (&["columns"], &["input", "instruction", "question", "user"], "prompt"),
    (&["columns"], &["answer", "assistant", "output", "target"], "completion"),
    (&["columns"], &["content", "conversation", "conversations", "dialogue"], "messages"),
    (&["checkpoint"], &["every", "interval"], "save_steps"),
    (&["checkpoint"], &["keep", "max_to_keep"], "save_total_limit"),
    (&["memory"], &["cpu", "max", "max_memory", "ram"], "limit"),
    (&["memory"], &["cuda", "gpu", "vram"], "device_limit"),
];

/// What other trainers call the values of keys, and ours.
const VALUES: &[(&[&str], &str)] = &[
    (&["bfloat16", "bf16_true"], "bf16"),
    (&["float16", "fp16", "half"], "f16"),
    (&["float32", "fp32", "float"], "f32"),
    (&["reinforce++"], "reinforce_plus_plus"),
    (&["reinforce++_baseline", "reinforce_baseline"], "reinforce_plus_plus_baseline"),
    (&["group_norm"], "grpo"),
    (&["constant_with_warmup"], "constant"),
];

/// What another trainer's value is here, if it is one of `expected`.
pub(super) fn value<'n>(theirs: &str, expected: &[&'n str]) -> Option<&'n str> {
    let (_, ours) = VALUES.iter().find(|(names, _)| names.contains(&theirs))?;
    expected.iter().copied().find(|value| value == ours)
}

/// The sections of which one file has one; all others are read by every stage.
pub(super) const STAGES: [&str; 8] = ["sft", "reward", "dpo", "kto", "distill", "ppo", "grpo", "rloo"];

/// Our keys for a name of another trainer, each as (section, key): the section is `None` for a key of any stage.
fn meant(name: &str) -> impl Iterator<Item = (Option<&'static str>, &'static str)> {
    let found = NAMES.iter().find(|(names, _)| names.contains(&name)).map_or(&[][..], |(_, keys)| keys);
    found.iter().map(|path| match path.rsplit_once('.') {
        Some((section, key)) => (Some(section), key),
        None => (None, *path),
    })
}

/// What another trainer's key is for `section`, as (section, key), the section empty for one outside the sections; `None` if it is
/// none that this section or those that every stage reads have.
pub(super) fn in_section(name: &str, section: &str) -> Option<(String, &'static str)> {
    let own = meant(name).find(|(of, key)| of.map_or_else(|| has(section, key), |of| root(of) == section));
    let shared = || meant(name).find(|(of, _)| of.is_some_and(|of| !STAGES.contains(&root(of))));
    let (of, key) = own.or_else(shared)?;
    Some((of.unwrap_or(section).to_owned(), key))
}

/// A sentence on what another trainer's key is in a table, such as `rollout` of `[ppo.rollout]`.
pub(super) fn inside(name: &str, table: &str) -> Option<String> {
    let (.., key) = INSIDE.iter().find(|(tables, names, _)| tables.contains(&table) && names.contains(&name))?;
    Some(format!("it is {key} here"))
}

/// `ppo` of `ppo.ptx`.
fn root(section: &str) -> &str {
    section.split('.').next().unwrap_or(section)
}

/// A sentence on what another trainer's key is here, for `section`, which has it by another name or not at all.
pub(super) fn known_as(name: &str, section: &str) -> Option<String> {
    match in_section(name, section) {
        Some((of, key)) if of.is_empty() => Some(format!("it is {key} here, at the top of the file (--set {key}=…)")),
        Some((of, key)) if of == "data.sources" => Some(format!("it is [[{of}]] {key} here")),
        Some((of, key)) => Some(format!("it is [{of}] {key} here")),
        None => {
            let all: Vec<_> =
                meant(name).map(|(of, key)| (of.map_or_else(|| owners(key), |of| vec![of]), key)).collect();
            let also = owners(name);
            let also = (!also.is_empty()).then_some((also, name));
            // What has the key by this very name comes first.
            let mut found: Vec<(Vec<&str>, &str)> = also.into_iter().collect();
            for (of, key) in all {
                let of: Vec<&str> =
                    of.into_iter().filter(|of| !found.iter().any(|(known, _)| known.contains(of))).collect();
                match found.iter_mut().find(|(_, known)| *known == key) {
                    Some((known, _)) => known.extend(of),
                    None if !of.is_empty() => found.push((of, key)),
                    None => {}
                }
            }
            let named = |(of, key): &(Vec<&str>, &str)| {
                let of: Vec<String> = of.iter().map(|of| format!("[{of}]")).collect();
                format!("{} {key}", of.join(", "))
            };
            let said: Vec<String> = found.iter().map(named).collect();
            meant(name).next().map(|_| match section {
                "" => format!("it is {} here", said.join("; ")),
                _ => format!("it belongs into another section: {}", said.join("; ")),
            })
        }
    }
}

/// Every name that is in a table here.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    let inside = INSIDE.iter().flat_map(|(_, names, _)| names.iter());
    NAMES.iter().flat_map(|(names, _)| names.iter()).chain(inside).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::located::keys_of;
    use crate::config::{ColumnNames, known_keys};

    #[test]
    fn every_name_inside_a_table_is_for_a_key_that_it_has_and_is_none_of_its_keys() {
        let all: Vec<_> = known_keys().into_iter().chain([("data.columns", keys_of::<ColumnNames>())]).collect();
        for (tables, names, key) in INSIDE {
            let of = all.iter().filter(|(of, _)| of.rsplit('.').next().is_some_and(|table| tables.contains(&table)));
            // [reward] is a section, too.
            let of: Vec<_> = of.filter(|(of, _)| *of != "reward").collect();
            assert!(!of.is_empty() && of.iter().all(|(_, keys)| keys.contains(key)), "{tables:?} {key}");
            assert!(names.iter().all(|name| of.iter().all(|(_, keys)| !keys.contains(name))), "{tables:?} {names:?}");
        }
    }

    #[test]
    fn every_name_stands_once_and_for_keys_that_there_are() {
        let mut all: Vec<&str> = NAMES.iter().flat_map(|(names, _)| names.iter().copied()).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        for (names, keys) in NAMES {
            for path in *keys {
                let found = match path.rsplit_once('.') {
                    Some(("", key)) => ["seed", "output_dir", "report_to"].contains(&key),
                    Some(("data.sources", key)) => key == "weight",
                    Some((section, key)) => known_keys().iter().any(|(of, keys)| *of == section && keys.contains(&key)),
                    None => STAGES.iter().any(|stage| has(stage, path)),
                };
                assert!(found, "{names:?}: {path}");
            }
        }
    }
}
