//! Tests (`value is ...`) in which jinja2 differs from minijinja.
//!
//! In jinja2 nothing can be iterated about `none`, a text and a dict are sequences, and truth values are numbers. This file does
//! not depend on the messages of a dialogue. Read `filters.rs` next.

use minijinja::value::ValueKind;
use minijinja::{Environment, Value};

use super::python::to_str;

/// Adds the tests to `env`.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.add_test("iterable", is_iterable);
    env.add_test("sequence", is_sequence);
    env.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    env.add_test("callable", |value: &Value| matches!(value.kind(), ValueKind::Undefined | ValueKind::Plain));
    env.add_test("lower", |value: &Value| has_case(&to_str(value), char::is_lowercase));
    env.add_test("upper", |value: &Value| has_case(&to_str(value), char::is_uppercase));
}

/// Whether a loop over the value is possible; over an undefined value it is.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Whether the value has a length and items.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// Whether a text has letters with a case, and all of them have this one.
pub(super) fn has_case(text: &str, is: fn(char) -> bool) -> bool {
    let mut cased = text.chars().filter(|c| c.is_lowercase() || c.is_uppercase()).peekable();
    cased.peek().is_some() && cased.all(is)
}
