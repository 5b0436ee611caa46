//! Files -> tokens -> examples, for files of any size: equal results in memory and in the cache, caches that are stale,
//! damaged or built by two processes at once, masks that decode to the responses, splits by prompt, blocks of raw text.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use fourfold::config::{Compat, Data, Paths, Source, Template, Truncation};
use fourfold::data;
use fourfold::data::examples::objectives::{Objective, PromptExample, RankedExample, SftExample};
use fourfold::data::examples::{Example, Examples};
use fourfold::data::stream::cache::Stored;
use fourfold::data::{ModelEncoder, Prepared};
use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use fourfold::rng::SplitMix64;
use fourfold::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::encoders::assert_same_ids;

fn model_files() -> ModelFiles {
    ModelFiles::from_embedded(BASE.config, BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights)
        .unwrap()
}

const WORDS: [&str; 12] =
    ["soup", "the", "Blue Door", "was", "don't", "42", "  ", "very", "Zürich", "東京", "cold.\n", "why?"];

fn words(rng: &mut SplitMix64, most: usize) -> String {
    let some: Vec<&str> = (0..1 + rng.below(most)).map(|_| WORDS[rng.below(WORDS.len())]).collect();
    format!("x{}", some.join(" "))
}

/// A generated preference pair; every third prompt is one of twenty.
fn pair(rng: &mut SplitMix64, row: usize) -> Value {
    let prompt =
        if row.is_multiple_of(3) { format!("question {}?", rng.below(20)) } else { format!("{row} {}", words(rng, 9)) };
    json!({"prompt": prompt, "chosen": format!("{} yes", words(rng, 30)), "rejected": words(rng, 30)})
}

