//! A frozen matrix exactly as a file stores it: bytes, type, shape, row order. Knows no layer, no file format and no
//! arithmetic. Read stored.rs for the types, then linear.rs: it asks for rows as f32.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::cpu::parallel;
use crate::invalid;
pub use crate::ops::storage::dtype::StorageDType;
use crate::ops::storage::dtype::unpack;
use crate::ops::storage::quantise::quantise;

/// A range of somebody's bytes: a memory-mapped file, or a slice that is compiled in.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    mapped: bool,
}

impl Bytes {
    /// All bytes of `owner`.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let range = 0..(*owner).as_ref().len();
        Self { owner, range, mapped: false }
    }

    /// All bytes of a mapped file.
    pub fn mapped(file: Arc<Mmap>) -> Self {
        Self { mapped: true, ..Self::new(file) }
    }

    /// A part of these bytes, counted from their start; `None` past the end.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let (start, end) = (self.range.start.checked_add(range.start)?, self.range.start.checked_add(range.end)?);
        (start <= end && end <= self.range.end).then(|| Self { range: start..end, ..self.clone() })
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// Gives back the memory that whole pages of a mapped file take; they are read from the file again when they are
    /// next asked for. Without effect on bytes that lie in memory only.
    pub fn release(&self) {
        if !self.mapped {
            return;
        }
        // SAFETY: asks for one of the system's constants.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(1);
        let bytes = self.get().as_ptr_range();
        let start = (bytes.start as usize).next_multiple_of(page);
        let end = bytes.end as usize / page * page;
        if start < end {
            // SAFETY: whole pages inside of a read-only file mapping, which nothing ever wrote to: what is dropped
            // comes back from the file with the same content.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
}

/// Which stored row is row i of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// Row i is stored i-th.
    AsStored,
    /// GGUF's llama files keep the rows of q and k with the two halves of each head interleaved
    /// (llama.cpp `convert_hf_to_gguf.py`, `permute`); this undoes it, so that adapters fit both files.
    RopeInterleaved {
        /// Rows of one head.
        head_dim: usize,
    },
    /// GGUF's gptneox files keep all of q, then k, then v; Hugging Face has q, k and v of each head in turn.
    HeadsApart {
        /// Rows of one head of one of the three.
        head_dim: usize,
        /// Heads.
        heads: usize,
    },
}

impl RowOrder {
    /// Where row `row` of the matrix is stored.
    pub const fn stored(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::RopeInterleaved { head_dim } => {
                let (head, r, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + 2 * (r % half) + r / half
            }
            Self::HeadsApart { head_dim, heads } => {
                let (head, r) = (row / (3 * head_dim), row % (3 * head_dim));
                (r / head_dim * heads + head) * head_dim + r % head_dim
            }
        }
    }

    /// `values`, rows of `cols` numbers in the matrix's order, as they are to be stored.
    pub fn store(self, values: &[f32], cols: usize) -> Vec<f32> {
        let mut out = vec![0f32; values.len()];
        for (row, from) in values.chunks_exact(cols).enumerate() {
            let at = self.stored(row) * cols;
            out[at..at + cols].copy_from_slice(from);
        }
        out
    }
}

/// What products with a frozen matrix are computed in. Sums are f32 in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum ComputeDtype {
    /// Exact values of the stored type, f32 factors.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// Both factors rounded to bfloat16: a relative error of 2^-9 in each, for several times the speed where the
    /// machine has AMX or AVX-512 BF16.
    #[serde(rename = "bf16")]
    Bf16,
}

/// A frozen (rows, cols) matrix, row-major, in its stored type. Cloning shares the bytes.
#[derive(Clone)]
pub struct Weight {
    bytes: Bytes,
    dtype: StorageDType,
    rows: usize,
    cols: usize,
    order: RowOrder,
    compute: ComputeDtype,
    id: u64,
}

