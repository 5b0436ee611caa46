//! The optimisation keys that the sections of all stages share: written once here, read flat in each section.
//!
//! serde cannot both flatten a shared struct into a section and refuse unknown keys, so the macros below write the
//! shared keys into each section's struct, in the order in which config.toml has them, and [`Optimised`] and
//! [`Supervised`] give them back as one struct. It does not depend on a stage. Read `stages.rs` next.

use super::{LrScheduler, RecomputeSetting};

/// The keys that every stage optimises by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimisation {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Optimizer steps over which the learning rate rises from 0.
    pub warmup_steps: usize,
    /// Course of the learning rate after the warm-up.
    pub lr_scheduler_type: LrScheduler,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment.
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment.
    pub adam_beta2: f64,
    /// AdamW's term in the denominator.
    pub adam_epsilon: f64,
    /// Largest norm of an optimizer step's gradient; 0 = no clipping.
    pub max_grad_norm: f64,
    /// Activations that a block saves for the backward pass.
    pub checkpoint: RecomputeSetting,
}

/// The keys of a stage that trains on a fixed set of examples: `[sft]`, `[reward]`, `[dpo]`,
/// `[kto]` and `[distill]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SupervisedKeys {
    /// The keys shared with `[ppo]`.
    pub optimisation: Optimisation,
    /// Passes over the training examples.
    pub num_train_epochs: usize,
    /// Examples per forward and backward pass.
    pub per_device_train_batch_size: usize,
    /// Most tokens per forward and backward pass, instead of a number of examples. `None` in sections without the key.
    pub max_tokens_per_batch: Option<usize>,
    /// Forward and backward passes summed into one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Optimizer steps between two log lines.
    pub logging_steps: usize,
    /// Optimizer steps between two evaluations; 0 = none during training.
    pub eval_steps: usize,
    /// Most examples per pass of an evaluation. `None` = what [`SupervisedKeys::examples_evaluated_at_once`] makes of the
    /// training's passes.
    pub per_device_eval_batch_size: Option<usize>,
}

/// Most examples per pass of an evaluation by default (transformers).
const EVALUATED_AT_ONCE: usize = 8;

impl SupervisedKeys {
    /// `per_device_eval_batch_size`, or its default: the number of a training pass, where that is bounded by a number, and at
    /// most 8.
    pub fn examples_evaluated_at_once(&self) -> usize {
        let of_training = match self.max_tokens_per_batch {
            None => self.per_device_train_batch_size,
            Some(_) => EVALUATED_AT_ONCE,
        };
        self.per_device_eval_batch_size.unwrap_or(of_training.min(EVALUATED_AT_ONCE)).max(1)
    }
}

/// A section with the keys of [`Optimisation`].
pub trait Optimised {
    /// Their values.
    fn optimisation(&self) -> Optimisation;

    /// Sets `checkpoint`.
    fn set_checkpoint(&mut self, checkpoint: RecomputeSetting);
}

/// A section with the keys of [`SupervisedKeys`].
pub trait Supervised: Optimised {
    /// Their values.
    fn supervised(&self) -> SupervisedKeys;

    /// Sets `per_device_train_batch_size` and `gradient_accumulation_steps`.
    fn set_batch(&mut self, examples: usize, accumulation: usize);

    /// Sets `max_tokens_per_batch`, in sections that have it.
    fn set_tokens(&mut self, tokens: usize);

    /// Sets `per_device_eval_batch_size`.
    fn set_eval_batch(&mut self, examples: usize);
}

