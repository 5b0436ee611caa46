//! What linear.rs compares with: one group of maps, run on a device and computed in f64 from the same numbers.

use fourfold::device::{Device, Element, Matrix};
use fourfold::ops::linear::gpu::{Compute, DeviceLora, Gradients, Map, SCRATCH, Saved, backward, forward};
use fourfold::ops::storage::gpu::DeviceWeight;
use fourfold::ops::weight::StorageDType;
use half::{bf16, f16};

use crate::reference::{Host, Random};
use crate::support::{tolerance, wide};

pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9).wrapping_add(7));
    (0..count).map(|_| random.unit()).collect()
}

/// As operands of this type.
pub fn rounded(element: Element, values: &[f64]) -> Vec<f64> {
    let round = |v: f64| match element {
        Element::Bf16 => bf16::from_f32(v as f32).to_f64(),
        Element::F16 => f16::from_f32(v as f32).to_f64(),
        _ => f64::from(v as f32),
    };
    values.iter().map(|&v| round(v)).collect()
}

/// (cols, rows) of (rows, cols).
pub fn transposed(values: &[f64], cols: usize) -> Vec<f64> {
    let rows = values.len() / cols;
    (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect()
}

/// x (m, k) w (k, n).
pub fn product(x: &[f64], w: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let mut y = vec![0.0; m * n];
    for i in 0..m {
        for t in 0..k {
            (0..n).for_each(|j| y[i * n + j] += x[i * k + t] * w[t * n + j]);
        }
    }
    y
}

/// Norms of the rows of W + s B A.
pub fn row_norms(w: &[f64], a: &[f64], b: &[f64], s: f64, r: usize) -> Vec<f64> {
    let (k, n) = (a.len() / r, b.len() / r);
    let branch = product(b, a, n, r, k);
    let square = |i: usize| (i * k..(i + 1) * k).map(|at| (w[at] + s * branch[at]).powi(2)).sum::<f64>();
    (0..n).map(|i| square(i).sqrt()).collect()
}

#[track_caller]
pub fn close(what: &str, tolerance: f64, got: &Matrix, want: &[f64]) {
    let got = got.to_f32().unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0f64, |a, v| a.max(v.abs()));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(g) - w).abs();
        assert!(off <= tolerance * largest, "{what}: number {i} is {g}, not {w}; the largest is {largest}");
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Plain,
    /// LoRA of this rank.
    Lora(usize),
    /// DoRA of this rank.
    Dora(usize),
}

impl Kind {
    fn rank(self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Lora(r) | Self::Dora(r) => r,
        }
    }
}

#[derive(Clone, Debug)]
pub struct MapCase {
    pub dtype: StorageDType,
    pub n: usize,
    pub kind: Kind,
    pub bias: bool,
}

/// One map's numbers on the host.
struct Numbers {
    host: Host,
    a: Vec<f32>,
    b: Vec<f32>,
    magnitude: Vec<f32>,
    bias: Vec<f32>,
    scale: f32,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub m: usize,
    pub k: usize,
    pub operand: Element,
    pub to: Element,
    pub maps: Vec<MapCase>,
    pub residual: bool,
    /// x is f32, or has the operands' type.
    pub wide_input: bool,
    pub wide_gradients: bool,
    /// dL/dx is wanted.
    pub wanted: bool,
    pub scratch: usize,
}

/// What a device gave: x and dL/dy as it has them, and the results.
pub struct Results {
    x: Matrix,
    dys: Vec<Matrix>,
    ys: Vec<Matrix>,
    saved: Saved,
    gradients: Gradients,
}

impl Case {
    pub fn new(m: usize, k: usize, operand: Element, maps: Vec<MapCase>) -> Self {
        Self {
            m,
            k,
            operand,
            to: operand,
            maps,
            residual: false,
            wide_input: false,
            wide_gradients: true,
            wanted: true,
            scratch: SCRATCH,
        }
    }

