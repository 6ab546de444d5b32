//! cuBLAS: matrix products of f16, bf16, f32 and f64, accumulated in f32 (f64), column-major.
use crate::driver::api;
use crate::memory;
use crate::ptx::math::{bf16_bits, bf16_to32, f16_to32};
use crate::{Status, report, unsupported};
use rayon::prelude::*;
use std::ffi::{c_char, c_int, c_longlong, c_uint, c_void};
use std::time::Instant;

const INVALID_VALUE: i32 = 7;
const NOT_SUPPORTED: i32 = 15;

/// Rows and columns of the register tile.
const MR: usize = 16;
const NR: usize = if cfg!(target_feature = "avx512f") { 12 } else { 6 };
/// Row panels a task works on, so that they stay in cache.
const PANELS: usize = 8;

/// cudaDataType numbers.
pub const F16: c_uint = 2;
pub const BF16: c_uint = 14;
pub const F32: c_uint = 0;
pub const F64: c_uint = 1;

fn size_of_type(t: c_uint) -> Result<usize, i32> {
    match t {
        F16 | BF16 => Ok(2),
        F32 => Ok(4),
        F64 => Ok(8),
        _ => Err(unsupported(&format!("cuBLAS data type {t}"), NOT_SUPPORTED)),
    }
}

/// A matrix operand in device memory.
#[derive(Clone, Copy)]
struct Mat {
    at: usize,
    ty: c_uint,
    ld: usize,
    stride: c_longlong,
    trans: bool,
}

impl Mat {
    /// Checks that `rows` x `cols` (as stored) for all batches is device memory.
    fn check(&self, rows: usize, cols: usize, batch: usize, what: &str) -> Status {
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let size = size_of_type(self.ty)?;
        if self.ld < rows || self.stride < 0 {
            return Err(INVALID_VALUE);
        }
        let last = (cols - 1) * self.ld + rows + (batch - 1) * self.stride as usize;
        memory::check(self.at as u64, last * size, what).map_err(|_| INVALID_VALUE)
    }
    /// Address of element `k` of a batch's matrix.
    fn element(&self, batch: usize, k: usize, size: usize) -> usize {
        self.at + (batch * self.stride as usize + k) * size
    }
}

/// Arithmetic of the accumulation.
trait Real: Copy + Send + Sync + Default {
    fn fma(self, b: Self, c: Self) -> Self;
    fn of(v: f64) -> Self;
    fn to(self) -> f64;
    /// Reads an element of type `ty`.
    ///
    /// # Safety
    /// `at` must be valid and aligned for the type.
    unsafe fn read(at: usize, ty: c_uint) -> Self;
}
impl Real for f32 {
    #[inline(always)]
    fn fma(self, b: f32, c: f32) -> f32 {
        self.mul_add(b, c)
    }
    fn of(v: f64) -> f32 {
        v as f32
    }
    fn to(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    unsafe fn read(at: usize, ty: c_uint) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            match ty {
                F16 => f16_to32(*(at as *const u16)),
                BF16 => bf16_to32(*(at as *const u16)),
                F64 => *(at as *const f64) as f32,
                _ => *(at as *const f32),
            }
        }
    }
}
impl Real for f64 {
    #[inline(always)]
    fn fma(self, b: f64, c: f64) -> f64 {
        self.mul_add(b, c)
    }
    fn of(v: f64) -> f64 {
        v
    }
    fn to(self) -> f64 {
        self
    }
    #[inline(always)]
    unsafe fn read(at: usize, ty: c_uint) -> f64 {
        // SAFETY: the caller's promise.
        match ty {
            F64 => unsafe { *(at as *const f64) },
            _ => f64::from(unsafe { f32::read(at, ty) }),
        }
    }
}

