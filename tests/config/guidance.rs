//! What the program says to someone who is nearly right, and what it tells of itself: paths that were meant otherwise, the
//! folder of a run, the keys of a config, a plan without one.

use std::fs;

use crate::support::{Place, Ran};
use serde_json::{Value, json};

fn refused(p: &Place, line: &str, says: &[&str]) -> Ran {
    let ran = p.run(line);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{line}: {}", ran.stderr);
    for say in says {
        assert!(ran.stderr.contains(say), "{line}: no {say:?} in {}", ran.stderr);
    }
    ran
}

fn object(p: &Place, line: &str) -> Value {
    let ran = p.run(line);
    assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {}", ran.stdout))
}

#[test]
fn a_path_that_is_nearly_right_is_pointed_home() {
    let p = Place::new();
    p.train_sft_and_reward();
    let adapter = |path: &str| format!("generate --base base --prompt x --adapter {path}");
    refused(&p, &adapter("out/sft"), &["out/sft is the folder of a run", "did you mean out/sft/adapter?"]);
    refused(&p, &adapter("base"), &["base is a model, not an adapter"]);
    let file = "out/sft/adapter/adapter_model.safetensors";
    refused(&p, &adapter(file), &["an adapter is its folder: out/sft/adapter"]);
    let ppo = "ppo run.toml --set data.path=prompts.jsonl --out o --set ppo.reward_adapter=out/reward";
    refused(&p, ppo, &["[ppo] reward_adapter", "did you mean out/reward/adapter?"]);
    let base = |path: &str| format!("generate --prompt x --base {path}");
    refused(&p, &base("out/sft"), &["out/sft is the folder of a run", "(base)", "out/sft/adapter as the adapter"]);
    refused(&p, &base("out/sft/adapter"), &["out/sft/adapter is an adapter; give base as the base"]);
    fs::create_dir(p.path("models")).unwrap();
    fs::rename(p.path("base"), p.path("models/base")).unwrap();
    refused(&p, &base("models"), &["did you mean models/base?"]);
    fs::rename(p.path("models/base"), p.path("base")).unwrap();
    let merge = "merge --base base --adapter out/sft/adapter";
    refused(&p, &format!("{merge}=abc --out m"), &["--adapter out/sft/adapter=abc", "abc is no number"]);
    refused(&p, &format!("{merge} --out m.gguf"), &["m.gguf is the name of a GGUF file", "add --format gguf"]);
    let ran = p.run(&format!("{merge} --format gguf --dtype f32 --out m"));
    assert!(ran.code == 0 && p.path("m.gguf").is_file() && !p.path("m").exists(), "{}", ran.stderr);
    refused(&p, "sft m.gguf", &["m.gguf is a model, not a config"]);
    refused(&p, "plan m.gguf", &["m.gguf is a model, not a config", "--base m.gguf"]);
    refused(&p, "plan base", &["--base base"]);
}

