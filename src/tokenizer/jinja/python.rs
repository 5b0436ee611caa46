//! Values of a template as Python has them: `str` and `repr` of a value, white space, and the objects for dicts, lists and
//! tuples, which print as Python prints them wherever a template turns them into text.
//!
//! This file does not depend on the messages of a dialogue. Read `is.rs` next.

use std::fmt;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Enumerator, Object, ObjectRepr, ValueKind};

/// A JSON value as a template sees it.
pub fn value_of(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(truth) => Value::from(*truth),
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => Value::from_object(List(items.iter().map(value_of).collect())),
        serde_json::Value::Object(entries) => Value::from_object(Dict(
            entries.iter().map(|(key, value)| (key.as_str().into(), value_of(value))).collect(),
        )),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (_, Some(integer)) => Value::from(integer),
            _ => Value::from(number.as_f64()),
        },
    }
}

/// A dict, in the order of its keys.
#[derive(Debug)]
pub struct Dict(pub Vec<(Value, Value)>);

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.iter().find(|(own, _)| own == key).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let this = self.clone();
        Enumerator::KeyValueIter(Box::new((0..self.0.len()).map(move |at| this.0[at].clone())))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_str(&Value::from_dyn_object(self.clone())))
    }
}

macro_rules! sequence {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(pub Vec<Value>);

        impl Object for $name {
            fn repr(self: &Arc<Self>) -> ObjectRepr {
                ObjectRepr::Seq
            }

            fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
                self.0.get(key.as_usize()?).cloned()
            }

            fn enumerate(self: &Arc<Self>) -> Enumerator {
                Enumerator::Seq(self.0.len())
            }

            fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&to_str(&Value::from_dyn_object(self.clone())))
            }
        }
    };
}

sequence!(
    /// A list.
    List
);
sequence!(
    /// A tuple: what `dict.items()` yields.
    Tuple
);

/// The pairs of a dict as tuples; `None` for other values.
pub fn pairs(value: &Value) -> Option<Vec<Value>> {
    if value.kind() != ValueKind::Map {
        return None;
    }
    let pairs = value.as_object()?.try_iter_pairs()?;
    Some(pairs.map(|(key, value)| Value::from_object(Tuple(vec![key, value]))).collect())
}

/// `str(value)`; the empty text for an undefined value.
pub fn to_str(value: &Value) -> String {
    if let Some(text) = value.as_str() {
        return text.to_owned();
    }
    let mut out = String::new();
    if !value.is_undefined() {
        write_repr(value, &mut out);
    }
    out
}

fn write_repr(value: &Value, out: &mut String) {
    let list = |out: &mut String, open: &str, close: &str| {
        out.push_str(open);
        for (at, item) in value.try_iter().into_iter().flatten().enumerate() {
            out.push_str(if at > 0 { ", " } else { "" });
            write_repr(&item, out);
        }
        out.push_str(close);
    };
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String => write_text(value.as_str().unwrap_or_default(), out),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => out.push_str(&float(number)),
            Err(_) => out.push_str(&value.to_string()),
        },
        ValueKind::Map => {
            out.push('{');
            for (at, pair) in pairs(value).into_iter().flatten().enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                let part = |at: usize| pair.get_item_by_index(at).unwrap_or_default();
                write_repr(&part(0), out);
                out.push_str(": ");
                write_repr(&part(1), out);
            }
            out.push('}');
        }
        ValueKind::Seq if value.downcast_object_ref::<Tuple>().is_some() => {
            list(out, "(", if value.len() == Some(1) { ",)" } else { ")" });
        }
        ValueKind::Seq => list(out, "[", "]"),
        ValueKind::Iterable if value.len().is_some() => list(out, "[", "]"),
        _ => out.push_str(&value.to_string()),
    }
}

/// `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
pub fn float(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() { "nan".into() } else { format!("{number}") };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if number != 0.0 && !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => format!("{number:?}"),
    }
}

/// `repr` of a text.
fn write_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ => match u32::from(c) {
                code @ ..=0xFF => *out += &format!("\\x{code:02x}"),
                code @ ..=0xFFFF => *out += &format!("\\u{code:04x}"),
                code => *out += &format!("\\U{code:08x}"),
            },
        }
    }
    out.push(quote);
}

/// Whether `repr` leaves the character as it is. Rust escapes the same characters within a text.
pub fn is_printable(c: char) -> bool {
    match c.is_ascii() {
        true => c == ' ' || c.is_ascii_graphic(),
        false => format!("a{c}").escape_debug().eq(['a', c]),
    }
}

/// Whether Python's `str.strip` removes the character: Unicode's white space and four separators of ASCII.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}
