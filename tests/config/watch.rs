//! `watch` without a terminal: a text or an object with the values of metrics.jsonl for runs of every stage, and what it says
//! of folders that hold no run. With a terminal: terminal.rs.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::support::Place;

fn watched(place: &Place, folder: &str) -> Value {
    let ran = place.run(&format!("watch {folder} --json"));
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{folder}");
    assert_eq!(ran.stdout.matches('\n').count(), 1, "{}", ran.stdout);
    serde_json::from_str(&ran.stdout).unwrap()
}

/// Each file of a folder with its size and when it was written.
fn files(place: &Place, folder: &str) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let entries = fs::read_dir(place.path(folder)).unwrap().map(|entry| entry.unwrap());
    let about = |entry: &fs::DirEntry| entry.metadata().map(|about| (about.len(), about.modified().unwrap())).unwrap();
    entries.map(|entry| (entry.path(), about(&entry))).collect()
}

#[test]
fn a_finished_run_of_every_stage_is_told_as_text_and_as_an_object_with_the_values_of_metrics() {
    let place = Place::new();
    let answer = |i: usize| {
        let (completion, label) = [(" Yes.", true), (" No.", false)][i % 2];
        json!({"prompt": "Is it?", "completion": completion, "label": label})
    };
    let answers = (0..6).map(answer);
    place.write("answers.jsonl", answers.map(|line| format!("{line}\n")).collect::<String>());
    let stages = [
        ("sft", ""),
        ("reward", "--set data.path=pairs.jsonl --set reward.eval_steps=1"),
        ("ppo", "--set data.path=prompts.jsonl --set ppo.save_samples=2 --set ppo.eval_every=1"),
        ("dpo", "--set data.path=pairs.jsonl --set dpo.per_device_train_batch_size=2"),
        ("kto", "--set data.path=answers.jsonl --set kto.per_device_train_batch_size=2"),
    ];
    for (stage, more) in stages {
        let ran = place.run(&format!("{stage} run.toml --out out/{stage} {more}"));
        assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
        let folder = format!("out/{stage}");
        let before = files(&place, &folder);
        let told = watched(&place, &folder);
        assert_eq!(
            (&told["state"], &told["command"], &told["stage"]),
            (&json!("finished"), &json!(stage), &json!(stage))
        );
        assert_eq!(
            (&told["percent"], &told["base"], &told["device"]),
            (&json!(100.0), &json!("base"), &json!("cpu")),
            "{stage}"
        );
        let metrics = fs::read_to_string(place.path(&format!("{folder}/metrics.jsonl"))).unwrap();
        let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        assert_eq!(told["step"].as_f64(), last["step"].as_f64(), "{stage}");
        let counters = ["stage", "step", "epoch", "episode", "tokens", "num_tokens", "time", "val/num_eos_tokens"];
        let values =
            last.as_object().unwrap().iter().filter(|(key, value)| {
                value.is_number() && !counters.contains(&&key[..]) && !key.contains("win_rate_")
            });
        let mut compared = 0;
        for (key, value) in values {
            let found = &told["curves"][stage][key];
            assert_eq!(
                (found["value"].as_f64(), found["step"].as_f64()),
                (value.as_f64(), last["step"].as_f64()),
                "{stage}: {key}"
            );
            compared += 1;
        }
        assert!(compared > 3, "{stage}: {last}");
        let ran = place.run(&format!("watch {folder}"));
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "stdout is no terminal");
        assert!(ran.stdout.starts_with(&format!("{stage} ({stage}): finished ")), "{}", ran.stdout);
        assert!(ran.stdout.contains("planned, MiB") && !ran.stdout.contains('\u{1b}'), "{}", ran.stdout);
        assert_eq!(place.run(&format!("watch {folder} --once")).stdout, ran.stdout);
        assert_eq!(before, files(&place, &folder), "{stage}: nothing is written into the run's folder");
    }
    let samples = fs::read_to_string(place.path("out/ppo/samples.jsonl")).unwrap();
    let last: Value = serde_json::from_str(samples.lines().last().unwrap()).unwrap();
    let told = watched(&place, "out/ppo");
    assert_eq!(told["sample"]["score"], last["score"]);
    assert_eq!(told["samples"].as_u64(), Some(samples.lines().count() as u64));
}

#[test]
fn a_folder_without_a_run_is_one_error_with_exit_code_2() {
    let place = Place::new();
    for (folder, what) in
        [("base", "base holds no run"), ("nowhere", "no such folder"), ("run.toml", "is a file; name the folder")]
    {
        for more in ["", "--json", "--once"] {
            let ran = place.run(&format!("watch {folder} {more}"));
            assert!(ran.code == 2 && ran.stdout.is_empty(), "{folder} {more}: {} {}", ran.code, ran.stdout);
            assert!(ran.stderr.contains(what) && ran.stderr.lines().count() == 1, "{folder} {more}: {}", ran.stderr);
        }
    }
}
