//! `fourfold bench gpu`: what a device can do by itself, and what a PPO or GRPO step, decoding and every kernel take on it beside
//! that. Bases have random weights (synthetic.rs), so that nothing is fetched. The CPU's times are `benches/steps.rs`.
//!
//! Read `synthetic.rs` beside it, and `device/profile.rs` for the time by kernel.

pub mod synthetic;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::config;
use crate::config::{Dequantising, KvCacheType, Lora};
use crate::device::profile::KernelTime;
use crate::device::{Array, Device, DeviceChoice, Element, Gemm};
use crate::host::meter::Phase;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::model::generate::{SamplingParams, generate};
use crate::model::roles::{Policy, ValueModel};
use crate::ops::norm::{Norm, NormKind};
use crate::ops::weight::{ComputeDtype, StorageDType};
use crate::planner::dry;
use crate::planner::dry::{DevicePlan, OnDevice};
use crate::planner::passes;
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::stages::StageShape;
use crate::ppo::run::PpoRun;
use crate::ppo::train::train;
use crate::report::{Report, number};
use crate::reward::source::RewardModel;
use crate::rng::SplitMix64;
use crate::run::model::lora_config;
use crate::train::session::Session;
use crate::train::world::World;

/// What is measured over one base.
#[derive(Clone, Debug)]
pub struct Asked {
    /// A name of [`synthetic::NAMES`] or a config.json.
    pub model: String,
    /// The type that its matrices are stored in.
    pub stored: StorageDType,
    /// The type that products are computed in.
    pub compute: ComputeDtype,
    /// What keys and values are cached as.
    pub kv_cache_type: KvCacheType,
    /// Optimisation methods whose steps are measured.
    pub methods: Vec<Method>,
    /// Responses of a step.
    pub batch: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a response.
    pub response: usize,
    /// Sequences of one forward and backward pass.
    pub micro_batch: usize,
    /// LoRA's rank, on all linear layers.
    pub rank: usize,
    /// The activations that blocks recompute.
    pub recompute: Recompute,
    /// Layers that the device does not keep.
    pub offload: usize,
    /// How the device dequantises weights. `Auto`: as much ahead, and kept, as it has room for.
    pub dequantise: Dequantising,
    /// Measured steps, after one that is not counted.
    pub steps: usize,
    /// Sequences that are decoded at once, each a measurement of its own.
    pub sequences: Vec<usize>,
    /// Whether one more step is timed kernel by kernel. A machine that computes nothing counts one anyway; then whether its kernels
    /// are listed.
    pub kernels: bool,
}

/// Where the advantages of a measured step come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// PPO: actor, reference, critic, reward model.
    Ppo,
    /// GRPO with 8 responses a prompt: actor, reference, reward model.
    Grpo,
}

impl Method {
    /// The name of keys and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ppo => "ppo",
            Self::Grpo => "grpo",
        }
    }
}

/// What a device can do by itself; others are compared with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes a second that a copy inside of the device's memory reads and writes.
    pub copy: f64,
    /// Multiplications and additions a second of a large product in the compute type.
    pub product: f64,
}

/// Measures the device alone.
///
/// # Errors
/// Those of the device.
pub fn card(device: &Device, compute: ComputeDtype, show: &mut dyn FnMut(Value) -> Result<()>) -> Result<Ceilings> {
    let is_card = device.info()?.total.is_some();
    // The emulated machine takes a second for what a card does in a microsecond.
    let (bytes, n) = if is_card { (256 << 20, 8192) } else { (1 << 20, 128) };
    let [from, to] = [device.zeros(Element::U8, 1, bytes)?, device.zeros(Element::U8, 1, bytes)?];
    let copy = 2.0 * bytes as f64 / seconds(device, 20, || to.copy_from(&from))?;
    let host = vec![1u8; bytes];
    let up = bytes as f64 / seconds(device, 4, || to.write_bytes(&host))?;
    let down = bytes as f64 / seconds(device, 4, || to.to_bytes().map(drop))?;
    let row = Array::from(device.zeros(Element::F32, 1, 256)?);
    let norm = Norm::new(vec![1.0; 256], NormKind::Rms, 1e-5);
    let launch = seconds(device, 500, || norm.forward(&row).map(drop))?;
    let mut products = Map::new();
    let mut own = f64::NAN;
    for of in [ComputeDtype::F32, ComputeDtype::Bf16, ComputeDtype::F16] {
        let element = of.element();
        if !device.supports(element) {
            continue;
        }
        let n = if element == Element::F32 { n / 2 } else { n };
        let rate = 2.0 * (n as f64).powi(3) / square(device, element, n)?;
        products.insert(element.name().into(), number(rate / 1e12));
        if of == compute {
            own = rate;
        }
    }
    show(json!({
        "bench": "gpu/card", "device": device.name(), "copy_gb_per_s": number(copy / 1e9),
        "upload_gb_per_s": number(up / 1e9), "download_gb_per_s": number(down / 1e9), "launch_us": number(launch * 1e6),
        "product_tflop_per_s": products,
    }))?;
    Ok(Ceilings { copy, product: own })
}

