//! On which machine a base lies, and what its products are computed in: the keys `device` and `compute_dtype` of a section,
//! settled before the base is opened.
//!
//! It does not depend on a stage. Read `device/select.rs` for the machines, and `model.rs` for the opening.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Error, Result};

use super::output;
use crate::config::{self, COMPUTE_DTYPE_ON_CARDS, ComputeDtype, Config, Dequantising, KvCacheType, Offload};
use crate::device::{Device, Element, OutOfMemory, select};
use crate::invalid;
use crate::model::base::Base;
use crate::planner::plan::text;
use crate::report::progress::{Progress, Unit};
use crate::report::quiet;
use crate::warning;

/// Prints a line once per process, unless people asked for quiet.
fn note(line: &str) {
    if !quiet::is_set() {
        warn(line);
    }
}

/// The same for people who asked for quiet, too.
fn warn(line: &str) {
    static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if said.get_or_insert_default().insert(line.to_owned()) {
        warning!("{line}");
    }
}

/// What a section's products are computed in on a machine.
fn compute_dtype(asked: Option<ComputeDtype>, device: Option<&Device>) -> Result<ComputeDtype> {
    let has_bf16 = |device: &Device| device.supports(Element::Bf16);
    match (asked, device) {
        (Some(ComputeDtype::F16), None) => Err(invalid!(
            "compute_dtype = \"f16\" is for cards, and this base lies on the CPU: use \"bf16\" or \"f32\", or device = \
             \"cuda\""
        )),
        (Some(ComputeDtype::Bf16), Some(device)) if !has_bf16(device) => Err(invalid!(
            "{} has no products in bf16, which need sm_80 or newer: use compute_dtype = \"f16\" or \"f32\"",
            device.name()
        )),
        (Some(asked), _) => Ok(asked),
        (None, None) => Ok(ComputeDtype::F32),
        (None, Some(_)) => Ok(COMPUTE_DTYPE_ON_CARDS),
    }
}

/// What keys and values are cached as on a card, or not on one.
///
/// # Errors
/// If the CPU is asked for what only cards have.
pub fn kv_cache_type(asked: KvCacheType, is_on_card: bool) -> Result<KvCacheType> {
    if asked == KvCacheType::Q8_0 && !is_on_card {
        return Err(invalid!(
            "kv_cache_type = \"q8_0\" is for cards, and this base lies on the CPU, whose cache is f32: remove it, or use device = \
             \"cuda\""
        ));
    }
    Ok(asked)
}

/// Opens the machine that a section names and writes into the section what will be used.
///
/// # Errors
/// If the machine cannot be used, or does not compute in the type that the section names.
pub fn settle(section: &mut config::Base) -> Result<Option<Device>> {
    let selected = select(section.device())?;
    let compute = compute_dtype(section.compute_dtype, selected.device.as_ref())?;
    let cached = kv_cache_type(section.kv_cache_type(), selected.device.is_some())?;
    if selected.device.is_some() {
        let cache = if cached == KvCacheType::Q8_0 { ", keys and values cached in q8_0" } else { "" };
        note(&format!("device: {}; products in {}{cache}", selected.name(), compute.name()));
    }
    if selected.device.is_none() && section.offload() != Offload::None {
        warn("warning: offload has no effect: the base lies on the CPU");
    }
    if selected.device.is_none() && section.dequantise() != Dequantising::Auto {
        warn("warning: dequantise has no effect: the base lies on the CPU");
    }
    if let Some(reason) = &selected.reason {
        note(&format!("device: the CPU ({}; `fourfold doctor` says more)", in_short(reason)));
    }
    section.device = Some(selected.choice);
    section.compute_dtype = Some(compute);
    Ok(selected.device)
}

/// Why no card is used, without what to do about it: most machines have none, and that is no fault.
pub fn in_short(reason: &str) -> String {
    if reason.contains("driver is missing") {
        return "no NVIDIA driver found".into();
    }
    // A reason is a list of `what is wrong: what to do`.
    let faults: Vec<&str> = reason.split("; ").map(|part| part.split(": ").next().unwrap_or(part)).collect();
    faults.join("; ")
}

/// What products are computed in on a device where a base overflows f16, with a line that says so.
pub fn instead_of_f16(device: &Device, overflow: &Error) -> ComputeDtype {
    let compute = if device.supports(Element::Bf16) { ComputeDtype::Bf16 } else { ComputeDtype::F32 };
    warn(&format!("{overflow:#}: products in {}", compute.name()));
    compute
}

