//! `init`: for every stage a config over the embedded base that loads, fits and runs as it is; the lengths that it measures;
//! and what it refuses.

use std::fs;

use fourfold::config;
use fourfold::planner::plan::text;
use fourfold::quickstart::base::BASE;
use serde_json::{Value, json};

use crate::support::{Place, Ran};

/// Records of each kind, whose lengths differ.
fn records(of: &str, count: usize) -> String {
    let one = |i: usize| {
        let question = format!("How was the soup at place {i}? {}", "Tell me more. ".repeat(i % 5));
        let (good, bad) = ("The soup was lovely.", format!("The soup number {i} was awful and cold."));
        match of {
            "sft" => json!({"prompt": question, "completion": good}),
            "pairs" => json!({"prompt": question, "chosen": good, "rejected": bad}),
            "judged" => {
                let is_good = i.is_multiple_of(4);
                json!({"prompt": question, "completion": if is_good { good.into() } else { bad }, "label": is_good})
            }
            _ => json!({"prompt": question}),
        }
    };
    (0..count).map(|i| format!("{}\n", one(i))).collect()
}

fn place() -> Place {
    let p = Place::new();
    for of in ["sft", "pairs", "judged", "prompts"] {
        p.write(&format!("{of}.jsonl"), records(of, 40));
    }
    p
}

fn done(p: &Place, line: &str) -> Ran {
    let ran = p.run(line);
    assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    ran
}

fn object(p: &Place, line: &str) -> Value {
    let ran = done(p, line);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {}", ran.stdout))
}

fn refused(p: &Place, line: &str, says: &[&str]) {
    let ran = p.run(line);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{line}: {}", ran.stderr);
    assert_eq!(ran.stderr.trim().lines().count(), 1, "{line}: {}", ran.stderr);
    for say in says {
        assert!(ran.stderr.contains(say), "{line}: no {say:?} in {}", ran.stderr);
    }
}

/// Every key has a comment above it.
fn is_commented(text: &str) {
    let lines: Vec<&str> = text.lines().collect();
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.contains(" = ") && !line.starts_with('#')) {
        assert!(lines[at - 1].starts_with("# "), "{line} has no comment in\n{text}");
        assert!(lines[at - 1].len() <= 100, "{}", lines[at - 1]);
    }
}

#[test]
fn every_stage_gets_a_config_that_loads_fits_and_runs_as_it_is() {
    let p = place();
    // The adapters are named by the folders of their runs.
    for (stage, data, more, shortened) in [
        ("sft", "sft", "", "sft.num_train_epochs=1"),
        ("reward", "pairs", "--adapter out/sft", "seed=0"),
        ("dpo", "pairs", "--adapter out/sft", "seed=0"),
        ("kto", "judged", "", "seed=0"),
        ("distill", "sft", "--adapter out/sft --teacher base", "distill.max_new_tokens=8"),
        ("ppo", "prompts", "--adapter out/sft --reward-adapter out/reward", "ppo.response_length=8"),
        ("grpo", "prompts", "--adapter out/sft --reward-adapter out/reward", "grpo.max_completion_length=8"),
        ("rloo", "prompts", "--reward-adapter out/reward", "rloo.max_completion_length=8"),
    ] {
        let ran = done(
            &p,
            &format!(
                "init {stage} --base base --data {data}.jsonl --memory 200MiB --device cpu {more} --out {stage}.toml"
            ),
        );
        assert_eq!(ran.stdout, "", "{stage}");
        let next = [format!("`fourfold data {stage}.toml`"), format!("`fourfold {stage} {stage}.toml`")];
        assert!(next.iter().all(|command| ran.stderr.contains(command)), "{}", ran.stderr);
        let text = fs::read_to_string(p.path(&format!("{stage}.toml"))).unwrap();
        is_commented(&text);
        config::load(&p.path(&format!("{stage}.toml")), &[]).unwrap();
        let plan = object(&p, &format!("plan {stage}.toml --memory 200MiB --json"));
        assert_eq!((&plan["fits"], &plan["lengths"]), (&json!(true), &json!("data")), "{stage}: {plan}");
        // Two steps of few sequences, and each key as it is else.
        let two = match stage {
            "ppo" => "--set ppo.total_episodes=4 --set ppo.batch_size=2 --set ppo.eval_prompts=1".to_owned(),
            "grpo" | "rloo" => format!(
                "--set {stage}.max_steps=2 --set {stage}.num_generations=2 --set {stage}.per_device_train_batch_size=2 --set \
                 {stage}.gradient_accumulation_steps=1 --set {stage}.eval_prompts=1"
            ),
            _ => format!(
                "--set data.max_rows=6 --set data.eval_rows=2 --set {stage}.per_device_train_batch_size=2 --set \
                 {stage}.gradient_accumulation_steps=1"
            ),
        };
        let ran = object(&p, &format!("{stage} {stage}.toml {two} --set {shortened} --out out/{stage} --json"));
        assert_eq!(ran["device"], "cpu", "{stage}: {ran}");
        let steps = fs::read_to_string(p.path(&format!("out/{stage}/metrics.jsonl"))).unwrap();
        assert!(steps.lines().count() >= 2, "{stage}: {steps}");
    }
    let ppo = config::load(&p.path("ppo.toml"), &[]).unwrap();
    assert_eq!(ppo.ppo().unwrap().reward_adapter, "out/reward/adapter".into());
    let grpo = config::load(&p.path("grpo.toml"), &[]).unwrap();
    assert_eq!(grpo.grpo.unwrap().reward_adapter, "out/reward/adapter".into());
    assert!(!fs::read_to_string(p.path("ppo.toml")).unwrap().contains("\n[lora]\n"), "the adapter's shape counts");
    // Three times as many responses are bad as good.
    let kto = config::load(&p.path("kto.toml"), &[]).unwrap().kto();
    assert_eq!((kto.desirable_weight, kto.undesirable_weight), (3.0, 1.0));
}

