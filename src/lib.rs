//! fourfold: RLHF on one machine. PPO needs four networks (actor, reference, critic, reward model); here they are four
//! small adapters over one frozen base, or two.
//!
//! The map, in reading order:
//!
//! - [`model`] the frozen [`model::base::Base`], the adapters over it, and [`model::roles`]: policy and scorer as views
//! - [`ops`] what a block is made of: each operation a forward/backward pair, and the CPU kernels beneath
//! - [`data`] records of many formats -> token sequences; [`config`] TOML -> checked settings
//! - [`sft`], [`reward`], [`dpo`], [`ppo`] the stages. The loop is [`ppo::train`], the PPO loss [`ppo::loss::policy_loss`]
//! - [`train`] learner, AdamW, schedules; [`export`] merged models; [`report`] metrics and progress; [`memory`]
//! - [`error`] bad input against failure; [`allocator`] what happens when memory runs out
//! - [`run`] a stage from its config to its folder; [`quickstart`] all stages on a tiny embedded base; [`cli`]
//!
//! ```
//! use fourfold::model::roles::{Policy, ValueModel};
//! use fourfold::quickstart::base::BASE;
//! use fourfold::{model::batch::Batch, model::checkpoint::Checkpoint, run::Model};
//!
//! let (config, generation) = (BASE.config, BASE.generation_config);
//! let checkpoint =
//!     Checkpoint::from_embedded(config, generation, BASE.tokenizer, BASE.tokenizer_config, BASE.weights)?;
//! let model = Model::of(checkpoint)?; // one frozen base
//! let adapter = model.fresh_adapter(&Default::default(), 0)?.with_head(0)?;
//! let reference = Policy::new(&model.base, None); // the bare base
//! let actor = Policy::new(&model.base, Some(&adapter)); // the same base through an adapter
//! let reward = ValueModel::new(&model.base, &adapter)?; // and through an adapter with a scalar head
//! assert_eq!(reward.scores(&Batch::new(&[[5, 6, 7]])?)?.len(), 1);
//! # let _ = (reference, actor);
//! # Ok::<(), anyhow::Error>(())
//! ```

pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod dpo;
pub mod error;
pub mod export;
pub mod host;
pub mod model;
pub mod model_files;
pub mod ops;
pub mod planner;
pub mod ppo;
pub mod quickstart;
pub mod report;
pub mod reward;
pub mod rng;
pub mod run;
pub mod sft;
pub mod stats;
pub mod tokenizer;
pub mod train;
