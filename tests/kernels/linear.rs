//! Groups of linear maps with LoRA and DoRA, and the embedding's branch, on the emulated machine against float64 on the
//! operands that the products multiply; strips of weights, no rows, refusals, and memory against the dry machine.

use std::sync::{Arc, Mutex};

use fourfold::device::testing::can_emulate;
use fourfold::device::{Device, Element, Matrix, Usage};
use fourfold::ops::embedding::gpu as embedding;
use fourfold::ops::linear::gpu::{Compute, Dequantised, DeviceLora, Map, Numbers, SCRATCH, backward, forward};
use fourfold::ops::storage::gpu::DeviceWeight;
use fourfold::ops::weight::StorageDType;

use crate::group::{Case, Kind, MapCase, close, numbers, product, rounded, row_norms, transposed};
use crate::reference::Host;
use crate::support::{FLOATS, device, tolerance, wide};

/// Three maps of different sizes and ranks with one input, some without branch or bias.
fn three(operand: Element) -> Vec<MapCase> {
    let dense = match operand {
        Element::F32 => StorageDType::F32,
        Element::Bf16 => StorageDType::BF16,
        _ => StorageDType::F16,
    };
    vec![
        MapCase { dtype: StorageDType::Q4K, n: 40, kind: Kind::Lora(4), bias: true },
        MapCase { dtype: StorageDType::Q8_0, n: 17, kind: Kind::Plain, bias: true },
        MapCase { dtype: dense, n: 9, kind: Kind::Dora(3), bias: false },
    ]
}

fn one(dtype: StorageDType, kind: Kind, bias: bool) -> Vec<MapCase> {
    vec![MapCase { dtype, n: 21, kind, bias }]
}

#[test]
fn groups_of_three_maps_with_any_number_of_rows() {
    if !can_emulate() {
        return;
    }
    for operand in FLOATS {
        for rows in [1, 3, 16, 17, 40, 64, 65] {
            let wide_input = rows % 2 == 0;
            for to in [Element::F32, operand] {
                let case = Case::new(rows, 256, operand, three(operand));
                Case { to, wide_input, wide_gradients: !wide_input, ..case }.check(device());
            }
        }
    }
}

#[test]
fn every_kind_of_branch_over_several_stored_types() {
    if !can_emulate() {
        return;
    }
    let types = [StorageDType::F32, StorageDType::BF16, StorageDType::Q8_0, StorageDType::Q4K, StorageDType::Q6K];
    for operand in FLOATS {
        for dtype in types {
            for kind in [Kind::Plain, Kind::Lora(5), Kind::Dora(2)] {
                for rows in [3, 19] {
                    Case::new(rows, 256, operand, one(dtype, kind, true)).check(device());
                }
            }
        }
    }
}

#[test]
fn a_residual_joins_one_map_with_and_without_bias_and_branch() {
    if !can_emulate() {
        return;
    }
    for operand in FLOATS {
        for kind in [Kind::Plain, Kind::Lora(2), Kind::Dora(7)] {
            for (rows, bias) in [(2, true), (16, false), (17, true), (18, false)] {
                let case = Case::new(rows, 32, operand, one(StorageDType::Q8_0, kind, bias));
                Case { residual: true, to: Element::F32, ..case }.check(device());
            }
        }
    }
}

/// More rows than products straight from the stored bytes take, with ranks and columns beyond a tile.
#[test]
fn groups_of_many_rows() {
    if !can_emulate() {
        return;
    }
    for operand in FLOATS {
        let maps = vec![
            MapCase { dtype: StorageDType::Q4K, n: 264, kind: Kind::Lora(16), bias: true },
            MapCase { dtype: StorageDType::Q8_0, n: 72, kind: Kind::Lora(33), bias: false },
            MapCase { dtype: StorageDType::Q6K, n: 301, kind: Kind::Dora(5), bias: true },
        ];
        Case::new(70, 256, operand, maps).check(device());
        let case = Case::new(97, 256, operand, one(StorageDType::Q8_0, Kind::Lora(16), true));
        Case { residual: true, to: Element::F32, ..case }.check(device());
    }
}

