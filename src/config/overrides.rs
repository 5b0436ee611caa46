//! `--set section.key=value`: changes to the parsed TOML before it is read into structs, so that an override obeys the
//! rules of a line in the file.

use anyhow::Result;
use toml::{Table, Value};

use crate::invalid;

/// The keys that hold lists of tables.
const LISTS: [&str; 4] = ["ppo.reward", "grpo.reward", "rloo.reward", "data.sources"];

/// Writes one `section.key=value` into `table` and returns the key's path.
///
/// The value is read as TOML (`3`, `1e-4`, `true`, `["a", "b"]`, `"text"`); what is no TOML value is a string.
///
/// # Errors
/// No `=`, an empty part of the key, or a part that is a plain value already.
pub(super) fn apply(table: &mut Table, text: &str) -> Result<Vec<String>> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| invalid!("--set {text}: expected section.key=value, as in --set ppo.kl_coef=0.1"))?;
    let path: Vec<String> = key.split('.').map(|part| part.trim().to_owned()).collect();
    if path.iter().any(String::is_empty) {
        return Err(invalid!("--set {text}: the key {key:?} has an empty part; expected section.key=value"));
    }
    let (last, sections) = path.split_last().expect("split yields at least one part");
    let mut at = table;
    for (i, section) in sections.iter().enumerate() {
        let list = sections[..=i].join(".");
        if LISTS.contains(&list.as_str()) {
            return Err(invalid!(
                "--set {text}: [[{list}]] is a list of tables, and --set enters none of them: change the file, or give the whole list, \
                 as in --set '{list}=[{{ {} }}]'",
                if list == "data.sources" { "path = \"a.jsonl\"" } else { "kind = \"length\", max_tokens = 64" }
            ));
        }
        at = match at.entry(section.clone()).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(inner) => inner,
            other => {
                return Err(invalid!("--set {text}: {section} is {} in the file, not a section", other.type_str()));
            }
        };
    }
    at.insert(last.clone(), value_of(value.trim()));
    Ok(path)
}

fn value_of(text: &str) -> Value {
    match format!("value = {text}").parse::<Table>() {
        // More than one key: the text held a line break and a second assignment, so it was no single value.
        Ok(mut table) if table.len() == 1 => table.remove("value").unwrap_or_else(|| Value::String(text.to_owned())),
        _ => Value::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_toml_and_fall_back_to_strings() {
        for (text, expected) in [
            ("3", Value::Integer(3)),
            ("1e-4", Value::Float(1e-4)),
            ("true", Value::Boolean(true)),
            ("\"3\"", Value::String("3".into())),
            ("cosine", Value::String("cosine".into())),
            ("a=b", Value::String("a=b".into())),
            ("$HOME/x.json", Value::String("$HOME/x.json".into())),
            ("1\nother = 2", Value::String("1\nother = 2".into())),
            ("[\"q\", \"v\"]", Value::Array(vec!["q".into(), "v".into()])),
        ] {
            assert_eq!(value_of(text), expected, "{text}");
        }
    }

    #[test]
    fn an_override_replaces_adds_and_refuses_to_enter_a_value() {
        let mut table: Table = "seed = 1\n[ppo]\nkl_coef = 0.1".parse().unwrap();
        apply(&mut table, "ppo.kl_coef=0.2").unwrap();
        apply(&mut table, "data.path=x.json").unwrap();
        assert_eq!(table["ppo"]["kl_coef"].as_float(), Some(0.2));
        assert_eq!(table["data"]["path"].as_str(), Some("x.json"));
        assert!(apply(&mut table, "seed.x=1").unwrap_err().to_string().contains("not a section"));
        for list in ["grpo.reward", "data.sources"] {
            let said = apply(&mut table, &format!("{list}.weight=2")).unwrap_err().to_string();
            assert!(said.contains(&format!("[[{list}]] is a list of tables")), "{said}");
            let whole = said.split('\'').nth(1).unwrap();
            apply(&mut table, whole).unwrap();
            let (section, key) = list.split_once('.').unwrap();
            assert!(table[section][key].as_array().is_some_and(|all| all[0].is_table()), "{whole}");
        }
        assert!(apply(&mut table, "ppo.kl_coef").unwrap_err().to_string().contains("section.key=value"));
        assert!(apply(&mut table, "ppo..x=1").unwrap_err().to_string().contains("empty part"));
    }
}
