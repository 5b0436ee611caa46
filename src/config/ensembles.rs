//! The members of an ensemble of reward models, written out wherever a config names its folder: `reward_adapter` that stands for
//! several is a source of the reward like any other. No file is opened here: the caller knows what a path stands for. Read
//! `rewards.rs` for the sources.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{Config, Origin, Paths, RewardPart, group};

/// What `reward_adapter` is called by among other sources of the reward.
pub const REWARD_ADAPTER: &str = "reward_adapter";

/// Finds the adapters that a path stands for; the text is the key that names it.
pub type Members<'m> = &'m dyn Fn(&Path, &str) -> Result<Vec<PathBuf>>;

impl Config {
    /// The config with every adapter of a reward written out. A `reward_adapter` of several becomes the first
    /// `[[ppo.reward]]`, by the name `reward_adapter`.
    ///
    /// # Errors
    /// Those of `members`.
    pub fn with_members(&self, members: Members<'_>) -> Result<Self> {
        let mut all = self.clone();
        if let Some(ppo) = all.ppo.as_mut().filter(|ppo| ppo.origin == Origin::Ppo) {
            write_out("ppo", &mut ppo.reward_adapter, &mut ppo.reward, ppo.gold.as_mut(), members)?;
        }
        if let Some(grpo) = &mut all.grpo {
            write_out("grpo", &mut grpo.reward_adapter, &mut grpo.reward, grpo.gold.as_mut(), members)?;
        }
        if let Some(rloo) = &mut all.rloo {
            write_out("rloo", &mut rloo.reward_adapter, &mut rloo.reward, rloo.gold.as_mut(), members)?;
        }
        group::translate(&mut all);
        Ok(all)
    }
}

fn write_out(
    section: &str,
    main: &mut Paths,
    parts: &mut Vec<RewardPart>,
    gold: Option<&mut RewardPart>,
    members: Members<'_>,
) -> Result<()> {
    let all = |paths: &[PathBuf], key: &str| -> Result<Vec<PathBuf>> {
        Ok(paths.iter().map(|path| members(path, key)).collect::<Result<Vec<_>>>()?.concat())
    };
    for part in parts.iter_mut() {
        part.adapters = all(&part.adapters, &format!("[[{section}.reward]] adapters"))?;
    }
    if let Some(gold) = gold {
        gold.adapters = all(&gold.adapters, &format!("[{section}.gold] adapters"))?;
    }
    if main.is_blank() {
        return Ok(());
    }
    let mut found = all(main.as_slice(), &format!("[{section}] {REWARD_ADAPTER}"))?;
    *main = match found.len() {
        1 => Paths::One(found.remove(0)),
        _ => {
            let name = Some(REWARD_ADAPTER.to_owned());
            parts.insert(0, RewardPart { name, adapters: found, ..RewardPart::default() });
            Paths::default()
        }
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_text;

    /// The folder `three` stands for three adapters.
    fn three(path: &Path, _: &str) -> Result<Vec<PathBuf>> {
        Ok(match path == Path::new("three") {
            true => ["three/adapter", "three/adapter_1", "three/adapter_2"].map(PathBuf::from).into(),
            false => vec![path.into()],
        })
    }

    #[test]
    fn a_reward_adapter_of_several_is_the_table_that_names_them() {
        let of = |section: &str, keys: &str| {
            let text = format!("[base]\npath = 'b'\n[data]\npath = 'd'\n[{section}]\n{keys}\n");
            from_text(&text, "test").unwrap().with_members(&three).unwrap()
        };
        let rule = |section: &str| format!("[[{section}.reward]]\nkind = 'json_valid'\n");
        for section in ["ppo", "grpo", "rloo"] {
            let table = format!(
                "[[{section}.reward]]\nname = 'reward_adapter'\nadapters = ['three/adapter', 'three/adapter_1', \
                 'three/adapter_2']\n"
            );
            let want = of(section, &table);
            assert_eq!(of(section, "reward_adapter = 'three'"), want);
            let list = "reward_adapter = ['three/adapter', 'three/adapter_1', 'three/adapter_2']";
            assert_eq!(of(section, list), want);
            assert_eq!(
                of(section, &format!("[[{section}.reward]]\nname = 'reward_adapter'\nadapters = ['three']\n")),
                want
            );
            // Before the others, as a single one is.
            let both = of(section, &format!("reward_adapter = 'three'\n{}", rule(section)));
            assert_eq!(both, of(section, &format!("{table}{}", rule(section))));
            // One is one, however it is written, and none is none.
            let one = of(section, "reward_adapter = 'a'");
            assert_eq!(of(section, "reward_adapter = ['a']"), one);
            assert!(one.ppo.as_ref().unwrap().reward.is_empty());
            assert_eq!(
                of(section, &format!("reward_adapter = ''\n{}", rule(section))).ppo.unwrap().reward,
                of(section, &rule(section)).ppo.unwrap().reward
            );
            let gold = format!("reward_adapter = 'a'\neval_prompts = 1\n[{section}.gold]\nadapters = ['three', 'b']\n");
            assert_eq!(of(section, &gold).ppo.unwrap().gold.unwrap().adapters.len(), 4);
        }
    }
}
