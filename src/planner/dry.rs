//! Device memory of a stage: its largest passes, run by the network itself on a machine that only counts. There is no second
//! copy of the arithmetic.
//!
//! It does not depend on files or tokenizers. Read `passes.rs` for the passes, and `device/dry.rs` for the machine.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::device::select::{CONTEXT_BYTES, WORKSPACE_BYTES};
use crate::device::{Device, DeviceChoice};
use crate::host::meter::Phase;
use crate::model::adapter::{Adapter, Gradients, TargetModule};
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets, chunks_by_tokens};
use crate::model::block::Recompute;
use crate::model::decoding::Decoding;
use crate::model::generate::MAX_INITIAL_CAPACITY;
use crate::model::readers::Sharing;
use crate::model::roles::{HeadGradients, Policy, ValueModel};
use crate::model_files::assemble;
use crate::ops::divergence::Divergence;
use crate::ops::linear::gpu::Dequantising;
use crate::ops::sample::Distribution;
use crate::ops::weight::Weight;
use crate::planner::plan::RESERVE;
use crate::planner::simulate::shape::Network;
use crate::planner::simulate::stages::StageShape;
use crate::planner::simulate::work::{Pass, Rollouts, Supervised, Work};
use crate::ppo::scoring::{Scoring, score};
use crate::reward::source::SCORING_TOKENS;

/// Where the bases of a stage lie, and the adapters over them.
#[derive(Clone, Debug)]
pub struct OnDevice {
    /// The machine of the policy's base.
    pub policy: DeviceChoice,
    /// The machine of the base of critic and reward model.
    pub scorer: DeviceChoice,
    /// The trained adapter; the actor's in PPO.
    pub start: Adapter,
    /// The adapter of critic and reward model, with a scalar head.
    pub reward: Adapter,
    /// Bytes that each device has room for, where that is known.
    pub rooms: BTreeMap<DeviceChoice, usize>,
}

impl OnDevice {
    /// Do passes leave no activations on the host?
    pub fn is_whole(&self) -> bool {
        [self.policy, self.scorer].iter().all(|&choice| is_device(choice))
    }
}

/// What a device's memory is taken by beside what is allocated through it.
pub const BESIDE: usize = CONTEXT_BYTES + WORKSPACE_BYTES;

/// Does a choice name a device?
pub fn is_device(choice: DeviceChoice) -> bool {
    choice.is_device()
}

/// Memory of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePlan {
    /// The device.
    pub device: DeviceChoice,
    /// The most bytes in use in each phase; 0 for a phase without passes.
    pub phases: [(Phase, usize); Phase::ALL.len()],
    /// Bytes of the frozen weights that the device keeps, and of the buffers for those that it does not.
    pub base: usize,
    /// Bytes that there is room for, where that is known.
    pub room: Option<usize>,
    /// What the roles that score a rollout have in common: as much as the devices have room for, or, where that is not known, as
    /// leaves their peaks where they are.
    pub sharing: Sharing,
    /// How a base that leaves it open dequantises its weights: as much ahead, and kept, as there is room for in the same sense.
    pub dequantise: Dequantising,
}

impl DevicePlan {
    /// The phase with the highest memory, and its bytes.
    pub fn peak(&self) -> (Phase, usize) {
        self.phases.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or_default()
    }

    /// The bytes in use at the peak as the device counts them: with what is beside the allocations.
    pub fn total(&self) -> usize {
        self.peak().1 + BESIDE
    }

    /// Bytes of the device that the run may take, of which `room` is left for allocations. `limit`: the one that was named, if
    /// one was; it may be less than what is beside them.
    pub fn whole_room(&self, limit: Option<usize>) -> Option<usize> {
        self.room.map(|room| limit.unwrap_or(room + BESIDE))
    }

    /// Whether it fits with `spare` bytes to spare.
    pub fn fits(&self, spare: usize) -> bool {
        self.room.is_none_or(|room| self.peak().1 + spare <= room)
    }
}

