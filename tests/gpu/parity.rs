//! The emulated machine in f32 against the host in f32: log-probabilities, entropies, exact KL, values, the gradient of every
//! factor, and generated text, for every family and for the quickstart's base.

use std::path::{Path, PathBuf};

use fourfold::device::Device;
use fourfold::model::adapter::{Adapter, NonBlockModule, TargetModules};
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::generate::{Response, SamplingParams, generate};
use fourfold::model::init::dora::with_magnitudes;
use fourfold::model::roles::{HeadGradients, Policy, ValueModel};

use crate::tiny_decoders::open;
use crate::world::*;

/// The furthest that f32 on the two machines may be apart, relative to the largest number of a tensor.
const BOUND: f32 = 1e-4;

/// Everything that one base computes of one adapter and one batch.
pub struct Computed {
    pub logprobs: Vec<f32>,
    pub entropy: Vec<f32>,
    pub kl: Vec<f32>,
    pub policy: Vec<(String, Vec<f32>)>,
    pub values: Vec<f32>,
    pub critic: Vec<(String, Vec<f32>)>,
}

pub fn compute(base: &Base, adapter: &Adapter, sequences: &[Vec<u32>], recompute: Recompute) -> Computed {
    let batch = Batch::new(sequences).unwrap();
    let lengths: Vec<usize> = sequences.iter().map(|s| (s.len() - 1).max(1)).collect();
    let targets = Targets::responses(&batch, &lengths).unwrap();
    let (actor, bare) = (Policy::new(base, Some(adapter)), Policy::new(base, None));
    let theirs = bare.rows(&batch, &targets).unwrap();
    let each = |f: fn(usize) -> f32| (0..targets.rows.len()).map(f).collect::<Vec<f32>>();
    let mut exact = vec![];
    let (stats, gradients) = actor
        .gradients_against(&batch, &targets, Some((bare, &theirs)), 0.9, recompute, |_, kl| {
            exact = kl.to_vec();
            Ok(HeadGradients {
                logprobs: each(|i| 1.0 - 0.13 * (i % 7) as f32),
                entropy: each(|i| 0.5 - 0.1 * (i % 3) as f32),
                kl: Some(each(|i| 0.7 - 0.2 * (i % 5) as f32)),
            })
        })
        .unwrap_or_else(|e| panic!("{e:#}"));
    let plain = actor.logprobs(&batch, &targets, 0.9).unwrap();
    assert!(relative(&plain.logprobs, &stats.logprobs) < 1e-5, "with and without saved tensors");
    let (mut values, mut critic) = (vec![], vec![]);
    if adapter.outer(NonBlockModule::Head).is_none() {
        let headed = adapter.clone().with_head(7).unwrap();
        let model = ValueModel::new(base, &headed).unwrap();
        let rows: Vec<usize> = (0..batch.tokens().len()).rev().step_by(2).collect();
        let (v, g) = model
            .gradients(&batch, &rows, recompute, |v| Ok((0..v.len()).map(|i| 0.4 - 0.3 * (i % 4) as f32).collect()))
            .unwrap_or_else(|e| panic!("{e:#}"));
        (values, critic) = (v, named(&headed, &g));
        values.extend(model.scores(&batch).unwrap());
    }
    let policy = named(adapter, &gradients);
    Computed { logprobs: stats.logprobs, entropy: stats.entropy, kl: exact, policy, values, critic }
}

/// The furthest of everything, with its name.
pub fn apart(got: &Computed, want: &Computed) -> (f32, String) {
    let pairs = [
        ("logprobs", &got.logprobs, &want.logprobs),
        ("entropy", &got.entropy, &want.entropy),
        ("kl", &got.kl, &want.kl),
        ("values", &got.values, &want.values),
    ];
    let mut worst = (0f32, String::new());
    // A KL is a small difference of log-probabilities, whose rounding it has: relative to a tenth of a nat at least.
    let top = want.kl.iter().fold(0f32, |m, v| m.max(v.abs()));
    let smaller = |name| if name == "kl" { (top / 0.1).min(1.0) } else { 1.0 };
    let numbers = pairs.map(|(name, got, want)| (relative(got, want) * smaller(name), name.to_string()));
    for (e, name) in
        numbers.into_iter().chain([furthest(&got.policy, &want.policy), furthest(&got.critic, &want.critic)])
    {
        if e > worst.0 {
            worst = (e, name);
        }
    }
    worst
}

/// Compares both machines, for all settings of recomputation, and returns the largest difference.
fn assert_same(name: &str, [host, there]: [&Base; 2], adapter: &Adapter, sequences: &[Vec<u32>]) -> f32 {
    let want = compute(host, adapter, sequences, Recompute::Off);
    let all = Recompute::ALL.map(|recompute| compute(there, adapter, sequences, recompute));
    let mut worst = 0f32;
    for (recompute, got) in Recompute::ALL.iter().zip(&all) {
        let (e, what) = apart(got, &want);
        assert!(e < BOUND, "{name}, {recompute:?}: {what} differs by {e:.1e}");
        worst = worst.max(e);
        let (e, what) = apart(got, &all[0]);
        assert!(e == 0.0, "{name}: {what} with {recompute:?} differs by {e:.1e} from without");
    }
    worst
}

