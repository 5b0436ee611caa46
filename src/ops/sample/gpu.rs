//! Sampling on a device: the tokens that the host draws from the same logits and numbers, so that logits stay where they are.
//! Kernels are in gpu.cu, the formula in `mod.rs`. It does not depend on models. Read `cpu.rs` beside it for the order of sums.
//!
//! What is equal and why: weights and their f32 sum are computed in the host's order, operation by operation, so that the
//! log-probability has the host's bits. The draw walks the weights in f64. From the most likely tokens that top-k leaves, the
//! walk is the host's own. From all tokens, and for the mass that top-p is a share of, the device sums in an order of its own:
//! both sums are within n 2^-53 of the exact one, so the token is the host's whenever the draw is further than that from the
//! token's two ends. Where it is nearer (at most n^2 draws in 2^50: one in 50,000 from 150,000 equally likely tokens), or
//! where top-p leaves more than 1,024 tokens, there is no token, and the host draws from the one row's logits.

use anyhow::Result;

use super::{Distribution, Drawn};
use crate::device::{Arguments, Element, Matrix, Ptr, Variant};
use crate::ops::launch::{blocks, size};
use crate::ops::logprobs::Logits;

/// Ids of a block of the first kernel, most likely tokens that the last one sorts, and the largest vocabulary, as in gpu.cu.
const TILE: usize = 4096;
const KEPT: usize = 1024;
const LARGEST: usize = 256 * 2048;
/// The token of a row that the host draws.
const NONE: u32 = u32::MAX;

#[repr(C)]
#[derive(Clone, Copy)]
struct SampleShape {
    multiplier: f32,
    factor: f32,
    cap: f32,
    inverse: f32,
}

#[repr(C)]
struct SampleTop {
    logits: Ptr,
    tops: Ptr,
    best: Ptr,
    vocab: u32,
    tiles: u32,
    shape: SampleShape,
}
// SAFETY: the fields are those of `SampleTop` in gpu.cu.
unsafe impl Arguments for SampleTop {
    const NAME: &'static str = "sample_top";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct SampleSums {
    logits: Ptr,
    tops: Ptr,
    best: Ptr,
    draws: Ptr,
    drawn: Ptr,
    totals: Ptr,
    vocab: u32,
    tiles: u32,
    mode: u32,
    shape: SampleShape,
}
// SAFETY: the fields are those of `SampleSums` in gpu.cu.
unsafe impl Arguments for SampleSums {
    const NAME: &'static str = "sample_sums";
    const BLOCK: u32 = 288;
}

#[repr(C)]
struct SampleKept {
    logits: Ptr,
    draws: Ptr,
    totals: Ptr,
    drawn: Ptr,
    top_p: f64,
    vocab: u32,
    kept: u32,
    exact: u32,
    shape: SampleShape,
}
// SAFETY: the fields are those of `SampleKept` in gpu.cu.
unsafe impl Arguments for SampleKept {
    const NAME: &'static str = "sample_kept";
    const BLOCK: u32 = 512;
}

#[repr(C)]
struct SampleTurn {
    drawn: Ptr,
    kept: Ptr,
    next: Ptr,
    input: Ptr,
    rows: u32,
    numbers: u32,
    tokens: u32,
}
// SAFETY: the fields are those of `SampleTurn` in gpu.cu.
unsafe impl Arguments for SampleTurn {
    const NAME: &'static str = "sample_turn";
    const BLOCK: u32 = 256;
}

/// What a row is drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Greedy,
    All,
    /// The `count` most likely tokens: all that top-k leaves (`exact`), or as many as there is room for.
    Kept {
        count: usize,
        exact: bool,
    },
}

impl Mode {
    /// `None` for the host: a top-k between 1,024 and the vocabulary, and vocabularies above 524,288 tokens.
    fn of(distribution: Distribution, vocab: usize) -> Option<Self> {
        let Distribution { temperature, top_k, top_p } = distribution;
        let left = if top_k == 0 { vocab } else { top_k.min(vocab) };
        Some(match () {
            () if vocab > LARGEST => return None,
            () if temperature <= 0.0 => Self::Greedy,
            () if top_k == 0 && top_p >= 1.0 => Self::All,
            () if left <= KEPT => Self::Kept { count: left, exact: true },
            () if left == vocab && top_p < 1.0 => Self::Kept { count: KEPT, exact: false },
            () => return None,
        })
    }
}

/// Starts to draw a token per row on the logits' device, (S, 4) as gpu.cu's `drawn`; `None` if the host has to draw every row
/// (see `Mode::of`), or if the logits lie on the host. `draws` (S): uniform numbers in [0, 1).
///
/// # Errors
/// If memory is out, or a copy fails.
pub(super) fn begin(logits: &Logits, by: Distribution, draws: &[f64]) -> Result<Option<Matrix>> {
    let Some(products) = logits.on_device() else { return Ok(None) };
    let Some(mode) = Mode::of(by, products.cols()) else { return Ok(None) };
    let draws = products.device().input("draws", &words(draws))?;
    enqueue(products, logits, by, mode, &draws).map(Some)
}

/// The input "draws": the draws in memory, two words each.
pub(super) fn words(draws: &[f64]) -> Vec<u32> {
    let bytes = draws.iter().map(|draw| draw.to_ne_bytes());
    bytes.flat_map(|b| [[b[0], b[1], b[2], b[3]], [b[4], b[5], b[6], b[7]]].map(u32::from_ne_bytes)).collect()
}

/// Waits for what [`begin`] started; `None` in place of rows that the host has to draw.
///
/// # Errors
/// If the download fails.
pub(super) fn finish(drawn: &Matrix) -> Result<Vec<Option<Drawn>>> {
    Ok(drawn.to_u32()?.as_chunks::<4>().0.iter().map(|&row| read(row)).collect())
}

