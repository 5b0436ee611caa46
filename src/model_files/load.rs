//! Opened model files -> the frozen [`Base`]: which tensor of the files becomes which weight of the decoder.
//!
//! Matrices stay as they are stored; norms and biases become f32. It does not depend on the file format: `files.rs` returns
//! every tensor under its Hugging Face name. Read `model/base.rs` next.

use std::cell::RefCell;

use anyhow::Result;

use crate::model::base::{Base, Weights};
use crate::model::block::{Block, FrozenLinear, Norms};
use crate::model::config::{DecoderConfig, NormStyle, PROJECT_IN, PROJECT_OUT, Placement};
use crate::model_files::files::ModelFiles;
use crate::ops::linear::Bias;
use crate::ops::norm::{Norm, NormKind};
use crate::ops::weight::Weight;
use crate::report::progress::{Progress, Unit};

impl ModelFiles {
    /// The frozen base: matrices as the files store them, norms and biases in f32.
    ///
    /// # Errors
    /// If a tensor is missing, of another shape than the configuration says, or of a type that cannot be unpacked; if a block
    /// has one that the configuration has no place for.
    pub fn base(&self) -> Result<Base> {
        self.contents().check_unread()?;
        // Mapped files open at once; what is quantised or turned on the way takes its time.
        let what = if self.is_quantising() { "quantising" } else { "loading" };
        let weights: usize = self
            .contents()
            .tensors()
            .filter(|(_, shape, _)| shape.len() > 1)
            .map(|(_, shape, _)| shape.iter().product::<usize>())
            .sum();
        let progress = RefCell::new(Progress::new(what, weights, Unit::Of("weight")));
        let weight = |name: &str, rows: usize, cols: usize| {
            let weight = self.weight(name, rows, cols);
            progress.borrow_mut().add(rows * cols);
            weight
        };
        let base = assemble(self.config().clone(), &weight, &|name, len| self.vector(name, len), self.fingerprint())?;
        progress.into_inner().finish();
        Ok(base)
    }
}

/// Returns the (rows, cols) matrix of a Hugging Face name.
pub type FindWeight<'f> = dyn Fn(&str, usize, usize) -> Result<Weight> + 'f;
/// Returns the vector of a Hugging Face name and length.
pub type FindVector<'f> = dyn Fn(&str, usize) -> Result<Vec<f32>> + 'f;

/// A base of the matrices and vectors that `weight` and `vector` return: a file's, a plan's, or made ones.
///
/// # Errors
/// Those of `weight` and `vector`; if a shape is not the configuration's.
pub fn assemble(
    config: DecoderConfig,
    weight: &FindWeight<'_>,
    vector: &FindVector<'_>,
    fingerprint: String,
) -> Result<Base> {
    let (shapes, names, biases) = (config.shapes(), config.names(), config.has_bias());
    let (d, e, vocab) = (config.hidden_size, config.embedding_width, config.vocab_size);
    let norm = |path: &str, len: usize| -> Result<Norm> {
        let mut weight = vector(&format!("{path}.weight"), len)?;
        let kind = match config.norm {
            NormStyle::Rms => NormKind::Rms,
            NormStyle::RmsPlusOne => {
                weight.iter_mut().for_each(|w| *w += 1.0);
                NormKind::Rms
            }
            NormStyle::Layer => NormKind::Layer { bias: vector(&format!("{path}.bias"), len)? },
        };
        Ok(Norm::new(weight, kind, config.norm_eps))
    };
    let blocks = (0..config.num_hidden_layers)
        .map(|layer| {
            let path = |part: &str| format!("{}.{layer}.{part}", names.blocks);
            let linears = shapes.linears().iter().zip(&biases).map(|(map, &biased)| {
                let weight = weight(&path(&format!("{}.weight", map.path)), map.out_features, map.in_features)?;
                let bias = biased
                    .then(|| vector(&path(&format!("{}.bias", map.path)), map.out_features))
                    .transpose()?
                    .map(Bias::from);
                Ok(FrozenLinear { weight, bias })
            });
            let named = |i: usize| {
                let name = names.norms[i];
                (!name.is_empty()).then(|| norm(&path(name), d)).transpose()
            };
            let norms = |i: usize| -> Result<Norms> {
                let (first, inner) = (named(i)?, named(i + 1)?);
                Ok(match config.placement {
                    Placement::AfterSum => Norms { before: None, inner, after: first },
                    _ => Norms { before: first, inner, after: None },
                })
            };
            let widths = config.qk_norm_widths();
            let qk_norms = widths
                .map(|[q, k]| {
                    Ok::<_, anyhow::Error>([norm(&path("self_attn.q_norm"), q)?, norm(&path("self_attn.k_norm"), k)?])
                })
                .transpose()?;
            Ok(Block {
                linears: linears.collect::<Result<_>>()?,
                attention_norms: norms(0)?,
                mlp_norms: norms(2)?,
                qk_norms,
                heads: config.heads(layer),
                rotation: config.rotation(layer),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let positions =
        config.learned_positions.map(|first| weight(names.positions, first + config.max_position_embeddings, d));
    let projections = (d != e).then(|| Ok::<_, anyhow::Error>([weight(PROJECT_IN, d, e)?, weight(PROJECT_OUT, e, d)?]));
    let weights = Weights {
        embedding: weight(names.embedding, vocab, e)?,
        positions: positions.transpose()?,
        projections: projections.transpose()?,
        blocks,
        norm: config.final_norm.then(|| norm(names.final_norm, d)).transpose()?,
        output: match config.tie_word_embeddings {
            true => None,
            false => Some(weight(names.output, vocab, e)?),
        },
    };
    Base::from_parts(config, weights, fingerprint)
}
