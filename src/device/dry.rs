//! The machine that computes nothing: memory planning is the real pass, run on this machine. `Device` counts; here,
//! addresses are numbers without memory behind them, kernels and products do nothing, and downloads are zeros. It does
//! not depend on a compiler or a driver. Read `emulated/mod.rs` beside it next.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};

use super::machine::{Element, Info, Launch, Machine, Product, Recorded, Refusal};

/// See the file's header.
#[derive(Debug)]
pub struct Dry {
    next: AtomicU64,
}

impl Default for Dry {
    fn default() -> Self {
        // A profile finds operands by their addresses among the words of a kernel's arguments. No other word is one: numbers are
        // smaller, and one that shares its word with what the host's stack held, the half of an address, has a smaller low half.
        Self { next: AtomicU64::new((1 << 48) + (1 << 31)) }
    }
}

fn layout(bytes: usize) -> Result<Layout> {
    ensure!(bytes > 0, "an allocation of no bytes");
    Ok(Layout::from_size_align(bytes, 256)?)
}

/// Zeroed memory of the host, for machines without pinned memory.
pub(super) fn host_memory(bytes: usize) -> Result<*mut u8> {
    // SAFETY: `layout` refuses a size of 0.
    let address = unsafe { alloc_zeroed(layout(bytes)?) };
    ensure!(!address.is_null(), "the host is out of memory: {bytes} bytes were wanted");
    Ok(address)
}

/// # Safety
/// The address comes from `host_memory` with the same size.
pub(super) unsafe fn free_host_memory(address: *mut u8, bytes: usize) {
    if let Ok(layout) = layout(bytes) {
        // SAFETY: promised by the caller.
        unsafe { dealloc(address, layout) };
    }
}

impl Machine for Dry {
    fn name(&self) -> String {
        "the dry machine".into()
    }

    fn info(&self) -> Result<Info> {
        Ok(Info { name: "dry: counts memory and computes nothing".into(), ..Info::default() })
    }

    fn supports(&self, _: Element) -> bool {
        true
    }

    fn is_dry(&self) -> bool {
        true
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        Ok(self.next.fetch_add(bytes as u64, Ordering::Relaxed))
    }

    unsafe fn free(&self, _: u64, _: usize) {}

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8> {
        host_memory(bytes)
    }

    unsafe fn free_host(&self, address: *mut u8, bytes: usize) {
        // SAFETY: promised by the caller.
        unsafe { free_host_memory(address, bytes) };
    }

    unsafe fn upload(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, _: u64, to: &mut [u8]) -> Result<()> {
        to.fill(0);
        Ok(())
    }

    unsafe fn zero(&self, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&self, _: &Launch<'_>) -> Result<()> {
        Ok(())
    }

    unsafe fn gemm(&self, _: &Product) -> Result<()> {
        Ok(())
    }

    fn record(&self, _: Vec<Recorded>) -> Result<u64> {
        Ok(0)
    }

    unsafe fn replay(&self, _: u64) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
