//! The f32 gemm micro-kernel: C(m, n) (+)= A(m, k) B(k, n) over strided slices, one register tile at a time. Every f32
//! product of the crate (frozen linears, LoRA, their gradients, attention) calls `gemm`; packing and the distribution
//! over cores are the callers'. It depends on `isa.rs` only. Read `pack.rs` next, then `linear/cpu.rs` in `ops`.

use crate::ops::cpu::Isa;

/// Rows of a register tile.
pub const MR: usize = 12;
/// Columns of a register tile: two AVX-512 registers.
pub const NR: usize = 32;
/// Terms of the sum per pass: 32 columns x 768 x 4 bytes stay in the second-level cache.
const KC: usize = 768;

/// A matrix by address and strides, in elements.
#[derive(Clone, Copy)]
pub struct Mat {
    ptr: *const f32,
    rows: usize,
    cols: usize,
}

// SAFETY: a plain address for reading; the caller of `gemm` guarantees the lifetime.
unsafe impl Send for Mat {}
// SAFETY: as above.
unsafe impl Sync for Mat {}

impl Mat {
    /// Element (i, j) is `values[i * rows + j * cols]`.
    pub fn new(values: &[f32], rows: usize, cols: usize) -> Self {
        Self { ptr: values.as_ptr(), rows, cols }
    }

    /// Row-major with `width` columns.
    pub fn rows(values: &[f32], width: usize) -> Self {
        Self::new(values, width, 1)
    }

    /// The transpose.
    #[must_use]
    pub fn t(self) -> Self {
        Self { ptr: self.ptr, rows: self.cols, cols: self.rows }
    }

    /// The submatrix that starts at (i, j).
    ///
    /// # Safety
    /// (i, j) lies inside the slice.
    pub unsafe fn from(self, i: usize, j: usize) -> Self {
        // SAFETY: guaranteed by the caller.
        Self { ptr: unsafe { self.ptr.add(i * self.rows + j * self.cols) }, ..self }
    }
}

/// Whether a product replaces the output or adds to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// C = A B
    Fresh,
    /// C += A B
    Add,
}

/// C(m, n) (+)= A(m, k) B(k, n). B's rows must be contiguous (its column stride is 1); C is row-major with stride
/// `ldc`. Sums run over k in order, in blocks of 768, whatever m and n are: results do not depend on the split.
///
/// # Safety
/// All elements given by the sizes and strides lie inside live allocations; no other thread uses C meanwhile.
#[allow(clippy::too_many_arguments)]
pub unsafe fn gemm(isa: Isa, m: usize, n: usize, k: usize, a: Mat, b: Mat, c: *mut f32, ldc: usize, into: Into) {
    debug_assert_eq!(b.cols, 1);
    if k == 0 && into == Into::Fresh {
        for i in 0..m {
            // SAFETY: the caller guarantees C's rows.
            unsafe { c.add(i * ldc).write_bytes(0, n) };
        }
    }
    for k0 in (0..k).step_by(KC) {
        let depth = KC.min(k - k0);
        let add = into == Into::Add || k0 > 0;
        for j in (0..n).step_by(NR) {
            for i in (0..m).step_by(MR) {
                // SAFETY: (i, j, k0) lie inside the sizes that the caller guarantees.
                unsafe {
                    let t = Tile {
                        a: a.from(i, k0),
                        b: b.from(k0, j).ptr,
                        b_rows: b.rows,
                        k: depth,
                        c: c.add(i * ldc + j),
                        ldc,
                        n: NR.min(n - j),
                        add,
                    };
                    t.run(isa, MR.min(m - i));
                }
            }
        }
    }
}

/// The operands of one register tile.
#[derive(Clone, Copy)]
struct Tile {
    a: Mat,
    b: *const f32,
    b_rows: usize,
    k: usize,
    c: *mut f32,
    ldc: usize,
    n: usize,
    add: bool,
}

