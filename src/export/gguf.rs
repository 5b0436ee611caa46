//! GGUF files for llama.cpp: a merged model, or the adapter alone as a GGUF-LoRA file for `--lora`.
//!
//! From a GGUF base, metadata and tokenizer are copied; from a Hugging Face base they are generated. A file is reopened and
//! compared before it is renamed into place. It does not depend on training. Read `gguf_container.rs` next.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use super::card::{BY, Card};
use super::gguf_architecture::Keys;
use super::gguf_container::{Entry, KeyValue, write};
use super::gguf_parts::Parts;
use super::merged::{MergedType, merged_values, pair_of};
use super::verify::{Comparison, Tolerance, compare};
use super::{Source, gguf_vocabulary as vocabulary, staged};
use crate::export::card;
use crate::export::gguf_architecture as architecture;
use crate::invalid;
use crate::model::adapter::{Adapter, LoraConfig, LoraLayer, LoraLayers, TargetModules};
use crate::model::config::{DecoderConfig, Family, gguf_names};
use crate::model_files::gguf::Gguf;
use crate::model_files::{ModelFiles, map};
use crate::ops::cpu;
use crate::ops::weight::{Bytes, RowOrder, StorageDType, Weight};
use crate::report::progress::{Progress, Unit};
use crate::tokenizer::SpecialTokens;

/// The type of weights of a merged GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum GgufType {
    Dense(MergedType),
    Q8_0,
    /// llama.cpp's mix: q4_k, with q6_k for the lm_head and for half of the value and down projections.
    Q4KM,
}

impl GgufType {
    /// llama.cpp's name of the type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense(MergedType::F32) => "f32",
            Self::Dense(MergedType::F16) => "f16",
            Self::Dense(MergedType::Bf16) => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4KM => "q4_k_m",
        }
    }

    /// `llama_ftype` in llama.cpp.
    const fn file_type(self) -> u32 {
        match self {
            Self::Dense(MergedType::F32) => 0,
            Self::Dense(MergedType::F16) => 1,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
            Self::Dense(MergedType::Bf16) => 32,
        }
    }

    const fn tolerance(self) -> Tolerance {
        match self {
            Self::Dense(dense) => dense.tolerance(),
            Self::Q8_0 => Tolerance { logit: 0.1, kl: 0.05 },
            // Four bits change logits considerably; a wrong file differs by several nats.
            Self::Q4KM => Tolerance { logit: 1.0, kl: 0.5 },
        }
    }

    /// The type of one matrix. Source: llama.cpp `llama_tensor_get_type`.
    fn of(self, name: &str, cols: usize, layers: usize, tied: bool) -> StorageDType {
        let wanted = match self {
            Self::Dense(dense) => dense.stored(),
            Self::Q8_0 => StorageDType::Q8_0,
            Self::Q4KM => {
                let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
                let more = layer.is_some_and(|i| i < layers / 8 || i >= 7 * layers / 8 || (i - layers / 8) % 3 == 2);
                let half = name.ends_with("attn_v.weight") || name.ends_with("ffn_down.weight");
                let output = name == "output.weight" || (tied && name == "token_embd.weight");
                if output || (half && more) { StorageDType::Q6K } else { StorageDType::Q4K }
            }
        };
        wanted.for_width(cols).unwrap_or(StorageDType::F16)
    }
}

/// The data of one entry of the tensor table.
enum Filling<'a> {
    /// A matrix merged with its branch, with rows in this order.
    Matrix(&'a Weight, Option<&'a LoraLayer>, RowOrder),
    /// A tensor of the base's file, copied.
    Copied(Bytes),
    /// f32 numbers.
    Values(Cow<'a, [f32]>),
}

