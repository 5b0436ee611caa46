//! The real models' files. Tests over them are ignored unless they are asked for with `--ignored`, and then require them.
//! It asserts no claim.

use std::path::PathBuf;

/// SmolLM2-135M-Instruct as a GGUF in Q4_1.
pub fn smollm2() -> PathBuf {
    named_by("FOURFOLD_SMOLLM2_GGUF", "fetch-smollm2.sh")
}

/// Gemma 3 270M as a GGUF.
pub fn gemma3() -> PathBuf {
    named_by("FOURFOLD_GEMMA3_GGUF", "fetch-gemma3.sh")
}

fn named_by(variable: &str, script: &str) -> PathBuf {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty());
    path.unwrap_or_else(|| panic!("{variable} is not set; export {variable}=$(tests/fetch/{script})")).into()
}
