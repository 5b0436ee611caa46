//! Dialogue -> text through a model's Jinja chat template, rendered as transformers does.
//!
//! A template is an untrusted program, so it cannot read files and has limits on steps, memory and recursion. It does not
//! depend on token ids. Read `tokenizer/mod.rs` next.

use std::cell::RefCell;
use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::host::allocator::within;
use crate::invalid;
use crate::tokenizer::generation;

/// One turn of a dialogue.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; the template decides what it accepts.
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

impl Message {
    /// A turn of `role` with the text `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
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

/// The most steps of a template; the longest dialogues take some hundred per message.
const FUEL: u64 = 2_000_000;
/// The deepest recursion of a template.
const RECURSION: usize = 64;
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

/// Renders `messages` with `template`, in transformers' Jinja dialect: blocks trimmed, Python's methods on strings,
/// `raise_exception`, `strftime_now` (UTC), `tojson`, `break` and `continue`, `{% generation %}`.
///
/// # Errors
/// If the template has a syntax error, raises an error, or takes too many steps.
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
    PARSED.with_borrow_mut(|parsed| {
        if parsed.as_ref().is_none_or(|(source, _)| source != template) {
            *parsed = Some((template.to_owned(), environment(template).map_err(fault)?));
        }
        let Some((_, env)) = parsed else { unreachable!("set above") };
        let mut values = vec![
            ("messages", Value::from_serialize(messages)),
            ("add_generation_prompt", Value::from(prompt == GenerationPrompt::Add)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        values.extend(tokens.bos.map(|t| ("bos_token", Value::from(t))));
        values.extend(tokens.eos.map(|t| ("eos_token", Value::from(t))));
        let context = context! { ..Value::from_iter(values) };
        // The limit on steps does not bound a string that is repeatedly concatenated with itself.
        let content: usize = messages.iter().map(|message| message.content.len()).sum();
        within(MEMORY + 16 * content, TOO_MUCH, || {
            let text = env.get_template(NAME).and_then(|template| template.render(context)).map_err(fault)?;
            Ok(generation::unmark(text))
        })
    })
}

/// The message with which the process exits if a template exceeds its memory limit.
const TOO_MUCH: &str =
    "the chat template asks for more memory than a dialogue needs; look at the model's chat_template";

/// Name of templates in error messages.
const NAME: &str = "chat_template";

fn fault(error: minijinja::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::SyntaxError => invalid!("the chat template has a mistake: {error}"),
        ErrorKind::OutOfFuel => invalid!("the chat template took more than {FUEL} steps on this dialogue"),
        _ => invalid!("the chat template refuses this dialogue: {error}"),
    }
}

fn environment(template: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, state, value| match value.kind() {
        // Jinja prints these values as Python does.
        ValueKind::None => out.write_str("None").map_err(Into::into),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Into::into),
        _ => minijinja::escape_formatter(out, state, value),
    });
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: &str| strftime(format, unix_seconds()));
    env.add_filter("tojson", tojson);
    env.add_template_owned(NAME, generation::mark(template).into_owned())?;
    Ok(env)
}

/// Python's `json.dumps(x, ensure_ascii=False, ..)` with the options transformers gives the filter. `separators`
/// are ignored if `indent` is given.
fn tojson(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent = options.get::<Option<usize>>("indent")?.map(|n| n.min(16));
    let escapes = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorts = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = options.get::<Option<Vec<String>>>("separators")?.unwrap_or_default();
    options.assert_all_used()?;
    let mut value = serde_json::to_value(value).map_err(failed)?;
    if sorts {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = vec![b' '; n];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
        None => {
            let [item, key] = match &separators[..] {
                [item, key] => [item.as_str(), key.as_str()],
                _ => [", ", ": "],
            };
            let formatter = Separated { item, key };
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
    }
    let text = String::from_utf8(out).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    if !escapes {
        return Ok(text);
    }
    let mut ascii = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_ascii() {
            true => ascii.push(c),
            // JSON has non-ASCII characters in strings only.
            false => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| ascii += &format!("\\u{unit:04x}")),
        }
    }
    Ok(ascii)
}

/// A formatter of JSON on one line with these separators.
struct Separated<'s> {
    item: &'s str,
    key: &'s str,
}

impl serde_json::ser::Formatter for Separated<'_> {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
}

fn unix_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
}

/// Formats a time in UTC with the directives of C's strftime that chat templates use. Unknown directives are kept as text.
fn strftime(format: &str, seconds: i64) -> String {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, clock) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let weekday = DAYS[(days + 3).rem_euclid(7) as usize]; // 1970-01-01 was a Thursday
    let month_name = MONTHS[(month - 1) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('e') => out += &format!("{day:2}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += weekday,
            Some('a') => out += &weekday[..3],
            Some('H') => out += &format!("{:02}", clock / 3600),
            Some('M') => out += &format!("{:02}", clock / 60 % 60),
            Some('S') => out += &format!("{:02}", clock % 60),
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Days since 1970-01-01 -> (year, month, day) of the Gregorian calendar.
/// Years begin in March here, so that the leap day is the last; 146097 days are 400 years.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
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
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
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
    fn dates_follow_the_gregorian_calendar() {
        assert_eq!(strftime("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(strftime("%A %F %H:%M:%S %e %y %q %", 951_782_399), "Monday 2000-02-28 23:59:59 28 00 %q %");
        assert_eq!(strftime("%a %d %B %Y", 951_782_400), "Tue 29 February 2000");
        assert_eq!(strftime("%F", 4_107_542_400), "2100-03-01");
        assert!(plain("{{ strftime_now('%Y') }}").unwrap().parse::<i32>().unwrap() >= 2024);
    }
}
