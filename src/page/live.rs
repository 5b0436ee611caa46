//! The page of a run that goes on: written when the run begins, every 30 seconds, at each evaluation and at the end. What it
//! costs is bounded: a page that takes long is written less often. It does not depend on a stage.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::Value;

use super::about::{About, State};
use crate::error::exit_code;
use crate::host::meter;
use crate::report::clocks::now;
use crate::report::{Follower, Metrics, Report};

/// Time between two pages where nothing is evaluated.
const EVERY: Duration = Duration::from_secs(30);
/// An evaluation brings a new page only if the last one's cost is at most one part in this of the time since.
const SHARE: u32 = 50;

/// Follows a run and writes its page.
pub struct LivePage {
    out: PathBuf,
    about: About,
    last: Instant,
    cost: Duration,
}

impl LivePage {
    /// Has the page of the run in `out` follow `report`. A resumed run keeps when it began and what it found. A page that
    /// cannot be written is reported, and the run goes on without one.
    pub fn follow(report: Report, out: &Path, about: About, resumed: bool) -> Report {
        match Self::begin(out, about, resumed) {
            Ok(page) => report.followed_by(page),
            Err(error) => {
                crate::tell!("{error:#}; the run has no page");
                report
            }
        }
    }

    fn begin(out: &Path, about: About, resumed: bool) -> Result<Self> {
        let former = if resumed { About::read(out).ok().flatten() } else { None };
        let mut about = About { started: now() as u64, ..about };
        if let Some(former) = former {
            (about.started, about.facts) = (former.started, former.facts);
        }
        let mut page = Self { out: out.into(), about, last: Instant::now(), cost: Duration::ZERO };
        page.write()?;
        Ok(page)
    }

    fn write(&mut self) -> Result<()> {
        // What a page takes for a moment is no part of the phase that it is written in.
        let _phase = meter::within(meter::Phase::Save);
        let begun = Instant::now();
        self.about.updated = now() as u64;
        self.about.write(&self.out)?;
        super::write(std::slice::from_ref(&self.out), &self.out.join(super::NAME))?;
        (self.cost, self.last) = (begun.elapsed(), Instant::now());
        Ok(())
    }
}

impl Follower for LivePage {
    fn stage(&mut self, stage: &str, steps: usize) -> Result<()> {
        self.about.stages.retain(|(name, _)| name != stage);
        self.about.stages.push((stage.into(), steps));
        self.write()
    }

    fn step(&mut self, line: &Metrics) -> Result<()> {
        let evaluated = line.keys().any(|key| key.starts_with("eval"));
        let passed = self.last.elapsed();
        match passed >= EVERY.max(self.cost * SHARE) || evaluated && passed >= self.cost * SHARE {
            true => self.write(),
            false => Ok(()),
        }
    }

    fn fact(&mut self, name: &str, fact: &Value) -> Result<()> {
        match name.strip_prefix("memory/") {
            Some(phase) => self.about.memory.entry(phase.into()).or_default().planned = fact.as_f64(),
            None => drop(self.about.facts.insert(name.into(), fact.clone())),
        }
        self.about.write(&self.out)
    }
}

/// Writes the last page of the run that this process began in `out`, if it began one there.
///
/// # Errors
/// If the folder cannot be written to.
pub fn finish(out: &Path, ended: Result<(), &anyhow::Error>) -> Result<()> {
    let Some(mut about) = About::read(out)? else { return Ok(()) };
    if about.process != std::process::id() || about.state != State::Running {
        return Ok(());
    }
    (about.state, about.reason) = match ended {
        Ok(()) => (State::Finished, String::new()),
        Err(error) if exit_code(error) == 130 => (State::Stopped, format!("{error:#}")),
        Err(error) => (State::Failed, format!("{error:#}")),
    };
    about.updated = now() as u64;
    for (phase, bytes) in meter::peaks().into_iter().filter(|(_, bytes)| *bytes > 0) {
        let mib = (bytes as f64 / f64::from(1 << 20) * 10.0).round() / 10.0;
        about.memory.entry(phase.name().into()).or_default().measured = Some(mib);
    }
    about.write(out)?;
    super::write(&[out.to_path_buf()], &out.join(super::NAME)).map(drop)
}