#[test]
fn all_members_of_an_ensemble_are_the_reward() {
    let p = place();
    p.train_sft_and_reward();
    done(&p, "reward run.toml --set data.path=pairs.jsonl --set reward.ensemble=3 --out three");
    for (stage, short) in [
        (
            "ppo",
            "--set ppo.total_episodes=2 --set ppo.batch_size=2 --set ppo.response_length=8 --set ppo.eval_prompts=1",
        ),
        (
            "grpo",
            "--set grpo.max_steps=1 --set grpo.num_generations=2 --set grpo.per_device_train_batch_size=2 --set \
             grpo.gradient_accumulation_steps=1 --set grpo.max_completion_length=8 --set grpo.eval_prompts=1",
        ),
        (
            "rloo",
            "--set rloo.max_steps=1 --set rloo.num_generations=2 --set rloo.per_device_train_batch_size=2 --set \
             rloo.gradient_accumulation_steps=1 --set rloo.max_completion_length=8 --set rloo.eval_prompts=1",
        ),
    ] {
        let init = format!("init {stage} --base base --data prompts.jsonl --device cpu --reward-adapter");
        done(&p, &format!("{init} three --out {stage}.toml"));
        let text = fs::read_to_string(p.path(&format!("{stage}.toml"))).unwrap();
        is_commented(&text);
        assert!(text.contains(&format!("\n[[{stage}.reward]]\n")) && !text.contains("reward_adapter"), "{text}");
        let config = config::load(&p.path(&format!("{stage}.toml")), &[]).unwrap();
        let [source] = &config.ppo.as_ref().unwrap().reward[..] else { panic!("{stage}: one source") };
        let members = ["three/adapter", "three/adapter_1", "three/adapter_2"].map(std::path::PathBuf::from);
        assert_eq!(source.adapters, members, "{stage}");
        let ran = object(&p, &format!("{stage} {stage}.toml {short} --out out/{stage} --json"));
        assert_eq!(ran["stage"], stage);
        let line = fs::read_to_string(p.path(&format!("out/{stage}/metrics.jsonl"))).unwrap();
        assert!(line.contains("rewards/adapter/disagreement"), "{line}");
        // One member that is named is that one.
        done(&p, &format!("{init} three/adapter_1 --out one.toml --overwrite"));
        let one = config::load(&p.path("one.toml"), &[]).unwrap().ppo.unwrap();
        assert_eq!((one.reward_adapter, one.reward.len()), ("three/adapter_1".into(), 0), "{stage}");
    }
}

