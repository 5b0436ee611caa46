//! The bf16 gemm micro-kernel: bfloat16 factors, f32 sums. Bases that compute in bf16 use it, because AMX and AVX-512
//! BF16 are several times faster than f32. Both factors are rounded to the nearest bfloat16 (ties to even), every
//! product of two of them is exact in f32, and sums run over k in order of pairs. The kernel is selected at run time:
//! AMX tiles, AVX-512's VDPBF16PS, or plain loops. It does not depend on weights or operations. Read
//! `ops/linear/cpu_bf16.rs` for the use.
//!
//! Elements are stored in pairs, as 32-bit words: word p of a row holds elements 2p (low half) and 2p + 1. The
//! left-hand factor A is rows of words. The right-hand factor B is a panel, [`NR`] columns wide: word (p, j) holds
//! elements (2p, j) and (2p + 1, j).

use std::sync::OnceLock;

use half::bf16;

use crate::ops::cpu::gemm::{Into, NR};
use crate::ops::cpu::scratch::as_floats;
use crate::ops::cpu::transpose::transpose;
use crate::ops::cpu::{parallel, vectorised};
use crate::ops::storage::dtype::{StorageDType, unpack};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod vdp;

/// The implementation of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bf16Kernel {
    /// Plain loops that the compiler vectorises.
    Plain,
    /// AVX-512 BF16: VDPBF16PS.
    Avx512Bf16,
    /// AMX: tiles of 16 x 16 sums.
    Amx,
}

impl Bf16Kernel {
    /// The fastest that this machine supports and the system lets this process use.
    pub fn detect() -> Self {
        static BEST: OnceLock<Bf16Kernel> = OnceLock::new();
        *BEST.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                if amx::granted() {
                    return Self::Amx;
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("f16c")
                {
                    return Self::Avx512Bf16;
                }
            }
            Self::Plain
        })
    }

    /// All that this machine can run; tests use it to cover the fallbacks.
    pub fn available() -> Vec<Self> {
        [Self::Plain, Self::Avx512Bf16, Self::Amx].into_iter().filter(|kernel| *kernel <= Self::detect()).collect()
    }
}

/// Words per row of `k` elements: a whole number of 64-byte lines.
pub const fn words(k: usize) -> usize {
    k.div_ceil(32) * 16
}

/// The rows of A are padded with zeros to a multiple of this: two tiles.
const ROWS: usize = 32;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Which cores round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cores {
    /// All cores.
    All,
    /// Only the calling core, whose call is already part of shared work.
    This,
}

/// A left-hand factor A: (m, k) rounded; each row is padded with zeros to whole lines, the rows to a multiple of 32.
pub struct Rounded {
    lines: Vec<Line>,
    words: usize,
    rows: usize,
}

impl Rounded {
    /// Rounds row-major `x` (m, k), with space for `more` columns that are zero until [`Rounded::set_columns`].
    pub fn of(x: &[f32], m: usize, k: usize, more: usize, cores: Cores) -> Self {
        let words = words(k + more);
        let rows = m.div_ceil(ROWS) * ROWS;
        let mut lines = vec![Line([0; 16]); rows * words / 16];
        let out = Words(lines.as_mut_ptr().cast());
        let cost = if cores == Cores::All { m * k / 4 } else { 0 };
        parallel(m, cost, |range| {
            for i in range {
                // SAFETY: row i belongs to this item and is `words` long.
                let row = unsafe { std::slice::from_raw_parts_mut(out.row(i * words), words) };
                round(&x[i * k..(i + 1) * k], row);
            }
        });
        Self { lines, words, rows: m }
    }