/// A base of shapes without numbers on a machine that counts.
fn planned(net: &Network, device: &Device, open: Dequantising) -> Result<Base> {
    let dtype = |name: &str| net.dtypes.get(name).copied().unwrap_or(net.table);
    let weight = |name: &str, rows: usize, cols: usize| Weight::planned(dtype(name), rows, cols);
    let base = assemble(net.config.clone(), &weight, &|_, len| Ok(vec![1.0; len]), "planned".into())?;
    base.set_dequantise(if net.dequantise == Dequantising::Auto { open } else { net.dequantise });
    base.computing_in(net.compute).caching_in(net.kv_cache_type)?.streaming(
        Some(device.clone()),
        net.offload.layers(),
        |_, _| {},
    )
}

/// The machines that count, by the device each stands for.
struct Ledger {
    devices: BTreeMap<DeviceChoice, Device>,
    peaks: BTreeMap<DeviceChoice, [usize; Phase::ALL.len()]>,
}

impl Ledger {
    /// Runs some passes and counts their peak towards a phase.
    fn within(&mut self, phase: Phase, passes: impl FnOnce() -> Result<()>) -> Result<()> {
        self.devices.values().for_each(Device::reset_peak);
        passes()?;
        for (choice, device) in &self.devices {
            let peak = &mut self.peaks.entry(*choice).or_default()[phase as usize];
            *peak = (*peak).max(device.usage().peak);
        }
        Ok(())
    }
}

/// The plan of each device that the stage uses; none if it runs on the CPU.
///
/// # Errors
/// Those of the passes, as for a sequence longer than the context.
pub fn walk(job: &StageShape) -> Result<Vec<DevicePlan>> {
    let Some(on) = &job.on_device else { return Ok(vec![]) };
    let plain = Walked::new(job, on, Dequantising::InTurn)?;
    let is_open = |net: &Network| net.dequantise == Dequantising::Auto && net.has_to_dequantise();
    let has_room = |plan: &DevicePlan| plan.room.is_none_or(|room| plan.fits(room / RESERVE));
    let nets = || [Some(&job.policy), job.scorer.as_ref()].into_iter().flatten();
    if nets().any(is_open) && plain.plans.iter().all(has_room) {
        // Roles that share no blocks copy each streamed layer once for every role: that costs more time than dequantising.
        let is_streamed = nets().any(|net| net.offload.layers() > 0);
        let has_roles = matches!(&job.work, Work::Rollouts(_));
        for how in [Dequantising::Kept, Dequantising::Ahead] {
            let more = Walked::new(job, on, how)?;
            if plain.plans.iter().zip(&more.plans).all(|(plain, more)| allows(plain, more)) {
                let more = more.sharing(job, on)?;
                if !(is_streamed && has_roles) || more.iter().all(|plan| plan.sharing != Sharing::Apart) {
                    return Ok(more);
                }
            }
        }
    }
    plain.sharing(job, on)
}

/// Whether a device has room for a plan that takes more memory for less time, or, where its room is not known, whether the peak
/// stays where it is.
fn allows(plain: &DevicePlan, more: &DevicePlan) -> bool {
    more.peak().1 <= plain.peak().1 || more.room.is_some_and(|room| more.fits(room / RESERVE))
}

/// The bases on machines that count, after all passes of a stage.
struct Walked {
    policy: Option<Base>,
    scorer: Option<Base>,
    devices: BTreeMap<DeviceChoice, Device>,
    plans: Vec<DevicePlan>,
}

