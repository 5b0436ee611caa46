//! Wording of faults: the names of JSON types and the prefix that names a column.
//!
//! All format errors name types and columns in the same way. This file does not depend on the rest of the crate.

use serde_json::Value;

/// The type of a JSON value, as messages name it.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A fault of the column `key`.
pub(crate) fn column_fault(key: &str, fault: impl std::fmt::Display) -> String {
    format!("column {key:?}: {fault}")
}
