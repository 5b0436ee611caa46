//! fourfold trains language models with RLHF (reinforcement learning from human feedback) on one machine. PPO needs four
//! networks (actor, reference, critic, reward model); here each is a small adapter over one shared frozen base, or the bare
//! base.
//!
//! The rooms, in the order of their imports: each depends only on rooms above it, so read downwards for how things are built,
//! or start at a stage and follow its imports up. Files open with what they are, what they do not depend on, and what to read
//! next.
//!
//! - [`error`] error kinds and exit codes; [`rng`] seeded random numbers; [`host`] allocator, memory meter and memory limits
//! - [`ops`] what a transformer block is made of: each operation with its forward and backward pass, and the CPU kernels
//! - [`model`] [`model::adapter`] (trained weights), [`model::config`] (the decoder's variant), [`model::base`] (frozen
//!   weights), [`model::roles`] (policy and value model as views of both), [`model::generate`]
//! - [`tokenizer`] text <-> token ids, chat templates; [`model_files`] Hugging Face directories, GGUF files and PEFT adapters
//! - [`config`] TOML -> checked settings; [`data`] files of many formats -> token sequences; [`report`] and [`stats`] metrics
//! - [`train`] what all stages share: learner, AdamW, schedules, checkpoints
//! - [`sft`], [`reward`], [`dpo`], [`distill`], [`ppo`] the stages. PPO's loop is [`ppo::train`], its loss
//!   [`ppo::loss::policy_loss`]
//! - [`planner`] predicts a stage's memory; [`export`] merged models and GGUF files; [`page`] the page of a run
//! - [`watch`] a run in a terminal; [`run`] runs a stage from its config to its output folder; [`quickstart`] all stages on
//!   a tiny embedded base; [`serve`] an HTTP server over a base and its adapters; [`cli`] the commands
//!
//! ```
//! use fourfold::model::roles::{Policy, ValueModel};
//! use fourfold::quickstart::base::BASE;
//! use fourfold::{model::batch::Batch, model_files::ModelFiles, run::Model};
//!
//! let (config, generation) = (BASE.config, BASE.generation_config);
//! let files = ModelFiles::from_embedded(config, generation, BASE.tokenizer, BASE.tokenizer_config, BASE.weights)?;
//! let model = Model::of(files)?; // one frozen base
//! let adapter = model.fresh_adapter(&Default::default(), 0)?.with_head(0)?;
//! let reference = Policy::new(&model.base, None); // the bare base
//! let actor = Policy::new(&model.base, Some(&adapter)); // the base with an adapter
//! let reward = ValueModel::new(&model.base, &adapter)?; // the base with an adapter and its scalar head
//! assert_eq!(reward.scores(&Batch::new(&[[5, 6, 7]])?)?.len(), 1);
//! # let _ = (reference, actor);
//! # Ok::<(), anyhow::Error>(())
//! ```

pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod distill;
pub mod dpo;
pub mod error;
pub mod export;
pub mod host;
pub mod model;
pub mod model_files;
pub mod ops;
pub mod page;
pub mod planner;
pub mod ppo;
pub mod quickstart;
pub mod report;
pub mod reward;
pub mod rng;
pub mod run;
pub mod serve;
pub mod sft;
pub mod stats;
pub mod tokenizer;
pub mod train;
pub mod watch;
