//! Prompt, response and dialogue -> one text by the run's template, and which parts of it are the assistant's ([`Layout`]).
//!
//! The parts become the loss mask. This file does not depend on `files` or `formats`. Read `data/examples/sequence.rs`
//! next.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result, bail};

use crate::config::{Compat, Data, MultiTurn, Template};
use crate::data::examples::encoder::TextEncoder;
use crate::data::record::Text;
use crate::tokenizer::chat_template::{Message, Rendered, unread};

/// A whole sequence's text, and what of it is learnt. It ends with the last response; the end token that the text does not
/// hold follows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Ids before the text's own.
    pub front: Vec<u32>,
    /// The text.
    pub text: String,
    /// Byte ranges of the text that are learnt, in order.
    pub learnt: Vec<Range<usize>>,
    /// Byte ranges of the assistant's turns that are never learnt, because their weight is 0; in order.
    pub skipped: Vec<Range<usize>>,
    /// Whether a learnt range holds several turns, each with its end token.
    pub several: bool,
    /// Whether the text before the first range is the prompt of a record, which generation encodes alone.
    pub prompted: bool,
    /// What is to be counted and reported of it.
    pub remarks: BTreeSet<&'static str>,
}

impl Layout {
    fn new(front: &[u32], text: String) -> Self {
        Self { front: front.to_vec(), text, ..Self::default() }
    }
}

/// The remark on a dialogue of which `multi_turn = "last"` learns the last response.
const ONLY_LAST: &str =
    "learnt in their last response only, since the chat template rewrites earlier turns (multi_turn = \"last\")";
/// The remark on a dialogue of which `multi_turn = "each"` makes a sequence for each response.
const ONE_EACH: &str =
    "made one sequence for each response, since the chat template rewrites earlier turns (multi_turn = \"each\")";
/// The remark on a response that does not follow the generation prompt.
const OTHER_OPENING: &str = "whose response begins otherwise than the chat template's generation prompt ends";
/// The remark on a response whose question is not in the text.
const NO_QUESTION: &str = "whose last user turn is not in the text that the chat template writes";
/// The remark on a dialogue whose end token the chat template does not mark as the assistant's.
const END_OUTSIDE: &str = "whose end token is outside of the chat template's {% generation %} block, so that it is not learnt and \
                           generation may not stop";
/// The reason for refusing a conversation that has nothing to learn.
const NO_TURN: &str = "the conversation has no assistant turn to train on";

/// Renders texts and dialogues by the run's template.
pub(crate) struct Renderer<'e> {
    encoder: &'e dyn TextEncoder,
    template: Template,
    /// The chat template from the config, used instead of the tokenizer's.
    chat_template: Option<&'e str>,
    /// Whether verbatim texts become turns too: the config names a template.
    turns_from_texts: bool,
    multi_turn: MultiTurn,
    /// The tokens that end a response, each with its text.
    ends: Vec<(u32, String)>,
}

impl<'e> Renderer<'e> {
    /// The renderer for `[data]`.
    ///
    /// # Errors
    /// `template = "chat"` with a tokenizer that has no chat template.
    pub(crate) fn new(encoder: &'e dyn TextEncoder, data: &'e Data) -> Result<Self> {
        let chat_template = data.chat_template.as_deref();
        let has_chat = chat_template.is_some() || encoder.has_chat_template();
        if data.template == Some(Template::Chat) && !has_chat {
            return Err(crate::invalid!(
                "[data] template = \"chat\": the tokenizer has no chat template; write one in chat_template, or use \
                 \"human_assistant\", \"hh_rlhf\" or \"plain\""
            ));
        }
        let default = match data.compat {
            Some(Compat::Dschat) => Template::HumanAssistant,
            None if has_chat => Template::Chat,
            None => Template::Plain,
        };
        let turns_from_texts =
            matches!(data.template, Some(Template::Chat | Template::HumanAssistant | Template::HhRlhf));
        let (template, multi_turn) = (data.template.unwrap_or(default), data.multi_turn.unwrap_or_default());
        let ends = encoder.ends(chat_template.filter(|_| template == Template::Chat));
        Ok(Self { encoder, template, chat_template, turns_from_texts, multi_turn, ends })
    }

    /// The text of all turns of a dialogue.
    pub(crate) fn whole(&self, messages: &[Message]) -> Result<String> {
        self.dialogue(messages, false)
    }

