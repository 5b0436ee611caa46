//! LoRA and DoRA: the weights of one layer, their gradients, and DoRA's norms.
//!
//! DoRA: W' = m (W + s B A) / n, n being the Euclidean norms of the rows (arXiv:2402.09353). As in PEFT, n is treated
//! as a constant in the backward (section 4.3 there): with u = x (W + s B A)^T, y = (m / n) u, so dL/du = (m / n) dL/dy
//! and dL/dm = sum over tokens of dL/dy u / n. A row of norm 0 has no direction and gives 0. It does not depend on the
//! operations that use it: read `mod.rs` beside it, `embedding/mod.rs` and `logprobs/mod.rs`.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor, TensorId};

use crate::device::{Array, Device, Element};
use crate::ops::columns;
use crate::ops::cpu::gemm::{Into, Mat, NR, gemm};
use crate::ops::cpu::pack::rows_as_columns;
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{Isa, Out, parallel, tensor, vectorised, view};
use crate::ops::linear::gpu_low_rank::{DeviceLora, LoraGradient};
use crate::ops::weight::Weight;

/// LoRA weights of one linear layer: they add scale * (x a^T) b^T.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// A, (r, in) f32.
    pub a: &'a Tensor,
    /// B, (out, r) f32.
    pub b: &'a Tensor,
    /// lora_alpha / r, or lora_alpha / sqrt(r).
    pub scale: f64,
    /// The magnitude vector, with DoRA.
    pub dora: Option<Dora<'a>>,
    /// The cache of the copy on a device; without one, every use makes a copy.
    pub copy: Option<&'a LoraCopy>,
}

/// Identifies the tensors that a copy was made of.
type CopyKey = (TensorId, TensorId, Option<TensorId>, Element, bool);
type Copied = (CopyKey, Device, Arc<DeviceLora>);

/// The copy of one layer's LoRA weights on a device, made at its first use there; an optimiser step makes new tensors and so
/// a new copy. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LoraCopy(Arc<Mutex<Option<Copied>>>);

impl LowRank<'_> {
    /// The LoRA weights on a device, for products in `operand`.
    ///
    /// # Errors
    /// If device memory is out.
    pub fn on(&self, device: &Device, operand: Element) -> anyhow::Result<Arc<DeviceLora>> {
        self.copied(device, operand, false)
    }

    /// The same with factors in f32 beside those in `operand`, which a lookup of single columns needs.
    ///
    /// # Errors
    /// As for [`LowRank::on`].
    pub fn exact_on(&self, device: &Device, operand: Element) -> anyhow::Result<Arc<DeviceLora>> {
        self.copied(device, operand, true)
    }

    fn copied(&self, device: &Device, operand: Element, exact: bool) -> anyhow::Result<Arc<DeviceLora>> {
        let magnitude = self.dora.map(|dora| dora.magnitude);
        let key = (self.a.id(), self.b.id(), magnitude.map(Tensor::id), operand, exact);
        let unshared = LoraCopy::default();
        let mut slot = self.copy.unwrap_or(&unshared).0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, place, copy)) = &*slot
            && *of == key
            && place.ptr_eq(device)
        {
            return Ok(copy.clone());
        }
        *slot = None;
        let ((r, k), (n, _)) = (self.a.dims2()?, self.b.dims2()?);
        let (a, b, scale) = (view(self.a)?, view(self.b)?, self.scale as f32);
        let magnitude = magnitude.map(view).transpose()?;
        let make = if exact { DeviceLora::new_exact } else { DeviceLora::new };
        let copy = Arc::new(make(device, operand, &a, (r, k), &b, n, scale, magnitude.as_deref())?);
        *slot = Some((key, device.clone(), copy.clone()));
        Ok(copy)
    }
}

/// Gradients of one layer's LoRA weights, on the machine of the pass that computed them.
#[derive(Clone, Debug)]
pub struct BranchGradient {
    /// dL/dA (r, in) f32.
    pub a: Array,
    /// dL/dB (out, r) f32.
    pub b: Array,
    /// dL/dm f32, with DoRA: (out) on the host, (1, out) on a device.
    pub magnitude: Option<Array>,
}

impl From<(Tensor, Tensor)> for BranchGradient {
    fn from((a, b): (Tensor, Tensor)) -> Self {
        Self::on_host(a, b, None)
    }
}

impl From<LoraGradient> for BranchGradient {
    fn from(g: LoraGradient) -> Self {
        Self { a: g.a.into(), b: g.b.into(), magnitude: g.magnitude.map(Array::from) }
    }
}

