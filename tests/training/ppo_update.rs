//! Whole PPO updates of actor and critic against PEFT and torch on the same base, adapters and responses: losses, gradient
//! norms before clipping, and the result of four steps. tests/golden/ppo_update.py printed the golden values. It does not
//! depend on sampling.

use std::path::Path;

use fourfold::config::Ppo;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::generate::{FinishReason, Response};
use fourfold::model::readers::Sharing;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::ppo::experience::{Experience, Scale};
use fourfold::ppo::rollout::Rollout;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::state::State;
use fourfold::reward::source::RewardModel;
use fourfold::run::Model;
use fourfold::train::world::World;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Vec<u32>>,
    answers: Vec<Vec<u32>>,
    scores: Vec<f32>,
    advantages: Vec<f32>,
    returns: Vec<f32>,
    course: Vec<Step>,
    logprobs_after: Vec<f32>,
    values_after: Vec<f32>,
}

#[derive(Deserialize)]
struct Step {
    clipfrac: f64,
    policy_loss: f64,
    policy_norm: f64,
    value_loss: f64,
    value_norm: f64,
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // NaN must not pass as the smaller one.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

#[test]
fn four_updates_of_actor_and_critic_follow_torch_and_peft() {
    let golden: Golden = serde_json::from_str(include_str!("../golden/ppo_update.json")).unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = Model::open(&here.join("src/quickstart/assets/base")).unwrap();
    let [lm, rm] = ["lm", "rm"].map(|name| model.adapter(&here.join("tests/golden/peft_logits").join(name)).unwrap());
    let base = &model.base;
    // 1. The roles score the responses; the reference is the base without an adapter.
    let sequences: Vec<Vec<u32>> =
        golden.prompts.iter().zip(&golden.answers).map(|(p, a)| p.iter().chain(a).copied().collect()).collect();
    let lengths: Vec<usize> = golden.answers.iter().map(Vec::len).collect();
    let batch = Batch::new(&sequences).unwrap();
    let targets = Targets::responses(&batch, &lengths).unwrap();
    let cut = |flat: Vec<f32>, width: usize| -> Vec<Vec<f32>> {
        let mut flat = flat.into_iter();
        lengths.iter().map(|n| flat.by_ref().take(n * width).collect()).collect()
    };
    let logprobs = |adapter| Policy::new(base, adapter).logprobs(&batch, &targets, 1.0).unwrap().logprobs;
    let rows = Policy::new(base, None).rows(&batch, &targets).unwrap();
    let old = cut(logprobs(Some(&lm)), 1);
    let responses = golden.answers.iter().zip(old);
    let responses =
        responses.map(|(tokens, logprobs)| Response { tokens: tokens.clone(), logprobs, finish: FinishReason::Stop });
    let scorer = ValueModel::new(base, &rm).unwrap();
    let rollout = Rollout {
        prompts: golden.prompts.clone(),
        responses: responses.collect(),
        ref_logprobs: cut(logprobs(None), 1),
        ref_hidden: cut(rows.to_host().unwrap().flatten_all().unwrap().to_vec1().unwrap(), rows.dims2().unwrap().1),
        values: cut(scorer.values(&batch, &targets.rows).unwrap(), 1),
        scores: golden.scores.clone(),
        ..Rollout::default()
    };
    // 2. Four steps.
    let config = Ppo {
        learning_rate: 5e-4,
        critic_learning_rate: Some(1e-3),
        weight_decay: 0.01,
        max_grad_norm: 0.5,
        total_episodes: 4,
        batch_size: 4,
        micro_batch_size: 3,
        num_ppo_epochs: 4,
        kl_coef: 0.1,
        score_clip: 2.0,
        gamma: 0.99,
        lam: 0.9,
        cliprange: 0.1,
        cliprange_value: 0.1,
        entropy_coef: 0.01,
        ..Ppo::default()
    };
    let experience = Experience::of(rollout, Scale { kl_coef: 0.1, shift: 0.0, deviation: 1.0 }, &config).unwrap();
    let (a, r) = (experience.advantages.concat(), experience.returns.concat());
    let apart = (furthest(&a, &golden.advantages), furthest(&r, &golden.returns));
    eprintln!("advantages and returns within {apart:?}");
    assert!(apart.0 < 1e-4 && apart.1 < 1e-4, "{apart:?}");
    let source = RewardModel(scorer);
    let run = PpoRun {
        world: World::alone(),
        base,
        reward_base: base,
        sft: &lm,
        reward: Some(&rm),
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
    state.experience = Some(experience);
    for (i, want) in golden.course.iter().enumerate() {
        let before = state.update.clone();
        state.minibatch(&run, 1.0).unwrap();
        state.next_minibatch(&run);
        let now = &state.update;
        let got = [
            ("policy loss", now.policy_loss - before.policy_loss, want.policy_loss),
            ("policy norm", now.actor_norm - before.actor_norm, want.policy_norm),
            ("value loss", now.value_loss - before.value_loss, want.value_loss),
            ("value norm", now.critic_norm - before.critic_norm, want.value_norm),
        ];
        for (what, got, want) in got {
            eprintln!("step {i}: {what} {got:.7} {want:.7}");
            // Both sides use f32, and each step amplifies the rounding of the one before.
            assert!((got - want).abs() < 1e-3 * want.abs().max(0.05), "step {i}: {what} {got} {want}");
        }
        assert!(i == 0 || want.clipfrac > 0.05, "the golden reaches the clip");
    }
    assert!(!state.has_minibatch(&run) && state.step == 4);
    // 3. Log-probabilities and values after the steps.
    let actor = logprobs(Some(state.actor.weights().view()));
    let critic = state.critic.as_ref().unwrap().weights().view();
    let values = ValueModel::new(base, critic).unwrap().values(&batch, &targets.rows).unwrap();
    let apart = (furthest(&actor, &golden.logprobs_after), furthest(&values, &golden.values_after));
    eprintln!("afterwards log-probabilities and values within {apart:?}");
    assert!(apart.0 < 2e-3 && apart.1 < 2e-3, "{apart:?}");
}
