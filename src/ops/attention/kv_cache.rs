//! The KV cache of one layer: keys and values of every sequence under generation. It is opaque, so that a device can store
//! it as it likes. It does not depend on weights or other operations. Read `mod.rs` beside it for `decode`.

use candle_core::{Result, Tensor};

use crate::ops::cpu::view;

/// Keys and values of the sequences of a batch under generation, in one layer.
pub struct KvCache {
    /// Tokens per sequence that memory is reserved for beyond the prompt.
    capacity: usize,
    pub(super) sequences: Vec<CachedSequence>,
}

/// Keys and values of one sequence, in the order of its tokens.
pub(super) struct CachedSequence {
    /// (tokens, kv * dim), after rotation.
    pub(super) keys: Vec<f32>,
    /// (tokens, kv * dim).
    pub(super) values: Vec<f32>,
}

/// A full list grows by at least this many elements: doubling would leave half of a long one unused.
const GROWTH: usize = 1 << 14;

impl CachedSequence {
    /// Adds the keys and values of some tokens.
    fn extend(&mut self, keys: &[f32], values: &[f32]) {
        for (list, more) in [(&mut self.keys, keys), (&mut self.values, values)] {
            if list.capacity() - list.len() < more.len() {
                list.reserve_exact(more.len().max(GROWTH));
            }
            list.extend_from_slice(more);
        }
    }
}

impl KvCache {
    /// An empty cache that will reserve memory for `capacity` tokens per sequence beyond its prompt.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, sequences: vec![] }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether it holds no sequence.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Adds one sequence per element of `prompts`: the keys and values of prompt p of a batch, which are rows
    /// cu_seqlens\[p\]..cu_seqlens\[p + 1\] of k and v (N, kv * dim).
    ///
    /// # Errors
    /// If shapes differ or a prompt does not exist.
    pub fn append_prompts(&mut self, k: &Tensor, v: &Tensor, cu_seqlens: &[usize], prompts: &[usize]) -> Result<()> {
        let (n, width) = k.dims2()?;
        if v.dims() != [n, width] || cu_seqlens.last() != Some(&n) || prompts.iter().any(|p| p + 1 >= cu_seqlens.len())
        {
            candle_core::bail!("KV cache: k {:?}, v {:?}, prompts {prompts:?} of {cu_seqlens:?}", k.dims(), v.dims());
        }
        let (k, v) = (view(k)?, view(v)?);
        self.sequences.reserve_exact(prompts.len());
        for &prompt in prompts {
            let rows = cu_seqlens[prompt] * width..cu_seqlens[prompt + 1] * width;
            let list = || Vec::with_capacity(rows.len() + self.capacity * width);
            let mut sequence = CachedSequence { keys: list(), values: list() };
            sequence.extend(&k[rows.clone()], &v[rows]);
            self.sequences.push(sequence);
        }
        Ok(())
    }

    /// Appends one token per sequence: k and v (S, kv * dim).
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let (n, width) = k.dims2()?;
        if n != self.len() || v.dims() != [n, width] {
            candle_core::bail!("KV cache of {} sequences: k {:?}, v {:?}", self.len(), k.dims(), v.dims());
        }
        let (k, v) = (view(k)?, view(v)?);
        for ((sequence, k), v) in self.sequences.iter_mut().zip(k.chunks_exact(width)).zip(v.chunks_exact(width)) {
            sequence.extend(k, v);
        }
        Ok(())
    }

    /// Keeps the sequences s for which `keep[s]` is true and frees the memory of the others.
    pub fn retain(&mut self, keep: &[bool]) {
        let mut flags = keep.iter();
        self.sequences.retain(|_| *flags.next().unwrap_or(&true));
    }

    /// Allocated bytes of keys and values.
    pub fn size_in_bytes(&self) -> usize {
        self.sequences.iter().map(|s| (s.keys.capacity() + s.values.capacity()) * size_of::<f32>()).sum()
    }
}
