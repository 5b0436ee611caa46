//! The columns of records as their files hold them, with an id for each: what reward sources outside of the process get
//! beside prompt and response, as reward functions of TRL do.
//!
//! Only the records that are asked for stay in memory. This file does not depend on the tokenizer. Read
//! `data/stream/pipeline.rs` next.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::config::Data;
use crate::data::files::read;
use crate::data::record::RawRecord;
use crate::data::stream::scan::scan;

/// One record as its file holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordColumns {
    /// The record's own column `id`; without one, its file's name and its number there from 1, as in `"data.jsonl:17"`.
    pub id: Value,
    /// Every column under the name that it has in the file.
    pub columns: Map<String, Value>,
}

/// Records by their numbers, from 0, among all usable records.
pub type Columns = HashMap<usize, RecordColumns>;

/// The columns of the records of `[data]` whose numbers are in `wanted`. The files are read once more, twice.
///
/// # Errors
/// Those of [`scan`].
pub fn columns(config: &Data, wanted: &BTreeSet<usize>) -> Result<Columns> {
    let Some(&last) = wanted.last() else { return Ok(Columns::new()) };
    // 1. Where the records are. Interleaved sources may repeat a record under several numbers.
    let mut numbers: HashMap<(Arc<Path>, usize), Vec<usize>> = HashMap::new();
    let mut number = 0;
    scan(config, &mut |found| {
        if let Ok(entry) = found {
            if wanted.contains(&number) {
                numbers.entry((entry.place.file, entry.place.record)).or_default().push(number);
            }
            number += 1;
        }
        Ok(number <= last)
    })?;
    // 2. What they hold.
    let files: BTreeSet<Arc<Path>> = numbers.keys().map(|(file, _)| file.clone()).collect();
    let mut found = Columns::new();
    for file in files {
        read::records(&file, &mut |place, raw| {
            let numbers = numbers.get(&(place.file.clone(), place.record));
            if let (Some(numbers), Ok(RawRecord::Json(Value::Object(columns)))) = (numbers, raw) {
                let name = place.file.file_name().unwrap_or_default().to_string_lossy();
                let id = columns.get("id").cloned().unwrap_or_else(|| format!("{name}:{}", place.record).into());
                let record = RecordColumns { id, columns };
                found.extend(numbers.iter().map(|&number| (number, record.clone())));
            }
            Ok(found.len() < wanted.len())
        })?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::config::OnBadRecord;

    #[test]
    fn wanted_records_are_found_by_their_number_among_the_usable_ones_over_several_files() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one.jsonl", "two.csv"].map(|name| dir.path().join(name));
        let lines = [
            json!({"prompt": "a", "level": 3, "id": "first"}),
            json!({"question": "of no known format"}),
            json!({"prompt": "b", "tags": ["x", null]}),
        ];
        fs::write(&one, lines.each_ref().map(ToString::to_string).join("\n")).unwrap();
        fs::write(&two, "prompt,source\nc,web\nd,book\n").unwrap();
        let data: Data = toml::from_str(&format!(
            "path = [{:?}, {:?}]\non_bad_record = 'skip'",
            one.display().to_string(),
            two.display().to_string()
        ))
        .unwrap();
        assert_eq!(data.on_bad_record, OnBadRecord::Skip);
        let found = columns(&data, &BTreeSet::from([0, 1, 3])).unwrap();
        assert_eq!(found.len(), 3);
        assert_eq!(Value::from(found[&0].columns.clone()), lines[0]);
        assert_eq!(found[&0].id, "first");
        assert_eq!((&found[&1].columns["tags"], &found[&1].id), (&json!(["x", null]), &json!("one.jsonl:3")));
        assert_eq!((&found[&3].columns["source"], &found[&3].id), (&json!("book"), &json!("two.csv:2")));
        assert!(columns(&data, &BTreeSet::new()).unwrap().is_empty());
    }
}
