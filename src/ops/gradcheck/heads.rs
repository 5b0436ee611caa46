//! Gradient checks of what lies over a weight with a branch (LoRA or DoRA): linear layers and embeddings, log-probabilities over an
//! LM head, the exact KL and the divergence between two of them. Read `../gradcheck.rs` for the other operations.

use super::*;

#[test]
fn logprobs_and_entropy_equal_log_softmax_and_autograd() -> Result<()> {
    on_every_machine(|on| logprobs_over(on, ComputeDtype::F32, CLOSE))
}

/// Factors are exact in bfloat16, so that only the gradient of the logits is rounded.
#[test]
fn logprobs_in_bf16_equal_f32_up_to_the_rounding_of_gradients() -> Result<()> {
    on_every_machine(|on| logprobs_over(on, ComputeDtype::Bf16, 8e-3))
}

fn logprobs_over(on: &Machine, compute: ComputeDtype, close_gradient: f32) -> Result<()> {
    let exact = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(DType::BF16)?.to_dtype(DType::F32)?) };
    for (r, d, v, temperature, multiplier, soft_cap) in [
        (5, 24, 77, 1.0, 1.0, None),
        (15, 40, 1500, 0.7, 1.0, None),
        (1, 8, 5, 2.0, 0.25, None),
        (40, 64, 300, 1.0, 1.0, None),
        (9, 24, 700, 0.8, 1.0, Some(5.0)),
        (3, 24, 77, 1.0, 0.5, Some(3.0)),
    ] {
        let h = Var::from_tensor(&exact((random(&[r, d], 1) * 3.0)?)?)?;
        let dense = exact((random(&[v, d], 2) * 0.3)?)?;
        let w = Weight::from_f32(&dense.flatten_all()?.to_vec1::<f32>()?, v, d).unwrap();
        let w = on.weight(w.with_compute(compute));
        let targets: Vec<u32> = (0..r).map(|i| (i * 311 % v) as u32).collect();
        let mut logits = (h.matmul(&dense.t()?)? * f64::from(multiplier))?;
        if let Some(cap) = soft_cap.map(f64::from) {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        let logits = (logits / temperature)?;
        let head = LmHead { multiplier, soft_cap, ..LmHead::plain(&w) };
        let logp = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
        let index = Tensor::from_vec(targets.clone(), (r, 1), &Device::Cpu)?;
        let chosen = logp.gather(&index, 1)?.squeeze(1)?;
        let entropy = (logp.exp()? * &logp)?.sum(D::Minus1)?.neg()?;
        let (dl, dh) = (random(&[r], 3), random(&[r], 4));
        let loss = ((&chosen * &dl)?.sum_all()? + (&entropy * &dh)?.sum_all()?)?;
        let grads = loss.backward()?;
        let hs = on.put(&h);
        let stats = logprobs::forward(&hs, &head, &targets, temperature)?;
        on.assert_close("logprobs", &stats.logprobs, &chosen);
        on.assert_close("entropy", &stats.entropy, &entropy);
        assert_eq!(stats.argmax, logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
        let (dl, dh): (Vec<f32>, Vec<f32>) = (dl.to_vec1()?, dh.to_vec1()?);
        let got = logprobs::backward(&hs, &head, &targets, temperature, &stats, &dl, &dh)?;
        on.assert_within(close_gradient, "dh", &got.hidden, grads.get(&h).unwrap());
    }
    Ok(())
}

/// LoRA weights of a layer, with DoRA's magnitudes where they are wanted.
struct Branch {
    a: Var,
    b: Var,
    magnitude: Option<Var>,
    norms: Norms,
}

const SCALE: f64 = 0.7;

impl Branch {
    fn new(rank: usize, inputs: usize, outputs: usize, dora: bool) -> Result<Self> {
        let var = |t: Tensor| Var::from_tensor(&t);
        Ok(Self {
            a: var(random(&[rank, inputs], 91))?,
            b: var(random(&[outputs, rank], 92))?,
            magnitude: dora.then(|| var((random(&[outputs], 93) + 2.0)?)).transpose()?,
            norms: Norms::default(),
        })
    }

    fn low_rank(&self) -> LowRank<'_> {
        let dora = self.magnitude.as_ref().map(|magnitude| Dora { magnitude, norms: &self.norms });
        LowRank { a: &self.a, b: &self.b, scale: SCALE, dora, copy: None }
    }

    /// What a linear layer of W (out, in) gives for x; the norms are constants.
    fn linear(&self, x: &Tensor, w: &Tensor) -> candle_core::Result<Tensor> {
        let u = (x.matmul(&w.t()?)? + (x.matmul(&self.a.t()?)?.matmul(&self.b.t()?)? * SCALE)?)?;
        self.scaled(u, &(w + (self.b.matmul(&self.a)? * SCALE)?)?)
    }

    /// Rows `ids` of an embedding matrix W (V, D).
    fn rows(&self, w: &Tensor, ids: &Tensor) -> candle_core::Result<Tensor> {
        let z = self.a.t()?.contiguous()?.index_select(ids, 0)?;
        let u = (w.index_select(ids, 0)? + (z.matmul(&self.b.t()?)? * SCALE)?)?;
        self.scaled(u, &(w.t()? + (self.b.matmul(&self.a)? * SCALE)?)?)
    }

    fn scaled(&self, u: Tensor, whole: &Tensor) -> candle_core::Result<Tensor> {
        let Some(magnitude) = &self.magnitude else { return Ok(u) };
        let norms = whole.sqr()?.sum(1)?.sqrt()?.detach();
        u.broadcast_mul(&(magnitude.as_tensor() / norms)?)
    }

    #[track_caller]
    fn assert_gradients(&self, on: &Machine, limit: f32, got: &linear::BranchGradient, want: &GradStore) {
        let mut got = got.clone();
        linear::BranchGradient::all_to_host([&mut got].into_iter()).unwrap();
        on.assert_within(limit, "dA", &got.a, want.get(&self.a).unwrap());
        on.assert_within(limit, "dB", &got.b, want.get(&self.b).unwrap());
        assert_eq!(got.magnitude.is_some(), self.magnitude.is_some());
        if let (Some(got), Some(magnitude)) = (&got.magnitude, &self.magnitude) {
            // A device has it as a row.
            let want = want.get(magnitude).unwrap();
            on.assert_within(limit, "dm", &Array::from(got.values().reshape(want.dims()).unwrap()), want);
        }
    }
}

