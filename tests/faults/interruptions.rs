//! Signals, a second process, and files that change under a run.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use crate::support::Place;
use crate::world::{assert_same, finish, interrupted, line, place, run_all, signal, start, wait_for_lines};

#[test]
fn a_signal_ends_the_run_with_130_and_a_command_that_goes_on_to_the_same_bytes() {
    let (whole, stopped) = (place(), place());
    for place in [&whole, &stopped] {
        let config = fs::read_to_string(place.path("run.toml")).unwrap();
        // Without checkpoints of its own accord: the signal's alone is gone on from.
        place.write("run.toml", config.replace("save_steps = 1", "save_steps = 0"));
    }
    run_all(&whole, &["sft", "reward", "ppo"]);
    run_all(&stopped, &["sft", "reward"]);
    for number in [libc::SIGINT, libc::SIGTERM] {
        fs::remove_dir_all(stopped.path("out/ppo")).ok();
        let ran = interrupted(&stopped, "ppo", 1, number);
        assert_eq!(ran.code, 130, "{}", ran.stderr);
        assert_eq!(ran.stderr.matches("stopping after this step; a second signal").count(), 1, "{}", ran.stderr);
        let command = ran.stderr.lines().last().unwrap().trim();
        assert!(ran.stderr.contains("stopped after") && command.ends_with("--resume"), "{}", ran.stderr);
        let again = stopped.run(&line("ppo"));
        assert!(again.code == 2 && again.stderr.contains("--resume"), "lost without being told: {}", again.stderr);
        let words = command.split_whitespace().skip(1).collect::<Vec<_>>().join(" ");
        let ran = stopped.run(&words);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert_same(&whole, &stopped, "ppo", "after a signal");
    }
    let ran = stopped.run(&format!("{} --resume --json", line("ppo")));
    assert!(ran.code == 0 && ran.stderr.contains("finished"), "{}", ran.stderr);
    assert_eq!(ran.stdout, fs::read_to_string(stopped.path("out/ppo/summary.json")).unwrap());
    assert_same(&whole, &stopped, "ppo", "a finished run is left alone");
}

#[test]
fn a_signal_ends_a_quickstart_which_is_then_not_finished() {
    let place = place();
    let child = start(&place, "quickstart --out quick --json");
    wait_for_lines(&place.path("quick/metrics.jsonl"), 1);
    signal(&child, libc::SIGTERM);
    let ran = finish(child);
    assert!(ran.code == 130 && ran.stderr.contains("stopped after"), "{}: {}", ran.code, ran.stderr);
    assert!(ran.stderr.contains("no stage was finished; the same command begins anew"), "{}", ran.stderr);
    let told: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&told["status"], &told["stage"], &told["resume"]),
        (&"stopped".into(), &"quickstart".into(), &().into())
    );
    let about = place.run("inspect quick --json");
    assert!(about.code == 0 && about.stdout.contains("not finished"), "{}", about.stdout);
    assert!(!place.path("quick/summary.json").exists());
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let place = place();
    // One micro-batch of many long sequences: seconds of work before the first signal could be heeded.
    let record = format!("{{\"prompt\": \"Say it.\", \"completion\": \"{}\"}}\n", "salty ".repeat(60));
    place.write("sft.jsonl", record.repeat(600));
    let long = format!(
        "{} --set sft.per_device_train_batch_size=512 --set data.eval_rows=0 --set data.max_length=250",
        line("sft")
    );
    // How long it takes from the first file to the first step depends on what else the machine does.
    for wait in [100, 400, 1600, 6400] {
        let child = start(&place, &long);
        let begun = Instant::now();
        while !place.path("out/sft/metrics.jsonl").exists() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(wait));
        signal(&child, libc::SIGTERM);
        std::thread::sleep(Duration::from_millis(50));
        signal(&child, libc::SIGINT);
        let ran = finish(child);
        assert_eq!(ran.code, 130, "after {wait} ms: {}", ran.stderr);
        if !ran.stderr.contains("stopped after 0 steps") {
            assert_eq!(ran.stderr.matches("a second signal ends the process at once").count(), 1, "{}", ran.stderr);
            assert!(!ran.stderr.contains("stopped after"), "it was heeded only after the step: {}", ran.stderr);
            return;
        }
        fs::remove_dir_all(place.path("out/sft")).unwrap();
    }
    panic!("the first step never began within 6.4 s");
}

