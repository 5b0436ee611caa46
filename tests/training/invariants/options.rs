//! Every key of `[ppo]` that acts through the network has its effect, each in a run of two or three iterations. Keys that act
//! on numbers alone are tested beside their formulas. It does not test whether training improves the policy:
//! algorithms.rs does.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use fourfold::config::{AdvantageEstimator, CriticStart, KlEstimator, KlIn, LrScheduler, PolicyLoss, Ppo};
use fourfold::model::adapter::Adapter;
use fourfold::ppo::state::State;
use fourfold::ppo::train::Trained;
use fourfold::report::Report;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::snapshot::Snapshot;
use serde_json::Value;

use super::world::*;

struct World {
    model: Model,
    sft: Adapter,
    rm: Adapter,
}

/// One model with its adapters for all tests here, which do not change them.
fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let model = model();
        let sft = sft_adapter(&model, 31, &mut Session::silent());
        let rm = reward_adapter(&model, &sft, 31, &mut Session::silent());
        World { model, sft, rm }
    })
}

/// The models and adapters of [`world`].
fn roles() -> Roles<'static> {
    let World { model, sft, rm } = world();
    Roles { base: &model.base, reward_base: &model.base, sft, reward: Some(rm) }
}

/// Two iterations of two minibatches, at a constant learning rate.
fn base() -> Ppo {
    Ppo { total_episodes: 16, lr_scheduler_type: LrScheduler::Constant, ..ppo_config() }
}

fn run(config: &Ppo) -> (Trained, Vec<Value>) {
    let world = world();
    let roles = roles();
    let dir = tempfile::tempdir().unwrap();
    let trained = run_ppo(roles, &world.model, config, 31, &mut Session::new(Report::to_dir(dir.path()).unwrap()));
    (trained, metrics(dir.path()))
}

fn actor_of(config: &Ppo) -> BTreeMap<String, Vec<u32>> {
    bits(&run(config).0.actor)
}

#[test]
fn estimators_without_a_critic_train_none_and_log_no_value_metrics() {
    for (advantage_estimator, has_critic) in [
        (AdvantageEstimator::A2c, true),
        (AdvantageEstimator::Reinforce, false),
        (AdvantageEstimator::ReinforcePlusPlus, false),
        (AdvantageEstimator::Rloo, false),
        (AdvantageEstimator::Grpo, false),
    ] {
        let (trained, lines) = run(&Ppo { advantage_estimator, num_generations: 4, ..base() });
        assert_eq!(trained.critic.is_some(), has_critic, "{advantage_estimator:?}");
        for key in ["loss/value_avg", "val/explained_variance", "grad_norm/critic", "critic_lr"] {
            assert_eq!(lines[0].get(key).is_some(), has_critic, "{advantage_estimator:?} {key}");
        }
        assert_ne!(bits(&trained.actor), bits(&world().sft), "{advantage_estimator:?}");
        let (best, mean) = (column(&lines, "objective/best_of_n"), column(&lines, "objective/scores"));
        assert!(best.iter().zip(&mean).all(|(best, mean)| best > mean), "the best of four: {best:?} {mean:?}");
    }
}

fn arrays(of: &Snapshot) -> Vec<u8> {
    let mut bytes = vec![];
    of.write_arrays(&mut bytes).unwrap();
    bytes
}

#[test]
fn without_a_critic_a_run_needs_no_reward_adapter_and_allocates_nothing_for_one() {
    let world = world();
    let source = source_of(roles());
    let prompts = questions(&world.model, 8);
    let state_bytes = |advantage_estimator, reward| {
        let config = Ppo { advantage_estimator, num_generations: 4, ..base() };
        let run = ppo_run(Roles { reward, ..roles() }, &prompts, &[0], &source, &config, 1);
        let mut state = State::new(&run).unwrap();
        let learners: Vec<&str> = state.learners().into_iter().map(|(name, _)| name).collect();
        state.roll_out(&run).unwrap();
        assert_eq!(state.experience.as_ref().unwrap().rollout.values.is_empty(), learners == ["actor"]);
        (learners, arrays(&state.snapshot(&run).unwrap()).len())
    };
    let (learners, with) = state_bytes(AdvantageEstimator::Gae, Some(&world.rm));
    assert_eq!(learners, ["actor", "critic"]);
    let numbers: usize = bits(&world.rm).values().map(Vec::len).sum();
    for estimator in [
        AdvantageEstimator::Reinforce,
        AdvantageEstimator::ReinforcePlusPlus,
        AdvantageEstimator::Rloo,
        AdvantageEstimator::Grpo,
    ] {
        let (learners, without) = state_bytes(estimator, None);
        assert_eq!(learners, ["actor"], "{estimator:?}");
        // Weights and both moments of the critic, four bytes each, plus their names in the file.
        assert!(with - without >= 3 * 4 * numbers, "{estimator:?}: {with} {without}");
    }
}

