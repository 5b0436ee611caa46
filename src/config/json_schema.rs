//! JSON schemas that a reward checks responses by: the part of draft 2020-12 in [`KEYWORDS`]. A schema with another keyword is
//! refused when the config is read, so that nothing in it is passed over. Whole validators bring three dozen crates along.
//!
//! It does not depend on responses: read `reward/source/verify.rs` for what of a response is checked.

use std::collections::HashMap;

use anyhow::{Result, bail};
use regex::Regex;
use serde_json::{Map, Value};

/// The keywords that are checked.
pub const KEYWORDS: &[&str] = &[
    "type",
    "enum",
    "const",
    "properties",
    "required",
    "additionalProperties",
    "minProperties",
    "maxProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "uniqueItems",
    "minLength",
    "maxLength",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "$ref",
    "$defs",
    "definitions",
];

/// The keywords that say nothing about a value.
const NOTES: &[&str] = &[
    "$schema",
    "$id",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
];

const TYPES: &[&str] = &["null", "boolean", "object", "array", "number", "integer", "string"];

/// A checked schema.
#[derive(Clone, Debug)]
pub struct JsonSchema {
    root: Value,
    /// Every `pattern`, compiled.
    patterns: HashMap<String, Regex>,
}

impl JsonSchema {
    /// Checks a schema.
    ///
    /// # Errors
    /// If it has a keyword that is not in [`KEYWORDS`], a keyword with a wrong value, or a reference to what is not there or to
    /// itself. The message names the place as a JSON pointer.
    pub fn new(root: Value) -> Result<Self> {
        let mut schema = Self { root: Value::Null, patterns: HashMap::new() };
        schema.check(&root, "", &root)?;
        schema.root = root;
        Ok(schema)
    }

    /// Whether a value satisfies the schema.
    pub fn allows(&self, value: &Value) -> bool {
        self.holds(&self.root, value)
    }

    /// Checks one subschema and all below it.
    fn check(&mut self, schema: &Value, at: &str, root: &Value) -> Result<()> {
        let keys = match schema {
            Value::Bool(_) => return Ok(()),
            Value::Object(keys) => keys,
            other => bail!("{}: a schema is an object, true or false, not {other}", place(at)),
        };
        for (key, value) in keys {
            let here = format!("{at}/{key}");
            let is_good = match key.as_str() {
                "type" => types(value).is_some_and(|mut types| types.all(|name| TYPES.contains(&name))),
                "enum" => value.is_array(),
                "const" => true,
                "required" => value.as_array().is_some_and(|names| names.iter().all(Value::is_string)),
                "minProperties" | "maxProperties" | "minItems" | "maxItems" | "minLength" | "maxLength" => {
                    value.is_u64()
                }
                "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" => value.is_number(),
                "uniqueItems" => value.is_boolean(),
                "pattern" => match value.as_str().map(Regex::new) {
                    Some(Ok(pattern)) => {
                        self.patterns.insert(pattern.as_str().to_owned(), pattern);
                        true
                    }
                    Some(Err(error)) => bail!("{}: {value} is no regular expression: {error}", place(&here)),
                    None => false,
                },
                "properties" | "$defs" | "definitions" => match value.as_object() {
                    Some(below) => {
                        for (name, schema) in below {
                            self.check(schema, &format!("{here}/{name}"), root)?;
                        }
                        true
                    }
                    None => false,
                },
                "items" if value.is_array() => {
                    bail!("{}: a list of schemas is called prefixItems since draft 2020-12", place(&here))
                }
                "additionalProperties" | "items" | "not" => {
                    self.check(value, &here, root)?;
                    true
                }
                "allOf" | "anyOf" | "oneOf" | "prefixItems" => match value.as_array().filter(|list| !list.is_empty()) {
                    Some(list) => {
                        for (i, schema) in list.iter().enumerate() {
                            self.check(schema, &format!("{here}/{i}"), root)?;
                        }
                        true
                    }
                    None => false,
                },
                "$ref" => match value.as_str().map(|name| (name, target(root, name))) {
                    Some((_, Some(_))) => true,
                    Some((name, None)) => {
                        bail!(
                            "{}: {name:?} is not in this schema; a reference has the form \"#/$defs/name\"",
                            place(&here)
                        )
                    }
                    None => false,
                },
                note if NOTES.contains(&note) => true,
                "format" => bail!("{}: formats are not checked; write a pattern instead", place(&here)),
                _ => bail!("{}: the keyword is not supported; those that are: {}", place(&here), KEYWORDS.join(", ")),
            };
            if !is_good {
                bail!("{}: {value} is no value of this keyword", place(&here));
            }
        }
        check_loops(schema, root, &mut vec![]).map_err(|error| error.context(place(at)))
    }

