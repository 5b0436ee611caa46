//! DPO and KTO: five training steps follow torch's, precomputed reference log-probabilities change no bit, and both
//! stages run from config files and records of the formats that TRL's users have. tests/golden/dpo_course.py printed
//! the golden numbers.

use std::fs;
use std::path::{Path, PathBuf};

use fourfold::config;
use fourfold::config::{Dpo, DpoLoss, Kto, Stage};
use fourfold::data::examples::objectives::{RankedExample, UnpairedExample};
use fourfold::dpo::{kto, pairs};
use fourfold::error::exit_code;
use fourfold::model::adapter::Adapter;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::roles::Policy;
use fourfold::report::{Report, clocks};
use fourfold::run;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Golden {
    lr: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    beta: f64,
    compared: Vec<Compared>,
    judged: Vec<Judged>,
    judged_long: Vec<Judged>,
    max_length: usize,
    reference: Vec<Vec<f64>>,
    sigmoid: Course,
    ipo: Course,
    kto: Course,
    kto_cut: Course,
}

#[derive(Deserialize)]
struct Compared {
    prompt: Vec<u32>,
    answers: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Judged {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    label: bool,
}

#[derive(Deserialize)]
struct Course {
    course: Vec<Map<String, Value>>,
    after: Vec<Vec<f64>>,
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

struct World {
    model: Model,
    sft: Adapter,
    golden: Golden,
}

impl World {
    fn open() -> Self {
        let model = Model::open(&here("src/quickstart/assets/base")).unwrap();
        let sft = model.adapter(&here("tests/golden/peft_logits/lm")).unwrap();
        Self { model, sft, golden: serde_json::from_str(include_str!("../golden/dpo_course.json")).unwrap() }
    }

    fn compared(&self) -> Vec<RankedExample> {
        let example = |c: &Compared| RankedExample {
            prompt: c.prompt.clone(),
            responses: c.answers.clone(),
            label: Default::default(),
        };
        self.golden.compared.iter().map(example).collect()
    }

    fn logps(&self, adapter: &Adapter) -> Vec<f64> {
        let mut all = vec![];
        for (c, answer) in self.golden.compared.iter().flat_map(|c| c.answers.iter().map(move |a| (c, a))) {
            let batch = Batch::new(&[[&c.prompt[..], answer].concat()]).unwrap();
            let targets = Targets::responses(&batch, &[answer.len()]).unwrap();
            let stats = Policy::new(&self.model.base, Some(adapter)).logprobs(&batch, &targets, 1.0).unwrap();
            all.push(stats.logprobs.iter().map(|&l| f64::from(l)).sum());
        }
        all
    }

    fn dpo(&self, loss_type: DpoLoss, label_smoothing: f64) -> Dpo {
        Dpo {
            loss_type,
            label_smoothing,
            beta: self.golden.beta,
            learning_rate: self.golden.lr,
            weight_decay: self.golden.weight_decay,
            max_grad_norm: self.golden.max_grad_norm,
            num_train_epochs: 5,
            // Two micro-batches a step: torch had one.
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 2,
            ..Dpo::default()
        }
    }

    fn kto(&self) -> Kto {
        Kto {
            beta: self.golden.beta,
            undesirable_weight: 0.3,
            learning_rate: self.golden.lr,
            weight_decay: self.golden.weight_decay,
            max_grad_norm: self.golden.max_grad_norm,
            num_train_epochs: 5,
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 2,
            ..Kto::default()
        }
    }

    fn train_dpo(&self, config: &Dpo, dir: &Path) -> Adapter {
        let (base, examples) = (&self.model.base, self.compared());
        let mut report = Session::new(Report::to_dir(dir).unwrap());
        let setup = Setup { base, start: &self.sft, recompute: Recompute::Off, seed: 0 };
        pairs::train(setup, Some(&self.sft), &examples, &[], config, &mut report).unwrap().0
    }

    fn train_kto(&self, config: &Kto, dir: &Path) -> Adapter {
        self.train_kto_on(&self.golden.judged, 512, config, dir)
    }

    fn train_kto_on(&self, judged: &[Judged], max_length: usize, config: &Kto, dir: &Path) -> Adapter {
        let example =
            |j: &Judged| UnpairedExample { prompt: j.prompt.clone(), response: j.answer.clone(), desirable: j.label };
        let (base, examples) = (&self.model.base, judged.iter().map(example).collect::<Vec<_>>());
        let mut report = Session::new(Report::to_dir(dir).unwrap());
        let setup = Setup { base, start: &self.sft, recompute: Recompute::Off, seed: 0 };
        kto::train(setup, Some(&self.sft), &examples, &[], config, max_length, &mut report).unwrap().0
    }

