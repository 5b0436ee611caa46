//! The changes of a config that make a stage smaller, the cheapest first, each with its cost in words. It does not depend on
//! the planner's sums: `plan.rs` beside it tries the changes one after another.

use crate::config::{Config, Dequantising, Offload, Quantize, RecomputeSetting, Stage};
use crate::model::block::Recompute;

/// A change of settings that needs less.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Keys and values, as `--set` takes them.
    pub set: Vec<(String, String)>,
    /// The cost of the change, in words.
    pub costs: String,
    /// The changed config.
    pub config: Config,
}

impl Change {
    /// `ppo.micro_batch_size=2 ppo.checkpoint="block"`.
    pub fn text(&self) -> String {
        self.set.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    }

    /// Does it take layers from a device?
    pub fn is_offloaded(&self) -> bool {
        self.set.iter().any(|(key, _)| key.ends_with(".offload"))
    }
}

pub(super) fn with_checkpoint(stage: Stage, config: &Config, checkpoint: RecomputeSetting) -> Config {
    let mut config = config.clone();
    config.set_checkpoint(stage, checkpoint);
    config
}

/// A key that can be made smaller, as a stage's section has it.
struct Knob {
    stage: Stage,
    value: usize,
    set: fn(Stage, &mut Config, usize) -> Vec<(String, String)>,
}

fn pair(key: &str, value: impl ToString) -> (String, String) {
    (key.to_owned(), value.to_string())
}

/// The key that sets the size of a micro-batch.
fn micro_batch(stage: Stage, config: &Config) -> Option<Knob> {
    let Some(keys) = config.supervised(stage) else {
        let value = config.ppo().ok()?.micro_batch_size;
        return Some(Knob { stage, value, set: set_micro_batch });
    };
    Some(match keys.max_tokens_per_batch {
        Some(value) => Knob { stage, value, set: set_tokens },
        None => Knob { stage, value: keys.per_device_train_batch_size, set: set_batch },
    })
}

fn set_micro_batch(stage: Stage, config: &mut Config, size: usize) -> Vec<(String, String)> {
    if let Some(set) = config.change_group(stage, |section| section.set_micro_batch(size)) {
        return set.into_iter().map(|(key, value)| pair(&format!("{}.{key}", stage.name()), value)).collect();
    }
    if let Some(ppo) = &mut config.ppo {
        ppo.micro_batch_size = size;
    }
    vec![pair("ppo.micro_batch_size", size)]
}

fn set_tokens(stage: Stage, config: &mut Config, size: usize) -> Vec<(String, String)> {
    if let Some(section) = config.supervised_mut(stage) {
        section.set_tokens(size);
    }
    vec![pair(&format!("{}.max_tokens_per_batch", stage.name()), size)]
}

/// Sets the examples per micro-batch, with as many micro-batches per step as keep the step's examples.
fn set_batch(stage: Stage, config: &mut Config, size: usize) -> Vec<(String, String)> {
    let Some(section) = config.supervised_mut(stage) else { return vec![] };
    let keys = section.supervised();
    let accumulation = (keys.per_device_train_batch_size * keys.gradient_accumulation_steps).div_ceil(size);
    section.set_batch(size, accumulation);
    vec![
        pair(&format!("{}.per_device_train_batch_size", stage.name()), size),
        pair(&format!("{}.gradient_accumulation_steps", stage.name()), accumulation),
    ]
}

/// The key that sets the size of an evaluation's passes, where the file has it: without it they follow the training's.
fn eval_batch(stage: Stage, config: &Config) -> Option<Knob> {
    let value = config.supervised(stage)?.per_device_eval_batch_size?;
    Some(Knob {
        value,
        stage,
        set: |stage, config, size| {
            if let Some(section) = config.supervised_mut(stage) {
                section.set_eval_batch(size);
            }
            vec![pair(&format!("{}.per_device_eval_batch_size", stage.name()), size)]
        },
    })
}

