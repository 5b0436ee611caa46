//! Training: losses, gradients and updates of each stage, model families, LoRA targets and reward sources, against golden
//! numbers and against invariants.

mod context_edges;
mod distill;
mod dpo;
mod dschat;
mod ensembles;
mod families;
mod invariants;
mod judge;
mod kl_penalty;
#[path = "../support/llama_cpp.rs"]
mod llama_cpp;
mod llama_cpp_rollouts;
mod lora_targets;
mod ppo_update;
mod ranks;
mod ranks_rollouts;
mod reward_sources;
mod rollouts_ahead;
mod served_rewards;
mod served_rollouts;
mod shipped_adapters;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/tiny_decoders.rs"]
mod tiny_decoders;
#[path = "../support/vllm.rs"]
mod vllm;
