//! `merge`: base + adapter -> files that other programs open. It does not depend on any stage.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::config::{Base, ByteSize, ComputeDtype};
use crate::error::counted;
use crate::export::card::{BY, Card};
use crate::export::combine::combine;
use crate::export::gguf;
use crate::export::gguf::GgufType;
use crate::export::merged;
use crate::export::merged::{Kind, MAX_SHARD_SIZE, MergedType};
use crate::export::verify::{Comparison, compare};
use crate::export::{Source, staged};
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::note;
use crate::run::{Model, check_not_of_run, settings_beside};
use crate::tokenizer::SpecialTokens;

#[derive(Args)]
pub(super) struct Merge {
    /// Model directory, .gguf file or, with the feature hub, owner/name.
    #[arg(long)]
    base: PathBuf,
    /// PEFT adapter directory, or DIR=WEIGHT. Several are added up: W + sum of weight x scale x B A.
    #[arg(long, required = true, value_name = "DIR[=WEIGHT]")]
    adapter: Vec<String>,
    /// The new file or directory; must not exist.
    #[arg(long)]
    out: PathBuf,
    /// What is written.
    #[arg(long, value_enum, default_value = "safetensors")]
    format: Format,
    /// Type of the merged weights; bf16 unless given. q8_0 and q4_k_m are for GGUF.
    #[arg(long, value_enum)]
    dtype: Option<Type>,
    /// Most bytes of weights in one file: 500MB, 1.5GB, 200KiB. Unless given, 5GB for safetensors and no limit for GGUF.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| text.parse::<ByteSize>().map(|size| size.0))]
    max_shard_size: Option<usize>,
    #[command(flatten)]
    on: super::OnDevice,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A Hugging Face directory with one set of weights.
    Safetensors,
    /// The same, as a sequence classifier with one label: the reward model.
    Classifier,
    /// One GGUF file for llama.cpp.
    Gguf,
    /// The adapter alone, for llama.cpp --lora over the base.
    GgufLora,
    /// The adapter alone, as PEFT reads it; for several adapters made one.
    Peft,
    /// As peft, with the scalar head in TRL's and LLaMA-Factory's value_head.safetensors.
    ValueHead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types)]
enum Type {
    F32,
    Bf16,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_k_m")]
    Q4_K_M,
}

impl Type {
    fn gguf(self) -> GgufType {
        match self {
            Self::F32 => GgufType::Dense(MergedType::F32),
            Self::Bf16 => GgufType::Dense(MergedType::Bf16),
            Self::F16 => GgufType::Dense(MergedType::F16),
            Self::Q8_0 => GgufType::Q8_0,
            Self::Q4_K_M => GgufType::Q4KM,
        }
    }

