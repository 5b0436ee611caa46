//! All of a model's files but its tokenizer: configuration and tensor table, from a Hugging Face directory or a GGUF file.
//!
//! Inspecting and planning need no tokenizer, so they open this instead of [`super::ModelFiles`]. It does not depend on
//! a base (`model::base`). Read `tensor_table.rs` for how tensors are found, `files.rs` for the whole model.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;
use sha2::{Digest, Sha256};

use crate::invalid;
use crate::model::config::{DecoderConfig, gguf_names};
use crate::model_files::gguf::Gguf;
use crate::model_files::resolve::{Resolved, SIDE_FILES, resolve};
use crate::model_files::tensor_table::{StoredForm, StoredTensor, TensorTable, gguf_form, map, shards};
use crate::model_files::{convert, gguf_config, gguf_tokenizer};
use crate::ops::weight::{StorageDType, Weight};
use crate::tokenizer::{Tokenizer, TokenizerFiles};

/// Configuration and tensors of a model, without its tokenizer.
pub(crate) struct FileContents {
    /// Configuration of the decoder.
    pub(crate) config: DecoderConfig,
    /// All tensors, by Hugging Face name.
    pub(crate) table: TensorTable,
    /// The files that contain the weights.
    pub(crate) files: Vec<PathBuf>,
    /// What was opened.
    pub(crate) origin: FileOrigin,
    /// What error messages call the model.
    pub(crate) name: String,
    /// `owner/name`, where the model came from the hub.
    pub(crate) id: Option<String>,
    /// What was decided against the configuration, or is unsure, when the files were opened.
    pub(crate) notes: Vec<String>,
}

