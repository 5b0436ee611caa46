//! What a run promises when something goes wrong, each promise on the real binary: it is killed, asked to stop, starved of
//! disk and memory, met by a second one, and given other inputs. Read world.rs for the run that all of it happens to.
#![cfg(unix)]

mod clock;
mod guard;
mod inputs;
mod interruptions;
mod kills;
mod secrets;
mod soak;
mod sources;
mod starved;
#[path = "../support/mod.rs"]
mod support;
mod world;
