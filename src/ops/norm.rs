//! RMSNorm: y = x / sqrt(mean(x^2) + eps) * w, row by row. Kept for the backward: x. Source: arXiv:1910.07467.
//! Knows no layer. Read rope.rs next.

use candle_core::{Result, Tensor};

use super::cpu::{Buffer, Out, dot_plain, parallel, tensor, view};

super::cpu::vectorised! {
    fn forward_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let d = w.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let inv = inverse_rms(x, eps);
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * inv * w;
            }
        }
    }
}

super::cpu::vectorised! {
    fn backward_rows(x: &[f32], w: &[f32], eps: f32, dy: &[f32], skip: &[f32], dx: &mut [f32]) {
        let d = w.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(skip.chunks_exact(d)).zip(dx.chunks_exact_mut(d));
        for (((x, dy), skip), dx) in rows {
            let inv = inverse_rms(x, eps);
            for ((dx, &g), &w) in dx.iter_mut().zip(dy).zip(w) {
                *dx = g * w;
            }
            let c = dot_plain(x, dx) * inv * inv * inv / d as f32;
            for ((dx, &x), &skip) in dx.iter_mut().zip(x).zip(skip) {
                *dx = skip + *dx * inv - x * c;
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot_plain(x, x) / x.len() as f32 + eps).sqrt()
}

/// y (N, D) of x (N, D) and weight (D).
///
/// # Errors
/// If shapes do not fit.
pub fn forward(x: &Tensor, weight: &[f32], eps: f64) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    if weight.len() != d {
        candle_core::bail!("a norm of width {} meets an input of width {d}", weight.len());
    }
    let xs = view(x)?;
    let mut y = Buffer::new(n * d);
    let out = y.out();
    parallel(n, 4 * n * d, |r| {
        // SAFETY: rows r of the output belong to this part of the work, and are all written.
        let y = unsafe { out.slice(r.start * d, r.len() * d) };
        forward_rows(&xs[r.start * d..r.end * d], weight, eps as f32, y);
    });
    // SAFETY: all rows are written.
    tensor(unsafe { y.finish() }, (n, d))
}

/// dL/dx (N, D) = skip + the norm's own gradient: `skip` (N, D) is what the residual path past the norm brings.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(x: &Tensor, weight: &[f32], eps: f64, dy: &Tensor, skip: &Tensor) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    if weight.len() != d || dy.dims() != [n, d] || skip.dims() != [n, d] {
        candle_core::bail!("norm backward: x {:?}, dy {:?}, skip {:?}", x.dims(), dy.dims(), skip.dims());
    }
    let (xs, dys, skips) = (view(x)?, view(dy)?, view(skip)?);
    let mut dx = vec![0f32; n * d];
    let out = Out::of(&mut dx);
    parallel(n, 8 * n * d, |r| {
        let part = r.start * d..r.end * d;
        // SAFETY: rows r of the output belong to this part of the work.
        let dx = unsafe { out.slice(part.start, part.len()) };
        backward_rows(&xs[part.clone()], weight, eps as f32, &dys[part.clone()], &skips[part], dx);
    });
    tensor(dx, (n, d))
}
