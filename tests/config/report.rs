//! The page of a run: every stage leaves one, its curves hold the values of metrics.jsonl, it opens without a network, and
//! files that are cut off, empty or newer are named in one line each.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::Place;

fn page(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

/// The object that a command prints with `--json`.
fn told(place: &Place, line: &str) -> Value {
    let ran = place.run(&format!("{line} --json"));
    assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

/// What the page's script reads.
fn curves(page: &str) -> Value {
    let begin = page.find("id=curves>").unwrap() + "id=curves>".len();
    let end = begin + page[begin..].find("</script>").unwrap();
    serde_json::from_str(&page[begin..end]).unwrap()
}

/// The values of a column as the page has them.
fn column(page: &str, name: &str) -> Vec<(f64, Option<f64>)> {
    let curves = curves(page);
    let found = curves.as_object().unwrap().values().flat_map(|figure| figure["s"].as_array().unwrap());
    let curve = found.into_iter().find(|curve| curve["n"] == name).unwrap_or_else(|| panic!("no curve {name}"));
    curve["p"].as_array().unwrap().iter().map(|p| (p[0].as_f64().unwrap(), p[1].as_f64())).collect()
}

fn assert_self_contained(page: &str) {
    for foreign in ["http://", "https://", "src=", "@import", "url("] {
        let at = page.replace("http://www.w3.org/2000/svg", "").find(foreign);
        assert!(at.is_none(), "{foreign} in the page");
    }
    assert!(page.len() < 2_000_000, "{} bytes", page.len());
    assert_eq!(page.matches("<script").count(), 2, "the curves' values and the page's own script");
}

#[test]
fn every_stage_leaves_a_page_whose_curves_are_its_metrics() {
    let place = Place::new();
    let stages = [
        ("sft", "--set sft.num_train_epochs=2"),
        ("reward", "--set data.path=pairs.jsonl --set reward.eval_steps=1"),
        ("ppo", "--set data.path=prompts.jsonl --set ppo.save_samples=2 --set ppo.eval_every=1"),
    ];
    for (stage, more) in stages {
        let ran = place.run(&format!("{stage} run.toml --out out/{stage} {more}"));
        assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
        let page = page(&place.path(&format!("out/{stage}/report.html")));
        assert_self_contained(&page);
        assert!(page.contains("class=\"status good\">finished") && page.contains("Settings"), "{stage}");
        let again = format!("fourfold {stage} run.toml --out out/{stage}");
        assert!(page.contains(&again) && page.contains(&format!("{more} --resume")), "{stage}: the commands");
        assert!(page.contains("fourfold merge --base base --adapter out/"), "{stage}: the commands");
        assert!(page.contains("<h2>Memory by phase</h2>") && page.contains("fingerprint of base"), "{stage}");
        // Every number of metrics.jsonl is a value of a curve.
        let metrics = fs::read_to_string(place.path(&format!("out/{stage}/metrics.jsonl"))).unwrap();
        let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let counters = ["step", "epoch", "episode", "tokens", "time", "val/num_eos_tokens"];
        let keys = lines[0].as_object().unwrap().iter().filter(|(_, value)| value.is_number());
        let keys: Vec<&String> = keys.map(|(key, _)| key).collect();
        for key in keys.into_iter().filter(|key| !counters.contains(&&key[..]) && !key.contains("win_rate_")) {
            let want: Vec<_> = lines.iter().filter_map(|l| Some((l["step"].as_f64()?, l.get(key)?.as_f64()))).collect();
            assert_eq!(column(&page, key), want, "{stage}: {key}");
        }
    }
    let page = page(&place.path("out/ppo/report.html"));
    for part in
        ["Where the reward lands", "Held-out prompts through the run", "before training (SFT)", "after training"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(page.contains("title=\"log-ratio ") && page.contains("Wins against SFT"));
    let reward = place.path("out/reward/report.html");
    assert!(fs::read_to_string(reward).unwrap().contains("Scores of chosen and rejected"));
}

#[test]
fn dpo_and_kto_show_the_rewards_of_their_held_out_responses_as_distributions() {
    let place = Place::new();
    for (stage, title, names, more) in [
        ("dpo", "Rewards of chosen and rejected", ["chosen", "rejected"], "--set dpo.eval_steps=1"),
        ("kto", "Rewards of desirable and undesirable", ["desirable", "undesirable"], ""),
    ] {
        let told = told(&place, &format!("{stage} run.toml --out out/{stage} --set data.path=pairs.jsonl {more}"));
        let page = page(&place.path(&format!("out/{stage}/report.html")));
        assert_self_contained(&page);
        assert!(page.contains(title), "{stage}");
        // The outline counts each held-out response once.
        let found = curves(&page);
        let figures: Vec<&Value> =
            found.as_object().unwrap().values().filter(|figure| figure["h"] == "value").collect();
        let [figure] = figures[..] else { panic!("{stage}: {} distributions", figures.len()) };
        let counts = names.map(|name| {
            let curve = figure["s"].as_array().unwrap().iter().find(|curve| curve["n"] == name).unwrap();
            // Two corners per bar, and the two ends of the axis.
            curve["p"].as_array().unwrap().iter().map(|p| p[1].as_f64().unwrap()).sum::<f64>() / 2.0
        });
        let held_out = told["eval_records"].as_f64().unwrap();
        match stage {
            "dpo" => assert_eq!(counts, [held_out; 2]),
            _ => assert_eq!(counts.iter().sum::<f64>(), held_out),
        }
        // The mean beside the distribution is the summary's.
        let about: Value =
            serde_json::from_str(&fs::read_to_string(place.path(&format!("out/{stage}/about.json"))).unwrap()).unwrap();
        let mean = |side: &str| {
            let found = &about["facts"][format!("histogram/{stage}/eval_rewards/{side}")];
            found["sum"].as_f64().unwrap() / found["num"].as_f64().unwrap()
        };
        let margin = told["eval_rewards/margins"].as_f64().unwrap();
        assert!((mean("chosen") - mean("rejected") - margin).abs() < 1e-9, "{stage}: {about}");
    }
    // Of an evaluation during the run, in metrics.jsonl and as the band around its mean.
    let metrics = fs::read_to_string(place.path("out/dpo/metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    let found = &line["histogram/eval_rewards/chosen"];
    let mean = found["sum"].as_f64().unwrap() / found["num"].as_f64().unwrap();
    assert!((mean - line["eval_rewards/chosen"].as_f64().unwrap()).abs() < 1e-9, "{line}");
}

#[test]
fn report_to_none_writes_no_tensorboard_files_and_changes_nothing_else() {
    let place = Place::new();
    let run = |line: &str| {
        let ran = place.run(line);
        assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    };
    run("sft run.toml --out a");
    run("sft run.toml --out b --set report_to=none");
    assert!(place.path("a/tb").is_dir() && !place.path("b/tb").exists());
    let offers = |run: &str| page(&place.path(&format!("{run}/report.html"))).contains("tensorboard --logdir");
    assert!(offers("a") && !offers("b"), "what is not there is not offered");
    let bytes = |path: &str| fs::read(place.path(path)).unwrap();
    assert_eq!(bytes("a/adapter/adapter_model.safetensors"), bytes("b/adapter/adapter_model.safetensors"));
    assert!(place.path("b/metrics.jsonl").is_file() && place.path("b/report.html").is_file());
    // A new run in a folder does not leave the events of the one before.
    fs::write(place.path("a/tb/notes"), "mine").unwrap();
    run("sft run.toml --out a --overwrite --set report_to=none");
    let left: Vec<_> = fs::read_dir(place.path("a/tb")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["notes"]);
    let ran = place.run("sft run.toml --out c --set report_to=wandb");
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("report_to = \"wandb\" is not one of \"tensorboard\", \"none\""), "{}", ran.stderr);
    let ran = place.run("sft run.toml --out c --set sft.report_to=none");
    assert!(ran.stderr.contains("report_to stands at the top of the file"), "{}", ran.stderr);
}

#[test]
fn two_runs_share_axes_and_what_differs_in_their_settings_is_a_table() {
    let place = Place::new();
    for (name, rate) in [("one", "1e-3"), ("two", "2e-3")] {
        let ran = place.run(&format!("sft run.toml --out {name} --set sft.learning_rate={rate}"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    let found = told(&place, "report one two --out both.html");
    assert_eq!((&found["report"], &found["runs"], &found["problems"]), (&json!("both.html"), &json!(2), &json!([])));
    let page = page(&place.path("both.html"));
    assert_self_contained(&page);
    let curves = curves(&page);
    let loss =
        curves.as_object().unwrap().values().find(|figure| figure["s"][0]["p"].as_array().unwrap().len() > 1).unwrap();
    assert_eq!((&loss["s"][0]["n"], &loss["s"][1]["n"]), (&json!("one"), &json!("two")));
    for cell in ["sft.learning_rate", "0.001", "0.002"] {
        assert!(page.contains(&format!("<td dir=auto>{cell}</td>")), "{cell}");
    }
    assert!(!page.contains("<td dir=auto>sft.per_device_train_batch_size</td>"), "what is equal is no row");
}

#[test]
fn a_page_replaces_a_page_and_nothing_else() {
    let place = Place::new();
    let ran = place.run("sft run.toml --out one");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    fs::create_dir(place.path("man")).unwrap();
    place.write("notes.html", "<!doctype html>\n<html><head><title>mine</title></head></html>");
    place.write("report.html", "<html>of another program</html>");
    place.write("half.html.new", "mine");
    place.write("man/fourfold-sft.1", "my own page");
    let weights = "one/adapter/adapter_model.safetensors";
    for (line, file) in [
        ("report one --out sft.jsonl".to_owned(), "sft.jsonl"),
        ("report one --out run.toml".to_owned(), "run.toml"),
        (format!("report one --out {weights}"), weights),
        ("report one --out notes.html".to_owned(), "notes.html"),
        ("report one --out half.html".to_owned(), "half.html.new"),
        ("report one one".to_owned(), "report.html"),
        ("man --out man".to_owned(), "man/fourfold-sft.1"),
    ] {
        let before = fs::read(place.path(file)).unwrap();
        let ran = place.run(&line);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{line}: {}", ran.stderr);
        let says = format!("{file} is there already and is no page of fourfold, so it stays as it is; name another");
        let says = if line.starts_with("man") { says } else { says.replace(", so it", ", and it") };
        assert!(ran.stderr.contains(&says) && ran.stderr.trim().lines().count() == 1, "{line}: {}", ran.stderr);
        assert_eq!(fs::read(place.path(file)).unwrap(), before, "{line}");
    }
    assert!(!place.path("half.html").exists());
    let ran = place.run("report one ./one --json --out twice.html");
    let found: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&found["runs"], &found["problems"][0]),
        (&1.into(), &"./one is the run in one, which is drawn once".into())
    );
    assert!(place.run("report one one --out twice.html").stderr.contains("one is named twice and drawn once"));
    let ran = place.run("report one --out man");
    assert!(ran.code == 2 && ran.stderr.contains("man is a folder; name a file in it"), "{}", ran.stderr);
    // An empty file holds nothing to lose; a page may be made again anywhere, and so may a manual.
    place.write("again.html", "");
    for line in
        ["report one --out again.html", "report one --out again.html", "report one", "man --out m", "man --out m"]
    {
        let ran = place.run(line);
        assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    }
    assert_eq!(page(&place.path("again.html")), page(&place.path("one/report.html")));
}

#[test]
fn an_actor_that_waits_for_its_critic_is_no_fault_and_any_other_missing_value_is() {
    let place = Place::new();
    place.train_sft_and_reward();
    let ran = place.run("ppo run.toml --out out/ppo --set data.path=prompts.jsonl --set ppo.critic_warmup=1");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let metrics = fs::read_to_string(place.path("out/ppo/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() == 2 && lines[0]["policy/approxkl_avg"].is_null(), "{metrics}");
    let waited = "The actor has no values up to step 1 (critic_warmup): only the critic trains.";
    let healthy = page(&place.path("out/ppo/report.html"));
    assert!(healthy.contains(waited));
    for key in ["policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "val/ratio", "grad_norm/actor"] {
        assert_eq!(column(&healthy, key), [(2.0, lines[1][key].as_f64())], "{key}: a warm-up is no fault");
    }
    let faults = |page: &str| page.matches("NaN or infinite: the gap").count();
    // A value that is missing later, or of what trains from the start, is one.
    for (step, key) in [(1, "policy/approxkl_avg"), (0, "loss/value_avg"), (0, "objective/kl")] {
        let mut lines = lines.clone();
        lines[step][key] = Value::Null;
        // One more line, so that the curve has a value.
        lines.push(json!({"stage": "ppo", "step": 3, key: 0.5}));
        place.write("out/ppo/metrics.jsonl", lines.iter().map(|line| format!("{line}\n")).collect::<String>());
        told(&place, "report out/ppo");
        let page = page(&place.path("out/ppo/report.html"));
        assert_eq!(faults(&page), faults(&healthy) + 1, "{key}");
    }
    // Without a warm-up there is nothing to wait for.
    let settings = fs::read_to_string(place.path("out/ppo/config.toml")).unwrap();
    place.write("out/ppo/config.toml", settings.replace("critic_warmup = 1", "critic_warmup = 0"));
    place.write("out/ppo/metrics.jsonl", &metrics);
    told(&place, "report out/ppo");
    let page = page(&place.path("out/ppo/report.html"));
    assert!(faults(&page) > faults(&healthy) && !page.contains("critic_warmup)"), "no warm-up");
}

#[test]
fn files_that_are_cut_off_empty_newer_or_missing_are_named_in_a_line_and_the_rest_is_shown() {
    let place = Place::new();
    let ran = place.run("sft run.toml --out out");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let metrics = place.path("out/metrics.jsonl");
    let whole = fs::read_to_string(&metrics).unwrap();
    let complains = |what: &str| {
        let ran = place.run("report out");
        assert_eq!(ran.code, 0, "{what}: {}", ran.stderr);
        let lines: Vec<&str> = ran.stderr.lines().filter(|line| *line != "out/report.html").collect();
        assert_eq!(lines.len(), 1, "{what}: {}", ran.stderr);
        assert!(lines[0].contains(what), "{what}: {}", lines[0]);
        assert!(page(&place.path("out/report.html")).contains("class=bad"), "{what} is on the page, too");
    };
    fs::write(&metrics, &whole[..whole.len() - 9]).unwrap();
    complains("the last line is cut off");
    let lines = whole.lines().count();
    assert_eq!(column(&page(&place.path("out/report.html")), "loss").len(), lines - 1);
    fs::write(&metrics, "").unwrap();
    complains("no step of the run was logged");
    fs::write(&metrics, whole.replacen('{', "[", 1)).unwrap();
    complains("metrics.jsonl: line 1 is no JSON object; it is left out");
    fs::write(&metrics, format!("{whole}[1]\n[2]\n")).unwrap();
    complains(&format!("2 lines are no JSON objects, line {} is the first; they are left out", lines + 1));
    fs::write(&metrics, whole.replacen("\"step\"", "\"updates\"", 1)).unwrap();
    complains(&format!("1 of {lines} lines has no stage and step"));
    fs::write(&metrics, whole.replace("\"step\"", "\"updates\"")).unwrap();
    complains("lines have no stage and step, as a newer version");
    fs::write(&metrics, &whole).unwrap();
    let about = fs::read_to_string(place.path("out/about.json")).unwrap();
    fs::write(place.path("out/about.json"), about.replace("\"format\": 1", "\"format\": 2")).unwrap();
    complains("a newer version");
    fs::write(place.path("out/about.json"), "{").unwrap();
    complains("about.json");
    for (folder, what) in [("base", "base holds no run"), ("nowhere", "no such folder")] {
        let ran = place.run(&format!("report {folder}"));
        assert!(ran.code == 2 && ran.stderr.contains(what), "{folder}: {} {}", ran.code, ran.stderr);
    }
}

#[test]
fn the_page_of_20_000_iterations_is_small_and_keeps_every_extreme() {
    let place = Place::new();
    let keys = [
        "objective/scores",
        "objective/kl",
        "objective/kl_exact",
        "objective/entropy",
        "objective/rlhf_reward",
        "objective/non_score_reward",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/explained_variance",
        "val/ratio",
        "val/ratio_var",
        "val/first_ratio",
        "grad_norm/actor",
        "grad_norm/critic",
        "response_length",
        "eval/score",
        "eval/kl",
        "eval/length",
        "eval/ended",
        "eval/distinct_1",
        "eval/distinct_2",
        "eval/win_rate",
        "lr",
        "critic_lr",
        "seconds",
        "tokens_per_second",
        "unheard_of",
    ];
    let mut text = String::new();
    for step in 1..=20_000u32 {
        let mut line = json!({"stage": "ppo", "step": step, "time": 1.8e9 + f64::from(step)});
        for (i, key) in keys.iter().enumerate() {
            line[key] = (f64::from(step) * 0.001 * (i + 1) as f64).sin().into();
        }
        if step == 12_345 {
            line["objective/kl"] = 77.125.into();
        }
        let histogram =
            json!({"min": -1.0, "max": 1.0, "num": 64, "sum": 3.2, "sum_squares": 20.0, "counts": vec![3; 20]});
        line["histogram/objective/scores"] = histogram;
        text += &format!("{line}\n");
    }
    fs::create_dir(place.path("long")).unwrap();
    place.write("long/metrics.jsonl", text);
    let begun = std::time::Instant::now();
    let found = told(&place, "report long");
    println!("{} bytes in {:.2} s", found["bytes"], begun.elapsed().as_secs_f64());
    let page = page(&place.path("long/report.html"));
    assert_self_contained(&page);
    assert!(column(&page, "objective/kl").contains(&(12_345.0, Some(77.125))), "the one spike");
    assert_eq!(column(&page, "unheard_of").last().unwrap().0, 20_000.0);
}

#[test]
fn texts_of_any_kind_are_shown_as_text() {
    let place = Place::new();
    let line = json!({"stage": "ppo", "step": 1, "</script><b>": 1.5, "objective/kl": null}).to_string();
    fs::create_dir(place.path("odd")).unwrap();
    place.write("odd/metrics.jsonl", format!("{line}\n"));
    let sample = |prompt: &str| {
        let tokens: Vec<&str> = prompt.split_inclusive(' ').collect();
        let values = vec![0.5; tokens.len()];
        let sample = json!({
            "iteration": 1, "prompt": prompt, "response": prompt, "score": 1.0, "finish_reason": "stop", "tokens": tokens,
            "log_ratio": values, "advantages": values,
        });
        format!("{sample}\n")
    };
    let texts = ["<script>alert(1)</script> </div>", "مرحبا بالعالم", "👩\u{200d}💻 🙂"];
    place.write("odd/samples.jsonl", texts.map(sample).concat());
    told(&place, "report odd");
    let page = page(&place.path("odd/report.html"));
    assert_self_contained(&page);
    assert!(
        page.contains("&lt;script&gt;alert(1)&lt;/script&gt;")
            && page.contains("مرحبا")
            && page.contains("👩\u{200d}💻")
    );
    assert_eq!(column(&page, "</script><b>"), [(1.0, Some(1.5))]);
}
