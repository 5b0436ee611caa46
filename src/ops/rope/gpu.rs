//! Rotary positions on a device: tables of cos and sin, and the rotation both ways. Formulas are in mod.rs, the kernel
//! is in gpu.cu. Nothing is saved for the backward pass, which is the transposed rotation. It does not depend on layers.
//! Read `attention/gpu.rs` next.

use anyhow::{Result, ensure};

use super::Direction;
use crate::device::{Arguments, Device, Element, Matrix, Ptr};
use crate::ops::launch::{blocks, device, size, variant};

/// cos and sin of every (position, frequency), for heads of one width.
#[derive(Clone, Debug)]
pub struct DeviceRopeTable {
    /// (positions, h) f32.
    cos: Matrix,
    sin: Matrix,
    head: usize,
}

#[repr(C)]
struct RopeRotate {
    x: Ptr,
    y: Ptr,
    positions: Ptr,
    cos: Ptr,
    sin: Ptr,
    heads: u32,
    head: u32,
    half: u32,
    sign: f32,
}
// SAFETY: the fields are those of `RopeRotate` in gpu.cu.
unsafe impl Arguments for RopeRotate {
    const NAME: &'static str = "rope_rotate";
    const BLOCK: u32 = 256;
}

impl DeviceRopeTable {
    /// Copies tables (positions, `half`) to the device. A head has `head` >= 2 `half` numbers, of which the first 2
    /// `half` direction.
    ///
    /// # Errors
    /// If the tables do not fit each other or the head.
    pub fn new(device: &Device, cos: &[f32], sin: &[f32], half: usize, head: usize) -> Result<Self> {
        let whole = half > 0 && cos.len() == sin.len() && cos.len().is_multiple_of(half);
        ensure!(whole, "rope: tables of {} and {} numbers for {half} frequencies", cos.len(), sin.len());
        ensure!(2 * half <= head, "rope: {half} frequencies rotate {} numbers of a head of {head}", 2 * half);
        let table = |values: &[f32]| device.upload_f32(values, values.len() / half, half);
        Ok(Self { cos: table(cos)?, sin: table(sin)?, head })
    }

    /// cos and sin, (positions, h) f32 each.
    pub(crate) fn tables(&self) -> (&Matrix, &Matrix) {
        (&self.cos, &self.sin)
    }

    /// Numbers of a head.
    pub(crate) fn head(&self) -> usize {
        self.head
    }

    /// How many positions the tables have.
    pub fn positions(&self) -> usize {
        self.cos.rows()
    }

    /// The positions of a batch's rows, checked and copied to the device: once for all layers.
    ///
    /// # Errors
    /// If a position is past the tables.
    pub fn place(&self, positions: &[u32]) -> Result<Matrix> {
        if let Some(p) = positions.iter().find(|&&p| p as usize >= self.positions()) {
            anyhow::bail!("position {p} is past the context of {}", self.positions());
        }
        self.cos.device().upload_u32(positions)
    }

    /// x (N, heads * head) turned row by row by `positions`, N numbers of [`DeviceRopeTable::place`].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn rotate(&self, x: &Matrix, positions: &Matrix, direction: Direction) -> Result<Matrix> {
        let y = x.device().matrix(x.element(), x.rows(), x.cols())?;
        self.rotate_into(x, positions, direction, &y)?;
        Ok(y)
    }

    /// The same, written over x.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn rotate_in_place(&self, x: &Matrix, positions: &Matrix, direction: Direction) -> Result<()> {
        self.rotate_into(x, positions, direction, x)
    }

    fn rotate_into(&self, x: &Matrix, positions: &Matrix, direction: Direction, y: &Matrix) -> Result<()> {
        let device = device("rope", x, &[positions, &self.cos])?;
        let (n, cols, half) = (x.rows(), x.cols(), self.cos.cols());
        ensure!(positions.len() == n, "rope: {} positions for {n} rows", positions.len());
        ensure!(cols.is_multiple_of(self.head), "rope: rows of {cols} numbers are no heads of {}", self.head);
        let heads = cols / self.head;
        let arguments = RopeRotate {
            x: x.input("rope x", x.element(), x.len())?,
            y: y.output("rope y", x.element(), x.len())?,
            positions: positions.input("rope positions", Element::U32, n)?,
            cos: self.cos.input("rope cos", Element::F32, self.cos.len())?,
            sin: self.sin.input("rope sin", Element::F32, self.cos.len())?,
            heads: size("rope", heads)?,
            head: size("rope", self.head)?,
            half: size("rope", half)?,
            sign: if direction == Direction::Forward { 1.0 } else { -1.0 },
        };
        device.launch(variant("rope", &[x.element()])?, blocks(n, 1)?, arguments)
    }
}
