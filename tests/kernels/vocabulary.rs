//! Log-probabilities, entropy and the KL divergence over strips of the vocabulary.

use fourfold::device::testing::can_emulate;
use fourfold::device::{Device, Element, Matrix};
use fourfold::ops::kl::gpu as kl;
use fourfold::ops::logprobs::gpu as logprobs;
use fourfold::ops::logprobs::gpu::Shape;

use crate::support::*;

const R: usize = 5;
const V: usize = 1237;
/// Columns of a strip's matrix, and how many of them the strips use: no multiple of anything.
const STRIP: usize = 520;

/// No multiplier, cap or temperature.
const PLAIN: Shape = Shape { multiplier: 1.0, soft_cap: None, temperature: 1.0 };

fn shapes() -> [Shape; 4] {
    let plain = PLAIN;
    [
        plain,
        Shape { temperature: 0.7, multiplier: 1.3, ..plain },
        Shape { soft_cap: Some(2.0), multiplier: 0.9, ..plain },
        Shape { soft_cap: Some(3.0), multiplier: 1.1, temperature: 1.4 },
    ]
}

/// (logit, d logit / d product).
fn logit(shape: Shape, product: f64) -> (f64, f64) {
    let x = f64::from(shape.multiplier) * product;
    let m = f64::from(shape.multiplier) / shape.temperature;
    match shape.soft_cap.map(f64::from) {
        None => (x / shape.temperature, m),
        Some(c) => (c * (x / c).tanh() / shape.temperature, m * (1.0 - (x / c).tanh().powi(2))),
    }
}

/// (logits, log-probabilities) of a row.
fn log_softmax(shape: Shape, products: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let l: Vec<f64> = products.iter().map(|&x| logit(shape, x).0).collect();
    let top = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = top + l.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
    let p = l.iter().map(|l| l - lse).collect();
    (l, p)
}

fn products(seed: u64) -> Vec<f32> {
    Random::new(seed).numbers(R * V).iter().map(|v| 3.0 * v).collect()
}

/// Columns first..first + width of (R, V) numbers in a matrix (R, STRIP), NaN beside them.
fn strip(device: &Device, all: &[f32], first: usize, width: usize) -> Matrix {
    let mut numbers = vec![f32::NAN; R * STRIP];
    for i in 0..R {
        numbers[i * STRIP..i * STRIP + width].copy_from_slice(&all[i * V + first..i * V + first + width]);
    }
    device.upload_f32(&numbers, R, STRIP).unwrap()
}

fn strips() -> Vec<(usize, usize)> {
    (0..V).step_by(STRIP - 3).map(|v| (v, (STRIP - 3).min(V - v))).collect()
}

fn targets() -> Vec<u32> {
    vec![0, 516, 517, (V - 1) as u32, 800]
}

fn stats(device: &Device, all: &[f32], targets: &Matrix, shape: Shape) -> logprobs::DeviceStats {
    let mut running = logprobs::Running::new(targets, shape).unwrap();
    for (first, width) in strips() {
        running.add(&strip(device, all, first, width), width).unwrap();
    }
    running.finish().unwrap()
}

/// The numbers of the strips' matrices, put together to (R, V); what lies beside a strip is untouched.
fn gathered(parts: &[(usize, usize, Matrix)]) -> Vec<f32> {
    let mut all = vec![0f32; R * V];
    for (first, width, part) in parts {
        let part = part.to_f32().unwrap();
        for i in 0..R {
            all[i * V + first..i * V + first + width].copy_from_slice(&part[i * STRIP..i * STRIP + width]);
            assert!(part[i * STRIP + width..(i + 1) * STRIP].iter().all(|v| v.is_nan()));
        }
    }
    all
}

fn close_numbers(what: &str, element: Element, got: &[f32], want: &[f64]) {
    close_as(what, element, &device().upload_f32(got, 1, got.len()).unwrap(), want);
}

/// A value of row i, its logits and its log-probabilities.
type OfRow = dyn Fn(usize, &[f64], &[f64]) -> f64;

