//! learning: what each algorithm learns on the quickstart's task from the same number of samples: gold score of 256 held-out
//! questions against the KL to the SFT model. It prints one JSON line per point; benches/learning/trl_side.py is TRL's side.
//!
//! cargo bench --bench learning -- --out DIR [--seeds 0,1,2,3,4] [--methods ppo_clip,ppo_kl,rloo,grpo,dpo] [--no-train]
//!     [--study sections] [--learning-rate 2e-3] [--results FILE]
//! cargo bench --bench learning -- --greedy BASE,DATA[,ADAPTER]     greedy accuracy, for arithmetic.py
//!
//! For each seed the quickstart makes base, SFT adapter and reward adapter (DIR/<seed>/). Each method then trains on 2560
//! responses: PPO and its variants in 40 rollouts of 64, DPO on 1280 pairs that the SFT model sampled and the reward model
//! ordered. All start from the SFT adapter, except `dpo_fresh`: it trains a fresh adapter on the merged SFT model, which is
//! how TRL keeps its reference. The same pairs, questions and adapters are written to DIR/<seed>/ for TRL. No method uses
//! the gold rule. `--study sections` runs the methods of `sections.rs` instead. Lines are added to `--results`, and what it
//! holds is not run again. results.jsonl holds the results of five seeds on both sides, and of the study `sections` on ours; rows
//! with `processor` avx2 were made on another machine, where decoding samples other responses.

mod greedy;
mod sections;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use fourfold::config::{Dpo, Ppo, Supervised as _};
use fourfold::data::examples::Examples as _;
use fourfold::data::examples::objectives::{PromptExample, RankedExample};
use fourfold::distill::{self, Teaching};
use fourfold::dpo::pairs;
use fourfold::export::Source;
use fourfold::export::merged;
use fourfold::export::merged::{Kind, MAX_SHARD_SIZE, MergedType};
use fourfold::model::adapter::Adapter;
use fourfold::model::base::Base;
use fourfold::model::block::Recompute;
use fourfold::model::generate::{FinishReason, generate};
use fourfold::model::readers::Sharing;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::planner::plan;
use fourfold::ppo::evaluate::{Evaluated, Evaluation, EvaluationInputs};
use fourfold::ppo::rollout::sampling_params;
use fourfold::ppo::run::{PpoRun, micro_batch_tokens};
use fourfold::ppo::train::train;
use fourfold::quickstart::gold::gold;
use fourfold::quickstart::run::{config, run_with};
use fourfold::quickstart::task::{Row, Split, prompts};
use fourfold::report::Report;
use fourfold::reward::source::{RewardInputs, RewardModel, RewardSource};
use fourfold::rng::derive;
use fourfold::run::Model;
use fourfold::stats::standard_error;
use fourfold::tokenizer::SpecialTokens;
use fourfold::train::session::Session;
use fourfold::train::settings;
use fourfold::train::supervised::Setup;
use fourfold::train::world::World;
use sections::Lines;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The keys of `[ppo]` that each method changes in the quickstart's settings.
const METHODS: &[(&str, &str)] = &[
    ("ppo_clip", ""),
    ("ppo_kl", "policy_loss = \"kl_penalty\""),
    ("rloo", "advantage_estimator = \"rloo\"\nnum_generations = 4"),
    ("grpo", "advantage_estimator = \"grpo\"\nnum_generations = 4"),
];
/// DPO logs no points during training; a lower learning rate gives the point nearer to the SFT model.
const DPO_RATES: &[(&str, f64)] = &[("dpo", 1e-3), ("dpo_3e-4", 3e-4)];
const QUESTIONS: usize = 256;
const PAIRS: usize = 1280;
/// Longest response to a sum, `max_completion_length` of arithmetic.toml.
const GREEDY_TOKENS: usize = 6;
/// Random stream of the pairs' sampling.
const PAIR_STREAM: u64 = 0x5041_4952;

/// The gold rule, which no method uses, by each question's ids.
struct Gold(HashMap<Vec<u32>, Row>);

