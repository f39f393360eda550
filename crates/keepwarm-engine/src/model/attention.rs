//! Paged attention: causal, grouped queries (Ainslie et al. 2023), over a sequence's blocks.
//!
//! Keys are taken in tiles of [`TILE`] absolute positions, so that a query's result does not depend on how
//! many other queries are computed with it: scores of a tile are one product, weights are one softmax over
//! the row, and values are summed tile by tile in order. Positions behind a query weigh exactly zero.

use candle_core::{Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::StepError;
use super::kv::KvCache;
use super::math::{product, softmax};
use super::weights::Geometry;

/// Keys of a tile: a multiple of the block size.
const TILE: usize = 256;
/// Rows that a product whose right side lies transposed needs for its fixed order.
const ROWS_MIN: usize = 8;

/// One sequence's queries in a layer.
pub(super) struct Queries<'a> {
    /// Rows of `heads * head_dim`, rotated.
    pub(super) rows: &'a [f32],
    pub(super) count: usize,
    /// Position of the first.
    pub(super) position: usize,
}

/// Attends with the heads of one KV head; gives `count` rows of `group * head_dim`.
pub(super) fn attend(
    g: &Geometry,
    kv: &dyn KvCache,
    layer: usize,
    kv_head: usize,
    queries: &Queries<'_>,
) -> Result<Vec<f32>, StepError> {
    let group = g.heads / g.kv_heads;
    let dim = g.head_dim;
    let count = queries.count * group;
    let padded = count.max(ROWS_MIN);
    let scale = 1.0 / (dim as f32).sqrt();
    let mut rows = vec![0.0; padded * dim];
    for query in 0..queries.count {
        let from = &queries.rows[query * g.width + kv_head * group * dim..][..group * dim];
        let to = &mut rows[query * group * dim..][..group * dim];
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from * scale);
    }
    let keys = queries.position + queries.count;
    let tiles = keys.div_ceil(TILE);
    let width = tiles * TILE;
    let left = Tensor::from_vec(rows, (padded, dim), &Device::Cpu)?;
    let mut scores = vec![0.0f32; count * width];
    for tile in 0..tiles {
        let right =
            Tensor::from_vec(gathered(g, kv, 2 * layer, kv_head, tile, keys), (TILE, dim), &Device::Cpu)?
                .t()?;
        let out = left.matmul(&right)?.flatten_all()?.to_vec1::<f32>()?;
        for row in 0..count {
            scores[row * width + tile * TILE..][..TILE].copy_from_slice(&out[row * TILE..][..TILE]);
        }
    }
    for row in 0..count {
        softmax(&mut scores[row * width..][..width], queries.position + row / group + 1);
    }
    let mut out = vec![0.0f32; count * dim];
    for tile in 0..tiles {
        let right =
            Tensor::from_vec(gathered(g, kv, 2 * layer + 1, kv_head, tile, keys), (TILE, dim), &Device::Cpu)?;
        let mut weights = Vec::with_capacity(count * TILE);
        for row in 0..count {
            weights.extend_from_slice(&scores[row * width + tile * TILE..][..TILE]);
        }
        let part = product(weights, count, TILE, &right)?;
        out.iter_mut().zip(&part).for_each(|(out, part)| *out += part);
    }
    Ok(out)
}

/// One head's rows of a tile, as f32; zeros from `keys` on.
fn gathered(
    g: &Geometry,
    kv: &dyn KvCache,
    plane: usize,
    kv_head: usize,
    tile: usize,
    keys: usize,
) -> Vec<f32> {
    let (dim, width) = (g.head_dim, g.kv_width());
    let mut packed = vec![f16::ZERO; TILE * dim];
    let end = keys.min((tile + 1) * TILE);
    let mut at = tile * TILE;
    while at < end {
        let rows = kv.plane(at / g.tokens_per_block, plane);
        let stop = end.min((at / g.tokens_per_block + 1) * g.tokens_per_block);
        for position in at..stop {
            let from = (position % g.tokens_per_block) * width + kv_head * dim;
            packed[(position - tile * TILE) * dim..][..dim].copy_from_slice(&rows[from..from + dim]);
        }
        at = stop;
    }
    packed.to_f32_vec()
}