    fn numbers(&self) -> Vec<Numbers> {
        let numbers_of = |(p, map): (usize, &MapCase)| {
            let (seed, r, n) = (10 * p as u64, map.kind.rank(), map.n);
            Numbers {
                host: Host::random(map.dtype, n, self.k, true, seed),
                a: numbers(r * self.k, seed + 1),
                b: numbers(n * r, seed + 2),
                magnitude: numbers(n, seed + 3).into_iter().map(|v| v + 2.0).collect(),
                bias: numbers(n, seed + 4),
                scale: 0.5 + p as f32,
            }
        };
        self.maps.iter().enumerate().map(numbers_of).collect()
    }

    fn residual(&self) -> Vec<f32> {
        numbers(self.m * self.maps[0].n, 99)
    }

    /// Forward and backward on a device.
    pub fn run(&self, device: &Device) -> Results {
        let (m, k, operand) = (self.m, self.k, self.operand);
        let compute = Compute { operand, scratch: self.scratch };
        let all = self.numbers();
        let weights: Vec<DeviceWeight> = all.iter().map(|n| n.host.upload(device)).collect();
        let lora_of = |(map, of): (&MapCase, &Numbers)| {
            let magnitude = matches!(map.kind, Kind::Dora(_)).then_some(&of.magnitude[..]);
            let r = map.kind.rank();
            (r > 0).then(|| {
                let lora = DeviceLora::new(device, operand, &of.a, (r, k), &of.b, map.n, of.scale, magnitude);
                lora.unwrap().with_scratch(self.scratch)
            })
        };
        let loras: Vec<Option<DeviceLora>> = self.maps.iter().zip(&all).map(lora_of).collect();
        let bias_of =
            |(map, of): (&MapCase, &Numbers)| map.bias.then(|| device.upload_f32(&of.bias, 1, map.n).unwrap());
        let biases: Vec<Option<Matrix>> = self.maps.iter().zip(&all).map(bias_of).collect();
        let residual = self.residual.then(|| device.upload_f32(&self.residual(), m, self.maps[0].n).unwrap());
        let maps: Vec<Map<'_>> = (0..all.len())
            .map(|p| Map { weight: &weights[p], dequantised: None, bias: biases[p].as_ref(), lora: loras[p].as_ref() })
            .collect();
        let element = |wide| if wide { Element::F32 } else { operand };
        let x = device.upload_as(element(self.wide_input), &numbers(m * k, 77), m, k).unwrap();
        let dy = |(p, map): (usize, &MapCase)| {
            let values = numbers(m * map.n, 500 + p as u64);
            device.upload_as(element(self.wide_gradients), &values, m, map.n).unwrap()
        };
        let dys: Vec<Matrix> = self.maps.iter().enumerate().map(dy).collect();
        let (ys, saved) = forward(&x, &maps, residual.as_ref(), self.to, compute).unwrap();
        let of = dys.iter().collect::<Vec<_>>();
        let gradients = backward(&x, &maps, &saved, &of, self.wanted, compute).unwrap();
        Results { x, dys, ys, saved, gradients }
    }

