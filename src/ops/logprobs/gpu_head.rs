//! The lm_head on a device, a strip of the vocabulary at a time: products with hidden states, LoRA and DoRA on them, and
//! the gradients that a strip adds. (R, vocab) logits are never allocated. It does not depend on the softmax: `gpu.rs`
//! beside it and `kl/gpu.rs` have the kernels. Read `mod.rs` for the use.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;

use super::gpu::{DeviceStats, Loss, Running, Shape, backward as strip_gradient};
use super::{Gradients, LmHead, TokenStats};
use crate::device::{Element, Matrix};
use crate::ops::columns::gpu::{add_sums, affine_in_place, cast, over_norms, scale};
use crate::ops::linear::gpu::{DeviceLora, LoraGradient, product, sum_over_rows};
use crate::ops::storage::gpu::DeviceWeight;

/// Bytes of one strip's f32 logits at most, unless 256 ids take more.
const LOGITS_BYTES: usize = 64 << 20;
/// Bytes of one strip's dequantised rows at most, unless 256 ids take more.
const ROWS_BYTES: usize = 128 << 20;
/// Strips have a multiple of so many ids.
const IDS: usize = 256;

/// Hidden states in front of an lm_head, with the LoRA weights that one role has on it.
pub(crate) struct Rows {
    /// h (R, D) in the operands' type.
    h: Matrix,
    /// z = s h A^T (R, r) in the operands' type, if there are LoRA weights.
    z: Option<Matrix>,
    lora: Option<Arc<DeviceLora>>,
}

/// The lm_head's matrix on a device, and how its vocabulary is cut into strips.
pub(crate) struct Head {
    weight: Arc<DeviceWeight>,
    operand: Element,
    /// Ids per strip.
    strip: usize,
}

/// Where the rows of a strip come from.
enum Source {
    /// The whole matrix in the operands' type.
    Dense(Matrix),
    /// Room for one strip.
    Scratch(Matrix),
}

/// The sums of an lm_head's gradients while the strips go by.
pub(crate) struct Sums {
    /// dL/dh (R, D) f32.
    dh: Matrix,
    begun: bool,
    lora: Option<LoraSums>,
}

struct LoraSums {
    /// dL/dz (R, r) f32.
    dz: Matrix,
    /// dL/dB (vocab, r) f32.
    db: Matrix,
    /// The sums over rows of dL/dy u, (vocab, 1) f32, with DoRA.
    dm: Option<Matrix>,
}

impl Shape {
    /// What the lm_head and the temperature do to products before the softmax.
    pub(crate) fn of(head: &LmHead<'_>, temperature: f64) -> Self {
        Self { multiplier: head.multiplier, soft_cap: head.soft_cap, temperature }
    }
}

impl Head {
    /// The lm_head for `rows` rows of h.
    pub(crate) fn of(h: &Matrix, head: &LmHead<'_>) -> Result<Self> {
        let weight = head.weight.on(h.device())?;
        let operand = head.weight.compute().element();
        let by_logits = LOGITS_BYTES / (Element::F32.bytes() * h.rows().max(1));
        let by_rows = ROWS_BYTES / (operand.bytes() * weight.cols());
        let strip = (by_logits.min(by_rows) / IDS * IDS).max(IDS).min(weight.rows());
        Ok(Self { weight, operand, strip })
    }

    /// Hidden states as operands of the strips' products.
    pub(crate) fn rows(&self, h: &Matrix, head: &LmHead<'_>) -> Result<Rows> {
        let h = cast(h, self.operand)?;
        let lora = head.lora.map(|lora| lora.on(h.device(), self.operand)).transpose()?;
        let z = match &lora {
            None => None,
            Some(lora) => {
                let z = h.device().matrix(self.operand, h.rows(), lora.rank())?;
                let shape = (h.rows(), lora.rank(), h.cols());
                product(shape, (h.whole(), false), (lora.a_operand().whole(), true), z.whole(), (lora.scale(), 0.0))?;
                Some(z)
            }
        };
        Ok(Rows { h, z, lora })
    }

