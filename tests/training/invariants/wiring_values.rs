//! How the PPO loop wires its numbers together, continued from wiring.rs: prompts, rates, scales, groups, the critic, metrics and
//! evaluations. It does not test the formulas, which are tested beside their code.

use std::collections::BTreeSet;

use fourfold::config::{AdvantageEstimator, Compat, CriticStart, LrScheduler, PolicyLoss, Ppo};
use fourfold::data::examples::objectives::PromptExample;
use fourfold::model::generate::FinishReason;
use fourfold::ppo::evaluate::{Evaluation, EvaluationInputs};
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::state::State;
use fourfold::train::session::Session;
use serde_json::{Value, json};

use super::wiring::*;
use super::world::*;

#[test]
fn rollouts_go_through_all_prompts_before_any_comes_again() {
    with_run(&Ppo { total_episodes: 24, ..still() }, |run| {
        let mut asked = vec![];
        for iteration in 0..3 {
            let mut state = State::new(&run).unwrap();
            state.iteration = iteration;
            state.roll_out(&run).unwrap();
            asked.extend(state.experience.unwrap().rollout.prompts);
        }
        let mut all: Vec<Vec<u32>> = (0..24).map(|i| run.prompts.get(i).unwrap().into_owned()).collect();
        asked.sort();
        all.sort();
        assert_eq!(asked, all);
    });
}

#[test]
fn a_rollout_in_parts_is_the_rollout_as_a_whole_and_narrow_sampling_is_greedy() {
    let roll_out = |config: Ppo| {
        let mut found = vec![];
        with_run(&config, |run| {
            let mut state = State::new(&run).unwrap();
            state.roll_out(&run).unwrap();
            found = responses(&state);
        });
        found
    };
    let whole = roll_out(still());
    assert_eq!(roll_out(Ppo { local_rollout_forward_batch_size: Some(3), ..still() }), whole);
    let greedy = roll_out(Ppo { temperature: 0.0, ..still() });
    assert_ne!(greedy, whole);
    assert_eq!(roll_out(Ppo { top_k: 1, ..still() }), greedy);
    assert_eq!(roll_out(Ppo { top_p: 1e-9, ..still() }), greedy);
}

