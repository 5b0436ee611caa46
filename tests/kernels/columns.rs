//! Fused projections, sums, scales, casts and DoRA's columns.

use fourfold::device::Element;
use fourfold::device::testing::can_emulate;
use fourfold::ops::columns::Fusion;
use fourfold::ops::columns::gpu as columns;

use crate::support::*;

#[test]
fn fused_projections_are_cut_and_joined() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for element in FLOATS {
        for (widths, fusion) in [
            (vec![6, 3, 3], Fusion::EndToEnd),
            (vec![8, 4, 4], Fusion::Grouped { groups: 4 }),
            (vec![12, 4], Fusion::Grouped { groups: 2 }),
            (vec![5], Fusion::EndToEnd),
        ] {
            let (n, fused) = (301, widths.iter().sum::<usize>());
            let (x, xs) = random(device, element, n, fused, 1);
            let parts = columns::split(&x, &widths, fusion).unwrap();
            let groups = if let Fusion::Grouped { groups } = fusion { groups } else { 1 };
            let mut before = 0;
            for (part, width) in parts.iter().zip(&widths) {
                let run = width / groups;
                let want: Vec<f64> = (0..n * width)
                    .map(|i| {
                        let (row, group, at) = (i / width, i % width / run, i % width % run);
                        xs[row * fused + group * (fused / groups) + before + at]
                    })
                    .collect();
                assert_eq!(wide(&part.to_f32().unwrap()), want);
                before += run;
            }
            same("join", &columns::join(&parts.iter().collect::<Vec<_>>(), fusion).unwrap(), &x);
        }
    }
    let (x, _) = random(device, Element::F32, 2, 9, 1);
    assert!(columns::split(&x, &[4, 4], Fusion::EndToEnd).is_err());
    assert!(columns::split(&x, &[6, 3], Fusion::Grouped { groups: 2 }).is_err());
    assert!(columns::join(&[], Fusion::EndToEnd).is_err());
}

#[test]
fn sums_scales_and_casts_in_every_mixture_of_types() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let all = |a: &[f64], b: &[f64], f: f64| a.iter().zip(b).map(|(a, b)| a + f * b).collect::<Vec<_>>();
    for (a, b) in pairs() {
        for (x_type, y_type, to) in [(a, b, a), (a, b, b), (a, a, b)] {
            for (n, d) in [(3, 347), (2, 512), (0, 5)] {
                let (x, xs) = random(device, x_type, n, d, 1);
                let (y, ys) = random(device, y_type, n, d, 2);
                let what = format!("add {x_type} {y_type} {to}");
                close(&what, &columns::add(&x, &y, 0.75, to).unwrap(), &all(&xs, &ys, 0.75));
                columns::add_assign(&x, &y, 0.75).unwrap();
                close(&what, &x, &all(&xs, &ys, 0.75));
            }
        }
    }
    for from in FLOATS {
        for to in FLOATS {
            let (x, xs) = random(device, from, 3, 347, 1);
            close("scale", &columns::scale(&x, -1.5, to).unwrap(), &xs.iter().map(|v| -1.5 * v).collect::<Vec<_>>());
            // A cast is the nearest number: what an upload of the same numbers gives.
            let again = device.upload_as(to, &x.to_f32().unwrap(), 3, 347).unwrap();
            same("cast", &columns::cast(&x, to).unwrap(), &again);
        }
    }
}

#[test]
fn factors_and_biases_of_columns() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for (x_type, to) in pairs() {
        let (n, d) = (7, 131);
        let (x, xs) = random(device, x_type, n, d, 1);
        let (g, gs) = random(device, Element::F32, 1, d, 2);
        let (b, bs) = random(device, Element::F32, 1, d, 3);
        let each = |f: &dyn Fn(usize, usize) -> f64| (0..n * d).map(|i| f(i, i % d)).collect::<Vec<_>>();
        close("bias", &columns::affine(&x, None, Some(&b), to).unwrap(), &each(&|i, j| xs[i] + bs[j]));
        close("factor", &columns::affine(&x, Some(&g), None, to).unwrap(), &each(&|i, j| xs[i] * gs[j]));
        let both = each(&|i, j| xs[i] * gs[j] + bs[j]);
        close("both", &columns::affine(&x, Some(&g), Some(&b), to).unwrap(), &both);
        columns::affine_in_place(&x, Some(&g), Some(&b)).unwrap();
        close("in place", &x, &both);
        assert!(columns::affine(&x, Some(&x), None, to).is_err());
    }
}

