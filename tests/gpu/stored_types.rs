//! A tiny base in each of the 14 stored types on the emulated machine, against the host in f32.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device as Candle, Tensor};
use fourfold::model::adapter::{TargetModule, TargetModules};
use fourfold::model::base::{Base, Weights};
use fourfold::model::block::{Block, FrozenLinear, Norms, Recompute};
use fourfold::ops::attention::Heads;
use fourfold::ops::norm::Norm;
use fourfold::ops::storage::dtype::StorageDType;
use fourfold::ops::weight::{Bytes, Weight};
use fourfold::rng::SplitMix64;
use serde_json::json;

use crate::parity::{apart, compute};
use crate::world::*;

const WIDTH: usize = 256;
const VOCAB: usize = 80;
/// Layers, query heads, key/value heads.
const SHAPE: (usize, usize, usize) = (2, 4, 2);

const TYPES: [(StorageDType, Option<GgmlDType>); 14] = [
    (StorageDType::F32, Some(GgmlDType::F32)),
    (StorageDType::F16, Some(GgmlDType::F16)),
    (StorageDType::BF16, Some(GgmlDType::BF16)),
    (StorageDType::Q4_0, Some(GgmlDType::Q4_0)),
    (StorageDType::Q4_1, Some(GgmlDType::Q4_1)),
    (StorageDType::Q5_0, Some(GgmlDType::Q5_0)),
    (StorageDType::Q5_1, Some(GgmlDType::Q5_1)),
    (StorageDType::Q8_0, Some(GgmlDType::Q8_0)),
    (StorageDType::Q2K, Some(GgmlDType::Q2K)),
    (StorageDType::Q3K, Some(GgmlDType::Q3K)),
    (StorageDType::Q4K, Some(GgmlDType::Q4K)),
    (StorageDType::Q5K, Some(GgmlDType::Q5K)),
    (StorageDType::Q6K, Some(GgmlDType::Q6K)),
    (StorageDType::NF4, None),
];

fn weight(rng: &mut SplitMix64, rows: usize, cols: usize, stored: StorageDType, ggml: Option<GgmlDType>) -> Weight {
    let values: Vec<f32> = (0..rows * cols).map(|_| (rng.uniform() as f32 - 0.5) * 0.2).collect();
    let Some(ggml) = ggml else { return Weight::from_f32(&values, rows, cols).unwrap().quantised(stored).unwrap() };
    let tensor = Tensor::from_vec(values, (rows, cols), &Candle::Cpu).unwrap();
    let bytes = QTensor::quantize(&tensor, ggml).unwrap().data().unwrap().to_vec();
    Weight::new(Bytes::new(Arc::new(bytes)), stored, rows, cols).unwrap()
}

fn base(stored: StorageDType, ggml: Option<GgmlDType>) -> Base {
    let (layers, q, kv) = SHAPE;
    let dim = WIDTH / q;
    let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
        "intermediate_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": q, "num_key_value_heads": kv,
        "head_dim": dim, "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false});
    let config = fourfold::model::config::DecoderConfig::from_hf(&config.to_string(), None, "tiny").unwrap();
    let mut rng = SplitMix64::new(17);
    let mut make = |rows: usize, cols: usize| weight(&mut rng, rows, cols, stored, ggml);
    let norm = || Some(Norm::rms((0..WIDTH).map(|i| 0.8 + (i % 5) as f32 * 0.1).collect(), 1e-5));
    let (embedding, output) = (make(VOCAB, WIDTH), make(VOCAB, WIDTH));
    let blocks = (0..layers).map(|_| Block {
        linears: [q * dim, kv * dim, kv * dim, WIDTH, WIDTH, WIDTH, WIDTH]
            .map(|rows| FrozenLinear { weight: make(rows, WIDTH), bias: None })
            .into(),
        attention_norms: Norms { before: norm(), ..Norms::default() },
        mlp_norms: Norms { before: norm(), ..Norms::default() },
        qk_norms: None,
        heads: Heads::full(q, kv, dim),
        rotation: Some(0),
    });
    let blocks = blocks.collect();
    let weights = Weights { embedding, positions: None, projections: None, blocks, norm: norm(), output: Some(output) };
    Base::from_parts(config, weights, stored.name().into()).unwrap()
}

#[test]
fn every_stored_type_computes_the_same_as_on_the_host() {
    let Some(device) = emulated() else { return };
    let _time = timed("the stored types");
    let sequences: Vec<Vec<u32>> =
        [21u32, 4].iter().map(|&n| (0..n).map(|i| (i * 29 + n) % VOCAB as u32).collect()).collect();
    let mut worst = (0f32, "");
    for (stored, ggml) in TYPES {
        let host = base(stored, ggml);
        assert_eq!(host.matrix(TargetModule::Block { layer: 1, linear: 6 }).unwrap().dtype(), stored);
        let there = on(base(stored, ggml), &device);
        let adapter = adapter(&host, TargetModules::AllLinear, 2, 5);
        let want = compute(&host, &adapter, &sequences, Recompute::Off);
        let got = compute(&there, &adapter, &sequences, Recompute::Mlp);
        let (e, what) = apart(&got, &want);
        assert!(e < 1e-4, "{}: {what} differs by {e:.1e}", stored.name());
        if e > worst.0 {
            worst = (e, stored.name());
        }
    }
    say(&format!("stored types: the largest difference is {:.1e} ({})", worst.0, worst.1));
}
