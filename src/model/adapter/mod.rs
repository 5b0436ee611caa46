//! Adapters: the small trained weights over the frozen base (LoRA, DoRA, and the scalar head of a value model).
//!
//! It does not depend on the base, on files or on the optimizer. Each file depends only on those before it: `shapes` (the
//! linear maps of a decoder), `targets` (which of them get a branch), `branch` (one low-rank branch), `weights` ([`Adapter`],
//! read-only), `gradients` ([`Gradients`]), `trainable` ([`TrainableAdapter`], the only weights that can change). Read
//! `model_files/peft/mod.rs` for an adapter's files and `train/adamw.rs` for the optimizer.

pub mod branch;
pub mod gradients;
pub mod shapes;
pub mod targets;
mod trainable;
mod weights;

pub use branch::{Factor, HEAD_BIAS, HEAD_WEIGHT, LoraLayer, factor_name};
pub use gradients::{BranchGradient, Gradients};
pub use shapes::{Linear, LinearShapes, MAX_LINEARS, MatrixLayout, NonBlockModule, TargetModule};
pub use targets::{LoraConfig, TargetModules};
pub use trainable::{HeadBias, TrainableAdapter};
pub use weights::{Adapter, Init, LoraLayers, NonBlockLayers, Provenance, ScoreHead};
