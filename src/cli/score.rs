//! `score`: rewards of the responses in a data file, record by record, and the accuracy over its comparisons, of one reward
//! model or of an ensemble. It does not train a model. Read `reward/train.rs` for the scores, `scored.rs` for what is printed.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::scored::{Asked, Found, Scores};
use super::subsets;
use crate::config::{ColumnsRead, Data, EnsembleScore, OnBadRecord, Paths, RewardPart, Truncation};
use crate::data;
use crate::data::examples::objectives::{Encoding, Objective, Outcome, RankedExample, Report};
use crate::data::{ModelEncoder, PairLabel, Place, Record, Text};
use crate::error::counted;
use crate::model::adapter::Adapter;
use crate::report::progress::{Progress, Unit};
use crate::reward::source::combine::Aggregate;
use crate::reward::train as reward;
use crate::run::{Model, aggregate, members};
use crate::{invalid, note, warning};

#[derive(Args)]
pub(super) struct Score {
    /// Model directory or .gguf file.
    #[arg(long)]
    base: PathBuf,
    /// Reward adapter directory; several times, or the folder of a run of [reward] ensemble: an ensemble.
    #[arg(long, required = true)]
    adapter: Vec<PathBuf>,
    /// How an ensemble's scores become one, as in [[ppo.reward]]; else mean_minus_std.
    #[arg(long, value_enum)]
    aggregate: Option<Aggregation>,
    /// How much an ensemble's disagreement costs in mean_minus_std; else 1.
    #[arg(long, value_name = "NUMBER", value_parser = coefficient)]
    std_coef: Option<f64>,
    /// Records with responses: chosen and rejected, responses best first, or a single one.
    #[arg(long)]
    data: PathBuf,
    /// Most tokens of a prompt with a response; never more than the model's context.
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// What happens to a longer one.
    #[arg(long, value_enum, default_value = "skip")]
    on_long: OnLong,
    /// What happens to a record that cannot be read.
    #[arg(long, value_enum, default_value = "error")]
    on_bad_record: OnBad,
    /// The column by whose values the accuracy is broken down too. Without it: `subset`, where the records have that.
    #[arg(long, value_name = "COLUMN")]
    by: Option<String>,
    /// A new file of JSON lines, one per record: file, record number, scores, tokens; or why it was skipped.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    on: super::OnDevice,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnLong {
    /// The prompt loses its first tokens; a record with a response that is too long by itself is skipped.
    Cut,
    /// The record is left out and counted.
    Skip,
    /// The command ends with the record's number.
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnBad {
    /// The record is left out and counted.
    Skip,
    /// The command ends with the record's number.
    Error,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Aggregation {
    /// Their mean less --std-coef times their deviation.
    #[default]
    MeanMinusStd,
    /// Their mean.
    Mean,
    /// The lowest.
    Min,
}

impl Aggregation {
    fn of_config(self) -> EnsembleScore {
        match self {
            Self::MeanMinusStd => EnsembleScore::MeanMinusStd,
            Self::Mean => EnsembleScore::Mean,
            Self::Min => EnsembleScore::Min,
        }
    }
}

/// `--std-coef`, in the range of `[[ppo.reward]] std_coef`.
fn coefficient(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("use 0 or a number above it".into()),
    }
}

/// Comparisons, or responses without one, that are scored at once.
const AT_ONCE: usize = 8;

/// A record with its example, or why it has none.
struct Item {
    place: Place,
    /// The record's number among the usable ones, which an unreadable record has not.
    entry: Option<usize>,
    example: Result<(RankedExample, bool), String>,
}

/// A record with a single response as a ranking of one.
fn with_responses(record: Record) -> Record {
    match record {
        Record::PromptCompletion { prompt, completion } | Record::Unpaired { prompt, completion, .. } => {
            Record::Ranked { prompt, responses: vec![completion], label: Default::default() }
        }
        Record::LanguageModeling(Text::Dialogue(mut turns))
            if turns.len() > 1 && turns.last().is_some_and(|turn| turn.role == "assistant") =>
        {
            let response = turns.split_off(turns.len() - 1);
            Record::Ranked {
                prompt: Text::Dialogue(turns),
                responses: vec![Text::Dialogue(response)],
                label: Default::default(),
            }
        }
        other => other,
    }
}

/// An outcome whose reason names this command's option, where that of `[data]` has another form.
fn of_this_command(outcome: Outcome<RankedExample>) -> Outcome<RankedExample> {
    let reworded = |reason: String| reason.replace("max_length = ", "--max-length ");
    match outcome {
        Outcome::Drop(reason) => Outcome::Drop(reworded(reason)),
        Outcome::TooLong { limit, needs, reason } => Outcome::TooLong { limit, needs, reason: reworded(reason) },
        kept @ Outcome::Keep { .. } => kept,
    }
}

/// What became of the records, in words.
fn counts(report: &Report, scored: usize) -> String {
    let mut text = format!("{}, {scored} scored", counted(report.read, "record"));
    if report.truncated > 0 {
        text += &format!(" ({} with a shortened prompt)", report.truncated);
    }
    let reasons: Vec<String> = report.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    if !reasons.is_empty() {
        text += &format!("; {} skipped: {}", report.dropped.values().sum::<usize>(), reasons.join(", "));
    }
    if let Some(first) = &report.first_bad {
        text += &format!(" (first: {first})");
    }
    report.remarks.iter().for_each(|(remark, count)| text += &format!("; {count} {remark}"));
    text
}

/// Every record of the data, in its order, as an example or with the reason why there is none.
fn items(data: &Data, model: &Model, on_long: OnLong) -> Result<(Vec<Item>, Report)> {
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let encoding = Encoding::new(&encoder, data, true)?;
    let (mut items, mut report, mut usable) = (vec![], Report::default(), 0..);
    data::scan(data, &mut |found| {
        let entry = match found {
            Ok(entry) => entry,
            Err(skipped) => {
                report.skip(&skipped);
                items.push(Item { place: skipped.place, entry: None, example: Err(skipped.fault) });
                return Ok(true);
            }
        };
        let (place, number) = (entry.place, usable.next());
        report.remark(entry.remarks);
        let outcome = match with_responses(entry.record) {
            record @ Record::Ranked { .. } => {
                report.remark(encoding.unread::<RankedExample>(&record));
                RankedExample::of(&record, &encoding).map(of_this_command)
            }
            record => Err(invalid!(
                "there is no response to score: this record is {}, and \"chosen\" and \"rejected\", \"responses\" or \
                 \"completion\" hold some",
                record.kind()
            )),
        };
        let (reason, truncated) = match &outcome {
            Ok(Outcome::Keep { truncated, .. }) => (String::new(), *truncated),
            Ok(Outcome::TooLong { needs, reason, .. }) if on_long == OnLong::Error => {
                return Err(invalid!(
                    "{place}: {reason}; it needs {needs} tokens: raise --max-length, or use --on-long cut or skip"
                ));
            }
            Ok(Outcome::Drop(reason) | Outcome::TooLong { reason, .. }) => (reason.clone(), false),
            Err(error) => (format!("{error:#}"), false),
        };
        let mut examples = report.add(&place, outcome, data.on_bad_record)?;
        items.push(Item {
            place,
            entry: number,
            example: examples.pop().map(|example| (example, truncated)).ok_or(reason),
        });
        Ok(true)
    })?;
    Ok((items, report))
}

/// The reward models that are asked, and how their scores become one.
struct Scorers {
    paths: Vec<PathBuf>,
    adapters: Vec<Adapter>,
    aggregate: Aggregate,
}

impl Scorers {
    /// Opens the adapters that `--adapter` names.
    fn open(args: &Score, model: &Model) -> Result<Self> {
        let paths = args.adapter.iter().map(|path| members(path).context("--adapter")).collect::<Result<Vec<_>>>()?;
        let paths = paths.concat();
        let of = args.aggregate.unwrap_or_default();
        let idle = [("--aggregate", args.aggregate.is_some()), ("--std-coef", args.std_coef.is_some())];
        for (option, _) in idle.iter().filter(|(_, is_given)| *is_given && paths.len() == 1) {
            warning!("score: warning: {option} has no effect on a single adapter");
        }
        if args.std_coef.is_some() && of != Aggregation::MeanMinusStd {
            warning!("score: warning: --std-coef has no effect without --aggregate mean_minus_std");
        }
        if let Some((_, twice)) = paths.iter().enumerate().find(|(i, path)| paths[..*i].contains(path)) {
            warning!("score: warning: {} is there twice: it counts twice", twice.display());
        }
        let adapters = paths.iter().map(|path| model.adapter(path)).collect::<Result<_>>()?;
        let std_coef = args.std_coef.unwrap_or(RewardPart::default().std_coef);
        Ok(Self { paths, adapters, aggregate: aggregate(of.of_config(), std_coef) })
    }

