//! Frozen linear layers with LoRA: several that read the same input (q, k, v; gate, up) are one group. Formula, checks,
//! dispatch.
//!
//! y_p = x W_p^T + s_p (x A_p^T) B_p^T [+ bias_p] [+ residual]. Saved for backward: x and z = s x A^T. With DoRA, the
//! sum of both products is scaled before bias and residual are added; see `low_rank.rs`. It does not depend on names of
//! layers. Read `low_rank.rs` and `cpu.rs` beside it, then `embedding/mod.rs`.

mod cpu;
pub(crate) mod cpu_bf16;
pub(crate) mod cpu_gemv;
pub mod gpu;
pub mod gpu_gemv;
pub mod gpu_low_rank;
pub mod gpu_strips;
pub mod low_rank;

use anyhow::{Result, bail};
use candle_core::Tensor;

use std::sync::Arc;

use crate::device::{Array, Device, Element, Matrix, Resident};
use crate::ops::storage::gpu::DeviceWeight;

use crate::ops::linear::low_rank::Dora;
pub use crate::ops::linear::low_rank::{BranchGradient, LowRank};
use crate::ops::weight::Weight;

/// One frozen linear layer of a group that shares its input.
#[derive(Clone, Copy)]
pub struct LinearWithLora<'a> {
    /// W, (out, in), as stored.
    pub weight: &'a Weight,
    /// On a device, where W's numbers are found or left, for passes that dequantise ahead or keep what they dequantised.
    pub dequantised: Option<gpu::Dequantised<'a, Weight>>,
    /// b, (out), if the layer has one. It is frozen and has no gradient.
    pub bias: Option<&'a Bias>,
    /// LoRA weights, if the role's adapter has them here.
    pub lora: Option<LowRank<'a>>,
}

impl<'a> LinearWithLora<'a> {
    fn rank(&self) -> usize {
        self.lora.map_or(0, |l| l.a.dims()[0])
    }

    fn dora(&self) -> Option<(LowRank<'a>, Dora<'a>)> {
        self.lora.and_then(|l| l.dora.map(|d| (l, d)))
    }
}

/// The bias of a linear layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bias {
    /// b (out).
    pub values: Vec<f32>,
    copy: Resident<Matrix>,
}

impl From<Vec<f32>> for Bias {
    fn from(values: Vec<f32>) -> Self {
        Self { values, copy: Resident::default() }
    }
}

impl Bias {
    fn on(&self, device: &Device) -> Result<Arc<Matrix>> {
        self.copy.on(device, || device.upload_f32(&self.values, 1, self.values.len()))
    }
}

/// Tensors saved for `backward`, apart from x.
pub enum Saved {
    /// Tensors on the host.
    Host(HostSaved),
    /// Matrices on a device.
    Device(gpu::Saved),
}

/// Tensors on the host that are saved for `backward`.
pub struct HostSaved {
    /// s x A^T of all parts side by side: (N, sum of ranks).
    z: Tensor,
    /// The output of each part with DoRA, before its scale: (N, out).
    directions: Vec<Option<Tensor>>,
}

/// Gradients of a group.
pub struct Gradients {
    /// dL/dx (N, in); `None` if it was not requested.
    pub input: Option<Array>,
    /// LoRA gradients, one element per part.
    pub lora: Vec<Option<BranchGradient>>,
}

/// Whether anything below the group needs a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    /// dL/dx is computed.
    Wanted,
    /// Only the LoRA gradients are computed: nothing below the group is trained.
    Unused,
}