    /// Calls `each(ids, W of these ids)` for every strip in order.
    pub(crate) fn strips(&self, mut each: impl FnMut(Range<usize>, &Matrix) -> Result<()>) -> Result<()> {
        let source = self.source()?;
        for first in (0..self.weight.rows()).step_by(self.strip) {
            let ids = first..self.weight.rows().min(first + self.strip);
            let w = self.matrix(&source, &ids)?;
            each(ids, &w)?;
        }
        Ok(())
    }

    /// Calls `each(ids, W of these ids here, W of them in the other)` for every strip of the ids that both have, in order.
    pub(crate) fn strips_of_both(
        &self,
        other: &Self,
        mut each: impl FnMut(Range<usize>, &Matrix, &Matrix) -> Result<()>,
    ) -> Result<()> {
        let (strip, all) = (self.strip.min(other.strip), self.weight.rows().min(other.weight.rows()));
        let (ours, theirs) = (self.source()?, other.source()?);
        for first in (0..all).step_by(strip) {
            let ids = first..all.min(first + strip);
            let (w, v) = (self.matrix(&ours, &ids)?, other.matrix(&theirs, &ids)?);
            each(ids, &w, &v)?;
        }
        Ok(())
    }

    fn source(&self) -> Result<Source> {
        Ok(match self.weight.dense(self.operand) {
            Some(dense) => Source::Dense(dense),
            None => Source::Scratch(self.weight.device().matrix(self.operand, self.strip, self.weight.cols())?),
        })
    }

    /// W of a strip's ids; the one before it is overwritten where the matrix is dequantised.
    fn matrix(&self, source: &Source, ids: &Range<usize>) -> Result<Matrix> {
        match source {
            Source::Dense(dense) => dense.row_range(ids.clone()),
            Source::Scratch(scratch) => {
                let w = scratch.row_range(0..ids.len())?;
                self.weight.dequantise(ids.clone(), &w)?;
                Ok(w)
            }
        }
    }

    /// A buffer for one strip's numbers.
    pub(crate) fn buffer(&self, element: Element, rows: usize) -> Result<Matrix> {
        self.weight.device().matrix(element, rows * self.strip, 1)
    }

    /// The part of a buffer that a strip takes, (R, width).
    pub(crate) fn part(buffer: &Matrix, rows: usize, width: usize) -> Result<Matrix> {
        buffer.row_range(0..rows * width)?.reshape(rows, width)
    }

    /// y (R, width) f32 of one strip: h W^T + z B^T, and with DoRA (m / norm) times that. `unscaled` receives the products
    /// before DoRA's factor.
    pub(crate) fn products(
        &self,
        rows: &Rows,
        ids: &Range<usize>,
        w: &Matrix,
        y: &Matrix,
        unscaled: Option<&Matrix>,
    ) -> Result<()> {
        let (r, d, width) = (rows.h.rows(), rows.h.cols(), ids.len());
        product((r, width, d), (rows.h.whole(), false), (w.whole(), true), y.whole(), (1.0, 0.0))?;
        let Some((lora, z)) = rows.lora.as_ref().zip(rows.z.as_ref()) else { return Ok(()) };
        let b = lora.b_operand().row_range(ids.clone())?;
        product((r, width, lora.rank()), (z.whole(), false), (b.whole(), true), y.whole(), (1.0, 1.0))?;
        if let Some(scales) = lora.row_scales(&self.weight)? {
            if let Some(unscaled) = unscaled {
                unscaled.copy_from(y)?;
            }
            affine_in_place(y, Some(&columns(&scales.factors, ids)?), None)?;
        }
        Ok(())
    }

    /// Gradients that are zero so far.
    pub(crate) fn sums(&self, rows: &Rows) -> Result<Sums> {
        let (device, r) = (rows.h.device(), rows.h.rows());
        let lora = match &rows.lora {
            None => None,
            Some(lora) => {
                let (vocab, rank) = (self.weight.rows(), lora.rank());
                let dm = lora.magnitude().map(|_| device.zeros(Element::F32, vocab, 1)).transpose()?;
                let dz = device.zeros(Element::F32, r, rank)?;
                Some(LoraSums { dz, db: device.matrix(Element::F32, vocab, rank)?, dm })
            }
        };
        Ok(Sums { dh: device.matrix(Element::F32, r, rows.h.cols())?, begun: false, lora })
    }

