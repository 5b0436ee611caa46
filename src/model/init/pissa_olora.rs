//! PiSSA and OLoRA: LoRA branches initialised from the base's own principal directions instead of zero.
//!
//! PEFT subtracts the initial branch from the base: W - s B0 A0 + s B A. Here the base is never written, so the initial
//! branch stays, with opposite sign and frozen, beside the trained one: A = [A; A0], B = [B, -B0]. PEFT converts such an
//! adapter to the same plain LoRA of twice the rank for use over the unchanged base, and it is saved so.
//!
//! The linear algebra (QR, SVD) is in f64, one matrix at a time. It does not depend on files. Read `model/adapter/mod.rs`
//! first.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use crate::invalid;
use crate::model::adapter::{Adapter, LoraLayer, NonBlockModule, TargetModule};
use crate::model::base::Base;
use crate::ops::cpu::parallel;
use crate::rng::SplitMix64;

/// The initialisation from the base's principal directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// PiSSA (arXiv:2404.02948), from the top r singular values and vectors: s B0 A0 is the best approximation of rank r.
    Pissa,
    /// OLoRA (arXiv:2406.01775), from the first r columns of Q and rows of R of W = Q R.
    Olora,
}

/// `adapter` with branches initialised from the base's principal directions, each beside its frozen negative.
///
/// # Errors
/// If a rank is larger than its matrix allows, or a branch is on the embedding or the lm_head: PEFT does not initialise the
/// former so, and subtracts the latter from a matrix that both may share.
pub fn principal(adapter: &Adapter, base: &Base, how: Principal) -> Result<Adapter> {
    let shapes = *adapter.shapes();
    let mut pairs = vec![];
    for (slot, pair) in adapter.pairs() {
        let name = shapes.path(slot);
        if matches!(slot, TargetModule::NonBlockModule(NonBlockModule::Embedding | NonBlockModule::Head)) {
            return Err(invalid!(
                "init_lora_weights: PiSSA and OLoRA initialise linear maps only; leave {name} out of target_modules, or \
                 use the default initialisation"
            ));
        }
        let weight = base.matrix(slot).with_context(|| format!("this base has no {name}"))?;
        let (m, n, r) = (weight.rows(), weight.cols(), pair.rank());
        anyhow::ensure!(r <= m.min(n), "{name} is {m} x {n} and has no {r} principal directions");
        let w = Matrix { rows: m, cols: n, values: weight.to_f32().into_iter().map(f64::from).collect() };
        let (a, b) = match how {
            Principal::Pissa => pissa(&w, r, pair.scale),
            Principal::Olora => olora(&w, r),
        };
        let f32s = |m: &Matrix| m.values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
        let a = Tensor::from_vec(f32s(&a), (r, n), &Device::Cpu)?;
        let b = Tensor::from_vec(f32s(&b), (m, r), &Device::Cpu)?;
        pairs.push((slot, LoraLayer::new(Tensor::cat(&[&a, &a], 0)?, Tensor::cat(&[&b, &b.neg()?], 1)?, pair.scale)));
    }
    let config = adapter.config().clone().with_ranks_times(2);
    Adapter::from_pairs(config, shapes, pairs, adapter.head().cloned(), adapter.provenance().clone())?
        .with_frozen_half()
}

/// PiSSA: A (r, n) = sqrt(S) V^T and B (m, r) = U sqrt(S), with S divided by the branch's scale.
fn pissa(w: &Matrix, r: usize, scale: f64) -> (Matrix, Matrix) {
    let (u, s, v) = top_singular(w, r);
    let root = |j: usize| (s[j] / scale).sqrt();
    let a = Matrix::from_fn(r, w.cols, |i, j| root(i) * v.at(j, i));
    (a, Matrix::from_fn(w.rows, r, |i, j| root(j) * u.at(i, j)))
}

/// OLoRA: A (r, n) = the first rows of R, B (m, r) = the first columns of Q.
fn olora(w: &Matrix, r: usize) -> (Matrix, Matrix) {
    let q = orthonormal(Matrix::from_fn(w.rows, r, |i, j| w.at(i, j)));
    (q.transposed().times(w), q)
}

