//! `doctor`: whether a device can be used, what is missing and how to install it, and whether its kernels compute what the
//! CPU computes. Read `device/select.rs` for the choice of a device.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_core::quantized::{GgmlDType, QTensor};
use clap::Args;
use serde_json::{Value, json};

use super::completed::DeviceValue;
use super::{print_json, say};
use crate::config::{ComputeDtype, Dequantising, DeviceChoice, Lora};
use crate::device::{Device, Element, Selected, select};
use crate::error::Unusable;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets};
use crate::model::block::Recompute;
use crate::model::generate::{SamplingParams, generate};
use crate::model::roles::{HeadGradients, Policy, ValueModel};
use crate::ops::attention::KvCacheType;
use crate::ops::cpu;
use crate::ops::logprobs::Logits;
use crate::ops::sample::{Distribution, Sampler};
use crate::ops::weight::{Bytes, StorageDType, Weight};
use crate::quickstart::run::embedded;
use crate::report::number;
use crate::rng::SplitMix64;
use crate::run::Model;
use crate::run::device_bench::square;

#[derive(Args)]
pub(super) struct Doctor {
    /// The device to look at: cuda, cuda:N, or emulated; auto is the first card.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = DeviceValue, hide_possible_values = true)]
    device: DeviceChoice,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// One comparison of a device with the CPU.
struct Check {
    name: String,
    /// The largest difference, relative to the largest value.
    difference: f64,
    limit: f64,
    seconds: f64,
    error: Option<String>,
}

impl Check {
    fn of(name: &str, limit: f64, compare: impl FnOnce() -> Result<f64>) -> Self {
        let began = Instant::now();
        let found = compare();
        let seconds = began.elapsed().as_secs_f64();
        let (difference, error) = match found {
            Ok(difference) => (difference, None),
            Err(error) => (f64::INFINITY, Some(format!("{error:#}"))),
        };
        Self { name: name.into(), difference, limit, seconds, error }
    }

