//! Files of records: finding them, reading them one record at a time in constant memory, and the limits on what a file
//! may ask for.

pub mod delimited;
pub mod find;
pub mod json_limits;
pub mod parquet;
pub mod parquet_footer;
pub mod read;
