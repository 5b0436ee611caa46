//! The attention sublayer of a block: q, k, v of the normed input, their norms and rotation, attention, output
//! projection and residual. Forward, one decoding step, and backward. It does not depend on the MLP. Read `mlp.rs`
//! beside it next.

use anyhow::Result;

use crate::device::Array;

use super::residual::{before, before_backward};
use super::{BlockGradients, Layout, Pass, Qkv, columns, linear, store, store_and_take_input, take};
use crate::model::block::residual::JoinSaved;
use crate::ops::attention::{self, KvCache};
use crate::ops::columns::Fusion;
use crate::ops::linear::InputGradient;
use crate::ops::rope::{self, Direction, RopeTable};

/// Tensors saved for the backward of attention.
pub(super) struct AttentionSaved {
    z_qkv: linear::Saved,
    /// q and k before their norms, if they have norms.
    raw: Option<[Array; 2]>,
    /// q, k and v as attention gets them.
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    z_o: linear::Saved,
    pub(super) join: JoinSaved,
}

/// q, k and v as attention gets them, and the tensors saved on the way.
struct Projected {
    z: linear::Saved,
    raw: Option<[Array; 2]>,
    q: Array,
    k: Array,
    v: Array,
}

impl Pass<'_> {
    fn fusion(self) -> Option<Fusion> {
        match self.geometry.qkv {
            Qkv::Separate => None,
            Qkv::EndToEnd => Some(Fusion::EndToEnd),
            Qkv::PerHead => Some(Fusion::Grouped { groups: self.block.heads.q }),
        }
    }

    /// x (N, W), rotated by its positions if this layer has RoPE.
    fn rotate(self, x: Array, positions: &[u32], direction: Direction) -> Result<Array> {
        match self.rotation(positions) {
            Some((table, positions)) => rope::rotate(&x, positions, table, direction),
            None => Ok(x),
        }
    }

    /// The table and the positions that this layer rotates q and k by, if it has RoPE.
    fn rotation<'p>(self, positions: &'p [u32]) -> Option<(&'p RopeTable, &'p [u32])>
    where
        Self: 'p,
    {
        self.block.rotation.map(|i| (&self.geometry.rope_tables[i], positions))
    }

    /// q, k and v before their rotation.
    fn project(self, x: &Array) -> Result<Projected> {
        let h = before(&self.block.attention_norms.before, x, self.operand())?;
        let (outputs, z) = linear::forward(&h, &self.parts(0..self.attention_out()), None)?;
        drop(h);
        let heads = self.block.heads;
        let [q, k, v] = match self.fusion() {
            None => take(outputs),
            Some(fusion) => {
                let [fused] = take(outputs);
                take(columns::split(&fused, &[heads.q, heads.kv, heads.kv].map(|n| n * heads.dim), fusion)?)
            }
        };
        let (q, k, raw) = match &self.block.qk_norms {
            None => (q, k, None),
            Some([q_norm, k_norm]) => (q_norm.forward(&q)?, k_norm.forward(&k)?, Some([q, k])),
        };
        Ok(Projected { z, raw, q, k, v })
    }

    fn project_and_rotate(self, positions: &[u32], x: &Array) -> Result<Projected> {
        let Projected { z, raw, q, k, v } = self.project(x)?;
        let (q, k) = (self.rotate(q, positions, Direction::Forward)?, self.rotate(k, positions, Direction::Forward)?);
        Ok(Projected { z, raw, q, k, v })
    }

    /// x2 (N, D) of x (N, D), and the tensors saved for the backward.
    pub(super) fn attention(self, layout: Layout<'_>, x: &Array) -> Result<(Array, AttentionSaved)> {
        let Projected { z: z_qkv, raw, q, k, v } = self.project_and_rotate(layout.positions, x)?;
        let o = attention::forward(&q, &k, &v, layout.sequences, self.block.heads)?;
        let end = self.join(&self.block.attention_norms);
        let (x2, z_o, join) = end.forward(&o, self.part(self.attention_out()), x)?;
        Ok((x2, AttentionSaved { z_qkv, raw, q, k, v, o, z_o, join }))
    }

    /// x2 (N, D) of x (N, D); saves nothing. `read_kv` gets the keys and values, (N, kv * dim) each.
    pub(super) fn attention_only(
        self,
        layout: Layout<'_>,
        x: &Array,
        read_kv: impl FnOnce(&Array, &Array) -> Result<()>,
    ) -> Result<Array> {
        let Projected { q, k, v, .. } = self.project_and_rotate(layout.positions, x)?;
        let o = attention::forward(&q, &k, &v, layout.sequences, self.block.heads)?;
        read_kv(&k, &v)?;
        drop((q, k, v));
        Ok(self.join(&self.block.attention_norms).forward(&o, self.part(self.attention_out()), x)?.0)
    }

    /// x2 (S, D) of x (S, D): one new token per sequence; its keys and values are appended to the cache.
    pub(super) fn attention_step(self, positions: &[u32], x: &Array, cache: &mut KvCache) -> Result<Array> {
        let Projected { q, k, v, .. } = self.project(x)?;
        let o = attention::step(q, k, &v, self.rotation(positions), cache, self.block.heads)?;
        drop(v);
        Ok(self.join(&self.block.attention_norms).forward(&o, self.part(self.attention_out()), x)?.0)
    }

    /// dL/dx (N, D), `None` if unused, of dL/df (N, D) at the output of attention's output projection; `skip` (N, D) is
    /// the gradient of the residual path.
    #[expect(
        clippy::too_many_arguments,
        reason = "a backward needs its forward's inputs, saved tensors and output gradients"
    )]
    pub(super) fn attention_backward(
        self,
        layout: Layout<'_>,
        x: &Array,
        saved: &AttentionSaved,
        df: &Array,
        skip: &Array,
        wanted: InputGradient,
        grads: &mut BlockGradients,
    ) -> Result<Option<Array>> {
        let out = self.attention_out();
        let g = linear::backward(&saved.o, &[self.part_back(out, wanted)], &saved.z_o, &[df], InputGradient::Wanted)?;
        let d_o = store_and_take_input(grads, out, g)?;
        let (dq, dk, dv) = attention::backward(&saved.q, &saved.k, &saved.v, layout.sequences, self.block.heads, &d_o)?;
        let dq = self.rotate(dq, layout.positions, Direction::Back)?;
        let dk = self.rotate(dk, layout.positions, Direction::Back)?;
        let (dq, dk) = match (&self.block.qk_norms, &saved.raw) {
            (Some([q_norm, k_norm]), Some([q, k])) => (q_norm.backward(q, &dq, None)?, k_norm.backward(k, &dk, None)?),
            _ => (dq, dk),
        };
        let h = before(&self.block.attention_norms.before, x, self.operand())?;
        let parts = self.parts_back(0..out, wanted);
        let g = match self.fusion() {
            None => linear::backward(&h, &parts, &saved.z_qkv, &[&dq, &dk, &dv], wanted)?,
            Some(fusion) => {
                let fused = columns::join(&[&dq, &dk, &dv], fusion)?;
                linear::backward(&h, &parts, &saved.z_qkv, &[&fused], wanted)?
            }
        };
        if wanted == InputGradient::Unused {
            store(grads, 0, g.lora);
            return Ok(None);
        }
        let dh = store_and_take_input(grads, 0, g)?;
        drop(h);
        before_backward(&self.block.attention_norms.before, x, &dh, skip).map(Some)
    }
}
