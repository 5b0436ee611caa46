//! The dry machine against the emulated one: after every allocation of every kind of pass, both have the same number of bytes
//! in use. So the planner may run passes on the dry machine and believe it.

use std::sync::{Arc, Mutex};

use fourfold::device::{Device, Usage};
use fourfold::model::adapter::{Adapter, TargetModules};
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::init::dora::with_magnitudes;
use fourfold::model::readers::{Reader, Sharing};
use fourfold::model::roles::{HeadGradients, Policy, ValueModel};
use fourfold::ops::attention::KvCacheType;
use fourfold::ops::linear::gpu::Dequantising;
use fourfold::ops::sample::{Distribution, Sampler};
use fourfold::ops::storage::dtype::StorageDType;
use fourfold::ops::weight::ComputeDtype;

use crate::world::*;

/// What one run allocates: the name of each part, and the usage after each allocation and at the end of the part.
type Log = Vec<(&'static str, Vec<Usage>)>;

struct Shape {
    layers: usize,
    lengths: &'static [usize],
    response: usize,
    compute: ComputeDtype,
    quantised: Option<StorageDType>,
    recompute: Recompute,
    dora: bool,
    ends: bool,
    /// Layers that the device does not keep.
    offload: usize,
    kv_cache_type: KvCacheType,
    dequantise: Dequantising,
}

/// Runs every kind of pass on one device.
fn run(shape: &Shape, device: &Device) -> Log {
    let (log, usages) = (Mutex::new(Log::new()), Arc::new(Mutex::new(vec![])));
    let kept = usages.clone();
    device.watch(move |usage| kept.lock().unwrap().push(usage));
    let part = |name: &'static str, work: &mut dyn FnMut()| {
        work();
        let mut seen = std::mem::take(&mut *usages.lock().unwrap());
        seen.push(device.usage());
        log.lock().unwrap().push((name, seen));
    };
    let mut base: Option<Base> = None;
    part("load", &mut || {
        let files = embedded(shape.layers).quantised(shape.quantised);
        let opened = files.base().unwrap().computing_in(shape.compute).caching_in(shape.kv_cache_type).unwrap();
        opened.set_dequantise(shape.dequantise);
        base = Some(opened.streaming(Some(device.clone()), shape.offload, |_, _| {}).unwrap());
    });
    let base = &base.unwrap();
    let targets = match shape.ends {
        true => TargetModules::List(["q_proj", "down_proj", "embed_tokens", "lm_head"].map(String::from).to_vec()),
        false => TargetModules::AllLinear,
    };
    let fresh = || -> Adapter {
        let adapter = adapter(base, targets.clone(), 3, 5);
        if shape.dora { with_magnitudes(&adapter, base).unwrap() } else { adapter }
    };
    let (actor, reference, reward) =
        (fresh(), fresh(), adapter(base, TargetModules::AllLinear, 2, 6).with_head(3).unwrap());
    let vocab = base.config().vocab_size as u32;
    let of = |n: usize, seed: u32| (0..n as u32).map(|i| (i * 17 + seed * 31 + 3) % vocab).collect::<Vec<u32>>();
    let sequences: Vec<Vec<u32>> = shape.lengths.iter().zip(0..).map(|(&n, s)| of(n + shape.response, s)).collect();
    let batch = Batch::new(&sequences).unwrap();
    let responses = Targets::responses(&batch, &vec![shape.response; sequences.len()]).unwrap();
    let each = |v: f32| vec![v; responses.rows.len()];
    let policy = Policy::new(base, Some(&actor));
    let bare = Policy::new(base, Some(&reference));
    part("generate", &mut || {
        // The prompts, then given tokens: what is drawn would depend on the numbers.
        let prompts: Vec<Vec<u32>> = shape.lengths.iter().zip(0..).map(|(&n, s)| of(n, s)).collect();
        let sources: Vec<usize> = (0..prompts.len()).chain([0]).collect();
        let capacity = shape.response / 2;
        let (mut hidden, mut cache) =
            base.prefill(&Batch::new(&prompts).unwrap(), &sources, Some(&actor), capacity).unwrap();
        let mut live: Vec<usize> = sources.iter().map(|&s| prompts[s].len()).collect();
        let by = Distribution { temperature: 1.0, top_k: 0, top_p: 0.9 };
        for step in 0..shape.response {
            let logits = base.logits_in_place(&hidden, Some(&actor)).unwrap();
            Sampler::default().sample(&logits, by, &vec![0.5; live.len()]).unwrap();
            if step == 2 {
                let keep: Vec<bool> = (0..live.len()).map(|i| i != 1).collect();
                cache.retain(&keep);
                live.remove(1);
            }
            let tokens = vec![7; live.len()];
            let positions: Vec<u32> = live.iter().map(|&n| (n + step) as u32).collect();
            hidden = base.decode(&tokens, &positions, Some(&actor), &mut cache).unwrap();
        }
    });
    part("score", &mut || {
        policy.logprobs(&batch, &responses, 0.7).unwrap();
        ValueModel::new(base, &reward).unwrap().scores(&batch).unwrap();
    });
    part("sft", &mut || {
        let all: Vec<bool> = batch.positions().iter().map(|&p| p > 0 && p % 3 != 2).collect();
        let targets = Targets::masked(&batch, &all).unwrap();
        let ones = vec![1.0; targets.rows.len()];
        let zeros = vec![0.0; targets.rows.len()];
        policy.gradients(&batch, &targets, 1.0, shape.recompute, |_| Ok((ones.clone(), zeros.clone()))).unwrap();
    });
    part("reward", &mut || {
        let model = ValueModel::new(base, &reward).unwrap();
        model.gradients(&batch, &batch.last_rows(), shape.recompute, |v| Ok(vec![0.5; v.len()])).unwrap();
    });
    part("dpo", &mut || {
        bare.logprobs(&batch, &responses, 1.0).unwrap();
        policy.gradients(&batch, &responses, 1.0, shape.recompute, |_| Ok((each(0.4), each(0.0)))).unwrap();
    });
    part("ppo", &mut || {
        let theirs = bare.rows(&batch, &responses).unwrap();
        bare.logprobs_of(&theirs, &responses, 1.0).unwrap();
        let mine = policy.rows(&batch, &responses).unwrap();
        policy.kl(&mine, (bare, &theirs), 1.0).unwrap();
        drop(mine);
        let model = ValueModel::new(base, &reward).unwrap();
        model.values(&batch, &responses.rows).unwrap();
        let d = || HeadGradients { logprobs: each(0.4), entropy: each(0.1), kl: Some(each(0.2)) };
        policy
            .gradients_against(&batch, &responses, Some((bare, &theirs)), 1.0, shape.recompute, |_, _| Ok(d()))
            .unwrap();
        model.gradients(&batch, &responses.rows, shape.recompute, |v| Ok(vec![0.5; v.len()])).unwrap();
    });
    part("readers", &mut || {
        let last = batch.last_rows();
        let of = |adapter, rows| Reader { adapter, rows };
        let readers = [
            of(Some(&actor), &responses.rows[..]),
            of(None, &last),
            of(Some(&reward), &last),
            of(Some(&reference), &last),
        ];
        for sharing in Sharing::ALL {
            base.read(&batch, &readers, sharing, |_, rows| rows.to_host().map(drop)).unwrap();
        }
    });
    part("a new adapter", &mut || {
        let next = drawn(&actor, 10);
        Policy::new(base, Some(&next)).logprobs(&batch, &responses, 1.0).unwrap();
    });
    log.into_inner().unwrap()
}

