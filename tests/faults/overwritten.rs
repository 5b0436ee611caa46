//! A run that takes another's place and ends, is stopped or is killed before its first step: nothing of the other is lost. The
//! servers are threads that speak as vLLM does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Place, Ran};
use crate::vllm::{Deed, fault, server};
use crate::world::{assert_same, copy, finish, line, place, run_all, signal, start};

/// Every file below a folder with its bytes. The lock is no part of a run, nor is the adapter that a killed run gave a server.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(root).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
        match path.is_dir() {
            true if name == "rollout" => {}
            true => found.extend(files(&path).into_iter().map(|(below, bytes)| (format!("{name}/{below}"), bytes))),
            false if name == "run.lock" => {}
            false => drop(found.insert(name, fs::read(path).unwrap())),
        }
    }
    found
}

fn assert_untouched(before: &BTreeMap<String, Vec<u8>>, out: &Path, what: &str) {
    let after = files(out);
    let names = |of: &BTreeMap<String, Vec<u8>>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(before), names(&after), "{what}");
    before.iter().for_each(|(name, bytes)| assert!(after[name] == *bytes, "{what}: {name} differs"));
}

/// A place with a finished PPO run, and the config text to which a rollout's section may be added.
fn finished() -> (Place, String) {
    let place = place();
    run_all(&place, &["sft", "reward", "ppo"]);
    let config = fs::read_to_string(place.path("run.toml")).unwrap();
    (place, config)
}

fn rollout(url: &str) -> String {
    format!("[ppo.rollout]\nengine = 'vllm'\nurls = [{url:?}]\nretries = 0\n")
}

fn refused(place: &Place, line: &str, code: i32, said: &str) -> Ran {
    let ran = place.run(line);
    assert!(ran.code == code && ran.stderr.contains(said), "{line}: {} {}", ran.code, ran.stderr);
    ran
}

const BACK: &str = "out/ppo: a run ended here before its first step; what it would have replaced is there again";

#[test]
fn a_run_that_fails_before_its_first_step_costs_nothing_of_the_one_in_its_folder() {
    let (place, config) = finished();
    let (out, before) = (place.path("out/ppo"), files(&place.path("out/ppo")));
    let overwrite = format!("{} --overwrite", line("ppo"));
    // 1. The server does not take the first adapter.
    let (broken, _) = server(|_, _, _| Deed::Reply(fault("500 Internal Server Error", "out of memory")));
    place.write("run.toml", format!("{config}{}", rollout(&broken)));
    assert!(refused(&place, &overwrite, 1, BACK).stderr.contains("out of memory"));
    assert_untouched(&before, &out, "a server that fails at once");
    // 2. It does, and samples nothing.
    let (deaf, _) = server(|_, path, _| match path.ends_with("/completions") {
        true => Deed::Reply(fault("500 Internal Server Error", "no room for tokens")),
        false => Deed::Answer,
    });
    place.write("run.toml", format!("{config}{}", rollout(&deaf)));
    let ran = refused(&place, &overwrite, 1, BACK);
    assert!(ran.stderr.contains("no room for tokens") && !ran.stderr.contains("--resume"), "{}", ran.stderr);
    assert_untouched(&before, &out, "a server that samples nothing");
    // 3. A reward program fails in the evaluation before training.
    place.write(
        "run.toml",
        config.replace("reward_adapter = \"out/reward/adapter\"\n", "critic = \"own\"\n")
            + "[[ppo.reward]]\nkind = \"command\"\ncommand = [\"false\"]\nretries = 0\n",
    );
    refused(&place, &overwrite, 1, BACK);
    assert_untouched(&before, &out, "a reward that fails");
    // 4. So for a run that goes on from an earlier checkpoint: the later one stays.
    let mut checkpoints: Vec<_> =
        fs::read_dir(out.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    checkpoints.sort_by_key(|name| name.to_str().unwrap().split('-').nth(1).unwrap().parse::<usize>().unwrap());
    assert_eq!(checkpoints.len(), 2);
    place.write("run.toml", format!("{config}{}", rollout(&broken)));
    let earlier = format!("{} --resume out/ppo/checkpoints/{} --force", line("ppo"), checkpoints[0].display());
    refused(&place, &earlier, 1, BACK);
    assert_untouched(&before, &out, "resumed from an earlier checkpoint");
    // 5. One that trains takes its place, and leaves nothing of it.
    place.write("run.toml", &config);
    let ran = place.run(&format!("{} --resume out/ppo/checkpoints/{}", line("ppo"), checkpoints[0].display()));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let ran = place.run(&format!("{overwrite} --set seed=4"));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(!ran.stderr.contains("there again") && !out.join("former-run").exists(), "{}", ran.stderr);
    assert!(fs::read_to_string(out.join("config.toml")).unwrap().contains("seed = 4"));
}

#[test]
fn a_run_that_is_stopped_or_killed_before_its_first_step_costs_nothing_of_the_one_in_its_folder() {
    let (place, config) = finished();
    let (out, before) = (place.path("out/ppo"), files(&place.path("out/ppo")));
    let whole = Place::new();
    copy(&place.path(""), &whole.path(""));
    for (number, code) in [(libc::SIGTERM, 130), (libc::SIGKILL, -1)] {
        // Responses are held back as long as this is locked.
        let held = Arc::new(Mutex::new(()));
        let (holds, (asked, heard)) = (held.lock().unwrap(), channel());
        let lock = held.clone();
        let (slow, _) = server(move |_, path, _| {
            if path.ends_with("/completions") {
                let _ = asked.send(());
                drop(lock.lock());
            }
            Deed::Answer
        });
        place.write("run.toml", format!("{config}{}", rollout(&slow)));
        let child = start(&place, &format!("{} --overwrite", line("ppo")));
        heard.recv_timeout(Duration::from_secs(120)).expect("the first rollout is asked for");
        assert!(out.join("former-run/actor/adapter_model.safetensors").exists() && !out.join("actor").exists());
        refused(&place, &line("ppo"), 2, "in use by");
        signal(&child, number);
        let ran = finish(child);
        assert_eq!(ran.code, code, "{}", ran.stderr);
        drop(holds);
        if number == libc::SIGTERM {
            assert!(
                ran.stderr.contains(BACK) && ran.stderr.contains("stopped before the first step"),
                "{}",
                ran.stderr
            );
            assert!(!ran.stderr.contains("--resume"), "{}", ran.stderr);
        } else {
            let told = "ended before its first step: the run before it is in out/ppo/former-run";
            assert!(place.run("inspect out/ppo").stdout.contains(told));
            let adapter = "generate --base base --adapter out/ppo/actor --prompt x";
            refused(&place, adapter, 2, "the run before it is in out/ppo/former-run");
            place.write("run.toml", &config);
            assert!(refused(&place, &line("ppo"), 2, BACK).stderr.contains("holds a finished run"));
        }
        assert_untouched(&before, &out, &format!("signal {number}"));
    }
    // What is there again is a run as any other.
    assert_same(&whole, &place, "ppo", "after all that");
    assert!(refused(&place, &format!("{} --resume", line("ppo")), 0, "there is nothing to resume").stdout.is_empty());
}
