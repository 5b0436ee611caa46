//! Causal attention over ragged batches on tensor cores, forward and backward, without scores in memory: operands of two
//! bytes, heads of up to 128 numbers. Kernels are in gpu_tiles.cu. It does not depend on layers. Read `gpu.rs` beside it for the
//! choice between this and panels.

use anyhow::Result;

use super::Heads;
use super::gpu::{DeviceSequences, Pass};
use crate::device::{Arguments, Element, Matrix, Ptr};
use crate::ops::launch::{size, variant};

#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionTiles {
    q: Ptr,
    k: Ptr,
    v: Ptr,
    o: Ptr,
    tiles: Ptr,
    heads: u32,
    kv: u32,
    dim: u32,
    window: u32,
    wide: u32,
    scale: f32,
    cap: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionTilesBackward {
    q: Ptr,
    k: Ptr,
    v: Ptr,
    d_o: Ptr,
    dq: Ptr,
    dk: Ptr,
    dv: Ptr,
    stats: Ptr,
    tiles: Ptr,
    heads: u32,
    kv: u32,
    dim: u32,
    window: u32,
    wide: u32,
    scale: f32,
    cap: f32,
}

/// The kernel of a name for heads of up to 64 numbers and the one for up to 128.
macro_rules! tiles_arguments {
    ($narrow:ident, $wide:ident, $fields:ident, $name:literal) => {
        #[repr(transparent)]
        struct $narrow($fields);
        // SAFETY: the fields are those of the struct of this name in gpu_tiles.cu.
        unsafe impl Arguments for $narrow {
            const NAME: &'static str = concat!($name, "_64");
            const BLOCK: u32 = 128;
        }
        #[repr(transparent)]
        struct $wide($fields);
        // SAFETY: as above.
        unsafe impl Arguments for $wide {
            const NAME: &'static str = concat!($name, "_128");
            const BLOCK: u32 = 128;
        }
    };
}
tiles_arguments!(Forward64, Forward128, AttentionTiles, "attention_tiles");
tiles_arguments!(QueryGradient64, QueryGradient128, AttentionTilesBackward, "attention_tiles_dq");
tiles_arguments!(KeyGradient64, KeyGradient128, AttentionTilesBackward, "attention_tiles_dkv");

/// Queries of a tile.
const TILE: usize = 64;
/// The widest head whose scores are kept in tiles.
const WIDEST_OF_TILES: usize = 128;

/// Does the tensor cores' way take these heads?
pub(super) fn fits(element: Element, heads: Heads) -> bool {
    element != Element::F32 && heads.dim <= WIDEST_OF_TILES
}

/// Every tile of rows of the batch, those that see most keys first: its sequence's first row and length, its first row there
/// and the keys that may be seen.
fn tiles(batch: &DeviceSequences) -> Result<Vec<[u32; 4]>> {
    let mut all = vec![];
    for (s, ends) in batch.cu_seqlens.windows(2).enumerate() {
        let length = ends[1] - ends[0];
        for row in (0..length).step_by(TILE) {
            let numbers = [ends[0], length, row, batch.key_len(s).min(length)];
            all.push(numbers.map(|n| size("attention tiles", n)));
        }
    }
    let mut all = all.into_iter().map(|[a, b, c, d]| Ok([a?, b?, c?, d?])).collect::<Result<Vec<_>>>()?;
    all.sort_by_key(|tile| std::cmp::Reverse(tile[2]));
    Ok(all)
}

/// Can all of these be read eight numbers at a time?
fn are_wide(heads: Heads, matrices: &[&Matrix]) -> bool {
    let aligned =
        |m: &&Matrix| m.input("attention", m.element(), 0).is_ok_and(|at| at.aligned("attention", 16).is_ok());
    heads.dim.is_multiple_of(8) && matrices.iter().all(aligned)
}

