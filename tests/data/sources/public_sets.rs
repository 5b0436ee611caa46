//! Records of other trainers and of public data sets, DeepSpeed-Chat's presets among them, are read as they mean.

use super::*;

fn one(object: &Value, change: impl FnOnce(&mut Data)) -> anyhow::Result<Record> {
    let folder = Folder::new(&[("x.jsonl", object.to_string().as_bytes())]);
    let mut data = at(folder.path("x.jsonl"));
    change(&mut data);
    Ok(data::load(&data)?.entries.remove(0).record)
}

#[test]
fn records_of_other_trainers_and_public_data_sets_are_read() {
    let ranked = |prompt: &[(&str, &str)]| Record::Ranked {
        prompt: turns(prompt),
        responses: vec![turns(&[("assistant", "good")]), turns(&[("assistant", "bad")])],
        label: Default::default(),
    };
    let u = json!({"role": "user", "content": "q"});
    let says = |word: &str| json!({"role": "assistant", "content": word});
    for (object, expected) in [
        // A prompt column beside conversations that include the prompt (ultrafeedback_binarized).
        (json!({"prompt": "q", "chosen": [u, says("good")], "rejected": [u, says("bad")]}), ranked(&[("user", "q")])),
        // LLaMA-Factory's alpaca: the old ranking format, and the current one with system and history.
        (json!({"instruction": "q", "output": ["good", "bad"]}), ranked(&[("user", "q")])),
        (
            json!({"instruction": "q", "input": "n", "chosen": "good", "rejected": "bad", "system": "s",
                   "history": [["u", "v"]]}),
            ranked(&[("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "q\nn")]),
        ),
        // A tool call and its result.
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"},
                   {"from": "observation", "value": "1"}], "chosen": {"from": "gpt", "value": "good"},
                   "rejected": {"from": "gpt", "value": "bad"}}),
            ranked(&[("user", "q"), ("assistant", "f()"), ("tool", "1")]),
        ),
        // Pairs with scores or labels, recognised by their columns.
        (
            json!({"question": {"full_text": "q"}, "answer_0": "bad", "answer_1": "good", "score_0": -1, "score_1": 1.0}),
            ranked(&[("user", "q")]),
        ),
        (
            json!({"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9}),
            ranked(&[("user", "q")]),
        ),
    ] {
        assert_eq!(one(&object, |_| {}).unwrap(), expected, "{object}");
    }
    let pair = json!({"prompt": "q", "completion": "a", "chosen": "good", "rejected": "bad"});
    assert!(matches!(one(&pair, |_| {}).unwrap(), Record::Ranked { .. }));
    let sft = one(&pair, |data| data.ranking = Some(false)).unwrap();
    assert_eq!(sft, Record::PromptCompletion { prompt: text("q"), completion: text("a") });
    let error = one(&json!({"prompt": "q", "completion": "a"}), |data| data.ranking = Some(true)).unwrap_err();
    assert!(error.to_string().contains("column \"chosen\" is missing"), "{error}");
    let kto = json!({"q": [u, says("a")], "good": false});
    let unpaired = one(&kto, |data| {
        data.columns.messages = Some("q".to_owned());
        data.columns.kto_tag = Some("good".to_owned());
    });
    let expected =
        Record::Unpaired { prompt: turns(&[("user", "q")]), completion: turns(&[("assistant", "a")]), label: false };
    assert_eq!(unpaired.unwrap(), expected);
    let twice = json!({"messages": [{"role": "system", "content": "s"}, u, says("a")], "system": "t"});
    let error = one(&twice, |_| {}).unwrap_err().to_string();
    assert!(error.contains("column \"system\": \"messages\" has a system turn of its own"), "{error}");
}

#[test]
fn each_deepspeed_chat_data_set_is_read_by_its_preset() {
    let q = || turns(&[("user", "q")]);
    let says = |word: &str| turns(&[("assistant", word)]);
    let pair =
        |a: &str, b: &str| Record::Ranked { prompt: q(), responses: vec![says(a), says(b)], label: Default::default() };
    let completed = |a: &str| Record::PromptCompletion { prompt: q(), completion: says(a) };
    let hh = json!({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"});
    let passage = |text: &str| json!([{"docid": "1", "title": "t", "text": text}]);
    let miracl = json!({"query": "q", "positive_passages": passage("good"), "negative_passages": passage("bad")});
    let mkqa =
        json!({"queries": {"zh_cn": "q", "ja": "q"}, "answers": {"zh_cn": [{"text": "z"}], "ja": [{"text": "j"}]}});
    let cases = [
        (Preset::RmStatic, "Dahoas/rm-static", hh.clone(), pair("good", "bad")),
        (Preset::FullHhRlhf, "Dahoas/full-hh-rlhf", hh, pair("good", "bad")),
        (
            Preset::SyntheticInstruct,
            "Dahoas/synthetic-instruct-gptj-pairwise",
            json!({"prompt": "q", "chosen": "good", "rejected": "bad"}),
            pair("good", "bad"),
        ),
        (
            Preset::RlhfReward,
            "yitingxie/rlhf-reward-datasets",
            json!({"prompt": "Human: q\n\n", "chosen": "Assistant: good", "rejected": "x Assistant: y Assistant: bad"}),
            pair("good", "bad"),
        ),
        (
            Preset::Webgpt,
            "openai/webgpt_comparisons",
            json!({"question": {"full_text": "q"}, "answer_0": "bad (2)", "answer_1": "good [1][2] (see 3) end.",
                   "score_0": "-0.5", "score_1": 0.5}),
            // DeepSpeed-Chat's two substitutions are not greedy and remove one space.
            pair("good end.", "bad"),
        ),
        (
            Preset::Shp,
            "stanfordnlp/SHP",
            json!({"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}),
            pair("good", "bad"),
        ),
        (
            Preset::SharegptVicuna,
            "pvduy/sharegpt_alpaca_oa_vicuna_format",
            json!({"prompt": "USER: q ASSISTANT:", "label": "a"}),
            Record::PromptCompletion { prompt: text("Human: q Assistant:"), completion: text(" a") },
        ),
        (Preset::ZhihuKol, "wangrui6/Zhihu-KOL", json!({"INSTRUCTION": "q", "RESPONSE": "a"}), completed("a")),
        (Preset::MiraclZh, "Cohere/miracl-zh-queries-22-12", miracl.clone(), pair("good", "bad")),
        (Preset::MiraclJa, "Cohere/miracl-ja-queries-22-12", miracl, pair("good", "bad")),
        (
            Preset::Hc3Chinese,
            "Hello-SimpleAI/HC3-Chinese",
            json!({"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": ["c"]}),
            completed("a"),
        ),
        (Preset::MkqaChinese, "mkqa-Chinese", mkqa.clone(), completed("z")),
        (Preset::MkqaJapanese, "mkqa-Japanese", mkqa, completed("j")),
        (Preset::QgJaquad, "lmqg/qg_jaquad", json!({"question": "q", "sentence": "a"}), completed("a")),
        (Preset::QagJaquad, "lmqg/qag_jaquad", json!({"questions": ["q", "r"], "paragraph": "a"}), completed("a")),
        (
            Preset::LocalJson,
            "local/jsonfile",
            json!({"prompt": "Human: q Assistant:", "chosen": "good", "rejected": "bad"}),
            Record::Ranked {
                prompt: text(" Human: q Assistant:"),
                responses: vec![text(" good"), text(" bad")],
                label: Default::default(),
            },
        ),
    ];
    assert_eq!(cases.len(), 16);
    for (preset, name, object, expected) in cases {
        assert_eq!(serde_json::to_value(preset).unwrap(), name);
        assert_eq!(one(&object, |data| data.preset = Some(preset)).unwrap(), expected, "{name}");
        let error = one(&json!({"other": 1}), |data| data.preset = Some(preset)).unwrap_err().to_string();
        assert!(error.contains("is empty or missing") || error.contains("is missing"), "{name}: {error}");
    }
    // Without a negative passage the record is a prompt with its completion.
    let unranked = json!({"query": "q", "positive_passages": passage("good"), "negative_passages": []});
    assert_eq!(one(&unranked, |data| data.preset = Some(Preset::MiraclJa)).unwrap(), completed("good"));
    let (named, halved) =
        (data::formats::presets::splits(Preset::MiraclZh), data::formats::presets::splits(Preset::Webgpt));
    assert_eq!(named, data::formats::presets::Splits::Named { train: "train", eval: "dev" });
    assert_eq!(halved, data::formats::presets::Splits::NineToOne);
}

#[test]
fn under_dschat_transcripts_stay_verbatim() {
    let hh = json!({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"});
    let verbatim = Record::Ranked {
        prompt: text("\n\nHuman: q\n\nAssistant:"),
        responses: vec![text(" good"), text(" bad")],
        label: Default::default(),
    };
    for preset in [None, Some(Preset::RmStatic)] {
        let found = one(&hh, |data| (data.preset, data.compat) = (preset, Some(Compat::Dschat)));
        assert_eq!(found.unwrap(), verbatim);
    }
}

#[test]
fn dschat_and_template_keys_without_effect_are_refused() {
    let folder = Folder::new(&[("run.toml", b"[base]\npath = \"base\"\n[data]\npath = \"x.json\"\n")]);
    let load = |keys: &[&str]| {
        let set: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        config::load(&folder.path("run.toml"), &set)
    };
    let data = load(&["data.compat=dschat", "data.data_split=1,0,3"]).unwrap();
    assert_eq!(data.data().unwrap().compat, Some(Compat::Dschat));
    assert!(load(&["data.template=chat", "data.chat_template={{ messages }}"]).is_ok());
    for (keys, message) in [
        (vec!["data.data_split=1,0,3"], "data_split is DeepSpeed-Chat's; add compat"),
        (vec!["data.compat=dschat", "data.data_split=1,3"], "is not three shares of 0 or more"),
        (vec!["data.compat=dschat", "data.mix_strategy=interleave_under"], "takes its sources one after another"),
        (vec!["data.compat=dschat", "data.data_split=0,0,0"], "is not three shares of 0 or more"),
        (vec!["data.compat=deepspeed"], "compat"),
        (vec!["data.template=plain", "data.chat_template=x"], "has a chat_template that template does not use"),
    ] {
        let error = format!("{:#}", load(&keys).expect_err(message));
        assert!(error.contains(message), "\nfound:    {error}\nexpected: {message}");
    }
}
