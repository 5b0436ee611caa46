//! Text <-> token ids, with the special tokens and the chat template of a model.
//!
//! The `tokenizers` crate does the work; `byte_bpe` is a faster path with equal ids for tokenising data sets. It does not
//! depend on the model or on GGUF files. Read `chat_template.rs` for how dialogues become text,
//! `model_files/gguf_tokenizer.rs` for GGUF files.

mod byte_bpe;
pub mod chat_template;
mod cuts;
mod generation;
mod jinja;
mod limits;

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use ahash::AHashSet;
use anyhow::Result;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, Encoding, PostProcessorWrapper, Token};

use crate::error::unless_it_panics;
use crate::invalid;
use crate::tokenizer::byte_bpe::{ByteBpe, Marks, WordCache};
use crate::tokenizer::chat_template::{GenerationPrompt, Message, Rendered, TemplateTokens};
pub use crate::tokenizer::cuts::Cut;

/// Whether the tokenizer adds its special tokens (for most, a beginning-of-sequence token) to the ids.
/// A rendered chat template already contains its special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Add those of the tokenizer's post-processor.
    Add,
    /// Add none.
    None,
}

/// The texts of a model's tokenizer files.
#[derive(Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// tokenizer.json.
    pub tokenizer: &'a str,
    /// tokenizer_config.json.
    pub config: Option<&'a str>,
    /// special_tokens_map.json; tokenizer_config.json takes precedence.
    pub special_tokens_map: Option<&'a str>,
    /// chat_template.jinja; it takes precedence over the template in tokenizer_config.json.
    pub chat_template: Option<&'a str>,
}

/// A model's tokenizer.
pub struct Tokenizer {
    /// The crate's tokenizer without its post-processor, whose work `frame` does: some post-processors trim offsets.
    inner: tokenizers::Tokenizer,
    /// The ids that the post-processor puts before a text and behind it.
    frame: (Vec<u32>, Vec<u32>),
    /// Ids of the tokens of `added_tokens`.
    added: AHashSet<u32>,
    bos: Option<(u32, String)>,
    eos: Option<(u32, String)>,
    pad_id: Option<u32>,
    eos_ids: Vec<u32>,
    chat_template: Option<String>,
    /// The chat template for dialogues with tools, if it is another.
    tool_template: Option<String>,
    source: String,
    /// Rows of the embedding matrix: larger ids have no embedding.
    rows: usize,
    /// Hash of all its files.
    hash: [u8; 32],
    /// The fast path, built when the first [`Bulk`] needs it; `None` inside if this tokenizer has none.
    fast: OnceLock<Option<ByteBpe>>,
}

impl Tokenizer {
    /// From the texts of the files; `source` is the model's name in error messages.
    ///
    /// # Errors
    /// If a file cannot be parsed, or names a special token that is not in the vocabulary.
    pub fn from_files(files: TokenizerFiles<'_>, source: &str) -> Result<Self> {
        let limits::Seen { longest, patterns } = limits::seen(files.tokenizer);
        if longest > limits::LONGEST || patterns > limits::PATTERNS {
            return Err(invalid!(
                "{source}/tokenizer.json has a text of {longest} bytes and {patterns} patterns in it, {} and {} are the most: \
                 it is damaged; fetch it again",
                limits::LONGEST,
                limits::PATTERNS
            ));
        }
        // The crate panics on some damaged files.
        let mut inner = unless_it_panics(|| tokenizers::Tokenizer::from_bytes(files.tokenizer.as_bytes()))
            .ok_or_else(|| invalid!("{source}/tokenizer.json cannot be read: it is damaged; fetch it again"))?
            .map_err(|e| invalid!("{source}/tokenizer.json cannot be read: {e}"))?;
        // Some files contain the truncation setting of a training run.
        inner.with_padding(None).with_truncation(None).map_err(|e| invalid!("{source}/tokenizer.json: {e}"))?;
        let frame = unless_it_panics(|| frame_of(&inner)).flatten().ok_or_else(|| damaged(source))?;
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let config = json_object(files.config, source, "tokenizer_config.json")?;
        let map = json_object(files.special_tokens_map, source, "special_tokens_map.json")?;
        let special = |name: &str| -> Result<Option<(u32, String)>> {
            let Some(token) = [&config, &map].into_iter().find_map(|from| token_text(from.get(name)?)) else {
                return Ok(None);
            };
            match inner.token_to_id(token) {
                Some(id) => Ok(Some((id, token.to_owned()))),
                None => Err(invalid!("{source}: the {name} {token:?} is not in the vocabulary of tokenizer.json")),
            }
        };
        let (bos, eos) = (special("bos_token")?, special("eos_token")?);
        Ok(Self {
            eos_ids: eos.iter().map(|(id, _)| *id).collect(),
            pad_id: special("pad_token")?.map(|(id, _)| id),
            chat_template: match files.chat_template {
                Some(template) => Some(template.to_owned()),
                None => config.get("chat_template").and_then(template_text),
            },
            tool_template: match files.chat_template {
                Some(_) => None,
                None => config.get("chat_template").and_then(|listed| named_template(listed, "tool_use")),
            },
            bos,
            eos,
            rows: usize::MAX,
            hash: hash_of(&files),
            fast: OnceLock::new(),
            source: source.to_owned(),
            added: cuts::added_tokens(&inner),
            frame,
            inner,
        })
    }

