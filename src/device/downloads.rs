//! Copies to the host through buffers that take turns, so that the host empties one while the machine fills the next, and many
//! small arrays are waited for once. A machine has pinned buffers for it; the order in which they are filled, waited for and
//! emptied is the same on all. It does not depend on matrices. Read `machine.rs` beside it next.

use std::collections::VecDeque;

use anyhow::{Result, ensure};

use super::machine::Piece;
use super::{Device, Element, Matrix};

/// Buffers of the host that a machine copies to.
pub(super) trait Buffers {
    /// How many there are, at least one.
    fn count(&self) -> usize;

    /// Bytes of each.
    fn capacity(&self) -> usize;

    /// Starts a copy into a buffer, `at` bytes from its start, after the work that was issued so far.
    ///
    /// # Safety
    /// `from` is memory of the machine with so many bytes, and the buffer has room for them.
    unsafe fn start(&mut self, buffer: usize, at: usize, from: u64, bytes: usize) -> Result<()>;

    /// The copies into a buffer are all started.
    fn mark(&mut self, buffer: usize) -> Result<()>;

    /// Waits for the copies before the last mark of a buffer; where it lies.
    fn wait(&mut self, buffer: usize) -> Result<*const u8>;
}

/// A part of a piece in a buffer: where in it, where to, and how many bytes.
struct Part {
    at: usize,
    to: *mut u8,
    bytes: usize,
}

/// Copies the pieces.
///
/// # Errors
/// If the machine refuses a copy.
///
/// # Safety
/// The pieces are memory of the machine and of the host, with so many bytes, that nothing else uses.
pub(super) unsafe fn through(buffers: &mut impl Buffers, pieces: &[Piece]) -> Result<()> {
    let (count, capacity) = (buffers.count(), buffers.capacity());
    let mut rest: VecDeque<Piece> = pieces.iter().copied().filter(|piece| piece.bytes > 0).collect();
    let mut filled: VecDeque<(usize, Vec<Part>)> = VecDeque::new();
    let mut turn = 0;
    while !rest.is_empty() || !filled.is_empty() {
        // 1. All buffers are being filled while there is something to fill them with.
        if filled.len() < count && !rest.is_empty() {
            let (mut parts, mut at) = (vec![], 0);
            while let Some(piece) = rest.front_mut().filter(|_| at < capacity) {
                let bytes = piece.bytes.min(capacity - at);
                // SAFETY: promised by the caller; at + bytes is at most the capacity.
                unsafe { buffers.start(turn, at, piece.from, bytes)? };
                parts.push(Part { at, to: piece.to, bytes });
                // SAFETY: inside of the piece, or one past its end.
                (piece.from, piece.to) = (piece.from + bytes as u64, unsafe { piece.to.add(bytes) });
                piece.bytes -= bytes;
                at += bytes;
                rest.pop_front_if(|piece| piece.bytes == 0);
            }
            buffers.mark(turn)?;
            filled.push_back((turn, parts));
            turn = (turn + 1) % count;
            continue;
        }
        // 2. The one that was filled first is emptied, and then filled again.
        let Some((buffer, parts)) = filled.pop_front() else { break };
        let content = buffers.wait(buffer)?;
        for Part { at, to, bytes } in parts {
            // SAFETY: the buffer has what was copied there, and the caller promised the other side.
            unsafe { to.copy_from_nonoverlapping(content.add(at), bytes) };
        }
    }
    Ok(())
}

impl Device {
    /// Waits once, and reads the f32 numbers of many matrices of this device.
    ///
    /// # Errors
    /// If one has other numbers or lies elsewhere, or a copy fails.
    pub fn read_each(&self, matrices: &[&Matrix]) -> Result<Vec<Vec<f32>>> {
        let mut all: Vec<Vec<f32>> = Vec::with_capacity(matrices.len());
        let mut pieces = Vec::with_capacity(matrices.len());
        for matrix in matrices {
            let fits = matrix.element() == Element::F32 && matrix.device().ptr_eq(self);
            ensure!(fits, "a matrix of {} on {} was read as f32", matrix.element(), matrix.device().name());
            // The copy writes to all of it.
            let mut values: Vec<f32> = Vec::with_capacity(matrix.len());
            pieces.push(Piece { from: matrix.address(), to: values.as_mut_ptr().cast(), bytes: matrix.bytes() });
            all.push(values);
        }
        let bytes: usize = pieces.iter().map(|piece| piece.bytes).sum();
        if bytes > 0 {
            self.count(|work| {
                work.downloads += 1;
                work.copied += bytes;
            });
            // SAFETY: the matrices are alive, and each vector has room for as many bytes.
            unsafe { self.machine().download_each(&pieces)? };
        }
        for (values, matrix) in all.iter_mut().zip(matrices) {
            // SAFETY: so many numbers were written.
            unsafe { values.set_len(matrix.len()) };
        }
        Ok(all)
    }
}
