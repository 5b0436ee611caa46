//! HH-RLHF transcripts (`\n\nHuman: …\n\nAssistant: …`) -> turns, and the common beginning of two texts or dialogues.
//!
//! The common beginning is the prompt of a comparison that has no prompt column. This file does not depend on the
//! columns of any format. Read `data/formats/presets.rs` next.

use crate::tokenizer::chat_template::Message;

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// Whether a text starts like a transcript.
pub(crate) fn is_transcript(text: &str) -> bool {
    text.trim_start().starts_with(HUMAN.trim_start())
}

/// The turns of a transcript, trimmed. A marker at the very end (where the response goes) gives an empty last turn.
///
/// # Errors
/// The text does not start with the human's marker.
pub(crate) fn turns(text: &str) -> Result<Vec<Message>, String> {
    if !is_transcript(text) {
        return Err("expected a transcript that starts with \"\\n\\nHuman:\"".to_owned());
    }
    // Some copies of the data set lack the leading blank line.
    let text = format!("\n\n{}", text.trim_start());
    let mut rest = text.as_str();
    let mut turns = Vec::new();
    while !rest.is_empty() {
        let (role, after) = match rest.strip_prefix(HUMAN) {
            Some(after) => ("user", after),
            None => ("assistant", rest.strip_prefix(ASSISTANT).expect("the text is cut at markers only")),
        };
        let end = [after.find(HUMAN), after.find(ASSISTANT)].into_iter().flatten().min().unwrap_or(after.len());
        turns.push(Message::new(role, after[..end].trim()));
        rest = &after[end..];
    }
    Ok(turns)
}

/// The longest common beginning of several lists of turns, and the remaining turns of each.
pub(crate) fn common_turns(lists: Vec<Vec<Message>>) -> (Vec<Message>, Vec<Vec<Message>>) {
    let first = &lists[0];
    let shared = (0..first.len()).take_while(|&i| lists.iter().all(|turns| turns.get(i) == first.get(i))).count();
    let prompt = first[..shared].to_vec();
    (prompt, lists.into_iter().map(|mut turns| turns.split_off(shared)).collect())
}

/// The length in bytes of the common beginning of two texts. It is shortened so that it neither splits a word nor ends
/// in the space that belongs to the response's first token.
pub(crate) fn common_text(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum();
    let in_word = |text: &str| text[same..].starts_with(|c: char| c.is_ascii_alphanumeric());
    let mut common = &a[..same];
    // Only words of ASCII letters and digits are kept whole: many scripts put no spaces between words.
    if in_word(a) || in_word(b) {
        common = common.trim_end_matches(|c: char| c.is_ascii_alphanumeric());
    }
    common.strip_suffix(' ').unwrap_or(common).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transcript_becomes_its_turns() {
        let found = turns("\n\nHuman: hi\n\nAssistant: yes?\n\nmore\n\nHuman: bye\n\nAssistant:").unwrap();
        let expected = [("user", "hi"), ("assistant", "yes?\n\nmore"), ("user", "bye"), ("assistant", "")];
        assert_eq!(found, expected.map(|(role, content)| Message::new(role, content)));
        assert!(turns("Assistant: hi").is_err());
    }

    #[test]
    fn a_common_beginning_splits_neither_words_nor_characters() {
        for (a, b, prompt) in [
            ("The sky is blue", "The sky is bluish", "The sky is"),
            ("Q: x? A: yes", "Q: x? A: no", "Q: x? A:"),
            ("天空是蓝色", "天空是灰色", "天空是"),
            ("yes", "no", ""),
            ("same", "same and more", "same"),
        ] {
            assert_eq!(&a[..common_text(a, b)], prompt, "{a} / {b}");
        }
    }
}
