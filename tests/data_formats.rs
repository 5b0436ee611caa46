//! Every format is read, every bad record is named, and the masks cover the assistant's text and nothing else. The
//! tokenizer is a toy: a token a byte, so that token ids can be read back as text.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use fourfold::config::{Compat, Data, Format, OnBadRecord, Paths, Preset, Template, Truncation};
use fourfold::data::phases::{Report, SftExample, TextEncoder, prompt_examples, ranked_examples, sft_examples};
use fourfold::data::{self, Dataset, Message, Record, Text};
use fourfold::error::exit_code;
use serde_json::{Value, json};

/// A token a byte; `<e>` is the end token 256; 257 opens a text that no chat template rendered.
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

    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut text = String::new();
        for (index, Message { role, content }) in messages.iter().enumerate() {
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
        Ok(text)
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

    fn bos_id(&self) -> Option<u32> {
        Some(BOS)
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

/// What the loss learns, as text.
fn learnt(example: &SftExample) -> String {
    assert_eq!(example.tokens.len(), example.loss_mask.len());
    decode(example.tokens.iter().zip(&example.loss_mask).filter(|(_, learnt)| **learnt).map(|(token, _)| token))
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

/// The message about a bad file without its folder; it must be the user's fault.
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

#[test]
fn every_format_is_detected_and_read() {
    let ranked = |prompt, answers: &[Text]| Record::Ranked { prompt, answers: answers.to_vec() };
    let user = || turns(&[("user", "q")]);
    let (good, bad) = (turns(&[("assistant", "good")]), turns(&[("assistant", "bad")]));
    let q = json!([{"role": "user", "content": "q"}]);
    let says = |word: &str| json!({"role": "assistant", "content": word});
    let cases = [
        (json!({"text": "a b"}), Record::LanguageModeling(text("a b"))),
        (
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}),
            Record::LanguageModeling(turns(&[("user", "q"), ("assistant", "a")])),
        ),
        (
            json!({"prompt": "q", "completion": " a"}),
            Record::PromptCompletion { prompt: text("q"), completion: text(" a") },
        ),
        (
            json!({"prompt": q, "completion": [says("good")]}),
            Record::PromptCompletion { prompt: user(), completion: good.clone() },
        ),
        (json!({"prompt": "q", "chosen": "good", "rejected": "bad"}), ranked(text("q"), &[text("good"), text("bad")])),
        (
            json!({"prompt": q, "chosen": [says("good")], "rejected": [says("bad")]}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        // A text beside a dialogue becomes a turn of it.
        (
            json!({"prompt": "q", "chosen": [says("good")], "rejected": "bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        // No prompt column: what both share.
        (
            json!({"chosen": "Sky: blue", "rejected": "Sky: bluish"}),
            ranked(text("Sky:"), &[text(" blue"), text(" bluish")]),
        ),
        (
            json!({"chosen": [q[0], says("good")], "rejected": [q[0], says("bad")]}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                   "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}),
            ranked(turns(&[("system", "s"), ("user", "q")]), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}),
            Record::LanguageModeling(turns(&[("system", "s"), ("user", "q"), ("assistant", "a")])),
        ),
        (
            json!({"instruction": "i", "input": "n", "output": "good", "system": "s", "history": [["u", "v"]]}),
            Record::PromptCompletion {
                prompt: turns(&[("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "i\nn")]),
                completion: good.clone(),
            },
        ),
        (
            json!({"instruction": "q", "input": "", "output": "good"}),
            Record::PromptCompletion { prompt: user(), completion: good.clone() },
        ),
        (
            json!({"instruction": "q", "chosen": "good", "rejected": "bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (json!({"prompt": "q", "responses": ["a", "b", "c"]}), ranked(text("q"), &[text("a"), text("b"), text("c")])),
        (
            json!({"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, -1, 2]}),
            ranked(text("q"), &[text("c"), text("a"), text("b")]),
        ),
        (
            json!({"prompt": "q", "completion": "a", "label": false}),
            Record::Unpaired { prompt: text("q"), completion: text("a"), label: false },
        ),
        (
            json!({"messages": [q[0], says("good")], "label": true}),
            Record::Unpaired { prompt: user(), completion: good.clone(), label: true },
        ),
        (json!({"prompt": "q"}), Record::PromptOnly(text("q"))),
        (json!({"prompt": q}), Record::PromptOnly(user())),
        (json!({"instruction": "q"}), Record::PromptOnly(user())),
    ];
    for (object, expected) in cases {
        assert_eq!(record(object.clone()), expected, "{object}");
    }
}

#[test]
fn arrays_lines_gzip_text_and_folders_give_the_same_records() {
    let array = br#" [ {"text": "one"}, {"text": "two"} ] "#;
    let lines = b"{\"text\": \"one\"}\r\n\n{\"text\": \"two\"}";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(lines).unwrap();
    let gzip = gzip.finish().unwrap();
    let marked = ["\u{FEFF}".as_bytes(), lines].concat();
    let expected = vec![Record::LanguageModeling(text("one")), Record::LanguageModeling(text("two"))];
    let files: [(&str, &[u8]); 7] = [
        ("a.json", array),
        ("b.jsonl", lines),
        ("c.json", lines),
        ("d.jsonl.gz", &gzip),
        ("e.json", &marked),
        ("f.txt", b"one\n\n  \ntwo\n"),
        ("g.JSONL", lines),
    ];
    for (name, content) in files {
        assert_eq!(records(name, content), expected, "{name}");
    }
    let (folder, mut data) = config(&files);
    std::fs::write(folder.path().join("README.md"), "not data").unwrap();
    assert_eq!(data::load(&data).unwrap().entries.len(), 14);
    data.path = Paths::One(folder.path().to_owned());
    let all = data::load(&data).unwrap().entries;
    assert_eq!(all.len(), 14);
    assert!(all[0].place.to_string().ends_with("a.json, record 1"), "{}", all[0].place);
    assert!(all[3].place.to_string().ends_with("b.jsonl, line 3"), "{}", all[3].place);
    data.max_rows = Some(3);
    assert_eq!(data::load(&data).unwrap().entries[..], all[..3]);
}

#[test]
fn bad_records_are_named_with_file_line_column_and_what_was_expected() {
    let good = json!({"prompt": "q", "chosen": "a", "rejected": "b"});
    for (object, expected) in [
        (
            json!({"prompt": "q", "chosen": 3, "rejected": "b"}),
            "column \"chosen\": expected a string or a list of messages, found a number",
        ),
        (
            json!({"prompt": "q", "rejected": "b"}),
            "column \"chosen\" is missing (expected a string or a list of messages); there are [\"prompt\", \"rejected\"]",
        ),
        (
            json!({"prompt": "q", "chosen": null, "rejected": "b"}),
            "column \"chosen\": expected a string or a list of messages, found null",
        ),
        (json!({"prompt": "q", "chosen": " ", "rejected": "b"}), "column \"chosen\": the answer is empty"),
        (json!({"prompt": "q", "chosen": "a", "rejected": "a"}), "the chosen and the rejected answer are identical"),
        (json!({"prompt": "", "chosen": "a", "rejected": "b"}), "the prompt is empty"),
        (json!({"prompt": [], "chosen": "a", "rejected": "b"}), "column \"prompt\": the list of messages is empty"),
        (
            json!({"chosen": "a", "rejected": "b"}),
            "column \"prompt\" is missing, and \"chosen\" and \"rejected\" share no beginning",
        ),
        (json!({"chosen": "a", "rejected": "a"}), "identical"),
        (
            json!({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "a", "rejected": "b"}),
            "must end with a user turn",
        ),
        (
            json!({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}),
            "column \"prompt\": turn 1: expected \"content\" to be a string, found nothing",
        ),
        (
            json!({"prompt": [{"role": "robot", "content": "a"}], "chosen": "a", "rejected": "b"}),
            "turn 1: \"role\" is \"robot\"; expected system",
        ),
        (
            json!({"prompt": ["q"], "chosen": "a", "rejected": "b"}),
            "turn 1: expected an object with \"role\" and \"content\", found a string",
        ),
        (
            json!({"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}),
            "column \"chosen\": the answer must begin and end with an assistant turn",
        ),
        (json!(["q", "a", "b"]), "expected a JSON object with columns, found a list"),
    ] {
        let found = fault("x.jsonl", format!("{good}\n{object}\n").as_bytes());
        assert!(
            found.starts_with("x.jsonl, line 2: ") && found.contains(expected),
            "\nfound:    {found}\nexpected: {expected}"
        );
        let found = fault("x.json", json!([good, object]).to_string().as_bytes());
        assert!(found.starts_with("x.json, record 2: ") && found.contains(expected), "{found}");
    }
    for (object, expected) in [
        (json!({"a": 1, "b": 2}), "the columns [\"a\", \"b\"] are of no known format"),
        (json!({"text": ""}), "column \"text\": is empty"),
        (json!({"text": 5}), "column \"text\": expected a string, found a number"),
        (json!({"messages": "hi"}), "column \"messages\": expected a list of messages, found a string"),
        (json!({"messages": [{"role": "user", "content": "q"}], "label": true}), "ends with an assistant turn"),
        (
            json!({"prompt": "q", "completion": "a", "label": 1}),
            "column \"label\": expected true or false, found a number",
        ),
        (json!({"prompt": "q", "responses": ["a"]}), "1 answer is no comparison"),
        (json!({"prompt": "q", "responses": ["a", "b", "a"]}), "answers 1 and 3 of the ranking are identical"),
        (json!({"prompt": "q", "responses": ["a", "b"], "scores": [1]}), "1 scores for 2 responses"),
        (json!({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1.0]}), "answers 1 and 2 have the same score"),
        (json!({"instruction": "q", "output": "a", "history": [["u"]]}), "round 1 is no [user, assistant] pair"),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "system", "value": "s"}]}),
            "a system turn must be the first",
        ),
    ] {
        let found = fault("x.jsonl", object.to_string().as_bytes());
        assert!(
            found.starts_with("x.jsonl, line 1: ") && found.contains(expected),
            "\nfound:    {found}\nexpected: {expected}"
        );
    }
}

#[test]
fn bad_files_are_named() {
    let utf8 = fault("x.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n");
    assert_eq!(utf8, "x.jsonl, line 2: is not UTF-8 from byte 11 of the line on");
    assert!(fault("x.json", b"[{\"text\": \"\xff\"}]").contains("is not a JSON array: invalid unicode"));
    assert!(fault("x.txt", b"fine\n\xff\n").starts_with("x.txt, line 2: is not UTF-8"));
    assert!(fault("x.txt", b"\xff\xfea\0").contains("is UTF-16"));
    assert!(
        fault("x.jsonl", b"{\"text\": \"a\"}\n{\"text\": \n")
            .starts_with("x.jsonl, line 2: is not a JSON object on one line: EOF")
    );
    assert!(fault("x.json", b"[{\"text\": \"a\"}").contains("EOF"));
    assert!(fault("x.json", b"[{\"text\": \"a\"}] x").contains("trailing characters"));
    assert!(fault("x.json.gz", b"not gzip").contains("is not gzip"));
    let mut cut = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    cut.write_all(br#"[{"text": "a"}]"#).unwrap();
    let cut = cut.finish().unwrap();
    assert!(fault("x.json.gz", &cut[..cut.len() - 9]).starts_with("x.json.gz: "));
    for (name, content) in [("x.json", ""), ("x.json", " \n"), ("x.json", "[]"), ("x.jsonl", "\n\n"), ("x.txt", "")] {
        assert!(fault(name, content.as_bytes()).contains("holds no record"), "{name} {content:?}");
    }
    assert!(fault("x.xlsx", b"PK").contains("the name must end in .json"));
    let (folder, mut data) = config(&[]);
    data.path = Paths::One(folder.path().to_owned());
    assert!(data::load(&data).unwrap_err().to_string().contains("has no file that ends in"));
    data.path = Paths::One(PathBuf::from("/nowhere/x.json"));
    assert!(data::load(&data).unwrap_err().to_string().contains("/nowhere/x.json: No such file"));
}

#[test]
fn skip_drops_bad_records_and_counts_them() {
    let lines = b"{\"text\": \"a\"}\n{\"text\": 1}\n\xff\nnonsense\n{\"text\": \"b\"}\n";
    let (_folder, mut data) = config(&[("x.jsonl", lines)]);
    data.on_bad_record = OnBadRecord::Skip;
    let found = data::load(&data).unwrap();
    assert_eq!((found.entries.len(), found.skipped), (2, 3));
    assert!(found.first_skipped.unwrap().contains("x.jsonl, line 2: column \"text\""));
    let (_folder, mut data) = config(&[("x.jsonl", b"{\"text\": 1}\n")]);
    data.on_bad_record = OnBadRecord::Skip;
    assert!(data::load(&data).unwrap_err().to_string().contains("none of 1 records can be used; the first: "));
}

#[test]
fn the_format_key_overrules_detection() {
    let (_folder, mut data) = config(&[("x.jsonl", br#"{"prompt": "q", "chosen": "a", "rejected": "b"}"#)]);
    data.format = Format::PromptOnly;
    assert_eq!(data::load(&data).unwrap().entries[0].record, Record::PromptOnly(text("q")));
    data.format = Format::Alpaca;
    let found = data::load(&data).unwrap_err().to_string();
    assert!(found.contains("column \"output\" is missing"), "{found}");
}

/// A dialogue of two rounds whose answers have white space and more bytes than characters.
fn two_rounds() -> Value {
    json!([{"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q1"}, {"role": "assistant", "content": "né 1\n"},
        {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}, {"role": "user", "content": "bye"},
    ]}])
}

#[test]
fn the_sft_mask_is_exactly_the_assistants_text_and_end_tokens() {
    for (encoder, template, whole, expected) in [
        (
            CHAT,
            None,
            "[system]s<e>\n[user]q1<e>\n[assistant]né 1\n<e>\n[user]q2<e>\n[assistant]a2<e>",
            "né 1\n<e>a2<e>",
        ),
        (BARE, None, "<b>s\nq1\nné 1\n\nq2\na2<e>", "né 1\na2<e>"),
        (
            CHAT,
            Some(Template::HhRlhf),
            "<b>s\n\nHuman: q1\n\nAssistant: né 1\n\n\nHuman: q2\n\nAssistant: a2<e>",
            " né 1\n a2<e>",
        ),
    ] {
        let data = Data { template, ..Data::default() };
        let (examples, report) = sft_examples(&dataset(two_rounds()).entries, &encoder, &data, true).unwrap();
        assert_eq!(decode(&examples[0].tokens), whole);
        assert_eq!(learnt(&examples[0]), expected);
        assert_eq!(report.to_string(), "1 records, 1 sequences");
        let (examples, _) = sft_examples(&dataset(two_rounds()).entries, &encoder, &data, false).unwrap();
        let first = decode(&examples[0].tokens[..1]).len();
        assert_eq!(learnt(&examples[0]), whole[first..], "everything but the first token");
    }
}

#[test]
fn texts_are_verbatim_unless_a_template_is_asked_for() {
    let records = dataset(json!([{"prompt": "q:", "completion": " a"}]));
    for (template, whole) in [
        (None, "<b>q: a<e>"),
        (Some(Template::Plain), "<b>q: a<e>"),
        (Some(Template::Chat), "[user]q:<e>\n[assistant] a<e>"),
        (Some(Template::HumanAssistant), "<b> Human: q: Assistant:  a<e>"),
        (Some(Template::HhRlhf), "<b>\n\nHuman: q:\n\nAssistant:  a<e>"),
    ] {
        let data = Data { template, ..Data::default() };
        let (examples, _) = sft_examples(&records.entries, &CHAT, &data, true).unwrap();
        assert_eq!(decode(&examples[0].tokens), whole);
        assert_eq!(learnt(&examples[0]).trim_start(), "a<e>");
    }
    let chat = Data { template: Some(Template::Chat), ..Data::default() };
    let error = sft_examples(&records.entries, &BARE, &chat, true).unwrap_err();
    assert!(error.to_string().contains("has no chat template") && exit_code(&error) == 2, "{error}");
}

#[test]
fn sft_learns_the_best_answer_and_what_was_judged_good() {
    let preference = dataset(json!([{"prompt": "q", "chosen": "good", "rejected": "bad"}]));
    assert_eq!(learnt(&sft_examples(&preference.entries, &BARE, &Data::default(), true).unwrap().0[0]), "good<e>");
    let judged = dataset(json!([
        {"prompt": "q", "completion": "no", "label": false}, {"prompt": "q", "completion": "yes", "label": true}
    ]));
    let (examples, report) = sft_examples(&judged.entries, &BARE, &Data::default(), true).unwrap();
    assert_eq!((examples.len(), learnt(&examples[0]).as_str()), (1, "yes<e>"));
    assert_eq!(report.to_string(), "2 records, 1 sequences; 1 dropped: 1 judged bad");
}

#[test]
fn raw_text_is_cut_into_blocks_that_lose_nothing() {
    let records = load("x.txt", b"abcdefghij\n").unwrap();
    let data = Data { max_length: 5, ..Data::default() };
    let (examples, report) = sft_examples(&records.entries, &BARE, &data, true).unwrap();
    let blocks: Vec<String> = examples.iter().map(|example| decode(&example.tokens)).collect();
    assert_eq!(blocks, ["<b>abcd", "efghi", "j<e>"]);
    assert_eq!(learnt(&examples[1]), "fghi");
    assert_eq!((report.read, report.kept), (1, 3));
}

#[test]
fn rankings_share_a_prompt_and_every_answer_ends() {
    let records = dataset(json!([
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["best", "good", "bad"]},
        {"prompt": [{"role": "user", "content": "r"}], "responses": ["yes", "no"]},
    ]));
    let (examples, _) = ranked_examples(&records.entries, &CHAT, &Data::default()).unwrap();
    assert_eq!(decode(&examples[0].prompt), "[user]q<e>\n[assistant]");
    let answers: Vec<String> = examples[0].answers.iter().map(decode).collect();
    assert_eq!(answers, ["best<e>", "good<e>", "bad<e>"]);
    assert_eq!(examples[1].answers.len(), 2);
    let texts = dataset(json!([{"text": "a"}]));
    let error = ranked_examples(&texts.entries, &CHAT, &Data::default()).unwrap_err();
    assert!(error.to_string().contains("x.json, record 1: reward modelling needs comparisons"), "{error}");
    assert!(error.to_string().ends_with("this record is language_modeling") && exit_code(&error) == 2, "{error}");
}

#[test]
fn every_record_with_a_prompt_gives_ppo_the_prompt_the_reward_model_saw() {
    let open = "[user]q<e>\n[assistant]";
    let q = json!({"role": "user", "content": "q"});
    let a = json!({"role": "assistant", "content": "a"});
    for object in [
        json!({"messages": [q, a]}),
        json!({"messages": [q]}),
        json!({"prompt": [q]}),
        json!({"prompt": [q], "completion": [a]}),
        json!({"prompt": [q], "chosen": "a", "rejected": "b"}),
        json!({"messages": [q, a], "label": false}),
        json!({"instruction": "q", "output": "a"}),
    ] {
        let (examples, _) = prompt_examples(&dataset(json!([object])).entries, &CHAT, &Data::default()).unwrap();
        assert_eq!((examples[0].text.as_str(), decode(&examples[0].tokens).as_str()), (open, open), "{object}");
    }
    let error = prompt_examples(&dataset(json!([{"text": "a"}])).entries, &CHAT, &Data::default()).unwrap_err();
    assert!(error.to_string().contains("raw text has none"), "{error}");
}

fn counted(report: &Report) -> (usize, usize, usize, usize) {
    (report.read, report.kept, report.truncated, report.dropped.values().sum())
}

#[test]
fn truncation_follows_the_policy_and_is_counted() {
    // Sequences of 4 + 3, 12 + 3 and 4 + 12 tokens with the opening and the end token.
    let records = dataset(json!([
        {"prompt": "abc", "chosen": "xy", "rejected": "z"},
        {"prompt": "abcdefghijk", "chosen": "xy", "rejected": "z"},
        {"prompt": "abc", "chosen": "0123456789_", "rejected": "z"},
    ]));
    let entries = &records.entries;
    let with = |truncation| Data { truncation, max_length: 10, max_prompt_length: 4, ..Data::default() };

    let (sft, report) = sft_examples(entries, &BARE, &with(Truncation::Drop), true).unwrap();
    assert_eq!((sft.len(), counted(&report)), (1, (3, 1, 0, 2)));
    assert_eq!(report.to_string(), "3 records, 1 sequences; 2 dropped: 2 longer than max_length = 10");
    let (sft, report) = sft_examples(entries, &BARE, &with(Truncation::Left), true).unwrap();
    assert_eq!((decode(&sft[1].tokens).as_str(), learnt(&sft[1]).as_str()), ("efghijkxy<e>", "xy<e>"));
    assert_eq!(counted(&report), (3, 2, 1, 1));
    let (sft, report) = sft_examples(entries, &BARE, &with(Truncation::Right), true).unwrap();
    assert_eq!((decode(&sft[1].tokens).as_str(), learnt(&sft[1]).as_str()), ("<b>abc012345", "012345"));
    assert_eq!(counted(&report), (3, 2, 1, 1));

    let (ranked, report) = ranked_examples(entries, &BARE, &with(Truncation::Drop)).unwrap();
    assert_eq!((ranked.len(), counted(&report)), (1, (3, 1, 0, 2)));
    let (ranked, report) = ranked_examples(entries, &BARE, &with(Truncation::Left)).unwrap();
    assert_eq!((decode(&ranked[1].prompt).as_str(), decode(&ranked[1].answers[1]).as_str()), ("efghijk", "z<e>"));
    assert_eq!(counted(&report), (3, 2, 1, 1));
    let (ranked, report) = ranked_examples(entries, &BARE, &with(Truncation::Right)).unwrap();
    assert_eq!((decode(&ranked[1].prompt).as_str(), decode(&ranked[1].answers[0]).as_str()), ("<b>abc", "012345"));
    assert_eq!(counted(&report), (3, 2, 1, 1));

    let (prompts, report) = prompt_examples(entries, &BARE, &with(Truncation::Left)).unwrap();
    assert_eq!((prompts.len(), counted(&report)), (2, (3, 2, 0, 1)), "a PPO prompt is never cut");

    let data = Data { max_length: 4, ..Data::default() };
    let error = ranked_examples(entries, &BARE, &data).unwrap_err();
    assert!(error.to_string().contains("leaves no sequence: 3 records, 0 sequences; 3 dropped"), "{error}");
}

#[test]
fn cut_answers_that_become_equal_are_dropped() {
    let records = dataset(
        json!([{"prompt": "a", "chosen": "xxxx1", "rejected": "xxxx2"}, {"prompt": "a", "chosen": "1", "rejected": "2"}]),
    );
    let data = Data { truncation: Truncation::Right, max_length: 5, ..Data::default() };
    let (examples, report) = ranked_examples(&records.entries, &BARE, &data).unwrap();
    assert_eq!((examples.len(), report.dropped["with answers that are the same tokens"]), (1, 1));
}

#[test]
fn a_record_the_template_cannot_mask_is_an_error_or_counted_never_a_wrong_mask() {
    let forgetful = Bytes { has_chat: true, forgets_earlier_turns: true };
    let entries = dataset(two_rounds()).entries;
    let error = sft_examples(&entries, &forgetful, &Data::default(), true).unwrap_err();
    assert!(error.to_string().contains("x.json, record 1: the chat template renders turn 5 differently"), "{error}");
    for (messages, expected) in [
        (json!([{"role": "user", "content": "q"}]), "no assistant turn"),
        (
            json!([{"role": "user", "content": "q"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "a"}]),
            "two user turns",
        ),
        (
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<e>b"}]),
            "end token \"<e>\" inside it",
        ),
    ] {
        let good = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
        let entries = dataset(json!([good, {"messages": messages}])).entries;
        let error = sft_examples(&entries, &CHAT, &Data::default(), true).unwrap_err();
        assert!(error.to_string().contains("record 2") && error.to_string().contains(expected), "{error}");
        assert_eq!(exit_code(&error), 2);
        let skip = Data { on_bad_record: OnBadRecord::Skip, ..Data::default() };
        let (examples, report) = sft_examples(&entries, &CHAT, &skip, true).unwrap();
        assert_eq!((examples.len(), report.dropped["bad"]), (1, 1));
        assert!(report.to_string().contains(expected), "{report}");
    }
}

#[test]
fn a_damaged_file_is_read_or_refused_never_a_panic() {
    let good = json!([
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " né", "rejected": " bad"},
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"], "scores": [1, 2.5]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        {"instruction": "i", "input": null, "output": "o", "history": [["u", "v"]]},
    ]);
    let mut rng = fourfold::rng::SplitMix64::new(1);
    let mut refused = 0;
    for record in good.as_array().unwrap() {
        for name in ["x.json", "x.jsonl.gz", "x.txt"] {
            for _ in 0..100 {
                let mut bytes = json!([record]).to_string().into_bytes();
                bytes.truncate(1 + rng.below(2 * bytes.len()));
                for _ in 0..1 + rng.below(4) {
                    let at = rng.below(bytes.len());
                    bytes[at] = rng.below(256) as u8;
                }
                if name.ends_with(".gz") {
                    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                    gzip.write_all(&bytes).unwrap();
                    bytes = gzip.finish().unwrap();
                }
                match load(name, &bytes) {
                    Ok(set) => drop(ranked_examples(&set.entries, &CHAT, &Data::default())),
                    Err(error) => {
                        assert_eq!(exit_code(&error), 2, "{error:#}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 300, "the damage is felt: {refused} of 1200 refused");
}

#[test]
fn a_template_in_the_config_takes_the_place_of_the_tokenizers() {
    let records = dataset(json!([{"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]}]));
    let inline = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}\
                  {% if add_generation_prompt %}<assistant>{% endif %}";
    for encoder in [CHAT, BARE] {
        let data = Data { chat_template: Some(inline.to_owned()), ..Data::default() };
        let (examples, _) = sft_examples(&records.entries, &encoder, &data, true).unwrap();
        assert_eq!(decode(&examples[0].tokens), "<user>q<e><assistant>a<e><user>r<e><assistant>b<e>");
        assert_eq!(learnt(&examples[0]), "a<e>b<e>");
    }
    let data = Data { chat_template: Some("{% for".to_owned()), ..Data::default() };
    let error = sft_examples(&records.entries, &BARE, &data, true).unwrap_err();
    assert!(error.to_string().contains("the chat template has a mistake") && exit_code(&error) == 2, "{error}");
}

/// Ten comparisons under DeepSpeed-Chat's rules; numpy's rows of ten for seed 1234 are in tests/golden/dschat_split.json.
fn as_deepspeed_chat() -> (Vec<fourfold::data::Entry>, Data) {
    let records: Vec<Value> =
        (0..10).map(|i| json!({"prompt": format!("q{i}"), "chosen": "yes", "rejected": "yet no"})).collect();
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    let (_folder, mut data) = config(&[("x.jsonl", lines.as_bytes())]);
    data.preset = Some(Preset::SyntheticInstruct);
    (data.compat, data.seed) = (Some(Compat::Dschat), 1234);
    (data::load(&data).unwrap().entries, data)
}

#[test]
fn deepspeed_chats_phases_have_its_rows_its_text_and_its_masks() {
    let golden: Value = serde_json::from_str(include_str!("golden/dschat_split.json")).unwrap();
    let case = &golden["splits"][0];
    assert_eq!((&case["seed"], &case["size"], &case["split"]), (&json!(1234), &json!(10), &json!("2,4,4")));
    let rows = |phase: usize| -> Vec<u64> { serde_json::from_value(case["phases"][phase].clone()).unwrap() };
    let (entries, data) = as_deepspeed_chat();

    let (sft, _) = sft_examples(&entries, &BARE, &data, true).unwrap();
    let expected: Vec<String> = rows(0).iter().map(|i| format!("<b> Human: q{i} Assistant: yes<e>")).collect();
    assert_eq!(sft.iter().map(|example| decode(&example.tokens)).collect::<Vec<_>>(), expected);
    assert_eq!(learnt(&sft[0]), expected[0][3..], "the loss is on the prompt too");

    let (pairs, _) = ranked_examples(&entries, &BARE, &data).unwrap();
    let expected: Vec<String> = rows(1).iter().map(|i| format!("<b> Human: q{i} Assistant: ye")).collect();
    assert_eq!(pairs.iter().map(|pair| decode(&pair.prompt)).collect::<Vec<_>>(), expected);
    // Not the tokenizer's end token, but the text of another.
    assert_eq!(decode(&pairs[0].answers[0]), "s<|endoftext|>");
    assert_eq!(decode(&pairs[0].answers[1]), "t no<|endoftext|>");

    let (prompts, _) = prompt_examples(&entries, &BARE, &data).unwrap();
    let expected: Vec<String> = rows(2).iter().map(|i| format!("<b> Human: q{i} Assistant:")).collect();
    assert_eq!(prompts.iter().map(|prompt| decode(&prompt.tokens)).collect::<Vec<_>>(), expected);

    let halves = Data { data_split: Some("0,1,0".to_owned()), ..data };
    assert_eq!(ranked_examples(&entries, &BARE, &halves).unwrap().0.len(), 10);
}

#[test]
fn deepspeed_chat_cuts_long_answers_and_filters_long_prompts() {
    let (entries, data) = as_deepspeed_chat();
    let short = Data { max_length: 25, max_prompt_length: 20, ..data };
    let (sft, report) = sft_examples(&entries, &BARE, &short, true).unwrap();
    assert!(decode(&sft[0].tokens).ends_with("Assistant: ye"), "no end token is left");
    assert_eq!(counted(&report), (2, 2, 2, 0));
    let (pairs, report) = ranked_examples(&entries, &BARE, &short).unwrap();
    assert!(
        pairs.iter().all(|pair| pair.answers[0] == pair.answers[1]),
        "cut before they differ, and kept as they are"
    );
    assert_eq!((report.kept, report.truncated), (4, 4));
    let error = prompt_examples(&entries, &BARE, &short).unwrap_err().to_string();
    assert!(error.contains("4 longer than max_prompt_length = 20 (filtered)"), "{error}");
}

#[test]
fn files_of_the_demo_sets_shapes_load_in_every_phase_they_fit() {
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let pairs = json!([
        {"conversations": [turn("human", "q")], "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")},
        {"conversations": [turn("human", "問"), turn("gpt", "答"), turn("human", "又")],
         "chosen": turn("gpt", "好"), "rejected": turn("gpt", "坏")},
    ]);
    let alpaca = json!([
        {"instruction": "i", "input": "", "output": "o"}, {"instruction": "i", "input": "n", "output": "o"},
        {"instruction": "问", "input": "", "output": "答"},
    ]);
    let judged = json!([
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": true},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], "label": false},
        {"messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "c"}], "label": true},
    ]);
    let wiki = " = Heading = \n \n A line of text . \n Another . \n";
    // (records, sequences of SFT, rankings, prompts); None = the records do not fit that phase.
    for (name, content, expected) in [
        ("pairs.json", pairs.to_string(), (2, Some(2), Some(2), Some(2))),
        ("alpaca.json", alpaca.to_string(), (3, Some(3), None, Some(3))),
        ("judged.json", judged.to_string(), (3, Some(2), None, Some(3))),
        ("wiki.txt", wiki.to_owned(), (3, Some(3), None, None)),
    ] {
        let entries = load(name, content.as_bytes()).unwrap().entries;
        let data = Data::default();
        let sft = sft_examples(&entries, &CHAT, &data, true).ok().map(|found| found.0.len());
        let ranked = ranked_examples(&entries, &CHAT, &data).ok().map(|found| found.0.len());
        let prompts = prompt_examples(&entries, &CHAT, &data).ok().map(|found| found.0.len());
        assert_eq!((entries.len(), sft, ranked, prompts), expected, "{name}");
    }
}