    fn holds(&self, schema: &Value, value: &Value) -> bool {
        match schema {
            Value::Bool(allowed) => *allowed,
            Value::Object(keys) => keys.iter().all(|(key, wanted)| self.keyword(keys, key, wanted, value)),
            _ => false,
        }
    }

    /// Whether a value satisfies one keyword of a schema.
    fn keyword(&self, schema: &Map<String, Value>, key: &str, wanted: &Value, value: &Value) -> bool {
        let size = |has: usize| wanted.as_u64().map(|limit| (has as u64).cmp(&limit));
        let bound = || value.as_f64().zip(wanted.as_f64()).map(|(value, bound)| value.total_cmp(&bound));
        let list = || wanted.as_array().into_iter().flatten();
        let allowed_by = |schema: &&Value| self.holds(schema, value);
        match (key, value) {
            ("type", _) => types(wanted).is_some_and(|mut types| types.any(|name| is_of(value, name))),
            ("enum", _) => list().any(|allowed| is_equal(allowed, value)),
            ("const", _) => is_equal(wanted, value),
            ("allOf", _) => list().all(|schema| self.holds(schema, value)),
            ("anyOf", _) => list().any(|schema| self.holds(schema, value)),
            ("oneOf", _) => list().filter(allowed_by).count() == 1,
            ("not", _) => !self.holds(wanted, value),
            ("$ref", _) => wanted
                .as_str()
                .and_then(|name| target(&self.root, name))
                .is_some_and(|schema| self.holds(schema, value)),
            ("properties", Value::Object(object)) => wanted
                .as_object()
                .into_iter()
                .flatten()
                .all(|(name, schema)| object.get(name).is_none_or(|value| self.holds(schema, value))),
            ("required", Value::Object(object)) => {
                list().filter_map(Value::as_str).all(|name| object.contains_key(name))
            }
            ("additionalProperties", Value::Object(object)) => {
                let named = schema.get("properties").and_then(Value::as_object);
                object
                    .iter()
                    .filter(|(name, _)| !named.is_some_and(|named| named.contains_key(*name)))
                    .all(|(_, value)| self.holds(wanted, value))
            }
            ("minProperties", Value::Object(object)) => size(object.len()).is_some_and(|order| order.is_ge()),
            ("maxProperties", Value::Object(object)) => size(object.len()).is_some_and(|order| order.is_le()),
            ("prefixItems", Value::Array(items)) => list().zip(items).all(|(schema, item)| self.holds(schema, item)),
            ("items", Value::Array(items)) => {
                let before = schema.get("prefixItems").and_then(Value::as_array).map_or(0, Vec::len);
                items.iter().skip(before).all(|item| self.holds(wanted, item))
            }
            ("minItems", Value::Array(items)) => size(items.len()).is_some_and(|order| order.is_ge()),
            ("maxItems", Value::Array(items)) => size(items.len()).is_some_and(|order| order.is_le()),
            ("uniqueItems", Value::Array(items)) => {
                wanted == false || (1..items.len()).all(|i| !items[..i].iter().any(|item| is_equal(item, &items[i])))
            }
            ("minLength", Value::String(text)) => size(text.chars().count()).is_some_and(|order| order.is_ge()),
            ("maxLength", Value::String(text)) => size(text.chars().count()).is_some_and(|order| order.is_le()),
            ("pattern", Value::String(text)) => {
                wanted.as_str().and_then(|name| self.patterns.get(name)).is_some_and(|pattern| pattern.is_match(text))
            }
            ("minimum", Value::Number(_)) => bound().is_some_and(|order| order.is_ge()),
            ("maximum", Value::Number(_)) => bound().is_some_and(|order| order.is_le()),
            ("exclusiveMinimum", Value::Number(_)) => bound().is_some_and(|order| order.is_gt()),
            ("exclusiveMaximum", Value::Number(_)) => bound().is_some_and(|order| order.is_lt()),
            // A keyword of another type than the value's, or one without a meaning for values.
            _ => true,
        }
    }
}

