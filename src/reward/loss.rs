//! Reward-model losses (Bradley-Terry) with their derivatives with respect to the scores. A response's score is read at its
//! last token ([`ranked`]), or at every token from the first difference of two responses ([`divergence_to_end`],
//! [`divergence_to_end_padded`]). Pure functions of numbers; it does not depend on the model. Read `train.rs` next.

use anyhow::{Result, ensure};

use crate::data::PairLabel;
use crate::diverged;
use crate::invalid;

/// Loss and derivatives of K ranked responses.
#[derive(Clone, Debug)]
pub struct RankedLoss {
    /// Mean over the K(K-1)/2 pairs.
    pub loss: f64,
    /// (K,) derivative with respect to each response's last-token score.
    pub grads: Vec<f32>,
    /// Number of pairs whose better response has the strictly higher score.
    pub right: usize,
    /// Number of pairs, K(K-1)/2.
    pub pairs: usize,
}

/// `mean over i < j of -log sigmoid(s_i - s_j)`. `scores`: (K,) of the responses' last tokens, best response first.
/// Source: arXiv:2203.02155 eq. 1.
///
/// # Errors
/// If there are fewer than two responses, or a score is NaN or infinite.
pub fn ranked(scores: &[f32]) -> Result<RankedLoss> {
    let k = scores.len();
    if k < 2 {
        return Err(invalid!("a comparison needs at least two responses to a prompt, this one has {k}"));
    }
    check_finite(scores)?;
    let pairs = k * (k - 1) / 2;
    let (mut loss, mut right, mut grads) = (0.0, 0, vec![0.0f64; k]);
    for i in 0..k {
        for j in i + 1..k {
            let pair = Pair::of(scores[i], scores[j], PairLabel::default());
            loss += pair.loss;
            grads[i] += pair.slope;
            grads[j] -= pair.slope;
            right += usize::from(scores[i] > scores[j]);
        }
    }
    let grads = grads.into_iter().map(|g| (g / pairs as f64) as f32).collect();
    Ok(RankedLoss { loss: loss / pairs as f64, grads, right, pairs })
}

/// `-p log sigmoid(x) - (1 - p) log sigmoid(-x)` with `x = s_0 - s_1 - margin` for a pair that is not simply ordered: p is the
/// share of raters who prefer the first response, 1/2 for a tie, and `margin` as in TRL (arXiv:2307.09288 eq. 2). With p = 1 and no
/// margin it is [`ranked`]. A tie is no pair of the accuracy; below 1/2 the second response is the better one.
///
/// # Errors
/// If a score is NaN or infinite.
pub fn labelled(scores: [f32; 2], label: PairLabel) -> Result<RankedLoss> {
    check_finite(&scores)?;
    let pair = Pair::of(scores[0], scores[1], label);
    let [right, pairs] = judged(scores, label);
    Ok(RankedLoss { loss: pair.loss, grads: vec![pair.slope as f32, -pair.slope as f32], right, pairs })
}

/// Of a pair: whether the preferred response has the strictly higher score, and whether one is preferred at all, as counts.
pub fn judged(scores: [f32; 2], label: PairLabel) -> [usize; 2] {
    let preferred = label.preferred_first(scores.to_vec());
    [preferred.as_ref().map_or(0, |scores| usize::from(scores[0] > scores[1])), usize::from(preferred.is_some())]
}

/// Loss and derivatives of one pair over a window of positions.
#[derive(Clone, Debug)]
pub struct WindowLoss {
    /// Mean loss over the window.
    pub loss: f64,
    /// Derivative with respect to every score of the chosen sequence; 0 outside the window.
    pub chosen_grad: Vec<f32>,
    /// Derivative with respect to every score of the rejected sequence.
    pub rejected_grad: Vec<f32>,
    /// Window of positions, counted from the sequences' start.
    pub window: std::ops::Range<usize>,
    /// Score at the end of the chosen response; the accuracy compares it with `rejected_end`.
    pub chosen_end: f32,
    /// Score at the end of the rejected response.
    pub rejected_end: f32,
}

/// One sequence of prompt and response with a score per token.
#[derive(Clone, Copy, Debug)]
pub struct Scored<'a> {
    /// (N,) token ids.
    pub tokens: &'a [u32],
    /// (N,) scores.
    pub scores: &'a [f32],
}

/// `mean over t in [first difference, longer length) of -log sigmoid(c_t - r_t)` without any padding. Past a sequence's
/// end the score of its last token is used, and accumulates the derivatives. (DeepSpeed-Chat scores PAD tokens there; see
/// [`divergence_to_end_padded`].) If one sequence continues the other, the first difference is the shorter one's length. Identical
/// sequences compare their last position: log 2 if their scores are equal, with opposite derivatives.
///
/// # Errors
/// If a list is empty or its length differs from its tokens', a score is NaN or infinite, or the first tokens differ.
pub fn divergence_to_end(chosen: Scored<'_>, rejected: Scored<'_>) -> Result<WindowLoss> {
    divergence_to_end_labelled(chosen, rejected, PairLabel::default())
}

