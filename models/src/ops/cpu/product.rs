//! A matrix multiplication while it is computed: its operands, and how sums become its result.

use std::ops::Range;

use super::activation::gate;
use super::buffers::SharedOutput;
use super::epilogue::{HostEpilogue, add};
use super::packed::Packed;
use super::simd::vectorized;
use super::tile::NR;

/// The rows of the left matrix, wherever they are in memory: a matrix, or the receptive fields of a
/// convolution (implicit im2col).
pub(super) trait Rows: Sync {
    /// Where a row begins: computed once for all of its runs.
    type Place: Copy;

    fn place(&self, row: usize) -> Self::Place;

    /// The rows at some places from column `k` to the end of its run: of the memory that is
    /// consecutive. Runs end at the same columns in all rows.
    fn runs<const N: usize>(&self, places: &[Self::Place; N], k: usize) -> [&[f32]; N];
}

/// A row-major matrix.
pub(super) struct Matrix<'a> {
    /// All rows, consecutive.
    pub(super) data: &'a [f32],
    /// Elements of a row.
    pub(super) stride: usize,
}

impl<'a> Rows for Matrix<'a> {
    type Place = &'a [f32];

    fn place(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.stride]
    }

    fn runs<const N: usize>(&self, places: &[&'a [f32]; N], k: usize) -> [&[f32]; N] {
        places.map(|row| &row[k..])
    }
}

/// rows (rows, k) x weights (k, n), then the epilogue, to `out` (rows, n).
pub(super) struct Product<'a, A> {
    pub(super) a: &'a A,
    pub(super) weights: &'a Packed,
    pub(super) epilogue: HostEpilogue<'a>,
    pub(super) out: SharedOutput,
}

/// The rectangle of the output that one task computes.
pub(super) struct Area {
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
}

impl<A: Rows> Product<'_, A> {
    /// K that is accumulated before it is stored: all of it where a gate must meet its value.
    pub(super) fn depth(&self) -> usize {
        let k = self.weights.k;
        if self.weights.gated { k } else { self.weights.blocking().depth.min(k) }
    }

    /// Adds the sums over `depth` of a panel to the output; the epilogue or the gate follows the
    /// last.
    pub(super) fn store(
        &self,
        rows: &Range<usize>,
        p: usize,
        sums: &mut [f32],
        depth: Range<usize>,
    ) {
        let Packed { k, n, gated, .. } = *self.weights;
        let width = self.weights.width();
        let columns = p * width..n.min((p + 1) * width);
        if gated {
            if let Some(residual) = self.epilogue.residual {
                for (row, sums) in rows.clone().zip(sums.chunks_exact_mut(NR)) {
                    let (values, gates) = sums.split_at_mut(width);
                    let (of_values, of_gates) = residual[row * 2 * n..][..2 * n].split_at(n);
                    add(values, &of_values[columns.clone()]);
                    add(gates, &of_gates[columns.clone()]);
                }
            }
            let bias = self.epilogue.bias.map(|bias| &bias[p * NR..][..NR]);
            gate(&mut sums[..rows.len() * NR], bias.unwrap_or(&[0.0; NR]));
        }
        let epilogue = (depth.end == k && !gated).then_some(self.epilogue);
        put(sums, depth.start > 0, self.out, (rows, &columns), n, epilogue);
    }
}

vectorized! {
    /// Writes sums [row][NR] to some columns of some rows of `out` (.., n), or adds them to those;
    /// then the epilogue.
    fn put(
        sums: &[f32],
        accumulate: bool,
        out: SharedOutput,
        area: (&Range<usize>, &Range<usize>),
        n: usize,
        epilogue: Option<HostEpilogue<'_>>,
    ) {
        let (rows, columns) = area;
        for (row, sums) in rows.clone().zip(sums.chunks_exact(NR)) {
            // SAFETY: store() is given rows and a panel of its own task's area.
            let c = unsafe { out.slice(row * n + columns.start, columns.len()) };
            let sums = &sums[..columns.len()];
            let c = if accumulate {
                // SAFETY: the sums over the K before have been written here.
                let c = unsafe { c.assume_init_mut() };
                add(c, sums);
                c
            } else {
                c.write_copy_of_slice(sums)
            };
            if let Some(epilogue) = epilogue {
                epilogue.apply(row, n, columns, c);
            }
        }
    }
}