    fn is_good(&self) -> bool {
        self.difference <= self.limit
    }
}

pub(super) fn run(args: &Doctor) -> Result<()> {
    let choice = if args.device == DeviceChoice::Auto { DeviceChoice::Cuda(0) } else { args.device };
    let selected = match select(choice) {
        Ok(selected) => selected,
        Err(error) => {
            let text = format!("{error:#}");
            match args.json {
                true => print_json(&json!({"device": choice.to_string(), "usable": false, "missing": text}))?,
                false => say(&format!("{choice}: cannot be used\n  {}\n", text.replace("; ", "\n  ")))?,
            }
            return Err(Unusable(format!("{choice} cannot be used; the CPU can")).into());
        }
    };
    let Some(device) = selected.device.clone() else {
        let name = "the CPU needs nothing; name a device, such as --device cuda";
        return if args.json {
            print_json(&json!({"device": "cpu", "usable": true}))
        } else {
            say(&format!("{name}\n"))
        };
    };
    let info = device.info()?;
    if !args.json {
        say(&head(&selected, &info))?;
    }
    let mut checks = vec![];
    let mut show = |check: Check| -> Result<()> {
        if !args.json {
            say(&line(&check))?;
        }
        checks.push(check);
        Ok(())
    };
    for check in storage(&device) {
        show(check)?;
    }
    show(sampling(&device))?;
    for compute in [ComputeDtype::F32, ComputeDtype::Bf16, ComputeDtype::F16] {
        if device.supports(compute.element()) {
            for check in network(&device, compute)? {
                show(check)?;
            }
        }
    }
    let speeds = speeds(&device, choice)?;
    let usable = checks.iter().all(Check::is_good);
    let usage = device.usage();
    if args.json {
        let check = |c: &Check| {
            json!({"name": c.name, "difference": number(c.difference), "limit": c.limit, "good": c.is_good(),
                   "seconds": number(c.seconds), "error": c.error})
        };
        print_json(&json!({
            "device": info.name,
            "arch": info.arch,
            "memory": info.total,
            "free": info.free,
            "libraries": info.libraries.iter().map(|l| json!({
                "name": l.what, "version": l.version, "path": l.path.as_ref().map(|p| p.display().to_string()),
            })).collect::<Vec<_>>(),
            "checks": checks.iter().map(check).collect::<Vec<_>>(),
            "gemm_tflop_per_s": speeds.iter().map(|(name, s)| ((*name).to_owned(), number(*s)))
                .collect::<serde_json::Map<String, Value>>(),
            "peak_bytes": usage.peak,
            "replayed_steps": device.work().replays,
            "usable": usable,
        }))?;
    } else {
        let mut text = String::new();
        for (name, speed) in &speeds {
            let _ = writeln!(text, "  product in {name:<6} {speed:>10.3} TFLOP/s");
        }
        let verdict = if usable { "it can be used" } else { "it computes other numbers than the CPU; do not use it" };
        let _ = writeln!(text, "{}: {verdict}", info.name);
        say(&text)?;
    }
    if usable { Ok(()) } else { Err(Unusable(format!("{} failed a check", info.name)).into()) }
}

fn head(selected: &Selected, info: &crate::device::Info) -> String {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let mut text = format!("{} is {}, {}\n", selected.choice, info.name, info.arch);
    if let (Some(total), Some(free)) = (info.total, info.free) {
        let _ = writeln!(text, "  memory {} of {} free", gib(free), gib(total));
    }
    for library in &info.libraries {
        let path = library.path.as_ref().map_or_else(|| "by name".into(), |path| path.display().to_string());
        let _ = writeln!(text, "  {} {} ({path})", library.what, library.version);
    }
    text
}

fn line(check: &Check) -> String {
    let verdict = if check.is_good() { "ok" } else { "FAILED" };
    let mut text = format!(
        "  {:<42} differs by {:.1e} (limit {:.0e}) {:>7.2} s  {verdict}\n",
        check.name, check.difference, check.limit, check.seconds
    );
    if let Some(error) = &check.error {
        let _ = writeln!(text, "    {error}");
    }
    text
}

/// The largest difference relative to the largest value; infinite if a number is none.
fn apart(want: &[f32], got: &[f32]) -> f64 {
    if want.len() != got.len() || got.iter().any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let largest = want.iter().fold(1e-12f64, |most, v| most.max(f64::from(v.abs())));
    want.iter().zip(got).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / largest
}

/// Every stored type on random numbers: unpacked bit by bit.
fn storage(device: &Device) -> Vec<Check> {
    let (rows, cols) = (37, 512);
    let mut rng = SplitMix64::new(1);
    let values: Vec<f32> = (0..rows * cols).map(|_| rng.uniform() as f32 - 0.5).collect();
    let check = |dtype: StorageDType| {
        Check::of(&format!("unpacking {}", dtype.name()), 0.0, || {
            let weight = stored(&values, rows, cols, dtype)?;
            let out = device.matrix(Element::F32, rows, cols)?;
            weight.on(device)?.dequantise(0..rows, &out)?;
            Ok(apart(&weight.to_f32(), &out.to_f32()?))
        })
    };
    StorageDType::ALL.into_iter().map(check).collect()
}

/// Tokens and log-probabilities drawn from the same logits: how many rows differ in any bit.
fn sampling(device: &Device) -> Check {
    Check::of("tokens drawn from the same logits", 0.0, || {
        let (rows, vocab, mut rng) = (16, 20_011, SplitMix64::new(7));
        let logits: Vec<f32> =
            (0..rows * vocab).map(|_| (0..3).map(|_| 6.0 * (rng.uniform() as f32 - 0.5)).sum()).collect();
        let there = Logits::new(device.upload_f32(&logits, rows, vocab)?.into(), 1.1, Some(8.0));
        let here = Tensor::from_vec(logits, (rows, vocab), &candle_core::Device::Cpu)?;
        let here = Logits::new(here.into(), 1.1, Some(8.0));
        let (mut sampler, mut differ) = (Sampler::default(), 0);
        for (temperature, top_k, top_p) in [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 50, 0.9), (0.3, 0, 0.5)] {
            let by = Distribution { temperature, top_k, top_p };
            let draws: Vec<f64> = (0..rows).map(|_| rng.uniform()).collect();
            let (want, got) = (sampler.sample(&here, by, &draws)?, sampler.sample(&there, by, &draws)?);
            differ += want.iter().zip(&got).filter(|((t, p), (u, q))| (t, p.to_bits()) != (u, q.to_bits())).count();
        }
        Ok(differ as f64)
    })
}

/// A matrix in a storage type. Types that are read and never written are encoded by candle.
fn stored(values: &[f32], rows: usize, cols: usize, dtype: StorageDType) -> Result<Weight> {
    let ggml = match dtype {
        StorageDType::Q2K => GgmlDType::Q2K,
        StorageDType::Q3K => GgmlDType::Q3K,
        StorageDType::Q5K => GgmlDType::Q5K,
        written => return Weight::from_f32(values, rows, cols)?.quantised(written),
    };
    let tensor = Tensor::from_slice(values, (rows, cols), &candle_core::Device::Cpu)?;
    let bytes = QTensor::quantize(&tensor, ggml)?.data()?.into_owned();
    Weight::new(Bytes::new(Arc::new(bytes)), dtype, rows, cols)
}

