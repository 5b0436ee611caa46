//! The divergence on the CPU: running maxima and sums over strips of the student's logits, and of the teacher's for the
//! same ids. Read `mod.rs` beside it for the formulas, `logprobs/cpu_strips.rs` for the strips.

use std::sync::Mutex;

use candle_core::{Result, Tensor};

use super::{Divergence, TokenDivergence, common};
use crate::ops::cpu::gemm::{Into, Mat, NR, gemm};
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{Isa, Out, exp, lane_sum, max, parallel, soft_cap, soft_cap_backward, tensor, vectorised, view};
use crate::ops::logprobs::cpu_lora::{HeadLora, LoraSums, RUNS, STRIP};
use crate::ops::logprobs::cpu_strips::{Hidden, one_strip, strips_and_products};
use crate::ops::logprobs::{Gradients, LmHead};

type Rows<'a> = (&'a Tensor, LmHead<'a>);

/// Both sides, packed for the products.
struct Both<'a> {
    student: (&'a Hidden<'a>, LmHead<'a>),
    teacher: (&'a Hidden<'a>, LmHead<'a>),
    temperature: f64,
    r: usize,
    /// Ids that both lm_heads have.
    ids: usize,
}

impl Both<'_> {
    /// Calls `f(first id, width, student's logits, teacher's, products)` for each strip of run `run` that both have; the
    /// logits (r, STRIP) are capped and divided by the temperature but for `capped`, which keeps the student's as the cap
    /// left them.
    fn strips(&self, run: usize, products: &mut [f32], mut f: impl FnMut(usize, [usize; 2], [&mut [f32]; 2], &[f32])) {
        let (hidden, head) = self.student;
        let (other, other_head) = self.teacher;
        let inverse = other_head.softmax_scale(self.temperature);
        with_scratch(self.r * STRIP + other_head.weight.cols() * NR, |scratch| {
            let (theirs, panel) = scratch.split_at_mut(self.r * STRIP);
            strips_and_products(hidden, head.weight, run, products, |v0, width, mine, products| {
                let Some(shared) = self.ids.checked_sub(v0).filter(|&left| left > 0).map(|left| left.min(width)) else {
                    return;
                };
                one_strip(other, other_head.weight, (v0, shared), panel, theirs, &mut []);
                if let Some(cap) = head.soft_cap {
                    soft_cap(mine, head.multiplier / cap, cap);
                }
                if let Some(cap) = other_head.soft_cap {
                    soft_cap(theirs, other_head.multiplier / cap, cap);
                }
                theirs.iter_mut().for_each(|m| *m *= inverse);
                f(v0, [width, shared], [mine, theirs], products);
            });
        });
    }

    /// Sums over every run of the vocabulary, merged in order, so that the bits are the same on any number of cores.
    fn sums<T: Copy + Send + Sync>(
        &self,
        none: T,
        of_strip: impl Fn(usize, &mut [f32], &[f32]) -> T + Sync,
        merge: impl Fn(T, T) -> T + Sync,
    ) -> Vec<T> {
        let sums: Vec<Mutex<Vec<T>>> = (0..RUNS).map(|_| vec![none; self.r].into()).collect();
        let inverse = self.student.1.softmax_scale(self.temperature);
        parallel(RUNS, self.work(2), |range| {
            for run in range {
                let mut own = vec![none; self.r];
                self.strips(run, &mut [], |_, [_, width], [mine, theirs], _| {
                    let rows = mine.chunks_exact_mut(STRIP).zip(theirs.chunks_exact(STRIP)).zip(&mut own);
                    for (i, ((mine, theirs), sum)) in rows.enumerate() {
                        mine[..width].iter_mut().for_each(|l| *l *= inverse);
                        *sum = merge(*sum, of_strip(i, &mut mine[..width], &theirs[..width]));
                    }
                });
                if let Ok(mut slot) = sums[run].lock() {
                    *slot = own;
                }
            }
        });
        let mut all = vec![none; self.r];
        for run in sums {
            let run = run.into_inner().unwrap_or_default();
            all.iter_mut().zip(run).for_each(|(all, run)| *all = merge(*all, run));
        }
        all
    }

    fn work(&self, passes: usize) -> usize {
        passes * self.r * self.ids * (self.student.1.weight.cols() + self.teacher.1.weight.cols()) / 2
    }
}

