//! Conversions between scalar types.
use super::super::exec::{Cx, bits};
use super::super::ir::{Class, Exec, Inst};
use super::super::math::{self, BF16, F16, Half, Round};
use super::{Mode, class_of, sat};

/// Packs two f32 into a half pair: `d = {a (high), b (low)}`.
pub fn pack_halves(ty: &str, relu: bool) -> Option<Exec> {
    fn pack<H: Half>(c: &mut Cx<'_>, i: &Inst, relu: bool) {
        let f = |x: f32| if relu && x <= 0.0 { 0.0 } else { x };
        let hi = H::narrow(&c.reg::<f32>(i.a).map(f));
        let lo = H::narrow(&c.reg::<f32>(i.b).map(f));
        let o: [u32; 32] = std::array::from_fn(|l| u32::from(hi[l]) << 16 | u32::from(lo[l]));
        c.put(i.d, &o);
    }
    Some(match (ty, relu) {
        ("f16x2", false) => exec!(c, i => pack::<F16>(c, i, false)),
        ("f16x2", true) => exec!(c, i => pack::<F16>(c, i, true)),
        ("bf16x2", false) => exec!(c, i => pack::<BF16>(c, i, false)),
        ("bf16x2", true) => exec!(c, i => pack::<BF16>(c, i, true)),
        _ => return None,
    })
}

const TYPES: [&str; 12] =
    ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"];

/// Conversion between scalar types; `dst` and `src` are the registers' classes.
pub fn convert(mods: &[&str], to: &str, from: &str, dst: Class, src: Class) -> Option<(Exec, u64)> {
    const KNOWN: [&str; 10] = ["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat"];
    if !mods.iter().all(|m| KNOWN.contains(m)) {
        return None;
    }
    let mode = Mode::parse(mods);
    let integral = mods.iter().any(|m| matches!(*m, "rni" | "rzi" | "rmi" | "rpi"));
    let code = |t: &str| TYPES.iter().position(|&x| x == t).map(|p| p as u64);
    let x = mode.pack() | u64::from(integral) << 4 | code(to)? << 8 | code(from)? << 16;
    let slow: (Exec, u64) = (convert_any, x | (dst as u64) << 24 | (src as u64) << 28);
    if class_of(to)? != dst || class_of(from)? != src || mode.ftz || mode.sat {
        return Some(slow);
    }
    macro_rules! to_ints {
        ($s:ty) => {
            match dst {
                Class::W16 => op1!($s => u16, |a| a as u16),
                Class::W32 => op1!($s => u32, |a| a as u32),
                _ => op1!($s => u64, |a| a as u64),
            }
        };
    }
    let to_int = to.starts_with(['u', 's']) && !to.ends_with('8');
    let fast = match (from, to, mode.round) {
        ("u16", _, _) if to_int => to_ints!(u16),
        ("s16", _, _) if to_int => to_ints!(i16),
        ("u32", _, _) if to_int => to_ints!(u32),
        ("s32", _, _) if to_int => to_ints!(i32),
        ("u64", _, _) if to_int => to_ints!(u64),
        ("s64", _, _) if to_int => to_ints!(i64),
        // float to integer saturates and takes NaN to 0 in Rust as in PTX
        ("f32", "s32", Round::Zero) => op1!(f32 => i32, |a| a as i32),
        ("f32", "u32", Round::Zero) => op1!(f32 => u32, |a| a as u32),
        ("f32", "s64", Round::Zero) => op1!(f32 => i64, |a| a as i64),
        ("f32", "s32", Round::Near) => op1!(f32 => i32, |a| a.round_ties_even() as i32),
        ("f32", "s32", Round::Down) => op1!(f32 => i32, |a| a.floor() as i32),
        ("f64", "s32", Round::Zero) => op1!(f64 => i32, |a| a as i32),
        ("f64", "s64", Round::Zero) => op1!(f64 => i64, |a| a as i64),
        ("f32", "f32", Round::Near) if integral => op1!(f32 => f32, |a| a.round_ties_even()),
        ("f32", "f32", Round::Zero) if integral => op1!(f32 => f32, |a| a.trunc()),
        ("f32", "f32", Round::Down) if integral => op1!(f32 => f32, |a| a.floor()),
        ("f32", "f32", Round::Up) if integral => op1!(f32 => f32, |a| a.ceil()),
        ("f32", "f64", _) if !integral => op1!(f32 => f64, |a| a.into()),
        ("f64", "f32", Round::Near) => op1!(f64 => f32, |a| a as f32),
        ("f16", "f32", _) if !integral => {
            exec!(c, i => { let o = F16::widen(c.reg::<u16>(i.a)); c.put(i.d, &o) })
        }
        ("f32", "f16", Round::Near) => {
            exec!(c, i => { let o = F16::narrow(c.reg::<f32>(i.a)); c.put(i.d, &o) })
        }
        ("bf16", "f32", _) if !integral => {
            exec!(c, i => { let o = BF16::widen(c.reg::<u16>(i.a)); c.put(i.d, &o) })
        }
        ("f32", "bf16", Round::Near) => {
            exec!(c, i => { let o = BF16::narrow(c.reg::<f32>(i.a)); c.put(i.d, &o) })
        }
        ("s32", "f32", Round::Near) => op1!(i32 => f32, |a| a as f32),
        ("u32", "f32", Round::Near) => op1!(u32 => f32, |a| a as f32),
        ("s64", "f32", Round::Near) => op1!(i64 => f32, |a| a as f32),
        ("u64", "f32", Round::Near) => op1!(u64 => f32, |a| a as f32),
        ("s32", "f64", _) => op1!(i32 => f64, |a| a.into()),
        ("u32", "f64", _) => op1!(u32 => f64, |a| a.into()),
        ("s64", "f64", Round::Near) => op1!(i64 => f64, |a| a as f64),
        ("u64", "f64", Round::Near) => op1!(u64 => f64, |a| a as f64),
        _ => return Some(slow),
    };
    Some((fast, 0))
}

