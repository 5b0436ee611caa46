//! Quantisation: f32 -> the storage types, the inverse of `dtype.rs`. Bytes equal ggml's `quantize_row_*_ref`; NF4 is
//! QLoRA's. It does not depend on matrices. Read `weight.rs` in `ops` next, which quantises row by row.

use anyhow::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

use crate::invalid;
use crate::ops::storage::dtype::{NF4_VALUES, StorageDType};

/// Quantises `values`, a whole number of blocks of `dtype`, and appends them to `out`.
///
/// # Errors
/// If the number of values is not a whole number of blocks, a value is NaN, infinite or too large for a half float, or
/// the type is supported for reading only.
pub fn quantise(dtype: StorageDType, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let name = dtype.name();
    let bytes = dtype.bytes_for(values.len());
    let Some(bytes) = bytes else {
        return Err(invalid!("{} numbers are not whole blocks of {} ({name})", values.len(), dtype.block().0));
    };
    // All types except f32, bf16 and nf4 store half floats as large as the values.
    let half = !matches!(dtype, StorageDType::F32 | StorageDType::BF16 | StorageDType::NF4);
    let largest = if half { f16::MAX.to_f32() } else { f32::MAX };
    if let Some(bad) = values.iter().find(|v| !v.is_finite() || v.abs() > largest) {
        return Err(invalid!("the number {bad} does not fit {name}"));
    }
    let before = out.len();
    match dtype {
        StorageDType::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        StorageDType::F16 => out.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes())),
        StorageDType::BF16 => out.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes())),
        StorageDType::Q4_0 => by_candle(GgmlDType::Q4_0, values, out)?,
        StorageDType::Q4_1 => by_candle(GgmlDType::Q4_1, values, out)?,
        StorageDType::Q5_0 => by_candle(GgmlDType::Q5_0, values, out)?,
        StorageDType::Q5_1 => by_candle(GgmlDType::Q5_1, values, out)?,
        StorageDType::Q8_0 => by_candle(GgmlDType::Q8_0, values, out)?,
        StorageDType::Q6K => values.as_chunks::<256>().0.iter().for_each(|block| q6_k(block, out)),
        StorageDType::Q4K => values.as_chunks::<256>().0.iter().for_each(|block| q4_k(block, out)),
        StorageDType::NF4 => values.as_chunks::<64>().0.iter().for_each(|block| nf4(block, out)),
        StorageDType::Q2K | StorageDType::Q3K | StorageDType::Q5K => {
            return Err(invalid!("{name} is read and not written; use q4_k, q6_k or q8_0"));
        }
    }
    anyhow::ensure!(out.len() - before == bytes, "{name}: {} bytes instead of {bytes}", out.len() - before);
    Ok(())
}

/// Quantises with candle, whose encoders equal ggml's byte for byte for the types used here (see the test).
fn by_candle(dtype: GgmlDType, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let q = QTensor::quantize(&Tensor::from_slice(values, values.len(), &Device::Cpu)?, dtype)?;
    out.extend_from_slice(&q.data()?);
    Ok(())
}

/// Rounds to the nearest integer, ties to even, as ggml's bit trick does.
fn nearest(value: f32) -> i32 {
    value.round_ties_even() as i32
}

/// 256 values as eight groups x = d s_j q - dmin m_j: q has 4 bits, s and m have 6. Each group's (scale, minimum) is
/// fitted by weighted least squares ([`fit`]). Own code, because candle's encoder is from an older ggml without
/// weights.
fn q4_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let fits: [(f32, f32); 8] = std::array::from_fn(|j| fit(&x.as_chunks::<32>().0[j]));
    let top = |of: fn(&(f32, f32)) -> f32| fits.iter().map(of).fold(0f32, f32::max);
    let (max_scale, max_min) = (top(|f| f.0), top(|f| f.1));
    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let (inv_scale, inv_min) = (inverse(max_scale), inverse(max_min));
    let six: [(u8, u8); 8] = fits.map(|(scale, min)| {
        let bits = |v: f32| nearest(v).clamp(0, 63) as u8;
        (bits(inv_scale * scale), bits(inv_min * min))
    });
    let (d, dmin) = (f16::from_f32(max_scale / 63.0), f16::from_f32(max_min / 63.0));
    out.extend(d.to_le_bytes());
    out.extend(dmin.to_le_bytes());
    // Twelve bytes: six bits each for groups 0 to 3; the upper two bits belong to groups 4 to 7.
    let mut packed = [0u8; 12];
    for j in 0..4 {
        let ((s, m), (s4, m4)) = (six[j], six[j + 4]);
        packed[j] = s | (s4 >> 4) << 6;
        packed[j + 4] = m | (m4 >> 4) << 6;
        packed[j + 8] = (s4 & 15) | (m4 & 15) << 4;
    }
    out.extend(packed);
    let mut q = [0u8; 256];
    for (j, (s, m)) in six.into_iter().enumerate() {
        let (d, dm) = (d.to_f32() * f32::from(s), dmin.to_f32() * f32::from(m));
        if d == 0.0 {
            continue;
        }
        for i in 32 * j..32 * (j + 1) {
            q[i] = nearest((x[i] + dm) / d).clamp(0, 15) as u8;
        }
    }
    for pair in q.as_chunks::<64>().0 {
        out.extend((0..32).map(|i| pair[i] | pair[i + 32] << 4));
    }
}

