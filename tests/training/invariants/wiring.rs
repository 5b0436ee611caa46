//! How the PPO loop wires its parts together: which random numbers, tokens, weights and temperatures reach which formula.
//! Every test here fails if one argument of one call is another one. It does not test the formulas, which are tested beside
//! their code.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::Result;
use fourfold::config::{AdvantageEstimator, KlEstimator, KlIn, LrScheduler, Ppo, Ptx, Stage};
use fourfold::data::examples::Examples;
use fourfold::data::examples::objectives::SftExample;
use fourfold::model::adapter::Adapter;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::generate::FinishReason;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::ppo::experience::Experience;
use fourfold::ppo::kl::Estimator;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::state::State;
use fourfold::ppo::train::train;
use fourfold::report::Report;
use fourfold::run::Model;
use fourfold::train::session::Session;
use serde_json::{Value, json};

use super::world::*;

pub(super) struct World {
    pub(super) model: Model,
    pub(super) sft: Adapter,
    pub(super) rm: Adapter,
    /// A policy that is not the SFT adapter's.
    pub(super) other: Adapter,
}

pub(super) fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let model = model();
        let sft = sft_adapter(&model, 41, &mut Session::silent());
        let rm = reward_adapter(&model, &sft, 41, &mut Session::silent());
        let other = sft_adapter(&model, 43, &mut Session::silent());
        World { model, sft, rm, other }
    })
}

/// Steps too small to change a weight: every minibatch sees the policy that sampled.
pub(super) fn still() -> Ppo {
    Ppo {
        learning_rate: 1e-30,
        lr_scheduler_type: LrScheduler::Constant,
        advantage_estimator: AdvantageEstimator::Reinforce,
        total_episodes: 16,
        ..ppo_config()
    }
}

/// Calls `test` with a run of these settings over some questions.
pub(super) fn with_run(config: &Ppo, test: impl FnOnce(PpoRun<'_>)) {
    let World { model, sft, rm, .. } = world();
    let roles = Roles { base: &model.base, reward_base: &model.base, sft, reward: Some(rm) };
    let (source, prompts) = (source_of(roles), questions(model, 24));
    test(ppo_run(roles, &prompts, model.checkpoint.tokenizer().eos_ids(), &source, config, 41));
}

pub(super) fn responses(state: &State) -> Vec<Vec<u32>> {
    state.experience.as_ref().unwrap().rollout.responses.iter().map(|r| r.tokens.clone()).collect()
}

/// A state after a rollout whose reference is another policy than the actor.
pub(super) fn rolled_out(run: &PpoRun<'_>) -> State {
    let mut state = State::new(run).unwrap();
    state.reference = Some(world().other.clone());
    state.roll_out(run).unwrap();
    state
}

#[test]
fn every_rollout_and_every_response_has_random_numbers_of_its_own() {
    with_run(&still(), |run| {
        let one = vec![run.prompts.get(0).unwrap().into_owned()];
        let run = PpoRun { prompts: &one, ..run };
        let roll_out = |iteration: usize, seed: u64| {
            let run = PpoRun { seed, ..run };
            let mut state = State::new(&run).unwrap();
            state.iteration = iteration;
            state.roll_out(&run).unwrap();
            responses(&state)
        };
        let first = roll_out(0, 41);
        assert_eq!(roll_out(0, 41), first);
        for other in [roll_out(1, 41), roll_out(2, 41), roll_out(0, 42)] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < first.len() / 2, "{same} of {} responses are those of another rollout", first.len());
        }
        let distinct: std::collections::BTreeSet<_> = first.iter().collect();
        assert!(distinct.len() > first.len() / 2, "one prompt, {} different responses", distinct.len());
    });
}