#[test]
fn lengths_are_those_that_data_counts_and_percentiles_those_counted_by_hand() {
    let p = place();
    let found = object(&p, "init sft --base base --data sft.jsonl --device cpu --json");
    // The lengths of all records, by the command that shows what a run trains on.
    p.write(
        "all.toml",
        "[base]\npath = 'base'\n[data]\npath = 'sft.jsonl'\neval_rows = 0\nmax_length = 100000\n[sft]\n",
    );
    let all = object(&p, "data all.toml --head 40 --json");
    let mut lengths: Vec<u64> = all["samples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|sample| sample[0].as_array().unwrap().iter().map(|piece| piece["tokens"].as_u64().unwrap()).sum())
        .collect();
    lengths.sort_unstable();
    assert_eq!(lengths.len(), 40);
    assert!(lengths[0] < lengths[39], "the records differ");
    // Of 40, half are 20, 95% are 38 and 99% are 39.6: the 20th, the 38th and the 40th.
    let by_hand = json!({"p50": lengths[19], "p95": lengths[37], "p99": lengths[39], "longest": lengths[39]});
    assert_eq!(found["data"]["tokens"], by_hand);
    assert_eq!((&found["data"]["records"], &found["data"]["sampled"]), (&json!(40), &json!(40)));
    assert_eq!(found["data"]["kinds"], json!({"prompt_completion": 40}));
    assert_eq!(found["set"]["data.max_length"], lengths[39].next_multiple_of(8));
    let text = found["config"].as_str().unwrap();
    let why = format!("# Half of the 40 records have at most {} tokens, 95% {}", lengths[19], lengths[37]);
    assert!(text.contains(&why), "{why}: {text}");
    // The proposal without --json and --out is the same text.
    assert_eq!(done(&p, "init sft --base base --data sft.jsonl --device cpu").stdout, text);
}

#[test]
fn records_that_are_far_longer_than_most_are_dropped_and_the_comment_says_how_many() {
    let p = place();
    let long = json!({"prompt": "Why? ".repeat(60), "completion": "No."});
    p.write("long.jsonl", format!("{}{long}\n", records("sft", 40)));
    let found = object(&p, "init sft --base base --data long.jsonl --device cpu --json");
    let tokens = &found["data"]["tokens"];
    assert!(tokens["longest"].as_u64().unwrap() > 2 * tokens["p95"].as_u64().unwrap(), "{tokens}");
    assert_eq!(found["set"]["data.max_length"], tokens["p95"].as_u64().unwrap().next_multiple_of(8));
    let text = found["config"].as_str().unwrap();
    assert!(text.replace("\n# ", " ").contains("the longer ones, 2.4%, are dropped and counted"), "1 of 41: {text}");
}

#[test]
fn a_run_is_made_smaller_until_it_fits_and_what_would_fit_is_named_where_nothing_does() {
    let p = place();
    p.write("many.jsonl", records("pairs", 400));
    let init = "init dpo --base base --data many.jsonl --device cpu --json";
    let set = |found: &Value, key: &str| found["set"][format!("dpo.{key}")].as_u64().unwrap();
    let (micro, accumulation) = ("per_device_train_batch_size", "gradient_accumulation_steps");
    let roomy = object(&p, &format!("{init} --memory 4GiB"));
    assert!(set(&roomy, micro) > 1, "{roomy}");
    refused(&p, &format!("{init} --memory 5MiB"), &["dpo over base does not fit", "--memory is 5MiB", "smaller base"]);
    let least = p.run(&format!("{init} --memory 5MiB")).stderr;
    let least = least.split("it still needs --memory ").nth(1).unwrap().split(',').next().unwrap();
    let tight = object(&p, &format!("{init} --memory {least} --out tight.toml"));
    assert!(set(&tight, micro) < set(&roomy, micro), "{tight}");
    let examples = |found: &Value| set(found, micro) * set(found, accumulation);
    assert!(examples(&tight) >= examples(&roomy), "a step has no fewer comparisons: {tight}");
    assert!(tight["config"].as_str().unwrap().contains(&format!("Set so that the run fits {least}.")), "{tight}");
    assert_eq!(tight["set"]["memory.limit"], least);
    let plan = object(&p, &format!("plan tight.toml --memory {least} --json"));
    assert_eq!(plan["fits"], true, "{plan}");
    done(&p, "dpo tight.toml --set dpo.num_train_epochs=1 --set data.max_rows=4 --set data.eval_rows=1 --out tight");
}

/// The embedded base with an embedding of 200,000 rows, 50 MiB in bf16, as most of its weights.
fn write_wide(p: &Place, name: &str) {
    p.write_base(name);
    let mut config: Value = serde_json::from_str(BASE.config).unwrap();
    config["vocab_size"] = 200_000.into();
    p.write(&format!("{name}/config.json"), config.to_string());
    let (length, rest) = BASE.weights.split_at(8);
    let (header, numbers) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).unwrap();
    let (mut wide, mut bytes) = (serde_json::Map::new(), vec![]);
    for (tensor, mut entry) in header.into_iter().filter(|(tensor, _)| tensor != "__metadata__") {
        let at: Vec<usize> = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
        let start = bytes.len();
        bytes.extend_from_slice(&numbers[at[0]..at[1]]);
        if tensor.contains("embed_tokens") {
            entry["shape"][0] = 200_000.into();
            bytes.resize(start + 200_000 * entry["shape"][1].as_u64().unwrap() as usize * 2, 0);
        }
        entry["data_offsets"] = json!([start, bytes.len()]);
        wide.insert(tensor, entry);
    }
    let header = Value::Object(wide).to_string();
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    p.write(&format!("{name}/model.safetensors"), [&header.len().to_le_bytes(), header.as_bytes(), &bytes].concat());
}

