//! A small pipeline of all stages in a folder, started as processes that can be signalled, and the bytes it must end with.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fourfold::report::clocks;
use serde_json::json;

use crate::support::{Place, Ran};

/// The stages in their order, with what each leaves besides metrics.jsonl and samples.jsonl.
pub const STAGES: [(&str, &[&str]); 5] = [
    ("sft", &["adapter"]),
    ("reward", &["adapter"]),
    ("dpo", &["adapter"]),
    ("kto", &["adapter"]),
    ("ppo", &["actor", "critic", "actor_ema"]),
];

/// Every piece of state that PPO can have is in use.
const CONFIG: &str = r#"
seed = 3
[base]
path = "base"
[lora]
r = 2
[checkpoint]
save_steps = 1
[data]
path = "sft.jsonl"
eval_rows = 2
max_length = 96
[sft]
per_device_train_batch_size = 2
gradient_accumulation_steps = 2
num_train_epochs = 2
learning_rate = 1e-3
[reward]
adapter = "out/sft/adapter"
per_device_train_batch_size = 2
num_train_epochs = 2
learning_rate = 1e-3
[dpo]
adapter = "out/sft/adapter"
per_device_train_batch_size = 2
num_train_epochs = 2
learning_rate = 1e-3
[kto]
adapter = "out/sft/adapter"
per_device_train_batch_size = 4
num_train_epochs = 2
learning_rate = 1e-3
[ppo]
adapter = "out/sft/adapter"
reward_adapter = "out/reward/adapter"
learning_rate = 1e-3
total_episodes = 12
batch_size = 4
num_mini_batches = 2
num_ppo_epochs = 2
micro_batch_size = 1
response_length = 12
eval_prompts = 2
save_samples = 4
eval_every = 2
adap_kl_ctrl = true
use_score_scaling = true
use_score_norm = true
ema_decay = 0.9
ref_model_sync_iterations = 2
"#;

/// A folder with a base, records and the config.
pub fn place() -> Place {
    let place = Place::new();
    let prompt = |i: usize| format!("\n\nHuman: How is number {i}?\n\nAssistant:");
    let lines = |of: &dyn Fn(usize) -> serde_json::Value| (0..12).map(|i| format!("{}\n", of(i))).collect::<String>();
    let answer = |i: usize| [" It is good.", " It is bad and salty.", " Yes."][i % 3];
    place.write("sft.jsonl", lines(&|i| json!({"prompt": prompt(i), "completion": answer(i)})));
    let pair = |i: usize| json!({"prompt": prompt(i), "chosen": answer(i), "rejected": answer(i + 1)});
    place.write("pairs.jsonl", lines(&pair));
    let judged = |i: usize| json!({"prompt": prompt(i), "completion": answer(i), "label": i.is_multiple_of(2)});
    place.write("judged.jsonl", lines(&judged));
    place.write("prompts.jsonl", lines(&|i| json!({"prompt": prompt(i)})));
    place.write("run.toml", CONFIG);
    place
}

/// The command line of a stage.
pub fn line(stage: &str) -> String {
    let data = match stage {
        "sft" => "sft.jsonl",
        "kto" => "judged.jsonl",
        "ppo" => "prompts.jsonl",
        _ => "pairs.jsonl",
    };
    format!("{stage} run.toml --set data.path={data} --out out/{stage}")
}

/// Runs stages one after the other without a fault.
pub fn run_all(place: &Place, stages: &[&str]) {
    for stage in stages {
        let ran = place.run(&line(stage));
        assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
    }
}

/// Starts a command with everything piped.
pub fn start(place: &Place, line: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_fourfold"))
        .args(line.split_whitespace())
        .current_dir(place.path(""))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Sends a signal.
pub fn signal(child: &Child, signal: i32) {
    // SAFETY: sends a signal to a child that was not waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// What a process left, waited for.
pub fn finish(child: Child) -> Ran {
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}");
    Ran { code: output.status.code().unwrap_or(-1), stdout: String::from_utf8(output.stdout).unwrap(), stderr }
}

/// Waits until a file has so many lines.
pub fn wait_for_lines(path: &Path, lines: usize) {
    let begun = Instant::now();
    while fs::read_to_string(path).unwrap_or_default().lines().count() < lines {
        assert!(begun.elapsed() < Duration::from_secs(120), "{} never came so far", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Starts a stage in a folder of its own, has it go on for `lines` metrics, sends a signal and waits for its end. On a machine that
/// is busy the run may have ended before the signal came; it is begun again then.
pub fn interrupted(place: &Place, stage: &str, lines: usize, number: i32) -> Ran {
    for _ in 0..20 {
        let child = start(place, &line(stage));
        wait_for_lines(&place.path(&format!("out/{stage}/metrics.jsonl")), lines);
        signal(&child, number);
        let ran = finish(child);
        if ran.code != 0 {
            return ran;
        }
        fs::remove_dir_all(place.path(&format!("out/{stage}"))).unwrap();
    }
    panic!("{stage} always ended before the signal came");
}

/// Everything that must come out equal: each file's name and bytes, without the clock columns of metrics.jsonl.
pub fn results(place: &Place, stage: &str) -> Vec<(String, Vec<u8>)> {
    let out = format!("out/{stage}");
    let adapters = STAGES.iter().find(|(name, _)| *name == stage).unwrap().1.iter();
    let files = adapters.flat_map(|a| ["adapter_config.json", "adapter_model.safetensors"].map(|f| format!("{a}/{f}")));
    let files = files.chain(["metrics.jsonl".into(), "samples.jsonl".into()]);
    let bytes = |f: &String| fs::read(place.path(&format!("{out}/{f}"))).unwrap_or_default();
    let comparable = |f: String| match f.as_str() {
        "metrics.jsonl" => (f.clone(), clocks::without(&String::from_utf8(bytes(&f)).unwrap()).into_bytes()),
        _ => (f.clone(), bytes(&f)),
    };
    files.map(comparable).collect()
}

/// Compares the results of one stage in two folders.
pub fn assert_same(expected: &Place, got: &Place, stage: &str, what: &str) {
    for ((name, a), (_, b)) in results(expected, stage).into_iter().zip(results(got, stage)) {
        assert!(!a.is_empty() || name == "samples.jsonl", "{stage}: there is no {name} to compare with");
        assert!(a == b, "{what}: {stage}/{name} differs: {} and {} bytes", a.len(), b.len());
    }
}

/// Copies a folder with everything in it.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}
