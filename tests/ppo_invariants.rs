//! What PPO over shared frozen weights promises, held against the quickstart's embedded base with few numbers: who
//! changes and who does not, that the first ratio is 1 and the first KL 0, that one seed gives one result. Knows no
//! other implementation; tests/python/check_interop.py compares with one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fourfold::config::{Lora, Ppo, Reward, RewardLoss, Sft, TargetModules};
use fourfold::data::phases::{RankedExample, SftExample};
use fourfold::model::adapter::Adapter;
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::checkpoint::Checkpoint;
use fourfold::model::roles::{Policy, Scorer};
use fourfold::model::tokenizer::SpecialTokens;
use fourfold::ppo::train::{Start, Trained};
use fourfold::quickstart::base::BASE;
use fourfold::quickstart::task::{Split, pairs, prompts, sft_rows};
use fourfold::report::Report;
use fourfold::run::Model;
use fourfold::{ppo, reward, sft};
use serde_json::{Value, json};

/// The embedded base, opened anew: another one in memory at every call. `layers`: its first so many blocks.
fn model_of(layers: usize) -> Model {
    let config = BASE.config.replace("\"num_hidden_layers\": 4", &format!("\"num_hidden_layers\": {layers}"));
    let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
    let model = Model::of(Checkpoint::from_embedded(&config, parts.0, parts.1, parts.2, parts.3).unwrap()).unwrap();
    assert_eq!(model.base.config().num_hidden_layers, layers);
    model
}

fn model() -> Model {
    model_of(4)
}

fn ids(model: &Model, text: &str) -> Vec<u32> {
    model.checkpoint.tokenizer().encode(text, SpecialTokens::None).unwrap()
}

fn answer_ids(model: &Model, text: &str) -> Vec<u32> {
    let end = model.checkpoint.tokenizer().eos_id().unwrap();
    ids(model, text).into_iter().chain([end]).collect()
}

fn sft_examples(model: &Model, n: usize) -> Vec<SftExample> {
    let example = |prompt: &str, response: &str| {
        let prompt = ids(model, prompt);
        let tokens: Vec<u32> = prompt.iter().copied().chain(answer_ids(model, response)).collect();
        SftExample { loss_mask: (0..tokens.len()).map(|i| i >= prompt.len()).collect(), tokens }
    };
    sft_rows(5, n, Split::Train).iter().map(|r| example(&r.row.prompt, &r.response)).collect()
}

fn comparisons(model: &Model, n: usize) -> Vec<RankedExample> {
    let pairs = pairs(5, n, 0, Split::Train);
    let answers = |p: &fourfold::quickstart::task::Pair| {
        vec![answer_ids(model, &p.chosen), answer_ids(model, &p.rejected)] // best first
    };
    pairs.iter().map(|p| RankedExample { prompt: ids(model, &p.row.prompt), answers: answers(p) }).collect()
}

fn questions(model: &Model, n: usize) -> Vec<Vec<u32>> {
    let questions: Vec<Vec<u32>> = prompts(5, n, Split::Train).iter().map(|r| ids(model, &r.prompt)).collect();
    assert!(questions.iter().any(|q| q.len() != questions[0].len()), "ragged batches are the point");
    questions
}

/// alpha / r = 1.5: a scale forgotten somewhere would show.
fn lora() -> Lora {
    Lora { r: 4, lora_alpha: 6.0, ..Lora::default() }
}

fn sft_config() -> Sft {
    Sft { learning_rate: 3e-3, per_device_train_batch_size: 4, ..Sft::default() }
}

fn reward_config() -> Reward {
    Reward { learning_rate: 3e-3, per_device_train_batch_size: 4, ..Reward::default() }
}

/// 5 iterations of 8 prompts, 2 minibatches each: 10 optimizer steps.
fn ppo_config() -> Ppo {
    let config = Ppo {
        learning_rate: 2e-3,
        total_episodes: 40,
        batch_size: 8,
        num_mini_batches: 2,
        micro_batch_size: 3,
        response_length: 12,
        reward_adapter: "unused".into(),
        ..Ppo::default()
    };
    assert_eq!(config.iterations() * config.num_ppo_epochs * config.num_mini_batches, 10);
    config
}

