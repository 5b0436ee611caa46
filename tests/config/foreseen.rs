//! What `plan` and `data` say of a run before it: that it will refuse its records, its lengths, its critic or its adapters, in its
//! own words, and what a server takes beside it.

use std::fs;

use serde_json::Value;

use crate::told::{done, place, refused};

#[test]
fn records_without_responses_are_refused_in_the_same_words_by_distill_and_by_what_shows_it() {
    let p = place();
    let text = "[base]\npath = 'base'\n[data]\npath = 'prompts.jsonl'\n[teacher]\npath = 'base'\n[distill]\n";
    p.write("distill.toml", text);
    for line in ["distill distill.toml --out d", "data distill.toml", "plan distill.toml"] {
        refused(&p, line, &["[distill] lmbda = 0.5 takes some responses from the records (with lmbda = 1 or seq_kd"]);
        done(&p, &format!("{line} --set distill.lmbda=1.0 --set distill.max_new_tokens=4"));
    }
}

#[test]
fn a_plan_says_what_the_run_refuses_and_what_a_server_takes_beside_it() {
    let p = place();
    p.train_sft_and_reward();
    let ppo = "plan run.toml --phase ppo --set data.path=prompts.jsonl";
    assert!(!done(&p, ppo).stderr.contains("will refuse"));
    let told = done(&p, &format!("{ppo} --set ppo.response_length=5000")).stderr;
    assert!(
        told.contains("plan: warning: a prompt of ") && told.contains("`fourfold ppo` will refuse to start"),
        "{told}"
    );
    let planned = |server: &str| {
        let text = fs::read_to_string(p.path("run.toml")).unwrap();
        p.write("served.toml", format!("{text}[ppo.rollout]\n{server}\n"));
        let line = "plan served.toml --phase ppo --set data.path=prompts.jsonl";
        let object: Value = serde_json::from_str(&done(&p, &format!("{line} --json")).stdout).unwrap();
        (done(&p, line).stdout, object["rollout_server"].clone())
    };
    let (text, object) = planned("engine = 'llama.cpp'\nserver = ['llama-server', '-m', 'm.gguf']");
    assert!(
        text.contains("llama.cpp's server loads the base once more beside the run: its GGUF file and a KV"),
        "{text}"
    );
    assert_eq!((&object["model_bytes"], object["note"].is_string()), (&Value::Null, true));
    p.write("m.gguf", vec![0; 3 << 20]);
    let (text, object) = planned("engine = 'llama.cpp'\nserver = ['llama-server', '-m', 'm.gguf']");
    assert!(text.contains("m.gguf of 3.0 MiB and a KV cache, which are not counted here"), "{text}");
    assert_eq!(object["model_bytes"], 3 << 20);
    let (text, object) = planned("engine = 'vllm'\nurls = ['http://127.0.0.1:9/v1']");
    assert!(!text.contains("once more") && object.is_null(), "{text}");
}

