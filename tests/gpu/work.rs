//! What passes issue to a device, counted on the dry machine: launches and waits cost fixed time each, whatever a card can do
//! beside them. Limits are those of the code as it is; whoever fuses kernels lowers them.

use fourfold::device::{Device, Work};
use fourfold::model::adapter::TargetModules;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::decoding::Decoding;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::ops::sample::{Distribution, Sampler};
use fourfold::ops::storage::dtype::StorageDType;
use fourfold::ops::weight::ComputeDtype;

use crate::world::*;

const LAYERS: usize = 4;

/// What `pass` issues for a base of four blocks with branches on all linear layers, beyond what its first run does.
fn of(pass: impl Fn(Policy<'_>, ValueModel<'_>)) -> Work {
    let device = Device::dry();
    let base = on(
        embedded(LAYERS).quantised(Some(StorageDType::Q8_0)).base().unwrap().computing_in(ComputeDtype::F16),
        &device,
    );
    let actor = adapter(&base, TargetModules::AllLinear, 3, 5);
    let critic = adapter(&base, TargetModules::AllLinear, 3, 6).with_head(3).unwrap();
    let run = || pass(Policy::new(&base, Some(&actor)), ValueModel::new(&base, &critic).unwrap());
    run();
    let before = device.work();
    run();
    device.work() - before
}

#[test]
fn a_decoding_step_is_thirteen_launches_a_layer() {
    let by = Distribution { temperature: 1.0, top_k: 0, top_p: 1.0 };
    let steps = |steps: u32| {
        of(|policy, _| {
            let prompts = Batch::new(&[vec![3, 4, 5], vec![6, 7]]).unwrap();
            let (_, mut cache) = policy.base().prefill(&prompts, &[0, 1], policy.adapter(), 40).unwrap();
            for step in 0..steps {
                let hidden =
                    policy.base().decode(&[1, 2], &[3 + step, 2 + step], policy.adapter(), &mut cache).unwrap();
                let logits = policy.base().logits_in_place(&hidden, policy.adapter()).unwrap();
                Sampler::default().sample(&logits, by, &[0.5; 2]).unwrap();
            }
        })
    };
    let one = steps(3) - steps(2);
    // A norm, z, q k v, rotation and cache, attention, z and the output projection; a norm, z, gate and up, activation, z, down.
    let outside = one.launches.saturating_sub(13 * LAYERS);
    // The embedding, the last norm and the lm_head, and two to sample.
    assert!(outside <= 6, "{one:?}: {outside} launches outside of the blocks");
    assert_eq!(one.products, 0, "{one:?}");
    assert_eq!(one.downloads, 1, "the sampled tokens and nothing else: {one:?}");
    assert!(one.uploads <= 4, "tokens, positions, lengths, draws: {one:?}");
    assert!(one.copied <= 128, "logits of two sequences alone are {}: {one:?}", 2 * 4 * 1024);
}

#[test]
fn a_step_like_the_one_before_is_one_upload_one_replay_and_one_download() {
    let by = Distribution { temperature: 1.0, top_k: 0, top_p: 1.0 };
    let steps = |steps: u32| {
        of(|policy, _| {
            let prompts = Batch::new(&[vec![3, 4, 5], vec![6, 7]]).unwrap();
            let mut decoding = Decoding::start(policy, &prompts, &[0, 1], 40, by).unwrap();
            decoding.first(&[0.5; 2]).unwrap();
            for step in 0..steps {
                decoding.step(&[1, 2], &[3 + step, 2 + step], &[0.5; 2]).unwrap();
            }
        })
    };
    // The first step runs as it is, the second is recorded.
    let (second, third) = (steps(2) - steps(1), steps(3) - steps(2));
    assert!(second.launches > 13 * LAYERS && second.replays == 0, "{second:?}");
    // Draws, tokens, positions, slots, lengths and rows of two sequences; two drawn tokens with what their log-probabilities are
    // of.
    let copied = 2 * (8 + 4 * 5) + 2 * 16;
    assert_eq!(
        third,
        Work {
            launches: 0,
            beside: 0,
            replays: 1,
            products: 0,
            uploads: 1,
            downloads: 1,
            copied,
            streamed: 0,
            spilled: 0
        }
    );
}

#[test]
fn nothing_waits_for_the_device_within_a_backward() {
    let ids = |n: u32| (0..n).map(|i| i % 90 + 3).collect::<Vec<u32>>();
    let (one, all) = (Recompute::Block, Recompute::Off);
    for recompute in [one, all] {
        let policy = of(|policy, _| {
            let batch = Batch::new(&[ids(20), ids(31)]).unwrap();
            let targets = Targets::responses(&batch, &[7, 9]).unwrap();
            let (_, gradients) =
                policy.gradients(&batch, &targets, 1.0, recompute, |_| Ok((vec![0.5; 16], vec![0.0; 16]))).unwrap();
            assert!(gradients.layers.iter().flatten().flatten().all(|g| g.a.place().is_some()));
        });
        assert!(policy.downloads <= 4, "statistics of the targets: {policy:?}");
        let value = of(|_, model| {
            let batch = Batch::new(&[ids(20), ids(31)]).unwrap();
            model.gradients(&batch, &[3, 40], recompute, |v| Ok(vec![0.5; v.len()])).unwrap();
        });
        assert!(value.downloads <= 3, "values, and the head's gradients: {value:?}");
    }
}
