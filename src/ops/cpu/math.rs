//! Elementary functions and reductions that the compiler can vectorise: exp, tanh, erf, dot products, sums, the soft
//! cap. Every reduction has a fixed order, so results have the same bits on every machine. It depends on `isa.rs` only.
//! Read `gemm.rs` next.

use crate::ops::cpu::isa::{Isa, vectorised};

/// e^x to 2 units in the last place for x in [-87, 88], clamped outside; NaN gives NaN. It is branch-free, so that
/// loops over it vectorise. Cody-Waite reduction by ln 2, then a polynomial of degree 6 on [-ln2/2, ln2/2].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds a number to an integer, which is then in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    // Written in this order, both comparisons let NaN pass.
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

/// Dot product in sixteen partial sums, which are then added pairwise: the same order on every machine.
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

/// [`dot_plain`] of `a` with each of four rows, with the same bits.
pub fn four_dots(a: &[f32], rows: [&[f32]; 4]) -> [f32; 4] {
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() != Isa::Portable && a.len().is_multiple_of(16) && rows.iter().all(|row| row.len() == a.len()) {
        // SAFETY: detect() found the instructions; the rows are as long as `a`, in whole sixteens.
        return unsafe { four_dots_avx2(a, rows) };
    }
    rows.map(|row| dot_plain(a, row))
}

/// The sixteen partial sums of [`dot_plain`] are two registers here; the final sums of all four rows are taken
/// together.
///
/// # Safety
/// The machine has AVX2; all five slices have the same length, a multiple of 16.
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
    // SAFETY: `sums` has four elements.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), four) };
    sums
}

/// Horizontal sums of four registers. Each adds lane l to lane l + 4, then to l + 2, then to l + 1.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn lane_sums(registers: [std::arch::x86_64::__m256; 4]) -> std::arch::x86_64::__m128 {
    use std::arch::x86_64::*;
    let [a, b, c, d] = registers.map(|r| _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps::<1>(r)));
    // The four are transposed, so that one addition serves all: ab = a0 b0 a1 b1, and so on.
    let (ab_low, ab_high) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let (cd_low, cd_high) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    let (ab, cd) = (_mm_add_ps(ab_low, ab_high), _mm_add_ps(cd_low, cd_high));
    _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab))
}

/// The largest element; minus infinity for an empty slice. NaN is ignored.
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

/// Pairwise sum of sixteen partial sums.
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

vectorised! {
    /// Soft cap, in place: x -> cap tanh(factor x), `factor` being scale / cap.
    pub(crate) fn soft_cap(values: &mut [f32], factor: f32, cap: f32) {
        for x in values {
            *x = cap * tanh(*x * factor);
        }
    }
}

vectorised! {
    /// Backward of x -> cap tanh(scale x / cap), in place: the gradient is multiplied by scale (1 - (y / cap)^2), y
    /// being the capped values.
    pub(crate) fn soft_cap_backward(capped: &[f32], gradient: &mut [f32], scale: f32, cap: f32) {
        for (g, &y) in gradient.iter_mut().zip(capped) {
            let t = y / cap;
            *g *= scale * (1.0 - t * t);
        }
    }
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
    fn four_dots_equal_four_calls_of_dot_plain_in_every_bit() {
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
}
