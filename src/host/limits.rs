//! The memory of the machine, the limits on this process, and what the process holds as the system counts it. It does
//! not depend on the model or any stage.

use std::fs;

use crate::host::meter;

/// Has mimalloc keep freed memory until [`give_back_freed`] instead of giving it back and asking again: a training step
/// frees and takes the same buffers thousands of times a second. On SmolLM2-135M's SFT step the system's share of the
/// processor time falls from 25% to 11%. For programs whose global allocator is mimalloc; without effect in others.
/// Huge pages are off, as one that is touched anywhere is in memory as a whole: with them a training pass of SmolLM2-135M
/// that keeps 163 MiB took 206, without them 192, in no less processor time.
/// Where the address space is limited it reserves that in smaller pieces than its GiB, so that files and stacks find room
/// beside them.
pub fn keep_freed_memory() {
    /// `mi_option_purge_delay` in mimalloc.h of versions 2 and 3, in milliseconds.
    const PURGE_DELAY: i32 = 15;
    /// The value is not -1 (never): nothing could be given back then.
    const A_DAY: libc::c_long = 24 * 3600 * 1000;
    #[cfg(target_os = "linux")]
    // SAFETY: sets a flag of this process.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0)
    };
    // SAFETY: sets one integer option; callable at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, A_DAY) };
    #[cfg(target_os = "linux")]
    if let Some(limit) = [libc::RLIMIT_AS, libc::RLIMIT_DATA].into_iter().filter_map(soft_limit).min() {
        /// `mi_option_arena_reserve`, in KiB; 1 GiB by default.
        const ARENA_RESERVE: i32 = 23;
        let piece = (limit / 8).clamp(64 << 20, 1 << 30) / 1024;
        // SAFETY: as above.
        unsafe { libmimalloc_sys::mi_option_set(ARENA_RESERVE, piece as std::ffi::c_long) };
        // The system's malloc would reserve 64 MiB for each thread that asks it for anything.
        #[cfg(target_env = "gnu")]
        // SAFETY: sets one integer option; called before there is another thread.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}

/// Gives freed memory back to the system where much of it is held: between two phases of a run, whose buffers differ in
/// size, so that what one leaves would lie unused beside what the other takes.
pub fn give_back_freed() {
    /// Bytes held beyond what is in use.
    const MUCH: usize = 8 << 20;
    let heap = meter::current();
    if heap > 0 && own_rss_bytes().is_some_and(|own| own > heap + heap / 32 + MUCH) {
        give_back_all_freed();
    }
}

/// Gives all freed memory back to the system, before [`beside_heap_bytes`] is asked: what reading the inputs freed would count as
/// the process's own, and reading them from a cache frees less than tokenising them.
pub fn give_back_all_freed() {
    if meter::current() > 0 {
        // SAFETY: callable at any time; touches free memory alone.
        unsafe { libmimalloc_sys::mi_collect(true) };
    }
}

/// Peak resident set of this process in bytes; `None` where the system does not report it.
pub fn peak_rss_bytes() -> Option<usize> {
    // Linux reports KiB in /proc; elsewhere getrusage reports KiB (bytes on macOS).
    if let Some(kib) = proc_kib("/proc/self/status", "VmHWM:") {
        return Some(kib * 1024);
    }
    // SAFETY: a plain struct of integers that the call fills.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the address is of a live rusage.
    let rc = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    (rc == 0).then(|| usage.ru_maxrss as usize * unit)
}

/// Which limit bounds the memory of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LimitSource {
    /// The user, by `[memory] limit` or `--memory`.
    Asked,
    /// The machine's free memory.
    Machine,
    /// A control group around the process.
    Group,
    /// The limit on the process's address space, `ulimit -v`. Mapped files are in it.
    Addresses,
    /// The limit on its private memory, `ulimit -d`.
    Private,
}

/// Memory of its own that this process could still be given, in bytes: the least of what the machine has available (the
/// system counts pages of files there, which it can drop) with free swap, of what a control group leaves, and of what the
/// limits on address space and private memory leave; and which of them that is. `None` where the system does not report it.
pub fn available() -> Option<(usize, LimitSource)> {
    let swap = proc_kib("/proc/meminfo", "SwapFree:").unwrap_or(0);
    let machine = proc_kib("/proc/meminfo", "MemAvailable:").map(|kib| (kib + swap) * 1024);
    let bounds = [
        (machine, LimitSource::Machine),
        (group_room("/proc/self/cgroup", "/sys/fs/cgroup"), LimitSource::Group),
        (address_room(), LimitSource::Addresses),
        (private_room(), LimitSource::Private),
    ];
    bounds.into_iter().filter_map(|(room, bound)| Some((room?, bound))).min()
}

