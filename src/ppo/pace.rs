//! How long the phases of a PPO iteration took and how fast tokens passed through them, for the clock columns of
//! metrics.jsonl. It does not depend on the model. Read `../report/clocks.rs` for the columns.

use std::time::Duration;

use super::experience::Experience;
use crate::config::Ppo;
use crate::host::meter::{Phase, spent};
use crate::report::{Metrics, Report, number};

/// The time that each phase had taken when the last iteration ended.
#[derive(Debug)]
pub struct Pace([(Phase, Duration); Phase::ALL.len()]);

impl Default for Pace {
    fn default() -> Self {
        Self(spent())
    }
}

impl Pace {
    /// The clock columns of the iteration that ends now, by phase. Counts its sampled tokens for `tokens_per_second`.
    pub fn lap(&mut self, experience: &Experience, config: &Ppo, report: &mut Report) -> Metrics {
        let now = spent();
        let then = std::mem::replace(&mut self.0, now).map(|(_, time)| time);
        let took = |phase: Phase| now[phase as usize].1.saturating_sub(then[phase as usize]);
        let sampled = experience.rollout.response_tokens();
        let whole = sampled + experience.rollout.prompts.iter().map(Vec::len).sum::<usize>();
        let update = took(Phase::Update) + took(Phase::Step);
        report.passed(sampled, took(Phase::Rollout) + took(Phase::Scoring) + update);
        let mut columns = Metrics::new();
        let mut put = |name: &str, value: f64| columns.insert(name.into(), number((value * 1e6).round() / 1e6));
        for phase in [Phase::Rollout, Phase::Scoring, Phase::Update, Phase::Step, Phase::Evaluation, Phase::Save] {
            if !took(phase).is_zero() {
                put(&format!("seconds/{}", phase.name()), took(phase).as_secs_f64());
            }
        }
        // Of a rollout that was sampled ahead, only the time that was left to wait is known, which is no rate of sampling.
        let generating = if experience.rollout.served.lag == 0 { took(Phase::Rollout) } else { Duration::ZERO };
        // Generation counts the tokens that it makes; the other phases read prompts, too.
        let passes = [
            ("rollout", sampled, generating),
            ("scoring", whole, took(Phase::Scoring)),
            ("update", whole * config.num_ppo_epochs, update),
        ];
        for (name, tokens, time) in passes.into_iter().filter(|(_, _, time)| !time.is_zero()) {
            put(&format!("tokens_per_second/{name}"), tokens as f64 / time.as_secs_f64());
        }
        columns
    }
}
