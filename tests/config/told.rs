//! What is told of settings that train nothing, stand in the wrong place or ask for what is not there: masked responses,
//! `[lora]` beside an adapter, one source of the reward twice, held-out prompts that there are none of, a
//! section of another stage, inputs that the run would replace, a warm-up longer than the run, a run that died before
//! its first checkpoint.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use fourfold::config;
use fourfold::config::Stage;
use serde_json::{Value, json};

use crate::support::{Place, Ran};

const GRPO: &str = "seed = 3\n[base]\npath = 'base'\n[lora]\nr = 2\n[data]\npath = 'asked.jsonl'\neval_rows = 2\n[grpo]\n\
                    learning_rate = 1e-3\nnum_generations = 4\nper_device_train_batch_size = 4\nmax_steps = 4\n\
                    max_completion_length = 12\nlr_scheduler_type = 'constant'\nTHE_KEYS\n[[grpo.reward]]\nkind = 'length'\n\
                    max_tokens = 9\n";

const PAIRS: &str = "--set data.path=pairs.jsonl";

pub fn place() -> Place {
    let p = Place::new();
    let prompt = |i: usize| json!({"prompt": format!("\n\nHuman: How was the soup, number {i}?\n\nAssistant:")});
    p.write("asked.jsonl", (0..14).map(|i| format!("{}\n", prompt(i))).collect::<String>());
    p.write("same.jsonl", format!("{}\n", prompt(0)).repeat(14));
    p.write("grpo.toml", with(""));
    p
}

fn with(keys: &str) -> String {
    GRPO.replace("THE_KEYS", keys)
}

pub fn done(p: &Place, line: &str) -> Ran {
    let ran = p.run(line);
    assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    ran
}

pub fn refused(p: &Place, line: &str, says: &[&str]) {
    let ran = p.run(line);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{line}: {}", ran.stderr);
    says.iter().for_each(|say| assert!(ran.stderr.contains(say), "{line}: no {say:?} in {}", ran.stderr));
}

