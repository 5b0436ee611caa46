//! Small files that would be large in memory: made on purpose, where chance would not.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use flate2::Compression;
use flate2::write::GzEncoder;
use fourfold::error::exit_code;
use fourfold::ops::weight::StoredType;
use serde_json::json;

use crate::allocation::most_held;
use crate::data::prepared;
use crate::specimens::gguf;

/// A gzipped file of a beginning, a piece many times over, and an end.
fn packed(path: &Path, begin: &str, piece: &str, times: usize, end: &str) -> usize {
    let mut file = GzEncoder::new(fs::File::create(path).unwrap(), Compression::best());
    file.write_all(begin.as_bytes()).unwrap();
    let many = piece.repeat(1000);
    (0..times / 1000).for_each(|_| file.write_all(many.as_bytes()).unwrap());
    file.write_all(end.as_bytes()).unwrap();
    file.finish().unwrap().metadata().unwrap().len() as usize
}

#[test]
fn a_gzipped_record_that_would_fill_the_memory_is_refused_before_it_does() {
    let cases = [
        (
            "a text without an end",
            "sft-a.jsonl.gz",
            "{\"text\": \"",
            "xxxxxxxxxx",
            20_000_000,
            "\"}\n",
            "longer than 16 MiB",
        ),
        (
            "the same in a list",
            "sft-b.json.gz",
            "[{\"text\": \"",
            "xxxxxxxxxx",
            20_000_000,
            "\"}]",
            "longer than 16 MiB",
        ),
        ("empty lists", "sft-c.json.gz", "[{\"text\": [", "[],", 5_000_000, "[]]}]", "more than 200000 values"),
        ("objects", "sft-d.jsonl.gz", "{\"text\": [", "{\"a\":0},", 1_000_000, "[]]}\n", "more than 200000 values"),
        ("a cell", "sft-e.csv.gz", "text,x\n\"", "xxxxxxxxxx", 20_000_000, "\",1\n", "longer than 16 MiB"),
        ("a line of text", "sft-f.txt.gz", "", "xxxxxxxxxx", 20_000_000, "\n", "longer than 16 MiB"),
        ("no record at all", "sft-g.json.gz", "[", "          ", 20_000_000, "]", "longer than 16 MiB"),
    ];
    for (what, name, begin, piece, times, end, said) in cases {
        let dir = tempfile::tempdir().unwrap();
        let size = packed(&dir.path().join(name), begin, piece, times, end);
        let (result, most) = most_held(|| prepared(dir.path(), name));
        let error = result.expect_err(what);
        assert!(exit_code(&error) == 2 && format!("{error:#}").contains(said), "{what}: {error:#}");
        assert!(most <= 2 * size + (64 << 20), "{what}: {} MiB for {size} bytes", most >> 20);
    }
}

/// What steps do not bound: a text that is joined with itself is as long as the memory after thirty of them.
#[test]
fn a_chat_template_that_doubles_its_text_ends_with_a_message_and_not_with_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let generate = |template: &str| {
        fs::write(&path, gguf("llama-bpe", StoredType::F32, false, template)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.args(["generate", "--prompt", "x", "--base"]).arg(&path).output().unwrap()
    };
    for template in [
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = (ns.x + ns.x) | list %}{% endfor %}{{ ns.x }}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    ] {
        let ran = generate(template);
        let told = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(2), "{template}: {told}");
        assert!(told.starts_with("error: ") && told.contains("chat template"), "{template}: {told}");
    }
    // And one that is long, honestly.
    let turns = "{% for m in messages %}{{ m.content * 3000 }}{% endfor %}";
    let told = String::from_utf8_lossy(&generate(turns).stderr).into_owned();
    assert!(told.contains("leaves no room") && !told.contains("memory"), "{told}");
}

/// A header's lengths are only believed as far as the file goes.
#[test]
fn a_data_file_that_nests_without_end_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("sft-a.jsonl", format!("{{\"text\": {}", "[".repeat(200_000))),
        ("sft-b.json", "[".repeat(200_000)),
        ("sft-c.csv", format!("text\n\"{}\"\n", "[".repeat(200_000))),
        ("sft-d.jsonl", format!("{}\n", json!({"messages": "[".repeat(1000)}))),
    ] {
        fs::write(dir.path().join(name), text).unwrap();
        fs::remove_file(dir.path().join("run.toml")).ok();
        match prepared(dir.path(), name) {
            Err(error) => assert_eq!(exit_code(&error), 2, "{name}: {error:#}"),
            // A cell of brackets that are no JSON is a text.
            Ok(()) => assert_eq!(name, "sft-c.csv"),
        }
    }
}
