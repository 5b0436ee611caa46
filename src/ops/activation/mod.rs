//! The activation between an MLP's matrices: m = act(gate) * up (GLU, arXiv:2002.05202), or m = act(up).
//! Formula, checks, dispatch. Saved for backward: the inputs. It does not depend on weights or other operations.
//! Read `cpu.rs` beside it, then `attention/mod.rs`.

mod cpu;

use candle_core::{Result, Tensor};

/// The activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^-x).
    Silu,
    /// x Phi(x), Phi being the standard normal distribution function.
    Gelu,
    /// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hugging Face's gelu_new and gelu_pytorch_tanh.
    GeluTanh,
    /// max(x, 0).
    Relu,
}

impl Activation {
    /// m (N, F) = act(x) of x (N, F).
    ///
    /// # Errors
    /// If x is not an f32 matrix.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        cpu::forward(self, x)
    }

    /// dL/dx (N, F) of dL/dm (N, F).
    ///
    /// # Errors
    /// If shapes differ.
    pub fn backward(self, x: &Tensor, dm: &Tensor) -> Result<Tensor> {
        let (n, f) = x.dims2()?;
        if dm.dims() != [n, f] {
            candle_core::bail!("activation: x {:?}, dm {:?}", x.dims(), dm.dims());
        }
        cpu::backward(self, x, dm)
    }

    /// m (N, F) = act(gate) * up, of gate and up, (N, F) each.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn gated_forward(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let (n, f) = gate.dims2()?;
        if up.dims() != [n, f] {
            candle_core::bail!("gate {:?} and up {:?}", gate.dims(), up.dims());
        }
        cpu::gated_forward(self, gate, up)
    }

    /// (dL/dgate, dL/dup), (N, F) each: dup = dm act(g); dgate = dm u act'(g).
    ///
    /// # Errors
    /// If shapes differ.
    pub fn gated_backward(self, gate: &Tensor, up: &Tensor, dm: &Tensor) -> Result<(Tensor, Tensor)> {
        let (n, f) = gate.dims2()?;
        if up.dims() != [n, f] || dm.dims() != [n, f] {
            candle_core::bail!("gate {:?}, up {:?}, dm {:?}", gate.dims(), up.dims(), dm.dims());
        }
        cpu::gated_backward(self, gate, up, dm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::tensor;

    #[test]
    fn nan_stays_nan_and_infinity_stays_infinite_in_every_activation() {
        for kind in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let row = |x: f32| tensor(vec![0.5, x, -0.5, 2.0], (1, 4)).unwrap();
            let numbers = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (up, nan) = (row(1.0), row(f32::NAN));
            for m in [kind.forward(&nan).unwrap(), kind.gated_forward(&nan, &up).unwrap()] {
                let m = numbers(m);
                assert!(m[1].is_nan() && m.iter().filter(|v| v.is_nan()).count() == 1, "{kind:?}: {m:?}");
            }
            assert_eq!(numbers(kind.forward(&row(f32::INFINITY)).unwrap())[1], f32::INFINITY, "{kind:?}");
        }
    }
}
