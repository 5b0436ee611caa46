//! LoRA on the lm_head (CPU): its contribution to a strip of logits, and its gradients, strip by strip. Nothing of size
//! (N, vocab) or (vocab, D) is allocated; beside the gradients themselves there are only (N, r) sums.
//!
//! h W^T + z B^T, z = s h A^T; with DoRA each column is multiplied by m / n. It does not depend on the softmax.
//! `cpu_strips.rs`, `cpu.rs` and `kl/cpu.rs` use it; read `cpu_strips.rs` next.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::ops::cpu::gemm::{Into, MR, Mat, NR, gemm};
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{Isa, Out, View, parallel, tensor, view};
use crate::ops::linear::low_rank::{BranchGradient, LowRank, NormAxis, divide_by_norms, transpose_scaled};
use crate::ops::weight::Weight;

/// Vocabulary columns per strip: logits that exist at once, per thread and position.
pub(crate) const STRIP: usize = 4 * NR;
/// The vocabulary is always divided into this many runs, whose sums are added in order: the same bits on any number of
/// cores.
pub(crate) const RUNS: usize = 8;

/// LoRA on the lm_head for some rows of hidden states.
pub(crate) struct HeadLora<'a> {
    /// The rows of the hidden states that this LoRA applies to.
    rows: Range<usize>,
    lora: LowRank<'a>,
    r: usize,
    vocab: usize,
    /// B (vocab, r).
    b: View<'a>,
    /// s h A^T (rows, r).
    z: Vec<f32>,
    /// DoRA's (m / n, n), with DoRA.
    scales: Option<(Vec<f32>, Arc<Vec<f32>>)>,
}

impl<'a> HeadLora<'a> {
    /// The LoRA of the lm_head `weight`, if any, for rows `rows` of hs (.., d).
    pub(crate) fn of(
        weight: &Weight,
        lora: Option<LowRank<'a>>,
        hs: &[f32],
        d: usize,
        rows: Range<usize>,
    ) -> Result<Option<Self>> {
        let Some(lora) = lora else { return Ok(None) };
        let (vocab, r) = (weight.rows(), lora.a.dims2()?.0);
        if lora.a.dims() != [r, d] || lora.b.dims() != [vocab, r] {
            candle_core::bail!("A {:?} and B {:?} do not fit a ({vocab}, {d}) lm_head", lora.a.dims(), lora.b.dims());
        }
        let n = rows.len();
        let mut z = vec![0f32; n * r];
        let (out, isa) = (Out::of(&mut z), Isa::detect());
        let columns = transpose_scaled(&view(lora.a)?, r, d, lora.scale as f32); // (d, r)
        parallel(n.div_ceil(MR), n * d * r, |tiles| {
            let (i0, i1) = (tiles.start * MR, n.min(tiles.end * MR));
            // SAFETY: rows i0..i1 of z belong to this part of the work.
            unsafe {
                let h = Mat::rows(hs, d).from(rows.start + i0, 0);
                gemm(isa, i1 - i0, r, d, h, Mat::rows(&columns, r), out.at(i0 * r), r, Into::Fresh);
            }
        });
        let scales = lora.dora.map(|dora| dora.scales(weight, lora, NormAxis::Rows)).transpose()?;
        Ok(Some(Self { rows, lora, r, vocab, b: view(lora.b)?, z, scales }))
    }

    /// Adds z B^T to columns `from..from + width` of a strip of products (.., STRIP) that starts with column `v0`.
    ///
    /// # Safety
    /// `logits` is the address of the strip, and no other thread uses it meanwhile.
    pub(crate) unsafe fn add(&self, v0: usize, from: usize, width: usize, logits: *mut f32) {
        let (n, r) = (self.rows.len(), self.r);
        with_scratch(r * NR, |panel| {
            panel.fill(0.0);
            for (i, row) in self.b[from * r..(from + width) * r].chunks_exact(r).enumerate() {
                for (j, &v) in row.iter().enumerate() {
                    panel[j * NR + i] = v;
                }
            }
            // SAFETY: the strip has these rows, of which columns from - v0.. are written.
            unsafe {
                let c = logits.add(self.rows.start * STRIP + from - v0);
                gemm(Isa::detect(), n, width, r, Mat::rows(&self.z, r), Mat::rows(panel, NR), c, STRIP, Into::Add);
            }
        });
    }

    /// Applies DoRA's scale to a strip of width `width`, with DoRA.
    pub(crate) fn scale(&self, v0: usize, width: usize, logits: &mut [f32]) {
        let Some((g, _)) = &self.scales else { return };
        for row in logits[self.rows.start * STRIP..self.rows.end * STRIP].chunks_exact_mut(STRIP) {
            row.iter_mut().zip(&g[v0..v0 + width]).for_each(|(l, g)| *l *= g);
        }
    }