#[test]
fn each_of_several_stop_tokens_ends_a_response_in_any_order() {
    with_run(&still(), |run| {
        let roll_out = |stop: &[u32]| {
            let run = PpoRun { stop, ..run };
            let mut state = State::new(&run).unwrap();
            state.roll_out(&run).unwrap();
            state.experience.unwrap().rollout.responses
        };
        let end = run.stop[0];
        // The token that most responses have before their end.
        let plain = roll_out(&[end]);
        let holds = |token: u32| plain.iter().filter(|r| r.tokens[..r.tokens.len() - 1].contains(&token)).count();
        let other =
            plain.iter().flat_map(|r| r.tokens.clone()).filter(|&t| t != end).max_by_key(|&t| holds(t)).unwrap();
        for stop in [[end, other], [other, end]] {
            for (response, whole) in roll_out(&stop).iter().zip(&plain) {
                let cut = whole.tokens.iter().position(|token| stop.contains(token));
                let want = &whole.tokens[..cut.map_or(whole.tokens.len(), |at| at + 1)];
                assert_eq!(response.tokens, want, "{stop:?}");
                let finish = if cut.is_some() { FinishReason::Stop } else { FinishReason::Length };
                assert_eq!(response.finish, finish, "{stop:?}");
            }
        }
        assert!(holds(other) >= 2, "a token that ends more than one response earlier");
    });
}

#[test]
fn every_end_token_of_the_model_files_ends_a_response_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in fs::read_dir(here.join("src/quickstart/assets/base")).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let full_stop = ids(&world().model, "It was good.").pop().unwrap();
    let records: Vec<String> = (0..8).map(|i| json!({ "prompt": format!("How is dish {i}?") }).to_string()).collect();
    fs::write(dir.path().join("data.jsonl"), records.join("\n")).unwrap();
    let ended = |eos: Value| {
        let generation = json!({ "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": eos });
        fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
        let text = format!(
            "[base]\npath = '{0}'\n[data]\npath = '{0}/data.jsonl'\n[ppo]\nadapter = '{1}/sft'\nreward_adapter = '{1}/reward'\n\
             batch_size = 8\ntotal_episodes = 8\nresponse_length = 40\n",
            dir.path().display(),
            here.join("adapters/quickstart").display()
        );
        fs::write(dir.path().join("run.toml"), text).unwrap();
        let config = fourfold::config::load(&dir.path().join("run.toml"), &[]).unwrap();
        let out = tempfile::tempdir().unwrap();
        let options = fourfold::run::RunOptions::default();
        fourfold::run::stage(Stage::Ppo, &config, &out.path().join("out"), &options).unwrap();
        let line = &metrics(&out.path().join("out"))[0];
        (line["val/num_eos_tokens"].as_u64().unwrap(), line["response_length"].as_f64().unwrap())
    };
    let (one, two) = (ended(json!([0])), ended(json!([0, full_stop])));
    assert!(two.0 == 8 && two.1 < one.1, "a sentence's end ends the response: {one:?} {two:?}");
}

#[test]
fn the_adaptive_coefficient_reads_the_rollouts_mean_kl_per_response() {
    let config = Ppo { adap_kl_ctrl: true, target: 4.0, horizon: 80.0, ..still() };
    with_run(&config, |run| {
        let mut state = State::new(&run).unwrap();
        state.roll_out(&run).unwrap();
        let mut experience: Experience = state.experience.take().unwrap();
        // 4.5 nats on average, an eighth above the target, over a tenth of the horizon: 1/80 up.
        experience.kl = [4.0, 5.0].repeat(4).into_iter().map(|kl| vec![kl / 2.0; 2]).collect();
        state.experience = Some(experience);
        state.end_iteration(&run, &mut Session::silent().report).unwrap();
        assert!((state.kl_coef / 0.05 - (1.0 + 0.125 * 0.1)).abs() < 1e-12, "{}", state.kl_coef);
    });
}

