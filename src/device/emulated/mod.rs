//! The machine that runs the card's kernels on the CPU, slowly and strictly. The kernels' text is compiled as C++ at
//! run time (compile.rs) and run block by block on all cores (host.cpp, pool.rs). What a card would do silently is an
//! error: writing past a buffer, a barrier that some threads never reach, an index outside of an array, an address that
//! is not aligned, arguments of another size. Fresh memory holds NaN, and so does a buffer that a copy or a kernel
//! beside the order of work fills, from the moment it may begin until it is waited for. Tests can make any allocation, launch or
//! copy fail. It does not depend on CUDA. Read `compile.rs` beside it next, then host.h.
//!
//! Each buffer lies between two guards of 256 bytes. After a launch, the buffers whose addresses are among its
//! arguments are looked at; those of a product, an upload or a download too. All buffers are looked at after every 64th
//! launch, by `synchronize`, and each one when it is freed. So a write past an argument's end is blamed on its kernel,
//! and a write to the edges of any other buffer is found soon after.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::CString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};

mod compile;
mod filling;
mod gemm;
mod pool;

use super::downloads::through;
use super::dry::{free_host_memory, host_memory};
use super::machine::{Element, Info, Launch, LibraryInfo, Machine, Piece, Product, Recorded, Refusal};
use super::{kernels, lock};
use compile::{Fault, Found, Library};
use filling::Filling;

pub use compile::{Toolchain, cache_folder};

const GUARD: usize = 256;
/// Four of them are a NaN of f32, two of them one of bf16 and of f16.
const POISON: u8 = 0xFF;
/// All guards are looked at after so many launches.
const ALL_GUARDS_EVERY: u64 = 64;

/// See the file's header.
pub struct Emulated {
    library: Arc<Library>,
    found: Mutex<HashMap<String, Found>>,
    memory: Mutex<Memory>,
    /// Launches run one at a time.
    turn: Mutex<u64>,
    /// The seed of shuffled order, or 0.
    shuffle: AtomicU64,
    allocations: Countdown,
    launches: Countdown,
    copies: Countdown,
    recordings: Countdown,
    kept: Mutex<Kept>,
    lanes: Mutex<Lanes>,
    beside: Mutex<Waiting>,
}

/// Kernels that were started beside the order of work, by ticket, and the next ticket.
#[derive(Default)]
struct Waiting {
    launches: BTreeMap<u64, Recorded>,
    next: u64,
}

/// Recorded launches by number, and the next number.
#[derive(Default)]
struct Kept {
    recordings: HashMap<u64, Arc<Vec<Recorded>>>,
    next: u64,
}

/// The lanes that are open, by number.
#[derive(Default)]
struct Lanes {
    open: BTreeMap<u64, Lane>,
    next: u64,
    /// Copies that nobody has waited for, in the order in which they were started.
    under_way: VecDeque<Copying>,
    /// Nobody waits for arrivals: for tests of the poison.
    unawaited: bool,
}

#[derive(Clone, Copy, Default)]
struct Lane {
    /// It has arrived and was not released since.
    in_use: bool,
}

/// A copy through a lane, between memory of the host and the lane's buffer.
struct Copying {
    lane: u64,
    from: usize,
    to: usize,
    bytes: usize,
}

impl Lanes {
    /// A copy is started: what `to` held is lost at once, and what comes is there at the last moment. A card may do either.
    ///
    /// # Safety
    /// Both are memory of so many bytes that stays until the copy is over.
    unsafe fn start(&mut self, copying: Copying) -> Result<()> {
        let state = self.open.get(&copying.lane).context("a copy through a lane that is not open")?;
        ensure!(!state.in_use, "a buffer is copied while work that was issued may still use it: it was not released");
        // Copies are done in order: an earlier one has read what this one overwrites.
        self.finish(|earlier| earlier.from == copying.to || earlier.to == copying.to);
        // SAFETY: promised by the caller.
        unsafe { (copying.to as *mut u8).write_bytes(POISON, copying.bytes) };
        self.under_way.push_back(copying);
        Ok(())
    }

    /// Copies up to the last one of these are done.
    fn finish(&mut self, these: impl FnMut(&Copying) -> bool) {
        let Some(last) = self.under_way.iter().rposition(these) else { return };
        for Copying { from, to, bytes, .. } in self.under_way.drain(..=last) {
            // SAFETY: whoever started the copy promised that both stay until it is over.
            unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
        }
    }
}

