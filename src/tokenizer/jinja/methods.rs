//! Python's methods on texts, dicts and lists, as templates call them: `message.content.split("</think>")[-1]`.
//!
//! Positions count characters. Methods that change a list or a dict are refused, as transformers' sandbox refuses them. This
//! file does not depend on the messages of a dialogue. Read `json.rs` next.

use minijinja::value::ValueKind;
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat;

use super::filters::{capitalize, tuple, unsafe_change};
use super::is::has_case;
use super::python::{is_printable, is_space, pairs, to_str};
use super::{Arguments, invalid, width};

/// Calls `method` of a value that is no object with methods of its own.
pub(super) fn call(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let found = match value.kind() {
        ValueKind::String => of_text(value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Map => of_dict(value, method, args)?,
        ValueKind::Seq | ValueKind::Iterable => of_list(value, method, args)?,
        ValueKind::Number if method == "is_integer" => {
            Some(Value::from(f64::try_from(value.clone()).is_ok_and(|n| n.fract() == 0.0)))
        }
        _ => None,
    };
    match found {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn of_dict(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let part = |at: usize| {
        let parts = pairs(value).into_iter().flatten().map(|pair| pair.get_item_by_index(at).unwrap_or_default());
        Some(Value::from_iter(parts))
    };
    Ok(match method {
        "keys" => part(0),
        "values" => part(1),
        "items" => Some(Value::from(pairs(value).unwrap_or_default())),
        "copy" => Some(value.clone()),
        "get" => {
            let arguments = Arguments::of(args)?;
            let (key, default) = (arguments.needed(0, "key")?, arguments.get(1, "default")?);
            arguments.end(2)?;
            let found = value.as_object().and_then(|object| object.get_value(&key));
            Some(found.or(default).unwrap_or_else(|| Value::from(())))
        }
        "pop" | "popitem" | "update" | "clear" | "setdefault" => return Err(unsafe_change(method)),
        _ => None,
    })
}

fn of_list(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match method {
        "index" => {
            let arguments = Arguments::of(args)?;
            let what = arguments.needed(0, "value")?;
            arguments.end(1)?;
            let at = value.try_iter()?.position(|item| item == what);
            Some(Value::from(at.ok_or_else(|| invalid(format!("{} is not in the list", to_str(&what))))?))
        }
        "copy" => Some(value.clone()),
        "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "reverse" | "sort" => {
            return Err(unsafe_change(method));
        }
        _ => None,
    })
}

fn of_text(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let arguments = Arguments::of(args)?;
    let all = |is: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(is));
    let (mut most, mut handled) = (0, true);
    let result = match method {
        "upper" => Value::from(text.to_uppercase()),
        "lower" => Value::from(text.to_lowercase()),
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "capitalize" => Value::from(capitalize(text)),
        "title" => Value::from(title(text)),
        "swapcase" => Value::from(swapcase(text)),
        "islower" => Value::from(has_case(text, char::is_lowercase)),
        "isupper" => Value::from(has_case(text, char::is_uppercase)),
        "istitle" => Value::from(text.chars().any(char::is_alphabetic) && title(text) == text),
        "isspace" => all(is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isdigit" | "isnumeric" | "isdecimal" => all(char::is_numeric),
        "isascii" => Value::from(text.is_ascii()),
        "isprintable" => Value::from(text.chars().all(is_printable)),
        "isidentifier" => Value::from(
            !text.starts_with(char::is_numeric)
                && !text.is_empty()
                && text.chars().all(|c| c.is_alphanumeric() || c == '_'),
        ),
        "strip" | "lstrip" | "rstrip" => {
            most = 1;
            let chars = arguments.get(0, "chars")?.map(|chars| to_str(&chars));
            let is = |c: char| chars.as_ref().map_or(is_space(c), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(is),
                "lstrip" => text.trim_start_matches(is),
                _ => text.trim_end_matches(is),
            })
        }
        "removeprefix" | "removesuffix" => {
            most = 1;
            let part = string(&arguments, 0, "part")?;
            let rest = if method == "removeprefix" { text.strip_prefix(&*part) } else { text.strip_suffix(&*part) };
            Value::from(rest.unwrap_or(text))
        }
        "split" | "rsplit" => {
            most = 2;
            let between = arguments.get(0, "sep")?.map(|sep| to_str(&sep));
            let limit = arguments.get(1, "maxsplit")?.and_then(|n| n.as_i64()).and_then(|n| usize::try_from(n).ok());
            if between.as_deref() == Some("") {
                return Err(invalid(format!("{method} by an empty text")));
            }
            Value::from_iter(split(text, between.as_deref(), limit, method == "rsplit"))
        }
        "partition" | "rpartition" => {
            most = 1;
            let between = string(&arguments, 0, "sep")?;
            if between.is_empty() {
                return Err(invalid(format!("{method} by an empty text")));
            }
            let parts = match method {
                "partition" => text.split_once(&*between).map_or([text, "", ""], |(a, b)| [a, &between, b]),
                _ => text.rsplit_once(&*between).map_or(["", "", text], |(a, b)| [a, &between, b]),
            };
            tuple(parts.map(Value::from))
        }
        "splitlines" => {
            most = 1;
            let keeps = arguments.get(0, "keepends")?.is_some_and(|v| v.is_true());
            Value::from_iter(lines(text, keeps))
        }
        "replace" => {
            most = 3;
            let (old, new) = (string(&arguments, 0, "old")?, string(&arguments, 1, "new")?);
            match arguments.get(2, "count")?.and_then(|n| n.as_i64()).map(usize::try_from) {
                Some(Ok(count)) => Value::from(text.replacen(&*old, &new, count)),
                _ => Value::from(text.replace(&*old, &new)),
            }
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            most = 3;
            let what = string(&arguments, 0, "sub")?;
            let (from, window) = window(text, &arguments)?;
            if method == "count" {
                Value::from(window.matches(&*what).count())
            } else {
                let at = if method.starts_with('r') { window.rfind(&*what) } else { window.find(&*what) };
                match at {
                    Some(at) => Value::from(from + window[..at].chars().count()),
                    None if method.ends_with("find") => Value::from(-1),
                    None => return Err(invalid(format!("{what:?} is not in the text"))),
                }
            }
        }
        "startswith" | "endswith" => {
            most = 3;
            let parts = arguments.needed(0, "prefix")?;
            let parts: Vec<Value> = if parts.as_str().is_some() { vec![parts] } else { parts.try_iter()?.collect() };
            let window = window(text, &arguments)?.1;
            let mut any = false;
            for part in parts {
                let part =
                    part.as_str().ok_or_else(|| invalid(format!("{method} needs a text, or a tuple of texts")))?;
                any |= if method == "startswith" { window.starts_with(part) } else { window.ends_with(part) };
            }
            Value::from(any)
        }
        "join" => {
            most = 1;
            let mut parts = Vec::new();
            for part in arguments.needed(0, "iterable")?.try_iter()? {
                parts.push(part.as_str().ok_or_else(|| invalid("join needs texts".to_owned()))?.to_owned());
            }
            Value::from(parts.join(text))
        }
        "zfill" | "ljust" | "rjust" | "center" => {
            most = 2;
            let columns = width(&arguments.needed(0, "width")?)?;
            let filling = arguments.get(1, "fillchar")?.and_then(|fill| fill.as_str()?.chars().next()).unwrap_or(' ');
            let missing = columns.saturating_sub(text.chars().count());
            let fill = |c: char| c.to_string().repeat(missing);
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            Value::from(match method {
                "zfill" => format!("{sign}{}{digits}", fill('0')),
                "ljust" => format!("{text}{}", fill(filling)),
                "rjust" => format!("{}{text}", fill(filling)),
                _ => centered(text, columns, filling),
            })
        }
        "expandtabs" => {
            most = 1;
            let columns = arguments.get(0, "tabsize")?.map_or(Ok(8), |columns| width(&columns))?;
            Value::from(expandtabs(text, columns))
        }
        _ => {
            handled = false;
            Value::UNDEFINED
        }
    };
    if !handled {
        return Ok(None);
    }
    arguments.end(most)?;
    Ok(Some(result))
}

