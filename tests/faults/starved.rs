//! No room on the disk, no room in memory, nowhere to write.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Place, Ran};
use crate::world::{assert_same, copy, line, place, run_all};

/// Runs a command under a limit of the shell.
fn limited(place: &Place, limit: &str, line: &str) -> Ran {
    let command = format!("ulimit {limit}; exec \"$0\" {line}");
    let output = Command::new("sh")
        .args(["-c", &command, env!("CARGO_BIN_EXE_fourfold")])
        .current_dir(place.path(""))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ran { code: output.status.code().unwrap_or(-1), stdout: String::new(), stderr }
}

/// A limit on the size of files fails writes as a full disk does. `sh` counts blocks of 512 bytes.
#[test]
fn a_disk_too_full_for_a_checkpoint_stops_no_training_and_one_too_full_for_the_result_loses_none() {
    let (whole, starved) = (place(), place());
    run_all(&whole, &["sft"]);
    let adapter = fs::metadata(whole.path("out/sft/adapter/adapter_model.safetensors")).unwrap().len();
    let checkpoint = fs::read_dir(whole.path("out/sft/checkpoints")).unwrap().next().unwrap().unwrap().path();
    let state = fs::metadata(checkpoint.join("state.safetensors")).unwrap().len();
    assert!(state > 2 * adapter, "{state} {adapter}");
    // 1. Room for adapters, none for checkpoints.
    let blocks = (adapter + 16384) / 512;
    let ran = limited(&starved, &format!("-f {blocks}"), &line("sft"));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains("no checkpoint after 1 steps") && ran.stderr.contains("training goes on"));
    assert_same(&whole, &starved, "sft", "without checkpoints");
    assert_eq!(fs::read_dir(starved.path("out/sft/checkpoints")).unwrap().count(), 0, "no half of one is left");
    // 2. A good checkpoint stands; then there is no room even for the result.
    fs::remove_dir_all(starved.path("out/sft")).unwrap();
    copy(&whole.path("out/sft"), &starved.path("out/sft"));
    fs::remove_dir_all(starved.path("out/sft/adapter")).unwrap();
    fs::remove_file(starved.path("out/sft/summary.json")).unwrap();
    let ran = limited(&starved, &format!("-f {}", adapter / 512 / 2), &format!("{} --resume", line("sft")));
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("error: ") && !starved.path("out/sft/adapter").exists(), "{}", ran.stderr);
    let ran = starved.run(&format!("{} --resume", line("sft")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_same(&whole, &starved, "sft", "once there is room again");
}

#[test]
fn an_output_folder_that_cannot_be_written_is_refused_before_training() {
    let place = place();
    // /proc takes no folders, whoever asks.
    let ran = place.run(&line("sft").replace("out/sft", "/proc/fourfold"));
    assert!(ran.code == 2 && ran.stderr.contains("--out"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("perplexity"), "nothing was trained: {}", ran.stderr);
}

#[test]
fn too_little_memory_ends_with_a_message_and_not_with_silence() {
    let place = place();
    let begun = Instant::now();
    // Enough to start, too little for a base and a batch.
    let mut failed = 0;
    for kib in [20_000, 60_000, 90_000, 120_000] {
        let ran = limited(&place, &format!("-v {kib}"), &format!("{} --overwrite", line("sft")));
        assert!(begun.elapsed() < Duration::from_secs(100), "it hangs");
        if ran.code != 0 {
            failed += 1;
            assert!(!ran.stderr.trim().is_empty(), "{kib} KiB: not a word");
        }
    }
    assert!(failed > 0, "the limits are too wide to show anything");
}
