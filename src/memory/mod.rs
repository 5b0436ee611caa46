//! What the process uses and what the machine has. Knows no model.

use std::fs;

/// Peak resident set of this process in bytes; `None` where the system does not say.
pub fn peak_rss_bytes() -> Option<usize> {
    // Linux says it in KiB in /proc; elsewhere getrusage does (KiB, bytes on macOS).
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

/// Resident set of this process now, in bytes.
pub fn rss_bytes() -> Option<usize> {
    proc_kib("/proc/self/status", "VmRSS:").map(|kib| kib * 1024)
}

/// Memory that the machine could still give out, in bytes; `None` where the system does not say.
pub fn available_bytes() -> Option<usize> {
    proc_kib("/proc/meminfo", "MemAvailable:").map(|kib| kib * 1024)
}

fn proc_kib(file: &str, key: &str) -> Option<usize> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
