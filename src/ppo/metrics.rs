//! Metrics of one PPO iteration, under TRL's names, and its samples. It does not depend on the training loop or its
//! state. Read `update.rs` for the sums behind them.

use anyhow::Result;
use serde_json::json;

use super::experience::Experience;
use super::run::PpoRun;
use super::update::Update;
use crate::config::PolicyLoss;
use crate::report::{Metrics, Report, number};

/// Metrics of iteration `iteration` (counted from 0) with its rollout and its update's sums. `coefficients`: those of the
/// KL to the reference and of the KL to the policy that sampled.
pub fn iteration(
    experience: &Experience,
    update: &Update,
    iteration: usize,
    (kl_coef, kl_penalty): (f64, f64),
    run: &PpoRun<'_>,
) -> Metrics {
    let rollout = &experience.rollout;
    let n = rollout.prompts.len() as f64;
    let mean = |x: f64| x / n;
    let kl = mean(experience.kl.iter().map(|k| sum(k)).sum());
    let scores = mean(sum(&rollout.scores));
    let minibatches = update.minibatches.max(1) as f64;
    let mut metrics = Metrics::new();
    let mut put = |name: &str, x: f64| metrics.insert(name.into(), number(x));
    put("objective/kl", kl);
    put("objective/entropy", mean(rollout.responses.iter().map(|r| -sum(&r.logprobs)).sum()));
    put("objective/non_score_reward", -kl_coef * kl);
    put("objective/rlhf_reward", scores - kl_coef * kl);
    put("objective/scores", scores);
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
    put("policy/approxkl_avg", update.policy.approx_kl());
    put("policy/clipfrac_avg", update.policy.clipfrac());
    put("policy/entropy_avg", update.entropy / minibatches);
    put("loss/policy_avg", update.policy_loss / minibatches);
    if run.ptx_mixture().is_some() {
        put("loss/ptx_avg", update.ptx_loss / minibatches);
    }
    if update.critic_minibatches > 0 {
        let minibatches = update.critic_minibatches as f64;
        put("loss/value_avg", update.value_loss / minibatches);
        put("val/clipfrac_avg", update.value.clipfrac());
        put("val/explained_variance", update.value.explained_variance().unwrap_or(f64::NAN));
        put("grad_norm/critic", update.critic_norm / minibatches);
    }
    put("val/ratio", update.policy.mean_ratio());
    put("val/ratio_var", update.policy.ratio_variance());
    put("val/first_ratio", update.first_ratio.unwrap_or(f64::NAN));
    put("grad_norm/actor", update.actor_norm / minibatches);
    put("response_length", mean(rollout.response_tokens() as f64));
    if run.config.adap_kl_ctrl {
        put("objective/kl_coef", kl_coef);
    }
    if run.config.policy_loss == PolicyLoss::KlPenalty {
        put("policy/kl_to_old", update.last_policy.kl_to_old());
        put("policy/kl_penalty_coef", kl_penalty);
    }
    if run.config.ratio_threshold.is_some() {
        put("policy/skipped", update.skipped as f64);
    }
    if run.config.compat.is_some() {
        metrics.insert("val/dropped".into(), (run.config.batch_size - rollout.prompts.len()).into());
    }
    metrics.insert("val/num_eos_tokens".into(), rollout.stopped().into());
    metrics.insert("episode".into(), ((iteration + 1) * run.config.batch_size).into());
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
        report.sample(&json!({
            "iteration": iteration,
            "prompt": decode(&rollout.prompts[i]),
            "response": decode(&rollout.responses[i].tokens),
            "score": number(f64::from(rollout.scores[i])),
            "kl": number(sum(&experience.kl[i])),
            "finish_reason": rollout.responses[i].finish.name(),
        }))?;
    }
    Ok(())
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum()
}
