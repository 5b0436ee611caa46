//! Inverse frequencies of rotary embeddings, and the scalings that extend them to longer contexts.
//!
//! Source: transformers `modeling_rope_utils.py`; computed in f64, so more exactly than its f32. It does not depend on reading
//! files. Read `ops/rope/mod.rs` next.

use std::f64::consts::PI;

use serde_json::{Value, json};

/// How the inverse frequencies 1 / theta^(2i/d) are changed for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// They are not changed.
    None,
    /// All frequencies are divided by `factor` (arXiv:2306.15595).
    Linear {
        /// New context length over old.
        factor: f64,
    },
    /// Frequencies of long wavelengths are divided by `factor`, those of short ones kept, those between interpolated
    /// (Llama 3.1).
    Llama3 {
        /// Factor by which the longest wavelengths are stretched.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before scaling, in tokens.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv:2309.00071): frequencies of long wavelengths are divided by `factor`, those of short ones kept, with a
    /// linear ramp between; cos and sin are multiplied by `attention_factor`.
    Yarn {
        /// New context length over old.
        factor: f64,
        /// Factor of cos and sin: 0.1 ln(factor) + 1 by default.
        attention_factor: f64,
        /// Rotations over the old context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over the old context below which a frequency is divided by `factor`.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded outwards to whole indices.
        truncate: bool,
        /// Context length before scaling, in tokens.
        original_max_position_embeddings: usize,
    },
    /// Frequency i is divided by the i-th number: how a GGUF file stores Llama 3.1's scaling (`rope_freqs.weight`), and
    /// Phi-3's factors for contexts up to the original length (arXiv:2402.13753).
    Divisors {
        /// One divisor per frequency, (rotary_dim / 2).
        divisors: Vec<f32>,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
}

impl RopeScaling {
    /// Factor of cos and sin.
    pub fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::Divisors { attention_factor, .. } => *attention_factor,
            Self::None | Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
        }
    }

    /// Whether all fields are valid for `dim` rotary dimensions.
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
                    // Index of the frequency with this many rotations over the old context.
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

    /// The scaling as a value of config.json; `None` for divisors that config.json cannot express.
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

/// YaRN's default factor of cos and sin.
pub(crate) fn yarn_attention_factor(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// The llama3 scaling with these divisors, if there is one with the constants of all published models (1, 4, 8192).
fn divisors_as_llama3(divisors: &[f32], theta: f64, dim: usize) -> Option<Value> {
    let (low, high, original) = (1.0, 4.0, 8192);
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let fits = divisors.iter().enumerate().all(|(i, &d)| {
        let plain = theta.powf(-((2 * i) as f64) / dim as f64);
        let want = plain / llama3(plain, factor, low, high, original as f64);
        // llama.cpp computes the divisors in f32 through a cancelling difference, which leaves four digits.
        (f64::from(d) - want).abs() < 1e-3 * want
    });
    fits.then(|| llama3_json(factor, low, high, original))
}

/// Llama 3.1's scaling of one frequency.
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