    /// Words per row.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Writes row-major `values` (m, r) into the columns from `column` on; `column` is even.
    pub fn set_columns(&mut self, column: usize, values: &[f32], r: usize) {
        assert!(column.is_multiple_of(2) && (column + r).div_ceil(2) <= self.words && values.len() == self.rows * r);
        if r == 0 {
            return;
        }
        let words = self.words;
        // SAFETY: lines consist of plain words.
        let all =
            unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<u32>(), self.lines.len() * 16) };
        for (row, values) in all.chunks_exact_mut(words).zip(values.chunks_exact(r)) {
            round_plain(values, &mut row[column / 2..(column + r).div_ceil(2)]);
        }
    }

    /// The address of row `row`.
    fn from(&self, row: usize) -> *const u32 {
        let at = row * self.words;
        assert!(at <= self.lines.len() * 16);
        // SAFETY: inside the allocation, or one past it.
        unsafe { self.lines.as_ptr().cast::<u32>().add(at) }
    }

    /// The first 16 rows, or fewer, as a panel: the transposed factor.
    pub fn as_panel(&self, panel: &mut [u32]) {
        // SAFETY: there are at least 16 rows, and every bit pattern of a word is one of an f32 and back.
        let (rows, panel) = unsafe {
            (std::slice::from_raw_parts(self.from(0).cast::<f32>(), 16 * self.words), as_floats(&mut panel[..]))
        };
        transpose(rows, self.words, self.words, panel, NR);
    }
}

#[derive(Clone, Copy)]
struct Words(*mut u32);

// SAFETY: a plain address; each item writes its own row.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// # Safety
    /// `i` lies inside the allocation.
    unsafe fn row(self, i: usize) -> *mut u32 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.0.add(i) }
    }
}

/// Rounds a row into words; words past the last element become zero.
pub fn round(row: &[f32], out: &mut [u32]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if Bf16Kernel::detect() >= Bf16Kernel::Avx512Bf16 {
        // SAFETY: the instruction set was detected.
        done = unsafe { vdp::round(row, out) };
    }
    round_plain(&row[done..], &mut out[done / 2..]);
}

vectorised! {
    fn round_plain(row: &[f32], out: &mut [u32]) {
        let (pairs, rest) = row.as_chunks::<2>();
        let (body, tail) = out.split_at_mut(pairs.len());
        for (o, [low, high]) in body.iter_mut().zip(pairs) {
            *o = u32::from(bf16::from_f32(*low).to_bits()) | u32::from(bf16::from_f32(*high).to_bits()) << 16;
        }
        tail.fill(0);
        if let (Some(o), [last]) = (tail.first_mut(), rest) {
            *o = u32::from(bf16::from_f32(*last).to_bits());
        }
    }
}

/// Copies a row that is stored as bfloat16: its bytes are the words. Words past the last element become zero.
pub fn copy(bytes: &[u8], out: &mut [u32]) {
    let (pairs, rest) = bytes.as_chunks::<4>();
    let (body, tail) = out.split_at_mut(pairs.len());
    for (o, pair) in body.iter_mut().zip(pairs) {
        *o = u32::from_le_bytes(*pair);
    }
    tail.fill(0);
    if let (Some(o), [low, high]) = (tail.first_mut(), rest) {
        *o = u32::from(u16::from_le_bytes([*low, *high]));
    }
}

/// Rounds a row that is stored as Q8_0 blocks. Words past the last element become zero.
pub fn round_q8_0(bytes: &[u8], out: &mut [u32]) {
    let blocks = bytes.as_chunks::<34>().0;
    let (body, tail) = out.split_at_mut(16 * blocks.len());
    tail.fill(0);
    #[cfg(target_arch = "x86_64")]
    if Bf16Kernel::detect() >= Bf16Kernel::Avx512Bf16 {
        // SAFETY: the instruction set was detected.
        return unsafe { vdp::round_q8_0(blocks, body.as_chunks_mut::<16>().0) };
    }
    for (o, block) in body.as_chunks_mut::<16>().0.iter_mut().zip(blocks) {
        let mut values = [0f32; 32];
        unpack(StorageDType::Q8_0, block, &mut values);
        round_plain(&values, o);
    }
}

/// Interleaves two rows, rounded: `out[j]` = (a[j], b[j]).
pub fn interleave(a: &[f32], b: &[f32], out: &mut [u32]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if Bf16Kernel::detect() >= Bf16Kernel::Avx512Bf16 {
        // SAFETY: the instruction set was detected.
        done = unsafe { vdp::interleave(a, b, out) };
    }
    for ((o, &a), &b) in out.iter_mut().zip(a).zip(b).skip(done) {
        *o = u32::from(bf16::from_f32(a).to_bits()) | u32::from(bf16::from_f32(b).to_bits()) << 16;
    }
}