#[test]
fn dora_of_a_linear_layer_equals_autograd_with_bias_and_residual() -> Result<()> {
    on_every_machine(|on| {
        for (m, n, k) in [(1, 33, 40), (20, 70, 96)] {
            let (x, (w, dense)) = (Var::from_tensor(&random(&[m, k], 1))?, weight(n, k, 2));
            let (bias, residual, dy) = (random(&[n], 3), random(&[m, n], 4), random(&[m, n], 5));
            let (w, branch) = (on.weight(w), Branch::new(4, k, n, true)?);
            let want = (branch.linear(&x, &dense)?.broadcast_add(&bias)? + &residual)?;
            let grads = (&want * &dy)?.sum_all()?.backward()?;
            let bias = Bias::from(bias.to_vec1::<f32>()?);
            let parts =
                [LinearWithLora { weight: &w, dequantised: None, bias: Some(&bias), lora: Some(branch.low_rank()) }];
            let xs = on.put(&x);
            let (y, saved) = linear::forward(&xs, &parts, Some(&on.put(&residual)))?;
            on.assert_close("y", &y[0], &want);
            let got = linear::backward(&xs, &parts, &saved, &[&on.put(&dy)], InputGradient::Wanted)?;
            on.assert_close("dx", got.input.as_ref().unwrap(), grads.get(&x).unwrap());
            branch.assert_gradients(on, CLOSE, got.lora[0].as_ref().unwrap(), &grads);
        }
        Ok(())
    })
}

