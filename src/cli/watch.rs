//! `fourfold watch`: a run that another process trains, in the terminal. Read `watch/mod.rs` for the view.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::{print_json, say};
use crate::watch;

/// The command's arguments.
#[derive(Args)]
pub(super) struct Watch {
    /// Folder of a run, going on or over.
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Prints one summary as text and ends, as it does where stdout is no terminal.
    #[arg(long)]
    once: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Watch) -> Result<()> {
    if args.json {
        return print_json(&watch::json(&args.run)?);
    }
    match args.once || !watch::is_possible() {
        true => say(&watch::text(&args.run)?),
        false => watch::follow(&args.run),
    }
}
