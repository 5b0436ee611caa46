//! Renders beside jinja2's, which `tests/golden/jinja.py` printed.

use serde_json::Value;

use super::python::value_of;
use super::*;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/jinja.json")).unwrap()
}

/// The expression and statement cases in which minijinja's virtual machine differs, which no filter, test or method can mend.
const KNOWN: &[&str] = &[];

#[test]
fn every_expression_gives_what_jinja2_gives_golden() {
    let golden = golden();
    let mut wrong = vec![];
    let mut known = 0;
    for case in golden["snippets"].as_array().unwrap() {
        let template = case["template"].as_str().unwrap();
        let rendered = environment(template)
            .and_then(|env| env.get_template(NAME).and_then(|template| template.render(value_of(&golden["values"]))));
        let agrees = match (case["text"].as_str(), &rendered) {
            (Some(want), Ok(got)) => want == got,
            (None, Err(_)) => true,
            _ => false,
        };
        let is_known = KNOWN.contains(&template);
        known += usize::from(is_known);
        if agrees == is_known {
            wrong.push(format!("{template}\n  jinja2: {}\n  here:   {rendered:?}", case["text"].as_str().or(case["error"].as_str()).unwrap()));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(known, KNOWN.len());
}