impl Tile {
    /// # Safety
    /// As for [`gemm`].
    #[inline(always)]
    unsafe fn run(self, isa: Isa, m: usize) {
        macro_rules! by_rows {
            ($f:ident: $($m:literal)*) => { match m { $($m => self.$f::<$m>(),)* _ => unreachable!("a tile has 1 to 12 rows") } };
        }
        // SAFETY: the caller guarantees the memory, Isa::detect the instructions.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 if self.n > 16 => by_rows!(avx512_wide: 1 2 3 4 5 6 7 8 9 10 11 12),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => by_rows!(avx512_narrow: 1 2 3 4 5 6 7 8 9 10 11 12),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.avx2(m),
                _ => self.plain(m),
            }
        }
    }

    /// # Safety
    /// As for [`gemm`]; the machine has AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_wide<const M: usize>(self) {
        use std::arch::x86_64::*;
        // SAFETY: columns past n are masked out of every access.
        unsafe {
            let tail: __mmask16 = if self.n == NR { !0 } else { (1u32 << (self.n - 16)).wrapping_sub(1) as u16 };
            let mut acc = [[_mm512_setzero_ps(); 2]; M];
            if self.add {
                for (i, row) in acc.iter_mut().enumerate() {
                    row[0] = _mm512_loadu_ps(self.c.add(i * self.ldc));
                    row[1] = _mm512_maskz_loadu_ps(tail, self.c.add(i * self.ldc + 16));
                }
            }
            let (mut a, mut b) = (self.a.ptr, self.b);
            let (ars, aks) = (self.a.rows, self.a.cols);
            for _ in 0..self.k {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_maskz_loadu_ps(tail, b.add(16)));
                for (i, row) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(i * ars));
                    row[0] = _mm512_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm512_fmadd_ps(x, b1, row[1]);
                }
                // Past the last term the addresses are computed but never read.
                a = a.wrapping_add(aks);
                b = b.wrapping_add(self.b_rows);
            }
            for (i, row) in acc.iter().enumerate() {
                _mm512_storeu_ps(self.c.add(i * self.ldc), row[0]);
                _mm512_mask_storeu_ps(self.c.add(i * self.ldc + 16), tail, row[1]);
            }
        }
    }

    /// # Safety
    /// As for [`gemm`]; the machine has AVX-512 F; n is at most 16.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_narrow<const M: usize>(self) {
        use std::arch::x86_64::*;
        // SAFETY: columns past n are masked out of every access.
        unsafe {
            let tail: __mmask16 = (1u32 << self.n).wrapping_sub(1) as u16;
            let mut acc = [_mm512_setzero_ps(); M];
            if self.add {
                for (i, row) in acc.iter_mut().enumerate() {
                    *row = _mm512_maskz_loadu_ps(tail, self.c.add(i * self.ldc));
                }
            }
            let (mut a, mut b) = (self.a.ptr, self.b);
            for _ in 0..self.k {
                let b0 = _mm512_maskz_loadu_ps(tail, b);
                for (i, row) in acc.iter_mut().enumerate() {
                    *row = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(i * self.a.rows)), b0, *row);
                }
                a = a.wrapping_add(self.a.cols);
                b = b.wrapping_add(self.b_rows);
            }
            for (i, row) in acc.iter().enumerate() {
                _mm512_mask_storeu_ps(self.c.add(i * self.ldc), tail, *row);
            }
        }
    }

    /// Sub-tiles of 6 x 16: twelve sums, two columns and one row value fill the sixteen 256-bit registers.
    ///
    /// # Safety
    /// As for [`gemm`]; the machine has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(self, m: usize) {
        macro_rules! by_rows {
            ($f:ident $arguments:tt $rows:expr; $($m:literal)*) => {
                match $rows { $($m => self.$f::<$m> $arguments,)* _ => unreachable!("a sub-tile has 1 to 6 rows") }
            };
        }
        for j in (0..self.n).step_by(16) {
            let n = 16.min(self.n - j);
            for i in (0..m).step_by(6) {
                // SAFETY: rows i..i + 6 end at m, columns j..j + n at self.n.
                unsafe {
                    if n == 16 {
                        by_rows!(avx2_wide (i, j) 6.min(m - i); 1 2 3 4 5 6);
                    } else {
                        by_rows!(avx2_edge (i, j, n) 6.min(m - i); 1 2 3 4 5 6);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As for [`gemm`]; the machine has AVX2 and FMA; rows i..i + M and columns j..j + 16 are the tile's.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_wide<const M: usize>(self, i: usize, j: usize) {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let c = self.c.add(i * self.ldc + j);
            let mut acc = [[_mm256_setzero_ps(); 2]; M];
            if self.add {
                for (r, row) in acc.iter_mut().enumerate() {
                    row[0] = _mm256_loadu_ps(c.add(r * self.ldc));
                    row[1] = _mm256_loadu_ps(c.add(r * self.ldc + 8));
                }
            }
            let (mut a, mut b) = (self.a.ptr.add(i * self.a.rows), self.b.add(j));
            let (ars, aks) = (self.a.rows, self.a.cols);
            for _ in 0..self.k {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (r, row) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(r * ars));
                    row[0] = _mm256_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm256_fmadd_ps(x, b1, row[1]);
                }
                // Past the last term the addresses are computed but never read.
                a = a.wrapping_add(aks);
                b = b.wrapping_add(self.b_rows);
            }
            for (r, row) in acc.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * self.ldc), row[0]);
                _mm256_storeu_ps(c.add(r * self.ldc + 8), row[1]);
            }
        }
    }

    /// As `avx2_wide` for n < 16 columns; those past them are masked out of every access.
    ///
    /// # Safety
    /// As for [`gemm`]; the machine has AVX2 and FMA; rows i..i + M and columns j..j + n are the tile's.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_edge<const M: usize>(self, i: usize, j: usize, n: usize) {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller; a masked lane is neither read nor written.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let live = |n: usize| _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lanes);
            let (low, high) = (live(n.min(8)), live(n.saturating_sub(8)));
            let c = self.c.add(i * self.ldc + j);
            let mut acc = [[_mm256_setzero_ps(); 2]; M];
            if self.add {
                for (r, row) in acc.iter_mut().enumerate() {
                    row[0] = _mm256_maskload_ps(c.add(r * self.ldc), low);
                    row[1] = _mm256_maskload_ps(c.add(r * self.ldc).wrapping_add(8), high);
                }
            }
            let (mut a, mut b) = (self.a.ptr.add(i * self.a.rows), self.b.add(j));
            for _ in 0..self.k {
                let (b0, b1) = (_mm256_maskload_ps(b, low), _mm256_maskload_ps(b.wrapping_add(8), high));
                for (r, row) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(r * self.a.rows));
                    row[0] = _mm256_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm256_fmadd_ps(x, b1, row[1]);
                }
                a = a.wrapping_add(self.a.cols);
                b = b.wrapping_add(self.b_rows);
            }
            for (r, row) in acc.iter().enumerate() {
                _mm256_maskstore_ps(c.add(r * self.ldc), low, row[0]);
                _mm256_maskstore_ps(c.add(r * self.ldc).wrapping_add(8), high, row[1]);
            }
        }
    }

    /// Plain loops over 4 x 16 sub-tiles.
    ///
    /// # Safety
    /// As for [`gemm`].
    #[inline(always)]
    unsafe fn plain(self, m: usize) {
        for j in (0..self.n).step_by(16) {
            let n = 16.min(self.n - j);
            for i in (0..m).step_by(4) {
                let rows = 4.min(m - i);
                // SAFETY: i + rows <= m and j + n <= self.n.
                unsafe {
                    let mut acc = [[0f32; 16]; 4];
                    if self.add {
                        for (r, row) in acc.iter_mut().enumerate().take(rows) {
                            std::ptr::copy_nonoverlapping(self.c.add((i + r) * self.ldc + j), row.as_mut_ptr(), n);
                        }
                    }
                    for k in 0..self.k {
                        let mut b = [0f32; 16];
                        std::ptr::copy_nonoverlapping(self.b.add(k * self.b_rows + j), b.as_mut_ptr(), n);
                        for (r, row) in acc.iter_mut().enumerate() {
                            // Rows past the last repeat row 0; their sums are discarded.
                            let row_of_a = if r < rows { i + r } else { 0 };
                            let x = *self.a.ptr.add(row_of_a * self.a.rows + k * self.a.cols);
                            for (o, &v) in row.iter_mut().zip(&b) {
                                *o += x * v;
                            }
                        }
                    }
                    for (r, row) in acc.iter().enumerate().take(rows) {
                        std::ptr::copy_nonoverlapping(row.as_ptr(), self.c.add((i + r) * self.ldc + j), n);
                    }
                }
            }
        }
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

    #[test]
    fn every_instruction_set_equals_the_plain_sum_at_every_edge() {
        for isa in Isa::available() {
            for (m, n, k) in [(1, 1, 1), (12, 32, 7), (13, 33, 40), (5, 16, 3), (25, 17, 800), (11, 31, 2), (24, 64, 1)]
            {
                let (a, b, c0) = (random(m * k, 1), random(k * (n + 3), 2), random(m * (n + 1), 3));
                for (into, a_t) in [(Into::Fresh, false), (Into::Add, false), (Into::Add, true)] {
                    let at = |i: usize, p: usize| if a_t { a[p * m + i] } else { a[i * k + p] };
                    let mat = if a_t { Mat::rows(&a, m).t() } else { Mat::rows(&a, k) };
                    let mut c = c0.clone();
                    // SAFETY: the slices hold the sizes given.
                    unsafe { gemm(isa, m, n, k, mat, Mat::rows(&b, n + 3), c.as_mut_ptr(), n + 1, into) };
                    for i in 0..m {
                        for j in 0..=n {
                            let old = f64::from(c0[i * (n + 1) + j]);
                            let sum: f64 =
                                (0..k).map(|p| f64::from(at(i, p)) * f64::from(b[p * (n + 3) + j % n])).sum();
                            let want = match (j == n, into) {
                                (true, _) => old, // the column past the last is unchanged
                                (_, Into::Add) => old + sum,
                                (_, Into::Fresh) => sum,
                            };
                            let got = f64::from(c[i * (n + 1) + j]);
                            // k <= 800 products of size 1/4: rounding stays far below 1e-4.
                            assert!((got - want).abs() < 1e-4, "{isa:?} {m}x{n}x{k} at {i},{j}: {got} {want}");
                        }
                    }
                }
            }
        }
    }
}
