//! Finds the driver, NVRTC and cuBLAS at run time, in a toolkit or in pip's and conda's packages, and reports what is
//! missing and how to install it. It does not depend on a card. Read `checks.rs` beside it next.
//!
//! cudarc opens each library by name at the first call ("libcublas.so", "libcublas.so.13", and so on) and panics if no
//! name leads to one. The system's loader answers such a name with a library that is loaded already under it, wherever
//! that one came from. So the files are opened by their full paths first, and stay open for the life of the process.
//! What a library opens by name itself (NVRTC its builtins, cuBLAS its Lt half) is opened before it, for the same
//! reason.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// CUDA's major versions that can be used, newest first.
pub const MAJORS: [i32; 2] = [13, 12];

/// What is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// libcuda, which comes with the driver.
    Driver,
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    Cublas,
}

impl Library {
    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Driver => "the NVIDIA driver",
            Self::Nvrtc => "NVRTC",
            Self::Cublas => "cuBLAS",
        }
    }

    /// Beginnings of the files' names in the order to open them; the last is the library itself.
    fn files(self, major: i32) -> Vec<String> {
        match self {
            Self::Driver => vec!["libcuda.so.1".into()],
            Self::Nvrtc => vec![format!("libnvrtc-builtins.so.{major}"), format!("libnvrtc.so.{major}")],
            Self::Cublas => vec![format!("libcublasLt.so.{major}"), format!("libcublas.so.{major}")],
        }
    }

    /// What to do without it. Packages of a newer CUDA than the driver's do not run.
    fn remedy(self, majors: &[i32]) -> String {
        let package = match self {
            Self::Driver => {
                return "install NVIDIA's driver (525 or newer) on the machine itself, as no pip package brings it, or \
                        start the container with access to the GPU (docker run --gpus all)"
                    .into();
            }
            Self::Nvrtc => "nvidia-cuda-nvrtc",
            Self::Cublas => "nvidia-cublas",
        };
        let package = if majors.contains(&13) { package.into() } else { format!("{package}-cu12") };
        format!("run `pip install {package}` in the active virtual environment, or set CUDA_HOME to a CUDA toolkit")
    }
}

/// Where and how libraries are looked for. Tests replace every part.
pub struct Finder<'a> {
    /// Reads a variable of the environment.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// The root of the file system.
    pub root: PathBuf,
    /// Opens a library for good.
    pub open: &'a dyn Fn(&Path) -> Result<()>,
    /// Does the system's own search find it by name?
    pub by_name: &'a dyn Fn(Library) -> bool,
}

/// A library that is open now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Which.
    pub library: Library,
    /// Its file; `None` if the system's own search finds it by name.
    pub path: Option<PathBuf>,
}

/// Opens a library and keeps it open.
pub fn open_for_good(path: &Path) -> Result<()> {
    // SAFETY: NVIDIA's libraries do nothing harmful when they are opened.
    let library = unsafe { libloading::Library::new(path) }?;
    std::mem::forget(library);
    Ok(())
}

/// cudarc's own search, by name.
pub fn present_by_name(library: Library) -> bool {
    // SAFETY: as above.
    unsafe {
        match library {
            Library::Driver => cudarc::driver::sys::is_culib_present(),
            Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
            Library::Cublas => cudarc::cublas::sys::is_culib_present(),
        }
    }
}

/// A variable of the process's environment.
pub fn process_variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

impl Finder<'static> {
    /// The real one.
    pub fn real() -> Self {
        Self { variable: &process_variable, root: "/".into(), open: &open_for_good, by_name: &present_by_name }
    }
}

