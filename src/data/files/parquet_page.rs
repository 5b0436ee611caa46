//! The header of a Parquet page: its type and the size that it claims to unpack to, before the `parquet` crate allocates that.
//!
//! The crate takes the numbers of a header's fields whatever types the fields say they have, in any order, and the later of two
//! with one id, so the same is done here. This file does not depend on `formats`. `data/files/parquet.rs` calls it. Read
//! `thrift.rs` for the encoding.

use std::io::Read;

use crate::data::files::thrift::{ThriftReader, ThriftType, unzigzag};

/// What a page's header says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// `PageType` of parquet.thrift: 2 is a dictionary.
    pub(crate) kind: u64,
    /// Bytes that it claims to have when it is unpacked.
    pub(crate) size: u64,
}

/// Reads the header that `input` begins with; `None` if it lacks a field that the crate requires.
///
/// # Errors
/// A header that is damaged, or longer than any writer's, as the end of a sentence that begins with the file's name.
pub(crate) fn page(mut input: impl Read) -> Result<Option<Page>, String> {
    /// Bytes read at first, and the most: the header's statistics may hold a smallest and a largest value.
    const FIRST: usize = 256;
    const MOST: usize = 8 << 20;
    let mut header = Vec::with_capacity(FIRST);
    let mut wanted = FIRST;
    loop {
        let missing = (wanted - header.len()) as u64;
        let read = input.by_ref().take(missing).read_to_end(&mut header).map_err(|error| error.to_string())?;
        let mut reader = ThriftReader::new(&header, "page header");
        match parse(&mut reader) {
            // It may go on behind the bytes that were read.
            Err(_) if reader.is_cut && read as u64 == missing && wanted < MOST => wanted = MOST.min(wanted * 16),
            result => return result,
        }
    }
}

fn parse(reader: &mut ThriftReader<'_>) -> Result<Option<Page>, String> {
    let (mut kind, mut size) = (None, None);
    reader.fields(|reader, id, of| match id {
        1 => number(reader).map(|n| kind = Some(n)),
        2 => number(reader).map(|n| size = Some(n)),
        3 | 4 => number(reader).map(drop),
        // DataPageHeader, IndexPageHeader, DictionaryPageHeader and DataPageHeaderV2: the ids of their numbers.
        5 => numbers(reader, 4),
        6 => numbers(reader, 0),
        7 => numbers(reader, 2),
        8 => numbers(reader, 6),
        _ => reader.skip(of, 0),
    })?;
    Ok(kind.zip(size).map(|(kind, size)| Page { kind, size }))
}

/// A 32-bit number; a negative one is larger than any size here.
fn number(reader: &mut ThriftReader<'_>) -> Result<u64, String> {
    reader.varint().map(|n| u64::from(unzigzag(n) as i32 as u32))
}

/// A struct whose fields 1 to `last` are numbers.
fn numbers(reader: &mut ThriftReader<'_>, last: i64) -> Result<(), String> {
    reader.fields(|reader, id, of: ThriftType| match id {
        id if (1..=last).contains(&id) => number(reader).map(drop),
        _ => reader.skip(of, 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// type = 0, size = 290 MiB, compressed = 3, data_page_header { 1, 0, 3, 3 }.
    const HEADER: [u8; 22] =
        [0x15, 0, 0x15, 0x80, 0x80, 0x80, 0xA2, 2, 0x15, 6, 0x2C, 0x15, 2, 0x15, 0, 0x15, 6, 0x15, 6, 0, 0, 7];

    fn read(header: &[u8]) -> Option<Page> {
        page(header).unwrap()
    }

    #[test]
    fn the_size_is_found_in_whatever_type_and_place_it_is_written() {
        let size = 304_087_040;
        assert_eq!(read(&HEADER), Some(Page { kind: 0, size }));
        for kind in [1, 2, 3, 4, 6, 7, 8, 9, 12] {
            let mut other = HEADER;
            other[2] = 0x10 | kind;
            assert_eq!(read(&other), Some(Page { kind: 0, size }), "type {kind}");
        }
        // The size last, under its full id, behind statistics that are longer than what is read at first.
        let long = [&[0x18, 0x88, 0x27][..], &[b'x'; 5000], &[0]].concat();
        let data_page = [&[0x5C, 0x15, 2, 0x15, 0, 0x15, 6, 0x15, 6, 0x1C][..], &long, &[0]].concat();
        let last = [&[0x15, 4, 0x25, 6][..], &[0x0C, 10], &data_page[1..], &[0x05, 4], &HEADER[3..8], &[0]].concat();
        assert_eq!(read(&last), Some(Page { kind: 2, size }));
        assert_eq!(read(&[0x15, 0, 0x25, 6, 0]), None, "without a size");
        for end in 0..HEADER.len() - 2 {
            assert!(page(&HEADER[..end]).is_err(), "cut at {end}");
        }
    }
}
