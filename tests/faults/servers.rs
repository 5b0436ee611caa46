//! A run whose rollouts a server samples is asked to stop, or killed, while the server holds its replies back.

use std::fs;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::llama_cpp;
use crate::support::Place;
use crate::vllm::{Deed, server};
use crate::world::{assert_same, finish, line, place, run_all, signal, start, wait_for_lines};

#[test]
fn a_signal_ends_a_run_that_waits_for_a_server_which_then_goes_on_to_the_same_bytes() {
    for async_rollouts in [0, 1] {
        let (whole, stopped) = (place(), place());
        let (good, _) = server(|_, _, _| Deed::Answer);
        let of_server = |url: &str| {
            format!(
                "importance_sampling_correction = 'token_truncate'\n[ppo.rollout]\nengine = 'vllm'\nurls = [{url:?}]\n\
                 async_rollouts = {async_rollouts}\n"
            )
        };
        let config = fs::read_to_string(whole.path("run.toml")).unwrap();
        for place in [&whole, &stopped] {
            run_all(place, &["sft", "reward"]);
            place.write("run.toml", format!("{config}{}", of_server(&good)));
        }
        run_all(&whole, &["ppo"]);
        // Nothing is answered after the first rollout's four responses as long as this is locked.
        let held = Arc::new(Mutex::new(()));
        let (holds, (asked, heard)) = (held.lock().unwrap(), channel());
        let (lock, seen) = (held.clone(), Mutex::new(0));
        let (slow, _) = server(move |_, path, _| {
            let is_later = path.ends_with("/completions") && {
                let mut seen = seen.lock().unwrap();
                *seen += 1;
                *seen > 4
            };
            if is_later {
                let _ = asked.send(());
                drop(lock.lock());
            }
            Deed::Answer
        });
        stopped.write("run.toml", format!("{config}{}", of_server(&slow)));
        let mut child = start(&stopped, &line("ppo"));
        heard.recv_timeout(Duration::from_secs(120)).expect("the second rollout is asked for");
        signal(&child, libc::SIGTERM);
        let begun = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if begun.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("it waits for the server");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let ran = finish(child);
        assert!(ran.code == 130 && ran.stderr.contains("all is kept in"), "{}: {}", ran.code, ran.stderr);
        drop(holds);
        stopped.write("run.toml", format!("{config}{}", of_server(&good)));
        let ran = stopped.run(&format!("{} --resume", line("ppo")));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert_same(&whole, &stopped, "ppo", "stopped while a server sampled");
    }
}

/// A run whose second rollout waits for llama.cpp's server, the server's journal, and the folder of both.
#[cfg(target_os = "linux")]
fn waiting() -> (Place, std::process::Child, serde_json::Value) {
    let place = place();
    run_all(&place, &["sft", "reward"]);
    let server = llama_cpp::command(&place.path(""), &["--deed", "slow"]);
    let config = fs::read_to_string(place.path("run.toml")).unwrap();
    place.write("run.toml", format!("{config}[ppo.rollout]\nengine = 'llama.cpp'\nserver = {server:?}\n"));
    let child = start(&place, &line("ppo"));
    // The start and four responses of each of two rollouts.
    wait_for_lines(&place.path("journal"), 10);
    let pid = llama_cpp::journal(&place.path(""))[5]["pid"].clone();
    assert!(pid.is_u64() && llama_cpp::lives(&pid));
    (place, child, pid)
}

#[cfg(target_os = "linux")]
fn assert_ends(pid: &serde_json::Value) {
    let begun = Instant::now();
    while llama_cpp::lives(pid) {
        assert!(begun.elapsed() < Duration::from_secs(20), "the server outlives the run");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn llama_cpps_server_ends_with_a_run_that_is_asked_to_stop_which_then_goes_on_to_the_same_bytes() {
    let (whole, (stopped, mut child, pid)) = (place(), waiting());
    signal(&child, libc::SIGTERM);
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it waits for the server");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let ran = finish(child);
    assert!(ran.code == 130 && ran.stderr.contains("all is kept in"), "{}: {}", ran.code, ran.stderr);
    assert_ends(&pid);
    run_all(&whole, &["sft", "reward"]);
    let config = fs::read_to_string(stopped.path("run.toml")).unwrap().replace("slow", "none");
    [&whole, &stopped].iter().for_each(|place| place.write("run.toml", &config));
    run_all(&whole, &["ppo"]);
    let ran = stopped.run(&format!("{} --resume", line("ppo")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_same(&whole, &stopped, "ppo", "stopped while llama.cpp's server sampled");
}

#[cfg(target_os = "linux")]
#[test]
fn llama_cpps_server_ends_with_a_run_that_is_killed() {
    let (_place, mut child, pid) = waiting();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_ends(&pid);
}
