//! Logits in strips (CPU): the loop over the vocabulary that log-probabilities and KL share. (N, vocab) logits are
//! never allocated. It does not depend on the softmax. Read `cpu.rs` beside it and `kl/cpu.rs` for the two users.

use crate::ops::cpu::Isa;
use crate::ops::cpu::bf16::Cores;
use crate::ops::cpu::gemm::{Into, Mat, NR, gemm};
use crate::ops::cpu::pack::rows_as_columns;
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::linear::cpu_bf16::PackedLhs;
use crate::ops::logprobs::cpu_lora::{HeadLora, RUNS, STRIP};
use crate::ops::weight::{ComputeDtype, Weight};

/// Hidden states (r, d), packed for products with the lm_head.
pub(crate) struct Hidden<'a> {
    hs: &'a [f32],
    r: usize,
    /// The hidden states in bf16, if the lm_head computes in bf16.
    pub(super) packed: Option<PackedLhs>,
    loras: &'a [HeadLora<'a>],
}

impl<'a> Hidden<'a> {
    /// `loras`: LoRA weights, each for some of the rows.
    pub(crate) fn of(hs: &'a [f32], r: usize, d: usize, weight: &Weight, loras: &'a [HeadLora<'a>]) -> Self {
        let bf16 = weight.compute() == ComputeDtype::Bf16 && d.is_multiple_of(2);
        Self { hs, r, packed: bf16.then(|| PackedLhs::plain(hs, r, d, Cores::All)), loras }
    }

    /// A buffer for a strip's products before DoRA's scale; empty without DoRA.
    pub(crate) fn products(&self) -> Vec<f32> {
        let needed = self.loras.iter().any(HeadLora::needs_products);
        vec![0.0; if needed { self.r * STRIP } else { 0 }]
    }
}

/// Calls `f(first id, width, logits (r, STRIP))` for each strip of run `run`, in order.
pub(crate) fn strips(hidden: &Hidden<'_>, weight: &Weight, run: usize, mut f: impl FnMut(usize, usize, &mut [f32])) {
    strips_and_products(hidden, weight, run, &mut [], |v0, width, logits, _| f(v0, width, logits));
}

/// As [`strips`]; unless `products` (r, STRIP) is empty, it receives the logits before DoRA's scale, and `f` gets it.
pub(crate) fn strips_and_products(
    hidden: &Hidden<'_>,
    weight: &Weight,
    run: usize,
    products: &mut [f32],
    mut f: impl FnMut(usize, usize, &mut [f32], &[f32]),
) {
    let (r, vocab, d) = (hidden.r, weight.rows(), weight.cols());
    let all = vocab.div_ceil(STRIP);
    let (first, last) = (all * run / RUNS, all * (run + 1) / RUNS);
    with_scratch(r * STRIP + d * NR, |scratch| {
        let (logits, panel) = scratch.split_at_mut(r * STRIP);
        for v0 in (first..last).map(|s| s * STRIP) {
            let width = STRIP.min(vocab - v0);
            one_strip(hidden, weight, (v0, width), panel, logits, products);
            f(v0, width, logits, products);
        }
    });
}

/// The logits (r, STRIP) of `width` ids from `v0`, the first of a strip; unless `products` (r, STRIP) is empty, it
/// receives them before DoRA's scale. `panel`: scratch of d NR numbers.
pub(crate) fn one_strip(
    hidden: &Hidden<'_>,
    weight: &Weight,
    (v0, width): (usize, usize),
    panel: &mut [f32],
    logits: &mut [f32],
    products: &mut [f32],
) {
    let (r, d, isa) = (hidden.r, weight.cols(), Isa::detect());
    for j in (0..width).step_by(NR) {
        let (from, columns) = (v0 + j, NR.min(width - j));
        // SAFETY: logits holds r rows of STRIP elements, of which columns j.. are written.
        unsafe {
            let c = logits.as_mut_ptr().add(j);
            match &hidden.packed {
                Some(lhs) => lhs.forward_columns(weight, None, (from, columns), (c, STRIP), Into::Fresh),
                None => {
                    rows_as_columns(weight, from..from + columns, panel);
                    let (h, b) = (Mat::rows(hidden.hs, d), Mat::rows(panel, NR));
                    gemm(isa, r, columns, d, h, b, c, STRIP, Into::Fresh);
                }
            }
            for lora in hidden.loras {
                lora.add(v0, from, columns, logits.as_mut_ptr());
            }
        }
    }
    if !products.is_empty() {
        products.copy_from_slice(logits);
    }
    for lora in hidden.loras {
        lora.scale(v0, width, logits);
    }
}
