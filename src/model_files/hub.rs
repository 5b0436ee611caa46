//! Files of a repository on the Hugging Face hub, in the cache that huggingface_hub uses. Behind the feature `hub`.
//!
//! A revision is resolved to its commit once and the files are those of that commit; what is there is not fetched again,
//! what broke off goes on where it ended, and nothing is written outside the repository's folder of the cache, whatever
//! names the server sends. `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean to
//! huggingface_hub. The token goes to the endpoint alone, never to where it redirects, and into no message.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use ureq::http::StatusCode;

use crate::invalid;

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// A model: its files are at `/<id>/resolve/…`.
    Model,
    /// A data set: its files are at `/datasets/<id>/resolve/…`.
    Dataset,
}

impl RepoKind {
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A secret that prints as dots.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Holds `text` without white space around it; None where nothing is left.
    pub fn new(text: &str) -> Option<Self> {
        Some(text.trim()).filter(|text| !text.is_empty()).map(|text| Self(text.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A hub and the folder its files are kept in.
#[derive(Clone, Debug)]
pub struct Hub {
    /// Where it answers, without a slash at the end.
    pub endpoint: String,
    /// The folder of all repositories.
    pub cache: PathBuf,
    /// For repositories that are not public.
    pub token: Option<Token>,
    /// Is the cache all there is?
    pub offline: bool,
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Most bytes of a list of files.
const MAX_LISTING: u64 = 64 << 20;

impl Hub {
    /// As the environment says: `https://huggingface.co` and `~/.cache/huggingface/hub` where it says nothing.
    ///
    /// # Errors
    /// Neither `HF_HUB_CACHE`, `HF_HOME` nor `HOME` is set.
    pub fn from_env() -> Result<Self> {
        Self::from(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let home = var("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            Some(cache.or_else(|| Some(Path::new(&var("HOME")?).join(".cache")))?.join("huggingface"))
        });
        let cache = var("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")));
        let saved = || fs::read_to_string(home.as_ref()?.join("token")).ok();
        let is_on = |value: String| matches!(value.to_lowercase().as_str(), "1" | "on" | "yes" | "true");
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: cache.ok_or_else(|| invalid!("the hub's cache has no place: set HF_HOME to a folder"))?,
            token: var("HF_TOKEN").or_else(saved).and_then(|text| Token::new(&text)),
            offline: var("HF_HUB_OFFLINE").is_some_and(is_on),
        })
    }

    /// The folder with the files of `id` at `revision` (a branch, tag or commit) that `wanted` accepts by their names; the
    /// missing ones are fetched.
    ///
    /// # Errors
    /// No such repository or revision, no file wanted, a hub that does not answer, a name that leaves the folder; offline,
    /// a revision that is not in the cache. The message says what to do.
    pub fn fetch(&self, kind: RepoKind, id: &str, revision: &str, wanted: &dyn Fn(&str) -> bool) -> Result<PathBuf> {
        if id.split('/').count() > 2 || !is_plain(id) || !is_plain(revision) {
            return Err(invalid!("{id:?} at {revision:?} is no repository of the hub; expected owner/name"));
        }
        let repo = self.cache.join(format!("{}--{}", kind.plural(), id.replace('/', "--")));
        if self.offline {
            return cached(&repo, revision).ok_or_else(|| {
                invalid!(
                    "{id} at {revision} is not in {}, and HF_HUB_OFFLINE is set; fetch it once without",
                    self.cache.display()
                )
            });
        }
        let url = format!("{}/api/{}/{id}/revision/{}", self.endpoint, kind.plural(), revision.replace('/', "%2F"));
        let mut listing = Vec::new();
        let answer = self.get(&url, 0, id)?;
        answer
            .into_body()
            .into_reader()
            .take(MAX_LISTING)
            .read_to_end(&mut listing)
            .context("reading the hub's list")?;
        let found: Revision = serde_json::from_slice(&listing)
            .map_err(|error| invalid!("{url}: the answer is no list of files: {error}; is this a hub?"))?;
        if found.sha.len() < 7 || !found.sha.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(invalid!("{url}: the commit {:?} is none", found.sha));
        }
        let snapshot = repo.join("snapshots").join(&found.sha);
        let names: Vec<&str> =
            found.siblings.iter().map(|file| file.rfilename.as_str()).filter(|n| wanted(n)).collect();
        if names.is_empty() {
            return Err(invalid!("{id} at {revision} has none of the files wanted among its {}", found.siblings.len()));
        }
        if let Some(name) = names.iter().find(|name| !stays_inside(name)) {
            return Err(invalid!("{id} has a file called {name:?}, which would be written elsewhere"));
        }
        for name in names {
            let target = snapshot.join(name);
            if !target.exists() {
                let prefix = if kind == RepoKind::Dataset { "/datasets" } else { "" };
                let url = format!("{}{prefix}/{id}/resolve/{}/{}", self.endpoint, found.sha, encoded(name));
                self.download(&url, &target, &repo, id).with_context(|| format!("fetching {name} of {id}"))?;
            }
        }
        let reference = repo.join("refs").join(revision);
        if reference.parent().is_some_and(|folder| fs::create_dir_all(folder).is_ok()) && found.sha != revision {
            let new = reference.with_extension(format!("new-{}", std::process::id()));
            fs::write(&new, &found.sha).and_then(|()| fs::rename(&new, &reference)).context("noting the commit")?;
        }
        Ok(snapshot)
    }

