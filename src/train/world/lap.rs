//! How long each rank works between two meetings: a rank that takes longer than the others holds them all up, and is named. It
//! does not depend on a stage. Read `mod.rs` for the meetings.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::report::{Metrics, number};

/// A rank is slow that works this many times as long as the others on average.
const SLOW: f64 = 1.5;
/// Shorter laps are not compared, seconds.
const SHORT: f64 = 1.0;

/// The clocks of one rank.
#[derive(Default)]
pub(super) struct Clocks {
    lap: Mutex<Option<Since>>,
    warned: AtomicBool,
}

#[derive(Clone, Copy)]
struct Since {
    begun: Instant,
    waited: Duration,
}

impl Clocks {
    fn since(&self) -> MutexGuard<'_, Option<Since>> {
        self.lap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the time until it is dropped as waiting.
    pub(super) fn waiting(&self) -> Waiting<'_> {
        Waiting(self, Instant::now())
    }

    /// Time since the lap began that was not waited, seconds; another lap begins. The first begins with the first meeting.
    pub(super) fn lap(&self) -> f64 {
        let now = Instant::now();
        let lap = self.since().replace(Since { begun: now, waited: Duration::ZERO });
        lap.map_or(0.0, |lap| (now - lap.begun).saturating_sub(lap.waited).as_secs_f64())
    }

    /// What is said of a slow rank, once.
    pub(super) fn slow(&self, seconds: &[f64]) -> Option<String> {
        let text = slowest(seconds)?;
        (!self.warned.swap(true, Ordering::Relaxed)).then_some(text)
    }
}

/// The rank that works much longer than the others, if there is one.
fn slowest(seconds: &[f64]) -> Option<String> {
    let (rank, most) = seconds.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let others = (seconds.iter().sum::<f64>() - most) / (seconds.len() - 1).max(1) as f64;
    (most >= SHORT && most > SLOW * others).then(|| {
        format!(
            "rank {rank} works {most:.1} s where the others work {others:.1} s on average, and all wait for it; see what else runs \
             on its machine, or leave it out"
        )
    })
}

/// A wait for other ranks.
pub(super) struct Waiting<'c>(&'c Clocks, Instant);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Self(clocks, begun) = *self;
        let mut lap = clocks.since();
        let waited = begun.elapsed();
        match lap.as_mut() {
            Some(lap) => lap.waited += waited,
            None => *lap = Some(Since { begun: begun + waited, waited: Duration::ZERO }),
        }
    }
}

/// What [`super::World::lap`] finds.
pub struct Lap {
    /// (N) seconds of each rank.
    pub seconds: Vec<f64>,
    /// What is to be said of a slow rank.
    pub warning: Option<String>,
}

impl Lap {
    /// The columns `seconds/rank/K`.
    pub fn metrics(&self) -> Metrics {
        let named = self.seconds.iter().enumerate();
        named.map(|(rank, &seconds)| (format!("seconds/rank/{rank}"), number(seconds))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_slow_that_works_half_again_as_long_as_the_others_and_is_named_once() {
        assert_eq!(slowest(&[2.0, 2.9, 2.0]), None);
        assert!(slowest(&[2.0, 2.0, 3.1]).unwrap().starts_with("rank 2 works 3.1 s where the others work 2.0 s"));
        assert_eq!(slowest(&[0.1, 0.9]), None, "too short to be compared");
        let clocks = Clocks::default();
        assert!(clocks.slow(&[9.0, 1.0]).is_some() && clocks.slow(&[9.0, 1.0]).is_none());
    }

    #[test]
    fn waiting_is_no_work() {
        let clocks = Clocks::default();
        let begun = Instant::now();
        assert_eq!(clocks.lap(), 0.0, "nothing before the first meeting");
        let waiting = clocks.waiting();
        let waited = Instant::now();
        while waited.elapsed() < Duration::from_millis(30) {}
        drop(waiting);
        let (worked, whole) = (clocks.lap(), begun.elapsed().as_secs_f64());
        assert!(worked <= whole - 0.03 + 1e-9, "{worked} of {whole}");
    }
}
