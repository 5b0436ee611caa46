//! A run is resumed only with the inputs that it started with.

use std::fs;

use crate::support::Place;
use crate::world::{interrupted, line, place, run_all, signal, start, wait_for_lines};

fn stopped() -> Place {
    let place = place();
    let ran = interrupted(&place, "sft", 2, libc::SIGTERM);
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    place
}

fn refused(place: &Place, more: &str, said: &str) {
    let before = fs::read(place.path("out/sft/metrics.jsonl")).unwrap();
    let ran = place.run(&format!("{} --resume {more}", line("sft")));
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains(said), "{said:?} is not in {}", ran.stderr);
    assert_eq!(fs::read(place.path("out/sft/metrics.jsonl")).unwrap(), before, "nothing was touched");
}

#[test]
fn resuming_on_another_base_tokenizer_or_data_is_refused_with_the_difference_named() {
    let place = stopped();
    let keep = |name: &str| (name.to_string(), fs::read(place.path(name)).unwrap());
    let (weights, tokenizer, data) = (keep("base/model.safetensors"), keep("base/tokenizer.json"), keep("sft.jsonl"));
    let mut other = weights.1.clone();
    *other.last_mut().unwrap() ^= 1;
    place.write(&weights.0, &other);
    refused(&place, "", "base was");
    place.write(&weights.0, &weights.1);
    // A token that no record uses is called something else: the data are the same numbers.
    let text = String::from_utf8(tokenizer.1.clone()).unwrap();
    assert!(text.contains("<|pad|>"));
    place.write(&tokenizer.0, text.replace("<|pad|>", "<|pat|>"));
    let config = fs::read_to_string(place.path("base/tokenizer_config.json")).unwrap();
    place.write("base/tokenizer_config.json", config.replace("<|pad|>", "<|pat|>"));
    refused(&place, "", "tokenizer was");
    place.write(&tokenizer.0, &tokenizer.1);
    place.write("base/tokenizer_config.json", config);
    place.write(&data.0, String::from_utf8(data.1.clone()).unwrap().replace("salty", "sweet"));
    refused(&place, "", "data was");
    place.write(&data.0, &data.1);
    let ran = place.run(&format!("{} --resume", line("sft")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

#[test]
fn reference_answers_of_records_are_inputs_if_a_reward_compares_with_them() {
    let place = place();
    run_all(&place, &["sft", "reward"]);
    let config = fs::read_to_string(place.path("run.toml")).unwrap();
    place.write("run.toml", config + "[[ppo.reward]]\nkind = \"exact\"\n");
    let line = line("ppo").replace("prompts.jsonl", "sft.jsonl");
    let ran = place.run(&line);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let data = fs::read_to_string(place.path("sft.jsonl")).unwrap();
    place.write("sft.jsonl", data.replace("salty", "sweet"));
    let again = format!("{line} --resume out/ppo/checkpoints/checkpoint-12");
    let ran = place.run(&again);
    assert!(ran.code == 2 && ran.stderr.contains("answers was"), "{}", ran.stderr);
    place.write("sft.jsonl", data);
    assert_eq!(place.run(&again).code, 0);
}

#[test]
fn changed_settings_are_listed_and_those_of_the_mathematics_need_force() {
    let place = stopped();
    let more = "--set sft.learning_rate=2e-3 --set sft.logging_steps=2";
    refused(&place, more, "sft.learning_rate: 0.001 -> 0.002");
    refused(&place, "out/sft/adapter", "no checkpoint of");
    let ran = place.run(&format!("{} {more} --resume --force", line("sft")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let text = fs::read_to_string(place.path("out/sft/config.toml")).unwrap();
    assert!(ran.stderr.contains("sft.logging_steps: 1 -> 2") && text.contains("learning_rate = 0.002"), "{text}");
}

/// Replaced: the weights in memory are still the old ones. Written into: they are not.
#[test]
fn a_base_that_changes_during_a_run_is_noticed_at_the_next_checkpoint() {
    for in_place in [false, true] {
        let place = place();
        let child = start(&place, &format!("{} --set sft.num_train_epochs=2000", line("sft")));
        wait_for_lines(&place.path("out/sft/metrics.jsonl"), 2);
        let weights = place.path("base/model.safetensors");
        let mut other = fs::read(&weights).unwrap();
        *other.last_mut().unwrap() ^= 1;
        if in_place {
            fs::write(place.path("new"), &other).unwrap();
            // Not fs::write, which would cut the mapped file to nothing first.
            let mut file = fs::OpenOptions::new().write(true).open(&weights).unwrap();
            std::io::Write::write_all(&mut file, &other).unwrap();
            let ran = crate::world::finish(child);
            assert_eq!(ran.code, 1, "{}", ran.stderr);
            assert!(
                ran.stderr.contains("written into") && ran.stderr.contains("last good checkpoint"),
                "{}",
                ran.stderr
            );
        } else {
            fs::write(place.path("new"), &other).unwrap();
            fs::rename(place.path("new"), &weights).unwrap();
            let lines = fs::read_to_string(place.path("out/sft/metrics.jsonl")).unwrap().lines().count();
            wait_for_lines(&place.path("out/sft/metrics.jsonl"), lines + 3);
            signal(&child, libc::SIGTERM);
            let ran = crate::world::finish(child);
            assert_eq!(ran.code, 130, "{}", ran.stderr);
            assert_eq!(ran.stderr.matches("was replaced by another base").count(), 1, "{}", ran.stderr);
            refused(&place, "--set sft.num_train_epochs=2000", "base was");
        }
    }
}

/// A verifier judges by the answers in the records: other answers are other data, though the prompts are the same.
#[test]
fn resuming_ppo_on_records_with_other_answers_is_refused() {
    let place = place();
    crate::world::run_all(&place, &["sft", "reward"]);
    let config = fs::read_to_string(place.path("run.toml")).unwrap();
    place.write("run.toml", config + "\n[[ppo.reward]]\nkind = \"exact\"\n");
    let records = |answer: &str| -> String {
        let record = |i: usize| serde_json::json!({"prompt": format!("\n\nHuman: How is number {i}?\n\nAssistant:"), "completion": answer});
        (0..12).map(|i| format!("{}\n", record(i))).collect()
    };
    place.write("prompts.jsonl", records(" Yes."));
    let ran = interrupted(&place, "ppo", 1, libc::SIGTERM);
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    place.write("prompts.jsonl", records(" No."));
    let ran = place.run(&format!("{} --resume", line("ppo")));
    assert!(ran.code == 2 && ran.stderr.contains("prompts was"), "{}", ran.stderr);
    place.write("prompts.jsonl", records(" Yes."));
    let ran = place.run(&format!("{} --resume", line("ppo")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}
