//! Tests of `loss.rs` and `value_loss.rs`: against autograd, TRL's code and central differences.

use serde_json::Value;

use super::*;
use crate::ppo::golden::{assert_close, assert_number, floats, ppo};
use crate::ppo::value_loss::{ValueTokens, value_loss};

/// Three lists of 18 tokens, and responses of one token each.
struct Lists([Vec<f32>; 3], [usize; 18]);

impl Lists {
    fn of(golden: &Value, keys: [&str; 3]) -> Self {
        Self(keys.map(|k| floats(&golden[k])), [1; 18])
    }

    fn policy(&self, range: std::ops::Range<usize>) -> PolicyTokens<'_> {
        let [logprobs, old_logprobs, advantages] = self.0.each_ref().map(|l| &l[range.clone()]);
        PolicyTokens {
            lengths: &self.1[..range.len()],
            logprobs,
            old_logprobs,
            advantages,
            ref_logprobs: old_logprobs,
            weights: None,
        }
    }

    fn value(&self, range: std::ops::Range<usize>) -> ValueTokens<'_> {
        let [values, old_values, returns] = self.0.each_ref().map(|l| &l[range.clone()]);
        ValueTokens { values, old_values, returns }
    }
}

const POLICY: [&str; 3] = ["logprobs", "old", "advantages"];
const VALUE: [&str; 3] = ["values", "old_values", "returns"];

#[test]
fn policy_loss_and_gradient_match_autograd_golden() {
    let golden = ppo();
    let lists = Lists::of(&golden, POLICY);
    for case in golden["policy"].as_array().unwrap() {
        let (clip, normaliser) = (case["clip"].as_f64().unwrap(), case["normaliser"].as_f64().unwrap());
        let out = policy_loss(lists.policy(0..18), &Objective::clip(clip), normaliser).unwrap();
        assert_number(out.loss, &case["loss"], "loss");
        assert_close(&out.grad, &case["grad"], 1.0, "grad");
        assert_number(out.stats.clipfrac(), &case["clipfrac"], "clipfrac");
        assert_number(out.stats.approx_kl(), &case["approx_kl"], "approx_kl");
        assert_number(out.stats.mean_ratio(), &case["mean_ratio"], "mean_ratio");
        assert_number(out.stats.ratio_variance(), &case["ratio_variance"], "ratio_variance");
        assert!(out.stats.clipfrac() > 0.1 && out.stats.clipfrac() < 0.9, "the golden reaches both branches");
    }
}

/// Loss and derivative of one token with ratio e^log_ratio.
fn token(objective: Objective, log_ratio: f32, advantage: f32) -> (f64, f32) {
    let one = PolicyTokens {
        lengths: &[1],
        logprobs: &[log_ratio - 1.0],
        old_logprobs: &[-1.0],
        advantages: &[advantage],
        ref_logprobs: &[-1.5],
        weights: None,
    };
    let out = policy_loss(one, &objective, 1.0).unwrap();
    (out.loss, out.grad[0])
}

#[test]
fn clips_and_clamps_bound_the_loss_and_remove_the_gradient() {
    let clip = |low, high, dual| Objective::of(Surrogate::Clip { low, high, dual });
    let (up, down) = (0.5f32, -0.5f32); // ratios 1.65 and 0.61
    assert_eq!(token(clip(0.2, 0.3, None), up, 1.0), (-1.3, 0.0), "the upper clip range is its own");
    assert_eq!(token(clip(0.3, 0.2, None), down, -1.0), (0.7, 0.0), "and so is the lower");
    assert!(token(clip(0.2, 0.7, None), up, 1.0).1 < 0.0, "within the range there is a gradient");
    let (loss, grad) = token(clip(0.2, 0.2, Some(1.5)), up, -2.0);
    assert_eq!((loss, grad), (3.0, 0.0), "the loss of a negative advantage is bounded at r = 1.5");
    for at in [up, down, 0.125] {
        let (with, without) = (clip(0.2, 0.2, Some(1.5)), clip(0.2, 0.2, None));
        assert_eq!(token(with, at, 2.0), token(without, at, 2.0), "a positive advantage is not affected at {at}");
    }
    let clamped = Objective { log_ratio_clamp: 0.25, ..Objective::of(Surrogate::KlPenalty { coef: 0.0 }) };
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let tokens = PolicyTokens {
            lengths: &[1],
            logprobs: &[bad],
            old_logprobs: &[-1.0],
            advantages: &[1.0],
            ref_logprobs: &[-1.0],
            weights: None,
        };
        assert!(policy_loss(tokens, &clamped, 1.0).is_err(), "a clamp must not hide {bad}");
    }
    let (loss, grad) = token(clamped, up, 1.0);
    assert!((loss + 0.25f64.exp()).abs() < 1e-7 && grad == 0.0, "{loss} {grad}");
}

