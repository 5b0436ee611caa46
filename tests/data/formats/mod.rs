//! Every format is read and every bad record is reported (files.rs), and the loss masks cover exactly the assistant's
//! text (sequences.rs).
//!
//! The test tokenizer has one token per byte, so that token ids can be decoded to text.

mod files;
mod sequences;
mod turns;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use fourfold::config::{Compat, Data, Format, MultiTurn, OnBadRecord, Paths, Preset, Template, Truncation};
use fourfold::data;
use fourfold::data::examples::objectives::{
    Report, SftExample, TextEncoder, prompt_examples, ranked_examples, sft_examples,
};
use fourfold::data::{Dataset, Message, Record, Text};
use fourfold::error::exit_code;
use fourfold::tokenizer::chat_template::Rendered;
use serde_json::{Value, json};

/// One token per byte; `<e>` is the end token 256; token 257 begins a text that no chat template rendered.
#[derive(Default)]
struct Bytes {
    has_chat: bool,
    forgets_earlier_turns: bool,
}

const EOS: u32 = 256;
const BOS: u32 = 257;
const CHAT: Bytes = Bytes { has_chat: true, forgets_earlier_turns: false };
const BARE: Bytes = Bytes { has_chat: false, forgets_earlier_turns: false };

impl TextEncoder for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let pieces = text.split("<e>").map(|piece| piece.bytes().map(u32::from).collect::<Vec<_>>());
        Ok(pieces.collect::<Vec<_>>().join(&EOS))
    }

    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered> {
        let mut text = String::new();
        for (index, Message { role, content, .. }) in messages.iter().enumerate() {
            ensure!(index == 0 || role != "user" || messages[index - 1].role != "user", "two user turns in a row");
            if self.forgets_earlier_turns && role == "assistant" && index + 1 < messages.len() {
                text.push_str("[assistant]...<e>\n");
            } else {
                text.push_str(&format!("[{role}]{content}<e>\n"));
            }
        }
        if add_generation_prompt {
            text.push_str("[assistant]");
        }
        Ok(Rendered { text, generated: vec![] })
    }

    fn has_chat_template(&self) -> bool {
        self.has_chat
    }

    fn eos_id(&self) -> u32 {
        EOS
    }

    fn eos_text(&self) -> &str {
        "<e>"
    }

    fn front(&self) -> &[u32] {
        &[BOS]
    }
}

fn decode<'t>(tokens: impl IntoIterator<Item = &'t u32>) -> String {
    let mut bytes = Vec::new();
    for &token in tokens {
        match token {
            EOS => bytes.extend(b"<e>"),
            BOS => bytes.extend(b"<b>"),
            byte => bytes.push(byte as u8),
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// The tokens with a loss, as text.
fn trained_text(example: &SftExample) -> String {
    assert_eq!(example.tokens.len(), example.loss_mask.len());
    decode(example.tokens.iter().zip(&example.loss_mask).filter(|(_, mask)| **mask).map(|(token, _)| token))
}

fn config(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Data) {
    let folder = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for (name, content) in files {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        paths.push(path);
    }
    let data = Data { path: Paths::List(paths), max_length: 10_000, max_prompt_length: 10_000, ..Data::default() };
    (folder, data)
}

fn load(name: &str, content: &[u8]) -> Result<Dataset> {
    let (_folder, data) = config(&[(name, content)]);
    data::load(&data)
}

fn records(name: &str, content: &[u8]) -> Vec<Record> {
    load(name, content).unwrap().entries.into_iter().map(|entry| entry.record).collect()
}

fn record(object: Value) -> Record {
    let mut all = records("x.jsonl", object.to_string().as_bytes());
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn dataset(objects: Value) -> Dataset {
    load("x.json", objects.to_string().as_bytes()).unwrap()
}

/// The message about a bad file, without its folder; the exit code must be that of invalid input.
#[track_caller]
fn fault(name: &str, content: &[u8]) -> String {
    let error = load(name, content).expect_err("a fault");
    assert_eq!(exit_code(&error), 2);
    let message = format!("{error:#}");
    message[message.find(name).expect(&message)..].to_owned()
}

fn text(text: &str) -> Text {
    Text::Verbatim(text.to_owned())
}

fn turns(turns: &[(&str, &str)]) -> Text {
    Text::Dialogue(turns.iter().map(|(role, content)| Message::new(*role, *content)).collect())
}
