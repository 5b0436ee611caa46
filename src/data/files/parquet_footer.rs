//! Validates a Parquet footer before the `parquet` crate parses it: limits on columns, nesting and column chunks.
//!
//! A few bytes of a footer can claim two billion columns, or nest groups until the stack overflows. The footer is in
//! Thrift's compact encoding, which is walked here without storing anything. This file does not depend on `formats`.
//! `data/files/parquet.rs` calls it. Read `thrift.rs` for the encoding.

use crate::data::files::thrift::{ThriftReader, ThriftType, unzigzag};

/// Maximum nesting depth of the schema.
const MAX_DEPTH: usize = 24;
/// Maximum number of nodes in the schema, groups included.
const MAX_NODES: usize = 10_000;
/// Maximum number of column chunks, which is columns times row groups. The `parquet` crate takes some hundred bytes per
/// chunk.
const MAX_CHUNKS: usize = 100_000;

/// Checks that a footer (FileMetaData of parquet.thrift) can be parsed with a few megabytes of memory.
///
/// # Errors
/// The fault, as the end of a sentence that begins with the file's name.
pub(crate) fn check(footer: &[u8]) -> Result<(), String> {
    /// Field ids of FileMetaData.schema and .row_groups, RowGroup.columns, SchemaElement.num_children.
    const SCHEMA: i64 = 2;
    const ROW_GROUPS: i64 = 4;
    const COLUMNS: i64 = 1;
    const NUM_CHILDREN: i64 = 5;
    let mut reader = ThriftReader::new(footer, "footer");
    let mut chunks = 0;
    reader.fields(|reader, id, kind| match id {
        SCHEMA => {
            let (nodes, of) = reader.list(kind)?;
            if nodes > MAX_NODES {
                return Err(format!("it has {nodes} columns and groups of columns; the maximum is {MAX_NODES}"));
            }
            // Per group that is still incomplete, the number of children that follow.
            let mut open: Vec<u64> = vec![];
            for _ in 0..nodes {
                let mut children = 0;
                reader.element(of, |reader, id, kind| match id {
                    NUM_CHILDREN if kind == ThriftType::INT32 => {
                        children = reader.varint().map(unzigzag)?;
                        Ok(())
                    }
                    _ => reader.skip(kind, 0),
                })?;
                while open.pop_if(|remaining| *remaining == 0).is_some() {}
                if let Some(remaining) = open.last_mut() {
                    *remaining -= 1;
                }
                match u64::try_from(children) {
                    Ok(0) => {}
                    Ok(n) if n < nodes as u64 => open.push(n),
                    _ => return Err(format!("a group claims to have {children} columns, of {nodes}")),
                }
                if open.len() > MAX_DEPTH {
                    return Err(format!("columns are nested more than {MAX_DEPTH} deep"));
                }
            }
            Ok(())
        }
        ROW_GROUPS => {
            let (groups, of) = reader.list(kind)?;
            for _ in 0..groups {
                reader.element(of, |reader, id, kind| match id {
                    COLUMNS => {
                        let (columns, of) = reader.list(kind)?;
                        chunks += columns;
                        if chunks > MAX_CHUNKS {
                            return Err(format!(
                                "it has more than {MAX_CHUNKS} column chunks (columns times row groups); write it with larger row \
                                 groups"
                            ));
                        }
                        (0..columns).try_for_each(|_| reader.skip(of, 0))
                    }
                    _ => reader.skip(kind, 0),
                })?;
            }
            Ok(())
        }
        _ => reader.skip(kind, 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn varint(mut n: u64) -> Vec<u8> {
        let mut out = vec![];
        while n >= 0x80 {
            out.push(n as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
        out
    }

    /// A footer with one schema node per number of children, and `groups` row groups of `chunks` column chunks each.
    fn footer(children: &[u64], groups: usize, chunks: usize) -> Vec<u8> {
        let list =
            |length: usize, element: &[u8]| [&[0xFC], &varint(length as u64)[..], &element.repeat(length)].concat();
        let mut out = vec![0x15, 2, 0x19, 0xFC]; // version = 1, schema
        out.extend(varint(children.len() as u64));
        for &n in children {
            out.extend([0x48, 1, b'x']); // name
            out.push(0x15); // num_children
            out.extend(varint(n * 2));
            out.push(0);
        }
        let row_group = [&[0x19][..], &list(chunks, &[0x26, 0, 0]), &[0]].concat(); // columns, each with a file_offset
        out.extend([0x16, 0, 0x19]); // num_rows, row_groups
        out.extend(list(groups, &row_group));
        out.push(0);
        out
    }

    fn fault(footer: &[u8]) -> String {
        check(footer).expect_err("it is refused")
    }

    #[test]
    fn footers_within_the_limits_pass_and_larger_ones_name_the_limit() {
        check(&footer(&[2, 1, 0, 0], 3, 2)).unwrap();
        check(&footer(&[&[9_999][..], &[0; 9_999]].concat(), 10, 9_999)).unwrap();
        check(&footer(&[&[1; MAX_DEPTH][..], &[0]].concat(), 1, 1)).unwrap();
        assert!(fault(&footer(&vec![0; 10_001], 0, 0)).contains("10001 columns"));
        assert!(fault(&footer(&[&[1; MAX_DEPTH + 1][..], &[0]].concat(), 1, 1)).contains("nested more than 24"));
        assert!(fault(&footer(&[i32::MAX as u64, 0], 0, 0)).contains("claims to have 2147483647"));
        assert!(fault(&footer(&[1, 0], 101, 1000)).contains("more than 100000 column chunks"));
    }

    #[test]
    fn truncated_and_corrupted_footers_terminate_without_a_panic() {
        let whole = footer(&[2, 1, 0, 0], 3, 2);
        for end in 0..whole.len() {
            assert!(check(&whole[..end]).is_err(), "cut at {end}");
        }
        for (at, value) in (0..whole.len()).flat_map(|at| (0..=255).map(move |value| (at, value))) {
            let mut changed = whole.clone();
            changed[at] = value;
            let _ = check(&changed);
        }
        // Structs nested in structs.
        assert!(fault(&[0x6C].repeat(100_000)).contains("nested too deeply"));
    }
}