/// A dense matrix, row-major f64.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn from_fn(rows: usize, cols: usize, of: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| of(i, j)).collect();
        Self { rows, cols, values }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.cols + j]
    }

    fn transposed(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.at(j, i))
    }

    fn times(&self, other: &Self) -> Self {
        let n = other.cols;
        let mut values = vec![0f64; self.rows * n];
        let rows: Vec<std::sync::Mutex<&mut [f64]>> = values.chunks_mut(n.max(1)).map(std::sync::Mutex::new).collect();
        parallel(rows.len(), self.rows * self.cols * n, |range| {
            for i in range {
                let mut out = rows[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                for k in 0..self.cols {
                    let factor = self.at(i, k);
                    for (o, v) in out.iter_mut().zip(&other.values[k * n..(k + 1) * n]) {
                        *o += factor * v;
                    }
                }
            }
        });
        drop(rows);
        Self { rows: self.rows, cols: n, values }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Orthonormalises the columns from left to right: Gram-Schmidt, each column twice, which is as accurate as Householder
/// reflections. A column that depends linearly on those before it becomes zero.
fn orthonormal(matrix: Matrix) -> Matrix {
    let mut columns = matrix.transposed();
    let n = columns.cols;
    for j in 0..columns.rows {
        let (done, rest) = columns.values.split_at_mut(j * n);
        let column = &mut rest[..n];
        let before = dot(column, column).sqrt();
        for _ in 0..2 {
            for q in done.chunks_exact(n) {
                let part = dot(q, column);
                column.iter_mut().zip(q).for_each(|(c, q)| *c -= part * q);
            }
        }
        let norm = dot(column, column).sqrt();
        let factor = if norm > 1e-12 * before { 1.0 / norm } else { 0.0 };
        column.iter_mut().for_each(|c| *c *= factor);
    }
    columns.transposed()
}

/// The r largest singular values with their left (m, r) and right (n, r) vectors: block power iteration over a subspace of
/// more than r directions, then an exact decomposition within it (randomised SVD, arXiv:0909.4061).
fn top_singular(w: &Matrix, r: usize) -> (Matrix, Vec<f64>, Matrix) {
    /// Oversampling: convergence depends on the gap to the first singular value outside of the subspace.
    const MORE: usize = 16;
    /// Power iterations. PEFT's fast variant recommends 16; the subspace is larger here, and small matrices are exact.
    const ITERATIONS: usize = 24;
    let wide = (r + MORE).max(64).min(w.rows.min(w.cols));
    let mut rng = SplitMix64::new(0);
    let noise: Vec<f64> = (0..w.cols * wide).map(|_| rng.uniform() - 0.5).collect();
    let transposed = w.transposed();
    let mut q = orthonormal(w.times(&Matrix { rows: w.cols, cols: wide, values: noise }));
    // Over the full smaller dimension, one iteration is exact.
    let iterations = if wide == w.rows.min(w.cols) { 1 } else { ITERATIONS };
    for _ in 0..iterations {
        q = orthonormal(w.times(&orthonormal(transposed.times(&q))));
    }
    // W ~ Q (Q^T W) = Q P; P^T = V S Z^T, so W ~ (Q Z) S V^T.
    let (v, s, z) = jacobi(transposed.times(&q));
    let mut order: Vec<usize> = (0..s.len()).collect();
    order.sort_by(|&i, &j| s[j].total_cmp(&s[i]));
    let pick = |m: &Matrix| Matrix::from_fn(m.rows, r, |i, j| m.at(i, order[j]));
    (q.times(&pick(&z)), order[..r].iter().map(|&i| s[i]).collect(), pick(&v))
}

/// P (n, k) = V diag(S) Z^T by one-sided Jacobi: pairs of columns are rotated until all are orthogonal.
fn jacobi(p: Matrix) -> (Matrix, Vec<f64>, Matrix) {
    let k = p.cols;
    let mut columns = p.transposed();
    let mut z = Matrix::from_fn(k, k, |i, j| f64::from(u8::from(i == j)));
    for _ in 0..60 {
        let mut largest = 0f64;
        for i in 0..k {
            for j in i + 1..k {
                let n = columns.cols;
                let (ci, cj) = (&columns.values[i * n..(i + 1) * n], &columns.values[j * n..(j + 1) * n]);
                let (alpha, beta, gamma) = (dot(ci, ci), dot(cj, cj), dot(ci, cj));
                if gamma == 0.0 || gamma.abs() <= 1e-15 * (alpha * beta).sqrt() {
                    continue;
                }
                largest = largest.max(gamma.abs() / (alpha * beta).sqrt());
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                rotate(&mut columns, i, j, c, c * t);
                rotate(&mut z, i, j, c, c * t);
            }
        }
        if largest < 1e-14 {
            break;
        }
    }
    // `z` stores its columns as rows, as `columns` does.
    let s: Vec<f64> = columns.values.chunks_exact(columns.cols).map(|c| dot(c, c).sqrt()).collect();
    let v = Matrix::from_fn(columns.cols, k, |i, j| if s[j] > 0.0 { columns.at(j, i) / s[j] } else { 0.0 });
    (v, s, z.transposed())
}

/// Givens rotation: rows i and j become c i - s j and s i + c j.
fn rotate(m: &mut Matrix, i: usize, j: usize, c: f64, s: f64) {
    for k in 0..m.cols {
        let (x, y) = (m.at(i, k), m.at(j, k));
        m.values[i * m.cols + k] = c * x - s * y;
        m.values[j * m.cols + k] = s * x + c * y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = SplitMix64::new(seed);
        Matrix { rows, cols, values: (0..rows * cols).map(|_| rng.uniform() - 0.5).collect() }
    }

    fn distance(a: &Matrix, b: &Matrix) -> f64 {
        a.values.iter().zip(&b.values).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn known_singular_values_and_vectors_are_recovered_in_order() {
        // 200 x 150 is larger than the subspace, so that the power iteration is tested.
        let (u, v) = (orthonormal(noise(200, 100, 1)), orthonormal(noise(150, 100, 2)));
        let s = |j: usize| 10.0 * 0.9f64.powi(j as i32);
        let w = Matrix::from_fn(200, 100, |i, j| u.at(i, j) * s(j)).times(&v.transposed());
        let (left, found, right) = top_singular(&w, 8);
        for (j, found) in found.iter().enumerate() {
            assert!((found - s(j)).abs() < 1e-9, "{j}: {found}");
        }
        let scaled = Matrix::from_fn(200, 8, |i, j| left.at(i, j) * found[j]);
        let best = Matrix::from_fn(200, 8, |i, j| u.at(i, j) * s(j));
        let first = Matrix::from_fn(150, 8, |i, j| v.at(i, j));
        assert!(distance(&scaled.times(&right.transposed()), &best.times(&first.transposed())) < 1e-9);
    }

    #[test]
    fn q_is_orthonormal_and_q_times_r_is_w() {
        let w = noise(40, 12, 3);
        let (r, q) = olora(&w, 12);
        assert!(distance(&q.times(&r), &w) < 1e-13);
        let eye = Matrix::from_fn(12, 12, |i, j| f64::from(u8::from(i == j)));
        assert!(distance(&q.transposed().times(&q), &eye) < 1e-14);
        assert!((0..12).all(|i| (0..i).all(|j| r.at(i, j).abs() < 1e-13)), "R is upper triangular");
    }
}