/// Transposes 16 consecutive rows of `words` words each into the 16 columns of a panel from `panel[0]` on.
pub fn rows_as_columns(rows: &mut [u32], words: usize, panel: &mut [u32]) {
    transpose(as_floats(rows), words, words, as_floats(panel), NR);
}

/// C(m, n) (+)= A B with n <= 32: `a` from row `row` on, `panel` of words(k) x 32 words. C is row-major with stride
/// `ldc`.
///
/// # Safety
/// C's m rows of n elements are live and no other thread uses them; rows row..row + m of `a` exist; the panel has 32
/// words per word of a row of `a`.
#[allow(clippy::too_many_arguments)]
pub unsafe fn product(
    kernel: Bf16Kernel,
    (m, n): (usize, usize),
    a: &Rounded,
    row: usize,
    panel: &[u32],
    c: *mut f32,
    ldc: usize,
    into: Into,
) {
    // SAFETY: guaranteed by the caller; a Rounded has whole lines and padded rows.
    unsafe { product_of_words(kernel, (m, n), a.from(row), a.words, panel, c, ldc, into) }
}

/// As [`product`], with A given as the address of rows of `words` words.
///
/// # Safety
/// As for [`product`]; `a` can be read for m rows, rounded up to a multiple of 32.
#[allow(clippy::too_many_arguments)]
pub unsafe fn product_of_words(
    kernel: Bf16Kernel,
    (m, n): (usize, usize),
    a: *const u32,
    words: usize,
    panel: &[u32],
    c: *mut f32,
    ldc: usize,
    into: Into,
) {
    assert!(panel.len() >= words * NR && words.is_multiple_of(16) && n <= NR);
    let t = Tiles { a, words, b: panel.as_ptr(), c, ldc, n, add: into == Into::Add };
    // SAFETY: guaranteed by the caller; the kernel was detected or is one of available().
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Bf16Kernel::Amx => t.amx(m),
            #[cfg(target_arch = "x86_64")]
            Bf16Kernel::Avx512Bf16 => t.vdp(m),
            _ => t.plain(m),
        }
    }
}

#[derive(Clone, Copy)]
struct Tiles {
    a: *const u32,
    words: usize,
    b: *const u32,
    c: *mut f32,
    ldc: usize,
    n: usize,
    add: bool,
}

/// Adds the products of one row of A with the 32 columns of `b` to `sums`.
fn plain_row(a: &[u32], b: &[u32], sums: &mut [f32; NR]) {
    plain_row_isa(a, b, sums);
}

vectorised! {
    fn plain_row_isa(a: &[u32], b: &[u32], sums: &mut [f32; NR]) {
        let (low, high) = (|w: u32| f32::from_bits(w << 16), |w: u32| f32::from_bits(w & 0xffff_0000));
        for (&x, row) in a.iter().zip(b.as_chunks::<NR>().0) {
            for (sum, &w) in sums.iter_mut().zip(row) {
                *sum += low(x) * low(w);
                *sum += high(x) * high(w);
            }
        }
    }
}

impl Tiles {
    /// # Safety
    /// As for [`product`].
    unsafe fn plain(self, m: usize) {
        for i in 0..m {
            let mut sums = [0f32; NR];
            // SAFETY: row i of C has n numbers, row i of A `words` words, the panel NR times as many.
            unsafe {
                let c = std::slice::from_raw_parts_mut(self.c.add(i * self.ldc), self.n);
                if self.add {
                    sums[..self.n].copy_from_slice(c);
                }
                let a = std::slice::from_raw_parts(self.a.add(i * self.words), self.words);
                plain_row(a, std::slice::from_raw_parts(self.b, self.words * NR), &mut sums);
                c.copy_from_slice(&sums[..self.n]);
            }
        }
    }

    /// # Safety
    /// As for [`product`]; the machine has AVX-512 BF16.
    #[cfg(target_arch = "x86_64")]
    unsafe fn vdp(self, m: usize) {
        const M: usize = 12;
        macro_rules! by_rows {
            ($rows:expr, $i:expr; $($m:literal)*) => {
                match $rows { $($m => vdp::tile::<$m>(self, $i),)* _ => unreachable!("a tile has 1 to 12 rows") }
            };
        }
        for i in (0..m).step_by(M) {
            // SAFETY: rows i.. below m.
            unsafe { by_rows!(M.min(m - i), i; 1 2 3 4 5 6 7 8 9 10 11 12) };
        }
    }

