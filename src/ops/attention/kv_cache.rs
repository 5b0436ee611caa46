//! The KV cache of one layer: keys and values of every sequence under generation, on the host or on a device. It does not
//! depend on weights. Read `mod.rs` beside it for `decode`, and `device_cache.rs` for the slots on a device.

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::device::{Array, Matrix};
use crate::ops::attention::device_cache::{CHUNK, Copied, DeviceCache, Live, Writes};
use crate::ops::attention::{Heads, KvCacheType};
use crate::ops::cpu::view;
use crate::ops::rope::RopeTable;

/// Keys and values of the sequences of a batch under generation, in one layer.
pub struct KvCache {
    /// Tokens per sequence that memory is reserved for beyond the prompt.
    capacity: usize,
    /// What keys and values are stored as.
    kind: KvCacheType,
    store: Store,
}

enum Store {
    Host(HostCache),
    Device(Box<DeviceSlots>),
}

/// Keys and values of each sequence in lists of its own.
#[derive(Default)]
pub(super) struct HostCache {
    pub(super) sequences: Vec<CachedSequence>,
}

/// Sequences in slots of equal capacity. A sequence that leaves frees its slot without moving memory.
pub(super) struct DeviceSlots {
    cache: DeviceCache,
    /// Slot and number of tokens of each live sequence.
    slots: Vec<usize>,
    lengths: Vec<usize>,
}

/// Keys and values of one sequence, in the order of its tokens.
pub(super) struct CachedSequence {
    /// (tokens, kv * dim), after rotation.
    pub(super) keys: Vec<f32>,
    /// (tokens, kv * dim).
    pub(super) values: Vec<f32>,
}

/// What a decoding step on a device reads of a cache.
pub struct NextStep {
    /// The input "cache": slots, lengths and the newest rows of the live sequences.
    pub numbers: Vec<u32>,
    /// Chunks that the longest sequence is cut into: the kernels' grid and memory depend on them alone, windowed or not.
    pub chunks: usize,
}

/// A full list grows by at least this many elements: doubling would leave half of a long one unused.
const GROWTH: usize = 1 << 14;

/// A device's full cache grows by at least this many tokens per slot.
const SLOT_GROWTH: usize = 256;

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

/// A single head as wide as all key/value heads together: how a cache is laid out, whatever heads read it.
fn row(width: usize) -> Heads {
    Heads::full(1, 1, width)
}

impl KvCache {
    /// An empty cache that will reserve memory for `capacity` tokens per sequence beyond its prompt.
    pub fn new(capacity: usize, kind: KvCacheType) -> Self {
        Self { capacity, kind, store: Store::Host(HostCache::default()) }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        match &self.store {
            Store::Host(host) => host.sequences.len(),
            Store::Device(device) => device.slots.len(),
        }
    }

