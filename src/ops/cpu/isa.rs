//! Instruction sets, detected at run time, and `vectorised!`, which compiles one plain loop for each of them, so that one
//! binary runs at full speed on every machine. It does not depend on the rest of the crate. Read `math.rs` next.

use std::sync::OnceLock;

/// The instruction sets that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// The baseline of every target (NEON on 64-bit Arm).
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW and VL in addition.
    Avx512,
}

impl Isa {
    /// The best set that this machine supports.
    pub fn detect() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl");
                if avx2 && avx512 {
                    return Isa::Avx512;
                }
                if avx2 {
                    return Isa::Avx2;
                }
            }
            Isa::Portable
        })
    }

    /// All sets that this machine can run; tests use it to cover the fallbacks.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|i| *i <= Self::detect()).collect()
    }
}

/// Compiles a plain loop once per instruction set and selects one at run time; the compiler vectorises each version.
/// The body must not contain fused multiply-adds, so that all versions round alike.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn plain($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { plain($($arg),*) }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { plain($($arg),*) }
                match $crate::ops::cpu::Isa::detect() {
                    // SAFETY: detect() found the features.
                    $crate::ops::cpu::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: detect() found the features.
                    $crate::ops::cpu::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::ops::cpu::Isa::Portable => {}
                }
            }
            plain($($arg),*)
        }
    };
}
pub(crate) use vectorised;
