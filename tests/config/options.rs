//! Every key of the stages' sections has an effect, tested one key at a time.
//!
//! A run of the stage without the key and a run with it, from a config as a user writes it, must differ in what they
//! leave behind, or must not where the key says so. A key of the schema without a row here fails the tests. Whether the
//! difference is right is tested beside the formulas.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use fourfold::config;
use fourfold::config::{Stage, known_keys};
use fourfold::report::clocks;
use fourfold::run;
use fourfold::run::RunOptions;
use serde_json::{Value, json};
use toml::Table;

use crate::{llama_cpp, vllm};

mod rows;

use rows::*;

/// What a run leaves: files and their bytes.
type Left = BTreeMap<PathBuf, Vec<u8>>;

/// Records, texts and adapters that every run starts from.
struct World {
    dir: tempfile::TempDir,
    server: String,
    vllm: String,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let record = |i: usize| {
        json!({
            "prompt": format!("How was the soup at place {i}?"),
            "chosen": "The soup was lovely and warm.",
            "rejected": format!("The soup number {i} was awful."),
        })
    };
    let lines: Vec<String> = (0..20).map(|i| record(i).to_string()).collect();
    fs::write(dir.path().join("data.jsonl"), lines.join("\n")).unwrap();
    fs::create_dir(dir.path().join("copy")).unwrap();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quickstart/assets/base")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join("copy").join(path.file_name().unwrap())).unwrap();
    }
    fs::write(dir.path().join("text.txt"), "The soup at the Blue Door was lovely and warm. ".repeat(20)).unwrap();
    fs::write(dir.path().join("other.txt"), "Nobody names a place where the coffee was cold. ".repeat(20)).unwrap();
    let world = World { dir, server: server(), vllm: vllm::server(|_, _, _| vllm::Deed::Answer).0 };
    for (out, section, keys) in [
        ("sft", "sft", "learning_rate = 5e-3"),
        ("taught", "sft", "learning_rate = 1e-2"),
        ("reward", "reward", "learning_rate = 5e-3"),
        ("other", "reward", "learning_rate = 5e-3\nadapter = 'WORLD/sft/adapter'"),
    ] {
        let table = world.table(&format!("[{section}]\nper_device_train_batch_size = 4\n{keys}"));
        world.run(stage_of(section), &table, &world.dir.path().join(out)).unwrap();
    }
    fs::rename(world.dir.path().join("other/adapter"), world.dir.path().join("reward/adapter_of_sft")).unwrap();
    world
});

/// Answers every request at /N with N as the score of each response, and every question at /N/chat/completions with a score
/// that is N and more for the model, the temperature, the key and a question that begins with x.
fn server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut first, mut length, mut has_key) = (String::new(), 0, false);
            reader.read_line(&mut first).unwrap();
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
                has_key |= line.to_ascii_lowercase().starts_with("authorization: bearer ");
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let asked: Value = serde_json::from_slice(&body).unwrap();
            let score: f64 = first.split([' ', '/']).nth(2).unwrap().parse().unwrap();
            let body = match asked["messages"][0]["content"].as_str() {
                None if asked["responses"].is_array() => {
                    json!({ "scores": vec![score; asked["responses"].as_array().unwrap().len()] })
                }
                // A reward model behind vLLM: one number for a pair, two for a sequence, others for text and with a key.
                None => {
                    let score = score + f64::from(u8::from(has_key)) / 4.0;
                    let entry = |of: &Value| match asked["text_1"].is_array() {
                        true => json!({ "score": score }),
                        false => json!({ "data": [score + if of.is_string() { 2.0 } else { 1.0 }, score + 3.0] }),
                    };
                    let asked = asked["text_1"].as_array().or(asked["input"].as_array()).unwrap();
                    json!({ "data": asked.iter().map(entry).collect::<Vec<_>>() })
                }
                Some(question) => {
                    let model = asked["model"].as_str().unwrap().len() as f64 / 8.0;
                    let more =
                        f64::from(u8::from(has_key)) / 4.0 + f64::from(u8::from(question.starts_with('x'))) / 2.0;
                    let text = format!("Score: {}", score + model + more + asked["temperature"].as_f64().unwrap());
                    let usage = json!({ "prompt_tokens": 9, "completion_tokens": 2 });
                    json!({ "choices": [{ "message": { "content": text } }], "usage": usage })
                }
            };
            let body = body.to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        }
    });
    address
}

