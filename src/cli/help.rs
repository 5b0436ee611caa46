//! What `--help` says beyond the doc comments of the arguments: the commands in groups, and an example for each. It does not
//! depend on what commands do.

use clap::{Command, CommandFactory};
use textwrap::{Options, WordSplitter, wrap};

use super::Cli;
use super::completed::KeyAndValue;

/// Columns of the list of commands.
const WIDTH: usize = 100;
/// Columns of a command's name in the list, with what stands around it.
const NAMES: usize = 15;

/// The commands by what they are for.
const GROUPS: &[(&str, &[&str])] = &[
    (
        "Training",
        &["quickstart", "init", "sft", "reward", "dpo", "kto", "distill", "ppo", "grpo", "rloo", "data", "keys"],
    ),
    ("Models", &["merge", "generate", "chat", "serve", "score", "logprobs", "inspect"]),
    ("Runs", &["watch", "report"]),
    ("Machine", &["plan", "bench", "doctor", "completions", "man"]),
];

/// An example of each command.
const EXAMPLES: &[(&[&str], &str)] = &[
    (&["quickstart"], "fourfold quickstart --out runs/first"),
    (&["init"], "fourfold init sft --base model.gguf --data chats.jsonl --memory 8GiB --out sft.toml"),
    (&["sft"], "fourfold sft configs/smollm2-135m/sft.toml --set sft.learning_rate=1e-4 --out runs/sft"),
    (&["reward"], "fourfold reward configs/smollm2-135m/reward.toml --device cuda"),
    (&["dpo"], "fourfold dpo dpo.toml --set dpo.beta=0.05 --out runs/dpo --resume latest"),
    (&["kto"], "fourfold kto kto.toml --out runs/kto"),
    (&["distill"], "fourfold distill distill.toml --set distill.beta=1 --out runs/distill"),
    (&["ppo"], "fourfold ppo configs/smollm2-135m/ppo.toml --set ppo.kl_coef=0.1 --out runs/ppo"),
    (&["grpo"], "fourfold grpo configs/recipes/grpo.toml --set grpo.beta=0.04 --out runs/grpo"),
    (&["rloo"], "fourfold rloo rloo.toml --set rloo.num_generations=4 --out runs/rloo"),
    (&["data"], "fourfold data configs/smollm2-135m/sft.toml --head 5"),
    (&["plan"], "fourfold plan configs/smollm2-135m/ppo.toml --memory 8GiB"),
    (&["bench"], "fourfold bench memory configs/smollm2-135m/ppo.toml"),
    (&["bench", "memory"], "fourfold bench memory configs/smollm2-135m/ppo.toml --json"),
    (&["bench", "gpu"], "fourfold bench gpu --model 7b,8b --stored q4_k"),
    (&["doctor"], "fourfold doctor --device cuda:1"),
    (&["merge"], "fourfold merge --base model.gguf --adapter runs/ppo/actor --out merged --dtype bf16"),
    (&["generate"], "fourfold generate --base merged --prompt \"How was the soup?\" --temperature 0.7"),
    (&["chat"], "fourfold chat --base model.gguf --adapter runs/ppo/actor --system \"Be brief.\""),
    (
        &["serve"],
        "fourfold serve --base model.gguf --adapter runs/ppo/actor --adapter reward=runs/reward/adapter --port 8000",
    ),
    (
        &["score"],
        "fourfold score --base model.gguf --adapter runs/reward/adapter --data pairs.jsonl --out scores.jsonl",
    ),
    (&["logprobs"], "fourfold logprobs --base model.gguf --tokens ids.json --json"),
    (&["watch"], "fourfold watch runs/ppo"),
    (&["report"], "fourfold report runs/one runs/two --out both.html"),
    (&["keys"], "fourfold keys ppo"),
    (&["completions"], "fourfold completions bash > ~/.local/share/bash-completion/completions/fourfold"),
    (&["man"], "fourfold man --out ~/.local/share/man/man1"),
    (&["inspect"], "fourfold inspect model.gguf"),
];

/// The program's command line, with groups and examples.
pub(super) fn command() -> Command {
    let mut command = with_keys(with_examples(Cli::command(), &mut vec![]));
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{}{}\n{{options}}{{after-help}}",
        list(&command),
        heading(&command, "Options")
    );
    command = command.help_template(template);
    command
        .after_help("`fourfold COMMAND --help` has every option and an example; `fourfold keys` every key of a config.")
}

/// The keys that a shell completes after `--set`: a stage's own, or all.
fn with_keys(mut command: Command) -> Command {
    let set = |command: Command, stage| {
        command.mut_arg("set", |arg| arg.value_parser(KeyAndValue(stage)).hide_possible_values(true))
    };
    for stage in ["sft", "reward", "dpo", "kto", "distill", "ppo", "grpo", "rloo"] {
        command = command.mut_subcommand(stage, |below| set(below, Some(stage)));
    }
    for other in ["data", "plan"] {
        command = command.mut_subcommand(other, |below| set(below, None));
    }
    command.mut_subcommand("bench", |bench| bench.mut_subcommand("memory", |below| set(below, None)))
}

/// A heading as clap shows its own: in its style where the terminal has styles.
fn heading(command: &Command, text: &str) -> String {
    let style = command.get_styles().get_header();
    format!("{style}{text}:{style:#}")
}

/// The commands in their groups.
fn list(command: &Command) -> String {
    let style = command.get_styles().get_literal();
    let mut out = String::new();
    for (group, names) in GROUPS {
        out += &format!("{}\n", heading(command, group));
        for name in *names {
            let about = command.find_subcommand(name).and_then(Command::get_about).map(ToString::to_string);
            let about = about.unwrap_or_default();
            let how = Options::new(WIDTH - NAMES).word_splitter(WordSplitter::NoHyphenation);
            for (i, line) in wrap(&about, how).iter().enumerate() {
                let name = if i == 0 { name } else { "" };
                out += &format!("  {style}{name}{style:#}{:gap$}{line}\n", "", gap = NAMES - 2 - name.len());
            }
        }
        out += "\n";
    }
    out
}

