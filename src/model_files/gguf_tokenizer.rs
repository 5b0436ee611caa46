//! The `tokenizer.ggml.*` keys of a GGUF file -> Hugging Face's tokenizer.json and tokenizer_config.json.
//!
//! So one tokenizer implementation serves both formats. Supported are llama.cpp's kinds gpt2 (byte-level BPE) and llama
//! (SentencePiece BPE). It does not depend on weights. Read `tokenizer/mod.rs` next.

use std::collections::HashMap;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::invalid;
use crate::model_files::gguf::Gguf;
use crate::tokenizer::{Tokenizer, TokenizerFiles};

/// `llama_token_type` in llama.cpp.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// The most bytes of a token: finding its merges takes time quadratic in its length.
const LONGEST_TOKEN: usize = 1024;

/// Llama 3's split pattern: contractions, words, up to three digits, punctuation, white space.
pub(crate) const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Qwen 2's split pattern: Llama 3's with single digits.
pub(crate) const QWEN2_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// A tokenizer as Hugging Face's two files.
pub struct TokenizerJson {
    /// tokenizer.json.
    pub tokenizer: String,
    /// tokenizer_config.json, with the chat template.
    pub config: String,
}

/// Rebuilds the tokenizer of a GGUF file as Hugging Face's files.
///
/// # Errors
/// If the file has no tokenizer, or one whose kind or pre-tokenizer is not supported.
pub fn rebuild(gguf: &Gguf) -> Result<TokenizerJson> {
    let parts = Parts::read(gguf)?;
    let mut json = match parts.kind {
        Kind::ByteLevel => parts.byte_level()?,
        Kind::SentencePiece => parts.sentence_piece()?,
    };
    json.insert("version".into(), json!("1.0"));
    json.insert("truncation".into(), Value::Null);
    json.insert("padding".into(), Value::Null);
    json.insert("added_tokens".into(), parts.added_tokens());
    json.insert("post_processor".into(), parts.post_processor());
    Ok(TokenizerJson { tokenizer: Value::Object(json).to_string(), config: parts.config().to_string() })
}

/// The tokenizer of a GGUF file.
///
/// # Errors
/// Those of [`rebuild`] and [`Tokenizer::from_files`].
pub fn tokenizer(gguf: &Gguf) -> Result<Tokenizer> {
    let json = rebuild(gguf)?;
    let files = TokenizerFiles { tokenizer: &json.tokenizer, config: Some(&json.config), ..TokenizerFiles::default() };
    Tokenizer::from_files(files, gguf.name())
}