impl BranchGradient {
    pub(crate) fn on_host(a: Tensor, b: Tensor, magnitude: Option<Tensor>) -> Self {
        Self { a: a.into(), b: b.into(), magnitude: magnitude.map(Array::from) }
    }

    /// The sum with the same layer's gradients of another micro-batch.
    ///
    /// # Errors
    /// If shapes or machines differ.
    pub fn sum(&self, other: &Self) -> anyhow::Result<Self> {
        let magnitude = match (&self.magnitude, &other.magnitude) {
            (Some(Array::Host(m)), Some(more)) => Some(Array::Host((m + more.host()?)?)),
            (Some(m), Some(more)) => Some(columns::add(m, more, 1.0)?),
            (one, other) => one.as_ref().or(other.as_ref()).cloned(),
        };
        Ok(Self { a: columns::add(&self.a, &other.a, 1.0)?, b: columns::add(&self.b, &other.b, 1.0)?, magnitude })
    }

    /// The gradients times a factor.
    ///
    /// # Errors
    /// If memory is out.
    pub fn scaled(&self, factor: f32) -> anyhow::Result<Self> {
        let magnitude = match &self.magnitude {
            Some(Array::Host(m)) => Some(Array::Host((m * f64::from(factor))?)),
            Some(m) => Some(columns::scale(m, factor)?),
            None => None,
        };
        Ok(Self { a: columns::scale(&self.a, factor)?, b: columns::scale(&self.b, factor)?, magnitude })
    }

    /// Puts the gradients of many branches onto the host; those of a device are waited for once.
    ///
    /// # Errors
    /// If a download fails.
    pub fn all_to_host<'g>(branches: impl Iterator<Item = &'g mut Self>) -> anyhow::Result<()> {
        let (mut arrays, mut magnitudes) = (vec![], vec![]);
        for Self { a, b, magnitude } in branches {
            arrays.extend([a, b]);
            magnitudes.extend(magnitude.as_mut().filter(|m| matches!(m, Array::Device(_))));
        }
        // A magnitude is a vector on the host and a matrix of one row on a device.
        let mut vectors: Vec<Array> = magnitudes.iter().map(|m| (**m).clone()).collect();
        arrays.extend(&mut vectors);
        Array::all_to_host(arrays)?;
        for (magnitude, vector) in magnitudes.into_iter().zip(vectors) {
            *magnitude = Array::Host(vector.host()?.flatten_all()?);
        }
        Ok(())
    }
}

/// Identifies the matrix and the factors that norms belong to.
type NormsKey = (u64, TensorId, TensorId);
type CachedNorms = (NormsKey, Arc<Vec<f32>>);

/// A cache of one layer's norms, computed once per matrix and pair of factors; an optimiser step makes new factors and
/// so new norms. Clones share the cache.
#[derive(Clone, Debug, Default)]
pub struct Norms(Arc<Mutex<Option<CachedNorms>>>);

/// The additional parameters of DoRA.
#[derive(Clone, Copy)]
pub struct Dora<'a> {
    /// m, (out) f32; (D) for an embedding matrix.
    pub magnitude: &'a Tensor,
    /// The cache of n.
    pub norms: &'a Norms,
}

/// Whether norms are of the rows or of the columns of the stored matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormAxis {
    /// Rows of W + s B A: the outputs of a linear layer.
    Rows,
    /// Columns of W + s (B A)^T: an embedding matrix, whose outputs are the elements of a row.
    Columns,
}

impl Norms {
    /// n of `weight` and `lora`.
    ///
    /// # Errors
    /// If a factor is not a contiguous f32 tensor on the CPU, or sizes do not fit.
    pub fn of(&self, weight: &Weight, lora: LowRank<'_>, axis: NormAxis) -> Result<Arc<Vec<f32>>> {
        let key = (weight.id(), lora.a.id(), lora.b.id());
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, norms)) = &*cached
            && *of == key
        {
            return Ok(norms.clone());
        }
        let norms = Arc::new(match axis {
            NormAxis::Rows => row_norms(weight, lora)?,
            NormAxis::Columns => column_norms(weight, lora)?,
        });
        *cached = Some((key, norms.clone()));
        Ok(norms)
    }
}

