//! DoRA's initial magnitudes: m = ||W + scale * B A||, row by row, so that the adapted model starts equal to the base.
//!
//! Source: PEFT `DoraLinearLayer.update_layer`. It does not depend on files. Read `ops/linear/low_rank.rs` for the forward
//! pass and the norms.

use anyhow::{Context, Result};
use candle_core::Tensor;

use crate::model::adapter::{Adapter, LoraConfig, LoraLayer, NonBlockModule, TargetModule};
use crate::model::base::Base;
use crate::ops::cpu;
use crate::ops::linear::low_rank::{column_norms, row_norms};

/// `adapter` with a magnitude for every branch: the row norms of the base's matrix plus the branch as it is.
///
/// # Errors
/// If the adapter belongs to another base.
pub fn with_magnitudes(adapter: &Adapter, base: &Base) -> Result<Adapter> {
    let mut pairs = vec![];
    for (slot, pair) in adapter.pairs() {
        let magnitude = magnitude(base, slot, pair)?;
        pairs.push((slot, pair.clone().with_magnitude(Some(magnitude))));
    }
    let config = LoraConfig { use_dora: true, ..adapter.config().clone() };
    let with =
        Adapter::from_pairs(config, *adapter.shapes(), pairs, adapter.head().cloned(), adapter.provenance().clone())?;
    if adapter.frozen_half() { with.with_frozen_half() } else { Ok(with) }
}

/// Magnitude of one branch, (out).
fn magnitude(base: &Base, slot: TargetModule, pair: &LoraLayer) -> Result<Tensor> {
    let weight = base.matrix(slot).with_context(|| format!("this base has no {slot:?}"))?;
    let norms = match slot {
        TargetModule::NonBlockModule(NonBlockModule::Embedding) => column_norms(weight, pair.low_rank())?,
        _ => row_norms(weight, pair.low_rank())?,
    };
    let n = norms.len();
    Ok(cpu::tensor(norms, n)?)
}
