//! One rollout: the actor answers, then reference, critic and reward source read what it wrote. The roles are views, all
//! borrowed. Knows no reward shaping; read rewards.rs next.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::dschat;
use super::train::Task;
use crate::diverged;
use crate::host::meter::{Phase, within};
use crate::model::batch::{Batch, Targets, chunks_by_tokens};
use crate::model::generate::{FinishReason, Response, SamplingParams, generate};
use crate::model::roles::{Policy, ValueModel};
use crate::ops::cpu;
use crate::report::Figures;
use crate::reward::source::{Answers, RewardSource};

/// Tokens of one scoring pass: enough to fill the cores, few enough to hold little.
const SCORING_TOKENS: usize = 2048;

/// What the four roles said of each of B sequences. Per-token vectors are as long as the response.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// (B) prompt ids.
    pub prompts: Vec<Vec<u32>>,
    /// (B) sampled responses with the actor's log-probabilities.
    pub responses: Vec<Response>,
    /// (B, R) the reference's log-probabilities of the same tokens.
    pub reference_logprobs: Vec<Vec<f32>>,
    /// (B, R D) the reference's hidden states that those came from: what the exact KL of a later actor needs of it.
    /// Kept apart in checkpoints: they are many.
    #[serde(skip)]
    pub reference_rows: Vec<Vec<f32>>,
    /// (B, R) the exact KL from the actor to the reference, nats; only where the reward is made of it.
    pub exact_kl: Vec<Vec<f32>>,
    /// (B, R) the critic's values: of the state before each token. None without a critic.
    pub values: Vec<Vec<f32>>,
    /// (B) the reward source's scores.
    pub scores: Vec<f32>,
    /// (B) how many of each response's actions are trained on, under `compat = "dschat"`; empty where all are.
    pub trained: Vec<usize>,
    /// What the source told besides.
    pub told: Figures,
}

impl Rollout {
    /// Prompt and response of sequence `i` end to end.
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

    /// How many responses ended by a stop token.
    pub fn stopped(&self) -> usize {
        self.responses.iter().filter(|r| r.finish == FinishReason::Stop).count()
    }

    /// Tokens of all responses.
    pub fn response_tokens(&self) -> usize {
        self.responses.iter().map(|r| r.tokens.len()).sum()
    }
}

/// The roles that read.
#[derive(Clone, Copy)]
pub struct Readers<'w> {
    /// The frozen policy that the KL is against.
    pub reference: Policy<'w>,
    /// Values of states.
    pub critic: Option<ValueModel<'w>>,
    /// Whether the exact KL is wanted, which takes a forward pass of the actor.
    pub exact_kl: bool,
    /// Scores of whole answers.
    pub source: &'w dyn RewardSource,
}

/// Answers `prompts`, which are some of the task's, with the actor and has the others read. `seeds` (B): one a sequence.
/// So many are answered `at_once`: an answer is the same whatever is sampled beside it.
///
/// # Errors
/// Those of generation and of [`read`].
pub fn collect(
    actor: Policy<'_>,
    readers: Readers<'_>,
    task: &Task<'_>,
    prompts: Vec<Vec<u32>>,
    seeds: &[u64],
    sampling: &SamplingParams,
    at_once: usize,
) -> Result<Rollout> {
    let rolling = within(Phase::Rollout);
    let mut responses = Vec::with_capacity(prompts.len());
    for (prompts, seeds) in prompts.chunks(at_once).zip(seeds.chunks(at_once)) {
        responses.extend(generate(actor, prompts, seeds, sampling, |_, _| {})?);
    }
    drop(rolling);
    // Greedy decoding scores under temperature 1, like `generate`; DeepSpeed-Chat always does.
    let temperature = if sampling.temperature > 0.0 && task.pad.is_none() { sampling.temperature } else { 1.0 };
    read(actor, readers, task, prompts, responses, temperature)
}

/// Has actor, reference, critic and reward source read answers that are there. Where the task has a pad token, answers are
/// kept and read as DeepSpeed-Chat does: there may be none left.
///
/// # Errors
/// Those of the views and of the reward source.
pub fn read(
    actor: Policy<'_>,
    readers: Readers<'_>,
    task: &Task<'_>,
    prompts: Vec<Vec<u32>>,
    responses: Vec<Response>,
    temperature: f64,
) -> Result<Rollout> {
    let _scoring = within(Phase::Scoring);
    let (mut rollout, scored) = match task.pad {
        None => (Rollout { prompts, responses, ..Rollout::default() }, None),
        Some(pad) => {
            let dschat::Kept { rows, prompts: read, responses, trained, scored } =
                dschat::keep(&prompts, responses, pad);
            let asked: Vec<Vec<u32>> = rows.into_iter().map(|row| prompts[row].clone()).collect();
            (Rollout { prompts: read, responses, trained, ..Rollout::default() }, Some((asked, scored)))
        }
    };
    let lengths: Vec<usize> = (0..rollout.prompts.len()).map(|i| rollout.sequence(i).len()).collect();
    for rows in chunks_by_tokens(&lengths, SCORING_TOKENS) {
        let (batch, targets) = rollout.batch(&rows)?;
        // The pads' log-probabilities are not known yet, nor those of an actor that reads another prompt than it answered.
        let read = scored.is_some().then(|| actor.logprobs(&batch, &targets, temperature)).transpose()?;
        let hidden = readers.reference.rows(&batch, &targets)?;
        let reference = readers.reference.logprobs_of(&hidden, &targets, temperature)?.logprobs;
        let values = readers.critic.map(|critic| critic.values(&batch, &targets.rows)).transpose()?;
        let exact = match readers.exact_kl {
            true => Some(actor.kl(&actor.rows(&batch, &targets)?, (readers.reference, &hidden), temperature)?),
            false => None,
        };
        let (_, d) = hidden.dims2()?;
        let hidden = cpu::view(&hidden)?;
        let mut at = 0;
        for &i in &rows {
            let next = at + rollout.responses[i].tokens.len();
            if let Some(read) = &read {
                rollout.responses[i].logprobs = read.logprobs[at..next].to_vec();
            }
            rollout.reference_logprobs.push(reference[at..next].to_vec());
            rollout.reference_rows.push(hidden[at * d..next * d].to_vec());
            rollout.values.extend(values.as_ref().map(|values| values[at..next].to_vec()));
            rollout.exact_kl.extend(exact.as_ref().map(|exact| exact[at..next].to_vec()));
            at = next;
        }
    }
    if rollout.prompts.is_empty() {
        return Ok(rollout);
    }
    let (prompts, responses) = match &scored {
        None => (&rollout.prompts, &rollout.responses),
        Some((prompts, responses)) => (prompts, responses),
    };
    let answers = Answers { prompts, responses, decode: task.decode };
    rollout.scores = readers.source.scores(&answers)?;
    if let Some(bad) = rollout.scores.iter().find(|score| !score.is_finite()) {
        return Err(diverged!("an answer's score is {bad}"));
    }
    rollout.told = readers.source.figures();
    let (scores, asked) = (rollout.scores.len(), rollout.prompts.len());
    ensure!(scores == asked, "the reward source gave {scores} scores for {asked} answers");
    Ok(rollout)
}
