//! The product that everything else is made of: rows of activations times packed weights.
//!
//! Weights are packed into panels of [`NR`] columns ([`Packed`]); activations are packed block
//! by block into tiles of [`MR`] rows by whoever knows where they lie ([`Rows`]: a matrix, or the
//! receptive fields of a convolution). A register-blocked kernel multiplies a tile by a panel.
//! Every output element is summed over k in the same order whatever its neighbours, so a row's
//! result does not depend on the batch that it is in.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::activation::{Activation, gate};
#[cfg(target_arch = "x86_64")]
use super::amx;
use super::buffers::{Out, Scratch, written};
pub(crate) use super::packed::{NR, Packed};
use super::simd::{Isa, vectorized};

/// Rows of a tile: 12 x 2 accumulators of 16 lanes leave 8 of AVX-512's 32 registers free.
pub(crate) const MR: usize = 12;
/// Depth of a block: a panel block (KC x NR f32) fills two thirds of the first-level cache.
const KC: usize = 256;
/// Depth that is summed before it is stored. It may not depend on the number of rows: a row's sums
/// would too.
const DEPTH: usize = 3 * KC;
/// Rows of a block: MC x DEPTH f32 stay in the second-level cache while all panels pass.
const MC: usize = 384;

/// Tiles that a block keeps when it is made smaller for another thread to have one.
const FEWEST_TILES: usize = 3;
/// Panels that a task takes at least, since it packs its rows for them; fewer where a thread would
/// have none.
const FEWEST_PANELS: usize = 4;

/// Where the rows of the left matrix come from.
pub(crate) trait Rows: Sync {
    /// Where a row begins: found once for all of its runs.
    type Place: Copy;

    fn place(&self, row: usize) -> Self::Place;

    /// The rows of some places from column `k` to the end of the run of memory that the column is
    /// in. Runs end at the same columns in all rows.
    fn runs<const N: usize>(&self, places: &[Self::Place; N], k: usize) -> [&[f32]; N];
}

/// Packs rows `row0 ..` and columns `k0 .. k0 + tile.len() / MR` as [k][MR]. Places past the last
/// of `rows` repeat it.
fn pack_tile(a: &impl Rows, rows: usize, row0: usize, k0: usize, tile: &mut [f32]) {
    let places: [_; MR] = std::array::from_fn(|i| a.place((row0 + i).min(rows - 1)));
    let mut k = k0;
    let mut rest = tile;
    while !rest.is_empty() {
        let runs = a.runs(&places, k);
        let len = runs[0].len().min(rest.len() / MR);
        assert!(len > 0, "rows shorter than the weights are deep");
        let (part, tail) = rest.split_at_mut(len * MR);
        interleave(&runs.map(|run| &run[..len]), part);
        k += len;
        rest = tail;
    }
}

/// Writes N slices of one length n as the columns of `tile`, [n][N].
pub(crate) fn interleave<const N: usize>(rows: &[&[f32]; N], tile: &mut [f32]) {
    let tile: *mut [f32] = tile;
    // SAFETY: the same floats, borrowed as a whole, and into_columns() writes floats alone.
    into_columns(rows, unsafe { &mut *(tile as *mut [MaybeUninit<f32>]) });
}

/// As [`interleave`], for a tile that holds nothing yet: all of it is written.
pub(crate) fn into_columns<const N: usize>(rows: &[&[f32]; N], tile: &mut [MaybeUninit<f32>]) {
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

/// What is done to the result before it is stored. Gated weights know a bias, in the order of their
/// panels' columns, and a residual (rows, 2n), both added before the gate, and nothing else.
#[derive(Default, Clone, Copy)]
pub(crate) struct Epilogue<'a> {
    /// Added to every row, (n).
    pub(crate) bias: Option<&'a [f32]>,
    /// Added to every row of the sample that it belongs to, (samples, n) and rows per sample.
    pub(crate) row_bias: Option<(&'a [f32], usize)>,
    /// Added elementwise, (rows, n).
    pub(crate) residual: Option<&'a [f32]>,
    /// Of every element, last.
    pub(crate) activation: Option<Activation>,
}

impl Epilogue<'_> {
    /// Finishes `c`, which holds `columns` of a row of n.
    #[inline(always)]
    pub(crate) fn apply(&self, row: usize, n: usize, columns: &Range<usize>, c: &mut [f32]) {
        if let Some(bias) = self.bias {
            add(c, &bias[columns.clone()]);
        }
        if let Some((bias, rows)) = self.row_bias {
            add(c, &bias[row / rows * n..][columns.clone()]);
        }
        if let Some(residual) = self.residual {
            add(c, &residual[row * n..][columns.clone()]);
        }
        if let Some(activation) = self.activation {
            activation.apply(c);
        }
    }
}