#[derive(Default)]
struct Memory {
    /// Bytes of what is allocated, by address.
    buffers: BTreeMap<u64, usize>,
    /// Damage that was found where it could not be reported.
    damage: Option<String>,
}

/// Counts operations down to the one that fails, and every later one fails too.
struct Countdown(AtomicU64);

impl Countdown {
    const NEVER: u64 = u64::MAX;

    fn never() -> Self {
        Self(AtomicU64::new(Self::NEVER))
    }

    fn set(&self, after: Option<u64>) {
        self.0.store(after.unwrap_or(Self::NEVER), Ordering::SeqCst);
    }

    fn fails(&self) -> bool {
        let step = |left| if left == Self::NEVER || left == 0 { None } else { Some(left - 1) };
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step) == Err(0)
    }
}

impl Emulated {
    /// The machine with all kernels of this crate. Errors: there is no C++ compiler, or it refuses the text. With
    /// `FOURFOLD_EMULATED_SHUFFLE` set to a number other than 0, threads run in an order drawn with that seed.
    pub fn open() -> Result<Self> {
        Self::with_text(kernels::text())
    }

    /// The machine with another text of kernels, for tests.
    pub fn with_text(text: &str) -> Result<Self> {
        Self::with(text, &Toolchain::from_environment())
    }

    /// The machine with a text, a compiler and a cache folder.
    pub fn with(text: &str, toolchain: &Toolchain) -> Result<Self> {
        let seed = match std::env::var("FOURFOLD_EMULATED_SHUFFLE") {
            Ok(seed) => seed.parse().with_context(|| format!("FOURFOLD_EMULATED_SHUFFLE = {seed} is no number"))?,
            Err(_) => 0,
        };
        Ok(Self {
            library: compile::library(text, toolchain)?,
            found: Mutex::default(),
            memory: Mutex::default(),
            turn: Mutex::default(),
            shuffle: AtomicU64::new(seed),
            allocations: Countdown::never(),
            launches: Countdown::never(),
            copies: Countdown::never(),
            recordings: Countdown::never(),
            kept: Mutex::default(),
            lanes: Mutex::default(),
            beside: Mutex::default(),
        })
    }

    /// Threads run in an order drawn with this seed, and whole warps are held back, so that a missing barrier shows.
    /// With a seed of 0 they run in plain order.
    pub fn shuffled(self, seed: u64) -> Self {
        self.shuffle.store(seed, Ordering::SeqCst);
        self
    }

    /// So many more allocations succeed, and all later ones are out of memory; `None` ends that.
    pub fn fail_allocation_after(&self, count: Option<u64>) {
        self.allocations.set(count);
    }

    /// So many more launches and products succeed, and all later ones fail; `None` ends that.
    pub fn fail_launch_after(&self, count: Option<u64>) {
        self.launches.set(count);
    }

    /// So many more uploads and downloads succeed, and all later ones fail; `None` ends that.
    pub fn fail_copy_after(&self, count: Option<u64>) {
        self.copies.set(count);
    }

    /// So many more recordings and replays succeed, and all later ones fail; `None` ends that.
    pub fn fail_recording_after(&self, count: Option<u64>) {
        self.recordings.set(count);
    }

    /// How many recordings it keeps.
    pub fn recordings(&self) -> usize {
        lock(&self.kept).recordings.len()
    }

    /// With `true`, no fill and no kernel beside the order of work is waited for any more, as if a program had forgotten to: what
    /// reads their buffers reads NaN.
    pub fn forget_arrivals(&self, forget: bool) {
        lock(&self.lanes).unawaited = forget;
    }

    /// Bytes in use, counted from the buffers and not from the ledger.
    pub fn live(&self) -> usize {
        lock(&self.memory).buffers.values().sum()
    }

    fn find(&self, kernel: &str) -> Result<Found> {
        let mut found = lock(&self.found);
        if let Some(known) = found.get(kernel) {
            return Ok(*known);
        }
        let entry =
            self.library.find(&CString::new(kernel)?).context("the kernels' text has no kernel of this name")?;
        found.insert(kernel.into(), entry);
        Ok(entry)
    }

