//! LoRA's variants against PEFT, over the quickstart's base. tests/golden/peft_variants.py printed the numbers.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fourfold::config::{Compat, InitLoraWeights, Lora};
use fourfold::export::Source;
use fourfold::export::combine::combine;
use fourfold::export::merged::{Kind, MAX_SHARD_SIZE, MergedType, Settings, merge};
use fourfold::model::adapter::{Adapter, Gradients, Init, LoraConfig, TargetModules};
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::init::dora::with_magnitudes;
use fourfold::model::init::pissa_olora::{Principal, principal};
use fourfold::model::roles::Policy;
use fourfold::model_files::ModelFiles;
use fourfold::ops::weight::{ComputeDtype, StorageDType};
use fourfold::run::Model;
use fourfold::train::adamw::AdamWConfig;
use fourfold::train::learner::Learner;
use serde_json::Value;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/peft_variants/values.json")).unwrap()
}

fn model() -> Model {
    Model::open(&here("src/quickstart/assets/base")).unwrap()
}

fn saved(model: &Model, name: &str) -> Adapter {
    model.adapter(&here("tests/golden/peft_variants").join(name)).unwrap()
}

fn logprobs(model: &Model, adapter: Option<&Adapter>) -> Vec<f32> {
    logprobs_of(&golden(), model, adapter)
}

/// Of the golden's tokens.
fn logprobs_of(golden: &Value, model: &Model, adapter: Option<&Adapter>) -> Vec<f32> {
    let ids: Vec<u32> = golden["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
    let batch = Batch::new(&[ids]).unwrap();
    let targets = Targets::responses(&batch, &[batch.tokens().len() - 1]).unwrap();
    Policy::new(&model.base, adapter).logprobs(&batch, &targets, 1.0).unwrap().logprobs
}

/// Two orders of f32 sums differ by some 1e-6 here and the file has six digits; a wrong scale or rank by 0.1.
fn assert_near(got: &[f32], want: &Value, what: &str) {
    let want: Vec<f32> = want.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    assert_eq!(got.len(), want.len());
    let furthest = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(furthest < 1e-4, "{what}: {furthest}");
}

fn merged(model: &Model, adapter: &Adapter) -> Vec<f32> {
    merged_of(&golden(), model, adapter)
}

fn merged_of(golden: &Value, model: &Model, adapter: &Adapter) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, base, out) = (&model.checkpoint, &model.base, dir.path().join("merged"));
    let source = Source { files: checkpoint, base, adapter, prompts: &[vec![5, 6, 7, 8]], about: "" };
    let how = Settings { dtype: MergedType::F32, kind: Kind::LanguageModel, max_shard_size: MAX_SHARD_SIZE };
    merge(&source, how, &out).unwrap();
    logprobs_of(golden, &Model::open(&out).unwrap(), None)
}

#[test]
fn rank_and_alpha_patterns_are_pefts_merged_and_unmerged_and_survive_saving() {
    let (model, golden) = (model(), golden());
    let adapter = saved(&model, "patterns");
    let rank = |layer, linear| adapter.pair(layer, linear).unwrap().a.dims()[0];
    assert_eq!((rank(2, 0), rank(1, 0), rank(0, 6), rank(1, 6)), (4, 1, 3, 2));
    assert_near(&logprobs(&model, Some(&adapter)), &golden["patterns"], "unmerged");
    assert_near(&merged(&model, &adapter), &golden["patterns_merged"], "merged");
    let dir = tempfile::tempdir().unwrap();
    adapter.save(&dir.path().join("again")).unwrap();
    let again = model.adapter(&dir.path().join("again")).unwrap();
    assert_eq!(again.config(), adapter.config());
    assert_near(&logprobs(&model, Some(&again)), &golden["patterns"], "saved again");
}

