//! Fast byte-level BPE (byte-pair encoding): the same ids as the `tokenizers` crate at many times its speed, for GPT-2's
//! kind of tokenizer (GPT-2, SmolLM, the embedded base's).
//!
//! It makes data sets of a million pairs practical: words are split by hand instead of by a backtracking pattern, and most
//! words are whole tokens, found by one look-up. All other tokenizers use the crate. It does not depend on files. Read
//! `tokenizer/mod.rs` next.

use ahash::AHashMap;
use aho_corasick::{AhoCorasick, MatchKind};
use anyhow::Result;
use regex_syntax::hir::{Class, HirKind};
use serde_json::{Value, json};
use tokenizers::{Model, ModelWrapper};

/// The most bytes of a word that is merged and cached here; the crate encodes longer ones.
const LONGEST_WORD: usize = 48;
/// The longest run of white space: above it the crate's pattern may exceed its backtracking limit, with other ids, so the
/// crate encodes such a text.
const LONGEST_SPACE: usize = 4096;
/// The most words of a [`WordCache`].
const CACHED_WORDS: usize = 1 << 16;

/// A vocabulary and its merges, read-only: threads share it, each with its own [`WordCache`].
pub(crate) struct ByteBpe {
    /// Words that are one token.
    words: AHashMap<Box<[u8]>, u32>,
    /// (left, right) -> (rank, joined)
    merges: AHashMap<(u32, u32), (u32, u32)>,
    /// Token of each byte; `None` if the vocabulary lacks it. The crate drops such bytes (SmolLM2 lacks some controls).
    bytes: [Option<u32>; 256],
    /// The character that stands for each byte in the crate's vocabulary.
    characters: [char; 256],
    added: Option<(AhoCorasick, Vec<u32>)>,
    classes: Vec<Kind>,
    digits_apart: bool,
}

/// Cached ids of words of several tokens.
#[derive(Default)]
pub(crate) struct WordCache {
    places: AHashMap<Box<[u8]>, (u32, u32)>,
    ids: Vec<u32>,
    symbols: Vec<u32>,
}

/// Positions in a text whose places among its tokens are looked for while it is encoded.
pub(crate) struct Marks<'b> {
    /// Byte positions, in ascending order.
    borders: &'b [usize],
    /// Number of tokens before each border that was passed.
    tokens: Vec<usize>,
}

impl<'b> Marks<'b> {
    /// Marks at these byte positions, which are in ascending order.
    pub(crate) fn at(borders: &'b [usize]) -> Self {
        Self { borders, tokens: Vec::with_capacity(borders.len()) }
    }

    /// Number of tokens before each border.
    pub(crate) fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// Notes that `tokens` tokens end at byte `at`; returns false if a border lies before it, inside a word.
    fn pass(&mut self, at: usize, tokens: usize) -> bool {
        while self.borders.get(self.tokens.len()) == Some(&at) {
            self.tokens.push(tokens);
        }
        self.borders.get(self.tokens.len()).is_none_or(|&border| border > at)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Other,
    Letter,
    Number,
    Space,
}

/// The class of every character, by the Unicode tables of the crate's patterns.
fn classes() -> Option<Vec<Kind>> {
    let mut kinds = vec![Kind::Other; 0x11_0000];
    for (pattern, kind) in [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)] {
        let parsed = regex_syntax::parse(pattern).ok()?;
        let HirKind::Class(Class::Unicode(class)) = parsed.kind() else { return None };
        for range in class.iter() {
            kinds[range.start() as usize..=range.end() as usize].fill(kind);
        }
    }
    Some(kinds)
}

/// GPT-2's characters for bytes: printable bytes are themselves, the others are U+0100 and following.
fn byte_characters() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        if matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) {
            return char::from(byte as u8);
        }
        next += 1;
        char::from_u32(next - 1).unwrap_or('\0')
    })
}

