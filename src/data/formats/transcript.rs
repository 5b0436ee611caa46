//! HH-RLHF transcripts (`\n\nHuman: …\n\nAssistant: …`) -> turns, and the prompt two answers share where no column gives it.
//! Knows no JSON. Read formats.rs next.

use crate::data::Message;

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// Does a text look like a transcript?
pub(crate) fn is_transcript(text: &str) -> bool {
    text.trim_start().starts_with(HUMAN.trim_start())
}

/// The turns of a transcript, trimmed. A marker at the very end (the place for an answer) gives an empty last turn.
pub(crate) fn turns(text: &str) -> Result<Vec<Message>, String> {
    if !is_transcript(text) {
        return Err("expected a transcript that starts with \"\\n\\nHuman:\"".to_owned());
    }
    // Some copies of the set have lost the leading blank line.
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

/// The longest common beginning of all lists of turns, and what each has after it.
pub(crate) fn common_turns(answers: Vec<Vec<Message>>) -> (Vec<Message>, Vec<Vec<Message>>) {
    let first = &answers[0];
    let shared = (0..first.len()).take_while(|&i| answers.iter().all(|turns| turns.get(i) == first.get(i))).count();
    let prompt = first[..shared].to_vec();
    (prompt, answers.into_iter().map(|mut turns| turns.split_off(shared)).collect())
}

/// The common beginning of two texts, in bytes, moved back so that it neither splits a word nor ends in the white space
/// that belongs to the answer's first token.
pub(crate) fn common_text(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum();
    let in_word = |text: &str| text[same..].starts_with(|c: char| c.is_ascii_alphanumeric());
    let mut head = &a[..same];
    // Scripts without spaces have no word to move back over: only a Latin word is kept whole.
    if in_word(a) || in_word(b) {
        head = head.trim_end_matches(|c: char| c.is_ascii_alphanumeric());
    }
    head.strip_suffix(' ').unwrap_or(head).len()
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
    fn a_shared_beginning_keeps_words_and_characters_whole() {
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
