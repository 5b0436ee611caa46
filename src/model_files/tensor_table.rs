//! The tensor table of a model: which bytes of which file hold the tensor of a Hugging Face name, and in what form.
//!
//! Weights are memory-mapped and read lazily, so opening a model costs no memory. It does not depend on the tokenizer.
//! Read `contents.rs` for how directories and GGUF files fill the table.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Component, Path};
use std::sync::Arc;

use anyhow::Result;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::invalid;
use crate::model::config::{DecoderConfig, gguf_names};
use crate::ops::weight::{Bytes, RowOrder, StorageDType};

/// One tensor as its file stores it.
pub(crate) struct StoredTensor {
    /// Its bytes, mapped or compiled in.
    pub(crate) bytes: Bytes,
    /// The type of its numbers.
    pub(crate) dtype: StorageDType,
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    /// What must be undone to get Hugging Face's numbers.
    pub(crate) form: StoredForm,
    /// The file that holds it, for error messages.
    pub(crate) file: String,
}

/// How a stored tensor differs from Hugging Face's numbers in (out, in) order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoredForm {
    /// It does not differ.
    Plain,
    /// Its rows are in another order.
    Rows(RowOrder),
    /// The matrix is stored as (in, out): GPT-2 in Hugging Face's own files.
    Transposed,
    /// A norm's weight with 1 added: Gemma in a GGUF file.
    PlusOne,
}

/// All tensors of a model, by Hugging Face name.
#[derive(Default)]
pub(crate) struct TensorTable {
    /// Tensors whose type can be unpacked.
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
    /// Tensors of types that cannot be unpacked: name -> type.
    pub(crate) unread: BTreeMap<String, String>,
}

impl TensorTable {
    /// Adds the tensors of one safetensors file. `index` holds, by file, the tensors that an index promises: all of this file's
    /// must exist, and those of other files are not taken from it.
    pub(crate) fn add_safetensors(
        &mut self,
        bytes: Bytes,
        file: &str,
        index: Option<(&Shards, &BTreeSet<String>)>,
    ) -> Result<()> {
        let (header, metadata) = SafeTensors::read_metadata(bytes.get())
            .map_err(|e| invalid!("{file} is not a whole safetensors file ({e}); fetch it again"))?;
        let infos: HashMap<_, _> = metadata.tensors();
        if let Some(missing) = index.and_then(|(_, here)| here.iter().find(|name| !infos.contains_key(*name))) {
            return Err(invalid!("{file}: the index promises the tensor {missing} here, and it is missing"));
        }
        for (name, info) in infos {
            // A tensor that the index does not list at all is read, as by transformers.
            let is_elsewhere = |(all, here): (&Shards, &BTreeSet<String>)| {
                !here.contains(&name) && all.values().any(|shard| shard.contains(&name))
            };
            if index.is_some_and(is_elsewhere) {
                continue;
            }
            let dtype = match info.dtype {
                Dtype::F32 => StorageDType::F32,
                Dtype::F16 => StorageDType::F16,
                Dtype::BF16 => StorageDType::BF16,
                other => {
                    self.unread.insert(name, format!("{other:?}"));
                    continue;
                }
            };
            let data = 8 + header;
            let (start, end) = info.data_offsets;
            let range = data.checked_add(start).zip(data.checked_add(end)).map(|(start, end)| start..end);
            let bytes = range.and_then(|range| bytes.slice(range));
            let bytes = bytes.ok_or_else(|| invalid!("{file}: tensor {name} lies outside of the file"))?;
            let (shape, file) = (info.shape.clone(), file.to_owned());
            self.tensors.insert(name, StoredTensor { bytes, dtype, shape, form: StoredForm::Plain, file });
        }
        Ok(())
    }

    /// Adapts tensors read from Hugging Face files to the configuration: names without the family's prefix get it, matrices
    /// stored as (in, out) are marked, and a bias that the configuration does not have is refused, since leaving it out
    /// would change the model.
    pub(crate) fn adapt_to(&mut self, config: &DecoderConfig, name: &str) -> Result<()> {
        let names = config.names();
        // In memory, transformers 5 calls every family's output layer `lm_head`, and tools may save that name.
        if !self.tensors.contains_key(names.output)
            && let Some(output) = self.tensors.remove("lm_head.weight")
        {
            self.tensors.insert(names.output.to_string(), output);
        }
        if !self.tensors.contains_key(names.embedding)
            && names.embedding.strip_prefix(names.prefix).is_some_and(|bare| self.tensors.contains_key(bare))
        {
            let bare = std::mem::take(&mut self.tensors);
            let whole = |n: String| if n == names.output { n } else { format!("{}{n}", names.prefix) };
            self.tensors = bare.into_iter().map(|(n, stored)| (whole(n), stored)).collect();
        }
        for (tensor, stored) in &mut self.tensors {
            if config.lies_transposed(tensor) {
                stored.form = StoredForm::Transposed;
            }
            if tensor.ends_with(".bias") && !config.expects_bias(tensor) {
                return Err(invalid!(
                    "{name}: tensor {tensor}: by its configuration, this {} decoder has no bias there",
                    names.model_type
                ));
            }
        }
        Ok(())
    }
}

