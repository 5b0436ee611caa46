//! What is generated: the tokens, log-probabilities and texts of `generate` and of the policy's own passes, whole or in a stream.

use fourfold::model::batch::{Batch, Targets};
use fourfold::model::generate::{FinishReason, Response, SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::run::Model;
use fourfold::tokenizer::chat_template::{GenerationPrompt, Message};
use serde_json::{Value, json};

use super::{Client, ids, model, numbers, options, prompts, served, shipped};

fn sampling(model: &Model, temperature: f64, max_new_tokens: usize) -> SamplingParams {
    let stop = model.checkpoint.tokenizer().ends(None);
    SamplingParams { temperature, top_k: 0, top_p: 1.0, max_new_tokens, stop }
}

/// `generate`'s response to one prompt.
fn generated(model: &Model, adapter: Option<&str>, prompt: &[u32], seed: u64, sampling: &SamplingParams) -> Response {
    let adapter = adapter.map(|name| model.adapter(&shipped(name)).unwrap());
    let policy = Policy::new(&model.base, adapter.as_ref());
    generate(policy, &[prompt.to_vec()], &[seed], sampling, |_, _| {}).unwrap().remove(0)
}

/// What `[ppo.rollout] engine = "vllm"` and other clients of vLLM send for a response by token ids.
fn rollout(model: &str, prompt: &[u32], seed: u64, temperature: f64, stop: &[u32]) -> Value {
    json!({
        "model": model, "prompt": prompt, "max_tokens": 48, "n": 1, "temperature": temperature, "top_p": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": seed as i64, "logprobs": 1, "return_token_ids": true,
        "stream": false, "top_k": -1, "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0, "ignore_eos": true,
        "stop_token_ids": stop, "skip_special_tokens": false, "add_special_tokens": false,
    })
}

#[test]
fn a_response_by_ids_is_the_one_of_generate_for_its_seed() {
    let (_running, client) = served(options());
    let model = model();
    for (i, prompt) in prompts(6).iter().enumerate() {
        let (name, adapter) = [("base", None), ("actor", Some("actor")), ("sft", Some("sft"))][i % 3];
        let (temperature, seed) = ([1.0, 0.0][i % 2], u64::MAX - i as u64);
        let sampling = sampling(&model, temperature, 48);
        let want = generated(&model, adapter, prompt, seed, &sampling);
        let answer = client.ok("/v1/completions", &rollout(name, prompt, seed, temperature, &sampling.stop));
        let choice = &answer["choices"][0];
        assert_eq!(ids(&choice["token_ids"]), want.tokens);
        assert_eq!(numbers(&choice["logprobs"]["token_logprobs"]), want.logprobs, "every bit");
        assert_eq!(ids(&choice["prompt_token_ids"]), *prompt);
        let (reason, stop) = match want.finish {
            FinishReason::Stop => ("stop", json!(want.tokens.last())),
            FinishReason::Length => ("length", Value::Null),
        };
        assert_eq!((choice["finish_reason"].as_str().unwrap(), &choice["stop_reason"]), (reason, &stop));
        let (p, c) = (prompt.len(), want.tokens.len());
        assert_eq!(answer["usage"], json!({ "prompt_tokens": p, "completion_tokens": c, "total_tokens": p + c }));
        // vLLM's objects: one entry per token, the drawn one among the likely ones.
        let logprobs = &choice["logprobs"];
        for key in ["tokens", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[key].as_array().unwrap().len(), c, "{key}");
        }
        for (token, top) in
            logprobs["tokens"].as_array().unwrap().iter().zip(logprobs["top_logprobs"].as_array().unwrap())
        {
            assert!(top.get(token.as_str().unwrap()).is_some() && (1..=2).contains(&top.as_object().unwrap().len()));
        }
    }
}