/// Runs `f` with both sides packed.
fn with_both<T>(
    (h, student): Rows<'_>,
    (g, teacher): Rows<'_>,
    temperature: f64,
    f: impl FnOnce(&Both<'_>, &[f32], Option<&HeadLora<'_>>) -> Result<T>,
) -> Result<T> {
    let (r, d) = h.dims2()?;
    let (hs, gs) = (view(h)?, view(g)?);
    let wide = teacher.weight.cols();
    let mine: Vec<_> = HeadLora::of(student.weight, student.lora, &hs, d, 0..r)?.into_iter().collect();
    let theirs: Vec<_> = HeadLora::of(teacher.weight, teacher.lora, &gs, wide, 0..r)?.into_iter().collect();
    let hidden = Hidden::of(&hs, r, d, student.weight, &mine);
    let other = Hidden::of(&gs, r, wide, teacher.weight, &theirs);
    let ids = common(&student, &teacher);
    f(&Both { student: (&hidden, student), teacher: (&other, teacher), temperature, r, ids }, &hs, mine.first())
}

/// The divergence of each position: one pass over the vocabulary, and a second one for the mixture.
pub fn forward(student: Rows<'_>, teacher: Rows<'_>, of: Divergence) -> Result<TokenDivergence> {
    with_both(student, teacher, of.temperature, |both, _, _| {
        let sums = both.sums(Sums::EMPTY, |_, mine, theirs| strip_sums(mine, theirs), Sums::merge);
        let mut out = TokenDivergence::default();
        for s in sums {
            let (lse_s, lse_t) = (s.top_s + s.sum_s.ln(), s.top_t + s.sum_t.ln());
            out.lse_s.push(lse_s);
            out.lse_t.push(lse_t);
            if !of.is_mixed() {
                let reverse = s.gap_s / s.sum_s - (lse_s - lse_t);
                let forward = s.gap_t / s.sum_t - (lse_t - lse_s);
                out.value.push(if of.beta == 1.0 { reverse } else { forward });
                out.mean.push(if of.beta == 1.0 { reverse } else { -1.0 });
            }
        }
        if of.is_mixed() {
            let (lse_s, lse_t) = (&out.lse_s, &out.lse_t);
            let add = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
            let sums = both.sums([0.0; 2], |i, mine, theirs| mixed(mine, theirs, (lse_s[i], lse_t[i]), of.beta), add);
            (out.value, out.mean) = sums.iter().map(|&[value, mean]| (value as f32, mean as f32)).unzip();
        }
        // Rounding may give a tiny negative number. Not f32::max, which would turn NaN into 0.
        out.value.iter_mut().filter(|value| **value < 0.0).for_each(|value| *value = 0.0);
        Ok(out)
    })
}

/// dL/dh of the student, and the gradients of its LoRA weights on the lm_head.
pub fn backward(
    student: Rows<'_>,
    teacher: Rows<'_>,
    of: Divergence,
    saved: &TokenDivergence,
    dvalue: &[f32],
) -> Result<Gradients> {
    with_both(student, teacher, of.temperature, |both, hs, own| {
        let (head, (r, d), isa) = (student.1, (both.r, student.1.weight.cols()), Isa::detect());
        let inverse = head.softmax_scale(of.temperature);
        let mut sums = own.map(LoraSums::new);
        let sums_out = sums.as_mut().map(LoraSums::out);
        let mut partial = vec![0f32; RUNS * r * d];
        let out = Out::of(&mut partial);
        parallel(RUNS, both.work(3), |range| {
            for run in range {
                let mut products = both.student.0.products();
                both.strips(run, &mut products, |v0, [width, shared], [mine, theirs], products| {
                    let mut capped = [0f32; STRIP];
                    for (i, (mine, theirs)) in mine.chunks_exact_mut(STRIP).zip(theirs.chunks_exact(STRIP)).enumerate()
                    {
                        // What only the student has, behind the ids that both have, gets no gradient.
                        mine[shared..width].fill(0.0);
                        let (mine, theirs) = (&mut mine[..shared], &theirs[..shared]);
                        capped[..shared].copy_from_slice(mine);
                        let lse = (saved.lse_s[i], saved.lse_t[i]);
                        strip_gradient(mine, theirs, inverse, lse, of.beta as f32, saved.mean[i], dvalue[i] * inverse);
                        if let Some(cap) = head.soft_cap {
                            soft_cap_backward(&capped[..shared], mine, head.multiplier, cap);
                        }
                    }
                    if let (Some(lora), Some(sums)) = (own, sums_out) {
                        // SAFETY: each strip and each run belongs to one thread.
                        unsafe { sums.add(lora, run, (v0, width), mine, products) };
                    }
                    with_scratch(width * d, |rows| {
                        for (j, row) in rows.chunks_exact_mut(d).enumerate() {
                            head.weight.row(v0 + j, row);
                        }
                        // SAFETY: the (r, d) sum of run `run` belongs to this item.
                        unsafe {
                            let (g, w) = (Mat::rows(mine, STRIP), Mat::rows(rows, d));
                            gemm(isa, r, d, width, g, w, out.at(run * r * d), d, Into::Add);
                        }
                    });
                });
            }
        });
        let (first, rest) = partial.split_at_mut(r * d);
        for run in rest.chunks_exact(r * d) {
            first.iter_mut().zip(run).for_each(|(a, b)| *a += b);
        }
        partial.truncate(r * d);
        partial.shrink_to_fit();
        let lora = sums.map(|sums| sums.finish(hs, &mut partial)).transpose()?;
        Ok(Gradients { hidden: tensor(partial, (r, d))?.into(), lora })
    })
}

