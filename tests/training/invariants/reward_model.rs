//! Invariants of reward-model training: K ranked responses in one forward pass, both losses, centred scores. It does not
//! depend on PPO; the golden values of the formulas are in src/reward/loss.rs.

use fourfold::config::{Reward, RewardLoss};
use fourfold::data::PairLabel;
use fourfold::data::examples::objectives::RankedExample;
use fourfold::model::adapter::Adapter;
use fourfold::model::block::Recompute;
use fourfold::report::Report;
use fourfold::reward;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use serde_json::Value;

use super::world::*;

/// An initial reward adapter with a known head, so that the first loss can be computed by hand.
fn scorer_start(model: &Model) -> Adapter {
    model.fresh_adapter(&lora(), 9).unwrap().with_head(9).unwrap()
}

fn train_reward(
    model: &Model,
    start: &Adapter,
    examples: &[RankedExample],
    config: &Reward,
) -> (Vec<Value>, reward::train::Summary) {
    let dir = tempfile::tempdir().unwrap();
    let mut report = Session::new(Report::to_dir(dir.path()).unwrap());
    let setup = Setup { base: &model.base, start, recompute: Recompute::Off, seed: 9 };
    let (_, summary) = reward::train::train(setup, examples, examples, config, &mut report).unwrap();
    (metrics(dir.path()), summary)
}

#[test]
fn three_ranked_responses_train_as_three_pairs_in_one_forward_pass() {
    let model = model();
    let two = comparisons(&model, 12);
    // A third response, worse than both: only the end token.
    let empty = vec![model.checkpoint.tokenizer().eos_id().unwrap()];
    let three: Vec<RankedExample> = two
        .iter()
        .map(|e| RankedExample { responses: e.responses.iter().cloned().chain([empty.clone()]).collect(), ..e.clone() })
        .collect();
    let start = scorer_start(&model);
    let config = Reward { num_train_epochs: 6, per_device_train_batch_size: 12, ..reward_config() };
    let (lines, summary) = train_reward(&model, &start, &three, &config);
    assert_eq!((summary.before.pairs, summary.after.pairs, summary.steps), (36, 36, 6));
    // One pass per pair would compute every sequence twice.
    let tokens = |e: &RankedExample| e.responses.iter().map(|a| e.prompt.len() + a.len()).sum::<usize>();
    assert_eq!(summary.tokens, 6 * three.iter().map(tokens).sum::<usize>());
    // -log sigmoid(better - worse), the mean over an example's pairs, then over the examples.
    let scores = reward::train::scores(&model.base, &start, &three).unwrap();
    let pair = |better: f32, worse: f32| (f64::from(worse - better)).exp().ln_1p();
    let by_hand = scores.iter().map(|s| (pair(s[0], s[1]) + pair(s[0], s[2]) + pair(s[1], s[2])) / 3.0).sum::<f64>();
    let losses = column(&lines, "loss");
    eprintln!("loss of three ranked responses {losses:?}, the first by hand {}", by_hand / 12.0);
    // Another packing, f32 sums: some 1e-6.
    assert!((losses[0] - by_hand / 12.0).abs() < 1e-5);
    assert!(losses[5] < 0.7 * losses[0] && summary.after.accuracy > summary.before.accuracy, "{losses:?} {summary:?}");
}

#[test]
fn divergence_to_end_loss_falls_and_differs_from_the_last_token_loss() {
    let model = model();
    let examples = comparisons(&model, 12);
    let start = scorer_start(&model);
    let config = Reward { num_train_epochs: 8, per_device_train_batch_size: 12, ..reward_config() };
    let (last, _) = train_reward(&model, &start, &examples, &config);
    let config = Reward { loss: RewardLoss::DivergenceToEnd, ..config };
    let (lines, summary) = train_reward(&model, &start, &examples, &config);
    let losses = column(&lines, "loss");
    eprintln!("divergence_to_end loss {losses:?}, last_token {:?}", column(&last, "loss"));
    assert!(losses[7] < 0.8 * losses[0], "{losses:?}");
    assert!(summary.after.accuracy > summary.before.accuracy.min(0.99), "{summary:?}");
    assert!((losses[0] - column(&last, "loss")[0]).abs() > 1e-3, "it reads more tokens than the last");
}

