//! `keys`: every key of a config with its meaning, default, unit, range and values. It does not depend on any stage. Read
//! `config/keys.rs` for where they come from.

use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::config::{Key, keys, keys_of_section};

#[derive(Args)]
pub(super) struct Keys {
    /// A section such as ppo or ppo.ptx, or a key such as kl_coef; else all.
    section: Option<String>,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// Columns of a line of text.
const WIDTH: usize = 96;

pub(super) fn run(args: &Keys) -> Result<()> {
    let found = match &args.section {
        Some(section) => keys_of_section(section)?,
        None => keys(),
    };
    if args.json {
        let key = |key: &Key| {
            let values = key.values.iter().map(|(value, meaning)| json!({"value": value, "meaning": meaning}));
            json!({
                "section": key.section,
                "key": key.name,
                "type": key.kind,
                "default": key.default,
                "unit": Some(key.unit).filter(|unit| !unit.is_empty()),
                "range": key.range,
                "values": values.collect::<Value>(),
                "meaning": key.meaning,
            })
        };
        return super::print_json(&json!({ "keys": found.iter().map(key).collect::<Value>() }));
    }
    super::say(&text(&found))
}

fn text(keys: &[Key]) -> String {
    let mut out = String::new();
    let mut heading = None;
    for key in keys {
        if heading != Some(&key.heading) {
            let _ = writeln!(out, "{}{}", if heading.is_some() { "\n" } else { "" }, title(&key.heading));
            heading = Some(&key.heading);
        }
        let default = key.default.as_ref().map_or_else(String::new, |default| format!(" = {default}"));
        let unit = if key.unit.is_empty() { String::new() } else { format!(" ({})", key.unit) };
        let range = key.range.map_or_else(String::new, |range| format!(": {range}"));
        let _ = writeln!(out, "  {}{default}    {}{unit}{range}", key.name, key.kind);
        wrapped(&mut out, "      ", "", &key.meaning);
        for (value, meaning) in &key.values {
            wrapped(&mut out, "        ", &format!("{value:?}: "), meaning);
        }
    }
    out
}

fn title(heading: &str) -> &str {
    if heading.is_empty() { "at the top of the file" } else { heading }
}

/// A paragraph in lines of [`WIDTH`] columns.
pub(super) fn wrapped(out: &mut String, indent: &str, first: &str, text: &str) {
    let mut line = format!("{indent}{first}");
    let mut is_empty = true;
    for word in text.split(' ') {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(out, "{}", line.trim_end());
            line = format!("{indent}{}", if first.is_empty() { "" } else { "  " });
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    let _ = writeln!(out, "{}", line.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_printed_in_lines_that_fit_a_terminal() {
        let text = text(&keys_of_section("ppo").unwrap());
        assert!(text.starts_with("[ppo]\n  compat"), "{text}");
        assert!(text.contains("  kl_coef = 0.05    number (reward per nat): 0 or a number above it\n"), "{text}");
        assert!(text.contains("        \"k1\": From the sampled token"), "{text}");
        assert!(text.contains("\n[ppo.ptx]\n"), "{text}");
        let most = text.lines().filter(|line| line.starts_with("      ")).map(|line| line.chars().count()).max();
        assert!(most.is_some_and(|most| most <= WIDTH), "{most:?}");
    }
}