/// What a network computes: log-probabilities and entropies, exact KL, values, gradients of both kinds of model, and a
/// greedy response.
struct Results {
    logprobs: Vec<f32>,
    entropy: Vec<f32>,
    kl: Vec<f32>,
    values: Vec<f32>,
    policy_gradients: Vec<f32>,
    value_gradients: Vec<f32>,
    response: Vec<u32>,
}

fn flat(adapter: &Adapter, gradients: &crate::model::adapter::Gradients) -> Result<Vec<f32>> {
    let (trainable, gradients) = (adapter.to_trainable(), gradients.clone().to_host()?);
    let all = trainable.flat_gradients(&gradients)?;
    all.into_iter().map(|g| Ok(g.flatten_all()?.to_vec1::<f32>()?)).collect::<Result<Vec<_>>>().map(|all| all.concat())
}

fn sequences() -> Vec<Vec<u32>> {
    [23usize, 7, 40].iter().map(|&n| (0..n).map(|j| ((j * 37 + n * 11) % 400 + 2) as u32).collect()).collect()
}

fn results(base: &Base, adapter: &Adapter, other: &Adapter) -> Result<Results> {
    let sequences = sequences();
    let batch = Batch::new(&sequences)?;
    let targets = Targets::responses(&batch, &[10, 3, 25])?;
    let (policy, reference) = (Policy::new(base, Some(adapter)), Policy::new(base, Some(other)));
    let theirs = reference.rows(&batch, &targets)?;
    let mut kl = vec![];
    let weights = |n: usize| (0..n).map(|i| ((i % 5) as f32 - 2.0) / n as f32).collect::<Vec<f32>>();
    let loss = |stats: &crate::ops::logprobs::TokenStats, exact: &[f32]| {
        kl = exact.to_vec();
        let n = stats.logprobs.len();
        Ok(HeadGradients {
            logprobs: weights(n),
            entropy: vec![0.01 / n as f32; n],
            kl: Some(vec![0.05 / n as f32; n]),
        })
    };
    let (stats, gradients) =
        policy.gradients_against(&batch, &targets, Some((reference, &theirs)), 1.0, Recompute::Mlp, loss)?;
    let scorer = adapter.clone().with_head(3)?;
    let model = ValueModel::new(base, &scorer)?;
    // On a card, the blocks' inputs go to the host and come back beside the passes.
    let (values, of_values) =
        model.gradients(&batch, &targets.rows, Recompute::Offload, |values| Ok(weights(values.len())))?;
    let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 12, stop: vec![] };
    let responses = generate(policy, &sequences, &[1, 2, 3], &sampling, |_, _| {})?;
    Ok(Results {
        logprobs: stats.logprobs,
        entropy: stats.entropy,
        kl,
        values,
        policy_gradients: flat(adapter, &gradients)?,
        value_gradients: flat(&scorer, &of_values)?,
        response: responses.into_iter().flat_map(|response| response.tokens).collect(),
    })
}

/// How far log-probabilities of tokens that were sampled over a cache in q8_0 are from those of a pass over all of them, which
/// reads no cache.
fn apart_over_q8_0(base: Base, adapter: &Adapter) -> Result<f64> {
    let base = base.caching_in(KvCacheType::Q8_0)?;
    let policy = Policy::new(&base, Some(adapter));
    let prompts: Vec<Vec<u32>> =
        [23u32, 7, 40].iter().map(|&n| (0..n).map(|j| (j * 37 + n) % 400 + 2).collect()).collect();
    let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 12, stop: vec![] };
    let responses = generate(policy, &prompts, &[1, 2, 3], &sampling, |_, _| {})?;
    let whole: Vec<Vec<u32>> = prompts.iter().zip(&responses).map(|(p, r)| [&p[..], &r.tokens].concat()).collect();
    let batch = Batch::new(&whole)?;
    let targets = Targets::responses(&batch, &responses.iter().map(|r| r.tokens.len()).collect::<Vec<_>>())?;
    let sampled: Vec<f32> = responses.into_iter().flat_map(|response| response.logprobs).collect();
    Ok(apart(&policy.logprobs(&batch, &targets, 1.0)?.logprobs, &sampled))
}