#[test]
fn logprobs_and_entropy_over_strips_are_those_of_the_whole_row() {
    if !can_emulate() {
        return;
    }
    let all = products(1);
    for device in devices() {
        let ids = device.upload_u32(&targets()).unwrap();
        for shape in shapes() {
            let got = stats(device, &all, &ids, shape);
            let rows: Vec<_> = wide(&all).chunks(V).map(|row| log_softmax(shape, row)).collect();
            let want = |f: &OfRow| -> Vec<f64> { rows.iter().enumerate().map(|(i, (l, p))| f(i, l, p)).collect() };
            close("logprobs", &got.logprobs, &want(&|i, _, p| p[targets()[i] as usize]));
            close("lse", &got.lse, &want(&|_, l, p| l[0] - p[0]));
            close("entropy", &got.entropy, &want(&|_, _, p| -p.iter().map(|p| p.exp() * p).sum::<f64>()));
            let best = got.argmax.to_u32().unwrap();
            for (i, (l, _)) in rows.iter().enumerate() {
                assert!(l.iter().all(|&other| other <= l[best[i] as usize] + 1e-6));
            }
        }
    }
}

#[test]
fn the_lowest_id_of_equals_is_the_most_likely() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let mut all = vec![0f32; R * V];
    for (row, ids) in [&[7usize, 600][..], &[600, 601], &[3, 4, 1236], &[300, 44], &[]].iter().enumerate() {
        ids.iter().for_each(|id| all[row * V + id] = 2.0);
    }
    let ids = device.upload_u32(&targets()).unwrap();
    assert_eq!(stats(device, &all, &ids, PLAIN).argmax.to_u32().unwrap(), [7, 600, 3, 44, 0]);
}

#[test]
fn gradients_of_strips_are_the_formula() {
    if !can_emulate() {
        return;
    }
    let all = products(1);
    for device in devices() {
        let ids = device.upload_u32(&targets()).unwrap();
        let (dlogprobs, dls) = random(device, Element::F32, 1, R, 5);
        let (dentropy, dhs) = random(device, Element::F32, 1, R, 6);
        for shape in shapes() {
            let stats = stats(device, &all, &ids, shape);
            let loss = logprobs::Loss { targets: &ids, stats: &stats, dlogprobs: &dlogprobs, dentropy: &dentropy };
            let mut want = vec![];
            for (i, row) in wide(&all).chunks(V).enumerate() {
                let (_, p) = log_softmax(shape, row);
                let h = -p.iter().map(|p| p.exp() * p).sum::<f64>();
                for (j, log_p) in p.iter().enumerate() {
                    let one = f64::from(u8::from(targets()[i] as usize == j));
                    let d = dls[i] * (one - log_p.exp()) - dhs[i] * log_p.exp() * (log_p + h);
                    want.push(d * logit(shape, row[j]).1);
                }
            }
            for element in FLOATS {
                let mut parts = vec![];
                for (first, width) in strips() {
                    let products = strip(device, &all, first, width);
                    // f32 gradients may take the products' place.
                    let d = match element {
                        Element::F32 => products.clone(),
                        _ => device.matrix(element, R, STRIP).unwrap(),
                    };
                    logprobs::backward(&products, width, first, loss, shape, &d).unwrap();
                    parts.push((first, width, d));
                }
                close_numbers("d logits", element, &gathered(&parts), &want);
            }
        }
    }
}

#[test]
fn nan_and_infinite_logits_show_in_their_row_alone_and_minus_infinity_counts_as_nothing() {
    if !can_emulate() {
        return;
    }
    for device in devices() {
        let ids = device.upload_u32(&targets()).unwrap();
        let good = products(1);
        let plain = stats(device, &good, &ids, PLAIN);
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 600, 1236] {
                let mut all = good.clone();
                all[2 * V + at] = bad;
                let got = stats(device, &all, &ids, PLAIN);
                for (got, want) in
                    [(&got.logprobs, &plain.logprobs), (&got.entropy, &plain.entropy), (&got.lse, &plain.lse)]
                {
                    let (got, want) = (got.to_f32().unwrap(), want.to_f32().unwrap());
                    assert!(got[2].is_nan(), "{bad} at {at}: {got:?}");
                    assert_eq!((&got[..2], &got[3..]), (&want[..2], &want[3..]));
                }
            }
        }
        // A whole strip of minus infinity, the first one.
        let mut all = good.clone();
        all[2 * V..2 * V + STRIP - 3].fill(f32::NEG_INFINITY);
        let got = stats(device, &all, &ids, PLAIN);
        let (_, p) = log_softmax(PLAIN, &wide(&all[2 * V..3 * V]));
        let want: f64 = -p.iter().filter(|p| p.is_finite()).map(|p| p.exp() * p).sum::<f64>();
        assert!((f64::from(got.entropy.to_f32().unwrap()[2]) - want).abs() < 1e-4);
        assert!((f64::from(got.logprobs.to_f32().unwrap()[2]) - p[517]).abs() < 1e-4);
    }
}