#[test]
fn the_critic_is_initialised_from_the_reward_model_the_actor_or_afresh() {
    let mut critics = vec![];
    for critic in [CriticStart::Reward, CriticStart::Actor, CriticStart::Own] {
        let config = Ppo { critic, critic_learning_rate: Some(1e-30), ..base() };
        let (trained, _) = run(&config);
        critics.push(bits(&trained.critic.unwrap()));
        assert_ne!(bits(&trained.actor), bits(&world().sft), "{critic:?}");
    }
    // At a learning rate of nearly 0 the critic keeps its initial weights.
    let head = "base_model.model.score.weight";
    assert_eq!(critics[0][head], bits(&world().rm)[head]);
    for (name, values) in &bits(&world().sft) {
        assert_eq!(&critics[1][name], values, "{name}");
    }
    assert_eq!(critics[1][head], critics[2][head], "one seed, one head");
    let is_fresh = |name: &String| name.contains("lora_B");
    let zero = |values: &Vec<u32>| values.iter().all(|&v| f32::from_bits(v).abs() < 1e-20);
    assert!(critics[2].iter().filter(|(name, _)| is_fresh(name)).all(|(_, values)| zero(values)), "B = 0 is fresh");
}

#[test]
fn in_the_warm_up_only_the_critic_learns() {
    let (trained, lines) = run(&Ppo { critic_warmup: 2, ..base() });
    assert_eq!(bits(&trained.actor), bits(&world().sft));
    assert_ne!(bits(&trained.critic.unwrap()), bits(&world().rm));
    assert!(column(&lines, "grad_norm/critic").iter().all(|&norm| norm > 0.0));
    assert!(lines.iter().all(|line| line["policy/entropy_avg"].is_null() && line["grad_norm/actor"].is_null()));
    assert_ne!(bits(&run(&Ppo { critic_warmup: 1, ..base() }).0.actor), bits(&world().sft));
}

#[test]
fn the_exact_kl_is_always_logged_and_never_negative_and_can_be_in_the_reward_or_the_loss() {
    let (_, plain) = run(&base());
    let exact = column(&plain, "objective/kl_exact");
    assert!(exact.iter().all(|&kl| kl >= 0.0) && exact[1] > exact[0], "{exact:?}");
    let (in_reward, lines) = run(&Ppo { kl_estimator: KlEstimator::Exact, ..base() });
    let kl = column(&lines, "objective/kl");
    // The first actor equals the reference; sampling with and without a KV cache differs by rounding.
    assert!(kl[0].abs() < 1e-6 && kl[1] > 1e-3, "{kl:?}");
    let mut actors = vec![bits(&run(&base()).0.actor), bits(&in_reward.actor)];
    for kl_estimator in [KlEstimator::K2, KlEstimator::K3, KlEstimator::Exact] {
        let config = Ppo { kl_estimator, kl_in: KlIn::Loss, kl_coef: 1.0, ..base() };
        let strong = run(&Ppo { kl_coef: 20.0, total_episodes: 40, ..config.clone() });
        let none = run(&Ppo { kl_coef: 0.0, total_episodes: 40, ..config.clone() });
        let last = |lines: &[Value]| column(lines, "objective/kl_exact")[4];
        assert!(last(&strong.1) < 0.8 * last(&none.1), "{kl_estimator:?} holds the actor: {:?} {:?}", strong.1, none.1);
        actors.push(bits(&run(&config).0.actor));
    }
    for i in 0..actors.len() {
        assert!(actors[..i].iter().all(|earlier| earlier != &actors[i]), "{i} is like another");
    }
}

