//! A frozen matrix exactly as a file stores it: bytes, type, shape, row order. Rows are dequantised to f32 when a
//! kernel asks for them, so a base takes no more memory than its file. It does not depend on layers, file formats or
//! products. Read `storage/dtype.rs` for the types, then `linear/mod.rs`.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::Result;
use memmap2::Mmap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cpu::parallel;
use crate::device::{Device, Element, Matrix, Resident};
use crate::invalid;
pub use crate::ops::storage::dtype::StorageDType;
use crate::ops::storage::dtype::unpack;
use crate::ops::storage::gpu::DeviceWeight;
use crate::ops::storage::quantise::quantise;
pub use crate::ops::storage::row_order::RowOrder;

/// A shared range of bytes: of a memory-mapped file, of a slice that is compiled in, or made at the first access.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    mapped: bool,
    made: Option<Arc<Made>>,
}

type Maker = Box<dyn Fn() -> Result<Vec<u8>> + Send + Sync>;

/// Bytes that the host holds only once it has asked for them: of a matrix that lies on a device, quantised on the way.
struct Made {
    len: usize,
    /// `None`: there are no bytes, only their number (a plan).
    make: Option<Maker>,
    kept: OnceLock<Vec<u8>>,
}

impl AsRef<[u8]> for Made {
    /// What was made once is made again the same way, so a failure here has been an error of the first upload already.
    fn as_ref(&self) -> &[u8] {
        self.kept.get_or_init(|| {
            let made = self.make.as_ref().and_then(|make| make().ok());
            made.unwrap_or_else(|| vec![0; self.len])
        })
    }
}

