//! A weighted sum of adapters as one adapter: W + sum_i w_i s_i B_i A_i, exactly, by concatenating the factors.
//!
//! It does not depend on files. Read `model/adapter/mod.rs` first.

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::invalid;
use crate::model::adapter::{Adapter, LoraConfig, LoraLayer, TargetModules};
use crate::ops::cpu;

/// The weighted sum of adapters of one base, as PEFT's `add_weighted_adapter(combination_type="cat")` computes it: A factors
/// are concatenated, and B factors, multiplied by weight and scale, so that the rank is the sum of the ranks and alpha / r is
/// 1. The scalar head is that of the last adapter that has one.
///
/// Stacking an SFT adapter and a PPO adapter trained over the merged SFT model needs weights of 1. A weight between 0 and 1
/// weakens an adapter, a negative one subtracts it.
///
/// # Errors
/// If the list is empty, a weight is NaN or infinite, the adapters belong to different bases, or one is a DoRA adapter, whose
/// change of a matrix is not a sum.
pub fn combine(parts: &[(&Adapter, f64)]) -> Result<Adapter> {
    let [(first, _), ..] = parts else { return Err(invalid!("no adapter to combine")) };
    if let Some((_, weight)) = parts.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(invalid!("the weight {weight} of an adapter is NaN or infinite"));
    }
    if parts.iter().any(|(a, _)| a.config().use_dora) {
        return Err(invalid!(
            "a DoRA adapter scales whole rows, so it cannot be summed with others or weighted; merge it into its base \
             alone, and go on from the merged model"
        ));
    }
    let shapes = *first.shapes();
    if let Some((other, _)) = parts.iter().find(|(other, _)| *other.shapes() != shapes) {
        return Err(invalid!("the adapters are of different bases: {shapes:?} and {:?}", other.shapes()));
    }
    let prints = || parts.iter().filter_map(|(a, _)| a.provenance().base_fingerprint.as_deref());
    if let Some(other) = prints().find(|p| Some(*p) != prints().next()) {
        return Err(invalid!("the adapters were trained over different bases ({other} is one); merge them one by one"));
    }
    let rank_of = |a: &Adapter| a.pairs().map(|(_, p)| p.rank()).max().unwrap_or(0);
    let ranks: Vec<usize> = parts.iter().map(|(a, _)| rank_of(a)).collect();
    let rank = ranks.iter().sum();
    let (mut pairs, mut targets) = (vec![], vec![]);
    for slot in shapes.slots() {
        if parts.iter().all(|(a, _)| a.at(slot).is_none()) {
            continue;
        }
        let (in_features, out_features) = shapes.dims_of(slot);
        // An adapter without a branch on this module contributes zeros, so that all branches have the same rank.
        let (mut a, mut b) = (vec![0f32; rank * in_features], vec![0f32; out_features * rank]);
        let mut at = 0;
        for ((adapter, weight), width) in parts.iter().zip(&ranks) {
            if let Some(pair) = adapter.at(slot) {
                let r = pair.rank();
                a[at * in_features..(at + r) * in_features].copy_from_slice(&cpu::view(&pair.a)?);
                let scale = weight * pair.scale;
                for (to, from) in b.chunks_exact_mut(rank).zip(cpu::view(&pair.b)?.chunks_exact(r)) {
                    for (to, &from) in to[at..at + r].iter_mut().zip(from) {
                        *to = (scale * f64::from(from)) as f32;
                    }
                }
            }
            at += width;
        }
        let tensor = |values, dims: (usize, usize)| Tensor::from_vec(values, dims, &Device::Cpu);
        pairs.push((slot, LoraLayer::new(tensor(a, (rank, in_features))?, tensor(b, (out_features, rank))?, 1.0)));
        targets.push(shapes.path(slot));
    }
    let config = LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        use_rslora: false,
        target_modules: TargetModules::List(targets),
        layers_to_transform: None,
        ..LoraConfig::default()
    };
    let head = parts.iter().rev().find_map(|(a, _)| a.head().cloned());
    Adapter::from_pairs(config, shapes, pairs, head, first.provenance().clone())
}
