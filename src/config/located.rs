//! A deserializer from TOML values to structs whose errors carry the path of the key.
//!
//! serde's own text says "unknown field `x`" without the section. This deserializer keeps the path and serde's list of
//! the valid keys, so that the message can name the nearest. It does not depend on particular keys. `mod.rs` words the
//! messages.

use std::fmt;

use serde::Deserialize;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use toml::Value;

/// What is wrong with a value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    /// A key the struct does not have, and those it has.
    UnknownKey { key: String, expected: &'static [&'static str] },
    /// A string that is none of an enum's values, and those values.
    UnknownValue { value: String, expected: &'static [&'static str] },
    /// A key without default that is not there.
    Missing(&'static str),
    /// Any other mismatch, as "must be …, not …" or in serde's words.
    Mismatch(String),
}

/// A fault and where it was found: `["ppo", "kl_coef"]`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct KeyError {
    pub path: Vec<String>,
    pub fault: Fault,
}

impl KeyError {
    fn new(fault: Fault) -> Self {
        Self { path: Vec::new(), fault }
    }

    fn under(mut self, key: &str) -> Self {
        self.path.insert(0, key.to_owned());
        self
    }
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", self.path.join("."), self.fault)
    }
}

impl std::error::Error for KeyError {}

/// Rust's names for types are not the user's.
fn plain_words(expected: &dyn de::Expected) -> String {
    match expected.to_string().as_str() {
        "usize" | "u64" | "u32" => "a whole number, 0 or more".to_owned(),
        "f64" | "f32" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "path string" => "a string".to_owned(),
        "a sequence" => "a list".to_owned(),
        // Every struct read here is a section.
        other if other.starts_with("struct ") => "a section of keys".to_owned(),
        other => other.to_owned(),
    }
}

impl de::Error for KeyError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Fault::Mismatch(message.to_string()))
    }

    fn invalid_type(found: de::Unexpected, expected: &dyn de::Expected) -> Self {
        let found = match found {
            de::Unexpected::Map => "a section".to_owned(),
            de::Unexpected::Seq => "a list".to_owned(),
            de::Unexpected::Str(text) => format!("the string {text:?}"),
            other => other.to_string().replace('`', ""),
        };
        Self::new(Fault::Mismatch(format!("must be {}, not {found}", plain_words(expected))))
    }

    fn invalid_value(found: de::Unexpected, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_field(key: &str, expected: &'static [&'static str]) -> Self {
        Self::new(Fault::UnknownKey { key: key.to_owned(), expected })
    }

    fn unknown_variant(value: &str, expected: &'static [&'static str]) -> Self {
        Self::new(Fault::UnknownValue { value: value.to_owned(), expected })
    }

    fn missing_field(key: &'static str) -> Self {
        Self::new(Fault::Missing(key))
    }
}

struct Node(Value);

impl<'de> Deserializer<'de> for Node {
    type Error = KeyError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyError> {
        match self.0 {
            Value::String(text) => visitor.visit_string(text),
            Value::Integer(number) => visitor.visit_i64(number),
            Value::Float(number) => visitor.visit_f64(number),
            Value::Boolean(flag) => visitor.visit_bool(flag),
            Value::Datetime(date) => visitor.visit_string(date.to_string()),
            Value::Array(items) => visitor.visit_seq(Items(items.into_iter())),
            Value::Table(table) => visitor.visit_map(Entries { rest: table.into_iter(), value: None }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, KeyError> {
        visitor.visit_newtype_struct(self)
    }

    // serde would take a list as the values of the fields in their order.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyError> {
        match self.0 {
            Value::Array(_) => Err(de::Error::invalid_type(de::Unexpected::Seq, &visitor)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        values: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyError> {
        match self.0 {
            Value::String(text) => visitor.visit_enum(text.into_deserializer()),
            other => Err(KeyError::new(Fault::Mismatch(format!("must be one of {}, not {other}", quoted(values))))),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items(std::vec::IntoIter<Value>);

impl<'de> SeqAccess<'de> for Items {
    type Error = KeyError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, KeyError> {
        self.0.next().map(|item| seed.deserialize(Node(item))).transpose()
    }
}

struct Entries {
    rest: toml::map::IntoIter<String, Value>,
    value: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = KeyError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, KeyError> {
        let Some((key, value)) = self.rest.next() else { return Ok(None) };
        let name = seed.deserialize(key.clone().into_deserializer())?;
        self.value = Some((key, value));
        Ok(Some(name))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, KeyError> {
        let (key, value) = self.value.take().expect("serde asks for a value after its key");
        seed.deserialize(Node(value)).map_err(|error| error.under(&key))
    }
}

/// Reads a struct out of a table.
pub(super) fn from_table<T: DeserializeOwned>(table: toml::Table) -> Result<T, KeyError> {
    T::deserialize(Node(Value::Table(table)))
}

/// Reads a config, a section or a value of a run's file, of which no error is reported. The whole program reads configs by this one
/// deserialiser: serde compiles every section anew for each further one, and two more made the binary 1.9 MB larger.
pub(crate) fn from_value<T: DeserializeOwned>(value: Value) -> Option<T> {
    T::deserialize(Node(value)).ok()
}

/// The keys of a struct with `deny_unknown_fields`, as serde derived them: asked for by offering one no struct has.
pub(super) fn keys_of<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    let probe = toml::Table::from_iter([(String::new(), Value::Boolean(true))]);
    match from_table::<T>(probe) {
        Err(KeyError { fault: Fault::UnknownKey { expected, .. }, .. }) => expected,
        _ => &[],
    }
}

/// `"a", "b" or "c"`-style list without the "or": `"a", "b", "c"`.
pub(super) fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

/// The name most like `wrong`, where one is like it at all, or the one that it is a part of.
pub(super) fn nearest<'n>(wrong: &str, names: &[&'n str]) -> Option<&'n str> {
    let likeness = |name: &str| strsim::jaro_winkler(&wrong.to_lowercase(), name);
    let best = names.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    // 0.8 keeps a slip ("kl_coeff", "learning_rat") and drops chance likeness, and with it most parts of names.
    if likeness(best) >= 0.8 { Some(best) } else { containing(wrong, names) }
}

/// The one name that has all words of `wrong` in their order beside others: "num_train_epochs" for "epochs". `None` where there are
/// several.
pub(super) fn containing<'n>(wrong: &str, names: &[&'n str]) -> Option<&'n str> {
    let wrong = format!("_{}_", wrong.to_lowercase());
    let mut found = names.iter().copied().filter(|name| format!("_{name}_").contains(&wrong));
    found.next().filter(|first| found.all(|more| more == *first))
}
