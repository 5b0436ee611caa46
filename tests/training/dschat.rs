//! `compat = "dschat"` reproduces DeepSpeed-Chat on padded rows: rollouts, updates, comparisons and SFT over a real
//! model equal a float64 golden (printed by tests/golden/dschat_run.py), and the program runs all stages.
//!
//! The formulas alone are tested in src/ppo/dschat.rs and src/reward/loss.rs, records and splits in
//! tests/data/pipeline.rs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fourfold::config::{Compat, LrScheduler, Ppo, Ptx, Reward, RewardLoss, Sft};
use fourfold::data::examples::objectives::{RankedExample, SftExample};
use fourfold::model::adapter::{Adapter, ScoreHead};
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::generate::{FinishReason, Response};
use fourfold::model::readers::Sharing;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::ppo::experience::{Experience, Scale};
use fourfold::ppo::rollout::{Readers, Rollout, read};
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::state::State;
use fourfold::report::Report;
use fourfold::reward::dschat::Padding;
use fourfold::reward::source::{RewardModel, Unpadded};
use fourfold::reward::train::train_on_rows;
use fourfold::run::Model;
use fourfold::sft;
use fourfold::train::adamw::AdamWConfig;
use fourfold::train::learner::Learner;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use fourfold::train::world::World;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Golden {
    sharper: f64,
    kl_coef: f64,
    actor_lr: f64,
    critic_lr: f64,
    ptx_coef: f64,
    ema_decay: f64,
    rollouts: Vec<Recorded>,
    rewards: Vec<Comparisons>,
    sft: Rows,
}

#[derive(Deserialize)]
struct Recorded {
    pad: u32,
    prompts: Vec<Vec<u32>>,
    answers: Vec<Vec<u32>>,
    texts: Vec<Vec<u32>>,
    kept: Vec<usize>,
    logprobs: Vec<Vec<f32>>,
    reference: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    scores: Vec<f32>,
    rewards: Vec<Vec<f32>>,
    advantages: Vec<f32>,
    returns: Vec<f32>,
    course: Vec<Step>,
    logprobs_after: Vec<f32>,
    ema_after: Vec<f32>,
    values_after: Vec<f32>,
}

#[derive(Deserialize)]
struct Step {
    actor_norm: f64,
    critic_norm: f64,
    actor_loss: f64,
    critic_loss: f64,
    ptx_loss: f64,
    clipped: f64,
}

#[derive(Deserialize)]
struct Comparisons {
    pad: u32,
    leading: usize,
    length: usize,
    pairs: Vec<[Vec<u32>; 2]>,
    loss: f64,
    grad_norm: f64,
    accuracy: f64,
}

#[derive(Deserialize)]
struct Rows {
    rows: Vec<Vec<u32>>,
    loss: f64,
}

const END: u32 = 0;

fn golden() -> Golden {
    serde_json::from_str(include_str!("../golden/dschat_run.json")).unwrap()
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn world() -> (Model, Adapter, Adapter) {
    let model = Model::open(&here("src/quickstart/assets/base")).unwrap();
    let [lm, rm] = ["lm", "rm"].map(|name| model.adapter(&here("tests/golden/peft_logits").join(name)).unwrap());
    (model, lm, rm)
}

/// Asserts equality up to the rounding of f32 sums in another order, for numbers of at most 10.
fn near(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() < 2e-4, "{what}: {got:?} {want:?}");
    }
}

fn sharper(adapter: &Adapter, by: f64) -> Adapter {
    let head = adapter.head().unwrap();
    let weight = (&head.weight * by).unwrap();
    adapter.clone().with_score_head(Some(ScoreHead { weight, bias: 0.0 })).unwrap()
}

/// Values of the tokens of all kept responses, computed on unpadded sequences by `compute`.
fn of_rows(recorded: &Recorded, rollout: &Rollout, compute: impl Fn(&Batch, &Targets) -> Vec<f32>) -> Vec<f32> {
    let of = |(i, &row): (usize, &usize)| {
        let trained = rollout.responses[i].tokens.len();
        let sequence = [&rollout.prompts[i][..], &recorded.answers[row][..trained]].concat();
        let batch = Batch::new(&[sequence]).unwrap();
        let targets = Targets::responses(&batch, &[trained]).unwrap();
        compute(&batch, &targets)
    };
    recorded.kept.iter().enumerate().flat_map(of).collect()
}