impl ByteBpe {
    /// The fast path of a tokenizer; `None` if any part of it is not supported here.
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let as_json = |part: serde_json::Result<Value>| part.ok();
        let byte_level = |part: &Value| {
            part["type"] == "ByteLevel" && part["add_prefix_space"] == false && part["use_regex"] != json!(false)
        };
        let before = as_json(serde_json::to_value(tokenizer.get_pre_tokenizer()?))?;
        let digits_apart = match before["pretokenizers"].as_array().map(Vec::as_slice) {
            None if byte_level(&before) => false,
            Some([digits, last]) if *digits == json!({"type": "Digits", "individual_digits": true}) => {
                byte_level(last).then_some(true)?
            }
            _ => return None,
        };
        let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return None };
        let model = as_json(serde_json::to_value(bpe))?;
        let absent = |key: &str| model[key].as_str().is_none_or(str::is_empty);
        let plain = model["dropout"].as_f64().unwrap_or(0.0) == 0.0
            && absent("continuing_subword_prefix")
            && absent("end_of_word_suffix")
            && model["ignore_merges"] != json!(true);
        if !plain || tokenizer.get_normalizer().is_some() {
            return None;
        }
        let characters = byte_characters();
        let back: AHashMap<char, u8> = characters.iter().zip(0..=255).map(|(&c, byte)| (c, byte)).collect();
        let vocabulary = tokenizer.get_model().get_vocab();
        let bytes = characters.map(|character| vocabulary.get(&character.to_string()).copied());
        if bytes.contains(&None) && model["unk_token"].is_string() {
            return None;
        }
        let mut merges = AHashMap::new();
        for (merge, rank) in model["merges"].as_array()?.iter().zip(0..) {
            let (left, right) = (merge[0].as_str()?, merge[1].as_str()?);
            let joined = *vocabulary.get(&format!("{left}{right}"))?;
            merges.insert((*vocabulary.get(left)?, *vocabulary.get(right)?), (rank, joined));
        }
        let mut tokens: Vec<(u32, String)> = vec![];
        let mut normalised = None;
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            let alike = *normalised.get_or_insert(token.normalized) == token.normalized;
            if token.single_word || token.lstrip || token.rstrip || token.content.is_empty() || !alike {
                return None;
            }
            tokens.push((id, token.content));
        }
        let added = match tokens.is_empty() {
            true => None,
            false => {
                let texts = tokens.iter().map(|(_, text)| text);
                let find = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts).ok()?;
                Some((find, tokens.iter().map(|(id, _)| *id).collect()))
            }
        };
        let words = AHashMap::new();
        let mut found = Self { words, merges, bytes, characters, added, classes: classes()?, digits_apart };
        let mut symbols = vec![];
        for (token, &id) in &vocabulary {
            let Some(word) = token.chars().map(|c| back.get(&c).copied()).collect::<Option<Box<[u8]>>>() else {
                continue;
            };
            // Only tokens that merging can produce.
            found.merge(&word, &mut symbols);
            if symbols == [id] {
                found.words.insert(word, id);
            }
        }
        Some(found)
    }

    /// Appends the ids of `text` and finds `marks` among them; returns false if the crate must encode it, also where a
    /// mark lies inside a word.
    pub(crate) fn encode(
        &self,
        crates: &tokenizers::Tokenizer,
        text: &str,
        cache: &mut WordCache,
        ids: &mut Vec<u32>,
        marks: &mut Marks<'_>,
    ) -> Result<bool> {
        let mut at = 0;
        if let Some((find, of)) = &self.added {
            for token in find.find_iter(text) {
                if !self.piece(crates, (at, &text[at..token.start()]), cache, ids, marks)? {
                    return Ok(false);
                }
                if !marks.pass(token.start(), ids.len()) {
                    return Ok(false);
                }
                ids.push(of[token.pattern().as_usize()]);
                at = token.end();
            }
        }
        Ok(self.piece(crates, (at, &text[at..]), cache, ids, marks)? && marks.pass(text.len(), ids.len()))
    }

    fn kind(&self, c: char) -> Kind {
        self.classes[c as usize]
    }

    /// Splits text between added tokens, which begins at a byte of the whole text, at digits and then as GPT-2's pattern does:
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
    fn piece(
        &self,
        crates: &tokenizers::Tokenizer,
        (mut at, mut rest): (usize, &str),
        cache: &mut WordCache,
        ids: &mut Vec<u32>,
        marks: &mut Marks<'_>,
    ) -> Result<bool> {
        while let Some(first) = rest.chars().next() {
            let end = match self.digits_apart {
                true if first.is_numeric() => first.len_utf8(),
                true => rest.find(char::is_numeric).unwrap_or(rest.len()),
                false => rest.len(),
            };
            let mut part = &rest[..end];
            rest = &rest[end..];
            while !part.is_empty() {
                let Some(length) = self.word(part) else { return Ok(false) };
                if !marks.pass(at, ids.len()) {
                    return Ok(false);
                }
                self.ids(crates, &part[..length], cache, ids)?;
                (at, part) = (at + length, &part[length..]);
            }
        }
        Ok(true)
    }

    /// Length of the first word in bytes; `None` for a run of white space above [`LONGEST_SPACE`].
    fn word(&self, part: &str) -> Option<usize> {
        let bytes = part.as_bytes();
        if bytes[0] == b'\'' {
            match bytes.get(1..).unwrap_or_default() {
                [b's' | b't' | b'm' | b'd', ..] => return Some(2),
                [b'r', b'e', ..] | [b'v', b'e', ..] | [b'l', b'l', ..] => return Some(3),
                _ => {}
            }
        }
        let start = usize::from(bytes[0] == b' ');
        let mut after = part[start..].char_indices().map(|(at, c)| (start + at, self.kind(c)));
        let kind = after.next().map_or(Kind::Space, |(_, kind)| kind);
        if kind != Kind::Space {
            return Some(after.find(|(_, other)| *other != kind).map_or(part.len(), |(at, _)| at));
        }
        let (mut last, mut count) = (0, 0);
        for (at, c) in part.char_indices() {
            if self.kind(c) != Kind::Space {
                // The last white-space character belongs to the next word, unless it is the only one.
                return Some(if count == 1 { at } else { last });
            }
            (last, count) = (at, count + 1);
            if count > LONGEST_SPACE {
                return None;
            }
        }
        Some(part.len())
    }

    /// Appends the ids of one word.
    fn ids(&self, crates: &tokenizers::Tokenizer, word: &str, cache: &mut WordCache, ids: &mut Vec<u32>) -> Result<()> {
        let word = word.as_bytes();
        if let Some(&id) = self.words.get(word) {
            ids.push(id);
        } else if let Some(&(from, to)) = cache.places.get(word) {
            ids.extend_from_slice(&cache.ids[from as usize..to as usize]);
        } else if word.len() > LONGEST_WORD {
            let text: String = word.iter().map(|&byte| self.characters[usize::from(byte)]).collect();
            let tokens =
                crates.get_model().tokenize(&text).map_err(|e| crate::invalid!("a text cannot be tokenised: {e}"))?;
            ids.extend(tokens.iter().map(|token| token.id));
        } else {
            let mut symbols = std::mem::take(&mut cache.symbols);
            self.merge(word, &mut symbols);
            ids.extend_from_slice(&symbols);
            if cache.places.len() < CACHED_WORDS {
                let from = cache.ids.len() as u32;
                cache.ids.extend_from_slice(&symbols);
                cache.places.insert(word.into(), (from, cache.ids.len() as u32));
            }
            cache.symbols = symbols;
        }
        Ok(())
    }

    /// BPE: merges the neighbouring pair of the lowest rank, leftmost first, until no pair can be merged.
    fn merge(&self, word: &[u8], symbols: &mut Vec<u32>) {
        symbols.clear();
        symbols.extend(word.iter().filter_map(|&byte| self.bytes[usize::from(byte)]));
        loop {
            let pairs = symbols.windows(2).enumerate();
            let joined = pairs.filter_map(|(at, pair)| Some((*self.merges.get(&(pair[0], pair[1]))?, at)));
            let Some(((_, id), at)) = joined.min_by_key(|((rank, _), at)| (*rank, *at)) else { return };
            symbols[at] = id;
            symbols.remove(at + 1);
        }
    }
}
