//! The model card of an export: base, adapter, and the result of the verification.
//!
//! It is README.md in a folder and NAME.gguf.md beside a GGUF file. It does not depend on the format of the export. Read
//! `verify.rs` next.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::Source;
use super::verify::Comparison;

/// The part of a model card that depends on the format of the export.
pub struct Card<'a> {
    /// The YAML front matter between `---`: `library_name: transformers` and the like.
    pub front: &'a str,
    /// One sentence: what was exported, and which program opens it.
    pub made: String,
    /// Type of the weights.
    pub weights: &'a str,
    /// Further notes, one per line.
    pub notes: Vec<String>,
}

impl Card<'_> {
    /// The card's Markdown.
    pub fn text(&self, source: &Source<'_>, comparison: &Comparison) -> String {
        let name = &source.base.config().model_name;
        let config = source.adapter.config();
        let mut card = format!("---\n{}\ntags: [fourfold, lora]\n---\n\n", self.front);
        // Writing to a string cannot fail.
        let mut line = |text: String| writeln!(card, "{text}").is_ok();
        line(format!("# {name}, fine-tuned\n"));
        line(format!("{}\n", self.made));
        let origin = source.adapter.provenance().base_model.as_deref();
        line(format!("- base: {}", origin.unwrap_or(name)));
        line(format!("- fingerprint of the base's weights: {}", source.base.fingerprint()));
        let (r, alpha, scale) = (config.r, config.lora_alpha, config.scaling());
        line(format!(
            "- adapter: r = {r}, lora_alpha = {alpha}, scale {scale}, {} numbers",
            source.adapter.num_parameters()
        ));
        line(format!("- weights: {}", self.weights));
        for note in &self.notes {
            line(format!("- {note}"));
        }
        line("\n## Verification\n".into());
        line("The written files were reopened and replayed against base + adapter:\n".into());
        line("| positions | largest logit difference | largest logit | mean KL, nats | greedy agreement |".into());
        line("|---|---|---|---|---|".into());
        line(format!(
            "| {} | {:.2e} | {:.2} | {:.2e} | {:.2}% |",
            comparison.positions,
            comparison.max_logit_difference,
            comparison.max_logit,
            comparison.mean_kl,
            100.0 * comparison.greedy_agreement
        ));
        if !source.about.is_empty() {
            line(format!("\n## Training\n\n{}", source.about.trim_end()));
        }
        card
    }
}

/// Name and version of the program, for a card's first sentence.
pub const BY: &str = concat!("fourfold ", env!("CARGO_PKG_VERSION"));

/// Path of the card of a file.
pub fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".md");
    name.into()
}
