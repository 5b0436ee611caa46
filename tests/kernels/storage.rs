//! Stored weights on the emulated machine: dequantising bit for bit against ggml's formulas written plainly here,
//! gemv against float64 on the rounded operands, embedding rows, uploads in chunks, and memory against the dry
//! machine.

use std::sync::Arc;

use fourfold::device::emulated::Emulated;
use fourfold::device::testing::can_emulate;
use fourfold::device::{Device, Element, Matrix};
use fourfold::ops::embedding::gpu::embedding;
use fourfold::ops::linear::gpu_gemv::{gemv, supports};
use fourfold::ops::storage::gpu::{ALIGNMENT, DeviceWeight};
use fourfold::ops::weight::{Bytes, RowOrder, StorageDType, Weight};
use half::{bf16, f16};

use crate::reference::{Host, Random};
use crate::support::{FLOATS, device};

fn rounded(element: Element, v: f32) -> f32 {
    match element {
        Element::Bf16 => bf16::from_f32(v).to_f32(),
        Element::F16 => f16::from_f32(v).to_f32(),
        _ => v,
    }
}

fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(g.to_bits() == e.to_bits() || g.is_nan() && e.is_nan(), "{what}: number {i} is {g}, not {e}");
    }
}

/// Columns to test: one block and several, and for dense types widths that are no multiple of what a thread takes.
fn widths(dtype: StorageDType) -> Vec<usize> {
    match dtype.block().0 {
        1 => vec![1, 7, 16, 40, 96],
        block => vec![block, 3 * block],
    }
}

#[test]
fn dequantising_is_exact() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for dtype in StorageDType::ALL {
        for (at, cols) in widths(dtype).into_iter().enumerate() {
            let host = Host::random(dtype, 7, cols, false, at as u64);
            let weight = host.upload(device);
            assert_eq!(weight.bytes(), host.bytes.len());
            let values = host.values();
            for rows in [0..7, 3..6, 1..2, 4..4] {
                for element in FLOATS {
                    let out = device.matrix(element, rows.len(), cols).unwrap();
                    weight.dequantise(rows.clone(), &out).unwrap();
                    let part = &values[rows.start * cols..rows.end * cols];
                    let expected: Vec<f32> = part.iter().map(|&v| rounded(element, v)).collect();
                    let what = format!("{} of {cols} columns, rows {rows:?}, to {element}", dtype.name());
                    assert_same_bits(&out.to_f32().unwrap(), &expected, &what);
                }
            }
        }
    }
}

/// The product's own rows: all types, in every order of a file's rows.
#[test]
fn a_weights_copy_has_the_rows_that_the_host_reads() {
    if !can_emulate() {
        return;
    }
    let (rows, device) = (24, device());
    for dtype in StorageDType::ALL {
        for order in [
            RowOrder::AsStored,
            RowOrder::RopeInterleaved { head_dim: 6 },
            RowOrder::HeadsApart { head_dim: 4, heads: 2 },
        ] {
            for tame in [true, false] {
                let cols = if dtype.block().0 == 1 { 41 } else { 2 * dtype.block().0 };
                let bytes = Host::random(dtype, rows, cols, tame, 21).bytes;
                let weight = Weight::new(Bytes::new(Arc::new(bytes)), dtype, rows, cols).unwrap().with_row_order(order);
                let mut expected = vec![0f32; rows * cols];
                expected.chunks_mut(cols).enumerate().for_each(|(i, row)| weight.row(i, row));
                let copy = weight.on(device).unwrap();
                let what = format!("{} with rows {order:?}", dtype.name());
                let out = device.matrix(Element::F32, rows, cols).unwrap();
                copy.dequantise(0..rows, &out).unwrap();
                assert_same_bits(&out.to_f32().unwrap(), &expected, &what);
                let ids = [23, 0, 7, 7];
                let out = device.matrix(Element::F32, ids.len(), cols).unwrap();
                embedding(&copy, &device.upload_u32(&ids).unwrap(), &out).unwrap();
                let rows: Vec<f32> =
                    ids.iter().flat_map(|&i| &expected[i as usize * cols..][..cols]).copied().collect();
                assert_same_bits(&out.to_f32().unwrap(), &rows, &what);
                // The copy of a layer that is streamed, behind another matrix in its buffer.
                let lent = weight.clone().streamed(device.clone());
                let refused = lent.on(device).err().map(|error| error.to_string());
                assert!(refused.is_some_and(|text| text.contains("outside of its layer")), "{what}");
                let mut packed = vec![0xFF; ALIGNMENT + lent.packed_bytes()];
                lent.pack(&mut packed[ALIGNMENT..]).unwrap();
                lent.lend(&device.upload_bytes(&packed).unwrap(), ALIGNMENT).unwrap();
                let out = device.matrix(Element::F32, expected.len() / cols, cols).unwrap();
                lent.on(device).unwrap().dequantise(0..out.rows(), &out).unwrap();
                assert_same_bits(&out.to_f32().unwrap(), &expected, &what);
                assert!(
                    lent.lend(&device.upload_bytes(&packed[..packed.len() - ALIGNMENT]).unwrap(), ALIGNMENT).is_err()
                );
                lent.take_back();
                assert!(lent.on(device).is_err(), "{what}");
            }
        }
    }
}

