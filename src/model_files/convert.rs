//! Commands that convert files which are not read, for error messages.
//!
//! PyTorch's `.bin` files are pickles, which run code when they are read; Python converts them once. It does not depend on the
//! rest of the crate.

use std::path::Path;

/// A path as a Python string literal inside of double quotes of a shell. A path with characters that mean something to either is
/// left to the reader, but for its last part.
fn quoted(path: &Path) -> String {
    let shown = path.display().to_string();
    match shown.contains(['"', '$', '`', '\\', '\'', '!', '\n']) {
        true => format!("'FOLDER/{}'", path.extension().and(path.file_name()).unwrap_or_default().display()),
        false => format!("'{shown}'"),
    }
}

/// The end of an error message about a missing safetensors file: if the folder has the pickle `bin` of the same tensors, the
/// command that converts it.
pub(crate) fn pickled(dir: &Path, bin: &str) -> String {
    let from = dir.join(bin);
    if !from.exists() {
        return String::new();
    }
    let to = from.with_extension("safetensors");
    format!(
        "; its {bin} is a pickle, which is not read. This command converts it:\n  python3 -c \"import torch; from \
         safetensors.torch import save_file; save_file({{k: v.contiguous().clone() for k, v in torch.load({}, 'cpu', \
         weights_only=True).items()}}, {}, {{'format': 'pt'}})\"",
        quoted(&from),
        quoted(&to)
    )
}

/// The same for a whole model, whose pickle `bin` may be several files.
pub(crate) fn model(dir: &Path, bin: &str) -> String {
    let folder = quoted(dir);
    format!(
        "; its {bin} is a pickle, which is not read. This command converts it:\n  python3 -c \"from transformers import \
         AutoModelForCausalLM as M; M.from_pretrained({folder}, dtype='auto').save_pretrained({folder})\""
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pickle_gets_the_command_that_converts_it_and_another_folder_gets_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(pickled(dir.path(), "adapter_model.bin"), "");
        std::fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
        let said = pickled(dir.path(), "adapter_model.bin");
        assert!(said.contains("python3 -c") && said.contains("adapter_model.safetensors'"), "{said}");
        assert_eq!(quoted(Path::new("a b/c.bin")), "'a b/c.bin'");
        assert_eq!(quoted(Path::new("$(x)/c.bin")), "'FOLDER/c.bin'");
        assert_eq!(quoted(Path::new("$(x)")), "'FOLDER/'");
    }
}
