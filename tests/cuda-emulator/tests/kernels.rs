//! Runs `kernels.ptx` (from `kernels.cu`) and compares with the same computations in Rust.
#![allow(clippy::precedence)]
use emucuda::driver::*;
use half::{bf16, f16};
use std::ffi::{CString, c_void};
use std::sync::OnceLock;

fn ok(e: i32) {
    assert_eq!(e, 0, "CUDA error {e}");
}

fn module() -> usize {
    static M: OnceLock<usize> = OnceLock::new();
    *M.get_or_init(|| unsafe {
        std::env::set_var("EMUCUDA_RACECHECK", "1");
        std::env::set_var("EMUCUDA_DEVICES", "4");
        ok(cuInit(0));
        let text = CString::new(include_str!("kernels.ptx")).unwrap();
        let mut m = 0;
        ok(cuModuleLoadData(&mut m, text.as_ptr()));
        m
    })
}

/// Device memory freed at the end.
struct Buf(u64, usize);
impl Buf {
    fn new<T: Copy>(v: &[T]) -> Self {
        let n = size_of_val(v);
        let mut p = 0;
        unsafe {
            ok(cuMemAlloc_v2(&mut p, n));
            ok(cuMemcpyHtoD_v2(p, v.as_ptr() as u64, n));
        }
        Buf(p, n)
    }
    fn get<T: Copy + Default>(&self) -> Vec<T> {
        let mut v = vec![T::default(); self.1 / size_of::<T>()];
        unsafe { ok(cuMemcpyDtoH_v2(v.as_mut_ptr() as u64, self.0, self.1)) };
        v
    }
}
impl Drop for Buf {
    fn drop(&mut self) {
        unsafe { ok(cuMemFree_v2(self.0)) }
    }
}

/// Launches; arguments are given as bytes.
fn launch(name: &str, grid: u32, block: u32, shared: u32, args: &[Vec<u8>]) -> i32 {
    launch_on(0, name, grid, block, shared, args)
}

/// As `launch`, on some device.
fn launch_on(dev: i32, name: &str, grid: u32, block: u32, shared: u32, args: &[Vec<u8>]) -> i32 {
    unsafe {
        enter(dev);
        let mut p: Vec<*mut c_void> = args.iter().map(|a| a.as_ptr() as *mut c_void).collect();
        let f = function(name);
        cuLaunchKernel(f, grid, 1, 1, block, 1, 1, shared, 0, p.as_mut_ptr(), std::ptr::null_mut())
    }
}

fn enter(dev: i32) {
    module();
    let mut ctx = 0;
    unsafe {
        ok(cuDevicePrimaryCtxRetain(&mut ctx, dev));
        ok(cuCtxSetCurrent(ctx));
    }
}

fn function(name: &str) -> usize {
    let (mut f, name) = (0, CString::new(name).unwrap());
    unsafe { ok(cuModuleGetFunction(&mut f, module(), name.as_ptr())) };
    f
}

/// Fails a device and brings it back.
fn lost(dev: i32, error: i32, name: &str, block: u32, args: &[Vec<u8>]) {
    assert_eq!(launch_on(dev, name, 1, block, 0, args), error);
    unsafe {
        let (mut free, mut total) = (0, 0);
        assert_eq!(cuMemGetInfo_v2(&mut free, &mut total), error, "the error stays");
        assert_eq!(cuStreamSynchronize(0), error);
        ok(cuDevicePrimaryCtxReset_v2(dev));
        ok(cuStreamSynchronize(0));
    }
}
trait Arg {
    fn arg(&self) -> Vec<u8>;
}
impl Arg for Buf {
    fn arg(&self) -> Vec<u8> {
        self.0.to_le_bytes().to_vec()
    }
}
impl Arg for i32 {
    fn arg(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}
macro_rules! args {
    ($($a:expr),*) => { &[$($a.arg()),*] };
}

/// Pseudo-random 64-bit numbers.
fn random(n: usize, mut s: u64) -> Vec<u64> {
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            s ^ s >> 29
        })
        .collect()
}

