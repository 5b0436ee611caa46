//! configs/recipes: each loads, and is planned over each model of configs/README.md from the model's dimensions alone. The
//! table there is what this test computes, so that it cannot go stale.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use fourfold::config;
use fourfold::config::{Config, DeviceChoice, Quantize, RecomputeSetting, Stage};
use fourfold::model::config::DecoderConfig;
use fourfold::ops::weight::{ComputeDtype, StorageDType};
use fourfold::planner::plan::{Plan, plan};
use fourfold::planner::simulate::shape::Network;
use fourfold::run::PlanInputs;

use crate::support::Place;

/// Models in the order of the table: their name there, their file, and the parameters that their publishers state, in millions.
const MODELS: [(&str, &str, f64); 17] = [
    ("SmolLM2 135M", "smollm2-135m", 134.5),
    ("SmolLM2 360M", "smollm2-360m", 361.8),
    ("SmolLM2 1.7B", "smollm2-1.7b", 1711.0),
    ("Qwen2.5 0.5B", "qwen2.5-0.5b", 494.0),
    ("Qwen2.5 1.5B", "qwen2.5-1.5b", 1544.0),
    ("Qwen2.5 3B", "qwen2.5-3b", 3086.0),
    ("Qwen2.5 7B", "qwen2.5-7b", 7616.0),
    ("Qwen3 0.6B", "qwen3-0.6b", 596.0),
    ("Qwen3 1.7B", "qwen3-1.7b", 1720.0),
    ("Qwen3 4B", "qwen3-4b", 4022.0),
    ("Qwen3 8B", "qwen3-8b", 8190.0),
    ("Llama 3.2 1B", "llama-3.2-1b", 1236.0),
    ("Llama 3.2 3B", "llama-3.2-3b", 3213.0),
    ("Llama 3.1 8B", "llama-3.1-8b", 8030.0),
    ("Gemma 3 270M", "gemma-3-270m", 268.0),
    ("Gemma 3 1B", "gemma-3-1b", 1000.0),
    ("Gemma 3 4B, text", "gemma-3-4b", 3880.0),
];

