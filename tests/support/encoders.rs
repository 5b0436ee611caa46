//! Two encoders, the fast one and the tokenizers crate's, compared on generated texts. data/pipeline.rs runs it over the
//! embedded base's tokenizer, real/fast_encoder.rs over SmolLM2's.

use fourfold::rng::SplitMix64;
use fourfold::tokenizer::{SpecialTokens, Tokenizer};

/// A text of everything on which the two encoders could differ: contractions, all kinds of white space, digits of
/// several scripts, combining marks, emoji, markup of the chat template, words longer than any token, control
/// characters.
fn mixed(rng: &mut SplitMix64, special: &[String]) -> String {
    const PIECES: [&str; 44] = [
        "the",
        " quick",
        " brown",
        "fox",
        "'s",
        "'t",
        "'re",
        "'ll",
        "'LL",
        "'",
        "don't",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u{a0}",
        "\u{3000}",
        "1",
        "42",
        "٣",
        "½",
        "Ⅷ",
        "x²",
        "é",
        "e\u{301}",
        "Zürich",
        "東京都",
        "नमस्ते",
        "🙂",
        "👩‍💻",
        "\u{0}",
        "\u{7f}",
        "\u{200b}",
        "--",
        "...",
        "!?",
        "<|im_start|",
        "_a",
        "http://x.y/z?q=1",
        "\u{feff}",
        "Ω≈ç√",
    ];
    let mut text = String::new();
    for _ in 0..1 + rng.below(25) {
        match rng.below(14) {
            0 if !special.is_empty() => text += &special[rng.below(special.len())],
            1 => text += &"ab".repeat(1 + rng.below(60)),
            2 => text.extend(char::from_u32(rng.below(0x3000) as u32)),
            3 => text.extend(char::from_u32(rng.below(0x11_0000) as u32)),
            4 => text += &" ".repeat(1 + rng.below(12)),
            _ => text += PIECES[rng.below(PIECES.len())],
        }
    }
    text
}

/// Asserts that the fast encoder and the tokenizers crate give the same ids for `rounds` generated texts and for `more`.
pub fn assert_same_ids(tokenizer: &Tokenizer, rounds: usize, more: &[&str]) {
    let special: Vec<String> = (0..tokenizer.vocab_size() as u32)
        .filter_map(|id| tokenizer.token(id))
        .filter(|t| t.starts_with('<'))
        .collect();
    let mut bulk = tokenizer.bulk();
    assert!(bulk.is_fast());
    let mut rng = SplitMix64::new(17);
    let texts = (0..rounds).map(|_| mixed(&mut rng, &special)).chain(more.iter().map(|text| text.to_string()));
    for text in texts {
        let expected = tokenizer.encode(&text, SpecialTokens::None).unwrap();
        assert_eq!(bulk.encode(&text).unwrap(), expected, "{text:?}");
    }
}