#[test]
fn a_dense_base_is_quantised_where_it_would_not_stay_in_memory_and_only_then() {
    let p = place();
    write_wide(&p, "wide");
    let init = |base: &str, memory: &str| {
        object(&p, &format!("init sft --base {base} --data sft.jsonl --device cpu --memory {memory} --json"))
    };
    let roomy = init("wide", "400MiB");
    assert_eq!((&roomy["set"]["base.quantize"], &roomy["plan"]["comfortable"]), (&Value::Null, &json!(true)));
    let tight = init("wide", "56MiB");
    assert_eq!((&tight["set"]["base.quantize"], &tight["plan"]["comfortable"]), (&json!("q8_0"), &json!(true)));
    assert!(
        tight["set"]["sft.per_device_train_batch_size"].as_u64().unwrap() > 1,
        "the passes need not be smaller: {tight}"
    );
    // Where it does not fit quantised either, it is read in every pass, and the file says so.
    let tighter = init("wide", "30MiB");
    assert_eq!((&tighter["set"]["base.quantize"], &tighter["plan"]["comfortable"]), (&Value::Null, &json!(false)));
    assert!(tighter["config"].as_str().unwrap().contains("is read from its file in every pass"), "{tighter}");
}

#[test]
fn a_card_is_planned_without_one_where_its_memory_is_given() {
    let p = place();
    let found = object(&p, "init sft --base base --data sft.jsonl --device cuda --memory 2GiB --json --out card.toml");
    let config = config::load(&p.path("card.toml"), &[]).unwrap();
    assert_eq!(config.base.device().to_string(), "cuda:0");
    assert_eq!(config.memory.device_limit.map(|limit| limit.0), Some(2 << 30));
    let planned = found["plan"]["devices"]["cuda:0"].as_u64().unwrap();
    assert!(planned < 2 << 30, "{found}");
    let plan = object(&p, "plan card.toml --json");
    assert_eq!((&plan["fits"], plan["devices"]["cuda:0"]["total"].as_u64()), (&json!(true), Some(planned)), "{plan}");
    let head = format!("Planned on cuda:0: {} of cuda:0 and ", text(planned as usize));
    assert!(fs::read_to_string(p.path("card.toml")).unwrap().contains(&head), "{head}");
    // The file says that the plan is of no card's own memory; one for the CPU has nothing to say.
    let says = |file: &str| fs::read_to_string(p.path(file)).unwrap().contains("No card was asked");
    done(&p, "init sft --base base --data sft.jsonl --device cpu --memory 2GiB --out cpu.toml");
    assert!(says("card.toml") && !says("cpu.toml"));
    refused(&p, "init sft --base base --data sft.jsonl --device cuda --memory 10MiB", &["does not fit", "--memory"]);
}

