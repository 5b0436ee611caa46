//! One rollout: the actor samples responses; then reference, critic and reward source score them. The roles are borrowed
//! views (base plus adapter). It does not depend on reward shaping or on the training loop. Read `experience.rs` next.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::dschat;
use super::dynamic::Sampled;
use super::kl::Estimator;
use super::sampler::Served;
use super::scoring::{Scoring, score};
use crate::config::Ppo;
use crate::diverged;
use crate::host::meter::{Phase, within};
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets, chunks_by_tokens};
use crate::model::generate::{FinishReason, Response, SamplingParams, generate};
use crate::model::readers::Sharing;
use crate::model::roles::{Policy, ValueModel};
use crate::ops::cpu;
use crate::report::Metrics;
use crate::report::progress::{Progress, Unit};
use crate::reward::source::{KnownScores, PartScores, RewardInputs, RewardSource, SCORING_TOKENS};
use crate::train::learner::Learner;
use crate::train::world::World;

/// B responses with the outputs of the four roles. Per-token vectors are as long as the response.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// (B) prompt ids.
    pub prompts: Vec<Vec<u32>>,
    /// (B) sampled responses with the actor's log-probabilities (`old_logprobs` of the loss).
    pub responses: Vec<Response>,
    /// (B, R) log-probabilities of the sampled tokens under the reference; empty without one.
    #[serde(rename = "reference_logprobs")]
    pub ref_logprobs: Vec<Vec<f32>>,
    /// (B, R D) hidden states of the reference from which `ref_logprobs` were computed: the exact KL of a later actor needs
    /// them. Empty without a reference. Checkpoints store them separately, because they are large.
    #[serde(skip)]
    pub ref_hidden: Vec<Vec<f32>>,
    /// (B, R) exact KL from the actor to the reference, nats; empty unless the reward uses it.
    pub exact_kl: Vec<Vec<f32>>,
    /// (B, R) values of the critic for the state before each token; empty without a critic.
    pub values: Vec<Vec<f32>>,
    /// (B) values of the critic for the state after the last token; empty unless `bootstrap_truncated` asks for them.
    #[serde(default)]
    pub last_values: Vec<f32>,
    /// (B) scores of the reward source.
    pub scores: Vec<f32>,
    /// (B) number of actions of each response that are trained on, under `compat = "dschat"`; empty if all are.
    pub trained: Vec<usize>,
    /// (B, R) log-probabilities of the sampled tokens as the sampler computed them, where `responses` have the trainer's:
    /// with an importance sampling correction. Else empty.
    #[serde(default)]
    pub sampler_logprobs: Vec<Vec<f32>>,
    /// How it was sampled, if outside this process.
    #[serde(default)]
    pub served: Served,
    /// The terms of the scores, if the source is a weighted sum.
    #[serde(default)]
    pub parts: Vec<PartScores>,
    /// What dynamic sampling sampled for this rollout.
    #[serde(default)]
    pub sampled: Sampled,
    /// Extra metrics reported by the reward source.
    #[serde(rename = "told")]
    pub source_metrics: Metrics,
}

impl Rollout {
    /// Prompt and response of sequence `i`, concatenated.
    pub fn sequence(&self, i: usize) -> Vec<u32> {
        self.prompts[i].iter().chain(&self.responses[i].tokens).copied().collect()
    }

    /// The sequences `rows` as a batch, and their responses as targets.
    ///
    /// # Errors
    /// If there is no row.
    pub fn batch(&self, rows: &[usize]) -> Result<(Batch, Targets)> {
        let sequences: Vec<Vec<u32>> = rows.iter().map(|&i| self.sequence(i)).collect();
        let lengths: Vec<usize> = rows.iter().map(|&i| self.responses[i].tokens.len()).collect();
        let batch = Batch::new(&sequences)?;
        let targets = Targets::responses(&batch, &lengths)?;
        Ok((batch, targets))
    }

    /// (R,) log-probabilities of response `i` as the sampler computed them.
    pub fn sampler_logprobs(&self, i: usize) -> &[f32] {
        self.sampler_logprobs.get(i).unwrap_or(&self.responses[i].logprobs)
    }

    /// Number of responses that ended with a stop token.
    pub fn stopped(&self) -> usize {
        self.responses.iter().filter(|r| r.finish == FinishReason::Stop).count()
    }

    /// Total number of response tokens.
    pub fn response_tokens(&self) -> usize {
        self.responses.iter().map(|r| r.tokens.len()).sum()
    }
}