#[test]
fn excluded_modules_and_patterns_of_layers_are_pefts_as_saved_and_as_a_state_dict() {
    let model = model();
    let golden: Value = serde_json::from_str(include_str!("../golden/peft_selection/values.json")).unwrap();
    let modules: Vec<&str> = golden["modules"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    let dir = tempfile::tempdir().unwrap();
    let check = |adapter: &Adapter, what: &str| {
        let mut paths: Vec<String> = adapter.pairs().map(|(slot, _)| adapter.shapes().path(slot)).collect();
        paths.sort();
        assert_eq!(paths, modules, "{what}");
        assert_near(&logprobs_of(&golden, &model, Some(adapter)), &golden["logprobs"], what);
    };
    for name in ["excluded", "state_dict"] {
        let adapter = model.adapter(&here("tests/golden/peft_selection").join(name)).unwrap();
        check(&adapter, name);
        let again = dir.path().join(name);
        adapter.save(&again).unwrap();
        let again = model.adapter(&again).unwrap();
        assert_eq!(again.config(), adapter.config());
        check(&again, "saved again");
    }
}

fn started(model: &Model, how: Principal) -> Adapter {
    let list = ["q_proj", "v_proj", "up_proj", "down_proj"].map(String::from).to_vec();
    let config = LoraConfig {
        r: 4,
        lora_alpha: 6.0,
        use_rslora: how == Principal::Olora,
        target_modules: TargetModules::List(list),
        rank_pattern: if how == Principal::Pissa { vec![("v_proj".into(), 2)] } else { vec![] },
        ..LoraConfig::default()
    };
    principal(&Adapter::init(config, model.base.shapes(), 1).unwrap(), &model.base, how).unwrap()
}

/// scale * B0 A0 of every map, times a fixed vector.
fn assert_products(model: &Model, adapter: &Adapter, probes: &Value) {
    for (path, want) in probes.as_object().unwrap() {
        let (layer, linear) = model.base.shapes().find(&format!("{path}.weight")).unwrap();
        let pair = adapter.pair(layer, linear).unwrap();
        let (r, n) = (pair.a.dims()[0] / 2, pair.a.dims()[1]);
        let probe: Vec<f32> = (0..n).map(|i| (i as f32).cos()).collect();
        let probe = Tensor::from_vec(probe, (n, 1), &Device::Cpu).unwrap();
        let (a, b) = (pair.a.narrow(0, 0, r).unwrap(), pair.b.narrow(1, 0, r).unwrap().contiguous().unwrap());
        let product = (b.matmul(&a.matmul(&probe).unwrap()).unwrap() * pair.scale).unwrap();
        let product: Vec<f32> = product.flatten_all().unwrap().to_vec1().unwrap();
        assert_near(&product[..6], want, path);
    }
}

/// The quickstart's base in Q4_0, which is what PEFT had the numbers of.
fn four_bits() -> (Model, Value) {
    let checkpoint = ModelFiles::open(&here("src/quickstart/assets/base")).unwrap().quantised(Some(StorageDType::Q4_0));
    let model = Model::of(checkpoint).unwrap();
    let stored = |name: &str| if name.contains("embed") { StorageDType::Q8_0 } else { StorageDType::Q4_0 };
    assert!(model.base.weights().iter().all(|(name, w)| w.dtype() == stored(name)));
    (model, serde_json::from_str(include_str!("../golden/peft_quantised/values.json")).unwrap())
}

#[test]
fn dora_over_four_bits_is_pefts_over_the_dequantised_numbers_merged_and_unmerged() {
    let (model, golden) = four_bits();
    assert_near(&logprobs_of(&golden, &model, None), &golden["bare"], "bare");
    let adapter = model.adapter(&here("tests/golden/peft_quantised/dora")).unwrap();
    assert!(adapter.config().use_dora && adapter.pairs().all(|(_, pair)| pair.magnitude.is_some()));
    assert_near(&logprobs_of(&golden, &model, Some(&adapter)), &golden["dora"], "dora");
    assert_near(&merged_of(&golden, &model, &adapter), &golden["dora_merged"], "merged");
    let rounded = logprobs_of(&golden, &model.computing_in(ComputeDtype::Bf16), Some(&adapter));
    let apart = rounded
        .iter()
        .zip(golden["dora"].as_array().unwrap())
        .map(|(a, b)| (f64::from(*a) - b.as_f64().unwrap()).abs());
    // Four blocks of products rounded to 2^-9; without its magnitudes the model is nats away.
    assert!(apart.fold(0.0, f64::max) < 0.2);
}

#[test]
fn pissa_and_olora_start_from_four_bits_as_pefts_do_from_the_dequantised_numbers() {
    let (model, golden) = four_bits();
    for (name, how) in [("pissa", Principal::Pissa), ("olora", Principal::Olora)] {
        let adapter = started(&model, how);
        assert_products(&model, &adapter, &golden[name]["probes"]);
        assert_near(&logprobs_of(&golden, &model, Some(&adapter)), &golden[name]["start"], "start");
    }
}

#[test]
fn pissa_and_dora_go_together() {
    let model = model();
    let plain = started(&model, Principal::Pissa);
    let adapter = with_magnitudes(&plain, &model.base).unwrap();
    assert!(adapter.frozen_half() && adapter.config().use_dora);
    let (with, without) = (logprobs(&model, Some(&adapter)), logprobs(&model, None));
    let apart = with.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-4, "the start is the base: {apart}");
    let (learner, halves) = (adapter.to_trainable(), plain.to_trainable());
    let magnitudes = adapter.pairs().count();
    assert_eq!(learner.parameters().unwrap().len(), halves.parameters().unwrap().len() + magnitudes);
}