fn stage_of(section: &str) -> Stage {
    match section {
        "sft" | "lora" | "base" => Stage::Sft,
        "reward" => Stage::Reward,
        "dpo" => Stage::Dpo,
        "kto" => Stage::Kto,
        "distill" => Stage::Distill,
        "grpo" => Stage::Grpo,
        "rloo" => Stage::Rloo,
        _ => Stage::Ppo,
    }
}

impl World {
    fn table(&self, text: &str) -> Table {
        let dir = self.dir.path().display().to_string();
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quickstart/assets/base");
        let head = format!(
            "seed = 3\n[base]\npath = '{}'\n[lora]\nr = 2\n[data]\npath = '{dir}/data.jsonl'\neval_rows = 4\nmax_prompt_length = 64\n",
            base.display()
        );
        let llama_cpp = |words: &[&str]| format!("{:?}", llama_cpp::command(self.dir.path(), words));
        let text = format!("{head}{text}")
            .replace("LLAMA_SERVER", &llama_cpp(&[]))
            .replace("LLAMA_OTHER", &llama_cpp(&["--alias", "actor"]))
            .replace("WORLD", &dir)
            .replace("SERVER", &self.server)
            .replace("VLLM", &self.vllm);
        text.parse().unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    /// What the stage leaves in `out`: every file's bytes, without those that hold paths and times.
    fn run(&self, stage: Stage, table: &Table, out: &Path) -> anyhow::Result<Left> {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), table.to_string())?;
        let config = config::load(file.path(), &[])?;
        let mut summary = run::stage(stage, &config, out, &RunOptions::default())?;
        for untold in ["wall_s", "peak_rss_mib", "memory", "output_dir", "adapter", "actor", "critic", "actor_ema"] {
            summary.as_object_mut().unwrap().remove(untold);
        }
        let mut found = BTreeMap::from([("summary".into(), summary.to_string().into_bytes())]);
        let mut folders = vec![out.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                let kept = ["adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"];
                if path.is_dir() {
                    folders.push(path);
                } else if kept.iter().any(|name| path.ends_with(name)) {
                    let bytes = if path.ends_with("metrics.jsonl") {
                        clocks::without(&fs::read_to_string(&path)?).into_bytes()
                    } else {
                        fs::read(&path)?
                    };
                    found.insert(path.strip_prefix(out)?.into(), bytes);
                }
            }
        }
        Ok(found)
    }

    /// As [`World::run`] in a folder of its own, once for each config.
    fn result(&self, stage: Stage, table: &Table) -> Left {
        static KNOWN: LazyLock<Mutex<HashMap<String, Left>>> = LazyLock::new(Mutex::default);
        let key = format!("{} {table}", stage.name());
        if let Some(known) = KNOWN.lock().unwrap().get(&key) {
            return known.clone();
        }
        let dir = tempfile::tempdir().unwrap();
        let found = self.run(stage, table, &dir.path().join("out"));
        let found = found.unwrap_or_else(|error| panic!("{error:#}\n{table}"));
        KNOWN.lock().unwrap().insert(key, found.clone());
        found
    }
}