#[test]
fn every_surrogates_derivative_is_the_central_difference_of_its_loss() {
    let surrogates = [
        Surrogate::Clip { low: 0.3, high: 0.4, dual: Some(3.0) },
        Surrogate::KlPenalty { coef: 0.75 },
        Surrogate::Sapo { positive: 1.0, negative: 1.05 },
        Surrogate::Gradient,
    ];
    for surrogate in surrogates {
        for kl in [None, Some((Estimator::K2, 0.5)), Some((Estimator::K3, 0.5))] {
            let objective = Objective { kl, ..Objective::of(surrogate) };
            for (at, advantage) in [(0.125f32, 1.5f32), (-0.25, -1.5), (0.25, -0.5)] {
                let step = 1.0 / 1024.0;
                let rise = token(objective, at + step, advantage).0 - token(objective, at - step, advantage).0;
                let (want, got) = (rise / f64::from(2.0 * step), token(objective, at, advantage).1);
                // Third derivatives of magnitude 1 times step²/6.
                assert!((f64::from(got) - want).abs() < 2e-6, "{objective:?} {at} {advantage}: {got} {want}");
            }
        }
    }
    let penalty = Objective::of(Surrogate::KlPenalty { coef: 2.0 });
    let (loss, _) = token(penalty, 0.5, 0.0);
    assert!((loss - 2.0 * (0.5f64.exp() - 1.5)).abs() < 1e-7, "an estimate of KL(old || current)");
}

#[test]
fn tokens_whose_k3_is_clamped_are_counted_and_only_with_the_kl_in_the_loss() {
    let far = PolicyTokens {
        lengths: &[3],
        logprobs: &[-1.0, -30.0, -1.0],
        old_logprobs: &[-1.0, -30.0, -1.0],
        advantages: &[0.0; 3],
        ref_logprobs: &[-1.5, -1.0, -25.0],
        weights: None,
    };
    let with = |kl| policy_loss(far, &Objective { kl, ..Objective::clip(0.2) }, 3.0).unwrap();
    let k3 = with(Some((Estimator::K3, 0.5)));
    assert_eq!(k3.stats.kl_clamped(), 2);
    assert_eq!((k3.grad[1], k3.grad[2]), (0.0, 0.0), "29 and 24 nats apart");
    let mut twice = k3.stats;
    twice.merge(&k3.stats);
    assert_eq!(twice.kl_clamped(), 4);
    assert_eq!([with(None), with(Some((Estimator::K2, 0.5)))].map(|l| l.stats.kl_clamped()), [0, 0]);
}

#[test]
fn value_loss_and_gradient_match_autograd_golden() {
    let golden = ppo();
    let lists = Lists::of(&golden, VALUE);
    for case in golden["value"].as_array().unwrap() {
        let (clip, normaliser) = (case["clip"].as_f64().unwrap(), case["normaliser"].as_f64().unwrap());
        let out = value_loss(lists.value(0..18), clip, normaliser).unwrap();
        assert_number(out.loss, &case["loss"], "loss");
        assert_close(&out.grad, &case["grad"], 1.0, "grad");
        assert_number(out.stats.clipfrac(), &case["clipfrac"], "clipfrac");
        assert_number(out.stats.mean_value(), &case["mean_value"], "mean_value");
        assert_number(out.stats.mean_return(), &case["mean_return"], "mean_return");
        assert_number(out.stats.explained_variance().unwrap(), &case["explained_variance"], "explained_variance");
    }
    let clipped = value_loss(lists.value(0..18), 0.2, 18.0).unwrap();
    assert!(clipped.stats.clipfrac() > 0.0 && clipped.stats.clipfrac() < 1.0);
    let open = value_loss(lists.value(0..18), f64::INFINITY, 18.0).unwrap();
    assert_eq!(open.stats.clipfrac(), 0.0);
}

#[test]
fn micro_batches_add_up_to_the_minibatch() {
    let golden = ppo();
    let (policy, value) = (Lists::of(&golden, POLICY), Lists::of(&golden, VALUE));
    let whole = policy_loss(policy.policy(0..18), &Objective::clip(0.2), 18.0).unwrap();
    let mut parts = policy_loss(policy.policy(0..6), &Objective::clip(0.2), 18.0).unwrap();
    let rest = policy_loss(policy.policy(6..18), &Objective::clip(0.2), 18.0).unwrap();
    assert_eq!([&parts.grad[..], &rest.grad[..]].concat(), whole.grad);
    assert!((parts.loss + rest.loss - whole.loss).abs() < 1e-15);
    parts.stats.merge(&rest.stats);
    assert!((parts.stats.ratio_variance() - whole.stats.ratio_variance()).abs() < 1e-12);
    assert_eq!(parts.stats.clipfrac(), whole.stats.clipfrac());
    assert_eq!(parts.stats.tokens(), 18);

    let whole = value_loss(value.value(0..18), 0.2, 18.0).unwrap();
    let mut parts = value_loss(value.value(0..1), 0.2, 18.0).unwrap();
    let rest = value_loss(value.value(1..18), 0.2, 18.0).unwrap();
    assert_eq!([&parts.grad[..], &rest.grad[..]].concat(), whole.grad);
    assert_eq!(parts.stats.explained_variance(), None, "one token");
    parts.stats.merge(&rest.stats);
    let (a, b) = (parts.stats.explained_variance().unwrap(), whole.stats.explained_variance().unwrap());
    assert!((a - b).abs() < 1e-12);
}