fn place(at: &str) -> String {
    format!("at {}", if at.is_empty() { "the root" } else { at })
}

/// The names in `type`: one, or a list.
fn types(value: &Value) -> Option<Box<dyn Iterator<Item = &str> + '_>> {
    match value {
        Value::String(name) => Some(Box::new(std::iter::once(&name[..]))),
        Value::Array(names) if names.iter().all(Value::is_string) => {
            Some(Box::new(names.iter().filter_map(Value::as_str)))
        }
        _ => None,
    }
}

/// A number without a fraction is an integer, however it is written.
fn is_of(value: &Value, name: &str) -> bool {
    match value {
        Value::Null => name == "null",
        Value::Bool(_) => name == "boolean",
        Value::Object(_) => name == "object",
        Value::Array(_) => name == "array",
        Value::String(_) => name == "string",
        Value::Number(number) => {
            let is_whole = || number.is_i64() || number.is_u64() || number.as_f64().is_some_and(|x| x.fract() == 0.0);
            name == "number" || (name == "integer" && is_whole())
        }
    }
}

/// Equal as JSON: 1 is 1.0, and objects have no order.
fn is_equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || (a.is_f64() || b.is_f64()) && a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(name, a)| b.get(name).is_some_and(|b| is_equal(a, b)))
        }
        (a, b) => a == b,
    }
}

/// What a reference within the schema points to.
fn target<'s>(root: &'s Value, reference: &str) -> Option<&'s Value> {
    root.pointer(reference.strip_prefix('#')?)
}