enum Num {
    Int(i128),
    Float(f64),
}

/// The general conversion, lane by lane; type codes are positions in `TYPES`.
fn convert_any(c: &mut Cx<'_>, i: &Inst) {
    let mode = Mode::of(i.x);
    let integral = i.x >> 4 & 1 != 0;
    let (to, from) = (i.x >> 8 & 255, i.x >> 16 & 255);
    let class = |v: u64| [Class::P, Class::W16, Class::W32, Class::W64][(v & 15) as usize];
    let (dst, src) = (class(i.x >> 24), class(i.x >> 28));
    for l in bits(c.mask) {
        let raw = match src {
            Class::W16 => u64::from(c.reg::<u16>(i.a)[l]),
            Class::W32 => u64::from(c.reg::<u32>(i.a)[l]),
            _ => c.reg::<u64>(i.a)[l],
        };
        let v = match from {
            0 => Num::Int((raw as u8).into()),
            1 => Num::Int((raw as i8).into()),
            2 => Num::Int((raw as u16).into()),
            3 => Num::Int((raw as i16).into()),
            4 => Num::Int((raw as u32).into()),
            5 => Num::Int((raw as i32).into()),
            6 => Num::Int(raw.into()),
            7 => Num::Int((raw as i64).into()),
            8 => Num::Float(math::f16_to32(raw as u16).into()),
            9 => Num::Float(math::bf16_to32(raw as u16).into()),
            10 => Num::Float(mode.arg(f32::from_bits(raw as u32)).into()),
            _ => Num::Float(f64::from_bits(raw)),
        };
        let out = encode(v, to, mode, integral);
        match dst {
            Class::W16 => c.reg_mut::<u16>(i.d)[l] = out as u16,
            Class::W32 => c.reg_mut::<u32>(i.d)[l] = out as u32,
            _ => c.reg_mut::<u64>(i.d)[l] = out,
        }
    }
}

fn encode(v: Num, to: u64, mode: Mode, integral: bool) -> u64 {
    if to < 8 {
        let bits = 8 << (to >> 1);
        let (lo, hi): (i128, i128) = if to & 1 == 0 {
            (0, (1 << bits) - 1)
        } else {
            (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        };
        let n = match v {
            Num::Int(n) if mode.sat => n.clamp(lo, hi),
            // cut to the type, keeping its sign
            Num::Int(n) if to & 1 == 0 => n & hi,
            Num::Int(n) => n << (128 - bits) >> (128 - bits),
            Num::Float(f) => (math::rint(f, mode.round) as i128).clamp(lo, hi),
        };
        return n as u64;
    }
    let (s, e) = match v {
        Num::Int(n) => (n as f64, (n - (n as f64) as i128) as f64),
        Num::Float(f) if integral => (math::rint(f, mode.round), 0.0),
        Num::Float(f) => (f, 0.0),
    };
    let s = if mode.sat { sat(s) } else { s };
    let half = |from64: fn(f64) -> u16, to32: fn(u16) -> f32| {
        let r = from64(s);
        let back = f64::from(to32(r));
        let toward_zero = match mode.round {
            Round::Near => return r.into(),
            Round::Zero => true,
            Round::Down => s > 0.0,
            Round::Up => s < 0.0,
        };
        u64::from(match (back.abs() > s.abs(), back.abs() < s.abs()) {
            (true, _) if toward_zero => r - 1,
            (_, true) if !toward_zero => r + 1,
            _ => r,
        })
    };
    match to {
        8 => half(F16::from64, math::f16_to32),
        9 => half(BF16::from64, math::bf16_to32),
        10 => {
            let r = match (v, mode.round) {
                (Num::Int(n), Round::Near) => n as f32,
                _ => math::round32(s, e, mode.round),
            };
            u64::from(mode.arg(r).to_bits())
        }
        _ => math::round64(s, e, mode.round).to_bits(),
    }
}