#[test]
fn soft_labels_ties_and_margins_enter_both_losses_and_ties_no_accuracy() {
    let model = model();
    // Of twelve pairs a tie, one whose rejected response is preferred, a doubtful one and one with a margin; the rest are plain.
    let labels = [(0.5, 0.0), (0.0, 0.0), (0.75, 0.0), (1.0, 0.5)];
    let mut examples = comparisons(&model, 12);
    for (example, (probability, margin)) in examples.iter_mut().zip(labels) {
        example.label = PairLabel::new(probability, margin);
    }
    let start = scorer_start(&model);
    let config = Reward { num_train_epochs: 1, per_device_train_batch_size: 12, ..reward_config() };
    let (lines, summary) = train_reward(&model, &start, &examples, &config);
    let scores = reward::train::scores(&model.base, &start, &examples).unwrap();
    let log_sigmoid = |x: f64| -(-x).exp().ln_1p();
    let by_hand = scores.iter().zip(&examples).map(|(scores, example)| {
        let (p, margin) = (f64::from(example.label.chosen_probability()), f64::from(example.label.margin()));
        let x = f64::from(scores[0]) - f64::from(scores[1]) - margin;
        -p * log_sigmoid(x) - (1.0 - p) * log_sigmoid(-x)
    });
    let by_hand = by_hand.sum::<f64>() / 12.0;
    let loss = column(&lines, "loss")[0];
    assert!((loss - by_hand).abs() < 1e-5, "{loss} {by_hand}");
    assert_eq!((summary.before.pairs, summary.after.pairs), (11, 11));
    let right = scores.iter().enumerate().filter(|(i, s)| if *i == 1 { s[1] > s[0] } else { *i > 0 && s[0] > s[1] });
    assert_eq!(summary.before.accuracy, right.count() as f64 / 11.0);
    // The loss over all tokens reads the labels, too.
    let config = Reward { loss: RewardLoss::DivergenceToEnd, eval_steps: 1, ..config };
    let (soft, _) = train_reward(&model, &start, &examples, &config);
    examples.iter_mut().for_each(|example| example.label = PairLabel::default());
    let (plain, _) = train_reward(&model, &start, &examples, &config);
    assert!((column(&soft, "loss")[0] - column(&plain, "loss")[0]).abs() > 1e-3);
    for name in ["eval_score_length_correlation", "eval_length_controlled_accuracy"] {
        assert!(plain.iter().any(|line| line[name].is_number()), "{name}: {plain:?}");
    }
}

#[test]
fn centred_scores_have_mean_0_and_deviation_1_in_the_same_order() {
    let model = model();
    let examples = comparisons(&model, 16);
    let train = |center: bool| {
        let config = Reward { center, ..reward_config() };
        let start = scorer_start(&model);
        let setup = Setup { base: &model.base, start: &start, recompute: Recompute::Off, seed: 9 };
        let (adapter, _) = reward::train::train(setup, &examples, &[], &config, &mut Session::silent()).unwrap();
        let scores = reward::train::scores(&model.base, &adapter, &examples).unwrap().concat();
        (adapter, scores.into_iter().map(f64::from).collect::<Vec<f64>>())
    };
    let ((raw, raw_scores), (centered, scores)) = (train(false), train(true));
    let moments = |s: &[f64]| {
        let mean = s.iter().sum::<f64>() / s.len() as f64;
        (mean, (s.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / s.len() as f64).sqrt())
    };
    let (mean, deviation) = moments(&scores);
    // f32 scores of size 1.
    assert!(mean.abs() < 1e-5 && (deviation - 1.0).abs() < 1e-5, "{mean} {deviation}");
    let (raw_mean, raw_deviation) = moments(&raw_scores);
    assert!(raw_mean.abs() > 1e-2 && (raw_deviation - 1.0).abs() > 1e-2, "{raw_mean} {raw_deviation}: nothing to do");
    assert_eq!(raw.head().unwrap().bias, 0.0);
    assert_ne!(centered.head().unwrap().bias, 0.0);
    let order = |s: &[f64]| {
        let mut order: Vec<usize> = (0..s.len()).collect();
        order.sort_by(|&a, &b| s[a].total_cmp(&s[b]));
        order
    };
    assert_eq!(order(&raw_scores), order(&scores));
}

#[test]
fn a_ranking_of_three_is_the_mean_of_its_pairs_in_the_loss_over_all_tokens_too() {
    let model = model();
    let empty = vec![model.checkpoint.tokenizer().eos_id().unwrap()];
    let three: Vec<RankedExample> = comparisons(&model, 8)
        .into_iter()
        .map(|e| RankedExample { responses: e.responses.iter().cloned().chain([empty.clone()]).collect(), ..e })
        .collect();
    let pair = |e: &RankedExample, a: usize, b: usize| RankedExample {
        responses: vec![e.responses[a].clone(), e.responses[b].clone()],
        ..e.clone()
    };
    let pairs: Vec<RankedExample> =
        three.iter().flat_map(|e| [(0, 1), (0, 2), (1, 2)].map(|(a, b)| pair(e, a, b))).collect();
    let start = scorer_start(&model);
    let loss = |examples: &[RankedExample]| {
        let config = Reward {
            loss: RewardLoss::DivergenceToEnd,
            num_train_epochs: 1,
            per_device_train_batch_size: examples.len(),
            ..reward_config()
        };
        column(&train_reward(&model, &start, examples, &config).0, "loss")[0]
    };
    let (ranked, apart) = (loss(&three), loss(&pairs));
    assert!((ranked - apart).abs() < 1e-5, "{ranked} {apart}");
}
