//! Records in every kind of file, token caches, and the configs that name them.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::Result;
use fourfold::config;
use fourfold::config::Stage;
use fourfold::data::examples::objectives::{
    Objective, PromptExample, RankedExample, Report, SftExample, UnpairedExample,
};
use fourfold::data::examples::{Example, Examples};
use fourfold::data::prepare;
use fourfold::data::stream::cache::{Cache, Stored, Writer};
use fourfold::quickstart::base::BASE;
use fourfold::tokenizer::{Tokenizer, TokenizerFiles};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::campaign::{Reader, Specimen, campaign};
use crate::mutate::Form;
use crate::specimens::{golden, gzipped, records};

fn tokenizer() -> &'static Tokenizer {
    static ONE: OnceLock<Tokenizer> = OnceLock::new();
    ONE.get_or_init(|| {
        let files = TokenizerFiles {
            tokenizer: BASE.tokenizer,
            config: Some(BASE.tokenizer_config),
            ..TokenizerFiles::default()
        };
        Tokenizer::from_files(files, "the embedded model").unwrap().for_model(&[0], 1024)
    })
}

/// Every example of a data file, as a stage takes them; the file's name begins with the stage's.
pub fn prepared(dir: &Path, name: &str) -> Result<()> {
    fn all<T: Objective + Stored>(config: &config::Config) -> Result<()> {
        let prepared = prepare::<T>(config.data()?, tokenizer(), 1, true)?;
        prepared.train.to_vec().map(drop)
    }
    let path = dir.join(name);
    let settings = dir.join("run.toml");
    if !settings.exists() {
        fs::write(
            &settings,
            format!("[base]\npath = \"b\"\n[data]\npath = {:?}\neval_rows = 0\nmax_length = 200\n", path.display()),
        )?;
    }
    let config = config::load(&settings, &[])?;
    match name.split('-').next() {
        Some("sft") => all::<SftExample>(&config),
        Some("reward") => all::<RankedExample>(&config),
        Some("kto") => all::<UnpairedExample>(&config),
        _ => all::<PromptExample>(&config),
    }
}

fn lines(values: &[Value]) -> String {
    values.iter().map(|value| format!("{value}\n")).collect()
}

/// A file of each kind of records.
fn files(ending: &str, form: Form, write: impl Fn(&[Value]) -> Vec<u8>) -> Vec<Specimen> {
    let all = records().into_iter();
    all.map(|(stage, values)| Specimen::file(&format!("{stage}-x.{ending}"), write(&values), form)).collect()
}

#[test]
fn json_lines_are_read_or_refused() {
    campaign("data::json_lines_are_read_or_refused", || {
        Reader::new(files("jsonl", Form::JsonLines, |values| lines(values).into_bytes()), prepared)
    });
}

#[test]
fn json_arrays_are_read_or_refused() {
    campaign("data::json_arrays_are_read_or_refused", || {
        let array = |values: &[Value]| Value::Array(values.to_vec()).to_string().into_bytes();
        Reader::new(files("json", Form::Json, array), prepared)
    });
}

#[test]
fn gzipped_records_are_read_or_refused() {
    campaign("data::gzipped_records_are_read_or_refused", || {
        let array = |values: &[Value]| gzipped(&Value::Array(values.to_vec()).to_string());
        let mut specimens = files("jsonl.gz", Form::Gzip, |values| gzipped(&lines(values)));
        specimens.extend(files("json.gz", Form::Gzip, array));
        Reader::new(specimens, prepared)
    });
}

#[test]
fn tables_are_read_or_refused() {
    campaign("data::tables_are_read_or_refused", || {
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let table = |values: &[Value], delimiter: &str| {
            let keys: Vec<&String> = values[0].as_object().unwrap().keys().collect();
            let header = keys.iter().map(|key| key.as_str()).collect::<Vec<_>>().join(delimiter);
            let row = |value: &Value| {
                let cells = keys.iter().map(|key| match &value[key.as_str()] {
                    Value::String(text) => quoted(text),
                    other => quoted(&other.to_string()),
                });
                cells.collect::<Vec<_>>().join(delimiter)
            };
            let rows: Vec<String> = values.iter().map(row).collect();
            format!("{header}\n{}\n", rows.join("\n")).into_bytes()
        };
        let mut specimens = files("csv", Form::Text, |values| table(values, ","));
        specimens.extend(files("tsv", Form::Text, |values| table(values, "\t")));
        Reader::new(specimens, prepared)
    });
}

#[test]
fn parquet_files_are_read_or_refused() {
    campaign("data::parquet_files_are_read_or_refused", || {
        let kinds = ["gzip", "lz4", "none", "snappy", "zstd"];
        let mut names: Vec<(String, &str)> =
            kinds.iter().map(|kind| (format!("parquet/messages-{kind}.parquet"), "sft")).collect();
        names.push(("parquet/ranked.parquet".into(), "reward"));
        let specimen = |(name, stage): &(String, &str)| {
            Specimen::file(&format!("{stage}-x.parquet"), fs::read(golden(name)).unwrap(), Form::Binary)
        };
        Reader::new(names.iter().map(specimen).collect(), prepared)
    });
}

/// A campaign of its own, so that the inputs of the other keep their numbers.
#[test]
fn brotli_parquet_files_are_read_or_refused() {
    campaign("data::brotli_parquet_files_are_read_or_refused", || {
        let specimen = |(name, stage): (&str, &str)| {
            let bytes = fs::read(golden(&format!("parquet/{name}.parquet"))).unwrap();
            Specimen::file(&format!("{stage}-x.parquet"), bytes, Form::Binary)
        };
        Reader::new([("messages-brotli", "sft"), ("unread", "sft")].map(specimen).into(), prepared)
    });
}