/// Takes another type of products for the sections of `settled` whose type `asked` leaves open and which f16 was chosen for;
/// whether there is such a section.
///
/// # Errors
/// If the machine cannot be used.
pub fn leave_f16(asked: &Config, settled: &mut Config, overflow: &Error) -> Result<bool> {
    let open = |asked: &config::Base| asked.compute_dtype.is_none();
    let sections = [
        Some(&mut settled.base).filter(|_| open(&asked.base)),
        settled.reward_base.as_mut().filter(|_| asked.reward_base.as_ref().is_some_and(open)),
        settled.teacher.as_mut().filter(|_| asked.teacher.as_ref().is_some_and(open)),
    ];
    let mut left = false;
    for section in sections.into_iter().flatten().filter(|section| section.compute_dtype == Some(ComputeDtype::F16)) {
        if let Some(device) = select(section.device())?.device {
            section.compute_dtype = Some(instead_of_f16(&device, overflow));
            left = true;
        }
    }
    Ok(left)
}

/// The config of a run with all bases settled. A run that is resumed keeps the type of products that it began with, unless
/// the config names another or the machine does not have it.
///
/// # Errors
/// Those of [`settle`].
pub fn settled(config: &Config, resumed: Option<&Path>) -> Result<Config> {
    let mut config = config.clone();
    let before: Option<toml::Table> =
        resumed.and_then(|out| fs::read_to_string(out.join(output::RESOLVED)).ok()?.parse().ok());
    let former = |section: &str| {
        let dtype = before.as_ref()?.get(section)?.get("compute_dtype")?;
        config::from_value::<ComputeDtype>(dtype.clone())
    };
    let settle = |base: &mut config::Base, name: &str| -> Result<()> {
        if base.compute_dtype.is_none() {
            let on_card = select(base.device())?.device.is_some();
            // The CPU has no products in f16: a run that moves there goes on in f32.
            base.compute_dtype = former(name).filter(|&dtype| dtype != ComputeDtype::F16 || on_card);
        }
        settle(base).map(drop).with_context(|| format!("[{name}]"))
    };
    settle(&mut config.base, "base")?;
    config.reward_base.as_mut().map_or(Ok(()), |base| settle(base, "reward_base"))?;
    config.teacher.as_mut().map_or(Ok(()), |base| settle(base, "teacher"))?;
    Ok(config)
}

/// The name of the machine that a base lies on: `cpu`, or the device's.
pub fn name_of(base: &Base) -> String {
    base.place().map_or_else(|| "cpu".into(), Device::name)
}

/// A base that would not fit, with what would.
fn too_large(device: &str, bytes: usize, room: usize, dense: bool) -> Error {
    let smaller = match dense {
        true => "quantize it ([base] quantize = \"q8_0\" or \"q4_k\")",
        false => "take a smaller file, such as one in Q4_K",
    };
    invalid!(
        "the base does not fit: its weights take {} and {device} has room for {}; {smaller}, keep more of its layers on the \
         host ([base] offload = \"auto\" or a number), or run on the CPU with device = \"cpu\"",
        text(bytes),
        text(room)
    )
}

