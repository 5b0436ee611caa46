//! Gradient check of every operation, on the host and on the emulated machine: the forward against a plain composition of
//! candle operations, the backward against candle's autograd over it. Lengths are ragged, heads grouped, ranks and scales
//! unequal, and B is not zero. Read `model/gradcheck.rs` for the checks of the whole network.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, IndexOp, Tensor, Var};

use crate::device::{self, Array, testing};
use crate::ops::activation::Activation;
use crate::ops::attention;
use crate::ops::attention::{Heads, KvCache, KvCacheType};
use crate::ops::columns;
use crate::ops::columns::Fusion;
use crate::ops::divergence;
use crate::ops::embedding;
use crate::ops::kl;
use crate::ops::linear;
use crate::ops::linear::low_rank::{Dora, Norms};
use crate::ops::linear::{Bias, InputGradient, LinearWithLora, LowRank};
use crate::ops::logprobs;
use crate::ops::logprobs::LmHead;
use crate::ops::norm::{Norm, NormKind};
use crate::ops::rope;
use crate::ops::rope::{Direction, RopeTable};
use crate::ops::rows;
use crate::ops::score;
use crate::ops::weight::{Bytes, ComputeDtype, StorageDType, Weight};
use crate::rng::SplitMix64;

mod heads;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = SplitMix64::new(seed);
    let n = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| (rng.uniform() * 2.0 - 1.0) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn weight(n: usize, k: usize, seed: u64) -> (Weight, Tensor) {
    let w = (random(&[n, k], seed) * 0.3).unwrap();
    let values: Vec<f32> = w.flatten_all().unwrap().to_vec1().unwrap();
    (Weight::from_f32(&values, n, k).unwrap(), w)
}

/// A machine that a claim is checked on.
struct Machine(Option<device::Device>);

impl Machine {
    /// The tensor's values on the machine.
    fn put(&self, tensor: &Tensor) -> Array {
        Array::on(tensor.clone(), self.0.as_ref()).unwrap()
    }

    fn weight(&self, weight: Weight) -> Weight {
        weight.with_place(self.0.clone())
    }

    #[track_caller]
    fn assert_within(&self, limit: f32, name: &str, got: &impl Values, want: &Tensor) {
        let e = error(&got.values(), want);
        let machine = self.0.as_ref().map_or("the host".into(), device::Device::name);
        assert!(e < limit, "{name} on {machine}: relative error {e:e}");
    }

    #[track_caller]
    fn assert_close(&self, name: &str, got: &impl Values, want: &Tensor) {
        self.assert_within(CLOSE, name, got, want);
    }
}

/// Runs a check on the host and, if there is a C++ compiler, on the emulated machine.
fn on_every_machine(check: impl Fn(&Machine) -> Result<()>) -> Result<()> {
    testing::machines().into_iter().try_for_each(|place| check(&Machine(place)))
}

/// A tensor, or an array on any machine.
trait Values {
    fn values(&self) -> Tensor;
}

impl Values for Tensor {
    fn values(&self) -> Tensor {
        self.clone()
    }
}

impl Values for Array {
    fn values(&self) -> Tensor {
        self.to_host().unwrap()
    }
}

impl Values for Vec<f32> {
    fn values(&self) -> Tensor {
        Tensor::new(&self[..], &Device::Cpu).unwrap()
    }
}

/// Largest difference, relative to the largest element of `want`.
fn error(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    let scalar = |t: Tensor| t.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    scalar((got - want).unwrap().abs().unwrap()) / scalar(want.abs().unwrap()).max(1e-6)
}

// f32 sums of some hundred terms in another order: 1e-5 leaves a margin of an order of magnitude.
const CLOSE: f32 = 1e-5;

#[test]
fn linear_group_equals_autograd_in_outputs_and_every_gradient() -> Result<()> {
    on_every_machine(|on| linear_group(on, ComputeDtype::F32, CLOSE))
}

/// Each factor has a relative error of at most 2^-9: about 1e-3 of the largest sum, more if one token's z nearly
/// cancels.
#[test]
fn linear_group_in_bf16_stays_within_its_rounding() -> Result<()> {
    on_every_machine(|on| linear_group(on, ComputeDtype::Bf16, 2e-2))
}

