//! The exact KL divergence between two distributions over the vocabulary, from the hidden states of both and the
//! lm_head, and its gradient: formula, checks, dispatch. As in `logprobs`, (N, vocab) logits are never allocated.
//!
//! l = c tanh(k h W^T / c) / T, m = c tanh(k g W^T / c) / T; KL = sum_j p_j (log p_j - log q_j)
//! = sum_j p_j (l_j - m_j) - lse(l) + lse(m). Each side may have its own LoRA weights on W. Saved for backward: KL and
//! both lse. It does not depend on roles (actor, reference). Read `cpu.rs` beside it, then `rows/mod.rs`.

mod cpu;
pub mod gpu;

use anyhow::{Result, bail};

use crate::device::{Array, Element, Matrix};

use crate::ops::logprobs::{Gradients, LmHead};

/// The KL of each position, and the tensors saved for `backward`. All (R).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenKl {
    /// KL(p || q), nats; never negative.
    pub kl: Vec<f32>,
    lse_p: Vec<f32>,
    lse_q: Vec<f32>,
}

/// One of the two distributions: hidden states and lm_head.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// Hidden states (R, D), already normed.
    pub hidden: &'a Array,
    /// The lm_head: weight, multiplier and soft cap are the same on both sides, LoRA weights may differ.
    pub head: LmHead<'a>,
}

/// KL (R) from the distribution of p to that of q, at temperature T.
///
/// # Errors
/// If shapes do not fit, or the lm_heads are different matrices.
pub fn forward(p: Side<'_>, q: Side<'_>, temperature: f64) -> Result<TokenKl> {
    check(p, q)?;
    match (p.hidden, q.hidden) {
        (Array::Host(h), Array::Host(g)) => Ok(cpu::forward(
            cpu::HostSide { hidden: h, head: p.head },
            cpu::HostSide { hidden: g, head: q.head },
            temperature,
        )?),
        (Array::Device(h), Array::Device(g)) => on_device::forward((h, p.head), (g, q.head), temperature),
        _ => bail!("KL: the hidden states of the two sides lie on two machines"),
    }
}

/// dL/dh (R, D), h being p's hidden states, and the gradients of p's LoRA weights, of dL/dKL (R):
/// dKL/dl_j = p_j (log p_j - log q_j - KL) / T, times the derivative of multiplier and soft cap; dL/dh = dL/dl W.
/// `saved` is the result of `forward` for the same inputs; q is a constant.
///
/// # Errors
/// As for [`forward`].
pub fn backward(p: Side<'_>, q: Side<'_>, temperature: f64, saved: &TokenKl, dkl: &[f32]) -> Result<Gradients> {
    let r = check(p, q)?;
    if [saved.kl.len(), dkl.len()] != [r; 2] {
        bail!("KL backward: {r} positions, {} gradients", dkl.len());
    }
    match (p.hidden, q.hidden) {
        (Array::Host(h), Array::Host(g)) => {
            let (p, q) = (cpu::HostSide { hidden: h, head: p.head }, cpu::HostSide { hidden: g, head: q.head });
            Ok(cpu::backward(p, q, temperature, saved, dkl)?)
        }
        (Array::Device(h), Array::Device(g)) => on_device::backward((h, p.head), (g, q.head), temperature, saved, dkl),
        _ => bail!("KL: the hidden states of the two sides lie on two machines"),
    }
}

fn check(p: Side<'_>, q: Side<'_>) -> Result<usize> {
    let ((r, d), weight) = (p.hidden.dims2()?, p.head.weight);
    if q.hidden.dims2()? != (r, d) || weight.cols() != d || q.head.weight.id() != weight.id() {
        bail!(
            "KL: {:?}, {:?}, lm_head width {}, or two different lm_heads",
            p.hidden.dims2()?,
            q.hidden.dims2()?,
            weight.cols()
        );
    }
    Ok(r)
}

/// The KL on a device: both sides' products of one strip of the vocabulary after another.
mod on_device {
    use super::*;
    use crate::ops::logprobs::gpu::Shape;
    use crate::ops::logprobs::gpu_head::Head;

    type Rows<'a> = (&'a Matrix, LmHead<'a>);

