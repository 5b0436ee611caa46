//! Samples on the page: how the responses to held-out prompts changed, and responses whose tokens are coloured by log-ratio,
//! advantage or value, so that one sees where the reward lands. It does not depend on a tokenizer: samples.jsonl has the
//! tokens' texts.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write;

use serde_json::Value;

use super::html::{escape, short};
use crate::report::Metrics;

/// Held-out prompts that are remembered, responses that are remembered for each, and prompts that are shown of each kind.
const PROMPTS: usize = 256;
const RESPONSES: usize = 6;
const SHOWN: usize = 2;
/// Newest samples that are remembered, for `watch`.
const RECENT: usize = 64;
/// Tokens of a response that are coloured, and characters of a text that are shown.
const COLOURED: usize = 2000;
const CHARACTERS: usize = 100_000;

/// The samples of a run that its page may show.
#[derive(Default)]
pub(crate) struct Samples {
    /// Those of the last lines, newest first, without their tokens.
    pub recent: VecDeque<Sample>,
    /// Samples that were read.
    pub count: usize,
    prompts: Vec<Prompt>,
    index: HashMap<String, usize>,
    /// Responses of the first iteration with tokens, and of the last.
    first: Vec<Sample>,
    last: Vec<Sample>,
}

struct Prompt {
    text: String,
    responses: Vec<Sample>,
}

/// One line of samples.jsonl.
#[derive(Clone, Default)]
pub(crate) struct Sample {
    /// `before`, `after` or the iteration.
    pub when: String,
    pub prompt: String,
    pub response: String,
    pub score: Option<f64>,
    pub gold: Option<f64>,
    pub kl: Option<f64>,
    /// Distillation's loss, nats per token.
    pub loss: Option<f64>,
    pub finish: String,
    tokens: Vec<String>,
    /// By token: log-ratio, advantage, value.
    by_token: [Vec<f64>; 3],
}

impl Sample {
    fn of(line: &Metrics, when: &Value) -> Self {
        let text = |key: &str| line.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let number = |key: &str| line.get(key).and_then(Value::as_f64);
        let list = |key: &str| line.get(key).and_then(Value::as_array).map_or(&[][..], |list| list);
        let numbers = |key: &str| list(key).iter().map(|v| v.as_f64().unwrap_or(f64::NAN)).collect();
        Self {
            when: when.as_str().map_or_else(|| when.to_string(), str::to_owned),
            prompt: text("prompt"),
            response: text("response"),
            score: number("score"),
            gold: number("gold"),
            kl: number("kl"),
            loss: number("loss"),
            finish: text("finish_reason"),
            tokens: list("tokens").iter().map(|v| v.as_str().unwrap_or_default().to_owned()).collect(),
            by_token: ["log_ratio", "advantages", "values"].map(numbers),
        }
    }

    /// When it was made, its figures and how it ended, in a line.
    pub(crate) fn line(&self) -> String {
        let when = match self.when.as_str() {
            "before" if self.loss.is_some() => "before training".into(),
            "before" => "before training (SFT)".into(),
            "after" => "after training".into(),
            iteration => format!("iteration {iteration}"),
        };
        let mut parts = vec![when];
        for (name, value) in [("score", self.score), ("gold", self.gold), ("KL", self.kl), ("loss", self.loss)] {
            parts.extend(value.map(|value| format!("{name} {}", short(value))));
        }
        parts.push(match self.finish.as_str() {
            "length" => "cut off by length".into(),
            "stop" => "ended".into(),
            other => other.into(),
        });
        parts.join(" · ")
    }
}

impl Samples {
    /// Adds a line of samples.jsonl.
    pub fn add(&mut self, line: &Metrics) {
        if let Some(when) = line.get("evaluation").or(line.get("iteration")) {
            self.count += 1;
            self.recent.truncate(RECENT - 1);
            let sample = Sample { tokens: vec![], by_token: Default::default(), ..Sample::of(line, when) };
            self.recent.push_front(sample);
        }
        if let Some(when) = line.get("evaluation") {
            let sample = Sample::of(line, when);
            let at = match self.index.get(&sample.prompt) {
                Some(&at) => at,
                None if self.prompts.len() == PROMPTS => return,
                None => {
                    self.index.insert(sample.prompt.clone(), self.prompts.len());
                    self.prompts.push(Prompt { text: sample.prompt.clone(), responses: vec![] });
                    self.prompts.len() - 1
                }
            };
            let responses = &mut self.prompts[at].responses;
            responses.push(sample);
            if responses.len() > RESPONSES + 2 {
                // The first and the newest stay, and every second between them.
                let last = responses.len() - 1;
                let mut i = 0;
                responses.retain(|_| {
                    i += 1;
                    i == 1 || i > last || i % 2 == 1
                });
            }
        } else if let Some(when) = line.get("iteration") {
            let sample = Sample::of(line, when);
            if self.first.first().is_none_or(|first| first.when == sample.when) {
                self.first.push(sample);
            } else if self.last.first().is_some_and(|last| last.when == sample.when) {
                self.last.push(sample);
            } else if !sample.tokens.is_empty() || self.last.first().is_none_or(|last| last.tokens.is_empty()) {
                self.last = vec![sample];
            }
        }
    }

