//! The KV cache on a device, and attention of one new query per sequence over it. Kernels are in gpu.cu.
//!
//! A cache has slots of equal capacity. Which slots live and how long their sequences are is an argument of every step,
//! so that a finished sequence leaves without moving memory. Keys and values lie there in the type of the products or in q8_0
//! blocks. It does not depend on layers. Read `kv_cache.rs` beside it for the use.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::gpu::check;
use super::{Heads, KvCacheType};
use crate::device::{Arguments, Device, Element, Matrix, Ptr, Variant};
use crate::ops::launch::{TILE_THREADS, blocks, device, shape, size, tiles, variant};
use crate::ops::rope::gpu::DeviceRopeTable;

/// Keys of a chunk, query heads of a block and the widest head, as in gpu.cu.
pub(super) const CHUNK: usize = 256;
const TILE: usize = 4;
const WIDEST: usize = 256;

/// Numbers of a q8_0 block. Blocks lie along a head, so a head is a whole number of them.
pub(crate) const BLOCK: usize = 32;

/// Keys and values of one layer: rows slot * capacity + position of (slots * capacity, kv * dim) each.
#[derive(Clone, Debug)]
pub struct DeviceCache {
    keys: Rows,
    values: Rows,
    /// The type of queries, new keys and values, and outputs.
    element: Element,
    slots: usize,
    capacity: usize,
}

/// Rows of keys or of values.
#[derive(Clone, Debug)]
struct Rows {
    /// (slots * capacity, kv * dim): numbers of the products' type, or the bytes of q8_0 blocks.
    numbers: Matrix,
    /// (slots * capacity, kv * dim / 32) f16: the scales of the blocks.
    scales: Option<Matrix>,
}

/// Addresses of rows of keys or of values.
#[repr(C)]
#[derive(Clone, Copy)]
struct Cached {
    numbers: Ptr,
    /// Null where there are none.
    scales: Ptr,
}

impl Rows {
    fn new(device: &Device, (element, kind): (Element, KvCacheType), rows: usize, width: usize) -> Result<Self> {
        Ok(match kind {
            KvCacheType::Auto => Self { numbers: device.matrix(element, rows, width)?, scales: None },
            KvCacheType::Q8_0 => {
                ensure!(width.is_multiple_of(BLOCK), "cache: rows of {width} numbers are no blocks of {BLOCK}");
                let numbers = device.matrix(Element::U8, rows, width)?;
                Self { numbers, scales: Some(device.matrix(Element::F16, rows, width / BLOCK)?) }
            }
        })
    }

    fn bytes(&self) -> usize {
        self.numbers.bytes() + self.scales.as_ref().map_or(0, Matrix::bytes)
    }

    /// The addresses of all rows, for a kernel that reads or writes them.
    fn addresses(&self) -> Result<Cached> {
        let whole = |of: &Matrix| of.output("cached rows", of.element(), of.len());
        Ok(Cached { numbers: whole(&self.numbers)?, scales: self.scales.as_ref().map_or(Ok(Ptr::NULL), whole)? })
    }

    /// Tells the profile that a kernel uses so few numbers of them.
    fn counts_as(&self, numbers: usize) {
        self.numbers.counts_as(numbers);
        self.scales.iter().for_each(|scales| scales.counts_as(numbers / BLOCK));
    }
}

/// The sequences of one decoding step, on the device. Made once per step and used by all layers.
#[derive(Clone, Debug)]
pub struct Live {
    /// (S) u32 each.
    slots: Matrix,
    lengths: Matrix,
    newest: Writes,
    longest: usize,
    count: usize,
    capacity: usize,
}

/// Rows of new keys and values, and the rows of the cache that they become. Made once and used by all layers.
#[derive(Clone, Debug)]
pub struct Writes {
    /// Absent if the rows are 0, 1, 2, ..
    sources: Option<Matrix>,
    targets: Matrix,
    count: usize,
    /// One past the highest row of the new keys, and of the cache.
    source_rows: usize,
    target_rows: usize,
    capacity: usize,
}

/// Some neighbouring rows of new keys and values that go to one slot.
#[derive(Clone, Debug)]
pub struct Copied {
    /// Rows of the new keys and values.
    pub rows: Range<usize>,
    /// The slot that they go to.
    pub slot: usize,
    /// The position of the first of them there.
    pub position: usize,
}

#[repr(C)]
struct AttentionCacheWrite {
    k: Ptr,
    v: Ptr,
    keys: Cached,
    values: Cached,
    sources: Ptr,
    targets: Ptr,
    width: u32,
    tiles: u32,
}
// SAFETY: the fields are those of `AttentionCacheWrite` in gpu.cu.
unsafe impl Arguments for AttentionCacheWrite {
    const NAME: &'static str = "attention_cache_write";
    const BLOCK: u32 = TILE_THREADS as u32;
}

