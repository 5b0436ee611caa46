//! `data`: the examples that a stage would train on: counts, lengths, dropped records with reasons, and examples with the
//! loss mask in colour. It does not depend on any stage's training loop.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::config;
use crate::config::Config;
use crate::data::Prepared;
use crate::data::examples::Examples;
use crate::data::examples::objectives::{Objective, PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::stream::cache::Stored;
use crate::host::peak_rss_bytes;
use crate::invalid;
use crate::model_files::{FileContents, ModelFiles};
use crate::run::{Lengths, check_base_path, data_warnings, examples, longest_prompt, refusals, with_members};
use crate::tokenizer::Tokenizer;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Stage {
    Sft,
    Reward,
    Dpo,
    Kto,
    Distill,
    Ppo,
    Grpo,
    Rloo,
}

#[derive(Args)]
pub(super) struct Show {
    /// The TOML file of a stage.
    config: PathBuf,
    /// For which stage; else the one whose section the file has.
    #[arg(long, value_enum)]
    phase: Option<Stage>,
    /// Number of training examples to show.
    #[arg(long, default_value_t = 3)]
    head: usize,
    /// Changes one key: --set data.max_length=256
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn show(args: &Show) -> Result<()> {
    let config = config::load(&args.config, &args.set)?;
    let stage = match args.phase {
        Some(stage) => stage,
        None => only_stage(&config)?,
    };
    let base = if stage == Stage::Reward { config.reward_base() } else { &config.base };
    check_base_path(&base.path)?;
    let checkpoint = ModelFiles::open(&base.path)?;
    let context = checkpoint.config().max_position_embeddings;
    let of = stage.of_config();
    // Distillation reads with both models' tokens. One that cannot be opened is the stage's concern.
    let teacher = config.teacher.as_ref().filter(|_| stage == Stage::Distill);
    let teacher = teacher.and_then(|base| FileContents::open(&base.path).ok());
    let context = teacher.map_or(context, |teacher| context.min(teacher.config.max_position_embeddings));
    let look = Look { tokenizer: checkpoint.tokenizer(), config: &config, args, context };
    match stage {
        Stage::Sft => look.at::<SftExample>(of, config.sft().completion_only_loss, sft_pieces, |_| Ok(0)),
        Stage::Reward | Stage::Dpo => look.at::<RankedExample>(of, true, ranked_pieces, |_| Ok(0)),
        Stage::Kto => look.at::<UnpairedExample>(of, true, unpaired_pieces, |_| Ok(0)),
        Stage::Distill if !config.distill().samples_all() => {
            look.at::<SftExample>(of, true, sft_pieces, longest_prompt)
        }
        Stage::Distill => look.at::<PromptExample>(of, true, prompt_pieces, longest_prompt),
        Stage::Ppo | Stage::Grpo | Stage::Rloo => look.at::<PromptExample>(of, true, prompt_pieces, |_| Ok(0)),
    }
}

impl Stage {
    /// The config's name of the stage.
    pub(super) fn of_config(self) -> config::Stage {
        match self {
            Self::Sft => config::Stage::Sft,
            Self::Reward => config::Stage::Reward,
            Self::Dpo => config::Stage::Dpo,
            Self::Kto => config::Stage::Kto,
            Self::Distill => config::Stage::Distill,
            Self::Ppo => config::Stage::Ppo,
            Self::Grpo => config::Stage::Grpo,
            Self::Rloo => config::Stage::Rloo,
        }
    }
}

/// The stage whose section the file has.
pub(super) fn only_stage(config: &Config) -> Result<Stage> {
    let sections = [
        config.sft.is_some().then_some(Stage::Sft),
        config.reward.is_some().then_some(Stage::Reward),
        config.dpo.is_some().then_some(Stage::Dpo),
        config.kto.is_some().then_some(Stage::Kto),
        config.distill.is_some().then_some(Stage::Distill),
        config.rollouts(config::Stage::Ppo).is_ok().then_some(Stage::Ppo),
        config.grpo.is_some().then_some(Stage::Grpo),
        config.rloo.is_some().then_some(Stage::Rloo),
    ];
    let mut there = sections.into_iter().flatten();
    match (there.next(), there.next()) {
        (Some(stage), None) => Ok(stage),
        _ => Err(invalid!(
            "the file has not exactly one stage's section; give --phase sft, reward, dpo, kto, distill, ppo, grpo or rloo"
        )),
    }
}

/// Token runs and whether the stage learns them, one list per sequence.
type Pieces<'e> = Vec<Vec<(&'e [u32], bool)>>;

fn sft_pieces(example: &SftExample) -> Pieces<'_> {
    let mut from = 0;
    let runs = example.loss_mask.chunk_by(|a, b| a == b).map(|run| {
        let tokens = &example.tokens[from..from + run.len()];
        from += run.len();
        (tokens, run[0])
    });
    vec![runs.collect()]
}

fn unpaired_pieces(example: &UnpairedExample) -> Pieces<'_> {
    vec![vec![(&example.prompt[..], false), (&example.response[..], true)]]
}

