//! GGUF for llama.cpp: a merged model, or the adapter alone as a GGUF-LoRA that `--lora` runs over the very file it was
//! trained on. From a GGUF base, metadata and tokenizer are carried along as they are; from a Hugging Face base of the
//! Llama family they are made. Written, reopened and compared before the name is given. Read gguf_container.rs for the
//! file's form.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use super::gguf_container::{Entry, KeyValue, write};
use super::gguf_metadata::{self as metadata, Keys};
use super::merged::{MergedType, merged_values, pair_of};
use super::verify::{Comparison, Tolerance, compare};
use super::{Source, staged};
use crate::invalid;
use crate::model::adapter::{Adapter, LayerPairs, LoraConfig, LoraPair, TargetModules};
use crate::model::base::Base;
use crate::model::checkpoint::{Checkpoint, map};
use crate::model::gguf::{self, Gguf};
use crate::model::tokenizer::SpecialTokens;
use crate::ops::cpu;
use crate::ops::weight::{Bytes, RowOrder, StoredType, Weight};

/// The numbers of a merged GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum GgufType {
    Dense(MergedType),
    Q8_0,
    /// llama.cpp's mix: q4_k, with q6_k for the output table and for half of the value and down projections.
    Q4KM,
}

impl GgufType {
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
            // Four bits move logits by a good part of themselves; a wrong file is nats away.
            Self::Q4KM => Tolerance { logit: 1.0, kl: 0.5 },
        }
    }

    /// The type of one matrix. Source: llama.cpp `llama_tensor_get_type`.
    fn of(self, name: &str, cols: usize, layers: usize, tied: bool) -> StoredType {
        let wanted = match self {
            Self::Dense(dense) => dense.stored(),
            Self::Q8_0 => StoredType::Q8_0,
            Self::Q4KM => {
                let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
                let more = layer.is_some_and(|i| i < layers / 8 || i >= 7 * layers / 8 || (i - layers / 8) % 3 == 2);
                let half = name.ends_with("attn_v.weight") || name.ends_with("ffn_down.weight");
                let output = name == "output.weight" || (tied && name == "token_embd.weight");
                if output || (half && more) { StoredType::Q6K } else { StoredType::Q4K }
            }
        };
        wanted.for_width(cols).unwrap_or(StoredType::F16)
    }
}

/// What a place of the table is filled with.
enum Filling<'a> {
    /// A matrix with its branch, rows stored in this order.
    Matrix(&'a Weight, Option<&'a LoraPair>, RowOrder),
    /// A tensor of the base's file, as it is there.
    Copied(Bytes),
    /// f32 numbers.
    Values(Cow<'a, [f32]>),
}

