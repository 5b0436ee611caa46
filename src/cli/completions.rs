//! `fourfold completions`: what a shell completes of this command line, and `fourfold man`: its manual pages. Both are made
//! from the parser's own definition. Read `help.rs` for the groups and examples in it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;
use serde_json::json;

use super::{help, print_json, say};
use crate::invalid;
use crate::note;

#[derive(Args)]
pub(super) struct Completions {
    /// The shell whose script goes to stdout.
    shell: Shell,
}

#[derive(Args)]
pub(super) struct Manual {
    /// Writes a page for every command into this folder, which is made: fourfold.1, fourfold-sft.1, ...; else the page of
    /// fourfold goes to stdout.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// One JSON object on stdout: the pages that were written.
    #[arg(long, requires = "out")]
    json: bool,
}

pub(super) fn completions(args: &Completions) -> Result<()> {
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut help::command(), "fourfold", &mut script);
    say(&String::from_utf8(script).context("making the script")?)
}

pub(super) fn manual(args: &Manual) -> Result<()> {
    let pages = pages()?;
    let Some(out) = &args.out else {
        let (_, page) = pages.into_iter().next().context("the program has no page")?;
        return say(&page);
    };
    fs::create_dir_all(out).map_err(|e| invalid!("{}: {e}; name another folder with --out", out.display()))?;
    if let Some(path) = pages.iter().map(|(name, _)| out.join(name)).find(|path| !is_replaceable(path)) {
        return Err(invalid!(
            "{} is there already and is no page of fourfold, so it stays as it is; name another folder with --out",
            path.display()
        ));
    }
    let mut names = vec![];
    for (name, page) in &pages {
        let path = out.join(name);
        fs::write(&path, page).map_err(|e| invalid!("{}: {e}; name another folder with --out", path.display()))?;
        names.push(path.display().to_string());
    }
    if args.json {
        return print_json(&json!({ "pages": names }));
    }
    note!("{} pages are in {}; `man -l {}` shows one", pages.len(), out.display(), names[0]);
    Ok(())
}

/// Whether there is no such file, or one of this program's manual pages.
fn is_replaceable(path: &Path) -> bool {
    !path.exists() || fs::read(path).is_ok_and(|page| String::from_utf8_lossy(&page).contains(".TH fourfold"))
}

/// Each page with its file's name, the program's own first.
fn pages() -> Result<Vec<(String, String)>> {
    let mut command = help::command().disable_help_subcommand(true);
    command.build();
    let mut pages = vec![];
    add(&command, &mut pages)?;
    Ok(pages)
}

fn add(command: &Command, pages: &mut Vec<(String, String)>) -> Result<()> {
    let version = concat!("fourfold ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(version).manual("fourfold");
    let mut page = vec![];
    man.render(&mut page).context("making a manual page")?;
    let page = String::from_utf8(page).context("making a manual page")?;
    pages.push((man.get_filename(), page));
    command.get_subcommands().filter(|below| !below.is_hide_set()).try_for_each(|below| add(below, pages))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command as Process, Stdio};

    use super::*;

    fn script(shell: Shell) -> String {
        let mut script = vec![];
        clap_complete::generate(shell, &mut help::command(), "fourfold", &mut script);
        String::from_utf8(script).unwrap()
    }

    /// What a program prints of a text on its stdin; `None` where there is no such program.
    fn filtered(program: &str, args: &[&str], text: &str) -> Option<(bool, String, String)> {
        let mut process = Process::new(program);
        process.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = process.spawn().ok()?;
        let mut stdin = child.stdin.take()?;
        let text = text.to_owned();
        let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
        let done = child.wait_with_output().unwrap();
        drop(writer.join());
        let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Some((done.status.success(), lossy(&done.stdout), lossy(&done.stderr)))
    }

    #[test]
    fn every_shells_script_names_every_command_and_bash_takes_its_own() {
        let command = help::command();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::PowerShell, Shell::Elvish] {
            let script = script(shell);
            for below in command.get_subcommands() {
                assert!(script.contains(below.get_name()), "{shell}: {}", below.get_name());
            }
            assert!(script.contains("overwrite") && script.contains("memory"), "{shell}");
            assert!(!script.contains('\u{1b}'), "{shell}: an escape sequence");
        }
        if let Some((is_right, _, complaint)) = filtered("bash", &["-n"], &script(Shell::Bash)) {
            assert!(is_right && complaint.is_empty(), "{complaint}");
        }
    }

    #[test]
    fn devices_and_the_keys_of_a_stage_are_completed() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            for key in ["sft.learning_rate=", "ppo.kl_coef=", "ppo.ptx.coef=", "base.offload=", "data.max_length="] {
                assert!(script.contains(key), "{shell}: {key}");
            }
            assert!(!script.contains("data.sources.weight=") && !script.contains("grpo.reward.api="), "{shell}");
        }
        let bash = script(Shell::Bash);
        assert!(bash.contains("compgen -W \"auto cpu cuda\""), "{bash}");
        // The keys of a stage are those that it reads.
        let of = |stage: &str| {
            let from = bash.split(&format!("fourfold__subcmd__{stage})")).nth(1).unwrap();
            from.split(";;").take_while(|part| !part.contains("fourfold__subcmd__")).collect::<String>()
        };
        let sft = of("sft");
        assert!(sft.contains("sft.learning_rate=") && !sft.contains("ppo.kl_coef="), "{sft}");
        assert!(help::command().render_long_help().to_string().len() < 20_000);
    }

    #[test]
    fn every_command_has_a_page_with_its_options_and_groff_has_no_complaint() {
        let pages = pages().unwrap();
        let mut command = help::command().disable_help_subcommand(true);
        command.build();
        let page = |name: &str| {
            let found = pages.iter().find(|(file, _)| *file == format!("{name}.1"));
            found.map(|(_, page)| page.replace("\\-", "-")).unwrap_or_else(|| panic!("{name} has no page"))
        };
        assert_eq!(pages[0].0, "fourfold.1");
        let mut checked = 0;
        let mut open = vec![&command];
        while let Some(at) = open.pop() {
            let name = at.get_display_name().unwrap_or_else(|| at.get_name());
            let text = page(name);
            for option in at.get_arguments().filter_map(|arg| arg.get_long()) {
                assert!(text.contains(&format!("--{option}")), "{name} lacks --{option}: {text}");
                checked += 1;
            }
            for below in at.get_subcommands() {
                assert!(text.contains(&format!("{name}-{}", below.get_name())), "{name} lacks {}", below.get_name());
                open.push(below);
            }
            assert!(!text.contains('\u{1b}'), "{name}: an escape sequence");
        }
        assert!(checked > 60, "{checked}");
        assert!(page("fourfold-sft").contains("fourfold sft configs/smollm2-135m/sft.toml"));
        for (name, page) in &pages {
            let args = ["-man", "-Tutf8", "-ww", "-z"];
            let Some((is_right, _, complaint)) = filtered("groff", &args, page) else { return };
            assert!(is_right && complaint.is_empty(), "{name}: {complaint}");
        }
    }
}
