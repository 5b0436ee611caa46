//! The network as a plain composition of candle's operations over the adapter's variables, which its autograd differentiates.
//! Read `../gradcheck.rs` for what is held against it.

use super::*;

pub(super) fn dense(w: &Weight) -> Tensor {
    Tensor::from_vec(w.to_f32(), (w.rows(), w.cols()), &Device::Cpu).unwrap()
}

/// DoRA: u with its columns scaled by m / n, n being the row norms of `whole` as constants. LoRA has no m.
pub(super) fn plain_dora(u: Tensor, whole: &Tensor, magnitude: Option<&Var>) -> candle_core::Result<Tensor> {
    let Some(magnitude) = magnitude else { return Ok(u) };
    u.broadcast_mul(&(magnitude.as_tensor() / whole.sqr()?.sum(1)?.sqrt()?.detach())?)
}

/// x W^T with the branch of the module at `path`, if there is one.
pub(super) fn plain_product(
    x: &Tensor,
    w: &Tensor,
    vars: &HashMap<String, Var>,
    path: &str,
    scale: f64,
) -> candle_core::Result<Tensor> {
    let var = |factor: &str| vars.get(&format!("base_model.model.{path}.{factor}"));
    let y = x.matmul(&w.t()?)?;
    let (Some(a), Some(b)) = (var("lora_A.weight"), var("lora_B.weight")) else { return Ok(y) };
    let u = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?)?;
    plain_dora(u, &(w + (b.matmul(a)? * scale)?)?, var("lora_magnitude_vector"))
}

/// Rows of an embedding matrix, likewise.
pub(super) fn plain_rows(
    w: &Tensor,
    ids: &Tensor,
    vars: &HashMap<String, Var>,
    path: &str,
    scale: f64,
) -> candle_core::Result<Tensor> {
    let var = |factor: &str| vars.get(&format!("base_model.model.{path}.{factor}"));
    let x = w.index_select(ids, 0)?;
    let (Some(a), Some(b)) = (var("lora_embedding_A"), var("lora_embedding_B")) else { return Ok(x) };
    let z = a.t()?.contiguous()?.index_select(ids, 0)?;
    let u = (x + (z.matmul(&b.t()?)? * scale)?)?;
    plain_dora(u, &(w.t()? + (b.matmul(a)? * scale)?)?, var("lora_magnitude_vector"))
}

/// The log-probabilities (R, vocab) of the targets' positions.
pub(super) fn plain_log_softmax(
    base: &Base,
    batch: &Batch,
    targets: &Targets,
    vars: &HashMap<String, Var>,
    temperature: f64,
) -> Result<Tensor> {
    let (head, scale) = (base.lm_head(None), 5.0 / 3.0);
    let path = base.shapes().outer(NonBlockModule::Head).map_or("", |map| map.path);
    let rows = Tensor::new(targets.rows.iter().map(|&i| i as u32).collect::<Vec<_>>(), &Device::Cpu)?;
    let hidden = plain_hidden(base, batch, vars, scale)?.index_select(&rows, 0)?;
    let products = plain_product(&hidden, &dense(head.weight), vars, path, scale)?;
    let mut logits = (products * f64::from(head.multiplier))?;
    if let Some(cap) = head.soft_cap.map(f64::from) {
        logits = ((logits / cap)?.tanh()? * cap)?;
    }
    Ok(candle_nn::ops::log_softmax(&(logits / temperature)?, D::Minus1)?)
}

