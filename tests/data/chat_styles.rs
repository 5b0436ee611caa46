//! Chat templates in the style of twelve model families render exactly as in transformers, including the dialogues that
//! they reject.

use fourfold::tokenizer::chat_template::{GenerationPrompt, Message, TemplateTokens, render};
use serde_json::Value;

#[test]
fn templates_of_twelve_families_equal_transformers_golden() {
    // Printed by tests/golden/chat_styles.py.
    let golden: Value = serde_json::from_str(include_str!("../golden/chat_styles.json")).unwrap();
    let (mut rendered, mut refused) = (0, 0);
    for case in golden["cases"].as_array().unwrap() {
        let (style, dialogue) = (case["style"].as_str().unwrap(), case["dialogue"].as_str().unwrap());
        let (with, messages) = (&golden["styles"][style], &golden["dialogues"][dialogue]);
        let turn = |turn: &Value| Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap());
        let messages: Vec<Message> = messages.as_array().unwrap().iter().map(turn).collect();
        let add = case["add_generation_prompt"].as_bool().unwrap();
        let prompt = if add { GenerationPrompt::Add } else { GenerationPrompt::None };
        let tokens = TemplateTokens { bos: with["bos"].as_str(), eos: with["eos"].as_str() };
        let got = render(with["template"].as_str().unwrap(), &messages, prompt, tokens);
        match (case["text"].as_str(), got) {
            (Some(want), Ok(got)) => {
                assert_eq!(got, want, "{style}, {dialogue}, {add}");
                rendered += 1;
            }
            (None, Err(error)) => {
                let expected = case["error"].as_str().unwrap();
                assert!(error.to_string().contains(expected), "{style}, {dialogue}: {error}");
                refused += 1;
            }
            (want, got) => panic!("{style}, {dialogue}, {add}: expected {want:?} or a refusal, found {got:?}"),
        }
    }
    assert_eq!((golden["styles"].as_object().unwrap().len(), rendered, refused), (12, 110, 10));
}
