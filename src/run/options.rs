//! How a run starts in its folder: from the beginning, or from a checkpoint of the same run.
//!
//! It does not depend on a stage. Read `train/session.rs` for the result, and `output.rs` for the folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::config::{Config, ReportTo, Stage};
use crate::data::examples::{Example, Examples};
use crate::error::counted;
use crate::host::meter;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::note;
use crate::page::{About, LivePage};
use crate::report::Report;
use crate::run::{Model, device_name, output};
use crate::train::checkpoint_manager::{BaseFiles, CheckpointManager};
use crate::train::fingerprint::{
    RunFingerprint, digest_of_adapter, digest_of_examples, digest_of_texts, digest_of_tokenizer,
};
use crate::train::guard::Guard;
use crate::train::lock;
use crate::train::session::Session;
use crate::train::snapshot::Snapshot;
use crate::train::store;
use crate::train::store::{Found, Store};
use crate::train::world::World;

/// The options of the command line, besides the config.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// `--resume`: a checkpoint, or `latest`.
    pub resume: Option<PathBuf>,
    /// `--force`: resumes although settings that affect the mathematics changed.
    pub force: bool,
    /// `--from-start`: `--resume` begins at step 0 where there is no checkpoint.
    pub from_start: bool,
    /// `--overwrite`: a run in the folder, finished or not, may be replaced, once this one has made a step.
    pub overwrite: bool,
    /// The command that resumes the run, for messages.
    pub command: String,
    /// The ranks that run the stage together.
    pub world: World,
}

/// The number of ranks among the inputs of a run.
const RANKS: &str = "number of ranks (mpirun -n)";

/// The inputs of a stage, for a later resume to compare with.
pub(crate) struct Inputs {
    stage: Stage,
    config: Config,
    origin: RunFingerprint,
    bases: Vec<BaseFiles>,
}

impl Inputs {
    pub(crate) fn new(stage: Stage, config: &Config) -> Result<Self> {
        let origin = RunFingerprint::new(stage.name(), config)?;
        Ok(Self { stage, config: config.clone(), origin, bases: vec![] })
    }

    /// Adds a base. `role` is "", or the role of a second base with a space behind it.
    pub(crate) fn model(mut self, role: &str, model: &Model) -> Result<Self> {
        self.origin.add(&format!("{role}base"), model.base.fingerprint().into());
        let tokens = digest_of_tokenizer(model.checkpoint.tokenizer(), model.base.config().vocab_size);
        self.origin.add(&format!("{role}tokenizer"), tokens);
        self.bases.extend(BaseFiles::of(&model.checkpoint)?);
        Ok(self)
    }

    pub(crate) fn examples<T: Example>(mut self, name: &str, of: &(impl Examples<T> + ?Sized)) -> Result<Self> {
        self.origin.add(name, digest_of_examples(of)?);
        Ok(self)
    }

