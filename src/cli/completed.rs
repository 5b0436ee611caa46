//! Options whose values a shell completes although more than those are taken: devices, and the keys of `--set`. It does not depend
//! on what the values do. Read `completions.rs` for the scripts.

use std::ffi::OsStr;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, Command, Error};

use crate::config::{DeviceChoice, keys};

/// Reads a device; `cuda:N` is one, too.
#[derive(Clone)]
pub(in crate::cli) struct DeviceValue;

impl TypedValueParser for DeviceValue {
    type Value = DeviceChoice;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<DeviceChoice, Error> {
        (|text: &str| text.parse::<DeviceChoice>()).parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(["auto", "cpu", "cuda"].into_iter().map(PossibleValue::new)))
    }
}

/// Sections that every stage reads.
const SHARED: [&str; 7] = ["", "base", "lora", "data", "checkpoint", "guard", "memory"];

/// Reads what `--set` is given, of which the config makes an error itself if it is none of its keys. Completed are the keys of one
/// stage, or of all.
#[derive(Clone)]
pub(super) struct KeyAndValue(pub Option<&'static str>);

impl KeyAndValue {
    fn completes(&self, section: &str) -> bool {
        let Some(stage) = self.0 else { return true };
        let root = section.split('.').next().unwrap_or_default();
        let other = match stage {
            "reward" | "ppo" | "grpo" | "rloo" => "reward_base",
            "distill" => "teacher",
            _ => stage,
        };
        SHARED.contains(&root) || root == stage || root == other
    }
}

impl TypedValueParser for KeyAndValue {
    type Value = String;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<String, Error> {
        clap::builder::StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        // `--set` enters tables, and no lists of them.
        let all = keys().into_iter().filter(|key| self.completes(&key.section) && !key.heading.starts_with("[["));
        Some(Box::new(all.map(|key| {
            let between = if key.section.is_empty() { "" } else { "." };
            // A script is made once in a process.
            PossibleValue::new(&*format!("{}{between}{}=", key.section, key.name).leak())
        })))
    }
}
