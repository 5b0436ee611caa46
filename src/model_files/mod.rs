//! A base model's files -> frozen weights under Hugging Face's names, the configuration and the tokenizer.
//! A Hugging Face directory, a GGUF file, or bytes that are compiled in. Knows no layer. Read ops/weight.rs for what
//! a weight can do, gguf.rs for the container.

pub mod gguf;
pub mod gguf_tokenizer;
#[cfg(feature = "hub")]
pub mod hub;
pub mod inspect;
pub mod peft;
pub mod resolve;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::invalid;
use crate::model::config::DecoderConfig;
use crate::model_files::gguf::Gguf;
use crate::model_files::resolve::{Resolved, resolve};
use crate::ops::weight::{Bytes, RowOrder, StorageDType, Weight};
use crate::tokenizer::{Tokenizer, TokenizerFiles};

/// An opened base model. Tensors stay where they are mapped until a layer reads them.
pub struct ModelFiles {
    contents: FileContents,
    tokenizer: Tokenizer,
    quantise: Option<StorageDType>,
}

/// All of a checkpoint but its tokenizer, which a look at a model can do without.
pub(crate) struct FileContents {
    pub(crate) config: DecoderConfig,
    tensors: BTreeMap<String, Stored>,
    /// Tensors of types that hold no weights of a decoder: name -> type.
    unread: BTreeMap<String, String>,
    pub(crate) files: Vec<PathBuf>,
    pub(crate) origin: FileOrigin,
    name: String,
    /// `owner/name`, where it came from the hub.
    id: Option<String>,
}

pub(crate) enum FileOrigin {
    Directory(PathBuf),
    Gguf(PathBuf, Box<Gguf>),
    Embedded(Vec<(&'static str, String)>),
}

struct Stored {
    bytes: Bytes,
    dtype: StorageDType,
    shape: Vec<usize>,
    form: Form,
    file: String,
}

/// What stands between a stored tensor and Hugging Face's numbers in (out, in) order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Nothing.
    Plain,
    /// Rows in another order.
    Rows(RowOrder),
    /// The matrix lies as (in, out): GPT-2 in Hugging Face's own files.
    Transposed,
    /// A norm's weight with 1 added already: Gemma in a GGUF.
    PlusOne,
}

/// Files that belong to a model beside its weights, in the order they are listed.
pub(crate) const SIDE_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
];