fn write_pairs(path: &Path, rows: usize) {
    let mut rng = SplitMix64::new(3);
    let lines: Vec<String> = (0..rows).map(|row| pair(&mut rng, row).to_string()).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

fn config(path: &Path) -> Data {
    Data { path: Paths::One(path.into()), max_length: 100, max_prompt_length: 100, ..Data::default() }
}

fn all<T: Example>(examples: &impl Examples<T>) -> Vec<T> {
    (0..examples.len()).map(|row| examples.get(row).unwrap().into_owned()).collect()
}

fn prepared<T: Objective + Stored>(data: &Data, tokenizer: &Tokenizer) -> Prepared<T> {
    data::prepare(data, tokenizer, 7, true).unwrap()
}

#[test]
fn memory_cache_and_a_single_thread_give_equal_examples() {
    let model_files = model_files();
    let tokenizer = model_files.tokenizer();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    write_pairs(&path, 3000);
    let data = Data { eval_rows: Some(0), ..config(&path) };
    let encoder = ModelEncoder::new(tokenizer).unwrap();
    let entries = data::load(&data).unwrap().entries;
    let (plain, report) = data::examples::objectives::ranked_examples(&entries, &encoder, &data).unwrap();
    assert!(report.dropped.values().sum::<usize>() > 0, "some records exceed the limit: {report}");
    let memory: Prepared<RankedExample> = prepared(&data, tokenizer);
    assert_eq!((all(&memory.train), &memory.report, memory.cache.is_none()), (plain.clone(), &report, true));
    let data = Data { cache_dir: Some(folder.path().join("cache")), ..data };
    let cached: Prepared<RankedExample> = prepared(&data, tokenizer);
    assert_eq!((all(&cached.train), &cached.report), (plain, &report));
    assert!((0..cached.train.len()).all(|row| cached.train.tokens(row) == memory.train.tokens(row)));

    let (memory, cached): (Prepared<SftExample>, Prepared<SftExample>) =
        (prepared(&Data { cache_dir: None, ..data.clone() }, tokenizer), prepared(&data, tokenizer));
    assert_eq!(all(&memory.train), all(&cached.train));
    let (memory, cached): (Prepared<PromptExample>, Prepared<PromptExample>) =
        (prepared(&Data { cache_dir: None, ..data.clone() }, tokenizer), prepared(&data, tokenizer));
    assert_eq!(all(&memory.train), all(&cached.train));
    let (prompts, _) = data::examples::objectives::prompt_examples(&entries, &encoder, &data).unwrap();
    assert_eq!(all(&memory.train), prompts, "record number and reference answer are equal too");
}

#[test]
fn under_dschat_each_objective_gets_its_share_with_record_numbers() {
    let model_files = model_files();
    let tokenizer = model_files.tokenizer();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    write_pairs(&path, 100);
    let data = Data { compat: Some(Compat::Dschat), eval_fraction: None, eval_rows: Some(0), ..config(&path) };
    let entries = data::load(&data).unwrap().entries;
    let encoder = ModelEncoder::new(tokenizer).unwrap();
    let (ranked, _) = data::examples::objectives::ranked_examples(&entries, &encoder, &data).unwrap();
    assert_eq!(all(&prepared::<RankedExample>(&data, tokenizer).train), ranked);
    assert_eq!(ranked.len(), 40);
    let (prompts, _) = data::examples::objectives::prompt_examples(&entries, &encoder, &data).unwrap();
    let cached = Data { cache_dir: Some(folder.path().join("cache")), ..data.clone() };
    assert_eq!(all(&prepared::<PromptExample>(&cached, tokenizer).train), prompts);
    assert_eq!(prompts.len(), 40);
}

#[test]
fn a_cache_is_reused_until_an_input_changes_or_it_is_damaged() {
    let model_files = model_files();
    let tokenizer = model_files.tokenizer();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    write_pairs(&path, 60);
    let cache_dir = Some(folder.path().join("cache"));
    let data = Data { cache_dir: cache_dir.clone(), ..config(&path) };
    let first: Prepared<SftExample> = prepared(&data, tokenizer);
    let file = first.cache.clone().unwrap();
    let made = |file: &Path| fs::metadata(file).unwrap().modified().unwrap();
    let (time, bytes) = (made(&file), fs::read(&file).unwrap());
    let again: Prepared<SftExample> = prepared(&data, tokenizer);
    assert_eq!((made(again.cache.as_ref().unwrap()), all(&again.train)), (time, all(&first.train)));

    // The split is not part of the key: another split uses the same file.
    let other: Prepared<SftExample> = prepared(&Data { eval_rows: Some(20), ..data.clone() }, tokenizer);
    assert_eq!((other.cache.as_deref(), other.held_out.len(), made(&file)), (Some(&*file), 20, time));

    let name = |data: &Data, seed, completion_only| {
        let found: Prepared<SftExample> = data::prepare(data, tokenizer, seed, completion_only).unwrap();
        found.cache.unwrap()
    };
    let mut names = vec![file.clone()];
    names.push(name(&data, 8, true));
    names.push(name(&data, 7, false));
    names.push(name(&Data { max_length: 99, ..data.clone() }, 7, true));
    names.push(name(&Data { truncation: Truncation::KeepEnd, ..data.clone() }, 7, true));
    names.push(name(&Data { template: Some(Template::Chat), ..data.clone() }, 7, true));
    names.push(name(&Data { max_rows: Some(50), ..data.clone() }, 7, true));
    names.push(prepared::<PromptExample>(&data, tokenizer).cache.unwrap());
    let other_tokenizer = base_with_another_end_token();
    let found: Prepared<SftExample> = prepared(&data, other_tokenizer.tokenizer());
    names.push(found.cache.unwrap());
    write_pairs(&path, 61);
    names.push(name(&data, 7, true));
    let distinct: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "{names:#?}");

    write_pairs(&path, 60);
    let mut damaged = bytes.clone();
    damaged[200] ^= 4;
    // By a rename, so that the mapped file stays unchanged.
    let other = folder.path().join("damaged");
    fs::write(&other, &damaged).unwrap();
    fs::rename(&other, &file).unwrap();
    let healed: Prepared<SftExample> = prepared(&data, tokenizer);
    assert_eq!(all(&healed.train), all(&first.train));
    assert_eq!(fs::read(&file).unwrap(), bytes, "the same bytes again");
}

fn base_with_another_end_token() -> ModelFiles {
    let config: Value = serde_json::from_str(BASE.tokenizer_config).unwrap();
    let mut config = config.as_object().unwrap().clone();
    let tokenizer: Value = serde_json::from_str(BASE.tokenizer).unwrap();
    let other = tokenizer["model"]["vocab"].as_object().unwrap().keys().next_back().unwrap().clone();
    config.insert("eos_token".into(), other.into());
    let config = Value::Object(config).to_string();
    ModelFiles::from_embedded(BASE.config, BASE.generation_config, BASE.tokenizer, &config, BASE.weights).unwrap()
}

#[test]
fn comparisons_of_one_prompt_are_on_one_side_of_the_split() {
    let model_files = model_files();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    write_pairs(&path, 500);
    let found: Prepared<RankedExample> =
        prepared(&Data { eval_fraction: Some(0.2), ..config(&path) }, model_files.tokenizer());
    let (train, held_out) = (all(&found.train), all(&found.held_out));
    assert_eq!(train.len() + held_out.len(), found.report.kept);
    assert!(held_out.len() * 10 >= found.report.kept, "{}", held_out.len());
    let repeated = |e: &RankedExample| train.iter().filter(|other| other.prompt == e.prompt).count();
    assert!(held_out.iter().all(|e| repeated(e) == 0));
    assert!(train.iter().any(|e| repeated(e) > 1), "the data has such prompts");
}

