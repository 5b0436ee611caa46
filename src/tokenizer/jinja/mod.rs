//! The Jinja environment of chat templates: minijinja, with jinja2's behaviour as transformers sets jinja2 up.
//!
//! Templates are written for jinja2 and for Python's values, so tests, filters, methods and the text of a value are those of
//! jinja2; `tests/golden/jinja.py` prints what they are. A template is an untrusted program: it cannot read files and has limits
//! on steps and recursion. These files do not depend on token ids. Read `tokenizer/jinja/python.rs` next.

mod filters;
mod is;
mod json;
mod methods;
pub mod python;
mod strftime;

use minijinja::value::{Kwargs, Rest, Value, from_args};
use minijinja::{Environment, Error, ErrorKind};

use super::generation;

/// The most steps of a template; the longest dialogues take some hundred per message.
pub const FUEL: u64 = 2_000_000;
/// The deepest recursion of a template.
const RECURSION: usize = 64;
/// The most columns that a filter or a method fills up.
const COLUMNS: usize = 1 << 16;
/// Name of templates in error messages.
pub const NAME: &str = "chat_template";

/// An environment that holds `template` under [`NAME`]: blocks trimmed, jinja2's tests, filters and methods,
/// `raise_exception`, `strftime_now` (UTC), `joiner`, `cycler`, `break` and `continue`, `{% generation %}` with marks.
///
/// # Errors
/// If the template has a syntax error.
pub fn environment(template: &str) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_unknown_method_callback(methods::call);
    env.set_formatter(|out, _, value| match value.as_str() {
        Some(text) => out.write_str(text).map_err(Into::into),
        None => out.write_str(&python::to_str(value)).map_err(Into::into),
    });
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(invalid(python::to_str(message)))
    });
    env.add_function("strftime_now", strftime::now);
    env.add_function("dict", dict);
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    is::add_to(&mut env);
    filters::add_to(&mut env);
    // jinja2 has one kind of line break.
    let template = template.replace("\r\n", "\n").replace('\r', "\n");
    env.add_template_owned(NAME, generation::mark(&template).into_owned())?;
    Ok(env)
}

/// `dict(a=1)`, `dict(other, a=1)`, and of pairs.
fn dict(rest: Rest<Value>) -> Result<Value, Error> {
    let (of, named): (Option<&Value>, Kwargs) = from_args(&rest)?;
    let mut entries: Vec<(Value, Value)> = vec![];
    let mut insert = |key: Value, value: Value| match entries.iter_mut().find(|(known, _)| *known == key) {
        Some((_, old)) => *old = value,
        None => entries.push((key, value)),
    };
    if let Some(of) = of {
        for pair in python::pairs(of).map_or_else(|| Ok(of.try_iter()?.collect::<Vec<_>>()), Ok::<_, Error>)? {
            insert(pair.get_item_by_index(0)?, pair.get_item_by_index(1)?);
        }
    }
    for name in named.args() {
        insert(Value::from(name), named.get(name)?);
    }
    named.assert_all_used()?;
    Ok(Value::from_object(python::Dict(entries)))
}

/// The error of an operation that jinja2 refuses too.
fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// A number of columns, which a template must not choose without limit.
fn width(value: &Value) -> Result<usize, Error> {
    match value.as_i64() {
        Some(columns) if columns <= COLUMNS as i64 => Ok(usize::try_from(columns).unwrap_or(0)),
        _ => Err(invalid(format!("expected a number of at most {COLUMNS}, found {}", python::to_str(value)))),
    }
}

/// The arguments of a filter or a method, by position or by name.
struct Arguments<'a> {
    by_position: &'a [Value],
    by_name: Kwargs,
}

impl<'a> Arguments<'a> {
    fn of(given: &'a [Value]) -> Result<Self, Error> {
        let (by_position, by_name) = from_args(given)?;
        Ok(Self { by_position, by_name })
    }

    /// The argument at position `at`, or with this name; `None` if it is missing.
    fn given(&self, at: usize, name: &str) -> Result<Option<Value>, Error> {
        match self.by_position.get(at) {
            Some(value) => Ok(Some(value.clone())),
            None if self.by_name.has(name) => self.by_name.get(name).map(Some),
            None => Ok(None),
        }
    }

    /// [`Self::given`]; `None` if it is none, too.
    fn get(&self, at: usize, name: &str) -> Result<Option<Value>, Error> {
        Ok(self.given(at, name)?.filter(|value| !value.is_none()))
    }

    /// The argument, which must be there.
    fn needed(&self, at: usize, name: &str) -> Result<Value, Error> {
        self.given(at, name)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))
    }

    /// Refuses arguments after the first `most`, and names that nothing asked for.
    fn end(&self, most: usize) -> Result<(), Error> {
        if self.by_position.len() > most {
            return Err(Error::from(ErrorKind::TooManyArguments));
        }
        self.by_name.assert_all_used()
    }
}

#[cfg(test)]
mod tests;
