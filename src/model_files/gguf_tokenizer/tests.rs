//! Tests of tokenizers rebuilt from GGUF arrays against transformers, and of streaming with them.

use std::sync::Arc;

use super::*;
use crate::model_files::gguf::tests::Writer;
use crate::ops::weight::Bytes;
use crate::tokenizer::SpecialTokens;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/tokenizer_small.json")).unwrap()
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

/// Arrays of the golden file as GGUF keys.
fn gguf(arrays: &Value) -> Writer {
    let types: Vec<i32> = serde_json::from_value(arrays["token_type"].clone()).unwrap();
    let mut w = Writer::default()
        .string("tokenizer.ggml.model", arrays["tokenizer_type"].as_str().unwrap())
        .string("tokenizer.ggml.pre", arrays["pre_tokenizer_type"].as_str().unwrap())
        .strings("tokenizer.ggml.tokens", &texts(&arrays["tokens"]))
        .i32s("tokenizer.ggml.token_type", &types)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2);
    if arrays["merges"].is_array() {
        w = w.strings("tokenizer.ggml.merges", &texts(&arrays["merges"]));
    }
    if arrays["scores"].is_array() {
        w = w.f32s("tokenizer.ggml.scores", &serde_json::from_value::<Vec<f32>>(arrays["scores"].clone()).unwrap());
    }
    w
}

fn open(w: Writer) -> Result<Tokenizer> {
    tokenizer(&Gguf::parse(Bytes::new(Arc::new(w.finish())), "x.gguf")?)
}

fn arrays_of(name: &str) -> Value {
    let golden = golden();
    let found = golden["tokenizers"].as_array().unwrap().iter().find(|t| t["name"] == name);
    found.unwrap()["arrays"].clone()
}

/// Printed by tests/golden/tokenizer.py.
#[test]
fn tokenizers_rebuilt_from_gguf_arrays_match_transformers_golden() {
    for case in golden()["tokenizers"].as_array().unwrap() {
        let tokenizer = open(gguf(&case["arrays"])).unwrap();
        let cases = case["cases"].as_array().unwrap();
        assert!(cases.len() >= 9);
        for row in cases {
            let text = row["text"].as_str().unwrap();
            let want: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            let got = tokenizer.encode(text, SpecialTokens::None).unwrap();
            assert_eq!(got, want, "{}: {text:?}", case["name"]);
            let decoded = tokenizer.decode_with_special_tokens(&got).unwrap();
            assert_eq!(decoded, row["decoded"].as_str().unwrap(), "{}: {text:?}", case["name"]);
        }
    }
}

#[test]
fn special_tokens_are_added_as_the_file_or_its_kind_requires() {
    let plain = |t: &Tokenizer| t.encode("a", SpecialTokens::None).unwrap();
    let framed = |t: &Tokenizer| t.encode("a", SpecialTokens::Add).unwrap();
    let spm = open(gguf(&arrays_of("spm"))).unwrap();
    assert_eq!(framed(&spm), [&[1], &plain(&spm)[..]].concat());
    let llama3 = open(gguf(&arrays_of("llama-bpe"))).unwrap();
    assert_eq!(framed(&llama3), [&[1], &plain(&llama3)[..]].concat());
    let qwen = open(gguf(&arrays_of("qwen2"))).unwrap();
    assert_eq!(framed(&qwen), plain(&qwen));
    let off =
        gguf(&arrays_of("spm")).bool("tokenizer.ggml.add_bos_token", false).bool("tokenizer.ggml.add_eos_token", true);
    let off = open(off).unwrap();
    assert_eq!(framed(&off), [&plain(&off)[..], &[2]].concat());
}

#[test]
fn streaming_returns_the_same_text_in_whole_characters() {
    for name in ["llama-bpe", "spm"] {
        let tokenizer = open(gguf(&arrays_of(name))).unwrap();
        let text = "emoji 🙂🙃 👩‍👩‍👧‍👦 日本語 हिन्दी  two  spaces\n\nend 🙂";
        let ids = tokenizer.encode(text, SpecialTokens::None).unwrap();
        let mut stream = tokenizer.stream();
        let (mut out, mut held) = (String::new(), 0);
        for &id in &ids {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "{name}: {piece:?}");
            held += usize::from(piece.is_empty());
            out += &piece;
        }
        assert!(held > 0, "{name}: no character was split, so nothing was tested");
        out += &stream.finish().unwrap();
        assert_eq!(out, text, "{name}");
    }
}

#[test]
fn bytes_that_never_form_a_character_are_returned_in_the_end() {
    let tokenizer = open(gguf(&arrays_of("spm"))).unwrap();
    let lone = tokenizer.id("<0xF0>").unwrap();
    let mut stream = tokenizer.stream();
    let given: String = (0..12).map(|_| stream.push(lone).unwrap()).collect();
    let all = given.clone() + &stream.finish().unwrap();
    assert!(!given.is_empty(), "buffered for ever");
    assert_eq!(all.chars().filter(|&c| c == '\u{FFFD}').count(), 12);
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(lone).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn invalid_gguf_tokenizers_are_refused_by_name() {
    let refusal = |w: Writer| open(w).err().expect("must be refused").to_string();
    let named = |model: &str, pre: &str| {
        Writer::default().string("tokenizer.ggml.model", model).string("tokenizer.ggml.pre", pre)
    };
    let tokens = |w: Writer| w.strings("tokenizer.ggml.tokens", &["a", "b"]);
    assert!(refusal(Writer::default()).contains("carries no tokenizer"));
    assert!(refusal(tokens(named("bert", "default"))).contains("bert"));
    assert!(refusal(tokens(named("gpt2", "tekken"))).contains("tekken"));
    assert!(refusal(named("gpt2", "default")).contains("tokens has 0"));
    assert!(refusal(tokens(named("gpt2", "default"))).contains("merges is missing"));
    assert!(refusal(tokens(named("llama", "default"))).contains("scores has 0"));
    let merges = |list: &[&str]| tokens(named("gpt2", "default")).strings("tokenizer.ggml.merges", list);
    assert!(refusal(merges(&["ab"])).contains("not two tokens"));
    assert!(refusal(merges(&["a c"])).contains("cannot be read"));
    assert!(refusal(merges(&[]).u32("tokenizer.ggml.bos_token_id", 2)).contains("outside the vocabulary"));
    assert!(refusal(merges(&[]).i32s("tokenizer.ggml.token_type", &[1])).contains("token_type 1"));
    let long = "x".repeat(2000);
    let long = named("llama", "x").strings("tokenizer.ggml.tokens", &[&long]).f32s("tokenizer.ggml.scores", &[0.0]);
    assert!(refusal(long).contains("2000 bytes"));
}

/// llama.cpp warns of it, too.
#[test]
fn a_file_that_does_not_say_how_it_splits_text_is_doubted() {
    let doubts_of = |w: Writer| doubts(&Gguf::parse(Bytes::new(Arc::new(w.finish())), "x.gguf").unwrap());
    let bare = || Writer::default().string("tokenizer.ggml.model", "gpt2");
    let said = doubts_of(bare()).unwrap();
    assert!(said.contains("x.gguf: tokenizer.ggml.pre is missing") && said.contains("convert_hf_to_gguf.py"), "{said}");
    assert_eq!(doubts_of(bare().string("tokenizer.ggml.pre", "qwen2")), None);
    assert_eq!(
        doubts_of(Writer::default().string("tokenizer.ggml.model", "llama")),
        None,
        "SentencePiece splits no text"
    );
}