/// The number of bytes that [`available`] returns.
pub fn available_bytes() -> Option<usize> {
    available().map(|(bytes, _)| bytes)
}

/// A limit of the process, where it has one.
#[cfg(target_os = "linux")]
fn soft_limit(of: libc::__rlimit_resource_t) -> Option<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the address is of a live rlimit.
    let rc = unsafe { libc::getrlimit(of, &raw mut limit) };
    (rc == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then(|| usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

/// Bytes that `ulimit -v` leaves. Mapped files count in full, a base among them, whether or not their pages are in memory;
/// anonymous mappings, the allocator's reserve most of all, can become private memory.
fn address_room() -> Option<usize> {
    #[cfg(target_os = "linux")]
    {
        let limit = soft_limit(libc::RLIMIT_AS)?;
        let all = proc_kib("/proc/self/status", "VmSize:")? * 1024;
        let reserved = anonymous_bytes(&fs::read_to_string("/proc/self/maps").ok()?);
        Some(for_heap(limit.saturating_add(reserved).saturating_sub(all)))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Bytes that `ulimit -d` leaves.
fn private_room() -> Option<usize> {
    #[cfg(target_os = "linux")]
    return Some(for_heap(soft_limit(libc::RLIMIT_DATA)?));
    #[cfg(not(target_os = "linux"))]
    None
}

/// What the heap can still take of so many addresses, of which it has none yet. Threads take theirs, and a third of the rest is
/// kept free, because blocks of many megabytes leave gaps between them, which these limits count. (With a quarter one run in
/// six that was said to fit did not.)
#[cfg(target_os = "linux")]
fn for_heap(addresses: usize) -> usize {
    /// Addresses of a thread: its stack of 2 MiB, and the page of 4 MiB in which mimalloc 3 gives it blocks of up to 512 KiB. (With
    /// 16 threads, 66 of 128 MiB were such pages' free parts when the system refused more.)
    const OF_A_THREAD: usize = 6 << 20;
    // The threads that compute, of which the first is one, and that which waits for signals.
    let threads = candle_core::utils::get_num_threads() + 1;
    let addresses = addresses.saturating_sub(threads * OF_A_THREAD);
    (addresses - addresses / 3).saturating_sub(own_rss_bytes().unwrap_or(0))
}

/// Bytes of the writable private mappings without a file in the text of /proc/PID/maps, but for the first thread's stack.
fn anonymous_bytes(maps: &str) -> usize {
    let bytes = |line: &str| -> Option<usize> {
        let mut fields = line.split_ascii_whitespace();
        let (from, to) = fields.next()?.split_once('-')?;
        // What nobody may write to lies between other things: guard pages, and what the system's own malloc keeps free.
        let is_writable = fields.next()?.starts_with("rw-p");
        let is_file = fields.nth(2)? != "0";
        let is_ours = fields.next().is_none_or(|name| name == "[heap]" || name.starts_with("[anon"));
        let address = |text| usize::from_str_radix(text, 16).ok();
        (is_writable && !is_file && is_ours).then_some(address(to)?.checked_sub(address(from)?)?)
    };
    maps.lines().filter_map(bytes).sum()
}

/// Resident memory of this process in bytes, mapped files excluded.
pub(crate) fn own_rss_bytes() -> Option<usize> {
    proc_kib("/proc/self/status", "RssAnon:").map(|kib| kib * 1024)
}

/// Bytes that the process holds beside the heap that the meter counts: program, stacks, and the allocator's reserve.
pub fn beside_heap_bytes() -> usize {
    // Counted page by page: some kernels' sum in `status` lacks what each processor has not yet added to it.
    let counted = || proc_kib("/proc/self/smaps_rollup", "Anonymous:").map(|kib| kib * 1024);
    match meter::current() {
        0 => 0,
        heap => counted().or_else(own_rss_bytes).map_or(0, |own| own.saturating_sub(heap)),
    }
}

/// Bytes that the control groups around this process leave: the limit of each, less what it holds and could not drop. Version 2
/// (`memory.max`) and version 1 (`memory.limit_in_bytes`).
fn group_room(membership: &str, root: &str) -> Option<usize> {
    let text = fs::read_to_string(membership).ok()?;
    let mut room: Option<usize> = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (base, files) = match controllers {
            "" => (root.to_owned(), ["memory.max", "memory.current"]),
            c if c.split(',').any(|c| c == "memory") => {
                (format!("{root}/memory"), ["memory.limit_in_bytes", "memory.usage_in_bytes"])
            }
            _ => continue,
        };
        // A group is bound by those above it. Inside of a container, its own may be what it sees as the root.
        let mut path = path.trim_end_matches('/');
        loop {
            let dir = format!("{base}{path}");
            let bytes =
                |name: &str| -> Option<usize> { fs::read_to_string(format!("{dir}/{name}")).ok()?.trim().parse().ok() };
            if let (Some(limit), Some(held)) = (bytes(files[0]), bytes(files[1])) {
                let stat = fs::read_to_string(format!("{dir}/memory.stat")).unwrap_or_default();
                let of = |key: &str| -> usize {
                    let line = stat.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
                    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
                };
                let files_held = of("active_file") + of("inactive_file");
                let left = limit.saturating_sub(held.saturating_sub(files_held));
                room = Some(room.map_or(left, |room| room.min(left)));
            }
            match path.rfind('/') {
                Some(at) => path = &path[..at],
                None => break,
            }
        }
    }
    room
}

fn proc_kib(file: &str, key: &str) -> Option<usize> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_without_a_file_can_become_memory_of_ones_own() {
        let maps = "00400000-00500000 r-xp 00000000 08:01 77   /usr/bin/fourfold\n\
                    00500000-00501000 rw-p 00100000 08:01 77   /usr/bin/fourfold\n\
                    01000000-01002000 rw-p 00000000 00:00 0    [heap]\n\
                    7f0000000000-7f0040000000 rw-p 00000000 00:00 0 \n\
                    7f0100000000-7f0140000000 ---p 00000000 00:00 0 \n\
                    7f0040000000-7f0040003000 rw-p 00000000 00:00 0 [anon: reserve]\n\
                    7f1000000000-7f1000100000 r--p 00000000 08:01 99   /models/model.safetensors\n\
                    7f2000000000-7f2000100000 rw-s 00000000 00:01 5    /dev/zero (deleted)\n\
                    7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0    [stack]\n\
                    7ffd00100000-7ffd00102000 r-xp 00000000 00:00 0    [vdso]\nnonsense\n";
        assert_eq!(anonymous_bytes(maps), 0x2000 + 0x4000_0000 + 0x3000);
        #[cfg(target_os = "linux")]
        {
            let now = || anonymous_bytes(&fs::read_to_string("/proc/self/maps").unwrap());
            let before = now();
            let block = std::hint::black_box(vec![1u8; 64 << 20]);
            assert!(now() >= before + (64 << 20) - (1 << 20), "{before} {}", now());
            drop(block);
        }
    }

    #[test]
    fn a_control_groups_room_counts_what_it_could_drop_and_the_tightest_group_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("cgroup");
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let membership = dir.path().join("membership");
        fs::write(&membership, "0::/outer/inner\n").unwrap();
        put("outer/inner/memory.max", "max\n");
        put("outer/inner/memory.current", "10\n");
        put("outer/memory.max", "1000\n");
        put("outer/memory.current", "700\n");
        put("outer/memory.stat", "anon 300\nfile 400\nactive_file 150\ninactive_file 250\n");
        let room = || group_room(membership.to_str().unwrap(), root.to_str().unwrap());
        assert_eq!(room(), Some(700));
        put("outer/inner/memory.max", "50\n");
        assert_eq!(room(), Some(40));
        fs::write(&membership, "7:cpu,memory:/job\n").unwrap();
        put("memory/job/memory.limit_in_bytes", "500\n");
        put("memory/job/memory.usage_in_bytes", "600\n");
        assert_eq!(room(), Some(0), "held beyond the limit");
        fs::write(&membership, "7:cpu:/job\n").unwrap();
        assert_eq!(room(), None);
    }
}