/// More numbers than one block of threads takes, and a result that begins at no multiple of 16 bytes.
#[test]
fn dequantising_large_and_unaligned() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for dtype in StorageDType::ALL {
        let (rows, cols) = (19, if dtype.block().0 == 1 { 501 } else { 512 });
        let host = Host::random(dtype, rows, cols, false, 77);
        let weight = host.upload(device);
        let scratch = device.matrix(Element::Bf16, 1, 1 + rows * cols).unwrap().reshape(1 + rows * cols, 1).unwrap();
        let out = scratch.row_range(1..1 + rows * cols).unwrap().reshape(rows, cols).unwrap();
        weight.dequantise(0..rows, &out).unwrap();
        let expected: Vec<f32> = host.values().into_iter().map(|v| rounded(Element::Bf16, v)).collect();
        assert_same_bits(&out.to_f32().unwrap(), &expected, dtype.name());
    }
}

#[test]
fn dense_weights_are_read_in_place() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let stored = |element| match element {
        Element::F32 => StorageDType::F32,
        Element::Bf16 => StorageDType::BF16,
        _ => StorageDType::F16,
    };
    for dtype in StorageDType::ALL {
        let cols = dtype.block().0 * 3;
        let host = Host::random(dtype, 2, cols, true, 5);
        let weight = host.upload(device);
        for element in FLOATS {
            let dense = weight.dense(element);
            assert_eq!(dense.is_some(), stored(element) == dtype, "{} as {element}", dtype.name());
            if let Some(dense) = dense {
                assert_eq!((dense.element(), dense.rows(), dense.cols()), (element, 2, cols));
                assert_same_bits(&dense.to_f32().unwrap(), &host.values(), dtype.name());
            }
        }
        assert!(weight.dense(Element::U8).is_none());
    }
}

/// y against float64 on the operands that the kernel multiplies. The error of a sum in f32 is measured against the
/// sum of the terms' sizes.
fn check_gemv(device: &Device, host: &Host, m: usize, element: Element, with: (bool, bool, Element)) {
    let (bias, residual, out) = with;
    let (n, k) = (host.rows, host.cols);
    let mut random = Random((m * 31 + n * 7 + k) as u64);
    let mut noise = |count: usize| -> Vec<f32> { (0..count).map(|_| random.unit()).collect() };
    let (x, b, r) = (noise(m * k), noise(n), noise(m * n));
    let weight = host.upload(device);
    let xd = device.upload_as(element, &x, m, k).unwrap();
    let y = device.upload_as(out, &r, m, n).unwrap();
    let bd = bias.then(|| device.upload_f32(&b, 1, n).unwrap());
    gemv(&weight, &xd, &y, bd.as_ref(), residual.then_some(&y)).unwrap();
    let y = y.to_f32().unwrap();
    let w: Vec<f64> = host.values().into_iter().map(|v| f64::from(rounded(element, v))).collect();
    for i in 0..m {
        for j in 0..n {
            let terms = (0..k).map(|l| f64::from(rounded(element, x[i * k + l])) * w[j * k + l]);
            let (mut sum, mut size) = terms.fold((0.0, 0.0), |(s, a): (f64, f64), t| (s + t, a + t.abs()));
            if bias {
                sum += f64::from(b[j]);
                size += f64::from(b[j].abs());
            }
            if residual {
                let v = f64::from(rounded(out, r[i * n + j]));
                sum += v;
                size += v.abs();
            }
            let half_ulp = match out {
                Element::F32 => 0.0,
                Element::F16 => sum.abs() / 2048.0 + 3e-8,
                _ => sum.abs() / 256.0,
            };
            let apart = (f64::from(y[i * n + j]) - sum).abs();
            assert!(
                apart <= 1e-6 * size + half_ulp * 1.001,
                "{} ({m}, {n}, {k}), {element} to {out}, bias {bias}, residual {residual}: y[{i}, {j}] = {}, not {sum}",
                host.dtype.name(),
                y[i * n + j]
            );
        }
    }
}

