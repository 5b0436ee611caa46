//! Merges base + adapter into a Hugging Face directory: a language model, or a reward model as a sequence classifier.
//!
//! Tensors are merged one at a time, so that the merged model is never in memory as a whole. It does not depend on training.
//! Read `verify.rs` for the comparison.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use half::f16;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::card::{BY, Card};
use super::verify::{Comparison, Tolerance, compare, compare_through};
use super::{Source, staged};
use crate::invalid;
use crate::model::adapter::{Adapter, LoraLayer, MatrixLayout, NonBlockModule, TargetModule};
use crate::model::base::Base;
use crate::model::batch::Batch;
use crate::model::config::DecoderConfig;
use crate::model_files::ModelFiles;
use crate::ops::cpu;
use crate::ops::linear::low_rank::NormAxis;
use crate::ops::storage::quantise::quantise;
use crate::ops::weight::{StorageDType, Weight};
use crate::report::progress::{Progress, Unit};

/// The type of weights of a merged model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum MergedType {
    F32,
    Bf16,
    F16,
}

impl MergedType {
    const fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// The type as stored.
    pub const fn stored(self) -> StorageDType {
        match self {
            Self::F32 => StorageDType::F32,
            Self::Bf16 => StorageDType::BF16,
            Self::F16 => StorageDType::F16,
        }
    }

    /// `float32`, as config.json calls it.
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The largest differences that rounding some hundred layers to this type explains, with a margin.
    pub const fn tolerance(self) -> Tolerance {
        match self {
            Self::F32 => Tolerance { logit: 1e-3, kl: 1e-4 },
            Self::Bf16 => Tolerance { logit: 0.1, kl: 0.05 },
            Self::F16 => Tolerance { logit: 0.02, kl: 0.01 },
        }
    }
}

/// The kind of a merged model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `AutoModelForCausalLM` opens it.
    LanguageModel,
    /// `AutoModelForSequenceClassification` opens it, with one label: the score of the last token.
    Classifier,
}

/// What [`merge`] writes.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Type of the weights.
    pub dtype: MergedType,
    /// Language model or classifier.
    pub kind: Kind,
    /// The most bytes of weights per file; a single tensor may be larger.
    pub max_shard_size: usize,
}

/// transformers' default `max_shard_size`, in bytes.
pub const MAX_SHARD_SIZE: usize = 5_000_000_000;

/// A merged matrix: W + scale B A, (out, in) f32, or W without a branch; with DoRA, each row times m / ||row||.
///
/// # Errors
/// If the factors cannot be read.
pub(super) fn merged_values(weight: &Weight, pair: Option<&LoraLayer>) -> Result<Vec<f32>> {
    let mut values = weight.to_f32();
    if let Some(pair) = pair {
        let (a, b) = (cpu::view(&pair.a)?, cpu::view(&pair.b)?);
        let (r, k) = pair.a.dims2()?;
        for (row, b) in values.chunks_exact_mut(k).zip(b.chunks_exact(r)) {
            for (&b, a) in b.iter().zip(a.chunks_exact(k)) {
                let factor = (f64::from(b) * pair.scale) as f32;
                for (w, &a) in row.iter_mut().zip(a) {
                    *w += factor * a;
                }
            }
        }
        if let Some(dora) = pair.low_rank().dora {
            let (g, _) = dora.scales(weight, pair.low_rank(), NormAxis::Rows)?;
            values.chunks_exact_mut(k).zip(g).for_each(|(row, g)| row.iter_mut().for_each(|w| *w *= g));
        }
    }
    Ok(values)
}

/// A merged embedding matrix: W + scale (B A)^T, (vocab, D) f32; with DoRA, each column times m / ||column||.
fn merged_table(table: &Weight, pair: &LoraLayer) -> Result<Vec<f32>> {
    let mut values = table.to_f32();
    let (a, b) = (cpu::view(&pair.a)?, cpu::view(&pair.b)?);
    let ((r, vocab), d) = (pair.a.dims2()?, table.cols());
    for (id, row) in values.chunks_exact_mut(d).enumerate() {
        for j in 0..r {
            let factor = (f64::from(a[j * vocab + id]) * pair.scale) as f32;
            for (w, b) in row.iter_mut().zip(b.chunks_exact(r)) {
                *w += factor * b[j];
            }
        }
    }
    if let Some(dora) = pair.low_rank().dora {
        let (g, _) = dora.scales(table, pair.low_rank(), NormAxis::Columns)?;
        values.chunks_exact_mut(d).for_each(|row| row.iter_mut().zip(&g).for_each(|(w, g)| *w *= g));
    }
    Ok(values)
}

