//! Causal attention over ragged batches with grouped key/value heads, and decoding over a KV cache: formula, checks,
//! dispatch.
//!
//! o_i = sum_{j <= i} p_ij v_j, p_i = softmax_j(s_ij), s_ij = scale q_i . k_j, within each sequence and head. A window
//! w restricts j to j > i - w; a soft cap c replaces the scores by c tanh(s / c). Scores exist for 48 queries at a
//! time, never T x T for a long sequence. Saved for backward: q, k, v. A decoding step rotates its query and
//! key too, by `rope`. It does not depend on weights. Read `kv_cache.rs` and `cpu.rs` beside it, then `logprobs/mod.rs`.

mod cpu;
pub mod device_cache;
pub mod gpu;
mod gpu_tiles;
mod kv_cache;

use std::ops::Range;

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::Array;
use crate::ops::columns;
use crate::ops::rope::{self, Direction, RopeTable};

pub use kv_cache::{KvCache, NextStep};

/// Queries whose scores exist at once.
pub(crate) const QUERIES: usize = 48;

/// What the keys and values of a KV cache are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
pub enum KvCacheType {
    /// The type of the products.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// ggml's blocks of 32 signed bytes with a scale, along a head: 8.5 bits a number. Only devices have it.
    #[serde(rename = "q8_0")]
    Q8_0,
}

impl KvCacheType {
    /// The value of the `kv_cache_type` key.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Q8_0 => "q8_0",
        }
    }
}

/// Heads of one attention layer, and which keys they attend to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key/value heads; `q` is a multiple of it.
    pub kv: usize,
    /// Width of one head.
    pub dim: usize,
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// Keys that each query attends to at most, its own included; `None`: all keys up to its own.
    pub window: Option<usize>,
    /// Soft cap of the scores (Gemma 2).
    pub soft_cap: Option<f32>,
}

impl Heads {
    /// Heads without window and soft cap, scaled by 1 / sqrt(dim).
    pub fn full(q: usize, kv: usize, dim: usize) -> Self {
        Self { q, kv, dim, scale: 1.0 / (dim as f32).sqrt(), window: None, soft_cap: None }
    }

    /// The first key that query `i` attends to.
    fn first_key(self, i: usize) -> usize {
        self.window.map_or(0, |w| (i + 1).saturating_sub(w))
    }

    /// The keys that query `i` attends to if only the first `key_len` are keys; at least one.
    fn attended(self, i: usize, key_len: usize) -> Range<usize> {
        let end = key_len.min(i + 1);
        self.first_key(i).min(end - 1)..end
    }

    /// The factor that the softmax applies: 1 if the soft cap has already applied the scale.
    fn softmax_scale(self) -> f32 {
        if self.soft_cap.is_some() { 1.0 } else { self.scale }
    }

    fn check(self, q: &Array, k: &Array, v: &Array, cu_seqlens: &[usize]) -> Result<usize> {
        let (n, width) = q.dims2()?;
        let (kv, k, v) = ((n, self.kv * self.dim), k.dims2()?, v.dims2()?);
        if width != self.q * self.dim || k != kv || v != kv || cu_seqlens.last() != Some(&n) {
            let tokens = cu_seqlens.last().copied().unwrap_or(0);
            bail!("attention {self:?}: q ({n}, {width}), k {k:?}, v {v:?}, {tokens} tokens by cu_seqlens");
        }
        Ok(n)
    }
}

/// The sequences of a ragged batch, and which of their tokens are keys.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// Cumulative lengths (S + 1): sequence s is rows cu_seqlens\[s\]..cu_seqlens\[s + 1\].
    pub cu_seqlens: &'a [usize],
    /// Keys per sequence (S): only the first key_len\[s\] >= 1 tokens are attended to; `None`: all.
    pub key_len: Option<&'a [usize]>,
}

impl<'a> Sequences<'a> {
    /// Sequences without padding.
    pub fn whole(cu_seqlens: &'a [usize]) -> Self {
        Self { cu_seqlens, key_len: None }
    }

