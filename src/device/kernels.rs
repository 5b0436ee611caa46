//! The texts of all kernels: the prelude, then every operation's `gpu.cu`. The emulated machine compiles one text; for a
//! card they are compiled in parts, several at a time, because NVRTC takes most of a minute for all of them on one core.
//! It does not depend on any machine. Read prelude.cu next, which states how a kernel is written.

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
    ("linear/gpu_low_rank.cu", include_str!("../ops/linear/gpu_low_rank.cu")),
    ("norm/gpu.cu", include_str!("../ops/norm/gpu.cu")),
    ("rope/gpu.cu", include_str!("../ops/rope/gpu.cu")),
    ("columns/gpu.cu", include_str!("../ops/columns/gpu.cu")),
    ("activation/gpu.cu", include_str!("../ops/activation/gpu.cu")),
    ("attention/gpu.cu", include_str!("../ops/attention/gpu.cu")),
    ("attention/gpu_tiles.cu", include_str!("../ops/attention/gpu_tiles.cu")),
    ("logprobs/gpu.cu", include_str!("../ops/logprobs/gpu.cu")),
    ("kl/gpu.cu", include_str!("../ops/kl/gpu.cu")),
    ("divergence/gpu.cu", include_str!("../ops/divergence/gpu.cu")),
    ("rows/gpu.cu", include_str!("../ops/rows/gpu.cu")),
    ("sample/gpu.cu", include_str!("../ops/sample/gpu.cu")),
];

/// The files whose kernels a part holds. Every file stands in exactly one part but the first and `common.cu`, which have
/// no kernels. Parts of equal compile time are best.
const PARTS: &[&[&str]] = &[
    &["storage/gpu.cu", "embedding/gpu.cu"],
    &["linear/gpu_gemv.cu"],
    &["norm/gpu.cu", "rope/gpu.cu"],
    &["columns/gpu.cu", "activation/gpu.cu", "rows/gpu.cu", "sample/gpu.cu", "linear/gpu_low_rank.cu"],
    &["attention/gpu.cu", "logprobs/gpu.cu", "kl/gpu.cu", "divergence/gpu.cu"],
    &["attention/gpu_tiles.cu"],
];

/// Files whose types and helpers other files use.
const SHARED: &[&str] = &["prelude.cu", "storage/gpu.cu", "common.cu", "logprobs/gpu.cu"];

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

/// Texts that together have every kernel of [`text`] once. A part declares the kernels of files that it only shares as
/// functions that nobody calls.
pub fn parts() -> Vec<String> {
    let kernel = |becomes: &str| format!("#undef KERNEL\n#define KERNEL(name, Args, threads, ...) {becomes}\n");
    let declared = kernel("static __device__ __forceinline__ void name(const Args& a)");
    let entry = kernel("ENTRY(name, Args, threads, ##__VA_ARGS__)");
    let part = |own: &&[&str]| {
        let mut all = String::new();
        for (name, text) in TEXTS.iter().filter(|(name, _)| own.contains(name) || SHARED.contains(name)) {
            let macros = match *name {
                "prelude.cu" => "",
                name if own.contains(&name) => &entry,
                _ => &declared,
            };
            let _ = writeln!(all, "{macros}#line 1 \"{name}\"\n{}", text.trim_end());
        }
        all
    };
    PARTS.iter().map(part).collect()
}

/// The prelude followed by another text, for tests that bring kernels of their own.
pub fn with_prelude(text: &str) -> String {
    join(&[TEXTS[0], ("test.cu", text)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_with_kernels_stands_in_exactly_one_part() {
        for (name, text) in TEXTS.iter().skip(1) {
            let parts = PARTS.iter().filter(|part| part.contains(name)).count();
            assert_eq!(parts, usize::from(text.contains("KERNEL(")), "{name}");
        }
        assert_eq!(parts().len(), PARTS.len());
    }
}