#[test]
fn the_kl_coefficient_is_adapted_between_iterations() {
    let adapted = |target: f64| {
        let config = Ppo { adap_kl_ctrl: true, target, horizon: 80.0, total_episodes: 24, ..base() };
        column(&run(&config).1, "objective/kl_coef")
    };
    let (up, down) = (adapted(1e-6), adapted(1e6));
    assert!(up[0] == 0.05 && down[0] == 0.05, "it starts as kl_coef: {up:?} {down:?}");
    assert!(up[2] > up[1] && down[1] < 0.05 && down[2] < down[1], "{up:?} {down:?}");
    // A tenth of the horizon: 2 % an iteration at most.
    assert!((down[2] / 0.05 - 0.98 * 0.98).abs() < 1e-9, "{down:?}");
}

#[test]
fn the_kl_penalty_loss_adapts_its_own_coefficient() {
    let weights = |kl_penalty_target: f64| {
        let config = Ppo { policy_loss: PolicyLoss::KlPenalty, kl_penalty_coef: 2.0, kl_penalty_target, ..base() };
        column(&run(&config).1, "policy/kl_penalty_coef")
    };
    assert_eq!(weights(1e-9), [2.0, 4.0]);
    assert_eq!(weights(1e3), [2.0, 1.0]);
    let form = |kl_penalty_coef: f64| Ppo { policy_loss: PolicyLoss::KlPenalty, kl_penalty_coef, ..base() };
    assert_ne!(actor_of(&form(1.0)), actor_of(&base()));
    assert_ne!(actor_of(&form(1.0)), actor_of(&form(9.0)));
}

#[test]
fn clips_and_limits_of_the_policy_loss_act_when_the_ratio_is_not_one() {
    let far = Ppo { num_ppo_epochs: 3, ..base() };
    let plain = actor_of(&far);
    for (what, config) in [
        ("cliprange_high", Ppo { cliprange_high: Some(0.01), ..far.clone() }),
        ("dual_clip", Ppo { dual_clip: Some(1.01), ..far.clone() }),
        ("log_ratio_clamp", Ppo { log_ratio_clamp: Some(0.01), ..far.clone() }),
        ("policy_loss", Ppo { policy_loss: PolicyLoss::Gradient, ..far.clone() }),
        ("cliprange", Ppo { cliprange: 0.05, ..far.clone() }),
        ("entropy_coef", Ppo { entropy_coef: 0.1, ..far.clone() }),
    ] {
        assert!(actor_of(&config) != plain, "{what} does nothing");
    }
    let idle = Ppo {
        cliprange_high: Some(0.2),
        dual_clip: Some(1e9),
        log_ratio_clamp: Some(1e9),
        ratio_threshold: Some(1e9),
        target_kl: Some(1e9),
        ..far.clone()
    };
    assert!(actor_of(&idle) == plain, "limits that nothing reaches change nothing");
    let (trained, lines) = run(&Ppo { ratio_threshold: Some(1.0 + 1e-9), ..far });
    let skipped: f64 = column(&lines, "policy/skipped").iter().sum();
    assert!(skipped > 0.0 && bits(&trained.actor) != bits(&world().sft), "some minibatches, not all: {skipped}");
}

#[test]
fn target_kl_ends_the_epochs_over_a_rollout() {
    // In each rollout the KL of the first minibatch is 0 and that of the second is not: one epoch.
    let stopped = Ppo { num_ppo_epochs: 4, target_kl: Some(1e-9), ..base() };
    assert!(actor_of(&stopped) == actor_of(&base()));
}

#[test]
fn an_entropy_bonus_raises_the_entropy() {
    let entropy = |entropy_coef: f64| {
        let (_, lines) = run(&Ppo { entropy_coef, learning_rate: 3e-3, total_episodes: 80, ..base() });
        column(&lines, "policy/entropy_avg")[9]
    };
    assert!(entropy(1.0) > 1.1 * entropy(0.0));
}

