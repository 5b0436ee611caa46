//! Benchmark data_tokenize: time to tokenise a file of preference pairs into the token cache, from JSON to the fsynced
//! file, and time of the encoder alone on the same text.
//!
//! It prints one JSON line per measurement, each the minimum of --reps runs (default 3). With FOURFOLD_BENCH_PYTHON (an
//! interpreter that has `datasets` and `transformers`), Hugging Face's libraries run on the same file, in alternation.
//!
//! benches/make_pairs.py pairs.jsonl 50000
//! FOURFOLD_BENCH_BASE=model-dir-or-gguf FOURFOLD_BENCH_DATA=pairs.jsonl cargo bench --bench data_tokenize
//!
//! Megabytes count the records' texts, without JSON syntax. The rate per core divides by the CPU seconds of all
//! threads.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fourfold::config::{Data, Paths};
use fourfold::data;
use fourfold::data::examples::Examples;
use fourfold::data::examples::objectives::RankedExample;
use fourfold::data::{Prepared, Record, Text};
use fourfold::host::peak_rss_bytes;
use fourfold::model_files::ModelFiles;
use fourfold::tokenizer::SpecialTokens;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// CPU seconds of this process over all threads, in steps of 0.01 (the kernel's clock tick).
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Wall-clock and CPU seconds of a call.
fn timed(run: impl FnOnce() -> Result<()>) -> Result<(f64, f64)> {
    let (wall, processor) = (Instant::now(), processor_seconds());
    run()?;
    Ok((wall.elapsed().as_secs_f64(), processor_seconds() - processor))
}

/// The texts of the first records, the bytes of all texts, and the number of records.
fn texts(data: &Data, most: usize) -> Result<(Vec<String>, usize, usize)> {
    let (mut some, mut bytes, mut records) = (vec![], 0, 0);
    data::scan(data, &mut |found| {
        let Ok(entry) = found else { return Ok(true) };
        let Record::Ranked { prompt, responses, .. } = entry.record else { return Ok(true) };
        records += 1;
        for text in std::iter::once(prompt).chain(responses) {
            if let Text::Verbatim(text) = text {
                bytes += text.len();
                if some.len() < most {
                    some.push(text);
                }
            }
        }
        Ok(true)
    })?;
    Ok((some, bytes, records))
}

fn main() -> Result<()> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (Some(base), Some(file)) = (variable("FOURFOLD_BENCH_BASE"), variable("FOURFOLD_BENCH_DATA")) else {
        println!(
            "{{\"bench\":\"data_tokenize\",\"skipped\":\"set FOURFOLD_BENCH_BASE and FOURFOLD_BENCH_DATA, see the file\"}}"
        );
        return Ok(());
    };
    let arguments: Vec<String> = std::env::args().collect();
    let reps = match arguments.iter().position(|a| a == "--reps") {
        Some(i) => arguments.get(i + 1).context("--reps N")?.parse()?,
        None => 3,
    };
    let model_files = ModelFiles::open(&base)?;
    let tokenizer = model_files.tokenizer();
    let folder = std::env::temp_dir().join(format!("fourfold-data-tokenize-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let data = Data {
        path: Paths::One(file.clone()),
        max_length: 4096,
        cache_dir: Some(folder.join("cache")),
        ..Data::default()
    };
    let (some, bytes, records) = texts(&data, 3000)?;
    let megabytes = bytes as f64 / 1e6;
    let some_megabytes = some.iter().map(String::len).sum::<usize>() as f64 / 1e6;

    // 1. The encoder alone, on one thread: fourfold's and the tokenizers crate's.
    let mut bulk = tokenizer.bulk();
    let (mut ours, mut crates) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..reps {
        ours = ours.min(timed(|| some.iter().try_for_each(|text| bulk.encode(text).map(drop)))?.0);
        let encode = |text: &String| tokenizer.encode(text, SpecialTokens::None).map(drop);
        crates = crates.min(timed(|| some.iter().try_for_each(encode))?.0);
    }
    println!(
        "{{\"bench\":\"data_tokenize/encode/one_thread\",\"mb_per_s\":{:.1},\"tokenizers_crate_mb_per_s\":{:.1},\"short_way\":{}}}",
        some_megabytes / ours,
        some_megabytes / crates,
        bulk.is_fast()
    );

    // 2. From the data file into the cache.
    let peer = variable("FOURFOLD_BENCH_PYTHON");
    if peer.is_some() {
        for (name, content) in model_files.side_files()? {
            std::fs::write(folder.join(name), content)?;
        }
    }
    let (mut wall, mut processor, mut theirs) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    for _ in 0..reps {
        let _ = std::fs::remove_dir_all(folder.join("cache"));
        let (seconds, cores) = timed(|| {
            let made: Prepared<RankedExample> = data::prepare(&data, tokenizer, 0, true)?;
            ensure!(made.train.len() + made.held_out.len() == made.report.kept && made.cache.is_some());
            Ok(())
        })?;
        (wall, processor) = (wall.min(seconds), processor.min(cores));
        if let Some(python) = &peer {
            theirs = theirs.min(peers(python, &file, &folder)?);
        }
    }
    println!(
        "{{\"bench\":\"data_tokenize/pairs_to_cache/{records}_records\",\"seconds\":{wall:.3},\"mb_per_s\":{:.1},\"mb_per_s_a_core\":{:.1},\"peak_rss_mib\":{}}}",
        megabytes / wall,
        megabytes / processor,
        peak_rss_bytes().unwrap_or(0) >> 20
    );
    if theirs.is_finite() {
        println!(
            "{{\"bench\":\"data_tokenize/hugging_face/{records}_records\",\"seconds\":{theirs:.3},\"mb_per_s\":{:.1},\"ours_is_faster_by\":{:.2}}}",
            megabytes / theirs,
            theirs / wall
        );
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// Seconds of Hugging Face's libraries, measured in Python without start and imports.
fn peers(python: &Path, file: &Path, tokenizer: &Path) -> Result<f64> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/data_tokenize.py");
    let output = Command::new(python).arg(script).arg("--file").arg(file).arg("--tokenizer").arg(tokenizer).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let line = String::from_utf8(output.stdout)?;
    let found: serde_json::Value = serde_json::from_str(line.lines().last().unwrap_or_default())?;
    found["seconds"].as_f64().context("the peer prints its seconds")
}
