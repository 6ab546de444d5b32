//! GEMM: rows of activations times packed weights.
//!
//! Weights are packed into panels of [`NR`] columns ([`Packed`]); activations are packed block by
//! block into tiles of [`MR`] rows, from wherever they are in memory ([`Rows`]). A micro-kernel of
//! vectors or of AMX multiplies a tile by a panel. Every output element is accumulated over K in
//! the same order whatever the number of rows, so the result of a row does not depend on its batch.
//!
//! [`NR`]: super::tile::NR

use rayon::prelude::*;

use super::amx_gemm;
use super::buffers::{Scratch, fill};
use super::epilogue::HostEpilogue;
use super::packed::Packed;
use super::product::{Area, Product, Rows};
use super::tile::{KC, MR, NR};
use super::transpose::interleave;
use super::vectors::MicroKernel;

/// Rows of a block: MC rows of its depth in f32 stay in L2 while all panels pass.
const MC: usize = 384;

/// Fewest tiles of a block that is made smaller so that every thread has one.
const FEWEST_TILES: usize = 3;
/// Fewest panels of a task, which packs its rows for them; fewer where a thread would have none.
const FEWEST_PANELS: usize = 4;

/// a (rows, k) x weights (k, n), then the epilogue: (rows, n).
pub(super) fn gemm(
    rows: usize,
    a: &impl Rows,
    weights: &Packed,
    epilogue: HostEpilogue<'_>,
) -> Vec<f32> {
    if rows * weights.n == 0 {
        return Vec::new();
    }
    let product = |out| Product { a, weights, epilogue, out };
    // SAFETY: run() covers the output with areas, and multiply() writes all of its area.
    unsafe { fill(rows * weights.n, |out| run(&product(out), rows)) }
}

/// Divides the output among tasks.
fn run(product: &Product<'_, impl Rows>, rows: usize) {
    let weights = product.weights;
    let panels = weights.n.div_ceil(weights.width());
    let blocking = weights.blocking();
    // As many rows as stay in L2: fewer where a gate needs all of K at once.
    let most = MC.min(MC * blocking.depth / product.depth()).max(blocking.rows);
    let threads = rayon::current_num_threads();
    // Rows are divided first, into up to two blocks per thread, and then the panels until there are
    // four tasks per thread: every chunk of panels packs its rows again.
    let worth = rows / (FEWEST_TILES * blocking.rows) / threads * threads;
    let blocks = rows.div_ceil(most).max(worth.min(2 * threads));
    let block_rows = rows.div_ceil(blocks).next_multiple_of(blocking.rows);
    let chunks = (4 * threads).div_ceil(blocks).min(panels);
    let chunk = panels.div_ceil(chunks).max(FEWEST_PANELS.min(panels.div_ceil(threads)));
    let chunks = panels.div_ceil(chunk);
    (0..blocks * chunks).into_par_iter().for_each(|task| {
        let (block, part) = (task / chunks, task % chunks);
        let first = block * block_rows;
        let area = Area {
            rows: first..rows.min(first + block_rows),
            panels: part * chunk..panels.min((part + 1) * chunk),
        };
        if area.rows.is_empty() {
            return;
        }
        if weights.is_vnni() {
            amx_gemm::multiply(product, &area);
        } else {
            multiply(product, &area);
        }
    });
}

/// An area of the output, by vectors.
fn multiply(product: &Product<'_, impl Rows>, area: &Area) {
    let kernel = MicroKernel::detect();
    let (k, depth) = (product.weights.k, product.depth());
    let rows = area.rows.len().next_multiple_of(MR);
    let mut left = Scratch::new(rows * depth);
    // The results of a panel while they are accumulated.
    let mut sums = Scratch::new(rows * NR);
    let mut wide = Scratch::new(KC * NR);
    for first in (0..k).step_by(depth) {
        let depth = depth.min(k - first);
        let left = &mut left[..rows * depth];
        for (t, tile) in left.chunks_exact_mut(MR * depth).enumerate() {
            pack_tile(product.a, area.rows.end, area.rows.start + t * MR, first, tile);
        }
        for p in area.panels.clone() {
            for k0 in (0..depth).step_by(KC) {
                let kc = KC.min(depth - k0);
                let panel = product.weights.panel(p, first + k0, kc, &mut wide);
                let tiles = left.chunks_exact(MR * depth).zip(sums.chunks_exact_mut(MR * NR));
                for (t, (tile, sums)) in tiles.enumerate() {
                    let rows = MR.min(area.rows.len() - t * MR);
                    kernel.run(&tile[k0 * MR..], panel, sums, rows, k0 > 0);
                }
            }
            product.store(&area.rows, p, &mut sums, first..first + depth);
        }
    }
}

/// Packs rows `row0 ..` and columns `k0 .. k0 + tile.len() / MR` as [k][MR]. Rows past the last of
/// `rows` repeat it.
fn pack_tile(a: &impl Rows, rows: usize, row0: usize, k0: usize, tile: &mut [f32]) {
    let places: [_; MR] = std::array::from_fn(|i| a.place((row0 + i).min(rows - 1)));
    let mut k = k0;
    let mut rest = tile;
    while !rest.is_empty() {
        let runs = a.runs(&places, k);
        let len = runs[0].len().min(rest.len() / MR);
        assert!(len > 0, "rows shorter than K");
        let (part, tail) = rest.split_at_mut(len * MR);
        interleave(&runs.map(|run| &run[..len]), part);
        k += len;
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ops::cpu::packed::PanelLayout;
    use crate::ops::cpu::product::Matrix;
    use crate::ops::cpu::tensor_data::{TensorData, Weight};
    use crate::ops::cpu::tile::Blocking;
    use crate::ops::tests::random;

    #[test]
    fn any_shape_and_any_batch_give_the_same_rows() {
        let shapes = [
            (1, 1, 1),
            (13, 300, 33),
            (500, 17, 70),
            (30, Blocking::VECTORS.depth + 99, 40),
            (40, 600, 4),
            (3, 5, 257),
        ];
        let in_both = |shape| [(shape, PanelLayout::F32), (shape, PanelLayout::Bf16)];
        for ((rows, k, n), layout) in shapes.into_iter().flat_map(in_both) {
            let (a, bias) = (random(rows * k, 4), random(n, 6));
            // Exact in bf16.
            let w: Vec<f32> =
                random(k * n, 5).iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
            let weight = Weight::Data(TensorData::Floats(&w), &[n, k]);
            let packed = Packed::new(&weight, 1, false, layout).unwrap();
            let matrix = Matrix { data: &a, stride: k };
            let epilogue = HostEpilogue { bias: Some(&bias), ..HostEpilogue::default() };
            let out = gemm(rows, &matrix, &packed, epilogue);
            for i in 0..rows {
                for j in 0..n {
                    let sum: f64 =
                        (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(w[j * k + x])).sum();
                    let want = sum + f64::from(bias[j]);
                    assert!((f64::from(out[i * n + j]) - want).abs() < 2e-4, "{i} {j}");
                }
            }
            let last = Matrix { data: &a[(rows - 1) * k..], stride: k };
            let alone = gemm(1, &last, &packed, epilogue);
            assert_eq!(alone, out[(rows - 1) * n..], "a row depends on its batch");
        }
    }
}