/// KL(actor || reference) at every response token by its definition in f64.
fn exact_kl(run: &PpoRun<'_>, state: &State, temperature: f64) -> Vec<f32> {
    let rollout = &state.experience.as_ref().unwrap().rollout;
    let rows: Vec<usize> = (0..rollout.prompts.len()).collect();
    let (batch, targets): (Batch, Targets) = rollout.batch(&rows).unwrap();
    let log_softmax = |adapter: &Adapter| -> Vec<Vec<f64>> {
        let hidden = Policy::new(run.base, Some(adapter)).rows(&batch, &targets).unwrap();
        let logits: Vec<Vec<f32>> = run.base.logits(&hidden, Some(adapter)).unwrap().to_vec2().unwrap();
        let row = |row: Vec<f32>| {
            let scaled: Vec<f64> = row.into_iter().map(|x| f64::from(x) / temperature).collect();
            let most = scaled.iter().copied().fold(f64::MIN, f64::max);
            let sum = scaled.iter().map(|x| (x - most).exp()).sum::<f64>().ln() + most;
            scaled.into_iter().map(|x| x - sum).collect()
        };
        logits.into_iter().map(row).collect()
    };
    let (actor, reference) = (log_softmax(run.sft), log_softmax(state.reference.as_ref().unwrap()));
    let kl = |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>() as f32;
    actor.iter().zip(&reference).map(kl).collect()
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64
}

#[test]
fn the_exact_kl_in_the_reward_is_that_of_the_runs_temperature() {
    let config = Ppo { kl_estimator: KlEstimator::Exact, kl_in: KlIn::Reward, temperature: 0.6, ..still() };
    with_run(&config, |run| {
        let state = rolled_out(&run);
        let (at, at_1) = (exact_kl(&run, &state, 0.6), exact_kl(&run, &state, 1.0));
        let experience = state.experience.as_ref().unwrap();
        let got = experience.kl.concat();
        assert!(got.iter().zip(&at).all(|(a, b)| (a - b).abs() < 1e-3), "{got:?} {at:?}");
        assert!((mean(&at) / mean(&at_1) - 1.0).abs() > 0.05, "temperature 1 is told apart");
        // And so is the total reward: the score, clipped, less the coefficient times that KL.
        for (i, reward) in experience.rewards.iter().enumerate() {
            let score = f64::from(experience.rollout.scores[i]).clamp(-5.0, 5.0);
            let kl: f64 = experience.kl[i].iter().map(|&x| f64::from(x)).sum();
            assert!((reward - (score - 0.05 * kl)).abs() < 1e-4, "response {i}");
        }
    });
}

/// The policy loss of the first minibatch with advantages of 0, and the state after it.
fn loss_without_advantages(run: &PpoRun<'_>, kl_coef: f64) -> (f64, State) {
    let mut state = rolled_out(run);
    state.kl_coef = kl_coef;
    state.experience.as_mut().unwrap().advantages.iter_mut().flatten().for_each(|a| *a = 0.0);
    state.minibatch(run, 1.0).unwrap();
    (state.update.policy_loss, state)
}

#[test]
fn the_kl_in_the_loss_has_the_adapted_weight_and_the_runs_temperature() {
    for (kl_estimator, temperature) in [(KlEstimator::Exact, 0.6), (KlEstimator::K3, 0.6), (KlEstimator::K2, 1.0)] {
        let config = Ppo { kl_estimator, kl_in: KlIn::Loss, temperature, num_mini_batches: 1, ..still() };
        with_run(&config, |run| {
            let (loss, state) = loss_without_advantages(&run, 0.3);
            let rollout = &state.experience.as_ref().unwrap().rollout;
            let kl = match kl_estimator {
                KlEstimator::Exact => mean(&exact_kl(&run, &state, temperature)),
                other => {
                    let estimator = if other == KlEstimator::K3 { Estimator::K3 } else { Estimator::K2 };
                    let now: Vec<f32> = rollout.responses.iter().flat_map(|r| r.logprobs.clone()).collect();
                    let both = now.iter().zip(rollout.ref_logprobs.iter().flatten());
                    mean(&both.map(|(&p, &q)| estimator.of(p.into(), q.into()) as f32).collect::<Vec<_>>())
                }
            };
            assert!(kl > 1e-3 && (loss / (0.3 * kl) - 1.0).abs() < 1e-2, "{kl_estimator:?}: {loss} {kl}");
            // The metric's sums are over the first epoch's responses, once each.
            let exact = mean(&exact_kl(&run, &state, temperature)) * rollout.response_tokens() as f64;
            assert!((state.update.exact_kl / exact - 1.0).abs() < 1e-2 && state.update.exact_responses == 8);
        });
    }
}

