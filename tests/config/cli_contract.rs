//! The command line's contract, kept by the real binary over the embedded base: exit codes, what stands on stdout, the
//! chain of the commands, and figures that must agree between them. Bad input is bad_input.rs's.

use std::fs;

use crate::support::Place;
use serde_json::{Value, json};

impl Place {
    /// Runs a `--json` command that must succeed; stdout must be one JSON object on one line, and nothing else.
    fn object(&self, args: &[&str]) -> Value {
        let args = [args, &["--json"]].concat();
        let ran = self.run_with(&args, "");
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
        assert_eq!(ran.stdout.matches('\n').count(), 1, "{args:?}: {}", ran.stdout);
        let value: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert!(value.is_object(), "{args:?}: {value}");
        value
    }

    fn words(&self, line: &str) -> Value {
        self.object(&line.split_whitespace().collect::<Vec<_>>())
    }

    fn generate(&self, more: &str) -> Value {
        let mut args = vec!["generate", "--base", "base", "--prompt", "How is the hotel?"];
        args.extend(more.split_whitespace());
        self.object(&args)
    }
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))).collect()
}

fn finite(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(object[*key].as_f64().is_some_and(f64::is_finite), "{key} = {} in {object}", object[*key]);
    }
}

#[test]
fn sft_reward_ppo_and_merge_make_a_model_that_every_reading_command_takes() {
    let p = Place::new();
    // 1. Training: each stage starts from the one before.
    let sft = p.words("sft run.toml --out out/sft");
    finite(&sft, &["perplexity_before", "perplexity_after", "wall_s"]);
    assert_eq!((&sft["train_records"], &sft["eval_records"]), (&json!(4), &json!(2)));
    let reward = p.words("reward run.toml --set data.path=pairs.jsonl --out out/reward");
    finite(&reward, &["accuracy", "mean_chosen_score", "mean_rejected_score"]);
    let ppo = p.words("ppo run.toml --set data.path=prompts.jsonl --out out/ppo");
    finite(&ppo, &["kl", "scores"]);
    assert_eq!((&ppo["actor"], &ppo["critic"]), (&json!("out/ppo/actor"), &json!("out/ppo/critic")));
    for adapter in ["out/sft/adapter", "out/reward/adapter", "out/ppo/actor", "out/ppo/critic"] {
        assert!(p.path(adapter).join("adapter_model.safetensors").is_file(), "{adapter}");
    }
    // 2. One line of figures an iteration, under TRL's names.
    let metrics = fs::read_to_string(p.path("out/ppo/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.iter().map(|l| l["episode"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 8]);
    for line in &lines {
        finite(line, &["objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy"]);
        finite(line, &["policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg"]);
        finite(line, &["val/clipfrac_avg", "val/ratio", "val/num_eos_tokens", "lr", "episode"]);
        // The first minibatch is scored by the very weights that sampled it. Cache against whole sequence: f32 rounding.
        assert!((line["val/first_ratio"].as_f64().unwrap() - 1.0).abs() < 1e-4, "{line}");
    }
    let (kl, scores) = (lines[1]["objective/kl"].as_f64().unwrap(), lines[1]["objective/scores"].as_f64().unwrap());
    assert_ne!(kl, 0.0, "the actor has moved by the second rollout");
    assert!((lines[1]["objective/rlhf_reward_raw"].as_f64().unwrap() - (scores - 0.05 * kl)).abs() < 1e-9);
    // 3. The merged model says what base + adapter says.
    let merged = p.words("merge --base base --adapter out/ppo/actor --out merged --dtype f32");
    finite(&merged, &["max_logit_difference", "greedy_agreement"]);
    p.write("ids.json", json!({"input_ids": [[5, 6, 7, 8], [300, 20]]}).to_string());
    let by_adapter = p.words("logprobs --base base --adapter out/ppo/actor --tokens ids.json");
    let by_merged = p.words("logprobs --base merged --tokens ids.json");
    let by_base = p.words("logprobs --base base --tokens ids.json");
    let first = |v: &Value| floats(&v["logprobs"][0]);
    assert_eq!((first(&by_merged).len(), by_merged["logprobs"][1].as_array().unwrap().len()), (3, 1));
    for ((a, m), b) in first(&by_adapter).iter().zip(first(&by_merged)).zip(first(&by_base)) {
        // f32 weights: only the order of sums differs.
        assert!((a - m).abs() < 1e-3, "{a} by the adapter, {m} merged");
        assert_ne!(*a, b, "the adapter changes what the base says");
    }
    assert_eq!(by_adapter["argmax"], by_merged["argmax"]);
    let text = p.object(&["generate", "--base", "merged", "--prompt", "How is it?", "--max-new-tokens", "4"]);
    assert!(text["text"].is_string(), "{text}");
    // 4. The reward model over its pairs.
    let score = p.words("score --base base --adapter out/reward/adapter --data pairs.jsonl");
    finite(&score, &["accuracy", "mean_chosen_score", "mean_rejected_score"]);
    let pairs: Vec<Vec<f64>> = score["scores"].as_array().unwrap().iter().map(floats).collect();
    assert_eq!(pairs.len(), 6);
    let right = pairs.iter().filter(|s| s[0] > s[1]).count();
    assert!((score["accuracy"].as_f64().unwrap() - right as f64 / 6.0).abs() < 1e-12);
    assert_eq!(score["places"][1], json!({"file": "pairs.jsonl", "record": 2}));
    // 5. What is where.
    let kind = |path: &str| p.words(&format!("inspect {path}"))["kind"].clone();
    assert_eq!((kind("merged"), kind("base")), (json!("huggingface"), json!("huggingface")));
    let adapter = p.words("inspect out/reward/adapter");
    assert_eq!((&adapter["kind"], &adapter["r"]), (&json!("adapter"), &json!(2)));
    assert!(adapter["head"].to_string().contains("score.weight"), "{adapter}");
    assert_eq!(p.words("inspect out/ppo/actor")["head"], json!([]));
}

#[test]
fn dora_on_both_ends_trains_in_every_role_goes_on_after_a_stop_and_merges() {
    let p = Place::new();
    let lora = "--set lora.use_dora=true --set lora.target_modules=[\"embed_tokens\",\"lm_head\",\"up_proj\"]";
    let run = |line: &str| {
        let ran = p.run(line);
        assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    };
    run(&format!("sft run.toml {lora} --out out/sft"));
    run(&format!("reward run.toml {lora} --set data.path=pairs.jsonl --out out/reward"));
    run(&format!("ppo run.toml {lora} --set data.path=prompts.jsonl --set ppo.kl_estimator=exact --out out/ppo"));
    let described = p.words("inspect out/reward/adapter");
    assert_eq!(described["use_dora"], json!(true), "{described}");
    // A checkpoint in the middle goes on to the same bytes, magnitudes and tables' branches included.
    let file = |out: &str| fs::read(p.path(out).join("adapter/adapter_model.safetensors")).unwrap();
    let every = "--set checkpoint.save_steps=1 --set checkpoint.save_total_limit=9";
    run(&format!("sft run.toml {lora} {every} --set sft.num_train_epochs=2 --out out/whole"));
    let whole = file("out/whole");
    let epochs = "--set sft.num_train_epochs=2 --out out/whole";
    run(&format!("sft run.toml {lora} {every} {epochs} --resume out/whole/checkpoints/checkpoint-1"));
    assert_eq!(file("out/whole"), whole);
    // The base has one table for both ends, the merged model two.
    p.words("merge --base base --adapter out/ppo/actor --out merged --dtype f32");
    p.write("ids.json", json!({"input_ids": [[5, 6, 7, 8, 300, 20]]}).to_string());
    let by_adapter = p.words("logprobs --base base --adapter out/ppo/actor --tokens ids.json");
    let by_merged = p.words("logprobs --base merged --tokens ids.json");
    for (a, m) in floats(&by_adapter["logprobs"][0]).iter().zip(floats(&by_merged["logprobs"][0])) {
        assert!((a - m).abs() < 1e-3, "{a} by the adapter, {m} merged");
    }
    let config: Value = serde_json::from_slice(&fs::read(p.path("merged/config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], json!(false));
    for format in ["gguf", "gguf-lora"] {
        let ran = p.run(&format!("merge --base base --adapter out/ppo/actor --out x.gguf --format {format}"));
        assert!(ran.code == 2 && ran.stderr.contains("safetensors"), "{format}: {}", ran.stderr);
    }
}

#[test]
fn logprobs_of_generated_tokens_are_those_that_generate_reported() {
    let p = Place::new();
    assert_eq!(p.run("sft run.toml --out out/sft").code, 0);
    let g = p.generate("--adapter out/sft/adapter --max-new-tokens 24 --seed 3");
    let ids: Vec<u64> = [&g["prompt_token_ids"], &g["token_ids"]]
        .iter()
        .flat_map(|v| v.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()))
        .collect();
    p.write("ids.json", json!({ "input_ids": [ids] }).to_string());
    let all = floats(&p.words("logprobs --base base --adapter out/sft/adapter --tokens ids.json")["logprobs"][0]);
    let told = floats(&g["logprobs"]);
    assert!(told.len() > 1);
    for (i, (told, read)) in told.iter().zip(&all[all.len() - told.len()..]).enumerate() {
        // Cached, one token at a time, against the whole sequence at once: f32 rounding.
        assert!((told - read).abs() < 1e-4, "token {i}: generate {told}, logprobs {read}");
    }
}

#[test]
fn a_seed_fixes_the_text_and_another_seed_changes_it() {
    let p = Place::new();
    let seeds = |seed: u32| p.generate(&format!("--max-new-tokens 24 --seed {seed}"));
    assert_eq!(seeds(1), seeds(1));
    assert_ne!(seeds(1)["token_ids"], seeds(2)["token_ids"]);
    let greedy = |seed: u32| p.generate(&format!("--max-new-tokens 12 --temperature 0 --seed {seed}"));
    assert_eq!(greedy(1)["token_ids"], greedy(2)["token_ids"], "greedy decoding draws nothing");
}

#[test]
fn training_twice_with_one_seed_gives_the_same_bytes() {
    let p = Place::new();
    let train = |out: &str, seed: u32| {
        let ran = p.run(&format!("sft run.toml --set seed={seed} --out {out} --overwrite"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        fs::read(p.path(out).join("adapter/adapter_model.safetensors")).unwrap()
    };
    let first = train("a", 7);
    assert_eq!(first, train("b", 7));
    assert_ne!(first, train("c", 8));
    assert_eq!(first, train("a", 7), "the folder of a former run is taken again");
}

#[test]
fn generate_says_why_it_ended_and_top_p_of_almost_nothing_is_greedy() {
    let p = Place::new();
    let short = p.generate("--max-new-tokens 2 --temperature 0");
    assert_eq!((&short["finish_reason"], short["token_ids"].as_array().unwrap().len()), (&json!("length"), 2));
    assert_eq!(short["logprobs"].as_array().unwrap().len(), 2);
    let long = p.generate("--max-new-tokens 200 --temperature 0");
    assert_eq!(long["finish_reason"], "stop");
    assert_eq!(long["token_ids"].as_array().unwrap().last(), Some(&json!(0)), "the end token belongs to the response");
    assert!(!long["text"].as_str().unwrap().contains("endoftext"), "{long}");
    let nucleus = p.generate("--max-new-tokens 200 --top-p 1e-9 --seed 5");
    assert_eq!(nucleus["token_ids"], long["token_ids"]);
}

#[test]
fn the_chat_template_goes_around_a_prompt_unless_it_is_raw() {
    let p = Place::new();
    let templated = p.generate("--max-new-tokens 1")["prompt_token_ids"].clone();
    let raw = p.generate("--max-new-tokens 1 --raw")["prompt_token_ids"].clone();
    assert!(raw.as_array().unwrap().len() < templated.as_array().unwrap().len());
    let whole = ["generate", "--base", "base", "--raw", "--max-new-tokens", "1"];
    let whole = [&whole[..], &["--prompt", "\n\nHuman: How is the hotel?\n\nAssistant:"]].concat();
    assert_eq!(p.object(&whole)["prompt_token_ids"], templated);
}

#[test]
fn people_read_text_on_stdout_and_everything_else_on_stderr() {
    let p = Place::new();
    let args =
        ["generate", "--base", "base", "--prompt", "How is the hotel?", "--max-new-tokens", "200", "--seed", "1"];
    let ran = p.run_with(&args, "");
    let text = p.generate("--max-new-tokens 200 --seed 1")["text"].as_str().unwrap().to_string();
    assert_eq!((ran.code, ran.stdout.as_str()), (0, format!("{text}\n").as_str()), "{}", ran.stderr);
    let ran = p.run("sft run.toml --out out/sft");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""));
    assert!(ran.stderr.contains("sft 1/2") && ran.stderr.contains("sft 2/2"), "a line for progress: {}", ran.stderr);
    assert!(ran.stderr.contains("loss "), "{}", ran.stderr);
    assert!(ran.stderr.contains("out/sft"), "it says where everything is: {}", ran.stderr);
    let ran = p.run("inspect base");
    assert!(ran.stdout.contains("num_hidden_layers") && ran.stderr.is_empty(), "{}{}", ran.stdout, ran.stderr);
}

#[test]
fn chat_answers_each_line_of_a_pipe_and_remembers() {
    let p = Place::new();
    let args = ["chat", "--base", "base", "--max-new-tokens", "12", "--temperature", "0"];
    let one = p.run_with(&args, "How is the hotel?\n");
    let two = p.run_with(&args, "How is the hotel?\nAnd the food?");
    assert_eq!((one.code, two.code), (0, 0), "{}{}", one.stderr, two.stderr);
    assert!(!one.stdout.trim().is_empty());
    assert!(two.stdout.starts_with(&one.stdout) && two.stdout.len() > one.stdout.len() + 1, "{:?}", two.stdout);
    // The second answer depends on what was said before, unless it was forgotten.
    for command in ["/new", "/reset"] {
        let forgotten = p.run_with(&args, &format!("How is the hotel?\n{command}\n\nHow is the hotel?\n"));
        assert_eq!(forgotten.stdout, format!("{0}{0}", one.stdout), "{command}");
    }
    let forgotten = p.run_with(&args, "How is the hotel?\n/reset\nHow is the hotel?\n");
    assert!(forgotten.stderr.contains("tokens per second"), "{}", forgotten.stderr);
    // The dialogue is a record that training reads; a command that there is not is no message.
    let saved = p.run_with(&args, "/system Be brief.\nHow is the hotel?\n/save talk.jsonl\n/exit\nnever sent\n");
    assert_eq!(saved.code, 0, "{}", saved.stderr);
    let talk: Value = serde_json::from_str(&fs::read_to_string(p.path("talk.jsonl")).unwrap()).unwrap();
    let roles: Vec<&str> = talk["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant"]);
    let ran = p.run_with(&args, "/hepl\n");
    assert!(ran.code == 2 && ran.stderr.contains("no command /hepl") && ran.stdout.is_empty(), "{}", ran.stderr);
    let ran = p.run_with(&args, "/save talk.jsonl\n");
    assert!(ran.code == 2 && ran.stderr.contains("talk.jsonl"), "a file is not replaced: {}", ran.stderr);
    let twice = p.run_with(&args, "How is the hotel?\nHow is the hotel?\n");
    assert_ne!(twice.stdout, forgotten.stdout);
}

#[test]
fn score_goes_record_by_record_with_what_it_cuts_and_skips() {
    let p = Place::new();
    p.train_sft_and_reward();
    let pairs = fs::read_to_string(p.path("pairs.jsonl")).unwrap();
    let lines: Vec<&str> = pairs.lines().collect();
    let prompt = format!("\n\nHuman: {}?\n\nAssistant:", "word ".repeat(60));
    let long = json!({"prompt": prompt, "chosen": " Yes.", "rejected": " No."});
    p.write("mixed.jsonl", [lines[0], "{\"question\": 1}", &long.to_string(), lines[1]].join("\n"));
    let whole = p.words("score --base base --adapter out/reward/adapter --data pairs.jsonl");
    let score =
        "score --base base --adapter out/reward/adapter --data mixed.jsonl --max-length 40 --on-bad-record skip";
    let found = p.words(&format!("{score} --out skip.jsonl"));
    // Other records in the batch: f32 rounding.
    for (got, want) in [(0, 0), (1, 1)] {
        for (a, b) in floats(&found["scores"][got]).iter().zip(floats(&whole["scores"][want])) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
    let places: Vec<&Value> = found["places"].as_array().unwrap().iter().map(|place| &place["record"]).collect();
    assert_eq!(places, [&json!(1), &json!(4)]);
    assert_eq!((&found["records"], &found["dropped"], &found["pairs"]), (&json!(4), &json!(2), &json!(2)));
    let read = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(p.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let out = read("skip.jsonl");
    assert_eq!(out.iter().map(|line| line["record"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(out[0]["scores"], found["scores"][0]);
    assert!(out[1]["skipped"].as_str().unwrap().contains("question"), "{}", out[1]);
    assert_eq!(out[2]["skipped"], "longer than --max-length 40");
    // The prompt loses its first tokens, and the record is scored.
    let cut = p.words(&format!("{score} --on-long cut --out cut.jsonl"));
    assert_eq!((&cut["dropped"], &cut["truncated"]), (&json!(1), &json!(1)));
    let out = read("cut.jsonl");
    assert_eq!(out[2]["truncated"], true);
    assert_eq!(out[2]["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).max(), Some(40));
    // A single response has a score and no comparison.
    let single = p.words("score --base base --adapter out/reward/adapter --data sft.jsonl");
    assert_eq!((single["scores"].as_array().unwrap().len(), &single["accuracy"]), (6, &Value::Null));
    for (single, pair) in single["scores"].as_array().unwrap().iter().zip(whole["scores"].as_array().unwrap()) {
        assert!(
            (single[0].as_f64().unwrap() - pair[0].as_f64().unwrap()).abs() < 1e-4,
            "the same text, the same score"
        );
    }
}

#[test]
fn a_finished_run_is_replaced_only_when_that_is_asked_for() {
    let p = Place::new();
    for stage in ["sft", "reward", "dpo", "kto", "ppo"] {
        let data = match stage {
            "sft" => "sft.jsonl",
            "ppo" => "prompts.jsonl",
            _ => "pairs.jsonl",
        };
        let line = format!("{stage} run.toml --set data.path={data} --out out/{stage}");
        assert_eq!(p.run(&line).code, 0, "{stage}: {}", p.run(&line).stderr);
        let state = || {
            let mut files: Vec<_> =
                fs::read_dir(p.path(&format!("out/{stage}"))).unwrap().map(|e| e.unwrap()).collect();
            files.sort_by_key(|entry| entry.path());
            files.iter().map(|e| (e.path(), e.metadata().unwrap().modified().unwrap())).collect::<Vec<_>>()
        };
        let before = state();
        for other in [line.clone(), format!("{line} --set seed=1")] {
            let ran = p.run(&other);
            assert_eq!(ran.code, 2, "{other}: {}", ran.stderr);
            let says = ["holds a finished run of `fourfold", "--out", "--overwrite", "UTC"];
            assert!(says.iter().all(|say| ran.stderr.contains(say)), "{other}: {}", ran.stderr);
        }
        assert_eq!(state(), before, "{stage} was touched");
        // The same run is finished: --resume says so. Another has no checkpoint to go on from (PPO keeps its last state).
        let ran = p.run(&format!("{line} --resume"));
        assert!(ran.code == 0 && ran.stderr.contains("nothing to resume"), "{}", ran.stderr);
        if stage != "ppo" {
            let ran = p.run(&format!("{line} --set seed=1 --resume"));
            assert!(ran.code == 2 && ran.stderr.contains("--from-start"), "{}", ran.stderr);
            let ran = p.run(&format!("{line} --set seed=1 --resume --from-start"));
            assert!(ran.code == 2 && ran.stderr.contains("--overwrite"), "{}", ran.stderr);
        }
        assert_eq!(state(), before, "{stage} was touched");
    }
    let line = "sft run.toml --out out/sft --set seed=1 --overwrite";
    assert_eq!(p.run(line).code, 0);
    assert!(fs::read_to_string(p.path("out/sft/config.toml")).unwrap().contains("seed = 1"));
}

#[test]
fn a_resume_without_a_checkpoint_asks_for_from_start() {
    let p = Place::new();
    let line = "sft run.toml --out out/new --resume";
    let ran = p.run(line);
    assert!(ran.code == 2 && ran.stderr.contains("--from-start"), "{}", ran.stderr);
    assert!(!p.path("out/new").exists(), "nothing is made");
    let ran = p.run(&format!("{line} --from-start"));
    assert!(ran.code == 0 && ran.stderr.contains("begins at step 0"), "{}", ran.stderr);
}

#[test]
fn an_override_changes_the_run_and_its_error_names_it() {
    let p = Place::new();
    let ran = p.words("sft run.toml --set sft.num_train_epochs=3 --set lora.r=3 --out out/sft");
    assert_eq!(ran["steps"], 6);
    let resolved = fs::read_to_string(p.path("out/sft/config.toml")).unwrap();
    assert!(resolved.contains("num_train_epochs = 3") && resolved.contains("r = 3"), "{resolved}");
    assert_eq!(p.words("inspect out/sft/adapter")["r"], 3);
    // The resolved config is a config.
    assert_eq!(p.words("sft out/sft/config.toml --out again")["steps"], 6);
    let ran = p.run("sft run.toml --set sft.num_train_epoch=3 --out never");
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("--set sft.num_train_epoch=3"), "{}", ran.stderr);
    assert!(ran.stderr.contains("did you mean \"num_train_epochs\"?"), "{}", ran.stderr);
}

#[test]
fn arguments_that_clap_refuses_exit_with_2_and_help_with_0() {
    let p = Place::new();
    for line in
        ["", "train run.toml", "sft", "generate --base base", "merge --base base --adapter a --out b --dtype q4"]
    {
        let ran = p.run(line);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{line}: {}", ran.stderr);
        assert!(ran.stderr.contains("Usage") || ran.stderr.contains("--help"), "{line}: {}", ran.stderr);
    }
    for line in ["--help", "ppo --help", "--version"] {
        let ran = p.run(line);
        assert!(ran.code == 0 && ran.stderr.is_empty() && !ran.stdout.is_empty(), "{line}: {}", ran.stderr);
    }
}

#[test]
fn quiet_keeps_errors_and_warnings_and_drops_the_rest() {
    let p = Place::new();
    assert_eq!(p.run("sft run.toml --out out/sft").code, 0);
    let run = |more: &str, out: &str| {
        let ran = p.run(&format!("reward run.toml --set data.path=pairs.jsonl --out {out} {more}"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran
    };
    let (loud, quiet, short) = (run("", "loud"), run("--quiet", "quiet"), run("-q --json", "short"));
    for part in ["data: ", "memory: ", "reward 1/2", "held-out accuracy 0.500 -> ", "done; everything is in"] {
        assert!(
            loud.stderr.contains(part) && !quiet.stderr.contains(part),
            "{part}: {}\n{}",
            loud.stderr,
            quiet.stderr
        );
    }
    // Four comparisons teach nothing, which stays to be said.
    assert!(quiet.stderr.contains("reward: warning: it was trained on 4 comparisons"), "{}", quiet.stderr);
    assert!(quiet.stderr.lines().all(|line| line.contains("warning: ")), "{}", quiet.stderr);
    assert!(quiet.stderr.lines().all(|line| loud.stderr.contains(line)), "{}", loud.stderr);
    assert_eq!((quiet.stderr.as_str(), short.stdout.lines().count()), (short.stderr.as_str(), 1));
    let adapter = |out: &str| fs::read(p.path(out).join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter("loud"), adapter("quiet"));
    let wrong = p.run("-q sft nowhere.toml");
    assert!(wrong.code == 2 && wrong.stderr.starts_with("error: "), "{}", wrong.stderr);
}
