//! Each algorithm, in a short run, improves responses by a gold rule that it never sees. It tests no formula.

use std::path::Path;

use fourfold::config::{AdvantageEstimator, PolicyLoss, Ppo};
use fourfold::model::adapter::Adapter;
use fourfold::model::generate::{FinishReason, generate};
use fourfold::model::roles::Policy;
use fourfold::ppo::rollout::sampling_params;
use fourfold::ppo::train::train;
use fourfold::quickstart::gold::gold;
use fourfold::quickstart::task::{Split, prompts};
use fourfold::train::session::Session;

use super::world::*;

#[test]
fn every_algorithm_raises_the_gold_score() {
    let model = model();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/quickstart");
    let [sft, rm] = ["sft", "reward"].map(|role| model.adapter(&dir.join(role)).unwrap());
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let asked = |seed, n, split| prompts(seed, n, split).iter().map(|r| ids(&model, &r.prompt)).collect::<Vec<_>>();
    let (trained_on, held_out) = (asked(5, 192, Split::Train), prompts(6, 128, Split::HeldOut));
    let questions = asked(6, 128, Split::HeldOut);
    let tokenizer = model.checkpoint.tokenizer();
    let config = Ppo {
        learning_rate: 4e-3,
        total_episodes: 6 * 32,
        batch_size: 32,
        num_mini_batches: 2,
        micro_batch_size: 16,
        response_length: 40,
        kl_coef: 0.05,
        save_samples: 0,
        ..Ppo::default()
    };
    let mean_gold = |adapter: &Adapter| {
        let seeds: Vec<u64> = (0..128).collect();
        let sampling = sampling_params(&config, tokenizer.eos_ids());
        let policy = Policy::new(&model.base, Some(adapter));
        let responses = generate(policy, &questions, &seeds, &sampling, |_, _| {}).unwrap();
        let judged = responses.into_iter().zip(&held_out);
        let of = judged
            .map(|(r, row)| gold(row, &tokenizer.decode(&r.tokens).unwrap(), r.finish == FinishReason::Stop).total);
        of.sum::<f64>() / 128.0
    };
    let before = mean_gold(&sft);
    let source = source_of(roles);
    use AdvantageEstimator::*;
    for (estimator, policy_loss) in [
        (Gae, PolicyLoss::Clip),
        (Gae, PolicyLoss::KlPenalty),
        (A2c, PolicyLoss::Gradient),
        (Reinforce, PolicyLoss::Gradient),
        (ReinforcePlusPlus, PolicyLoss::Clip),
        (Rloo, PolicyLoss::Clip),
        (Grpo, PolicyLoss::Clip),
        (Grpo, PolicyLoss::Sapo),
        (ReinforcePlusPlusBaseline, PolicyLoss::Clip),
    ] {
        let num_generations = if estimator.has_groups() { 4 } else { 1 };
        let config = Ppo { advantage_estimator: estimator, policy_loss, num_generations, ..config.clone() };
        let run = ppo_run(roles, &trained_on, tokenizer.eos_ids(), &source, &config, 5);
        let trained = train(&run, &mut Session::silent()).unwrap();
        let after = mean_gold(&trained.actor);
        eprintln!("{estimator:?} {policy_loss:?}: gold {before:.2} -> {after:.2}");
        // One run's standard error of the difference is about 0.3.
        assert!(after > before + 0.5, "{estimator:?} {policy_loss:?}: {before} -> {after}");
    }
}