fn metrics(p: &Place, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(p.path(&format!("{name}/metrics.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn refusal(text: &str) -> String {
    config::from_text(text, "test").unwrap_err().to_string()
}

#[test]
fn a_step_of_which_every_response_is_masked_is_warned_of_with_its_share() {
    let p = place();
    // No response ends with its first token.
    p.write("short.toml", with("mask_truncated_completions = true").replace("= 12", "= 1"));
    let ran = done(&p, "grpo short.toml --set grpo.max_steps=2 --out short");
    let warned = "grpo: warning at iteration 1: every response of an optimizer step was truncated";
    assert!(ran.stderr.contains(warned) && ran.stderr.contains("raise max_completion_length"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("response_length") && !ran.stderr.contains("missing_eos"), "{}", ran.stderr);
    for line in metrics(&p, "short") {
        assert_eq!((&line["policy/masked"], &line["policy/masked_steps"]), (&json!(1.0), &json!(1.0)), "{line}");
        assert!(line["warnings"].as_array().unwrap().contains(&json!("masked_steps")), "{line}");
        assert!(line["grad_norm/actor"].is_null());
    }
    let told: Value = serde_json::from_str(&done(&p, "watch short --json").stdout).unwrap();
    assert!(told["warnings"].to_string().contains("raise max_completion_length"), "{told}");
    p.write("long.toml", with("mask_truncated_completions = true"));
    done(&p, "grpo long.toml --out long");
    done(&p, "grpo grpo.toml --out none");
    for (line, plain) in metrics(&p, "long").iter().zip(metrics(&p, "none")) {
        let ended = line["val/num_eos_tokens"].as_f64().unwrap();
        assert_eq!(line["policy/masked"].as_f64(), Some(1.0 - ended / 4.0), "{line}");
        assert_eq!(line["policy/masked_steps"].as_f64(), Some(if ended == 0.0 { 1.0 } else { 0.0 }));
        assert!(plain.get("policy/masked").is_none());
    }
}

#[test]
fn keys_of_lora_beside_an_adapter_of_another_shape_are_named_by_every_stage() {
    let p = place();
    p.train_sft_and_reward();
    let run = |line: &str| {
        let stage = line.split(' ').next().unwrap();
        done(&p, &format!("{line} --out new/{stage} --overwrite")).stderr
    };
    let label = |i: usize| json!({"prompt": format!("q{i}"), "completion": " a", "label": i.is_multiple_of(2)});
    p.write("labels.jsonl", (0..6).map(|i| format!("{}\n", label(i))).collect::<String>());
    let of = "out/sft/adapter";
    for (line, is_said) in [
        (format!("sft run.toml --set sft.adapter={of} --set lora.r=4"), true),
        (format!("reward run.toml {PAIRS} --set lora.r=4"), true),
        (format!("dpo run.toml {PAIRS} --set dpo.adapter={of} --set lora.r=4"), true),
        (format!("kto run.toml --set data.path=labels.jsonl --set kto.adapter={of} --set lora.r=4"), true),
        (
            format!(
                "distill run.toml --set distill.adapter={of} --set distill.teacher_adapter={of} --set distill.max_new_tokens=4 \
                 --set lora.r=4"
            ),
            true,
        ),
        ("ppo run.toml --set data.path=prompts.jsonl --set lora.r=4".to_owned(), true),
        (format!("grpo grpo.toml --set grpo.adapter={of} --set lora.r=4"), true),
        // The file's own r is the adapter's, and without an adapter the key counts.
        (format!("sft run.toml --set sft.adapter={of}"), false),
        ("sft run.toml --set lora.r=4".to_owned(), false),
    ] {
        let stderr = run(&line);
        let stage = line.split(' ').next().unwrap();
        let says =
            format!("{stage}: warning: [lora] r has no effect: {of} goes on in its own shape (r = 2, scale 8, on ");
        assert_eq!(stderr.contains(&says), is_said, "{line}: {stderr}");
        assert_eq!(stderr.contains("has no effect"), is_said, "{line}: {stderr}");
    }
    let more = "--set lora.lora_alpha=4 --set lora.target_modules=q_proj --set lora.use_dora=true";
    let stderr = run(&format!("sft run.toml --set sft.adapter={of} {more}"));
    assert!(stderr.contains("[lora] lora_alpha, target_modules and use_dora have no effect"), "{stderr}");
}

#[test]
fn sources_of_the_reward_that_count_twice_or_not_at_all_are_told() {
    let config = |more: &str| config::from_text(&format!("{}{more}", with("")), "test").unwrap();
    let said = |more: &str| config(more).idle_keys(Stage::Grpo);
    assert!(said("").is_empty());
    let twice = said("[[grpo.reward]]\nname = 'again'\nkind = 'length'\nmax_tokens = 9\nweight = 0.5\n");
    assert!(twice.len() == 1 && twice[0].contains("\"again\" is the same source as \"length\""), "{twice:?}");
    assert!(said("[[grpo.reward]]\nname = 'other'\nkind = 'length'\nmax_tokens = 8\n").is_empty());
    let both = "[[grpo.reward]]\nadapters = ['a', 'a', 'b']\n";
    let adapters = said(both);
    assert!(adapters.len() == 1 && adapters[0].contains("has a twice among its adapters"), "{adapters:?}");
    for (keys, says) in [
        ("adapters = ['a']\nstd_coef = 2.0", "std_coef has no effect on a single adapter"),
        ("adapters = ['a']\naggregate = 'min'", "aggregate has no effect on a single adapter"),
        ("adapters = ['a', 'b']\naggregate = 'min'\nstd_coef = 2.0", "std_coef has no effect without aggregate"),
    ] {
        let found = said(&format!("[[grpo.reward]]\n{keys}\n"));
        assert!(found.len() == 1 && found[0].contains(says), "{keys}: {found:?}");
    }
    let shared =
        said("[[grpo.reward]]\nname = 'one'\nadapters = ['a', 'b']\n[[grpo.reward]]\nname = 'two'\nadapters = ['b']\n");
    assert!(
        shared.len() == 1 && shared[0].contains("\"two\" has b, which \"one\" has too: it counts in both"),
        "{shared:?}"
    );
    let main = config::from_text(&format!("{}{both}", with("reward_adapter = 'b'")), "test").unwrap();
    assert!(main.idle_keys(Stage::Grpo)[0].contains("has b, which is reward_adapter too"));
    let gold = "[grpo.gold]\nkind = 'json_valid'\n";
    assert!(said(gold)[0].starts_with("[grpo.gold] has no effect without eval_prompts"), "{:?}", said(gold));
    let evaluated = config::from_text(&format!("{}{gold}", with("eval_prompts = 2")), "test").unwrap();
    assert!(evaluated.idle_keys(Stage::Grpo).is_empty());
    let weightless = with("").replace("max_tokens = 9", "max_tokens = 9\nweight = 0.0");
    assert!(refusal(&weightless).contains("[[grpo.reward]] weight = 0 for every source"), "{}", refusal(&weightless));
    config::from_text(&format!("{weightless}[[grpo.reward]]\nkind = 'json_valid'\n"), "test").unwrap();
    let named =
        format!("{}[[grpo.reward]]\nkind = 'json_valid'\nname = 'reward_adapter'\n", with("reward_adapter = 'r'"));
    assert!(refusal(&named).contains("give another name"), "{}", refusal(&named));
}

#[test]
fn a_column_that_a_source_of_the_reward_reads_is_not_told_as_unread() {
    let p = place();
    let record =
        |i: usize| json!({"prompt": format!("\n\nHuman: {i} + 1?\n\nAssistant:"), "answer": i + 1, "source": "web"});
    p.write("sums.jsonl", (0..14).map(|i| format!("{}\n", record(i))).collect::<String>());
    let unread = |name: &str| (format!("with a column {name:?} that is not read"), json!(14));
    let rule = "[[grpo.reward]]\nkind = 'length'\nmax_tokens = 9\n";
    let program = "[[grpo.reward]]\nkind = 'command'\ncommand = ['sh', '-c', 'while read -r line; do echo 1; done']\n";
    for (sources, data, left) in [
        (rule.to_owned(), "", vec!["answer", "source"]),
        ("[[grpo.reward]]\nkind = 'math'\n".into(), "", vec!["source"]),
        ("[[grpo.reward]]\nkind = 'math'\ncolumn = 'source'\n".into(), "", vec!["answer"]),
        // Under the name that the column has in the file, whatever it is called here.
        ("[[grpo.reward]]\nkind = 'math'\n".into(), "columns.text = 'answer'\n", vec!["source"]),
        (rule.to_owned(), "columns.text = 'answer'\n", vec!["text", "source"]),
        (program.into(), "", vec![]),
        ("[[grpo.reward]]\nkind = 'http'\nurl = 'http://127.0.0.1:9/'\n".into(), "", vec![]),
        ("[[grpo.reward]]\nkind = 'judge'\nurl = 'http://127.0.0.1:9/v1'\nmodel = 'm'\n".into(), "", vec![]),
        // The gold reward reads columns, too.
        (format!("{rule}[grpo.gold]\nkind = 'math'\n"), "", vec!["source"]),
    ] {
        let text = with("eval_prompts = 2")
            .replace(rule, &sources)
            .replace("'asked.jsonl'\n", &format!("'sums.jsonl'\n{data}"));
        assert!(text.contains(&sources), "{text}");
        p.write("sums.toml", text);
        let told: Value = serde_json::from_str(&done(&p, "data sums.toml --json").stdout).unwrap();
        let want: serde_json::Map<String, Value> = left.iter().map(|name| unread(name)).collect();
        assert_eq!(told["remarks"], Value::from(want), "{sources}{data}");
        if sources == program {
            let ran = done(&p, "grpo sums.toml --out sums --set grpo.max_steps=1");
            assert!(!ran.stderr.contains("that is not read"), "{}", ran.stderr);
        }
    }
    // No other stage has a reward.
    let pair = |i: usize| json!({"prompt": format!("{i} + 1?"), "completion": format!("{}", i + 1), "answer": i + 1});
    p.write("pairs_of_sums.jsonl", (0..14).map(|i| format!("{}\n", pair(i))).collect::<String>());
    let sft = "data sums.toml --phase sft --set data.path=pairs_of_sums.jsonl --json";
    let told: Value = serde_json::from_str(&done(&p, sft).stdout).unwrap();
    assert_eq!(told["remarks"][unread("answer").0], 14, "{told}");
}

#[test]
fn held_out_prompts_that_there_are_none_of_are_told_and_init_asks_for_none() {
    let p = place();
    let ran = done(&p, "grpo grpo.toml --set data.path=same.jsonl --set grpo.eval_prompts=2 --out o");
    assert!(
        ran.stderr.contains("[data] eval_rows = 2 of 14 sequences of 1 prompt: none can be held out"),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.contains("grpo: warning: [grpo] eval_prompts = 2 has no prompts to evaluate on"),
        "{}",
        ran.stderr
    );
    let ran = done(&p, "grpo grpo.toml --set grpo.eval_prompts=2 --out o2");
    assert!(!ran.stderr.contains("held out") && !ran.stderr.contains("eval_prompts"), "{}", ran.stderr);
    let ran = done(&p, "grpo grpo.toml --set grpo.eval_prompts=3 --out o3");
    let says = "grpo: [grpo] eval_prompts = 3, and [data] holds 2 prompts out: these are evaluated";
    assert!(ran.stderr.contains(says), "{}", ran.stderr);
    p.train_sft_and_reward();
    let found = |data: &str| -> Value {
        let line = format!("init grpo --base base --device cpu --reward-adapter out/reward --data {data} --json");
        serde_json::from_str(&done(&p, &line).stdout).unwrap()
    };
    let same = found("same.jsonl");
    assert_eq!((&same["set"]["data.eval_rows"], &same["set"]["grpo.eval_prompts"]), (&json!(0), &json!(0)), "{same}");
    assert_eq!(found("asked.jsonl")["set"]["data.eval_rows"], 1);
    // Two prompts, seven records each: one of them can be held out whole.
    let two: String = (0..14).map(|i| format!("{}\n", json!({"prompt": format!("q{}", i % 2)}))).collect();
    p.write("two.jsonl", two);
    let two = found("two.jsonl");
    assert_eq!(two["set"]["data.eval_rows"], 7, "{two}");
    p.write("two.toml", two["config"].as_str().unwrap());
    let shown: Value = serde_json::from_str(&done(&p, "data two.toml --json").stdout).unwrap();
    assert_eq!((&shown["train"], &shown["held_out"]), (&json!(7), &json!(7)), "{shown}");
}

#[test]
fn sections_and_keys_that_a_stage_does_not_read_are_told() {
    let at = |text: &str, stage: Stage| config::from_text(text, "test").unwrap().idle_keys(stage);
    let (base, teacher) = ("[base]\npath = 'b'\n[data]\npath = 'd'\n", "[teacher]\npath = 't'\n");
    let distilled = |keys: &str| at(&format!("{base}{teacher}[distill]\n{keys}\n"), Stage::Distill);
    assert!(distilled("").is_empty() && distilled("seq_kd = true").is_empty() && distilled("lmbda = 1.0").is_empty());
    let both = distilled("seq_kd = true\nlmbda = 1.0");
    assert!(both.len() == 1 && both[0].starts_with("[distill] seq_kd has no effect with lmbda = 1"), "{both:?}");
    // Evaluations sample, too.
    assert!(distilled("lmbda = 0.0\nmax_new_tokens = 8").is_empty());
    let text = format!("{base}eval_rows = 0\n{teacher}[distill]\nlmbda = 0.0\nmax_new_tokens = 8\n");
    let unsampled = at(&text, Stage::Distill);
    assert!(unsampled.len() == 1 && unsampled[0].contains("max_new_tokens has no effect"), "{unsampled:?}");
    assert!(distilled("lmbda = 0.0\nmax_new_tokens = 8\nseq_kd = true").is_empty());
    let itself = at(&format!("{base}[distill]\nadapter = 'a'\nteacher_adapter = 'a'\n"), Stage::Distill);
    assert!(itself.len() == 1 && itself[0].contains("nothing to learn"), "{itself:?}");
    let grpo = format!("{}{teacher}", with(""));
    let told = at(&grpo, Stage::Grpo);
    assert!(told.len() == 1 && told[0].starts_with("[teacher] has no effect on grpo"), "{told:?}");
    assert!(at(&format!("{grpo}[distill]\n"), Stage::Grpo).is_empty(), "the other stage of the file reads it");
    let scorer = format!("{base}[reward_base]\npath = 'r'\n");
    let told = at(&format!("{scorer}[sft]\n"), Stage::Sft);
    assert!(told.len() == 1 && told[0].starts_with("[reward_base] has no effect on sft"), "{told:?}");
    assert!(at(&format!("{scorer}[sft]\n[reward]\n"), Stage::Sft).is_empty());
    // A reward of rules alone has no model; one of an adapter has, and so have the gold reward and a critic of its own.
    let scorer = "[reward_base]\npath = 'r'\n";
    for (keys, is_idle) in [
        ("", true),
        ("reward_adapter = 'a'", false),
        ("gold = { adapters = ['a'] }\neval_prompts = 1", false),
        ("gold = { kind = 'json_valid' }\neval_prompts = 1", true),
    ] {
        let told = at(&format!("{}{scorer}", with(keys)), Stage::Grpo);
        assert_eq!(
            told.iter().any(|line| line.starts_with("[reward_base] has no effect on grpo")),
            is_idle,
            "{told:?}"
        );
    }
    assert!(at(&format!("{}{scorer}[reward]\n", with("")), Stage::Grpo).is_empty(), "the reward stage reads it");
    let ppo = |keys: &str| {
        let rule = "[[ppo.reward]]\nkind = 'json_valid'\n";
        at(&format!("{base}{scorer}[ppo]\n{keys}\n{rule}"), Stage::Ppo)
    };
    assert!(ppo("critic = 'own'").is_empty() && ppo("advantage_estimator = 'a2c'\ncritic = 'own'").is_empty());
    for keys in ["critic = 'actor'", "advantage_estimator = 'reinforce'"] {
        assert!(ppo(keys).iter().any(|line| line.starts_with("[reward_base] has no effect on ppo")), "{keys}");
    }
    let cached = |text: &str| text.replacen("[base]\n", "[base]\nkv_cache_type = 'q8_0'\n", 1);
    let told = at(&cached(&format!("{base}[sft]\n")), Stage::Sft);
    assert!(told.len() == 1 && told[0].starts_with("[base] kv_cache_type has no effect on sft"), "{told:?}");
    assert!(at(&cached(&with("")), Stage::Grpo).is_empty(), "rollouts are generated");
    let servers = "[grpo.rollout]\nengine = 'vllm'\nurls = ['http://127.0.0.1:9/v1']\n";
    let told = at(&cached(&format!("{}{servers}", with(""))), Stage::Grpo);
    assert!(told.len() == 1 && told[0].contains("for evaluations alone"), "{told:?}");
}

#[test]
fn a_checkpoint_that_a_stage_does_not_read_is_not_opened_and_told_by_every_command_that_reads_the_file() {
    let p = place();
    let says = "warning: [reward_base] has no effect on grpo";
    // There is no such model: opening it would be an error.
    p.write("rules.toml", with("") + "[reward_base]\npath = 'nowhere'\nquantize = 'q8_0'\n");
    // An idle key is a warning, which --quiet keeps.
    for line in ["--quiet grpo rules.toml --out o", "--quiet plan rules.toml", "--quiet data rules.toml"] {
        let ran = done(&p, line);
        assert_eq!(ran.stderr.matches(says).count(), 1, "{line}: {}", ran.stderr);
        assert!(!ran.stdout.contains("reward_base"), "{line}: {}", ran.stdout);
    }
    let plan: Value = serde_json::from_str(&done(&p, "plan rules.toml --json").stdout).unwrap();
    assert!(!plan["choices"].to_string().contains("reward_base"), "{plan}");
    let data: Value = serde_json::from_str(&done(&p, "data rules.toml --json").stdout).unwrap();
    assert!(data["warnings"].to_string().contains("[reward_base] has no effect on grpo"), "{data}");
    let resolved = fs::read_to_string(p.path("o/config.toml")).unwrap();
    assert!(!resolved.contains("[reward_base]"), "what a run writes is what it ran: {resolved}");
    // A teacher whose cache the CPU does not have, in a file that sft is run from.
    let teacher = "[teacher]\npath = 'nowhere'\nkv_cache_type = 'q8_0'\n";
    p.write("taught.toml", fs::read_to_string(p.path("run.toml")).unwrap() + teacher + "[distill]\n");
    done(&p, "sft taught.toml --out sft");
    done(&p, "plan taught.toml --phase sft");
    // Where it is read, its section is named.
    p.write_base("other");
    for line in ["distill taught.toml --device cpu --out d", "plan taught.toml --phase distill"] {
        let line = format!("{line} --set teacher.path=other");
        refused(&p, &line, &["[teacher]: kv_cache_type = \"q8_0\" is for cards"]);
    }
    let line = "grpo grpo.toml --out o2 --set base.device=cpu --set base.kv_cache_type=q8_0";
    refused(&p, line, &["[base]: kv_cache_type = \"q8_0\" is for cards"]);
    // Layers that the CPU keeps anyway.
    for (key, value) in [("offload", "2"), ("dequantise", "ahead")] {
        for (i, line) in ["plan grpo.toml", "--quiet grpo grpo.toml --device cpu"].iter().enumerate() {
            let out = if i == 1 { format!("--out o_{key}") } else { String::new() };
            let line = format!("{line} --set base.{key}={value} {out}");
            assert!(done(&p, &line).stderr.contains(&format!("{key} has no effect")), "{line}");
        }
        let line = format!("plan grpo.toml --set base.{key}={value} --device cuda --memory 4GiB");
        assert!(!done(&p, &line).stderr.contains("no effect"), "{line}");
    }
}

#[test]
fn a_key_of_another_kind_of_source_is_refused_whatever_its_value() {
    let ppo = "[base]\npath = 'b'\n[data]\npath = 'd'\n[ppo]\nadvantage_estimator = 'reinforce'\n".to_owned();
    for (section, head) in [("grpo", with("")), ("ppo", ppo)] {
        for (kind, key, value) in [
            ("length", "timeout_seconds", "60.0"),
            ("length", "retries", "3"),
            ("length", "adapters", "[]"),
            ("length", "aggregate", "'mean_minus_std'"),
            ("json_valid", "std_coef", "1.0"),
            ("json_valid", "url", "''"),
            ("json_valid", "request", "{}"),
            ("regex", "api", "'fourfold'"),
            ("math", "min_tokens", "1"),
        ] {
            let more = if kind == "regex" { "pattern = 'a'\n" } else { "" };
            let source = format!("kind = '{kind}'\nname = 'x'\n{more}{key} = {value}\n");
            let said = refusal(&format!("{head}[[{section}.reward]]\n{source}"));
            let says =
                format!("test: [[{section}.reward]] of kind = \"{kind}\" does not read {key}, which is for kind = ");
            assert!(said.starts_with(&says), "{said}");
            let said = refusal(&format!("{head}[{section}.gold]\n{source}"));
            assert!(said.starts_with(&says.replace("[[", "[").replace(".reward]]", ".gold]")), "{said}");
        }
    }
    // What a run writes of its settings has the keys of each kind, and is read again to the same.
    let more = "[[grpo.reward]]\nkind = 'regex'\npattern = 'a'\n[[grpo.reward]]\nname = 'two'\nadapters = ['a', 'b']\n\
                [grpo.gold]\nkind = 'math'\n";
    let config = config::from_text(&(with("eval_prompts = 1") + more), "test").unwrap();
    let written = config.to_toml().unwrap();
    assert_eq!(config::from_text(&written, "written").unwrap(), config, "{written}");
    let count = |key: &str| written.lines().filter(|line| line.starts_with(&format!("{key} = "))).count();
    assert_eq!(
        ["min_tokens", "max_tokens", "std_coef", "adapters", "retries", "url"].map(count),
        [1, 1, 1, 1, 0, 0],
        "{written}"
    );
}

#[test]
fn a_run_never_replaces_the_adapter_or_the_data_that_it_begins_with() {
    let p = place();
    p.train_sft_and_reward();
    let bytes = |name: &str| fs::read(p.path(name)).unwrap();
    let (kept, scores) =
        (bytes("out/sft/adapter/adapter_model.safetensors"), bytes("out/reward/adapter/adapter_model.safetensors"));
    let of = "out/sft/adapter";
    for (line, key) in [
        (format!("sft run.toml --set sft.adapter={of} --out out/sft"), "[sft] adapter"),
        (
            format!("reward run.toml {PAIRS} --set reward.adapter=out/reward/adapter --out out/reward"),
            "[reward] adapter",
        ),
    ] {
        let says = [&format!("{key} = \"out/"), "which this run would replace; name another folder with --out"];
        refused(&p, &format!("{line} --overwrite"), &says);
    }
    // Samples of a former run, trained on by the next one in its folder.
    done(&p, &format!("grpo grpo.toml --set grpo.adapter={of} --out own"));
    let samples = bytes("own/samples.jsonl");
    refused(
        &p,
        "grpo grpo.toml --set data.path=own/samples.jsonl --out own --overwrite",
        &["[data] path = \"own/samples.jsonl\""],
    );
    refused(
        &p,
        "grpo grpo.toml --set grpo.adapter=own/actor --out own --overwrite",
        &["[grpo] adapter = \"own/actor\""],
    );
    // The same by a pattern, by the folder itself, and by links in folders elsewhere, as caches lay them out.
    for folder in ["data", "cache"] {
        fs::create_dir(p.path(folder)).unwrap();
    }
    std::os::unix::fs::symlink("../own/samples.jsonl", p.path("data/asked.jsonl")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::os::unix::fs::symlink(format!("../own/actor/{file}"), p.path(&format!("cache/{file}"))).unwrap();
    }
    for set in ["data.path=own/sam*.jsonl", "data.path=own", "data.path=data", "grpo.adapter=cache"] {
        refused(&p, &format!("grpo grpo.toml --set {set} --out own --overwrite"), &["which this run would replace"]);
    }
    assert_eq!(bytes("out/sft/adapter/adapter_model.safetensors"), kept);
    assert_eq!(bytes("out/reward/adapter/adapter_model.safetensors"), scores);
    assert_eq!(bytes("own/samples.jsonl"), samples);
    // What another stage of the same file reads is no input of this one.
    done(
        &p,
        &format!(
            "sft run.toml --set ppo.adapter={of} --set ppo.reward_adapter=out/reward/adapter --out out/sft --overwrite"
        ),
    );
}

#[test]
fn a_key_in_the_wrong_place_is_pointed_to_the_right_one() {
    let file = |lines: &str| format!("[base]\npath = 'b'\n[data]\npath = 'd'\n{lines}\n");
    let below = refusal(&with("").replace("max_tokens = 9", "max_tokens = 9\nmax_steps = 3"));
    assert!(below.contains("[[grpo.reward]] has no key \"max_steps\", which is one of [grpo]"), "{below}");
    assert!(below.contains("write max_steps above"), "{below}");
    let unknown = refusal(&with("").replace("max_tokens = 9", "max_tokenz = 9"));
    assert!(unknown.contains("[[grpo.reward]] has no key \"max_tokenz\"; did you mean \"max_tokens\"?"), "{unknown}");
    let reward = refusal(&file("[[reward]]\nkind = 'length'"));
    assert!(reward.contains("reward must be a section of keys, not a list"), "{reward}");
    assert!(reward.contains("[[ppo.reward]], [[grpo.reward]] or [[rloo.reward]]"), "{reward}");
    assert!(refusal(&file("[[sft]]\nadapter = 'a'")).contains("write [sft], with one pair of brackets"));
    for (lines, says) in [
        ("[rloo]\ntop_entropy_quantile = 0.2", "[rloo] has no key \"top_entropy_quantile\"; [ppo], [grpo] have it"),
        ("[lora]\nlora_dropout = 0.1", "adapters have no dropout here"),
        ("[rloo]\nrloo_k = 4", "it is [rloo] num_generations here"),
        ("[rloo]\ntoken_level_kl = true", "as one sum"),
        (
            "[grpo]\nnum_generations = 0",
            "[grpo] num_generations = 0 leaves nothing to compare a response with; use 2 or more",
        ),
        (
            "[grpo]\nnum_generations = 1",
            "[grpo] num_generations = 1 leaves nothing to compare a response with; use 2 or more",
        ),
        (
            "[grpo]\nreport_to = 'none'",
            "report_to stands at the top of the file, before any section (--set report_to=…)",
        ),
    ] {
        let found = refusal(&file(lines));
        assert!(found.contains(says), "{lines}: {found}");
    }
    let p = place();
    let exact = with("").replace("'length'\nmax_tokens = 9", "'exact'");
    p.write("exact.toml", exact);
    refused(&p, "grpo exact.toml --out o", &["[[grpo.reward]] of kind = \"exact\" compares with the answer"]);
    let key =
        with("").replace("'length'\nmax_tokens = 9", "'http'\nurl = 'http://127.0.0.1:9/'\napi_key_env = 'NO_SUCH'");
    p.write("key.toml", key);
    refused(&p, "grpo key.toml --out o", &["[[grpo.reward]] api_key_env = \"NO_SUCH\""]);
}

#[test]
fn a_stage_without_its_section_says_that_its_keys_have_their_defaults() {
    let p = place();
    let line = "sft grpo.toml --set data.path=sft.jsonl --set memory.limit=64KiB --out o";
    let ran = p.run(line);
    let says = "sft: warning: the file has no [sft], so all of its keys have their defaults; it has [grpo], for `fourfold grpo`";
    assert!(ran.stderr.contains(says), "{}", ran.stderr);
    let of = |text: &str, stage: Stage| config::from_text(text, "test").unwrap().without_section(stage);
    assert_eq!(of("[base]\npath = 'b'\n", Stage::Sft), None, "a file of no stage is for any");
    assert_eq!(of(&with(""), Stage::Grpo), None);
    // These two do not run so.
    refused(&p, "rloo grpo.toml --out o", &["the section [rloo] is missing"]);
    assert_eq!(of(&with(""), Stage::Rloo), None);
    refused(&p, "distill grpo.toml --set data.path=sft.jsonl --out o", &["[distill] has no teacher: add [teacher]"]);
    let told = done(&p, "plan grpo.toml --phase distill --set data.path=sft.jsonl").stderr;
    assert!(told.contains("`fourfold distill` will refuse to start: [distill] has no teacher"), "{told}");
    let many = of("[base]\npath = 'b'\n[sft]\n[dpo]\n", Stage::Kto).unwrap();
    assert!(many.ends_with("it has [sft] and [dpo], for `fourfold sft` and `fourfold dpo`"), "{many}");
}

#[test]
fn a_warm_up_that_outlasts_the_run_is_warned_of() {
    let p = place();
    let of = |line: &str| {
        let stage = line.split(' ').next().unwrap();
        done(&p, &format!("{line} --out out/{stage} --overwrite")).stderr
    };
    let says = "the learning rate never reaches 0.001; lower warmup_steps";
    let grpo = of("grpo grpo.toml --set grpo.warmup_steps=9");
    assert!(
        grpo.contains(&format!("grpo: warning: warmup_steps = 9 and the run has 4 optimizer steps: {says}")),
        "{grpo}"
    );
    let sft = of("sft run.toml --set sft.warmup_steps=99");
    assert!(sft.contains("warning: warmup_steps = 99 and the run has ") && sft.contains(says), "{sft}");
    assert!(!of("grpo grpo.toml --set grpo.warmup_steps=3").contains("warmup_steps"));
}

#[test]
fn what_is_offered_for_a_run_that_died_before_its_first_checkpoint_works() {
    let p = place();
    done(&p, "grpo grpo.toml --out o");
    // As a killed process leaves it: no summary, no checkpoint, and the page's file says that it runs.
    fs::remove_file(p.path("o/summary.json")).unwrap();
    ["checkpoints", "actor"].iter().for_each(|name| drop(fs::remove_dir_all(p.path(&format!("o/{name}")))));
    let about = fs::read_to_string(p.path("o/about.json")).unwrap();
    let mut about: Value = serde_json::from_str(&about).unwrap();
    (about["state"], about["process"]) = (json!("running"), json!(u32::MAX));
    p.write("o/about.json", about.to_string());
    let told: Value = serde_json::from_str(&done(&p, "watch o --json").stdout).unwrap();
    assert_eq!(told["state"], "killed");
    let offered = told["resume"].as_str().unwrap();
    assert!(offered.ends_with("grpo grpo.toml --out o --resume --from-start"), "{offered}");
    done(&p, offered.split_once(' ').unwrap().1);
}

#[cfg(unix)]
#[test]
fn a_reader_of_stdout_that_is_gone_ends_a_command_quietly() {
    let p = place();
    for line in
        ["keys", "keys --json", "man", "init sft --base base --data sft.jsonl --device cpu", "inspect base --json"]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.args(line.split(' ')).arg("--quiet").current_dir(p.path(""));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait().unwrap();
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((ended.code(), stderr.as_str()), (Some(141), ""), "{line}");
    }
}

#[test]
fn an_output_that_does_not_come_about_leaves_no_folder() {
    let p = place();
    p.train_sft_and_reward();
    let merge = "merge --base base --adapter out/reward/adapter";
    // An f16 classifier cannot be made of a name that is a folder's; and a language model has no value head.
    refused(&p, &format!("{merge} --dtype q8_0 --out nope/deep/m"), &["--dtype q8_0"]);
    assert!(!p.path("nope").exists());
    let head = "merge --base base --adapter out/sft/adapter --format classifier --out nope/deep/m";
    assert_ne!(p.run(head).code, 0);
    assert!(!p.path("nope").exists(), "folders that were made for it are gone again");
    done(&p, "merge --base base --adapter out/sft/adapter --out made/deep/m");
    for line in [
        "init sft --base base --data sft.jsonl --device cpu --out nope/a.toml",
        "score --base base --adapter out/reward/adapter --data pairs.jsonl --out nope/a.jsonl",
        "report out/sft --out nope/a.html",
    ] {
        refused(&p, line, &["--out nope/a.", "there is no folder nope; make it first"]);
    }
    assert!(p.path("made/deep/m/config.json").exists());
}

#[test]
fn an_actor_that_cannot_move_is_warned_of_with_what_usually_causes_it() {
    let p = place();
    let warned = |name: &str, set: &str| -> (String, Vec<Value>) {
        let ran = done(&p, &format!("grpo grpo.toml --out {name} {set}"));
        let lines = metrics(&p, name);
        (ran.stderr, lines.into_iter().map(|line| line["warnings"].clone()).collect())
    };
    let has = |of: &Value, name: &str| of.as_array().is_some_and(|all| all.contains(&json!(name)));
    let (stderr, usual) = warned("usual", "");
    assert!(!usual.iter().any(|of| has(of, "zero_b") || has(of, "zero_gradient")), "{stderr}");
    // A step of so little is 0 in the adapter's numbers.
    let (stderr, tiny) = warned("tiny", "--set grpo.learning_rate=1e-60");
    assert_eq!(tiny.iter().map(|of| has(of, "zero_b")).collect::<Vec<_>>(), [false, false, true, true], "{stderr}");
    assert!(stderr.contains("every LoRA B is still 0") && stderr.contains("learning_rate"), "{stderr}");
    // Ratios of 1 lie beyond the bound, so that no token counts.
    let mask = "--set grpo.importance_sampling_correction=token_mask --set grpo.importance_sampling_clip_max=0.5";
    let (stderr, masked) = warned("masked", mask);
    assert!(masked.iter().any(|of| has(of, "zero_gradient")), "{stderr}");
    assert!(stderr.contains("the actor's gradient is exactly 0") && stderr.contains("its bounds"), "{stderr}");
}