    /// From a directory with tokenizer.json and, if they exist, the other files of [`TokenizerFiles`].
    ///
    /// # Errors
    /// If there is no tokenizer.json; those of [`Tokenizer::from_files`].
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let source = dir.display().to_string();
        let read = |name: &str| -> Result<Option<String>> {
            match fs::read_to_string(dir.join(name)) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(invalid!("{source}/{name} cannot be read: {e}")),
            }
        };
        let tokenizer = read("tokenizer.json")?.ok_or_else(|| {
            invalid!(
                "{source} has no tokenizer.json; for a model that has tokenizer.model only, save it with transformers: \
                 AutoTokenizer.from_pretrained(..).save_pretrained(..)"
            )
        })?;
        let (config, map) = (read("tokenizer_config.json")?, read("special_tokens_map.json")?);
        let template = read("chat_template.jinja")?;
        let files = TokenizerFiles {
            tokenizer: &tokenizer,
            config: config.as_deref(),
            special_tokens_map: map.as_deref(),
            chat_template: template.as_deref(),
        };
        Self::from_files(files, &source)
    }

    /// The same tokenizer with the model's further end-of-sequence tokens and its number of embeddings.
    #[must_use]
    pub fn for_model(mut self, eos_ids: &[u32], embedding_rows: usize) -> Self {
        self.eos_ids.extend(eos_ids);
        let mut seen = std::collections::HashSet::new();
        self.eos_ids.retain(|id| seen.insert(*id));
        self.rows = embedding_rows;
        self
    }

    /// SHA-256 of all files, the end-of-sequence ids and the number of embeddings: it differs between tokenizers that may
    /// encode a text differently.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(self.hash);
        for number in self.eos_ids.iter().map(|&id| id as usize).chain([self.rows]) {
            hash.update((number as u64).to_le_bytes());
        }
        hash.finalize().into()
    }

    /// Token ids of `text`. Special tokens written out in the text become their ids. In a run of about a million white-space
    /// characters the split pattern exceeds its backtracking limit, and the ids differ from transformers'.
    ///
    /// # Errors
    /// If the tokenizer fails, or returns an id without an embedding.
    pub fn encode(&self, text: &str, special_tokens: SpecialTokens) -> Result<Vec<u32>> {
        let encoding = self.encoding(|| self.inner.encode_fast(text, false))?;
        let (front, back) = match special_tokens {
            SpecialTokens::Add => (&self.frame.0[..], &self.frame.1[..]),
            SpecialTokens::None => Default::default(),
        };
        let ids = [front, encoding.get_ids(), back].concat();
        self.check(&ids)?;
        Ok(ids)
    }

    /// What the crate makes of a text.
    fn encoding(&self, encode: impl FnOnce() -> tokenizers::Result<Encoding>) -> Result<Encoding> {
        let encoding = unless_it_panics(encode).ok_or_else(|| damaged(&self.source))?;
        encoding.map_err(|e| invalid!("{}: a text cannot be tokenised: {e}", self.source))
    }

    /// The ids that the tokenizer puts before a text: for most, none or the beginning-of-sequence token.
    pub fn front(&self) -> &[u32] {
        &self.frame.0
    }

    /// An encoder for many texts: the ids of [`Tokenizer::encode`] with [`SpecialTokens::None`], through the fast path if this
    /// tokenizer has one.
    pub fn bulk(&self) -> Bulk<'_> {
        let fast = self.fast.get_or_init(|| ByteBpe::of(&self.inner)).as_ref();
        Bulk { tokenizer: self, fast, cache: WordCache::default() }
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            return Err(invalid!(
                "{}: the tokenizer returns token {id} ({:?}) and the model has {} embeddings; the tokenizer belongs to \
                 another model, or tokens were added to it after training",
                self.source,
                self.inner.id_to_token(*id).unwrap_or_default(),
                self.rows
            ));
        }
        Ok(())
    }

    /// The text of `ids` without special tokens.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| invalid!("{}: tokens cannot be decoded: {e}", self.source))
    }

    /// The text of `ids` with special tokens.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode_with_special_tokens(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| invalid!("{}: tokens cannot be decoded: {e}", self.source))
    }

    /// A streaming decoder, token by token.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), read: 0, with_special_tokens: false }
    }

    /// The same for a text with its special tokens.
    pub fn stream_with_special_tokens(&self) -> TextStream<'_> {
        TextStream { with_special_tokens: true, ..self.stream() }
    }

    /// Number of tokens, including added ones.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token of this id, as spelled in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of this token, as spelled in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// End-of-sequence tokens of the tokenizer's and the model's configuration.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The tokens that end a response: the end-of-sequence tokens, and the one with which `template` (by default the
    /// tokenizer's own chat template) closes an assistant's turn, if it closes it with none of them. Every stage ends a response
    /// at the first of these tokens: generation stops there, and reward models score there.
    pub fn ends(&self, template: Option<&str>) -> Vec<u32> {
        let mut ends = self.eos_ids.clone();
        ends.extend(template.or(self.chat_template()).and_then(|template| self.closing(template)));
        ends
    }

    /// The special token that a template writes right after an assistant's text, if no end-of-sequence token follows there.
    fn closing(&self, template: &str) -> Option<u32> {
        const TEXT: &str = "qzx";
        let turns = [Message::new("user", "q"), Message::new("assistant", TEXT)];
        let text = self.render(template, &turns, GenerationPrompt::None).ok()?.text;
        let after = text.rsplit_once(TEXT)?.1.trim_start();
        let ends = |id: &u32| self.token(*id).is_some_and(|end| !end.is_empty() && after.contains(&end));
        if self.eos_ids.iter().any(ends) {
            return None;
        }
        let tokens = self.inner.get_added_tokens_decoder();
        let opens = |(_, token): &(u32, AddedToken)| {
            token.special && !token.content.is_empty() && after.starts_with(&token.content)
        };
        tokens.into_iter().filter(opens).max_by_key(|(_, token)| token.content.len()).map(|(id, _)| id)
    }

    /// The end-of-sequence token appended to training data: `eos_token` of the tokenizer's configuration.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|(id, _)| *id).or(self.eos_ids.first().copied())
    }

    /// The beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|(id, _)| *id)
    }

    /// The padding token, for file formats that need one; batches here have no padding.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad_id
    }

    /// The Jinja source of the chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The Jinja source of the chat template for a dialogue: of several, the one named `tool_use` where the record has tools.
    pub fn chat_template_for(&self, messages: &[Message]) -> Option<&str> {
        let with_tools = messages.first().is_some_and(Message::has_tools);
        self.tool_template.as_deref().filter(|_| with_tools).or(self.chat_template())
    }

    /// The tokenizer's algorithm: `BPE`, `Unigram`, `WordPiece` or `WordLevel`.
    pub fn kind(&self) -> &'static str {
        match self.inner.get_model() {
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::Unigram(_) => "Unigram",
            ModelWrapper::WordPiece(_) => "WordPiece",
            ModelWrapper::WordLevel(_) => "WordLevel",
        }
    }

    /// The dialogue's text by the model's own chat template. Encode it with [`SpecialTokens::None`].
    ///
    /// # Errors
    /// Those of [`Tokenizer::render_chat`].
    pub fn apply_chat_template(&self, messages: &[Message], prompt: GenerationPrompt) -> Result<String> {
        Ok(self.render_chat(messages, prompt)?.text)
    }

    /// The dialogue rendered by the model's own chat template with this tokenizer's special tokens.
    ///
    /// # Errors
    /// If the model has no template, or the template has a syntax error or raises an error.
    pub fn render_chat(&self, messages: &[Message], prompt: GenerationPrompt) -> Result<Rendered> {
        let template = self.chat_template_for(messages).ok_or_else(|| {
            invalid!("{}: the tokenizer has no chat template; set a template in the configuration", self.source)
        })?;
        self.render(template, messages, prompt)
    }

    fn render(&self, template: &str, messages: &[Message], prompt: GenerationPrompt) -> Result<Rendered> {
        let [bos, eos] = [&self.bos, &self.eos].map(|token| token.as_ref().map(|(_, text)| text.as_str()));
        chat_template::render_marked(template, messages, prompt, TemplateTokens { bos, eos })
    }
}

