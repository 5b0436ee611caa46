//! Several adapters as one: W + sum_i w_i s_i B_i A_i. Exact, by laying the factors side by side. Knows no file.

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::invalid;
use crate::model::adapter::{Adapter, LoraConfig, LoraLayer, TargetModules};
use crate::ops::cpu;

/// The sum of adapters of one base, each times its weight: the A's over one another, the B's side by side, times weight
/// and scale, so that the rank is the sum of the ranks and alpha / r is 1. What PEFT's
/// `add_weighted_adapter(combination_type="cat")` gives. The scalar head is the last one that there is.
///
/// Stacking an SFT adapter and what PPO added over the merged SFT model is this with weights of 1; a weight between 0
/// and 1 holds an adapter back, a negative one takes it away.
///
/// # Errors
/// If the list is empty, a weight is not finite, the adapters are of different bases, or one is DoRA, whose change of a
/// matrix is no sum.
pub fn combine(parts: &[(&Adapter, f64)]) -> Result<Adapter> {
    let [(first, _), ..] = parts else { return Err(invalid!("no adapter to combine")) };
    if let Some((_, weight)) = parts.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(invalid!("the weight {weight} of an adapter is no finite number"));
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
        let (inp, out) = shapes.dims_of(slot);
        // A map that one adapter leaves out gets zeros there: every branch has the same rank.
        let (mut a, mut b) = (vec![0f32; rank * inp], vec![0f32; out * rank]);
        let mut at = 0;
        for ((adapter, weight), width) in parts.iter().zip(&ranks) {
            if let Some(pair) = adapter.at(slot) {
                let r = pair.rank();
                a[at * inp..(at + r) * inp].copy_from_slice(&cpu::view(&pair.a)?);
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
        pairs.push((slot, LoraLayer::new(tensor(a, (rank, inp))?, tensor(b, (out, rank))?, 1.0)));
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
