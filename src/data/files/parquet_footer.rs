//! A Parquet file's footer, looked through before the library believes it: a few bytes there can promise two thousand
//! million columns, or groups in groups until the stack is full. Thrift's compact encoding, walked without keeping anything.
//! Knows no value. Read parquet.rs for who asks.

/// Groups in groups: nobody's data is deeper.
const MAX_DEPTH: usize = 24;
/// Nodes of the schema, groups included.
const MAX_NODES: usize = 10_000;
/// Column chunks: columns times row groups. The library takes some hundred bytes for each.
const MAX_CHUNKS: usize = 100_000;
/// Thrift's own nesting; a footer has some eight levels.
const MAX_NESTING: usize = 24;

/// Whether a footer (FileMetaData of parquet.thrift) is one that can be read with a few megabytes.
///
/// # Errors
/// What is wrong with it, in words that go on after the file's name.
pub(crate) fn check(footer: &[u8]) -> Result<(), String> {
    /// FileMetaData.schema and .row_groups, RowGroup.columns, SchemaElement.num_children.
    const SCHEMA: i64 = 2;
    const ROW_GROUPS: i64 = 4;
    const COLUMNS: i64 = 1;
    const NUM_CHILDREN: i64 = 5;
    let mut walk = Walk { bytes: footer };
    let mut chunks = 0;
    walk.fields(|walk, id, kind| match id {
        SCHEMA => {
            let (nodes, of) = walk.list(kind)?;
            if nodes > MAX_NODES {
                return Err(format!("it has {nodes} columns and groups of columns, and {MAX_NODES} are the most"));
            }
            // Of every group that is not full yet, the children that are to come.
            let mut open: Vec<u64> = vec![];
            for _ in 0..nodes {
                let mut children = 0;
                walk.element(of, |walk, id, kind| match id {
                    NUM_CHILDREN if kind == Kind::INT32 => {
                        children = walk.varint().map(unzigzag)?;
                        Ok(())
                    }
                    _ => walk.skip(kind, 0),
                })?;
                while open.pop_if(|left| *left == 0).is_some() {}
                if let Some(left) = open.last_mut() {
                    *left -= 1;
                }
                match u64::try_from(children) {
                    Ok(0) => {}
                    Ok(n) if n < nodes as u64 => open.push(n),
                    _ => return Err(format!("a group says it has {children} columns, of {nodes}")),
                }
                if open.len() > MAX_DEPTH {
                    return Err(format!("columns are nested more than {MAX_DEPTH} deep"));
                }
            }
            Ok(())
        }
        ROW_GROUPS => {
            let (groups, of) = walk.list(kind)?;
            for _ in 0..groups {
                walk.element(of, |walk, id, kind| match id {
                    COLUMNS => {
                        let (columns, of) = walk.list(kind)?;
                        chunks += columns;
                        if chunks > MAX_CHUNKS {
                            return Err(format!(
                                "it has more than {MAX_CHUNKS} parts, columns times row groups; write it with larger row \
                                 groups"
                            ));
                        }
                        (0..columns).try_for_each(|_| walk.skip(of, 0))
                    }
                    _ => walk.skip(kind, 0),
                })?;
            }
            Ok(())
        }
        _ => walk.skip(kind, 0),
    })
}

fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

/// Thrift's types as the compact encoding writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind(u8);

impl Kind {
    const STOP: Self = Self(0);
    const INT32: Self = Self(5);
    const STRUCT: Self = Self(12);
}

/// What is left of the bytes.
struct Walk<'a> {
    bytes: &'a [u8],
}

