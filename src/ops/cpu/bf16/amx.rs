//! Products by AMX's eight tile registers: four of sums, two of A, two of B. Stable Rust has no intrinsics for them;
//! the instructions are written out. Source: Intel SDM, "Advanced Matrix Extensions". It does not depend on the rest of
//! the crate but for the panel's width. Read `mod.rs` beside it for the layout of elements.

use std::arch::asm;

use crate::ops::cpu::bf16::NR;

/// Whether the machine has bf16 tiles and the system grants their state to this process.
pub fn granted() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let leaf = std::arch::x86_64::__cpuid_count(7, 0).edx;
    leaf & AMX_BF16 != 0 && leaf & AMX_TILE != 0 && request_permission()
}

#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    // SAFETY: requests a larger register state from the kernel; it does not access this process's memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// All eight tiles have 16 rows of 64 bytes.
static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
/// [`granted`] returned true.
pub unsafe fn configure() {
    // SAFETY: reads 64 bytes of CONFIG.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
}

/// # Safety
/// After [`configure`] on this thread.
pub unsafe fn release() {
    // SAFETY: the content of the tiles is no longer needed.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

macro_rules! kernel {
    ($name:ident, [$($zero:literal)*], [$($load_c:literal)*], [$($step:literal)*], [$($store:literal)*]) => {
        /// # Safety
        /// As for [`tile`].
        unsafe fn $name(a: *const u32, words: usize, b: *const u32, c: *mut f32, ldc: usize, add: bool) {
            // SAFETY: reads 16 or 32 rows of A and the panel, reads and writes as many rows of C.
            unsafe {
                if add {
                    asm!($($load_c,)* c = in(reg) c, c2 = in(reg) c.wrapping_add(16 * ldc), ldc = in(reg) ldc * 4,
                         options(nostack));
                } else {
                    asm!($($zero,)* options(nostack));
                }
                asm!(
                    "2:",
                    $($step,)*
                    "add {a}, 64",
                    "add {a2}, 64",
                    "add {b}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    a = inout(reg) a => _,
                    a2 = inout(reg) a.wrapping_add(16 * words) => _,
                    b = inout(reg) b => _,
                    lda = in(reg) words * 4,
                    ldb = in(reg) NR * 4,
                    steps = inout(reg) words / 16 => _,
                    options(nostack),
                );
                asm!($($store,)* c = in(reg) c, c2 = in(reg) c.wrapping_add(16 * ldc), ldc = in(reg) ldc * 4,
                     options(nostack));
            }
        }
    };
}

kernel!(
    two_by_two,
    ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
    ["tileloadd tmm0, [{c} + {ldc}*1]" "tileloadd tmm1, [{c} + {ldc}*1 + 64]"
     "tileloadd tmm2, [{c2} + {ldc}*1]" "tileloadd tmm3, [{c2} + {ldc}*1 + 64]"],
    ["tileloadd tmm4, [{a} + {lda}*1]" "tileloadd tmm6, [{b} + {ldb}*1]" "tdpbf16ps tmm0, tmm4, tmm6"
     "tileloadd tmm7, [{b} + {ldb}*1 + 64]" "tdpbf16ps tmm1, tmm4, tmm7"
     "tileloadd tmm5, [{a2} + {lda}*1]" "tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7"],
    ["tilestored [{c} + {ldc}*1], tmm0" "tilestored [{c} + {ldc}*1 + 64], tmm1"
     "tilestored [{c2} + {ldc}*1], tmm2" "tilestored [{c2} + {ldc}*1 + 64], tmm3"]
);
kernel!(
    two_by_one,
    ["tilezero tmm0" "tilezero tmm2"],
    ["tileloadd tmm0, [{c} + {ldc}*1]" "tileloadd tmm2, [{c2} + {ldc}*1]"],
    ["tileloadd tmm4, [{a} + {lda}*1]" "tileloadd tmm6, [{b} + {ldb}*1]" "tdpbf16ps tmm0, tmm4, tmm6"
     "tileloadd tmm5, [{a2} + {lda}*1]" "tdpbf16ps tmm2, tmm5, tmm6"],
    ["tilestored [{c} + {ldc}*1], tmm0" "tilestored [{c2} + {ldc}*1], tmm2"]
);
kernel!(
    one_by_two,
    ["tilezero tmm0" "tilezero tmm1"],
    ["tileloadd tmm0, [{c} + {ldc}*1]" "tileloadd tmm1, [{c} + {ldc}*1 + 64]" "/* {c2} */"],
    ["tileloadd tmm4, [{a} + {lda}*1]" "tileloadd tmm6, [{b} + {ldb}*1]" "tdpbf16ps tmm0, tmm4, tmm6"
     "tileloadd tmm7, [{b} + {ldb}*1 + 64]" "tdpbf16ps tmm1, tmm4, tmm7"],
    ["tilestored [{c} + {ldc}*1], tmm0" "tilestored [{c} + {ldc}*1 + 64], tmm1" "/* {c2} */"]
);
kernel!(
    one_by_one,
    ["tilezero tmm0"],
    ["tileloadd tmm0, [{c} + {ldc}*1]" "/* {c2} */"],
    ["tileloadd tmm4, [{a} + {lda}*1]" "tileloadd tmm6, [{b} + {ldb}*1]" "tdpbf16ps tmm0, tmm4, tmm6"],
    ["tilestored [{c} + {ldc}*1], tmm0" "/* {c2} */"]
);

/// C (+)= A B for 32 (or 16) rows and 32 (or 16) columns.
///
/// # Safety
/// After [`configure`]; all rows and columns named by the flags are live; `words` is a multiple of 16.
#[allow(clippy::too_many_arguments)]
pub unsafe fn tile(
    rows32: bool,
    columns32: bool,
    a: *const u32,
    words: usize,
    b: *const u32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    if words == 0 {
        return;
    }
    // SAFETY: the caller's duty.
    unsafe {
        match (rows32, columns32) {
            (true, true) => two_by_two(a, words, b, c, ldc, add),
            (true, false) => two_by_one(a, words, b, c, ldc, add),
            (false, true) => one_by_two(a, words, b, c, ldc, add),
            (false, false) => one_by_one(a, words, b, c, ldc, add),
        }
    }
}
