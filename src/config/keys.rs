//! Every key of a config with its type, default, range, unit, values and meaning, for `fourfold keys`.
//!
//! Nothing is written twice: types, defaults and meanings are read off the structs that serde reads a config into (their
//! JSON schema), ranges and units off the table that checks it. It does not depend on a model or data. Read `ranges.rs`
//! next.

use schemars::schema_for;
use serde_json::{Map, Value};

use super::describe::{elsewhere, known};
use super::located::nearest;
use super::{Config, ranges};
use crate::invalid;

/// A key of a config file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its section: `"ppo"`, `"ppo.ptx"`, or `""` for the top of the file.
    pub section: String,
    /// The section as a file writes it: `[ppo]`, `[[data.sources]]`, or nothing.
    pub heading: String,
    /// Its name.
    pub name: String,
    /// The type of its value, in words.
    pub kind: String,
    /// The default as TOML writes it; `None` if the key may be absent and its meaning says what then holds, or if it is
    /// required.
    pub default: Option<String>,
    /// The unit of a number; empty for a pure one.
    pub unit: &'static str,
    /// The range of a number.
    pub range: Option<&'static str>,
    /// The values that a word may have, each with its meaning.
    pub values: Vec<(String, String)>,
    /// What it does.
    pub meaning: String,
}

/// All keys, in the order of the sections.
pub fn keys() -> Vec<Key> {
    let schema: Value = schema_for!(Config).into();
    let mut all = vec![];
    Reader { root: &schema }.section("", "", &schema, &mut all);
    all
}

/// The keys of one section, or one key: `"ppo"`, `"ppo.ptx"`, `"ppo.kl_coef"`.
///
/// # Errors
/// If there is no such section and no such key.
pub fn keys_of_section(wanted: &str) -> anyhow::Result<Vec<Key>> {
    let all = keys();
    let wanted = wanted.trim_matches(['[', ']']);
    let within = |key: &&Key| key.section == wanted || key.section.starts_with(&format!("{wanted}."));
    let found: Vec<Key> = all.iter().filter(within).cloned().collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let path =
        |key: &Key| if key.section.is_empty() { key.name.clone() } else { format!("{}.{}", key.section, key.name) };
    let found: Vec<Key> = all.iter().filter(|key| path(key) == wanted || key.name == wanted).cloned().collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let mut names: Vec<&str> = all.iter().flat_map(|key| [key.section.as_str(), key.name.as_str()]).collect();
    names.retain(|name| !name.is_empty());
    names.dedup();
    // A key's path is wrong in its section or in its key: another key of the section is more like it than a key of another name.
    let in_section = || {
        let (section, name) = wanted.rsplit_once('.')?;
        let own: Vec<&str> = all.iter().filter(|key| key.section == section).map(|key| key.name.as_str()).collect();
        let near = || nearest(name, &own).map(|near| format!("did you mean {:?}?", format!("{section}.{near}")));
        if own.is_empty() { elsewhere(name) } else { known(name, section).or_else(near) }
    };
    let near = elsewhere(wanted)
        .or_else(in_section)
        .or_else(|| nearest(wanted, &names).map(|name| format!("did you mean {name:?}?")));
    let hint = near.map_or_else(
        || "`fourfold keys` prints them all".to_owned(),
        |near| format!("{near}{} `fourfold keys` prints them all", if near.ends_with('?') { "" } else { ";" }),
    );
    Err(invalid!("there is no section and no key {wanted:?}; {hint}"))
}

/// Reads keys off the schema of [`Config`].
struct Reader<'s> {
    root: &'s Value,
}

impl Reader<'_> {
    fn section(&self, section: &str, heading: &str, schema: &Value, all: &mut Vec<Key>) {
        let mut inner = vec![];
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
            let target = self.target(property);
            if target.get("properties").is_some() {
                inner.push((path.clone(), format!("[{path}]"), target));
                continue;
            }
            let items = self.target(&target["items"]);
            if items.get("properties").is_some() {
                inner.push((path.clone(), format!("[[{path}]]"), items));
                continue;
            }
            let (unit, range) = ranges::of(section, name).map_or(("", None), |(unit, range)| (unit, Some(range.text)));
            all.push(Key {
                section: section.to_owned(),
                heading: heading.to_owned(),
                name: name.clone(),
                kind: self.kind(target),
                default: property.get("default").filter(|value| !value.is_null()).map(toml_text),
                unit,
                range,
                values: self.values(target),
                meaning: words(property.get("description").or(target.get("description"))),
            });
        }
        for (path, heading, schema) in inner {
            self.section(&path, &heading, schema, all);
        }
    }

    /// The schema that a property stands for: what it refers to, without `null`.
    fn target<'v>(&'v self, property: &'v Value) -> &'v Value {
        if let Some(name) = property["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/")) {
            return self.target(&self.root["$defs"][name]);
        }
        let mut choices = property["anyOf"].as_array().into_iter().flatten().filter(|choice| choice["type"] != "null");
        match (choices.next(), choices.next()) {
            (Some(only), None) => self.target(only),
            _ => property,
        }
    }

    fn kind(&self, schema: &Value) -> String {
        if !self.values(schema).is_empty() {
            return "one of".to_owned();
        }
        if let Some(choices) = schema["anyOf"].as_array() {
            let kinds: Vec<String> = choices.iter().map(|choice| self.kind(self.target(choice))).collect();
            return kinds.join(" or ");
        }
        let name = match &schema["type"] {
            Value::Array(names) => names.iter().find(|name| *name != "null").and_then(Value::as_str),
            name => name.as_str(),
        };
        match name {
            Some("integer") => "whole number".to_owned(),
            Some("number") => "number".to_owned(),
            Some("boolean") => "true or false".to_owned(),
            Some("array") => format!("list of {}", self.kind(self.target(&schema["items"]))),
            Some("object") => format!("table of {}", self.kind(self.target(&schema["additionalProperties"]))),
            _ => "text".to_owned(),
        }
    }

    fn values(&self, schema: &Value) -> Vec<(String, String)> {
        let listed = schema["enum"].as_array().into_iter().flatten().map(|value| (value, String::new()));
        let described = schema["oneOf"].as_array().into_iter().flatten().flat_map(|choice| {
            let several = choice["enum"].as_array().into_iter().flatten();
            several.chain(choice.get("const")).map(|value| (value, words(choice.get("description"))))
        });
        let text = |(value, meaning): (&Value, String)| Some((value.as_str()?.to_owned(), meaning));
        listed.chain(described).filter_map(text).collect()
    }
}

