//! Activations on the CPU: one vectorised loop per function and direction. Read `mod.rs` beside it for the formulas.

use candle_core::{Result, Tensor};

use super::Activation;
use crate::ops::cpu::{Buffer, erf, exp, parallel, tanh, tensor, view};

/// 1 / sqrt(2) and 1 / sqrt(2 pi): Phi(x) = 0.5 (1 + erf(x / sqrt(2))), Phi'(x) = e^(-x^2/2) / sqrt(2 pi).
const INV_SQRT_2: f32 = std::f32::consts::FRAC_1_SQRT_2;
const INV_SQRT_2PI: f32 = 0.398_942_3;
/// sqrt(2 / pi).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// act(x).
#[inline(always)]
fn value<const KIND: u8>(x: f32) -> f32 {
    match KIND {
        0 => x / (1.0 + exp(-x)),
        1 => 0.5 * x * (1.0 + erf(x * INV_SQRT_2)),
        2 => 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x))),
        // Written in this order, the comparison lets NaN pass.
        _ => {
            if x <= 0.0 {
                0.0
            } else {
                x
            }
        }
    }
}

/// d act / dx.
#[inline(always)]
fn slope<const KIND: u8>(x: f32) -> f32 {
    match KIND {
        0 => {
            let s = 1.0 / (1.0 + exp(-x));
            s * (1.0 + x * (1.0 - s))
        }
        1 => 0.5 * (1.0 + erf(x * INV_SQRT_2)) + x * exp(-0.5 * x * x) * INV_SQRT_2PI,
        2 => {
            let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
        }
        _ => f32::from(x > 0.0),
    }
}

/// Calls the loop of an activation; each has its own, so that each is vectorised.
macro_rules! kinds {
    ($activation:expr, $f:ident, $($arg:expr),*) => {
        match $activation {
            Activation::Silu => $f::silu($($arg),*),
            Activation::Gelu => $f::gelu($($arg),*),
            Activation::GeluTanh => $f::gelu_tanh($($arg),*),
            Activation::Relu => $f::relu($($arg),*),
        }
    };
}

macro_rules! loops {
    ($($name:ident = $kind:literal),*) => {
        mod plain_forward {
            use super::value;
            $(crate::ops::cpu::vectorised! {
                pub fn $name(x: &[f32], m: &mut [f32]) {
                    for (m, &x) in m.iter_mut().zip(x) {
                        *m = value::<$kind>(x);
                    }
                }
            })*
        }
        mod plain_backward {
            use super::slope;
            $(crate::ops::cpu::vectorised! {
                pub fn $name(x: &[f32], dm: &[f32], dx: &mut [f32]) {
                    for ((dx, &x), &d) in dx.iter_mut().zip(x).zip(dm) {
                        *dx = d * slope::<$kind>(x);
                    }
                }
            })*
        }
        mod gated_forward {
            use super::value;
            $(crate::ops::cpu::vectorised! {
                pub fn $name(gate: &[f32], up: &[f32], m: &mut [f32]) {
                    for ((m, &g), &u) in m.iter_mut().zip(gate).zip(up) {
                        *m = value::<$kind>(g) * u;
                    }
                }
            })*
        }
    };
}
loops!(silu = 0, gelu = 1, gelu_tanh = 2, relu = 3);

mod gated_backward {
    use super::{exp, slope, value};

    crate::ops::cpu::vectorised! {
        pub fn silu(gate: &[f32], up: &[f32], dm: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
            for i in 0..gate.len() {
                let (g, d) = (gate[i], dm[i]);
                let s = 1.0 / (1.0 + exp(-g));
                dup[i] = d * g * s;
                dgate[i] = d * up[i] * s * (1.0 + g * (1.0 - s));
            }
        }
    }

    macro_rules! plain {
        ($($name:ident = $kind:literal),*) => {
            $(crate::ops::cpu::vectorised! {
                pub fn $name(gate: &[f32], up: &[f32], dm: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
                    for i in 0..gate.len() {
                        dup[i] = dm[i] * value::<$kind>(gate[i]);
                        dgate[i] = dm[i] * up[i] * slope::<$kind>(gate[i]);
                    }
                }
            })*
        };
    }
    plain!(gelu = 1, gelu_tanh = 2, relu = 3);
}

/// act(x).
pub fn forward(activation: Activation, x: &Tensor) -> Result<Tensor> {
    let (n, f) = x.dims2()?;
    let xs = view(x)?;
    let mut m = Buffer::new(n * f);
    let out = m.out();
    parallel(n, 8 * n * f, |r| {
        let part = r.start * f..r.end * f;
        // SAFETY: rows r belong to this part of the work, and are all written.
        let m = unsafe { out.slice(part.start, part.len()) };
        kinds!(activation, plain_forward, &xs[part], m);
    });
    // SAFETY: all rows are written.
    tensor(unsafe { m.finish() }, (n, f))
}

/// dL/dx of dL/dm.
pub fn backward(activation: Activation, x: &Tensor, dm: &Tensor) -> Result<Tensor> {
    let (n, f) = x.dims2()?;
    let (xs, ds) = (view(x)?, view(dm)?);
    let mut dx = Buffer::new(n * f);
    let out = dx.out();
    parallel(n, 12 * n * f, |r| {
        let part = r.start * f..r.end * f;
        // SAFETY: rows r belong to this part of the work, and are all written.
        let dx = unsafe { out.slice(part.start, part.len()) };
        kinds!(activation, plain_backward, &xs[part.clone()], &ds[part], dx);
    });
    // SAFETY: all rows are written.
    tensor(unsafe { dx.finish() }, (n, f))
}

/// act(gate) * up.
pub fn gated_forward(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (n, f) = gate.dims2()?;
    let (g, u) = (view(gate)?, view(up)?);
    let mut m = Buffer::new(n * f);
    let out = m.out();
    parallel(n, 8 * n * f, |r| {
        let part = r.start * f..r.end * f;
        // SAFETY: rows r belong to this part of the work, and are all written.
        let m = unsafe { out.slice(part.start, part.len()) };
        kinds!(activation, gated_forward, &g[part.clone()], &u[part], m);
    });
    // SAFETY: all rows are written.
    tensor(unsafe { m.finish() }, (n, f))
}

/// (dL/dgate, dL/dup) of dL/dm.
pub fn gated_backward(activation: Activation, gate: &Tensor, up: &Tensor, dm: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n, f) = gate.dims2()?;
    let (g, u, d) = (view(gate)?, view(up)?, view(dm)?);
    let (mut dgate, mut dup) = (Buffer::new(n * f), Buffer::new(n * f));
    let (og, ou) = (dgate.out(), dup.out());
    parallel(n, 12 * n * f, |r| {
        let part = r.start * f..r.end * f;
        // SAFETY: rows r of both outputs belong to this part of the work, and are all written.
        let (dg, du) = unsafe { (og.slice(part.start, part.len()), ou.slice(part.start, part.len())) };
        kinds!(activation, gated_backward, &g[part.clone()], &u[part.clone()], &d[part], dg, du);
    });
    // SAFETY: all rows of both are written.
    Ok((tensor(unsafe { dgate.finish() }, (n, f))?, tensor(unsafe { dup.finish() }, (n, f))?))
}
