//! Tests of opening small models in temporary directories, valid and damaged.

use crate::model_files::ModelFiles;
use crate::model_files::gguf::tests::Writer;
use crate::tokenizer::SpecialTokens;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::fs;
use tempfile::TempDir;

fn config() -> Value {
    json!({"model_type": "llama", "vocab_size": 4, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true, "eos_token_id": 3})
}

fn tokenizer() -> Value {
    json!({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "a": 1, "b": 2, "end": 3}}})
}

fn numbers(count: usize, first: f32) -> Vec<f32> {
    (0..count).map(|i| first + i as f32).collect()
}

fn safetensors(tensors: &[(&str, &[usize], &[f32])]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

const Q: &str = "model.layers.0.self_attn.q_proj.weight";

fn weights() -> Vec<u8> {
    safetensors(&[
        ("model.embed_tokens.weight", &[4, 8], &numbers(32, 0.0)),
        ("model.norm.weight", &[8], &numbers(8, 100.0)),
        (Q, &[8, 8], &numbers(64, 200.0)),
    ])
}

/// A valid model directory, of which tests damage one file.
pub(crate) fn directory() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": {"content": "end"}}"#).unwrap();
    fs::write(dir.path().join("model.safetensors"), weights()).unwrap();
    dir
}

fn refusal(dir: &TempDir) -> String {
    ModelFiles::open(dir.path()).err().expect("must be refused").to_string()
}

fn sharded(second: &str) -> TempDir {
    let dir = directory();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let embed: (&str, &[usize], &[f32]) = ("model.embed_tokens.weight", &[4, 8], &numbers(32, 0.0));
    fs::write(dir.path().join("m-1.safetensors"), safetensors(&[embed])).unwrap();
    let rest = safetensors(&[("model.norm.weight", &[8], &numbers(8, 100.0)), (Q, &[8, 8], &numbers(64, 200.0))]);
    fs::write(dir.path().join("m-2.safetensors"), rest).unwrap();
    let index = json!({"weight_map":
        {"model.embed_tokens.weight": "m-1.safetensors", "model.norm.weight": second, Q: "m-2.safetensors"}});
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir
}

pub(crate) fn gguf() -> Vec<u8> {
    // llama.cpp's order within each head of four rows: 0 2 1 3.
    let interleaved: Vec<f32> =
        [0, 2, 1, 3, 4, 6, 5, 7].iter().flat_map(|row| numbers(8, 200.0 + 8.0 * *row as f32)).collect();
    Writer::default()
        .string("general.architecture", "llama")
        .string("general.name", "tiny")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 2048)
        .u32("llama.embedding_length", 8)
        .u32("llama.feed_forward_length", 4)
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-6)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "smollm")
        .strings("tokenizer.ggml.tokens", &["a", "b", "ab", "<end>"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 3])
        .strings("tokenizer.ggml.merges", &["a b"])
        .u32("tokenizer.ggml.eos_token_id", 3)
        .f32_tensor("token_embd.weight", &[4, 8], &numbers(32, 0.0))
        .f32_tensor("output_norm.weight", &[8], &numbers(8, 100.0))
        .f32_tensor("blk.0.attn_q.weight", &[8, 8], &interleaved)
        .finish()
}

fn check_tensors(files: &ModelFiles) {
    assert_eq!(files.weight("model.embed_tokens.weight", 4, 8).unwrap().to_f32(), numbers(32, 0.0));
    assert_eq!(files.vector("model.norm.weight", 8).unwrap(), numbers(8, 100.0));
    assert_eq!(files.weight(Q, 8, 8).unwrap().to_f32(), numbers(64, 200.0));
    assert!(files.has(Q) && !files.has("lm_head.weight"));
    assert_eq!(files.tensors().count(), 3);
    assert_eq!(files.config().vocab_size, 4);
    assert_eq!(files.tokenizer().eos_ids(), [3]);
}

#[test]
fn one_file_shards_embedded_bytes_and_a_gguf_hold_the_same_tensors() {
    let dir = directory();
    let whole = ModelFiles::open(dir.path()).unwrap();
    check_tensors(&whole);
    let shards = sharded("m-2.safetensors");
    let shards = ModelFiles::open(shards.path()).unwrap();
    check_tensors(&shards);
    assert_eq!(shards.files().len(), 2);
    let bytes: &'static [u8] = Vec::leak(weights());
    let tokenizer_config = r#"{"eos_token": "end"}"#;
    let texts = (config().to_string(), tokenizer().to_string());
    let embedded = ModelFiles::from_embedded(&texts.0, "{}", &texts.1, tokenizer_config, bytes).unwrap();
    check_tensors(&embedded);
    assert_eq!(embedded.path(), None);
    assert_eq!(whole.fingerprint(), shards.fingerprint());
    assert_eq!(whole.fingerprint(), embedded.fingerprint());
    let path = dir.path().join("m.gguf");
    fs::write(&path, gguf()).unwrap();
    let gguf = ModelFiles::open(&path).unwrap();
    check_tensors(&gguf);
    assert_ne!(gguf.fingerprint(), whole.fingerprint());
    assert_eq!(gguf.tokenizer().encode("abb<end>", SpecialTokens::Add).unwrap(), [2, 1, 3]);
}

#[test]
fn the_fingerprint_sees_a_change_of_any_tensor() {
    let dir = directory();
    let before = ModelFiles::open(dir.path()).unwrap().fingerprint();
    let mut bytes = weights();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    assert_ne!(ModelFiles::open(dir.path()).unwrap().fingerprint(), before);
}