/// As [`divergence_to_end`], with the loss of [`labelled`] at each position.
///
/// # Errors
/// Those of [`divergence_to_end`].
pub fn divergence_to_end_labelled(chosen: Scored<'_>, rejected: Scored<'_>, label: PairLabel) -> Result<WindowLoss> {
    for side in [chosen, rejected] {
        let (tokens, scores) = (side.tokens.len(), side.scores.len());
        ensure!(tokens == scores && tokens > 0, "{tokens} tokens with {scores} scores");
    }
    let (c_len, r_len) = (chosen.tokens.len(), rejected.tokens.len());
    let end = c_len.max(r_len);
    let start = first_difference(chosen.tokens, rejected.tokens).unwrap_or(match c_len == r_len {
        true => end - 1,
        false => c_len.min(r_len),
    });
    window_loss(chosen.scores, rejected.scores, start..end, [c_len, r_len], chosen.tokens != rejected.tokens, label)
}

/// The same loss over rows padded to one length, position by position as in DeepSpeed-Chat: a response ends at
/// the PAD number `num_padding_at_beginning` (from 0; OPT starts every sequence with a token that equals PAD, hence 1),
/// the window runs to the later of the two ends, and the shorter response's PAD positions in it count with the
/// model's scores. Identical rows compare the last position of the row.
/// Source: DeepSpeedExamples, `dschat/utils/model/reward_model.py`.
///
/// # Errors
/// If the rows differ in length or are empty, a score in the window is NaN or infinite, the first tokens differ, or
/// the window is empty (the rows differ only after both ends; DeepSpeed-Chat would train on NaN).
pub fn divergence_to_end_padded(
    chosen: Scored<'_>,
    rejected: Scored<'_>,
    pad: u32,
    num_padding_at_beginning: usize,
) -> Result<WindowLoss> {
    let length = chosen.tokens.len();
    let lengths = [length, rejected.tokens.len(), chosen.scores.len(), rejected.scores.len()];
    ensure!(length > 0 && lengths.iter().all(|&l| l == length), "padded rows of lengths {lengths:?}");
    let end_of = |row: &[u32]| {
        let mut pads = row.iter().enumerate().filter(|&(_, &token)| token == pad);
        pads.nth(num_padding_at_beginning).map_or(length, |(t, _)| t)
    };
    let ends = [end_of(chosen.tokens), end_of(rejected.tokens)];
    match first_difference(chosen.tokens, rejected.tokens) {
        Some(start) => {
            let end = ends[0].max(ends[1]);
            if start >= end {
                return Err(invalid!("the two responses of a pair differ only after their ends"));
            }
            window_loss(chosen.scores, rejected.scores, start..end, ends, true, PairLabel::default())
        }
        None => window_loss(chosen.scores, rejected.scores, length - 1..length, ends, false, PairLabel::default()),
    }
}

fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// `ends`: one past each response's last token.
fn window_loss(
    chosen: &[f32],
    rejected: &[f32],
    window: std::ops::Range<usize>,
    ends: [usize; 2],
    differ: bool,
    label: PairLabel,
) -> Result<WindowLoss> {
    if window.start == 0 && differ {
        return Err(invalid!("the two responses of a pair differ from the first token on: they need the same prompt"));
    }
    let (c_last, r_last) = (chosen.len() - 1, rejected.len() - 1);
    let (mut c_grad, mut r_grad) = (vec![0.0f64; chosen.len()], vec![0.0f64; rejected.len()]);
    let (mut loss, n) = (0.0, window.len() as f64);
    for t in window.clone() {
        let (c, r) = (t.min(c_last), t.min(r_last));
        check_finite(&[chosen[c], rejected[r]])?;
        let pair = Pair::of(chosen[c], rejected[r], label);
        loss += pair.loss;
        c_grad[c] += pair.slope;
        r_grad[r] -= pair.slope;
    }
    let mean = |grad: Vec<f64>| grad.into_iter().map(|g| (g / n) as f32).collect();
    Ok(WindowLoss {
        loss: loss / n,
        chosen_grad: mean(c_grad),
        rejected_grad: mean(r_grad),
        window,
        // A row whose end is at 0 is read at its last position, like index -1.
        chosen_end: chosen[ends[0].checked_sub(1).unwrap_or(c_last)],
        rejected_end: rejected[ends[1].checked_sub(1).unwrap_or(r_last)],
    })
}

