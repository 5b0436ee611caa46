//! Compiles the kernels' text as C++ into a shared library and loads it. The library is kept on disk under a name that
//! depends on the text, the flags and the compiler, so that a text is compiled once. It needs a C++ compiler and no
//! part of the C++ library. It does not depend on CUDA. Read `pool.rs` beside it, then host.cpp.

use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_char, c_void};
use std::fmt;
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::super::lock;

const HOST_H: &str = include_str!("host.h");
const HOST_CPP: &str = include_str!("host.cpp");

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-w",
    // The text reads numbers as words, as code for the card may.
    "-fno-strict-aliasing",
    // Rounding is written out; the card fuses on its own.
    "-ffp-contract=off",
    "-fno-math-errno",
    // No part of the C++ library is needed.
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    // Two texts in one process do not see each other's names.
    "-fvisibility=hidden",
    // The checked longjmp takes a change of stacks for an attack.
    "-U_FORTIFY_SOURCE",
];

/// For the text alone: what a card answers with a fault or a wrong number is an error that names the line. The
/// compiler's own runtime for this is not needed, because host.cpp has the handlers.
const CHECKS: &str = "-fsanitize=alignment,null,bounds,shift-exponent,integer-divide-by-zero";

/// A compiler and a folder for what it makes.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// Commands to try, in this order.
    pub compilers: Vec<OsString>,
    /// Where libraries are kept.
    pub cache: PathBuf,
}

/// The user's folder for what fourfold compiles: below `XDG_CACHE_HOME`, or below `.cache` of the home folder, or a
/// folder for temporary files if neither is known.
pub fn cache_folder(name: &str) -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("fourfold").join(name)
}

impl Toolchain {
    /// `CXX`, c++, g++ or clang++, and the user's cache folder.
    pub fn from_environment() -> Self {
        let cxx = std::env::var_os("CXX").filter(|value| !value.is_empty());
        let compilers = cxx.into_iter().chain(["c++", "g++", "clang++"].map(OsString::from)).collect();
        Self { compilers, cache: cache_folder("emulated") }
    }

    /// Whether there is a compiler.
    ///
    /// # Errors
    /// If no command answers.
    pub fn check(&self) -> Result<()> {
        self.compiler().map(|_| ())
    }

    /// The first compiler that answers, and what it says of itself.
    fn compiler(&self) -> Result<(&OsString, String)> {
        for command in &self.compilers {
            if let Ok(output) = Command::new(command).arg("--version").output()
                && output.status.success()
            {
                return Ok((command, String::from_utf8_lossy(&output.stdout).into_owned()));
            }
        }
        let tried: Vec<_> = self.compilers.iter().map(|c| c.to_string_lossy()).collect();
        bail!(
            "the emulated machine compiles its kernels and found no C++ compiler (tried {}): install one, for example \
             with `apt install g++`, or set CXX to its command",
            tried.join(", ")
        )
    }
}

/// A kernel of a library.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub entry: Entry,
    /// Bytes of its arguments.
    pub bytes: usize,
    /// Threads of its blocks.
    pub threads: u32,
}

/// host.h's `Entry`.
#[derive(Clone, Copy)]
pub(super) struct Entry(*const c_void);
// SAFETY: it points to constant data of a library that is never unloaded.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

/// host.cpp's `Fault`.
#[repr(C)]
pub(super) struct Fault {
    failed: u32,
    block: [u32; 3],
    thread: u32,
    text: [u8; 244],
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = CStr::from_bytes_until_nul(&self.text).unwrap_or_default().to_string_lossy();
        write!(f, "{text}, in block {:?}, thread {}", self.block, self.thread)
    }
}

type Find = unsafe extern "C" fn(*const c_char, *mut usize, *mut u32) -> *const c_void;
type Run = unsafe extern "C" fn(*const c_void, *const u32, u64, u64, *const c_void, u64, *mut Fault);

/// A loaded text. It is never unloaded, because threads of the process keep stacks of it.
pub(super) struct Library {
    find: Find,
    run: Run,
    /// The file that it was loaded from.
    pub file: PathBuf,
    /// The first line of the compiler's version.
    pub compiler: String,
}

impl Library {
    pub fn find(&self, name: &CStr) -> Option<Found> {
        let (mut bytes, mut threads) = (0, 0);
        // SAFETY: the function has this signature in host.cpp.
        let entry = unsafe { (self.find)(name.as_ptr(), &mut bytes, &mut threads) };
        (!entry.is_null()).then_some(Found { entry: Entry(entry), bytes, threads })
    }

