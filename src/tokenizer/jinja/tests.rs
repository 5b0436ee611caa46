//! Renders beside jinja2's, which `tests/golden/jinja.py` printed.

use serde_json::Value;

use super::python::value_of;
use super::*;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/jinja.json")).unwrap()
}

/// What minijinja's own language decides, so that no filter, test or method can mend it: operators, loops over none, macros with
/// `varargs`, tuples and ranges as texts, `namespace` as a value; and two filters without use in a chat template.
const KNOWN: &[&str] = &[
    "{{ d.items() is sequence }}",
    "{{ namespace(a=1) is iterable }}",
    "{{ namespace(a=1) is mapping }}",
    "{{ namespace(a=1) is sequence }}",
    "{{ n|unique|list }}",
    "{{ html|striptags }}",
    "{{ l|random|string|length }}",
    "{{ '½'.isdigit() }}",
    "{{ '²'.isdecimal() }}",
    "{{ 1 < 'a' }}",
    "{{ 1 in 'abc' }}",
    "{{ 2 ** -1 }}",
    "{{ +i }}",
    "{{ 1 / 0 }}",
    "{{ d.items() }}",
    "{{ d.keys() }}",
    "{{ d.values() }}",
    "{{ (1, 'a') }}",
    "{{ (1,) }}",
    "{{ () }}",
    "{{ range(3) }}",
    "{% macro f(a, b='B', c=none) %}{{ a }}{{ b }}{{ c }}{{ varargs|length if varargs is defined }}{% endmacro %}{{ f(1) }}{{ f(1, c=3) }}{{ f('x', 'y', 'z') }}{{ f() }}",
    "{% set j = joiner(', ') %}{% for x in l %}{{ j() }}{{ x }}{% endfor %}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}",
    "{% for a in n %}x{% endfor %}",
];

#[test]
fn every_expression_gives_what_jinja2_gives_golden() {
    let golden = golden();
    let mut wrong = vec![];
    let mut known = 0;
    for case in golden["snippets"].as_array().unwrap() {
        let template = case["template"].as_str().unwrap();
        let rendered = environment(template)
            .and_then(|env| env.get_template(NAME).and_then(|template| template.render(value_of(&golden["values"]))))
            .map(|text| generation::unmark(text).text);
        let agrees = match (case["text"].as_str(), &rendered) {
            (Some(want), Ok(got)) => want == got,
            (None, Err(_)) => true,
            _ => false,
        };
        let is_known = KNOWN.contains(&template);
        known += usize::from(is_known);
        if agrees == is_known {
            wrong.push(format!(
                "{template}\n  jinja2: {}\n  here:   {rendered:?}",
                case["text"].as_str().or(case["error"].as_str()).unwrap()
            ));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(known, KNOWN.len());
}
