//! Dynamic sampling: groups whose rewards are all equal have no advantage and teach nothing, so other prompts are answered in
//! their place. It does not depend on the model: the caller samples. Source: DAPO, arXiv:2503.14476 section 3.2. Read
//! `state.rs` for the caller.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::advantages::deviation;
use super::rollout::Rollout;
use crate::config::{Aggregation, Ppo};
use crate::reward::source::PartScores;

/// What was sampled for one rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sampled {
    /// Groups that were sampled, those that were left out among them.
    pub groups: usize,
    /// Groups of them whose rewards were all equal.
    pub flat: usize,
    /// Rollouts after the first.
    pub refills: usize,
}

impl Sampled {
    /// The share of groups whose rewards were all equal; none without groups.
    pub fn flat_share(&self) -> Option<f64> {
        (self.groups > 0).then(|| self.flat as f64 / self.groups as f64)
    }
}

/// Deviations up to this are 0 (`torch.isclose`).
const NOTHING: f64 = 1e-8;

/// Whether each group's rewards are all equal. Where rewards are normalised before they are added, each of them has to be.
pub fn flat_groups(rollout: &Rollout, config: &Ppo) -> Vec<bool> {
    let flat = |scores: &[f32]| -> Vec<bool> {
        let is_flat = |group: &[f32]| {
            let group: Vec<f64> = group.iter().map(|&score| f64::from(score)).collect();
            deviation(&group) <= NOTHING
        };
        scores.chunks(config.num_generations.max(1)).map(is_flat).collect()
    };
    if config.aggregation == Aggregation::SumThenNormalize || rollout.parts.is_empty() {
        return flat(&rollout.scores);
    }
    let each: Vec<Vec<bool>> = rollout.parts.iter().map(|part| flat(&part.scores)).collect();
    (0..each[0].len()).map(|group| each.iter().all(|part| part[group])).collect()
}

/// Samples `batch_size / num_generations` groups by `sample`, which is given the number of groups that were sampled before and
/// the number that is wanted. With `dynamic_sampling_rollouts`, flat groups are replaced by further ones, in the order in which
/// they were sampled; what is missing in the end is filled with the first that were left out.
///
/// # Errors
/// Those of `sample`.
pub fn collect_groups(config: &Ppo, mut sample: impl FnMut(usize, usize) -> Result<Rollout>) -> Result<Rollout> {
    let (size, wanted) = (config.num_generations.max(1), config.batch_size / config.num_generations.max(1));
    let mut all = sample(0, wanted)?;
    if size == 1 {
        return Ok(all);
    }
    // Of the groups in `all`.
    let mut is_flat = flat_groups(&all, config);
    let flat = |groups: &[bool]| groups.iter().filter(|&&flat| flat).count();
    let mut sampled = Sampled { groups: is_flat.len(), flat: flat(&is_flat), refills: 0 };
    while sampled.refills < config.dynamic_sampling_rollouts && flat(&is_flat) > 0 {
        let more = sample(sampled.groups, flat(&is_flat))?;
        let of_more = flat_groups(&more, config);
        sampled = Sampled {
            groups: sampled.groups + of_more.len(),
            flat: sampled.flat + flat(&of_more),
            refills: sampled.refills + 1,
        };
        is_flat.extend(of_more);
        all.append(more);
        // What is left out is dropped at once: no more than two rollouts are held.
        let with_spread = (0..is_flat.len()).filter(|&group| !is_flat[group]);
        let left_out = (0..is_flat.len()).filter(|&group| is_flat[group]);
        let mut groups: Vec<usize> = with_spread.chain(left_out).take(wanted).collect();
        groups.sort_unstable();
        let rows: Vec<usize> = groups.iter().flat_map(|group| group * size..(group + 1) * size).collect();
        all = all.rows(&rows);
        is_flat = groups.into_iter().map(|group| is_flat[group]).collect();
    }
    all.sampled = sampled;
    Ok(all)
}

impl Rollout {
    /// Adds the responses of another rollout, whose source's metrics are the newer ones.
    fn append(&mut self, more: Rollout) {
        self.served.add(self.response_tokens(), more.served, more.response_tokens());
        self.prompts.extend(more.prompts);
        self.responses.extend(more.responses);
        self.ref_logprobs.extend(more.ref_logprobs);
        self.ref_hidden.extend(more.ref_hidden);
        self.exact_kl.extend(more.exact_kl);
        self.values.extend(more.values);
        self.last_values.extend(more.last_values);
        self.scores.extend(more.scores);
        self.trained.extend(more.trained);
        self.sampler_logprobs.extend(more.sampler_logprobs);
        self.parts.iter_mut().zip(more.parts).for_each(|(part, more)| part.scores.extend(more.scores));
        self.source_metrics = more.source_metrics;
    }

