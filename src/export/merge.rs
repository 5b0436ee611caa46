//! Merging: base + adapter -> a Hugging Face directory with one set of weights, written to a temporary name, reopened,
//! compared with base + adapter on prompts, and only then renamed. Knows no training.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::batch::Batch;
use crate::ops::cpu;

/// The numbers of a merged model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum MergedType {
    F32,
    Bf16,
    F16,
}

impl MergedType {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
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

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        }
    }

    /// Largest logit difference, relative to the largest logit, that the type's own rounding explains: of some hundred
    /// rounded layers, with room. Past it the merge is wrong, not imprecise.
    const fn tolerance(self) -> f32 {
        match self {
            Self::F32 => 1e-3,
            Self::Bf16 => 0.1,
            Self::F16 => 0.02,
        }
    }
}

/// How a merged model compares with base + adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Largest difference of a logit.
    pub max_logit_difference: f32,
    /// Largest absolute logit, for scale.
    pub max_logit: f32,
    /// Share of positions at which both prefer the same token.
    pub greedy_agreement: f64,
    /// Positions compared.
    pub positions: usize,
}

/// A tensor of a safetensors file: name, shape, bytes.
type Encoded = (String, Vec<usize>, Vec<u8>);

/// W + scale B A of every adapted matrix, everything else as it is, all as `dtype`: (name, shape, bytes).
///
/// # Errors
/// If a number leaves the range of `dtype`.
fn merged_tensors(base: &Base, adapter: &Adapter, dtype: MergedType) -> Result<Vec<Encoded>> {
    let mut tensors = vec![];
    for (name, weight) in base.weights() {
        let mut values = weight.to_f32();
        if let Some(pair) = pair_of(adapter, &name) {
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
        }
        check_range(&name, &values, dtype)?;
        let (mut shape, mut values) = (vec![weight.rows(), weight.cols()], values);
        if base.lies_transposed(&name) {
            values = (0..shape[0] * shape[1]).map(|i| values[i % shape[0] * shape[1] + i / shape[0]]).collect();
            shape.reverse();
        }
        tensors.push((name, shape, dtype.encode(&values)));
    }
    for (name, values) in base.vectors() {
        check_range(&name, &values, dtype)?;
        tensors.push((name, vec![values.len()], dtype.encode(&values)));
    }
    Ok(tensors)
}

fn pair_of<'a>(adapter: &'a Adapter, weight_name: &str) -> Option<&'a crate::model::adapter::LoraPair> {
    let path = weight_name.strip_suffix(".weight")?;
    let (layer, inside) = path.strip_prefix(adapter.shapes().blocks)?.strip_prefix('.')?.split_once('.')?;
    let linear = adapter.shapes().linears().iter().position(|l| l.path == inside)?;
    adapter.pair(layer.parse().ok()?, linear)
}

fn check_range(name: &str, values: &[f32], dtype: MergedType) -> Result<()> {
    let top = values.iter().fold(0f32, |a, v| a.max(v.abs()));
    if !values.iter().all(|v| v.is_finite()) || (dtype == MergedType::F16 && top > f16::MAX.to_f32()) {
        return Err(invalid!("{name} does not fit {}: its largest number is {top}", dtype.torch_name()));
    }
    Ok(())
}

/// The files beside the weights: (file name, content).
pub type SideFiles<'a> = &'a [(String, Vec<u8>)];

