//! What the tests share: devices, random numbers and comparisons.

use std::sync::{Arc, OnceLock};

use fourfold::device::emulated::Emulated;
use fourfold::device::{Device, Element, Matrix};

pub const FLOATS: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

/// One machine with threads in plain order, and two with other orders, in which a missing barrier shows. All tests of
/// this process share them and run at the same time, so what [`Device::work`] and [`Device::usage`] count on them is
/// nobody's own: a test that counts opens [`own_devices`].
pub fn devices() -> &'static [Device; 3] {
    static DEVICES: OnceLock<[Device; 3]> = OnceLock::new();
    DEVICES.get_or_init(own_devices)
}

/// The machines of [`devices`], opened for the caller alone.
pub fn own_devices() -> [Device; 3] {
    [0, 7, 1234].map(|seed| Device::new(Arc::new(Emulated::open().unwrap().shuffled(seed))))
}

/// The machine with plain order.
pub fn device() -> &'static Device {
    &devices()[0]
}

/// Numbers between -1 and 1 (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// Numbers between -1 and 1.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    Random::new(seed).numbers(len)
}

/// A random matrix and its numbers, as rounded to the element.
pub fn random(device: &Device, element: Element, rows: usize, cols: usize, seed: u64) -> (Matrix, Vec<f64>) {
    upload(device, element, &Random::new(seed).numbers(rows * cols), rows, cols)
}

/// A matrix and its numbers, as rounded to the element.
pub fn upload(device: &Device, element: Element, values: &[f32], rows: usize, cols: usize) -> (Matrix, Vec<f64>) {
    let matrix = device.upload_as(element, values, rows, cols).unwrap();
    let rounded = wide(&matrix.to_f32().unwrap());
    (matrix, rounded)
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// How far a result may be from f64's, relative to the largest number.
pub fn tolerance(element: Element) -> f64 {
    match element {
        Element::F32 => 1e-5,
        Element::F16 => 1.5e-3,
        _ => 1.2e-2,
    }
}

/// The numbers of `got` are those of `want`, within the tolerance of `element`, which is got's own or the operands'.
#[track_caller]
pub fn close_as(what: &str, element: Element, got: &Matrix, want: &[f64]) {
    let got = got.to_f32().unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0f64, |a, v| a.max(v.abs())).max(1e-30);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(g) - w).abs() / largest;
        assert!(off <= tolerance(element), "{what} of {element}: number {i} is {g}, not {w}, {off:.1e} of {largest}");
    }
}

#[track_caller]
pub fn close(what: &str, got: &Matrix, want: &[f64]) {
    close_as(what, got.element(), got, want);
}

/// The bits of two results are the same.
#[track_caller]
pub fn same(what: &str, a: &Matrix, b: &Matrix) {
    assert_eq!(a.to_bytes().unwrap(), b.to_bytes().unwrap(), "{what}");
}

/// f32 with one narrow type: (x, y).
pub fn pairs() -> Vec<(Element, Element)> {
    let (f32, bf16, f16) = (Element::F32, Element::Bf16, Element::F16);
    vec![(f32, f32), (f32, bf16), (bf16, f32), (bf16, bf16), (f32, f16), (f16, f32), (f16, f16)]
}