#[test]
fn adapters_that_the_run_refuses_are_foreseen_in_its_words_and_those_that_are_not_there_yet_are_planned() {
    let p = place();
    p.train_sft_and_reward();
    p.write("rules.toml", "[base]\npath = 'base'\n[data]\npath = 'prompts.jsonl'\neval_rows = 2\n[grpo]\n");
    p.write("distill.toml", "[base]\npath = 'base'\n[data]\npath = 'sft.jsonl'\n[teacher]\npath = 'base'\n[distill]\n");
    fs::create_dir(p.path("other")).unwrap();
    p.write("other/notes", "x");
    fs::create_dir(p.path("soon")).unwrap();
    let (sft, reward) = ("out/sft/adapter", "out/reward/adapter");
    let prompts = "--set data.path=prompts.jsonl";
    for (stage, file, key, path, said) in [
        ("ppo", "run.toml", "ppo.reward_adapter", "out/reward", "out/reward is the folder of a run; did you mean"),
        ("grpo", "rules.toml", "grpo.reward_adapter", "out/reward", "out/reward is the folder of a run; did you mean"),
        ("rloo", "rules.toml", "rloo.reward_adapter", "out/reward", "out/reward is the folder of a run; did you mean"),
        ("ppo", "run.toml", "ppo.reward_adapter", "out", "out is no adapter; did you mean out/reward/adapter?"),
        ("ppo", "run.toml", "ppo.adapter", "out", "out is no adapter; did you mean out/sft/adapter?"),
        ("ppo", "run.toml", "ppo.adapter", "out/reward", "the adapters in it have score heads (out/reward/adapter)"),
        ("ppo", "run.toml", "ppo.reward_adapter", "out/sft", "none of the adapters in it is a reward model's"),
        ("ppo", "run.toml", "ppo.reward_adapter", "other", "a PEFT adapter is a directory with adapter_config.json"),
        ("ppo", "run.toml", "ppo.reward_adapter", "base", "base is a model, not an adapter"),
        ("ppo", "run.toml", "ppo.reward_adapter", sft, "this adapter has no scalar head"),
        ("ppo", "run.toml", "ppo.adapter", reward, "this adapter has a score head"),
        ("sft", "run.toml", "sft.adapter", reward, "this adapter has a score head"),
        ("dpo", "run.toml", "dpo.adapter", "out/sft", "out/sft is the folder of a run; did you mean"),
        ("distill", "distill.toml", "distill.teacher_adapter", reward, "this adapter has a score head"),
    ] {
        let data = match stage {
            "dpo" => "--set data.path=pairs.jsonl",
            "sft" | "distill" => "",
            _ => prompts,
        };
        let line = format!("{file} {data} --set {key}={path}");
        let line = if stage == "rloo" { line.replace("rules.toml", "rloo.toml") } else { line };
        p.write("rloo.toml", fs::read_to_string(p.path("rules.toml")).unwrap().replace("[grpo]", "[rloo]"));
        let ran = p.run(&format!("{stage} {line} --out refused"));
        assert!(ran.code == 2 && ran.stderr.contains(said), "{line}: {}", ran.stderr);
        let words = ran.stderr.lines().find_map(|line| line.strip_prefix("error: ")).unwrap().to_owned();
        for command in ["plan", "data"] {
            let told = done(&p, &format!("{command} {line} --phase {stage}")).stderr;
            assert!(told.contains(&format!("`fourfold {stage}` will refuse to start: ")), "{command} {line}: {told}");
            // A message with the path twice is the run's own.
            let is_same = told.contains(&words) || said.starts_with("this adapter has no") && told.contains(said);
            assert!(is_same, "{command} {line}: {told}\n{words}");
        }
    }
    for path in ["out/later/adapter", "soon"] {
        let line = format!("plan run.toml --phase ppo {prompts} --set ppo.reward_adapter={path}");
        let told = done(&p, &line).stderr;
        let says =
            format!("plan: [ppo] reward_adapter = \"{path}\" is not there yet: it is planned in the shape of [lora]");
        assert!(told.contains(&says) && !told.contains("warning"), "{told}");
        assert!(!done(&p, &format!("{line} --quiet")).stderr.contains("not there yet"));
        assert!(!done(&p, &line.replacen("plan", "data", 1)).stderr.contains("refuse"));
    }
    assert!(!done(&p, "plan --base base --phase ppo").stderr.contains("not there"));
    assert!(!done(&p, &format!("plan run.toml --phase ppo {prompts}")).stderr.contains("not there"));
}

#[test]
fn a_prompt_that_leaves_distillation_no_room_for_a_response_is_foreseen() {
    let p = place();
    let text =
        "[base]\npath = 'base'\n[data]\npath = 'sft.jsonl'\neval_rows = 2\n[teacher]\npath = 'base'\n[distill]\n";
    p.write("distill.toml", text);
    for (records, more) in [("sft.jsonl", ""), ("prompts.jsonl", "--set distill.lmbda=1.0")] {
        let line = format!("distill.toml --set data.path={records} {more}");
        let long = format!("{line} --set distill.max_new_tokens=5000");
        refused(
            &p,
            &format!("distill {long} --out d"),
            &["max_new_tokens = 5000 are longer than the context of [base]"],
        );
        for command in ["plan", "data"] {
            let told = done(&p, &format!("{command} {long}")).stderr;
            let says =
                "[distill] max_new_tokens = 5000 do not fit the context of 256, so `fourfold distill` will refuse";
            assert!(told.contains(says), "{command} {long}: {told}");
            let told = done(&p, &format!("{command} {line} --set distill.max_new_tokens=8")).stderr;
            assert!(!told.contains("will refuse"), "{told}");
        }
    }
    // The teacher takes fewer tokens than the policy.
    p.write_base("short");
    let config = fs::read_to_string(p.path("short/config.json")).unwrap();
    let short = config.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 24");
    assert_ne!(short, config);
    p.write("short/config.json", short);
    let line = "distill.toml --set teacher.path=short --set distill.max_new_tokens=1";
    refused(&p, &format!("distill {line} --out d"), &["[teacher]", "is longer than the model's context of 24"]);
    for command in ["plan", "data"] {
        let told = done(&p, &format!("{command} {line}")).stderr;
        assert!(told.contains("is longer than the model's context of 24, so `fourfold distill` will refuse"), "{told}");
    }
}

#[test]
fn how_many_prompts_there_are_is_said_where_too_few_rows_can_be_held_out() {
    let p = place();
    p.write("distill.toml", "[base]\npath = 'base'\n[data]\npath = 'same.jsonl'\neval_rows = 3\n[teacher]\npath = 'base'\n[distill]\nlmbda = 1.0\n");
    let told = done(&p, "data distill.toml").stderr;
    assert!(told.contains("eval_rows = 3 of 14 sequences of 1 prompt: none can be held out"), "{told}");
}