#[test]
fn a_live_run_is_said_to_be_in_use_before_what_else_its_folder_lacks() {
    let place = place();
    let long = format!("{} --set sft.num_train_epochs=2000 --set checkpoint.save_steps=0", line("sft"));
    let first = start(&place, &long);
    wait_for_lines(&place.path("out/sft/metrics.jsonl"), 1);
    for more in ["", "--overwrite", "--resume", "--resume --from-start", "--set seed=9 --resume"] {
        let ran = place.run(&format!("{long} {more}"));
        assert!(!place.path("out/sft/checkpoints").exists());
        let said = format!("error: out/sft is in use by process {}", first.id());
        assert!(ran.code == 2 && ran.stderr.contains(&said), "{more}: {}", ran.stderr);
    }
    signal(&first, libc::SIGKILL);
    finish(first);
}

#[test]
fn a_second_process_on_one_folder_is_refused_with_the_firsts_name_and_a_stale_lock_is_taken_over() {
    let place = place();
    let long = format!("{} --set sft.num_train_epochs=2000", line("sft"));
    let first = start(&place, &long);
    wait_for_lines(&place.path("out/sft/metrics.jsonl"), 2);
    let second = place.run(&format!("{long} --resume"));
    assert_eq!(second.code, 2, "{}", second.stderr);
    assert!(second.stderr.contains(&format!("in use by process {}", first.id())), "{}", second.stderr);
    signal(&first, libc::SIGKILL);
    finish(first);
    let third = start(&place, &format!("{long} --resume"));
    let begun = Instant::now();
    let lines = fs::read_to_string(place.path("out/sft/metrics.jsonl")).unwrap().lines().count();
    while fs::read_to_string(place.path("out/sft/metrics.jsonl")).unwrap().lines().count() <= lines {
        assert!(begun.elapsed() < Duration::from_secs(60), "the stale lock stood in the way");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&third, libc::SIGTERM);
    let third = finish(third);
    assert!(third.code == 130 && third.stderr.contains("did not shut down cleanly"), "{}", third.stderr);
}

#[test]
fn a_truncated_metrics_file_is_cut_to_its_last_whole_line_with_a_notice() {
    let place = place();
    let ran = interrupted(&place, "sft", 2, libc::SIGTERM);
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    let metrics = place.path("out/sft/metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, &text[..text.len() - 5]).unwrap();
    let ran = place.run(&format!("{} --resume", line("sft")));
    assert!(ran.code == 0 && ran.stderr.contains("last whole line"), "{}", ran.stderr);
    let text = fs::read_to_string(&metrics).unwrap();
    assert!(text.lines().count() >= 4 && text.ends_with('\n'));
    text.lines().for_each(|line| drop(serde_json::from_str::<serde_json::Value>(line).unwrap()));
}

/// An earlier adapter must not stand beside a config that it was not trained by.
#[test]
fn a_new_run_removes_the_files_of_the_run_before() {
    let place = place();
    run_all(&place, &["sft"]);
    assert!(place.path("out/sft/adapter").exists());
    let other = "--overwrite --set sft.num_train_epochs=2000 --set sft.learning_rate=1e-4";
    let child = start(&place, &format!("{} {other}", line("sft")));
    let config = place.path("out/sft/config.toml");
    let begun = Instant::now();
    while !fs::read_to_string(&config).unwrap_or_default().contains("num_train_epochs = 2000") {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&child, libc::SIGKILL);
    finish(child);
    assert!(!place.path("out/sft/adapter").exists() && !place.path("out/sft/summary.json").exists());
}

/// The clock may jump: times of day are only printed, or compared for being equal.
#[test]
fn no_decision_is_made_by_the_time_of_day() {
    let mut users = vec![];
    let mut folders = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if fs::read_to_string(&path).unwrap_or_default().contains("SystemTime::now") {
                users.push(path.file_name().unwrap().to_str().unwrap().to_string());
            }
        }
    }
    users.sort();
    // The lock tells people when its owner began; chat templates may write today's date, which the cache's key then holds;
    // metrics, events and pages have the time in columns of their own.
    assert_eq!(users, ["clocks.rs", "lock.rs", "pipeline.rs", "strftime.rs"], "nothing else may ask");
}

/// Starts SFT with a signal's disposition as a shell or `nohup` leaves it.
fn start_with_hangups(place: &crate::support::Place, disposition: libc::sighandler_t) -> std::process::Child {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.args(line("sft").split_whitespace()).current_dir(place.path(""));
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    // SAFETY: signal may be called between fork and exec.
    let set = move || match unsafe { libc::signal(libc::SIGHUP, disposition) } {
        libc::SIG_ERR => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    };
    // SAFETY: it calls signal alone.
    unsafe { command.pre_exec(set) }.spawn().unwrap()
}

