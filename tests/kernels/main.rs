//! Every kernel on the emulated machine against formulas in float64 that are written out here: ragged shapes, widths that are
//! not a multiple of a warp or block, every element and storage type, threads in plain and in shuffled order, NaN, no rows;
//! and the device layer itself: what the emulated machine finds, memory against the dry machine, CUDA's libraries.
//!
//! Without a C++ compiler these tests fail, unless `FOURFOLD_SKIP_EMULATED` is 1.

mod attention;
mod columns;
mod decode;
mod decode_q8;
mod elementwise;
mod emulated;
mod gemm;
mod group;
mod libraries;
mod linear;
mod low_rank;
mod prelude;
mod reference;
mod rows;
mod sample;
mod storage;
mod support;
mod vocabulary;
