//! The reward-model stage: ranked responses, all their pairs from one forward pass of K sequences, an adapter with a
//! scalar head.
//!
//! It does not depend on a tokenizer or the planner. Read `loss.rs` for the formulas.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::center::Centering;
use super::dschat::{Padding, Rows};
use super::length::LengthReport;
use super::loss::{Scored, WindowLoss, divergence_to_end_labelled, judged, labelled, ranked};
use super::shown;
use crate::config::{Reward, RewardLoss, Supervised};
use crate::data::PairLabel;
use crate::data::examples::objectives::RankedExample;
use crate::data::examples::{Examples, PassSize, passes, pick};
use crate::error::counted;
use crate::host::meter::{Phase, within};
use crate::invalid;
use crate::model::adapter::{Adapter, Gradients};
use crate::model::base::Base;
use crate::model::batch::Batch;
use crate::model::block::Recompute;
use crate::model::roles::ValueModel;
use crate::report::progress::{Progress, Unit};
use crate::report::{Figures, number};
use crate::rng::derive;
use crate::stats::Histogram;
use crate::train::session::Session;
use crate::train::settings;
use crate::train::supervised::{Finished, OptimizerStep, Setup, SupervisedStage, Trained, Training};
use crate::train::world::World;

/// Comparisons per pass of [`scores`] and [`evaluate`], which no config bounds.
const SCORED_AT_ONCE: PassSize = PassSize::of(8);
/// Training comparisons from which `center` computes mean and standard deviation.
pub(crate) const CENTER_ON: usize = 256;

/// A reward model's results on comparisons. Scores are those of the last tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Share of pairs whose better response has the higher score; NaN if there is no pair.
    pub accuracy: f64,
    /// Mean score of the best responses.
    pub mean_chosen: f64,
    /// Mean score of all others.
    pub mean_rejected: f64,
    /// Pairs compared.
    pub pairs: usize,
}

/// The form in JSON, which has no NaN: accuracy, chosen, rejected, pairs.
type InJson = (Option<f64>, Option<f64>, Option<f64>, usize);

impl Evaluation {
    fn to_json(self) -> InJson {
        (Some(self.accuracy), Some(self.mean_chosen), Some(self.mean_rejected), self.pairs)
    }

    fn from_json((accuracy, chosen, rejected, pairs): InJson) -> Self {
        let [accuracy, mean_chosen, mean_rejected] = [accuracy, chosen, rejected].map(|x| x.unwrap_or(f64::NAN));
        Self { accuracy, mean_chosen, mean_rejected, pairs }
    }
}

/// The stage's results.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Results on the held-out comparisons before training.
    pub before: Evaluation,
    /// Results on the held-out comparisons after training.
    pub after: Evaluation,
    /// Scores after training against the lengths of the held-out responses.
    pub lengths: LengthReport,
    /// Optimizer steps, of all members of an ensemble.
    pub steps: usize,
    /// Tokens that went through the network in training.
    pub tokens: usize,
    /// What `center` did, if it was asked for.
    pub center: Option<Centering>,
}

/// Trains a copy of `start`, with a fresh head where it has none, on `examples`; `held_out` only evaluates.
///
/// # Errors
/// If there is no example, a sequence is longer than the context, the guard gives up, or the process was asked to
/// stop.
pub fn train(
    setup: Setup<'_>,
    examples: &(impl Examples<RankedExample> + ?Sized),
    held_out: &(impl Examples<RankedExample> + ?Sized),
    config: &Reward,
    session: &mut Session,
) -> Result<(Adapter, Summary)> {
    train_on_rows(setup, examples, held_out, config, None, session)
}

/// As [`train`], on rows with pads where there is a `padding`: DeepSpeed-Chat's loss, and scores read where it reads
/// them.
///
/// # Errors
/// Those of [`train`]; if a comparison is not of two responses.
#[allow(clippy::too_many_arguments)]
pub fn train_on_rows(
    setup: Setup<'_>,
    examples: &(impl Examples<RankedExample> + ?Sized),
    held_out: &(impl Examples<RankedExample> + ?Sized),
    config: &Reward,
    padding: Option<Padding>,
    session: &mut Session,
) -> Result<(Adapter, Summary)> {
    let start = setup.start;
    let members = train_members(setup, &|_| Ok(start.clone()), examples, held_out, config, padding, session)?;
    let first = members.into_iter().next().context("an ensemble has a member")?;
    Ok((first.adapter, first.summary))
}