/// Running sums of one position.
#[derive(Clone, Copy)]
struct Sums {
    top_s: f32,
    sum_s: f32,
    /// sum of e^(l - top_s) (l - m).
    gap_s: f32,
    top_t: f32,
    sum_t: f32,
    /// sum of e^(m - top_t) (m - l).
    gap_t: f32,
}

impl Sums {
    const EMPTY: Self =
        Self { top_s: f32::NEG_INFINITY, sum_s: 0.0, gap_s: 0.0, top_t: f32::NEG_INFINITY, sum_t: 0.0, gap_t: 0.0 };

    fn merge(self, other: Self) -> Self {
        let factor = |from: f32, to: f32| if from == f32::NEG_INFINITY { 0.0 } else { exp(from - to) };
        let (top_s, top_t) = (self.top_s.max(other.top_s), self.top_t.max(other.top_t));
        let (s0, s1) = (factor(self.top_s, top_s), factor(other.top_s, top_s));
        let (t0, t1) = (factor(self.top_t, top_t), factor(other.top_t, top_t));
        Self {
            top_s,
            sum_s: self.sum_s * s0 + other.sum_s * s1,
            gap_s: self.gap_s * s0 + other.gap_s * s1,
            top_t,
            sum_t: self.sum_t * t0 + other.sum_t * t1,
            gap_t: self.gap_t * t0 + other.gap_t * t1,
        }
    }
}

vectorised! {
    /// The sums of one strip of scaled logits.
    fn strip_sums(l: &mut [f32], m: &[f32]) -> Sums {
        let (top_s, top_t) = (max(l), max(m));
        let mut lanes = [[0f32; 16]; 4];
        for (l, m) in l.chunks(16).zip(m.chunks(16)) {
            for (i, (&l, &m)) in l.iter().zip(m).enumerate() {
                let (s, t) = (exp(l - top_s), exp(m - top_t));
                lanes[0][i] += s;
                lanes[1][i] += s * (l - m);
                lanes[2][i] += t;
                lanes[3][i] += t * (m - l);
            }
        }
        let [sum_s, gap_s, sum_t, gap_t] = lanes.map(|lane| lane_sum(&lane));
        Sums { top_s, sum_s, gap_s, top_t, sum_t, gap_t }
    }
}

/// log((1 - beta) s + beta t) of log s and log t.
fn log_mixture(log_s: f32, log_t: f32, log_weights: (f32, f32)) -> f32 {
    let (a, b) = (log_s + log_weights.0, log_t + log_weights.1);
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    high + exp(low - high).ln_1p()
}

fn log_weights(beta: f32) -> (f32, f32) {
    ((-beta).ln_1p(), beta.ln())
}

/// One strip's share of the divergence to the mixture, and of sum_k s_k g_k.
fn mixed(l: &[f32], m: &[f32], lse: (f32, f32), beta: f64) -> [f64; 2] {
    let (beta, weights) = (beta as f32, log_weights(beta as f32));
    let (mut of_s, mut of_t) = (0f64, 0f64);
    for (l, m) in l.iter().zip(m) {
        let (log_s, log_t) = (l - lse.0, m - lse.1);
        let log_m = log_mixture(log_s, log_t, weights);
        of_s += f64::from(exp(log_s) * (log_s - log_m));
        of_t += f64::from(exp(log_t) * (log_t - log_m));
    }
    let mean = f64::from(1.0 - beta) * of_s;
    [mean + f64::from(beta) * of_t, mean]
}

/// dD/dl in l's place, times `scale`: s_j (g_j - mean).
fn strip_gradient(l: &mut [f32], m: &[f32], inverse: f32, lse: (f32, f32), beta: f32, mean: f32, scale: f32) {
    let weights = log_weights(beta);
    for (l, m) in l.iter_mut().zip(m) {
        let (log_s, log_t) = (*l * inverse - lse.0, m - lse.1);
        let s = exp(log_s);
        *l = scale
            * match beta {
                0.0 => s - exp(log_t),
                1.0 => s * (log_s - log_t - mean),
                _ => s * ((1.0 - beta) * (log_s - log_mixture(log_s, log_t, weights)) - mean),
            };
    }
}
