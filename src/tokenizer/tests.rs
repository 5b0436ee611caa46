//! The small files beside tokenizer.json. `model_files/gguf_tokenizer/tests.rs` has the tests against transformers.

use crate::tokenizer::*;
use serde_json::json;

const WORDS: &str = r#"{"version": "1.0", "added_tokens": [{"id": 3, "content": "<end>", "single_word": false,
    "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
    "truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "a": 1, "b": 2, "<end>": 3}}}"#;

fn with(config: Value, map: Option<&str>, template: Option<&str>) -> Result<Tokenizer> {
    let config = config.to_string();
    let files =
        TokenizerFiles { tokenizer: WORDS, config: Some(&config), special_tokens_map: map, chat_template: template };
    Tokenizer::from_files(files, "m")
}

#[test]
fn special_tokens_and_templates_are_read_in_all_their_spellings() {
    let map = Some(r#"{"eos_token": "a", "bos_token": {"content": "b"}}"#);
    let t = with(json!({"eos_token": {"content": "<end>"}, "bos_token": null, "pad_token": "a"}), map, None).unwrap();
    assert_eq!((t.eos_id(), t.bos_id(), t.pad_id(), t.chat_template()), (Some(3), Some(2), Some(1), None));
    assert_eq!(t.encode("a b <end>", SpecialTokens::Add).unwrap(), [1, 2, 3], "truncation must be off");
    assert_eq!(t.decode(&[1, 3]).unwrap(), "a");
    assert_eq!(t.decode_with_special_tokens(&[1, 3]).unwrap(), "a <end>");
    assert_eq!((t.vocab_size(), t.kind()), (4, "WordLevel"));
    assert!(t.apply_chat_template(&[], GenerationPrompt::None).unwrap_err().to_string().contains("no chat template"));
    assert_eq!(t.for_model(&[3, 1], 4).eos_ids(), [3, 1]);

    let list = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]);
    let two = with(json!({"chat_template": list}), None, None).unwrap();
    assert_eq!(two.chat_template(), Some("y"));
    let mut asked = vec![Message::new("user", "q")];
    assert_eq!(two.chat_template_for(&asked), Some("y"));
    asked[0].more_mut().variables = std::sync::Arc::new(Map::from_iter([("tools".to_owned(), json!([]))]));
    assert_eq!(
        (two.chat_template_for(&asked), two.apply_chat_template(&asked, GenerationPrompt::None).unwrap()),
        (Some("x"), "x".into())
    );
    let file = with(json!({"chat_template": "y", "eos_token": "<end>"}), None, Some("{{ eos_token }}{{ bos_token }}!"));
    assert_eq!(file.unwrap().apply_chat_template(&[], GenerationPrompt::Add).unwrap(), "<end>!");
    assert!(with(json!({"bos_token": "zzz"}), None, None).err().unwrap().to_string().contains("zzz"));
    assert!(with(json!([]), None, None).is_err() && with(json!({}), Some("{"), None).is_err());
}
