//! Dialogues, prompts with completions and texts have transformers' and TRL's very tokens, and the response's tokens alone
//! are learnt, for every kind of tokenizer and many templates. `golden/chat_tokens.py` printed the numbers.

use std::collections::BTreeMap;
use std::path::Path;

use fourfold::config::Data;
use fourfold::data::examples::SftExample;
use fourfold::data::examples::objectives::{TextEncoder, prompt_examples, ranked_examples, sft_examples};
use fourfold::data::{Entry, Message, ModelEncoder, Place, Record, Text};
use fourfold::tokenizer::{SpecialTokens, Tokenizer, TokenizerFiles};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/chat_tokens.json")).unwrap()
}

fn rows<'g>(golden: &'g Value, key: &str) -> &'g [Value] {
    golden[key].as_array().unwrap()
}

fn numbers(list: &Value) -> Vec<u32> {
    serde_json::from_value(list.clone()).unwrap()
}

fn tokenizers(golden: &Value) -> BTreeMap<String, Tokenizer> {
    let config = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    let read = |(name, json): (&String, &Value)| {
        let files = TokenizerFiles { tokenizer: &json.to_string(), config: Some(config), ..Default::default() };
        (name.clone(), Tokenizer::from_files(files, name).unwrap())
    };
    golden["tokenizers"].as_object().unwrap().iter().map(read).collect()
}

fn entry(record: Record) -> Entry {
    Entry { place: Place { file: Path::new("x.json").into(), record: 1, line: None }, record, remarks: vec![] }
}

/// The learnt ranges as a mask; the first token has nothing before it.
fn mask(len: usize, ranges: &[(usize, usize)]) -> Vec<bool> {
    (0..len).map(|at| at > 0 && ranges.iter().any(|range| (range.0..range.1).contains(&at))).collect()
}

fn one(entries: &[Entry], encoder: &ModelEncoder, data: &Data) -> (SftExample, String) {
    let (mut examples, report) = sft_examples(entries, encoder, data, true).unwrap();
    assert_eq!(examples.len(), 1);
    (examples.remove(0), report.to_string())
}

#[test]
fn dialogues_have_transformers_tokens_and_the_responses_are_learnt_golden() {
    let golden = golden();
    let tokenizers = tokenizers(&golden);
    let mut shared = 0;
    for case in rows(&golden, "chats") {
        let (tokenizer, template) = (case["tokenizer"].as_str().unwrap(), case["template"].as_str().unwrap());
        let encoder = ModelEncoder::new(&tokenizers[tokenizer]).unwrap();
        let source = golden["templates"][template].as_str().unwrap().to_owned();
        let data = Data { chat_template: Some(source), ..Data::default() };
        let dialogue = &golden["dialogues"][case["dialogue"].as_u64().unwrap() as usize];
        let turn = |turn: &Value| Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap());
        let messages: Vec<Message> = dialogue.as_array().unwrap().iter().map(turn).collect();
        let count = messages.len();
        let (example, report) = one(&[entry(Record::LanguageModeling(Text::Dialogue(messages)))], &encoder, &data);

        let mut ids = numbers(&case["ids"]);
        let mut learnt: Vec<(usize, usize)> = serde_json::from_value(case["learnt"].clone()).unwrap();
        if ids.last() != Some(&encoder.eos_id()) {
            // Where the template writes no end token, the response ends with it all the same.
            ids.push(encoder.eos_id());
            learnt.last_mut().unwrap().1 += 1;
        }
        assert_eq!(example.tokens, ids, "{tokenizer}, {template}, {dialogue}");
        assert_eq!(example.loss_mask, mask(ids.len(), &learnt), "{tokenizer}, {template}, {dialogue}");
        let rewritten = template == "qwen3" && count > 2;
        assert_eq!(report.contains("learnt in their last response only"), rewritten, "{template}: {report}");
        assert_eq!(report.contains("generation prompt"), template == "r1", "{template}: {report}");
        shared += usize::from(report.contains("a token that holds text of the prompt and of the response"));
    }
    assert!(shared > 5, "the cases have borders inside tokens: {shared}");
    assert!(rows(&golden, "chats").len() >= 200);
}

