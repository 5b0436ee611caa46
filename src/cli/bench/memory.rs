//! `bench memory`: predicted and measured memory side by side, phase by phase. Read run/measure.rs for the measured run.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use crate::cli::data;
use crate::cli::data::only_stage;
use crate::cli::{OnDevice, print_json, say};
use crate::config;
use crate::planner::sim_allocator::MemoryCategory;
use crate::run::{Measured, measure};

#[derive(Args)]
pub(in crate::cli) struct Memory {
    /// The TOML file of a stage.
    config: PathBuf,
    /// For which stage; else the one whose section the file has.
    #[arg(long, value_enum)]
    phase: Option<data::Stage>,
    /// Changes one key: --set ppo.micro_batch_size=2
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    on: OnDevice,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Memory) -> Result<()> {
    let config = config::load(&args.config, &args.set)?.on(args.on.device);
    let stage = match args.phase {
        Some(stage) => stage.of_config(),
        None => only_stage(&config)?.of_config(),
    };
    // The files of two steps go to a temporary folder.
    let out = std::env::temp_dir().join(format!("fourfold-bench-memory-{}", std::process::id()));
    let measured = measure(stage, &config, &out);
    std::fs::remove_dir_all(&out).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error).with_context(|| format!("removing {}", out.display())),
    })?;
    let measured = measured?;
    if args.json { print_json(&to_json(stage.name(), &measured)) } else { say(&table(stage.name(), &measured)) }
}

/// (phase, predicted heap, measured heap) of each that ran.
fn rows(measured: &Measured) -> Vec<(&'static str, usize, usize)> {
    let both = measured.plan.phases.iter().zip(&measured.peaks);
    both.filter(|((_, predicted), (_, found))| predicted.total() > 0 && *found > 0)
        .map(|((phase, predicted), (_, found))| (phase.name(), predicted.heap(), *found))
        .collect()
}

fn to_json(stage: &str, measured: &Measured) -> Value {
    let phase = |(name, predicted, found): (&str, usize, usize)| {
        let of = json!({"predicted": predicted, "measured": found, "ratio": predicted as f64 / found as f64});
        (name.to_owned(), of)
    };
    let (_, peak) = measured.plan.peak();
    json!({
        "bench": format!("memory/{stage}"),
        "phases": rows(measured).into_iter().map(phase).collect::<serde_json::Map<_, _>>(),
        "mapped": peak.of(MemoryCategory::Mapped),
        "process": peak.of(MemoryCategory::Process),
        "predicted_total": peak.total(),
        "peak_rss": measured.peak_rss,
    })
}

fn table(stage: &str, measured: &Measured) -> String {
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let mut out = format!("{stage}: heap, MiB\n\n{:<12}{:>11}{:>11}{:>9}\n", "phase", "predicted", "measured", "ratio");
    for (name, predicted, found) in rows(measured) {
        let ratio = predicted as f64 / found as f64;
        let _ = writeln!(out, "{name:<12}{:>11.2}{:>11.2}{ratio:>9.3}", mib(predicted), mib(found));
    }
    let (_, peak) = measured.plan.peak();
    let _ = writeln!(
        out,
        "\nwith the mapped base ({:.1}) and the process beside its heap ({:.1}): {:.1}; peak resident: {:.1}",
        mib(peak.of(MemoryCategory::Mapped)),
        mib(peak.of(MemoryCategory::Process)),
        mib(peak.total()),
        mib(measured.peak_rss.unwrap_or(0))
    );
    out
}
