//! A tiny random decoder of every family against transformers and PEFT: logits of ragged batches, decoding over a cache,
//! gradients of every LoRA factor, and what leaves as GGUF. tests/golden/families.py printed the numbers; weights are made on both sides from the
//! tensors' names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fourfold::export::Source;
use fourfold::export::gguf::{self, GgufType};
use fourfold::export::merged::MergedType;
use fourfold::model::adapter::Adapter;
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Checkpointing;
use fourfold::model::checkpoint::Checkpoint;
use fourfold::model::generate::{Sampling, generate};
use fourfold::model::roles::Policy;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Value, json};

const CASES: [&str; 18] = [
    "llama_yarn_bias",
    "mistral_window",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3_longrope",
    "olmo2",
    "granite",
    "smollm3",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "opt",
    "opt_350m",
];

#[derive(Deserialize)]
struct Golden {
    config: Value,
    shapes: BTreeMap<String, Vec<usize>>,
    sequences: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
    #[serde(skip)]
    numbers: BTreeMap<String, Vec<f32>>,
}

fn golden(name: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/families/{name}.safetensors"));
    let bytes = fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let text = header.metadata().as_ref().unwrap()["golden"].clone();
    let mut golden: Golden = serde_json::from_str(&text).unwrap();
    for (key, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let numbers = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        golden.numbers.insert(key, numbers);
    }
    golden
}

/// Uniform in [-1, 1): SplitMix64's finaliser of FNV-1a(name) + index; the other half is in families.py.
fn values(name: &str, count: usize) -> Vec<f32> {
    let fnv = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3);
    let start = name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv);
    (0..count as u64)
        .map(|i| {
            let mut z = start.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            ((z >> 40) as f64 / f64::from(1 << 23) - 1.0) as f32
        })
        .collect()
}

fn weight(name: &str, shape: &[usize]) -> Vec<f32> {
    let shift = if shape.len() == 1 && name.ends_with(".weight") { 1.0 } else { 0.0 };
    values(name, shape.iter().product()).iter().map(|u| shift + 0.25 * u).collect()
}

fn save(path: &Path, tensors: &BTreeMap<String, Vec<usize>>) {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(n, s)| (n.clone(), s.clone(), weight(n, s).iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

struct Opened {
    golden: Golden,
    base: Base,
    dir: tempfile::TempDir,
}

fn open(name: &str) -> Opened {
    let (golden, dir) = (golden(name), tempfile::tempdir().unwrap());
    let write = |file: &str, text: String| fs::write(dir.path().join(file), text).unwrap();
    write("config.json", golden.config.to_string());
    // Bytes without a merge, of a kind that a GGUF file has a name for.
    let vocab: serde_json::Map<String, Value> = ('!'..='`').zip(0..).map(|(c, i)| (c.to_string(), json!(i))).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
    write(
        "tokenizer.json",
        json!({"version": "1.0", "pre_tokenizer": bytes, "decoder": bytes, "model": model}).to_string(),
    );
    save(&dir.path().join("model.safetensors"), &golden.shapes);
    let checkpoint = Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    let base = Base::load(&checkpoint).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    Opened { golden, base, dir }
}

impl Opened {
    /// PEFT's adapter over every linear map, its factors from their names.
    fn adapter(&self) -> Adapter {
        let at: PathBuf = self.dir.path().join("adapter");
        fs::create_dir_all(&at).unwrap();
        let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 5,
            "target_modules": "all-linear", "fan_in_fan_out": self.golden.config["model_type"] == "gpt2"});
        fs::write(at.join("adapter_config.json"), config.to_string()).unwrap();
        let shapes = self.base.shapes();
        let factors = (0..shapes.layers)
            .flat_map(|layer| (0..shapes.linears().len()).map(move |i| (layer, i)))
            .flat_map(|(layer, i)| {
                let ((inp, out), path) = (shapes.dims(i), shapes.module_path(layer, i));
                let name = |f: char| format!("base_model.model.{path}.lora_{f}.weight");
                [(name('A'), vec![2, inp]), (name('B'), vec![out, 2])]
            })
            .collect();
        save(&at.join("adapter_model.safetensors"), &factors);
        Adapter::load(&at, shapes).unwrap()
    }
}