impl Dora<'_> {
    /// (g, n): g = m / n, or 0 if n is 0.
    ///
    /// # Errors
    /// As for [`Norms::of`]; if m has another length.
    pub fn scales(&self, weight: &Weight, lora: LowRank<'_>, axis: NormAxis) -> Result<(Vec<f32>, Arc<Vec<f32>>)> {
        let norms = self.norms.of(weight, lora, axis)?;
        let m = view(self.magnitude)?;
        if m.len() != norms.len() {
            candle_core::bail!("{} magnitudes for {} outputs", m.len(), norms.len());
        }
        let g = m.iter().zip(norms.iter()).map(|(&m, &n)| if n > 0.0 { m / n } else { 0.0 }).collect();
        Ok((g, norms))
    }
}

/// Euclidean norms (out) of the rows of W + s B A, W unpacked a panel at a time.
///
/// # Errors
/// If the factors do not fit the matrix.
pub fn row_norms(weight: &Weight, lora: LowRank<'_>) -> Result<Vec<f32>> {
    let (n, k) = (weight.rows(), weight.cols());
    let (r, _) = lora.a.dims2()?;
    if lora.a.dims() != [r, k] || lora.b.dims() != [n, r] {
        candle_core::bail!("A {:?} and B {:?} do not fit a ({n}, {k}) matrix", lora.a.dims(), lora.b.dims());
    }
    let (a, b, isa) = (view(lora.a)?, view(lora.b)?, Isa::detect());
    let mut norms = vec![0f32; n];
    let out = Out::of(&mut norms);
    parallel(n.div_ceil(NR), n * k * (r + 1), |panels| {
        for n0 in panels.map(|p| p * NR) {
            let width = NR.min(n - n0);
            with_scratch((k + r) * NR, |scratch| {
                let (panel, factor) = scratch.split_at_mut(k * NR);
                rows_as_columns(weight, n0..n0 + width, panel);
                factor.fill(0.0);
                for (i, row) in b[n0 * r..(n0 + width) * r].chunks_exact(r).enumerate() {
                    for (j, &v) in row.iter().enumerate() {
                        factor[j * NR + i] = v * lora.scale as f32;
                    }
                }
                // SAFETY: A^T is k x r, the factor r x NR, the panel k x NR.
                unsafe {
                    let (a, b) = (Mat::rows(&a, k).t(), Mat::rows(factor, NR));
                    gemm(isa, k, NR, r, a, b, panel.as_mut_ptr(), NR, Into::Add);
                }
                let squares = squares_of_columns(panel);
                // SAFETY: rows n0..n0 + width belong to this panel alone.
                let norms = unsafe { out.slice(n0, width) };
                norms.iter_mut().zip(squares).for_each(|(n, s)| *n = s.sqrt() as f32);
            });
        }
    });
    Ok(norms)
}

/// Sums of squares of a panel's NR columns, in f32 over blocks of 64 rows and in f64 over the blocks, for precision.
fn squares_of_columns(panel: &[f32]) -> [f64; NR] {
    let mut sums = [0f64; NR];
    for rows in panel.chunks(NR * 64) {
        let mut lanes = [0f32; NR];
        squares(rows, &mut lanes);
        sums.iter_mut().zip(lanes).for_each(|(s, l)| *s += f64::from(l));
    }
    sums
}

vectorised! {
    fn squares(rows: &[f32], lanes: &mut [f32; NR]) {
        for row in rows.chunks_exact(NR) {
            for (lane, &v) in lanes.iter_mut().zip(row) {
                *lane += v * v;
            }
        }
    }
}

