//! Dialogue -> text through a model's Jinja chat template, rendered as transformers does.
//!
//! A turn goes to the template with every key that its record gives it, and the record's tools, documents and template
//! arguments with the dialogue. A template is an untrusted program, so it has limits on steps, memory and recursion. It does not
//! depend on token ids. Read `tokenizer/jinja/mod.rs` next.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use super::generation;
use super::jinja::python::{Dict, List, value_of};
use super::jinja::{FUEL, NAME, environment};
use crate::host::allocator::within;
use crate::invalid;

/// One turn of a dialogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; the template decides what it accepts.
    pub role: String,
    /// Text of the turn; empty where the turn has none.
    pub content: String,
    /// What the turn holds beside role and text; `None` for most turns.
    pub more: Option<Box<More>>,
}

/// What a turn holds beside its role and its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct More {
    /// Keys of the turn other than role and content, such as `tool_calls`, `name` and `reasoning_content`; none is null.
    pub keys: Map<String, Value>,
    /// What the template gets as `content`.
    pub content: Content,
    /// Whether the loss of SFT may include the turn: its `weight` is not 0.
    pub learnt: bool,
    /// Variables of the template that the dialogue's record gives, such as `tools`; on the first turn only.
    pub variables: Arc<Map<String, Value>>,
}

/// What the template gets as the `content` of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The text.
    Text,
    /// Nothing: the record has no content, or null, as is usual beside `tool_calls`.
    Missing,
    /// The text where the template does not read `tool_calls`, which hold the same; otherwise nothing.
    CallAsText,
}

impl Default for More {
    fn default() -> Self {
        Self { keys: Map::new(), content: Content::Text, learnt: true, variables: Arc::default() }
    }
}

impl Message {
    /// A turn of `role` with the text `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), more: None }
    }

    /// What the turn holds beside role and text, to be changed.
    pub fn more_mut(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    /// Whether the loss of SFT may include the turn.
    pub fn is_learnt(&self) -> bool {
        self.more.as_ref().is_none_or(|more| more.learnt)
    }

    /// Whether the record of the dialogue that the turn begins gives tools.
    pub fn has_tools(&self) -> bool {
        self.more.as_ref().is_some_and(|more| more.variables.get("tools").is_some_and(|tools| !tools.is_null()))
    }

    /// Whether the turn holds `tool_calls` and no text.
    pub fn is_only_calls(&self) -> bool {
        let is = |more: &More| more.content == Content::Missing && more.keys.contains_key("tool_calls");
        self.more.as_deref().is_some_and(is)
    }

    /// Number of bytes of the turn's texts and of what it holds beside them.
    pub fn bytes(&self) -> usize {
        let more = self.more.as_ref().map_or(0, |more| bytes_of(more.keys.values().chain(more.variables.values())));
        self.content.len() + more
    }
}

/// Number of bytes of the texts and numbers of JSON values, about.
pub(crate) fn bytes_of<'v>(values: impl Iterator<Item = &'v Value>) -> usize {
    let of = |value: &Value| match value {
        Value::String(text) => text.len(),
        Value::Array(items) => bytes_of(items.iter()),
        Value::Object(entries) => entries.keys().map(String::len).sum::<usize>() + bytes_of(entries.values()),
        _ => 8,
    };
    values.map(of).sum()
}

/// Whether the text ends with the header of the assistant's turn, so that a response can be generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It ends with the header of the assistant's turn.
    Add,
    /// It ends with the dialogue: training text.
    None,
}

/// Texts of the special tokens that templates use.
#[derive(Clone, Copy, Debug, Default)]
pub struct TemplateTokens<'a> {
    /// `bos_token`; undefined in the template if `None`.
    pub bos: Option<&'a str>,
    /// `eos_token`; undefined in the template if `None`.
    pub eos: Option<&'a str>,
}

/// The most bytes that a template may allocate, in addition to some copies of the dialogue.
const MEMORY: usize = 64 << 20;

thread_local! {
    /// The parsed form of the last template rendered on this thread: a data set renders one template for all its records.
    static PARSED: RefCell<Option<(String, Environment<'static>)>> = const { RefCell::new(None) };
}

/// A dialogue's text, and what of it the template marks as the assistant's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The whole text.
    pub text: String,
    /// Byte ranges of the text that the template's `{% generation %}` blocks wrote, in order; empty without such blocks.
    pub generated: Vec<Range<usize>>,
}

