//! Rollouts sampled ahead, by a sampler in this process whose thread meets the update on its way: what is asked of it, from which
//! weights, and what the metrics say. It does not test the client of a server: `rollouts_ahead.rs` does.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::fs;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use fourfold::config::{Engine, ImportanceSamplingCorrection, Ppo, Ptx, RolloutEngine};
use fourfold::data::examples::Examples;
use fourfold::data::examples::objectives::SftExample;
use fourfold::model::adapter::Adapter;
use fourfold::model::generate::generate;
use fourfold::model::roles::Policy;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::sampler::{Asked, Sampler, Started};
use fourfold::ppo::train::train;
use fourfold::report::Report;
use fourfold::run::Model;
use fourfold::train::session::Session;
use serde_json::Value;

use super::world::*;

/// Longer than any update takes here: what is waited for comes, or the test fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where a thread that samples and an update wait for each other.
#[derive(Default)]
struct Meeting {
    /// That the thread runs, and the way to tell it that an update does.
    next: RefCell<Option<(Receiver<()>, Sender<()>)>>,
    met: Cell<usize>,
}

/// Samples with this program's own generation.
struct Own<'w> {
    model: &'w Model,
    /// Version, its weights and what was asked, in the order of the iterations.
    asked: RefCell<Vec<(usize, Adapter, Asked)>>,
    meeting: &'w Meeting,
}

impl Sampler for Own<'_> {
    fn start(&self, adapter: &Adapter, version: usize, asked: Asked, shown: bool) -> Result<Started> {
        let policy = Policy::new(&self.model.base, Some(adapter));
        let responses = generate(policy, &asked.prompts, &asked.seeds, &asked.sampling, |_, _| {})?;
        self.asked.borrow_mut().push((version, adapter.clone(), asked));
        if shown {
            // The run waits for it, and no update does.
            return Started::new(|_| Ok(responses));
        }
        let ((runs, thread), (updates, update)) = (channel(), channel());
        assert!(self.meeting.next.replace(Some((thread, updates))).is_none(), "one rollout at a time");
        Started::new(move |_| {
            runs.send(())?;
            update.recv_timeout(PATIENCE).context("no update ran meanwhile")?;
            Ok(responses)
        })
    }

    fn max_mismatch(&self) -> f64 {
        0.01
    }

    fn to_check(&self) -> &'static str {
        "the test"
    }
}

/// Text blocks, which an update reads: it then waits for the thread that samples meanwhile.
struct Text<'w>(Vec<SftExample>, &'w Meeting);

impl Examples<SftExample> for Text<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, index: usize) -> Result<Cow<'_, SftExample>> {
        if let Some((thread, update)) = self.1.next.take() {
            thread.recv_timeout(PATIENCE).context("no thread samples during the update")?;
            update.send(())?;
            self.1.met.set(self.1.met.get() + 1);
        }
        Ok(Cow::Borrowed(&self.0[index]))
    }

    fn tokens(&self, index: usize) -> usize {
        self.0[index].tokens.len()
    }

    fn longest_sequence(&self) -> usize {
        self.0.longest_sequence()
    }
}

/// What was asked, the metrics, and how often an update met a thread.
type Found = (Vec<(usize, Adapter, Asked)>, Vec<Value>, usize);

fn run(dir: &Path, async_rollouts: usize, iterations: usize) -> Found {
    let model = model();
    let sft = sft_adapter(&model, 3, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 3, &mut Session::silent());
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let (prompts, source, meeting) = (questions(&model, 24), source_of(roles), Meeting::default());
    let config = Ppo {
        ptx: Some(Ptx::default()),
        rollout: Some(RolloutEngine { engine: Engine::Vllm, async_rollouts, ..RolloutEngine::default() }),
        importance_sampling_correction: ImportanceSamplingCorrection::TokenTruncate,
        total_episodes: 8 * iterations,
        ..ppo_config()
    };
    let sampler = Own { model: &model, asked: RefCell::default(), meeting: &meeting };
    let text = Text(sft_examples(&model, 24), &meeting);
    let run = ppo_run(roles, &prompts, model.checkpoint.tokenizer().eos_ids(), &source, &config, 3);
    let mut session = Session::new(Report::to_dir(dir).unwrap());
    train(&PpoRun { ptx: Some(&text), sampler: Some(&sampler), ..run }, &mut session).unwrap();
    drop(session);
    let lines = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let metrics = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (sampler.asked.into_inner(), metrics, meeting.met.get())
}

#[test]
fn the_next_rollout_is_sampled_while_an_update_runs_from_the_actor_before_it_and_the_metrics_say_so() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (apart, metrics_apart, met_apart) = run(dirs[0].path(), 0, 4);
    let (ahead, metrics, met) = run(dirs[1].path(), 1, 4);
    assert_eq!((apart.len(), ahead.len()), (4, 4), "one rollout per iteration, and none that nobody uses");
    assert_eq!((met_apart, met), (0, 3), "each rollout but the first was sampled during an update");
    let versions = |all: &[(usize, Adapter, Asked)]| all.iter().map(|(version, ..)| *version).collect::<Vec<_>>();
    assert_eq!((versions(&apart), versions(&ahead)), (vec![0, 1, 2, 3], vec![0, 0, 1, 2]));
    for (of, other) in apart.iter().zip(&ahead) {
        assert_eq!(of.2, other.2, "the same prompts, seeds and sampling parameters");
    }
    let weights = |at: usize| bits(&ahead[at].1);
    assert!(weights(0) == weights(1) && weights(1) != weights(2) && weights(2) != weights(3));
    // The first update is the same in both.
    assert!(weights(2) == bits(&apart[1].1));
    let get = |line: &Value, key: &str| line[key].as_f64().unwrap();
    let lags: Vec<f64> = metrics.iter().map(|line| get(line, "sampling/policy_lag")).collect();
    assert_eq!(lags, [0.0, 1.0, 1.0, 1.0]);
    assert!(metrics_apart.iter().all(|line| line.get("sampling/policy_lag").is_none()));
    for (i, (ahead, apart)) in metrics.iter().zip(&metrics_apart).enumerate() {
        for line in [ahead, apart] {
            assert!(get(line, "sampling/server_mismatch") < 1e-4, "of the weights that were sampled from: {line}");
            assert!((get(line, "val/first_ratio") - 1.0).abs() < 1e-6, "the ratio is to the trainer's own: {line}");
        }
        let [moved, still] = [ahead, apart].map(|line| get(line, "sampling/sampler_kl_k3"));
        let [low, high] = ["min", "max"].map(|of| get(ahead, &format!("sampling/importance_sampling_ratio/{of}")));
        let of_update = get(&metrics[i.saturating_sub(1)], "policy/approxkl_avg");
        assert!(still.abs() < 1e-5);
        match i {
            0 => assert!(moved.abs() < 1e-5 && (low - 1.0).abs() < 1e-3 && (high - 1.0).abs() < 1e-3),
            _ => assert!(
                moved > 1e-5 && of_update > 0.0 && low < 0.99 && high > 1.01,
                "{moved} {of_update} {low} {high}"
            ),
        }
        assert_eq!(ahead.get("tokens_per_second/rollout").is_some(), i == 0, "no rate of what took another's time");
    }
    let (alone, _, met) = run(dirs[2].path(), 1, 1);
    assert_eq!((alone.len(), met), (1, 0), "after the last iteration nothing is sampled");
}
