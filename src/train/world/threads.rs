//! Threads of one process as ranks: the loop runs among several ranks without MPI, as tests do. It does not depend on a
//! stage. Read `mod.rs` next.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};

use super::{Ranks, World};

/// One of the threads.
struct Thread {
    rank: usize,
    /// To each rank.
    to: Vec<Sender<Vec<u8>>>,
    /// From each rank.
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn send(&self, to: usize, message: &[u8]) -> Result<()> {
        self.to[to].send(message.to_vec()).map_err(|_| anyhow!("rank {to} is gone"))
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        let queue = self.from[from].lock().unwrap_or_else(PoisonError::into_inner);
        queue.recv().map_err(|_| anyhow!("rank {from} is gone"))
    }
}

/// The world of `size` threads as each of them sees it, rank 0 first. A rank is gone once its worlds are dropped.
pub fn worlds(size: usize) -> Vec<World> {
    let mut from: Vec<Vec<Mutex<Receiver<Vec<u8>>>>> = (0..size).map(|_| vec![]).collect();
    let mut to: Vec<Vec<Sender<Vec<u8>>>> = (0..size).map(|_| vec![]).collect();
    for sender in &mut to {
        for receivers in &mut from {
            let (one, other) = channel();
            sender.push(one);
            receivers.push(Mutex::new(other));
        }
    }
    let threads = to.into_iter().zip(from).enumerate();
    threads.map(|(rank, (to, from))| World::of(Thread { rank, to, from })).collect()
}
