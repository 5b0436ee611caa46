//! Filters (`value | ...`) in which jinja2 differs from minijinja, and those that minijinja lacks.
//!
//! A value that is no text is turned into one by Python's `str`, and every argument can be given by its name. This file does
//! not depend on the messages of a dialogue. Read `methods.rs` next.

use std::cmp::Ordering;

use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::python::{Tuple, is_space, pairs, to_str};
use super::{Arguments, invalid, json, width};

/// Adds the filters to `env`.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.add_filter("tojson", json::tojson);
    env.add_filter("string", |value: &Value| to_str(value));
    env.add_filter("safe", |value: &Value| Value::from_safe_string(to_str(value)));
    env.add_filter("list", |value: &Value| iterate(value).map(Iterator::collect::<Vec<Value>>));
    env.add_filter("sort", sort);
    env.add_filter("min", |value: &Value, rest: Rest<Value>| extreme(value, rest, Ordering::Less));
    env.add_filter("max", |value: &Value, rest: Rest<Value>| extreme(value, rest, Ordering::Greater));
    env.add_filter("abs", abs);
    env.add_filter("urlencode", urlencode);
    for name in ["length", "count"] {
        env.add_filter(name, length);
    }
    for name in ["default", "d"] {
        env.add_filter(name, default);
    }
    for name in ["escape", "e", "forceescape"] {
        env.add_filter(name, escape);
    }
    env.add_filter("upper", |value: &Value| to_str(value).to_uppercase());
    env.add_filter("lower", |value: &Value| to_str(value).to_lowercase());
    env.add_filter("capitalize", |value: &Value| capitalize(&to_str(value)));
    env.add_filter("title", title);
    env.add_filter("trim", trim);
    env.add_filter("replace", replace);
    env.add_filter("join", join);
    env.add_filter("items", items);
    env.add_filter("dictsort", dictsort);
    env.add_filter("first", |value: &Value| edge(value, false));
    env.add_filter("last", |value: &Value| edge(value, true));
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_filter("round", round);
    env.add_filter("sum", sum);
    env.add_filter("indent", indent);
    env.add_filter("center", center);
    env.add_filter("truncate", truncate);
    env.add_filter("wordcount", |value: &Value| {
        let text = to_str(value);
        text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count()
    });
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.is_undefined() {
        true => Ok(0),
        false => value.len().ok_or_else(|| invalid(format!("a value of type {} has no length", value.kind()))),
    }
}

fn default(value: &Value, rest: Rest<Value>) -> Result<Value, Error> {
    let arguments = Arguments::of(&rest)?;
    let other = arguments.given(0, "default_value")?.unwrap_or_else(|| Value::from(""));
    let unless_true = arguments.get(1, "boolean")?.is_some_and(|v| v.is_true());
    arguments.end(2)?;
    Ok(if value.is_undefined() || (unless_true && !value.is_true()) { other } else { value.clone() })
}

/// Escapes as the package markupsafe does.
fn escape(value: &Value) -> Value {
    if value.is_safe() {
        return value.clone();
    }
    let mut out = String::new();
    for c in to_str(value).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(c),
        }
    }
    Value::from_safe_string(out)
}

/// `str.capitalize`.
pub(super) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars.as_str().to_lowercase().chars()).collect()
}

