//! Which metrics share a chart, by what they measure, and what a chart's reader should know. A metric without a place here
//! gets a chart of its own, so nothing that is logged is missing. It does not depend on a run.

/// A chart: its title, the columns of metrics.jsonl in it, and a sentence on how to read it.
pub(crate) struct Entry {
    pub title: &'static str,
    pub keys: &'static [&'static str],
    pub note: &'static str,
    /// The warnings of PPO that this chart shows the cause of.
    pub warnings: &'static [&'static str],
}

const fn entry(title: &'static str, keys: &'static [&'static str], note: &'static str) -> Entry {
    Entry { title, keys, note, warnings: &[] }
}

const fn watched(entry: Entry, warnings: &'static [&'static str]) -> Entry {
    Entry { warnings, ..entry }
}

/// The charts in the order of the page. Columns that start with a prefix and `*` are all those columns.
pub(crate) const CHARTS: &[Entry] = &[
    watched(
        entry(
            "Learned score",
            &["objective/scores", "eval/score"],
            "Mean score of the reward source: rollouts and held-out prompts, with the mean's 95% band.",
        ),
        &["reward_hacking", "flat_advantages"],
    ),
    entry("Gold score", &["eval/gold"], "A score that training never sees."),
    entry("Wins against SFT", &["eval/win_rate"], "Share of held-out prompts, with Wilson's 95% interval."),
    watched(
        entry(
            "KL to the reference",
            &["objective/kl", "objective/kl_exact", "eval/kl", "kl"],
            "Nats per response: the estimate from sampled tokens, and the exact sum over the vocabulary.",
        ),
        &["kl_blow_up"],
    ),
    entry("KL coefficient", &["objective/kl_coef", "policy/kl_penalty_coef"], ""),
    entry("Loss", &["loss", "eval_loss"], ""),
    entry("Held-out perplexity", &["eval_perplexity"], ""),
    entry(
        "Accuracy",
        &["accuracy", "eval_accuracy", "rewards/accuracies", "eval_rewards/accuracies"],
        "Share of pairs.",
    ),
    entry("Reward margin", &["rewards/margins", "eval_rewards/margins"], ""),
    entry(
        "Implicit rewards",
        &["rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected"],
        "beta times the log-ratio to the reference.",
    ),
    entry(
        "Accuracy by length",
        &["eval_accuracy_chosen_shorter", "eval_accuracy_chosen_longer", "eval_length_controlled_accuracy"],
        "Share of held-out pairs whose better response is the shorter one, the longer one, and the mean of both.",
    ),
    entry(
        "Score and length",
        &["eval_score_length_correlation"],
        "Correlation of a held-out response's score with its tokens; 0 is a score that does not follow length.",
    ),
    entry("Scores", &["eval_chosen", "eval_rejected"], "Mean held-out scores, with the mean's 95% band."),
    entry(
        "Log-probabilities",
        &["logps/chosen", "logps/rejected", "eval_logps/chosen", "eval_logps/rejected"],
        "Sum per response, nats.",
    ),
    entry("Token accuracy", &["mean_token_accuracy", "eval_mean_token_accuracy"], ""),
    watched(
        entry("Entropy", &["policy/entropy_avg", "entropy", "eval_entropy"], "Nats per token."),
        &["entropy_collapse"],
    ),
    entry("Surprise of responses", &["objective/entropy"], "-log p of the sampled response, nats."),
    watched(entry("Response length", &["response_length", "eval/length"], "Tokens."), &["length_blow_up"]),
    watched(
        entry(
            "Responses that ended",
            &["share ended", "share truncated", "eval/ended"],
            "Shares; the rest is cut off by length.",
        ),
        &["truncated"],
    ),
    watched(
        entry(
            "Masked responses",
            &["policy/masked", "policy/masked_steps"],
            "Shares: of responses that were cut off and left out of the loss, and of steps without any other.",
        ),
        &["masked_steps"],
    ),
    watched(
        entry("Groups of equal rewards", &["frac_reward_zero_std"], "Share of prompts; their responses teach nothing."),
        &["equal_groups"],
    ),
    entry(
        "Sampler against trainer",
        &["sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"],
        "Difference of a token's log-probabilities, nats: rounding alone, unless a rollout was sampled ahead.",
    ),
    entry("KL of a rollout server to the actor", &["sampling/sampler_kl_k3"], "Nats per token, the k3 estimate."),
    entry(
        "Rollout server against the weights it has",
        &["sampling/server_mismatch"],
        "Mean difference of log-probabilities, nats per token; beyond max_mismatch the run stops.",
    ),
    entry(
        "Tokens without a log-probability of the server",
        &["sampling/unreported_tokens"],
        "Per rollout; llama.cpp reports none in the middle of a character. They are neither checked nor weighted.",
    ),
    entry(
        "Iterations that a rollout is behind",
        &["sampling/policy_lag"],
        "Iterations of updates between the actor that was sampled from and the one that is trained.",
    ),
    entry("Policy loss", &["loss/policy_avg", "loss/ptx_avg"], ""),
    entry("Value loss", &["loss/value_avg"], ""),
    watched(
        entry(
            "Explained variance",
            &["val/explained_variance"],
            "Of the returns, by the critic; 1 is perfect, below 0 useless.",
        ),
        &["useless_critic"],
    ),
    entry("Clip fraction", &["policy/clipfrac_avg", "val/clipfrac_avg"], ""),
    entry(
        "Ratio",
        &["val/ratio", "val/first_ratio"],
        "Of the new policy to the one that sampled; 1 before the first step.",
    ),
    entry(
        "KL of an update",
        &["policy/approxkl_avg", "policy/kl_to_old"],
        "Nats per token, to the policy that sampled.",
    ),
    entry("Total reward", &["objective/rlhf_reward", "objective/non_score_reward"], "Score and KL penalty."),
    entry("Diversity", &["eval/distinct_1", "eval/distinct_2"], "Distinct n-grams over all n-grams."),
    watched(
        entry("Gradient norm", &["grad_norm", "grad_norm/actor", "grad_norm/critic"], "Before clipping."),
        &["zero_gradient", "zero_b"],
    ),
    entry("Learning rate", &["lr", "critic_lr", "lr_factor"], ""),
    entry(
        "Tokens per second",
        &["tokens_per_second", "tokens_per_second/*"],
        "By phase; PPO's total counts sampled tokens.",
    ),
    entry("Seconds", &["seconds", "seconds/*"], "Wall time between two lines, and the phases in it."),
];

