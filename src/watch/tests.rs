//! The view of made-up runs on windows of several sizes: what is drawn are the values of metrics.jsonl, and no text of a file
//! reaches the terminal as an instruction. It needs no terminal.

use std::fs;
use std::io::Write;
use std::path::Path;

use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::{Frame, Terminal};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::facts::Facts;
use super::screen::{Choice, draw};
use super::terminal::press;
use super::{Watched, chart, text};
use crate::page::html::short;
use crate::train::lock;

const SIZES: [(u16, u16); 3] = [(40, 12), (80, 24), (200, 60)];
const NOW: f64 = 1_800_000_100.0;

/// A run's folder: the command that made it, and its state in about.json.
fn folder(by: &str, stage: &str, steps: usize, state: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let reward = if by == "reward" { "[reward_base]\npath = \"judge.gguf\"\n" } else { "" };
    let settings = format!(
        "# fourfold {by}: the settings of this run, every default written out\n[base]\npath = \"model.gguf\"\n{reward}[ppo]\n\
         batch_size = 4\nadap_kl_ctrl = true\ntarget = 6.0\n"
    );
    fs::write(dir.path().join("config.toml"), settings).unwrap();
    let about = json!({
        "format": 1, "program": "fourfold 0.1.0", "resume": format!("fourfold {by} run.toml --resume"),
        "started": 1_800_000_000u64, "updated": 1_800_000_090u64, "state": state, "reason": "", "process": std::process::id(),
        "stages": [[stage, steps]], "machine": {"device": "NVIDIA H100"},
        "memory": {"rollout": {"planned": 812.5, "measured": 801.25}, "step": {"planned": 99.5}},
    });
    fs::write(dir.path().join("about.json"), about.to_string()).unwrap();
    dir
}

fn append(dir: &Path, file: &str, text: &str) {
    let file = fs::OpenOptions::new().create(true).append(true).open(dir.join(file));
    file.unwrap().write_all(text.as_bytes()).unwrap();
}

/// Lines of metrics.jsonl for steps from 1 on, each key with a course of its own.
fn metrics(stage: &str, keys: &[&str], steps: usize) -> Vec<Value> {
    let line = |step: usize| {
        let mut line = json!({"stage": stage, "step": step});
        for (i, key) in keys.iter().enumerate() {
            line[key] = ((step * (i + 3)) as f64 * 0.37).sin().into();
        }
        line["seconds"] = 2.5.into();
        line["tokens_per_second"] = 1234.0.into();
        line["time"] = (1_800_000_000.0 + 2.5 * step as f64).into();
        line
    };
    (1..=steps).map(line).collect()
}

fn lines(lines: &[Value]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

const PPO: &[&str] = &[
    "objective/scores",
    "eval/score",
    "objective/kl",
    "policy/entropy_avg",
    "response_length",
    "loss/value_avg",
    "val/explained_variance",
    "loss/policy_avg",
    "tokens_per_second/rollout",
    "seconds/rollout",
];

fn ppo(steps: usize) -> TempDir {
    let dir = folder("ppo", "ppo", 40, "running");
    append(dir.path(), "metrics.jsonl", &lines(&metrics("ppo", PPO, steps)));
    for i in 1..=3 {
        let sample = json!({
            "iteration": i, "prompt": "\n\nHuman: How is it?\n\nAssistant:", "response": format!(" Response {i}."),
            "score": 0.5, "kl": 1.25, "finish_reason": "stop",
        });
        append(dir.path(), "samples.jsonl", &format!("{sample}\n"));
    }
    dir
}

fn facts(dir: &Path) -> Facts {
    Facts::of(&Watched::open(dir).unwrap().run)
}

fn drawn(facts: &Facts, choice: &Choice, (width, height): (u16, u16)) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let draw = |frame: &mut Frame<'_>| {
        draw(frame, facts, choice, NOW);
    };
    terminal.draw(draw).unwrap();
    terminal.backend().buffer().clone()
}

fn rows(buffer: &Buffer) -> Vec<String> {
    let area = buffer.area;
    (0..area.height).map(|y| (0..area.width).map(|x| buffer[(x, y)].symbol()).collect()).collect()
}

fn screen(facts: &Facts, choice: &Choice, size: (u16, u16)) -> String {
    rows(&drawn(facts, choice, size)).join("\n")
}