/// Packs a `long` x `k` matrix into panels of `width` along its long side, k-major inside.
/// Element (i, p) is stored at `i * step_i + p * step_p`.
fn pack<T: Real>(
    m: &Mat,
    batch: usize,
    long: usize,
    k: usize,
    step_i: usize,
    step_p: usize,
    width: usize,
) -> Vec<T> {
    let size = size_of_type(m.ty).unwrap_or(4);
    let mut out = vec![T::default(); long.div_ceil(width) * width * k];
    out.par_chunks_mut((width * k).max(1)).enumerate().for_each(|(panel, out)| {
        let n = width.min(long - panel * width);
        let base = m.element(batch, panel * width * step_i, size);
        // SAFETY: `check` covered every element of the matrix.
        let get =
            |i: usize, p: usize| unsafe { T::read(base + (i * step_i + p * step_p) * size, m.ty) };
        if step_i == 1 {
            for p in 0..k {
                for i in 0..n {
                    out[p * width + i] = get(i, p);
                }
            }
        } else {
            for i in 0..n {
                for p in 0..k {
                    out[p * width + i] = get(i, p);
                }
            }
        }
    });
    out
}

/// One register tile of the product of two packed panels.
#[inline(always)]
fn tile<T: Real>(a: &[T], b: &[T]) -> [[T; MR]; NR] {
    let mut acc = [[T::default(); MR]; NR];
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
        for j in 0..NR {
            for i in 0..MR {
                acc[j][i] = a[i].fma(b[j], acc[j][i]);
            }
        }
    }
    acc
}

/// Writes a result as the output type.
///
/// # Safety
/// `at` must be valid and aligned for the type.
unsafe fn write(at: usize, ty: c_uint, v: f64) {
    // SAFETY: the caller's promise. The value is an f32 unless the type is f64, so this rounds once.
    unsafe {
        match ty {
            F16 => *(at as *mut u16) = half::f16::from_f32(v as f32).to_bits(),
            BF16 => *(at as *mut u16) = bf16_bits(v as f32),
            F64 => *(at as *mut f64) = v,
            _ => *(at as *mut f32) = v as f32,
        }
    }
}

struct Product {
    a: Mat,
    b: Mat,
    c: Mat,
    m: usize,
    n: usize,
    k: usize,
    batch: usize,
    alpha: f64,
    beta: f64,
}

impl Product {
    fn run<T: Real>(&self) {
        let (m, n, k) = (self.m, self.n, self.k);
        let size = size_of_type(self.c.ty).unwrap_or(4);
        let steps = |x: &Mat| if x.trans { (x.ld, 1) } else { (1, x.ld) };
        let (ai, ap) = steps(&self.a);
        let (bp, bj) = steps(&self.b);
        let mut packed: Option<(usize, Vec<T>)> = None;
        for batch in 0..self.batch {
            let pa = pack::<T>(&self.a, batch, m, k, ai, ap, MR);
            // a weight shared by all batches is packed once
            if self.b.stride != 0 || packed.is_none() {
                packed = Some((batch, pack::<T>(&self.b, batch, n, k, bj, bp, NR)));
            }
            let pb = packed.as_ref().map_or(&[][..], |p| &p.1);
            let write_tile = |acc: &[[T; MR]; NR], i0: usize, j0: usize| {
                for (j, col) in acc.iter().enumerate().take(n - j0) {
                    for (i, v) in col.iter().enumerate().take(m - i0) {
                        let at = self.c.element(batch, (j0 + j) * self.c.ld + i0 + i, size);
                        // SAFETY: `check` covered C; tiles do not overlap.
                        unsafe {
                            let old = if self.beta == 0.0 {
                                0.0
                            } else {
                                self.beta * T::read(at, self.c.ty).to()
                            };
                            write(at, self.c.ty, T::of(self.alpha * v.to() + old).to());
                        }
                    }
                }
            };
            let zero = [[T::default(); MR]; NR];
            let (rows, cols) = (m.div_ceil(MR), n.div_ceil(NR));
            let task = |t: usize| {
                let (r0, r1) = (t * PANELS, rows.min((t + 1) * PANELS));
                for c in 0..cols {
                    for r in r0..r1 {
                        let acc = if k == 0 {
                            zero
                        } else {
                            tile(
                                &pa[r * MR * k..(r + 1) * MR * k],
                                &pb[c * NR * k..(c + 1) * NR * k],
                            )
                        };
                        write_tile(&acc, r * MR, c * NR);
                    }
                }
            };
            let tasks = rows.div_ceil(PANELS);
            if tasks > 1 {
                (0..tasks).into_par_iter().for_each(task);
            } else {
                // few rows: spread the columns
                (0..cols).into_par_iter().with_min_len(4).for_each(|c| {
                    for r in 0..rows {
                        let acc = if k == 0 {
                            zero
                        } else {
                            tile(
                                &pa[r * MR * k..(r + 1) * MR * k],
                                &pb[c * NR * k..(c + 1) * NR * k],
                            )
                        };
                        write_tile(&acc, r * MR, c * NR);
                    }
                });
            }
        }
    }
}

