//! Which machine a model runs on: the choice as configurations and command lines write it, and the device of this process
//! for it. There is one `Device` per machine and process, so that all models on a card share its memory and its order of
//! work. It does not depend on operations or configurations. Read `mod.rs` next.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Device, lock};
use crate::invalid;

/// A machine by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// `"auto"`: the first card, or among several processes of one machine each one's own, if it can be used, else the CPU.
    #[default]
    Auto,
    /// `"cpu"`.
    Cpu,
    /// `"cuda"`, which is `"cuda:0"`, or `"cuda:N"`.
    Cuda(usize),
    /// `"emulated"`: the card's kernels on the CPU, for tests.
    Emulated,
}

impl DeviceChoice {
    /// Does it name a device? `"auto"` does not: nothing is chosen yet.
    pub const fn is_device(self) -> bool {
        matches!(self, Self::Cuda(_) | Self::Emulated)
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = text.strip_prefix("cuda:").and_then(|digits| digits.parse().ok());
        match (text, ordinal) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda" | "gpu", _) => Ok(Self::Cuda(0)),
            ("emulated", _) => Ok(Self::Emulated),
            (_, Some(ordinal)) => Ok(Self::Cuda(ordinal)),
            _ => Err(format!("{text:?} is no device; use \"auto\", \"cpu\", \"cuda\", \"cuda:1\" or \"emulated\"")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Emulated => f.write_str("emulated"),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// A machine that was chosen and can be used.
#[derive(Clone, Debug)]
pub struct Selected {
    /// The machine; never `Auto`.
    pub choice: DeviceChoice,
    /// Its device; `None` is the CPU.
    pub device: Option<Device>,
    /// Why `auto` chose the CPU.
    pub reason: Option<String>,
}

impl Selected {
    /// The machine in words.
    pub fn name(&self) -> String {
        self.device.as_ref().map_or_else(|| "the CPU".into(), Device::name)
    }
}

/// The machine for a choice.
///
/// # Errors
/// If a machine that was asked for by name cannot be used; the message names what is missing and what to do.
pub fn select(choice: DeviceChoice) -> Result<Selected> {
    static OPEN: Mutex<BTreeMap<DeviceChoice, Device>> = Mutex::new(BTreeMap::new());
    static REASON: Mutex<Option<String>> = Mutex::new(None);
    // A failed search is not repeated: it takes time, and its result does not change within a process.
    let known = || lock(&REASON).clone();
    let opened = |choice, open: &dyn Fn() -> Result<Device>| open_once(&mut lock(&OPEN), choice, open);
    match choice {
        DeviceChoice::Auto => Ok(match known() {
            Some(reason) => on_cpu(Some(reason)),
            None => {
                let card = |ordinal| opened(DeviceChoice::Cuda(ordinal), &|| Device::cuda(ordinal));
                let selected = automatic(local_rank(|name| std::env::var(name).ok()), card);
                lock(&REASON).clone_from(&selected.reason);
                selected
            }
        }),
        DeviceChoice::Cpu => Ok(on_cpu(None)),
        DeviceChoice::Cuda(ordinal) => by_name(choice, || opened(choice, &|| Device::cuda(ordinal))),
        DeviceChoice::Emulated => by_name(choice, || opened(choice, &Device::emulated)),
    }
}

fn open_once(
    open: &mut BTreeMap<DeviceChoice, Device>,
    choice: DeviceChoice,
    make: &dyn Fn() -> Result<Device>,
) -> Result<Device> {
    if let Some(device) = open.get(&choice) {
        return Ok(device.clone());
    }
    let device = make()?;
    open.insert(choice, device.clone());
    Ok(device)
}

const fn on_cpu(reason: Option<String>) -> Selected {
    Selected { choice: DeviceChoice::Cpu, device: None, reason }
}

/// The number of this process among those of `mpirun` on this machine, by the variables that `get` reads.
fn local_rank(get: impl Fn(&str) -> Option<String>) -> usize {
    let names = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"];
    names.iter().find_map(|name| get(name)?.parse().ok()).unwrap_or(0)
}

/// The card of a local rank, or the first one where there are fewer, or the CPU with the reason.
fn automatic(rank: usize, open: impl Fn(usize) -> Result<Device>) -> Selected {
    let opened = |ordinal| open(ordinal).map(|device| (ordinal, device));
    let found = match opened(rank) {
        Err(_) if rank > 0 => opened(0),
        found => found,
    };
    match found {
        Ok((ordinal, device)) => Selected { choice: DeviceChoice::Cuda(ordinal), device: Some(device), reason: None },
        // One line: several missing libraries are a line each.
        Err(error) => on_cpu(Some(format!("{error:#}").replace('\n', "; "))),
    }
}

/// The machine that `open` opens for a choice by name.
///
/// # Errors
/// If it cannot be opened: one line with the reason, what to do, and exit code 2.
pub fn by_name(choice: DeviceChoice, open: impl FnOnce() -> Result<Device>) -> Result<Selected> {
    match open() {
        Ok(device) => Ok(Selected { choice, device: Some(device), reason: None }),
        Err(error) => {
            let cpu = if choice == DeviceChoice::Emulated { "" } else { "; or run on the CPU with device = \"cpu\"" };
            let text = format!("{error:#}").replace('\n', "; ");
            Err(invalid!("device = \"{choice}\" cannot be used: {text}{cpu}"))
        }
    }
}

/// Bytes that the driver's context takes on a card, beside everything that is allocated through the device. The context
/// and cuBLAS took 8.01 - 7.43 = 0.58 GiB together on an H100 with CUDA 13.0: what the card reported as used, less what
/// was allocated.
pub const CONTEXT_BYTES: usize = 562 << 20;
/// Bytes of the workspace that cuBLAS allocates for itself, 32 MiB on sm_90.
pub const WORKSPACE_BYTES: usize = 32 << 20;

impl Device {
    /// Bytes that this process can use on the device, those that it uses already among them; `None` if the machine has no
    /// memory of its own.
    ///
    /// # Errors
    /// If the driver does not report it.
    pub fn room(&self) -> Result<Option<usize>> {
        let info = self.info().context("reading the device's memory")?;
        // The context is there already, and the workspace may come.
        Ok(info.free.map(|free| (free as usize + self.usage().live).saturating_sub(WORKSPACE_BYTES)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::exit_code;
    use anyhow::anyhow;

    #[test]
    fn choices_are_read_and_written_by_name() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
            ("emulated", DeviceChoice::Emulated),
        ] {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for text in ["", "cuda:", "cuda:x", "cuda:-1", "rocm", "CPU"] {
            let message = text.parse::<DeviceChoice>().unwrap_err();
            assert!(message.contains("\"cuda:1\""), "{message}");
        }
    }

    #[test]
    fn auto_falls_back_to_the_cpu_with_the_reason_on_one_line() {
        let selected = automatic(0, |_| Err(anyhow!("NVRTC is missing: run x\ncuBLAS is missing: run y")));
        assert_eq!(selected.choice, DeviceChoice::Cpu);
        assert!(selected.device.is_none());
        assert_eq!(selected.reason.unwrap(), "NVRTC is missing: run x; cuBLAS is missing: run y");
        let selected = automatic(0, |_| Ok(Device::dry()));
        assert_eq!((selected.choice, selected.reason), (DeviceChoice::Cuda(0), None));
    }

    #[test]
    fn auto_takes_the_card_of_the_local_rank_where_there_are_several() {
        let of = |cards: usize, rank: usize| {
            automatic(rank, |ordinal| if ordinal < cards { Ok(Device::dry()) } else { Err(anyhow!("no card")) }).choice
        };
        let found = [of(2, 0), of(2, 1), of(1, 1), of(0, 1)];
        assert_eq!(found, [DeviceChoice::Cuda(0), DeviceChoice::Cuda(1), DeviceChoice::Cuda(0), DeviceChoice::Cpu]);
        let set = |name: &str| (name == "OMPI_COMM_WORLD_LOCAL_RANK").then(|| "3".to_owned());
        assert_eq!((local_rank(set), local_rank(|_| None)), (3, 0));
    }

    #[test]
    fn a_machine_that_was_asked_for_by_name_is_never_replaced() {
        let error = by_name(DeviceChoice::Cuda(1), || Err(anyhow!("there is no card cuda:1; there are: cuda:0")));
        let error = error.unwrap_err();
        assert_eq!(exit_code(&error), 2);
        let message = format!("{error:#}");
        assert!(message.contains("device = \"cuda:1\"") && message.contains("there are: cuda:0"), "{message}");
        assert!(message.contains("device = \"cpu\"") && !message.contains('\n'), "{message}");
    }

    #[test]
    fn a_machine_is_opened_once() {
        let mut open = BTreeMap::new();
        let a = open_once(&mut open, DeviceChoice::Cuda(0), &|| Ok(Device::dry())).unwrap();
        let b = open_once(&mut open, DeviceChoice::Cuda(0), &|| Err(anyhow!("opened twice"))).unwrap();
        let c = open_once(&mut open, DeviceChoice::Cuda(1), &|| Ok(Device::dry())).unwrap();
        assert!(a.ptr_eq(&b) && !a.ptr_eq(&c));
    }
}
