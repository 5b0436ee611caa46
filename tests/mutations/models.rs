//! Models, tokenizers, templates and adapters.

use std::fs;
use std::path::Path;

use anyhow::Result;
use fourfold::config;
use fourfold::config::Stage;
use fourfold::data::stream::ids;
use fourfold::model::adapter::LinearShapes;
use fourfold::model::adapter::{Adapter, LoraConfig, TargetModules};
use fourfold::model::block::Recompute;
use fourfold::model::config::DecoderConfig;
use fourfold::model_files::inspect;
use fourfold::ops::weight::{ComputeDtype, StorageDType};
use fourfold::planner::passes;
use fourfold::planner::plan::Plan;
use fourfold::planner::simulate::shape::{Branches, Network};
use fourfold::planner::simulate::stages::StageShape;
use fourfold::run::Model;
use fourfold::tokenizer::chat_template::{GenerationPrompt, Message, TemplateTokens, render};
use fourfold::tokenizer::{SpecialTokens, Tokenizer};

use crate::campaign::{Reader, Specimen, campaign};
use crate::mutate::Form;
use crate::specimens::{FAMILIES, Files, TEMPLATE, gguf, golden, model, tokenizers};

fn of(files: Files, target: &str, form: Form) -> Specimen {
    let target = files.iter().position(|(name, _)| name == target).unwrap();
    Specimen { files, target, form }
}

fn families(names: &[&str], target: &str, form: Form, sharded: bool) -> Vec<Specimen> {
    names.iter().map(|name| of(model(name, sharded), target, form)).collect()
}

/// A model as every command opens it, which takes a token through it; then a look as `inspect` takes it.
fn open(dir: &Path, name: &str) -> Result<()> {
    let path = if name.ends_with(".gguf") { dir.join(name) } else { dir.to_owned() };
    let opened = Model::open(&path)?;
    encode(opened.checkpoint.tokenizer())?;
    inspect::inspect(&path).map(drop)
}

const TEXT: &str = "It's 3.14\n\n  naïve 東京 🦙 ab t1 t63 <|im_end|>";

/// A tokenizer at work; a text or a dialogue that it refuses is a refusal of the file.
fn encode(tokenizer: &Tokenizer) -> Result<()> {
    let ids = tokenizer.encode(TEXT, SpecialTokens::Add)?;
    tokenizer.bulk().encode(TEXT)?;
    tokenizer.decode(&ids)?;
    if tokenizer.chat_template().is_some() {
        let turns = [Message::new("user", "a\n\"é\""), Message::new("assistant", "b")];
        tokenizer.apply_chat_template(&turns, GenerationPrompt::Add)?;
    }
    Ok(())
}

#[test]
fn weights_in_safetensors_are_read_or_refused() {
    campaign("models::weights_in_safetensors_are_read_or_refused", || {
        let names = ["llama_yarn_bias", "gemma3", "gpt2", "phi3", "opt_350m"];
        Reader::new(families(&names, "model.safetensors", Form::Safetensors, false), open)
    });
}

#[test]
fn an_index_of_shards_is_read_or_refused() {
    campaign("models::an_index_of_shards_is_read_or_refused", || {
        let names = ["llama_yarn_bias", "qwen3"];
        Reader::new(families(&names, "model.safetensors.index.json", Form::Json, true), open)
    });
}

#[test]
fn configurations_of_every_family_are_read_or_refused() {
    campaign("models::configurations_of_every_family_are_read_or_refused", || {
        Reader::new(families(&FAMILIES, "config.json", Form::Json, false), open)
    });
}