/// How far values and gradients over weights that are dequantised while products run, and kept, are from those over weights that
/// are dequantised one by one: no bit.
fn apart_ahead(device: &Device, compute: ComputeDtype, adapter: &Adapter) -> Result<f64> {
    let base = embedded()?.quantised(Some(StorageDType::Q8_0)).base()?.computing_in(compute);
    let base = base.on(Some(device.clone()), |_, _| {})?;
    let (scorer, batch) = (adapter.clone().with_head(3)?, Batch::new(&sequences())?);
    let pass = |how: Dequantising| -> Result<[Vec<f32>; 2]> {
        base.set_dequantise(how);
        let model = ValueModel::new(&base, &scorer)?;
        let rows = batch.last_rows();
        let (values, gradients) = model.gradients(&batch, &rows, Recompute::Block, |v| Ok(vec![1.0; v.len()]))?;
        Ok([values, flat(&scorer, &gradients)?])
    };
    let (want, got) = (pass(Dequantising::InTurn)?, pass(Dequantising::Kept)?);
    Ok(f64::max(apart(&want[0], &got[0]), apart(&want[1], &got[1])))
}

/// The embedded model on both machines: its passes use every kernel of its family.
fn network(device: &Device, compute: ComputeDtype) -> Result<Vec<Check>> {
    let host = Model::of(embedded()?)?;
    let [adapter, other] = [1u64, 2].map(|seed| perturbed(&host, seed));
    let (adapter, other) = (adapter?, other?);
    let want = results(&host.base, &adapter, &other)?;
    let name = compute.name();
    let (values, gradients) = match compute {
        ComputeDtype::F32 => (1e-4, 1e-3),
        ComputeDtype::F16 => (1e-2, 5e-2),
        ComputeDtype::Bf16 => (5e-2, 2e-1),
    };
    let base = embedded()?.base()?.computing_in(compute).on(Some(device.clone()), |_, _| {})?;
    let began = Instant::now();
    let got = match results(&base, &adapter, &other) {
        Ok(got) => got,
        Err(error) => {
            return Ok(vec![Check::of(&format!("a model's passes in {name}"), values, || Err(error))]);
        }
    };
    let seconds = began.elapsed().as_secs_f64();
    let all = [
        ("log-probabilities", &want.logprobs, &got.logprobs, values),
        ("entropies", &want.entropy, &got.entropy, values),
        ("exact KL", &want.kl, &got.kl, 10.0 * values),
        ("values", &want.values, &got.values, values),
        ("gradients of a policy", &want.policy_gradients, &got.policy_gradients, gradients),
        ("gradients of a value model", &want.value_gradients, &got.value_gradients, gradients),
    ];
    let mut checks: Vec<Check> = all
        .map(|(what, want, got, limit)| Check::of(&format!("{what} in {name}"), limit, || Ok(apart(want, got))))
        .into();
    if compute == ComputeDtype::F32 {
        let same = if want.response == got.response { 0.0 } else { 1.0 };
        checks.push(Check::of("a greedy response in f32", 0.0, || Ok(same)));
    }
    if let Some(last) = checks.last_mut() {
        last.seconds = seconds;
    }
    let name_of = format!("weights dequantised beside products in {name}");
    checks.push(Check::of(&name_of, 0.0, || apart_ahead(device, compute, &adapter)));
    let limit = values.max(2e-2);
    checks.push(Check::of(&format!("a cache in q8_0 in {name}"), limit, || apart_over_q8_0(base, &adapter)));
    Ok(checks)
}

/// A fresh adapter whose second factors are not zero.
fn perturbed(model: &Model, seed: u64) -> Result<Adapter> {
    let fresh = model.fresh_adapter(&Lora::default(), seed)?;
    let mut rng = SplitMix64::new(seed);
    let mut trainable = fresh.to_trainable();
    let moved = trainable.parameters()?.into_iter().map(|tensor| {
        let dims = tensor.dims().to_vec();
        let values: Vec<f32> =
            cpu::view(&tensor.contiguous()?)?.iter().map(|v| v + 0.02 * (rng.uniform() as f32 - 0.5)).collect();
        Tensor::from_vec(values, dims, &candle_core::Device::Cpu).context("moving a tensor")
    });
    let moved = moved.collect::<Result<Vec<_>>>()?;
    trainable.replace(moved)?;
    Ok(trainable.snapshot())
}

/// Square products in each type that the device has, TFLOP/s.
fn speeds(device: &Device, choice: DeviceChoice) -> Result<Vec<(&'static str, f64)>> {
    let n = if matches!(choice, DeviceChoice::Cuda(_)) { 4096 } else { 256 };
    let mut all = vec![];
    for element in [Element::F32, Element::Bf16, Element::F16].into_iter().filter(|&e| device.supports(e)) {
        let seconds = square(device, element, n)?;
        all.push((element.name(), 2.0 * (n as f64).powi(3) / seconds / 1e12));
    }
    Ok(all)
}
