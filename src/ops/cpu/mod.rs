//! What every CPU kernel stands on: slices of tensors, two busy cores, instruction sets chosen at run time, a fast
//! exponential. Knows no operation. Read tile.rs next.

pub mod bf16;
pub mod gemm;
pub mod pack;
pub mod pool;

use std::ops::{Deref, Range};
use std::sync::OnceLock;

use candle_core::{CpuStorage, Device, Result, Shape, Storage, StorageRef, Tensor};

/// A contiguous f32 CPU tensor as a slice, for as long as the view lives.
pub struct View<'a> {
    guard: StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for View<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.guard {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("view() lets only f32 CPU storage through"),
        }
    }
}

/// # Errors
/// If the tensor is not contiguous f32 on the CPU.
pub fn view(tensor: &Tensor) -> Result<View<'_>> {
    let (guard, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a CPU kernel was given a tensor {:?} that is not contiguous", tensor.shape());
    };
    if !matches!(&*guard, Storage::Cpu(CpuStorage::F32(_))) {
        candle_core::bail!(
            "a CPU kernel was given a tensor of {:?} on {:?}",
            tensor.dtype(),
            tensor.device().location()
        );
    }
    Ok(View { guard, range: start..end })
}

/// A CPU tensor over `values`, without a copy.
///
/// # Errors
/// If the shape does not hold as many numbers.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// A buffer that threads fill in disjoint parts. Nothing is initialised before.
pub struct Buffer {
    values: Vec<f32>,
    len: usize,
}

/// The buffer's address, to be sent to threads: each writes its own part.
#[derive(Clone, Copy)]
pub struct Out(*mut f32);

// SAFETY: a plain address; that writes are disjoint is the duty of each unsafe use.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// The address of a slice that several threads are to fill.
    pub fn of(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The address of element `i`.
    ///
    /// # Safety
    /// `i` lies inside the buffer that this address came from, and nobody else uses the element meanwhile.
    pub unsafe fn at(self, i: usize) -> *mut f32 {
        // SAFETY: the caller's duty.
        unsafe { self.0.add(i) }
    }

    /// `len` elements from `start` on, as a slice of one's own.
    ///
    /// # Safety
    /// As for [`Out::at`], for every element; and each was written before it is read.
    pub unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's duty.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

impl Buffer {
    /// Room for `len` numbers.
    pub fn new(len: usize) -> Self {
        Self { values: Vec::with_capacity(len), len }
    }

    /// Where to write.
    pub fn out(&mut self) -> Out {
        Out(self.values.as_mut_ptr())
    }

    /// The numbers.
    ///
    /// # Safety
    /// Every element was written.
    pub unsafe fn finish(mut self) -> Vec<f32> {
        // SAFETY: capacity was reserved in new(), and the caller wrote all `len` elements.
        unsafe { self.values.set_len(self.len) };
        self.values
    }
}

/// Below this many multiply-adds a second core costs more than it brings (a barrier takes under a microsecond).
pub(crate) const WORTH_A_THREAD: usize = 40_000;

/// Runs `f` over parts of 0..items on all cores. `cost` is the number of multiply-adds in all. Each item is done by
/// one thread, whichever is free, so results never depend on the number of threads as long as items are independent.
pub fn parallel(items: usize, cost: usize, f: impl Fn(Range<usize>) + Sync) {
    if cost < WORTH_A_THREAD || items < 2 {
        if items > 0 {
            f(0..items);
        }
        return;
    }
    crate::ops::cpu::pool::share(items, f);
}

/// The instruction sets that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every target has (NEON on 64-bit Arm).
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL beside those.
    Avx512,
}

impl Isa {
    /// The best set that this machine has.
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

    /// All sets that this machine can run, for tests of the fallbacks.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|i| *i <= Self::detect()).collect()
    }
}

/// Compiles one plain loop for each instruction set and picks one at run time: the compiler vectorises it anew for
/// each. The body must be free of fused multiply-adds, so that all versions round alike.
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

/// e^x to 2 units in the last place for x in [-87, 88], clamped outside, NaN of NaN; branch-free, so that loops over it
/// vectorise. Cody-Waite reduction by ln 2, then a polynomial of degree 6 on [-ln2/2, ln2/2].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: a number added to it is rounded to an integer, which then stands in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    // In this order NaN passes through both.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = (x - n * 0.693_145_75) - n * 1.428_606_8e-6;
    let p = 1.0 / 720.0 * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = (p * r) * r + r + 1.0;
    p * f32::from_bits(shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127) << 23)
}

/// tanh x to 3e-7, branch-free like [`exp`]: its Taylor polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let q = x * x;
    let near = x * (1.0 + q * (-1.0 / 3.0 + q * (2.0 / 15.0 + q * (-17.0 / 315.0 + q * (62.0 / 2835.0)))));
    let far = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if q < 0.0625 { near } else { far }
}

/// erf x to 5e-7: its Taylor polynomial near 0, elsewhere Abramowitz and Stegun 7.1.26.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let q = x * x;
    // 2 / sqrt(pi) times the alternating series of x^(2n+1) / (n! (2n+1)).
    let near = std::f32::consts::FRAC_2_SQRT_PI
        * x
        * (1.0 + q * (-1.0 / 3.0 + q * (0.1 + q * (-1.0 / 42.0 + q * (1.0 / 216.0 + q * (-1.0 / 1320.0))))));
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (0.254_829_6 + t * (-0.284_496_72 + t * (1.421_413_8 + t * (-1.453_152 + t * 1.061_405_4))));
    let far = (1.0 - p * exp(-q)).copysign(x);
    if q < 0.25 { near } else { far }
}

