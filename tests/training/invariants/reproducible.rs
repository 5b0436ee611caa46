//! Reproducibility: one seed gives the same bytes, in one process and through the program, with any number of threads. It
//! does not test whether the result is right.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fourfold::model::adapter::Adapter;
use fourfold::quickstart::base::BASE;
use fourfold::quickstart::task::{Split, pairs, sft_rows};
use fourfold::report::{Report, clocks};
use fourfold::train::session::Session;
use serde_json::{Value, json};

use super::world::*;

/// sft -> reward -> ppo, each with its own output folder, as the commands leave them.
fn pipeline(dir: &Path, seed: u64) {
    let model = model();
    let report = |stage: &str| {
        fs::create_dir_all(dir.join(stage)).unwrap();
        Session::new(Report::to_dir(&dir.join(stage)).unwrap())
    };
    let save = |adapter: &Adapter, name: &str| {
        adapter.clone().with_provenance(model.provenance()).save(&dir.join(name)).unwrap();
    };
    let sft = sft_adapter(&model, seed, &mut report("sft"));
    save(&sft, "sft/adapter");
    let rm = reward_adapter(&model, &sft, seed, &mut report("reward"));
    save(&rm, "reward/adapter");
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let trained = run_ppo(roles, &model, &ppo_config(), seed, &mut report("ppo"));
    save(&trained.actor, "ppo/actor");
    save(trained.critic.as_ref().unwrap(), "ppo/critic");
}

/// Every file under `dir` with its bytes, metrics.jsonl without its clock columns. TensorBoard's events hold times.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.extend((!path.ends_with("tb")).then_some(path));
            } else {
                let bytes = match path.ends_with("metrics.jsonl") {
                    true => clocks::without(&fs::read_to_string(&path).unwrap()).into_bytes(),
                    false => fs::read(&path).unwrap(),
                };
                all.insert(path.strip_prefix(dir).unwrap().to_path_buf(), bytes);
            }
        }
    }
    all
}

fn assert_same_files(a: &BTreeMap<PathBuf, Vec<u8>>, b: &BTreeMap<PathBuf, Vec<u8>>) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (path, bytes) in a {
        assert!(*bytes == b[path], "{} differs", path.display());
    }
}

#[test]
fn two_runs_with_one_seed_give_byte_equal_adapters() {
    let dirs = [3, 3, 4].map(|seed| {
        let dir = tempfile::tempdir().unwrap();
        pipeline(dir.path(), seed);
        files(dir.path())
    });
    // Four adapters of two files, three stages with metrics and samples.
    assert_eq!(dirs[0].len(), 4 * 2 + 3 * 2);
    assert_same_files(&dirs[0], &dirs[1]);
    for (path, bytes) in &dirs[0] {
        let by_seed = path.ends_with("adapter_model.safetensors") || path.ends_with("metrics.jsonl");
        assert!(!by_seed || *bytes != dirs[2][path], "{} does not depend on the seed", path.display());
    }
}

/// A Hugging Face directory of the embedded base.
fn write_base(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), BASE.config).unwrap();
    fs::write(dir.join("generation_config.json"), BASE.generation_config).unwrap();
    fs::write(dir.join("tokenizer.json"), BASE.tokenizer).unwrap();
    fs::write(dir.join("tokenizer_config.json"), BASE.tokenizer_config).unwrap();
    fs::write(dir.join("model.safetensors"), BASE.weights).unwrap();
}

/// Base, records and config files like a user's.
fn write_world(dir: &Path) {
    write_base(&dir.join("base"));
    let lines = |rows: Vec<Value>| rows.iter().map(|r| format!("{r}\n")).collect::<String>();
    let sft = sft_rows(5, 24, Split::Train);
    let messages = |q: &str, a: &str| json!([{"role": "user", "content": q}, {"role": "assistant", "content": a}]);
    let rows = sft.iter().map(|r| json!({ "messages": messages(r.row.question(), r.response.trim()) }));
    fs::write(dir.join("sft.jsonl"), lines(rows.collect())).unwrap();
    let rows = pairs(5, 24, 0, Split::Train).into_iter().map(
        |p| json!({"prompt": p.row.prompt.as_str(), "chosen": p.chosen.as_str(), "rejected": p.rejected.as_str()}),
    );
    fs::write(dir.join("pairs.jsonl"), lines(rows.collect())).unwrap();
    let common = "seed = 6\n[base]\npath = \"base\"\n[lora]\nr = 4\nlora_alpha = 6\n[data]\neval_rows = 4\n";
    let write = |stage: &str, data: &str, keys: &str| {
        let text = format!("{common}path = \"{data}\"\n[{stage}]\n{keys}\n");
        fs::write(dir.join(format!("{stage}.toml")), text).unwrap();
    };
    write("sft", "sft.jsonl", "learning_rate = 3e-3\nper_device_train_batch_size = 4");
    let continued = "adapter = \"OUT/sft/adapter\"\nlearning_rate = 3e-3\nper_device_train_batch_size = 4";
    write("reward", "pairs.jsonl", continued);
    let ppo = "adapter = \"OUT/sft/adapter\"\nreward_adapter = \"OUT/reward/adapter\"\nlearning_rate = 2e-3\n\
               total_episodes = 16\nbatch_size = 8\nnum_mini_batches = 2\nresponse_length = 10\neval_prompts = 4";
    write("ppo", "sft.jsonl", ppo);
}

/// Runs one command of the program in `dir`.
fn fourfold(dir: &Path, threads: &str, arguments: &[String]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    let output = command.current_dir(dir).env("RAYON_NUM_THREADS", threads).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs all three stages through the program; returns adapters, metrics and samples in `out`.
fn stages(dir: &Path, out: &str, threads: &str, more: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    for stage in ["sft", "reward", "ppo"] {
        let mut arguments: Vec<String> =
            [stage, &format!("{stage}.toml"), "--json", "--out", &format!("{out}/{stage}")].map(Into::into).into();
        let mut set = |text: &str| arguments.extend(["--set".into(), text.replace("OUT", out)]);
        if stage != "sft" {
            set(&format!("{stage}.adapter=OUT/sft/adapter"));
        }
        if stage == "ppo" {
            set("ppo.reward_adapter=OUT/reward/adapter");
            more.iter().for_each(|m| set(m));
        }
        fourfold(dir, threads, &arguments);
    }
    // The resolved configs and the adapters' configs name paths, which differ from run to run.
    let kept = ["adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"];
    files(&dir.join(out)).into_iter().filter(|(path, _)| kept.iter().any(|k| path.ends_with(k))).collect()
}

#[test]
fn thread_count_and_a_second_copy_of_the_base_change_no_byte_of_the_results() {
    let dir = tempfile::tempdir().unwrap();
    write_world(dir.path());
    let one = stages(dir.path(), "one", "1", &[]);
    assert_eq!(one.len(), 4 + 3 * 2);
    assert!(!one[Path::new("ppo/samples.jsonl")].is_empty());
    assert_same_files(&one, &stages(dir.path(), "two", "2", &[]));
    assert_same_files(&one, &stages(dir.path(), "three", "3", &[]));
    write_base(&dir.path().join("copy"));
    assert_same_files(&one, &stages(dir.path(), "copied", "2", &["reward_base.path=copy"]));
}
