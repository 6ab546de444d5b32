//! Sizes that packing and micro-kernels have in common.

/// Columns of a panel of weights: two AVX-512 vectors, or two AMX tiles.
pub(super) const NR: usize = 32;
/// Rows of a tile of the vector micro-kernels: 12 x 2 accumulators of 16 lanes leave 8 of AVX-512's
/// 32 registers free.
pub(super) const MR: usize = 12;
/// K of an AMX tile in bf16. VNNI panels are padded to a multiple of it.
pub(super) const STEP: usize = 32;
/// Rows and columns of an AMX tile of sums.
pub(super) const AMX_TILE: usize = 16;
/// Rows of a block of the AMX micro-kernel: two tiles.
pub(super) const AMX_ROWS: usize = 2 * AMX_TILE;

/// How a GEMM is cut into blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocking {
    /// Rows of a tile.
    pub(super) rows: usize,
    /// K that is accumulated before it is stored. It may not depend on the number of rows, or else
    /// the sums of a row would.
    pub(super) depth: usize,
}

/// K of a block of the vector kernels: a block of a panel (KC x NR f32) fills two thirds of L1d.
pub(super) const KC: usize = 256;
/// The same of AMX, in bf16.
pub(super) const AMX_KC: usize = 512;

impl Blocking {
    pub(super) const VECTORS: Self = Self { rows: MR, depth: 3 * KC };
    /// As many bytes of a row as in f32.
    pub(super) const AMX: Self = Self { rows: AMX_ROWS, depth: 3 * AMX_KC };
}
