//! The weight of the KL penalty is adapted by the KL after the last update of an iteration, as in arXiv:1707.06347 section 4:
//! a rollout with two updates against PEFT and torch. tests/golden/kl_penalty.py printed the golden values. It does not
//! depend on sampling.

use std::path::Path;

use fourfold::config::{LrScheduler, PolicyLoss, Ppo};
use fourfold::model::adapter::Adapter;
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::generate::{FinishReason, Response};
use fourfold::model::readers::Sharing;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::ppo::experience::Experience;
use fourfold::ppo::rollout::Rollout;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::state::State;
use fourfold::report::Report;
use fourfold::reward::source::RewardModel;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::world::World;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Vec<u32>>,
    answers: Vec<Vec<u32>>,
    advantages: Vec<f32>,
    /// Nats per token before the first update, before the second, and after it.
    kls: [f64; 3],
}

/// Splits values of all response tokens into responses.
fn cut(flat: &[f32], lengths: &[usize]) -> Vec<Vec<f32>> {
    let mut flat = flat.iter().copied();
    lengths.iter().map(|&n| flat.by_ref().take(n).collect()).collect()
}

/// The golden rollout, with log-probabilities of `actor` and of the base.
fn experience(golden: &Golden, base: &Base, actor: &Adapter) -> Experience {
    let lengths: Vec<usize> = golden.answers.iter().map(Vec::len).collect();
    let both = golden.prompts.iter().zip(&golden.answers);
    let sequences: Vec<Vec<u32>> = both.map(|(p, a)| p.iter().chain(a).copied().collect()).collect();
    let batch = Batch::new(&sequences).unwrap();
    let targets = Targets::responses(&batch, &lengths).unwrap();
    let logprobs =
        |adapter| cut(&Policy::new(base, adapter).logprobs(&batch, &targets, 1.0).unwrap().logprobs, &lengths);
    let rows = Policy::new(base, None).rows(&batch, &targets).unwrap();
    let d = rows.dims2().unwrap().1;
    let hidden: Vec<f32> = rows.to_host().unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let widths: Vec<usize> = lengths.iter().map(|n| n * d).collect();
    let response = |(tokens, logprobs): (&Vec<u32>, Vec<f32>)| Response {
        tokens: tokens.clone(),
        logprobs,
        finish: FinishReason::Stop,
    };
    let rollout = Rollout {
        prompts: golden.prompts.clone(),
        responses: golden.answers.iter().zip(logprobs(Some(actor))).map(response).collect(),
        ref_logprobs: logprobs(None),
        ref_hidden: cut(&hidden, &widths),
        scores: vec![0.0; lengths.len()],
        ..Rollout::default()
    };
    let zeros = lengths.iter().map(|&n| vec![0.0; n]).collect();
    let advantages = cut(&golden.advantages, &lengths);
    Experience {
        rollout,
        kl: zeros,
        advantages,
        returns: vec![],
        rewards: vec![0.0; lengths.len()],
        kl_clamped: 0,
        clipped: 0,
    }
}

#[test]
fn the_penalty_is_adapted_by_the_kl_after_the_last_of_two_updates() {
    let golden: Golden = serde_json::from_str(include_str!("../golden/kl_penalty.json")).unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = Model::open(&here.join("src/quickstart/assets/base")).unwrap();
    let [lm, rm] = ["lm", "rm"].map(|name| model.adapter(&here.join("tests/golden/peft_logits").join(name)).unwrap());
    let source = RewardModel(ValueModel::new(&model.base, &rm).unwrap());
    // The next coefficient, and the metrics, of a run that steers to `target` nats per token.
    let adapted = |target: f64, num_ppo_epochs: usize| {
        let config = Ppo {
            policy_loss: PolicyLoss::KlPenalty,
            advantage_estimator: fourfold::config::AdvantageEstimator::Reinforce,
            kl_penalty_coef: 0.5,
            kl_penalty_target: target,
            learning_rate: 5e-4,
            lr_scheduler_type: LrScheduler::Constant,
            max_grad_norm: 0.5,
            total_episodes: 4,
            batch_size: 4,
            micro_batch_size: 3,
            num_ppo_epochs,
            ..Ppo::default()
        };
        let run = PpoRun {
            world: World::alone(),
            base: &model.base,
            reward_base: &model.base,
            sft: &lm,
            reward: None,
            prompts: &golden.prompts,
            stop: &[0],
            source: &source,
            decode: &|_| String::new(),
            evaluation: None,
            ptx: None,
            pad: None,
            sampler: None,
            config: &config,
            seed: 0,
            recompute: Recompute::Off,
            sharing: Sharing::default(),
        };
        let mut state = State::new(&run).unwrap();
        state.experience = Some(experience(&golden, &model.base, &lm));
        while state.has_minibatch(&run) {
            state.minibatch(&run, 1.0).unwrap();
            state.next_minibatch(&run);
        }
        assert_eq!(state.step, num_ppo_epochs);
        let dir = tempfile::tempdir().unwrap();
        let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
        state.end_iteration(&run, &mut session.report).unwrap();
        let kl = state.last.get("policy/kl_to_old").and_then(Value::as_f64).unwrap();
        (state.kl_penalty, kl)
    };
    let [before, between, after] = golden.kls;
    assert!(before.abs() < 1e-9 && 1.5 * between < after, "the golden tells the places apart: {:?}", golden.kls);
    let (_, kl) = adapted(1.0, 2);
    eprintln!("KL after two updates {kl:.6}, torch {after:.6}");
    assert!((kl - after).abs() < 0.01 * after, "{kl} {after}");
    assert!((adapted(1.0, 1).1 - between).abs() < 0.01 * between, "after one update");
    // Above 1.5 times the target only after the second update; below it by two thirds; and within both bounds.
    assert_eq!(adapted(after / 1.6, 2).0, 1.0);
    assert_eq!(adapted(after * 1.6, 2).0, 0.25);
    assert_eq!(adapted(after, 2).0, 0.5);
}
