//! Adapters and merged models that leave or enter the program: PEFT's files, GGUF, safetensors and quantised bases.

mod merged;
mod peft_logits;
mod peft_variants;
mod quantised_base;
#[path = "../support/mod.rs"]
mod support;
mod tied_head;