#[test]
fn a_run_of_each_stage_shows_where_it_stands_and_its_main_curves_last_values_at_every_size() {
    let supervised = ["loss", "eval_loss", "eval_perplexity", "mean_token_accuracy", "grad_norm", "lr"];
    let pairs = ["loss", "rewards/accuracies", "eval_rewards/accuracies", "rewards/margins", "lr"];
    let stages: [(&str, &[&str], &[&str]); 5] = [
        ("sft", &supervised, &["Loss", "Held-out perplexity"]),
        (
            "reward",
            &["loss", "accuracy", "eval_accuracy", "eval_chosen", "eval_rejected"],
            &["Loss", "Accuracy", "Scores"],
        ),
        ("dpo", &pairs, &["Loss", "Accuracy", "Reward margin"]),
        ("kto", &["loss", "rewards/chosen", "rewards/margins"], &["Loss", "Reward margin"]),
        (
            "ppo",
            PPO,
            &["Learned score", "KL to the reference", "Entropy", "Response length", "Value loss", "Explained variance"],
        ),
    ];
    for (stage, keys, titles) in stages {
        let dir = folder(stage, stage, 40, "running");
        let logged = metrics(stage, keys, 25);
        append(dir.path(), "metrics.jsonl", &lines(&logged));
        let facts = facts(dir.path());
        for size in SIZES {
            let shown = screen(&facts, &Choice::default(), size);
            // 15 steps of 2.5 seconds are left.
            assert!(shown.contains("running, 62%, about 38 s left"), "{stage} {size:?}:\n{shown}");
            assert!(shown.contains(titles[0]) && shown.contains("q ends"), "{stage} {size:?}:\n{shown}");
            assert!(shown.contains("1234"), "{stage} {size:?}: tokens per second\n{shown}");
            let base = if stage == "reward" { "base judge.gguf" } else { "base model.gguf" };
            assert!(shown.contains(base) && shown.contains("NVIDIA H100"), "{stage} {size:?}:\n{shown}");
        }
        let shown = screen(&facts, &Choice::default(), SIZES[2]);
        for title in titles {
            assert!(shown.contains(title), "{stage}: {title}\n{shown}");
        }
        let main = &facts.groups[0];
        assert_eq!(main.figures.iter().map(|f| f.title.as_str()).collect::<Vec<_>>(), titles, "{stage}");
        for curve in main.figures.iter().flat_map(|figure| &figure.curves).filter(|curve| !curve.is_rule) {
            let want: Vec<_> = logged.iter().map(|l| (l["step"].as_f64().unwrap(), l[&curve.name].as_f64())).collect();
            assert_eq!(curve.points, want, "{stage}: {}", curve.name);
            let value = short(want[24].1.unwrap());
            let last = [curve.name.clone(), chart::short_name(&curve.name)].map(|name| format!(" {name} {value}"));
            assert!(last.iter().any(|last| shown.contains(last)), "{stage}: {last:?}\n{shown}");
        }
    }
}

#[test]
fn every_value_of_metrics_is_a_dot_of_its_chart_where_the_axes_say_and_a_single_value_is_a_single_dot() {
    // The bits of a Braille character by column and row, from Unicode's table.
    const DOTS: [[u32; 4]; 2] = [[0x1, 0x2, 0x4, 0x40], [0x8, 0x10, 0x20, 0x80]];
    for (width, height) in [(40, 8), (60, 14), (100, 30)] {
        for steps in [1, 12] {
            let dir = ppo(steps);
            let facts = facts(dir.path());
            let figure = facts.groups[0].figures.iter().find(|figure| figure.title == "Entropy").unwrap();
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| chart::draw(frame, frame.area(), figure)).unwrap();
            let buffer = terminal.backend().buffer();
            let left = (0..width).find(|&x| buffer[(x, 1)].symbol() == "│").expect("an axis") + 1;
            let bottom = (0..height).rev().find(|&y| buffer[(left - 1, y)].symbol() == "└").expect("an axis");
            let (columns, lines) = (f64::from(2 * (width - left)), f64::from(4 * (bottom - 1)));
            let ((x0, x1), (y0, y1)) = chart::ranges(figure);
            let is_lit = |x: usize, y: usize| {
                let symbol = buffer[(left + x as u16 / 2, 1 + y as u16 / 4)].symbol().chars().next().unwrap();
                u32::from(symbol).checked_sub(0x2800).is_some_and(|bits| bits & DOTS[x % 2][y % 4] != 0)
            };
            for line in metrics("ppo", PPO, steps) {
                let (step, value) = (line["step"].as_f64().unwrap(), line["policy/entropy_avg"].as_f64().unwrap());
                let x = ((step - x0) / (x1 - x0) * (columns - 1.0)).round() as usize;
                let y = ((y1 - value) / (y1 - y0) * (lines - 1.0)).round() as usize;
                assert!(is_lit(x, y), "step {step}, value {value}:\n{}", rows(buffer).join("\n"));
            }
            let lit = (0..columns as usize).flat_map(|x| (0..lines as usize).map(move |y| (x, y)));
            let lit = lit.filter(|&(x, y)| is_lit(x, y)).count();
            assert!(if steps == 1 { lit == 1 } else { lit > 12 }, "{lit} dots of {steps} values");
        }
    }
}

