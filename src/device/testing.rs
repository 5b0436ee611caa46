//! What tests of several machines share: the emulated machine, opened once per process, and the rule for hosts without a
//! C++ compiler. Unit tests, integration tests and benches use it; the program does not. It does not depend on operations.
//! Read `emulated/mod.rs` beside it next.

use std::sync::OnceLock;

use super::Device;
use super::emulated::Toolchain;

/// Whether tests on the emulated machine can run. A test that does nothing must not count as passed, so they are left out
/// only where `FOURFOLD_SKIP_EMULATED` is 1.
///
/// # Panics
/// If there is no C++ compiler, and they are not left out.
pub fn can_emulate() -> bool {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let check = || Toolchain::from_environment().check().err().map(|error| format!("{error:#}"));
    let Some(missing) = MISSING.get_or_init(check) else { return true };
    let skipped = std::env::var_os("FOURFOLD_SKIP_EMULATED").is_some_and(|value| value == "1");
    assert!(skipped, "{missing}; set FOURFOLD_SKIP_EMULATED=1 to leave out the tests of a device's kernels");
    false
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