    /// The section's HTML; empty if there is no sample.
    pub fn html(&self) -> String {
        let mut out = String::new();
        let coloured = self.coloured();
        if !coloured.is_empty() {
            out += "<h3>Where the reward lands</h3><p class=say>Each token's colour is its advantage (the weight of its \
                    policy gradient), its log-ratio to the reference, or the critic's value. Strongest colour = the greatest \
                    magnitude within the response; the numbers are in each token's title.</p>\
                    <div class=tokens data-by=a><div class=pick role=group aria-label=\"Colour tokens by\">\
                    <button data-by=a aria-pressed=true>advantage</button><button data-by=r>log-ratio</button>\
                    <button data-by=v>value</button><span class=scale><i class=m5>−</i><i class=m2>&nbsp;</i><i>0</i>\
                    <i class=p2>&nbsp;</i><i class=p5>+</i></span></div>";
            for (label, sample) in coloured {
                let _ = write!(
                    out,
                    "<article class=card><h4><span class=badge>{label}</span> {}</h4>\
                     <div class=prompt dir=auto>{}</div><div class=text dir=auto>{}</div></article>",
                    escape(&sample.line()),
                    cut(sample.prompt.trim_matches('\n')),
                    spans(sample)
                );
            }
            out += "</div>";
        }
        let chosen = self.chosen();
        if !chosen.is_empty() {
            out += "<h3>Held-out prompts through the run</h3>";
            for (label, prompt) in chosen {
                let _ = write!(
                    out,
                    "<article class=card><h4><span class=badge>{label}</span></h4><div class=prompt dir=auto>{}</div>",
                    cut(prompt.text.trim_matches('\n'))
                );
                for sample in &prompt.responses {
                    let _ = write!(
                        out,
                        "<h5>{}</h5><div class=text dir=auto>{}</div>",
                        escape(&sample.line()),
                        cut(&sample.response)
                    );
                }
                out += "</article>";
            }
        }
        out
    }

    /// Best, worst and some other responses of the last iteration, and one of the first.
    fn coloured(&self) -> Vec<(&'static str, &Sample)> {
        let newest = if self.last.is_empty() { &self.first } else { &self.last };
        let mut order: Vec<&Sample> = newest.iter().collect();
        order.sort_by(|a, b| score(b).total_cmp(&score(a)));
        let mut chosen: Vec<(&str, &Sample)> = order.first().map(|best| ("best", *best)).into_iter().collect();
        if order.len() > 2 {
            chosen.push(("random", order[order.len() / 2]));
        }
        if order.len() > 1 {
            chosen.push(("worst", order[order.len() - 1]));
        }
        if !self.last.is_empty() {
            chosen.extend(self.first.first().map(|first| ("at the start", first)));
        }
        chosen
    }

    /// The prompts with the greatest and the least gain in score, and some others.
    fn chosen(&self) -> Vec<(&'static str, &Prompt)> {
        let gain = |prompt: &Prompt| {
            let ends = prompt.responses.first().zip(prompt.responses.last());
            ends.map_or(
                0.0,
                |(first, last)| if prompt.responses.len() > 1 { score(last) - score(first) } else { score(last) },
            )
        };
        let mut order: Vec<&Prompt> = self.prompts.iter().collect();
        order.sort_by(|a, b| gain(b).total_cmp(&gain(a)));
        let n = order.len();
        let best = order.iter().take(SHOWN.min(n)).map(|p| ("best", *p));
        let middle = order.iter().skip(n / 2).take(if n > 3 * SHOWN { SHOWN } else { 0 }).map(|p| ("random", *p));
        let worst = order.iter().skip(n.saturating_sub(SHOWN).max(SHOWN)).map(|p| ("worst", *p));
        best.chain(middle).chain(worst).collect()
    }
}

