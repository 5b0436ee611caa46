//! The first test of the project: every adapter tensor of every role gets a finite, non-zero gradient, equal to candle's
//! autograd over a plain composition of the whole network and to a central difference.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{D, Device, Tensor, Var};

use super::adapter::{Adapter, Gradients, LoraConfig, TargetModules};
use super::base::Base;
use super::batch::{Batch, Targets};
use super::block::{Block, Checkpointing};
use super::generate::{Finish, Sampling, generate};
use super::roles::{Policy, Scorer};
use crate::model::config::{DecoderConfig, RopeScaling};
use crate::ops::weight::Weight;
use crate::rng::SplitMix64;

fn random(n: usize, scale: f32, shift: f32, seed: u64) -> Vec<f32> {
    let mut rng = SplitMix64::new(seed);
    (0..n).map(|_| (rng.uniform() as f32 * 2.0 - 1.0) * scale + shift).collect()
}

fn config() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 50,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 40,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: vec![0],
        model_name: "tiny".into(),
    }
}

/// A base of random weights; untied, so that both tables are exercised.
pub(crate) fn tiny_base() -> Base {
    let c = config();
    let w = |n: usize, k: usize, seed: u64| Weight::from_f32(&random(n * k, 0.4, 0.0, seed), n, k).unwrap();
    let (d, kv, f) = (c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size);
    let blocks = (0..c.num_hidden_layers as u64)
        .map(|l| Block {
            linears: [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]
                .into_iter()
                .enumerate()
                .map(|(i, (n, k))| w(n, k, 100 * l + i as u64))
                .collect(),
            input_norm: random(d, 0.3, 1.0, 900 + l),
            post_attention_norm: random(d, 0.3, 1.0, 950 + l),
        })
        .collect();
    let (embedding, output) = (w(c.vocab_size, d, 1000), w(c.vocab_size, d, 1001));
    Base::from_parts(c, embedding, blocks, random(d, 0.3, 1.0, 1002), Some(output), "tiny".into()).unwrap()
}

/// An adapter whose B is not zero and whose alpha is not its rank.
pub(crate) fn adapter(base: &Base, layers: Option<Vec<usize>>, seed: u64) -> Adapter {
    let config = LoraConfig {
        r: 3,
        lora_alpha: 5.0,
        use_rslora: false,
        target_modules: TargetModules::AllLinear,
        layers_to_transform: layers,
        ..LoraConfig::default()
    };
    let adapter = Adapter::init(config, base.shapes(), seed).unwrap().with_head(seed).unwrap();
    let mut trainable = adapter.to_trainable();
    let stepped = trainable
        .parameters()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(i, t)| {
            let noise = random(t.elem_count(), 0.3, 0.0, seed * 1000 + i as u64);
            (t + Tensor::from_vec(noise, t.dims(), &Device::Cpu).unwrap()).unwrap()
        })
        .collect();
    trainable.replace(stepped).unwrap();
    trainable.snapshot()
}

fn batch() -> (Batch, Targets) {
    let mut rng = SplitMix64::new(5);
    let sequences: Vec<Vec<u32>> = [7, 2, 12].iter().map(|&n| (0..n).map(|_| rng.below(50) as u32).collect()).collect();
    let batch = Batch::new(&sequences).unwrap();
    let targets = Targets::responses(&batch, &[4, 1, 9]).unwrap();
    (batch, targets)
}

fn dense(w: &Weight) -> Tensor {
    Tensor::from_vec(w.to_f32(), (w.rows(), w.cols()), &Device::Cpu).unwrap()
}

