//! `~`, `$VAR` and `${VAR}` in path values, expanded as a shell would.
//!
//! Relative paths stay relative to the current directory. `mod.rs` lists the values that are paths.

use anyhow::Result;

use crate::invalid;

/// Expands one path. `variable` looks a name up in the environment; `$$` stands for a dollar sign.
///
/// # Errors
/// A variable that is not set, or a `${` without its `}`; the message names it.
pub(super) fn expand(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String> {
    let lookup = |name: &str| {
        // The expanded path goes into a run's config.toml and into messages.
        if ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].contains(&name) {
            return Err(invalid!("a path uses ${name}, which is a secret; it reaches the hub by itself"));
        }
        variable(name).filter(|value| !value.is_empty()).ok_or_else(|| {
            invalid!("the path {text:?} uses ${name}, which is not set; `export {name}=…` first, or write the path out")
        })
    };
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    if rest == "~" || rest.starts_with("~/") {
        out.push_str(&lookup("HOME")?);
        rest = &rest[1..];
    }
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(braced) = after.strip_prefix('{') {
            let end = braced.find('}').ok_or_else(|| invalid!("the path {text:?} has a \"${{\" without its \"}}\""))?;
            out.push_str(&lookup(&braced[..end])?);
            rest = &braced[end + 1..];
        } else if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else {
            let is_name = |c: char| c == '_' || c.is_ascii_alphanumeric();
            let end = after.find(|c| !is_name(c)).unwrap_or(after.len());
            if end == 0 || after.starts_with(|c: char| c.is_ascii_digit()) {
                out.push('$'); // "$" before anything that is no name is itself, as in a shell
                rest = after;
            } else {
                out.push_str(&lookup(&after[..end])?);
                rest = &after[end..];
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        [("HOME", "/home/me"), ("A_1", "one"), ("EMPTY", "")]
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_string())
    }

    #[test]
    fn home_and_both_spellings_of_a_variable_are_expanded() {
        for (text, expected) in [
            ("~", "/home/me"),
            ("~/x", "/home/me/x"),
            ("a~/x", "a~/x"),
            ("~other/x", "~other/x"),
            ("$A_1/x", "one/x"),
            ("x/${A_1}y", "x/oney"),
            ("$A_1$A_1", "oneone"),
            ("cost$$5 $5 $", "cost$5 $5 $"),
        ] {
            assert_eq!(expand(text, env).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn an_unset_or_empty_variable_is_named() {
        for text in ["$NOPE/x", "${NOPE}", "a/$NOPE"] {
            let message = expand(text, env).unwrap_err().to_string();
            assert!(message.contains("$NOPE") && message.contains("not set"), "{message}");
        }
        assert!(expand("$EMPTY/x", env).unwrap_err().to_string().contains("EMPTY"));
        for text in ["$HF_TOKEN/x", "a/${HF_TOKEN}"] {
            let message = expand(text, |_| Some("s3cret".into())).unwrap_err().to_string();
            assert!(message.contains("HF_TOKEN") && !message.contains("s3cret"), "{message}");
        }
        assert!(expand("${A_1", env).unwrap_err().to_string().contains("without"));
    }
}