/// Renders `messages` with `template`, in transformers' Jinja dialect ([`environment`]).
///
/// # Errors
/// If the template has a syntax error, raises an error, or takes too many steps; a turn that holds nothing but `tool_calls`
/// with a template that does not read them.
pub fn render(
    template: &str,
    messages: &[Message],
    prompt: GenerationPrompt,
    tokens: TemplateTokens<'_>,
) -> Result<String> {
    Ok(render_marked(template, messages, prompt, tokens)?.text)
}

/// As [`render`], with what the template marks as the assistant's.
///
/// # Errors
/// Those of [`render`].
pub fn render_marked(
    template: &str,
    messages: &[Message],
    prompt: GenerationPrompt,
    tokens: TemplateTokens<'_>,
) -> Result<Rendered> {
    let calls = reads(template, "tool_calls");
    let turns = messages.iter().map(|message| turn(message, calls)).collect::<Result<Vec<_>>>()?;
    PARSED.with_borrow_mut(|parsed| {
        if parsed.as_ref().is_none_or(|(source, _)| source != template) {
            *parsed = Some((template.to_owned(), environment(template).map_err(fault)?));
        }
        let Some((_, env)) = parsed else { unreachable!("set above") };
        let mut values: Vec<(&str, minijinja::Value)> = vec![
            ("messages", minijinja::Value::from_object(List(turns))),
            ("add_generation_prompt", (prompt == GenerationPrompt::Add).into()),
            ("tools", ().into()),
            ("documents", ().into()),
        ];
        values.extend(tokens.bos.map(|t| ("bos_token", t.into())));
        values.extend(tokens.eos.map(|t| ("eos_token", t.into())));
        let given = messages.first().and_then(|first| first.more.as_ref());
        values.extend(given.iter().flat_map(|more| more.variables.iter()).map(|(k, v)| (k.as_str(), value_of(v))));
        let context = minijinja::Value::from_iter(values);
        // The limit on steps does not bound a string that is repeatedly concatenated with itself.
        let bytes: usize = messages.iter().map(Message::bytes).sum();
        within(MEMORY + 16 * bytes, TOO_MUCH, || {
            let text = env.get_template(NAME).and_then(|template| template.render(context)).map_err(fault)?;
            Ok(generation::unmark(text))
        })
    })
}

/// The names under which a turn's reasoning is given. Templates read the first; gpt-oss reads the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A turn as the template sees it, with the names that transformers adds for its reasoning.
fn turn(message: &Message, reads_calls: bool) -> Result<minijinja::Value> {
    let mut entries: Vec<(minijinja::Value, minijinja::Value)> = vec![("role".into(), message.role.as_str().into())];
    let content = message.more.as_ref().map_or(Content::Text, |more| more.content);
    if content == Content::Text || (content == Content::CallAsText && !reads_calls) {
        entries.push(("content".into(), message.content.as_str().into()));
    }
    if let Some(more) = &message.more {
        if !reads_calls && message.is_only_calls() {
            return Err(invalid!(
                "an {} turn holds tool_calls and no text, and the chat template does not read tool_calls; use a template that \
                 does, or write the call into the turn's content",
                message.role
            ));
        }
        entries.extend(more.keys.iter().map(|(key, value)| (key.as_str().into(), value_of(value))));
        if let Some(reasoning) = REASONING.iter().find_map(|name| more.keys.get(*name)) {
            let thinking = more.keys.get("thinking").unwrap_or(reasoning);
            entries.retain(|(key, _)| key.as_str() != Some("thinking"));
            entries.insert(0, ("thinking".into(), value_of(thinking)));
            if !more.keys.contains_key("reasoning_content") {
                entries.push(("reasoning_content".into(), value_of(reasoning)));
            }
        }
    }
    Ok(minijinja::Value::from_object(Dict(entries)))
}