#[test]
fn warp_operations() {
    let v: Vec<i32> = random(96, 1).iter().map(|x| (x % 500) as i32).collect();
    let (a, out) = (Buf::new(&v), Buf::new(&[0i32; 960]));
    ok(launch("warp_ops", 1, 96, 0, args![a, out]));
    let out = out.get::<i32>();
    for t in 0..96 {
        let (w, l) = (&v[t / 32 * 32..][..32], t % 32);
        let count = |f: &dyn Fn(i32) -> bool| {
            w.iter().enumerate().filter(|&(_, &x)| f(x)).fold(0u32, |m, (k, _)| m | 1 << k)
        };
        let active = if v[t] & 2 != 0 { w[w.iter().position(|x| x & 2 != 0).unwrap()] } else { 0 };
        // __shfl_down over groups of 8: lanes past the group's end keep their own value
        let mut eight = w.to_vec();
        for d in [4, 2, 1] {
            eight = (0..32)
                .map(|k| eight[k] + if k % 8 + d < 8 { eight[k + d] } else { eight[k] })
                .collect();
        }
        let want = [
            w.iter().sum(),
            w[..=l].iter().sum(),
            eight[l],
            w[(t * 7) & 31],
            count(&|x| x & 1 != 0) as i32,
            w.contains(&17).into(),
            w.iter().all(|&x| x < 1000).into(),
            count(&|x| x & 3 == v[t] & 3) as i32,
            *w.iter().max().unwrap(),
            active,
        ];
        assert_eq!(out[t * 10..][..10], want, "thread {t}");
    }
}

#[test]
fn divergence() {
    let v: Vec<i32> = random(1000, 2).iter().map(|x| (x % 10000) as i32).collect();
    let (a, out) = (Buf::new(&v), Buf::new(&[0i32; 1000]));
    ok(launch("diverge", 4, 256, 0, args![a, out, 1000]));
    let want: Vec<i32> = v
        .iter()
        .map(|&v| {
            let mut s = 0i32;
            for i in 0..v % 23 {
                if (i ^ v) % 5 == 0 {
                    continue;
                }
                for j in i..9 {
                    s += i * j;
                    if s % 31 == 7 {
                        break;
                    }
                }
                match (v + i) % 7 {
                    0 => s += 1,
                    1 => s ^= v,
                    2 => s = s * 3 + 1,
                    3 => s -= i,
                    4 => s |= 5,
                    5 => s += if v & 1 != 0 { 11 } else { -13 },
                    _ => {}
                }
                s &= 0xffff;
            }
            s
        })
        .collect();
    assert_eq!(out.get::<i32>(), want);
}

#[test]
fn block_wide() {
    let v: Vec<f32> = random(5 * 200, 3).iter().map(|x| (x % 100) as f32).collect();
    let (a, out, odd) = (Buf::new(&v), Buf::new(&[0f32; 1000]), Buf::new(&[0i32; 5]));
    ok(launch("block_scan", 5, 200, 800, args![a, out, odd]));
    let want: Vec<f32> = v
        .chunks(200)
        .flat_map(|c| {
            c.iter().scan(0., |s, x| {
                *s += x;
                Some(*s)
            })
        })
        .collect();
    assert_eq!(out.get::<f32>(), want);
    assert_eq!(odd.get::<i32>(), [201; 5]);
}

#[test]
fn atomics() {
    let v: Vec<i32> = random(4096, 4).iter().map(|x| (x % 100_000) as i32).collect();
    let (a, hist, sum, dsum) =
        (Buf::new(&v), Buf::new(&[0i32; 16]), Buf::new(&[0f32]), Buf::new(&[0f64]));
    let (best, big, h) = (Buf::new(&[0i32, 1]), Buf::new(&[0u64]), Buf::new(&[f16::ZERO; 2]));
    ok(launch("atomics", 32, 128, 0, args![a, hist, sum, dsum, best, big, h]));
    let want: Vec<i32> =
        (0..16).map(|k| v.iter().filter(|&x| x & 15 == k).count() as i32).collect();
    assert_eq!(hist.get::<i32>(), want);
    assert_eq!((sum.get::<f32>()[0], dsum.get::<f64>()[0]), (2048., 1024.));
    assert_eq!(best.get::<i32>(), [*v.iter().max().unwrap(), 1 + 3 * 4096]);
    assert_eq!(
        (big.get::<u64>()[0], h.get::<f16>()),
        (4096 << 33, vec![f16::from_f32(32.), f16::from_f32(64.)])
    );
}