#[inline(always)]
fn add(c: &mut [f32], d: &[f32]) {
    for (c, d) in c.iter_mut().zip(d) {
        *c += d;
    }
}

/// a (rows, k) x weights (k, n), then the epilogue: (rows, n).
pub(crate) fn gemm(
    rows: usize,
    a: &impl Rows,
    weights: &Packed,
    epilogue: Epilogue<'_>,
) -> Vec<f32> {
    if rows * weights.n == 0 {
        return Vec::new();
    }
    let kernel = Kernel::detect();
    let product = |out| Product { a, weights, epilogue, kernel, out };
    // SAFETY: run() covers the output with areas, and multiply() writes all of its area.
    unsafe { written(rows * weights.n, |out| product(out).run(rows)) }
}

pub(super) struct Product<'a, A> {
    pub(super) a: &'a A,
    pub(super) weights: &'a Packed,
    epilogue: Epilogue<'a>,
    kernel: Kernel,
    out: Out,
}

/// One task's rectangle of the output.
pub(super) struct Area {
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
}

/// How large the blocks of a product are.
struct Blocking {
    /// Rows of a tile; a divisor of MC.
    rows: usize,
    /// Depth that is summed before it is stored.
    depth: usize,
}

impl<A: Rows> Product<'_, A> {
    fn run(&self, rows: usize) {
        let panels = self.weights.n.div_ceil(self.weights.width());
        let blocking = self.blocking();
        // As much as stays in the second-level cache: fewer rows where a gate wants all of the depth.
        let most = MC.min(MC * blocking.depth / self.depth()).max(blocking.rows);
        let threads = rayon::current_num_threads();
        // Rows are parted first, into up to two blocks for each thread, and then the panels until
        // there are four tasks for each: every part of the panels packs its rows anew.
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
            #[cfg(target_arch = "x86_64")]
            if self.weights.tiled() {
                return amx::multiply(self, &area);
            }
            self.multiply(&area);
        });
    }

    fn blocking(&self) -> Blocking {
        #[cfg(target_arch = "x86_64")]
        if self.weights.tiled() {
            return Blocking { rows: amx::ROWS, depth: amx::DEPTH };
        }
        Blocking { rows: MR, depth: DEPTH }
    }

    /// What is summed before it is stored: all of it where a gate must meet its value.
    pub(super) fn depth(&self) -> usize {
        let k = self.weights.k;
        if self.weights.gated { k } else { self.blocking().depth.min(k) }
    }

    fn multiply(&self, area: &Area) {
        let (k, depth) = (self.weights.k, self.depth());
        let rows = area.rows.len().next_multiple_of(MR);
        let mut left = Scratch::new(rows * depth);
        // A panel of results, while it is summed and finished.
        let mut sums = Scratch::new(rows * NR);
        let mut wide = Scratch::new(KC * NR);
        for first in (0..k).step_by(depth) {
            let depth = depth.min(k - first);
            let left = &mut left[..rows * depth];
            for (t, tile) in left.chunks_exact_mut(MR * depth).enumerate() {
                pack_tile(self.a, area.rows.end, area.rows.start + t * MR, first, tile);
            }
            for p in area.panels.clone() {
                for k0 in (0..depth).step_by(KC) {
                    let kc = KC.min(depth - k0);
                    let panel = self.weights.panel(p, first + k0, kc, &mut wide);
                    let tiles = left.chunks_exact(MR * depth).zip(sums.chunks_exact_mut(MR * NR));
                    for (t, (tile, sums)) in tiles.enumerate() {
                        let rows = MR.min(area.rows.len() - t * MR);
                        self.kernel.run(&tile[k0 * MR..], panel, sums, rows, k0 > 0);
                    }
                }
                self.store(&area.rows, p, &mut sums, first..first + depth);
            }
        }
    }

    /// Takes the sums over `depth` of a panel into the output, and finishes it after the last.
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
    /// Sums [row][NR] become some columns of some rows of `out` (.., n), or are added to those;
    /// then the epilogue.
    fn put(
        sums: &[f32],
        accumulate: bool,
        out: Out,
        area: (&Range<usize>, &Range<usize>),
        n: usize,
        epilogue: Option<Epilogue<'_>>,
    ) {
        let (rows, columns) = area;
        for (row, sums) in rows.clone().zip(sums.chunks_exact(NR)) {
            // SAFETY: store() is given rows and a panel of the area of its task.
            let c = unsafe { out.slice(row * n + columns.start, columns.len()) };
            let sums = &sums[..columns.len()];
            let c = if accumulate {
                // SAFETY: the sums over the depth before have been written here.
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

/// A row-major matrix.
pub(crate) struct Matrix<'a> {
    /// All rows, one behind the other.
    pub(crate) data: &'a [f32],
    /// Elements of a row.
    pub(crate) stride: usize,
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

/// The register-blocked kernel of the processor at hand.
#[derive(Clone, Copy)]
pub(crate) struct Kernel(Isa);

impl Kernel {
    pub(crate) fn detect() -> Self {
        Self(Isa::detect())
    }

    /// c [rows][NR] (+)= a [k][MR] x b [k][NR], for as many k as b has.
    pub(crate) fn run(self, a: &[f32], b: &[f32], c: &mut [f32], rows: usize, accumulate: bool) {
        let k = b.len() / NR;
        assert!((1..=MR).contains(&rows), "gemm tile of {rows} rows");
        assert!(a.len() >= k * MR && c.len() >= rows * NR, "gemm tile");
        let tile = Tile { a: a.as_ptr(), b: b.as_ptr(), k, c: c.as_mut_ptr(), accumulate };
        // SAFETY: rows and lengths are asserted above, and the instructions of each arm were found
        // on this processor.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => x86::avx512(&tile, rows),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => x86::avx2(&tile, rows),
                Isa::Portable => portable(&tile, rows),
            }
        }
    }
}

struct Tile {
    a: *const f32,
    b: *const f32,
    k: usize,
    c: *mut f32,
    accumulate: bool,
}

/// The reference kernel, for every processor.
///
/// # Safety
/// The pointers of `tile` are valid for its k and for `rows` rows, MR at the most.
unsafe fn portable(tile: &Tile, rows: usize) {
    for i in 0..rows {
        let mut sum = [0f32; NR];
        for k in 0..tile.k {
            // SAFETY: k < tile.k and i < MR.
            let a = unsafe { *tile.a.add(k * MR + i) };
            // SAFETY: k < tile.k.
            let b = unsafe { std::slice::from_raw_parts(tile.b.add(k * NR), NR) };
            for (s, b) in sum.iter_mut().zip(b) {
                *s += a * b;
            }
        }
        // SAFETY: i < rows.
        let c = unsafe { std::slice::from_raw_parts_mut(tile.c.add(i * NR), NR) };
        for (c, s) in c.iter_mut().zip(&sum) {
            *c = if tile.accumulate { *c + s } else { *s };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    use super::{MR, NR, Tile};

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

    /// # Safety
    /// As `portable`, on a processor with AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(tile: &Tile, rows: usize) {
        // SAFETY: the caller's promise, passed on with the row count as a constant.
        unsafe {
            match rows {
                1 => rows512::<1>(tile),
                2 => rows512::<2>(tile),
                3 => rows512::<3>(tile),
                4 => rows512::<4>(tile),
                5 => rows512::<5>(tile),
                6 => rows512::<6>(tile),
                7 => rows512::<7>(tile),
                8 => rows512::<8>(tile),
                9 => rows512::<9>(tile),
                10 => rows512::<10>(tile),
                11 => rows512::<11>(tile),
                _ => rows512::<MR>(tile),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn rows512<const R: usize>(tile: &Tile) {
        let mut sum = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.k {
            // SAFETY: a and b advance k times by one step of the tile and the panel.
            unsafe {
                // Panels and tiles lie one behind the other: what comes from further away than the
                // first-level cache is on its way before it is needed.
                _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(64 * MR).cast());
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(32 * NR).cast());
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(32 * NR + 16).cast());
                let b0 = _mm512_loadu_ps(b);
                let b1 = _mm512_loadu_ps(b.add(16));
                for (i, sum) in sum.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(i));
                    sum[0] = _mm512_fmadd_ps(a, b0, sum[0]);
                    sum[1] = _mm512_fmadd_ps(a, b1, sum[1]);
                }
                a = a.add(MR);
                b = b.add(NR);
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (j, sum) in sum.iter().enumerate() {
                // SAFETY: i is below the number of rows.
                unsafe {
                    let c = tile.c.add(i * NR + j * 16);
                    let old =
                        if tile.accumulate { _mm512_loadu_ps(c) } else { _mm512_setzero_ps() };
                    _mm512_storeu_ps(c, _mm512_add_ps(old, *sum));
                }
            }
        }
    }

    /// # Safety
    /// As `portable`, on a processor with AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(tile: &Tile, rows: usize) {
        // Sixteen registers hold three rows of four vectors.
        for i in (0..rows).step_by(3) {
            // SAFETY: the caller's promise, for at most three rows from row i on.
            unsafe {
                let part = Tile { a: tile.a.add(i), c: tile.c.add(i * NR), ..*tile };
                match rows - i {
                    1 => rows256::<1>(&part),
                    2 => rows256::<2>(&part),
                    _ => rows256::<3>(&part),
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn rows256<const R: usize>(tile: &Tile) {
        let mut sum = [[_mm256_setzero_ps(); 4]; R];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.k {
            // SAFETY: a and b advance k times by one step of the tile and the panel.
            unsafe {
                for (i, sum) in sum.iter_mut().enumerate() {
                    let a = _mm256_set1_ps(*a.add(i));
                    for (j, sum) in sum.iter_mut().enumerate() {
                        *sum = _mm256_fmadd_ps(a, _mm256_loadu_ps(b.add(j * 8)), *sum);
                    }
                }
                a = a.add(MR);
                b = b.add(NR);
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (j, sum) in sum.iter().enumerate() {
                // SAFETY: i is below the number of rows.
                unsafe {
                    let c = tile.c.add(i * NR + j * 8);
                    let old =
                        if tile.accumulate { _mm256_loadu_ps(c) } else { _mm256_setzero_ps() };
                    _mm256_storeu_ps(c, _mm256_add_ps(old, *sum));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ops::numbers::{Numbers, Weight};
    use crate::ops::packed::Layout;
    use crate::ops::simd::tests::sets;
    use crate::ops::tests::random;

    #[test]
    fn every_kernel_agrees_with_the_sum_in_f64() {
        for kernel in sets().into_iter().map(Kernel) {
            for rows in 1..=MR {
                for kc in [1, 2, 7, 64, 255] {
                    let (a, b) = (random(kc * MR, 1), random(kc * NR, 2));
                    for accumulate in [false, true] {
                        let old = random(MR * NR, 3);
                        let mut c = old.clone();
                        kernel.run(&a, &b, &mut c, rows, accumulate);
                        for (at, got) in c.iter().map(|v| f64::from(*v)).enumerate() {
                            let (i, j, old) = (at / NR, at % NR, f64::from(old[at]));
                            let product = |k| f64::from(a[k * MR + i]) * f64::from(b[k * NR + j]);
                            let sum: f64 = (0..kc).map(product).sum();
                            let kept = if accumulate { old } else { 0.0 };
                            let want = if i < rows { kept + sum } else { old };
                            assert!((got - want).abs() < 1e-4, "{rows} {kc} {i} {j}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn any_shape_and_any_batch_give_the_same_rows() {
        let shapes = [
            (1, 1, 1),
            (13, 300, 33),
            (500, 17, 70),
            (30, DEPTH + 99, 40),
            (40, 600, 4),
            (3, 5, 257),
        ];
        let in_both = |shape| [(shape, Layout::F32), (shape, Layout::Bf16)];
        for ((rows, k, n), layout) in shapes.into_iter().flat_map(in_both) {
            let (a, bias) = (random(rows * k, 4), random(n, 6));
            // Numbers that bf16 has.
            let w: Vec<f32> =
                random(k * n, 5).iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
            let weight = Weight::Stored(Numbers::Floats(&w), &[n, k]);
            let packed = Packed::laid_out(&weight, 1, layout).unwrap();
            let matrix = Matrix { data: &a, stride: k };
            let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
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
