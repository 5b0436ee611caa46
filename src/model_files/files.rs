//! An opened base model: frozen weights under Hugging Face's names, the configuration and the tokenizer.
//!
//! The source is a Hugging Face directory, a GGUF file, or bytes compiled into the program. It does not depend on
//! the base (`model::base`) that is built from it. Read `contents.rs` for how files are opened, `load.rs` for how weights become a
//! base.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::invalid;
use crate::model::config::DecoderConfig;
use crate::model_files::contents::{FileContents, FileOrigin};
use crate::model_files::gguf::Gguf;
use crate::model_files::gguf_tokenizer;
use crate::model_files::resolve::SIDE_FILES;
use crate::model_files::tensor_table::{StoredForm, TensorTable};
use crate::ops::weight::{Bytes, StorageDType, Weight};
use crate::tokenizer::Tokenizer;

/// An opened base model. Its tensors stay memory-mapped until they are used.
pub struct ModelFiles {
    contents: FileContents,
    tokenizer: Tokenizer,
    /// Type that dense matrices are quantised to as they are read.
    quantise: Option<StorageDType>,
    /// Whether that is left to the upload to a device.
    on_the_way: bool,
}

impl ModelFiles {
    /// Opens a Hugging Face directory (config.json, model.safetensors or model.safetensors.index.json with its
    /// shards, tokenizer.json), a `.gguf` file, or a model of the hub by its id, see
    /// [`super::resolve::resolve`]. Weights are memory-mapped: the files must not change while they are in use.
    ///
    /// # Errors
    /// If a file is missing, cut off or damaged, or the model is of a kind that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let contents = FileContents::open(path)?;
        let tokenizer = contents.read_tokenizer()?;
        Ok(Self::joined(contents, tokenizer))
    }

    /// A model compiled into the program: the texts of its four JSON files, and one safetensors file.
    ///
    /// # Errors
    /// Those of [`ModelFiles::open`].
    pub fn from_embedded(
        config: &str,
        generation_config: &str,
        tokenizer: &str,
        tokenizer_config: &str,
        weights: &'static [u8],
    ) -> Result<Self> {
        let name = "the embedded model";
        let mut table = TensorTable::default();
        table.add_safetensors(Bytes::new(Arc::new(weights)), name, None)?;
        let side = [
            ("config.json", config),
            ("generation_config.json", generation_config),
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", tokenizer_config),
        ];
        let mut config_read = DecoderConfig::from_hf(config, Some(generation_config), name)?;
        table.adapt_to(&config_read, name)?;
        let notes = table.settle_tie(&mut config_read, name)?.into_iter().collect();
        let contents = FileContents {
            config: config_read,
            table,
            files: Vec::new(),
            origin: FileOrigin::Embedded(side.map(|(file, text)| (file, text.to_owned())).to_vec()),
            name: name.to_owned(),
            id: None,
            notes,
        };
        let tokenizer = contents.read_tokenizer()?;
        Ok(Self::joined(contents, tokenizer))
    }

    /// A model from its contents and tokenizer.
    fn joined(contents: FileContents, tokenizer: Tokenizer) -> Self {
        let tokenizer = tokenizer.for_model(&contents.config.eos_token_ids, contents.config.vocab_size);
        Self { contents, tokenizer, quantise: None, on_the_way: false }
    }

    /// Makes [`ModelFiles::weight`] quantise dense matrices to `dtype`, one at a time as they are read, so that the dense model
    /// is never in memory as a whole. Embedding and lm_head become q8_0, since they lose most by quantisation. Matrices that
    /// are already quantised, or whose rows are no multiple of a block, stay as stored.
    #[must_use]
    pub fn quantised(mut self, dtype: Option<StorageDType>) -> Self {
        self.quantise = dtype;
        self
    }

    /// Makes [`ModelFiles::weight`] leave quantisation to the upload to a device, so that the host holds no quantised matrix.
    #[must_use]
    pub fn for_device(mut self, device: bool) -> Self {
        self.on_the_way = device;
        self
    }

    /// Whether [`ModelFiles::weight`] quantises.
    pub(super) fn is_quantising(&self) -> bool {
        self.quantise.is_some() && !self.on_the_way
    }

    /// The configuration and tensors, without the tokenizer.
    pub(crate) fn contents(&self) -> &FileContents {
        &self.contents
    }

    /// Configuration of the decoder.
    pub fn config(&self) -> &DecoderConfig {
        &self.contents.config
    }

    /// The tokenizer; its end-of-sequence tokens include the configuration's.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The model's id on the hub, if it was opened by that id.
    pub fn id(&self) -> Option<&str> {
        self.contents.id.as_deref()
    }

    /// The opened path; `None` for an embedded model.
    pub fn path(&self) -> Option<&Path> {
        match &self.contents.origin {
            FileOrigin::Directory(path) | FileOrigin::Gguf(path, _) => Some(path),
            FileOrigin::Embedded(_) => None,
        }
    }

    /// The GGUF container, if the model is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.contents.origin {
            FileOrigin::Gguf(_, gguf) => Some(gguf),
            FileOrigin::Directory(_) | FileOrigin::Embedded(_) => None,
        }
    }

    /// The files that contain the weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.contents.files
    }

    /// Whether the model has a tensor of this Hugging Face name.
    pub fn has(&self, hf_name: &str) -> bool {
        self.contents.table.tensors.contains_key(hf_name)
    }

    /// The (rows, cols) matrix of this Hugging Face name, as stored, with rows in Hugging Face's order.
    ///
    /// # Errors
    /// If it is missing, of another shape, or of a type that cannot be unpacked.
    pub fn weight(&self, hf_name: &str, rows: usize, cols: usize) -> Result<Weight> {
        let weight = self.contents.weight(hf_name, rows, cols)?;
        let Some(wanted) = self.quantise.filter(|_| weight.dtype().is_dense()) else { return Ok(weight) };
        let wanted = if rows == self.config().vocab_size { StorageDType::Q8_0 } else { wanted };
        match wanted.for_width(cols) {
            Some(dtype) if self.on_the_way => weight.quantised_on_the_way(dtype),
            Some(dtype) => weight.quantised(dtype).with_context(|| format!("quantising {hf_name}")),
            None => Ok(weight),
        }
    }

    /// The vector of this Hugging Face name as f32, (len).
    ///
    /// # Errors
    /// If it is missing, of another shape, or of a type that cannot be unpacked.
    pub fn vector(&self, hf_name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.contents.stored(hf_name, &[len])?;
        Ok(match stored.form {
            StoredForm::Rows(order) => {
                // One number per row, which works for dense types: vectors are stored dense.
                Weight::new(stored.bytes.clone(), stored.dtype, len, 1)?.with_row_order(order).to_f32()
            }
            form => {
                let mut values = Weight::new(stored.bytes.clone(), stored.dtype, 1, len)?.to_f32();
                if form == StoredForm::PlusOne {
                    values.iter_mut().for_each(|v| *v -= 1.0);
                }
                values
            }
        })
    }

    /// What a user should know about the files: what was decided against their configuration, and what of them is not read.
    ///
    /// # Errors
    /// If a tensor that the decoder needs is missing or of another shape.
    pub fn remarks(&self) -> Result<Vec<String>> {
        self.contents.remarks()
    }

    /// All tensors, by name: (Hugging Face name, shape, type).
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], StorageDType)> {
        self.contents.tensors()
    }

    /// Digest of the weights: 64 hex digits, equal for equal tensors whatever the files are called. It identifies a model and is
    /// not an integrity check: of a tensor above 64 KiB, sixteen windows of 4 KiB are hashed.
    pub fn fingerprint(&self) -> String {
        self.contents.fingerprint()
    }

    /// (file name, bytes) of the configuration and tokenizer files of a Hugging Face model: a directory's own files, or their
    /// equivalents made from the metadata of a GGUF file.
    ///
    /// # Errors
    /// If a file was removed meanwhile, or the GGUF file's configuration cannot be expressed as a config.json.
    pub fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        match &self.contents.origin {
            FileOrigin::Embedded(files) => {
                Ok(files.iter().map(|(n, t)| ((*n).to_owned(), t.clone().into_bytes())).collect())
            }
            FileOrigin::Gguf(_, gguf) => {
                let tokenizer = gguf_tokenizer::rebuild(gguf)?;
                Ok(vec![
                    ("config.json".into(), self.config().to_hf_json()?.into_bytes()),
                    ("tokenizer.json".into(), tokenizer.tokenizer.into_bytes()),
                    ("tokenizer_config.json".into(), tokenizer.config.into_bytes()),
                ])
            }
            FileOrigin::Directory(dir) => SIDE_FILES
                .iter()
                .filter(|name| dir.join(name).is_file())
                .map(|name| {
                    let path = dir.join(name);
                    let bytes = fs::read(&path).map_err(|e| invalid!("{} cannot be read: {e}", path.display()))?;
                    Ok(((*name).to_owned(), bytes))
                })
                .collect(),
        }
    }
}
