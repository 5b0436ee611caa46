//! Real models: SmolLM2-135M-Instruct and Gemma 3 270M. The tests run where `FOURFOLD_SMOLLM2_GGUF` and
//! `FOURFOLD_GEMMA3_GGUF` name the files (tests/fetch/fetch-smollm2.sh and fetch-gemma3.sh print them); with
//! `FOURFOLD_REQUIRE_REAL_MODEL=1` their absence is a failure.

#[path = "../support/encoders.rs"]
mod encoders;
mod fast_encoder;
mod memory;
mod model;
mod perplexity;
#[path = "../support/mod.rs"]
mod support;
mod tokenizer;