#[test]
fn the_sizes_that_a_plan_names_on_a_card_are_those_of_its_table() {
    let p = place();
    let config = json!({
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    });
    p.write("middle.json", config.to_string());
    let line = |more: &str| format!("plan --base middle.json --phase sft --device cuda {more}");
    let plan = |more: &str| -> Value {
        let ran = p.run(&line(&format!("--json {more}")));
        serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{more}: {e}: {}", ran.stderr))
    };
    let total = |plan: &Value| plan["devices"]["cuda:0"]["total"].as_u64().unwrap() as usize;
    let whole = plan("--set sft.checkpoint=none");
    let beside = ["context", "workspace"].map(|of| whole["devices"]["cuda:0"][of].as_u64().unwrap() as usize);
    let beside: usize = beside.iter().sum();
    let passes = total(&whole) - beside;
    assert!(passes > 64 << 20, "{whole}");
    for choice in whole["choices"].as_array().unwrap() {
        let takes = choice["device"].as_u64().unwrap() as usize;
        assert!((beside..total(&whole)).contains(&takes), "{choice}");
    }
    // Three quarters of the passes' memory.
    let limit = format!("--memory {}", beside + passes * 3 / 4);
    let proposed = plan(&format!("{limit} --set sft.checkpoint=none"));
    assert_eq!(proposed["fits"], false);
    let change = &proposed["smallest_change"];
    let set = change["set"].as_object().unwrap().iter();
    let set: String = set.map(|(key, value)| format!(" --set {key}={}", value.as_str().unwrap())).collect();
    let changed = plan(&format!("{limit} --set sft.checkpoint=none{set}"));
    assert_eq!((&changed["fits"], change["device"].as_u64()), (&json!(true), Some(total(&changed) as u64)), "{change}");
    let ran = p.run(&line(&format!("{limit} --set sft.checkpoint=none")));
    let needs = format!("it needs {} of cuda:0 and ", text(total(&whole)));
    assert!(ran.code == 2 && ran.stderr.contains(&needs), "{needs}: {}", ran.stderr);
    let first = format!("the smallest change that fits, in {} of cuda:0 and ", text(total(&changed)));
    assert!(ran.stdout.contains(&first), "{first}: {}", ran.stdout);
    let choice = &proposed["choices"][0];
    let listed = format!("\n{:>10}  ", text(choice["device"].as_u64().unwrap() as usize));
    assert!(ran.stdout.contains(&listed), "{listed}: {}", ran.stdout);
    // A limit below what the context takes.
    let none = plan("--memory 300MiB");
    assert_eq!((&none["fits"], &none["devices"]["cuda:0"]["room"]), (&json!(false), &json!(300 << 20)));
    let ran = p.run(&line("--memory 300MiB"));
    assert!(ran.code == 2 && ran.stdout.contains("room: 300 MiB; it does not fit"), "{}", ran.stdout);
}

