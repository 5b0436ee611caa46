//! Packing: rows or columns of a stored matrix, dequantised into the panels that `gemm.rs` and `bf16/mod.rs` multiply by,
//! so that these do not depend on how a matrix is stored. It does not depend on any operation. Read `linear/cpu.rs` in
//! `ops` for the use.

use std::ops::Range;

use crate::ops::cpu::bf16;
use crate::ops::cpu::gemm::NR;
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::transpose::transpose;
use crate::ops::storage::dtype::StorageDType;
use crate::ops::weight::Weight;

/// Rows `rows` of a (n, k) matrix as the columns of a panel: `panel[j * NR + i]` = W(rows.start + i, j), for at most NR
/// rows. The panel has k * NR elements; columns past the last row are zero.
pub fn rows_as_columns(weight: &Weight, rows: Range<usize>, panel: &mut [f32]) {
    let k = weight.cols();
    with_scratch(16 * k, |scratch| {
        for (g, start) in (rows.start..rows.end).step_by(16).enumerate() {
            let count = 16.min(rows.end - start);
            if count == 16
                && let Some(values) = weight.rows_f32(start..start + 16)
            {
                transpose(values, k, k, &mut panel[g * 16..], NR);
                continue;
            }
            for (i, row) in scratch.chunks_exact_mut(k).enumerate() {
                if i < count { weight.row(start + i, row) } else { row.fill(0.0) }
            }
            transpose(scratch, k, k, &mut panel[g * 16..], NR);
        }
    });
    for g in rows.len().div_ceil(16)..NR / 16 {
        for row in panel.chunks_exact_mut(NR) {
            row[g * 16..(g + 1) * 16].fill(0.0);
        }
    }
}

/// Columns `cols` of all rows: `panel[i * width + j]` = W(i, cols.start + j). `cols` starts and ends at block
/// boundaries.
pub fn columns(weight: &Weight, cols: Range<usize>, panel: &mut [f32]) {
    let width = cols.len();
    for (i, row) in panel.chunks_exact_mut(width).take(weight.rows()).enumerate() {
        weight.row_part(i, cols.clone(), row);
    }
}

/// Row `row` rounded to pairs of bfloat16; words past the last element are zero.
pub fn row_words(weight: &Weight, row: usize, out: &mut [u32]) {
    match weight.dtype() {
        StorageDType::Q8_0 => bf16::round_q8_0(weight.row_bytes(row), out),
        StorageDType::BF16 => bf16::copy(weight.row_bytes(row), out),
        _ => match weight.rows_f32(row..row + 1) {
            Some(values) => bf16::round(values, out),
            None => with_scratch(weight.cols(), |values| {
                weight.row(row, values);
                bf16::round(values, out);
            }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_the_matrix_in_the_documented_order() {
        for (n, k) in [(32, 48), (20, 37), (7, 16), (33, 5)] {
            let values: Vec<f32> = (0..n * k).map(|i| i as f32).collect();
            let w = Weight::from_f32(&values, n, k).unwrap();
            let rows = n.saturating_sub(25)..n.min(32);
            let mut panel = vec![-1f32; k * NR];
            rows_as_columns(&w, rows.clone(), &mut panel);
            for j in 0..k {
                for i in 0..NR {
                    let want = if i < rows.len() { values[(rows.start + i) * k + j] } else { 0.0 };
                    assert_eq!(panel[j * NR + i], want, "{n}x{k} at {i},{j}");
                }
            }
            let mut part = vec![0f32; n * 3];
            columns(&w, 1..4, &mut part);
            assert_eq!(part[(n - 1) * 3], values[(n - 1) * k + 1]);
        }
    }
}