impl Walked {
    fn new(job: &StageShape, on: &OnDevice, dequantise: Dequantising) -> Result<Self> {
        let mut ledger = Ledger { devices: BTreeMap::new(), peaks: BTreeMap::new() };
        let mut open = |choice: DeviceChoice, net: &Network| -> Result<Option<Base>> {
            if !is_device(choice) {
                return Ok(None);
            }
            planned(net, ledger.devices.entry(choice).or_insert_with(Device::dry), dequantise).map(Some)
        };
        let policy = open(on.policy, &job.policy)?;
        let scorer = job.scorer.as_ref().map(|net| open(on.scorer, net)).transpose()?.flatten();
        let base: BTreeMap<DeviceChoice, usize> =
            ledger.devices.iter().map(|(choice, device)| (*choice, device.usage().live)).collect();
        ledger.within(Phase::Load, || {
            [policy.as_ref(), scorer.as_ref()].into_iter().flatten().try_for_each(|base| {
                let hidden = base.hidden(&Batch::new(&[[0u32]])?, None)?;
                base.logits(&hidden, None).map(drop)
            })
        })?;
        let mut walked = Self { policy, scorer, devices: ledger.devices.clone(), plans: vec![] };
        match &job.work {
            Work::Supervised(work) => walked.roles(job, on).supervised(&mut ledger, work)?,
            Work::Rollouts(work) => walked.roles(job, on).rollouts(&mut ledger, work)?,
        }
        let plan = |(choice, peaks): (&DeviceChoice, &[usize; Phase::ALL.len()])| DevicePlan {
            device: *choice,
            phases: Phase::ALL.map(|phase| (phase, peaks[phase as usize])),
            base: base.get(choice).copied().unwrap_or(0),
            room: on.rooms.get(choice).copied(),
            sharing: Sharing::Apart,
            dequantise,
        };
        walked.plans = ledger.peaks.iter().map(plan).collect();
        Ok(walked)
    }

    /// New adapters over the bases.
    fn roles(&self, job: &StageShape, on: &OnDevice) -> Roles<'_> {
        let scorer = if job.scorer.is_some() { self.scorer.as_ref() } else { self.policy.as_ref() };
        Roles::new(self.policy.as_ref(), scorer, on, job.checkpoint)
    }

    /// The plans, with as much in common among the roles that score a rollout as there is room for.
    fn sharing(self, job: &StageShape, on: &OnDevice) -> Result<Vec<DevicePlan>> {
        let Work::Rollouts(work) = &job.work else { return Ok(self.plans) };
        for sharing in [Sharing::Weights, Sharing::Blocks] {
            // New adapters, whose first pass this is.
            let (roles, mut ledger) =
                (self.roles(job, on), Ledger { devices: self.devices.clone(), peaks: BTreeMap::new() });
            roles.settle_all(work)?;
            roles.scoring(&mut ledger, work, sharing)?;
            let shared = |plan: &DevicePlan| {
                let mut plan = DevicePlan { sharing, ..plan.clone() };
                plan.phases[Phase::Scoring as usize].1 =
                    ledger.peaks.get(&plan.device).map_or(0, |peaks| peaks[Phase::Scoring as usize]);
                plan
            };
            if self.plans.iter().all(|plan| allows(plan, &shared(plan))) {
                return Ok(self.plans.iter().map(shared).collect());
            }
        }
        Ok(self.plans)
    }
}

/// The bases that lie on devices; passes over a base on the CPU are left out.
struct Roles<'w> {
    policy: Option<&'w Base>,
    scorer: Option<&'w Base>,
    /// The adapters that training starts from and that responses are scored with.
    start: Adapter,
    reward: Adapter,
    /// The trained adapters: after the first step they are others than those that training started from.
    actor: Adapter,
    critic: Adapter,
    recompute: Recompute,
}

/// Copies an adapter to the device of a base, as its first pass does, which leaves it there.
fn settle(base: Option<&Base>, adapter: &Adapter) -> Result<()> {
    let Some((base, device)) = base.and_then(|base| Some((base, base.place()?))) else { return Ok(()) };
    let operand = base.lm_head(None).weight.compute().element();
    let mut layers = adapter.pairs().filter(|(module, _)| matches!(module, TargetModule::Block { .. }));
    layers.try_for_each(|(_, layer)| layer.low_rank().on(device, operand).map(drop))
}