#[test]
fn the_dry_machine_has_the_same_bytes_in_use_after_every_allocation() {
    let Some((machine, device)) = machine() else { return };
    let _time = timed("dry against emulated");
    let small = Shape {
        layers: 1,
        lengths: &[5, 3],
        response: 4,
        compute: ComputeDtype::F32,
        quantised: None,
        recompute: Recompute::Off,
        dora: true,
        ends: false,
        offload: 0,
        kv_cache_type: KvCacheType::Auto,
        dequantise: Dequantising::InTurn,
    };
    let shapes = [
        Shape { layers: 2, lengths: &[1, 21, 9], response: 6, compute: ComputeDtype::Bf16, dora: false, ..small },
        Shape {
            layers: 3,
            offload: 3,
            lengths: &[30, 41, 2],
            compute: ComputeDtype::F16,
            quantised: Some(StorageDType::Q8_0),
            recompute: Recompute::Block,
            ends: true,
            ..small
        },
        Shape { recompute: Recompute::Mlp, offload: 1, ..small },
        Shape { recompute: Recompute::Offload, layers: 3, ..small },
        Shape { recompute: Recompute::Offload, layers: 3, offload: 2, compute: ComputeDtype::F16, ends: true, ..small },
        Shape { compute: ComputeDtype::F16, kv_cache_type: KvCacheType::Q8_0, layers: 2, response: 6, ..small },
        Shape {
            layers: 2,
            offload: 1,
            lengths: &[30, 41, 2],
            compute: ComputeDtype::F16,
            quantised: Some(StorageDType::Q8_0),
            recompute: Recompute::Block,
            dequantise: Dequantising::Kept,
            ..small
        },
        Shape {
            layers: 2,
            lengths: &[30, 41, 2],
            compute: ComputeDtype::F16,
            recompute: Recompute::Mlp,
            dequantise: Dequantising::Ahead,
            dora: false,
            ..small
        },
    ];
    let mut count = 0;
    for (i, shape) in shapes.iter().enumerate() {
        let dry = Device::dry();
        let before = device.usage();
        assert_eq!((machine.live(), before.live), (0, 0), "all memory came back");
        let (emulated, dry) = (run(shape, &device), run(shape, &dry));
        for ((part, emulated), (_, dry)) in emulated.iter().zip(&dry) {
            assert_eq!(emulated.len(), dry.len(), "shape {i}, {part}: allocations");
            for (at, (e, d)) in emulated.iter().zip(dry).enumerate() {
                let same = e.live == d.live && e.allocations - before.allocations == d.allocations;
                assert!(same, "shape {i}, {part}, allocation {at}: emulated {e:?}, dry {d:?}");
            }
            count += emulated.len();
        }
        assert!(emulated.iter().all(|(_, usages)| usages.len() > 1));
        device.reset_peak();
    }
    say(&format!("dry against emulated: {count} allocations, all equal"));
}
