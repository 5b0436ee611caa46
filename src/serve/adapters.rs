//! The adapters that are served, by name. They come and go while requests run: a request keeps the one that it began with. It
//! does not depend on HTTP. Read `run/model.rs` for how an adapter is checked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use serde_json::{Value, json};

use super::fault::Fault;
use crate::model::adapter::Adapter;
use crate::run::Model;

/// Bytes of an adapter's name.
const LONGEST_NAME: usize = 256;

/// An adapter with its folder.
struct Served {
    adapter: Arc<Adapter>,
    path: PathBuf,
    /// Seconds since 1970.
    created: u64,
}

/// The base's name, and the adapters over it.
pub(super) struct Adapters {
    pub base: String,
    created: u64,
    served: RwLock<BTreeMap<String, Served>>,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    crate::report::clocks::now() as u64
}

impl Adapters {
    pub fn new(base: String) -> Self {
        Self { base, created: now(), served: RwLock::default() }
    }

    /// Loads an adapter under a name; with `in_place`, it may replace one.
    ///
    /// # Errors
    /// 400 for a name that is taken, or an adapter that does not fit; 404 if there is no such folder.
    pub fn load(&self, model: &Model, name: &str, path: &Path, in_place: bool) -> Result<(), Fault> {
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(Fault::field("lora_name", format!("expected a name of 1 to {LONGEST_NAME} bytes")));
        }
        let is_taken =
            |served: &BTreeMap<String, Served>| name == self.base || (!in_place && served.contains_key(name));
        let taken = || {
            let remedy = if name == self.base { "" } else { "; unload it first, or set load_inplace" };
            Fault::field("lora_name", format!("The lora adapter '{name}' has already been loaded{remedy}."))
        };
        if is_taken(&self.served.read().unwrap_or_else(PoisonError::into_inner)) {
            return Err(taken());
        }
        if !path.exists() {
            let shown = path.display();
            return Err(Fault {
                status: 404,
                ..Fault::field("lora_path", format!("there is no folder {shown} on the server"))
            });
        }
        let adapter = model.adapter(path).map_err(|error| Fault { status: 400, ..Fault::of(&error) })?;
        let served = Served { adapter: Arc::new(adapter), path: path.to_owned(), created: now() };
        let mut all = self.served.write().unwrap_or_else(PoisonError::into_inner);
        // Another request may have loaded one of this name meanwhile.
        if is_taken(&all) {
            return Err(taken());
        }
        all.insert(name.to_owned(), served);
        Ok(())
    }

    /// Forgets an adapter; requests that run with it end as they would have.
    ///
    /// # Errors
    /// 404 if there is none of that name.
    pub fn unload(&self, name: &str) -> Result<(), Fault> {
        match self.served.write().unwrap_or_else(PoisonError::into_inner).remove(name) {
            Some(_) => Ok(()),
            None => Err(Fault {
                param: Some("lora_name".into()),
                code: Some("adapter_not_found"),
                ..Fault::new(404, format!("The lora adapter '{name}' cannot be found."))
            }),
        }
    }

    /// The adapter of a name; `None` is the base itself.
    ///
    /// # Errors
    /// 404 if nothing has that name.
    pub fn find(&self, name: Option<&str>) -> Result<Option<Arc<Adapter>>, Fault> {
        let Some(name) = name.filter(|name| *name != self.base) else { return Ok(None) };
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        served.get(name).map(|served| Some(served.adapter.clone())).ok_or_else(|| Fault::no_model(name))
    }

    /// The adapter that writes text under a name.
    ///
    /// # Errors
    /// 404 if nothing has that name; 400 if it is a reward model.
    pub fn policy(&self, name: Option<&str>) -> Result<Option<Arc<Adapter>>, Fault> {
        let adapter = self.find(name)?;
        if adapter.as_ref().is_some_and(|adapter| adapter.head().is_some()) {
            return Err(Fault::field(
                "model",
                "is an adapter with a score head, which writes no text; ask POST /score",
            ));
        }
        Ok(adapter)
    }

    /// The reward adapter of a name; without one, the only one there is. Returns its name, too.
    ///
    /// # Errors
    /// 404 if nothing has that name; 400 if it has no score head, or there is not exactly one.
    pub fn reward(&self, name: Option<&str>) -> Result<(String, Arc<Adapter>), Fault> {
        if let Some(name) = name {
            return match self.find(Some(name))? {
                Some(adapter) if adapter.head().is_some() => Ok((name.to_owned(), adapter)),
                _ => Err(Fault::field(
                    "model",
                    format!("{name:?} has no score head; name an adapter of `fourfold reward`"),
                )),
            };
        }
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        let mut rewards = served.iter().filter(|(_, served)| served.adapter.head().is_some());
        match (rewards.next(), rewards.next()) {
            (Some((name, served)), None) => Ok((name.clone(), served.adapter.clone())),
            (None, _) => Err(Fault::field("model", "no reward adapter is loaded; load one of `fourfold reward`")),
            _ => Err(Fault::field("model", "is missing, and several reward adapters are loaded; name one")),
        }
    }

    /// The reply of `/v1/models`. `context`: tokens of a prompt with its response.
    pub fn list(&self, root: &str, context: usize) -> Value {
        let entry = |name: &str, created: u64, root: &str, parent: Option<&str>| {
            json!({
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "fourfold",
                "root": root,
                "parent": parent,
                "max_model_len": context,
            })
        };
        let mut data = vec![entry(&self.base, self.created, root, None)];
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        let adapters = served
            .iter()
            .map(|(name, served)| entry(name, served.created, &served.path.display().to_string(), Some(&self.base)));
        data.extend(adapters);
        json!({ "object": "list", "data": data })
    }
}
