//! Index arrays that every layer of a pass uploads again: positions, slots, lengths. While a pass lasts, the device keeps
//! them and returns the copy that has the same content. It does not depend on operations.

use anyhow::Result;

use super::{Device, Matrix, lock};

/// The index arrays of the passes that are under way.
#[derive(Default)]
pub(super) struct Indices {
    passes: usize,
    kept: Vec<(Vec<u32>, Matrix)>,
}

/// A pass over the layers of a network. Index arrays are freed when the last pass on the device ends.
pub struct Pass(Device);

impl Device {
    /// Begins a pass; it ends when the value is dropped.
    pub fn pass(&self) -> Pass {
        lock(&self.0.indices).passes += 1;
        Pass(self.clone())
    }

    /// `values` on the device, (1, len): the copy that this pass made already, or a new one.
    ///
    /// # Errors
    /// If device memory is out or the copy fails.
    pub fn indices(&self, values: &[u32]) -> Result<Matrix> {
        if let Some((_, copy)) = lock(&self.0.indices).kept.iter().find(|(of, _)| of == values) {
            return Ok(copy.clone());
        }
        let copy = self.upload_u32(values)?;
        let mut indices = lock(&self.0.indices);
        if indices.passes > 0 {
            indices.kept.push((values.to_vec(), copy.clone()));
        }
        Ok(copy)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let freed = {
            let mut indices = lock(&self.0.0.indices);
            indices.passes -= 1;
            if indices.passes == 0 { std::mem::take(&mut indices.kept) } else { vec![] }
        };
        drop(freed);
    }
}
