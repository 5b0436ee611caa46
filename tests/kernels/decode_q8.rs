//! The KV cache in q8_0: what is written, against the CPU's quantisation bit by bit; attention over it, against float64 over the
//! very numbers of its blocks; and how far that is from attention over the numbers before they were rounded.

use std::ops::Range;

use fourfold::device::testing::can_emulate;
use fourfold::device::{Array, Device, Element, Matrix};
use fourfold::ops::attention;
use fourfold::ops::attention::device_cache::{Copied, DeviceCache, Live, Writes};
use fourfold::ops::attention::{Heads, KvCache, KvCacheType};
use fourfold::ops::rope::{Direction, RopeTable};
use fourfold::ops::storage::dtype::StorageDType;
use fourfold::ops::storage::quantise::quantise;

use crate::decode::{CAPACITY, LENGTHS, SLOTS, reference, rope_table};
use crate::support::*;

/// A block as ggml has it: an f16 scale and 32 signed bytes.
const BLOCK: usize = 34;

/// Rows of keys or of values as ggml's blocks.
fn blocks(bytes: &Matrix, scales: &Matrix, rows: Range<usize>) -> Vec<u8> {
    let (bytes, scales) = (bytes.row_range(rows.clone()).unwrap(), scales.row_range(rows).unwrap());
    let (bytes, scales) = (bytes.to_bytes().unwrap(), scales.to_bytes().unwrap());
    bytes.chunks(32).zip(scales.chunks(2)).flat_map(|(q, d)| [d, q].concat()).collect()
}

/// The CPU's blocks of some rows.
fn on_the_cpu(values: &[f64]) -> Vec<u8> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    let mut out = vec![];
    quantise(StorageDType::Q8_0, &values, &mut out).unwrap();
    out
}

/// The numbers of blocks.
fn numbers(blocks: &[u8]) -> Vec<f64> {
    let scale = |b: &[u8]| f64::from(half::f16::from_le_bytes([b[0], b[1]]).to_f32());
    blocks.chunks(BLOCK).flat_map(|b| b[2..].iter().map(move |&q| f64::from(q as i8) * scale(b))).collect()
}

fn cache(device: &Device, element: Element, slots: usize, capacity: usize, heads: Heads) -> DeviceCache {
    DeviceCache::new(device, (element, KvCacheType::Q8_0), slots, capacity, heads).unwrap()
}

/// Both planes of keys and of values.
fn planes(cache: &DeviceCache) -> [(&Matrix, &Matrix); 2] {
    let ((keys, values), (of_keys, of_values)) = (cache.rows(), cache.scales().unwrap());
    [(keys, of_keys), (values, of_values)]
}

/// Numbers of all sizes that an f16 holds, among them blocks of zeros, of one number and of borders between two bytes.
fn of_all_sizes(rows: usize, width: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut all = vec![];
    for block in 0..rows * width / 32 {
        let size = [1.0, 0.0, 1e-6, 3e-5, 40.0, 6e4, 0.02][block % 7];
        let noise = random.numbers(32);
        all.extend((0..32).map(|i| match block % 11 {
            9 if i > 0 => 0.0,
            10 => size * ((i as f32 - 15.0) * 8.0 + 0.5) / 127.0,
            _ => size * noise[i],
        }));
    }
    all
}

#[test]
fn written_blocks_are_those_of_the_cpu() {
    if !can_emulate() {
        return;
    }
    // One row is longer than a tile of 1,024 columns, and one ends within a tile.
    for (device, (kv, dim)) in devices().iter().cycle().zip([(2, 32), (1, 96), (5, 256), (3, 64)]) {
        for element in FLOATS {
            let (heads, width) = (Heads::full(2 * kv, kv, dim), kv * dim);
            let cache = cache(device, element, 4, 9, heads);
            let (k, ks) = upload(device, element, &of_all_sizes(11, width, 1), 11, width);
            let (v, vs) = upload(device, element, &of_all_sizes(11, width, 2), 11, width);
            let copied = [
                Copied { rows: 4..11, slot: 2, position: 1 },
                Copied { rows: 0..2, slot: 0, position: 7 },
                Copied { rows: 0..2, slot: 3, position: 0 },
            ];
            cache.write(&k, &v, &Writes::new(device, 9, &copied).unwrap()).unwrap();
            for ((bytes, scales), from) in planes(&cache).into_iter().zip([&ks, &vs]) {
                for Copied { rows, slot, position } in &copied {
                    let at = slot * 9 + position;
                    let got = blocks(bytes, scales, at..at + rows.len());
                    let want = on_the_cpu(&from[rows.start * width..rows.end * width]);
                    assert!(got == want, "{element}, {kv} heads of {dim}, rows {rows:?}");
                }
            }
        }
    }
}

