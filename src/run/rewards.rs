//! Builds PPO's reward sources from `reward_adapter`, `[[ppo.reward]]` and `[ppo.gold]`. Read `reward/source.rs` for what a
//! source does.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::{Context, Result};
use regex::Regex;

use super::prompts::all_prompts;
use super::{Model, Wanted};
use crate::config::{EnsembleScore, Ppo, REWARD_ADAPTER, RewardApi, RewardInput, RewardKind, RewardPart};
use crate::data::examples::Examples;
use crate::data::examples::objectives::{PromptExample, TextEncoder};
use crate::data::stream::columns::Columns;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::roles::ValueModel;
use crate::reward::source::among::{OfFirst, Shared};
use crate::reward::source::combine::{Aggregate, Ensemble, Part, WeightedSum};
use crate::reward::source::command::CommandReward;
use crate::reward::source::http::HttpReward;
use crate::reward::source::judge;
use crate::reward::source::judge::{Judge, Rules};
use crate::reward::source::math::{self, MathReward};
use crate::reward::source::retokenised::RetokenisedModel;
use crate::reward::source::retry::RetryPolicy;
use crate::reward::source::served::{self, Dialect, ServedReward, ServedRules};
use crate::reward::source::verify::{Solutions, Verifier};
use crate::reward::source::{RewardModel, RewardSource, Unpadded};
use crate::train::world::World;

/// Requests of a judge at once.
const CONCURRENCY: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

/// The bearer token of a source.
///
/// # Errors
/// Those of [`key_of`].
fn api_key(part: &RewardPart, section: &str) -> Result<Option<String>> {
    key_of(part.api_key_env.as_deref(), &format!("[[{section}.reward]]"))
}

/// The bearer token in a variable. `section`: whose key names it, for messages.
///
/// # Errors
/// If the variable that should hold it is not set.
pub(super) fn key_of(name: Option<&str>, section: &str) -> Result<Option<String>> {
    let Some(name) = name else { return Ok(None) };
    match std::env::var(name) {
        Ok(key) if !key.trim().is_empty() => Ok(Some(key.trim().to_owned())),
        _ => Err(invalid!("{section} api_key_env = {name:?}: that variable is not set; `export {name}=…` first")),
    }
}

/// What a judge is asked.
///
/// # Errors
/// If `request` has no form in JSON.
fn rules(part: &RewardPart, pattern: Option<Regex>) -> Result<Rules> {
    Ok(Rules {
        model: part.model.clone(),
        template: part.template.clone().unwrap_or_else(|| judge::TEMPLATE.into()),
        pattern: pattern.map_or_else(|| Regex::new(judge::PATTERN), Ok)?,
        range: part.range(),
        request: serde_json::from_value(serde_json::to_value(&part.request)?)?,
        concurrency: part.concurrency.unwrap_or(CONCURRENCY),
        prices: (part.input_price.unwrap_or(0.0), part.output_price.unwrap_or(0.0)),
    })
}

/// How a reward model behind a server is asked; `None` for a service with our own requests. `pad`: the pad token that leads
/// prompts under `compat`.
///
/// # Errors
/// If `request` has no form in JSON.
fn served_rules(part: &RewardPart, pad: Option<u32>) -> Result<Option<ServedRules>> {
    let dialect = match part.api {
        RewardApi::Fourfold => return Ok(None),
        RewardApi::Classify => Dialect::Classify,
        RewardApi::Pooling => Dialect::Pooling,
        RewardApi::Score => Dialect::Score,
        RewardApi::SglangClassify => Dialect::SglangClassify,
        RewardApi::SglangScore => Dialect::SglangScore,
    };
    let is_text = part.input == Some(RewardInput::Text);
    let template = part.template.clone().unwrap_or_else(|| served::TEMPLATE.into());
    let request = serde_json::from_value(serde_json::to_value(&part.request)?)?;
    let template = is_text.then_some(template);
    Ok(Some(ServedRules { dialect, model: part.model.clone(), template, index: part.score_index, request, pad }))
}

/// How the scores of an ensemble become one.
pub fn aggregate(score: EnsembleScore, std_coef: f64) -> Aggregate {
    match score {
        EnsembleScore::MeanMinusStd => Aggregate::MeanMinusStd(std_coef),
        EnsembleScore::Mean => Aggregate::Mean,
        EnsembleScore::Min => Aggregate::Min,
    }
}

