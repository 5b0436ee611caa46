//! Attention over ragged batches, forward and backward.

use fourfold::device::testing::can_emulate;
use fourfold::device::{Device, Element, Matrix};
use fourfold::ops::attention::Heads;
use fourfold::ops::attention::gpu::{DeviceSequences, backward, forward};

use crate::support::*;

/// What f64 says of a batch.
struct Reference {
    o: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

struct Operands {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    d_o: Vec<f64>,
}

fn reference(x: &Operands, cu_seqlens: &[usize], key_len: Option<&[usize]>, heads: Heads) -> Reference {
    let (dim, wq, wkv) = (heads.dim, heads.q * heads.dim, heads.kv * heads.dim);
    let zeros = |like: &[f64]| vec![0f64; like.len()];
    let mut r = Reference { o: zeros(&x.q), dq: zeros(&x.q), dk: zeros(&x.k), dv: zeros(&x.v) };
    let (scale, cap) = (f64::from(heads.scale), heads.soft_cap.map(f64::from));
    for s in 0..cu_seqlens.len() - 1 {
        for h in 0..heads.q {
            let column = h / (heads.q / heads.kv) * dim;
            for i in 0..cu_seqlens[s + 1] - cu_seqlens[s] {
                let q_at = (cu_seqlens[s] + i) * wq + h * dim;
                let kv_at = |j: usize| (cu_seqlens[s] + j) * wkv + column;
                let end = key_len.map_or(usize::MAX, |r| r[s]).min(i + 1);
                let first = heads.window.map_or(0, |w| (i + 1).saturating_sub(w)).min(end - 1);
                let dot = |a: &[f64], i: usize, b: &[f64], j: usize| (0..dim).map(|d| a[i + d] * b[j + d]).sum::<f64>();
                let scores: Vec<f64> = (first..end)
                    .map(|j| {
                        let s = scale * dot(&x.q, q_at, &x.k, kv_at(j));
                        cap.map_or(s, |c| c * (s / c).tanh())
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|s| (s - top).exp() / sum).collect();
                let dp: Vec<f64> = (first..end).map(|j| dot(&x.d_o, q_at, &x.v, kv_at(j))).collect();
                let mean: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
                for (n, j) in (first..end).enumerate() {
                    let slope = cap.map_or(scale, |c| scale * (1.0 - (scores[n] / c).powi(2)));
                    let ds = slope * p[n] * (dp[n] - mean);
                    for d in 0..dim {
                        r.o[q_at + d] += p[n] * x.v[kv_at(j) + d];
                        r.dq[q_at + d] += ds * x.k[kv_at(j) + d];
                        r.dk[kv_at(j) + d] += ds * x.q[q_at + d];
                        r.dv[kv_at(j) + d] += p[n] * x.d_o[q_at + d];
                    }
                }
            }
        }
    }
    r
}

fn operands(device: &Device, element: Element, n: usize, heads: Heads) -> ([Matrix; 4], Operands) {
    let (wq, wkv) = (heads.q * heads.dim, heads.kv * heads.dim);
    let (q, qs) = random(device, element, n, wq, 1);
    let (k, ks) = random(device, element, n, wkv, 2);
    let (v, vs) = random(device, element, n, wkv, 3);
    let (g, gs) = random(device, element, n, wq, 4);
    ([q, k, v, g], Operands { q: qs, k: ks, v: vs, d_o: gs })
}

fn compare(
    device: &Device,
    element: Element,
    cu_seqlens: &[usize],
    key_len: Option<&[usize]>,
    heads: Heads,
    panel: Option<(usize, usize)>,
) {
    let batch = DeviceSequences::new(device, cu_seqlens, key_len).unwrap();
    let batch = panel.map_or(batch.clone(), |(bytes, queries)| batch.with_panels(bytes, queries));
    let ([q, k, v, g], numbers) = operands(device, element, batch.rows(), heads);
    let want = reference(&numbers, cu_seqlens, key_len, heads);
    let what = format!("{heads:?} {cu_seqlens:?} {key_len:?} {panel:?}");
    close(&what, &forward(&q, &k, &v, &batch, heads).unwrap(), &want.o);
    let (dq, dk, dv) = backward(&q, &k, &v, &batch, heads, &g).unwrap();
    close(&format!("dq {what}"), &dq, &want.dq);
    close(&format!("dk {what}"), &dk, &want.dk);
    close(&format!("dv {what}"), &dv, &want.dv);
}

fn shapes() -> Vec<Heads> {
    let full = [Heads::full(2, 2, 8), Heads::full(6, 2, 5), Heads::full(6, 3, 16), Heads::full(4, 1, 12)];
    let mut all = vec![];
    for heads in full {
        all.push(heads);
        all.push(Heads { window: Some(4), ..heads });
        all.push(Heads { soft_cap: Some(0.8), scale: 1.5, ..heads });
        all.push(Heads { window: Some(7), soft_cap: Some(2.0), ..heads });
    }
    all
}

/// Sequences alone, of no tokens, of one token, and several of one length in a row.
const CU_SEQLENS: [usize; 10] = [0, 13, 13, 14, 23, 32, 41, 50, 59, 96];
const KEY_LEN: [usize; 9] = [13, 1, 1, 9, 5, 1, 20, 8, 30];

#[test]
fn attention_is_the_formula_over_ragged_batches() {
    if !can_emulate() {
        return;
    }
    for (device, heads) in devices().iter().cycle().zip(shapes()) {
        for element in FLOATS {
            compare(device, element, &CU_SEQLENS, None, heads, None);
            compare(device, element, &CU_SEQLENS, Some(&KEY_LEN), heads, None);
        }
    }
}

#[test]
fn panels_of_any_size_give_the_same() {
    if !can_emulate() {
        return;
    }
    for (device, heads) in devices().iter().cycle().zip(shapes()) {
        for panel in [(1, 1), (6000, 5), (20_000, 16), (1 << 20, 3)] {
            compare(device, Element::F32, &CU_SEQLENS, Some(&KEY_LEN), heads, Some(panel));
        }
    }
}

#[test]
fn a_sequence_of_more_queries_than_a_panel() {
    if !can_emulate() {
        return;
    }
    let heads = Heads { window: Some(100), ..Heads::full(2, 1, 8) };
    compare(device(), Element::F32, &[0, 530], None, heads, None);
    compare(device(), Element::Bf16, &[0, 530], Some(&[400]), Heads { window: None, ..heads }, None);
}

/// Tiles of 64 queries and keys: heads that fill them and that do not, windows and caps that end in the middle of one, groups,
/// readable keys that end before the queries.
#[test]
fn long_sequences_in_tiles() {
    if !can_emulate() {
        return;
    }
    let shapes = [Heads::full(4, 2, 64), Heads::full(2, 1, 128), Heads::full(3, 3, 90), Heads::full(2, 2, 33)];
    let (cu_seqlens, key_len) = ([0, 150, 151, 215, 345], [150, 1, 40, 70]);
    for (device, (heads, element)) in
        devices().iter().cycle().zip(shapes.into_iter().zip([Element::Bf16, Element::F16].into_iter().cycle()))
    {
        for (window, soft_cap, key_len) in [
            (None, None, None),
            (Some(70), None, Some(&key_len[..])),
            (Some(5), Some(1.5), None),
            (Some(64), None, None),
        ] {
            compare(device, element, &cu_seqlens, key_len, Heads { window, soft_cap, ..heads }, None);
        }
    }
}

#[test]
fn the_same_bits_every_time_and_in_any_order_of_threads() {
    if !can_emulate() {
        return;
    }
    let heads = Heads { soft_cap: Some(1.0), ..Heads::full(4, 2, 8) };
    let results: Vec<Vec<Vec<u8>>> = devices()
        .iter()
        .map(|device| {
            let batch = DeviceSequences::new(device, &CU_SEQLENS, None).unwrap();
            let ([q, k, v, g], _) = operands(device, Element::Bf16, batch.rows(), heads);
            let (dq, dk, dv) = backward(&q, &k, &v, &batch, heads, &g).unwrap();
            [forward(&q, &k, &v, &batch, heads).unwrap(), dq, dk, dv].map(|m| m.to_bytes().unwrap()).to_vec()
        })
        .collect();
    assert!(results.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn an_infinite_or_nan_score_makes_its_row_nan() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let heads = Heads::full(2, 1, 8);
    let batch = DeviceSequences::new(device, &[0, 6, 9], None).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let (k, _) = random(device, Element::F32, 9, 8, 2);
        let (v, _) = random(device, Element::F32, 9, 8, 3);
        let mut numbers: Vec<f32> = Random::new(1).numbers(9 * 16);
        numbers[4 * 16] = bad; // Query 4 of the first sequence, first head.
        let q = device.upload_f32(&numbers, 9, 16).unwrap();
        let o = forward(&q, &k, &v, &batch, heads).unwrap().to_f32().unwrap();
        for (i, v) in o.iter().enumerate() {
            assert_eq!(v.is_nan(), i / 8 == 8, "number {i} is {v} with {bad}");
        }
        let (dq, _, _) = backward(&q, &k, &v, &batch, heads, &q).unwrap();
        assert!(dq.to_f32().unwrap()[8 * 8..9 * 8].iter().all(|v| v.is_nan()));
    }
}

#[test]
fn attention_refuses_what_does_not_fit_and_takes_no_rows() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let heads = Heads::full(2, 1, 8);
    let batch = DeviceSequences::new(device, &[0, 0], None).unwrap();
    let ([q, k, v, g], _) = operands(device, Element::F32, 0, heads);
    assert_eq!(forward(&q, &k, &v, &batch, heads).unwrap().rows(), 0);
    assert_eq!(backward(&q, &k, &v, &batch, heads, &g).unwrap().1.rows(), 0);
    let batch = DeviceSequences::new(device, &[0, 3], None).unwrap();
    assert!(forward(&q, &k, &v, &batch, heads).is_err());
    let ([q, k, v, _], _) = operands(device, Element::F32, 3, heads);
    assert!(forward(&q, &k, &v, &batch, Heads::full(3, 2, 8)).is_err());
    assert!(forward(&q, &k, &k.reshape(1, 24).unwrap(), &batch, heads).is_err());
    assert!(forward(&q, &k, &v, &batch, Heads { window: Some(0), ..heads }).is_err());
    assert!(DeviceSequences::new(device, &[0, 3, 2], None).is_err());
    assert!(DeviceSequences::new(device, &[0, 3], Some(&[0])).is_err());
}
