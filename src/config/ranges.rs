//! The range and the unit of every key that is a number: one table, by which `validate.rs` checks a config and `keys.rs`
//! prints it. A numeric key without a row fails a test of `keys.rs`. It does not depend on the sections' structs.

use anyhow::Result;
use toml::{Table, Value};

use crate::invalid;

/// The values that a key may have.
pub(super) struct Range {
    /// The range in words, which follow "use".
    pub text: &'static str,
    /// What is wrong with another value, in words that follow `key = value`.
    fault: &'static str,
    inside: fn(f64) -> bool,
}

/// A row: sections, key, unit ("" for a pure number), range.
type Row = (&'static [&'static str], &'static str, &'static str, Range);

const fn range(text: &'static str, inside: fn(f64) -> bool) -> Range {
    Range { text, fault: "is out of range", inside }
}

/// Whole numbers, whose type is their range.
const WHOLE: Range = range("0 or more", |_| true);
const ONE: Range = Range { text: "1 or more", fault: "does nothing", inside: |v| v >= 1.0 };
const COMPARED: Range =
    Range { text: "2 or more", fault: "leaves nothing to compare a response with", inside: |v| v >= 2.0 };
const NOT_NEGATIVE: Range = range("0 or a number above it", |v| v >= 0.0);
const ANY: Range = range("a number", |_| true);
const BETA: Range = range("a number from 0 to below 1, usually 0.9 to 0.999", |v| (0.0..1.0).contains(&v));
const DISCOUNT: Range = range("a number from 0 to 1, usually 0.95 or 1", |v| (0.0..=1.0).contains(&v));
const ABOVE_ONE: Range = range("a number above 1, usually 3 to 10", |v| v > 1.0);
const SHARE: Range = range("a number from 0 to 1", |v| (0.0..=1.0).contains(&v));
const SECONDS: Range = range("a number above 0, up to a day", |v| v > 0.0 && v <= 86_400.0);

macro_rules! positive {
    ($usual:literal) => {
        range(concat!("a number above 0, usually ", $usual), |v| v > 0.0)
    };
}

const TOP: &[&str] = &[""];
const LORA: &[&str] = &["lora"];
const DATA: &[&str] = &["data"];
const SOURCES: &[&str] = &["data.sources"];
const GUARD: &[&str] = &["guard"];
const STAGES: &[&str] = &["sft", "reward", "dpo", "kto", "distill", "ppo", "grpo", "rloo"];
const SUPERVISED: &[&str] = &["sft", "reward", "dpo", "kto", "distill"];
const DISTILL: &[&str] = &["distill"];
const PPO: &[&str] = &["ppo"];
const GRPO: &[&str] = &["grpo"];
const GROUPS: &[&str] = &["grpo", "rloo"];
const ROLLOUTS: &[&str] = &["ppo", "grpo", "rloo"];
const PTX: &[&str] = &["ppo.ptx"];
const SAMPLERS: &[&str] = &["ppo.rollout", "grpo.rollout", "rloo.rollout"];
const PARTS: &[&str] = &["ppo.reward", "ppo.gold", "grpo.reward", "grpo.gold", "rloo.reward", "rloo.gold"];

