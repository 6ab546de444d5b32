//! Transposition of a few rows into the columns of a tile.

use std::mem::MaybeUninit;

/// Transposes N slices of one length n into `tile`, [n][N].
pub(super) fn interleave<const N: usize>(rows: &[&[f32]; N], tile: &mut [f32]) {
    let tile: *mut [f32] = tile;
    // SAFETY: the same floats, borrowed as a whole, and into_columns() writes floats alone.
    into_columns(rows, unsafe { &mut *(tile as *mut [MaybeUninit<f32>]) });
}

/// As [`interleave`], for a tile that is not initialised: all of it is written.
pub(super) fn into_columns<const N: usize>(rows: &[&[f32]; N], tile: &mut [MaybeUninit<f32>]) {
    const { assert!(N.is_multiple_of(4), "squares of four") };
    let len = rows[0].len();
    assert!(tile.len() == len * N && rows.iter().all(|row| row.len() == len), "interleave");
    #[cfg(target_arch = "x86_64")]
    let done = len / 4 * 4;
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    #[cfg(target_arch = "x86_64")]
    for k in (0..done).step_by(4) {
        // SAFETY: four columns from k on lie inside every row, and the tile holds them.
        unsafe { x86::interleave4(rows, k, tile) };
    }
    for (k, column) in tile.chunks_exact_mut(N).enumerate().skip(done) {
        for (value, row) in column.iter_mut().zip(rows) {
            value.write(row[k]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    /// Transposes columns k .. k + 4 of the rows into the tile, in squares of four.
    ///
    /// # Safety
    /// Every row has k + 4 elements and the tile (k + 4) * N; N is a multiple of four.
    pub(super) unsafe fn interleave4<const N: usize>(
        rows: &[&[f32]; N],
        k: usize,
        tile: &mut [MaybeUninit<f32>],
    ) {
        for i in (0..N).step_by(4) {
            // SAFETY: the caller's promise; SSE is part of the architecture.
            unsafe {
                let load = |j: usize| _mm_loadu_ps(rows[i + j].as_ptr().add(k));
                let (mut a, mut b, mut c, mut d) = (load(0), load(1), load(2), load(3));
                _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
                for (j, column) in [a, b, c, d].into_iter().enumerate() {
                    _mm_storeu_ps(tile.as_mut_ptr().add((k + j) * N + i).cast(), column);
                }
            }
        }
    }
}