/// Widths that are no multiple of what kernels load at once.
#[test]
fn odd_widths() {
    if !can_emulate() {
        return;
    }
    for operand in FLOATS {
        for (rows, k) in [(1, 7), (5, 33), (23, 41)] {
            let maps = vec![
                MapCase { dtype: StorageDType::F32, n: 1, kind: Kind::Lora(1), bias: true },
                MapCase { dtype: StorageDType::F16, n: 5, kind: Kind::Dora(1), bias: true },
                MapCase { dtype: StorageDType::BF16, n: 301, kind: Kind::Lora(3), bias: false },
            ];
            Case::new(rows, k, operand, maps).check(device());
        }
    }
}

#[test]
fn weights_in_strips_give_the_same_numbers() {
    if !can_emulate() {
        return;
    }
    for operand in FLOATS {
        // One row at a time, three rows, and 128 of 301 rows.
        for bytes in [1, 3 * 256 * operand.bytes(), 140 * 256 * operand.bytes()] {
            let mut maps = three(operand);
            maps[0].n = 301;
            Case { scratch: bytes, ..Case::new(18, 256, operand, maps) }.check(device());
        }
    }
}

/// Products that find a weight's numbers kept have the bits of those that dequantise it, strip by strip, and it is dequantised
/// once.
#[test]
fn kept_numbers_give_the_bits_of_dequantised_ones() {
    if !can_emulate() {
        return;
    }
    // A machine of its own: launches are counted.
    let device = Device::emulated().unwrap();
    let (m, n, k) = (70, 301, 256);
    for operand in FLOATS {
        let weight = Host::random(StorageDType::Q4K, n, k, false, 7).upload(&device);
        let x = device.upload_as(operand, &numbers(m * k, 1), m, k).unwrap();
        let dy = device.upload_as(operand, &numbers(m * n, 2), m, n).unwrap();
        // All rows at once, 128 of them, three.
        for scratch in [SCRATCH, 140 * k * operand.bytes(), 3 * k * operand.bytes()] {
            let compute = Compute { scratch, ..Compute::new(operand) };
            let of = |numbers: Option<&Numbers>| {
                let dequantised = numbers.map(|numbers| Dequantised { numbers, keeps: true, next: None });
                let maps = [Map { weight: &weight, dequantised, bias: None, lora: None }];
                device.begin_profile().unwrap();
                let (ys, saved) = forward(&x, &maps, None, Element::F32, compute).unwrap();
                let dx = backward(&x, &maps, &saved, &[&dy], true, compute).unwrap().input.unwrap();
                let kernels = device.end_profile().unwrap();
                let calls = kernels.iter().filter(|kernel| kernel.name.starts_with("dequantise_")).map(|k| k.calls);
                (ys[0].to_bytes().unwrap(), dx.to_bytes().unwrap(), calls.sum::<usize>())
            };
            let (want, kept) = (of(None), Numbers::default());
            let found = of(Some(&kept));
            assert!((&found.0, &found.1) == (&want.0, &want.1), "{operand}, {scratch}");
            assert!(want.2 >= 2 && found.2 == 1, "{operand}, {scratch}: {} and {} launches", want.2, found.2);
            let other = if operand == Element::F32 { Element::F16 } else { Element::F32 };
            let x = device.upload_as(other, &numbers(m * k, 1), m, k).unwrap();
            let dequantised = Some(Dequantised { numbers: &kept, keeps: true, next: None });
            let maps = [Map { weight: &weight, dequantised, bias: None, lora: None }];
            let error = forward(&x, &maps, None, Element::F32, Compute::new(other)).unwrap_err();
            assert!(format!("{error:#}").contains("kept of another weight"), "{error:#}");
        }
    }
}

