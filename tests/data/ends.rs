//! A response ends at one token in every stage: the responses of a PPO run, scored by `fourfold score`, have the scores that PPO
//! gave them, and SFT learns that token, where it is not the tokenizer's end-of-sequence token.

use std::path::Path;

use fourfold::config::{Data, Paths};
use fourfold::data::examples::objectives::{end_of_responses, ends_of_responses, sft_examples};
use fourfold::data::{self, ModelEncoder};
use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use serde_json::{Value, json};

use crate::support::Place;

/// Turns end with `<|endoftext|>`, which the base was trained to write, and then a line break; the end-of-sequence token is
/// `<|pad|>`.
const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'user' %}{{ '\n\nHuman: ' + m.content }}{% else %}\
    {{ '\n\nAssistant:' + m.content + '<|endoftext|>\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}";

/// The embedded base with that template; `listed`: whether generation_config.json names the token that ends a turn.
fn write_base(place: &Place, listed: bool) {
    place.write_base("base");
    let mut config: Value = serde_json::from_str(BASE.tokenizer_config).unwrap();
    config["chat_template"] = TEMPLATE.into();
    config["eos_token"] = "<|pad|>".into();
    place.write("base/tokenizer_config.json", config.to_string());
    let ends = if listed { json!([1, 0]) } else { json!(1) };
    place.write("base/generation_config.json", json!({"bos_token_id": 0, "eos_token_id": ends}).to_string());
    let mut model: Value = serde_json::from_str(BASE.config).unwrap();
    model["eos_token_id"] = 1.into();
    place.write("base/config.json", model.to_string());
}

const QUESTIONS: [&str; 4] = ["How is the hotel?", "And the food?", "Is it far?", "Where to?"];

#[test]
fn score_gives_ppos_own_responses_the_scores_that_ppo_gave_them() {
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/quickstart");
    for listed in [true, false] {
        let place = Place::new();
        write_base(&place, listed);
        let line = |question: &str| format!("{}\n", json!({"prompt": [{"role": "user", "content": question}]}));
        place.write("asked.jsonl", QUESTIONS.map(line).concat());
        place.write(
            "ppo.toml",
            format!(
                "[base]\npath = \"base\"\n[data]\npath = \"asked.jsonl\"\n[ppo]\nadapter = {:?}\nreward_adapter = {:?}\n\
                 total_episodes = 16\nbatch_size = 16\nmicro_batch_size = 4\nresponse_length = 60\nsave_samples = 16\n\
                 eval_prompts = 0\nlearning_rate = 1e-9\n",
                adapters.join("sft"),
                adapters.join("reward")
            ),
        );
        let ran = place.run("ppo ppo.toml --out out");
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let samples = std::fs::read_to_string(place.path("out/samples.jsonl")).unwrap();
        let samples: Vec<Value> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let ended: Vec<&Value> = samples.iter().filter(|sample| sample["finish_reason"] == "stop").collect();
        assert!(ended.len() >= 8, "{} of {} responses ended", ended.len(), samples.len());
        let pair = |sample: &&Value| {
            let asked = sample["prompt"].as_str().unwrap();
            let question = QUESTIONS.iter().find(|question| asked.contains(*question)).unwrap();
            format!(
                "{}\n",
                json!({"prompt": [{"role": "user", "content": question}], "chosen": sample["response"],
                "rejected": " Something else."})
            )
        };
        place.write("own.jsonl", ended.iter().map(pair).collect::<String>());
        let reward = adapters.join("reward").display().to_string();
        let args = ["score", "--base", "base", "--adapter", &reward, "--data", "own.jsonl", "--json"];
        let ran = place.run_with(&args, "");
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let scored: Value = serde_json::from_str(&ran.stdout).unwrap();
        let scores = scored["scores"].as_array().unwrap();
        assert_eq!(scores.len(), ended.len());
        for (sample, scores) in ended.iter().zip(scores) {
            let (by_ppo, by_score) = (sample["score"].as_f64().unwrap(), scores[0].as_f64().unwrap());
            assert!((by_ppo - by_score).abs() < 1e-4, "{by_ppo} and {by_score}: {sample}");
        }
    }
}

#[test]
fn every_stage_ends_a_response_at_the_token_that_closes_a_turn() {
    for (listed, template, end, learnt) in [
        (true, None, 0, vec![0]),
        (false, None, 0, vec![0]),
        // Two end tokens: generation would stop at the first.
        (true, Some("{% for m in messages %}{{ m.content + '<|endoftext|>' }}{% endfor %}<|pad|>"), 0, vec![0]),
        (false, Some("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"), 1, vec![1]),
        (false, Some("{% for m in messages %}{{ m.content + '<|pad|>\n' }}{% endfor %}"), 1, vec![1]),
    ] {
        let place = Place::new();
        write_base(&place, listed);
        let line = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " Yes."}]});
        place.write("one.jsonl", format!("{line}\n"));
        let files = ModelFiles::open(&place.path("base")).unwrap();
        let encoder = ModelEncoder::new(files.tokenizer()).unwrap();
        let path = Paths::One(place.path("one.jsonl"));
        let data = Data { path, chat_template: template.map(str::to_owned), ..Data::default() };
        let ends = ends_of_responses(&encoder, &data).unwrap();
        assert_eq!((ends[0], end_of_responses(&encoder, &data).unwrap()), (1, end), "{template:?}");
        assert!(ends.contains(&end));
        let (examples, _) = sft_examples(&data::load(&data).unwrap().entries, &encoder, &data, true).unwrap();
        let example = &examples[0];
        let special: Vec<u32> = example
            .tokens
            .iter()
            .zip(&example.loss_mask)
            .filter(|(id, mask)| **id < 2 && **mask)
            .map(|(id, _)| *id)
            .collect();
        assert_eq!((special, example.tokens.last()), (learnt.clone(), Some(&end)), "{template:?}");
        if template.is_none() {
            assert_eq!(files.tokenizer().ends(None), [1, 0], "listed or found in the template");
        }
    }
}