/// The roles that score a rollout, and how they read it.
#[derive(Clone, Copy)]
pub struct Readers<'w> {
    /// Reference policy of the KL; none where no KL is measured.
    pub reference: Option<Policy<'w>>,
    /// Base and weights of the critic, if there is one. The weights are read when the responses are there: until then the critic's
    /// last step may be under way.
    pub critic: Option<(&'w Base, &'w Learner)>,
    /// Whether the exact KL is needed, which takes a forward pass of the actor.
    pub exact_kl: bool,
    /// Whether the critic's value of the state after the last token is needed.
    pub last_values: bool,
    /// Reward source that scores whole responses.
    pub source: &'w dyn RewardSource,
    /// (B) number of each prompt's record, for reward sources that read its columns; empty if they are not known.
    pub entries: &'w [usize],
    /// Decodes token ids, for reward sources that read text.
    pub decode: &'w dyn Fn(&[u32]) -> String,
    /// Whether the trainer's log-probabilities take the place of the sampler's in the responses.
    pub recomputes: bool,
    /// Pad token, if the rollout is to be read as DeepSpeed-Chat does.
    pub pad: Option<u32>,
    /// What readers over one base on a device have in common.
    pub sharing: Sharing,
    /// The ranks that share the sequences.
    pub world: &'w World,
}

/// Sampling parameters of the actor, for rollouts and evaluations alike.
pub fn sampling_params(config: &Ppo, stop: &[u32]) -> SamplingParams {
    SamplingParams {
        temperature: config.temperature,
        top_k: config.top_k,
        top_p: config.top_p,
        max_new_tokens: config.response_length,
        stop: stop.to_vec(),
    }
}

/// The progress of sampling by tokens: those that a response does not have, since it ended before its limit, fall away.
pub(super) struct SampledTokens<'s> {
    progress: Progress,
    sampling: &'s SamplingParams,
    /// Tokens of each response of the batch.
    lengths: Vec<usize>,
}

impl<'s> SampledTokens<'s> {
    pub(super) fn new(what: &str, prompts: usize, sampling: &'s SamplingParams) -> Self {
        let most = prompts.saturating_mul(sampling.max_new_tokens);
        Self { progress: Progress::new(what, most, Unit::Of("token")), sampling, lengths: vec![] }
    }

    /// A batch of so many responses begins.
    pub(super) fn batch(&mut self, responses: usize) {
        self.lengths = vec![0; responses];
    }

    pub(super) fn token(&mut self, response: usize, token: u32) {
        self.lengths[response] += 1;
        self.progress.add(1);
        if self.sampling.stop.contains(&token) {
            self.progress.skip(self.sampling.max_new_tokens - self.lengths[response]);
        }
    }
}

/// Samples responses to `prompts` from the actor and scores them. `seeds` (B): one per sequence. At most `at_once` prompts
/// are generated in one batch; a response does not depend on the other sequences of its batch.
///
/// # Errors
/// Those of generation and of [`read`].
pub fn collect(
    actor: Policy<'_>,
    readers: Readers<'_>,
    prompts: Vec<Vec<u32>>,
    seeds: &[u64],
    sampling: &SamplingParams,
    at_once: usize,
) -> Result<Rollout> {
    let generating = within(Phase::Rollout);
    let responses = readers.world.share(prompts.len(), |mine| {
        let (prompts, seeds) = (&prompts[mine.clone()], &seeds[mine]);
        let mut responses = Vec::with_capacity(prompts.len());
        let mut sampled = SampledTokens::new("rollout", prompts.len(), sampling);
        for (prompts, seeds) in prompts.chunks(at_once).zip(seeds.chunks(at_once)) {
            sampled.batch(prompts.len());
            responses.extend(generate(actor, prompts, seeds, sampling, |s, token| sampled.token(s, token))?);
        }
        Ok(responses)
    })?;
    drop(generating);
    // Log-probabilities are at temperature 1 for greedy decoding, as in `generate`, and always for DeepSpeed-Chat.
    let temperature = if sampling.temperature > 0.0 && readers.pad.is_none() { sampling.temperature } else { 1.0 };
    read(actor, readers, prompts, responses, temperature)
}

/// What the roles find for a response, one number per token where nothing else is said.
#[derive(Serialize, Deserialize)]
struct Outputs {
    /// The actor's log-probabilities, if they are needed again.
    recomputed: Option<Vec<f32>>,
    /// Log-probabilities of the reference, and its hidden states (R D).
    of_reference: Option<(Vec<f32>, Vec<f32>)>,
    /// Exact KL from actor to reference, if it is needed.
    exact_kl: Option<Vec<f32>>,
    values: Option<Vec<f32>>,
    /// Value of the state after the last token, if it is needed.
    last_value: Option<f32>,
    /// Scores of the reward models that are read with the other roles.
    scores: Vec<f32>,
}