/// Factors that are exact in bfloat16 lose nothing: only the order of the sums differs.
#[test]
fn linear_in_bf16_of_bf16_factors_equals_f32() -> Result<()> {
    let exact = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(DType::BF16)?.to_dtype(DType::F32)?) };
    for (m, n, k) in [(3, 66, 130), (16, 64, 64), (17, 40, 800), (70, 34, 576)] {
        let (x, dy, d) = (exact(random(&[m, k], 1))?, exact(random(&[m, n], 2))?, exact(random(&[n, k], 3))?);
        let w = Weight::from_f32(&d.flatten_all()?.to_vec1::<f32>()?, n, k).unwrap().with_compute(ComputeDtype::Bf16);
        let parts = [LinearWithLora { weight: &w, dequantised: None, bias: None, lora: None }];
        let (on, xs, dys) = (Machine(None), Array::Host(x.clone()), Array::Host(dy.clone()));
        let (y, z) = linear::forward(&xs, &parts, None)?;
        on.assert_close("y", &y[0], &x.matmul(&d.t()?)?);
        let g = linear::backward(&xs, &parts, &z, &[&dys], InputGradient::Wanted)?;
        on.assert_close("dx", &g.input.unwrap(), &dy.matmul(&d)?);
    }
    Ok(())
}

fn linear_group(on: &Machine, compute: ComputeDtype, close: f32) -> Result<()> {
    let odd = usize::from(compute == ComputeDtype::F32); // pairs of an odd size are computed in f32
    for (m, k, dims) in [
        (1, 70, vec![32 + odd]),
        (7, 64, vec![96, 32, 34 - odd]),
        (50, 130, vec![64, 40]),
        (40, 800, vec![30 + odd]),
        (70, 96, vec![64]),
    ] {
        let assert_close = |name: &str, got: &Tensor, want: &Tensor| {
            on.assert_within(close, &format!("{name} {m}x{k}->{dims:?}"), got, want);
        };
        let x = Var::from_tensor(&random(&[m, k], 1))?;
        let (mut weights, mut dense, mut loras) = (vec![], vec![], vec![]);
        for (i, &n) in dims.iter().enumerate() {
            let (w, d) = weight(n, k, 10 + i as u64);
            weights.push(on.weight(w.with_compute(compute)));
            dense.push(d);
            // The second part has no LoRA; ranks differ.
            let r = 3 + 2 * i;
            loras.push((i != 1).then(|| {
                let a = Var::from_tensor(&random(&[r, k], 20 + i as u64)).unwrap();
                let b = Var::from_tensor(&random(&[n, r], 30 + i as u64)).unwrap();
                (a, b, 0.7 + i as f64)
            }));
        }
        // The first part has a bias.
        let bias = |i: usize| (i == 0).then(|| Bias::from(random(&[dims[0]], 55).to_vec1::<f32>().unwrap()));
        let biases: Vec<Option<Bias>> = (0..dims.len()).map(bias).collect();
        let residual = (dims.len() == 1).then(|| random(&[m, dims[0]], 77));
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        let mut want = vec![];
        for (i, d) in dense.iter().enumerate() {
            let mut y = x.matmul(&d.t()?)?;
            if let Some(bias) = &biases[i] {
                y = y.broadcast_add(&Tensor::new(&bias.values[..], &Device::Cpu)?)?;
            }
            if let Some((a, b, s)) = &loras[i] {
                y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * *s)?)?;
            }
            if let Some(r) = &residual {
                y = (y + r)?;
            }
            loss = (loss + (&y * random(&[m, dims[i]], 40 + i as u64))?.sum_all()?)?;
            want.push(y);
        }
        let grads = loss.backward()?;
        let parts: Vec<LinearWithLora> = weights
            .iter()
            .zip(&loras)
            .zip(&biases)
            .map(|((weight, l), bias)| LinearWithLora {
                weight,
                dequantised: None,
                bias: bias.as_ref(),
                lora: l.as_ref().map(|(a, b, scale)| LowRank { a, b, scale: *scale, dora: None, copy: None }),
            })
            .collect();
        let (xs, residual) = (on.put(&x), residual.map(|r| on.put(&r)));
        let (ys, z) = linear::forward(&xs, &parts, residual.as_ref())?;
        let dys: Vec<Array> = dims.iter().enumerate().map(|(i, &n)| on.put(&random(&[m, n], 40 + i as u64))).collect();
        let dys: Vec<&Array> = dys.iter().collect();
        let got = linear::backward(&xs, &parts, &z, &dys, InputGradient::Wanted)?;
        for (y, w) in ys.iter().zip(&want) {
            assert_close("y", &y.values(), w);
        }
        assert_close("dx", &got.input.as_ref().unwrap().values(), grads.get(&x).unwrap());
        for (l, g) in loras.iter().zip(&got.lora) {
            assert_eq!(l.is_some(), g.is_some());
            if let (Some((a, b, _)), Some(g)) = (l, g) {
                assert_close("dA", &g.a.values(), grads.get(a).unwrap());
                assert_close("dB", &g.b.values(), grads.get(b).unwrap());
            }
        }
        assert!(linear::backward(&xs, &parts, &z, &dys, InputGradient::Unused)?.input.is_none());
    }
    Ok(())
}

