//! `fourfold report`: the page of a finished or running run again, or several runs on one page. Read `page/mod.rs` for the
//! page.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use super::print_json;
use crate::note;
use crate::page;

/// The command's arguments.
#[derive(Args)]
pub(super) struct Report {
    /// Folders of runs.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where the page goes; else report.html in the run's folder, or in the current one for several runs. Of what is there, only a
    /// page is replaced.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn report(args: &Report) -> Result<()> {
    let out = match (&args.out, &args.runs[..]) {
        (Some(out), _) => out.clone(),
        (None, [run]) => run.join(page::NAME),
        (None, _) => PathBuf::from(page::NAME),
    };
    if let Some(out) = &args.out {
        super::check_folder_of(out)?;
    }
    // The page in a run's own folder is the run's; any other place may hold something else.
    if args.out.is_some() || args.runs.len() > 1 {
        page::check_replaceable(&out)?;
    }
    let written = page::write(&args.runs, &out)?;
    for problem in written["problems"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        crate::tell!("{problem}");
    }
    if args.json {
        return print_json(&written);
    }
    note!("{}", out.display());
    Ok(())
}
