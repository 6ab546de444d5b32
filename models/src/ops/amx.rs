//! Products of bf16 on the tiles of AMX: registers of 16 rows of 64 bytes, and an instruction that
//! adds the product of two of them to a third (Intel's manual, volume 1, chapter 18).
//!
//! Weights lie in pairs of rows ([`Packed::pairs`]), activations are rounded to bf16 while they are
//! packed, sums are f32. Four registers hold 32 x 32 sums, two times two the operands, so that each
//! of them is loaded once for two products. A sum's order follows the depth alone, so a row's
//! result does not depend on the batch that it is in. The products of attention are computed here
//! as well ([`Head`]).
//!
//! Rust's intrinsics for AMX are not stable (1.95), hence the assembly.
//!
//! [`Packed::pairs`]: super::packed::Packed::pairs

mod attention;

use std::arch::asm;
use std::ops::Range;
use std::sync::OnceLock;

use half::bf16;

use super::buffers::Scratch;
use super::gemm::{Area, Product, Rows};
use super::packed::{NR, STEP, narrow};
pub(super) use attention::Head;

/// Rows of a block: two tiles.
pub(super) const ROWS: usize = 2 * TILE;
/// Rows of a tile; and its columns, if they are sums.
const TILE: usize = 16;
/// Depth of a block: a panel's part (KC x NR) fills two thirds of the first-level cache.
const KC: usize = 512;
/// Depth that is summed before it is stored: as many bytes of a row as with f32.
pub(super) const DEPTH: usize = 3 * KC;

/// What became of the tiles of this processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// It has none.
    Absent,
    /// The system does not let this process use them.
    Refused,
    /// They were tried, and their sums were not right.
    Wrong,
    /// They are used.
    Usable,
}

/// Asks, and tries them, once.
pub(crate) fn find() -> Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    *FOUND.get_or_init(|| {
        if !present() {
            return Found::Absent;
        }
        if !permitted() {
            return Found::Refused;
        }
        // SAFETY: they are present and permitted.
        let right = right(&mut unsafe { Registers::configure() });
        if right { Found::Usable } else { Found::Wrong }
    })
}

/// Whether products of bf16 take this way.
pub(super) fn usable() -> bool {
    #[cfg(test)]
    if tests::MODELLED.get() {
        return true;
    }
    find() == Found::Usable
}

/// AMX-TILE and AMX-BF16, on a processor whose other work is done by AVX-512.
fn present() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    // A processor with AVX-512 has leaf 7.
    is_x86_feature_detected!("avx512f")
        && std::arch::x86_64::__cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

/// Whether the system saves these 8 KiB of registers for us, as Linux does for a process that has
/// asked (its `Documentation/arch/x86/xstate.rst`).
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
        const XTILEDATA: i64 = 18;
        unsafe extern "C" {
            fn syscall(number: i64, ...) -> i64;
        }
        // SAFETY: this call changes nothing but the permission. It fails where the kernel knows
        // nothing of it.
        unsafe { syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Tries one block on whole numbers so small that every sum is exact.
fn right(tiles: &mut impl Tiles) -> bool {
    const STEPS: usize = 2;
    let a = |row: usize, k: usize| ((row * 5 + k * 3) % 17) as f32 - 8.0;
    let b = |k: usize, column: usize| ((k * 7 + column * 11) % 13) as f32 - 6.0;
    let mut left = [[bf16::ZERO; ROWS * STEP]; STEPS];
    let mut right = [[bf16::ZERO; STEP * NR]; STEPS];
    for (step, k) in (0..STEPS * STEP).map(|k| (k / STEP, k % STEP)) {
        for i in 0..ROWS {
            left[step][i * STEP + k] = bf16::from_f32(a(i, step * STEP + k));
        }
        for j in 0..NR {
            right[step][(k / 2 * NR + j) * 2 + k % 2] = bf16::from_f32(b(step * STEP + k, j));
        }
    }
    let mut sums = [f32::NAN; ROWS * NR];
    block(tiles, &left, &right, &mut sums, false);
    block(tiles, &left, &right, &mut sums, true);
    sums.iter().enumerate().all(|(at, sum)| {
        let products = (0..STEPS * STEP).map(|k| a(at / NR, k) * b(k, at % NR));
        *sum == 2.0 * products.sum::<f32>()
    })
}

/// Eight registers of [`TILE`] rows of 64 bytes.
pub(super) trait Tiles {
    /// Fills a register with zeros.
    fn zero<const T: usize>(&mut self);

    /// # Safety
    /// At `from` are TILE rows of 64 bytes, each `stride` bytes behind the one before.
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize);

    /// # Safety
    /// As for `load`, and they are the caller's to write.
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize);

    /// Adds to f32 in C the product of bf16 in A, [row][k], and B, [k / 2][column][2].
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// Those of the processor, as long as this value lives. The compiler keeps nothing in them, so
/// what one instruction leaves there the next one finds.
pub(super) struct Registers(());

