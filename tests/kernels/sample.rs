//! Sampling on a device against the host's sampler: the same tokens, and the same log-probabilities in every bit.

use std::sync::Arc;

use fourfold::device::emulated::Emulated;
use fourfold::device::testing::can_emulate;
use fourfold::device::{Array, Device, Work};
use fourfold::ops::logprobs::Logits;
use fourfold::ops::sample::{Distribution, Sampler};

use crate::support::*;

/// A machine whose counts no other test adds to.
fn own() -> Device {
    Device::new(Arc::new(Emulated::open().unwrap()))
}

const fn by(temperature: f64, top_k: usize, top_p: f64) -> Distribution {
    Distribution { temperature, top_k, top_p }
}

/// Products of several kinds, a row each: flat, as a model's, peaked, with many ties, and with impossible tokens.
fn products(rows: usize, vocab: usize, random: &mut Random) -> Vec<f32> {
    let mut all = Vec::with_capacity(rows * vocab);
    for row in 0..rows {
        let scale = [0.3, 4.0, 20.0, 3.0, 6.0][row % 5];
        for i in 0..vocab {
            // The sum of three uniform numbers is nearly normal.
            let x = scale * (random.next() + random.next() + random.next());
            all.push(match row % 5 {
                3 => x.round(),
                4 if i % 3 == 1 => f32::NEG_INFINITY,
                _ => x,
            });
        }
    }
    all
}

fn uniform(random: &mut Random) -> f64 {
    let (high, low) = (f64::from(random.next()) * 0.5 + 0.5, f64::from(random.next()) * 0.5 + 0.5);
    high + low * 2f64.powi(-24)
}

/// Both draw from the same products; what the device issued beyond the first upload.
#[track_caller]
fn compare(
    device: &Device,
    products: &[f32],
    rows: usize,
    (multiplier, soft_cap): (f32, Option<f32>),
    by: Distribution,
    draws: &[f64],
) -> Work {
    let vocab = products.len() / rows;
    let on_host = candle_core::Tensor::from_vec(products.to_vec(), (rows, vocab), &candle_core::Device::Cpu).unwrap();
    let there = device.upload_f32(products, rows, vocab).unwrap();
    let mut sampler = Sampler::default();
    let want = sampler.sample(&Logits::new(Array::Host(on_host), multiplier, soft_cap), by, draws).unwrap();
    let before = device.work();
    let got = sampler.sample(&Logits::new(Array::Device(there), multiplier, soft_cap), by, draws).unwrap();
    let work = device.work() - before;
    for (row, (got, want)) in got.iter().zip(&want).enumerate() {
        let what = format!("row {row} of {rows}, {vocab} tokens, {by:?}, draw {:e}: {got:?}, not {want:?}", draws[row]);
        assert_eq!((got.0, got.1.to_bits()), (want.0, want.1.to_bits()), "{what}");
        assert!(want.1 <= 0.0 && want.1.is_finite(), "{what}");
    }
    work
}

const SETTINGS: [Distribution; 9] = [
    by(0.0, 0, 1.0),
    by(1.0, 0, 1.0),
    by(0.7, 0, 1.0),
    by(1.9, 1, 1.0),
    by(1.0, 40, 1.0),
    by(0.8, 1000, 0.95),
    by(1.0, 0, 0.9),
    by(0.6, 0, 0.3),
    by(1.2, 20, 0.5),
];

