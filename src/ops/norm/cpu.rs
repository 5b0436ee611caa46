//! RMSNorm and LayerNorm on the CPU, row by row, forward and backward. Read `mod.rs` beside it for the formulas.

use candle_core::{Result, Tensor};

use super::{Norm, NormKind};
use crate::ops::cpu::{Buffer, Out, dot_plain, lane_sum, parallel, tensor, vectorised, view};

/// y of x (N, W).
pub fn forward(norm: &Norm, x: &Tensor) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let xs = view(x)?;
    let (w, eps) = (&norm.weight[..], norm.eps as f32);
    let mut y = Buffer::new(n * width);
    let out = y.out();
    parallel(n, 4 * n * width, |r| {
        // SAFETY: rows r of the output belong to this part of the work, and are all written.
        let y = unsafe { out.slice(r.start * width, r.len() * width) };
        let x = &xs[r.start * width..r.end * width];
        match &norm.kind {
            NormKind::Rms => rms_rows(x, w, eps, y),
            NormKind::Layer { bias } => layer_rows(x, w, bias, eps, y),
        }
    });
    // SAFETY: all rows are written.
    tensor(unsafe { y.finish() }, (n, width))
}

/// dL/dx (N, W) of dL/dy, plus `skip`.
pub fn backward(norm: &Norm, x: &Tensor, dy: &Tensor, skip: Option<&Tensor>) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let (xs, dys, skips) = (view(x)?, view(dy)?, skip.map(view).transpose()?);
    let (w, eps) = (&norm.weight[..], norm.eps as f32);
    let mut dx = vec![0f32; n * width];
    let out = Out::of(&mut dx);
    parallel(n, 8 * n * width, |r| {
        let part = r.start * width..r.end * width;
        // SAFETY: rows r of the output belong to this part of the work.
        let dx = unsafe { out.slice(part.start, part.len()) };
        let (x, dy, skip) = (&xs[part.clone()], &dys[part.clone()], skips.as_ref().map(|s| &s[part.clone()]));
        match (&norm.kind, skip) {
            (NormKind::Rms, Some(skip)) => return rms_backward_rows_with_skip(x, w, eps, dy, skip, dx),
            (NormKind::Rms, None) => return rms_backward_rows(x, w, eps, dy, dx),
            (NormKind::Layer { .. }, _) => layer_backward_rows(x, w, eps, dy, dx),
        }
        for (dx, skip) in dx.iter_mut().zip(skip.into_iter().flatten()) {
            *dx += skip;
        }
    });
    tensor(dx, (n, width))
}

vectorised! {
    fn rms_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let d = w.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let inv = inverse_rms(x, eps);
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * inv * w;
            }
        }
    }
}

vectorised! {
    fn rms_backward_rows(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let d = w.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d));
        for ((x, dy), dx) in rows {
            let inv = inverse_rms(x, eps);
            for ((dx, &g), &w) in dx.iter_mut().zip(dy).zip(w) {
                *dx = g * w;
            }
            let c = dot_plain(x, dx) * inv * inv * inv / d as f32;
            for (dx, &x) in dx.iter_mut().zip(x) {
                *dx = *dx * inv - x * c;
            }
        }
    }
}

vectorised! {
    fn rms_backward_rows_with_skip(x: &[f32], w: &[f32], eps: f32, dy: &[f32], skip: &[f32], dx: &mut [f32]) {
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

vectorised! {
    fn layer_rows(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) {
        let d = w.len();
        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
            let inv = centre(x, eps, y);
            for ((y, &w), &b) in y.iter_mut().zip(w).zip(b) {
                *y = *y * inv * w + b;
            }
        }
    }
}

vectorised! {
    /// With xhat = (x - mean) inv and g = dy w: dx = inv (g - mean(g) - xhat mean(g xhat)).
    fn layer_backward_rows(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let d = w.len();
        let mut centred = vec![0f32; d];
        for ((x, dy), dx) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
            let inv = centre(x, eps, &mut centred);
            for ((dx, &g), &w) in dx.iter_mut().zip(dy).zip(w) {
                *dx = g * w;
            }
            let mean = sum(dx) / d as f32;
            let c = dot_plain(&centred, dx) * inv * inv / d as f32;
            for (dx, &x) in dx.iter_mut().zip(&centred) {
                *dx = inv * (*dx - mean - x * c);
            }
        }
    }
}

/// 1 / sqrt(mean(x^2) + eps); NaN if the mean is NaN or infinite. 1 / sqrt(inf) would be 0 and turn a row that
/// overflowed f32 into plausible zeros. (torch gives NaN at an infinite x and zeros elsewhere.)
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mean = dot_plain(x, x) / x.len() as f32;
    if mean < f32::INFINITY { 1.0 / (mean + eps).sqrt() } else { f32::NAN }
}

/// Writes x - mean(x) and returns 1 / sqrt(var(x) + eps).
#[inline(always)]
fn centre(x: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    let mean = sum(x) / x.len() as f32;
    for (o, &x) in out.iter_mut().zip(x) {
        *o = x - mean;
    }
    inverse_rms(out, eps)
}

#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for (lane, v) in lanes.iter_mut().zip(block) {
            *lane += v;
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane += v;
    }
    lane_sum(&lanes)
}