    /// Sets the gradients of ids from `first` on to zero: no strip adds to them.
    pub(crate) fn leave_out(&self, sums: &Sums, first: usize) -> Result<()> {
        match &sums.lora {
            Some(lora) if first < self.weight.rows() => lora.db.row_range(first..self.weight.rows())?.fill_zero(),
            _ => Ok(()),
        }
    }

    /// Adds one strip's gradients of dL/dy, `d` (R, width) f32. `unscaled` is what [`Head::products`] wrote there.
    pub(crate) fn add(
        &self,
        sums: &mut Sums,
        rows: &Rows,
        ids: &Range<usize>,
        w: &Matrix,
        d: &Matrix,
        unscaled: Option<&Matrix>,
    ) -> Result<()> {
        let (r, width) = (rows.h.rows(), ids.len());
        let scales = rows.lora.as_ref().map_or(Ok(None), |lora| lora.row_scales(&self.weight))?;
        if let Some((scales, of)) = scales.zip(sums.lora.as_ref()) {
            if let Some((u, dm)) = unscaled.zip(of.dm.as_ref()) {
                add_sums(d, Some(u), None, &columns(dm, ids)?)?;
            }
            affine_in_place(d, Some(&columns(&scales.factors, ids)?), None)?;
        }
        let d = cast(d, self.operand)?;
        let beta = if sums.begun { 1.0 } else { 0.0 };
        product((r, w.cols(), width), (d.whole(), false), (w.whole(), false), sums.dh.whole(), (1.0, beta))?;
        sums.begun = true;
        let Some(((lora, z), of)) = rows.lora.as_ref().zip(rows.z.as_ref()).zip(sums.lora.as_ref()) else {
            return Ok(());
        };
        let (b, rank) = (lora.b_operand().row_range(ids.clone())?, lora.rank());
        product((r, rank, width), (d.whole(), false), (b.whole(), false), of.dz.whole(), (1.0, 1.0))?;
        let db = of.db.row_range(ids.clone())?;
        product((width, rank, r), (d.whole(), true), (z.whole(), false), db.whole(), (1.0, 0.0))
    }

    /// The gradients after the last strip.
    pub(crate) fn finish(&self, sums: Sums, rows: &Rows) -> Result<Gradients> {
        let Some((lora, of)) = rows.lora.as_ref().zip(sums.lora) else {
            return Ok(Gradients { hidden: sums.dh.into(), lora: None });
        };
        let (r, d, rank) = (rows.h.rows(), rows.h.cols(), lora.rank());
        let dz = scale(&of.dz, lora.scale(), self.operand)?;
        let a = lora.a_operand();
        product((r, d, rank), (dz.whole(), false), (a.whole(), false), sums.dh.whole(), (1.0, 1.0))?;
        let magnitude = match (of.dm, lora.row_scales(&self.weight)?) {
            (Some(dm), Some(scales)) => Some(over_norms(&dm.reshape(1, dm.len())?, &scales.norms)?),
            _ => None,
        };
        let gradient = LoraGradient {
            a: sum_over_rows((dz.whole(), dz.cols(), dz.rows()), rows.h.whole(), d)?,
            b: of.db,
            magnitude,
        };
        Ok(Gradients { hidden: sums.dh.into(), lora: Some(gradient.into()) })
    }

    /// Whether products before DoRA's factor are needed for the gradients.
    pub(crate) fn wants_unscaled(rows: &Rows) -> bool {
        rows.lora.as_ref().is_some_and(|lora| lora.magnitude().is_some())
    }
}

/// Elements `ids` of a vector of the vocabulary, as a row.
fn columns(vector: &Matrix, ids: &Range<usize>) -> Result<Matrix> {
    vector.reshape(vector.len(), 1)?.row_range(ids.clone())?.reshape(1, ids.len())
}

