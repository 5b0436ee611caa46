//! The `{% generation %}` block of transformers' template dialect, which marks the assistant's text.
//!
//! jinja2's extension there records where the block's text lands in the output. Here the block writes a noncharacter of
//! Unicode before and after its text; they are taken out of the output and their places kept. It does not depend on the
//! messages. Read `cuts.rs` next.

use std::borrow::Cow;
use std::sync::OnceLock;

use regex::{Captures, Regex};

use crate::tokenizer::chat_template::Rendered;

/// Begins the text of a block in the output.
const OPEN: char = '\u{FDD0}';
/// Ends the text of a block in the output.
const CLOSE: char = '\u{FDD1}';

/// The template with each block replaced by one that writes the marks.
///
/// The marks stand between two nested blocks, so that white space around the tag is trimmed as around any block.
pub(super) fn mark(template: &str) -> Cow<'_, str> {
    static TAG: OnceLock<Regex> = OnceLock::new();
    let tag =
        TAG.get_or_init(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a constant pattern"));
    tag.replace_all(template, |found: &Captures<'_>| {
        let (open, close) = (&found[1], &found[3]);
        match found.get(2) {
            None => format!("{{%{open} if true %}}{{{{ '{OPEN}' }}}}{{% if true {close}%}}"),
            Some(_) => format!("{{%{open} endif %}}{{{{ '{CLOSE}' }}}}{{% endif {close}%}}"),
        }
    })
}

/// The output without its marks, and the ranges between them. A message that contains one of the two noncharacters keeps
/// it where the template has no block.
pub(super) fn unmark(text: String) -> Rendered {
    let count = |mark: char| text.matches(mark).count();
    if count(OPEN) == 0 || count(OPEN) != count(CLOSE) {
        return Rendered { text, generated: vec![] };
    }
    let mut out = Rendered { text: String::with_capacity(text.len()), generated: vec![] };
    let mut from = None;
    for c in text.chars() {
        match c {
            OPEN => from = from.or(Some(out.text.len())),
            CLOSE => out.generated.extend(from.take().map(|from| from..out.text.len())),
            _ => out.text.push(c),
        }
    }
    out.generated.retain(|range| !range.is_empty());
    out
}

#[cfg(test)]
mod tests {
    use crate::tokenizer::chat_template::{GenerationPrompt, Message, TemplateTokens, render_marked};

    /// Printed by tests/golden/chat_tokens.py.
    #[test]
    fn generation_blocks_mark_what_transformers_marks_golden() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/chat_tokens.json")).unwrap();
        let cases = golden["generation"].as_array().unwrap();
        for case in cases {
            let turn = |turn: &serde_json::Value| {
                Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap())
            };
            let messages: Vec<Message> = case["messages"].as_array().unwrap().iter().map(turn).collect();
            let template = case["template"].as_str().unwrap();
            let tokens = TemplateTokens { bos: Some("<s>"), eos: Some("</s>") };
            let got = render_marked(template, &messages, GenerationPrompt::None, tokens).unwrap();
            assert_eq!(got.text, case["text"].as_str().unwrap(), "{template}");
            let marked: Vec<&str> = got.generated.iter().map(|range| &got.text[range.clone()]).collect();
            let want: Vec<String> = serde_json::from_value(case["marked"].clone()).unwrap();
            assert_eq!(marked, want, "{template}");
        }
        assert!(cases.len() >= 5);
    }
}
