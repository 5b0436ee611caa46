//! Records -> the token sequences of each objective: loss masks, truncation, counts.

use super::*;

/// A dialogue of two rounds whose responses have white space and multi-byte characters.
fn two_rounds() -> Value {
    json!([{"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q1"}, {"role": "assistant", "content": "né 1\n"},
        {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}, {"role": "user", "content": "bye"},
    ]}])
}

#[test]
fn the_sft_mask_is_exactly_the_assistants_text_and_end_tokens() {
    for (encoder, template, whole, expected) in [
        (
            CHAT,
            None,
            "[system]s<e>\n[user]q1<e>\n[assistant]né 1\n<e>\n[user]q2<e>\n[assistant]a2<e>",
            "né 1\n<e>a2<e>",
        ),
        (BARE, None, "<b>s\nq1\nné 1\n\nq2\na2<e>", "né 1\na2<e>"),
        (
            CHAT,
            Some(Template::HhRlhf),
            "<b>s\n\nHuman: q1\n\nAssistant: né 1\n\n\nHuman: q2\n\nAssistant: a2<e>",
            " né 1\n a2<e>",
        ),
    ] {
        let data = Data { template, ..Data::default() };
        let (examples, report) = sft_examples(&dataset(two_rounds()).entries, &encoder, &data, true).unwrap();
        assert_eq!(decode(&examples[0].tokens), whole);
        assert_eq!(trained_text(&examples[0]), expected);
        assert_eq!(report.to_string(), "1 record, 1 sequence");
        let (examples, _) = sft_examples(&dataset(two_rounds()).entries, &encoder, &data, false).unwrap();
        let first = decode(&examples[0].tokens[..1]).len();
        assert_eq!(trained_text(&examples[0]), whole[first..], "everything but the first token");
    }
}

#[test]
fn texts_are_verbatim_unless_the_config_names_a_template() {
    let records = dataset(json!([{"prompt": "q:", "completion": " a"}]));
    for (template, whole) in [
        (None, "<b>q: a<e>"),
        (Some(Template::Plain), "<b>q: a<e>"),
        (Some(Template::Chat), "[user]q:<e>\n[assistant] a<e>"),
        (Some(Template::HumanAssistant), "<b> Human: q: Assistant:  a<e>"),
        (Some(Template::HhRlhf), "<b>\n\nHuman: q:\n\nAssistant:  a<e>"),
    ] {
        let data = Data { template, ..Data::default() };
        let (examples, _) = sft_examples(&records.entries, &CHAT, &data, true).unwrap();
        assert_eq!(decode(&examples[0].tokens), whole);
        assert_eq!(trained_text(&examples[0]).trim_start(), "a<e>");
    }
    let chat = Data { template: Some(Template::Chat), ..Data::default() };
    let error = sft_examples(&records.entries, &BARE, &chat, true).unwrap_err();
    assert!(error.to_string().contains("has no chat template") && exit_code(&error) == 2, "{error}");
}

#[test]
fn sft_trains_on_the_best_response_and_on_desirable_ones() {
    let preference = dataset(json!([{"prompt": "q", "chosen": "good", "rejected": "bad"}]));
    assert_eq!(
        trained_text(&sft_examples(&preference.entries, &BARE, &Data::default(), true).unwrap().0[0]),
        "good<e>"
    );
    let unpaired = dataset(json!([
        {"prompt": "q", "completion": "no", "label": false}, {"prompt": "q", "completion": "yes", "label": true}
    ]));
    let (examples, report) = sft_examples(&unpaired.entries, &BARE, &Data::default(), true).unwrap();
    assert_eq!((examples.len(), trained_text(&examples[0]).as_str()), (1, "yes<e>"));
    assert_eq!(report.to_string(), "2 records, 1 sequence; 1 dropped: 1 judged bad");
}

#[test]
fn raw_text_is_cut_into_blocks_that_lose_nothing() {
    let records = load("x.txt", b"abcdefghij\n").unwrap();
    let data = Data { max_length: 5, ..Data::default() };
    let (examples, report) = sft_examples(&records.entries, &BARE, &data, true).unwrap();
    let blocks: Vec<String> = examples.iter().map(|example| decode(&example.tokens)).collect();
    assert_eq!(blocks, ["<b>abcd", "efghi", "j<e>"]);
    assert_eq!(trained_text(&examples[1]), "fghi");
    assert_eq!((report.read, report.kept), (1, 3));
}

