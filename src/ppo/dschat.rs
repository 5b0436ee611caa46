//! DeepSpeed-Chat's reading of a rollout, for `compat = "dschat"`. Its rows are padded, its masks are `token != pad`, and
//! the score is added one action past the last token that is not a pad: on the end token if that is the pad token (OPT),
//! otherwise on the first pad after it. No loss includes that action. The other formulas are those of `rewards.rs`,
//! `gae.rs` and `loss.rs`. Source: microsoft/DeepSpeedExamples 83757d9, `dschat/rlhf/ppo_trainer.py`.
//!
//! Only real tokens are computed here, plus the one pad as an action: the results equal those of padded rows under their
//! mask. A pad inside a prompt, which that mask hides as well, is kept; leading pads are removed. A sampled pad ends the
//! response (in DeepSpeed-Chat the row continues and the mask hides the rest). It does not depend on bases or adapters.
//! Read `rollout.rs` for the caller.

use crate::model::generate::{FinishReason, Response};
use crate::reward::source::without_leading;

/// Number of a response's actions that are trained on and that are rewarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Actions {
    /// The first `trained` actions are trained on: the tokens that are not pads. The score is read at the last of them.
    pub trained: usize,
    /// The first `rewarded` actions have a reward and a value; the score is added to the last of them.
    pub rewarded: usize,
}

/// Actions of a response whose row has room for `window` response tokens.
pub fn actions(response: &[u32], pad: u32, window: usize) -> Actions {
    let trained = response.iter().filter(|&&token| token != pad).count();
    Actions { trained, rewarded: (trained + 1).min(window) }
}

/// The response cut or padded to its [`Actions::rewarded`] actions, with the number that is trained on; `None` if the
/// response is dropped, because it has at most one token. The log-probability of an added pad is not computed yet: it is
/// NaN.
pub fn pad_response(mut response: Response, pad: u32, window: usize) -> Option<(Response, usize)> {
    let Actions { trained, rewarded } = actions(&response.tokens, pad, window);
    if trained <= 1 {
        return None;
    }
    // A response truncated by the model's context has no room for a pad, and its window ends there.
    if response.finish == FinishReason::Stop {
        response.tokens.resize(rewarded, pad);
        response.logprobs.resize(rewarded, f32::NAN);
    }
    Some((response, trained))
}

/// The responses of a rollout that are not dropped (K of them).
#[derive(Clone, Debug, Default)]
pub struct PaddedRollout {
    /// (K) indices in the rollout.
    pub rows: Vec<usize>,
    /// (K) prompts without leading pads, as actor, reference and critic read them.
    pub prompts: Vec<Vec<u32>>,
    /// (K) rewarded actions; see [`pad_response`].
    pub responses: Vec<Response>,
    /// (K) number of actions that are trained on.
    pub trained: Vec<usize>,
    /// (K) responses up to the token at which the score is read, for the reward source.
    pub scored: Vec<Response>,
}