#[test]
fn what_is_said_of_an_output_that_cannot_be_is_true_and_commands_are_quoted() {
    let p = Place::new();
    fs::create_dir(p.path("folder")).unwrap();
    for more in ["", " --overwrite"] {
        let line = format!("init sft --base base --out folder{more}");
        refused(&p, &line, &["--out folder is a folder; name a file, such as folder/sft.toml"]);
    }
    for line in [
        "init sft --base base --out run.toml/x.toml",
        "score --base base --adapter a --data pairs.jsonl --out run.toml/x.jsonl",
    ] {
        refused(&p, line, &["--out run.toml/x.", "run.toml is a file, not a folder; name another"]);
    }
    refused(&p, "init sft --base base --out none/x.toml", &["there is no folder none; make it first"]);
    assert_eq!(p.run("sft run.toml --out out/sft").code, 0);
    let ran = refused(&p, "quickstart --out out/sft", &["out/sft holds a run of `fourfold sft`"]);
    assert!(!ran.stderr.contains("quickstart"), "{}", ran.stderr);
    refused(&p, "quickstart --out folder/../run.toml", &["run.toml exists and is no folder of a former run"]);
    refused(&p, "quickstart --out run.toml/x", &["run.toml/x: run.toml is a file, not a folder"]);
    p.write("shape.json", "{\"model_type\": \"llama\"}");
    let ran = refused(&p, "plan --base shape.json --phase sft", &["shape.json"]);
    assert!(!ran.stderr.contains("config.json"), "{}", ran.stderr);
    refused(&p, "plan --base none.json --phase sft", &["none.json"]);
    for line in ["init sft --base shape.json", "generate --base shape.json --prompt x", "inspect shape.json"] {
        let says =
            ["shape.json is a JSON file, no model; give a Hugging Face directory or a .gguf file", "plan --base"];
        refused(&p, line, &says);
    }
    refused(&p, "init sft --base base/config.json", &["base/config.json is one file of a model; give the directory"]);
    refused(&p, "init sft --base run.toml", &["run.toml is no model; give a Hugging Face directory or a .gguf file"]);
    p.write("m.gguf", "GGML");
    refused(&p, "init sft --base m.gguf", &["m.gguf is not a GGUF file"]);
    // A path with a blank is one word of the commands to go on with, in the file, too.
    let ran = p.run_with(&["init", "sft", "--base", "base", "--out", "my config.toml"], "");
    assert!(ran.code == 0 && ran.stderr.contains("`fourfold sft 'my config.toml'` runs it"), "{}", ran.stderr);
    let text = fs::read_to_string(p.path("my config.toml")).unwrap();
    assert!(
        text.contains("fourfold data 'my config.toml' ") && text.contains("fourfold sft 'my config.toml' "),
        "{text}"
    );
    let init = "init grpo --base base --data prompts.jsonl";
    refused(&p, init, &["grpo needs --reward-adapter", "fourfold init reward", "`fourfold keys grpo.reward`"]);
    p.write("rule.toml", "[base]\npath='base'\n[data]\npath='prompts.jsonl'\n[[grpo.reward]]\nkind='json_valid'\n");
    for (file, key) in [("rule.toml", "grpo.reward.api"), ("run.toml", "ppo.reward.weight")] {
        let says = format!("[[{}]] is a list of tables, and --set enters none", key.rsplit_once('.').unwrap().0);
        refused(&p, &format!("plan {file} --phase sft --set {key}=score"), &[&says, "change the file"]);
    }
}

#[test]
fn a_reward_models_adapter_is_no_policys() {
    let p = Place::new();
    p.train_sft_and_reward();
    let rm = "out/reward/adapter";
    let says = ["out/reward/adapter: this adapter has a score head", "fourfold score"];
    refused(&p, &format!("generate --base base --prompt x --adapter {rm}"), &says);
    refused(&p, &format!("sft run.toml --out o --set sft.adapter={rm}"), &says);
    refused(&p, &format!("dpo run.toml --out o --set data.path=pairs.jsonl --set dpo.adapter={rm}"), &says);
    let ppo = format!("ppo run.toml --out o --set data.path=prompts.jsonl --set ppo.reward_adapter={rm}");
    refused(&p, &format!("{ppo} --set ppo.adapter={rm}"), &says);
}

#[test]
fn every_choice_of_a_plan_takes_less_than_the_plan() {
    let p = Place::new();
    for room in ["", " --memory 64MiB", " --memory 1MiB"] {
        // One that does not fit is shown, too.
        let ran = p.run(&format!("plan run.toml --phase sft --json{room}"));
        let plan: Value = serde_json::from_str(&ran.stdout).unwrap();
        let choices = plan["choices"].as_array().unwrap();
        assert!(!choices.is_empty(), "{plan}");
        for choice in choices {
            assert!(choice["total"].as_u64().unwrap() < plan["peak"]["total"].as_u64().unwrap(), "{room}: {choice}");
        }
    }
}

