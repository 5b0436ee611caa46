//! Input that cannot be used: one `error:` line on stderr that names it and says what to do, exit code 2, and nothing
//! made or changed on disk. cli_contract.rs has the commands at work.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fourfold::config;
use fourfold::config::Stage;

use crate::support::Place;
use serde_json::{Value, json};

/// Every file below `dir` with its length, so that a leftover or a changed file is seen.
fn listing(dir: &Path) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        found.insert(entry.path().display().to_string(), entry.metadata().unwrap().len());
        if entry.path().is_dir() {
            found.append(&mut listing(&entry.path()));
        }
    }
    found
}

impl Place {
    /// Runs words that must be refused with all of `says` in the message, nothing on stdout, and no file touched.
    fn refuses(&self, line: &str, says: &[&str]) {
        self.refuses_args(&line.split_whitespace().collect::<Vec<_>>(), says);
    }

    fn refuses_args(&self, args: &[&str], says: &[&str]) {
        let before = listing(&self.path(""));
        let ran = self.run_with(args, "");
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{args:?}: {}", ran.stderr);
        let errors: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.ends_with(&format!("{}\n", errors[0])), "one line, at the end: {}", ran.stderr);
        for say in says {
            assert!(errors[0].contains(say), "{args:?}: no {say:?} in {}", errors[0]);
        }
        assert_eq!(listing(&self.path("")), before, "{args:?} left something or took something away");
    }

    /// `generate` over a base.
    fn refuses_base(&self, base: &str, says: &[&str]) {
        self.refuses_args(&["generate", "--base", base, "--prompt", "x"], says);
    }

    /// Copies a folder of files.
    fn copy(&self, from: &str, to: &str) {
        fs::create_dir_all(self.path(to)).unwrap();
        for entry in fs::read_dir(self.path(from)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), self.path(to).join(entry.file_name())).unwrap();
        }
    }

    /// Overwrites the first bytes of one tensor in a safetensors file.
    fn poke(&self, file: &str, tensor: &str, with: &[u8]) {
        let mut bytes = fs::read(self.path(file)).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let names: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let at = 8 + header + names[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[at..at + with.len()].copy_from_slice(with);
        self.write(file, bytes);
    }

    fn cut(&self, file: &str, keep: usize) {
        let bytes = fs::read(self.path(file)).unwrap();
        self.write(file, &bytes[..keep]);
    }
}

#[test]
fn a_path_that_is_no_model_is_named() {
    let p = Place::new();
    p.refuses_base("nowhere", &["nowhere", "Hugging Face directory or a .gguf file"]);
    fs::create_dir(p.path("empty")).unwrap();
    p.refuses_base("empty", &["empty has no config.json", ".gguf"]);
    p.refuses_base("base/model.safetensors", &["give the directory"]);
    p.refuses_base("run.toml", &["run.toml is no model; give a Hugging Face directory or a .gguf file"]);
    p.refuses("inspect nowhere --json", &["nowhere"]);
    p.refuses("sft run.toml --set base.path=nowhere --out o", &["nowhere"]);
    p.copy("base", "half");
    fs::remove_file(p.path("half/tokenizer.json")).unwrap();
    p.refuses_base("half", &["half", "no tokenizer.json"]);
}

#[test]
fn a_truncated_safetensors_file_is_refused_wherever_it_ends() {
    let p = Place::new();
    let whole = fs::metadata(p.path("base/model.safetensors")).unwrap().len() as usize;
    for keep in [1, 7, 8, 100, 4000, whole / 2, whole - 1] {
        p.copy("base", "cut");
        p.cut("cut/model.safetensors", keep);
        p.refuses_base("cut", &["cut/model.safetensors is not a whole safetensors file", "fetch it again"]);
    }
    p.copy("base", "cut");
    p.write("cut/model.safetensors", "");
    p.refuses_base("cut", &["cut/model.safetensors is empty"]);
}

