//! Real models: SmolLM2-135M-Instruct and Gemma 3 270M. The tests are ignored unless they are asked for with `-- --ignored`;
//! then `FOURFOLD_SMOLLM2_GGUF` and `FOURFOLD_GEMMA3_GGUF` have to name the files (tests/fetch/fetch-smollm2.sh and
//! fetch-gemma3.sh print them).

#[path = "../support/encoders.rs"]
mod encoders;
mod fast_encoder;
mod memory;
mod model;
mod perplexity;
#[path = "../support/real_files.rs"]
mod real_files;
#[path = "../support/mod.rs"]
mod support;
mod tokenizer;