#[test]
fn before_the_first_step_the_gradient_is_the_advantage_and_nothing_is_clipped() {
    let golden = ppo();
    let lists = Lists::of(&golden, ["old", "old", "advantages"]);
    let out = policy_loss(lists.policy(0..18), &Objective::clip(0.2), 1.0).unwrap();
    for (gradient, advantage) in out.grad.iter().zip(&lists.0[2]) {
        assert_eq!(*gradient, -advantage);
    }
    let stats = (out.stats.clipfrac(), out.stats.mean_ratio(), out.stats.ratio_variance(), out.stats.approx_kl());
    assert_eq!(stats, (0.0, 1.0, 0.0, 0.0));
}

#[test]
fn unequal_lists_empty_normalisers_and_infinite_losses_are_errors() {
    let one = PolicyTokens {
        lengths: &[1],
        logprobs: &[0.0],
        old_logprobs: &[0.0],
        advantages: &[1.0],
        ref_logprobs: &[0.0],
        weights: None,
    };
    assert!(policy_loss(PolicyTokens { advantages: &[], ..one }, &Objective::clip(0.2), 1.0).is_err());
    assert!(policy_loss(one, &Objective::clip(0.2), 0.0).is_err());
    assert!(policy_loss(PolicyTokens { advantages: &[f32::NAN], ..one }, &Objective::clip(0.2), 1.0).is_err());
    assert!(policy_loss(PolicyTokens { logprobs: &[1e4], ..one }, &Objective::clip(0.2), 1.0).is_err());
    let one = ValueTokens { values: &[f32::INFINITY], old_values: &[0.0], returns: &[1.0] };
    assert!(value_loss(one, 0.2, 1.0).is_err());
}

/// The objective of a golden case and what it is divided by, for `responses` with `tokens` in all.
fn of_trl(case: &Value, golden: &Value, (responses, tokens): (usize, usize)) -> (Objective, f64) {
    let number = |key: &str| case[key].as_f64();
    let kind = case["loss_type"].as_str().unwrap();
    let low = number("epsilon").unwrap_or(0.2);
    let high = number("epsilon_high").unwrap_or(low);
    let surrogate = match kind {
        "cispo" => Surrogate::Cispo { cap: high },
        "sapo" => Surrogate::Sapo { positive: 1.0, negative: 1.05 },
        _ => Surrogate::Clip { low, high, dual: number("delta") },
    };
    let by_response = ["grpo", "sapo"].contains(&kind);
    let normaliser = match kind {
        "dr_grpo" => responses as f64 * golden["most"].as_f64().unwrap(),
        _ if by_response => responses as f64,
        _ => tokens as f64,
    };
    let is_sequence = case["importance_sampling_level"] == "sequence";
    let objective = Objective {
        kl: number("beta").map(|beta| (Estimator::K3, beta)),
        kl_times_ratio: case["use_bias_correction_kl"] == true,
        level: if is_sequence { RatioLevel::Sequence } else { RatioLevel::Token },
        average: if by_response { Average::Responses } else { Average::Tokens },
        ..Objective::of(surrogate)
    };
    (objective, normaliser)
}

/// `GRPOTrainer._compute_loss` on the same numbers (tests/golden/grpo_loss.py), which are exact in f32.
#[test]
fn the_group_methods_losses_and_gradients_are_trls_golden() {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/grpo_loss.json")).unwrap();
    let [logprobs, old, reference, weights] =
        ["logprobs", "old", "reference", "weights"].map(|key| floats(&golden[key]));
    let lengths: Vec<usize> = serde_json::from_value(golden["lengths"].clone()).unwrap();
    let advantages: Vec<f32> = lengths.iter().zip(&weights).flat_map(|(&n, &weight)| vec![weight; n]).collect();
    let tokens = PolicyTokens {
        lengths: &lengths,
        logprobs: &logprobs,
        old_logprobs: &old,
        advantages: &advantages,
        ref_logprobs: &reference,
        weights: None,
    };
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let number = |key: &str| case[key].as_f64();
        let kind = case["loss_type"].as_str().unwrap();
        let (objective, normaliser) = of_trl(case, &golden, (lengths.len(), logprobs.len()));
        let out = policy_loss(tokens, &objective, normaliser).unwrap();
        let want = number("loss").unwrap();
        assert!((out.loss - want).abs() < 1e-12, "{case}: {} and {want}", out.loss);
        let grad: Vec<f64> = serde_json::from_value(case["grad"].clone()).unwrap();
        assert_eq!(out.grad.len(), grad.len());
        for (got, want) in out.grad.iter().zip(&grad) {
            assert!((f64::from(*got) - want).abs() < 1e-8, "{kind} {case}: {got} and {want}");
        }
    }
    assert_eq!(cases.len(), 14);
}

