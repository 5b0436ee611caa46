//! The full screen of `watch`: what keys do, when files are read again, and how the terminal gets back what it was. It does
//! not depend on what is shown.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::facts::Facts;
use super::screen::{Choice, draw};
use super::visible::in_a_line;
use super::{EVERY, Watched};
use crate::error::Interrupted;
use crate::report::clocks::now;
use crate::train::stop;

/// A screen on which nothing changed is drawn again after this time.
const CLOCK: Duration = Duration::from_secs(1);
/// What is shown is computed anew at most one part in this of the time: of 20,000 steps it takes some 20 ms.
const SHARE: u32 = 100;

/// Whether [`follow`] has a terminal to draw on.
pub fn is_possible() -> bool {
    std::io::stdout().is_terminal()
}

/// Follows the run in `path` on the whole terminal until a key ends it.
///
/// # Errors
/// If there is no run in `path`, if the terminal cannot be drawn on, or if a signal ended it: the terminal is restored first.
pub fn follow(path: &Path) -> Result<()> {
    // Before the screen is taken: an error is printed on the usual one.
    let watched = Watched::open(path)?;
    let ended = end_by_signal()?;
    // Restored on a panic, too.
    let mut terminal = ratatui::try_init().context("drawing on the terminal")?;
    let done = run(&mut terminal, watched, &ended);
    let restored = ratatui::try_restore().context("restoring the terminal");
    done.and(restored)
}

/// A flag that SIGTERM, SIGINT and SIGHUP set.
fn end_by_signal() -> Result<Arc<AtomicBool>> {
    let ended = Arc::<AtomicBool>::default();
    #[cfg(unix)]
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, ended.clone()).context("handling signals")?;
    }
    stop::heard(true);
    Ok(ended)
}

fn run(terminal: &mut DefaultTerminal, mut watched: Watched, ended: &AtomicBool) -> Result<()> {
    let (mut facts, mut choice) = (Facts::of(&watched.run), Choice::default());
    let mut stamp = watched.run.stamp();
    let mut looked = Instant::now();
    let (mut made, mut cost) = (Instant::now(), Duration::ZERO);
    let mut drawn: Option<Instant> = None;
    loop {
        // The time since the last line moves on where nothing else does.
        if drawn.is_none_or(|at| at.elapsed() >= CLOCK) {
            let mut most = 0;
            terminal.draw(|frame| most = draw(frame, &facts, &choice, now())).context("drawing on the terminal")?;
            choice.scrolled = choice.scrolled.min(most);
            drawn = Some(Instant::now());
        }
        let left = EVERY.saturating_sub(looked.elapsed());
        if event::poll(left.max(Duration::from_millis(1))).context("reading keys")? {
            drawn = None;
            match event::read().context("reading keys")? {
                Event::Key(key) if key.kind != KeyEventKind::Release && !press(key, &mut choice, &facts) => {
                    return Ok(());
                }
                _ => {}
            }
        }
        if ended.load(Ordering::Relaxed) {
            return Err(Interrupted("watch: ended by a signal; the run goes on".into()).into());
        }
        if looked.elapsed() >= EVERY {
            looked = Instant::now();
            let before = facts.samples_read;
            match watched.refresh() {
                Ok(()) => {
                    let found = watched.run.stamp();
                    if found != stamp && made.elapsed() >= cost * SHARE {
                        let begun = Instant::now();
                        facts = Facts::of(&watched.run);
                        (stamp, drawn, made, cost) = (found, None, Instant::now(), begun.elapsed());
                        choice.keep_sample(before, &facts);
                    }
                }
                Err(error) => (facts.problems, drawn) = (vec![in_a_line(&format!("{error:#}"))], None),
            }
        }
    }
}

impl Choice {
    /// A sample that was chosen stays when newer ones come; the newest is always the newest.
    fn keep_sample(&mut self, before: usize, facts: &Facts) {
        if self.sample > 0 {
            self.sample += facts.samples_read.saturating_sub(before);
        }
        if self.sample >= facts.samples.len() {
            self.sample = 0;
        }
    }
}

/// What a key does; returns whether the view goes on.
pub(super) fn press(key: KeyEvent, choice: &mut Choice, facts: &Facts) -> bool {
    let turn = |choice: &Choice, by: usize| {
        let count = facts.groups.len().max(1);
        let number = (choice.group_of(&facts.groups) + by) % count;
        // The first is whatever stage is the newest.
        facts.groups.get(number).filter(|_| number > 0).map(|group| (group.stage.clone(), group.name))
    };
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Tab | KeyCode::Right => (choice.group, choice.scrolled) = (turn(choice, 1), 0),
        KeyCode::BackTab | KeyCode::Left => {
            (choice.group, choice.scrolled) = (turn(choice, facts.groups.len().max(1) - 1), 0);
        }
        KeyCode::Down => choice.scrolled += 1,
        KeyCode::Up => choice.scrolled = choice.scrolled.saturating_sub(1),
        KeyCode::Char('s') => choice.sample = (choice.sample + 1) % facts.samples.len().max(1),
        _ => {}
    }
    true
}
