//! Pretraining mixture, PPO-ptx (arXiv:2203.02155): a language-model loss on raw text, added to the policy loss so that the
//! actor does not forget what the reward does not measure. It does not depend on the training loop. Read `update.rs` for
//! where its gradient is added.

use anyhow::Result;

use crate::config::Ptx;
use crate::data::examples::objectives::SftExample;
use crate::data::examples::{Examples, pick};
use crate::model::adapter::Gradients;
use crate::model::block::Recompute;
use crate::model::roles::Policy;
use crate::sft::pack;
use crate::train::world::World;

/// `L = -coef / tokens * sum(logprobs)`: the share of a micro-batch in a loss over `tokens` tokens. Returns (L, dL/dlogp).
pub fn loss(logprobs: &[f32], coef: f64, tokens: f64) -> (f64, Vec<f32>) {
    let weight = coef / tokens;
    let sum: f64 = logprobs.iter().map(|&l| f64::from(l)).sum();
    (-weight * sum, vec![-weight as f32; logprobs.len()])
}

/// Loss of the text blocks `rows` under `policy` and its gradient, in micro-batches of `micro_batch_size` blocks. Where several
/// ranks share the micro-batches, the loss is that of all, and the gradient is this rank's share.
///
/// # Errors
/// If the blocks cannot be read, or a tensor cannot be allocated.
#[allow(clippy::too_many_arguments)]
pub fn gradients(
    policy: Policy<'_>,
    layers: usize,
    blocks: &dyn Examples<SftExample>,
    rows: &[usize],
    config: &Ptx,
    micro_batch_size: usize,
    recompute: Recompute,
    world: &World,
) -> Result<(f64, Gradients)> {
    // Every token of a block but the first is a target; all blocks have the same length.
    let tokens: usize = rows.iter().map(|&row| blocks.tokens(row) - 1).sum();
    let chunks: Vec<&[usize]> = rows.chunks(micro_batch_size).collect();
    let mut grads = Gradients::none(layers);
    let mut of = |rows: &&[usize]| {
        let (batch, targets) = pack(&pick(blocks, rows.iter().copied())?)?;
        let mut part = 0.0;
        let (_, g) = policy.gradients(&batch, &targets, 1.0, recompute, |stats| {
            let (loss, logprobs) = loss(&stats.logprobs, config.coef, tokens as f64);
            part = loss;
            Ok((logprobs, vec![0.0; stats.logprobs.len()]))
        })?;
        grads.add(g)?;
        Ok(part)
    };
    let parts = world.share(chunks.len(), |mine| chunks[mine].iter().map(&mut of).collect())?;
    Ok((parts.into_iter().sum(), grads))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn loss_and_gradient_match_deepspeed_chat_golden() {
        // Printed by tests/golden/dschat.py.
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden/dschat.json")).unwrap();
        let golden = &golden["ptx"];
        let logprobs: Vec<f32> = serde_json::from_value(golden["logprobs"].clone()).unwrap();
        let coef = golden["coefficient"].as_f64().unwrap();
        let (whole, grad) = loss(&logprobs, coef, logprobs.len() as f64);
        assert!((whole - golden["loss"].as_f64().unwrap()).abs() < 1e-5, "{whole}");
        assert!(grad.iter().all(|&g| (f64::from(g) + coef / logprobs.len() as f64).abs() < 1e-6));
        // Micro-batches add up to the whole loss.
        let parts: f64 = logprobs.chunks(2).map(|part| loss(part, coef, logprobs.len() as f64).0).sum();
        assert!((whole - parts).abs() < 1e-9);
    }
}