/// Recorded tensors of six responses, and what TRL's code makes of masks on them (tests/golden/group_loss.py).
#[test]
fn masked_tokens_and_responses_and_a_responses_ratio_are_trls_golden() {
    let recorded: Value = serde_json::from_str(include_str!("../../../tests/golden/grpo_loss.json")).unwrap();
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/group_loss.json")).unwrap();
    let lengths: Vec<usize> = serde_json::from_value(recorded["lengths"].clone()).unwrap();
    let [logprobs, old, reference, of_rows] =
        ["logprobs", "old", "reference", "weights"].map(|key| floats(&recorded[key]));
    let entropies = floats(&golden["entropies"]);
    let check = |case: &Value, objective: &Objective, normaliser: f64, rows: &[usize], weights: Option<&[f32]>| {
        // Responses that are left out are not read at all, and keep a derivative of 0.
        let starts: Vec<usize> = lengths.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect();
        let places: Vec<usize> = rows.iter().flat_map(|&row| starts[row]..starts[row] + lengths[row]).collect();
        let of = |all: &[f32]| -> Vec<f32> { places.iter().map(|&at| all[at]).collect() };
        let kept: Vec<usize> = rows.iter().map(|&row| lengths[row]).collect();
        let advantages: Vec<f32> = rows.iter().flat_map(|&row| vec![of_rows[row]; lengths[row]]).collect();
        let tokens = PolicyTokens {
            lengths: &kept,
            logprobs: &of(&logprobs),
            old_logprobs: &of(&old),
            advantages: &advantages,
            ref_logprobs: &of(&reference),
            weights,
        };
        let out = policy_loss(tokens, objective, normaliser).unwrap();
        let want = case["loss"].as_f64().unwrap();
        assert!((out.loss - want).abs() < 1e-12, "{case}: {} and {want}", out.loss);
        let mut grad = vec![0.0; logprobs.len()];
        places.iter().zip(&out.grad).for_each(|(&at, &slope)| grad[at] = f64::from(slope));
        let wanted: Vec<f64> = serde_json::from_value(case["grad"].clone()).unwrap();
        assert!(grad.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-8), "{case}: {grad:?}");
    };
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let truncated: Vec<usize> = serde_json::from_value(case["truncated"].clone()).unwrap_or_default();
        let rows: Vec<usize> = (0..lengths.len()).filter(|row| !truncated.contains(row)).collect();
        let tokens: usize = rows.iter().map(|&row| lengths[row]).sum();
        let (objective, normaliser) = of_trl(case, &recorded, (lengths.len(), tokens));
        let weights = case["top_entropy_quantile"].as_f64().map(|share| {
            let mut at = 0;
            let places = lengths.iter().enumerate().flat_map(|(row, n)| {
                at += n;
                (at - n..at).filter(|_| !truncated.contains(&row)).collect::<Vec<_>>()
            });
            let kept: Vec<f32> = places.map(|at| entropies[at]).collect();
            let bound = crate::ppo::update::quantile(&kept, 1.0 - share);
            kept.iter().map(|&entropy| f32::from(u8::from(f64::from(entropy) >= bound))).collect::<Vec<f32>>()
        });
        check(case, &objective, normaliser, &rows, weights.as_deref());
    }
    let all: Vec<usize> = (0..lengths.len()).collect();
    let rloo = golden["rloo"].as_array().unwrap();
    for case in rloo {
        let side = |key: &str| case[key].as_f64().unwrap();
        let surrogate = Surrogate::Clip { low: side("epsilon"), high: side("epsilon_high"), dual: None };
        let objective =
            Objective { level: RatioLevel::Product, average: Average::Responses, ..Objective::of(surrogate) };
        check(case, &objective, lengths.len() as f64, &all, None);
    }
    // Weights that correct for another sampler.
    let corrected = golden["corrected"].as_array().unwrap();
    for case in corrected {
        let weights = floats(&golden["correction"][case["mode"].as_str().unwrap()]);
        let (objective, normaliser) = of_trl(case, &recorded, (lengths.len(), logprobs.len()));
        check(case, &objective, normaliser, &all, Some(&weights));
    }
    assert_eq!((cases.len(), rloo.len(), corrected.len()), (9, 3, 4));
}
