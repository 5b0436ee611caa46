//! What tests of several machines share: the emulated machine, opened once per process, and the rule for hosts without a
//! C++ compiler. Unit tests, integration tests and benches use it; the program does not. It does not depend on operations.
//! Read `emulated/mod.rs` beside it next.

use std::sync::OnceLock;

use super::Device;
use super::emulated::Toolchain;

/// Whether tests on the emulated machine can run. Without a C++ compiler they are skipped, with one message on stderr.
///
/// # Panics
/// If there is no C++ compiler and `FOURFOLD_REQUIRE_EMULATED` is 1, as CI sets it.
pub fn can_emulate() -> bool {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        let missing = Toolchain::from_environment().check().err().map(|error| format!("{error:#}"));
        if let Some(missing) = &missing {
            eprintln!("tests on the emulated machine are skipped: {missing}");
        }
        missing
    });
    if let Some(missing) = missing {
        let required = std::env::var_os("FOURFOLD_REQUIRE_EMULATED").is_some_and(|value| value == "1");
        assert!(!required, "FOURFOLD_REQUIRE_EMULATED is 1: {missing}");
    }
    missing.is_none()
}

/// The emulated machine with the kernels of this crate, one for the whole process; `None` if [`can_emulate`] is false.
///
/// # Panics
/// As [`can_emulate`]; if the compiler refuses the kernels' text.
pub fn emulated() -> Option<Device> {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    can_emulate().then(|| DEVICE.get_or_init(|| Device::emulated().expect("the emulated machine")).clone())
}

/// The machines that a claim about an operation is checked on: the host (`None`) and, if [`can_emulate`], the emulated one.
///
/// # Panics
/// As [`emulated`].
pub fn machines() -> Vec<Option<Device>> {
    std::iter::once(None).chain(emulated().map(Some)).collect()
}