/// The branch on the linear map of this Hugging Face name, if it has one. The embedding is not a linear map.
pub(super) fn pair_of<'a>(adapter: &'a Adapter, weight_name: &str) -> Option<&'a LoraLayer> {
    let slot = adapter
        .shapes()
        .slot_of(weight_name)
        .filter(|&slot| slot != TargetModule::NonBlockModule(NonBlockModule::Embedding))?;
    adapter.at(slot)
}

/// Whether merging unties embedding and lm_head: they are tied in the base, and the adapter has a branch on one or on each.
/// (PEFT's `merge_and_unload` writes into the shared matrix, which changes both, and prints a warning.)
pub(super) fn unties(base: &Base, adapter: &Adapter) -> bool {
    let on = |outer| adapter.outer(outer).is_some();
    base.config().tie_word_embeddings && (on(NonBlockModule::Embedding) || on(NonBlockModule::Head))
}

fn check_range(name: &str, values: &[f32], dtype: MergedType) -> Result<()> {
    let top = values.iter().fold(0f32, |a, v| a.max(v.abs()));
    if !values.iter().all(|v| v.is_finite()) || (dtype == MergedType::F16 && top > f16::MAX.to_f32()) {
        return Err(invalid!("{name} does not fit {}: its largest number is {top}", dtype.torch_name()));
    }
    Ok(())
}

/// One tensor of the result, computed when its file is written.
enum Part<'a> {
    /// A matrix, with the branch to merge.
    Matrix(&'a Weight, Option<&'a LoraLayer>, MatrixLayout),
    /// The embedding matrix, with the branch to merge.
    Table(&'a Weight, &'a LoraLayer),
    /// A vector, or the scalar head's weight (1, D).
    Values(Vec<usize>, Cow<'a, [f32]>),
}

struct Planned<'a> {
    name: String,
    part: Part<'a>,
}

impl Planned<'_> {
    fn bytes(&self, dtype: MergedType) -> Result<Vec<u8>> {
        let values = match &self.part {
            Part::Values(_, values) => Cow::Borrowed(&values[..]),
            Part::Table(table, pair) => Cow::Owned(merged_table(table, pair)?),
            Part::Matrix(weight, pair, layout) => {
                let values = merged_values(weight, *pair)?;
                Cow::Owned(match layout {
                    MatrixLayout::OutIn => values,
                    MatrixLayout::InOut => transposed(&values, weight.rows(), weight.cols()),
                })
            }
        };
        check_range(&self.name, &values, dtype)?;
        let mut bytes = Vec::with_capacity(self.size(dtype));
        quantise(dtype.stored(), &values, &mut bytes)?;
        Ok(bytes)
    }

    fn dims(&self) -> Vec<usize> {
        match &self.part {
            Part::Values(shape, _) => shape.clone(),
            Part::Matrix(w, _, MatrixLayout::OutIn) | Part::Table(w, _) => vec![w.rows(), w.cols()],
            Part::Matrix(w, _, MatrixLayout::InOut) => vec![w.cols(), w.rows()],
        }
    }

    fn size(&self, dtype: MergedType) -> usize {
        self.dims().iter().product::<usize>() * dtype.stored().block().1
    }
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect()
}

/// All tensors of the result, in the order of a decoder.
fn plan<'a>(source: &Source<'a>, kind: Kind) -> Result<Vec<Planned<'a>>> {
    let Source { base, adapter, .. } = *source;
    let mut all = vec![];
    for (name, weight) in base.weights() {
        if kind == Kind::Classifier && name == base.config().names().output {
            continue;
        }
        let layout = adapter.shapes().find(&name).map_or(MatrixLayout::OutIn, |_| adapter.shapes().layout);
        let part = match adapter.outer(NonBlockModule::Embedding).filter(|_| name == base.config().names().embedding) {
            Some(pair) => Part::Table(weight, pair),
            None => Part::Matrix(weight, pair_of(adapter, &name), layout),
        };
        all.push(Planned { name, part });
    }
    if kind == Kind::LanguageModel && unties(base, adapter) {
        let (weight, pair) = (base.lm_head(None).weight, adapter.outer(NonBlockModule::Head));
        let name = base.config().names().output.to_string();
        all.push(Planned { name, part: Part::Matrix(weight, pair, MatrixLayout::OutIn) });
    }
    for (name, values) in base.vectors() {
        all.push(Planned { name, part: Part::Values(vec![values.len()], values) });
    }
    if kind == Kind::Classifier {
        let head = adapter.head().ok_or_else(|| {
            invalid!(
                "the adapter has no scalar head, so it cannot become a classifier; give a reward adapter, or leave \
                      `--format classifier` out"
            )
        })?;
        let weight = Cow::Owned(cpu::view(&head.weight)?.to_vec());
        all.push(Planned { name: SCORE.into(), part: Part::Values(vec![1, base.shapes().hidden], weight) });
    }
    Ok(all)
}