/// Mean seconds of `work` on the device, after one that is not counted.
fn seconds(device: &Device, times: u32, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    device.synchronize()?;
    let began = Instant::now();
    for _ in 0..times {
        work()?;
    }
    device.synchronize()?;
    Ok(began.elapsed().as_secs_f64() / f64::from(times))
}

/// Seconds of an (n, n) x (n, n) product of random numbers: zeros would need less power, and a card clocks higher on them.
///
/// # Errors
/// Those of the device.
pub fn square(device: &Device, element: Element, n: usize) -> Result<f64> {
    let mut rng = SplitMix64::new(1);
    let values: Vec<f32> = (0..n * n).map(|_| rng.uniform() as f32 - 0.5).collect();
    let [x, w] = [device.upload_as(element, &values, n, n)?, device.upload_as(element, &values, n, n)?];
    let y = device.matrix(element, n, n)?;
    seconds(device, 10, || {
        device.gemm(Gemm {
            m: n,
            n,
            k: n,
            batch: 1,
            x: x.whole(),
            x_transposed: false,
            w: w.whole(),
            w_transposed: true,
            y: y.whole(),
            alpha: 1.0,
            beta: 0.0,
        })
    })
}

/// A base on a device with the adapters of actor and reward model.
struct Roles {
    base: Base,
    /// The device's name in plans.
    choice: DeviceChoice,
    sft: Adapter,
    reward: Adapter,
}

