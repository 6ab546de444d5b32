//! Logic, shifts, fields of bits and bytes.
use super::super::exec::Cx;
use super::super::ir::{Class, Exec, Inst};
use super::{Alu, Form};

/// The instruction, if it works on bits.
pub(super) fn bits(form: &Form<'_>) -> Option<Alu> {
    let Form { base, mods, ty, cls, .. } = *form;
    let has = |m: &str| form.has(m);
    let plain = |f: Exec, n: usize| form.plain(f, n);
    let mixed = |f: Exec, dst: Class, src: &[Class]| form.mixed(f, dst, src);
    match base {
        "and" | "or" | "xor" | "not" if ty == "pred" => {
            let f = match base {
                "and" => exec!(c, i => { let v = c.pred(i.a) & c.pred(i.b); c.put_pred(i.d, v) }),
                "or" => exec!(c, i => { let v = c.pred(i.a) | c.pred(i.b); c.put_pred(i.d, v) }),
                "xor" => exec!(c, i => { let v = c.pred(i.a) ^ c.pred(i.b); c.put_pred(i.d, v) }),
                _ => exec!(c, i => { let v = !c.pred(i.a); c.put_pred(i.d, v) }),
            };
            plain(f, if base == "not" { 1 } else { 2 })
        }
        "and" => plain(width!(ty, op2, |a, b| a & b), 2),
        "or" => plain(width!(ty, op2, |a, b| a | b), 2),
        "xor" => plain(width!(ty, op2, |a, b| a ^ b), 2),
        "not" => plain(width!(ty, un, |a| !a), 1),
        "cnot" => plain(width!(ty, un, |a| (a == 0).into()), 1),
        "shl" => {
            mixed(width!(ty, shift, |a, s| a.checked_shl(s).unwrap_or(0)), cls, &[cls, Class::W32])
        }
        "shr" => {
            let f = match ty {
                "s16" => shift!(i16, |a, s| a >> s.min(15)),
                "s32" => shift!(i32, |a, s| a >> s.min(31)),
                "s64" => shift!(i64, |a, s| a >> s.min(63)),
                _ => width!(ty, shift, |a, s| a.checked_shr(s).unwrap_or(0)),
            };
            mixed(f, cls, &[cls, Class::W32])
        }
        "shf" => {
            let wrap = has("wrap");
            macro_rules! shf {
                ($e:expr) => {
                    op3!(u32, u32, u32 => u32, $e)
                };
            }
            plain(
                match (has("l"), wrap) {
                    (true, true) => {
                        shf!(|a, b, s| ((u64::from(b) << 32 | u64::from(a)) << (s & 31) >> 32)
                            as u32)
                    }
                    (true, false) => shf!(|a, b, s| ((u64::from(b) << 32 | u64::from(a))
                        << s.min(32)
                        >> 32) as u32),
                    (false, true) => {
                        shf!(|a, b, s| ((u64::from(b) << 32 | u64::from(a)) >> (s & 31)) as u32)
                    }
                    (false, false) => {
                        shf!(|a, b, s| ((u64::from(b) << 32 | u64::from(a)) >> s.min(32)) as u32)
                    }
                },
                3,
            )
        }
        "popc" | "clz" | "bfind" => {
            let f = match (base, ty) {
                ("bfind", "u32") if has("shiftamt") => {
                    op1!(u32 => u32, |a| if a == 0 { !0 } else { a.leading_zeros() })
                }
                ("bfind", "u64") if has("shiftamt") => {
                    op1!(u64 => u32, |a| if a == 0 { !0 } else { a.leading_zeros() })
                }
                ("bfind", _) if has("shiftamt") => return None,
                ("popc", "b32") => op1!(u32 => u32, |a| a.count_ones()),
                ("popc", _) => op1!(u64 => u32, |a| a.count_ones()),
                ("clz", "b32") => op1!(u32 => u32, |a| a.leading_zeros()),
                ("clz", _) => op1!(u64 => u32, |a| a.leading_zeros()),
                ("bfind", "u32") => op1!(u32 => u32, |a| 31u32.wrapping_sub(a.leading_zeros())),
                ("bfind", "s32") => {
                    op1!(i32 => u32, |a| 31u32.wrapping_sub((a ^ a >> 31).leading_zeros()))
                }
                ("bfind", "u64") => op1!(u64 => u32, |a| 63u32.wrapping_sub(a.leading_zeros())),
                _ => return None,
            };
            mixed(f, Class::W32, &[cls])
        }
        "brev" if ty == "b32" => plain(un!(u32, |a| a.reverse_bits()), 1),
        "brev" => plain(un!(u64, |a| a.reverse_bits()), 1),
        "bfe" => {
            fn field(a: u64, pos: u32, len: u32, bits: u32, signed: bool) -> u64 {
                let (pos, len) = (pos & 255, len & 255);
                let top = pos.saturating_add(len).min(bits);
                let v = if pos >= bits { 0 } else { a >> pos };
                let n = top.saturating_sub(pos);
                let sign = signed && len > 0 && a >> (top - 1).min(bits - 1) & 1 != 0;
                let m = if n >= 64 { !0 } else { (1u64 << n) - 1 };
                if sign { v & m | !m } else { v & m }
            }
            let f = match ty {
                "u32" => {
                    op3!(u32, u32, u32 => u32, |a, p, n| field(a.into(), p, n, 32, false) as u32)
                }
                "s32" => {
                    op3!(u32, u32, u32 => u32, |a, p, n| field(a.into(), p, n, 32, true) as u32)
                }
                "u64" => op3!(u64, u32, u32 => u64, |a, p, n| field(a, p, n, 64, false)),
                _ => op3!(u64, u32, u32 => u64, |a, p, n| field(a, p, n, 64, true)),
            };
            mixed(f, cls, &[cls, Class::W32, Class::W32])
        }
        "bfi" => {
            fn insert(a: u64, b: u64, pos: u32, len: u32, bits: u32) -> u64 {
                let (pos, len) = (pos & 255, (len & 255).min(bits));
                if pos >= bits || len == 0 {
                    return b;
                }
                let m = (if len >= 64 { !0 } else { (1u64 << len) - 1 }) << pos;
                b & !m | a << pos & m
            }
            // the fourth operand's register is in `x`
            let f = match ty {
                "b32" => {
                    exec!(c, i => { let n = *c.reg::<u32>(i.x as u32); let (a, b, p) = (c.reg::<u32>(i.a), c.reg::<u32>(i.b), c.reg::<u32>(i.c));
                    let o: [u32; 32] = std::array::from_fn(|l| insert(a[l].into(), b[l].into(), p[l], n[l], 32) as u32); c.put(i.d, &o) })
                }
                _ => {
                    exec!(c, i => { let n = *c.reg::<u32>(i.x as u32); let (a, b, p) = (c.reg::<u64>(i.a), c.reg::<u64>(i.b), c.reg::<u32>(i.c));
                    let o: [u64; 32] = std::array::from_fn(|l| insert(a[l], b[l], p[l], n[l], 64)); c.put(i.d, &o) })
                }
            };
            mixed(f, cls, &[cls, cls, Class::W32, Class::W32])
        }
        "prmt" if mods.is_empty() => plain(
            op3!(u32, |a, b, s| {
                let src = u64::from(b) << 32 | u64::from(a);
                (0..4).fold(0u32, |r, k| {
                    let sel = s >> (4 * k);
                    let byte = (src >> (8 * (sel & 7))) as u8;
                    let byte = if sel & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
                    r | u32::from(byte) << (8 * k)
                })
            }),
            3,
        ),
        "dp4a" if mods != [ty] => None,
        "dp4a" => plain(
            match ty {
                "s32" => op3!(u32, |a, b, d| (0..4).fold(d, |s, k| s.wrapping_add(
                    ((a >> (8 * k)) as i8 as i32 * (b >> (8 * k)) as i8 as i32) as u32
                ))),
                _ => op3!(u32, |a, b, d| (0..4)
                    .fold(d, |s, k| s.wrapping_add((a >> (8 * k) & 255) * (b >> (8 * k) & 255)))),
            },
            3,
        ),
        _ => None,
    }
}

/// `lop3`: the truth table is in `x`.
pub fn lop3(c: &mut Cx<'_>, i: &Inst) {
    let t = i.x;
    c.map3::<u32, u32, u32, u32>(i, |a, b, d| {
        (0..8).filter(|k| t >> k & 1 != 0).fold(0, |r, k| {
            let pick = |v: u32, bit: u32| if k & bit != 0 { v } else { !v };
            r | pick(a, 4) & pick(b, 2) & pick(d, 1)
        })
    });
}
