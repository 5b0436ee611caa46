//! Bases of a known size with random weights, for measurements: no file is read and none written. The rows of a matrix repeat
//! a few quantised ones, so that a base of 7 billion numbers is made in seconds. It does not depend on devices. Read `mod.rs`
//! beside it next.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::invalid;
use crate::model::base::Base;
use crate::model::config::DecoderConfig;
use crate::model_files::assemble;
use crate::ops::weight::{Bytes, StorageDType, Weight};
use crate::rng::SplitMix64;

/// Rows that are drawn and encoded; the others are the same again.
const DISTINCT_ROWS: usize = 64;

/// (name, hidden, mlp, layers, heads, key-value heads, width of a head, vocabulary, tied lm_head) of the shapes that have a name.
type Shape = (&'static str, usize, usize, usize, usize, usize, usize, usize, bool);
const SHAPES: [Shape; 5] = [
    ("tiny", 256, 512, 2, 4, 2, 64, 512, true),
    ("135m", 576, 1536, 30, 9, 3, 64, 49152, true),
    ("1b", 2048, 8192, 16, 32, 8, 64, 128_256, true),
    ("7b", 4096, 11008, 32, 32, 32, 128, 32000, false),
    ("8b", 4096, 14336, 32, 32, 8, 128, 128_256, false),
];

/// The names that [`config`] knows, with the model of that shape.
pub const NAMES: &str = "135m (SmolLM2), 1b (Llama 3.2), 7b (Llama 2), 8b (Llama 3.1), tiny, or a config.json";

/// The configuration of a named shape, or of a config.json.
///
/// # Errors
/// If it is neither.
pub fn config(named: &str) -> Result<DecoderConfig> {
    let known = SHAPES.iter().find(|(name, ..)| *name == named);
    let text = match known {
        Some(shape) => of_shape(*shape).to_string(),
        None if named.ends_with(".json") => {
            std::fs::read_to_string(named).map_err(|error| invalid!("{named}: {error}"))?
        }
        None => return Err(invalid!("{named} is no shape; take one of {NAMES}")),
    };
    DecoderConfig::from_hf(&text, None, named)
}

fn of_shape((_, hidden, mlp, layers, heads, kv, head, vocab, tied): Shape) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 65536, "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head,
        "vocab_size": vocab, "tie_word_embeddings": tied,
    })
}

/// A base of these shapes with random weights of standard deviation 1 / sqrt(columns), and norms of ones. Matrices whose rows
/// are no whole number of blocks of `stored` get q8_0, or bf16 where that fits no better.
///
/// # Errors
/// If `stored` is not written by this program.
pub fn base(config: DecoderConfig, stored: StorageDType) -> Result<Base> {
    let made: RefCell<HashMap<(usize, usize), (StorageDType, Bytes)>> = RefCell::default();
    let weight = |_: &str, rows: usize, cols: usize| -> Result<Weight> {
        if let Some((dtype, bytes)) = made.borrow().get(&(rows, cols)) {
            return Weight::new(bytes.clone(), *dtype, rows, cols);
        }
        let fits = |dtype: &StorageDType| cols.is_multiple_of(dtype.block().0);
        let dtype = [stored, StorageDType::Q8_0].into_iter().find(fits).unwrap_or(StorageDType::BF16);
        let bytes = Bytes::new(Arc::new(tiled(dtype, rows, cols)?));
        made.borrow_mut().insert((rows, cols), (dtype, bytes.clone()));
        Weight::new(bytes, dtype, rows, cols)
    };
    assemble(config, &weight, &|_, len| Ok(vec![1.0; len]), format!("random weights in {}", stored.name()))
}

fn tiled(dtype: StorageDType, rows: usize, cols: usize) -> Result<Vec<u8>> {
    let distinct = rows.min(DISTINCT_ROWS);
    let (mut rng, scale) = (SplitMix64::new((rows * 31 + cols) as u64), (12.0 / cols as f64).sqrt());
    let values: Vec<f32> = (0..distinct * cols).map(|_| ((rng.uniform() - 0.5) * scale) as f32).collect();
    let few = Weight::from_f32(&values, distinct, cols)?.quantised(dtype)?;
    let row = dtype.bytes_for(cols).context("a row of whole blocks")?;
    let mut all = few.bytes().repeat(rows / distinct);
    all.extend_from_slice(&few.bytes()[..rows % distinct * row]);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_parameters_of_their_models() {
        let parameters = |name: &str| {
            let base = base(config(name).unwrap(), StorageDType::Q4K).unwrap();
            base.weights().iter().map(|(_, w)| w.rows() * w.cols()).sum::<usize>()
        };
        // Published: 134,515,008 with 30 x 2 + 1 norms of 576.
        assert_eq!(parameters("135m"), 134_515_008 - 61 * 576);
        assert_eq!(parameters("1b"), 1_235_814_400 - 33 * 2048);
    }

    #[test]
    fn weights_have_the_asked_deviation_in_a_type_that_their_rows_fit() {
        let base = base(config("135m").unwrap(), StorageDType::Q4K).unwrap();
        for (name, weight) in base.weights() {
            // 576 is no multiple of a super-block of 256.
            let want = if weight.cols() == 576 { StorageDType::Q8_0 } else { StorageDType::Q4K };
            assert_eq!(weight.dtype(), want, "{name}");
        }
        let (_, weight) = &base.weights()[1];
        let values = weight.to_f32();
        let square = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        assert!((square * weight.cols() as f64 - 1.0).abs() < 0.02, "{square}");
        assert_eq!(values[..weight.cols()], values[DISTINCT_ROWS * weight.cols()..][..weight.cols()]);
    }

    #[test]
    fn what_is_no_shape_is_refused_with_those_that_are() {
        for (named, says) in [("70b", "135m (SmolLM2)"), ("/nope/config.json", "/nope/config.json: ")] {
            let text = format!("{:#}", config(named).unwrap_err());
            assert!(text.contains(says), "{text}");
        }
    }
}