/// An instruction on tiles.
macro_rules! tile {
    ($($code:tt)*) => {
        asm!(
            $($code)*,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags)
        )
    };
}

impl Registers {
    /// All of them at their full size.
    ///
    /// # Safety
    /// The processor has tiles and the system permits them.
    unsafe fn configure() -> Self {
        /// `ldtilecfg`'s: palette 1, then bytes of a row and rows of each.
        #[repr(align(64))]
        struct Full([u8; 64]);
        const FULL: Full = {
            let mut bytes = [0; 64];
            bytes[0] = 1;
            let mut t = 0;
            while t < 8 {
                bytes[16 + 2 * t] = 64;
                bytes[48 + t] = TILE as u8;
                t += 1;
            }
            Full(bytes)
        };
        static CONFIGURATION: Full = FULL;
        // SAFETY: the caller's promise; 64 bytes are read.
        unsafe { tile!("ldtilecfg [{from}]", from = in(reg) &raw const CONFIGURATION.0) };
        Self(())
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: configure() has found tiles, and nothing is read from them any more.
        unsafe { tile!("tilerelease") };
    }
}

impl Tiles for Registers {
    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        // SAFETY: configure() has found tiles.
        unsafe { tile!("tilezero tmm{t}", t = const T) };
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: configure() has found tiles; the rest is the caller's promise.
        unsafe {
            tile!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from,
                stride = in(reg) stride);
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: as for load().
        unsafe {
            tile!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to,
                stride = in(reg) stride);
        }
    }

    #[inline(always)]
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: configure() has found tiles.
        unsafe { tile!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B) };
    }
}

/// c (ROWS, NR) (+)= a, [step][ROWS][STEP], x b, [step][STEP / 2][NR][2].
fn block(
    tiles: &mut impl Tiles,
    a: &[[bf16; ROWS * STEP]],
    b: &[[bf16; STEP * NR]],
    c: &mut [f32; ROWS * NR],
    accumulate: bool,
) {
    const { assert!(NR == 2 * TILE && STEP == 2 * TILE, "four tiles of sums, rows of 64 bytes") };
    const ROW: usize = NR * size_of::<f32>();
    let c = c.as_mut_ptr().cast::<u8>();
    // SAFETY: the quarters of c begin at its rows 0 and TILE, and in the middle of those; the
    // halves of a are TILE of its rows each, those of b half of every pair of rows.
    unsafe {
        if accumulate {
            tiles.load::<0>(c, ROW);
            tiles.load::<1>(c.add(ROW / 2), ROW);
            tiles.load::<2>(c.add(TILE * ROW), ROW);
            tiles.load::<3>(c.add(TILE * ROW + ROW / 2), ROW);
        } else {
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            tiles.zero::<3>();
        }
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (a.as_ptr().cast::<u8>(), b.as_ptr().cast::<u8>());
            tiles.load::<4>(a, ROW / 2);
            tiles.load::<6>(b, ROW);
            tiles.dot::<0, 4, 6>();
            tiles.load::<7>(b.add(ROW / 2), ROW);
            tiles.dot::<1, 4, 7>();
            tiles.load::<5>(a.add(TILE * ROW / 2), ROW / 2);
            tiles.dot::<2, 5, 6>();
            tiles.dot::<3, 5, 7>();
        }
        tiles.store::<0>(c, ROW);
        tiles.store::<1>(c.add(ROW / 2), ROW);
        tiles.store::<2>(c.add(TILE * ROW), ROW);
        tiles.store::<3>(c.add(TILE * ROW + ROW / 2), ROW);
    }
}

