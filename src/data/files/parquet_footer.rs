//! Validates a Parquet footer before the `parquet` crate parses it: limits on columns, nesting and column chunks.
//!
//! A few bytes of a footer can claim two billion columns, or nest groups until the stack overflows. The footer is in
//! Thrift's compact encoding, which is walked here without storing anything. This file does not depend on the rest of
//! the crate. `data/files/parquet.rs` calls it.

/// Maximum nesting depth of the schema.
const MAX_DEPTH: usize = 24;
/// Maximum number of nodes in the schema, groups included.
const MAX_NODES: usize = 10_000;
/// Maximum number of column chunks, which is columns times row groups. The `parquet` crate takes some hundred bytes per
/// chunk.
const MAX_CHUNKS: usize = 100_000;
/// Maximum nesting of Thrift values; a normal footer has about eight levels.
const MAX_NESTING: usize = 24;

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
    let mut reader = ThriftReader { bytes: footer };
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

fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

/// The code of a Thrift type in the compact encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ThriftType(u8);

impl ThriftType {
    const STOP: Self = Self(0);
    const INT32: Self = Self(5);
    const STRUCT: Self = Self(12);
}

/// Reads the compact encoding from the bytes that remain.
struct ThriftReader<'a> {
    bytes: &'a [u8],
}

impl ThriftReader<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or("its footer ends too early")?;
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take(1).map(|byte| byte[0])
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("its footer has a varint that does not end".into())
    }

    fn length(&mut self) -> Result<usize, String> {
        let length = self.varint()?;
        usize::try_from(length).map_err(|_| format!("its footer claims a length of {length} bytes"))
    }

    /// Calls `read` with the id and type of each field of a struct; `read` must consume the field's value.
    fn fields(&mut self, mut read: impl FnMut(&mut Self, i64, ThriftType) -> Result<(), String>) -> Result<(), String> {
        let mut id = 0i64;
        loop {
            let head = self.byte()?;
            let kind = ThriftType(head & 0x0F);
            if kind == ThriftType::STOP {
                return Ok(());
            }
            id = match head >> 4 {
                0 => unzigzag(self.varint()?),
                delta => id.wrapping_add(delta.into()),
            };
            read(self, id, kind)?;
        }
    }

    /// Reads one list element, which must be a struct, field by field like [`Self::fields`].
    fn element(
        &mut self,
        of: ThriftType,
        read: impl FnMut(&mut Self, i64, ThriftType) -> Result<(), String>,
    ) -> Result<(), String> {
        if of != ThriftType::STRUCT {
            return Err("its footer has a list of something other than structs".into());
        }
        self.fields(read)
    }

    /// The length of a list and the type of its elements.
    fn list(&mut self, kind: ThriftType) -> Result<(usize, ThriftType), String> {
        if !matches!(kind.0, 9 | 10) {
            return Err("its footer lacks a list where one is required".into());
        }
        let head = self.byte()?;
        let length = if head >> 4 == 15 { self.length()? } else { usize::from(head >> 4) };
        // An element takes at least one byte.
        if length > self.bytes.len() {
            return Err(format!("its footer claims a list of {length} elements in {} bytes", self.bytes.len()));
        }
        Ok((length, ThriftType(head & 0x0F)))
    }

    /// Skips a value of type `kind` at nesting level `depth`.
    fn skip(&mut self, kind: ThriftType, depth: usize) -> Result<(), String> {
        if depth > MAX_NESTING {
            return Err("its footer is nested too deeply".into());
        }
        match kind.0 {
            // The type code of a boolean field is its value.
            1 | 2 => Ok(()),
            3 => self.byte().map(drop),
            4..=6 => self.varint().map(drop),
            7 => self.take(8).map(drop),
            8 => {
                let length = self.length()?;
                self.take(length).map(drop)
            }
            9 | 10 => {
                let (length, of) = self.list(kind)?;
                // In a list a boolean is one byte.
                let of = if matches!(of.0, 1 | 2) { ThriftType(3) } else { of };
                (0..length).try_for_each(|_| self.skip(of, depth + 1))
            }
            11 => {
                let length = self.length()?;
                if length > self.bytes.len() {
                    return Err(format!("its footer claims a map of {length} entries in {} bytes", self.bytes.len()));
                }
                let kinds = if length > 0 { self.byte()? } else { 0 };
                (0..length).try_for_each(|_| {
                    self.skip(ThriftType(kinds >> 4), depth + 1)?;
                    self.skip(ThriftType(kinds & 0x0F), depth + 1)
                })
            }
            12 => self.fields(|reader, _, kind| reader.skip(kind, depth + 1)),
            13 => self.take(16).map(drop),
            other => Err(format!("its footer has a value of the unknown Thrift type {other}")),
        }
    }
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
