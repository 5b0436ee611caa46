//! A full disk, too little memory, and folders that cannot be written to.

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
    assert!(ran.stderr.contains("no checkpoint after 1 step:") && ran.stderr.contains("training goes on"));
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

/// Runs a script of the shell in which `out` is a disk of its own; `None` where the system lets nobody mount one.
#[cfg(target_os = "linux")]
fn on_a_disk(place: &Place, kib: u64, script: &str) -> Option<Ran> {
    mounted(place, &format!("mkdir -p out && mount -t tmpfs -o size={kib}k none out || exit 77\n{script}"))
}

/// Runs a script of the shell that mounts; `None` where the system lets nobody.
#[cfg(target_os = "linux")]
fn mounted(place: &Place, script: &str) -> Option<Ran> {
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", script, env!("CARGO_BIN_EXE_fourfold")])
        .current_dir(place.path(""))
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code().unwrap_or(-1);
    if code == 77 || stderr.contains("unshare failed") || stderr.contains("unshare: ") {
        println!("nothing can be mounted here, the shell's limits must do: {stderr}");
        return None;
    }
    Some(Ran { code, stdout: String::from_utf8_lossy(&output.stdout).into_owned(), stderr })
}

/// A real file system that fills up: with room for two checkpoints, for one, and for hardly anything.
#[cfg(target_os = "linux")]
#[test]
fn on_a_disk_that_fills_up_a_run_says_so_and_goes_on_once_there_is_room() {
    let whole = place();
    run_all(&whole, &["sft"]);
    let size = |path: &str| -> u64 {
        let path = whole.path(path);
        fs::read_dir(path).unwrap().map(|e| fs::metadata(e.unwrap().path()).unwrap().len()).sum()
    };
    let newest = fs::read_dir(whole.path("out/sft/checkpoints")).unwrap().next().unwrap().unwrap().file_name();
    let checkpoint = size(&format!("out/sft/checkpoints/{}", newest.display())) / 1024;
    for kib in [checkpoint * 5 / 2, checkpoint * 6 / 5, 64] {
        let starved = place();
        // Five files a checkpoint and four of the run's own, rounded up to pages.
        let script = format!(
            "\"$0\" {line}; echo \"first: $?\" >&2\nls out/sft/checkpoints >&2\nmount -o remount,size=64m out\n\
             [ -e out/sft/summary.json ] || \"$0\" {line} --resume --from-start; echo \"then: $?\" >&2\ncp -r out kept",
            line = line("sft")
        );
        let Some(ran) = on_a_disk(&starved, kib, &script) else { return };
        let told = &ran.stderr;
        assert!(told.contains("then: 0") && !told.contains("panicked"), "{kib} KiB: {told}");
        assert!(told.contains("No space left on device"), "{kib} KiB: it says what is wrong: {told}");
        if told.contains("first: 0") {
            assert!(told.contains("training goes on"), "{kib} KiB: {told}");
        } else {
            assert!(told.contains("first: 1") || told.contains("first: 2"), "{kib} KiB: {told}");
            // Whatever could not be written: the command that goes on, or begins anew where nothing was kept.
            let go_on = format!("{} --resume{}", line("sft"), if kib == 64 { " --from-start" } else { "" });
            let says = told.contains("To go on:") && told.lines().any(|line| line.ends_with(&go_on));
            assert!(says || told.contains("first: 2"), "{kib} KiB: {told}");
        }
        fs::rename(starved.path("kept"), starved.path("out2")).unwrap();
        fs::remove_dir_all(starved.path("out")).ok();
        fs::rename(starved.path("out2"), starved.path("out")).unwrap();
        assert_same(&whole, &starved, "sft", &format!("after a disk of {kib} KiB"));
    }
}

/// The newest checkpoint's number of steps.
#[cfg(target_os = "linux")]
fn newest(place: &Place, folder: &str) -> usize {
    let names = fs::read_dir(place.path(folder)).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.to_str()?.strip_prefix("checkpoint-")?.parse().ok()).max().unwrap()
}

