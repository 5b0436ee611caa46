//! What a turn and a record hold beside roles and texts: tool calls, tools, weights, and other keys reach the chat template as
//! in transformers, or are counted.

use super::*;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../golden/jinja.json")).unwrap()
}

/// The text of a golden render.
fn rendered<'g>(golden: &'g Value, template: &str, dialogue: &str, arguments: &str) -> &'g str {
    let is = |case: &&Value| {
        case["template"] == template
            && case["dialogue"] == dialogue
            && case["arguments"] == arguments
            && case["add"] == false
    };
    golden["dialogues"].as_array().unwrap().iter().find(is).unwrap()["text"].as_str().unwrap()
}

/// `[data]` with the chat template of this name.
fn with_template(golden: &Value, name: &str) -> Data {
    let template = golden["templates"][name].as_str().unwrap().to_owned();
    Data { chat_template: Some(template), max_length: 10_000, ..Data::default() }
}

#[test]
fn tool_calls_and_tools_are_in_the_text_and_the_call_is_learnt_golden() {
    let golden = golden();
    let messages = |name: &str| &golden["inputs"][name];
    let tools = &golden["arguments"]["tools"]["tools"];
    for (template, dialogue, call) in [
        ("qwen2.5", "call", "Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\""),
        ("qwen2.5", "null content", "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\""),
        ("qwen3", "no content", "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}"),
        ("llama3.1", "null content", "{\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\""),
        ("nemotron", "empty content", "<function=weather>\n<parameter=city>\nRome\n</parameter>"),
    ] {
        // As TRL, and LLaMA-Factory with the tools as JSON in a string.
        for tools in [tools.clone(), json!(tools.to_string())] {
            let records = dataset(json!([{"messages": messages(dialogue), "tools": tools}]));
            let data = with_template(&golden, template);
            let (examples, report) = sft_examples(&records.entries, &CHAT, &data, true).unwrap();
            let text = decode(&examples[0].tokens);
            // The test's encoder has no text that begins a sequence.
            let want = rendered(&golden, template, dialogue, "tools").trim_end().trim_start_matches("<s>");
            assert_eq!(text.replace("<e>", ""), want, "{template}, {dialogue}");
            let learnt = trained_text(&examples[0]);
            assert!(learnt.contains(call), "{template}, {dialogue}: {learnt}");
            assert!(!learnt.contains("Weather in Rome"), "{learnt}");
            // The golden file's template in the manner of Qwen3 writes no tools.
            assert_eq!(report.to_string().contains("\"tools\""), template == "qwen3", "{report}");
        }
    }
    // The prompt of PPO and of a comparison has the tools too.
    let asked =
        json!({"prompt": [messages("call")[0]], "chosen": [messages("call")[1]], "rejected": "no", "tools": tools});
    let data = with_template(&golden, "qwen2.5");
    let (ranked, _) = ranked_examples(&dataset(json!([asked])).entries, &CHAT, &data).unwrap();
    assert!(decode(&ranked[0].prompt).contains("Weather of a city — now"), "{}", decode(&ranked[0].prompt));
    assert!(decode(&ranked[0].responses[0]).contains("<tool_call>"));
}

#[test]
fn a_response_of_several_turns_keeps_its_call_its_result_and_its_end_tokens() {
    let call =
        json!({"role": "assistant", "content": "look", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]});
    let done = json!({"role": "assistant", "content": "done"});
    let row = json!({"prompt": [{"role": "user", "content": "q"}], "rejected": "no",
                     "chosen": [call, {"role": "tool", "content": ""}, done]});
    let (ranked, report) = ranked_examples(&dataset(json!([row])).entries, &CHAT, &Data::default()).unwrap();
    assert_eq!(decode(&ranked[0].responses[0]), "look<e>\n[tool]<e>\n[assistant]done<e>");
    assert_eq!(report.remarks.values().sum::<usize>(), 1, "the test's template does not write the call: {report}");
    assert!(report.to_string().contains("1 with a turn's \"tool_calls\" that the template does not read"), "{report}");
}