#[test]
fn rollouts_updates_ptx_and_ema_equal_the_float64_golden_of_padded_rows() {
    let (golden, (model, lm, rm)) = (golden(), world());
    let base = &model.base;
    let judge = sharper(&rm, golden.sharper);
    for recorded in &golden.rollouts {
        let n = recorded.prompts.len();
        let config = Ppo {
            compat: Some(Compat::Dschat),
            learning_rate: golden.actor_lr,
            critic_learning_rate: Some(golden.critic_lr),
            lr_scheduler_type: LrScheduler::Constant,
            adam_beta2: 0.95,
            total_episodes: n,
            batch_size: n,
            micro_batch_size: 2,
            num_ppo_epochs: 2,
            kl_coef: golden.kl_coef,
            whiten_advantages: Some(false),
            temperature: 0.0,
            ema_decay: Some(golden.ema_decay),
            ptx: Some(Ptx { coef: golden.ptx_coef, separate_step: true, ..Ptx::default() }),
            ..Ppo::default()
        };
        let block = |text: &Vec<u32>| SftExample {
            tokens: text.clone(),
            loss_mask: (0..text.len()).map(|position| position > 0).collect(),
        };
        let texts: Vec<SftExample> = recorded.texts.iter().map(block).collect();
        let source = Unpadded { model: RewardModel(ValueModel::new(base, &judge).unwrap()), pad: recorded.pad };
        let run = PpoRun {
            world: World::alone(),
            base,
            reward_base: base,
            sft: &lm,
            reward: Some(&rm),
            prompts: &recorded.prompts,
            stop: &[END, recorded.pad],
            source: &source,
            decode: &|_| String::new(),
            evaluation: None,
            ptx: Some(&texts),
            pad: Some(recorded.pad),
            sampler: None,
            config: &config,
            seed: 0,
            recompute: Recompute::Off,
            sharing: Sharing::default(),
        };
        // 1. Log-probabilities, values and scores of the recorded tokens; the reference is the base without an adapter.
        let response = |tokens: &Vec<u32>| Response {
            tokens: tokens.clone(),
            logprobs: vec![f32::NAN; tokens.len()],
            finish: if tokens.last() == Some(&END) { FinishReason::Stop } else { FinishReason::Length },
        };
        let responses = recorded.answers.iter().map(response).collect();
        let critic = Learner::new(rm.to_trainable(), AdamWConfig::default(), 0.0).unwrap();
        let readers = Readers {
            world: World::alone(),
            reference: Some(Policy::new(base, None)),
            recomputes: false,
            critic: Some((base, &critic)),
            exact_kl: false,
            last_values: false,
            source: &source,
            entries: &[],
            decode: &|_| String::new(),
            pad: Some(recorded.pad),
            sharing: Sharing::default(),
        };
        let actor = Policy::new(base, Some(&lm));
        let rollout = read(actor, readers, recorded.prompts.clone(), responses, 1.0).unwrap();
        near(&rollout.scores, &recorded.scores, "scores");
        assert_eq!(rollout.scores.len(), recorded.kept.len());
        for i in 0..recorded.kept.len() {
            near(&rollout.responses[i].logprobs, &recorded.logprobs[i], "log-probabilities");
            near(&rollout.ref_logprobs[i], &recorded.reference[i], "the reference's");
            near(&rollout.values[i], &recorded.values[i], "values");
        }
        // 2. Rewards, advantages, returns.
        let scale = Scale { kl_coef: golden.kl_coef, shift: 0.0, deviation: 1.0 };
        let as_rewards =
            Experience::of(rollout.clone(), scale, &Ppo { gamma: 0.0, lam: 0.0, ..config.clone() }).unwrap();
        let trained: Vec<f32> = recorded
            .rewards
            .iter()
            .zip(&as_rewards.returns)
            .flat_map(|(rewards, trained)| rewards[..trained.len()].to_vec())
            .collect();
        near(&as_rewards.returns.concat(), &trained, "rewards of the trained tokens");
        let experience = Experience::of(rollout, scale, &config).unwrap();
        near(&experience.advantages.concat(), &recorded.advantages, "advantages");
        near(&experience.returns.concat(), &recorded.returns, "returns");
        let rollout = experience.rollout.clone();
        // 3. Two updates.
        run.check().unwrap();
        let mut state = State::new(&run).unwrap();
        state.experience = Some(experience);
        for (i, want) in recorded.course.iter().enumerate() {
            let before = state.update.clone();
            state.minibatch(&run, 1.0).unwrap();
            state.next_minibatch(&run);
            let now = &state.update;
            let got = [
                ("actor loss", now.policy_loss - before.policy_loss, want.actor_loss),
                ("actor norm", now.actor_norm - before.actor_norm, want.actor_norm),
                ("critic loss", now.value_loss - before.value_loss, want.critic_loss),
                ("critic norm", now.critic_norm - before.critic_norm, want.critic_norm),
                ("ptx loss", now.ptx_loss - before.ptx_loss, want.ptx_loss),
            ];
            for (what, got, want) in got {
                eprintln!("pad {}: step {i}: {what} {got:.7} {want:.7}", recorded.pad);
                // f32 against f64; the second step magnifies the rounding of the first.
                assert!((got - want).abs() < 1e-3 * want.abs().max(0.05), "step {i}: {what} {got} {want}");
            }
            assert!(i == 0 || want.clipped > 0.1, "the golden reaches the clip");
        }
        assert!(!state.has_minibatch(&run) && state.step == 2);
        // 4. The networks after the updates.
        let policy = |adapter: &Adapter| {
            of_rows(recorded, &rollout, |batch, targets| {
                Policy::new(base, Some(adapter)).logprobs(batch, targets, 1.0).unwrap().logprobs
            })
        };
        let critic = state.critic.as_ref().unwrap().weights().view();
        assert_eq!(critic.head().unwrap().bias, 0.0, "DeepSpeed-Chat's head has no bias");
        let values = of_rows(recorded, &rollout, |batch, targets| {
            ValueModel::new(base, critic).unwrap().values(batch, &targets.rows).unwrap()
        });
        let close = |got: &[f32], want: &[f32], what: &str| {
            let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            eprintln!("afterwards {what} within {apart:.1e}");
            assert!(got.len() == want.len() && apart < 2e-3, "{what}: {apart}");
        };
        close(&policy(state.actor.weights().view()), &recorded.logprobs_after, "log-probabilities");
        close(&policy(state.ema.as_ref().unwrap()), &recorded.ema_after, "log-probabilities under the EMA");
        close(&values, &recorded.values_after, "values");
    }
    let clipped = golden.rollouts.iter().flat_map(|r| &r.scores).filter(|score| score.abs() > 5.0).count();
    assert!(clipped > 1, "the golden reaches the clip of scores");
}

