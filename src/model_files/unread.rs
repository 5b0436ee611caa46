//! Tensors of a model's files that no part of the decoder reads: what each is, and whether leaving it out changes the model.
//!
//! A base that drops a tensor without a word may compute other numbers than its files say. So a tensor inside a block that the
//! configuration has no place for is refused, the others are listed by `inspect`, and those that are not plainly redundant are
//! reported when the base opens. It does not depend on the file format. Read `load.rs` for what is read.

use std::cell::RefCell;
use std::collections::BTreeSet;

use anyhow::Result;

use super::contents::FileContents;
use super::load::assemble;
use super::tensor_table::StoredForm;
use crate::invalid;
use crate::model::config::DecoderConfig;
use crate::ops::weight::{StorageDType, Weight};

/// What a tensor is that nothing reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The lm_head of a file that also holds the embedding, with the same numbers.
    Copy,
    /// Numbers that follow from the configuration: causal masks, rotary frequencies, position ids.
    Buffer,
    /// A tensor of a block that the configuration's number of layers leaves out.
    BeyondLayers,
    /// A tensor of another part of the model: a vision tower, a scalar head.
    Outside,
    /// A tensor inside a block of the decoder for which the configuration has no place.
    InsideBlock,
}

impl Kind {
    /// What it is, for people.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Copy => "a copy of the embedding, which the lm_head is tied to",
            Self::Buffer => "computed from the configuration",
            Self::BeyondLayers => "of a layer beyond num_hidden_layers",
            Self::Outside => "of no part of the decoder",
            Self::InsideBlock => "inside a block, and the configuration has no place for it",
        }
    }

    fn of(name: &str, config: &DecoderConfig) -> Self {
        /// Ends of the names of buffers that transformers wrote into files in some version.
        const BUFFERS: [&str; 7] =
            ["inv_freq", "attn.bias", "attention.bias", "masked_bias", "cos_cached", "sin_cached", "position_ids"];
        let names = config.names();
        if name == names.output {
            return Self::Copy;
        }
        if BUFFERS.iter().any(|end| name.ends_with(end)) {
            return Self::Buffer;
        }
        let inside = name.strip_prefix(names.blocks).and_then(|rest| rest.strip_prefix('.'));
        let layer = inside.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        match layer {
            Some(layer) if layer >= config.num_hidden_layers => Self::BeyondLayers,
            Some(_) => Self::InsideBlock,
            None => Self::Outside,
        }
    }
}

impl FileContents {
    /// The tensors that no part of the decoder reads, by name.
    ///
    /// # Errors
    /// If one that the decoder needs is missing or of another shape.
    pub(crate) fn unread(&self) -> Result<Vec<(&str, Kind)>> {
        let read = RefCell::new(BTreeSet::new());
        // The decoder is assembled of empty matrices: only the names that it asks for matter.
        let weight = |name: &str, rows: usize, cols: usize| {
            let turned = self.table.tensors.get(name).is_some_and(|stored| stored.form == StoredForm::Transposed);
            self.stored(name, &if turned { [cols, rows] } else { [rows, cols] })?;
            read.borrow_mut().insert(name.to_owned());
            Weight::planned(StorageDType::F32, rows, cols)
        };
        let vector = |name: &str, len: usize| {
            self.stored(name, &[len])?;
            read.borrow_mut().insert(name.to_owned());
            Ok(vec![1.0; len])
        };
        assemble(self.config.clone(), &weight, &vector, String::new())?;
        let read = read.into_inner();
        let names = self.table.tensors.keys().chain(self.table.unread.keys()).map(String::as_str);
        let left = names.filter(|name| !read.contains(*name));
        Ok(left.map(|name| (name, Kind::of(name, &self.config))).collect())
    }

    /// Refuses tensors without which the decoder would compute other numbers than its files say.
    ///
    /// # Errors
    /// If there is one; those of [`FileContents::unread`].
    pub(crate) fn check_unread(&self) -> Result<()> {
        match self.unread()?.iter().find(|(_, kind)| *kind == Kind::InsideBlock) {
            None => Ok(()),
            Some((name, _)) => Err(invalid!(
                "{}: the tensor {name} lies inside a block, and a {} decoder of this configuration has no place for it; \
                 leaving it out would change the model: correct the config.json, or give a model without it",
                self.name,
                self.config.names().model_type
            )),
        }
    }

    /// What a user should know about these files: what was decided against the configuration, and the tensors that are not read
    /// although they are not plainly redundant.
    ///
    /// # Errors
    /// Those of [`FileContents::unread`].
    pub(crate) fn remarks(&self) -> Result<Vec<String>> {
        let mut remarks = self.notes.clone();
        let unread = self.unread()?;
        for kind in [Kind::BeyondLayers, Kind::Outside] {
            let names: Vec<&str> = unread.iter().filter(|(_, k)| *k == kind).map(|(name, _)| *name).collect();
            if let [first, rest @ ..] = &names[..] {
                let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
                remarks.push(format!(
                    "{}: not read: {first}{more}, {}; `fourfold inspect` lists them",
                    self.name,
                    kind.describe()
                ));
            }
        }
        Ok(remarks)
    }
}