/// A GGUF of three small tensors, enough to be described.
fn gguf() -> Vec<u8> {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let string = |key: &str, value: &str| [text(key), 8u32.to_le_bytes().to_vec(), text(value)].concat();
    let number =
        |key: &str, value: u32| [text(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat();
    let list = |key: &str, kind: u32, n: usize, items: Vec<u8>| {
        let head = [9u32.to_le_bytes(), kind.to_le_bytes()].concat();
        [text(key), head, (n as u64).to_le_bytes().to_vec(), items].concat()
    };
    let tokens = ["a", "b", "ab", "<end>"].map(text).concat();
    let kinds = [1i32, 1, 1, 3].map(i32::to_le_bytes).concat();
    let keys = [
        string("general.architecture", "llama"),
        number("llama.block_count", 1),
        number("llama.context_length", 64),
        number("llama.embedding_length", 8),
        number("llama.feed_forward_length", 4),
        number("llama.attention.head_count", 2),
        [text("llama.attention.layer_norm_rms_epsilon"), [6u32.to_le_bytes(), 1e-6f32.to_le_bytes()].concat()].concat(),
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "smollm"),
        list("tokenizer.ggml.tokens", 8, 4, tokens),
        list("tokenizer.ggml.token_type", 5, 4, kinds),
        list("tokenizer.ggml.merges", 8, 1, text("a b")),
        number("tokenizer.ggml.eos_token_id", 3),
    ];
    let (mut table, mut data) = (vec![], vec![]);
    for (name, shape) in [("token_embd.weight", &[8u64, 4][..]), ("output_norm.weight", &[8])] {
        table.extend(text(name));
        table.extend((shape.len() as u32).to_le_bytes());
        table.extend(shape.iter().flat_map(|d| d.to_le_bytes()));
        table.extend([&0u32.to_le_bytes()[..], &(data.len() as u64).to_le_bytes()].concat());
        data.extend(vec![0u8; 4 * shape.iter().product::<u64>() as usize]);
    }
    let mut out = [&b"GGUF\x03\0\0\0"[..], &2u64.to_le_bytes(), &(keys.len() as u64).to_le_bytes()].concat();
    out.extend(keys.concat());
    out.extend(table);
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}

#[test]
fn a_truncated_gguf_is_refused_wherever_it_ends() {
    let p = Place::new();
    let whole = gguf();
    p.write("m.gguf", &whole);
    let ran = p.run("inspect m.gguf --json");
    assert_eq!(ran.code, 0, "the whole file is good: {}", ran.stderr);
    p.refuses_base("m.gguf", &["tensor model.layers.0", "missing"]);
    for keep in (1..whole.len()).step_by(97).chain([whole.len() - 1]) {
        p.write("m.gguf", &whole[..keep]);
        p.refuses("inspect m.gguf", &["m.gguf"]);
        p.refuses_base("m.gguf", &["m.gguf"]);
    }
    p.write("m.gguf", "");
    p.refuses_base("m.gguf", &["m.gguf is empty"]);
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let p = Place::new();
    p.train_sft_and_reward();
    // Other shapes: four blocks in the adapter, and three, or another width, in the base.
    p.copy("base", "shallow");
    let config = fs::read_to_string(p.path("base/config.json")).unwrap();
    let shallow = config.replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3");
    assert_ne!(shallow, config);
    p.write("shallow/config.json", shallow);
    let with = |base: &str, adapter: &str| format!("generate --base {base} --prompt x --adapter {adapter}");
    p.refuses(&with("shallow", "out/sft/adapter"), &["out/sft/adapter", "layers.3", "another base"]);
    // The same shapes over other weights.
    p.copy("base", "other");
    p.poke("other/model.safetensors", "model.layers.0.mlp.up_proj.weight", &[0x80, 0x3f]);
    let says = ["out/sft/adapter", "another base", "the shapes agree, the weights do not"];
    p.refuses(&with("other", "out/sft/adapter"), &says);
    p.refuses("merge --base other --adapter out/sft/adapter --out m", &says);
    let reward = "reward run.toml --set data.path=pairs.jsonl --set base.path=other --out o";
    p.refuses(reward, &["[reward] adapter", "another base"]);
    // None at all.
    p.refuses(&with("base", "nowhere"), &["nowhere/adapter_config.json", "PEFT"]);
    let ppo = "ppo run.toml --set data.path=prompts.jsonl --out o";
    p.refuses(&format!("{ppo} --set ppo.reward_adapter=nowhere"), &["[ppo] reward_adapter", "nowhere"]);
    p.refuses(&format!("{ppo} --set ppo.adapter=nowhere"), &["[ppo] adapter", "nowhere"]);
}

#[test]
fn an_adapter_without_head_cannot_score() {
    let p = Place::new();
    p.train_sft_and_reward();
    let says = ["out/sft/adapter", "no scalar head", "fourfold reward"];
    p.refuses("score --base base --adapter out/sft/adapter --data pairs.jsonl", &says);
    let ppo = "ppo run.toml --set data.path=prompts.jsonl --set ppo.reward_adapter=out/sft/adapter --out o";
    p.refuses(ppo, &[&says[..], &["[ppo] reward_adapter"]].concat());
}

#[test]
fn a_damaged_adapter_is_refused() {
    let p = Place::new();
    p.train_sft_and_reward();
    let file = "bad/adapter_model.safetensors";
    let with = "generate --base base --prompt x --adapter bad";
    p.copy("out/sft/adapter", "bad");
    p.poke(file, "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight", &f32::NAN.to_le_bytes());
    p.refuses(with, &[file, "layers.2.mlp.up_proj.lora_B.weight holds NaN", "diverged"]);
    for keep in [0, 5, 3000] {
        p.copy("out/sft/adapter", "bad");
        p.cut(file, keep);
        p.refuses(with, &[file, "truncated or damaged"]);
    }
    p.copy("out/sft/adapter", "bad");
    p.write("bad/adapter_config.json", "{");
    p.refuses(with, &["bad/adapter_config.json"]);
    p.copy("out/reward/adapter", "bad");
    p.poke(file, "base_model.model.score.weight", &f32::INFINITY.to_le_bytes());
    p.refuses("score --base base --adapter bad --data pairs.jsonl", &[file, "score.weight holds inf"]);
}

#[test]
fn a_base_with_nan_is_found_when_it_is_opened_and_the_tensor_is_named() {
    let p = Place::new();
    let nan = [0xc0, 0x7f]; // bf16
    for tensor in [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.embed_tokens.weight",
    ] {
        p.copy("base", "spoiled");
        p.poke("spoiled/model.safetensors", tensor, &nan);
        let says = ["spoiled: tensor", tensor, "holds NaN or infinite numbers"];
        p.refuses_base("spoiled", &says);
        p.refuses("sft run.toml --set base.path=spoiled --out o", &says);
        p.write("ids.json", json!({"input_ids": [[5, 6, 7]]}).to_string());
        p.refuses("logprobs --base spoiled --tokens ids.json --json", &says);
    }
}

#[test]
fn data_that_cannot_be_used_is_named_with_its_line() {
    let p = Place::new();
    p.train_sft_and_reward();
    p.write("empty.jsonl", "");
    p.write("broken.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\n");
    p.write("wrong.jsonl", "{\"question\": \"a\"}\n");
    p.write("table.xlsx", "a,b\n");
    let sft = |data: &str| format!("sft run.toml --set data.path={data} --out o");
    p.refuses(&sft("empty.jsonl"), &["empty.jsonl", "holds no record"]);
    p.refuses(&sft("broken.jsonl"), &["broken.jsonl, line 2", "not a JSON object"]);
    p.refuses(&sft("wrong.jsonl"), &["wrong.jsonl, line 1", "question"]);
    p.refuses(&sft("table.xlsx"), &["table.xlsx", ".jsonl"]);
    p.refuses(&sft("nowhere.jsonl"), &["[data] path nowhere.jsonl"]);
    p.refuses("reward run.toml --out o", &["sft.jsonl, line 1", "chosen"]);
    let score = |data: &str| format!("score --base base --adapter out/reward/adapter --data {data} --json");
    p.refuses(&score("empty.jsonl"), &["empty.jsonl", "holds no record"]);
    p.refuses(&score("broken.jsonl"), &["broken.jsonl, line 2"]);
    p.refuses(&score("prompts.jsonl"), &["prompts.jsonl, line 1", "no response to score", "prompt_only"]);
    let long = ["pairs.jsonl, line 1", "longer than --max-length 3", "--on-long cut or skip"];
    p.refuses(&score("pairs.jsonl --max-length 3 --on-long error"), &long);
    p.refuses(&score("pairs.jsonl --out run.toml"), &["--out run.toml exists"]);
    p.refuses(
        &score("pairs.jsonl --max-length 3"),
        &["pairs.jsonl", "6 records, 0 scored", "longer than --max-length 3"],
    );
}

#[test]
fn a_config_that_cannot_be_used_names_the_key() {
    let p = Place::new();
    p.refuses("sft nowhere.toml", &["nowhere.toml", "TOML file"]);
    p.write("bad.toml", "[base\n");
    let ran = p.run("sft bad.toml --out o");
    // TOML's own message shows the line and points into it.
    assert!(ran.code == 2 && ran.stderr.starts_with("error: bad.toml: TOML parse error at line 1"), "{}", ran.stderr);
    let with = |extra: &str| fs::read_to_string(p.path("run.toml")).unwrap() + extra;
    for (extra, says) in [
        ("kl_ceof = 0.1\n", ["[ppo] has no key \"kl_ceof\"", "did you mean \"kl_coef\"?"]),
        ("[quantum]\nr = 1\n", ["there is no section [quantum]", "\"lora\""]),
        ("top_k = \"many\"\n", ["[ppo] top_k must be a whole number", "the string \"many\""]),
        ("kl_estimator = \"k9\"\n", ["[ppo] kl_estimator = \"k9\"", "\"k1\", \"k2\", \"k3\", \"exact\""]),
        ("cliprange = 2.0\n", ["[ppo] cliprange = 2", "use a number between 0 and 1"]),
        ("num_mini_batches = 3\n", ["[ppo] batch_size = 4 is not a multiple of num_mini_batches = 3", "try 3 or 6"]),
    ] {
        p.write("changed.toml", with(extra));
        p.refuses("ppo changed.toml --out o", &[&["changed.toml"], &says[..]].concat());
    }
    p.refuses("sft run.toml --set lora.r=x --out o", &["--set lora.r=x", "whole number"]);
    p.refuses("sft run.toml --set lora --out o", &["--set lora", "section.key=value"]);
    p.refuses("sft run.toml --set lora.r=100000 --out o", &["r = 100000", "1024"]);
    p.refuses("sft run.toml --set data.eval_rows=6 --out o", &["eval_rows = 6", "use fewer"]);
    p.refuses("sft run.toml --set lora.layers_to_transform=[9] --out o", &["9"]);
}

#[test]
fn a_cache_in_q8_0_is_refused_where_there_is_none() {
    let p = Place::new();
    let on_cpu = ["kv_cache_type = \"q8_0\" is for cards", "remove it, or use device = \"cuda\""];
    let base = "--base base --device cpu --kv-cache-type q8_0";
    p.refuses(&format!("generate --prompt x {base}"), &on_cpu);
    p.refuses(&format!("chat {base}"), &on_cpu);
    p.refuses(&format!("serve --port 0 {base}"), &on_cpu);
    let set = "--set base.kv_cache_type=\"q8_0\"";
    p.refuses(&format!("plan run.toml --phase ppo --device cpu {set}"), &on_cpu);
    p.refuses(&format!("sft run.toml --out o --device cpu {set}"), &on_cpu);
    let with = |extra: &str| fs::read_to_string(p.path("run.toml")).unwrap().replace("[lora]", extra);
    p.write("reward.toml", with("[reward_base]\npath = \"other\"\nkv_cache_type = \"q8_0\"\n[lora]"));
    p.refuses("ppo reward.toml --out o", &["[reward_base] kv_cache_type has no effect", "write it in [base]"]);
    // Over the policy's own checkpoint as well, where it would make a second base of it.
    p.write("reward.toml", with("[reward_base]\npath = \"base\"\nkv_cache_type = \"q8_0\"\n[lora]"));
    p.refuses("ppo reward.toml --out o", &["[reward_base] kv_cache_type has no effect", "write it in [base]"]);
    p.write("four.toml", with("kv_cache_type = \"q4_0\"\n[lora]"));
    p.refuses("ppo four.toml --out o", &["kv_cache_type = \"q4_0\"", "\"auto\"", "\"q8_0\""]);
}

#[test]
fn a_cache_that_nothing_is_generated_with_is_told() {
    let at = |keys: &str, more: &str| {
        let text = format!("[base]\npath = 'b'\n{keys}[data]\npath = 'd'\n{more}");
        config::from_text(&text, "test").unwrap().idle_keys(Stage::Distill)
    };
    let q8_0 = "kv_cache_type = 'q8_0'\n";
    for (keys, is_told) in [("", true), ("seq_kd = true", false), ("seq_kd = true\nlmbda = 1.0", true)] {
        let told = at("", &format!("[teacher]\npath = 'other'\n{q8_0}[distill]\n{keys}\n"));
        let says = told.iter().any(|line| line.starts_with("[teacher] kv_cache_type has no effect"));
        assert_eq!(says, is_told, "{keys}: {told:?}");
    }
    assert!(at(q8_0, "[teacher]\npath = 'b'\n[distill]\n").is_empty(), "one base for both roles");
    for (keys, rows, is_told) in [("", 0, false), ("lmbda = 0.0", 4, false), ("lmbda = 0.0", 0, true)] {
        let told = at(q8_0, &format!("eval_rows = {rows}\n[teacher]\npath = 'other'\n[distill]\n{keys}\n"));
        let says = told.iter().any(|line| line.starts_with("[base] kv_cache_type has no effect on distill"));
        assert_eq!(says, is_told, "{keys} {rows}: {told:?}");
    }
}

#[test]
fn what_does_not_fit_the_context_is_refused_before_anything_is_made() {
    let p = Place::new();
    p.train_sft_and_reward();
    let long = "hello ".repeat(400);
    p.refuses_args(&["generate", "--base", "base", "--prompt", &long], &["tokens leaves no room", "256", "shorten"]);
    let ppo = "ppo run.toml --out o";
    let short = format!("{ppo} --set data.path=prompts.jsonl --set ppo.response_length=250");
    p.refuses(&short, &["response_length = 250", "context of 256", "lower"]);
    p.write("long.jsonl", format!("{0}\n{0}\n{0}\n", json!({ "prompt": long })));
    p.refuses(&format!("{ppo} --set data.path=long.jsonl"), &["longer than max_prompt_length = 256"]);
    let raised = format!("{ppo} --set data.path=long.jsonl --set data.max_prompt_length=5000");
    p.refuses(&raised, &["context of 256", "max_prompt_length"]);
    let record = json!({"prompt": "a", "completion": long});
    p.write("long.jsonl", format!("{record}\n{record}\n{record}\n"));
    let sft = "sft run.toml --set data.path=long.jsonl --set data.max_length=5000 --out o";
    p.refuses(sft, &["context of 256", "max_length = 256"]);
    let record = json!({"prompt": "a", "chosen": long, "rejected": "b"});
    p.write("long.jsonl", format!("{record}\n{record}\n{record}\n"));
    p.refuses(&sft.replace("sft run", "reward run"), &["context of 256", "max_length = 256"]);
}

#[test]
fn a_folder_that_is_not_ours_stays_untouched() {
    let p = Place::new();
    p.train_sft_and_reward();
    fs::create_dir(p.path("mine")).unwrap();
    p.write("mine/notes.txt", "keep me");
    // A config of the user's own does not make the folder ours.
    p.write("mine/config.toml", fs::read(p.path("run.toml")).unwrap());
    p.refuses("sft run.toml --out mine", &["mine exists", "--out"]);
    p.refuses("sft mine/config.toml --out mine", &["mine exists", "--out"]);
    p.refuses("quickstart --out mine", &["mine exists", "--out"]);
    p.refuses("sft run.toml --out run.toml", &["run.toml exists", "--out"]);
    p.refuses("merge --base base --adapter out/sft/adapter --out mine", &["mine already exists", "--out"]);
    assert_eq!(fs::read_to_string(p.path("mine/notes.txt")).unwrap(), "keep me");
    // Another stage's run is somebody's result as well.
    let reward = "reward run.toml --set data.path=pairs.jsonl --out out/sft";
    p.refuses(reward, &["out/sft holds a run of `fourfold sft`", "--out"]);
}

#[test]
fn tokens_that_cannot_be_scored_are_named() {
    let p = Place::new();
    let logprobs = "logprobs --base base --tokens ids.json --json";
    p.refuses(logprobs, &["ids.json"]);
    for (content, says) in [
        ("{\"input_ids\": [[1, 2], [1, 1024]]}".to_string(), "input_ids[1] holds 1024, past the vocabulary of 1024"),
        ("{\"input_ids\": [[1, -2]]}".into(), "-2"),
        ("{\"input_ids\": [[1]]}".into(), "at least two tokens"),
        ("{\"input_ids\": []}".into(), "at least two tokens"),
        ("{\"ids\": [[1, 2]]}".into(), "\"input_ids\""),
        ("[[1, 2]".into(), "\"input_ids\""),
        (json!({"input_ids": [[1, 2], vec![5; 257]]}).to_string(), "input_ids[1] has 257 tokens"),
    ] {
        p.write("ids.json", content);
        p.refuses(logprobs, &["ids.json", says]);
    }
    p.write("ids.json", json!({"input_ids": [vec![5; 256]]}).to_string());
    assert_eq!(p.run(logprobs).code, 0, "a sequence may fill the context");
}

#[test]
fn arguments_out_of_range_are_named() {
    let p = Place::new();
    for (more, says) in [
        ("--temperature -1", "--temperature = -1"),
        ("--temperature nan", "--temperature = NaN"),
        ("--top-p 0", "--top-p = 0"),
        ("--top-p 1.5", "--top-p = 1.5"),
        ("--max-new-tokens 0", "--max-new-tokens = 0"),
    ] {
        p.refuses(&format!("generate --base base --prompt x {more}"), &[says]);
    }
    p.refuses_args(&["generate", "--base", "base", "--raw", "--prompt", ""], &["the prompt is empty"]);
}