    /// Runs some blocks of a grid and returns what went wrong.
    ///
    /// # Safety
    /// The entry is of this library, and the arguments are those of its kernel.
    pub unsafe fn run(
        &self,
        entry: Entry,
        grid: &[u32; 3],
        blocks: Range<u64>,
        arguments: *const c_void,
        seed: u64,
    ) -> Option<Fault> {
        let mut fault = Fault { failed: 0, block: [0; 3], thread: 0, text: [0; 244] };
        // SAFETY: the function has this signature in host.cpp; the rest is promised by the caller.
        unsafe { (self.run)(entry.0, grid.as_ptr(), blocks.start, blocks.end, arguments, seed, &mut fault) };
        (fault.failed != 0).then_some(fault)
    }

    fn load(file: &Path, compiler: &str) -> Result<Self> {
        // The loader trusts a file's length, and a file that was cut off would end the process.
        ensure!(fs::read(file).is_ok_and(|bytes| is_whole(&bytes)), "the file is damaged");
        // SAFETY: it was compiled from the text; loading it only registers kernels.
        let library = unsafe { libloading::Library::new(file) }?;
        // SAFETY: both functions have these signatures in host.cpp.
        let (find, run) =
            unsafe { (*library.get::<Find>(b"emulated_find\0")?, *library.get::<Run>(b"emulated_run\0")?) };
        std::mem::forget(library);
        let compiler = compiler.lines().next().unwrap_or_default().into();
        Ok(Self { find, run, file: file.into(), compiler })
    }
}

/// The library of a text: loaded before in this process, or from the cache, or compiled now.
pub(super) fn library(text: &str, toolchain: &Toolchain) -> Result<Arc<Library>> {
    static LOADED: Mutex<Option<HashMap<PathBuf, Arc<Library>>>> = Mutex::new(None);
    let (compiler, version) = toolchain.compiler()?;
    let mut hash = Sha256::new();
    for part in [text, HOST_H, HOST_CPP, &FLAGS.join(" "), CHECKS, &version] {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    let key: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let file = toolchain.cache.join(format!("{key}.so"));
    // Held while compiling: threads of one process that want the same text compile it once.
    let mut loaded = lock(&LOADED);
    let loaded = loaded.get_or_insert_default();
    if let Some(library) = loaded.get(&file) {
        return Ok(library.clone());
    }
    let library = match Library::load(&file, &version) {
        Ok(library) => library,
        Err(_) => {
            compile(text, compiler, &file)?;
            Library::load(&file, &version).with_context(|| format!("loading {}", file.display()))?
        }
    };
    let library = Arc::new(library);
    loaded.insert(file, library.clone());
    Ok(library)
}

/// Compiles into a folder of its own, then moves the result into place: whole or not at all, whoever else does the
/// same.
fn compile(text: &str, compiler: &OsString, file: &Path) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let unique = format!("part-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let folder = file.with_extension(unique);
    let made = compile_in(&folder, text, compiler, file);
    fs::remove_dir_all(&folder).ok();
    made
}

fn compile_in(folder: &Path, text: &str, compiler: &OsString, file: &Path) -> Result<()> {
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("host.h"), HOST_H)?;
        fs::write(folder.join("host.cpp"), HOST_CPP)?;
        fs::write(folder.join("kernels.cpp"), format!("#define EMULATED 1\n{text}\n"))
    };
    write().with_context(|| format!("the emulated machine cannot write to {}", folder.display()))?;
    let call = |arguments: &[&str]| {
        let output = Command::new(compiler).current_dir(folder).args(arguments).output();
        output.with_context(|| format!("{} cannot be started", compiler.to_string_lossy()))
    };
    for arguments in [&["-c", "host.cpp"][..], &["-c", "kernels.cpp", CHECKS]] {
        let output = call(&[FLAGS, arguments].concat())?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} refuses the kernels' text:\n{error}", compiler.to_string_lossy());
    }
    // Without the C++ library where the linker allows it.
    let lean = call(&["-shared", "-nodefaultlibs", "host.o", "kernels.o", "-o", "kernels.so", "-lm", "-lc"])?;
    if !lean.status.success() {
        let plain = call(&["-shared", "host.o", "kernels.o", "-o", "kernels.so", "-lm"])?;
        let error = String::from_utf8_lossy(&plain.stderr);
        ensure!(plain.status.success(), "{} cannot link the kernels:\n{error}", compiler.to_string_lossy());
    }
    let made = folder.join("kernels.so");
    seal(&made)
        .and_then(|()| fs::rename(&made, file))
        .with_context(|| format!("the emulated machine cannot write {}", file.display()))
}

/// A digest at the end of a library, which loaders do not look at.
fn seal(file: &Path) -> std::io::Result<()> {
    let digest = Sha256::digest(fs::read(file)?);
    let mut file = fs::OpenOptions::new().append(true).open(file)?;
    file.write_all(&digest)?;
    file.sync_all()
}

fn is_whole(bytes: &[u8]) -> bool {
    let library = bytes.len().checked_sub(32).map(|at| bytes.split_at(at));
    library.is_some_and(|(library, digest)| Sha256::digest(library)[..] == *digest)
}