/// Sum of products in sixteen lanes, then the lanes: the same order on every machine.
#[inline(always)]
pub fn dot_plain(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (a16, a_rest) = a.as_chunks::<16>();
    let (b16, b_rest) = b.as_chunks::<16>();
    for (x, y) in a16.iter().zip(b16) {
        for i in 0..16 {
            lanes[i] += x[i] * y[i];
        }
    }
    for (i, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += x * y;
    }
    lane_sum(&lanes)
}

/// [`dot_plain`] of one row with each of four, bit for bit.
pub fn four_dots(a: &[f32], rows: [&[f32]; 4]) -> [f32; 4] {
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() != Isa::Portable && a.len().is_multiple_of(16) && rows.iter().all(|row| row.len() == a.len()) {
        // SAFETY: detect() found the instructions; the rows are as long as `a`, in whole sixteens.
        return unsafe { four_dots_avx2(a, rows) };
    }
    rows.map(|row| dot_plain(a, row))
}

/// The sixteen lanes of [`dot_plain`] are two registers here; the last sums of all four rows are taken side by side.
///
/// # Safety
/// The machine has AVX2; all five are of one length, a multiple of 16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn four_dots_avx2(a: &[f32], rows: [&[f32]; 4]) -> [f32; 4] {
    use std::arch::x86_64::*;
    let mut lanes = [[_mm256_setzero_ps(); 2]; 4];
    for j in (0..a.len()).step_by(16) {
        for half in 0..2 {
            // SAFETY: j + 16 is at most the length of all five.
            unsafe {
                let x = _mm256_loadu_ps(a.as_ptr().add(j + 8 * half));
                for (lanes, row) in lanes.iter_mut().zip(rows) {
                    let product = _mm256_mul_ps(x, _mm256_loadu_ps(row.as_ptr().add(j + 8 * half)));
                    lanes[half] = _mm256_add_ps(lanes[half], product);
                }
            }
        }
    }
    let mut sums = [0f32; 4];
    let four = lane_sums(lanes.map(|[low, high]| _mm256_add_ps(low, high)));
    // SAFETY: room for four.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), four) };
    sums
}

/// The sums of the lanes of four registers, each taken in halves: lane l with lane l + 4, then l + 2, then l + 1.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn lane_sums(registers: [std::arch::x86_64::__m256; 4]) -> std::arch::x86_64::__m128 {
    use std::arch::x86_64::*;
    let [a, b, c, d] = registers.map(|r| _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps::<1>(r)));
    // Columns of the four, so that one add serves all: ab = a0 b0 a1 b1, and so on.
    let (ab_low, ab_high) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let (cd_low, cd_high) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    let (ab, cd) = (_mm_add_ps(ab_low, ab_high), _mm_add_ps(cd_low, cd_high));
    _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab))
}

/// The largest number, minus infinity of none; NaN is passed over.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for (top, &x) in lanes.iter_mut().zip(block) {
            *top = if x > *top { x } else { *top };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

/// Pairwise sum of sixteen lanes.
#[inline(always)]
pub fn lane_sum(lanes: &[f32; 16]) -> f32 {
    let mut s = *lanes;
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            s[i] += s[i + width];
        }
    }
    s[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_f64_to_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 1e-37 && exp(1000.0).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn four_dots_have_the_bits_of_one() {
        let mut rng = crate::rng::SplitMix64::new(5);
        for n in [0, 3, 16, 37, 64, 128] {
            let rows: Vec<Vec<f32>> = (0..5).map(|_| (0..n).map(|_| rng.uniform() as f32 - 0.5).collect()).collect();
            let got = four_dots(&rows[4], std::array::from_fn(|i| &rows[i][..]));
            for i in 0..4 {
                assert_eq!(got[i].to_bits(), dot_plain(&rows[4], &rows[i]).to_bits(), "{n}");
            }
        }
    }

    #[test]
    fn tanh_and_erf_agree_with_f64() {
        // erf by its series in f64, which converges quickly up to 4.
        let erf64 = |x: f64| {
            let (mut sum, mut term) = (x, x);
            for n in 1..120 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        };
        let (mut worst_tanh, mut worst_erf) = (0f64, 0f64);
        for i in -400..=400 {
            let x = i as f32 * 0.01;
            let error = |got: f32, want: f64| (f64::from(got) - want).abs() / want.abs().max(1e-3);
            worst_tanh = worst_tanh.max(error(tanh(x), f64::from(x).tanh()));
            worst_erf = worst_erf.max(error(erf(x), erf64(f64::from(x))));
        }
        assert!(worst_tanh < 1e-6 && worst_erf < 1e-6, "{worst_tanh:e} {worst_erf:e}");
        assert_eq!((tanh(50.0), tanh(-50.0), erf(9.0), erf(-9.0)), (1.0, -1.0, 1.0, -1.0));
    }

    #[test]
    fn parallel_visits_every_item_once() {
        let mut b = Buffer::new(1000);
        let out = b.out();
        parallel(1000, usize::MAX, |r| {
            for i in r {
                // SAFETY: i is inside the buffer and visited by one thread.
                unsafe { *out.at(i) = i as f32 };
            }
        });
        // SAFETY: all written above.
        let values = unsafe { b.finish() };
        assert!(values.iter().enumerate().all(|(i, &v)| v == i as f32));
    }
}
