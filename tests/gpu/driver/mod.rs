//! The code that talks to the driver, NVRTC and cuBLAS, over a stand-in for all three that is compiled here (driver.cpp): the real
//! binary runs on a card that is none. Streams run as late as events let them, or beside the first one as early, so that an order
//! that nobody asked for shows. Numbers are the emulated machine's, bit by bit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use fourfold::device::Machine;
use tempfile::TempDir;

use crate::fault_world::{line, place, run_all};
use crate::support::{Place, Ran};
use crate::world::{machine, say, timed};

/// The stand-in's libraries as a toolkit has them, and the kernels that it runs.
struct StandIn {
    toolkit: TempDir,
    kernels: PathBuf,
}

fn stand_in() -> Option<&'static StandIn> {
    static MADE: OnceLock<Option<StandIn>> = OnceLock::new();
    MADE.get_or_init(|| {
        let (machine, _) = machine()?;
        let kernels = machine.info().unwrap().libraries.into_iter().find_map(|library| library.path).unwrap();
        let toolkit = tempfile::tempdir().unwrap();
        fs::create_dir(toolkit.path().join("lib64")).unwrap();
        for (part, name) in [
            ("OF_DRIVER", "libcuda.so.1"),
            ("OF_NVRTC", "libnvrtc.so.13"),
            ("NONE", "libnvrtc-builtins.so.13.0"),
            ("OF_CUBLAS", "libcublas.so.13"),
            ("NONE", "libcublasLt.so.13"),
        ] {
            compile(part, &toolkit.path().join("lib64").join(name), name);
        }
        Some(StandIn { toolkit, kernels })
    })
    .as_ref()
}

fn compile(part: &str, file: &Path, soname: &str) {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/driver/driver.cpp");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let made = Command::new(compiler)
        .args(["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-fvisibility=hidden", "-ffp-contract=off"])
        .arg(format!("-D{part}"))
        .arg(format!("-Wl,-soname,{soname}"))
        .arg(text)
        .arg("-o")
        .arg(file)
        .args(["-lm", "-ldl", "-lpthread"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

impl StandIn {
    /// Runs `fourfold` in the folder; `mode` is of the streams beside the first one.
    fn run(&self, place: &Place, mode: &str, line: &str) -> Ran {
        self.run_with(place, mode, line, &[])
    }

    fn run_with(&self, place: &Place, mode: &str, line: &str, variables: &[(&str, &str)]) -> Ran {
        let ran = Command::new(env!("CARGO_BIN_EXE_fourfold"))
            .args(line.split_whitespace())
            .current_dir(place.path(""))
            .env("CUDA_HOME", self.toolkit.path())
            // What it compiles is for no real card.
            .env("XDG_CACHE_HOME", self.toolkit.path().join("cache"))
            .env("FOURFOLD_STAND_IN_KERNELS", &self.kernels)
            .env("FOURFOLD_STAND_IN_MODE", mode)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let ran = Ran { code: ran.status.code().unwrap_or(-1), stdout: text(ran.stdout), stderr: text(ran.stderr) };
        assert!(!ran.stderr.contains("panicked"), "{line}: {}", ran.stderr);
        ran
    }
}

/// How many streams, events and graphs there were at most, and kernels in all. It has nothing else to say where all is in order.
fn counted(ran: &Ran) -> [usize; 4] {
    let told: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("stand-in driver: ")).collect();
    assert_eq!(told.len(), 1, "{}", ran.stderr);
    let numbers: Vec<usize> = told[0].split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    numbers.try_into().unwrap()
}

#[test]
fn doctor_finds_the_stand_in_card_in_order() {
    let Some(stand_in) = stand_in() else { return };
    let _time = timed("doctor on the stand-in card");
    let place = place();
    // With one buffer of pinned memory there is none for downloads, which the driver then copies by itself.
    for (mode, variables) in [("late", &[("FOURFOLD_STAND_IN_PINNED", "1")][..]), ("early", &[])] {
        let ran = stand_in.run_with(&place, mode, "doctor --device cuda", variables);
        assert_eq!(ran.code, 0, "{mode}: {}\n{}", ran.stdout, ran.stderr);
        assert!(ran.stdout.contains("cuda:0 (stand-in): it can be used"), "{mode}: {}", ran.stdout);
        let [streams, events, graphs, kernels] = counted(&ran);
        assert!(streams == 3 && events < 32 && graphs == 1 && kernels > 1000, "{:?}", counted(&ran));
    }
}

/// What a run has trained.
fn adapters(place: &Place, out: &str) -> Vec<(String, Vec<u8>)> {
    let read = |name: &str| (name.to_owned(), fs::read(place.path(&format!("{out}/{name}"))).unwrap());
    ["actor/adapter_model.safetensors", "critic/adapter_model.safetensors"].map(read).into()
}

#[test]
fn ppo_on_the_stand_in_card_leaves_the_bytes_of_the_emulated_machine() {
    let Some(stand_in) = stand_in() else { return };
    let _time = timed("PPO on the stand-in card");
    let place = place();
    run_all(&place, &["sft", "reward"]);
    // Recorded steps, sampling, layers that are streamed, weights dequantised beside products, blocks' inputs on the host, the
    // critic's step by a thread.
    let plain = "--set ppo.num_ppo_epochs=1 --set ppo.total_episodes=8 --set ppo.response_length=9 --set base.compute_dtype=\"f16\" --set base.quantize=\"q8_0\"";
    for (name, more) in [
        ("kept", "--set base.dequantise=\"kept\" --set ppo.checkpoint=\"block\""),
        ("streamed", "--set base.offload=3 --set base.dequantise=\"ahead\" --set ppo.checkpoint=\"offload\""),
    ] {
        let run = |out: &str| format!("{} {plain} {more} --out {out}", line("ppo").replace(" --out out/ppo", ""));
        let out = format!("out/{name}");
        let want = place.run(&format!("{} --device emulated", run(&out)));
        assert_eq!(want.code, 0, "{name}: {}", want.stderr);
        for mode in ["late", "early"] {
            let out = format!("out/{name}-{mode}");
            let ran = stand_in.run(&place, mode, &format!("{} --device cuda", run(&out)));
            assert_eq!(ran.code, 0, "{name}, {mode}: {}", ran.stderr);
            let [streams, events, graphs, kernels] = counted(&ran);
            say(&format!("{name}, {mode}: {:?} streams, events, graphs and kernels", counted(&ran)));
            // The stream of work, that of kernels beside it, and that of copies, where there are any. Steps of streamed layers are
            // not recorded.
            assert!(streams == usize::from(name == "streamed") + 2 && events < 64, "{name}, {mode}");
            assert!(graphs == usize::from(name != "streamed") && kernels > 1000, "{name}, {mode}");
            assert!(adapters(&place, &out) == adapters(&place, &format!("out/{name}")), "{name}, {mode}");
        }
    }
}
