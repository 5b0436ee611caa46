//! A low-rank branch on the table of the logits: what it adds to a strip of products, and its gradients, strip by strip.
//! Nothing (N, vocab) is held, and no (vocab, D): beside the factors' own gradients only (N, r) sums.
//!
//! h W^T + z B^T, z = s h A^T; with DoRA each column times m / n. Knows no softmax; head.rs and divergence.rs call it.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::ops::cpu::gemm::{Into, MR, Mat, NR, gemm};
use crate::ops::cpu::pack::with_scratch;
use crate::ops::cpu::{Isa, Out, View, parallel, tensor, view};
use crate::ops::linear::low_rank::{Lines, finished, transposed};
use crate::ops::linear::{BranchGradient, LowRank};
use crate::ops::logprobs::{LmHead, RUNS, STRIP};

/// The branch over some rows of hidden states.
pub(crate) struct HeadBranch<'a> {
    /// Which rows of all that are multiplied together.
    rows: Range<usize>,
    lora: LowRank<'a>,
    r: usize,
    vocab: usize,
    /// B (vocab, r).
    b: View<'a>,
    /// (rows, r).
    z: Vec<f32>,
    /// (m / n, n), with DoRA.
    scales: Option<(Vec<f32>, Arc<Vec<f32>>)>,
}

impl<'a> HeadBranch<'a> {
    /// The table's branch, if it has one, over rows `rows` of hs (.., d).
    pub(crate) fn of(table: &LmHead<'a>, hs: &[f32], d: usize, rows: Range<usize>) -> Result<Option<Self>> {
        let Some(lora) = table.lora else { return Ok(None) };
        let (vocab, r) = (table.weight.rows(), lora.a.dims2()?.0);
        if lora.a.dims() != [r, d] || lora.b.dims() != [vocab, r] {
            candle_core::bail!("A {:?} and B {:?} do not fit a ({vocab}, {d}) table", lora.a.dims(), lora.b.dims());
        }
        let n = rows.len();
        let mut z = vec![0f32; n * r];
        let (out, isa) = (Out::of(&mut z), Isa::detect());
        let columns = transposed(&view(lora.a)?, r, d, lora.scale as f32); // (d, r)
        parallel(n.div_ceil(MR), n * d * r, |tiles| {
            let (i0, i1) = (tiles.start * MR, n.min(tiles.end * MR));
            // SAFETY: rows i0..i1 of z belong to this part of the work.
            unsafe {
                let h = Mat::rows(hs, d).from(rows.start + i0, 0);
                gemm(isa, i1 - i0, r, d, h, Mat::rows(&columns, r), out.at(i0 * r), r, Into::Fresh);
            }
        });
        let scales = lora.dora.map(|dora| dora.scales(table.weight, lora, Lines::Rows)).transpose()?;
        Ok(Some(Self { rows, lora, r, vocab, b: view(lora.b)?, z, scales }))
    }

    /// Adds the branch to columns `from..from + width` of a strip of products (.., STRIP), which begins with column `v0`.
    ///
    /// # Safety
    /// `logits` is the strip's address, and nobody else's meanwhile.
    pub(crate) unsafe fn add(&self, v0: usize, from: usize, width: usize, logits: *mut f32) {
        let (n, r) = (self.rows.len(), self.r);
        with_scratch(r * NR, |panel| {
            panel.fill(0.0);
            for (i, row) in self.b[from * r..(from + width) * r].chunks_exact(r).enumerate() {
                for (j, &v) in row.iter().enumerate() {
                    panel[j * NR + i] = v;
                }
            }
            // SAFETY: the strip has this branch's rows, of which columns from - v0.. are written.
            unsafe {
                let c = logits.add(self.rows.start * STRIP + from - v0);
                gemm(Isa::detect(), n, width, r, Mat::rows(&self.z, r), Mat::rows(panel, NR), c, STRIP, Into::Add);
            }
        });
    }

    /// Scales a strip of width `width`, where it is DoRA.
    pub(crate) fn scale(&self, v0: usize, width: usize, logits: &mut [f32]) {
        let Some((g, _)) = &self.scales else { return };
        for row in logits[self.rows.start * STRIP..self.rows.end * STRIP].chunks_exact_mut(STRIP) {
            row.iter_mut().zip(&g[v0..v0 + width]).for_each(|(l, g)| *l *= g);
        }
    }

    /// Whether the backward needs the products before [`HeadBranch::scale`].
    pub(crate) fn wants_products(&self) -> bool {
        self.scales.is_some()
    }
}

