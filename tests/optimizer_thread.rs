//! The actor's optimizer step of PPO on a device: a thread computes it while the critic's passes run, in memory of its own, and
//! it is made after them. The machine is the dry one, whose passes take no memory of the host, under an allocator that counts.
//! tests/gpu/actor_step.rs compares the numbers.
#![cfg(unix)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fourfold::config::Ppo;
use fourfold::device::Device;
use fourfold::host::meter::{self, Counting, Phase};
use fourfold::model::adapter::{Adapter, LoraConfig, TargetModules};
use fourfold::model::block::Recompute;
use fourfold::model::readers::Sharing;
use fourfold::model::roles::ValueModel;
use fourfold::model_files::ModelFiles;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::state::State;
use fourfold::ppo::update::{Step, Update};
use fourfold::quickstart::base::BASE;
use fourfold::reward::source::RewardModel;
use fourfold::train::learner::Learner;
use fourfold::train::snapshot::Snapshot;
use fourfold::train::stop;
use fourfold::train::world::World;

#[global_allocator]
static ALLOCATOR: Counting<fourfold::host::allocator::Allocator> = Counting(fourfold::host::allocator::Allocator);

fn bits(learners: [&Learner; 2]) -> (Vec<u8>, Vec<u8>) {
    let mut all = Snapshot::default();
    all.put_learner("actor", learners[0]).unwrap();
    all.put_learner("critic", learners[1]).unwrap();
    all.to_bytes().unwrap()
}

/// One test, since the meter, the flag of signals and the dry machine's count of allocations are of the whole process.
#[test]
fn the_actors_step_is_computed_while_the_critics_passes_run_and_is_made_after_them() {
    let device = Device::dry();
    let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
    let files = ModelFiles::from_embedded(BASE.config, parts.0, parts.1, parts.2, parts.3).unwrap();
    let base = files.base().unwrap().on(Some(device.clone()), |_, _| {}).unwrap();
    let adapter = |r: usize| {
        let config = LoraConfig { r, target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
        Adapter::init(config, base.shapes(), 1).unwrap()
    };
    // What the actor takes is seen beside what else a minibatch does.
    let (sft, reward) = (adapter(64), adapter(1).with_head(2).unwrap());
    let config = Ppo {
        total_episodes: 4,
        batch_size: 4,
        micro_batch_size: 2,
        response_length: 4,
        // Gradients are zero on this machine, and a step is seen by the decay alone.
        weight_decay: 0.1,
        learning_rate: 1e-2,
        reward_adapter: "unused".into(),
        ..Ppo::default()
    };
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| vec![5 + i, 6, 7]).collect();
    let source = RewardModel(ValueModel::new(&base, &reward).unwrap());
    let run = PpoRun {
        base: &base,
        reward_base: &base,
        sft: &sft,
        reward: Some(&reward),
        prompts: &prompts,
        stop: &[],
        source: &source,
        decode: &|_| String::new(),
        evaluation: None,
        ptx: None,
        pad: None,
        sampler: None,
        config: &config,
        seed: 1,
        recompute: Recompute::Off,
        sharing: Sharing::default(),
        world: World::alone(),
    };
    let shared = Ppo { shared_optimizer: true, ..config.clone() };
    let after = PpoRun { config: &shared, ..run };
    let mut state = State::new(&run).unwrap();
    state.roll_out(&run).unwrap();
    let (experience, mut actor, mut critic) = (state.experience.unwrap(), state.actor, state.critic.unwrap());
    fn of_run<'s>(run: &'s PpoRun<'s>, experience: &'s fourfold::ppo::experience::Experience) -> Step<'s> {
        Step {
            run,
            experience,
            rows: &[0, 1, 2, 3],
            reference: Some(run.sft),
            actor_lr: 1e-2,
            critic_lr: 1e-2,
            kl_coef: 0.05,
            kl_penalty: 0.0,
            first_epoch: true,
            actor_steps: 0,
        }
    }
    let (step, after) = (of_run(&run, &experience), of_run(&after, &experience));
    let bytes: usize = actor.weights().parameters().unwrap().iter().map(|t| t.elem_count() * size_of::<f32>()).sum();

    // 1. Where one optimizer steps after both passes, the host's peak is lower by the new weights and the two new moments.
    let mut peak = |step: &Step<'_>| {
        let before = meter::current();
        meter::restart();
        let stepped = Update::default().minibatch(Some(&mut actor), Some(&mut critic), step).unwrap();
        assert_eq!(stepped, Some(true));
        meter::peaks()[Phase::Update as usize].1 - before
    };
    peak(&step);
    let (in_turn, meanwhile) = (peak(&after), peak(&step));
    let more = meanwhile as f64 - in_turn as f64;
    eprintln!("the update's peak: {in_turn} bytes in turn, {meanwhile} meanwhile, an actor of {bytes}");
    assert!((more / (3 * bytes) as f64 - 1.0).abs() < 0.1, "{in_turn} in turn, {meanwhile} meanwhile, {bytes}");

    // 2. The critic's first pass waits where it allocates for the first time, until the step is there.
    let count = || device.usage().allocations;
    let before = count();
    Update::default().minibatch(Some(&mut actor), None, &step).unwrap();
    let of_actor = count() - before;
    let most = Arc::new(AtomicUsize::new(0));
    let (heap, allocated, found) = (meter::current(), count(), most.clone());
    device.watch(move |usage| {
        if usage.allocations == allocated + of_actor + 1 {
            let begun = Instant::now();
            let held = || meter::current() - heap;
            while held() < 3 * bytes && begun.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(1));
            }
            found.store(held(), Relaxed);
        }
    });
    let before = bits([&actor, &critic]);
    Update::default().minibatch(Some(&mut actor), Some(&mut critic), &step).unwrap();
    assert!(most.load(Relaxed) >= 3 * bytes, "{} bytes during the critic's pass", most.load(Relaxed));
    assert!(bits([&actor, &critic]) != before);

    // 3. A process that is asked to stop there leaves both learners as they are.
    stop::listen().unwrap();
    let allocated = count();
    device.watch(move |usage| {
        if usage.allocations == allocated + of_actor + 1 {
            // SAFETY: the handlers of this signal are those of `listen`.
            assert_eq!(unsafe { libc::raise(libc::SIGTERM) }, 0);
        }
    });
    let before = bits([&actor, &critic]);
    let stepped = Update::default().minibatch(Some(&mut actor), Some(&mut critic), &step).unwrap();
    assert_eq!(stepped, None);
    assert!(bits([&actor, &critic]) == before, "neither learner has changed");
}
