//! Small fixtures of the PPO invariants: the quickstart's base and records in small numbers, settings for each stage, and
//! helpers that compare weights bit by bit. It asserts no invariant itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fourfold::config::{Lora, Ppo, RecomputeSetting, Reward, Sft};
use fourfold::data::examples::objectives::{RankedExample, SftExample};
use fourfold::model::adapter::Adapter;
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::readers::Sharing;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::model_files::ModelFiles;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::train::{Trained, train};
use fourfold::quickstart::base::BASE;
use fourfold::quickstart::task::{Split, pairs, prompts, sft_rows};
use fourfold::report::clocks;
use fourfold::reward::source::RewardModel;
use fourfold::run::Model;
use fourfold::tokenizer::SpecialTokens;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use fourfold::train::world::World;
use fourfold::{reward, sft};
use serde_json::Value;

/// A new copy of the embedded base with its first `layers` blocks.
pub fn model_of(layers: usize) -> Model {
    let config = BASE.config.replace("\"num_hidden_layers\": 4", &format!("\"num_hidden_layers\": {layers}"));
    let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
    let model = Model::of(ModelFiles::from_embedded(&config, parts.0, parts.1, parts.2, parts.3).unwrap()).unwrap();
    assert_eq!(model.base.config().num_hidden_layers, layers);
    model
}

pub fn model() -> Model {
    model_of(4)
}

pub fn ids(model: &Model, text: &str) -> Vec<u32> {
    model.checkpoint.tokenizer().encode(text, SpecialTokens::None).unwrap()
}

pub fn answer_ids(model: &Model, text: &str) -> Vec<u32> {
    let end = model.checkpoint.tokenizer().eos_id().unwrap();
    ids(model, text).into_iter().chain([end]).collect()
}

pub fn sft_examples(model: &Model, n: usize) -> Vec<SftExample> {
    let example = |prompt: &str, response: &str| {
        let prompt = ids(model, prompt);
        let tokens: Vec<u32> = prompt.iter().copied().chain(answer_ids(model, response)).collect();
        SftExample { loss_mask: (0..tokens.len()).map(|i| i >= prompt.len()).collect(), tokens }
    };
    sft_rows(5, n, Split::Train).iter().map(|r| example(&r.row.prompt, &r.response)).collect()
}

pub fn comparisons(model: &Model, n: usize) -> Vec<RankedExample> {
    let pairs = pairs(5, n, 0, Split::Train);
    let answers = |p: &fourfold::quickstart::task::Pair| {
        vec![answer_ids(model, &p.chosen), answer_ids(model, &p.rejected)] // best first
    };
    pairs
        .iter()
        .map(|p| RankedExample { prompt: ids(model, &p.row.prompt), responses: answers(p), label: Default::default() })
        .collect()
}

pub fn questions(model: &Model, n: usize) -> Vec<Vec<u32>> {
    let questions: Vec<Vec<u32>> = prompts(5, n, Split::Train).iter().map(|r| ids(model, &r.prompt)).collect();
    assert!(questions.iter().any(|q| q.len() != questions[0].len()), "ragged batches are the point");
    questions
}

/// alpha / r = 1.5, so that a missing scale is detected.
pub fn lora() -> Lora {
    Lora { r: 4, lora_alpha: 6.0, ..Lora::default() }
}

pub fn sft_config() -> Sft {
    Sft { learning_rate: 3e-3, per_device_train_batch_size: 4, ..Sft::default() }
}

pub fn reward_config() -> Reward {
    Reward { learning_rate: 3e-3, per_device_train_batch_size: 4, ..Reward::default() }
}

/// 5 iterations of 8 prompts, 2 minibatches each: 10 optimizer steps.
pub fn ppo_config() -> Ppo {
    let config = Ppo {
        learning_rate: 2e-3,
        total_episodes: 40,
        batch_size: 8,
        num_mini_batches: 2,
        micro_batch_size: 3,
        response_length: 12,
        reward_adapter: "unused".into(),
        ..Ppo::default()
    };
    assert_eq!(config.iterations() * config.num_ppo_epochs * config.num_mini_batches, 10);
    config
}

/// An SFT adapter whose factors are all non-zero, and so never merged into anything.
pub fn sft_adapter(model: &Model, seed: u64, report: &mut Session) -> Adapter {
    let start = model.fresh_adapter(&lora(), seed).unwrap();
    let examples = sft_examples(model, 32);
    let setup = Setup { base: &model.base, start: &start, recompute: Recompute::Off, seed };
    let (adapter, _) = sft::train(setup, &examples, &[], &sft_config(), report).unwrap();
    for (name, values) in bits(&adapter) {
        assert!(values.iter().any(|&v| f32::from_bits(v) != 0.0), "{name} is zero after SFT");
    }
    adapter
}

