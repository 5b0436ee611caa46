//! Rotary position embedding on the CPU, row by row. Read `mod.rs` beside it for the formula.

use candle_core::{Result, Tensor};

use super::{Direction, RopeTable};
use crate::ops::cpu::{Out, parallel, tensor, vectorised, view};

/// x (N, W), rotated.
pub fn rotate(x: &Tensor, positions: &[u32], table: &RopeTable, direction: Direction) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let xs = view(x)?;
    let mut y = vec![0f32; n * width];
    let out = Out::of(&mut y);
    parallel(n, 4 * n * width, |r| {
        for i in r {
            let (cos, sin) = table.cos_sin(positions[i] as usize);
            // SAFETY: row i of the output belongs to this part of the work.
            let y = unsafe { out.slice(i * width, width) };
            rotate_row(&xs[i * width..(i + 1) * width], table.head, cos, sin, direction, y);
        }
    });
    tensor(y, (n, width))
}

vectorised! {
    /// Rotates one row, head by head.
    fn rotate_row(x: &[f32], head: usize, cos: &[f32], sin: &[f32], direction: Direction, y: &mut [f32]) {
        let half = cos.len();
        let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
        for (x, y) in x.chunks_exact(head).zip(y.chunks_exact_mut(head)) {
            let ((x, x_rest), (y, y_rest)) = (x.split_at(2 * half), y.split_at_mut(2 * half));
            y_rest.copy_from_slice(x_rest);
            let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
            for j in 0..half {
                let (c, s) = (cos[j], sign * sin[j]);
                y0[j] = x0[j] * c - x1[j] * s;
                y1[j] = x1[j] * c + x0[j] * s;
            }
        }
    }
}
