//! The real commands on the emulated machine: a run that is interrupted on the CPU and resumed on a device.

use std::fs;

use serde_json::Value;

use crate::fault_world::{interrupted, line, place, run_all};
use crate::stages::assert_same_figures;
use crate::support::Place;
use crate::world::{emulated, say, timed};

fn figures(place: &Place, stage: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(&format!("out/{stage}/metrics.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_command_that_was_interrupted_on_the_cpu_goes_on_on_a_device() {
    if emulated().is_none() {
        return;
    }
    let _time = timed("commands that move");
    let (stayed, moved) = (place(), place());
    run_all(&stayed, &["sft", "reward", "ppo"]);
    run_all(&moved, &["sft", "reward"]);
    fs::remove_dir_all(moved.path("out/sft")).unwrap();
    for stage in ["sft", "ppo"] {
        let ran = interrupted(&moved, stage, 1, libc::SIGTERM);
        assert_eq!(ran.code, 130, "{stage}: {}", ran.stderr);
        let ran = moved.run(&format!("{} --resume --device emulated", line(stage)));
        assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
        assert!(ran.stderr.contains("emulated"), "{stage}: the machine is named: {}", ran.stderr);
        let worst = assert_same_figures(stage, &figures(&moved, stage), &figures(&stayed, stage), 1e-4);
        say(&format!("fourfold {stage}, begun on the CPU and resumed on a device: figures within {worst:.1e}"));
        if stage == "sft" {
            // What follows starts from the adapter that the inputs' digests know.
            fs::remove_dir_all(moved.path("out/sft")).unwrap();
            run_all(&moved, &["sft"]);
        }
    }
}