/// An encoder with a cache of words, for many texts.
pub struct Bulk<'t> {
    tokenizer: &'t Tokenizer,
    fast: Option<&'t ByteBpe>,
    cache: WordCache,
}

impl Bulk<'_> {
    /// Token ids of `text` without special tokens added.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn encode(&mut self, text: &str) -> Result<Vec<u32>> {
        match self.fast(text, &[])? {
            Some((ids, _)) => Ok(ids),
            None => self.tokenizer.encode(text, SpecialTokens::None),
        }
    }

    /// Token ids of `text` without special tokens added, and where `borders` fall among them: byte positions in `text`, in
    /// ascending order.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn encode_cut(&mut self, text: &str, borders: &[usize]) -> Result<(Vec<u32>, Vec<Cut>)> {
        if let Some(found) = self.fast(text, borders)? {
            return Ok(found);
        }
        let Tokenizer { inner, added, .. } = self.tokenizer;
        let encoding = self.tokenizer.encoding(|| inner.encode(text, false))?;
        let ids = encoding.get_ids().to_vec();
        self.tokenizer.check(&ids)?;
        let cuts = cuts::find(text, &encoding, added, borders);
        Ok((ids, cuts))
    }

    /// The ids and cuts by the fast path; `None` if the crate must encode the text.
    fn fast(&mut self, text: &str, borders: &[usize]) -> Result<Option<(Vec<u32>, Vec<Cut>)>> {
        let Some(fast) = self.fast else { return Ok(None) };
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let mut marks = Marks::at(borders);
        if !fast.encode(&self.tokenizer.inner, text, &mut self.cache, &mut ids, &mut marks)? {
            return Ok(None);
        }
        self.tokenizer.check(&ids)?;
        let cuts = marks.tokens().iter().map(|&token| Cut { token, inside: false }).collect();
        Ok(Some((ids, cuts)))
    }

    /// Whether the tokenizer has the fast path; otherwise every text goes through the `tokenizers` crate.
    pub fn is_fast(&self) -> bool {
        self.fast.is_some()
    }
}

