//! Bytes that came from elsewhere and are nearly right. Every reader of the program gets thousands of valid files with a few
//! seeded edits each (mutate.rs) and has to read or refuse every one: no panic, no hang, at most twice the file's size and
//! 64 MiB of memory, one message with the exit code of bad input.
//!
//! 2,000 inputs per reader here; the long run, with one process per reader, on as many cores as `--test-threads` says:
//!
//! ```text
//! FOURFOLD_MUTATIONS=100000 cargo test --release --test mutations -- --nocapture --test-threads=1
//! ```
//!
//! `FOURFOLD_MUTATION_SEED` (1) chooses other inputs, `FOURFOLD_MUTATION_CASE` one of them; an input that is at fault is
//! kept in the system's temporary folder and named.
#![cfg(unix)]

mod allocation;
mod bombs;
mod campaign;
mod data;
#[cfg(feature = "hub")]
mod hub;
mod models;
mod mutate;
mod runs;
mod specimens;

#[global_allocator]
static ALLOCATOR: allocation::Counting = allocation::Counting;
