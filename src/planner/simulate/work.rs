//! What a stage runs, in numbers: the passes of one learner, or those of a rollout and its updates. It does not compute bytes. Read
//! `../passes.rs` for how they are found, `stages.rs` for what they take.

use crate::planner::passes::largest_share;

/// One pass through a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// Rows whose logits or values are computed.
    pub targets: usize,
}

impl Pass {
    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }
}

/// Passes of a stage with one learner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Supervised {
    /// The micro-batches of the largest optimizer step.
    pub step: Vec<Pass>,
    /// Passes under the reference before each micro-batch (DPO, KTO).
    pub reference: Vec<Pass>,
    /// Whether the reference is the adapter that training starts from, and not the base alone.
    pub reference_is_adapter: bool,
    /// The largest pass of an evaluation, where something is held out.
    pub evaluation: Option<Pass>,
    /// Whether an evaluation comes before the last step, and leaves its buffers to what follows.
    pub evaluates_before: bool,
    /// Whether there is a scalar head.
    pub scorer: bool,
    /// Reward models that are trained one after another, whose adapters are kept.
    pub members: usize,
    /// Tokens of a sampled response, where a teacher is distilled: each sequence of a pass ends with one.
    pub response: Option<usize>,
    /// Whether that teacher has an adapter.
    pub taught: bool,
    /// Ranks that train together, of which this is one.
    pub ranks: usize,
    /// Optimizer steps of the run.
    pub steps: usize,
}

/// Passes of PPO.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rollouts {
    /// Prompts of the largest rollout, of all ranks.
    pub prompts: Vec<usize>,
    /// Ranks that share the sequences. Micro-batches, text and evaluation are those of one.
    pub ranks: usize,
    /// Their responses are sampled outside this process.
    pub served: bool,
    /// Responses to each of them, which are adjacent in `prompts`.
    pub generations: usize,
    /// Tokens of a response.
    pub response: usize,
    /// Number of prompts that are generated in one batch.
    pub at_once: usize,
    /// Minibatches of the run.
    pub steps: usize,
    /// The micro-batches of the largest minibatch, as (prompt, response) lengths.
    pub micro: Vec<Vec<(usize, usize)>>,
    /// Blocks of text beside each minibatch: (blocks, tokens each, blocks per pass).
    pub text: Option<(usize, usize, usize)>,
    /// Held-out prompts of one evaluation batch.
    pub evaluation: Vec<usize>,
    /// Whether they are evaluated during the run, and not only before and after it.
    pub evaluates_within: bool,
    /// A reference is held, and the KL to it measured.
    pub reference: bool,
    /// The actor's log-probabilities are computed again after a rollout.
    pub recomputes: bool,
    /// Groups of a rollout may be refilled, beside which the rollout is held.
    pub refills: bool,
    /// The advantages need a critic.
    pub critic: bool,
    /// The critic lives on the policy's base.
    pub critic_on_policy: bool,
    /// The actor's optimizer step depends on its own gradients alone: where the critic's passes run on a device, it is computed
    /// meanwhile.
    pub steps_actor_by_its_gradients: bool,
    /// The KL is taken over the whole vocabulary: in the rollout, in every pass of the loss.
    pub exact: (bool, bool),
    /// Whether `reward_adapter` is one adapter.
    pub main_reward: bool,
    /// Reward adapters beside that, gold ones among them.
    pub more_rewards: usize,
    /// The critic starts as that adapter, and not as a fresh one.
    pub critic_is_reward: bool,
    /// Whether a reward adapter scores the responses.
    pub reward_model: bool,
    /// Reward adapters that score the responses of a rollout.
    pub scoring_models: usize,
    /// Copies of the actor that are kept: its moving average, a reference that follows it, one that is sampled from ahead.
    pub copies: usize,
}

impl Rollouts {
    /// The prompts that one rank samples responses to, the most tokens of all; whole groups, since equal prompts are read once.
    pub fn own(&self) -> &[usize] {
        let share = largest_share(self.ranks, self.prompts.len(), |share| self.prompts[share].iter().sum::<usize>());
        &self.prompts[share.start / self.generations.max(1) * self.generations.max(1)..share.end]
    }
}

/// A stage's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// One learner.
    Supervised(Supervised),
    /// Actor and critic.
    Rollouts(Rollouts),
}

impl Work {
    /// Tokens of the longest sequence.
    pub(super) fn longest(&self) -> usize {
        match self {
            Self::Supervised(work) => {
                let passes = work.step.iter().chain(&work.reference).chain(&work.evaluation);
                passes.flat_map(|pass| &pass.lengths).copied().max().unwrap_or(1)
            }
            Self::Rollouts(work) => {
                let asked =
                    work.prompts.iter().chain(&work.evaluation).max().map_or(1, |prompt| prompt + work.response);
                asked.max(work.text.map_or(1, |(_, tokens, _)| tokens))
            }
        }
    }
}