/// Writes the merged model to `out`, which must not exist, and proves it on `prompts` before it takes that name.
/// `side_files` are config.json (of which `torch_dtype` is set here), tokenizer and generation files.
/// `reopen` opens a directory as a base: the caller's, since this module knows no tokenizer.
///
/// # Errors
/// If `out` exists, a file cannot be written, or the reopened model's logits are further from base + adapter than the
/// type's rounding explains; `out` is not there then.
pub fn merge(
    base: &Base,
    adapter: &Adapter,
    dtype: MergedType,
    side_files: SideFiles<'_>,
    prompts: &[Vec<u32>],
    out: &Path,
    reopen: impl FnOnce(&Path) -> Result<Base>,
) -> Result<Comparison> {
    if out.exists() {
        return Err(invalid!("{} is there already; remove it or name another --out", out.display()));
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| invalid!("{}: {e}", parent.display()))?;
    let name = out.file_name().and_then(|n| n.to_str()).context("the output folder needs a name")?;
    let temporary = parent.join(format!(".{name}.{}.partial", std::process::id()));
    let result = write_and_compare(base, adapter, dtype, side_files, prompts, &temporary, reopen).and_then(|c| {
        fs::rename(&temporary, out).with_context(|| format!("renaming to {}", out.display())).map(|()| c)
    });
    if result.is_err() {
        // The error at hand matters more than whether the leftovers could be removed.
        fs::remove_dir_all(&temporary).ok();
    }
    result
}

fn write_and_compare(
    base: &Base,
    adapter: &Adapter,
    dtype: MergedType,
    side_files: SideFiles<'_>,
    prompts: &[Vec<u32>],
    dir: &Path,
    reopen: impl FnOnce(&Path) -> Result<Base>,
) -> Result<Comparison> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    for (name, content) in side_files {
        let content = if name == "config.json" { with_dtype(content, dtype)? } else { content.clone() };
        fs::write(dir.join(name), content).with_context(|| format!("writing {name}"))?;
    }
    let tensors = merged_tensors(base, adapter, dtype)?;
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(dtype.dtype(), shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, Some(metadata), &path).context("writing model.safetensors")?;
    fs::File::open(&path).and_then(|f| f.sync_all()).context("syncing model.safetensors")?;
    drop(tensors);
    let merged = reopen(dir).context("reopening the merged model")?;
    let comparison = compare(base, adapter, &merged, prompts)?;
    let allowed = dtype.tolerance() * comparison.max_logit.max(1.0);
    anyhow::ensure!(
        comparison.max_logit_difference <= allowed,
        "the merged model differs from base + adapter by {} in a logit, more than {allowed}; nothing was kept",
        comparison.max_logit_difference
    );
    Ok(comparison)
}

fn with_dtype(config: &[u8], dtype: MergedType) -> Result<Vec<u8>> {
    let mut value: serde_json::Value = serde_json::from_slice(config).context("config.json of the base")?;
    if let Some(object) = value.as_object_mut() {
        object.remove("dtype");
        object.insert("torch_dtype".into(), dtype.torch_name().into());
        object.remove("quantization_config");
    }
    Ok(serde_json::to_vec_pretty(&value)?)
}

/// Logits of all positions of the prompts by both.
fn compare(base: &Base, adapter: &Adapter, merged: &Base, prompts: &[Vec<u32>]) -> Result<Comparison> {
    let mut c = Comparison { max_logit_difference: 0.0, max_logit: 0.0, greedy_agreement: 0.0, positions: 0 };
    let mut agreed = 0u32;
    for prompt in prompts {
        let batch = Batch::new(std::slice::from_ref(prompt))?;
        let want = base.logits(&base.hidden(&batch, Some(adapter))?)?;
        let got = merged.logits(&merged.hidden(&batch, None)?)?;
        let vocab = base.config().vocab_size;
        for (want, got) in cpu::view(&want)?.chunks_exact(vocab).zip(cpu::view(&got)?.chunks_exact(vocab)) {
            let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
            agreed += u32::from(best(want) == best(got));
            c.positions += 1;
            for (w, g) in want.iter().zip(got) {
                // NaN must not pass as the smaller one.
                let difference = if w.is_finite() && g.is_finite() { (w - g).abs() } else { f32::INFINITY };
                c.max_logit_difference = c.max_logit_difference.max(difference);
                c.max_logit = c.max_logit.max(w.abs());
            }
        }
    }
    anyhow::ensure!(c.positions > 0, "no prompt to compare the merged model on");
    c.greedy_agreement = f64::from(agreed) / c.positions as f64;
    Ok(c)
}
