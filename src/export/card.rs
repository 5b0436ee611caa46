//! The model card: README.md of a merged model. Says what was trained over what, and how the file was proven. Knows
//! nothing that base and adapter do not say themselves.

use std::fmt::Write;

use super::Source;
use super::merged::{Kind, Settings};
use super::verify::Comparison;

/// The card of a merged directory.
pub(super) fn model(source: &Source<'_>, settings: Settings, comparison: &Comparison) -> String {
    let name = &source.base.config().model_name;
    let config = source.adapter.config();
    let (task, loads) = match settings.kind {
        Kind::LanguageModel => ("text-generation", "AutoModelForCausalLM"),
        Kind::Classifier => ("text-classification", "AutoModelForSequenceClassification"),
    };
    let mut card = format!("---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [fourfold, lora]\n---\n\n");
    // Writing to a string cannot fail.
    let mut line = |text: String| writeln!(card, "{text}").is_ok();
    line(format!("# {name}, fine-tuned\n"));
    line(format!(
        "A LoRA adapter merged into {name} with fourfold {}; `{loads}.from_pretrained` opens this folder.\n",
        env!("CARGO_PKG_VERSION")
    ));
    let origin = source.adapter.provenance().base_model.as_deref();
    line(format!("- base: {}", origin.unwrap_or(name)));
    line(format!("- fingerprint of the base's weights: {}", source.base.fingerprint()));
    let (r, alpha, scale) = (config.r, config.lora_alpha, config.scaling());
    line(format!(
        "- adapter: r = {r}, lora_alpha = {alpha}, scale {scale}, {} numbers",
        source.adapter.num_parameters()
    ));
    line(format!("- weights: {}", settings.dtype.torch_name()));
    if let (Kind::Classifier, Some(head)) = (settings.kind, source.adapter.head()) {
        line("- score: one label, the score of a sequence's last token".into());
        if head.bias != 0.0 {
            line(format!(
                "- the head was trained with a bias of {}, which transformers has no place for: scores here are lower \
                 by it; differences of scores are the same",
                head.bias
            ));
        }
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
