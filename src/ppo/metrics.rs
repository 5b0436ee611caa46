//! Metrics of one PPO iteration, under TRL's names, and its samples. It does not depend on the training loop or its
//! state. Read `update.rs` for the sums behind them.

use anyhow::Result;
use serde_json::json;

use super::correction;
use super::experience::Experience;
use super::run::PpoRun;
use super::sampler;
use super::token_detail;
use super::update::Update;
use crate::config::{Engine, KlEstimator, KlIn, PolicyLoss};
use crate::report::{Metrics, Report, number};

/// The metrics of the actor's training, which have no value in an iteration that trains the critic alone: null in metrics.jsonl,
/// as NaN is.
pub const OF_ACTOR: [&str; 10] = [
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/ptx_avg",
    "val/ratio",
    "val/ratio_var",
    "val/first_ratio",
    "grad_norm/actor",
    "policy/masked_steps",
];

/// Metrics of iteration `iteration` (counted from 0) with its rollout and its update's sums. `coefficients`: those of the
/// KL to the reference and of the KL to the policy that sampled. `kl_to_old`: that KL after the updates, if a penalty on it
/// is adapted.
///
/// `objective/rlhf_reward` is the mean sum of the rewards that the advantages were made of: scores scaled, clipped and less
/// their penalties, with the KL if it is in the reward. `objective/rlhf_reward_raw` is the scores as the source gave them
/// less `kl_coef` times the KL, wherever that acts.
pub fn iteration(
    experience: &Experience,
    update: &Update,
    iteration: usize,
    (kl_coef, kl_penalty): (f64, f64),
    kl_to_old: Option<f64>,
    run: &PpoRun<'_>,
) -> Metrics {
    let rollout = &experience.rollout;
    let n = rollout.prompts.len() as f64;
    let mean = |x: f64| x / n;
    // Without a reference the KL has no name in the metrics, and no weight.
    let kl = mean(experience.kl.iter().map(|k| sum(k)).sum());
    let scores = mean(sum(&rollout.scores));
    let minibatches = update.minibatches.max(1) as f64;
    let mut metrics = Metrics::new();
    let mut put = |name: &str, x: f64| metrics.insert(name.into(), number(x));
    if run.config.measure_kl {
        put("objective/kl", kl);
    }
    put("objective/entropy", mean(rollout.responses.iter().map(|r| -sum(&r.logprobs)).sum()));
    put("objective/non_score_reward", if run.config.kl_in == KlIn::Reward { -kl_coef * kl } else { 0.0 });
    put("objective/rlhf_reward", mean(experience.rewards.iter().sum()));
    put("objective/rlhf_reward_raw", scores - kl_coef * kl);
    put("objective/scores", scores);
    if run.config.kl_estimator == KlEstimator::K3 && run.config.measure_kl {
        put("objective/kl_clamped", experience.kl_clamped as f64);
    }
    if run.config.score_clip().is_some() {
        put("objective/score_clipfrac", mean(experience.clipped as f64));
    }
    if update.exact_responses > 0 {
        put("objective/kl_exact", update.exact_kl / update.exact_responses as f64);
    }
    if run.config.num_generations > 1 {
        let best = rollout
            .scores
            .chunks(run.config.num_generations)
            .map(|group| group.iter().fold(f32::MIN, |a, &b| a.max(b)));
        put("objective/best_of_n", best.map(f64::from).sum::<f64>() * run.config.num_generations as f64 / n);
    }
    if let Some(share) = rollout.sampled.flat_share() {
        put("frac_reward_zero_std", share);
    }
    if run.config.dynamic_sampling_rollouts > 0 {
        let count = rollout.prompts.len() / run.config.num_generations.max(1);
        put("sampling/refills", rollout.sampled.refills as f64);
        put("sampling/extra_groups", rollout.sampled.groups.saturating_sub(count) as f64);
    }
    // TRL's names.
    if let Some(mean) = update.mismatch.mean() {
        put("sampling/sampling_logp_difference/mean", mean);
        put("sampling/sampling_logp_difference/max", update.mismatch.max);
    }
    if run.sampler.is_some() {
        put("sampling/sampler_kl_k3", sampler::k3(rollout));
        put("sampling/server_mismatch", rollout.served.mismatch);
    }
    // The other engines report every token's.
    if run.config.servers().is_some_and(|servers| servers.engine == Engine::LlamaCpp) {
        put("sampling/unreported_tokens", rollout.served.unreported as f64);
    }
    if run.config.samples_ahead() {
        put("sampling/policy_lag", rollout.served.lag as f64);
    }
    let weights =
        rollout.responses.iter().enumerate().filter_map(|(i, response)| {
            correction::weights(&response.logprobs, rollout.sampler_logprobs(i), run.config)
        });
    let weights: Vec<f64> = weights.flatten().map(f64::from).collect();
    if !weights.is_empty() {
        put("sampling/importance_sampling_ratio/min", weights.iter().copied().fold(f64::INFINITY, f64::min));
        put("sampling/importance_sampling_ratio/mean", weights.iter().sum::<f64>() / weights.len() as f64);
        put("sampling/importance_sampling_ratio/max", weights.iter().copied().fold(0.0, f64::max));
    }
    if run.config.mask_truncated_completions {
        put("policy/masked", mean((rollout.prompts.len() - rollout.stopped()) as f64));
        let steps = update.minibatches + update.left_out;
        put("policy/masked_steps", if steps > 0 { update.left_out as f64 / steps as f64 } else { f64::NAN });
    }
    // While only the critic trains there is nothing to measure of the actor: NaN, which is null in metrics.jsonl.
    let of_actor = |x: f64| if update.minibatches > 0 { x } else { f64::NAN };
    put("policy/approxkl_avg", of_actor(update.policy.approx_kl()));
    put("policy/clipfrac_avg", of_actor(update.policy.clipfrac()));
    put("policy/entropy_avg", of_actor(update.entropy / minibatches));
    put("loss/policy_avg", of_actor(update.policy_loss / minibatches));
    if run.ptx_mixture().is_some() {
        put("loss/ptx_avg", of_actor(update.ptx_loss / minibatches));
    }
    if update.critic_minibatches > 0 {
        let minibatches = update.critic_minibatches as f64;
        put("loss/value_avg", update.value_loss / minibatches);
        put("val/clipfrac_avg", update.value.clipfrac());
        put("val/explained_variance", update.value.explained_variance().unwrap_or(f64::NAN));
        put("grad_norm/critic", update.critic_norm / minibatches);
    }
    put("val/ratio", of_actor(update.policy.mean_ratio()));
    put("val/ratio_var", of_actor(update.policy.ratio_variance()));
    put("val/first_ratio", update.first_ratio.unwrap_or(f64::NAN));
    put("grad_norm/actor", of_actor(update.actor_norm / minibatches));
    put("response_length", mean(rollout.response_tokens() as f64));
    if run.config.adap_kl_ctrl {
        put("objective/kl_coef", kl_coef);
    }
    if run.config.policy_loss == PolicyLoss::KlPenalty {
        put("policy/kl_to_old", kl_to_old.unwrap_or(f64::NAN));
        put("policy/kl_penalty_coef", kl_penalty);
    }
    if (run.config.kl_estimator, run.config.kl_in) == (KlEstimator::K3, KlIn::Loss) && run.config.measure_kl {
        put("policy/kl_clamped", update.policy.kl_clamped() as f64);
    }
    if run.config.ratio_threshold.is_some() {
        put("policy/skipped", update.skipped as f64);
    }
    if run.config.compat.is_some() {
        metrics.insert("val/dropped".into(), (run.config.batch_size - rollout.prompts.len()).into());
    }
    metrics.insert("val/num_eos_tokens".into(), rollout.stopped().into());
    let episodes = (iteration + 1) * run.config.batch_size;
    metrics.insert("episode".into(), episodes.into());
    let passes = episodes as f64 / (run.config.num_generations * run.prompts.len()) as f64;
    metrics.insert("epoch".into(), number(passes));
    metrics.insert("lr".into(), number(update.actor_lr));
    if run.config.advantage_estimator.has_critic() {
        metrics.insert("critic_lr".into(), number(update.critic_lr));
    }
    metrics
}

/// Writes the rollout's first `save_samples` responses to samples.jsonl.
///
/// # Errors
/// If the file cannot be written.
pub fn samples(experience: &Experience, iteration: usize, run: &PpoRun<'_>, report: &mut Report) -> Result<()> {
    let (rollout, decode) = (&experience.rollout, run.decode);
    for i in 0..run.config.save_samples.min(rollout.prompts.len()) {
        let mut sample = json!({
            "iteration": iteration,
            "prompt": decode(&rollout.prompts[i]),
            "response": decode(&rollout.responses[i].tokens),
            "score": number(f64::from(rollout.scores[i])),
            "kl": experience.kl.get(i).map(|kl| number(sum(kl))),
            "finish_reason": rollout.responses[i].finish.name(),
        });
        if let Some(sample) =
            sample.as_object_mut().filter(|_| token_detail::is_due(iteration, run.config.iterations()))
        {
            sample.extend(token_detail::of(experience, i, decode));
        }
        report.sample(&sample)?;
    }
    Ok(())
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum()
}