/// The tiles, for as long as this thread multiplies.
pub(super) enum Unit {
    Registers(Registers),
    #[cfg(test)]
    Model(Box<tests::Model>),
}

impl Unit {
    /// Where they are [`usable`].
    fn new() -> Self {
        #[cfg(test)]
        if find() != Found::Usable {
            return Self::Model(Box::new(tests::Model::new()));
        }
        assert_eq!(find(), Found::Usable, "tiles");
        // SAFETY: they have been found, permitted and tried.
        Self::Registers(unsafe { Registers::configure() })
    }

    /// c (ROWS, NR) (+)= a, [step][ROWS][STEP], x b, [step][STEP / 2][NR][2].
    fn block(&mut self, a: &[bf16], b: &[bf16], c: &mut [f32; ROWS * NR], accumulate: bool) {
        let (a, b) = (a.as_chunks().0, b.as_chunks().0);
        match self {
            Self::Registers(tiles) => block(tiles, a, b, c, accumulate),
            #[cfg(test)]
            Self::Model(tiles) => block(&mut **tiles, a, b, c, accumulate),
        }
    }
}

/// A task's rectangle of a product whose weights lie in pairs.
pub(super) fn multiply(product: &Product<'_, impl Rows>, area: &Area) {
    let mut unit = Unit::new();
    let (k, depth) = (product.weights.k, product.depth());
    let rows = area.rows.len().next_multiple_of(ROWS);
    let padded = depth.next_multiple_of(STEP);
    let (mut left, mut line) = (Scratch::new(rows * padded / 2), Scratch::new(padded / 2));
    // A panel of results, while it is summed and finished.
    let mut sums = Scratch::new(rows * NR);
    for first in (0..k).step_by(depth) {
        let columns = first..k.min(first + depth);
        let padded = columns.len().next_multiple_of(STEP);
        let left = &mut left.halves()[..rows * padded];
        for (t, tile) in left.chunks_exact_mut(ROWS * padded).enumerate() {
            let rows = area.rows.start + t * ROWS..area.rows.end;
            pack(product.a, rows, columns.clone(), line.halves(), tile);
        }
        for p in area.panels.clone() {
            for k0 in (0..padded).step_by(KC) {
                let k1 = padded.min(k0 + KC);
                let panel = product.weights.pairs(p, first + k0..first + k1);
                let blocks = left.chunks_exact(ROWS * padded).zip(sums.as_chunks_mut().0);
                for (tile, sums) in blocks {
                    unit.block(&tile[k0 * ROWS..k1 * ROWS], panel, sums, k0 > 0);
                }
            }
            product.store(&area.rows, p, &mut sums, columns.clone());
        }
    }
}