/// Writes the merged model as one GGUF file to `out`, or as several files beside it, `OUT-00001-of-00003.gguf` and so on, if its
/// tensors have more than `max_shard_size` bytes. None of them may exist. Returns the file to open beside the comparison.
///
/// # Errors
/// If GGUF cannot express the base's family or tokenizer, a number is out of range, or the reopened file differs from base +
/// adapter by more than its type's rounding; nothing is written then.
pub fn merge(
    source: &Source<'_>,
    dtype: GgufType,
    max_shard_size: Option<usize>,
    out: &Path,
) -> Result<(Comparison, PathBuf)> {
    source.check_gguf_model()?;
    let (mut keys, plan) = match source.files.gguf() {
        Some(gguf) => (carried(gguf), plan_from_gguf(source, gguf, dtype)?),
        None => {
            let mut keys = architecture::keys(source.base.config())?;
            keys.extend(vocabulary::tokenizer(source.files)?);
            (keys, plan_from_weights(source, dtype)?)
        }
    };
    keys.push(("general.file_type".into(), KeyValue::U32(dtype.file_type())));
    keys.push(("general.quantization_version".into(), KeyValue::U32(2)));
    let (table, fillings): (Vec<Entry>, Vec<Filling<'_>>) = plan.into_iter().unzip();
    let parts = Parts::new(&table, max_shard_size, out)?;
    let paths = parts.paths(out);
    let card = Card {
        front: "library_name: gguf\npipeline_tag: text-generation",
        made: format!(
            "A LoRA adapter merged into {} with {BY}; llama.cpp and what is built on it open this file.",
            source.base.config().model_name
        ),
        weights: dtype.name(),
        notes: match paths.len() {
            1 => vec![],
            n => vec![format!("{n} files; the first is opened, and finds the others beside it")],
        },
    };
    let comparison = with_card(source, &card, out, &paths, |dir| {
        let bytes = table.iter().filter_map(Entry::size).sum();
        let mut progress = Progress::new("export", bytes, Unit::Bytes);
        parts.write(dir, &keys, &table, |i| {
            let bytes = fill(&fillings[i], table[i].dtype)?;
            progress.add(bytes.len());
            Ok(bytes)
        })?;
        progress.finish();
        let first = paths[0].file_name().context("the output needs a name")?;
        let reopened = ModelFiles::open(&dir.join(first)).context("reopening the GGUF file")?;
        architecture::same_decoder(source.base.config(), reopened.config())?;
        same_tokens(source.files, &reopened)?;
        let merged = source.beside(reopened.base()?)?;
        let shorter = |p: &Vec<u32>| p.iter().take(reopened.config().max_position_embeddings).copied().collect();
        let prompts: Vec<Vec<u32>> = source.prompts.iter().map(shorter).collect();
        let comparison = compare((source.base, source.adapter), (&merged, None), &prompts)?;
        comparison.check(dtype.tolerance())?;
        Ok(comparison)
    })?;
    Ok((comparison, paths[0].clone()))
}

/// As [`staged::staged_files`] of `paths`, with the model card of `out` beside them.
fn with_card(
    source: &Source<'_>,
    card: &Card<'_>,
    out: &Path,
    paths: &[PathBuf],
    make: impl FnOnce(&Path) -> Result<Comparison>,
) -> Result<Comparison> {
    let beside = card::beside(out);
    if beside.exists() {
        return Err(invalid!(
            "{}, the model card beside {}, already exists; remove it or name another --out",
            beside.display(),
            out.display()
        ));
    }
    let comparison = staged::staged_files(paths, make)?;
    fs::write(&beside, card.text(source, &comparison)).with_context(|| format!("writing {}", beside.display()))?;
    Ok(comparison)
}

fn fill(filling: &Filling<'_>, dtype: StorageDType) -> Result<Vec<u8>> {
    Ok(match filling {
        Filling::Copied(bytes) => bytes.get().to_vec(),
        Filling::Values(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Filling::Matrix(weight, pair, order) => {
            let values = order.store(&merged_values(weight, *pair)?, weight.cols());
            Weight::from_f32(&values, weight.rows(), weight.cols())?.quantised(dtype)?.bytes().to_vec()
        }
    })
}

/// The keys of the base's file that also apply to the merged file.
fn carried(gguf: &Gguf) -> Keys {
    let of_the_old = |key: &str| {
        matches!(key, "general.file_type" | "general.quantization_version" | "general.alignment")
            || key.starts_with("split.")
            || key.starts_with("quantize.imatrix")
    };
    gguf.raw_values()
        .filter(|(key, _)| !of_the_old(key))
        .map(|(key, bytes)| (key.to_string(), KeyValue::Raw(bytes.to_vec())))
        .collect()
}

/// All tensors of the base's file under their names: matrices of the decoder in the new type, others copied.
fn plan_from_gguf<'a>(source: &Source<'a>, gguf: &Gguf, dtype: GgufType) -> Result<Vec<(Entry, Filling<'a>)>> {
    let (weights, config) = (source.base.weights(), source.base.config());
    let tied = gguf.tensor("output.weight").is_none();
    let layers = source.base.shapes().layers;
    gguf.tensors()
        .iter()
        .map(|tensor| {
            let found =
                gguf_names::hf_name(config, &tensor.name).and_then(|hf| weights.iter().find(|(name, _)| *name == hf));
            let (dtype, filling) = match found {
                Some((name, weight)) => (
                    dtype.of(&tensor.name, weight.cols(), layers, tied),
                    Filling::Matrix(weight, pair_of(source.adapter, name), weight.row_order()),
                ),
                None => {
                    let bytes = gguf.tensor_bytes(tensor).with_context(|| format!("{} is cut", tensor.name))?;
                    (tensor.dtype, Filling::Copied(bytes))
                }
            };
            Ok((Entry { name: tensor.name.clone(), shape: tensor.shape.clone(), dtype }, filling))
        })
        .collect()
}

/// The tensors of a Hugging Face base under llama.cpp's names.
fn plan_from_weights<'a>(source: &Source<'a>, dtype: GgufType) -> Result<Vec<(Entry, Filling<'a>)>> {
    let config = source.base.config();
    let mut plan = vec![];
    let vector = |name: &str, values: Cow<'a, [f32]>| {
        let entry = Entry { name: name.to_string(), shape: vec![values.len()], dtype: StorageDType::F32 };
        (entry, Filling::Values(values))
    };
    let mut weights = source.base.weights();
    let mut tied = config.tie_word_embeddings;
    if tied && matches!(config.family, Family::Olmo2 | Family::GptNeoX) {
        // llama.cpp does not tie embedding and lm_head in these architectures.
        weights.extend(weights.first().map(|(_, table)| (config.names().output.to_string(), *table)));
        tied = false;
    }
    for (name, weight) in weights {
        let ggml = ggml_name(config, &name)?;
        let dtype = match ggml.starts_with("position_embd") {
            true => StorageDType::F32,
            false => dtype.of(&ggml, weight.cols(), config.num_hidden_layers, tied),
        };
        let entry = Entry { name: ggml, shape: vec![weight.rows(), weight.cols()], dtype };
        plan.push((
            entry,
            Filling::Matrix(weight, pair_of(source.adapter, &name), gguf_names::row_order(config, &name)),
        ));
    }
    for (name, values) in source.base.vectors() {
        let mut values = match gguf_names::row_order(config, &name) {
            RowOrder::AsStored => values,
            order => Cow::Owned(order.store(&values, 1)),
        };
        if gguf_names::adds_one(config, &name) {
            values.to_mut().iter_mut().for_each(|v| *v += 1.0);
        }
        plan.push(vector(&ggml_name(config, &name)?, values));
    }
    for (name, factors) in architecture::rope_factors(source.files)? {
        plan.push(vector(name, Cow::Owned(factors)));
    }
    Ok(plan)
}