    /// Whether it holds no sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn host(&self) -> Result<&HostCache> {
        match &self.store {
            Store::Host(host) => Ok(host),
            Store::Device(_) => bail!("a query on the host for a KV cache on a device"),
        }
    }

    pub(super) fn device(&self) -> Result<&DeviceSlots> {
        match &self.store {
            Store::Device(device) => Ok(device),
            Store::Host(_) => bail!("a query on a device for a KV cache on the host"),
        }
    }

    /// Fills an empty cache with one sequence per element of `prompts`: the keys and values of prompt p of a batch, which are
    /// rows cu_seqlens\[p\]..cu_seqlens\[p + 1\] of k and v (N, kv * dim).
    ///
    /// # Errors
    /// If shapes differ, a prompt does not exist, or device memory is out.
    pub fn append_prompts(&mut self, k: &Array, v: &Array, cu_seqlens: &[usize], prompts: &[usize]) -> Result<()> {
        let (n, width) = k.dims2()?;
        if v.dims2()? != (n, width)
            || cu_seqlens.last() != Some(&n)
            || prompts.iter().any(|p| p + 1 >= cu_seqlens.len())
        {
            bail!("KV cache: k {:?}, v {:?}, prompts {prompts:?} of {cu_seqlens:?}", k.dims2()?, v.dims2()?);
        }
        match k {
            Array::Host(k) => self.append_host_prompts(k, v.host()?, width, cu_seqlens, prompts),
            Array::Device(k) => {
                let rows = [k, v.device()?];
                let slots = DeviceSlots::new(rows, cu_seqlens, prompts, (self.capacity, self.kind))?;
                self.store = Store::Device(Box::new(slots));
                Ok(())
            }
        }
    }

    fn append_host_prompts(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        width: usize,
        cu_seqlens: &[usize],
        prompts: &[usize],
    ) -> Result<()> {
        let (k, v) = (view(k)?, view(v)?);
        let Store::Host(host) = &mut self.store else { bail!("keys on the host for a KV cache on a device") };
        if self.kind != KvCacheType::Auto {
            bail!("a KV cache in {:?} is a device's, and these keys are on the host", self.kind);
        }
        host.sequences.reserve_exact(prompts.len());
        for &prompt in prompts {
            let rows = cu_seqlens[prompt] * width..cu_seqlens[prompt + 1] * width;
            let list = || Vec::with_capacity(rows.len() + self.capacity * width);
            let mut sequence = CachedSequence { keys: list(), values: list() };
            sequence.extend(&k[rows.clone()], &v[rows]);
            host.sequences.push(sequence);
        }
        Ok(())
    }

    /// Appends one token per sequence on the host: k and v (S, kv * dim). On a device `step` of mod.rs does it.
    ///
    /// # Errors
    /// If shapes do not fit, or the cache lies on a device.
    pub fn append(&mut self, k: &Array, v: &Array) -> Result<()> {
        let (n, width) = k.dims2()?;
        if n != self.len() || v.dims2()? != (n, width) {
            bail!("KV cache of {} sequences: k ({n}, {width}), v {:?}", self.len(), v.dims2()?);
        }
        match &mut self.store {
            Store::Host(host) => {
                let (k, v) = (view(k.host()?)?, view(v.host()?)?);
                let new = k.chunks_exact(width).zip(v.chunks_exact(width));
                host.sequences.iter_mut().zip(new).for_each(|(sequence, (k, v))| sequence.extend(k, v));
                Ok(())
            }
            Store::Device(_) => bail!("a device's cache is appended to by the step that rotates"),
        }
    }

    /// What a step on a device reads of this cache, the next one or the `ahead`-th after it; `None` if the cache grows first, or
    /// lies on the host.
    ///
    /// # Errors
    /// If a number does not fit 32 bits.
    pub fn next_step(&self, ahead: usize) -> Result<Option<NextStep>> {
        let Store::Device(device) = &self.store else { return Ok(None) };
        let DeviceSlots { cache, slots, lengths } = &**device;
        let lengths: Vec<usize> = lengths.iter().map(|length| length + 1 + ahead).collect();
        let longest = lengths.iter().max().copied().unwrap_or(0);
        if longest > cache.capacity() {
            return Ok(None);
        }
        let numbers = Live::numbers(cache.capacity(), slots, &lengths)?;
        Ok(Some(NextStep { numbers, chunks: longest.div_ceil(CHUNK) }))
    }

    /// Whether a device's next step needs memory of another size than this one: a full cache grows, and sums of more chunks
    /// meet. A plan runs such steps, and passes over the others by [`KvCache::advance`].
    pub fn next_step_differs(&self) -> bool {
        match &self.store {
            Store::Host(_) => true,
            Store::Device(device) => {
                let longest = device.lengths.iter().max().copied().unwrap_or(0) + 1;
                longest > device.cache.capacity() || longest % CHUNK <= 1
            }
        }
    }

    /// Counts one more token per sequence without its keys and values: for plans, whose numbers nobody reads.
    ///
    /// # Errors
    /// If the cache lies on the host, or device memory is out.
    pub fn advance(&mut self) -> Result<()> {
        self.device_mut()?.extend()
    }

    pub(super) fn device_mut(&mut self) -> Result<&mut DeviceSlots> {
        match &mut self.store {
            Store::Device(device) => Ok(device),
            Store::Host(_) => bail!("a query on a device for a KV cache on the host"),
        }
    }

    /// Keeps the sequences s for which `keep[s]` is true. On the host the memory of the others is freed; on a device it is
    /// freed with the cache.
    pub fn retain(&mut self, keep: &[bool]) {
        let mut flags = keep.iter();
        let mut kept = || *flags.next().unwrap_or(&true);
        match &mut self.store {
            Store::Host(host) => host.sequences.retain(|_| kept()),
            Store::Device(device) => {
                let flags: Vec<bool> = device.slots.iter().map(|_| kept()).collect();
                for list in [&mut device.slots, &mut device.lengths] {
                    let mut flags = flags.iter();
                    list.retain(|_| *flags.next().unwrap_or(&true));
                }
            }
        }
    }

    /// Takes over the sequences of another cache of this layer; they come after its own.
    ///
    /// # Errors
    /// If the caches lie on different machines or differ in width, or device memory is out.
    pub fn join(&mut self, other: Self) -> Result<()> {
        match (&mut self.store, other.store) {
            (Store::Host(ours), Store::Host(theirs)) => {
                ours.sequences.extend(theirs.sequences);
                Ok(())
            }
            (Store::Device(ours), Store::Device(theirs)) => ours.join(*theirs),
            _ => bail!("a KV cache on the host and one on a device cannot be joined"),
        }
    }

    /// Allocated bytes of keys and values.
    pub fn size_in_bytes(&self) -> usize {
        match &self.store {
            Store::Host(host) => {
                host.sequences.iter().map(|s| (s.keys.capacity() + s.values.capacity()) * size_of::<f32>()).sum()
            }
            Store::Device(device) => device.cache.bytes(),
        }
    }
}