#[test]
fn loss_gradient_and_accuracy_of_padded_comparisons_equal_the_float64_golden() {
    let (golden, (model, _, rm)) = (golden(), world());
    for case in &golden.rewards {
        let example = |[chosen, rejected]: &[Vec<u32>; 2]| {
            let shared = chosen.iter().zip(rejected).take_while(|(a, b)| a == b).count();
            let shared = shared.min(chosen.len() - 1).min(rejected.len() - 1);
            let responses = vec![chosen[shared..].to_vec(), rejected[shared..].to_vec()];
            RankedExample { prompt: chosen[..shared].to_vec(), responses, label: Default::default() }
        };
        let examples: Vec<RankedExample> = case.pairs.iter().map(example).collect();
        let padding = Padding { pad: case.pad, num_padding_at_beginning: case.leading, max_length: case.length };
        let found = Padding::of(case.pad, case.length, &examples).unwrap();
        assert_eq!(found.num_padding_at_beginning, usize::from(case.pad == END), "counted in the rows themselves");
        let config = Reward {
            compat: Some(Compat::Dschat),
            loss: RewardLoss::DivergenceToEnd,
            center: false,
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 2,
            learning_rate: 1e-9,
            ..Reward::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
        let setup = Setup { base: &model.base, start: &rm, recompute: Recompute::Off, seed: 0 };
        let (_, summary) = train_on_rows(setup, &examples, &examples, &config, Some(padding), &mut session).unwrap();
        let line: Value = serde_json::from_str(&fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap()).unwrap();
        for (key, want) in [("loss", case.loss), ("grad_norm", case.grad_norm), ("accuracy", case.accuracy)] {
            let got = line[key].as_f64().unwrap();
            assert!((got - want).abs() < 1e-4 * want.max(0.1), "{key}: {got} {want}");
        }
        assert!((summary.before.accuracy - case.accuracy).abs() < 1e-9, "held-out pairs are read at the same places");
    }
}

#[test]
fn sft_loss_is_on_every_token_of_every_row() {
    let (golden, (model, lm, _)) = (golden(), world());
    let example = |row: &Vec<u32>| SftExample {
        tokens: row.clone(),
        loss_mask: (0..row.len()).map(|position| position > 0).collect(),
    };
    let examples: Vec<SftExample> = golden.sft.rows.iter().map(example).collect();
    let dir = tempfile::tempdir().unwrap();
    let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
    let setup = Setup { base: &model.base, start: &lm, recompute: Recompute::Off, seed: 0 };
    sft::train(setup, &examples, &[], &Sft::default(), &mut session).unwrap();
    let line: Value = serde_json::from_str(&fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap()).unwrap();
    assert!((line["loss"].as_f64().unwrap() - golden.sft.loss).abs() < 1e-4, "{line} {}", golden.sft.loss);
}

/// Runs one command of the program in `dir` and returns its JSON output.
fn fourfold(dir: &Path, arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_fourfold")).current_dir(dir).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn lines(path: PathBuf) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Writes records and one config for three stages.
fn write_world(dir: &Path) {
    let record = |i: usize| {
        json!({
            "prompt": format!("\n\nHuman: How was the soup at place {i}?\n\nAssistant:"),
            "chosen": " The soup was lovely and warm.",
            "rejected": format!(" The soup number {i} was awful."),
        })
    };
    let records: Vec<String> = (0..60).map(|i| record(i).to_string()).collect();
    fs::write(dir.join("data.jsonl"), records.join("\n")).unwrap();
    fs::write(dir.join("text.txt"), "The soup at the Blue Door was lovely and warm. ".repeat(60)).unwrap();
    let config = format!(
        "compat = \"dschat\"\n[base]\npath = {:?}\n[lora]\nr = 2\n[data]\npath = \"data.jsonl\"\nmax_length = 64\n\
         max_prompt_length = 40\neval_rows = 4\n[sft]\nper_device_train_batch_size = 4\n\
         [reward]\nper_device_train_batch_size = 4\n\
         [ppo]\nadapter = \"sft/adapter\"\nreward_adapter = \"reward/adapter\"\nbatch_size = 8\ntotal_episodes = 16\n\
         response_length = 12\nwarmup_steps = 0\neval_prompts = 2\nsave_samples = 8\n[ppo.ptx]\npath = \"text.txt\"\n",
        here("src/quickstart/assets/base").display().to_string()
    );
    fs::write(dir.join("run.toml"), config).unwrap();
}

#[test]
fn the_program_runs_dschats_three_stages_from_one_key() {
    let dir = tempfile::tempdir().unwrap();
    write_world(dir.path());
    for stage in ["sft", "reward", "ppo"] {
        fourfold(dir.path(), &[stage, "run.toml", "--json", "--out", stage]);
    }
    let resolved = |stage: &str| -> toml::Table {
        fs::read_to_string(dir.path().join(stage).join("config.toml")).unwrap().parse().unwrap()
    };
    let config = resolved("ppo");
    for (section, key, value) in [
        ("ppo", "kl_coef", toml::Value::from(0.1)),
        ("ppo", "temperature", 0.0.into()),
        ("ppo", "whiten_advantages", false.into()),
        ("ppo", "warmup_steps", 0.into()),
        ("reward", "loss", "divergence_to_end".into()),
        ("sft", "completion_only_loss", false.into()),
        ("lora", "compat", "dschat".into()),
        ("data", "compat", "dschat".into()),
    ] {
        assert_eq!(config[section][key], value, "{section}.{key}");
    }
    let adapter = fs::read_to_string(dir.path().join("sft/adapter/adapter_config.json")).unwrap();
    let adapter: Value = serde_json::from_str(&adapter).unwrap();
    assert_eq!((adapter["lora_alpha"].as_f64(), adapter["r"].as_u64()), (Some(1.0), Some(2)), "a scale of 1/r");
    // The base has its own pad token: kept responses are in samples.jsonl, dropped ones are counted in metrics.jsonl.
    let metrics = lines(dir.path().join("ppo/metrics.jsonl"));
    let samples = lines(dir.path().join("ppo/samples.jsonl"));
    assert_eq!(metrics.len(), 2);
    for line in &metrics {
        let iteration = line["step"].as_u64().unwrap();
        let kept = samples.iter().filter(|s| s["iteration"].as_u64() == Some(iteration)).count() as u64;
        assert_eq!(kept + line["val/dropped"].as_u64().unwrap(), 8, "{line}");
        assert!(line["loss/ptx_avg"].as_f64().unwrap() > 0.0 && line["loss/value_avg"].is_number());
    }
    // Greedy sampling: a prompt has one response per actor, independent of the seed. The first rollout's actor is the
    // SFT adapter.
    let other =
        ["ppo", "run.toml", "--json", "--out", "other", "--set", "seed=1", "--set", "data.data_split=\"0,0,1\""];
    let same = ["ppo", "run.toml", "--json", "--out", "same", "--set", "data.data_split=\"0,0,1\""];
    let responses = |arguments: &[&str], out: &str| {
        fourfold(dir.path(), arguments);
        let samples = lines(dir.path().join(out).join("samples.jsonl"));
        let first = samples.into_iter().filter(|s| s["iteration"] == 1);
        first.map(|s| (s["prompt"].to_string(), s["response"].to_string())).collect::<Vec<_>>()
    };
    let (one, two) = (responses(&other, "other"), responses(&same, "same"));
    assert_ne!(one, two, "other prompts, or in another order");
    let shared = one.iter().filter(|(prompt, _)| two.iter().any(|(p, _)| p == prompt)).count();
    let equal = one.iter().filter(|response| two.contains(response)).count();
    assert!(shared == equal, "{one:?} {two:?}");
    // A pad token equal to the end token changes the rows, the kept responses and the training.
    let pad = ["ppo", "run.toml", "--json", "--out", "opt", "--set", "data.pad_token=\"<|endoftext|>\""];
    fourfold(dir.path(), &pad);
    let bytes = |out: &str| fs::read(dir.path().join(out).join("actor/adapter_model.safetensors")).unwrap();
    assert_ne!(bytes("opt"), bytes("ppo"));
    let reward = ["reward", "run.toml", "--json", "--out", "opt_reward", "--set", "data.pad_token=\"<|endoftext|>\""];
    let (own, opt) = (lines(dir.path().join("reward/metrics.jsonl")), {
        fourfold(dir.path(), &reward);
        lines(dir.path().join("opt_reward/metrics.jsonl"))
    });
    assert_ne!(own[0]["loss"], opt[0]["loss"], "the pads of the window are other tokens");
    let leading = ["reward", "run.toml", "--json", "--out", "leading", "--set", "reward.num_padding_at_beginning=1"];
    fourfold(dir.path(), &leading);
    assert_ne!(own[0]["loss"], lines(dir.path().join("leading/metrics.jsonl"))[0]["loss"], "an end one pad later");
}

#[test]
fn a_rollout_with_all_responses_dropped_is_refused_if_first_and_else_repeats_the_last() {
    let (model, lm, rm) = world();
    let base = &model.base;
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| vec![5, 6, 7 + i]).collect();
    // Every token ends a response: each response has one token.
    let every: Vec<u32> = (0..base.config().vocab_size as u32).collect();
    let source = RewardModel(ValueModel::new(base, &rm).unwrap());
    let config = Ppo {
        compat: Some(Compat::Dschat),
        total_episodes: 8,
        batch_size: 4,
        response_length: 6,
        whiten_advantages: Some(false),
        temperature: 0.0,
        ..Ppo::default()
    };
    let run = |stop| PpoRun {
        world: World::alone(),
        base,
        reward_base: base,
        sft: &lm,
        reward: Some(&rm),
        prompts: &prompts,
        stop,
        source: &source,
        decode: &|_| String::new(),
        evaluation: None,
        ptx: None,
        pad: Some(END),
        sampler: None,
        config: &config,
        seed: 0,
        recompute: Recompute::Off,
        sharing: Sharing::default(),
    };
    let all_end = run(&every);
    all_end.check().unwrap();
    let error = State::new(&all_end).unwrap().roll_out(&all_end).unwrap_err();
    assert!(error.to_string().contains("all of the first rollout's"), "{error}");
    assert_eq!(fourfold::error::exit_code(&error), 2);
    let run = run(&[END]);
    run.check().unwrap();
    let mut state = State::new(&run).unwrap();
    state.roll_out(&run).unwrap();
    let first = state.experience.clone().unwrap();
    state.end_iteration(&run, &mut Report::silent()).unwrap();
    // The same holds after resuming from a checkpoint.
    let snapshot = state.snapshot(&run).unwrap();
    let mut resumed = State::new(&all_end).unwrap();
    resumed.load(&snapshot, &all_end).unwrap();
    for state in [&mut state, &mut resumed] {
        state.roll_out(&all_end).unwrap();
        assert_eq!(state.experience.as_ref().unwrap(), &first);
        assert!(state.has_minibatch(&all_end));
        state.minibatch(&all_end, 1.0).unwrap();
    }
}