/// llama.cpp's name of a tensor.
fn ggml_name(config: &DecoderConfig, hf: &str) -> Result<String> {
    gguf_names::gguf_name(config, hf).ok_or_else(|| {
        invalid!("{hf} has no name in a GGUF file of a {} model; use `--format safetensors`", config.names().model_type)
    })
}

/// A text that both tokenizers must encode equally: words, numbers, white space, several scripts, an emoji.
const PROBE: &str = "It's 3.14 and 1,000 more\n\n  indented\tcode(x); naïve 東京 Привет 🦙!  ";

fn same_tokens(ours: &ModelFiles, written: &ModelFiles) -> Result<()> {
    let encode = |c: &ModelFiles| c.tokenizer().encode(PROBE, SpecialTokens::Add);
    anyhow::ensure!(
        encode(ours)? == encode(written)?,
        "the tokenizer in the GGUF file reads text differently from the base's; nothing was kept"
    );
    Ok(())
}

/// Writes the adapter as a GGUF-LoRA file to `out`, which must not exist, for `llama.cpp --lora` over the base: over the same
/// file if that is a GGUF file, over its conversion if it is a Hugging Face model. A model card lies beside it.
///
/// # Errors
/// If llama.cpp does not have the base's architecture, the file cannot be written, or the reopened adapter differs; `out` does
/// not exist then.
pub fn lora(source: &Source<'_>, out: &Path) -> Result<Comparison> {
    if let Some(what) = source.gguf_lora_obstacle() {
        let formats = match source.check_gguf_model() {
            Ok(()) => "`--format gguf` or `--format safetensors`",
            Err(_) => "`--format safetensors`",
        };
        return Err(invalid!("{what}; merge the adapter into the base instead: {formats}"));
    }
    let card = Card {
        front: "library_name: gguf\nbase_model_relation: adapter",
        made: format!(
            "A LoRA adapter for {} from {BY}; llama.cpp runs it over the base's GGUF file with `--lora`.",
            source.base.config().model_name
        ),
        weights: "f32",
        notes: vec![],
    };
    with_card(source, &card, out, &[out.to_owned()], |dir| {
        let path = dir.join(out.file_name().context("the output needs a name")?);
        write_lora(source, &path)?;
        let read = read_lora(source, &path).context("reopening the GGUF-LoRA file")?;
        let comparison = compare((source.base, source.adapter), (source.base, Some(&read)), source.prompts)?;
        comparison.check(MergedType::F32.tolerance())?;
        Ok(comparison)
    })
}