/// Sets the example of a command and of those below it.
fn with_examples(command: Command, path: &mut Vec<String>) -> Command {
    let example = EXAMPLES.iter().find(|(words, _)| words == path).map(|(_, example)| example);
    let mut command = match example {
        Some(example) => {
            let text = format!("{}\n  {example}", heading(&command, "Example"));
            command.after_help(text)
        }
        None => command,
    };
    let names: Vec<String> = command.get_subcommands().map(|below| below.get_name().to_owned()).collect();
    for name in names {
        path.push(name.clone());
        command = command.mut_subcommand(name, |below| with_examples(below, path));
        path.pop();
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The paths of all commands.
    fn paths(command: &Command, path: &[String], out: &mut Vec<Vec<String>>) {
        for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
            let path = [path, &[below.get_name().to_owned()]].concat();
            paths(below, &path, out);
            out.push(path);
        }
    }

    /// The words of a line as a shell splits it, up to a redirection; `"` quotes.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(" > ").next().unwrap();
        let parts = line.split('"').enumerate().flat_map(|(i, part)| match i % 2 {
            0 => part.split_whitespace().map(str::to_owned).collect(),
            _ => vec![part.to_owned()],
        });
        parts.collect()
    }

    #[test]
    fn every_command_has_an_example_that_the_parser_takes_as_that_command() {
        let mut all = vec![];
        paths(&Cli::command(), &[], &mut all);
        assert!(all.len() >= 22, "{all:?}");
        for path in &all {
            let (_, example) =
                EXAMPLES.iter().find(|(words, _)| words == path).unwrap_or_else(|| panic!("{path:?} has no example"));
            let matches = command().try_get_matches_from(words(example)).unwrap_or_else(|e| panic!("{example}: {e}"));
            let (mut found, mut at) = (vec![], &matches);
            while let Some((name, below)) = at.subcommand() {
                found.push(name.to_owned());
                at = below;
            }
            assert!(found.starts_with(path), "{example} is of {found:?}, not of {path:?}");
            let mut shown = command();
            shown.build();
            let of = path.iter().fold(&shown, |command, name| command.find_subcommand(name).unwrap());
            let help = of.clone().render_help().to_string();
            assert!(help.contains(&format!("Example:\n  {example}")), "{path:?}: {help}");
        }
        assert_eq!(EXAMPLES.len(), all.len(), "an example of a command that there is not");
    }

    /// The options in a text, without the two dashes.
    fn options(text: &str) -> std::collections::BTreeSet<String> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let after = text.split("--").skip(1);
        after
            .map(|rest| rest.chars().take_while(|&c| is_name(c)).collect())
            .filter(|name: &String| !name.is_empty())
            .collect()
    }

    #[test]
    fn the_documentation_of_the_commands_has_the_options_of_the_parser() {
        let text = include_str!("../../configs/commands.md");
        let block = text.split("```").nth(1).unwrap();
        // A line that begins with a blank goes on with the one before.
        let mut lines: Vec<String> = vec![];
        for line in block.lines().filter(|line| !line.is_empty()) {
            match lines.last_mut().filter(|_| line.starts_with(' ')) {
                Some(last) => *last += line,
                None => lines.push(line.to_owned()),
            }
        }
        let mut built = command();
        built.build();
        let mut all = vec![];
        paths(&built, &[], &mut all);
        for path in &all {
            let of = path.iter().fold(&built, |command, name| command.find_subcommand(name).unwrap());
            if of.get_subcommands().any(|below| below.get_name() != "help") {
                continue;
            }
            let is_it = |line: &&String| {
                let words: Vec<&str> = line.split_whitespace().skip(1).take(path.len()).collect();
                words.iter().zip(path).all(|(word, name)| word.split('|').any(|one| one == name))
            };
            let documented: Vec<&String> = lines.iter().filter(is_it).collect();
            assert_eq!(documented.len(), 1, "{path:?} has one line in configs/commands.md: {documented:?}");
            let shown = of.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(clap::Arg::get_long);
            let own = shown.filter(|name| !["help", "version", "quiet"].contains(name)).map(str::to_owned);
            assert_eq!(options(documented[0]), own.collect(), "{path:?}: left documented, right the parser's");
        }
    }

    #[test]
    fn every_command_is_in_one_group_of_the_help() {
        let help = command().render_help().to_string();
        let line = |name: &str| help.lines().position(|line| line.split_whitespace().next() == Some(name));
        let at = |group: &str| line(&format!("{group}:")).unwrap_or_else(|| panic!("{group}: {help}"));
        let ends = ["Models", "Runs", "Machine", "Options"];
        for ((group, names), end) in GROUPS.iter().zip(ends) {
            for name in *names {
                let found = line(name).unwrap_or_else(|| panic!("{name}: {help}"));
                assert!((at(group)..at(end)).contains(&found), "{name} is not below {group}: {help}");
            }
        }
        let mut grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| *names).copied().collect();
        let plain = Cli::command();
        let mut all: Vec<&str> = plain.get_subcommands().map(Command::get_name).collect();
        grouped.sort_unstable();
        all.sort_unstable();
        assert_eq!(grouped, all);
        assert!(help.lines().all(|line| line.chars().count() <= WIDTH + 20), "{help}");
        assert!(help.contains("--version") && !help.contains('\u{1b}'), "{help}");
    }
}
