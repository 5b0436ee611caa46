//! The result of a quickstart: the table for people and the JSON object for `--json`. It does not depend on the training
//! loops. Read `gold.rs` for the gold rule.

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

/// One policy's responses to the held-out questions with their scores. Every list has one entry per question.
#[derive(Clone, Debug, Default)]
pub struct Responses {
    /// Sampled texts.
    pub texts: Vec<String>,
    /// Scores of the gold rule.
    pub gold: Vec<Gold>,
    /// Learned rewards.
    pub rewards: Vec<f32>,
    /// Sum of log-probabilities minus those of the SFT model, nats per response.
    pub kl: Vec<f64>,
    /// Number of responses that ended with the end token.
    pub ended: usize,
}

impl Responses {
    fn mean(&self, of: impl Fn(&Gold) -> f64) -> f64 {
        self.gold.iter().map(of).sum::<f64>() / self.gold.len() as f64
    }

    /// Mean gold score.
    pub fn gold_mean(&self) -> f64 {
        self.mean(|g| g.total)
    }

    /// Share of responses whose first sentence names the asked aspect.
    pub fn aspect_share(&self) -> f64 {
        self.mean(|g| f64::from(g.aspect))
    }

    /// Share of responses that name the asked place.
    pub fn place_share(&self) -> f64 {
        self.mean(|g| f64::from(g.place))
    }

    /// Mean KL, nats per response.
    pub fn kl_mean(&self) -> f64 {
        self.kl.iter().sum::<f64>() / self.kl.len() as f64
    }

    /// Mean learned reward.
    pub fn reward_mean(&self) -> f64 {
        self.rewards.iter().map(|&r| f64::from(r)).sum::<f64>() / self.rewards.len() as f64
    }
}

/// A question with two responses.
#[derive(Clone, Debug)]
pub struct Example {
    /// The question.
    pub question: String,
    /// Response of the SFT model.
    pub before: String,
    /// Response of the PPO model.
    pub after: String,
}

/// Win rate of `after` against `before` by the gold score, question by question.
pub fn win_rate(before: &Responses, after: &Responses) -> Share {
    let totals = |responses: &Responses| responses.gold.iter().map(|g| g.total).collect::<Vec<_>>();
    Share::of_wins(&totals(after), &totals(before))
}

/// Bytes of a role's own weights, gradients and optimizer state, here and as a full copy of the model.
#[derive(Clone, Copy, Debug)]
pub struct RoleMemory {
    /// Name of the role.
    pub role: &'static str,
    /// Bytes here: its adapter, plus gradients and moments if it trains.
    pub here: usize,
    /// Bytes as a separate model in f32: 4 per parameter, 16 if it trains.
    pub full_copy: usize,
}

/// Memory of the four roles, and of the base that they share (row "base").
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

/// The result of a quickstart.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Held-out perplexity before and after SFT.
    pub sft_ppl: (f64, f64),
    /// Evaluation of the reward model on held-out pairs, some of whose labels are wrong.
    pub reward: Evaluation,
    /// Responses of the SFT model.
    pub before: Responses,
    /// Responses of the PPO model.
    pub after: Responses,
    /// Win rate of PPO against SFT.
    pub win: Share,
    /// Comparison of the merged model with base + adapter.
    pub comparison: Comparison,
    /// Three questions with both models' responses.
    pub examples: Vec<Example>,
    /// Seconds of each stage, in order.
    pub seconds: Vec<(&'static str, f64)>,
    /// Total seconds.
    pub wall_s: f64,
    /// Memory by role.
    pub memory: Vec<RoleMemory>,
    /// Peak resident set of the process.
    pub peak_rss_bytes: Option<usize>,
    /// Output folder.
    pub out: PathBuf,
    /// The machine that the base lay on.
    pub device: String,
    /// Seed of the run.
    pub seed: u64,
}

const MIB: f64 = (1 << 20) as f64;

impl Outcome {
    /// The object that `--json` prints.
    pub fn to_json(&self) -> Value {
        let path = |name: &str| self.out.join(name).display().to_string();
        json!({
            "status": "finished",
            "seed": self.seed,
            "device": self.device,
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
        line(
            "SFT: perplexity on held-out responses",
            format!("{:.2}", self.sft_ppl.0),
            format!("{:.2}", self.sft_ppl.1),
        );
        line("reward model: accuracy on held-out pairs", String::new(), percent(self.reward.accuracy));
        line(
            "PPO: gold score of held-out responses",
            format!("{:.2}", self.before.gold_mean()),
            format!("{:.2}", self.after.gold_mean()),
        );
        line(
            "     responses that name the asked aspect",
            percent(self.before.aspect_share()),
            percent(self.after.aspect_share()),
        );
        line(
            "     responses that name the asked place",
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
        let _ = writeln!(
            t,
            "\n  {}; in all {:.1} s on {}, peak memory of the process {peak}",
            stages.join(", "),
            self.wall_s,
            self.device
        );
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
