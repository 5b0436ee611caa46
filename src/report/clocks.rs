//! The columns of metrics.jsonl that no two runs share: when a line was written, how long its steps took, and how fast
//! tokens passed. A resumed run ends with the bytes of a run never stopped in every other column. It does not depend on
//! the metrics.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::{Metrics, number};

/// Wall time since the line before, seconds; of a stage's first line, since the stage began or was resumed.
pub const SECONDS: &str = "seconds";
/// Tokens trained on (PPO: sampled) per second of the steps alone, without evaluations and checkpoints.
pub const TOKENS_PER_SECOND: &str = "tokens_per_second";
/// When the line was written, seconds since 1970 (UTC).
pub const TIME: &str = "time";

/// The time of day, seconds since 1970 (UTC); 0 under a clock that is set before. It is only printed, never decided by.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Whether a column holds a time or a rate. `seconds/PHASE` and `tokens_per_second/PHASE` are parts of the columns above.
pub fn is_clock(key: &str) -> bool {
    let whole = key.split('/').next().unwrap_or(key);
    key == TIME || [SECONDS, TOKENS_PER_SECOND].contains(&whole)
}

/// The lines of a metrics.jsonl without their clock columns: what two equal runs have in common. A line that is no
/// object stays as it is.
pub fn without(text: &str) -> String {
    let line = |line: &str| match serde_json::from_str::<Metrics>(line) {
        Ok(mut metrics) => {
            metrics.retain(|key, _| !is_clock(key));
            format!("{}\n", Value::Object(metrics))
        }
        Err(_) => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

/// The clocks of the line that comes next.
pub(super) struct Clocks {
    since: Instant,
    tokens: usize,
    working: Duration,
}

impl Default for Clocks {
    fn default() -> Self {
        Self { since: Instant::now(), tokens: 0, working: Duration::ZERO }
    }
}

impl Clocks {
    /// Counts tokens and the time that they took.
    pub(super) fn passed(&mut self, tokens: usize, time: Duration) {
        self.tokens += tokens;
        self.working += time;
    }

    /// The columns of a line that is written now; the next line counts from here.
    pub(super) fn lap(&mut self) -> Metrics {
        let Self { since, tokens, working } = std::mem::take(self);
        // To the microsecond: more digits are noise.
        let rounded = |seconds: f64| number((seconds * 1e6).round() / 1e6);
        let mut columns = Metrics::new();
        columns.insert(SECONDS.into(), rounded(since.elapsed().as_secs_f64()));
        if tokens > 0 && !working.is_zero() {
            columns.insert(TOKENS_PER_SECOND.into(), rounded(tokens as f64 / working.as_secs_f64()));
        }
        columns.insert(TIME.into(), rounded(now()));
        columns
    }
}