    fn key_len(self, s: usize) -> usize {
        self.key_len.map_or(usize::MAX, |key_len| key_len[s])
    }
}

/// o (N, q * dim) of q (N, q * dim), k and v (N, kv * dim).
///
/// # Errors
/// If shapes do not fit.
pub fn forward(q: &Array, k: &Array, v: &Array, sequences: Sequences<'_>, heads: Heads) -> Result<Array> {
    heads.check(q, k, v, sequences.cu_seqlens)?;
    Ok(match q {
        Array::Host(q) => cpu::forward(q, k.host()?, v.host()?, sequences, heads)?.into(),
        Array::Device(q) => {
            let sequences = gpu::DeviceSequences::new(q.device(), sequences.cu_seqlens, sequences.key_len)?;
            gpu::forward(q, k.device()?, v.device()?, &sequences, heads)?.into()
        }
    })
}

/// (dL/dq, dL/dk, dL/dv) of dL/do (N, q * dim). Probabilities are recomputed.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(
    q: &Array,
    k: &Array,
    v: &Array,
    sequences: Sequences<'_>,
    heads: Heads,
    d_o: &Array,
) -> Result<(Array, Array, Array)> {
    let n = heads.check(q, k, v, sequences.cu_seqlens)?;
    let width = heads.q * heads.dim;
    if d_o.dims2()? != (n, width) {
        bail!("attention backward: a gradient {:?} for {n} x {width}", d_o.dims2()?);
    }
    Ok(match q {
        Array::Host(q) => {
            let (dq, dk, dv) = cpu::backward(q, k.host()?, v.host()?, sequences, heads, d_o.host()?)?;
            (dq.into(), dk.into(), dv.into())
        }
        Array::Device(q) => {
            let sequences = gpu::DeviceSequences::new(q.device(), sequences.cu_seqlens, sequences.key_len)?;
            let d_o = columns::gpu::cast(d_o.device()?, q.element())?;
            let (dq, dk, dv) = gpu::backward(q, k.device()?, v.device()?, &sequences, heads, &d_o)?;
            (dq.into(), dk.into(), dv.into())
        }
    })
}

/// Decoding: o (S, q * dim) of one new token per sequence, of its q (S, q * dim), k and v (S, kv * dim) before their
/// rotation; `rotation` has the table and the tokens' positions (S). The rotated k and v are appended to the cache.
///
/// # Errors
/// If shapes do not fit, or a position is past the context.
pub fn step(
    q: Array,
    k: Array,
    v: &Array,
    rotation: Option<(&RopeTable, &[u32])>,
    cache: &mut KvCache,
    heads: Heads,
) -> Result<Array> {
    if let Array::Device(q) = &q {
        return Ok(cache.device_mut()?.step([q, k.device()?, v.device()?], rotation, heads)?.into());
    }
    let (q, k) = match rotation {
        Some((table, positions)) => {
            let rotate = |x: Array| rope::rotate(&x, positions, table, Direction::Forward);
            (rotate(q)?, rotate(k)?)
        }
        None => (q, k),
    };
    cache.append(&k, v)?;
    decode(&q, cache, heads)
}

/// Decoding: o (S, q * dim) of one new query per sequence, q (S, q * dim). The cache already holds the new tokens' keys
/// and values.
///
/// # Errors
/// If shapes do not fit.
pub fn decode(q: &Array, cache: &KvCache, heads: Heads) -> Result<Array> {
    let (n, width) = q.dims2()?;
    if n != cache.len() || width != heads.q * heads.dim {
        bail!("decode {heads:?}: q ({n}, {width}) and {} cached sequences", cache.len());
    }
    Ok(match q {
        Array::Host(q) => cpu::decode(q, cache.host()?, heads)?.into(),
        Array::Device(q) => cache.device()?.decode(q, heads)?.into(),
    })
}
