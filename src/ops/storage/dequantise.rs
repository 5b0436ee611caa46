//! Exact dequantisation of Q5_0, Q5_1 and Q2_K to Q6_K to f32: one plain loop per type, which the compiler vectorises.
//! The order of operations is that of ggml's `dequantize_row_*`, so the values are equal bit for bit. It does not
//! depend on matrices. Read `quantise.rs` next.

use half::f16;

use crate::ops::cpu::vectorised;

/// The half float at byte `at` of a block.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The fifth bits of a block of 32 values, each as 0 or 16. Value i has bit i of the four bytes.
#[inline(always)]
fn fifth_bits(bytes: &[u8; 4]) -> [u8; 32] {
    let all = u32::from_le_bytes(*bytes);
    std::array::from_fn(|i| ((all >> i & 1) << 4) as u8)
}

vectorised! {
    pub(super) fn q5_0(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<22>().0) {
            let (d, high) = (half(b, 0), fifth_bits(&[b[2], b[3], b[4], b[5]]));
            for i in 0..16 {
                o[i] = (i32::from(b[6 + i] & 15 | high[i]) - 16) as f32 * d;
                o[16 + i] = (i32::from(b[6 + i] >> 4 | high[16 + i]) - 16) as f32 * d;
            }
        }
    }
}

vectorised! {
    pub(super) fn q5_1(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<24>().0) {
            let (d, m, high) = (half(b, 0), half(b, 2), fifth_bits(&[b[4], b[5], b[6], b[7]]));
            for i in 0..16 {
                o[i] = i32::from(b[8 + i] & 15 | high[i]) as f32 * d + m;
                o[16 + i] = i32::from(b[8 + i] >> 4 | high[16 + i]) as f32 * d + m;
            }
        }
    }
}

// A block of Q2_K, Q3_K and Q6_K has sixteen scales: two halves of four rows of two sides of sixteen values each. One
// loop covers a side of all four rows, because the compiler vectorises long loops with constant shifts best.

vectorised! {
    pub(super) fn q2_k(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<256>().0.iter_mut().zip(bytes.as_chunks::<84>().0) {
            let (d, dmin) = (half(b, 80), half(b, 82));
            for (n, (o, q)) in o.as_chunks_mut::<128>().0.iter_mut().zip(b[16..80].as_chunks::<32>().0).enumerate() {
                for side in 0..2 {
                    let packed: [u8; 4] = std::array::from_fn(|j| b[8 * n + 2 * j + side]);
                    let (s, m) = (packed.map(|b| d * f32::from(b & 15)), packed.map(|b| dmin * f32::from(b >> 4)));
                    for i in 16 * side..16 * (side + 1) {
                        o[i] = s[0] * f32::from(q[i] & 3) - m[0];
                        o[32 + i] = s[1] * f32::from(q[i] >> 2 & 3) - m[1];
                        o[64 + i] = s[2] * f32::from(q[i] >> 4 & 3) - m[2];
                        o[96 + i] = s[3] * f32::from(q[i] >> 6) - m[3];
                    }
                }
            }
        }
    }
}

vectorised! {
    pub(super) fn q3_k(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<256>().0.iter_mut().zip(bytes.as_chunks::<110>().0) {
            let (d, third): (f32, &[u8; 32]) = (half(b, 108), b.first_chunk().unwrap());
            for (n, (o, q)) in o.as_chunks_mut::<128>().0.iter_mut().zip(b[32..96].as_chunks::<32>().0).enumerate() {
                for side in 0..2 {
                    // A scale has four bits in bytes 96 to 103 and two in bytes 104 to 107.
                    let s: [f32; 4] = std::array::from_fn(|j| {
                        let k = 2 * j + side;
                        let six = (b[96 + k] >> (4 * n) & 15) | (b[104 + k % 4] >> (4 * n + k / 4 * 2) & 3) << 4;
                        d * (f32::from(six) - 32.0)
                    });
                    for i in 16 * side..16 * (side + 1) {
                        let high = third[i] >> (4 * n);
                        o[i] = s[0] * f32::from((q[i] & 3 | (high & 1) << 2) as i8 - 4);
                        o[32 + i] = s[1] * f32::from((q[i] >> 2 & 3 | (high & 2) << 1) as i8 - 4);
                        o[64 + i] = s[2] * f32::from((q[i] >> 4 & 3 | high & 4) as i8 - 4);
                        o[96 + i] = s[3] * f32::from((q[i] >> 6 | (high & 8) >> 1) as i8 - 4);
                    }
                }
            }
        }
    }
}

/// The eight (scale, minimum) of a Q4_K or Q5_K block, from twelve bytes with six bits each.
#[inline(always)]
fn scales(d: f32, dmin: f32, s: &[u8; 12]) -> [(f32, f32); 8] {
    std::array::from_fn(|j| {
        let (scale, min) = match j {
            0..4 => (s[j] & 63, s[j + 4] & 63),
            _ => ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4),
        };
        (d * f32::from(scale), dmin * f32::from(min))
    })
}

