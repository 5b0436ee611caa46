//! The tokenizer of the real SmolLM2-135M-Instruct GGUF against transformers.

use fourfold::model_files::ModelFiles;
use fourfold::ops::weight::StorageDType;
use fourfold::tokenizer::chat_template::{GenerationPrompt, Message};
use fourfold::tokenizer::{SpecialTokens, Tokenizer, TokenizerFiles};
use serde_json::Value;

use crate::real_files::smollm2;

fn opened() -> ModelFiles {
    ModelFiles::open(&smollm2()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn assert_matches_golden(tokenizer: &Tokenizer) {
    let golden: Value = serde_json::from_str(include_str!("../golden/tokenizer_smollm2.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 11);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let got = tokenizer.encode(text, SpecialTokens::Add).unwrap();
        assert_eq!(got, ids(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode_with_special_tokens(&got).unwrap(), case["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&got).unwrap(), case["decoded_without_special_tokens"].as_str().unwrap());
        let mut stream = tokenizer.stream();
        let mut streamed: String = got.iter().map(|&id| stream.push(id).unwrap()).collect();
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, case["decoded_without_special_tokens"].as_str().unwrap());
    }
    let turn =
        |turn: &serde_json::Value| Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap());
    let messages: Vec<Message> = golden["chat"]["messages"].as_array().unwrap().iter().map(turn).collect();
    let text = tokenizer.apply_chat_template(&messages, GenerationPrompt::Add).unwrap();
    assert_eq!(text, golden["chat"]["text"].as_str().unwrap());
    assert_eq!(tokenizer.encode(&text, SpecialTokens::None).unwrap(), ids(&golden["chat"]["ids"]));
}

#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn smollm2_token_ids_match_transformers_golden() {
    let checkpoint = opened();
    assert_matches_golden(checkpoint.tokenizer());
    let t = checkpoint.tokenizer();
    assert_eq!((t.vocab_size(), t.bos_id(), t.eos_ids(), t.pad_id()), (49152, Some(1), &[2][..], Some(2)));
}

#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn smollm2s_synthesised_files_make_the_same_tokenizer_and_config() {
    let checkpoint = opened();
    let files = checkpoint.side_files().unwrap();
    let text = |name: &str| {
        let (_, bytes) = files.iter().find(|(n, _)| n == name).unwrap();
        std::str::from_utf8(bytes).unwrap()
    };
    let files = TokenizerFiles {
        tokenizer: text("tokenizer.json"),
        config: Some(text("tokenizer_config.json")),
        ..TokenizerFiles::default()
    };
    assert_matches_golden(&Tokenizer::from_files(files, "synthesised").unwrap());
    let config = fourfold::model::config::DecoderConfig::from_hf(text("config.json"), None, "synthesised").unwrap();
    assert_eq!(&config, checkpoint.config());
}

#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn smollm2s_tensors_open_in_their_stored_types() {
    let checkpoint = opened();
    let c = checkpoint.config().clone();
    assert_eq!((c.num_hidden_layers, c.hidden_size, c.head_dim, c.tie_word_embeddings), (30, 576, 64, true));
    assert_eq!(checkpoint.tensors().count(), 272);
    let embed = checkpoint.weight("model.embed_tokens.weight", c.vocab_size, c.hidden_size).unwrap();
    assert_eq!(embed.dtype(), StorageDType::Q8_0);
    let kv = c.num_key_value_heads * c.head_dim;
    assert_eq!(
        checkpoint.weight("model.layers.29.self_attn.k_proj.weight", kv, 576).unwrap().dtype(),
        StorageDType::Q4_1
    );
    assert!(checkpoint.vector("model.norm.weight", 576).unwrap().iter().all(|v| v.is_finite()));
    assert_eq!(checkpoint.fingerprint().len(), 64);
}

/// Printed by tests/golden/smollm2_weights.py.
#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn smollm2s_rows_match_transformers_golden_q_and_k_reordered() {
    let checkpoint = opened();
    let golden: Value = serde_json::from_str(include_str!("../golden/smollm2_weights.json")).unwrap();
    let rows = golden["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 34);
    for case in rows {
        let name = case["name"].as_str().unwrap();
        let shape: [usize; 2] = serde_json::from_value(case["shape"].clone()).unwrap();
        let weight = checkpoint.weight(name, shape[0], shape[1]).unwrap();
        let mut row = vec![0f32; shape[1]];
        weight.row(case["row"].as_u64().unwrap() as usize, &mut row);
        let want: Vec<f32> = serde_json::from_value(case["first"].clone()).unwrap();
        for (got, want) in row.iter().zip(&want) {
            // One f16 scale times a small integer, plus an f16 offset: the same up to one rounding.
            assert!((got - want).abs() <= 1e-6 * want.abs().max(1e-2), "{name}: {got} is not {want}");
        }
    }
}

#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn smollm2_is_described_by_inspect() {
    let checkpoint = opened();
    let described = fourfold::model_files::inspect::inspect(checkpoint.path().unwrap()).unwrap();
    assert_eq!(described["parameters"], 134_515_008);
    assert_eq!(described["types"]["q4_1"]["tensors"], 210);
    assert_eq!(described["tokenizer"]["chat_template"], true);
    println!("{}", fourfold::model_files::inspect::render(&described));
}
