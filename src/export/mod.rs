//! Exports: merged models, classifiers, GGUF files and GGUF-LoRA adapters.
//!
//! Each is reopened and compared with base + adapter before it is renamed into place. It does not depend on stages or the
//! configuration of runs. Read `verify` (the comparison) and `staged` (the renaming), then `merged` (Hugging Face directories),
//! `gguf` (llama.cpp's files, with `gguf_container`, `gguf_parts`, `gguf_architecture` and `gguf_vocabulary`), `combine` (a
//! weighted sum of adapters), `card` (the model card).

pub mod card;
pub mod combine;
pub mod gguf;
mod gguf_architecture;
pub mod gguf_container;
mod gguf_parts;
mod gguf_vocabulary;
pub mod merged;
pub mod staged;
pub mod verify;

use anyhow::Result;

use crate::invalid;
use crate::model::adapter::{Adapter, NonBlockModule};
use crate::model::base::Base;
use crate::model_files::ModelFiles;

/// What is exported, and the prompts that the result is compared on.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Files and tokenizer of the base.
    pub files: &'a ModelFiles,
    /// Weights of the base.
    pub base: &'a Base,
    /// The adapter over it.
    pub adapter: &'a Adapter,
    /// Token ids on which the export is compared; at least one sequence.
    pub prompts: &'a [Vec<u32>],
    /// The section on training in the model card, in Markdown; may be empty.
    pub about: &'a str,
}

impl Source<'_> {
    /// An export's base on the machine of the base that it is compared with.
    ///
    /// # Errors
    /// If it does not fit there.
    fn beside(&self, exported: Base) -> Result<Base> {
        let compute = self.base.lm_head(None).weight.compute();
        exported.computing_in(compute).on(self.base.place().cloned(), |_, _| {})
    }

    /// Checks that a GGUF file can express the merged model.
    ///
    /// # Errors
    /// If llama.cpp does not have the base's architecture, or the adapter has a branch on a tied lm_head, or on the embedding.
    fn check_gguf_model(&self) -> Result<()> {
        if self.files.gguf().is_none() {
            gguf_architecture::name(self.base.config())?;
        }
        if merged::unties(self.base, self.adapter) {
            return Err(invalid!(
                "embedding and lm_head of the base are tied and the adapter has a branch on one, so the merged model is \
                 not tied; merge with `--format safetensors` and convert the result"
            ));
        }
        if self.adapter.outer(NonBlockModule::Embedding).is_some() {
            return Err(invalid!(
                "a branch on the embedding can be exported with `--format safetensors` only; convert the result"
            ));
        }
        Ok(())
    }

    /// Why a GGUF-LoRA file cannot express the adapter, or llama.cpp not run its base: DoRA magnitudes, branches on embedding or
    /// lm_head, an architecture that llama.cpp does not have. `None` where nothing is in the way.
    pub fn gguf_lora_obstacle(&self) -> Option<String> {
        let tables = [NonBlockModule::Embedding, NonBlockModule::Head];
        let config = self.base.config();
        if self.adapter.config().use_dora {
            Some("a GGUF-LoRA file cannot store a DoRA adapter's magnitudes".into())
        } else if tables.into_iter().any(|outer| self.adapter.outer(outer).is_some()) {
            Some("branches on the embedding or lm_head cannot be written to GGUF-LoRA files".into())
        } else if self.files.gguf().is_none() && gguf_architecture::name(config).is_err() {
            Some(format!("llama.cpp has no {} architecture", config.names().model_type))
        } else {
            None
        }
    }
}
