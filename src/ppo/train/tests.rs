//! The loop's own parts: which prompts are asked, what a rollout is turned into, what is refused. What the loop as a
//! whole promises is in tests/ppo_invariants.

use super::*;
use crate::error::exit_code;
use crate::model::adapter::{LoraConfig, TargetModules};
use crate::model::checkpoint::Checkpoint;
use crate::model::generate::Response;
use crate::quickstart::base::BASE;

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

fn ppo() -> Ppo {
    Ppo { gamma: 1.0, lam: 1.0, kl_coef: 0.5, score_clip: 2.0, whiten_advantages: false, ..Ppo::default() }
}

/// Two answers: one that ended, of 2 tokens, and one that was cut off, of 3.
fn rollout() -> Rollout {
    let response =
        |logprobs: &[f32], finish| Response { tokens: vec![9; logprobs.len()], logprobs: logprobs.to_vec(), finish };
    Rollout {
        prompts: vec![vec![1], vec![1, 2]],
        responses: vec![response(&[-1.0, -2.0], Finish::Stop), response(&[-0.5, -0.5, -3.0], Finish::Length)],
        reference_logprobs: vec![vec![-1.5, -1.0], vec![-0.5, -1.5, -3.0]],
        values: vec![vec![0.25, 0.5], vec![0.0, 1.0, 2.0]],
        scores: vec![1.0, 5.0],
    }
}

#[test]
fn an_answers_return_is_its_clipped_score_less_penalties_still_to_come() {
    let config = Ppo { missing_eos_penalty: Some(0.75), ..ppo() };
    let experience = judge(rollout(), &config).unwrap();
    assert_eq!(experience.kl, [vec![0.5, -1.0], vec![0.0, 1.0, 0.0]]);
    // Rewards: [-0.25, 0.5 + 1], and [0, -0.5, 2 - 0.75]: 5 was clipped to 2, the cut-off answer pays 0.75.
    assert_eq!(experience.returns, [vec![1.25, 1.5], vec![0.75, 0.75, 1.25]]);
    assert_eq!(experience.advantages, [vec![1.0, 1.0], vec![0.75, -0.25, -0.75]]);
}

#[test]
fn whitening_is_over_the_whole_rollout_and_leaves_the_critics_targets_alone() {
    let plain = judge(rollout(), &ppo()).unwrap();
    let whitened = judge(rollout(), &Ppo { whiten_advantages: true, ..ppo() }).unwrap();
    assert_eq!(whitened.returns, plain.returns);
    let flat = whitened.advantages.concat();
    assert_eq!(whitened.advantages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 3]);
    let mean = flat.iter().map(|&a| f64::from(a)).sum::<f64>() / 5.0;
    let variance = flat.iter().map(|&a| (f64::from(a) - mean).powi(2)).sum::<f64>() / 4.0;
    assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-6, "{mean} {variance}");
    let ends = [&whitened.advantages[0], &whitened.advantages[1]].map(|row| row.iter().sum::<f32>());
    assert!(ends[0].abs() > 0.1, "sequence by sequence, each would sum to 0: {ends:?}");
    let scaled = judge(rollout(), &Ppo { whiten_rewards: true, ..ppo() }).unwrap();
    assert_ne!(scaled.returns, plain.returns, "rewards are scaled before the returns");
}

#[test]
fn k3_is_never_negative_and_open_scores_are_not_clipped() {
    let config = Ppo { kl_estimator: KlEstimator::K3, score_clip: 0.0, kl_coef: 0.0, ..ppo() };
    let experience = judge(rollout(), &config).unwrap();
    assert!(experience.kl.concat().iter().all(|&kl| kl >= 0.0) && experience.kl[0][1] > 0.0);
    assert_eq!(experience.returns[1], [5.0, 5.0, 5.0]);
}

#[test]
fn what_cannot_run_is_refused_before_a_token_is_sampled() {
    let open = |config: &str| {
        let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
        Base::load(&Checkpoint::from_embedded(config, parts.0, parts.1, parts.2, parts.3).unwrap()).unwrap()
    };
    let base = open(BASE.config);
    let short = open(&BASE.config.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 16"));
    let lora = LoraConfig {
        r: 1,
        lora_alpha: 1.0,
        use_rslora: false,
        target_modules: TargetModules::AllLinear,
        layers_to_transform: None,
    };
    let sft = Adapter::init(lora, base.shapes(), 1).unwrap();
    let reward = sft.clone().with_head(1).unwrap();
    let start = Start { base: &base, reward_base: &base, sft: &sft, reward: &reward };
    let config = Ppo { total_episodes: 8, batch_size: 8, response_length: 12, ..Ppo::default() };
    let refusal = |start, prompts: &[Vec<u32>], config: &Ppo| {
        let error = train(start, prompts, &[0], config, 1, &|_| String::new(), &mut Report::silent()).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let prompts = vec![vec![5; 10]];
    assert!(refusal(start, &[], &config).contains("no prompt"));
    assert!(refusal(start, &prompts, &Ppo { total_episodes: 7, ..config.clone() }).contains("total_episodes = 7"));
    assert!(refusal(Start { reward: &sft, ..start }, &prompts, &config).contains("scalar head"));
    assert!(
        refusal(start, &prompts, &Ppo { response_length: 247, ..config.clone() }).contains("response_length = 247")
    );
    assert!(refusal(Start { reward_base: &short, ..start }, &prompts, &config).contains("context of 16"));
    // The very longest that fits is not refused.
    check(start, &prompts, &Ppo { response_length: 246, ..config }).unwrap();
}
