//! The methods of the study `sections`: PPO, each variant of `[grpo]`, `[rloo]`, REINFORCE++ with the group's mean as the
//! baseline, and distillation from the PPO actor, all with one learning rate and the same number of sampled responses; and the
//! file that their results are added to.
//!
//! A rollout of 64 responses makes two optimizer steps, so that the ratio of the second one is not 1 and the losses differ. But
//! for the keys that name a method all have the defaults of their section, with the KL's weight of the quickstart. It does not
//! depend on how a method is evaluated. Read `main.rs` next.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use fourfold::config::{AdvantageEstimator, Distill, GroupLoss, Grpo, ImportanceSamplingLevel, Ppo, Rloo};
use serde_json::{Value, json};

/// The study's methods, in the order in which they run: `distill` needs the actor of `ppo`.
pub const METHODS: &[&str] =
    &["ppo", "grpo", "cispo", "rloo", "dr_grpo", "distill", "dapo", "gspo", "reinforce_plus_plus_baseline"];
/// The name of these methods' rows.
pub const STUDY: &str = "sections";

/// The settings of a method that trains by rollouts. `quickstart`: PPO's, whose budget and KL weight the others take.
pub fn settings(method: &str, quickstart: &Ppo, learning_rate: f64) -> Result<Ppo> {
    let size = quickstart.micro_batch_size;
    let grpo = |loss_type| Grpo {
        learning_rate,
        num_generations: 4,
        per_device_train_batch_size: size,
        steps_per_generation: Some(quickstart.batch_size / size),
        max_completion_length: quickstart.response_length,
        beta: quickstart.kl_coef,
        warmup_steps: quickstart.warmup_steps,
        loss_type,
        ..Grpo::default()
    };
    let made = match method {
        "ppo" => Ppo { learning_rate, ..quickstart.clone() },
        "grpo" => grpo(GroupLoss::Grpo).to_ppo(),
        "dr_grpo" => Grpo { scale_rewards: fourfold::config::ScaleRewards::None, ..grpo(GroupLoss::DrGrpo) }.to_ppo(),
        "dapo" => Grpo { epsilon_high: Some(0.28), ..grpo(GroupLoss::Dapo) }.to_ppo(),
        "cispo" => grpo(GroupLoss::Cispo).to_ppo(),
        "gspo" => {
            Grpo { importance_sampling_level: ImportanceSamplingLevel::Sequence, ..grpo(GroupLoss::Grpo) }.to_ppo()
        }
        "reinforce_plus_plus_baseline" => {
            Ppo { advantage_estimator: AdvantageEstimator::ReinforcePlusPlusBaseline, ..grpo(GroupLoss::Dapo).to_ppo() }
        }
        "rloo" => {
            let shared = grpo(GroupLoss::Grpo);
            Rloo {
                learning_rate,
                num_generations: shared.num_generations,
                per_device_train_batch_size: size,
                steps_per_generation: shared.steps_per_generation,
                max_completion_length: shared.max_completion_length,
                beta: shared.beta,
                warmup_steps: shared.warmup_steps,
                ..Rloo::default()
            }
            .to_ppo()
        }
        other => bail!("no method {other} in the study {STUDY}; there are {}", METHODS.join(", ")),
    };
    Ok(Ppo { total_episodes: quickstart.total_episodes, num_train_epochs: None, ..made })
}

/// The settings of distillation: one response of the student to each question, as many responses in a step as the others have.
pub fn distill(quickstart: &Ppo, learning_rate: f64) -> Distill {
    Distill {
        learning_rate,
        temperature: 1.0,
        lmbda: 1.0,
        beta: 1.0,
        max_new_tokens: quickstart.response_length,
        per_device_train_batch_size: quickstart.micro_batch_size,
        warmup_steps: quickstart.warmup_steps,
        ..Distill::default()
    }
}

/// The lines of one method, which go to stdout at once and to the file when the method is through: a method that was cut off
/// leaves none, and runs again.
pub struct Lines<'f> {
    file: Option<&'f Path>,
    marks: Value,
    whole: String,
}

impl<'f> Lines<'f> {
    /// No lines yet. `marks`: an object whose entries each line gets.
    pub fn new(file: Option<&'f PathBuf>, marks: Value) -> Self {
        Self { file: file.map(PathBuf::as_path), marks, whole: String::new() }
    }

    /// Adds a line.
    pub fn add(&mut self, mut line: Value) {
        if let (Some(line), Some(marks)) = (line.as_object_mut(), self.marks.as_object()) {
            line.extend(marks.clone());
        }
        println!("{line}");
        self.whole += &format!("{line}\n");
    }

    /// Writes the lines to the file by one call, so that two processes can share it.
    pub fn finish(self) -> Result<()> {
        let Some(path) = self.file else { return Ok(()) };
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        file.write_all(self.whole.as_bytes()).with_context(|| format!("writing {}", path.display()))
    }
}

/// Whether the file has the last line of a method and seed of a study at this rate, made by the same kind of processor.
pub fn is_there(file: Option<&PathBuf>, marks: &Value, method: &str, seed: u64) -> Result<bool> {
    let Some(path) = file.filter(|path| path.exists()) else { return Ok(false) };
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let mut want = json!({ "side": "fourfold", "method": method, "seed": seed, "last": true });
    if let (Some(want), Some(marks)) = (want.as_object_mut(), marks.as_object()) {
        want.extend(marks.clone());
    }
    let want = want.as_object().into_iter().flatten().collect::<Vec<_>>();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()))?;
        if want.iter().all(|(key, value)| line.get(key) == Some(value)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The instructions by which this processor's kernels are chosen: other ones sample other responses.
pub fn processor() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return "avx2";
        }
    }
    "other"
}
