//! Downloads files of a Hugging Face repository into the cache that huggingface_hub uses. Requires the feature `hub`.
//!
//! A revision is resolved to its commit once, and all files are of that commit. Existing files are not downloaded again,
//! interrupted downloads are resumed, and nothing is written outside of the repository's cache folder, whatever file names the
//! server sends. `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HF_TOKEN` have huggingface_hub's meaning. The
//! token is sent to the endpoint only, never to a redirect target, and is not printed. The crate hf-hub would bring tokio, hyper
//! and reqwest, blocking calls included; ureq is here for reward endpoints anyhow. It does not depend on file formats.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use ureq::http::StatusCode;

use crate::invalid;
use crate::report::progress::{Progress, Unit};

/// Kind of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// A model; its files are at `/<id>/resolve/…`.
    Model,
    /// A data set; its files are at `/datasets/<id>/resolve/…`.
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

/// An access token. Its `Debug` output does not contain it.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// A token without surrounding white space; `None` if it is empty.
    pub fn new(text: &str) -> Option<Self> {
        Some(text.trim()).filter(|text| !text.is_empty()).map(|text| Self(text.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A hub and its local cache.
#[derive(Clone, Debug)]
pub struct Hub {
    /// URL of the hub, without a slash at the end.
    pub endpoint: String,
    /// Cache folder of all repositories.
    pub cache: PathBuf,
    /// Access token, for repositories that are not public.
    pub token: Option<Token>,
    /// Whether only the cache is used.
    pub offline: bool,
}

/// The hub's description of a revision.
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

/// The most bytes of a list of files.
const MAX_LISTING: u64 = 64 << 20;

impl Hub {
    /// The hub that the environment configures; `https://huggingface.co` and `~/.cache/huggingface/hub` by default.
    ///
    /// # Errors
    /// If neither `HF_HUB_CACHE`, `HF_HOME` nor `HOME` is set.
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

    /// The folder with the files of `id` at `revision` (a branch, tag or commit) whose names `wanted` accepts. Missing
    /// ones are downloaded.
    ///
    /// # Errors
    /// If the repository or revision does not exist, no file is wanted, the hub does not respond, or a name leaves the folder;
    /// offline, if the revision is not in the cache. The message contains a remedy.
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
        let response = self.get(&url, 0, id)?;
        response
            .into_body()
            .into_reader()
            .take(MAX_LISTING)
            .read_to_end(&mut listing)
            .context("reading the hub's list")?;
        let found: Revision = serde_json::from_slice(&listing)
            .map_err(|error| invalid!("{url}: the response is not a list of files: {error}; is this a hub?"))?;
        if found.sha.len() < 7 || !found.sha.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(invalid!("{url}: the commit {:?} is not valid", found.sha));
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

    /// Downloads one file, which gets its name when it is complete. One process at a time downloads it, resuming an earlier
    /// partial download.
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
        let mut response = self.get(url, start, id);
        if start > 0 && response.as_ref().is_ok_and(|response| response.status() != StatusCode::PARTIAL_CONTENT) {
            file.set_len(0)?;
            start = 0;
        } else if start > 0 && response.is_err() {
            // The server cannot continue, or the partial file is already complete: start again.
            file.set_len(0)?;
            start = 0;
            response = self.get(url, 0, id);
        }
        let response = response?;
        let length = response.headers().get("content-length").and_then(|text| text.to_str().ok()?.parse::<u64>().ok());
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let bytes = length.map_or(usize::MAX, |length| (start + length) as usize);
        let mut progress = Progress::resumed(format!("fetching {name}"), start as usize, bytes, Unit::Bytes);
        let copied = std::io::copy(&mut progress.reading(response.into_body().into_reader()), &mut file);
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
        progress.finish();
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
        // Without compression, so that content-length equals the bytes received.
        request = request.header("accept-encoding", "identity");
        if let Some(Token(token)) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(|error| {
            anyhow::anyhow!("{} does not respond: {error}; HF_HUB_OFFLINE=1 uses what is in the cache", self.endpoint)
        })?;
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(invalid!(
                "{id}: the hub refuses it ({}); set HF_TOKEN to a token that may read it, and accept its terms on the hub",
                response.status()
            )),
            StatusCode::NOT_FOUND => Err(invalid!("{id}: the hub has no such repository, revision or file ({url})")),
            status => Err(anyhow::anyhow!("{url}: the hub answers {status}; try again later")),
        }
    }
}

/// The cached folder of a revision.
fn cached(repo: &Path, revision: &str) -> Option<PathBuf> {
    let commit = fs::read_to_string(repo.join("refs").join(revision)).unwrap_or_else(|_| revision.to_owned());
    let commit = commit.trim();
    let folder = repo.join("snapshots").join(commit);
    (is_plain(commit) && folder.is_dir()).then_some(folder)
}

/// Whether a name has only letters, digits, `-`, `_`, `.` and `/`, and no parent directory.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    name.chars().all(plain) && stays_inside(name)
}

/// Whether a name, joined to a folder, stays in it.
fn stays_inside(name: &str) -> bool {
    let path = Path::new(name);
    !name.is_empty()
        && !name.contains(['\\', ':', '\0'])
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// A file name, percent-encoded for a URL.
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
    fn environment_variables_have_huggingface_hubs_meaning() {
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
    fn names_that_leave_the_folder_are_detected() {
        for name in ["a.json", "data/train-0.parquet", "a b/ü.json"] {
            assert!(stays_inside(name), "{name}");
        }
        for name in ["", "/etc/x", "../x", "a/../../x", "a\\..\\x", "c:x"] {
            assert!(!stays_inside(name), "{name}");
        }
        assert_eq!(encoded("a b/ü?.json"), "a%20b/%C3%BC%3F.json");
    }
}