/// A streaming decoder. Bytes of incomplete characters are buffered.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    /// The number of `ids` whose text was returned; they are kept as context for the next.
    read: usize,
    with_special_tokens: bool,
}

/// The most tokens of one character: a character has at most four bytes.
const LONGEST_CHARACTER: usize = 4;

impl TextStream<'_> {
    /// The text that `id` completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let new = self.unread()?;
        // The decoder writes U+FFFD for invalid or incomplete characters.
        if new.is_empty() || (new.ends_with('\u{FFFD}') && self.ids.len() - self.read <= LONGEST_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        Ok(new)
    }

    /// The buffered text at the end of the output.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(self) -> Result<String> {
        self.unread()
    }

    /// The text that has not been returned. It is decoded together with the previous piece, because decoders treat the
    /// beginning of a text specially (SentencePiece drops a space there).
    fn unread(&self) -> Result<String> {
        let decode = |ids: &[u32]| match self.with_special_tokens {
            true => self.tokenizer.decode_with_special_tokens(ids),
            false => self.tokenizer.decode(ids),
        };
        let (before, whole) = (decode(&self.ids[..self.read])?, decode(&self.ids)?);
        Ok(whole.get(before.len()..).unwrap_or_default().to_owned())
    }
}

/// The ids that a tokenizer's post-processor puts before a text and behind it; `None` if it fails.
fn frame_of(tokenizer: &tokenizers::Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    const TEXT: u32 = u32::MAX;
    let stand_in = Encoding::from_tokens(vec![Token::new(TEXT, "a".to_owned(), (0, 1))], 0);
    let framed = tokenizer.post_process(stand_in, None, true).ok()?;
    let mut sides = framed.get_ids().split(|&id| id == TEXT).map(<[u32]>::to_vec);
    Some((sides.next()?, sides.next()?))
}

fn damaged(source: &str) -> anyhow::Error {
    invalid!(
        "{source}: a text cannot be tokenised: tokenizer.json is damaged (it may use a special token that it does not \
         describe); fetch it again"
    )
}

/// SHA-256 of the files' texts.
fn hash_of(files: &TokenizerFiles<'_>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for text in [Some(files.tokenizer), files.config, files.special_tokens_map, files.chat_template] {
        // Lengths first, so that a missing file differs from an empty one and boundaries cannot shift.
        hash.update(text.map_or(u64::MAX, |text| text.len() as u64).to_le_bytes());
        hash.update(text.unwrap_or_default());
    }
    hash.finalize().into()
}

fn json_object(text: Option<&str>, source: &str, name: &str) -> Result<Map<String, Value>> {
    match text.map(serde_json::from_str) {
        None => Ok(Map::new()),
        Some(Ok(Value::Object(map))) => Ok(map),
        Some(Ok(_)) => Err(invalid!("{source}/{name} is not a JSON object")),
        Some(Err(e)) => Err(invalid!("{source}/{name} is not JSON: {e}")),
    }
}

/// A special token's text: a string, or an object with `content`; null is no token.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A chat template: a string, or a list of named ones, of which transformers uses `default`.
fn template_text(value: &Value) -> Option<String> {
    let first = || value.as_array()?.first()?["template"].as_str().map(str::to_owned);
    value.as_str().map(str::to_owned).or_else(|| named_template(value, "default")).or_else(first)
}

/// The chat template of this name in a list of named ones.
fn named_template(listed: &Value, name: &str) -> Option<String> {
    let found = listed.as_array()?.iter().find(|template| template["name"] == name)?;
    found["template"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests;
