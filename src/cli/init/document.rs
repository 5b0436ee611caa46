//! The config that `init` writes: sections of keys, each with a comment of what it is, read off the config's own table, and
//! why it has this value. It does not depend on a model or data.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use toml::Value;

use crate::cli::keys::wrapped;
use crate::config::{Key, keys};

/// A key with its proposed value.
#[derive(Clone, Debug)]
pub(super) struct Proposal {
    pub(super) section: String,
    pub(super) key: String,
    pub(super) value: Value,
    /// Why this value, as sentences.
    pub(super) why: String,
}

/// A config file to be written.
#[derive(Clone, Debug, Default)]
pub(super) struct Document {
    /// Paragraphs in front of the first section; one that begins with a space is left as it is.
    pub(super) head: Vec<String>,
    pub(super) proposals: Vec<Proposal>,
    /// Lines after the last section, which are comments.
    pub(super) tail: Vec<String>,
}

impl Document {
    /// Proposes a value, instead of an earlier one of the same key.
    pub(super) fn put(
        &mut self,
        section: impl Into<String>,
        key: impl Into<String>,
        value: impl Into<Value>,
        why: impl Into<String>,
    ) {
        let new = Proposal { section: section.into(), key: key.into(), value: value.into(), why: why.into() };
        match self.proposals.iter_mut().find(|old| old.section == new.section && old.key == new.key) {
            Some(old) => *old = new,
            None => self.proposals.push(new),
        }
    }

    /// The sections in the order in which they were first proposed.
    fn sections(&self) -> Vec<&str> {
        let mut found: Vec<&str> = vec![];
        for proposal in &self.proposals {
            if !found.contains(&proposal.section.as_str()) {
                found.push(&proposal.section);
            }
        }
        found
    }

    /// The file's text.
    ///
    /// # Errors
    /// A key that no config has, which is a fault of this program.
    pub(super) fn text(&self) -> Result<String> {
        let table = keys();
        let mut out = String::new();
        for paragraph in &self.head {
            match paragraph.starts_with(' ') {
                true => drop(writeln!(out, "#{}", plain(paragraph))),
                false => comment(&mut out, paragraph),
            }
        }
        for section in self.sections() {
            // The sources of a reward are a list.
            let (open, close) = if section.ends_with(".reward") { ("[[", "]]") } else { ("[", "]") };
            let _ = writeln!(out, "\n{open}{section}{close}");
            let of_section = self.proposals.iter().filter(|proposal| proposal.section == section);
            for (number, proposal) in of_section.enumerate() {
                let key = table.iter().find(|key| key.section == section && key.name == proposal.key);
                let key = key.with_context(|| format!("[{section}] has no key {}", proposal.key))?;
                if number > 0 {
                    out.push('\n');
                }
                comment(&mut out, &about(key));
                comment(&mut out, &proposal.why);
                let _ = writeln!(out, "{} = {}", proposal.key, written(&proposal.value));
            }
        }
        if !self.tail.is_empty() {
            out.push('\n');
        }
        for line in &self.tail {
            let _ = writeln!(out, "# {}", plain(line));
        }
        Ok(out)
    }
}

/// The first sentence of a key's meaning, up to a semicolon outside of parentheses.
fn about(key: &Key) -> String {
    let text = &key.meaning;
    let is_outside = |at: usize| text[..at].matches('(').count() == text[..at].matches(')').count();
    let ends = [". ", "; "].into_iter().flat_map(|end| text.match_indices(end)).map(|(at, _)| at);
    let end = ends.filter(|&at| is_outside(at)).min().unwrap_or(text.len());
    format!("{}.", text[..end].trim_end_matches('.'))
}

/// A paragraph as comment lines.
fn comment(out: &mut String, text: &str) {
    match text.is_empty() {
        true => out.push_str("#\n"),
        false => wrapped(out, "# ", "", &plain(text)),
    }
}

/// Text that stays in its line.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A value as people write it in TOML: small numbers with an exponent.
fn written(value: &Value) -> String {
    match value {
        Value::Float(number) if *number != 0.0 && number.abs() < 1e-2 => format!("{number:e}"),
        other => other.to_string(),
    }
}

/// A path as the config reads it back: `$` and a leading `~` stand for themselves.
pub(super) fn path(path: &std::path::Path) -> String {
    let text = path.display().to_string().replace('$', "$$");
    if text.starts_with('~') { format!("./{text}") } else { text }
}

/// A number with a comma between thousands.
pub(super) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config;

    #[test]
    fn a_document_is_toml_with_a_comment_above_each_key_and_later_values_win() {
        let mut document = Document { head: vec!["made\nhere".into()], ..Document::default() };
        document.put("base", "path", path(Path::new("~a/$b")), "Given.");
        document.put("sft", "learning_rate", 1e-3, "First.");
        document.put("sft", "learning_rate", 2e-4, "Second.");
        let text = document.text().unwrap();
        assert!(text.starts_with("# made\u{fffd}here\n\n[base]\n# A Hugging Face folder"), "{text}");
        assert!(text.contains("# Peak learning rate.\n# Second.\nlearning_rate = 2e-4\n"), "{text}");
        assert!(!text.contains("First"), "{text}");
        let config = config::from_text(&text, "a text").unwrap();
        assert_eq!((config.base.path.as_path(), config.sft().learning_rate), (Path::new("./~a/$b"), 2e-4));
        document.put("sft", "no_such_key", 1, "");
        assert!(document.text().unwrap_err().to_string().contains("[sft] has no key no_such_key"));
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let all = [0, 12, 999, 1000, 4096, 1_234_567].map(grouped);
        assert_eq!(all, ["0", "12", "999", "1,000", "4,096", "1,234,567"]);
    }
}
