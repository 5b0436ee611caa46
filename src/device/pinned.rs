//! Memory of the host that a machine copies from and to at full speed. It does not depend on matrices. Read
//! `matrix.rs` beside it next.

use std::ops::{Deref, DerefMut};

use anyhow::Result;

use super::Device;

/// f32 numbers in pinned memory, zero at first. They are a slice; `Matrix::read_f32` and `Matrix::write_f32` take it.
#[derive(Debug)]
pub struct Pinned {
    device: Device,
    address: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to this handle alone, and copies are over when the machine's functions return.
unsafe impl Send for Pinned {}
// SAFETY: shared handles only read.
unsafe impl Sync for Pinned {}

impl Device {
    /// So many numbers in pinned memory. Pinned memory is taken from all processes: use it for buffers that live long.
    pub fn pinned(&self, len: usize) -> Result<Pinned> {
        let address = self.machine().allocate_host((len * size_of::<f32>()).max(1))?;
        Ok(Pinned { device: self.clone(), address, len })
    }
}

impl Pinned {
    /// The bytes of the numbers.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length; numbers have no padding.
        unsafe { std::slice::from_raw_parts(self.address, self.len * size_of::<f32>()) }
    }

    /// The bytes of the numbers, to be overwritten.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; every pattern of bits is a number, and the handle is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.len * size_of::<f32>()) }
    }
}

impl Deref for Pinned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: allocated with this length and zeroed by the machine.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.len) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and the handle is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it comes from `allocate_host` with this size.
        unsafe { self.device.machine().free_host(self.address, (self.len * size_of::<f32>()).max(1)) };
    }
}