#[test]
fn a_value_that_is_none_is_a_gap_and_counted() {
    let dir = folder("sft", "sft", 9, "running");
    let mut logged = metrics("sft", &["loss"], 5);
    logged[2]["loss"] = Value::Null;
    append(dir.path(), "metrics.jsonl", &lines(&logged));
    let shown = screen(&facts(dir.path()), &Choice::default(), (80, 24));
    assert!(shown.contains("1 NaN or infinite"), "{shown}");
}

#[test]
fn no_character_of_a_file_is_an_instruction_to_the_terminal() {
    let dir = folder("ppo", "ppo", 40, "running");
    let evil = "\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}31m\r\u{8}\u{202e}\u{0}\ttext\u{7f}";
    let mut logged = metrics("ppo", &["objective/scores"], 3);
    for line in &mut logged {
        line[evil] = 1.5.into();
        line["warnings"] = json!([evil, "kl_blow_up"]);
    }
    append(dir.path(), "metrics.jsonl", &lines(&logged));
    let sample = json!({
        "iteration": evil, "prompt": evil.repeat(50), "response": format!("{evil}\nplain é 👩\u{200d}💻 漢字"), "score": 1.0,
        "finish_reason": evil,
    });
    append(dir.path(), "samples.jsonl", &format!("{sample}\n"));
    let about = fs::read_to_string(dir.path().join("about.json")).unwrap();
    let mut about: Value = serde_json::from_str(&about).unwrap();
    for (key, inner) in [("machine", "device"), ("resume", ""), ("reason", "")] {
        if inner.is_empty() { about[key] = evil.into() } else { about[key][inner] = evil.into() }
    }
    for state in ["running", "failed", "stopped"] {
        about["state"] = state.into();
        fs::write(dir.path().join("about.json"), about.to_string()).unwrap();
        let facts = facts(dir.path());
        for size in SIZES {
            for group in &facts.groups {
                let choice = Choice { group: Some((group.stage.clone(), group.name)), ..Choice::default() };
                let buffer = drawn(&facts, &choice, size);
                let cells = buffer.content.iter().map(|cell| cell.symbol());
                for symbol in cells {
                    assert!(
                        !symbol.contains(|c: char| c.is_control() || c == '\u{202e}'),
                        "{state} {size:?} {symbol:?}"
                    );
                }
            }
        }
        let wide = screen(&facts, &Choice::default(), SIZES[2]);
        assert!(wide.contains("␛[2J") && wide.contains("plain é"), "{wide}");
        let plain = text::render(&facts);
        assert!(!plain.contains(|c: char| c.is_control() && c != '\n'), "{plain:?}");
        assert!(plain.contains("␛[2J") && plain.contains("漢字"), "{plain}");
        assert!(!facts.to_json().to_string().contains(char::is_control));
    }
}

#[test]
fn a_window_of_any_size_is_filled() {
    let dir = ppo(30);
    let facts = facts(dir.path());
    for width in (1..130).step_by(3) {
        for height in 1..40 {
            let choice = Choice { scrolled: usize::from(height) % 4, sample: 1, ..Choice::default() };
            drawn(&facts, &choice, (width, height));
        }
    }
}

