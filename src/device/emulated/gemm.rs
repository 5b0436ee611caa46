//! The emulated machine's matrix products: operands become panels of f32, sums are f32 in the order of k, and the
//! result is rounded once to the type of y. It does not depend on kernels. Read `pool.rs` beside it for
//! how the work is shared.

use half::{bf16, f16};

use super::pool;
use crate::device::machine::{Element, Place, Product};

/// Rows and columns that one call of the inner loop computes, and the rows of y that one thread takes at a time.
const TILE: (usize, usize) = (4, 16);
const STRIP: usize = 32;

/// All products of `p`.
///
/// # Safety
/// The matrices lie in memory that is alive and that nobody else writes.
pub(super) unsafe fn gemm(p: &Product) {
    let width = p.n.next_multiple_of(TILE.1);
    let alone = p.m * p.n * p.k < 1 << 16;
    let mut shared: Vec<f32> = vec![];
    for b in 0..p.batch {
        if b == 0 || p.w.next != 0 {
            // SAFETY: promised by the caller.
            unsafe { panel_of_w(p, b, width, &mut shared) };
        }
        let w = &shared;
        let strips = p.m.div_ceil(STRIP) as u64;
        pool::parallel(strips, alone, &|strip| {
            let first = strip as usize * STRIP;
            // SAFETY: strips are different rows of y.
            unsafe { strip_of_y(p, b, first..(first + STRIP).min(p.m), w, width) };
            true
        });
    }
}

/// w as tiles of 16 columns, each (k, 16), filled up with zeros.
///
/// # Safety
/// As for `gemm`.
unsafe fn panel_of_w(p: &Product, b: usize, width: usize, to: &mut Vec<f32>) {
    to.clear();
    to.resize(p.k * width, 0.0);
    let start = b * p.w.next;
    let (rows, cols) = if p.w_transposed { (p.n, p.k) } else { (p.k, p.n) };
    let mut line = vec![0f32; cols];
    for r in 0..rows {
        // SAFETY: `Device` has checked that the rows lie inside of the matrix.
        unsafe { read(&p.w, start + r * p.w.row, &mut line) };
        for (c, &v) in line.iter().enumerate() {
            let (t, j) = if p.w_transposed { (c, r) } else { (r, c) };
            to[(j / TILE.1) * p.k * TILE.1 + t * TILE.1 + j % TILE.1] = v;
        }
    }
}

/// Some rows of y.
///
/// # Safety
/// As for `gemm`.
unsafe fn strip_of_y(p: &Product, b: usize, rows: std::ops::Range<usize>, w: &[f32], width: usize) {
    // x as (rows, k), whole tiles of rows.
    let count = rows.len().next_multiple_of(TILE.0);
    let mut x = vec![0f32; count * p.k];
    let start = b * p.x.next;
    if p.x_transposed {
        let mut line = vec![0f32; rows.len()];
        for t in 0..p.k {
            // SAFETY: `Device` has checked that the numbers lie inside of the matrix.
            unsafe { read(&p.x, start + t * p.x.row + rows.start, &mut line) };
            line.iter().enumerate().for_each(|(i, &v)| x[i * p.k + t] = v);
        }
    } else {
        for (i, row) in rows.clone().enumerate() {
            // SAFETY: as above.
            unsafe { read(&p.x, start + row * p.x.row, &mut x[i * p.k..(i + 1) * p.k]) };
        }
    }
    let mut y = vec![0f32; count * width];
    products(&x, w, p.k, width, &mut y);
    let mut before = vec![0f32; p.n];
    for (i, row) in rows.enumerate() {
        let (line, at) = (&mut y[i * width..i * width + p.n], b * p.y.next + row * p.y.row);
        if p.beta != 0.0 {
            // SAFETY: as above.
            unsafe { read(&p.y, at, &mut before) };
        }
        for (v, &old) in line.iter_mut().zip(&before) {
            *v = p.alpha * *v + if p.beta == 0.0 { 0.0 } else { p.beta * old };
        }
        // SAFETY: as above, and no other strip has this row.
        unsafe { write(&p.y, at, line) };
    }
}

