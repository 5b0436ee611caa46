//! Small files that would be large in memory: made on purpose, where chance would not.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use fourfold::data::stream::ids;
use fourfold::error::exit_code;
use fourfold::ops::weight::StorageDType;
use parquet::basic::{Compression as Codec, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;

use crate::allocation::{alone, most_held};
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
    let _alone = alone();
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
        fs::write(&path, gguf("llama-bpe", StorageDType::F32, false, template)).unwrap();
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
        let is_the_error = |line: &str| line.starts_with("error: ") && line.contains("chat template");
        assert!(told.lines().any(is_the_error), "{template}: {told}");
    }
    // And one that is long, honestly.
    let turns = "{% for m in messages %}{{ m.content * 3000 }}{% endfor %}";
    let told = String::from_utf8_lossy(&generate(turns).stderr).into_owned();
    assert!(told.contains("leaves no room") && !told.contains("memory"), "{told}");
}

/// A header's lengths are only believed as far as the file goes.
#[test]
fn a_data_file_that_nests_without_end_is_refused() {
    let _alone = alone();
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

/// A list per sequence, or a JSON value per token, would take several times the file's size.
#[test]
fn token_ids_take_no_more_memory_than_twice_their_file() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ids.json");
    let sequence = |length: u32| {
        format!("[{}]", (0..length).map(|i| (i * 7919 % 49_152).to_string()).collect::<Vec<_>>().join(", "))
    };
    for (length, sequences, room) in [(200, 4000, 0), (2, 400_000, 64 << 20)] {
        let text = format!("{{\"input_ids\": [{}]}}", vec![sequence(length); sequences].join(", "));
        fs::write(&path, &text).unwrap();
        let (read, most) = most_held(|| ids::read(&path).unwrap());
        assert_eq!((read.iter().count(), read.tokens()), (sequences, sequences * length as usize));
        assert_eq!(read.get(sequences - 1), read.get(0));
        assert!(most <= 2 * text.len() + room, "{length}: {most} bytes for {}", text.len());
    }
}

/// A Parquet file of one row, each of its columns filled with the same texts: one a column, or `times` of a repeated one.
fn parquet(path: &Path, columns: &str, text: &[u8], times: usize) -> usize {
    let schema = Arc::new(parse_message_type(&format!("message records {{ {columns} }}")).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(Codec::ZSTD(ZstdLevel::default()))
        .set_dictionary_enabled(times > 1)
        .set_dictionary_page_size_limit(64 << 20)
        .set_data_page_size_limit(64 << 20)
        .build();
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let values = vec![ByteArray::from(text.to_vec()); times];
    let levels = |first: i16| -> Vec<i16> { (0..times).map(|i| if i == 0 { first } else { 1 }).collect() };
    while let Some(mut column) = group.next_column().unwrap() {
        let (defined, repeated) = (levels(1), levels(0));
        let typed = column.typed::<ByteArrayType>();
        match times {
            1 => typed.write_batch(&values, None, None),
            _ => typed.write_batch(&values, Some(&defined), Some(&repeated)),
        }
        .unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    fs::metadata(path).unwrap().len() as usize
}

/// Two thousand columns are read; what would be large in memory, deep on the stack or without end is not.
#[test]
fn a_parquet_file_that_is_wide_deep_or_made_of_zeros_is_read_in_bounds_or_refused() {
    let _alone = alone();
    let wide = |n: usize| -> String { (0..n).map(|i| format!("required binary c{i} (UTF8);")).collect() };
    let deep = |n: usize| -> String {
        let open: String = (0..n).map(|i| format!("required group g{i} {{ ")).collect();
        format!("{open} required binary x (UTF8); {}", "} ".repeat(n))
    };
    let text = |more: String| format!("required binary text (UTF8); {more}");
    let cases = [
        ("two thousand columns", text(wide(2000)), b"It is good.".to_vec(), Ok(())),
        ("twelve thousand", text(wide(12_000)), b"x".to_vec(), Err("the maximum is 10000")),
        ("groups in groups", text(deep(30)), b"x".to_vec(), Err("nested more than 24 deep")),
        ("a page", text(wide(1)), vec![b'0'; 20 << 20], Err("the maximum is 16 MiB")),
        ("pages beside each other", text(wide(20)), vec![b'0'; 8 << 20], Err("MiB at once")),
    ];
    for (what, columns, value, wanted) in cases {
        let dir = tempfile::tempdir().unwrap();
        let size = parquet(&dir.path().join("sft-x.parquet"), &columns, &value, 1);
        let (result, most) = most_held(|| prepared(dir.path(), "sft-x.parquet"));
        match (&result, wanted) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(said)) => {
                assert!(exit_code(error) == 2 && format!("{error:#}").contains(said), "{what}: {error:#}");
            }
            _ => panic!("{what}: {result:?}"),
        }
        println!("{what}: {:.1} MiB for {size} bytes", most as f64 / f64::from(1 << 20));
        assert!(most <= 2 * size + (64 << 20), "{what}: {} MiB for {size} bytes", most >> 20);
    }
    // As deep as no writer goes: the library would walk it on the stack.
    let dir = tempfile::tempdir().unwrap();
    let group = [0x48, 1, b'x', 0x15, 2, 0]; // name, num_children = 1
    let count = [0xC0, 0x9A, 0x0C]; // 200,000
    let footer = [&[0x15, 2, 0x19, 0xFC][..], &count, &group.repeat(200_000), &[0]].concat();
    let file = [&b"PAR1"[..], &footer, &(footer.len() as u32).to_le_bytes(), b"PAR1"].concat();
    fs::write(dir.path().join("sft-x.parquet"), file).unwrap();
    let error = prepared(dir.path(), "sft-x.parquet").unwrap_err();
    assert!(exit_code(&error) == 2 && format!("{error:#}").contains("200000 columns"), "{error:#}");
}

/// A dictionary holds a text once, and a row can name it any number of times: the process's own allocator sees it.
#[test]
fn a_row_that_repeats_a_text_without_end_ends_with_a_message_and_not_with_the_memory() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("m.gguf"), gguf("llama-bpe", StorageDType::F32, false, "")).unwrap();
    parquet(&dir.path().join("x.parquet"), "repeated binary text (UTF8);", &[b'x'; 1 << 20], 2000);
    fs::write(dir.path().join("run.toml"), "[base]\npath = \"m.gguf\"\n[data]\npath = \"x.parquet\"\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    let ran = command.current_dir(dir.path()).args(["sft", "run.toml", "--out", "out"]).output().unwrap();
    let told = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(2), "{told}");
    assert!(told.contains("error: a row of a Parquet file takes more memory"), "{told}");
    assert!(!dir.path().join("out").exists());
}