#[test]
fn prompts_with_completions_have_trls_tokens_golden() {
    let golden = golden();
    let tokenizers = tokenizers(&golden);
    for case in rows(&golden, "pairs") {
        let name = case["tokenizer"].as_str().unwrap();
        let encoder = ModelEncoder::new(&tokenizers[name]).unwrap();
        let text = |key: &str| Text::Verbatim(case[key].as_str().unwrap().to_owned());
        let (ids, begin) = (numbers(&case["ids"]), case["begin"].as_u64().unwrap() as usize);
        let record = Record::PromptCompletion { prompt: text("prompt"), completion: text("completion") };
        let (example, report) = one(&[entry(record)], &encoder, &Data::default());
        assert_eq!(example.tokens, ids, "{case}");
        assert_eq!(example.loss_mask, mask(ids.len(), &[(begin, ids.len())]), "{case}");

        let says =
            report.contains("holds text of the prompt and of the response") || report.contains("prompt alone has");
        assert_eq!(says, case["agrees"] == false, "{case}: {report}");

        if begin == 0 {
            continue; // a ranking needs a prompt of its own
        }
        let responses = vec![text("completion"), Text::Verbatim(" no!".to_owned())];
        let ranked = [entry(Record::Ranked { prompt: text("prompt"), responses, label: Default::default() })];
        let (examples, _) = ranked_examples(&ranked, &encoder, &Data::default()).unwrap();
        let example = &examples[0];
        assert_eq!([&example.prompt[..], &example.responses[0]].concat(), ids, "{case}");
        assert!(example.prompt.len() <= begin);
    }
}

#[test]
fn texts_end_with_one_end_token_golden() {
    let golden = golden();
    let tokenizers = tokenizers(&golden);
    for case in rows(&golden, "texts") {
        let encoder = ModelEncoder::new(&tokenizers[case["tokenizer"].as_str().unwrap()]).unwrap();
        let record = Record::LanguageModeling(Text::Verbatim(case["text"].as_str().unwrap().to_owned()));
        let (example, _) = one(&[entry(record)], &encoder, &Data::default());
        assert_eq!(example.tokens, numbers(&case["ids"]), "{case}");
    }
}

/// transformers 5 takes the post-processor of tokenizer.json and leaves `add_bos_token` and `add_eos_token` unread beside it.
#[test]
fn the_keys_that_add_tokens_are_read_as_transformers_5_does_golden() {
    let golden = golden();
    for case in rows(&golden, "added") {
        let mut json = golden["tokenizers"]["bytes"].clone();
        let part = |word: &str| match word {
            "$A" => serde_json::json!({"Sequence": {"id": "A", "type_id": 0}}),
            token => serde_json::json!({"SpecialToken": {"id": token, "type_id": 0}}),
        };
        json["post_processor"] = case["processor"].as_str().map_or(Value::Null, |single| {
            let special = |(token, id): (&str, u32)| {
                (token.to_owned(), serde_json::json!({"id": token, "ids": [id], "tokens": [token]}))
            };
            let tokens: serde_json::Map<_, _> = [("<s>", 1), ("</s>", 2)].map(special).into_iter().collect();
            serde_json::json!({"type": "TemplateProcessing", "single": single.split(' ').map(part).collect::<Vec<_>>(),
                "pair": [part("$A"), {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": tokens})
        });
        let config = case["config"].to_string();
        let files = TokenizerFiles { tokenizer: &json.to_string(), config: Some(&config), ..Default::default() };
        let tokenizer = Tokenizer::from_files(files, "m").unwrap();
        let mut ids = numbers(&case["ids"]);
        assert_eq!(tokenizer.encode("Hello", SpecialTokens::Add).unwrap(), ids, "{case}");
        // A prompt gets what stands before a text, and nothing behind it, since a response follows.
        ids.retain(|&id| Some(id) != tokenizer.eos_id());
        let prompt = entry(Record::PromptOnly(Text::Verbatim("Hello".to_owned())));
        let encoder = ModelEncoder::new(&tokenizer).unwrap();
        assert_eq!(prompt_examples(&[prompt], &encoder, &Data::default()).unwrap().0[0].tokens, ids, "{case}");
    }
    assert_eq!(rows(&golden, "added").len(), 27);
}