#[test]
fn responses_with_one_label_are_warned_of_also_where_quiet_was_asked_for() {
    let p = Place::new();
    let line =
        |i: usize, label: bool| format!("{}\n", json!({"prompt": format!("q{i}"), "completion": " a", "label": label}));
    p.write("good.jsonl", (0..6).map(|i| line(i, true)).collect::<String>());
    p.write("both.jsonl", (0..6).map(|i| line(i, i % 2 == 0)).collect::<String>());
    let warned = |data: &str| {
        let ran = p.run(&format!("--quiet kto run.toml --set data.path={data} --out out/{data}"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.stderr.contains("kto: warning: every response is labelled desirable")
    };
    assert_eq!([warned("good.jsonl"), warned("both.jsonl")], [true, false]);
}

#[test]
fn an_option_of_another_program_is_pointed_home() {
    let p = Place::new();
    refused(&p, "sft --config run.toml", &["tip: the config file needs no option: fourfold sft run.toml"]);
    refused(&p, "sft run.toml --learning_rate 1e-4", &["tip: ", "--set sft.learning_rate=1e-4"]);
    refused(&p, "ppo run.toml --lora-rank=4", &["--set lora.r=4"]);
}

#[test]
fn a_plan_needs_a_config_or_a_base() {
    let p = Place::new();
    let by_file = object(&p, "plan run.toml --phase sft --json --set data.max_length=64");
    let by_base = object(&p, "plan --base base --phase sft --json --set data.max_length=64");
    assert_eq!((&by_base["stage"], &by_base["lengths"]), (&json!("sft"), &json!("longest")));
    assert!(by_file["peak"]["total"].as_u64() < by_base["peak"]["total"].as_u64(), "{by_file} {by_base}");
    for stage in ["reward", "dpo", "kto", "ppo"] {
        assert_eq!(object(&p, &format!("plan --base base --phase {stage} --json"))["stage"], stage);
    }
    let ran = p.run("plan --base base");
    assert!(ran.code == 2 && ran.stderr.contains("--phase"), "{}", ran.stderr);
    let kto = object(&p, "plan run.toml --phase kto --json --set data.path=pairs.jsonl");
    let lengths = (&kto["kto"]["longest"], &kto["kto"]["longest_mismatched"]);
    assert!(lengths.0.as_u64() <= lengths.1.as_u64() && lengths.1.as_u64() <= Some(96), "{kto}");
}

#[test]
fn a_runs_folder_is_described_with_its_adapters_state_and_best_figures() {
    let p = Place::new();
    p.train_sft_and_reward();
    let found = object(&p, "inspect out/sft --json");
    assert_eq!((&found["kind"], &found["stage"], &found["base"]), (&json!("run"), &json!("sft"), &json!("base")));
    assert_eq!(found["adapters"]["adapter"]["path"], "out/sft/adapter");
    assert_eq!((&found["adapters"]["adapter"]["r"], &found["last_step"]), (&json!(2), &json!(2)));
    let lines: Vec<Value> = fs::read_to_string(p.path("out/sft/metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let least = lines.iter().map(|line| line["loss"].as_f64().unwrap()).fold(f64::INFINITY, f64::min);
    assert_eq!(found["best"]["loss"]["value"].as_f64(), Some(least));
    let state = found["state"].as_str().unwrap();
    assert!(state.starts_with("finished 20") && state.ends_with("UTC"), "{state}");
    assert_eq!(object(&p, "inspect out/reward --json")["adapters"]["adapter"]["head"], true);
    let text = p.run("inspect out/sft").stdout;
    assert!(text.contains("out/sft/adapter") && text.contains("finished"), "{text}");
    // A line that was cut off is counted, and a run without a summary is not finished.
    let metrics = fs::read_to_string(p.path("out/sft/metrics.jsonl")).unwrap();
    p.write("out/sft/metrics.jsonl", &metrics[..metrics.len() - 9]);
    fs::remove_file(p.path("out/sft/summary.json")).unwrap();
    let found = object(&p, "inspect out/sft --json");
    assert_eq!((&found["damaged_lines"], &found["last_step"]), (&json!(1), &json!(1)));
    assert!(found["state"].as_str().unwrap().starts_with("not finished"), "{found}");
}

#[test]
fn keys_are_printed_by_section_and_by_name() {
    let p = Place::new();
    let all = object(&p, "keys --json");
    let keys = all["keys"].as_array().unwrap();
    assert!(keys.len() > 180, "{}", keys.len());
    let kl = keys.iter().find(|key| key["section"] == "ppo" && key["key"] == "kl_coef").unwrap();
    assert_eq!(
        (&kl["default"], &kl["unit"], &kl["type"]),
        (&json!("0.05"), &json!("reward per nat"), &json!("number"))
    );
    let text = p.run("keys data").stdout;
    assert!(text.starts_with("[data]\n") && text.contains("\n[data.columns]\n") && text.contains("max_length = 512"));
    assert!(!text.contains("kl_coef"));
    refused(&p, "keys kl_coeff", &["did you mean \"kl_coef\"?"]);
    refused(
        &p,
        "keys actor",
        &[
            "no key \"actor\"; it is [sft], [reward], [dpo], [kto], [distill], [ppo], [grpo], [rloo] adapter here; `fourfold keys`",
        ],
    );
}

#[test]
fn dropped_records_and_a_reward_model_that_learned_nothing_are_warned_of() {
    let p = Place::new();
    let mut lines = fs::read_to_string(p.path("sft.jsonl")).unwrap();
    for _ in 0..3 {
        let long = json!({"prompt": "word ".repeat(60), "completion": " Yes."});
        lines.push_str(&format!("{long}\n"));
    }
    p.write("long.jsonl", &lines);
    let ran = p.run("sft run.toml --set data.path=long.jsonl --set data.max_length=40 --out long");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let warning = ran.stderr.lines().find(|line| line.starts_with("warning: [data]")).expect("a warning");
    assert!(warning.contains("3 of 9 records are dropped (33%)") && warning.contains("would keep 9"), "{warning}");
    let found = object(&p, "data run.toml --phase sft --set data.path=long.jsonl --set data.max_length=40 --json");
    assert_eq!(found["warnings"].as_array().unwrap().len(), 1, "{found}");
    let ran = p.run("sft run.toml --set data.eval_rows=5 --out few");
    assert!(ran.code == 0 && ran.stderr.contains("eval_rows = 5 of 6 sequences: 3 are held out"), "{}", ran.stderr);
    let ran = p.run("reward run.toml --set data.path=pairs.jsonl --out out/rm --set reward.adapter=few/adapter");
    assert!(ran.code == 0 && ran.stderr.contains("reward: warning: it was trained on 4 comparisons"), "{}", ran.stderr);
}

#[test]
fn a_plan_that_does_not_fit_a_named_limit_fails_after_it_is_shown() {
    let p = Place::new();
    let plan = "plan --base base --phase sft";
    for more in ["--memory 3MiB", "--set memory.limit=3MiB", "--device cuda --memory 596MiB"] {
        let ran = p.run(&format!("{plan} {more}"));
        assert_eq!(ran.code, 2, "{more}: {}", ran.stderr);
        assert!(ran.stdout.contains("it does not fit"), "{more}: {}", ran.stdout);
        assert!(ran.stderr.starts_with("error: the sft stage does not fit"), "{more}: {}", ran.stderr);
        let shown = p.run(&format!("{plan} {more} --json"));
        let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
        assert_eq!(shown["fits"], false, "{more}");
    }
    for more in ["--memory 2GiB", "", "--device cuda --memory 4GiB"] {
        let ran = p.run(&format!("{plan} {more}"));
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{more}");
    }
}

#[test]
fn a_plan_without_a_config_reads_no_adapter_of_the_folder_that_it_is_made_in() {
    let p = Place::new();
    let plan = "plan --base base --phase ppo --memory 2GiB --json";
    let before = object(&p, plan);
    // Of another rank, where a reward run would have left one.
    for (stage, more) in [("sft", ""), ("reward", "--set data.path=pairs.jsonl --set reward.adapter=out/sft/adapter")] {
        let out = if stage == "sft" { "out/sft" } else { "runs/reward" };
        let ran = p.run(&format!("{stage} run.toml --set lora.r=32 --out {out} {more}"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    let after = object(&p, plan);
    // What the process itself holds differs by pages from run to run.
    for of in ["adapters", "gradients", "optimizer"] {
        let bytes = |plan: &Value| plan["phases"]["update"][of].clone();
        assert_eq!(bytes(&before), bytes(&after), "{of}: {}", before["phases"]["update"]);
    }
    let named = object(&p, &format!("{plan} --set ppo.reward_adapter=runs/reward/adapter"));
    assert_ne!(
        named["phases"]["update"]["adapters"], after["phases"]["update"]["adapters"],
        "one that is named is read"
    );
}

#[test]
fn messages_name_the_cause_that_it_is() {
    let p = Place::new();
    p.train_sft_and_reward();
    // A rank that was changed by hand is no other base.
    let config = p.path("out/sft/adapter/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"r\": 2", "\"r\": 6").replace("\"r\":2", "\"r\":6")).unwrap();
    let line = "generate --base base --prompt x --adapter out/sft/adapter";
    let ran = refused(&p, line, &["has rank 2, and adapter_config.json says 6", "put 2 back"]);
    assert!(!ran.stderr.contains("another base"), "{}", ran.stderr);
    fs::write(&config, text).unwrap();
    // KTO needs two responses, and one of two is held out.
    let line = |i: i32| format!("{}\n", json!({"prompt": format!("q{i}"), "completion": " b", "label": i == 0}));
    p.write("two.jsonl", (0..2).map(line).collect::<String>());
    let kto = "kto run.toml --out o --set data.path=two.jsonl --set data.eval_rows=1";
    refused(&p, kto, &["there is 1; 1 of 2 is held out", "eval_rows = 0"]);
    assert!(!p.path("o").exists());
    let ran = p.run("kto run.toml --out o --set data.path=two.jsonl --set data.eval_rows=0");
    assert_eq!(ran.code, 0, "the remedy mends it: {}", ran.stderr);
    // A GGUF file that is there is named as it was given, before a base is opened.
    let merge = "merge --base base --adapter out/sft/adapter --format gguf --dtype f32 --out m";
    assert_eq!(p.run(merge).code, 0);
    let ran = refused(&p, merge, &["error: m.gguf already exists"]);
    assert!(!ran.stderr.contains(".gguf.md") && !ran.stderr.contains("device:"), "{}", ran.stderr);
    fs::remove_file(p.path("m.gguf")).unwrap();
    refused(&p, merge, &["m.gguf.md, the model card beside m.gguf, already exists"]);
    // What a stage will refuse is a warning of `data`, whose own work is done.
    let long = json!({"prompt": "a", "completion": "hello ".repeat(400)});
    p.write("long.jsonl", format!("{long}\n{long}\n{long}\n"));
    let ran =
        p.run("data run.toml --phase sft --set data.path=long.jsonl --set data.max_length=5000 --set data.eval_rows=1");
    let says = "longer than the model's context of 256, so `fourfold sft` will refuse to start; set max_length = 256";
    assert!(ran.code == 0 && ran.stderr.contains(says), "{}", ran.stderr);
    let data =
        object(&p, "data run.toml --phase ppo --set data.path=prompts.jsonl --set ppo.response_length=250 --json");
    assert!(
        data["warnings"][0].as_str().unwrap().contains("`fourfold ppo` will refuse to start"),
        "{}",
        data["warnings"]
    );
    let data = object(&p, "data run.toml --phase ppo --set data.path=prompts.jsonl --json");
    assert_eq!(data["warnings"], json!([]));
}

#[test]
fn exports_with_a_head_show_it_and_say_what_becomes_of_its_bias() {
    let p = Place::new();
    p.train_sft_and_reward();
    let merge = |format: &str| {
        p.run(&format!("merge --base base --adapter out/reward/adapter --out {format} --format {format}"))
    };
    let ran = merge("classifier");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let score = |more: &str| {
        object(&p, &format!("score --base base --adapter out/reward/adapter --data pairs.jsonl {more} --json"))
    };
    let adapter = object(&p, "inspect out/reward/adapter --json");
    assert_eq!(adapter["head"].as_array().unwrap().len(), 2, "weight and bias: {}", adapter["head"]);
    assert!(score("")["mean_score"].is_number());
    let bias = ran.stderr.split("the head's bias of ").nth(1).unwrap().split(' ').next().unwrap();
    let way = if bias.starts_with('-') { "higher" } else { "lower" };
    let says = format!("its scores are {way} by {} than", bias.trim_start_matches('-'));
    assert!(ran.stderr.contains(&says), "{}", ran.stderr);
    assert_eq!(object(&p, "inspect classifier --json")["head"], json!([{"name": "score.weight", "shape": [1, 128]}]));
    assert_eq!(merge("value-head").code, 0);
    let head = object(&p, "inspect value-head --json")["head"].clone();
    let names: Vec<&Value> = head.as_array().unwrap().iter().map(|head| &head["name"]).collect();
    assert_eq!(names, ["v_head.summary.bias", "v_head.summary.weight"]);
    assert!(object(&p, "inspect base --json").get("head").is_none());
    // Sizes as people write them.
    for size in ["500MB", "1.5GB", "200KiB", "300000B", "0.5MiB"] {
        let ran = p.run(&format!("merge --base base --adapter out/sft/adapter --out m{size} --max-shard-size {size}"));
        assert_eq!(ran.code, 0, "{size}: {}", ran.stderr);
    }
    assert!(p.path("m500MB/model.safetensors").is_file() && p.path("m200KiB/model.safetensors.index.json").is_file());
}

#[test]
fn a_dialogue_from_a_pipe_goes_on_after_a_line_that_cannot_be_used() {
    let p = Place::new();
    let chat = ["chat", "--base", "base", "--max-new-tokens", "4"];
    let ran = p.run_with(&chat, "How?\n/hepl\n/save\nWhy?\n");
    assert_eq!(ran.code, 2);
    assert_eq!(ran.stderr.matches(" tokens per second").count(), 2, "both messages have a response: {}", ran.stderr);
    assert!(ran.stderr.contains("line 2: there is no command /hepl") && ran.stderr.contains("line 3: /save needs"));
    assert!(ran.stderr.ends_with("error: 2 lines had an error, the first of them line 2\n"), "{}", ran.stderr);
    let ran = p.run_bytes(&chat, b"\xff\xfe\nWhy?\n");
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("line 1 is not UTF-8") && ran.stderr.matches(" tokens per second").count() == 1);
    assert_eq!(p.run_with(&chat, "How?\n/exit\n").code, 0);
}

#[test]
fn the_page_of_a_run_without_an_adapter_offers_nothing_to_merge() {
    let p = Place::new();
    assert_eq!(p.run("sft run.toml --out out/sft").code, 0);
    let page = || {
        assert_eq!(p.run("report out/sft").code, 0);
        fs::read_to_string(p.path("out/sft/report.html")).unwrap()
    };
    assert!(page().contains("fourfold merge --base base --adapter out/sft/adapter"));
    fs::remove_dir_all(p.path("out/sft/adapter")).unwrap();
    assert!(!page().contains("fourfold merge"));
}

#[test]
fn a_long_line_that_is_no_toml_is_shown_in_part() {
    let p = Place::new();
    p.write("long.toml", format!("[base]\npath = {}\n", "é".repeat(40_000)));
    let ran = p.run("plan long.toml");
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.len() < 2000 && ran.stderr.contains("line 2") && ran.stderr.contains('…'), "{}", ran.stderr);
}

#[test]
fn the_folder_of_a_run_without_adapters_and_what_lies_around_and_in_a_run_are_pointed_home() {
    let p = Place::new();
    let train = "sft run.toml --set sft.num_train_epochs=4 --set checkpoint.save_steps=1 --out out/sft";
    assert_eq!(p.run(train).code, 0);
    let merged = "merge --base base --adapter out/sft/adapter";
    assert_eq!(p.run(&format!("{merged} --format gguf --out m.gguf")).code, 0);
    for (path, said) in [
        ("out", "out is itself no model, adapter or run; did you mean out/sft?"),
        ("out/sft/checkpoints", "out/sft/checkpoints is a part of the run in out/sft; give that folder"),
        ("out/sft/metrics.jsonl", "out/sft/metrics.jsonl is a file of the run in out/sft; give that folder"),
        ("out/sft/adapter/adapter_config.json", "is a file; an adapter is its folder: out/sft/adapter"),
        ("base/tokenizer.json", "base/tokenizer.json is one file of a model; give the directory"),
        ("run.toml", "run.toml is a config; `fourfold plan run.toml`"),
        (".", "did you mean ./base or ./m.gguf?"),
        ("nowhere", "No such file or directory"),
    ] {
        refused(&p, &format!("inspect {path}"), &[said]);
    }
    fs::create_dir(p.path("empty")).unwrap();
    refused(&p, "inspect empty", &["holds neither a model (config.json) nor an adapter", "nor a run (config.toml)"]);
    refused(&p, "watch out --once", &["out is the folder around a run; did you mean out/sft?"]);
    refused(&p, "report out/sft/metrics.jsonl", &["is a part of a run; name its folder, out/sft"]);
    refused(&p, "watch sft.jsonl --once", &["sft.jsonl is a file; name the folder of a run"]);
    // What a run will write is no name for anything else: the run would end when it comes to write it.
    for line in [format!("{merged} --out out/sft/adapter"), "reward run.toml --out out/sft/checkpoints".to_owned()] {
        refused(&p, &line, &["the run in out/sft writes ", "itself; name another --out"]);
    }
    // A run without its adapter: under way, stopped, killed before its first checkpoint, finished.
    fs::rename(p.path("out/sft/adapter"), p.path("kept")).unwrap();
    let generate = |adapter: &str| format!("generate --base base --prompt x --adapter {adapter}");
    let both = |said: &str| {
        refused(&p, &generate("out/sft"), &["out/sft is the folder of a run that ", said]);
        refused(&p, &generate("out/sft/adapter"), &["out/sft/adapter is not there: the run in out/sft ", said]);
        refused(&p, "inspect out/sft/adapter", &["out/sft/adapter is not there: the run in out/sft ", said]);
    };
    both("is finished and has no such adapter");
    p.write("out/sft/summary.json", "{");
    let told = p.run("inspect out/sft").stdout;
    assert!(told.contains("but its summary.json cannot be read"), "{told}");
    let running = fourfold::train::lock::lock(&p.path("out/sft")).unwrap();
    both("goes on (process ");
    drop(running);
    fs::remove_file(p.path("out/sft/summary.json")).unwrap();
    both("ended before it wrote its adapters; go on with its command and --resume, from its newest checkpoint");
    fs::remove_dir_all(p.path("out/sft/checkpoints")).unwrap();
    both("ended before it wrote its adapters and has no checkpoint to go on from");
    let base = refused(&p, "generate --prompt x --base out/sft", &["give its base (base) as the base"]);
    assert!(!base.stderr.contains("as the adapter"), "{}", base.stderr);
}

#[test]
fn a_run_that_could_not_save_its_adapter_is_refused_before_it_trains() {
    let p = Place::new();
    assert_eq!(p.run("sft run.toml --out out/sft").code, 0);
    p.write("out/sft/adapter/notes.md", "mine");
    for more in ["--overwrite", "--set sft.num_train_epochs=2 --overwrite"] {
        let ran = refused(
            &p,
            &format!("sft run.toml --out out/sft {more}"),
            &["out/sft/adapter holds notes.md, which does not belong"],
        );
        assert!(!ran.stderr.contains("perplexity"), "{}", ran.stderr);
    }
    assert!(p.path("out/sft/adapter/adapter_model.safetensors").is_file(), "the run before is whole");
    fs::remove_file(p.path("out/sft/adapter/notes.md")).unwrap();
    assert_eq!(p.run("sft run.toml --out out/sft --overwrite").code, 0);
}

#[test]
fn what_is_given_as_a_config_and_is_none_is_told_what_it_is_and_a_runs_settings_are_kept() {
    let p = Place::new();
    assert_eq!(p.run("sft run.toml --out out/sft").code, 0);
    p.write("train.yaml", "stage: sft\n");
    for command in ["sft", "ppo", "data", "plan"] {
        for (file, said) in [
            ("out/sft", "out/sft is a folder; did you mean out/sft/config.toml?"),
            ("sft.jsonl", "sft.jsonl holds records, not a config; `fourfold init STAGE --base MODEL --data sft.jsonl`"),
            ("base/config.json", "base/config.json is no config: that is a TOML file"),
            ("train.yaml", "train.yaml is no config: that is a TOML file"),
            ("nowhere.json", "nowhere.json: No such file"),
        ] {
            refused(&p, &format!("{command} {file}"), &[said]);
        }
    }
    refused(&p, "plan base/config.json", &["or --base base/config.json"]);
    let settings = fs::read(p.path("out/sft/config.toml")).unwrap();
    for more in ["", "--overwrite"] {
        let line = format!("init sft --base base --data sft.jsonl --out out/sft/config.toml {more}");
        refused(&p, &line, &["--out out/sft/config.toml: it is the settings of a run"]);
    }
    assert!(fs::read(p.path("out/sft/config.toml")).unwrap() == settings);
}

#[test]
fn the_folder_of_a_run_is_no_data_and_the_files_in_it_that_may_be_meant_are_named() {
    let p = Place::new();
    p.train_sft_and_reward();
    assert_eq!(p.run("ppo run.toml --set data.path=prompts.jsonl --out out/ppo").code, 0);
    let data = |path: &str| format!("data run.toml --phase sft --set data.path={path}");
    let what = "that is the folder of a run, which holds its figures and no data set";
    refused(&p, &data("out/sft"), &[&format!("[data] path out/sft: {what}; give a file of records")]);
    refused(&p, "sft run.toml --set data.path=out/ppo --out o", &["did you mean out/ppo/samples.jsonl?"]);
    refused(&p, "init sft --base base --data out/ppo", &["did you mean out/ppo/samples.jsonl?"]);
    assert!(!p.path("o").exists());
    fs::copy(p.path("sft.jsonl"), p.path("out/ppo/completions.jsonl")).unwrap();
    refused(&p, &data("out/ppo"), &["did you mean out/ppo/completions.jsonl or out/ppo/samples.jsonl?"]);
    // What is meant works, and runs beside records are left out and named.
    let read = |path: &str| {
        let ran = p.run(&data(path));
        assert_eq!(ran.code, 0, "{path}: {}", ran.stderr);
        ran.stdout + &ran.stderr
    };
    read("out/ppo/samples.jsonl");
    assert!(read("out/ppo/*.json*").contains("are not read; the first: out/ppo/about.json"));
    fs::create_dir(p.path("mixed")).unwrap();
    fs::copy(p.path("sft.jsonl"), p.path("mixed/sft.jsonl")).unwrap();
    fs::rename(p.path("out/sft"), p.path("mixed/run")).unwrap();
    assert!(read("mixed").contains("[data] 1 path is not read; the first: mixed/run"), "{}", read("mixed"));
    refused(&p, &data("mixed/run/adapter"), &["the folder has no file that ends in"]);
}
