//! What the search for CUDA's libraries finds and reports, and which drivers and cards are refused. No test needs a card; read
//! `tests/nvrtc.rs` for the kernels' compilation.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use fourfold::device::Device;
use fourfold::device::cuda::checks::{self, Card, Driver};
use fourfold::device::cuda::libraries::{Finder, Library, MAJORS};
use fourfold::device::cuda::{Cuda, nvrtc};
use fourfold::device::select::{DeviceChoice, by_name};
use fourfold::error::exit_code;
use tempfile::TempDir;

/// Runs `then` with a finder that sees a made-up file system only.
fn with_finder<T>(
    files: &[&str],
    variables: &[(&str, &str)],
    broken: &str,
    then: impl FnOnce(&Finder, &Path, &RefCell<Vec<String>>) -> T,
) -> T {
    let root = TempDir::new().unwrap();
    for file in files {
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let opened = RefCell::new(vec![]);
    let variable = |name: &str| -> Option<OsString> {
        let value = variables.iter().find(|(n, _)| *n == name)?.1;
        let absolute = value.split(':').map(|v| root.path().join(v));
        Some(std::env::join_paths(absolute).unwrap())
    };
    let open = |path: &Path| -> Result<()> {
        let name = path.strip_prefix(root.path()).unwrap().display().to_string();
        if !broken.is_empty() && name.contains(broken) {
            bail!("wrong ELF class");
        }
        opened.borrow_mut().push(name);
        Ok(())
    };
    let finder = Finder { variable: &variable, root: root.path().into(), open: &open, by_name: &|_| false };
    then(&finder, root.path(), &opened)
}

const PIP_13: [&str; 4] = [
    "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
    "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
    "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13",
    "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13",
];
const PIP_12: [&str; 5] = [
    "venv/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
    "venv/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc-builtins.alt.so.12.9",
    "venv/lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.9",
    "venv/lib/python3.12/site-packages/nvidia/cublas/lib/libcublas.so.12",
    "venv/lib/python3.12/site-packages/nvidia/cublas/lib/libcublasLt.so.12",
];

#[test]
fn pips_packages_are_found_and_opened_in_order() {
    let folder = "venv/lib/python3.12/site-packages/nvidia/cu13/lib";
    with_finder(&[&PIP_13[..], &PIP_12].concat(), &[("VIRTUAL_ENV", "venv")], "", |finder, root, opened| {
        let found = finder.open_toolkit(13000).unwrap();
        let paths: Vec<_> = found.into_iter().map(|o| o.path.unwrap()).collect();
        assert_eq!(paths, ["libnvrtc.so.13", "libcublas.so.13"].map(|f| root.join(folder).join(f)));
        let order = ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13", "libcublasLt.so.13", "libcublas.so.13"];
        assert_eq!(*opened.borrow(), order.map(|f| format!("{folder}/{f}")));
    });
}

#[test]
fn a_driver_of_cuda_12_gets_the_libraries_of_cuda_12() {
    with_finder(&[&PIP_13[..], &PIP_12].concat(), &[("VIRTUAL_ENV", "venv")], "", |finder, _, opened| {
        finder.open_toolkit(12040).unwrap();
        assert!(opened.borrow().iter().all(|f| f.contains(".so.12") && !f.contains("alt")), "{opened:?}");
    });
    with_finder(&PIP_13, &[("VIRTUAL_ENV", "venv")], "", |finder, _, _| {
        let error = finder.open_toolkit(12040).unwrap_err().to_string();
        assert!(
            error.contains("NVRTC is missing (libnvrtc.so.12): run `pip install nvidia-cuda-nvrtc-cu12`"),
            "{error}"
        );
        assert!(error.contains("cuBLAS is missing (libcublas.so.12): run `pip install nvidia-cublas-cu12`"), "{error}");
    });
}

#[test]
fn what_the_user_points_at_comes_first_and_versions_count_down() {
    let files = [
        "toolkit/lib64/x",
        "a/x",
        "conda/lib/python3.11/site-packages/nvidia/cublas/lib/x",
        "home/.local/lib/python3.10/site-packages/nvidia/cublas/lib/x",
        "usr/lib/python3/dist-packages/nvidia/cublas/lib/x",
        "usr/local/cuda/lib64/x",
        "usr/local/cuda-12.4/lib64/x",
        "usr/local/cuda-13.1/targets/x86_64-linux/lib/x",
    ];
    let variables =
        [("CUDA_HOME", "toolkit"), ("LD_LIBRARY_PATH", "a:gone"), ("CONDA_PREFIX", "conda"), ("HOME", "home")];
    with_finder(&files, &variables, "", |finder, root, _| {
        let found: Vec<PathBuf> = finder.folders().iter().map(|f| f.strip_prefix(root).unwrap().into()).collect();
        let expected = [
            "toolkit/lib64",
            "a",
            "conda/lib/python3.11/site-packages/nvidia/cublas/lib",
            "home/.local/lib/python3.10/site-packages/nvidia/cublas/lib",
            "usr/lib/python3/dist-packages/nvidia/cublas/lib",
            "conda/lib",
            "usr/local/cuda/lib64",
            "usr/local/cuda-13.1/targets/x86_64-linux/lib",
            "usr/local/cuda-12.4/lib64",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
    });
}

#[test]
fn what_is_missing_or_broken_is_named_with_its_remedy() {
    with_finder(&[], &[], "", |finder, _, _| {
        let error = finder.open(Library::Driver, &MAJORS).unwrap_err().to_string();
        assert!(
            error.starts_with("the NVIDIA driver is missing (libcuda.so.1): install NVIDIA's driver (525"),
            "{error}"
        );
        let error = finder.open_toolkit(13010).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 2);
        assert!(
            error.contains("`pip install nvidia-cuda-nvrtc`") && error.contains("`pip install nvidia-cublas`"),
            "{error}"
        );
    });
    with_finder(&PIP_13, &[("VIRTUAL_ENV", "venv")], "libcublasLt", |finder, _, _| {
        let error = finder.open(Library::Cublas, &MAJORS).unwrap_err().to_string();
        assert!(
            error.starts_with("cuBLAS was found and cannot be opened (")
                && error.contains("libcublasLt.so.13: wrong ELF"),
            "{error}"
        );
    });
    // A broken newer version does not hide a good older one.
    with_finder(&[&PIP_13[..], &PIP_12].concat(), &[("VIRTUAL_ENV", "venv")], ".so.13", |finder, _, _| {
        assert!(finder.open_toolkit(13000).is_ok());
    });
    let none = Finder { by_name: &|_| true, root: "/nowhere".into(), variable: &|_| None, open: &|_| Ok(()) };
    assert!(none.open_toolkit(13000).unwrap().iter().all(|o| o.path.is_none()));
}

#[test]
fn the_real_search_never_panics() {
    // On a machine without a driver this is the error that a user sees.
    if let Err(error) = fourfold::device::Device::cuda(99) {
        let error = format!("{error:#}");
        assert!(error.contains("driver") || error.contains("cuda:99") || error.contains("pip install"), "{error}");
    }
}

struct Fake(i32, Vec<Card>);
impl Driver for Fake {
    fn version(&self) -> Result<i32> {
        Ok(self.0)
    }
    fn cards(&self) -> Result<Vec<Card>> {
        Ok(self.1.clone())
    }
}

#[test]
fn an_old_driver_a_missing_card_and_an_old_card_are_refused_with_reasons() {
    let card = |name: &str, capability| Card { name: name.into(), capability };
    let cards = vec![card("RTX 3060", (8, 6)), card("GTX 1080", (6, 1))];
    let fake = Fake(11040, cards);
    let error = checks::driver_version(&fake).unwrap_err().to_string();
    assert!(error.contains("supports CUDA 11.4 only, and CUDA 12.0 is needed: update the driver to 525"), "{error}");
    assert_eq!(checks::card(&fake, 0).unwrap().arch(), "sm_86");
    let error = checks::card(&fake, 1).unwrap_err().to_string();
    assert!(error.contains("cuda:1 (GTX 1080) is of sm_61, and sm_75 or newer is needed"), "{error}");
    let error = checks::card(&fake, 2).unwrap_err().to_string();
    assert_eq!(error, "there is no card cuda:2; there are: cuda:0 RTX 3060 (sm_86), cuda:1 GTX 1080 (sm_61)");
    let error = checks::card(&Fake(13000, vec![]), 0).unwrap_err().to_string();
    assert!(error.contains("CUDA_VISIBLE_DEVICES"), "{error}");
    assert_eq!(checks::driver_version(&Fake(12020, vec![])).unwrap(), 12020);
}

#[test]
fn each_reason_why_a_card_cannot_be_used_is_one_line_with_what_to_do_and_exit_code_2() {
    const DRIVER: &str = "usr/lib64/libcuda.so.1";
    let rows = [
        ("no driver", "", 13000, 0, ["NVIDIA driver is missing", "install NVIDIA's driver"]),
        ("an old driver", DRIVER, 11040, 0, ["CUDA 11.4 only, and CUDA 12.0 is needed", "update the driver"]),
        ("no libnvrtc", DRIVER, 13000, 0, ["NVRTC is missing", "pip install nvidia-cuda-nvrtc"]),
        ("no libcublas", DRIVER, 13000, 0, ["cuBLAS is missing", "pip install nvidia-cublas"]),
        ("no such card", DRIVER, 13000, 2, ["no card cuda:2", "there are: cuda:0 RTX 3060"]),
        ("an old card", DRIVER, 13000, 1, ["cuda:1 (GTX 1080) is of sm_61", "sm_75 or newer is needed"]),
    ];
    for (what, driver, version, ordinal, expected) in rows {
        let without = what.strip_prefix("no lib").unwrap_or("nothing");
        let mut files: Vec<&str> = PIP_13.into_iter().filter(|f| !f.contains(without)).collect();
        files.extend(Some(driver).filter(|d| !d.is_empty()));
        let variables = [("VIRTUAL_ENV", "venv"), ("LD_LIBRARY_PATH", "usr/lib64")];
        with_finder(&files, &variables, "", |finder, _, _| {
            let card = |name: &str, capability| Card { name: name.into(), capability };
            let fake = Fake(version, vec![card("RTX 3060", (8, 6)), card("GTX 1080", (6, 1))]);
            let open = || Cuda::find(ordinal, finder, &fake).map(|_| Device::dry());
            let error = by_name(DeviceChoice::Cuda(ordinal), open).expect_err(what);
            assert_eq!(exit_code(&error), 2, "{what}");
            let message = format!("{error:#}");
            assert!(expected.iter().all(|e| message.contains(e)), "{what}: {message}");
            assert!(!message.contains('\n') && message.contains("device = \"cpu\""), "{what}: {message}");
        });
    }
}

#[test]
fn a_card_newer_than_the_compiler_gets_ptx() {
    let known = [75, 80, 86, 89, 90, 100, 120];
    assert_eq!(nvrtc::target((9, 0), &known).unwrap(), "sm_90");
    assert_eq!(nvrtc::target((12, 1), &known).unwrap(), "compute_120");
    assert_eq!(nvrtc::target((8, 7), &known).unwrap(), "compute_86");
    let error = nvrtc::target((7, 0), &known).unwrap_err().to_string();
    assert!(error.contains("sm_70") && error.contains("nvidia-cuda-nvrtc-cu12"), "{error}");
}
