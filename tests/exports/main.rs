//! Models and adapters that leave or enter the program: PEFT's files, GGUF, safetensors, quantised bases, and the server of
//! `serve`.

mod merged;
mod peft_logits;
mod peft_variants;
mod quantised_base;
mod serve;
#[path = "../support/mod.rs"]
mod support;
mod tied_head;