    pub(super) fn forward((h, p): Rows<'_>, (g, q): Rows<'_>, temperature: f64) -> Result<TokenKl> {
        let (device, r) = (h.device(), h.rows());
        if r == 0 {
            return Ok(TokenKl::default());
        }
        let head = Head::of(h, &p)?;
        let (p_rows, q_rows) = (head.rows(h, &p)?, head.rows(g, &q)?);
        let (p_buffer, q_buffer) = (head.buffer(Element::F32, r)?, head.buffer(Element::F32, r)?);
        let mut running = gpu::Running::new(device, r, Shape::of(&p, temperature))?;
        head.strips(|ids, w| {
            let (l, m) = (Head::part(&p_buffer, r, ids.len())?, Head::part(&q_buffer, r, ids.len())?);
            head.products(&p_rows, &ids, w, &l, None)?;
            head.products(&q_rows, &ids, w, &m, None)?;
            running.add(&l, &m, ids.len())
        })?;
        let gpu::DeviceKl { kl, lse_p, lse_q } = running.finish()?;
        Ok(TokenKl { kl: kl.to_f32()?, lse_p: lse_p.to_f32()?, lse_q: lse_q.to_f32()? })
    }

    pub(super) fn backward(
        (h, p): Rows<'_>,
        (g, q): Rows<'_>,
        temperature: f64,
        saved: &TokenKl,
        dkl: &[f32],
    ) -> Result<Gradients> {
        let (device, r, shape) = (h.device(), h.rows(), Shape::of(&p, temperature));
        let head = Head::of(h, &p)?;
        let (p_rows, q_rows) = (head.rows(h, &p)?, head.rows(g, &q)?);
        let (p_buffer, q_buffer) = (head.buffer(Element::F32, r)?, head.buffer(Element::F32, r)?);
        let unscaled = Head::wants_unscaled(&p_rows).then(|| head.buffer(Element::F32, r)).transpose()?;
        let row = |values: &[f32]| device.upload_f32(values, 1, r);
        let saved = gpu::DeviceKl { kl: row(&saved.kl)?, lse_p: row(&saved.lse_p)?, lse_q: row(&saved.lse_q)? };
        let dkl = row(dkl)?;
        let mut sums = head.sums(&p_rows)?;
        head.strips(|ids, w| {
            let (l, m) = (Head::part(&p_buffer, r, ids.len())?, Head::part(&q_buffer, r, ids.len())?);
            let u = unscaled.as_ref().map(|u| Head::part(u, r, ids.len())).transpose()?;
            head.products(&p_rows, &ids, w, &l, u.as_ref())?;
            head.products(&q_rows, &ids, w, &m, None)?;
            gpu::backward(&l, &m, ids.len(), &saved, &dkl, shape, &l)?;
            head.add(&mut sums, &p_rows, &ids, w, &l, u.as_ref())
        })?;
        head.finish(sums, &p_rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::tensor;
    use crate::ops::weight::Weight;
    use crate::rng::SplitMix64;
    use candle_core::Tensor;

    const R: usize = 3;
    const D: usize = 5;
    /// More than one strip per run, and not a multiple of a strip.
    const V: usize = 1237;

    struct Case {
        h: Vec<f32>,
        g: Vec<f32>,
        table: Vec<f32>,
    }

    fn case() -> Case {
        let mut rng = SplitMix64::new(9);
        let mut draw =
            |n: usize, scale: f64| -> Vec<f32> { (0..n).map(|_| (scale * (rng.uniform() - 0.5)) as f32).collect() };
        Case { h: draw(R * D, 4.0), g: draw(R * D, 4.0), table: draw(V * D, 2.0) }
    }

    fn weight(table: &[f32]) -> Weight {
        Weight::from_f32(table, V, D).unwrap()
    }

    /// An lm_head as most decoders have it, and one with both Granite's multiplier and Gemma 2's soft cap.
    fn heads(weight: &Weight) -> [LmHead<'_>; 2] {
        [LmHead::plain(weight), LmHead { multiplier: 0.75, soft_cap: Some(1.5), ..LmHead::plain(weight) }]
    }

    /// The sum over the full softmax, in f64.
    fn full(h: &[f32], g: &[f32], table: &[f32], of: &LmHead<'_>, temperature: f64) -> Vec<f64> {
        let shape = |l: f64| match of.soft_cap.map(f64::from) {
            Some(cap) => cap * (l * f64::from(of.multiplier) / cap).tanh(),
            None => l * f64::from(of.multiplier),
        };
        let log_softmax = |h: &[f32]| -> Vec<f64> {
            let dot = |w: &[f32]| w.iter().zip(h).map(|(&w, &h)| f64::from(w) * f64::from(h)).sum::<f64>();
            let logits: Vec<f64> = table.chunks(D).map(|w| shape(dot(w)) / temperature).collect();
            let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            logits.into_iter().map(|l| l - lse).collect()
        };
        let rows = h.chunks(D).zip(g.chunks(D));
        rows.map(|(h, g)| log_softmax(h).iter().zip(log_softmax(g)).map(|(p, q)| p.exp() * (p - q)).sum()).collect()
    }

    fn side<'a>(hidden: &'a Array, head: &LmHead<'a>) -> Side<'a> {
        Side { hidden, head: *head }
    }

    #[test]
    fn the_kl_over_strips_equals_the_sum_over_the_full_softmax_and_is_never_negative() {
        let Case { h, g, table } = case();
        let weight = weight(&table);
        let tensors = |h: &[f32]| Array::Host(tensor(h.to_vec(), (R, D)).unwrap());
        for (of, temperature) in heads(&weight).into_iter().flat_map(|of| [(of, 1.0), (of, 0.7)]) {
            let (h_rows, g_rows) = (tensors(&h), tensors(&g));
            let got = forward(side(&h_rows, &of), side(&g_rows, &of), temperature).unwrap().kl;
            for (got, want) in got.iter().zip(full(&h, &g, &table, &of, temperature)) {
                // Sums of 1237 f32 terms of magnitude 1.
                assert!((f64::from(*got) - want).abs() < 1e-5 * want.max(1.0) && *got > 0.0, "{got} {want}");
            }
            let same = forward(side(&h_rows, &of), side(&h_rows, &of), temperature).unwrap().kl;
            assert_eq!(same, [0.0; R], "of a distribution to itself");
        }
        let (plain, short, h) =
            (LmHead::plain(&weight), Array::Host(tensor(vec![0.0; D], (1, D)).unwrap()), tensors(&h));
        assert!(forward(side(&h, &plain), side(&short, &plain), 1.0).is_err());
    }

    #[test]
    fn the_kl_of_a_row_with_nan_is_nan() {
        let Case { h, g, table } = case();
        let weight = weight(&table);
        let plain = LmHead::plain(&weight);
        for at in [0, R * D - 1] {
            let mut broken = h.clone();
            broken[at] = f32::NAN;
            let array = |v: Vec<f32>| Array::Host(tensor(v, (R, D)).unwrap());
            let (broken, g) = (array(broken), array(g.clone()));
            for (p, q) in [(&broken, &g), (&g, &broken)] {
                let kl = forward(side(p, &plain), side(q, &plain), 1.0).unwrap().kl;
                for (row, kl) in kl.iter().enumerate() {
                    assert_eq!(kl.is_nan(), row == at / D, "row {row}: {kl}");
                }
            }
        }
    }

    #[test]
    fn the_gradient_is_the_central_difference_of_the_full_sum() {
        let Case { h, g, table } = case();
        let weight = weight(&table);
        let tensors = |h: &[f32]| Array::Host(tensor(h.to_vec(), (R, D)).unwrap());
        let dkl = [0.5f32, -1.0, 2.0];
        for of in heads(&weight) {
            let (h_rows, g_rows) = (tensors(&h), tensors(&g));
            let saved = forward(side(&h_rows, &of), side(&g_rows, &of), 0.7).unwrap();
            let grad = backward(side(&h_rows, &of), side(&g_rows, &of), 0.7, &saved, &dkl).unwrap();
            let grad: Tensor = grad.hidden.to_host().unwrap();
            let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for at in 0..R * D {
                let moved = |by: f32| {
                    let mut h = h.clone();
                    h[at] += by;
                    full(&h, &g, &table, &of, 0.7).iter().zip(dkl).map(|(kl, d)| kl * f64::from(d)).sum::<f64>()
                };
                let step = 1.0 / 1024.0;
                let want = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
                assert!((f64::from(grad[at]) - want).abs() < 1e-4 * want.abs().max(1.0), "{at}: {} {want}", grad[at]);
            }
        }
    }
}
