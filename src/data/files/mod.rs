//! Files of records: finding them, reading them one record at a time in constant memory, and limits on untrusted input.
//!
//! It does not depend on `formats`: a reader returns raw columns or lines. The limits (`json_limits.rs`,
//! `parquet_footer.rs`, `parquet_page.rs`) and missing numbers (`holes.rs`) can be skipped on a first reading. Read
//! `data/files/read.rs` next.

mod delimited;
pub mod find;
mod holes;
mod json_limits;
mod parquet;
mod parquet_footer;
mod parquet_page;
pub mod read;
mod thrift;