#[test]
fn a_folder_that_is_begun_a_half_line_a_new_stage_a_replaced_run_and_an_end_are_followed() {
    let dir = folder("ppo", "ppo", 4, "running");
    let about = fs::read_to_string(dir.path().join("about.json")).unwrap();
    fs::remove_file(dir.path().join("about.json")).unwrap();
    // The process has its lock and has written nothing.
    let held = lock::lock(dir.path()).unwrap();
    let mut watched = Watched::open(dir.path()).unwrap();
    let shown = |watched: &Watched| {
        let facts = Facts::of(&watched.run);
        SIZES.map(|size| screen(&facts, &Choice::default(), size)).join("\n")
    };
    let is = |watched: &Watched, name: &str| assert_eq!(Facts::of(&watched.run).standing.name(), name);
    is(&watched, "starting");
    assert!(shown(&watched).contains("no step is logged yet"));
    let stamp = watched.run.stamp();
    watched.refresh().unwrap();
    assert!(watched.run.stamp() == stamp, "nothing was written");
    // The first line, and half of the second.
    fs::write(dir.path().join("about.json"), &about).unwrap();
    let all = lines(&metrics("ppo", PPO, 2));
    let (first, second) = all.split_at(all.find('\n').unwrap() + 1);
    append(dir.path(), "metrics.jsonl", &format!("{first}{}", &second[..30]));
    watched.refresh().unwrap();
    assert!(watched.run.stamp() != stamp);
    assert!(shown(&watched).contains("25%") && watched.run.problems.is_empty(), "{:?}", watched.run.problems);
    append(dir.path(), "metrics.jsonl", &second[30..]);
    watched.refresh().unwrap();
    assert!(shown(&watched).contains("50%"));
    // Another run takes the folder.
    let samples =
        json!({"iteration": 1, "prompt": "p", "response": "of the former run", "score": 1.0, "finish_reason": "stop"});
    append(dir.path(), "samples.jsonl", &format!("{samples}\n"));
    watched.refresh().unwrap();
    assert!(shown(&watched).contains("of the former run"));
    for name in ["metrics.jsonl", "samples.jsonl"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let mut other = metrics("ppo", PPO, 1);
    other[0]["time"] = 1_800_000_777.0.into();
    append(dir.path(), "metrics.jsonl", &lines(&other));
    watched.refresh().unwrap();
    assert!(shown(&watched).contains("25%") && !shown(&watched).contains("of the former run"));
    // It ends: the lock is given back before the end is written.
    fs::write(
        dir.path().join("about.json"),
        about.replace(&format!("\"process\":{}", std::process::id()), "\"process\":0"),
    )
    .unwrap();
    watched.refresh().unwrap();
    drop(held);
    watched.refresh().unwrap();
    is(&watched, "running");
    watched.refresh().unwrap();
    is(&watched, "killed");
    assert!(shown(&watched).contains("to resume it: fourfold ppo run.toml --resume"));
    fs::write(dir.path().join("about.json"), about.replace("\"running\"", "\"finished\"")).unwrap();
    watched.refresh().unwrap();
    is(&watched, "finished");
    assert!(shown(&watched).contains("finished 2027-01-15 08:01 UTC, 2 min after its start"));
}

#[test]
fn a_run_that_failed_says_why_and_one_of_no_steps_is_drawn() {
    let dir = folder("sft", "sft", 4, "failed");
    let path = dir.path().join("about.json");
    let about = fs::read_to_string(&path).unwrap().replace("\"reason\":\"\"", "\"reason\":\"the disk is full\"");
    fs::write(&path, about).unwrap();
    let facts = facts(dir.path());
    for size in [SIZES[1], SIZES[2]] {
        let shown = screen(&facts, &Choice::default(), size);
        assert!(shown.contains("ended with an error") && shown.contains("the disk is"), "{shown}");
        assert!(shown.contains("no step is logged yet"), "{shown}");
    }
    assert!(screen(&facts, &Choice::default(), SIZES[2]).contains("no step of the run was logged"));
    assert_eq!(facts.to_json()["state"], "failed");
}

#[test]
fn what_is_no_run_is_refused_and_names_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_owned(), dir.path().join("nowhere")] {
        let error = Watched::open(&path).err().unwrap();
        assert_eq!(crate::error::exit_code(&error), 2);
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn keys_turn_groups_scroll_go_through_samples_and_end() {
    let dir = ppo(20);
    let facts = facts(dir.path());
    let mut choice = Choice::default();
    let key = |code| KeyEvent::new(code, KeyModifiers::NONE);
    let names: Vec<_> = facts.groups.iter().map(|group| group.name).collect();
    assert_eq!(names, ["main", "policy", "responses", "speed"]);
    let mut seen = vec![];
    for _ in 0..4 {
        seen.push(facts.groups[choice.group_of(&facts.groups)].name);
        assert!(press(key(KeyCode::Tab), &mut choice, &facts));
    }
    assert_eq!((seen, &choice), (names, &Choice::default()));
    assert!(press(key(KeyCode::Left), &mut choice, &facts));
    assert_eq!(facts.groups[choice.group_of(&facts.groups)].name, "speed");
    assert!(screen(&facts, &choice, SIZES[1]).contains("Tokens per second"));
    assert!(press(key(KeyCode::Right), &mut choice, &facts));
    // 80 columns have one column of charts, of which not all fit.
    let before = screen(&facts, &choice, SIZES[1]);
    assert!(before.contains("Learned score") && before.contains("↑ ↓ scroll"), "{before}");
    press(key(KeyCode::Down), &mut choice, &facts);
    let after = screen(&facts, &choice, SIZES[1]);
    assert!(!after.contains("Learned score") && after.contains("KL to the reference"), "{after}");
    assert!(after.contains("newest sample: iteration 3") && after.contains("Response 3."), "{after}");
    press(key(KeyCode::Char('s')), &mut choice, &facts);
    assert!(screen(&facts, &choice, SIZES[1]).contains("Response 2."));
    press(key(KeyCode::Char('s')), &mut choice, &facts);
    press(key(KeyCode::Char('s')), &mut choice, &facts);
    assert_eq!(choice.sample, 0, "from the oldest to the newest");
    assert!(press(key(KeyCode::Char('c')), &mut choice, &facts), "without Ctrl");
    for code in [KeyCode::Char('q'), KeyCode::Esc] {
        assert!(!press(key(code), &mut choice, &facts));
    }
    assert!(!press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL), &mut choice, &facts));
}