#[repr(C)]
struct AttentionAppend {
    q: Ptr,
    k: Ptr,
    v: Ptr,
    keys: Cached,
    values: Cached,
    targets: Ptr,
    positions: Ptr,
    cos: Ptr,
    sin: Ptr,
    count: u32,
    heads: u32,
    kv: u32,
    dim: u32,
    half: u32,
}
// SAFETY: the fields are those of `AttentionAppend` in gpu.cu.
unsafe impl Arguments for AttentionAppend {
    const NAME: &'static str = "attention_append";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct AttentionDecode {
    q: Ptr,
    keys: Cached,
    values: Cached,
    slots: Ptr,
    lengths: Ptr,
    o: Ptr,
    parts: Ptr,
    part_sums: Ptr,
    heads: u32,
    kv: u32,
    dim: u32,
    capacity: u32,
    window: u32,
    chunks: u32,
    scale: f32,
    cap: f32,
}
// SAFETY: the fields are those of `AttentionDecode` in gpu.cu.
unsafe impl Arguments for AttentionDecode {
    const NAME: &'static str = "attention_decode";
    const BLOCK: u32 = 128;
}

#[repr(C)]
struct AttentionMerge {
    parts: Ptr,
    part_sums: Ptr,
    lengths: Ptr,
    o: Ptr,
    heads: u32,
    dim: u32,
    window: u32,
    chunks: u32,
}
// SAFETY: the fields are those of `AttentionMerge` in gpu.cu.
unsafe impl Arguments for AttentionMerge {
    const NAME: &'static str = "attention_merge";
    const BLOCK: u32 = 128;
}

impl Writes {
    /// Rows of a ragged batch that go to slots of `capacity` positions. One row may go to several slots.
    ///
    /// # Errors
    /// If rows pass the end of a slot, or two of them would become the same row of the cache.
    pub fn new(device: &Device, capacity: usize, copied: &[Copied]) -> Result<Self> {
        let (mut sources, mut targets) = (vec![], vec![]);
        for Copied { rows, slot, position } in copied {
            let end = position + rows.len();
            ensure!(end <= capacity, "positions {position}..{end} of a cache with {capacity} per slot");
            for (i, row) in rows.clone().enumerate() {
                sources.push(size("cache source", row)?);
                targets.push(size("cache", slot * capacity + position + i)?);
            }
        }
        let count = targets.len();
        let source_rows = copied.iter().map(|c| c.rows.end).max().unwrap_or(0);
        let target_rows = highest(&targets)?;
        let both = device.indices(&[sources, targets].concat())?.reshape(2, count)?;
        let (sources, targets) = (Some(both.row_range(0..1)?), both.row_range(1..2)?);
        Ok(Self { sources, targets, count, source_rows, target_rows, capacity })
    }
}

/// One past the highest row, of rows that differ.
fn highest(targets: &[u32]) -> Result<usize> {
    let mut sorted = targets.to_vec();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|w| w[0] == w[1]) {
        anyhow::bail!("row {} of the cache would be written twice at once", twice[0]);
    }
    Ok(sorted.last().map_or(0, |&row| row as usize + 1))
}

impl Live {
    /// Sequence s lies in slot `slots[s]`, and has `lengths[s]` tokens with the newest one, whose keys and values
    /// [`Live::newest`] writes.
    ///
    /// # Errors
    /// If a length is 0 or above `capacity`, or two sequences have one slot.
    pub fn new(device: &Device, capacity: usize, slots: &[usize], lengths: &[usize]) -> Result<Self> {
        let (numbers, count) = (Self::numbers(capacity, slots, lengths)?, slots.len());
        let target_rows = highest(&numbers[2 * count..])?;
        let mut sorted = slots.to_vec();
        sorted.sort_unstable();
        ensure!(sorted.windows(2).all(|w| w[0] != w[1]), "two live sequences have one slot: {slots:?}");
        let all = device.input("cache", &numbers)?.reshape(3, count)?;
        let targets = all.row_range(2..3)?;
        let newest = Writes { sources: None, targets, count, source_rows: count, target_rows, capacity };
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let (slots, lengths) = (all.row_range(0..1)?, all.row_range(1..2)?);
        Ok(Self { slots, lengths, newest, longest, count, capacity })
    }