/// Sums of a branch's gradients while the vocabulary goes by.
pub(crate) struct BranchSums<'s, 'a> {
    branch: &'s HeadBranch<'a>,
    /// (RUNS, rows, r): each run's own, added in order at the end.
    dz: Vec<f32>,
    /// (vocab, r).
    db: Vec<f32>,
    /// (vocab): sums of dL/dy u.
    dm: Vec<f32>,
}

/// Where the threads write.
#[derive(Clone, Copy)]
pub(crate) struct SumsOut {
    dz: Out,
    db: Out,
    dm: Out,
}

impl<'s, 'a> BranchSums<'s, 'a> {
    pub(crate) fn new(branch: &'s HeadBranch<'a>) -> Self {
        let (n, r, v) = (branch.rows.len(), branch.r, branch.vocab);
        let dm = if branch.wants_products() { v } else { 0 };
        Self { branch, dz: vec![0.0; RUNS * n * r], db: vec![0.0; v * r], dm: vec![0.0; dm] }
    }

    pub(crate) fn out(&mut self) -> SumsOut {
        SumsOut { dz: Out::of(&mut self.dz), db: Out::of(&mut self.db), dm: Out::of(&mut self.dm) }
    }

    /// (dL/dA, dL/dB, dL/dm), and dL/dh of the branch added to dh (rows, d), of the same hs as in [`HeadBranch::of`].
    pub(crate) fn finish(mut self, hs: &[f32], dh: &mut [f32]) -> Result<BranchGradient> {
        let (n, r, isa) = (self.branch.rows.len(), self.branch.r, Isa::detect());
        let (dz, rest) = self.dz.split_at_mut(n * r);
        for run in rest.chunks_exact(n * r) {
            dz.iter_mut().zip(run).for_each(|(a, b)| *a += b);
        }
        let scale = self.branch.lora.scale as f32;
        dz.iter_mut().for_each(|z| *z *= scale);
        let a = view(self.branch.lora.a)?;
        let d = a.len() / r;
        let mut da = vec![0f32; r * d];
        // SAFETY: dz is n x r, A r x d, h and dh n x d.
        unsafe {
            let h = Mat::rows(hs, d).from(self.branch.rows.start, 0);
            gemm(isa, n, d, r, Mat::rows(dz, r), Mat::rows(&a, d), dh.as_mut_ptr(), d, Into::Add);
            gemm(isa, r, d, n, Mat::rows(dz, r).t(), h, da.as_mut_ptr(), d, Into::Fresh);
        }
        let magnitude = self.branch.scales.as_ref().map(|(_, norms)| -> Result<Tensor> {
            let sums = self.dm.iter().map(|&s| f64::from(s)).collect();
            tensor(finished(sums, norms), norms.len())
        });
        Ok(BranchGradient {
            a: tensor(da, (r, d))?,
            b: tensor(self.db, (self.branch.vocab, r))?,
            magnitude: magnitude.transpose()?,
        })
    }
}

impl SumsOut {
    /// Adds a strip's gradients by its scaled products, (rows, STRIP), and turns them into those by the unscaled ones.
    /// `products`: those, where they are wanted.
    ///
    /// # Safety
    /// Strip `v0..v0 + width` and run `run` are one thread's.
    pub(crate) unsafe fn add(
        self,
        branch: &HeadBranch<'_>,
        run: usize,
        (v0, width): (usize, usize),
        gradient: &mut [f32],
        products: &[f32],
    ) {
        let (n, r, isa) = (branch.rows.len(), branch.r, Isa::detect());
        if let Some((g, _)) = &branch.scales {
            // SAFETY: the strip's magnitudes are this thread's.
            let dm = unsafe { self.dm.slice(v0, width) };
            for (row, products) in gradient.chunks_exact_mut(STRIP).zip(products.chunks_exact(STRIP)) {
                for (((d, &u), dm), &g) in row.iter_mut().zip(products).zip(&mut *dm).zip(&g[v0..v0 + width]) {
                    *dm += *d * u;
                    *d *= g;
                }
            }
        }
        // SAFETY: the strip's rows of dB and the run's dz are this thread's; the gradient is n x STRIP.
        unsafe {
            let (d, b) = (Mat::rows(gradient, STRIP), Mat::rows(&branch.b, r).from(v0, 0));
            gemm(isa, n, r, width, d, b, self.dz.at(run * n * r), r, Into::Add);
            gemm(isa, width, r, n, d.t(), Mat::rows(&branch.z, r), self.db.at(v0 * r), r, Into::Fresh);
        }
    }
}