#[test]
fn a_warning_of_now_stands_above_an_earlier_one_with_its_meaning() {
    let dir = folder("ppo", "ppo", 40, "running");
    let mut logged = metrics("ppo", PPO, 6);
    logged[1]["warnings"] = json!(["useless_critic"]);
    logged[5]["warnings"] = json!(["kl_blow_up"]);
    append(dir.path(), "metrics.jsonl", &lines(&logged));
    let facts = facts(dir.path());
    let shown = screen(&facts, &Choice::default(), SIZES[2]);
    let (now, before) = (shown.find("kl_blow_up: ").unwrap(), shown.find("earlier: useless_critic: ").unwrap());
    assert!(now < before, "{shown}");
    assert!(shown.contains("(in 1 step of ppo, from 2 to 2)"), "{shown}");
    let json = facts.to_json();
    let of =
        |name: &str| json["warnings"].as_array().unwrap().iter().find(|w| w["name"] == name).unwrap()["now"].clone();
    assert_eq!((of("kl_blow_up"), of("useless_critic")), (json!(true), json!(false)));
}

#[test]
fn text_and_json_have_the_last_values_the_memory_and_the_newest_sample() {
    let dir = ppo(25);
    let facts = facts(dir.path());
    let (plain, json) = (text::render(&facts), facts.to_json());
    let last = metrics("ppo", PPO, 25).pop().unwrap();
    for key in PPO {
        assert_eq!(json["curves"]["ppo"][key], json!({"step": 25.0, "value": last[key]}), "{key}");
    }
    for key in &PPO[..7] {
        let row = plain.lines().find(|line| line.split_whitespace().any(|word| word == *key)).unwrap();
        assert!(row.contains(&short(last[key].as_f64().unwrap())), "{row}");
    }
    assert_eq!(json["phases"]["rollout"]["planned_mib"], 812.5);
    assert_eq!(json["phases"]["rollout"]["measured_mib"], 801.25);
    assert_eq!(json["phases"]["all"]["tokens_per_second"], 1234.0);
    assert_eq!((&json["percent"], &json["seconds_left"], &json["steps"]), (&json!(62.0), &json!(37.5), &json!(40)));
    assert_eq!(
        (&json["state"], &json["base"], &json["device"]),
        (&json!("running"), &json!("model.gguf"), &json!("NVIDIA H100"))
    );
    assert_eq!(json["sample"]["response"], " Response 3.");
    for part in [
        "running, 62%, about 38 s left: ppo, step 25 of 40",
        "812.5",
        "801.2",
        "newest sample: iteration 3",
        "> Human: How is it?",
    ] {
        assert!(plain.contains(part), "{part}\n{plain}");
    }
}