    /// (3, S): slots, lengths, and the rows of the cache where the newest keys and values go.
    pub(super) fn numbers(capacity: usize, slots: &[usize], lengths: &[usize]) -> Result<Vec<u32>> {
        let count = slots.len();
        ensure!(lengths.len() == count, "{count} slots and {} lengths", lengths.len());
        if let Some(length) = lengths.iter().find(|&&n| n == 0 || n > capacity) {
            anyhow::bail!("a cached sequence of {length} tokens, where 1 to {capacity} fit");
        }
        let mut numbers = Vec::with_capacity(3 * count);
        for &slot in slots {
            numbers.push(size("slot", slot)?);
        }
        for &length in lengths {
            numbers.push(size("length", length)?);
        }
        for (&slot, &length) in slots.iter().zip(lengths) {
            numbers.push(size("cache", slot * capacity + length - 1)?);
        }
        Ok(numbers)
    }

    /// Rows 0, 1, 2, .. become the newest of each sequence.
    pub fn newest(&self) -> &Writes {
        &self.newest
    }
}

impl DeviceCache {
    /// Uninitialised room for `slots` sequences of up to `capacity` tokens, whose keys and values of type `element` lie there as
    /// `kind` says.
    ///
    /// # Errors
    /// If memory is out, or rows are no whole number of blocks.
    pub fn new(
        device: &Device,
        (element, kind): (Element, KvCacheType),
        slots: usize,
        capacity: usize,
        heads: Heads,
    ) -> Result<Self> {
        check(heads)?;
        size("cache", slots * capacity)?;
        let room = || Rows::new(device, (element, kind), slots * capacity, heads.kv * heads.dim);
        Ok(Self { keys: room()?, values: room()?, element, slots, capacity })
    }

    /// As what keys and values lie there.
    pub fn kind(&self) -> KvCacheType {
        if self.keys.scales.is_some() { KvCacheType::Q8_0 } else { KvCacheType::Auto }
    }

    /// An empty cache of the same device, types and width.
    ///
    /// # Errors
    /// As for [`DeviceCache::new`].
    pub(super) fn alike(&self, slots: usize, capacity: usize) -> Result<Self> {
        let row = Heads::full(1, 1, self.keys.numbers.cols());
        Self::new(self.device(), (self.element, self.kind()), slots, capacity, row)
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        self.keys.numbers.device()
    }

    fn check(&self, heads: Heads) -> Result<()> {
        check(heads)?;
        let fits = self.kind() == KvCacheType::Auto || heads.dim.is_multiple_of(BLOCK);
        ensure!(fits, "a cache in q8_0 needs heads of a multiple of {BLOCK} numbers, not of {}", heads.dim);
        Ok(())
    }

    /// Slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Tokens per slot.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keys and values, (slots * capacity, kv * dim) each: numbers, or the signed bytes of q8_0 blocks.
    pub fn rows(&self) -> (&Matrix, &Matrix) {
        (&self.keys.numbers, &self.values.numbers)
    }

