//! An iteration's figures, under the names that TRL's users know, and its samples. Knows no training.

use anyhow::Result;
use serde_json::json;

use crate::config::PolicyLoss;
use crate::ppo::experience::Experience;
use crate::ppo::state::State;
use crate::ppo::train::Run;
use crate::report::{Figures, Report, number};

/// Of the iteration whose rollout is `experience` and whose updates are the state's sums.
pub fn of(experience: &Experience, state: &State, run: &Run<'_>) -> Figures {
    let (rollout, update) = (&experience.rollout, &state.update);
    let n = rollout.prompts.len() as f64;
    let mean = |x: f64| x / n;
    let kl = mean(experience.kl.iter().map(|k| sum(k)).sum());
    let scores = mean(sum(&rollout.scores));
    let minibatches = update.minibatches.max(1) as f64;
    let mut f = Figures::new();
    let mut put = |name: &str, x: f64| f.insert(name.into(), number(x));
    put("objective/kl", kl);
    put("objective/entropy", mean(rollout.responses.iter().map(|r| -sum(&r.logprobs)).sum()));
    put("objective/non_score_reward", -state.kl_coef * kl);
    put("objective/rlhf_reward", scores - state.kl_coef * kl);
    put("objective/scores", scores);
    if update.exact_answers > 0 {
        put("objective/kl_exact", update.exact_kl / update.exact_answers as f64);
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
    if run.mixture().is_some() {
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
        put("objective/kl_coef", state.kl_coef);
    }
    if run.config.policy_loss == PolicyLoss::KlPenalty {
        put("policy/kl_to_old", update.last_policy.kl_to_old());
        put("policy/kl_penalty_coef", state.kl_penalty);
    }
    if run.config.ratio_threshold.is_some() {
        put("policy/skipped", update.skipped as f64);
    }
    if run.config.compat.is_some() {
        f.insert("val/dropped".into(), (run.config.batch_size - rollout.prompts.len()).into());
    }
    f.insert("val/num_eos_tokens".into(), rollout.stopped().into());
    f.insert("episode".into(), ((state.iteration + 1) * run.config.batch_size).into());
    f.insert("lr".into(), number(update.actor_lr));
    if state.critic.is_some() {
        f.insert("critic_lr".into(), number(update.critic_lr));
    }
    f
}

/// The first answers of the rollout, as lines of samples.jsonl.
///
/// # Errors
/// If the file cannot be written.
pub fn samples(experience: &Experience, iteration: usize, run: &Run<'_>, report: &mut Report) -> Result<()> {
    let (rollout, decode) = (&experience.rollout, run.task.decode);
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
