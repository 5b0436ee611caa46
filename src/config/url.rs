//! Addresses of services in the config, checked before a run begins: a client that is given a port that is no port would take
//! the scheme's.
//!
//! It does not depend on what is asked there. Read `rewards.rs` and `rollout.rs` for the keys.

use anyhow::Result;
use http::Uri;

use crate::invalid;

/// Refuses an address that no service can have. `key`: the key that it is the value of, for messages.
///
/// # Errors
/// If it has another scheme than HTTP's, or `https` in a build without TLS; if it has no host; if its port is not from 1 to
/// 65535; if it has a user or a password, which would not be sent, and would be read in the run's files and pages.
pub(super) fn check(key: &str, url: &str) -> Result<()> {
    let says = |what: String| {
        // What stands before the "@" may be a password, of which the message shows nothing.
        Err(match url.contains('@') {
            true => invalid!(
                "{key}: this is no address such as \"http://127.0.0.1:8000/path\", and it has an \"@\", so it is not shown here; \
                 leave a user and a password out, and name an environment variable that holds a bearer token in api_key_env"
            ),
            false => invalid!("{key} = {url:?}: {what}; an address is such as \"http://127.0.0.1:8000/path\""),
        })
    };
    let after_scheme = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = after_scheme.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        // The message leaves the password out.
        return Err(invalid!(
            "{key}: the address has a user or a password before its \"@\", which is not sent and would be read in the run's \
             files; leave it out, and name an environment variable that holds a bearer token in api_key_env"
        ));
    }
    if !["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) {
        return says("it does not begin with http:// or https://".into());
    }
    if url.starts_with("https://") && !cfg!(feature = "hub") {
        let shown = if url.contains('@') { String::new() } else { format!(" = {url:?}") };
        return Err(invalid!(
            "{key}{shown}: only plain http is spoken; build with --features hub, or put a local proxy before it"
        ));
    }
    let uri: Uri = match url.parse() {
        Ok(uri) => uri,
        Err(error) => return says(format!("it is no URL ({error})")),
    };
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let host = uri.host().unwrap_or_default();
    if host.is_empty() {
        return says("it has no host".into());
    }
    match authority.strip_prefix(host).and_then(|rest| rest.strip_prefix(':')) {
        Some(port) if !is_port(port) => says(format!("its port {port:?} is no number from 1 to 65535")),
        _ => Ok(()),
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_scheme_a_host_and_a_port_that_is_one_if_any() {
        for url in [
            "http://127.0.0.1:1",
            "http://127.0.0.1:65535/x?y=1",
            "http://host/v1",
            "http://[::1]:8000/x",
            "http://[::1]/x",
            "http://host/at@path?of=a@b",
            "http://a-b.c_d.example",
        ] {
            check("url", url).unwrap_or_else(|error| panic!("{url}: {error:#}"));
        }
        for (url, said) in [
            ("http://127.0.0.1:99999/x", "its port \"99999\" is no number from 1 to 65535"),
            ("http://127.0.0.1:65536", "its port \"65536\""),
            ("http://127.0.0.1:-5/x", "its port \"-5\""),
            ("http://127.0.0.1:+5/x", "its port \"+5\""),
            ("http://127.0.0.1:0/x", "its port \"0\""),
            ("http://[::1]:0/x", "its port \"0\""),
            ("http://127.0.0.1:/x", "its port \"\""),
            ("http://:8917/x", "no host"),
            ("http://", "no URL"),
            ("http:///x", "no URL"),
            ("http://a b/x", "no URL"),
            ("ftp://x", "does not begin with http://"),
            ("127.0.0.1:8000", "does not begin with http://"),
            ("", "does not begin with http://"),
        ] {
            let found = check("[ppo.rollout] urls", url).unwrap_err();
            assert_eq!(crate::error::exit_code(&found), 2, "{url}");
            let found = found.to_string();
            assert!(found.starts_with(&format!("[ppo.rollout] urls = {url:?}: ")) && found.contains(said), "{found}");
        }
        for url in ["http://user:secret@host/x", "http://user@host", "http://:secret@127.0.0.1:8000"] {
            let found = check("[ppo.rollout] urls", url).unwrap_err();
            assert_eq!(crate::error::exit_code(&found), 2, "{url}");
            let found = found.to_string();
            let says = found.starts_with("[ppo.rollout] urls: ") && found.contains("api_key_env");
            assert!(says && !found.contains("secret"), "{found}");
        }
        // A "/", "?" or "#" in a password, which then ends the authority, and addresses that are written otherwise.
        for url in [
            "http://user:se/cret@host",
            "http://user:se?cret@host/x",
            "http://user:se#cret@host",
            "http:/user:secret@host",
            "http:///user:secret@host/x",
            "http//user:secret@host",
            "ftp://host/secret@x",
            "https://user:se/cret@host",
        ] {
            let found = check("[ppo.rollout] urls", url).unwrap_err();
            assert_eq!(crate::error::exit_code(&found), 2, "{url}");
            let found = found.to_string();
            assert!(found.starts_with("[ppo.rollout] urls: ") && !found.contains("cret"), "{url}: {found}");
        }
        assert_eq!(check("url", "https://host/x").is_ok(), cfg!(feature = "hub"));
    }
}
