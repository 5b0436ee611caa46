//! Secrets are written nowhere: with a hub token in the environment, no file and no message of a whole pipeline holds
//! it.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::world::{line, place};

const TOKEN: &str = "hf_NeverWrittenDown0123456789";

fn holds(path: &Path, needle: &[u8]) -> Vec<String> {
    let mut found = vec![];
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(holds(&path, needle));
        } else if fs::read(&path).unwrap().windows(needle.len()).any(|w| w == needle) {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn a_hub_token_is_in_no_log_no_config_and_no_model_card() {
    let place = place();
    let merge = "merge --base base --adapter out/sft/adapter --out out/merged";
    let lines = [line("sft"), line("reward"), line("ppo"), merge.into(), "inspect out/merged --json".into()];
    // And with a fault, whose message could quote its surroundings.
    let faults =
        ["sft run.toml --set data.path=$HF_TOKEN/x.jsonl --out o", "sft run.toml --set data.path=me/nowhere --out o"];
    for line in lines.iter().map(String::as_str).chain(faults) {
        let output = Command::new(env!("CARGO_BIN_EXE_fourfold"))
            .args(line.split_whitespace())
            .current_dir(place.path(""))
            .env("HF_TOKEN", TOKEN)
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", place.path("hub"))
            .output()
            .unwrap();
        let told = [output.stdout, output.stderr].concat();
        assert!(
            !told.windows(TOKEN.len()).any(|w| w == TOKEN.as_bytes()),
            "{line}: {}",
            String::from_utf8_lossy(&told)
        );
        let expected = if faults.contains(&line) { 2 } else { 0 };
        assert_eq!(output.status.code(), Some(expected), "{line}: {}", String::from_utf8_lossy(&told));
    }
    assert!(place.path("out/merged/README.md").exists(), "there is a card to look into");
    assert_eq!(holds(&place.path(""), TOKEN.as_bytes()), Vec::<String>::new());
}
