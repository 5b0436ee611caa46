//! The order of a stored matrix's rows: logical row -> position in the file. GGUF files permute the rows of some
//! matrices, and this undoes it without copying. It does not depend on the rest of the crate. Read `weight.rs` in `ops`
//! next.

/// Maps a logical row to its position in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// The file has the rows in the matrix's order.
    AsStored,
    /// GGUF's llama files store the rows of q and k with the two halves of each head interleaved
    /// (llama.cpp `convert_hf_to_gguf.py`, `permute`); this order undoes it, so that adapters fit both files.
    RopeInterleaved {
        /// Rows per head.
        head_dim: usize,
    },
    /// GGUF's gptneox files store all of q, then k, then v; Hugging Face stores q, k and v of each head in turn.
    HeadsApart {
        /// Rows per head of q, of k and of v.
        head_dim: usize,
        /// Number of heads.
        heads: usize,
    },
}

impl RowOrder {
    /// The position of row `row` in the file.
    pub const fn stored(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::RopeInterleaved { head_dim } => {
                let (head, r, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + 2 * (r % half) + r / half
            }
            Self::HeadsApart { head_dim, heads } => {
                let (head, r) = (row / (3 * head_dim), row % (3 * head_dim));
                (r / head_dim * heads + head) * head_dim + r % head_dim
            }
        }
    }

    /// Reorders `values`, rows of `cols` elements in the matrix's order, into the file's order.
    pub fn store(self, values: &[f32], cols: usize) -> Vec<f32> {
        let mut out = vec![0f32; values.len()];
        for (row, from) in values.chunks_exact(cols).enumerate() {
            let at = self.stored(row) * cols;
            out[at..at + cols].copy_from_slice(from);
        }
        out
    }
}
