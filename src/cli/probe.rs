//! `logprobs`: log-probabilities of given token ids. It does not depend on any stage.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::text::Weights;
use crate::data::stream::ids;
use crate::invalid;
use crate::model::batch::{Batch, Targets, chunks_by_tokens};
use crate::model::roles::Policy;

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
    let input_ids = ids::read(&args.tokens)?;
    let (model, adapter) = args.weights.open()?;
    let config = model.base.config();
    ids::check(&args.tokens, &input_ids, config.vocab_size, config.max_position_embeddings)?;
    let policy = Policy::new(&model.base, adapter.as_ref());
    let lengths: Vec<usize> = input_ids.iter().map(Vec::len).collect();
    let (mut logprobs, mut argmax) = (vec![], vec![]);
    for rows in chunks_by_tokens(&lengths, PASS) {
        let sequences: Vec<&[u32]> = rows.iter().map(|&i| &input_ids[i][..]).collect();
        let batch = Batch::new(&sequences)?;
        let all: Vec<usize> = sequences.iter().map(|s| s.len() - 1).collect();
        let stats = policy.logprobs(&batch, &Targets::responses(&batch, &all)?, 1.0)?;
        if !stats.logprobs.iter().all(|l| l.is_finite()) {
            return Err(invalid!(
                "the log-probabilities are not finite: the base or the adapter holds numbers that are none"
            ));
        }
        let mut at = 0;
        for n in all {
            logprobs.push(stats.logprobs[at..at + n].to_vec());
            argmax.push(stats.argmax[at..at + n].to_vec());
            at += n;
        }
    }
    if args.json {
        return super::print_json(&json!({ "logprobs": logprobs, "argmax": argmax }));
    }
    for (i, row) in logprobs.iter().enumerate() {
        let sum: f64 = row.iter().map(|&l| f64::from(l)).sum();
        let perplexity = (-sum / row.len() as f64).exp();
        super::say(&format!("sequence {i}: {} tokens, sum {sum:.4}, perplexity {perplexity:.4}\n", row.len()))?;
    }
    Ok(())
}
