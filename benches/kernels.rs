//! kernels: throughput of the frozen linear layer, forward and backward, beside a plain f32 product of the same size.
//! Prints one JSON line per case, with medians of seven runs: `cargo bench --bench kernels [-- m ...]`, m being the
//! rows of x.

use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use fourfold::device::Array;
use fourfold::ops::linear::{InputGradient, LinearWithLora, LowRank, backward, forward};
use fourfold::ops::weight::{Bytes, ComputeDtype, StorageDType, Weight};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn median(mut run: impl FnMut()) -> f64 {
    run();
    let mut times: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[3]
}

fn main() -> anyhow::Result<()> {
    fourfold::host::keep_freed_memory();
    let args: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let ms = if args.is_empty() { vec![1, 8, 64, 512, 1024] } else { args };
    let dev = &Device::Cpu;
    for &m in &ms {
        for (k, n) in [(576, 1536), (1536, 576)] {
            let w = Tensor::randn(0f32, 0.04, (n, k), dev)?;
            let x = Tensor::randn(0f32, 1.0, (m, k), dev)?;
            let rows = Array::Host(x.clone());
            let dy = Array::Host(Tensor::randn(0f32, 1.0, (m, n), dev)?);
            let (a, b) = (Tensor::randn(0f32, 0.03, (8, k), dev)?, Tensor::randn(0f32, 0.03, (n, 8), dev)?);
            let flops = 2.0 * (m * n * k) as f64;
            let plain = median(|| drop(x.matmul(&w.t().unwrap()).unwrap()));
            let f32_bytes = w.flatten_all()?.to_vec1::<f32>()?;
            for (ggml, stored) in [
                (None, StorageDType::F32),
                (Some(GgmlDType::Q8_0), StorageDType::Q8_0),
                (Some(GgmlDType::Q4_1), StorageDType::Q4_1),
            ] {
                for compute in [ComputeDtype::F32, ComputeDtype::Bf16] {
                    let weight = match ggml {
                        None => Weight::from_f32(&f32_bytes, n, k)?,
                        Some(t) => {
                            Weight::new(Bytes::new(Arc::new(QTensor::quantize(&w, t)?.data()?.to_vec())), stored, n, k)?
                        }
                    };
                    let weight = weight.with_compute(compute);
                    let parts = [LinearWithLora {
                        weight: &weight,
                        dequantised: None,
                        bias: None,
                        lora: Some(LowRank { a: &a, b: &b, scale: 2.0, dora: None, copy: None }),
                    }];
                    let (_, z) = forward(&rows, &parts, None)?;
                    let f = median(|| drop(forward(&rows, &parts, None).unwrap()));
                    let g = median(|| drop(backward(&rows, &parts, &z, &[&dy], InputGradient::Wanted).unwrap()));
                    println!(
                        "{{\"bench\":\"linear/{}_{}/m{m}_k{k}_n{n}_r8_cpu\",\"forward_gflops\":{:.0},\"backward_gflops\":{:.0},\"plain_f32_gflops\":{:.0}}}",
                        stored.name(),
                        if compute == ComputeDtype::F32 { "f32" } else { "bf16" },
                        flops / f / 1e9,
                        flops / g / 1e9,
                        flops / plain / 1e9
                    );
                }
            }
        }
    }
    Ok(())
}
