//! A look at a Unigram vocabulary before the crate builds its tree of it: a level and some 800 bytes for each byte of a
//! piece, left by recursion. Knows nothing else of tokenizer.json, and leaves its mistakes to the crate.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The longest piece of a vocabulary, in bytes. Runs of one character are the longest that models have, some hundred.
pub(super) const LONGEST: usize = 1024;

#[derive(Deserialize)]
struct File {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    vocab: Vocab,
}

/// Bytes of the longest piece, where the vocabulary is a list of pieces with their scores; of a map 0.
struct Vocab(usize);

#[derive(Deserialize)]
struct Piece<'a>(#[serde(borrow)] Cow<'a, str>, #[allow(dead_code)] IgnoredAny);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Longest;
        impl<'de> Visitor<'de> for Longest {
            type Value = Vocab;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Vocab(0))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vocab, A::Error> {
                let mut longest = 0;
                while let Some(Piece(piece, _)) = list.next_element()? {
                    longest = longest.max(piece.len());
                }
                Ok(Vocab(longest))
            }
        }
        from.deserialize_any(Longest)
    }
}

/// Bytes of the longest piece of a Unigram vocabulary; 0 where there is none to be found.
pub(super) fn longest(tokenizer: &str) -> usize {
    serde_json::from_str(tokenizer).map_or(0, |file: File| file.model.vocab.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_piece_of_a_list_is_found_and_maps_have_none() {
        let of = |vocab: &str| {
            longest(&format!("{{\"version\": \"1.0\", \"model\": {{\"vocab\": {vocab}, \"unk_id\": 0}}}}"))
        };
        assert_eq!(of("[[\"a\", -1], [\"\\u0416\\u0416b\", -2.5], [\"\", 0]]"), 5);
        assert_eq!((of("{\"abc\": 0}"), of("[]"), of("[1]"), of("null"), longest("{")), (0, 0, 0, 0, 0));
    }
}