/// Two checkpoints fit and an adapter beside them does not: the older one makes room for the state of the last step, from which the
/// adapter is saved once there is room.
#[cfg(target_os = "linux")]
#[test]
fn a_result_that_a_full_disk_does_not_take_is_saved_by_a_run_that_goes_on_from_the_last_step() {
    let size = |path: std::path::PathBuf| -> u64 {
        fs::read_dir(path).unwrap().map(|e| fs::metadata(e.unwrap().path()).unwrap().len().next_multiple_of(4096)).sum()
    };
    for stage in ["sft", "reward", "dpo", "kto"] {
        let (roomy, starved) = (place(), place());
        for place in [&roomy, &starved] {
            // Larger than the files beside it.
            let config = fs::read_to_string(place.path("run.toml")).unwrap();
            let fresh = config.replace("adapter = \"out/sft/adapter\"\n", "").replace("r = 2\n", "r = 64\n");
            place.write("run.toml", fresh);
        }
        run_all(&roomy, &[stage]);
        let out = roomy.path(&format!("out/{stage}"));
        let last = newest(&roomy, &format!("out/{stage}/checkpoints"));
        let (checkpoint, adapter) =
            (size(out.join(format!("checkpoints/checkpoint-{last}"))), size(out.join("adapter")));
        let kib = (2 * checkpoint + size(out.join("tb")) + size(out) + adapter / 2) / 1024;
        let script = format!(
            "\"$0\" {line}; echo \"first: $?\" >&2\nls out/{stage}/checkpoints >&2\nmount -o remount,size=64m out\n\
             \"$0\" {line} --resume; echo \"then: $?\" >&2\ncp -r out kept",
            line = line(stage)
        );
        let Some(ran) = on_a_disk(&starved, kib, &script) else { return };
        let told = &ran.stderr;
        assert!(told.contains("first: 1") && told.contains("then: 0"), "{stage}, {kib} KiB: {told}");
        let kept = format!(
            "stopped after {last} steps; all before it is kept in out/{stage}/checkpoints/checkpoint-{last}. To go on:"
        );
        assert!(told.contains(&kept) && told.contains(&format!("{} --resume", line(stage))), "{stage}: {told}");
        assert!(told.contains("No space left on device"), "{stage}: {told}");
        fs::rename(starved.path("kept"), starved.path("out2")).unwrap();
        fs::remove_dir_all(starved.path("out")).ok();
        fs::rename(starved.path("out2"), starved.path("out")).unwrap();
        assert_same(&roomy, &starved, stage, "once there is room");
    }
}

/// A folder that was writable when it was made, and is not any more.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_read_only_is_refused_and_nothing_of_it_is_lost() {
    let place = place();
    let script = format!(
        "\"$0\" {line}; echo \"first: $?\" >&2; cp -r out before\nmount -o remount,ro out\n\
         \"$0\" {line} --overwrite; echo \"anew: $?\" >&2\n\"$0\" {line} --resume --set sft.num_train_epochs=3 --force; \
         echo \"on: $?\" >&2\ncp -r out after",
        line = line("sft")
    );
    let Some(ran) = on_a_disk(&place, 65_536, &script) else { return };
    let told = &ran.stderr;
    assert!(told.contains("first: 0") && told.contains("anew: 2") && told.contains("on: 2"), "{told}");
    assert!(told.contains("Read-only file system") && told.contains("--out"), "{told}");
    for name in ["metrics.jsonl", "summary.json", "config.toml", "adapter/adapter_model.safetensors"] {
        let read = |folder: &str| fs::read(place.path(&format!("{folder}/sft/{name}"))).unwrap();
        assert!(read("before") == read("after"), "{name}");
    }
}

/// Every limit between "does not start" and "needs nothing more": it works, or it says that memory is short.
#[test]
fn too_little_memory_ends_with_a_message() {
    let place = place();
    let begun = Instant::now();
    let (mut short, mut worked) = (0, 0);
    let program = std::fs::metadata(env!("CARGO_BIN_EXE_fourfold")).unwrap().len();
    for mib in [20u64, 40, 60, 80, 90, 100, 110, 120, 140, 160, 200, 260, 400].map(|mib| mib + threads() * (mib / 80)) {
        let ran = limited(&place, &format!("-v {}", mib << 10), &format!("{} --overwrite", line("sft")));
        assert!(begun.elapsed() < Duration::from_secs(200), "it hangs");
        match ran.code {
            0 => worked += 1,
            // The loader itself gives up: no line of ours has run.
            127 => assert!(!ran.stderr.is_empty()),
            // The kernel cannot map the program itself and kills it: no line of ours has run.
            -1 if mib << 20 < program => assert!(ran.stderr.is_empty()),
            1 | 2 => {
                assert!(ran.stderr.contains("emory") && ran.stderr.contains("error: "), "{mib} MiB: {}", ran.stderr);
                assert!(!ran.stderr.contains("panicked"), "{mib} MiB: {}", ran.stderr);
                short += 1;
            }
            code => panic!("{mib} MiB: ended with {code}: {}", ran.stderr),
        }
    }
    assert!(short > 0 && worked > 0, "{short} limits were too narrow and {worked} wide enough");
}

