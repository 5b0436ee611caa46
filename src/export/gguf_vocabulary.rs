//! The tokenizer keys of a GGUF file made from a Hugging Face model, as llama.cpp's converter writes them.
//!
//! It does not depend on weights. Read `gguf.rs` for the file, `model_files/gguf_tokenizer.rs` for the inverse.

use std::collections::HashMap;

use anyhow::Result;
use serde_json::Value;

use super::gguf_architecture::{Keys, put};
use super::gguf_container::KeyValue;
use crate::invalid;
use crate::model_files::ModelFiles;
use crate::model_files::gguf_tokenizer::{LLAMA3_SPLIT, QWEN2_SPLIT};
use crate::tokenizer::{SpecialTokens, Tokenizer};

/// `llama_token_type` in llama.cpp.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The tokenizer's keys.
///
/// # Errors
/// If llama.cpp has no name for the tokenizer's kind or for the way in which it splits text.
pub(super) fn tokenizer(files: &ModelFiles) -> Result<Keys> {
    let side_files = files.side_files()?;
    let file = |name: &str| side_files.iter().find(|(n, _)| n == name).map(|(_, bytes)| &bytes[..]);
    let json = file("tokenizer.json").ok_or_else(|| invalid!("the model has no tokenizer.json"))?;
    let json: Value = serde_json::from_slice(json).map_err(|e| invalid!("tokenizer.json: {e}"))?;
    let tokenizer = files.tokenizer();
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(invalid!("a tokenizer of type {} cannot be written to a GGUF file; BPE can", model["type"]));
    }
    let sentence_piece = model["byte_fallback"] == true;
    let mut vocabulary = Vocabulary::read(&json, files.config().vocab_size)?;
    let merges = merges(model)?;
    let mut keys = vec![];
    if sentence_piece {
        put(&mut keys, "tokenizer.ggml.model", KeyValue::String("llama".into()));
        put(&mut keys, "tokenizer.ggml.pre", KeyValue::String("default".into()));
        vocabulary.mark_bytes();
        vocabulary.write_spaces_out();
        put(&mut keys, "tokenizer.ggml.scores", KeyValue::F32s(vocabulary.scores(&merges)));
        put(&mut keys, "tokenizer.ggml.add_space_prefix", KeyValue::Bool(prefixes_a_space(&json)));
    } else {
        put(&mut keys, "tokenizer.ggml.model", KeyValue::String("gpt2".into()));
        put(&mut keys, "tokenizer.ggml.pre", KeyValue::String(pre_tokenizer_name(&json)?.into()));
        let merges = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        put(&mut keys, "tokenizer.ggml.merges", KeyValue::Strings(merges));
    }
    let unknown = model["unk_token"].as_str().and_then(|t| tokenizer.id(t));
    if let Some(id) = unknown.filter(|_| sentence_piece) {
        vocabulary.types[id as usize] = UNKNOWN;
    }
    put(&mut keys, "tokenizer.ggml.tokens", KeyValue::Strings(vocabulary.tokens));
    put(&mut keys, "tokenizer.ggml.token_type", KeyValue::I32s(vocabulary.types));
    for (name, id) in [
        ("bos", tokenizer.bos_id().or(files.config().bos_token_id)),
        ("eos", tokenizer.eos_id()),
        // A further end-of-sequence token: the end of a turn, in chat models.
        ("eot", files.config().eos_token_ids.iter().copied().find(|&id| Some(id) != tokenizer.eos_id())),
        ("unknown", unknown),
        ("padding", tokenizer.pad_id()),
    ] {
        if let Some(id) = id {
            put(&mut keys, &format!("tokenizer.ggml.{name}_token_id"), KeyValue::U32(id));
        }
    }
    let (first, last) = adds(tokenizer)?;
    put(&mut keys, "tokenizer.ggml.add_bos_token", KeyValue::Bool(first));
    put(&mut keys, "tokenizer.ggml.add_eos_token", KeyValue::Bool(last));
    if let Some(template) = tokenizer.chat_template() {
        put(&mut keys, "tokenizer.chat_template", KeyValue::String(template.into()));
    }
    Ok(keys)
}

/// Whether the tokenizer adds (its beginning-of-sequence token, its end-of-sequence token) to a text.
fn adds(tokenizer: &Tokenizer) -> Result<(bool, bool)> {
    let (with, without) = (tokenizer.encode("a", SpecialTokens::Add)?, tokenizer.encode("a", SpecialTokens::None)?);
    let first = with.len() > without.len() && with.first().copied() == tokenizer.bos_id();
    let last = with.len() > without.len() && with.last().copied() == tokenizer.eos_id();
    Ok((first, last))
}