    pub(crate) fn texts<'t>(mut self, name: &str, of: impl IntoIterator<Item = Option<&'t str>>) -> Self {
        self.origin.add(name, digest_of_texts(of));
        self
    }

    pub(crate) fn adapter(mut self, name: &str, adapter: Option<&Adapter>) -> Result<Self> {
        if let Some(adapter) = adapter {
            self.origin.add(name, digest_of_adapter(adapter)?);
        }
        Ok(self)
    }

    /// Takes the folder. Nothing is written before this. Among several ranks, rank 0 takes it, and the others get the state to
    /// resume from by it.
    ///
    /// # Errors
    /// If the folder is another's or in use, or the run in it is not this one; if ranks read different inputs.
    pub(crate) fn begin(mut self, out: &Path, launch: &RunOptions) -> Result<Session> {
        let world = &launch.world;
        if world.is_alone() {
            return self.begin_in(out, launch).map(|(session, _)| session);
        }
        let first = world.first(|| Ok(self.origin.clone()))?;
        world.agree(self.same_as(&first))?;
        // Who resumes with another number is refused: the order of the examples is another.
        self.origin.add(RANKS, world.size().to_string());
        let guard = Guard::new(self.config.guard.clone());
        // Rank 0 alone calls this.
        let mut begun = None;
        let resumes = world.first(|| {
            let (session, resumed) = self.begin_in(out, launch)?;
            Ok(begun.insert((session, resumed)).1.is_some())
        })?;
        let (session, mut resumed) = begun.unwrap_or_else(|| (Session::new(Report::silent()).guarded(guard), None));
        if resumes {
            let (facts, arrays) = resumed.as_ref().map_or_else(|| Ok(Default::default()), Snapshot::to_bytes)?;
            let (facts, arrays) = (world.broadcast(facts)?, world.broadcast(arrays)?);
            if !world.is_first() {
                resumed = Some(Snapshot::from_bytes(&facts, &arrays)?);
            }
        }
        let session = if world.is_first() { session } else { session.resuming(resumed) };
        Ok(session.among(world.clone()))
    }

    /// Refuses other inputs than those of rank 0.
    fn same_as(&self, first: &RunFingerprint) -> Result<()> {
        let names = self.origin.digests.iter().filter(|(name, digest)| first.digests.get(*name) != Some(digest));
        let mut differ: Vec<String> = names.map(|(name, _)| name.clone()).collect();
        differ.extend(self.origin.changes(first)?.mathematics);
        match differ.is_empty() {
            true => Ok(()),
            false => Err(invalid!(
                "this rank has not the inputs of rank 0: {}; give all ranks the same files and settings",
                differ.join(", ")
            )),
        }
    }

    /// The session of a rank that writes, and the state that it resumes from.
    fn begin_in(self, out: &Path, launch: &RunOptions) -> Result<(Session, Option<Snapshot>)> {
        let _phase = meter::within(meter::Phase::Save);
        output::make(out, self.stage.name())?;
        let lock = lock::lock(out)?;
        let store = Store::at(out.join(output::CHECKPOINTS));
        let found = match &launch.resume {
            Some(from) => self.find(&store, out, from, launch)?,
            None => None,
        };
        let settings = self.config.to_toml()?;
        let has_events = self.config.report_to == ReportTo::Tensorboard;
        let former = match &found {
            Some(found) => output::go_on_from(&found.path, out, self.stage.name(), &settings)?,
            None => output::begin_in_place(out, self.stage.name(), &settings)?,
        };
        let report = Report::open(out, found.as_ref().map(|found| found.manifest.positions), has_events)?;
        let report = LivePage::follow(report, out, self.about(launch)?, found.is_some());
        let checkpoints = CheckpointManager {
            store,
            saving: self.config.checkpoint.clone(),
            origin: self.origin,
            bases: self.bases,
            command: launch.command.clone(),
            last: found.as_ref().map(|found| (found.manifest.step, found.path.clone())),
            former,
            lock,
        };
        let session = Session::new(report).guarded(Guard::new(self.config.guard.clone()));
        let resumed = found.map(|found| found.snapshot);
        Ok((session.kept(checkpoints, resumed.clone()), resumed))
    }

    /// What the run's page says of how it was started.
    fn about(&self, launch: &RunOptions) -> Result<About> {
        let device = device_name(self.stage, &self.config)?;
        Ok(About { fingerprints: self.origin.digests.clone(), ..About::new(&launch.command, &device) })
    }

    /// The checkpoint to resume from; `None` if there is none and `--from-start` allows it (a notice is printed).
    fn find(&self, store: &Store, out: &Path, from: &Path, launch: &RunOptions) -> Result<Option<Found>> {
        let found = if asks_for_newest(from, out) {
            let (found, passed) = store.newest()?;
            for reason in passed {
                crate::tell!("passed over {reason}");
            }
            found
        } else {
            let parent = from.parent().unwrap_or(Path::new(""));
            if !same(parent, &out.join(output::CHECKPOINTS)) {
                return Err(invalid!(
                    "--resume {}: that is no checkpoint of {}; name one of {}, or --resume latest",
                    from.display(),
                    out.display(),
                    out.join(output::CHECKPOINTS).display()
                ));
            }
            Some(store::read(from).map_err(|e| invalid!("--resume {}: {e:#}", from.display()))?)
        };
        let Some(found) = found else {
            if !launch.from_start {
                return Err(without_checkpoint(out));
            }
            note!("{}: no checkpoint to go on from; the run begins at step 0", out.display());
            return Ok(None);
        };
        self.origin.check_inputs(&found.manifest.origin)?;
        let changes = self.origin.changes(&found.manifest.origin)?;
        // The refusal names the others.
        let taken = if launch.force { &changes.mathematics[..] } else { &[] };
        for line in changes.harmless.iter().chain(taken) {
            crate::tell!("changed since {}: {line}", found.path.display());
        }
        if !changes.mathematics.is_empty() && !launch.force {
            return Err(invalid!(
                "these settings change the mathematics of the run in {}: {}; put them back, or go on with --force",
                out.display(),
                changes.mathematics.join(", ")
            ));
        }
        note!("going on from {}, after {}", found.path.display(), counted(found.manifest.step, "step"));
        Ok(Some(found))
    }
}

/// Whether `--resume` asks for the newest checkpoint of `out`.
fn asks_for_newest(from: &Path, out: &Path) -> bool {
    from == Path::new("latest") || same(from, out)
}