    /// The text of a dialogue; with `open`, up to where the assistant's next turn begins.
    fn dialogue(&self, messages: &[Message], open: bool) -> Result<String> {
        Ok(self.render(messages, open)?.text)
    }

    /// As [`Self::dialogue`], with what the chat template marks as the assistant's.
    fn render(&self, messages: &[Message], open: bool) -> Result<Rendered> {
        let mut text = String::new();
        if self.template != Template::Chat && messages.iter().any(Message::is_only_calls) {
            bail!("a turn holds tool_calls and no text, which only a chat template can write; use template = \"chat\"");
        }
        match self.template {
            Template::Chat => {
                let rendered = match self.chat_template {
                    Some(template) => self.encoder.chat_with(template, messages, open),
                    None => self.encoder.chat(messages, open),
                };
                let first = messages.iter().find(|message| message.role != "system");
                return match first.is_some_and(|message| message.role == "assistant") {
                    true => rendered.context(
                        "the dialogue starts with an assistant turn, which its chat template does not accept; put a user turn \
                         before it, or use template = \"human_assistant\" or \"plain\"",
                    ),
                    false => rendered,
                };
            }
            Template::HumanAssistant | Template::HhRlhf => {
                let before = if self.template == Template::HhRlhf { "\n\n" } else { " " };
                for Message { role, content, .. } in messages {
                    match role.as_str() {
                        "assistant" => text += &format!("{before}Assistant: "),
                        "user" => text += &format!("{before}Human: "),
                        "system" => {}
                        other => bail!("the templates \"human_assistant\" and \"hh_rlhf\" have no {other} turns"),
                    }
                    text.push_str(content);
                }
                if open {
                    text += &format!("{before}Assistant:");
                }
            }
            Template::Plain => {
                let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
                text = contents.join("\n");
                if open {
                    text.push('\n');
                }
            }
        }
        Ok(Rendered { text, generated: vec![] })
    }

    /// The ids to put before a text: what the tokenizer puts there, unless a chat template renders it.
    pub(crate) fn front(&self, text: &Text) -> &[u32] {
        match text {
            Text::Verbatim(_) if !self.turns_from_texts => self.encoder.front(),
            _ => self.front_of_turns(),
        }
    }

    /// The ids to put before rendered turns: a chat template writes its own beginning.
    fn front_of_turns(&self) -> &[u32] {
        if self.template == Template::Chat { &[] } else { self.encoder.front() }
    }

    /// A remark for each thing that a dialogue gives beside roles and texts, and the template does not read.
    pub(crate) fn unread(&self, text: &Text, reads_weights: bool) -> Vec<String> {
        let Text::Dialogue(turns) = text else { return vec![] };
        let source = match self.template {
            Template::Chat => self.chat_template.or(self.encoder.chat_template_for(turns)),
            Template::HumanAssistant | Template::HhRlhf | Template::Plain => None,
        };
        let remark = |what| format!("with {what} that the template does not read");
        unread(source, turns, reads_weights).into_iter().map(remark).collect()
    }

    /// The text of a prompt, up to where the response follows.
    pub(crate) fn prompt(&self, prompt: &Text) -> Result<String> {
        match prompt {
            Text::Dialogue(turns) => self.dialogue(turns, true),
            Text::Verbatim(text) if self.turns_from_texts => {
                self.dialogue(&[Message::new("user", text.as_str())], true)
            }
            Text::Verbatim(text) => Ok(text.clone()),
        }
    }

    /// A prompt and its response, of which everything after the prompt is learnt.
    ///
    /// # Errors
    /// A text beside a dialogue; a response without an assistant turn; those of the template.
    pub(crate) fn pair(&self, prompt: &Text, response: &Text) -> Result<Layout> {
        let Some((turns, from)) = self.joined_turns(prompt, response)? else {
            return self.joined_texts(prompt, response);
        };
        let turns = self.without_written_ends(&turns)?;
        let (first, last) = (spoken(&turns, from).next(), spoken(&turns, from).next_back());
        let (Some(first), Some(last)) = (first, last) else { bail!(NO_TURN) };
        let mut layout = Layout::new(self.front(prompt), self.whole(&turns[..=last])?);
        let start = self.start(&layout.text, &turns, first, &mut layout.remarks)?;
        layout.learnt.push(start..self.end(&mut layout.text, start));
        layout.several = first < last;
        layout.prompted = true;
        self.check_written(&mut layout, &turns[..=last])?;
        Ok(layout)
    }

