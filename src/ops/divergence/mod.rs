//! The generalized Jensen-Shannon divergence between a student's and a teacher's distribution over the vocabulary, from
//! the hidden states and the lm_head of each, and its gradient by the student: formula, checks, dispatch. The two may be
//! of different models, whose widths, caps and stored types differ. (N, vocab) logits are never allocated.
//!
//! s, t = softmax of the student's and the teacher's logits / T. As TRL's `generalized_jsd_loss` (arXiv:2306.13649):
//! beta = 0 is KL(t || s), beta = 1 is KL(s || t), and between them with M = (1 - beta) s + beta t it is
//! beta KL(t || M) + (1 - beta) KL(s || M). dD/dl_j = s_j (g_j - sum_k s_k g_k) / T, where g is -t / s, log s - log t, and
//! (1 - beta) (log s - log M). Ids that only one of the two has, the padding rows of a larger lm_head, count for neither.
//! It does not depend on roles. Read `cpu.rs` beside it, then `kl/mod.rs` for two policies of one base.

mod cpu;
pub mod gpu;

use anyhow::{Result, bail};

use crate::device::Array;
use crate::ops::logprobs::{Gradients, LmHead};

/// Which divergence: TRL's `beta`, and the temperature that divides the logits of both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// 0: forward KL(teacher || student); 1: reverse KL(student || teacher); between: the Jensen-Shannon divergence.
    pub beta: f64,
    /// T.
    pub temperature: f64,
}

impl Divergence {
    /// Whether it is a mixture of both distributions that they are compared with.
    pub(crate) fn is_mixed(self) -> bool {
        self.beta > 0.0 && self.beta < 1.0
    }
}

/// The divergence at each position, and what `backward` needs of it. All (R).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenDivergence {
    /// Nats; never negative.
    pub value: Vec<f32>,
    /// sum_k s_k g_k.
    mean: Vec<f32>,
    lse_s: Vec<f32>,
    lse_t: Vec<f32>,
}

/// One of the two distributions.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// Hidden states (R, D), already normed.
    pub hidden: &'a Array,
    /// The lm_head (vocab, D).
    pub head: LmHead<'a>,
}

/// The divergence (R) between the student's and the teacher's distributions.
///
/// # Errors
/// If shapes do not fit, or the two lie on different machines.
pub fn forward(student: Side<'_>, teacher: Side<'_>, of: Divergence) -> Result<TokenDivergence> {
    if check(student, teacher)? == 0 {
        return Ok(TokenDivergence::default());
    }
    match (student.hidden, teacher.hidden) {
        (Array::Host(h), Array::Host(g)) => Ok(cpu::forward((h, student.head), (g, teacher.head), of)?),
        (Array::Device(h), Array::Device(g)) => gpu::heads::forward((h, student.head), (g, teacher.head), of),
        _ => bail!("divergence: student and teacher lie on two machines"),
    }
}

/// dL/dh (R, D) of the student's hidden states, and the gradients of its LoRA weights on the lm_head, of dL/dD (R).
/// `saved` is the result of [`forward`] for the same inputs; the teacher is a constant.
///
/// # Errors
/// As for [`forward`].
pub fn backward(
    student: Side<'_>,
    teacher: Side<'_>,
    of: Divergence,
    saved: &TokenDivergence,
    dvalue: &[f32],
) -> Result<Gradients> {
    let r = check(student, teacher)?;
    if [saved.value.len(), dvalue.len()] != [r; 2] || r == 0 {
        bail!("divergence backward: {r} positions, {} gradients", dvalue.len());
    }
    match (student.hidden, teacher.hidden) {
        (Array::Host(h), Array::Host(g)) => Ok(cpu::backward((h, student.head), (g, teacher.head), of, saved, dvalue)?),
        (Array::Device(h), Array::Device(g)) => {
            gpu::heads::backward((h, student.head), (g, teacher.head), of, saved, dvalue)
        }
        _ => bail!("divergence: student and teacher lie on two machines"),
    }
}

fn check(student: Side<'_>, teacher: Side<'_>) -> Result<usize> {
    let (of_s, of_t) = (student.hidden.dims2()?, teacher.hidden.dims2()?);
    let widths = [student.head.weight.cols(), teacher.head.weight.cols()];
    if of_s.0 != of_t.0 || [of_s.1, of_t.1] != widths {
        bail!("divergence: hidden states {of_s:?} and {of_t:?} of lm_heads {} and {} wide", widths[0], widths[1]);
    }
    Ok(of_s.0)
}

/// Ids that both lm_heads have.
fn common(student: &LmHead<'_>, teacher: &LmHead<'_>) -> usize {
    student.weight.rows().min(teacher.weight.rows())
}

#[cfg(test)]
mod tests;