/// Measures what `asked` names over one base; `show` gets each result as soon as it is there. Files of the runs go to `scratch`.
///
/// # Errors
/// A shape that is not known; sequences past its context; those of the device, as where the base does not fit.
pub fn model(
    device: &Device,
    choice: DeviceChoice,
    asked: &Asked,
    ceilings: Ceilings,
    scratch: &Path,
    show: &mut dyn FnMut(Value) -> Result<()>,
) -> Result<()> {
    let config = synthetic::config(&asked.model)?;
    let named = |bench: &str| {
        let of = [
            ("bench", bench.into()),
            ("model", asked.model.as_str().into()),
            ("stored", asked.stored.name().into()),
            ("compute", asked.compute.element().name().into()),
            ("kv_cache_type", asked.kv_cache_type.name().into()),
            ("offload", asked.offload.into()),
        ];
        of.into_iter().map(|(key, value): (_, Value)| (key.to_owned(), value)).collect::<Map<_, _>>()
    };
    let with = |bench: &str, more: Value| {
        let mut all = named(bench);
        all.extend(more.as_object().cloned().unwrap_or_default());
        Value::Object(all)
    };
    let began = Instant::now();
    let base = synthetic::base(config, asked.stored)?.computing_in(asked.compute).caching_in(asked.kv_cache_type)?;
    let base = base.streaming(Some(device.clone()), asked.offload, |_, _| {})?;
    device.synchronize()?;
    let bytes: usize = base.weights().iter().map(|(_, w)| w.size_in_bytes()).sum();
    show(with(
        "gpu/base",
        json!({"stored_bytes": bytes, "device_bytes": device.usage().live,
              "pinned_bytes": base.pinned_bytes(), "seconds": number(began.elapsed().as_secs_f64())}),
    ))?;
    let lora = Lora { r: asked.rank, ..Lora::default() };
    let sft = Adapter::init(lora_config(&lora), base.shapes(), 0)?;
    let reward = Adapter::init(lora_config(&lora), base.shapes(), 1)?.with_head(1)?;
    let roles = Roles { base, choice, sft, reward };
    // A machine that computes nothing has no times: its steps are counted, kernel by kernel.
    let sequences = if device.is_dry() { &[][..] } else { &asked.sequences };
    for &sequences in sequences {
        show(with("gpu/decode", roles.decode(asked, sequences, bytes as f64, ceilings)?))?;
    }
    for &method in &asked.methods {
        if !device.is_dry() {
            show(with("gpu/step", roles.step(device, asked, method, scratch)?))?;
        }
        if asked.kernels || device.is_dry() {
            let before = roles.streamed();
            let (seconds, mut all) = roles.profiled(device, asked, method, scratch)?;
            let streamed = roles.streamed() - before;
            let is_dry = device.is_dry();
            if is_dry {
                all.sort_by(|a, b| floor(b, ceilings).total_cmp(&floor(a, ceilings)));
            }
            let busy: f64 = match is_dry {
                true => all.iter().map(|kernel| floor(kernel, ceilings)).sum(),
                false => all.iter().map(|kernel| kernel.seconds).sum(),
            };
            let launches = all.iter().map(|kernel| kernel.calls).sum::<usize>();
            // At best, all of these take no time of their own.
            let beside: f64 = all.iter().map(|kernel| kernel.bytes_beside / ceilings.copy).sum();
            show(with(
                "gpu/kernels",
                match is_dry {
                    true => {
                        json!({"method": method.name(), "floor_seconds": number(busy), "floor_beside": number(beside),
                               "launches": launches, "streamed_bytes": streamed, "listed": asked.kernels})
                    }
                    false => json!({"method": method.name(), "seconds": number(seconds), "in_kernels": number(busy),
                                    "floor_beside": number(beside), "launches": launches, "streamed_bytes": streamed}),
                },
            ))?;
            for kernel in all.iter().filter(|_| asked.kernels) {
                show(with("gpu/kernel", of_kernel(kernel, method, busy, ceilings, is_dry)))?;
            }
        }
    }
    Ok(())
}

/// No kernel can be faster than the slower of its bytes and its operations.
fn floor(kernel: &KernelTime, ceilings: Ceilings) -> f64 {
    (kernel.bytes / ceilings.copy).max(kernel.operations / ceilings.product)
}

/// `busy`: the seconds of all kernels, or on a machine that computes nothing their floors.
fn of_kernel(kernel: &KernelTime, method: Method, busy: f64, ceilings: Ceilings, is_dry: bool) -> Value {
    let (rate, speed) = (kernel.bytes / kernel.seconds, kernel.operations / kernel.seconds);
    let is_product = kernel.operations > 0.0;
    let floor = floor(kernel, ceilings);
    if is_dry {
        return json!({
            "method": method.name(), "name": kernel.name, "calls": kernel.calls, "bytes": kernel.bytes,
            "operations": kernel.operations, "floor_ms": number(floor * 1e3), "share": number(floor / busy),
        });
    }
    json!({
        "method": method.name(), "name": kernel.name, "calls": kernel.calls, "ms": number(kernel.seconds * 1e3),
        "share": number(kernel.seconds / busy), "gb_per_s": number(rate / 1e9),
        "tflop_per_s": if is_product { number(speed / 1e12) } else { Value::Null },
        "floor_ms": number(floor * 1e3), "of_floor": number(kernel.seconds / floor),
    })
}

/// Prompts that differ, of ids all over the vocabulary.
fn prompts(count: usize, length: usize, vocab: usize) -> Vec<Vec<u32>> {
    let id = |i: usize, j: usize| ((i * 104_729 + j * 7919 + i * j * 31) % vocab) as u32;
    (0..count).map(|i| (0..length).map(|j| id(i, j)).collect()).collect()
}

impl Roles {
    /// Bytes of streamed layers that were copied to the device so far.
    fn streamed(&self) -> usize {
        self.base.place().map_or(0, |device| device.work().streamed)
    }

