//! The values that `init` proposes, from what was seen of the base and the data, before the planner makes them fit. It does
//! not depend on the planner. Read `fit.rs` next.

use std::path::PathBuf;

use toml::Value;

use super::document::{Document, grouped, path};
use super::look::{Lengths, Seen};
use crate::config::{ByteSize, DeviceChoice, Key, Stage, keys};
use crate::error::counted;

/// What was asked for on the command line, resolved.
pub(super) struct Asked {
    pub(super) stage: Stage,
    pub(super) base: PathBuf,
    /// The reward model's base or the teacher's, if it is another.
    pub(super) second_base: Option<PathBuf>,
    pub(super) data: Vec<PathBuf>,
    pub(super) memory: Option<ByteSize>,
    /// `--device`.
    pub(super) device: Option<DeviceChoice>,
    /// Where the bases will lie; never `auto`.
    pub(super) place: DeviceChoice,
    pub(super) adapter: Option<PathBuf>,
    /// The reward model's adapter; of an ensemble, all members.
    pub(super) reward_adapters: Vec<PathBuf>,
}

impl Asked {
    pub(super) fn is_on_device(&self) -> bool {
        self.place != DeviceChoice::Cpu
    }
}

/// What was seen of the bases.
pub(super) struct Bases {
    /// Each in words: the policy's, then the reward model's if it is another.
    pub(super) about: Vec<String>,
    /// The longest sequence that all can take, in tokens.
    pub(super) context: usize,
    /// Whether one has matrices that `quantize` makes smaller.
    pub(super) is_dense: bool,
    /// Whether the reward model's has other tokens than the policy's.
    pub(super) other_tokens: bool,
}

/// The share of the records, in percent, that a limit on their length keeps at least.
const KEPT: usize = 95;
/// The examples from which on a higher rank is proposed.
const MANY: usize = 10_000;
/// Most held-out examples: evaluation takes time, and more tell little more.
const MOST_HELD_OUT: usize = 256;
/// Most held-out prompts that PPO answers.
const MOST_EVAL_PROMPTS: usize = 64;
/// Most responses of a whole PPO run that are proposed.
const MOST_EPISODES: usize = 4096;

const RATE: &str = "About ten times what full fine-tuning takes: only the low-rank factors train, and one of them starts at 0, so \
                    that a step changes the weights little (Schulman et al., 2025, \"LoRA Without Regret\", measured this ratio).";

/// The config's own defaults.
struct Defaults(Vec<Key>);

impl Defaults {
    /// The default of a key that has one.
    fn of(&self, section: &str, name: &str) -> Value {
        let key = self.0.iter().find(|key| key.section == section && key.name == name);
        let line = format!("value = {}", key.and_then(|key| key.default.as_deref()).unwrap_or_default());
        let table: Option<toml::Table> = line.parse().ok();
        table.and_then(|mut table| table.remove("value")).unwrap_or_else(|| Value::String(String::new()))
    }

    fn whole(&self, section: &str, name: &str) -> usize {
        self.of(section, name).as_integer().map_or(1, |number| number as usize)
    }
}

/// The document for what was asked and seen.
pub(super) fn propose(asked: &Asked, bases: &Bases, seen: Option<&Seen>) -> Document {
    let draft = Draft { asked, bases, seen, defaults: Defaults(keys()), document: Document::default(), held: 0 };
    draft.document()
}

struct Draft<'a> {
    asked: &'a Asked,
    bases: &'a Bases,
    seen: Option<&'a Seen>,
    defaults: Defaults,
    document: Document,
    /// Held-out examples.
    held: usize,
}

/// A whole number for TOML.
fn whole(number: usize) -> Value {
    Value::Integer(i64::try_from(number).unwrap_or(i64::MAX))
}