/// All changes that are tried, the cheapest first: smaller micro-batches cost next to nothing, recomputation half a
/// forward or a whole one, layers that a device does not keep the time of their copies, a quantised base some accuracy,
/// shorter or fewer sequences another training.
pub(super) fn changes(stage: Stage, config: &Config) -> Vec<Change> {
    let blank = Change { set: vec![], costs: String::new(), config: config.clone() };
    let recomputes: &[Recomputed] = match config.checkpoint(stage) {
        RecomputeSetting::None => &RECOMPUTED,
        RecomputeSetting::Mlp => &RECOMPUTED[1..],
        RecomputeSetting::Block | RecomputeSetting::Auto | RecomputeSetting::Offload => &[],
    };
    let on_device =
        [Some(&config.base), config.reward_base.as_ref()].into_iter().flatten().any(|of| of.device().is_device());
    let offloaded = Some(INPUTS_ON_HOST).filter(|_| on_device && config.checkpoint(stage) != RecomputeSetting::Offload);
    let evaluations = halved(0.01, vec![(0.0, blank.clone())], eval_batch(stage, config), |times| {
        format!("evaluations have {times} times as many passes")
    });
    let mut cuts = halved(0.03, evaluations, micro_batch(stage, config), |times| {
        format!("frozen weights are unpacked {times} times as often in updates")
    });
    // The larger a micro-batch, the better it hides the copies of layers.
    let large: Vec<Change> = cuts.iter().map(|(_, cut)| cut.clone()).collect();
    if stage.has_rollouts() {
        cuts = halved(0.05, cuts, at_once(stage, config), |times| format!("responses are sampled in {times} turns"));
    }
    let least = cuts.last().map(|(_, change)| change.clone());
    let mut ladder: Vec<(f64, Change)> = vec![];
    for (price, cut) in cuts {
        if !cut.set.is_empty() {
            ladder.push((price, cut.clone()));
        }
        for recomputed in recomputes.iter().chain(&offloaded) {
            ladder.push((recomputed.price + price, recomputing(stage, cut.clone(), recomputed)));
        }
    }
    ladder.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let least = least.map(|least| match recomputes.last() {
        Some(recomputed) => recomputing(stage, least, recomputed),
        None => least,
    });
    let mut all: Vec<Change> = dequantising(blank.clone()).into_iter().collect();
    all.extend(ladder.into_iter().map(|(_, change)| change));
    // On top of the last of them: changes that affect more than time.
    let mut last = least.unwrap_or(blank);
    let recomputing_all = |cut| match recomputes.last() {
        Some(recomputed) => recomputing(stage, cut, recomputed),
        None => cut,
    };
    all.extend(large.into_iter().map(recomputing_all).chain([last.clone()]).filter_map(offloading));
    for (quantize, name, costs) in [
        (Quantize::Q8_0, "q8_0", "weights of a dense base are rounded to 8.5 bits"),
        (Quantize::Q4K, "q4_k", "weights of a dense base are rounded to 4.5 bits"),
    ] {
        if config.base.quantize.is_none() || (config.base.quantize == Some(Quantize::Q8_0) && name == "q4_k") {
            let mut change = last.clone();
            change.config.base.quantize = Some(quantize);
            change.set.push(pair("base.quantize", name));
            change.costs = join(&change.costs, costs);
            if let Some(other) = &mut change.config.reward_base {
                other.quantize = Some(quantize);
                change.set.push(pair("reward_base.quantize", name));
            }
            all.push(change);
        }
    }
    if stage.has_rollouts() {
        for _ in 0..6 {
            let Some(ppo) = &mut last.config.ppo else { break };
            let (tokens, key) = (ppo.response_length.div_ceil(2), ppo.origin.path("response_length"));
            ppo.response_length = tokens;
            last.config.change_group(stage, |section| section.set_response_length(tokens));
            let mut shorter = last.clone();
            shorter.set.push(pair(&key, tokens));
            shorter.costs = join(&shorter.costs, "shorter responses");
            all.push(shorter);
        }
        return all;
    }
    for _ in 0..6 {
        let Some(data) = &mut last.config.data else { break };
        data.max_length = data.max_length.div_ceil(2);
        let mut shorter = last.clone();
        shorter.set.push(pair("data.max_length", last.config.data.as_ref().map_or(0, |data| data.max_length)));
        shorter.costs = join(&shorter.costs, "longer records are dropped or cut");
        all.push(shorter);
    }
    all
}