/// Writes the GGUF-LoRA file alone, under its name at once and without a comparison: a run that samples from it compares
/// log-probabilities.
///
/// # Errors
/// If a branch has no name in llama.cpp, or the file cannot be written.
pub fn write_lora(source: &Source<'_>, path: &Path) -> Result<()> {
    let adapter = source.adapter;
    let alpha = adapter.config().lora_alpha;
    let architecture = match source.files.gguf() {
        Some(gguf) => gguf.string("general.architecture")?.unwrap_or("llama").to_string(),
        None => architecture::name(source.base.config())?.to_string(),
    };
    let keys: Keys = vec![
        ("general.architecture".into(), KeyValue::String(architecture)),
        ("general.type".into(), KeyValue::String("adapter".into())),
        ("general.name".into(), KeyValue::String(format!("{} LoRA", source.base.config().model_name))),
        ("general.file_type".into(), KeyValue::U32(0)),
        ("general.quantization_version".into(), KeyValue::U32(2)),
        ("adapter.type".into(), KeyValue::String("lora".into())),
        ("adapter.lora.alpha".into(), KeyValue::F32(alpha as f32)),
    ];
    let (mut table, mut factors) = (vec![], vec![]);
    for (name, weight) in source.base.weights() {
        let Some(pair) = pair_of(adapter, &name) else { continue };
        let (ggml, order) = place(source, &name, weight)?;
        let (r, in_features) = pair.a.dims2()?;
        for (factor, shape) in [('a', vec![r, in_features]), ('b', vec![weight.rows(), r])] {
            table.push(Entry { name: format!("{ggml}.lora_{factor}"), shape, dtype: StorageDType::F32 });
            factors.push((factor, pair, order));
        }
    }
    write(path, &keys, &table, |i| {
        let (factor, pair, order) = &factors[i];
        let values = match factor {
            'a' => cpu::view(&pair.a)?.to_vec(),
            _ => {
                // llama.cpp multiplies by alpha / r; a different scale (rsLoRA) is included in B.
                let r = pair.a.dims2()?.0;
                let more = pair.scale * r as f64 / f64::from(alpha as f32);
                let b: Vec<f32> = cpu::view(&pair.b)?.iter().map(|&v| (f64::from(v) * more) as f32).collect();
                order.store(&b, r)
            }
        };
        Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
    })
}

