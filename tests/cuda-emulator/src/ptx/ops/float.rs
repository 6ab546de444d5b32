//! Arithmetic on f32, f64 and halves.
use super::super::exec::Cx;
use super::super::ir::{Exec, Inst};
use super::super::math::{self, BF16, F16, Round, ftz};
use super::half::{half_bits, half1, half2, half3};
use super::{Alu, Form, Mode};

fn odd_fma(a: f32, b: f32, c: f32) -> f32 {
    math::odd32(f64::from(a).mul_add(f64::from(b), f64::from(c)))
}
macro_rules! minmax {
    ($name:ident, $t:ty, $less:tt) => {
        /// IEEE minimum (maximum): a number beats a NaN, -0 is below +0.
        fn $name(a: $t, b: $t) -> $t {
            if a.is_nan() || b $less a || (a == b && (b.is_sign_negative() == ((0 as $t) $less (1 as $t)))) {
                if b.is_nan() { a } else { b }
            } else {
                a
            }
        }
    };
}
minmax!(min32, f32, <);
minmax!(max32, f32, >);
minmax!(min64, f64, <);
minmax!(max64, f64, >);
fn nan_or(a: f32, b: f32, r: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { r }
}

/// The instruction, if it computes with floating-point numbers.
pub(super) fn float(form: &Form<'_>) -> Option<Alu> {
    let Form { base, ty, mode, .. } = *form;
    let has = |m: &str| form.has(m);
    let plain = |f: Exec, n: usize| form.plain(f, n);
    let moded = |f: Exec, n: usize| form.moded(f, n);
    let floaty = matches!(ty, "f32" | "f64");
    let halfy = form.is_half();
    if !(floaty || halfy) {
        return None;
    }
    macro_rules! arith {
        ($e:expr, $slow32:expr, $slow64:expr) => {
            match ty {
                "f32" if mode.plain() => plain(op2!(f32, $e), 2),
                "f64" if mode.plain() => plain(op2!(f64, $e), 2),
                "f32" => moded(
                    exec!(c, i => { let m = Mode::of(i.x); c.map2::<f32, f32, f32>(i, |a, b| m.res($slow32(m.arg(a), m.arg(b), m.round))) }),
                    2,
                ),
                "f64" => moded(exec!(c, i => { let m = Mode::of(i.x); c.map2::<f64, f64, f64>(i, |a, b| $slow64(a, b, m.round)) }), 2),
                _ => plain(half_op!(ty, half2, $e), 2),
            }
        };
    }
    /// f32 function with optional flushing.
    macro_rules! fun32 {
        ($e:expr) => {{
            if mode.ftz {
                plain(exec!(c, i => { let f: fn(f32) -> f32 = $e; c.map1::<f32, f32>(i, |a| ftz(f(ftz(a)))) }), 1)
            } else {
                plain(op1!(f32 => f32, $e), 1)
            }
        }};
    }
    match base {
        "add" => arith!(|a, b| a + b, math::add32, math::add64),
        "sub" => {
            arith!(|a, b| a - b, |a: f32, b: f32, m| math::add32(a, -b, m), |a: f64, b: f64, m| {
                math::add64(a, -b, m)
            })
        }
        "mul" => arith!(|a, b| a * b, math::mul32, math::mul64),
        "div" if floaty => arith!(|a, b| a / b, math::div32, |a: f64, b: f64, _| a / b),
        "fma" | "mad" if floaty => match ty {
            "f32" if mode.plain() => plain(op3!(f32, |a, b, d| a.mul_add(b, d)), 3),
            "f64" if mode.plain() => plain(op3!(f64, |a, b, d| a.mul_add(b, d)), 3),
            "f32" => moded(
                exec!(c, i => { let m = Mode::of(i.x); c.map3::<f32, f32, f32, f32>(i, |a, b, d| m.res(math::fma32(m.arg(a), m.arg(b), m.arg(d), m.round))) }),
                3,
            ),
            _ => moded(
                exec!(c, i => { let m = Mode::of(i.x); c.map3::<f64, f64, f64, f64>(i, |a, b, d| math::fma64(a, b, d, m.round)) }),
                3,
            ),
        },
        "fma" if has("relu") => plain(half_op!(ty, half3, |a, b, d| odd_fma(a, b, d).max(0.0)), 3),
        "fma" if has("sat") => {
            plain(half_op!(ty, half3, |a, b, d| odd_fma(a, b, d).clamp(0.0, 1.0)), 3)
        }
        "fma" => plain(half_op!(ty, half3, odd_fma), 3),
        "min" | "max" => {
            let (max, nan) = (base == "max", has("NaN"));
            match (ty, max, nan) {
                ("f32", false, false) => plain(op2!(f32, min32), 2),
                ("f32", true, false) => plain(op2!(f32, max32), 2),
                ("f32", false, true) => plain(op2!(f32, |a, b| nan_or(a, b, min32(a, b))), 2),
                ("f32", true, true) => plain(op2!(f32, |a, b| nan_or(a, b, max32(a, b))), 2),
                ("f64", false, _) => plain(op2!(f64, min64), 2),
                ("f64", true, _) => plain(op2!(f64, max64), 2),
                (_, false, false) => plain(half_op!(ty, half2, min32), 2),
                (_, true, false) => plain(half_op!(ty, half2, max32), 2),
                (_, false, true) => plain(half_op!(ty, half2, |a, b| nan_or(a, b, min32(a, b))), 2),
                (_, true, true) => plain(half_op!(ty, half2, |a, b| nan_or(a, b, max32(a, b))), 2),
            }
        }
        "abs" | "neg" => match (ty, base) {
            ("f32", "abs") => fun32!(|a| a.abs()),
            ("f32", _) => fun32!(|a| -a),
            ("f64", "abs") => plain(un!(f64, |a| a.abs()), 1),
            ("f64", _) => plain(un!(f64, |a| -a), 1),
            ("f16" | "bf16", "abs") => plain(un!(u16, |a| a & 0x7fff), 1),
            ("f16" | "bf16", _) => plain(un!(u16, |a| a ^ 0x8000), 1),
            (_, "abs") => plain(exec!(c, i => half_bits::<u32, 64>(c, i, |a| a & 0x7fff)), 1),
            _ => plain(exec!(c, i => half_bits::<u32, 64>(c, i, |a| a ^ 0x8000)), 1),
        },
        "copysign" => match ty {
            "f32" => plain(op2!(f32, |a, b| b.copysign(a)), 2),
            _ => plain(op2!(f64, |a, b| b.copysign(a)), 2),
        },
        "sqrt" | "rcp" if floaty && mode.round != Round::Near => match (base, ty) {
            ("sqrt", "f32") => moded(
                exec!(c, i => { let m = Mode::of(i.x); c.map1::<f32, f32>(i, |a| m.res(math::sqrt32(m.arg(a), m.round))) }),
                1,
            ),
            ("rcp", "f32") => moded(
                exec!(c, i => { let m = Mode::of(i.x); c.map1::<f32, f32>(i, |a| m.res(math::div32(1.0, m.arg(a), m.round))) }),
                1,
            ),
            _ => None,
        },
        "sqrt" => match ty {
            "f32" => fun32!(|a| a.sqrt()),
            _ => plain(un!(f64, |a| a.sqrt()), 1),
        },
        "rcp" => match ty {
            "f32" => fun32!(|a| 1.0 / a),
            _ if has("approx") => {
                plain(un!(f64, |a| f64::from_bits((1.0 / a).to_bits() & !0xffff_ffff)), 1)
            }
            _ => plain(un!(f64, |a| 1.0 / a), 1),
        },
        "rsqrt" => match ty {
            "f32" => fun32!(|a| (1.0 / f64::from(a).sqrt()) as f32),
            _ => plain(un!(f64, |a| f64::from_bits((1.0 / a.sqrt()).to_bits() & !0xffff_ffff)), 1),
        },
        "sin" if ty == "f32" => fun32!(|a| f64::from(a).sin() as f32),
        "cos" if ty == "f32" => fun32!(|a| f64::from(a).cos() as f32),
        "lg2" if ty == "f32" => fun32!(|a| f64::from(a).log2() as f32),
        "ex2" if ty == "f32" => fun32!(|a| a.exp2()),
        "tanh" if ty == "f32" => fun32!(|a| f64::from(a).tanh() as f32),
        "ex2" => plain(half_op!(ty, half1, |a| a.exp2()), 1),
        "tanh" => plain(half_op!(ty, half1, |a| a.tanh()), 1),
        _ => None,
    }
}
