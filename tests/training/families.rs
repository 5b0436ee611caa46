//! A tiny random decoder of every family against transformers and PEFT: logits of ragged batches, decoding over a cache,
//! gradients of every LoRA factor, and what leaves as GGUF. tests/golden/families.py printed the numbers; weights are made on both
//! sides from the tensors' names.

use std::fs;
use std::path::PathBuf;

use fourfold::export::Source;
use fourfold::export::gguf;
use fourfold::export::gguf::GgufType;
use fourfold::export::merged::MergedType;
use fourfold::model::adapter::{Adapter, NonBlockModule, TargetModule};
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::generate::{SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::model_files::ModelFiles;
use serde_json::json;

use crate::tiny_decoders::{Opened, furthest, open, save};

const CASES: [&str; 22] = [
    "llama",
    "llama_linear_tied",
    "llama3",
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
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_sequential",
    "opt",
    "opt_350m",
];

fn decoder(name: &str) -> Opened {
    open(&format!("families/{name}.safetensors"))
}

/// PEFT's adapter over every linear map, its factors from their names.
fn adapter(opened: &Opened) -> Adapter {
    let at: PathBuf = opened.dir.path().join("adapter");
    fs::create_dir_all(&at).unwrap();
    let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 5,
        "target_modules": "all-linear", "fan_in_fan_out": opened.golden.config["model_type"] == "gpt2"});
    fs::write(at.join("adapter_config.json"), config.to_string()).unwrap();
    let shapes = opened.base.shapes();
    let places = shapes
        .slots()
        .filter(|s| !matches!(s, TargetModule::NonBlockModule(NonBlockModule::Embedding | NonBlockModule::Head)));
    let factors = places
        .flat_map(|slot| {
            let ((inp, out), path) = (shapes.dims_of(slot), shapes.path(slot));
            let name = |f: char| format!("base_model.model.{path}.lora_{f}.weight");
            [(name('A'), vec![2, inp]), (name('B'), vec![out, 2])]
        })
        .collect();
    save(&at.join("adapter_model.safetensors"), &factors);
    Adapter::load(&at, shapes).unwrap()
}

#[test]
fn logits_of_a_ragged_batch_are_transformers_for_every_family() {
    for name in CASES {
        let Opened { golden, base, .. } = decoder(name);
        let hidden = base.hidden(&Batch::new(&golden.sequences).unwrap(), None).unwrap();
        let got = base.logits(&hidden, None).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let want: Vec<f32> = (0..2).flat_map(|i| golden.numbers[&format!("logits.{i}")].clone()).collect();
        let e = furthest(&got, &want);
        // Logits of size 1 to 10 through a few blocks of f32; a wrong choice anywhere is off by a tenth and more.
        assert!(e < 1e-4, "{name}: {e}");
        eprintln!("{name}: logits within {e:.1e}");
    }
}

#[test]
fn a_sequence_past_longropes_first_context_is_refused_with_the_reason() {
    let Opened { base, .. } = decoder("phi3_longrope");
    assert_eq!(base.config().max_position_embeddings, 32, "the original context, of 64");
    let error = base.hidden(&Batch::new(&[vec![3; 33]]).unwrap(), None).unwrap_err().to_string();
    assert!(error.contains("context of 32") && error.contains("longrope"), "{error}");
}

#[test]
fn greedy_decoding_over_the_cache_is_transformers_for_every_family() {
    for name in CASES {
        let Opened { golden, base, .. } = decoder(name);
        let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 8, stop: vec![] };
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
        let opened = decoder(name);
        let (golden, adapter) = (&opened.golden, adapter(&opened));
        let batch = Batch::new(&golden.sequences).unwrap();
        let lengths: Vec<usize> = golden.sequences.iter().map(|s| s.len() - 1).collect();
        let targets = Targets::responses(&batch, &lengths).unwrap();
        let ones = vec![1f32; targets.rows.len()];
        let zeros = vec![0f32; targets.rows.len()];
        let policy = Policy::new(&opened.base, Some(&adapter));
        let (stats, gradients) =
            policy.gradients(&batch, &targets, 1.0, Recompute::Off, |_| Ok((ones, zeros))).unwrap();
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

/// Where weights blow up, what comes out is no number: no norm, cap or activation makes one of what is past f32, which a
/// guard would take for good.
#[test]
fn activations_past_f32_come_out_as_nan_in_every_family() {
    for name in CASES {
        let opened = decoder(name);
        let adapter = adapter(&opened);
        let batch = Batch::new(&opened.golden.sequences).unwrap();
        let lengths: Vec<usize> = opened.golden.sequences.iter().map(|s| s.len() - 1).collect();
        let targets = Targets::responses(&batch, &lengths).unwrap();
        let logprobs = |adapter: &Adapter| {
            Policy::new(&opened.base, Some(adapter)).logprobs(&batch, &targets, 1.0).unwrap().logprobs
        };
        let learner = adapter.to_trainable();
        let names = learner.names();
        // 1e25: finite, and its square is not.
        for (scale, part) in [1e25, f64::INFINITY].into_iter().flat_map(|s| ["v_proj", "down"].map(|p| (s, p))) {
            let alike: &[&str] = match part {
                "v_proj" => &["v_proj", "qkv", "c_attn", "query_key_value"],
                _ => &["down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2"],
            };
            let mut weights = learner.parameters().unwrap();
            let grown = names.iter().position(|n| n.contains("lora_B") && alike.iter().any(|a| n.contains(a)));
            let grown = grown.unwrap_or_else(|| panic!("{name} has no {part}: {names:?}"));
            weights[grown] = (&weights[grown] * scale).unwrap();
            let mut spoilt = adapter.to_trainable();
            spoilt.replace(weights).unwrap();
            let got = logprobs(spoilt.view());
            assert!(got.iter().all(|l| l.is_nan()), "{name}, {part} times {scale}: {got:?}");
        }
    }
}

/// Families that GGUF cannot express; all others are exported.
const NO_GGUF: [(&str, &str); 6] = [
    ("gpt_neo", "no gpt_neo architecture"),
    ("gemma2", "what it multiplies attention by"),
    ("gemma3", "what it multiplies attention by"),
    ("smollm3", "which layers have a window or rotary embeddings"),
    ("opt", "no opt architecture"),
    ("opt_350m", "no opt architecture"),
];

#[test]
fn a_merged_gguf_of_every_family_has_pefts_log_probabilities_or_is_refused() {
    for name in CASES {
        let opened = decoder(name);
        let (golden, adapter) = (&opened.golden, adapter(&opened));
        let (checkpoint, base, prompts) = (&opened.checkpoint, &opened.base, &golden.sequences);
        let source = Source { files: checkpoint, base, adapter: &adapter, prompts, about: "" };
        let out = opened.dir.path().join("merged.gguf");
        let made = gguf::merge(&source, GgufType::Dense(MergedType::F32), None, &out);
        if let Some((_, says)) = NO_GGUF.iter().find(|(refused, _)| *refused == name) {
            let said = format!("{:#}", made.unwrap_err());
            assert!(said.contains(says) && said.contains("--format safetensors") && !out.exists(), "{name}: {said}");
            continue;
        }
        made.unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let written = ModelFiles::open(&out).unwrap();
        // Where llama.cpp has no windows, the file ends at the window's length.
        let context = written.config().max_position_embeddings;
        let merged = written.base().unwrap();
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