#[test]
fn one_optimizer_clips_the_norm_of_both_and_weighs_the_value_loss() {
    let shared = |vf_coef: f64, max_grad_norm: f64| {
        let config = Ppo { shared_optimizer: true, vf_coef, max_grad_norm, ..base() };
        let (trained, lines) = run(&config);
        assert_eq!(column(&lines, "lr"), column(&lines, "critic_lr"));
        bits(&trained.actor)
    };
    // Without clipping, the steps equal those of two optimizers. With it, the critic's gradient matters.
    let open = Ppo { max_grad_norm: 0.0, ..base() };
    assert_eq!(shared(1.0, 0.0), bits(&run(&open).0.actor));
    assert_ne!(shared(100.0, 1e-3), shared(1.0, 1e-3));
}

#[test]
fn the_ema_follows_the_actor_and_so_can_the_reference() {
    let average = |decay: f64| {
        let trained = run(&Ppo { ema_decay: Some(decay), ..base() }).0;
        (bits(&trained.ema.unwrap()), bits(&trained.actor))
    };
    let (ema, actor) = average(0.0);
    assert_eq!(ema, actor);
    let (ema, _) = average(1.0);
    assert_eq!(ema, bits(&world().sft));
    let (ema, actor) = average(0.5);
    assert!(ema != actor && ema != bits(&world().sft));
    assert!(run(&base()).0.ema.is_none());

    let kl = |ref_model_sync_iterations: usize, ref_model_mixup_alpha: f64| {
        let config = Ppo { ref_model_sync_iterations, ref_model_mixup_alpha, ..base() };
        column(&run(&config).1, "objective/kl")[1].abs()
    };
    let (never, copied, mixed) = (kl(0, 1.0), kl(1, 1.0), kl(1, 0.5));
    assert!(copied < 1e-4 && never > 1e-3, "the reference is the actor again: {copied}, without {never}");
    assert!(mixed > copied, "{mixed}");
}

#[test]
fn if_the_critics_gradient_is_infinite_neither_learner_steps() {
    let world = world();
    let roles = roles();
    let (source, prompts) = (source_of(roles), questions(&world.model, 24));
    for shared_optimizer in [false, true] {
        // The value loss is finite, its gradient beyond f32.
        let config = Ppo { vf_coef: 1e300, shared_optimizer, ..base() };
        let stop = world.model.checkpoint.tokenizer().eos_ids();
        let run = ppo_run(roles, &prompts, stop, &source, &config, 1);
        let mut state = State::new(&run).unwrap();
        state.roll_out(&run).unwrap();
        let before = arrays(&state.snapshot(&run).unwrap());
        let error = state.minibatch(&run, 1.0).unwrap_err();
        assert!(error.to_string().contains("gradient"), "{error:#}");
        assert!(arrays(&state.snapshot(&run).unwrap()) == before, "the state changed");
        assert_eq!(state.actor.optimizer_state().step, 0);
    }
}

#[test]
fn scaled_and_whitened_scores_reach_the_updates() {
    use fourfold::config::WhitenRewards;
    let mut actors = vec![];
    for config in [
        base(),
        Ppo { use_score_scaling: true, ..base() },
        Ppo { use_score_scaling: true, use_score_norm: true, ..base() },
        Ppo { whiten_rewards: WhitenRewards::KeepMean, ..base() },
        Ppo { whiten_rewards: WhitenRewards::RemoveMean, ..base() },
        Ppo { whiten_advantages: Some(false), ..base() },
        Ppo { kl_estimator: KlEstimator::K2, ..base() },
        Ppo { score_clip: 0.1, ..base() },
        Ppo { missing_eos_penalty: Some(1.0), ..base() },
        Ppo { length_penalty: 0.2, ..base() },
        Ppo { overlong_buffer_len: 6, overlong_penalty_factor: 2.0, ..base() },
        Ppo { min_response_length: 10, short_response_penalty: 3.0, ..base() },
        Ppo { gamma: 0.9, ..base() },
        Ppo { lam: 0.5, ..base() },
    ] {
        let actor = bits(&run(&config).0.actor);
        assert!(!actors.contains(&actor), "{config:?} is like another");
        actors.push(actor);
    }
}
