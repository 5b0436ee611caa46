//! Rules of the keys and between them, each with its remedy; `ranges.rs` has the ranges of single numbers. `mod.rs` puts
//! the file's name in front of a message.

use anyhow::Result;
use toml::Table;

use super::group::check_rollout;
use super::{
    AdvantageEstimator, Base, Compat, Config, Data, Dpo, Grpo, ImportanceSamplingCorrection, InitLoraWeights,
    KlEstimator, KlIn, Kto, KvCacheType, Lora, MixStrategy, Origin, Paths, PolicyLoss, Ppo, Ptx, REWARD_ADAPTER,
    Reward, RewardLoss, RewardPart, Rloo, Source, TargetModules, Template, ranges,
};
use crate::invalid;

/// Checks a whole config; the first fault found is the error.
pub(super) fn validate(config: &Config) -> Result<()> {
    ranges::check(&Table::try_from(config)?)?;
    base("base", &config.base)?;
    config.reward_base.as_ref().map_or(Ok(()), |section| base("reward_base", section))?;
    config.reward_base.as_ref().map_or(Ok(()), |section| reward_cache(section, &config.base))?;
    config.teacher.as_ref().map_or(Ok(()), |section| base("teacher", section))?;
    lora(&config.lora)?;
    config.data.as_ref().map_or(Ok(()), data)?;
    config.reward.as_ref().map_or(Ok(()), reward)?;
    config.dpo.as_ref().map_or(Ok(()), Dpo::check)?;
    config.kto.as_ref().map_or(Ok(()), Kto::check)?;
    config.distill.as_ref().map_or(Ok(()), |distill| distill.check(config.teacher.is_some()))?;
    config.grpo.as_ref().map_or(Ok(()), Grpo::check)?;
    config.rloo.as_ref().map_or(Ok(()), Rloo::check)?;
    if let (Some(most), Some(section)) = (config.guard.max_kl, config.ppo.as_ref().filter(|ppo| !ppo.measure_kl)) {
        return Err(invalid!(
            "[guard] max_kl = {most} bounds a KL that is not measured: set {}, or remove max_kl",
            if section.origin == Origin::Ppo {
                "[ppo] measure_kl = true".into()
            } else {
                section.origin.key("kl_coef")
            }
        ));
    }
    config.ppo.as_ref().map_or(Ok(()), ppo)
}

/// A reward model's base has a cache of keys and values only where it is the policy's base, too, whose `kv_cache_type` it then has.
fn reward_cache(section: &Base, policy: &Base) -> Result<()> {
    if section.kv_cache_type() != KvCacheType::Auto && !section.is_generated_with_as(policy) {
        return Err(invalid!(
            "[reward_base] kv_cache_type has no effect, since nothing is generated with a reward model; write it in [base]"
        ));
    }
    Ok(())
}

fn base(name: &'static str, section: &Base) -> Result<()> {
    if section.path.as_os_str().is_empty() {
        return Err(invalid!("[{name}] path is empty; name a Hugging Face folder or a .gguf file"));
    }
    Ok(())
}

fn lora(section: &Lora) -> Result<()> {
    for (pattern, &r) in &section.rank_pattern {
        if r == 0 {
            return Err(invalid!("[lora] rank_pattern: {pattern} = 0 does nothing; use 1 or more"));
        }
    }
    for (pattern, &alpha) in &section.alpha_pattern {
        if !(alpha.is_finite() && alpha > 0.0) {
            return Err(invalid!("[lora] alpha_pattern: {pattern} = {alpha} is out of range; use a number above 0"));
        }
    }
    if section.compat.is_some() {
        let usual = Lora::default();
        let more = [
            ("lora_alpha", ![usual.lora_alpha, 1.0].contains(&section.lora_alpha)),
            (
                "init_lora_weights",
                !matches!(section.init_lora_weights, InitLoraWeights::Default | InitLoraWeights::Dschat),
            ),
            ("use_rslora", section.use_rslora),
            ("use_dora", section.use_dora),
            ("alpha_pattern", !section.alpha_pattern.is_empty()),
        ];
        if let Some((key, _)) = more.into_iter().find(|(_, set)| *set) {
            return Err(invalid!(
                "[lora] compat = \"dschat\" means a scale of 1/r and DeepSpeed-Chat's start, beside which {key} has no \
                 place; remove one of them"
            ));
        }
    }
    match &section.target_modules {
        TargetModules::List(names) if names.is_empty() || names.iter().any(String::is_empty) => Err(invalid!(
            "[lora] target_modules has no names or an empty one; use \"all-linear\" or names such as [\"q_proj\", \"v_proj\"]"
        )),
        TargetModules::One(text) if text.is_empty() => {
            Err(invalid!("[lora] target_modules is empty; use \"all-linear\", a list of names or a regular expression"))
        }
        TargetModules::One(text) => regex::Regex::new(text).map(|_| ()).map_err(|error| {
            invalid!("[lora] target_modules = {text:?} is neither \"all-linear\" nor a regular expression: {error}")
        }),
        TargetModules::List(_) => Ok(()),
    }?;
    if section.layers_to_transform.as_ref().is_some_and(Vec::is_empty) {
        return Err(invalid!("[lora] layers_to_transform = [] leaves no block; remove the key to adapt every block"));
    }
    Ok(())
}

