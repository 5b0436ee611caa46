//! Decides before anything else whether a card can be used, and explains why not. What it asks of the driver is a
//! trait, so that tests can play a machine without a driver, with an old one, or with other cards. It does
//! not depend on the other files of the device layer. Read `nvrtc.rs` beside it next.

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::{result, sys};

/// The oldest CUDA version that the driver may speak: 12.0, which came with driver 525.
pub const OLDEST_DRIVER: i32 = 12000;
/// The oldest compute capability: tensor-core products of f16 by the instructions that the kernels use.
pub const OLDEST_CARD: (i32, i32) = (7, 5);
/// The oldest compute capability with products of bf16.
pub const BF16_CARD: (i32, i32) = (8, 0);

/// A card as the driver lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Compute capability, (9, 0) for sm_90.
    pub capability: (i32, i32),
}

impl Card {
    /// `sm_90` for (9, 0).
    pub fn arch(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }
}

/// What the checks ask.
pub trait Driver {
    /// The newest CUDA version that the driver speaks, 12040 for 12.4.
    fn version(&self) -> Result<i32>;
    /// All cards that this process may use. The driver starts with this call.
    fn cards(&self) -> Result<Vec<Card>>;
}

/// The driver that is loaded.
pub struct RealDriver;

impl Driver for RealDriver {
    fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the pointer is valid, and every driver has this function.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().context("the driver does not tell its version")?;
        Ok(version)
    }

    fn cards(&self) -> Result<Vec<Card>> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        match result::init() {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(vec![]),
            other => other.context(
                "the driver cannot start (is it the one of the running kernel module? does nvidia-smi work?)",
            )?,
        }
        let count = result::device::get_count()?;
        let card = |ordinal| -> Result<Card> {
            let device = result::device::get(ordinal)?;
            // SAFETY: the device comes from the driver.
            let attribute = |which| unsafe { result::device::get_attribute(device, which) };
            Ok(Card { name: result::device::get_name(device)?, capability: (attribute(MAJOR)?, attribute(MINOR)?) })
        };
        (0..count).map(card).collect()
    }
}

/// `12.4` for 12040.
pub fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The driver's version, if it is new enough.
pub fn driver_version(driver: &dyn Driver) -> Result<i32> {
    let version = driver.version()?;
    ensure!(
        version >= OLDEST_DRIVER,
        "the NVIDIA driver supports CUDA {} only, and CUDA {} is needed: update the driver to 525 or newer",
        version_text(version),
        version_text(OLDEST_DRIVER)
    );
    Ok(version)
}

/// The card with this ordinal, if it can be used.
pub fn card(driver: &dyn Driver, ordinal: usize) -> Result<Card> {
    let cards = driver.cards()?;
    let Some(card) = cards.get(ordinal) else {
        if cards.is_empty() {
            bail!(
                "the NVIDIA driver is there and shows no card: check CUDA_VISIBLE_DEVICES and the container's access to \
                 the GPU (docker run --gpus all)"
            );
        }
        let list: Vec<_> =
            cards.iter().enumerate().map(|(i, c)| format!("cuda:{i} {} ({})", c.name, c.arch())).collect();
        bail!("there is no card cuda:{ordinal}; there are: {}", list.join(", "));
    };
    ensure!(
        card.capability >= OLDEST_CARD,
        "cuda:{ordinal} ({}) is of {}, and sm_{}{} or newer is needed: use the CPU or another card",
        card.name,
        card.arch(),
        OLDEST_CARD.0,
        OLDEST_CARD.1
    );
    Ok(card.clone())
}
