//! `bench gpu`: the table of `run/device_bench`, a row as soon as it is measured.

use std::path::Path;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::cli::completed::DeviceValue;
use crate::cli::{KvCache, print_json, say};
use crate::config::{ComputeDtype, Dequantising, DeviceChoice, Quantize};
use crate::device::{Device, select};
use crate::error::counted;
use crate::model::block::Recompute;
use crate::ops::weight::StorageDType;
use crate::run::device_bench;
use crate::run::device_bench::{Asked, Ceilings, Method, synthetic};

#[derive(Args)]
pub(in crate::cli) struct Gpu {
    /// The card: cuda or cuda:N; emulated runs its kernels on the CPU, whose times say nothing of a card.
    #[arg(long, value_name = "DEVICE", default_value = "cuda", value_parser = DeviceValue, hide_possible_values = true)]
    device: DeviceChoice,
    /// Computes nothing and needs no card: counts the launches, bytes and operations of a step, and prints the least time of each
    /// kernel on a card of so many GB/s and, in products, TFLOP/s: 2958,683 is an H100.
    #[arg(long, value_name = "GB/S,TFLOP/S", conflicts_with = "device", value_parser = ceilings)]
    roofline: Option<Ceilings>,
    /// Shapes of bases, whose weights are random: 135m (SmolLM2), 1b (Llama 3.2), 7b (Llama 2), 8b (Llama 3.1), tiny, or a
    /// config.json.
    #[arg(long, value_delimiter = ',', default_value = "7b")]
    model: Vec<String>,
    /// Types that the bases are stored in.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "q4_k")]
    stored: Vec<Stored>,
    /// The type that products are computed in.
    #[arg(long, value_enum, default_value = "f16")]
    compute_dtype: Compute,
    #[command(flatten)]
    cache: KvCache,
    /// Methods whose steps are measured.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ppo")]
    methods: Vec<Of>,
    /// Responses of a step.
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 256)]
    prompt_length: usize,
    /// Tokens of a response.
    #[arg(long, default_value_t = 256)]
    response_length: usize,
    /// Sequences of one forward and backward pass.
    #[arg(long, default_value_t = 4)]
    micro_batch_size: usize,
    /// LoRA's rank, on all linear layers.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// The activations that blocks recompute in the backward pass.
    #[arg(long, value_enum, default_value = "block")]
    checkpoint: Kept,
    /// Layers that the device does not keep: they lie in pinned memory of the host and are copied in every pass.
    #[arg(long, default_value_t = 0)]
    offload: usize,
    /// How weights are dequantised for products of many rows; auto: as much ahead, and kept, as the device has room for.
    #[arg(long, value_enum, default_value = "auto")]
    dequantise: Order,
    /// Measured steps, after one that is not counted.
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Sequences that are decoded at once, each measured by itself.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    sequences: Vec<usize>,
    /// Leave out the step that is timed kernel by kernel; with --roofline, the list of kernels under a step's sums.
    #[arg(long)]
    no_kernels: bool,
    /// One JSON object a result on stdout, each as soon as it is measured.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stored {
    #[value(name = "q4_k", alias = "q4-k")]
    Q4K,
    #[value(name = "q8_0", alias = "q8-0")]
    Q8,
    Bf16,
    F16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Compute {
    F32,
    Bf16,
    F16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Of {
    Ppo,
    Grpo,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kept {
    None,
    Mlp,
    Block,
    Offload,
}

#[derive(Clone, Copy, ValueEnum)]
enum Order {
    Auto,
    #[value(name = "in_turn", alias = "in-turn")]
    InTurn,
    Ahead,
    Kept,
}

fn ceilings(text: &str) -> Result<Ceilings, String> {
    let numbers =
        text.split(',').map(|word| word.trim().parse::<f64>().ok().filter(|rate| rate.is_finite() && *rate > 0.0));
    match numbers.collect::<Option<Vec<f64>>>().as_deref() {
        Some(&[copy, product]) => Ok(Ceilings { copy: copy * 1e9, product: product * 1e12 }),
        _ => Err("give two positive numbers, such as 2958,683".into()),
    }
}

impl Gpu {
    /// One measurement a base, in the order of the arguments.
    fn asked(&self) -> Result<Vec<Asked>> {
        let positive = [
            ("--batch-size", self.batch_size),
            ("--prompt-length", self.prompt_length),
            ("--response-length", self.response_length),
            ("--micro-batch-size", self.micro_batch_size),
            ("--rank", self.rank),
            ("--steps", self.steps),
            ("--sequences", self.sequences.iter().copied().min().unwrap_or(1)),
        ];
        if let Some((flag, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(crate::invalid!("{flag} 0: give 1 or more"));
        }
        let grpo = self.methods.iter().any(|method| matches!(method, Of::Grpo));
        if grpo && !self.batch_size.is_multiple_of(8) {
            return Err(crate::invalid!(
                "--methods grpo samples 8 responses a prompt: give --batch-size a multiple of 8"
            ));
        }
        let mut all = vec![];
        for model in &self.model {
            // What is no shape is refused before anything is measured.
            let shape = synthetic::config(model)?;
            let (context, most) =
                (shape.max_position_embeddings, self.prompt_length.saturating_add(self.response_length));
            let layers = shape.num_hidden_layers;
            if self.offload > layers {
                return Err(crate::invalid!(
                    "--offload {} is more than the {layers} layers of {model}; give {layers} to keep none on the card, or fewer",
                    self.offload
                ));
            }
            if most > context {
                return Err(crate::invalid!(
                    "{model} has a context of {context} tokens, and prompt and response have {most}; shorten one"
                ));
            }
            for stored in &self.stored {
                all.push(Asked {
                    model: model.clone(),
                    stored: match stored {
                        Stored::Q4K => Quantize::Q4K.stored(),
                        Stored::Q8 => Quantize::Q8_0.stored(),
                        Stored::Bf16 => StorageDType::BF16,
                        Stored::F16 => StorageDType::F16,
                    },
                    compute: self.compute(),
                    kv_cache_type: self.cache.kind().unwrap_or_default(),
                    methods: self
                        .methods
                        .iter()
                        .map(|method| match method {
                            Of::Ppo => Method::Ppo,
                            Of::Grpo => Method::Grpo,
                        })
                        .collect(),
                    batch: self.batch_size,
                    prompt: self.prompt_length,
                    response: self.response_length,
                    micro_batch: self.micro_batch_size,
                    rank: self.rank,
                    recompute: match self.checkpoint {
                        Kept::None => Recompute::Off,
                        Kept::Mlp => Recompute::Mlp,
                        Kept::Block => Recompute::Block,
                        Kept::Offload => Recompute::Offload,
                    },
                    offload: self.offload,
                    dequantise: match self.dequantise {
                        Order::Auto => Dequantising::Auto,
                        Order::InTurn => Dequantising::InTurn,
                        Order::Ahead => Dequantising::Ahead,
                        Order::Kept => Dequantising::Kept,
                    },
                    steps: self.steps,
                    sequences: self.sequences.clone(),
                    kernels: !self.no_kernels,
                });
            }
        }
        Ok(all)
    }

    fn compute(&self) -> ComputeDtype {
        match self.compute_dtype {
            Compute::F32 => ComputeDtype::F32,
            Compute::Bf16 => ComputeDtype::Bf16,
            Compute::F16 => ComputeDtype::F16,
        }
    }
}

pub(super) fn run(args: &Gpu) -> Result<()> {
    let asked = args.asked()?;
    let scratch = std::env::temp_dir().join(format!("fourfold-bench-gpu-{}", std::process::id()));
    let mut show = |found: Value| if args.json { print_json(&found) } else { say(&row(&found)) };
    let measured = match args.roofline {
        Some(ceilings) => asked.iter().try_for_each(|asked| {
            device_bench::model(&Device::dry(), DeviceChoice::Cuda(0), asked, ceilings, &scratch, &mut show)
        }),
        None => on_card(args, &asked, &scratch, &mut show),
    };
    let removed = std::fs::remove_dir_all(&scratch).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error).with_context(|| format!("removing {}", scratch.display())),
    });
    measured.and(removed)
}

