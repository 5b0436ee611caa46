//! steps: one PPO step, one rollout, one SFT step and one reward step on a real base, as `benches/peers` does them in
//! PyTorch. One JSON line each; medians of --reps (default 5) after one warm-up, peak resident memory of the process.
//!
//! FOURFOLD_BENCH_BASE=model-dir-or-gguf cargo bench --bench steps -- [ppo_step] [generate] [sft_step] [reward_step]
//!     [--reps N] [--checkpoint none|mlp|block] [--set quantize=q8_0] [--set compute_dtype=bf16]
//!
//! Inputs: ids[i][j] = 100 + ((i + salt) 104729 + j 7919 + i j 31) mod 48000, all full length. LoRA r = 8, alpha = 16 on all
//! seven linear maps, B = 0. ppo_step: 8 x 64 + 64 tokens, one epoch, one minibatch, micro-batch 4, AdamW 1e-4, KL 0.05.
//!
//! A last line, `of_machine`, holds each phase against what the machine gives in the same run: the products with the frozen
//! matrices that a phase has to do, per second, over a plain 1024 x 1024 x 1024 product of the gemm crate in f32 on all
//! threads; for decoding also the base's bytes read per second, over plain reading of the same bytes. Branches, attention,
//! norms and the optimizer count as no work, only as time.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use fourfold::config::{ComputeDtype, Lora, LrScheduler, Ppo, Reward, Sft};
use fourfold::data::examples::objectives::{RankedExample, SftExample};
use fourfold::host::meter;
use fourfold::host::meter::Phase;
use fourfold::host::peak_rss_bytes;
use fourfold::model::base::Base;
use fourfold::model::block::Recompute;
use fourfold::model::generate::{SamplingParams, generate};
use fourfold::model::readers::Sharing;
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::ops::weight::Weight;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::train::train;
use fourfold::report::Report;
use fourfold::reward::source::RewardModel;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use fourfold::train::world::World;
use fourfold::{reward, sft};

#[global_allocator]
static ALLOCATOR: fourfold::host::meter::Counting<mimalloc::MiMalloc> =
    fourfold::host::meter::Counting(mimalloc::MiMalloc);

fn ids(rows: usize, columns: usize, salt: usize) -> Vec<Vec<u32>> {
    let id = |i: usize, j: usize| (100 + ((i + salt) * 104_729 + j * 7919 + i * j * 31) % 48_000) as u32;
    (0..rows).map(|i| (0..columns).map(|j| id(i, j)).collect()).collect()
}

/// Runs `run` once to warm up and `reps` times; prints the median. Returns each phase's mean seconds.
/// `run` returns the seconds that count, where those are not all that it took.
fn measure(
    id: &str,
    reps: usize,
    tokens: usize,
    mut run: impl FnMut(usize) -> Result<Option<f64>>,
) -> Result<(f64, HashMap<Phase, f64>)> {
    run(0)?;
    let mut seconds = vec![];
    meter::restart();
    for rep in 1..=reps {
        let start = Instant::now();
        let own = run(rep)?;
        seconds.push(own.unwrap_or_else(|| start.elapsed().as_secs_f64()));
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[reps / 2];
    let peak = peak_rss_bytes().unwrap_or(0) >> 20;
    println!(
        "{{\"bench\":\"{id}\",\"seconds\":{median:.3},\"min\":{:.3},\"max\":{:.3},\"tokens_per_s\":{:.1},\"peak_rss_mib\":{peak}}}",
        seconds[0],
        seconds[reps - 1],
        tokens as f64 / median
    );
    let each = meter::spent().into_iter().map(|(phase, spent)| (phase, spent.as_secs_f64() / reps as f64));
    Ok((median, each.collect()))
}

/// Seconds of the one step that `train` takes, by the clock in its metrics: a run goes once more through its last step's first
/// micro-batch, and that belongs to no step.
fn seconds_of_step(train: impl FnOnce(&mut Session) -> Result<()>) -> Result<Option<f64>> {
    let dir = tempfile::tempdir()?;
    train(&mut Session::new(Report::to_dir(dir.path())?))?;
    let metrics = std::fs::read_to_string(dir.path().join("metrics.jsonl"))?;
    let line: serde_json::Value = serde_json::from_str(metrics.lines().next().context("one step, one line")?)?;
    let [tokens, rate] = ["tokens", "tokens_per_second"].map(|key| line[key].as_f64());
    Ok(Some(tokens.context("tokens")? / rate.context("tokens_per_second")?))
}

/// What phases did and how long it took: (name, giga multiply-adds times two, seconds).
type Done = Vec<(String, f64, f64)>;

/// A plain f32 product on all threads, GFLOP/s: the best of five.
fn plain_product() -> Result<f64> {
    const N: usize = 1024;
    let [a, b] = [1f32, 2f32].map(|v| Tensor::full(v, (N, N), &Device::Cpu));
    let (a, b) = (a?, b?);
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        let start = Instant::now();
        std::hint::black_box(a.matmul(&b)?);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (N * N * N) as f64 / best / 1e9)
}