#[test]
fn layers_for_which_a_card_has_no_room_are_planned_on_the_host() {
    let p = place();
    let config = json!({
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    });
    p.write("large.json", config.to_string());
    let plan = |more: &str| -> Value {
        let ran = p
            .run(&format!("plan --base large.json --phase ppo --device cuda --set ppo.checkpoint=block --json {more}"));
        serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{more}: {e}: {}", ran.stderr))
    };
    let total = |plan: &Value| plan["devices"]["cuda:0"]["total"].as_u64().unwrap();
    // 4 x 1024 x 1024 + 3 x 1024 x 4096 numbers of two bytes.
    let layer: u64 = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096);
    let (whole, some) = (plan(""), plan("--set base.offload=14"));
    assert_eq!(whole["offload"], json!({"layers": 0, "second_base": null, "pinned": 0}));
    assert_eq!(some["offload"], json!({"layers": 14, "second_base": null, "pinned": 14 * layer}));
    // The device has two buffers for the fourteen.
    assert_eq!(total(&whole) - total(&some), 12 * layer);
    let own = |plan: &Value| plan["peak"]["own"].as_u64().unwrap();
    let pinned = own(&some) - own(&whole);
    assert!(pinned.abs_diff(14 * layer) < 4 << 20, "{pinned}");
    // A room between two numbers of layers: the larger one is taken, and the reserve of one part in 32 stays free.
    let beside = whole["devices"]["cuda:0"]["context"].as_u64().unwrap()
        + whole["devices"]["cuda:0"]["workspace"].as_u64().unwrap();
    let room = |plan: &Value| (total(plan) - beside + layer / 2) * 32 / 31 + beside;
    let limit = format!("--memory {}", room(&some));
    let chosen = plan(&format!("{limit} --set base.offload=\"auto\""));
    assert_eq!((&chosen["offload"]["layers"], &chosen["fits"]), (&json!(14), &json!(true)));
    // Without, it is proposed: it costs time alone.
    let proposed = plan(&limit);
    let change = &proposed["smallest_change"];
    assert_eq!((&proposed["fits"], &change["set"]["base.offload"]), (&json!(false), &json!("auto")), "{change}");
    assert_eq!(change["set"]["base.quantize"], Value::Null);
    assert!(change["costs"].as_str().unwrap().contains("decoding runs at the link's speed"), "{change}");
    let ran = p.run(&format!("plan --base large.json --phase ppo --device cuda {limit} --set base.offload=\"auto\""));
    let says = "offload: 14 of 24 layers of the base are not kept by cuda:0, the fewest with which the run fits";
    assert!(ran.stdout.contains(says) && ran.stdout.contains("generate all responses at once"), "{}", ran.stdout);
}

#[test]
fn inputs_of_blocks_are_planned_on_the_host_where_checkpoint_says_so() {
    let p = place();
    let config = json!({
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    });
    p.write("long.json", config.to_string());
    let sizes = "--set ppo.batch_size=2 --set ppo.local_rollout_forward_batch_size=1 --set ppo.micro_batch_size=1 \
                 --set ppo.response_length=924 --set data.max_prompt_length=100";
    let line = |more: &str| format!("plan --base long.json --phase ppo {sizes} --device {more}");
    let plan = |more: &str| -> Value {
        let ran = p.run(&line(&format!("{more} --json")));
        serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{more}: {e}: {}", ran.stderr))
    };
    let (block, offload) = (plan("cuda --set ppo.checkpoint=block"), plan("cuda --set ppo.checkpoint=offload"));
    // 1,024 tokens of 1,024 numbers of four bytes.
    let input: u64 = 1024 * 1024 * 4;
    let update = |plan: &Value| plan["devices"]["cuda:0"]["phases"]["update"].as_u64().unwrap();
    // Two of 24 inputs have a buffer, and the update's peak moves to where other things are held.
    let saved = update(&block) - update(&offload);
    assert!((18 * input..=22 * input).contains(&saved), "{saved}");
    assert_eq!((&block["offload"]["pinned"], &offload["offload"]["pinned"]), (&json!(0), &json!(24 * input)));
    let own = |plan: &Value| plan["peak"]["own"].as_u64().unwrap();
    let pinned = own(&offload) - own(&block);
    assert!(pinned.abs_diff(24 * input) < 4 << 20, "{pinned}");
    let says = "checkpoint = offload: the blocks' inputs wait in 96 MiB of pinned host memory";
    let table = p.run(&line("cuda --set ppo.checkpoint=offload"));
    assert!(table.stdout.contains(says), "{}", table.stdout);
    // It is proposed where recomputation alone is not enough, before layers leave the card.
    let total = |plan: &Value| plan["devices"]["cuda:0"]["total"].as_u64().unwrap();
    let limit = (total(&block) - input) / (1 << 20);
    let tight = plan(&format!("cuda --set ppo.checkpoint=block --memory {limit}MiB"));
    let change = &tight["smallest_change"];
    assert_eq!((&tight["fits"], &change["set"]), (&json!(false), &json!({"ppo.checkpoint": "offload"})), "{change}");
    // On the CPU they are there anyway.
    let host = plan("cpu --set ppo.checkpoint=offload");
    assert_eq!((&host["checkpoint"], &host["offload"]["pinned"]), (&json!("block"), &json!(0)));
}