/// The text between the roles' markers is known exactly, so the masked tokens must decode to exactly that text.
#[test]
fn decoding_the_response_mask_gives_exactly_the_assistants_text() {
    let model_files = model_files();
    let tokenizer = model_files.tokenizer();
    let eos = tokenizer.token(tokenizer.eos_id().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut rng = SplitMix64::new(11);
    for template in [None, Some(Template::Chat), Some(Template::HumanAssistant), Some(Template::Plain)] {
        let mut expected = vec![];
        let mut lines = vec![];
        for _ in 0..120 {
            let rounds = 1 + rng.below(4);
            let mut turns = vec![];
            let mut responses = vec![];
            for _ in 0..rounds {
                turns.push(json!({"role": "user", "content": words(&mut rng, 6).trim()}));
                let response = words(&mut rng, 12).trim().to_owned();
                turns.push(json!({"role": "assistant", "content": response.as_str()}));
                responses.push(response);
            }
            expected.push(responses);
            lines.push(json!({"messages": turns}).to_string());
        }
        let path = folder.path().join("dialogues.jsonl");
        fs::write(&path, lines.join("\n")).unwrap();
        let data = Data { template, max_length: 4000, eval_rows: Some(0), ..config(&path) };
        let found: Prepared<SftExample> = prepared(&data, tokenizer);
        assert_eq!(found.train.len(), expected.len());
        for (example, responses) in all(&found.train).iter().zip(&expected) {
            let mut from = 0;
            let mut trained = vec![];
            for run in example.loss_mask.chunk_by(|a, b| a == b) {
                let tokens = &example.tokens[from..from + run.len()];
                from += run.len();
                if run[0] {
                    trained.push(tokenizer.decode_with_special_tokens(tokens).unwrap());
                }
            }
            let bare: Vec<&str> =
                trained.iter().map(|text| text.strip_suffix(&eos).unwrap_or(text).trim_start()).collect();
            assert_eq!(bare, responses.iter().map(String::as_str).collect::<Vec<_>>(), "{template:?}");
            assert!(trained.last().unwrap().ends_with(&eos), "the last response has the end token: {template:?}");
        }
    }
}

#[test]
fn keep_end_truncates_responses_with_an_end_token_and_counts_them() {
    let model_files = model_files();
    let tokenizer = model_files.tokenizer();
    let eos = tokenizer.eos_id().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    write_pairs(&path, 300);
    let whole = Data { max_length: 4000, eval_rows: Some(0), ..config(&path) };
    let (limit, mut cut_somewhere) = (60, false);
    let data = Data { truncation: Truncation::KeepEnd, max_length: limit, ..whole.clone() };
    let pairs: Prepared<RankedExample> = prepared(&data, tokenizer);
    for example in all(&pairs.train) {
        assert!(example.longest_sequence() <= limit);
        assert!(example.responses.iter().all(|response| response.last() == Some(&eos)));
        assert!(example.responses.iter().all(|response| response.iter().filter(|&&token| token == eos).count() == 1));
        cut_somewhere |= example.responses.iter().any(|response| example.prompt.len() + response.len() == limit);
    }
    let too_long = all(&prepared::<RankedExample>(&whole, tokenizer).train);
    let too_long = too_long.iter().filter(|e| e.longest_sequence() > limit).count();
    let dropped: usize = pairs.report.dropped.values().sum();
    assert_eq!((cut_somewhere, pairs.report.truncated + dropped), (true, too_long), "{}", pairs.report);
    let sft: Prepared<SftExample> = prepared(&data, tokenizer);
    assert!(sft.report.truncated > 0);
    assert!(all(&sft.train).iter().all(|e| e.tokens.len() <= limit && e.tokens.last() == Some(&eos)));
}

#[test]
fn under_dschat_data_sets_are_split_separately_and_then_shuffled_together() {
    let model_files = model_files();
    let folder = tempfile::tempdir().unwrap();
    let prompts_of = |name: &str, rows: usize| {
        let path = folder.path().join(name);
        let lines = (0..rows).map(|row| json!({"prompt": format!("{name} {row}")}).to_string()).collect::<Vec<_>>();
        fs::write(&path, lines.join("\n")).unwrap();
        Source { path: Paths::One(path), ..Source::default() }
    };
    let sources = vec![prompts_of("a.jsonl", 20), prompts_of("b.jsonl", 10)];
    let data = Data {
        compat: Some(Compat::Dschat),
        sources,
        seed: 1234,
        eval_rows: Some(0),
        eval_fraction: None,
        template: Some(Template::Plain),
        ..Data::default()
    };
    let found: Prepared<PromptExample> = prepared(&data, model_files.tokenizer());
    let rows = |size, first| {
        let rows = data::examples::dschat::share_rows(1234, size, &[2.0, 4.0, 4.0], 2).unwrap();
        rows.into_iter().map(move |row| first + row as usize)
    };
    let joined: Vec<usize> = rows(20, 0).chain(rows(10, 20)).collect();
    let order = data::examples::dschat::shuffled_rows(1234, joined.len()).unwrap();
    let expected: Vec<usize> = order.into_iter().map(|at| joined[at as usize]).collect();
    let prompts = all(&found.train);
    assert_eq!(prompts.iter().map(|prompt| prompt.entry).collect::<Vec<_>>(), expected);
    for prompt in prompts {
        let (name, row) = if prompt.entry < 20 { ("a", prompt.entry) } else { ("b", prompt.entry - 20) };
        assert_eq!(prompt.text.trim(), format!("{name}.jsonl {row}"));
    }
}

#[test]
fn ptx_blocks_are_the_joined_texts_without_the_incomplete_last_block() {
    let model_files = model_files();
    let tokenizer = model_files.tokenizer();
    let encoder = ModelEncoder::new(tokenizer).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("texts.jsonl");
    let mut rng = SplitMix64::new(2);
    let texts: Vec<String> = (0..200).map(|_| words(&mut rng, 50)).collect();
    let lines: Vec<String> = texts.iter().map(|text| json!({"text": text}).to_string()).collect();
    fs::write(&path, lines.join("\n")).unwrap();
    let paths = Paths::One(path);
    for (compat, length) in [(None, 16), (None, 64), (Some(Compat::Dschat), 16)] {
        let mut stream = vec![];
        for text in &texts {
            use fourfold::data::examples::objectives::TextEncoder;
            stream.extend(encoder.front());
            stream.extend(encoder.encode(text).unwrap());
            // DeepSpeed-Chat puts no end token between the texts.
            stream.extend(compat.is_none().then_some(encoder.eos_id()));
        }
        let data = Data { compat, ..Data::default() };
        let found = data::ptx_blocks(&paths, &data, tokenizer, 0, length).unwrap();
        let blocks = all(&found.train);
        assert!(
            blocks.iter().all(|b| b.tokens.len() == length && !b.loss_mask[0] && b.loss_mask[1..].iter().all(|&m| m))
        );
        let joined: Vec<u32> = blocks.into_iter().flat_map(|b| b.tokens).collect();
        assert_eq!(joined, stream[..stream.len() / length * length]);
        let rest: usize = found.report.dropped.values().sum();
        assert_eq!((rest, found.report.kept), (stream.len() % length, stream.len() / length));
        assert!(found.held_out.is_empty());
    }
    assert!(data::ptx_blocks(&paths, &Data::default(), tokenizer, 0, 1 << 20).is_err(), "less text than one block");
}

/// Writes the embedded base as files, and a config that uses it.
fn project(folder: &Path, rows: usize) -> std::path::PathBuf {
    let base = folder.join("base");
    fs::create_dir_all(&base).unwrap();
    for (name, text) in [
        ("config.json", BASE.config),
        ("tokenizer.json", BASE.tokenizer),
        ("tokenizer_config.json", BASE.tokenizer_config),
    ] {
        fs::write(base.join(name), text).unwrap();
    }
    fs::write(base.join("model.safetensors"), BASE.weights).unwrap();
    write_pairs(&folder.join(format!("{rows}.jsonl")), rows);
    let path = folder.join(format!("{rows}.toml"));
    let [base, cache] = [base, folder.join("cache")].map(|path| path.display().to_string());
    let data = folder.join(format!("{rows}.jsonl")).display().to_string();
    let text = format!("[base]\npath = {base:?}\n[data]\npath = {data:?}\ncache_dir = {cache:?}\n[reward]\n");
    fs::write(&path, text).unwrap();
    path
}

fn data_command(config: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.arg("data").arg(config).args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn two_processes_building_one_cache_at_once_both_read_it_whole() {
    let folder = tempfile::tempdir().unwrap();
    let config = project(folder.path(), 4000);
    let both = [0, 1].map(|_| data_command(&config, &["--json"]).spawn().unwrap());
    let found = both.map(|process| {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut found: Value = serde_json::from_slice(&output.stdout).unwrap();
        found.as_object_mut().unwrap().remove("peak_rss_mib");
        found
    });
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0]["records"], 4000);
    let names = fs::read_dir(folder.path().join("cache")).unwrap().map(|entry| entry.unwrap().path());
    let mut endings: Vec<_> = names.map(|path| path.extension().unwrap().to_owned()).collect();
    endings.sort();
    assert_eq!(endings, ["lock", "tokens"], "one cache file and no temporary file");
}