impl Walk<'_> {
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
        Err("its footer holds a number without an end".into())
    }

    fn length(&mut self) -> Result<usize, String> {
        let length = self.varint()?;
        usize::try_from(length).map_err(|_| format!("its footer holds {length} bytes"))
    }

    /// Every field of a struct, by its number and kind, handed to something that reads it to its end.
    fn fields(&mut self, mut read: impl FnMut(&mut Self, i64, Kind) -> Result<(), String>) -> Result<(), String> {
        let mut id = 0i64;
        loop {
            let head = self.byte()?;
            let kind = Kind(head & 0x0F);
            if kind == Kind::STOP {
                return Ok(());
            }
            id = match head >> 4 {
                0 => unzigzag(self.varint()?),
                delta => id.wrapping_add(delta.into()),
            };
            read(self, id, kind)?;
        }
    }

    /// The same of a list's element, which must be a struct.
    fn element(
        &mut self,
        of: Kind,
        read: impl FnMut(&mut Self, i64, Kind) -> Result<(), String>,
    ) -> Result<(), String> {
        if of != Kind::STRUCT {
            return Err("its footer lists something else than structs".into());
        }
        self.fields(read)
    }

    /// The length of a list, and what it is of.
    fn list(&mut self, kind: Kind) -> Result<(usize, Kind), String> {
        if !matches!(kind.0, 9 | 10) {
            return Err("its footer has no list where one belongs".into());
        }
        let head = self.byte()?;
        let length = if head >> 4 == 15 { self.length()? } else { usize::from(head >> 4) };
        // An element takes a byte at least.
        if length > self.bytes.len() {
            return Err(format!("its footer lists {length} things in {} bytes", self.bytes.len()));
        }
        Ok((length, Kind(head & 0x0F)))
    }

    /// Past a value of a kind, `depth` deep.
    fn skip(&mut self, kind: Kind, depth: usize) -> Result<(), String> {
        if depth > MAX_NESTING {
            return Err("its footer is nested without end".into());
        }
        match kind.0 {
            // A field's truth stands in its kind.
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
                // In a list it is a byte of its own.
                let of = if matches!(of.0, 1 | 2) { Kind(3) } else { of };
                (0..length).try_for_each(|_| self.skip(of, depth + 1))
            }
            11 => {
                let length = self.length()?;
                if length > self.bytes.len() {
                    return Err(format!("its footer maps {length} things in {} bytes", self.bytes.len()));
                }
                let kinds = if length > 0 { self.byte()? } else { 0 };
                (0..length).try_for_each(|_| {
                    self.skip(Kind(kinds >> 4), depth + 1)?;
                    self.skip(Kind(kinds & 0x0F), depth + 1)
                })
            }
            12 => self.fields(|walk, _, kind| walk.skip(kind, depth + 1)),
            13 => self.take(16).map(drop),
            other => Err(format!("its footer holds a value of the unknown kind {other}")),
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

    /// A footer whose schema has these numbers of children, and which has so many row groups of so many chunks.
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

    fn said(footer: &[u8]) -> String {
        check(footer).expect_err("it is refused")
    }

    #[test]
    fn footers_within_the_limits_pass_and_those_beyond_say_what_is_too_much() {
        check(&footer(&[2, 1, 0, 0], 3, 2)).unwrap();
        check(&footer(&[&[9_999][..], &[0; 9_999]].concat(), 10, 9_999)).unwrap();
        check(&footer(&[&[1; MAX_DEPTH][..], &[0]].concat(), 1, 1)).unwrap();
        assert!(said(&footer(&vec![0; 10_001], 0, 0)).contains("10001 columns"));
        assert!(said(&footer(&[&[1; MAX_DEPTH + 1][..], &[0]].concat(), 1, 1)).contains("nested more than 24"));
        assert!(said(&footer(&[i32::MAX as u64, 0], 0, 0)).contains("says it has 2147483647"));
        assert!(said(&footer(&[1, 0], 101, 1000)).contains("more than 100000 parts"));
    }

    #[test]
    fn every_cut_and_every_changed_byte_ends() {
        let whole = footer(&[2, 1, 0, 0], 3, 2);
        for end in 0..whole.len() {
            assert!(check(&whole[..end]).is_err(), "cut at {end}");
        }
        for (at, value) in (0..whole.len()).flat_map(|at| (0..=255).map(move |value| (at, value))) {
            let mut changed = whole.clone();
            changed[at] = value;
            let _ = check(&changed);
        }
        // Structs in structs, as deep as the bytes go.
        assert!(said(&[0x6C].repeat(100_000)).contains("nested without end"));
    }
}
