//! What a quickstart found: the table for people and the object for `--json`. Knows no training.

use std::fmt::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::gold::Gold;
use crate::export::verify::Comparison;
use crate::model::adapter::Adapter;
use crate::report::number;
use crate::reward::train::Evaluation;
use crate::run::Model;
use crate::stats::Share;

/// One policy's answers to the held-out questions. All (questions).
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// As sampled.
    pub texts: Vec<String>,
    /// The gold rule's verdicts.
    pub gold: Vec<Gold>,
    /// The learned reward.
    pub rewards: Vec<f32>,
    /// sum of log-probabilities minus the SFT model's, nats a response.
    pub kl: Vec<f64>,
    /// How many ended by the end token.
    pub ended: usize,
}

impl Answers {
    fn mean(&self, of: impl Fn(&Gold) -> f64) -> f64 {
        self.gold.iter().map(of).sum::<f64>() / self.gold.len() as f64
    }

    /// Mean gold score.
    pub fn gold_mean(&self) -> f64 {
        self.mean(|g| g.total)
    }

    /// Share of answers that name the asked aspect where the gold rule wants it.
    pub fn aspect_share(&self) -> f64 {
        self.mean(|g| f64::from(g.aspect))
    }

    /// Share of answers that name the asked place.
    pub fn place_share(&self) -> f64 {
        self.mean(|g| f64::from(g.place))
    }

    /// Mean KL, nats a response.
    pub fn kl_mean(&self) -> f64 {
        self.kl.iter().sum::<f64>() / self.kl.len() as f64
    }

    /// Mean learned reward.
    pub fn reward_mean(&self) -> f64 {
        self.rewards.iter().map(|&r| f64::from(r)).sum::<f64>() / self.rewards.len() as f64
    }
}

/// A question with two answers.
#[derive(Clone, Debug)]
pub struct Example {
    /// As asked.
    pub question: String,
    /// The SFT model's answer.
    pub before: String,
    /// The PPO model's.
    pub after: String,
}

/// Of `after` against `before` by the gold score, question by question.
pub fn win_rate(before: &Answers, after: &Answers) -> Share {
    let totals = |answers: &Answers| answers.gold.iter().map(|g| g.total).collect::<Vec<_>>();
    Share::of_wins(&totals(after), &totals(before))
}

/// Bytes of weights, gradients and optimizer that a role holds of its own, here and as a full copy.
#[derive(Clone, Copy, Debug)]
pub struct RoleMemory {
    /// The role.
    pub role: &'static str,
    /// Here: its adapter, and gradient and moments where it trains.
    pub here: usize,
    /// As a model of its own in f32: 4 bytes a parameter, 16 where it trains.
    pub full_copy: usize,
}

/// The four roles, and the base that they share (as the row "base").
pub fn memory_rows(model: &Model, sft: &Adapter, reward: &Adapter) -> Vec<RoleMemory> {
    let weights: usize = model.base.weights().iter().map(|(_, w)| w.rows() * w.cols()).sum();
    let norms: usize = model.base.vectors().iter().map(|(_, n)| n.len()).sum();
    let parameters = weights + norms;
    let (policy, scorer) = (sft.num_parameters(), reward.num_parameters());
    vec![
        RoleMemory { role: "base", here: model.base.size_in_bytes(), full_copy: 0 },
        RoleMemory { role: "actor", here: 16 * policy, full_copy: 16 * parameters },
        RoleMemory { role: "reference", here: 4 * policy, full_copy: 4 * parameters },
        RoleMemory { role: "critic", here: 16 * scorer, full_copy: 16 * parameters },
        RoleMemory { role: "reward", here: 4 * scorer, full_copy: 4 * parameters },
    ]
}

/// Everything a quickstart found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Held-out perplexity before and after SFT.
    pub sft_ppl: (f64, f64),
    /// The reward model on held-out pairs, of which some labels are wrong.
    pub reward: Evaluation,
    /// SFT's answers.
    pub before: Answers,
    /// PPO's.
    pub after: Answers,
    /// PPO against SFT.
    pub win: Share,
    /// The merged model against base + adapter.
    pub comparison: Comparison,
    /// Three questions.
    pub examples: Vec<Example>,
    /// Seconds of each stage, in order.
    pub seconds: Vec<(&'static str, f64)>,
    /// Seconds of all.
    pub wall_s: f64,
    /// Memory by role.
    pub memory: Vec<RoleMemory>,
    /// Peak resident set of the process.
    pub peak_rss_bytes: Option<usize>,
    /// The folder.
    pub out: PathBuf,
    /// The seed.
    pub seed: u64,
}

const MIB: f64 = (1 << 20) as f64;

