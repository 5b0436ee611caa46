//! The planner beside the meter, and what comes of it: every phase of every stage predicted from shapes within 5% of what
//! the binary's own allocator counts; a stage that would not fit refuses before it touches anything, and what it names
//! fits; shapes of a 7B model are planned from its config.json alone.

mod support;

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use support::{Place, Ran};

/// Longer texts than the other tests have, so that passes are what memory goes to.
fn place() -> Place {
    let p = Place::new();
    let words = ["the hotel is clean", "the food was cold and salty", "nobody answered", "we would come again"];
    let text = |from: usize, n: usize| (0..n).map(|i| words[(from + i * 7) % 4]).collect::<Vec<_>>().join(", ");
    let lines = |of: &dyn Fn(usize) -> Value| (0..64).map(|i| format!("{}\n", of(i))).collect::<String>();
    let prompt = |i: usize| format!("\n\nHuman: {}?\n\nAssistant:", text(i, 2 + i % 3));
    p.write("sft.jsonl", lines(&|i| json!({"prompt": prompt(i), "completion": format!(" {}.", text(i, 3 + i % 4))})));
    let pair = |i: usize| {
        let answers = [3, 5].map(|n| format!(" {}.", text(i + n, n + i % 2)));
        json!({"prompt": prompt(i), "chosen": answers[0], "rejected": answers[1]})
    };
    p.write("pairs.jsonl", lines(&pair));
    // No two alike: equal prompts are prefilled once.
    let asked = |i: usize| format!("\n\nHuman: {}, {i}?\n\nAssistant:", text(i, 2 + i % 3));
    p.write("prompts.jsonl", lines(&|i| json!({"prompt": asked(i)})));
    let judged = |i: usize| json!({"prompt": prompt(i), "completion": format!(" {}.", text(i, 4)), "label": i.is_multiple_of(2)});
    p.write("judged.jsonl", lines(&judged));
    p.write("run.toml", CONFIG);
    p
}

const CONFIG: &str = r#"
[base]
path = "base"
[data]
path = "sft.jsonl"
eval_rows = 8
max_length = 200
[sft]
per_device_train_batch_size = 8
[reward]
per_device_train_batch_size = 8
[dpo]
per_device_train_batch_size = 8
[kto]
per_device_train_batch_size = 8
[ppo]
reward_adapter = "out/reward/adapter"
batch_size = 16
total_episodes = 32
micro_batch_size = 8
response_length = 48
eval_prompts = 8
"#;

fn run(p: &Place, words: &str, more: &[&str]) -> Ran {
    let args: Vec<&str> = words.split_whitespace().chain(more.iter().copied()).collect();
    p.run_with(&args, "")
}

