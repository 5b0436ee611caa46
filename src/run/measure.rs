//! `fourfold bench memory`: two steps of a stage under the memory meter, beside the planner's prediction for the same
//! passes.
//!
//! Read `host/meter.rs` for the meter and `memory_preflight.rs` for the plan.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result};

use super::prompts::columns;
use super::rewards::Adapters;
use super::{Model, check_context, offload, prepared_among, save, with_members};
use crate::config::{Config, Stage, Supervised};
use crate::data::Prepared;
use crate::data::examples::objectives::{Objective, PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::examples::{Example, Examples, Ids};
use crate::data::stream::cache::Stored;
use crate::dpo::{kto, pairs};
use crate::host::meter;
use crate::host::meter::Phase;
use crate::host::peak_rss_bytes;
use crate::model::adapter::Adapter;
use crate::model::roles::Policy;
use crate::model_files::ModelFiles;
use crate::planner::passes;
use crate::planner::plan::Plan;
use crate::run::RunOptions;
use crate::run::memory_preflight::{MemoryPreflight, Parts};
use crate::run::options::Inputs;
use crate::run::placement;
use crate::run::rewards::RewardSourceBuilder;
use crate::train::session::Session;
use crate::train::supervised::Setup;
use crate::train::world::World;
use crate::{distill, invalid, ppo, reward, sft};

/// The memory that was predicted and the memory that was measured.
pub struct Measured {
    /// The planner's prediction.
    pub plan: Plan,
    /// The meter's peak of each phase, bytes.
    pub peaks: [(Phase, usize); Phase::ALL.len()],
    /// The system's peak of the resident set, bytes.
    pub peak_rss: Option<usize>,
}

/// Optimizer steps that are measured, over the same examples: the second starts with the buffers that the first left.
const STEPS: usize = 2;

/// Runs two steps of a stage in `out` and measures every phase. PPO's responses have their full length.
///
/// # Errors
/// Those of the stage; if this process's allocator does not count.
pub fn measure(stage: Stage, config: &Config, out: &Path) -> Result<Measured> {
    measure_among(stage, config, out, &World::default())
}

/// The same of one of several ranks, each a process of its own; rank 0 alone writes.
///
/// # Errors
/// Those of [`measure`]; if a rank fails or is gone, or the stage runs in one process.
pub fn measure_among(stage: Stage, config: &Config, out: &Path, world: &World) -> Result<Measured> {
    if meter::current() == 0 {
        return Err(invalid!(
            "this program's allocator does not count; `fourfold bench memory` is of the fourfold binary"
        ));
    }
    // The search for a card's libraries is not part of any phase.
    let ranks = world.size();
    if ranks > 1 && stage == Stage::Distill {
        return Err(invalid!("distill trains in one process"));
    }
    let settled = placement::settled(&with_members(stage, config)?.read_by(stage), None)?;
    let mut config = offload::chosen(stage, &settled, ranks)?.of_ranks(stage, ranks);
    config.checkpoint.save_steps = 1;
    config.checkpoint.save_total_limit = 1;
    let launch = RunOptions { overwrite: true, world: world.clone(), ..RunOptions::default() };
    let bench = Bench { stage, out, ranks, launch };
    match stage {
        Stage::Sft => bench.sft(&mut config),
        Stage::Reward => bench.reward(&mut config),
        Stage::Dpo => bench.dpo(&mut config),
        Stage::Kto => bench.kto(&mut config),
        Stage::Distill if config.distill().samples_all() => bench.distill::<PromptExample>(&mut config),
        Stage::Distill => bench.distill::<SftExample>(&mut config),
        Stage::Ppo | Stage::Grpo | Stage::Rloo => bench.ppo(&mut config),
    }
}

struct Bench<'b> {
    stage: Stage,
    out: &'b Path,
    ranks: usize,
    launch: RunOptions,
}

/// The first `count` examples.
fn some<T: Example>(of: &impl Examples<T>, count: usize) -> Result<Vec<T>> {
    (0..count.min(of.len())).map(|row| of.get(row).map(Cow::into_owned)).collect()
}