/// What a model was opened from.
pub(crate) enum FileOrigin {
    /// A Hugging Face directory.
    Directory(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf, Box<Gguf>),
    /// Texts compiled into the program: (file name, text).
    Embedded(Vec<(&'static str, String)>),
}

impl FileContents {
    /// Opens a directory, a `.gguf` file or a model of the hub.
    ///
    /// # Errors
    /// If a file is missing, cut off or damaged, or the model is of a kind that is not supported.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let Resolved { path, id } = resolve(path)?;
        Ok(Self { id, ..Self::open_path(&path)? })
    }

    fn open_path(path: &Path) -> Result<Self> {
        let name = path.display();
        let kind = fs::metadata(path).map_err(|e| {
            invalid!("the model {name} cannot be opened: {e}; give a Hugging Face directory or a .gguf file")
        })?;
        if kind.is_dir() {
            return Self::open_directory(path);
        }
        let ends_in = |ending: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending));
        let is_beside =
            SIDE_FILES.iter().any(|file| path.ends_with(file)) && path.with_file_name(SIDE_FILES[0]).is_file();
        if ends_in("safetensors") || is_beside {
            return Err(invalid!("{name} is one file of a model; give the directory that it lies in"));
        }
        // A file that is called otherwise may still be one.
        let begins = || {
            let mut first = [0; 4];
            fs::File::open(path).and_then(|mut file| file.read_exact(&mut first)).is_ok_and(|()| first == *b"GGUF")
        };
        if !ends_in("gguf") && !begins() {
            let (what, alone) = match ends_in("json") {
                true => ("a JSON file, ", " (`plan --base` alone takes a configuration without weights)"),
                false => ("", ""),
            };
            return Err(invalid!("{name} is {what}no model; give a Hugging Face directory or a .gguf file{alone}"));
        }
        Self::of_gguf(path, Gguf::open(path)?)
    }

    /// Of the opened GGUF file at `path`.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub(crate) fn of_gguf(path: &Path, gguf: Gguf) -> Result<Self> {
        let name = path.display().to_string();
        let config = gguf_config::decoder_config(&gguf)?;
        let mut table = TensorTable::default();
        for tensor in gguf.tensors() {
            if ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"].contains(&&*tensor.name) {
                continue; // part of the configuration
            }
            // Ignoring an unknown tensor would change the model (experts, for one, have names of their own).
            let hf_name = gguf_names::hf_name(&config, &tensor.name).ok_or_else(|| {
                invalid!("{name}: the tensor {} is none of a {} decoder's", tensor.name, config.names().model_type)
            })?;
            let bytes = gguf.tensor_bytes(tensor).ok_or_else(|| invalid!("{name}: tensor {} is cut", tensor.name))?;
            let form = gguf_form(&config, &hf_name);
            let file = gguf.files().get(tensor.part).map_or_else(|| name.clone(), |file| file.display().to_string());
            let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
            table.tensors.insert(hf_name, StoredTensor { bytes, dtype, shape, form, file });
        }
        let (files, notes) = (gguf.files().to_vec(), gguf_tokenizer::doubts(&gguf).into_iter().collect());
        let origin = FileOrigin::Gguf(path.to_owned(), Box::new(gguf));
        Ok(Self { config, table, files, origin, name, id: None, notes })
    }

    fn open_directory(dir: &Path) -> Result<Self> {
        let name = dir.display().to_string();
        let text = |file: &str| -> Result<Option<String>> {
            match fs::read_to_string(dir.join(file)) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(invalid!("{name}/{file} cannot be read: {e}")),
            }
        };
        let config = text("config.json")?.ok_or_else(|| {
            invalid!(
                "{name} has no config.json; give a Hugging Face model directory, or the path of a .gguf file itself"
            )
        })?;
        let mut config = DecoderConfig::from_hf(&config, text("generation_config.json")?.as_deref(), &name)?;
        let mut table = TensorTable::default();
        let mut files = Vec::new();
        if let Some(index) = text("model.safetensors.index.json")? {
            let shards = shards(&index, &format!("{name}/model.safetensors.index.json"))?;
            for (shard, here) in &shards {
                let path = dir.join(shard);
                table.add_safetensors(map(&path)?, &path.display().to_string(), Some((&shards, here)))?;
                files.push(path);
            }
        } else {
            let path = dir.join("model.safetensors");
            if !path.exists() {
                let bin =
                    ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().find(|f| dir.join(f).exists());
                let hint = bin.map(|bin| convert::model(dir, bin)).unwrap_or_default();
                return Err(invalid!("{name} has neither model.safetensors nor model.safetensors.index.json{hint}"));
            }
            table.add_safetensors(map(&path)?, &path.display().to_string(), None)?;
            files.push(path);
        }
        table.adapt_to(&config, &name)?;
        let notes = table.settle_tie(&mut config, &name)?.into_iter().collect();
        Ok(Self { config, table, files, origin: FileOrigin::Directory(dir.to_owned()), name, id: None, notes })
    }

    /// Reads the tokenizer.
    ///
    /// # Errors
    /// If the model has none, or it cannot be read.
    pub(crate) fn read_tokenizer(&self) -> Result<Tokenizer> {
        match &self.origin {
            FileOrigin::Directory(dir) => Tokenizer::from_dir(dir),
            FileOrigin::Gguf(_, gguf) => gguf_tokenizer::tokenizer(gguf),
            FileOrigin::Embedded(files) => {
                let text = |name: &str| files.iter().find(|(n, _)| *n == name).map(|(_, text)| text.as_str());
                let files = TokenizerFiles {
                    tokenizer: text("tokenizer.json").unwrap_or_default(),
                    config: text("tokenizer_config.json"),
                    ..TokenizerFiles::default()
                };
                Tokenizer::from_files(files, &self.name)
            }
        }
    }

    /// Name of the model in error messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the weights are in mapped files; otherwise they are compiled in.
    pub(crate) fn is_mapped(&self) -> bool {
        !self.files.is_empty()
    }

    /// All tensors: (Hugging Face name, shape, type).
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], StorageDType)> {
        self.table.tensors.iter().map(|(name, stored)| (name.as_str(), stored.shape.as_slice(), stored.dtype))
    }

    /// The stored tensor of this Hugging Face name.
    ///
    /// # Errors
    /// If it is missing, of another shape, or of a type that cannot be unpacked.
    pub(crate) fn stored(&self, hf_name: &str, shape: &[usize]) -> Result<&StoredTensor> {
        let Some(stored) = self.table.tensors.get(hf_name) else {
            if let Some(dtype) = self.table.unread.get(hf_name) {
                return Err(invalid!(
                    "{}: tensor {hf_name} is stored as {dtype}; f32, f16 and bf16 are read",
                    self.name
                ));
            }
            return Err(invalid!("{}: the tensor {hf_name} is missing", self.name));
        };
        if stored.shape != shape {
            return Err(invalid!(
                "{}: tensor {hf_name} has shape {:?}, and the configuration asks for {shape:?}",
                stored.file,
                stored.shape
            ));
        }
        Ok(stored)
    }

    /// The (rows, cols) matrix of this Hugging Face name, as stored.
    ///
    /// # Errors
    /// Those of [`FileContents::stored`]; if its rows are not whole heads where that matters.
    pub(crate) fn weight(&self, hf_name: &str, rows: usize, cols: usize) -> Result<Weight> {
        if self.table.tensors.get(hf_name).is_some_and(|s| s.form == StoredForm::Transposed) {
            let stored = self.stored(hf_name, &[cols, rows])?;
            return Weight::new(stored.bytes.clone(), stored.dtype, cols, rows)?.transposed();
        }
        let stored = self.stored(hf_name, &[rows, cols])?;
        let weight = Weight::new(stored.bytes.clone(), stored.dtype, rows, cols)?;
        let StoredForm::Rows(order) = stored.form else { return Ok(weight) };
        let head_dim = self.config.head_dim;
        if !rows.is_multiple_of(head_dim) {
            return Err(invalid!("{}: tensor {hf_name} has {rows} rows, not whole heads of {head_dim}", stored.file));
        }
        Ok(weight.with_row_order(order))
    }

    /// See [`super::ModelFiles::fingerprint`].
    pub(crate) fn fingerprint(&self) -> String {
        const WHOLE: usize = 64 << 10;
        const WINDOW: usize = 4 << 10;
        const WINDOWS: usize = WHOLE / WINDOW;
        let mut hash = Sha256::new();
        for (name, stored) in &self.table.tensors {
            let bytes = stored.bytes.get();
            // Lengths first, so that different names and shapes cannot give the same bytes.
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update(stored.dtype.name());
            hash.update((stored.shape.len() as u64).to_le_bytes());
            for &dim in &stored.shape {
                hash.update((dim as u64).to_le_bytes());
            }
            if bytes.len() <= WHOLE {
                hash.update(bytes);
                continue;
            }
            for i in 0..WINDOWS {
                let start = (bytes.len() - WINDOW) / (WINDOWS - 1) * i;
                hash.update(&bytes[start..start + WINDOW]);
            }
            // The system maps sixteen pages per page read, so half of a quantised base would stay in memory without this.
            stored.bytes.release();
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