#[test]
fn sums_over_rows_of_any_number() {
    if !can_emulate() {
        return;
    }
    for (device, (x_type, u_type)) in devices().iter().cycle().zip(pairs()) {
        for (n, d) in [(0, 5), (1, 3), (128, 7), (129, 131), (700, 33), (17000, 2)] {
            let (x, xs) = random(device, x_type, n, d, 1);
            let (u, us) = random(device, u_type, n, d, 2);
            let (w, ws) = random(device, Element::F32, n, 1, 3);
            let want = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                (0..d).map(|j| (0..n).map(|i| f(i, i * d + j)).sum()).collect()
            };
            close("sums", &columns::sums(&x, None, None).unwrap(), &want(&|_, at| xs[at]));
            close("products", &columns::sums(&x, Some(&u), None).unwrap(), &want(&|_, at| xs[at] * us[at]));
            let all = columns::sums(&x, Some(&u), Some(&w)).unwrap();
            close("weighted", &all, &want(&|i, at| xs[at] * us[at] * ws[i]));
            columns::add_sums(&x, None, None, &all).unwrap();
            close("added", &all, &want(&|i, at| xs[at] * us[at] * ws[i] + xs[at]));
        }
    }
}

#[test]
fn dora_takes_norms_of_rows_and_gives_zero_where_there_is_no_direction() {
    if !can_emulate() {
        return;
    }
    for (device, (w_type, f_type)) in devices().iter().cycle().zip(pairs()) {
        for (n, k, r) in [(19, 300, 5), (8, 64, 1), (3, 7, 40)] {
            let mut numbers = Random::new(1).numbers(n * k);
            numbers[k..2 * k].fill(0.0);
            let (w, ws) = upload(device, w_type, &numbers, n, k);
            let (a, as_) = random(device, f_type, r, k, 2);
            let mut factor = Random::new(3).numbers(n * r);
            factor[r..2 * r].fill(0.0);
            let (b, bs) = upload(device, f_type, &factor, n, r);
            let squares: Vec<f64> = (0..n)
                .map(|i| {
                    let branch = |j: usize| (0..r).map(|q| bs[i * r + q] * as_[q * k + j]).sum::<f64>();
                    (0..k).map(|j| (ws[i * k + j] + 1.5 * branch(j)).powi(2)).sum()
                })
                .collect();
            // A range of a longer list, as blocks of rows fill it.
            let all = device.matrix(Element::F32, n + 2, 1).unwrap();
            let got = all.row_range(1..n + 1).unwrap();
            columns::squared_row_norms(&w, &a, &b, 1.5, &got).unwrap();
            close("squares", &got, &squares);
            let (m, ms) = random(device, Element::F32, 1, n, 4);
            let (norms, factors) = columns::dora_factors(&got, &m).unwrap();
            let roots: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
            let or_zero = |i: usize, v: f64| if roots[i] > 0.0 { v / roots[i] } else { 0.0 };
            close("norms", &norms, &roots);
            close("factors", &factors, &(0..n).map(|i| or_zero(i, ms[i])).collect::<Vec<_>>());
            let (dy, dys) = random(device, w_type, 6, n, 5);
            let (u, us) = random(device, w_type, 6, n, 6);
            let dm = columns::magnitude_gradient(&dy, &u, &norms).unwrap();
            let want: Vec<f64> =
                (0..n).map(|j| or_zero(j, (0..6).map(|i| dys[i * n + j] * us[i * n + j]).sum())).collect();
            close("dm", &dm, &want);
            assert_eq!(factors.to_f32().unwrap()[1], 0.0);
        }
    }
}

#[test]
fn a_nan_shows_in_sums_and_norms() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let mut numbers = vec![1.0; 300 * 4];
    numbers[200 * 4 + 1] = f32::NAN;
    let x = device.upload_f32(&numbers, 300, 4).unwrap();
    let sums = columns::sums(&x, None, None).unwrap().to_f32().unwrap();
    assert!(sums[1].is_nan() && sums[0] == 300.0 && sums[2] == 300.0);
    let (a, b) = (device.zeros(Element::F32, 2, 4).unwrap(), device.zeros(Element::F32, 300, 2).unwrap());
    let squares = device.matrix(Element::F32, 300, 1).unwrap();
    columns::squared_row_norms(&x, &a, &b, 1.0, &squares).unwrap();
    let (norms, factors) = columns::dora_factors(&squares, &squares).unwrap();
    for of in [norms, factors] {
        let of = of.to_f32().unwrap();
        assert!(of[200].is_nan() && of.iter().filter(|v| v.is_nan()).count() == 1);
    }
}