/// Held-out examples that are measured on: two passes of an evaluation.
fn held_out_of(section: &impl Supervised) -> usize {
    2usize.saturating_mul(section.supervised().examples_evaluated_at_once())
}

impl Bench<'_> {
    /// Opens the base, with the tokenizer and the data there already, and nothing else counted yet.
    fn model(&self, checkpoint: ModelFiles, config: &Config) -> Result<Model> {
        let section = if self.stage == Stage::Reward { config.reward_base() } else { &config.base };
        meter::restart();
        Model::of_opened(checkpoint, section)
    }

    fn start(&self, model: &Model, path: Option<&std::path::PathBuf>, config: &Config) -> Result<Adapter> {
        match path {
            Some(path) => model.adapter(path).with_context(|| format!("[{}] adapter", self.stage.name())),
            None => model.fresh_adapter(&config.lora, config.seed),
        }
    }

    fn session(&self, model: &Model, config: &Config) -> Result<Session> {
        Inputs::new(self.stage, config)?.model("", model)?.begin(self.out, &self.launch)
    }

    /// Saves an adapter on the rank that writes.
    fn save(&self, adapter: Adapter, model: &Model, name: &str) -> Result<()> {
        match self.launch.world.is_first() {
            true => save(adapter, model, &self.out.join(name)).map(drop),
            false => Ok(()),
        }
    }

    fn found(&self, admission: MemoryPreflight) -> Measured {
        Measured { plan: admission.plan, peaks: meter::peaks(), peak_rss: peak_rss_bytes() }
    }

    fn sft(&self, config: &mut Config) -> Result<Measured> {
        let mut c = config.sft();
        let checkpoint = ModelFiles::open(&config.base.path)?;
        let data: Prepared<SftExample> =
            prepared_among(&self.launch.world, config, checkpoint.tokenizer(), c.completion_only_loss)?;
        let per_step = c.max_tokens_per_batch.map_or(c.per_device_train_batch_size, |_| 64)
            * c.gradient_accumulation_steps
            * self.ranks;
        let (train, held_out) = (some(&data.train, per_step)?, some(&data.held_out, held_out_of(&c))?);
        drop(data);
        c.num_train_epochs = STEPS;
        config.sft = Some(c.clone());
        let model = self.model(checkpoint, config)?;
        check_context(&model, train.longest_sequence())?;
        let start = self.start(&model, c.adapter.as_ref(), config)?;
        let admission =
            self.parts(&model, &start).admit(config, |config| passes::sft(config, &train, &held_out, self.ranks))?;
        let mut session = self.session(&model, config)?;
        let _step = meter::within(Phase::Step);
        let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
        let (adapter, _) = sft::train(setup, &train, &held_out, &c, &mut session)?;
        self.save(adapter, &model, "adapter")?;
        Ok(self.found(admission))
    }

    fn parts<'p>(&self, model: &'p Model, start: &'p Adapter) -> Parts<'p> {
        Parts { stage: self.stage, policy: model, scorer: None, start, reward: None }
    }

    fn reward(&self, config: &mut Config) -> Result<Measured> {
        let mut c = config.reward();
        c.compat = None; // pads are few and need no memory of their own
        let checkpoint = ModelFiles::open(&config.reward_base().path)?;
        let data: Prepared<RankedExample> = prepared_among(&self.launch.world, config, checkpoint.tokenizer(), true)?;
        let per_step = c.max_tokens_per_batch.map_or(c.per_device_train_batch_size, |_| 64)
            * c.gradient_accumulation_steps
            * self.ranks;
        let train = some(&data.train, per_step)?;
        let held_out = some(&data.held_out, held_out_of(&c))?;
        drop(data);
        c.num_train_epochs = STEPS;
        config.reward = Some(c.clone());
        let model = self.model(checkpoint, config)?;
        check_context(&model, train.longest_sequence())?;
        let start = self.start(&model, c.adapter.as_ref(), config)?;
        let admission =
            self.parts(&model, &start).admit(config, |config| passes::reward(config, &train, &held_out, self.ranks))?;
        let mut session = self.session(&model, config)?;
        let _step = meter::within(Phase::Step);
        let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
        let (adapter, _) = reward::train::train(setup, &train, &held_out, &c, &mut session)?;
        self.save(adapter, &model, "adapter")?;
        Ok(self.found(admission))
    }

    fn dpo(&self, config: &mut Config) -> Result<Measured> {
        let mut c = config.dpo();
        let checkpoint = ModelFiles::open(&config.base.path)?;
        let data: Prepared<RankedExample> = prepared_among(&self.launch.world, config, checkpoint.tokenizer(), true)?;
        let per_step = c.per_device_train_batch_size * c.gradient_accumulation_steps * self.ranks;
        let (train, held_out) = (some(&data.train, per_step)?, some(&data.held_out, held_out_of(&c))?);
        drop(data);
        c.num_train_epochs = STEPS;
        config.dpo = Some(c.clone());
        let model = self.model(checkpoint, config)?;
        check_context(&model, train.longest_sequence())?;
        let start = self.start(&model, c.adapter.as_ref(), config)?;
        let admission =
            self.parts(&model, &start).admit(config, |config| passes::dpo(config, &train, &held_out, self.ranks))?;
        let mut session = self.session(&model, config)?;
        let _step = meter::within(Phase::Step);
        let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
        let reference = c.adapter.as_ref().map(|_| &start);
        let (adapter, _) = pairs::train(setup, reference, &train, &held_out, &c, &mut session)?;
        self.save(adapter, &model, "adapter")?;
        Ok(self.found(admission))
    }

    fn kto(&self, config: &mut Config) -> Result<Measured> {
        let mut c = config.kto();
        let checkpoint = ModelFiles::open(&config.base.path)?;
        let data: Prepared<UnpairedExample> = prepared_among(&self.launch.world, config, checkpoint.tokenizer(), true)?;
        let per_step = c.per_device_train_batch_size * c.gradient_accumulation_steps * self.ranks;
        let (train, held_out) = (some(&data.train, per_step)?, some(&data.held_out, held_out_of(&c))?);
        drop(data);
        c.num_train_epochs = STEPS;
        config.kto = Some(c.clone());
        let model = self.model(checkpoint, config)?;
        let start = self.start(&model, c.adapter.as_ref(), config)?;
        let admission =
            self.parts(&model, &start).admit(config, |config| passes::kto(config, &train, &held_out, self.ranks))?;
        let mut session = self.session(&model, config)?;
        let _step = meter::within(Phase::Step);
        let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
        let reference = c.adapter.as_ref().map(|_| &start);
        let max_length = config.data()?.max_length.min(model.base.config().max_position_embeddings);
        let (adapter, _) = kto::train(setup, reference, &train, &held_out, &c, max_length, &mut session)?;
        self.save(adapter, &model, "adapter")?;
        Ok(self.found(admission))
    }

    fn distill<T: Objective + Stored + passes::Sampled>(&self, config: &mut Config) -> Result<Measured> {
        let mut c = config.distill();
        let checkpoint = ModelFiles::open(&config.base.path)?;
        let other = config.teacher.as_ref().filter(|base| **base != config.base);
        let files = other.map(|base| ModelFiles::open(&base.path)).transpose()?;
        let data: Prepared<T> = prepared_among(&self.launch.world, config, checkpoint.tokenizer(), true)?;
        let per_step = c.per_device_train_batch_size * c.gradient_accumulation_steps * self.ranks;
        let (train, held_out) = (some(&data.train, per_step)?, some(&data.held_out, held_out_of(&c))?);
        drop(data);
        c.num_train_epochs = STEPS;
        config.distill = Some(c.clone());
        let model = self.model(checkpoint, config)?;
        let other = files.map(|files| Model::of_opened(files, config.teacher())).transpose()?;
        let start = self.start(&model, c.adapter.as_ref(), config)?;
        let teacher = other.as_ref().unwrap_or(&model);
        let taught = c.teacher_adapter.as_ref().map(|path| teacher.policy_adapter(path)).transpose()?;
        let parts =
            Parts { stage: self.stage, policy: &model, scorer: other.as_ref(), start: &start, reward: taught.as_ref() };
        let admission = parts.admit(config, |config| passes::distill(config, &train, &held_out))?;
        let mut session = self.session(&model, config)?;
        let _step = meter::within(Phase::Step);
        let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
        // No token ends a response.
        let decode = |_: &[u32]| String::new();
        let teacher = Policy::new(&teacher.base, taught.as_ref());
        let teaching = distill::Teaching { teacher, stop: &[], decode: &decode };
        let (adapter, _) = distill::train(setup, teaching, &train, &held_out, &c, &mut session)?;
        self.save(adapter, &model, "adapter")?;
        Ok(self.found(admission))
    }

    fn ppo(&self, config: &mut Config) -> Result<Measured> {
        let mut c = config.rollouts(self.stage)?.clone();
        c.compat = None; // it does not matter here which responses are kept
        if c.servers().is_some() {
            return Err(invalid!(
                "bench memory asks no server: remove [{}.rollout], and rollouts are sampled here, which takes more",
                c.origin.name()
            ));
        }
        if config.reward_base.as_ref().is_some_and(|base| *base != config.base) {
            return Err(invalid!("bench memory measures PPO over one base; remove [reward_base]"));
        }
        let checkpoint = ModelFiles::open(&config.base.path)?;
        let data: Prepared<PromptExample> = prepared_among(&self.launch.world, config, checkpoint.tokenizer(), true)?;
        let train = some(&data.train, STEPS * c.batch_size)?;
        let asked = some(&data.held_out, c.eval_prompts)?;
        drop(data);
        (c.total_episodes, c.num_train_epochs) = (STEPS * c.batch_size, None);
        config.ppo = Some(c.clone());
        let prompts = Ids(&train);
        let model = self.model(checkpoint, config)?;
        let sft = self.start(&model, c.adapter.as_ref(), config)?.with_score_head(None)?;
        let adapters = Adapters::open(&c, &model)?;
        let columns = columns(&train, &asked, &c, config)?;
        let builder = RewardSourceBuilder {
            world: &self.launch.world,
            scorer: &model,
            retokenise: None,
            prompts: &train,
            eval_prompts: &asked,
            pad: None,
            columns: columns.as_ref(),
            section: c.origin.name(),
        };
        let source = builder.source(&c, &adapters)?;
        let lengths: Vec<usize> = asked.iter().map(|prompt| prompt.tokens.len()).collect();
        let context = model.base.config().max_position_embeddings;
        let facts = passes::Asked { held_out: &lengths, context, other_tokens: false, ranks: self.ranks };
        let parts = Parts { stage: self.stage, policy: &model, scorer: None, start: &sft, reward: adapters.main() };
        let admission = parts.admit(config, |config| passes::ppo(config, &prompts, facts))?;
        let mut session = self.session(&model, config)?;
        let _step = meter::within(Phase::Step);
        let decode = |ids: &[u32]| model.checkpoint.tokenizer().decode(ids).unwrap_or_default();
        let judges = ppo::evaluate::EvaluationInputs {
            world: &self.launch.world,
            base: &model.base,
            sft: &sft,
            source: &*source,
            gold: None,
            prompts: &asked,
            stop: &[],
            decode: &decode,
        };
        let evaluation = ppo::evaluate::Evaluation::new(judges, &c, config.seed);
        let before = evaluation.before(&mut session.report)?;
        let evaluation = evaluation.with_baseline(before);
        let run = ppo::run::PpoRun {
            world: &self.launch.world,
            base: &model.base,
            reward_base: &model.base,
            sft: &sft,
            reward: adapters.main(),
            prompts: &prompts,
            stop: &[],
            source: &*source,
            decode: &decode,
            evaluation: None,
            ptx: None,
            pad: None,
            sampler: None,
            config: &c,
            seed: config.seed,
            recompute: admission.plan.checkpoint,
            sharing: admission.plan.sharing(),
        };
        let trained = ppo::train::train(&run, &mut session)?;
        self.save(trained.actor.clone(), &model, "actor")?;
        evaluation.run(&"after".into(), &trained.actor, &mut session.report)?;
        Ok(self.found(admission))
    }
}
