//! TFRecord: the length, its checksum, the bytes, their checksum (CRC-32C, masked). It does not depend on the bytes' content.
//! Source: TensorFlow, `lib/io/record_writer.h`.

use std::fs::File;
use std::io::{BufReader, Read, Result, Seek, SeekFrom};

/// Bytes of a record beside its content.
const AROUND: u64 = 16;

/// A record of these bytes.
pub(super) fn encode(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    let parts = [&length[..], &masked(&length), content, &masked(content)];
    parts.concat()
}

fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// The length of a file up to and with its last whole record within its first `bytes` bytes.
pub(super) fn whole(file: &mut File, bytes: u64) -> Result<u64> {
    let most = file.metadata()?.len().min(bytes);
    file.seek(SeekFrom::Start(0))?;
    let (mut reader, mut at) = (BufReader::new(file), 0u64);
    while at + AROUND <= most {
        let mut head = [0u8; 12];
        reader.read_exact(&mut head)?;
        let (length, sum) = head.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap_or_default());
        if masked(&head[..8]) != sum || length > most - at - AROUND {
            break;
        }
        reader.seek_relative(length as i64 + 4)?;
        at += AROUND + length;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_record_is_tensorflows_and_a_broken_end_is_found() {
        // tests/python/check_tensorboard.py reads whole files; this is `TFRecordWriter`'s record of b"abc".
        let record = encode(b"abc");
        assert_eq!(record[..8], 3u64.to_le_bytes());
        assert_eq!(record.len(), 19);
        // CRC-32C of "123456789" is 0xe3069283, and its mask by the formula.
        let sum = u32::from_le_bytes(masked(b"123456789"));
        assert_eq!(sum, 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[encode(b"one"), encode(b"three"), encode(b"")].concat()).unwrap();
        let ends = [19, 19 + 21, 19 + 21 + 16];
        for (bytes, whole_bytes) in [(56, 56), (1000, 56), (55, 40), (40, 40), (39, 19), (19, 19), (18, 0), (0, 0)] {
            assert_eq!(whole(&mut file, bytes).unwrap(), whole_bytes, "{ends:?}");
        }
        file.seek(SeekFrom::Start(19)).unwrap();
        file.write_all(&[0xff]).unwrap();
        assert_eq!(whole(&mut file, 56).unwrap(), 19, "a length whose checksum is wrong");
    }
}