/// An SFT adapter whose factors are all non-zero, and so never merged into anything.
fn sft_adapter(model: &Model, seed: u64, report: &mut Report) -> Adapter {
    let start = model.fresh_adapter(&lora(), seed).unwrap();
    let examples = sft_examples(model, 32);
    let (adapter, _) = sft::train(&model.base, &start, &examples, &[], &sft_config(), seed, report).unwrap();
    for (name, values) in bits(&adapter) {
        assert!(values.iter().any(|&v| f32::from_bits(v) != 0.0), "{name} is zero after SFT");
    }
    adapter
}

fn reward_adapter(model: &Model, start: &Adapter, seed: u64, report: &mut Report) -> Adapter {
    let examples = comparisons(model, 32);
    reward::train::train(&model.base, start, &examples, &examples, &reward_config(), seed, report).unwrap().0
}

fn run_ppo(start: Start<'_>, model: &Model, config: &Ppo, seed: u64, report: &mut Report) -> Trained {
    let tokenizer = model.checkpoint.tokenizer();
    let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap();
    ppo::train::train(start, &questions(model, 24), tokenizer.eos_ids(), config, seed, &decode, report).unwrap()
}

/// Every tensor of an adapter as the bits of its numbers, the head's bias last.
fn bits(adapter: &Adapter) -> BTreeMap<String, Vec<u32>> {
    let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let named = adapter.named_tensors().into_iter();
    let mut all: BTreeMap<String, Vec<u32>> =
        named.map(|(name, t)| (name, values(t).iter().map(|v| v.to_bits()).collect())).collect();
    all.extend(adapter.head().map(|h| ("score.bias".to_string(), vec![h.bias.to_bits()])));
    all
}

/// Every stored byte of a base.
fn bytes_of(base: &Base) -> BTreeMap<String, Vec<u8>> {
    let mut all: BTreeMap<String, Vec<u8>> =
        base.weights().into_iter().map(|(name, w)| (name, w.bytes().to_vec())).collect();
    all.extend(base.norms().into_iter().map(|(n, v)| (n, v.iter().flat_map(|x| x.to_le_bytes()).collect())));
    all
}

/// Demonstrations as one batch, all their tokens targets.
fn fixed_sequences(model: &Model) -> (Batch, Targets) {
    let sequences: Vec<Vec<u32>> = sft_examples(model, 5).into_iter().map(|e| e.tokens).collect();
    let lengths: Vec<usize> = sequences.iter().map(|s| s.len() - 1).collect();
    let batch = Batch::new(&sequences).unwrap();
    let targets = Targets::responses(&batch, &lengths).unwrap();
    (batch, targets)
}

fn logprobs(base: &Base, adapter: Option<&Adapter>, (batch, targets): &(Batch, Targets)) -> Vec<f32> {
    Policy::new(base, adapter).logprobs(batch, targets, 1.0).unwrap().logprobs
}

fn to_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn mean_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.len() as f32
}

fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn column(lines: &[Value], key: &str) -> Vec<f64> {
    lines.iter().map(|l| l[key].as_f64().unwrap_or_else(|| panic!("{key} in {l}"))).collect()
}

#[test]
fn reference_is_unchanged_after_ten_ppo_steps() {
    let model = model();
    let sft = sft_adapter(&model, 1, &mut Report::silent());
    let rm = reward_adapter(&model, &sft, 1, &mut Report::silent());
    let fixed = fixed_sequences(&model);
    let score = |adapter: &Adapter| Scorer::new(&model.base, adapter).unwrap().scores(&fixed.0).unwrap();
    let look = || {
        let reference = to_bits(&logprobs(&model.base, Some(&sft), &fixed));
        (bytes_of(&model.base), bits(&sft), bits(&rm), reference, to_bits(&score(&rm)))
    };
    let before = look();
    let start = Start { base: &model.base, reward_base: &model.base, sft: &sft, reward: &rm };
    let trained = run_ppo(start, &model, &ppo_config(), 1, &mut Report::silent());
    let after = look();
    assert!(before.0 == after.0, "the base's bytes");
    assert!(before.1 == after.1, "the SFT adapter");
    assert!(before.2 == after.2, "the reward adapter");
    assert!(before.3 == after.3, "the reference's log-probabilities");
    assert!(before.4 == after.4, "the reward model's scores");

    // Equality above means something only if the two that train did move, in every tensor.
    let (actor, critic) = (bits(&trained.actor), bits(&trained.critic));
    assert_eq!(actor.len(), 4 * 7 * 2);
    assert_eq!(critic.len(), 4 * 7 * 2 + 2);
    for (name, values) in &actor {
        assert_ne!(values, &before.1[name], "{name} of the actor did not train");
    }
    for (name, values) in &critic {
        assert_ne!(values, &before.2[name], "{name} of the critic did not train");
    }
    let moved = mean_difference(
        &logprobs(&model.base, Some(&trained.actor), &fixed),
        &logprobs(&model.base, Some(&sft), &fixed),
    );
    assert!(moved > 1e-3, "the actor's log-probabilities moved by {moved} on average");
    assert!(mean_difference(&score(&trained.critic), &score(&rm)) > 1e-3, "the critic's values moved");
}

