//! The words of an error in a config file: which key of which section, and what was meant instead. It knows the keys of every
//! section. It does not depend on their values. Read `located.rs` for the faults, `synonyms.rs` for what other trainers call keys,
//! `trl.rs` for theirs that mean nothing here.

use toml::{Table, Value};

use super::located::{Fault, KeyError, containing, keys_of, nearest, quoted};
use super::{
    Base, CheckpointConfig, Data, Distill, Dpo, Grpo, Guard, Kto, Lora, Memory, Ppo, Ptx, Reward, RewardPart, Rloo,
    RolloutEngine, Sft, synonyms, trl,
};

/// Every section with its keys.
fn sections() -> [(&'static str, &'static [&'static str]); 16] {
    [
        ("base", keys_of::<Base>()),
        ("reward_base", keys_of::<Base>()),
        ("teacher", keys_of::<Base>()),
        ("lora", keys_of::<Lora>()),
        ("checkpoint", keys_of::<CheckpointConfig>()),
        ("guard", keys_of::<Guard>()),
        ("memory", keys_of::<Memory>()),
        ("data", keys_of::<Data>()),
        ("sft", keys_of::<Sft>()),
        ("reward", keys_of::<Reward>()),
        ("dpo", keys_of::<Dpo>()),
        ("kto", keys_of::<Kto>()),
        ("distill", keys_of::<Distill>()),
        ("ppo", keys_of::<Ppo>()),
        ("grpo", keys_of::<Grpo>()),
        ("rloo", keys_of::<Rloo>()),
    ]
}

/// Every section with the keys that it knows, those inside `[ppo]` by their own path.
pub fn known_keys() -> Vec<(&'static str, &'static [&'static str])> {
    let inside = [
        ("ppo.reward", keys_of::<RewardPart>()),
        ("ppo.ptx", keys_of::<Ptx>()),
        ("ppo.rollout", keys_of::<RolloutEngine>()),
        ("grpo.rollout", keys_of::<RolloutEngine>()),
        ("rloo.rollout", keys_of::<RolloutEngine>()),
        ("grpo.reward", keys_of::<RewardPart>()),
        ("rloo.reward", keys_of::<RewardPart>()),
    ];
    sections().into_iter().chain(inside).collect()
}

/// The tables inside a section, whose header ends it: a key of the section that is written below belongs to the table.
const INNER: [&str; 7] = ["reward", "gold", "ptx", "rollout", "sources", "columns", "tags"];

/// Keys outside the sections that other trainers have among all others.
const AT_THE_TOP: [&str; 3] = ["seed", "output_dir", "report_to"];

/// What other trainers call sections, and what is said of it.
const SECTIONS: &[(&[&str], &str)] = &[
    (&["model", "models", "base_model", "model_args"], "the model is in [base]"),
    (
        &["actor", "policy", "student"],
        "the actor is [base] with the adapter of the stage's section, such as [ppo] adapter",
    ),
    (
        &["ref", "reference", "ref_model"],
        "the reference is what training starts from: the adapter of the stage's section over [base]",
    ),
    (&["critic", "value"], "[ppo] critic says what the critic starts as"),
    (&["reward_model", "rm"], "the reward model is [ppo] reward_adapter over [reward_base]"),
    (&["peft", "adapter", "qlora", "lora_config", "peft_config"], "adapters are shaped by [lora]"),
    (&["dataset", "datasets", "data_args", "train_data"], "records are in [data]"),
    (
        &["train", "training", "trainer", "training_args", "algorithm", "optimizer", "optim"],
        "how a stage trains is in its own section: [sft], [reward], [dpo], [kto], [distill], [ppo], [grpo] or [rloo]",
    ),
    (
        &["rollout", "generation", "sampling", "vllm"],
        "rollouts are in [ppo], [grpo] or [rloo], and their servers in [ppo.rollout]",
    ),
    (&["eval", "evaluation"], "[data] eval_rows or eval_fraction says how many records are held out to evaluate with"),
];

/// The path that `--set` takes for a key of ours or of another trainer: in the section `stage` if it is there, else in one
/// that every stage reads.
pub fn key_path(name: &str, stage: &str) -> Option<String> {
    if has(stage, name) {
        return Some(format!("{stage}.{name}"));
    }
    if AT_THE_TOP.contains(&name) {
        return Some(name.to_owned());
    }
    match synonyms::in_section(name, stage) {
        Some((section, key)) if section.is_empty() => Some(key.to_owned()),
        // A list of tables.
        Some((section, _)) if section == "data.sources" => None,
        Some((section, key)) => Some(format!("{section}.{key}")),
        None => owners(name).first().map(|section| format!("{section}.{name}")),
    }
}

/// Where a key that does not belong here may have been meant to go.
pub(super) fn elsewhere(key: &str) -> Option<String> {
    if let Some(known) = synonyms::known_as(key, "") {
        return Some(known);
    }
    if AT_THE_TOP.contains(&key) {
        return Some(format!("{key} stands at the top of the file, before any section (--set {key}=…)"));
    }
    let owners: Vec<String> = owners(key).iter().map(|name| format!("[{name}]")).collect();
    let has_it = || format!("{} {} it", owners.join(", "), if owners.len() == 1 { "has" } else { "have" });
    (!owners.is_empty()).then(has_it).or_else(|| trl::anywhere(key).map(str::to_owned))
}

/// What an unknown key of a section stands for: another spelling of one that there is, or another trainer's name.
fn known(key: &str, section: &str) -> Option<String> {
    if has(section, key) {
        return Some(format!("did you mean {key:?}?"));
    }
    let of_trl = trl::reason(section, key).map(str::to_owned);
    // [reward] is a section beside the tables of that name.
    let own = || synonyms::inside(key, section).filter(|_| section != "reward");
    of_trl.or_else(own).or_else(|| synonyms::known_as(key, section)).or_else(|| trl::anywhere(key).map(str::to_owned))
}

/// A key as ours are written, in lower case and without hyphens.
fn spelt(key: &str) -> String {
    key.to_lowercase().replace('-', "_")
}

/// The message of a fault in a parsed file.
pub(super) fn describe(error: &KeyError, table: &Table) -> String {
    let at = match error.path.as_slice() {
        [] => String::new(),
        [key] if !table.get(key).is_some_and(Value::is_table) => key.clone(),
        [section] => format!("[{section}]"),
        [section, key @ ..] => format!("[{section}] {}", key.join(".")),
    };
    let guess = |wrong: &str, names: &[&str]| match nearest(wrong, names) {
        Some(name) => format!("did you mean {name:?}?"),
        None => format!("there are {}", quoted(names)),
    };
    match &error.fault {
        Fault::UnknownKey { key, expected } if error.path.is_empty() => {
            let is_tables =
                |value: &Value| value.as_array().is_some_and(|all| all.first().is_some_and(Value::is_table));
            let is_section = table.get(key).is_some_and(|value| value.is_table() || is_tables(value));
            match elsewhere(&spelt(key)).filter(|_| !is_section) {
                Some(hint) => format!("there is no key {key:?} outside the sections; {hint}"),
                None if is_section => {
                    let names = sections().map(|(name, _)| name);
                    let meant = SECTIONS.iter().find(|(theirs, _)| theirs.contains(&&*spelt(key)));
                    let hint = meant.map_or_else(|| guess(key, &names), |(_, ours)| (*ours).to_owned());
                    format!("there is no section [{key}]; {hint}")
                }
                None => format!("there is no key {key:?} outside the sections; {}", guess(key, expected)),
            }
        }
        Fault::UnknownKey { key, expected } if inner(&error.path).is_some() => {
            let (section, table) = (&error.path[0], shown_table(&error.path));
            let near = nearest(key, expected).map(|name| format!("did you mean {name:?}?"));
            let own = error.path.last().and_then(|table| synonyms::inside(&spelt(key), table));
            if has(section, key) {
                let near = near.or(own).map(|near| format!("; or {near}")).unwrap_or_default();
                return format!(
                    "{table} has no key {key:?}, which is one of [{section}]: what stands below {table} belongs to it, so write {key} \
                     above, before the first such table{near}"
                );
            }
            let of_trl = || trl::reason(section, &spelt(key)).or_else(|| trl::anywhere(&spelt(key))).map(str::to_owned);
            let hint = own.or(near).or_else(of_trl).unwrap_or_else(|| guess(key, expected));
            format!("{table} has no key {key:?}; {hint}")
        }
        Fault::UnknownKey { key, expected } => {
            let near = nearest(key, expected).map(|name| format!("did you mean {name:?}?"));
            let section = error.path.first().map_or("", String::as_str);
            let theirs = spelt(key);
            // A part of a name of this section is more likely meant than the whole name of another one.
            let part =
                containing(key, expected).filter(|_| key.contains('_')).map(|name| format!("did you mean {name:?}?"));
            // A key that is spelt right and stands in the wrong place comes before one that is spelt alike.
            let hint = known(&theirs, section).or(part).or_else(|| elsewhere(&theirs)).or(near);
            format!("{at} has no key {key:?}; {}", hint.unwrap_or_else(|| guess(key, expected)))
        }
        Fault::UnknownValue { value, expected } => {
            let near = nearest(value, expected).map(|name| format!("; did you mean {name:?}?")).unwrap_or_default();
            format!("{at} = {value:?} is not one of {}{near}", quoted(expected))
        }
        Fault::Missing("base") => {
            "the section [base] is missing; it needs path = \"a Hugging Face folder or .gguf\"".into()
        }
        Fault::Missing(key) => format!("{at} needs the key {key:?}"),
        Fault::Mismatch(text) => {
            let doubled = error.path.first().filter(|name| error.path.len() == 1 && table[*name].is_array());
            let hint = match doubled.filter(|name| sections().iter().any(|(of, _)| of == *name)) {
                Some(name) if name == "reward" => {
                    "; write [reward] for the reward stage, and [[ppo.reward]], [[grpo.reward]] or [[rloo.reward]] for a source of \
                     the reward"
                        .into()
                }
                Some(name) => format!("; write [{name}], with one pair of brackets"),
                None => String::new(),
            };
            format!("{at} {text}{hint}").trim_start().to_owned()
        }
    }
}

/// The section around a table such as `[[ppo.reward]]`, if the path is one.
fn inner(path: &[String]) -> Option<&str> {
    match path {
        [section, .., table] if INNER.contains(&table.as_str()) => Some(section),
        _ => None,
    }
}

/// `[[ppo.reward]]` or `[ppo.gold]`.
fn shown_table(path: &[String]) -> String {
    let name = path.join(".");
    if name.ends_with(".reward") || name.ends_with(".sources") { format!("[[{name}]]") } else { format!("[{name}]") }
}

/// Whether a section has a key.
pub(super) fn has(section: &str, key: &str) -> bool {
    sections().iter().any(|(name, keys)| *name == section && keys.contains(&key))
}

/// The sections that have a key.
pub(super) fn owners(key: &str) -> Vec<&'static str> {
    sections().into_iter().filter(|(_, keys)| keys.contains(&key)).map(|(name, _)| name).collect()
}
