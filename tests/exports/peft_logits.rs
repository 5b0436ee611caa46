//! Adapters that PEFT saved, over the quickstart's base: the numbers that PEFT and torch got, and the course of five
//! training steps. tests/golden/peft_logits.py printed them. It does not depend on our random numbers.

use std::path::{Path, PathBuf};

use fourfold::config::{Reward, Sft};
use fourfold::data::examples::objectives::{RankedExample, SftExample};
use fourfold::export::Source;
use fourfold::export::merged::{Kind, MAX_SHARD_SIZE, MergedType, Settings, merge};
use fourfold::model::adapter::Adapter;
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::roles::Policy;
use fourfold::report::Report;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use fourfold::{reward, sft};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Golden {
    sequences: Vec<Vec<u32>>,
    sft: Vec<Demonstration>,
    ranked: Vec<Ranked>,
    logprobs: Vec<Vec<f32>>,
    bare_logprobs: Vec<Vec<f32>>,
    merged_logprobs: Vec<Vec<f32>>,
    logprobs_after: Vec<Vec<f32>>,
    scores: Vec<Vec<f32>>,
    scores_after: Vec<Vec<f32>>,
    sft_course: Vec<Step>,
    reward_course: Vec<Step>,
}

#[derive(Deserialize)]
struct Demonstration {
    prompt: Vec<u32>,
    answer: Vec<u32>,
}

#[derive(Deserialize)]
struct Ranked {
    prompt: Vec<u32>,
    answers: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Step {
    loss: f64,
    grad_norm: f64,
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../golden/peft_logits/values.json")).unwrap()
}

fn model() -> Model {
    Model::open(&here("src/quickstart/assets/base")).unwrap()
}

fn adapter(model: &Model, name: &str) -> Adapter {
    model.adapter(&here("tests/golden/peft_logits").join(name)).unwrap()
}

impl Golden {
    fn logprobs(&self, base: &Base, adapter: Option<&Adapter>) -> Vec<Vec<f32>> {
        let batch = Batch::new(&self.sequences).unwrap();
        let lengths: Vec<usize> = self.sequences.iter().map(|s| s.len() - 1).collect();
        let targets = Targets::responses(&batch, &lengths).unwrap();
        let mut flat = Policy::new(base, adapter).logprobs(&batch, &targets, 1.0).unwrap().logprobs.into_iter();
        lengths.iter().map(|&n| flat.by_ref().take(n).collect()).collect()
    }

    fn ranked(&self) -> Vec<RankedExample> {
        let example = |r: &Ranked| RankedExample {
            prompt: r.prompt.clone(),
            responses: r.answers.clone(),
            label: Default::default(),
        };
        self.ranked.iter().map(example).collect()
    }
}

fn furthest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.iter().map(Vec::len).collect::<Vec<_>>(), b.iter().map(Vec::len).collect::<Vec<_>>());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    // NaN must not pass as the smaller one.
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

fn assert_course(dir: &Path, want: &[Step], what: &str) {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), want.len());
    let relative = |got: &Value, want: f64| (got.as_f64().unwrap() - want).abs() / want.abs();
    let (mut loss, mut norm) = (0f64, 0f64);
    for (line, want) in lines.iter().zip(want) {
        (loss, norm) =
            (loss.max(relative(&line["loss"], want.loss)), norm.max(relative(&line["grad_norm"], want.grad_norm)));
    }
    eprintln!("{what}: within {loss:.1e} of torch's losses and {norm:.1e} of its gradient norms, relative");
    // f32 sums in another order, through five steps of Adam, which amplifies the smallest gradients' rounding.
    assert!(loss < 1e-4 && norm < 1e-3, "{what}: {text}");
}

#[test]
fn an_adapter_from_peft_gives_pefts_logprobs_and_moves_the_base_as_far() {
    let (model, golden) = (model(), golden());
    let bare = furthest(&golden.logprobs(&model.base, None), &golden.bare_logprobs);
    let lm = adapter(&model, "lm");
    let adapted = furthest(&golden.logprobs(&model.base, Some(&lm)), &golden.logprobs);
    eprintln!("bare base within {bare:.1e} of transformers, with the adapter within {adapted:.1e} of PEFT");
    assert!(furthest(&golden.logprobs, &golden.bare_logprobs) > 1.0);
    // Log-probabilities of size 10 in f32, four blocks.
    assert!(bare < 1e-4 && adapted < 1e-4, "{bare} {adapted}");
}

