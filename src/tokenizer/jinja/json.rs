//! The filter `tojson`: Python's `json.dumps` with the options that transformers gives it.
//!
//! This file does not depend on the messages of a dialogue. Read `strftime.rs` next.

use std::io::Write;

use minijinja::value::{Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::Formatter;

use super::Arguments;
use super::python;

/// `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, rest: Rest<Value>) -> Result<String, Error> {
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let arguments = Arguments::of(&rest)?;
    let escapes = arguments.get(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match arguments.get(1, "indent")? {
        None => None,
        Some(text) if text.kind() == ValueKind::String => Some(python::to_str(&text)),
        Some(spaces) => Some(" ".repeat(super::width(&spaces)?)),
    };
    let separators: Vec<String> = match arguments.get(2, "separators")? {
        Some(given) => given.try_iter()?.map(|text| python::to_str(&text)).collect(),
        None => vec![],
    };
    let sorts = arguments.get(3, "sort_keys")?.is_some_and(|v| v.is_true());
    arguments.end(4)?;
    let mut value = json_of(value)?;
    if sorts {
        value.sort_all_objects();
    }
    let [item, key] = match (separators.as_slice(), &indent) {
        ([item, key], _) => [item.as_str(), key.as_str()],
        (_, None) => [", ", ": "],
        (_, Some(_)) => [",", ": "],
    };
    let mut out = Vec::new();
    let formatter = Dumps { item, key, indent: indent.as_deref(), depth: 0, has_value: false };
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    if !escapes {
        return Ok(text);
    }
    let mut ascii = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_ascii() {
            true if c != '\x7f' => ascii.push(c),
            // JSON has non-ASCII characters in strings only.
            _ => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| ascii += &format!("\\u{unit:04x}")),
        }
    }
    Ok(ascii)
}

/// The value as JSON. A key that is no text becomes one, as in Python.
fn json_of(value: &Value) -> Result<serde_json::Value, Error> {
    Ok(match value.kind() {
        ValueKind::Map => {
            let mut object = serde_json::Map::new();
            for pair in python::pairs(value).into_iter().flatten() {
                let key = pair.get_item_by_index(0)?;
                let name = match key.kind() {
                    ValueKind::None => "null".to_owned(),
                    ValueKind::Bool => key.is_true().to_string(),
                    _ => python::to_str(&key),
                };
                object.insert(name, json_of(&pair.get_item_by_index(1)?)?);
            }
            object.into()
        }
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.map(|item| json_of(&item)).collect::<Result<_, _>>()?
        }
        ValueKind::Undefined => {
            return Err(Error::new(ErrorKind::UndefinedError, "an undefined value cannot be written as JSON"));
        }
        _ => serde_json::to_value(value).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?,
    })
}

/// A formatter with these separators, on one line or with an indent.
struct Dumps<'s> {
    item: &'s str,
    key: &'s str,
    indent: Option<&'s str>,
    depth: usize,
    /// Whether the innermost list or object has an item so far.
    has_value: bool,
}

impl Dumps<'_> {
    fn line<W: Write + ?Sized>(&self, out: &mut W) -> std::io::Result<()> {
        let Some(indent) = self.indent else { return Ok(()) };
        out.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| out.write_all(indent.as_bytes()))
    }

    fn open<W: Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        out.write_all(bracket)
    }

    fn close<W: Write + ?Sized>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.line(out)?;
        }
        self.has_value = true;
        out.write_all(bracket)
    }

    fn next<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.line(out)
    }
}

impl Formatter for Dumps<'_> {
    fn write_f64<W: Write + ?Sized>(&mut self, out: &mut W, number: f64) -> std::io::Result<()> {
        out.write_all(python::float(number).as_bytes())
    }

    fn begin_array<W: Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        self.next(out, first)
    }

    fn end_array_value<W: Write + ?Sized>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: Write + ?Sized>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}