fn batch_of(lengths: &[usize]) -> Result<Batch> {
    Batch::new(&lengths.iter().map(|&length| vec![0u32; length]).collect::<Vec<_>>())
}

/// How a plan draws tokens, of which nobody reads which.
const ANY_TOKEN: Distribution = Distribution { temperature: 1.0, top_k: 0, top_p: 1.0 };

fn targets(rows: usize, batch: &Batch) -> Targets {
    let rows = rows.min(batch.tokens().len());
    Targets { rows: (0..rows).collect(), tokens: vec![0; rows] }
}

/// The pass with the most tokens.
fn largest<'p>(passes: impl IntoIterator<Item = &'p Pass>) -> Option<&'p Pass> {
    passes.into_iter().max_by_key(|pass| pass.tokens())
}

/// Scoring runs chunk by chunk; the largest counts.
fn largest_chunk(lengths: &[usize]) -> Vec<usize> {
    let chunks = chunks_by_tokens(lengths, SCORING_TOKENS).into_iter();
    let chunks = chunks.map(|rows| rows.iter().map(|&i| lengths[i]).collect::<Vec<_>>());
    chunks.max_by_key(|chunk| chunk.iter().sum::<usize>()).unwrap_or_default()
}

fn logprobs(base: &Base, adapter: &Adapter, lengths: &[usize], rows: usize) -> Result<()> {
    let batch = batch_of(lengths)?;
    Policy::new(base, Some(adapter)).logprobs(&batch, &targets(rows, &batch), 1.0).map(drop)
}

fn values(base: &Base, adapter: &Adapter, lengths: &[usize], rows: usize) -> Result<()> {
    let batch = batch_of(lengths)?;
    ValueModel::new(base, adapter)?.values(&batch, &targets(rows, &batch).rows).map(drop)
}

impl<'w> Roles<'w> {
    fn new(policy: Option<&'w Base>, scorer: Option<&'w Base>, on: &OnDevice, recompute: Recompute) -> Self {
        let own = |adapter: &Adapter| adapter.clone().with_own_caches();
        let (start, reward, actor, critic) = (own(&on.start), own(&on.reward), own(&on.start), own(&on.reward));
        Self { policy, scorer, start, reward, actor, critic, recompute }
    }

    fn policy_gradients(&self, base: &Base, lengths: &[usize], rows: usize, exact: Option<bool>) -> Result<Gradients> {
        let (policy, batch) = (Policy::new(base, Some(&self.actor)), batch_of(lengths)?);
        let targets = targets(rows, &batch);
        // The reference's hidden states come from the host.
        let width = base.config().embedding_width;
        let theirs = exact.map(|_| zeros(base, targets.rows.len(), width)).transpose()?;
        let reference = Policy::new(base, Some(&self.start));
        let other = theirs.as_ref().map(|theirs| (reference, theirs));
        let zeros = || vec![0f32; targets.rows.len()];
        let loss = |_: &_, _: &[f32]| {
            Ok(HeadGradients { logprobs: zeros(), entropy: zeros(), kl: (exact == Some(true)).then(zeros) })
        };
        Ok(policy.gradients_against(&batch, &targets, other, 1.0, self.recompute, loss)?.1)
    }

    fn value_gradients(&self, base: &Base, lengths: &[usize], rows: usize) -> Result<Gradients> {
        let batch = batch_of(lengths)?;
        let rows = targets(rows, &batch).rows;
        let model = ValueModel::new(base, &self.critic)?;
        Ok(model.gradients(&batch, &rows, self.recompute, |values| Ok(vec![0.0; values.len()]))?.1)
    }