/// Puts a base on a device that keeps all but `layers` of its layers, matrix by matrix. The host keeps no other copy of what it
/// quantised on the way, and the pages of mapped files are released.
///
/// # Errors
/// If the base does not fit, or a copy fails.
pub fn place(base: Base, device: &Device, layers: usize) -> Result<Base> {
    let (weights, bytes) = (base.weights(), base.bytes_on_device(layers));
    let all = weights.iter().map(|(_, weight)| weight.size_in_bytes()).sum();
    let dense = weights.iter().any(|(_, weight)| weight.dtype().is_dense());
    drop(weights);
    if let Some(room) = device.room()?.filter(|&room| bytes > room) {
        return Err(too_large(&device.name(), bytes, room, dense));
    }
    let mut progress = Progress::new(format!("weights to {}", device.name()), all, Unit::Bytes);
    let placed = base.streaming(Some(device.clone()), layers, |done, _| progress.set(done));
    progress.finish();
    placed.map_err(|error| match error.downcast_ref::<OutOfMemory>() {
        Some(OutOfMemory { live, free, .. }) => {
            too_large(&device.name(), bytes, live + free.map_or(0, |free| free as usize), dense)
        }
        None => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::machine::{Info, Launch, Machine, Product, Refusal};
    use crate::error::exit_code;
    use crate::model_files::ModelFiles;
    use crate::quickstart::base::BASE;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A card with so many bytes that computes nothing.
    struct Card {
        used: AtomicU64,
        bytes: u64,
        reported: Option<u64>,
        bf16: bool,
    }

    impl Card {
        fn with(bytes: u64, reported: Option<u64>, bf16: bool) -> Device {
            Device::new(Arc::new(Self { used: AtomicU64::new(1 << 20), bytes: bytes + (1 << 20), reported, bf16 }))
        }
    }

    impl Machine for Card {
        fn name(&self) -> String {
            "cuda:0 (a card of the test)".into()
        }
        fn info(&self) -> Result<Info> {
            Ok(Info { free: self.reported, ..Info::default() })
        }
        fn supports(&self, element: Element) -> bool {
            element != Element::Bf16 || self.bf16
        }
        fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
            let at = self.used.fetch_add(bytes as u64, Ordering::SeqCst);
            if at + bytes as u64 > self.bytes { Err(Refusal::Full { free: Some(self.bytes - at) }) } else { Ok(at) }
        }
        unsafe fn free(&self, _: u64, _: usize) {}
        fn allocate_host(&self, _: usize) -> Result<*mut u8> {
            anyhow::bail!("none")
        }
        unsafe fn free_host(&self, _: *mut u8, _: usize) {}
        unsafe fn upload(&self, _: &[u8], _: u64) -> Result<()> {
            Ok(())
        }
        unsafe fn download(&self, _: u64, to: &mut [u8]) -> Result<()> {
            to.fill(0);
            Ok(())
        }
        unsafe fn zero(&self, _: u64, _: usize) -> Result<()> {
            Ok(())
        }
        unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<()> {
            Ok(())
        }
        unsafe fn launch(&self, _: &Launch<'_>) -> Result<()> {
            Ok(())
        }
        unsafe fn gemm(&self, _: &Product) -> Result<()> {
            Ok(())
        }
        fn synchronize(&self) -> Result<()> {
            Ok(())
        }
    }

    fn embedded() -> ModelFiles {
        ModelFiles::from_embedded(
            BASE.config,
            BASE.generation_config,
            BASE.tokenizer,
            BASE.tokenizer_config,
            BASE.weights,
        )
        .unwrap()
    }

    fn refusal<T>(result: Result<T>) -> String {
        let error = result.err().expect("it is refused");
        assert_eq!(exit_code(&error), 2, "{error:#}");
        let message = format!("{error:#}");
        assert!(!message.contains('\n'), "{message}");
        message
    }

    #[test]
    fn the_type_of_products_depends_on_the_machine_unless_it_is_named() {
        let (new, old) = (Card::with(1, None, true), Card::with(1, None, false));
        assert_eq!(compute_dtype(None, None).unwrap(), ComputeDtype::F32);
        assert_eq!(compute_dtype(None, Some(&new)).unwrap(), COMPUTE_DTYPE_ON_CARDS);
        assert_eq!(compute_dtype(None, Some(&old)).unwrap(), ComputeDtype::F16);
        for dtype in [ComputeDtype::F32, ComputeDtype::F16] {
            assert_eq!(compute_dtype(Some(dtype), Some(&old)).unwrap(), dtype);
        }
        let message = refusal(compute_dtype(Some(ComputeDtype::Bf16), Some(&old)));
        assert!(message.contains("sm_80") && message.contains("\"f16\""), "{message}");
        let message = refusal(compute_dtype(Some(ComputeDtype::F16), None));
        assert!(message.contains("CPU") && message.contains("\"bf16\""), "{message}");
    }

    #[test]
    fn a_base_that_does_not_fit_is_refused_with_what_would() {
        // The embedded base has 1.8 MB. A card that reports its memory is asked first.
        for reported in [Some(1 << 20), None] {
            let device = Card::with(1 << 20, reported, true);
            let message = refusal(place(embedded().base().unwrap(), &device, 0));
            assert!(message.contains("does not fit") && message.contains("q4_k"), "{message}");
            assert!(message.contains("a card of the test") && message.contains("device = \"cpu\""), "{message}");
        }
        place(embedded().base().unwrap(), &Card::with(64 << 20, Some(64 << 20), true), 0).unwrap();
    }

    #[test]
    fn a_base_that_is_quantised_for_a_device_is_not_held_by_the_host() {
        let q8_0 = crate::ops::weight::StorageDType::Q8_0;
        let held = |base: &Base| base.weights().iter().map(|(_, weight)| weight.held_bytes()).sum::<usize>();
        let eager = embedded().quantised(Some(q8_0)).base().unwrap();
        let base = embedded().quantised(Some(q8_0)).for_device(true).base().unwrap();
        let embedded_part = embedded().base().unwrap();
        let placed = place(base, &Card::with(64 << 20, None, true), 0).unwrap();
        assert_eq!(held(&placed), 0);
        assert!(held(&eager) > 0 && placed.size_in_bytes() == eager.size_in_bytes());
        assert!(placed.size_in_bytes() < embedded_part.size_in_bytes());
        // The host can still have the values, as an export asks for them.
        assert_eq!(placed.weights()[0].1.bytes(), eager.weights()[0].1.bytes());
    }
}
