//! PPO at the edges of lengths, batches and vocabularies: one iteration each, to its end, with finite figures.
//!
//! A response always has a token, since the end token is an action: an empty response is refused wherever it could come
//! from, which is a setting (`response_length = 0`) or a formula's input (`rewards::shape`).

use anyhow::Result;
use fourfold::config::{Lora, Ppo};
use fourfold::model::adapter::Adapter;
use fourfold::model::block::Recompute;
use fourfold::model::readers::Sharing;
use fourfold::model::roles::ValueModel;
use fourfold::model_files::ModelFiles;
use fourfold::ppo::rewards::{Ending, Shaping, shape};
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::train::{Trained, train};
use fourfold::quickstart::base::BASE;
use fourfold::reward::source::RewardModel;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::world::World;
use safetensors::tensor::{Dtype, TensorView};

fn embedded() -> Model {
    let b = BASE;
    Model::of(
        ModelFiles::from_embedded(b.config, b.generation_config, b.tokenizer, b.tokenizer_config, b.weights).unwrap(),
    )
    .unwrap()
}

/// One iteration over `prompts`, with answers of exactly `response` tokens unless `stop` ends them.
fn iterate(model: &Model, prompts: &Vec<Vec<u32>>, response: usize, stop: &[u32]) -> Result<Trained> {
    let sft = model.fresh_adapter(&Lora { r: 2, ..Lora::default() }, 1)?;
    let reward: Adapter = model.fresh_adapter(&Lora { r: 2, ..Lora::default() }, 2)?.with_head(2)?;
    let config = Ppo {
        total_episodes: prompts.len(),
        batch_size: prompts.len(),
        num_mini_batches: 1,
        micro_batch_size: prompts.len(),
        response_length: response,
        learning_rate: 1e-3,
        ..Ppo::default()
    };
    let source = RewardModel(ValueModel::new(&model.base, &reward)?);
    let run = PpoRun {
        world: World::alone(),
        base: &model.base,
        reward_base: &model.base,
        sft: &sft,
        reward: Some(&reward),
        prompts,
        stop,
        source: &source,
        decode: &|_| String::new(),
        evaluation: None,
        ptx: None,
        pad: None,
        sampler: None,
        config: &config,
        seed: 1,
        recompute: Recompute::Off,
        sharing: Sharing::default(),
    };
    train(&run, &mut Session::silent())
}

fn assert_trained(what: &str, trained: &Trained) {
    for key in ["objective/kl", "objective/scores", "loss/policy_avg", "loss/value_avg"] {
        assert!(
            trained.last.get(key).and_then(serde_json::Value::as_f64).is_some(),
            "{what}: {key} is {:?}",
            trained.last
        );
    }
    let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let all: Vec<f32> = trained.actor.named_tensors().iter().flat_map(|(_, t)| values(t)).collect();
    assert!(all.iter().all(|x| x.is_finite()) && all.iter().any(|x| *x != 0.0), "{what}");
}

fn prompts(count: usize, length: usize) -> Vec<Vec<u32>> {
    (0..count).map(|i| (0..length).map(|t| 5 + ((i + t) % 40) as u32).collect()).collect()
}

#[test]
fn prompts_and_answers_of_one_token_and_of_the_whole_context_train() {
    let model = embedded();
    let context = model.base.config().max_position_embeddings;
    for (prompt, response) in [(1, 1), (1, context - 1), (context - 1, 1), (1, 8), (8, 1)] {
        let trained = iterate(&model, &prompts(2, prompt), response, &[]).unwrap();
        assert_trained(&format!("{prompt} + {response}"), &trained);
    }
    let error = iterate(&model, &prompts(2, context), 1, &[]).unwrap_err().to_string();
    assert!(error.contains("context"), "{error}");
}

#[test]
fn batches_of_one_and_of_64_train() {
    let model = embedded();
    for count in [1, 64] {
        assert_trained(&format!("{count} prompts"), &iterate(&model, &prompts(count, 4), 4, &[]).unwrap());
    }
}

#[test]
fn answers_that_end_with_their_first_token_train_and_answers_of_none_are_refused() {
    let model = embedded();
    let every: Vec<u32> = (0..model.base.config().vocab_size as u32).collect();
    assert_trained("all tokens stop", &iterate(&model, &prompts(4, 3), 8, &every).unwrap());
    let shaping = Shaping {
        kl_coef: 0.1,
        score_clip: 5.0,
        missing_eos_penalty: 0.0,
        min_length: 0,
        short_penalty: 0.0,
        length_penalty: 0.0,
        overlong: None,
    };
    assert!(shape(&[], 1.0, Ending::Eos, &shaping).unwrap_err().to_string().contains("without tokens"));
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("run.toml");
    std::fs::write(&config, "[base]\npath = \"b\"\n[ppo]\nreward_adapter = \"r\"\nresponse_length = 0\n").unwrap();
    let error = fourfold::config::load(&config, &[]).unwrap_err().to_string();
    assert!(error.contains("response_length = 0"), "{error}");
}

#[test]
fn a_vocabulary_of_256k_trains() {
    const V: usize = 256_000;
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256000,
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu", "eos_token_id": 0}"#;
    let own = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_string(), vec![V, 8]),
        (own("input_layernorm"), vec![8]),
        (own("post_attention_layernorm"), vec![8]),
        ("model.norm.weight".into(), vec![8]),
        (own("self_attn.q_proj"), vec![8, 8]),
        (own("self_attn.k_proj"), vec![4, 8]),
        (own("self_attn.v_proj"), vec![4, 8]),
        (own("self_attn.o_proj"), vec![8, 8]),
        (own("mlp.gate_proj"), vec![16, 8]),
        (own("mlp.up_proj"), vec![16, 8]),
        (own("mlp.down_proj"), vec![8, 16]),
    ];
    let mut rng = fourfold::rng::SplitMix64::new(7);
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(_, shape)| {
            let number = |_| ((rng.uniform() - 0.5) as f32).to_le_bytes();
            (0..shape.iter().product::<usize>()).flat_map(number).collect()
        })
        .collect();
    let views = shapes.iter().zip(&bytes);
    let views = views.map(|((name, shape), b)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), b).unwrap()));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    for (name, text) in [
        ("config.json", config),
        ("generation_config.json", BASE.generation_config),
        ("tokenizer.json", BASE.tokenizer),
        ("tokenizer_config.json", BASE.tokenizer_config),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let model = Model::open(dir.path()).unwrap();
    let prompts = vec![vec![255_999, 3, 200_000], vec![7]];
    assert_trained("256k", &iterate(&model, &prompts, 6, &[0]).unwrap());
}