fn furthest(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    // NaN must not pass as the smaller one.
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

#[test]
fn logits_of_a_ragged_batch_are_transformers_for_every_family() {
    for name in CASES {
        let Opened { golden, base, dir: _dir } = open(name);
        let hidden = base.hidden(&Batch::new(&golden.sequences).unwrap(), None).unwrap();
        let got = base.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let want: Vec<f32> = (0..2).flat_map(|i| golden.numbers[&format!("logits.{i}")].clone()).collect();
        let e = furthest(&got, &want);
        // Logits of size 1 to 10 through a few blocks of f32; a wrong choice anywhere is off by a tenth and more.
        assert!(e < 1e-4, "{name}: {e}");
        eprintln!("{name}: logits within {e:.1e}");
    }
}

#[test]
fn greedy_decoding_over_the_cache_is_transformers_for_every_family() {
    for name in CASES {
        let Opened { golden, base, dir: _dir } = open(name);
        let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 8, stop: vec![] };
        let got = generate(Policy::new(&base, None), &golden.sequences, &[0, 0], &sampling, |_, _| {}).unwrap();
        for (i, response) in got.iter().enumerate() {
            assert_eq!(response.tokens, golden.greedy[i], "{name}, prompt {i}");
            let e = furthest(&response.logprobs, &golden.numbers[&format!("greedy.{i}")]);
            assert!(e < 1e-4, "{name}, prompt {i}: {e}");
        }
    }
}

#[test]
fn gradients_of_every_lora_factor_are_pefts_for_every_family() {
    for name in CASES {
        let opened = open(name);
        let (golden, adapter) = (&opened.golden, opened.adapter());
        let batch = Batch::new(&golden.sequences).unwrap();
        let lengths: Vec<usize> = golden.sequences.iter().map(|s| s.len() - 1).collect();
        let targets = Targets::responses(&batch, &lengths).unwrap();
        let ones = vec![1f32; targets.rows.len()];
        let zeros = vec![0f32; targets.rows.len()];
        let policy = Policy::new(&opened.base, Some(&adapter));
        let (stats, gradients) =
            policy.gradients(&batch, &targets, 1.0, Checkpointing::Off, |_| Ok((ones, zeros))).unwrap();
        let want: Vec<f32> = (0..2).flat_map(|i| golden.numbers[&format!("lora_logprobs.{i}")].clone()).collect();
        let e = furthest(&stats.logprobs, &want);
        assert!(e < 1e-4, "{name}: log-probabilities with the adapter: {e}");
        let learner = adapter.to_trainable();
        let (names, flat) = (learner.names(), learner.flat_gradients(&gradients).unwrap());
        assert_eq!(names.len(), golden.numbers.keys().filter(|k| k.starts_with("grad.")).count(), "{name}");
        let mut worst = 0f32;
        for (factor, got) in names.iter().zip(flat) {
            let want = &golden.numbers[&format!("grad.{factor}")];
            let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let top = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let e = furthest(&got, want) / top.max(1.0);
            assert!(e < 1e-4, "{name}: {factor}: {e}");
            worst = worst.max(e);
        }
        eprintln!("{name}: gradients within {worst:.1e} of their tensor's largest");
    }
}

/// What a family's GGUF cannot say; all others are written.
const NO_GGUF: [(&str, &str); 5] = [
    ("gemma2", "what it multiplies attention by"),
    ("gemma3", "what it multiplies attention by"),
    ("smollm3", "which layers have a window and which turn"),
    ("opt", "no opt architecture"),
    ("opt_350m", "no opt architecture"),
];

#[test]
fn a_merged_gguf_of_every_family_has_pefts_log_probabilities_or_is_refused() {
    for name in CASES {
        let opened = open(name);
        let (golden, adapter) = (&opened.golden, opened.adapter());
        let checkpoint = Checkpoint::open(opened.dir.path()).unwrap();
        let (base, prompts) = (&opened.base, &golden.sequences);
        let source = Source { checkpoint: &checkpoint, base, adapter: &adapter, prompts, about: "" };
        let out = opened.dir.path().join("merged.gguf");
        let made = gguf::merge(&source, GgufType::Dense(MergedType::F32), &out);
        if let Some((_, says)) = NO_GGUF.iter().find(|(refused, _)| *refused == name) {
            let said = format!("{:#}", made.unwrap_err());
            assert!(said.contains(says) && said.contains("--format safetensors") && !out.exists(), "{name}: {said}");
            continue;
        }
        made.unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let written = Checkpoint::open(&out).unwrap();
        // Where llama.cpp has no windows, the file ends at the window's length.
        let context = written.config().max_position_embeddings;
        let merged = Base::load(&written).unwrap();
        for (i, sequence) in golden.sequences.iter().enumerate() {
            let sequence = &sequence[..sequence.len().min(context)];
            let batch = Batch::new(&[sequence]).unwrap();
            let targets = Targets::responses(&batch, &[sequence.len() - 1]).unwrap();
            let got = Policy::new(&merged, None).logprobs(&batch, &targets, 1.0).unwrap().logprobs;
            let e = furthest(&got, &golden.numbers[&format!("lora_logprobs.{i}")][..got.len()]);
            assert!(e < 1e-4, "{name}, sequence {i}: {e}");
        }
        // It checks itself: read again, it is the adapter.
        gguf::lora(&source, &opened.dir.path().join("lora.gguf")).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    }
}