#[test]
fn log_probabilities_are_the_policys_before_the_temperature_or_after_it() {
    let (model, prompt) = (model(), prompts(1).remove(0));
    let adapter = model.adapter(&shipped("actor")).unwrap();
    let policy = Policy::new(&model.base, Some(&adapter));
    for raw_logprobs in [true, false] {
        let (_running, client) = served(super::Options { raw_logprobs, ..options() });
        let mut body = rollout("actor", &prompt, 3, 0.6, &[]);
        body["max_tokens"] = 24.into();
        body["logprobs"] = 3.into();
        body["return_tokens_as_token_ids"] = true.into();
        let choice = client.ok("/v1/completions", &body)["choices"][0].clone();
        let tokens = ids(&choice["token_ids"]);
        let batch = Batch::new(&[[&prompt[..], &tokens].concat()]).unwrap();
        let targets = Targets::responses(&batch, &[tokens.len()]).unwrap();
        let want = policy.logprobs(&batch, &targets, if raw_logprobs { 1.0 } else { 0.6 }).unwrap();
        let found = numbers(&choice["logprobs"]["token_logprobs"]);
        assert!(
            found.len() == 24 && found.iter().zip(&want.logprobs).all(|(a, b)| (a - b).abs() < 1e-4),
            "{found:?} {want:?}"
        );
        // The most likely token leads, and three tokens have their own probabilities.
        for (i, (top, argmax)) in
            choice["logprobs"]["top_logprobs"].as_array().unwrap().iter().zip(&want.argmax).enumerate()
        {
            let top = top.as_object().unwrap();
            let best = top.values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
            assert_eq!(top[&format!("token_id:{argmax}")], json!(best as f32), "{top:?}");
            assert!((3..=4).contains(&top.len()) && top[&format!("token_id:{}", tokens[i])].is_number());
            assert!(top.values().map(|v| v.as_f64().unwrap().exp()).sum::<f64>() < 1.0 + 1e-5);
        }
    }
}

/// The responses that the chunks of a stream add up to, in the form of a whole answer's choices.
fn joined(chunks: &[Value], chat: bool) -> Vec<Value> {
    let mut choices: Vec<Value> = vec![];
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        choices.resize(choices.len().max(index + 1), json!({ "text": "" }));
        let of = &mut choices[index];
        assert!(of["finish_reason"].is_null(), "nothing follows the end: {choice}");
        let text = if chat { choice["delta"]["content"].as_str() } else { choice["text"].as_str() };
        of["text"] = format!("{}{}", of["text"].as_str().unwrap(), text.unwrap_or_default()).into();
        for key in ["finish_reason", "stop_reason"] {
            of[key] = choice[key].clone();
        }
        if let Some(more) = choice["token_ids"].as_array() {
            let mut all = of["token_ids"].as_array().cloned().unwrap_or_default();
            all.extend(more.clone());
            of["token_ids"] = all.into();
        }
        for (key, more) in choice["logprobs"].as_object().into_iter().flatten() {
            let mut all = of["logprobs"][key].as_array().cloned().unwrap_or_default();
            all.extend(more.as_array().unwrap().clone());
            of["logprobs"][key] = all.into();
        }
    }
    choices
}

/// The same of a whole answer.
fn whole(answer: &Value, chat: bool) -> Vec<Value> {
    let choices = answer["choices"].as_array().unwrap().iter().map(|choice| {
        let text = if chat { &choice["message"]["content"] } else { &choice["text"] };
        let mut of = json!({ "text": text });
        for key in ["finish_reason", "stop_reason", "token_ids", "logprobs"] {
            if !choice[key].is_null() || key.ends_with("reason") {
                of[key] = choice[key].clone();
            }
        }
        of
    });
    choices.collect()
}

#[test]
fn a_stream_adds_up_to_the_whole_answer() {
    let (_running, client) = served(options());
    let prompt = "\n\nHuman: How was the soup at the Blue Door?\n\nAssistant:";
    let messages = json!([{ "role": "user", "content": "How was the soup at the Blue Door?" }]);
    let shared = [
        json!({}),
        json!({ "n": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9 }),
        json!({ "stop": ["the", "zzz"], "n": 4, "return_token_ids": true }),
        json!({ "stop": "ou", "include_stop_str_in_output": true, "temperature": 2.0, "n": 2 }),
        json!({ "ignore_eos": true, "skip_special_tokens": false, "temperature": 3.0 }),
    ];
    for (i, more) in shared.iter().enumerate() {
        for chat in [false, true] {
            let mut body = match chat {
                true => json!({ "messages": messages, "logprobs": i % 2 == 0, "max_completion_tokens": 40 }),
                false => json!({ "prompt": [prompt, "The"], "max_tokens": 40 }),
            };
            if !chat && i % 2 == 0 {
                body["logprobs"] = 2.into();
            }
            body["model"] = "actor".into();
            body["seed"] = 11.into();
            more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
            let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
            let answer = client.ok(path, &body);
            body["stream"] = true.into();
            body["stream_options"] = json!({ "include_usage": true });
            let mut chunks = client.stream(path, &body);
            assert_eq!(chunks.pop().unwrap()["usage"], answer["usage"]);
            assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk["id"] == chunks[0]["id"]));
            let object = if chat { "chat.completion.chunk" } else { "text_completion" };
            assert!(chunks.iter().all(|chunk| chunk["object"] == object && chunk["model"] == "actor"));
            assert_eq!(joined(&chunks, chat), whole(&answer, chat), "{body}");
            let opened = chunks.iter().filter(|chunk| chunk["choices"][0]["delta"]["role"] == "assistant").count();
            let count = answer["choices"].as_array().unwrap().len();
            assert_eq!(opened, if chat { count } else { 0 });
            assert!(i > 0 || chunks.len() > 3 * count, "it comes in pieces");
        }
    }
}

