//! Limits on untrusted JSON and tables: the bytes and the number of values of one record.
//!
//! A megabyte of `[],[],[]` takes thirty in memory, and a small gzipped file can hold any number of them. This file
//! does not depend on the rest of the crate. Read `data/files/read.rs` next.

use std::cell::Cell;
use std::fmt;
use std::io::{BufRead, Read};
use std::rc::Rc;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Maximum bytes of one record: a file without line breaks must not become one allocation of its own size.
pub(crate) const MAX_RECORD_BYTES: u64 = 16 << 20;
/// Maximum number of values in one record, including those in lists and objects: a long dialogue has thousands.
const MAX_VALUES: usize = 200_000;

/// Parses one JSON value.
///
/// # Errors
/// Those of serde_json; more than [`MAX_VALUES`] values.
pub(crate) fn from_str(text: &str) -> serde_json::Result<Value> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value = LimitedValue::default().deserialize(&mut json)?;
    json.end().map(|()| value)
}

/// Deserialises a JSON value and fails beyond [`MAX_VALUES`] values; the count is shared with its inner values.
#[derive(Default)]
pub(crate) struct LimitedValue(Rc<Cell<usize>>);

impl LimitedValue {
    fn inner(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<'de> DeserializeSeed<'de> for LimitedValue {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.set(self.0.get() + 1);
        if self.0.get() > MAX_VALUES {
            return Err(D::Error::custom(format!("one record holds more than {MAX_VALUES} values")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for LimitedValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any valid JSON value")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = vec![];
        while let Some(item) = items.next_element_seed(self.inner())? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(self.inner())?;
            all.insert(key, value);
        }
        Ok(Value::Object(all))
    }
}

/// A reader that fails after a number of bytes, which the caller resets before each record: an unclosed quote must not
/// become one cell of the file's size.
pub(crate) struct RecordLimit {
    input: Box<dyn BufRead>,
    remaining: Rc<Cell<u64>>,
}

impl RecordLimit {
    /// The reader and its remaining bytes, at first [`MAX_RECORD_BYTES`].
    pub(crate) fn new(input: Box<dyn BufRead>) -> (Self, Rc<Cell<u64>>) {
        let remaining = Rc::new(Cell::new(MAX_RECORD_BYTES));
        (Self { input, remaining: remaining.clone() }, remaining)
    }
}

impl Read for RecordLimit {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.remaining.get() == 0 {
            let limit = MAX_RECORD_BYTES >> 20;
            return Err(std::io::Error::other(format!("a record is longer than {limit} MiB; is a quote not closed?")));
        }
        let most = buffer.len().min(usize::try_from(self.remaining.get()).unwrap_or(usize::MAX));
        let read = self.input.read(&mut buffer[..most])?;
        self.remaining.set(self.remaining.get() - read as u64);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_errors_equal_serde_jsons() {
        for text in [
            r#"{"a": [1, -2, 0.1, 1e300, true, null, "é\n"], "b": {"c": {}}, "a": 2}"#,
            "18446744073709551615",
            "-9223372036854775808",
            r#""x""#,
        ] {
            assert_eq!(from_str(text).unwrap(), serde_json::from_str::<Value>(text).unwrap(), "{text}");
        }
        for text in ["", "{", "1 2", "nul", "1e999", r#""\ud800""#] {
            let (ours, theirs) = (from_str(text).unwrap_err(), serde_json::from_str::<Value>(text).unwrap_err());
            assert_eq!(ours.to_string(), theirs.to_string(), "{text}");
        }
    }

    #[test]
    fn a_record_of_too_many_values_or_levels_is_refused() {
        let many = |n: usize| format!("[{}[]]", "[],".repeat(n));
        assert!(from_str(&many(MAX_VALUES - 2)).is_ok());
        let message = from_str(&many(MAX_VALUES)).unwrap_err().to_string();
        assert!(message.contains("more than 200000 values"), "{message}");
        assert!(from_str(&format!("{}{}", "[".repeat(500), "]".repeat(500))).is_err(), "no deep recursion");
    }
}
