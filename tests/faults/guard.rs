//! Rewards that are NaN or infinite, in PPO's own loop.

use std::cell::Cell;

use anyhow::Result;
use fourfold::config::{Guard as Limits, KlEstimator, Lora, Ppo, TargetModules};
use fourfold::model::adapter::Adapter;
use fourfold::model::block::Recompute;
use fourfold::model_files::ModelFiles;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::train::{Trained, train};
use fourfold::quickstart::base::BASE;
use fourfold::report::Report;
use fourfold::reward::source::{RewardInputs, RewardSource};
use fourfold::run::Model;
use fourfold::train::guard::Guard;
use fourfold::train::session::Session;
use fourfold::train::world::World;

/// Scores of which some rollouts' are poison.
struct Poisoned<F: Fn(usize) -> bool> {
    rollout: Cell<usize>,
    is_poison: F,
    poison: f32,
}

impl<F: Fn(usize) -> bool> RewardSource for Poisoned<F> {
    fn scores(&self, answers: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let rollout = self.rollout.replace(self.rollout.get() + 1);
        let scores = (0..answers.responses.len()).map(|i| i as f32);
        Ok(scores.map(|s| if (self.is_poison)(rollout) && s == 1.0 { self.poison } else { s }).collect())
    }
}

fn run(limits: Limits, poison: f32, is_poison: impl Fn(usize) -> bool, metrics: &std::path::Path) -> Result<Trained> {
    let checkpoint = ModelFiles::from_embedded(
        BASE.config,
        BASE.generation_config,
        BASE.tokenizer,
        BASE.tokenizer_config,
        BASE.weights,
    )?;
    let model = Model::of(checkpoint)?;
    let lora = Lora { r: 2, target_modules: TargetModules::List(vec!["q_proj".into()]), ..Lora::default() };
    let sft = model.fresh_adapter(&lora, 1)?;
    let reward = model.fresh_adapter(&lora, 2)?.with_head(2)?;
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| vec![5 + i, 6, 7]).collect();
    let config = Ppo {
        total_episodes: 40,
        batch_size: 4,
        num_mini_batches: 2,
        response_length: 4,
        learning_rate: 1e-3,
        kl_estimator: KlEstimator::K3, // never negative
        ..Ppo::default()
    };
    let source = Poisoned { rollout: Cell::new(0), is_poison, poison };
    let run = PpoRun {
        world: World::alone(),
        base: &model.base,
        reward_base: &model.base,
        sft: &sft,
        reward: Some(&reward),
        prompts: &prompts,
        stop: &[0],
        source: &source,
        decode: &|_| String::new(),
        evaluation: None,
        ptx: None,
        pad: None,
        sampler: None,
        config: &config,
        seed: 1,
        recompute: Recompute::Off,
        sharing: fourfold::model::readers::Sharing::default(),
    };
    let mut session = Session::new(Report::to_dir(metrics)?).guarded(Guard::new(limits));
    train(&run, &mut session)
}

fn is_finite(adapter: &Adapter) -> bool {
    let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    adapter.named_tensors().iter().all(|(_, t)| values(t).iter().all(|x| x.is_finite()))
}

#[test]
fn poisoned_rewards_are_skipped_and_counted_and_training_continues() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let dir = tempfile::tempdir().unwrap();
        let trained = run(Limits::default(), poison, |rollout| rollout == 2 || rollout == 3, dir.path()).unwrap();
        assert!(is_finite(&trained.actor) && is_finite(trained.critic.as_ref().unwrap()));
        let metrics = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 10, "a line an iteration, skipped or not");
        let skipped: Vec<_> = lines.iter().filter(|l| l["guard"] == "skipped").collect();
        assert_eq!(skipped.len(), 2);
        assert_eq!((skipped[1]["skipped"].as_u64(), skipped[1]["lr_factor"].as_f64()), (Some(2), Some(0.25)));
        assert!(skipped[0]["reason"].as_str().unwrap().contains("score"), "{}", skipped[0]);
    }
}