impl TensorTable {
    /// Ties or unties embedding and lm_head by what the files hold, as transformers does. Where the configuration ties them and
    /// the files hold both, with different numbers, the file's lm_head is used; where they hold the lm_head alone, it is the
    /// embedding too. Returns what differs from the configuration.
    ///
    /// # Errors
    /// If the lm_head is stored in a type that cannot be unpacked.
    pub(crate) fn settle_tie(&mut self, config: &mut DecoderConfig, name: &str) -> Result<Option<String>> {
        let names = config.names();
        if !config.tie_word_embeddings {
            return Ok(None);
        }
        if let Some(dtype) = self.unread.get(names.output) {
            return Err(invalid!("{name}: tensor {} is stored as {dtype}; f32, f16 and bf16 are read", names.output));
        }
        let Some(output) = self.tensors.get(names.output) else { return Ok(None) };
        let Some(embedding) = self.tensors.get(names.embedding) else {
            if let Some(output) = self.tensors.remove(names.output) {
                self.tensors.insert(names.embedding.to_string(), output);
            }
            return Ok(None);
        };
        let same = (output.dtype, &output.shape) == (embedding.dtype, &embedding.shape)
            && output.bytes.get() == embedding.bytes.get();
        [output, embedding].iter().for_each(|table| table.bytes.release());
        if same {
            return Ok(None);
        }
        config.tie_word_embeddings = false;
        Ok(Some(format!(
            "{name}: config.json ties lm_head and embedding, and the file has another {}: the file's is used, as \
             transformers does; set tie_word_embeddings to false there",
            names.output
        )))
    }
}

/// How a GGUF file stores the tensor of this Hugging Face name.
pub(crate) fn gguf_form(config: &DecoderConfig, hf_name: &str) -> StoredForm {
    match gguf_names::row_order(config, hf_name) {
        RowOrder::AsStored if gguf_names::adds_one(config, hf_name) => StoredForm::PlusOne,
        RowOrder::AsStored => StoredForm::Plain,
        order => StoredForm::Rows(order),
    }
}

/// Shard file -> names of its tensors.
pub(crate) type Shards = BTreeMap<String, BTreeSet<String>>;

/// Parses model.safetensors.index.json.
pub(crate) fn shards(index: &str, file: &str) -> Result<Shards> {
    let json: Value = serde_json::from_str(index).map_err(|e| invalid!("{file} is not JSON: {e}"))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.filter(|m| !m.is_empty()).ok_or_else(|| invalid!("{file} has no weight_map"))?;
    let mut shards = Shards::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().ok_or_else(|| invalid!("{file}: {tensor} has no file name"))?;
        let mut parts = Path::new(shard).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || shard.contains(['/', '\\', '\0']) {
            return Err(invalid!("{file}: {tensor} lies in {shard:?}, which is no file name in the model's directory"));
        }
        shards.entry(shard.to_owned()).or_default().insert(tensor.clone());
    }
    Ok(shards)
}

/// Maps a regular file into memory, read-only.
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    let failed = |e: std::io::Error| invalid!("{} cannot be read: {e}", path.display());
    // The path is checked first: opening a pipe would wait for a writer.
    let kind = fs::metadata(path).map_err(failed)?;
    if !kind.is_file() || kind.len() == 0 {
        return Err(invalid!("{} is empty or no regular file", path.display()));
    }
    let file = File::open(path).map_err(failed)?;
    // SAFETY: the mapping is read-only and private to us. Another process that rewrites the file in place could
    // change or cut what we read; every tool that writes models replaces files, and the documentation of `open` says so.
    let mapped = unsafe { Mmap::map(&file) }.map_err(failed)?;
    Ok(Bytes::mapped(Arc::new(mapped)))
}
