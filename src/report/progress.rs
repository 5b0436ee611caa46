//! Progress on stderr of work that takes longer than two seconds: a bar with amount, rate and time left in a terminal, and a
//! line with the same every few seconds elsewhere. Nothing is shown where people asked for quiet. It does not depend on what
//! is done. A run's own bar, in `mod.rs`, stands among these.

use std::io::{IsTerminal, Read};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{
    BinaryBytes, HumanCount, HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle,
};

use super::quiet;

/// Without a terminal, a line at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// In a terminal.
const EVERY: Duration = Duration::from_millis(200);
/// Work that takes less has no progress.
const PATIENCE: Duration = Duration::from_secs(2);
/// The bar of a terminal; what stands behind it is cut at the terminal's width.
const BAR: &str = "{prefix}: {bar:12} {wide_msg}";

/// All bars of the process, which share the terminal's last lines.
static BARS: LazyLock<MultiProgress> = LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));

/// A bar of so many steps among all bars, below those that are there; hidden where people asked for quiet.
pub(super) fn bar(steps: u64, template: &str) -> ProgressBar {
    let bar = match quiet::is_set() {
        true => ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::hidden()),
        false => BARS.add(ProgressBar::new(steps)),
    };
    // The templates are constants; one with a fault would leave the library's own.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// What an amount of work is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, written as KiB, MiB and so on.
    Bytes,
    /// Things with a noun of a regular plural.
    Of(&'static str),
}

impl Unit {
    fn amount(self, number: usize) -> String {
        match self {
            Self::Bytes => BinaryBytes(number as u64).to_string(),
            Self::Of(noun) => format!("{} {noun}{}", HumanCount(number as u64), if number == 1 { "" } else { "s" }),
        }
    }

    /// `12 of 30 records`, `1.5 MiB of 3 MiB`.
    fn share(self, done: usize, all: usize) -> String {
        match self {
            Self::Bytes => format!("{} of {}", self.amount(done), self.amount(all)),
            Self::Of(_) => format!("{} of {}", HumanCount(done as u64), self.amount(all)),
        }
    }

    fn rate(self, per_second: f64) -> String {
        match self {
            Self::Bytes => format!("{} per second", self.amount(per_second as usize)),
            Self::Of(_) if per_second < 10.0 => format!("{per_second:.1} per second"),
            Self::Of(_) => format!("{} per second", HumanCount(per_second as u64)),
        }
    }
}

/// The progress of one piece of work. Dropping it takes its bar away.
pub struct Progress {
    what: String,
    unit: Unit,
    /// What was done before this work began.
    before: usize,
    done: usize,
    /// `usize::MAX` where it is not known.
    all: usize,
    began: Instant,
    shown: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Work called `what` begins, of the amount `all`.
    pub fn new(what: impl Into<String>, all: usize, unit: Unit) -> Self {
        Self::resumed(what, 0, all, unit)
    }

    /// The same where `before` of it was done by an earlier attempt, which has no part in the rate.
    pub fn resumed(what: impl Into<String>, before: usize, all: usize, unit: Unit) -> Self {
        Self { what: what.into(), unit, before, done: before, all, began: Instant::now(), shown: None, bar: None }
    }

    /// So much more is done.
    pub fn add(&mut self, more: usize) {
        self.set(self.done + more);
    }

    /// So much is done in all.
    pub fn set(&mut self, done: usize) {
        self.done = done.min(self.all);
        self.show(Instant::now(), std::io::stderr().is_terminal());
    }

    /// So much of the work falls away, as the tokens of a response that ends early.
    pub fn skip(&mut self, less: usize) {
        self.all = self.all.saturating_sub(less).max(self.done);
    }