/// Text blocks that note which of them are read.
struct Noted {
    blocks: Vec<SftExample>,
    read: RefCell<Vec<usize>>,
}

impl Examples<SftExample> for Noted {
    fn len(&self) -> usize {
        self.blocks.len()
    }

    fn get(&self, index: usize) -> Result<Cow<'_, SftExample>> {
        self.read.borrow_mut().push(index);
        Ok(Cow::Borrowed(&self.blocks[index]))
    }

    fn tokens(&self, index: usize) -> usize {
        self.blocks[index].tokens.len()
    }

    fn longest_sequence(&self) -> usize {
        self.blocks.longest_sequence()
    }
}

#[test]
fn every_step_learns_from_the_next_text_blocks() {
    let block = |i: u32| SftExample { tokens: vec![5 + i, 6, 7, 8], loss_mask: vec![false, true, true, true] };
    for separate_step in [false, true] {
        let ptx = Ptx { coef: 1.0, separate_step, ..Ptx::default() };
        // Two iterations of two epochs of two minibatches of four responses: 32 blocks.
        let config = Ppo { ptx: Some(ptx), num_ppo_epochs: 2, ..still() };
        let noted = Noted { blocks: (0..32).map(block).collect(), read: RefCell::default() };
        with_run(&config, |run| {
            train(&PpoRun { ptx: Some(&noted), ..run }, &mut Session::silent()).unwrap();
        });
        let mut read = noted.read.into_inner();
        assert!(!read.is_sorted(), "in an order of their own");
        read.sort_unstable();
        assert_eq!(read, (0..32).collect::<Vec<_>>(), "each block once, separate_step = {separate_step}");
    }
}

/// The responses of every minibatch of a rollout, as one bit each.
fn minibatches(run: &PpoRun<'_>, iteration: usize) -> Vec<u32> {
    let mut state = rolled_out(run);
    state.iteration = iteration;
    let experience = state.experience.as_mut().unwrap();
    // At a ratio of 1 the loss is minus the sum of the advantages over the tokens' number: each response gives its bit.
    for (i, advantages) in experience.advantages.iter_mut().enumerate() {
        let each = (1 << i) as f32 / advantages.len() as f32;
        advantages.fill(each);
    }
    let mut found = vec![];
    while state.has_minibatch(run) {
        let before = state.update.policy_loss;
        state.minibatch(run, 1.0).unwrap();
        let sum = (before - state.update.policy_loss) * state.update.last_policy.tokens() as f64;
        assert!((sum - sum.round()).abs() < 0.05, "{sum}");
        found.push(sum.round() as u32);
        state.next_minibatch(run);
    }
    found
}

#[test]
fn every_epoch_and_iteration_has_minibatches_of_its_own_over_all_responses() {
    let config = Ppo { num_ppo_epochs: 3, num_mini_batches: 4, ..still() };
    with_run(&config, |run| {
        let (first, second) = (minibatches(&run, 0), minibatches(&run, 1));
        assert_eq!((first.len(), minibatches(&run, 0)), (12, first.clone()), "three epochs of four");
        for epoch in first.chunks(4).chain(second.chunks(4)) {
            assert_eq!(epoch.iter().sum::<u32>(), 255, "each response once: {epoch:?}");
            assert!(epoch.iter().all(|rows| rows.count_ones() == 2), "two by two: {epoch:?}");
        }
        let sorted = |epoch: &[u32]| {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            epoch
        };
        let all: std::collections::BTreeSet<_> = first.chunks(4).chain(second.chunks(4)).map(sorted).collect();
        assert!(all.len() >= 5, "six passes, {} ways to cut the responses", all.len());
        assert_ne!(minibatches(&PpoRun { seed: 42, ..run }, 0), first, "another seed");
    });
}