    /// Milliseconds of a decoding step of so many sequences, prompts and first token left out.
    fn decode(&self, asked: &Asked, sequences: usize, stored: f64, ceilings: Ceilings) -> Result<Value> {
        let steps = asked.response.clamp(2, 65);
        let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: steps, stop: vec![] };
        let prompts = prompts(sequences, asked.prompt, self.base.config().vocab_size);
        let seeds: Vec<u64> = (0..sequences as u64).collect();
        let (mut each, mut streamed) = (vec![], 0);
        for _ in 0..=asked.steps.max(1) {
            let before = self.streamed();
            let (began, mut told, mut first) = (Instant::now(), 0, 0.0);
            generate(Policy::new(&self.base, Some(&self.sft)), &prompts, &seeds, &sampling, |_, _| {
                told += 1;
                if told == sequences {
                    first = began.elapsed().as_secs_f64();
                }
            })?;
            each.push((began.elapsed().as_secs_f64() - first) / (steps - 1) as f64);
            // The prompts' pass copies as much as a step.
            streamed = (self.streamed() - before) / steps;
        }
        let step = median(&each[1..]);
        // Every step reads the base once; the key-value cache and the branches come on top.
        let floor = stored / ceilings.copy;
        Ok(json!({
            "sequences": sequences, "prompt": asked.prompt, "ms_per_step": number(step * 1e3),
            "tokens_per_second": number(sequences as f64 / step), "floor_ms": number(floor * 1e3),
            "of_floor": number(step / floor), "streamed_bytes": streamed,
        }))
    }

    /// The seconds of a step and of its phases, and the device's memory beside the plan's.
    fn step(&self, device: &Device, asked: &Asked, method: Method, scratch: &Path) -> Result<Value> {
        device.reset_peak();
        let before = self.streamed();
        let lines = self.run(asked, method, asked.steps + 1, scratch)?;
        let (measured, streamed) = (device.usage().peak, (self.streamed() - before) / (asked.steps + 1));
        let steps = lines.get(1..).filter(|steps| !steps.is_empty()).context("a step was measured")?;
        let of = |key: &str| -> Vec<f64> { steps.iter().filter_map(|line| line[key].as_f64()).collect() };
        let phases = [Phase::Rollout, Phase::Scoring, Phase::Update, Phase::Step];
        let phases: Map<String, Value> = phases
            .into_iter()
            .map(|phase| (phase.name().to_owned(), number(median(&of(&format!("seconds/{}", phase.name()))))))
            .collect();
        let mut whole = of("seconds");
        whole.sort_by(f64::total_cmp);
        let (settings, responses) = (self.settings(asked, method, asked.steps + 1)?, asked.batch);
        let plan = self.plan(asked, &settings)?;
        let planned = plan.peak().1;
        Ok(json!({
            "method": method.name(), "responses": responses, "prompt": asked.prompt, "response": asked.response,
            "micro_batch_size": asked.micro_batch, "r": asked.rank, "checkpoint": asked.recompute.name(),
            "dequantise": plan.dequantise.name(), "roles_share": plan.sharing.name(),
            "seconds": number(median(&whole)), "min": number(whole[0]), "max": number(whole[whole.len() - 1]),
            "phases": phases, "tokens_per_second": number((responses * asked.response) as f64 / median(&whole)),
            "first_ratio_var": number(median(&of("val/ratio_var"))), "device_bytes": measured, "planned_bytes": planned,
            "planned_over_measured": number(planned as f64 / measured as f64),
            "beside_bytes": dry::BESIDE, "streamed_bytes": streamed,
        }))
    }

    /// Seconds of one step whose launches are timed, and what each kernel took.
    fn profiled(
        &self,
        device: &Device,
        asked: &Asked,
        method: Method,
        scratch: &Path,
    ) -> Result<(f64, Vec<KernelTime>)> {
        device.begin_profile()?;
        let began = Instant::now();
        let ran = self.run(asked, method, 1, scratch);
        let seconds = began.elapsed().as_secs_f64();
        let found = device.end_profile()?;
        ran.map(|_| (seconds, found))
    }

    fn prompts(&self, asked: &Asked, method: Method, steps: usize) -> Vec<Vec<u32>> {
        let count = match method {
            Method::Ppo => asked.batch * steps,
            Method::Grpo => (asked.batch * steps / GENERATIONS).max(1),
        };
        prompts(count, asked.prompt, self.base.config().vocab_size)
    }

    fn settings(&self, asked: &Asked, method: Method, steps: usize) -> Result<config::Config> {
        let method = match method {
            Method::Ppo => String::new(),
            Method::Grpo => format!("advantage_estimator = \"grpo\"\nnum_generations = {GENERATIONS}\n"),
        };
        let text = format!(
            "[base]\npath = \"random\"\n[ppo]\nreward_adapter = \"random\"\nlearning_rate = 1e-5\nbatch_size = {}\n\
             micro_batch_size = {}\nresponse_length = {}\ntotal_episodes = {}\nsave_samples = 0\nmissing_eos_penalty = 1.0\n\
             lr_scheduler_type = \"constant\"\n{method}",
            asked.batch,
            asked.micro_batch,
            asked.response,
            asked.batch * steps
        );
        config::from_text(&text, "the measured step")
    }

    /// A run of so many steps; returns its lines of metrics.
    fn run(&self, asked: &Asked, method: Method, steps: usize, scratch: &Path) -> Result<Vec<Value>> {
        let (settings, prompts) = (self.settings(asked, method, steps)?, self.prompts(asked, method, steps));
        let source = RewardModel(ValueModel::new(&self.base, &self.reward)?);
        let plan = self.plan(asked, &settings)?;
        self.base.set_dequantise(plan.dequantise);
        let decode = |_: &[u32]| String::new();
        let run = PpoRun {
            world: World::alone(),
            base: &self.base,
            reward_base: &self.base,
            sft: &self.sft,
            reward: Some(&self.reward),
            prompts: &prompts,
            stop: &[],
            source: &source,
            decode: &decode,
            evaluation: None,
            ptx: None,
            pad: None,
            sampler: None,
            config: settings.ppo()?,
            seed: 0,
            recompute: asked.recompute,
            sharing: plan.sharing,
        };
        let out = scratch.join(method.name());
        std::fs::create_dir_all(&out).with_context(|| format!("making {}", out.display()))?;
        train(&run, &mut Session::new(Report::open(&out, None, false)?.without_warnings()))?;
        let file = out.join("metrics.jsonl");
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        std::fs::remove_dir_all(&out).with_context(|| format!("removing {}", out.display()))?;
        text.lines().map(|line| serde_json::from_str(line).context("a line of metrics")).collect()
    }

    /// The device's plan. A machine that computes nothing stands for a card with room for everything.
    fn plan(&self, asked: &Asked, settings: &config::Config) -> Result<DevicePlan> {
        let steps = settings.ppo()?.total_episodes / asked.batch;
        let method = if settings.ppo()?.num_generations > 1 { Method::Grpo } else { Method::Ppo };
        let prompts = self.prompts(asked, method, steps);
        let context = self.base.config().max_position_embeddings;
        let facts = passes::Asked { held_out: &[], context, other_tokens: false, ranks: 1 };
        let room = match self.base.place() {
            Some(device) if device.is_dry() => Some(usize::MAX),
            Some(device) => device.room()?,
            None => None,
        };
        let on = OnDevice {
            policy: self.choice,
            scorer: self.choice,
            start: self.sft.clone(),
            reward: self.reward.clone(),
            rooms: room.map(|room| (self.choice, room)).into_iter().collect(),
        };
        let shape = StageShape {
            policy: Network { dequantise: asked.dequantise, ..Network::of_base(&self.base)? },
            scorer: None,
            branches: Branches::of_adapter(&self.sft),
            reward: Branches::of_adapter(&self.reward),
            checkpoint: asked.recompute,
            work: passes::ppo(settings, &prompts, facts)?,
            data: 0,
            process: 0,
            threads: 1,
            on_device: Some(on),
        };
        let plan = dry::walk(&shape)?.into_iter().next().context("the plan of a device")?;
        let dequantise = if asked.dequantise == Dequantising::Auto { plan.dequantise } else { asked.dequantise };
        Ok(DevicePlan { dequantise, ..plan })
    }
}

/// Responses to a prompt under GRPO.
const GENERATIONS: usize = 8;

/// The middle value; NaN of none.
fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