    /// Whether the backward needs the products before [`HeadLora::scale`].
    pub(crate) fn needs_products(&self) -> bool {
        self.scales.is_some()
    }
}

/// Sums of the LoRA gradients over the strips of the vocabulary.
pub(crate) struct LoraSums<'s, 'a> {
    lora: &'s HeadLora<'a>,
    /// dL/dz per run (RUNS, rows, r), added in order at the end.
    dz: Vec<f32>,
    /// dL/dB (vocab, r).
    db: Vec<f32>,
    /// Sums of dL/dy u (vocab), with DoRA.
    dm: Vec<f32>,
}

/// The addresses that threads write to.
#[derive(Clone, Copy)]
pub(crate) struct LoraSumsOut {
    dz: Out,
    db: Out,
    dm: Out,
}

impl<'s, 'a> LoraSums<'s, 'a> {
    pub(crate) fn new(lora: &'s HeadLora<'a>) -> Self {
        let (n, r, v) = (lora.rows.len(), lora.r, lora.vocab);
        let dm = if lora.needs_products() { v } else { 0 };
        Self { lora, dz: vec![0.0; RUNS * n * r], db: vec![0.0; v * r], dm: vec![0.0; dm] }
    }

    pub(crate) fn out(&mut self) -> LoraSumsOut {
        LoraSumsOut { dz: Out::of(&mut self.dz), db: Out::of(&mut self.db), dm: Out::of(&mut self.dm) }
    }

    /// Returns (dL/dA, dL/dB, dL/dm) and adds LoRA's part of dL/dh to dh (rows, d); hs as in [`HeadLora::of`].
    pub(crate) fn finish(mut self, hs: &[f32], dh: &mut [f32]) -> Result<BranchGradient> {
        let (n, r, isa) = (self.lora.rows.len(), self.lora.r, Isa::detect());
        let (dz, rest) = self.dz.split_at_mut(n * r);
        for run in rest.chunks_exact(n * r) {
            dz.iter_mut().zip(run).for_each(|(a, b)| *a += b);
        }
        let scale = self.lora.lora.scale as f32;
        dz.iter_mut().for_each(|z| *z *= scale);
        let a = view(self.lora.lora.a)?;
        let d = a.len() / r;
        let mut da = vec![0f32; r * d];
        // SAFETY: dz is n x r, A r x d, h and dh n x d.
        unsafe {
            let h = Mat::rows(hs, d).from(self.lora.rows.start, 0);
            gemm(isa, n, d, r, Mat::rows(dz, r), Mat::rows(&a, d), dh.as_mut_ptr(), d, Into::Add);
            gemm(isa, r, d, n, Mat::rows(dz, r).t(), h, da.as_mut_ptr(), d, Into::Fresh);
        }
        let magnitude = self.lora.scales.as_ref().map(|(_, norms)| -> Result<Tensor> {
            let sums = self.dm.iter().map(|&s| f64::from(s)).collect();
            tensor(divide_by_norms(sums, norms), norms.len())
        });
        let db = tensor(self.db, (self.lora.vocab, r))?;
        Ok(BranchGradient::on_host(tensor(da, (r, d))?, db, magnitude.transpose()?))
    }
}

impl LoraSumsOut {
    /// Adds the contribution of a strip, whose `gradient` (rows, STRIP) by the scaled products becomes the one by the
    /// unscaled products. `products`: the unscaled products, with DoRA.
    ///
    /// # Safety
    /// Strip `v0..v0 + width` and run `run` belong to this thread.
    pub(crate) unsafe fn add(
        self,
        lora: &HeadLora<'_>,
        run: usize,
        (v0, width): (usize, usize),
        gradient: &mut [f32],
        products: &[f32],
    ) {
        let (n, r, isa) = (lora.rows.len(), lora.r, Isa::detect());
        if let Some((g, _)) = &lora.scales {
            // SAFETY: the strip's magnitudes belong to this thread.
            let dm = unsafe { self.dm.slice(v0, width) };
            for (row, products) in gradient.chunks_exact_mut(STRIP).zip(products.chunks_exact(STRIP)) {
                for (((d, &u), dm), &g) in row.iter_mut().zip(products).zip(&mut *dm).zip(&g[v0..v0 + width]) {
                    *dm += *d * u;
                    *d *= g;
                }
            }
        }
        // SAFETY: the strip's rows of dB and the run's dz are owned by this thread; the gradient is n x STRIP.
        unsafe {
            let (d, b) = (Mat::rows(gradient, STRIP), Mat::rows(&lora.b, r).from(v0, 0));
            gemm(isa, n, r, width, d, b, self.dz.at(run * n * r), r, Into::Add);
            gemm(isa, width, r, n, d.t(), Mat::rows(&lora.z, r), self.db.at(v0 * r), r, Into::Fresh);
        }
    }
}