/// Whether the source of a template has this name in it, or writes whole turns as JSON.
fn reads(template: &str, name: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    let is_whole = |(at, _): (usize, &str)| {
        !template[..at].ends_with(part_of_name) && !template[at + name.len()..].starts_with(part_of_name)
    };
    let squeezed = || template.split_whitespace().collect::<String>();
    template.match_indices(name).any(is_whole)
        || (template.contains("tojson")
            && ["message|tojson", "messages|tojson"].iter().any(|dump| squeezed().contains(dump)))
}

/// What the turns and their record give beside roles and texts, and this template does not read: one phrase per key. Without a
/// template nothing is read; whether the loss reads the weights of turns, `reads_weights` says.
pub fn unread(template: Option<&str>, messages: &[Message], reads_weights: bool) -> Vec<String> {
    let is_read = |name: &str| {
        template.is_some_and(|template| match REASONING.contains(&name) {
            true => REASONING.iter().any(|name| reads(template, name)),
            false => reads(template, name),
        })
    };
    let mut phrases = Vec::new();
    for more in messages.iter().filter_map(|message| message.more.as_ref()) {
        let of_turn = more.keys.keys().map(|key| (key, "a turn's"));
        for (key, source) in of_turn.chain(more.variables.keys().map(|key| (key, "the record's"))) {
            let phrase = format!("{source} {key:?}");
            let is_used = match key.as_str() {
                "weight" if reads_weights => true,
                // The id of a call says nothing more than the order of turns does.
                "tool_call_id" => true,
                "tool_calls" if more.content == Content::CallAsText => true,
                _ => is_read(key),
            };
            if !is_used && !phrases.contains(&phrase) {
                phrases.push(phrase);
            }
        }
    }
    phrases
}

/// The message with which the process exits if a template exceeds its memory limit.
const TOO_MUCH: &str =
    "the chat template asks for more memory than a dialogue needs; look at the model's chat_template";

