//! Stored matrices: the storage types and dequantisation (`dtype`, `dequantise`), quantisation (`quantise`), the order
//! of rows (`row_order`). It does not depend on matrices or operations. Read `dtype.rs` next.

mod dequantise;
pub mod dtype;
pub mod gpu;
pub mod quantise;
pub mod row_order;