/// Refuses a schema that is checked against a value by checking itself against the same value.
fn check_loops<'s>(schema: &'s Value, root: &'s Value, within: &mut Vec<&'s str>) -> Result<()> {
    for key in ["allOf", "anyOf", "oneOf"] {
        schema
            .get(key)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .try_for_each(|s| check_loops(s, root, within))?;
    }
    schema.get("not").map_or(Ok(()), |schema| check_loops(schema, root, within))?;
    let Some(name) = schema.get("$ref").and_then(Value::as_str) else { return Ok(()) };
    if within.contains(&name) {
        bail!("the reference {name:?} leads to itself without a property or item between");
    }
    within.push(name);
    target(root, name).map_or(Ok(()), |schema| check_loops(schema, root, within))?;
    within.pop();
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A schema, values that satisfy it, and values that do not.
    fn table() -> Vec<(Value, Vec<Value>, Vec<Value>)> {
        let tree = json!({"$defs": {"tree": {"type": "object", "required": ["v"], "additionalProperties": false,
            "properties": {"v": {"type": "integer"}, "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}},
            "$ref": "#/$defs/tree"});
        vec![
            (json!(true), vec![json!(null), json!({})], vec![]),
            (json!({"not": {}}), vec![], vec![json!(null), json!(1)]),
            (
                json!({"type": "integer"}),
                vec![json!(3), json!(3.0), json!(-1)],
                vec![json!(3.5), json!("3"), json!(null)],
            ),
            (
                json!({"type": ["string", "null"]}),
                vec![json!("a"), json!(null)],
                vec![json!(1), json!(false), json!([])],
            ),
            (json!({"type": "number"}), vec![json!(3), json!(0.5)], vec![json!("0.5"), json!(true)]),
            (json!({"enum": ["a", 1, null]}), vec![json!("a"), json!(1.0), json!(null)], vec![json!("b"), json!(2)]),
            (json!({"const": {"a": [1]}}), vec![json!({"a": [1.0]})], vec![json!({"a": [1, 2]}), json!({"a": 1})]),
            (
                json!({"properties": {"a": {"type": "string"}}, "required": ["a"]}),
                vec![json!({"a": "x"}), json!({"a": "x", "b": 1}), json!([])],
                vec![json!({}), json!({"a": 1})],
            ),
            (
                json!({"properties": {"a": {}}, "additionalProperties": {"type": "boolean"}}),
                vec![json!({"a": 1, "b": true}), json!({})],
                vec![json!({"b": 1})],
            ),
            (
                json!({"minProperties": 1, "maxProperties": 2}),
                vec![json!({"a": 1}), json!({"a": 1, "b": 1})],
                vec![json!({}), json!({"a": 1, "b": 1, "c": 1})],
            ),
            (
                json!({"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}),
                vec![json!(["a", 1, 2]), json!([]), json!(["a"])],
                vec![json!([1]), json!(["a", "b"])],
            ),
            (
                json!({"type": "array", "minItems": 1, "maxItems": 2, "uniqueItems": true}),
                vec![json!([1]), json!([1, 2])],
                vec![json!([]), json!([1, 2, 3]), json!([1, 1.0])],
            ),
            (
                json!({"minLength": 2, "maxLength": 3, "pattern": "^[a-zé]+$"}),
                vec![json!("éa"), json!("abc"), json!(7)],
                vec![json!("é"), json!("abcd"), json!("A1")],
            ),
            (
                json!({"minimum": 0, "exclusiveMaximum": 1}),
                vec![json!(0), json!(0.99), json!("a")],
                vec![json!(-0.01), json!(1)],
            ),
            (json!({"exclusiveMinimum": 0, "maximum": 1}), vec![json!(1), json!(0.1)], vec![json!(0), json!(1.1)]),
            (
                json!({"oneOf": [{"type": "integer"}, {"minimum": 2}]}),
                vec![json!(1), json!(2.5)],
                vec![json!(3), json!(1.5)],
            ),
            (
                json!({"anyOf": [{"const": 1}, {"const": 2}], "allOf": [{"type": "integer"}, {"not": {"const": 2}}]}),
                vec![json!(1)],
                vec![json!(2), json!(3)],
            ),
            (
                tree,
                vec![json!({"v": 1}), json!({"v": 1, "below": [{"v": 2, "below": []}]})],
                vec![json!({"v": 1, "below": [{"v": 2, "below": [{"w": 1}]}]}), json!({"v": 1, "w": 2}), json!(1)],
            ),
        ]
    }

    #[test]
    fn values_are_told_apart_by_every_keyword() {
        let mut seen = std::collections::BTreeSet::<&str>::new();
        for (schema, right, wrong) in table() {
            let text = schema.to_string();
            seen.extend(KEYWORDS.iter().filter(|key| text.contains(&format!("\"{key}\""))));
            let schema = JsonSchema::new(schema).unwrap_or_else(|error| panic!("{text}: {error:#}"));
            right.iter().for_each(|value| assert!(schema.allows(value), "{text} refuses {value}"));
            wrong.iter().for_each(|value| assert!(!schema.allows(value), "{text} allows {value}"));
        }
        let missing: Vec<_> = KEYWORDS.iter().filter(|key| !seen.contains(*key) && **key != "definitions").collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn what_is_not_checked_is_refused_with_its_place() {
        for (schema, says) in [
            (
                json!({"properties": {"a": {"multipleOf": 2}}}),
                "at /properties/a/multipleOf: the keyword is not supported",
            ),
            (json!({"format": "date"}), "at /format: formats are not checked"),
            (json!({"items": [{}]}), "prefixItems"),
            (json!({"type": "text"}), "at /type: \"text\" is no value"),
            (json!({"minLength": -1}), "at /minLength"),
            (json!({"pattern": "("}), "no regular expression"),
            (json!({"anyOf": []}), "at /anyOf"),
            (json!({"required": "a"}), "at /required"),
            (json!({"not": 3}), "at /not: a schema is an object"),
            (json!([]), "at the root: a schema is an object"),
            (json!({"$ref": "#/$defs/a"}), "is not in this schema"),
            (json!({"$ref": "other.json"}), "is not in this schema"),
            (json!({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}), "leads to itself"),
            (json!({"allOf": [{"$ref": "#"}]}), "leads to itself"),
        ] {
            let message = format!("{:#}", JsonSchema::new(schema.clone()).unwrap_err());
            assert!(message.contains(says), "{schema}: {message}");
        }
    }
}
