//! Makes a proposed config fit the memory, by the planner: smaller passes, recomputation, a quantised base, shorter sequences,
//! in the order of their cost. Read `planner/changes.rs` for the changes.

use anyhow::{Context, Result};
use toml::Table;

use super::document::Document;
use super::look::Seen;
use super::propose::{Asked, Bases};
use crate::config;
use crate::config::{ByteSize, Config, Quantize};
use crate::invalid;
use crate::planner::changes::Change;
use crate::planner::dry;
use crate::planner::plan;
use crate::planner::plan::{Budget, Plan, RESERVE, VARIES};
use crate::run::PlanInputs;

/// The shortest sequence or response that a proposal is cut down to, in tokens.
const SHORTEST: usize = 16;

/// A config that fits.
pub(super) struct Fitted {
    pub(super) document: Document,
    pub(super) plan: Plan,
    /// Whether the mapped base stays in memory beside the rest.
    pub(super) is_comfortable: bool,
    /// The examples whose lengths were planned with; `None` if each was taken to be as long as it may be.
    pub(super) examples: Option<usize>,
}

/// What is to be fitted, and into what.
pub(super) struct Fitter<'a> {
    pub(super) asked: &'a Asked,
    pub(super) bases: &'a Bases,
    pub(super) seen: Option<&'a Seen>,
    /// What a device has for weights and passes, in bytes.
    pub(super) room: Option<usize>,
}

