//! Rows by number, and the value head.

use fourfold::device::Element;
use fourfold::device::testing::can_emulate;
use fourfold::ops::rows::gpu as rows;

use crate::support::*;

#[test]
fn rows_are_picked_and_added_back_in_order() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for (from, to) in pairs() {
        for (index, n, d) in [(vec![4, 0, 4, 2, 4, 0], 6, 77), (vec![], 3, 5), (vec![0], 1, 1)] {
            let on = rows::DeviceIndex::new(device, &index, n).unwrap();
            let (x, xs) = random(device, from, n, d, 1);
            let want: Vec<f64> = index.iter().flat_map(|&i| xs[i * d..(i + 1) * d].to_vec()).collect();
            close("gather", &rows::gather(&x, &on, to).unwrap(), &want);
            let (values, vs) = random(device, from, index.len(), d, 2);
            let mut want = vec![0f64; n * d];
            for (k, &i) in index.iter().enumerate() {
                (0..d).for_each(|j| want[i * d + j] += vs[k * d + j]);
            }
            close("scatter", &rows::scatter(&values, &on, to).unwrap(), &want);
            let (y, ys) = random(device, to, n, d, 3);
            rows::scatter_add(&values, &on, &y).unwrap();
            close("scatter_add", &y, &want.iter().zip(&ys).map(|(a, b)| a + b).collect::<Vec<_>>());
        }
    }
    assert!(rows::DeviceIndex::new(device, &[3], 3).unwrap_err().to_string().contains("row 3 of 3"));
}

#[test]
fn the_value_head_and_its_gradients() {
    if !can_emulate() {
        return;
    }
    for (device, element) in devices().iter().cycle().zip(FLOATS.into_iter().cycle().take(9)) {
        for (n, d) in [(5, 70), (1, 1), (300, 33), (0, 4)] {
            let (h, hs) = random(device, element, n, d, 1);
            let (w, ws) = random(device, Element::F32, 1, d, 2);
            let bias = device.upload_f32(&[0.3], 1, 1).unwrap();
            let dot = |i: usize| (0..d).map(|j| hs[i * d + j] * ws[j]).sum::<f64>();
            let want: Vec<f64> = (0..n).map(|i| dot(i) + f64::from(0.3f32)).collect();
            close("value", &rows::value(&h, &w, &bias).unwrap(), &want);
            let (dv, dvs) = random(device, Element::F32, n, 1, 3);
            for to in FLOATS {
                let g = rows::value_backward(&h, &w, &dv, to).unwrap();
                let dh: Vec<f64> = (0..n * d).map(|i| dvs[i / d] * ws[i % d]).collect();
                close("dh", &g.hidden, &dh);
                let dw: Vec<f64> = (0..d).map(|j| (0..n).map(|i| dvs[i] * hs[i * d + j]).sum()).collect();
                close("dw", &g.weight, &dw);
                close("db", &g.bias, &[dvs.iter().sum()]);
            }
        }
    }
}
