//! One rollout ahead: a server samples the next iteration's responses while this iteration's updates run, from the actor before
//! them. It does not depend on how a sampler is reached. Read `sampler.rs` before it, `state.rs` for the caller.

use anyhow::Result;

use super::rollout::sampling_params;
use super::run::PpoRun;
use super::sampler::{Asked, Sampler, Started};
use super::state::select_prompts;
use crate::model::adapter::Adapter;
use crate::model::generate::Response;
use crate::rng::derive;
use crate::train::settings;
use crate::train::snapshot::Snapshot;

const ADAPTER: &str = "ahead";
const VERSION: &str = "ahead_version";

/// The next iteration's rollout. A checkpoint keeps the weights that it is sampled from and not the responses: a resumed run asks
/// for them again, with the same prompts and seeds.
#[derive(Debug)]
pub struct Ahead {
    /// The actor before the updates that run meanwhile.
    pub adapter: Adapter,
    /// The iteration whose updates those are.
    pub version: usize,
    /// Whether rank 0 was told to ask for the responses.
    pub begun: bool,
    /// They are on their way, on rank 0.
    started: Option<Started>,
}

impl Ahead {
    /// Of an actor's weights before the updates of iteration `version`. Nothing is asked for yet.
    pub fn new(adapter: Adapter, version: usize) -> Self {
        Self { adapter, version, begun: false, started: None }
    }

    /// Asks for the responses.
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn start(&mut self, sampler: &dyn Sampler, asked: Asked) -> Result<()> {
        self.started = Some(sampler.start(&self.adapter, self.version, asked, false)?);
        Ok(())
    }

    /// The responses to what was asked for, or to `asked` if nothing was.
    ///
    /// # Errors
    /// Those of the sampler. The responses can then be asked for again.
    pub fn responses(&mut self, sampler: &dyn Sampler, asked: &Asked) -> Result<Vec<Response>> {
        let started = match self.started.take() {
            Some(started) => started,
            None => sampler.start(&self.adapter, self.version, asked.clone(), true)?,
        };
        started.wait()
    }

    /// Puts the weights into a snapshot.
    ///
    /// # Errors
    /// If a tensor cannot be allocated.
    pub fn save(&self, into: &mut Snapshot) -> Result<()> {
        into.put_adapter(ADAPTER, &self.adapter)?;
        into.put(VERSION, &self.version)
    }

    /// Takes them out again; `None` if there are none. `like`: an adapter of the same shape.
    ///
    /// # Errors
    /// If they do not fit.
    pub fn load(from: &Snapshot, like: &Adapter) -> Result<Option<Self>> {
        match from.has(VERSION) {
            true => Ok(Some(Self::new(from.adapter(ADAPTER, like)?, from.get(VERSION)?))),
            false => Ok(None),
        }
    }
}

/// What an iteration asks of the sampler: `wanted` prompts after `before` ones of this iteration, each `num_generations` times,
/// and a seed per response. `extra_prompts`: those that dynamic sampling took in the iterations before.
///
/// # Errors
/// If the file that holds the prompts is damaged.
pub fn ask(
    run: &PpoRun<'_>,
    iteration: usize,
    extra_prompts: usize,
    (before, wanted): (usize, usize),
) -> Result<Asked> {
    let generations = run.config.num_generations;
    let first = iteration * (run.config.batch_size / generations) + extra_prompts + before;
    let selected = select_prompts(run.prompts, first, wanted, run.seed)?;
    let repeated = selected.into_iter().flat_map(|prompt| std::iter::repeat_n(prompt, generations));
    let (entries, prompts): (Vec<usize>, Vec<Vec<u32>>) = repeated.unzip();
    let numbers = (0..prompts.len()).map(|i| (before * generations + i) as u64);
    let seeds = numbers.map(|i| derive(run.seed, &[settings::ROLLOUT, iteration as u64, i])).collect();
    Ok(Asked { entries, prompts, seeds, sampling: sampling_params(run.config, run.stop) })
}
