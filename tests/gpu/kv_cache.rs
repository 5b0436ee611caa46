//! Generation with keys and values cached in q8_0: its launches, recorded and not; sequences that join and leave; how far its
//! log-probabilities are from those of a cache in the products' type; and that PPO's metrics show it.

use fourfold::config::{ImportanceSamplingCorrection, Ppo};
use fourfold::device::Device;
use fourfold::model::adapter::TargetModules;
use fourfold::model::base::Base;
use fourfold::model::batch::Batch;
use fourfold::model::generate::SamplingParams;
use fourfold::ops::attention::KvCacheType;
use fourfold::ops::weight::ComputeDtype;
use fourfold::report::Report;
use fourfold::train::session::Session;

use crate::decoding::{Watched, joining, prompts, refusing, rollout, settings, small};
use crate::parity::families;
use crate::ppo_world::{Roles, column, metrics, run_ppo};
use crate::stages::{adapters, model_on, short_ppo};
use crate::tiny_decoders::open;
use crate::world::*;

fn in_q8(base: Base) -> Base {
    base.caching_in(KvCacheType::Q8_0).unwrap()
}

#[test]
fn steps_issued_again_have_the_launches_and_tokens_of_steps_launch_by_launch() {
    let Some((kept, _)) = machine() else { return };
    let _time = timed("recorded decoding steps over a cache in q8_0");
    let (watched, device) = Watched::open(&kept, None);
    let (one_by_one, plain) = Watched::open(&refusing().0, None);
    let (base, other) = (in_q8(small(&device)), in_q8(small(&plain)));
    // Sequences that leave at steps of their own, and sequences that stay.
    let whole = SamplingParams { stop: vec![], max_new_tokens: 12, ..settings() };
    assert_eq!(rollout(&base, &prompts(), &settings()), rollout(&other, &prompts(), &settings()));
    drop((watched.log(), one_by_one.log()));
    let (got, want) = (rollout(&base, &prompts(), &whole), rollout(&other, &prompts(), &whole));
    assert_eq!(got, want);
    let steps = want.iter().map(|r| r.tokens.len()).max().unwrap() - 1;
    let (mut ours, theirs) = (watched.log(), one_by_one.log());
    ours.retain(|(kernel, _)| kernel != "sample_turn");
    assert!(ours == theirs, "{} launches, {} one by one", ours.len(), theirs.len());
    let count = |name: &str| ours.iter().filter(|(kernel, _)| kernel == name).count();
    for kernel in ["attention_append_q8_0_f16", "attention_decode_q8_0_f16"] {
        assert_eq!(count(kernel), 2 * steps, "{kernel}");
    }
    let other_cache = ["attention_append_f16", "attention_decode_f16", "attention_cache_write_f16"];
    assert!(other_cache.iter().all(|kernel| count(kernel) == 0));
    assert!(device.work().replays >= 5 && plain.work().replays == 0);
}

#[test]
fn sequences_join_and_leave_a_cache_in_q8_0_as_they_do_another() {
    let Some((_, device)) = machine() else { return };
    let (_, plain) = refusing();
    let (base, other) = (in_q8(small(&device)), in_q8(small(&plain)));
    let together = joining(&base, &[0, 1, 2, 3]);
    assert!(device.work().replays > 0);
    assert_eq!(together, joining(&other, &[0, 1, 2, 3]), "every bit, with and without recordings");
    for (i, together) in together.iter().enumerate() {
        let alone = joining(&base, &[i]).swap_remove(i);
        let near = |(a, b): (&(u32, f32), &(u32, f32))| a.0 == b.0 && (a.1 - b.1).abs() < 1e-3;
        assert!(alone.iter().zip(together).all(near), "{alone:?} {together:?}");
    }
}

/// Log-probabilities of the whole vocabulary after the prompts and each of `steps` given tokens.
fn distributions(base: &Base, steps: usize) -> Vec<Vec<f64>> {
    let adapter = adapter(base, TargetModules::AllLinear, 3, 5);
    let (vocab, prompts) = (base.config().vocab_size as u32, [41u32, 5, 60]);
    let of = |n: u32, seed: u32| (0..n).map(|i| (i * 17 + seed * 31 + 3) % vocab).collect::<Vec<u32>>();
    let sequences: Vec<Vec<u32>> = prompts.iter().zip(0..).map(|(&n, seed)| of(n, seed)).collect();
    let batch = Batch::new(&sequences).unwrap();
    let (mut hidden, mut cache) = base.prefill(&batch, &[0, 1, 2], Some(&adapter), steps).unwrap();
    let mut all = vec![];
    for step in 0..=steps as u32 {
        let logits = values(&base.logits(&hidden, Some(&adapter)).unwrap());
        for row in logits.chunks(vocab as usize) {
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            all.push(row.iter().map(|&l| f64::from(l) - sum.ln()).collect());
        }
        if step == steps as u32 {
            return all;
        }
        let tokens: Vec<u32> = (0..3).map(|s| (step * 29 + s * 101 + 7) % vocab).collect();
        let positions = prompts.map(|n| n + step);
        hidden = base.decode(&tokens, &positions, Some(&adapter), &mut cache).unwrap();
    }
    unreachable!("the last step returns")
}

