//! The matrix multiplications of attention by vectors, in f32.

use std::ops::Range;

use super::head::{HeadRows, PackedHead};
use crate::ops::cpu::buffers::{Aligned, Scratch};
use crate::ops::cpu::tile::{MR, NR};
use crate::ops::cpu::transpose::interleave;
use crate::ops::cpu::vectors::MicroKernel;

/// Left-hand tiles: keys [group of MR][channel][MR], values [group of MR channels][key][MR].
pub(super) struct VectorHead {
    keys: Aligned,
    values: Aligned,
    count: usize,
    width: usize,
}

impl PackedHead for VectorHead {
    const GROUP: usize = MR;
    type Queries = (MicroKernel, Scratch);

    fn pack(k: HeadRows<'_>, v: HeadRows<'_>) -> Self {
        let HeadRows { count, width, .. } = k;
        let mut keys = Aligned::zeros(count.next_multiple_of(MR) * width);
        for (g, tile) in keys.as_mut_slice().chunks_exact_mut(MR * width).enumerate() {
            // Rows past the last key repeat it; their scores are never read.
            let key = |i: usize| k.row((g * MR + i).min(count - 1));
            interleave::<MR>(&std::array::from_fn(key), tile);
        }
        let mut values = Aligned::zeros(width.next_multiple_of(MR) * count);
        for (g, tile) in values.as_mut_slice().chunks_mut(MR * count).enumerate() {
            let columns = g * MR..width.min((g + 1) * MR);
            for (key, slot) in tile.chunks_exact_mut(MR).enumerate() {
                let part = &v.row(key)[columns.clone()];
                match part.first_chunk::<MR>() {
                    Some(part) => slot.copy_from_slice(part),
                    None => slot[..part.len()].copy_from_slice(part),
                }
            }
        }
        Self { keys, values, count, width }
    }

    fn queries(panel: Scratch) -> Self::Queries {
        (MicroKernel::detect(), panel)
    }

    fn scores(&self, (kernel, panel): &mut Self::Queries, key0: usize, scores: &mut [f32]) {
        for (t, tile) in scores.chunks_exact_mut(MR * NR).enumerate() {
            let a = &self.keys.as_slice()[(key0 + t * MR) * self.width..];
            kernel.run(a, panel, tile, MR, false);
        }
    }

    fn add(
        &self,
        (kernel, _): &mut Self::Queries,
        keys: Range<usize>,
        weights: &mut [f32],
        sums: &mut [f32],
    ) {
        for (t, tile) in sums.chunks_exact_mut(MR * NR).enumerate() {
            let rows = MR.min(self.width - t * MR);
            let a = &self.values.as_slice()[(t * self.count + keys.start) * MR..];
            kernel.run(a, &weights[..keys.len() * NR], tile, rows, true);
        }
    }
}