#[test]
fn a_chat_is_the_response_to_the_models_own_template() {
    let (_running, client) = served(options());
    let model = model();
    let tokenizer = model.checkpoint.tokenizer();
    let turns =
        [("system", "Be brief."), ("user", "How was the soup?"), ("assistant", "Good."), ("user", "And the room?")];
    let messages: Vec<Message> = turns.iter().map(|(role, text)| Message::new(*role, *text)).collect();
    let text = tokenizer.apply_chat_template(&messages, GenerationPrompt::Add).unwrap();
    let prompt = tokenizer.encode(&text, fourfold::tokenizer::SpecialTokens::None).unwrap();
    let want = generated(&model, Some("sft"), &prompt, 5, &sampling(&model, 1.0, 256 - prompt.len()));
    let turn = |(role, text): &(&str, &str)| json!({ "role": role, "content": [{ "type": "text", "text": text }] });
    let body = json!({
        "model": "sft", "messages": turns.iter().map(turn).collect::<Vec<_>>(), "seed": 5, "return_token_ids": true,
        "logprobs": true, "top_logprobs": 2,
    });
    let answer = client.ok("/v1/chat/completions", &body);
    let choice = &answer["choices"][0];
    assert_eq!(ids(&answer["prompt_token_ids"]), prompt);
    assert_eq!(ids(&choice["token_ids"]), want.tokens);
    assert_eq!(
        choice["message"],
        json!({ "role": "assistant", "content": tokenizer.decode(&want.tokens).unwrap(), "refusal": null })
    );
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let found: Vec<f32> = content.iter().map(|entry| entry["logprob"].as_f64().unwrap() as f32).collect();
    assert_eq!(found, want.logprobs);
    for entry in content {
        let bytes = ids(&entry["bytes"]).into_iter().map(|byte| byte as u8).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), entry["token"].as_str().unwrap());
        let top: Vec<f64> =
            entry["top_logprobs"].as_array().unwrap().iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(top.len() == 2 && top[0] >= top[1] && top[0] >= entry["logprob"].as_f64().unwrap() - 1e-5);
    }
    // What the template gets beside the messages.
    let with = |more: Value| {
        let mut body =
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 1, "return_token_ids": true });
        more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
        ids(&client.ok("/v1/chat/completions", &body)["prompt_token_ids"])
    };
    assert!(with(json!({ "add_generation_prompt": false })).len() < with(json!({})).len());
}