#[test]
fn kl_and_its_gradient_are_the_formula() {
    if !can_emulate() {
        return;
    }
    let (of_p, of_q) = (products(1), products(2));
    for device in devices() {
        let (dkl, dkls) = random(device, Element::F32, 1, R, 5);
        for shape in shapes() {
            let mut running = kl::Running::new(device, R, shape).unwrap();
            for (first, width) in strips() {
                let (p, q) = (strip(device, &of_p, first, width), strip(device, &of_q, first, width));
                running.add(&p, &q, width).unwrap();
            }
            let got = running.finish().unwrap();
            let (mut want, mut gradient) = (vec![], vec![]);
            for (i, (p, q)) in wide(&of_p).chunks(V).zip(wide(&of_q).chunks(V)).enumerate() {
                let ((_, a), (_, b)) = (log_softmax(shape, p), log_softmax(shape, q));
                let kl: f64 = a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum();
                want.push(kl);
                for ((a, b), &x) in a.iter().zip(&b).zip(p) {
                    gradient.push(dkls[i] * a.exp() * (a - b - kl) * logit(shape, x).1);
                }
            }
            close("kl", &got.kl, &want);
            for element in FLOATS {
                let mut parts = vec![];
                for (first, width) in strips() {
                    let (p, q) = (strip(device, &of_p, first, width), strip(device, &of_q, first, width));
                    let d = match element {
                        Element::F32 => p.clone(),
                        _ => device.matrix(element, R, STRIP).unwrap(),
                    };
                    kl::backward(&p, &q, width, &got, &dkl, shape, &d).unwrap();
                    parts.push((first, width, d));
                }
                close_numbers("d of kl", element, &gathered(&parts), &gradient);
            }
        }
    }
}

#[test]
fn kl_of_equals_is_zero_and_nan_shows() {
    if !can_emulate() {
        return;
    }
    for device in devices() {
        let all = products(1);
        let of = |p: &[f32], q: &[f32]| {
            let mut running = kl::Running::new(device, R, PLAIN).unwrap();
            for (first, width) in strips() {
                running.add(&strip(device, p, first, width), &strip(device, q, first, width), width).unwrap();
            }
            running.finish().unwrap().kl.to_f32().unwrap()
        };
        assert!(of(&all, &all).iter().all(|&kl| (0.0..1e-6).contains(&kl)));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut spoilt = all.clone();
            spoilt[3 * V + 700] = bad;
            for kl in [of(&spoilt, &all), of(&all, &spoilt)] {
                assert!(kl[3].is_nan() && kl.iter().filter(|v| v.is_nan()).count() == 1, "{kl:?}");
            }
        }
    }
}

#[test]
fn no_positions_are_no_work() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let none = device.upload_u32(&[]).unwrap();
    let empty = device.matrix(Element::F32, 0, 9).unwrap();
    let mut running = logprobs::Running::new(&none, PLAIN).unwrap();
    running.add(&empty, 9).unwrap();
    assert_eq!(running.finish().unwrap().logprobs.len(), 0);
    let mut running = kl::Running::new(device, 0, PLAIN).unwrap();
    running.add(&empty, &empty, 9).unwrap();
    assert_eq!(running.finish().unwrap().kl.len(), 0);
    assert!(logprobs::Running::new(&none, PLAIN).unwrap().finish().is_err());
}
