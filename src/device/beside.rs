//! Kernels that run beside the order of work, on a second stream, while products run on the first. It does not depend on
//! operations. Read `machine.rs` beside it for the rule, and `ops/linear/gpu_strips.rs` for weights that are dequantised so.

use anyhow::Result;

use super::{Arguments, Device, Matrix, Variant};

/// A kernel that was started beside the order of work, and the matrix that it writes. The matrix is undefined until the join; the
/// emulated machine fills it with NaN.
#[derive(Debug)]
pub struct Beside {
    into: Matrix,
    ticket: Option<u64>,
}

impl Device {
    /// As [`Device::launch`], beside the order of work: the kernel begins once all that was issued so far is done, and work that is
    /// issued later does not wait for it before [`Beside::join`]. While launches are timed, it runs in the order of work.
    ///
    /// `into` is the one matrix that the kernel writes, whole. The matrices that it reads live, and keep their content, until the
    /// join.
    ///
    /// # Errors
    /// As for [`Device::launch`].
    pub fn launch_beside<A: Arguments>(
        &self,
        variant: Variant,
        grid: [u32; 3],
        arguments: A,
        into: &Matrix,
    ) -> Result<Beside> {
        let ticket = self.prepare(variant, grid, &arguments, |launch| {
            if self.is_profiled() {
                self.launch_in_order(launch, true)?;
                return Ok(None);
            }
            self.count(|work| work.beside += 1);
            // SAFETY: as in `launch_in_order`; the value returned keeps the written memory until the join.
            unsafe { self.machine().launch_beside(launch, (into.address(), into.bytes())) }.map(Some)
        })?;
        Ok(Beside { into: into.clone(), ticket: ticket.flatten() })
    }
}

impl Beside {
    /// Work that is issued from now on sees what the kernel wrote: the matrix.
    ///
    /// # Errors
    /// If the machine refuses.
    pub fn join(mut self) -> Result<Matrix> {
        self.wait()?;
        Ok(self.into.clone())
    }

    fn wait(&mut self) -> Result<()> {
        self.ticket.take().map_or(Ok(()), |ticket| self.into.device().machine().join(ticket))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Before the memory is given back. Nobody reads the matrix any more, so an error of the machine is met by its next work.
        self.wait().ok();
    }
}
