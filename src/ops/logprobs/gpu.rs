//! Log-probabilities, entropy and the most likely token on a device, from strips of products h W^T, and the gradient of
//! a strip. Formulas are in mod.rs, kernels in gpu.cu. The caller multiplies strip after strip, twice where a gradient
//! is wanted. It does not depend on weights. Read `gpu_head.rs` beside it next.

use anyhow::{Result, ensure};

use crate::device::{Arguments, Device, Element, Matrix, Ptr, Variant};
use crate::ops::launch::{blocks, device, shape, size, variant};

/// What becomes of a product h W^T before the softmax.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// m: logits are multiplied by it (Granite's 1 / logits_scaling).
    pub multiplier: f32,
    /// c: soft cap of the logits (Gemma 2).
    pub soft_cap: Option<f32>,
    /// T divides the logits, after the soft cap.
    pub temperature: f64,
}

/// Numbers of a row that a block of the backward pass takes.
const TILE: usize = 256;

/// A [`Shape`] as kernels take it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct LogitShape {
    multiplier: f32,
    cap: f32,
    inverse: f32,
}

impl From<Shape> for LogitShape {
    fn from(shape: Shape) -> Self {
        let inverse = (1.0 / shape.temperature) as f32;
        match shape.soft_cap {
            Some(cap) => Self { multiplier: shape.multiplier, cap, inverse },
            None => Self { multiplier: shape.multiplier, cap: 0.0, inverse: inverse * shape.multiplier },
        }
    }
}

#[repr(C)]
struct LogprobsStrip {
    logits: Ptr,
    targets: Ptr,
    sums: Ptr,
    best: Ptr,
    width: u32,
    stride: u32,
    first_id: u32,
    fresh: u32,
    shape: LogitShape,
}
// SAFETY: the fields are those of `LogprobsStrip` in gpu.cu.
unsafe impl Arguments for LogprobsStrip {
    const NAME: &'static str = "logprobs_strip";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct LogprobsFinish {
    sums: Ptr,
    logprobs: Ptr,
    entropy: Ptr,
    lse: Ptr,
    rows: u32,
}
// SAFETY: the fields are those of `LogprobsFinish` in gpu.cu.
unsafe impl Arguments for LogprobsFinish {
    const NAME: &'static str = "logprobs_finish";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct LogprobsBackward {
    logits: Ptr,
    targets: Ptr,
    lse: Ptr,
    entropy: Ptr,
    dlogprobs: Ptr,
    dentropy: Ptr,
    d: Ptr,
    width: u32,
    stride: u32,
    d_stride: u32,
    first_id: u32,
    tiles: u32,
    shape: LogitShape,
}
// SAFETY: the fields are those of `LogprobsBackward` in gpu.cu.
unsafe impl Arguments for LogprobsBackward {
    const NAME: &'static str = "logprobs_backward";
    const BLOCK: u32 = 256;
}

/// What is known of each position after the last strip, (1, R) each.
#[derive(Clone, Debug)]
pub struct DeviceStats {
    /// Log-probability of the target, nats; NaN where no strip had the target.
    pub logprobs: Matrix,
    /// Entropy of the distribution, nats.
    pub entropy: Matrix,
    /// log of the sum of e^l.
    pub lse: Matrix,
    /// The most likely token, u32 (the lowest id of equals).
    pub argmax: Matrix,
}

/// The running sums of R positions while the vocabulary goes by.
#[derive(Debug)]
pub struct Running {
    targets: Matrix,
    /// (R, 4).
    sums: Matrix,
    best: Matrix,
    shape: Shape,
    /// The first id of the next strip.
    next: usize,
}

impl Running {
    /// Nothing is known yet of `targets`, R token ids (u32).
    ///
    /// # Errors
    /// If memory is out.
    pub fn new(targets: &Matrix, shape: Shape) -> Result<Self> {
        let (device, rows) = (targets.device(), targets.len());
        let sums = device.matrix(Element::F32, rows, 4)?;
        let best = device.matrix(Element::U32, 1, rows)?;
        Ok(Self { targets: targets.clone(), sums, best, shape, next: 0 })
    }