#[test]
fn first_minibatch_ratio_is_one_and_first_kl_is_zero_with_an_unmerged_sft_adapter() {
    let model = model();
    let sft = sft_adapter(&model, 2, &mut Report::silent());
    let rm = reward_adapter(&model, &sft, 2, &mut Report::silent());
    let fixed = fixed_sequences(&model);
    // Were the reference the bare base, the first KL would be far from zero.
    let apart = mean_difference(&logprobs(&model.base, Some(&sft), &fixed), &logprobs(&model.base, None, &fixed));
    assert!(apart > 0.05, "the SFT adapter does too little to prove anything: {apart}");
    let start = Start { base: &model.base, reward_base: &model.base, sft: &sft, reward: &rm };
    for temperature in [1.0, 0.7] {
        let dir = tempfile::tempdir().unwrap();
        let config = Ppo { temperature, ..ppo_config() };
        run_ppo(start, &model, &config, 2, &mut Report::to_dir(dir.path()).unwrap());
        let lines = metrics(dir.path());
        assert_eq!(lines.len(), 5);
        let (ratios, kls) = (column(&lines, "val/first_ratio"), column(&lines, "objective/kl"));
        eprintln!("temperature {temperature}: first ratios {ratios:?}, KL {kls:?}");
        // Sampling with a cache and training without one round apart, some 1e-6 a token.
        for ratio in &ratios {
            assert!((ratio - 1.0).abs() < 1e-4, "{ratios:?}");
        }
        assert!(kls[0].abs() < 1e-4, "{kls:?}");
        assert!(kls[1..].iter().all(|kl| kl.abs() > 1e-3), "the actor leaves the reference: {kls:?}");
    }
}

/// sft -> reward -> ppo, each into a folder of its own as the commands would leave it.
fn pipeline(dir: &Path, seed: u64) {
    let model = model();
    let report = |stage: &str| {
        fs::create_dir_all(dir.join(stage)).unwrap();
        Report::to_dir(&dir.join(stage)).unwrap()
    };
    let save = |adapter: &Adapter, name: &str| {
        adapter.clone().with_provenance(model.provenance()).save(&dir.join(name)).unwrap();
    };
    let sft = sft_adapter(&model, seed, &mut report("sft"));
    save(&sft, "sft/adapter");
    let rm = reward_adapter(&model, &sft, seed, &mut report("reward"));
    save(&rm, "reward/adapter");
    let start = Start { base: &model.base, reward_base: &model.base, sft: &sft, reward: &rm };
    let trained = run_ppo(start, &model, &ppo_config(), seed, &mut report("ppo"));
    save(&trained.actor, "ppo/actor");
    save(&trained.critic, "ppo/critic");
}

/// Every file under `dir` with its bytes.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                all.insert(path.strip_prefix(dir).unwrap().to_path_buf(), fs::read(&path).unwrap());
            }
        }
    }
    all
}

fn assert_same_files(a: &BTreeMap<PathBuf, Vec<u8>>, b: &BTreeMap<PathBuf, Vec<u8>>) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (path, bytes) in a {
        assert!(*bytes == b[path], "{} differs", path.display());
    }
}

#[test]
fn two_runs_with_one_seed_give_byte_equal_adapters() {
    let dirs = [3, 3, 4].map(|seed| {
        let dir = tempfile::tempdir().unwrap();
        pipeline(dir.path(), seed);
        files(dir.path())
    });
    // Four adapters of two files, three stages with metrics and samples.
    assert_eq!(dirs[0].len(), 4 * 2 + 3 * 2);
    assert_same_files(&dirs[0], &dirs[1]);
    for (path, bytes) in &dirs[0] {
        let by_seed = path.ends_with("adapter_model.safetensors") || path.ends_with("metrics.jsonl");
        assert!(!by_seed || *bytes != dirs[2][path], "{} does not depend on the seed", path.display());
    }
}