/// `c = alpha * op(a) * op(b) + beta * c`, the scalars being of type `scalar`.
#[allow(clippy::too_many_arguments)]
unsafe fn gemm(
    name: &str,
    dims: [c_int; 3],
    ops: [c_uint; 2],
    scalar: c_uint,
    alpha: *const c_void,
    beta: *const c_void,
    abc: [Mat; 3],
    batch: c_int,
) -> Status {
    let start = Instant::now();
    if dims.iter().any(|&d| d < 0)
        || batch < 0
        || ops.iter().any(|&o| o > 2)
        || alpha.is_null()
        || beta.is_null()
    {
        return Err(INVALID_VALUE);
    }
    let [m, n, k] = dims.map(|d| d as usize);
    let [mut a, mut b, c] = abc;
    (a.trans, b.trans) = (ops[0] != 0, ops[1] != 0);
    if m * n * batch as usize == 0 {
        return Ok(());
    }
    let stored = |t: bool, rows, cols| if t { (cols, rows) } else { (rows, cols) };
    for (x, (rows, cols), what) in [
        (&a, stored(a.trans, m, k), "gemm A"),
        (&b, stored(b.trans, k, n), "gemm B"),
        (&c, (m, n), "gemm C"),
    ] {
        x.check(rows, cols, batch as usize, what)?;
    }
    // SAFETY: cuBLAS's contract: the scalars are valid and of the compute type.
    let (alpha, beta) =
        unsafe { (f64::read(alpha as usize, scalar), f64::read(beta as usize, scalar)) };
    let p = Product { a, b, c, m, n, k, batch: batch as usize, alpha, beta };
    if report::dry() {
        // only counted
    } else if scalar == F64 {
        p.run::<f64>();
    } else {
        p.run::<f32>();
    }
    let ty = match c.ty {
        F16 => "f16",
        BF16 => "bf16",
        F32 => "f32",
        _ => "f64",
    };
    report::launched(&format!("{name}<{ty}>"), 0, start.elapsed().as_nanos() as u64);
    Ok(())
}

/// Type of alpha and beta for a cublasComputeType.
fn scalar_type(compute: c_uint) -> Result<c_uint, i32> {
    match compute {
        64 | 65 => Ok(F16),
        68 | 69 | 74 | 75 | 77 | 78 => Ok(F32),
        70 | 71 => Ok(F64),
        _ => Err(unsupported(&format!("cuBLAS compute type {compute}"), NOT_SUPPORTED)),
    }
}

fn mat(p: *const c_void, ty: c_uint, ld: c_int, stride: c_longlong) -> Mat {
    Mat { at: p as usize, ty, ld: ld.max(0) as usize, stride, trans: false }
}

macro_rules! plain_gemm {
    ($($name:ident, $batched:ident, $ty:expr);*) => {$(
        api! {
            #[allow(clippy::too_many_arguments)]
            fn $name(_h: usize, ta: c_uint, tb: c_uint, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, lda: c_int,
                     b: *const c_void, ldb: c_int, beta: *const c_void, c: *mut c_void, ldc: c_int) {
                unsafe { gemm("gemm", [m, n, k], [ta, tb], $ty, alpha, beta, [mat(a, $ty, lda, 0), mat(b, $ty, ldb, 0), mat(c, $ty, ldc, 0)], 1) }
            }
            #[allow(clippy::too_many_arguments)]
            fn $batched(_h: usize, ta: c_uint, tb: c_uint, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, lda: c_int, sa: c_longlong,
                        b: *const c_void, ldb: c_int, sb: c_longlong, beta: *const c_void, c: *mut c_void, ldc: c_int, sc: c_longlong, batch: c_int) {
                unsafe { gemm("gemm_batched", [m, n, k], [ta, tb], $ty, alpha, beta, [mat(a, $ty, lda, sa), mat(b, $ty, ldb, sb), mat(c, $ty, ldc, sc)], batch) }
            }
        }
    )*};
}
plain_gemm!(cublasSgemm_v2, cublasSgemmStridedBatched, F32;
            cublasDgemm_v2, cublasDgemmStridedBatched, F64;
            cublasHgemm, cublasHgemmStridedBatched, F16);