/// A trained reward model.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its adapter.
    pub adapter: Adapter,
    /// Its results.
    pub summary: Summary,
    /// Its scores of the held-out comparisons without ties, the preferred response first.
    pub scores: Vec<Vec<f32>>,
    /// The lengths of those responses in tokens.
    pub response_lengths: Vec<Vec<usize>>,
}

/// Trains `ensemble` reward models one after another over the one base, of which only the one in training has an optimizer:
/// member m from `start(m)`, with a fresh head where it has none and an order of the examples by `seed + m`. The first is what
/// [`train_on_rows`] makes. Among several ranks, rank 0 alone gets them.
///
/// # Errors
/// Those of [`train_on_rows`] and of `start`.
#[allow(clippy::too_many_arguments)]
pub fn train_members(
    setup: Setup<'_>,
    start: &dyn Fn(usize) -> Result<Adapter>,
    examples: &(impl Examples<RankedExample> + ?Sized),
    held_out: &(impl Examples<RankedExample> + ?Sized),
    config: &Reward,
    padding: Option<Padding>,
    session: &mut Session,
) -> Result<Vec<Member>> {
    ensure!(padding.is_some() == config.compat.is_some(), "rows have pads if and only if [reward] has compat");
    if examples.is_empty() {
        return Err(invalid!("[reward] there is no comparison to train on"));
    }
    let Setup { base, recompute, seed, .. } = setup;
    let started = |member: usize| {
        let start = start(member)?;
        match start.head() {
            Some(_) => Ok(start),
            None => start.with_head(derive(seed.wrapping_add(member as u64), &[settings::HEAD])),
        }
    };
    let size = settings::evaluation_size(&config.supervised());
    let stage = BradleyTerry { base, held_out, size, loss: config.loss, padding, recompute };
    let mut resumed = session.resumed()?;
    let mut finished = match &resumed {
        Some(snapshot) => Finished::load(snapshot, &started(0)?)?,
        None => Finished::default(),
    };
    let (mut before, first) = (vec![], finished.adapters.len());
    for member in 0..config.ensemble {
        // The former one's optimizer goes with it; the last one's stays until its weights are saved.
        session.begin_again();
        let start = started(member)?;
        let name = if member == 0 { "before".to_owned() } else { format!("before {member}") };
        let setup = Setup { base, start: &start, recompute, seed: seed.wrapping_add(member as u64) };
        let mut training =
            Training::new(setup, &start, config.supervised(), settings::REWARD_ORDER, examples, &session.world)?;
        if member == 0 {
            session.report.stage("reward", config.ensemble * training.steps());
        }
        let found = session.once(&name, |_| {
            let scores = scores_of_rows(base, &start, held_out, size, padding)?;
            Ok(summarise(&preferred_first(scores, held_out)?.0)?.to_json())
        })?;
        before.push(Evaluation::from_json(found));
        if member < first {
            continue;
        }
        training.go_on(resumed.take(), session)?;
        let of = if config.ensemble > 1 { format!(", member {member}") } else { String::new() };
        let comparisons = counted(examples.len(), "comparison");
        session.report.note(&match held_out.len() {
            0 => format!("reward: {comparisons}, none held out{of}"),
            _ => format!("reward: {comparisons}, held-out accuracy {:.3} before{of}", before[member].accuracy),
        });
        let Trained { adapter, steps, tokens } = match config.ensemble {
            1 => training.run(&stage, session)?,
            _ => training.run_after(&finished, &stage, session)?,
        };
        finished.adapters.push(adapter);
        finished.steps += steps;
        finished.tokens += tokens;
    }
    let (steps, tokens) = (finished.steps, finished.tokens);
    if !session.world.is_first() {
        return Ok(vec![]);
    }
    let mut members = vec![];
    for (member, (mut trained, before)) in finished.adapters.into_iter().zip(before).enumerate() {
        let mut center = None;
        if config.center {
            let some = pick(examples, 0..examples.len().min(CENTER_ON))?;
            let some: Vec<RankedExample> = some.into_iter().map(Cow::into_owned).collect();
            let scores = scores_of_rows(base, &trained, &some, size, padding)?;
            let scores: Vec<f64> = scores.into_iter().flatten().map(f64::from).collect();
            trained = center.insert(Centering::of(&scores)).apply(trained)?;
        }
        let (scores, lengths) = preferred_first(scores_of_rows(base, &trained, held_out, size, padding)?, held_out)?;
        let after = summarise(&scores)?;
        let report = LengthReport::of(&scores, &lengths);
        if config.ensemble == 1 {
            log_distributions(&scores, session);
        }
        let named = if config.ensemble > 1 { format!("reward, member {member}") } else { "reward".into() };
        if !held_out.is_empty() {
            session.report.note(&format!(
                "{named}: held-out accuracy {:.3} -> {:.3} on {}, mean chosen {:.3}, rejected {:.3}",
                before.accuracy,
                after.accuracy,
                counted(after.pairs, "pair"),
                after.mean_chosen,
                after.mean_rejected
            ));
        }
        for warning in shown::warnings(examples.len(), &after, center.as_ref()) {
            session.report.warn(&format!("{named}: warning: {warning}"));
        }
        members.push(Member {
            adapter: trained,
            summary: Summary { before, after, lengths: report, steps, tokens, center },
            scores,
            response_lengths: lengths,
        });
    }
    session.report.done();
    Ok(members)
}

