//! Scratch buffers, which each thread reuses between calls: `with_scratch` for f32, `with_words` for pairs of bf16.
//! Without them, kernels would allocate for every panel. It does not depend on the rest of the crate. Read `pack.rs` next.

use std::cell::RefCell;

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends a buffer of `len` f32 of unspecified content; the thread keeps it for the next call.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        // Exactly: growth by doubling would keep up to twice as much for ever.
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    SCRATCH.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

/// Lends a buffer of `len` words, aligned to 64 bytes, as [`with_scratch`] does.
pub fn with_words<R>(len: usize, f: impl FnOnce(&mut [u32]) -> R) -> R {
    with_scratch(len + 16, |buffer| {
        let from = buffer.as_ptr().align_offset(64).min(16);
        f(as_words(&mut buffer[from..from + len]))
    })
}

/// The same memory as f32; moving words this way preserves every bit.
pub fn as_floats(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: same size and alignment, and every bit pattern is an f32.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}

/// The same memory as words; scratch buffers are allocated as f32.
pub fn as_words(floats: &mut [f32]) -> &mut [u32] {
    // SAFETY: same size and alignment, and every bit pattern is a u32.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len()) }
}
