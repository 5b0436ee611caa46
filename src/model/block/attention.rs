//! The first half of a block: q, k, v of the normed input, their norms and rotation, attention, the way back into the
//! residual stream. Forward, one decoding step, and reverse.

use candle_core::{Result, Tensor};

use super::residual::{before, before_backward};
use super::{BlockGradients, Layout, Pass, Qkv, columns, cpu, keep, linear, store, take};
use crate::model::block::residual::JoinSaved;
use crate::ops::attention;
use crate::ops::attention::Cached;
use crate::ops::columns::Fusion;
use crate::ops::linear::InputGradient;
use crate::ops::rope;
use crate::ops::rope::Direction;

pub(super) struct AttentionSaved {
    z_qkv: linear::Saved,
    /// q and k before their norms, where they have any.
    raw: Option<[Tensor; 2]>,
    /// q and k as attention sees them.
    q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    o: Tensor,
    z_o: linear::Saved,
    pub(super) join: JoinSaved,
}

struct Projected {
    z: linear::Saved,
    raw: Option<[Tensor; 2]>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Pass<'_> {
    fn fusion(self) -> Option<Fusion> {
        match self.geometry.qkv {
            Qkv::Separate => None,
            Qkv::EndToEnd => Some(Fusion::EndToEnd),
            Qkv::PerHead => Some(Fusion::Grouped { groups: self.block.heads.q }),
        }
    }

    /// x (N, W) turned by its positions, where this layer turns at all.
    fn turned(self, x: Tensor, positions: &[u32], turn: Direction) -> Result<Tensor> {
        match self.block.rotation {
            Some(i) => rope::rotate(&x, positions, &self.geometry.angles[i], turn),
            None => Ok(x),
        }
    }

    fn project(self, positions: &[u32], x: &Tensor) -> Result<Projected> {
        let h = before(&self.block.attention_norms.before, x)?;
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
        let (q, k) = (self.turned(q, positions, Direction::Forward)?, self.turned(k, positions, Direction::Forward)?);
        Ok(Projected { z, raw, q, k, v })
    }

    /// x2 (N, D) of x (N, D), and what the reverse wants.
    pub(super) fn attention(self, layout: Layout<'_>, x: &Tensor) -> Result<(Tensor, AttentionSaved)> {
        let Projected { z: z_qkv, raw, q, k, v } = self.project(layout.positions, x)?;
        let o = attention::forward(&q, &k, &v, layout.spans, self.block.heads)?;
        let end = self.join(&self.block.attention_norms);
        let (x2, z_o, join) = end.forward(&o, self.part(self.attention_out()), x)?;
        Ok((x2, AttentionSaved { z_qkv, raw, q, k, v, o, z_o, join }))
    }

    /// x2 (N, D) of x (N, D), keeping nothing; `seen` is shown the keys and values, (N, kv * dim) each.
    pub(super) fn attention_only(
        self,
        layout: Layout<'_>,
        x: &Tensor,
        seen: impl FnOnce(&[f32], &[f32]),
    ) -> Result<Tensor> {
        let Projected { q, k, v, .. } = self.project(layout.positions, x)?;
        let o = attention::forward(&q, &k, &v, layout.spans, self.block.heads)?;
        seen(&cpu::view(&k)?, &cpu::view(&v)?);
        drop((q, k, v));
        Ok(self.join(&self.block.attention_norms).forward(&o, self.part(self.attention_out()), x)?.0)
    }

    /// x2 (S, D) of x (S, D): one new token a sequence, over the caches, which grow by it.
    pub(super) fn attention_step(self, positions: &[u32], x: &Tensor, caches: &mut [Cached]) -> Result<Tensor> {
        let Projected { q, k, v, .. } = self.project(positions, x)?;
        let width = self.block.heads.kv * self.block.heads.dim;
        {
            let (k, v) = (cpu::view(&k)?, cpu::view(&v)?);
            for ((cache, k), v) in caches.iter_mut().zip(k.chunks_exact(width)).zip(v.chunks_exact(width)) {
                cache.extend(k, v);
            }
        }
        let o = attention::decode(&q, &caches.iter().collect::<Vec<_>>(), self.block.heads)?;
        drop((q, k, v));
        Ok(self.join(&self.block.attention_norms).forward(&o, self.part(self.attention_out()), x)?.0)
    }

    /// dL/dx (N, D), `None` where unused, of dL/df (N, D) at attention's output map, and of what comes `past` the half.
    #[expect(clippy::too_many_arguments, reason = "a backward takes what its forward took, kept and gave")]
    pub(super) fn attention_backward(
        self,
        layout: Layout<'_>,
        x: &Tensor,
        kept: &AttentionSaved,
        df: &Tensor,
        past: &Tensor,
        wanted: InputGradient,
        grads: &mut BlockGradients,
    ) -> Result<Option<Tensor>> {
        let out = self.attention_out();
        let g = linear::backward(&kept.o, &[self.part(out)], &kept.z_o, &[df], InputGradient::Wanted)?;
        let d_o = keep(grads, out, g)?;
        let (dq, dk, dv) = attention::backward(&kept.q, &kept.k, &kept.v, layout.spans, self.block.heads, &d_o)?;
        let dq = self.turned(dq, layout.positions, Direction::Back)?;
        let dk = self.turned(dk, layout.positions, Direction::Back)?;
        let (dq, dk) = match (&self.block.qk_norms, &kept.raw) {
            (Some([q_norm, k_norm]), Some([q, k])) => (q_norm.backward(q, &dq, None)?, k_norm.backward(k, &dk, None)?),
            _ => (dq, dk),
        };
        let h = before(&self.block.attention_norms.before, x)?;
        let parts = self.parts(0..out);
        let g = match self.fusion() {
            None => linear::backward(&h, &parts, &kept.z_qkv, &[&dq, &dk, &dv], wanted)?,
            Some(fusion) => {
                let fused = columns::join(&[&dq, &dk, &dv], fusion)?;
                linear::backward(&h, &parts, &kept.z_qkv, &[&fused], wanted)?
            }
        };
        if wanted == InputGradient::Unused {
            store(grads, 0, g.lora);
            return Ok(None);
        }
        let dh = keep(grads, 0, g)?;
        drop(h);
        before_backward(&self.block.attention_norms.before, x, &dh, past).map(Some)
    }
}