/// `-p log sigmoid(x) - (1 - p) log sigmoid(-x)` with `x = better - worse - margin`, and its derivative `sigmoid(x) - p` with
/// respect to `better` (the negative of that with respect to `worse`). p is the probability that `better` is preferred.
struct Pair {
    loss: f64,
    slope: f64,
}

impl Pair {
    fn of(better: f32, worse: f32, label: PairLabel) -> Self {
        let x = f64::from(better) - f64::from(worse) - f64::from(label.margin());
        let p = f64::from(label.chosen_probability());
        // All use exp(-|x|), which cannot overflow.
        let small = (-x.abs()).exp();
        let side = |is_small| if is_small { small } else { 1.0 } / (1.0 + small);
        let (right, wrong) = (side(x < 0.0), side(x >= 0.0)); // sigmoid(x), sigmoid(-x)
        let loss = |x: f64| (-x).max(0.0) + small.ln_1p(); // -log sigmoid(x)
        Self { loss: p * loss(x) + (1.0 - p) * loss(-x), slope: (1.0 - p) * right - p * wrong }
    }
}

fn check_finite(scores: &[f32]) -> Result<()> {
    let bad = scores.iter().find(|s| !s.is_finite());
    ensure!(bad.is_none(), diverged!("a score is {}: the model diverged", bad.unwrap_or(&0.0)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/reward_loss.json")).unwrap()
    }

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    }

    fn ids(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    }

    /// f64 arithmetic, rounded once to f32.
    fn assert_grads(got: &[f32], want: &Value, what: &str) {
        let want = want.as_array().unwrap();
        assert_eq!(got.len(), want.len(), "{what}");
        for (g, w) in got.iter().zip(want.iter().map(|w| w.as_f64().unwrap())) {
            assert!((f64::from(*g) - w).abs() <= 6e-8 * w.abs() + 1e-16, "{what}: {g} {w}");
        }
    }

    fn assert_loss(got: f64, want: &Value) {
        let want = want.as_f64().unwrap();
        assert!((got - want).abs() <= 1e-12 * want.max(1.0), "{got} {want}");
    }

    #[test]
    fn all_pairs_of_ranked_responses_match_autograd_golden() {
        for case in golden()["ranked"].as_array().unwrap() {
            let out = ranked(&floats(&case["scores"])).unwrap();
            assert_loss(out.loss, &case["loss"]);
            assert_grads(&out.grads, &case["grad"], "ranked");
            assert_eq!(out.right as u64, case["right"].as_u64().unwrap());
            assert_eq!(out.pairs, out.grads.len() * (out.grads.len() - 1) / 2);
        }
    }

    #[test]
    fn labelled_pairs_match_the_formula_in_50_digits() {
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden/reward_labels.json")).unwrap();
        for case in golden.as_array().unwrap() {
            let scores: [f32; 2] = floats(&case["scores"]).try_into().unwrap();
            let at = |key: &str| case[key].as_f64().unwrap();
            let label = PairLabel::new(at("chosen_probability") as f32, at("margin") as f32);
            let out = labelled(scores, label).unwrap();
            assert_loss(out.loss, &case["loss"]);
            assert_grads(&out.grads, &case["grad"], &case.to_string());
            assert_eq!((out.right, out.pairs), (at("right") as usize, at("pairs") as usize), "{case}");
            // The same at every position of a window.
            let row = |tokens: &'static [u32], score: f32| (tokens, vec![score; 3]);
            let (chosen, rejected) = (row(&[7, 1, 2], scores[0]), row(&[7, 3, 4], scores[1]));
            let scored = |row: &(&'static [u32], Vec<f32>)| (row.0, row.1.clone());
            let ((c, cs), (r, rs)) = (scored(&chosen), scored(&rejected));
            let (c, r) = (Scored { tokens: c, scores: &cs }, Scored { tokens: r, scores: &rs });
            let window = divergence_to_end_labelled(c, r, label).unwrap();
            assert_loss(window.loss, &case["loss"]);
            let halves = window.chosen_grad.iter().map(|&g| f64::from(g)).sum::<f64>();
            assert!((halves - f64::from(out.grads[0])).abs() < 1e-7, "{case}");
        }
        let plain = [0.25, -1.0];
        let (labelled, ranked) = (labelled(plain, PairLabel::default()).unwrap(), ranked(&plain).unwrap());
        assert_eq!((labelled.loss, labelled.grads, labelled.right), (ranked.loss, ranked.grads, ranked.right));
    }

    #[test]
    fn ragged_windows_match_autograd_golden() {
        let golden = golden();
        for (i, case) in golden["ragged"].as_array().unwrap().iter().enumerate() {
            let (c, r) = (ids(&case["chosen"]), ids(&case["rejected"]));
            let (cs, rs) = (floats(&case["chosen_scores"]), floats(&case["rejected_scores"]));
            let out =
                divergence_to_end(Scored { tokens: &c, scores: &cs }, Scored { tokens: &r, scores: &rs }).unwrap();
            assert_eq!(
                [out.window.start as u64, out.window.end as u64].map(Value::from),
                [case["start"].clone(), case["end"].clone()]
            );
            assert_loss(out.loss, &case["loss"]);
            assert_grads(&out.chosen_grad, &case["chosen_grad"], &format!("chosen {i}"));
            assert_grads(&out.rejected_grad, &case["rejected_grad"], &format!("rejected {i}"));
            assert_eq!((out.chosen_end, out.rejected_end), (*cs.last().unwrap(), *rs.last().unwrap()));
        }
    }

    #[test]
    fn padded_windows_match_dschat_golden_pads_included() {
        let golden = golden();
        let pad = golden["pad"].as_u64().unwrap() as u32;
        let mut pads_with_gradient = 0;
        for (i, case) in golden["padded"].as_array().unwrap().iter().enumerate() {
            let (c, r) = (ids(&case["chosen"]), ids(&case["rejected"]));
            let (cs, rs) = (floats(&case["chosen_scores"]), floats(&case["rejected_scores"]));
            let leading = case["leading"].as_u64().unwrap() as usize;
            let (chosen, rejected) = (Scored { tokens: &c, scores: &cs }, Scored { tokens: &r, scores: &rs });
            let out = divergence_to_end_padded(chosen, rejected, pad, leading).unwrap();
            assert_eq!(Value::from(out.window.start), case["start"], "{i}");
            assert_eq!(Value::from(out.window.end), case["end"], "{i}");
            assert_loss(out.loss, &case["loss"]);
            assert_grads(&out.chosen_grad, &case["chosen_grad"], &format!("chosen {i}"));
            assert_grads(&out.rejected_grad, &case["rejected_grad"], &format!("rejected {i}"));
            assert_eq!(f64::from(out.chosen_end), case["chosen_end"].as_f64().unwrap());
            assert_eq!(f64::from(out.rejected_end), case["rejected_end"].as_f64().unwrap());
            let sides = [(&c, &out.chosen_grad), (&r, &out.rejected_grad)];
            let touched =
                sides.iter().flat_map(|(ids, g)| ids.iter().zip(g.iter())).filter(|x| *x.0 == pad && *x.1 != 0.0);
            pads_with_gradient += touched.count();
        }
        assert!(pads_with_gradient > 3, "the golden values must cover scores at pads");
    }

    #[test]
    fn adding_a_constant_to_every_score_changes_nothing() {
        let scores = [0.5f32, 2.0, -1.25];
        let (here, there) = (ranked(&scores).unwrap(), ranked(&scores.map(|s| s + 64.0)).unwrap());
        assert_eq!((here.loss, here.grads.clone()), (there.loss, there.grads));
        assert!(here.grads.iter().sum::<f32>().abs() < 1e-7);
    }

    #[test]
    fn extreme_scores_stay_finite_and_keep_their_slope() {
        let out = ranked(&[-3e38, 3e38]).unwrap();
        assert!((out.loss / 6e38 - 1.0).abs() < 1e-6 && out.grads == [-1.0, 1.0], "{out:?}");
        let out = ranked(&[3e38, -3e38]).unwrap();
        assert_eq!((out.loss, out.grads), (0.0, vec![0.0, 0.0]));
    }

    #[test]
    fn pairs_that_cannot_be_compared_are_refused() {
        assert!(ranked(&[1.0]).is_err());
        assert!(ranked(&[1.0, f32::NAN]).is_err());
        let row = |tokens: &'static [u32], scores: &'static [f32]| Scored { tokens, scores };
        let (a, b) = (row(&[4, 5], &[0.0, 1.0]), row(&[6, 5], &[0.0, 1.0]));
        assert!(divergence_to_end(a, b).unwrap_err().to_string().contains("same prompt"));
        assert!(divergence_to_end_padded(a, b, 9, 0).unwrap_err().to_string().contains("same prompt"));
        assert!(divergence_to_end(a, row(&[4], &[])).is_err());
        assert!(divergence_to_end(a, row(&[], &[])).is_err());
        assert!(divergence_to_end_padded(a, row(&[4, 5, 6], &[0.0; 3]), 9, 0).is_err());
        let (a, b) = (row(&[4, 9, 5], &[0.0; 3]), row(&[4, 9, 6], &[0.0; 3]));
        assert!(divergence_to_end_padded(a, b, 9, 0).unwrap_err().to_string().contains("ends"));
    }
}
