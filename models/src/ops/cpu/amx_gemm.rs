//! GEMM by AMX: weights in VNNI layout, activations rounded to bf16 while they are packed, sums in
//! f32. The order of a sum follows K alone, so the result of a row does not depend on its batch.

use std::ops::Range;

use half::bf16;

use super::amx::AmxUnit;
use super::bf16::narrow;
use super::buffers::Scratch;
use super::product::{Area, Product, Rows};
use super::tile::{AMX_KC, AMX_ROWS, NR, STEP};

/// An area of the output of a product whose weights are in VNNI layout.
pub(super) fn multiply(product: &Product<'_, impl Rows>, area: &Area) {
    let mut unit = AmxUnit::new();
    let (k, depth) = (product.weights.k, product.depth());
    let rows = area.rows.len().next_multiple_of(AMX_ROWS);
    let padded = depth.next_multiple_of(STEP);
    let (mut left, mut line) = (Scratch::new(rows * padded / 2), Scratch::new(padded / 2));
    // The results of a panel while they are accumulated.
    let mut sums = Scratch::new(rows * NR);
    for first in (0..k).step_by(depth) {
        let columns = first..k.min(first + depth);
        let padded = columns.len().next_multiple_of(STEP);
        let left = &mut left.halves()[..rows * padded];
        for (t, tile) in left.chunks_exact_mut(AMX_ROWS * padded).enumerate() {
            let rows = area.rows.start + t * AMX_ROWS..area.rows.end;
            pack_rows(product.a, rows, columns.clone(), line.halves(), tile);
        }
        for p in area.panels.clone() {
            for k0 in (0..padded).step_by(AMX_KC) {
                let k1 = padded.min(k0 + AMX_KC);
                let panel = product.weights.vnni(p, first + k0..first + k1);
                let blocks = left.chunks_exact(AMX_ROWS * padded).zip(sums.as_chunks_mut().0);
                for (tile, sums) in blocks {
                    unit.block(&tile[k0 * AMX_ROWS..k1 * AMX_ROWS], panel, sums, k0 > 0);
                }
            }
            product.store(&area.rows, p, &mut sums, columns.clone());
        }
    }
}

/// Packs the first AMX_ROWS of `rows`, rounded to bf16, as [step][AMX_ROWS][STEP], zeros after the
/// last of `columns`. Rows past the last are undefined: rows are independent.
pub(super) fn pack_rows(
    a: &impl Rows,
    rows: Range<usize>,
    columns: Range<usize>,
    line: &mut [bf16],
    tile: &mut [bf16],
) {
    let line = &mut line[..columns.len().next_multiple_of(STEP)];
    line[columns.len()..].fill(bf16::ZERO);
    for (i, row) in rows.take(AMX_ROWS).enumerate() {
        let place = [a.place(row)];
        let mut k = columns.start;
        while k < columns.end {
            let [run] = a.runs(&place, k);
            let run = &run[..run.len().min(columns.end - k)];
            narrow(run, &mut line[k - columns.start..][..run.len()]);
            k += run.len();
        }
        for (part, step) in line.chunks_exact(STEP).zip(tile.chunks_exact_mut(AMX_ROWS * STEP)) {
            step[i * STEP..][..STEP].copy_from_slice(part);
        }
    }
}
