//! `bench`: measurements of this program on this machine. Read `memory.rs` and `gpu.rs` beside it.

mod gpu;
mod memory;

use anyhow::Result;
use clap::Subcommand;

#[derive(Subcommand)]
pub(super) enum Bench {
    /// Two steps of a config's stage under the meter, beside what `plan` says of the same passes.
    Memory(memory::Memory),
    /// What a card can do, and what PPO steps, decoding and every kernel take on it, over random weights of a known size.
    Gpu(gpu::Gpu),
}

pub(super) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Memory(args) => memory::run(args),
        Bench::Gpu(args) => gpu::run(args),
    }
}