    /// Bytes of `reader` are work done as they are read.
    pub fn reading<R: Read>(&mut self, reader: R) -> Reading<'_, R> {
        Reading { progress: self, reader }
    }

    /// The work is done: what took long enough to be shown leaves a line.
    pub fn finish(mut self) {
        self.clear();
        if self.shown.is_some() {
            let (all, seconds) = (self.unit.amount(self.done), self.began.elapsed().as_secs_f64());
            let line = format!("{}: {all} in {seconds:.1} s", self.what);
            BARS.suspend(|| crate::tell!("{line}"));
        }
    }

    fn show(&mut self, now: Instant, is_terminal: bool) {
        if !self.is_due(now, is_terminal) {
            return;
        }
        self.shown = Some(now);
        let text = self.text(now);
        match is_terminal {
            false => crate::tell!("{}: {text}", self.what),
            true => {
                let bar = self.bar.get_or_insert_with(|| bar(0, BAR));
                bar.set_prefix(self.what.clone());
                bar.set_length(self.all as u64);
                bar.set_position(self.done as u64);
                bar.set_message(text);
            }
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            BARS.remove(&bar);
        }
    }

    fn is_due(&self, now: Instant, is_terminal: bool) -> bool {
        let every = if is_terminal { EVERY } else { LINE_EVERY };
        !quiet::is_set() && now - self.began >= PATIENCE && self.shown.is_none_or(|at| now - at >= every)
    }

    /// `40%, 12 of 30 records, 6.0 per second, 3s left`.
    fn text(&self, now: Instant) -> String {
        let seconds = (now - self.began).as_secs_f64();
        let own = (self.done - self.before) as f64;
        let rate = self.unit.rate(own / seconds);
        if self.all == usize::MAX {
            return format!("{}, {rate}", self.unit.amount(self.done));
        }
        let left = match own {
            0.0 => String::new(),
            _ => {
                let left = (self.all - self.done) as f64 / own * seconds;
                format!(", {:#} left", HumanDuration(Duration::from_secs_f64(left.min(1e9))))
            }
        };
        let share = 100.0 * self.done as f64 / self.all.max(1) as f64;
        format!("{share:.0}%, {}, {rate}{left}", self.unit.share(self.done, self.all))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A reader whose bytes are progress.
pub struct Reading<'p, R> {
    progress: &'p mut Progress,
    reader: R,
}

impl<R: Read> Read for Reading<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.progress.add(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(seconds: f64, unit: Unit, done: usize, all: usize) -> (Progress, Instant) {
        let mut progress = Progress::new("work", all, unit);
        progress.done = done;
        let now = progress.began + Duration::from_secs_f64(seconds);
        (progress, now)
    }

    #[test]
    fn amount_rate_and_time_left_are_those_of_the_work_done() {
        let text = |seconds, unit, done, all| {
            let (progress, now) = after(seconds, unit, done, all);
            progress.text(now)
        };
        let records = Unit::Of("record");
        assert_eq!(text(2.0, records, 12, 30), "40%, 12 of 30 records, 6.0 per second, 3s left");
        assert_eq!(text(10.0, records, 1, 1), "100%, 1 of 1 record, 0.1 per second, 0s left");
        assert_eq!(text(4.0, Unit::Of("token"), 2000, 100_000), "2%, 2,000 of 100,000 tokens, 500 per second, 3m left");
        assert_eq!(text(2.0, Unit::Bytes, 3 << 20, 6 << 20), "50%, 3.00 MiB of 6.00 MiB, 1.50 MiB per second, 2s left");
        assert_eq!(text(2.0, records, 0, 5), "0%, 0 of 5 records, 0.0 per second", "nothing is known of the time left");
        assert!(text(2.0, records, 0, 0).starts_with("0%, 0 of 0 records"));
        assert_eq!(text(2.0, records, 8, usize::MAX), "8 records, 4.0 per second", "of an unknown amount");
        // An earlier attempt is done, and was not done in this time.
        let (mut progress, now) = after(2.0, records, 8, 10);
        progress.before = 6;
        assert_eq!(progress.text(now), "80%, 8 of 10 records, 1.0 per second, 2s left");
    }

    #[test]
    fn short_work_shows_nothing_and_long_work_a_line_every_few_seconds() {
        let (mut progress, begin) = after(0.0, Unit::Of("record"), 1, 10);
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        assert!(!progress.is_due(at(1.9), false) && !progress.is_due(at(1.9), true));
        assert!(progress.is_due(at(2.1), false) && progress.is_due(at(2.1), true));
        progress.shown = Some(at(2.1));
        assert!(!progress.is_due(at(7.0), false) && progress.is_due(at(7.2), false));
        assert!(!progress.is_due(at(2.2), true) && progress.is_due(at(2.4), true));
    }

    #[test]
    fn work_that_falls_away_is_neither_done_nor_left() {
        let (mut progress, _) = after(0.0, Unit::Of("token"), 0, 100);
        progress.add(10);
        progress.skip(40);
        assert_eq!((progress.done, progress.all), (10, 60));
        progress.skip(1000);
        assert_eq!((progress.done, progress.all), (10, 10));
        progress.add(5);
        assert_eq!(progress.done, 10, "never more than all");
        let mut progress = Progress::new("read", 5, Unit::Bytes);
        std::io::copy(&mut progress.reading(&b"abc"[..]), &mut std::io::sink()).unwrap();
        assert_eq!(progress.done, 3);
    }
}