/// Numbers that a product began for the next one are the bits that it would dequantise, are there for no other, and are given back
/// after it; what a scratch matrix would not hold is dequantised in its turn.
#[test]
fn numbers_that_were_begun_beside_a_product_give_the_bits_of_dequantised_ones() {
    if !can_emulate() {
        return;
    }
    let device = Device::emulated().unwrap();
    let (m, k) = (70, 256);
    let weights = [(StorageDType::Q4K, 64), (StorageDType::Q6K, 301), (StorageDType::BF16, 32)]
        .map(|(dtype, n)| Host::random(dtype, n, k, false, 7).upload(&device));
    let x = device.upload_as(Element::Bf16, &numbers(m * k, 1), m, k).unwrap();
    for (scratch, ahead) in [(SCRATCH, 1), (300 * k * 2, 0)] {
        let compute = Compute { scratch, ..Compute::new(Element::Bf16) };
        let of = |numbers: Option<&[Numbers; 3]>| {
            let before = (device.work(), device.usage().live);
            let map = |i: usize| Map {
                weight: &weights[i],
                dequantised: numbers.map(|all| Dequantised {
                    numbers: &all[i],
                    keeps: false,
                    next: weights.get(i + 1).map(|weight| (weight, &all[i + 1])),
                }),
                bias: None,
                lora: None,
            };
            let (ys, _) = forward(&x, &[map(0), map(1), map(2)], None, Element::F32, compute).unwrap();
            let bytes: Vec<Vec<u8>> = ys.iter().map(|y| y.to_bytes().unwrap()).collect();
            drop(ys);
            assert_eq!(device.usage().live, before.1, "the numbers were given back");
            (bytes, device.work() - before.0)
        };
        let (want, in_turn) = of(None);
        let (found, work) = of(Some(&Default::default()));
        assert!(found == want, "{scratch}");
        assert_eq!((in_turn.beside, work.beside), (0, ahead), "what is stored as products need it is read in place");
        assert_eq!(work.launches, if ahead == 1 { 2 } else { in_turn.launches }, "{scratch}");
    }
}

#[test]
fn strips_bound_the_scratch_matrix() {
    if !can_emulate() {
        return;
    }
    let device = Device::dry();
    let (n, k) = (1024, 256);
    let weight = DeviceWeight::reserve(&device, StorageDType::Q4K, n, k).unwrap();
    let x = device.matrix(Element::Bf16, 70, k).unwrap();
    let dy = device.matrix(Element::Bf16, 70, n).unwrap();
    let maps = [Map { weight: &weight, dequantised: None, bias: None, lora: None }];
    for (scratch, rows) in [(SCRATCH, n), (130 * k * 2, 128), (5 * k * 2, 5), (1, 1)] {
        let compute = Compute { scratch, ..Compute::new(Element::Bf16) };
        for (both, result) in [(false, 70 * n * 2), (true, 70 * k * 4)] {
            device.reset_peak();
            let before = device.usage().live;
            if both {
                let saved = forward(&x, &maps, None, Element::Bf16, compute).unwrap().1;
                device.reset_peak();
                backward(&x, &maps, &saved, &[&dy], true, compute).unwrap();
            } else {
                forward(&x, &maps, None, Element::Bf16, compute).unwrap();
            }
            let scratch = (rows * k * 2).next_multiple_of(512);
            assert_eq!(device.usage().peak - before, result + scratch, "{rows} rows, backward: {both}");
        }
    }
}

/// A group without rows has outputs without rows and gradients of zero.
#[test]
fn no_rows() {
    if !can_emulate() {
        return;
    }
    for operand in FLOATS {
        Case::new(0, 256, operand, three(operand)).check(device());
        let case = Case::new(0, 256, operand, one(StorageDType::Q4K, Kind::Lora(2), true));
        Case { residual: true, to: Element::F32, ..case }.check(device());
    }
}