#[test]
fn a_file_ten_times_as_large_takes_no_more_memory() {
    let folder = tempfile::tempdir().unwrap();
    let peak = |rows: usize| {
        let output = data_command(&project(folder.path(), rows), &["--json", "--head", "0"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["records"], rows);
        found["peak_rss_mib"].as_u64().unwrap()
    };
    let (small, large) = (peak(20_000), peak(200_000));
    let size = fs::metadata(folder.path().join("200000.jsonl")).unwrap().len() >> 20;
    // 180,000 more records of about 240 bytes. Index and split take 40 bytes per record, 7 MiB; memory that one thread
    // frees for another varies the allocator's peak by about 20 MiB.
    assert!(size >= 45 && large <= small + 32, "{small} MiB for a tenth, {large} MiB for {size} MiB of records");
}

#[test]
fn the_data_command_shows_counts_lengths_drops_and_masks_without_colour_in_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let config = project(folder.path(), 200);
    let output = data_command(&config, &["--head", "2", "--set", "data.max_length=60"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && !text.contains('\x1b'), "{text}");
    for wanted in [
        "      200 records  ",
        " sequences for reward: ",
        " dropped: longer than max_length = 60",
        "tokens of a training example: ",
        "█",
        "── example 2 ──",
        "── response 1, the best ──",
        "⟦",
    ] {
        assert!(text.contains(wanted), "{wanted:?} in {text}");
    }
    let output = data_command(&config, &["--phase", "sft", "--head", "1", "--json"]).output().unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sample = &found["samples"][0][0];
    assert_eq!((&sample[0]["learnt"], &sample[1]["learnt"]), (&json!(false), &json!(true)));
    let counted: u64 = found["histogram"].as_array().unwrap().iter().map(|bin| bin["count"].as_u64().unwrap()).sum();
    assert_eq!(found["train"].as_u64().unwrap(), counted);
    assert_eq!(found["sequences"].as_u64().unwrap(), counted + found["held_out"].as_u64().unwrap());
    let text = fs::read_to_string(&config).unwrap().replace("[reward]\n", "");
    fs::write(&config, text).unwrap();
    let output = data_command(&config, &[]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && message.contains("--phase"), "{message}");
}

#[test]
fn the_fast_encoder_equals_the_tokenizers_crate_on_any_text() {
    let endless = " ".repeat(5000);
    assert_same_ids(model_files().tokenizer(), 4000, &["", " ", "'", &endless]);
}

#[test]
fn a_bad_first_record_of_a_long_file_ends_the_reading_and_leaves_no_cache() {
    let model_files = model_files();
    let tokenizer = model_files.tokenizer();
    let eos = tokenizer.token(tokenizer.eos_id().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.jsonl");
    write_pairs(&path, 20_000);
    // This fault is found only by the tokenising thread.
    let bad = json!({"prompt": "a", "chosen": format!("b{eos}c"), "rejected": "d"}).to_string();
    fs::write(&path, format!("{bad}\n{}", fs::read_to_string(&path).unwrap())).unwrap();
    let data = Data { cache_dir: Some(folder.path().join("cache")), ..config(&path) };
    let Err(error) = data::prepare::<RankedExample>(&data, tokenizer, 0, true) else { panic!("the record is bad") };
    let message = format!("{error:#}");
    assert!(message.contains("pairs.jsonl, line 1: ") && message.contains("inside it"), "{message}");
    let left = fs::read_dir(folder.path().join("cache")).unwrap().map(|entry| entry.unwrap().path());
    assert!(left.into_iter().all(|path| path.extension().is_some_and(|end| end == "lock")));
    let skipped = Data { on_bad_record: fourfold::config::OnBadRecord::Skip, ..data };
    let found: Prepared<RankedExample> = prepared(&skipped, tokenizer);
    assert_eq!((found.report.read, found.report.dropped["bad"]), (20_001, 1));
    assert!(found.report.first_bad.unwrap().contains("line 1"));
}