const ROWS: &[Row] = &[
    (TOP, "seed", "", WHOLE),
    (LORA, "r", "", ONE),
    (LORA, "lora_alpha", "", positive!("r or 2 r")),
    (LORA, "loraplus_lr_ratio", "", positive!("1 to 16")),
    (&["checkpoint"], "save_steps", "optimizer steps", WHOLE),
    (&["checkpoint"], "save_total_limit", "checkpoints", ONE),
    (GUARD, "max_skips", "steps", WHOLE),
    (GUARD, "max_rollbacks", "rollbacks", WHOLE),
    (GUARD, "lr_backoff", "", range("a number above 0, up to 1, usually 0.5", |v| v > 0.0 && v <= 1.0)),
    (GUARD, "snapshot_steps", "optimizer steps", ONE),
    (GUARD, "max_kl", "nats per response", positive!("5 to 10 times the KL that you expect")),
    (GUARD, "max_length_ratio", "", range("1 or more", |v| v >= 1.0)),
    (
        DATA,
        "max_length",
        "tokens",
        Range {
            text: "2 or more, usually 512",
            fault: "leaves no room for a prompt token and a response token",
            inside: |v| v >= 2.0,
        },
    ),
    (DATA, "max_prompt_length", "tokens", ONE),
    (DATA, "eval_fraction", "", range("a share from 0 to below 1, usually 0.05", |v| (0.0..1.0).contains(&v))),
    (DATA, "eval_rows", "sequences", WHOLE),
    (DATA, "max_rows", "records", READS),
    (SOURCES, "weight", "", range("a number above 0", |v| v > 0.0)),
    (SOURCES, "max_rows", "records", READS),
    (STAGES, "learning_rate", "", range("a number above 0 and below 1, usually 1e-6 to 1e-3", |v| v > 0.0 && v < 1.0)),
    (STAGES, "warmup_steps", "optimizer steps", WHOLE),
    (STAGES, "weight_decay", "", NOT_NEGATIVE),
    (STAGES, "adam_beta1", "", BETA),
    (STAGES, "adam_beta2", "", BETA),
    (STAGES, "adam_epsilon", "", positive!("1e-8")),
    (STAGES, "max_grad_norm", "", NOT_NEGATIVE),
    (SUPERVISED, "num_train_epochs", "passes", ONE),
    (SUPERVISED, "per_device_train_batch_size", "examples", ONE),
    (&["sft", "reward"], "max_tokens_per_batch", "tokens", ONE),
    (SUPERVISED, "gradient_accumulation_steps", "passes", ONE),
    (SUPERVISED, "logging_steps", "optimizer steps", ONE),
    (SUPERVISED, "eval_steps", "optimizer steps", WHOLE),
    (SUPERVISED, "per_device_eval_batch_size", "examples", ONE),
    (
        &["reward"],
        "ensemble",
        "reward models",
        Range {
            text: "1 to 16, usually 3 to 5",
            fault: "is out of range",
            inside: |v| (1.0..=crate::config::MOST_MEMBERS as f64).contains(&v),
        },
    ),
    (&["reward"], "num_padding_at_beginning", "tokens", WHOLE),
    (&["dpo", "kto"], "beta", "", positive!("0.01 to 0.5")),
    (
        &["dpo"],
        "label_smoothing",
        "",
        range("a share from 0 to below 0.5, usually 0 to 0.2", |v| (0.0..0.5).contains(&v)),
    ),
    (DISTILL, "temperature", "", positive!("0.9 or 1")),
    (DISTILL, "lmbda", "", SHARE),
    (DISTILL, "beta", "", SHARE),
    (DISTILL, "max_new_tokens", "tokens", ONE),
    (&["kto"], "desirable_weight", "", NOT_NEGATIVE),
    (&["kto"], "undesirable_weight", "", NOT_NEGATIVE),
    (PPO, "critic_learning_rate", "", positive!("1e-6 to 1e-3")),
    (PPO, "critic_warmup", "iterations", WHOLE),
    (PPO, "total_episodes", "responses", ONE),
    (PPO, "batch_size", "responses", ONE),
    (PPO, "num_generations", "responses per prompt", ONE),
    (GROUPS, "num_generations", "responses per prompt", COMPARED),
    (PPO, "num_mini_batches", "optimizer steps", ONE),
    (PPO, "num_ppo_epochs", "passes", ONE),
    (PPO, "micro_batch_size", "sequences", ONE),
    (ROLLOUTS, "local_rollout_forward_batch_size", "prompts", ONE),
    (PPO, "response_length", "tokens", ONE),
    (ROLLOUTS, "temperature", "", NOT_NEGATIVE),
    (ROLLOUTS, "top_k", "tokens", WHOLE),
    (ROLLOUTS, "top_p", "", range("a number above 0 and at most 1; 1 samples from all", |v| v > 0.0 && v <= 1.0)),
    (PPO, "kl_coef", "reward per nat", NOT_NEGATIVE),
    (PPO, "target", "nats per response", positive!("6 nats a response")),
    (PPO, "horizon", "responses", positive!("10000 responses")),
    (PPO, "cliprange", "", range("a number between 0 and 1, usually 0.2", |v| v > 0.0 && v < 1.0)),
    (PPO, "cliprange_high", "", positive!("0.2 to 0.3")),
    (PPO, "dual_clip", "", ABOVE_ONE),
    (&["ppo", "grpo"], "sapo_temperature_pos", "", positive!("1")),
    (&["ppo", "grpo"], "sapo_temperature_neg", "", positive!("1.05")),
    (PPO, "ratio_threshold", "", ABOVE_ONE),
    (PPO, "log_ratio_clamp", "nats", positive!("20")),
    (PPO, "kl_penalty_coef", "", positive!("1")),
    (PPO, "kl_penalty_target", "nats per token", positive!("0.01")),
    (PPO, "target_kl", "nats per token", positive!("0.01")),
    (&["ppo", "grpo"], "importance_sampling_clip_max", "", positive!("2 to 5")),
    (&["ppo", "grpo"], "importance_sampling_clip_min", "", positive!("0.2 to 0.5")),
    (ROLLOUTS, "dynamic_sampling_rollouts", "rollouts", WHOLE),
    (
        &["ppo", "grpo"],
        "top_entropy_quantile",
        "",
        range("a number above 0, up to 1, usually 0.2", |v| v > 0.0 && v <= 1.0),
    ),
    (&["ppo", "grpo"], "entropy_coef", "reward per nat", NOT_NEGATIVE),
    (PPO, "cliprange_value", "reward", positive!("0.2")),
    (PPO, "vf_coef", "", NOT_NEGATIVE),
    (PPO, "gamma", "", DISCOUNT),
    (PPO, "lam", "", DISCOUNT),
    (PPO, "score_clip", "reward", NOT_NEGATIVE),
    (PPO, "missing_eos_penalty", "reward", NOT_NEGATIVE),
    (PPO, "min_response_length", "tokens", WHOLE),
    (PPO, "short_response_penalty", "reward", NOT_NEGATIVE),
    (PPO, "length_penalty", "reward per token", ANY),
    (PPO, "overlong_buffer_len", "tokens", WHOLE),
    (PPO, "overlong_penalty_factor", "reward", NOT_NEGATIVE),
    (PPO, "ema_decay", "", range("a number from 0 to 1, usually 0.99", |v| (0.0..=1.0).contains(&v))),
    (PPO, "ref_model_sync_iterations", "iterations", WHOLE),
    (ROLLOUTS, "ref_model_mixup_alpha", "", SHARE),
    (ROLLOUTS, "eval_prompts", "prompts", WHOLE),
    (ROLLOUTS, "eval_every", "iterations", WHOLE),
    (&["ppo", "grpo", "rloo", "distill"], "save_samples", "samples", WHOLE),
    (GROUPS, "num_train_epochs", "passes", ONE),
    (GROUPS, "max_steps", "optimizer steps", ONE),
    (GROUPS, "per_device_train_batch_size", "responses", ONE),
    (GROUPS, "gradient_accumulation_steps", "passes", ONE),
    (GROUPS, "steps_per_generation", "passes", ONE),
    (GROUPS, "generation_batch_size", "responses", ONE),
    (GROUPS, "num_iterations", "passes", ONE),
    (GROUPS, "max_completion_length", "tokens", ONE),
    (GROUPS, "beta", "reward per nat", NOT_NEGATIVE),
    (GROUPS, "epsilon", "", range("a number between 0 and 1, usually 0.2", |v| v > 0.0 && v < 1.0)),
    (GROUPS, "epsilon_high", "", positive!("0.2 to 0.3")),
    (GROUPS, "ref_model_sync_steps", "optimizer steps", ONE),
    (GRPO, "delta", "", ABOVE_ONE),
    (PTX, "coef", "", range("0 or more, usually 27.8", |v| v >= 0.0)),
    (PTX, "block_size", "tokens", Range { text: "2 or more", fault: "has nothing to predict", inside: |v| v >= 2.0 }),
    (SAMPLERS, "max_mismatch", "nats per token", positive!("0.05 to 0.5")),
    (SAMPLERS, "concurrency", "requests", ONE),
    (SAMPLERS, "timeout_seconds", "seconds", SECONDS),
    (SAMPLERS, "async_rollouts", "rollouts", range("0 or 1", |v| v <= 1.0)),
    (SAMPLERS, "retries", "tries", WHOLE),
    (PARTS, "weight", "", ANY),
    (PARTS, "weight_end", "", ANY),
    (PARTS, "std_coef", "", NOT_NEGATIVE),
    (PARTS, "min_tokens", "tokens", WHOLE),
    (PARTS, "max_tokens", "tokens", WHOLE),
    (PARTS, "timeout_seconds", "seconds", SECONDS),
    (PARTS, "retries", "tries", WHOLE),
    (PARTS, "fallback_score", "reward", ANY),
    (PARTS, "score_index", "", WHOLE),
    (PARTS, "min_score", "reward", ANY),
    (PARTS, "max_score", "reward", ANY),
    (PARTS, "concurrency", "requests", ONE),
    (PARTS, "input_price", "per million tokens", NOT_NEGATIVE),
    (PARTS, "output_price", "per million tokens", NOT_NEGATIVE),
];