/// A section with the keys of [`Optimisation`]: the struct, its defaults, and [`Optimised`]. Groups of a section's own
/// keys stand where config.toml has them; every key is followed by its default.
macro_rules! optimised_section {
    (
        $(#[$about:meta])*
        pub struct $name:ident;
        first { $($(#[$m1:meta])* pub $f1:ident: $t1:ty = $d1:expr,)* }
        $(#[$mr:meta])* learning_rate = $rate:expr;
        after_rate { $($(#[$m2:meta])* pub $f2:ident: $t2:ty = $d2:expr,)* }
        after_norm { $($(#[$m3:meta])* pub $f3:ident: $t3:ty = $d3:expr,)* }
        last { $($(#[$m4:meta])* pub $f4:ident: $t4:ty = $d4:expr,)* }
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, schemars::JsonSchema, serde::Deserialize, serde::Serialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$m1])* pub $f1: $t1,)*
            $(#[$mr])*
            pub learning_rate: f64,
            $($(#[$m2])* pub $f2: $t2,)*
            /// Optimizer steps over which the learning rate rises from 0. Default 0.
            pub warmup_steps: usize,
            /// Course of the learning rate after the warm-up. Default `linear` (transformers).
            pub lr_scheduler_type: $crate::config::LrScheduler,
            /// AdamW's decoupled weight decay. Default 0 (DeepSpeed-Chat's scripts for the reward model: 0.1).
            pub weight_decay: f64,
            /// AdamW's decay of the first moment. Default 0.9 (transformers).
            pub adam_beta1: f64,
            /// AdamW's decay of the second moment. Default 0.999 (transformers; DeepSpeed-Chat: 0.95).
            pub adam_beta2: f64,
            /// AdamW's term in the denominator. Default 1e-8 (transformers; TRL's PPO: 1e-5).
            pub adam_epsilon: f64,
            /// Largest norm of an optimizer step's gradient, per learner; 0 = no clipping. Default 1.0 (transformers).
            pub max_grad_norm: f64,
            $($(#[$m3])* pub $f3: $t3,)*
            /// Activations that a block saves for the backward pass. Default `auto`.
            pub checkpoint: $crate::config::RecomputeSetting,
            $($(#[$m4])* pub $f4: $t4,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($f1: $d1,)*
                    learning_rate: $rate,
                    $($f2: $d2,)*
                    warmup_steps: 0,
                    lr_scheduler_type: $crate::config::LrScheduler::Linear,
                    weight_decay: 0.0,
                    adam_beta1: 0.9,
                    adam_beta2: 0.999,
                    adam_epsilon: 1e-8,
                    max_grad_norm: 1.0,
                    $($f3: $d3,)*
                    checkpoint: $crate::config::RecomputeSetting::Auto,
                    $($f4: $d4,)*
                }
            }
        }

        impl $crate::config::Optimised for $name {
            fn optimisation(&self) -> $crate::config::Optimisation {
                $crate::config::Optimisation {
                    learning_rate: self.learning_rate,
                    warmup_steps: self.warmup_steps,
                    lr_scheduler_type: self.lr_scheduler_type,
                    weight_decay: self.weight_decay,
                    adam_beta1: self.adam_beta1,
                    adam_beta2: self.adam_beta2,
                    adam_epsilon: self.adam_epsilon,
                    max_grad_norm: self.max_grad_norm,
                    checkpoint: self.checkpoint,
                }
            }

            fn set_checkpoint(&mut self, checkpoint: $crate::config::RecomputeSetting) {
                self.checkpoint = checkpoint;
            }
        }
    };
}

/// A section with the keys of [`SupervisedKeys`] besides: as [`optimised_section`], with [`Supervised`].
macro_rules! supervised_section {
    (
        $(#[$about:meta])*
        pub struct $name:ident;
        first { $($first:tt)* }
        $(#[$mr:meta])* learning_rate = $rate:expr;
        batch { $($(#[$mb:meta])* pub max_tokens_per_batch: $tb:ty = $db:expr,)? }
        after_norm { $($after_norm:tt)* }
    ) => {
        optimised_section! {
            $(#[$about])*
            pub struct $name;
            first { $($first)* }
            $(#[$mr])* learning_rate = $rate;
            after_rate {
                /// Passes over the training examples. Default 1 (TRL: 3; reward models overfit in the second,
                /// InstructGPT, appendix C.2).
                pub num_train_epochs: usize = 1,
                /// Examples per forward and backward pass: sequences of `[sft]`, comparisons of `[reward]` and `[dpo]`
                /// with all their responses, responses of `[kto]`, prompts of `[distill]`. Default 8 (transformers).
                pub per_device_train_batch_size: usize = 8,
                $($(#[$mb])* pub max_tokens_per_batch: $tb = $db,)?
                /// Passes summed into one optimizer step. Default 1.
                pub gradient_accumulation_steps: usize = 1,
            }
            after_norm { $($after_norm)* }
            last {
                /// Optimizer steps between two log lines. Default 1.
                pub logging_steps: usize = 1,
                /// Optimizer steps between two evaluations; 0 = none during training. Default 0.
                pub eval_steps: usize = 0,
                /// Most examples per pass of an evaluation, counted as those of `per_device_train_batch_size`; where
                /// `max_tokens_per_batch` is set, a pass has no more tokens than that either. The numbers differ by no more
                /// than the rounding of matrix products. Default `per_device_train_batch_size`, and at most 8
                /// (transformers), so that an evaluation takes no more memory than an update.
                #[serde(skip_serializing_if = "Option::is_none")]
                pub per_device_eval_batch_size: Option<usize> = None,
            }
        }

        impl $crate::config::Supervised for $name {
            fn supervised(&self) -> $crate::config::SupervisedKeys {
                // The value of `max_tokens_per_batch`, or `None` where the section has no such key.
                let tokens: &[Option<usize>] = &[$({
                    let _: $tb = $db;
                    self.max_tokens_per_batch
                })?];
                $crate::config::SupervisedKeys {
                    optimisation: $crate::config::Optimised::optimisation(self),
                    num_train_epochs: self.num_train_epochs,
                    per_device_train_batch_size: self.per_device_train_batch_size,
                    max_tokens_per_batch: tokens.first().copied().flatten(),
                    gradient_accumulation_steps: self.gradient_accumulation_steps,
                    logging_steps: self.logging_steps,
                    eval_steps: self.eval_steps,
                    per_device_eval_batch_size: self.per_device_eval_batch_size,
                }
            }

            fn set_batch(&mut self, examples: usize, accumulation: usize) {
                (self.per_device_train_batch_size, self.gradient_accumulation_steps) = (examples, accumulation);
            }

            fn set_tokens(&mut self, tokens: usize) {
                let _ = tokens;
                $({
                    let _: $tb = $db;
                    self.max_tokens_per_batch = Some(tokens);
                })?
            }

            fn set_eval_batch(&mut self, examples: usize) {
                self.per_device_eval_batch_size = Some(examples);
            }
        }
    };
}

pub(super) use {optimised_section, supervised_section};