/// The whole network out of candle's plain operations: hidden states (N, D) after the final norm.
fn plain_hidden(base: &Base, batch: &Batch, vars: &HashMap<String, Var>, scale: f64) -> candle_core::Result<Tensor> {
    let (c, dev) = (base.config(), &Device::Cpu);
    let weights: HashMap<String, Tensor> = base.weights().into_iter().map(|(n, w)| (n, dense(w))).collect();
    let norms: HashMap<String, Tensor> =
        base.norms().into_iter().map(|(n, v)| (n, Tensor::new(v, dev).unwrap())).collect();
    let norm = |x: &Tensor, name: &str| {
        let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + c.rms_norm_eps)?.sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(&norms[name])
    };
    let freqs = c.inv_freq();
    let mut states = vec![];
    for w in batch.offsets().windows(2) {
        let t = w[1] - w[0];
        let ids = Tensor::new(&batch.tokens()[w[0]..w[1]], dev)?;
        let mut x = weights["model.embed_tokens.weight"].index_select(&ids, 0)?;
        let angles: Vec<f32> = (0..t).flat_map(|p| freqs.iter().map(move |f| p as f32 * f)).collect();
        let angles = Tensor::from_vec(angles, (t, c.head_dim / 2), dev)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let mask: Vec<f32> = (0..t * t).map(|i| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (t, t), dev)?;
        for layer in 0..c.num_hidden_layers {
            let linear = |x: &Tensor, name: &str| {
                let path = base.shapes().module_path(layer, base.shapes().index_of(name).unwrap());
                let y = x.matmul(&weights[&format!("{path}.weight")].t()?)?;
                let name = |f: char| format!("base_model.model.{path}.lora_{f}.weight");
                match (vars.get(&name('A')), vars.get(&name('B'))) {
                    (Some(a), Some(b)) => y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?,
                    _ => Ok(y),
                }
            };
            let heads = |x: Tensor, n: usize| x.reshape((t, n, c.head_dim))?.transpose(0, 1)?.contiguous();
            let rope = |x: Tensor| {
                let half = c.head_dim / 2;
                let (x0, x1) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
                let y0 = (x0.broadcast_mul(&cos)? - x1.broadcast_mul(&sin)?)?;
                Tensor::cat(&[y0, (x1.broadcast_mul(&cos)? + x0.broadcast_mul(&sin)?)?], 2)
            };
            let h = norm(&x, &format!("model.layers.{layer}.input_layernorm.weight"))?;
            let q = rope(heads(linear(&h, "q_proj")?, c.num_attention_heads)?)?;
            let k = rope(heads(linear(&h, "k_proj")?, c.num_key_value_heads)?)?;
            let v = heads(linear(&h, "v_proj")?, c.num_key_value_heads)?;
            let groups = c.num_attention_heads / c.num_key_value_heads;
            let repeat = |x: Tensor| {
                let shape = (c.num_key_value_heads, groups, t, c.head_dim);
                x.unsqueeze(1)?.broadcast_as(shape)?.reshape((c.num_attention_heads, t, c.head_dim))
            };
            let s = (q.matmul(&repeat(k)?.t()?)? / (c.head_dim as f64).sqrt())?.broadcast_add(&mask)?;
            let p = candle_nn::ops::softmax(&s, D::Minus1)?;
            let o = p.matmul(&repeat(v)?)?.transpose(0, 1)?.reshape((t, c.num_attention_heads * c.head_dim))?;
            x = (x + linear(&o, "o_proj")?)?;
            let h = norm(&x, &format!("model.layers.{layer}.post_attention_layernorm.weight"))?;
            let m = (linear(&h, "gate_proj")?.silu()? * linear(&h, "up_proj")?)?;
            x = (x + linear(&m, "down_proj")?)?;
        }
        states.push(norm(&x, "model.norm.weight")?);
    }
    Tensor::cat(&states, 0)
}

fn vars(adapter: &Adapter) -> HashMap<String, Var> {
    adapter.named_tensors().into_iter().map(|(n, t)| (n, Var::from_tensor(&t.copy().unwrap()).unwrap())).collect()
}

fn relative_error(got: &Tensor, want: &Tensor) -> f32 {
    let top = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    top(&(got - want).unwrap()) / top(want)
}

/// Every tensor's gradient: there, finite, not zero, and candle's.
fn assert_gradients(adapter: &Adapter, grads: &Gradients, want: impl Fn(&str) -> Option<Tensor>) {
    let trainable = adapter.to_trainable();
    let flat = trainable.flat_gradients(grads).unwrap();
    let names = trainable.names();
    assert_eq!(flat.len(), names.len());
    for (name, got) in names.iter().zip(flat) {
        let values: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
        assert!(values.iter().all(|v| v.is_finite()), "{name}");
        assert!(values.iter().any(|&v| v != 0.0), "{name}: the gradient is zero");
        // f32 through three blocks both ways; one wrong term anywhere is orders above.
        let e = relative_error(got, &want(name).unwrap_or_else(|| panic!("{name}: candle has none")));
        assert!(e < 1e-4, "{name}: relative error {e:e}");
    }
}