fn check_all_gemv(device: &Device) {
    for dtype in StorageDType::ALL {
        let block = dtype.block().0;
        let widths = if block == 1 { vec![5, 48, 64, 320, 640] } else { vec![block, 3 * block, 1280] };
        for (at, k) in widths.into_iter().enumerate() {
            let host = Host::random(dtype, 21, k, true, at as u64);
            for (turn, m) in [1, 2, 7, 8, 9, 16].into_iter().enumerate() {
                for element in FLOATS {
                    let turn = turn + at;
                    let out = if turn.is_multiple_of(2) { Element::F32 } else { element };
                    check_gemv(device, &host, m, element, (turn.is_multiple_of(3), turn % 4 > 1, out));
                }
            }
        }
    }
}

#[test]
fn gemv_is_the_product() {
    if !can_emulate() {
        return;
    }
    check_all_gemv(device());
}

#[test]
fn gemv_of_other_heights() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for dtype in [StorageDType::Q4K, StorageDType::Q8_0, StorageDType::BF16, StorageDType::Q5K] {
        for n in [1, 15, 16, 17, 33] {
            let host = Host::random(dtype, n, 256, true, n as u64);
            for element in FLOATS {
                check_gemv(device, &host, 3, element, (true, false, Element::F32));
            }
        }
    }
}

/// Tensor cores take up to 64 rows, and several groups of sixteen columns in a block.
#[test]
fn gemv_of_up_to_64_rows() {
    if !can_emulate() {
        return;
    }
    let mut tried = 0;
    for dtype in StorageDType::ALL {
        for (n, k) in [(21, 256), (129, 768)] {
            let host = Host::random(dtype, n, k, true, n as u64);
            for element in [Element::Bf16, Element::F16] {
                for m in [17, 24, 40, 64] {
                    if supports(m, element, [&host.upload(device())]) {
                        check_gemv(
                            device(),
                            &host,
                            m,
                            element,
                            (m != 24, m != 40, if m == 64 { element } else { Element::F32 }),
                        );
                        tried += 1;
                    }
                }
            }
        }
    }
    assert_eq!(tried, 7 * 2 * 2 * 4);
}

/// More columns than the warps of a block take in one round, and with some of the warps idle in the last one.
#[test]
fn gemv_of_long_rows() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for dtype in StorageDType::ALL {
        let host = Host::random(dtype, 17, 2304, true, 8);
        for (m, element) in [(3, Element::Bf16), (12, Element::F16), (9, Element::F32)] {
            check_gemv(device, &host, m, element, (true, true, Element::F32));
        }
    }
}