/// y (rows, width) = x (rows, k) w, in whole tiles.
fn products(x: &[f32], w: &[f32], k: usize, width: usize, y: &mut [f32]) {
    let tile = tile_function();
    for (x, y) in x.chunks_exact(TILE.0 * k).zip(y.chunks_exact_mut(TILE.0 * width)) {
        for (at, w) in w.chunks_exact(k * TILE.1).enumerate() {
            let sums = tile(x, w, k);
            for (sums, y) in sums.iter().zip(y.chunks_exact_mut(width)) {
                y[at * TILE.1..(at + 1) * TILE.1].copy_from_slice(sums);
            }
        }
    }
}

type Sums = [[f32; TILE.1]; TILE.0];

/// The fastest of what this processor can run: sums of x (4, k) times w (k, 16).
fn tile_function() -> fn(&[f32], &[f32], usize) -> Sums {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has both.
        return |x, w, k| unsafe { tile_avx2(x, w, k) };
    }
    tile_plain
}

fn tile_plain(x: &[f32], w: &[f32], k: usize) -> Sums {
    let mut all = [[0f32; TILE.1]; TILE.0];
    for (x, sums) in x.chunks_exact(k).zip(&mut all) {
        for (&v, w) in x.iter().zip(w.chunks_exact(TILE.1)) {
            sums.iter_mut().zip(w).for_each(|(sum, &w)| *sum += v * w);
        }
    }
    all
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn tile_avx2(x: &[f32], w: &[f32], k: usize) -> Sums {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps};
    let mut all = [[0f32; TILE.1]; TILE.0];
    let (x, w) = (&x[..TILE.0 * k], &w[..k * TILE.1]);
    // SAFETY: both slices have the lengths that are read, and each row of sums has sixteen numbers.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; TILE.0];
        for t in 0..k {
            let w = w.as_ptr().add(t * TILE.1);
            let (w0, w1) = (_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let v = _mm256_set1_ps(*x.as_ptr().add(i * k + t));
                *sums = [_mm256_fmadd_ps(v, w0, sums[0]), _mm256_fmadd_ps(v, w1, sums[1])];
            }
        }
        for (sums, all) in sums.iter().zip(&mut all) {
            _mm256_storeu_ps(all.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(all.as_mut_ptr().add(8), sums[1]);
        }
    }
    all
}

/// Numbers that begin `at` numbers after the matrix's start, as f32.
///
/// # Safety
/// As for `gemm`.
unsafe fn read(from: &Place, at: usize, to: &mut [f32]) {
    // SAFETY: promised by the caller.
    unsafe {
        match from.element {
            Element::F32 => {
                let from = std::slice::from_raw_parts((from.address as *const f32).add(at), to.len());
                to.copy_from_slice(from);
            }
            Element::Bf16 => {
                let from = std::slice::from_raw_parts((from.address as *const bf16).add(at), to.len());
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
            }
            Element::F16 => {
                let from = std::slice::from_raw_parts((from.address as *const f16).add(at), to.len());
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
            }
            // `Device` refuses products of these.
            Element::U8 | Element::U32 => to.fill(f32::NAN),
        }
    }
}

/// The same way back, rounded to the matrix's type.
///
/// # Safety
/// As for `gemm`.
unsafe fn write(to: &Place, at: usize, from: &[f32]) {
    // SAFETY: promised by the caller.
    unsafe {
        match to.element {
            Element::F32 => {
                std::slice::from_raw_parts_mut((to.address as *mut f32).add(at), from.len()).copy_from_slice(from);
            }
            Element::Bf16 => {
                let to = std::slice::from_raw_parts_mut((to.address as *mut bf16).add(at), from.len());
                to.iter_mut().zip(from).for_each(|(to, from)| *to = bf16::from_f32(*from));
            }
            Element::F16 => {
                let to = std::slice::from_raw_parts_mut((to.address as *mut f16).add(at), from.len());
                to.iter_mut().zip(from).for_each(|(to, from)| *to = f16::from_f32(*from));
            }
            Element::U8 | Element::U32 => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_tile_and_the_plain_one_agree() {
        for k in [1, 7, 64] {
            let numbers = |n: usize| (0..n).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect::<Vec<_>>();
            let (x, w) = (numbers(TILE.0 * k), numbers(TILE.1 * k));
            let (fast, plain) = (tile_function()(&x, &w, k), tile_plain(&x, &w, k));
            let off = fast.iter().flatten().zip(plain.iter().flatten()).map(|(a, b)| (a - b).abs());
            assert!(off.fold(0.0, f32::max) < 1e-5);
        }
    }
}