/// Largest relative error of column `k` against `f`.
fn worst(out: &[f64], cols: usize, k: usize, x: &[f64], f: &dyn Fn(f64) -> f64) -> f64 {
    x.iter()
        .enumerate()
        .map(|(t, &x)| {
            let (got, want) = (out[t * cols + k], f(x));
            if got == want { 0. } else { ((got - want) / want.abs().max(1e-30)).abs() }
        })
        .fold(0., f64::max)
}

/// Name, largest relative error allowed, reference.
type Check<'a> = (&'a str, f64, &'a dyn Fn(f64) -> f64);

#[test]
fn functions() {
    let x: Vec<f32> = random(2000, 5).iter().map(|v| (v % 20001) as f32 / 2000. - 5.0003).collect();
    let (a, out) = (Buf::new(&x), Buf::new(&vec![0f32; 2000 * 19]));
    ok(launch("math32", 8, 256, 0, args![a, out, 2000]));
    let (o, x): (Vec<f64>, Vec<f64>) = (
        out.get::<f32>().into_iter().map(f64::from).collect(),
        x.into_iter().map(f64::from).collect(),
    );
    let f: [Check; 19] = [
        ("expf", 3e-7, &f64::exp),
        ("logf", 4e-7, &|x| x.abs().ln()),
        ("sinf", 1e-3, &|x| f64::from(x as f32 * 1000.).sin()),
        ("cosf", 1e-3, &|x| f64::from(x as f32 * 1e6).cos()),
        ("powf", 1e-6, &|x| x.abs().powf(f64::from(1.7f32))),
        ("tanhf", 3e-7, &f64::tanh),
        ("erff", 3e-7, &erf),
        ("rsqrtf", 3e-7, &|x| 1. / x.abs().sqrt()),
        ("fmodf", 1e-4, &|x| f64::from(x as f32 % 0.7f32)),
        ("cbrtf", 3e-7, &f64::cbrt),
        ("div", 6e-8, &|x| f64::from(x as f32 / 3.3f32)),
        ("sqrtf", 0., &|x| f64::from((x as f32).abs().sqrt())),
        ("floorf", 0., &f64::floor),
        ("rintf", 0., &f64::round_ties_even),
        ("atan2f", 3e-7, &|x| x.atan2(2.)),
        ("log1pf", 3e-7, &|x| x.abs().ln_1p()),
        ("exp2f", 3e-7, &f64::exp2),
        ("__expf", 1e-6, &f64::exp),
        ("fmaf", 0., &|x| f64::from((x as f32).mul_add(x as f32, -1.))),
    ];
    for (k, (name, limit, f)) in f.iter().enumerate() {
        let e = worst(&o, 19, k, &x, f);
        println!("{name}: relative error {e:.2e}");
        assert!(e <= *limit, "{name}: {e}");
    }
    let (a, out) = (Buf::new(&x), Buf::new(&vec![0f64; 2000 * 11]));
    ok(launch("math64", 8, 256, 0, args![a, out, 2000]));
    let o = out.get::<f64>();
    let f: [Check; 11] = [
        ("exp", 4e-16, &f64::exp),
        ("log", 2e-15, &|x| x.abs().ln()),
        ("sin", 1e-10, &|x| (x * 1e7).sin()),
        ("pow", 1e-15, &|x| x.abs().powf(2.3)),
        ("erf", 1e-14, &erf),
        ("recip", 0., &f64::recip),
        ("sqrt", 0., &|x| x.abs().sqrt()),
        ("tanh", 1e-15, &f64::tanh),
        ("floor", 0., &f64::floor),
        ("div", 0., &|x| x / 7.),
        ("fma", 0., &|x| x.mul_add(x, -2.)),
    ];
    for (k, (name, limit, f)) in f.iter().enumerate() {
        let e = worst(&o, 11, k, &x, f);
        println!("{name} (f64): relative error {e:.2e}");
        assert!(e <= *limit, "{name}: {e}");
    }
}

/// The error function by its Taylor series (|x| < 6 in f64 needs care: use the continued fraction far out).
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let r = if a < 2.5 {
        let (mut term, mut sum) = (a, a);
        for n in 1..100 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2. / std::f64::consts::PI.sqrt()
    } else {
        let cf = (1..200).rev().fold(0., |f, k| f64::from(k) / 2. / (a + f));
        1. - (-a * a).exp() / std::f64::consts::PI.sqrt() / (a + cf)
    };
    r.copysign(x)
}