impl Fitter<'_> {
    /// The document, changed where it would not fit.
    ///
    /// # Errors
    /// Nothing fits: what would.
    pub(super) fn fit(&self, mut document: Document) -> Result<Fitted> {
        let stage = self.asked.stage;
        let read = |document: &Document| -> Result<Config> {
            Ok(config::from_text(&document.text()?, "the proposed config")?.on(Some(self.asked.place)))
        };
        let config = read(&document)?;
        let inputs = match self.seen {
            Some(seen) if seen.is_small => PlanInputs::open(stage, &config, 1)?,
            // All records would take long to tokenise; and no run takes more than one whose sequences are as long as they may be.
            Some(seen) => PlanInputs::at_full_length(stage, &config, seen.most_responses, seen.bytes)?,
            None => PlanInputs::at_full_length(stage, &config, 2, 0)?,
        };
        let (change, plan) = self.settle(&config, &inputs)?;
        self.apply(&mut document, change.as_ref())?;
        let is_comfortable = self.budget().is_none_or(|budget| budget.is_comfortable(&plan.peak().1));
        Ok(Fitted { document, plan, is_comfortable, examples: inputs.examples() })
    }

    /// The host's memory; nothing is known of it where the base lies on a device, whose host may be another.
    fn budget(&self) -> Option<Budget> {
        if self.asked.is_on_device() { None } else { Budget::of(self.asked.memory.map(|limit| limit.0)) }
    }

    /// The change with which the config fits, if it needs one, and the plan.
    ///
    /// In this order: as it is; with smaller passes; over a quantised base; with a base that is read from its file in every
    /// pass; with layers that the card does not keep; with shorter sequences.
    fn settle(&self, config: &Config, inputs: &PlanInputs) -> Result<(Option<Change>, Plan)> {
        let (stage, budget) = (self.asked.stage, self.budget());
        let shapes = |config: &Config| inputs.job(stage, config, self.room);
        let fits = |plan: &Plan| plan.fits_with_reserve(budget);
        let is_comfortable = |plan: &Plan| budget.is_none_or(|budget| budget.is_comfortable(&plan.peak().1));
        let (mut fitting, mut least): (Option<(Option<Change>, Plan)>, Option<Plan>) = (None, None);
        let starts = self.starts(config);
        for start in &starts {
            let change = (!start.set.is_empty()).then(|| start.clone());
            let plan = plan::plan(stage, &start.config, budget, &shapes)?;
            if fits(&plan) && is_comfortable(&plan) {
                return Ok((change, plan));
            }
            if fits(&plan) && fitting.is_none() {
                fitting = Some((change, plan.clone()));
            }
            keep_least(&mut least, &plan);
            let mut accept = |change: &Change, plan: &Plan| {
                if is_quantised(change) || is_shortened(change) || change.is_offloaded() {
                    return false;
                }
                keep_least(&mut least, plan);
                if fits(plan) && fitting.is_none() {
                    fitting = Some((Some(then(start, change)), plan.clone()));
                }
                fits(plan) && is_comfortable(plan)
            };
            if let Some((change, plan)) = plan::first_change(stage, &start.config, budget, &shapes, &mut accept)? {
                return Ok((Some(then(start, &change)), plan));
            }
        }
        if let Some(found) = fitting {
            return Ok(found);
        }
        // Over the smallest base: the fewest copies.
        if let Some(start) = starts.last() {
            let mut accept = |change: &Change, plan: &Plan| {
                let is_tried = change.is_offloaded() && !is_shortened(change);
                if is_tried {
                    keep_least(&mut least, plan);
                }
                is_tried && fits(plan)
            };
            if let Some((change, plan)) = plan::first_change(stage, &start.config, budget, &shapes, &mut accept)? {
                return Ok((Some(then(start, &change)), plan));
            }
            let mut accept = |change: &Change, plan: &Plan| {
                let is_tried = !is_quantised(change) && is_shortened(change) && self.is_worth_it(change);
                if is_tried {
                    keep_least(&mut least, plan);
                }
                is_tried && fits(plan)
            };
            if let Some((change, plan)) = plan::first_change(stage, &start.config, budget, &shapes, &mut accept)? {
                return Ok((Some(then(start, &change)), plan));
            }
        }
        Err(least.map_or_else(|| invalid!("{} has no plan", stage.name()), |least| self.refusal(&least, budget)))
    }

    /// Where the search for changes begins: at the config, and at quantised bases.
    fn starts(&self, config: &Config) -> Vec<Change> {
        let quantised = |quantize: Quantize, name: &str| {
            let mut config = config.clone();
            let mut set = vec![("base.quantize".to_owned(), name.to_owned())];
            config.base.quantize = Some(quantize);
            if let Some(other) = &mut config.reward_base {
                other.quantize = Some(quantize);
                set.push(("reward_base.quantize".into(), name.into()));
            }
            if let Some(other) = &mut config.teacher {
                other.quantize = Some(quantize);
                set.push(("teacher.quantize".into(), name.into()));
            }
            Change { set, costs: String::new(), config }
        };
        let mut starts = vec![Change { set: vec![], costs: String::new(), config: config.clone() }];
        let all = [(Quantize::Q8_0, "q8_0"), (Quantize::Q4K, "q4_k")];
        let smaller = match config.base.quantize {
            None if self.bases.is_dense => &all[..],
            Some(Quantize::Q8_0) => &all[1..],
            _ => &[],
        };
        starts.extend(smaller.iter().map(|&(quantize, name)| quantised(quantize, name)));
        starts
    }

    /// Whether a config with shorter sequences still trains on most of the data, in more than a few tokens.
    fn is_worth_it(&self, change: &Change) -> bool {
        let config = &change.config;
        let response = config.ppo.as_ref().map_or(usize::MAX, |ppo| ppo.response_length);
        if self.asked.stage.has_rollouts() {
            return response >= SHORTEST;
        }
        let length = config.data.as_ref().map_or(usize::MAX, |data| data.max_length);
        let keeps_half =
            self.seen.is_none_or(|seen| seen.is_raw_text || 2 * seen.lengths.within(length) >= seen.lengths.len());
        length >= SHORTEST && keeps_half
    }

    /// Writes a change's values into the document.
    fn apply(&self, document: &mut Document, change: Option<&Change>) -> Result<()> {
        let Some(change) = change else { return Ok(()) };
        let table = Table::try_from(&change.config)?;
        let memory =
            self.asked.memory.map_or_else(|| "the memory that is free".to_owned(), |memory| memory.to_string());
        for (path, _) in &change.set {
            let value =
                path.split_once('.').and_then(|(section, key)| Some((section, key, table.get(section)?.get(key)?)));
            let (section, key, value) = value.with_context(|| format!("{path} is no key of the config"))?;
            let before = document.proposals.iter().find(|old| old.section == section && old.key == key);
            let before = before.map(|old| old.why.clone()).unwrap_or_default();
            let why = match (path.as_str(), self.seen) {
                ("data.max_length", Some(seen)) if !seen.is_raw_text => format!(
                    "Longer sequences do not fit {memory}: of {} records, those with more tokens, {}, are dropped and counted.",
                    seen.lengths.len(),
                    seen.lengths.len() - seen.lengths.within(value.as_integer().map_or(0, |length| length as usize))
                ),
                _ => format!("{before} Set so that the run fits {memory}."),
            };
            document.put(section, key, value.clone(), why.trim());
        }
        Ok(())
    }

    fn refusal(&self, least: &Plan, budget: Option<Budget>) -> anyhow::Error {
        let (stage, base) = (self.asked.stage.name(), self.asked.base.display());
        let own = least.peak().1.own();
        let have = match (self.asked.memory, budget) {
            (Some(memory), _) => format!("--memory is {memory}"),
            (None, Some(budget)) => format!("this machine has {} for it", plan::text(budget.room)),
            (None, None) => format!("the card has {} for it", plan::text(self.room.unwrap_or(0) + dry::BESIDE)),
        };
        let needs = match self.asked.is_on_device() {
            true => needed(size(least)) + dry::BESIDE,
            false => needed(own + 2 * VARIES),
        };
        let needs = ByteSize(needs.next_multiple_of(1 << 20));
        let other = if self.asked.stage.has_rollouts() { "shorter responses" } else { "shorter records" };
        invalid!(
            "{stage} over {base} does not fit: with one sequence a pass, everything recomputed and the base as small as it can \
             be, it still needs --memory {needs}, and {have}; take a smaller base or {other}"
        )
    }
}

/// Room of which the reserve leaves `bytes`.
fn needed(bytes: usize) -> usize {
    bytes + bytes.div_ceil(RESERVE - 1) + 1
}

/// The bytes that have to fit: of the devices, or the host's own.
fn size(plan: &Plan) -> usize {
    if plan.devices.is_empty() { plan.peak().1.own() } else { plan.size() }
}

fn is_quantised(change: &Change) -> bool {
    change.set.iter().any(|(key, _)| key == "base.quantize")
}

fn is_shortened(change: &Change) -> bool {
    let shortens = |key: &str| key.ends_with(".response_length") || key.ends_with(".max_completion_length");
    change.set.iter().any(|(key, _)| key == "data.max_length" || shortens(key))
}

/// A change on top of the one that its search began at.
fn then(start: &Change, change: &Change) -> Change {
    Change { set: [&start.set[..], &change.set[..]].concat(), ..change.clone() }
}

fn keep_least(least: &mut Option<Plan>, plan: &Plan) {
    if least.as_ref().is_none_or(|least| size(plan) < size(least)) {
        *least = Some(plan.clone());
    }
}