/// Wait before the first retry.
const BACKOFF: Duration = Duration::from_millis(500);

/// The reward adapters of a run, opened before the sources that borrow them. One list per `[[ppo.reward]]`.
pub(super) struct Adapters {
    main: Option<Adapter>,
    parts: Vec<Vec<Adapter>>,
    gold: Vec<Adapter>,
}

impl Adapters {
    /// Opens every reward adapter that the section names.
    pub(super) fn open(settings: &Ppo, scorer: &Model) -> Result<Self> {
        let section = settings.origin.name();
        let open = |path: &std::path::PathBuf, key: &str| {
            let adapter = scorer.adapter_for(Wanted::RewardModel, path).with_context(|| key.to_owned())?;
            ValueModel::new(&scorer.base, &adapter).with_context(|| format!("{key} = {}", path.display()))?;
            Ok(adapter)
        };
        let all = |part: &RewardPart| -> Result<Vec<Adapter>> {
            part.adapters.iter().map(|path| open(path, &format!("[[{section}.reward]] adapters"))).collect()
        };
        // Several are a source of their own by now.
        let main = settings.reward_adapter.as_slice().iter().find(|path| !path.as_os_str().is_empty());
        Ok(Self {
            main: main.map(|path| open(path, &settings.origin.key(REWARD_ADAPTER))).transpose()?,
            parts: settings.reward.iter().map(all).collect::<Result<_>>()?,
            gold: settings.gold.as_ref().map(all).transpose()?.unwrap_or_default(),
        })
    }

    /// All adapters with distinct names, in the order of the config.
    pub(super) fn all(&self) -> impl Iterator<Item = (String, &Adapter)> {
        let parts = self.parts.iter().enumerate();
        let parts =
            parts.flat_map(|(i, all)| all.iter().enumerate().map(move |(j, a)| (format!("reward {i} adapter {j}"), a)));
        let gold = self.gold.iter().enumerate().map(|(j, a)| (format!("gold adapter {j}"), a));
        self.main.iter().map(|a| ("reward adapter".to_owned(), a)).chain(parts).chain(gold)
    }

    /// `reward_adapter`, from which the critic may be initialised.
    pub(super) fn main(&self) -> Option<&Adapter> {
        self.main.as_ref()
    }
}

/// The reward model's tokenizer, a map from the policy's prompt ids to the same prompts in its tokens, and its token that ends a
/// response.
pub(super) type Translation<'w> = (&'w dyn TextEncoder, &'w HashMap<Vec<u32>, PromptExample>, u32);

/// The inputs from which reward sources are built.
pub(super) struct RewardSourceBuilder<'w> {
    /// Base of the reward models.
    pub scorer: &'w Model,
    /// Translation into its tokens, if they are not the policy's.
    pub retokenise: Option<Translation<'w>>,
    /// Training prompts.
    pub prompts: &'w dyn Examples<PromptExample>,
    /// Evaluation prompts.
    pub eval_prompts: &'w [PromptExample],
    /// Pad token, if `compat` has prompts read without leading pads.
    pub pad: Option<u32>,
    /// Columns of the records, if a source reads them.
    pub columns: Option<&'w Columns>,
    /// The section that names the sources: ppo, grpo or rloo.
    pub section: &'static str,
    /// The ranks that share the responses.
    pub world: &'w World,
}

type Boxed<'w> = Box<dyn RewardSource + 'w>;