#[test]
fn a_cache_in_q8_0_is_planned_in_34_of_64_bytes_and_never_proposed() {
    let p = place();
    let config = json!({
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    });
    p.write("model.json", config.to_string());
    let sizes = "--set ppo.batch_size=8 --set ppo.local_rollout_forward_batch_size=8 --set ppo.response_length=700 \
                 --set data.max_prompt_length=100 --set data.max_length=800";
    let plan = |more: &str| -> Value {
        let ran = p.run(&format!("plan --base model.json --phase ppo --device cuda {sizes} --json {more}"));
        serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{more}: {e}: {}", ran.stderr))
    };
    let rollout = |plan: &Value| plan["devices"]["cuda:0"]["phases"]["rollout"].as_u64().unwrap();
    let (plain, small) = (plan(""), plan("--set base.kv_cache_type=\"q8_0\""));
    // Keys and values of 4 heads of 64 numbers in six layers, for 8 sequences of 800 tokens.
    let numbers: u64 = 6 * 2 * 8 * 800 * 4 * 64;
    assert_eq!(rollout(&plain) - rollout(&small), numbers * 30 / 32);
    let tight = plan("--memory 600MiB --set ppo.checkpoint=block");
    assert!(!tight.to_string().contains("kv_cache_type"), "{tight}");
    let odd = json!({ "head_dim": 80 });
    let mut config = config;
    config.as_object_mut().unwrap().extend(odd.as_object().unwrap().clone());
    p.write("odd.json", config.to_string());
    let line = "plan --base odd.json --phase ppo --device cuda --set base.kv_cache_type=\"q8_0\"";
    refused(&p, line, &["the heads of this model have 80; remove it"]);
}

#[test]
fn without_data_the_rest_is_proposed_and_the_file_says_what_is_missing() {
    let p = place();
    done(&p, "init sft --base base --device cpu --out bare.toml");
    let text = fs::read_to_string(p.path("bare.toml")).unwrap();
    assert!(text.contains("# [data]\n# path = "), "{text}");
    let config = config::load(&p.path("bare.toml"), &[]).unwrap();
    assert!(config.data.is_none() && config.sft().learning_rate == 2e-4, "{text}");
    assert_eq!(object(&p, "plan bare.toml --json")["stage"], "sft");
    refused(&p, "sft bare.toml --out o", &["[data] is missing"]);
    let two = "--set data.path=sft.jsonl --set data.max_rows=6 --set sft.num_train_epochs=1";
    done(&p, &format!("sft bare.toml {two} --set sft.per_device_train_batch_size=3 --out o"));
}