    /// Every response at its full length; `prompts` are adjacent where they are the same.
    fn generate(&self, base: &Base, prompts: &[usize], generations: usize, response: usize) -> Result<()> {
        let Some(&longest) = prompts.iter().max() else { return Ok(()) };
        let adapter = Some(&self.actor);
        let generations = generations.max(1);
        let distinct: Vec<usize> = prompts.chunks(generations).filter_map(|same| same.first().copied()).collect();
        let sources: Vec<usize> = (0..prompts.len()).map(|i| i / generations).collect();
        let room = base.config().max_position_embeddings.saturating_sub(longest).max(1);
        let capacity = response.min(room).min(MAX_INITIAL_CAPACITY);
        let policy = Policy::new(base, adapter);
        let mut decoding = Decoding::start(policy, &batch_of(&distinct)?, &sources, capacity, ANY_TOKEN)?;
        let (tokens, draws) = (vec![0u32; prompts.len()], vec![0.0; prompts.len()]);
        decoding.first(&draws)?;
        let steps = response.min(room).saturating_sub(1);
        for step in 0..steps {
            // Most steps take what the one before took.
            let is_like = decoding.is_settled() && !decoding.cache().next_step_differs();
            if step > 0 && step + 1 < steps && is_like {
                decoding.cache().advance()?;
                continue;
            }
            let positions: Vec<u32> = prompts.iter().map(|&prompt| (prompt + step) as u32).collect();
            decoding.step(&tokens, &positions, &draws)?;
        }
        Ok(())
    }

    /// Distillation: both hidden states of the sequences, and the student's gradients.
    fn distill(&self, ledger: &mut Ledger, work: &Supervised, response: usize) -> Result<()> {
        let (Some(base), Some(theirs)) = (self.policy, self.scorer) else { return Ok(()) };
        let (policy, teacher) = (Policy::new(base, Some(&self.actor)), Policy::new(theirs, None));
        let of = Divergence { beta: 0.5, temperature: 1.0 };
        let sample = |pass: &Pass| {
            let prompts: Vec<usize> =
                pass.lengths.iter().map(|length| length.saturating_sub(response).max(1)).collect();
            self.generate(base, &prompts, 1, response)
        };
        let packed = |pass: &Pass| -> Result<(Batch, Targets)> {
            let batch = batch_of(&pass.lengths)?;
            let targets = targets(pass.targets, &batch);
            Ok((batch, targets))
        };
        if let Some(pass) = &work.evaluation {
            ledger.within(Phase::Evaluation, || {
                sample(pass)?;
                let (batch, targets) = packed(pass)?;
                let rows = teacher.rows(&batch, &targets)?;
                policy.divergence(&policy.rows(&batch, &targets)?, (teacher, &rows), of).map(drop)
            })?;
        }
        let Some(pass) = largest(&work.step) else { return Ok(()) };
        ledger.within(Phase::Rollout, || sample(pass))?;
        ledger.within(Phase::Update, || {
            let (batch, targets) = packed(pass)?;
            let gradients = || {
                let rows = teacher.rows(&batch, &targets)?;
                Ok(policy.divergence_gradients(&batch, &targets, (teacher, &rows), of, self.recompute, 0.0)?.1)
            };
            summed(work.step.len() > 1, gradients).map(drop)
        })
    }

    fn supervised(&self, ledger: &mut Ledger, work: &Supervised) -> Result<()> {
        if let Some(response) = work.response {
            return self.distill(ledger, work, response);
        }
        let Some(base) = self.policy else { return Ok(()) };
        let adapter = if work.scorer { &self.critic } else { &self.actor };
        if let Some(pass) = &work.evaluation {
            ledger.within(Phase::Evaluation, || match work.scorer {
                true => values(base, adapter, &pass.lengths, pass.targets),
                false => logprobs(base, adapter, &pass.lengths, pass.targets),
            })?;
        }
        ledger.within(Phase::Update, || {
            if let Some(pass) = largest(&work.reference) {
                let reference = if work.reference_is_adapter { &self.start } else { adapter };
                logprobs(base, reference, &pass.lengths, pass.targets)?;
            }
            let Some(Pass { lengths, targets, .. }) = largest(&work.step) else { return Ok(()) };
            let several = work.step.len() > 1;
            match work.scorer {
                true => summed(several, || self.value_gradients(base, lengths, *targets)),
                false => summed(several, || self.policy_gradients(base, lengths, *targets, None)),
            }
            .map(drop)
        })
    }