/// Plain reading of a base's matrices on all threads, GB/s: the best of three.
fn plain_reading(base: &Base) -> f64 {
    let (weights, threads) = (base.weights(), candle_core::utils::get_num_threads());
    let bytes: usize = weights.iter().map(|(_, w)| w.bytes().len()).sum();
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for t in 0..threads {
                let weights = &weights;
                scope.spawn(move || {
                    for (_, w) in weights {
                        let all = w.bytes();
                        let own = &all[all.len() * t / threads..all.len() * (t + 1) / threads];
                        let sum =
                            own.as_chunks::<8>().0.iter().fold(0u64, |s, &b| s.wrapping_add(u64::from_le_bytes(b)));
                        std::hint::black_box(sum);
                    }
                });
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    bytes as f64 / best / 1e9
}

fn main() -> Result<()> {
    fourfold::host::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let reps = match arguments.iter().position(|a| a == "--reps") {
        Some(i) => arguments.get(i + 1).context("--reps N")?.parse()?,
        None => 5,
    };
    let recompute = match arguments.iter().position(|a| a == "--checkpoint") {
        None => Recompute::Off,
        Some(i) => match arguments.get(i + 1).map(String::as_str) {
            Some("none") => Recompute::Off,
            Some("mlp") => Recompute::Mlp,
            Some("block") => Recompute::Block,
            _ => anyhow::bail!("--checkpoint none|mlp|block"),
        },
    };
    let wanted = |name: &str| {
        let named = arguments.iter().any(|a| ["ppo_step", "generate", "sft_step", "reward_step"].contains(&a.as_str()));
        !named || arguments.iter().any(|a| a == name)
    };
    let Some(path) = std::env::var_os("FOURFOLD_BENCH_BASE") else {
        println!(
            "{{\"bench\":\"steps\",\"skipped\":\"set FOURFOLD_BENCH_BASE to a model directory or a .gguf file\"}}"
        );
        return Ok(());
    };
    // --set quantize=q8_0, --set compute_dtype=bf16: keys of [base].
    let mut section = format!("path = {path:?}\n");
    for (_, set) in arguments.iter().zip(arguments.iter().skip(1)).filter(|(flag, _)| *flag == "--set") {
        let (key, value) = set.split_once('=').context("--set key=value")?;
        section += &format!("{key} = {value:?}\n");
    }
    let section: fourfold::config::Base = toml::from_str(&section)?;
    let model = Model::of_section(&section)?;
    let base = &model.base;
    let stored = base.weights().get(1).map_or("none", |(_, w)| w.dtype().name());
    let compute = if section.compute_dtype() == ComputeDtype::Bf16 { "bf16" } else { "f32" };
    let name = format!("shared_base_{stored}_{compute}_cpu");
    let fresh = model.fresh_adapter(&Lora::default(), 0)?;
    let scorer = fresh.clone().with_head(1)?;

    // Giga-FLOPs of one token through the blocks' matrices, and of one position against the output table.
    let giga = |weight: &Weight| 2e-9 * (weight.rows() * weight.cols()) as f64;
    let (all, table) = (base.weights().iter().map(|(_, w)| giga(w)).sum::<f64>(), giga(base.weights()[0].1));
    let blocks = all - table;
    let mut done: Done = vec![];

    if wanted("generate") {
        let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 64, stop: vec![] };
        let prompts = ids(8, 64, 0);
        // The first token comes out of the prompts' pass.
        let (mut first, mut whole) = (f64::INFINITY, f64::INFINITY);
        measure(&format!("generate/{name}/b8_p64_r64"), reps, 512, |rep| {
            let seeds: Vec<u64> = (0..8).map(|i| (rep * 8 + i) as u64).collect();
            let (start, mut told) = (Instant::now(), 0);
            let ran = generate(Policy::new(base, Some(&fresh)), &prompts, &seeds, &sampling, |_, _| {
                told += 1;
                if told == 8 {
                    first = first.min(start.elapsed().as_secs_f64());
                }
            });
            whole = whole.min(start.elapsed().as_secs_f64());
            ran.map(|_| None)
        })?;
        done.push(("generate.prompts".into(), 512.0 * blocks + 8.0 * table, first));
        done.push(("generate.decoding".into(), 63.0 * 8.0 * all, whole - first));
    }
    if wanted("sft_step") {
        let config = Sft {
            learning_rate: 1e-4,
            per_device_train_batch_size: 4,
            lr_scheduler_type: LrScheduler::Constant,
            ..Sft::default()
        };
        // Forward and dx of every matrix; the head's logits are made twice.
        let work = 1024.0 * 2.0 * blocks + 1020.0 * 3.0 * table;
        let (step, _) = measure(&format!("sft_step/{name}/b4_t256"), reps, 1024, |rep| {
            let rows = ids(4, 256, 4 * rep);
            let example = |tokens: Vec<u32>| SftExample { loss_mask: (0..256).map(|i| i > 0).collect(), tokens };
            let examples: Vec<SftExample> = rows.into_iter().map(example).collect();
            let setup = Setup { base, start: &fresh, recompute, seed: 0 };
            seconds_of_step(|session| sft::train(setup, &examples, &[], &config, session).map(drop))
        })?;
        done.push(("sft_step".into(), work, step));
    }
    if wanted("reward_step") {
        let config = Reward {
            learning_rate: 1e-4,
            per_device_train_batch_size: 4,
            lr_scheduler_type: LrScheduler::Constant,
            center: false,
            ..Reward::default()
        };
        let (step, _) = measure(&format!("reward_step/{name}/pairs4_t256"), reps, 2048, |rep| {
            let rows = ids(8, 256, 8 * rep);
            // One shared token stands for the prompt; lengths are those of the peers.
            let answers = |i: usize| vec![rows[i][1..].to_vec(), rows[i + 4][1..].to_vec()];
            let examples: Vec<RankedExample> = (0..4)
                .map(|i| RankedExample {
                    prompt: rows[i][..1].to_vec(),
                    responses: answers(i),
                    label: Default::default(),
                })
                .collect();
            let setup = Setup { base, start: &scorer, recompute, seed: 0 };
            seconds_of_step(|session| reward::train::train(setup, &examples, &[], &config, session).map(drop))
        })?;
        done.push(("reward_step".into(), 2048.0 * 2.0 * blocks, step));
    }
    if wanted("ppo_step") {
        let config = Ppo {
            learning_rate: 1e-4,
            total_episodes: 8,
            batch_size: 8,
            micro_batch_size: 4,
            response_length: 64,
            kl_coef: 0.05,
            lr_scheduler_type: LrScheduler::Constant,
            save_samples: 0,
            ..Ppo::default()
        };
        let (_, spent) = measure(&format!("ppo_step/{name}/b8_p64_r64"), reps, 1024, |rep| {
            let source = RewardModel(ValueModel::new(base, &scorer)?);
            let decode = |_: &[u32]| String::new();
            let prompts = ids(8, 64, 8 * rep);
            let run = PpoRun {
                world: World::alone(),
                base,
                reward_base: base,
                sft: &fresh,
                reward: Some(&scorer),
                prompts: &prompts,
                stop: &[],
                source: &source,
                decode: &decode,
                evaluation: None,
                ptx: None,
                pad: None,
                sampler: None,
                config: &config,
                seed: rep as u64,
                recompute,
                sharing: Sharing::default(),
            };
            train(&run, &mut Session::silent()).map(|_| None)
        })?;
        done.push(("ppo_step.rollout".into(), 1016.0 * blocks + 512.0 * table, spent[&Phase::Rollout]));
        // Reference, critic and reward model read 8 x 128 tokens, the first with its head.
        done.push(("ppo_step.scoring".into(), 3.0 * 1024.0 * blocks + 512.0 * table, spent[&Phase::Scoring]));
        // Actor and critic, forward and dx; of the actor's head logits twice and dh, for the exact KL two more.
        let update = 4.0 * 1024.0 * blocks + 5.0 * 512.0 * table;
        done.push(("ppo_step.update".into(), update, spent[&Phase::Update]));
    }
    let (product, reading) = (plain_product()?, plain_reading(base));
    let bytes = base.weights().iter().map(|(_, w)| w.bytes().len()).sum::<usize>() as f64;
    let mut phases = serde_json::Map::new();
    for (phase, work, seconds) in done {
        let rate = work / seconds;
        let mut of = serde_json::json!({"seconds": seconds, "gflop_per_s": rate, "of_product": rate / product});
        if phase == "generate.decoding" {
            let read = 63.0 * bytes / seconds / 1e9;
            of["gb_per_s"] = read.into();
            of["of_reading"] = (read / reading).into();
        }
        phases.insert(phase, of);
    }
    let line = serde_json::json!({
        "bench": format!("of_machine/{name}"), "product_gflop_per_s": product, "reading_gb_per_s": reading, "phases": phases,
    });
    println!("{line}");
    Ok(())
}