/// The launch that rotates and appends writes the blocks of what the rotation alone leaves.
#[test]
fn an_appended_token_has_the_blocks_of_its_rotated_key() {
    if !can_emulate() {
        return;
    }
    let (slots, lengths, capacity) = ([2, 0, 3], [7usize, 1, 9], 9);
    let positions: Vec<u32> = lengths.iter().map(|&n| n as u32 - 1).collect();
    for (device, (q_heads, kv, dim, half)) in
        own_devices().iter().cycle().zip([(4, 2, 32, 16), (3, 3, 64, 20), (5, 1, 96, 0), (2, 2, 256, 128)])
    {
        let heads = Heads::full(q_heads, kv, dim);
        let tables = rope_table(device, half, dim);
        let rotation = tables.as_ref().map(|tables| (tables, tables.place(&positions).unwrap()));
        let rotation = rotation.as_ref().map(|(tables, at)| (*tables, at));
        let rotate = |x: &Matrix| rotation.map_or(x.clone(), |(t, at)| t.rotate(x, at, Direction::Forward).unwrap());
        for element in FLOATS {
            let live = Live::new(device, capacity, &slots, &lengths).unwrap();
            let [(q, _), (k, _), (v, vs)] = [(q_heads, 1), (kv, 2), (kv, 3)]
                .map(|(heads, seed)| random(device, element, slots.len(), heads * dim, seed));
            let cache = cache(device, element, 4, capacity, heads);
            let untouched = planes(&cache).map(|(bytes, scales)| blocks(bytes, scales, 0..4 * capacity));
            let (turned_q, turned_k) = (rotate(&q).to_f32().unwrap(), wide(&rotate(&k).to_f32().unwrap()));
            let before = device.work();
            cache.append([&q, &k, &v], &live, heads, rotation).unwrap();
            assert_eq!((device.work() - before).launches, 1);
            assert_eq!(q.to_f32().unwrap(), turned_q, "{element} {heads:?}: q");
            let row = kv * dim / 32 * BLOCK;
            for (((bytes, scales), from), mut want) in planes(&cache).into_iter().zip([&turned_k, &vs]).zip(untouched) {
                for (i, (slot, length)) in slots.iter().zip(lengths).enumerate() {
                    let at = (slot * capacity + length - 1) * row;
                    want[at..at + row].copy_from_slice(&on_the_cpu(&from[i * kv * dim..(i + 1) * kv * dim]));
                }
                assert!(blocks(bytes, scales, 0..4 * capacity) == want, "{element} {heads:?}: other blocks");
            }
        }
    }
}

/// How far attention over blocks may be from attention over the numbers themselves, of a head relative to its largest output.
/// About twice what was measured, on numbers drawn evenly between -1 and 1; the first bound is of sequences of one token, whose
/// output is a value.
const APART: [f64; 2] = [0.006, 0.02];

#[test]
fn attention_over_blocks_is_the_formula_of_their_numbers_and_near_that_of_the_rows() {
    if !can_emulate() {
        return;
    }
    let full = [Heads::full(2, 2, 32), Heads::full(3, 1, 96), Heads::full(14, 2, 64), Heads::full(4, 1, 256)];
    let mut apart = [0f64; 2];
    for (device, heads) in devices().iter().cycle().zip(full) {
        for element in FLOATS {
            for (window, soft_cap) in [(None, None), (Some(290), None), (Some(16), Some(1.5))] {
                let heads = Heads { window, soft_cap, ..heads };
                let width = heads.kv * heads.dim;
                let cache = cache(device, element, 6, CAPACITY, heads);
                let (mut copied, mut rows) = (vec![], 0);
                for (&slot, &length) in SLOTS.iter().zip(&LENGTHS) {
                    copied.push(Copied { rows: rows..rows + length, slot, position: 0 });
                    rows += length;
                }
                let (k, ks) = random(device, element, rows, width, 1);
                let (v, vs) = random(device, element, rows, width, 2);
                cache.write(&k, &v, &Writes::new(device, CAPACITY, &copied).unwrap()).unwrap();
                let live = Live::new(device, CAPACITY, &SLOTS, &LENGTHS).unwrap();
                let (q, qs) = random(device, element, SLOTS.len(), heads.q * heads.dim, 3);
                let o = cache.decode(&q, &live, heads).unwrap();
                let rounded = |from: &[f64]| numbers(&on_the_cpu(from));
                close(&format!("{heads:?}"), &o, &reference(&qs, &rounded(&ks), &rounded(&vs), heads));
                if element != Element::F32 {
                    continue;
                }
                let (got, want) = (wide(&o.to_f32().unwrap()), reference(&qs, &ks, &vs, heads));
                for (head, (got, want)) in got.chunks(heads.dim).zip(want.chunks(heads.dim)).enumerate() {
                    let largest = want.iter().fold(0f64, |m, v| m.max(v.abs()));
                    let off = got.iter().zip(want).fold(0f64, |m, (g, w)| m.max((g - w).abs())) / largest;
                    let of = &mut apart[usize::from(LENGTHS[head / heads.q] > 1)];
                    *of = of.max(off);
                }
            }
        }
    }
    eprintln!("q8_0: a head's output is within {apart:?} of its largest number (one token, several)");
    assert!(apart.iter().zip(APART).all(|(off, bound)| *off > bound / 20.0 && *off < bound), "{apart:?}");
}

