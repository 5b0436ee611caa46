//! Frozen weights on a device: `DeviceWeight` keeps a matrix as its stored bytes and dequantises rows of it.
//! It does not depend on file formats: the caller supplies the bytes of each row. Read gpu.cu for the kernels, then
//! `linear/gpu_gemv.rs` for products straight from the stored bytes.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::dtype::StorageDType;
use crate::device::{Arguments, Beside, Device, Element, Matrix, Ptr, Variant};

/// Host memory through which `DeviceWeight::upload` copies, in bytes.
const STAGING: usize = 8 << 20;

/// Where the bytes of a block go.
#[derive(Clone, Copy)]
struct Layout {
    /// Bytes of a block in the main plane.
    main: usize,
    /// The byte at which the block's scale begins and its type, if scales lie in a plane of their own.
    scale: Option<(usize, Element)>,
}

/// Kernels load whole words. A block that would leave the next one unaligned therefore gives its scale to a second
/// plane; so does NF4's, because 32 bytes of quants can then be loaded eight at a time. The sum of bytes stays the
/// same.
const fn layout(dtype: StorageDType) -> Layout {
    let (_, bytes) = dtype.block();
    let scale = match dtype {
        StorageDType::Q4_0 | StorageDType::Q5_0 | StorageDType::Q8_0 => Some((0, Element::F16)),
        StorageDType::Q3K => Some((108, Element::F16)),
        StorageDType::Q6K => Some((208, Element::F16)),
        StorageDType::NF4 => Some((0, Element::F32)),
        StorageDType::F32
        | StorageDType::F16
        | StorageDType::BF16
        | StorageDType::Q4_1
        | StorageDType::Q5_1
        | StorageDType::Q2K
        | StorageDType::Q4K
        | StorageDType::Q5K => None,
    };
    match scale {
        Some((_, element)) => Layout { main: bytes - element.bytes(), scale },
        None => Layout { main: bytes, scale },
    }
}

/// The element type of a dense storage type.
pub(crate) const fn dense_element(dtype: StorageDType) -> Option<Element> {
    match dtype {
        StorageDType::F32 => Some(Element::F32),
        StorageDType::F16 => Some(Element::F16),
        StorageDType::BF16 => Some(Element::Bf16),
        _ => None,
    }
}

/// Planes of a packed matrix begin at multiples of so many bytes, as allocations do.
pub const ALIGNMENT: usize = 256;

/// Appends the stored bytes of row `i` to its planes.
fn split(
    dtype: StorageDType,
    cols: usize,
    i: usize,
    row: &[u8],
    mains: &mut Vec<u8>,
    scales: &mut Vec<u8>,
) -> Result<()> {
    let (block, bytes) = dtype.block();
    let (name, len, row_len) = (dtype.name(), row.len(), cols / block * bytes);
    ensure!(len == row_len, "row {i} of a {name} weight has {len} bytes; {row_len} are needed");
    match layout(dtype).scale {
        None => mains.extend_from_slice(row),
        Some((at, element)) => {
            for stored in row.chunks_exact(bytes) {
                let end = at + element.bytes();
                mains.extend_from_slice(&stored[..at]);
                mains.extend_from_slice(&stored[end..]);
                scales.extend_from_slice(&stored[at..end]);
            }
        }
    }
    Ok(())
}

/// The addresses of a weight's planes, as kernels take them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planes {
    main: Ptr,
    /// Null where the type has no plane of scales.
    scales: Ptr,
}

#[repr(C)]
struct Dequantise {
    weight: Planes,
    out: Ptr,
    first: u64,
    count: u64,
}

// SAFETY: the fields are those of `Dequantise` in gpu.cu.
unsafe impl Arguments for Dequantise {
    const NAME: &'static str = "dequantise";
    const BLOCK: u32 = 256;
}

/// A frozen (rows, cols) matrix on a device, as its stored bytes. Clones share the memory.
#[derive(Clone, Debug)]
pub struct DeviceWeight {
    dtype: StorageDType,
    rows: usize,
    cols: usize,
    /// (rows, cols) numbers of a dense type, or a row's blocks as bytes.
    main: Matrix,
    /// (rows, blocks) where scales lie in a plane of their own.
    scales: Option<Matrix>,
}

impl DeviceWeight {
    /// Memory for a matrix whose numbers are not there yet: what `upload` allocates, without any content. A plan of
    /// memory on the dry machine needs no more.
    ///
    /// Errors: `cols` is no whole number of blocks, a dimension is 0 or 2^31 or more, or memory is short.
    pub fn reserve(device: &Device, dtype: StorageDType, rows: usize, cols: usize) -> Result<Self> {
        Self::of_planes(dtype, rows, cols, |element, rows, cols| device.matrix(element, rows, cols))
    }