#[test]
fn linear_over_blocks_of_256_equals_linear_over_the_unpacked_weights() -> Result<()> {
    on_every_machine(|on| {
        use candle_core::quantized::{GgmlDType, QTensor};
        let (n, k) = (40, 512);
        for (ggml, stored, compute, close) in [
            (GgmlDType::Q4K, StorageDType::Q4K, ComputeDtype::F32, CLOSE),
            (GgmlDType::Q4_1, StorageDType::Q4_1, ComputeDtype::F32, CLOSE),
            (GgmlDType::Q4K, StorageDType::Q4K, ComputeDtype::Bf16, 8e-3),
            (GgmlDType::Q8_0, StorageDType::Q8_0, ComputeDtype::Bf16, 8e-3),
            (GgmlDType::BF16, StorageDType::BF16, ComputeDtype::Bf16, 8e-3),
        ] {
            let assert_close = |name: &str, got: &Array, want: &Tensor| {
                on.assert_within(close, &format!("{name} {} {compute:?}", stored.name()), got, want);
            };
            let q = QTensor::quantize(&random(&[n, k], 5), ggml)?;
            let dense = q.dequantize(&Device::Cpu)?;
            let w = Weight::new(Bytes::new(std::sync::Arc::new(q.data()?.to_vec())), stored, n, k).unwrap();
            let w = on.weight(w.with_compute(compute));
            for m in [3, 30] {
                let (x, dy) = (random(&[m, k], 6), random(&[m, n], 7));
                let (xs, dys) = (on.put(&x), on.put(&dy));
                let parts = [LinearWithLora { weight: &w, dequantised: None, bias: None, lora: None }];
                let (y, z) = linear::forward(&xs, &parts, None)?;
                assert_close("y", &y[0], &x.matmul(&dense.t()?)?);
                let g = linear::backward(&xs, &parts, &z, &[&dys], InputGradient::Wanted)?;
                assert_close("dx", &g.input.unwrap(), &dy.matmul(&dense)?);
            }
        }
        Ok(())
    })
}

#[test]
fn every_norm_equals_autograd_over_rows_and_over_heads() -> Result<()> {
    on_every_machine(|on| {
        let (n, d, eps) = (9, 53, 1e-2);
        // Two heads per row: each is normed by itself.
        let (x, w, b) = (Var::from_tensor(&random(&[n, 2 * d], 1))?, random(&[d], 2), random(&[d], 5));
        let (dy, skip) = (random(&[n, 2 * d], 3), random(&[n, 2 * d], 4));
        let (xs, dys, skips) = (on.put(&x), on.put(&dy), on.put(&skip));
        let rows = x.reshape((2 * n, d))?;
        let rms = |x: &Tensor| x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?.broadcast_mul(&w);
        let layer = rms(&rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)?)?.broadcast_add(&b)?;
        let values = |t: &Tensor| t.to_vec1::<f32>();
        let kinds = [(NormKind::Rms, rms(&rows)?), (NormKind::Layer { bias: values(&b)? }, layer)];
        for (kind, want) in kinds {
            let want = want.reshape((n, 2 * d))?;
            let norm = Norm::new(values(&w)?, kind, eps);
            on.assert_close("y", &norm.forward(&xs)?, &want);
            let grads = (&want * &dy)?.sum_all()?.backward()?;
            on.assert_close("dx", &norm.backward(&xs, &dys, None)?, grads.get(&x).unwrap());
            let grads = ((&want * &dy)?.sum_all()? + (&*x * &skip)?.sum_all()?)?.backward()?;
            on.assert_close("dx past a residual", &norm.backward(&xs, &dys, Some(&skips))?, grads.get(&x).unwrap());
        }
        Ok(())
    })
}

