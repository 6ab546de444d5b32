//! The matrix multiplications of attention by AMX: 32 keys, and then 32 channels, times 32 queries.

use std::ops::Range;

use half::bf16;

use super::head::{BLOCK, HeadRows, PackedHead};
use crate::ops::cpu::amx::AmxUnit;
use crate::ops::cpu::amx_gemm::pack_rows;
use crate::ops::cpu::bf16::{narrow, rounded};
use crate::ops::cpu::buffers::{Aligned, Scratch};
use crate::ops::cpu::simd::vectorized;
use crate::ops::cpu::tile::{AMX_ROWS, NR, STEP};

/// Keys [group][step of channels][AMX_ROWS][STEP], values [group of channels][step of
/// keys][AMX_ROWS][STEP], zeros after the last.
pub(super) struct AmxHead {
    keys: Aligned<bf16>,
    values: Aligned<bf16>,
    /// Keys in a group of values.
    count: usize,
    /// Channels in a group of keys.
    width: usize,
}

/// Queries in VNNI pairs of channels, and room for weights in VNNI pairs of keys.
pub(super) struct AmxQueries {
    unit: AmxUnit,
    panel: Scratch,
    weights: Scratch,
}

impl PackedHead for AmxHead {
    const GROUP: usize = AMX_ROWS;
    type Queries = AmxQueries;

    fn pack(k: HeadRows<'_>, v: HeadRows<'_>) -> Self {
        let (count, width) = (k.count.next_multiple_of(STEP), k.width.next_multiple_of(STEP));
        let mut line = Scratch::new(width / 2);
        let line = line.halves();
        let mut keys = Aligned::zeros(count * width);
        for (g, tile) in keys.as_mut_slice().chunks_exact_mut(AMX_ROWS * width).enumerate() {
            pack_rows(&k, g * AMX_ROWS..k.count, 0..k.width, line, tile);
        }
        let mut values = Aligned::zeros(width * count);
        for key in 0..v.count {
            narrow(v.row(key), &mut line[..v.width]);
            for (c, value) in line[..v.width].iter().enumerate() {
                let row = (c / AMX_ROWS * count + key / STEP * STEP) + c % AMX_ROWS;
                values.as_mut_slice()[row * STEP + key % STEP] = *value;
            }
        }
        Self { keys, values, count, width }
    }

    fn queries(panel: Scratch) -> AmxQueries {
        let padded = (panel.len() / NR).next_multiple_of(STEP);
        let mut rows = Scratch::new(padded * NR);
        rows[..panel.len()].copy_from_slice(&panel);
        rows[panel.len()..].fill(0.0);
        let mut panel = Scratch::new(padded / 2 * NR);
        pair(&rows, &mut panel);
        AmxQueries { unit: AmxUnit::new(), panel, weights: Scratch::new(BLOCK / 2 * NR) }
    }

    fn scores(&self, queries: &mut AmxQueries, key0: usize, scores: &mut [f32]) {
        let AmxQueries { unit, panel, .. } = queries;
        let keys = self.keys.as_slice()[key0 * self.width..].chunks_exact(AMX_ROWS * self.width);
        for (keys, scores) in keys.zip(scores.as_chunks_mut().0) {
            unit.block(keys, panel.halves(), scores, false);
        }
    }

    fn add(
        &self,
        queries: &mut AmxQueries,
        keys: Range<usize>,
        weights: &mut [f32],
        sums: &mut [f32],
    ) {
        let AmxQueries { unit, weights: pairs, .. } = queries;
        let depth = weights.len() / NR;
        weights[keys.len() * NR..].fill(0.0);
        pair(weights, &mut pairs[..depth / 2 * NR]);
        let pairs = &pairs.halves()[..depth * NR];
        let values = self.values.as_slice().chunks_exact(AMX_ROWS * self.count);
        for (values, sums) in values.zip(sums.as_chunks_mut().0) {
            let values = &values[keys.start * AMX_ROWS..][..depth * AMX_ROWS];
            unit.block(values, pairs, sums, true);
        }
    }
}

vectorized! {
    /// Rows [k][NR] rounded to bf16 in VNNI layout, [k / 2][NR][2]: a pair in the place of one f32.
    fn pair(rows: &[f32], pairs: &mut [f32]) {
        for (rows, pairs) in rows.chunks_exact(2 * NR).zip(pairs.chunks_exact_mut(NR)) {
            let (first, second) = rows.split_at(NR);
            for ((pair, a), b) in pairs.iter_mut().zip(first).zip(second) {
                *pair = f32::from_bits(u32::from(rounded(*a)) | u32::from(rounded(*b)) << 16);
            }
        }
    }
}
