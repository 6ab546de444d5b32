//! The keys and values of a head, where they are in memory and packed for the micro-kernels.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use crate::ops::cpu::buffers::Scratch;
use crate::ops::cpu::host::floats;
use crate::ops::cpu::product::Rows;
use crate::ops::cpu::tile::MR;

/// Keys of a block: BLOCK x NR probabilities stay in L1d.
pub(in crate::ops) const BLOCK: usize = 16 * MR;

/// A (B, L, C) tensor in host memory whose rows may be strided, locked while its data is read.
pub(super) struct Strided<'a> {
    storage: candle_core::StorageRef<'a>,
    start: usize,
    batch: usize,
    row: usize,
}

/// Its data.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    batch: usize,
    row: usize,
}

impl<'a> Strided<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match *layout.stride() {
            [batch, row, 1] => Ok(Self { storage, start: layout.start_offset(), batch, row }),
            ref other => bail!("attention wants dense channels, got strides {other:?}"),
        }
    }

    pub(super) fn view(&self) -> Result<View<'_>> {
        let data = &floats(&self.storage)?[self.start..];
        Ok(View { data, batch: self.batch, row: self.row })
    }
}

impl View<'_> {
    pub(super) fn row(&self, sample: usize, row: usize, first: usize, width: usize) -> &[f32] {
        &self.data[sample * self.batch + row * self.row + first..][..width]
    }
}

/// The keys or values of one head of a sample: a matrix (count, width) of strided rows.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a> {
    pub(super) view: &'a View<'a>,
    pub(super) sample: usize,
    /// The first channel of the head.
    pub(super) first: usize,
    /// Keys.
    pub(super) count: usize,
    /// Channels of the head.
    pub(super) width: usize,
}

impl HeadRows<'_> {
    pub(super) fn row(&self, row: usize) -> &[f32] {
        self.view.row(self.sample, row, self.first, self.width)
    }
}

impl Rows for HeadRows<'_> {
    type Place = usize;

    fn place(&self, row: usize) -> usize {
        row
    }

    fn runs<const N: usize>(&self, rows: &[usize; N], k: usize) -> [&[f32]; N] {
        rows.map(|row| &self.row(row)[k..])
    }
}

/// Keys and values of one head, packed for the two matrix multiplications of attention.
pub(super) trait PackedHead: Send + Sync {
    /// Keys and channels of a group: a divisor of [`BLOCK`].
    const GROUP: usize;
    /// The queries of a task, and the micro-kernel.
    type Queries;

    fn pack(keys: HeadRows<'_>, values: HeadRows<'_>) -> Self;

    /// From queries [channel][NR].
    fn queries(panel: Scratch) -> Self::Queries;

    /// Computes the scores [key][NR] of the keys from `key0` on, in whole groups.
    fn scores(&self, queries: &mut Self::Queries, key0: usize, scores: &mut [f32]);

    /// Adds to `sums`, [channel][NR] in whole groups, the values of `keys` weighted by `weights`,
    /// [key][NR] in whole groups: rows past the last key are undefined.
    fn add(
        &self,
        queries: &mut Self::Queries,
        keys: Range<usize>,
        weights: &mut [f32],
        sums: &mut [f32],
    );
}