fn prompt_pieces(example: &PromptExample) -> Pieces<'_> {
    vec![vec![(&example.tokens[..], false)]]
}

/// Every response after the prompt; the prefix that it shares with the best one (for the best, with the next) is not marked.
fn ranked_pieces(example: &RankedExample) -> Pieces<'_> {
    let responses = example.responses.iter().enumerate();
    let pieces = responses.map(|(number, response)| {
        let shared = example.divergence(number, if number == 0 { 1 } else { 0 }) - example.prompt.len();
        let (same, own) = response.split_at(shared.min(response.len()));
        vec![(&example.prompt[..], false), (same, false), (own, true)]
    });
    pieces.collect()
}

struct Look<'a> {
    /// Tokens that the model takes.
    context: usize,
    tokenizer: &'a Tokenizer,
    config: &'a Config,
    args: &'a Show,
}

impl Look<'_> {
    /// `prompt`: tokens of the longest prompt, where a stage has whole sequences and continues prompts, too; else 0.
    fn at<T: Objective + Stored>(
        &self,
        stage: config::Stage,
        completion_only: bool,
        pieces: fn(&T) -> Pieces<'_>,
        prompt: fn(&Prepared<T>) -> Result<usize>,
    ) -> Result<()> {
        let found: Result<Prepared<T>> = examples(self.config, self.tokenizer, completion_only);
        let found = match stage {
            config::Stage::Distill => found.with_context(|| self.config.distill().about_records())?,
            _ => found?,
        };
        let mut lengths: Vec<usize> = (0..found.train.len()).map(|row| found.train.tokens(row)).collect();
        lengths.sort_unstable();
        let report = &found.report;
        let mut warnings = data_warnings(&found, self.config.data()?);
        // Whether a reward model's folder is whole is the stage's concern.
        let config = with_members(stage, self.config).unwrap_or_else(|_| self.config.clone());
        let of_run =
            Lengths { sequence: found.train.longest_sequence(), prompt: prompt(&found)?, context: self.context };
        warnings.extend(refusals(stage, &config, of_run));
        warnings.extend(config.idle_keys(stage));
        let stage = stage.name();
        let mut samples = vec![];
        for row in 0..self.args.head.min(found.train.len()) {
            samples.push(self.sample(&pieces(&*found.train.get(row)?))?);
        }
        if self.args.json {
            let sources = report.sources.iter().map(|(file, records)| json!({"file": file, "records": records}));
            let histogram =
                histogram(&lengths).into_iter().map(|(to, count)| json!({"tokens_below": to, "count": count}));
            let samples = samples.iter().map(|sequences| {
                let pieces = |s: &Vec<Piece>| {
                    s.iter().map(|p| json!({"text": p.text, "learnt": p.learnt, "tokens": p.tokens})).collect::<Value>()
                };
                sequences.iter().map(pieces).collect::<Value>()
            });
            return super::print_json(&json!({
                "phase": stage,
                "sources": sources.collect::<Value>(),
                "records": report.read,
                "sequences": report.kept,
                "truncated": report.truncated,
                "dropped": report.dropped,
                "first_bad": report.first_bad,
                "remarks": report.remarks,
                "warnings": warnings,
                "train": found.train.len(),
                "held_out": found.held_out.len(),
                "tokens": {
                    "total": lengths.iter().sum::<usize>(),
                    "shortest": lengths.first(),
                    "median": lengths.get(lengths.len() / 2),
                    "p95": lengths.get(lengths.len() * 95 / 100),
                    "longest": lengths.last(),
                },
                "histogram": histogram.collect::<Value>(),
                "samples": samples.collect::<Value>(),
                "cache": found.cache.as_ref().map(|path| path.display().to_string()),
                "peak_rss_mib": peak_rss_bytes().map(|bytes| bytes >> 20),
            }));
        }
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        super::say(&text(stage, &found, &lengths, &samples, colour))?;
        warnings.iter().for_each(|warning| crate::tell!("warning: {warning}"));
        Ok(())
    }

    fn sample(&self, sequences: &Pieces<'_>) -> Result<Vec<Vec<Piece>>> {
        let piece = |&(tokens, learnt): &(&[u32], bool)| {
            let text = self.tokenizer.decode_with_special_tokens(tokens)?;
            Ok(Piece { text, learnt, tokens: tokens.len() })
        };
        let sequence = |pieces: &Vec<(&[u32], bool)>| pieces.iter().filter(|p| !p.0.is_empty()).map(piece).collect();
        sequences.iter().map(sequence).collect()
    }
}

struct Piece {
    text: String,
    learnt: bool,
    tokens: usize,
}

/// (end, count) of some ten equal spans of sorted lengths; an example of `end` tokens stands in the next.
fn histogram(sorted: &[usize]) -> Vec<(usize, usize)> {
    let Some(&longest) = sorted.last() else { return vec![] };
    // Round ends are read more easily: 1, 2 or 5 with zeros.
    let wanted = (longest + 1).div_ceil(10);
    let steps = (0..20).flat_map(|zeros| [1, 2, 5].map(|digit| digit * 10usize.pow(zeros)));
    let step = steps.into_iter().find(|&step| step >= wanted).unwrap_or(wanted);
    let below = |end: usize| sorted.partition_point(|&length| length < end);
    (1..=longest / step + 1).map(|bin| (bin * step, below(bin * step) - below((bin - 1) * step))).collect()
}