    fn assert_course(&self, want: &Course, trained: &Adapter, dir: &Path, what: &str) {
        let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), want.course.len());
        let mut furthest = 0f64;
        for (line, want) in lines.iter().zip(&want.course) {
            for (key, want) in want {
                let (got, want) = (line[key].as_f64().unwrap_or(f64::NAN), want.as_f64().unwrap());
                // f32 sums of up to 15 log-probabilities of size 10 in another order, then five steps of Adam.
                let off = (got - want).abs() / want.abs().max(0.1);
                assert!(off < 1e-3, "{what}: {key} is {got}, torch has {want}; {text}");
                furthest = furthest.max(off);
            }
        }
        let (before, after) = (self.golden.reference.concat(), want.after.concat());
        let moved = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let off = self.logps(trained).iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        eprintln!(
            "{what}: figures within {furthest:.1e} of torch's; answers {off:.1e} away after moving by {moved:.1}"
        );
        assert!(off < 1e-3 * moved, "{what}: {off} {moved}");
    }
}

#[test]
fn five_dpo_steps_take_torchs_course() {
    let (world, dir) = (World::open(), tempfile::tempdir().unwrap());
    let trained = world.train_dpo(&world.dpo(DpoLoss::Sigmoid, 0.1), dir.path());
    world.assert_course(&world.golden.sigmoid, &trained, dir.path(), "sigmoid");
    let trained = world.train_dpo(&world.dpo(DpoLoss::Ipo, 0.0), dir.path());
    world.assert_course(&world.golden.ipo, &trained, dir.path(), "ipo");
}

#[test]
fn five_kto_steps_take_torchs_course() {
    let (world, dir) = (World::open(), tempfile::tempdir().unwrap());
    let trained = world.train_kto(&world.kto(), dir.path());
    world.assert_course(&world.golden.kto, &trained, dir.path(), "kto");
    assert!(world.golden.kto.course.iter().any(|step| step["kl"].as_f64().unwrap() > 0.0), "the KL term took part");
}

