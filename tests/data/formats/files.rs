//! Files of every format -> records, and the messages about bad files and records.

use super::*;

#[test]
fn every_format_is_detected_and_read() {
    let ranked = |prompt, responses: &[Text]| Record::Ranked {
        prompt,
        responses: responses.to_vec(),
        label: Default::default(),
    };
    let user = || turns(&[("user", "q")]);
    let (good, bad) = (turns(&[("assistant", "good")]), turns(&[("assistant", "bad")]));
    let q = json!([{"role": "user", "content": "q"}]);
    let says = |word: &str| json!({"role": "assistant", "content": word});
    let cases = [
        (json!({"text": "a b"}), Record::LanguageModeling(text("a b"))),
        (
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}),
            Record::LanguageModeling(turns(&[("user", "q"), ("assistant", "a")])),
        ),
        (
            json!({"prompt": "q", "completion": " a"}),
            Record::PromptCompletion { prompt: text("q"), completion: text(" a") },
        ),
        (
            json!({"prompt": q, "completion": [says("good")]}),
            Record::PromptCompletion { prompt: user(), completion: good.clone() },
        ),
        (json!({"prompt": "q", "chosen": "good", "rejected": "bad"}), ranked(text("q"), &[text("good"), text("bad")])),
        (
            json!({"prompt": q, "chosen": [says("good")], "rejected": [says("bad")]}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        // A text beside a dialogue becomes a turn of it.
        (
            json!({"prompt": "q", "chosen": [says("good")], "rejected": "bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        // No prompt column: the prompt is the common beginning.
        (
            json!({"chosen": "Sky: blue", "rejected": "Sky: bluish"}),
            ranked(text("Sky:"), &[text(" blue"), text(" bluish")]),
        ),
        (
            json!({"chosen": [q[0], says("good")], "rejected": [q[0], says("bad")]}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                   "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}),
            ranked(turns(&[("system", "s"), ("user", "q")]), &[good.clone(), bad.clone()]),
        ),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}),
            Record::LanguageModeling(turns(&[("system", "s"), ("user", "q"), ("assistant", "a")])),
        ),
        (
            json!({"instruction": "i", "input": "n", "output": "good", "system": "s", "history": [["u", "v"]]}),
            Record::PromptCompletion {
                prompt: turns(&[("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "i\nn")]),
                completion: good.clone(),
            },
        ),
        (
            json!({"instruction": "q", "input": "", "output": "good"}),
            Record::PromptCompletion { prompt: user(), completion: good.clone() },
        ),
        (
            json!({"instruction": "q", "chosen": "good", "rejected": "bad"}),
            ranked(user(), &[good.clone(), bad.clone()]),
        ),
        (json!({"prompt": "q", "responses": ["a", "b", "c"]}), ranked(text("q"), &[text("a"), text("b"), text("c")])),
        (
            json!({"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, -1, 2]}),
            ranked(text("q"), &[text("c"), text("a"), text("b")]),
        ),
        (
            json!({"prompt": "q", "completion": "a", "label": false}),
            Record::Unpaired { prompt: text("q"), completion: text("a"), label: false },
        ),
        (
            json!({"messages": [q[0], says("good")], "label": true}),
            Record::Unpaired { prompt: user(), completion: good.clone(), label: true },
        ),
        (json!({"prompt": "q"}), Record::PromptOnly(text("q"))),
        (json!({"prompt": q}), Record::PromptOnly(user())),
        (json!({"instruction": "q"}), Record::PromptOnly(user())),
    ];
    for (object, expected) in cases {
        assert_eq!(record(object.clone()), expected, "{object}");
    }
}

#[test]
fn arrays_lines_gzip_text_and_folders_give_the_same_records() {
    let array = br#" [ {"text": "one"}, {"text": "two"} ] "#;
    let lines = b"{\"text\": \"one\"}\r\n\n{\"text\": \"two\"}";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(lines).unwrap();
    let gzip = gzip.finish().unwrap();
    let marked = ["\u{FEFF}".as_bytes(), lines].concat();
    let expected = vec![Record::LanguageModeling(text("one")), Record::LanguageModeling(text("two"))];
    let files: [(&str, &[u8]); 7] = [
        ("a.json", array),
        ("b.jsonl", lines),
        ("c.json", lines),
        ("d.jsonl.gz", &gzip),
        ("e.json", &marked),
        ("f.txt", b"one\n\n  \ntwo\n"),
        ("g.JSONL", lines),
    ];
    for (name, content) in files {
        assert_eq!(records(name, content), expected, "{name}");
    }
    let (folder, mut data) = config(&files);
    std::fs::write(folder.path().join("README.md"), "not data").unwrap();
    assert_eq!(data::load(&data).unwrap().entries.len(), 14);
    data.path = Paths::One(folder.path().to_owned());
    let all = data::load(&data).unwrap().entries;
    assert_eq!(all.len(), 14);
    assert!(all[0].place.to_string().ends_with("a.json, record 1"), "{}", all[0].place);
    assert!(all[3].place.to_string().ends_with("b.jsonl, line 3"), "{}", all[3].place);
    data.max_rows = Some(3);
    assert_eq!(data::load(&data).unwrap().entries[..], all[..3]);
}

#[test]
fn errors_about_bad_records_name_file_line_column_and_the_expected_value() {
    let good = json!({"prompt": "q", "chosen": "a", "rejected": "b"});
    for (object, expected) in [
        (
            json!({"prompt": "q", "chosen": 3, "rejected": "b"}),
            "column \"chosen\": expected a string or a list of messages, found a number",
        ),
        (
            json!({"prompt": "q", "rejected": "b"}),
            "column \"chosen\" is missing (expected a string or a list of messages); there are [\"prompt\", \"rejected\"]",
        ),
        (
            json!({"prompt": "q", "chosen": null, "rejected": "b"}),
            "column \"chosen\": expected a string or a list of messages, found null",
        ),
        (json!({"prompt": "q", "chosen": " ", "rejected": "b"}), "column \"chosen\": the response is empty"),
        (json!({"prompt": "q", "chosen": "a", "rejected": "a"}), "the chosen and the rejected response are identical"),
        (json!({"prompt": "", "chosen": "a", "rejected": "b"}), "the prompt is empty"),
        (json!({"prompt": [], "chosen": "a", "rejected": "b"}), "column \"prompt\": the list of messages is empty"),
        (
            json!({"chosen": "a", "rejected": "b"}),
            "column \"prompt\" is missing, and \"chosen\" and \"rejected\" have no common beginning",
        ),
        (json!({"chosen": "a", "rejected": "a"}), "identical"),
        (
            json!({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "a", "rejected": "b"}),
            "must end with a user turn",
        ),
        (
            json!({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}),
            "column \"prompt\": turn 1: expected \"content\" to be a string, found nothing",
        ),
        (
            json!({"prompt": [{"role": "robot", "content": "a"}], "chosen": "a", "rejected": "b"}),
            "turn 1: \"role\" is \"robot\"; expected system",
        ),
        (
            json!({"prompt": ["q"], "chosen": "a", "rejected": "b"}),
            "turn 1: expected an object with \"role\" and \"content\", found a string",
        ),
        (
            json!({"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}),
            "column \"chosen\": the response must begin and end with an assistant turn",
        ),
        (json!(["q", "a", "b"]), "expected a JSON object with columns, found a list"),
    ] {
        let found = fault("x.jsonl", format!("{good}\n{object}\n").as_bytes());
        assert!(
            found.starts_with("x.jsonl, line 2: ") && found.contains(expected),
            "\nfound:    {found}\nexpected: {expected}"
        );
        let found = fault("x.json", json!([good, object]).to_string().as_bytes());
        assert!(found.starts_with("x.json, record 2: ") && found.contains(expected), "{found}");
    }
    for (object, expected) in [
        (json!({"a": 1, "b": 2}), "the columns [\"a\", \"b\"] are of no known format"),
        (json!({"text": ""}), "column \"text\": is empty"),
        (json!({"text": 5}), "column \"text\": expected a string, found a number"),
        (json!({"messages": "hi"}), "column \"messages\": expected a list of messages, found a string"),
        (json!({"messages": [{"role": "user", "content": "q"}], "label": true}), "ends with an assistant turn"),
        (
            json!({"prompt": "q", "completion": "a", "label": 1}),
            "column \"label\": expected true or false, found a number",
        ),
        (json!({"prompt": "q", "responses": ["a"]}), "1 response cannot be compared"),
        (json!({"prompt": "q", "responses": ["a", "b", "a"]}), "responses 1 and 3 of the ranking are identical"),
        (json!({"prompt": "q", "responses": ["a", "b"], "scores": [1]}), "1 score for 2 responses"),
        (json!({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1.0]}), "responses 1 and 2 have the same score"),
        (json!({"instruction": "q", "output": "a", "history": [["u"]]}), "round 1 is not a [user, assistant] pair"),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "system", "value": "s"}]}),
            "a system turn must be the first",
        ),
    ] {
        let found = fault("x.jsonl", object.to_string().as_bytes());
        assert!(
            found.starts_with("x.jsonl, line 1: ") && found.contains(expected),
            "\nfound:    {found}\nexpected: {expected}"
        );
    }
}

#[test]
fn errors_about_bad_files_name_the_file_and_the_fault() {
    let utf8 = fault("x.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n");
    assert_eq!(utf8, "x.jsonl, line 2: is not UTF-8 from byte 11 of the line on");
    assert!(fault("x.json", b"[{\"text\": \"\xff\"}]").contains("is not a JSON array: invalid unicode"));
    assert!(fault("x.txt", b"fine\n\xff\n").starts_with("x.txt, line 2: is not UTF-8"));
    assert!(fault("x.txt", b"\xff\xfea\0").contains("is UTF-16"));
    assert!(
        fault("x.jsonl", b"{\"text\": \"a\"}\n{\"text\": \n")
            .starts_with("x.jsonl, line 2: is not a JSON object on one line: EOF")
    );
    assert!(fault("x.json", b"[{\"text\": \"a\"}").contains("EOF"));
    assert!(fault("x.json", b"[{\"text\": \"a\"}] x").contains("trailing characters"));
    assert!(fault("x.json.gz", b"not gzip").contains("is not gzip"));
    let mut cut = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    cut.write_all(br#"[{"text": "a"}]"#).unwrap();
    let cut = cut.finish().unwrap();
    assert!(fault("x.json.gz", &cut[..cut.len() - 9]).starts_with("x.json.gz: "));
    for (name, content) in [("x.json", ""), ("x.json", " \n"), ("x.json", "[]"), ("x.jsonl", "\n\n"), ("x.txt", "")] {
        assert!(fault(name, content.as_bytes()).contains("holds no record"), "{name} {content:?}");
    }
    assert!(fault("x.xlsx", b"PK").contains("the name must end in .json"));
    let (folder, mut data) = config(&[]);
    data.path = Paths::One(folder.path().to_owned());
    assert!(data::load(&data).unwrap_err().to_string().contains("has no file that ends in"));
    data.path = Paths::One(PathBuf::from("/nowhere/x.json"));
    assert!(data::load(&data).unwrap_err().to_string().contains("/nowhere/x.json: No such file"));
}

#[test]
fn a_dialogue_that_starts_with_the_assistant_has_a_reason_of_its_own() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let pair = json!({"chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]});
    let label = json!({"messages": [turn("system", "s"), turn("assistant", "a")], "label": true});
    let alone = json!({"conversations": [{"from": "gpt", "value": "a"}], "label": true});
    for record in [pair, label, alone] {
        let said = fault("x.jsonl", record.to_string().as_bytes());
        assert!(said.contains("starts with an assistant turn"), "{said}");
    }
}

#[test]
fn skip_drops_bad_records_and_counts_them() {
    let lines = b"{\"text\": \"a\"}\n{\"text\": 1}\n\xff\nnonsense\n{\"text\": \"b\"}\n";
    let (_folder, mut data) = config(&[("x.jsonl", lines)]);
    data.on_bad_record = OnBadRecord::Skip;
    let found = data::load(&data).unwrap();
    assert_eq!((found.entries.len(), found.skipped), (2, 3));
    assert!(found.first_skipped.unwrap().contains("x.jsonl, line 2: column \"text\""));
    let (_folder, mut data) = config(&[("x.jsonl", b"{\"text\": 1}\n")]);
    data.on_bad_record = OnBadRecord::Skip;
    assert!(data::load(&data).unwrap_err().to_string().contains("[data] path: its one record cannot be used: "));
}

#[test]
fn the_format_key_takes_precedence_over_detection() {
    let (_folder, mut data) = config(&[("x.jsonl", br#"{"prompt": "q", "chosen": "a", "rejected": "b"}"#)]);
    data.format = Format::PromptOnly;
    assert_eq!(data::load(&data).unwrap().entries[0].record, Record::PromptOnly(text("q")));
    data.format = Format::Alpaca;
    let found = data::load(&data).unwrap_err().to_string();
    assert!(found.contains("column \"instruction\" is missing"), "{found}");
}

#[test]
fn a_named_format_over_records_of_another_is_refused_with_both_names() {
    let shapes = [
        ("language_modeling", json!({"text": "t"})),
        (
            "language_modeling",
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ),
        ("prompt_completion", json!({"prompt": "q", "completion": "a"})),
        ("prompt_completion", json!({"prompt": "q", "response": "a"})),
        ("preference", json!({"prompt": "q", "chosen": "a", "rejected": "b"})),
        ("ranked", json!({"prompt": "q", "responses": ["a", "b"]})),
        ("unpaired", json!({"prompt": "q", "completion": "a", "label": true})),
        ("prompt_only", json!({"prompt": "q"})),
        ("alpaca", json!({"instruction": "q", "output": "a"})),
        ("sharegpt", json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})),
    ];
    let named = |name: &str| serde_json::from_value::<Format>(json!(name)).unwrap();
    let names = shapes.iter().map(|(name, _)| *name).chain(["hh_rlhf"]);
    let mut refused = 0;
    for name in names.collect::<std::collections::BTreeSet<_>>() {
        for (own, object) in &shapes {
            let (_folder, mut data) = config(&[("x.jsonl", object.to_string().as_bytes())]);
            data.format = named(name);
            let place = format!("{object} as {name}");
            match data::load(&data) {
                Ok(_) if name == *own => {}
                // What the format does not read of a record that has all of its columns is said.
                Ok(found) => {
                    let said = &found.entries[0].remarks;
                    assert!(said.iter().any(|remark| remark.contains("that is not read")), "{place}: {said:?}");
                }
                Err(error) => {
                    let found = format!("{error:#}");
                    assert!(name != *own && exit_code(&error) == 2, "{place}: {found}");
                    if found.contains("is missing") || name == "hh_rlhf" {
                        let both = format!("columns of the format \"{own}\", and format = \"{name}\"");
                        assert!(found.contains(&both), "{place}: {found}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 60, "{refused}");
    let (_folder, mut data) = config(&[("x.jsonl", br#"{"prompt": "q", "input": "i", "output": "a"}"#)]);
    data.format = Format::Alpaca;
    assert!(data::load(&data).is_ok(), "an instruction may be called prompt");
}

#[test]
fn a_damaged_file_is_read_or_refused_without_a_panic() {
    let good = json!([
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " né", "rejected": " bad"},
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"], "scores": [1, 2.5]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        {"instruction": "i", "input": null, "output": "o", "history": [["u", "v"]]},
    ]);
    let mut rng = fourfold::rng::SplitMix64::new(1);
    let mut refused = 0;
    for record in good.as_array().unwrap() {
        for name in ["x.json", "x.jsonl.gz", "x.txt"] {
            for _ in 0..100 {
                let mut bytes = json!([record]).to_string().into_bytes();
                bytes.truncate(1 + rng.below(2 * bytes.len()));
                for _ in 0..1 + rng.below(4) {
                    let at = rng.below(bytes.len());
                    bytes[at] = rng.below(256) as u8;
                }
                if name.ends_with(".gz") {
                    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                    gzip.write_all(&bytes).unwrap();
                    bytes = gzip.finish().unwrap();
                }
                match load(name, &bytes) {
                    Ok(set) => drop(ranked_examples(&set.entries, &CHAT, &Data::default())),
                    Err(error) => {
                        assert_eq!(exit_code(&error), 2, "{error:#}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 300, "{refused} of 1200 damaged files were refused");
}

#[test]
fn files_shaped_like_the_demo_data_load_for_every_objective_they_fit() {
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let pairs = json!([
        {"conversations": [turn("human", "q")], "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")},
        {"conversations": [turn("human", "問"), turn("gpt", "答"), turn("human", "又")],
         "chosen": turn("gpt", "好"), "rejected": turn("gpt", "坏")},
    ]);
    let alpaca = json!([
        {"instruction": "i", "input": "", "output": "o"}, {"instruction": "i", "input": "n", "output": "o"},
        {"instruction": "问", "input": "", "output": "答"},
    ]);
    let unpaired = json!([
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": true},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], "label": false},
        {"messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "c"}], "label": true},
    ]);
    let wiki = " = Heading = \n \n A line of text . \n Another . \n";
    // (records, SFT examples, rankings, prompts); None = the records do not fit that objective.
    for (name, content, expected) in [
        ("pairs.json", pairs.to_string(), (2, Some(2), Some(2), Some(2))),
        ("alpaca.json", alpaca.to_string(), (3, Some(3), None, Some(3))),
        ("unpaired.json", unpaired.to_string(), (3, Some(2), None, Some(3))),
        ("wiki.txt", wiki.to_owned(), (3, Some(3), None, None)),
    ] {
        let entries = load(name, content.as_bytes()).unwrap().entries;
        let data = Data::default();
        let sft = sft_examples(&entries, &CHAT, &data, true).ok().map(|found| found.0.len());
        let ranked = ranked_examples(&entries, &CHAT, &data).ok().map(|found| found.0.len());
        let prompts = prompt_examples(&entries, &CHAT, &data).ok().map(|found| found.0.len());
        assert_eq!((entries.len(), sft, ranked, prompts), expected, "{name}");
    }
}