/// Euclidean norms (D) of the columns of an embedding matrix W (V, D) plus s (B A)^T, A (r, V), B (D, r).
///
/// # Errors
/// If the factors do not fit the matrix.
pub fn column_norms(table: &Weight, lora: LowRank<'_>) -> Result<Vec<f32>> {
    /// Rows that are dense at once. The sums of groups are added in order: the same bits on any number of cores.
    const ROWS: usize = 64;
    let (v, d) = (table.rows(), table.cols());
    let (r, _) = lora.a.dims2()?;
    if lora.a.dims() != [r, v] || lora.b.dims() != [d, r] {
        candle_core::bail!("A {:?} and B {:?} do not fit a ({v}, {d}) table", lora.a.dims(), lora.b.dims());
    }
    let (a, b, isa) = (view(lora.a)?, transpose_scaled(&view(lora.b)?, d, r, lora.scale as f32), Isa::detect());
    let groups = v.div_ceil(ROWS);
    let mut sums = vec![0f32; groups * d];
    let out = Out::of(&mut sums);
    parallel(groups, v * d * (r + 1), |range| {
        for group in range {
            let (v0, rows) = (group * ROWS, ROWS.min(v - group * ROWS));
            with_scratch(rows * d, |dense| {
                for (i, row) in dense.chunks_exact_mut(d).enumerate() {
                    table.row(v0 + i, row);
                }
                // SAFETY: columns v0..v0 + rows of A (r, V) transposed, the factor r x d, the rows dense.
                unsafe {
                    let a = Mat::rows(&a, v).from(0, v0).t();
                    gemm(isa, rows, d, r, a, Mat::rows(&b, d), dense.as_mut_ptr(), d, Into::Add);
                }
                // SAFETY: this group's sums.
                let sums = unsafe { out.slice(group * d, d) };
                for row in dense.chunks_exact(d) {
                    sums.iter_mut().zip(row).for_each(|(s, x)| *s += x * x);
                }
            });
        }
    });
    let mut all = vec![0f64; d];
    for group in sums.chunks_exact(d) {
        all.iter_mut().zip(group).for_each(|(a, &s)| *a += f64::from(s));
    }
    Ok(all.into_iter().map(|s| s.sqrt() as f32).collect())
}

/// scale B^T (r, n) of B (n, r).
pub(crate) fn transpose_scaled(b: &[f32], n: usize, r: usize, scale: f32) -> Vec<f32> {
    let mut out = vec![0f32; r * n];
    for (i, row) in b.chunks_exact(r.max(1)).enumerate() {
        for (j, &v) in row.iter().enumerate() {
            out[j * n + i] = v * scale;
        }
    }
    out
}

vectorised! {
    fn scale_row(row: &[f32], g: &[f32], out: &mut [f32]) {
        for ((o, &x), &g) in out.iter_mut().zip(row).zip(g) {
            *o = x * g;
        }
    }
}

/// u (N, out) with column j multiplied by g\[j\].
///
/// # Errors
/// If u is not an f32 matrix.
pub fn scale_columns(u: &Tensor, g: &[f32]) -> Result<Tensor> {
    let (m, n) = u.dims2()?;
    let us = view(u)?;
    let mut y = vec![0f32; m * n];
    for (row, out) in us.chunks_exact(n.max(1)).zip(y.chunks_exact_mut(n.max(1))) {
        scale_row(row, g, out);
    }
    tensor(y, (m, n))
}

/// dL/dm (out) = sum over tokens of dL/dy u / n, of dL/dy and u (N, out).
///
/// # Errors
/// If shapes differ.
pub fn magnitude_gradient(dy: &[f32], u: &[f32], norms: &[f32]) -> Result<Tensor> {
    let n = norms.len();
    let mut sums = vec![0f64; n];
    for (dy, u) in dy.chunks_exact(n.max(1)).zip(u.chunks_exact(n.max(1))) {
        for ((s, &dy), &u) in sums.iter_mut().zip(dy).zip(u) {
            *s += f64::from(dy) * f64::from(u);
        }
    }
    tensor(divide_by_norms(sums, norms), n)
}

