//! The emulated machine's matrix products: operands become panels of f32, sums are f32 in the order of k, and the result
//! is rounded once to the type of y. Knows no kernel. Read pool.rs for how the work is shared.

use half::{bf16, f16};

use super::pool;
use crate::device::machine::{Element, Place, Product};

/// Rows and columns that one call of the inner loop computes, and the rows of y that one thread takes at a time.
const TILE: (usize, usize) = (4, 16);
const STRIP: usize = 32;

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
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has both.
        return unsafe { products_avx2(x, w, k, width, y) };
    }
    tiles(x, w, k, width, y, |a, b, c| a * b + c);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn products_avx2(x: &[f32], w: &[f32], k: usize, width: usize, y: &mut [f32]) {
    tiles(x, w, k, width, y, f32::mul_add);
}

#[inline(always)]
fn tiles(x: &[f32], w: &[f32], k: usize, width: usize, y: &mut [f32], add: impl Fn(f32, f32, f32) -> f32) {
    let (rows, cols) = TILE;
    for (x, y) in x.chunks_exact(rows * k).zip(y.chunks_exact_mut(rows * width)) {
        for (tile, w) in w.chunks_exact(k * cols).enumerate() {
            let mut sums = [[0f32; TILE.1]; TILE.0];
            for (t, w) in w.chunks_exact(cols).enumerate() {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let v = x[i * k + t];
                    for (sum, &w) in sums.iter_mut().zip(w) {
                        *sum = add(v, w, *sum);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                let at = i * width + tile * cols;
                y[at..at + cols].copy_from_slice(sums);
            }
        }
    }
}

/// Numbers that begin `at` numbers after the matrix.
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
