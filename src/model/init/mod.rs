//! Initial values of adapters that are computed from the base: DoRA's magnitudes, PiSSA and OLoRA.
//!
//! They are apart from `model/adapter`, which does not depend on the base. Read `dora.rs`, then `pissa_olora.rs`.

pub mod dora;
pub mod pissa_olora;
