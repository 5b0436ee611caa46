//! Norms, rotary positions and activations.

use fourfold::device::Element;
use fourfold::device::testing::can_emulate;
use fourfold::ops::activation::Activation;
use fourfold::ops::activation::gpu as activation;
use fourfold::ops::norm::gpu::DeviceNorm;
use fourfold::ops::norm::{Norm, NormKind};
use fourfold::ops::rope::Direction;
use fourfold::ops::rope::gpu::DeviceRopeTable;

use crate::support::*;

const EPS: f64 = 1e-3;

fn norms(d: usize) -> [Norm; 2] {
    let weight: Vec<f32> = Random::new(3).numbers(d).iter().map(|v| 1.0 + 0.5 * v).collect();
    let bias = Random::new(4).numbers(d);
    [Norm::new(weight.clone(), NormKind::Rms, EPS), Norm::new(weight, NormKind::Layer { bias }, EPS)]
}

/// (y, dx) of one row.
fn norm_row(norm: &Norm, x: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let d = x.len() as f64;
    let layer = matches!(norm.kind, NormKind::Layer { .. });
    let mean = if layer { x.iter().sum::<f64>() / d } else { 0.0 };
    let inv = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d + EPS).sqrt();
    let hat: Vec<f64> = x.iter().map(|x| (x - mean) * inv).collect();
    let g: Vec<f64> = dy.iter().zip(&norm.weight).map(|(g, &w)| g * f64::from(w)).collect();
    let bias = |i: usize| match &norm.kind {
        NormKind::Rms => 0.0,
        NormKind::Layer { bias } => f64::from(bias[i]),
    };
    let y = hat.iter().enumerate().map(|(i, h)| h * f64::from(norm.weight[i]) + bias(i)).collect();
    let off = if layer { g.iter().sum::<f64>() / d } else { 0.0 };
    let c = g.iter().zip(&hat).map(|(g, h)| g * h).sum::<f64>() / d;
    let dx = g.iter().zip(&hat).map(|(g, h)| inv * (g - off - h * c)).collect();
    (y, dx)
}

#[test]
fn norms_forward_and_backward_are_the_formula_in_every_mixture_of_types() {
    if !can_emulate() {
        return;
    }
    // Rows of a warp and of a block, heads within rows, more rows than a block of warps takes.
    for (d, heads, n) in [(1, 1, 3), (33, 3, 7), (64, 2, 5), (257, 1, 2), (1500, 1, 3)] {
        for norm in norms(d) {
            for (device, (x_type, y_type)) in devices().iter().cycle().zip(pairs()) {
                let on = DeviceNorm::new(device, &norm).unwrap();
                let cols = heads * d;
                let (x, xs) = random(device, x_type, n, cols, 1);
                let gives = x_type == Element::F32 || x_type == y_type;
                assert_eq!(on.forward(&x, y_type).is_ok(), gives);
                for dy_type in [y_type, Element::F32] {
                    let (dy, dys) = random(device, dy_type, n, cols, 2);
                    let (past, pasts) = random(device, Element::F32, n, cols, 5);
                    let (mut y, mut dx) = (vec![], vec![]);
                    for (x, dy) in xs.chunks(d).zip(dys.chunks(d)) {
                        let (a, b) = norm_row(&norm, x, dy);
                        y.extend(a);
                        dx.extend(b);
                    }
                    let what = format!("{:?} of {d} x {heads}, {x_type} {dy_type} {y_type}", norm.kind.clone());
                    if gives {
                        close(&what, &on.forward(&x, y_type).unwrap(), &y);
                    }
                    close_as(&what, x_type, &on.backward(&x, &dy, None).unwrap(), &dx);
                    let sum: Vec<f64> = dx.iter().zip(&pasts).map(|(a, b)| a + b).collect();
                    close_as(&what, x_type, &on.backward(&x, &dy, Some(&past)).unwrap(), &sum);
                }
            }
        }
    }
}

#[test]
fn a_row_past_f32_is_nan_forward_and_backward_and_the_others_are_untouched() {
    if !can_emulate() {
        return;
    }
    for device in devices() {
        for d in [20, 1100] {
            for norm in norms(d) {
                let on = DeviceNorm::new(device, &norm).unwrap();
                for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e20, -3e38] {
                    let good = Random::new(8).numbers(3 * d);
                    let mut spoilt = good.clone();
                    spoilt[d + 3] = bad;
                    let (dy, _) = random(device, Element::F32, 3, d, 9);
                    let results = |x: &[f32]| {
                        let x = device.upload_f32(x, 3, d).unwrap();
                        let y = on.forward(&x, Element::F32).unwrap().to_f32().unwrap();
                        let dx = on.backward(&x, &dy, Some(&dy)).unwrap().to_f32().unwrap();
                        [y, dx]
                    };
                    for (want, got) in results(&good).into_iter().zip(results(&spoilt)) {
                        assert!(got[d..2 * d].iter().all(|v| v.is_nan()), "{bad}");
                        assert_eq!((&got[..d], &got[2 * d..]), (&want[..d], &want[2 * d..]));
                    }
                }
            }
        }
    }
}

#[test]
fn norms_refuse_what_does_not_fit() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let on = DeviceNorm::new(device, &norms(8)[0]).unwrap();
    let (x, _) = random(device, Element::F32, 2, 12, 1);
    assert!(on.forward(&x, Element::F32).is_err());
    let (x, _) = random(device, Element::Bf16, 2, 8, 1);
    let refused = on.forward(&x, Element::F16).unwrap_err().to_string();
    assert!(refused.contains("bf16 and f16"), "{refused}");
    let empty = device.matrix(Element::F32, 0, 8).unwrap();
    assert_eq!(on.forward(&empty, Element::F32).unwrap().rows(), 0);
}