#[test]
fn a_truncated_response_takes_the_critics_value_after_its_last_token() {
    let config = Ppo {
        advantage_estimator: AdvantageEstimator::Gae,
        bootstrap_truncated: true,
        gamma: 0.9,
        whiten_advantages: Some(false),
        response_length: 5,
        ..still()
    };
    with_run(&config, |run| {
        let state = rolled_out(&run);
        let experience = state.experience.as_ref().unwrap();
        let rollout = &experience.rollout;
        let critic = ValueModel::new(run.base, run.reward.unwrap()).unwrap();
        let sequences: Vec<Vec<u32>> = (0..8).map(|i| rollout.sequence(i)).collect();
        let last = critic.scores(&Batch::new(&sequences).unwrap()).unwrap();
        assert!(rollout.last_values.iter().zip(&last).all(|(a, b)| (a - b).abs() < 1e-4), "{last:?}");
        let mut cut = 0;
        for (i, response) in rollout.responses.iter().enumerate() {
            let at = response.tokens.len() - 1;
            let kl = f64::from(experience.kl[i][at]);
            let end = match response.finish {
                FinishReason::Length => 0.9 * f64::from(last[i]),
                FinishReason::Stop => f64::from(rollout.scores[i]).clamp(-5.0, 5.0),
            };
            cut += usize::from(response.finish == FinishReason::Length);
            assert!((f64::from(experience.returns[i][at]) - (end - 0.05 * kl)).abs() < 1e-3, "response {i}");
        }
        assert!(cut >= 2, "{cut} were cut off");
    });
    let run_of = |bootstrap_truncated| {
        let config = Ppo { advantage_estimator: AdvantageEstimator::Gae, bootstrap_truncated, ..ppo_config() };
        let World { model, sft, rm, .. } = world();
        let roles = Roles { base: &model.base, reward_base: &model.base, sft, reward: Some(rm) };
        bits(&run_ppo(roles, model, &config, 41, &mut Session::silent()).actor)
    };
    assert_ne!(run_of(true), run_of(false));
}

#[test]
fn the_logged_reward_is_what_was_trained_on_and_the_raw_one_stands_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = Ppo { score_clip: 0.25, length_penalty: 0.125, num_ppo_epochs: 1, ..ppo_config() };
    for (kl_estimator, kl_in) in [(KlEstimator::K1, KlIn::Reward), (KlEstimator::K3, KlIn::Loss)] {
        let config = Ppo { kl_estimator, kl_in, ..config.clone() };
        with_run(&config, |run| {
            let mut state = rolled_out(&run);
            let experience = state.experience.clone().unwrap();
            let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
            state.end_iteration(&run, &mut session.report).unwrap();
            let of = |key: &str| state.last[key].as_f64().unwrap();
            let rollout = &experience.rollout;
            let n = rollout.scores.len() as f64;
            let scores = rollout.scores.iter().map(|&s| f64::from(s)).sum::<f64>() / n;
            let kl = experience.mean_kl().unwrap();
            let shaped = |i: usize| {
                f64::from(rollout.scores[i]).clamp(-0.25, 0.25) - 0.125 * rollout.responses[i].tokens.len() as f64
            };
            let clipped = (0..rollout.scores.len()).map(shaped).sum::<f64>() / n;
            let in_reward = if kl_in == KlIn::Reward { 0.05 * kl } else { 0.0 };
            assert!(kl.abs() > 1e-2 && (of("objective/rlhf_reward") - (clipped - in_reward)).abs() < 1e-5);
            assert!((of("objective/non_score_reward") + in_reward).abs() < 1e-9);
            assert!((of("objective/rlhf_reward_raw") - (scores - 0.05 * kl)).abs() < 1e-9);
            assert_eq!(state.last.contains_key("objective/kl_clamped"), kl_estimator == KlEstimator::K3);
        });
    }
}