    fn critic_base(&self, work: &Rollouts) -> Option<&Base> {
        if work.critic_on_policy { self.policy } else { self.scorer }
    }

    /// From the second iteration on, all adapters are there in every phase.
    fn settle_all(&self, work: &Rollouts) -> Result<()> {
        settle(self.policy, &self.actor)?;
        settle(self.policy.filter(|_| work.reference), &self.start)?;
        settle(self.critic_base(work).filter(|_| work.critic), &self.critic)?;
        settle(self.scorer.filter(|_| work.reward_model), &self.reward)
    }

    /// The largest pass of the roles over whole sequences.
    fn scoring(&self, ledger: &mut Ledger, work: &Rollouts, sharing: Sharing) -> Result<()> {
        let lengths: Vec<usize> = work.prompts.iter().map(|prompt| prompt + work.response).collect();
        let chunk = largest_chunk(&lengths);
        if chunk.is_empty() {
            return Ok(());
        }
        let batch = batch_of(&chunk)?;
        let targets = targets(chunk.len() * work.response, &batch);
        let critic = self.critic_base(work).filter(|_| work.critic);
        let model = self.scorer.filter(|_| work.reward_model).map(|base| ValueModel::new(base, &self.reward));
        // Beside the first, each of the others over the same base has hidden states of its own in a pass of all.
        let models = model.transpose()?.into_iter().cycle().take(work.scoring_models);
        ledger.within(Phase::Scoring, || {
            let asked = Scoring {
                actor: self.policy.map(|base| Policy::new(base, Some(&self.actor))),
                recomputes: work.recomputes,
                reference: self.policy.filter(|_| work.reference).map(|base| Policy::new(base, Some(&self.start))),
                exact_kl: work.exact.0,
                critic: critic.map(|base| ValueModel::new(base, &self.critic)).transpose()?,
                last_values: false,
                models: &models.collect::<Vec<_>>(),
                sharing,
                temperature: 1.0,
            };
            score(&batch, &targets, asked, |_| Ok(())).map(drop)
        })
    }

    fn rollouts(&self, ledger: &mut Ledger, work: &Rollouts) -> Result<()> {
        let whole = |prompts: &[usize]| -> Vec<usize> { prompts.iter().map(|prompt| prompt + work.response).collect() };
        let critic = self.critic_base(work);
        self.settle_all(work)?;
        if !work.evaluation.is_empty() {
            ledger.within(Phase::Evaluation, || {
                let lengths = whole(&work.evaluation);
                if let Some(base) = self.policy {
                    self.generate(base, &work.evaluation, 1, work.response)?;
                    if work.reference {
                        logprobs(base, &self.start, &lengths, work.evaluation.len() * work.response)?;
                    }
                }
                if let Some(base) = self.scorer.filter(|_| work.reward_model) {
                    let chunk = largest_chunk(&lengths);
                    values(base, &self.reward, &chunk, chunk.len())?;
                }
                Ok(())
            })?;
        }
        let batches = work.own().chunks(work.at_once.max(1));
        let largest = batches.max_by_key(|prompts| prompts.iter().sum::<usize>()).filter(|_| !work.served);
        if let (Some(base), Some(prompts)) = (self.policy, largest) {
            ledger.within(Phase::Rollout, || self.generate(base, prompts, work.generations, work.response))?;
        }
        self.scoring(ledger, work, Sharing::Apart)?;
        ledger.within(Phase::Update, || {
            let micro = work.micro.iter().max_by_key(|micro| micro.iter().map(|(p, r)| p + r).sum::<usize>());
            let Some(micro) = micro else { return Ok(()) };
            let lengths: Vec<usize> = micro.iter().map(|(prompt, response)| prompt + response).collect();
            let r: usize = micro.iter().map(|(_, response)| response).sum();
            let several = work.micro.len() > 1;
            if let Some(base) = self.policy {
                let exact = work.reference.then_some(work.exact.1);
                let _actor = summed(several, || self.policy_gradients(base, &lengths, r, exact))?;
                if let Some((blocks, tokens, a_pass)) = work.text {
                    let lengths = vec![tokens; a_pass.clamp(1, blocks.max(1))];
                    let rows = lengths.len() * (tokens - 1);
                    summed(blocks > a_pass, || self.policy_gradients(base, &lengths, rows, None))?;
                }
            }
            match critic.filter(|_| work.critic) {
                Some(base) => summed(several, || self.value_gradients(base, &lengths, r)).map(drop),
                None => Ok(()),
            }
        })
    }
}