/// y is linear in A and in B: the gradients are what differences of the forward say, up to f32.
#[test]
fn gradients_are_the_slopes_of_the_forward() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let (m, k, n, r) = (19, 12, 10, 3);
    let weight = DeviceWeight::from_f32(device, &numbers(n * k, 1), n, k).unwrap();
    let (x, a, b, dy) = (numbers(m * k, 2), numbers(r * k, 3), numbers(n * r, 4), numbers(m * n, 5));
    let compute = Compute::new(Element::F32);
    // The loss is the sum of dy y.
    let loss = |x: &[f32], a: &[f32], b: &[f32]| -> f64 {
        let lora = DeviceLora::new(device, Element::F32, a, (r, k), b, n, 0.7, None).unwrap();
        let maps = [Map { weight: &weight, dequantised: None, bias: None, lora: Some(&lora) }];
        let x = device.upload_f32(x, m, k).unwrap();
        let (y, _) = forward(&x, &maps, None, Element::F32, compute).unwrap();
        y[0].to_f32().unwrap().iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
    };
    let lora = DeviceLora::new(device, Element::F32, &a, (r, k), &b, n, 0.7, None).unwrap();
    let maps = [Map { weight: &weight, dequantised: None, bias: None, lora: Some(&lora) }];
    let xd = device.upload_f32(&x, m, k).unwrap();
    let (_, saved) = forward(&xd, &maps, None, Element::F32, compute).unwrap();
    let dyd = device.upload_f32(&dy, m, n).unwrap();
    let gradients = backward(&xd, &maps, &saved, &[&dyd], true, compute).unwrap();
    let branch = gradients.lora[0].as_ref().unwrap();
    let slopes = |which: usize, len: usize| -> Vec<f64> {
        let at = |i: usize, step: f32| {
            let mut all = [x.clone(), a.clone(), b.clone()];
            all[which][i] += step;
            loss(&all[0], &all[1], &all[2])
        };
        (0..len).map(|i| (at(i, 0.5) - at(i, -0.5)) / 1.0).collect()
    };
    for (which, got) in [(0, gradients.input.as_ref().unwrap()), (1, &branch.a), (2, &branch.b)] {
        close("slope", 1e-4, got, &slopes(which, got.len()));
    }
}

/// A row of W' without direction gives 0, and no gradient that is NaN.
#[test]
fn dora_of_a_row_of_zeros() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let (m, k, n, r) = (20, 6, 4, 2);
    let mut values = numbers(n * k, 1);
    values[k..2 * k].fill(0.0);
    let weight = DeviceWeight::from_f32(device, &values, n, k).unwrap();
    let zeros = vec![0.0; n * r];
    for operand in FLOATS {
        let lora =
            DeviceLora::new(device, operand, &numbers(r * k, 2), (r, k), &zeros, n, 1.5, Some(&[0.7; 4])).unwrap();
        let maps = [Map { weight: &weight, dequantised: None, bias: None, lora: Some(&lora) }];
        let x = device.upload_f32(&numbers(m * k, 3), m, k).unwrap();
        let dy = device.upload_f32(&numbers(m * n, 4), m, n).unwrap();
        let (y, saved) = forward(&x, &maps, None, Element::F32, Compute::new(operand)).unwrap();
        let y = y[0].to_f32().unwrap();
        assert!(y.chunks(n).all(|row| row[1] == 0.0 && row[0] != 0.0));
        let all = backward(&x, &maps, &saved, &[&dy], true, Compute::new(operand)).unwrap();
        let branch = all.lora[0].as_ref().unwrap();
        let magnitude = branch.magnitude.as_ref().unwrap();
        let slopes = magnitude.to_f32().unwrap();
        assert!(slopes[1] == 0.0 && slopes[0] != 0.0);
        for matrix in [all.input.as_ref().unwrap(), &branch.a, &branch.b, magnitude] {
            assert!(matrix.to_f32().unwrap().iter().all(|v| v.is_finite()));
        }
    }
}