impl<'w> RewardSourceBuilder<'w> {
    /// Source of the training reward. A single adapter is used without a weighted sum, so its scores are the exact reward.
    pub(super) fn source(&self, settings: &Ppo, adapters: &'w Adapters) -> Result<Boxed<'w>> {
        let main = adapters.main.as_ref().map(|adapter| self.model(adapter)).transpose()?;
        if settings.reward.is_empty() {
            return main.with_context(|| format!("[{}] has no reward_adapter", settings.origin.name()));
        }
        let mut parts: Vec<Part<'w>> = main
            .into_iter()
            .map(|source| Part { name: REWARD_ADAPTER.into(), weight: 1.0, weight_end: None, source })
            .collect();
        for (part, adapters) in settings.reward.iter().zip(&adapters.parts) {
            let source = self.part(part, adapters)?;
            parts.push(Part { name: part.name().into(), weight: part.weight, weight_end: part.weight_end, source });
        }
        Ok(Box::new(WeightedSum::new(parts)))
    }

    /// Source of the gold reward, with which the policy is evaluated and never trained.
    pub(super) fn gold(&self, settings: &Ppo, adapters: &'w Adapters) -> Result<Option<Boxed<'w>>> {
        settings.gold.as_ref().map(|part| self.part(part, &adapters.gold)).transpose()
    }

    fn model(&self, adapter: &'w Adapter) -> Result<Boxed<'w>> {
        let scorer = ValueModel::new(&self.scorer.base, adapter)?;
        let source: Boxed<'w> = match self.retokenise {
            None => match self.pad {
                None => Box::new(RewardModel(scorer)),
                Some(pad) => Box::new(Unpadded { model: RewardModel(scorer), pad }),
            },
            Some((encoder, prompts, end)) => {
                let context = self.scorer.base.config().max_position_embeddings;
                Box::new(RetokenisedModel { scorer, encoder, end, prompts, context })
            }
        };
        Ok(Box::new(Shared { source, world: self.world }))
    }

    /// A source outside this process.
    fn outside(&self, open: impl FnOnce() -> Result<Boxed<'w>>) -> Result<Boxed<'w>> {
        Ok(Box::new(OfFirst::new(self.world, open)?))
    }

    fn part(&self, part: &RewardPart, adapters: &'w [Adapter]) -> Result<Boxed<'w>> {
        let retry = RetryPolicy {
            timeout: Duration::from_secs_f64(part.timeout_seconds),
            retries: part.retries,
            backoff: BACKOFF,
            fallback: part.fallback_score.map(|score| score as f32),
        };
        let pattern = part.pattern.as_deref().map(Regex::new).transpose()?;
        Ok(match part.kind {
            RewardKind::Adapter => {
                let mut members = adapters.iter().map(|a| self.model(a)).collect::<Result<Vec<_>>>()?;
                match members.len() {
                    1 => members.remove(0),
                    _ => Box::new(Ensemble::new(members, aggregate(part.aggregate, part.std_coef))),
                }
            }
            RewardKind::Command => {
                self.outside(|| Ok(Box::new(CommandReward::start(part.command.clone(), self.columns, retry)?)))?
            }
            RewardKind::Http => {
                let (url, key) = (part.url.clone(), api_key(part, self.section)?);
                match served_rules(part, self.pad)? {
                    None => self.outside(|| Ok(Box::new(HttpReward::new(url, key, self.columns, retry))))?,
                    Some(rules) => {
                        self.outside(|| Ok(Box::new(ServedReward::new(url, key, rules, self.columns, retry)?)))?
                    }
                }
            }
            RewardKind::Judge => {
                let (key, rules) = (api_key(part, self.section)?, rules(part, pattern)?);
                self.outside(|| Ok(Box::new(Judge::new(&part.url, key, rules, self.columns, retry)?)))?
            }
            RewardKind::Regex => Box::new(Verifier::Regex(pattern.context("the config check requires a pattern")?)),
            RewardKind::JsonValid => Box::new(Verifier::JsonValid),
            RewardKind::JsonSchema => {
                Box::new(Verifier::JsonSchema(part.json_schema()?.context("the config check requires a schema")?))
            }
            RewardKind::Math => {
                let columns = self.columns.context("the columns are read for every kind that needs them")?;
                Box::new(MathReward::new(columns, part.column.as_deref().unwrap_or(math::COLUMN))?)
            }
            RewardKind::Length => {
                Box::new(Verifier::Length { min: part.min_tokens, max: part.max_tokens.unwrap_or(usize::MAX) })
            }
            RewardKind::Exact => Box::new(Verifier::Exact { within: pattern, solutions: self.solutions()? }),
        })
    }

    /// Correct answers of the records, for `kind = "exact"`.
    fn solutions(&self) -> Result<Solutions> {
        let mut solutions = Solutions::new();
        for prompt in all_prompts(self.prompts, self.eval_prompts) {
            let prompt = prompt?;
            let Some(answer) = &prompt.answer else {
                return Err(invalid!(
                    "[[{}.reward]] of kind = \"exact\" compares with the answer that a record gives, and the prompt {:?} \
                     has none; use records with \"prompt\" and \"completion\"",
                    self.section,
                    prompt.text.chars().take(60).collect::<String>()
                ));
            };
            solutions.entry(prompt.tokens.clone()).or_default().insert(answer.clone());
        }
        Ok(solutions)
    }
}
