//! Register-to-register instructions: from an opcode to the function that runs it on a warp.
#[macro_use]
mod macros;
mod bits;
mod carry;
mod compare;
mod convert;
mod float;
mod half;
mod integer;

use super::exec::Cx;
use super::ir::{Class, Exec, Inst};
use super::math::{Round, ftz};

pub use bits::lop3;
pub use compare::compare;
pub use convert::{convert, pack_halves};

/// An instruction's function, the classes of its operands and the immediate for `Inst::x`.
pub struct Alu {
    pub f: Exec,
    pub dst: Class,
    pub src: Vec<Class>,
    pub x: u64,
}

/// Register class of a PTX type.
pub fn class_of(ty: &str) -> Option<Class> {
    Some(match ty {
        "pred" => Class::P,
        "b8" | "u8" | "s8" | "b16" | "u16" | "s16" | "f16" | "bf16" => Class::W16,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" | "tf32" => Class::W32,
        "b64" | "u64" | "s64" | "f64" => Class::W64,
        _ => return None,
    })
}

/// Rounding, flush and saturation modifiers of a floating-point instruction.
#[derive(Clone, Copy)]
struct Mode {
    round: Round,
    ftz: bool,
    sat: bool,
}

impl Mode {
    fn parse(mods: &[&str]) -> Self {
        let round = mods.iter().find_map(|m| match *m {
            "rz" | "rzi" => Some(Round::Zero),
            "rm" | "rmi" => Some(Round::Down),
            "rp" | "rpi" => Some(Round::Up),
            _ => None,
        });
        Mode {
            round: round.unwrap_or(Round::Near),
            ftz: mods.contains(&"ftz"),
            sat: mods.contains(&"sat"),
        }
    }
    fn plain(self) -> bool {
        self.round == Round::Near && !self.ftz && !self.sat
    }
    fn pack(self) -> u64 {
        self.round as u64 | u64::from(self.ftz) << 2 | u64::from(self.sat) << 3
    }
    fn of(x: u64) -> Self {
        let round = [Round::Near, Round::Zero, Round::Down, Round::Up][(x & 3) as usize];
        Mode { round, ftz: x >> 2 & 1 != 0, sat: x >> 3 & 1 != 0 }
    }
    fn arg(self, x: f32) -> f32 {
        if self.ftz { ftz(x) } else { x }
    }
    fn res(self, x: f32) -> f32 {
        let x = self.arg(x);
        if self.sat { sat(f64::from(x)) as f32 } else { x }
    }
}

fn sat(x: f64) -> f64 {
    if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) }
}

/// Whether an instruction's modifiers are all understood.
fn known(base: &str, mods: &[&str], half: bool) -> bool {
    let allowed: &[&str] = match base {
        "fma" if half => &["rn", "relu", "sat"],
        "add" | "sub" | "mul" if half => &["rn", "noftz"],
        "add" | "sub" | "mul" | "mad" | "fma" | "addc" | "subc" | "madc" => {
            &["rn", "rz", "rm", "rp", "ftz", "sat", "lo", "hi", "wide", "cc"]
        }
        "div" | "sqrt" | "rcp" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => {
            &["rn", "rz", "rm", "rp", "ftz", "approx", "full"]
        }
        "mul24" => &["lo"],
        "min" | "max" => &["ftz", "NaN"],
        "abs" | "neg" => &["ftz"],
        "shf" => &["l", "r", "clamp", "wrap"],
        "bfind" => &["shiftamt"],
        "dp4a" => &["s32", "u32"],
        "testp" => &["finite", "infinite", "notanumber", "normal", "subnormal"],
        _ => &[],
    };
    mods.iter().all(|m| allowed.contains(m))
}

/// An instruction as it is written.
struct Form<'a> {
    base: &'a str,
    mods: &'a [&'a str],
    ty: &'a str,
    cls: Class,
    mode: Mode,
}

impl Form<'_> {
    fn has(&self, modifier: &str) -> bool {
        self.mods.contains(&modifier)
    }
    fn is_half(&self) -> bool {
        matches!(self.ty, "f16" | "bf16" | "f16x2" | "bf16x2")
    }
    /// An instruction of `n` operands of its own type.
    fn plain(&self, f: Exec, n: usize) -> Option<Alu> {
        Some(Alu { f, dst: self.cls, src: vec![self.cls; n], x: 0 })
    }
    /// As `plain`, with its rounding in `x`.
    fn moded(&self, f: Exec, n: usize) -> Option<Alu> {
        Some(Alu { f, dst: self.cls, src: vec![self.cls; n], x: self.mode.pack() })
    }
    fn mixed(&self, f: Exec, dst: Class, src: &[Class]) -> Option<Alu> {
        Some(Alu { f, dst, src: src.to_vec(), x: 0 })
    }
}

/// Looks up a register-to-register instruction by its dot-separated parts.
pub fn alu(parts: &[&str]) -> Option<Alu> {
    let (base, mods, ty) = (parts[0], parts.get(1..parts.len() - 1)?, *parts.last()?);
    let form = Form { base, mods, ty, cls: class_of(ty)?, mode: Mode::parse(mods) };
    if !known(base, mods, form.is_half()) {
        return None;
    }
    if form.has("cc") || matches!(base, "addc" | "subc" | "madc") {
        let (f, n) = carry::carry_op(base, mods, ty)?;
        return form.plain(f, n);
    }
    let families = [float::float, integer::integer, bits::bits, choice];
    families.into_iter().find_map(|family| family(&form))
}

/// Moves, selections and tests of a value.
fn choice(form: &Form<'_>) -> Option<Alu> {
    let Form { base, mods, ty, cls, .. } = *form;
    match base {
        "selp" => {
            macro_rules! selp {
                ($t:ty, $e:expr) => {
                    exec!(c, i => {
                        let p = c.pred(i.c);
                        let (a, b) = (c.reg::<$t>(i.a), c.reg::<$t>(i.b));
                        let mut o = [0 as $t; 32];
                        for l in 0..32 { o[l] = if p >> l & 1 != 0 { a[l] } else { b[l] }; }
                        c.put(i.d, &o)
                    })
                };
            }
            let f = match cls {
                Class::W16 => selp!(u16, ()),
                Class::W32 => selp!(u32, ()),
                _ => selp!(u64, ()),
            };
            form.mixed(f, cls, &[cls, cls, Class::P])
        }
        "testp" => {
            macro_rules! testp {
                ($($name:literal => $m:ident),*) => {
                    match (mods.first().copied()?, ty) {
                        $(($name, "f32") => exec!(c, i => c.compare::<f32>(i, |a, _| a.$m())),
                          ($name, _) => exec!(c, i => c.compare::<f64>(i, |a, _| a.$m())),)*
                        _ => return None,
                    }
                };
            }
            let f = testp!("finite" => is_finite, "infinite" => is_infinite, "notanumber" => is_nan, "normal" => is_normal, "subnormal" => is_subnormal);
            form.mixed(f, Class::P, &[cls])
        }
        "mov" if ty == "pred" => {
            form.plain(exec!(c, i => { let v = c.pred(i.a); c.put_pred(i.d, v) }), 1)
        }
        "mov" => form.plain(
            match cls {
                Class::W16 => un!(u16, |a| a),
                Class::W32 => un!(u32, |a| a),
                _ => un!(u64, |a| a),
            },
            1,
        ),
        _ => None,
    }
}