fn without_checkpoint(out: &Path) -> anyhow::Error {
    invalid!(
        "--resume: {} has no checkpoint that can be read; add --from-start to begin at step 0 where there is none, or \
         leave --resume out",
        out.display()
    )
}

/// Checks, before anything is opened, that the folder allows what the options ask for.
///
/// # Errors
/// If a process uses the folder, a run in it would be lost without `--overwrite`, or an input of this run with it, or `--resume`
/// finds no checkpoint.
pub(crate) fn check(stage: Stage, config: &Config, out: &Path, launch: &RunOptions) -> Result<()> {
    // What else is wrong with the folder of a live run may be right in a minute.
    lock::check(out)?;
    // A run that cannot save what it has trained has trained for nothing.
    let members = if stage == Stage::Reward { config.reward().ensemble } else { usize::MAX };
    let adapters = output::adapters_of(stage.name()).iter().take(members);
    adapters.into_iter().try_for_each(|name| Adapter::check_replaceable(&out.join(name)))?;
    match &launch.resume {
        None if launch.overwrite => {}
        None => output::check_free(out, stage.name())?,
        Some(from) if !asks_for_newest(from, out) || output::has_checkpoint(out) => return Ok(()),
        Some(_) if !launch.from_start => return Err(without_checkpoint(out)),
        // A finished run without checkpoints, of other settings: to begin at step 0 is to replace it.
        Some(_) => output::check_free(out, stage.name())?,
    }
    output::check_inputs(out, stage.name(), &config.inputs(stage))
}

fn same(a: &Path, b: &Path) -> bool {
    fs::canonicalize(a).ok().zip(fs::canonicalize(b).ok()).is_some_and(|(a, b)| a == b)
}

/// The summary of the finished run in `out`, if `--resume` asks for the same run. One whose adapters are not all there is made
/// again from its newest checkpoint (a notice is printed).
///
/// # Errors
/// If the config has no form in TOML; if an adapter is missing and there is no checkpoint.
pub(crate) fn finished(stage: Stage, config: &Config, out: &Path, launch: &RunOptions) -> Result<Option<Value>> {
    let asked = launch.resume.as_deref().is_some_and(|from| asks_for_newest(from, out));
    if !asked || !output::is_of(out, stage.name(), &config.to_toml()?) {
        return Ok(None);
    }
    let Ok(text) = fs::read_to_string(out.join(output::SUMMARY)) else { return Ok(None) };
    let summary: Value =
        serde_json::from_str(&text).with_context(|| format!("reading {}", out.join(output::SUMMARY).display()))?;
    let finished = format!("{}: this run is finished", out.display());
    match output::missing(out, stage.name(), &summary).first() {
        None => note!("{finished}; there is nothing to resume"),
        Some(file) if output::has_checkpoint(out) => {
            crate::tell!(
                "{finished}, and {} is missing; the run goes on from a checkpoint to write it",
                file.display()
            );
            return Ok(None);
        }
        Some(file) => {
            return Err(invalid!(
                "{finished}, and {} is missing; put it back, or train again with --overwrite in place of --resume",
                file.display()
            ));
        }
    }
    Ok(Some(summary))
}

/// The words of this process's command line, changed so that they resume the run.
pub fn resuming_command(words: impl IntoIterator<Item = String>) -> String {
    let mut words: Vec<String> = words.into_iter().collect();
    while let Some(at) = words.iter().position(|w| w == "--resume" || w.starts_with("--resume=")) {
        let has_value = words[at] == "--resume" && words.get(at + 1).is_some_and(|w| !w.starts_with('-'));
        words.drain(at..at + 1 + usize::from(has_value));
    }
    words.retain(|w| !["--overwrite", "--force", "--from-start"].contains(&w.as_str()));
    words.push("--resume".into());
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it: in quotes where it would be more than a word.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resuming_command_adds_resume_and_drops_one_time_options() {
        let command = |line: &[&str]| resuming_command(line.iter().map(ToString::to_string));
        assert_eq!(command(&["fourfold", "sft", "a.toml"]), "fourfold sft a.toml --resume");
        assert_eq!(
            command(&["fourfold", "sft", "a.toml", "--overwrite", "--set", "data.path=\"x y\""]),
            "fourfold sft a.toml --set 'data.path=\"x y\"' --resume"
        );
        for resume in [&["--resume", "latest"][..], &["--resume=a/b"], &["--resume"]] {
            let line = [&["fourfold", "sft", "a.toml"], resume, &["--force", "--from-start", "--json"]].concat();
            assert_eq!(command(&line), "fourfold sft a.toml --json --resume");
        }
    }
}