#[test]
fn a_ranking_has_one_prompt_and_every_response_has_the_end_token() {
    let records = dataset(json!([
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["best", "good", "bad"]},
        {"prompt": [{"role": "user", "content": "r"}], "responses": ["yes", "no"]},
    ]));
    let (examples, _) = ranked_examples(&records.entries, &CHAT, &Data::default()).unwrap();
    assert_eq!(decode(&examples[0].prompt), "[user]q<e>\n[assistant]");
    let responses: Vec<String> = examples[0].responses.iter().map(decode).collect();
    assert_eq!(responses, ["best<e>", "good<e>", "bad<e>"]);
    assert_eq!(examples[1].responses.len(), 2);
    let texts = dataset(json!([{"text": "a"}]));
    let error = ranked_examples(&texts.entries, &CHAT, &Data::default()).unwrap_err();
    assert!(error.to_string().contains("x.json, record 1: reward modelling needs comparisons"), "{error}");
    assert!(error.to_string().ends_with("this record is language_modeling") && exit_code(&error) == 2, "{error}");
}

#[test]
fn every_record_with_a_prompt_gives_ppo_the_reward_models_prompt() {
    let open = "[user]q<e>\n[assistant]";
    let q = json!({"role": "user", "content": "q"});
    let a = json!({"role": "assistant", "content": "a"});
    for object in [
        json!({"messages": [q, a]}),
        json!({"messages": [q]}),
        json!({"prompt": [q]}),
        json!({"prompt": [q], "completion": [a]}),
        json!({"prompt": [q], "chosen": "a", "rejected": "b"}),
        json!({"messages": [q, a], "label": false}),
        json!({"instruction": "q", "output": "a"}),
    ] {
        let (examples, _) = prompt_examples(&dataset(json!([object])).entries, &CHAT, &Data::default()).unwrap();
        assert_eq!((examples[0].text.as_str(), decode(&examples[0].tokens).as_str()), (open, open), "{object}");
    }
    let error = prompt_examples(&dataset(json!([{"text": "a"}])).entries, &CHAT, &Data::default()).unwrap_err();
    assert!(error.to_string().contains("raw text has none"), "{error}");
}

fn counted(report: &Report) -> (usize, usize, usize, usize) {
    (report.read, report.kept, report.truncated, report.dropped.values().sum())
}

#[test]
fn truncation_follows_the_policy_and_is_counted() {
    // Sequences of 4 + 3, 12 + 3 and 4 + 12 tokens, including the beginning-of-sequence and the end token.
    let records = dataset(json!([
        {"prompt": "abc", "chosen": "xy", "rejected": "z"},
        {"prompt": "abcdefghijk", "chosen": "xy", "rejected": "z"},
        {"prompt": "abc", "chosen": "0123456789_", "rejected": "z"},
    ]));
    let entries = &records.entries;
    let with = |truncation| Data { truncation, max_length: 10, max_prompt_length: 4, ..Data::default() };

    let (sft, report) = sft_examples(entries, &BARE, &with(Truncation::Drop), true).unwrap();
    assert_eq!((sft.len(), counted(&report)), (1, (3, 1, 0, 2)));
    assert_eq!(report.to_string(), "3 records, 1 sequence; 2 dropped: 2 longer than max_length = 10");
    let (sft, report) = sft_examples(entries, &BARE, &with(Truncation::Left), true).unwrap();
    assert_eq!((decode(&sft[1].tokens).as_str(), trained_text(&sft[1]).as_str()), ("efghijkxy<e>", "xy<e>"));
    assert_eq!(counted(&report), (3, 2, 1, 1));
    let (sft, report) = sft_examples(entries, &BARE, &with(Truncation::Right), true).unwrap();
    assert_eq!((decode(&sft[1].tokens).as_str(), trained_text(&sft[1]).as_str()), ("<b>abc012345", "012345"));
    assert_eq!(counted(&report), (3, 2, 1, 1));

    let (ranked, report) = ranked_examples(entries, &BARE, &with(Truncation::Drop)).unwrap();
    assert_eq!((ranked.len(), counted(&report)), (1, (3, 1, 0, 2)));
    let (ranked, report) = ranked_examples(entries, &BARE, &with(Truncation::Left)).unwrap();
    assert_eq!((decode(&ranked[1].prompt).as_str(), decode(&ranked[1].responses[1]).as_str()), ("efghijk", "z<e>"));
    assert_eq!(counted(&report), (3, 2, 1, 1));
    let (ranked, report) = ranked_examples(entries, &BARE, &with(Truncation::Right)).unwrap();
    assert_eq!((decode(&ranked[1].prompt).as_str(), decode(&ranked[1].responses[0]).as_str()), ("<b>abc", "012345"));
    assert_eq!(counted(&report), (3, 2, 1, 1));

    let (prompts, report) = prompt_examples(entries, &BARE, &with(Truncation::Left)).unwrap();
    assert_eq!((prompts.len(), counted(&report)), (2, (3, 2, 0, 1)), "a PPO prompt is never cut");

    let data = Data { max_length: 4, ..Data::default() };
    let error = ranked_examples(entries, &BARE, &data).unwrap_err();
    assert!(error.to_string().contains("leaves no sequence: 3 records, 0 sequences; 3 dropped"), "{error}");
}

