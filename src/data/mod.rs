//! Training data: files of records -> [`Record`]s -> token sequences, for files of any size.
//!
//! Each of these modules uses only those above it:
//! - `record.rs`: the types of a record and its position;
//! - `files/`: finding and reading files (JSON, JSON lines, CSV, TSV, text, Parquet), with limits on untrusted input;
//! - `formats/`: columns of a JSON object -> [`Record`], for each data set format;
//! - `examples/`: records -> token sequences per training objective, and their batches;
//! - `stream/`: the sources of `[data]`, tokenised on all cores, cached, and split into training and held-out examples.
//!
//! It does not depend on training or reward code. Read `data/record.rs` next.

pub mod examples;
mod files;
pub mod formats;
mod record;
pub mod stream;

pub use crate::tokenizer::chat_template::Message;
pub use examples::encoder::ModelEncoder;
pub use record::{Entry, PairLabel, Place, Record, Skipped, Text};
pub use stream::pipeline::{Prepared, Subset, prepare, ptx_blocks};
pub use stream::scan::{Dataset, input_files, load, scan};
