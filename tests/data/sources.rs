//! Tables, patterns, folders, several sources, named columns and DeepSpeed-Chat's public data sets give the expected
//! records; errors about damaged tables name the file, and nothing panics.

use std::io::Write;
use std::path::{Path, PathBuf};

use fourfold::config;
use fourfold::config::{Compat, Data, MixStrategy, OnBadRecord, Paths, Preset, Source};
use fourfold::data;
use fourfold::data::{Message, Record, Text};
use fourfold::error::exit_code;
use serde_json::{Value, json};

mod public_sets;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet").join(name)
}

fn text(text: &str) -> Text {
    Text::Verbatim(text.to_owned())
}

fn turns(turns: &[(&str, &str)]) -> Text {
    Text::Dialogue(turns.iter().map(|(role, content)| Message::new(*role, *content)).collect())
}

fn at(path: impl Into<PathBuf>) -> Data {
    Data { path: Paths::One(path.into()), ..Data::default() }
}

fn records(data: &Data) -> Vec<Record> {
    data::load(data).unwrap().entries.into_iter().map(|entry| entry.record).collect()
}

/// The texts of records that hold one text each, joined by spaces.
fn texts(data: &Data) -> String {
    let one = |record| match record {
        Record::LanguageModeling(Text::Verbatim(text)) => text,
        other => panic!("{other:?}"),
    };
    records(data).into_iter().map(one).collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn fault(data: &Data) -> String {
    let error = data::load(data).expect_err("a fault");
    assert_eq!(exit_code(&error), 2, "{error:#}");
    format!("{error:#}")
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for (name, content) in files {
            let path = folder.path(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn parquet_of_every_compression_gives_rows_with_nested_messages() {
    let expected: Vec<Record> = (0..5)
        .map(|i| Record::Ranked {
            prompt: turns(&[("user", &format!("q{i} é"))]),
            responses: vec![
                turns(&[("assistant", &format!("good {i}"))]),
                turns(&[("assistant", &format!("bad {i}"))]),
            ],
            label: Default::default(),
        })
        .collect();
    for codec in ["snappy", "zstd", "gzip", "lz4", "brotli", "none"] {
        assert_eq!(records(&at(golden(&format!("messages-{codec}.parquet")))), expected, "{codec}");
    }
    let ranked = records(&at(golden("ranked.parquet")));
    assert_eq!(
        ranked[0],
        Record::Ranked { prompt: text("first"), responses: vec![text("b"), text("a")], label: Default::default() }
    );
    assert_eq!(
        ranked[1],
        Record::Ranked {
            prompt: text("second"),
            responses: vec![text("c"), text("e"), text("d")],
            label: Default::default()
        }
    );
}

#[test]
fn parquet_faults_name_the_row_and_the_column() {
    let found = fault(&at(golden("holes.parquet")));
    assert!(found.contains("holes.parquet, record 2: column \"output\": expected a string"), "{found}");
    let mut data = at(golden("bytes.parquet"));
    let found = fault(&data);
    assert!(found.contains("bytes.parquet, record 2: column \"text\": expected a string, found null"), "{found}");
    assert!(found.contains("column \"text\" holds bytes that are not UTF-8"), "{found}");
    data.on_bad_record = OnBadRecord::Skip;
    let set = data::load(&data).unwrap();
    assert_eq!((set.entries.len(), set.skipped), (1, 1));

    let whole = std::fs::read(golden("messages-snappy.parquet")).unwrap();
    let (cut, empty) = (&whole[..whole.len() - 100], b"PAR1PAR1");
    let folder = Folder::new(&[("cut.parquet", cut), ("none.parquet", b""), ("tiny.parquet", empty)]);
    for name in ["cut.parquet", "none.parquet", "tiny.parquet"] {
        let found = fault(&at(folder.path(name)));
        assert!(found.contains(name) && found.contains("is not a readable Parquet file"), "{found}");
    }
}

/// Images, embeddings with NaN and the like beside the text.
#[test]
fn columns_that_nobody_reads_may_hold_bytes_and_nan() {
    assert_eq!(texts(&at(golden("unread.parquet"))), "one two");
    let folder = Folder::new(&[
        ("x.jsonl", &b"{\"text\": \"NaN\", \"x\": NaN}\n{\"text\": \"b\", \"x\": [1, -Infinity]}\n"[..]),
        ("x.json", b"[{\"text\": \"NaN\", \"x\": NaN},\n {\"text\": \"b\", \"x\": [{\"y\": Infinity}]}]"),
        ("x.csv", b"text,x\nNaN,\"[1, NaN]\"\nb,NaN\n"),
    ]);
    for name in ["x.jsonl", "x.json", "x.csv"] {
        assert_eq!(texts(&at(folder.path(name))), "NaN b", "{name}");
    }
    let rows = br#"{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}
{"prompt": "a", "responses": ["b", "c"], "scores": [1, NaN]}"#;
    let array = [b"[", &rows.to_vec()[..], b"]"].concat();
    let array = String::from_utf8(array).unwrap().replace("}\n{", "},\n{");
    let label = br#"{"prompt": "a", "completion": "b", "label": NaN}"#;
    let folder = Folder::new(&[("x.jsonl", &rows[..]), ("x.json", array.as_bytes()), ("l.jsonl", label)]);
    for (name, place) in
        [("x.jsonl", "x.jsonl, line 2"), ("x.json", "x.json, record 2"), ("l.jsonl", "l.jsonl, line 1")]
    {
        let found = fault(&at(folder.path(name)));
        assert!(found.contains(place) && found.contains(" holds NaN, which is read as null"), "{found}");
    }
}

/// The library datasets writes `dataset_infos.json` and the like beside the records.
#[test]
fn files_that_describe_a_data_set_are_no_records_unless_they_are_named() {
    let line = json!({"text": "a"}).to_string().into_bytes();
    let about = br#"{"default": {"description": "none"}}"#;
    let folder = Folder::new(&[
        ("data/train.jsonl", &line),
        ("dataset_infos.json", about),
        ("data/dataset_dict.json", about),
        ("data/state.json", about),
        ("README.txt", b"Read me."),
        ("LICENSE.txt", b"Do as you like."),
    ]);
    let set = data::load(&at(folder.0.path())).unwrap();
    assert_eq!((set.entries.len(), set.ignored.len()), (1, 5));
    let pattern = at(folder.path("data/*"));
    assert_eq!(texts(&pattern), "a");
    assert!(fault(&at(folder.path("dataset_infos.json"))).contains("no known format"));
}

#[test]
fn a_damaged_parquet_file_is_read_or_refused_without_a_panic() {
    let mut rng = fourfold::rng::SplitMix64::new(2);
    let folder = Folder::new(&[]);
    let path = folder.path("x.parquet");
    let mut refused = 0;
    for name in ["messages-snappy.parquet", "messages-zstd.parquet", "messages-gzip.parquet", "ranked.parquet"] {
        let whole = std::fs::read(golden(name)).unwrap();
        for _ in 0..250 {
            let mut bytes = whole.clone();
            for _ in 0..1 + rng.below(4) {
                let place = rng.below(bytes.len());
                bytes[place] = rng.below(256) as u8;
            }
            if rng.below(8) == 0 {
                bytes.truncate(rng.below(whole.len()));
            }
            std::fs::write(&path, &bytes).unwrap();
            let mut data = at(&path);
            data.on_bad_record = OnBadRecord::Skip;
            data.max_rows = Some(100);
            if let Err(error) = data::load(&data) {
                assert_eq!(exit_code(&error), 2, "{error:#}");
                refused += 1;
            }
        }
    }
    assert!(refused > 200, "{refused} of 1000 damaged files were refused");
}

#[test]
fn comma_and_tab_separated_tables_are_read() {
    let csv = "prompt,chosen,rejected,extra\n\"a, \"\"b\"\"\nc\",good,bad,\nq,\"[{\"\"role\"\": \"\"assistant\"\", \
               \"\"content\"\": \"\"good\"\"}]\",bad,1\n";
    let tsv = "prompt\tcompletion\tlabel\nq\tTrue\tTrue\nr\t[1] is cited\tfalse\n";
    let folder =
        Folder::new(&[("a.csv", csv.as_bytes()), ("b.tsv", tsv.as_bytes()), ("c.csv.gz", &gzip(csv.as_bytes()))]);
    let expected = [
        Record::Ranked {
            prompt: text("a, \"b\"\nc"),
            responses: vec![text("good"), text("bad")],
            label: Default::default(),
        },
        Record::Ranked {
            prompt: turns(&[("user", "q")]),
            responses: vec![turns(&[("assistant", "good")]), turns(&[("assistant", "bad")])],
            label: Default::default(),
        },
    ];
    assert_eq!(records(&at(folder.path("a.csv"))), expected);
    assert_eq!(records(&at(folder.path("c.csv.gz"))), expected);
    let unpaired = [
        Record::Unpaired { prompt: text("q"), completion: text("True"), label: true },
        Record::Unpaired { prompt: text("r"), completion: text("[1] is cited"), label: false },
    ];
    assert_eq!(records(&at(folder.path("b.tsv"))), unpaired);
}

#[test]
fn a_damaged_table_is_read_or_refused_without_a_panic() {
    let mut rng = fourfold::rng::SplitMix64::new(5);
    let folder = Folder::new(&[]);
    let path = folder.path("x.csv");
    let row = |i: usize| format!("question {i}?,\"good, {i}\",\"[\"\"bad\"\",\n{i}]\"\n");
    let whole: Vec<u8> = format!("prompt,chosen,rejected\n{}", (0..20).map(row).collect::<String>()).into();
    let mut refused = 0;
    for _ in 0..1000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.below(6) {
            let place = rng.below(bytes.len());
            bytes[place] = *b"\",\n\r\0\xff[{\\".get(rng.below(12)).unwrap_or(&(rng.below(256) as u8));
        }
        if rng.below(8) == 0 {
            bytes.truncate(rng.below(whole.len()));
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Err(error) = data::load(&at(&path)) {
            assert_eq!(exit_code(&error), 2, "{error:#}");
            refused += 1;
        }
    }
    assert!((200..1000).contains(&refused), "{refused} of 1000 damaged files were refused");
}

#[test]
fn errors_about_a_table_name_the_line_and_the_column() {
    for (name, content, expected) in [
        ("x.csv", &b"text\none\ntwo,three\n"[..], "x.csv, line 3: has 2 cells, but the first row names 1 columns"),
        ("x.csv", b"text,b\none,1\n\xff,2\n", "x.csv, line 3: column \"text\": is not UTF-8"),
        ("x.csv", b"prompt,completion\nq,\n", "x.csv, line 2: column \"completion\": expected a string"),
        ("x.csv", b"text,text\na,b\n", "x.csv, line 1: two columns are called \"text\""),
        ("x.csv", b"text\n", "x.csv: holds no record"),
        ("x.csv", b"", "x.csv: holds no record"),
        ("x.tsv", b"text\n\"a\nb\"\nc\td\n", "x.tsv, line 4: has 2 cells"),
        ("x.csv", b"\xff\xfet\0", "x.csv: is UTF-16"),
        // Blank lines count, as in an editor, with either line break; so do lines inside a quoted cell.
        ("x.csv", b"\n\ntext\n\none\n\n\ntwo,three\n", "x.csv, line 8: has 2 cells"),
        ("x.csv", b"text\r\n\r\none\r\n\r\n\r\ntwo,three\r\n", "x.csv, line 6: has 2 cells"),
        ("x.csv", b"text\n\"a\n\n\nb\"\n\n\"c\n\",d\n", "x.csv, line 7: has 2 cells"),
        ("x.csv", b"text\n\none,two", "x.csv, line 3: has 2 cells"),
        ("x.csv", b"\n\ntext,text\na,b\n", "x.csv, line 3: two columns are called \"text\""),
    ] {
        let folder = Folder::new(&[(name, content)]);
        let found = fault(&at(folder.path(name)));
        assert!(found.contains(expected), "\nfound:    {found}\nexpected: {expected}");
    }
    // Lines are found beyond the table's buffer too.
    let many = format!("text\n{}x,y\n", "a\n\n".repeat(50_000));
    let quoted = format!("text\n\"{}\"\n\nx,y\n", "a\n".repeat(50_000));
    let folder = Folder::new(&[("many.csv", many.as_bytes()), ("quoted.csv", quoted.as_bytes())]);
    assert!(fault(&at(folder.path("many.csv"))).contains("many.csv, line 100002: has 2 cells"));
    assert!(fault(&at(folder.path("quoted.csv"))).contains("quoted.csv, line 50004: has 2 cells"));
    let folder = Folder::new(&[("x.csv", b"text\na\nb,c\nd\n")]);
    let data = Data { on_bad_record: OnBadRecord::Skip, ..at(folder.path("x.csv")) };
    let set = data::load(&data).unwrap();
    assert_eq!((set.entries.len(), set.skipped), (2, 1));
}

#[test]
fn a_record_of_ten_megabytes_is_read_from_every_container() {
    let long = "word ".repeat(2 << 20);
    let line = json!({"text": long}).to_string();
    let csv = format!("text\n\"{long}\"\n");
    let folder = Folder::new(&[
        ("a.jsonl", line.as_bytes()),
        ("b.json", format!("[{line}]").as_bytes()),
        ("c.csv", csv.as_bytes()),
        ("d.jsonl.gz", &gzip(line.as_bytes())),
        ("e.txt", long.as_bytes()),
    ]);
    for name in ["a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.txt"] {
        assert_eq!(texts(&at(folder.path(name))).trim_end().len(), long.len() - 1, "{name}");
    }
    // Beyond the limit: an unclosed quote.
    let open = format!("text\n\"{}", "x".repeat(65 << 20));
    let folder = Folder::new(&[("open.csv", open.as_bytes())]);
    assert!(fault(&at(folder.path("open.csv"))).contains("is a quote not closed?"));
}

#[test]
fn folders_and_patterns_are_read_in_name_order_and_list_ignored_files() {
    let line = |text: &str| json!({"text": text}).to_string().into_bytes();
    let folder = Folder::new(&[
        ("b.jsonl", &line("b")),
        ("a/train-00001.jsonl", &line("a1")),
        ("a/train-00000.jsonl", &line("a0")),
        ("a/test-00000.jsonl", &line("at")),
        ("README.md", b"not data"),
        (".hidden/x.jsonl", b"nonsense"),
        ("_SUCCESS.json", b"nonsense"),
    ]);
    let mut data = at(folder.0.path());
    assert_eq!(texts(&data), "at a0 a1 b");
    let ignored = data::load(&data).unwrap().ignored;
    assert_eq!(ignored, [folder.path("README.md"), folder.path("_SUCCESS.json")]);
    data.split = Some("train".to_owned());
    assert_eq!(texts(&data), "a0 a1");
    data.split = Some("validation".to_owned());
    assert!(fault(&data).contains("no file of split \"validation\""));
    // A preset names its training split; a folder without that split is read as a whole.
    let pair = |text: &str| json!({"prompt": text, "chosen": "c", "rejected": "r"}).to_string().into_bytes();
    let set = Folder::new(&[("data/test.jsonl", &pair("eval")), ("data/train.jsonl", &pair("learnt"))]);
    let rm_static = |path: PathBuf| Data { preset: Some(Preset::RmStatic), ..at(path) };
    assert!(matches!(&records(&rm_static(set.path("data")))[..], [only] if format!("{only:?}").contains("learnt")));
    std::fs::rename(set.path("data/train.jsonl"), set.path("data/all.jsonl")).unwrap();
    assert_eq!(records(&rm_static(set.path("data"))).len(), 2);
    assert_eq!(texts(&at(folder.path("a/t*-0000[01].jsonl"))), "at a0 a1");
    assert_eq!(texts(&at(folder.path("*"))), "b");
    assert!(fault(&at(folder.path("*.md"))).contains("no file of that pattern"));
    if cfg!(not(feature = "hub")) {
        assert!(fault(&at("someone/some-set")).contains("--features hub"));
    }
}

fn source(path: PathBuf, weight: Option<f64>) -> Source {
    Source { path: Paths::One(path), weight, ..Source::default() }
}

#[test]
fn sources_are_interleaved_by_weight_and_equal_for_the_same_seed() {
    let lines = |letter: &str, n: usize| {
        (0..n).map(|i| json!({"text": format!("{letter}{i}")}).to_string() + "\n").collect::<String>().into_bytes()
    };
    let folder = Folder::new(&[("a.jsonl", &lines("a", 400)), ("b.jsonl", &lines("b", 20))]);
    let (a, b) = (folder.path("a.jsonl"), folder.path("b.jsonl"));
    let mut data = Data { sources: vec![source(a, None), source(b, None)], ..Data::default() };
    let all = texts(&data);
    assert!(all.starts_with("a0 a1 ") && all.ends_with("b18 b19"), "one after the other without weights");

    data.sources[0].weight = Some(3.0);
    let count = |all: &str, letter: char| all.split(' ').filter(|word| word.starts_with(letter)).count();
    let under = texts(&data);
    assert_eq!(under, texts(&data));
    // 3 to 1 until the 20 records of b are drawn: 60 of a, within three standard deviations of 15.
    let (of_a, of_b) = (count(&under, 'a'), count(&under, 'b'));
    assert!(of_b == 20 && (30..=110).contains(&of_a), "{of_a} {of_b}");
    let in_order: Vec<String> = under.split(' ').filter(|word| word.starts_with('a')).map(str::to_owned).collect();
    assert_eq!(
        in_order,
        (0..of_a).map(|i| format!("a{i}")).collect::<Vec<_>>(),
        "each record once, in the file's order"
    );
    data.seed = 1;
    assert_ne!(under, texts(&data));

    data.mix_strategy = Some(MixStrategy::InterleaveOver);
    let over = texts(&data);
    let (of_a, of_b) = (count(&over, 'a'), count(&over, 'b'));
    assert!(of_a == 400 && (90..=180).contains(&of_b), "{of_a} {of_b}");
    assert_eq!(over.matches(" b7 ").count(), of_b / 20 + usize::from(of_b % 20 > 7));

    data.sources[0].max_rows = Some(5);
    data.mix_strategy = Some(MixStrategy::Concat);
    assert_eq!(count(&texts(&data), 'a'), 5);
    data.max_rows = Some(7);
    assert_eq!(texts(&data), "a0 a1 a2 a3 a4 b0 b1");

    // An error of one source ends the stream, and no reader is left waiting.
    std::fs::write(folder.path("b.jsonl"), "{\"text\": \"b\"}\nnonsense\n").unwrap();
    (data.max_rows, data.mix_strategy) = (None, Some(MixStrategy::InterleaveUnder));
    assert!(fault(&data).contains("b.jsonl, line 2: "));
    std::fs::write(folder.path("b.jsonl"), "").unwrap();
    assert!(fault(&data).contains("b.jsonl: holds no record"));
}

#[test]
fn sources_columns_and_tags_are_read_from_the_config_file() {
    let folder = Folder::new(&[
        ("chat.jsonl", br#"{"dialog": [{"who": "Q", "says": "hi"}, {"who": "A", "says": "yes"}], "persona": "s"}"#),
        ("qa.csv", b"question,context,best,worst\nq,c,good,bad\n"),
        ("run.toml", b""),
    ]);
    let toml = format!(
        r#"
        seed = 7
        [base]
        path = "base"
        [data]
        mix_strategy = "concat"
        [[data.sources]]
        path = "{}"
        weight = 0.5
        columns = {{ messages = "dialog", system = "persona" }}
        tags = {{ role_tag = "who", content_tag = "says", user_tag = "Q", assistant_tag = "A" }}
        [[data.sources]]
        path = "{}"
        columns = {{ prompt = "question", query = "context", chosen = "best", rejected = "worst" }}
        "#,
        folder.path("chat.jsonl").display(),
        folder.path("qa.csv").display()
    );
    let load = |toml: &str| {
        std::fs::write(folder.path("run.toml"), toml).unwrap();
        config::load(&folder.path("run.toml"), &[])
    };
    let loaded = load(&toml).unwrap();
    let data = loaded.data().unwrap();
    assert_eq!(data.seed, 7);
    let expected = [
        Record::LanguageModeling(turns(&[("system", "s"), ("user", "hi"), ("assistant", "yes")])),
        Record::Ranked {
            prompt: turns(&[("user", "q\nc")]),
            responses: vec![turns(&[("assistant", "good")]), turns(&[("assistant", "bad")])],
            label: Default::default(),
        },
    ];
    assert_eq!(records(data), expected);
    assert_eq!(load(&loaded.to_toml().unwrap()).unwrap(), loaded);
    for (wrong, right, message) in [
        ("weight = 0.5", "weight = 0.0", "[[data.sources]] number 1 weight = 0 is out of range"),
        ("messages =", "message =", "did you mean \"messages\"?"),
        ("role_tag", "roletag", "did you mean \"role_tag\"?"),
        ("mix_strategy = \"concat\"", "path = \"x.json\"", "has both path and sources"),
        ("weight = 0.5", "preset = \"openai/webgpt\"", "did you mean \"openai/webgpt_comparisons\"?"),
        ("weight = 0.5", "preset = \"stanfordnlp/SHP\"", "has both a preset and columns"),
        ("weight = 0.5", "max_rows = 0", "number 1 max_rows = 0 reads nothing"),
    ] {
        let error = format!("{:#}", load(&toml.replace(wrong, right)).expect_err(right));
        assert!(error.contains(message), "\nfound:    {error}\nexpected: {message}");
    }
    let mut data = data.clone();
    data.sources[1].columns.as_mut().unwrap().chosen = Some("top".to_owned());
    let found = fault(&data);
    assert!(
        found.contains("qa.csv, line 2: column \"top\" ([data.columns] chosen) is missing; there are [\"question\""),
        "{found}"
    );
}
