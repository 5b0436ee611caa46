//! `compat = "dschat"`: DeepSpeed-Chat's values for the keys that a config file leaves open.
//!
//! They are written into the file's table before it is read, so explicit keys take precedence and the resolved config
//! shows every value. What the key changes besides values is in `ppo/dschat.rs`, `reward/dschat.rs` and
//! `data/examples/dschat.rs`. The values are the defaults of its scripts for LoRA, in microsoft/DeepSpeedExamples
//! 83757d9, `training/step{1,2,3}*/main.py` and `dschat/rlhf/ppo_trainer.py`.

use toml::{Table, Value};

const COMPAT: &str = "compat";
const DSCHAT: &str = "dschat";

/// Sections with the key `compat`. `true`: the section is made where the file lacks it.
const SECTIONS: &[(&str, bool)] = &[("lora", true), ("data", false), ("sft", true), ("reward", true), ("ppo", false)];

const SFT: &str = "learning_rate = 5e-4
per_device_train_batch_size = 16
lr_scheduler_type = 'cosine'
adam_beta2 = 0.95
completion_only_loss = false";

const REWARD: &str = "loss = 'divergence_to_end'
center = false
learning_rate = 5e-4
per_device_train_batch_size = 16
lr_scheduler_type = 'cosine'
adam_beta2 = 0.95";

const PPO: &str = "learning_rate = 5e-4
critic_learning_rate = 5e-4
batch_size = 16
num_mini_batches = 1
num_ppo_epochs = 1
response_length = 256
temperature = 0.0
kl_coef = 0.1
cliprange = 0.2
cliprange_value = 0.2
vf_coef = 1.0
shared_optimizer = false
gamma = 1.0
lam = 0.95
whiten_rewards = 'no'
whiten_advantages = false
score_clip = 5.0
warmup_steps = 100
lr_scheduler_type = 'cosine'
adam_beta2 = 0.95";

const PTX: &str = "coef = 27.8
separate_step = true";

/// Writes the values into the table. Wrong types and unknown names are left for the reader to report.
pub(super) fn fill(table: &mut Table) {
    let wanted = |table: &Table| table.get(COMPAT).and_then(Value::as_str) == Some(DSCHAT);
    if wanted(table) {
        for &(name, without) in SECTIONS {
            if without && !table.contains_key(name) {
                table.insert(name.into(), Table::new().into());
            }
            if let Some(section) = table.get_mut(name).and_then(Value::as_table_mut) {
                section.entry(COMPAT).or_insert_with(|| DSCHAT.into());
            }
        }
    }
    for (name, values) in [("sft", SFT), ("reward", REWARD), ("ppo", PPO)] {
        let Some(section) = table.get_mut(name).and_then(Value::as_table_mut).filter(|section| wanted(section)) else {
            continue;
        };
        add(section, values);
        if let Some(ptx) = section.get_mut("ptx").and_then(Value::as_table_mut) {
            add(ptx, PTX);
        }
    }
}

/// Adds the keys of `values` that the section lacks.
fn add(section: &mut Table, values: &str) {
    // A constant of this file that is no TOML adds nothing, and the tests below see it.
    for (key, value) in values.parse::<Table>().unwrap_or_default() {
        section.entry(key).or_insert(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, InitLoraWeights, Ppo, RewardLoss};

    fn read(text: &str) -> Config {
        let mut table: Table = text.parse().unwrap();
        fill(&mut table);
        Value::Table(table).try_into().unwrap()
    }

    #[test]
    fn one_key_gives_every_section_dschats_values_and_a_written_key_wins() {
        let config = read(
            "compat = 'dschat'\n[base]\npath = 'b'\n[lora]\nr = 4\n[data]\npath = 'd'\n[ppo]\nkl_coef = 0.3\n\
             [ppo.ptx]\npath = 't'",
        );
        assert_eq!((config.lora.alpha(), config.lora.r), (1.0, 4));
        assert_eq!(config.lora.init(), InitLoraWeights::Dschat);
        let (sft, reward) = (config.sft.unwrap(), config.reward.unwrap());
        assert!(!sft.completion_only_loss && !reward.center && reward.loss == RewardLoss::DivergenceToEnd);
        assert!(reward.compat.is_some() && config.data.unwrap().compat.is_some());
        let ppo = config.ppo.unwrap();
        assert!(ppo.compat.is_some() && !ppo.whiten_advantages() && ppo.temperature == 0.0);
        assert_eq!((ppo.kl_coef, ppo.gamma, ppo.lam, ppo.score_clip, ppo.adam_beta2), (0.3, 1.0, 0.95, 5.0, 0.95));
        assert!(ppo.ptx.unwrap().separate_step);
    }

    #[test]
    fn every_value_is_a_key_of_its_section_and_without_the_key_nothing_is_filled_in() {
        let count = |values: &str| values.parse::<Table>().unwrap().len();
        assert_eq!([SFT, REWARD, PPO, PTX].map(count), [5, 6, 20, 2]);
        // The structs refuse unknown keys; and a section's own key is for that section.
        let config = read("[base]\npath = 'b'\n[ppo]\ncompat = 'dschat'\n[sft]\n");
        assert_eq!(config.ppo.unwrap().kl_coef, 0.1);
        assert!(config.sft.unwrap().completion_only_loss && config.lora.alpha() == 16.0);
        let config = read("[base]\npath = 'b'\n[ppo]\n");
        assert_eq!(config.ppo.unwrap(), Ppo::default());
    }

    #[test]
    fn a_config_that_was_filled_in_reads_back_as_itself() {
        let config = read("compat = 'dschat'\n[base]\npath = 'b'\n[ppo]\n");
        assert_eq!(read(&config.to_toml().unwrap()), config);
    }
}