/// The stage's loss and evaluation.
struct BradleyTerry<'w, H: ?Sized> {
    base: &'w Base,
    held_out: &'w H,
    size: PassSize,
    loss: RewardLoss,
    padding: Option<Padding>,
    recompute: Recompute,
}

impl<H: Examples<RankedExample> + ?Sized> SupervisedStage<RankedExample> for BradleyTerry<'_, H> {
    type Sums = StepSums;

    const TOKENS: &'static str = "tokens";
    const SHOWN: &'static [&'static str] = &["loss", "accuracy", "eval_accuracy"];
    const COUNTS_REJECTED: bool = true;

    fn begin(&self, _: &Adapter, step: &OptimizerStep<'_, RankedExample>) -> Result<StepSums> {
        Ok(StepSums { weight: 1.0 / step.examples() as f64, ..StepSums::default() })
    }

    fn share(_: &mut StepSums, _: &World) -> Result<()> {
        Ok(())
    }

    fn gradients(
        &self,
        adapter: &Adapter,
        _: &[usize],
        examples: &[Cow<'_, RankedExample>],
        sums: &mut StepSums,
    ) -> Result<Gradients> {
        let model = ValueModel::new(self.base, adapter)?;
        let weight = sums.weight;
        if let Some(padding) = self.padding {
            let rows = padding.rows(examples)?;
            let all: Vec<usize> = (0..rows.batch.tokens().len()).collect();
            let loss = |scores: &[f32]| padded(&rows, scores, &padding, weight, sums);
            return Ok(model.gradients(&rows.batch, &all, self.recompute, loss)?.1);
        }
        let batch = pack(examples)?;
        let rows = match self.loss {
            RewardLoss::LastToken => batch.last_rows(),
            RewardLoss::DivergenceToEnd => (0..batch.tokens().len()).collect(),
        };
        let (_, gradients) = model.gradients(&batch, &rows, self.recompute, |scores| match self.loss {
            RewardLoss::LastToken => last_token(examples, scores, weight, sums),
            RewardLoss::DivergenceToEnd => divergence(examples, &batch, scores, weight, sums),
        })?;
        Ok(gradients)
    }

    fn total(sums: &mut StepSums, world: &World) -> Result<()> {
        let mut all = [sums.loss, sums.right as f64, sums.pairs as f64];
        world.sum(&mut all)?;
        (sums.loss, sums.right, sums.pairs) = (all[0], all[1] as usize, all[2] as usize);
        Ok(())
    }

    fn loss(sums: &StepSums) -> f64 {
        sums.loss
    }

    fn metrics(sums: &StepSums) -> Figures {
        let accuracy = sums.right as f64 / sums.pairs as f64;
        Figures::from_iter([("loss".to_owned(), number(sums.loss)), ("accuracy".to_owned(), number(accuracy))])
    }

    fn evaluate(&self, adapter: &Adapter) -> Result<Figures> {
        let scores = scores_of_rows(self.base, adapter, self.held_out, self.size, self.padding)?;
        let (scores, lengths) = preferred_first(scores, self.held_out)?;
        let evaluation = summarise(&scores)?;
        let means = [
            ("eval_accuracy", evaluation.accuracy),
            ("eval_chosen", evaluation.mean_chosen),
            ("eval_rejected", evaluation.mean_rejected),
        ];
        let mut metrics: Figures = means.map(|(name, mean)| (name.to_owned(), number(mean))).into_iter().collect();
        metrics.extend(LengthReport::of(&scores, &lengths).named("eval_"));
        metrics.extend(distributions(&scores).map(|(name, found)| (format!("histogram/{name}"), found)));
        Ok(metrics)
    }
}

