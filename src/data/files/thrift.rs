//! Thrift's compact encoding, in which Parquet's footers and page headers are written: walked without storing anything.
//!
//! Every claimed length is checked against the bytes that are there. This file does not depend on the rest of the crate. Read
//! `parquet_footer.rs` and `parquet_page.rs` for what is read with it.

/// The signed number of a zigzag encoding: bit 0 is the sign.
pub(crate) fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

/// Maximum nesting of Thrift values; a normal footer has about eight levels.
const MAX_NESTING: usize = 24;

/// The code of a Thrift type in the compact encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThriftType(u8);

impl ThriftType {
    const STOP: Self = Self(0);
    /// A 32-bit number, zigzag-encoded.
    pub(crate) const INT32: Self = Self(5);
    const STRUCT: Self = Self(12);
}

/// Reads the compact encoding from the bytes that remain.
pub(crate) struct ThriftReader<'a> {
    bytes: &'a [u8],
    /// What is read, for messages: `footer`.
    of: &'static str,
    /// Whether the bytes ended inside of a value.
    pub(crate) is_cut: bool,
}

impl<'a> ThriftReader<'a> {
    /// A reader of `bytes`, which messages call `of`.
    pub(crate) fn new(bytes: &'a [u8], of: &'static str) -> Self {
        Self { bytes, of, is_cut: false }
    }

    /// That more is claimed than there are bytes.
    fn cut<T>(&mut self, fault: String) -> Result<T, String> {
        self.is_cut = true;
        Err(fault)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let Some((taken, rest)) = self.bytes.split_at_checked(count) else {
            return self.cut(format!("its {} ends too early", self.of));
        };
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take(1).map(|byte| byte[0])
    }

    /// An unsigned varint: seven bits per byte, low bits first, up to a byte without the highest bit.
    pub(crate) fn varint(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(format!("its {} has a varint that does not end", self.of))
    }

    fn length(&mut self) -> Result<usize, String> {
        let length = self.varint()?;
        usize::try_from(length).map_err(|_| format!("its {} claims a length of {length} bytes", self.of))
    }

    /// Calls `read` with the id and type of each field of a struct; `read` must consume the field's value.
    pub(crate) fn fields(
        &mut self,
        mut read: impl FnMut(&mut Self, i64, ThriftType) -> Result<(), String>,
    ) -> Result<(), String> {
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
    pub(crate) fn element(
        &mut self,
        of: ThriftType,
        read: impl FnMut(&mut Self, i64, ThriftType) -> Result<(), String>,
    ) -> Result<(), String> {
        if of != ThriftType::STRUCT {
            return Err(format!("its {} has a list of something other than structs", self.of));
        }
        self.fields(read)
    }

    /// The length of a list and the type of its elements.
    pub(crate) fn list(&mut self, kind: ThriftType) -> Result<(usize, ThriftType), String> {
        if !matches!(kind.0, 9 | 10) {
            return Err(format!("its {} lacks a list where one is required", self.of));
        }
        let head = self.byte()?;
        let length = if head >> 4 == 15 { self.length()? } else { usize::from(head >> 4) };
        // An element takes at least one byte.
        if length > self.bytes.len() {
            return self.cut(format!(
                "its {} claims a list of {length} elements in {} bytes",
                self.of,
                self.bytes.len()
            ));
        }
        Ok((length, ThriftType(head & 0x0F)))
    }

    /// Skips a value of type `kind` at nesting level `depth`.
    pub(crate) fn skip(&mut self, kind: ThriftType, depth: usize) -> Result<(), String> {
        if depth > MAX_NESTING {
            return Err(format!("its {} is nested too deeply", self.of));
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
                    return self.cut(format!(
                        "its {} claims a map of {length} entries in {} bytes",
                        self.of,
                        self.bytes.len()
                    ));
                }
                let kinds = if length > 0 { self.byte()? } else { 0 };
                (0..length).try_for_each(|_| {
                    self.skip(ThriftType(kinds >> 4), depth + 1)?;
                    self.skip(ThriftType(kinds & 0x0F), depth + 1)
                })
            }
            12 => self.fields(|reader, _, kind| reader.skip(kind, depth + 1)),
            13 => self.take(16).map(drop),
            other => Err(format!("its {} has a value of the unknown Thrift type {other}", self.of)),
        }
    }
}
