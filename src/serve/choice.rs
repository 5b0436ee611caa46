//! The tokens of one response -> its text, piece by piece: no piece ends inside a character, and no piece holds the beginning of a
//! stop string that may still be completed. It does not depend on HTTP or on the engine. Read `tokenizer/mod.rs` for the decoder
//! and `reply.rs` beside it for what becomes of a piece.

use anyhow::Result;

use super::request::Text;
use crate::model::generate::FinishReason;
use crate::tokenizer::{TextStream, Tokenizer};

/// A token of a response.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub id: u32,
    /// Its log-probability, nats.
    pub logprob: f32,
    /// The most likely tokens and their log-probabilities.
    pub top: Vec<(u32, f32)>,
}

/// Why a response ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    /// `max_tokens` were sampled.
    Length,
    /// At an end-of-sequence token.
    Eos,
    /// At a token of `stop_token_ids`.
    StopToken(u32),
    /// At a string of `stop`.
    StopText(String),
}

/// What came of some tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    pub tokens: Vec<Token>,
    pub end: Option<End>,
}

impl Piece {
    /// Adds a later piece.
    pub fn add(&mut self, later: Self) {
        self.text += &later.text;
        self.tokens.extend(later.tokens);
        self.end = later.end.or(self.end.take());
    }
}

/// A response on its way to text.
pub(super) struct Choice<'t> {
    stream: Option<TextStream<'t>>,
    rules: &'t Text,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: Option<End>,
}

impl<'t> Choice<'t> {
    pub fn new(tokenizer: &'t Tokenizer, rules: &'t Text) -> Self {
        let stream = match rules.skip_special_tokens {
            true => tokenizer.stream(),
            false => tokenizer.stream_with_special_tokens(),
        };
        Self { stream: Some(stream), rules, held: String::new(), stopped: None }
    }

