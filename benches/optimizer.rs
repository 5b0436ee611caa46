//! optimizer: what the host does between two passes of a large model: sums of micro-batches' gradients, their norm, and one
//! AdamW step of an adapter. `cargo bench --bench optimizer [-- layers]`, 32 layers of a 7B shape with r = 16 by default: 40
//! million parameters. Prints one JSON line per part, medians of seven runs.

use std::time::Instant;

use candle_core::{Device, Tensor};
use fourfold::model::adapter::{Adapter, Gradients, LinearShapes, LoraConfig};
use fourfold::model::config::DecoderConfig;
use fourfold::train::adamw::AdamWConfig;
use fourfold::train::learner::Learner;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn report(part: &str, parameters: usize, mut run: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<()> {
    run()?;
    let mut seconds = (0..7).map(|_| run()).collect::<anyhow::Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    let (median, least) = (seconds[3], seconds[0]);
    println!(
        "{{\"bench\":\"optimizer/{part}\",\"parameters\":{parameters},\"seconds\":{median:.4},\"min\":{least:.4}}}"
    );
    Ok(())
}

fn timed<T>(run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn main() -> anyhow::Result<()> {
    fourfold::host::keep_freed_memory();
    let layers = std::env::args().find_map(|a| a.parse().ok()).unwrap_or(32);
    let config = DecoderConfig::from_hf(
        &serde_json::json!({
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false
        })
        .to_string(),
        None,
        "the bench",
    )?;
    let shapes: LinearShapes = config.shapes();
    let lora = LoraConfig { r: 16, lora_alpha: 32.0, ..LoraConfig::default() };
    let adapter = Adapter::init(lora, shapes, 0)?;
    let gradients = || -> anyhow::Result<Gradients> {
        let mut all = Gradients::none(layers);
        for (branches, pairs) in all.layers.iter_mut().zip(adapter.layers()) {
            for (branch, pair) in branches.iter_mut().zip(pairs) {
                let Some(pair) = pair else { continue };
                let like = |t: &Tensor| Tensor::randn(0f32, 1e-3, t.shape(), &Device::Cpu);
                *branch = Some((like(&pair.a)?, like(&pair.b)?).into());
            }
        }
        Ok(all)
    };
    let mut learner = Learner::new(adapter.to_trainable(), AdamWConfig::default(), 1.0)?;
    let parameters = learner.weights().parameters()?.iter().map(Tensor::elem_count).sum();
    let (one, other) = (gradients()?, gradients()?);
    report("sum_of_two_micro_batches", parameters, || {
        let (mut sum, other) = (one.clone(), other.clone());
        timed(|| sum.add(other))
    })?;
    report("scale", parameters, || {
        let mut one = one.clone();
        timed(|| one.scale(0.5))
    })?;
    report("clipped_step", parameters, || {
        let one = one.clone();
        timed(|| learner.step(one, 1e-6))
    })
}