#[test]
fn a_nan_key_shows_and_the_cache_refuses_what_does_not_fit() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let heads = Heads::full(2, 1, 32);
    for bad in [f32::NAN, f32::INFINITY] {
        let cache = cache(device, Element::F32, 3, 10, heads);
        let mut spoilt = noise(3 * 32, 1);
        spoilt[35] = bad;
        let k = device.upload_f32(&spoilt, 3, 32).unwrap();
        let copied = [0, 1, 2].map(|slot| Copied { rows: slot..slot + 1, slot, position: 0 });
        cache.write(&k, &k, &Writes::new(device, 10, &copied).unwrap()).unwrap();
        let (q, _) = random(device, Element::F32, 3, 64, 3);
        let live = Live::new(device, 10, &[0, 1, 2], &[1, 1, 1]).unwrap();
        let o = cache.decode(&q, &live, heads).unwrap().to_f32().unwrap();
        assert!(o[64..128].iter().all(|v| !v.is_finite()), "{bad}");
        assert!(o[..64].iter().chain(&o[128..]).all(|v| v.is_finite()), "{bad}");
    }
    let new = |heads| DeviceCache::new(device, (Element::F16, KvCacheType::Q8_0), 3, 10, heads);
    assert!(new(Heads::full(2, 1, 48)).is_err(), "rows of one block and a half");
    // Two heads are three whole blocks, and no head is.
    let cache = new(Heads::full(2, 2, 48)).unwrap();
    let live = Live::new(device, 10, &[0], &[1]).unwrap();
    let (q, _) = random(device, Element::F16, 1, 96, 1);
    let says = |e: anyhow::Error| format!("{e:#}").contains("heads of a multiple of 32 numbers, not of 48");
    assert!(says(cache.decode(&q, &live, Heads::full(2, 2, 48)).unwrap_err()));
    assert!(says(cache.append([&q, &q, &q], &live, Heads::full(2, 2, 48), None).unwrap_err()));
}

/// Blocks move as they are when a cache grows and when others join it.
#[test]
fn a_cache_that_grew_has_the_same_blocks_in_34_of_64_bytes() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for (element, heads) in [(Element::F16, Heads::full(4, 2, 32)), (Element::F32, Heads::full(3, 3, 96))] {
        let width = heads.kv * heads.dim;
        let table = RopeTable::new(&[1.0, 0.3, 0.1], heads.dim, 64, 1.0);
        let prompts = |seed| {
            let of = |seed| Array::from(random(device, element, 9, width, seed).0);
            (of(seed), of(seed + 1))
        };
        let run = |room: usize, kind: KvCacheType| {
            let start = |seed: u64, prompts_of: &[usize]| {
                let (k, v) = prompts(seed);
                let mut cache = KvCache::new(room, kind);
                cache.append_prompts(&k, &v, &[0, 4, 9], prompts_of).unwrap();
                cache
            };
            let mut cache = start(1, &[0, 1]);
            let mut steps = vec![];
            for step in 0..3u32 {
                if step == 1 {
                    cache.join(start(5, &[1])).unwrap();
                }
                let positions: Vec<u32> = [4 + step, 5 + step, 4 + step][..cache.len()].to_vec();
                let [q, k, v] = [heads.q, heads.kv, heads.kv].map(|heads_of| {
                    let seed = 20 + u64::from(step) * 3 + heads_of as u64;
                    Array::from(random(device, element, positions.len(), heads_of * heads.dim, seed).0)
                });
                let o = attention::step(q, k, &v, Some((&table, &positions)), &mut cache, heads).unwrap();
                steps.push(o.device().unwrap().to_bytes().unwrap());
            }
            (steps, cache.size_in_bytes())
        };
        let (grown, _) = run(0, KvCacheType::Q8_0);
        let (roomy, bytes) = run(40, KvCacheType::Q8_0);
        assert!(grown == roomy, "{element}: every bit");
        let (plain, plain_bytes) = run(40, KvCacheType::Auto);
        assert!(plain != roomy);
        assert_eq!(bytes * 32 * element.bytes(), plain_bytes * 34, "{element}");
    }
}