/// Reads the sequences `rows` of a rollout.
fn outputs(rollout: &Rollout, rows: &[usize], asked: Scoring<'_>) -> Result<Vec<Outputs>> {
    let (batch, targets) = rollout.batch(rows)?;
    let mut hidden = None;
    let scored = score(&batch, &targets, asked, |rows| {
        let (_, d) = rows.dims2()?;
        hidden = Some((rows.to_host()?, d));
        Ok(())
    })?;
    let mut last_values = scored.values.iter().flat_map(|values| &values[targets.rows.len()..]);
    let mut at = 0;
    let mut of = |(number, &i): (usize, &usize)| {
        let tokens = at..at + rollout.responses[i].tokens.len();
        at = tokens.end;
        let of_tokens = |all: &Vec<f32>| all[tokens.clone()].to_vec();
        let of_reference = match scored.ref_logprobs.as_ref().zip(hidden.as_ref()) {
            Some((logprobs, (hidden, d))) => {
                let hidden = cpu::view(hidden)?[tokens.start * d..tokens.end * d].to_vec();
                Some((of_tokens(logprobs), hidden))
            }
            None => None,
        };
        Ok(Outputs {
            recomputed: scored.logprobs.as_ref().map(of_tokens),
            of_reference,
            exact_kl: scored.exact_kl.as_ref().map(of_tokens),
            values: scored.values.as_ref().map(of_tokens),
            last_value: last_values.next().copied(),
            scores: scored.scores.iter().map(|scores| scores[number]).collect(),
        })
    };
    rows.iter().enumerate().map(&mut of).collect()
}

/// Scores given responses by actor, reference, critic and reward source. If `readers` has a pad token, responses are
/// dropped and padded as in DeepSpeed-Chat, and all of them may be dropped.
///
/// # Errors
/// Those of the forward passes and of the reward source.
pub fn read(
    actor: Policy<'_>,
    readers: Readers<'_>,
    prompts: Vec<Vec<u32>>,
    responses: Vec<Response>,
    temperature: f64,
) -> Result<Rollout> {
    let _scoring = within(Phase::Scoring);
    let mut entries = readers.entries.to_vec();
    let (mut rollout, scored) = match readers.pad {
        None => (Rollout { prompts, responses, ..Rollout::default() }, None),
        Some(pad) => {
            let dschat::PaddedRollout { rows, prompts: trimmed, responses, trained, scored } =
                dschat::pad_rollout(&prompts, responses, pad);
            let original: Vec<Vec<u32>> = rows.iter().map(|&row| prompts[row].clone()).collect();
            entries = rows.iter().filter_map(|&row| readers.entries.get(row).copied()).collect();
            (Rollout { prompts: trimmed, responses, trained, ..Rollout::default() }, Some((original, scored)))
        }
    };
    let lengths: Vec<usize> = (0..rollout.prompts.len()).map(|i| rollout.sequence(i).len()).collect();
    let recomputes = scored.is_some() || readers.recomputes;
    // Reward models over a base on a device are read with the roles beside them, which see the same sequences.
    let joins = readers.sharing != Sharing::Apart && scored.is_none();
    let mut models = if joins { readers.source.models() } else { vec![] };
    models.retain(|model| model.base().place().is_some());
    let critic = readers.critic.map(|(base, learner)| ValueModel::new(base, learner.weights().view()));
    let asked = Scoring {
        actor: Some(actor),
        // Generation did not compute the pads' log-probabilities, nor those after a prompt without its leading pads.
        recomputes,
        reference: readers.reference,
        exact_kl: readers.exact_kl,
        critic: critic.transpose()?,
        last_values: readers.last_values,
        models: &models,
        sharing: readers.sharing,
        temperature,
    };
    let is_read = readers.reference.is_some() || readers.critic.is_some() || recomputes || !models.is_empty();
    let chunks = if is_read { chunks_by_tokens(&lengths, SCORING_TOKENS) } else { vec![] };
    let outputs = readers.world.share(chunks.len(), |mine| {
        let chunks = &chunks[mine];
        let mut progress = Progress::new("scoring", chunks.iter().map(Vec::len).sum(), Unit::Of("response"));
        let of = |rows: &Vec<usize>| {
            let outputs = outputs(&rollout, rows, asked);
            progress.add(rows.len());
            outputs
        };
        chunks.iter().map(of).collect()
    })?;
    let known = |model| KnownScores { model, scores: Vec::with_capacity(lengths.len()) };
    let mut known: Vec<KnownScores<'_>> = models.iter().copied().map(known).collect();
    for (i, outputs) in outputs.into_iter().flatten().enumerate() {
        known.iter_mut().zip(outputs.scores).for_each(|(known, score)| known.scores.push(score));
        if let Some(trainers) = outputs.recomputed {
            let samplers = std::mem::replace(&mut rollout.responses[i].logprobs, trainers);
            rollout.sampler_logprobs.extend(readers.recomputes.then_some(samplers));
        }
        if let Some((logprobs, hidden)) = outputs.of_reference {
            rollout.ref_logprobs.push(logprobs);
            rollout.ref_hidden.push(hidden);
        }
        rollout.exact_kl.extend(outputs.exact_kl);
        rollout.values.extend(outputs.values);
        rollout.last_values.extend(outputs.last_value);
    }
    if rollout.prompts.is_empty() {
        return Ok(rollout);
    }
    let (prompts, responses) = match &scored {
        None => (&rollout.prompts, &rollout.responses),
        Some((prompts, responses)) => (prompts, responses),
    };
    let inputs = RewardInputs { prompts, responses, entries: &entries, decode: readers.decode, known: &known };
    rollout.scores = readers.source.scores(&inputs)?;
    if let Some(bad) = rollout.scores.iter().find(|score| !score.is_finite()) {
        return Err(diverged!("the score of a response is {bad}"));
    }
    (rollout.source_metrics, rollout.parts) = (readers.source.metrics(), readers.source.parts());
    let (scores, responses) = (rollout.scores.len(), rollout.prompts.len());
    ensure!(scores == responses, "the reward source returned {scores} scores for {responses} responses");
    Ok(rollout)
}