fn on_card(args: &Gpu, asked: &[Asked], scratch: &Path, show: &mut dyn FnMut(Value) -> Result<()>) -> Result<()> {
    let choice = if args.device == DeviceChoice::Auto { DeviceChoice::Cuda(0) } else { args.device };
    let device = select(choice)?.device.ok_or_else(|| {
        crate::invalid!("bench gpu measures a card; name one with --device cuda (benches/steps.rs is the CPU's)")
    })?;
    let ceilings = device_bench::card(&device, args.compute(), show)?;
    asked.iter().try_for_each(|asked| device_bench::model(&device, choice, asked, ceilings, scratch, show))
}

/// A result as a line or two of a table.
fn row(found: &Value) -> String {
    let number = |key: &str| found[key].as_f64().unwrap_or(f64::NAN);
    let text = |key: &str| found[key].as_str().unwrap_or_default();
    let gib = |key: &str| number(key) / (1u64 << 30) as f64;
    let cache = if text("kv_cache_type") == "q8_0" { ", keys and values in q8_0" } else { "" };
    let streamed = match number("offload") {
        layers if layers > 0.0 => format!(", {} streamed", counted(layers as usize, "layer")),
        _ => String::new(),
    };
    let base = format!("{} in {}, products in {}{cache}{streamed}", text("model"), text("stored"), text("compute"));
    match text("bench") {
        "gpu/card" => {
            let products: Vec<String> = found["product_tflop_per_s"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, rate)| format!("{name} {:.1}", rate.as_f64().unwrap_or(f64::NAN)))
                .collect();
            format!(
                "{}\n  copies inside {:.0} GB/s, to it {:.1}, from it {:.1}; a launch {:.1} us\n  products, TFLOP/s: {}\n",
                text("device"),
                number("copy_gb_per_s"),
                number("upload_gb_per_s"),
                number("download_gb_per_s"),
                number("launch_us"),
                products.join(", ")
            )
        }
        "gpu/base" => format!("\n{base}: {:.2} GiB on the device in {:.1} s\n", gib("device_bytes"), number("seconds")),
        "gpu/decode" => format!(
            "  decoding {:>4} sequences: {:.2} ms a step, {:.0} tokens/s; the base's bytes alone take {:.2} ms\n",
            number("sequences"),
            number("ms_per_step"),
            number("tokens_per_second"),
            number("floor_ms")
        ),
        "gpu/step" => {
            let phases: Vec<String> = found["phases"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, seconds)| format!("{name} {:.3}", seconds.as_f64().unwrap_or(f64::NAN)))
                .collect();
            format!(
                "  {} step of {} x ({} + {}) tokens: {:.3} s ({})\n  device memory {:.2} GiB, planned {:.2} ({:.3} of it)\n",
                text("method"),
                number("responses"),
                number("prompt"),
                number("response"),
                number("seconds"),
                phases.join(", "),
                gib("device_bytes"),
                gib("planned_bytes"),
                number("planned_over_measured")
            )
        }
        "gpu/kernels" if found["in_kernels"].is_null() => {
            let copies = match number("streamed_bytes") {
                bytes if bytes > 0.0 => {
                    format!("\n    not counted: {:.1} GB of streamed layers, copied to the card", bytes / 1e9)
                }
                _ => String::new(),
            };
            let head = match found["listed"] == true {
                true => format!("    {:<44}{:>9}{:>11}{:>8}\n", "kernel", "launches", "floor, ms", "share"),
                false => String::new(),
            };
            format!(
                "  {} step: {} launches, {:.3} s if each kernel took no longer than its bytes or operations, {:.3} s of them beside \
                 products{copies}\n{head}",
                text("method"),
                number("launches"),
                number("floor_seconds"),
                number("floor_beside"),
            )
        }
        "gpu/kernel" if found["ms"].is_null() => format!(
            "    {:<44}{:>9}{:>11.2}{:>7.1}%\n",
            text("name"),
            number("calls"),
            number("floor_ms"),
            100.0 * number("share")
        ),
        "gpu/kernels" => format!(
            "  {} step, timed kernel by kernel: {} launches, {:.3} of {:.3} s in kernels\n    {:<44}{:>9}{:>11}{:>8}{:>9}{:>10}{:>9}\n",
            text("method"),
            number("launches"),
            number("in_kernels"),
            number("seconds"),
            "kernel",
            "launches",
            "ms",
            "share",
            "GB/s",
            "TFLOP/s",
            "floors"
        ),
        _ => format!(
            "    {:<44}{:>9}{:>11.2}{:>7.1}%{:>9.0}{:>10}{:>9.1}\n",
            text("name"),
            number("calls"),
            number("ms"),
            100.0 * number("share"),
            number("gb_per_s"),
            found["tflop_per_s"].as_f64().map_or_else(String::new, |rate| format!("{rate:.1}")),
            number("of_floor")
        ),
    }
}