impl Bytes {
    /// All bytes of `owner`.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let range = 0..(*owner).as_ref().len();
        Self { owner, range, mapped: false, made: None }
    }

    /// `len` bytes that `make` makes: once for each upload, which does not keep them, and at the first access by the host,
    /// which does.
    pub fn made(len: usize, make: impl Fn() -> Result<Vec<u8>> + Send + Sync + 'static) -> Self {
        Self::of_made(Made { len, make: Some(Box::new(make)), kept: OnceLock::new() })
    }

    /// `len` bytes that are never made: a matrix of a memory plan. The host reads zeros.
    pub fn planned(len: usize) -> Self {
        Self::of_made(Made { len, make: None, kept: OnceLock::new() })
    }

    fn of_made(made: Made) -> Self {
        let (range, made) = (0..made.len, Arc::new(made));
        Self { owner: Arc::clone(&made) as _, range, mapped: false, made: Some(made) }
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Are there no bytes?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Does the host hold them in memory of its own?
    fn is_held(&self) -> bool {
        !self.mapped && self.made.as_ref().is_none_or(|made| made.kept.get().is_some())
    }

    /// The bytes, made for this call where the host does not hold them.
    fn for_upload(&self) -> Result<std::borrow::Cow<'_, [u8]>> {
        match self.made.as_deref() {
            Some(Made { len, make: Some(make), kept }) if kept.get().is_none() => {
                let bytes = make()?;
                anyhow::ensure!(bytes.len() == *len, "{} bytes were made where {len} are needed", bytes.len());
                Ok(bytes.into())
            }
            _ => Ok(self.get().into()),
        }
    }

    /// All bytes of a mapped file.
    pub fn mapped(file: Arc<Mmap>) -> Self {
        Self { mapped: true, ..Self::new(file) }
    }

    /// A part of these bytes, counted from their start; `None` if it ends past them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let (start, end) = (self.range.start.checked_add(range.start)?, self.range.start.checked_add(range.end)?);
        (start <= end && end <= self.range.end).then(|| Self { range: start..end, ..self.clone() })
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// Releases the memory of whole pages of a mapped file; the system reads them from the file again on the next
    /// access. It has no effect on bytes that are in memory only.
    pub fn release(&self) {
        if !self.mapped {
            return;
        }
        // SAFETY: reads one of the system's constants.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(1);
        let bytes = self.get().as_ptr_range();
        let start = (bytes.start as usize).next_multiple_of(page);
        let end = bytes.end as usize / page * page;
        if start < end {
            // SAFETY: whole pages inside a read-only file mapping, which is never written to: the system reads dropped
            // pages from the file again, with the same content.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
}

/// The type that products with a frozen matrix are computed in. Sums are f32 in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
pub enum ComputeDtype {
    /// Both factors are f32; values of the stored type are exact.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// Both factors are rounded to bfloat16: a relative error of 2^-9 in each, for several times the speed on machines
    /// with AMX or AVX-512 BF16.
    #[serde(rename = "bf16")]
    Bf16,
    /// Both factors are rounded to half precision: a relative error of 2^-12 in each, for values below 65,504. Only devices
    /// compute in it.
    #[serde(rename = "f16")]
    F16,
}

impl ComputeDtype {
    /// The element type of a device's products.
    pub const fn element(self) -> Element {
        match self {
            Self::F32 => Element::F32,
            Self::Bf16 => Element::Bf16,
            Self::F16 => Element::F16,
        }
    }

    /// The value of the `compute_dtype` key.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
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
    place: Option<Device>,
    copy: Resident<DeviceWeight>,
    /// The copy on a device is there only while it is lent.
    is_lent: bool,
}

/// An id that no other matrix of this process has.
fn fresh_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Weight {
    /// A matrix over stored bytes, rows in the file's order.
    ///
    /// # Errors
    /// If a row is not a whole number of blocks, or the bytes are not exactly rows x cols elements.
    pub fn new(bytes: Bytes, dtype: StorageDType, rows: usize, cols: usize) -> Result<Self> {
        let want = dtype.bytes_for(cols).and_then(|row| row.checked_mul(rows));
        let have = bytes.len();
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
        let (id, place, copy, is_lent) = (fresh_id(), None, Resident::default(), false);
        Ok(Self { bytes, dtype, rows, cols, order, compute, id, place, copy, is_lent })
    }

    /// A dense f32 matrix owned in memory (tests, synthetic bases).
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
        self.copy = Resident::default();
        self
    }

    /// The same matrix, whose products are computed on `place`; `None` is the host.
    #[must_use]
    pub fn with_place(mut self, place: Option<Device>) -> Self {
        if self.is_lent {
            (self.is_lent, self.copy) = (false, Resident::default());
        }
        self.place = place;
        self
    }

    /// The same matrix on a device that does not keep it: its copy there is lent for the time of each use
    /// ([`Weight::lend`]).
    #[must_use]
    pub fn streamed(self, place: Device) -> Self {
        Self { place: Some(place), copy: Resident::default(), is_lent: true, ..self }
    }

    /// Bytes of the matrix as it lies on a device, padding included.
    pub fn packed_bytes(&self) -> usize {
        DeviceWeight::packed_bytes(self.dtype, self.rows, self.cols)
    }

    /// Writes the matrix as it lies on a device into `out`, of [`Weight::packed_bytes`]; pages of a mapped file are released.
    ///
    /// # Errors
    /// If the bytes cannot be made, or `out` has another length.
    pub fn pack(&self, out: &mut [u8]) -> Result<()> {
        let bytes = self.bytes.for_upload()?;
        DeviceWeight::pack(self.dtype, self.rows, self.cols, |row| self.row_of(&bytes, row), out)?;
        self.bytes.release();
        Ok(())
    }

    /// Lends the copy whose packed bytes begin at byte `at` of a buffer, until [`Weight::take_back`].
    ///
    /// # Errors
    /// If it reaches past the buffer.
    pub fn lend(&self, buffer: &Matrix, at: usize) -> Result<()> {
        let copy = DeviceWeight::within(buffer, at, self.dtype, self.rows, self.cols)?;
        self.copy.put(buffer.device(), Arc::new(copy));
        Ok(())
    }

    /// Ends a lending.
    pub fn take_back(&self) {
        self.copy.clear();
    }

    /// The device that products are computed on; `None` is the host.
    pub fn place(&self) -> Option<&Device> {
        self.place.as_ref()
    }

    /// The copy on a device, uploaded at its first use. Rows are in the matrix's order there, and pages of a mapped file are
    /// released after the upload.
    ///
    /// # Errors
    /// If device memory is out or the copy fails.
    pub fn on(&self, device: &Device) -> Result<Arc<DeviceWeight>> {
        self.copy.on(device, || {
            anyhow::ensure!(!self.is_lent, "a matrix of a layer that is streamed was used outside of its layer");
            if device.is_dry() {
                return DeviceWeight::reserve(device, self.dtype, self.rows, self.cols);
            }
            let bytes = self.bytes.for_upload()?;
            let copy = DeviceWeight::upload(device, self.dtype, self.rows, self.cols, |row| self.row_of(&bytes, row))?;
            self.bytes.release();
            Ok(copy)
        })
    }

    /// Bytes that the host holds of the matrix: none of a mapped file's, nor of a matrix that only a device holds.
    pub fn held_bytes(&self) -> usize {
        if self.bytes.is_held() { self.bytes.len() } else { 0 }
    }

    /// An id that clones share and no other matrix has; caches of values computed from a matrix use it as their key.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The order of the stored rows.
    pub fn row_order(&self) -> RowOrder {
        self.order
    }

    /// The same matrix, computed in `compute`.
    #[must_use]
    pub fn with_compute(mut self, compute: ComputeDtype) -> Self {
        self.compute = compute;
        self
    }

    /// The type that products are computed in.
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

    /// Number of stored bytes.
    pub fn size_in_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The stored bytes; digests of them show that a base was not modified.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get()
    }

    /// The stored bytes of row `row`.
    pub(crate) fn row_bytes(&self, row: usize) -> &[u8] {
        self.row_of(self.bytes.get(), row)
    }

    fn row_of<'b>(&self, bytes: &'b [u8], row: usize) -> &'b [u8] {
        let stored = self.order.stored(row);
        let (block, size) = self.dtype.block();
        let len = self.cols / block * size;
        &bytes[stored * len..(stored + 1) * len]
    }

    /// Row `row` as f32, exact for every stored type. `out` is `cols` long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        unpack(self.dtype, self.row_bytes(row), out);
    }

    /// Rows `rows` without a copy, if they are stored in order as aligned f32; otherwise `None`.
    pub fn rows_f32(&self, rows: Range<usize>) -> Option<&[f32]> {
        if self.dtype != StorageDType::F32 || self.order != RowOrder::AsStored || cfg!(target_endian = "big") {
            return None;
        }
        let bytes = &self.bytes.get()[rows.start * self.cols * 4..rows.end * self.cols * 4];
        // SAFETY: every bit pattern is an f32; align_to checks the alignment.
        let (before, values, after) = unsafe { bytes.align_to::<f32>() };
        (before.is_empty() && after.is_empty()).then_some(values)
    }

    /// Columns `cols` of row `row` as f32; `cols` starts and ends at block boundaries.
    pub fn row_part(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let (block, bytes) = self.dtype.block();
        debug_assert!(cols.start.is_multiple_of(block) && cols.end.is_multiple_of(block));
        unpack(self.dtype, &self.row_bytes(row)[cols.start / block * bytes..cols.end / block * bytes], out);
    }

    /// The transpose, (cols, rows), of the same type, owned in memory.
    ///
    /// # Errors
    /// If the type stores blocks, which have no transpose.
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

    /// This matrix in another type, rows in the matrix's order (not the file's). Only some rows at a time are dense,
    /// and pages of a mapped file are released.
    ///
    /// # Errors
    /// If a row is not a whole number of blocks of `dtype`, or a value does not fit it.
    pub fn quantised(&self, dtype: StorageDType) -> Result<Self> {
        let bytes = self.quantised_bytes(dtype)?;
        Ok(Self::new(Bytes::new(Arc::new(bytes)), dtype, self.rows, self.cols)?.with_compute(self.compute))
    }

    /// As [`Weight::quantised`], for a matrix that only a device will hold: the host quantises it for each upload and keeps
    /// nothing.
    ///
    /// # Errors
    /// As for [`Weight::quantised`]; values that do not fit are an error of the upload.
    pub fn quantised_on_the_way(&self, dtype: StorageDType) -> Result<Self> {
        let (len, dense) = (self.rows * self.quantised_row(dtype)?, self.clone());
        let bytes = Bytes::made(len, move || dense.quantised_bytes(dtype));
        Ok(Self::new(bytes, dtype, self.rows, self.cols)?.with_compute(self.compute))
    }

    /// A matrix of a memory plan, which has a shape and no numbers.
    ///
    /// # Errors
    /// If a row is not a whole number of blocks.
    pub fn planned(dtype: StorageDType, rows: usize, cols: usize) -> Result<Self> {
        let len = dtype.bytes_for(cols).and_then(|row| row.checked_mul(rows)).unwrap_or(0);
        Self::new(Bytes::planned(len), dtype, rows, cols)
    }

    fn quantised_row(&self, dtype: StorageDType) -> Result<usize> {
        let (block, name) = (dtype.block().0, dtype.name());
        dtype
            .bytes_for(self.cols)
            .ok_or_else(|| invalid!("rows of {} numbers are not whole blocks of {block}, as {name} needs", self.cols))
    }

    fn quantised_bytes(&self, dtype: StorageDType) -> Result<Vec<u8>> {
        const ROWS: usize = 64;
        let row = self.quantised_row(dtype)?;
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
        Ok(bytes)
    }

    /// The whole matrix as f32 (rows x cols), for tests and exports.
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
    fn rope_row_order_undoes_the_permutation_of_llama_cpp() {
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
    fn gptneox_row_order_interleaves_q_k_and_v_by_head_and_transposed_transposes() {
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
    fn a_matrix_whose_bytes_do_not_fit_its_shape_is_refused_with_both_sizes() {
        let bytes = Bytes::new(Arc::new(vec![0u8; 34]));
        let message = Weight::new(bytes.clone(), StorageDType::Q8_0, 2, 32).err().unwrap().to_string();
        assert!(message.contains("68") && message.contains("34"), "{message}");
        assert!(Weight::new(bytes.clone(), StorageDType::Q8_0, 1, 33).is_err());
        assert!(bytes.slice(30..40).is_none() && bytes.slice(2..34).is_some());
    }
}