/// Norms are taken once for a branch and have the accuracy of f32 whatever the operands' type is.
#[test]
fn dora_norms_are_kept() {
    if !can_emulate() {
        return;
    }
    // Its own, because other tests allocate on the shared one at the same time.
    let device = &Device::emulated().unwrap();
    let (n, k, r) = (45, 256, 3);
    for dtype in [StorageDType::F32, StorageDType::BF16, StorageDType::Q6K] {
        let host = Host::random(dtype, n, k, true, 3);
        let weight = host.upload(device);
        let (a, b, m) = (numbers(r * k, 1), numbers(n * r, 2), numbers(n, 3));
        let want = row_norms(&wide(&host.values()), &wide(&a), &wide(&b), 1.5, r);
        for operand in FLOATS {
            for scratch in [SCRATCH, 4000] {
                let lora = DeviceLora::new(device, operand, &a, (r, k), &b, n, 1.5, Some(&m)).unwrap();
                let lora = lora.with_scratch(scratch);
                let first = lora.row_scales(&weight).unwrap().unwrap();
                close("norms", 1e-6, &first.norms, &want);
                let factors: Vec<f64> = m.iter().zip(&want).map(|(m, n)| f64::from(*m) / n).collect();
                close("factors", 1e-6, &first.factors, &factors);
                let allocations = device.usage().allocations;
                let again = lora.row_scales(&weight).unwrap().unwrap();
                assert!(again.norms.shares_memory(&first.norms));
                assert_eq!(device.usage().allocations, allocations);
            }
        }
    }
}

/// x, the branch's gradients and DoRA's for a table, with tokens that stand twice.
#[test]
fn the_embedding_and_its_branch() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let (v, d) = (37, 256);
    for operand in FLOATS {
        for dtype in [StorageDType::F32, StorageDType::BF16, StorageDType::Q8_0, StorageDType::Q4K] {
            let host = Host::random(dtype, v, d, true, 11);
            let table = host.upload(device);
            for (ids, dora, r) in [
                (vec![5u32], false, 1),
                (vec![3, 36, 3, 0, 7, 3, 36], true, 4),
                ((0..40).map(|i| i * i % 37).collect(), true, 3),
                ((0..40).map(|i| i * 5 % 37).collect(), false, 2),
                (vec![], true, 2),
            ] {
                let (n, s) = (ids.len(), 1.5);
                let (a, b, m) = (numbers(r * v, 1), numbers(d * r, 2), numbers(d, 3));
                let lora = DeviceLora::new_exact(device, operand, &a, (r, v), &b, d, s, dora.then_some(&m)).unwrap();
                let lora = lora.with_scratch(if n == 7 { 5 * d * 4 } else { SCRATCH });
                let (x, saved) = embedding::forward(&table, &ids, Some(&lora)).unwrap();
                // The formulas: rows, z, u, g.
                let w = wide(&host.values());
                let rows: Vec<f64> = ids.iter().flat_map(|&id| w[id as usize * d..][..d].to_vec()).collect();
                let columns = |id: &u32| (0..r).map(|q| s * a[q * v + *id as usize]).collect::<Vec<f32>>();
                let z: Vec<f32> = ids.iter().flat_map(columns).collect();
                let (z, bt) = (rounded(operand, &wide(&z)), rounded(operand, &wide(&b)));
                let branch = product(&z, &transposed(&bt, r), n, r, d);
                let u: Vec<f64> = rows.iter().zip(&branch).map(|(x, y)| x + y).collect();
                let table_t = transposed(&w, d);
                let norms = row_norms(&table_t, &wide(&a), &wide(&b), f64::from(s), r);
                let g: Vec<f64> = (0..d).map(|j| if dora { f64::from(m[j]) / norms[j] } else { 1.0 }).collect();
                let want: Vec<f64> = u.iter().enumerate().map(|(i, u)| g[i % d] * u).collect();
                close("embedding", 3e-5, &x, &want);
                for element in [Element::F32, operand] {
                    let dx = device.upload_as(element, &numbers(n * d, 9), n, d).unwrap();
                    let all = embedding::backward(&table, &lora, saved.as_ref().unwrap(), &dx).unwrap();
                    let dx = wide(&dx.to_f32().unwrap());
                    let du: Vec<f64> = dx.iter().enumerate().map(|(i, dx)| g[i % d] * dx).collect();
                    let du = rounded(operand, &du);
                    let dz = product(&du, &bt, n, d, r);
                    let mut da = vec![0.0; r * v];
                    for (i, &id) in ids.iter().enumerate() {
                        (0..r).for_each(|q| da[q * v + id as usize] += f64::from(s) * dz[i * r + q]);
                    }
                    let close = |what, got: &Matrix, want: &[f64]| close(what, tolerance(operand), got, want);
                    close("dA", &all.a, &da);
                    close("dB", &all.b, &product(&transposed(&du, d), &z, d, n, r));
                    assert_eq!((all.a.rows(), all.a.cols(), all.b.rows(), all.b.cols()), (r, v, d, r));
                    assert_eq!(all.magnitude.is_some(), dora);
                    if let Some(magnitude) = &all.magnitude {
                        let sums = (0..d).map(|j| (0..n).map(|i| dx[i * d + j] * u[i * d + j]).sum::<f64>() / norms[j]);
                        close("dm", magnitude, &sums.collect::<Vec<_>>());
                    }
                }
            }
            let (x, saved) = embedding::forward(&table, &[2, 2], None).unwrap();
            assert!(saved.is_none());
            close("embedding", 0.0, &x, &[&wide(&host.values())[2 * d..3 * d]; 2].concat());
        }
    }
}