/// Words begin after white space, hyphens and opening brackets, and nowhere else.
fn title(value: &Value) -> String {
    let mut out = String::new();
    let mut begins = true;
    for c in to_str(value).chars() {
        match begins {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        begins = is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    }
    out
}

fn trim(value: &Value, rest: Rest<Value>) -> Result<String, Error> {
    let arguments = Arguments::of(&rest)?;
    let chars = arguments.get(0, "chars")?;
    arguments.end(1)?;
    let text = to_str(value);
    Ok(match chars {
        None => text.trim_matches(is_space).to_owned(),
        Some(chars) => {
            let chars = to_str(&chars);
            text.trim_matches(|c| chars.contains(c)).to_owned()
        }
    })
}

fn replace(value: &Value, rest: Rest<Value>) -> Result<String, Error> {
    let arguments = Arguments::of(&rest)?;
    let (old, new) = (arguments.needed(0, "old")?, arguments.needed(1, "new")?);
    let count = arguments.get(2, "count")?.and_then(|n| n.as_i64());
    arguments.end(3)?;
    let text = to_str(value);
    let (old, new) = (to_str(&old), to_str(&new));
    Ok(match count.map(usize::try_from) {
        Some(Ok(count)) => text.replacen(&old, &new, count),
        _ => text.replace(&old, &new),
    })
}

fn join(value: &Value, rest: Rest<Value>) -> Result<String, Error> {
    let arguments = Arguments::of(&rest)?;
    let between = arguments.get(0, "d")?.map(|v| to_str(&v)).unwrap_or_default();
    let attribute = arguments.get(1, "attribute")?;
    arguments.end(2)?;
    let mut texts = Vec::new();
    for item in iterate(value)? {
        texts.push(to_str(&at_path(item, attribute.as_ref())?));
    }
    Ok(texts.join(&between))
}

/// The items of a value; of an undefined value, nothing.
fn iterate(value: &Value) -> Result<impl Iterator<Item = Value>, Error> {
    if value.is_none() {
        return Err(invalid("none cannot be iterated over".to_owned()));
    }
    value.try_iter()
}

/// The value at a path such as `a.b` or `0`.
fn at_path(value: Value, path: Option<&Value>) -> Result<Value, Error> {
    let Some(path) = path else { return Ok(value) };
    match path.as_str() {
        None => value.get_item(path),
        Some(path) => path.split('.').try_fold(value, |value, step| match step.parse::<usize>() {
            Ok(at) => value.get_item_by_index(at),
            Err(_) => value.get_attr(step),
        }),
    }
}

fn items(value: &Value) -> Result<Vec<Value>, Error> {
    match value.is_undefined() {
        true => Ok(vec![]),
        false => pairs(value).ok_or_else(|| invalid("only a dict has items".to_owned())),
    }
}

/// A sort key of a value: texts sort without regard to case unless they are to.
fn sort_key(value: Value, minds_case: bool) -> Value {
    let lower = value.as_str().filter(|_| !minds_case).map(|text| Value::from(text.to_lowercase()));
    lower.unwrap_or(value)
}

fn sort(value: &Value, rest: Rest<Value>) -> Result<Vec<Value>, Error> {
    let arguments = Arguments::of(&rest)?;
    let reverses = arguments.get(0, "reverse")?.is_some_and(|v| v.is_true());
    let minds_case = arguments.get(1, "case_sensitive")?.is_some_and(|v| v.is_true());
    let attribute = arguments.get(2, "attribute")?;
    arguments.end(3)?;
    let mut keyed = Vec::new();
    for item in iterate(value)? {
        keyed.push((sort_key(at_path(item.clone(), attribute.as_ref())?, minds_case), item));
    }
    keyed.sort_by(|a, b| if reverses { b.0.cmp(&a.0) } else { a.0.cmp(&b.0) });
    Ok(keyed.into_iter().map(|(_, item)| item).collect())
}

/// The first of the items that are smallest or largest; undefined if there is none.
fn extreme(value: &Value, rest: Rest<Value>, wins: Ordering) -> Result<Value, Error> {
    let arguments = Arguments::of(&rest)?;
    let minds_case = arguments.get(0, "case_sensitive")?.is_some_and(|v| v.is_true());
    let attribute = arguments.get(1, "attribute")?;
    arguments.end(2)?;
    let mut best: Option<(Value, Value)> = None;
    for item in iterate(value)? {
        let key = sort_key(at_path(item.clone(), attribute.as_ref())?, minds_case);
        if best.as_ref().is_none_or(|(known, _)| key.cmp(known) == wins) {
            best = Some((key, item));
        }
    }
    Ok(best.map(|(_, item)| item).unwrap_or_default())
}

fn abs(value: &Value) -> Result<Value, Error> {
    let number = if value.kind() == ValueKind::Bool { Value::from(i64::from(value.is_true())) } else { value.clone() };
    match i128::try_from(number.clone()) {
        Ok(integer) if number.is_integer() => Ok(Value::from(integer.saturating_abs())),
        _ => Ok(Value::from(f64::try_from(number)?.abs())),
    }
}

/// Percent-encodes everything but letters, digits and `_.-~/`.
fn urlencode(value: &Value) -> String {
    let mut out = String::new();
    for byte in to_str(value).bytes() {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'_' | b'.' | b'-' | b'~' | b'/' => out.push(byte.into()),
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

fn dictsort(value: &Value, rest: Rest<Value>) -> Result<Vec<Value>, Error> {
    let arguments = Arguments::of(&rest)?;
    let minds_case = arguments.get(0, "case_sensitive")?.is_some_and(|v| v.is_true());
    let by = match arguments.get(1, "by")?.map(|by| to_str(&by)).as_deref() {
        None | Some("key") => 0,
        Some("value") => 1,
        Some(_) => return Err(invalid("dictsort sorts by \"key\" or \"value\"".to_owned())),
    };
    let reverses = arguments.get(2, "reverse")?.is_some_and(|v| v.is_true());
    arguments.end(3)?;
    let pairs = pairs(value).ok_or_else(|| invalid("only a dict can be sorted by dictsort".to_owned()))?;
    let mut keyed = Vec::with_capacity(pairs.len());
    for pair in pairs {
        keyed.push((sort_key(pair.get_item_by_index(by)?, minds_case), pair));
    }
    keyed.sort_by(|a, b| if reverses { b.0.cmp(&a.0) } else { a.0.cmp(&b.0) });
    Ok(keyed.into_iter().map(|(_, pair)| pair).collect())
}

/// The first or the last item; undefined if there is none.
fn edge(value: &Value, last: bool) -> Result<Value, Error> {
    let mut items = iterate(value)?;
    Ok(if last { items.last() } else { items.next() }.unwrap_or_default())
}

/// Refuses an undefined value.
fn known(value: &Value) -> Result<(), Error> {
    if value.is_undefined() { Err(Error::from(ErrorKind::UndefinedError)) } else { Ok(()) }
}

/// `int(value)` where Python can do it, otherwise `default`.
fn int(value: &Value, rest: Rest<Value>) -> Result<Value, Error> {
    let arguments = Arguments::of(&rest)?;
    let default = arguments.given(0, "default")?.unwrap_or_else(|| Value::from(0));
    let base = arguments.get(1, "base")?.and_then(|base| base.as_i64()).unwrap_or(10);
    arguments.end(2)?;
    known(value)?;
    let whole = |number: f64| number.is_finite().then(|| Value::from(number.trunc() as i128));
    let found = match value.kind() {
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => f64::try_from(value.clone()).ok().and_then(whole),
        ValueKind::String => {
            let text = to_str(value).trim_matches(is_space).replace('_', "").to_lowercase();
            let prefixed = match base {
                16 => text.strip_prefix("0x"),
                8 => text.strip_prefix("0o"),
                2 => text.strip_prefix("0b"),
                _ => None,
            };
            let radix = u32::try_from(base).ok().filter(|base| (2..=36).contains(base));
            let integer = radix.and_then(|radix| i128::from_str_radix(prefixed.unwrap_or(&text), radix).ok());
            integer.map(Value::from).or_else(|| text.parse().ok().and_then(whole))
        }
        _ => None,
    };
    Ok(found.unwrap_or(default))
}

/// `float(value)` where Python can do it, otherwise `default`.
fn float(value: &Value, rest: Rest<Value>) -> Result<Value, Error> {
    let arguments = Arguments::of(&rest)?;
    let default = arguments.given(0, "default")?.unwrap_or_else(|| Value::from(0.0));
    arguments.end(1)?;
    known(value)?;
    Ok(match value.kind() {
        ValueKind::Bool => Value::from(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => Value::from(f64::try_from(value.clone())?),
        ValueKind::String => to_str(value).trim_matches(is_space).parse::<f64>().map_or(default, Value::from),
        _ => default,
    })
}

/// Rounds halves to even, as Python does; `ceil` and `floor` as they say. An integer stays one.
fn round(value: &Value, rest: Rest<Value>) -> Result<Value, Error> {
    let arguments = Arguments::of(&rest)?;
    let precision = arguments.get(0, "precision")?.and_then(|n| n.as_i64()).unwrap_or(0).clamp(-300, 300);
    let method = arguments.get(1, "method")?.map(|v| to_str(&v));
    arguments.end(2)?;
    if !matches!(value.kind(), ValueKind::Number | ValueKind::Bool) {
        return Err(invalid("only a number can be rounded".to_owned()));
    }
    let number = match value.kind() {
        ValueKind::Bool => f64::from(u8::from(value.is_true())),
        _ => f64::try_from(value.clone())?,
    };
    let scale = 10f64.powi(precision as i32);
    match method.as_deref() {
        None | Some("common") if value.is_integer() && precision >= 0 => Ok(value.clone()),
        // The decimal digits of the number decide, not those of its product with a power of ten.
        None | Some("common") if precision >= 0 => {
            Ok(Value::from(format!("{number:.*}", precision as usize).parse::<f64>().unwrap_or(number)))
        }
        None | Some("common") => Ok(Value::from((number * scale).round_ties_even() / scale)),
        Some("ceil") => Ok(Value::from((number * scale).ceil() / scale)),
        Some("floor") => Ok(Value::from((number * scale).floor() / scale)),
        Some(_) => Err(invalid("round knows the methods \"common\", \"ceil\" and \"floor\"".to_owned())),
    }
}

fn sum(value: &Value, rest: Rest<Value>) -> Result<Value, Error> {
    let arguments = Arguments::of(&rest)?;
    let attribute = arguments.get(0, "attribute")?;
    let start = arguments.get(1, "start")?.unwrap_or_else(|| Value::from(0));
    arguments.end(2)?;
    iterate(value)?.try_fold(start, |total, item| {
        let item = at_path(item, attribute.as_ref())?;
        match (i128::try_from(total.clone()), i128::try_from(item.clone())) {
            (Ok(a), Ok(b)) if total.is_integer() && item.is_integer() => {
                a.checked_add(b).map(Value::from).ok_or_else(|| invalid("the sum is too large".to_owned()))
            }
            _ => Ok(Value::from(f64::try_from(total)? + f64::try_from(item)?)),
        }
    })
}

fn indent(value: &Value, rest: Rest<Value>) -> Result<String, Error> {
    let arguments = Arguments::of(&rest)?;
    let before = match arguments.get(0, "width")? {
        None => " ".repeat(4),
        Some(text) if text.kind() == ValueKind::String => to_str(&text),
        Some(spaces) => " ".repeat(width(&spaces)?),
    };
    let first = arguments.get(1, "first")?.is_some_and(|v| v.is_true());
    let blank = arguments.get(2, "blank")?.is_some_and(|v| v.is_true());
    arguments.end(3)?;
    let text = to_str(value) + "\n"; // so that a last line break makes a last empty line
    let lines = super::methods::lines(&text, false);
    let indented = lines.iter().enumerate().map(|(at, line)| match (at, line.is_empty() && !blank) {
        (0, _) if !first => (*line).to_owned(),
        (1.., true) => String::new(),
        _ => format!("{before}{line}"),
    });
    Ok(indented.collect::<Vec<_>>().join("\n"))
}

fn center(value: &Value, rest: Rest<Value>) -> Result<String, Error> {
    let arguments = Arguments::of(&rest)?;
    let columns = arguments.get(0, "width")?.map_or(Ok(80), |columns| width(&columns))?;
    arguments.end(1)?;
    Ok(super::methods::centered(&to_str(value), columns, ' '))
}

fn truncate(value: &Value, rest: Rest<Value>) -> Result<String, Error> {
    let arguments = Arguments::of(&rest)?;
    let number = |at, name, default| arguments.get(at, name)?.map_or(Ok(default), |n| width(&n));
    let (length, leeway) = (number(0, "length", 255)?, number(3, "leeway", 5)?);
    let cuts_words = arguments.get(1, "killwords")?.is_some_and(|v| v.is_true());
    let end = arguments.get(2, "end")?.map_or_else(|| "...".to_owned(), |end| to_str(&end));
    arguments.end(4)?;
    let text = to_str(value);
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(invalid(format!("truncate to {length} characters leaves no room for {end:?}")));
    };
    if text.chars().count() <= length + leeway {
        return Ok(text);
    }
    let cut: String = text.chars().take(kept).collect();
    let whole = if cuts_words { &cut } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(words, _)| words) };
    Ok(format!("{whole}{end}"))
}

/// A pair as a tuple.
pub(super) fn tuple(parts: impl IntoIterator<Item = Value>) -> Value {
    Value::from_object(Tuple(parts.into_iter().collect()))
}

/// The error of a method or filter that jinja2's sandbox refuses.
pub(super) fn unsafe_change(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("{what} changes a value, which a chat template may not do"))
}