const READS: Range =
    Range { text: "1 or more, or remove the key to read every record", fault: "reads nothing", inside: |v| v >= 1.0 };

/// Unit and range of a key; `None` for one that is no number.
pub(super) fn of(section: &str, key: &str) -> Option<(&'static str, &'static Range)> {
    let row = ROWS.iter().find(|(sections, of, ..)| *of == key && sections.contains(&section));
    row.map(|(_, _, unit, range)| (*unit, range))
}

/// Checks every number of a config that was written out as TOML.
///
/// # Errors
/// The first value out of its range, with its section, key and range.
pub(super) fn check(config: &Table) -> Result<()> {
    within("", "", config)
}

/// `heading` is what names the table in a message, with a space behind it.
fn within(section: &str, heading: &str, table: &Table) -> Result<()> {
    for (key, value) in table {
        let path = if section.is_empty() { key.clone() } else { format!("{section}.{key}") };
        match value {
            Value::Table(inner) => within(&path, &format!("[{path}] "), inner)?,
            Value::Array(items) => {
                for (number, inner) in items.iter().filter_map(Value::as_table).enumerate() {
                    within(&path, &format!("[[{path}]] number {} ", number + 1), inner)?;
                }
            }
            _ => {
                let number = value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64));
                if let (Some(number), Some((_, range))) = (number, of(section, key)) {
                    one(heading, key, number, range)?;
                }
            }
        }
    }
    Ok(())
}