#[test]
fn every_policy_gradient_is_autograds_with_both_checkpoints() -> Result<()> {
    let base = tiny_base();
    let (batch, targets) = batch();
    let r = targets.rows.len();
    let (dlogp, dentropy) = (random(r, 1.0, 0.0, 8), random(r, 0.5, 0.0, 9));
    for (layers, checkpoint) in
        [(None, Checkpointing::Off), (None, Checkpointing::Block), (Some(vec![1]), Checkpointing::Off)]
    {
        let mut actor = adapter(&base, layers, 3);
        actor = actor.with_score_head(None)?;
        let vars = vars(&actor);
        let hidden = plain_hidden(&base, &batch, &vars, 5.0 / 3.0)?;
        let rows = Tensor::new(targets.rows.iter().map(|&i| i as u32).collect::<Vec<_>>(), &Device::Cpu)?;
        let logits = (hidden.index_select(&rows, 0)?.matmul(&dense(base.output()).t()?)? / 0.8)?;
        let logp = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
        let ids = Tensor::from_vec(targets.tokens.clone(), (r, 1), &Device::Cpu)?;
        let chosen = logp.gather(&ids, 1)?.squeeze(1)?;
        let entropy = (logp.exp()? * &logp)?.sum(D::Minus1)?.neg()?;
        let loss = ((&chosen * Tensor::new(&dlogp[..], &Device::Cpu)?)?.sum_all()?
            + (&entropy * Tensor::new(&dentropy[..], &Device::Cpu)?)?.sum_all()?)?;
        let want = loss.backward()?;
        let policy = Policy::new(&base, Some(&actor));
        let (stats, grads) =
            policy.gradients(&batch, &targets, 0.8, checkpoint, |_| Ok((dlogp.clone(), dentropy.clone())))?;
        assert!(relative_error(&Tensor::new(stats.logprobs, &Device::Cpu)?, &chosen) < 1e-5);
        assert!(relative_error(&Tensor::new(stats.entropy, &Device::Cpu)?, &entropy) < 1e-5);
        assert_gradients(&actor, &grads, |n| vars.get(n).and_then(|v| want.get(v).cloned()));
    }
    Ok(())
}

#[test]
fn every_scorer_gradient_is_autograds_and_the_heads_too() -> Result<()> {
    let base = tiny_base();
    let (batch, targets) = batch();
    let critic = adapter(&base, None, 4);
    let vars = vars(&critic);
    let rows: Vec<u32> = targets.rows.iter().map(|&i| i as u32).collect();
    let dvalues = random(rows.len(), 1.0, 0.2, 8);
    let hidden = plain_hidden(&base, &batch, &vars, 5.0 / 3.0)?.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
    let values = hidden.matmul(&vars["base_model.model.score.weight"].t()?)?.squeeze(1)?;
    let want = (&values * Tensor::new(&dvalues[..], &Device::Cpu)?)?.sum_all()?.backward()?;
    let scorer = Scorer::new(&base, &critic)?;
    let (got, grads) = scorer.gradients(&batch, &targets.rows, Checkpointing::Off, |_| Ok(dvalues.clone()))?;
    assert!(relative_error(&Tensor::new(got, &Device::Cpu)?, &values) < 1e-5);
    assert_gradients(&critic, &grads, |n| vars.get(n).and_then(|v| want.get(v).cloned()));
    let bias: Vec<f32> = grads.head_bias.as_ref().unwrap().to_vec1()?;
    assert!((bias[0] - dvalues.iter().sum::<f32>()).abs() < 1e-5);
    Ok(())
}

#[test]
fn gradients_equal_central_differences_along_themselves() -> Result<()> {
    let base = tiny_base();
    let (batch, targets) = batch();
    let actor = adapter(&base, None, 3).with_score_head(None)?;
    let loss = |a: &Adapter| -> Result<f64> {
        let stats = Policy::new(&base, Some(a)).logprobs(&batch, &targets, 1.0)?;
        Ok(stats.logprobs.iter().map(|&l| f64::from(l)).sum())
    };
    let ones = vec![1f32; targets.rows.len()];
    let zeros = vec![0f32; targets.rows.len()];
    let (_, grads) =
        Policy::new(&base, Some(&actor)).gradients(&batch, &targets, 1.0, Checkpointing::Off, |_| Ok((ones, zeros)))?;
    let trainable = actor.to_trainable();
    let flat = trainable.flat_gradients(&grads)?;
    for (i, g) in flat.iter().enumerate() {
        let g: Vec<f32> = g.flatten_all()?.to_vec1()?;
        let norm = g.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        // Moving this one tensor by eps along its gradient changes the loss by eps * |g|.
        let eps = 2e-3;
        let mut sides = vec![];
        for sign in [1.0, -1.0] {
            let mut moved = actor.to_trainable();
            let mut tensors = moved.parameters()?;
            let step = g.iter().map(|&v| (sign * eps * f64::from(v) / norm) as f32).collect::<Vec<_>>();
            tensors[i] = (&tensors[i] + Tensor::from_vec(step, tensors[i].dims(), &Device::Cpu)?)?;
            moved.replace(tensors)?;
            sides.push(loss(moved.view())?);
        }
        let numeric = (sides[0] - sides[1]) / (2.0 * eps);
        // f32 rounding of a sum of 14 terms over 4e-3, and the cubic term of the loss.
        assert!((numeric - norm).abs() < 0.02 * norm + 0.02, "{}: {numeric} {norm}", trainable.names()[i]);
    }
    Ok(())
}