#[test]
fn responses_that_truncation_makes_equal_are_dropped() {
    let records = dataset(
        json!([{"prompt": "a", "chosen": "xxxx1", "rejected": "xxxx2"}, {"prompt": "a", "chosen": "1", "rejected": "2"}]),
    );
    let data = Data { truncation: Truncation::Right, max_length: 5, ..Data::default() };
    let (examples, report) = ranked_examples(&records.entries, &BARE, &data).unwrap();
    assert_eq!((examples.len(), report.dropped["with responses that are the same tokens"]), (1, 1));
}

#[test]
fn a_template_that_rewrites_earlier_turns_trains_on_what_multi_turn_says() {
    let forgetful = Bytes { has_chat: true, forgets_earlier_turns: true };
    let entries = dataset(two_rounds()).entries;
    let with = |multi_turn| Data { multi_turn, ..Data::default() };
    let first = "[system]s<e>\n[user]q1<e>\n[assistant]né 1\n<e>";
    let last = "[system]s<e>\n[user]q1<e>\n[assistant]...<e>\n[user]q2<e>\n[assistant]a2<e>";
    for (multi_turn, whole, trained, remark) in [
        (None, vec![last], vec!["a2<e>"], "; 1 learnt in their last response only"),
        (Some(MultiTurn::Last), vec![last], vec!["a2<e>"], "(multi_turn = \"last\")"),
        (
            Some(MultiTurn::Each),
            vec![first, last],
            vec!["né 1\n<e>", "a2<e>"],
            "; 1 made one sequence for each response",
        ),
    ] {
        let (examples, report) = sft_examples(&entries, &forgetful, &with(multi_turn), true).unwrap();
        assert_eq!(examples.iter().map(|example| decode(&example.tokens)).collect::<Vec<_>>(), whole);
        assert_eq!(examples.iter().map(trained_text).collect::<Vec<_>>(), trained);
        assert!(report.to_string().contains(remark), "{report}");
    }
    let error = sft_examples(&entries, &forgetful, &with(Some(MultiTurn::Error)), true).unwrap_err();
    assert!(error.to_string().contains("x.json, record 1: the chat template renders turn 3 differently"), "{error}");
    // A template that keeps every turn has one sequence whatever the key says.
    for multi_turn in [MultiTurn::Last, MultiTurn::Each, MultiTurn::Error] {
        let (examples, report) = sft_examples(&entries, &CHAT, &with(Some(multi_turn)), true).unwrap();
        assert_eq!((examples.len(), trained_text(&examples[0]).as_str()), (1, "né 1\n<e>a2<e>"));
        assert_eq!(report.to_string(), "1 record, 1 sequence");
    }
}