/// Packs the first ROWS of `rows`, rounded to bf16, as [step][ROWS][STEP], zeros after the last of
/// `columns`. Places past the last row hold anything: no row of a product sees another.
fn pack(
    a: &impl Rows,
    rows: Range<usize>,
    columns: Range<usize>,
    line: &mut [bf16],
    tile: &mut [bf16],
) {
    let line = &mut line[..columns.len().next_multiple_of(STEP)];
    line[columns.len()..].fill(bf16::ZERO);
    for (i, row) in rows.take(ROWS).enumerate() {
        let place = [a.place(row)];
        let mut k = columns.start;
        while k < columns.end {
            let [run] = a.runs(&place, k);
            let run = &run[..run.len().min(columns.end - k)];
            narrow(run, &mut line[k - columns.start..][..run.len()]);
            k += run.len();
        }
        for (part, step) in line.chunks_exact(STEP).zip(tile.chunks_exact_mut(ROWS * STEP)) {
            step[i * STEP..][..STEP].copy_from_slice(part);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::files::Source;
    use crate::networks::{UNet2DConditionModel, UNetConfig};
    use crate::ops::activation::Activation;
    use crate::ops::gemm::{Epilogue, Matrix, gemm};
    use crate::ops::numbers::{Numbers, Weight};
    use crate::ops::packed::{Layout, Packed};
    use crate::ops::simd::vectorized;
    use crate::ops::tests::{random, tensor};

    thread_local! {
        /// Whether layers that this thread builds in bf16 take tiles even where there are none.
        pub(crate) static MODELLED: Cell<bool> = const { Cell::new(false) };
    }

    /// What Intel's manual says of the instructions, denormals aside.
    pub(crate) struct Model([Tile; 8]);

    /// Rows of 64 bytes.
    type Tile = [[u32; TILE]; TILE];

    impl Model {
        pub(super) fn new() -> Self {
            Self([[[0; TILE]; TILE]; 8])
        }
    }

    impl Tiles for Model {
        fn zero<const T: usize>(&mut self) {
            self.0[T] = [[0; TILE]; TILE];
        }

        unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
            for (i, row) in self.0[T].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *row = unsafe { from.add(i * stride).cast::<[u32; TILE]>().read_unaligned() };
            }
        }

        unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
            for (i, row) in self.0[T].iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { to.add(i * stride).cast::<[u32; TILE]>().write_unaligned(*row) };
            }
        }

        fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
            let (a, b) = (self.0[A], self.0[B]);
            dot(&mut self.0[C], &a, &b);
        }
    }

    vectorized! {
        fn dot(c: &mut Tile, a: &Tile, b: &Tile) {
            let wide = |pair: u32| [pair << 16, pair & 0xFFFF_0000].map(f32::from_bits);
            for (c, a) in c.iter_mut().zip(a) {
                // Sums of the first and of the second of each pair. Their products are exact.
                let (mut first, mut second) = ([0f32; TILE], [0f32; TILE]);
                for (a, b) in a.iter().zip(b) {
                    let a = wide(*a);
                    for j in 0..TILE {
                        let b = wide(b[j]);
                        first[j] += a[0] * b[0];
                        second[j] += a[1] * b[1];
                    }
                }
                for j in 0..TILE {
                    c[j] = (f32::from_bits(c[j]) + (first[j] + second[j])).to_bits();
                }
            }
        }
    }

    #[test]
    fn tiles_are_right() {
        assert!(right(&mut Model::new()));
        // Where there are tiles this has run them; a wrong one would have been noticed.
        println!("tiles of this processor: {:?}", find());
        assert_ne!(find(), Found::Wrong);
        // Set where they are emulated.
        if std::env::var_os("SD_TEST_AMX").is_some() {
            assert_eq!(find(), Found::Usable);
        }
    }

    /// The activations too are rounded here: at most what the other engines' bf16 costs.
    #[test]
    fn a_network_on_tiles_stays_close_to_f32() {
        let device = Device::Cpu;
        let config = UNetConfig::read(&Source::Demo).unwrap();
        let stem = "diffusion_pytorch_model";
        let weights = &Source::Demo.weights("unet", stem, false).unwrap();
        let run = |dtype| {
            let model = UNet2DConditionModel::load(config.clone(), &weights, &device, dtype);
            let model = model.unwrap();
            let context = tensor(&[2, 77, config.cross_attention_dim], 1);
            let conditioning = model.condition(&context, &[]).unwrap();
            let latents = (tensor(&[2, config.in_channels, 16, 16], 2) * 3f64.sqrt()).unwrap();
            model
                .forward(
                    &latents,
                    &model.time_embeddings(&[900.0, 300.0], &[]).unwrap(),
                    &[conditioning],
                    &[],
                )
                .unwrap()
        };
        let want = run(DType::F32);
        MODELLED.set(true);
        let got = run(DType::BF16);
        MODELLED.set(false);
        let norm =
            |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let error = norm(&(got - &want).unwrap()) / norm(&want);
        println!("bf16 on tiles beside f32: relative L2 {error:.1e}");
        assert!(error > 0.0 && error <= 2.5e-2, "relative L2 {error:.1e}");
    }

    /// Rounds as the tiles' operands are.
    fn rounded(numbers: &[f32]) -> Vec<f64> {
        numbers.iter().map(|v| bf16::from_f32(*v).to_f64()).collect()
    }

    #[test]
    fn products_agree_with_the_sum_in_f64_whatever_the_batch() {
        for (rows, k, n) in [
            (1, 1, 1),
            (33, 31, 33),
            (70, 97, 64),
            (400, 17, 70),
            (30, DEPTH + 99, 40),
            (40, KC + 32, 4),
            (3, 5, 257),
        ] {
            let (a, w, bias) = (random(rows * k, 4), random(k * n, 5), random(n, 6));
            let weight = Weight::Stored(Numbers::Floats(&w), &[n, k]);
            let packed = Packed::laid_out(&weight, 1, Layout::Pairs).unwrap();
            let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
            let out = gemm(rows, &Matrix { data: &a, stride: k }, &packed, epilogue);
            let (wide_a, wide_w) = (rounded(&a), rounded(&w));
            for (at, got) in out.iter().enumerate() {
                let (i, j) = (at / n, at % n);
                let row = &wide_a[i * k..][..k];
                let sum: f64 = row.iter().zip(&wide_w[j * k..]).map(|(a, w)| a * w).sum();
                let want = sum + f64::from(bias[j]);
                assert!((f64::from(*got) - want).abs() < 2e-4, "{rows} {k} {n}: {i} {j}");
            }
            let last = Matrix { data: &a[(rows - 1) * k..], stride: k };
            let alone = gemm(1, &last, &packed, epilogue);
            assert_eq!(alone, out[(rows - 1) * n..], "a row depends on its batch");
        }
    }

    #[test]
    fn gates_and_all_that_follows_a_product_are_as_without_tiles() {
        let (rows, k, n) = (50, DEPTH + 65, 37);
        let (a, w, bias) = (random(rows * k, 1), random(2 * n * k, 2), random(96, 3));
        // Operands that bf16 holds, so that both ways see the same.
        let exact = |v: Vec<f32>| rounded(&v).into_iter().map(|v| v as f32).collect::<Vec<_>>();
        let (a, w) = (exact(a), exact(w));
        let (added, shift) = (random(rows * 2 * n, 4), random(5 * n, 5));
        let matrix = Matrix { data: &a, stride: k };
        let close = |tiles: Vec<f32>, vectors: Vec<f32>| {
            let most = vectors.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (got, want) in tiles.iter().zip(&vectors) {
                assert!((got - want).abs() < 1e-5 * most, "{got} {want}");
            }
        };
        let weight = Weight::Stored(Numbers::Floats(&w), &[2 * n, k]);
        let gated = |layout| {
            let packed = Packed::gated_and_laid_out(&weight, layout).unwrap();
            let epilogue =
                Epilogue { bias: Some(&bias), residual: Some(&added), ..Epilogue::default() };
            gemm(rows, &matrix, &packed, epilogue)
        };
        close(gated(Layout::Pairs), gated(Layout::F32));
        let weight = Weight::Stored(Numbers::Floats(&w[..n * k]), &[n, k]);
        let plain = |layout| {
            let packed = Packed::laid_out(&weight, 1, layout).unwrap();
            let epilogue = Epilogue {
                bias: Some(&bias[..n]),
                row_bias: Some((&shift, 10)),
                residual: Some(&added[..rows * n]),
                activation: Some(Activation::Silu),
            };
            gemm(rows, &matrix, &packed, epilogue)
        };
        close(plain(Layout::Pairs), plain(Layout::F32));
    }
}
