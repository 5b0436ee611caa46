//! Products in bf16 and f16 on the emulated machine: how far log-probabilities are from the host's f32, and that gradients of
//! a small loss survive f16.

use fourfold::device::Device;
use fourfold::model::adapter::{Adapter, TargetModules};
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::roles::{HeadGradients, Policy, ValueModel};
use fourfold::ops::weight::ComputeDtype;

use crate::world::*;

fn base(compute: ComputeDtype, device: Option<&Device>) -> Base {
    let base = embedded(3).base().unwrap().computing_in(compute);
    match device {
        Some(device) => on(base, device),
        None => base,
    }
}

fn batch(base: &Base) -> (Batch, Targets) {
    let vocab = base.config().vocab_size as u32;
    let of = |n: u32, step: u32| (0..n).map(|i| (i * step + 5) % vocab).collect::<Vec<u32>>();
    let batch = Batch::new(&[of(33, 17), of(6, 29), of(19, 7)]).unwrap();
    let targets = Targets::responses(&batch, &[30, 5, 12]).unwrap();
    (batch, targets)
}

fn rms(got: &[f32], want: &[f32]) -> f64 {
    let squares: f64 = got.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (squares / got.len() as f64).sqrt()
}

#[test]
fn log_probabilities_in_bf16_and_f16_are_near_those_of_f32() {
    let Some(device) = emulated() else { return };
    let _time = timed("log-probabilities in bf16 and f16");
    let host = base(ComputeDtype::F32, None);
    let adapter = adapter(&host, TargetModules::AllLinear, 4, 3);
    let (batch, targets) = batch(&host);
    let want = Policy::new(&host, Some(&adapter)).logprobs(&batch, &targets, 1.0).unwrap();
    for (compute, bound) in [(ComputeDtype::Bf16, BF16), (ComputeDtype::F16, F16)] {
        let there = base(compute, Some(&device));
        let got = Policy::new(&there, Some(&adapter)).logprobs(&batch, &targets, 1.0).unwrap();
        let (e, h) = (rms(&got.logprobs, &want.logprobs), rms(&got.entropy, &want.entropy));
        say(&format!("{}: log-probabilities {e:.1e} nats from f32 (rms), entropies {h:.1e}", compute.name()));
        assert!(e > 0.0 && e < bound && h < bound, "{compute:?}: {e} {h}");
    }
}

/// Root mean square of the difference to f32, nats; each is about twice what was measured.
const BF16: f64 = 0.05;
const F16: f64 = 0.007;

/// Gradients of policy and value model for derivatives of size `size`.
fn gradients(base: &Base, adapter: &Adapter, size: f32) -> Vec<(String, Vec<f32>)> {
    let (batch, targets) = batch(base);
    let each = |f: f32| (0..targets.rows.len()).map(|i| size * (f - 0.13 * (i % 7) as f32)).collect::<Vec<f32>>();
    let policy = Policy::new(base, Some(adapter));
    let (_, g) = policy
        .gradients_against(&batch, &targets, None, 1.0, Recompute::Off, |_, _| {
            Ok(HeadGradients { logprobs: each(1.0), entropy: each(0.3), kl: None })
        })
        .unwrap();
    let headed = adapter.clone().with_head(7).unwrap();
    let model = ValueModel::new(base, &headed).unwrap();
    let (_, v) = model.gradients(&batch, &targets.rows, Recompute::Off, |_| Ok(each(0.7))).unwrap();
    let v = named(&headed, &v).into_iter().map(|(name, g)| (format!("critic {name}"), g));
    named(adapter, &g).into_iter().chain(v).collect()
}

#[test]
fn gradients_of_a_small_loss_do_not_vanish_in_f16() {
    let Some(device) = emulated() else { return };
    let _time = timed("small gradients in f16");
    let host = base(ComputeDtype::F32, None);
    let there = base(ComputeDtype::F16, Some(&device));
    let adapter = adapter(&host, TargetModules::AllLinear, 4, 3);
    let want = gradients(&host, &adapter, 1e-7);
    let got = gradients(&there, &adapter, 1e-7);
    for (name, g) in &got {
        assert!(g.iter().any(|&v| v != 0.0), "{name} vanished");
    }
    let (e, name) = furthest(&got, &want);
    say(&format!("f16: gradients of derivatives of 1e-7 within {e:.1e} of f32 ({name})"));
    assert!(e < 0.02, "{name}: {e}");
    // A power of two is exact: the same gradients, in another place of f32's range.
    let (large, small) = (gradients(&there, &adapter, 1.0), gradients(&there, &adapter, 2f32.powi(-24)));
    for ((name, large), (_, small)) in large.iter().zip(&small) {
        assert!(large.iter().zip(small).all(|(l, s)| l * 2f32.powi(-24) == *s), "{name}");
    }
}

#[test]
fn what_overflows_f16_reaches_the_gradients_as_infinite_or_nan() {
    let Some(device) = emulated() else { return };
    let _time = timed("overflow in f16");
    let there = base(ComputeDtype::F16, Some(&device));
    let adapter = adapter(&there, TargetModules::AllLinear, 4, 3);
    // B of one map so large that its output is past 65,504.
    let mut learner = adapter.to_trainable();
    let at = learner.names().iter().position(|n| n.contains("v_proj.lora_B")).unwrap();
    let mut weights = learner.parameters().unwrap();
    weights[at] = (&weights[at] * 1e7).unwrap();
    learner.replace(weights).unwrap();
    let g = gradients(&there, learner.view(), 1.0);
    assert!(g.iter().flat_map(|(_, g)| g).any(|v| !v.is_finite()), "an overflow was hidden");
    let none = gradients(&there, &adapter, f32::INFINITY);
    assert!(none.iter().flat_map(|(_, g)| g).any(|v| !v.is_finite()), "an infinite derivative was hidden");
}