#[test]
fn the_order_of_threads_does_not_matter() {
    if !can_emulate() {
        return;
    }
    for seed in [1, 2] {
        let machine = Emulated::open().unwrap().shuffled(seed);
        let device = Device::new(Arc::new(machine));
        for dtype in StorageDType::ALL {
            let host = Host::random(dtype, 18, 256, false, seed);
            let weight = host.upload(&device);
            let values = host.values();
            let out = device.matrix(Element::F32, 18, 256).unwrap();
            weight.dequantise(0..18, &out).unwrap();
            assert_same_bits(&out.to_f32().unwrap(), &values, dtype.name());
            let row = device.matrix(Element::F32, 1, 256).unwrap();
            embedding(&weight, &device.upload_u32(&[17]).unwrap(), &row).unwrap();
            assert_same_bits(&row.to_f32().unwrap(), &values[17 * 256..], dtype.name());
            let host = Host::random(dtype, 18, 256, true, seed);
            for (m, element) in [(9, Element::Bf16), (2, Element::F16), (16, Element::F32)] {
                check_gemv(&device, &host, m, element, (true, true, Element::F32));
            }
        }
    }
}

/// A sum of infinite or undefined weights is visible in y.
#[test]
fn gemv_passes_nan_on() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for element in FLOATS {
        let mut host = Host::random(StorageDType::Q8_0, 3, 64, true, 1);
        host.bytes[2 * 34..2 * 34 + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
        let x = device.upload_as(element, &[1.0; 128], 2, 64).unwrap();
        let y = device.matrix(Element::F32, 2, 3).unwrap();
        gemv(&host.upload(device), &x, &y, None, None).unwrap();
        let nan: Vec<bool> = y.to_f32().unwrap().iter().map(|v| v.is_nan()).collect();
        assert_eq!(nan, [false, true, false, false, true, false], "{element}");
    }
}

#[test]
fn embedding_rows() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for dtype in StorageDType::ALL {
        for cols in widths(dtype) {
            let host = Host::random(dtype, 6, cols, false, 3);
            let ids = [5, 0, 3, 3, 6, 1];
            let out = device.matrix(Element::F32, ids.len(), cols).unwrap();
            embedding(&host.upload(device), &device.upload_u32(&ids).unwrap(), &out).unwrap();
            let values = host.values();
            let nan = vec![f32::NAN; cols];
            let rows = ids.into_iter().map(|id| values.chunks(cols).nth(id as usize).unwrap_or(&nan));
            let expected: Vec<f32> = rows.flatten().copied().collect();
            assert_same_bits(&out.to_f32().unwrap(), &expected, dtype.name());
        }
    }
}

/// The bytes do not depend on the staging's size, and rows come in the order that the caller says.
#[test]
fn uploads_in_chunks() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for dtype in StorageDType::ALL {
        let cols = 2 * dtype.block().0;
        let host = Host::random(dtype, 11, cols, false, 9);
        let row = host.row(0).len();
        for staging in [0, 1, row, 3 * row + 1, 100 * row] {
            let reversed = |i: usize| host.row(10 - i);
            let weight = DeviceWeight::upload_in_chunks(device, dtype, 11, cols, staging, reversed).unwrap();
            let out = device.matrix(Element::F32, 11, cols).unwrap();
            weight.dequantise(0..11, &out).unwrap();
            let values = host.values();
            let expected: Vec<f32> = values.chunks(cols).rev().flatten().copied().collect();
            assert_same_bits(&out.to_f32().unwrap(), &expected, dtype.name());
        }
    }
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let weight = DeviceWeight::from_f32(device, &values, 3, 4).unwrap();
    assert_eq!(weight.dense(Element::F32).unwrap().to_f32().unwrap(), values);
}

#[test]
fn the_dry_machine_counts_the_same() {
    if !can_emulate() {
        return;
    }
    let work = |device: &Device, reserve: bool| {
        for dtype in StorageDType::ALL {
            let host = Host::random(dtype, 5, 256, true, 4);
            let weight =
                if reserve { DeviceWeight::reserve(device, dtype, 5, 256).unwrap() } else { host.upload(device) };
            let out = device.matrix(Element::Bf16, 5, 256).unwrap();
            weight.dequantise(0..5, &out).unwrap();
            let rows = device.matrix(Element::F32, 1, 256).unwrap();
            embedding(&weight, &device.upload_u32(&[1]).unwrap(), &rows).unwrap();
            let y = device.matrix(Element::F32, 5, 5).unwrap();
            gemv(&weight, &out, &y, None, None).unwrap();
            assert_eq!(device.usage().live, usage_of(&weight) + 8 * 512);
        }
        device.usage()
    };
    fn usage_of(weight: &DeviceWeight) -> usize {
        let (block, bytes) = weight.dtype().block();
        let scales = match weight.dtype() {
            StorageDType::Q4_0 | StorageDType::Q5_0 | StorageDType::Q8_0 | StorageDType::Q3K | StorageDType::Q6K => 2,
            StorageDType::NF4 => 4,
            _ => 0,
        };
        let blocks = 5 * 256 / block;
        (blocks * (bytes - scales)).next_multiple_of(512) + (blocks * scales).next_multiple_of(512)
    }
    let emulated = work(&Device::emulated().unwrap(), false);
    assert_eq!(work(&Device::dry(), false), emulated);
    assert_eq!(work(&Device::dry(), true), emulated);
}