/// A bare config.json, as `plan` takes it: every size in it goes through the walk's sums.
#[test]
fn configurations_without_weights_are_planned_or_refused() {
    campaign("models::configurations_without_weights_are_planned_or_refused", || {
        let specimens = FAMILIES.iter().map(|name| {
            let files = model(name, false).into_iter().filter(|(file, _)| file == "config.json").collect();
            of(files, "config.json", Form::Json)
        });
        Reader::new(specimens.collect(), |dir, name| {
            let text = fs::read_to_string(dir.join(name)).map_err(|e| fourfold::invalid!("{name}: {e}"))?;
            let decoder = DecoderConfig::from_hf(&text, None, name)?;
            let context = decoder.max_position_embeddings;
            let policy = Network::planned(decoder, StorageDType::F32, None, ComputeDtype::F32)?;
            let lora = LoraConfig { target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
            let branches = Branches::of(&lora, &policy)?;
            let settings = dir.join("run.toml");
            fs::write(&settings, "[base]\npath = \"b\"\n")?;
            let settings = config::load(&settings, &[])?;
            let job = StageShape {
                on_device: None,
                work: passes::full_length(Stage::Sft, &settings, context, 2, 1)?,
                reward: branches.clone().with_head(),
                branches,
                policy,
                scorer: None,
                checkpoint: Recompute::Off,
                data: 0,
                process: 0,
                threads: 2,
            };
            let (_, peak) = Plan::of(job)?.peak();
            assert!(peak.own() > 0, "nothing at all is held");
            Ok(())
        })
    });
}

#[test]
fn token_ids_are_read_or_refused() {
    campaign("models::token_ids_are_read_or_refused", || {
        let texts = [r#"{"input_ids": [[1, 2, 3], [63, 0]]}"#, "{\n \"input_ids\" : [ [5,6] ] }\n"];
        let specimens = texts.map(|text| Specimen::file("ids.json", text, Form::Json));
        Reader::new(specimens.into(), |dir, name| {
            let path = dir.join(name);
            ids::check(&path, &ids::read(&path)?, 64, 32)
        })
    });
}

#[test]
fn generation_configurations_are_read_or_refused() {
    campaign("models::generation_configurations_are_read_or_refused", || {
        Reader::new(families(&["llama_yarn_bias", "gemma"], "generation_config.json", Form::Json, false), open)
    });
}

#[test]
fn gguf_files_are_read_or_refused() {
    campaign("models::gguf_files_are_read_or_refused", || {
        let kinds = [
            ("llama-bpe", StorageDType::F32, true),
            ("qwen2", StorageDType::Q8_0, false),
            ("spm", StorageDType::Q4_1, false),
            ("llama-bpe", StorageDType::BF16, false),
        ];
        let file =
            |(tokenizer, dtype, rope)| Specimen::file("m.gguf", gguf(tokenizer, dtype, rope, TEMPLATE), Form::Binary);
        Reader::new(kinds.map(file).into(), open)
    });
}

fn tokenizer(dir: &Path, _: &str) -> Result<()> {
    encode(&Tokenizer::from_dir(dir)?)
}

#[test]
fn tokenizers_are_read_or_refused() {
    campaign("models::tokenizers_are_read_or_refused", || {
        Reader::new(tokenizers().into_iter().map(|files| of(files, "tokenizer.json", Form::Json)).collect(), tokenizer)
    });
}

#[test]
fn tokenizer_configurations_are_read_or_refused() {
    campaign("models::tokenizer_configurations_are_read_or_refused", || {
        let mut specimens: Vec<Specimen> =
            tokenizers().into_iter().map(|files| of(files, "tokenizer_config.json", Form::Json)).collect();
        let mut files = tokenizers().remove(4);
        files.retain(|(name, _)| name != "tokenizer_config.json");
        let map = r#"{"eos_token": {"content": "<e>", "lstrip": false}, "bos_token": "<s>", "additional": []}"#;
        files.push(("special_tokens_map.json".into(), map.into()));
        specimens.push(of(files, "special_tokens_map.json", Form::Json));
        Reader::new(specimens, tokenizer)
    });
}

/// What the golden templates do not use: macros, tool lists, dates, filters, nested loops.
const TEMPLATE_OF_ALL_SORTS: &str = r#"{%- macro turn(m, last=false) -%}
{{ '<|' ~ m['role'] | upper ~ '|>' }}{{ m.content | trim | replace('"', "'") }}{{ eos_token if not last }}
{%- endmacro -%}
{%- set ns = namespace(seen=0, text='') -%}
{{ bos_token }}{{ strftime_now('%d %b %Y') }}
{% for m in messages if m.role != 'system' -%}
{%- set ns.seen = ns.seen + 1 -%}
{%- for word in m.content.split(' ')[:3] %}{% set ns.text = ns.text + word + loop.index | string %}{% endfor -%}
{% generation %}{{ turn(m, last=loop.last) }}{% endgeneration %}
{%- if loop.index0 > 90 %}{% break %}{% elif m.content is string and m.content.startswith('x') %}{% continue %}{% endif %}
{% endfor %}{{ ns.text | length }}{{ messages[1:] | tojson(indent=2) }}{{ {'a': [1, 2.5, none, true]} | tojson }}
{%- if add_generation_prompt and not tools and messages | length > 1 %}{{ '<|A|>' * 2 }}{% endif %}
{%- if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif -%}"#;

#[test]
fn chat_templates_are_rendered_or_refused() {
    campaign("models::chat_templates_are_rendered_or_refused", || {
        let golden: serde_json::Value =
            serde_json::from_slice(&fs::read(golden("chat_template.json")).unwrap()).unwrap();
        let mut texts = vec![TEMPLATE_OF_ALL_SORTS.to_owned()];
        for case in golden["cases"].as_array().unwrap() {
            let template = case["template"].as_str().unwrap().to_owned();
            let is_new = case["text"].is_string() && !texts.contains(&template);
            texts.extend(Some(template).filter(|_| is_new));
        }
        assert!(texts.len() > 3, "{}", texts.len());
        let specimens = texts.into_iter().map(|text| Specimen::file("chat_template.jinja", text, Form::Text));
        Reader::new(specimens.collect(), |dir, name| {
            // As `Tokenizer::from_dir` reads the file.
            let template =
                fs::read_to_string(dir.join(name)).map_err(|e| fourfold::invalid!("{name} cannot be read: {e}"))?;
            let turns = [("system", "Be brief."), ("user", "a\n\"é\" x y"), ("assistant", "b"), ("user", "c")];
            let turns = turns.map(|(role, text)| Message::new(role, text));
            let tokens = TemplateTokens { bos: Some("<s>"), eos: Some("</s>") };
            for prompt in [GenerationPrompt::Add, GenerationPrompt::None] {
                render(&template, &turns, prompt, tokens)?;
            }
            render(&template, &turns[1..], GenerationPrompt::Add, tokens).map(drop)
        })
    });
}

fn adapters(target: &str, form: Form) -> Vec<Specimen> {
    let mut all = vec![];
    for name in ["peft_tiny/lm", "peft_tiny/rm"] {
        let files = ["adapter_config.json", "adapter_model.safetensors"];
        let read = |file: &str| (file.to_owned(), fs::read(golden(name).join(file)).unwrap());
        all.push(of(files.map(read).into(), target, form));
    }
    all
}

/// The first adapter by patterns, which its own config does without.
fn by_patterns() -> Specimen {
    let mut specimen = adapters("adapter_config.json", Form::Json).remove(0);
    let config = &mut specimen.files[specimen.target].1;
    let mut value: serde_json::Value = serde_json::from_slice(config).unwrap();
    let names: Vec<&str> = value["target_modules"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    let pattern = format!(r".*\.(layers\.\d+)\..*({})", names.join("|"));
    let (r, alpha) = (value["r"].clone(), value["lora_alpha"].clone());
    value["target_modules"] = pattern.into();
    value["rank_pattern"] = serde_json::json!({r"layers\.[01]\..*": r});
    value["alpha_pattern"] = serde_json::json!({r"^.*layers\.1\..*(q|v)_proj$": alpha});
    *config = value.to_string().into_bytes();
    specimen
}

fn adapter(dir: &Path, _: &str) -> Result<()> {
    /// The shapes of tests/golden/peft_tiny.py.
    const TINY: LinearShapes = LinearShapes::llama(2, 32, 32, 16, 48);
    Adapter::load(dir, TINY)?;
    inspect::inspect(dir).map(drop)
}

#[test]
fn adapter_configurations_are_read_or_refused() {
    campaign("models::adapter_configurations_are_read_or_refused", || {
        let mut specimens = adapters("adapter_config.json", Form::Json);
        specimens.push(by_patterns());
        Reader::new(specimens, adapter)
    });
}

#[test]
fn adapters_weights_are_read_or_refused() {
    campaign("models::adapters_weights_are_read_or_refused", || {
        let mut specimens = adapters("adapter_model.safetensors", Form::Safetensors);
        // TRL's value head beside an adapter without one.
        let mut files = adapters("adapter_config.json", Form::Json).remove(0).files;
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, content)| fs::write(dir.path().join(name), content).unwrap());
        let with_head =
            Adapter::load(dir.path(), LinearShapes::llama(2, 32, 32, 16, 48)).unwrap().with_head(1).unwrap();
        with_head.save_with_value_head(&dir.path().join("saved")).unwrap();
        let head = fs::read(dir.path().join("saved/value_head.safetensors")).unwrap();
        files.push(("value_head.safetensors".into(), head));
        specimens.push(of(files, "value_head.safetensors", Form::Safetensors));
        Reader::new(specimens, adapter)
    });
}