#[test]
fn integers() {
    let v = random(64, 6);
    let (a, out) = (Buf::new(&v), Buf::new(&[0u64; 64 * 28]));
    ok(launch("ints", 1, 64, 0, args![a, out]));
    let out = out.get::<u64>();
    for t in 0..64usize {
        let (a, b) = (v[t], v[t ^ 1] | 1);
        let (x, y) = (a as u32, b as u32);
        let (s, u, p, q) = (x as i32, y as i32, a as i64, b as i64);
        let byte = |k: u32| ((u64::from(y) << 32 | u64::from(x)) >> (8 * k)) as u32 & 255;
        let dp4a = (0..4).fold(7i32, |r, k| {
            r + i32::from((x >> (8 * k)) as i8) * i32::from((y >> (8 * k)) as i8)
        });
        let vadd = (0..4)
            .fold(0u32, |r, k| r | ((x >> (8 * k)).wrapping_add(y >> (8 * k)) & 255) << (8 * k));
        let want = [
            x.count_ones().into(),
            x.leading_zeros().into(),
            x.reverse_bits().into(),
            if x == 0 { 0 } else { x.trailing_zeros() as u64 + 1 },
            (byte(2) | byte(7) << 8 | byte(1) << 16 | byte(4) << 24).into(),
            ((u64::from(y) << 32 | u64::from(x)) << (t & 31) >> 32) as u32 as u64,
            u64::from(x) * u64::from(y) >> 32,
            u64::from((i64::from(s) * i64::from(u) >> 32) as u32),
            (u128::from(a) * u128::from(b) >> 64) as u64,
            a / b,
            a % b,
            p.wrapping_div(q >> 40) as u64,
            p.wrapping_rem(q >> 40) as u64,
            (x / y).into(),
            (s.wrapping_rem(u) as u32).into(),
            ((s << 7 >> 25) as u32).into(),
            (x >> 5 & 0x3ff).into(),
            (dp4a as u32).into(),
            a << (t & 63),
            (p >> (t & 63)) as u64,
            (s.min(u) as u32).into(),
            a.count_ones().into(),
            a.leading_zeros().into(),
            (s.abs_diff(u).wrapping_add(3)).into(),
            (x as u16 as i16 as i32 as u32).into(),
            (y as u8 as i8 as i64) as u64,
            vadd.into(),
            u64::from((x & y) ^ (!x | s as u32)),
        ];
        for (k, w) in want.iter().enumerate() {
            assert_eq!(out[t * 28 + k], *w, "thread {t} value {k}");
        }
    }
}

#[test]
fn conversions() {
    use emucuda::ptx::math::{self, Half, Round};
    let mut v: Vec<f64> = random(500, 7)
        .iter()
        .map(|x| (*x as i64 as f64) * 2f64.powi(-((x % 70) as i32) - 20))
        .collect();
    v.extend([0.0, -0.0, 0.5, 1.5, -2.5, 65504.0, 65520.0, 1e-8, 6e-8, 3e38, 1e39, -1e-300]);
    let n = v.len();
    let (a, out) = (Buf::new(&v), Buf::new(&vec![0i32; n * 27]));
    ok(launch("casts", 3, 256, 0, args![a, out, n as i32]));
    let out = out.get::<i32>();
    for (t, &d) in v.iter().enumerate() {
        let f = d as f32;
        let (down, up, zero) = (
            math::round32(d, 0., Round::Down),
            math::round32(d, 0., Round::Up),
            math::round32(d, 0., Round::Zero),
        );
        assert!(f64::from(down) <= d && d <= f64::from(up) && f64::from(zero).abs() <= d.abs());
        let (h, b) = (f16::from_f32(f), bf16::from_f32(f));
        let i5 = (d * 1e5) as i32;
        let want = [
            f.round_ties_even() as i32,
            f.floor() as i32,
            f.ceil() as i32,
            f as i32,
            d.round_ties_even() as i32,
            down as i32,
            up.to_bits() as i32,
            zero.to_bits() as i32,
            h.to_bits().into(),
            math::F16::from64(d).into(),
            b.to_bits().into(),
            f.abs() as u32 as i32,
            i32::from(f as i32 as u8),
            math::round32(f64::from(i5), 0., Round::Zero).to_bits() as i32,
            (((d * 1e12) as i64) as f32).to_bits() as i32,
            h.to_f64().round_ties_even() as i32,
            f.clamp(0., 1.).to_bits() as i32,
            (f16::from_f32(h.to_f32() + f16::from_f32(0.3).to_f32())).to_f32().to_bits() as i32,
            bf16::from_f64(
                b.to_f64().mul_add(bf16::from_f32(1.7).to_f64(), bf16::from_f32(0.3).to_f64()),
            )
            .to_f32()
            .to_bits() as i32,
            f16::from_f32(h.to_f32() * f16::from_f32(0.3).to_f32()).to_f32().to_bits() as i32,
        ];
        for (k, w) in want.iter().enumerate() {
            let got = out[t * 27 + k];
            let zeros = k == 16 && got & i32::MAX == 0 && *w & i32::MAX == 0; // the sign of a saturated zero
            assert!(got == *w || zeros, "{d:e} value {k}: {got} wanted {w}");
        }
        if f.is_finite() {
            let at = |k: usize| f64::from(f32::from_bits(out[t * 27 + k] as u32));
            let (e, x) = (f64::from(1e-3f32), f64::from(f));
            assert!(
                at(20).abs() <= (x + e).abs()
                    && at(21) >= x * f64::from(1.1f32)
                    && at(22) <= x / f64::from(1.7f32) * (1. + 1e-15 * x.signum())
            );
            assert!(
                at(23) * at(23) >= x.abs()
                    && at(24) <= x.mul_add(f64::from(0.3f32), 7.) + 1e-12 * x.abs()
            );
        }
    }
}