/// A description as one paragraph.
fn words(description: Option<&Value>) -> String {
    description.and_then(Value::as_str).unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A JSON value as TOML writes it.
fn toml_text(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(toml_text).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => table_text(map),
        other => other.to_string(),
    }
}

fn table_text(map: &Map<String, Value>) -> String {
    let entries: Vec<String> = map.iter().map(|(key, value)| format!("{key} = {}", toml_text(value))).collect();
    if entries.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", entries.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::known_keys;

    fn key(path: &str) -> Key {
        let found = keys_of_section(path).unwrap();
        assert_eq!(found.len(), 1, "{path}: {found:?}");
        found[0].clone()
    }

    #[test]
    fn every_key_that_serde_knows_is_printed_with_its_meaning_and_every_number_has_a_range() {
        let all = keys();
        for (section, names) in known_keys() {
            for name in names {
                let inner = format!("{section}.{name}");
                let found = all.iter().find(|key| key.section == section && key.name == *name);
                assert!(found.is_some() || all.iter().any(|key| key.section == inner), "[{section}] {name}");
            }
        }
        for key in &all {
            let path = format!("{} {}", key.heading, key.name);
            assert!(!key.meaning.is_empty(), "{path}: no meaning");
            let is_number = ["whole number", "number"].contains(&key.kind.as_str());
            assert_eq!(is_number, key.range.is_some(), "{path}: a number, and only a number, has a row in ranges.rs");
            for (value, meaning) in &key.values {
                assert!(!meaning.is_empty() || key.name == "preset", "{path} = {value:?}: no meaning");
            }
        }
    }

    #[test]
    fn a_key_has_type_default_unit_range_and_values() {
        let kl = key("ppo.kl_coef");
        assert_eq!((kl.kind.as_str(), kl.default.as_deref(), kl.unit), ("number", Some("0.05"), "reward per nat"));
        assert_eq!((kl.range, kl.heading.as_str()), (Some("0 or a number above it"), "[ppo]"));
        assert!(kl.meaning.starts_with("Weight of the KL penalty"), "{}", kl.meaning);
        let estimator = key("kl_estimator");
        assert_eq!(estimator.default.as_deref(), Some("\"k1\""));
        assert_eq!(estimator.values.iter().map(|(v, _)| v.as_str()).collect::<Vec<_>>(), ["k1", "k2", "k3", "exact"]);
        assert_eq!(key("data.sources.weight").heading, "[[data.sources]]");
        assert_eq!(key("ema_decay").default, None);
        assert_eq!(key("target_modules").kind, "text or list of text");
        assert!(keys_of_section("[ppo]").unwrap().iter().any(|key| key.section == "ppo.ptx"));
        let error = keys_of_section("kl_coeff").unwrap_err().to_string();
        assert!(error.contains("did you mean \"kl_coef\"?"), "{error}");
        for (path, said) in [
            ("base.dequantize", "did you mean \"base.dequantise\"?"),
            ("ppo.rollout.url", "did you mean \"ppo.rollout.urls\"?"),
            ("sft.lr", "it is [sft] learning_rate here"),
            ("zzz.kl_coef", "it is [ppo] kl_coef"),
        ] {
            let error = keys_of_section(path).unwrap_err().to_string();
            assert!(error.contains(said), "{path}: {error}");
        }
    }

    #[test]
    fn the_defaults_printed_are_those_that_a_config_gets() {
        let config: Config =
            toml::from_str("[base]\npath = 'b'\n[sft]\n[reward]\n[dpo]\n[kto]\n[ppo]\n[grpo]\n[rloo]\n[data]\n")
                .unwrap();
        let written: toml::Table = config.to_toml().unwrap().parse().unwrap();
        let mut compared = 0;
        for key in keys() {
            let Some(value) = written.get(&key.section).and_then(|section| section.get(&key.name)) else { continue };
            let Some(default) = key.default else { continue };
            let line: toml::Table = format!("value = {default}").parse().unwrap_or_else(|e| panic!("{default}: {e}"));
            assert_eq!(&line["value"], value, "[{}] {}", key.section, key.name);
            compared += 1;
        }
        assert!(compared > 100, "{compared}");
    }
}
