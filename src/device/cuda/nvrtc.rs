//! Compiles the kernels' text for one architecture and keeps the result on disk. Machine code is preferred, because
//! loading PTX makes the driver compile for seconds; PTX serves cards that are newer than the compiler. NVRTC
//! must be open (`libraries.rs`). It does not depend on a card. Read `mod.rs` beside it next.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

/// No fast mathematics: kernels have to agree with the CPU.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=true"];

/// What the card loads.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Machine code, or PTX that ends with a zero.
    pub image: Vec<u8>,
    /// The architecture that was compiled for: `sm_90` is machine code, `compute_90` is PTX.
    pub arch: String,
    /// The file that it came from; `None` if it was compiled now.
    pub cached: Option<PathBuf>,
}

/// NVRTC's version, (13, 0) for 13.0.
pub fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are valid.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result()?;
    Ok((major, minor))
}

/// Architectures that NVRTC can compile for, 90 for sm_90, ascending.
pub fn architectures() -> Result<Vec<i32>> {
    let mut count = 0;
    // SAFETY: the pointer is valid.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result()?;
    let mut all = vec![0; usize::try_from(count)?];
    // SAFETY: NVRTC writes as many numbers as it has told.
    unsafe { sys::nvrtcGetSupportedArchs(all.as_mut_ptr()) }.result()?;
    all.sort_unstable();
    Ok(all)
}

/// What to compile for on a card of this capability, given what the compiler knows: its machine code if possible, else
/// PTX of the newest architecture before it.
pub fn target((major, minor): (i32, i32), known: &[i32]) -> Result<String> {
    let card = 10 * major + minor;
    if known.contains(&card) {
        return Ok(format!("sm_{card}"));
    }
    match known.iter().filter(|&&arch| arch < card).max() {
        Some(arch) => Ok(format!("compute_{arch}")),
        None => bail!(
            "NVRTC cannot compile for this card of sm_{card} any more, only from sm_{} on: run `pip install \
             nvidia-cuda-nvrtc-cu12 nvidia-cublas-cu12` and remove the packages of CUDA 13",
            known.iter().min().copied().unwrap_or_default()
        ),
    }
}

/// The text for an architecture, from the cache or compiled now. A cached file that is damaged is made again; a folder
/// that cannot be written is no error.
pub fn compiled(text: &str, arch: &str, cache: Option<&Path>) -> Result<Compiled> {
    let key = digest(format!("{text}\0{OPTIONS:?}\0{arch}\0{:?}", version()?).as_bytes());
    let name: String = key.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let file = cache.map(|folder| folder.join(format!("{arch}-{name}.bin")));
    if let Some(image) = file.as_deref().and_then(read) {
        return Ok(Compiled { image, arch: arch.into(), cached: file });
    }
    let (image, _) = compile(text, arch, &[])?;
    if let Some(file) = file {
        store(&file, &image).ok();
    }
    Ok(Compiled { image, arch: arch.into(), cached: None })
}

/// Several texts at once, each on a thread of its own.
pub fn compiled_all(texts: &[String], arch: &str, cache: Option<&Path>) -> Result<Vec<Compiled>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = texts.iter().map(|text| scope.spawn(move || compiled(text, arch, cache))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("NVRTC panicked"))).collect()
    })
}

/// What the assembler logs of each kernel: registers, spills, stack, shared memory.
pub fn resources(text: &str, arch: &str) -> Result<String> {
    Ok(compile(text, arch, &["--ptxas-options=-v"])?.1)
}

/// Machine code or PTX, and the compiler's log.
fn compile(text: &str, arch: &str, more: &[&str]) -> Result<(Vec<u8>, String)> {
    let mut options: Vec<String> = OPTIONS.iter().chain(more).map(|option| option.to_string()).collect();
    options.push(format!("--gpu-architecture={arch}"));
    let program = result::create_program(&CString::new(text)?, Some(c"kernels.cu"))?;
    // SAFETY: the program lives until it is destroyed below.
    let done = unsafe { result::compile_program(program, &options) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let log: Vec<u8> = log.iter().map(|&c| c as u8).collect();
    let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
    let image = match done {
        // SAFETY: as above.
        Ok(()) if arch.starts_with("sm_") => unsafe { machine_code(program) },
        Ok(()) => {
            // SAFETY: as above.
            let ptx = unsafe { result::get_ptx(program) };
            ptx.map(|ptx| ptx.into_iter().map(|c| c as u8).collect()).map_err(Into::into)
        }
        Err(error) => Err(error).with_context(|| format!("NVRTC refuses the kernels' text for {arch}:\n{log}")),
    };
    // SAFETY: created above and not used any more.
    unsafe { result::destroy_program(program) }?;
    let image: Vec<u8> = image?;
    ensure!(!image.is_empty(), "NVRTC gave no code for {arch}");
    Ok((image, log))
}

/// # Safety
/// The program was compiled for an architecture and is alive.
unsafe fn machine_code(program: sys::nvrtcProgram) -> Result<Vec<u8>> {
    let mut size = 0;
    // SAFETY: promised by the caller; NVRTC writes as many bytes as it has told.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
        Ok(image)
    }
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// A file is the image after its digest; nothing is read that does not fit.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (expected, image) = bytes.split_at_checked(32)?;
    (digest(image)[..] == *expected && !image.is_empty()).then(|| image.to_vec())
}

/// Whole or not at all, whoever else writes the same file at the same time.
fn store(file: &Path, image: &[u8]) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    fs::create_dir_all(file.parent().context("a file without a folder")?)?;
    let unique = format!("part-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let part = file.with_extension(unique);
    let write = || -> Result<()> {
        let mut out = fs::File::create(&part)?;
        out.write_all(&digest(image))?;
        out.write_all(image)?;
        out.sync_all()?;
        Ok(fs::rename(&part, file)?)
    };
    let written = write();
    if written.is_err() {
        fs::remove_file(&part).ok();
    }
    written
}
