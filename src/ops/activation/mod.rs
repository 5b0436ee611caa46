//! The activation between an MLP's matrices: m = act(gate) * up (GLU, arXiv:2002.05202), or m = act(up).
//! Formula, checks, dispatch. Saved for backward: the inputs. It does not depend on weights or other operations.
//! Read `cpu.rs` beside it, then `attention/mod.rs`.

mod cpu;
pub mod gpu;

use anyhow::{Result, bail};

use crate::device::Array;
use crate::ops::columns::gpu::cast;

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
    pub fn forward(self, x: &Array) -> Result<Array> {
        Ok(match x {
            Array::Host(x) => cpu::forward(self, x)?.into(),
            Array::Device(x) => gpu::forward(self, None, x)?.into(),
        })
    }

    /// dL/dx (N, F) of dL/dm (N, F).
    ///
    /// # Errors
    /// If shapes differ.
    pub fn backward(self, x: &Array, dm: &Array) -> Result<Array> {
        same_shape(&[x, dm])?;
        Ok(match x {
            Array::Host(x) => cpu::backward(self, x, dm.host()?)?.into(),
            Array::Device(x) => gpu::plain_backward(self, x, &cast(dm.device()?, x.element())?)?.into(),
        })
    }

    /// m (N, F) = act(gate) * up, of gate and up, (N, F) each.
    ///
    /// # Errors
    /// If shapes differ.
    pub fn gated_forward(self, gate: &Array, up: &Array) -> Result<Array> {
        same_shape(&[gate, up])?;
        Ok(match gate {
            Array::Host(gate) => cpu::gated_forward(self, gate, up.host()?)?.into(),
            Array::Device(gate) => gpu::forward(self, Some(gate), up.device()?)?.into(),
        })
    }

    /// (dL/dgate, dL/dup), (N, F) each: dup = dm act(g); dgate = dm u act'(g).
    ///
    /// # Errors
    /// If shapes differ.
    pub fn gated_backward(self, gate: &Array, up: &Array, dm: &Array) -> Result<(Array, Array)> {
        same_shape(&[gate, up, dm])?;
        Ok(match gate {
            Array::Host(gate) => {
                let (dgate, dup) = cpu::gated_backward(self, gate, up.host()?, dm.host()?)?;
                (dgate.into(), dup.into())
            }
            Array::Device(gate) => {
                let dm = cast(dm.device()?, gate.element())?;
                let (dgate, dup) = gpu::gated_backward(self, gate, up.device()?, &dm)?;
                (dgate.into(), dup.into())
            }
        })
    }
}

fn same_shape(arrays: &[&Array]) -> Result<()> {
    let shapes = arrays.iter().map(|a| a.dims2()).collect::<Result<Vec<_>>>()?;
    if shapes.iter().any(|s| *s != shapes[0]) {
        bail!("activation: shapes {shapes:?} differ");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;

    use crate::ops::cpu::tensor;

    #[test]
    fn nan_stays_nan_and_infinity_stays_infinite_in_every_activation() {
        for kind in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let row = |x: f32| Array::Host(tensor(vec![0.5, x, -0.5, 2.0], (1, 4)).unwrap());
            let numbers = |t: Array| -> Vec<f32> {
                let t: Tensor = t.to_host().unwrap();
                t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let (up, nan) = (row(1.0), row(f32::NAN));
            for m in [kind.forward(&nan).unwrap(), kind.gated_forward(&nan, &up).unwrap()] {
                let m = numbers(m);
                assert!(m[1].is_nan() && m.iter().filter(|v| v.is_nan()).count() == 1, "{kind:?}: {m:?}");
            }
            assert_eq!(numbers(kind.forward(&row(f32::INFINITY)).unwrap())[1], f32::INFINITY, "{kind:?}");
        }
    }
}