#[test]
fn lora_compat_dschat_is_deepspeed_chats_scale_and_start() {
    let model = model();
    let lora = Lora { r: 4, compat: Some(Compat::Dschat), ..Lora::default() };
    let adapter = model.fresh_adapter(&lora, 1).unwrap();
    for (_, pair) in adapter.pairs() {
        assert_eq!(pair.scale, 0.25, "1 / r whatever lora_alpha");
        let a: Vec<f32> = pair.a.flatten_all().unwrap().to_vec1().unwrap();
        let top = a.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(top <= 0.5 && top > 0.49, "uniform within 1 / sqrt(r): {top}");
    }
    let explicit = Lora { compat: None, lora_alpha: 1.0, init_lora_weights: InitLoraWeights::Dschat, ..lora };
    let same = model.fresh_adapter(&explicit, 1).unwrap();
    for ((name, a), (_, b)) in adapter.named_tensors().into_iter().zip(same.named_tensors()) {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(a), values(b), "{name}");
    }
}

#[test]
fn pissa_and_olora_start_where_pefts_do_and_train_and_save_as_its_conversion_does() {
    let (model, golden) = (model(), golden());
    for (name, how) in [("pissa", Principal::Pissa), ("olora", Principal::Olora)] {
        let golden = &golden[name];
        let adapter = started(&model, how);
        // 1. The same product scale * B0 A0 in every map.
        assert_products(&model, &adapter, &golden["probes"]);
        // 2. The adapted model starts as the base.
        assert_near(&logprobs(&model, Some(&adapter)), &golden["start"], "start");
        // 3. A changed B and A: PEFT's model, its merge and its conversion, and ours alike.
        let mut learner = adapter.to_trainable();
        let names = learner.names();
        let changed = learner.parameters().unwrap().into_iter().zip(&names);
        let changed = changed.map(|(t, name)| (t * if name.contains("lora_B") { 1.25 } else { 0.5 }).unwrap());
        learner.replace(changed.collect()).unwrap();
        let trained = learner.snapshot();
        assert_near(&logprobs(&model, Some(&trained)), &golden["trained"], "trained");
        assert_near(&logprobs(&model, Some(&trained)), &golden["converted"], "converted");
        assert_near(&merged(&model, &trained), &golden["merged"], "merged");
        // 4. Saved, it is a plain LoRA of twice the rank, and comes back with its frozen half.
        let dir = tempfile::tempdir().unwrap();
        trained.save(&dir.path().join("a")).unwrap();
        let back = model.adapter(&dir.path().join("a")).unwrap();
        assert!(back.frozen_half() && back.config().r == 8);
        assert_near(&logprobs(&model, Some(&back)), &golden["converted"], "saved");
    }
}

