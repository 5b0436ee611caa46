//! Causal attention over ragged batches on a device, forward and backward. Formulas are in mod.rs, kernels in gpu.cu.
//!
//! In bf16 and f16, heads of up to 128 numbers keep their scores in registers (gpu_tiles.cu). Otherwise scores exist for a
//! panel at a time: some queries of every head of a few sequences of one length. A panel is
//! multiplied by `Device::gemm`, whose strides pick heads out of rows, so that nothing is copied and heads of a group
//! read the same keys. Probabilities are computed again in the backward pass. It does not depend on layers.
//! Read `gpu_tiles.rs` beside it next, then `device_cache.rs`: one query per sequence.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::Heads;
use super::gpu_tiles;
use crate::device::{Arguments, Device, Element, Gemm, Matrix, Ptr, Strided};
use crate::ops::columns;
use crate::ops::launch::{blocks, device, shape, size, variant};

/// Scores, probabilities and their gradients of one panel take at most so many bytes, unless one query of all heads
/// takes more.
pub const PANEL_BYTES: usize = 128 << 20;
/// Queries of a panel at the most: more would multiply more pairs that causality rules out.
pub const PANEL_QUERIES: usize = 512;
/// Rows of scores begin at multiples of so many numbers, which lets cuBLAS load them in whole words.
const STRIDE: usize = 8;
/// Rows of a block of the softmax, a warp each.
const WARPS: usize = 8;

/// Where the sequences of a batch lie, and what of them may be seen. Made once per batch and used by all layers.
#[derive(Clone, Debug)]
pub struct DeviceSequences {
    pub(super) cu_seqlens: Vec<usize>,
    key_len: Option<(Vec<usize>, Matrix)>,
    panel_bytes: usize,
    panel_queries: usize,
}

impl DeviceSequences {
    /// Sequence s is rows `cu_seqlens[s]..cu_seqlens[s + 1]`. With `key_len` only so many of a sequence's first tokens are
    /// keys, one or more.
    ///
    /// # Errors
    /// If the cu_seqlens do not begin at 0 or fall, or `key_len` has another length or a 0.
    pub fn new(device: &Device, cu_seqlens: &[usize], key_len: Option<&[usize]>) -> Result<Self> {
        let rising = cu_seqlens.first() == Some(&0) && cu_seqlens.is_sorted();
        ensure!(rising, "cu_seqlens of sequences begin at 0 and do not fall: {cu_seqlens:?}");
        let key_len = match key_len {
            None => None,
            Some(key_len) => {
                let fits = key_len.len() + 1 == cu_seqlens.len() && key_len.iter().all(|&n| n > 0);
                let sequences = cu_seqlens.len() - 1;
                ensure!(fits, "{sequences} sequences need as many key_len lengths of 1 or more, not {key_len:?}");
                let numbers: Vec<u32> = key_len.iter().map(|&n| n.min(u32::MAX as usize) as u32).collect();
                Some((key_len.to_vec(), device.indices(&numbers)?))
            }
        };
        let (cu_seqlens, panel_bytes, panel_queries) = (cu_seqlens.to_vec(), PANEL_BYTES, PANEL_QUERIES);
        Ok(Self { cu_seqlens, key_len, panel_bytes, panel_queries })
    }

    /// Other bounds of a panel than [`PANEL_BYTES`] and [`PANEL_QUERIES`]. Results differ by rounding at the most.
    pub fn with_panels(self, bytes: usize, queries: usize) -> Self {
        Self { panel_bytes: bytes, panel_queries: queries.max(1), ..self }
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.cu_seqlens.last().copied().unwrap_or(0)
    }

    pub(super) fn key_len(&self, sequence: usize) -> usize {
        self.key_len.as_ref().map_or(usize::MAX, |(key_len, _)| key_len[sequence])
    }
}

