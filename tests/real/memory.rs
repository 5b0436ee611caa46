//! The planner beside the meter on a real base, whose matrices are mapped from its GGUF; the
//! quickstart's base, which is small, is in tests/memory.rs. The base is SmolLM2-135M-Instruct. `cargo bench --bench memory`
//! has more shapes.

use crate::real_files::smollm2;
use crate::support::Place;
use serde_json::Value;

#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn every_phase_of_a_real_base_is_predicted_within_5_percent() {
    let path = smollm2();
    let p = Place::new();
    let base = format!("base.path={path:?}");
    let run = |words: &str| {
        let args: Vec<&str> = words.split_whitespace().chain(["--set", &base]).collect();
        let ran = p.run_with(&args, "");
        assert_eq!(ran.code, 0, "{words}: {}", ran.stderr);
        ran.stdout
    };
    p.write("real.toml", CONFIG);
    run("reward real.toml --set data.path=pairs.jsonl --set data.max_rows=4 --out out/reward");
    for words in [
        "--phase sft --set sft.checkpoint=mlp",
        "--phase reward --set data.path=pairs.jsonl --set reward.checkpoint=none",
        "--phase ppo --set data.path=prompts.jsonl --set ppo.checkpoint=mlp",
    ] {
        let found: Value = serde_json::from_str(&run(&format!("bench memory real.toml --json {words}"))).unwrap();
        for (phase, of) in found["phases"].as_object().unwrap() {
            let ratio = of["ratio"].as_f64().unwrap();
            assert!((ratio - 1.0).abs() <= 0.05, "{words}, {phase}: {of}");
        }
    }
}

const CONFIG: &str = r#"
[base]
path = "base"
[data]
path = "sft.jsonl"
eval_rows = 2
max_length = 96
[sft]
per_device_train_batch_size = 2
[reward]
per_device_train_batch_size = 1
[ppo]
reward_adapter = "out/reward/adapter"
batch_size = 2
total_episodes = 4
micro_batch_size = 2
response_length = 8
eval_prompts = 1
"#;