    /// The scores of some examples: one list per example, of one list per member.
    fn scores(&self, model: &Model, examples: &Vec<RankedExample>) -> Result<Vec<Vec<Vec<f32>>>> {
        let mut all = vec![vec![]; examples.len()];
        for (path, adapter) in self.paths.iter().zip(&self.adapters) {
            let found = reward::scores(&model.base, adapter, examples).with_context(|| path.display().to_string())?;
            all.iter_mut().zip(found).for_each(|(members, scores)| members.push(scores));
        }
        Ok(all)
    }
}

pub(super) fn score(args: &Score) -> Result<()> {
    if let Some(out) = args.out.as_deref().filter(|out| out.exists()) {
        return Err(invalid!("--out {} exists; name a new file, or remove it", out.display()));
    }
    args.out.as_deref().map_or(Ok(()), super::check_folder_of)?;
    let model = Model::open_on(&args.base, args.on.device, None)?;
    let scorers = Scorers::open(args, &model)?;
    let max_length = args.max_length.min(model.base.config().max_position_embeddings);
    let data = Data {
        path: Paths::One(args.data.clone()),
        max_length,
        truncation: if args.on_long == OnLong::Cut { Truncation::Left } else { Truncation::Drop },
        on_bad_record: match args.on_bad_record {
            OnBad::Skip => OnBadRecord::Skip,
            OnBad::Error => OnBadRecord::Error,
        },
        ..Data::default()
    };
    let (items, mut report) = items(&data, &model, args.on_long)?;
    let all = items.iter().filter(|item| item.example.is_ok()).count();
    if all == 0 {
        let remedy = match report.needed.is_empty() {
            true => "",
            false => "; raise --max-length, or use --on-long cut",
        };
        return Err(invalid!("{}: no record can be scored: {}{remedy}", args.data.display(), counts(&report, 0)));
    }
    let scored = || items.iter().filter_map(|item| Some((item.entry?, item.example.as_ref().ok()?)));
    let entries: Vec<usize> = scored().map(|(entry, _)| entry).collect();
    let names = subsets::names(&data, &entries, args.by.as_deref())?;
    if names.is_some() {
        report.without_unread(&ColumnsRead::Named(vec![subsets::column(args.by.as_deref()).to_owned()]), &data);
    }
    // Ties and pairs whose rejected response is preferred: the accuracy compares what the label prefers.
    let labels: Vec<PairLabel> = scored().map(|(_, (example, _))| example.label).collect();
    let lengths: Vec<Vec<usize>> = scored()
        .map(|(_, (example, _))| {
            let lengths = example.responses.iter().map(Vec::len).collect();
            example.label.preferred_first(lengths).unwrap_or_default()
        })
        .collect();
    let mut lines = args.out.as_deref().map(create).transpose()?;
    let mut progress = Progress::new("score", all, Unit::Of("record"));
    let (mut scores, mut places, mut rest) = (Scores::new(&scorers.paths, scorers.aggregate), vec![], &items[..]);
    // As many examples at once as an evaluation of the reward stage takes, whatever was skipped between them.
    while !rest.is_empty() {
        let mut examples = vec![];
        let until = rest.iter().position(|item| {
            examples.extend(item.example.as_ref().ok().map(|(example, _)| example.clone()));
            examples.len() == AT_ONCE
        });
        let (now, later) = rest.split_at(until.map_or(rest.len(), |at| at + 1));
        rest = later;
        let mut found = scorers.scores(&model, &examples)?.into_iter();
        for item in now {
            let of_members = item.example.as_ref().ok().and_then(|_| found.next());
            let is_scored = of_members.is_some();
            if let Some(of_members) = of_members {
                for (path, of_member) in scorers.paths.iter().zip(&of_members) {
                    if let Some(bad) = of_member.iter().find(|score| !score.is_finite()) {
                        return Err(invalid!("{}: its score is {bad}; check {}", item.place, path.display()));
                    }
                }
                places.push(json!({"file": item.place.file.display().to_string(), "record": item.place.record}));
                scores.push(of_members);
            }
            if let Some((file, path)) = &mut lines {
                let written = line(item, Some(&scores).filter(|_| is_scored));
                writeln!(file, "{written}").with_context(|| path.clone())?;
            }
        }
        progress.set(scores.len());
    }
    progress.finish();
    let found = Found::of(&scores, &Asked { labels: &labels, lengths: &lengths, names: names.as_deref() })?;
    if args.json {
        let mut json = found.to_json();
        let of_records = json!({
            "places": places,
            "records": report.read,
            "dropped": report.read - scores.len(),
            "dropped_reasons": report.dropped,
            "truncated": report.truncated,
            "remarks": report.remarks,
            "out": args.out.as_ref().map(|out| out.display().to_string()),
        });
        json.extend(of_records.as_object().cloned().unwrap_or_default());
        return super::print_json(&json.into());
    }
    note!("score: {}", counts(&report, scores.len()));
    if let Some(out) = &args.out {
        note!("one line per record: {}", out.display());
    }
    super::say(&found.text())
}

/// A new file, with its name for messages.
fn create(path: &Path) -> Result<(File, String)> {
    let name = format!("--out {}", path.display());
    Ok((File::create_new(path).map_err(|error| invalid!("{name}: {error}"))?, name))
}

/// A record's line of `--out`; `scores`: those of all records up to this one, if it has some.
fn line(item: &Item, scores: Option<&Scores>) -> Value {
    let mut line = json!({"file": item.place.file.display().to_string(), "record": item.place.record});
    if let Some(number) = item.place.line {
        line["line"] = number.into();
    }
    match (&item.example, scores.map(Scores::last)) {
        (Ok((example, truncated)), Some((scores, members))) => {
            line["scores"] = json!(scores);
            if !members.is_empty() {
                line["members"] = json!(members);
            }
            if scores.len() > 1 {
                line["right"] = match example.label.preferred_first(scores.to_vec()) {
                    Some(judged) => judged[1..].iter().all(|other| judged[0] > *other).into(),
                    None => Value::Null,
                };
            }
            let tokens = example.responses.iter().map(|response| example.prompt.len() + response.len());
            line["tokens"] = tokens.collect::<Value>();
            if *truncated {
                line["truncated"] = true.into();
            }
        }
        (Err(reason), _) => line["skipped"] = reason.as_str().into(),
        (Ok(_), None) => {}
    }
    line
}