#[test]
fn ktos_mismatched_pairs_are_cut_by_max_length_as_trl_cuts_them() {
    let (world, dir) = (World::open(), tempfile::tempdir().unwrap());
    let golden = &world.golden;
    assert!(golden.judged_long.iter().all(|j| j.prompt.len() + j.answer.len() <= golden.max_length));
    let mixed = golden.judged_long[0].prompt.len() + golden.judged_long[1].answer.len();
    assert!(mixed > golden.max_length, "{mixed}");
    let trained = world.train_kto_on(&golden.judged_long, golden.max_length, &world.kto(), dir.path());
    world.assert_course(&golden.kto_cut, &trained, dir.path(), "kto, cut");
    let kl = |dir: &Path| {
        let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        lines.iter().map(|l| l["kl"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let whole = tempfile::tempdir().unwrap();
    world.train_kto_on(&golden.judged_long, 512, &world.kto(), whole.path());
    assert_ne!(kl(dir.path()), kl(whole.path()), "the cut tokens would change the KL term");
}

#[test]
fn a_reference_computed_once_gives_the_same_bits_as_one_computed_every_step() {
    let world = World::open();
    let run = |once: bool| {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let dpo = Dpo { precompute_ref_log_probs: once, ..world.dpo(DpoLoss::Hinge, 0.0) };
        let kto = Kto { precompute_ref_log_probs: once, ..world.kto() };
        world.train_dpo(&dpo, dirs[0].path());
        world.train_kto(&kto, dirs[1].path());
        dirs.map(|dir| clocks::without(&fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap()))
    };
    assert_eq!(run(true), run(false));
}

/// Records, a config over them, and the stage run from it.
fn from_files(stage: Stage, records: &[Value], section: &str) -> anyhow::Result<(Value, Vec<Value>)> {
    let dir = tempfile::tempdir()?;
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    fs::write(dir.path().join("data.jsonl"), lines.join("\n"))?;
    let file = dir.path().join("run.toml");
    let base = here("src/quickstart/assets/base");
    let text = format!(
        "[base]\npath = {:?}\n[lora]\nr = 2\n[data]\npath = {:?}\neval_rows = 2\n[{}]\n{section}\n",
        base.display().to_string(),
        dir.path().join("data.jsonl").display().to_string(),
        stage.name(),
    );
    fs::write(&file, text)?;
    let config = config::load(&file, &[])?;
    let out = dir.path().join("out");
    let summary = run::stage(stage, &config, &out, &run::RunOptions::default())?;
    Model::open(&base)?.adapter(&out.join("adapter"))?;
    let metrics = fs::read_to_string(out.join("metrics.jsonl"))?;
    Ok((summary, metrics.lines().map(|l| serde_json::from_str(l).unwrap()).collect()))
}

fn preferences(n: usize) -> Vec<Value> {
    let record = |i: usize| {
        json!({
            "prompt": format!("How was the soup at place {i}?"),
            "chosen": "The soup was lovely and warm.",
            "rejected": format!("The soup number {i} was awful."),
        })
    };
    (0..n).map(record).collect()
}

#[test]
fn dpo_learns_preferences_from_a_file_and_logs_trls_metrics() {
    let section = "learning_rate = 3e-3\nnum_train_epochs = 3\nper_device_train_batch_size = 4\neval_steps = 2";
    let (summary, metrics) = from_files(Stage::Dpo, &preferences(14), section).unwrap();
    assert_eq!(summary["eval_rewards/accuracies"], 1.0, "{summary}");
    assert!(summary["eval_rewards/margins"].as_f64().unwrap() > 0.5, "{summary}");
    let loss = metrics[0]["loss"].as_f64().unwrap();
    // A fresh adapter is the bare base, which is the reference: log 2 up to the rounding of two passes.
    assert!((loss - 2f64.ln()).abs() < 1e-5, "{loss}");
    let last = metrics.last().unwrap();
    assert!(last["loss"].as_f64().unwrap() < 0.5 && metrics.len() == 9, "{last}");
    for key in ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"] {
        assert!(last[key].is_number(), "{key}: {last}");
    }
    for key in ["logps/rejected", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"] {
        assert!(last[key].is_number(), "{key}: {last}");
    }
    assert!(metrics[1]["eval_rewards/margins"].is_number() && metrics[2].get("eval_loss").is_none());
}

#[test]
fn kto_learns_from_unpaired_messages_and_from_preferences() {
    let unpaired = |i: usize| {
        let answer = if i.is_multiple_of(2) { "It was lovely and warm." } else { "It was awful." };
        json!({
            "messages": [
                {"role": "user", "content": format!("How was the soup at place {i}?")},
                {"role": "assistant", "content": answer},
            ],
            "label": i.is_multiple_of(2),
        })
    };
    let section = "learning_rate = 3e-3\nnum_train_epochs = 3\nper_device_train_batch_size = 4";
    let unpaired: Vec<Value> = (0..14).map(unpaired).collect();
    for (records, counts) in [(unpaired, 12), (preferences(7), 12)] {
        let (summary, metrics) = from_files(Stage::Kto, &records, section).unwrap();
        let all = summary["desirable"].as_u64().unwrap() + summary["undesirable"].as_u64().unwrap();
        assert_eq!(all, counts, "{summary}");
        let (first, last) = (&metrics[0], metrics.last().unwrap());
        assert!((first["loss"].as_f64().unwrap() - 0.5).abs() < 1e-4, "1 - sigmoid(0): {first}");
        // A batch that drew one kind only has no margin.
        let margin = metrics.iter().rev().find_map(|step| step["rewards/margins"].as_f64()).unwrap();
        assert!(margin > 0.3 && last["kl"].as_f64().unwrap() >= 0.0, "{last}");
    }
}

#[test]
fn unusable_data_is_refused_with_the_remedy() {
    let refusal = |stage, records: &[Value], section: &str| {
        let error = from_files(stage, records, section).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let two = preferences(4);
    assert!(refusal(Stage::Dpo, &two, "beta = 0.0").contains("[dpo] beta = 0"));
    assert!(refusal(Stage::Dpo, &two, "label_smoothing = 0.5").contains("label_smoothing = 0.5 is out of range"));
    let found = refusal(Stage::Dpo, &two, "loss_type = \"ipo\"\nlabel_smoothing = 0.1");
    assert!(found.contains("has no meaning for this loss_type"), "{found}");
    assert!(refusal(Stage::Dpo, &two, "loss_type = \"kto\"").contains("is not one of"));
    assert!(refusal(Stage::Kto, &two, "per_device_train_batch_size = 1").contains("no other response"));
    let found = refusal(Stage::Kto, &two, "desirable_weight = 0\nundesirable_weight = 0");
    assert!(found.contains("are both 0"), "{found}");
    let texts = vec![json!({"text": "only a text"}); 4];
    assert!(refusal(Stage::Dpo, &texts, "").contains("needs comparisons"));
    assert!(refusal(Stage::Kto, &texts, "").contains("KTO needs labelled responses"));
    let ranked = json!({"prompt": "a", "responses": ["b", "c", "d"]});
    assert!(refusal(Stage::Kto, &[ranked.clone(), ranked.clone(), ranked], "").contains("this record is ranked"));
}
