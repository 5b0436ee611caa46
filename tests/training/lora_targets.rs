//! DoRA, and branches on the ends of a decoder (token table, output table, OPT-350M's projections), against PEFT over tiny
//! decoders: what it saved is read, computes the same, has the same gradients, merges to the same model and is saved so
//! that it comes back. tests/golden/lora_targets.py printed the numbers.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use fourfold::export::Source;
use fourfold::export::gguf;
use fourfold::export::merged::{Kind, MAX_SHARD_SIZE, MergedType, Settings, merge};
use fourfold::model::adapter::{Adapter, Factor, LoraConfig, NonBlockModule, Provenance, TargetModule, factor_name};
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::generate::{SamplingParams, generate};
use fourfold::model::init::dora::with_magnitudes;
use fourfold::model::roles::{HeadGradients, Policy, ValueModel};
use fourfold::model_files::ModelFiles;
use fourfold::ops::weight::ComputeDtype;
use fourfold::run::Model;
use fourfold::train::adamw::AdamWConfig;
use fourfold::train::learner::Learner;
use fourfold::train::snapshot::Snapshot;

use crate::tiny_decoders::{Golden, Opened, furthest, open};

const CASES: [&str; 12] = [
    "dora_llama",
    "dora_gpt2",
    "ends_llama",
    "ends_gemma2_tied",
    "embed_qwen3_tied",
    "head_gemma3_tied",
    "dora_ends_llama",
    "ends_granite",
    "ends_gpt_neox",
    "opt_350m",
    "opt_350m_dora_ends",
    "layers",
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lora_targets").join(name)
}