/// Sums of dL/dy u -> dL/dm.
pub(crate) fn divide_by_norms(sums: Vec<f64>, norms: &[f32]) -> Vec<f32> {
    sums.into_iter().zip(norms).map(|(s, &n)| if n > 0.0 { (s / f64::from(n)) as f32 } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Array;
    use crate::ops::embedding;
    use crate::ops::linear;
    use crate::ops::linear::{InputGradient, LinearWithLora};
    use crate::ops::weight::StorageDType;
    use crate::rng::SplitMix64;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        (0..n).map(|_| rng.uniform() as f32 - 0.5).collect()
    }

    fn matrix(rows: usize, cols: usize, seed: u64) -> Tensor {
        tensor(random(rows * cols, seed), (rows, cols)).unwrap()
    }

    fn plain<'a>(a: &'a Tensor, b: &'a Tensor) -> LowRank<'a> {
        LowRank { a, b, scale: 1.5, dora: None, copy: None }
    }

    #[test]
    fn norms_of_rows_and_columns_equal_f64_sums_for_every_storage_type() {
        let (n, k, r) = (45, 256, 3);
        let dense = Weight::from_f32(&random(n * k, 1), n, k).unwrap();
        for dtype in [None, Some(StorageDType::Q4K), Some(StorageDType::Q8_0), Some(StorageDType::BF16)] {
            let weight = dtype.map_or(dense.clone(), |dtype| dense.quantised(dtype).unwrap());
            let sums = |a: &Tensor, b: &Tensor, of_rows: bool| -> Vec<f64> {
                let (a, b) = (a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
                let mut sums = vec![0f64; if of_rows { n } else { k }];
                for (i, row) in weight.to_f32().chunks(k).enumerate() {
                    for (j, &w) in row.iter().enumerate() {
                        // LoRA adds B A to a linear layer and (B A)^T to an embedding matrix.
                        let (out_features, in_features) = if of_rows { (i, j) } else { (j, i) };
                        let product: f64 =
                            (0..r).map(|q| f64::from(b[out_features][q]) * f64::from(a[q][in_features])).sum();
                        sums[out_features] += (f64::from(w) + 1.5 * product).powi(2);
                    }
                }
                sums.into_iter().map(f64::sqrt).collect()
            };
            let (a, b) = (matrix(r, k, 2), matrix(n, r, 3));
            let (a_table, b_table) = (matrix(r, n, 4), matrix(k, r, 5));
            for (got, want) in [
                (row_norms(&weight, plain(&a, &b)).unwrap(), sums(&a, &b, true)),
                (column_norms(&weight, plain(&a_table, &b_table)).unwrap(), sums(&a_table, &b_table, false)),
            ] {
                for (got, want) in got.iter().zip(want) {
                    assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "{got} {want}");
                }
            }
            assert!(
                row_norms(&weight, plain(&a_table, &b_table)).is_err() && column_norms(&weight, plain(&a, &b)).is_err()
            );
        }
    }

    #[test]
    fn a_row_of_zeros_gives_zero_and_finite_gradients() {
        let (n, k, r) = (4, 6, 2);
        let mut values = random(n * k, 1);
        values[k..2 * k].fill(0.0);
        let weight = Weight::from_f32(&values, n, k).unwrap();
        let (a, b) = (matrix(r, k, 2), tensor(vec![0.0; n * r], (n, r)).unwrap());
        let (magnitude, norms) = (tensor(vec![0.7; n], n).unwrap(), Norms::default());
        let lora = LowRank { dora: Some(Dora { magnitude: &magnitude, norms: &norms }), ..plain(&a, &b) };
        let (x, dy) = (Array::Host(matrix(5, k, 3)), Array::Host(matrix(5, n, 4)));
        let part = [LinearWithLora { weight: &weight, dequantised: None, bias: None, lora: Some(lora) }];
        let (y, saved) = linear::forward(&x, &part, None).unwrap();
        let g = linear::backward(&x, &part, &saved, &[&dy], InputGradient::Wanted).unwrap();
        assert!(y[0].host().unwrap().to_vec2::<f32>().unwrap().iter().all(|row| row[1] == 0.0 && row[0] != 0.0));
        let gradient = g.lora[0].as_ref().unwrap();
        let magnitudes: Vec<f32> = gradient.magnitude.as_ref().unwrap().host().unwrap().to_vec1().unwrap();
        assert!(magnitudes[1] == 0.0 && magnitudes[0] != 0.0);
        for t in [&gradient.a, &gradient.b, g.input.as_ref().unwrap()].map(|t| t.host().unwrap()) {
            assert!(t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
        }
    }

    #[test]
    fn a_repeated_token_gets_both_gradients_and_one_outside_the_vocabulary_is_refused() {
        let (v, d, r) = (7, 4, 2);
        let table = Weight::from_f32(&random(v * d, 1), v, d).unwrap();
        let (a, b) = (matrix(r, v, 2), matrix(d, r, 3));
        let gradient = |ids: &[u32], dx: &Tensor| {
            let (_, saved) = embedding::forward(&table, ids, Some(plain(&a, &b))).unwrap();
            let dx = Array::Host(dx.clone());
            embedding::backward(&table, ids, plain(&a, &b), &saved.unwrap(), &dx)
                .unwrap()
                .a
                .host()
                .unwrap()
                .to_vec2::<f32>()
                .unwrap()
        };
        let (one, two) = (matrix(1, d, 4), matrix(1, d, 5));
        let (first, second) = (gradient(&[3], &one), gradient(&[3], &two));
        let both = gradient(&[3, 3], &Tensor::cat(&[&one, &two], 0).unwrap());
        for (j, row) in both.iter().enumerate() {
            assert!((row[3] - first[j][3] - second[j][3]).abs() < 1e-6 && row[2] == 0.0);
        }
        assert!(embedding::forward(&table, &[7], None).err().unwrap().to_string().contains("vocabulary of 7"));
    }
}