fn data(section: &Data) -> Result<()> {
    if !section.path.is_empty() && !section.sources.is_empty() {
        return Err(invalid!("[data] has both path and sources; write the path as a [[data.sources]] of its own"));
    }
    let sources = section.all_sources();
    let nameless = |paths: &Paths| paths.is_empty() || paths.as_slice().iter().any(|path| path.as_os_str().is_empty());
    for (number, source) in section.sources.iter().enumerate() {
        let at = format!("[[data.sources]] number {}", number + 1);
        if nameless(&source.path) {
            return Err(invalid!("{at} needs path = \"file.jsonl\", a folder or a list of them"));
        }
    }
    let named =
        |source: &Source| source.preset.is_some() && source.columns.as_ref().is_some_and(|c| c.pairs().count() > 0);
    if sources.iter().any(named) {
        return Err(invalid!("[data] has both a preset and columns; a preset knows its columns, so keep one of them"));
    }
    if sources.iter().any(|source| nameless(&source.path)) {
        return Err(invalid!(
            "[data] needs path = \"file.jsonl\", a folder or a list of them; --set data.path=… also does"
        ));
    }
    if section.chat_template.is_some() && section.template.is_some_and(|template| template != Template::Chat) {
        return Err(invalid!(
            "[data] has a chat_template that template does not use; remove one of them, or set \"chat\""
        ));
    }
    match (&section.data_split, section.compat) {
        (Some(_), None) => {
            return Err(invalid!(
                "[data] data_split is DeepSpeed-Chat's; add compat = \"dschat\", or use eval_fraction"
            ));
        }
        (Some(split), Some(Compat::Dschat)) => {
            let parts: Vec<f64> = split.split(',').map(|part| part.trim().parse().unwrap_or(f64::NAN)).collect();
            if parts.len() != 3
                || !parts.iter().all(|part| part.is_finite() && *part >= 0.0)
                || parts.iter().sum::<f64>() <= 0.0
            {
                return Err(invalid!(
                    "[data] data_split = {split:?} is not three shares of 0 or more; use \"2,4,4\" for 20%, 40% and 40%"
                ));
            }
        }
        (None, _) => {}
    }
    if section.compat.is_some() && section.mix_strategy() != MixStrategy::Concat {
        return Err(invalid!(
            "[data] compat = \"dschat\" takes its sources one after another and shuffles them; remove weight and mix_strategy"
        ));
    }
    if let (Some(fraction), Some(rows)) = (section.eval_fraction, section.eval_rows) {
        return Err(invalid!("[data] has both eval_fraction = {fraction} and eval_rows = {rows}; keep one of them"));
    }
    Ok(())
}

fn reward(section: &Reward) -> Result<()> {
    if section.compat.is_some() && section.loss != RewardLoss::DivergenceToEnd {
        return Err(invalid!(
            "[reward] compat = \"dschat\" has the loss \"divergence_to_end\" only; remove loss, or compat"
        ));
    }
    if let (Some(leading), None) = (section.num_padding_at_beginning, section.compat) {
        return Err(invalid!(
            "[reward] num_padding_at_beginning = {leading} counts pads, and rows have none; add compat = \"dschat\""
        ));
    }
    Ok(())
}

fn ppo(section: &Ppo) -> Result<()> {
    if section.reward_adapter.is_blank() && section.reward.is_empty() {
        return Err(invalid!(
            "[ppo] needs reward_adapter = \"runs/reward/…\", the folder the reward stage wrote, or a [[ppo.reward]]"
        ));
    }
    section.reward.iter().chain(&section.gold).try_for_each(|part| part.check(section.origin))?;
    let mut names: Vec<&str> = section.reward.iter().map(RewardPart::name).collect();
    names.sort_unstable();
    let name = section.origin.name();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(invalid!("two [[{name}.reward]] are called {:?}; give each a name = \"…\" of its own", twice[0]));
    }
    let has_main = !section.reward_adapter.is_blank();
    if has_main && section.reward_adapter.as_slice().iter().any(|path| path.as_os_str().is_empty()) {
        return Err(invalid!("[{name}] reward_adapter has an empty path among others; remove it"));
    }
    if has_main && names.contains(&REWARD_ADAPTER) {
        return Err(invalid!(
            "[[{name}.reward]] name = \"reward_adapter\" is what [{name}] reward_adapter is called by; give another name"
        ));
    }
    if !has_main && section.reward.iter().all(|part| part.weight == 0.0 && part.weight_end.unwrap_or(0.0) == 0.0) {
        return Err(invalid!(
            "[[{name}.reward]] weight = 0 for every source, so no response gets a reward; give one of them a weight"
        ));
    }
    check_rollout(name, "batch_size", section.batch_size)?;
    if section.eval_every > 0 && section.eval_prompts == 0 {
        return Err(invalid!("[ppo] eval_every = {} evaluates nothing; set eval_prompts", section.eval_every));
    }
    multiple("batch_size", section.batch_size, "num_mini_batches", section.num_mini_batches)?;
    multiple("batch_size", section.batch_size, "num_generations", section.num_generations)?;
    multiple("total_episodes", section.total_episodes, "batch_size", section.batch_size)?;
    if section.use_score_norm && !section.use_score_scaling {
        return Err(invalid!("[ppo] use_score_norm = true works with use_score_scaling = true only; set both"));
    }
    section.ptx.as_ref().map_or(Ok(()), Ptx::check)?;
    section.rollout.as_ref().map_or(Ok(()), |rollout| rollout.check(section))?;
    ppo_together(section)
}