    /// The scales of the blocks of keys and of values, (slots * capacity, kv * dim / 32) each.
    pub fn scales(&self) -> Option<(&Matrix, &Matrix)> {
        self.keys.scales.as_ref().zip(self.values.scales.as_ref())
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    fn variant(&self, what: &str) -> Result<Variant> {
        Ok(match self.kind() {
            KvCacheType::Auto => variant(what, &[self.element])?,
            KvCacheType::Q8_0 => {
                variant(what, &[self.element])?;
                Variant::named(&format!("q8_0_{}", self.element))
            }
        })
    }

    /// Copies rows of another cache of the same kind into this one.
    ///
    /// # Errors
    /// If rows or types do not fit.
    pub(super) fn copy(&self, from: &Self, writes: &Writes) -> Result<()> {
        ensure!(self.kind() == from.kind(), "cache: rows of {:?} cannot become rows of {:?}", from.kind(), self.kind());
        let (Some((keys, values)), Some((from_keys, from_values))) = (self.scales(), from.scales()) else {
            let (keys, values) = from.rows();
            return self.write(keys, values, writes);
        };
        // Bytes move as words: floats are loaded and stored as they are.
        let words = |rows: &Matrix| rows.window(0, Element::F32, rows.rows(), rows.cols() / Element::F32.bytes());
        let ((k, v), (to_k, to_v)) = (from.rows(), self.rows());
        self.move_rows([&words(k)?, &words(v)?], [&words(to_k)?, &words(to_v)?], writes)?;
        self.move_rows([from_keys, from_values], [keys, values], writes)
    }

    /// Writes rows of k and v (R, kv * dim) into the cache.
    ///
    /// # Errors
    /// If rows or types do not fit.
    pub fn write(&self, k: &Matrix, v: &Matrix, writes: &Writes) -> Result<()> {
        let (to, kernel) = ([self.keys.addresses()?, self.values.addresses()?], self.variant("cache")?);
        self.launch_write([k, v], (self.element, self.keys.numbers.cols()), to, kernel, writes)
    }

    /// Writes rows of k and v into rows of the cache or of a part of it, which have their type.
    fn move_rows(&self, [k, v]: [&Matrix; 2], [keys, values]: [&Matrix; 2], writes: &Writes) -> Result<()> {
        let (element, width) = (keys.element(), keys.cols());
        let plain = |to: &Matrix| -> Result<Cached> {
            Ok(Cached { numbers: to.output("cached rows", element, to.len())?, scales: Ptr::NULL })
        };
        let (to, kernel) = ([plain(keys)?, plain(values)?], variant("cache", &[element])?);
        self.launch_write([k, v], (element, width), to, kernel, writes)
    }

    fn launch_write(
        &self,
        [k, v]: [&Matrix; 2],
        (element, width): (Element, usize),
        [keys, values]: [Cached; 2],
        kernel: Variant,
        writes: &Writes,
    ) -> Result<()> {
        shape("cache: k", k, k.rows(), width)?;
        shape("cache: v", v, k.rows(), width)?;
        let (rows, cached) = (k.rows(), self.keys.numbers.rows());
        let (planned, capacity) = (writes.capacity, self.capacity);
        ensure!(planned == capacity, "cache: rows planned for slots of {planned} tokens, where they have {capacity}");
        let inside = writes.source_rows <= rows && writes.target_rows <= cached;
        ensure!(
            inside,
            "cache: rows up to {} of {rows} go to rows up to {} of {cached}",
            writes.source_rows,
            writes.target_rows
        );
        let device = device("cache", &self.keys.numbers, &[k, v, &writes.targets])?;
        let (grid, tiles) = tiles(writes.count, width)?;
        let sources = writes.sources.as_ref();
        let arguments = AttentionCacheWrite {
            k: k.input("cache k", element, k.len())?,
            v: v.input("cache v", element, v.len())?,
            keys,
            values,
            sources: sources.map_or(Ok(Ptr::NULL), |s| s.input("cache sources", Element::U32, writes.count))?,
            targets: writes.targets.input("cache targets", Element::U32, writes.count)?,
            width: size("cache", width)?,
            tiles,
        };
        device.launch(kernel, grid, arguments)
    }

    /// Rotates q (S, q * dim) where it lies, and writes k, rotated, and v (S, kv * dim) as the newest of each live sequence.
    /// `rotation`: tables and the position of each sequence; without it nothing is rotated.
    ///
    /// # Errors
    /// If shapes or types do not fit, or a slot does not exist.
    pub fn append(
        &self,
        [q, k, v]: [&Matrix; 3],
        live: &Live,
        heads: Heads,
        rotation: Option<(&DeviceRopeTable, &Matrix)>,
    ) -> Result<()> {
        self.check(heads)?;
        let (element, count) = (self.element, live.count);
        shape("append: q", q, count, heads.q * heads.dim)?;
        shape("append: k", k, count, heads.kv * heads.dim)?;
        shape("append: v", v, count, heads.kv * heads.dim)?;
        let (numbers, width) = (&self.keys.numbers, k.cols());
        ensure!(numbers.cols() == width, "append: a cache of rows of {}, keys of {width}", numbers.cols());
        ensure!(live.newest.target_rows <= numbers.rows(), "append: a live slot is past the {} slots", self.slots);
        let (planned, capacity) = (live.capacity, self.capacity);
        ensure!(
            planned == capacity,
            "append: sequences planned for slots of {planned} tokens, where they have {capacity}"
        );
        let device = device("append", numbers, &[q, k, v, &live.slots])?;
        let (mut positions_at, mut cos_at, mut sin_at, mut half) = (Ptr::NULL, Ptr::NULL, Ptr::NULL, 0);
        if let Some((tables, positions)) = rotation {
            let (cos, sin) = tables.tables();
            let fits = positions.len() == count && tables.head() == heads.dim;
            ensure!(fits, "append: {} positions and tables for heads of {}", positions.len(), tables.head());
            positions_at = positions.input("append positions", Element::U32, count)?;
            cos_at = cos.input("append cos", Element::F32, cos.len())?;
            sin_at = sin.input("append sin", Element::F32, sin.len())?;
            half = size("rope", cos.cols())?;
        }
        let arguments = AttentionAppend {
            q: q.output("append q", element, q.len())?,
            k: k.input("append k", element, k.len())?,
            v: v.input("append v", element, v.len())?,
            keys: self.keys.addresses()?,
            values: self.values.addresses()?,
            targets: live.newest.targets.input("append targets", Element::U32, count)?,
            positions: positions_at,
            cos: cos_at,
            sin: sin_at,
            count: size("append", count)?,
            heads: size("heads", heads.q)?,
            kv: size("heads", heads.kv)?,
            dim: size("head", heads.dim)?,
            half,
        };
        for rows in [&self.keys, &self.values] {
            rows.counts_as(k.len());
        }
        if let Some((tables, _)) = rotation {
            let (cos, sin) = tables.tables();
            [cos, sin].into_iter().for_each(|table| table.counts_as(count * table.cols()));
        }
        let warps = AttentionAppend::BLOCK as usize / 32;
        device.launch(self.variant("append")?, blocks(count * (heads.q + 2 * heads.kv), warps)?, arguments)
    }

    /// o (S, q * dim) for one query per live sequence, q (S, q * dim), over the keys and values in their slots, the
    /// query's own included. Heads of up to 256 numbers.
    ///
    /// # Errors
    /// If shapes or types do not fit, or a slot does not exist.
    pub fn decode(&self, q: &Matrix, live: &Live, heads: Heads) -> Result<Matrix> {
        self.check(heads)?;
        let (element, count) = (self.element, live.count);
        shape("decode: q", q, count, heads.q * heads.dim)?;
        ensure!(heads.dim <= WIDEST, "decode: a head of {} numbers is above {WIDEST}", heads.dim);
        let (numbers, width) = (&self.keys.numbers, heads.kv * heads.dim);
        let cols = numbers.cols();
        ensure!(cols == width, "decode: a cache of rows of {cols} numbers for heads of {width}");
        ensure!(live.newest.target_rows <= numbers.rows(), "decode: a live slot is past the {} slots", self.slots);
        let (planned, capacity) = (live.capacity, self.capacity);
        ensure!(
            planned == capacity,
            "decode: sequences planned for slots of {planned} tokens, where they have {capacity}"
        );
        let device = device("decode", numbers, &[q, &live.slots])?;
        let o = device.matrix(element, count, q.cols())?;
        let chunks = heads.window.unwrap_or(usize::MAX).min(live.longest).div_ceil(CHUNK).max(1);
        // Chunks of one sequence meet in f32.
        let several = if chunks > 1 { count * heads.q * chunks } else { 0 };
        let parts = device.matrix(Element::F32, several, heads.dim)?;
        let part_sums = device.matrix(Element::F32, several, 2)?;
        let window = heads.window.map_or(Ok(0), |w| size("attention window", w))?;
        let (parts_at, sums_at) = match several {
            0 => (Ptr::NULL, Ptr::NULL),
            _ => (
                parts.output("decode parts", Element::F32, parts.len())?,
                part_sums.output("decode sums", Element::F32, part_sums.len())?,
            ),
        };
        let lengths = live.lengths.input("decode lengths", Element::U32, count)?;
        let (o_at, dim, of_q) =
            (o.output("decode o", element, o.len())?, size("head", heads.dim)?, size("heads", heads.q)?);
        let arguments = AttentionDecode {
            q: q.input("decode q", element, q.len())?,
            keys: self.keys.addresses()?,
            values: self.values.addresses()?,
            slots: live.slots.input("decode slots", Element::U32, count)?,
            lengths,
            o: o_at,
            parts: parts_at,
            part_sums: sums_at,
            heads: of_q,
            kv: size("heads", heads.kv)?,
            dim,
            capacity: size("cache", self.capacity)?,
            window,
            chunks: size("chunks", chunks)?,
            scale: heads.scale,
            cap: heads.soft_cap.unwrap_or(0.0),
        };
        for rows in [&self.keys, &self.values] {
            rows.counts_as(count * heads.window.unwrap_or(usize::MAX).min(live.longest) * width);
        }
        let tiles = size("heads", (heads.q / heads.kv).div_ceil(TILE))?;
        let grid = [blocks(count * heads.kv, 1)?[0], tiles, size("chunks", chunks)?];
        device.launch(self.variant("decode")?, grid, arguments)?;
        if several > 0 {
            let arguments = AttentionMerge {
                parts: parts_at,
                part_sums: sums_at,
                lengths,
                o: o_at,
                heads: of_q,
                dim,
                window,
                chunks: size("chunks", chunks)?,
            };
            device.launch(variant("decode", &[element])?, blocks(count * heads.q, 1)?, arguments)?;
        }
        Ok(o)
    }
}
