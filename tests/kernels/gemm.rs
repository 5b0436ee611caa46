//! The matrix product in all orders, strides, types and factors, against sums in f64. No kernel takes part.

use std::sync::Arc;

use fourfold::device::emulated::Emulated;
use fourfold::device::kernels::with_prelude;
use fourfold::device::testing::can_emulate;
use fourfold::device::{Device, Element, Gemm, Matrix, Strided};

use crate::support::noise;

fn device() -> Device {
    Device::new(Arc::new(Emulated::with_text(&with_prelude("")).unwrap()))
}

#[test]
fn all_orders_types_and_strides_agree_with_f64() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let mut seed = 0u64;
    for (m, n, k, batch) in [(1, 1, 1, 1), (3, 17, 5, 2), (37, 33, 70, 3), (64, 130, 96, 1)] {
        for (element, into) in [
            (Element::F32, Element::F32),
            (Element::Bf16, Element::F32),
            (Element::Bf16, Element::Bf16),
            (Element::F16, Element::F16),
        ] {
            for order in 0..4 {
                let (x_transposed, w_transposed) = (order & 1 == 1, order & 2 == 2);
                for (alpha, beta) in [(1.0f32, 0.0f32), (0.5, 1.0), (1.0, -0.25)] {
                    seed += 1;
                    let shape = |t: bool, r: usize, c: usize| if t { (c, r) } else { (r, c) };
                    // Rows with room after them, matrices with room after them, and room before the first.
                    let make = |(rows, cols): (usize, usize), element, s: u64| -> (Matrix, usize, usize, usize) {
                        let (offset, row, next) = (7, cols + 3, rows * (cols + 3) + 5);
                        let len = offset + batch * next;
                        let values = noise(len, seed + 1000 * s);
                        (device.upload_as(element, &values, 1, len).unwrap(), offset, row, next)
                    };
                    let (xs, ws, ys) = (shape(x_transposed, m, k), shape(w_transposed, k, n), (m, n));
                    let (x, w, y) = (make(xs, element, 1), make(ws, element, 2), make(ys, into, 3));
                    let before = y.0.to_f32().unwrap();
                    let at =
                        |o: &(Matrix, usize, usize, usize), b: usize, r: usize, c: usize| o.1 + b * o.3 + r * o.2 + c;
                    fn place(o: &(Matrix, usize, usize, usize)) -> Strided<'_> {
                        Strided { matrix: &o.0, offset: o.1, row: o.2, next: o.3 }
                    }
                    let (x_of, w_of) = (x.0.to_f32().unwrap(), w.0.to_f32().unwrap());
                    let product = Gemm {
                        m,
                        n,
                        k,
                        batch,
                        x: place(&x),
                        x_transposed,
                        w: place(&w),
                        w_transposed,
                        y: place(&y),
                        alpha,
                        beta,
                    };
                    device.gemm(product).unwrap();
                    let mut expected = before.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
                    for b in 0..batch {
                        for i in 0..m {
                            for j in 0..n {
                                let term = |t| {
                                    let x_at = if x_transposed { at(&x, b, t, i) } else { at(&x, b, i, t) };
                                    let w_at = if w_transposed { at(&w, b, j, t) } else { at(&w, b, t, j) };
                                    f64::from(x_of[x_at]) * f64::from(w_of[w_at])
                                };
                                let sum: f64 = (0..k).map(term).sum();
                                let v = &mut expected[at(&y, b, i, j)];
                                *v = f64::from(alpha) * sum + if beta == 0.0 { 0.0 } else { f64::from(beta) * *v };
                            }
                        }
                    }
                    let rounding = match into {
                        Element::Bf16 => 1.0 / 256.0,
                        Element::F16 => 1.0 / 2048.0,
                        _ => 0.0,
                    };
                    for (got, want) in y.0.to_f32().unwrap().into_iter().zip(expected) {
                        let off = (f64::from(got) - want).abs();
                        assert!(off <= want.abs() * rounding + 2e-5, "{product:?}: {got} for {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn beta_of_zero_does_not_read_and_one_factor_serves_a_batch() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let x = device.upload_f32(&noise(2 * 6, 1), 2, 6).unwrap();
    let w = device.upload_f32(&noise(12, 2), 4, 3).unwrap();
    let y = device.matrix(Element::F32, 2, 8).unwrap();
    let batch = Gemm {
        m: 2,
        n: 4,
        k: 3,
        batch: 2,
        x: Strided { matrix: &x, offset: 0, row: 3, next: 6 },
        x_transposed: false,
        w: w.whole(),
        w_transposed: true,
        y: Strided { matrix: &y, offset: 0, row: 4, next: 8 },
        alpha: 1.0,
        beta: 0.0,
    };
    device.gemm(batch).unwrap();
    let (x, w, y) = (x.to_f32().unwrap(), w.to_f32().unwrap(), y.to_f32().unwrap());
    for (i, y) in y.chunks(4).enumerate() {
        for (j, y) in y.iter().enumerate() {
            let sum: f32 = (0..3).map(|t| x[3 * i + t] * w[3 * j + t]).sum();
            assert!((sum - y).abs() < 1e-6);
        }
    }
}

#[test]
fn products_that_do_not_fit_are_refused() {
    if !can_emulate() {
        return;
    }
    let (device, other) = (Device::dry(), Device::dry());
    let f32s = device.matrix(Element::F32, 4, 4).unwrap();
    let halves = device.matrix(Element::Bf16, 4, 4).unwrap();
    let bytes = device.matrix(Element::U8, 4, 4).unwrap();
    let elsewhere = other.matrix(Element::F32, 4, 4).unwrap();
    let good = Gemm {
        m: 4,
        n: 4,
        k: 4,
        batch: 1,
        x: f32s.whole(),
        x_transposed: false,
        w: f32s.whole(),
        w_transposed: false,
        y: f32s.whole(),
        alpha: 1.0,
        beta: 0.0,
    };
    device.gemm(good).unwrap();
    device.gemm(Gemm { m: 0, ..good }).unwrap();
    let refused = |gemm, words: &str| {
        let error = device.gemm(gemm).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(Gemm { x: halves.whole(), ..good }, "a product of bf16 and f32");
    refused(Gemm { x: bytes.whole(), w: bytes.whole(), ..good }, "a product of u8 and u8");
    refused(Gemm { y: halves.whole(), ..good }, "a product of f32 into bf16");
    refused(Gemm { w: elsewhere.whole(), ..good }, "w lies on the dry machine");
    refused(Gemm { m: 5, ..good }, "1 x (5, 4) of x reach to number 20 of 16");
    refused(Gemm { batch: 2, y: Strided { next: 1, ..f32s.whole() }, ..good }, "of y reach to number 17 of 16");
    refused(Gemm { x: Strided { offset: 1, ..f32s.whole() }, ..good }, "of x reach to number 17 of 16");
    refused(Gemm { x: Strided { row: 3, ..f32s.whole() }, ..good }, "rows of 4 numbers at a distance of 3");
    refused(Gemm { k: 0, ..good }, "k = 0");
}