    /// A prompt and its response, of which the assistant's turns are learnt; several where `multi_turn = "each"` asks for it.
    ///
    /// # Errors
    /// Those of [`Self::pair`] and [`Self::conversation`].
    pub(crate) fn response(&self, prompt: &Text, response: &Text) -> Result<Vec<Layout>> {
        match self.joined_turns(prompt, response)? {
            Some((turns, from)) => {
                let mut layouts = self.conversation(&turns, from)?;
                layouts.iter_mut().for_each(|layout| layout.prompted = true);
                Ok(layouts)
            }
            None => Ok(vec![self.joined_texts(prompt, response)?]),
        }
    }

    /// The turns of prompt and response, and where the response's begin; None where both are texts that stay texts.
    ///
    /// # Errors
    /// A text beside a dialogue.
    pub(crate) fn joined_turns(&self, prompt: &Text, response: &Text) -> Result<Option<(Vec<Message>, usize)>> {
        Ok(match (prompt, response) {
            (Text::Dialogue(turns), Text::Dialogue(more)) => Some(([&turns[..], more].concat(), turns.len())),
            (Text::Verbatim(prompt), Text::Verbatim(response)) if self.turns_from_texts => {
                Some((vec![Message::new("user", prompt.as_str()), Message::new("assistant", response.as_str())], 1))
            }
            (Text::Verbatim(_), Text::Verbatim(_)) => None,
            _ => bail!("prompt and response must both be texts or both be dialogues"),
        })
    }

    /// Two texts as one, of which the second is learnt.
    fn joined_texts(&self, prompt: &Text, response: &Text) -> Result<Layout> {
        let (Text::Verbatim(before), Text::Verbatim(response)) = (prompt, response) else {
            bail!("prompt and response must both be texts or both be dialogues")
        };
        let mut layout = Layout::new(self.front(prompt), format!("{before}{response}"));
        let end = self.ended(response).map_or(response.len(), <str>::len);
        layout.text.truncate(before.len() + end);
        layout.learnt.push(before.len()..layout.text.len());
        layout.prompted = true;
        Ok(layout)
    }

    /// A conversation up to its last assistant turn, of which every assistant turn from index `from` on is learnt.
    ///
    /// The template's `{% generation %}` blocks say what the assistant's text is. Without them a turn reaches from the
    /// generation prompt of the turns before it to where the rendering up to it ends. Where the template renders a turn
    /// differently once more turns follow, no part of the whole is what the model would have written there, and
    /// `multi_turn` decides.
    ///
    /// # Errors
    /// There is no assistant turn; the template rejects the turns; `multi_turn = "error"`.
    pub(crate) fn conversation(&self, turns: &[Message], from: usize) -> Result<Vec<Layout>> {
        let turns = self.without_written_ends(turns)?;
        let Some(last) = targets(&turns, from).next_back() else { bail!(NO_TURN) };
        let turns = &turns[..=last];
        let rendered = self.render(turns, false)?;
        let marked = marked(&rendered, turns, from);
        let mut layout = Layout::new(self.front_of_turns(), rendered.text);
        if let Some([marked, skipped]) = marked {
            let end = self.end(&mut layout.text, marked.last().map_or(0, |range| range.start));
            layout.learnt = marked.into_iter().map(|range| range.start..range.end.min(end)).collect();
            layout.skipped = skipped;
            if layout.learnt.last().is_some_and(|range| range.end < end) && self.strip_end(&layout.text).is_some() {
                layout.remarks.insert(END_OUTSIDE);
            }
            self.check_written(&mut layout, turns)?;
            return Ok(vec![layout]);
        }
        for index in spoken(turns, from).filter(|&index| index < last) {
            let closed = self.whole(&turns[..=index])?;
            let known = [Some(closed.as_str()), self.without_end(&closed)].into_iter().flatten();
            let Some(closed) =
                known.map(|text| self.ended(text).unwrap_or(text)).find(|text| layout.text.starts_with(text))
            else {
                match turns[index].is_learnt() {
                    true => return self.rewritten(turns, from, index),
                    false => continue,
                }
            };
            let start = self.start(closed, turns, index, &mut layout.remarks)?;
            let parts = if turns[index].is_learnt() { &mut layout.learnt } else { &mut layout.skipped };
            parts.push(start..closed.len());
        }
        let start = self.start(&layout.text, turns, last, &mut layout.remarks)?;
        layout.learnt.push(start..self.end(&mut layout.text, start));
        self.check_written(&mut layout, turns)?;
        Ok(vec![layout])
    }