    /// The sequences `rows` alone.
    fn rows(&self, rows: &[usize]) -> Self {
        fn of<T: Clone>(all: &[T], rows: &[usize]) -> Vec<T> {
            rows.iter().filter_map(|&row| all.get(row).cloned()).collect()
        }
        let part = |part: &PartScores| PartScores { scores: of(&part.scores, rows), ..part.clone() };
        Self {
            prompts: of(&self.prompts, rows),
            responses: of(&self.responses, rows),
            ref_logprobs: of(&self.ref_logprobs, rows),
            ref_hidden: of(&self.ref_hidden, rows),
            exact_kl: of(&self.exact_kl, rows),
            values: of(&self.values, rows),
            last_values: of(&self.last_values, rows),
            scores: of(&self.scores, rows),
            trained: of(&self.trained, rows),
            sampler_logprobs: of(&self.sampler_logprobs, rows),
            served: self.served,
            parts: self.parts.iter().map(part).collect(),
            sampled: self.sampled,
            source_metrics: self.source_metrics.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AdvantageEstimator;
    use crate::model::generate::{FinishReason, Response};

    fn config(batch_size: usize, dynamic_sampling_rollouts: usize) -> Ppo {
        Ppo {
            advantage_estimator: AdvantageEstimator::Grpo,
            num_generations: 2,
            batch_size,
            dynamic_sampling_rollouts,
            ..Ppo::default()
        }
    }

    /// Groups of two; the prompt of each response is its group's number.
    fn rollout(first: usize, scores: &[[f32; 2]]) -> Rollout {
        let response = Response { tokens: vec![1], logprobs: vec![-1.0], finish: FinishReason::Stop };
        let flat: Vec<f32> = scores.concat();
        Rollout {
            prompts: (0..flat.len()).map(|row| vec![(first + row / 2) as u32]).collect(),
            responses: vec![response; flat.len()],
            parts: vec![PartScores { name: "p".into(), weight: 1.0, scores: flat.clone() }],
            scores: flat,
            ..Rollout::default()
        }
    }

    /// What is asked for, and the result, where the groups' scores come one after another.
    fn sampled(config: &Ppo, scores: &[[f32; 2]]) -> (Vec<(usize, usize)>, Rollout) {
        let mut asked = vec![];
        let found = collect_groups(config, |from, count| {
            asked.push((from, count));
            Ok(rollout(from, &scores[from..from + count]))
        });
        (asked, found.unwrap())
    }

    const SPREAD: [f32; 2] = [0.0, 1.0];
    const FLAT: [f32; 2] = [1.0, 1.0];

    #[test]
    fn flat_groups_are_left_out_and_as_many_others_sampled_until_none_is_missing() {
        let (asked, found) = sampled(&config(6, 5), &[FLAT, SPREAD, FLAT, FLAT, SPREAD, SPREAD, SPREAD]);
        assert_eq!(asked, [(0, 3), (3, 2), (5, 1)]);
        assert_eq!(found.prompts, [[1], [1], [4], [4], [5], [5]]);
        assert_eq!(found.scores, [0.0, 1.0].repeat(3));
        assert_eq!(found.parts[0].scores, found.scores);
        assert_eq!(found.sampled, Sampled { groups: 6, flat: 3, refills: 2 });
        assert_eq!(found.sampled.flat_share(), Some(0.5));
    }

    #[test]
    fn the_bound_ends_it_and_the_first_that_were_left_out_fill_the_rest_in_their_order() {
        let (asked, found) = sampled(&config(6, 1), &[FLAT, SPREAD, FLAT, FLAT, SPREAD]);
        assert_eq!(asked, [(0, 3), (3, 2)]);
        assert_eq!(found.prompts, [[0], [0], [1], [1], [4], [4]]);
        assert_eq!(found.sampled, Sampled { groups: 5, flat: 3, refills: 1 });
        let (asked, found) = sampled(&config(4, 2), &[FLAT; 6]);
        assert_eq!((asked.len(), found.prompts), (3, vec![vec![0], vec![0], vec![1], vec![1]]));
    }

    #[test]
    fn without_the_key_nothing_is_left_out_and_the_share_is_counted_all_the_same() {
        let (asked, found) = sampled(&config(6, 0), &[FLAT, SPREAD, FLAT]);
        assert_eq!((asked, found.prompts.len()), (vec![(0, 3)], 6));
        assert_eq!(found.sampled.flat_share(), Some(2.0 / 3.0));
        let one = Ppo { num_generations: 1, ..config(6, 3) };
        let found = collect_groups(&one, |from, count| Ok(rollout(from, &vec![FLAT; count / 2]))).unwrap();
        assert_eq!((found.sampled.flat_share(), found.prompts.len()), (None, 6), "no group, no share");
    }

    #[test]
    fn a_group_is_flat_where_its_sum_is_or_where_each_reward_is_that_is_normalised_alone() {
        let mut found = rollout(0, &[[1.0, 1.0], SPREAD]);
        let part = |scores: [f32; 4]| PartScores { weight: 1.0, scores: scores.to_vec(), ..PartScores::default() };
        // In the first group the two rewards add up to the same.
        found.parts = vec![part([1.0, 0.0, 0.0, 0.0]), part([0.0, 1.0, 0.0, 1.0])];
        assert_eq!(flat_groups(&found, &config(4, 0)), [true, false]);
        let alone = Ppo { aggregation: Aggregation::NormalizeThenSum, ..config(4, 0) };
        assert_eq!(flat_groups(&found, &alone), [false, false]);
    }

    /// TRL's share for recorded rewards (tests/golden/group_loss.py).
    #[test]
    fn the_share_is_trls_golden() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/group_loss.json")).unwrap();
        let scores: Vec<f32> = serde_json::from_value(golden["flat"].clone()).unwrap();
        let found = Rollout { scores, ..Rollout::default() };
        let flat = flat_groups(&found, &Ppo { num_generations: 3, ..config(6, 0) });
        let share = flat.iter().filter(|&&flat| flat).count() as f64 / flat.len() as f64;
        assert_eq!(Some(share), golden["frac_reward_zero_std"].as_f64());
    }
}