#[test]
fn rotation_is_the_formula_and_its_transpose_undoes_it() {
    if !can_emulate() {
        return;
    }
    for (half, head, heads, n) in [(3, 6, 2, 5), (2, 7, 3, 4), (16, 64, 1, 9), (4, 8, 1, 0)] {
        let positions: Vec<u32> = (0..n).map(|i| (i * 7 % 11) as u32).collect();
        let angles: Vec<f32> = (0..11 * half).map(|i| (i / half) as f32 * 0.3f32.powi((i % half) as i32)).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        for device in devices() {
            let on = DeviceRopeTable::new(device, &cos, &sin, half, head).unwrap();
            let at = on.place(&positions).unwrap();
            for element in FLOATS {
                let (x, xs) = random(device, element, n, heads * head, 1);
                let mut want = xs.clone();
                for (row, &p) in positions.iter().enumerate() {
                    for h in 0..heads {
                        let from = (row * heads + h) * head;
                        for j in 0..half {
                            let (c, s) = (f64::from(cos[p as usize * half + j]), f64::from(sin[p as usize * half + j]));
                            let (a, b) = (xs[from + j], xs[from + j + half]);
                            want[from + j] = a * c - b * s;
                            want[from + j + half] = b * c + a * s;
                        }
                    }
                }
                let y = on.rotate(&x, &at, Direction::Forward).unwrap();
                close("rope", &y, &want);
                close("rope back", &on.rotate(&y, &at, Direction::Back).unwrap(), &xs);
                on.rotate_in_place(&x, &at, Direction::Forward).unwrap();
                same("rope in place", &x, &y);
            }
        }
    }
    let on = DeviceRopeTable::new(device(), &[1.0; 6], &[0.0; 6], 2, 4).unwrap();
    assert!(on.place(&[3]).unwrap_err().to_string().contains("context of 3"));
    assert!(DeviceRopeTable::new(device(), &[1.0; 6], &[0.0; 6], 3, 5).is_err());
}

/// Abramowitz and Stegun's 7.1.26 is too coarse: the series, which converges for the small arguments here.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// (act, act') at x.
fn act(kind: Activation, x: f64) -> (f64, f64) {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    match kind {
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Activation::Gelu => {
            let phi = 0.5 * (1.0 + erf(x / 2f64.sqrt()));
            (x * phi, phi + x * (-x * x / 2.0).exp() * root / 2.0)
        }
        Activation::GeluTanh => {
            let t = (root * (x + 0.044715 * x.powi(3))).tanh();
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * root * (1.0 + 3.0 * 0.044715 * x * x))
        }
        Activation::Relu => (x.max(0.0), f64::from(u8::from(x > 0.0))),
    }
}

const KINDS: [Activation; 4] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

#[test]
fn activations_forward_and_backward_are_the_formula() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for kind in KINDS {
        for element in FLOATS {
            for (n, f) in [(3, 341), (1, 1), (5, 1024), (0, 4)] {
                let spread: Vec<f32> = Random::new(1).numbers(n * f).iter().map(|v| 4.0 * v).collect();
                let (gate, gs) = upload(device, element, &spread, n, f);
                let (up, us) = random(device, element, n, f, 2);
                let (dm, ds) = random(device, element, n, f, 3);
                let each = |f: &dyn Fn(usize) -> f64| (0..gs.len()).map(f).collect::<Vec<_>>();
                let m = activation::forward(kind, Some(&gate), &up).unwrap();
                close("gated", &m, &each(&|i| act(kind, gs[i]).0 * us[i]));
                close("plain", &activation::forward(kind, None, &gate).unwrap(), &each(&|i| act(kind, gs[i]).0));
                let (dgate, dup) = activation::gated_backward(kind, &gate, &up, &dm).unwrap();
                close("dgate", &dgate, &each(&|i| ds[i] * us[i] * act(kind, gs[i]).1));
                close("dup", &dup, &each(&|i| ds[i] * act(kind, gs[i]).0));
                let dx = activation::plain_backward(kind, &gate, &dm).unwrap();
                close("dx", &dx, &each(&|i| ds[i] * act(kind, gs[i]).1));
                // Rows of an odd length begin at addresses that whole words cannot be loaded from.
                if n > 1 {
                    let part = |m: &fourfold::device::Matrix| m.row_range(1..n).unwrap();
                    let m = activation::forward(kind, Some(&part(&gate)), &part(&up)).unwrap();
                    close("rows", &m, &each(&|i| act(kind, gs[i]).0 * us[i])[f..]);
                }
            }
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so_in_every_activation() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for kind in KINDS {
        for element in FLOATS {
            let row = |x: f32| device.upload_as(element, &[0.5, x, -0.5, 2.0, 1.0], 1, 5).unwrap();
            let (up, nan) = (row(1.0), row(f32::NAN));
            for m in [activation::forward(kind, None, &nan), activation::forward(kind, Some(&nan), &up)] {
                let m = m.unwrap().to_f32().unwrap();
                assert!(m[1].is_nan() && m.iter().filter(|v| v.is_nan()).count() == 1, "{kind:?}: {m:?}");
            }
            let large = activation::forward(kind, None, &row(f32::INFINITY)).unwrap().to_f32().unwrap();
            assert_eq!(large[1], f32::INFINITY, "{kind:?}");
        }
    }
}