    /// A whole conversation up to its last assistant turn, none of it told apart.
    ///
    /// # Errors
    /// There is no assistant turn; the template rejects the turns.
    pub(crate) fn transcript(&self, turns: &[Message]) -> Result<Layout> {
        let turns = self.without_written_ends(turns)?;
        let Some(last) = spoken(&turns, 0).next_back() else { bail!(NO_TURN) };
        let mut layout = Layout::new(self.front_of_turns(), self.whole(&turns[..=last])?);
        self.end(&mut layout.text, 0);
        Ok(layout)
    }

    /// The layouts of a conversation whose template rewrites turn `index` once more turns follow: of the last turn, or of
    /// each turn as the last of the turns up to it.
    fn rewritten(&self, turns: &[Message], from: usize, index: usize) -> Result<Vec<Layout>> {
        let (ends, remark): (Vec<usize>, _) = match self.multi_turn {
            MultiTurn::Last => (vec![turns.len() - 1], ONLY_LAST),
            MultiTurn::Each => (targets(turns, from).collect(), ONE_EACH),
            MultiTurn::Error => bail!(
                "the chat template renders turn {} differently once more turns follow; set [data] multi_turn = \"last\" or \
                 \"each\", or use template = \"human_assistant\" or \"plain\"",
                index + 1
            ),
        };
        let layout = |last: usize| {
            let mut layout = Layout::new(self.front_of_turns(), self.whole(&turns[..=last])?);
            layout.remarks.insert(remark);
            let start = self.start(&layout.text, turns, last, &mut layout.remarks)?;
            layout.learnt.push(start..self.end(&mut layout.text, start));
            self.check_written(&mut layout, &turns[..=last])?;
            Ok(layout)
        };
        ends.into_iter().map(layout).collect()
    }

    /// Refuses a text whose template writes nothing of what the last turn says, and remarks on one that lacks the question: a
    /// chat template may ignore what it is given.
    fn check_written(&self, layout: &mut Layout, turns: &[Message]) -> Result<()> {
        // A turn that holds more than its text may be written by that: a call of a tool, parts of a content.
        let said = turns.last().filter(|turn| turn.more.is_none()).map_or("", |turn| turn.content.trim());
        let learnt = layout.learnt.last().map_or("", |range| &layout.text[range.clone()]);
        if !said.is_empty() && !learnt.contains(said) {
            let with = |content: &str| {
                let mut other = turns.to_vec();
                if let Some(last) = other.last_mut() {
                    last.content = content.to_owned();
                }
                self.whole(&other)
            };
            if with("x")? == with("y")? {
                bail!(
                    "the chat template writes nothing of the response, turn {} of the dialogue; mend the template (the \
                     tokenizer's, or [data] chat_template)",
                    turns.len()
                );
            }
        }
        let asked = turns.iter().rfind(|turn| turn.role == "user").filter(|turn| turn.more.is_none());
        let question = asked.map_or("", |turn| turn.content.trim());
        if self.template == Template::Chat && !layout.text.contains(question) {
            layout.remarks.insert(NO_QUESTION);
        }
        Ok(())
    }

    /// Where turn `index`, the last of the rendered `text`, begins in it: behind the generation prompt of the turns before
    /// it. Where the text does not begin so (the generation prompt opens a block of thoughts), it is where two renderings
    /// with other contents part from it.
    fn start(
        &self,
        text: &str,
        turns: &[Message],
        index: usize,
        remarks: &mut BTreeSet<&'static str>,
    ) -> Result<usize> {
        let open = if index > 0 { self.dialogue(&turns[..index], true)? } else { String::new() };
        if index > 0 {
            if text.starts_with(&open) {
                return Ok(open.len());
            }
            remarks.insert(OTHER_OPENING);
        }
        let mut start = text.len();
        for probe in ["x", "y"] {
            let mut other = turns[..=index].to_vec();
            other[index].content = probe.to_owned();
            start = start.min(common(text, &self.whole(&other)?));
        }
        // A turn may have no content that the template writes, but a call of a tool.
        Ok(if start < text.len() { start } else { common(text, &open) })
    }

    /// Cuts a rendered text where its last turn, from byte `start` on, ends, and returns that place. What a template writes
    /// after the end token (SmolLM2: a line break; Phi-3: another end token) does not belong to the response.
    fn end(&self, text: &mut String, start: usize) -> usize {
        let trimmed = if self.template == Template::Chat { text.trim_end() } else { text.as_str() };
        let end = match self.ended(&text[start..]) {
            Some(response) => start + response.len(),
            None => trimmed.len().max(start),
        };
        text.truncate(end);
        end
    }