/// The same calls on two machines allocate the same bytes, one by one.
#[test]
fn memory_is_that_of_the_dry_machine() {
    if !can_emulate() {
        return;
    }
    let ledger = |device: Device| -> Vec<Usage> {
        let list: Arc<Mutex<Vec<Usage>>> = Arc::default();
        let to = list.clone();
        device.watch(move |usage| to.lock().unwrap().push(usage));
        for operand in FLOATS {
            for rows in [0, 3, 20] {
                let case = Case::new(rows, 256, operand, three(operand));
                for wanted in [true, false] {
                    Case { wanted, to: Element::F32, ..case.clone() }.run(&device);
                    Case { wanted, scratch: 5000, wide_input: true, ..case.clone() }.run(&device);
                }
                let case = Case::new(rows, 256, operand, one(StorageDType::Q6K, Kind::Dora(2), true));
                Case { residual: true, to: Element::F32, ..case }.run(&device);
            }
            let (v, d, r) = (37, 256, 2);
            let table = Host::random(StorageDType::Q4K, v, d, true, 11).upload(&device);
            let (a, b, m) = (numbers(r * v, 1), numbers(d * r, 2), numbers(d, 3));
            let lora = DeviceLora::new_exact(&device, operand, &a, (r, v), &b, d, 2.0, Some(&m)).unwrap();
            let (x, saved) = embedding::forward(&table, &[4, 36, 4], Some(&lora)).unwrap();
            embedding::backward(&table, &lora, &saved.unwrap(), &x).unwrap();
        }
        let list = list.lock().unwrap().clone();
        assert!(list.len() > 500);
        list
    };
    let (dry, emulated) = (ledger(Device::dry()), ledger(Device::emulated().unwrap()));
    assert_eq!(dry.len(), emulated.len());
    for (i, (dry, emulated)) in dry.iter().zip(&emulated).enumerate() {
        assert_eq!(dry, emulated, "allocation {i}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_reason() {
    if !can_emulate() {
        return;
    }
    let device = Device::dry();
    let other = Device::dry();
    let (m, k, n, r) = (20, 32, 8, 2);
    let weight = DeviceWeight::reserve(&device, StorageDType::Q8_0, n, k).unwrap();
    let matrix = |element, rows, cols| device.matrix(element, rows, cols).unwrap();
    let lora = |operand, r: usize, k: usize, n: usize| {
        DeviceLora::new(&device, operand, &vec![0.0; r * k], (r, k), &vec![0.0; n * r], n, 1.0, None).unwrap()
    };
    let (x, good) = (matrix(Element::Bf16, m, k), lora(Element::Bf16, r, k, n));
    let compute = Compute::new(Element::Bf16);
    let map = Map { weight: &weight, dequantised: None, bias: None, lora: Some(&good) };
    let refused = |x: &Matrix, maps: &[Map<'_>], residual: Option<&Matrix>, to, reason: &str| {
        let error = forward(x, maps, residual, to, compute).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let bf16 = Element::Bf16;
    refused(&x, &[], None, bf16, "no maps");
    refused(&matrix(bf16, m, 64), &[map], None, bf16, "width 64");
    refused(&matrix(Element::F16, m, k), &[map], None, bf16, "x of f16");
    refused(&x, &[map], None, Element::F16, "outputs of f16");
    let (short, narrow) = (matrix(Element::F32, 1, n - 1), matrix(bf16, 1, n));
    refused(&x, &[Map { bias: Some(&short), ..map }], None, bf16, "a bias of 7");
    refused(&x, &[Map { bias: Some(&narrow), ..map }], None, bf16, "a bias of 8 bf16");
    let (f16, large) = (lora(Element::F16, r, k, n), lora(bf16, r, k, n + 1));
    refused(&x, &[Map { lora: Some(&f16), ..map }], None, bf16, "operands of f16");
    refused(&x, &[Map { lora: Some(&large), ..map }], None, bf16, "(9, 32)");
    let residual = matrix(Element::F32, m, n);
    refused(&x, &[map, map], Some(&residual), Element::F32, "one map");
    refused(&x, &[map], Some(&residual), bf16, "need to be f32");
    refused(&x, &[map], Some(&matrix(Element::F32, m, k)), Element::F32, "residual is (20, 32)");
    refused(&x, &[map], Some(&other.matrix(Element::F32, m, n).unwrap()), Element::F32, "two devices");
    refused(&other.matrix(bf16, m, k).unwrap(), &[map], None, bf16, "two devices");

    let (_, saved) = forward(&x, &[map], None, bf16, compute).unwrap();
    let refused = |dys: &[&Matrix], maps: &[Map<'_>], reason: &str| {
        let error = backward(&x, maps, &saved, dys, true, compute).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let dy = matrix(bf16, m, n);
    refused(&[], &[map], "0 gradients");
    refused(&[&matrix(bf16, m, k)], &[map], "gradient is (20, 32)");
    refused(&[&matrix(Element::F16, m, n)], &[map], "gradient of f16");
    refused(&[&dy, &dy], &[map, map], "saved tensors of 1");
    let wider = lora(bf16, 3, k, n);
    refused(&[&dy], &[Map { lora: Some(&wider), ..map }], "z is (20, 2)");
    let dora = DeviceLora::new(&device, bf16, &[0.0; 64], (r, k), &[0.0; 16], n, 1.0, Some(&[1.0; 8])).unwrap();
    refused(&[&dy], &[Map { lora: Some(&dora), ..map }], "DoRA");

    let factors = |a: usize, b: usize, m: usize| {
        let (a, b, m) = (vec![0.0; a], vec![0.0; b], vec![0.0; m]);
        DeviceLora::new(&device, bf16, &a, (r, k), &b, n, 1.0, Some(&m)).err().map(|e| format!("{e:#}"))
    };
    assert!(factors(64, 16, 8).is_none());
    assert!(factors(63, 16, 8).unwrap().contains("LoRA's A"));
    assert!(factors(64, 15, 8).unwrap().contains("LoRA's B"));
    assert!(factors(64, 16, 9).unwrap().contains("magnitudes"));
    assert!(DeviceLora::new(&device, bf16, &[], (0, k), &[], n, 1.0, None).is_err());
    assert!(DeviceLora::new(&device, Element::U32, &[0.0], (1, 1), &[0.0], 1, 1.0, None).is_err());

    let text = |error: Option<anyhow::Error>| error.unwrap().to_string();
    assert!(text(embedding::forward(&weight, &[0, 8], None).err()).contains("token id 8"));
    // A lookup takes single columns of A in f32.
    let rounded = lora(bf16, r, n, k);
    assert!(text(embedding::forward(&weight, &[0], Some(&rounded)).err()).contains("in the operands' type alone"));
    let (a, b) = (vec![0.0; r * n], vec![0.0; k * r]);
    let table_lora = DeviceLora::new_exact(&device, bf16, &a, (r, n), &b, k, 1.0, None).unwrap();
    assert!(text(embedding::forward(&weight, &[0], Some(&good)).err()).contains("table of (32, 8)"));
    let (_, saved) = embedding::forward(&weight, &[0, 1], Some(&table_lora)).unwrap();
    let dx = matrix(Element::F32, 3, k);
    assert!(text(embedding::backward(&weight, &table_lora, &saved.unwrap(), &dx).err()).contains("(2, 32)"));
}
