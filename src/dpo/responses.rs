//! Summed log-probabilities of responses, and their metrics under TRL's names.
//!
//! It does not depend on a config. Read `loss.rs` next.

use anyhow::Result;
use serde_json::Value;

use crate::model::batch::{Batch, Targets, chunks_by_tokens};
use crate::model::roles::Policy;
use crate::ops::logprobs::TokenStats;
use crate::report::{Figures, number};
use crate::stats::{Histogram, mean};
use crate::train::world::World;

/// Tokens per scoring pass.
pub(crate) const SCORING_TOKENS: usize = 4096;

/// A response after its prompt.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'e> {
    pub prompt: &'e [u32],
    pub response: &'e [u32],
}

/// Packs sequences end to end; the targets are the response tokens.
pub(super) fn pack(sequences: &[Sequence<'_>]) -> Result<(Batch, Targets)> {
    let whole: Vec<Vec<u32>> = sequences.iter().map(|s| [s.prompt, s.response].concat()).collect();
    let lengths: Vec<usize> = sequences.iter().map(|s| s.response.len()).collect();
    let batch = Batch::new(&whole)?;
    let targets = Targets::responses(&batch, &lengths)?;
    Ok((batch, targets))
}

/// Sums per response of values per target of [`pack`].
pub(super) fn sums(sequences: &[Sequence<'_>], per_token: &[f32]) -> Vec<f64> {
    let mut rest = per_token;
    let mut sum = |s: &Sequence<'_>| {
        let (mine, later) = rest.split_at(s.response.len());
        rest = later;
        mine.iter().map(|&x| f64::from(x)).sum()
    };
    sequences.iter().map(&mut sum).collect()
}

/// Derivatives by each token's log-probability, from the derivatives by each response's sum.
pub(super) fn spread(sequences: &[Sequence<'_>], by_sum: &[f64]) -> Vec<f32> {
    let tokens = sequences.iter().zip(by_sum);
    tokens.flat_map(|(s, &g)| std::iter::repeat_n(g as f32, s.response.len())).collect()
}

/// log p(response | prompt) of each sequence, nats.
pub(super) fn summed_logprobs(policy: Policy<'_>, sequences: &[Sequence<'_>]) -> Result<Vec<f64>> {
    summed_logprobs_with(policy, sequences, |_| {})
}

/// The same; `passed` gets the number of sequences of each pass.
pub(super) fn summed_logprobs_with(
    policy: Policy<'_>,
    sequences: &[Sequence<'_>],
    mut passed: impl FnMut(usize),
) -> Result<Vec<f64>> {
    let lengths: Vec<usize> = sequences.iter().map(|s| s.prompt.len() + s.response.len()).collect();
    let mut all = Vec::with_capacity(sequences.len());
    for rows in chunks_by_tokens(&lengths, SCORING_TOKENS) {
        let some: Vec<Sequence<'_>> = rows.iter().map(|&i| sequences[i]).collect();
        let (batch, targets) = pack(&some)?;
        all.extend(sums(&some, &policy.logprobs(&batch, &targets, 1.0)?.logprobs));
        passed(some.len());
    }
    Ok(all)
}

/// Sums over the desirable (chosen) or the undesirable (rejected) responses.
#[derive(Default)]
struct Side {
    rewards: Vec<f64>,
    logps: f64,
}

impl Side {
    fn mean_reward(&self) -> f64 {
        mean(&self.rewards)
    }

    fn mean_logp(&self) -> f64 {
        self.logps / self.rewards.len() as f64
    }
}

/// The metrics of a set of responses, as sums.
#[derive(Default)]
pub(super) struct Tally {
    pub loss: f64,
    chosen: Side,
    rejected: Side,
    right: usize,
    pairs: usize,
    tokens: usize,
    entropy: f64,
    likeliest: usize,
}

impl Tally {
    /// Adds a response with its reward, beta times the log-ratio.
    pub fn response(&mut self, good: bool, reward: f64, logp: f64) {
        let side = if good { &mut self.chosen } else { &mut self.rejected };
        side.rewards.push(reward);
        side.logps += logp;
    }

    /// Adds a pair. `right`: the better response has the higher reward.
    pub fn pair(&mut self, right: bool) {
        self.pairs += 1;
        self.right += usize::from(right);
    }

    /// Adds the tokens of a pass.
    pub fn tokens(&mut self, stats: &TokenStats, targets: &Targets) {
        self.tokens += targets.tokens.len();
        self.entropy += stats.entropy.iter().map(|&e| f64::from(e)).sum::<f64>();
        self.likeliest += stats.argmax.iter().zip(&targets.tokens).filter(|(a, t)| a == t).count();
    }

    /// Puts the sums of all ranks in the place of this rank's.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn total(&mut self, world: &World) -> Result<()> {
        if world.is_alone() {
            return Ok(());
        }
        let counts = [self.right, self.pairs, self.tokens, self.likeliest].map(|count| count as f64);
        let mut all = [self.loss, self.entropy, self.chosen.logps, self.rejected.logps].to_vec();
        all.extend(counts);
        world.sum(&mut all)?;
        [self.loss, self.entropy, self.chosen.logps, self.rejected.logps] = [all[0], all[1], all[2], all[3]];
        [self.right, self.pairs, self.tokens, self.likeliest] = [4, 5, 6, 7].map(|at| all[at] as usize);
        for side in [&mut self.chosen, &mut self.rejected] {
            side.rewards = world.concat(std::mem::take(&mut side.rewards))?;
        }
        Ok(())
    }

    /// Share of pairs in which the better response has the higher reward; NaN if there is no pair.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.pairs as f64
    }

    /// Mean reward of the desirable responses minus that of the undesirable; NaN if one kind is missing.
    pub fn margin(&self) -> f64 {
        self.chosen.mean_reward() - self.rejected.mean_reward()
    }

    /// The metrics under TRL's names; a metric without values is left out.
    pub fn figures(&self, prefix: &str) -> Figures {
        let mut figures = Figures::new();
        let mut put = |name: &str, value: f64| {
            if !value.is_nan() {
                figures.insert(format!("{prefix}{name}"), number(value));
            }
        };
        put("loss", self.loss);
        put("rewards/chosen", self.chosen.mean_reward());
        put("rewards/rejected", self.rejected.mean_reward());
        put("rewards/accuracies", self.accuracy());
        put("rewards/margins", self.margin());
        put("logps/chosen", self.chosen.mean_logp());
        put("logps/rejected", self.rejected.mean_logp());
        put("entropy", self.entropy / self.tokens as f64);
        put("mean_token_accuracy", self.likeliest as f64 / self.tokens as f64);
        figures
    }

    /// The distributions of the rewards, by the names that [`Tally::figures`] gives their means; none of a kind without
    /// responses.
    pub fn distributions(&self, prefix: &str) -> impl Iterator<Item = (String, Value)> {
        let of = |side: &Side| Histogram::of(side.rewards.iter().copied()).map(|found| found.to_json());
        let found = [("chosen", of(&self.chosen)), ("rejected", of(&self.rejected))];
        found.into_iter().filter_map(move |(name, of)| Some((format!("histogram/{prefix}rewards/{name}"), of?)))
    }

    /// The figures of an evaluation with the distributions of the rewards.
    pub fn evaluation(&self) -> Figures {
        let mut figures = self.figures("eval_");
        figures.extend(self.distributions("eval_"));
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_derivatives_belong_to_their_own_response() {
        let (prompt, responses) = ([1u32, 2], [vec![3u32, 4], vec![5], vec![6, 7, 8]]);
        let sequences: Vec<Sequence<'_>> =
            responses.iter().map(|a| Sequence { prompt: &prompt, response: a }).collect();
        let (batch, targets) = pack(&sequences).unwrap();
        assert_eq!(batch.tokens(), [1, 2, 3, 4, 1, 2, 5, 1, 2, 6, 7, 8]);
        assert_eq!(targets.tokens, [3, 4, 5, 6, 7, 8]);
        assert_eq!(sums(&sequences, &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), [3.0, 4.0, 56.0]);
        assert_eq!(spread(&sequences, &[0.5, -1.0, 2.0]), [0.5, 0.5, -1.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn metrics_of_a_kind_without_responses_are_left_out() {
        let mut tally = Tally::default();
        tally.response(true, 0.5, -3.0);
        tally.response(true, 1.5, -5.0);
        let figures = tally.figures("eval_");
        assert_eq!(figures["eval_rewards/chosen"], 1.0);
        assert_eq!(figures["eval_logps/chosen"], -4.0);
        for absent in ["eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies", "eval_entropy"] {
            assert!(!figures.contains_key(absent), "{absent}");
        }
        assert_eq!(tally.evaluation()["histogram/eval_rewards/chosen"]["num"], 2);
        assert!(!tally.evaluation().contains_key("histogram/eval_rewards/rejected"));
    }
}
