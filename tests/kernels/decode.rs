//! The KV cache and attention of one query per sequence. Read `decode_q8.rs` for a cache in q8_0.

use fourfold::device::testing::can_emulate;
use fourfold::device::{Device, Element, Matrix};
use fourfold::ops::attention::device_cache::{Copied, DeviceCache, Live, Writes};
use fourfold::ops::attention::{Heads, KvCacheType};
use fourfold::ops::rope::Direction;
use fourfold::ops::rope::gpu::DeviceRopeTable;

use crate::support::*;

pub const CAPACITY: usize = 700;
pub const SLOTS: [usize; 4] = [5, 0, 3, 2];
pub const LENGTHS: [usize; 4] = [1, 300, 37, 650];

#[test]
fn one_query_over_a_cache_is_the_formula() {
    if !can_emulate() {
        return;
    }
    let full = [Heads::full(2, 2, 8), Heads::full(3, 1, 20), Heads::full(14, 2, 64), Heads::full(4, 1, 256)];
    for (device, heads) in devices().iter().cycle().zip(full) {
        for element in FLOATS {
            for (window, soft_cap) in [(None, None), (Some(290), None), (Some(16), Some(1.5))] {
                let heads = Heads { window, soft_cap, ..heads };
                let width = heads.kv * heads.dim;
                let cache = DeviceCache::new(device, (element, KvCacheType::Auto), 6, CAPACITY, heads).unwrap();
                // All but the newest tokens come from a ragged batch of their own; the newest ones from a second write.
                let (mut copied, mut rows) = (vec![], 0);
                for (&slot, &length) in SLOTS.iter().zip(&LENGTHS) {
                    copied.push(Copied { rows: rows..rows + length - 1, slot, position: 0 });
                    rows += length;
                }
                let (k, ks) = random(device, element, rows, width, 1);
                let (v, vs) = random(device, element, rows, width, 2);
                cache.write(&k, &v, &Writes::new(device, CAPACITY, &copied).unwrap()).unwrap();
                let live = Live::new(device, CAPACITY, &SLOTS, &LENGTHS).unwrap();
                let newest = |from: &[f64]| -> Vec<f32> {
                    copied.iter().flat_map(|c| &from[c.rows.end * width..][..width]).map(|&v| v as f32).collect()
                };
                let new_k = device.upload_as(element, &newest(&ks), SLOTS.len(), width).unwrap();
                let new_v = device.upload_as(element, &newest(&vs), SLOTS.len(), width).unwrap();
                cache.write(&new_k, &new_v, live.newest()).unwrap();
                let (q, qs) = random(device, element, SLOTS.len(), heads.q * heads.dim, 3);
                let o = cache.decode(&q, &live, heads).unwrap();
                close(&format!("{heads:?}"), &o, &reference(&qs, &ks, &vs, heads));
            }
        }
    }
}

/// The keys and values of the four sequences lie one after the other.
pub fn reference(q: &[f64], k: &[f64], v: &[f64], heads: Heads) -> Vec<f64> {
    let (dim, width) = (heads.dim, heads.kv * heads.dim);
    let mut o = vec![0f64; q.len()];
    let mut start = 0;
    for (s, &length) in LENGTHS.iter().enumerate() {
        for h in 0..heads.q {
            let (at, column) = ((s * heads.q + h) * dim, h / (heads.q / heads.kv) * dim);
            let first = heads.window.map_or(0, |w| length.saturating_sub(w));
            let row = |j: usize| (start + j) * width + column;
            let scores: Vec<f64> = (first..length)
                .map(|j| {
                    let dot: f64 = (0..dim).map(|d| q[at + d] * k[row(j) + d]).sum();
                    let s = dot * f64::from(heads.scale);
                    heads.soft_cap.map(f64::from).map_or(s, |c| c * (s / c).tanh())
                })
                .collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            for (n, j) in (first..length).enumerate() {
                (0..dim).for_each(|d| o[at + d] += scores[n].exp() / sum * v[row(j) + d]);
            }
        }
        start += length;
    }
    o
}

#[test]
fn one_prompt_goes_to_several_slots_and_a_nan_key_shows() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let heads = Heads::full(2, 1, 8);
    let cache = DeviceCache::new(device, (Element::F32, KvCacheType::Auto), 3, 10, heads).unwrap();
    let (k, _) = random(device, Element::F32, 5, 8, 1);
    let (v, _) = random(device, Element::F32, 5, 8, 2);
    let copied = [0, 1, 2].map(|slot| Copied { rows: 1..5, slot, position: 0 });
    cache.write(&k, &v, &Writes::new(device, 10, &copied).unwrap()).unwrap();
    let one = Random::new(3).numbers(16);
    let q = device.upload_f32(&[&one[..], &one, &one].concat(), 3, 16).unwrap();
    let live = Live::new(device, 10, &[0, 1, 2], &[4, 4, 4]).unwrap();
    let o = cache.decode(&q, &live, heads).unwrap().to_f32().unwrap();
    assert!(o[..16] == o[16..32] && o[..16] == o[32..] && o.iter().all(|v| v.is_finite()));
    // The middle one leaves: nothing moves, and the others are what they were.
    let two = device.upload_f32(&[&one[..], &one].concat(), 2, 16).unwrap();
    let left = Live::new(device, 10, &[2, 0], &[4, 4]).unwrap();
    assert_eq!(cache.decode(&two, &left, heads).unwrap().to_f32().unwrap(), o[..32]);
    let mut spoilt = vec![0.5; 8];
    spoilt[3] = f32::NAN;
    let bad = device.upload_f32(&spoilt, 1, 8).unwrap();
    let good = device.upload_f32(&[0.5; 8], 1, 8).unwrap();
    let at = [Copied { rows: 0..1, slot: 1, position: 2 }];
    cache.write(&bad, &good, &Writes::new(device, 10, &at).unwrap()).unwrap();
    let o = cache.decode(&q, &live, heads).unwrap().to_f32().unwrap();
    assert!(o[16..32].iter().all(|v| v.is_nan()) && o[..16].iter().chain(&o[32..]).all(|v| v.is_finite()));
}