/// The charts that a window with room for a few shows at a time, in groups by what one wants to know: a group's name, and its
/// charts by their titles. Those of the first are what tells whether a stage goes well.
pub(crate) const GROUPS: &[(&str, &[&str])] = &[
    (
        "main",
        &[
            "Learned score",
            "KL to the reference",
            "Entropy",
            "Response length",
            "Value loss",
            "Explained variance",
            "Loss",
            "Held-out perplexity",
            "Accuracy",
            "Reward margin",
            "Scores",
        ],
    ),
    (
        "reward",
        &[
            "Gold score",
            "Wins against SFT",
            "Total reward",
            "Implicit rewards",
            "Scores",
            "Reward margin",
            "Accuracy by length",
            "Score and length",
        ],
    ),
    (
        "policy",
        &[
            "Policy loss",
            "KL coefficient",
            "KL of an update",
            "Ratio",
            "Clip fraction",
            "Sampler against trainer",
            "KL of a rollout server to the actor",
            "Rollout server against the weights it has",
            "Tokens without a log-probability of the server",
            "Iterations that a rollout is behind",
            "Surprise of responses",
            "Log-probabilities",
            "Token accuracy",
        ],
    ),
    (
        "responses",
        &["Response length", "Responses that ended", "Masked responses", "Groups of equal rewards", "Diversity"],
    ),
    ("optimizer", &["Loss", "Gradient norm", "Learning rate"]),
    ("speed", &["Tokens per second", "Seconds"]),
];

/// Whether a chart's key means this column.
pub(crate) fn matches(key: &str, column: &str) -> bool {
    key.strip_suffix('*').map_or(key == column, |prefix| column.starts_with(prefix))
}

/// Columns that are no curve.
pub(crate) const NO_CURVE: &[&str] =
    &["epoch", "member", "tokens", "num_tokens", "record_tokens", "val/num_eos_tokens"];

/// Columns that are the bounds of another column's band.
pub(crate) fn is_bound(column: &str) -> bool {
    column.ends_with("win_rate_low") || column.ends_with("win_rate_high")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chart_is_in_a_group_and_every_group_has_charts_that_exist() {
        let in_groups = |title: &str| GROUPS.iter().any(|(_, titles)| titles.contains(&title));
        let missing: Vec<_> = CHARTS.iter().map(|chart| chart.title).filter(|title| !in_groups(title)).collect();
        assert!(missing.is_empty(), "{missing:?}");
        for title in GROUPS.iter().flat_map(|(_, titles)| *titles) {
            assert!(CHARTS.iter().any(|chart| chart.title == *title), "{title}");
        }
    }
}