    /// # Safety
    /// As for [`product`]; the process is allowed to use AMX.
    #[cfg(target_arch = "x86_64")]
    unsafe fn amx(self, m: usize) {
        // SAFETY: detected; the configuration is released below, on the same thread.
        unsafe { amx::configure() };
        for i in (0..m).step_by(ROWS) {
            let rows = ROWS.min(m - i);
            // SAFETY: A can be read for whole tiles; edges of C go through a separate buffer.
            unsafe {
                let a = self.a.add(i * self.words);
                let c = self.c.add(i * self.ldc);
                if rows == ROWS && self.n == NR {
                    amx::tile(true, true, a, self.words, self.b, c, self.ldc, self.add);
                    continue;
                }
                let mut edge = [0f32; ROWS * NR];
                if self.add {
                    for r in 0..rows {
                        std::ptr::copy_nonoverlapping(c.add(r * self.ldc), edge.as_mut_ptr().add(r * NR), self.n);
                    }
                }
                amx::tile(rows > 16, self.n > 16, a, self.words, self.b, edge.as_mut_ptr(), NR, self.add);
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(edge.as_ptr().add(r * NR), c.add(r * self.ldc), self.n);
                }
            }
        }
        // SAFETY: as configured above.
        unsafe { amx::release() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        (0..n).map(|_| rng.uniform() as f32 - 0.5).collect()
    }

    fn rounded(x: f32) -> f64 {
        f64::from(bf16::from_f32(x).to_f32())
    }

    #[test]
    fn every_kernel_equals_the_sum_of_products_of_rounded_factors_at_every_edge() {
        for kernel in Bf16Kernel::available() {
            for (m, n, k) in
                [(1, 1, 1), (16, 16, 32), (32, 32, 64), (13, 31, 40), (45, 17, 33), (64, 32, 576), (8, 5, 100)]
            {
                let (a, b, c0) = (random(m * k, 1), random(k * n, 2), random(m * (n + 1), 3));
                let mut panel = vec![0u32; words(k) * NR];
                for p in 0..k.div_ceil(2) {
                    let row = |i: usize| if i < k { b[i * n..(i + 1) * n].to_vec() } else { vec![0.0; n] };
                    interleave(&row(2 * p), &row(2 * p + 1), &mut panel[p * NR..p * NR + n]);
                }
                let lhs = Rounded::of(&a, m, k, 0, Cores::All);
                for into in [Into::Fresh, Into::Add] {
                    let mut c = c0.clone();
                    // SAFETY: c holds m rows of n + 1.
                    unsafe { product(kernel, (m, n), &lhs, 0, &panel, c.as_mut_ptr(), n + 1, into) };
                    for i in 0..m {
                        for j in 0..=n {
                            let old = f64::from(c0[i * (n + 1) + j]);
                            let sum: f64 = (0..k).map(|p| rounded(a[i * k + p]) * rounded(b[p * n + j % n])).sum();
                            let want = match (j == n, into) {
                                (true, _) => old, // the column past the last is unchanged
                                (_, Into::Add) => old + sum,
                                (_, Into::Fresh) => sum,
                            };
                            let got = f64::from(c[i * (n + 1) + j]);
                            assert!((got - want).abs() < 1e-4, "{kernel:?} {m}x{n}x{k} at {i},{j}: {got} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_become_the_columns_of_a_panel() {
        let k = 70;
        let x = random(16 * k, 5);
        let lhs = Rounded::of(&x, 16, k, 0, Cores::This);
        let mut panel = vec![0u32; words(k) * NR];
        lhs.as_panel(&mut panel);
        for p in 0..words(k) {
            for i in 0..16 {
                let want = |j: usize| if j < k { bf16::from_f32(x[i * k + j]).to_bits() } else { 0 };
                assert_eq!(panel[p * NR + i], u32::from(want(2 * p)) | u32::from(want(2 * p + 1)) << 16);
            }
        }
    }
}
