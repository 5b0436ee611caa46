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

use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::checkpoint::Checkpoint;

/// What is exported, and what the result is compared on.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The base's files and tokenizer.
    pub checkpoint: &'a Checkpoint,
    /// Its weights.
    pub base: &'a Base,
    /// What was trained over it.
    pub adapter: &'a Adapter,
    /// Token ids to replay; at least one sequence.
    pub prompts: &'a [Vec<u32>],
    /// What the model card says of the training, in Markdown; may be empty.
    pub about: &'a str,
}