    /// # Safety
    /// As for `Machine::launch`.
    unsafe fn run(&self, launch: &Launch<'_>) -> Result<()> {
        let Found { entry, bytes, threads } = self.find(launch.kernel)?;
        ensure!(bytes == launch.bytes, "its arguments are {bytes} bytes in the text and {} here", launch.bytes);
        ensure!(threads == launch.block, "its blocks have {threads} threads in the text and {} here", launch.block);
        let mut turn = lock(&self.turn);
        *turn += 1;
        let blocks = launch.grid.iter().map(|&g| u64::from(g)).product::<u64>();
        let (arguments, grid, seed) = (launch.arguments as usize, launch.grid, self.shuffle.load(Ordering::SeqCst));
        let fault = Mutex::new(None::<Fault>);
        // A few blocks at a time: the calls are cheap beside the blocks, and all cores end at about the same time.
        let chunk = (blocks / 64).clamp(1, 1024);
        let run = |chunk_index: u64| {
            let first = chunk_index * chunk;
            // SAFETY: the entry is of this library, and the arguments have its size and live until all is done.
            let failed = unsafe {
                self.library.run(entry, &grid, first..(first + chunk).min(blocks), arguments as *const _, seed)
            };
            match failed {
                None => true,
                Some(failed) => {
                    lock(&fault).get_or_insert(failed);
                    false
                }
            }
        };
        // Work so small that another core would come too late stays on this one.
        let alone = blocks * u64::from(threads) < 4096;
        pool::parallel(blocks.div_ceil(chunk), alone, &run);
        if let Some(fault) = lock(&fault).take() {
            bail!("{fault}");
        }
        // SAFETY: the struct has so many bytes; words may lie at any address.
        let words = (0..bytes / 8).map(|i| unsafe { launch.arguments.cast::<u64>().add(i).read_unaligned() });
        let mut memory = lock(&self.memory);
        memory.check(words)?;
        if turn.is_multiple_of(ALL_GUARDS_EVERY) {
            memory.check_all().context("found by the look at all buffers after every 64th launch")?;
        }
        Ok(())
    }
}

impl Memory {
    /// The buffer that an address lies in.
    fn around(&self, address: u64) -> Option<(u64, usize)> {
        let (&start, &bytes) = self.buffers.range(..=address).next_back()?;
        (address < start + bytes as u64).then_some((start, bytes))
    }

    /// Looks at the guards of the buffers that the addresses lie in.
    fn check(&mut self, addresses: impl IntoIterator<Item = u64>) -> Result<()> {
        if let Some(damage) = self.damage.take() {
            bail!("{damage}");
        }
        for address in addresses {
            if let Some((start, bytes)) = self.around(address)
                && let Some(damage) = damage(start, bytes)
            {
                bail!("{damage}");
            }
        }
        Ok(())
    }

    fn check_all(&mut self) -> Result<()> {
        let all: Vec<u64> = self.buffers.keys().copied().collect();
        self.check(all)
    }
}

/// Eight bytes of a guard. They depend on the address, because one value for all would hide a kernel that copies from
/// one guard to another.
fn guard_word(address: u64) -> u64 {
    address.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xA5A5_5A5A_C3C3_3C3C
}