#[test]
fn misuse_is_refused() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let message = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    let refused = |result: anyhow::Result<()>, words: &str| {
        let message = message(result);
        assert!(message.contains(words), "{message}");
    };
    refused(DeviceWeight::reserve(device, StorageDType::Q4K, 2, 128).map(drop), "no whole blocks of 256");
    refused(DeviceWeight::reserve(device, StorageDType::F32, 0, 128).map(drop), "between 1 and");
    refused(DeviceWeight::from_f32(device, &[1.0; 5], 2, 3).map(drop), "5 numbers");
    let short = DeviceWeight::upload(device, StorageDType::Q8_0, 2, 32, |_| &[0; 33]);
    refused(short.map(drop), "row 0 of a q8_0 weight has 33 bytes; 34 are needed");
    let weight = Host::random(StorageDType::Q8_0, 4, 64, true, 1).upload(device);
    let matrix = |element, rows, cols| -> Matrix { device.zeros(element, rows, cols).unwrap() };
    refused(weight.dequantise(3..5, &matrix(Element::F32, 2, 64)), "rows 3..5 of 4");
    refused(weight.dequantise(0..2, &matrix(Element::F32, 2, 32)), "into (2, 32)");
    refused(weight.dequantise(0..2, &matrix(Element::U32, 2, 64)), "not u32");
    let (x, y) = (matrix(Element::Bf16, 17, 64), matrix(Element::F32, 17, 4));
    assert!(gemv(&weight, &x, &y, None, None).is_ok(), "tensor cores take 17 rows");
    let (x, y) = (matrix(Element::Bf16, 65, 64), matrix(Element::F32, 65, 4));
    refused(gemv(&weight, &x, &y, None, None), "65 rows are none or too many");
    let (x, y) = (matrix(Element::F32, 17, 64), matrix(Element::F32, 17, 4));
    refused(gemv(&weight, &x, &y, None, None), "17 rows are none or too many");
    let plain = Host::random(StorageDType::Q5K, 4, 256, true, 1).upload(device);
    for (rows, element, weights, fits) in [
        (0, Element::F16, vec![&weight], false),
        (16, Element::F32, vec![&weight, &plain], true),
        (17, Element::F32, vec![&weight], false),
        (64, Element::F16, vec![&weight], true),
        (65, Element::F16, vec![&weight], false),
        (17, Element::F16, vec![&weight, &plain], false),
    ] {
        assert_eq!(supports(rows, element, weights), fits, "{rows} rows of {element}");
    }
    let x = matrix(Element::Bf16, 2, 64);
    refused(gemv(&weight, &x, &matrix(Element::F16, 2, 4), None, None), "the kernel needs bf16");
    refused(gemv(&weight, &x, &matrix(Element::F32, 2, 5), None, None), "y is (2, 5)");
    refused(gemv(&weight, &x, &matrix(Element::F32, 2, 4), Some(&matrix(Element::F32, 1, 3)), None), "a bias of 3");
    let other = Device::dry().zeros(Element::Bf16, 2, 64).unwrap();
    refused(gemv(&weight, &other, &matrix(Element::F32, 2, 4), None, None), "two devices");
    refused(embedding(&weight, &matrix(Element::U32, 1, 3), &matrix(Element::F32, 2, 64)), "3 rows of 64");
}