impl Outcome {
    /// The object that `--json` prints.
    pub fn to_json(&self) -> Value {
        let path = |name: &str| self.out.join(name).display().to_string();
        json!({
            "seed": self.seed,
            "sft_ppl_before": number(self.sft_ppl.0),
            "sft_ppl_after": number(self.sft_ppl.1),
            "reward_accuracy": number(self.reward.accuracy),
            "gold_before": number(self.before.gold_mean()),
            "gold_after": number(self.after.gold_mean()),
            "gold_win_rate": number(self.win.rate),
            "gold_win_rate_ci": [number(self.win.low), number(self.win.high)],
            "aspect_share": [number(self.before.aspect_share()), number(self.after.aspect_share())],
            "place_share": [number(self.before.place_share()), number(self.after.place_share())],
            "learned_reward": [number(self.before.reward_mean()), number(self.after.reward_mean())],
            "kl": number(self.after.kl_mean()),
            "ended_share": number(self.after.ended as f64 / self.after.gold.len() as f64),
            "examples": self.examples.iter().map(|e| json!({
                "question": e.question, "before": e.before, "after": e.after,
            })).collect::<Vec<_>>(),
            "merged_max_logit_difference": self.comparison.max_logit_difference,
            "merged_greedy_agreement": number(self.comparison.greedy_agreement),
            "seconds": self.seconds.iter().map(|(n, s)| ((*n).to_string(), number(*s)))
                .collect::<serde_json::Map<_, _>>(),
            "wall_s": number(self.wall_s),
            "peak_rss_mib": self.peak_rss_bytes.map_or(Value::Null, |b| number(b as f64 / MIB)),
            "adapters": {
                "sft": path("sft"), "reward": path("reward"), "actor": path("actor"), "critic": path("critic"),
            },
            "merged": path("merged"),
            "output_dir": self.out.display().to_string(),
        })
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut t = String::new();
        let percent = |x: f64| format!("{:.1}%", 100.0 * x);
        let mut line = |name: &str, before: String, after: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(t, "  {name:<44} {before:>10} {after:>10}");
        };
        line("", "before".into(), "after".into());
        line("SFT: perplexity on held-out answers", format!("{:.2}", self.sft_ppl.0), format!("{:.2}", self.sft_ppl.1));
        line("reward model: accuracy on held-out pairs", String::new(), percent(self.reward.accuracy));
        line(
            "PPO: gold score of held-out answers",
            format!("{:.2}", self.before.gold_mean()),
            format!("{:.2}", self.after.gold_mean()),
        );
        line(
            "     answers that name the asked aspect",
            percent(self.before.aspect_share()),
            percent(self.after.aspect_share()),
        );
        line(
            "     answers that name the asked place",
            percent(self.before.place_share()),
            percent(self.after.place_share()),
        );
        line(
            "     learned reward",
            format!("{:.2}", self.before.reward_mean()),
            format!("{:.2}", self.after.reward_mean()),
        );
        line("     KL to the SFT model, nats a response", "0".into(), format!("{:.2}", self.after.kl_mean()));
        let w = self.win;
        line("     wins against the SFT model (gold rule)", String::new(), percent(w.rate));
        let _ =
            writeln!(t, "  {:<44} {:>21}", "     95% interval", format!("{} - {}", percent(w.low), percent(w.high)));
        let _ = writeln!(t, "\n  Three held-out questions");
        for e in &self.examples {
            let _ = writeln!(t, "  Q    {}\n  SFT  {}\n  PPO  {}\n", e.question, e.before, e.after);
        }
        let kib = |bytes: usize| format!("{:.0} KiB", bytes as f64 / 1024.0);
        let _ =
            writeln!(t, "  {:<44} {:>10} {:>10}", "Weights, gradients, optimizer states by role", "here", "full copy");
        for row in &self.memory {
            let full = if row.role == "base" { "-".to_string() } else { kib(row.full_copy) };
            let _ = writeln!(t, "  {:<44} {:>10} {:>10}", row.role, kib(row.here), full);
        }
        let here: usize = self.memory.iter().map(|r| r.here).sum();
        let full: usize = self.memory.iter().map(|r| r.full_copy).sum();
        let ratio = format!("{:.0}% of four full copies", 100.0 * here as f64 / full as f64);
        let _ = writeln!(t, "  {:<44} {:>10} {:>10}   {ratio}", "all", kib(here), kib(full));
        let stages: Vec<String> = self.seconds.iter().map(|(n, s)| format!("{n} {s:.1} s")).collect();
        let peak = self.peak_rss_bytes.map_or_else(|| "unknown".into(), |b| format!("{:.0} MiB", b as f64 / MIB));
        let _ =
            writeln!(t, "\n  {}; in all {:.1} s, peak memory of the process {peak}", stages.join(", "), self.wall_s);
        let _ = write!(
            t,
            "  merged model: largest logit difference {:.3}, greedy agreement {}; everything is in {}",
            self.comparison.max_logit_difference,
            percent(self.comparison.greedy_agreement),
            self.out.display()
        );
        t
    }
}
