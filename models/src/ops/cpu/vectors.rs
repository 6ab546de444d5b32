//! The micro-kernels of the GEMM: a tile of MR rows times a panel of NR columns, accumulated in
//! vector registers.

use super::simd::Isa;
use super::tile::{MR, NR};

/// The micro-kernel of an instruction set.
#[derive(Clone, Copy)]
pub(super) struct MicroKernel(Isa);

impl MicroKernel {
    /// The best one of this processor.
    pub(super) fn detect() -> Self {
        Self(Isa::detect())
    }

    /// c [rows][NR] (+)= a [k][MR] x b [k][NR], for as many k as b has.
    pub(super) fn run(self, a: &[f32], b: &[f32], c: &mut [f32], rows: usize, accumulate: bool) {
        let k = b.len() / NR;
        assert!((1..=MR).contains(&rows), "gemm tile of {rows} rows");
        assert!(a.len() >= k * MR && c.len() >= rows * NR, "gemm tile");
        let tile = Operands { a: a.as_ptr(), b: b.as_ptr(), k, c: c.as_mut_ptr(), accumulate };
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

/// The operands of a micro-kernel, as in [`MicroKernel::run`].
struct Operands {
    a: *const f32,
    b: *const f32,
    k: usize,
    c: *mut f32,
    accumulate: bool,
}

/// The micro-kernel of every processor.
///
/// # Safety
/// The pointers of `tile` are valid for its k and for `rows` rows, at most MR.
unsafe fn portable(tile: &Operands, rows: usize) {
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
    use super::{MR, NR, Operands};
    use std::arch::x86_64::*;

    /// # Safety
    /// As `portable`, on a processor with AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(tile: &Operands, rows: usize) {
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
    unsafe fn rows512<const R: usize>(tile: &Operands) {
        let mut sum = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.k {
            // SAFETY: a and b advance k times by one step of the tile and the panel.
            unsafe {
                // Panels and tiles are consecutive in memory: what is not in L1d is prefetched.
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
    pub(super) unsafe fn avx2(tile: &Operands, rows: usize) {
        // Sixteen registers hold three rows of four vectors.
        for i in (0..rows).step_by(3) {
            // SAFETY: the caller's promise, for at most three rows from row i on.
            unsafe {
                let part = Operands { a: tile.a.add(i), c: tile.c.add(i * NR), ..*tile };
                match rows - i {
                    1 => rows256::<1>(&part),
                    2 => rows256::<2>(&part),
                    _ => rows256::<3>(&part),
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn rows256<const R: usize>(tile: &Operands) {
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
    use super::*;
    use crate::ops::cpu::simd::tests::sets;
    use crate::ops::tests::random;

    #[test]
    fn every_kernel_agrees_with_the_sum_in_f64() {
        for kernel in sets().into_iter().map(MicroKernel) {
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
}