#[test]
fn calls_and_globals() {
    let v: Vec<i32> = random(64, 8).iter().map(|x| (x % 1000) as i32).collect();
    let (a, out) = (Buf::new(&v), Buf::new(&[0f32; 64]));
    let first: Vec<u8> = [0.75f32.to_le_bytes(), 5i32.to_le_bytes()].concat();
    ok(launch("calls", 1, 64, 0, &[a.arg(), out.arg(), first]));
    let helper = |a: f32, b: i32, n: usize| {
        let table = [1f32, 2.5, -3., 0.5];
        let buf: Vec<f32> = (0..8).map(|i| a * table[i % n]).collect();
        (0..b).fold((0f32, 0i32), |r, i| (r.0 + buf[((i * 3 + b) & 7) as usize], r.1 + i))
    };
    for (t, got) in out.get::<f32>().into_iter().enumerate() {
        let (pa, pb) = (0.75 + t as f32, v[t] % 20);
        let mut q = helper(pa, pb, 4);
        if t % 3 == 0 {
            q = helper(pa, q.1 % 11, 3);
        }
        assert_eq!(got, q.0 + q.1 as f32 + 5., "thread {t}");
    }
    let (mut p, mut size, name) = (0, 0, CString::new("counter").unwrap());
    unsafe { ok(cuModuleGetGlobal_v2(&mut p, &mut size, module(), name.as_ptr())) };
    let mut count = 0i32;
    unsafe { ok(cuMemcpyDtoH_v2(&mut count as *mut i32 as u64, p, 4)) };
    assert_eq!((size, count), (4, 64));
}

#[test]
fn bad_addresses() {
    enter(1);
    let a = Buf::new(&[0i32; 100]);
    ok(launch_on(1, "out_of_bounds", 1, 32, 0, args![a, 68]));
    lost(1, 700, "out_of_bounds", 32, args![a, 69]);
    lost(1, 700, "out_of_bounds", 1, args![a, -1]);
    let freed = a.arg();
    drop(a);
    lost(1, 700, "out_of_bounds", 1, &[freed.clone(), 0i32.arg()]);
    let odd = u64::from_le_bytes(freed.try_into().unwrap()) + 2;
    lost(1, 716, "out_of_bounds", 1, &[odd.to_le_bytes().to_vec(), 0i32.arg()]);
    assert_eq!(unsafe { cuMemFree_v2(0x1234) }, 1);
    // Memory of another device.
    enter(0);
    let far = Buf::new(&[0i32; 100]);
    lost(1, 700, "out_of_bounds", 1, args![far, 0]);
}

#[test]
fn races() {
    enter(2);
    let out = Buf::new(&[0i32; 64]);
    ok(launch_on(2, "race", 1, 64, 0, args![out, 1]));
    assert_eq!(out.get::<i32>()[3], 60);
    lost(2, 719, "race", 64, args![out, 0]);
}