/// transformers' name of a sequence classifier's scalar head.
const SCORE: &str = "score.weight";

/// Writes the tensors as `model.safetensors`, or as several files and an index if they have more than `most` bytes.
fn write_shards(dir: &Path, tensors: &[Planned<'_>], dtype: MergedType, most: usize) -> Result<()> {
    let mut shards: Vec<Vec<&Planned<'_>>> = vec![vec![]];
    let mut filled = 0;
    for tensor in tensors {
        let size = tensor.size(dtype);
        if filled + size > most && filled > 0 {
            shards.push(vec![]);
            filled = 0;
        }
        filled += size;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    let bytes: usize = tensors.iter().map(|tensor| tensor.size(dtype)).sum();
    let mut progress = Progress::new("export", bytes, Unit::Bytes);
    if let [only] = &shards[..] {
        write_safetensors(&dir.join("model.safetensors"), only, dtype, &mut progress)?;
        progress.finish();
        return Ok(());
    }
    let mut map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_safetensors(&dir.join(&file), shard, dtype, &mut progress)?;
        map.extend(shard.iter().map(|t| (t.name.clone(), file.clone())));
    }
    progress.finish();
    let index = json!({"metadata": {"total_size": bytes}, "weight_map": map});
    let path = dir.join("model.safetensors.index.json");
    fs::write(&path, serde_json::to_vec_pretty(&index)?).with_context(|| format!("writing {}", path.display()))
}

/// Writes one safetensors file, with one tensor in memory at a time.
fn write_safetensors(path: &Path, tensors: &[&Planned<'_>], dtype: MergedType, progress: &mut Progress) -> Result<()> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.size(dtype);
        let info = json!({"dtype": dtype.dtype(), "shape": tensor.dims(), "data_offsets": [at, end]});
        header.insert(tensor.name.clone(), info);
        at = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut write = || -> Result<()> {
        let mut file = BufWriter::new(fs::File::create(path)?);
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(&text)?;
        for tensor in tensors {
            file.write_all(&tensor.bytes(dtype)?)?;
            progress.add(tensor.size(dtype));
        }
        Ok(file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Writes the merged model to `out`, which must not exist, and verifies it on the prompts before it is renamed into place.
/// The base's tokenizer and configuration files and a model card are written beside the weights. If embedding and lm_head are
/// tied and the adapter has a branch on either, the merged model is not tied.
///
/// # Errors
/// If `out` exists, a classifier is requested and there is no head, a file cannot be written, or the reopened model differs
/// from base + adapter by more than the type's rounding; `out` is not written then.
pub fn merge(source: &Source<'_>, settings: Settings, out: &Path) -> Result<Comparison> {
    let tensors = plan(source, settings.kind)?;
    staged::staged(out, |dir| {
        fs::create_dir(dir).with_context(|| format!("making {}", dir.display()))?;
        for (name, content) in source.files.side_files()? {
            let content = if name == "config.json" { config(&content, source, settings)? } else { content };
            fs::write(dir.join(&name), content).with_context(|| format!("writing {name}"))?;
        }
        write_shards(dir, &tensors, settings.dtype, settings.max_shard_size)?;
        let comparison = verify(source, settings, dir).context("reopening the merged model")?;
        comparison.check(settings.dtype.tolerance())?;
        fs::write(dir.join("README.md"), card(source, settings).text(source, &comparison))
            .context("writing README.md")?;
        Ok(comparison)
    })
}

fn card(source: &Source<'_>, settings: Settings) -> Card<'static> {
    let name = &source.base.config().model_name;
    let (front, loads) = match settings.kind {
        Kind::LanguageModel => ("library_name: transformers\npipeline_tag: text-generation", "AutoModelForCausalLM"),
        Kind::Classifier => {
            ("library_name: transformers\npipeline_tag: text-classification", "AutoModelForSequenceClassification")
        }
    };
    let made = format!("A LoRA adapter merged into {name} with {BY}; `{loads}.from_pretrained` opens this folder.");
    let mut notes = vec![];
    if let (Kind::Classifier, Some(head)) = (settings.kind, source.adapter.head()) {
        notes.push("score: one label, the score of a sequence's last token".to_string());
        notes.extend(without_bias(head.bias));
    }
    Card { front, made, weights: settings.dtype.torch_name(), notes }
}

/// What becomes of a score without the head's bias; `None` if it has none.
pub fn without_bias(bias: f32) -> Option<String> {
    let moved = if bias > 0.0 { "lower" } else { "higher" };
    (bias != 0.0).then(|| {
        format!(
            "the head's bias of {bias} is left out, since a sequence classifier of transformers has none: its scores are {moved} \
             by {} than those of `fourfold score`, and differences of scores are the same",
            bias.abs()
        )
    })
}

fn verify(source: &Source<'_>, settings: Settings, dir: &Path) -> Result<Comparison> {
    let files = ModelFiles::open(dir)?;
    let merged = source.beside(files.base()?)?;
    let want = (source.base, source.adapter);
    match settings.kind {
        Kind::LanguageModel => compare(want, (&merged, None), source.prompts),
        Kind::Classifier => {
            verify_head(source, &files, &merged, settings.dtype)?;
            compare_through(want, (&merged, None), source.base, source.prompts)
        }
    }
}

/// Compares the scores of the prompts by the exported classifier with those of base + adapter.
fn verify_head(source: &Source<'_>, files: &ModelFiles, merged: &Base, dtype: MergedType) -> Result<()> {
    let head = source.adapter.head().context("a classifier has a head")?;
    let width = source.base.shapes().hidden;
    let written = files.weight(SCORE, 1, width)?.to_f32();
    let score = |w: &[f32], h: &[f32]| w.iter().zip(h).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let own = cpu::view(&head.weight)?;
    let (mut furthest, mut largest) = (0f64, 1f64);
    for prompt in source.prompts {
        let batch = Batch::new(std::slice::from_ref(prompt))?;
        let (want, got) = (source.base.hidden(&batch, Some(source.adapter))?, merged.hidden(&batch, None)?);
        let (want, got) = (want.to_host()?, got.to_host()?);
        let (want, got) = (cpu::view(&want)?, cpu::view(&got)?);
        for (want, got) in want.chunks_exact(width).zip(got.chunks_exact(width)) {
            let (want, got) = (score(&own, want), score(&written, got));
            furthest = furthest.max(if got.is_finite() { (want - got).abs() } else { f64::INFINITY });
            largest = largest.max(want.abs());
        }
    }
    let allowed = f64::from(dtype.tolerance().logit) * largest;
    anyhow::ensure!(furthest <= allowed, "a score differs by {furthest}, more than {allowed}; nothing was kept");
    Ok(())
}

/// The base's config.json with the type of the weights; for a classifier, also with one label and a padding token.
fn config(config: &[u8], source: &Source<'_>, settings: Settings) -> Result<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(config).context("config.json of the base")?;
    let object = value.as_object_mut().context("config.json of the base is not an object")?;
    object.remove("dtype");
    object.insert("torch_dtype".into(), settings.dtype.torch_name().into());
    object.remove("quantization_config");
    // Also where the base's own file unties what its configuration ties.
    let is_tied = source.base.config().tie_word_embeddings && !unties(source.base, source.adapter);
    if !is_tied && DecoderConfig::from_hf(&serde_json::to_string(object)?, None, "the base")?.tie_word_embeddings {
        object.insert("tie_word_embeddings".into(), json!(false));
    }
    if settings.kind == Kind::Classifier {
        let architecture = object.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let name = architecture.map_or("LlamaForSequenceClassification".into(), |a| {
            let stem = a.strip_suffix("ForCausalLM").or_else(|| a.strip_suffix("LMHeadModel")).unwrap_or(a);
            format!("{stem}ForSequenceClassification")
        });
        object.insert("architectures".into(), json!([name]));
        object.insert("id2label".into(), json!({"0": "reward"}));
        object.insert("label2id".into(), json!({"reward": 0}));
        // A classifier has no lm_head; declared tied, so that this program, too, does not expect one.
        object.insert("tie_word_embeddings".into(), json!(true));
        if object.get("pad_token_id").is_none_or(Value::is_null) {
            // transformers needs it to find the last token of a padded row.
            let tokenizer = source.files.tokenizer();
            object.insert("pad_token_id".into(), json!(tokenizer.pad_id().or(tokenizer.eos_id())));
        }
    }
    Ok(serde_json::to_vec_pretty(&value)?)
}