#[test]
fn a_closed_terminal_stops_a_run_as_other_signals_do_unless_hangups_are_ignored() {
    let place = place();
    let metrics = place.path("out/sft/metrics.jsonl");
    let hung_up = |disposition| {
        let child = start_with_hangups(&place, disposition);
        wait_for_lines(&metrics, 1);
        signal(&child, libc::SIGHUP);
        let ran = finish(child);
        fs::remove_dir_all(place.path("out/sft")).unwrap();
        ran
    };
    // On a busy machine the run may end before the signal comes.
    let stopped =
        (0..20).map(|_| hung_up(libc::SIG_DFL)).find(|ran| ran.code != 0).expect("a run that the signal meets");
    assert!(stopped.code == 130 && stopped.stderr.contains("stopped after"), "{}: {}", stopped.code, stopped.stderr);
    let ignored = hung_up(libc::SIG_IGN);
    assert_eq!(ignored.code, 0, "{}", ignored.stderr);
}

#[test]
fn a_stderr_that_takes_nothing_ends_no_run() {
    let place = place();
    run_all(&place, &["sft"]);
    let whole = fs::read(place.path("out/sft/adapter/adapter_model.safetensors")).unwrap();
    let run = |to: Option<&str>| {
        fs::remove_dir_all(place.path("out/sft")).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.args(line("sft").split_whitespace()).current_dir(place.path("")).stdout(std::process::Stdio::null());
        let mut child = match to {
            Some(file) => command.stderr(fs::File::options().write(true).open(file).unwrap()).spawn().unwrap(),
            None => command.stderr(std::process::Stdio::piped()).spawn().unwrap(),
        };
        drop(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{to:?}");
        assert!(fs::read(place.path("out/sft/adapter/adapter_model.safetensors")).unwrap() == whole, "{to:?}");
    };
    run(None);
    if cfg!(target_os = "linux") {
        run(Some("/dev/full"));
    }
}

#[test]
fn a_signal_during_a_merge_leaves_neither_its_folder_nor_what_it_began() {
    let place = place();
    let root = env!("CARGO_MANIFEST_DIR");
    let line = format!(
        "merge --base {root}/src/quickstart/assets/base --adapter {root}/adapters/quickstart/sft --out made/for/merged"
    );
    let begun = || fs::read_dir(place.path("made/for")).is_ok_and(|entries| entries.count() > 0);
    let mut stopped = 0;
    // A merge that ended before the signal came is begun again.
    for _ in 0..40 {
        let child = start(&place, &line);
        let since = Instant::now();
        while !begun() {
            assert!(since.elapsed() < Duration::from_secs(60), "the merge never began");
            std::thread::sleep(Duration::from_millis(1));
        }
        signal(&child, [libc::SIGTERM, libc::SIGINT][stopped]);
        let ran = finish(child);
        if ran.code == 0 {
            assert!(place.path("made/for/merged/config.json").exists(), "{}", ran.stderr);
            fs::remove_dir_all(place.path("made")).unwrap();
            continue;
        }
        assert_eq!((ran.code, ran.stdout.as_str()), (130, ""), "{}", ran.stderr);
        assert!(ran.stderr.contains("stopped; nothing was written"), "{}", ran.stderr);
        assert!(!place.path("made").exists(), "what was begun is left");
        stopped += 1;
        if stopped == 2 {
            return;
        }
    }
    panic!("{stopped} of 2 signals came in time");
}

#[test]
fn a_signal_before_the_base_is_open_ends_with_the_same_code_as_later() {
    let place = Place::new();
    let root = env!("CARGO_MANIFEST_DIR");
    let adapter = format!("--adapter {root}/adapters/quickstart/sft");
    // The base is not open before someone writes its last file.
    let file = place.path("base/generation_config.json");
    fs::remove_file(&file).unwrap();
    let name = std::ffi::CString::new(file.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: makes a named pipe at a path of this test's own.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let merge = format!("merge --base base {adapter} --out made/merged");
    for (line, number) in [
        (&merge, libc::SIGTERM),
        (&merge, libc::SIGINT),
        (&format!("generate --base base --prompt x {adapter}"), libc::SIGTERM),
        (&"init sft --base base --out sft.toml".to_owned(), libc::SIGTERM),
    ] {
        let child = start(&place, line);
        let since = Instant::now();
        // Opened once the command reads there, and held, so that it waits.
        let held = loop {
            match fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&file) {
                Ok(held) => break held,
                Err(_) => assert!(since.elapsed() < Duration::from_secs(60), "{line}: the base was never opened"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        signal(&child, number);
        let ran = finish(child);
        drop(held);
        assert_eq!((ran.code, ran.stdout.as_str()), (130, ""), "{line} {number}: {}", ran.stderr);
        assert_eq!(ran.stderr.contains("stopped"), line == &merge, "{line}: {}", ran.stderr);
        assert!(!place.path("made").exists() && !place.path("sft.toml").exists(), "{line}");
    }
}