/// The gradients of a pass, or of `several`: their sum stays on the device until the optimizer step.
fn summed(several: bool, pass: impl Fn() -> Result<Gradients>) -> Result<Gradients> {
    let mut sum = pass()?;
    if several {
        sum.add(pass()?)?;
    }
    Ok(sum)
}

/// Hidden states that come from the host.
fn zeros(base: &Base, rows: usize, width: usize) -> Result<crate::device::Array> {
    let tensor = candle_core::Tensor::zeros((rows, width), candle_core::DType::F32, &candle_core::Device::Cpu)?;
    crate::device::Array::on(tensor, base.place())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::LoraConfig;
    use crate::model::config::DecoderConfig;
    use crate::ops::weight::{ComputeDtype, StorageDType};

    /// Passing over most steps of a rollout tells the same peak as running them all, past the chunks of attention and where
    /// the cache grows.
    #[test]
    fn a_plan_of_some_steps_has_the_peak_of_all() {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": true
        });
        let config = DecoderConfig::from_hf(&json.to_string(), None, "the test").unwrap();
        let weight = |_: &str, rows, cols| Weight::planned(StorageDType::BF16, rows, cols);
        let opened = |device: &Device| {
            let base = assemble(config.clone(), &weight, &|_, len| Ok(vec![1.0; len]), "planned".into()).unwrap();
            let base = base.computing_in(ComputeDtype::F16).on(Some(device.clone()), |_, _| {}).unwrap();
            let start = Adapter::init(LoraConfig::default(), base.shapes(), 1).unwrap();
            device.reset_peak();
            (base, start)
        };
        let (prompts, response) = ([30usize, 11, 11, 7], 1200);
        let all = Device::dry();
        let (base, start) = opened(&all);
        let lengths = [30usize, 11, 7];
        let policy = Policy::new(&base, Some(&start));
        let batch = batch_of(&lengths).unwrap();
        let mut decoding = Decoding::start(policy, &batch, &[0, 1, 1, 2], MAX_INITIAL_CAPACITY, ANY_TOKEN).unwrap();
        decoding.first(&[0.0; 4]).unwrap();
        for step in 0..response - 1 {
            let positions: Vec<u32> = prompts.iter().map(|&prompt| (prompt + step) as u32).collect();
            decoding.step(&[0; 4], &positions, &[0.0; 4]).unwrap();
        }
        drop(decoding);
        let some = Device::dry();
        let (base, start) = opened(&some);
        let (policy, scorer) = (DeviceChoice::Emulated, DeviceChoice::Emulated);
        let on = OnDevice { policy, scorer, reward: start.clone(), start, rooms: BTreeMap::new() };
        let roles = Roles::new(Some(&base), None, &on, Recompute::Off);
        roles.generate(&base, &[30, 11, 11, 7], 1, response).unwrap();
        assert_eq!(some.usage().peak, all.usage().peak);
        // Each step downloads its tokens.
        assert!(some.work().downloads * 10 < all.work().downloads);
    }
}