/// Outputs (N, out_p) of each part, and the tensors saved for `backward`.
///
/// x: (N, in). With `residual` (N, out), which requires a single part: y = residual + ...
///
/// # Errors
/// If shapes do not fit.
pub fn forward(x: &Array, parts: &[LinearWithLora<'_>], residual: Option<&Array>) -> Result<(Vec<Array>, Saved)> {
    let (m, k) = x.dims2()?;
    check(k, parts)?;
    if let Some(residual) = residual {
        let shape = residual.dims2()?;
        if parts.len() != 1 || shape != (m, parts[0].weight.rows()) {
            bail!("a residual {shape:?} for {} parts", parts.len());
        }
    }
    Ok(match x {
        Array::Host(x) => {
            let (ys, saved) = cpu::forward(x, parts, residual.map(Array::host).transpose()?)?;
            (ys.into_iter().map(Array::Host).collect(), Saved::Host(saved))
        }
        Array::Device(x) => {
            // A residual is f32, and so is the sum that it is part of.
            let to = if residual.is_some() { Element::F32 } else { operand(parts) };
            let (ys, saved) = on_device(x, parts, residual.map(Array::device).transpose()?, to)?;
            (ys.into_iter().map(Array::Device).collect(), Saved::Device(saved))
        }
    })
}

/// The tensors that [`forward`] saves, without the outputs, for parts without DoRA: x is (N, in).
///
/// # Errors
/// If shapes do not fit, or a part has DoRA, whose backward needs an output.
pub fn saved_alone(x: &Array, parts: &[LinearWithLora<'_>]) -> Result<Saved> {
    check(x.dims2()?.1, parts)?;
    if parts.iter().any(|part| part.dora().is_some()) {
        bail!("DoRA's backward needs the outputs of its forward");
    }
    Ok(match x {
        Array::Host(x) => Saved::Host(cpu::saved_alone(x, parts)?),
        Array::Device(x) => {
            Saved::Device(gpu::saved_alone(x, &Copies::of(x, parts)?.maps(), gpu::Compute::new(operand(parts)))?)
        }
    })
}

/// The element type of a device's products.
fn operand(parts: &[LinearWithLora<'_>]) -> Element {
    parts.first().map_or(Element::F32, |p| p.weight.compute().element())
}

/// The outputs of a group on a device in element type `to`.
pub(crate) fn on_device(
    x: &Matrix,
    parts: &[LinearWithLora<'_>],
    residual: Option<&Matrix>,
    to: Element,
) -> Result<(Vec<Matrix>, gpu::Saved)> {
    let copies = Copies::of(x, parts)?;
    gpu::forward(x, &copies.maps(), residual, to, gpu::Compute::new(operand(parts)))
}

/// A group's weights, biases and LoRA weights on a device.
struct Copies<'a> {
    weights: Vec<Arc<DeviceWeight>>,
    dequantised: Vec<Option<gpu::Dequantised<'a, Weight>>>,
    /// The weights that products after each begin with.
    next: Vec<Option<Arc<DeviceWeight>>>,
    biases: Vec<Option<Arc<Matrix>>>,
    lora: Vec<Option<Arc<gpu::DeviceLora>>>,
}

impl<'a> Copies<'a> {
    fn of(x: &Matrix, parts: &[LinearWithLora<'a>]) -> Result<Self> {
        let (device, operand) = (x.device(), operand(parts));
        let dequantised: Vec<_> = parts.iter().map(|part| part.dequantised).collect();
        let (mut weights, mut next, mut biases, mut lora) = (vec![], vec![], vec![], vec![]);
        for part in parts {
            weights.push(part.weight.on(device)?);
            next.push(part.dequantised.and_then(|it| it.next).map(|(weight, _)| weight.on(device)).transpose()?);
            biases.push(part.bias.map(|bias| bias.on(device)).transpose()?);
            lora.push(part.lora.map(|lora| lora.on(device, operand)).transpose()?);
        }
        Ok(Self { weights, dequantised, next, biases, lora })
    }

    fn maps(&self) -> Vec<gpu::Map<'_>> {
        let dequantised = |i: usize| {
            let gpu::Dequantised { numbers, keeps, next } = self.dequantised[i]?;
            let next = self.next[i].as_deref().zip(next.map(|(_, numbers)| numbers));
            Some(gpu::Dequantised { numbers, keeps, next })
        };
        let map = |i: usize| gpu::Map {
            weight: &self.weights[i],
            dequantised: dequantised(i),
            bias: self.biases[i].as_deref(),
            lora: self.lora[i].as_deref(),
        };
        (0..self.weights.len()).map(map).collect()
    }
}

/// dx = sum_p dy_p W_p + s (dy_p B_p) A_p;  dB_p = dy_p^T z_p;  dA_p = (s dy_p B_p)^T x.
///
/// x (N, in) and `saved` are the input and the result of `forward`; dys: (N, out_p) each. With DoRA, dy is first scaled
/// as y was.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(
    x: &Array,
    parts: &[LinearWithLora<'_>],
    saved: &Saved,
    dys: &[&Array],
    wanted: InputGradient,
) -> Result<Gradients> {
    let (m, k) = x.dims2()?;
    check(k, parts)?;
    if dys.len() != parts.len() {
        bail!("{} gradients for {} parts", dys.len(), parts.len());
    }
    for (p, dy) in parts.iter().zip(dys) {
        if dy.dims2()? != (m, p.weight.rows()) {
            bail!("a gradient {:?} for an output ({m}, {})", dy.dims2()?, p.weight.rows());
        }
    }
    match (x, saved) {
        (Array::Host(x), Saved::Host(saved)) => {
            let rank: usize = parts.iter().map(LinearWithLora::rank).sum();
            if saved.z.dims() != [m, rank] || saved.directions.len() != parts.len() {
                bail!("z {:?} for {} parts of rank {rank}", saved.z.dims(), parts.len());
            }
            let dys = dys.iter().map(|dy| dy.host()).collect::<Result<Vec<_>>>()?;
            Ok(cpu::backward(x, parts, saved, &dys, wanted)?)
        }
        (Array::Device(x), Saved::Device(saved)) => {
            let dys = dys.iter().map(|dy| dy.device()).collect::<Result<Vec<_>>>()?;
            let (copies, compute) = (Copies::of(x, parts)?, gpu::Compute::new(operand(parts)));
            let wanted = wanted == InputGradient::Wanted;
            let g = gpu::backward(x, &copies.maps(), saved, &dys, wanted, compute)?;
            let lora = g.lora.into_iter().map(|g| g.map(BranchGradient::from)).collect();
            Ok(Gradients { input: g.input.map(Array::Device), lora })
        }
        _ => bail!("the input and the saved tensors of a linear group lie on two machines"),
    }
}

fn check(k: usize, parts: &[LinearWithLora<'_>]) -> Result<()> {
    for p in parts {
        let n = p.weight.rows();
        if p.weight.cols() != k {
            bail!("an input of width {k} for a ({n}, {}) matrix", p.weight.cols());
        }
        if let Some(bias) = p.bias.filter(|b| b.values.len() != n) {
            bail!("a bias of {} numbers for {n} outputs", bias.values.len());
        }
        if let Some(l) = p.lora {
            let r = l.a.dims()[0];
            if l.a.dims() != [r, k] || l.b.dims() != [n, r] {
                bail!("A {:?} and B {:?} do not fit a ({n}, {k}) matrix", l.a.dims(), l.b.dims());
            }
        }
    }
    Ok(())
}