/// The forward on tensor cores, which holds no scores in memory.
pub(super) fn forward(pass: &Pass<'_>, [q, k, v]: [&Matrix; 3]) -> Result<Matrix> {
    let (device, heads, element) = (&pass.device, pass.heads, q.element());
    let o = device.matrix(element, q.rows(), q.cols())?;
    let all = tiles(pass.batch)?;
    let tiles = device.indices(all.as_flattened())?;
    let arguments = AttentionTiles {
        q: q.input("attention q", element, q.len())?,
        k: k.input("attention k", element, k.len())?,
        v: v.input("attention v", element, v.len())?,
        o: o.output("attention o", element, o.len())?,
        tiles: tiles.input("attention tiles", Element::U32, 4 * all.len())?.aligned("attention tiles", 16)?,
        heads: size("heads", heads.q)?,
        kv: size("heads", heads.kv)?,
        dim: size("head", heads.dim)?,
        window: heads.window.map_or(Ok(0), |w| size("attention window", w))?,
        wide: u32::from(are_wide(heads, &[q, k, v, &o])),
        scale: heads.scale,
        cap: heads.soft_cap.unwrap_or(0.0),
    };
    let (kernel, grid) = (variant("attention", &[element])?, [size("tiles", all.len())?, size("heads", heads.q)?, 1]);
    match heads.dim <= 64 {
        true => device.launch(kernel, grid, Forward64(arguments))?,
        false => device.launch(kernel, grid, Forward128(arguments))?,
    }
    Ok(o)
}

/// The backward on tensor cores.
pub(super) fn backward(pass: &Pass<'_>, [q, k, v, d_o]: [&Matrix; 4]) -> Result<(Matrix, Matrix, Matrix)> {
    let (device, heads, element) = (&pass.device, pass.heads, q.element());
    let room = |like: &Matrix| device.matrix(element, like.rows(), like.cols());
    let (dq, dk, dv) = (room(q)?, room(k)?, room(v)?);
    let stats = device.matrix(Element::F32, q.rows(), 2 * heads.q)?;
    let of_queries = tiles(pass.batch)?;
    let of_keys: Vec<[u32; 4]> = of_queries.iter().rev().copied().collect();
    let (query_tiles, key_tiles) =
        (device.indices(of_queries.as_flattened())?, device.indices(of_keys.as_flattened())?);
    let arguments = |tiles: &Matrix| -> Result<AttentionTilesBackward> {
        Ok(AttentionTilesBackward {
            q: q.input("attention q", element, q.len())?,
            k: k.input("attention k", element, k.len())?,
            v: v.input("attention v", element, v.len())?,
            d_o: d_o.input("attention do", element, d_o.len())?,
            dq: dq.output("attention dq", element, dq.len())?,
            dk: dk.output("attention dk", element, dk.len())?,
            dv: dv.output("attention dv", element, dv.len())?,
            stats: stats.output("attention stats", Element::F32, stats.len())?,
            tiles: tiles.input("attention tiles", Element::U32, tiles.len())?.aligned("attention tiles", 16)?,
            heads: size("heads", heads.q)?,
            kv: size("heads", heads.kv)?,
            dim: size("head", heads.dim)?,
            window: heads.window.map_or(Ok(0), |w| size("attention window", w))?,
            wide: u32::from(are_wide(heads, &[q, k, v, d_o, &dq, &dk, &dv])),
            scale: heads.scale,
            cap: heads.soft_cap.unwrap_or(0.0),
        })
    };
    let (kernel, count) = (variant("attention backward", &[element])?, size("tiles", of_queries.len())?);
    let (by_query, by_key) = ([count, size("heads", heads.q)?, 1], [count, size("heads", heads.kv)?, 1]);
    let (queries, keys) = (arguments(&query_tiles)?, arguments(&key_tiles)?);
    match heads.dim <= 64 {
        true => {
            device.launch(kernel.clone(), by_query, QueryGradient64(queries))?;
            device.launch(kernel, by_key, KeyGradient64(keys))?;
        }
        false => {
            device.launch(kernel.clone(), by_query, QueryGradient128(queries))?;
            device.launch(kernel, by_key, KeyGradient128(keys))?;
        }
    }
    Ok((dq, dk, dv))
}