#[test]
fn the_pool_keeps_what_its_threshold_says() {
    enter(3);
    let free = || {
        let (mut free, mut total) = (0, 0);
        unsafe { ok(cuMemGetInfo_v2(&mut free, &mut total)) };
        total - free
    };
    let taken = |size: usize| unsafe {
        let mut p = 0;
        ok(cuMemAllocAsync(&mut p, size, 0));
        ok(cuMemFreeAsync(p, 0));
    };
    let (mut pool, mut keep) = (0, u64::MAX);
    taken(1 << 20);
    assert_eq!(free(), 1 << 20);
    unsafe {
        ok(cuStreamSynchronize(0));
        assert_eq!(free(), 0, "a threshold of 0 keeps nothing");
        ok(cuDeviceGetDefaultMemPool(&mut pool, 3));
        ok(cuMemPoolSetAttribute(pool, 4, (&raw mut keep).cast()));
        taken(1 << 20);
        ok(cuStreamSynchronize(0));
        let (mut reserved, mut used) = (0, 1);
        ok(cuMemPoolGetAttribute(pool, 5, &mut reserved));
        ok(cuMemPoolGetAttribute(pool, 7, &mut used));
        assert_eq!((free(), reserved, used), (1 << 20, 1 << 20, 0));
        ok(cuMemPoolTrimTo(pool, 4096));
        assert_eq!(free(), 4096);
    }
}

#[test]
fn matrix_instructions() {
    let k = 64;
    let x: Vec<f32> =
        random(16 * k + 8 * k, 9).iter().map(|v| (v % 2001) as f32 / 1000. - 1.).collect();
    let (a, b) = x.split_at(16 * k);
    let check = |name: &str, round: &dyn Fn(f32) -> (u16, f32)| {
        let (da, db) = (
            Buf::new(&a.iter().map(|&v| round(v).0).collect::<Vec<_>>()),
            Buf::new(&b.iter().map(|&v| round(v).0).collect::<Vec<_>>()),
        );
        let c = Buf::new(&[0f32; 128]);
        ok(launch(name, 1, 32, 0, args![da, db, c, k as i32]));
        for (e, got) in c.get::<f32>().into_iter().enumerate() {
            let want: f32 =
                (0..k).map(|p| round(a[e / 8 * k + p]).1 * round(b[p * 8 + e % 8]).1).sum();
            assert!((got - want).abs() < 1e-5, "{name} element {e}: {got} {want}");
        }
    };
    check("mma_f16", &|v| (f16::from_f32(v).to_bits(), f16::from_f32(v).to_f32()));
    check("mma_bf16", &|v| (bf16::from_f32(v).to_bits(), bf16::from_f32(v).to_f32()));
}

#[test]
fn wmma() {
    let k = 48;
    let x: Vec<f32> = random(32 * k, 10).iter().map(|v| (v % 2001) as f32 / 1000. - 1.).collect();
    let check = |name: &str, round: &dyn Fn(f32) -> (u16, f32)| {
        let v: Vec<u16> = x.iter().map(|&v| round(v).0).collect();
        let (a, b, c) = (Buf::new(&v[..16 * k]), Buf::new(&v[16 * k..]), Buf::new(&[0f32; 256]));
        ok(launch(name, 1, 32, 0, args![a, b, c, k as i32]));
        for (e, got) in c.get::<f32>().into_iter().enumerate() {
            let want: f32 = (0..k)
                .map(|p| 2. * round(x[e / 16 * k + p]).1 * round(x[(16 + e % 16) * k + p]).1)
                .sum();
            assert!((got - want).abs() < 2e-5, "{name} element {e}: {got} {want}");
        }
    };
    check("wmma_f16", &|v| (f16::from_f32(v).to_bits(), f16::from_f32(v).to_f32()));
    check("wmma_bf16", &|v| (bf16::from_f32(v).to_bits(), bf16::from_f32(v).to_f32()));
}

/// Interpreter speed; run with `--release --nocapture`.
#[test]
fn speed() {
    let out = Buf::new(&vec![0f32; 1 << 16]);
    let start = std::time::Instant::now();
    ok(launch("spin", 256, 256, 0, args![out, 200]));
    let spent = start.elapsed().as_secs_f64();
    let json = emucuda::report::json();
    let line = json.lines().find(|l| l.contains("\"spin\"")).unwrap();
    let n: f64 = line
        .split("\"lane_instructions\": ")
        .nth(1)
        .unwrap()
        .split(',')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    println!("{n:.3e} lane instructions in {spent:.3} s: {:.2e} a second", n / spent);
}
