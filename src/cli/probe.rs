//! `score` and `logprobs`: rewards and log-probabilities of given text. Neither trains a model.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::text::Weights;
use crate::config::{Data, OnBadRecord, Paths, Truncation};
use crate::data;
use crate::data::ModelEncoder;
use crate::data::examples::objectives::ranked_examples;
use crate::data::stream::ids;
use crate::invalid;
use crate::model::batch::{Batch, Targets, chunks_by_tokens};
use crate::model::roles::Policy;
use crate::report::number;
use crate::reward::train as reward;
use crate::run::Model;

#[derive(Args)]
pub(super) struct Score {
    /// Model directory or .gguf file.
    #[arg(long)]
    base: PathBuf,
    /// Reward adapter directory.
    #[arg(long)]
    adapter: PathBuf,
    /// Records with ranked responses: chosen and rejected, or responses best first.
    #[arg(long)]
    data: PathBuf,
    /// Longer sequences are left out and counted.
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    #[command(flatten)]
    on: super::OnDevice,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn score(args: &Score) -> Result<()> {
    let model = Model::open_on(&args.base, args.on.device)?;
    let adapter = model.adapter(&args.adapter)?;
    let data = Data {
        path: Paths::One(args.data.clone()),
        max_length: args.max_length,
        truncation: Truncation::Drop,
        on_bad_record: OnBadRecord::Error,
        ..Data::default()
    };
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let given = || format!("{} with --max-length {}", args.data.display(), args.max_length);
    let entries = data::load(&data)?.entries;
    let (examples, report) = ranked_examples(&entries, &encoder, &data).with_context(given)?;
    if examples.is_empty() {
        return Err(invalid!("{}: no record can be scored ({report})", args.data.display()));
    }
    let named = || args.adapter.display().to_string();
    let scores = reward::scores(&model.base, &adapter, &examples).with_context(named)?;
    let summary = reward::summarise(&scores)?;
    if args.json {
        super::print_json(&json!({
            "scores": scores,
            "accuracy": number(summary.accuracy),
            "mean_chosen_score": number(summary.mean_chosen),
            "mean_rejected_score": number(summary.mean_rejected),
            "pairs": summary.pairs,
            "records": report.read,
            "dropped": report.read - examples.len(),
        }))
    } else {
        eprintln!("data: {report}");
        super::say(&format!(
            "accuracy {:.3} over {} pairs; mean score of the best responses {:.3}, of the others {:.3}\n",
            summary.accuracy, summary.pairs, summary.mean_chosen, summary.mean_rejected
        ))
    }
}

#[derive(Args)]
pub(super) struct Logprobs {
    #[command(flatten)]
    weights: Weights,
    /// A JSON file: {"input_ids": [[...], ...]}
    #[arg(long)]
    tokens: PathBuf,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// Tokens of one scoring pass.
const PASS: usize = 2048;

pub(super) fn logprobs(args: &Logprobs) -> Result<()> {
    let mut input_ids = ids::read(&args.tokens)?;
    let (model, adapter) = args.weights.open()?;
    let config = model.base.config();
    ids::check(&args.tokens, &input_ids, config.vocab_size, config.max_position_embeddings)?;
    let policy = Policy::new(&model.base, adapter.as_ref());
    let lengths: Vec<usize> = input_ids.iter().map(<[u32]>::len).collect();
    // The tokens that have a log-probability: all but the first of each sequence, one after another.
    let mut logprobs = Vec::with_capacity(input_ids.tokens() - lengths.len());
    for rows in chunks_by_tokens(&lengths, PASS) {
        let sequences: Vec<&[u32]> = rows.iter().map(|&i| input_ids.get(i)).collect();
        let batch = Batch::new(&sequences)?;
        let all: Vec<usize> = sequences.iter().map(|s| s.len() - 1).collect();
        let stats = policy.logprobs(&batch, &Targets::responses(&batch, &all)?, 1.0)?;
        if !stats.logprobs.iter().all(|l| l.is_finite()) {
            return Err(invalid!(
                "the log-probabilities are not finite: the base or the adapter holds numbers that are none"
            ));
        }
        logprobs.extend(stats.logprobs);
        // The ids have been used: the most likely tokens take their place, so that a long file is not held twice.
        let mut argmax = stats.argmax.into_iter();
        for row in rows {
            input_ids.get_mut(row)[1..].iter_mut().zip(&mut argmax).for_each(|(id, most_likely)| *id = most_likely);
        }
    }
    if args.json {
        return super::say_with(|out| {
            // Row by row: a tree of JSON values would take many times the file's size.
            write!(out, "{{\"logprobs\":[")?;
            write_rows(out, &lengths, logprobs.iter().map(|&l| f64::from(l)))?;
            write!(out, "],\"argmax\":[")?;
            write_rows(out, &lengths, input_ids.iter().flat_map(|argmax| &argmax[1..]))?;
            writeln!(out, "]}}")
        });
    }
    let mut rest = &logprobs[..];
    for (i, length) in lengths.iter().enumerate() {
        let (row, after) = rest.split_at(length - 1);
        rest = after;
        let sum: f64 = row.iter().map(|&l| f64::from(l)).sum();
        let perplexity = (-sum / row.len() as f64).exp();
        super::say(&format!("sequence {i}: {} tokens, sum {sum:.4}, perplexity {perplexity:.4}\n", row.len()))?;
    }
    Ok(())
}

/// Writes one JSON list per sequence, separated by commas, each with one value fewer than the sequence has tokens.
fn write_rows(
    out: &mut dyn Write,
    lengths: &[usize],
    mut values: impl Iterator<Item = impl Serialize>,
) -> std::io::Result<()> {
    for (i, length) in lengths.iter().enumerate() {
        out.write_all(if i == 0 { b"[" } else { b",[" })?;
        for (j, value) in values.by_ref().take(length - 1).enumerate() {
            if j > 0 {
                out.write_all(b",")?;
            }
            serde_json::to_writer(&mut *out, &value)?;
        }
        out.write_all(b"]")?;
    }
    Ok(())
}
