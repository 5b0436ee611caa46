//! Rollouts that are too large to hold, and plans of the largest that are not: both take seconds, and a signal ends them.

use std::io::Read;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::told::{done, place, refused};

#[test]
fn a_rollout_too_large_to_hold_is_refused_at_once_and_the_largest_is_planned_within_seconds() {
    let p = place();
    let says = ["[grpo] a rollout of", "is more than 32768; use fewer"];
    refused(&p, "grpo grpo.toml --out o --set grpo.gradient_accumulation_steps=4000000000000", &says);
    refused(&p, "grpo grpo.toml --out o --set grpo.generation_batch_size=400000", &says);
    refused(&p, "ppo run.toml --out o --set ppo.batch_size=4000000000000", &["[ppo] a rollout of 4000000000000"]);
    refused(&p, "grpo grpo.toml --out o --set grpo.num_generations=100000", &["lower num_generations"]);
    let most = "--set grpo.gradient_accumulation_steps=8192 --set grpo.max_steps=10000 --set memory.limit=1MiB";
    let began = std::time::Instant::now();
    refused(&p, &format!("grpo grpo.toml --out o {most}"), &["memory"]);
    assert!(began.elapsed().as_secs() < 120, "{:?}", began.elapsed());
    // Passes that a plan leaves out take nothing that it counts: with a reference, whose rows are kept, it grows evenly.
    let needs = |accumulation: usize| {
        let set = format!("--set grpo.gradient_accumulation_steps={accumulation} --set grpo.beta=0.1");
        let plan: Value = serde_json::from_str(&done(&p, &format!("plan grpo.toml --json {set}")).stdout).unwrap();
        let bytes = |of: &str| plan["phases"]["scoring"][of].as_f64().unwrap();
        // The process's own bytes differ from one plan to the next.
        bytes("own") - bytes("process")
    };
    let [a, b, c] = [256, 512, 768].map(needs);
    assert!(b > a && ((c - b) / (b - a) - 1.0).abs() < 0.05, "{a} {b} {c}");
}

#[cfg(unix)]
#[test]
fn a_run_that_is_asked_to_stop_while_it_plans_stops() {
    let p = place();
    let set = ["grpo.gradient_accumulation_steps=8192", "grpo.max_steps=1000000", "memory.limit=1MiB"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.args(["grpo", "grpo.toml", "--out", "o"]).args(set.iter().flat_map(|set| ["--set", set]));
    let mut child = command.current_dir(p.path("")).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    // It plans once it has read its data, and goes on for seconds.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let began = std::time::Instant::now();
    let code = child.wait().unwrap().code();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(code, Some(130), "{stderr}");
    assert!(stderr.contains("stopped before the first step"), "{stderr}");
    assert!(began.elapsed().as_secs() < 5 && !p.path("o").exists(), "{:?}", began.elapsed());
}
