//! Small valid files of every kind, made here or by the program itself.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use fourfold::export::gguf_container::{Entry, KeyValue, write};
use fourfold::model_files::ModelFiles;
use fourfold::ops::weight::StorageDType;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// (name, content) of a folder's files.
pub type Files = Vec<(String, Vec<u8>)>;

/// A file of tests/golden.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The decoders of tests/golden/families.
pub const FAMILIES: [&str; 18] = [
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

/// A tokenizer of 64 words.
pub fn words() -> String {
    let vocab: serde_json::Map<String, Value> = (0..64).map(|i| (format!("t{i}"), json!(i))).collect();
    let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": "t0"});
    json!({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}).to_string()
}

fn safetensors(tensors: &BTreeMap<String, Vec<usize>>, keep: impl Fn(usize) -> bool) -> Vec<u8> {
    let number = |i: usize| ((i % 7) as f32 - 3.0) * 0.125;
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .enumerate()
        .filter(|(i, _)| keep(*i))
        .map(|(_, (name, shape))| {
            (name, shape, (0..shape.iter().product()).flat_map(|i| number(i).to_le_bytes()).collect())
        })
        .collect();
    let views = bytes.iter().map(|(n, s, b)| (*n, TensorView::new(Dtype::F32, (*s).clone(), b).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// A tiny decoder of a family as a Hugging Face folder, in one file or two with their index.
pub fn model(family: &str, sharded: bool) -> Files {
    let bytes = fs::read(golden(&format!("families/{family}.safetensors"))).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let told: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["golden"]).unwrap();
    let tensors: BTreeMap<String, Vec<usize>> = serde_json::from_value(told["shapes"].clone()).unwrap();
    let generation = json!({"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.7, "top_k": 50});
    let mut files: Files = vec![
        ("config.json".into(), told["config"].to_string().into_bytes()),
        ("generation_config.json".into(), generation.to_string().into_bytes()),
        ("tokenizer.json".into(), words().into_bytes()),
    ];
    if !sharded {
        files.push(("model.safetensors".into(), safetensors(&tensors, |_| true)));
        return files;
    }
    let shard = |i: usize| format!("model-0000{}-of-00002.safetensors", 1 + i % 2);
    let map: BTreeMap<&String, String> = tensors.keys().enumerate().map(|(i, name)| (name, shard(i))).collect();
    let index = json!({"metadata": {"total_size": 10_000}, "weight_map": map});
    files.push(("model.safetensors.index.json".into(), index.to_string().into_bytes()));
    for part in 0..2 {
        files.push((shard(part), safetensors(&tensors, |i| i % 2 == part)));
    }
    files
}

/// tests/golden/tokenizer_small.json's arrays as a GGUF holds them: byte-level BPE and SentencePiece, cut to `most` tokens.
fn tokenizer_keys(name: &str, most: usize, template: &str) -> (Vec<(String, KeyValue)>, usize) {
    let all: Value = serde_json::from_slice(&fs::read(golden("tokenizer_small.json")).unwrap()).unwrap();
    let found = all["tokenizers"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap();
    let arrays = &found["arrays"];
    let texts = |key: &str| -> Vec<String> {
        let list = arrays[key].as_array().into_iter().flatten();
        list.map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let mut tokens = texts("tokens");
    tokens.truncate(most);
    let known: std::collections::HashSet<&String> = tokens.iter().collect();
    let joined = |merge: &String| {
        let (a, b) = merge.split_once(' ').unwrap();
        [a.to_owned(), b.to_owned(), format!("{a}{b}")].iter().all(|part| known.contains(part))
    };
    let merges: Vec<String> = texts("merges").into_iter().filter(joined).collect();
    let numbers = |key: &str| arrays[key].as_array().into_iter().flatten().take(tokens.len());
    let types: Vec<i32> = numbers("token_type").map(|n| n.as_i64().unwrap() as i32).collect();
    let scores: Vec<f32> = numbers("scores").map(|n| n.as_f64().unwrap() as f32).collect();
    let text = |value: &Value| KeyValue::String(value.as_str().unwrap().into());
    let mut keys = vec![
        ("model".to_owned(), text(&arrays["tokenizer_type"])),
        ("pre".into(), text(&arrays["pre_tokenizer_type"])),
        ("token_type".into(), KeyValue::I32s(types)),
        ("eos_token_id".into(), KeyValue::U32(2)),
    ];
    if !merges.is_empty() {
        keys.push(("merges".into(), KeyValue::Strings(merges)));
    }
    if !scores.is_empty() {
        keys.push(("scores".into(), KeyValue::F32s(scores)));
    }
    let count = tokens.len();
    keys.push(("tokens".into(), KeyValue::Strings(tokens)));
    let mut keys: Vec<_> = keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    keys.push(("tokenizer.chat_template".into(), KeyValue::String(template.into())));
    (keys, count)
}

/// ChatML.
pub const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A Llama of one block in a GGUF file.
pub fn gguf(tokenizer: &str, dtype: StorageDType, rope_factors: bool, template: &str) -> Vec<u8> {
    let (mut keys, vocabulary) = tokenizer_keys(tokenizer, 300, template);
    let of = |key: &str, value| (format!("llama.{key}"), value);
    keys.extend([
        ("general.architecture".to_owned(), KeyValue::String("llama".into())),
        ("general.name".into(), KeyValue::String("tiny".into())),
        of("block_count", KeyValue::U32(1)),
        of("context_length", KeyValue::U32(64)),
        of("embedding_length", KeyValue::U32(32)),
        of("feed_forward_length", KeyValue::U32(32)),
        of("attention.head_count", KeyValue::U32(4)),
        of("attention.head_count_kv", KeyValue::U32(2)),
        of("attention.layer_norm_rms_epsilon", KeyValue::F32(1e-5)),
        of("rope.freq_base", KeyValue::F32(1e4)),
    ]);
    let mut table = vec![
        ("token_embd.weight", vec![vocabulary, 32], dtype),
        ("output_norm.weight", vec![32], StorageDType::F32),
        ("blk.0.attn_norm.weight", vec![32], StorageDType::F32),
        ("blk.0.ffn_norm.weight", vec![32], StorageDType::F32),
        ("blk.0.attn_q.weight", vec![32, 32], dtype),
        ("blk.0.attn_k.weight", vec![16, 32], dtype),
        ("blk.0.attn_v.weight", vec![16, 32], dtype),
        ("blk.0.attn_output.weight", vec![32, 32], dtype),
        ("blk.0.ffn_gate.weight", vec![32, 32], dtype),
        ("blk.0.ffn_up.weight", vec![32, 32], dtype),
        ("blk.0.ffn_down.weight", vec![32, 32], dtype),
    ];
    if rope_factors {
        table.push(("rope_freqs.weight", vec![4], StorageDType::F32));
    }
    let table: Vec<Entry> =
        table.into_iter().map(|(name, shape, dtype)| Entry { name: name.into(), shape, dtype }).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let bytes = |i: usize| {
        let count: usize = table[i].shape.iter().product();
        let values: Vec<f32> = (0..count).map(|n| 0.5 + ((n + i) % 5) as f32 * 0.125).collect();
        let cols = *table[i].shape.last().unwrap();
        let weight = fourfold::ops::weight::Weight::from_f32(&values, count / cols, cols)?;
        Ok(match table[i].dtype {
            StorageDType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            dtype => weight.quantised(dtype)?.bytes().to_vec(),
        })
    };
    write(&path, &keys, &table, bytes).unwrap();
    fs::read(path).unwrap()
}

/// Folders with a tokenizer: byte-level BPE, SentencePiece's BPE, and the crate's other kinds.
pub fn tokenizers() -> Vec<Files> {
    let mut all = vec![];
    for name in ["llama-bpe", "qwen2", "spm"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        fs::write(&path, gguf(name, StorageDType::F32, false, TEMPLATE)).unwrap();
        let side = ModelFiles::open(&path).unwrap().side_files().unwrap();
        all.push(side.into_iter().filter(|(name, _)| name.starts_with("tokenizer")).collect::<Files>());
    }
    let config = json!({"eos_token": "<e>", "bos_token": {"content": "<s>"}, "pad_token": null,
        "chat_template": [{"name": "default", "template": "{% for m in messages %}{{ m.content }}<e>{% endfor %}"}]});
    let added = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let added = json!([added(0, "<s>"), added(1, "<e>"), added(2, "<u>")]);
    let unigram = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true},
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": false, "vocab": [["<s>", 0.0], ["<e>", 0.0],
            ["<u>", 0.0], ["▁", -1.5], ["a", -2.0], ["b", -2.5], ["ab", -3.0], ["▁ab", -3.5], ["c", -4.0]]}});
    let piece = json!({"version": "1.0", "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst",
            "stride": 0}, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"},
            {"type": "Split", "pattern": {"Regex": "\\d{1,3}"}, "behavior": "Isolated", "invert": false}]},
        "post_processor": {"type": "BertProcessing", "sep": ["<e>", 1], "cls": ["<s>", 0]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "<u>", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"<s>": 0, "<e>": 1, "<u>": 2, "a": 3, "##b": 4, "ab": 5, "c": 6}}});
    for tokenizer in [unigram, piece] {
        let file = |name: &str, value: &Value| (name.to_owned(), value.to_string().into_bytes());
        all.push(vec![file("tokenizer.json", &tokenizer), file("tokenizer_config.json", &config)]);
    }
    all
}