#[test]
fn what_a_chat_template_leaves_out_is_refused_or_counted() {
    let place = Place::new();
    write_base(&place, true);
    let line = json!({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]});
    place.write("one.jsonl", format!("{line}\n"));
    let files = ModelFiles::open(&place.path("base")).unwrap();
    let encoder = ModelEncoder::new(files.tokenizer()).unwrap();
    let read = |template: &str| {
        let path = Paths::One(place.path("one.jsonl"));
        let data = Data { path, chat_template: Some(template.to_owned()), ..Data::default() };
        sft_examples(&data::load(&data).unwrap().entries, &encoder, &data, true)
    };
    // Nothing of the response: there would be an end token to learn and no text.
    let nothing = "{% for m in messages %}{{ m.role + ': ' }}{% endfor %}<|endoftext|>";
    let refused = read(nothing).unwrap_err().to_string();
    assert!(refused.contains("line 1: the chat template writes nothing of the response, turn 2"), "{refused}");
    // The response, and nothing of the question.
    let answers = "{% for m in messages if m.role == 'assistant' %}{{ m.content + '<|endoftext|>' }}{% endfor %}";
    let (examples, report) = read(answers).unwrap();
    assert_eq!(examples.len(), 1);
    let remark = "whose last user turn is not in the text that the chat template writes";
    assert_eq!(report.remarks.get(remark), Some(&1), "{report:?}");
    // The end token behind the block that is learnt, and within it.
    for (block, outside) in [
        ("{% generation %}{{ m.content }}{% endgeneration %}<|endoftext|>", true),
        ("{% generation %}{{ m.content + '<|endoftext|>' }}{% endgeneration %}", false),
    ] {
        let template = format!(
            "{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% else %}}{block}{{% endif %}}\
             {{% endfor %}}"
        );
        let (examples, report) = read(&template).unwrap();
        assert_eq!(examples[0].loss_mask.last(), Some(&!outside), "{template}");
        let said =
            report.remarks.keys().any(|remark| remark.contains("outside of the chat template's {% generation %}"));
        assert_eq!(said, outside, "{report:?}");
    }
}
