//! What storage.rs compares with: ggml's `dequantize_row_*`, number by number, and random matrices as files hold them.

use fourfold::device::Device;
use fourfold::ops::storage::gpu::DeviceWeight;
use fourfold::ops::weight::StorageDType;
use half::{bf16, f16};

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

fn half(b: &[u8]) -> f32 {
    f16::from_le_bytes([b[0], b[1]]).to_f32()
}

/// The scale and the minimum of group j of a Q4_K or Q5_K block; `s` are its twelve bytes.
fn scale_min(j: usize, s: &[u8]) -> (f32, f32) {
    if j < 4 {
        (f32::from(s[j] & 63), f32::from(s[j + 4] & 63))
    } else {
        let scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        (f32::from(scale), f32::from((s[j + 4] >> 4) | (s[j] >> 6) << 4))
    }
}

/// Number i of a block.
fn number(dtype: StorageDType, b: &[u8], i: usize) -> f32 {
    // For the types of 32: nibble and fifth bit of number i, quants from byte `at` and fifth bits from byte `high`.
    let nibble = |at: usize| i32::from(if i < 16 { b[at + i] & 15 } else { b[at + i - 16] >> 4 });
    let fifth = |high: usize| i32::from(b[high + i / 8] >> (i % 8) & 1) << 4;
    match dtype {
        StorageDType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        StorageDType::F16 => half(b),
        StorageDType::BF16 => f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16),
        StorageDType::Q4_0 => (nibble(2) - 8) as f32 * half(b),
        StorageDType::Q4_1 => nibble(4) as f32 * half(b) + half(&b[2..]),
        StorageDType::Q5_0 => ((nibble(6) | fifth(2)) - 16) as f32 * half(b),
        StorageDType::Q5_1 => (nibble(8) | fifth(4)) as f32 * half(b) + half(&b[2..]),
        StorageDType::Q8_0 => f32::from(b[2 + i] as i8) * half(b),
        StorageDType::NF4 => {
            let q = if i < 32 { b[4 + i] & 15 } else { b[4 + i - 32] >> 4 };
            NF4[usize::from(q)] * f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        StorageDType::Q2K => {
            let (n, j, l) = (i / 128, i % 128 / 32, i % 32);
            let s = b[8 * n + 2 * j + l / 16];
            let q = b[16 + 32 * n + l] >> (2 * j) & 3;
            let (scale, least) = (half(&b[80..]) * f32::from(s & 15), half(&b[82..]) * f32::from(s >> 4));
            scale * f32::from(q) - least
        }
        StorageDType::Q3K => {
            let (n, j, l) = (i / 128, i % 128 / 32, i % 32);
            let k = 8 * n + 2 * j + l / 16;
            let low = if k < 8 { b[96 + k] & 15 } else { b[96 + k - 8] >> 4 };
            let s = low | (b[96 + 8 + k % 4] >> (2 * (k / 4)) & 3) << 4;
            let scale = half(&b[108..]) * (f32::from(s) - 32.0);
            let third = if b[l] >> (4 * n + j) & 1 == 0 { 4 } else { 0 };
            scale * (i32::from(b[32 + 32 * n + l] >> (2 * j) & 3) - third) as f32
        }
        StorageDType::Q4K => {
            let (c, l) = (i / 64, i % 32);
            let (s, m) = scale_min(i / 32, &b[4..16]);
            let q = b[16 + 32 * c + l] >> (4 * (i % 64 / 32)) & 15;
            half(b) * s * f32::from(q) - half(&b[2..]) * m
        }
        StorageDType::Q5K => {
            let (c, l) = (i / 64, i % 32);
            let (s, m) = scale_min(i / 32, &b[4..16]);
            let q = b[48 + 32 * c + l] >> (4 * (i % 64 / 32)) & 15;
            let fifth = if b[16 + l] >> (i / 32) & 1 == 1 { 16.0 } else { 0.0 };
            half(b) * s * (f32::from(q) + fifth) - half(&b[2..]) * m
        }
        StorageDType::Q6K => {
            let (n, j, l) = (i / 128, i % 128 / 32, i % 32);
            let low = b[64 * n + 32 * (j % 2) + l] >> (4 * (j / 2)) & 15;
            let q = low | (b[128 + 32 * n + l] >> (2 * j) & 3) << 4;
            half(&b[208..]) * f32::from(b[192 + 8 * n + 2 * j + l / 16] as i8) * f32::from(q as i8 - 32)
        }
    }
}

pub struct Random(pub u64);
impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }
    /// Between -1 and 1.
    pub fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u32 << 30) as f32 - 1.0
    }
}

/// A matrix in host memory, as a file holds it.
pub struct Host {
    pub dtype: StorageDType,
    pub rows: usize,
    pub cols: usize,
    pub bytes: Vec<u8>,
}

impl Host {
    /// Random bytes. `tame` gives scales around 0.01; otherwise they are any bits, the extreme ones often.
    pub fn random(dtype: StorageDType, rows: usize, cols: usize, tame: bool, seed: u64) -> Self {
        let (block, len) = dtype.block();
        let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
        let mut bytes: Vec<u8> = (0..rows * cols / block * len).map(|_| random.next() as u8).collect();
        let scales: &[usize] = match dtype {
            StorageDType::Q4_0 | StorageDType::Q5_0 | StorageDType::Q8_0 | StorageDType::F16 => &[0],
            StorageDType::Q4_1 | StorageDType::Q5_1 | StorageDType::Q4K | StorageDType::Q5K => &[0, 2],
            StorageDType::Q2K => &[80, 82],
            StorageDType::Q3K => &[108],
            StorageDType::Q6K => &[208],
            StorageDType::F32 | StorageDType::BF16 | StorageDType::NF4 => &[],
        };
        let extreme: [u16; 10] = [0, 0x8000, 1, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e01];
        for b in bytes.chunks_exact_mut(len) {
            for &at in scales {
                let bits = match (tame, random.next() % 3) {
                    (true, _) => f16::from_f32(0.01 * random.unit()).to_bits(),
                    (false, 0) => extreme[random.next() as usize % extreme.len()],
                    (false, _) => random.next() as u16,
                };
                b[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            }
            if tame {
                let v = random.unit();
                match dtype {
                    StorageDType::F32 | StorageDType::NF4 => b[..4].copy_from_slice(&v.to_le_bytes()),
                    StorageDType::BF16 => b.copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
                    StorageDType::F16 => b.copy_from_slice(&f16::from_f32(v).to_le_bytes()),
                    _ => {}
                }
            }
        }
        Self { dtype, rows, cols, bytes }
    }

    pub fn row(&self, i: usize) -> &[u8] {
        let len = self.bytes.len() / self.rows;
        &self.bytes[i * len..(i + 1) * len]
    }

    pub fn values(&self) -> Vec<f32> {
        let (block, len) = self.dtype.block();
        let blocks = self.bytes.chunks_exact(len);
        blocks.flat_map(|b| (0..block).map(move |i| number(self.dtype, b, i))).collect()
    }

    pub fn upload(&self, device: &Device) -> DeviceWeight {
        DeviceWeight::upload(device, self.dtype, self.rows, self.cols, |i| self.row(i)).unwrap()
    }
}