impl RewardSource for Gold {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let score = |(prompt, response): (&Vec<u32>, &fourfold::model::generate::Response)| {
            let row = self.0.get(prompt).context("an unknown question")?;
            let text = (inputs.decode)(&response.tokens);
            Ok(gold(row, &text, response.finish == FinishReason::Stop).total as f32)
        };
        inputs.prompts.iter().zip(inputs.responses).map(score).collect()
    }
}

struct Arguments {
    out: PathBuf,
    seeds: Vec<u64>,
    methods: Vec<String>,
    train: bool,
    /// The methods of `sections.rs`.
    sections: bool,
    learning_rate: f64,
    results: Option<PathBuf>,
    /// The arithmetic study's question: base, data, and an adapter if there is one.
    greedy: Option<Vec<PathBuf>>,
}

fn arguments() -> Result<Arguments> {
    let mut found = Arguments {
        out: "runs/learning".into(),
        seeds: (0..5).collect(),
        methods: METHODS
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .chain(DPO_RATES.iter().map(|(name, _)| (*name).to_owned()))
            .chain(["dpo_fresh".to_owned()])
            .collect(),
        train: true,
        sections: false,
        learning_rate: 2e-3,
        results: None,
        greedy: None,
    };
    let mut methods: Option<Vec<String>> = None;
    let mut rest = std::env::args().skip(1);
    while let Some(flag) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--out" => found.out = value()?.into(),
            "--seeds" => found.seeds = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--methods" => methods = Some(value()?.split(',').map(str::to_owned).collect()),
            "--study" => match value()?.as_str() {
                sections::STUDY => found.sections = true,
                other => bail!("no study {other}; there is {}", sections::STUDY),
            },
            "--learning-rate" => found.learning_rate = value()?.parse()?,
            "--greedy" => found.greedy = Some(value()?.split(',').map(PathBuf::from).collect()),
            "--results" => found.results = Some(value()?.into()),
            "--no-train" => found.train = false, // writes only the inputs of TRL's side
            "--bench" => {}                      // cargo's
            other => bail!("unknown argument {other}"),
        }
    }
    if found.sections {
        found.methods = sections::METHODS.iter().map(|&name| name.to_owned()).collect();
    }
    found.methods = methods.unwrap_or(found.methods);
    Ok(found)
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    if let Some(paths) = &arguments.greedy {
        let (base, data) = (paths.first(), paths.get(1));
        let (base, data) = base.zip(data).context("--greedy takes BASE,DATA or BASE,DATA,ADAPTER")?;
        println!("{}", greedy::accuracy(base, paths.get(2).map(PathBuf::as_path), data, GREEDY_TOKENS)?);
        return Ok(());
    }
    for &seed in &arguments.seeds {
        let dir = arguments.out.join(seed.to_string());
        if !dir.join("reward").exists() {
            let mut short = config(seed);
            if let Some(ppo) = &mut short.ppo {
                ppo.total_episodes = ppo.batch_size; // the study trains its own policies
            }
            run_with(&dir, &short)?;
        }
        study(seed, &dir, &arguments)?;
    }
    Ok(())
}