#[test]
fn a_turn_of_weight_0_is_in_the_text_and_not_learnt() {
    let turn = |content: &str, weight: Value| json!({"role": "assistant", "content": content, "weight": weight});
    let user = json!({"role": "user", "content": "q"});
    for (weights, learnt) in [
        ([json!(0), json!(1)], "good<e>"),
        ([json!(false), Value::Null], "good<e>"),
        ([json!(1.0), json!(0)], "bad<e>"),
    ] {
        let [first, second] = weights;
        let row = json!([{"messages": [user, turn("bad", first), user, turn("good", second)]}]);
        let (examples, report) = sft_examples(&dataset(row.clone()).entries, &CHAT, &Data::default(), true).unwrap();
        assert_eq!(trained_text(&examples[0]), learnt);
        assert!(decode(&examples[0].tokens).contains("[assistant]bad<e>\n") || learnt == "bad<e>");
        assert_eq!(report.remarks.len(), 0, "{report}");
        // With a loss on every token, all but that turn's.
        let (examples, _) = sft_examples(&dataset(row).entries, &CHAT, &Data::default(), false).unwrap();
        let everything = trained_text(&examples[0]);
        assert_eq!(
            (everything.contains("bad"), everything.contains("good")),
            (learnt == "bad<e>", learnt == "good<e>")
        );
        assert!(everything.contains("user]q<e>"));
    }
    let row = json!([{"messages": [user, turn("bad", json!(0))]}, {"messages": [user, turn("good", json!(1))]}]);
    let (examples, report) = sft_examples(&dataset(row).entries, &CHAT, &Data::default(), true).unwrap();
    assert_eq!(
        (examples.len(), report.to_string().as_str()),
        (1, "2 records, 1 sequence; 1 dropped: 1 whose assistant turns all have the weight 0")
    );
    let half = load("x.json", json!([{"messages": [user, turn("x", json!(0.5))]}]).to_string().as_bytes());
    let error = half.unwrap_err();
    assert!(error.to_string().contains("\"weight\" is 0.5; expected 0"), "{error}");
    assert_eq!(exit_code(&error), 2);
}

#[test]
fn reasoning_documents_and_template_arguments_reach_the_template_golden() {
    let golden = golden();
    let messages = |name: &str| &golden["inputs"][name];
    let of = |template: &str, row: Value| {
        let data = with_template(&golden, template);
        let (examples, report) = sft_examples(&dataset(json!([row])).entries, &CHAT, &data, true).unwrap();
        (decode(&examples[0].tokens).replace("<e>", ""), report.to_string())
    };
    let (text, report) = of("nemotron", json!({"messages": messages("reasoning")}));
    assert_eq!(text, rendered(&golden, "nemotron", "reasoning", "").trim_end());
    assert!(text.contains("<think>\nTwo and two.\n</think>\n4") && !report.contains("read"), "{report}");
    let documents = &golden["arguments"]["documents"]["documents"];
    let (text, _) = of("command-r", json!({"messages": messages("plain"), "documents": documents}));
    assert!(text.contains("Document: 0\ntitle: Rome\ntext: A city."), "{text}");
    let kwargs = json!({"custom_instructions": "Short!", "enable_thinking": false});
    let (text, report) = of("command-r", json!({"messages": messages("plain"), "chat_template_kwargs": kwargs}));
    assert!(text.contains("You are a model.Short!"), "{text}");
    assert!(report.ends_with("; 1 with the record's \"enable_thinking\" that the template does not read"), "{report}");
    // With enable_thinking = false the generation prompt of PPO closes the thoughts.
    let row = json!([{"prompt": [messages("plain")[0]], "chat_template_kwargs": {"enable_thinking": false}}]);
    let (prompts, _) = prompt_examples(&dataset(row).entries, &CHAT, &with_template(&golden, "qwen3")).unwrap();
    assert!(prompts[0].text.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "{}", prompts[0].text);
}