impl Draft<'_> {
    fn document(mut self) -> Document {
        self.bases();
        let examples = self.data();
        if self.asked.adapter.is_none() {
            self.lora(examples);
        }
        match self.asked.stage {
            Stage::Ppo => self.ppo(examples),
            Stage::Grpo | Stage::Rloo => self.group(examples),
            _ => self.supervised(examples),
        }
        self.document
    }

    fn put(&mut self, section: &'static str, key: &'static str, value: impl Into<Value>, why: impl Into<String>) {
        self.document.put(section, key, value, why);
    }

    fn bases(&mut self) {
        let about = |at: usize| self.bases.about.get(at).cloned().unwrap_or_default();
        let (first, second) = (about(0), about(1));
        self.put("base", "path", path(&self.asked.base), first);
        if let Some(device) = self.asked.device {
            self.put("base", "device", device.to_string(), "As --device says.");
        }
        if let Some(other) = &self.asked.second_base {
            let section = if self.asked.stage == Stage::Distill { "teacher" } else { "reward_base" };
            self.put(section, "path", path(other), second);
        }
        if let Some(memory) = self.asked.memory {
            let key = if self.asked.is_on_device() { "device_limit" } else { "limit" };
            self.put("memory", key, memory.to_string(), "As --memory says.");
        }
    }

    /// Puts `[data]`; returns the number of examples to train on, about.
    fn data(&mut self) -> Option<usize> {
        let Some(seen) = self.seen else {
            self.document.tail = vec![
                "No --data was given. Name your records here, or run `fourfold init` with --data, which measures them:"
                    .into(),
                "[data]".into(),
                "path = \"records.jsonl\"".into(),
            ];
            return None;
        };
        let files = &self.asked.data;
        let names: Vec<Value> = files.iter().map(|file| path(file).into()).collect();
        let kinds: Vec<String> = seen.kinds.iter().map(|(kind, n)| format!("{} {kind}", grouped(*n))).collect();
        let value = if let [only] = &names[..] { only.clone() } else { Value::Array(names) };
        self.put("data", "path", value, format!("It holds records of these kinds: {}.", kinds.join(", ")));
        let examples = match self.asked.stage {
            Stage::Distill | Stage::Ppo | Stage::Grpo | Stage::Rloo => {
                let (response, _) = self.response_length();
                let most = self.bases.context.saturating_sub(response).max(1);
                let (limit, why) = limit(&seen.lengths, seen, most, "prompts");
                self.put("data", "max_prompt_length", whole(limit), why);
                seen.records * seen.lengths.within(limit) / seen.sampled.max(1)
            }
            _ => {
                let (limit, why) = limit(&seen.lengths, seen, self.bases.context, "records");
                self.put("data", "max_length", whole(limit), why);
                match seen.is_raw_text {
                    true => seen.records * seen.lengths.blocks(limit) / seen.sampled.max(1),
                    false => {
                        let kept = seen.lengths.within(limit) as f64 / seen.lengths.len().max(1) as f64;
                        (seen.records as f64 * seen.per_record * kept) as usize
                    }
                }
            }
        };
        let wanted = if examples < 2 { 0 } else { (examples / 20).clamp(1, MOST_HELD_OUT) };
        // All examples of a prompt stay on one side, so that no fewer than the smallest group can be held out.
        let least = seen.groups.first().map_or(1, |size| size * seen.records / seen.sampled.max(1));
        let held = match (wanted, seen.groups.len()) {
            (1.., 0..=1) => 0,
            (1.., _) if least > wanted => {
                if least <= examples / 2 {
                    least
                } else {
                    0
                }
            }
            _ => wanted,
        };
        let why = match held {
            0 if examples < 2 => "One example has to be trained on.".to_owned(),
            0 => {
                "All examples of one prompt stay on one side, and here a prompt has too many to be held out.".to_owned()
            }
            _ if held > wanted => {
                format!("All examples of one prompt stay on one side, and the rarest prompt has {}.", grouped(held))
            }
            MOST_HELD_OUT => {
                format!("Of {} examples; evaluation takes time, and more would tell little more.", grouped(examples))
            }
            _ => format!("5% of {} examples.", grouped(examples)),
        };
        self.put("data", "eval_rows", whole(held), why);
        self.held = held;
        Some(examples.saturating_sub(held).max(1))
    }

    fn lora(&mut self, examples: Option<usize>) {
        let usual = self.defaults.whole("lora", "r");
        let many = self.asked.stage == Stage::Sft && examples.is_some_and(|n| n >= MANY);
        let (r, why) = match many {
            true => (
                2 * usual,
                format!("Twice PEFT's default: {} examples have more to teach.", grouped(examples.unwrap_or(0))),
            ),
            false => (usual, "PEFT's default.".to_owned()),
        };
        self.put("lora", "r", whole(r), why);
        self.put("lora", "lora_alpha", whole(2 * r), "Twice the rank, LLaMA-Factory's rule.");
        let why = "All linear maps of a block: QLoRA found that it takes all of them to match full fine-tuning.";
        self.put("lora", "target_modules", self.defaults.of("lora", "target_modules"), why);
    }

    fn adapter(&mut self, section: &'static str) {
        if let Some(adapter) = &self.asked.adapter {
            self.put(section, "adapter", path(adapter), "As --adapter says; its shape counts, and [lora] is not used.");
        }
    }

    /// The reward: one model's, or in `sources` that of the members of an ensemble.
    fn reward(&mut self, section: &'static str, sources: &'static str) {
        match &self.asked.reward_adapters[..] {
            [] => {}
            [one] => self.put(section, "reward_adapter", path(one), "As --reward-adapter says."),
            all => {
                let why = format!("All {} members of the run that --reward-adapter names.", all.len());
                let all: Vec<Value> = all.iter().map(|one| path(one).into()).collect();
                self.put(sources, "kind", "adapter", "The members are adapters over one base.");
                self.put(sources, "adapters", all, why);
            }
        }
    }

    fn rate(&mut self, section: &'static str) {
        self.put(section, "learning_rate", self.defaults.of(section, "learning_rate"), RATE);
    }

    fn warmup(&mut self, section: &'static str, steps: usize) {
        let why = format!("A tenth of {} steps, as in LLaMA-Factory's examples of LoRA.", grouped(steps));
        self.put(section, "warmup_steps", whole(steps / 10), why);
        self.put(section, "lr_scheduler_type", "cosine", "As in LLaMA-Factory's examples of LoRA.");
    }

    fn checkpoint(&mut self, section: &'static str) {
        let why = "Decided by the memory when a run starts: less is recomputed where more is free.";
        self.put(section, "checkpoint", self.defaults.of(section, "checkpoint"), why);
    }

    fn supervised(&mut self, examples: Option<usize>) {
        let (stage, section) = (self.asked.stage, self.asked.stage.name());
        self.adapter(section);
        self.rate(section);
        let (epochs, why) = epochs(stage, examples);
        self.put(section, "num_train_epochs", whole(epochs), why);
        let n = examples.unwrap_or(1000);
        let (least, usual) =
            (if stage == Stage::Kto { 4 } else { 1 }, self.defaults.whole(section, "per_device_train_batch_size"));
        let mut batch = match n {
            20_000.. => 4 * usual,
            2000.. => 2 * usual,
            _ => usual,
        };
        // A schedule needs some steps.
        while batch > least && n * epochs / batch < 10 {
            batch /= 2;
        }
        let (micro, steps) = (batch.min(usual), n.div_ceil(batch) * epochs);
        let why = "As many at once as fit.";
        self.put(section, "per_device_train_batch_size", whole(micro), why);
        let why = format!(
            "{} an optimizer step{}.",
            counted(batch, "example"),
            match examples {
                Some(_) => format!(", {} step{} in all", grouped(steps), if steps == 1 { "" } else { "s" }),
                None => String::new(),
            }
        );
        self.put(section, "gradient_accumulation_steps", whole(batch / micro), why);
        if examples.is_some() {
            self.warmup(section, steps);
            if self.held > 0 {
                let why = "About four evaluations in all.";
                self.put(section, "eval_steps", whole((steps / 4).max(1)), why);
            }
        }
        if stage == Stage::Kto {
            self.kto_weights();
        }
        if stage == Stage::Distill {
            let why = "Every response is the policy's own: it is corrected where it goes by itself.";
            self.put(section, "lmbda", 1.0, why);
            let (response, why) = self.response_length();
            self.put(section, "max_new_tokens", whole(response), why);
        }
        self.checkpoint(section);
    }

    /// Evens good and bad responses out.
    fn kto_weights(&mut self) {
        let Some([good, bad]) = self.seen.map(|seen| seen.labels) else { return };
        if good == 0 || bad == 0 || good == bad {
            return;
        }
        let key = if good < bad { "desirable_weight" } else { "undesirable_weight" };
        let weight = good.max(bad) as f64 / good.min(bad) as f64;
        let why = format!(
            "{} {} judged good and {} bad; with this weight both count the same (arXiv:2402.01306).",
            grouped(good),
            if good == 1 { "response is" } else { "responses are" },
            grouped(bad)
        );
        self.put("kto", key, (weight * 100.0).round() / 100.0, why);
    }

    /// The length of a response, and why.
    fn response_length(&self) -> (usize, String) {
        let key = match self.asked.stage {
            Stage::Ppo => "response_length",
            Stage::Distill => "max_new_tokens",
            _ => "max_completion_length",
        };
        let usual = self.defaults.whole(self.asked.stage.name(), key);
        let most = (self.bases.context / 2).max(1);
        match self.seen.filter(|seen| seen.responses.len() > 0) {
            Some(seen) => limit(&seen.responses, seen, most, "responses in the data"),
            None => (usual.min(most), "The default: the data has no responses to measure.".to_owned()),
        }
    }

    fn ppo(&mut self, examples: Option<usize>) {
        self.adapter("ppo");
        self.rate("ppo");
        self.reward("ppo", "ppo.reward");
        if self.bases.other_tokens {
            let why = "[reward_base] has other tokens, and the critic's values belong to the policy's.";
            self.put("ppo", "critic", "actor", why);
        } else if self.asked.reward_adapters.len() > 1 {
            let why = "There is no one reward model to start from: the reward is that of several.";
            self.put("ppo", "critic", "actor", why);
        }
        let usual = self.defaults.whole("ppo", "batch_size");
        let batch = if examples.is_some_and(|n| n >= 2000) { 4 * usual } else { usual };
        let n = examples.unwrap_or(self.defaults.whole("ppo", "total_episodes"));
        let episodes = (n.min(MOST_EPISODES) / batch).max(10) * batch;
        let why = match examples {
            Some(n) if episodes <= n && n <= MOST_EPISODES + batch => {
                format!("Each of {} prompts is answered about once, in {} iterations.", grouped(n), episodes / batch)
            }
            Some(n) => format!("{} iterations over {} prompts.", episodes / batch, grouped(n)),
            None => format!("{} iterations.", episodes / batch),
        };
        self.put("ppo", "total_episodes", whole(episodes), why);
        self.put("ppo", "batch_size", whole(batch), "More responses make a steadier estimate and a longer iteration.");
        let micro = self.defaults.whole("ppo", "micro_batch_size").min(batch);
        self.put("ppo", "micro_batch_size", whole(micro), "As many at once as fit.");
        let (response, why) = self.response_length();
        self.put("ppo", "response_length", whole(response), why);
        if examples.is_some() {
            self.warmup("ppo", episodes / batch);
            let why = format!("{MOST_EVAL_PROMPTS} of those held out at most: each is answered to the end.");
            self.put("ppo", "eval_prompts", whole(self.held.min(MOST_EVAL_PROMPTS)), why);
        }
        self.checkpoint("ppo");
    }

    /// `[grpo]` or `[rloo]`.
    fn group(&mut self, examples: Option<usize>) {
        let section = self.asked.stage.name();
        self.adapter(section);
        self.rate(section);
        self.reward(section, if self.asked.stage == Stage::Grpo { "grpo.reward" } else { "rloo.reward" });
        let generations = self.defaults.whole(section, "num_generations");
        self.put(section, "num_generations", whole(generations), "TRL's.");
        let micro = self.defaults.whole(section, "per_device_train_batch_size");
        let passes = if examples.is_some_and(|n| n >= 2000) { 8 } else { 2 };
        let batch = micro * passes;
        let n = examples.unwrap_or(self.defaults.whole("ppo", "total_episodes") / generations);
        let steps = ((n * generations).min(MOST_EPISODES) / batch).max(10);
        let why = match examples {
            Some(n) => format!(
                "{} responses to {} prompts, {generations} to each, out of {}.",
                grouped(steps * batch),
                grouped(steps * batch / generations),
                grouped(n)
            ),
            None => format!("{} responses, {generations} to a prompt.", grouped(steps * batch)),
        };
        self.put(section, "max_steps", whole(steps), why);
        self.put(section, "per_device_train_batch_size", whole(micro), "As many at once as fit.");
        let why = format!("{batch} responses an optimizer step: more make a steadier estimate and a longer iteration.");
        self.put(section, "gradient_accumulation_steps", whole(passes), why);
        let (response, why) = self.response_length();
        self.put(section, "max_completion_length", whole(response), why);
        if examples.is_some() {
            self.warmup(section, steps);
            let why = format!("{MOST_EVAL_PROMPTS} of those held out at most: each is answered to the end.");
            self.put(section, "eval_prompts", whole(self.held.min(MOST_EVAL_PROMPTS)), why);
        }
        self.checkpoint(section);
    }
}

