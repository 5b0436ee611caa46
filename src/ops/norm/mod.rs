//! RMSNorm and LayerNorm: formula, checks, dispatch. RMSNorm: y = x / sqrt(mean(x^2) + eps) * w (arXiv:1910.07467).
//! LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b (arXiv:1607.06450). Each row is normed by itself; a row
//! whose squares overflow f32 becomes NaN. Saved for backward: x. It does not depend on weights or other operations.
//! Read `cpu.rs` beside it, then `rope/mod.rs`.

mod cpu;
pub mod gpu;

use anyhow::{Result, bail};

use crate::device::{Array, Element, Resident};
use gpu::DeviceNorm;

/// The frozen parameters of a norm.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// w (D).
    pub weight: Vec<f32>,
    /// RMSNorm or LayerNorm.
    pub kind: NormKind,
    /// Added under the root.
    pub eps: f64,
    copy: Resident<DeviceNorm>,
}

/// The kind of a norm.
#[derive(Clone, Debug, PartialEq)]
pub enum NormKind {
    /// RMSNorm: the mean is not subtracted.
    Rms,
    /// LayerNorm: the mean is subtracted.
    Layer {
        /// b (D).
        bias: Vec<f32>,
    },
}

impl Norm {
    /// A norm of w, with LayerNorm's bias in `kind`.
    pub fn new(weight: Vec<f32>, kind: NormKind, eps: f64) -> Self {
        Self { weight, kind, eps, copy: Resident::default() }
    }

    /// The parameters on the device that holds `matrix`.
    fn on(&self, device: &crate::device::Device) -> Result<std::sync::Arc<DeviceNorm>> {
        self.copy.on(device, || DeviceNorm::new(device, self))
    }

    /// An RMSNorm.
    pub fn rms(weight: Vec<f32>, eps: f64) -> Self {
        Self::new(weight, NormKind::Rms, eps)
    }

    /// D, the number of elements that are normed together.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    /// y of x (N, W), same shape: each D consecutive elements are normed by themselves, so that W = heads x D norms
    /// each head.
    ///
    /// # Errors
    /// If W is not a multiple of D.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        self.forward_to(x, x.element())
    }

    /// As [`Norm::forward`], for products whose operands on a device are of `operand`: an f32 x gives y in that type. On the
    /// host y is f32.
    ///
    /// # Errors
    /// As for [`Norm::forward`].
    pub fn forward_to(&self, x: &Array, operand: Element) -> Result<Array> {
        self.check(x)?;
        Ok(match x {
            Array::Host(x) => cpu::forward(self, x)?.into(),
            Array::Device(x) => {
                let to = if x.element() == Element::F32 { operand } else { x.element() };
                self.on(x.device())?.forward(x, to)?.into()
            }
        })
    }

    /// dL/dx (N, W) of dL/dy (N, W), plus `skip` (N, W) if given: the gradient of the residual path that bypasses the
    /// norm.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn backward(&self, x: &Array, dy: &Array, skip: Option<&Array>) -> Result<Array> {
        let shape = self.check(x)?;
        for gradient in [Some(dy), skip].into_iter().flatten() {
            if gradient.dims2()? != shape {
                bail!("norm backward: x {shape:?}, a gradient {:?}", gradient.dims2()?);
            }
        }
        Ok(match x {
            Array::Host(x) => cpu::backward(self, x, dy.host()?, skip.map(Array::host).transpose()?)?.into(),
            Array::Device(x) => {
                let skip = skip.map(Array::device).transpose()?;
                self.on(x.device())?.backward(x, dy.device()?, skip)?.into()
            }
        })
    }

    fn check(&self, x: &Array) -> Result<(usize, usize)> {
        let (n, width) = x.dims2()?;
        let bias = match &self.kind {
            NormKind::Rms => self.width(),
            NormKind::Layer { bias } => bias.len(),
        };
        if self.width() == 0 || width % self.width() != 0 || bias != self.width() {
            bail!("a norm of width {} for an input of width {width}", self.width());
        }
        Ok((n, width))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu;

    fn tensor(values: Vec<f32>, shape: (usize, usize)) -> candle_core::Result<Array> {
        cpu::tensor(values, shape).map(Array::Host)
    }

    fn norms(d: usize) -> [Norm; 2] {
        let weight: Vec<f32> = (0..d).map(|i| 0.5 + i as f32).collect();
        let layer = NormKind::Layer { bias: vec![1.0; d] };
        [Norm::rms(weight.clone(), 1e-6), Norm::new(weight, layer, 1e-6)]
    }

    fn numbers(t: &Array) -> Vec<f32> {
        t.host().unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The middle one of three rows holds an infinite number, NaN, or a finite number whose square is infinite.
    #[test]
    fn a_row_that_overflows_f32_is_nan_in_both_directions_and_other_rows_are_unaffected() {
        const D: usize = 20;
        for (norm, bad) in norms(D)
            .into_iter()
            .flat_map(|n| [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e20, -3e38].map(|bad| (n.clone(), bad)))
        {
            let good: Vec<f32> = (0..3 * D).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut broken = good.clone();
            broken[D + 3] = bad;
            let (good, broken) = (tensor(good, (3, D)).unwrap(), tensor(broken, (3, D)).unwrap());
            let dy = tensor((0..3 * D).map(|i| (i as f32 * 0.3).cos()).collect(), (3, D)).unwrap();
            let skip = tensor(vec![0.5; 3 * D], (3, D)).unwrap();
            let results = |x: &Array| {
                let backward = |skip| numbers(&norm.backward(x, &dy, skip).unwrap());
                [numbers(&norm.forward(x).unwrap()), backward(None), backward(Some(&skip))]
            };
            for (want, got) in results(&good).into_iter().zip(results(&broken)) {
                assert!(got[D..2 * D].iter().all(|v| v.is_nan()), "{:?} of {bad}: {got:?}", norm.kind);
                assert_eq!((&got[..D], &got[2 * D..]), (&want[..D], &want[2 * D..]));
            }
        }
    }

    #[test]
    fn rows_whose_squares_just_fit_f32_are_normed_correctly() {
        for norm in norms(4) {
            let x = |scale: f32| tensor([1.0, -2.0, 3.0, 0.5].map(|v: f32| v * scale).to_vec(), (1, 4)).unwrap();
            let (small, large) = (numbers(&norm.forward(&x(1e3)).unwrap()), numbers(&norm.forward(&x(4e18)).unwrap()));
            assert!(small.iter().zip(&large).all(|(s, l)| (s - l).abs() < 1e-5 * s.abs()), "{small:?} {large:?}");
        }
    }
}