/// The same content behind gzip.
pub fn gzipped(content: &str) -> Vec<u8> {
    let mut packed = GzEncoder::new(vec![], Compression::fast());
    packed.write_all(content.as_bytes()).unwrap();
    packed.finish().unwrap()
}

/// Records of every shape: (what reads them, values).
pub fn records() -> Vec<(&'static str, Vec<Value>)> {
    let chat = |user: &str, answer: &str| {
        json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": user},
            {"role": "assistant", "content": answer}])
    };
    let both = |of: &dyn Fn(&str, &str) -> Value| {
        vec![of("Is the hotel good?", " It is."), of("Is 7 prime?", " Yes."), of("Où?", " Là 𝄞.\n")]
    };
    vec![
        ("sft", both(&|q, a| json!({"prompt": q, "completion": a}))),
        ("sft", both(&|q, a| json!({"messages": chat(q, a)}))),
        ("sft", both(&|q, a| json!({"instruction": q, "input": "", "output": a}))),
        ("sft", both(&|q, a| json!({"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}))),
        ("sft", both(&|q, a| json!({"text": format!("{q}{a}")}))),
        ("reward", both(&|q, a| json!({"prompt": q, "chosen": a, "rejected": " No, it is not."}))),
        (
            "reward",
            both(&|q, a| {
                let both = |a: &str| format!("\n\nHuman: {q}\n\nAssistant:{a}");
                json!({"chosen": both(a), "rejected": both(" Never.")})
            }),
        ),
        ("reward", both(&|q, a| json!({"prompt": q, "responses": [a, " no", " maybe"], "scores": [3, 1, 2]}))),
        ("kto", both(&|q, a| json!({"prompt": q, "completion": a, "label": a.len() > 5}))),
        ("ppo", both(&|q, _| json!({"prompt": q}))),
    ]
}