fn epochs(stage: Stage, examples: Option<usize>) -> (usize, &'static str) {
    match (stage, examples) {
        (Stage::Sft, Some(n)) if n < MANY => (3, "TRL's and LLaMA-Factory's, for fewer than 10,000 examples."),
        (Stage::Sft, _) => (1, "One is enough where examples are many."),
        (Stage::Reward, _) => (1, "A reward model overfits in the second (InstructGPT, appendix C.2)."),
        _ => (1, "A second one leaves the reference further behind for little gain."),
    }
}

/// A limit on a length, at most `context`, that keeps nearly all, and why it has this value.
fn limit(lengths: &Lengths, seen: &Seen, context: usize, of: &str) -> (usize, String) {
    let (most, longest) = (lengths.percentile(KEPT), lengths.longest());
    // Where the longest are not much longer than most, all are kept.
    let kept = if longest <= most + most / 2 { longest } else { most };
    let value = kept.next_multiple_of(8).min(context).max(2);
    let all = match seen.sampled < seen.records {
        true => format!("a sample of {} {of}, of {} in all,", grouped(lengths.len()), grouped(seen.records)),
        false => format!("the {} {of}", grouped(lengths.len())),
    };
    let mut why = format!(
        "Half of {all} have at most {} tokens, 95% {}, 99% {}, all {}",
        grouped(lengths.percentile(50)),
        grouped(most),
        grouped(lengths.percentile(99)),
        grouped(longest)
    );
    let longer = lengths.len() - lengths.within(value);
    if longer > 0 {
        let percent = 100.0 * longer as f64 / lengths.len() as f64;
        why += &match (of, seen.is_raw_text) {
            ("records", true) => "; longer texts are cut into blocks of this length".to_owned(),
            ("responses in the data", _) => format!("; {percent:.1}% are longer"),
            _ => format!("; the longer ones, {percent:.1}%, are dropped and counted"),
        };
    }
    if value == context && longest > context {
        why += "; the base takes no more";
    }
    (value, why + ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lengths: Vec<usize>) -> Seen {
        let n = lengths.len();
        Seen { records: n, sampled: n, lengths: Lengths::new(lengths), per_record: 1.0, ..Seen::default() }
    }

    #[test]
    fn a_limit_keeps_all_where_the_longest_is_near_and_95_percent_where_it_is_far() {
        let near = seen((1..=100).collect());
        let (value, why) = limit(&near.lengths, &near, 4096, "records");
        assert_eq!(value, 104);
        assert_eq!(why, "Half of the 100 records have at most 50 tokens, 95% 95, 99% 99, all 100.");
        let far = seen((1..=99).chain([4000]).collect());
        let (value, why) = limit(&far.lengths, &far, 4096, "records");
        assert_eq!(value, 96, "the 95th of 100 is 95");
        assert!(why.ends_with("all 4,000; the longer ones, 4.0%, are dropped and counted."), "{why}");
        let (value, why) = limit(&far.lengths, &far, 64, "records");
        assert!(value == 64 && why.ends_with("; the base takes no more."), "{why}");
        let sampled = Seen { records: 12_345, ..near };
        let why = limit(&sampled.lengths, &sampled, 4096, "records").1;
        assert!(why.starts_with("Half of a sample of 100 records, of 12,345 in all, have at most 50 tokens"), "{why}");
    }

    #[test]
    fn defaults_are_the_configs_own() {
        let defaults = Defaults(keys());
        assert_eq!(defaults.of("dpo", "learning_rate").as_float(), Some(crate::config::Dpo::default().learning_rate));
        assert_eq!(defaults.whole("ppo", "micro_batch_size"), crate::config::Ppo::default().micro_batch_size);
        assert_eq!(defaults.of("lora", "target_modules").as_str(), Some("all-linear"));
    }
}