#[test]
fn every_activation_equals_autograd_gated_and_plain() -> Result<()> {
    on_every_machine(|on| {
        let (g, u) = (Var::from_tensor(&(random(&[5, 37], 1) * 6.0)?)?, Var::from_tensor(&random(&[5, 37], 2))?);
        let dm = random(&[5, 37], 3);
        let (gs, us, dms) = (on.put(&g), on.put(&u), on.put(&dm));
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let plain = match activation {
                Activation::Silu => g.silu()?,
                Activation::Gelu => g.gelu_erf()?,
                Activation::GeluTanh => g.gelu()?,
                Activation::Relu => g.relu()?,
            };
            let name = format!("{activation:?}");
            on.assert_close(&name, &activation.forward(&gs)?, &plain);
            let grads = (&plain * &dm)?.sum_all()?.backward()?;
            on.assert_close(&name, &activation.backward(&gs, &dms)?, grads.get(&g).unwrap());
            let want = (&plain * &*u)?;
            let grads = (&want * &dm)?.sum_all()?.backward()?;
            on.assert_close(&name, &activation.gated_forward(&gs, &us)?, &want);
            let (dg, du) = activation.gated_backward(&gs, &us, &dms)?;
            on.assert_close(&name, &dg, grads.get(&g).unwrap());
            on.assert_close(&name, &du, grads.get(&u).unwrap());
        }
        Ok(())
    })
}

#[test]
fn fused_columns_are_split_by_part_and_by_group_and_joined_again() -> Result<()> {
    on_every_machine(|on| {
        let x = Tensor::from_vec((0..24).map(|i| i as f32).collect(), (2, 12), &Device::Cpu)?;
        let xs = on.put(&x);
        let parts = columns::split(&xs, &[6, 3, 3], Fusion::EndToEnd)?;
        assert_eq!(parts[1].values().to_vec2::<f32>()?, [[6., 7., 8.], [18., 19., 20.]]);
        let heads = columns::split(&xs, &[4, 4, 4], Fusion::Grouped { groups: 2 })?;
        assert_eq!(heads[1].values().to_vec2::<f32>()?, [[2., 3., 8., 9.], [14., 15., 20., 21.]]);
        for (parts, fusion) in [(parts, Fusion::EndToEnd), (heads, Fusion::Grouped { groups: 2 })] {
            let joined = columns::join(&parts.iter().collect::<Vec<_>>(), fusion)?;
            assert_eq!(joined.values().to_vec2::<f32>()?, x.to_vec2::<f32>()?);
        }
        assert!(columns::split(&xs, &[6, 3, 2], Fusion::EndToEnd).is_err());
        assert!(columns::split(&xs, &[5, 5, 2], Fusion::Grouped { groups: 2 }).is_err());
        let sum = columns::add(&xs, &columns::scale(&xs, 2.0)?, 0.5)?;
        assert_eq!(sum.values().to_vec2::<f32>()?, (&x * 2.0)?.to_vec2::<f32>()?);
        Ok(())
    })
}

fn plain_rope(x: &Tensor, positions: &[u32], freqs: &[f32], head: usize, factor: f64) -> candle_core::Result<Tensor> {
    let ((n, width), half) = (x.dims2()?, freqs.len());
    let angles: Vec<f32> = positions.iter().flat_map(|&p| freqs.iter().map(move |f| p as f32 * f)).collect();
    let a = Tensor::from_vec(angles, (n, 1, half), &Device::Cpu)?;
    let x = x.reshape((n, width / head, head))?;
    let (x0, x1, rest) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?, x.narrow(2, 2 * half, head - 2 * half)?);
    let (c, s) = ((a.cos()? * factor)?, (a.sin()? * factor)?);
    let y0 = (x0.broadcast_mul(&c)? - x1.broadcast_mul(&s)?)?;
    let y1 = (x1.broadcast_mul(&c)? + x0.broadcast_mul(&s)?)?;
    Tensor::cat(&[y0, y1, rest], 2)?.reshape((n, width))
}

