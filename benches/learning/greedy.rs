//! The share of a file's questions that a policy answers right when it always takes the likeliest token, for the arithmetic
//! study (`arithmetic.py`): a rule decides, the reward of `kind = "math"`. It trains nothing. Read `arithmetic.py` next.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fourfold::model::generate::{FinishReason, SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::reward::source::math::is_right;
use fourfold::run::Model;
use fourfold::stats::Share;
use fourfold::tokenizer::SpecialTokens;
use serde_json::{Value, json};

/// Prompts whose responses are sampled at once.
const BATCH: usize = 50;

/// One object with the accuracy and its 95% interval (Wilson's), of the base or of an adapter over it. `data`: JSON lines with
/// a `prompt`, which is read as it is, and an `answer`.
pub fn accuracy(base: &Path, adapter: Option<&Path>, data: &Path, max_new_tokens: usize) -> Result<Value> {
    let model = Model::open(base)?;
    let adapter = adapter.map(|path| model.policy_adapter(path)).transpose()?;
    let tokenizer = model.checkpoint.tokenizer();
    let text = fs::read_to_string(data).with_context(|| format!("reading {}", data.display()))?;
    let mut rows: Vec<(Vec<u32>, String)> = vec![];
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).with_context(|| format!("{}: {line}", data.display()))?;
        let at = |key: &str| row[key].as_str().with_context(|| format!("{}: no {key} in {line}", data.display()));
        rows.push((tokenizer.encode(at("prompt")?, SpecialTokens::None)?, at("answer")?.to_owned()));
    }
    ensure!(!rows.is_empty(), "{} has no question", data.display());
    let params = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens, stop: tokenizer.ends(None) };
    let (mut right, mut ended, mut tokens) = (0usize, 0usize, 0usize);
    let mut shown = vec![];
    for chunk in rows.chunks(BATCH) {
        let prompts: Vec<Vec<u32>> = chunk.iter().map(|(prompt, _)| prompt.clone()).collect();
        let policy = Policy::new(&model.base, adapter.as_ref());
        let responses = generate(policy, &prompts, &vec![0; prompts.len()], &params, |_, _| {})?;
        for (response, (_, answer)) in responses.iter().zip(chunk) {
            let text = tokenizer.decode(&response.tokens)?;
            right += usize::from(is_right(&text, answer));
            ended += usize::from(response.finish == FinishReason::Stop);
            tokens += response.tokens.len();
            if shown.len() < 3 {
                shown.push(json!([answer, text]));
            }
        }
    }
    let share = Share::of(right as f64 / rows.len() as f64, rows.len());
    Ok(json!({
        "questions": rows.len(), "right": right, "accuracy": share.rate, "interval": [share.low, share.high],
        "ended": ended as f64 / rows.len() as f64, "mean_tokens": tokens as f64 / rows.len() as f64,
        "answer_and_response": shown,
    }))
}