#[test]
fn sampled_logprobs_equal_a_teacher_forced_pass_and_do_not_depend_on_the_batch() -> Result<()> {
    let base = tiny_base();
    let actor = adapter(&base, None, 3);
    let policy = Policy::new(&base, Some(&actor));
    let prompts = vec![vec![3, 4, 5], vec![7], vec![1, 2, 3, 4, 5, 6, 7, 8], vec![9, 9]];
    let seeds = [11, 12, 13, 14];
    let sampling = Sampling { temperature: 0.9, top_k: 0, top_p: 1.0, max_new_tokens: 17, stop: vec![0, 1, 2, 3] };
    let got = generate(policy, &prompts, &seeds, &sampling, |_, _| {})?;
    assert!(got.iter().any(|r| r.finish == Finish::Stop) && got.iter().any(|r| r.tokens.len() > 4));
    for (s, (prompt, response)) in prompts.iter().zip(&got).enumerate() {
        assert_eq!(response.finish == Finish::Stop, sampling.stop.contains(response.tokens.last().unwrap()));
        let full: Vec<u32> = prompt.iter().chain(&response.tokens).copied().collect();
        let batch = Batch::new(&[full])?;
        let targets = Targets::responses(&batch, &[response.tokens.len()])?;
        let scored = policy.logprobs(&batch, &targets, 0.9)?;
        for (a, b) in response.logprobs.iter().zip(&scored.logprobs) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
        let alone = generate(policy, &prompts[s..=s], &seeds[s..=s], &sampling, |_, _| {})?;
        assert_eq!(alone[0].tokens, response.tokens);
    }
    // Greedy takes the argmax of a scored pass; top-k 1 and a tiny top-p are greedy too.
    let greedy = Sampling { temperature: 0.0, stop: vec![], ..sampling.clone() };
    let want = generate(policy, &prompts, &seeds, &greedy, |_, _| {})?;
    for (k, p) in [(1, 1.0), (0, 1e-9)] {
        let narrow = Sampling { temperature: 1.0, top_k: k, top_p: p, ..greedy.clone() };
        let got = generate(policy, &prompts, &seeds, &narrow, |_, _| {})?;
        assert_eq!(
            got.iter().map(|r| &r.tokens).collect::<Vec<_>>(),
            want.iter().map(|r| &r.tokens).collect::<Vec<_>>()
        );
    }
    let full: Vec<u32> = prompts[0].iter().chain(&want[0].tokens).copied().collect();
    let batch = Batch::new(&[full])?;
    let targets = Targets::responses(&batch, &[want[0].tokens.len()])?;
    assert_eq!(policy.logprobs(&batch, &targets, 1.0)?.argmax, want[0].tokens);
    Ok(())
}

#[test]
fn sampling_follows_the_softmax() -> Result<()> {
    let base = tiny_base();
    let policy = Policy::new(&base, None);
    let n = 4000;
    let sampling = Sampling { temperature: 1.5, top_k: 0, top_p: 1.0, max_new_tokens: 1, stop: vec![] };
    let prompts = vec![vec![3u32, 4]; n];
    let seeds: Vec<u64> = (0..n as u64).collect();
    let mut counts = HashMap::<u32, (usize, f32)>::new();
    for r in generate(policy, &prompts, &seeds, &sampling, |_, _| {})? {
        let entry = counts.entry(r.tokens[0]).or_insert((0, r.logprobs[0]));
        entry.0 += 1;
    }
    for (token, (count, logprob)) in counts {
        let p = f64::from(logprob.exp());
        let sd = (n as f64 * p * (1.0 - p)).sqrt();
        // Five standard deviations over fifty tokens: a false alarm in 35,000 seeds, and the seed is fixed.
        assert!((count as f64 - n as f64 * p).abs() < 5.0 * sd + 1.0, "token {token}: {count} of {n}, p = {p}");
    }
    Ok(())
}