/// Logits (S, vocab) f32 at temperature 1, before multiplier and soft cap.
pub(crate) fn products(h: &Matrix, head: &LmHead<'_>) -> Result<Matrix> {
    let part =
        crate::ops::linear::LinearWithLora { weight: head.weight, dequantised: None, bias: None, lora: head.lora };
    let (mut logits, _) = crate::ops::linear::on_device(h, &[part], None, Element::F32)?;
    logits.pop().ok_or_else(|| anyhow::anyhow!("a linear group of one part has one output"))
}

/// The statistics of `targets`, on the device.
fn statistics(head: &Head, rows: &Rows, targets: &Matrix, shape: Shape) -> Result<DeviceStats> {
    let r = targets.len();
    let (mut running, buffer) = (Running::new(targets, shape)?, head.buffer(Element::F32, r)?);
    head.strips(|ids, w| {
        let y = Head::part(&buffer, r, ids.len())?;
        head.products(rows, &ids, w, &y, None)?;
        running.add(&y, ids.len())
    })?;
    running.finish()
}

/// Log-probabilities and entropies on a device; see `mod.rs`.
pub(crate) fn forward(h: &Matrix, lm_head: &LmHead<'_>, targets: &[u32], temperature: f64) -> Result<TokenStats> {
    if targets.is_empty() {
        return Ok(TokenStats::default());
    }
    let head = Head::of(h, lm_head)?;
    let rows = head.rows(h, lm_head)?;
    let stats = statistics(&head, &rows, &h.device().upload_u32(targets)?, Shape::of(lm_head, temperature))?;
    Ok(TokenStats {
        logprobs: stats.logprobs.to_f32()?,
        entropy: stats.entropy.to_f32()?,
        lse: stats.lse.to_f32()?,
        argmax: stats.argmax.to_u32()?,
    })
}

/// Gradients on a device; see `mod.rs`.
pub(crate) fn backward(
    h: &Matrix,
    lm_head: &LmHead<'_>,
    targets: &[u32],
    temperature: f64,
    stats: &TokenStats,
    dlogprobs: &[f32],
    dentropy: &[f32],
) -> Result<Gradients> {
    let (device, r) = (h.device(), targets.len());
    if r == 0 {
        let lora =
            lm_head.lora.map(|_| anyhow::bail!("no target to take the gradient of the lm_head's LoRA weights of"));
        return Ok(Gradients { hidden: device.zeros(Element::F32, 0, h.cols())?.into(), lora: lora.transpose()? });
    }
    let head = Head::of(h, lm_head)?;
    let (rows, shape) = (head.rows(h, lm_head)?, Shape::of(lm_head, temperature));
    let row = |values: &[f32]| device.upload_f32(values, 1, r);
    let ids = device.upload_u32(targets)?;
    let (logprobs, entropy, lse) = (row(&stats.logprobs)?, row(&stats.entropy)?, row(&stats.lse)?);
    let stats = DeviceStats { logprobs, entropy, lse, argmax: ids.clone() };
    let (dlogprobs, dentropy) = (row(dlogprobs)?, row(dentropy)?);
    let loss = Loss { targets: &ids, stats: &stats, dlogprobs: &dlogprobs, dentropy: &dentropy };
    let mut sums = head.sums(&rows)?;
    let buffer = head.buffer(Element::F32, r)?;
    let unscaled = Head::wants_unscaled(&rows).then(|| head.buffer(Element::F32, r)).transpose()?;
    head.strips(|ids, w| {
        let y = Head::part(&buffer, r, ids.len())?;
        let u = unscaled.as_ref().map(|u| Head::part(u, r, ids.len())).transpose()?;
        head.products(&rows, &ids, w, &y, u.as_ref())?;
        strip_gradient(&y, ids.len(), ids.start, loss, shape, &y)?;
        head.add(&mut sums, &rows, &ids, w, &y, u.as_ref())
    })?;
    head.finish(sums, &rows)
}
