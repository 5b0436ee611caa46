//! The exact KL divergence on a device, from strips of two products with the output table, and the gradient of a strip
//! by the first. Formulas are in mod.rs, kernels in gpu.cu. It does not depend on roles (actor, reference). Read
//! `logprobs/gpu.rs` first.

use anyhow::{Result, ensure};

use crate::device::{Arguments, Device, Element, Matrix, Ptr, Variant};
use crate::ops::launch::{blocks, device, size, variant};
use crate::ops::logprobs::gpu::Shape;
use crate::ops::logprobs::gpu::{LogitShape, strip};

/// Numbers of a row that a block of the backward pass takes.
const TILE: usize = 256;

#[repr(C)]
struct KlStrip {
    p: Ptr,
    q: Ptr,
    sums: Ptr,
    width: u32,
    p_stride: u32,
    q_stride: u32,
    fresh: u32,
    shape: LogitShape,
}
// SAFETY: the fields are those of `KlStrip` in gpu.cu.
unsafe impl Arguments for KlStrip {
    const NAME: &'static str = "kl_strip";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct KlFinish {
    sums: Ptr,
    kl: Ptr,
    lse_p: Ptr,
    lse_q: Ptr,
    rows: u32,
}
// SAFETY: the fields are those of `KlFinish` in gpu.cu.
unsafe impl Arguments for KlFinish {
    const NAME: &'static str = "kl_finish";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct KlBackward {
    p: Ptr,
    q: Ptr,
    kl: Ptr,
    lse_p: Ptr,
    lse_q: Ptr,
    dkl: Ptr,
    d: Ptr,
    width: u32,
    p_stride: u32,
    q_stride: u32,
    d_stride: u32,
    tiles: u32,
    shape: LogitShape,
}
// SAFETY: the fields are those of `KlBackward` in gpu.cu.
unsafe impl Arguments for KlBackward {
    const NAME: &'static str = "kl_backward";
    const BLOCK: u32 = 256;
}

/// Of each position after the last strip, (1, R) f32 each.
#[derive(Clone, Debug)]
pub struct DeviceKl {
    /// KL(p || q), nats; never negative.
    pub kl: Matrix,
    /// log of the sum of e^l of each side.
    pub lse_p: Matrix,
    /// Likewise of q.
    pub lse_q: Matrix,
}

/// The running sums of R positions while the vocabulary goes by.
#[derive(Debug)]
pub struct Running {
    /// (R, 5).
    sums: Matrix,
    shape: Shape,
    fresh: bool,
}

impl Running {
    /// Nothing is known yet of `rows` positions.
    ///
    /// # Errors
    /// If memory is out.
    pub fn new(device: &Device, rows: usize, shape: Shape) -> Result<Self> {
        Ok(Self { sums: device.matrix(Element::F32, rows, 5)?, shape, fresh: true })
    }

    /// Takes in the next `width` ids: columns 0..`width` of the products p and q (R, at least `width`) f32.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn add(&mut self, p: &Matrix, q: &Matrix, width: usize) -> Result<()> {
        let (rows, device) = (self.sums.rows(), device("kl", p, &[q, &self.sums])?);
        strip("kl: p", p, rows, width)?;
        strip("kl: q", q, rows, width)?;
        let arguments = KlStrip {
            p: p.input("kl p", Element::F32, p.len())?,
            q: q.input("kl q", Element::F32, q.len())?,
            sums: self.sums.output("kl sums", Element::F32, 5 * rows)?,
            width: size("vocabulary", width)?,
            p_stride: size("vocabulary", p.cols())?,
            q_stride: size("vocabulary", q.cols())?,
            fresh: u32::from(self.fresh),
            shape: self.shape.into(),
        };
        device.launch(Variant::NONE, blocks(rows, 1)?, arguments)?;
        self.fresh = false;
        Ok(())
    }

    /// The divergences over all ids so far.
    ///
    /// # Errors
    /// If no strip has come.
    pub fn finish(self) -> Result<DeviceKl> {
        ensure!(!self.fresh, "kl: no strip of the vocabulary has come");
        let (device, rows) = (self.sums.device(), self.sums.rows());
        let row = || device.matrix(Element::F32, 1, rows);
        let (kl, lse_p, lse_q) = (row()?, row()?, row()?);
        let arguments = KlFinish {
            sums: self.sums.input("kl sums", Element::F32, 5 * rows)?,
            kl: kl.output("kl", Element::F32, rows)?,
            lse_p: lse_p.output("kl lse", Element::F32, rows)?,
            lse_q: lse_q.output("kl lse", Element::F32, rows)?,
            rows: size("kl", rows)?,
        };
        device.launch(Variant::NONE, blocks(rows, 256)?, arguments)?;
        Ok(DeviceKl { kl, lse_p, lse_q })
    }
}

/// dL by the products p of one strip, of dL/dKL (R f32 numbers), into columns 0..`width` of `d` (R, at least `width`),
/// f32 or a narrow type; `d` may be `p` itself. q is held fixed. `kl` is what [`Running::finish`] gave for the same
/// products.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(
    p: &Matrix,
    q: &Matrix,
    width: usize,
    kl: &DeviceKl,
    dkl: &Matrix,
    by: Shape,
    d: &Matrix,
) -> Result<()> {
    let rows = kl.kl.len();
    let device = device("kl backward", p, &[q, &kl.kl, dkl, d])?;
    for (what, matrix) in [("kl backward: p", p), ("kl backward: q", q), ("kl backward: d", d)] {
        strip(what, matrix, rows, width)?;
    }
    ensure!(dkl.len() == rows, "kl backward: {} gradients for {rows} positions", dkl.len());
    let tiles = width.div_ceil(TILE);
    let arguments = KlBackward {
        p: p.input("kl p", Element::F32, p.len())?,
        q: q.input("kl q", Element::F32, q.len())?,
        kl: kl.kl.input("kl", Element::F32, rows)?,
        lse_p: kl.lse_p.input("kl lse", Element::F32, rows)?,
        lse_q: kl.lse_q.input("kl lse", Element::F32, rows)?,
        dkl: dkl.input("dkl", Element::F32, rows)?,
        d: d.output("kl d", d.element(), d.len())?,
        width: size("vocabulary", width)?,
        p_stride: size("vocabulary", p.cols())?,
        q_stride: size("vocabulary", q.cols())?,
        d_stride: size("vocabulary", d.cols())?,
        tiles: size("vocabulary", tiles)?,
        shape: by.into(),
    };
    device.launch(variant("kl backward", &[d.element()])?, blocks(rows * tiles, 1)?, arguments)
}
