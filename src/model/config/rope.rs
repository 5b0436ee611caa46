//! Rotary frequencies, and how each scaling changes them to reach longer contexts. Pure; knows no file.
//! Source: transformers `modeling_rope_utils.py`; computed in f64, so the last bits are better than its f32.

use std::f64::consts::PI;

use serde_json::{Value, json};

/// How the rotary frequencies 1 / theta^(2i/d) are changed to reach longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by `factor` (arXiv:2306.15595).
    Linear {
        /// New context over old.
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// What the longest wavelengths are stretched by.
        factor: f64,
        /// Wavelengths past `original_max_position_embeddings / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before the stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a ramp between, and cos and sin multiplied by
    /// `attention_factor` (arXiv:2309.00071).
    Yarn {
        /// New context over old.
        factor: f64,
        /// cos and sin are multiplied by it: 0.1 ln(factor) + 1 where a file does not say.
        attention_factor: f64,
        /// Turns over the old context from which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided in full.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole frequencies.
        truncate: bool,
        /// Context length before the stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// Frequency i divided by the i-th number: what a GGUF keeps of Llama 3.1's kind (`rope_freqs.weight`), and
    /// Phi-3's factors for contexts up to the original length (arXiv:2402.13753).
    Divisors {
        /// (rotary_dim / 2).
        divisors: Vec<f32>,
        /// cos and sin are multiplied by it.
        attention_factor: f64,
    },
}

impl RopeScaling {
    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::Divisors { attention_factor, .. } => *attention_factor,
            Self::None | Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
        }
    }

    /// Whether every number can be used with `dim` rotary dimensions.
    pub(super) fn is_usable(&self, dim: usize) -> bool {
        let positive = |x: &f64| *x > 0.0 && x.is_finite();
        match self {
            Self::None => true,
            Self::Linear { factor } => positive(factor),
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => [factor, low, high].into_iter().all(positive) && high > low && *original > 0,
            Self::Yarn {
                factor,
                attention_factor,
                beta_fast: fast,
                beta_slow: slow,
                truncate: _,
                original_max_position_embeddings: original,
            } => [factor, attention_factor, fast, slow].into_iter().all(positive) && fast >= slow && *original > 0,
            Self::Divisors { divisors, attention_factor } => {
                divisors.len() == dim / 2
                    && divisors.iter().all(|&x| positive(&f64::from(x)))
                    && positive(attention_factor)
            }
        }
    }

    /// Inverse frequencies, radians per position, (dim / 2): 1 / theta^(2i / dim), scaled.
    pub(super) fn inv_freq(&self, theta: f64, dim: usize) -> Vec<f32> {
        let plain = |i: usize| theta.powf(-((2 * i) as f64) / dim as f64);
        (0..dim / 2)
            .map(|i| match self {
                Self::None => plain(i),
                Self::Linear { factor } => plain(i) / factor,
                Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                    let original = *original_max_position_embeddings as f64;
                    llama3(plain(i), *factor, *low_freq_factor, *high_freq_factor, original)
                }
                Self::Yarn { factor, beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } => {
                    // The frequency that makes so many turns over the old context.
                    let at = |turns: f64| {
                        let wavelength = *original_max_position_embeddings as f64 / (turns * 2.0 * PI);
                        dim as f64 * wavelength.ln() / (2.0 * theta.ln())
                    };
                    let (low, high) = (at(*beta_fast), at(*beta_slow));
                    let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                    let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                    let span = if low == high { 0.001 } else { high - low };
                    let divided = ((i as f64 - low) / span).clamp(0.0, 1.0);
                    plain(i) / factor * divided + plain(i) * (1.0 - divided)
                }
                Self::Divisors { divisors, .. } => plain(i) / f64::from(divisors[i]),
            } as f32)
            .collect()
    }

    /// As config.json writes it; `None` for divisors that no config.json can express.
    pub(super) fn to_json(&self, theta: f64, dim: usize) -> Option<Value> {
        Some(match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "type": "linear", "factor": factor}),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                llama3_json(*factor, *low_freq_factor, *high_freq_factor, *original_max_position_embeddings)
            }
            Self::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings,
            } => {
                json!({
                    "rope_type": "yarn",
                    "factor": factor,
                    "attention_factor": attention_factor,
                    "beta_fast": beta_fast,
                    "beta_slow": beta_slow,
                    "truncate": truncate,
                    "original_max_position_embeddings": original_max_position_embeddings,
                })
            }
            Self::Divisors { divisors, .. } => divisors_as_llama3(divisors, theta, dim)?,
        })
    }
}

/// Yarn's factor of cos and sin where a file does not say.
pub(crate) fn yarn_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// The llama3 scaling whose divisors these are, with the constants every published model uses (1, 4, 8192).
fn divisors_as_llama3(divisors: &[f32], theta: f64, dim: usize) -> Option<Value> {
    let (low, high, original) = (1.0, 4.0, 8192);
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let fits = divisors.iter().enumerate().all(|(i, &d)| {
        let plain = theta.powf(-((2 * i) as f64) / dim as f64);
        let want = plain / llama3(plain, factor, low, high, original as f64);
        // llama.cpp computes the divisors in f32 through a cancelling difference: four digits are what is left.
        (f64::from(d) - want).abs() < 1e-3 * want
    });
    fits.then(|| llama3_json(factor, low, high, original))
}

/// Llama 3.1's stretch of one frequency.
fn llama3(freq: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / freq;
    if wavelength < original / high {
        freq
    } else if wavelength > original / low {
        freq / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * freq / factor + smooth * freq
    }
}

fn llama3_json(factor: f64, low: f64, high: f64, original: usize) -> Value {
    json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    })
}
