//! Rotary positions, in the half-split form of Hugging Face's llama: within the first 2h numbers of each head, with
//! angle = position * f_j, (x_j, x_{j+h}) -> (x_j cos - x_{j+h} sin, x_{j+h} cos + x_j sin); the rest of the head stays.
//! Keeps nothing: the backward is the transposed rotation. Source: arXiv:2104.09864. Read attention.rs next.

use std::sync::OnceLock;

use candle_core::{Result, Tensor};

use super::cpu::{Out, parallel, tensor, view};

/// cos and sin of every (position, frequency), made as positions are met: a context may be far longer than any text.
pub struct RopeTable {
    inverse_frequencies: Vec<f32>,
    factor: f32,
    positions: usize,
    blocks: Vec<OnceLock<Block>>,
    head: usize,
}

/// Of [`BLOCK`] positions, (BLOCK, h) each.
struct Block {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Positions that are made together.
pub(crate) const BLOCK: usize = 1 << 13;

impl RopeTable {
    /// `inverse_frequencies`: h numbers f_j, for heads of `head` >= 2h numbers; `positions`: the context's length.
    /// RopeTable are taken in f64; `factor` multiplies cos and sin (yarn's and longrope's attention factor, 1 elsewhere).
    pub fn new(inverse_frequencies: &[f32], head: usize, positions: usize, factor: f32) -> Self {
        let blocks = (0..positions.div_ceil(BLOCK)).map(|_| OnceLock::new()).collect();
        Self { inverse_frequencies: inverse_frequencies.to_vec(), factor, positions, blocks, head }
    }

    /// How many positions there are.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// cos and sin (h) of a position.
    fn row(&self, position: usize) -> (&[f32], &[f32]) {
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

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The forward rotation.
    Forward,
    /// Its transpose: the backward.
    Back,
}

/// x (N, heads * head_dim) turned row by row by `positions` (N).
///
/// # Errors
/// If a position is past the context or shapes do not fit.
pub fn rotate(x: &Tensor, positions: &[u32], angles: &RopeTable, turn: Direction) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let (half, head) = (angles.inverse_frequencies.len(), angles.head);
    if positions.len() != n || head < 2 * half || width % head.max(1) != 0 {
        candle_core::bail!("{} positions and heads of {head} for an input {:?}", positions.len(), x.dims());
    }
    if let Some(p) = positions.iter().find(|&&p| p as usize >= angles.positions()) {
        candle_core::bail!("position {p} is past the context of {}", angles.positions());
    }
    let xs = view(x)?;
    let mut y = vec![0f32; n * width];
    let out = Out::of(&mut y);
    parallel(n, 4 * n * width, |r| {
        for i in r {
            let (cos, sin) = angles.row(positions[i] as usize);
            // SAFETY: row i of the output belongs to this part of the work.
            let y = unsafe { out.slice(i * width, width) };
            rotate_row(&xs[i * width..(i + 1) * width], head, cos, sin, turn, y);
        }
    });
    tensor(y, (n, width))
}

super::cpu::vectorised! {
    fn rotate_row(x: &[f32], head: usize, cos: &[f32], sin: &[f32], turn: Direction, y: &mut [f32]) {
        let half = cos.len();
        let sign = if turn == Direction::Forward { 1.0 } else { -1.0 };
        for (x, y) in x.chunks_exact(head).zip(y.chunks_exact_mut(head)) {
            let ((x, x_rest), (y, y_rest)) = (x.split_at(2 * half), y.split_at_mut(2 * half));
            y_rest.copy_from_slice(x_rest);
            let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
            for j in 0..half {
                let (c, s) = (cos[j], sign * sin[j]);
                y0[j] = x0[j] * c - x1[j] * s;
                y1[j] = x1[j] * c + x0[j] * s;
            }
        }
    }
}
