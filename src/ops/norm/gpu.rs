//! RMS norm and layer norm on a device. Formulas are in mod.rs, kernels in gpu.cu. It does not depend on layers.
//! Read `rope/gpu.rs` next.

use anyhow::{Result, ensure};

use super::{Norm, NormKind};
use crate::device::{Arguments, Device, Element, Matrix, Ptr};
use crate::ops::launch::{blocks, device, shape, size, variant};

/// Rows of more numbers get a block each, shorter ones a warp each.
const SHORT: usize = 1024;
/// Threads of a block, and rows of a block whose warps take a row each.
const THREADS: u32 = 256;
const WARPS: usize = 8;

/// A norm's numbers on a device.
#[derive(Clone, Debug)]
pub struct DeviceNorm {
    weight: Matrix,
    /// Only layer norms have one.
    bias: Option<Matrix>,
    eps: f32,
}

macro_rules! forward_arguments {
    ($struct:ident, $name:literal) => {
        #[repr(C)]
        struct $struct {
            x: Ptr,
            weight: Ptr,
            bias: Ptr,
            y: Ptr,
            rows: u64,
            width: u32,
            eps: f32,
        }
        // SAFETY: the fields are those of `NormForward` in gpu.cu.
        unsafe impl Arguments for $struct {
            const NAME: &'static str = $name;
            const BLOCK: u32 = THREADS;
        }
    };
}
forward_arguments!(NormForward, "norm_forward");
forward_arguments!(NormForwardShort, "norm_forward_short");

macro_rules! backward_arguments {
    ($struct:ident, $name:literal) => {
        #[repr(C)]
        struct $struct {
            x: Ptr,
            weight: Ptr,
            dy: Ptr,
            past: Ptr,
            dx: Ptr,
            rows: u64,
            width: u32,
            layer: u32,
            eps: f32,
        }
        // SAFETY: the fields are those of `NormBackward` in gpu.cu.
        unsafe impl Arguments for $struct {
            const NAME: &'static str = $name;
            const BLOCK: u32 = THREADS;
        }
    };
}
backward_arguments!(NormBackward, "norm_backward");
backward_arguments!(NormBackwardShort, "norm_backward_short");

impl DeviceNorm {
    /// Copies a norm's numbers to the device.
    ///
    /// # Errors
    /// If the bias has another length than the weight, or memory is out.
    pub fn new(device: &Device, norm: &Norm) -> Result<Self> {
        let width = norm.weight.len();
        let row = |values: &[f32]| device.upload_f32(values, 1, values.len());
        let bias = match &norm.kind {
            NormKind::Rms => None,
            NormKind::Layer { bias } => {
                ensure!(bias.len() == width, "a norm has a weight of {width} numbers and a bias of {}", bias.len());
                Some(row(bias)?)
            }
        };
        ensure!(width > 0, "a norm has a weight of no numbers");
        Ok(Self { weight: row(&norm.weight)?, bias, eps: norm.eps as f32 })
    }

    /// Numbers per row, D.
    pub fn width(&self) -> usize {
        self.weight.cols()
    }

    /// y (N, W) of x (N, W), rounded to `to`. Every run of D numbers is a row of its own, so that W = heads x D norms
    /// each head. x is f32, or x and y have one narrow type.
    ///
    /// # Errors
    /// If W is not a multiple of D, or types do not fit.
    pub fn forward(&self, x: &Matrix, to: Element) -> Result<Matrix> {
        let rows = self.rows(x)?;
        let device = device("norm", x, &[&self.weight])?;
        let variant = variant("norm", &[x.element(), to])?;
        let fits = x.element() == Element::F32 || x.element() == to;
        ensure!(fits, "a norm of {} gives that type, not {to}; cast it first", x.element());
        let y = device.matrix(to, x.rows(), x.cols())?;
        let bias = self.bias.as_ref().map_or(Ok(Ptr::NULL), |b| b.input("norm bias", Element::F32, self.width()));
        let (x_at, y_at) = (x.input("norm x", x.element(), x.len())?, y.output("norm y", to, x.len())?);
        let weight = self.weight.input("norm weight", Element::F32, self.width())?;
        let (bias, width, eps) = (bias?, size("norm", self.width())?, self.eps);
        if self.width() > SHORT {
            let arguments = NormForward { x: x_at, weight, bias, y: y_at, rows: rows as u64, width, eps };
            device.launch(variant, blocks(rows, 1)?, arguments)?;
        } else {
            let arguments = NormForwardShort { x: x_at, weight, bias, y: y_at, rows: rows as u64, width, eps };
            device.launch(variant, blocks(rows, WARPS)?, arguments)?;
        }
        Ok(y)
    }

    /// dL/dx (N, W) plus `past` (N, W) f32 where there is one: what the residual path past the norm
    /// brings. x is the forward's input, and dx has its type; dy is f32 or narrow.
    ///
    /// # Errors
    /// If shapes or types do not fit.
    pub fn backward(&self, x: &Matrix, dy: &Matrix, past: Option<&Matrix>) -> Result<Matrix> {
        let (rows, to) = (self.rows(x)?, x.element());
        shape("norm backward: dy", dy, x.rows(), x.cols())?;
        let device = device("norm backward", x, &[&self.weight, dy, past.unwrap_or(dy)])?;
        let variant = variant("norm backward", &[x.element(), dy.element(), to])?;
        let past = match past {
            Some(past) => {
                shape("norm backward: past", past, x.rows(), x.cols())?;
                past.input("norm past", Element::F32, x.len())?
            }
            None => Ptr::NULL,
        };
        let out = device.matrix(to, x.rows(), x.cols())?;
        let (x_at, dy) = (x.input("norm x", x.element(), x.len())?, dy.input("norm dy", dy.element(), x.len())?);
        let dx = out.output("norm dx", to, x.len())?;
        let weight = self.weight.input("norm weight", Element::F32, self.width())?;
        let (width, layer, eps) = (size("norm", self.width())?, u32::from(self.bias.is_some()), self.eps);
        if self.width() > SHORT {
            let arguments = NormBackward { x: x_at, weight, dy, past, dx, rows: rows as u64, width, layer, eps };
            device.launch(variant, blocks(rows, 1)?, arguments)?;
        } else {
            let arguments = NormBackwardShort { x: x_at, weight, dy, past, dx, rows: rows as u64, width, layer, eps };
            device.launch(variant, blocks(rows, WARPS)?, arguments)?;
        }
        Ok(out)
    }

    /// Runs of D numbers in x.
    fn rows(&self, x: &Matrix) -> Result<usize> {
        let (width, cols) = (self.width(), x.cols());
        ensure!(cols.is_multiple_of(width), "a norm of {width} numbers meets rows of {cols}");
        Ok(x.len() / width)
    }
}