#[test]
fn a_ggufs_side_files_open_again_as_a_hugging_face_model() {
    let dir = directory();
    fs::write(dir.path().join("m.gguf"), gguf()).unwrap();
    let gguf = ModelFiles::open(&dir.path().join("m.gguf")).unwrap();
    for (name, bytes) in gguf.side_files().unwrap() {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let again = ModelFiles::open(dir.path()).unwrap();
    assert_eq!(again.config(), gguf.config());
    assert_eq!(again.tokenizer().encode("ab<end>", SpecialTokens::None).unwrap(), [2, 3]);
    assert_eq!(again.side_files().unwrap().len(), 3);
}

#[test]
fn truncated_or_damaged_safetensors_do_not_panic() {
    let dir = directory();
    let (path, whole) = (dir.path().join("model.safetensors"), weights());
    for len in (0..whole.len()).step_by(64).chain([1, 7, 8, 9, whole.len() - 1]) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(refusal(&dir).contains("model.safetensors"), "cut at {len}");
    }
    for at in 0..200 {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        fs::write(&path, &bytes).unwrap();
        let _ = ModelFiles::open(dir.path()).map(|c| c.fingerprint());
    }
}

/// Headers that the safetensors crate never writes.
#[test]
fn safetensors_with_invalid_headers_are_refused() {
    let dir = directory();
    let path = dir.path().join("model.safetensors");
    let file = |length: Option<u64>, header: &str, data: usize| {
        let length = length.unwrap_or(header.len() as u64).to_le_bytes();
        fs::write(&path, [&length[..], header.as_bytes(), &vec![0; data]].concat()).unwrap();
        refusal(&dir)
    };
    let of = |name: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let one = |text: String| format!("{{{text}}}");
    let all = |header: &str, data: usize| file(None, header, data);
    for message in [
        file(Some(1 << 40), "{}", 0),
        file(Some(u64::MAX), "{}", 0),
        file(Some(400), &one(of("a", "[1]", 0, 4)), 4),
        all(&format!("{{{},{}}}", of("a", "[2]", 0, 8), of("b", "[2]", 4, 12)), 12),
        all(&one(of("a", "[2]", 8, 0)), 8),
        all(&one(of("a", "[2]", 0, 8)), 4),
        all(&one(of("a", "[2]", 4, 12)), 12),
        all(&one(of("a", "[4294967296,4294967296,4294967296]", 0, 8)), 8),
        all(&one(of("a", "[18446744073709551615,2]", 0, 8)), 8),
        all(&one(of("a", "[3]", 0, 8)), 8),
        all("[]", 0),
        all("\u{0}\u{1}", 0),
    ] {
        assert!(message.contains("model.safetensors") && message.contains("fetch it again"), "{message}");
    }
}

#[test]
fn a_gguf_cut_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (path, whole) = (dir.path().join("m.gguf"), gguf());
    for len in (0..whole.len()).step_by(64).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(ModelFiles::open(&path).is_err(), "cut at {len}");
    }
}

#[test]
fn errors_name_the_tensor_and_what_is_wrong_with_it() {
    let dir = directory();
    let files = ModelFiles::open(dir.path()).unwrap();
    let missing = files.weight("lm_head.weight", 4, 8).err().unwrap().to_string();
    assert!(missing.contains("lm_head.weight is missing"), "{missing}");
    let shape = files.weight(Q, 8, 9).err().unwrap().to_string();
    assert!(shape.contains("[8, 8]") && shape.contains("[8, 9]") && shape.contains("model.safetensors"), "{shape}");
    assert!(files.vector(Q, 64).is_err() && files.weight("model.norm.weight", 8, 1).is_err());

    let view = TensorView::new(Dtype::I64, vec![1], &[0; 8]).unwrap();
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize([(Q, view)], None).unwrap()).unwrap();
    let integers = ModelFiles::open(dir.path()).unwrap();
    assert!(integers.weight(Q, 8, 8).err().unwrap().to_string().contains("I64"));
    let biased = safetensors(&[("model.layers.0.self_attn.q_proj.bias", &[8], &numbers(8, 0.0))]);
    fs::write(dir.path().join("model.safetensors"), biased).unwrap();
    assert!(refusal(&dir).contains("no bias"));
}

#[test]
fn an_index_cannot_point_outside_of_the_directory() {
    for outside in ["../m-2.safetensors", "/etc/passwd", "a/m-2.safetensors", "..", ".", "", "./m-2.safetensors"] {
        let message = refusal(&sharded(outside));
        assert!(message.contains("no file name"), "{outside}: {message}");
    }
    assert!(refusal(&sharded("m-1.safetensors")).contains("promises"));
    assert!(refusal(&sharded("absent.safetensors")).contains("absent.safetensors"));
}

#[test]
fn missing_files_are_named() {
    for (file, says) in [
        ("config.json", "no config.json"),
        ("model.safetensors", "neither model.safetensors nor"),
        ("tokenizer.json", "no tokenizer.json"),
    ] {
        let dir = directory();
        fs::remove_file(dir.path().join(file)).unwrap();
        assert!(refusal(&dir).contains(says), "{}", refusal(&dir));
    }
    let dir = directory();
    assert!(ModelFiles::open(&dir.path().join("model.safetensors")).err().unwrap().to_string().contains("directory"));
    assert!(ModelFiles::open(&dir.path().join("nowhere")).is_err());
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "absent"}"#).unwrap();
    assert!(refusal(&dir).contains("absent"));
}

#[test]
fn tokens_without_an_embedding_are_refused_when_encoded() {
    let dir = directory();
    let mut tokenizer = tokenizer();
    tokenizer["model"]["vocab"]["extra"] = json!(4);
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let files = ModelFiles::open(dir.path()).unwrap();
    assert_eq!(files.tokenizer().encode("a b", SpecialTokens::Add).unwrap(), [1, 2]);
    assert!(files.tokenizer().encode("a extra", SpecialTokens::Add).unwrap_err().to_string().contains("extra"));
}
