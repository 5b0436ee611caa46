//! One path or several, as a config file writes them. It does not depend on what lies there.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One path or several.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(untagged, expecting = "must be a path or a list of paths")]
pub enum Paths {
    /// `path = "a.json"`
    One(PathBuf),
    /// `path = ["a.json", "folder"]`
    List(Vec<PathBuf>),
}

impl Default for Paths {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl Paths {
    /// No path at all?
    pub fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    /// No path at all, or the empty one alone, which stands for none?
    pub fn is_blank(&self) -> bool {
        self.as_slice().iter().all(|path| path.as_os_str().is_empty())
    }

    /// All of them, in order.
    pub fn as_slice(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::List(paths) => paths,
        }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [PathBuf] {
        match self {
            Self::One(path) => std::slice::from_mut(path),
            Self::List(paths) => paths,
        }
    }
}

impl From<&str> for Paths {
    fn from(path: &str) -> Self {
        Self::One(path.into())
    }
}
