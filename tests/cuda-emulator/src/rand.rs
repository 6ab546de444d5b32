//! cuRAND: uniform and normal numbers from the counter-based generator Philox 4x32-10. The numbers
//! depend on seed and offset only; they are not those of NVIDIA's library.
use crate::Status;
use crate::driver::api;
use crate::memory;
use rayon::prelude::*;
use std::collections::HashMap;
use std::ffi::{c_int, c_uint};
use std::sync::{LazyLock, Mutex};

const NOT_INITIALIZED: i32 = 101;
const OUT_OF_RANGE: i32 = 104;
const LENGTH_NOT_MULTIPLE: i32 = 105;

#[derive(Clone, Copy, Default)]
struct Generator {
    seed: u64,
    /// 32-bit numbers drawn so far.
    offset: u64,
}

#[derive(Default)]
struct Generators {
    next: usize,
    map: HashMap<usize, Generator>,
}

static GENERATORS: LazyLock<Mutex<Generators>> = LazyLock::new(Mutex::default);

/// Four random words for a counter.
pub fn philox(seed: u64, counter: u64) -> [u32; 4] {
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    let mut c = [counter as u32, (counter >> 32) as u32, 0, 0];
    for _ in 0..10 {
        let p0 = u64::from(c[0]) * 0xd251_1f53;
        let p1 = u64::from(c[2]) * 0xcd9e_8d57;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
    }
    c
}

/// Uniform in (0, 1].
fn unit32(x: u32) -> f32 {
    ((x >> 8) + 1) as f32 / (1u32 << 24) as f32
}
fn unit64(hi: u32, lo: u32) -> f64 {
    (((u64::from(hi) << 32 | u64::from(lo)) >> 11) + 1) as f64 / (1u64 << 53) as f64
}
fn normals(u1: f64, u2: f64) -> [f64; 2] {
    let r = (-2.0 * u1.ln()).sqrt();
    let (s, c) = (std::f64::consts::TAU * u2).sin_cos();
    [r * c, r * s]
}

/// Fills `n` values, `N` from each counter.
fn fill<T: Send + Sync, const N: usize>(
    g: usize,
    at: u64,
    n: usize,
    make: impl Fn([u32; 4]) -> [T; N] + Sync,
) -> Status {
    let mut all = GENERATORS.lock().unwrap();
    let generator = all.map.get_mut(&g).ok_or(NOT_INITIALIZED)?;
    memory::check(at, n * size_of::<T>(), "random numbers").map_err(|_| OUT_OF_RANGE)?;
    // SAFETY: just checked; device memory is aligned to 256 bytes and T to at most 8.
    let out = unsafe { std::slice::from_raw_parts_mut(at as *mut T, n) };
    let (seed, from) = (generator.seed, generator.offset.div_ceil(4));
    out.par_chunks_mut(N).with_min_len(1024).enumerate().for_each(|(k, chunk)| {
        for (o, v) in chunk.iter_mut().zip(make(philox(seed, from + k as u64))) {
            *o = v;
        }
    });
    generator.offset = (from + n.div_ceil(N) as u64) * 4;
    Ok(())
}

api! {
    fn curandCreateGenerator(g: *mut usize, _kind: c_uint) {
        let mut all = GENERATORS.lock().unwrap();
        all.next += 1;
        let h = all.next;
        all.map.insert(h, Generator::default());
        // SAFETY: cuRAND's contract: a valid place for the handle.
        unsafe { *g = h };
        Ok(())
    }
    fn curandDestroyGenerator(g: usize) { GENERATORS.lock().unwrap().map.remove(&g).map(|_| ()).ok_or(NOT_INITIALIZED) }
    fn curandSetStream(_g: usize, _s: usize) { Ok(()) }
    fn curandSetGeneratorOrdering(_g: usize, _order: c_uint) { Ok(()) }
    fn curandSetPseudoRandomGeneratorSeed(g: usize, seed: u64) {
        *GENERATORS.lock().unwrap().map.get_mut(&g).ok_or(NOT_INITIALIZED)? = Generator { seed, offset: 0 };
        Ok(())
    }
    fn curandSetGeneratorOffset(g: usize, offset: u64) {
        GENERATORS.lock().unwrap().map.get_mut(&g).ok_or(NOT_INITIALIZED)?.offset = offset;
        Ok(())
    }
    fn curandGetVersion(v: *mut c_int) {
        // SAFETY: cuRAND's contract.
        unsafe { *v = 10_400 };
        Ok(())
    }
    fn curandGenerate(g: usize, out: u64, n: usize) { fill::<u32, 4>(g, out, n, |r| r) }
    fn curandGenerateUniform(g: usize, out: u64, n: usize) { fill::<f32, 4>(g, out, n, |r| r.map(unit32)) }
    fn curandGenerateUniformDouble(g: usize, out: u64, n: usize) {
        fill::<f64, 2>(g, out, n, |r| [unit64(r[0], r[1]), unit64(r[2], r[3])])
    }
    fn curandGenerateNormal(g: usize, out: u64, n: usize, mean: f32, std: f32) {
        if !n.is_multiple_of(2) { return Err(LENGTH_NOT_MULTIPLE); }
        fill::<f32, 2>(g, out, n, |r| normals(unit64(r[0], r[1]), unit64(r[2], r[3])).map(|x| (x as f32).mul_add(std, mean)))
    }
    fn curandGenerateNormalDouble(g: usize, out: u64, n: usize, mean: f64, std: f64) {
        if !n.is_multiple_of(2) { return Err(LENGTH_NOT_MULTIPLE); }
        fill::<f64, 2>(g, out, n, |r| normals(unit64(r[0], r[1]), unit64(r[2], r[3])).map(|x| x.mul_add(std, mean)))
    }
    fn curandGenerateLogNormal(g: usize, out: u64, n: usize, mean: f32, std: f32) {
        if !n.is_multiple_of(2) { return Err(LENGTH_NOT_MULTIPLE); }
        fill::<f32, 2>(g, out, n, |r| normals(unit64(r[0], r[1]), unit64(r[2], r[3])).map(|x| (x as f32).mul_add(std, mean).exp()))
    }
    fn curandGenerateLogNormalDouble(g: usize, out: u64, n: usize, mean: f64, std: f64) {
        if !n.is_multiple_of(2) { return Err(LENGTH_NOT_MULTIPLE); }
        fill::<f64, 2>(g, out, n, |r| normals(unit64(r[0], r[1]), unit64(r[2], r[3])).map(|x| x.mul_add(std, mean).exp()))
    }
}

#[cfg(test)]
mod tests {
    /// Known answers of the algorithm's authors (Random123).
    #[test]
    fn philox_known_answers() {
        assert_eq!(super::philox(0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }
}