/// One launch does what three rotations and writes did: q where it lies, k rotated and v into the row of the newest token,
/// and no other row of the cache.
/// The rotations of `half` pairs of a head at nine positions; `None` for no pair.
pub fn rope_table(device: &Device, half: usize, dim: usize) -> Option<DeviceRopeTable> {
    let angles: Vec<f32> = (0..9 * half).map(|i| (i / half) as f32 * 0.4f32.powi((i % half) as i32)).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    (half > 0).then(|| DeviceRopeTable::new(device, &cos, &sin, half, dim).unwrap())
}

#[test]
fn a_token_is_rotated_and_appended_in_one_launch() {
    if !can_emulate() {
        return;
    }
    let (slots, lengths, capacity) = ([2, 0, 3], [7usize, 1, 9], 9);
    let positions: Vec<u32> = lengths.iter().map(|&n| n as u32 - 1).collect();
    for (device, (q_heads, kv, dim, half)) in
        own_devices().iter().cycle().zip([(4, 2, 10, 5), (3, 3, 64, 20), (5, 1, 7, 0)])
    {
        let heads = Heads::full(q_heads, kv, dim);
        let tables = rope_table(device, half, dim);
        let rotation = tables.as_ref().map(|tables| (tables, tables.place(&positions).unwrap()));
        let rotation = rotation.as_ref().map(|(tables, at)| (*tables, at));
        let rotate = |x: &Matrix| rotation.map_or(x.clone(), |(t, at)| t.rotate(x, at, Direction::Forward).unwrap());
        for element in FLOATS {
            let live = Live::new(device, capacity, &slots, &lengths).unwrap();
            let [(q, _), (k, _), (v, _)] = [(q_heads, 1), (kv, 2), (kv, 3)]
                .map(|(heads, seed)| random(device, element, slots.len(), heads * dim, seed));
            let filled = || {
                let cache = DeviceCache::new(device, (element, KvCacheType::Auto), 4, capacity, heads).unwrap();
                let (old, _) = random(device, element, 4 * capacity, kv * dim, 4);
                let all =
                    [0, 1, 2, 3].map(|slot| Copied { rows: slot * capacity..(slot + 1) * capacity, slot, position: 0 });
                cache.write(&old, &old, &Writes::new(device, capacity, &all).unwrap()).unwrap();
                cache
            };
            let (want, got) = (filled(), filled());
            want.write(&rotate(&k), &v, live.newest()).unwrap();
            let turned = rotate(&q).to_f32().unwrap();
            let before = device.work();
            got.append([&q, &k, &v], &live, heads, rotation).unwrap();
            assert_eq!((device.work() - before).launches, 1);
            assert_eq!(q.to_f32().unwrap(), turned, "{element} {heads:?}: q");
            same("cached keys", got.rows().0, want.rows().0);
            same("cached values", got.rows().1, want.rows().1);
        }
        let (other, _) = random(device, Element::F32, 2, kv * dim, 5);
        let (q, _) = random(device, Element::F32, 2, q_heads * dim, 6);
        let cache = DeviceCache::new(device, (Element::F32, KvCacheType::Auto), 4, capacity, heads).unwrap();
        let live = Live::new(device, capacity, &slots, &lengths).unwrap();
        assert!(cache.append([&q, &other, &other], &live, heads, None).is_err(), "two rows for three sequences");
    }
}

#[test]
fn the_cache_refuses_what_does_not_fit() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let heads = Heads::full(2, 1, 8);
    let cache = DeviceCache::new(device, (Element::F32, KvCacheType::Auto), 3, 10, heads).unwrap();
    assert_eq!((cache.slots(), cache.capacity()), (3, 10));
    assert!(Live::new(device, 10, &[0], &[11]).is_err());
    assert!(Live::new(device, 10, &[0], &[0]).is_err());
    assert!(Live::new(device, 10, &[1, 1], &[2, 3]).is_err());
    assert!(Writes::new(device, 10, &[Copied { rows: 0..4, slot: 0, position: 7 }]).is_err());
    let twice = [0, 3].map(|position| Copied { rows: 0..4, slot: 0, position });
    assert!(Writes::new(device, 10, &twice).is_err());
    let (q, _) = random(device, Element::F32, 1, 16, 1);
    let decode = |live: Live| cache.decode(&q, &live, heads).map(|_| ());
    assert!(decode(Live::new(device, 10, &[3], &[1]).unwrap()).is_err());
    assert!(decode(Live::new(device, 9, &[0], &[1]).unwrap()).is_err());
    assert!(decode(Live::new(device, 10, &[0, 1], &[1, 1]).unwrap()).is_err());
    let (k, _) = random(device, Element::F32, 2, 8, 1);
    let write = Writes::new(device, 10, &[Copied { rows: 1..3, slot: 0, position: 0 }]).unwrap();
    assert!(cache.write(&k, &k, &write).is_err());
    let none = Live::new(device, 10, &[], &[]).unwrap();
    let empty = device.matrix(Element::F32, 0, 16).unwrap();
    assert_eq!(cache.decode(&empty, &none, heads).unwrap().rows(), 0);
}