impl ModelFiles {
    /// Opens a Hugging Face directory (config.json, model.safetensors or model.safetensors.index.json with its
    /// shards, tokenizer.json) or a `.gguf` file; or a model of the hub by its id, see [`locate`]. Weights are memory-mapped: the files must not change while in use.
    ///
    /// # Errors
    /// If a file is missing, cut off or damaged, or the model is of a kind that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let contents = FileContents::open(path)?;
        let tokenizer = contents.read_tokenizer()?;
        Ok(Self::joined(contents, tokenizer))
    }

    /// A model that is compiled into the program: the texts of its four JSON files and one safetensors file.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn from_embedded(
        config: &str,
        generation_config: &str,
        tokenizer: &str,
        tokenizer_config: &str,
        weights: &'static [u8],
    ) -> Result<Self> {
        let name = "the embedded model";
        let mut tensors = Tensors::default();
        tensors.add_safetensors(Bytes::new(Arc::new(weights)), name, None)?;
        let side = [
            ("config.json", config),
            ("generation_config.json", generation_config),
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", tokenizer_config),
        ];
        let config_read = DecoderConfig::from_hf(config, Some(generation_config), name)?;
        tensors.settle(&config_read, name)?;
        let contents = FileContents {
            config: config_read,
            tensors: tensors.read,
            unread: tensors.unread,
            files: Vec::new(),
            origin: FileOrigin::Embedded(side.map(|(file, text)| (file, text.to_owned())).to_vec()),
            name: name.to_owned(),
            id: None,
        };
        let tokenizer = contents.read_tokenizer()?;
        Ok(Self::joined(contents, tokenizer))
    }

    fn joined(contents: FileContents, tokenizer: Tokenizer) -> Self {
        let tokenizer = tokenizer.for_model(&contents.config.eos_token_ids, contents.config.vocab_size);
        Self { contents, tokenizer, quantise: None }
    }

    /// Has [`ModelFiles::weight`] hand dense matrices out as `dtype`, each made as it is asked for, so that the dense
    /// model never lies in memory. The tables of the vocabulary become q8_0, since logits and embeddings suffer most;
    /// what is quantised already, and rows that no block fits, stay as they are stored.
    #[must_use]
    pub fn quantised(mut self, dtype: Option<StorageDType>) -> Self {
        self.quantise = dtype;
        self
    }

    /// All but the tokenizer.
    pub(crate) fn contents(&self) -> &FileContents {
        &self.contents
    }

    /// The decoder's shape.
    pub fn config(&self) -> &DecoderConfig {
        &self.contents.config
    }

    /// The tokenizer; its ends of text include the configuration's.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What the model is called on the hub, where it was opened by that name.
    pub fn id(&self) -> Option<&str> {
        self.contents.id.as_deref()
    }

    /// What was opened; `None` for an embedded model.
    pub fn path(&self) -> Option<&Path> {
        match &self.contents.origin {
            FileOrigin::Directory(path) | FileOrigin::Gguf(path, _) => Some(path),
            FileOrigin::Embedded(_) => None,
        }
    }

    /// The container, where the model is a GGUF file.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.contents.origin {
            FileOrigin::Gguf(_, gguf) => Some(gguf),
            FileOrigin::Directory(_) | FileOrigin::Embedded(_) => None,
        }
    }

    /// The files that hold the weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.contents.files
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub fn has(&self, hf_name: &str) -> bool {
        self.contents.tensors.contains_key(hf_name)
    }

    /// The (rows, cols) matrix of this Hugging Face name, as stored. q and k of a GGUF come in Hugging Face's row
    /// order.
    ///
    /// # Errors
    /// If it is missing, of another shape, or of a type that cannot be unpacked.
    pub fn weight(&self, hf_name: &str, rows: usize, cols: usize) -> Result<Weight> {
        let weight = self.contents.weight(hf_name, rows, cols)?;
        let Some(wanted) = self.quantise.filter(|_| weight.dtype().is_dense()) else { return Ok(weight) };
        let wanted = if rows == self.config().vocab_size { StorageDType::Q8_0 } else { wanted };
        match wanted.for_width(cols) {
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
            Form::Rows(order) => {
                // One number a row, if the type's blocks allow it: vectors are stored dense.
                Weight::new(stored.bytes.clone(), stored.dtype, len, 1)?.with_row_order(order).to_f32()
            }
            form => {
                let mut values = Weight::new(stored.bytes.clone(), stored.dtype, 1, len)?.to_f32();
                if form == Form::PlusOne {
                    values.iter_mut().for_each(|v| *v -= 1.0);
                }
                values
            }
        })
    }

    /// All tensors by name: (Hugging Face name, shape, type).
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], StorageDType)> {
        self.contents.tensors()
    }

    /// Which weights these are: 64 hex digits, equal for equal tensors wherever the files lie. An identity and no
    /// integrity check: of a tensor above 64 KiB, sixteen windows of 4 KiB are read.
    pub fn fingerprint(&self) -> String {
        self.contents.fingerprint()
    }

    /// (file name, bytes) of what goes beside the weights of a Hugging Face model: the configuration and the
    /// tokenizer. A directory's own files; for a GGUF, their equivalents made from its metadata.
    ///
    /// # Errors
    /// If a file has gone since, or the GGUF's configuration cannot be written as a config.json.
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