const BAR: usize = 40;

fn text<T: Objective>(
    stage: &str,
    found: &Prepared<T>,
    lengths: &[usize],
    samples: &[Vec<Vec<Piece>>],
    colour: bool,
) -> String {
    let report = &found.report;
    let mut out = String::new();
    for (file, records) in &report.sources {
        let noun = if *records == 1 { "record " } else { "records" };
        let _ = writeln!(out, "{records:>9} {noun}  {}", plain(file));
    }
    let _ = writeln!(
        out,
        "{:>9} {} for {stage}: {} to train on, {} held out",
        report.kept,
        if report.kept == 1 { "sequence" } else { "sequences" },
        found.train.len(),
        found.held_out.len()
    );
    if report.truncated > 0 {
        let _ = writeln!(out, "{:>9} of them truncated", report.truncated);
    }
    for (reason, count) in &report.dropped {
        let _ = writeln!(out, "{count:>9} dropped: {reason}");
    }
    if let Some(first) = &report.first_bad {
        let _ = writeln!(out, "          the first bad one: {}", plain(first));
    }
    for (remark, count) in &report.remarks {
        let _ = writeln!(out, "{count:>9} {}", plain(remark));
    }
    if let Some(path) = &found.cache {
        let _ = writeln!(out, "          tokens in {}", path.display());
    }
    let total: usize = lengths.iter().sum();
    let at = |percent: usize| lengths.get(lengths.len() * percent / 100).copied().unwrap_or(0);
    let _ = writeln!(
        out,
        "\ntokens of a training example: {total} in all, median {}, 95% below {}, longest {}",
        at(50),
        at(95),
        lengths.last().unwrap_or(&0)
    );
    let bins = histogram(lengths);
    let most = bins.iter().map(|bin| bin.1).max().unwrap_or(0).max(1);
    for (end, count) in &bins {
        let bar = "█".repeat((count * BAR).div_ceil(most));
        let _ = writeln!(out, "  below {end:>6} {bar:<BAR$} {count}");
    }
    let (open, close, quiet) = if colour { ("\x1b[32m", "\x1b[0m", "\x1b[2m") } else { ("⟦", "⟧", "") };
    let meaning = match stage {
        "sft" => "the loss is on",
        "reward" => "the responses differ in",
        _ => "",
    };
    for (number, sequences) in samples.iter().enumerate() {
        let _ = writeln!(out, "\n── example {} ──", number + 1);
        if number == 0 && !meaning.is_empty() {
            let _ = writeln!(out, "({meaning} {open}this{close})");
        }
        for (rank, pieces) in sequences.iter().enumerate() {
            if sequences.len() > 1 {
                let _ = writeln!(out, "── response {}{} ──", rank + 1, if rank == 0 { ", the best" } else { "" });
            }
            for piece in pieces {
                let (before, after) = match piece.learnt {
                    true => (open, close),
                    false => (quiet, if colour { close } else { "" }),
                };
                let _ = write!(out, "{before}{}{after}", plain(&piece.text));
            }
            out.push('\n');
        }
    }
    out
}

/// Data must not steer the terminal.
fn plain(text: &str) -> String {
    let shown =
        |c: char| if c.is_control() && c != '\n' && c != '\t' { c.escape_unicode().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_histogram_counts_every_example_once_in_about_ten_round_spans() {
        for longest in [1, 9, 10, 11, 99, 100, 513, 4096] {
            let lengths: Vec<usize> = (1..=longest).collect();
            let bins = histogram(&lengths);
            assert_eq!(bins.iter().map(|bin| bin.1).sum::<usize>(), longest, "{longest}");
            assert!(bins.len() <= 11 && bins.last().unwrap().0 > longest, "{bins:?}");
        }
        assert!(histogram(&[]).is_empty());
    }

    #[test]
    fn an_escape_sequence_in_the_data_is_shown_not_sent() {
        assert_eq!(plain("a\x1b[2Jb\n\tc"), "a\\u{1b}[2Jb\n\tc");
    }

    #[test]
    fn responses_are_marked_from_where_they_differ() {
        let example =
            RankedExample { prompt: vec![1, 2], responses: vec![vec![5, 6], vec![5, 7, 8]], label: Default::default() };
        let marked: Vec<_> = ranked_pieces(&example).into_iter().map(|mut pieces| pieces.remove(2)).collect();
        assert_eq!(marked, [(&[6u32][..], true), (&[7, 8][..], true)]);
        let example = SftExample { tokens: vec![1, 2, 3, 4], loss_mask: vec![false, true, true, false] };
        assert_eq!(sft_pieces(&example), [vec![(&[1u32][..], false), (&[2, 3], true), (&[4], false)]]);
    }
}