fn responses(base: &Base, adapter: Option<&Adapter>, prompts: &[Vec<u32>], temperature: f64) -> Vec<Response> {
    let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, max_new_tokens: 8, stop: vec![3, 9] };
    let seeds: Vec<u64> = (0..prompts.len() as u64).map(|i| 100 + i).collect();
    generate(Policy::new(base, adapter), prompts, &seeds, &sampling, |_, _| {}).unwrap_or_else(|e| panic!("{e:#}"))
}

fn assert_same_text(name: &str, [host, there]: [&Base; 2], adapter: Option<&Adapter>, prompts: &[Vec<u32>]) {
    for temperature in [0.0, 0.8] {
        let [want, got] = [host, there].map(|base| responses(base, adapter, prompts, temperature));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!((&got.tokens, got.finish), (&want.tokens, want.finish), "{name}, {temperature}, prompt {i}");
            let e = relative(&got.logprobs, &want.logprobs);
            assert!(e < BOUND, "{name}, temperature {temperature}, prompt {i}: log-probabilities differ by {e:.1e}");
        }
    }
}

/// A decoder of a golden file on both machines.
fn both(path: &str, device: &Device) -> [Base; 2] {
    [open(path).base, on(open(path).base, device)]
}

pub fn golden(folder: &str, ends_with: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder);
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    found.retain(|p| ends_with.is_empty() || p.to_string_lossy().ends_with(ends_with));
    found.sort();
    found
}

/// The golden files of all families.
pub fn families() -> Vec<String> {
    let files = golden("families", ".safetensors");
    assert!(files.len() >= 22);
    files.iter().map(|file| format!("families/{}", file.file_name().unwrap().to_str().unwrap())).collect()
}

#[test]
fn every_family_computes_and_writes_the_same_as_on_the_host() {
    let Some(device) = emulated() else { return };
    let _time = timed("the families");
    let mut worst = (0f32, String::new());
    for path in families() {
        let name = path.as_str();
        let [host, there] = both(&path, &device);
        let adapter = adapter(&host, TargetModules::AllLinear, 2, 5);
        let sequences = open(&path).golden.sequences;
        let bases = [&host, &there];
        let e = assert_same(name, bases, &adapter, &sequences);
        assert_same_text(name, bases, Some(&adapter), &[sequences[0].clone(), vec![5], sequences[1].clone(), vec![5]]);
        if e > worst.0 {
            worst = (e, name.to_string());
        }
    }
    say(&format!("families: the largest difference is {:.1e} ({})", worst.0, worst.1));
}

#[test]
fn dora_and_lora_on_both_ends_compute_the_same_as_on_the_host() {
    let Some(device) = emulated() else { return };
    let _time = timed("DoRA and the ends");
    let mut worst = (0f32, String::new());
    for folder in golden("lora_targets", "") {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let path = format!("lora_targets/{name}/golden.safetensors");
        let [host, there] = both(&path, &device);
        let adapter = Adapter::load(&folder, host.shapes()).unwrap();
        let sequences = open(&path).golden.sequences;
        let e = assert_same(name, [&host, &there], &adapter, &sequences);
        assert_same_text(name, [&host, &there], Some(&adapter), &[sequences[0].clone(), sequences[1].clone()]);
        if e > worst.0 {
            worst = (e, name.to_string());
        }
    }
    say(&format!("DoRA and the ends: the largest difference is {:.1e} ({})", worst.0, worst.1));
}

#[test]
fn the_quickstarts_base_computes_and_writes_the_same_as_on_the_host() {
    let Some(device) = emulated() else { return };
    let _time = timed("the quickstart's base");
    let [host, there] = [embedded(2).base().unwrap(), on(embedded(2).base().unwrap(), &device)];
    let vocab = host.config().vocab_size as u32;
    let sequences: Vec<Vec<u32>> = [2usize, 29, 9, 9]
        .iter()
        .enumerate()
        .map(|(s, &n)| (0..n as u32).map(|i| (s as u32 * 31 + i * 17 + 3) % vocab).collect())
        .collect();
    let ends = TargetModules::List(["q_proj", "down_proj", "embed_tokens", "lm_head"].map(String::from).to_vec());
    let all = adapter(&host, TargetModules::AllLinear, 4, 3);
    let dora = drawn(&with_magnitudes(&all, &host).unwrap(), 9);
    let ends = adapter(&host, ends, 3, 4);
    let dora_ends = with_magnitudes(&ends, &host).unwrap();
    let mut worst = 0f32;
    for (name, adapter) in [("all", &all), ("dora", &dora), ("ends", &ends), ("dora on the ends", &dora_ends)] {
        worst = worst.max(assert_same(name, [&host, &there], adapter, &sequences));
        assert_same_text(name, [&host, &there], Some(adapter), &sequences);
    }
    assert_same_text("bare", [&host, &there], None, &sequences);
    say(&format!("the quickstart's base: the largest difference is {worst:.1e}"));
}
