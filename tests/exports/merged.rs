//! What `fourfold merge` writes in each format, read again: by this program here, by transformers, PEFT and llama.cpp in
//! tests/python.

use std::fs;

use crate::support::Place;
use fourfold::model::adapter::Adapter;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::run::Model;
use serde_json::Value;

/// The embedded base, an SFT adapter and a reward adapter with a centred head, all of whose factors moved.
fn trained() -> Place {
    let place = Place::new();
    place.train_sft_and_reward();
    place
}

impl Place {
    fn merge(&self, line: &str) -> Value {
        let ran = self.run(&format!("merge --base base --json {line}"));
        assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
        serde_json::from_str(&ran.stdout).unwrap()
    }

    fn model(&self, name: &str) -> Model {
        Model::open(&self.path(name)).unwrap()
    }

    fn adapter(&self, name: &str) -> Adapter {
        self.model("base").adapter(&self.path(name)).unwrap()
    }
}

fn logprobs(model: &Model, adapter: Option<&Adapter>) -> Vec<f32> {
    let batch = Batch::new(&[(3..60).collect::<Vec<u32>>(), (100..131).collect()]).unwrap();
    let targets = Targets::responses(&batch, &[56, 30]).unwrap();
    Policy::new(&model.base, adapter).logprobs(&batch, &targets, 1.0).unwrap().logprobs
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn a_merged_gguf_says_what_base_and_adapter_say_from_either_kind_of_base() {
    let p = trained();
    let want = logprobs(&p.model("base"), Some(&p.adapter("out/sft/adapter")));
    assert!(furthest(&want, &logprobs(&p.model("base"), None)) > 1e-3, "the adapter changes something");
    // Measured 1e-5 and 0.02, 0.02, 0.2 nats: each bound leaves some room.
    for (dtype, bound) in [("f32", 1e-4), ("f16", 0.05), ("bf16", 0.2), ("q8_0", 0.3), ("q4_k_m", 2.0)] {
        let told = p.merge(&format!("--adapter out/sft/adapter --format gguf --dtype {dtype} --out {dtype}.gguf"));
        assert!(told["mean_kl"].as_f64().unwrap() < f64::from(bound), "{told}");
        let model = p.model(&format!("{dtype}.gguf"));
        let difference = furthest(&logprobs(&model, None), &want);
        assert!(difference < bound, "{dtype}: {difference}");
        let text = "It's 3.14\n\n  naïve 東京 🦙";
        let encode =
            |m: &Model| m.checkpoint.tokenizer().encode(text, fourfold::tokenizer::SpecialTokens::Add).unwrap();
        assert_eq!(encode(&model), encode(&p.model("base")));
        assert_eq!(
            model.checkpoint.tokenizer().chat_template(),
            p.model("base").checkpoint.tokenizer().chat_template()
        );
        assert_eq!(model.checkpoint.config().eos_token_ids, [0]);
    }
    // A GGUF as base: the reward adapter on top; keys and tokenizer are carried along.
    let line = "--adapter out/sft/adapter --format gguf --dtype f32 --out twice.gguf";
    let ran = p.run(&format!("merge --base f32.gguf {line}"));
    assert_eq!(ran.code, 2, "it is another base, by its fingerprint: {}", ran.stderr);
    let config = "out/sft/adapter/adapter_model.safetensors";
    let bytes = fs::read(p.path(config)).unwrap();
    let key = b"fourfold.base_fingerprint";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    let bytes = [&bytes[..at], b"fourfold.base_fingerprin_", &bytes[at + key.len()..]].concat();
    p.write(config, bytes);
    let ran = p.run(&format!("merge --base f32.gguf {line}"));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let adapter = p.adapter("out/sft/adapter");
    let difference = furthest(&logprobs(&p.model("twice.gguf"), None), &logprobs(&p.model("f32.gguf"), Some(&adapter)));
    assert!(difference < 1e-4, "{difference}");
    let keys = |name: &str| {
        let model = p.model(name);
        let keys = model.checkpoint.gguf().unwrap().raw_values().map(|(k, v)| (k.to_string(), v.to_vec()));
        let mut keys: Vec<_> = keys.collect();
        keys.sort();
        keys
    };
    assert_eq!(keys("f32.gguf"), keys("twice.gguf"));
}

#[test]
fn shards_are_no_larger_than_asked_and_open_as_one() {
    let p = trained();
    p.merge("--adapter out/sft/adapter --dtype f32 --max-shard-size 500KB --out whole");
    let index: Value =
        serde_json::from_slice(&fs::read(p.path("whole/model.safetensors.index.json")).unwrap()).unwrap();
    let mut files: Vec<&str> = index["weight_map"].as_object().unwrap().values().map(|v| v.as_str().unwrap()).collect();
    files.sort_unstable();
    files.dedup();
    assert!(files.len() > 3 && files[0] == format!("model-00001-of-{:05}.safetensors", files.len()), "{files:?}");
    let sizes = files.iter().map(|f| fs::metadata(p.path("whole").join(f)).unwrap().len());
    // The vocabulary's table is 512 KiB and a file of its own; a header is below 4 KiB.
    assert!(sizes.clone().all(|s| s < 524_288 + 4096), "{:?}", sizes.collect::<Vec<_>>());
    let want = logprobs(&p.model("base"), Some(&p.adapter("out/sft/adapter")));
    assert!(furthest(&logprobs(&p.model("whole"), None), &want) < 1e-4);
    let card = fs::read_to_string(p.path("whole/README.md")).unwrap();
    for part in ["library_name: transformers", "## Verification", "greedy agreement", "learning_rate = 0.001", "r = 2"]
    {
        assert!(card.contains(part), "{part}: {card}");
    }
}

#[test]
fn a_reward_model_leaves_as_a_classifier_and_its_head_as_a_value_head() {
    let p = trained();
    let (base, reward) = (p.model("base"), p.adapter("out/reward/adapter"));
    let head = reward.head().unwrap();
    assert!(head.bias != 0.0, "the head was centred");
    p.merge("--adapter out/reward/adapter --format classifier --dtype f32 --out rm");
    let config: Value = serde_json::from_slice(&fs::read(p.path("rm/config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"][0], "LlamaForSequenceClassification");
    assert_eq!((config["id2label"].as_object().unwrap().len(), config["pad_token_id"].as_u64()), (1, Some(1)));
    let rm = p.model("rm");
    let weight = rm.checkpoint.weight("score.weight", 1, 128).unwrap().to_f32();
    assert_eq!(weight, head.weight.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    p.merge("--adapter out/reward/adapter --format value-head --out vh");
    assert!(p.path("vh/value_head.safetensors").is_file());
    let config: Value = serde_json::from_slice(&fs::read(p.path("vh/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["task_type"], &config["modules_to_save"]), (&"CAUSAL_LM".into(), &Value::Null));
    let back = p.adapter("vh");
    let batch = Batch::new(&[(3..40).collect::<Vec<u32>>()]).unwrap();
    let score = |a: &Adapter| ValueModel::new(&base.base, a).unwrap().scores(&batch).unwrap();
    assert_eq!(score(&reward), score(&back));
    // A value head that is damaged or of another width is one clear error.
    let good = fs::read(p.path("vh/value_head.safetensors")).unwrap();
    for bad in [&good[..good.len() / 2], b"PK\x03\x04 a pickle".as_slice(), b""] {
        p.write("vh/value_head.safetensors", bad);
        let ran = p.run("score --base base --adapter vh --data pairs.jsonl");
        assert!(ran.code == 2 && ran.stderr.contains("value_head.safetensors"), "{}", ran.stderr);
    }
    let ran = p.run("merge --base base --adapter out/sft/adapter --format classifier --out none");
    assert!(ran.code == 2 && ran.stderr.contains("scalar head") && !p.path("none").exists(), "{}", ran.stderr);
}

#[test]
fn adapters_add_up_with_their_weights_in_every_format() {
    let p = trained();
    let base = p.model("base");
    // Twice a half of one adapter is that adapter; all of it less all of it is the base.
    p.merge("--adapter out/sft/adapter=0.5 --adapter out/sft/adapter=0.5 --format peft --out same");
    let same = p.adapter("same");
    assert_eq!((same.config().r, same.config().scaling()), (4, 1.0));
    let want = logprobs(&base, Some(&p.adapter("out/sft/adapter")));
    assert!(furthest(&logprobs(&base, Some(&same)), &want) < 1e-5);
    p.merge("--adapter out/sft/adapter=1 --adapter out/sft/adapter=-1 --dtype f32 --out nothing");
    assert!(furthest(&logprobs(&p.model("nothing"), None), &logprobs(&base, None)) < 1e-5);
    // Two adapters: the merged sum is the first merged, and then the second over it.
    p.merge("--adapter out/reward/adapter --adapter out/sft/adapter=0.7 --dtype f32 --out sum");
    p.merge("--adapter out/reward/adapter --adapter out/sft/adapter=0.7 --format gguf-lora --out sum.gguf");
    for line in ["generate --base base --adapter sum.gguf --prompt hi", "generate --base sum.gguf --prompt hi"] {
        let ran = p.run(line);
        assert!(ran.code == 2 && ran.stderr.contains("sum.gguf is a LoRA adapter in GGUF"), "{line}: {}", ran.stderr);
    }
    let found: Value = serde_json::from_str(&p.run("inspect sum.gguf --json").stdout).unwrap();
    assert_eq!((&found["kind"], &found["architecture"]), (&"gguf-lora".into(), &"llama".into()), "{found}");
    let [one, other] = ["out/reward/adapter", "out/sft/adapter"].map(|path| p.adapter(path));
    assert_eq!(found["r"], serde_json::json!([one.config().r + other.config().r]));
    assert_eq!(found["layers"], base.base.config().num_hidden_layers);
    let targets = ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"];
    assert_eq!(found["target_tensors"], serde_json::json!(targets));
    assert_eq!(found["bytes"].as_u64(), found["parameters"].as_u64().map(|numbers| 4 * numbers));
    let text = p.run("inspect sum.gguf").stdout;
    assert!(text.contains("an adapter for llama.cpp (--lora)"), "{text}");
    p.merge("--adapter out/reward/adapter --dtype f32 --out first");
    p.merge("--adapter out/sft/adapter=0.7 --format peft --out second");
    let stacked = logprobs(&p.model("first"), Some(&p.adapter("second")));
    assert!(furthest(&logprobs(&p.model("sum"), None), &stacked) < 1e-4);
}

#[test]
fn an_export_that_cannot_be_leaves_nothing_behind() {
    let p = trained();
    for (name, keys) in
        [("dora", "--set lora.use_dora=true"), ("tokens", "--set lora.target_modules=[\"q_proj\",\"embed_tokens\"]")]
    {
        let ran = p.run(&format!("sft run.toml {keys} --out out/{name}"));
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        fs::rename(p.path(&format!("out/{name}/adapter")), p.path(name)).unwrap();
    }
    for (line, says) in [
        ("--adapter out/sft/adapter --dtype q8_0 --out new", "--format gguf"),
        ("--adapter out/sft/adapter --format gguf-lora --dtype bf16 --out new", "f32"),
        ("--adapter out/sft/adapter=nan --out new", "finite"),
        ("--adapter out/sft/adapter --max-shard-size 5XB --out new", "KB, MB and GB"),
        ("--adapter out/sft/adapter --format value-head --out new", "scalar head"),
        ("--adapter out/sft/adapter --out base", "already exists"),
        ("--adapter out/reward/adapter=0.5 --format peft --out new", "heads are neither weighted nor added up"),
        ("--adapter out/sft/adapter --adapter out/reward/adapter=0.5 --format value-head --out new", "scalar head"),
        ("--adapter out/reward/adapter --adapter out/reward/adapter --format classifier --out new", "scalar head"),
        (
            "--adapter dora --format gguf-lora --out new",
            "magnitudes; merge the adapter into the base instead: `--format gguf` or",
        ),
        (
            "--adapter tokens --format gguf-lora --out new",
            "GGUF-LoRA files; merge the adapter into the base instead: `--format safetensors`",
        ),
    ] {
        let ran = p.run(&format!("merge --base base {line}"));
        assert!(ran.code == 2 && ran.stderr.contains(says), "{line}: {} {}", ran.code, ran.stderr);
        assert!(!p.path("new").exists(), "{line}");
    }
    let left = fs::read_dir(p.path("")).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    assert!(left.into_iter().all(|name| !name.contains("partial")));
}

/// Every format with the file that must hold its card.
const FORMATS: [(&str, &str); 7] = [
    ("safetensors --dtype f32", "new/README.md"),
    ("safetensors --dtype f16", "new/README.md"),
    ("classifier --dtype f32", "new/README.md"),
    ("gguf --dtype f32", "new.gguf.md"),
    ("gguf-lora", "new.gguf.md"),
    ("peft", "new/README.md"),
    ("value-head", "new/README.md"),
];

#[test]
fn every_export_is_verified_and_its_card_says_how_close_it_came() {
    let p = trained();
    for (format, card) in FORMATS {
        let told = p.merge(&format!("--adapter out/reward/adapter --format {format} --out new"));
        let card = fs::read_to_string(p.path(card)).unwrap();
        let row = format!(
            "| {} | {:.2e} | {:.2} | {:.2e} | {:.2}% |",
            told["positions"],
            told["max_logit_difference"].as_f64().unwrap(),
            told["max_logit"].as_f64().unwrap(),
            told["mean_kl"].as_f64().unwrap(),
            100.0 * told["greedy_agreement"].as_f64().unwrap()
        );
        assert!(card.contains(&row) && card.contains("fingerprint") && told["positions"].as_u64() > Some(30), "{card}");
        for left in ["new", "new.gguf", "new.gguf.md"] {
            let path = p.path(left);
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.ok();
        }
    }
}

/// Numbers that are finite in the file and no longer in the network: whatever is written, it cannot be proven.
#[test]
fn an_export_that_fails_its_verification_leaves_nothing_in_any_format() {
    let p = trained();
    let good = p.adapter("out/reward/adapter");
    let mut layers = good.layers().to_vec();
    for pair in layers.iter_mut().flatten().flatten() {
        pair.b = pair.b.affine(1e30, 0.0).unwrap();
    }
    let (config, head) = (good.config().clone(), good.head().cloned());
    let wild = Adapter::from_parts(config, *good.shapes(), layers, head, good.provenance().clone()).unwrap();
    wild.save(&p.path("wild")).unwrap();
    let names = || -> std::collections::BTreeSet<_> {
        fs::read_dir(p.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    let before = names();
    for (format, _) in FORMATS {
        let ran = p.run(&format!("merge --base base --adapter wild --format {format} --out new"));
        assert!(ran.code != 0, "{format}: {}", ran.stdout);
        let says = if format.contains("f16") { "does not fit float16" } else { "nothing was kept" };
        assert!(ran.stderr.contains(says), "{format}: {}", ran.stderr);
        assert_eq!(names(), before, "{format}");
    }
}