fn object(p: &Place, words: &str, more: &[&str]) -> Value {
    let ran = run(p, words, more);
    assert_eq!(ran.code, 0, "{words} {more:?}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

/// A reward adapter for PPO, as untrained as one step leaves it.
fn with_reward_adapter(p: &Place) {
    let ran = run(p, "reward run.toml --set data.path=pairs.jsonl --set data.max_rows=16 --out out/reward", &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

/// Plan and measurement with so many threads that compute, by phase.
fn measured(p: &Place, words: &str, threads: usize) -> serde_json::Map<String, Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_fourfold"))
        .args(["bench", "memory", "run.toml"].into_iter().chain(words.split_whitespace()).chain(["--json"]))
        .env("RAYON_NUM_THREADS", threads.to_string())
        .current_dir(p.path(""))
        .output()
        .unwrap();
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    found["phases"].as_object().unwrap().clone()
}

/// Predicted within 5% with two threads. A helper thread's buffers grow to the largest item that it was in time for, and the
/// plan counts the largest of all: of up to three runs, as another process may have kept a thread away, each phase's highest is
/// what it takes. With more threads this base has too few items for all.
fn agrees(p: &Place, words: &str, phases: &[&str]) {
    let mut highest = vec![0f64; phases.len()];
    let mut off = vec![];
    for _ in 0..3 {
        let all = measured(p, words, 2);
        let ran: Vec<&str> = all.keys().map(String::as_str).collect();
        assert_eq!(ran, phases, "{words}");
        off.clear();
        for ((phase, of), highest) in all.iter().zip(&mut highest) {
            *highest = highest.max(of["measured"].as_f64().unwrap());
            if (of["predicted"].as_f64().unwrap() / *highest - 1.0).abs() > 0.05 {
                off.push(format!("{phase}: {of}"));
            }
        }
        if off.is_empty() {
            return;
        }
    }
    panic!("{words}: {off:?}");
}

const ALL: [&str; 5] = ["load", "update", "step", "evaluation", "save"];

#[test]
fn with_many_threads_no_phase_takes_more_than_predicted() {
    let p = place();
    for words in ["--phase sft", "--phase dpo --set data.path=pairs.jsonl --set base.quantize=\"q8_0\""] {
        for (phase, of) in measured(&p, words, 12) {
            assert!(
                of["measured"].as_f64().unwrap() <= of["predicted"].as_f64().unwrap() * 1.05,
                "{words}, {phase}: {of}"
            );
        }
    }
}

#[test]
fn sft_and_reward_are_predicted_within_5_percent_in_every_phase_of_three_shapes() {
    let p = place();
    for shape in [
        "",
        "--set sft.per_device_train_batch_size=3 --set lora.r=16 --set sft.checkpoint=\"mlp\"",
        "--set sft.checkpoint=\"block\" --set base.compute_dtype=\"bf16\"",
        "--set lora.target_modules=[\"q_proj\",\"embed_tokens\",\"lm_head\"]",
    ] {
        agrees(&p, &format!("--phase sft {shape}"), &ALL);
    }
    for shape in [
        "",
        "--set reward.per_device_train_batch_size=2 --set reward.gradient_accumulation_steps=3 --set reward.checkpoint=\"mlp\"",
        "--set reward.checkpoint=\"block\" --set reward.loss=\"divergence_to_end\"",
        "--set reward.ensemble=4 --set lora.r=32",
    ] {
        agrees(&p, &format!("--phase reward --set data.path=pairs.jsonl {shape}"), &ALL);
    }
}

#[test]
fn dpo_and_kto_are_predicted_within_5_percent_in_every_phase() {
    let p = place();
    for shape in ["", "--set dpo.per_device_train_batch_size=4 --set base.quantize=\"q8_0\""] {
        agrees(&p, &format!("--phase dpo --set data.path=pairs.jsonl {shape}"), &ALL);
    }
    agrees(&p, "--phase kto --set data.path=judged.jsonl", &ALL);
}

/// Pass sizes of an evaluation besides the training's: smaller and larger ones, and one that the tokens of a pass bound.
#[test]
fn evaluations_are_predicted_within_5_percent_at_every_size_of_their_passes() {
    let p = place();
    let small = "per_device_train_batch_size=4";
    for (stage, data, keys) in [
        ("sft", "sft", &["per_device_eval_batch_size=2"][..]),
        ("sft", "sft", &[small, "per_device_eval_batch_size=24"]),
        ("sft", "sft", &["max_tokens_per_batch=400", "per_device_eval_batch_size=24"]),
        ("reward", "pairs", &[small, "per_device_eval_batch_size=12"]),
        ("reward", "pairs", &["max_tokens_per_batch=1600", "per_device_eval_batch_size=2"]),
        ("dpo", "pairs", &[small, "per_device_eval_batch_size=10"]),
        ("kto", "judged", &[small, "per_device_eval_batch_size=3"]),
    ] {
        let set: String = keys.iter().map(|key| format!(" --set {stage}.{key}")).collect();
        agrees(&p, &format!("--phase {stage} --set data.path={data}.jsonl --set data.eval_rows=24{set}"), &ALL);
    }
}

#[test]
fn an_evaluation_takes_by_default_no_more_than_an_update_and_a_refusal_names_the_size_that_does() {
    let p = place();
    let bytes = |words: &str, more: &[&str], phase: &str| {
        let plan = object(&p, &format!("plan run.toml --json {words}"), more);
        plan["phases"][phase]["own"].as_u64().unwrap()
    };
    for (stage, data) in [("sft", "sft"), ("reward", "pairs"), ("dpo", "pairs"), ("kto", "judged")] {
        let at_once = if stage == "kto" { 2 } else { 1 };
        let words = format!(
            "--phase {stage} --set data.path={data}.jsonl --set data.eval_rows=24 \
             --set {stage}.per_device_train_batch_size={at_once} --set {stage}.checkpoint=\"block\""
        );
        let (update, evaluation) = (bytes(&words, &[], "update"), bytes(&words, &[], "evaluation"));
        assert!(evaluation <= update, "{stage}: {evaluation} in an evaluation, {update} in an update");
        let more = bytes(&words, &["--set", &format!("{stage}.per_device_eval_batch_size=8")], "evaluation");
        assert!(more > evaluation, "{stage}: {more} at eight, {evaluation} by default");
    }
    let words = "--set data.eval_rows=24 --set sft.per_device_train_batch_size=2 --set sft.checkpoint=\"block\" \
                 --set sft.per_device_eval_batch_size=24";
    let plan = |key: &str| bytes(&format!("--phase sft {words}"), &[], key);
    let limit = format!("memory.limit={}", (plan("update") + plan("evaluation")) / 2 + (2 << 20));
    assert!(plan("evaluation") > plan("update") + (5 << 20), "{} {}", plan("evaluation"), plan("update"));
    let refused = run(&p, &format!("sft run.toml --out refused {words}"), &["--set", &limit]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    let change = named_change(&refused.stderr);
    assert!(change.len() == 1 && change[0].starts_with("sft.per_device_eval_batch_size="), "{}", refused.stderr);
    let again = run(&p, &format!("sft run.toml --out refused {words} --set {}", change[0]), &["--set", &limit]);
    assert_eq!(again.code, 0, "{}", again.stderr);
}

#[test]
fn ppo_is_predicted_within_5_percent_in_every_phase_of_three_shapes() {
    let p = place();
    with_reward_adapter(&p);
    let phases = ["load", "rollout", "scoring", "update", "step", "evaluation", "save"];
    for shape in [
        "",
        "--set ppo.micro_batch_size=4 --set ppo.checkpoint=\"block\" --set ppo.response_length=24 \
         --set base.compute_dtype=\"bf16\"",
        "--set base.quantize=\"q8_0\" --set ppo.num_mini_batches=2 --set ppo.local_rollout_forward_batch_size=4 \
         --set ppo.checkpoint=\"mlp\"",
    ] {
        agrees(&p, &format!("--phase ppo --set data.path=prompts.jsonl {shape}"), &phases);
    }
}

#[test]
fn grpo_and_rloo_are_predicted_within_5_percent_in_every_phase_with_and_without_a_reference() {
    let p = place();
    with_reward_adapter(&p);
    let of = |section: &str| {
        let common = CONFIG.split("[sft]").next().unwrap();
        format!(
            "{common}[{section}]\nreward_adapter = \"out/reward/adapter\"\nnum_generations = 4\n\
             per_device_train_batch_size = 8\nsteps_per_generation = 2\ngradient_accumulation_steps = 2\n\
             max_completion_length = 48\neval_prompts = 8\n"
        )
    };
    let phases = ["load", "rollout", "scoring", "update", "step", "evaluation", "save"];
    let file = fs::read_to_string(p.path("run.toml")).unwrap();
    for (section, more) in [("grpo", ""), ("grpo", "--set grpo.beta=0.04"), ("rloo", "--set rloo.checkpoint=\"mlp\"")] {
        p.write("run.toml", of(section));
        agrees(&p, &format!("--phase {section} --set data.path=prompts.jsonl {more}"), &phases);
    }
    p.write("run.toml", file);
}

#[test]
fn distillation_is_predicted_within_5_percent_in_every_phase_with_teachers_of_both_kinds() {
    let p = place();
    let ran = run(&p, "sft run.toml --set data.max_rows=16 --out out/sft", &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    p.write_base("teacher");
    let file = fs::read_to_string(p.path("run.toml")).unwrap();
    let common = file.split("[sft]").next().unwrap();
    let phases = ["load", "rollout", "update", "step", "evaluation", "save"];
    let section = "[distill]\nper_device_train_batch_size = 8\nmax_new_tokens = 48\nlmbda = 1.0\n";
    for (keys, more) in [
        // An adapter over the policy's base, and a base of its own, from which products are rounded otherwise.
        ("teacher_adapter = \"out/sft/adapter\"\n", "--set data.path=prompts.jsonl"),
        (
            "[teacher]\npath = \"teacher\"\ncompute_dtype = \"bf16\"\n",
            "--set data.path=prompts.jsonl --set distill.checkpoint=\"block\" --set distill.beta=1.0 \
             --set distill.per_device_train_batch_size=4 --set distill.gradient_accumulation_steps=2",
        ),
        (
            "teacher_adapter = \"out/sft/adapter\"\n",
            "--set data.path=prompts.jsonl --set data.eval_rows=24 --set distill.per_device_train_batch_size=4 \
             --set distill.per_device_eval_batch_size=12",
        ),
    ] {
        p.write("run.toml", format!("{common}{section}{keys}"));
        agrees(&p, &format!("--phase distill {more}"), &phases);
    }
    p.write("run.toml", file);
}

/// The words after `--set` in a refusal.
fn named_change(message: &str) -> Vec<String> {
    let (_, change) = message.split_once(": --set ").unwrap_or_else(|| panic!("no change is named: {message}"));
    let (change, _) = change.split_once(" (").unwrap();
    change.split(" --set ").map(str::to_owned).collect()
}

#[test]
fn a_stage_that_would_not_fit_refuses_with_code_2_and_the_change_it_names_fits() {
    let p = place();
    with_reward_adapter(&p);
    let stages = [
        ("sft", "sft.jsonl"),
        ("reward", "pairs.jsonl"),
        ("dpo", "pairs.jsonl"),
        ("kto", "judged.jsonl"),
        ("ppo", "prompts.jsonl"),
    ];
    for (stage, data) in stages {
        let data = format!("data.path={data}");
        let common = ["--set", &data, "--set", &format!("{stage}.checkpoint=\"none\"")];
        let plan = object(&p, &format!("plan run.toml --phase {stage} --json"), &common);
        // Less than the run takes, more than its cheapest form does.
        let (own, choices) = (plan["peak"]["own"].as_u64().unwrap(), plan["choices"].as_array().unwrap());
        let least = choices.iter().map(|c| c["own"].as_u64().unwrap()).min().unwrap();
        assert!(least < own * 9 / 10, "{stage}: {plan}");
        let limit = format!("memory.limit={}", (own + least) / 2);
        let words = format!("{stage} run.toml --out refused/{stage}");
        let refused = run(&p, &words, &[&common[..], &["--set", &limit]].concat());
        assert_eq!(refused.code, 2, "{stage}: {}", refused.stderr);
        let message = refused.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
        for part in [&format!("{stage} does not fit"), "[memory] limit is", "the smallest change that fits"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!p.path(&format!("refused/{stage}")).exists(), "{stage}: nothing was touched");
        let mut args: Vec<String> = [&common[..], &["--set", &limit]].concat().iter().map(|s| s.to_string()).collect();
        for change in named_change(message) {
            // The binary takes text as TOML has it.
            let (key, value) = change.split_once('=').unwrap();
            let is_number = value.parse::<f64>().is_ok();
            args.extend(["--set".into(), if is_number { change.clone() } else { format!("{key}=\"{value}\"") }]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let again = run(&p, &words, &args);
        assert_eq!(again.code, 0, "{stage} with {args:?}: {}", again.stderr);
        assert!(again.stderr.contains("memory: "), "{}", again.stderr);
    }
    let hopeless = run(&p, "sft run.toml --out refused/sft2 --set memory.limit=\"64KiB\"", &[]);
    assert_eq!(hopeless.code, 2, "{}", hopeless.stderr);
    assert!(hopeless.stderr.contains("take a smaller model"), "{}", hopeless.stderr);
}

#[test]
fn auto_recomputes_as_much_as_the_limit_asks_for_and_all_ways_end_in_the_same_bytes() {
    let p = place();
    let plan = |checkpoint: &str| {
        let set = format!("sft.checkpoint=\"{checkpoint}\"");
        object(&p, "plan run.toml --phase sft --json --set data.max_rows=24 --set", &[&set])["peak"]["total"]
            .as_u64()
            .unwrap()
    };
    let (none, mlp, block) = (plan("none"), plan("mlp"), plan("block"));
    let bytes = |out: &str| fs::read(p.path(out).join("adapter/adapter_model.safetensors")).unwrap();
    let unlimited = object(&p, "sft run.toml --json --out none --set data.max_rows=24", &[]);
    assert_eq!(unlimited["memory"]["checkpoint"], "none");
    for (checkpoint, limit) in [("mlp", (none + mlp) / 2), ("block", (mlp + block) / 2)] {
        let limit = format!("memory.limit={limit}");
        let words = format!("sft run.toml --json --out {checkpoint} --set data.max_rows=24 --set");
        let with = object(&p, &words, &[&limit]);
        assert_eq!(with["memory"]["checkpoint"], checkpoint, "{with}");
        assert_eq!(bytes(checkpoint), bytes("none"), "{checkpoint}");
    }
}

const LLAMA_7B: &str = r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "tie_word_embeddings": false}"#;

#[test]
fn four_roles_of_a_7b_ppo_step_fit_8_gib_over_one_q4_k_base_by_its_config_alone() {
    let p = place();
    fs::create_dir(p.path("llama")).unwrap();
    p.write("llama/config.json", LLAMA_7B);
    p.write(
        "7b.toml",
        r#"
        [base]
        path = "llama"
        quantize = "q4_k"
        [lora]
        r = 16
        [data]
        path = "not-there-yet.jsonl"
        max_prompt_length = 256
        [ppo]
        reward_adapter = "rm"
        batch_size = 8
        total_episodes = 8
        micro_batch_size = 1
        local_rollout_forward_batch_size = 4
        response_length = 256
        "#,
    );
    let plan = object(&p, "plan 7b.toml --memory 8GiB --json", &[]);
    assert_eq!((&plan["fits"], &plan["lengths"]), (&json!(true), &json!("longest")), "{plan}");
    let total = plan["peak"]["total"].as_u64().unwrap();
    assert!(total < 8 << 30, "{plan}");
    // 6.74 thousand million numbers at 4.5 bits, the tables at 8.5: the base alone is half of it.
    let base = plan["phases"]["update"]["base"].as_u64().unwrap();
    assert!((3_600 << 20..4_100 << 20).contains(&base), "{base}");
    let names: Vec<&str> = plan["arrangements"].as_array().unwrap().iter().filter_map(|a| a["name"].as_str()).collect();
    assert_eq!(names, ["four full models", "LoRA, four bases", "LoRA, two shared bases", "LoRA, one shared base"]);
    let of = |i: usize| plan["arrangements"][i]["bytes"]["total"].as_u64().unwrap();
    assert!(of(0) > of(1) && of(1) > of(2) && of(2) > of(3) && of(3) == total, "{plan}");
    let table = run(&p, "plan 7b.toml --memory 4GiB", &[]);
    assert!(
        table.stdout.contains("it does not fit") && table.stdout.contains("what would take less"),
        "{}",
        table.stdout
    );
}

#[test]
fn shapes_that_cannot_be_are_one_error_with_code_2() {
    let p = place();
    fs::create_dir(p.path("llama")).unwrap();
    let refused = |config: &str, part: &str| {
        p.write("llama/config.json", config);
        let ran = run(&p, "plan run.toml --phase sft --set base.path=llama", &[]);
        assert_eq!(ran.code, 2, "{config}: {} {}", ran.stdout, ran.stderr);
        let errors: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains(part), "{errors:?}");
    };
    refused(&LLAMA_7B.replace("\"hidden_size\": 4096", "\"hidden_size\": 0"), "hidden_size");
    refused(
        &LLAMA_7B.replace("\"num_attention_heads\": 32", "\"num_attention_heads\": 32, \"num_key_value_heads\": 5"),
        "evenly",
    );
    refused(&LLAMA_7B.replace("32000", "99999999999"), "vocab_size");
    refused("{", "JSON");
    // A container whose header promises more than the file holds.
    let mut gguf = b"GGUF".to_vec();
    gguf.extend(3u32.to_le_bytes());
    gguf.extend([1u64, 40].map(u64::to_le_bytes).concat());
    p.write("cut.gguf", gguf);
    let ran = run(&p, "plan run.toml --phase sft --set base.path=cut.gguf", &[]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("cut.gguf") && ran.stderr.matches("error: ").count() == 1, "{}", ran.stderr);
}
