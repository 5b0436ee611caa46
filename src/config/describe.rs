//! The words of an error in a config file: which key of which section, and what was meant instead. It knows the keys of every
//! section and what other trainers call them. It does not depend on their values. Read `located.rs` for the faults, `trl.rs` for
//! keys of TRL that mean nothing here.

use toml::{Table, Value};

use super::located::{Fault, KeyError, containing, keys_of, nearest, quoted};
use super::{
    Base, CheckpointConfig, Data, Distill, Dpo, Grpo, Guard, Kto, Lora, Memory, Ppo, Ptx, Reward, RewardPart, Rloo,
    RolloutEngine, Sft, trl,
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
const INNER: [&str; 5] = ["reward", "gold", "ptx", "rollout", "sources"];

/// Keys outside the sections that other trainers have among all others.
const AT_THE_TOP: [&str; 3] = ["seed", "output_dir", "report_to"];

/// What other trainers call our keys: (their name, our section and key).
const ELSEWHERE: &[(&str, &str)] = &[
    ("model_name_or_path", "[base] path"),
    ("actor_model_name_or_path", "[base] path"),
    ("critic_model_name_or_path", "[reward_base] path"),
    ("lora_r", "[lora] r"),
    ("lora_rank", "[lora] r"),
    ("lora_dim", "[lora] r"),
    ("actor_lora_dim", "[lora] r"),
    ("rank", "[lora] r"),
    ("lora_target", "[lora] target_modules"),
    ("lora_target_modules", "[lora] target_modules"),
    ("data_path", "[data] path"),
    ("dataset", "[data] path"),
    ("formatting", "[data] format"),
    ("interleave_probs", "[[data.sources]] weight"),
    ("max_samples", "[data] max_rows"),
    ("cutoff_len", "[data] max_length"),
    ("max_seq_len", "[data] max_length"),
    ("max_seq_length", "[data] max_length"),
    ("max_prompt_seq_len", "[data] max_prompt_length"),
    ("max_answer_seq_len", "[ppo] response_length"),
    ("max_new_tokens", "[ppo] response_length"),
    ("actor_learning_rate", "[ppo] learning_rate"),
    ("ppo_epochs", "[ppo] num_ppo_epochs"),
    ("kl_ctl", "[ppo] kl_coef"),
    ("init_kl_coef", "[ppo] kl_coef"),
    ("lambda", "[ppo] lam"),
    ("clip_reward_value", "[ppo] score_clip"),
    ("reward_model", "[ppo] reward_adapter"),
    ("reward_model_path", "[ppo] reward_adapter"),
    ("actor", "[ppo] adapter"),
    ("policy", "[ppo] adapter"),
    ("actor_adapter", "[ppo] adapter"),
    ("policy_adapter", "[ppo] adapter"),
    ("sft_adapter", "[ppo] adapter"),
    ("lr", "learning_rate"),
    ("warmup_ratio", "warmup_steps"),
    ("num_warmup_steps", "warmup_steps"),
];

/// The path that `--set` takes for a key of ours or of another trainer: in the section `stage` if it is there.
pub fn key_path(name: &str, stage: &str) -> Option<String> {
    let all = sections();
    let has = |section: &str, key: &str| all.iter().any(|(of, keys)| *of == section && keys.contains(&key));
    if has(stage, name) {
        return Some(format!("{stage}.{name}"));
    }
    if let Some((_, ours)) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == name) {
        return match ours.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
            Some((section, key)) if !section.starts_with('[') => Some(format!("{section}.{key}")),
            Some(_) => None,
            None => Some(format!("{stage}.{ours}")),
        };
    }
    if AT_THE_TOP.contains(&name) {
        return Some(name.to_owned());
    }
    all.iter().find(|(_, keys)| keys.contains(&name)).map(|(section, _)| format!("{section}.{name}"))
}

/// What another trainer's key is here, for a section that has it or not.
fn known_as(key: &str, section: &str) -> Option<String> {
    let (_, ours) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == key)?;
    let name = ours.rsplit_once("] ").map_or(*ours, |(_, name)| name);
    if has(section, name) {
        return Some(format!("it is [{section}] {name} here"));
    }
    // [grpo] and [rloo] have other names than [ppo] for some.
    let of_trl = trl::reason(section, name).map(str::to_owned);
    Some(of_trl.unwrap_or_else(|| format!("it is {ours} here")))
}

/// Where a key that does not belong here may have been meant to go.
pub(super) fn elsewhere(key: &str) -> Option<String> {
    if let Some(known) = known_as(key, "") {
        return Some(known);
    }
    if AT_THE_TOP.contains(&key) {
        return Some(format!("{key} stands at the top of the file, before any section (--set {key}=…)"));
    }
    let owners: Vec<&str> =
        sections().into_iter().filter(|(_, keys)| keys.contains(&key)).map(|(name, _)| name).collect();
    let owners: Vec<String> = owners.iter().map(|name| format!("[{name}]")).collect();
    (!owners.is_empty()).then(|| format!("{} {} it", owners.join(", "), if owners.len() == 1 { "has" } else { "have" }))
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
            let is_section = table.get(key).is_some_and(Value::is_table);
            match elsewhere(key).filter(|_| !is_section) {
                Some(hint) => format!("there is no key {key:?} outside the sections; {hint}"),
                None if is_section => {
                    format!("there is no section [{key}]; {}", guess(key, &sections().map(|(name, _)| name)))
                }
                None => format!("there is no key {key:?} outside the sections; {}", guess(key, expected)),
            }
        }
        Fault::UnknownKey { key, .. } if inner(&error.path).is_some_and(|section| has(section, key)) => {
            let (section, table) = (&error.path[0], shown_table(&error.path));
            format!(
                "{table} has no key {key:?}, which is one of [{section}]: what stands below {table} belongs to it, so write {key} \
                 above, before the first such table"
            )
        }
        Fault::UnknownKey { key, expected } => {
            let at = if inner(&error.path).is_some() { shown_table(&error.path) } else { at };
            let near = nearest(key, expected).map(|name| format!("did you mean {name:?}?"));
            let section = error.path.first().map_or("", String::as_str);
            let of_trl = trl::reason(section, key).map(str::to_owned);
            let known = of_trl.or_else(|| known_as(key, section)).or_else(|| trl::nowhere(key).map(str::to_owned));
            // `batch_size` of [ppo] is less likely meant than per_device_train_batch_size of the section itself.
            let part =
                containing(key, expected).filter(|_| key.contains('_')).map(|name| format!("did you mean {name:?}?"));
            // A key that is spelt right and stands in the wrong place comes before one that is spelt alike.
            let hint = known.or(part).or_else(|| elsewhere(key)).or(near).unwrap_or_else(|| guess(key, expected));
            format!("{at} has no key {key:?}; {hint}")
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
        [section, table] if INNER.contains(&table.as_str()) => Some(section),
        _ => None,
    }
}

/// `[[ppo.reward]]` or `[ppo.gold]`.
fn shown_table(path: &[String]) -> String {
    let name = path.join(".");
    if name.ends_with(".reward") || name.ends_with(".sources") { format!("[[{name}]]") } else { format!("[{name}]") }
}

/// Whether a section has a key.
fn has(section: &str, key: &str) -> bool {
    sections().iter().any(|(name, keys)| *name == section && keys.contains(&key))
}