/// Logs the distributions of the held-out scores after training.
pub(crate) fn log_distributions(comparisons: &[Vec<f32>], session: &mut Session) {
    let found = distributions(comparisons);
    found.for_each(|(name, found)| session.report.fact(&format!("histogram/reward/{name}"), &found));
}

/// The distributions of the best responses' scores and of all others'.
fn distributions(comparisons: &[Vec<f32>]) -> impl Iterator<Item = (&'static str, Value)> {
    let chosen = Histogram::of(comparisons.iter().map(|scores| f64::from(scores[0])));
    let rejected = Histogram::of(comparisons.iter().flat_map(|scores| &scores[1..]).map(|&score| f64::from(score)));
    [("eval_chosen", chosen), ("eval_rejected", rejected)]
        .into_iter()
        .filter_map(|(name, of)| Some((name, of?.to_json())))
}

/// All responses of all examples, each after its prompt: best first within an example.
fn pack(examples: &[Cow<'_, RankedExample>]) -> Result<Batch> {
    let sequences: Vec<Vec<u32>> =
        examples.iter().flat_map(|e| e.responses.iter().map(|a| e.prompt.iter().chain(a).copied().collect())).collect();
    Batch::new(&sequences)
}

/// Loss and accuracy of a step's pairs.
#[derive(Default)]
struct StepSums {
    /// 1 / the number of examples in the step, of all ranks. It divides every micro-batch's loss, so accumulation and ranks
    /// change nothing.
    weight: f64,
    loss: f64,
    right: usize,
    pairs: usize,
}

impl StepSums {
    fn window(&mut self, loss: &WindowLoss, share: f64, label: PairLabel) {
        self.loss += loss.loss * share;
        let [right, pairs] = judged([loss.chosen_end, loss.rejected_end], label);
        self.right += right;
        self.pairs += pairs;
    }
}

/// dL/dscore at every token and pad of [`Padding::rows`].
fn padded(rows: &Rows, scores: &[f32], padding: &Padding, weight: f64, sums: &mut StepSums) -> Result<Vec<f32>> {
    let mut grads = Vec::with_capacity(scores.len());
    for pair in 0..rows.ends.len() / 2 {
        let loss = rows.loss(pair, scores, padding)?;
        sums.window(&loss, weight, PairLabel::default());
        grads.extend(loss.chosen_grad.iter().chain(&loss.rejected_grad).map(|&g| (f64::from(g) * weight) as f32));
    }
    Ok(grads)
}

/// dL/dscore at the last tokens; `weight` divides by the examples of the step.
fn last_token(
    examples: &[Cow<'_, RankedExample>],
    scores: &[f32],
    weight: f64,
    sums: &mut StepSums,
) -> Result<Vec<f32>> {
    let mut grads = Vec::with_capacity(scores.len());
    let mut at = 0;
    for example in examples {
        let next = at + example.responses.len();
        let loss = match &scores[at..next] {
            &[chosen, rejected] => labelled([chosen, rejected], example.label)?,
            more => ranked(more)?,
        };
        sums.loss += loss.loss * weight;
        sums.right += loss.right;
        sums.pairs += loss.pairs;
        grads.extend(loss.grads.iter().map(|g| (f64::from(*g) * weight) as f32));
        at = next;
    }
    Ok(grads)
}

/// dL/dscore at every token, the mean over an example's pairs.
fn divergence(
    examples: &[Cow<'_, RankedExample>],
    batch: &Batch,
    scores: &[f32],
    weight: f64,
    sums: &mut StepSums,
) -> Result<Vec<f32>> {
    let mut grads = vec![0f32; scores.len()];
    let offsets = batch.offsets();
    let mut first = 0;
    for example in examples {
        let k = example.responses.len();
        let share = weight / (k * (k - 1) / 2) as f64;
        let rows = |i: usize| offsets[first + i]..offsets[first + i + 1];
        let scored = |i: usize| Scored { tokens: &batch.tokens()[rows(i)], scores: &scores[rows(i)] };
        for better in 0..k {
            for worse in better + 1..k {
                let loss = divergence_to_end_labelled(scored(better), scored(worse), example.label)?;
                sums.window(&loss, share, example.label);
                for (i, g) in [(better, &loss.chosen_grad), (worse, &loss.rejected_grad)] {
                    for (sum, &g) in grads[rows(i)].iter_mut().zip(g) {
                        *sum += (f64::from(g) * share) as f32;
                    }
                }
            }
        }
        first += k;
    }
    Ok(grads)
}

/// Last-token scores of every response, one list per example.
///
/// # Errors
/// If the adapter is another base's or has no head, or a sequence is longer than the context.
pub fn scores(
    base: &Base,
    adapter: &Adapter,
    examples: &(impl Examples<RankedExample> + ?Sized),
) -> Result<Vec<Vec<f32>>> {
    scores_of_rows(base, adapter, examples, SCORED_AT_ONCE, None)
}

fn scores_of_rows(
    base: &Base,
    adapter: &Adapter,
    examples: &(impl Examples<RankedExample> + ?Sized),
    size: PassSize,
    padding: Option<Padding>,
) -> Result<Vec<Vec<f32>>> {
    let _phase = within(Phase::Evaluation);
    let scorer = ValueModel::new(base, adapter)?;
    let mut all = Vec::with_capacity(examples.len());
    let mut progress = Progress::new("evaluation", examples.len(), Unit::Of("comparison"));
    for rows in passes(examples, size) {
        progress.set(rows.start);
        let some = pick(examples, rows)?;
        let scores = match padding {
            None => scorer.scores(&pack(&some)?)?,
            Some(padding) => {
                let rows = padding.rows(&some)?;
                scorer.values(&rows.batch, &rows.last_rows())?
            }
        };
        let mut at = 0;
        for example in some {
            all.push(scores[at..at + example.responses.len()].to_vec());
            at += example.responses.len();
        }
    }
    Ok(all)
}

/// One list of scores, and one of lengths, per comparison.
type ScoresAndLengths = (Vec<Vec<f32>>, Vec<Vec<usize>>);

/// Scores and lengths in tokens of the examples' responses, the preferred one first, without the ties among pairs.
fn preferred_first(
    scores: Vec<Vec<f32>>,
    examples: &(impl Examples<RankedExample> + ?Sized),
) -> Result<ScoresAndLengths> {
    let (mut kept, mut lengths, mut scores) = (vec![], vec![], scores.into_iter());
    for row in 0..examples.len() {
        let example = examples.get(row)?;
        let Some(found) = scores.next().and_then(|scores| example.label.preferred_first(scores)) else { continue };
        kept.push(found);
        lengths.extend(example.label.preferred_first(example.responses.iter().map(Vec::len).collect::<Vec<_>>()));
    }
    Ok((kept, lengths))
}

/// Accuracy and mean scores over comparisons.
///
/// # Errors
/// As for [`scores`].
pub fn evaluate(
    base: &Base,
    adapter: &Adapter,
    examples: &(impl Examples<RankedExample> + ?Sized),
) -> Result<Evaluation> {
    evaluate_rows(base, adapter, examples, None)
}

/// As [`evaluate`], with scores read as [`train_on_rows`] reads them.
///
/// # Errors
/// As for [`scores`]; if a comparison on padded rows is not of two responses.
pub fn evaluate_rows(
    base: &Base,
    adapter: &Adapter,
    examples: &(impl Examples<RankedExample> + ?Sized),
    padding: Option<Padding>,
) -> Result<Evaluation> {
    summarise(&preferred_first(scores_of_rows(base, adapter, examples, SCORED_AT_ONCE, padding)?, examples)?.0)
}

/// Accuracy and means of scores, one list per comparison, best response first.
///
/// # Errors
/// If a list has fewer than two scores, or one is not finite.
pub fn summarise(comparisons: &[Vec<f32>]) -> Result<Evaluation> {
    let (mut right, mut pairs, mut chosen, mut rejected, mut others) = (0usize, 0usize, 0f64, 0f64, 0usize);
    for scores in comparisons {
        let loss = ranked(scores)?;
        right += loss.right;
        pairs += loss.pairs;
        chosen += f64::from(scores[0]);
        rejected += scores[1..].iter().map(|&s| f64::from(s)).sum::<f64>();
        others += scores.len() - 1;
    }
    Ok(Evaluation {
        accuracy: right as f64 / pairs as f64,
        mean_chosen: chosen / comparisons.len() as f64,
        mean_rejected: rejected / others as f64,
        pairs,
    })
}
