//! memory: predicted beside measured memory of sft, reward and ppo over a real base, three shapes each, every phase; the
//! binary's own `bench memory`, a process a case. One JSON line each.
//!
//! FOURFOLD_BENCH_BASE=model-dir-or-gguf cargo bench --bench memory -- [sft] [reward] [ppo] [--set base.quantize=q8_0]
//!
//! Texts are made up of 32 words. Shapes: as below, with `checkpoint` none, mlp and block.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const CONFIG: &str = "
[data]
path = 'sft.jsonl'
eval_rows = 8
max_length = 256
[sft]
per_device_train_batch_size = 4
[reward]
per_device_train_batch_size = 2
[ppo]
reward_adapter = 'reward/adapter'
batch_size = 8
total_episodes = 16
micro_batch_size = 4
response_length = 64
eval_prompts = 4
";

/// Of each stage, beside `checkpoint`.
const SHAPES: [(&str, &str, [&[&str]; 3]); 3] = [
    ("sft", "sft.jsonl", [&[], &["sft.per_device_train_batch_size=2", "lora.r=16"], &["data.max_length=128"]]),
    ("reward", "pairs.jsonl", [&[], &["reward.per_device_train_batch_size=1"], &["lora.r=16"]]),
    ("ppo", "prompts.jsonl", [&[], &["ppo.micro_batch_size=2", "ppo.response_length=32"], &["ppo.num_mini_batches=2"]]),
];

fn write_data(dir: &Path) -> Result<()> {
    let words: Vec<&str> = "the hotel near the old harbour was clean and quiet but the food at breakfast was cold and \
                            rather salty so we went to a small bakery on the corner where nobody spoke"
        .split(' ')
        .collect();
    let text =
        |from: usize, n: usize| (0..n).map(|i| words[(from * 5 + i) % words.len()]).collect::<Vec<_>>().join(" ");
    let lines = |of: &dyn Fn(usize) -> Value| (0..64).map(|i| format!("{}\n", of(i))).collect::<String>();
    let answer = |from: usize, n: usize| format!(" {}", text(from, n));
    let sft = |i: usize| json!({"prompt": text(i, 60), "completion": answer(i + 3, 60 + i % 40)});
    std::fs::write(dir.join("sft.jsonl"), lines(&sft))?;
    let pair = |i: usize| {
        let (chosen, rejected) = (answer(i + 3, 60 + i % 40), answer(i + 7, 50 + i % 40));
        json!({"prompt": text(i, 60), "chosen": chosen, "rejected": rejected})
    };
    std::fs::write(dir.join("pairs.jsonl"), lines(&pair))?;
    std::fs::write(dir.join("prompts.jsonl"), lines(&|i| json!({"prompt": text(i, 60)})))?;
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let Some(base) = std::env::var_os("FOURFOLD_BENCH_BASE") else {
        println!(
            "{}",
            json!({"bench": "memory", "skipped": "set FOURFOLD_BENCH_BASE to a model directory or a .gguf file"})
        );
        return Ok(());
    };
    let base = std::fs::canonicalize(base).context("FOURFOLD_BENCH_BASE")?;
    let given: Vec<&String> = arguments
        .iter()
        .zip(arguments.iter().skip(1))
        .filter(|(flag, _)| *flag == "--set")
        .map(|(_, set)| set)
        .collect();
    let named = |stage: &str| arguments.iter().any(|a| a == stage);
    let all = !SHAPES.iter().any(|(stage, ..)| named(stage));
    let dir = tempfile::tempdir()?;
    write_data(dir.path())?;
    std::fs::write(dir.path().join("run.toml"), format!("[base]\npath = {:?}\n{CONFIG}", base.display()))?;
    let run = |words: &str, sets: &[&str]| -> Result<String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.args(words.split(' ')).current_dir(dir.path()).stderr(Stdio::inherit());
        for set in sets.iter().copied().chain(given.iter().map(|set| set.as_str())) {
            command.args(["--set", set]);
        }
        let out = command.output()?;
        ensure!(out.status.success(), "fourfold {words} {sets:?}: {}", out.status);
        Ok(String::from_utf8(out.stdout)?)
    };
    for (stage, data, shapes) in SHAPES.iter().filter(|(stage, ..)| all || named(stage)) {
        if *stage == "ppo" {
            run("reward run.toml --out reward", &["data.path=pairs.jsonl", "data.max_rows=10"])?;
        }
        for (shape, checkpoint) in shapes.iter().zip(["none", "mlp", "block"]) {
            let checkpoint = format!("{stage}.checkpoint={checkpoint}");
            let path = format!("data.path={data}");
            let sets: Vec<&str> = [&path[..], &checkpoint].into_iter().chain(shape.iter().copied()).collect();
            let mut found: Value =
                serde_json::from_str(&run(&format!("bench memory run.toml --phase {stage} --json"), &sets)?)?;
            let sets: Vec<&str> = sets[1..].iter().copied().chain(given.iter().map(|set| set.as_str())).collect();
            found["set"] = json!(sets);
            found["base"] = json!(base.file_name().map(|name| name.to_string_lossy()));
            println!("{found}");
        }
    }
    Ok(())
}