fn study(seed: u64, dir: &Path, arguments: &Arguments) -> Result<()> {
    let model = Model::open(&dir.join("base"))?;
    let (sft, reward) = (model.adapter(&dir.join("sft"))?, model.adapter(&dir.join("reward"))?);
    let tokenizer = model.checkpoint.tokenizer();
    let encode = |row: &Row| tokenizer.encode(&row.prompt, SpecialTokens::None);
    // Every method without what the quickstart adds to PPO: TRL's side has neither.
    let ppo = &Ppo { critic_warmup: 0, missing_eos_penalty: None, ..config(seed).ppo()?.clone() };
    let asked = prompts(seed, ppo.total_episodes, Split::Train);
    let questions = asked.iter().map(encode).collect::<Result<Vec<_>>>()?;
    let held_out = prompts(seed, QUESTIONS, Split::HeldOut);
    let mut examples = vec![];
    for (entry, row) in held_out.iter().enumerate() {
        examples.push(PromptExample { tokens: encode(row)?, text: row.prompt.clone(), answer: None, entry });
    }
    let gold_source = Gold(examples.iter().map(|e| e.tokens.clone()).zip(held_out.iter().cloned()).collect());
    let source = RewardModel(ValueModel::new(&model.base, &reward)?);
    let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap_or_default();
    let stop = tokenizer.eos_ids();
    let inputs = EvaluationInputs {
        world: World::alone(),
        base: &model.base,
        sft: &sft,
        source: &source,
        gold: Some(&gold_source),
        prompts: &examples,
        stop,
        decode: &decode,
    };
    // The methods of `sections.rs` read no pairs.
    let found = match arguments.sections {
        true => vec![],
        false => sampled_pairs(&model, &sft, &source, &questions, ppo, &decode, seed)?,
    };
    for_trl(dir, &asked, &held_out, &found, &decode)?;
    if !arguments.train {
        return Ok(());
    }
    let evaluation = Evaluation::new(inputs, ppo, seed);
    let before = evaluation.before(&mut Report::silent())?;
    let evaluation = evaluation.with_baseline(before);
    let marks = match arguments.sections {
        true => json!({
            "study": sections::STUDY, "learning_rate": arguments.learning_rate, "processor": sections::processor(),
        }),
        false => json!({}),
    };
    let is_there = |method: &str| sections::is_there(arguments.results.as_ref(), &marks, method, seed);
    if !is_there("sft")? {
        let mut lines = Lines::new(arguments.results.as_ref(), marks.clone());
        lines.add(point(seed, "sft", 0, &evaluation, evaluation.baseline()));
        lines.finish()?;
    }
    for method in &arguments.methods {
        if is_there(method)? {
            continue;
        }
        let mut lines = Lines::new(arguments.results.as_ref(), marks.clone());
        if arguments.sections && method == "distill" {
            let teacher =
                model.adapter(&dir.join("actor_ppo")).context("distill needs the actor of ppo; run it first")?;
            let settings = sections::distill(ppo, arguments.learning_rate);
            let example = |(entry, tokens): (usize, &Vec<u32>)| PromptExample {
                tokens: tokens.clone(),
                text: asked[entry].prompt.clone(),
                answer: None,
                entry,
            };
            let train: Vec<PromptExample> = questions.iter().enumerate().map(example).collect();
            let tokens = (train.longest_sequence() + settings.max_new_tokens) * settings.per_device_train_batch_size;
            let recompute = plan::resolve(settings.checkpoint, &model.base, &sft, tokens);
            let setup = Setup { base: &model.base, start: &sft, recompute, seed };
            let teaching = Teaching { teacher: Policy::new(&model.base, Some(&teacher)), stop, decode: &decode };
            let nobody: &[PromptExample] = &[];
            let (actor, _) = distill::train(setup, teaching, &train[..], nobody, &settings, &mut Session::silent())?;
            let after = evaluation.run(&"after".into(), &actor, &mut Report::silent())?;
            lines.add(point(seed, method, train.len(), &evaluation, &after));
            lines.finish()?;
            continue;
        }
        if method == "dpo_fresh" {
            let merged = merged(dir, &model, &sft, &questions)?;
            let none = merged.fresh_adapter(&config(seed).lora, seed)?;
            let inputs = EvaluationInputs { base: &merged.base, sft: &none, ..inputs };
            let evaluation = Evaluation::new(inputs, ppo, seed).with_baseline(evaluation.baseline().clone());
            let settings = dpo(1e-3);
            let setup = Setup {
                base: &merged.base,
                start: &none,
                recompute: recompute(&settings, &merged.base, &none, &found),
                seed,
            };
            let (actor, _) = pairs::train(setup, None, &found, &[], &settings, &mut Session::silent())?;
            let after = evaluation.run(&"after".into(), &actor, &mut Report::silent())?;
            lines.add(point(seed, method, 2 * found.len(), &evaluation, &after));
            lines.finish()?;
            continue;
        }
        if let Some((_, learning_rate)) = DPO_RATES.iter().find(|(name, _)| name == method) {
            let settings = dpo(*learning_rate);
            let mut session = Session::silent();
            let setup = Setup {
                base: &model.base,
                start: &sft,
                recompute: recompute(&settings, &model.base, &sft, &found),
                seed,
            };
            let (actor, _) = pairs::train(setup, Some(&sft), &found, &[], &settings, &mut session)?;
            let after = evaluation.run(&"after".into(), &actor, &mut Report::silent())?;
            lines.add(point(seed, method, 2 * found.len(), &evaluation, &after));
            lines.finish()?;
            continue;
        }
        let settings = if arguments.sections {
            sections::settings(method, ppo, arguments.learning_rate)?
        } else {
            let (_, keys) = METHODS.iter().find(|(name, _)| name == method).with_context(|| format!("no {method}"))?;
            changed(ppo, keys)?
        };
        // Of 40 iterations; the point after the last one comes below.
        let eval_every = if arguments.sections { 15 } else { 10 };
        let settings = Ppo { eval_every, eval_prompts: QUESTIONS, ..settings };
        let metrics = tempfile::tempdir()?;
        let mut session = Session::new(Report::to_dir(metrics.path())?);
        let run = PpoRun {
            world: World::alone(),
            base: &model.base,
            reward_base: &model.base,
            sft: &sft,
            reward: Some(&reward),
            prompts: &questions,
            stop,
            source: &source,
            decode: &decode,
            evaluation: Some(&evaluation),
            ptx: None,
            pad: None,
            sampler: None,
            config: &settings,
            seed,
            recompute: plan::resolve(settings.checkpoint, &model.base, &sft, micro_batch_tokens(&questions, &settings)),
            sharing: Sharing::default(),
        };
        let trained = train(&run, &mut session)?;
        for line in fs::read_to_string(metrics.path().join("metrics.jsonl"))?.lines() {
            let line: Value = serde_json::from_str(line)?;
            let at = |key: &str| line.get(key).and_then(Value::as_f64);
            if let (Some(gold), Some(kl), Some(score)) = (at("eval/gold"), at("eval/kl"), at("eval/score")) {
                lines.add(json!({
                    "side": "fourfold", "seed": seed, "method": method, "samples": line["episode"],
                    "gold": gold, "kl": kl, "score": score,
                }));
            }
        }
        let after = evaluation.run(&"after".into(), &trained.actor, &mut Report::silent())?;
        if arguments.sections && method == "ppo" {
            trained.actor.with_provenance(model.provenance()).save(&dir.join("actor_ppo"))?;
        }
        lines.add(point(seed, method, ppo.total_episodes, &evaluation, &after));
        lines.finish()?;
    }
    Ok(())
}

