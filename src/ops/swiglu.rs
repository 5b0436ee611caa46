//! SwiGLU: m = silu(gate) * up, silu(g) = g / (1 + e^-g). Kept for the backward: gate and up. Source: arXiv:2002.05202.
//! Knows no layer. Read attention.rs next.

use candle_core::{Result, Tensor};

use super::cpu::{Buffer, exp, parallel, tensor, view};

super::cpu::vectorised! {
    fn forward_part(gate: &[f32], up: &[f32], m: &mut [f32]) {
        for ((m, &g), &u) in m.iter_mut().zip(gate).zip(up) {
            *m = g / (1.0 + exp(-g)) * u;
        }
    }
}

super::cpu::vectorised! {
    fn backward_part(gate: &[f32], up: &[f32], dm: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        for i in 0..gate.len() {
            let (g, d) = (gate[i], dm[i]);
            let s = 1.0 / (1.0 + exp(-g));
            dup[i] = d * g * s;
            dgate[i] = d * up[i] * s * (1.0 + g * (1.0 - s));
        }
    }
}

/// m (N, F) of gate and up, (N, F) each.
///
/// # Errors
/// If shapes differ.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (n, f) = gate.dims2()?;
    if up.dims() != [n, f] {
        candle_core::bail!("gate {:?} and up {:?}", gate.dims(), up.dims());
    }
    let (g, u) = (view(gate)?, view(up)?);
    let mut m = Buffer::new(n * f);
    let out = m.out();
    parallel(n, 8 * n * f, |r| {
        let part = r.start * f..r.end * f;
        // SAFETY: rows r belong to this part of the work, and are all written.
        forward_part(&g[part.clone()], &u[part.clone()], unsafe { out.slice(part.start, part.len()) });
    });
    // SAFETY: all rows are written.
    tensor(unsafe { m.finish() }, (n, f))
}

/// (dL/dgate, dL/dup), (N, F) each: dup = dm silu(g); dgate = dm u s (1 + g (1 - s)), s = 1 / (1 + e^-g).
///
/// # Errors
/// If shapes differ.
pub fn backward(gate: &Tensor, up: &Tensor, dm: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n, f) = gate.dims2()?;
    if up.dims() != [n, f] || dm.dims() != [n, f] {
        candle_core::bail!("gate {:?}, up {:?}, dm {:?}", gate.dims(), up.dims(), dm.dims());
    }
    let (g, u, d) = (view(gate)?, view(up)?, view(dm)?);
    let (mut dgate, mut dup) = (Buffer::new(n * f), Buffer::new(n * f));
    let (og, ou) = (dgate.out(), dup.out());
    parallel(n, 12 * n * f, |r| {
        let part = r.start * f..r.end * f;
        // SAFETY: rows r of both outputs belong to this part of the work, and are all written.
        let (dg, du) = unsafe { (og.slice(part.start, part.len()), ou.slice(part.start, part.len())) };
        backward_part(&g[part.clone()], &u[part.clone()], &d[part], dg, du);
    });
    // SAFETY: all rows of both are written.
    Ok((tensor(unsafe { dgate.finish() }, (n, f))?, tensor(unsafe { dup.finish() }, (n, f))?))
}
