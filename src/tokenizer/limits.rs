//! A look at tokenizer.json before the crate opens it. A Unigram piece takes a level and some 800 bytes of a tree for each
//! of its bytes, left by recursion; a pattern is compiled to some 300 KB, a prefix is joined with every token. Knows no more
//! of the file, and leaves its mistakes to the crate.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The longest text of a tokenizer.json, in bytes. Patterns have some hundred, runs of one character as many.
pub(crate) const LONGEST: usize = 4096;

/// The most patterns of a tokenizer.json; models have fewer than ten.
pub(crate) const PATTERNS: usize = 64;

/// SentencePiece's table of normalisations, one long text of base64.
const TABLE: &str = "precompiled_charsmap";

/// What a value holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Seen {
    /// Bytes of the longest text, keys included.
    pub(crate) longest: usize,
    /// Patterns, plain ones included.
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

/// What a tokenizer.json holds; nothing where it is no JSON.
pub(crate) fn seen(tokenizer: &str) -> Seen {
    serde_json::from_str(tokenizer).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_text_and_all_patterns_are_found_wherever_they_stand_but_for_sentencepieces_table() {
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