fn texts(client: &Client, more: &Value) -> Vec<String> {
    let mut body =
        json!({ "model": "actor", "prompt": "\n\nHuman: How is the hotel?\n\nAssistant:", "max_tokens": 30 });
    more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
    let answer = client.ok("/v1/completions", &body);
    answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_sampling_parameter_is_honoured() {
    let (_running, client) = served(options());
    let of = |more: Value| texts(&client, &more);
    let greedy = of(json!({ "temperature": 0 }));
    assert_eq!(of(json!({ "top_k": 1, "seed": 3 })), greedy);
    assert_eq!(of(json!({ "top_p": 1e-9, "seed": 3 })), greedy);
    let seeded = of(json!({ "seed": 3, "n": 4 }));
    assert_eq!(of(json!({ "seed": 3 })), seeded[..1], "the first of several is that of one");
    assert!(seeded.iter().collect::<std::collections::BTreeSet<_>>().len() > 1, "{seeded:?}");
    assert_eq!(of(json!({ "seed": 3, "n": 4 })), seeded);
    let free = of(json!({ "n": 8, "temperature": 1.5 }));
    assert_ne!(free, of(json!({ "n": 8, "temperature": 1.5 })), "another seed for each request");
    // The default length is OpenAI's, an end is not in the text, and what follows it is.
    let answer = client.ok("/v1/completions", &json!({ "prompt": "The", "ignore_eos": true }));
    assert_eq!((&answer["usage"]["completion_tokens"], &answer["model"]), (&json!(16), &json!("base")));
    let stopped = of(json!({ "temperature": 0, "stop": [&greedy[0][4..7]] }));
    let at = greedy[0].find(&greedy[0][4..7]).unwrap();
    assert_eq!(stopped[0], greedy[0][..at]);
    let kept = of(json!({ "temperature": 0, "stop": [&greedy[0][4..7]], "include_stop_str_in_output": true }));
    assert_eq!(kept[0], greedy[0][..at + 3]);
    let long = json!({ "temperature": 0, "ignore_eos": true, "max_tokens": 60 });
    assert!(of(long.clone())[0].starts_with(&greedy[0]) && of(long)[0].len() > greedy[0].len());
    // Prompts of every form are the same prompt.
    let ids = model().checkpoint.tokenizer().encode("The soup", fourfold::tokenizer::SpecialTokens::None).unwrap();
    for prompt in [json!("The soup"), json!(["The soup"]), json!(ids), json!([ids])] {
        assert_eq!(
            of(json!({ "prompt": prompt, "temperature": 0 })),
            of(json!({ "prompt": "The soup", "temperature": 0 }))
        );
    }
    let two = of(json!({ "prompt": ["The soup", "A room"], "seed": 9, "n": 2 }));
    let alone = |prompt: &str| of(json!({ "prompt": prompt, "seed": 9, "n": 2 }));
    assert_eq!(two, [alone("The soup"), alone("A room")].concat(), "in the order of the prompts");
}

#[test]
fn texts_become_the_ids_that_prompts_become_and_ids_their_texts_again() {
    let (_running, client) = served(options());
    let model = model();
    let tokenizer = model.checkpoint.tokenizer();
    // What vLLM's benchmark client asks before it begins. A text longer than the context has its length, too.
    for (text, ends) in
        [("\n\nHuman: Hi, zoë!<|endoftext|>".to_owned(), true), ("word ".repeat(400), false), (String::new(), false)]
    {
        let body = json!({ "model": "actor", "prompt": text, "add_special_tokens": false, "return_token_strs": true });
        let answer = client.ok("/tokenize", &body);
        let want = tokenizer.encode(&text, fourfold::tokenizer::SpecialTokens::None).unwrap();
        assert_eq!(ids(&answer["tokens"]), want);
        assert_eq!((&answer["count"], &answer["max_model_len"]), (&json!(want.len()), &json!(256)));
        let strings = answer["token_strs"].as_array().unwrap();
        assert_eq!(strings.len(), want.len());
        assert_eq!(strings.last() == Some(&json!("<|endoftext|>")), ends);
        let back = client.ok("/detokenize", &json!({ "model": "reward", "tokens": want }));
        assert_eq!(back, json!({ "prompt": text }));
    }
    let messages = json!([{ "role": "user", "content": "How was the soup?" }]);
    let chat = json!({ "messages": messages, "max_tokens": 1, "return_token_ids": true });
    let read = ids(&client.ok("/v1/chat/completions", &chat)["prompt_token_ids"]);
    let answer = client.ok("/tokenize", &json!({ "messages": messages }));
    assert_eq!((ids(&answer["tokens"]), &answer["token_strs"]), (read.clone(), &Value::Null));
    let closed = client.ok("/tokenize", &json!({ "messages": messages, "add_generation_prompt": false }));
    assert!(ids(&closed["tokens"]).len() < read.len());
    for (path, body, status, said) in [
        ("/tokenize", json!({}), 400, "either prompt or messages"),
        ("/tokenize", json!({ "prompt": "a", "messages": messages }), 400, "either prompt or messages"),
        ("/tokenize", json!({ "prompt": [1] }), 400, "expected a string"),
        ("/tokenize", json!({ "prompt": "a", "model": "nobody" }), 404, "nobody"),
        ("/detokenize", json!({ "tokens": [1024] }), 400, "below 1024"),
        ("/detokenize", json!({ "tokens": "a" }), 400, "expected a list"),
        ("/detokenize", json!({}), 400, "tokens"),
    ] {
        let (found, answer) = client.post(path, &body);
        assert!(
            found == status && answer["error"]["message"].as_str().unwrap().contains(said),
            "{path} {body}: {answer}"
        );
    }
}
