//! How this process was started: alone, or as one of several by `mpirun`, read from the environment that it sets; and how a rank
//! ends. A build without the feature `mpi` only notices the others. It does not depend on a stage. Read `mod.rs` next.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Error, Result};

use super::World;
use crate::error::Interrupted;
use crate::invalid;

/// Rank and size by Open MPI, and by MPICH, Intel MPI and Slurm's PMI.
const NAMES: [[&str; 2]; 2] = [["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"], ["PMI_RANK", "PMI_SIZE"]];
/// A rank leaves rank 0 this time to report the same error, before it reports its own.
const BEHIND_THE_FIRST: Duration = Duration::from_secs(2);

/// Whether MPI runs in this process.
static STARTED: OnceLock<World> = OnceLock::new();

/// Rank and number of the processes that were started together, by the variables that `get` reads.
fn read(get: impl Fn(&str) -> Option<String>) -> (usize, usize) {
    let number = |name: &str| get(name)?.parse::<usize>().ok();
    let found = NAMES.iter().find_map(|[rank, size]| Some((number(rank)?, number(size)?)));
    // PMIx alone has no variable for the number; Slurm, which starts by PMIx, has.
    let by_pmix = || {
        let rank = number("PMIX_RANK")?;
        Some((rank, number("SLURM_STEP_NUM_TASKS").unwrap_or(rank + 1)))
    };
    found.or_else(by_pmix).unwrap_or((0, 1))
}

fn launched() -> (usize, usize) {
    read(|name| std::env::var(name).ok())
}

/// The world of this process, for a command that trains among several ranks.
///
/// # Errors
/// If several were started and this build has no MPI.
pub fn world(command: &str) -> Result<World> {
    let (_, size) = launched();
    if size < 2 {
        return Ok(World::default());
    }
    start(command, size)
}

#[cfg(feature = "mpi")]
fn start(_: &str, _: usize) -> Result<World> {
    let world = super::processes::start()?;
    Ok(STARTED.get_or_init(|| world).clone())
}

#[cfg(not(feature = "mpi"))]
fn start(command: &str, size: usize) -> Result<World> {
    Err(invalid!(
        "{size} processes of `fourfold {command}` were started together, and this fourfold was built without MPI: each would \
         train alone into the same folder; build it with cargo build --release --features mpi, or start it once"
    ))
}

/// Refuses several processes for a command that trains alone.
///
/// # Errors
/// If several were started.
pub fn alone(command: &str) -> Result<()> {
    match launched() {
        (_, 0 | 1) => Ok(()),
        (_, size) => Err(invalid!(
            "`fourfold {command}` trains in one process, and {size} were started together; start it without mpirun (sft, \
             reward, dpo, kto, ppo, grpo and rloo train among several)"
        )),
    }
}

/// Whether this process reports an error of its command. Rank 0 does at once; another rank does only if rank 0 has not ended
/// all by then, because it failed alone.
pub fn reports(error: &Error) -> bool {
    let (rank, _) = launched();
    if rank == 0 {
        return true;
    }
    if error.chain().any(|cause| cause.is::<Interrupted>()) {
        return false;
    }
    std::thread::sleep(BEHIND_THE_FIRST);
    true
}

/// The rank for an error's first words, where there are several.
pub fn prefix() -> String {
    match launched() {
        (rank, size) if size > 1 && rank > 0 => format!("rank {rank}: "),
        _ => String::new(),
    }
}

/// Called before the process ends. All ranks end together: after success and where all were stopped they wait for each other, and
/// a failure of one ends the others.
pub fn leave(code: i32, is_failure: bool) {
    if STARTED.get().is_none() {
        return;
    }
    #[cfg(feature = "mpi")]
    if is_failure {
        super::processes::abort(code)
    } else {
        super::processes::end()
    }
    #[cfg(not(feature = "mpi"))]
    let _ = (code, is_failure);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_and_size_are_read_from_what_each_launcher_sets() {
        let of = |set: &[(&str, &str)]| {
            read(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
        };
        assert_eq!(of(&[]), (0, 1));
        assert_eq!(of(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "3"), ("PMIX_RANK", "1")]), (1, 3));
        assert_eq!(of(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]), (0, 2));
        assert_eq!(of(&[("PMIX_RANK", "1"), ("SLURM_STEP_NUM_TASKS", "4")]), (1, 4));
        assert_eq!(of(&[("PMIX_RANK", "0")]), (0, 1));
        assert_eq!(of(&[("OMPI_COMM_WORLD_SIZE", "x"), ("OMPI_COMM_WORLD_RANK", "0")]), (0, 1));
    }
}