/// Some queries of neighbouring sequences of one length, and the keys that any of them sees.
struct Panel {
    sequences: Range<usize>,
    /// The first row of the first sequence, and rows of each.
    row: usize,
    length: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Panel {
    /// Numbers from one row of scores to the next.
    fn stride(&self) -> usize {
        self.keys.len().next_multiple_of(STRIDE)
    }

    fn rows(&self, heads: Heads) -> usize {
        self.sequences.len() * heads.q * self.queries.len()
    }
}

/// All panels of a batch, where a score takes `bytes` in all its forms.
fn panels(batch: &DeviceSequences, heads: Heads, bytes: usize) -> Vec<Panel> {
    let length = |s: usize| batch.cu_seqlens[s + 1] - batch.cu_seqlens[s];
    let (count, mut all, mut first) = (batch.cu_seqlens.len() - 1, vec![], 0);
    while first < count {
        let t = length(first);
        let run = (first..count).take_while(|&s| length(s) == t).count();
        if t == 0 {
            first += run;
            continue;
        }
        let of_query = heads.q * t.next_multiple_of(STRIDE) * bytes;
        let queries = batch.panel_queries.min(t).min((batch.panel_bytes / of_query).max(1));
        let sequences = first..first + run.min((batch.panel_bytes / (queries * of_query)).max(1));
        for i0 in (0..t).step_by(queries) {
            let end = t.min(i0 + queries);
            let first_key = sequences.clone().map(|s| {
                let seen = batch.key_len(s).min(i0 + 1);
                heads.window.map_or(0, |w| (i0 + 1).saturating_sub(w)).min(seen - 1)
            });
            let keys =
                first_key.min().unwrap_or(0)..sequences.clone().map(|s| batch.key_len(s)).max().unwrap_or(end).min(end);
            let row = batch.cu_seqlens[sequences.start];
            all.push(Panel { sequences: sequences.clone(), row, length: t, queries: i0..end, keys });
        }
        first = sequences.end;
    }
    all
}

/// Products of one panel that one call of gemm makes: in q's rows, in rows of keys and values, and in the scores, where
/// the first begins and how far the next is.
struct Batch {
    count: usize,
    q: (usize, usize),
    kv: (usize, usize),
    scores: (usize, usize),
}

/// The fewest batches that cover sequences and heads of a panel. A batch runs over sequences, over key/value heads or,
/// unless its products are `summed` into keys and values, over the query heads of a group.
fn batches(panel: &Panel, heads: Heads, summed: bool) -> Vec<Batch> {
    let (group, dim) = (heads.q / heads.kv, heads.dim);
    let (wq, wkv) = (heads.q * dim, heads.kv * dim);
    let scores = panel.queries.len() * panel.stride();
    let sequences = panel.sequences.len();
    let at = |s: usize, h: usize| {
        let row = panel.row + s * panel.length;
        let q = (row + panel.queries.start) * wq + h * dim;
        let kv = (row + panel.keys.start) * wkv + h / group * dim;
        (q, kv, (s * heads.q + h) * scores)
    };
    let batch = |count, s, h, next: (usize, usize, usize)| {
        let (q, kv, s) = at(s, h);
        Batch { count, q: (q, next.0), kv: (kv, next.1), scores: (s, next.2) }
    };
    let over_heads = sequences * if summed { group } else { group.min(heads.kv) };
    if heads.q < over_heads {
        let next = (panel.length * wq, panel.length * wkv, heads.q * scores);
        return (0..heads.q).map(|h| batch(sequences, 0, h, next)).collect();
    }
    let each = 0..sequences;
    if summed || group <= heads.kv {
        let next = (group * dim, dim, group * scores);
        each.flat_map(|s| (0..group).map(move |j| (s, j))).map(|(s, j)| batch(heads.kv, s, j, next)).collect()
    } else {
        let next = (dim, 0, scores);
        each.flat_map(|s| (0..heads.kv).map(move |g| (s, g * group))).map(|(s, h)| batch(group, s, h, next)).collect()
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionPanel {
    key_len: Ptr,
    rows: u64,
    queries: u32,
    of_sequence: u32,
    sequence: u32,
    first_query: u32,
    first_key: u32,
    keys: u32,
    stride: u32,
    window: u32,
    scale: f32,
    cap: f32,
}

#[repr(C)]
struct AttentionSoftmax {
    scores: Ptr,
    probabilities: Ptr,
    panel: AttentionPanel,
}
// SAFETY: the fields are those of `AttentionSoftmax` in gpu.cu.
unsafe impl Arguments for AttentionSoftmax {
    const NAME: &'static str = "attention_softmax";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct AttentionSoftmaxBackward {
    scores: Ptr,
    dp: Ptr,
    probabilities: Ptr,
    ds: Ptr,
    panel: AttentionPanel,
}
// SAFETY: the fields are those of `AttentionSoftmaxBackward` in gpu.cu.
unsafe impl Arguments for AttentionSoftmaxBackward {
    const NAME: &'static str = "attention_softmax_backward";
    const BLOCK: u32 = 256;
}

/// One call's checked operands.
pub(super) struct Pass<'a> {
    pub(super) device: Device,
    pub(super) heads: Heads,
    pub(super) batch: &'a DeviceSequences,
    panels: Vec<Panel>,
}

impl<'a> Pass<'a> {
    fn new(q: &Matrix, [k, v]: [&Matrix; 2], heads: Heads, batch: &'a DeviceSequences, bytes: usize) -> Result<Self> {
        let (n, element) = (batch.rows(), q.element());
        check(heads)?;
        shape("attention: q", q, n, heads.q * heads.dim)?;
        shape("attention: k", k, n, heads.kv * heads.dim)?;
        shape("attention: v", v, n, heads.kv * heads.dim)?;
        let alike = k.element() == element && v.element() == element;
        ensure!(alike, "attention: q is {element}, k {} and v {}, and one type is needed", k.element(), v.element());
        let key_len = batch.key_len.as_ref().map_or(q, |(_, key_len)| key_len);
        let device = device("attention", q, &[k, v, key_len])?;
        Ok(Self { device, heads, batch, panels: panels(batch, heads, bytes) })
    }

    /// Room for the scores of any panel.
    fn scores(&self, element: Element) -> Result<Matrix> {
        let most = self.panels.iter().map(|p| p.rows(self.heads) * p.stride()).max().unwrap_or(0);
        self.device.matrix(element, 1, most)
    }

    fn arguments(&self, panel: &Panel) -> Result<AttentionPanel> {
        let key_len = match &self.batch.key_len {
            Some((all, matrix)) => matrix.input("attention key_len", Element::U32, all.len())?,
            None => Ptr::NULL,
        };
        Ok(AttentionPanel {
            key_len,
            rows: panel.rows(self.heads) as u64,
            queries: size("attention", panel.queries.len())?,
            of_sequence: size("attention", self.heads.q * panel.queries.len())?,
            sequence: size("attention", panel.sequences.start)?,
            first_query: size("attention", panel.queries.start)?,
            first_key: size("attention", panel.keys.start)?,
            keys: size("attention", panel.keys.len())?,
            stride: size("attention", panel.stride())?,
            window: self.heads.window.map_or(Ok(0), |w| size("attention window", w))?,
            scale: self.heads.scale,
            cap: self.heads.soft_cap.unwrap_or(0.0),
        })
    }

    /// scores = x k^T, x in the rows of q: products of queries with keys, or of dL/do with values.
    fn by_keys(&self, panel: &Panel, x: &Matrix, k: &Matrix, scores: &Matrix) -> Result<()> {
        let (wq, wkv) = (x.cols(), k.cols());
        for b in batches(panel, self.heads, false) {
            self.device.gemm(Gemm {
                m: panel.queries.len(),
                n: panel.keys.len(),
                k: self.heads.dim,
                batch: b.count,
                x: Strided { matrix: x, offset: b.q.0, row: wq, next: b.q.1 },
                x_transposed: false,
                w: Strided { matrix: k, offset: b.kv.0, row: wkv, next: b.kv.1 },
                w_transposed: true,
                y: Strided { matrix: scores, offset: b.scores.0, row: panel.stride(), next: b.scores.1 },
                alpha: 1.0,
                beta: 0.0,
            })?;
        }
        Ok(())
    }

    /// y = p v in the rows of q: probabilities with values, or gradients of scores with keys.
    fn by_values(&self, panel: &Panel, p: &Matrix, v: &Matrix, y: &Matrix) -> Result<()> {
        let (wq, wkv) = (y.cols(), v.cols());
        for b in batches(panel, self.heads, false) {
            self.device.gemm(Gemm {
                m: panel.queries.len(),
                n: self.heads.dim,
                k: panel.keys.len(),
                batch: b.count,
                x: Strided { matrix: p, offset: b.scores.0, row: panel.stride(), next: b.scores.1 },
                x_transposed: false,
                w: Strided { matrix: v, offset: b.kv.0, row: wkv, next: b.kv.1 },
                w_transposed: false,
                y: Strided { matrix: y, offset: b.q.0, row: wq, next: b.q.1 },
                alpha: 1.0,
                beta: 0.0,
            })?;
        }
        Ok(())
    }

    /// y += p^T x in the rows of keys and values, over all heads of a group one after the other.
    fn add_to_keys(&self, panel: &Panel, p: &Matrix, x: &Matrix, y: &Matrix) -> Result<()> {
        let (wq, wkv) = (x.cols(), y.cols());
        for b in batches(panel, self.heads, true) {
            self.device.gemm(Gemm {
                m: panel.keys.len(),
                n: self.heads.dim,
                k: panel.queries.len(),
                batch: b.count,
                x: Strided { matrix: p, offset: b.scores.0, row: panel.stride(), next: b.scores.1 },
                x_transposed: true,
                w: Strided { matrix: x, offset: b.q.0, row: wq, next: b.q.1 },
                w_transposed: false,
                y: Strided { matrix: y, offset: b.kv.0, row: wkv, next: b.kv.1 },
                alpha: 1.0,
                beta: 1.0,
            })?;
        }
        Ok(())
    }
}

/// Whether the heads make sense together.
pub(super) fn check(heads: Heads) -> Result<()> {
    let groups = heads.kv > 0 && heads.q > 0 && heads.q.is_multiple_of(heads.kv) && heads.dim > 0;
    ensure!(
        groups && heads.window != Some(0),
        "attention of {heads:?}: q is a multiple of kv, and a window sees a key"
    );
    Ok(())
}

/// o (N, q * dim) of q (N, q * dim), k and v (N, kv * dim), all of one type.
///
/// # Errors
/// If shapes or types do not fit.
pub fn forward(q: &Matrix, k: &Matrix, v: &Matrix, batch: &DeviceSequences, heads: Heads) -> Result<Matrix> {
    let element = q.element();
    let pass = Pass::new(q, [k, v], heads, batch, Element::F32.bytes() + element.bytes())?;
    if gpu_tiles::fits(element, heads) {
        return gpu_tiles::forward(&pass, [q, k, v]);
    }
    let (kernel, device) = (variant("attention", &[element])?, &pass.device);
    let o = device.matrix(element, q.rows(), q.cols())?;
    let (scores, probabilities) = (pass.scores(Element::F32)?, pass.scores(element)?);
    for panel in &pass.panels {
        let rows = panel.rows(heads);
        pass.by_keys(panel, q, k, &scores)?;
        let arguments = AttentionSoftmax {
            scores: scores.input("attention scores", Element::F32, rows * panel.stride())?,
            probabilities: probabilities.output("attention probabilities", element, rows * panel.stride())?,
            panel: pass.arguments(panel)?,
        };
        device.launch(kernel.clone(), blocks(rows, WARPS)?, arguments)?;
        pass.by_values(panel, &probabilities, v, &o)?;
    }
    Ok(o)
}

/// (dL/dq, dL/dk, dL/dv) of dL/do (N, q * dim), all of one type. Sums over queries and over the heads of a group are
/// f32.
///
/// # Errors
/// If shapes or types do not fit.
pub fn backward(
    q: &Matrix,
    k: &Matrix,
    v: &Matrix,
    batch: &DeviceSequences,
    heads: Heads,
    d_o: &Matrix,
) -> Result<(Matrix, Matrix, Matrix)> {
    let element = q.element();
    let pass = Pass::new(q, [k, v], heads, batch, 2 * (Element::F32.bytes() + element.bytes()))?;
    device("attention backward", q, &[d_o])?;
    shape("attention backward: the gradient", d_o, q.rows(), q.cols())?;
    if gpu_tiles::fits(element, heads) {
        ensure!(d_o.element() == element, "attention backward: a gradient of {} for {element}", d_o.element());
        return gpu_tiles::backward(&pass, [q, k, v, d_o]);
    }
    let (kernel, device) = (variant("attention backward", &[element])?, &pass.device);
    let dq = device.matrix(element, q.rows(), q.cols())?;
    let (dk, dv) = (device.zeros(Element::F32, k.rows(), k.cols())?, device.zeros(Element::F32, k.rows(), k.cols())?);
    let (scores, dp) = (pass.scores(Element::F32)?, pass.scores(Element::F32)?);
    let (probabilities, ds) = (pass.scores(element)?, pass.scores(element)?);
    for panel in &pass.panels {
        let (rows, numbers) = (panel.rows(heads), panel.rows(heads) * panel.stride());
        pass.by_keys(panel, q, k, &scores)?;
        pass.by_keys(panel, d_o, v, &dp)?;
        let arguments = AttentionSoftmaxBackward {
            scores: scores.input("attention scores", Element::F32, numbers)?,
            dp: dp.input("attention dp", Element::F32, numbers)?,
            probabilities: probabilities.output("attention probabilities", element, numbers)?,
            ds: ds.output("attention ds", element, numbers)?,
            panel: pass.arguments(panel)?,
        };
        device.launch(kernel.clone(), blocks(rows, WARPS)?, arguments)?;
        pass.by_values(panel, &ds, k, &dq)?;
        pass.add_to_keys(panel, &ds, q, &dk)?;
        pass.add_to_keys(panel, &probabilities, d_o, &dv)?;
    }
    Ok((dq, columns::gpu::cast(&dk, element)?, columns::gpu::cast(&dv, element)?))
}
