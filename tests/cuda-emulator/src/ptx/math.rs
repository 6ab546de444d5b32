//! Scalar and 32-lane numeric helpers: directed rounding, half types, flush to zero.
use half::slice::HalfFloatSliceExt;

/// Rounding of a floating-point result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Round {
    Near,
    Zero,
    Down,
    Up,
}

/// Flushes a subnormal to a zero of the same sign.
#[inline(always)]
pub fn ftz(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn step32(x: f32, up: bool) -> f32 {
    if up { x.next_up() } else { x.next_down() }
}

/// Rounds the exact value `s + e` (`e` tiny against `s`) to f32.
pub fn round32(s: f64, e: f64, mode: Round) -> f32 {
    let r = s as f32;
    if mode == Round::Near || !s.is_finite() {
        return r;
    }
    let up = match mode {
        Round::Up => true,
        Round::Down => false,
        _ => s < 0.0,
    };
    if r.is_infinite() {
        // overflow: a mode that points towards zero stops at the largest finite value
        return if (r > 0.0) != up { f32::MAX.copysign(r) } else { r };
    }
    let over = f64::from(r) - s - e; // > 0: the rounded value lies above the exact one
    if (up && over < 0.0) || (!up && over > 0.0) { step32(r, up) } else { r }
}

/// Rounds the exact value `s + e` to f64, `s` being its nearest f64.
pub fn round64(s: f64, e: f64, mode: Round) -> f64 {
    let up = match mode {
        Round::Near => return s,
        Round::Up => true,
        Round::Down => false,
        Round::Zero => s < 0.0,
    };
    if !s.is_finite() || e == 0.0 || (e > 0.0) != up {
        s
    } else if up {
        s.next_up()
    } else {
        s.next_down()
    }
}

/// Error of the rounded sum: `a + b == s + two_sum(a, b, s)` exactly.
#[inline(always)]
pub fn two_sum(a: f64, b: f64, s: f64) -> f64 {
    let t = s - a;
    (a - (s - t)) + (b - t)
}

pub fn add32(a: f32, b: f32, m: Round) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    let s = a + b;
    round32(s, two_sum(a, b, s), m)
}
pub fn mul32(a: f32, b: f32, m: Round) -> f32 {
    round32(f64::from(a) * f64::from(b), 0.0, m)
}
pub fn fma32(a: f32, b: f32, c: f32, m: Round) -> f32 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let s = p + c;
    round32(s, two_sum(p, c, s), m)
}
pub fn div32(a: f32, b: f32, m: Round) -> f32 {
    let q = a / b;
    // the residual has the sign of (exact - q) when b > 0
    let r = (-f64::from(q)).mul_add(f64::from(b), f64::from(a)) * f64::from(b).signum();
    fix32(q, r, m)
}
pub fn sqrt32(a: f32, m: Round) -> f32 {
    let q = a.sqrt();
    fix32(q, (-f64::from(q)).mul_add(f64::from(q), f64::from(a)), m)
}
/// `q` is the nearest f32, `r` has the sign of (exact - q).
fn fix32(q: f32, r: f64, m: Round) -> f32 {
    let up = match m {
        Round::Near => return q,
        Round::Up => true,
        Round::Down => false,
        Round::Zero => q < 0.0,
    };
    if q.is_finite() && r != 0.0 && (r > 0.0) == up { step32(q, up) } else { q }
}
pub fn add64(a: f64, b: f64, m: Round) -> f64 {
    let s = a + b;
    round64(s, two_sum(a, b, s), m)
}
pub fn mul64(a: f64, b: f64, m: Round) -> f64 {
    let s = a * b;
    round64(s, a.mul_add(b, -s), m)
}
pub fn fma64(a: f64, b: f64, c: f64, m: Round) -> f64 {
    let s = a.mul_add(b, c);
    if m == Round::Near {
        return s;
    }
    let p = a * b;
    let pe = a.mul_add(b, -p);
    let t = p + c;
    round64(s, ((t - s) + two_sum(p, c, t)) + pe, m)
}