/// NaN and the infinities are TOML numbers too, and none is ever meant.
fn one(heading: &str, key: &str, value: f64, range: &Range) -> Result<()> {
    if value.is_finite() && (range.inside)(value) {
        return Ok(());
    }
    let fault = if value.is_finite() { range.fault } else { "is out of range" };
    Err(invalid!("{heading}{key} = {value} {fault}; use {}", range.text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_depth_are_checked_and_no_row_is_twice() {
        let refused = |text: &str| check(&text.parse().unwrap()).unwrap_err().to_string();
        assert_eq!(
            refused("[ppo]\ngamma = 2.0"),
            "[ppo] gamma = 2 is out of range; use a number from 0 to 1, usually 0.95 or 1"
        );
        assert_eq!(
            refused("[[data.sources]]\nmax_rows = 0").split(';').next(),
            Some("[[data.sources]] number 1 max_rows = 0 reads nothing")
        );
        assert!(refused("[ppo.gold]\nstd_coef = -1.0").starts_with("[ppo.gold] std_coef = -1 is out of range"));
        assert!(refused("[lora]\nr = 0").starts_with("[lora] r = 0 does nothing; use 1 or more"));
        assert!(refused("[ppo]\nkl_coef = nan").contains("kl_coef = NaN is out of range"));
        check(&"seed = 0\n[ppo]\ngamma = 1\n[other]\ngamma = 9".parse().unwrap()).unwrap();
        let mut names: Vec<(&str, &str)> =
            ROWS.iter().flat_map(|(sections, key, ..)| sections.iter().map(move |section| (*section, *key))).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