    /// Runs with and without dL/dx, and compares everything with f64.
    pub fn check(&self, device: &Device) {
        let got = self.run(device);
        let without = Self { wanted: false, ..self.clone() }.run(device);
        assert!(without.gradients.input.is_none());
        let (m, k, operand) = (self.m, self.k, self.operand);
        let name = format!("{self:?}");
        let close = |what: &str, got: &Matrix, want: &[f64]| {
            close(&format!("{what} of {name}"), tolerance(operand), got, want);
        };
        let x = rounded(operand, &wide(&got.x.to_f32().unwrap()));
        let (mut dx, mut offset) = (vec![0.0; m * k], 0);
        let ranks: usize = self.maps.iter().map(|map| map.kind.rank()).sum();
        let z_all = got.saved.z.as_ref().map(|z| z.to_f32().unwrap());
        assert_eq!(z_all.is_some(), ranks > 0);
        for (p, (map, of)) in self.maps.iter().zip(self.numbers()).enumerate() {
            let (n, r, s) = (map.n, map.kind.rank(), f64::from(of.scale));
            let exact = wide(&of.host.values());
            let w = rounded(operand, &exact);
            let (a, b) = (rounded(operand, &wide(&of.a)), rounded(operand, &wide(&of.b)));
            let mut u = product(&x, &transposed(&w, k), m, k, n);
            let mut z = vec![];
            if r > 0 {
                z = product(&x, &transposed(&a, k), m, k, r).into_iter().map(|v| s * v).collect();
                z = rounded(operand, &z);
                product(&z, &transposed(&b, r), m, r, n).iter().zip(&mut u).for_each(|(v, u)| *u += v);
                let rows = z_all.as_ref().unwrap().chunks(ranks);
                let kept: Vec<f64> = rows.flat_map(|row| wide(&row[offset..offset + r])).collect();
                let largest = z.iter().fold(0f64, |a, v| a.max(v.abs()));
                assert!(z.iter().zip(kept).all(|(z, v)| (z - v).abs() <= tolerance(operand) * largest), "z of {name}");
            }
            let dora = matches!(map.kind, Kind::Dora(_));
            let norms = if dora { row_norms(&exact, &wide(&of.a), &wide(&of.b), s, r) } else { vec![1.0; n] };
            let g = |j: usize| if dora { f64::from(of.magnitude[j]) / norms[j] } else { 1.0 };
            let mut y: Vec<f64> = (0..m * n).map(|i| g(i % n) * u[i]).collect();
            if map.bias {
                y.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(of.bias[i % n]));
            }
            if self.residual {
                y.iter_mut().zip(self.residual()).for_each(|(y, v)| *y += f64::from(v));
            }
            assert_eq!((got.ys[p].element(), got.ys[p].rows(), got.ys[p].cols()), (self.to, m, n));
            close("y", &got.ys[p], &y);
            assert_eq!(got.saved.directions[p].is_some(), dora);
            if let Some(direction) = &got.saved.directions[p] {
                close("u", direction, &u);
            }

            let dy = wide(&got.dys[p].to_f32().unwrap());
            let du: Vec<f64> = (0..m * n).map(|i| g(i % n) * dy[i]).collect();
            let du = rounded(operand, &du);
            product(&du, &w, m, n, k).iter().zip(&mut dx).for_each(|(v, dx)| *dx += v);
            for gradients in [&got.gradients, &without.gradients] {
                assert_eq!(gradients.lora[p].is_some(), r > 0);
            }
            if r == 0 {
                continue;
            }
            let dz: Vec<f64> = product(&du, &b, m, n, r).into_iter().map(|v| s * v).collect();
            let dz = rounded(operand, &dz);
            product(&dz, &a, m, r, k).iter().zip(&mut dx).for_each(|(v, dx)| *dx += v);
            for gradients in [&got.gradients, &without.gradients] {
                let branch = gradients.lora[p].as_ref().unwrap();
                assert_eq!((branch.a.rows(), branch.a.cols(), branch.b.rows(), branch.b.cols()), (r, k, n, r));
                let elements = (branch.a.element(), branch.b.element());
                assert_eq!(elements, (Element::F32, Element::F32));
                close("dA", &branch.a, &product(&transposed(&dz, r), &x, r, m, k));
                close("dB", &branch.b, &product(&transposed(&du, n), &z, n, m, r));
                assert_eq!(branch.magnitude.is_some(), dora);
                if let Some(magnitude) = &branch.magnitude {
                    let sum = |j: usize| (0..m).map(|i| dy[i * n + j] * u[i * n + j]).sum::<f64>();
                    close("dm", magnitude, &(0..n).map(|j| sum(j) / norms[j]).collect::<Vec<_>>());
                }
            }
            offset += r;
        }
        let input = got.gradients.input.as_ref().unwrap();
        assert_eq!((input.element(), input.rows(), input.cols()), (Element::F32, m, k));
        close("dx", input, &dx);
    }
}