impl FileContents {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let Resolved { path, id } = resolve(path)?;
        Ok(Self { id, ..Self::open_located(&path)? })
    }

    fn open_located(path: &Path) -> Result<Self> {
        let name = path.display();
        let kind = fs::metadata(path).map_err(|e| {
            invalid!("the model {name} cannot be opened: {e}; give a Hugging Face directory or a .gguf file")
        })?;
        if kind.is_dir() {
            return Self::open_directory(path);
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
            return Err(invalid!("{name} is one file of a model; give the directory that it lies in"));
        }
        Self::open_gguf(path)
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let gguf = Gguf::parse(map(path)?, &name)?;
        let config = DecoderConfig::from_gguf(&gguf)?;
        let mut tensors = BTreeMap::new();
        for tensor in gguf.tensors() {
            if ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"].contains(&&*tensor.name) {
                continue; // in the configuration
            }
            // Leaving one out would be another model: experts come under names of their own.
            let hf_name = gguf::hf_name(&config, &tensor.name).ok_or_else(|| {
                invalid!("{name}: the tensor {} is none of a {} decoder's", tensor.name, config.names().model_type)
            })?;
            let bytes = gguf.tensor_bytes(tensor).ok_or_else(|| invalid!("{name}: tensor {} is cut", tensor.name))?;
            let form = gguf_form(&config, &hf_name);
            let (dtype, shape, file) = (tensor.dtype, tensor.shape.clone(), name.clone());
            tensors.insert(hf_name, Stored { bytes, dtype, shape, form, file });
        }
        let (files, unread) = (vec![path.to_owned()], BTreeMap::new());
        Ok(Self {
            config,
            tensors,
            unread,
            files,
            origin: FileOrigin::Gguf(path.to_owned(), Box::new(gguf)),
            name,
            id: None,
        })
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
        let config = DecoderConfig::from_hf(&config, text("generation_config.json")?.as_deref(), &name)?;
        let mut tensors = Tensors::default();
        let mut files = Vec::new();
        if let Some(index) = text("model.safetensors.index.json")? {
            for (shard, wanted) in shards(&index, &format!("{name}/model.safetensors.index.json"))? {
                let path = dir.join(&shard);
                tensors.add_safetensors(map(&path)?, &path.display().to_string(), Some(&wanted))?;
                files.push(path);
            }
        } else {
            let path = dir.join("model.safetensors");
            if !path.exists() {
                let hint = if dir.join("pytorch_model.bin").exists() {
                    "; it has a pytorch_model.bin, which is not read: save the model again with safe_serialization=True"
                } else {
                    ""
                };
                return Err(invalid!("{name} has neither model.safetensors nor model.safetensors.index.json{hint}"));
            }
            tensors.add_safetensors(map(&path)?, &path.display().to_string(), None)?;
            files.push(path);
        }
        tensors.settle(&config, &name)?;
        let Tensors { read, unread } = tensors;
        Ok(Self { config, tensors: read, unread, files, origin: FileOrigin::Directory(dir.to_owned()), name, id: None })
    }

    pub(crate) fn read_tokenizer(&self) -> Result<Tokenizer> {
        match &self.origin {
            FileOrigin::Directory(dir) => Tokenizer::from_dir(dir),
            FileOrigin::Gguf(_, gguf) => Tokenizer::from_gguf(gguf),
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

    /// What was opened, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the weights lie in mapped files: they are compiled in otherwise.
    pub(crate) fn is_mapped(&self) -> bool {
        !self.files.is_empty()
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], StorageDType)> {
        self.tensors.iter().map(|(name, stored)| (name.as_str(), stored.shape.as_slice(), stored.dtype))
    }

    fn stored(&self, hf_name: &str, shape: &[usize]) -> Result<&Stored> {
        let Some(stored) = self.tensors.get(hf_name) else {
            if let Some(dtype) = self.unread.get(hf_name) {
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

    fn weight(&self, hf_name: &str, rows: usize, cols: usize) -> Result<Weight> {
        if self.tensors.get(hf_name).is_some_and(|s| s.form == Form::Transposed) {
            let stored = self.stored(hf_name, &[cols, rows])?;
            return Weight::new(stored.bytes.clone(), stored.dtype, cols, rows)?.transposed();
        }
        let stored = self.stored(hf_name, &[rows, cols])?;
        let weight = Weight::new(stored.bytes.clone(), stored.dtype, rows, cols)?;
        let Form::Rows(order) = stored.form else { return Ok(weight) };
        let head_dim = self.config.head_dim;
        if !rows.is_multiple_of(head_dim) {
            return Err(invalid!("{}: tensor {hf_name} has {rows} rows, not whole heads of {head_dim}", stored.file));
        }
        Ok(weight.with_row_order(order))
    }

    pub(crate) fn fingerprint(&self) -> String {
        const WHOLE: usize = 64 << 10;
        const WINDOW: usize = 4 << 10;
        const WINDOWS: usize = WHOLE / WINDOW;
        let mut hash = Sha256::new();
        for (name, stored) in &self.tensors {
            let bytes = stored.bytes.get();
            // Length first, so that no two lists of names and shapes spell the same bytes.
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
            // The system maps sixteen pages for one that is read: half of a base that was quantised would stay in memory.
            stored.bytes.release();
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[derive(Default)]
struct Tensors {
    read: BTreeMap<String, Stored>,
    unread: BTreeMap<String, String>,
}

impl Tensors {
    /// Adds one safetensors file's tensors: those in `wanted`, all of which must be there, or every one.
    fn add_safetensors(&mut self, bytes: Bytes, file: &str, wanted: Option<&BTreeSet<String>>) -> Result<()> {
        let (header, metadata) = SafeTensors::read_metadata(bytes.get())
            .map_err(|e| invalid!("{file} is not a whole safetensors file ({e}); fetch it again"))?;
        let infos: HashMap<_, _> = metadata.tensors();
        if let Some(missing) = wanted.and_then(|w| w.iter().find(|name| !infos.contains_key(*name))) {
            return Err(invalid!("{file}: the index promises the tensor {missing} here, and it is missing"));
        }
        for (name, info) in infos {
            if wanted.is_some_and(|w| !w.contains(&name)) {
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
            self.read.insert(name, Stored { bytes, dtype, shape, form: Form::Plain, file });
        }
        Ok(())
    }
}

impl Tensors {
    /// Names without the family's prefix get it, matrices that lie as (in, out) are marked, and a bias that the
    /// configuration knows nothing of is refused: leaving it out would be another model.
    fn settle(&mut self, config: &DecoderConfig, name: &str) -> Result<()> {
        let names = config.names();
        // transformers 5 has one name for every family's output table in memory, and tools may save what they see.
        if !self.read.contains_key(names.output)
            && let Some(output) = self.read.remove("lm_head.weight")
        {
            self.read.insert(names.output.to_string(), output);
        }
        if !self.read.contains_key(names.embedding)
            && names.embedding.strip_prefix(names.prefix).is_some_and(|bare| self.read.contains_key(bare))
        {
            let bare = std::mem::take(&mut self.read);
            let whole = |n: String| if n == names.output { n } else { format!("{}{n}", names.prefix) };
            self.read = bare.into_iter().map(|(n, stored)| (whole(n), stored)).collect();
        }
        for (tensor, stored) in &mut self.read {
            if config.lies_transposed(tensor) {
                stored.form = Form::Transposed;
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

/// How a GGUF file keeps the tensor of this name.
fn gguf_form(config: &DecoderConfig, hf_name: &str) -> Form {
    match gguf::row_order(config, hf_name) {
        RowOrder::AsStored if gguf::adds_one(config, hf_name) => Form::PlusOne,
        RowOrder::AsStored => Form::Plain,
        order => Form::Rows(order),
    }
}

/// model.safetensors.index.json -> for every shard the tensors it holds.
fn shards(index: &str, file: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let json: Value = serde_json::from_str(index).map_err(|e| invalid!("{file} is not JSON: {e}"))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.filter(|m| !m.is_empty()).ok_or_else(|| invalid!("{file} has no weight_map"))?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
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
    // Asked by path first: opening a pipe would wait for a writer.
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

#[cfg(test)]
pub(crate) mod tests;
