//! The settings of a run on its page: what differs from the defaults, and all of them; and the commands that repeat the run,
//! resume it and merge what it made. It does not depend on a model.

use std::collections::BTreeMap;

use toml::{Table, Value};

use super::html::{escape, table};
use super::run_files::RunFiles;
use crate::config::{Config, from_value};
use crate::train::fingerprint::flatten;

/// The keys of a run's settings by their paths.
pub(super) fn keys(settings: &Table) -> BTreeMap<String, String> {
    let mut flat = BTreeMap::new();
    flatten("", &Value::Table(settings.clone()), &mut flat);
    flat
}

/// The defaults of every key that has one.
fn defaults() -> BTreeMap<String, String> {
    let bases = "[base]\npath = \"\"\n[reward_base]\npath = \"\"\n[teacher]\npath = \"\"\n";
    let sections = format!("{bases}[data]\n[sft]\n[reward]\n[dpo]\n[kto]\n[ppo]\n[grpo]\n[rloo]\n[distill]\n");
    let config: Option<Config> = sections.parse().ok().and_then(|table| from_value(Value::Table(table)));
    let table = config.and_then(|config| config.to_toml().ok()).and_then(|text| text.parse::<Table>().ok());
    table.map_or_else(BTreeMap::new, |table| keys(&table))
}

/// The section's HTML; empty without settings.
pub(super) fn html(run: &RunFiles) -> String {
    let Some((by, settings)) = &run.settings else { return String::new() };
    let (keys, defaults) = (keys(settings), defaults());
    let mut rows = vec![["key", "this run", "default"].map(str::to_owned).to_vec()];
    for (key, value) in keys.iter().filter(|(key, value)| defaults.get(*key) != Some(*value)) {
        let default = defaults.get(key).filter(|d| *d != "\"\"").map_or("not set", |default| default);
        rows.push(vec![key.clone(), value.clone(), default.into()]);
    }
    let whole = toml::to_string_pretty(settings).unwrap_or_default();
    format!(
        "<section id=settings><h2>Settings</h2><h3>What differs from the defaults</h3>{}\
         <details><summary>All {} settings of this <code>fourfold {}</code></summary><pre>{}</pre></details></section>",
        table(&rows),
        keys.len(),
        escape(by),
        escape(&whole)
    )
}

/// A word of a shell's command line.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// (what for, command) of everything that one may want to do with the run.
pub(super) fn commands(run: &RunFiles) -> Vec<(String, String)> {
    let mut commands = vec![];
    let out = run.path.display().to_string();
    if let Some(about) = run.about.as_ref().filter(|about| !about.resume.is_empty()) {
        let again = about.resume.strip_suffix(" --resume").unwrap_or(&about.resume);
        commands.push(("run it again (in another folder: --out)".into(), again.into()));
        if let Some(line) = run.resuming() {
            commands.push(("resume it".into(), line));
        }
    }
    if let Some((by, _)) = &run.settings {
        let (adapter, format) = match by.as_str() {
            "ppo" | "grpo" | "rloo" => ("actor", ""),
            "reward" => ("adapter", " --format classifier"),
            _ => ("adapter", ""),
        };
        let there = |name: &str, file: &str| run.path.join(name).join(file).is_file();
        match run.base() {
            // Of a run that is not finished, there is nothing to open yet.
            _ if by == "quickstart" && !there("merged", "config.json") => {}
            Some(_) if by != "quickstart" && !there(adapter, "adapter_config.json") => {}
            _ if by == "quickstart" => commands.push((
                "talk with what it made".into(),
                format!("fourfold chat --base {}", word(&format!("{out}/merged"))),
            )),
            Some(base) => commands.push((
                "merge what it made".into(),
                format!(
                    "fourfold merge --base {} --adapter {} --out {}{format}",
                    word(base),
                    word(&format!("{out}/{adapter}")),
                    word(&format!("{out}/merged"))
                ),
            )),
            None => {}
        }
    }
    commands.push(("make this page again".into(), format!("fourfold report {}", word(&out))));
    if run.path.join("tb").is_dir() {
        commands.push(("see the curves in TensorBoard".into(), format!("tensorboard --logdir {}", word(&out))));
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_has_its_defaults() {
        let defaults = defaults();
        for section in ["sft", "reward", "dpo", "kto", "distill", "ppo", "grpo", "rloo"] {
            assert!(defaults.keys().any(|key| key.starts_with(&format!("{section}."))), "{section}");
        }
        for key in ["seed", "lora.r", "data.max_length", "reward_base.path", "teacher.path", "ppo.kl_coef"] {
            assert!(defaults.contains_key(key), "{key}");
        }
    }
}
