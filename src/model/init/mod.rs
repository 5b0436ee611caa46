//! Initial values of adapters that are computed from the base: DoRA's magnitudes, PiSSA and OLoRA.

pub mod dora;
pub mod pissa_olora;
