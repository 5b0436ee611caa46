//! What leaves: merged models, classifiers, GGUF files, adapters for other programs; each is reopened, replayed and
//! compared before it gets its name.
//!
//! Read `verify` (the comparison) and `staged` (the name), then `merged` (Hugging Face directories), `gguf` (llama.cpp's
//! files, with `gguf_container`, `gguf_architecture` and `gguf_vocabulary` beneath), `combine` (several adapters as one), `card`.

pub mod card;
pub mod combine;
pub mod gguf;
mod gguf_architecture;
pub mod gguf_container;
mod gguf_vocabulary;
pub mod merged;
pub mod staged;
pub mod verify;

use anyhow::Result;

use crate::invalid;
use crate::model::adapter::{Adapter, NonBlockModule};
use crate::model::base::Base;
use crate::model_files::ModelFiles;

/// What is exported, and what the result is compared on.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The base's files and tokenizer.
    pub files: &'a ModelFiles,
    /// Its weights.
    pub base: &'a Base,
    /// What was trained over it.
    pub adapter: &'a Adapter,
    /// Token ids to replay; at least one sequence.
    pub prompts: &'a [Vec<u32>],
    /// What the model card says of the training, in Markdown; may be empty.
    pub about: &'a str,
}

impl Source<'_> {
    /// # Errors
    /// If a GGUF file could not hold the merged model: one table for both ends, of which the adapter changes one.
    fn check_gguf_model(&self) -> Result<()> {
        if merged::parts_the_ends(self.base, self.adapter) {
            return Err(invalid!(
                "the base has one table for both ends and the adapter a branch on it, so the merged model has two tables; \
                 merge with `--format safetensors` and convert the result"
            ));
        }
        if self.adapter.outer(NonBlockModule::Embedding).is_some() {
            return Err(invalid!(
                "a branch on the token table goes into `--format safetensors` only; convert the result"
            ));
        }
        Ok(())
    }

    /// # Errors
    /// If a GGUF-LoRA file cannot say what the adapter does.
    fn check_gguf_lora(&self) -> Result<()> {
        let tables = [NonBlockModule::Embedding, NonBlockModule::Head];
        let what = if self.adapter.config().use_dora {
            "a DoRA adapter's magnitudes have no place in a GGUF-LoRA file"
        } else if tables.into_iter().any(|outer| self.adapter.outer(outer).is_some()) {
            "branches on the token table or the output table are not written into GGUF-LoRA files"
        } else {
            return Ok(());
        };
        Err(invalid!("{what}; merge the adapter into the base instead: `--format gguf` or `--format safetensors`"))
    }
}