impl DeviceSlots {
    fn new(
        [k, v]: [&Matrix; 2],
        cu_seqlens: &[usize],
        prompts: &[usize],
        (capacity, kind): (usize, KvCacheType),
    ) -> Result<Self> {
        let rows = |prompt: usize| cu_seqlens[prompt]..cu_seqlens[prompt + 1];
        let lengths: Vec<usize> = prompts.iter().map(|&p| rows(p).len()).collect();
        let capacity = lengths.iter().max().copied().unwrap_or(0) + capacity;
        let (device, slots) = (k.device(), prompts.len());
        let cache = DeviceCache::new(device, (k.element(), kind), slots, capacity, row(k.cols()))?;
        let copied: Vec<Copied> =
            prompts.iter().enumerate().map(|(slot, &p)| Copied { rows: rows(p), slot, position: 0 }).collect();
        cache.write(k, v, &Writes::new(device, capacity, &copied)?)?;
        Ok(Self { cache, slots: (0..slots).collect(), lengths })
    }

    /// Room for one more token per sequence, which counts from now on.
    fn extend(&mut self) -> Result<()> {
        let longest = self.lengths.iter().max().copied().unwrap_or(0) + 1;
        if longest > self.cache.capacity() {
            self.grow(self.slots.len(), longest.max(self.cache.capacity() + SLOT_GROWTH))?;
        }
        self.lengths.iter_mut().for_each(|length| *length += 1);
        Ok(())
    }

    /// o (S, q * dim) of one new token per sequence, from its q, k and v before their rotation. q is overwritten.
    pub(super) fn step(
        &mut self,
        [q, k, v]: [&Matrix; 3],
        rotation: Option<(&RopeTable, &[u32])>,
        heads: Heads,
    ) -> Result<Matrix> {
        self.extend()?;
        let (device, live) = (q.device(), self.live()?);
        let on_device = |(table, positions): (&RopeTable, &[u32])| -> Result<_> {
            table.check(positions)?;
            let last = positions.iter().copied().max().unwrap_or(0) as usize;
            Ok((table.on(device, last)?, device.input("positions", positions)?))
        };
        let rotation = rotation.map(on_device).transpose()?;
        let rotation = rotation.as_ref().map(|(table, positions)| (&**table, positions));
        self.cache.append([q, k, v], &live, heads, rotation)?;
        self.cache.decode(q, &live, heads)
    }

    /// Moves the live sequences into a new cache of `slots` slots with `capacity` tokens each.
    fn grow(&mut self, slots: usize, capacity: usize) -> Result<()> {
        let cache = self.cache.alike(slots, capacity)?;
        let places: Vec<usize> = (0..self.slots.len()).collect();
        self.copy_to(&cache, &places)?;
        (self.slots, self.cache) = (places, cache);
        Ok(())
    }

    /// Copies the live sequences into the slots `places` of another cache.
    fn copy_to(&self, cache: &DeviceCache, places: &[usize]) -> Result<()> {
        let old = self.cache.capacity();
        let live = self.slots.iter().zip(&self.lengths).zip(places);
        let copied: Vec<Copied> = live
            .map(|((&from, &length), &slot)| Copied { rows: from * old..from * old + length, slot, position: 0 })
            .collect();
        cache.copy(&self.cache, &Writes::new(cache.device(), cache.capacity(), &copied)?)
    }

    /// Takes over the sequences of another cache: into slots that sequences have left, or into more of them.
    fn join(&mut self, other: Self) -> Result<()> {
        if self.slots.is_empty() || other.slots.is_empty() {
            if self.slots.is_empty() {
                *self = other;
            }
            return Ok(());
        }
        let (wanted, have) = (self.slots.len() + other.slots.len(), self.cache.slots());
        let capacity = self.cache.capacity().max(other.cache.capacity());
        if wanted > have || capacity > self.cache.capacity() {
            let slots = if wanted > have { wanted.max(have + have / 2) } else { have };
            self.grow(slots, capacity)?;
        }
        let mut free: Vec<usize> = (0..self.cache.slots()).filter(|slot| !self.slots.contains(slot)).collect();
        free.truncate(other.slots.len());
        other.copy_to(&self.cache, &free)?;
        self.slots.extend(free);
        self.lengths.extend(other.lengths);
        Ok(())
    }

    fn live(&self) -> Result<Live> {
        Live::new(self.cache.device(), self.cache.capacity(), &self.slots, &self.lengths)
    }

    /// o (S, q * dim) of one query per live sequence.
    pub(super) fn decode(&self, q: &Matrix, heads: Heads) -> Result<Matrix> {
        self.cache.decode(q, &self.live()?, heads)
    }
}