#[test]
fn a_reward_adapter_from_peft_gives_its_classifiers_scores() {
    let (model, golden) = (model(), golden());
    let scores = reward::train::scores(&model.base, &adapter(&model, "rm"), &golden.ranked()).unwrap();
    let difference = furthest(&scores, &golden.scores);
    eprintln!("scores within {difference:.1e} of PEFT's");
    assert!(difference < 1e-5, "{scores:?}");
}

#[test]
fn a_merged_directory_gives_the_logprobs_of_pefts_merge_and_unload() {
    let (model, golden, dir) = (model(), golden(), tempfile::tempdir().unwrap());
    let out = dir.path().join("merged");
    let lm = adapter(&model, "lm");
    let (checkpoint, base) = (&model.checkpoint, &model.base);
    let source = Source { files: checkpoint, base, adapter: &lm, prompts: &golden.sequences, about: "" };
    let how = Settings { dtype: MergedType::F32, kind: Kind::LanguageModel, max_shard_size: MAX_SHARD_SIZE };
    merge(&source, how, &out).unwrap();
    let difference = furthest(&golden.logprobs(&Model::open(&out).unwrap().base, None), &golden.merged_logprobs);
    eprintln!("merged f32 within {difference:.1e} of PEFT's merge");
    assert!(difference < 1e-4, "{difference}");
}

#[test]
fn five_sft_steps_take_torchs_course() {
    let (model, golden, dir) = (model(), golden(), tempfile::tempdir().unwrap());
    let example = |d: &Demonstration| {
        let tokens: Vec<u32> = d.prompt.iter().chain(&d.answer).copied().collect();
        SftExample { loss_mask: (0..tokens.len()).map(|i| i >= d.prompt.len()).collect(), tokens }
    };
    let examples: Vec<SftExample> = golden.sft.iter().map(example).collect();
    // Two micro-batches a step: torch had one.
    let config = Sft {
        learning_rate: 2e-3,
        num_train_epochs: 5,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        weight_decay: 0.01,
        max_grad_norm: 0.5,
        ..Sft::default()
    };
    let mut report = Session::new(Report::to_dir(dir.path()).unwrap());
    let start = adapter(&model, "lm");
    let setup = Setup { base: &model.base, start: &start, recompute: Recompute::Off, seed: 0 };
    let (trained, _) = sft::train(setup, &examples, &[], &config, &mut report).unwrap();
    assert_course(dir.path(), &golden.sft_course, "sft");
    let difference = furthest(&golden.logprobs(&model.base, Some(&trained)), &golden.logprobs_after);
    let moved = furthest(&golden.logprobs, &golden.logprobs_after);
    eprintln!("after five steps within {difference:.1e} of PEFT; the steps moved log-probabilities by {moved:.2}");
    assert!(difference < 1e-3 * moved, "{difference}");
}

#[test]
fn five_reward_steps_on_three_ranked_answers_take_torchs_course() {
    let (model, golden, dir) = (model(), golden(), tempfile::tempdir().unwrap());
    let config = Reward {
        learning_rate: 2e-3,
        num_train_epochs: 5,
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 2,
        weight_decay: 0.01,
        max_grad_norm: 0.2,
        center: false,
        ..Reward::default()
    };
    let mut report = Session::new(Report::to_dir(dir.path()).unwrap());
    let (start, examples) = (adapter(&model, "rm"), golden.ranked());
    let setup = Setup { base: &model.base, start: &start, recompute: Recompute::Off, seed: 0 };
    let (trained, _) = reward::train::train(setup, &examples, &[], &config, &mut report).unwrap();
    assert_course(dir.path(), &golden.reward_course, "reward");
    let scores = reward::train::scores(&model.base, &trained, &examples).unwrap();
    let (difference, moved) = (furthest(&scores, &golden.scores_after), furthest(&golden.scores, &golden.scores_after));
    eprintln!("after five steps within {difference:.1e} of PEFT's scores; the steps moved them by {moved:.2}");
    assert!(difference < 1e-3 * moved, "{scores:?}");
}