/// Root mean square and largest difference of log-probabilities, nats, after the prompts alone and later.
fn apart(got: &[Vec<f64>], want: &[Vec<f64>]) -> [(f64, f64); 2] {
    [0..3, 3..want.len()].map(|rows| {
        let pairs = || rows.clone().flat_map(|i| got[i].iter().zip(&want[i])).map(|(a, b)| (a - b).abs());
        let squares: f64 = pairs().map(|d| d * d).sum();
        ((squares / pairs().count() as f64).sqrt(), pairs().fold(0.0, f64::max))
    })
}

/// Root mean square and largest difference of log-probabilities that a cache in q8_0 makes on the quickstart's base under a drawn
/// adapter, over the whole vocabulary, nats; about twice what was measured.
const APART: [(ComputeDtype, f64, f64); 3] =
    [(ComputeDtype::F32, 0.018, 0.1), (ComputeDtype::F16, 0.016, 0.13), (ComputeDtype::Bf16, 0.032, 0.22)];

#[test]
fn log_probabilities_over_a_cache_in_q8_0_are_near_those_of_another() {
    let Some(device) = emulated() else { return };
    let _time = timed("log-probabilities over a cache in q8_0");
    for (compute, most, most_of_one) in APART {
        let base = |device: &Device| on(embedded(4).base().unwrap().computing_in(compute), device);
        let (got, want) = (distributions(&in_q8(base(&device)), 20), distributions(&base(&device), 20));
        let [prompts, (rms, largest)] = apart(&got, &want);
        say(&format!(
            "{}, cache in q8_0: log-probabilities {rms:.1e} nats apart (rms), at most {largest:.1e}",
            compute.name()
        ));
        assert_eq!(prompts, (0.0, 0.0), "the pass over the prompts reads no cache");
        assert!(rms > most / 50.0 && rms < most && largest < most_of_one, "{compute:?}: {rms} {largest}");
    }
}

#[test]
fn metrics_of_ppo_show_a_cache_in_q8_0_and_the_correction_begins_at_ratio_one() {
    let Some(device) = emulated() else { return };
    let _time = timed("PPO over a cache in q8_0");
    let first = |kind: KvCacheType, correction: ImportanceSamplingCorrection| {
        let mut model = model_on(2, ComputeDtype::F32, Some(&device));
        model.base = model.base.caching_in(kind).unwrap();
        let (sft, rm) = adapters(&model);
        let dir = tempfile::tempdir().unwrap();
        let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
        let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
        let config = Ppo { total_episodes: 4, importance_sampling_correction: correction, ..short_ppo() };
        run_ppo(roles, &model, &config, 2, &mut session);
        let lines = metrics(dir.path());
        let of = |key: &str| column(&lines, key)[0];
        (of("val/first_ratio"), of("sampling/sampling_logp_difference/mean"))
    };
    let none = ImportanceSamplingCorrection::None;
    let (ratio, plain) = first(KvCacheType::Auto, none);
    assert!((ratio - 1.0).abs() < 1e-4 && plain < 1e-5, "{ratio} {plain}");
    let (ratio, shown) = first(KvCacheType::Q8_0, none);
    say(&format!("PPO over a cache in q8_0: first ratio {ratio:.6}, sampler and trainer {shown:.1e} nats apart"));
    // Measured: 0.0026.
    assert!(shown > 20.0 * plain && shown < 0.006, "{shown} {plain}");
    assert!((ratio - 1.0).abs() > 1e-6, "{ratio}");
    // Recomputed log-probabilities are the trainer's, and the difference is still shown.
    let (ratio, corrected) = first(KvCacheType::Q8_0, ImportanceSamplingCorrection::TokenTruncate);
    assert!((ratio - 1.0).abs() < 1e-6, "{ratio}");
    assert_eq!(corrected, shown);
}

#[test]
fn a_model_whose_heads_are_no_whole_blocks_is_refused() {
    let base = open(&families()[0]).base;
    let dim = base.config().head_dim;
    assert_ne!(dim % 32, 0);
    let error = base.caching_in(KvCacheType::Q8_0).err().unwrap().to_string();
    assert!(error.contains(&format!("the heads of this model have {dim}; remove it")), "{error}");
}