    /// The matrix whose packed bytes (see `pack`) begin at byte `at` of a buffer, as a view of it.
    ///
    /// Errors: those of `reserve`; it reaches past the buffer, or `at` is no multiple of `ALIGNMENT`.
    pub fn within(buffer: &Matrix, at: usize, dtype: StorageDType, rows: usize, cols: usize) -> Result<Self> {
        let mut next = at;
        Self::of_planes(dtype, rows, cols, |element, rows, cols| {
            let plane = buffer.window(next, element, rows, cols)?;
            next += plane.bytes().next_multiple_of(ALIGNMENT);
            Ok(plane)
        })
    }

    /// Bytes of a packed matrix, a multiple of `ALIGNMENT`: its planes one after another, each at such a multiple.
    pub fn packed_bytes(dtype: StorageDType, rows: usize, cols: usize) -> usize {
        let (block, bytes) = dtype.block();
        let (main, blocks) = (layout(dtype).main, rows * (cols / block));
        (blocks * main).next_multiple_of(ALIGNMENT) + (blocks * (bytes - main)).next_multiple_of(ALIGNMENT)
    }

    /// Writes a matrix as it lies on a device into `out`, which has its `packed_bytes`. `row_bytes` is that of `upload`.
    ///
    /// Errors: a row that has another number of bytes than its type says, or an `out` of another length.
    pub fn pack<'a>(
        dtype: StorageDType,
        rows: usize,
        cols: usize,
        row_bytes: impl Fn(usize) -> &'a [u8],
        out: &mut [u8],
    ) -> Result<()> {
        let want = Self::packed_bytes(dtype, rows, cols);
        ensure!(out.len() == want, "a packed ({rows}, {cols}) weight has {want} bytes, not {}", out.len());
        let (block, bytes) = dtype.block();
        let main = layout(dtype).main;
        let (main_row, scale_row) = (cols / block * main, cols / block * (bytes - main));
        let scales_at = (rows * main_row).next_multiple_of(ALIGNMENT);
        let (mut mains, mut scales) = (Vec::with_capacity(main_row), Vec::with_capacity(scale_row));
        for i in 0..rows {
            mains.clear();
            scales.clear();
            split(dtype, cols, i, row_bytes(i), &mut mains, &mut scales)?;
            out[i * main_row..][..main_row].copy_from_slice(&mains);
            out[scales_at + i * scale_row..][..scale_row].copy_from_slice(&scales);
        }
        Ok(())
    }

    fn of_planes(
        dtype: StorageDType,
        rows: usize,
        cols: usize,
        mut plane: impl FnMut(Element, usize, usize) -> Result<Matrix>,
    ) -> Result<Self> {
        let name = dtype.name();
        let fits = [rows, cols].iter().all(|n| (1..1 << 31).contains(n));
        ensure!(fits, "a {name} weight of ({rows}, {cols}): both dimensions need to be between 1 and 2^31 - 1");
        let (block, _) = dtype.block();
        let whole = cols.is_multiple_of(block);
        ensure!(whole, "a {name} weight with rows of {cols} numbers, which are no whole blocks of {block}");
        let Layout { main, scale } = layout(dtype);
        let main = match dense_element(dtype) {
            Some(element) => plane(element, rows, cols)?,
            None => plane(Element::U8, rows, cols / block * main)?,
        };
        let scales = scale.map(|(_, element)| plane(element, rows, cols / block)).transpose()?;
        Ok(Self { dtype, rows, cols, main, scales })
    }

    /// Copies a matrix to the device. `row_bytes(i)` are the stored bytes of row i in the matrix's logical order: a
    /// caller whose file keeps rows in another order maps the index. The host needs some MiB beside what
    /// `row_bytes` borrows from.
    ///
    /// Errors: those of `reserve`, or a row that has another number of bytes than its type says.
    pub fn upload<'a>(
        device: &Device,
        dtype: StorageDType,
        rows: usize,
        cols: usize,
        row_bytes: impl Fn(usize) -> &'a [u8],
    ) -> Result<Self> {
        Self::upload_in_chunks(device, dtype, rows, cols, STAGING, row_bytes)
    }

    /// `upload` through at most `staging` bytes of host memory, or through one row where a row is longer.
    pub fn upload_in_chunks<'a>(
        device: &Device,
        dtype: StorageDType,
        rows: usize,
        cols: usize,
        staging: usize,
        row_bytes: impl Fn(usize) -> &'a [u8],
    ) -> Result<Self> {
        let weight = Self::reserve(device, dtype, rows, cols)?;
        let (block, bytes) = dtype.block();
        let row_len = cols / block * bytes;
        let rows_at_once = (staging / row_len).clamp(1, rows);
        let main = layout(dtype).main;
        let blocks = rows_at_once * (cols / block);
        let mut mains = Vec::with_capacity(blocks * main);
        let mut scales = Vec::with_capacity(blocks * (bytes - main));
        for start in (0..rows).step_by(rows_at_once) {
            let chunk = start..rows.min(start + rows_at_once);
            mains.clear();
            scales.clear();
            for i in chunk.clone() {
                split(dtype, cols, i, row_bytes(i), &mut mains, &mut scales)?;
            }
            weight.main.row_range(chunk.clone())?.write_bytes(&mains)?;
            if let Some(plane) = &weight.scales {
                plane.row_range(chunk)?.write_bytes(&scales)?;
            }
        }
        Ok(weight)
    }

    /// An f32 weight with these values, row by row.
    pub fn from_f32(device: &Device, values: &[f32], rows: usize, cols: usize) -> Result<Self> {
        ensure!(rows.checked_mul(cols) == Some(values.len()), "{} numbers as a ({rows}, {cols}) weight", values.len());
        let weight = Self::reserve(device, StorageDType::F32, rows, cols)?;
        weight.main.write_f32(values)?;
        Ok(weight)
    }

    /// How the numbers are stored.
    pub fn dtype(&self) -> StorageDType {
        self.dtype
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The device that it lies on.
    pub fn device(&self) -> &Device {
        self.main.device()
    }

    /// Bytes on the device: as many as the file has.
    pub fn bytes(&self) -> usize {
        self.main.bytes() + self.scales.as_ref().map_or(0, Matrix::bytes)
    }

    /// The numbers themselves, if they are stored one by one with this element type: a product can read them in
    /// place.
    pub fn dense(&self, element: Element) -> Option<Matrix> {
        (self.main.element() == element && dense_element(self.dtype).is_some()).then(|| self.main.clone())
    }

    /// Writes some rows as numbers: out (rows, cols) of f32, bf16 or f16, whose type is the matrix's. In f32 the
    /// values are those of the CPU, bit for bit; the other types round those to the nearest.
    ///
    /// Errors: rows that do not exist, or an `out` of another shape, of integers or on another device.
    pub fn dequantise(&self, rows: Range<usize>, out: &Matrix) -> Result<()> {
        let (grid, arguments) = self.dequantisation(rows, out)?;
        self.device().launch(self.variant(out.element()), grid, arguments)
    }

    /// All numbers as `element`, (rows, cols), which are written beside the order of work: see [`Device::launch_beside`].
    ///
    /// # Errors
    /// As for [`DeviceWeight::dequantise`], or memory is short.
    pub fn dequantise_beside(&self, element: Element) -> Result<Beside> {
        let out = self.device().matrix(element, self.rows, self.cols)?;
        let (grid, arguments) = self.dequantisation(0..self.rows, &out)?;
        self.device().launch_beside(self.variant(element), grid, arguments, &out)
    }

    fn dequantisation(&self, rows: Range<usize>, out: &Matrix) -> Result<([u32; 3], Dequantise)> {
        let element = out.element();
        ensure!(rows.start <= rows.end && rows.end <= self.rows, "dequantise: rows {rows:?} of {}", self.rows);
        ensure!(element.is_float(), "dequantise: weights become f32, bf16 or f16, not {element}");
        ensure!(self.device().ptr_eq(out.device()), "dequantise: weight and result lie on two devices");
        let (n, cols) = (rows.len(), self.cols);
        let fits = (out.rows(), out.cols()) == (n, cols);
        ensure!(fits, "dequantise: ({n}, {cols}) numbers into ({}, {})", out.rows(), out.cols());
        let count = n * cols;
        let arguments = Dequantise {
            weight: self.planes()?,
            out: out.output("out", element, count)?,
            first: (rows.start * cols) as u64,
            count: count as u64,
        };
        let blocks = count.div_ceil(16 * Dequantise::BLOCK as usize);
        Ok(([u32::try_from(blocks)?, 1, 1], arguments))
    }

    /// The addresses for a kernel that reads the whole weight.
    pub(crate) fn planes(&self) -> Result<Planes> {
        let address = |plane: &Matrix| plane.input("weight", plane.element(), plane.len());
        Ok(Planes { main: address(&self.main)?, scales: self.scales.as_ref().map_or(Ok(Ptr::NULL), address)? })
    }

    /// Tells the profile that the kernel which is launched next reads so few rows.
    pub(crate) fn counts_as_rows(&self, rows: usize) {
        for plane in [&self.main].into_iter().chain(&self.scales) {
            plane.counts_as(rows * plane.cols());
        }
    }

    /// The suffixes of kernels that read this storage type and compute with this element type.
    pub(crate) fn variant(&self, element: Element) -> Variant {
        Variant::named(&format!("{}_{element}", self.dtype.name()))
    }
}