/// Writes the merged model as one GGUF file to `out`, which must not exist.
///
/// # Errors
/// If the base is of a family that cannot be written, its tokenizer has no name in llama.cpp, a number does not fit, or
/// the reopened file is further from base + adapter than its type explains; `out` is not there then.
pub fn merge(source: &Source<'_>, dtype: GgufType, out: &Path) -> Result<Comparison> {
    source.check_gguf_model()?;
    let (mut keys, plan) = match source.checkpoint.gguf() {
        Some(gguf) => (carried(gguf), plan_from_gguf(source, gguf, dtype)?),
        None => {
            let mut keys = metadata::architecture(source.base.config())?;
            keys.extend(metadata::tokenizer(source.checkpoint)?);
            (keys, plan_from_weights(source, dtype)?)
        }
    };
    keys.push(("general.file_type".into(), KeyValue::U32(dtype.file_type())));
    keys.push(("general.quantization_version".into(), KeyValue::U32(2)));
    let (table, fillings): (Vec<Entry>, Vec<Filling<'_>>) = plan.into_iter().unzip();
    staged::staged(out, |path| {
        write(path, &keys, &table, |i| fill(&fillings[i], table[i].dtype))?;
        let reopened = Checkpoint::open(path).context("reopening the GGUF file")?;
        same_tokens(source.checkpoint, &reopened)?;
        let merged = Base::load(&reopened)?;
        let comparison = compare((source.base, source.adapter), (&merged, None), source.prompts)?;
        comparison.check(dtype.tolerance())?;
        Ok(comparison)
    })
}

fn fill(filling: &Filling<'_>, dtype: StoredType) -> Result<Vec<u8>> {
    Ok(match filling {
        Filling::Copied(bytes) => bytes.get().to_vec(),
        Filling::Values(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Filling::Matrix(weight, pair, order) => {
            let values = order.store(&merged_values(weight, *pair)?, weight.cols());
            Weight::from_f32(&values, weight.rows(), weight.cols())?.quantised(dtype)?.bytes().to_vec()
        }
    })
}

/// The keys of the base's file that hold for the merged one, too.
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

/// Every tensor of the base's file under its name: matrices of the decoder in the new type, all else as it is.
fn plan_from_gguf<'a>(source: &Source<'a>, gguf: &Gguf, dtype: GgufType) -> Result<Vec<(Entry, Filling<'a>)>> {
    let (weights, config) = (source.base.weights(), source.base.config());
    let tied = gguf.tensor("output.weight").is_none();
    let layers = source.base.shapes().layers;
    gguf.tensors()
        .iter()
        .map(|tensor| {
            let found = gguf::hf_name(config, &tensor.name).and_then(|hf| weights.iter().find(|(name, _)| *name == hf));
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

/// The tensors of a Hugging Face base of the Llama family under llama.cpp's names.
fn plan_from_weights<'a>(source: &Source<'a>, dtype: GgufType) -> Result<Vec<(Entry, Filling<'a>)>> {
    let config = source.base.config();
    let mut plan = vec![];
    let vector = |name: &str, values: Cow<'a, [f32]>| {
        let entry = Entry { name: name.to_string(), shape: vec![values.len()], dtype: StoredType::F32 };
        (entry, Filling::Values(values))
    };
    for (name, weight) in source.base.weights() {
        let ggml = llama_name(&name)?;
        let dtype = dtype.of(&ggml, weight.cols(), config.num_hidden_layers, config.tie_word_embeddings);
        let entry = Entry { name: ggml, shape: vec![weight.rows(), weight.cols()], dtype };
        let order = stored_order(source, &name);
        plan.push((entry, Filling::Matrix(weight, pair_of(source.adapter, &name), order)));
    }
    for (name, values) in source.base.vectors() {
        plan.push(vector(&llama_name(&name)?, values));
    }
    if let Some(divisors) = metadata::rope_divisors(config) {
        plan.push(vector("rope_freqs.weight", Cow::Owned(divisors)));
    }
    Ok(plan)
}

/// How llama.cpp's llama architecture stores the rows of a Hugging Face matrix.
fn stored_order(source: &Source<'_>, name: &str) -> RowOrder {
    let turned = name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight");
    match turned {
        true => RowOrder::RopeInterleaved { head_dim: source.base.config().head_dim },
        false => RowOrder::AsStored,
    }
}

/// llama.cpp's name of a tensor of a Hugging Face Llama.
fn llama_name(hf: &str) -> Result<String> {
    let name = match hf.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, inside)) => part_name(inside).map(|part| format!("blk.{layer}.{part}")),
        None => top_name(hf).map(String::from),
    };
    name.ok_or_else(|| {
        invalid!("{hf} has no name in a GGUF file of the llama architecture; use `--format safetensors`")
    })
}

fn top_name(hf: &str) -> Option<&'static str> {
    Some(match hf {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => return None,
    })
}

fn part_name(hf: &str) -> Option<&'static str> {
    Some(match hf {
        "input_layernorm.weight" => "attn_norm.weight",
        "post_attention_layernorm.weight" => "ffn_norm.weight",
        "self_attn.q_proj.weight" => "attn_q.weight",
        "self_attn.k_proj.weight" => "attn_k.weight",
        "self_attn.v_proj.weight" => "attn_v.weight",
        "self_attn.o_proj.weight" => "attn_output.weight",
        "mlp.gate_proj.weight" => "ffn_gate.weight",
        "mlp.up_proj.weight" => "ffn_up.weight",
        "mlp.down_proj.weight" => "ffn_down.weight",
        _ => return None,
    })
}

/// Texts that both tokenizers must read alike: words, figures, white space, two scripts, an emoji.
const PROBE: &str = "It's 3.14 and 1,000 more\n\n  indented\tcode(x); naïve 東京 Привет 🦙!  ";

fn same_tokens(ours: &Checkpoint, written: &Checkpoint) -> Result<()> {
    let encode = |c: &Checkpoint| c.tokenizer().encode(PROBE, SpecialTokens::Add);
    anyhow::ensure!(
        encode(ours)? == encode(written)?,
        "the tokenizer in the GGUF file reads text differently from the base's; nothing was kept"
    );
    Ok(())
}

