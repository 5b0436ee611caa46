//! `Matrix`: memory of a device with a shape and a type, shared by its clones and views and given back with the last of
//! them. It does not depend on kernels. Read `machine.rs` beside it next.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use half::{bf16, f16};

use super::graph::Pool;
use super::profile::note_operand;
use super::{Device, Element, Strided};

/// An address as a kernel takes it. It comes from a matrix that stays alive until the launch has been called.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ptr(u64);

impl Ptr {
    /// For an argument that is absent.
    pub const NULL: Self = Self(0);

    /// The address of the number `count` numbers further on. The caller checks that it exists.
    pub fn offset(self, count: usize, element: Element) -> Self {
        Self(self.0 + (count * element.bytes()) as u64)
    }

    /// The same address, if it is a multiple of so many bytes, as kernels that load several numbers at once need.
    pub fn aligned(self, what: &str, bytes: u64) -> Result<Self> {
        ensure!(self.0.is_multiple_of(bytes), "{what}: its address is no multiple of {bytes} bytes");
        Ok(self)
    }
}

/// One allocation. The machine keeps the order of work, so it may be given back while kernels still use it.
#[derive(Debug)]
struct Memory {
    device: Device,
    address: u64,
    bytes: usize,
    /// The recording that it belongs to.
    pool: Option<Arc<Pool>>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.pool {
            Some(pool) => pool.give_back(self.address, self.bytes),
            None => self.device.give_back(self.address, self.bytes),
        }
    }
}

/// A row-major matrix (rows, cols) without gaps, on a device. Clones and views share the memory. Kernels write through
/// shared handles, so whoever passes a matrix as an output makes sure that nobody still needs what it held.
#[derive(Clone, Debug)]
pub struct Matrix {
    memory: Arc<Memory>,
    /// Bytes from the start of the memory.
    offset: usize,
    element: Element,
    rows: usize,
    cols: usize,
}

impl Device {
    /// Uninitialised memory. The emulated machine fills it with NaN. Errors: `OutOfMemory`.
    pub fn matrix(&self, element: Element, rows: usize, cols: usize) -> Result<Matrix> {
        let bytes = rows.checked_mul(cols).and_then(|len| len.checked_mul(element.bytes())).filter(|b| *b < 1 << 47);
        let Some(bytes) = bytes else { anyhow::bail!("a matrix of ({rows}, {cols}) is beyond any memory") };
        let (address, bytes, pool) = self.allocate(bytes)?;
        let memory = Arc::new(Memory { device: self.clone(), address, bytes, pool });
        Ok(Matrix { memory, offset: 0, element, rows, cols })
    }

    /// A matrix of zeros.
    pub fn zeros(&self, element: Element, rows: usize, cols: usize) -> Result<Matrix> {
        let matrix = self.matrix(element, rows, cols)?;
        matrix.fill_zero()?;
        Ok(matrix)
    }

    /// An f32 matrix with these values.
    pub fn upload_f32(&self, values: &[f32], rows: usize, cols: usize) -> Result<Matrix> {
        ensure!(rows.checked_mul(cols) == Some(values.len()), "upload of {} numbers as ({rows}, {cols})", values.len());
        let matrix = self.matrix(Element::F32, rows, cols)?;
        matrix.write(Element::F32, bytes_of(values))?;
        Ok(matrix)
    }

    /// A row of indices.
    pub fn upload_u32(&self, values: &[u32]) -> Result<Matrix> {
        let matrix = self.matrix(Element::U32, 1, values.len())?;
        matrix.write(Element::U32, bytes_of(values))?;
        Ok(matrix)
    }

    /// A row of bytes.
    pub fn upload_bytes(&self, bytes: &[u8]) -> Result<Matrix> {
        let matrix = self.matrix(Element::U8, 1, bytes.len())?;
        matrix.write(Element::U8, bytes)?;
        Ok(matrix)
    }

