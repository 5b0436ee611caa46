//! The text that a service is asked about a response: a Jinja template over the prompt, the response and the record's columns. It
//! does not depend on what the service replies. Read `judge.rs` and `served.rs` for its users.

use anyhow::Result;
use minijinja::{Environment, UndefinedBehavior, context};

use super::RewardInputs;
use crate::data::stream::columns::Columns;
use crate::invalid;

/// Template operations per text; those of a question of text and columns are some dozens.
const FUEL: u64 = 100_000;

fn environment(template: &str) -> Result<Environment<'_>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_fuel(Some(FUEL));
    env.add_template("template", template)?;
    Ok(env)
}

/// Checks that a template can be read and asks about the response. Returns whether it reads columns.
///
/// # Errors
/// If it is no Jinja template, does not have `{{ response }}`, or names another variable than `prompt`, `response` and
/// `columns`.
pub fn check_template(template: &str) -> Result<bool> {
    let found = environment(template).and_then(|env| Ok(env.get_template("template")?.undeclared_variables(false)));
    let names = found.map_err(|error| invalid!("the template cannot be read: {error}"))?;
    if !names.contains("response") {
        return Err(invalid!("the template does not show the response; write {{{{ response }}}} where it belongs"));
    }
    let known = ["prompt", "response", "columns"];
    if let Some(other) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(invalid!(
            "the template names {other}; it may name prompt, response and columns (a column is {{{{ columns.{other} }}}})"
        ));
    }
    Ok(names.contains("columns"))
}

/// (B) the template's text for each response. `kind`: the source's, for messages.
///
/// # Errors
/// If the template cannot be rendered for a response, for example because its record lacks a column.
pub fn texts(template: &str, kind: &str, inputs: &RewardInputs<'_>, columns: Option<&Columns>) -> Result<Vec<String>> {
    let env = environment(template)?;
    let template = env.get_template("template")?;
    let text = |(i, (prompt, response)): (usize, (&Vec<u32>, _))| {
        let record = columns.and_then(|columns| inputs.record(columns, i));
        let columns = record.map(|record| &record.columns);
        let (prompt, response) = ((inputs.decode)(prompt), inputs.text(response));
        let rendered = template.render(context! { prompt, response, columns });
        let of = || record.map_or_else(|| format!("prompt {i}"), |record| format!("record {}", record.id));
        rendered.map_err(|error| invalid!("the template of kind = \"{kind}\", for {}: {error}", of()))
    };
    inputs.prompts.iter().zip(inputs.responses).enumerate().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_shows_the_response_and_names_what_there_is() {
        assert!(!check_template(crate::reward::source::judge::TEMPLATE).unwrap());
        assert!(check_template("{{ response }} {{ columns.answer }}").unwrap());
        for (template, said) in [
            ("{{ prompt }}", "does not show the response"),
            ("{{ response", "cannot be read"),
            ("{{ response }} {{ answer }}", "{{ columns.answer }}"),
        ] {
            let found = check_template(template).unwrap_err().to_string();
            assert!(found.contains(said), "{template}: {found}");
        }
    }
}