/// Rules between the keys of `[ppo]`.
fn ppo_together(section: &Ppo) -> Result<()> {
    if section.temperature == 0.0 && section.num_generations > 1 {
        return Err(invalid!(
            "[ppo] temperature = 0 gives a prompt the same response num_generations = {} times; use 0.7 to 1.0",
            section.num_generations
        ));
    }
    if section.compat.is_some()
        && (section.num_generations > 1 || section.advantage_estimator != AdvantageEstimator::Gae)
    {
        return Err(invalid!(
            "[ppo] compat = \"dschat\" drops responses and has no other advantages than gae with num_generations = 1; remove \
             compat, or these keys"
        ));
    }
    if section.shared_optimizer && section.ptx.as_ref().is_some_and(|ptx| ptx.separate_step) {
        return Err(invalid!(
            "[ppo.ptx] separate_step = true needs an actor with an optimizer of its own; remove shared_optimizer"
        ));
    }
    let estimator = section.advantage_estimator;
    if estimator.has_groups() && section.num_generations < 2 {
        return Err(invalid!(
            "[ppo] num_generations = {} leaves nothing to compare a response with; {} needs 2 or more",
            section.num_generations,
            estimator.name()
        ));
    }
    if section.critic_warmup > 0 && !estimator.has_critic() {
        return Err(invalid!("[ppo] critic_warmup = {} without a critic; use gae or a2c, or 0", section.critic_warmup));
    }
    if section.kl_in == KlIn::Loss && section.kl_estimator == KlEstimator::K1 {
        return Err(invalid!(
            "[ppo] kl_in = \"loss\" with kl_estimator = \"k1\": its gradient is 0 on average; use k2, k3 or exact"
        ));
    }
    if section.adap_kl_ctrl && section.kl_coef == 0.0 {
        return Err(invalid!("[ppo] adap_kl_ctrl = true multiplies kl_coef, and kl_coef = 0 stays 0; start with 0.05"));
    }
    if section.policy_loss == PolicyLoss::KlPenalty && section.num_ppo_epochs * section.num_mini_batches < 2 {
        return Err(invalid!(
            "[ppo] policy_loss = \"kl_penalty\" with a single step a rollout penalises nothing; use num_mini_batches or \
             num_ppo_epochs = 2 or more"
        ));
    }
    section.check_bootstrap()?;
    section.check_measured()?;
    let low = section.importance_sampling_clip_min.filter(|&low| low > section.importance_sampling_clip_max);
    if let Some(low) = low {
        return Err(invalid!(
            "{} = {low} is more than importance_sampling_clip_max = {}",
            section.origin.key("importance_sampling_clip_min"),
            section.importance_sampling_clip_max
        ));
    }
    if section.compat.is_some() && section.importance_sampling_correction != ImportanceSamplingCorrection::None {
        return Err(invalid!(
            "[ppo] compat = \"dschat\" takes the trainer's log-probabilities already; remove importance_sampling_correction"
        ));
    }
    for (key, value) in
        [("overlong_buffer_len", section.overlong_buffer_len), ("min_response_length", section.min_response_length)]
    {
        if value > section.response_length {
            return Err(invalid!("[ppo] {key} = {value} is more than response_length = {}", section.response_length));
        }
    }
    Ok(())
}

fn multiple(key: &str, value: usize, of: &str, unit: usize) -> Result<()> {
    if value.is_multiple_of(unit) {
        return Ok(());
    }
    let below = value / unit * unit;
    let remedy = match (below, below.checked_add(unit)) {
        (0, _) | (_, None) => format!("try {}", below.max(unit)),
        (_, Some(above)) => format!("try {below} or {above}"),
    };
    Err(invalid!("[ppo] {key} = {value} is not a multiple of {of} = {unit}; {remedy}"))
}
