//! Sampling on the CPU, one row of logits at a time. gpu.cu does the same operations in the same order where it says so. Read
//! `mod.rs` beside it for the distribution.

use anyhow::Result;

use super::{Distribution, Drawn};
use crate::diverged;
use crate::ops::cpu::{exp, lane_sum, vectorised};

/// Buffers that are reused between rows.
#[derive(Default)]
pub struct Buffers {
    weights: Vec<f32>,
    order: Vec<u32>,
}

impl Buffers {
    /// The token for a uniform `draw` in [0, 1).
    pub fn sample_row(&mut self, logits: &[f32], distribution: Distribution, draw: f64) -> Result<Drawn> {
        let (best, top) = logits.iter().enumerate().fold(
            (0, f32::NEG_INFINITY),
            |(b, t), (i, &l)| {
                if l > t { (i, l) } else { (b, t) }
            },
        );
        let inverse = distribution.inverse();
        self.weights.resize(logits.len(), 0.0);
        let sum = exponentials(logits, top, inverse, &mut self.weights);
        if !(sum.is_finite() && top.is_finite()) {
            return Err(diverged!(
                "the logits are NaN or infinite: the weights of the base or the adapter have overflowed f32; train the \
                 adapter again with a lower learning_rate"
            ));
        }
        let drawn = |token: usize| Drawn { token: token as u32, shifted: (logits[token] - top) * inverse, sum };
        if distribution.temperature <= 0.0 {
            return Ok(drawn(best));
        }
        let token = if distribution.top_k == 0 && distribution.top_p >= 1.0 {
            first_above((0..logits.len()).map(|i| (i, self.weights[i])), f64::from(sum), draw)
        } else {
            self.order.clear();
            self.order.extend(0..logits.len() as u32);
            let weights = &self.weights;
            // The most likely first; equal weights by id, so that the order is total.
            let by_weight = |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
            let k = if distribution.top_k == 0 { logits.len() } else { distribution.top_k.min(logits.len()) };
            if k < logits.len() {
                self.order.select_nth_unstable_by(k - 1, by_weight);
                self.order.truncate(k);
            }
            self.order.sort_unstable_by(by_weight);
            let total: f64 = self.order.iter().map(|&i| f64::from(weights[i as usize])).sum();
            let (mut mass, mut nucleus) = (0f64, 0);
            for &i in &self.order {
                mass += f64::from(weights[i as usize]);
                nucleus += 1;
                if mass >= distribution.top_p * total {
                    break;
                }
            }
            first_above(self.order[..nucleus].iter().map(|&i| (i as usize, weights[i as usize])), mass, draw)
        };
        Ok(drawn(token))
    }
}

vectorised! {
    /// Writes e^((l - top) / T) to `weights` and returns their sum.
    fn exponentials(logits: &[f32], top: f32, inverse_temperature: f32, weights: &mut [f32]) -> f32 {
        let mut lanes = [0f32; 16];
        let (l16, l_rest) = logits.as_chunks::<16>();
        let (w16, w_rest) = weights.as_chunks_mut::<16>();
        for (l, w) in l16.iter().zip(w16) {
            for i in 0..16 {
                w[i] = exp((l[i] - top) * inverse_temperature);
                lanes[i] += w[i];
            }
        }
        for (i, (l, w)) in l_rest.iter().zip(w_rest).enumerate() {
            *w = exp((l - top) * inverse_temperature);
            lanes[i] += *w;
        }
        lane_sum(&lanes)
    }
}

/// The first item at which the running sum exceeds draw * total, or the last with non-zero weight if rounding keeps the
/// sum below.
fn first_above(items: impl Iterator<Item = (usize, f32)>, total: f64, draw: f64) -> usize {
    let (mut rest, mut last) = (draw * total, 0);
    for (i, w) in items {
        if w > 0.0 {
            last = i;
        }
        rest -= f64::from(w);
        if rest < 0.0 {
            return i;
        }
    }
    last
}