/// What is unsure about the tokenizer of a GGUF file: how it splits text, if the file does not say.
pub(crate) fn doubts(gguf: &Gguf) -> Option<String> {
    let splits = gguf.string("tokenizer.ggml.model").ok().flatten() == Some("gpt2");
    (splits && gguf.get("tokenizer.ggml.pre").is_none()).then(|| {
        format!(
            "{}: tokenizer.ggml.pre is missing, so text is split as GPT-2 splits it; if the model was trained with another \
             split, its tokens are wrong: convert it again with a current convert_hf_to_gguf.py of llama.cpp",
            gguf.name()
        )
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    ByteLevel,
    SentencePiece,
}

struct Parts<'a> {
    gguf: &'a Gguf,
    kind: Kind,
    pre: &'a str,
    tokens: &'a [String],
    types: &'a [i64],
    bos: Option<usize>,
    eos: Option<usize>,
    unknown: Option<usize>,
    padding: Option<usize>,
    add_bos: bool,
    add_eos: bool,
}

impl<'a> Parts<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self> {
        let file = gguf.name();
        let model = gguf.string("tokenizer.ggml.model")?;
        let kind = match model {
            Some("gpt2") => Kind::ByteLevel,
            Some("llama") => Kind::SentencePiece,
            None => return Err(invalid!("{file}: it carries no tokenizer (tokenizer.ggml.model is missing)")),
            Some(other) => {
                return Err(invalid!("{file}: tokenizer.ggml.model = {other:?} is not supported; gpt2 and llama are"));
            }
        };
        let pre = gguf.string("tokenizer.ggml.pre")?.unwrap_or("default");
        let tokens = gguf.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
        let types = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
        if tokens.is_empty() || (!types.is_empty() && types.len() != tokens.len()) {
            return Err(invalid!(
                "{file}: tokenizer.ggml.tokens has {} entries and tokenizer.ggml.token_type {}",
                tokens.len(),
                types.len()
            ));
        }
        let id = |key: &str| -> Result<Option<usize>> {
            let Some(id) = gguf.unsigned(&format!("tokenizer.ggml.{key}"))? else { return Ok(None) };
            let inside = usize::try_from(id).ok().filter(|&id| id < tokens.len());
            inside.map(Some).ok_or_else(|| invalid!("{file}: tokenizer.ggml.{key} = {id} is outside the vocabulary"))
        };
        let bos = id("bos_token_id")?;
        // llama.cpp's default.
        let by_default = kind == Kind::SentencePiece || is_llama3(pre);
        Ok(Self {
            gguf,
            kind,
            pre,
            tokens,
            types,
            bos,
            eos: id("eos_token_id")?,
            unknown: id("unknown_token_id")?,
            padding: id("padding_token_id")?,
            add_bos: gguf.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(by_default),
            add_eos: gguf.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        })
    }

    fn token_type(&self, id: usize) -> i64 {
        self.types.get(id).copied().unwrap_or(NORMAL)
    }

    fn vocabulary(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    fn byte_level(&self) -> Result<Map<String, Value>> {
        let file = self.gguf.name();
        let bytes = |use_regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": use_regex})
        };
        let split = |regex: &str| {
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
            "invert": false})
        };
        let sequence = |first: Value, then: Value| json!({"type": "Sequence", "pretokenizers": [first, then]});
        let pre_tokenizer = match self.pre {
            "default" | "gpt-2" | "olmo" | "mpt" => bytes(true),
            "smollm" | "refact" | "starcoder" | "command-r" => {
                sequence(json!({"type": "Digits", "individual_digits": true}), bytes(true))
            }
            "qwen2" | "stablelm2" => sequence(split(QWEN2_SPLIT), bytes(false)),
            "dbrx" | "smaug-bpe" => sequence(split(LLAMA3_SPLIT), bytes(false)),
            pre if is_llama3(pre) => sequence(split(LLAMA3_SPLIT), bytes(false)),
            other => {
                return Err(invalid!(
                    "{file}: tokenizer.ggml.pre = {other:?} is not supported; smollm, starcoder, refact, command-r, \
                     llama-bpe, dbrx, smaug-bpe, qwen2, stablelm2, olmo, mpt, gpt-2 and default are"
                ));
            }
        };
        let merges = self.gguf.strings("tokenizer.ggml.merges")?;
        let merges = merges.ok_or_else(|| invalid!("{file}: tokenizer.ggml.merges is missing"))?;
        let merges = merges.iter().map(|merge| match merge.split_once(' ') {
            // Neither half can contain a space: byte-level tokens write it as Ġ.
            Some((left, right)) if !right.contains(' ') => Ok(json!([left, right])),
            _ => Err(invalid!("{file}: {merge:?} in tokenizer.ggml.merges is not two tokens with a space between")),
        });
        Ok(object(json!({
            "normalizer": if self.pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": pre_tokenizer,
            "decoder": bytes(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                // Llama 3 keeps a word that is a token, even if no merges lead to it.
                "ignore_merges": is_llama3(self.pre),
                "vocab": self.vocabulary(),
                "merges": merges.collect::<Result<Vec<_>>>()?,
            },
        })))
    }

    fn sentence_piece(&self) -> Result<Map<String, Value>> {
        let prefix = self.gguf.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let mut normalizers = vec![replace];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = (0..self.tokens.len()).find(|&id| self.token_type(id) == UNKNOWN).or(self.unknown);
        Ok(object(json!({
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown.map(|id| &self.tokens[id]),
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": true,
                "ignore_merges": false,
                "vocab": self.vocabulary(),
                "merges": self.merges_from_scores()?,
            },
        })))
    }

    /// SentencePiece merges the pair whose merged token has the best score; a list of merges in that order is equivalent.
    /// Only normal tokens are merged: `<` and `s>` must not become `<s>`.
    fn merges_from_scores(&self) -> Result<Vec<[&str; 2]>> {
        let file = self.gguf.name();
        let scores = self.gguf.floats("tokenizer.ggml.scores")?.unwrap_or_default();
        if scores.len() != self.tokens.len() {
            return Err(invalid!(
                "{file}: tokenizer.ggml.scores has {} entries for {} tokens",
                scores.len(),
                self.tokens.len()
            ));
        }
        let normal = || self.tokens.iter().enumerate().filter(|(id, _)| self.token_type(*id) == NORMAL);
        let ids: HashMap<&str, usize> = normal().map(|(id, token)| (token.as_str(), id)).collect();
        let mut merges = Vec::new();
        for (id, token) in normal() {
            if token.len() > LONGEST_TOKEN {
                return Err(invalid!("{file}: token {id} is {} bytes long; {LONGEST_TOKEN} is the most", token.len()));
            }
            for (middle, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(middle);
                if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                    merges.push((scores[id], id, l, r));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        Ok(merges.into_iter().map(|(_, _, l, r)| [self.tokens[l].as_str(), self.tokens[r].as_str()]).collect())
    }

    /// Tokens that are matched in the text before it is split; special ones are omitted from decoded text.
    fn added_tokens(&self) -> Value {
        let wanted = |id: &usize| match self.token_type(*id) {
            CONTROL | USER_DEFINED => true,
            UNKNOWN => self.kind == Kind::SentencePiece,
            _ => false,
        };
        let tokens = (0..self.tokens.len()).filter(wanted).map(|id| {
            json!({"id": id, "content": self.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": self.token_type(id) != USER_DEFINED})
        });
        Value::Array(tokens.collect())
    }

    fn post_processor(&self) -> Value {
        let bos = self.bos.filter(|_| self.add_bos);
        let eos = self.eos.filter(|_| self.add_eos);
        let special = |id: Option<usize>, part: u32| {
            id.map(|id| json!({"SpecialToken": {"id": self.tokens[id], "type_id": part}}))
        };
        let around = |name: &str, part: u32| {
            let text = json!({"Sequence": {"id": name, "type_id": part}});
            special(bos, part).into_iter().chain([text]).chain(special(eos, part)).collect::<Vec<_>>()
        };
        let used: Map<String, Value> = bos
            .iter()
            .chain(&eos)
            .map(|&id| {
                let token = &self.tokens[id];
                (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}))
            })
            .collect();
        let pair: Vec<Value> = around("A", 0).into_iter().chain(around("B", 1)).collect();
        json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": used})
    }

    fn config(&self) -> Value {
        let mut config = object(json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
        }));
        for (name, id) in
            [("bos_token", self.bos), ("eos_token", self.eos), ("unk_token", self.unknown), ("pad_token", self.padding)]
        {
            if let Some(id) = id {
                config.insert(name.into(), json!(self.tokens[id]));
            }
        }
        if let Ok(Some(template)) = self.gguf.string("tokenizer.chat_template") {
            config.insert("chat_template".into(), json!(template));
        }
        Value::Object(config)
    }
}

fn is_llama3(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3")
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests;