/// Each of `from` with the knob at its value, half of it, a quarter, down to 1; `price` is what a halving costs.
fn halved(
    price: f64,
    from: Vec<(f64, Change)>,
    knob: Option<Knob>,
    costs: impl Fn(u32) -> String,
) -> Vec<(f64, Change)> {
    let Some(knob) = knob else { return from };
    let mut all = from.clone();
    let (mut size, mut halvings) = (knob.value, 0);
    while size > 1 && halvings < 24 {
        (size, halvings) = (size.div_ceil(2), halvings + 1);
        for (before, change) in &from {
            let mut change = change.clone();
            let set = (knob.set)(knob.stage, &mut change.config, size);
            change.set.extend(set);
            change.costs = join(&change.costs, &costs(1 << halvings));
            all.push((before + price * f64::from(halvings), change));
        }
    }
    all
}

/// The key that says how many prompts are answered at once.
fn at_once(stage: Stage, config: &Config) -> Option<Knob> {
    Some(Knob {
        value: config.ppo().ok()?.at_once(),
        stage,
        set: |stage, config, size| {
            config.change_group(stage, |section| section.set_at_once(size));
            if let Some(ppo) = &mut config.ppo {
                ppo.local_rollout_forward_batch_size = Some(size);
            }
            vec![pair(&format!("{}.local_rollout_forward_batch_size", stage.name()), size)]
        },
    })
}

/// A way to save less between forward and backward.
struct Recomputed {
    checkpoint: RecomputeSetting,
    name: &'static str,
    costs: &'static str,
    price: f64,
}

/// All, the cheapest first.
const RECOMPUTED: [Recomputed; 2] = [
    Recomputed {
        checkpoint: RecomputeSetting::Mlp,
        name: Recompute::Mlp.name(),
        costs: "half a forward more in every update",
        price: 0.2,
    },
    Recomputed {
        checkpoint: RecomputeSetting::Block,
        name: Recompute::Block.name(),
        costs: "one more forward in every update",
        price: 0.4,
    },
];

/// What a card can do beside them.
const INPUTS_ON_HOST: Recomputed = Recomputed {
    checkpoint: RecomputeSetting::Offload,
    name: Recompute::Offload.name(),
    costs: "one more forward in every update, and blocks' inputs are copied to the host and back",
    price: 0.6,
};

/// The change with weights that are dequantised as memory allows; `None` if the config does not ask for more than that.
fn dequantising(mut change: Change) -> Option<Change> {
    let sections = [
        ("base", Some(&mut change.config.base)),
        ("reward_base", change.config.reward_base.as_mut()),
        ("teacher", change.config.teacher.as_mut()),
    ];
    for (name, section) in sections {
        if let Some(section) = section.filter(|of| of.device().is_device() && of.dequantise().is_ahead()) {
            section.dequantise = Some(Dequantising::Auto);
            change.set.push(pair(&format!("{name}.dequantise"), "auto"));
        }
    }
    change.costs = "products wait for their weights to be dequantised where there is no room for more".into();
    (!change.set.is_empty()).then_some(change)
}

/// The change with layers that a device does not keep, as few as let the run fit; `None` if there is no device, or the config
/// says so already.
fn offloading(mut change: Change) -> Option<Change> {
    let sections = [
        ("base", Some(&mut change.config.base)),
        ("reward_base", change.config.reward_base.as_mut()),
        ("teacher", change.config.teacher.as_mut()),
    ];
    let before = change.set.len();
    for (name, section) in sections {
        if let Some(section) = section.filter(|of| of.device().is_device() && !of.offload().is_auto()) {
            section.offload = Some(Offload::Auto);
            change.set.push(pair(&format!("{name}.offload"), "auto"));
        }
    }
    let costs =
        "layers that do not fit are copied from the host at every pass, so that decoding runs at the link's speed";
    change.costs = join(&change.costs, costs);
    (change.set.len() > before).then_some(change)
}

fn recomputing(stage: Stage, change: Change, by: &Recomputed) -> Change {
    let mut set = change.set;
    set.push(pair(&format!("{}.checkpoint", stage.name()), by.name));
    let costs = join(&change.costs, by.costs);
    Change { set, costs, config: with_checkpoint(stage, &change.config, by.checkpoint) }
}

fn join(one: &str, other: &str) -> String {
    if one.is_empty() { other.to_owned() } else { format!("{one}; {other}") }
}