/// A Hugging Face directory of the embedded base.
fn write_base(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), BASE.config).unwrap();
    fs::write(dir.join("generation_config.json"), BASE.generation_config).unwrap();
    fs::write(dir.join("tokenizer.json"), BASE.tokenizer).unwrap();
    fs::write(dir.join("tokenizer_config.json"), BASE.tokenizer_config).unwrap();
    fs::write(dir.join("model.safetensors"), BASE.weights).unwrap();
}

/// Base, records and config files as a user has them.
fn write_world(dir: &Path) {
    write_base(&dir.join("base"));
    let lines = |rows: Vec<Value>| rows.iter().map(|r| format!("{r}\n")).collect::<String>();
    let sft = sft_rows(5, 24, Split::Train);
    let messages = |q: &str, a: &str| json!([{"role": "user", "content": q}, {"role": "assistant", "content": a}]);
    let rows = sft.iter().map(|r| json!({ "messages": messages(r.row.question(), r.response.trim()) }));
    fs::write(dir.join("sft.jsonl"), lines(rows.collect())).unwrap();
    let rows = pairs(5, 24, 0, Split::Train).into_iter().map(
        |p| json!({"prompt": p.row.prompt.as_str(), "chosen": p.chosen.as_str(), "rejected": p.rejected.as_str()}),
    );
    fs::write(dir.join("pairs.jsonl"), lines(rows.collect())).unwrap();
    let common = "seed = 6\n[base]\npath = \"base\"\n[lora]\nr = 4\nlora_alpha = 6\n[data]\neval_rows = 4\n";
    let write = |stage: &str, data: &str, keys: &str| {
        let text = format!("{common}path = \"{data}\"\n[{stage}]\n{keys}\n");
        fs::write(dir.join(format!("{stage}.toml")), text).unwrap();
    };
    write("sft", "sft.jsonl", "learning_rate = 3e-3\nper_device_train_batch_size = 4");
    let continued = "adapter = \"OUT/sft/adapter\"\nlearning_rate = 3e-3\nper_device_train_batch_size = 4";
    write("reward", "pairs.jsonl", continued);
    let ppo = "adapter = \"OUT/sft/adapter\"\nreward_adapter = \"OUT/reward/adapter\"\nlearning_rate = 2e-3\n\
               total_episodes = 16\nbatch_size = 8\nnum_mini_batches = 2\nresponse_length = 10\neval_prompts = 4";
    write("ppo", "sft.jsonl", ppo);
}