/// An argument that must be a text.
fn string(arguments: &Arguments, at: usize, name: &str) -> Result<String, Error> {
    let value = arguments.needed(at, name)?;
    let text =
        value.as_str().ok_or_else(|| invalid(format!("expected a text, found a value of type {}", value.kind())))?;
    Ok(text.to_owned())
}

/// The part of a text that the second and third argument select, and the position of its first character.
fn window<'t>(text: &'t str, arguments: &Arguments) -> Result<(usize, &'t str), Error> {
    let length = text.chars().count();
    let position = |at, name, default| -> Result<usize, Error> {
        let Some(given) = arguments.get(at, name)?.and_then(|n| n.as_i64()) else { return Ok(default) };
        let from_end = usize::try_from(given.unsigned_abs()).unwrap_or(usize::MAX);
        Ok(if given < 0 { length.saturating_sub(from_end) } else { from_end.min(length) })
    };
    let (start, end) = (position(1, "start", 0)?, position(2, "end", length)?);
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    Ok((start, &text[byte(start)..byte(end.max(start))]))
}

/// `str.split` and `str.rsplit`.
fn split<'t>(text: &'t str, between: Option<&str>, limit: Option<usize>, from_right: bool) -> Vec<&'t str> {
    let limit = limit.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = text;
    if let Some(between) = between {
        while parts.len() < limit {
            let cut = if from_right { rest.rsplit_once(between) } else { rest.split_once(between) };
            let Some((left, right)) = cut else { break };
            parts.push(if from_right { right } else { left });
            rest = if from_right { left } else { right };
        }
        parts.push(rest);
    } else {
        loop {
            rest = if from_right { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
            if rest.is_empty() {
                break;
            }
            let cut = match from_right {
                _ if parts.len() == limit => None,
                false => rest.find(is_space).map(|at| (&rest[..at], &rest[at..])),
                true => rest.rfind(is_space).map(|at| {
                    let after = at + rest[at..].chars().next().map_or(0, char::len_utf8);
                    (&rest[after..], &rest[..after])
                }),
            };
            let (part, remaining) = cut.unwrap_or((rest, ""));
            parts.push(part);
            rest = remaining;
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// `str.splitlines`.
pub(super) fn lines(text: &str, keeps_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let ends =
            |c| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
        let Some(at) = rest.find(ends) else {
            lines.push(rest);
            break;
        };
        let end = match rest[at..].starts_with("\r\n") {
            true => 2,
            false => rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keeps_ends { at + end } else { at }]);
        rest = &rest[at + end..];
    }
    lines
}

/// `str.center`.
pub(super) fn centered(text: &str, columns: usize, fill: char) -> String {
    let missing = columns.saturating_sub(text.chars().count());
    // An odd column goes to the left where the width is odd.
    let left = missing / 2 + (missing & columns & 1);
    let fill = |count: usize| fill.to_string().repeat(count);
    format!("{}{text}{}", fill(left), fill(missing - left))
}

/// `str.title`: every run of letters is a word.
fn title(text: &str) -> String {
    let mut out = String::new();
    let mut in_word = false;
    for c in text.chars() {
        match in_word {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        in_word = c.is_alphabetic();
    }
    out
}

fn swapcase(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c.is_uppercase() {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
    }
    out
}

fn expandtabs(text: &str, columns: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        match c {
            '\t' if columns > 0 => {
                let spaces = columns - column % columns;
                out.push_str(&" ".repeat(spaces));
                column += spaces;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            _ => {
                out.push(c);
                column += 1;
            }
        }
    }
    out
}