const RECIPES: [(&str, Stage); 7] = [
    ("sft", Stage::Sft),
    ("reward", Stage::Reward),
    ("dpo", Stage::Dpo),
    ("kto", Stage::Kto),
    ("ppo", Stage::Ppo),
    ("grpo", Stage::Grpo),
    ("distill", Stage::Distill),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn model(file: &str) -> PathBuf {
    root().join("tests/golden/models").join(format!("{file}.json"))
}

fn recipe(name: &str, model: &Path) -> Config {
    let file = root().join("configs/recipes").join(format!("{name}.toml"));
    let mut set = vec![format!("base.path={}", model.display()), "data.path=records.jsonl".into()];
    if name == "distill" {
        set.push(format!("teacher.path={}", model.display()));
    }
    config::load(&file, &set).unwrap()
}

/// The plan with every activation recomputed, 8 threads, and nothing for the program itself and its data.
fn planned(stage: Stage, config: &Config) -> Plan {
    let mut config = config.clone();
    config.set_checkpoint(stage, RecomputeSetting::Block);
    let inputs = PlanInputs::open(stage, &config, 1).unwrap();
    let shapes = |config: &Config| {
        let mut shape = inputs.job(stage, config, None)?;
        (shape.data, shape.process, shape.threads) = (0, 0, 8);
        Ok(shape)
    };
    plan(stage, &config, None, &shapes).unwrap()
}

/// GiB with one decimal.
fn gib(bytes: usize) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

/// A cell of the table: the CPU's memory, and a card's.
fn cell(name: &str, stage: Stage, model: &Path) -> String {
    let on_cpu = recipe(name, model).on(Some(DeviceChoice::Cpu));
    let whole = planned(stage, &on_cpu).peak().1;
    assert!(whole.own() < whole.total(), "{name}: the base is mapped");
    let mut on_card = recipe(name, model).on(Some(DeviceChoice::Cuda(0)));
    on_card.base.quantize = Some(Quantize::Q4K);
    on_card.teacher.iter_mut().for_each(|teacher| teacher.quantize = Some(Quantize::Q4K));
    let card = planned(stage, &on_card);
    assert_eq!(card.devices.len(), 1);
    format!("{} · {}", gib(whole.total()), gib(card.devices[0].total()))
}

fn row(name: &str, file: &str) -> String {
    let mut line = format!("| {name} |");
    for (recipe, stage) in RECIPES {
        let _ = write!(line, " {} |", cell(recipe, stage, &model(file)));
    }
    line
}

#[test]
fn the_dimensions_of_the_models_are_those_of_their_published_sizes() {
    for (name, file, millions) in MODELS {
        let text = fs::read_to_string(model(file)).unwrap();
        let config = DecoderConfig::from_hf(&text, None, name).unwrap();
        let network = Network::planned(config, StorageDType::BF16, None, ComputeDtype::F32).unwrap();
        let ours = network.parameters() as f64 / 1e6;
        assert!((ours / millions - 1.0).abs() < 0.005, "{name}: {ours:.1} M, published {millions} M");
    }
}

#[test]
fn the_table_of_planned_memory_is_what_the_planner_computes() {
    let readme = fs::read_to_string(root().join("configs/README.md")).unwrap();
    let lines: BTreeMap<&str, &str> =
        readme.lines().filter_map(|line| Some((line.strip_prefix("| ")?.split(" |").next()?, line))).collect();
    let rows: Vec<(&str, String)> = MODELS.iter().map(|(name, file, _)| (*name, row(name, file))).collect();
    let stale = rows.iter().any(|(name, row)| lines.get(name) != Some(&row.as_str()));
    let all: Vec<&str> = rows.iter().map(|(_, row)| row.as_str()).collect();
    assert!(!stale, "the table in configs/README.md should be:\n{}", all.join("\n"));
}

#[test]
fn a_recipe_names_the_variables_that_it_needs() {
    for (name, stage) in RECIPES {
        let file = root().join("configs/recipes").join(format!("{name}.toml"));
        let config = recipe(name, Path::new("model"));
        assert_eq!(config.output_dir(stage), Path::new("runs/recipes").join(name));
        let text = fs::read_to_string(&file).unwrap();
        for variable in text.split('$').skip(1).map(|rest| rest.split('"').next().unwrap()) {
            let told = text.lines().any(|line| line.starts_with(&format!("# {variable}:")));
            assert!(told, "{name}: {variable} is not explained");
        }
        if std::env::var_os("FOURFOLD_BASE").is_none() {
            let error = config::load(&file, &[]).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("[base] path: ") && error.contains("$FOURFOLD_BASE"), "{error}");
        }
        if name == "grpo" {
            assert_eq!(config.ppo().unwrap().kl_coef, 0.04, "the paper's");
        }
    }
}

/// What the page says to type works as it is, once its paths are there.
#[test]
fn the_commands_of_the_page_work() {
    let place = Place::new();
    fs::create_dir_all(place.path("path/to")).unwrap();
    fs::rename(place.path("base"), place.path("path/to/model")).unwrap();
    fs::rename(place.path("sft.jsonl"), place.path("demonstrations.jsonl")).unwrap();
    fs::create_dir(place.path("configs")).unwrap();
    fs::create_dir(place.path("configs/recipes")).unwrap();
    fs::copy(root().join("configs/recipes/sft.toml"), place.path("configs/recipes/sft.toml")).unwrap();
    let readme = fs::read_to_string(root().join("configs/README.md")).unwrap();
    let commands: Vec<&str> = readme.lines().filter_map(|line| line.strip_prefix("fourfold ")).collect();
    assert!(commands.len() > 1, "{commands:?}");
    for command in commands {
        let ran = place.run(command);
        assert_eq!(ran.code, 0, "{command}: {}", ran.stderr);
    }
    for file in fs::read_dir(root().join("configs/recipes")).unwrap().map(|file| file.unwrap().path()) {
        let text = fs::read_to_string(file).unwrap();
        let names = text.split('$').skip(1).map(|rest| rest.split('"').next().unwrap());
        names.for_each(|name| assert!(readme.contains(&format!("`{name}`")), "configs/README.md does not name {name}"));
    }
}