fn score(sample: &Sample) -> f64 {
    sample.gold.or(sample.score).unwrap_or(f64::NEG_INFINITY)
}

/// A text as HTML, without what is beyond [`CHARACTERS`], which is said.
fn cut(text: &str) -> String {
    match text.char_indices().nth(CHARACTERS) {
        None => escape(text),
        Some((at, _)) => {
            let more = text[at..].chars().count();
            format!("{}<em> … {more} more characters are in samples.jsonl</em>", escape(&text[..at]))
        }
    }
}

/// The response's tokens, each with its classes; the text alone where samples.jsonl has no tokens.
fn spans(sample: &Sample) -> String {
    if sample.tokens.is_empty() {
        return cut(&sample.response);
    }
    let greatest = sample
        .by_token
        .each_ref()
        .map(|v| v.iter().filter(|v| v.is_finite()).fold(0.0, |most: f64, v| most.max(v.abs())));
    let mut out = String::new();
    for (i, token) in sample.tokens.iter().enumerate().take(COLOURED) {
        let (mut classes, mut title) = (String::new(), String::new());
        for (kind, name) in [("r", "log-ratio"), ("a", "advantage"), ("v", "value")].into_iter().enumerate() {
            let Some(value) = sample.by_token[kind].get(i).filter(|v| v.is_finite()) else { continue };
            let level = (5.0 * value / greatest[kind].max(1e-12)).round();
            if level != 0.0 {
                let _ = write!(classes, "{}{level} ", name.0);
            }
            let _ = writeln!(title, "{} {}", name.1, short(*value));
        }
        let last = i + 1 == sample.tokens.len();
        let text = match token.as_str() {
            "" if last && sample.finish == "stop" => "⟨end⟩".into(),
            "" => "▫".into(),
            token => escape(token),
        };
        let _ = write!(out, "<i class=\"{}\" title=\"{}\">{text}</i>", classes.trim_end(), title.trim_end());
    }
    if sample.tokens.len() > COLOURED {
        let rest = sample.tokens[COLOURED..].concat();
        let _ = write!(
            out,
            "<em> … the next {} tokens without colour: </em>{}",
            sample.tokens.len() - COLOURED,
            cut(&rest)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(value: Value) -> Metrics {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_text_of_markup_and_one_of_many_tokens_are_shown_as_text() {
        let mut samples = Samples::default();
        let tokens: Vec<String> = (0..10_000).map(|i| format!(" <b>{i}")).collect();
        let values: Vec<f64> = (0..10_000).map(f64::from).collect();
        samples.add(&line(json!({
            "iteration": 1, "prompt": "<script>alert(1)</script>", "response": tokens.concat(), "tokens": tokens,
            "log_ratio": values, "advantages": values, "score": 1.5, "kl": 0.1, "finish_reason": "length",
        })));
        let html = samples.html();
        assert!(!html.contains("<script") && !html.contains("<b>") && html.contains("&lt;script&gt;"));
        assert!(html.contains("&lt;b&gt;9999</div>") && html.contains("the next 8000 tokens"));
        assert!(html.len() < 600_000, "{}", html.len());
        assert!(html.contains("title=\"log-ratio 7\nadvantage 7\">"), "a colour of level 0 is no class");
    }

    #[test]
    fn best_and_worst_are_by_the_gain_and_a_prompt_keeps_its_first_and_newest_response() {
        let mut samples = Samples::default();
        for iteration in 0..40 {
            for prompt in 0..9 {
                let when = if iteration == 0 { json!("before") } else { json!(iteration) };
                samples.add(&line(json!({
                    "evaluation": when, "prompt": format!("p{prompt}"), "response": format!("r{iteration}"),
                    "score": f64::from(prompt * iteration), "finish_reason": "stop",
                })));
            }
        }
        let chosen: Vec<_> = samples.chosen().iter().map(|(label, p)| format!("{label} {}", p.text)).collect();
        assert_eq!(chosen, ["best p8", "best p7", "random p4", "random p3", "worst p1", "worst p0"]);
        for prompt in &samples.prompts {
            let whens: Vec<&str> = prompt.responses.iter().map(|r| r.when.as_str()).collect();
            assert!(
                whens.len() <= RESPONSES + 2 && whens[0] == "before" && *whens.last().unwrap() == "39",
                "{whens:?}"
            );
        }
    }
}
