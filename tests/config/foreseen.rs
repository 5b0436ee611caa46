//! What `plan` and `data` say of a run before it: that it will refuse its records, its lengths or its critic, in its own words, and
//! what a server takes beside it.

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