/// The stage's section before a row's own settings: a run of some steps, off the first ratio.
fn before(section: &str) -> &'static str {
    match section {
        "ppo.rollout" => {
            "learning_rate = 5e-3\ntotal_episodes = 16\nbatch_size = 8\nnum_mini_batches = 2\nnum_ppo_epochs = 2\n\
             response_length = 12\nreward_adapter = 'WORLD/reward/adapter'\nimportance_sampling_correction = 'token_truncate'"
        }
        "ppo" | "ppo.ptx" | "ppo.reward" => {
            "learning_rate = 5e-3\ntotal_episodes = 16\nbatch_size = 8\nnum_mini_batches = 2\nnum_ppo_epochs = 2\n\
             response_length = 12\nreward_adapter = 'WORLD/reward/adapter'"
        }
        "grpo" | "rloo" => {
            "learning_rate = 5e-3\nper_device_train_batch_size = 4\ngradient_accumulation_steps = 2\nnum_generations = 2\n\
             num_iterations = 2\nnum_train_epochs = 1\nmax_completion_length = 12\nreward_adapter = 'WORLD/reward/adapter'"
        }
        "distill" => {
            "learning_rate = 5e-3\nper_device_train_batch_size = 4\nmax_new_tokens = 5\n\
             teacher_adapter = 'WORLD/sft/adapter'"
        }
        _ => "learning_rate = 5e-3\nper_device_train_batch_size = 4",
    }
}

/// Tries every row, and looks whether the schema has a key without one.
fn check(section: &str, rows: &[&[Row]]) {
    let world = &*WORLD;
    let (root, inner) = section.split_once('.').unwrap_or((section, ""));
    let mut tried = BTreeSet::new();
    for &(key, given, value) in rows.iter().flat_map(|rows| rows.iter()) {
        tried.insert(key);
        let mut table = world.table(&format!("[{}]\n{}", stage_of(root).name(), before(section)));
        // What a row sets stands in place of what all have.
        let given = world.table(&format!("[given]\n{given}")).remove("given").unwrap();
        let outer = table[root].as_table_mut().unwrap();
        match inner {
            "" => outer.extend(given.as_table().unwrap().clone()),
            "reward" => drop(outer.insert(inner.into(), vec![given].into())),
            _ => drop(outer.insert(inner.into(), given)),
        }
        let (same, value) = value.strip_prefix("SAME ").map_or((false, value), |value| (true, value));
        let value = world.table(&format!("[given]\nvalue = {value}"))["given"]["value"].clone();
        let mut changed = table.clone();
        let outer = changed[root].as_table_mut().unwrap();
        let of = match inner {
            "" => outer,
            "reward" => outer[inner].as_array_mut().unwrap()[0].as_table_mut().unwrap(),
            _ => outer[inner].as_table_mut().unwrap(),
        };
        let was = of.insert(key.into(), value.clone());
        assert_ne!(was.as_ref(), Some(&value), "{section}.{key}: {value} is what it was");
        let (without, with) = (world.result(stage_of(root), &table), world.result(stage_of(root), &changed));
        assert_eq!(without == with, same, "{section}.{key} = {value}: the runs with it and without it");
    }
    let known = known_keys();
    let keys = known.iter().find(|(name, _)| *name == section).unwrap().1;
    for key in keys {
        assert!(tried.contains(key), "{section}.{key} has no row: say here what it changes");
    }
    for key in tried {
        assert!(keys.contains(&key), "{section} has no key {key} any more");
    }
}

#[test]
fn every_key_of_sft_has_an_effect() {
    check("sft", &[SFT, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_lora_and_base_has_an_effect() {
    check("lora", &[LORA]);
    check("base", &[BASE]);
}

#[test]
fn every_key_of_reward_has_an_effect() {
    check("reward", &[REWARD, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_dpo_has_an_effect() {
    check("dpo", &[DPO, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_kto_has_an_effect() {
    check("kto", &[KTO, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_distill_has_an_effect() {
    check("distill", &[DISTILL, OF_ALL, OPTIMIZER]);
}

#[test]
fn every_key_of_ppo_has_an_effect() {
    check("ppo", &[PPO, OPTIMIZER]);
}

#[test]
fn every_key_of_grpo_and_rloo_has_an_effect() {
    check("grpo", &[GROUPS, GRPO, OPTIMIZER]);
    check("rloo", &[GROUPS, RLOO, OPTIMIZER]);
}

#[test]
fn every_key_of_ptx_has_an_effect() {
    check("ppo.ptx", &[PTX]);
}

#[test]
fn every_key_of_a_rollouts_engine_has_an_effect() {
    check("ppo.rollout", &[ROLLOUT]);
}

#[test]
fn every_key_of_a_reward_part_has_an_effect() {
    check("ppo.reward", &[PART]);
}