#[test]
fn rope_equals_the_plain_rotation_and_its_backward_is_the_transpose() -> Result<()> {
    on_every_machine(|on| {
        let (positions, freqs) = ([0u32, 1, 2, 0, 7, 31], [1.0f32, 0.3, 0.09, 0.01]);
        // Heads of 8, and heads of 12 of which 4 elements are not rotated, with an attention factor.
        for (head, factor) in [(8, 1.0), (12, 1.25)] {
            let angles = RopeTable::new(&freqs, head, 32, factor as f32);
            let x = Var::from_tensor(&random(&[6, 24], 1))?;
            let dy = random(&[6, 24], 2);
            let want = plain_rope(&x, &positions, &freqs, head, factor)?;
            let grads = (&want * &dy)?.sum_all()?.backward()?;
            let (xs, dys) = (on.put(&x), on.put(&dy));
            on.assert_close("y", &rope::rotate(&xs, &positions, &angles, Direction::Forward)?, &want);
            on.assert_close("dx", &rope::rotate(&dys, &positions, &angles, Direction::Back)?, grads.get(&x).unwrap());
            assert!(rope::rotate(&xs, &[0, 0, 0, 0, 0, 32], &angles, Direction::Forward).is_err());
        }
        Ok(())
    })
}

fn plain_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[usize],
    heads: Heads,
) -> candle_core::Result<Tensor> {
    let mut sequences = vec![];
    for w in cu_seqlens.windows(2) {
        let t = w[1] - w[0];
        let cut =
            |x: &Tensor, n: usize| x.narrow(0, w[0], t)?.reshape((t, n, heads.dim))?.transpose(0, 1)?.contiguous();
        let (q, k, v) = (cut(q, heads.q)?, cut(k, heads.kv)?, cut(v, heads.kv)?);
        let repeat = |x: &Tensor| {
            let g = heads.q / heads.kv;
            x.unsqueeze(1)?.broadcast_as((heads.kv, g, t, heads.dim))?.reshape((heads.q, t, heads.dim))
        };
        let hidden = |i: usize, j: usize| j > i || heads.window.is_some_and(|w| j + w <= i);
        let mask: Vec<f32> = (0..t * t).map(|i| if hidden(i / t, i % t) { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mut s = (q.matmul(&repeat(&k)?.t()?)? * f64::from(heads.scale))?;
        if let Some(cap) = heads.soft_cap.map(f64::from) {
            s = ((s / cap)?.tanh()? * cap)?;
        }
        let s = s.broadcast_add(&Tensor::from_vec(mask, (t, t), &Device::Cpu)?)?;
        let e = s.broadcast_sub(&s.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
        sequences.push(p.matmul(&repeat(&v)?)?.transpose(0, 1)?.reshape((t, heads.q * heads.dim))?);
    }
    Tensor::cat(&sequences, 0)
}

#[test]
fn ragged_grouped_attention_equals_autograd_with_windows_and_caps() -> Result<()> {
    on_every_machine(|on| {
        let capped = Heads { soft_cap: Some(0.7), scale: 0.4, ..Heads::full(4, 2, 8) };
        for heads in [
            Heads::full(6, 2, 16),
            Heads::full(2, 2, 20),
            Heads::full(3, 1, 8),
            Heads { window: Some(5), ..Heads::full(4, 2, 8) },
            Heads { window: Some(60), ..Heads::full(2, 1, 8) },
            Heads { window: Some(1), ..Heads::full(2, 2, 8) },
            capped,
            Heads { window: Some(50), ..capped },
        ] {
            // Lengths of 1, of one block of queries, and across two block boundaries.
            let cu_seqlens = [0, 1, 49, 54, 164];
            let q = Var::from_tensor(&(random(&[164, heads.q * heads.dim], 1) * 2.0)?)?;
            let k = Var::from_tensor(&random(&[164, heads.kv * heads.dim], 2))?;
            let v = Var::from_tensor(&random(&[164, heads.kv * heads.dim], 3))?;
            let d_o = random(&[164, heads.q * heads.dim], 4);
            let want = plain_attention(&q, &k, &v, &cu_seqlens, heads)?;
            let grads = (&want * &d_o)?.sum_all()?.backward()?;
            let sequences = attention::Sequences::whole(&cu_seqlens);
            let (qs, ks, vs) = (on.put(&q), on.put(&k), on.put(&v));
            on.assert_close("o", &attention::forward(&qs, &ks, &vs, sequences, heads)?, &want);
            let (dq, dk, dv) = attention::backward(&qs, &ks, &vs, sequences, heads, &on.put(&d_o))?;
            on.assert_close("dq", &dq, grads.get(&q).unwrap());
            on.assert_close("dk", &dk, grads.get(&k).unwrap());
            on.assert_close("dv", &dv, grads.get(&v).unwrap());

            let last = on.put(&Tensor::cat(&[q.i(48..49)?, q.i(163..164)?], 0)?);
            let mut cache = KvCache::new(0, KvCacheType::Auto);
            cache.append_prompts(&ks, &vs, &cu_seqlens, &[1, 3])?;
            let decoded = attention::decode(&last, &cache, heads)?;
            on.assert_close("decode", &decoded, &Tensor::cat(&[want.i(48..49)?, want.i(163..164)?], 0)?);
        }
        Ok(())
    })
}

#[test]
fn pads_attend_to_the_prefix_and_are_not_attended_to() -> Result<()> {
    on_every_machine(|on| {
        let heads = Heads { window: Some(60), ..Heads::full(4, 2, 8) };
        // One real token and two pads; 51 real tokens and 8 pads, across a block boundary.
        let (cu_seqlens, key_len) = ([0, 3, 62], [1, 51]);
        let q = Var::from_tensor(&(random(&[62, 32], 1) * 2.0)?)?;
        let [k, v] = [2, 3].map(|seed| Var::from_tensor(&random(&[62, 16], seed)).unwrap());
        let d_o = random(&[62, 32], 4);
        // A pad attends to the real tokens before it and not to itself: it equals a query in the last real token's place.
        let mut rows = vec![];
        for s in 0..2 {
            let (from, to) = (cu_seqlens[s], cu_seqlens[s] + key_len[s]);
            rows.push(plain_attention(&q.i(from..to)?, &k.i(from..to)?, &v.i(from..to)?, &[0, key_len[s]], heads)?);
            for pad in to..cu_seqlens[s + 1] {
                // Queries of the others do not matter to it.
                let q = q.i(pad..pad + 1)?.broadcast_as((key_len[s], 32))?.contiguous()?;
                let attended = plain_attention(&q, &k.i(from..to)?, &v.i(from..to)?, &[0, key_len[s]], heads)?;
                rows.push(attended.i(key_len[s] - 1..)?);
            }
        }
        let want = Tensor::cat(&rows, 0)?;
        let grads = (&want * &d_o)?.sum_all()?.backward()?;
        let sequences = attention::Sequences { cu_seqlens: &cu_seqlens, key_len: Some(&key_len) };
        let (qs, ks, vs) = (on.put(&q), on.put(&k), on.put(&v));
        on.assert_close("o", &attention::forward(&qs, &ks, &vs, sequences, heads)?, &want);
        let (dq, dk, dv) = attention::backward(&qs, &ks, &vs, sequences, heads, &on.put(&d_o))?;
        on.assert_close("dq", &dq, grads.get(&q).unwrap());
        on.assert_close("dk", &dk, grads.get(&k).unwrap());
        on.assert_close("dv", &dv, grads.get(&v).unwrap());
        let zero = |x: &Array| {
            x.values().i(1..3).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() == 0.0
        };
        assert!(zero(&dk) && zero(&dv), "no query attends to a pad");
        Ok(())
    })
}

#[test]
fn gathered_and_scattered_rows_and_the_scalar_head_equal_autograd() -> Result<()> {
    on_every_machine(|on| {
        let x = Var::from_tensor(&random(&[7, 33], 1))?;
        let (w, bias) = (Var::from_tensor(&random(&[1, 33], 2))?, 0.3f32);
        // Row 4 is taken twice, rows 1, 3 and 5 never.
        let (picked, dvalues) = ([4usize, 0, 6, 4, 2], random(&[5], 3));
        let index = Tensor::new(&picked.map(|row| row as u32)[..], &Device::Cpu)?;
        let h = x.index_select(&index, 0)?;
        let want = (h.matmul(&w.t()?)?.squeeze(1)? + f64::from(bias))?;
        let grads = (&want * &dvalues)?.sum_all()?.backward()?;
        let hs = rows::gather_rows(&on.put(&x), &picked)?;
        on.assert_close("rows", &hs, &h);
        on.assert_close("values", &score::forward(&hs, &w, bias)?, &want);
        let dvalues: Vec<f32> = dvalues.to_vec1()?;
        let got = score::backward(&hs, &w, &dvalues)?;
        on.assert_close("dw", &got.weight, grads.get(&w).unwrap());
        on.assert_close("db", &got.bias, &Tensor::new(&[dvalues.iter().sum::<f32>()], &Device::Cpu)?);
        on.assert_close("dx", &rows::scatter_rows(&got.hidden, &picked, 7)?, grads.get(&x).unwrap());
        Ok(())
    })
}
