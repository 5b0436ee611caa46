//! Limits on an untrusted tokenizer.json, checked before the `tokenizers` crate parses it. Readers of the code may skip this.
//!
//! The crate builds a tree level of about 800 bytes for each byte of a Unigram piece and frees it recursively; it compiles a
//! pattern to about 300 KB and prepends a prefix to every token. Other errors in the file are left to the crate. It does not
//! depend on any other file of the program.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The longest string of a tokenizer.json, in bytes. Patterns, and tokens of one repeated character, have about a hundred.
pub(crate) const LONGEST: usize = 4096;

/// The most patterns of a tokenizer.json; models have fewer than ten.
pub(crate) const PATTERNS: usize = 64;

/// Key of SentencePiece's normalisation table, one long string of base64, which is not limited.
const TABLE: &str = "precompiled_charsmap";

/// Sizes found in a JSON value.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Seen {
    /// Bytes of the longest string, including keys.
    pub(crate) longest: usize,
    /// Number of patterns: regular expressions and plain strings.
    pub(crate) patterns: usize,
}

impl Seen {
    fn and(self, other: Self) -> Self {
        Self { longest: self.longest.max(other.longest), patterns: self.patterns + other.patterns }
    }
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Look;
        impl<'de> Visitor<'de> for Look {
            type Value = Seen;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_bool<E: Error>(self, _: bool) -> Result<Seen, E> {
                Ok(Seen::default())
            }
            fn visit_i64<E: Error>(self, _: i64) -> Result<Seen, E> {
                Ok(Seen::default())
            }
            fn visit_u64<E: Error>(self, _: u64) -> Result<Seen, E> {
                Ok(Seen::default())
            }
            fn visit_f64<E: Error>(self, _: f64) -> Result<Seen, E> {
                Ok(Seen::default())
            }
            fn visit_unit<E: Error>(self) -> Result<Seen, E> {
                Ok(Seen::default())
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Seen, E> {
                Ok(Seen { longest: text.len(), patterns: 0 })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Seen, A::Error> {
                let mut all = Seen::default();
                while let Some(item) = list.next_element()? {
                    all = all.and(item);
                }
                Ok(all)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Seen, A::Error> {
                let mut all = Seen::default();
                while let Some(Text(key)) = map.next_key()? {
                    let own = Seen { longest: key.len(), patterns: usize::from(key == "Regex" || key == "String") };
                    let value = match &*key {
                        TABLE => map.next_value::<IgnoredAny>().map(|_| Seen::default())?,
                        _ => map.next_value()?,
                    };
                    all = all.and(own).and(value);
                }
                Ok(all)
            }
        }
        from.deserialize_any(Look)
    }
}

/// Sizes found in a tokenizer.json; zeros if it is not JSON.
pub(crate) fn seen(tokenizer: &str) -> Seen {
    serde_json::from_str(tokenizer).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_string_and_patterns_are_found_anywhere_except_in_sentencepieces_table() {
        let of = |text| (seen(text).longest, seen(text).patterns);
        assert_eq!(
            of("{\"model\": {\"vocab\": [[\"\\u0416\\u0416\\u0416b\", -2.5], [\"\", 0]], \"x\": null}}"),
            (7, 0)
        );
        assert_eq!(
            of("[{\"a\": {\"Regex\": \"0123456789\"}}, {\"b\": [true, 1, -1, 0.5]}, {\"String\": \"a\"}]"),
            (10, 2)
        );
        assert_eq!(of("{\"0123456789abcdefghijklmnop\": 0, \"a\": \"b\"}"), (26, 0));
        assert_eq!(of("{\"precompiled_charsmap\": \"0123456789abcdefghijklmnopqrstuvwxyz\"}"), (TABLE.len(), 0));
        assert_eq!((of("[]"), of("null"), of("{")), ((0, 0), (0, 0), (0, 0)));
    }
}
