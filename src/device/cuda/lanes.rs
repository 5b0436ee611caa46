//! Copies beside the order of work: a second stream, and two events for each buffer that is filled there. It does not depend
//! on matrices or kernels. Read `../machine.rs` for the rules, which the events keep:
//!
//! - `release` records the work stream's place, and the copy stream waits for it before it overwrites or reads the buffer;
//! - `fill` and `spill` record the copy stream's place after the copy, and `arrive` makes the work stream wait for it.
//!
//! A wait counts for the record that is there when it is issued, and the host issues all of these under one lock and in order,
//! so a later record changes nothing about it.

use std::collections::BTreeMap;
use std::ptr::null_mut;

use anyhow::{Context, Result};
use cudarc::driver::{result, sys};

/// A lane's events.
#[derive(Clone, Copy)]
struct Lane {
    released: sys::CUevent,
    filled: sys::CUevent,
}

/// The stream of copies and the lanes that are open. Every function is called with the context bound.
pub(super) struct Lanes {
    /// Made for the first lane.
    copies: sys::CUstream,
    open: BTreeMap<u64, Lane>,
    next: u64,
}

// SAFETY: the driver's handles may be used by any thread that has bound their context.
unsafe impl Send for Lanes {}

impl Default for Lanes {
    fn default() -> Self {
        Self { copies: null_mut(), open: BTreeMap::new(), next: 0 }
    }
}

const PLAIN: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

impl Lanes {
    fn lane(&self, lane: u64) -> Result<Lane> {
        self.open.get(&lane).copied().context("a lane that is not open")
    }

    /// Opens a lane behind all that was issued to `work`.
    ///
    /// # Safety
    /// `work` is a stream of the bound context.
    pub unsafe fn open(&mut self, work: sys::CUstream) -> Result<u64> {
        if self.copies.is_null() {
            self.copies = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        }
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let lane = Lane { released: event()?, filled: event()? };
        self.next += 1;
        self.open.insert(self.next, lane);
        // SAFETY: promised by the caller. The buffer's allocation is ordered on `work`, and the first fill waits for it.
        unsafe { result::event::record(lane.released, work)? };
        Ok(self.next)
    }

    /// Waits for the last copy and ends the lane. An event that was never recorded is not waited for.
    pub fn close(&mut self, lane: u64) {
        let Some(lane) = self.open.remove(&lane) else { return };
        // SAFETY: the events are alive and used for the last time.
        unsafe {
            result::event::synchronize(lane.filled).ok();
            result::event::destroy(lane.filled).ok();
            result::event::destroy(lane.released).ok();
        }
    }

    /// Starts a copy behind the lane's last release.
    ///
    /// # Safety
    /// As for `Machine::fill`.
    pub unsafe fn fill(&self, lane: u64, from: &[u8], to: u64) -> Result<()> {
        let lane = self.lane(lane)?;
        // SAFETY: promised by the caller; stream and events are alive.
        unsafe {
            result::stream::wait_event(self.copies, lane.released, PLAIN)?;
            result::memcpy_htod_async(to, from, self.copies)?;
            Ok(result::event::record(lane.filled, self.copies)?)
        }
    }

    /// Starts a copy to the host behind the lane's last release. `close` waits for it, as for a fill.
    ///
    /// # Safety
    /// As for `Machine::spill`.
    pub unsafe fn spill(&self, lane: u64, from: u64, to: &mut [u8]) -> Result<()> {
        let lane = self.lane(lane)?;
        // SAFETY: promised by the caller; stream and events are alive.
        unsafe {
            result::stream::wait_event(self.copies, lane.released, PLAIN)?;
            result::memcpy_dtoh_async(to, from, self.copies)?;
            Ok(result::event::record(lane.filled, self.copies)?)
        }
    }

    /// `work` waits for the lane's last copy.
    ///
    /// # Safety
    /// `work` is a stream of the bound context.
    pub unsafe fn arrive(&self, lane: u64, work: sys::CUstream) -> Result<()> {
        // SAFETY: promised by the caller; the event is alive.
        Ok(unsafe { result::stream::wait_event(work, self.lane(lane)?.filled, PLAIN) }?)
    }

    /// The next fill waits for what was issued to `work`.
    ///
    /// # Safety
    /// `work` is a stream of the bound context.
    pub unsafe fn release(&self, lane: u64, work: sys::CUstream) -> Result<()> {
        // SAFETY: promised by the caller; the event is alive.
        Ok(unsafe { result::event::record(self.lane(lane)?.released, work) }?)
    }

    /// Ends all lanes and the stream. The context is bound.
    pub fn end(&mut self) {
        while let Some(&lane) = self.open.keys().next() {
            self.close(lane);
        }
        if !self.copies.is_null() {
            // SAFETY: the stream is alive and used for the last time.
            unsafe {
                result::stream::synchronize(self.copies).ok();
                result::stream::destroy(self.copies).ok();
            }
            self.copies = null_mut();
        }
    }
}
