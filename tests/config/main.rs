//! What a user writes, in a config file or on the command line: what each key changes, what is refused and with which
//! message, and what the commands print and return.

mod bad_input;
mod cli_contract;
mod errors;
mod foreseen;
mod groups;
mod guidance;
mod init;
mod large_rollouts;
#[path = "../support/llama_cpp.rs"]
mod llama_cpp;
mod options;
mod recipes;
mod report;
#[path = "../support/mod.rs"]
mod support;
#[cfg(unix)]
mod terminal;
mod told;
// The server does nothing wrong here.
#[allow(dead_code)]
#[path = "../support/vllm.rs"]
mod vllm;
mod watch;