    /// The piece that a token completes. A token that ends the response has no text, unless `include_stop_str_in_output` asks
    /// for it.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn token(&mut self, token: Token) -> Result<Piece> {
        let id = token.id;
        let ends = self.rules.ends.contains(&id) || self.rules.stop_token_ids.contains(&id);
        let mut piece = Piece { tokens: vec![token], ..Piece::default() };
        if ends {
            // As in vLLM, the model's own end has no further reason.
            self.stopped = Some(match self.rules.ends.contains(&id) {
                true => End::Eos,
                false => End::StopToken(id),
            });
        }
        if !ends || self.rules.include_stop {
            let new = match &mut self.stream {
                Some(stream) => stream.push(id)?,
                None => String::new(),
            };
            self.text(&new, &mut piece);
        }
        Ok(piece)
    }

    /// The last piece, after the last token.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(&mut self, reason: FinishReason) -> Result<Piece> {
        let mut piece = Piece::default();
        let rest = self.stream.take().map_or(Ok(String::new()), TextStream::finish)?;
        self.text(&rest, &mut piece);
        if piece.end.is_none() {
            piece.text += &std::mem::take(&mut self.held);
            piece.end = Some(match (reason, self.stopped.take()) {
                (FinishReason::Stop, Some(end)) => end,
                (FinishReason::Stop, None) => End::Eos,
                (FinishReason::Length, _) => End::Length,
            });
        }
        Ok(piece)
    }

    /// Adds decoded text to the piece, up to the first stop string or to what may begin one.
    fn text(&mut self, new: &str, piece: &mut Piece) {
        self.held += new;
        let found = self.rules.stop.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        // Of those that begin together the longest is what was meant.
        if let Some((at, stop)) = found.min_by_key(|(at, stop)| (*at, usize::MAX - stop.len())) {
            let end = if self.rules.include_stop { at + stop.len() } else { at };
            piece.text += &self.held[..end];
            piece.end = Some(End::StopText(stop.clone()));
            self.held.clear();
            return;
        }
        let begun = |stop: &String| {
            let lengths = (1..stop.len()).filter(|&n| stop.is_char_boundary(n));
            lengths.filter(|&n| self.held.ends_with(&stop[..n])).max()
        };
        let keep = self.rules.stop.iter().filter_map(begun).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        piece.text += &std::mem::replace(&mut self.held, held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::run::embedded;
    use crate::tokenizer::SpecialTokens;

    /// The pieces of a text's tokens.
    fn pieces(text: &str, rules: &Text, reason: FinishReason) -> Vec<Piece> {
        let files = embedded().unwrap();
        let tokenizer = files.tokenizer();
        let mut choice = Choice::new(tokenizer, rules);
        let mut pieces = vec![];
        for id in tokenizer.encode(text, SpecialTokens::None).unwrap() {
            pieces.push(choice.token(Token { id, logprob: 0.0, top: vec![] }).unwrap());
            if pieces.last().unwrap().end.is_some() {
                return pieces;
            }
        }
        pieces.push(choice.finish(reason).unwrap());
        pieces
    }

    fn whole(pieces: &[Piece]) -> String {
        pieces.iter().map(|piece| piece.text.as_str()).collect()
    }

    #[test]
    fn no_piece_ends_inside_a_character() {
        let text = "naïve 你好 🦀🦀 e\u{301}";
        let pieces = pieces(text, &Text::default(), FinishReason::Length);
        assert_eq!(whole(&pieces), text);
        assert!(pieces.iter().all(|piece| !piece.text.contains('\u{FFFD}')), "{pieces:?}");
        assert!(pieces.len() > text.chars().count() / 2, "several pieces");
        assert_eq!(pieces.last().unwrap().end, Some(End::Length));
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it_and_its_beginning_is_held_back() {
        let rules = |stop: &[&str], include_stop| Text {
            stop: stop.iter().map(|&s| s.into()).collect(),
            include_stop,
            ..Text::default()
        };
        let found = pieces(
            "The soup was good. The room was cold.",
            &rules(&["was cold", " good. The ro"], false),
            FinishReason::Length,
        );
        assert_eq!(whole(&found), "The soup was");
        assert_eq!(found.last().unwrap().end, Some(End::StopText(" good. The ro".into())));
        let found = pieces("The soup was good.", &rules(&["goo", "good"], true), FinishReason::Length);
        assert!(["The soup was goo", "The soup was good"].contains(&whole(&found).as_str()));
        let found = pieces("The soup was good.", &rules(&["good. And", "bad"], false), FinishReason::Length);
        assert_eq!(whole(&found), "The soup was good.", "a beginning that is not completed is text");
        assert_eq!(found.last().unwrap().end, Some(End::Length));
        // What is sent before the end never holds a part of the stop string.
        let mut sent = String::new();
        for piece in pieces("one two three", &rules(&["two three four"], false), FinishReason::Length) {
            assert!(piece.end.is_some() || !format!("{sent}{}", piece.text).contains('w'), "{sent}");
            sent += &piece.text;
        }
        assert_eq!(sent, "one two three");
    }

    #[test]
    fn a_token_that_ends_the_response_has_no_text() {
        let files = embedded().unwrap();
        let tokenizer = files.tokenizer();
        let eos = tokenizer.eos_id().unwrap();
        for (rules, text, end) in [
            (Text { ends: vec![eos], skip_special_tokens: false, ..Text::default() }, "", End::Eos),
            (Text { stop_token_ids: vec![eos], ..Text::default() }, "", End::StopToken(eos)),
            (
                Text { ends: vec![eos], skip_special_tokens: false, include_stop: true, ..Text::default() },
                &*tokenizer.token(eos).unwrap(),
                End::Eos,
            ),
        ] {
            let mut choice = Choice::new(tokenizer, &rules);
            let mut piece = choice.token(Token { id: eos, logprob: 0.0, top: vec![] }).unwrap();
            piece.add(choice.finish(FinishReason::Stop).unwrap());
            assert_eq!((piece.text.as_str(), piece.end, piece.tokens.len()), (text, Some(end), 1));
        }
    }
}
