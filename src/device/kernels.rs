//! The one text of all kernels: the prelude, then every operation's `gpu.cu`. Knows no machine and compiles nothing; an
//! operation with kernels adds its line to `TEXTS`. Read prelude.cu next: it says how a kernel is written.

use std::fmt::Write;
use std::sync::OnceLock;

/// Name and text of each file, in the order in which they are compiled. Helpers that are not static must have names of
/// their own, because all files are one text.
const TEXTS: &[(&str, &str)] = &[
    ("prelude.cu", include_str!("prelude.cu")),
    ("storage/gpu.cu", include_str!("../ops/storage/gpu.cu")),
    ("embedding/gpu.cu", include_str!("../ops/embedding/gpu.cu")),
    ("linear/gpu_gemv.cu", include_str!("../ops/linear/gpu_gemv.cu")),
    ("common.cu", include_str!("../ops/common.cu")),
    ("norm/gpu.cu", include_str!("../ops/norm/gpu.cu")),
    ("rope/gpu.cu", include_str!("../ops/rope/gpu.cu")),
    ("columns/gpu.cu", include_str!("../ops/columns/gpu.cu")),
    ("activation/gpu.cu", include_str!("../ops/activation/gpu.cu")),
    ("attention/gpu.cu", include_str!("../ops/attention/gpu.cu")),
    ("logprobs/gpu.cu", include_str!("../ops/logprobs/gpu.cu")),
    ("kl/gpu.cu", include_str!("../ops/kl/gpu.cu")),
    ("rows/gpu.cu", include_str!("../ops/rows/gpu.cu")),
];

/// Joins files to one text whose compiler errors name the file and its line.
pub fn join(texts: &[(&str, &str)]) -> String {
    let mut all = String::new();
    for (name, text) in texts {
        // Writing to a `String` cannot fail.
        let _ = writeln!(all, "#line 1 \"{name}\"\n{}", text.trim_end());
    }
    all
}

/// The text of all kernels.
pub fn text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| join(TEXTS))
}

/// The prelude followed by another text, for tests that bring kernels of their own.
pub fn with_prelude(text: &str) -> String {
    join(&[TEXTS[0], ("test.cu", text)])
}