#[test]
fn texts_are_read_or_refused() {
    campaign("data::texts_are_read_or_refused", || {
        let text = "The hotel is good.\n\nIt is 7 minutes away.\r\nOù? Là 𝄞.\n".repeat(5);
        Reader::new(vec![Specimen::file("sft-x.txt", text, Form::Text)], prepared)
    });
}

#[test]
fn configs_are_read_or_refused() {
    campaign("data::configs_are_read_or_refused", || {
        let mut specimens = vec![];
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smollm2-135m");
        // Their paths hold variables that are not set here.
        let plain = |text: String| text.replace('$', "");
        for name in ["sft", "reward", "ppo"] {
            let text = plain(fs::read_to_string(folder.join(format!("{name}.toml"))).unwrap());
            specimens.push(Specimen::file("run.toml", text, Form::Text));
        }
        let rich = "seed = 3\noutput_dir = \"o\"\n[base]\npath = \"b\"\nquantize = \"q8_0\"\n[lora]\nr = 4\n\
            target_modules = [\"q_proj\", \"v_proj\"]\nlayers_to_transform = [0, 2]\n[lora.rank_pattern]\nq_proj = 8\n\
            [checkpoint]\nsave_steps = 10\n[guard]\nmax_kl = 50.0\n[data]\ntemplate = \"plain\"\n\
            [[data.sources]]\npath = [\"a.jsonl\", \"b/*.json\"]\nweight = 2.0\n[data.sources.columns]\nprompt = \"q\"\n\
            [[data.sources]]\npath = \"c.csv\"\nmax_rows = 5\n[ppo]\nreward_adapter = \"r\"\nbatch_size = 8\n\
            num_mini_batches = 2\ntotal_episodes = 64\n[[ppo.reward]]\nkind = \"command\"\ncommand = [\"judge\", \"--fast\"]\n\
            [[ppo.reward]]\nkind = \"http\"\nurl = \"http://127.0.0.1:9/x\"\nweight = 0.5\n[ppo.ptx]\npath = \"t.txt\"\n\
            [dpo]\nbeta = 0.1\n[kto]\nbeta = 0.1\n[sft]\nlearning_rate = 1e-4\n[reward]\nlearning_rate = 1e-4\n";
        specimens.push(Specimen::file("run.toml", rich, Form::Text));
        // Every default written out, as a run's folder has it.
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("run.toml"), rich).unwrap();
        let config = config::load(&dir.path().join("run.toml"), &[]).unwrap();
        specimens.push(Specimen::file("run.toml", config.to_toml().unwrap(), Form::Text));
        Reader::new(specimens, |dir, name| {
            let config = config::load(&dir.join(name), &["lora.lora_alpha=8".into()])?;
            config.output_dir(Stage::Ppo);
            config.to_toml().map(drop)
        })
    });
}

/// SHA-256 of a cache's content and numbers, put where they belong.
fn mend(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        if let Some((header, content)) = bytes.split_at_mut_checked(112) {
            let sum = Sha256::new().chain_update(content).chain_update(&header[..80]).finalize();
            header[80..].copy_from_slice(&sum);
            fs::write(&path, bytes).unwrap();
        }
    }
}

#[test]
fn token_caches_are_read_or_refused() {
    const KEY: [u8; 32] = [7; 32];
    fn file<T: Example + Stored>(name: &str, examples: &[T]) -> Specimen {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        let mut writer = Writer::create(&path, KEY).unwrap();
        examples.iter().for_each(|example| writer.push(example, 3).unwrap());
        writer.finish(&Report { read: examples.len(), kept: examples.len(), ..Report::default() }).unwrap();
        Specimen::file(name, fs::read(path).unwrap(), Form::Binary)
    }
    fn all<T: Example + Stored>(path: &Path) -> Result<()> {
        let cache = Cache::<T>::open(path, &KEY)?;
        let (rows, _) = (cache.len(), cache.groups().sum::<u64>());
        (0..rows.min(1000)).try_for_each(|row| {
            let _ = (cache.tokens(row), cache.longest_sequence());
            cache.get(row).map(drop)
        })
    }
    campaign("data::token_caches_are_read_or_refused", || {
        let sft =
            |n: u32| SftExample { tokens: (0..n).collect(), loss_mask: (0..n).map(|t| t > 1 && t % 5 != 0).collect() };
        let ranked = |n: u32| RankedExample {
            prompt: vec![n, 5],
            responses: vec![vec![1, n, 0], vec![2, 0]],
            label: Default::default(),
        };
        let judged = |n: u32| UnpairedExample { prompt: vec![n], response: vec![n, 0], desirable: n.is_multiple_of(2) };
        let prompt = |n: u32| PromptExample {
            tokens: vec![n; 3],
            text: "où?".into(),
            answer: (n > 5).then(|| "7".into()),
            entry: n as usize,
        };
        let specimens = vec![
            file("sft-x", &[sft(2), sft(20), sft(7)]),
            file("reward-x", &[ranked(3), ranked(9)]),
            file("kto-x", &[judged(3), judged(8)]),
            file("ppo-x", &[prompt(3), prompt(9)]),
        ];
        let read = |dir: &Path, name: &str| match name.split('-').next() {
            Some("sft") => all::<SftExample>(&dir.join(name)),
            Some("reward") => all::<RankedExample>(&dir.join(name)),
            Some("kto") => all::<UnpairedExample>(&dir.join(name)),
            _ => all::<PromptExample>(&dir.join(name)),
        };
        // A cache that cannot be used is made anew: no error of the user's.
        Reader { mend: Some(mend), codes: &[1, 2], ..Reader::new(specimens, read) }
    });
}