    /// Takes in the next `width` ids: columns 0..`width` of `products` (R, at least `width`) f32, h W^T of these ids.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn add(&mut self, products: &Matrix, width: usize) -> Result<()> {
        let (rows, device) = (self.targets.len(), device("logprobs", products, &[&self.targets])?);
        strip("logprobs", products, rows, width)?;
        let arguments = LogprobsStrip {
            logits: products.input("logprobs products", Element::F32, products.len())?,
            targets: self.targets.input("logprobs targets", Element::U32, rows)?,
            sums: self.sums.output("logprobs sums", Element::F32, 4 * rows)?,
            best: self.best.output("logprobs best", Element::U32, rows)?,
            width: size("vocabulary", width)?,
            stride: size("vocabulary", products.cols())?,
            first_id: size("vocabulary", self.next)?,
            fresh: u32::from(self.next == 0),
            shape: self.shape.into(),
        };
        device.launch(Variant::NONE, blocks(rows, 1)?, arguments)?;
        self.next += width;
        Ok(())
    }

    /// The statistics of all ids so far.
    ///
    /// # Errors
    /// If no strip has come.
    pub fn finish(self) -> Result<DeviceStats> {
        ensure!(self.next > 0, "logprobs: no strip of the vocabulary has come");
        let (device, rows): (&Device, usize) = (self.targets.device(), self.targets.len());
        let row = || device.matrix(Element::F32, 1, rows);
        let (logprobs, entropy, lse) = (row()?, row()?, row()?);
        let arguments = LogprobsFinish {
            sums: self.sums.input("logprobs sums", Element::F32, 4 * rows)?,
            logprobs: logprobs.output("logprobs", Element::F32, rows)?,
            entropy: entropy.output("entropy", Element::F32, rows)?,
            lse: lse.output("lse", Element::F32, rows)?,
            rows: size("logprobs", rows)?,
        };
        device.launch(Variant::NONE, blocks(rows, 256)?, arguments)?;
        Ok(DeviceStats { logprobs, entropy, lse, argmax: self.best })
    }
}

/// Whether a strip of `width` ids has its R rows, at least `width` numbers apart.
pub(crate) fn strip(what: &str, products: &Matrix, rows: usize, width: usize) -> Result<()> {
    let (r, c) = (products.rows(), products.cols());
    ensure!(r == rows && width <= c && width > 0, "{what}: a strip of {width} ids for {rows} positions in ({r}, {c})");
    Ok(())
}

/// A position's gradients, and what the forward pass said of it.
#[derive(Clone, Copy, Debug)]
pub struct Loss<'a> {
    /// R token ids, u32.
    pub targets: &'a Matrix,
    /// What [`Running::finish`] gave for the same products.
    pub stats: &'a DeviceStats,
    /// dL/dlogp, R f32 numbers.
    pub dlogprobs: &'a Matrix,
    /// dL/dH, R f32 numbers.
    pub dentropy: &'a Matrix,
}

/// dL by the products of ids `first_id..first_id + width`, into columns 0..`width` of `d` (R, at least `width`), f32 or
/// a narrow type; `d` may be `products` itself. dL/dh = d W then.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(products: &Matrix, width: usize, first_id: usize, loss: Loss<'_>, by: Shape, d: &Matrix) -> Result<()> {
    let (rows, stats) = (loss.targets.len(), loss.stats);
    let device = device(
        "logprobs backward",
        products,
        &[loss.targets, &stats.lse, &stats.entropy, loss.dlogprobs, loss.dentropy, d],
    )?;
    strip("logprobs backward: products", products, rows, width)?;
    strip("logprobs backward: d", d, rows, width)?;
    shape("logprobs backward: the statistics", &stats.lse, 1, rows)?;
    ensure!(loss.dlogprobs.len() == rows && loss.dentropy.len() == rows, "logprobs backward: gradients of {rows} rows");
    let tiles = width.div_ceil(TILE);
    let arguments = LogprobsBackward {
        logits: products.input("logprobs products", Element::F32, products.len())?,
        targets: loss.targets.input("logprobs targets", Element::U32, rows)?,
        lse: stats.lse.input("lse", Element::F32, rows)?,
        entropy: stats.entropy.input("entropy", Element::F32, rows)?,
        dlogprobs: loss.dlogprobs.input("dlogprobs", Element::F32, rows)?,
        dentropy: loss.dentropy.input("dentropy", Element::F32, rows)?,
        d: d.output("logprobs d", d.element(), d.len())?,
        width: size("vocabulary", width)?,
        stride: size("vocabulary", products.cols())?,
        d_stride: size("vocabulary", d.cols())?,
        first_id: size("vocabulary", first_id)?,
        tiles: size("vocabulary", tiles)?,
        shape: by.into(),
    };
    device.launch(variant("logprobs backward", &[d.element()])?, blocks(rows * tiles, 1)?, arguments)
}
