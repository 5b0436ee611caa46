//! Rotary position embedding, in the half-split form of Hugging Face's llama: table, checks, dispatch.
//!
//! Within the first 2h elements of each head, with angle = position * f_j:
//! (x_j, x_{j+h}) -> (x_j cos - x_{j+h} sin, x_{j+h} cos + x_j sin); the rest of the head is unchanged. Nothing is
//! saved: the backward is the inverse rotation. Source: arXiv:2104.09864. It does not depend on weights or other
//! operations. Read `cpu.rs` beside it, then `attention/mod.rs`.

mod cpu;
pub mod gpu;

use std::sync::OnceLock;

use anyhow::{Result, bail};

use crate::device::{Array, Device, Resident};
use gpu::DeviceRopeTable;

/// cos and sin per (position, frequency), computed when a position is first used: a context may be far longer than any
/// text.
pub struct RopeTable {
    inverse_frequencies: Vec<f32>,
    factor: f32,
    positions: usize,
    blocks: Vec<OnceLock<Block>>,
    head: usize,
    copy: Resident<DeviceRopeTable>,
}

/// cos and sin of [`BLOCK`] positions, (BLOCK, h) each.
struct Block {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Positions that are computed together.
pub(crate) const BLOCK: usize = 1 << 13;

impl RopeTable {
    /// `inverse_frequencies`: f_j (h), for heads of `head` >= 2h elements; `positions`: the length of the context.
    /// cos and sin are computed in f64; `factor` multiplies them (attention factor of yarn and longrope, otherwise 1).
    pub fn new(inverse_frequencies: &[f32], head: usize, positions: usize, factor: f32) -> Self {
        let blocks = (0..positions.div_ceil(BLOCK)).map(|_| OnceLock::new()).collect();
        Self {
            inverse_frequencies: inverse_frequencies.to_vec(),
            factor,
            positions,
            blocks,
            head,
            copy: Resident::default(),
        }
    }

    /// Length of the context.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Whether all positions lie in the context.
    ///
    /// # Errors
    /// If one does not.
    pub(crate) fn check(&self, positions: &[u32]) -> Result<()> {
        if let Some(p) = positions.iter().find(|&&p| p as usize >= self.positions) {
            bail!("position {p} is past the context of {}", self.positions);
        }
        Ok(())
    }

    /// The table on a device, for positions up to `last` at least. It holds whole blocks of positions and is made anew when a
    /// longer sequence comes.
    pub(crate) fn on(&self, device: &Device, last: usize) -> Result<std::sync::Arc<DeviceRopeTable>> {
        let wanted = self.positions.min((last / BLOCK + 1) * BLOCK);
        if self.copy.get().is_some_and(|copy| copy.positions() < wanted) {
            self.copy.clear();
        }
        self.copy.on(device, || {
            let half = self.inverse_frequencies.len();
            let (mut cos, mut sin) = (Vec::with_capacity(wanted * half), Vec::with_capacity(wanted * half));
            for position in 0..wanted {
                let (c, s) = self.cos_sin(position);
                cos.extend_from_slice(c);
                sin.extend_from_slice(s);
            }
            DeviceRopeTable::new(device, &cos, &sin, half, self.head)
        })
    }

    /// cos and sin (h) of a position.
    fn cos_sin(&self, position: usize) -> (&[f32], &[f32]) {
        let half = self.inverse_frequencies.len();
        let block = self.blocks[position / BLOCK].get_or_init(|| {
            let first = position / BLOCK * BLOCK;
            let all = first..self.positions.min(first + BLOCK);
            let numbers = all.len() * half;
            let (mut cos, mut sin) = (Vec::with_capacity(numbers), Vec::with_capacity(numbers));
            for angle in all.flat_map(|p| self.inverse_frequencies.iter().map(move |&f| p as f32 * f)) {
                cos.push(f64::from(angle).cos() as f32 * self.factor);
                sin.push(f64::from(angle).sin() as f32 * self.factor);
            }
            Block { cos, sin }
        });
        let at = position % BLOCK * half..(position % BLOCK + 1) * half;
        (&block.cos[at.clone()], &block.sin[at])
    }
}

/// The direction of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The forward rotation.
    Forward,
    /// The inverse rotation, which is its transpose: the backward.
    Back,
}

/// Rotates x (N, heads * head_dim), row i by `positions[i]`.
///
/// # Errors
/// If a position is outside the context or shapes do not fit.
pub fn rotate(x: &Array, positions: &[u32], table: &RopeTable, direction: Direction) -> Result<Array> {
    let (n, width) = x.dims2()?;
    let (half, head) = (table.inverse_frequencies.len(), table.head);
    if positions.len() != n || head < 2 * half || width % head.max(1) != 0 {
        bail!("{} positions and heads of {head} for an input ({n}, {width})", positions.len());
    }
    table.check(positions)?;
    Ok(match x {
        Array::Host(x) => cpu::rotate(x, positions, table, direction)?.into(),
        Array::Device(x) => {
            let last = positions.iter().copied().max().unwrap_or(0) as usize;
            let copy = table.on(x.device(), last)?;
            copy.rotate(x, &x.device().indices(positions)?, direction)?.into()
        }
    })
}