/// (scale, -minimum) of 32 values on a grid of 16 steps. Each of 21 spacings gives integers, the integers give the best
/// line in closed form, and the line with the least error under the weights rms + |x| is returned. The minimum is never
/// above 0. Source: ggml `make_qkx2_quants` with its q4_K arguments.
fn fit(x: &[f32; 32]) -> (f32, f32) {
    const TOP: f32 = 15.0;
    let rms = (x.iter().map(|v| v * v).sum::<f32>() / 32.0).sqrt();
    let weights = x.map(|v| rms + v.abs());
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (0f32, 0f32);
    for (&v, &w) in x.iter().zip(&weights) {
        min = min.min(v);
        max = max.max(v);
        sum_w += w;
        sum_x += w * v;
    }
    min = min.min(0.0);
    if max == min {
        return (0.0, -min);
    }
    let error_of = |scale: f32, low: f32, q: &[f32; 32]| {
        let mut error = 0f32;
        for i in 0..32 {
            let difference = scale * q[i] + low - x[i];
            error += weights[i] * (difference * difference);
        }
        error
    };
    let inverse = TOP / (max - min);
    let (mut scale, mut low) = (1.0 / inverse, min);
    let mut least = error_of(scale, low, &grid(x, low, inverse));
    for step in 0..=20 {
        let q = grid(x, low, (-1.0 + 0.1 * step as f32 + TOP) / (max - low));
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for i in 0..32 {
            sum_l += weights[i] * q[i];
            sum_l2 += weights[i] * q[i] * q[i];
            sum_xl += weights[i] * q[i] * x[i];
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_low > 0.0 {
                this_low = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let error = error_of(this_scale, this_low, &q);
            if error < least {
                (least, scale, low) = (error, this_scale, this_low);
            }
        }
    }
    (scale, -low)
}

/// The integers 0..15 of x on a grid that starts at `low`.
fn grid(x: &[f32; 32], low: f32, inverse: f32) -> [f32; 32] {
    x.map(|v| nearest(inverse * (v - low)).clamp(0, 15) as f32)
}

/// 256 values as sixteen groups x = d s_j q: q has 6 bits including a sign, s has 8.
fn q6_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let groups = x.as_chunks::<16>().0;
    let fits: [f32; 16] = std::array::from_fn(|j| fit_signed(&groups[j]));
    let top = fits.iter().fold(0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
    if top.abs() < TINY {
        out.extend([0u8; 210]);
        return;
    }
    let inverse = -128.0 / top;
    let d = f16::from_f32(1.0 / inverse);
    let scales = fits.map(|s| nearest(inverse * s).min(127) as i8);
    let mut q = [0u8; 256];
    for (j, group) in groups.iter().enumerate() {
        let d = d.to_f32() * f32::from(scales[j]);
        for (i, &v) in group.iter().enumerate() {
            let level = if d == 0.0 { 0 } else { nearest(v / d).clamp(-32, 31) };
            q[16 * j + i] = (level + 32) as u8;
        }
    }
    for q in q.as_chunks::<128>().0 {
        out.extend((0..64).map(|i| (q[i] & 15) | (q[i + 64] & 15) << 4));
    }
    for q in q.as_chunks::<128>().0 {
        out.extend((0..32).map(|i| q[i] >> 4 | q[i + 32] >> 4 << 2 | q[i + 64] >> 4 << 4 | q[i + 96] >> 4 << 6));
    }
    out.extend(scales.map(|s| s as u8));
    out.extend(d.to_le_bytes());
}

/// A group below this is treated as zeros (ggml's `GROUP_MAX_EPS`).
const TINY: f32 = 1e-15;

/// The scale of 16 values on a grid of -32 to 31. Each of 19 spacings gives integers, and the integers give the best
/// scale, weighted by x^2, in closed form. Source: ggml `make_qx_quants` with its q6_K arguments.
fn fit_signed(x: &[f32; 16]) -> f32 {
    let top = x.iter().fold(0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
    if top.abs() < TINY {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut lx, mut l2) = (0f32, 0f32);
        for &v in x {
            let level = nearest(inverse * v).clamp(-32, 31) as f32;
            lx += v * v * v * level;
            l2 += v * v * level * level;
        }
        (lx, l2)
    };
    let (lx, l2) = sums(-32.0 / top);
    let mut scale = if l2 == 0.0 { 0.0 } else { lx / l2 };
    let mut best = scale * lx;
    for step in (-9i8..=9).filter(|&s| s != 0) {
        let (lx, l2) = sums(-(32.0 + 0.1 * f32::from(step)) / top);
        if l2 > 0.0 && lx * lx > best * l2 {
            scale = lx / l2;
            best = scale * lx;
        }
    }
    scale
}

/// 64 values: their largest absolute value as f32, then for each the nearest of sixteen quantiles of a normal
/// distribution, two per byte (i low, i + 32 high). Source: QLoRA, arXiv:2305.14314 section 3, without double
/// quantisation.
fn nf4(x: &[f32; 64], out: &mut Vec<u8>) {
    let top = x.iter().fold(0f32, |a, v| a.max(v.abs()));
    let inverse = if top > 0.0 { 1.0 / top } else { 0.0 };
    let code = |v: f32| -> u8 {
        let v = v * inverse;
        // The first boundary above v; boundaries are halfway between two values.
        NF4_VALUES.windows(2).take_while(|pair| v > (pair[0] + pair[1]) / 2.0).count() as u8
    };
    out.extend(top.to_le_bytes());
    out.extend((0..32).map(|i| code(x[i]) | code(x[i + 32]) << 4));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ops::weight::{Bytes, Weight};
    use crate::rng::SplitMix64;

    /// The values of tests/golden/quantise.py.
    fn numbers() -> Vec<f32> {
        let mut rng = SplitMix64::new(0x1234);
        (0..512)
            .map(|_| {
                let value = (0..4).map(|_| rng.uniform()).sum::<f64>() - 2.0;
                (value * if rng.uniform() < 1.0 / 16.0 { 10.0 } else { 1.0 }) as f32
            })
            .collect()
    }

    fn golden() -> serde_json::Value {
        serde_json::from_str(include_str!("../../../tests/golden/quantise.json")).unwrap()
    }

    #[test]
    fn every_written_type_has_the_bytes_of_ggml() {
        let golden = golden();
        for dtype in [
            StorageDType::Q4_0,
            StorageDType::Q4_1,
            StorageDType::Q5_0,
            StorageDType::Q5_1,
            StorageDType::Q8_0,
            StorageDType::Q4K,
            StorageDType::Q6K,
        ] {
            let mut bytes = vec![];
            quantise(dtype, &numbers(), &mut bytes).unwrap();
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, golden[dtype.name()].as_str().unwrap(), "{}", dtype.name());
        }
    }

    #[test]
    fn nf4_has_the_published_values_and_rounds_to_the_nearest() {
        for (ours, theirs) in NF4_VALUES.iter().zip(golden()["nf4_values"].as_array().unwrap()) {
            // bitsandbytes rounds its quantiles through f32.
            assert!((f64::from(*ours) - theirs.as_f64().unwrap()).abs() < 2e-7);
        }
        let values = numbers();
        let w = Weight::from_f32(&values, 8, 64).unwrap().quantised(StorageDType::NF4).unwrap();
        for (block, read) in values.as_chunks::<64>().0.iter().zip(w.to_f32().as_chunks::<64>().0) {
            let top = block.iter().fold(0f32, |a, v| a.max(v.abs()));
            for (v, r) in block.iter().zip(read) {
                let least = NF4_VALUES.iter().map(|n| (n * top - v).abs()).fold(f32::INFINITY, f32::min);
                assert!((r - v).abs() <= least + 1e-6 * top, "{v} became {r}");
            }
        }
    }

    #[test]
    fn a_matrix_is_quantised_in_its_logical_row_order_and_zeros_stay_zeros() {
        let mut values = numbers();
        values[..128].fill(0.0);
        let dense = Weight::from_f32(&values, 2, 256).unwrap();
        for dtype in [StorageDType::Q8_0, StorageDType::Q4K, StorageDType::Q6K, StorageDType::NF4, StorageDType::F16] {
            let w = dense.quantised(dtype).unwrap();
            assert_eq!((w.dtype(), w.rows(), w.cols()), (dtype, 2, 256));
            assert!(w.to_f32()[..128].iter().all(|&v| v == 0.0), "{}", dtype.name());
        }
    }

    #[test]
    fn values_that_a_type_cannot_represent_are_refused() {
        for dtype in [StorageDType::F16, StorageDType::Q8_0, StorageDType::Q4K, StorageDType::NF4, StorageDType::F32] {
            let mut values = vec![1f32; 256];
            values[77] = f32::NAN;
            assert!(quantise(dtype, &values, &mut vec![]).is_err(), "{}", dtype.name());
        }
        let large = [1e6f32; 256];
        assert!(quantise(StorageDType::Q4_0, &large, &mut vec![]).is_err());
        assert!(quantise(StorageDType::NF4, &large, &mut vec![]).is_ok());
        assert!(quantise(StorageDType::Q2K, &large, &mut vec![]).is_err());
        assert!(quantise(StorageDType::Q4K, &large[..96], &mut vec![]).is_err());
        let thin = Weight::new(Bytes::new(Arc::new(vec![0u8; 4 * 96])), StorageDType::F32, 1, 96).unwrap();
        assert!(thin.quantised(StorageDType::Q4K).is_err());
        assert_eq!(StorageDType::Q4K.for_width(96), Some(StorageDType::Q5_0));
        assert_eq!(StorageDType::Q6K.for_width(100), None);
    }
}
