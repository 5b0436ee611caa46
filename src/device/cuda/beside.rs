//! Kernels beside the order of work: a second stream of kernels, which waits for the work stream at each start and which the work
//! stream waits for at each join. It does not depend on matrices. Read `../machine.rs` for the rule and `lanes.rs` for copies.
//!
//! A wait counts for the record that is there when it is issued, and the host issues records and waits under one lock. So one
//! event serves all starts, and the event of a kernel is free for another one as soon as its join is issued.

use std::ffi::c_void;
use std::ptr::null_mut;

use anyhow::Result;
use cudarc::driver::{result, sys};

use crate::device::machine::Launch;

/// The stream and its events. Every function is called with the context bound.
pub(super) struct Kernels {
    /// Made for the first kernel, as the event is.
    stream: sys::CUstream,
    begun: sys::CUevent,
    /// Events that no kernel has.
    unused: Vec<sys::CUevent>,
}

// SAFETY: the driver's handles may be used by any thread that has bound their context.
unsafe impl Send for Kernels {}

impl Default for Kernels {
    fn default() -> Self {
        Self { stream: null_mut(), begun: null_mut(), unused: vec![] }
    }
}

const PLAIN: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

fn event() -> Result<sys::CUevent> {
    Ok(result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?)
}

impl Kernels {
    /// Starts a kernel behind all that was issued to `work`, and returns the event after it.
    ///
    /// # Safety
    /// `work` is a stream of the bound context; as for `Machine::launch_beside`.
    pub unsafe fn launch(
        &mut self,
        launch: &Launch<'_>,
        function: sys::CUfunction,
        work: sys::CUstream,
    ) -> Result<sys::CUevent> {
        if self.stream.is_null() {
            self.begun = event()?;
            self.stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        }
        let ended = self.unused.pop().map_or_else(event, Ok)?;
        let ([x, y, z], mut arguments) = (launch.grid, [launch.arguments.cast_mut().cast::<c_void>()]);
        // SAFETY: promised by the caller; stream and events are alive, and the driver copies the arguments during the call.
        unsafe {
            result::event::record(self.begun, work)?;
            result::stream::wait_event(self.stream, self.begun, PLAIN)?;
            result::launch_kernel(function, (x, y, z), (launch.block, 1, 1), 0, self.stream, &mut arguments)?;
            result::event::record(ended, self.stream)?;
        }
        Ok(ended)
    }

    /// `work` waits for the kernel with this event.
    ///
    /// # Safety
    /// `work` is a stream of the bound context, and the event comes from `launch` and is joined for the first time.
    pub unsafe fn join(&mut self, ended: sys::CUevent, work: sys::CUstream) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { result::stream::wait_event(work, ended, PLAIN) }?;
        self.unused.push(ended);
        Ok(())
    }

    /// Waits for all kernels and ends the stream.
    pub fn end(&mut self) {
        if self.stream.is_null() {
            return;
        }
        // SAFETY: stream and events are alive and used for the last time.
        unsafe {
            result::stream::synchronize(self.stream).ok();
            for event in self.unused.drain(..).chain([self.begun]) {
                result::event::destroy(event).ok();
            }
            result::stream::destroy(self.stream).ok();
        }
        self.stream = null_mut();
    }
}
