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
    (
        &["deepspeed", "fsdp", "accelerate", "distributed"],
        "several processes train together where `mpirun` starts them; remove the section",
    ),
    (
        &["quantization", "quantisation", "quantization_config", "bitsandbytes", "bnb"],
        "[base] quantize = \"nf4\", \"q4_k\" or \"q8_0\" quantises the base as it is opened",
    ),
    (
        &["wandb", "tensorboard", "logging", "tracking"],
        "report_to at the top of the file says whether a run writes TensorBoard's file, its folder tb, which `wandb sync` reads; remove \
         the section",
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
    if let Some(of_bases) = trl::reason("base", key) {
        return Some(match owners.is_empty() {
            true => of_bases.to_owned(),
            false => format!("in [base]: {of_bases}; {}, for records", has_it()),
        });
    }
    (!owners.is_empty()).then(has_it).or_else(|| trl::anywhere(key).map(str::to_owned))
}

/// What is said of a key outside the sections: what it would be in the section of a stage that the file has, else of any stage.
fn at_the_top(key: &str, table: &Table) -> Option<String> {
    let has_section = |stage: &str| table.get(stage).is_some_and(Value::is_table);
    let any = !synonyms::STAGES.iter().any(|stage| has_section(stage));
    // A stage's section that has the key comes before what the others make of it.
    let stages = synonyms::STAGES.iter().filter(|stage| !has(stage, key) && (any || has_section(stage)));
    let mut found: Vec<(Vec<String>, &str)> = Vec::new();
    for stage in stages {
        let Some(reason) = trl::reason(stage, key) else { continue };
        match found.iter_mut().find(|(_, known)| *known == reason) {
            Some((stages, _)) => stages.push(format!("[{stage}]")),
            None => found.push((vec![format!("[{stage}]")], reason)),
        }
    }
    let said = || found.iter().map(|(stages, reason)| format!("in {}: {reason}", stages.join(", ")));
    let in_stages = (!found.is_empty()).then(|| said().collect::<Vec<_>>().join("; "));
    // Without a stage's section, keys that there are come first.
    if any { elsewhere(key).or(in_stages) } else { in_stages.or_else(|| elsewhere(key)) }
}

/// What an unknown key of a section stands for: another spelling of one that there is, or another trainer's name.
pub(super) fn known(key: &str, section: &str) -> Option<String> {
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
            match at_the_top(&spelt(key), table).filter(|_| !is_section) {
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
            let (theirs, key) = (spelt(value), error.path.last().map_or("", String::as_str));
            let reason = trl::reason_of_value(error.path.first().map_or("", String::as_str), key, &theirs);
            let near = || synonyms::value(&theirs, expected).or_else(|| nearest(value, expected));
            let hint = match reason {
                Some(reason) => format!("; {reason}"),
                None => near().map(|name| format!("; did you mean {name:?}?")).unwrap_or_default(),
            };
            format!("{at} = {value:?} is not one of {}{hint}", quoted(expected))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The runs of sections in a text, such as `[dpo], [kto]`, each with what follows it.
    fn named(text: &str) -> Vec<(Vec<&str>, &str)> {
        let mut found: Vec<(Vec<&str>, &str)> = Vec::new();
        let mut rest = text;
        let mut joins = false;
        while let Some(at) = rest.find('[') {
            joins = joins && [", ", " or "].contains(&&rest[..at]);
            let Some(end) = rest[at..].find(']').map(|end| at + end) else { break };
            let name = &rest[at + 1..end];
            rest = &rest[end + 1..];
            if !sections().iter().any(|(section, _)| *section == name) {
                joins = false;
            } else if let Some((run, after)) = found.last_mut().filter(|_| joins) {
                run.push(name);
                *after = rest;
            } else {
                found.push((vec![name], rest));
                joins = true;
            }
        }
        found
    }

    fn words(text: &str) -> impl Iterator<Item = &str> {
        text.split(|letter: char| !(letter.is_alphanumeric() || letter == '_')).filter(|word| !word.is_empty())
    }

    /// What is wrong with where a hint sends a key.
    fn misdirection(key: &str, hint: &str) -> Option<String> {
        let is_a_key = |word: &str| !owners(word).is_empty();
        for (run, after) in named(hint) {
            // Stages whose reasons follow: they are read by their own sections below.
            if after.starts_with(':') {
                continue;
            }
            let word = after.strip_prefix(' ').and_then(|after| words(after).next()).unwrap_or_default();
            for section in run {
                let sends_to = match word {
                    "has" | "have" => Some(key),
                    _ if word.contains('_') || is_a_key(word) => Some(word),
                    _ => None,
                };
                match sends_to {
                    Some(to) if !has(section, to) => return Some(format!("[{section}] has no {to}")),
                    None if !words(hint).any(|word| has(section, word)) && !hint.contains("remove the ") => {
                        return Some(format!("no key of [{section}] is named"));
                    }
                    _ => {}
                }
            }
        }
        None
    }

    #[test]
    fn no_hint_sends_a_key_to_a_section_that_has_no_such_key() {
        let names: Vec<&str> = synonyms::names().chain(trl::names()).collect();
        let mut places: Vec<(Vec<String>, &'static [&'static str])> = vec![(vec![], &["seed", "output_dir"])];
        places.extend(
            known_keys().into_iter().map(|(path, keys)| (path.split('.').map(str::to_owned).collect::<Vec<_>>(), keys)),
        );
        let mut files = vec![Table::new()];
        files.extend(synonyms::STAGES.map(|stage| Table::from_iter([(stage.to_owned(), Value::Table(Table::new()))])));
        let mut read = 0;
        for (path, expected) in places {
            for key in names.iter().filter(|key| !expected.contains(key)) {
                for table in files.iter().take(if path.is_empty() { files.len() } else { 1 }) {
                    let fault = Fault::UnknownKey { key: (*key).to_owned(), expected };
                    let said = describe(&KeyError { path: path.clone(), fault }, table);
                    let (_, hint) = said.split_once("; ").unwrap_or_else(|| ("", said.rsplit(": ").next().unwrap()));
                    assert_eq!(misdirection(key, hint), None, "{path:?} {key}: {said}");
                    read += 1;
                }
            }
        }
        assert!(read > 10_000, "{read}");
    }

    #[test]
    fn hints_that_send_a_key_astray_are_found() {
        for (key, hint) in [
            ("save_strategy", "it is in the section [checkpoint]"),
            ("revision", "[base], [data] have it"),
            ("lr", "it is [sft], [lora] learning_rate here"),
            ("x", "[data] eval_rowz says how many"),
            ("model_init_kwargs", "the model is described in [base]"),
        ] {
            assert!(misdirection(key, hint).is_some(), "{hint}");
        }
        for (key, hint) in [
            ("revision", "[data] has it"),
            ("lr", "it is [sft], [dpo] learning_rate here"),
            ("x", "a table [[ppo.reward]] with [base] path"),
            ("x", "[lora] shapes it; remove the key"),
        ] {
            assert_eq!(misdirection(key, hint), None, "{hint}");
        }
    }

    #[test]
    fn what_is_said_of_sections_names_sections_that_there_are_with_keys_of_theirs() {
        for (theirs, said) in SECTIONS {
            let is_ours = |name: &&str| sections().iter().any(|(section, _)| section == name);
            assert!(!theirs.iter().any(is_ours), "{theirs:?}");
            for (run, after) in named(said) {
                let word = words(after).next().unwrap_or_default();
                assert!(run.iter().all(|section| !word.contains('_') || has(section, word)), "{said}");
            }
        }
    }
}