fn dpo(learning_rate: f64) -> Dpo {
    Dpo { learning_rate, per_device_train_batch_size: 32, warmup_steps: 6, ..Dpo::default() }
}

/// Activations that DPO's blocks recompute under `config`.
fn recompute(config: &Dpo, base: &Base, start: &Adapter, pairs: &[RankedExample]) -> Recompute {
    let batch = settings::batch_size(&config.supervised());
    plan::resolve(config.checkpoint, base, start, plan::largest_batch(batch, pairs))
}

/// The SFT model merged into a separate base, on which TRL trains.
fn merged(dir: &Path, model: &Model, sft: &Adapter, prompts: &[Vec<u32>]) -> Result<Model> {
    let out = dir.join("merged_sft");
    if !out.exists() {
        let settings =
            merged::Settings { dtype: MergedType::F32, kind: Kind::LanguageModel, max_shard_size: MAX_SHARD_SIZE };
        let source = Source {
            files: &model.checkpoint,
            base: &model.base,
            adapter: sft,
            prompts: &prompts[..8],
            about: "The SFT model of a study.",
        };
        merged::merge(&source, settings, &out)?;
    }
    Model::open(&out)
}

/// The quickstart's settings with some keys changed.
fn changed(ppo: &Ppo, keys: &str) -> Result<Ppo> {
    let mut table: toml::Table = toml::to_string(ppo)?.parse()?;
    table.extend(keys.parse::<toml::Table>()?);
    Ok(toml::from_str(&toml::to_string(&table)?)?)
}

