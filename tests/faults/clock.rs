//! Clocks that jump: a change of the system's time changes no number, loses no checkpoint and stops no run.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::support::Place;
use crate::world::{assert_same, interrupted, line, place, run_all, start, wait_for_lines};

/// In place of the C library's: the wall clock is in another century at every look, before 1970 at some, and the steady
/// clock jumps ahead by hours.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static atomic_long looks;
    int r = (int)syscall(SYS_clock_gettime, id, t);
    long n = atomic_fetch_add(&looks, 1);
    if (id == CLOCK_REALTIME) {
        if (n % 3 == 0) t->tv_sec += 4000000000L;
        else if (n % 3 == 1) t->tv_sec = -2000000000L;
        else t->tv_sec = 0;
    } else if (id == CLOCK_MONOTONIC) {
        t->tv_sec += n / 64 * 3600;
    }
    return r;
}
"#;

/// The compiler that links Rust programs here builds the shim.
fn shim(place: &Place) -> PathBuf {
    place.write("clock.c", SHIM);
    let library = place.path("clock.so");
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(place.path("clock.c")).output();
    let built = built.expect("cc, which links Rust programs, is there");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    library
}

fn jumping(place: &Place, shim: &std::path::Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.args(line.split_whitespace()).current_dir(place.path("")).env("LD_PRELOAD", shim).stdin(Stdio::null());
    command
}

#[test]
fn a_run_stopped_and_resumed_under_a_jumping_clock_ends_with_the_same_bytes() {
    let (whole, jumpy) = (place(), place());
    let shim = shim(&jumpy);
    run_all(&whole, &["sft", "reward", "ppo"]);
    for stage in ["sft", "reward", "ppo"] {
        // 1. Stopped in its middle.
        let mut child = jumping(&jumpy, &shim, &line(stage)).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_lines(&jumpy.path(&format!("out/{stage}/metrics.jsonl")), 1);
        if child.try_wait().unwrap().is_none() {
            crate::world::signal(&child, libc::SIGTERM);
        }
        let ran = crate::world::finish(child);
        assert!([0, 130].contains(&ran.code), "{stage}: {}", ran.stderr);
        // 2. And gone on with.
        let output = jumping(&jumpy, &shim, &format!("{} --resume", line(stage))).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !told.contains("panicked"), "{stage}: {told}");
        assert_same(&whole, &jumpy, stage, "under a clock that jumps");
    }
}

#[test]
fn the_newest_checkpoint_is_the_one_with_the_most_steps_whatever_its_file_times() {
    let (whole, turned) = (place(), place());
    run_all(&whole, &["sft"]);
    let ran = interrupted(&turned, "sft", 2, libc::SIGTERM);
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    let checkpoints = turned.path("out/sft/checkpoints");
    let mut names: Vec<PathBuf> = fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort_by_key(|path| {
        path.display().to_string().rsplit('-').next().and_then(|n| n.parse::<f64>().ok()).map(|n| n as u64)
    });
    assert_eq!(names.len(), 2, "{names:?}");
    let day = Duration::from_secs(86_400);
    // The newer one's files and folder say 1970, the older one's tomorrow.
    for (path, time) in names.iter().zip([SystemTime::now() + day, SystemTime::UNIX_EPOCH]) {
        for file in fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).chain([path.clone()]) {
            fs::File::open(file).unwrap().set_modified(time).unwrap();
        }
    }
    let ran = turned.run(&format!("{} --resume", line("sft")));
    let newest = names[1].file_name().unwrap().to_str().unwrap();
    assert!(ran.code == 0 && ran.stderr.contains(&format!("checkpoints/{newest}, after")), "{}", ran.stderr);
    assert_same(&whole, &turned, "sft", "by number and not by time");
}

#[test]
fn a_base_whose_files_are_touched_during_a_run_is_still_the_same_base() {
    let place = place();
    let child = start(&place, &format!("{} --set sft.num_train_epochs=2000", line("sft")));
    let metrics = place.path("out/sft/metrics.jsonl");
    wait_for_lines(&metrics, 2);
    let weights = fs::File::open(place.path("base/model.safetensors")).unwrap();
    for time in [SystemTime::UNIX_EPOCH, SystemTime::now() + Duration::from_secs(1 << 32)] {
        weights.set_modified(time).unwrap();
        let lines = fs::read_to_string(&metrics).unwrap().lines().count();
        wait_for_lines(&metrics, lines + 3);
    }
    crate::world::signal(&child, libc::SIGTERM);
    let ran = crate::world::finish(child);
    assert!(
        ran.code == 130 && !ran.stderr.contains("replaced") && !ran.stderr.contains("written into"),
        "{}",
        ran.stderr
    );
}