fn decoder(name: &str) -> (Opened, Adapter) {
    let opened = open(&format!("lora_targets/{name}/golden.safetensors"));
    let adapter = Adapter::load(&folder(name), opened.base.shapes()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    (opened, adapter)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn read(golden: &Golden) -> (Batch, Targets) {
    let batch = Batch::new(&golden.sequences).unwrap();
    let lengths: Vec<usize> = golden.sequences.iter().map(|s| s.len() - 1).collect();
    let targets = Targets::responses(&batch, &lengths).unwrap();
    (batch, targets)
}

fn both(golden: &Golden, what: &str) -> Vec<f32> {
    (0..2).flat_map(|i| golden.numbers[&format!("{what}.{i}")].clone()).collect()
}

fn logits(base: &Base, adapter: Option<&Adapter>, golden: &Golden) -> Vec<f32> {
    let batch = Batch::new(&golden.sequences[..1]).unwrap();
    values(&base.logits(&base.hidden(&batch, adapter).unwrap(), adapter).unwrap())
}

#[test]
fn logits_log_probabilities_entropies_and_the_exact_kl_are_pefts() {
    for name in CASES {
        let (Opened { golden, base, .. }, adapter) = decoder(name);
        let e = furthest(&logits(&base, Some(&adapter), &golden), &golden.numbers["logits"]);
        // Logits of size 1 to 10 in f32; a forgotten branch, scale or magnitude is off by a tenth and more.
        assert!(e < 1e-4, "{name}: logits {e}");
        assert!(furthest(&logits(&base, None, &golden), &golden.numbers["logits"]) > 0.02, "{name}: it adapts");
        let (batch, targets) = read(&golden);
        let (actor, bare) = (Policy::new(&base, Some(&adapter)), Policy::new(&base, None));
        let rows = actor.rows(&batch, &targets).unwrap();
        let stats = actor.logprobs_of(&rows, &targets, 1.0).unwrap();
        let theirs = bare.rows(&batch, &targets).unwrap();
        let kl = actor.kl(&rows, (bare, &theirs), 1.0).unwrap();
        for (what, got) in [("logprobs", &stats.logprobs), ("entropy", &stats.entropy), ("kl", &kl)] {
            let e = furthest(got, &both(&golden, what));
            assert!(e < 1e-4, "{name}: {what} {e}");
        }
    }
}

#[test]
fn gradients_of_every_factor_and_magnitude_are_pefts_with_entropy_and_exact_kl() {
    for name in CASES {
        for checkpoint in Recompute::ALL {
            let (Opened { golden, base, .. }, adapter) = decoder(name);
            let (batch, targets) = read(&golden);
            let bare = Policy::new(&base, None);
            let theirs = bare.rows(&batch, &targets).unwrap();
            let each = |v: f32| vec![v; targets.rows.len()];
            let loss = |_: &_, kl: &[f32]| {
                assert_eq!(kl.len(), targets.rows.len());
                Ok(HeadGradients { logprobs: each(1.0), entropy: each(0.5), kl: Some(each(0.7)) })
            };
            let (_, gradients) = Policy::new(&base, Some(&adapter))
                .gradients_against(&batch, &targets, Some((bare, &theirs)), 1.0, checkpoint, loss)
                .unwrap();
            let learner = adapter.to_trainable();
            let (names, flat) = (learner.names(), learner.flat_gradients(&gradients).unwrap());
            assert_eq!(names.len(), golden.numbers.keys().filter(|k| k.starts_with("grad.")).count(), "{name}");
            for (factor, got) in names.iter().zip(flat) {
                let want = &golden.numbers[&format!("grad.{factor}")];
                let top = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                assert!(top > 0.0, "{name}: {factor}");
                let e = furthest(&values(got), want) / top.max(1.0);
                assert!(e < 1e-4, "{name}: {factor}: {e}");
            }
        }
    }
}

#[test]
fn the_merged_model_is_pefts_with_parted_ends_where_one_table_served_both() {
    for name in CASES {
        let (Opened { golden, base, checkpoint, dir }, adapter) = decoder(name);
        let out = dir.path().join("merged");
        let prompts = golden.sequences.clone();
        let source = Source { files: &checkpoint, base: &base, adapter: &adapter, prompts: &prompts, about: "" };
        let how = Settings { dtype: MergedType::F32, kind: Kind::LanguageModel, max_shard_size: MAX_SHARD_SIZE };
        let comparison = merge(&source, how, &out).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        assert!(comparison.max_logit_difference < 1e-4, "{name}: {comparison:?}");
        let reopened = ModelFiles::open(&out).unwrap().base().unwrap();
        let e = furthest(&logits(&reopened, None, &golden), &golden.numbers["merged"]);
        assert!(e < 1e-4, "{name}: {e}");
        let on = |outer| adapter.outer(outer).is_some();
        let parted = on(NonBlockModule::Embedding) || on(NonBlockModule::Head);
        assert_eq!(reopened.config().tie_word_embeddings, base.config().tie_word_embeddings && !parted, "{name}");
    }
}

#[test]
fn what_is_saved_comes_back_with_every_number_and_setting() {
    for name in CASES {
        let (Opened { base, dir, .. }, adapter) = decoder(name);
        let at = dir.path().join("again");
        adapter.save(&at).unwrap();
        let back = Adapter::load(&at, base.shapes()).unwrap();
        assert_eq!(back.config(), adapter.config(), "{name}");
        let (one, two) = (adapter.named_tensors(), back.named_tensors());
        assert_eq!(one.len(), two.len());
        for ((name, a), (other, b)) in one.into_iter().zip(two) {
            assert_eq!((name, values(a)), (other, values(b)));
        }
    }
}

/// The start of a DoRA adapter: A as it is, B zero (of a token table the other way round).
fn started(name: &str) -> (Opened, Adapter) {
    let (opened, trained) = decoder(name);
    let zeroed = trained.pairs().map(|(slot, pair)| {
        let mut pair = pair.clone().with_magnitude(None);
        let factor =
            if slot == TargetModule::NonBlockModule(NonBlockModule::Embedding) { &mut pair.a } else { &mut pair.b };
        *factor = factor.zeros_like().unwrap();
        (slot, pair)
    });
    let config = LoraConfig { use_dora: false, ..trained.config().clone() };
    let shapes = *trained.shapes();
    let plain = Adapter::from_pairs(config, shapes, zeroed.collect(), None, Provenance::default()).unwrap();
    let adapter = with_magnitudes(&plain, &opened.base).unwrap();
    (opened, adapter)
}

#[test]
fn magnitudes_start_as_pefts_and_leave_the_model_as_it_is() {
    for name in CASES.into_iter().filter(|name| name.contains("dora") || *name == "head_gemma3_tied") {
        let (Opened { golden, base, .. }, adapter) = started(name);
        for (slot, pair) in adapter.pairs() {
            let key = factor_name(adapter.shapes(), slot, Factor::Magnitude);
            let want = &golden.numbers[&format!("start.{key}")];
            let e = furthest(&values(pair.magnitude.as_ref().unwrap()), want);
            assert!(e < 1e-6, "{key}: {e}");
        }
        let e = furthest(&logits(&base, Some(&adapter), &golden), &logits(&base, None, &golden));
        assert!(e < 1e-5, "{name}: {e}");
    }
}

#[test]
fn decoding_over_the_cache_samples_with_the_branches_on_both_ends() {
    for name in CASES {
        let (Opened { golden, base, .. }, adapter) = decoder(name);
        let policy = Policy::new(&base, Some(&adapter));
        let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 8, stop: vec![] };
        let responses = generate(policy, &golden.sequences, &[1, 2], &sampling, |_, _| {}).unwrap();
        let sequences: Vec<Vec<u32>> = golden
            .sequences
            .iter()
            .zip(&responses)
            .map(|(p, r)| p.iter().chain(&r.tokens).copied().collect())
            .collect();
        let batch = Batch::new(&sequences).unwrap();
        let targets = Targets::responses(&batch, &[8, 8]).unwrap();
        let scored = policy.logprobs(&batch, &targets, 1.0).unwrap().logprobs;
        let got: Vec<f32> = responses.iter().flat_map(|r| r.logprobs.clone()).collect();
        assert!(furthest(&got, &scored) < 1e-4, "{name}");
    }
}

#[test]
fn products_in_bf16_stay_within_their_rounding() {
    for name in CASES {
        let (Opened { golden, base, .. }, adapter) = decoder(name);
        let base = base.computing_in(ComputeDtype::Bf16);
        let got = logits(&base, Some(&adapter), &golden);
        let want = &golden.numbers["logits"];
        let top = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        // 2^-9 a factor, through two to four blocks; without its branch or magnitude a model is off by far more.
        let e = furthest(&got, want) / top;
        assert!(e < 0.03, "{name}: {e}");
        // The gradients likewise, head's and tables' included.
        let (batch, targets) = read(&golden);
        let bare = Policy::new(&base, None);
        let theirs = bare.rows(&batch, &targets).unwrap();
        let each = |v: f32| vec![v; targets.rows.len()];
        let loss =
            |_: &_, _: &[f32]| Ok(HeadGradients { logprobs: each(1.0), entropy: each(0.5), kl: Some(each(0.7)) });
        let (_, gradients) = Policy::new(&base, Some(&adapter))
            .gradients_against(&batch, &targets, Some((bare, &theirs)), 1.0, Recompute::Off, loss)
            .unwrap();
        let learner = adapter.to_trainable();
        for (factor, got) in learner.names().iter().zip(learner.flat_gradients(&gradients).unwrap()) {
            let want = &golden.numbers[&format!("grad.{factor}")];
            let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
            let apart: Vec<f32> = values(got).iter().zip(want).map(|(a, b)| a - b).collect();
            let e = norm(&apart) / norm(want);
            assert!(e < 0.1, "{name}: {factor}: {e}");
        }
    }
}

fn learner(adapter: &Adapter) -> Learner {
    Learner::new(adapter.to_trainable(), AdamWConfig::default(), 1.0).unwrap()
}

#[test]
fn every_tensor_learns_and_a_snapshot_goes_on_to_the_same_bits() {
    for name in ["dora_ends_llama", "opt_350m_dora_ends"] {
        let (Opened { golden, base, .. }, adapter) = decoder(name);
        let (batch, targets) = read(&golden);
        let step = |learner: &mut Learner| -> f32 {
            let policy = Policy::new(&base, Some(learner.weights().view()));
            let n = targets.rows.len();
            let (stats, gradients) = policy
                .gradients(&batch, &targets, 1.0, Recompute::Off, |_| Ok((vec![-1.0 / n as f32; n], vec![0.0; n])))
                .unwrap();
            learner.step(gradients, 0.01).unwrap();
            -stats.logprobs.iter().sum::<f32>() / n as f32
        };
        let mut whole = learner(&adapter);
        let first = step(&mut whole);
        for ((key, before), (_, after)) in
            adapter.named_tensors().into_iter().zip(whole.weights().view().named_tensors())
        {
            assert_ne!(values(before), values(after), "{key}");
        }
        let mut snapshot = Snapshot::default();
        snapshot.put_learner("x", &whole).unwrap();
        let last = (0..20).map(|_| step(&mut whole)).last().unwrap();
        assert!(last < first - 0.2, "{name}: {first} -> {last}");
        let mut other = learner(&adapter);
        let (facts, mut arrays) = (snapshot.facts_bytes().unwrap(), vec![]);
        snapshot.write_arrays(&mut arrays).unwrap();
        Snapshot::from_bytes(&facts, &arrays).unwrap().restore_learner("x", &mut other).unwrap();
        (0..20).for_each(|_| {
            step(&mut other);
        });
        for ((key, a), (_, b)) in
            whole.weights().view().named_tensors().into_iter().zip(other.weights().view().named_tensors())
        {
            assert_eq!(values(a), values(b), "{key}");
        }
    }
}

#[test]
fn norms_follow_the_base_that_an_adapter_is_lent_to() {
    let (Opened { golden, base, dir, .. }, adapter) = decoder("dora_ends_llama");
    let first = logits(&base, Some(&adapter), &golden);
    // Another base of the same shape.
    let mut bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    // One number of sixteen changes its sign.
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[start..].chunks_exact_mut(64).for_each(|chunk| chunk[3] ^= 0x80);
    fs::write(dir.path().join("model.safetensors"), &bytes).unwrap();
    let second = ModelFiles::open(dir.path()).unwrap().base().unwrap();
    let apart = logits(&second, Some(&adapter), &golden);
    let fresh = Adapter::load(&folder("dora_ends_llama"), second.shapes()).unwrap();
    assert_eq!(apart, logits(&second, Some(&fresh), &golden), "norms of the first base were kept");
    assert!(furthest(&apart, &first) > 0.1);
}

#[test]
fn what_cannot_be_is_refused_with_what_can() {
    let refusal = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    // A GGUF-LoRA file has no place for magnitudes, nor this writer for branches on the tables.
    for (name, says) in [("dora_llama", "magnitudes"), ("ends_llama", "lm_head")] {
        let (Opened { golden, base, checkpoint, dir }, adapter) = decoder(name);
        let prompts = golden.sequences.clone();
        let source = Source { files: &checkpoint, base: &base, adapter: &adapter, prompts: &prompts, about: "" };
        let message = refusal(gguf::lora(&source, &dir.path().join("x.gguf")).map(|_| ()));
        assert!(message.contains(says) && message.contains("merge"), "{message}");
        assert!(!dir.path().join("x.gguf").exists());
    }
    // A scorer does not read the output table: a fresh one has no branch there, and one that has cannot train.
    let (Opened { golden, base, .. }, adapter) = decoder("ends_llama");
    let fresh = adapter.clone().with_head(1).unwrap();
    assert_eq!(fresh.pairs().count() + 1, adapter.pairs().count());
    assert!(fresh.outer(NonBlockModule::Head).is_none() && fresh.outer(NonBlockModule::Embedding).is_some());
    let adapter = adapter.with_score_head(fresh.head().cloned()).unwrap();
    let (batch, targets) = read(&golden);
    let scorer = ValueModel::new(&base, &fresh).unwrap();
    let (_, gradients) = scorer.gradients(&batch, &targets.rows, Recompute::Off, |v| Ok(v.to_vec())).unwrap();
    fresh.to_trainable().flat_gradients(&gradients).unwrap();
    let scorer = ValueModel::new(&base, &adapter).unwrap();
    let wanted = |v: &[f32]| Ok(v.to_vec());
    let message = refusal(scorer.gradients(&batch, &targets.rows, Recompute::Off, wanted).map(|_| ()));
    assert!(message.contains("lm_head") && message.contains("target_modules"), "{message}");
    // A magnitude that is missing from the file.
    let dir = tempfile::tempdir().unwrap();
    let (plain, at) = (folder("layers"), dir.path().join("a"));
    fs::create_dir(&at).unwrap();
    fs::copy(plain.join("adapter_model.safetensors"), at.join("adapter_model.safetensors")).unwrap();
    let config = fs::read_to_string(plain.join("adapter_config.json")).unwrap();
    fs::write(at.join("adapter_config.json"), config.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
    let (Opened { base, .. }, _) = decoder("layers");
    let message = refusal(Adapter::load(&at, base.shapes()).map(|_| ()));
    assert!(message.contains("lora_magnitude_vector is missing"), "{message}");
}

#[test]
fn a_table_that_peft_saved_below_a_branch_tells_another_base() {
    let (Opened { dir, .. }, _) = decoder("ends_llama");
    let model = Model::open(dir.path()).unwrap();
    model.adapter(&folder("ends_llama")).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[start..].chunks_exact_mut(64).for_each(|chunk| chunk[3] ^= 0x80);
    fs::write(&path, bytes).unwrap();
    let message = format!("{:#}", Model::open(dir.path()).unwrap().adapter(&folder("ends_llama")).unwrap_err());
    assert!(message.contains("another base") && message.contains("embed_tokens"), "{message}");
}