fn guards(start: u64, bytes: usize) -> [(&'static str, u64); 2] {
    [("before", start - GUARD as u64), ("past", start + bytes as u64)]
}

fn write_guard(at: u64) {
    for at in (at..at + GUARD as u64).step_by(8) {
        // SAFETY: the guard was allocated with its buffer, at multiples of 8 bytes.
        unsafe { (at as *mut u64).write(guard_word(at)) };
    }
}

/// What is wrong with a buffer's guards. They are whole again afterwards, so that damage is reported once.
fn damage(start: u64, bytes: usize) -> Option<String> {
    for (side, at) in guards(start, bytes) {
        // SAFETY: the guards were allocated with the buffer, at multiples of 8 bytes.
        let guard = unsafe { std::slice::from_raw_parts(at as *const u64, GUARD / 8) };
        let count = |(word, at): (&u64, u64)| {
            let wrong = (word ^ guard_word(at)).to_ne_bytes();
            wrong.iter().filter(|b| **b != 0).count()
        };
        let wrong: usize = guard.iter().zip((at..).step_by(8)).map(count).sum();
        if wrong > 0 {
            write_guard(at);
            return Some(format!("{wrong} bytes were written {side} a buffer of {bytes} bytes"));
        }
    }
    None
}

impl Machine for Emulated {
    fn name(&self) -> String {
        "the emulated machine".into()
    }

    fn info(&self) -> Result<Info> {
        let compiler = LibraryInfo { what: "C++ compiler".into(), path: None, version: self.library.compiler.clone() };
        let kernels =
            LibraryInfo { what: "kernels".into(), path: Some(self.library.file.clone()), version: String::new() };
        Ok(Info {
            name: "emulated: the card's kernels on the CPU".into(),
            arch: std::env::consts::ARCH.into(),
            libraries: vec![compiler, kernels],
            ..Info::default()
        })
    }

    fn supports(&self, _: Element) -> bool {
        true
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        if self.allocations.fails() {
            return Err(Refusal::Full { free: None });
        }
        let start = guarded_layout(bytes)
            // SAFETY: the size is not 0.
            .map(|layout| unsafe { std::alloc::alloc(layout) })
            .filter(|start| !start.is_null())
            .ok_or(Refusal::Full { free: None })? as u64;
        let address = start + GUARD as u64;
        // SAFETY: it was just allocated.
        unsafe { (address as *mut u8).write_bytes(POISON, bytes) };
        guards(address, bytes).into_iter().for_each(|(_, guard)| write_guard(guard));
        lock(&self.memory).buffers.insert(address, bytes);
        Ok(address)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        let mut memory = lock(&self.memory);
        let known = memory.buffers.remove(&address);
        if known != Some(bytes) {
            memory.damage = Some(format!("{bytes} bytes were freed that were not allocated so"));
            return;
        }
        if let Some(damage) = damage(address, bytes) {
            memory.damage = Some(format!("{damage}; found when it was freed"));
        }
        if let Some(layout) = guarded_layout(bytes) {
            // SAFETY: allocated in `allocate` with this layout.
            unsafe { std::alloc::dealloc((address - GUARD as u64) as *mut u8, layout) };
        }
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8> {
        host_memory(bytes)
    }

    unsafe fn free_host(&self, address: *mut u8, bytes: usize) {
        // SAFETY: promised by the caller.
        unsafe { free_host_memory(address, bytes) };
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        ensure!(!self.copies.fails(), "the upload failed, as a test asked for");
        // SAFETY: promised by the caller; memory of the host and buffers do not overlap.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        lock(&self.memory).check([to])
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        ensure!(!self.copies.fails(), "the download failed, as a test asked for");
        // SAFETY: promised by the caller.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        lock(&self.memory).check([from])
    }

    unsafe fn download_each(&self, pieces: &[Piece]) -> Result<()> {
        for _ in pieces {
            ensure!(!self.copies.fails(), "the download failed, as a test asked for");
        }
        // SAFETY: promised by the caller.
        unsafe { through(&mut Filling::default(), pieces)? };
        lock(&self.memory).check(pieces.iter().map(|piece| piece.from))
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        lock(&self.memory).check([address])
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
        lock(&self.memory).check([from, to])
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        ensure!(!self.launches.fails(), "the launch failed, as a test asked for");
        // SAFETY: promised by the caller.
        unsafe { self.run(launch) }
    }

    unsafe fn launch_beside(&self, launch: &Launch<'_>, (address, bytes): (u64, usize)) -> Result<u64> {
        ensure!(!self.launches.fails(), "the launch failed, as a test asked for");
        // What the memory held is lost at once, and the kernel runs at the last moment. A card may do either.
        // SAFETY: promised by the caller.
        unsafe { (address as *mut u8).write_bytes(POISON, bytes) };
        let mut beside = lock(&self.beside);
        beside.next += 1;
        let ticket = beside.next;
        beside.launches.insert(ticket, Recorded::of(launch));
        Ok(ticket)
    }

    fn join(&self, ticket: u64) -> Result<()> {
        let is_forgotten = lock(&self.lanes).unawaited;
        // They run one after another, so those that were started before it are done as well.
        loop {
            let mut beside = lock(&self.beside);
            let Some(first) = beside.launches.first_entry().filter(|first| *first.key() <= ticket) else {
                return Ok(());
            };
            let recorded = first.remove();
            drop(beside);
            if is_forgotten {
                continue;
            }
            let launch = recorded.launch();
            // SAFETY: whoever started it promised what `launch` needs until the join.
            unsafe { self.run(&launch) }
                .with_context(|| format!("kernel {} beside the order of work", launch.kernel))?;
        }
    }

    unsafe fn gemm(&self, product: &Product) -> Result<()> {
        ensure!(!self.launches.fails(), "the product failed, as a test asked for");
        let _turn = lock(&self.turn);
        // SAFETY: promised by the caller.
        unsafe { gemm::gemm(product) };
        lock(&self.memory).check([product.x.address, product.w.address, product.y.address])
    }

    fn record(&self, launches: Vec<Recorded>) -> Result<u64> {
        ensure!(!self.recordings.fails(), "the recording failed, as a test asked for");
        let mut kept = lock(&self.kept);
        kept.next += 1;
        let number = kept.next;
        kept.recordings.insert(number, Arc::new(launches));
        Ok(number)
    }

    unsafe fn replay(&self, recording: u64) -> Result<()> {
        ensure!(!self.recordings.fails(), "the replay failed, as a test asked for");
        let launches = lock(&self.kept).recordings.get(&recording).cloned().context("there is no such recording")?;
        for launch in &*launches {
            let launch = launch.launch();
            // SAFETY: promised by the caller.
            unsafe { self.launch(&launch) }.with_context(|| format!("kernel {} of a replay", launch.kernel))?;
        }
        Ok(())
    }

    fn forget(&self, recording: u64) {
        lock(&self.kept).recordings.remove(&recording);
    }

    fn synchronize(&self) -> Result<()> {
        lock(&self.memory).check_all()
    }

    fn open_lane(&self) -> Result<u64> {
        let mut lanes = lock(&self.lanes);
        lanes.next += 1;
        let lane = lanes.next;
        lanes.open.insert(lane, Lane::default());
        Ok(lane)
    }

    fn close_lane(&self, lane: u64) {
        let mut lanes = lock(&self.lanes);
        lanes.finish(|copying| copying.lane == lane);
        lanes.open.remove(&lane);
    }

    unsafe fn fill(&self, lane: u64, from: &[u8], to: u64) -> Result<()> {
        ensure!(!self.copies.fails(), "the fill failed, as a test asked for");
        let copying = Copying { lane, from: from.as_ptr() as usize, to: to as usize, bytes: from.len() };
        // SAFETY: promised by the caller.
        unsafe { lock(&self.lanes).start(copying)? };
        lock(&self.memory).check([to])
    }

    unsafe fn spill(&self, lane: u64, from: u64, to: &mut [u8]) -> Result<()> {
        ensure!(!self.copies.fails(), "the copy to the host failed, as a test asked for");
        let copying = Copying { lane, from: from as usize, to: to.as_mut_ptr() as usize, bytes: to.len() };
        // SAFETY: promised by the caller.
        unsafe { lock(&self.lanes).start(copying) }
    }

    fn arrive(&self, lane: u64) -> Result<()> {
        let mut lanes = lock(&self.lanes);
        if !lanes.unawaited {
            lanes.finish(|copying| copying.lane == lane);
        }
        lanes.open.get_mut(&lane).context("a wait for a lane that is not open")?.in_use = true;
        Ok(())
    }

    fn release(&self, lane: u64) -> Result<()> {
        lock(&self.lanes).open.get_mut(&lane).context("a release of a lane that is not open")?.in_use = false;
        Ok(())
    }
}

/// A buffer with its guards.
fn guarded_layout(bytes: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(bytes.checked_add(2 * GUARD)?, GUARD).ok()
}

impl Drop for Emulated {
    fn drop(&mut self) {
        // Matrices hold the device, so nothing is left here unless a test called the machine itself.
        for (&address, &bytes) in &lock(&self.memory).buffers {
            if let Some(layout) = guarded_layout(bytes) {
                // SAFETY: allocated in `allocate` with this layout, and nobody can use it any more.
                unsafe { std::alloc::dealloc((address - GUARD as u64) as *mut u8, layout) };
            }
        }
    }
}
