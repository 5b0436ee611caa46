//! A run of many iterations takes as much memory, files and time per iteration at its end as at its beginning.
//!
//! The long run: `FOURFOLD_SOAK=2000 cargo test --release --test faults soak -- --nocapture`.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::world::{finish, line, place, run_all, start};

/// A moment of a process.
#[derive(Clone, Copy, Debug)]
struct Moment {
    iterations: usize,
    resident: f64,
    handles: usize,
    /// Processor time so far, all threads, seconds.
    busy: f64,
}

/// Follows a process and the lines of its metrics.
struct Watcher {
    process: PathBuf,
    metrics: PathBuf,
    read: u64,
    lines: usize,
}

impl Watcher {
    /// `None` where the process has ended.
    fn look(&mut self) -> Option<Moment> {
        let mut new = vec![];
        if let Ok(mut file) = fs::File::open(&self.metrics) {
            file.seek(SeekFrom::Start(self.read)).ok()?;
            self.read += file.read_to_end(&mut new).ok()? as u64;
            self.lines += new.iter().filter(|&&b| b == b'\n').count();
        }
        let text = |name: &str| fs::read_to_string(self.process.join(name)).ok();
        let numbers = |text: &str| text.split_whitespace().filter_map(|n| n.parse::<f64>().ok()).collect::<Vec<_>>();
        let resident = *numbers(&text("statm")?).get(1)? * 4096.0;
        // The name in brackets may hold spaces; utime and stime are fields 14 and 15.
        let stat = text("stat")?;
        let after: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let busy = after.get(11)?.parse::<f64>().ok()? + after.get(12)?.parse::<f64>().ok()?;
        let handles = fs::read_dir(self.process.join("fd")).ok()?.count();
        Some(Moment { iterations: self.lines, resident, handles, busy: busy / 100.0 }).filter(|_| resident > 0.0)
    }
}

/// The moments of one long PPO run, a learning rate so small that every iteration has the same work.
fn run(iterations: usize) -> Vec<Moment> {
    let place = place();
    run_all(&place, &["sft", "reward"]);
    let more = format!(
        "--set ppo.total_episodes={} --set ppo.learning_rate=1e-7 --set checkpoint.save_steps=100 --set ppo.eval_every=20",
        4 * iterations
    );
    let mut child = start(&place, &format!("{} {more}", line("ppo")));
    let process = Path::new("/proc").join(child.id().to_string());
    let mut watcher = Watcher { process, metrics: place.path("out/ppo/metrics.jsonl"), read: 0, lines: 0 };
    let mut moments = vec![];
    // Its stderr is a pipe that somebody must empty.
    let mut stderr = child.stderr.take().unwrap();
    let told = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).ok();
        text
    });
    while child.try_wait().unwrap().is_none() {
        moments.extend(watcher.look());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let ran = finish(child);
    assert_eq!(ran.code, 0, "{}", told.join().unwrap());
    moments
}

/// The first moment after so many iterations.
fn at(moments: &[Moment], iterations: usize) -> Moment {
    *moments.iter().find(|m| m.iterations >= iterations).expect("the run was watched to its end")
}

#[test]
fn soak_memory_handles_and_speed_at_the_end_are_those_of_the_beginning() {
    let asked: Option<usize> = std::env::var("FOURFOLD_SOAK").ok().and_then(|n| n.parse().ok());
    // Clocks of processes tick a hundred times a second, so that a short run's speed is known to some percent only.
    let (iterations, from, growth, change) = match asked {
        Some(n) => (n, 100, 0.02, 0.05),
        None => (160, 60, 0.05, 0.5),
    };
    assert!(iterations >= from + 100);
    // What the program itself slows down by shows in every run; what other processes take shows in some.
    let slower = (0..3).map(|_| slowdown(iterations, from, growth)).find(|&slower| slower < change);
    assert!(slower.is_some(), "in each of three runs the last iterations differ from the first by {change} or more");
}

/// Runs so many iterations, checks memory and handles from iteration `from` on, and gives by which share of the first
/// iterations' processor time the last ones differ.
fn slowdown(iterations: usize, from: usize, growth: f64) -> f64 {
    let moments = run(iterations);
    // The last iterations against as many from `from` on. Within one the allocator takes and gives pages: the middle of
    // many looks is what a run holds, a single look is where it happened to fall.
    let span = ((iterations - from) / 4).min(500);
    let resident = |first: usize| {
        let within = moments.iter().filter(|m| (first..first + span).contains(&m.iterations));
        let mut looks: Vec<f64> = within.map(|m| m.resident).collect();
        looks.sort_by(f64::total_cmp);
        looks[looks.len() / 2]
    };
    let (early, late) = (resident(from), resident(iterations - span));
    // Processor time an iteration in the fastest of some windows: other guests of the machine make windows slower, and none
    // faster.
    let window = (span / 10).max(5);
    let speed = |first: usize| {
        let of = |start: usize| {
            let (a, b) = (at(&moments, start), at(&moments, start + window));
            (b.busy - a.busy) / (b.iterations - a.iterations) as f64 * 1e3
        };
        (first..=first + span - window).step_by(window).map(of).fold(f64::INFINITY, f64::min)
    };
    let (first, last) = (speed(from), speed(iterations - 1 - span));
    let most = |of: fn(&Moment) -> usize| moments.iter().filter(|m| m.iterations >= from).map(of).max().unwrap();
    println!(
        "{iterations} iterations: resident {:.2} MiB from {from} on, {:.2} MiB in the last {span}; {} handles after {from}, {} at most \
         later; {first:.2} ms of processor time an iteration from {from} on, {last:.2} ms at the end",
        early / f64::from(1 << 20),
        late / f64::from(1 << 20),
        at(&moments, from).handles,
        most(|m| m.handles),
    );
    let grown = late / early - 1.0;
    assert!(grown.abs() < growth, "resident memory changed by {:.1}%", grown * 100.0);
    // While a checkpoint is written one more file is open.
    let handles = at(&moments, from).handles;
    assert!(most(|m| m.handles) <= handles + 2, "handles grow from {handles} to {}", most(|m| m.handles));
    (last / first - 1.0).abs()
}