/// Drops and pads the responses of a rollout. Rows are as wide as the longest response, which has no pad after it.
pub fn pad_rollout(prompts: &[Vec<u32>], responses: Vec<Response>, pad: u32) -> PaddedRollout {
    let window = responses.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
    let mut padded = PaddedRollout::default();
    for (row, (prompt, response)) in prompts.iter().zip(responses).enumerate() {
        let whole = response.clone();
        let Some((response, trained)) = pad_response(response, pad, window) else { continue };
        padded.rows.push(row);
        padded.prompts.push(without_leading(prompt, pad).to_vec());
        padded.scored.push(Response {
            tokens: whole.tokens[..trained].to_vec(),
            logprobs: whole.logprobs[..trained].to_vec(),
            // The end token is scored unless it is a pad; without it, the response counts as truncated.
            finish: if trained == whole.tokens.len() { whole.finish } else { FinishReason::Length },
        });
        padded.responses.push(response);
        padded.trained.push(trained);
    }
    padded
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::ppo::gae::gae;
    use crate::ppo::golden::{assert_close, assert_number, floats};
    use crate::ppo::kl::{Estimator, per_token};
    use crate::ppo::loss::{Objective, PolicyTokens, policy_loss};
    use crate::ppo::rewards::{Ending, Shaping, shape};
    use crate::ppo::value_loss::{ValueTokens, value_loss};
    use crate::reward::loss::{Scored, divergence_to_end_padded};

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/dschat.json")).unwrap()
    }

    fn ids(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    }

    fn number(value: &Value, key: &str) -> usize {
        value[key].as_u64().unwrap() as usize
    }

    #[test]
    fn rewards_advantages_returns_and_both_losses_match_dschat_golden() {
        let mut extra = 0;
        for case in golden()["ppo"].as_array().unwrap() {
            let (pad, window, prompt) =
                (case["pad"].as_u64().unwrap() as u32, number(case, "window"), number(case, "prompt"));
            let end = 2;
            let mut kept = vec![];
            let [mut now, mut old, mut advantages] = [const { Vec::<f32>::new() }; 3];
            let [mut values, mut old_values, mut returns] = [const { Vec::<f32>::new() }; 3];
            let [mut actor_grad, mut critic_grad] = [const { Vec::<Value>::new() }; 2];
            for (i, response) in case["answers"].as_array().unwrap().iter().enumerate() {
                let tokens = ids(response);
                let finish = if tokens.last() == Some(&end) { FinishReason::Stop } else { FinishReason::Length };
                let response = Response { logprobs: vec![0.0; tokens.len()], tokens, finish };
                let Some((response, trained)) = pad_response(response, pad, window) else { continue };
                let (j, rewarded) = (kept.len(), response.tokens.len());
                assert_eq!(response.tokens, ids(&case["rows"][i])[prompt..prompt + rewarded]);
                assert_eq!(
                    Value::from(prompt + trained - 1),
                    case["scored_at"][j],
                    "position at which the score is read"
                );
                extra += rewarded - trained;
                let row = |key: &str, n: usize| floats(&case[key][j])[..n].to_vec();
                let kl = per_token(Estimator::K1, &row("logprobs", rewarded), &row("reference", rewarded)).unwrap();
                let shaping = Shaping { kl_coef: 0.1, score_clip: 5.0, ..Shaping::default() };
                let score = case["scores"][j].as_f64().unwrap();
                let rewards = shape(&kl, score, Ending::Eos, &shaping).unwrap();
                let wanted = |key: &str, n: usize| Value::from(case[key][j].as_array().unwrap()[..n].to_vec());
                // The KL is rounded to f32 in between.
                assert_close(&rewards, &wanted("rewards", rewarded), 16.0, "rewards");
                assert!(
                    floats(&case["rewards"][j])[rewarded..].iter().all(|&r| r == 0.0),
                    "later actions have no reward"
                );
                let out = gae(&rewards, &row("values", rewarded), 0.0, 1.0, 0.95).unwrap();
                assert_close(&out.advantages, &wanted("advantages", rewarded), 32.0, "advantages");
                assert_close(&out.returns, &wanted("returns", rewarded), 32.0, "returns");
                now.extend(row("new_logprobs", trained));
                old.extend(row("logprobs", trained));
                advantages.extend(row("advantages", trained));
                values.extend(row("new_values", trained));
                old_values.extend(row("values", trained));
                returns.extend(row("returns", trained));
                for (grads, key) in [(&mut actor_grad, "actor_grad"), (&mut critic_grad, "critic_grad")] {
                    let row = case[key][j].as_array().unwrap();
                    grads.extend_from_slice(&row[..trained]);
                    assert!(
                        row[trained..].iter().all(|g| g.as_f64() == Some(0.0)),
                        "the action of the score is in no loss"
                    );
                }
                kept.push(i);
            }
            assert_eq!(Value::from(kept), case["kept"]);
            let n = now.len() as f64;
            let inputs = PolicyTokens {
                lengths: &[now.len()],
                logprobs: &now,
                old_logprobs: &old,
                advantages: &advantages,
                ref_logprobs: &old,
                weights: None,
            };
            let actor = policy_loss(inputs, &Objective::clip(0.2), n).unwrap();
            assert_number(actor.loss, &case["actor_loss"], "actor loss");
            assert_close(&actor.grad, &Value::from(actor_grad), 1.0, "actor gradient");
            let inputs = ValueTokens { values: &values, old_values: &old_values, returns: &returns };
            let critic = value_loss(inputs, 0.2, n).unwrap();
            assert_number(critic.loss, &case["critic_loss"], "critic loss");
            assert_close(&critic.grad, &Value::from(critic_grad), 1.0, "critic gradient");
        }
        assert!(extra > 4, "the golden must reach the quirk");
    }

    #[test]
    fn a_batch_of_pairs_has_dschats_loss_and_accuracy() {
        for case in golden()["reward"].as_array().unwrap() {
            let (pad, leading) = (case["pad"].as_u64().unwrap() as u32, number(case, "leading"));
            let pairs = case["pairs"].as_array().unwrap();
            let (mut loss, mut right) = (0.0, 0);
            for pair in pairs {
                let (chosen, rejected) = (ids(&pair["chosen"]), ids(&pair["rejected"]));
                let (c, r) = (floats(&pair["chosen_scores"]), floats(&pair["rejected_scores"]));
                let (c, r) = (Scored { tokens: &chosen, scores: &c }, Scored { tokens: &rejected, scores: &r });
                let out = divergence_to_end_padded(c, r, pad, leading).unwrap();
                assert_eq!(Value::from(f64::from(out.chosen_end)), pair["chosen_end"]);
                assert_eq!(Value::from(f64::from(out.rejected_end)), pair["rejected_end"]);
                loss += out.loss / pairs.len() as f64;
                right += usize::from(out.chosen_end > out.rejected_end);
            }
            assert_number(loss, &case["loss"], "loss");
            assert_number(right as f64 / pairs.len() as f64, &case["accuracy"], "accuracy");
        }
    }

    #[test]
    fn the_score_is_on_the_end_token_of_an_opt_response_and_on_an_added_pad_otherwise() {
        assert_eq!(actions(&[5, 6, 2], 2, 8), Actions { trained: 2, rewarded: 3 });
        assert_eq!(actions(&[5, 6, 2], 1, 8), Actions { trained: 3, rewarded: 4 });
        assert_eq!(actions(&[5, 6, 7], 1, 3), Actions { trained: 3, rewarded: 3 });
        let stopped = |tokens: &[u32]| Response {
            tokens: tokens.to_vec(),
            logprobs: vec![-1.0; tokens.len()],
            finish: FinishReason::Stop,
        };
        let (opt, trained) = pad_response(stopped(&[5, 6, 2]), 2, 8).unwrap();
        assert_eq!((opt.tokens, trained), (vec![5, 6, 2], 2));
        let (own, trained) = pad_response(stopped(&[5, 6, 2]), 1, 8).unwrap();
        assert_eq!((own.tokens, trained), (vec![5, 6, 2, 1], 3));
        assert!(own.logprobs[3].is_nan());
        assert!(pad_response(stopped(&[5, 2]), 2, 8).is_none() && pad_response(stopped(&[2]), 1, 8).is_none());
        assert!(pad_response(stopped(&[5, 2]), 1, 8).is_some());
    }

    #[test]
    fn responses_of_one_token_are_dropped_and_the_longest_gets_no_pad() {
        let stopped = |tokens: &[u32]| Response {
            tokens: tokens.to_vec(),
            logprobs: vec![-1.0; tokens.len()],
            finish: FinishReason::Stop,
        };
        let prompts = [vec![2, 9], vec![9, 2], vec![2, 2], vec![9]];
        let responses = [&[5, 2][..], &[5, 6, 2], &[2], &[5, 6, 7, 2]].map(stopped).to_vec();
        let own = pad_rollout(&prompts, responses.clone(), 1);
        assert_eq!((own.rows, own.trained), (vec![0, 1, 3], vec![2, 3, 4]));
        assert_eq!(own.responses[1].tokens, [5, 6, 2, 1]);
        assert_eq!(own.responses[2].tokens, [5, 6, 7, 2], "the row ends there: the score is rewarded at the end token");
        assert_eq!((own.scored[1].tokens.clone(), own.scored[1].finish), (vec![5, 6, 2], FinishReason::Stop));
        let opt = pad_rollout(&prompts, responses, 2);
        assert_eq!((opt.rows, opt.trained), (vec![1, 3], vec![2, 3]));
        assert_eq!((opt.scored[0].tokens.clone(), opt.scored[0].finish), (vec![5, 6], FinishReason::Length));
        assert_eq!(opt.prompts, [vec![9, 2], vec![9]]);
        assert_eq!([without_leading(&[2, 9], 2), without_leading(&[2, 2], 2)], [&[9][..], &[2]]);
    }
}