#[test]
fn what_nothing_reads_is_counted_and_said_once() {
    let row = |id: usize| {
        json!({"messages": [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}],
               "id": id, "empty": null, "tools": [{"name": "f"}]})
    };
    let (_, report) = sft_examples(&dataset(json!([row(1), row(2)])).entries, &CHAT, &Data::default(), true).unwrap();
    assert_eq!(
        report.to_string(),
        "2 records, 2 sequences; 2 with a column \"id\" that is not read; 2 with a turn's \"name\" that the template does not \
         read; 2 with the record's \"tools\" that the template does not read"
    );
    // A text has no turns for the tools to stand in.
    let texts = dataset(json!([{"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}]));
    let (_, report) = sft_examples(&texts.entries, &CHAT, &Data::default(), true).unwrap();
    assert!(report.to_string().ends_with("1 with a column \"tools\" that is not read"), "{report}");
}

#[test]
fn a_function_call_turn_is_a_tool_call_where_the_template_writes_calls_and_a_text_where_it_does_not() {
    let call = r#"{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}"#;
    let row = json!([{"conversations": [{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": call},
        {"from": "observation", "value": "18 C"}, {"from": "gpt", "value": "18."}], "tools": "[]"}]);
    let golden = golden();
    let (examples, _) =
        sft_examples(&dataset(row.clone()).entries, &CHAT, &with_template(&golden, "qwen2.5"), true).unwrap();
    let text = decode(&examples[0].tokens);
    assert!(text.contains(&format!("assistant\n<tool_call>\n{call}\n</tool_call>")), "{text}");
    let (examples, report) = sft_examples(&dataset(row).entries, &CHAT, &Data::default(), true).unwrap();
    assert_eq!(trained_text(&examples[0]), format!("{call}<e>18.<e>"));
    assert!(!report.to_string().contains("tool_calls"), "{report}");
}

#[test]
fn what_a_template_cannot_write_is_refused() {
    let call =
        json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]});
    let row = json!([{"messages": [{"role": "user", "content": "q"}, call]}]);
    for template in [None, Some(Template::Plain), Some(Template::HumanAssistant)] {
        let data = Data {
            template,
            chat_template: template.is_none().then(|| "{{ messages[0].content }}".into()),
            ..Data::default()
        };
        let error = sft_examples(&dataset(row.clone()).entries, &CHAT, &data, true).unwrap_err();
        assert!(error.to_string().contains("tool_calls") && exit_code(&error) == 2, "{error}");
    }
    for (column, value, says) in [
        ("tools", json!("not JSON"), "expected JSON of a list of tools"),
        ("tools", json!({"f": 1}), "expected a list of tools"),
        ("chat_template_kwargs", json!([1]), "expected an object"),
        ("chat_template_kwargs", json!({"messages": 1}), "which the run sets"),
    ] {
        let row = json!([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], column: value}]);
        let error = load("x.json", row.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains(column), "{error}");
    }
}

#[test]
fn most_of_the_first_records_decide_the_format_not_the_first_alone() {
    let good = |i: usize| json!({"prompt": format!("q{i}"), "chosen": "a", "rejected": "b"});
    for bad in [
        json!({"prompt": "no responses"}),
        json!({"text": "a stray text"}),
        json!({"id": 7}),
        json!({"prompt": "q", "completion": "one response", "label": null}),
        json!({"prompt": "q", "chosen": "same", "rejected": "same", "responses": ["a"]}),
    ] {
        let rows: Vec<Value> = std::iter::once(bad.clone()).chain((0..20).map(good)).collect();
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let (_folder, mut data) = config(&[("x.jsonl", lines.as_bytes())]);
        data.on_bad_record = OnBadRecord::Skip;
        let found = data::load(&data).unwrap();
        assert_eq!((found.entries.len(), found.skipped), (20, 1), "{bad}");
        let fault = found.first_skipped.unwrap();
        assert!(fault.contains("x.jsonl, line 1: "), "{fault}");
        if bad.get("responses").is_none() {
            assert!(fault.contains("the file is read as \"preference\""), "{fault}");
        }
        // Said once, unless the columns of all are alike.
        let remarks: Vec<String> = found.entries.iter().flat_map(|entry| entry.remarks.clone()).collect();
        let decided = remarks
            .iter()
            .filter(|remark| *remark == "file read as \"preference\", the format of 15 of its first 16 records");
        assert_eq!(decided.count(), usize::from(bad.get("responses").is_none()), "{remarks:?}");
        // Otherwise the run ends at it.
        data.on_bad_record = OnBadRecord::Error;
        assert!(data::load(&data).unwrap_err().to_string().contains("line 1: "));
    }
}

#[test]
fn records_that_wait_for_the_format_are_all_passed_on() {
    for rows in [1, 2, 15, 16, 17, 40] {
        let lines: String = (0..rows).map(|i| format!("{}\n", json!({"text": format!("t{i}")}))).collect();
        let (_folder, mut data) = config(&[("x.jsonl", lines.as_bytes())]);
        let texts = |data: &Data| -> Vec<Record> {
            data::load(data).unwrap().entries.into_iter().map(|entry| entry.record).collect()
        };
        let all: Vec<Record> = (0..rows).map(|i| Record::LanguageModeling(text(&format!("t{i}")))).collect();
        assert_eq!(texts(&data), all);
        data.max_rows = Some(3);
        assert_eq!(texts(&data), all[..rows.min(3)]);
    }
    // The fault of a record comes before the one that ends its file.
    let (_folder, data) = config(&[("x.json", b"[{\"text\": 1}, {\"text\": ")]);
    assert!(data::load(&data).unwrap_err().to_string().contains("record 1: column \"text\""));
}
