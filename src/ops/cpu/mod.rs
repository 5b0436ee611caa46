//! Shared support for CPU kernels: tensors as slices, output buffers, `parallel`. The submodules hold run-time SIMD
//! dispatch (`isa`), vectorisable functions (`math`), the thread pool (`pool`), scratch buffers (`scratch`), the f32
//! and bf16 matrix products (`gemm`, `bf16`) and packing (`transpose`, `pack`). It does not depend on any operation.
//! Read `isa.rs`, then `gemm.rs`.

pub mod bf16;
pub mod gemm;
pub mod isa;
pub mod math;
pub mod pack;
pub mod pool;
pub mod scratch;
pub mod transpose;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Device, Result, Shape, Storage, StorageRef, Tensor};

pub use crate::ops::cpu::isa::Isa;
pub(crate) use crate::ops::cpu::isa::vectorised;
#[cfg(target_arch = "x86_64")]
pub(crate) use crate::ops::cpu::math::lane_sums;
pub use crate::ops::cpu::math::{dot_plain, erf, exp, four_dots, lane_sum, max, tanh};
pub(crate) use crate::ops::cpu::math::{soft_cap, soft_cap_backward};

/// A contiguous f32 CPU tensor as a slice, for as long as the view lives.
pub struct View<'a> {
    guard: StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for View<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.guard {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("view() lets only f32 CPU storage through"),
        }
    }
}

/// Opens a tensor as a slice.
///
/// # Errors
/// If the tensor is not contiguous f32 on the CPU.
pub fn view(tensor: &Tensor) -> Result<View<'_>> {
    let (guard, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a CPU kernel was given a tensor {:?} that is not contiguous", tensor.shape());
    };
    if !matches!(&*guard, Storage::Cpu(CpuStorage::F32(_))) {
        candle_core::bail!(
            "a CPU kernel was given a tensor of {:?} on {:?}",
            tensor.dtype(),
            tensor.device().location()
        );
    }
    Ok(View { guard, range: start..end })
}

/// A CPU tensor over `values`, without a copy.
///
/// # Errors
/// If the shape has another number of elements.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// An uninitialised output buffer that threads fill in disjoint parts.
pub struct Buffer {
    values: Vec<f32>,
    len: usize,
}

/// The address of an output buffer, which can be sent to threads; each thread writes its own part.
#[derive(Clone, Copy)]
pub struct Out(*mut f32);

// SAFETY: a plain address; each unsafe use must ensure that writes are disjoint.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// The address of a slice that several threads will fill.
    pub fn of(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The address of element `i`.
    ///
    /// # Safety
    /// `i` lies inside the buffer that this address came from, and no other thread uses the element meanwhile.
    pub unsafe fn at(self, i: usize) -> *mut f32 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.0.add(i) }
    }

    /// `len` elements from `start` on, as an exclusive slice.
    ///
    /// # Safety
    /// As for [`Out::at`], for every element; each element is written before it is read.
    pub unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: guaranteed by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

impl Buffer {
    /// A buffer with a capacity of `len` elements.
    pub fn new(len: usize) -> Self {
        Self { values: Vec::with_capacity(len), len }
    }

    /// The address that threads write to.
    pub fn out(&mut self) -> Out {
        Out(self.values.as_mut_ptr())
    }

    /// The filled buffer.
    ///
    /// # Safety
    /// Every element was written.
    pub unsafe fn finish(mut self) -> Vec<f32> {
        // SAFETY: capacity was reserved in new(), and the caller wrote all `len` elements.
        unsafe { self.values.set_len(self.len) };
        self.values
    }
}

/// Below this many multiply-adds, sharing the work costs more than it saves (a barrier takes under a microsecond).
pub(crate) const WORTH_A_THREAD: usize = 40_000;

/// Runs `f` over parts of 0..items on all cores. `cost` is the total number of multiply-adds. Each item is processed by
/// exactly one thread, so results do not depend on the number of threads as long as items are independent.
pub fn parallel(items: usize, cost: usize, f: impl Fn(Range<usize>) + Sync) {
    if cost < WORTH_A_THREAD || items < 2 {
        if items > 0 {
            f(0..items);
        }
        return;
    }
    crate::ops::cpu::pool::share(items, f);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parallel_visits_every_item_once() {
        let mut b = Buffer::new(1000);
        let out = b.out();
        parallel(1000, usize::MAX, |r| {
            for i in r {
                // SAFETY: i is inside the buffer and visited by one thread.
                unsafe { *out.at(i) = i as f32 };
            }
        });
        // SAFETY: all written above.
        let values = unsafe { b.finish() };
        assert!(values.iter().enumerate().all(|(i, &v)| v == i as f32));
    }
}