impl Finder<'_> {
    /// Folders where libraries may lie, in the order of the search.
    pub fn folders(&self) -> Vec<PathBuf> {
        let variable = |name: &str| (self.variable)(name).filter(|value| !value.is_empty());
        let path = |name: &str| variable(name).map(PathBuf::from);
        let inside = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"];
        let in_toolkits = |toolkits: Vec<PathBuf>| toolkits.into_iter().flat_map(|t| inside.map(|f| t.join(f)));
        // What the user points at comes first.
        let mut folders: Vec<PathBuf> = vec![];
        folders.extend(in_toolkits(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(path).collect()));
        folders.extend(variable("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
        // Environments of Python: an active one first, then the user's, then the system's.
        let environments: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path).collect();
        let mut pythons: Vec<PathBuf> = environments.iter().flat_map(|e| self::pythons(&e.join("lib"))).collect();
        pythons.extend(path("HOME").iter().flat_map(|home| self::pythons(&home.join(".local/lib"))));
        pythons.extend(["usr/local/lib", "usr/lib"].iter().flat_map(|lib| self::pythons(&self.root.join(lib))));
        for python in pythons {
            for packages in ["site-packages", "dist-packages"] {
                folders.extend(children(&python.join(packages).join("nvidia")).into_iter().map(|p| p.join("lib")));
            }
        }
        folders.extend(environments.iter().map(|environment| environment.join("lib")));
        // Toolkits in their usual place: cuda, then cuda-13.1, cuda-12.4 and so on.
        let local = self.root.join("usr/local");
        let is_version = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda-"));
        let versions = children(&local).into_iter().rev().filter(is_version);
        folders.extend(in_toolkits([local.join("cuda")].into_iter().chain(versions).collect()));
        let mut seen = std::collections::HashSet::new();
        folders.retain(|f| f.is_dir() && seen.insert(f.clone()));
        folders
    }

    /// Opens one library of the newest of these major versions. Errors: it is missing, or its file cannot be opened.
    pub fn open(&self, library: Library, majors: &[i32]) -> Result<Opened> {
        let folders = self.folders();
        let mut broken = None;
        for &major in majors {
            for folder in &folders {
                match self.open_in(folder, &library.files(major)) {
                    Some(Ok(path)) => return Ok(Opened { library, path: Some(path) }),
                    Some(Err(error)) => broken = broken.or(Some(error)),
                    None => {}
                }
            }
        }
        if (self.by_name)(library) {
            return Ok(Opened { library, path: None });
        }
        let (name, remedy) = (library.name(), library.remedy(majors));
        match broken {
            Some(error) => bail!("{name} was found and cannot be opened ({error:#}): {remedy}"),
            None => {
                let file = library.files(majors.first().copied().unwrap_or(MAJORS[0])).pop().unwrap_or_default();
                bail!("{name} is missing ({file}): {remedy}")
            }
        }
    }

    /// `None` if the folder does not have all of the files.
    fn open_in(&self, folder: &Path, files: &[String]) -> Option<Result<PathBuf>> {
        let here = children(folder);
        let mut paths = vec![];
        for file in files {
            // Builtins carry the minor version too; "alt" marks another build of them.
            let fits = |name: &str| name == file || (file.contains("builtins") && name.starts_with(file.as_str()));
            let found = here.iter().find(|p| p.file_name().is_some_and(|n| fits(&n.to_string_lossy())));
            paths.push(found?);
        }
        for path in &paths {
            if let Err(error) = (self.open)(path).with_context(|| path.display().to_string()) {
                return Some(Err(error));
            }
        }
        paths.pop().map(|path| Ok(path.clone()))
    }

    /// Opens NVRTC and cuBLAS in versions that a driver of CUDA `driver` (13000 for 13.0) can run; names all that is
    /// missing in one error.
    pub fn open_toolkit(&self, driver: i32) -> Result<Vec<Opened>> {
        let majors: Vec<i32> = MAJORS.into_iter().filter(|&major| major <= driver / 1000).collect();
        let (mut opened, mut missing) = (vec![], vec![]);
        for library in [Library::Nvrtc, Library::Cublas] {
            match self.open(library, &majors) {
                Ok(found) => opened.push(found),
                Err(error) => missing.push(format!("{error:#}")),
            }
        }
        if missing.is_empty() { Ok(opened) } else { bail!("{}", missing.join("\n")) }
    }
}

/// Folders like lib/python3.12 inside of a lib folder.
fn pythons(lib: &Path) -> Vec<PathBuf> {
    let python = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3"));
    children(lib).into_iter().rev().filter(python).collect()
}

/// What a folder holds, sorted; nothing if it cannot be read.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    all.sort();
    all
}