/// The whole network composed of candle's operations: hidden states (N, E), the input of the lm_head.
pub(super) fn plain_hidden(
    base: &Base,
    batch: &Batch,
    vars: &HashMap<String, Var>,
    scale: f64,
) -> candle_core::Result<Tensor> {
    let (c, dev, names, shapes) = (base.config(), &Device::Cpu, base.config().names(), base.shapes());
    let weights: HashMap<String, Tensor> = base.weights().into_iter().map(|(n, w)| (n, dense(w))).collect();
    let vectors: HashMap<String, Tensor> =
        base.vectors().into_iter().map(|(n, v)| (n, Tensor::new(&v[..], dev).unwrap())).collect();
    let outer = |module| shapes.outer(module).map_or("", |map| map.path);
    // A norm without a weight is the identity.
    let norm = |x: &Tensor, path: &str| -> candle_core::Result<Tensor> {
        let Some(weight) = vectors.get(&format!("{path}.weight")) else { return Ok(x.clone()) };
        let x = match c.norm {
            NormStyle::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
            NormStyle::Rms | NormStyle::RmsPlusOne => x.clone(),
        };
        let weight = if c.norm == NormStyle::RmsPlusOne { (weight + 1.0)? } else { weight.clone() };
        let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + c.norm_eps)?.sqrt()?;
        let y = x.broadcast_div(&rms)?.broadcast_mul(&weight)?;
        vectors.get(&format!("{path}.bias")).map_or(Ok(y.clone()), |b| y.broadcast_add(b))
    };
    let act = |x: &Tensor| match c.activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
    };
    // OPT-350M's projections; the identity where there is none.
    let project = |x: Tensor, name: &str| match weights.get(name) {
        Some(w) => plain_product(&x, w, vars, name.trim_end_matches(".weight"), scale),
        None => Ok(x),
    };
    let (hd, nq, nkv) = (c.head_dim, c.num_attention_heads, c.num_key_value_heads);
    let mut states = vec![];
    for bounds in batch.offsets().windows(2) {
        let t = bounds[1] - bounds[0];
        let ids = Tensor::new(&batch.tokens()[bounds[0]..bounds[1]], dev)?;
        let mut x = (plain_rows(&weights[names.embedding], &ids, vars, outer(NonBlockModule::Embedding), scale)?
            * c.embedding_multiplier)?;
        x = project(x, crate::model::config::PROJECT_IN)?;
        if let Some(first) = c.learned_positions {
            x = (x + weights[names.positions].narrow(0, first, t)?)?;
        }
        for layer in 0..c.num_hidden_layers {
            let kind = c.layers[layer];
            let hidden = |i: usize, j: usize| j > i || kind.window.is_some_and(|w| j + w <= i);
            let mask: Vec<f32> =
                (0..t * t).map(|i| if hidden(i / t, i % t) { f32::NEG_INFINITY } else { 0.0 }).collect();
            let mask = Tensor::from_vec(mask, (t, t), dev)?;
            let path = |part: &str| format!("{}.{layer}.{part}", names.blocks);
            let linear = |x: &Tensor, part: &str| -> candle_core::Result<Tensor> {
                let path = path(part);
                let y = plain_product(x, &weights[&format!("{path}.weight")], vars, &path, scale)?;
                vectors.get(&format!("{path}.bias")).map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
            };
            let (freqs, factor) = match kind.rope {
                LayerRope::Local => (c.local_inv_freq(), 1.0),
                LayerRope::Global | LayerRope::None => (c.inv_freq(), c.rope_scaling.attention_factor()),
            };
            let half = freqs.len();
            let angles: Vec<f32> = (0..t).flat_map(|p| freqs.iter().map(move |f| p as f32 * f)).collect();
            let angles = Tensor::from_vec(angles, (t, half), dev)?;
            let (cos, sin) = ((angles.cos()? * factor)?, (angles.sin()? * factor)?);
            let rotate = |x: Tensor| {
                if kind.rope == LayerRope::None {
                    return Ok(x);
                }
                let (x0, x1) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
                let y0 = (x0.broadcast_mul(&cos)? - x1.broadcast_mul(&sin)?)?;
                let y1 = (x1.broadcast_mul(&cos)? + x0.broadcast_mul(&sin)?)?;
                Tensor::cat(&[y0, y1, x.narrow(2, 2 * half, hd - 2 * half)?], 2)
            };
            // Attention.
            let norms = names.norms.map(path);
            let before = |x: &Tensor, i: usize| {
                if c.placement == Placement::AfterSum { Ok(x.clone()) } else { norm(x, &norms[i]) }
            };
            let after =
                |x: Tensor, i: usize| if c.placement == Placement::AfterSum { norm(&x, &norms[i]) } else { Ok(x) };
            let h = before(&x, 0)?;
            let (wq, wkv) = (nq * hd, nkv * hd);
            let (q, k, v) = match c.qkv {
                Qkv::Separate => (linear(&h, names.qkv[0])?, linear(&h, names.qkv[1])?, linear(&h, names.qkv[2])?),
                Qkv::EndToEnd => {
                    let all = linear(&h, names.qkv[0])?;
                    (all.narrow(1, 0, wq)?, all.narrow(1, wq, wkv)?, all.narrow(1, wq + wkv, wkv)?)
                }
                Qkv::PerHead => {
                    let all = linear(&h, names.qkv[0])?.reshape((t, nq, 3, hd))?;
                    let part = |i: usize| all.narrow(2, i, 1)?.reshape((t, wq));
                    (part(0)?, part(1)?, part(2)?)
                }
            };
            let heads = |x: Tensor, n: usize| x.reshape((t, n, hd))?.transpose(0, 1)?.contiguous();
            let normed = |x: Tensor, n: usize, name: &str| -> candle_core::Result<Tensor> {
                match c.qk_norm {
                    QkNorm::PerHead => norm(&heads(x, n)?, &path(name)),
                    QkNorm::Whole | QkNorm::None => heads(norm(&x, &path(name))?, n),
                }
            };
            let q = rotate(normed(q.contiguous()?, nq, "self_attn.q_norm")?)?;
            let k = rotate(normed(k.contiguous()?, nkv, "self_attn.k_norm")?)?;
            let v = heads(v.contiguous()?, nkv)?;
            let repeat = |x: Tensor| x.unsqueeze(1)?.broadcast_as((nkv, nq / nkv, t, hd))?.reshape((nq, t, hd));
            let mut s = (q.matmul(&repeat(k)?.t()?)? * c.attention_multiplier)?;
            if let Some(cap) = c.attention_soft_cap {
                s = ((s / cap)?.tanh()? * cap)?;
            }
            let p = candle_nn::ops::softmax(&s.broadcast_add(&mask)?, D::Minus1)?;
            let o = p.matmul(&repeat(v)?)?.transpose(0, 1)?.reshape((t, wq))?;
            let f = norm(&linear(&o, names.attention_out)?, &norms[1])?;
            let x2 = after((&x + (f * c.residual_multiplier)?)?, 0)?;
            // MLP.
            let h = before(if c.placement == Placement::Parallel { &x } else { &x2 }, 2)?;
            let m = match c.mlp {
                Mlp::Gated => (act(&linear(&h, names.mlp_in[0])?)? * linear(&h, names.mlp_in[1])?)?,
                Mlp::GatedFused => {
                    let (all, f) = (linear(&h, names.mlp_in[0])?, c.intermediate_size);
                    (act(&all.narrow(1, 0, f)?.contiguous()?)? * all.narrow(1, f, f)?)?
                }
                Mlp::Plain => act(&linear(&h, names.mlp_in[0])?)?,
            };
            let f = norm(&linear(&m, names.mlp_out)?, &norms[3])?;
            x = after((x2 + (f * c.residual_multiplier)?)?, 2)?;
        }
        let h = norm(&x, names.final_norm)?;
        states.push(project(h, crate::model::config::PROJECT_OUT)?);
    }
    assert_eq!(shapes.hidden, c.embedding_width);
    Tensor::cat(&states, 0)
}