/// (ggml's name, order of rows) of a matrix of the base.
fn place(source: &Source<'_>, name: &str, weight: &Weight) -> Result<(String, RowOrder)> {
    let config = source.base.config();
    let Some(gguf) = source.files.gguf() else {
        return Ok((ggml_name(config, name)?, gguf_names::row_order(config, name)));
    };
    let tensor = gguf.tensors().iter().find(|t| gguf_names::hf_name(config, &t.name).as_deref() == Some(name));
    let tensor = tensor.with_context(|| format!("{name} is not a tensor of {}", gguf.name()))?;
    Ok((tensor.name.clone(), weight.row_order()))
}

/// Reads a GGUF-LoRA file over the source's base as llama.cpp does. The source's adapter says what shape it has.
///
/// # Errors
/// If the file is no such file, or is cut.
pub fn read_lora(source: &Source<'_>, path: &Path) -> Result<Adapter> {
    let file = Gguf::parse(map(path)?, &path.display().to_string())?;
    let alpha = file.float("adapter.lora.alpha")?.context("adapter.lora.alpha is missing")?;
    let shapes = source.base.shapes();
    let mut layers = vec![LoraLayers::default(); shapes.layers];
    let mut targets = vec![];
    for (name, weight) in source.base.weights() {
        let Some((layer, linear)) = source.adapter.shapes().find(&name) else { continue };
        let (ggml, order) = place(source, &name, weight)?;
        let read = |factor: &str| -> Result<Option<Vec<f32>>> {
            let Some(tensor) = file.tensor(&format!("{ggml}.lora_{factor}")) else { return Ok(None) };
            let bytes = file.tensor_bytes(tensor).context("a factor is cut")?;
            let [rows, cols] = tensor.shape[..] else { anyhow::bail!("a factor is not a matrix") };
            Ok(Some(Weight::new(bytes, tensor.dtype, rows, cols)?.to_f32()))
        };
        let (Some(a), Some(stored)) = (read("a")?, read("b")?) else { continue };
        let r = a.len() / weight.cols();
        let b = (0..weight.rows()).flat_map(|row| stored[order.stored(row) * r..(order.stored(row) + 1) * r].to_vec());
        let tensor = |values, dims: (usize, usize)| Tensor::from_vec(values, dims, &Device::Cpu);
        let (a, b) = (tensor(a, (r, weight.cols()))?, tensor(b.collect(), (weight.rows(), r))?);
        layers[layer][linear] = Some(LoraLayer::new(a, b, alpha / r as f64));
        targets.push(shapes.module_path(layer, linear));
    }
    let config = LoraConfig {
        lora_alpha: alpha,
        use_rslora: false,
        target_modules: TargetModules::List(targets),
        exclude_modules: None,
        layers_to_transform: None,
        ..source.adapter.config().clone()
    };
    Adapter::from_parts(config, shapes, layers, None, source.adapter.provenance().clone())
}