#[test]
fn what_cannot_be_used_is_one_line_that_says_what_to_do() {
    let p = place();
    p.train_sft_and_reward();
    let init = |stage: &str, more: &str| format!("init {stage} --base base --device cpu {more}");
    // The base.
    refused(&p, "init sft --base nowhere", &["--base", "nowhere"]);
    refused(&p, "init sft --base out/sft/adapter", &["out/sft/adapter is an adapter"]);
    fs::create_dir(p.path("bare")).unwrap();
    fs::copy(p.path("base/config.json"), p.path("bare/config.json")).unwrap();
    refused(&p, "init sft --base bare", &["bare has neither model.safetensors"]);
    refused(&p, &init("dpo", "--reward-base base"), &["--reward-base is for reward, ppo, grpo and rloo"]);
    // The data.
    refused(&p, &init("sft", "--data none.jsonl"), &["none.jsonl"]);
    p.write("broken.jsonl", "{\"prompt\": \"x\", \"completion\": \"y\"}\n{\"prompt\": \n");
    refused(&p, &init("sft", "--data broken.jsonl"), &["broken.jsonl, line 2"]);
    p.write("text.txt", "a text\n");
    refused(&p, &init("sft", "--data prompts.jsonl"), &["prompts.jsonl", "SFT needs a response", "fourfold init ppo"]);
    for stage in ["reward", "dpo"] {
        refused(&p, &init(stage, "--data sft.jsonl"), &["needs comparisons", "fourfold init sft or ppo"]);
    }
    refused(&p, &init("kto", "--data sft.jsonl"), &["KTO needs labelled responses"]);
    let ppo = |more: &str| init("ppo", &format!("--data prompts.jsonl {more}"));
    let text = init("ppo", "--data text.txt --reward-adapter out/reward");
    refused(&p, &text, &["PPO needs prompts", "fourfold init sft"]);
    // The adapters.
    refused(&p, &ppo(""), &["ppo needs --reward-adapter", "fourfold init reward"]);
    refused(&p, &ppo("--reward-adapter out/sft"), &["out/sft/adapter has no scalar head"]);
    refused(&p, &ppo("--reward-adapter base"), &["--reward-adapter", "base is a model, not an adapter"]);
    refused(&p, &ppo("--reward-adapter nowhere"), &["--reward-adapter nowhere"]);
    refused(&p, &init("sft", "--reward-adapter out/reward"), &["--reward-adapter is for ppo"]);
    let head = "out/reward/adapter has a score head, so it is a reward model's or a critic's, and";
    for path in ["out/reward", "out/reward/adapter"] {
        let says = [head, "ppo starts from one that writes text", "a reward model's as --reward-adapter"];
        refused(&p, &ppo(&format!("--reward-adapter out/reward --adapter {path}")), &says);
    }
    for stage in ["sft", "dpo", "kto"] {
        refused(&p, &init(stage, "--adapter out/reward"), &[head, &format!("{stage} starts from one")]);
    }
    refused(&p, &init("distill", "--teacher base --adapter out/reward"), &[head, "distill starts from one"]);
    done(&p, &init("reward", "--adapter out/reward"));
    // Folders with several adapters: a quickstart's, and one of runs.
    for (from, to) in [("sft", "sft"), ("reward", "reward"), ("sft", "actor"), ("reward", "critic")] {
        fs::create_dir_all(p.path("qs").join(to)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(p.path("out").join(from).join("adapter").join(file), p.path("qs").join(to).join(file)).unwrap();
        }
    }
    let settings = fs::read_to_string(p.path("out/sft/config.toml")).unwrap();
    p.write("qs/config.toml", settings.replacen("fourfold sft", "fourfold quickstart", 1));
    refused(&p, &ppo("--reward-adapter qs"), &["qs is the folder of a run; did you mean qs/reward?"]);
    refused(&p, &ppo("--reward-adapter out"), &["out is no adapter; did you mean out/reward/adapter?"]);
    refused(&p, &ppo("--reward-adapter out/reward --adapter out"), &["did you mean out/sft/adapter?"]);
    fs::remove_dir_all(p.path("qs/reward")).unwrap();
    let says = ["none of the adapters in it is a reward model's (qs/actor or qs/critic or qs/sft)"];
    refused(&p, &ppo("--reward-adapter qs"), &says);
    for name in ["qs/actor", "qs/sft"] {
        fs::remove_dir_all(p.path(name)).unwrap();
    }
    let says = ["the adapters in it have score heads (qs/critic)"];
    refused(&p, &ppo("--reward-adapter out/reward --adapter qs"), &says);
    let apples = p.run(&init("sft", "--memory 8apples"));
    assert!(apples.code == 2 && apples.stderr.contains("\"8apples\" is in none of B, KiB"), "{}", apples.stderr);
    // The file.
    p.write("there.toml", "mine");
    refused(&p, &init("sft", "--out there.toml"), &["there.toml is there already", "--overwrite"]);
    assert_eq!(fs::read_to_string(p.path("there.toml")).unwrap(), "mine");
    done(&p, &init("sft", "--out there.toml --overwrite"));
    assert!(fs::read_to_string(p.path("there.toml")).unwrap().starts_with("# sft over base"));
    refused(
        &p,
        &init("sft", "--out no/such/folder.toml"),
        &["--out no/such/folder.toml: there is no folder no/such; make it first"],
    );
}
