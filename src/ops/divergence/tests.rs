//! The divergence against TRL's numbers, its gradient against central differences. `gradcheck.rs` above has lm_heads with
//! LoRA, caps and padding rows, and the device.

use serde_json::Value;

use super::*;
use crate::ops::cpu::tensor;
use crate::ops::weight::Weight;

const R: usize = 5;
const V: usize = 150;
const D: [usize; 2] = [4, 6];

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/generalized_jsd.json")).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn rows(values: Vec<f32>, width: usize) -> Array {
    Array::Host(tensor(values, (R, width)).unwrap())
}

fn numbers(array: &Array) -> Vec<f32> {
    array.to_host().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn divergence(case: &Value) -> Divergence {
    Divergence { beta: case["beta"].as_f64().unwrap(), temperature: case["temperature"].as_f64().unwrap() }
}

#[test]
fn values_and_gradients_are_those_of_trl() {
    let golden = golden();
    let weight = |name: &str, width| Weight::from_f32(&floats(&golden[name]), V, width).unwrap();
    let (ours, theirs) = (weight("head", D[0]), weight("teacher_head", D[1]));
    let (h, g) = (rows(floats(&golden["hidden"]), D[0]), rows(floats(&golden["teacher_hidden"]), D[1]));
    let student = Side { hidden: &h, head: LmHead::plain(&ours) };
    let teacher = Side { hidden: &g, head: LmHead::plain(&theirs) };
    let weights = floats(&golden["weights"]);
    for case in golden["cases"].as_array().unwrap() {
        let of = divergence(case);
        let saved = forward(student, teacher, of).unwrap();
        for (got, want) in saved.value.iter().zip(floats(&case["values"])) {
            assert!((got - want).abs() < 2e-6 * want.max(1.0), "{of:?}: {got} {want}");
        }
        let got = numbers(&backward(student, teacher, of, &saved, &weights).unwrap().hidden);
        for (got, want) in got.iter().zip(floats(&case["gradient"])) {
            assert!((got - want).abs() < 5e-6 * want.abs().max(1.0), "{of:?}: {got} {want}");
        }
    }
}

/// The divergence of each position by the formula, in f64.
fn full(h: &[f32], heads: [&[f32]; 2], g: &[f32], of: Divergence) -> Vec<f64> {
    let log_softmax = |h: &[f32], table: &[f32]| -> Vec<f64> {
        let dot = |w: &[f32]| w.iter().zip(h).map(|(&w, &h)| f64::from(w) * f64::from(h)).sum::<f64>();
        let logits: Vec<f64> = table.chunks(h.len()).map(|w| dot(w) / of.temperature).collect();
        let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
        logits.into_iter().map(|l| l - lse).collect()
    };
    let kl = |p: &[f64], q: &[f64]| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
    h.chunks(D[0])
        .zip(g.chunks(D[1]))
        .map(|(h, g)| {
            let (s, t) = (log_softmax(h, heads[0]), log_softmax(g, heads[1]));
            let b = of.beta;
            let m: Vec<f64> = s.iter().zip(&t).map(|(s, t)| ((1.0 - b) * s.exp() + b * t.exp()).ln()).collect();
            match b {
                0.0 => kl(&t, &s),
                1.0 => kl(&s, &t),
                _ => b * kl(&t, &m) + (1.0 - b) * kl(&s, &m),
            }
        })
        .collect()
}

#[test]
fn gradients_are_central_differences() {
    let golden = golden();
    let (table, other) = (floats(&golden["head"]), floats(&golden["teacher_head"]));
    let (h, g) = (floats(&golden["hidden"]), floats(&golden["teacher_hidden"]));
    let (ours, theirs) = (Weight::from_f32(&table, V, D[0]).unwrap(), Weight::from_f32(&other, V, D[1]).unwrap());
    let (hs, gs) = (rows(h.clone(), D[0]), rows(g.clone(), D[1]));
    let student = Side { hidden: &hs, head: LmHead::plain(&ours) };
    let teacher = Side { hidden: &gs, head: LmHead::plain(&theirs) };
    for beta in [0.0, 0.3, 1.0] {
        let of = Divergence { beta, temperature: 0.8 };
        let saved = forward(student, teacher, of).unwrap();
        let got = numbers(&backward(student, teacher, of, &saved, &[1.0; R]).unwrap().hidden);
        for at in 0..R * D[0] {
            let moved = |by: f32| {
                let mut h = h.clone();
                h[at] += by;
                full(&h, [&table, &other], &g, of).iter().sum::<f64>()
            };
            let step = 1.0 / 1024.0;
            let want = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            assert!((f64::from(got[at]) - want).abs() < 1e-4 * want.abs().max(1.0), "{beta}, {at}: {} {want}", got[at]);
        }
    }
}

#[test]
fn a_distribution_is_not_apart_from_itself_and_nan_shows() {
    let golden = golden();
    let weight = Weight::from_f32(&floats(&golden["head"]), V, D[0]).unwrap();
    let h = rows(floats(&golden["hidden"]), D[0]);
    let mut broken = floats(&golden["hidden"]);
    broken[D[0]] = f32::NAN;
    let broken = rows(broken, D[0]);
    let side = |hidden| Side { hidden, head: LmHead::plain(&weight) };
    for beta in [0.0, 0.5, 1.0] {
        let of = Divergence { beta, temperature: 1.0 };
        let same = forward(side(&h), side(&h), of).unwrap().value;
        assert!(same.iter().all(|value| (0.0..1e-6).contains(value)), "{beta}: {same:?}");
        for (a, b) in [(&h, &broken), (&broken, &h)] {
            let value = forward(side(a), side(b), of).unwrap().value;
            assert!(value.iter().enumerate().all(|(i, v)| v.is_nan() == (i == 1)), "{beta}: {value:?}");
        }
    }
    let short = Array::Host(tensor(vec![0.0; D[0]], (1, D[0])).unwrap());
    assert!(forward(side(&h), side(&short), Divergence { beta: 1.0, temperature: 1.0 }).is_err());
}