pub fn reward_adapter(model: &Model, start: &Adapter, seed: u64, report: &mut Session) -> Adapter {
    let examples = comparisons(model, 32);
    let setup = Setup { base: &model.base, start, recompute: Recompute::Off, seed };
    reward::train::train(setup, &examples, &examples, &reward_config(), report).unwrap().0
}

/// Bases and adapters of a PPO run.
#[derive(Clone, Copy)]
pub struct Roles<'w> {
    pub base: &'w Base,
    pub reward_base: &'w Base,
    pub sft: &'w Adapter,
    pub reward: Option<&'w Adapter>,
}

fn no_text(_: &[u32]) -> String {
    String::new()
}

/// Inputs of a PPO run that does not decode its samples.
pub fn ppo_run<'w>(
    roles: Roles<'w>,
    prompts: &'w Vec<Vec<u32>>,
    stop: &'w [u32],
    source: &'w RewardModel<'w>,
    config: &'w Ppo,
    seed: u64,
) -> PpoRun<'w> {
    let Roles { base, reward_base, sft, reward } = roles;
    let recompute = match config.checkpoint {
        RecomputeSetting::None | RecomputeSetting::Auto => Recompute::Off,
        RecomputeSetting::Mlp => Recompute::Mlp,
        RecomputeSetting::Block => Recompute::Block,
        RecomputeSetting::Offload => Recompute::Offload,
    };
    PpoRun {
        world: World::alone(),
        base,
        reward_base,
        sft,
        reward,
        prompts,
        stop,
        source,
        decode: &no_text,
        evaluation: None,
        ptx: None,
        pad: None,
        sampler: None,
        config,
        seed,
        recompute,
        sharing: Sharing::default(),
    }
}

pub fn run_ppo(roles: Roles<'_>, model: &Model, config: &Ppo, seed: u64, session: &mut Session) -> Trained {
    let tokenizer = model.checkpoint.tokenizer();
    let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap();
    let (prompts, source) = (questions(model, 24), source_of(roles));
    let run = ppo_run(roles, &prompts, tokenizer.eos_ids(), &source, config, seed);
    train(&PpoRun { decode: &decode, ..run }, session).unwrap()
}

/// The reward model that a run starts with, as the source of its scores.
pub fn source_of(roles: Roles<'_>) -> RewardModel<'_> {
    RewardModel(ValueModel::new(roles.reward_base, roles.reward.unwrap()).unwrap())
}

/// The bits of every tensor of an adapter, the head's bias last.
pub fn bits(adapter: &Adapter) -> BTreeMap<String, Vec<u32>> {
    let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let named = adapter.named_tensors().into_iter();
    let mut all: BTreeMap<String, Vec<u32>> =
        named.map(|(name, t)| (name, values(t).iter().map(|v| v.to_bits()).collect())).collect();
    all.extend(adapter.head().map(|h| ("score.bias".to_string(), vec![h.bias.to_bits()])));
    all
}

/// Every stored byte of a base.
pub fn bytes_of(base: &Base) -> BTreeMap<String, Vec<u8>> {
    let mut all: BTreeMap<String, Vec<u8>> =
        base.weights().into_iter().map(|(name, w)| (name, w.bytes().to_vec())).collect();
    all.extend(base.vectors().into_iter().map(|(n, v)| (n, v.iter().flat_map(|x| x.to_le_bytes()).collect())));
    all
}

/// Demonstrations as one batch, all their tokens targets.
pub fn fixed_sequences(model: &Model) -> (Batch, Targets) {
    let sequences: Vec<Vec<u32>> = sft_examples(model, 5).into_iter().map(|e| e.tokens).collect();
    let lengths: Vec<usize> = sequences.iter().map(|s| s.len() - 1).collect();
    let batch = Batch::new(&sequences).unwrap();
    let targets = Targets::responses(&batch, &lengths).unwrap();
    (batch, targets)
}

pub fn logprobs(base: &Base, adapter: Option<&Adapter>, (batch, targets): &(Batch, Targets)) -> Vec<f32> {
    Policy::new(base, adapter).logprobs(batch, targets, 1.0).unwrap().logprobs
}

pub fn to_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub fn mean_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.len() as f32
}

/// The lines of metrics.jsonl without their clock columns.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    clocks::without(&text).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn column(lines: &[Value], key: &str) -> Vec<f64> {
    lines.iter().map(|l| l[key].as_f64().unwrap_or_else(|| panic!("{key} in {l}"))).collect()
}
