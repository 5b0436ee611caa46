//! Reading a parsed file into a [`Config`], with all of its unknown keys in one error: whoever brings a file of another trainer
//! has many, and an error for each would take as many runs.
//!
//! It does not depend on the keys of any section. Read `located.rs` for the deserializer, `describe.rs` for the words of one fault.

use anyhow::Result;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::Config;
use super::describe::describe;
use super::located::{self, Fault, KeyError};
use crate::invalid;

/// A config file as it was parsed, with the changes of `--set`.
pub(super) struct Written<'a> {
    /// The keys and values, with the changes.
    pub table: Table,
    /// The file's name in messages.
    pub file: &'a str,
    /// The file's text without the changes.
    pub text: &'a str,
    /// The path of each change and its words.
    pub changed: Vec<(Vec<String>, &'a String)>,
}

impl Written<'_> {
    /// The config.
    ///
    /// # Errors
    /// One error for all unknown keys, in the file's order and with those of `--set` behind. Where there is none, one for the first
    /// other fault: what else is wrong may come of the keys that are unknown.
    pub fn config(&self) -> Result<Config> {
        let mut rest = self.table.clone();
        let (mut unknown, mut other): (Vec<(Place, String)>, Option<String>) = (vec![], None);
        loop {
            let error = match located::from_table(rest.clone()) {
                Ok(config) if unknown.is_empty() && other.is_none() => return Ok(config),
                Ok(_) => break,
                Err(error) => error,
            };
            let said = self.said(&error);
            // The search goes on without the key that the fault is of.
            let goes_on = match (&error.fault, error.path.split_last()) {
                (Fault::UnknownKey { key, .. }, _) => {
                    unknown.push(said);
                    removed(&mut rest, &error.path, key)
                }
                (_, at) => {
                    other.get_or_insert(said.1);
                    at.is_some_and(|(key, path)| removed(&mut rest, path, key))
                }
            };
            if !goes_on {
                break;
            }
        }
        unknown.sort_by_key(|(place, _)| *place);
        let mut lines: Vec<String> = unknown.into_iter().map(|(_, line)| line).collect();
        lines.dedup();
        match &lines[..] {
            [] => Err(invalid!("{}", other.unwrap_or_default())),
            [one] => Err(invalid!("{one}")),
            all => Err(invalid!("{} keys or sections are unknown:\n  {}", all.len(), all.join("\n  "))),
        }
    }

    /// The words of a fault, behind the file or the `--set` that it comes from, and the place of that.
    fn said(&self, error: &KeyError) -> (Place, String) {
        let mut at = error.path.clone();
        let is_unknown = matches!(&error.fault, Fault::UnknownKey { .. });
        if let Fault::UnknownKey { key, .. } = &error.fault {
            at.push(key.clone());
        }
        // The last one wins where a key is set twice. `--set lroa.r=4` is at fault for the section it made up.
        let blamed = |path: &[String]| at.starts_with(path) || (is_unknown && path.starts_with(&at));
        let words = describe(error, &self.table);
        match self.changed.iter().enumerate().rev().find(|(_, (path, _))| blamed(path)) {
            Some((number, (_, text))) => (Place::Set(number), format!("--set {text}: {words}")),
            None => {
                let found = DeTable::parse(self.text).ok().and_then(|parsed| offset(parsed.get_ref(), &at));
                (Place::File(found.unwrap_or(usize::MAX)), format!("{}: {words}", self.file))
            }
        }
    }
}

/// Where a key was written, in the order in which messages name it: the byte in the file, or the number of the `--set`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    File(usize),
    Set(usize),
}

/// Removes an unknown key, in a list of tables from the first that has it; whether it was there.
fn removed(table: &mut Table, path: &[String], key: &str) -> bool {
    fn within(value: &mut Value, path: &[String], key: &str) -> bool {
        match value {
            Value::Table(table) => removed(table, path, key),
            Value::Array(items) => items.iter_mut().any(|item| within(item, path, key)),
            _ => false,
        }
    }
    match path {
        [] => table.remove(key).is_some(),
        [first, rest @ ..] => table.get_mut(first).is_some_and(|value| within(value, rest, key)),
    }
}

/// The byte at which a key begins, in a list of tables in the first that has it.
fn offset(table: &DeTable<'_>, path: &[String]) -> Option<usize> {
    fn within(value: &DeValue<'_>, path: &[String]) -> Option<usize> {
        match value {
            DeValue::Table(table) => offset(table, path),
            DeValue::Array(items) => items.iter().find_map(|item| within(item.get_ref(), path)),
            _ => None,
        }
    }
    let (first, rest) = path.split_first()?;
    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == first)?;
    if rest.is_empty() { Some(key.span().start) } else { within(value.get_ref(), rest) }
}
