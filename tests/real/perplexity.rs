//! Two real models read an article: SmolLM2-135M-Instruct (Q4_1) and Gemma 3 270M (Q4_K_M) against transformers on the
//! dequantised weights; Gemma's tokenizer, rebuilt from the GGUF's metadata, against the sentencepiece library.
//! tests/golden/real_models.py printed the numbers.

use fourfold::model::batch::{Batch, Targets};
use fourfold::model::generate::{SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::model_files::ModelFiles;
use fourfold::run::Model;
use fourfold::tokenizer::{SpecialTokens, Tokenizer, TokenizerFiles};
use serde::Deserialize;

use crate::real_files::{gemma3, smollm2};

#[derive(Deserialize)]
struct Golden {
    smollm2: Article,
    gemma3: Gemma,
}

#[derive(Deserialize)]
struct Article {
    input_ids: Vec<u32>,
    logprobs: Vec<f32>,
    perplexity: f64,
}

#[derive(Deserialize)]
struct Gemma {
    #[serde(flatten)]
    article: Article,
    cases: Vec<Case>,
    greedy: Vec<Continuation>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Continuation {
    prompt: String,
    prompt_ids: Vec<u32>,
    token_ids: Vec<u32>,
}

const ARTICLE: &str = include_str!("../golden/encyclopedia.txt");

fn golden() -> Golden {
    serde_json::from_str(include_str!("../golden/real_models.json")).unwrap()
}

fn reads_as_transformers_does(model: &Model, want: &Article) {
    let ids = model.checkpoint.tokenizer().encode(ARTICLE, SpecialTokens::Add).unwrap();
    assert_eq!(ids, want.input_ids);
    let batch = Batch::new(&[&ids[..]]).unwrap();
    let targets = Targets::responses(&batch, &[ids.len() - 1]).unwrap();
    let got = Policy::new(&model.base, None).logprobs(&batch, &targets, 1.0).unwrap().logprobs;
    assert_eq!(got.len(), want.logprobs.len());
    let mean = got.iter().map(|&l| f64::from(l)).sum::<f64>() / got.len() as f64;
    let perplexity = (-mean).exp();
    let furthest = got.iter().zip(&want.logprobs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    eprintln!(
        "{}: perplexity {perplexity:.4} over {} tokens, transformers {:.4}; log-probabilities within {furthest:.1e}",
        model.base.config().model_name,
        got.len(),
        want.perplexity
    );
    assert!((perplexity / want.perplexity - 1.0).abs() < 1e-3);
    // Two f32 orders of summation through 18 or 30 blocks: some 1e-4.
    assert!(furthest < 2e-3, "{furthest}");
}

#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn smollm2s_perplexity_of_an_article_is_transformers() {
    let path = smollm2();
    reads_as_transformers_does(&Model::open(&path).unwrap(), &golden().smollm2);
}

/// 820 tokens: past the window of 512 that five of six layers have.
#[test]
#[ignore = "needs Gemma 3: FOURFOLD_GEMMA3_GGUF=$(tests/fetch/fetch-gemma3.sh) cargo test --release --test real -- --ignored"]
fn gemma3s_perplexity_and_greedy_text_are_transformers() {
    let path = gemma3();
    let (model, golden) = (Model::open(&path).unwrap(), golden().gemma3);
    assert!(golden.article.input_ids.len() > 600);
    reads_as_transformers_does(&model, &golden.article);
    let prompts: Vec<Vec<u32>> = golden.greedy.iter().map(|g| g.prompt_ids.clone()).collect();
    let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 32, stop: vec![] };
    let seeds = vec![0; prompts.len()];
    let got = generate(Policy::new(&model.base, None), &prompts, &seeds, &sampling, |_, _| {}).unwrap();
    for (response, want) in got.iter().zip(&golden.greedy) {
        let ids = model.checkpoint.tokenizer().encode(&want.prompt, SpecialTokens::Add).unwrap();
        assert_eq!(ids, want.prompt_ids, "{:?}", want.prompt);
        assert_eq!(response.tokens, want.token_ids, "{:?}", want.prompt);
    }
}

fn is_sentencepieces(tokenizer: &Tokenizer, cases: &[Case]) {
    assert!(cases.len() >= 10);
    for case in cases {
        let ids = tokenizer.encode(&case.text, SpecialTokens::Add).unwrap();
        assert_eq!(ids, case.ids, "{:?}", case.text);
        assert_eq!(tokenizer.decode(&ids).unwrap(), case.decoded, "{:?}", case.text);
    }
}

#[test]
#[ignore = "needs Gemma 3: FOURFOLD_GEMMA3_GGUF=$(tests/fetch/fetch-gemma3.sh) cargo test --release --test real -- --ignored"]
fn gemma3s_token_ids_are_sentencepieces_from_the_gguf_and_from_the_files_made_of_it() {
    let path = gemma3();
    let (checkpoint, golden) = (ModelFiles::open(&path).unwrap(), golden().gemma3);
    is_sentencepieces(checkpoint.tokenizer(), &golden.cases);
    // A turn's marks are one token each where they are spelled out.
    let turn = checkpoint.tokenizer().encode("<start_of_turn>user\n", SpecialTokens::None).unwrap();
    assert_eq!(turn.first(), checkpoint.tokenizer().id("<start_of_turn>").as_ref());
    let files = checkpoint.side_files().unwrap();
    let text = |name: &str| std::str::from_utf8(&files.iter().find(|(n, _)| n == name).unwrap().1).unwrap();
    let files = TokenizerFiles {
        tokenizer: text("tokenizer.json"),
        config: Some(text("tokenizer_config.json")),
        ..TokenizerFiles::default()
    };
    is_sentencepieces(&Tokenizer::from_files(files, "made").unwrap(), &golden.cases);
    let config = fourfold::model::config::DecoderConfig::from_hf(text("config.json"), None, "made").unwrap();
    assert_eq!(&config, checkpoint.config());
}
