//! Resolves the name of a base to a path: an existing path, or a model of the Hugging Face hub.
//!
//! The files of a hub model are downloaded into the hub's cache (feature `hub`). It does not depend on file formats. Read
//! `hub.rs` for downloads, `files.rs` for opening the files.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::invalid;

/// The files of a Hugging Face model beside its weights, in the order in which they are listed.
pub(crate) const SIDE_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
];

/// A resolved name: files on this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// A directory or a file.
    pub path: PathBuf,
    /// `owner/name`, if the model is from the hub.
    pub id: Option<String>,
}

/// A model of the hub: `owner/name[@revision][/file.gguf]`.
#[derive(Debug, PartialEq)]
struct HubModel<'a> {
    id: String,
    revision: &'a str,
    file: Option<&'a str>,
}

impl<'a> HubModel<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (owner, rest) = text.split_once('/')?;
        let (name, file) = rest.split_once('/').map_or((rest, None), |(name, file)| (name, Some(file)));
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let plain = |part: &str| {
            let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && !part.starts_with('.') && part.chars().all(letter)
        };
        let whole = plain(owner) && plain(name) && plain(revision) && file.is_none_or(|f| f.ends_with(".gguf"));
        whole.then(|| Self { id: format!("{owner}/{name}"), revision, file })
    }
}

/// Resolves `name`, which is an existing path, `hf://owner/name[@revision]` (a branch, tag or commit; `main`
/// by default), `hf://owner/name[@revision]/file.gguf`, or `owner/name[@revision]` if there is no such path. Of a repository
/// on the hub, only safetensors, configuration and tokenizer are downloaded. Any other name is returned as a path.
///
/// # Errors
/// If `hf://` is not followed by a model's id, the program was built without the feature `hub`, or the hub does not have the
/// model, does not respond, or must not be used (`HF_HUB_OFFLINE`) and the cache does not have the model.
pub fn resolve(name: &Path) -> Result<Resolved> {
    let text = name.to_str().unwrap_or_default();
    let model = match text.strip_prefix("hf://") {
        Some(rest) => Some(HubModel::parse(rest).ok_or_else(|| {
            invalid!(
                "{text} is no model of the hub; write hf://owner/name, hf://owner/name@revision or \
                      hf://owner/name/file.gguf"
            )
        })?),
        None if name.exists() => None,
        // A mistyped path is more likely than a model with such a name.
        None => HubModel::parse(text).filter(|m| m.file.is_none() && !text.ends_with(".gguf")),
    };
    match model {
        Some(model) => Ok(Resolved { path: fetch(&model)?, id: Some(model.id) }),
        None => Ok(Resolved { path: name.to_owned(), id: None }),
    }
}

#[cfg(feature = "hub")]
fn fetch(model: &HubModel<'_>) -> Result<PathBuf> {
    use anyhow::Context;

    use crate::model_files::gguf::split::PartName;
    use crate::model_files::hub::{Hub, RepoKind};

    let HubModel { id, revision, file } = model;
    let part = file.and_then(PartName::parse);
    let wanted = |name: &str| match file {
        Some(file) => name == *file || part.is_some_and(|part| part.is_beside(name)),
        None => {
            let weights = name.starts_with("model") && name.ends_with(".safetensors");
            !name.contains('/') && (weights || name == "model.safetensors.index.json" || SIDE_FILES.contains(&name))
        }
    };
    let folder = Hub::from_env()?
        .fetch(RepoKind::Model, id, revision, &wanted)
        .with_context(|| format!("the base {id} (of a repository of GGUF files, name one: hf://{id}/FILE.gguf)"))?;
    let path = file.map_or_else(|| folder.clone(), |file| folder.join(file));
    let there = if file.is_some() { path.is_file() } else { path.join("config.json").is_file() };
    if !there {
        return Err(invalid!(
            "{id} at {revision} has no {}; of a repository of GGUF files name one: hf://{id}/FILE.gguf",
            file.unwrap_or("config.json")
        ));
    }
    Ok(path)
}

#[cfg(not(feature = "hub"))]
fn fetch(model: &HubModel<'_>) -> Result<PathBuf> {
    Err(invalid!(
        "{0}: there is no such file or folder; a model of the hub needs a build with --features hub, or its files \
         fetched by other means and the folder named",
        model.id
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_distinguished_from_paths() {
        let parsed = |text| HubModel::parse(text).map(|m| (m.id, m.revision, m.file));
        let id = |text: &str| text.to_string();
        assert_eq!(parsed("me/model"), Some((id("me/model"), "main", None)));
        assert_eq!(parsed("me/model@v1.0"), Some((id("me/model"), "v1.0", None)));
        assert_eq!(parsed("me/model@abc/q4.gguf"), Some((id("me/model"), "abc", Some("q4.gguf"))));
        for text in ["model", "me/", "/me", "../model", "me/mo del", "me/model/x.bin", "me/model@", "a/b/c"] {
            assert_eq!(parsed(text), None, "{text}");
        }
        // Existing paths, and names that cannot be a model of the hub, are paths.
        for name in ["src/model", "nowhere", "models/llama.gguf", "a/b/c"] {
            assert_eq!(resolve(Path::new(name)).unwrap(), Resolved { path: name.into(), id: None });
        }
        let message = resolve(Path::new("hf://model")).unwrap_err().to_string();
        assert!(message.contains("hf://owner/name@revision"), "{message}");
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn without_the_feature_hub_models_are_refused_with_a_remedy() {
        for name in ["hf://me/model", "me/model", "hf://me/model/q4.gguf"] {
            let error = resolve(Path::new(name)).unwrap_err();
            assert!(error.to_string().contains("--features hub"), "{error}");
            assert_eq!(crate::error::exit_code(&error), 2);
        }
    }
}
