//! Text of a model or a file, made safe for a terminal: no character of it is an instruction to the terminal, and those that
//! one would not see are shown. It does not depend on what is shown.

use textwrap::{Options, WordSplitter, wrap};

use crate::page::html::picture;

/// Characters that print nothing and reorder, hide or break what stands around them. The joiners U+200C and U+200D belong to
/// words and emoji and stay.
fn is_hidden(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}'
    )
}

/// Text in lines, with every other control character and every hidden one as its picture or number.
pub(super) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push(c),
            c if c.is_control() || is_hidden(c) => picture(c, &mut out),
            c => out.push(c),
        }
    }
    out
}

/// The same in one line: line breaks are pictures, too.
pub(crate) fn in_a_line(text: &str) -> String {
    visible(text).replace('\n', "\u{240a}")
}

/// Text in lines of at most `width` columns. A word with a hyphen stays whole: it may be an option.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let how = Options::new(width.max(1)).word_splitter(WordSplitter::NoHyphenation);
    wrap(text, how).into_iter().map(|line| line.into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_stay_whole_and_wide_characters_count_as_two_columns() {
        assert_eq!(wrapped("fourfold ppo run.toml --resume", 25), ["fourfold ppo run.toml", "--resume"]);
        assert_eq!(wrapped("漢字漢字\nab", 4), ["漢字", "漢字", "ab"]);
        assert_eq!(wrapped("x".repeat(9).as_str(), 4), ["xxxx", "xxxx", "x"]);
    }

    #[test]
    fn what_steers_a_terminal_or_hides_is_shown_and_the_rest_stays() {
        let cases = [
            ("a\u{1b}[2J\u{7}\r\n\tb", "a␛[2J␇␍\n␉b"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m␡"),
            ("\u{202e}evil\u{2066}\u{feff}", "\\u{202e}evil\\u{2066}\\u{feff}"),
            ("مرحبا 👩\u{200d}💻 é", "مرحبا 👩\u{200d}💻 é"),
        ];
        for (text, shown) in cases {
            assert_eq!(visible(text), shown);
        }
        assert_eq!(in_a_line("a\nb\u{0}"), "a␊b␀");
        for c in (0..0x3000).filter_map(char::from_u32).filter(|c| *c != '\n') {
            assert!(!visible(&c.to_string()).contains(char::is_control), "{:x}", u32::from(c));
        }
    }
}