#[test]
fn a_step_moves_the_half_that_trains_and_leaves_the_frozen_one() {
    let model = model();
    let start = started(&model, Principal::Pissa);
    let mut learner = Learner::new(start.to_trainable(), AdamWConfig::default(), 0.0).unwrap();
    let ones = |t: &Tensor| t.ones_like().unwrap();
    let mut gradients = Gradients::none(start.layers().len());
    for (to, from) in gradients.layers.iter_mut().flatten().zip(start.layers().iter().flatten()) {
        *to = from.as_ref().map(|p| (ones(&p.a), ones(&p.b)).into());
    }
    learner.step(gradients, 0.01).unwrap();
    for (before, after) in start.layers().iter().flatten().zip(learner.weights().view().layers().iter().flatten()) {
        let (Some(before), Some(after)) = (before, after) else { continue };
        let half = before.a.dims()[0] / 2;
        for (before, after, dim) in [(&before.a, &after.a, 0), (&before.b, &after.b, 1)] {
            let part = |t: &Tensor, from| -> Vec<f32> {
                t.narrow(dim, from, half).unwrap().contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            assert_eq!(part(before, half), part(after, half));
            assert!(part(before, 0).iter().zip(part(after, 0)).all(|(b, a)| b - a > 0.009), "a step of the rate");
        }
    }
}

#[test]
fn a_loraplus_ratio_makes_b_step_further_and_nothing_else() {
    let model = model();
    let start = Adapter::init(LoraConfig::default(), model.base.shapes(), 1).unwrap().with_head(2).unwrap();
    let start = start.with_loraplus_lr_ratio(16.0);
    let mut learner = Learner::new(start.to_trainable(), AdamWConfig::default(), 0.0).unwrap();
    let ones = |t: &Tensor| t.ones_like().unwrap();
    let mut gradients = Gradients::none(start.layers().len());
    for (to, from) in gradients.layers.iter_mut().flatten().zip(start.layers().iter().flatten()) {
        *to = from.as_ref().map(|p| (ones(&p.a), ones(&p.b)).into());
    }
    gradients.head_weight = start.head().map(|h| ones(&h.weight));
    learner.step(gradients, 1e-3).unwrap();
    for ((name, before), (_, after)) in start.named_tensors().iter().zip(learner.weights().view().named_tensors()) {
        let moved: Vec<f32> = (*before - after).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        // Adam's first step is the rate, whatever the gradient.
        let want = if name.contains("lora_B") { 16e-3 } else { 1e-3 };
        assert!(moved.iter().all(|m| (m - want).abs() < 1e-6), "{name}");
    }
}

#[test]
fn a_sum_of_adapters_is_pefts_cat() {
    let (model, golden) = (model(), golden());
    let (one, two) = (saved(&model, "one"), saved(&model, "two"));
    let sum = combine(&[(&one, 0.7), (&two, -0.4)]).unwrap();
    assert_near(&logprobs(&model, Some(&sum)), &golden["cat"], "cat");
    assert!(combine(&[]).is_err() && combine(&[(&one, f64::NAN)]).is_err());
}

#[test]
fn deepspeed_chats_start_is_uniform_over_the_rank_and_the_gaussian_of_deviation_one_over_r() {
    let shapes = model().base.shapes();
    let config = LoraConfig { r: 16, lora_alpha: 1.0, ..LoraConfig::default() };
    let a = |init| -> Vec<f32> {
        let adapter = Adapter::init_as(config.clone(), shapes, 1, init).unwrap();
        adapter.pair(0, 6).unwrap().a.flatten_all().unwrap().to_vec1().unwrap()
    };
    let deviation = |v: &[f32]| (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt();
    // 16 x 384 draws: a standard deviation is known to 1%. Of U(±b) it is b / sqrt(3).
    let (uniform, normal) = (a(Init::DeepSpeedChat), a(Init::Gaussian));
    assert!(uniform.iter().all(|x| x.abs() <= 0.25) && (deviation(&uniform) * 3f32.sqrt() - 0.25).abs() < 0.01);
    assert!((deviation(&normal) - 1.0 / 16.0).abs() < 0.003);
    assert_eq!(config.scaling(), 1.0 / 16.0);
}
