//! steps: one PPO step, one rollout, one SFT step and one reward step on a real base, as `benches/peers` does them in
//! PyTorch. One JSON line each; medians of --reps (default 5) after one warm-up, peak resident memory of the process.
//!
//! FOURFOLD_BENCH_BASE=model-dir-or-gguf cargo bench --bench steps -- [ppo_step] [generate] [sft_step] [reward_step]
//!     [--reps N] [--checkpoint none|mlp|block] [--set quantize=q8_0] [--set compute_dtype=bf16]
//!
//! Inputs: ids[i][j] = 100 + ((i + salt) 104729 + j 7919 + i j 31) mod 48000, all full length. LoRA r = 8, alpha = 16 on all
//! seven linear maps, B = 0. ppo_step: 8 x 64 + 64 tokens, one epoch, one minibatch, micro-batch 4, AdamW 1e-4, KL 0.05.

use std::time::Instant;

use anyhow::{Context, Result};
use fourfold::config::{Checkpoint, ComputeDtype, Lora, LrScheduler, Ppo, Reward, Sft};
use fourfold::data::phases::{RankedExample, SftExample};
use fourfold::memory::peak_rss_bytes;
use fourfold::model::generate::{Sampling, generate};
use fourfold::model::roles::{Policy, Scorer};
use fourfold::ppo::train as ppo;
use fourfold::reward::source::RewardModel;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::{reward, sft};

#[global_allocator]
static ALLOCATOR: fourfold::memory::meter::Counting<mimalloc::MiMalloc> =
    fourfold::memory::meter::Counting(mimalloc::MiMalloc);

fn ids(rows: usize, columns: usize, salt: usize) -> Vec<Vec<u32>> {
    let id = |i: usize, j: usize| (100 + ((i + salt) * 104_729 + j * 7919 + i * j * 31) % 48_000) as u32;
    (0..rows).map(|i| (0..columns).map(|j| id(i, j)).collect()).collect()
}

fn measure(id: &str, reps: usize, tokens: usize, mut run: impl FnMut(usize) -> Result<()>) -> Result<()> {
    run(0)?;
    let mut seconds = vec![];
    for rep in 1..=reps {
        let start = Instant::now();
        run(rep)?;
        seconds.push(start.elapsed().as_secs_f64());
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
    Ok(())
}

fn main() -> Result<()> {
    fourfold::memory::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let reps = match arguments.iter().position(|a| a == "--reps") {
        Some(i) => arguments.get(i + 1).context("--reps N")?.parse()?,
        None => 5,
    };
    let checkpoint = match arguments.iter().position(|a| a == "--checkpoint") {
        None => Checkpoint::None,
        Some(i) => match arguments.get(i + 1).map(String::as_str) {
            Some("none") => Checkpoint::None,
            Some("mlp") => Checkpoint::Mlp,
            Some("block") => Checkpoint::Block,
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
    let compute = if section.compute_dtype == ComputeDtype::Bf16 { "bf16" } else { "f32" };
    let name = format!("shared_base_{stored}_{compute}_cpu");
    let fresh = model.fresh_adapter(&Lora::default(), 0)?;
    let scorer = fresh.clone().with_head(1)?;

    if wanted("generate") {
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 64, stop: vec![] };
        let prompts = ids(8, 64, 0);
        measure(&format!("generate/{name}/b8_p64_r64"), reps, 512, |rep| {
            let seeds: Vec<u64> = (0..8).map(|i| (rep * 8 + i) as u64).collect();
            generate(Policy::new(base, Some(&fresh)), &prompts, &seeds, &sampling, |_, _| {}).map(drop)
        })?;
    }
    if wanted("sft_step") {
        let config = Sft {
            learning_rate: 1e-4,
            per_device_train_batch_size: 4,
            lr_scheduler_type: LrScheduler::Constant,
            checkpoint,
            ..Sft::default()
        };
        measure(&format!("sft_step/{name}/b4_t256"), reps, 1024, |rep| {
            let rows = ids(4, 256, 4 * rep);
            let example = |tokens: Vec<u32>| SftExample { loss_mask: (0..256).map(|i| i > 0).collect(), tokens };
            let examples: Vec<SftExample> = rows.into_iter().map(example).collect();
            sft::train(base, &fresh, &examples, &[], &config, 0, &mut Session::silent()).map(drop)
        })?;
    }
    if wanted("reward_step") {
        let config = Reward {
            learning_rate: 1e-4,
            per_device_train_batch_size: 4,
            lr_scheduler_type: LrScheduler::Constant,
            center: false,
            checkpoint,
            ..Reward::default()
        };
        measure(&format!("reward_step/{name}/pairs4_t256"), reps, 2048, |rep| {
            let rows = ids(8, 256, 8 * rep);
            // One shared token stands for the prompt; lengths are those of the peers.
            let answers = |i: usize| vec![rows[i][1..].to_vec(), rows[i + 4][1..].to_vec()];
            let examples: Vec<RankedExample> =
                (0..4).map(|i| RankedExample { prompt: rows[i][..1].to_vec(), answers: answers(i) }).collect();
            reward::train::train(base, &scorer, &examples, &[], &config, 0, &mut Session::silent()).map(drop)
        })?;
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
            checkpoint,
            ..Ppo::default()
        };
        measure(&format!("ppo_step/{name}/b8_p64_r64"), reps, 1024, |rep| {
            let start = ppo::Start { base, reward_base: base, sft: &fresh, reward: Some(&scorer) };
            let source = RewardModel(Scorer::new(base, &scorer)?);
            let decode = |_: &[u32]| String::new();
            let prompts = ids(8, 64, 8 * rep);
            let task = ppo::Task {
                start,
                prompts: &prompts,
                stop: &[],
                source: &source,
                decode: &decode,
                evaluation: None,
                ptx: None,
                pad: None,
            };
            ppo::train(task, &config, rep as u64, &mut Session::silent()).map(drop)
        })?;
    }
    Ok(())
}
