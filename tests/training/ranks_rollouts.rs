//! Several ranks sample and train as one does: PPO with critic, pretraining mixture and evaluations, GRPO with rules, dynamic
//! sampling and a share of the tokens, and RLOO. Each holds all of the state and has a share of the sequences, so that the same
//! config gives the same run on any number of ranks, to 1e-5. Rank 0 alone writes, and starts what is outside. Threads are ranks.

use std::fs;
use std::path::{Path, PathBuf};

use fourfold::config::{self, Stage};
use fourfold::error::exit_code;
use fourfold::report::clocks;
use fourfold::run::{self, Model, RunOptions};
use fourfold::train::world::threads::worlds;
use serde_json::{Value, json};

use super::llama_cpp;
use super::vllm::{Deed, server};
use crate::ranks::{assert_close, assert_within, numbers};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let word = |i: usize| ["soup", "bread", "tea", "rice"][i % 4];
        let lines: Vec<String> = (0..16)
            .map(|i| {
                json!({"prompt": format!("\n\nHuman: How was the {} at place {i}?\n\nAssistant:", word(i))}).to_string()
            })
            .collect();
        fs::write(place.path("data.jsonl"), lines.join("\n")).unwrap();
        let text: Vec<String> =
            (0..12).map(|i| json!({"text": format!("The {} is good {i}. ", word(i)).repeat(8)}).to_string()).collect();
        fs::write(place.path("text.jsonl"), text.join("\n")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a stage on `size` ranks; rank 0 writes into `out`, and the others would into folders of their own.
    fn run(
        &self,
        stage: Stage,
        section: &str,
        size: usize,
        out: &str,
        resume: Option<&Path>,
    ) -> Vec<anyhow::Result<Value>> {
        let text = format!(
            "seed = 5\n[base]\npath = {:?}\n[lora]\nr = 2\n[checkpoint]\nsave_steps = 1\nsave_total_limit = 9\n[data]\npath = {:?}\n\
             eval_rows = 3\n[{}]\nadapter = {:?}\nlearning_rate = 1e-4\neval_prompts = 3\neval_every = 1\n{}\n{}",
            Path::new(ROOT).join("src/quickstart/assets/base"),
            self.path("data.jsonl"),
            stage.name(),
            Path::new(ROOT).join("adapters/quickstart/sft"),
            match stage {
                Stage::Ppo =>
                    "batch_size = 12\nmicro_batch_size = 1\nresponse_length = 6\ntotal_episodes = 24".to_owned(),
                // Of each rank; 1, 2 and 3 ranks have a rollout of 12 responses in two steps.
                _ => format!(
                    "per_device_train_batch_size = 1\ngradient_accumulation_steps = {}\nsteps_per_generation = {}\n\
                     max_completion_length = 6",
                    6 / size,
                    12 / size
                ),
            },
            section.replace("PLACE", self.0.path().to_str().unwrap()).replace("ROOT", ROOT),
        );
        let file = self.path(&format!("{out}.toml"));
        fs::write(&file, text).unwrap();
        std::thread::scope(|scope| {
            let ranks = worlds(size).into_iter().map(|world| {
                let file = &file;
                scope.spawn(move || {
                    let rank = world.rank();
                    let out = self.path(&if rank == 0 { out.to_owned() } else { format!("{out}-{rank}") });
                    let resume = resume.map(Path::to_path_buf);
                    run::stage(
                        stage,
                        &config::load(file, &[])?,
                        &out,
                        &RunOptions { resume, world, ..Default::default() },
                    )
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn trained(&self, stage: Stage, section: &str, size: usize, out: &str) -> Value {
        let mut ran = self.run(stage, section, size, out, None);
        let of_others: Vec<_> = ran.drain(1..).collect();
        let first = ran.remove(0).unwrap();
        of_others.into_iter().for_each(|other| assert_eq!(other.unwrap(), Value::Null));
        (1..size).for_each(|rank| assert!(!self.path(&format!("{out}-{rank}")).exists(), "rank {rank} wrote"));
        first
    }

    fn lines(&self, out: &str, file: &str) -> String {
        clocks::without(&fs::read_to_string(self.path(out).join(file)).unwrap())
    }

    fn flat(&self, out: &str, file: &str) -> Vec<(String, f64)> {
        let mut all = vec![];
        for (line, text) in self.lines(out, file).lines().enumerate() {
            numbers(&line.to_string(), &serde_json::from_str(text).unwrap(), &mut all);
        }
        // What sampler and trainer compute differently is rounding alone, and another one in batches of other sizes.
        all.retain(|(name, _)| !name.contains("sampling_logp_difference"));
        all
    }

    fn weights(&self, out: &str) -> Vec<(String, f64)> {
        let model = Model::open(&Path::new(ROOT).join("src/quickstart/assets/base")).unwrap();
        let mut all = vec![];
        for role in ["actor", "critic"] {
            let path = self.path(out).join(role);
            if !path.exists() {
                continue;
            }
            for (name, tensor) in model.adapter(&path).unwrap().named_tensors() {
                let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                all.extend(values.into_iter().map(|x| (format!("{role} {name}"), f64::from(x))));
            }
        }
        all
    }

    fn bytes(&self, out: &str) -> Vec<u8> {
        let mut all = self.lines(out, "metrics.jsonl").into_bytes();
        all.extend(self.lines(out, "samples.jsonl").into_bytes());
        all.extend(fs::read(self.path(out).join("actor/adapter_model.safetensors")).unwrap());
        all
    }
}

fn results(mut summary: Value) -> Vec<(String, f64)> {
    for key in ["wall_s", "peak_rss_mib", "memory", "actor", "critic", "actor_ema", "output_dir", "last"] {
        summary.as_object_mut().unwrap().remove(key);
    }
    let mut all = vec![];
    numbers("", &summary, &mut all);
    all
}

fn ranks_follow_one(stage: Stage, section: &str, roles: usize) {
    let place = Place::new();
    let one = results(place.trained(stage, section, 1, "one"));
    let (metrics, samples, weights) =
        (place.flat("one", "metrics.jsonl"), place.flat("one", "samples.jsonl"), place.weights("one"));
    assert!(metrics.iter().any(|(name, _)| name == "1/objective/scores"), "{metrics:?}");
    let moved = weights.iter().filter(|(name, _)| name.starts_with("actor")).count();
    assert!(moved > 0 && weights.iter().any(|(name, _)| name.starts_with("critic")) == (roles == 2));
    for size in [2, 3] {
        let (out, context) = (format!("of-{size}"), format!("{} of {size} ranks", stage.name()));
        assert_close(&one, &results(place.trained(stage, section, size, &out)), &context);
        assert_close(&metrics, &place.flat(&out, "metrics.jsonl"), &context);
        // These are written with four digits.
        assert_within(1e-4, &samples, &place.flat(&out, "samples.jsonl"), &context);
        assert_close(&weights, &place.weights(&out), &context);
    }
    let raw = fs::read_to_string(place.path("of-3/metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(raw.lines().last().unwrap()).unwrap();
    for rank in 0..3 {
        let seconds = last[format!("seconds/rank/{rank}")].as_f64().unwrap();
        assert!(seconds > 0.0 && seconds < 3600.0, "rank {rank}: {last}");
    }
    assert!(!fs::read_to_string(place.path("one/metrics.jsonl")).unwrap().contains("seconds/rank"));
    // The second run on two ranks has the bytes of the first, and so has one that was resumed after its first minibatch.
    place.trained(stage, section, 2, "again");
    assert!(place.bytes("again") == place.bytes("of-2"), "two ranks, twice: other bytes");
    let before = place.bytes("of-2");
    let from = place.path("of-2/checkpoints/checkpoint-1");
    for error in place.run(stage, section, 3, "of-2", Some(&from)).into_iter().map(|ran| ran.unwrap_err()) {
        assert_eq!(exit_code(&error), 2, "{error:#}");
        assert!(format!("{error:#}").contains("number of ranks (mpirun -n) was 2, now"), "{error:#}");
    }
    let resumed = place.run(stage, section, 2, "of-2", Some(&from));
    resumed.into_iter().for_each(|ran| drop(ran.unwrap()));
    assert!(place.bytes("of-2") == before, "resumed to other bytes");
}

#[test]
fn ppo_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(
        Stage::Ppo,
        "reward_adapter = \"ROOT/adapters/quickstart/reward\"\nnum_mini_batches = 2\nnum_ppo_epochs = 2\nema_decay = 0.9\n\
         entropy_coef = 0.01\nmissing_eos_penalty = 1.0\nkl_estimator = \"exact\"\nuse_score_scaling = true\nwhiten_rewards = \"keep_mean\"\n\
         bootstrap_truncated = true\n[ppo.ptx]\npath = \"PLACE/text.jsonl\"\ncoef = 0.5\nblock_size = 16\n",
        2,
    );
}

#[test]
fn ppo_with_an_adapted_penalty_and_steps_of_its_mixture_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(
        Stage::Ppo,
        "reward_adapter = \"ROOT/adapters/quickstart/reward\"\nnum_mini_batches = 2\npolicy_loss = \"kl_penalty\"\n\
         kl_in = \"loss\"\nkl_estimator = \"exact\"\n[ppo.ptx]\npath = \"PLACE/text.jsonl\"\nblock_size = 16\nseparate_step = true\n\
         [[ppo.reward]]\nkind = \"length\"\nmin_tokens = 3\nweight = 0.5\nweight_end = 1.0\n",
        2,
    );
}

#[test]
fn grpo_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(
        Stage::Grpo,
        "num_generations = 2\nmax_steps = 8\nnum_iterations = 2\nbeta = 0.04\ntop_entropy_quantile = 0.5\ndynamic_sampling_rollouts = 2\n\
         importance_sampling_correction = \"token_truncate\"\n\
         [[grpo.reward]]\nname = \"end\"\nkind = \"regex\"\npattern = \"[a-m]$\"\n\
         [[grpo.reward]]\nname = \"begin\"\nkind = \"regex\"\npattern = \"^.[aeiou]\"\nweight = 0.5\n",
        1,
    );
}

#[test]
fn rloo_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(
        Stage::Rloo,
        "num_generations = 2\nmax_steps = 4\nreward_adapter = \"ROOT/adapters/quickstart/reward\"\n",
        1,
    );
}

#[test]
fn rollouts_of_a_server_on_two_and_three_ranks_follow_one_and_rank_0_asks_for_all() {
    for async_rollouts in [0, 1] {
        let (url, log) = server(|_, _, _| Deed::Answer);
        ranks_follow_one(
            Stage::Grpo,
            &format!(
                "num_generations = 2\nmax_steps = 4\nreward_adapter = \"ROOT/adapters/quickstart/reward\"\n\
                 importance_sampling_correction = \"token_truncate\"\n[grpo.rollout]\nengine = \"vllm\"\nurls = [{url:?}]\n\
                 async_rollouts = {async_rollouts}\n"
            ),
            1,
        );
        // Two rollouts of twelve on one, two, three and again two ranks, and the second of these again.
        let asked = log.lock().unwrap().iter().filter(|(path, _)| path.ends_with("/completions")).count();
        assert_eq!(asked, 4 * 24 + 12);
    }
}

#[test]
fn rollouts_of_llama_cpps_server_on_two_and_three_ranks_follow_one_and_rank_0_starts_it() {
    let folder = tempfile::tempdir().unwrap();
    // It reports no log-probability of some tokens, which all ranks count.
    let server = llama_cpp::command(folder.path(), &["--deed", "silent"]);
    ranks_follow_one(
        Stage::Grpo,
        &format!(
            "num_generations = 2\nmax_steps = 4\nreward_adapter = \"ROOT/adapters/quickstart/reward\"\n\
             importance_sampling_correction = \"token_truncate\"\n[grpo.rollout]\nengine = \"llama.cpp\"\nserver = {server:?}\n"
        ),
        1,
    );
    let journal = llama_cpp::journal(folder.path());
    let (starts, asked): (Vec<_>, Vec<_>) = journal.iter().partition(|line| line.get("start").is_some());
    // Two rollouts of twelve on one, two, three and again two ranks; the second of these again, whose run begins with the first
    // adapter.
    assert_eq!((starts.len(), asked.len()), (4 * 2 + 2, 4 * 24 + 12));
}

#[cfg(unix)]
#[test]
fn one_rank_starts_a_reward_program_and_its_failure_ends_all_with_the_state_kept() {
    let place = Place::new();
    // Each start is noted; the program ends before the second rollout, behind 3 prompts of the evaluation and 12 responses.
    let program = "import json, os, sys\nopen(sys.argv[1], 'a').write('x')\nfor n, line in enumerate(sys.stdin):\n    \
                   if n >= 16 and not os.path.exists(sys.argv[2]):\n        sys.exit(3)\n    \
                   print(json.dumps({'score': len(json.loads(line)['response'])}), flush=True)\n";
    fs::write(place.path("reward.py"), program).unwrap();
    let section = "num_generations = 2\nmax_steps = 4\n[[rloo.reward]]\nkind = \"command\"\nretries = 0\n\
                   command = [\"python3\", \"PLACE/reward.py\", \"PLACE/started\", \"PLACE/mended\"]\n";
    let failed = place.run(Stage::Rloo, section, 2, "out", None);
    for (rank, ran) in failed.into_iter().enumerate() {
        let error = format!("{:#}", ran.unwrap_err());
        assert!(error.contains("reward"), "rank {rank}: {error}");
        assert_eq!(error.contains("To go on"), rank == 0, "rank {rank}: {error}");
    }
    assert_eq!(fs::read_to_string(place.path("started")).unwrap(), "x", "one process, whatever the number of ranks");
    fs::write(place.path("mended"), "").unwrap();
    let checkpoints = place.path("out/checkpoints");
    let mut all: Vec<PathBuf> = fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    let resumed = place.run(Stage::Rloo, section, 2, "out", all.last().map(PathBuf::as_path));
    resumed.into_iter().for_each(|ran| drop(ran.unwrap()));
    let lines = place.lines("out", "metrics.jsonl");
    assert_eq!(lines.lines().count(), 2, "{lines}");
}
