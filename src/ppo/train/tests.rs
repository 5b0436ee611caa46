//! The loop's own parts: which prompts are asked, what is refused. What the loop as a
//! whole promises is in tests/ppo_invariants.

use super::*;
use crate::error::exit_code;
use crate::model::adapter::{LoraConfig, TargetModules};
use crate::model_files::ModelFiles;
use crate::quickstart::base::BASE;
use crate::reward::source::RewardModel;

#[test]
fn every_prompt_is_asked_once_a_pass_in_an_order_of_the_passes_own() {
    let prompts: Vec<Vec<u32>> = (0..7).map(|i| vec![i]).collect();
    // 21 prompts are three passes; rollouts of 4 cross their borders.
    let asked: Vec<Vec<u32>> = (0..6).flat_map(|i| choose(&prompts, i * 4, 4, 5).unwrap()).take(21).collect();
    let passes: Vec<&[Vec<u32>]> = asked.chunks(7).collect();
    for pass in &passes {
        let mut sorted = pass.to_vec();
        sorted.sort();
        assert_eq!(sorted, prompts);
    }
    assert!(passes[0] != passes[1] && passes[1] != passes[2]);
    assert_ne!(choose(&prompts, 0, 7, 6).unwrap(), passes[0], "another seed");
    assert_eq!(choose(&prompts, 0, 21, 5).unwrap(), asked, "one rollout longer than the list");
}

#[test]
fn what_cannot_run_is_refused_before_a_token_is_sampled() {
    let open = |config: &str| {
        let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
        ModelFiles::from_embedded(config, parts.0, parts.1, parts.2, parts.3).unwrap().base().unwrap()
    };
    let base = open(BASE.config);
    let short = open(&BASE.config.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 16"));
    let lora = LoraConfig {
        r: 1,
        lora_alpha: 1.0,
        use_rslora: false,
        target_modules: TargetModules::AllLinear,
        layers_to_transform: None,
        ..LoraConfig::default()
    };
    let sft = Adapter::init(lora, base.shapes(), 1).unwrap();
    let reward = sft.clone().with_head(1).unwrap();
    let start = Start { base: &base, reward_base: &base, sft: &sft, reward: Some(&reward) };
    let source = RewardModel(ValueModel::new(&base, &reward).unwrap());
    let config = Ppo { total_episodes: 8, batch_size: 8, response_length: 12, ..Ppo::default() };
    let refusal = |start, prompts: &Vec<Vec<u32>>, config: &Ppo| {
        let task = Task {
            start,
            prompts,
            stop: &[0],
            source: &source,
            decode: &|_| String::new(),
            evaluation: None,
            ptx: None,
            pad: None,
        };
        let error = train(task, config, 1, &mut Session::silent()).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let prompts = vec![vec![5; 10]];
    assert!(refusal(start, &vec![], &config).contains("no prompt"));
    assert!(refusal(start, &prompts, &Ppo { total_episodes: 7, ..config.clone() }).contains("total_episodes = 7"));
    assert!(refusal(Start { reward: Some(&sft), ..start }, &prompts, &config).contains("scalar head"));
    assert!(
        refusal(start, &prompts, &Ppo { response_length: 247, ..config.clone() }).contains("response_length = 247")
    );
    assert!(refusal(Start { reward_base: &short, ..start }, &prompts, &config).contains("context of 16"));
    // The very longest that fits is not refused.
    check(start, &prompts, &Ppo { response_length: 246, ..config }).unwrap();
}
