//! The kernels' texts compiled by NVRTC for the architectures of today's cards, without a card: what only the card's compiler
//! refuses, registers spilled to memory, and the cache of compiled kernels.
//!
//! They need NVRTC and run with `-- --ignored`, as in CI. With `--nocapture` every kernel's registers are printed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fourfold::device::cuda::libraries::{Finder, Library, MAJORS};
use fourfold::device::cuda::nvrtc;
use fourfold::device::kernels;
use tempfile::TempDir;

const ARCHITECTURES: [&str; 5] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"];

/// Opens NVRTC for this process.
fn open_nvrtc() {
    Finder::real().open(Library::Nvrtc, &MAJORS).unwrap_or_else(|missing| panic!("{missing:#}"));
}

/// What the assembler reports of one kernel.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    registers: usize,
    /// Bytes that are stored and loaded because registers ran out.
    spilled: usize,
}

/// Each kernel's use, read off ptxas's log.
fn uses(log: &str) -> BTreeMap<String, Use> {
    let mut all = BTreeMap::<String, Use>::new();
    let mut kernel = String::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            kernel = rest.split('\'').next().unwrap().to_string();
        }
        // The number before these words.
        let before = |words: &str| -> Option<usize> {
            line.split(words).next().filter(|left| left.len() < line.len())?.split_whitespace().last()?.parse().ok()
        };
        let entry = all.entry(kernel.clone()).or_default();
        entry.spilled += before(" bytes spill stores").unwrap_or(0) + before(" bytes spill loads").unwrap_or(0);
        entry.registers = before(" registers").unwrap_or(entry.registers);
    }
    all.retain(|kernel, found| !kernel.is_empty() && found.registers > 0);
    all
}

#[test]
#[ignore = "needs NVRTC: pip install nvidia-cuda-nvrtc in a virtual environment; cargo test --release --test nvrtc -- --ignored"]
fn all_kernels_compile_for_every_architecture_without_spilled_registers() {
    open_nvrtc();
    let parts = kernels::parts();
    let jobs: Vec<(&str, &String)> =
        ARCHITECTURES.iter().flat_map(|&arch| parts.iter().map(move |t| (arch, t))).collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(BTreeMap::<String, BTreeMap<&str, Use>>::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&(arch, text)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    for (kernel, of) in uses(&nvrtc::resources(text, arch).unwrap()) {
                        found.lock().unwrap().entry(kernel).or_default().insert(arch, of);
                    }
                }
            });
        }
    });
    let found = found.into_inner().unwrap();
    println!("registers of a thread, by kernel: {}", ARCHITECTURES.join(" "));
    let mut faults = vec![];
    for (kernel, by) in &found {
        let registers: Vec<String> = by.values().map(|of| of.registers.to_string()).collect();
        println!("{kernel}: {}", registers.join(" "));
        for (arch, of) in by.iter().filter(|(_, of)| of.spilled > 0) {
            faults
                .push(format!("{kernel} on {arch}: {} bytes are spilled with {} registers", of.spilled, of.registers));
        }
        if by.len() != ARCHITECTURES.len() {
            faults.push(format!("{kernel} was compiled for {} architectures", by.len()));
        }
    }
    assert!(found.len() > 200, "{} kernels", found.len());
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

const SMALL: &str = "struct One { float* y; };\nKERNEL(one, One, 32) { store(a.y, 1.f); }";

#[test]
#[ignore = "needs NVRTC: pip install nvidia-cuda-nvrtc in a virtual environment; cargo test --release --test nvrtc -- --ignored"]
fn compiled_kernels_are_cached_and_damage_is_found() {
    open_nvrtc();
    let (cache, text) = (TempDir::new().unwrap(), kernels::with_prelude(SMALL));
    for arch in ["sm_75", "sm_80", "sm_120", "compute_90"] {
        let compile = || nvrtc::compiled(&text, arch, Some(cache.path())).unwrap();
        let (first, second) = (compile(), compile());
        let file = second.cached.unwrap();
        assert!(first.cached.is_none() && first.image == second.image, "{arch}");
        let whole = fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        for damaged in [&flipped[..], &whole[..whole.len() - 1], &[]] {
            fs::write(&file, damaged).unwrap();
            let again = compile();
            assert!(again.cached.is_none() && again.image == first.image, "{arch}");
        }
        assert!(compile().cached.is_some());
    }
    // A folder that cannot be written is no error.
    assert!(nvrtc::compiled(&text, "sm_80", Some(Path::new("/proc/nowhere"))).is_ok());
    let wrong = kernels::with_prelude("__device__ void f() {\n nonsense; }");
    let error = format!("{:#}", nvrtc::compiled(&wrong, "sm_90", None).unwrap_err());
    assert!(error.contains("nonsense") && error.contains("test.cu(2)"), "{error}");
}