/// Writes the adapter as a GGUF-LoRA file to `out`, which must not exist, for `llama.cpp --lora` over the base: over the
/// very file where that is a GGUF, over its conversion where it is a Hugging Face model.
///
/// # Errors
/// If the base is of a family whose tensors have no names there, the file cannot be written, or its factors do not come
/// back equal; `out` is not there then.
pub fn lora(source: &Source<'_>, out: &Path) -> Result<Comparison> {
    source.check_gguf_lora()?;
    let adapter = source.adapter;
    let alpha = adapter.config().lora_alpha;
    let architecture = match source.checkpoint.gguf() {
        Some(gguf) => gguf.string("general.architecture")?.unwrap_or("llama").to_string(),
        None => {
            metadata::refuse_other_families(source.base.config())?;
            "llama".into()
        }
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
    let (mut table, mut fillings) = (vec![], vec![]);
    for (name, weight) in source.base.weights() {
        let Some(pair) = pair_of(adapter, &name) else { continue };
        let (ggml, order) = place(source, &name, weight)?;
        let (r, inp) = pair.a.dims2()?;
        // llama.cpp multiplies by alpha / r; rsLoRA's other scale goes into B.
        let more = pair.scale * r as f64 / f64::from(alpha as f32);
        let b: Vec<f32> = cpu::view(&pair.b)?.iter().map(|&v| (f64::from(v) * more) as f32).collect();
        for (factor, shape, values) in
            [("a", vec![r, inp], cpu::view(&pair.a)?.to_vec()), ("b", vec![weight.rows(), r], order.store(&b, r))]
        {
            table.push(Entry { name: format!("{ggml}.lora_{factor}"), shape, dtype: StoredType::F32 });
            fillings.push(values);
        }
    }
    staged::staged(out, |path| {
        write(path, &keys, &table, |i| Ok(fillings[i].iter().flat_map(|v| v.to_le_bytes()).collect()))?;
        let read = read_lora(source, path).context("reopening the GGUF-LoRA file")?;
        let comparison = compare((source.base, adapter), (source.base, Some(&read)), source.prompts)?;
        comparison.check(MergedType::F32.tolerance())?;
        Ok(comparison)
    })
}

/// (ggml's name, order of the stored rows) of a matrix of the base.
fn place(source: &Source<'_>, name: &str, weight: &Weight) -> Result<(String, RowOrder)> {
    let Some(gguf) = source.checkpoint.gguf() else { return Ok((llama_name(name)?, stored_order(source, name))) };
    let tensor = gguf.tensors().iter().find(|t| gguf::hf_name(source.base.config(), &t.name).as_deref() == Some(name));
    let tensor = tensor.with_context(|| format!("{name} is no tensor of {}", gguf.name()))?;
    Ok((tensor.name.clone(), weight.row_order()))
}

/// The adapter that a GGUF-LoRA file holds, as llama.cpp would run it: only for the proof.
fn read_lora(source: &Source<'_>, path: &Path) -> Result<Adapter> {
    let file = Gguf::parse(map(path)?, &path.display().to_string())?;
    let alpha = file.float("adapter.lora.alpha")?.context("adapter.lora.alpha is missing")?;
    let shapes = source.base.shapes();
    let mut layers = vec![LayerPairs::default(); shapes.layers];
    let mut targets = vec![];
    for (name, weight) in source.base.weights() {
        let Some((layer, linear)) = source.adapter.shapes().find(&name) else { continue };
        let (ggml, order) = place(source, &name, weight)?;
        let read = |factor: &str| -> Result<Option<Vec<f32>>> {
            let Some(tensor) = file.tensor(&format!("{ggml}.lora_{factor}")) else { return Ok(None) };
            let bytes = file.tensor_bytes(tensor).context("a factor is cut")?;
            let [rows, cols] = tensor.shape[..] else { anyhow::bail!("a factor is no matrix") };
            Ok(Some(Weight::new(bytes, tensor.dtype, rows, cols)?.to_f32()))
        };
        let (Some(a), Some(stored)) = (read("a")?, read("b")?) else { continue };
        let r = a.len() / weight.cols();
        let b = (0..weight.rows()).flat_map(|row| stored[order.stored(row) * r..(order.stored(row) + 1) * r].to_vec());
        let tensor = |values, dims: (usize, usize)| Tensor::from_vec(values, dims, &Device::Cpu);
        let (a, b) = (tensor(a, (r, weight.cols()))?, tensor(b.collect(), (weight.rows(), r))?);
        layers[layer][linear] = Some(LoraPair::new(a, b, alpha / r as f64));
        targets.push(shapes.module_path(layer, linear));
    }
    let config = LoraConfig {
        lora_alpha: alpha,
        use_rslora: false,
        target_modules: TargetModules::List(targets),
        layers_to_transform: None,
        ..source.adapter.config().clone()
    };
    Adapter::from_parts(config, shapes, layers, None, source.adapter.provenance().clone())
}