/// llama.cpp's name of the way in which this byte-level tokenizer splits text before merging.
fn pre_tokenizer_name(json: &Value) -> Result<&'static str> {
    let pre = &json["pre_tokenizer"];
    let parts: Vec<&Value> = match pre["pretokenizers"].as_array() {
        Some(parts) => parts.iter().collect(),
        None => vec![pre],
    };
    let name = match parts[..] {
        [one] if one["type"] == "ByteLevel" && one["use_regex"] != false => Some("gpt-2"),
        [digits, bytes]
            if digits["type"] == "Digits" && digits["individual_digits"] == true && bytes["use_regex"] != false =>
        {
            Some("smollm")
        }
        // Equal split patterns: llama-bpe keeps a word that is a token, dbrx merges it.
        [split, _] if split["pattern"]["Regex"] == LLAMA3_SPLIT => match json["model"]["ignore_merges"] == true {
            true => Some("llama-bpe"),
            false => Some("dbrx"),
        },
        [split, _] if split["pattern"]["Regex"] == QWEN2_SPLIT => Some("qwen2"),
        _ => None,
    };
    let prefix = parts.iter().any(|p| p["type"] == "ByteLevel" && p["add_prefix_space"] == true);
    name.filter(|_| !prefix).ok_or_else(|| {
        invalid!(
            "the tokenizer splits text in a way that is not supported ({pre}); smollm's, llama 3's, qwen 2's and gpt-2's \
             can be written to a GGUF file. `--format safetensors` and llama.cpp's converter are the way round"
        )
    })
}

fn prefixes_a_space(json: &Value) -> bool {
    let of =
        |part: &Value| part["type"] == "Prepend" || (part["type"] == "Metaspace" && part["prepend_scheme"] != "never");
    [("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")]
        .iter()
        .any(|(one, many)| of(&json[*one]) || json[*one][*many].as_array().is_some_and(|parts| parts.iter().any(of)))
}

fn merges(model: &Value) -> Result<Vec<(&str, &str)>> {
    let list = model["merges"].as_array().ok_or_else(|| invalid!("tokenizer.json: its model has no merges"))?;
    list.iter()
        .map(|merge| {
            // "a b" in older releases, ["a", "b"] in newer ones.
            let pair = match merge.as_str() {
                Some(text) => text.split_once(' '),
                None => merge.get(0).and_then(Value::as_str).zip(merge.get(1).and_then(Value::as_str)),
            };
            pair.ok_or_else(|| invalid!("tokenizer.json: the merge {merge} is not two tokens"))
        })
        .collect()
}

/// Token texts and types by id; ids without a token get a placeholder, because the embedding has rows for them.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn read(json: &Value, rows: usize) -> Result<Self> {
        let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; rows];
        let vocab = json["model"]["vocab"].as_object().ok_or_else(|| invalid!("tokenizer.json: it has no vocab"))?;
        let added = json["added_tokens"].as_array().into_iter().flatten().map(|token| {
            let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
            (token["content"].as_str().unwrap_or_default(), &token["id"], kind)
        });
        for (text, id, kind) in vocab.iter().map(|(text, id)| (text.as_str(), id, NORMAL)).chain(added) {
            let index = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < rows);
            let index = index.ok_or_else(|| {
                invalid!("tokenizer.json: token {text:?} has the id {id}, and the model has {rows} embeddings")
            })?;
            text.clone_into(&mut tokens[index]);
            types[index] = kind;
        }
        Ok(Self { tokens, types })
    }

    fn mark_bytes(&mut self) {
        for (token, kind) in self.tokens.iter().zip(&mut self.types) {
            if *kind == NORMAL && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') {
                *kind = BYTE;
            }
        }
    }

    /// Writes ▁ as a space in user-defined tokens, since llama.cpp matches them before it replaces spaces by ▁.
    fn write_spaces_out(&mut self) {
        for (token, kind) in self.tokens.iter_mut().zip(&self.types) {
            if *kind == USER_DEFINED {
                *token = token.replace('▁', " ");
            }
        }
    }

    /// Scores of tokens. llama.cpp merges the pair whose merged token scores best, so a token's score is minus the index of the
    /// first merge that gives it, as SentencePiece itself writes for BPE.
    fn scores(&self, merges: &[(&str, &str)]) -> Vec<f32> {
        let mut first: HashMap<String, usize> = HashMap::new();
        for (place, (left, right)) in merges.iter().enumerate() {
            first.entry(format!("{left}{right}")).or_insert(place);
        }
        let score = |(token, &kind): (&String, &i32)| match first.get(token) {
            Some(&place) if kind == NORMAL => -(place as f32),
            _ if kind == NORMAL => -(merges.len() as f32),
            _ => 0.0,
        };
        self.tokens.iter().zip(&self.types).map(score).collect()
    }
}
