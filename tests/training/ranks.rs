//! Several ranks train as one does: N ranks of a batch of B/N follow one rank of B to 1e-5 in metrics and weights, in every stage
//! that allows it; rank 0 alone writes; a resumed run ends with the bytes of one that was not stopped. The ranks are threads.

use std::fs;
use std::path::{Path, PathBuf};

use fourfold::config::{self, Stage};
use fourfold::error::exit_code;
use fourfold::report::clocks;
use fourfold::run::{self, Model, RunOptions};
use fourfold::train::world::threads::worlds;
use serde_json::{Value, json};

/// One rank's batch; 2 and 3 divide it.
const BATCH: usize = 6;
/// Training records: the last step of an epoch has one, so that all ranks but the first have none.
const RECORDS: usize = 13;

struct Place(tempfile::TempDir);

impl Place {
    /// Records of a stage in `data.jsonl`, and others in `other.jsonl`.
    fn of(stage: Stage) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        for (name, food) in [("data.jsonl", "soup"), ("other.jsonl", "bread")] {
            let prompt = |i: usize| format!("\n\nHuman: How was the {food} at place {i}?\n\nAssistant:");
            let answer = |i: usize| [" It is good.", " It is bad and salty.", " Yes, very.", " No."][i % 4];
            let line = |i: usize| match stage {
                Stage::Sft => json!({"prompt": prompt(i), "completion": answer(i)}),
                Stage::Kto => json!({"prompt": prompt(i), "completion": answer(i), "label": i.is_multiple_of(2)}),
                _ => json!({"prompt": prompt(i), "chosen": answer(i), "rejected": answer(i + 1)}),
            };
            let lines: Vec<String> = (0..RECORDS + 3).map(|i| line(i).to_string()).collect();
            fs::write(place.path(name), lines.join("\n")).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a stage on `size` ranks, each over its own config, rank 0 into `out` and the others into folders of their own.
    fn run(
        &self,
        stage: Stage,
        size: usize,
        out: &str,
        data: &(dyn Fn(usize) -> &'static str + Sync),
        resume: Option<&Path>,
    ) -> Vec<anyhow::Result<Value>> {
        std::thread::scope(|scope| {
            let ranks = worlds(size).into_iter().map(|world| {
                scope.spawn(move || {
                    let rank = world.rank();
                    let text = format!(
                        "seed = 5\n[base]\npath = {:?}\n[lora]\nr = 2\n[checkpoint]\nsave_steps = 2\nsave_total_limit = 9\n[data]\npath = {:?}\n\
                         eval_rows = 3\n[{}]\nper_device_train_batch_size = {}\nnum_train_epochs = 2\nlearning_rate = 1e-3\n\
                         eval_steps = 2\n",
                        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quickstart/assets/base"),
                        self.path(data(rank)),
                        stage.name(),
                        BATCH / size,
                    );
                    let file = self.path(&format!("{out}-{rank}.toml"));
                    fs::write(&file, text).unwrap();
                    let out = self.path(&if rank == 0 { out.to_owned() } else { format!("{out}-{rank}") });
                    let resume = resume.map(Path::to_path_buf);
                    run::stage(stage, &config::load(&file, &[])?, &out, &RunOptions { resume, world, ..Default::default() })
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn trained(&self, stage: Stage, size: usize, out: &str) -> Value {
        let mut ran = self.run(stage, size, out, &|_| "data.jsonl", None);
        ran.drain(1..).for_each(|other| assert_eq!(other.unwrap(), Value::Null));
        (1..size).for_each(|rank| assert!(!self.path(&format!("{out}-{rank}")).exists(), "rank {rank} wrote"));
        ran.remove(0).unwrap()
    }

    fn metrics(&self, out: &str) -> String {
        clocks::without(&fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap())
    }

    fn weights(&self, out: &str) -> Vec<u8> {
        fs::read(self.path(out).join("adapter/adapter_model.safetensors")).unwrap()
    }
}

/// Every number under its path, but the distributions', whose buckets are as wide as the least and the largest value say.
pub fn numbers(at: &str, value: &Value, into: &mut Vec<(String, f64)>) {
    match value {
        Value::Object(entries) => {
            let named = entries.iter().filter(|(key, _)| !key.starts_with("histogram/"));
            named.for_each(|(key, value)| numbers(&format!("{at}/{key}"), value, into));
        }
        Value::Array(all) => all.iter().enumerate().for_each(|(i, value)| numbers(&format!("{at}/{i}"), value, into)),
        Value::Number(number) => into.push((at.into(), number.as_f64().unwrap())),
        _ => into.push((format!("{at}: {value}"), 0.0)),
    }
}

pub fn assert_close(one: &[(String, f64)], other: &[(String, f64)], context: &str) {
    assert_within(1e-5, one, other, context);
}

pub fn assert_within(tolerance: f64, one: &[(String, f64)], other: &[(String, f64)], context: &str) {
    assert_eq!(one.len(), other.len(), "{context}");
    for ((name, a), (same, b)) in one.iter().zip(other) {
        assert_eq!(name, same, "{context}");
        assert!((a - b).abs() <= tolerance * a.abs().max(1.0), "{context}: {name} is {a} and {b}");
    }
}

fn all_weights(place: &Place, out: &str) -> Vec<(String, f64)> {
    let model = Model::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quickstart/assets/base")).unwrap();
    let adapter = model.adapter(&place.path(out).join("adapter")).unwrap();
    let mut all = vec![];
    for (name, tensor) in adapter.named_tensors() {
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        all.extend(values.into_iter().map(|x| (name.clone(), f64::from(x))));
    }
    all.extend(adapter.head().map(|head| ("bias".to_owned(), f64::from(head.bias))));
    all
}

fn ranks_follow_one(stage: Stage) {
    let place = Place::of(stage);
    let flat = |out: &str| {
        let mut all = vec![];
        for (line, text) in place.metrics(out).lines().enumerate() {
            numbers(&line.to_string(), &serde_json::from_str(text).unwrap(), &mut all);
        }
        all
    };
    let results = |mut summary: Value| {
        for clock in ["wall_s", "peak_rss_mib", "memory", "adapter", "output_dir"] {
            summary.as_object_mut().unwrap().remove(clock);
        }
        let mut all = vec![];
        numbers("", &summary, &mut all);
        all
    };
    let one = results(place.trained(stage, 1, "one"));
    let (metrics, weights) = (flat("one"), all_weights(&place, "one"));
    assert!(metrics.iter().any(|(name, _)| name == "5/loss"), "{metrics:?}");
    for size in [2, 3] {
        let (out, context) = (format!("of-{size}"), format!("{} of {size} ranks", stage.name()));
        assert_close(&one, &results(place.trained(stage, size, &out)), &context);
        assert_close(&metrics, &flat(&out), &context);
        assert_close(&weights, &all_weights(&place, &out), &context);
    }
    // Resumed behind two steps of six, the run ends with the same bytes; it is another run's on another number of ranks.
    let before = (place.metrics("of-2"), place.weights("of-2"));
    let from = place.path("of-2/checkpoints/checkpoint-2");
    for size in [1, 3] {
        let refused = place.run(stage, size, "of-2", &|_| "data.jsonl", Some(&from));
        for error in refused.into_iter().map(|ran| ran.unwrap_err()) {
            assert_eq!(exit_code(&error), 2, "{error:#}");
            assert!(format!("{error:#}").contains("number of ranks (mpirun -n) was 2, now"), "{error:#}");
        }
    }
    let resumed = place.run(stage, 2, "of-2", &|_| "data.jsonl", Some(&from));
    resumed.into_iter().for_each(|ran| drop(ran.unwrap()));
    assert!((place.metrics("of-2"), place.weights("of-2")) == before, "{}: resumed to other bytes", stage.name());
    assert!(!place.path("of-2-1").exists());
}

#[test]
fn sft_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(Stage::Sft);
}

#[test]
fn reward_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(Stage::Reward);
}

#[test]
fn dpo_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(Stage::Dpo);
}

#[test]
fn kto_on_two_and_three_ranks_follows_one() {
    ranks_follow_one(Stage::Kto);
}

#[test]
fn a_rank_with_other_records_is_named_before_anything_is_written() {
    let place = Place::of(Stage::Sft);
    let data = |rank: usize| if rank == 1 { "other.jsonl" } else { "data.jsonl" };
    for (rank, ran) in place.run(Stage::Sft, 3, "out", &data, None).into_iter().enumerate() {
        let error = ran.unwrap_err();
        let said = if rank == 1 { "this rank has not" } else { "rank 1: this rank has not" };
        assert!(error.to_string().starts_with(said) && error.to_string().contains("data"), "{error:#}");
        assert_eq!(exit_code(&error), 2);
    }
    assert!(!place.path("out").exists());
}
