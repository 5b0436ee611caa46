//! Inputs of blocks that wait on the host between forward and backward, under `checkpoint = "offload"`. A block's input is all
//! that its backward needs from the forward, and the inputs of all blocks are most of what a long sequence takes on a device. Two
//! buffers of an input's size take turns: while a block computes, the input before it is copied to pinned memory of the host, and
//! in the backward the next one that it needs is copied back. Numbers do not change.
//!
//! It does not depend on adapters or roles. Read `device/landing.rs` for the buffers, and `base.rs` for the passes.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use crate::device::{Array, Device, Element, HostCopy, Landing, Matrix};

/// Inputs of other blocks are copied while one block computes.
const BUFFERS: usize = 2;

/// Pinned memory that passes use in turn: to allocate it takes the driver longer than to fill it.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool(Arc<Mutex<Vec<HostCopy>>>);

/// Bytes of pinned memory for an input of so many bytes: rounded up to a multiple of a power of two that is an eighth to a quarter
/// of them, so that passes that grow by some tokens find memory that is large enough.
pub fn pinned_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(((bytes.max(64) / 8).next_power_of_two()).max(8))
}

impl Pool {
    /// So many copies of at least so many bytes each. Those that are smaller are given back first.
    fn take(&self, device: &Device, count: usize, bytes: usize) -> Result<Vec<HostCopy>> {
        let mut there = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        there.retain(|copy| copy.bytes() >= bytes);
        while there.len() < count {
            there.push(device.host_copy(pinned_bytes(bytes))?);
        }
        let rest = there.len() - count;
        Ok(there.split_off(rest))
    }

    /// Bytes of what no pass uses.
    pub fn bytes(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(HostCopy::bytes).sum()
    }

    fn give_back(&self, copies: Vec<HostCopy>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(copies);
    }
}

/// The inputs of one pass, lowest block first.
pub(super) struct HostInputs {
    buffers: Vec<Landing>,
    copies: Vec<HostCopy>,
    shape: (usize, usize),
    pool: Pool,
}

impl HostInputs {
    /// Room for the inputs (N, D) of so many blocks.
    ///
    /// # Errors
    /// If device memory or pinned memory is out.
    pub fn new(device: &Device, pool: &Pool, blocks: usize, shape: (usize, usize)) -> Result<Self> {
        let bytes = shape.0 * shape.1 * size_of::<f32>();
        let buffers = (0..BUFFERS.min(blocks)).map(|_| device.landing(bytes)).collect::<Result<_>>()?;
        Ok(Self { buffers, copies: pool.take(device, blocks, bytes)?, shape, pool: pool.clone() })
    }

    fn bytes(&self) -> usize {
        self.shape.0 * self.shape.1 * size_of::<f32>()
    }

    /// The buffer that the input of a block goes through.
    fn buffer(&self, block: usize) -> &Landing {
        &self.buffers[block % self.buffers.len()]
    }

    fn content(&self, block: usize) -> Result<Matrix> {
        self.buffer(block).buffer().window(0, Element::F32, self.shape.0, self.shape.1)
    }

    /// Starts the copy of a block's input to the host. The input itself may be freed.
    ///
    /// # Errors
    /// If it is not an f32 matrix of this size, or the copy cannot be started.
    pub fn store(&mut self, block: usize, x: &Array) -> Result<()> {
        ensure!(x.dims2()? == self.shape, "an input of {:?}, and not of {:?}", x.dims2()?, self.shape);
        self.buffer(block).arrive()?;
        self.content(block)?.copy_from(x.device()?)?;
        self.buffer(block).release()?;
        let (bytes, at) = (self.bytes(), block % self.buffers.len());
        let copy = self.copies.get_mut(block).context("a block more than the pass has")?;
        // SAFETY: the buffers are dropped before the copies are given to another pass, and only they use the copies.
        unsafe { self.buffers[at].spill(copy, bytes) }
    }

    fn fill(&self, block: usize) -> Result<()> {
        // SAFETY: the buffers are dropped before the copies are given to another pass.
        unsafe { self.buffer(block).fill_back(&self.copies[block], self.bytes()) }
    }

    /// Starts the copies back of the inputs that the backward reads first.
    ///
    /// # Errors
    /// If a copy cannot be started.
    pub fn turn_back(&self) -> Result<()> {
        (0..self.copies.len()).rev().take(self.buffers.len()).try_for_each(|block| self.fill(block))
    }

    /// The input of a block, until `done`.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn get(&self, block: usize) -> Result<Array> {
        self.buffer(block).arrive()?;
        Ok(self.content(block)?.into())
    }

    /// The block's backward was issued: its buffer takes the next input that it is for.
    ///
    /// # Errors
    /// If a copy cannot be started.
    pub fn done(&self, block: usize) -> Result<()> {
        self.buffer(block).release()?;
        block.checked_sub(self.buffers.len()).map_or(Ok(()), |next| self.fill(next))
    }
}

impl Drop for HostInputs {
    fn drop(&mut self) {
        // Each waits for its last copy.
        self.buffers.clear();
        self.pool.give_back(std::mem::take(&mut self.copies));
    }
}