vectorised! {
    pub(super) fn q4_k(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<256>().0.iter_mut().zip(bytes.as_chunks::<144>().0) {
            let scales = scales(half(b, 0), half(b, 2), b[4..].first_chunk().unwrap());
            for (c, (o, q)) in o.as_chunks_mut::<64>().0.iter_mut().zip(b[16..].as_chunks::<32>().0).enumerate() {
                let [(d1, m1), (d2, m2)] = [scales[2 * c], scales[2 * c + 1]];
                for i in 0..32 {
                    o[i] = d1 * i32::from(q[i] & 15) as f32 - m1;
                    o[32 + i] = d2 * i32::from(q[i] >> 4) as f32 - m2;
                }
            }
        }
    }
}

vectorised! {
    pub(super) fn q5_k(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<256>().0.iter_mut().zip(bytes.as_chunks::<176>().0) {
            let scales = scales(half(b, 0), half(b, 2), b[4..].first_chunk().unwrap());
            let high: &[u8; 32] = b[16..].first_chunk().unwrap();
            for (c, (o, q)) in o.as_chunks_mut::<64>().0.iter_mut().zip(b[48..].as_chunks::<32>().0).enumerate() {
                let [(d1, m1), (d2, m2)] = [scales[2 * c], scales[2 * c + 1]];
                for i in 0..32 {
                    let fifth = high[i] >> (2 * c);
                    o[i] = d1 * i32::from(q[i] & 15 | (fifth & 1) << 4) as f32 - m1;
                    o[32 + i] = d2 * i32::from(q[i] >> 4 | (fifth & 2) << 3) as f32 - m2;
                }
            }
        }
    }
}

vectorised! {
    pub(super) fn q6_k(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<256>().0.iter_mut().zip(bytes.as_chunks::<210>().0) {
            let d = half(b, 208);
            let (low, high) = (b[..128].as_chunks::<64>().0, b[128..192].as_chunks::<32>().0);
            for (n, (o, (low, high))) in o.as_chunks_mut::<128>().0.iter_mut().zip(low.iter().zip(high)).enumerate() {
                for side in 0..2 {
                    let s: [f32; 4] = std::array::from_fn(|j| d * f32::from(b[192 + 8 * n + 2 * j + side] as i8));
                    for i in 16 * side..16 * (side + 1) {
                        o[i] = s[0] * f32::from((low[i] & 15 | (high[i] & 3) << 4) as i8 - 32);
                        o[32 + i] = s[1] * f32::from((low[32 + i] & 15 | (high[i] >> 2 & 3) << 4) as i8 - 32);
                        o[64 + i] = s[2] * f32::from((low[i] >> 4 | (high[i] >> 4 & 3) << 4) as i8 - 32);
                        o[96 + i] = s[3] * f32::from((low[32 + i] >> 4 | high[i] >> 6 << 4) as i8 - 32);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{
        BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, GgmlType,
    };

    use crate::ops::storage::dtype::{StorageDType, unpack};

    /// Compares unaligned random blocks of `dtype` with candle, as a whole row and in parts. A third of the half floats
    /// at `halves` are extreme: zero, subnormal, largest, infinite or NaN.
    fn equals_candle<B: GgmlType>(dtype: StorageDType, halves: &[usize]) {
        let extreme: [u16; 10] = [0, 0x8000, 1, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e01];
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let ((values, size), blocks) = (dtype.block(), 512);
        let mut bytes: Vec<u8> = (0..1 + blocks * size).map(|_| random() as u8).collect();
        for b in bytes[1..].chunks_exact_mut(size) {
            for &at in halves {
                if random().is_multiple_of(3) {
                    b[at..at + 2].copy_from_slice(&extreme[random() as usize % extreme.len()].to_le_bytes());
                }
            }
        }
        let bytes = &bytes[1..];

        assert_eq!(size_of::<B>(), size);
        let mut aligned = vec![B::zeros(); blocks];
        // SAFETY: both are `blocks * size` bytes, and candle's blocks are `repr(C)` structs of u8, i8 and f16, of which
        // every bit pattern is valid.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), aligned.as_mut_ptr().cast::<u8>(), bytes.len()) };
        let mut want = vec![0f32; blocks * values];
        B::to_float(&aligned, &mut want);

        // The bits of a NaN depend on the order of operands, which the compiler chooses.
        let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        for part in [blocks, 1, 3] {
            for (bytes, want) in bytes.chunks(part * size).zip(want.chunks(part * values)) {
                let mut got = vec![0f32; want.len()];
                unpack(dtype, bytes, &mut got);
                let wrong = (0..got.len()).find(|&i| !same(&got[i], &want[i]));
                assert_eq!(wrong, None, "{}, {part} blocks at a time", dtype.name());
            }
        }
    }

    #[test]
    fn random_blocks_unpack_to_the_bits_candle_reads() {
        equals_candle::<BlockQ5_0>(StorageDType::Q5_0, &[0]);
        equals_candle::<BlockQ5_1>(StorageDType::Q5_1, &[0, 2]);
        equals_candle::<BlockQ2K>(StorageDType::Q2K, &[80, 82]);
        equals_candle::<BlockQ3K>(StorageDType::Q3K, &[108]);
        equals_candle::<BlockQ4K>(StorageDType::Q4K, &[0, 2]);
        equals_candle::<BlockQ5K>(StorageDType::Q5K, &[0, 2]);
        equals_candle::<BlockQ6K>(StorageDType::Q6K, &[208]);
    }
}