    /// A matrix of f32, bf16 or f16 with these values, rounded to the nearest.
    pub fn upload_as(&self, element: Element, values: &[f32], rows: usize, cols: usize) -> Result<Matrix> {
        let halves: Vec<u16> = match element {
            Element::F32 => return self.upload_f32(values, rows, cols),
            Element::Bf16 => values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect(),
            Element::F16 => values.iter().map(|&v| f16::from_f32(v).to_bits()).collect(),
            Element::U8 | Element::U32 => anyhow::bail!("upload of floats as {element}"),
        };
        ensure!(rows.checked_mul(cols) == Some(values.len()), "upload of {} numbers as ({rows}, {cols})", values.len());
        let matrix = self.matrix(element, rows, cols)?;
        matrix.write(element, bytes_of(&halves))?;
        Ok(matrix)
    }
}

impl Matrix {
    /// The device that it lies on.
    pub fn device(&self) -> &Device {
        &self.memory.device
    }

    /// The type of its numbers.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of numbers.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Does it hold no number?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> usize {
        self.len() * self.element.bytes()
    }

    /// Do both lie in one allocation?
    pub fn shares_memory(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.address + self.offset as u64
    }

    /// Some rows, as a view that shares the memory. Its address may be no multiple of 16 bytes; see `Ptr::aligned`.
    pub fn row_range(&self, rows: Range<usize>) -> Result<Self> {
        ensure!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of a matrix with {} rows", self.rows);
        let offset = self.offset + rows.start * self.cols * self.element.bytes();
        Ok(Self { offset, rows: rows.len(), ..self.clone() })
    }

    /// A view, `offset` bytes from the start of this matrix, of other numbers than it holds. The offset is a multiple of 256
    /// bytes, so that an allocation's view is aligned as an allocation is.
    pub fn window(&self, offset: usize, element: Element, rows: usize, cols: usize) -> Result<Self> {
        let end =
            rows.checked_mul(cols).and_then(|n| n.checked_mul(element.bytes())).and_then(|n| n.checked_add(offset));
        let fits = offset.is_multiple_of(256) && end.is_some_and(|end| end <= self.bytes());
        ensure!(fits, "({rows}, {cols}) of {element} at byte {offset} of {}", self.bytes());
        Ok(Self { memory: self.memory.clone(), offset: self.offset + offset, element, rows, cols })
    }

    /// The same numbers in another shape, as a view that shares the memory.
    pub fn reshape(&self, rows: usize, cols: usize) -> Result<Self> {
        let fits = rows.checked_mul(cols) == Some(self.len());
        ensure!(fits, "({}, {}) cannot be seen as ({rows}, {cols})", self.rows, self.cols);
        Ok(Self { rows, cols, ..self.clone() })
    }

    /// The address for a kernel that reads `len` numbers of `element`. `what` names the operand in errors.
    pub fn input(&self, what: &'static str, element: Element, len: usize) -> Result<Ptr> {
        ensure!(self.element == element, "{what}: the kernel needs {element}, and the matrix holds {}", self.element);
        ensure!(len <= self.len(), "{what}: the kernel would use {len} of {} numbers", self.len());
        note_operand(self.address(), len * element.bytes());
        Ok(Ptr(self.address()))
    }

    /// Tells the profile that the kernel which is launched next uses so few numbers of this operand, whatever it is given.
    pub(crate) fn counts_as(&self, numbers: usize) {
        note_operand(self.address(), numbers.min(self.len()) * self.element.bytes());
    }

    /// The address for a kernel that writes `len` numbers of `element`.
    pub fn output(&self, what: &'static str, element: Element, len: usize) -> Result<Ptr> {
        self.input(what, element, len)
    }

    /// The whole matrix as an operand of `Device::gemm`.
    pub fn whole(&self) -> Strided<'_> {
        Strided { matrix: self, offset: 0, row: self.cols, next: 0 }
    }

    /// Sets all numbers to zero.
    pub fn fill_zero(&self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        // SAFETY: the memory is alive and has so many bytes.
        unsafe { self.device().machine().zero(self.address(), self.bytes()) }
    }

    /// Overwrites f32 numbers; `values` has as many as the matrix.
    pub fn write_f32(&self, values: &[f32]) -> Result<()> {
        self.write(Element::F32, bytes_of(values))
    }

    /// Overwrites indices.
    pub fn write_u32(&self, values: &[u32]) -> Result<()> {
        self.write(Element::U32, bytes_of(values))
    }

    /// Overwrites the bytes of a matrix of any element.
    pub fn write_bytes(&self, bytes: &[u8]) -> Result<()> {
        self.write(self.element, bytes)
    }

    fn write(&self, element: Element, bytes: &[u8]) -> Result<()> {
        let fits = self.element == element && self.bytes() == bytes.len();
        ensure!(fits, "{} bytes of {element} written over {} numbers of {}", bytes.len(), self.len(), self.element);
        if bytes.is_empty() {
            return Ok(());
        }
        self.device().count(|work| {
            work.uploads += 1;
            work.copied += bytes.len();
        });
        // SAFETY: the memory is alive and has so many bytes.
        unsafe { self.device().machine().upload(bytes, self.address()) }
    }

    /// Copies the numbers of a matrix of the same device, element and length, which shares no memory with this one.
    pub fn copy_from(&self, from: &Self) -> Result<()> {
        let alike = self.device().ptr_eq(from.device()) && self.element == from.element && self.len() == from.len();
        let (n, m) = (from.len(), self.len());
        ensure!(alike, "copy of {n} numbers of {} to {m} of {} or to another device", from.element, self.element);
        let apart = !self.shares_memory(from)
            || self.offset + self.bytes() <= from.offset
            || from.offset + from.bytes() <= self.offset;
        ensure!(apart, "copy of a matrix over itself");
        if self.is_empty() {
            return Ok(());
        }
        // SAFETY: both are alive, have so many bytes and do not overlap.
        unsafe { self.device().machine().copy(from.address(), self.address(), self.bytes()) }
    }

    /// Waits, and reads f32, bf16 or f16 numbers as f32.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let halves = |convert: fn(u16) -> f32| -> Result<Vec<f32>> {
            let mut bits = vec![0u16; self.len()];
            self.read(bytes_of_mut(&mut bits))?;
            Ok(bits.into_iter().map(convert).collect())
        };
        match self.element {
            Element::F32 => {
                let mut values = vec![0f32; self.len()];
                self.read(bytes_of_mut(&mut values))?;
                Ok(values)
            }
            Element::Bf16 => halves(|bits| bf16::from_bits(bits).to_f32()),
            Element::F16 => halves(|bits| f16::from_bits(bits).to_f32()),
            Element::U8 | Element::U32 => anyhow::bail!("a matrix of {} was read as f32", self.element),
        }
    }

    /// Waits, and reads f32 numbers into `to`, which has as many as the matrix.
    pub fn read_f32(&self, to: &mut [f32]) -> Result<()> {
        ensure!(self.element == Element::F32, "a matrix of {} was read as f32", self.element);
        self.read(bytes_of_mut(to))
    }

    /// Waits, and reads indices.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        ensure!(self.element == Element::U32, "a matrix of {} was read as u32", self.element);
        let mut values = vec![0u32; self.len()];
        self.read(bytes_of_mut(&mut values))?;
        Ok(values)
    }

    /// Waits, and reads the bytes of a matrix of any element.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; self.bytes()];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn read(&self, to: &mut [u8]) -> Result<()> {
        ensure!(self.bytes() == to.len(), "{} bytes were read into {}", self.bytes(), to.len());
        if to.is_empty() {
            return Ok(());
        }
        self.device().count(|work| {
            work.downloads += 1;
            work.copied += to.len();
        });
        // SAFETY: the memory is alive and has so many bytes.
        unsafe { self.device().machine().download(self.address(), to) }
    }
}

/// Numbers whose memory is plain bytes: no padding, and every pattern of bits is a value.
trait Plain: Copy {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}

fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding, and the slice covers exactly their bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every pattern of bits is a number.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