    fn merged(self) -> Result<MergedType> {
        match self.gguf() {
            GgufType::Dense(dense) => Ok(dense),
            _ => Err(invalid!("--dtype {} is for --format gguf; safetensors hold f32, bf16 or f16", self.name())),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default()
    }
}

/// Texts that an export is compared on: prose, code, figures, another script.
const COMPARED_ON: [&str; 4] = [
    "The old lighthouse keeper climbed the stairs every evening, and",
    "fn main() {\n    let total: u32 = (1..=10).sum();\n    println!(",
    "In 1969 the price was 3.50; by 2024 it had risen to 41.25, which is",
    "La réponse à cette question est simple : 東京は日本の",
];

/// DIR=WEIGHT; DIR alone, or where a directory of the whole name is there, has a weight of 1.
///
/// # Errors
/// If WEIGHT is no number.
fn weighted(text: &str) -> Result<(PathBuf, f64)> {
    let Some((dir, weight)) = text.rsplit_once('=').filter(|_| !Path::new(text).exists()) else {
        return Ok((text.into(), 1.0));
    };
    let number = weight.parse();
    let number =
        number.map_err(|_| invalid!("--adapter {text}: {weight} is no number; write DIR=0.5, or DIR alone for 1"))?;
    Ok((dir.into(), number))
}

/// The name that the format gives its file: a GGUF file ends in `.gguf`.
///
/// # Errors
/// If the name is a GGUF file's and the format writes a folder.
fn named(out: &Path, format: Format) -> Result<PathBuf> {
    let is_file = matches!(format, Format::Gguf | Format::GgufLora);
    match (is_file, out.extension().is_some_and(|ending| ending == "gguf")) {
        (true, false) => {
            let mut name = out.as_os_str().to_owned();
            name.push(".gguf");
            note!("the file is {}: programs know GGUF by its ending", Path::new(&name).display());
            Ok(name.into())
        }
        (false, true) => Err(invalid!(
            "--out {} is the name of a GGUF file, and --format {} writes a folder; add --format gguf, or name a folder",
            out.display(),
            format.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default()
        )),
        _ => Ok(out.to_owned()),
    }
}

pub(super) fn merge(args: Merge) -> Result<()> {
    // Opening a large base takes time, in which a signal ends the command as it does later.
    staged::listen()?;
    let args = &Merge { out: named(&args.out, args.format)?, ..args };
    check_not_of_run(&args.out)?;
    // Known before a large base is opened, and under the name that --out gives.
    if args.out.exists() {
        return Err(invalid!("{} already exists; remove it or name another --out", args.out.display()));
    }
    let weights: Vec<(PathBuf, f64)> = args.adapter.iter().map(|text| weighted(text)).collect::<Result<_>>()?;
    // Rounded products would hide rounded weights.
    let exact = Some(ComputeDtype::F32);
    let model = Model::of_section(&Base { device: args.on.device, compute_dtype: exact, ..Base::at(&args.base) })?;
    let opened = weights.iter().map(|(path, _)| model.adapter(path)).collect::<Result<Vec<_>>>()?;
    check_heads(args.format, &weights, &opened)?;
    let adapter = match (&opened[..], &weights[..]) {
        ([one], [(_, 1.0)]) => one.clone(),
        _ => combine(&opened.iter().zip(&weights).map(|(a, (_, weight))| (a, *weight)).collect::<Vec<_>>())?,
    };
    let tokenizer = model.checkpoint.tokenizer();
    let prompts = COMPARED_ON
        .iter()
        .map(|text| {
            let mut ids = tokenizer.encode(text, SpecialTokens::Add)?;
            ids.truncate(model.base.config().max_position_embeddings);
            Ok(ids)
        })
        .collect::<Result<Vec<_>>>()?;
    let about = about(&weights);
    let source =
        Source { files: &model.checkpoint, base: &model.base, adapter: &adapter, prompts: &prompts, about: &about };
    let dtype = args.dtype.unwrap_or(Type::Bf16);
    let mut made = args.out.clone();
    let comparison = match args.format {
        Format::Safetensors | Format::Classifier => {
            let kind = if args.format == Format::Classifier { Kind::Classifier } else { Kind::LanguageModel };
            let max_shard_size = args.max_shard_size.unwrap_or(MAX_SHARD_SIZE);
            merged::merge(&source, merged::Settings { dtype: dtype.merged()?, kind, max_shard_size }, &args.out)?
        }
        Format::Gguf => {
            let (comparison, first) = gguf::merge(&source, dtype.gguf(), args.max_shard_size, &args.out)?;
            made = first;
            comparison
        }
        Format::GgufLora | Format::Peft | Format::ValueHead => {
            if args.dtype.is_some_and(|d| d != Type::F32) {
                return Err(invalid!("--dtype {}: an adapter is written in f32; leave --dtype out", dtype.name()));
            }
            if args.max_shard_size.is_some() {
                return Err(invalid!("--max-shard-size: an adapter is one file; leave --max-shard-size out"));
            }
            match args.format {
                Format::GgufLora => gguf::lora(&source, &args.out)?,
                _ => save(&source, args)?,
            }
        }
    };
    let drops_the_head = matches!(args.format, Format::Safetensors | Format::Gguf | Format::GgufLora);
    if adapter.head().is_some() && drops_the_head {
        crate::tell!("the adapter's scalar head stays behind: this is a language model; --format classifier keeps it");
    }
    if let Some(bias) = adapter.head().map(|head| head.bias).filter(|_| args.format == Format::Classifier) {
        merged::without_bias(bias).iter().for_each(|text| note!("{text}"));
    }
    say(args, &made, dtype, &comparison)
}

/// A sum of adapters has no scalar head that follows from theirs: one that is taken from one of them scores another network's
/// hidden states.
///
/// # Errors
/// If the format keeps a head, and one of several or a weighted one would be kept.
fn check_heads(format: Format, weights: &[(PathBuf, f64)], opened: &[Adapter]) -> Result<()> {
    if !matches!(format, Format::Classifier | Format::Peft | Format::ValueHead) {
        return Ok(());
    }
    let headed: Vec<_> = weights.iter().zip(opened).filter(|(_, adapter)| adapter.head().is_some()).collect();
    let Some(((path, _), _)) = headed.iter().find(|((_, weight), _)| headed.len() > 1 || *weight != 1.0) else {
        return Ok(());
    };
    Err(invalid!(
        "{} has a scalar head, and heads are neither weighted nor added up: the sum would score otherwise than any of the reward models. \
         `fourfold score` and the adapters of a reward take several, as an ensemble; --format safetensors, gguf and gguf-lora leave \
         the heads behind",
        path.display()
    ))
}

/// The adapter as a PEFT directory, read again and compared.
fn save(source: &Source<'_>, args: &Merge) -> Result<Comparison> {
    staged::staged(&args.out, |dir| {
        match args.format {
            Format::ValueHead => source.adapter.save_with_value_head(dir)?,
            _ => source.adapter.save(dir)?,
        }
        let read = Adapter::load(dir, source.base.shapes()).context("reopening the adapter")?;
        let comparison = compare((source.base, source.adapter), (source.base, Some(&read)), source.prompts)?;
        comparison.check(MergedType::F32.tolerance())?;
        let head = |a: &Adapter| -> Result<Option<(Vec<f32>, f32)>> {
            a.head().map(|h| Ok((h.weight.flatten_all()?.to_vec1()?, h.bias))).transpose()
        };
        anyhow::ensure!(head(&read)? == head(source.adapter)?, "the scalar head came back changed; nothing was kept");
        let card = Card {
            front: "library_name: peft",
            made: format!(
                "A LoRA adapter for {} from {BY}; `peft.PeftModel.from_pretrained(base, this_folder)` opens it.",
                source.base.config().model_name
            ),
            weights: "float32",
            notes: match args.format {
                Format::ValueHead => vec!["the scalar head is in value_head.safetensors, as TRL keeps it".into()],
                _ => vec![],
            },
        };
        fs::write(dir.join("README.md"), card.text(source, &comparison)).context("writing README.md")?;
        Ok(comparison)
    })
}

/// What the run folders beside the adapters say of the training: their resolved settings.
fn about(named: &[(PathBuf, f64)]) -> String {
    let mut text = String::new();
    for (path, weight) in named {
        text.push_str(&format!("Adapter `{}`, weight {weight}.\n\n", path.display()));
        if let Some(settings) = settings_beside(path) {
            text.push_str(&format!("```toml\n{}\n```\n\n", settings.trim_end()));
        }
    }
    text
}

fn say(args: &Merge, made: &Path, dtype: Type, c: &Comparison) -> Result<()> {
    let adapter = matches!(args.format, Format::GgufLora | Format::Peft | Format::ValueHead);
    let dtype = match dtype.gguf() {
        _ if adapter => "float32".to_string(),
        GgufType::Dense(dense) => dense.torch_name().to_string(),
        _ => dtype.name(),
    };
    if args.json {
        return super::print_json(&json!({
            "merged": made.display().to_string(),
            "dtype": dtype,
            "max_logit_difference": c.max_logit_difference,
            "max_logit": c.max_logit,
            "mean_kl": c.mean_kl,
            "greedy_agreement": c.greedy_agreement,
            "positions": c.positions,
        }));
    }
    note!(
        "{}: largest logit difference {:.2e} (largest logit {:.1}), mean KL {:.1e} nats, greedy agreement {:.1}% over {}",
        made.display(),
        c.max_logit_difference,
        c.max_logit,
        c.mean_kl,
        100.0 * c.greedy_agreement,
        counted(c.positions, "position")
    );
    Ok(())
}