#[test]
fn rewards_that_stay_poisoned_roll_back_and_then_end_the_run_with_a_diagnosis() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { max_skips: 1, max_rollbacks: 2, ..Limits::default() };
    let error = run(limits, f32::NAN, |rollout| rollout >= 2, dir.path()).unwrap_err().to_string();
    let metrics = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches("\"rolled_back\"").count(), 2, "{metrics}");
    assert!(error.contains("does not recover") && error.contains("the score of a response is NaN"), "{error}");
}

#[test]
fn a_kl_beyond_its_limit_counts_as_a_bad_step() {
    let dir = tempfile::tempdir().unwrap();
    // After its first step the actor is never as near to the reference as this.
    let limits = Limits { max_kl: Some(1e-9), max_skips: 1, max_rollbacks: 1, ..Limits::default() };
    let error = run(limits, f32::NAN, |_| false, dir.path()).unwrap_err().to_string();
    assert!(error.contains("max_kl"), "{error}");
}

#[test]
fn responses_longer_than_their_limit_count_as_bad_steps() {
    let dir = tempfile::tempdir().unwrap();
    // Every answer is longer than half of the first ones' length.
    let limits = Limits { max_length_ratio: Some(0.5), max_skips: 1, max_rollbacks: 1, ..Limits::default() };
    let error = run(limits, f32::NAN, |_| false, dir.path()).unwrap_err().to_string();
    assert!(error.contains("max_length_ratio") && error.contains("4 steps were skipped"), "{error}");
}

/// On the real binary: from the second step on numbers too large for f32, or finite ones whose squares are, which a norm
/// would make zeros of.
#[test]
fn a_run_whose_weights_blow_up_goes_back_tries_smaller_steps_and_ends_with_a_diagnosis_and_its_state() {
    for alpha in ["1e30", "1e24"] {
        let place = crate::world::place();
        let more = format!("--set lora.lora_alpha={alpha} --set sft.learning_rate=0.9 --set sft.num_train_epochs=20");
        let ran = place.run(&format!("{} {more}", crate::world::line("sft")));
        assert_eq!(ran.code, 1, "{alpha}: {}", ran.stderr);
        let said =
            ["does not recover", "after 3 rollbacks to good weights", "the last reason", "[guard] has the limits"];
        for said in said {
            assert!(ran.stderr.contains(said), "{alpha}, {said}: {}", ran.stderr);
        }
        let metrics = std::fs::read_to_string(place.path("out/sft/metrics.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let count = |what: &str| lines.iter().filter(|line| line["guard"] == what).count();
        assert!(count("rolled_back") == 3 && count("skipped") >= 9, "{alpha}: {metrics}");
        let smallest = lines.iter().filter_map(|line| line["lr_factor"].as_f64()).fold(1.0, f64::min);
        assert_eq!(smallest, 0.5f64.powi(6), "{alpha}: three rollbacks and three skips in a row");
    }
}

/// No step follows the last one, whose own loss is that of the weights before it. All supervised stages have this one loop.
#[test]
fn a_run_whose_last_step_spoils_the_weights_saves_the_last_good_ones_and_says_so() {
    let place = crate::world::place();
    // One step of every record. Alpha makes it one too far; with B = 0 nothing shows before it.
    let more = "--set sft.num_train_epochs=1 --set sft.per_device_train_batch_size=10 --json \
                --set sft.gradient_accumulation_steps=1 --set sft.learning_rate=0.9 --set lora.lora_alpha=1e30";
    let ran = place.run(&format!("{} {more}", crate::world::line("sft")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains("step 1, the last, spoiled the weights"), "{}", ran.stderr);
    let metrics = std::fs::read_to_string(place.path("out/sft/metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches("\"rolled_back\"").count(), 1, "{metrics}");
    let told: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&told["steps"], &told["perplexity_after"]), (&1.into(), &told["perplexity_before"]), "{told}");
}
