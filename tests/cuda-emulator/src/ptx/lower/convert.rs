//! Comparisons, conversions, and registers in parts.
use super::{Lower, Res};
use crate::ptx::exec::{Cx, Lane};
use crate::ptx::ir::{Class, Exec, Inst, P_TRUE, Space, tag};
use crate::ptx::ops::{self, class_of};

impl<'a> Lower<'a> {
    pub(super) fn compare(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let ty = *parts.last().unwrap();
        let class = class_of(ty).ok_or("type")?;
        let f = ops::compare(parts[1], ty).ok_or("comparison")?;
        let (mut a, mut b) = (self.operand(args[1], class)?, self.operand(args[2], class)?);
        if parts.contains(&"ftz") && ty == "f32" {
            let (flush, one) =
                (ops::alu(&["mul", "ftz", "f32"]).ok_or("mul")?, self.constant(class, 0x3f80_0000));
            for r in [&mut a, &mut b] {
                let t = self.alloc(class);
                self.emit(flush.f, t, [*r, one, 0], flush.x);
                *r = t;
            }
        }
        if parts[0] == "set" {
            let to = parts[parts.len() - 2];
            let (dc, t) = (self.any(args[0], class_of(to).ok_or("type")?)?, self.alloc(Class::P));
            self.emit(f, t, [a, b, 0], 0);
            let one = match to {
                "f32" => 0x3f80_0000,
                "f16" => 0x3c00,
                "bf16" => 0x3f80,
                _ => !0,
            };
            let (yes, no) = (self.constant(dc.1, one), self.constant(dc.1, 0));
            let name = ["", "b16", "b32", "b64"][dc.1 as usize];
            let sel = ops::alu(&["selp", name]).ok_or("selp")?;
            self.emit(sel.f, dc.0, [yes, no, t], 0);
            return Ok(());
        }
        let (p, q) =
            args[0].split_once('|').map_or((args[0], None), |(p, q)| (p.trim(), Some(q.trim())));
        let d = self.dest(p, Class::P)?;
        let combine = parts[2..].iter().find(|m| matches!(**m, "and" | "or" | "xor"));
        if q.is_none() && combine.is_none() {
            self.emit(f, d, [a, b, 0], 0);
            return Ok(());
        }
        let logic = |op: &str| ops::alu(&[op, "pred"]).map(|l| l.f).ok_or("logic");
        let (t, n) = (self.alloc(Class::P), self.alloc(Class::P));
        self.emit(f, t, [a, b, 0], 0);
        self.emit(logic("not")?, n, [t, 0, 0], 0);
        let other = if combine.is_some() { self.operand(args[3], Class::P)? } else { P_TRUE };
        let f = logic(combine.unwrap_or(&"and"))?;
        let (yes, no) = (self.alloc(Class::P), self.alloc(Class::P));
        self.emit(f, yes, [t, other, 0], 0);
        self.emit(f, no, [n, other, 0], 0);
        self.emit(logic("mov")?, d, [yes, 0, 0], 0);
        if let Some(q) = q {
            let q = self.dest(q, Class::P)?;
            self.emit(logic("mov")?, q, [no, 0, 0], 0);
        }
        Ok(())
    }

    pub(super) fn convert(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let (to, from) = (parts[parts.len() - 2], parts[parts.len() - 1]);
        let mods = &parts[1..parts.len() - 2];
        if let Some(f) = ops::pack_halves(to, mods.contains(&"relu")) {
            let d = self.dest(args[0], Class::W32)?;
            let (a, b) = (self.operand(args[1], Class::W32)?, self.operand(args[2], Class::W32)?);
            self.emit(f, d, [a, b, 0], 0);
            return Ok(());
        }
        let (d, dc) = self.any(args[0], class_of(to).ok_or("type")?)?;
        let (a, ac) = self.any(args[1], class_of(from).ok_or("type")?)?;
        let (f, x) = ops::convert(mods, to, from, dc, ac).ok_or("unsupported conversion")?;
        self.emit(f, d, [a, 0, 0], x);
        Ok(())
    }

    pub(super) fn convert_address(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let space = self.space(parts, None);
        let space = if space == Space::Param && self.frames.last().is_some_and(|f| f.inlined) {
            Space::Local
        } else {
            space
        };
        let t = if parts.contains(&"to") { tag(space).wrapping_neg() } else { tag(space) };
        let (d, a) = (self.dest(args[0], Class::W64)?, self.operand(args[1], Class::W64)?);
        let c = self.constant(Class::W64, t);
        let add = ops::alu(&["add", "u64"]).ok_or("add")?;
        self.emit(add.f, d, [a, c, 0], 0);
        Ok(())
    }

    /// `mov.b32 {a,b}, c` and `mov.b32 c, {a,b}` and their wider relatives.
    pub(super) fn repack(&mut self, ty: &str, args: &[&'a str]) -> Res<()> {
        let class = class_of(ty).ok_or("type")?;
        let pack = args[1].starts_with('{');
        let parts = self.vector(args[if pack { 1 } else { 0 }]);
        let part = match (class.lines() * 16, parts.len()) {
            (32, 2) => Class::W16,
            (64, 2) => Class::W32,
            (64, 4) => Class::W16,
            _ => return Err("vector move".into()),
        };
        if pack {
            let d = self.dest(args[0], class)?;
            let mut regs = Vec::new();
            for p in &parts {
                regs.push(self.operand(p, part)?);
            }
            let list = self.list(&regs);
            let f: Exec = match (class, part) {
                (Class::W32, _) => pack_fn::<u16, u32, 2>,
                (_, Class::W32) => pack_fn::<u32, u64, 2>,
                _ => pack_fn::<u16, u64, 4>,
            };
            self.emit(f, d, [list, 0, 0], 0);
        } else {
            let a = self.operand(args[1], class)?;
            let mut regs = Vec::new();
            for p in &parts {
                regs.push(self.dest(p, part)?);
            }
            let list = self.list(&regs);
            let f: Exec = match (class, part) {
                (Class::W32, _) => unpack_fn::<u16, u32, 2>,
                (_, Class::W32) => unpack_fn::<u32, u64, 2>,
                _ => unpack_fn::<u16, u64, 4>,
            };
            self.emit(f, list, [a, 0, 0], 0);
        }
        Ok(())
    }
}

trait Word: Lane {
    fn wide(self) -> u64;
    fn cut(v: u64) -> Self;
}
macro_rules! word {
    ($($t:ty),*) => {$(impl Word for $t {
        fn wide(self) -> u64 { u64::from(self) }
        fn cut(v: u64) -> Self { v as $t }
    })*};
}
word!(u16, u32, u64);

fn pack_fn<P: Word, W: Word, const N: usize>(c: &mut Cx<'_>, i: &Inst) {
    let mut acc = [0u64; 32];
    for k in 0..N {
        let r = c.reg::<P>(c.ext(i.a, N)[k]);
        for l in 0..32 {
            acc[l] |= r[l].wide() << (k * 8 * size_of::<P>());
        }
    }
    c.put(i.d, &acc.map(W::cut));
}

fn unpack_fn<P: Word, W: Word, const N: usize>(c: &mut Cx<'_>, i: &Inst) {
    let w = *c.reg::<W>(i.a);
    for k in 0..N {
        let d = c.ext(i.d, N)[k];
        c.put(d, &w.map(|v| P::cut(v.wide() >> (k * 8 * size_of::<P>()))));
    }
}
