//! Options that other programs have: `--config FILE` is a positional argument here, and `--learning_rate 1e-4` is a key of
//! the config. The message of clap gets a line that says so. It does not depend on any stage.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::config::key_path;

/// Prints clap's error, with a hint where there is one, and ends the program. `words` are the command line's.
pub(super) fn exit(error: &clap::Error, words: impl Iterator<Item = String>) -> ! {
    let words: Vec<String> = words.collect();
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg)
        && let Some(hint) = hint(option, &words)
    {
        let _ = error.print();
        crate::tell!("  tip: {hint}");
        std::process::exit(2);
    }
    error.exit()
}

/// What was meant by an option that there is not.
fn hint(option: &str, words: &[String]) -> Option<String> {
    let command = words.first()?;
    let at = words.iter().position(|word| word == option || word.split('=').next() == Some(option))?;
    let value = match words[at].split_once('=') {
        Some((_, value)) => Some(value),
        None => words.get(at + 1).map(String::as_str).filter(|word| !word.starts_with("--")),
    };
    if ["--config", "--config_file", "--config-file"].contains(&option) {
        let file = value.unwrap_or("FILE.toml");
        return Some(format!("the config file needs no option: fourfold {command} {file}"));
    }
    let name = option.trim_start_matches('-').replace('-', "_");
    let path = key_path(&name, command)?;
    Some(format!("{name} is a key of the config: --set {path}={}", value.unwrap_or("VALUE")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_and_keys_as_options_are_pointed_home() {
        let hint = |line: &str, option: &str| {
            hint(option, &line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).unwrap_or_default()
        };
        assert_eq!(hint("sft --config a.toml", "--config"), "the config file needs no option: fourfold sft a.toml");
        assert!(hint("dpo a.toml --learning_rate 1e-4", "--learning_rate").ends_with("--set dpo.learning_rate=1e-4"));
        assert!(hint("sft a.toml --learning-rate=1e-4", "--learning-rate").ends_with("--set sft.learning_rate=1e-4"));
        assert!(hint("sft a.toml --lora_rank 8", "--lora_rank").ends_with("--set lora.r=8"));
        assert!(hint("ppo a.toml --ppo_epochs 4", "--ppo_epochs").ends_with("--set ppo.num_ppo_epochs=4"));
        // A share of the steps, which no key takes.
        assert_eq!(hint("sft a.toml --warmup_ratio 0.1", "--warmup_ratio"), "");
        assert!(hint("sft a.toml --max_length --json", "--max_length").ends_with("--set data.max_length=VALUE"));
        assert_eq!(hint("sft a.toml --nonsense 3", "--nonsense"), "");
    }
}
