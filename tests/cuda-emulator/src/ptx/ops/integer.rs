//! Arithmetic on integers.
use super::super::exec::Cx;
use super::super::ir::{Class, Exec, Inst};
use super::{Alu, Form};

/// The instruction, if it computes with integers.
pub(super) fn integer(form: &Form<'_>) -> Option<Alu> {
    let Form { base, ty, cls, .. } = *form;
    let has = |m: &str| form.has(m);
    let plain = |f: Exec, n: usize| form.plain(f, n);
    let mixed = |f: Exec, dst: Class, src: &[Class]| form.mixed(f, dst, src);
    match base {
        "add" if has("sat") => plain(op2!(i32, |a, b| a.saturating_add(b)), 2),
        "sub" if has("sat") => plain(op2!(i32, |a, b| a.saturating_sub(b)), 2),
        "add" => plain(width!(ty, op2, |a, b| a.wrapping_add(b)), 2),
        "sub" => plain(width!(ty, op2, |a, b| a.wrapping_sub(b)), 2),
        "mul" | "mad" if has("wide") => {
            let mad = base == "mad";
            macro_rules! wide {
                ($t:ty, $w:ty) => {
                    if mad {
                        op3!($t, $t, $w => $w, |a, b, d| (a as $w).wrapping_mul(b as $w).wrapping_add(d))
                    } else {
                        op2!($t, $t => $w, |a, b| (a as $w).wrapping_mul(b as $w))
                    }
                };
            }
            let (f, w) = match ty {
                "u16" => (wide!(u16, u32), Class::W32),
                "s16" => (wide!(i16, i32), Class::W32),
                "u32" => (wide!(u32, u64), Class::W64),
                "s32" => (wide!(i32, i64), Class::W64),
                _ => return None,
            };
            mixed(f, w, &[cls, cls, w][..if mad { 3 } else { 2 }])
        }
        "mul" if has("hi") => plain(
            match ty {
                "u16" => op2!(u16, |a, b| (u32::from(a) * u32::from(b) >> 16) as u16),
                "s16" => op2!(i16, |a, b| (i32::from(a) * i32::from(b) >> 16) as i16),
                "u32" => op2!(u32, |a, b| (u64::from(a) * u64::from(b) >> 32) as u32),
                "s32" => op2!(i32, |a, b| (i64::from(a) * i64::from(b) >> 32) as i32),
                "u64" => op2!(u64, |a, b| (u128::from(a) * u128::from(b) >> 64) as u64),
                "s64" => op2!(i64, |a, b| (i128::from(a) * i128::from(b) >> 64) as i64),
                _ => return None,
            },
            2,
        ),
        "mad" if has("hi") => plain(
            match ty {
                "u32" => op3!(u32, |a, b, d| ((u64::from(a) * u64::from(b) >> 32) as u32)
                    .wrapping_add(d)),
                "s32" => op3!(i32, |a, b, d| ((i64::from(a) * i64::from(b) >> 32) as i32)
                    .wrapping_add(d)),
                "u64" => op3!(u64, |a, b, d| ((u128::from(a) * u128::from(b) >> 64) as u64)
                    .wrapping_add(d)),
                "s64" => op3!(i64, |a, b, d| ((i128::from(a) * i128::from(b) >> 64) as i64)
                    .wrapping_add(d)),
                _ => return None,
            },
            3,
        ),
        "mul" => plain(width!(ty, op2, |a, b| a.wrapping_mul(b)), 2),
        "mad" => plain(width!(ty, op3, |a, b, d| a.wrapping_mul(b).wrapping_add(d)), 3),
        "mul24" if ty == "u32" => {
            plain(op2!(u32, |a, b| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff)), 2)
        }
        "mul24" => plain(op2!(i32, |a, b| (a << 8 >> 8).wrapping_mul(b << 8 >> 8)), 2),
        "div" => plain(signed!(ty, div2, |a, b| if b == 0 { !0 } else { a.wrapping_div(b) }), 2),
        "rem" => plain(signed!(ty, div2, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }), 2),
        "min" => plain(signed!(ty, op2, |a, b| a.min(b)), 2),
        "max" => plain(signed!(ty, op2, |a, b| a.max(b)), 2),
        "abs" => plain(
            match ty {
                "s16" => un!(i16, |a| a.wrapping_abs()),
                "s32" => un!(i32, |a| a.wrapping_abs()),
                _ => un!(i64, |a| a.wrapping_abs()),
            },
            1,
        ),
        "neg" => plain(width!(ty, un, |a| a.wrapping_neg()), 1),
        "sad" => {
            plain(signed!(ty, op3, |a, b, d| d.wrapping_add(a.max(b).wrapping_sub(a.min(b)))), 3)
        }
        _ => None,
    }
}
