//! `logprobs`: log-probabilities of given token ids. It does not depend on any stage.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::text::Weights;
use crate::data::stream::ids;
use crate::error::counted;
use crate::invalid;
use crate::model::batch::{Batch, Targets, chunks_by_tokens};
use crate::model::roles::Policy;
use crate::report::progress::{Progress, Unit};

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
    let mut progress = Progress::new("logprobs", input_ids.tokens(), Unit::Of("token"));
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
        progress.add(batch.tokens().len());
        // The ids have been used: the most likely tokens take their place, so that a long file is not held twice.
        let mut argmax = stats.argmax.into_iter();
        for row in rows {
            input_ids.get_mut(row)[1..].iter_mut().zip(&mut argmax).for_each(|(id, most_likely)| *id = most_likely);
        }
    }
    progress.finish();
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
        super::say(&format!(
            "sequence {i}: {}, sum {sum:.4}, perplexity {perplexity:.4}\n",
            counted(row.len(), "token")
        ))?;
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