    /// One file, whole or not at all under its name; one process at a time, after whatever part an earlier one left.
    fn download(&self, url: &str, target: &Path, repo: &Path, id: &str) -> Result<()> {
        let folder = repo.join("blobs");
        fs::create_dir_all(&folder)?;
        fs::create_dir_all(target.parent().unwrap_or(repo))?;
        let name: String = sha2_hex(target.to_string_lossy().as_bytes());
        let part = folder.join(format!("{name}.incomplete"));
        let mut file = File::options().create(true).append(true).open(&part)?;
        file.lock()?;
        if target.exists() {
            return Ok(()); // another process was faster
        }
        let mut start = file.metadata()?.len();
        let mut answer = self.get(url, start, id);
        if start > 0 && answer.as_ref().is_ok_and(|answer| answer.status() != StatusCode::PARTIAL_CONTENT) {
            file.set_len(0)?;
            start = 0;
        } else if start > 0 && answer.is_err() {
            // The rest may not be there any more, or all of it is: from the beginning.
            file.set_len(0)?;
            start = 0;
            answer = self.get(url, 0, id);
        }
        let answer = answer?;
        let length = answer.headers().get("content-length").and_then(|text| text.to_str().ok()?.parse::<u64>().ok());
        let copied = std::io::copy(&mut answer.into_body().into_reader(), &mut file);
        let copied = copied.map_err(|e| anyhow::anyhow!("the connection broke off ({e}); start again to go on"))?;
        file.flush()?;
        file.sync_all()?;
        if let Some(length) = length.filter(|&length| length != copied) {
            let all = start + length;
            return Err(anyhow::anyhow!(
                "the connection ended after {} of {all} bytes; start again to go on",
                start + copied
            ));
        }
        fs::rename(&part, target)?;
        Ok(())
    }

    fn get(&self, url: &str, from: u64, id: &str) -> Result<ureq::http::Response<ureq::Body>> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(std::time::Duration::from_secs(20)))
            .timeout_recv_response(Some(std::time::Duration::from_secs(60)))
            .build()
            .into();
        let mut request = agent.get(url).header("user-agent", concat!("fourfold/", env!("CARGO_PKG_VERSION")));
        // As it is stored: a length that compares with what arrives.
        request = request.header("accept-encoding", "identity");
        if let Some(Token(token)) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let answer = request.call().map_err(|error| {
            anyhow::anyhow!("{} does not answer: {error}; HF_HUB_OFFLINE=1 uses what is in the cache", self.endpoint)
        })?;
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(invalid!(
                "{id}: the hub refuses it ({}); set HF_TOKEN to a token that may read it, and accept its terms on the hub",
                answer.status()
            )),
            StatusCode::NOT_FOUND => Err(invalid!("{id}: the hub has no such repository, revision or file ({url})")),
            status => Err(anyhow::anyhow!("{url}: the hub answers {status}; try again later")),
        }
    }
}

/// The folder of a revision in the cache.
fn cached(repo: &Path, revision: &str) -> Option<PathBuf> {
    let commit = fs::read_to_string(repo.join("refs").join(revision)).unwrap_or_else(|_| revision.to_owned());
    let commit = commit.trim();
    let folder = repo.join("snapshots").join(commit);
    (is_plain(commit) && folder.is_dir()).then_some(folder)
}

/// A name of the hub: letters, digits, `-`, `_`, `.` and `/`, and no step upwards.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    name.chars().all(plain) && stays_inside(name)
}

/// Does a name, joined to a folder, stay in it?
fn stays_inside(name: &str) -> bool {
    let path = Path::new(name);
    !name.is_empty()
        && !name.contains(['\\', ':', '\0'])
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// A path of a URL.
fn encoded(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => out.push(byte.into()),
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

fn sha2_hex(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_means_what_it_means_to_huggingface_hub() {
        let of = |vars: &[(&str, &str)]| {
            let vars: std::collections::HashMap<String, String> =
                vars.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            Hub::from(|name| vars.get(name).cloned()).unwrap()
        };
        let plain = of(&[("HOME", "/h")]);
        assert_eq!((plain.endpoint.as_str(), plain.offline), ("https://huggingface.co", false));
        assert_eq!(plain.cache, Path::new("/h/.cache/huggingface/hub"));
        let all = of(&[
            ("HF_HOME", "/hf"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "1"),
            ("HF_TOKEN", " secret\n"),
        ]);
        assert_eq!((all.endpoint.as_str(), all.offline), ("http://mirror", true));
        assert_eq!(all.cache, Path::new("/hf/hub"));
        assert_eq!(all.token.as_ref().unwrap().0, "secret");
        assert!(!format!("{all:?}").contains("secret"));
        assert_eq!(of(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
        assert!(Hub::from(|_| None).is_err());
    }

    #[test]
    fn names_that_leave_the_folder_are_known() {
        for name in ["a.json", "data/train-0.parquet", "a b/ü.json"] {
            assert!(stays_inside(name), "{name}");
        }
        for name in ["", "/etc/x", "../x", "a/../../x", "a\\..\\x", "c:x"] {
            assert!(!stays_inside(name), "{name}");
        }
        assert_eq!(encoded("a b/ü?.json"), "a%20b/%C3%BC%3F.json");
    }
}