/// (B, R) log-probabilities of a rollout's tokens under `policy`.
///
/// # Errors
/// Those of the forward passes.
pub fn logprobs_under(policy: Policy<'_>, rollout: &Rollout, temperature: f64, world: &World) -> Result<Vec<Vec<f32>>> {
    let _scoring = within(Phase::Scoring);
    let lengths: Vec<usize> = (0..rollout.prompts.len()).map(|i| rollout.sequence(i).len()).collect();
    let chunks = chunks_by_tokens(&lengths, SCORING_TOKENS);
    let of = |rows: &Vec<usize>| -> Result<Vec<Vec<f32>>> {
        let (batch, targets) = rollout.batch(rows)?;
        let mut logprobs = policy.logprobs(&batch, &targets, temperature)?.logprobs.into_iter();
        Ok(rows.iter().map(|&i| logprobs.by_ref().take(rollout.responses[i].tokens.len()).collect()).collect())
    };
    let found = world.share(chunks.len(), |mine| chunks[mine].iter().map(of).collect())?;
    Ok(found.into_iter().flatten().collect())
}

/// Mean KL(sampling policy || `actor`) over a rollout's tokens, nats per token, by the k3 estimate `r - 1 - log r` from the
/// sampled tokens: what `policy_loss = "kl_penalty"` adapts by, once all updates are made. NaN if the actor's
/// log-probabilities are.
///
/// # Errors
/// Those of the forward passes.
pub fn kl_to_sampler(actor: Policy<'_>, rollout: &Rollout, temperature: f64, world: &World) -> Result<f64> {
    let _scoring = within(Phase::Scoring);
    let lengths: Vec<usize> = (0..rollout.prompts.len()).map(|i| rollout.sequence(i).len()).collect();
    let chunks = chunks_by_tokens(&lengths, SCORING_TOKENS);
    let of = |rows: &Vec<usize>| -> Result<(f64, usize)> {
        let (batch, targets) = rollout.batch(rows)?;
        let now = actor.logprobs(&batch, &targets, temperature)?.logprobs;
        let sampled = rows.iter().flat_map(|&i| &rollout.responses[i].logprobs);
        let sum = sampled.zip(&now).map(|(&old, &now)| Estimator::K3.of(old.into(), now.into())).sum::<f64>();
        Ok((sum, now.len()))
    };
    let sums = world.share(chunks.len(), |mine| chunks[mine].iter().map(of).collect())?;
    let (sum, tokens) = sums.into_iter().fold((0.0, 0), |(sum, tokens), (more, n)| (sum + more, tokens + n));
    Ok(sum / tokens.max(1) as f64)
}