/// Keeps the results `drawn` of a step in `kept`, both (S, 4), and writes the input of the next one: `next` (N) over `input` (N),
/// with the drawn tokens in place of its numbers from `tokens` on. Without a next step it only keeps.
///
/// # Errors
/// If shapes do not fit, or the launch fails.
pub(super) fn turn(drawn: &Matrix, kept: &Matrix, next: Option<(&Matrix, &Matrix)>, tokens: usize) -> Result<()> {
    let (rows, device) = (drawn.len() / 4, drawn.device());
    let numbers = next.map_or(0, |(_, input)| input.len());
    anyhow::ensure!(next.is_none() || tokens + rows <= numbers, "{rows} tokens from number {tokens} on of {numbers}");
    let arguments = SampleTurn {
        drawn: drawn.input("turn drawn", Element::U32, 4 * rows)?,
        kept: kept.output("turn kept", Element::U32, 4 * rows)?,
        next: next.map_or(Ok(Ptr::NULL), |(next, _)| next.input("turn next", Element::U32, numbers))?,
        input: next.map_or(Ok(Ptr::NULL), |(_, input)| input.output("turn input", Element::U32, numbers))?,
        rows: size("rows", rows)?,
        numbers: size("input", numbers)?,
        tokens: size("tokens", tokens)?,
    };
    device.launch(Variant::NONE, blocks(1, 1)?, arguments)
}

/// A row of the kernels' results.
fn read([token, shifted, sum, _]: [u32; 4]) -> Option<Drawn> {
    let (shifted, sum) = (f32::from_bits(shifted), f32::from_bits(sum));
    // The host reports logits that are NaN or infinite.
    let is_there = token != NONE && sum.is_finite();
    // The most likely token weighs 1; a machine that only counts gives 0, whose log would end the run that is counted.
    is_there.then_some(Drawn { token, shifted, sum: sum.max(1.0) })
}

fn enqueue(products: &Matrix, logits: &Logits, by: Distribution, mode: Mode, draws: &Matrix) -> Result<Matrix> {
    let (rows, vocab, device) = (products.rows(), products.cols(), products.device());
    let cap = logits.soft_cap.unwrap_or(0.0);
    let factor = if cap > 0.0 { logits.multiplier / cap } else { 0.0 };
    let shape = SampleShape { multiplier: logits.multiplier, factor, cap, inverse: by.inverse() };
    let tiles = vocab.div_ceil(TILE);
    let tops = device.matrix(Element::F32, rows, tiles)?;
    let best = device.matrix(Element::U32, rows, tiles)?;
    let totals = device.matrix(Element::U8, rows, size_of::<f64>())?;
    let drawn = device.matrix(Element::U32, rows, 4)?;
    let (numbers, count) = (size_of::<f64>() * rows, size("vocabulary", vocab)?);
    let logits_at = products.input("sample logits", Element::F32, products.len())?;
    let draws_at = draws.input("sample draws", Element::U32, 2 * rows)?.aligned("sample draws", 8)?;
    let drawn_at = drawn.output("sample tokens", Element::U32, drawn.len())?;
    let arguments = SampleTop {
        logits: logits_at,
        tops: tops.output("sample tops", Element::F32, tops.len())?,
        best: best.output("sample best", Element::U32, best.len())?,
        vocab: count,
        tiles: size("vocabulary", tiles)?,
        shape,
    };
    device.launch(Variant::NONE, blocks(rows * tiles, 1)?, arguments)?;
    let arguments = SampleSums {
        logits: logits_at,
        tops: tops.input("sample tops", Element::F32, tops.len())?,
        best: best.input("sample best", Element::U32, best.len())?,
        draws: draws_at,
        drawn: drawn_at,
        totals: totals.output("sample totals", Element::U8, numbers)?,
        vocab: count,
        tiles: size("vocabulary", tiles)?,
        mode: match mode {
            Mode::Greedy => 0,
            Mode::All => 1,
            Mode::Kept { .. } => 2,
        },
        shape,
    };
    device.launch(Variant::NONE, blocks(rows, 1)?, arguments)?;
    if let Mode::Kept { count: kept, exact } = mode {
        let arguments = SampleKept {
            logits: logits_at,
            draws: draws_at,
            totals: totals.input("sample totals", Element::U8, numbers)?,
            drawn: drawn_at,
            top_p: by.top_p,
            vocab: count,
            kept: size("kept tokens", kept)?,
            exact: u32::from(exact),
            shape,
        };
        device.launch(Variant::NONE, blocks(rows, 1)?, arguments)?;
    }
    Ok(drawn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernels_cannot_draw_goes_to_the_host() {
        let mode = |temperature, top_k, top_p, vocab| Mode::of(Distribution { temperature, top_k, top_p }, vocab);
        assert_eq!(mode(0.0, 5000, 0.5, 32_000), Some(Mode::Greedy));
        assert_eq!(mode(1.0, 0, 1.0, 262_208), Some(Mode::All));
        assert_eq!(mode(1.0, 50, 0.9, 32_000), Some(Mode::Kept { count: 50, exact: true }));
        assert_eq!(mode(1.0, 0, 0.9, 100), Some(Mode::Kept { count: 100, exact: true }));
        assert_eq!(mode(1.0, 40_000, 0.9, 32_000), Some(Mode::Kept { count: KEPT, exact: false }));
        assert_eq!(mode(1.0, 1025, 0.9, 32_000), None);
        assert_eq!(mode(1.0, 0, 1.0, LARGEST + 1), None);
    }
}