    /// The text up to and with the token that ends a response; None if it ends otherwise. White space and further such tokens
    /// may follow: generation stops at the first of them.
    pub(crate) fn ended<'t>(&self, text: &'t str) -> Option<&'t str> {
        let mut ended = None;
        let mut rest = text.trim_end();
        while let Some(before) = self.strip_end(rest) {
            ended = Some(rest);
            rest = before.trim_end();
        }
        ended
    }

    /// The text without the token that ends a response at its very end; None if it ends otherwise.
    fn strip_end<'t>(&self, text: &'t str) -> Option<&'t str> {
        let mut ends = self.ends.iter().filter(|(_, end)| !end.is_empty());
        ends.find_map(|(_, end)| text.strip_suffix(end.as_str()))
    }

    /// The text before the token that ends a response; None if it ends otherwise.
    fn without_end<'t>(&self, text: &'t str) -> Option<&'t str> {
        self.strip_end(self.ended(text)?)
    }

    /// The tokens that end a response. A response that a template does not end with one of them gets the first.
    pub(crate) fn ends(&self) -> &[(u32, String)] {
        &self.ends
    }

    /// The token with which the run's template ends a response.
    ///
    /// # Errors
    /// The template rejects a dialogue of one round.
    pub(crate) fn end_of_response(&self) -> Result<u32> {
        let response = Text::Dialogue(vec![Message::new("assistant", "b")]);
        let text = self.pair(&Text::Dialogue(vec![Message::new("user", "a")]), &response)?.text;
        let ends = |(_, end): &&(u32, String)| !end.is_empty() && text.ends_with(end.as_str());
        Ok(self.ends.iter().find(ends).map_or(self.encoder.eos_id(), |(id, _)| *id))
    }

    /// The turns without the end tokens that their authors wrote at the end of a response, where the chat template writes
    /// its own.
    fn without_written_ends<'m>(&self, turns: &'m [Message]) -> Result<Cow<'m, [Message]>> {
        let written = |turn: &&Message| turn.role == "assistant" && self.ended(&turn.content).is_some();
        let count = turns.iter().filter(written).count();
        if self.template != Template::Chat || count == 0 {
            return Ok(turns.into());
        }
        let mut stripped = turns.to_vec();
        for turn in stripped.iter_mut().filter(|turn| written(&&**turn)) {
            turn.content.truncate(self.without_end(&turn.content).map_or(0, str::len));
        }
        let whole = self.whole(&stripped)?;
        let ends = self.ends.iter().filter(|(_, end)| !end.is_empty());
        let own: usize = ends.map(|(_, end)| whole.matches(end.as_str()).count()).sum();
        Ok(if own >= count { stripped.into() } else { turns.into() })
    }
}

/// The indices, from `from` on, of the assistant's turns.
fn spoken(turns: &[Message], from: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
    (from..turns.len()).filter(|&index| turns[index].role == "assistant")
}

/// The indices, from `from` on, of the turns that are learnt: the assistant's whose weight is not 0.
fn targets(turns: &[Message], from: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
    spoken(turns, from).filter(|&index| turns[index].is_learnt())
}

/// What the template's `{% generation %}` blocks mark of the turns that are learnt, from index `from` on, and of those that never
/// are; None without blocks, and where the blocks cannot be told apart by turn though some are not learnt.
fn marked(rendered: &Rendered, turns: &[Message], from: usize) -> Option<[Vec<Range<usize>>; 2]> {
    let trimmed = |range: &Range<usize>| range.start..range.start + rendered.text[range.clone()].trim_end().len();
    let all: Vec<_> = rendered.generated.iter().map(trimmed).collect();
    if all.is_empty() || spoken(turns, 0).all(|index| index >= from && turns[index].is_learnt()) {
        return Some([all, vec![]]).filter(|[all, _]| !all.is_empty());
    }
    if spoken(turns, 0).count() != all.len() {
        return None;
    }
    let of = |learnt: bool| {
        let turns =
            spoken(turns, 0).zip(&all).filter(|(index, _)| *index >= from && turns[*index].is_learnt() == learnt);
        turns.map(|(_, range)| range.clone()).collect()
    };
    Some([of(true), of(false)])
}

/// Number of bytes that two texts begin with together.
fn common(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((at, _), _)| at)
}