/// A method's last point: means with the standard error over 256 questions, and the win rate against SFT.
fn point(seed: u64, method: &str, samples: usize, evaluation: &Evaluation<'_>, evaluated: &Evaluated) -> Value {
    let metrics = evaluation.metrics(evaluated);
    let gold = evaluated.gold.as_deref().unwrap_or_default();
    json!({
        "side": "fourfold", "seed": seed, "method": method, "samples": samples, "last": true,
        "gold": metrics["eval/gold"], "gold_standard_error": standard_error(gold), "kl": metrics["eval/kl"],
        "score": metrics["eval/score"], "length": metrics["eval/length"], "ended": metrics["eval/ended"],
        "win_rate": metrics["eval/win_rate"],
        "win_rate_interval": [metrics["eval/win_rate_low"], metrics["eval/win_rate_high"]],
    })
}

/// Two responses of the SFT model to each question, ordered by the reward model; equal responses are left out.
fn sampled_pairs(
    model: &Model,
    sft: &Adapter,
    source: &RewardModel<'_>,
    questions: &[Vec<u32>],
    ppo: &Ppo,
    decode: &dyn Fn(&[u32]) -> String,
    seed: u64,
) -> Result<Vec<RankedExample>> {
    let params = sampling_params(ppo, model.checkpoint.tokenizer().eos_ids());
    let mut found = vec![];
    for (chunk, asked) in questions[..PAIRS].chunks(32).enumerate() {
        let twice: Vec<Vec<u32>> = asked.iter().flat_map(|q| [q.clone(), q.clone()]).collect();
        let seeds: Vec<u64> = (0..twice.len() as u64).map(|i| derive(seed, &[PAIR_STREAM, chunk as u64, i])).collect();
        let responses = generate(Policy::new(&model.base, Some(sft)), &twice, &seeds, &params, |_, _| {})?;
        let scores = source.scores(&RewardInputs {
            prompts: &twice,
            responses: &responses,
            entries: &[],
            decode,
            known: &[],
        })?;
        for (i, prompt) in asked.iter().enumerate() {
            let [a, b] = [2 * i, 2 * i + 1].map(|j| (scores[j], responses[j].tokens.clone()));
            if a.1 != b.1 {
                let (better, worse) = if a.0 >= b.0 { (a.1, b.1) } else { (b.1, a.1) };
                found.push(RankedExample {
                    prompt: prompt.clone(),
                    responses: vec![better, worse],
                    label: Default::default(),
                });
            }
        }
    }
    Ok(found)
}

/// Writes questions, held-out rows and pairs as JSON lines.
fn for_trl(
    dir: &Path,
    asked: &[Row],
    held_out: &[Row],
    pairs: &[RankedExample],
    decode: &dyn Fn(&[u32]) -> String,
) -> Result<()> {
    let lines = |rows: Vec<Value>| rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    fs::write(dir.join("questions.jsonl"), lines(asked.iter().map(|row| json!(row)).collect()))?;
    fs::write(dir.join("held_out.jsonl"), lines(held_out.iter().map(|row| json!(row)).collect()))?;
    let pair = |p: &RankedExample| {
        let ids = json!({ "prompt_ids": p.prompt, "chosen_ids": p.responses[0], "rejected_ids": p.responses[1] });
        let mut row = json!({
            "prompt": decode(&p.prompt), "chosen": decode(&p.responses[0]), "rejected": decode(&p.responses[1]),
        });
        if let (Some(row), Some(ids)) = (row.as_object_mut(), ids.as_object()) {
            row.extend(ids.clone());
        }
        row
    };
    fs::write(dir.join("pairs.jsonl"), lines(pairs.iter().map(pair).collect()))?;
    Ok(())
}
