//! The whole network on a device: passes, stages, faults and memory on the emulated machine (the card's kernels on the CPU)
//! and on the dry machine, compared with the host. It needs no card. It does not test single kernels: tests/kernels does.
//!
//! The emulated machine needs a C++ compiler. Without one these tests fail, unless `FOURFOLD_SKIP_EMULATED` is 1.

mod actor_step;
mod bench;
mod commands;
mod decoding;
mod dequantised;
mod doctor;
#[cfg(target_os = "linux")]
mod driver;
#[allow(dead_code, reason = "each test binary uses other parts of it")]
#[path = "../faults/world.rs"]
mod fault_world;
#[path = "../support/real_files.rs"]
mod files;
mod inputs_on_host;
mod kept;
mod kv_cache;
mod ledger;
mod narrow;
mod parity;
#[allow(dead_code, reason = "each test binary uses other parts of it")]
#[path = "../training/invariants/world.rs"]
mod ppo_world;
mod readers;
mod real_files;
mod stages;
mod stored_types;
mod streaming;
#[allow(dead_code, reason = "each test binary uses other parts of it")]
#[path = "../support/mod.rs"]
mod support;
#[allow(dead_code, reason = "each test binary uses other parts of it")]
#[path = "../support/tiny_decoders.rs"]
mod tiny_decoders;
mod work;
mod world;