#[test]
fn ten_thousand_draws_are_the_hosts() {
    if !can_emulate() {
        return;
    }
    let (device, mut random) = (own(), Random::new(11));
    let (mut drawn, mut on_host, rows) = (0, 0, 20);
    for vocab in [2, 61, 1000, 2049, 5003] {
        for (setting, by) in SETTINGS.into_iter().enumerate() {
            for round in 0..12 {
                let shape = match (round + setting) % 4 {
                    0 | 1 => (1.0, None),
                    2 => (0.7, None),
                    _ => (1.3, Some(9.0)),
                };
                let products = products(rows, vocab, &mut random);
                let draws: Vec<f64> = (0..rows).map(|_| uniform(&mut random)).collect();
                let work = compare(&device, &products, rows, shape, by, &draws);
                // One download for all rows, and one for each that the host draws.
                assert!(work.downloads >= 1 && work.uploads == 1, "{work:?}");
                let wide = by.top_p < 1.0 && by.top_k == 0 && vocab > 1024;
                if !wide {
                    on_host += work.downloads - 1;
                }
                assert_eq!(work.copied, (8 + 16) * rows + (work.downloads - 1) * 4 * vocab, "{work:?}");
                assert_eq!(work.launches, if by.temperature > 0.0 && (by.top_k, by.top_p) != (0, 1.0) { 3 } else { 2 });
                drawn += rows;
            }
        }
    }
    assert!(drawn >= 10_000, "{drawn}");
    assert!(on_host <= 2, "{on_host} of {drawn} draws went to the host");
}

#[test]
fn draws_in_another_order_of_threads_are_the_hosts() {
    if !can_emulate() {
        return;
    }
    let mut random = Random::new(12);
    for device in &devices()[1..] {
        for vocab in [300, 4100] {
            for by in SETTINGS {
                let (products, draws) = (products(10, vocab, &mut random), [0; 10].map(|_| uniform(&mut random)));
                compare(device, &products, 10, (1.0, None), by, &draws);
            }
        }
    }
}

#[test]
fn a_draw_at_the_boundary_of_two_tokens_is_the_hosts() {
    if !can_emulate() {
        return;
    }
    // Equal weights: every multiple of 1 / 256 is the end of one token and the start of the next.
    let (device, flat) = (own(), vec![0.5f32; 256 * 256]);
    let draws: Vec<f64> = (0..256).map(|i| f64::from(i) / 256.0).collect();
    let work = compare(&device, &flat, 256, (1.0, None), by(1.0, 0, 1.0), &draws);
    assert_eq!(work.downloads, 1 + 255, "the host draws all but the draw of 0");
    // The host's own walk over the tokens that top-k leaves needs no help.
    let work = compare(&device, &flat, 256, (1.0, None), by(1.0, 100, 1.0), &draws);
    assert_eq!(work.downloads, 1);
    // The last of all tokens: the f32 sum may be above what the walk reaches.
    let (mut random, last) = (Random::new(13), [1.0 - 2f64.powi(-53); 10]);
    for vocab in [100, 5000] {
        compare(&device, &products(10, vocab, &mut random), 10, (1.0, None), by(1.0, 0, 1.0), &last);
    }
}

#[test]
fn what_the_device_cannot_draw_the_host_draws() {
    if !can_emulate() {
        return;
    }
    let (device, rows, vocab) = (own(), 4, 3000);
    let mut random = Random::new(14);
    // Nearly equal: top-p leaves about 2,700 tokens. The third row is peaked, and stays on the device.
    let mut flat: Vec<f32> = random.numbers(rows * vocab).iter().map(|x| 0.01 * x).collect();
    flat[2 * vocab + 7] = 30.0;
    let draws = [0.1, 0.4, 0.5, 0.9];
    let work = compare(&device, &flat, rows, (1.0, None), by(1.0, 0, 0.9), &draws);
    assert_eq!(work.downloads, 1 + 3);
    // More than the device sorts.
    let work = compare(&device, &flat, rows, (1.0, None), by(1.0, 2000, 0.9), &draws);
    assert_eq!((work.launches, work.downloads, work.copied), (0, 1, 4 * rows * vocab));
}

#[test]
fn logits_that_are_nan_or_infinite_are_an_error_on_a_device() {
    if !can_emulate() {
        return;
    }
    for bad in [f32::NAN, f32::INFINITY] {
        for by in SETTINGS {
            let mut products = noise(2 * 50, 3);
            products[70] = bad;
            let logits = Logits::new(device().upload_f32(&products, 2, 50).unwrap().into(), 1.0, None);
            let error = Sampler::default().sample(&logits, by, &[0.5, 0.5]).unwrap_err();
            assert!(format!("{error:#}").contains("NaN or infinite"), "{error:#}");
        }
    }
}
