//! The section `[memory]`: how much memory a run may take.
//!
//! It does not depend on the planner, which reads it.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[memory]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// What a run may take, such as `"8GiB"`: a stage whose plan needs more does not start, and `checkpoint = "auto"`
    /// is decided by it. Pages of a mapped base count where they fit beside the rest; alone they are no reason to
    /// refuse, since the system can drop them and read them again. Absent = what the machine and its control group have
    /// free.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub limit: Option<ByteSize>,
    /// What a run may take of a device's memory, such as `"8GiB"`, the driver's own part among it. Absent = what the card
    /// has free.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub device_limit: Option<ByteSize>,
}

/// A number of bytes, written as `"512MiB"`, `"8GiB"`, `"5GB"` or a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "Written", into = "String")]
pub struct ByteSize(pub usize);

const UNITS: [(&str, usize); 7] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

/// Below this many bytes a number needs a unit.
const BARE: f64 = 1024.0 * 1024.0;

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim().trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = text.trim()[digits.len()..].to_ascii_lowercase();
        let factor = match UNITS.iter().find(|(name, _)| name.to_ascii_lowercase() == unit) {
            Some((_, factor)) => *factor,
            None if unit.is_empty() => {
                // Whoever writes 10 means another unit: nothing here takes or gives less than this.
                let few = digits.trim().parse::<f64>().ok().filter(|n| (1.0..BARE).contains(n));
                if let Some(few) = few {
                    let unit = if few < 1024.0 { "GiB" } else { "MiB" };
                    return Err(format!("without a unit is {few} bytes; did you mean \"{few}{unit}\"?"));
                }
                1
            }
            None => return Err(format!("{text:?} is in none of B, KiB, MiB, GiB, KB, MB and GB")),
        };
        let number: Option<f64> = digits.trim().parse().ok();
        let bytes = number.map(|n| n * factor as f64).filter(|b| (1.0..9e15).contains(b));
        bytes.map(|b| Self(b as usize)).ok_or_else(|| format!("{text:?} is no size above 0, such as \"8GiB\""))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |factor: usize| self.0 >= factor && self.0.is_multiple_of(factor);
        match UNITS[1..4].iter().rev().find(|(_, factor)| exact(*factor)) {
            Some((name, factor)) => write!(f, "{}{name}", self.0 / factor),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// As TOML has it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "must be a size such as \"8GiB\", or a number of bytes")]
enum Written {
    Text(String),
    Bytes(u64),
}

impl TryFrom<Written> for ByteSize {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Text(text) => text.parse(),
            Written::Bytes(bytes) => bytes.to_string().parse(),
        }
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_families_of_units_and_written_back_exactly() {
        let bytes = |text: &str| text.parse::<ByteSize>().map(|b| b.0);
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        assert_eq!(bytes("1.5 gib"), Ok(3 << 29));
        assert_eq!((bytes("5GB"), bytes("700B"), bytes("2000000")), (Ok(5_000_000_000), Ok(700), Ok(2_000_000)));
        assert!(["", "GiB", "-1GiB", "0", "8 apples", "1e40GiB", "NaN"].iter().all(|t| bytes(t).is_err()));
        for (bare, meant) in [("10", "10GiB"), ("1.5", "1.5GiB"), ("700", "700GiB"), ("8192", "8192MiB")] {
            let said = bare.parse::<ByteSize>().unwrap_err();
            assert_eq!(said, format!("without a unit is {bare} bytes; did you mean \"{meant}\"?"));
        }
        for size in [1, 700, 8 << 30, (8 << 30) + 1, 5_000_000_000] {
            assert_eq!(ByteSize(size).to_string().parse(), Ok(ByteSize(size)));
        }
        let config: Memory = toml::from_str("limit = 4194304").unwrap();
        assert_eq!(config.limit, Some(ByteSize(4 << 20)));
        assert_eq!(toml::to_string(&config).unwrap(), "limit = \"4MiB\"\n");
    }
}
