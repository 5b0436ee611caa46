//! The norms of a decoder, row by row. RMSNorm: y = x / sqrt(mean(x^2) + eps) * w (arXiv:1910.07467). LayerNorm:
//! y = (x - mean(x)) / sqrt(var(x) + eps) * w + b (arXiv:1607.06450). A row whose squares are past f32 is NaN. Kept for
//! the backward: x. Knows no layer. Read rope.rs next.

use candle_core::{Result, Tensor};

use super::cpu::{Buffer, Out, dot_plain, lane_sum, parallel, tensor, view};

/// A norm's frozen numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// w (D).
    pub weight: Vec<f32>,
    /// Which norm.
    pub kind: NormKind,
    /// Added under the root.
    pub eps: f64,
}

/// Which norm.
#[derive(Clone, Debug, PartialEq)]
pub enum NormKind {
    /// No mean is taken off.
    Rms,
    /// The mean is taken off.
    Layer {
        /// b (D).
        bias: Vec<f32>,
    },
}

super::cpu::vectorised! {
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

super::cpu::vectorised! {
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

super::cpu::vectorised! {
    fn rms_backward_rows_past(x: &[f32], w: &[f32], eps: f32, dy: &[f32], skip: &[f32], dx: &mut [f32]) {
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

super::cpu::vectorised! {
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

super::cpu::vectorised! {
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

/// 1 / sqrt(mean(x^2) + eps); NaN where the mean is no finite number. 1 / sqrt(inf) is 0, which would make a row that has
/// grown past f32 a row of zeros: a number again, and the wrong one. torch gives NaN at an infinite x and zeros for the rest.
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

impl Norm {
    /// Without bias and mean.
    pub fn rms(weight: Vec<f32>, eps: f64) -> Self {
        Self { weight, kind: NormKind::Rms, eps }
    }

    /// Numbers a row, D.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    /// y of x (N, W), same shape: every run of D numbers is a row of its own, so that W = heads x D norms each head.
    ///
    /// # Errors
    /// If W is not a multiple of D.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (n, width) = self.check(x)?;
        let xs = view(x)?;
        let (w, eps) = (&self.weight[..], self.eps as f32);
        let mut y = Buffer::new(n * width);
        let out = y.out();
        parallel(n, 4 * n * width, |r| {
            // SAFETY: rows r of the output belong to this part of the work, and are all written.
            let y = unsafe { out.slice(r.start * width, r.len() * width) };
            let x = &xs[r.start * width..r.end * width];
            match &self.kind {
                NormKind::Rms => rms_rows(x, w, eps, y),
                NormKind::Layer { bias } => layer_rows(x, w, bias, eps, y),
            }
        });
        // SAFETY: all rows are written.
        tensor(unsafe { y.finish() }, (n, width))
    }

    /// dL/dx (N, W), plus `skip` (N, W) where there is one: what the residual path past the norm brings.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, x: &Tensor, dy: &Tensor, skip: Option<&Tensor>) -> Result<Tensor> {
        let (n, width) = self.check(x)?;
        let fits = |t: &Tensor| t.dims() == [n, width];
        if !fits(dy) || !skip.is_none_or(fits) {
            candle_core::bail!("norm backward: x {:?}, dy {:?}, skip {skip:?}", x.dims(), dy.dims());
        }
        let (xs, dys, skips) = (view(x)?, view(dy)?, skip.map(view).transpose()?);
        let (w, eps) = (&self.weight[..], self.eps as f32);
        let mut dx = vec![0f32; n * width];
        let out = Out::of(&mut dx);
        parallel(n, 8 * n * width, |r| {
            let part = r.start * width..r.end * width;
            // SAFETY: rows r of the output belong to this part of the work.
            let dx = unsafe { out.slice(part.start, part.len()) };
            let (x, dy, skip) = (&xs[part.clone()], &dys[part.clone()], skips.as_ref().map(|s| &s[part.clone()]));
            match (&self.kind, skip) {
                (NormKind::Rms, Some(skip)) => return rms_backward_rows_past(x, w, eps, dy, skip, dx),
                (NormKind::Rms, None) => return rms_backward_rows(x, w, eps, dy, dx),
                (NormKind::Layer { .. }, _) => layer_backward_rows(x, w, eps, dy, dx),
            }
            for (dx, skip) in dx.iter_mut().zip(skip.into_iter().flatten()) {
                *dx += skip;
            }
        });
        tensor(dx, (n, width))
    }

    fn check(&self, x: &Tensor) -> Result<(usize, usize)> {
        let (n, width) = x.dims2()?;
        let bias = match &self.kind {
            NormKind::Rms => self.width(),
            NormKind::Layer { bias } => bias.len(),
        };
        if self.width() == 0 || width % self.width() != 0 || bias != self.width() {
            candle_core::bail!("a norm of width {} meets an input of width {width}", self.width());
        }
        Ok((n, width))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn norms(d: usize) -> [Norm; 2] {
        let weight: Vec<f32> = (0..d).map(|i| 0.5 + i as f32).collect();
        let layer = NormKind::Layer { bias: vec![1.0; d] };
        [Norm::rms(weight.clone(), 1e-6), Norm { weight, kind: layer, eps: 1e-6 }]
    }

    fn numbers(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Of three rows the middle one is past f32: an infinite number, NaN, or finite ones whose squares are infinite.
    #[test]
    fn a_row_past_f32_is_nan_forward_and_backward_and_the_others_are_untouched() {
        const D: usize = 20;
        for (norm, bad) in norms(D)
            .into_iter()
            .flat_map(|n| [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e20, -3e38].map(|bad| (n.clone(), bad)))
        {
            let good: Vec<f32> = (0..3 * D).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut spoilt = good.clone();
            spoilt[D + 3] = bad;
            let (good, spoilt) = (tensor(good, (3, D)).unwrap(), tensor(spoilt, (3, D)).unwrap());
            let dy = tensor((0..3 * D).map(|i| (i as f32 * 0.3).cos()).collect(), (3, D)).unwrap();
            let skip = tensor(vec![0.5; 3 * D], (3, D)).unwrap();
            let results = |x: &Tensor| {
                let backward = |skip| numbers(&norm.backward(x, &dy, skip).unwrap());
                [numbers(&norm.forward(x).unwrap()), backward(None), backward(Some(&skip))]
            };
            for (want, got) in results(&good).into_iter().zip(results(&spoilt)) {
                assert!(got[D..2 * D].iter().all(|v| v.is_nan()), "{:?} of {bad}: {got:?}", norm.kind);
                assert_eq!((&got[..D], &got[2 * D..]), (&want[..D], &want[2 * D..]));
            }
        }
    }

    #[test]
    fn rows_as_large_as_their_squares_allow_are_normed() {
        for norm in norms(4) {
            let x = |scale: f32| tensor([1.0, -2.0, 3.0, 0.5].map(|v: f32| v * scale).to_vec(), (1, 4)).unwrap();
            let (small, large) = (numbers(&norm.forward(&x(1e3)).unwrap()), numbers(&norm.forward(&x(4e18)).unwrap()));
            assert!(small.iter().zip(&large).all(|(s, l)| (s - l).abs() < 1e-5 * s.abs()), "{small:?} {large:?}");
        }
    }
}