fn fault(error: minijinja::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::SyntaxError => invalid!("the chat template has a mistake: {error}"),
        ErrorKind::OutOfFuel => invalid!("the chat template took more than {FUEL} steps on this dialogue"),
        _ => invalid!("the chat template refuses this dialogue: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: TemplateTokens<'_> = TemplateTokens { bos: Some("<s>"), eos: Some("</s>") };

    fn plain(template: &str) -> Result<String> {
        render(template, &[Message::new("user", "a\n\"é\"")], GenerationPrompt::None, TOKENS)
    }

    /// Printed by tests/golden/chat_template.py.
    #[test]
    fn templates_render_as_transformers_golden() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/chat_template.json")).unwrap();
        let (mut rendered, mut refused) = (0, 0);
        for case in golden["cases"].as_array().unwrap() {
            let text = |turn: &Value, key: &str| turn[key].as_str().unwrap().to_owned();
            let turns = case["messages"].as_array().unwrap().iter();
            let messages: Vec<Message> =
                turns.map(|turn| Message::new(text(turn, "role"), text(turn, "content"))).collect();
            let prompt = match case["add_generation_prompt"].as_bool().unwrap() {
                true => GenerationPrompt::Add,
                false => GenerationPrompt::None,
            };
            let tokens = TemplateTokens { bos: case["bos_token"].as_str(), eos: case["eos_token"].as_str() };
            let got = render(case["template"].as_str().unwrap(), &messages, prompt, tokens);
            match case["text"].as_str() {
                Some(want) => {
                    assert_eq!(got.unwrap(), want, "{}", case["name"]);
                    rendered += 1;
                }
                None => {
                    let message = got.unwrap_err().to_string();
                    assert!(message.contains(case["error"].as_str().unwrap()), "{message}");
                    refused += 1;
                }
            }
        }
        assert!(rendered >= 12 && refused >= 2, "{rendered} {refused}");
    }

    /// A turn of the golden file: null is no key, as in transformers.
    fn turn_of(turn: &Value) -> Message {
        let mut message = Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap_or_default());
        let more = message.more_mut();
        more.content = if turn["content"].is_string() { Content::Text } else { Content::Missing };
        let keys = turn
            .as_object()
            .unwrap()
            .iter()
            .filter(|(key, value)| !matches!(key.as_str(), "role" | "content") && !value.is_null());
        more.keys.extend(keys.map(|(key, value)| (key.clone(), value.clone())));
        message
    }

    /// Printed by tests/golden/jinja.py: tool calls, tools, documents, reasoning and template arguments.
    #[test]
    fn every_key_of_a_record_reaches_the_template_as_in_transformers_golden() {
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden/jinja.json")).unwrap();
        let (mut rendered, mut refused) = (0, 0);
        for case in golden["dialogues"].as_array().unwrap() {
            let name = |key: &str| case[key].as_str().unwrap();
            let mut messages: Vec<Message> =
                golden["inputs"][name("dialogue")].as_array().unwrap().iter().map(turn_of).collect();
            let variables = golden["arguments"][name("arguments")].as_object().unwrap();
            messages[0].more_mut().variables = Arc::new(variables.clone());
            let template = golden["templates"][name("template")].as_str().unwrap();
            let prompt = if case["add"] == true { GenerationPrompt::Add } else { GenerationPrompt::None };
            let got = render(template, &messages, prompt, TOKENS);
            let what = format!("{} / {} / {}", name("template"), name("dialogue"), name("arguments"));
            match case["text"].as_str() {
                // A call that the template drops leaves nothing to learn.
                Some(_) if messages.iter().any(Message::is_only_calls) && !reads(template, "tool_calls") => {
                    assert!(got.unwrap_err().to_string().contains("does not read tool_calls"), "{what}");
                    refused += 1;
                }
                Some(want) => {
                    assert_eq!(got.map_err(|e| format!("{what}: {e}")).unwrap(), want, "{what}");
                    rendered += 1;
                }
                None => assert!(got.is_err(), "{what}: {got:?}, and transformers says {}", case["error"]),
            }
        }
        assert!(rendered >= 200 && refused >= 4, "{rendered} {refused}");
    }

    #[test]
    fn what_a_template_does_not_read_is_named_once() {
        let mut messages =
            vec![Message::new("user", "q"), Message::new("assistant", "a"), Message::new("assistant", "b")];
        messages[0].more_mut().variables = Arc::new(Map::from_iter([("tools".to_owned(), Value::from(vec![1]))]));
        for message in &mut messages[1..] {
            message.more_mut().keys =
                Map::from_iter([("name".to_owned(), "n".into()), ("weight".to_owned(), 1.into())]);
        }
        let named = ["the record's \"tools\"", "a turn's \"name\""];
        assert_eq!(unread(Some("{{ message.names }}"), &messages, true), named);
        assert_eq!(unread(Some("{{ message['name'] }}{{ tools }}"), &messages, true), [""; 0]);
        assert_eq!(unread(Some("{{ messages | tojson }}"), &messages, false), [""; 0]);
        assert_eq!(unread(None, &messages, false), [named[0], named[1], "a turn's \"weight\""]);
    }

    #[test]
    fn values_print_as_in_python_and_its_methods_work() {
        assert_eq!(plain("{{ none }} {{ true }} {{ 1 == 2 }} {{ undefined_name }}|").unwrap(), "None True False |");
        assert_eq!(plain("{{ ' x '.strip() }}{{ 'ab'.startswith('a') }}").unwrap(), "xTrue");
        assert_eq!(plain("{{ messages | tojson }}").unwrap(), r#"[{"role": "user", "content": "a\n\"é\""}]"#);
        assert_eq!(
            plain("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}").unwrap(),
            "{\n  \"b\": 1,\n  \"a\": [\n    2\n  ]\n}"
        );
        assert_eq!(
            plain("{{ {'b': 1, 'a': 'é𝄞'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}")
                .unwrap(),
            r#"{"a":"\u00e9\ud834\udd1e","b":1}"#,
            "as json.dumps prints it"
        );
    }

    #[test]
    fn steps_recursion_and_file_access_of_templates_are_limited() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(plain(endless).unwrap_err().to_string().contains("steps"));
        assert!(plain("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
        assert!(plain("{% include '/etc/hostname' %}").is_err());
        assert!(plain("{% if %}").unwrap_err().to_string().contains("mistake"));
    }

    #[test]
    fn the_date_is_todays() {
        assert!(plain("{{ strftime_now('%Y') }}").unwrap().parse::<i32>().unwrap() >= 2024);
    }
}