#[test]
fn embedding_rows_with_lora_and_dora_equal_autograd() -> Result<()> {
    on_every_machine(|on| {
        let (v, d) = (50, 36);
        let (table, dense) = weight(v, d, 1);
        let table = on.weight(table);
        // Some tokens occur twice.
        let ids: Vec<u32> = (0..21).map(|i| i * i % 50).collect();
        let index = Tensor::new(&ids[..], &Device::Cpu)?;
        let (plain, saved) = embedding::forward(&table, &ids, None)?;
        assert!(saved.is_none());
        on.assert_close("rows", &plain, &dense.index_select(&index, 0)?);
        for dora in [false, true] {
            let (branch, dx) = (Branch::new(3, v, d, dora)?, random(&[ids.len(), d], 2));
            let want = branch.rows(&dense, &index)?;
            let grads = (&want * &dx)?.sum_all()?.backward()?;
            let (x, saved) = embedding::forward(&table, &ids, Some(branch.low_rank()))?;
            on.assert_close("x", &x, &want);
            let got = embedding::backward(&table, &ids, branch.low_rank(), &saved.unwrap(), &on.put(&dx))?;
            branch.assert_gradients(on, CLOSE, &got, &grads);
        }
        Ok(())
    })
}

/// log softmax of an lm_head's logits, its branch included. The maximum is a constant here: candle_nn's function differentiates
/// it, and puts the rounding of a sum over the vocabulary (2e-5 to 1e-4 of the largest gradient of a KL) on the argmax.
fn log_softmax(h: &Tensor, head: &LmHead<'_>, dense: &Tensor, branch: &Branch, temperature: f64) -> Result<Tensor> {
    let mut logits = (branch.linear(h, dense)? * f64::from(head.multiplier))?;
    if let Some(cap) = head.soft_cap.map(f64::from) {
        logits = ((logits / cap)?.tanh()? * cap)?;
    }
    let logits = (logits / temperature)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    Ok(shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
}

/// (multiplier, soft cap, temperature, DoRA).
const HEADS: [(f32, Option<f32>, f64, bool); 3] =
    [(1.0, None, 1.0, false), (0.5, Some(3.0), 0.7, false), (0.8, None, 1.3, true)];

#[test]
fn logprobs_over_an_lm_head_with_lora_or_dora_equal_autograd() -> Result<()> {
    on_every_machine(|on| {
        let (r, d, v) = (9, 24, 700);
        let (w, dense) = weight(v, d, 1);
        let w = on.weight(w);
        for (multiplier, soft_cap, temperature, dora) in HEADS {
            let (h, branch) = (Var::from_tensor(&random(&[r, d], 2))?, Branch::new(3, d, v, dora)?);
            let head = LmHead { multiplier, soft_cap, lora: Some(branch.low_rank()), ..LmHead::plain(&w) };
            let targets: Vec<u32> = (0..r).map(|i| (i * 311 % v) as u32).collect();
            let logp = log_softmax(&h, &head, &dense, &branch, temperature)?;
            let chosen = logp.gather(&Tensor::from_vec(targets.clone(), (r, 1), &Device::Cpu)?, 1)?.squeeze(1)?;
            let entropy = (logp.exp()? * &logp)?.sum(D::Minus1)?.neg()?;
            let (dl, dh) = (random(&[r], 3), random(&[r], 4));
            let grads = ((&chosen * &dl)?.sum_all()? + (&entropy * &dh)?.sum_all()?)?.backward()?;
            let hs = on.put(&h);
            let stats = logprobs::forward(&hs, &head, &targets, temperature)?;
            on.assert_close("logprobs", &stats.logprobs, &chosen);
            on.assert_close("entropy", &stats.entropy, &entropy);
            let (dl, dh): (Vec<f32>, Vec<f32>) = (dl.to_vec1()?, dh.to_vec1()?);
            let got = logprobs::backward(&hs, &head, &targets, temperature, &stats, &dl, &dh)?;
            on.assert_close("dh", &got.hidden, grads.get(&h).unwrap());
            branch.assert_gradients(on, CLOSE, &got.lora.unwrap(), &grads);
        }
        Ok(())
    })
}

#[test]
fn the_exact_kl_between_two_branches_of_one_lm_head_equals_autograd() -> Result<()> {
    on_every_machine(|on| {
        let (r, d, v) = (9, 24, 700);
        let (w, dense) = weight(v, d, 1);
        let w = on.weight(w);
        for (multiplier, soft_cap, temperature, dora) in HEADS {
            let (h, g, dkl) = (Var::from_tensor(&random(&[r, d], 2))?, random(&[r, d], 3), random(&[r], 4));
            let (ours, theirs) = (Branch::new(3, d, v, dora)?, Branch::new(2, d, v, false)?);
            let plain = LmHead { multiplier, soft_cap, ..LmHead::plain(&w) };
            let [p, q] = [&ours, &theirs].map(|of| LmHead { lora: Some(of.low_rank()), ..plain });
            let logp = log_softmax(&h, &p, &dense, &ours, temperature)?;
            let logq = log_softmax(&g, &q, &dense, &theirs, temperature)?.detach();
            let want = (logp.exp()? * (&logp - logq)?)?.sum(D::Minus1)?;
            let grads = (&want * &dkl)?.sum_all()?.backward()?;
            let (hs, gs) = (on.put(&h), on.put(&g));
            let (p, q) = (kl::Side { hidden: &hs, head: p }, kl::Side { hidden: &gs, head: q });
            let saved = kl::forward(p, q, temperature)?;
            on.assert_close("kl", &saved.kl, &want);
            let got = kl::backward(p, q, temperature, &saved, &dkl.to_vec1::<f32>()?)?;
            on.assert_close("dh", &got.hidden, grads.get(&h).unwrap());
            ours.assert_gradients(on, CLOSE, &got.lora.unwrap(), &grads);
        }
        Ok(())
    })
}

/// The student has 700 ids; the teacher's lm_head is of another width and has more rows, or fewer.
#[test]
fn the_divergence_to_a_teacher_with_another_lm_head_equals_autograd() -> Result<()> {
    on_every_machine(|on| {
        let (r, d, wide, v) = (9, 24, 32, 700);
        let (w, dense) = weight(v, d, 1);
        let w = on.weight(w);
        for (beta, rows) in [(0.0, 700), (1.0, 710), (0.3, 640), (0.9, 700)] {
            let (other, other_dense) = weight(rows, wide, 5);
            let other = on.weight(other);
            let ids = v.min(rows);
            for (multiplier, soft_cap, temperature, dora) in HEADS {
                let (h, g, weights) = (Var::from_tensor(&random(&[r, d], 2))?, random(&[r, wide], 3), random(&[r], 4));
                let (ours, theirs) = (Branch::new(3, d, v, dora)?, Branch::new(2, wide, rows, false)?);
                let s = LmHead { multiplier, soft_cap, lora: Some(ours.low_rank()), ..LmHead::plain(&w) };
                let t = LmHead { soft_cap: Some(5.0), lora: Some(theirs.low_rank()), ..LmHead::plain(&other) };
                // Renormalised over the ids that both have.
                let among = |logp: Tensor| -> Result<Tensor> {
                    let logp = logp.narrow(1, 0, ids)?;
                    Ok(logp.broadcast_sub(&logp.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
                };
                let logs = among(log_softmax(&h, &s, &dense, &ours, temperature)?)?;
                let logt = among(log_softmax(&g, &t, &other_dense, &theirs, temperature)?.detach())?;
                let kl = |p: &Tensor, q: &Tensor| -> Result<Tensor> { Ok((p.exp()? * (p - q)?)?.sum(D::Minus1)?) };
                let want = match beta {
                    0.0 => kl(&logt, &logs)?,
                    1.0 => kl(&logs, &logt)?,
                    _ => {
                        let m = ((logs.exp()? * (1.0 - beta))? + (logt.exp()? * beta)?)?.log()?;
                        ((kl(&logt, &m)? * beta)? + (kl(&logs, &m)? * (1.0 - beta))?)?
                    }
                };
                let grads = (&want * &weights)?.sum_all()?.backward()?;
                let (hs, gs) = (on.put(&h), on.put(&g));
                let student = divergence::Side { hidden: &hs, head: s };
                let teacher = divergence::Side { hidden: &gs, head: t };
                let of = divergence::Divergence { beta, temperature };
                let saved = divergence::forward(student, teacher, of)?;
                on.assert_close("divergence", &saved.value, &want);
                let got = divergence::backward(student, teacher, of, &saved, &weights.to_vec1::<f32>()?)?;
                on.assert_close("dh", &got.hidden, grads.get(&h).unwrap());
                ours.assert_gradients(on, CLOSE, &got.lora.unwrap(), &grads);
            }
        }
        Ok(())
    })
}