#[test]
fn the_kl_in_the_reward_has_the_adapted_weight_and_scores_the_running_scale() {
    let config = Ppo { use_score_scaling: true, use_score_norm: true, score_clip: 1.5, ..still() };
    with_run(&config, |run| {
        let mut state = State::new(&run).unwrap();
        state.reference = Some(world().other.clone());
        let mut all: Vec<f64> = vec![];
        for iteration in 0..2 {
            (state.iteration, state.kl_coef) = (iteration, 0.3);
            state.roll_out(&run).unwrap();
            let experience = state.experience.as_ref().unwrap();
            all.extend(experience.rollout.scores.iter().map(|&s| f64::from(s)));
            let n = all.len() as f64;
            let mean = all.iter().sum::<f64>() / n;
            let deviation = (all.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
            for (i, reward) in experience.rewards.iter().enumerate() {
                let score = ((f64::from(experience.rollout.scores[i]) - mean) / deviation).clamp(-1.5, 1.5);
                let kl: f64 = experience.kl[i].iter().map(|&kl| f64::from(kl)).sum();
                assert!((reward - (score - 0.3 * kl)).abs() < 1e-4, "response {i} of rollout {iteration}");
            }
        }
    });
}

#[test]
fn every_step_has_its_place_in_the_schedule_its_learners_rate_and_the_guards_factor() {
    let config = Ppo {
        learning_rate: 1e-3,
        critic_learning_rate: Some(4e-3),
        advantage_estimator: AdvantageEstimator::Gae,
        lr_scheduler_type: LrScheduler::Linear,
        num_ppo_epochs: 2,
        ..still()
    };
    with_run(&config, |run| {
        let mut state = State::new(&run).unwrap();
        let mut session = Session::silent();
        for at in 0..8 {
            if at % 4 == 0 {
                state.roll_out(&run).unwrap();
            }
            state.minibatch(&run, 0.5).unwrap();
            state.next_minibatch(&run);
            // Two iterations of two epochs of two minibatches.
            let share = 0.5 * (8 - at) as f64 / 8.0;
            assert!((state.update.actor_lr - 1e-3 * share).abs() < 1e-12, "step {at}: {}", state.update.actor_lr);
            assert!((state.update.critic_lr - 4e-3 * share).abs() < 1e-12, "step {at}: {}", state.update.critic_lr);
            assert_eq!(state.step, at + 1);
            if at % 4 == 3 {
                assert_eq!(state.update.exact_responses, 8, "the exact KL of the first epoch only");
                state.end_iteration(&run, &mut session.report).unwrap();
                let of = |key: &str| state.last[key].as_f64().unwrap();
                assert!((of("lr") - 1e-3 * share).abs() < 1e-12 && (of("critic_lr") - 4e-3 * share).abs() < 1e-12);
                assert_eq!(of("episode"), 8.0 * state.iteration as f64);
            }
        }
    });
}

#[test]
fn in_the_warm_up_no_step_of_the_actor_is_counted_and_the_critics_loss_is_its_own() {
    let config = Ppo { advantage_estimator: AdvantageEstimator::Gae, critic_warmup: 1, ..still() };
    with_run(&config, |run| {
        let mut state = State::new(&run).unwrap();
        state.roll_out(&run).unwrap();
        while state.has_minibatch(&run) {
            state.minibatch(&run, 1.0).unwrap();
            state.next_minibatch(&run);
        }
        assert_eq!((state.step, state.turns, state.update.critic_minibatches), (0, 2, 2));
        let sum = state.update.value_loss;
        state.end_iteration(&run, &mut Session::silent().report).unwrap();
        assert!((state.last["loss/value_avg"].as_f64().unwrap() - sum / 2.0).abs() < 1e-12);
    });
}

#[test]
fn one_optimizer_steps_at_the_actors_rate() {
    let config = Ppo {
        learning_rate: 1e-3,
        critic_learning_rate: Some(1e-30),
        advantage_estimator: AdvantageEstimator::Gae,
        shared_optimizer: true,
        ..still()
    };
    with_run(&config, |run| {
        let mut state = State::new(&run).unwrap();
        state.roll_out(&run).unwrap();
        state.minibatch(&run, 1.0).unwrap();
        assert_ne!(bits(state.actor.weights().view()), bits(run.sft));
        assert_ne!(bits(state.critic.as_ref().unwrap().weights().view()), bits(run.reward.unwrap()));
    });
}

#[test]
fn target_kl_ends_the_epochs_above_one_and_a_half_times_itself() {
    let config = Ppo { learning_rate: 2e-3, num_ppo_epochs: 3, ..still() };
    let after_two = |target_kl: Option<f64>| {
        let mut found = (0.0, true);
        with_run(&Ppo { target_kl, ..config.clone() }, |run| {
            let mut state = State::new(&run).unwrap();
            state.roll_out(&run).unwrap();
            for _ in 0..2 {
                state.minibatch(&run, 1.0).unwrap();
                state.next_minibatch(&run);
            }
            found = (state.update.last_policy.approx_kl(), state.has_minibatch(&run));
        });
        found
    };
    let (kl, goes_on) = after_two(None);
    assert!(kl > 0.0 && goes_on);
    assert!(after_two(Some(kl / 1.4)).1 && !after_two(Some(kl / 1.6)).1);
}

#[test]
fn the_penalty_in_the_loss_has_its_adapted_weight_and_its_kl_the_runs_temperature() {
    let config =
        Ppo { policy_loss: PolicyLoss::KlPenalty, temperature: 0.6, num_mini_batches: 1, num_ppo_epochs: 2, ..still() };
    with_run(&config, |run| {
        let mut state = State::new(&run).unwrap();
        state.roll_out(&run).unwrap();
        let experience = state.experience.as_mut().unwrap();
        experience.advantages.iter_mut().flatten().for_each(|a| *a = 0.0);
        // Every token is as if the sampling policy had found it less likely by 0.25 nats.
        experience.rollout.responses.iter_mut().flat_map(|r| &mut r.logprobs).for_each(|logprob| *logprob -= 0.25);
        state.kl_penalty = 8.0;
        state.minibatch(&run, 1.0).unwrap();
        state.next_minibatch(&run);
        let kl = 0.25f64.exp() - 1.25;
        assert!((state.update.policy_loss / (8.0 * kl) - 1.0).abs() < 1e-3, "{} {kl}", state.update.policy_loss);
        state.end_iteration(&run, &mut Session::silent().report).unwrap();
        let logged = state.last["policy/kl_to_old"].as_f64().unwrap();
        assert!((logged / kl - 1.0).abs() < 1e-3, "{logged} {kl}");
        assert_eq!(state.last["policy/kl_penalty_coef"], 8.0);
    });
}

#[test]
fn a_group_is_all_responses_to_one_prompt_and_the_discount_reaches_the_returns() {
    let config = Ppo { advantage_estimator: AdvantageEstimator::Rloo, num_generations: 4, ..still() };
    with_run(&config, |run| {
        let state = rolled_out(&run);
        let experience = state.experience.as_ref().unwrap();
        assert_eq!(experience.rollout.prompts[..4], vec![experience.rollout.prompts[0].clone(); 4]);
        for (group, rewards) in experience.advantages.chunks(4).zip(experience.rewards.chunks(4)) {
            for (advantages, reward) in group.iter().zip(rewards) {
                let want = reward - (rewards.iter().sum::<f64>() - reward) / 3.0;
                assert!(advantages.iter().all(|&a| (f64::from(a) - want).abs() < 1e-5), "{group:?} {rewards:?}");
            }
        }
    });
    let config = Ppo { gamma: 0.5, kl_coef: 0.0, whiten_advantages: Some(false), ..still() };
    with_run(&config, |run| {
        let state = rolled_out(&run);
        let experience = state.experience.as_ref().unwrap();
        for (advantages, reward) in experience.advantages.iter().zip(&experience.rewards) {
            let first = reward * 0.5f64.powi(advantages.len() as i32 - 1);
            assert!((f64::from(advantages[0]) - first).abs() < 1e-6, "{advantages:?}");
        }
    });
}

#[test]
fn a_critic_that_starts_as_the_actor_is_over_the_policys_base() {
    let World { sft, .. } = world();
    let other = model_of(3);
    let rm = reward_adapter(&other, &other.fresh_adapter(&lora(), 8).unwrap(), 8, &mut Session::silent());
    let config = Ppo { advantage_estimator: AdvantageEstimator::Gae, critic: CriticStart::Actor, ..still() };
    with_run(&config, |run| {
        let roles = Roles { base: run.base, reward_base: &other.base, sft, reward: Some(&rm) };
        let source = source_of(roles);
        let run = PpoRun { reward_base: &other.base, reward: Some(&rm), source: &source, ..run };
        let mut state = State::new(&run).unwrap();
        state.roll_out(&run).unwrap();
        state.minibatch(&run, 1.0).unwrap();
        assert_eq!(state.critic.unwrap().weights().view().layers().len(), 4);
    });
}

#[test]
fn metrics_are_means_over_all_minibatches_and_one_advantage_of_0_is_no_warning() {
    let config = Ppo { learning_rate: 2e-3, cliprange: 1e-3, num_ppo_epochs: 2, ..still() };
    with_run(&config, |run| {
        let mut state = rolled_out(&run);
        state.experience.as_mut().unwrap().advantages[0][0] = 0.0;
        let (mut clipped, mut tokens, mut exact) = (0.0, 0.0, 0.0);
        while state.has_minibatch(&run) {
            state.minibatch(&run, 1.0).unwrap();
            let last = state.update.last_policy;
            clipped += last.clipfrac() * last.tokens() as f64;
            tokens += last.tokens() as f64;
            state.next_minibatch(&run);
            exact = state.update.exact_kl;
        }
        let sampled = state.experience.as_ref().unwrap().rollout.responses.clone();
        state.end_iteration(&run, &mut Session::silent().report).unwrap();
        let of = |key: &str| state.last[key].as_f64().unwrap();
        assert!(clipped > 0.0 && (of("policy/clipfrac_avg") - clipped / tokens).abs() < 1e-9);
        assert!((of("objective/kl_exact") - exact / 8.0).abs() < 1e-9);
        let entropy = -sampled.iter().flat_map(|r| &r.logprobs).map(|&l| f64::from(l)).sum::<f64>() / 8.0;
        assert!(entropy > 0.0 && (of("objective/entropy") - entropy).abs() < 1e-6);
        let stopped = sampled.iter().filter(|r| r.finish == FinishReason::Stop).count();
        assert_eq!(of("val/num_eos_tokens"), stopped as f64);
        let warned = state.last.get("warnings").map(Value::to_string).unwrap_or_default();
        assert!(!warned.contains("flat_advantages"), "{warned}");
    });
}

#[test]
fn an_evaluation_has_a_seed_per_prompt_the_same_in_every_call_and_compares_with_the_sft_model() {
    let World { model, sft, rm, other } = world();
    let roles = Roles { base: &model.base, reward_base: &model.base, sft, reward: Some(rm) };
    let source = source_of(roles);
    let question = questions(model, 24)[0].clone();
    let prompt = |entry| PromptExample { tokens: question.clone(), text: String::new(), answer: None, entry };
    let prompts: Vec<PromptExample> = (0..8).map(prompt).collect();
    let config = Ppo { temperature: 0.6, local_rollout_forward_batch_size: Some(3), ..still() };
    let inputs = EvaluationInputs {
        world: fourfold::train::world::World::alone(),
        base: &model.base,
        sft,
        source: &source,
        gold: None,
        prompts: &prompts,
        stop: model.checkpoint.tokenizer().eos_ids(),
        decode: &|_| String::new(),
    };
    let mut session = Session::silent();
    let evaluation = Evaluation::new(inputs, &config, 41);
    let before = evaluation.before(&mut session.report).unwrap();
    let evaluation = evaluation.with_baseline(before.clone());
    let distinct: BTreeSet<_> = before.responses.iter().map(|r| &r.tokens).collect();
    assert!(distinct.len() > 2, "one prompt, {} different responses", distinct.len());
    // The SFT model against itself: the same random numbers, no KL at its own temperature, no win.
    let again = evaluation.run(&"again".into(), sft, &mut session.report).unwrap();
    assert_eq!(again, before);
    assert!(again.kl.iter().all(|kl| kl.abs() < 1e-3), "{:?}", again.kl);
    assert_eq!(evaluation.metrics(&again)["eval/win_rate"], 0.5);
    let found = evaluation.run(&"other".into(), other, &mut session.report).unwrap();
    assert!(found.kl.iter().any(|kl| kl.abs() > 0.05), "{:?}", found.kl);
    let wins = found
        .scores
        .iter()
        .zip(&before.scores)
        .map(|(a, b)| f64::from(u8::from(a > b)) + f64::from(u8::from(a == b)) / 2.0);
    let rate = wins.sum::<f64>() / 8.0;
    assert!((evaluation.metrics(&found)["eval/win_rate"].as_f64().unwrap() - rate).abs() < 1e-9);
}

#[test]
fn evaluations_come_after_every_eval_every_iterations() {
    let keys = "reward_adapter = REWARD\neval_prompts = 2\neval_every = 2\n";
    let record = |i: usize| json!({ "prompt": format!("How is dish {i}?") });
    let (_, metrics, _) = crate::reward_sources::run_on(keys, record).unwrap();
    let evaluated: Vec<bool> = metrics.iter().map(|line| line.get("eval/score").is_some()).collect();
    assert_eq!(evaluated, [false, true]);
}

#[test]
fn log_probabilities_are_at_the_sampling_temperature_and_at_1_for_greedy_responses_and_deepspeed_chat() {
    for (temperature, compat, want) in [(0.6, false, 0.6), (0.0, false, 1.0), (0.6, true, 1.0)] {
        let compat = compat.then_some(Compat::Dschat);
        let config = Ppo { temperature, compat, advantage_estimator: AdvantageEstimator::Gae, ..still() };
        with_run(&config, |run| {
            let pad = compat.map(|_| run.stop[0]);
            let run = PpoRun { pad, ..run };
            assert_eq!(run.temperature(), want);
            let mut state = State::new(&run).unwrap();
            state.roll_out(&run).unwrap();
            let rollout = &state.experience.as_ref().unwrap().rollout;
            // The reference is the policy that sampled.
            let both = rollout.responses.iter().flat_map(|r| &r.logprobs).zip(rollout.ref_logprobs.iter().flatten());
            assert!(both.clone().count() > 8 && both.into_iter().all(|(p, q)| (p - q).abs() < 1e-3));
            state.minibatch(&run, 1.0).unwrap();
            assert!((state.update.first_ratio.unwrap() - 1.0).abs() < 1e-3, "{:?}", state.update.first_ratio);
        });
    }
}
