//! What a run promises when something goes wrong, tested on the real binary: it is killed, asked to stop, starved of
//! disk and memory, disturbed by a second process, and given other inputs. Read world.rs for the run that all of it
//! happens to.
#![cfg(unix)]

mod clock;
mod guard;
mod inputs;
mod interruptions;
mod kills;
#[path = "../support/llama_cpp.rs"]
mod llama_cpp;
mod overwritten;
mod secrets;
mod servers;
mod soak;
mod sources;
mod starved;
#[path = "../support/mod.rs"]
mod support;
#[allow(dead_code, reason = "the server does nothing wrong here")]
#[path = "../support/vllm.rs"]
mod vllm;
mod world;
