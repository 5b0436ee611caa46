//! A folder with the embedded base as a Hugging Face directory, small JSONL files and a config, and the real binary run
//! inside it. It asserts no claim.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use fourfold::quickstart::base::BASE;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What one run of the binary left.
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// What it printed for machines.
    pub stdout: String,
    /// What it printed for people.
    pub stderr: String,
}

/// A temporary folder in which commands run: `base/`, `sft.jsonl`, `pairs.jsonl`, `prompts.jsonl`, `run.toml`.
pub struct Place {
    dir: TempDir,
}

const QUESTIONS: [&str; 6] = ["How is the hotel?", "And the food?", "Is it far?", "Where to?", "What now?", "Why?"];
const ANSWERS: [&str; 6] = [" It is good.", " It is bad and salty.", " Yes.", " To the market.", " Sleep.", " No."];

const CONFIG: &str = r#"
[base]
path = "base"
[lora]
r = 2
[data]
path = "sft.jsonl"
eval_rows = 2
max_length = 96
[sft]
per_device_train_batch_size = 2
learning_rate = 1e-3
[reward]
adapter = "out/sft/adapter"
per_device_train_batch_size = 2
learning_rate = 1e-3
[ppo]
adapter = "out/sft/adapter"
reward_adapter = "out/reward/adapter"
learning_rate = 1e-3
total_episodes = 8
batch_size = 4
micro_batch_size = 2
response_length = 12
eval_prompts = 2
"#;

impl Place {
    pub fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        place.write_base("base");
        let prompt = |i: usize| format!("\n\nHuman: {}\n\nAssistant:", QUESTIONS[i]);
        let lines = |of: &dyn Fn(usize) -> Value| (0..6).map(|i| format!("{}\n", of(i))).collect::<String>();
        place.write("sft.jsonl", lines(&|i| json!({"prompt": prompt(i), "completion": ANSWERS[i]})));
        let pair = |i: usize| json!({"prompt": prompt(i), "chosen": ANSWERS[i], "rejected": ANSWERS[(i + 1) % 6]});
        place.write("pairs.jsonl", lines(&pair));
        place.write("prompts.jsonl", lines(&|i| json!({"prompt": prompt(i)})));
        place.write("run.toml", CONFIG);
        place
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// The embedded base as the five files of a model directory.
    pub fn write_base(&self, name: &str) {
        fs::create_dir_all(self.path(name)).unwrap();
        for (file, content) in [
            ("config.json", BASE.config.as_bytes()),
            ("generation_config.json", BASE.generation_config.as_bytes()),
            ("tokenizer.json", BASE.tokenizer.as_bytes()),
            ("tokenizer_config.json", BASE.tokenizer_config.as_bytes()),
            ("model.safetensors", BASE.weights),
        ] {
            self.write(&format!("{name}/{file}"), content);
        }
    }

    /// Runs `fourfold` with the words of `line`, and `stdin` piped in.
    pub fn run_with(&self, args: &[&str], stdin: &str) -> Ran {
        self.run_bytes(args, stdin.as_bytes())
    }

    /// The same with a `stdin` that need not be text.
    pub fn run_bytes(&self, args: &[&str], stdin: &[u8]) -> Ran {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fourfold"))
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that fails at once may have closed the pipe already.
        child.stdin.take().unwrap().write_all(stdin).ok();
        let output = child.wait_with_output().unwrap();
        let ran = Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
        ran
    }

    /// Runs `fourfold` with the words of `line`; a word may not hold a space.
    pub fn run(&self, line: &str) -> Ran {
        self.run_with(&line.split_whitespace().collect::<Vec<_>>(), "")
    }

    /// Trains out/sft and out/reward.
    #[allow(dead_code, reason = "each test file compiles this module for itself")]
    pub fn train_sft_and_reward(&self) {
        for line in ["sft run.toml --out out/sft", "reward run.toml --set data.path=pairs.jsonl --out out/reward"] {
            let ran = self.run(line);
            assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
        }
    }
}