/// The plan of a stage of large batches, and the command that would run it.
#[cfg(target_os = "linux")]
fn large_batches(place: &Place) -> (u64, u64, String) {
    let record = |i: usize| {
        let answer = "the food was cold and salty, ".repeat(2 + i % 3);
        serde_json::json!({"prompt": format!("\n\nHuman: {i}?\n\nAssistant:"), "completion": format!(" {answer}")})
    };
    place.write("sft.jsonl", (0..192).map(|i| format!("{}\n", record(i))).collect::<String>());
    let words = "run.toml --set data.path=sft.jsonl --set sft.per_device_train_batch_size=160 \
                 --set sft.gradient_accumulation_steps=1 --set sft.num_train_epochs=1 --set sft.checkpoint=\"none\"";
    let ran = place.run(&format!("plan {words} --phase sft --json"));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let plan: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let bytes = |of: &serde_json::Value| of["own"].as_u64().unwrap();
    let least = plan["choices"].as_array().unwrap().iter().map(bytes).min().unwrap();
    (bytes(&plan["peak"]), least, format!("sft {words} --out out/sft"))
}

/// As many as compute in a run.
fn threads() -> u64 {
    candle_core::utils::get_num_threads() as u64
}

/// `--set KEY=VALUE ...` of a refusal's smallest change, in the form that a command line takes.
#[cfg(target_os = "linux")]
fn named_change(told: &str) -> String {
    let (_, change) = told.split_once(": --set ").unwrap_or_else(|| panic!("no change is named: {told}"));
    let changes = change.split_once(" (").unwrap().0.split(" --set ").map(|change| {
        let (key, value) = change.split_once('=').unwrap();
        let is_number = value.parse::<f64>().is_ok();
        format!(" --set {}", if is_number { change.to_owned() } else { format!("'{key}=\"{value}\"'") })
    });
    changes.collect()
}

/// A limit that the system has set counts as one that the user asks for: what does not fit never begins, what is said to fit
/// does, and it ends.
#[cfg(target_os = "linux")]
#[test]
fn a_plan_beyond_the_systems_limits_is_refused_before_anything_is_written_and_the_change_it_names_runs() {
    let place = place();
    let (own, least, line) = large_batches(&place);
    assert!(least * 2 < own && own > 200 << 20, "{least} {own}");
    let between = (own + least) / 2;
    // Program and libraries take of the address space, too, and so do threads and gaps between blocks.
    let bytes = between * 3 / 2 + (32 << 20) + threads() * (6 << 20);
    let quoted = |line: &str| line.replace("\"none\"", "'\"none\"'");
    for (flag, said) in [("-v", "(ulimit -v)"), ("-d", "(ulimit -d)")] {
        let under = |line: &str| limited(&place, &format!("{flag} {}", bytes / 1024), line);
        let refused = under(&quoted(&line));
        let told = &refused.stderr;
        assert!(refused.code == 2 && told.contains("sft does not fit") && told.contains(said), "{flag}: {told}");
        assert!(!place.path("out").exists(), "{flag}: nothing was touched");
        let again = under(&(quoted(&line) + &named_change(told)));
        assert_eq!(again.code, 0, "{flag}: {}", again.stderr);
        fs::remove_dir_all(place.path("out")).unwrap();
    }
    // Control groups as the system shows them, of both versions; what enforces them is not what is tested.
    let group = format!(
        "mount -t tmpfs none /sys/fs/cgroup || exit 77\nmkdir /sys/fs/cgroup/memory\ncd /sys/fs/cgroup\n\
         echo {between} | tee memory.max memory/memory.limit_in_bytes >/dev/null\n\
         echo 0 | tee memory.current memory/memory.usage_in_bytes >/dev/null\ncd - >/dev/null\n"
    );
    let Some(refused) = mounted(&place, &format!("{group}exec \"$0\" {}", quoted(&line))) else { return };
    let told = &refused.stderr;
    assert!(refused.code == 2 && told.contains("sft does not fit") && told.contains("(cgroup)"), "{told}");
    assert!(!place.path("out").exists(), "nothing was touched");
    let again = format!("{group}exec \"$0\" {}{}", quoted(&line), named_change(told));
    let again = mounted(&place, &again).unwrap();
    assert_eq!(again.code, 0, "{}", again.stderr);
}