api! {
    #[allow(clippy::too_many_arguments)]
    fn cublasGemmEx(_h: usize, ta: c_uint, tb: c_uint, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, at: c_uint, lda: c_int,
                    b: *const c_void, bt: c_uint, ldb: c_int, beta: *const c_void, c: *mut c_void, ct: c_uint, ldc: c_int, compute: c_uint, _algo: c_int) {
        unsafe { gemm("gemm", [m, n, k], [ta, tb], scalar_type(compute)?, alpha, beta, [mat(a, at, lda, 0), mat(b, bt, ldb, 0), mat(c, ct, ldc, 0)], 1) }
    }
    #[allow(clippy::too_many_arguments)]
    fn cublasGemmStridedBatchedEx(_h: usize, ta: c_uint, tb: c_uint, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, at: c_uint, lda: c_int,
                                  sa: c_longlong, b: *const c_void, bt: c_uint, ldb: c_int, sb: c_longlong, beta: *const c_void, c: *mut c_void, ct: c_uint,
                                  ldc: c_int, sc: c_longlong, batch: c_int, compute: c_uint, _algo: c_int) {
        let scalar = scalar_type(compute)?;
        unsafe { gemm("gemm_batched", [m, n, k], [ta, tb], scalar, alpha, beta, [mat(a, at, lda, sa), mat(b, bt, ldb, sb), mat(c, ct, ldc, sc)], batch) }
    }
    fn cublasCreate_v2(h: *mut usize) {
        // SAFETY: cuBLAS's contract: a valid place for the handle.
        unsafe { *h = 0xb1a5 };
        Ok(())
    }
    fn cublasDestroy_v2(_h: usize) { Ok(()) }
    fn cublasSetStream_v2(_h: usize, _s: usize) { Ok(()) }
    fn cublasSetWorkspace_v2(_h: usize, _p: u64, _size: usize) { Ok(()) }
    fn cublasSetMathMode(_h: usize, _mode: c_uint) { Ok(()) }
    fn cublasSetPointerMode_v2(_h: usize, _mode: c_uint) { Ok(()) }
    fn cublasSetAtomicsMode(_h: usize, _mode: c_uint) { Ok(()) }
    fn cublasGetVersion_v2(_h: usize, v: *mut c_int) {
        // SAFETY: cuBLAS's contract.
        unsafe { *v = 130_000 };
        Ok(())
    }
    fn cublasLtCreate(h: *mut usize) {
        // SAFETY: cuBLAS's contract: a valid place for the handle.
        unsafe { *h = 0xb1a6 };
        Ok(())
    }
    fn cublasLtDestroy(_h: usize) { Ok(()) }
}

fn status_name(s: c_int) -> *const c_char {
    match s {
        0 => c"CUBLAS_STATUS_SUCCESS",
        INVALID_VALUE => c"CUBLAS_STATUS_INVALID_VALUE",
        NOT_SUPPORTED => c"CUBLAS_STATUS_NOT_SUPPORTED",
        _ => c"CUBLAS_STATUS_UNKNOWN",
    }
    .as_ptr()
}
#[unsafe(no_mangle)]
pub extern "C" fn cublasGetStatusName(s: c_int) -> *const c_char {
    status_name(s)
}
#[unsafe(no_mangle)]
pub extern "C" fn cublasGetStatusString(s: c_int) -> *const c_char {
    status_name(s)
}
