//! Models that are split over several GGUF files: the names of the parts, and the joining of their tensor tables.
//!
//! llama.cpp's `llama-gguf-split` and converter write `NAME-00001-of-00003.gguf` and so on. Each part holds some of the tensors
//! and the keys `split.no` (from 0), `split.count` and `split.tensors.count`; the first holds all other metadata. It does not
//! depend on what the tensors are for. Read `../gguf.rs` first.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Gguf;
use crate::invalid;
use crate::model_files::tensor_table::map;

/// The most parts that a name can number.
pub(crate) const MAX_PARTS: usize = 99_999;

/// The name of one part of a split model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    /// What the names of all parts begin with.
    prefix: &'a str,
    /// Number of the part, from 1.
    number: usize,
    /// Number of parts.
    count: usize,
}

impl<'a> PartName<'a> {
    /// Parses `NAME-00001-of-00003.gguf`; `None` for any other name.
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let five = |digits: &str| {
            let plain = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| digits.parse::<usize>().ok()).flatten()
        };
        let name = Self { prefix, number: five(number)?, count: five(count)? };
        (1..=name.count).contains(&name.number).then_some(name)
    }

    /// The name of the part of this number, from 1.
    pub(crate) fn of(prefix: &str, number: usize, count: usize) -> String {
        format!("{prefix}-{number:05}-of-{count:05}.gguf")
    }

    /// Whether `other` names a part of the same model.
    #[cfg(feature = "hub")]
    pub(crate) fn is_beside(&self, other: &str) -> bool {
        PartName::parse(other).is_some_and(|o| o.prefix == self.prefix && o.count == self.count)
    }
}

/// The whole model whose part `opened` is: that part if it is not split, otherwise all parts, read from the same folder.
///
/// # Errors
/// If the file is not named as a part, a part is missing or belongs elsewhere, or two parts hold one tensor.
pub(super) fn join(opened: Gguf, path: &Path) -> Result<Gguf> {
    let file = opened.name.clone();
    let count = opened.unsigned("split.count")?.unwrap_or(0);
    if count < 2 {
        return Ok(Gguf { files: vec![path.to_owned()], ..opened });
    }
    let name = path.file_name().and_then(|name| name.to_str()).and_then(PartName::parse);
    let Some(name) = name.filter(|name| name.count as u64 == count) else {
        return Err(invalid!(
            "{file} is one of the {count} files of a split model, and its name does not end in -00001-of-{count:05}.gguf; \
             give all parts the names that they were made with"
        ));
    };
    let mut whole: Option<Gguf> = None;
    for number in 1..=name.count {
        let at: PathBuf = path.with_file_name(PartName::of(name.prefix, number, name.count));
        let shown = at.display().to_string();
        if !at.is_file() {
            return Err(invalid!("{file}: part {number} of {count} is missing: there is no {shown}; fetch it"));
        }
        let part = Gguf::parse(map(&at)?, &shown)?;
        if part.unsigned("split.no")? != Some(number as u64 - 1) || part.unsigned("split.count")? != Some(count) {
            return Err(invalid!(
                "{shown} is not part {number} of {count}: by its metadata it is split.no = {} of split.count = {}",
                part.unsigned("split.no")?.map_or("(missing)".into(), |n| n.to_string()),
                part.unsigned("split.count")?.map_or("(missing)".into(), |n| n.to_string()),
            ));
        }
        match &mut whole {
            None => whole = Some(Gguf { files: vec![at], ..part }),
            Some(whole) => whole.append(part, at),
        }
    }
    let whole = whole.unwrap_or(opened);
    let mut names = HashSet::new();
    if let Some(twice) = whole.tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        return Err(invalid!("{file}: two of its parts hold the tensor {}", twice.name));
    }
    match whole.unsigned("split.tensors.count")? {
        Some(all) if all != whole.tensors.len() as u64 => {
            Err(invalid!("{file}: its parts hold {} tensors, and split.tensors.count is {all}", whole.tensors.len()))
        }
        _ => Ok(whole),
    }
}

impl Gguf {
    /// Appends the tensors of the next part.
    fn append(&mut self, part: Self, file: PathBuf) {
        let number = self.bytes.len();
        self.bytes.extend(part.bytes);
        self.files.push(file);
        self.tensors.extend(part.tensors.into_iter().map(|tensor| super::GgufTensor { part: number, ..tensor }));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::model_files::gguf::tests::Writer;

    #[test]
    fn names_of_parts_are_those_of_llama_cpp() {
        let name = PartName::parse("m-q4-00002-of-00012.gguf").unwrap();
        assert_eq!(name, PartName { prefix: "m-q4", number: 2, count: 12 });
        assert_eq!(PartName::of("m-q4", 2, 12), "m-q4-00002-of-00012.gguf");
        for other in
            ["m.gguf", "m-00002-of-00001.gguf", "m-00000-of-00002.gguf", "m-1-of-2.gguf", "m-+0001-of-00002.gguf"]
        {
            assert_eq!(PartName::parse(other), None, "{other}");
        }
    }

    fn part(no: u32, tensor: &str) -> Writer {
        Writer::default()
            .u32("split.no", no)
            .u32("split.count", 2)
            .i32s("of.part", &[no as i32])
            .u32("split.tensors.count", 2)
            .f32_tensor(tensor, &[1], &[no as f32])
    }

    #[test]
    fn any_part_opens_the_whole_and_a_missing_or_foreign_part_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (one, two) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
        let refusal = |name: &str| Gguf::open(&at(name)).err().expect("is refused").to_string();
        fs::write(at(one), part(0, "a").finish()).unwrap();
        let message = refusal(one);
        assert!(message.contains("part 2 of 2 is missing") && message.contains(two), "{message}");
        fs::write(at(two), part(1, "b").finish()).unwrap();
        for name in [one, two] {
            let whole = Gguf::open(&at(name)).unwrap();
            assert_eq!(whole.files(), [at(one), at(two)]);
            assert_eq!(whole.integers("of.part").unwrap(), Some(&[0i64][..]), "metadata is the first part's");
            let values: Vec<_> =
                whole.tensors().iter().map(|t| whole.tensor_bytes(t).unwrap().get().to_vec()).collect();
            assert_eq!(values, [0f32.to_le_bytes(), 1f32.to_le_bytes()]);
        }
        fs::write(at(two), part(1, "a").finish()).unwrap();
        assert!(refusal(one).contains("two of its parts hold the tensor a"));
        fs::write(at(two), part(0, "b").finish()).unwrap();
        assert!(refusal(one).contains("is not part 2 of 2"), "{}", refusal(one));
        fs::write(at(two), part(1, "b").f32_tensor("c", &[1], &[0.0]).finish()).unwrap();
        assert!(refusal(one).contains("3 tensors, and split.tensors.count is 2"));
        fs::write(at("renamed.gguf"), part(0, "a").finish()).unwrap();
        assert!(refusal("renamed.gguf").contains("-00001-of-00002.gguf"));
    }
}