#[test]
fn a_template_that_refuses_a_dialogue_which_starts_with_the_assistant_is_named_with_a_remedy() {
    let refusing = "{% for m in messages %}{% if loop.first and m.role != 'user' %}{{ raise_exception('alternate') }}{% endif %}\
                    [{{ m.role }}]{{ m.content }}{% endfor %}";
    let turns = json!([{"messages": [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"}]}]);
    let data = Data { chat_template: Some(refusing.into()), ..Data::default() };
    let entries = dataset(turns).entries;
    let error = format!("{:#}", sft_examples(&entries, &CHAT, &data, true).unwrap_err());
    assert!(error.contains("starts with an assistant turn") && error.contains("alternate"), "{error}");
    // A template that accepts it learns both responses.
    let (examples, _) = sft_examples(&entries, &CHAT, &Data::default(), true).unwrap();
    assert_eq!(trained_text(&examples[0]), "Hello!<e>a<e>");
}

#[test]
fn an_end_token_that_is_written_at_the_end_counts_once() {
    let q = json!({"role": "user", "content": "q"});
    let dialogue = |ends: [&str; 2]| {
        json!([{"messages": [q, {"role": "assistant", "content": format!("a{}", ends[0])},
        q, {"role": "assistant", "content": format!("b{}", ends[1])}]}])
    };
    let plain = Data { template: Some(Template::Plain), ..Data::default() };
    let chat = "[user]q<e>\n[assistant]a<e>\n[user]q<e>\n[assistant]b<e>";
    for (object, encoder, data, whole, trained) in [
        (json!([{"text": "q: a<e>"}]), BARE, Data::default(), "<b>q: a<e>", "q: a<e>"),
        (json!([{"text": "q: a<e>\n"}]), BARE, Data::default(), "<b>q: a<e>", "q: a<e>"),
        (json!([{"prompt": "q:", "completion": " a<e>"}]), BARE, Data::default(), "<b>q: a<e>", " a<e>"),
        (dialogue(["<e>", "<e>"]), CHAT, Data::default(), chat, "a<e>b<e>"),
        (dialogue(["", "<e>\n"]), CHAT, Data::default(), chat, "a<e>b<e>"),
        (dialogue(["", "<e>"]), CHAT, plain, "<b>q\na\nq\nb<e>", "ab<e>"),
    ] {
        let (examples, _) = sft_examples(&dataset(object).entries, &encoder, &data, true).unwrap();
        assert_eq!((decode(&examples[0].tokens).as_str(), trained_text(&examples[0]).as_str()), (whole, trained));
    }
    let pairs = dataset(
        json!([{"prompt": [q], "chosen": "a<e>", "rejected": "b"}, {"prompt": "q", "chosen": "a<e>", "rejected": "b"}]),
    );
    for example in ranked_examples(&pairs.entries, &CHAT, &Data::default()).unwrap().0 {
        assert_eq!(example.responses.iter().map(decode).collect::<Vec<_>>(), ["a<e>", "b<e>"]);
    }
    // A template that writes no end token leaves the authors'.
    let bare = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let data = Data { chat_template: Some(bare.to_owned()), ..Data::default() };
    let (examples, _) = sft_examples(&dataset(dialogue(["<e>", "<e>"])).entries, &CHAT, &data, true).unwrap();
    assert_eq!(decode(&examples[0].tokens), "[user]q[assistant]a<e>[user]q[assistant]b<e>");
    assert_eq!(trained_text(&examples[0]), "a<e>b<e>");
}

#[test]
fn a_record_the_template_cannot_mask_is_an_error_or_is_counted_as_bad() {
    for (messages, expected) in [
        (json!([{"role": "user", "content": "q"}]), "no assistant turn"),
        (
            json!([{"role": "user", "content": "q"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "a"}]),
            "two user turns",
        ),
        (
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<e>b"}]),
            "end token \"<e>\" inside it",
        ),
    ] {
        let good = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
        let entries = dataset(json!([good, {"messages": messages}])).entries;
        let error = sft_examples(&entries, &CHAT, &Data::default(), true).unwrap_err();
        assert!(error.to_string().contains("record 2") && error.to_string().contains(expected), "{error}");
        assert_eq!(exit_code(&error), 2);
        let skip = Data { on_bad_record: OnBadRecord::Skip, ..Data::default() };
        let (examples, report) = sft_examples(&entries, &CHAT, &skip, true).unwrap();
        assert_eq!((examples.len(), report.dropped["bad"]), (1, 1));
        assert!(report.to_string().contains(expected), "{report}");
    }
}

#[test]
fn a_template_in_the_config_replaces_the_tokenizers() {
    let records = dataset(json!([{"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]}]));
    let inline = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}\
                  {% if add_generation_prompt %}<assistant>{% endif %}";
    for encoder in [CHAT, BARE] {
        let data = Data { chat_template: Some(inline.to_owned()), ..Data::default() };
        let (examples, _) = sft_examples(&records.entries, &encoder, &data, true).unwrap();
        assert_eq!(decode(&examples[0].tokens), "<user>q<e><assistant>a<e><user>r<e><assistant>b<e>");
        assert_eq!(trained_text(&examples[0]), "a<e>b<e>");
    }
    let data = Data { chat_template: Some("{% for".to_owned()), ..Data::default() };
    let error = sft_examples(&records.entries, &BARE, &data, true).unwrap_err();
    assert!(error.to_string().contains("the chat template has a mistake") && exit_code(&error) == 2, "{error}");
}

/// Ten comparisons under `compat = "dschat"`. numpy's order of ten rows for seed 1234 is in
/// tests/golden/dschat_split.json.
fn as_deepspeed_chat() -> (Vec<fourfold::data::Entry>, Data) {
    let records: Vec<Value> =
        (0..10).map(|i| json!({"prompt": format!("q{i}"), "chosen": "yes", "rejected": "yet no"})).collect();
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    let (_folder, mut data) = config(&[("x.jsonl", lines.as_bytes())]);
    data.preset = Some(Preset::SyntheticInstruct);
    (data.compat, data.seed) = (Some(Compat::Dschat), 1234);
    (data::load(&data).unwrap().entries, data)
}

#[test]
fn dschat_shares_have_deepspeed_chats_rows_text_and_masks() {
    let golden: Value = serde_json::from_str(include_str!("../../golden/dschat_split.json")).unwrap();
    let case = &golden["splits"][0];
    assert_eq!((&case["seed"], &case["size"], &case["split"]), (&json!(1234), &json!(10), &json!("2,4,4")));
    let rows = |share: usize| -> Vec<u64> { serde_json::from_value(case["phases"][share].clone()).unwrap() };
    let (entries, data) = as_deepspeed_chat();

    let (sft, _) = sft_examples(&entries, &BARE, &data, true).unwrap();
    let expected: Vec<String> = rows(0).iter().map(|i| format!("<b> Human: q{i} Assistant: yes<e>")).collect();
    assert_eq!(sft.iter().map(|example| decode(&example.tokens)).collect::<Vec<_>>(), expected);
    assert_eq!(trained_text(&sft[0]), expected[0][3..], "the loss is on the prompt too");

    let (pairs, _) = ranked_examples(&entries, &BARE, &data).unwrap();
    let expected: Vec<String> = rows(1).iter().map(|i| format!("<b> Human: q{i} Assistant: ye")).collect();
    assert_eq!(pairs.iter().map(|pair| decode(&pair.prompt)).collect::<Vec<_>>(), expected);
    // The end is the text `<|endoftext|>`, not the tokenizer's end token.
    assert_eq!(decode(&pairs[0].responses[0]), "s<|endoftext|>");
    assert_eq!(decode(&pairs[0].responses[1]), "t no<|endoftext|>");

    let (prompts, _) = prompt_examples(&entries, &BARE, &data).unwrap();
    let expected: Vec<String> = rows(2).iter().map(|i| format!("<b> Human: q{i} Assistant:")).collect();
    assert_eq!(prompts.iter().map(|prompt| decode(&prompt.tokens)).collect::<Vec<_>>(), expected);

    let halves = Data { data_split: Some("0,1,0".to_owned()), ..data };
    assert_eq!(ranked_examples(&entries, &BARE, &halves).unwrap().0.len(), 10);
}

#[test]
fn dschat_truncates_long_responses_and_drops_long_prompts() {
    let (entries, data) = as_deepspeed_chat();
    let short = Data { max_length: 25, max_prompt_length: 20, ..data };
    let (sft, report) = sft_examples(&entries, &BARE, &short, true).unwrap();
    assert!(decode(&sft[0].tokens).ends_with("Assistant: ye"), "the end token is cut off");
    assert_eq!(counted(&report), (2, 2, 2, 0));
    let (pairs, report) = ranked_examples(&entries, &BARE, &short).unwrap();
    assert!(
        pairs.iter().all(|pair| pair.responses[0] == pair.responses[1]),
        "sequences that truncation makes equal are kept"
    );
    assert_eq!((report.kept, report.truncated), (4, 4));
    let error = prompt_examples(&entries, &BARE, &short).unwrap_err().to_string();
    assert!(error.contains("4 longer than max_prompt_length = 20 (filtered)"), "{error}");
}