/// A number that no other matrix of this process has.
fn fresh_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Weight {
    /// # Errors
    /// If a row is no whole number of blocks, or the bytes are not exactly rows x cols numbers.
    pub fn new(bytes: Bytes, dtype: StorageDType, rows: usize, cols: usize) -> Result<Self> {
        let want = dtype.bytes_for(cols).and_then(|row| row.checked_mul(rows));
        let have = bytes.get().len();
        if want != Some(have) {
            return Err(invalid!(
                "a {rows} x {cols} {} matrix needs {} bytes and the file gives {have}",
                dtype.name(),
                want.map_or_else(
                    || format!("a row length that is a multiple of {}, not {cols};", dtype.block().0),
                    |w| w.to_string()
                ),
            ));
        }
        let (order, compute) = (RowOrder::AsStored, ComputeDtype::F32);
        Ok(Self { bytes, dtype, rows, cols, order, compute, id: fresh_id() })
    }

    /// A dense f32 matrix of one's own: tests and made-up bases.
    ///
    /// # Errors
    /// If `values` is not rows x cols long.
    pub fn from_f32(values: &[f32], rows: usize, cols: usize) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(Bytes::new(Arc::new(bytes)), StorageDType::F32, rows, cols)
    }

    /// The same bytes read in another row order.
    #[must_use]
    pub fn with_row_order(mut self, order: RowOrder) -> Self {
        self.order = order;
        self.id = fresh_id();
        self
    }

    /// Equal for clones, and for nothing else: what was computed of a matrix is known by it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// How its rows are stored.
    pub fn row_order(&self) -> RowOrder {
        self.order
    }

    /// The same matrix, computed in `compute`.
    #[must_use]
    pub fn with_compute(mut self, compute: ComputeDtype) -> Self {
        self.compute = compute;
        self
    }

    /// What products with it are computed in.
    pub fn compute(&self) -> ComputeDtype {
        self.compute
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The stored type.
    pub fn dtype(&self) -> StorageDType {
        self.dtype
    }

    /// Bytes as stored.
    pub fn size_in_bytes(&self) -> usize {
        self.bytes.get().len()
    }

    /// The stored bytes: for digests that show a base was not written.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get()
    }

    /// Where the stored bytes of row `row` are.
    fn row_bytes(&self, row: usize) -> &[u8] {
        let stored = self.order.stored(row);
        let (block, bytes) = self.dtype.block();
        let len = self.cols / block * bytes;
        &self.bytes.get()[stored * len..(stored + 1) * len]
    }

    /// Row `row` as f32, exact for every stored type. `out` is `cols` long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        unpack(self.dtype, self.row_bytes(row), out);
    }

    /// Row `row` rounded to bfloat16 pairs; words past the last are zero.
    pub fn row_words(&self, row: usize, out: &mut [u32]) {
        match self.dtype {
            StorageDType::Q8_0 => crate::ops::cpu::bf16::round_q8_0(self.row_bytes(row), out),
            StorageDType::BF16 => crate::ops::cpu::bf16::copy(self.row_bytes(row), out),
            _ => match self.rows_f32(row..row + 1) {
                Some(values) => crate::ops::cpu::bf16::round(values, out),
                None => crate::ops::cpu::pack::with_scratch(self.cols, |values| {
                    self.row(row, values);
                    crate::ops::cpu::bf16::round(values, out);
                }),
            },
        }
    }

    /// Rows `rows` in place, where they are stored in order as aligned f32: nothing to unpack then.
    pub fn rows_f32(&self, rows: Range<usize>) -> Option<&[f32]> {
        if self.dtype != StorageDType::F32 || self.order != RowOrder::AsStored || cfg!(target_endian = "big") {
            return None;
        }
        let bytes = &self.bytes.get()[rows.start * self.cols * 4..rows.end * self.cols * 4];
        // SAFETY: every bit pattern is an f32; align_to checks the alignment.
        let (before, values, after) = unsafe { bytes.align_to::<f32>() };
        (before.is_empty() && after.is_empty()).then_some(values)
    }

    /// Columns `cols` of row `row` as f32, where `cols` starts and ends on block borders.
    pub fn row_part(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let (block, bytes) = self.dtype.block();
        debug_assert!(cols.start.is_multiple_of(block) && cols.end.is_multiple_of(block));
        unpack(self.dtype, &self.row_bytes(row)[cols.start / block * bytes..cols.end / block * bytes], out);
    }

    /// The transpose, (cols, rows), in memory of its own and the same type.
    ///
    /// # Errors
    /// If numbers are stored in blocks, which have no transpose.
    pub fn transposed(&self) -> Result<Self> {
        let (block, size) = self.dtype.block();
        if block != 1 {
            return Err(invalid!("a matrix stored as {} cannot be transposed", self.dtype.name()));
        }
        let mut bytes = vec![0u8; self.bytes.get().len()];
        for row in 0..self.rows {
            for (col, number) in self.row_bytes(row).chunks_exact(size).enumerate() {
                bytes[(col * self.rows + row) * size..][..size].copy_from_slice(number);
            }
        }
        let weight = Self::new(Bytes::new(Arc::new(bytes)), self.dtype, self.cols, self.rows)?;
        Ok(weight.with_compute(self.compute))
    }

    /// This matrix in another type, rows in their own order (not the file's), made some rows at a time: beside the
    /// result no more than those rows are ever dense, and pages of a mapped file are given back.
    ///
    /// # Errors
    /// If a row is no whole number of blocks of `dtype`, or a number does not fit it.
    pub fn quantised(&self, dtype: StorageDType) -> Result<Self> {
        const ROWS: usize = 64;
        let Some(row) = dtype.bytes_for(self.cols) else {
            let (block, name) = (dtype.block().0, dtype.name());
            return Err(invalid!("rows of {} numbers are no whole blocks of {block}, as {name} needs", self.cols));
        };
        let mut bytes = vec![0u8; self.rows * row];
        let parts: Vec<Mutex<&mut [u8]>> = bytes.chunks_mut((ROWS * row).max(1)).map(Mutex::new).collect();
        let failure = Mutex::new(None);
        parallel(parts.len(), self.rows * self.cols * 32, |range| {
            for part in range {
                let rows = part * ROWS..self.rows.min((part + 1) * ROWS);
                let mut values = vec![0f32; rows.len() * self.cols];
                for (row, out) in rows.zip(values.chunks_exact_mut(self.cols)) {
                    self.row(row, out);
                }
                let mut packed = Vec::with_capacity(values.len() / self.cols * row);
                match quantise(dtype, &values, &mut packed) {
                    Ok(()) => parts[part].lock().unwrap_or_else(PoisonError::into_inner).copy_from_slice(&packed),
                    Err(e) => *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(e),
                }
            }
        });
        drop(parts);
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        self.bytes.release();
        Ok(Self::new(Bytes::new(Arc::new(bytes)), dtype, self.rows, self.cols)?.with_compute(self.compute))
    }

    /// The whole matrix as f32, for tests and exports: rows x cols numbers.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.rows * self.cols];
        for (i, row) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.row(i, row);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    fn quantised(dtype: GgmlDType, stored: StorageDType, cols: usize) -> (Weight, Vec<f32>) {
        let mut rng = SplitMix64::new(3);
        let values: Vec<f32> = (0..4 * cols).map(|_| rng.uniform() as f32 - 0.5).collect();
        let q = QTensor::quantize(&Tensor::from_vec(values, (4, cols), &Device::Cpu).unwrap(), dtype).unwrap();
        let want = q.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let bytes = q.data().unwrap().to_vec();
        (Weight::new(Bytes::new(Arc::new(bytes)), stored, 4, cols).unwrap(), want)
    }

    #[test]
    fn every_quantised_type_unpacks_to_the_values_candle_reads() {
        for (dtype, stored) in [
            (GgmlDType::F16, StorageDType::F16),
            (GgmlDType::BF16, StorageDType::BF16),
            (GgmlDType::Q4_0, StorageDType::Q4_0),
            (GgmlDType::Q4_1, StorageDType::Q4_1),
            (GgmlDType::Q5_0, StorageDType::Q5_0),
            (GgmlDType::Q5_1, StorageDType::Q5_1),
            (GgmlDType::Q8_0, StorageDType::Q8_0),
            (GgmlDType::Q2K, StorageDType::Q2K),
            (GgmlDType::Q3K, StorageDType::Q3K),
            (GgmlDType::Q4K, StorageDType::Q4K),
            (GgmlDType::Q5K, StorageDType::Q5K),
            (GgmlDType::Q6K, StorageDType::Q6K),
        ] {
            let (weight, want) = quantised(dtype, stored, 512);
            assert_eq!(weight.to_f32(), want, "{}", stored.name());
            let (block, _) = stored.block();
            let mut part = vec![0f32; 256];
            weight.row_part(2, 256..512, &mut part);
            assert_eq!(part, want[2 * 512 + 256..3 * 512], "{} part, block {block}", stored.name());
        }
    }

    #[test]
    fn rope_row_order_undoes_llama_cpps_permutation() {
        // llama.cpp: w.reshape(heads, 2, hd/2, in).swapaxes(1, 2).reshape(..), here for 2 heads of 4 rows.
        let hf: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let mut stored = vec![0f32; 8];
        for head in 0..2 {
            for half in 0..2 {
                for j in 0..2 {
                    stored[head * 4 + j * 2 + half] = hf[head * 4 + half * 2 + j];
                }
            }
        }
        let w = Weight::from_f32(&stored, 8, 1).unwrap().with_row_order(RowOrder::RopeInterleaved { head_dim: 4 });
        assert_eq!(w.to_f32(), hf);
    }

    #[test]
    fn a_gptneox_files_thirds_come_out_head_by_head_and_a_transpose_is_one() {
        // Two heads of two rows: stored q0 q1 k0 k1 v0 v1, wanted q0 k0 v0 q1 k1 v1, a pair of rows each.
        let stored: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let order = RowOrder::HeadsApart { head_dim: 2, heads: 2 };
        let w = Weight::from_f32(&stored, 12, 1).unwrap().with_row_order(order);
        assert_eq!(w.to_f32(), [0., 1., 4., 5., 8., 9., 2., 3., 6., 7., 10., 11.]);
        let w = Weight::from_f32(&[1., 2., 3., 4., 5., 6.], 2, 3).unwrap().transposed().unwrap();
        assert_eq!((w.rows(), w.cols(), w.to_f32()), (3, 2, vec![1., 4., 2., 5., 3., 6.]));
        assert!(quantised(GgmlDType::Q8_0, StorageDType::Q8_0, 512).0.transposed().is_err());
    }

    #[test]
    fn a_short_or_ragged_matrix_is_refused_with_its_sizes() {
        let bytes = Bytes::new(Arc::new(vec![0u8; 34]));
        let message = Weight::new(bytes.clone(), StorageDType::Q8_0, 2, 32).err().unwrap().to_string();
        assert!(message.contains("68") && message.contains("34"), "{message}");
        assert!(Weight::new(bytes.clone(), StorageDType::Q8_0, 1, 33).is_err());
        assert!(bytes.slice(30..40).is_none() && bytes.slice(2..34).is_some());
    }
}