/// f64 to f32 by rounding to odd, so that a later rounding to a half type is correct.
#[inline(always)]
pub fn odd32(s: f64) -> f32 {
    let r = s as f32;
    let back = f64::from(r);
    if back == s || r.is_nan() || r.to_bits() & 1 == 1 {
        return r;
    }
    // the neighbour of an even inexact result on the exact value's side is odd
    let away = (back.abs() < s.abs()) as u32;
    f32::from_bits(r.to_bits() + away - (1 - away))
}

/// Round to integer, as `.rni .rzi .rmi .rpi` do.
pub fn rint(x: f64, m: Round) -> f64 {
    match m {
        Round::Near => x.round_ties_even(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        Round::Up => x.ceil(),
    }
}

/// A 16-bit floating-point format, handled N lanes at a time through f32.
pub trait Half {
    fn widen<const N: usize>(a: &[u16; N]) -> [f32; N];
    fn narrow<const N: usize>(a: &[f32; N]) -> [u16; N];
    fn from64(a: f64) -> u16;
}
pub struct F16;
pub struct BF16;

impl Half for F16 {
    #[inline(always)]
    fn widen<const N: usize>(a: &[u16; N]) -> [f32; N] {
        let mut out = [0f32; N];
        as_f16(a).convert_to_f32_slice(&mut out);
        out
    }
    #[inline(always)]
    fn narrow<const N: usize>(a: &[f32; N]) -> [u16; N] {
        let mut out = [half::f16::ZERO; N];
        out.convert_from_f32_slice(a);
        out.map(half::f16::to_bits)
    }
    fn from64(a: f64) -> u16 {
        half::f16::from_f32(odd32(a)).to_bits()
    }
}

fn as_f16(a: &[u16]) -> &[half::f16] {
    use half::slice::HalfBitsSliceExt;
    a.reinterpret_cast()
}

impl Half for BF16 {
    #[inline(always)]
    fn widen<const N: usize>(a: &[u16; N]) -> [f32; N] {
        a.map(|x| f32::from_bits(u32::from(x) << 16))
    }
    #[inline(always)]
    fn narrow<const N: usize>(a: &[f32; N]) -> [u16; N] {
        a.map(bf16_bits)
    }
    fn from64(a: f64) -> u16 {
        bf16_bits(odd32(a))
    }
}

/// f32 to bfloat16 bits, to nearest even; NaN stays a (quiet) NaN.
#[inline(always)]
pub fn bf16_bits(x: f32) -> u16 {
    let b = x.to_bits();
    let r = (b.wrapping_add(0x7fff + ((b >> 16) & 1)) >> 16) as u16;
    if x.is_nan() { 0x7fff } else { r }
}
#[inline(always)]
pub fn f16_to32(x: u16) -> f32 {
    half::f16::from_bits(x).to_f32()
}
#[inline(always)]
pub fn bf16_to32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directed_rounding() {
        let t = 2f32.powi(-30);
        assert_eq!(add32(1.0, t, Round::Zero), 1.0);
        assert_eq!(add32(1.0, t, Round::Up), 1f32.next_up());
        assert_eq!(add32(1.0, -t, Round::Zero), 1f32.next_down());
        assert_eq!(add32(1.0, -t, Round::Near), 1.0);
        assert_eq!(fma32(t, t, 1.0, Round::Up), 1f32.next_up());
        assert_eq!(fma32(-t, t, 1.0, Round::Down), 1f32.next_down());
        assert_eq!(mul32(f32::MAX, 2.0, Round::Zero), f32::MAX);
        assert_eq!(div32(1.0, 3.0, Round::Down).next_up(), div32(1.0, 3.0, Round::Up));
        assert_eq!(add64(1.0, 1e-30, Round::Up), 1f64.next_up());
        assert_eq!(add64(1.0, -1e-30, Round::Zero), 1f64.next_down());
    }

    #[test]
    fn half_rounding() {
        let mut s = 12345u32;
        for _ in 0..100_000 {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(s);
            if x.is_nan() {
                continue;
            }
            assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x}");
            // no neighbour is nearer, and a tie goes to the even one
            let d = f64::from(x) * 1.000_000_01;
            let r = F16::from64(d);
            let off = |b: u16| (f64::from(f16_to32(b)) - d).abs();
            if d.abs() < 65504.0 {
                let near = off(r.wrapping_add(1)).min(off(r.wrapping_sub(1)));
                assert!(off(r) < near || (off(r) == near && r & 1 == 0), "{d}");
            }
        }
    }
}