/// One command of the program in `dir`.
fn fourfold(dir: &Path, threads: &str, arguments: &[String]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    let output = command.current_dir(dir).env("RAYON_NUM_THREADS", threads).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// All three stages through the program; the adapters' tensors, metrics and samples that they leave in `out`.
fn stages(dir: &Path, out: &str, threads: &str, more: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    for stage in ["sft", "reward", "ppo"] {
        let mut arguments: Vec<String> =
            [stage, &format!("{stage}.toml"), "--json", "--out", &format!("{out}/{stage}")].map(Into::into).into();
        let mut set = |text: &str| arguments.extend(["--set".into(), text.replace("OUT", out)]);
        if stage != "sft" {
            set(&format!("{stage}.adapter=OUT/sft/adapter"));
        }
        if stage == "ppo" {
            set("ppo.reward_adapter=OUT/reward/adapter");
            more.iter().for_each(|m| set(m));
        }
        fourfold(dir, threads, &arguments);
    }
    // The resolved configs and the adapters' configs name paths, which differ from run to run.
    let kept = ["adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"];
    files(&dir.join(out)).into_iter().filter(|(path, _)| kept.iter().any(|k| path.ends_with(k))).collect()
}

#[test]
fn the_number_of_threads_and_a_second_copy_of_the_base_change_no_byte_of_the_programs_results() {
    let dir = tempfile::tempdir().unwrap();
    write_world(dir.path());
    let one = stages(dir.path(), "one", "1", &[]);
    assert_eq!(one.len(), 4 + 3 * 2);
    assert!(one.values().filter(|bytes| !bytes.is_empty()).count() >= 8, "PPO leaves samples");
    assert_same_files(&one, &stages(dir.path(), "two", "2", &[]));
    assert_same_files(&one, &stages(dir.path(), "three", "3", &[]));
    write_base(&dir.path().join("copy"));
    assert_same_files(&one, &stages(dir.path(), "copied", "2", &["reward_base.path=copy"]));
}

#[test]
fn critic_and_reward_model_over_a_second_base_of_the_same_files_do_exactly_as_over_the_shared_one() {
    let (shared, second) = (model(), model());
    let sft = sft_adapter(&shared, 7, &mut Report::silent());
    let rm = reward_adapter(&second, &sft, 7, &mut Report::silent());
    let run = |reward_base: &Base| {
        let dir = tempfile::tempdir().unwrap();
        let start = Start { base: &shared.base, reward_base, sft: &sft, reward: &rm };
        let trained = run_ppo(start, &shared, &ppo_config(), 7, &mut Report::to_dir(dir.path()).unwrap());
        (bits(&trained.actor), bits(&trained.critic), fs::read(dir.path().join("metrics.jsonl")).unwrap())
    };
    assert!(run(&shared.base) == run(&second.base));
}

#[test]
fn critic_and_reward_model_train_over_a_second_base_of_another_depth() {
    let (policy, other) = (model(), model_of(3));
    let sft = sft_adapter(&policy, 8, &mut Report::silent());
    let rm = reward_adapter(&other, &other.fresh_adapter(&lora(), 8).unwrap(), 8, &mut Report::silent());
    let shared_rm = reward_adapter(&policy, &sft, 8, &mut Report::silent());
    let before = (bytes_of(&policy.base), bytes_of(&other.base), bits(&rm));
    let run = |reward_base: &Base, reward: &Adapter| {
        let dir = tempfile::tempdir().unwrap();
        let start = Start { base: &policy.base, reward_base, sft: &sft, reward };
        let trained = run_ppo(start, &policy, &ppo_config(), 8, &mut Report::to_dir(dir.path()).unwrap());
        (trained, metrics(dir.path()))
    };
    let (trained, lines) = run(&other.base, &rm);
    assert!(before == (bytes_of(&policy.base), bytes_of(&other.base), bits(&rm)));
    let critic = bits(&trained.critic);
    assert_eq!((trained.actor.layers().len(), critic.len()), (4, 3 * 7 * 2 + 2));
    for (name, values) in &critic {
        assert_ne!(values, &before.2[name], "{name} of the critic did not train");
    }
    // The first answers are the actor's business alone; who scores them is not.
    let (_, shared) = run(&policy.base, &shared_rm);
    for key in ["objective/entropy", "response_length", "objective/kl"] {
        assert_eq!(lines[0][key], shared[0][key], "{key}");
    }
    assert_ne!(lines[0]["objective/scores"], shared[0]["objective/scores"]);
}

/// A reward start whose head is known before training, so that the first loss can be told by hand.
fn scorer_start(model: &Model) -> Adapter {
    model.fresh_adapter(&lora(), 9).unwrap().with_head(9).unwrap()
}

fn train_reward(
    model: &Model,
    start: &Adapter,
    examples: &[RankedExample],
    config: &Reward,
) -> (Vec<Value>, reward::train::Summary) {
    let dir = tempfile::tempdir().unwrap();
    let mut report = Report::to_dir(dir.path()).unwrap();
    let (_, summary) = reward::train::train(&model.base, start, examples, examples, config, 9, &mut report).unwrap();
    (metrics(dir.path()), summary)
}

#[test]
fn three_ranked_answers_train_as_three_pairs_from_one_forward_of_three_sequences() {
    let model = model();
    let two = comparisons(&model, 12);
    // A third answer, worse than both: the end token at once.
    let empty = vec![model.checkpoint.tokenizer().eos_id().unwrap()];
    let three: Vec<RankedExample> = two
        .iter()
        .map(|e| RankedExample { answers: e.answers.iter().cloned().chain([empty.clone()]).collect(), ..e.clone() })
        .collect();
    let start = scorer_start(&model);
    let config = Reward { num_train_epochs: 6, per_device_train_batch_size: 12, ..reward_config() };
    let (lines, summary) = train_reward(&model, &start, &three, &config);
    assert_eq!((summary.before.pairs, summary.after.pairs, summary.steps), (36, 36, 6));
    // Pair by pair, every sequence would run twice.
    let tokens = |e: &RankedExample| e.answers.iter().map(|a| e.prompt.len() + a.len()).sum::<usize>();
    assert_eq!(summary.tokens, 6 * three.iter().map(tokens).sum::<usize>());
    // -log sigmoid(better - worse), the mean over an example's pairs, then over the examples.
    let scores = reward::train::scores(&model.base, &start, &three).unwrap();
    let pair = |better: f32, worse: f32| (f64::from(worse - better)).exp().ln_1p();
    let by_hand = scores.iter().map(|s| (pair(s[0], s[1]) + pair(s[0], s[2]) + pair(s[1], s[2])) / 3.0).sum::<f64>();
    let losses = column(&lines, "loss");
    eprintln!("loss of three ranked answers {losses:?}, the first by hand {}", by_hand / 12.0);
    // Another packing, f32 sums: some 1e-6.
    assert!((losses[0] - by_hand / 12.0).abs() < 1e-5);
    assert!(losses[5] < 0.7 * losses[0] && summary.after.accuracy > summary.before.accuracy, "{losses:?} {summary:?}");
}

#[test]
fn divergence_to_end_loss_falls_and_is_another_loss_than_the_last_tokens() {
    let model = model();
    let examples = comparisons(&model, 12);
    let start = scorer_start(&model);
    let config = Reward { num_train_epochs: 8, per_device_train_batch_size: 12, ..reward_config() };
    let (last, _) = train_reward(&model, &start, &examples, &config);
    let config = Reward { loss: RewardLoss::DivergenceToEnd, ..config };
    let (lines, summary) = train_reward(&model, &start, &examples, &config);
    let losses = column(&lines, "loss");
    eprintln!("divergence_to_end loss {losses:?}, last_token {:?}", column(&last, "loss"));
    assert!(losses[7] < 0.8 * losses[0], "{losses:?}");
    assert!(summary.after.accuracy > summary.before.accuracy.min(0.99), "{summary:?}");
    assert!((losses[0] - column(&last, "loss")[0]).abs() > 1e-3, "it reads more tokens than the last");
}

#[test]
fn a_centered_reward_model_scores_its_answers_with_mean_zero_and_deviation_one_in_the_same_order() {
    let model = model();
    let examples = comparisons(&model, 16);
    let train = |center: bool| {
        let config = Reward { center, ..reward_config() };
        let start = scorer_start(&model);
        let (adapter, _) =
            reward::train::train(&model.base, &start, &examples, &[], &config, 9, &mut Report::silent()).unwrap();
        let scores = reward::train::scores(&model.base, &adapter, &examples).unwrap().concat();
        (adapter, scores.into_iter().map(f64::from).collect::<Vec<f64>>())
    };
    let ((raw, raw_scores), (centered, scores)) = (train(false), train(true));
    let moments = |s: &[f64]| {
        let mean = s.iter().sum::<f64>() / s.len() as f64;
        (mean, (s.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / s.len() as f64).sqrt())
    };
    let (mean, deviation) = moments(&scores);
    // f32 scores of size 1.
    assert!(mean.abs() < 1e-5 && (deviation - 1.0).abs() < 1e-5, "{mean} {deviation}");
    let (raw_mean, raw_deviation) = moments(&raw_scores);
    assert!(raw_mean.abs() > 1e-2 && (raw_deviation - 1.0).abs() > 1e-2, "{raw_mean} {raw_deviation}: nothing to do");
    assert_eq!(raw.head().unwrap().bias, 0.0);
    assert_ne!(centered.head().unwrap().bias, 0.0);
    let order = |s: &[f64]| {
        let mut order: Vec<usize> = (0..s.len()).collect();
        order.sort_by(|&a, &b| s[a].total_cmp(&s[b]));
        order
    };
    assert_eq!(order(&raw_scores), order(&scores));
}

#[test]
fn an_adapter_of_some_maps_of_some_blocks_trains_through_all_stages_and_nowhere_else() {
    let model = model();
    let some = Lora {
        target_modules: TargetModules::List(vec!["q_proj".into(), "down_proj".into()]),
        layers_to_transform: Some(vec![1, 3]),
        use_rslora: true,
        ..lora()
    };
    let start = model.fresh_adapter(&some, 10).unwrap();
    let examples = sft_examples(&model, 16);
    let (sft, _) = sft::train(&model.base, &start, &examples, &[], &sft_config(), 10, &mut Report::silent()).unwrap();
    let rm = reward_adapter(&model, &sft, 10, &mut Report::silent());
    let start = Start { base: &model.base, reward_base: &model.base, sft: &sft, reward: &rm };
    let trained = run_ppo(start, &model, &ppo_config(), 10, &mut Report::silent());
    let (before, actor) = (bits(&sft), bits(&trained.actor));
    assert_eq!(actor.len(), 2 * 2 * 2);
    for (name, values) in &actor {
        assert!(name.contains("layers.1.") || name.contains("layers.3."), "{name}");
        assert_ne!(values, &before[name], "{name} did not train");
    }
}
