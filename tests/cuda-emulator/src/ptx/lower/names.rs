//! Names and operands: where registers, variables and literals are.
use super::{Lower, Res, Sym};
use crate::ptx::ir::{Class, Space, Special};
use crate::ptx::ops::{self, class_of};
use crate::ptx::parse;

impl<'a> Lower<'a> {
    pub(super) fn declare(&mut self, kind: &str, text: &'a str) -> Res<()> {
        if kind == ".reg" {
            let mut it = text.splitn(2, char::is_whitespace);
            let (mut ty, mut rest) = (it.next().unwrap_or(""), it.next().unwrap_or("").trim());
            if ty.starts_with(".v") {
                return Err("vector registers".into());
            }
            if let Some((t, r)) = ty.split_once('%') {
                (ty, rest) = (t, &text[text.len() - r.len() - 1..]);
            }
            let class = class_of(ty.trim_start_matches('.'))
                .ok_or_else(|| format!("register type {ty}"))?;
            for name in parse::split_args(rest) {
                if let Some((prefix, n)) = name.split_once('<') {
                    let n = n.trim_end_matches('>').parse().map_err(|_| "bad register range")?;
                    self.scopes.last_mut().unwrap().ranges.push((prefix, n, class));
                } else {
                    let r = self.alloc(class);
                    self.scopes.last_mut().unwrap().names.insert(name, Sym::Reg(r, class));
                }
            }
            return Ok(());
        }
        let (name, size, align) = parse::declaration(text)?;
        let sym = match kind {
            ".local" | ".param" => {
                self.local = self.local.next_multiple_of(align.max(8));
                self.local += size;
                Sym::Local((self.local - size) as u64)
            }
            ".shared" => {
                self.shared = self.shared.next_multiple_of(align.max(1));
                self.shared += size;
                Sym::Shared((self.shared - size) as u64)
            }
            _ => return Err(format!("declaration {kind}")),
        };
        self.scopes.last_mut().unwrap().names.insert(name, sym);
        Ok(())
    }

    pub(super) fn find(&mut self, name: &'a str) -> Res<Sym> {
        for s in (0..self.scopes.len()).rev() {
            if let Some(&sym) = self.scopes[s].names.get(name) {
                return Ok(sym);
            }
            let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
            let prefix = &name[..name.len() - digits.len()];
            let hit = self.scopes[s].ranges.iter().find(|r| r.0 == prefix).copied();
            if let (Some((_, n, class)), Ok(k)) = (hit, digits.parse::<u32>())
                && k < n
            {
                let r = self.alloc(class);
                self.scopes[s].names.insert(name, Sym::Reg(r, class));
                return Ok(Sym::Reg(r, class));
            }
        }
        if let Some(&a) = self.globals.get(name) {
            return Ok(Sym::Global(a));
        }
        if let Some(&at) = self.shared_names.get(name) {
            return Ok(Sym::Shared(at));
        }
        if let Some((key, var)) = self.unit.shared.get_key_value(name) {
            if var.size == 0 {
                self.uses_dynamic = true;
                return Ok(Sym::Shared(self.dyn_base));
            }
            self.shared = self.shared.next_multiple_of(var.align.max(16));
            let at = self.shared as u64;
            self.shared += var.size;
            self.shared_names.insert(key, at);
            return Ok(Sym::Shared(at));
        }
        Err(format!("unknown name {name}"))
    }

    pub(super) fn special_register(&mut self, s: &str) -> Option<(u32, Class)> {
        let dim = |s: &str| match s {
            "x" => Some(0u8),
            "y" => Some(1),
            "z" => Some(2),
            _ => None,
        };
        let r = match s.strip_prefix('%')?.split_once('.') {
            Some(("tid", d)) => Special::Tid(dim(d)?),
            Some(("ntid", d)) => Special::Ntid(dim(d)?),
            Some(("ctaid", d)) => Special::Ctaid(dim(d)?),
            Some(("nctaid", d)) => Special::Nctaid(dim(d)?),
            _ => match &s[1..] {
                "laneid" => Special::Lane,
                "warpid" => Special::Warp,
                "nwarpid" => Special::NWarp,
                "lanemask_eq" => Special::LaneMask(0),
                "lanemask_le" => Special::LaneMask(1),
                "lanemask_lt" => Special::LaneMask(2),
                "lanemask_ge" => Special::LaneMask(3),
                "lanemask_gt" => Special::LaneMask(4),
                "dynamic_smem_size" => Special::DynShared,
                "total_smem_size" => Special::TotalShared,
                "smid" | "gridid" => Special::Zero32,
                "nsmid" => Special::One32,
                "clock" | "clock_hi" => Special::Clock32,
                "clock64" | "globaltimer" => Special::Clock64,
                _ => return None,
            },
        };
        Some((self.special(r), if r == Special::Clock64 { Class::W64 } else { Class::W32 }))
    }

    /// A source operand as a register of the wanted class.
    pub(super) fn operand(&mut self, s: &'a str, class: Class) -> Res<u32> {
        if class == Class::P {
            if let Some(p) = s.strip_prefix('!') {
                let (a, d) = (self.operand(p, class)?, self.alloc(Class::P));
                let not = ops::alu(&["not", "pred"]).ok_or("not.pred")?;
                self.emit(not.f, d, [a, 0, 0], 0);
                return Ok(d);
            }
            if let Some(v) = parse::integer(s) {
                return Ok(self.constant(class, if v != 0 { !0 } else { 0 }));
            }
        } else if let Some(v) = parse::integer(s) {
            return Ok(self.constant(class, v as u64));
        }
        if let Some(b) = parse::float_bits(s) {
            let single = s.contains(['f', 'F']) && s.trim_start_matches('-').len() == 10;
            return Ok(match (single, class) {
                (true, Class::W64) => {
                    self.constant(class, f64::from(f32::from_bits(b as u32)).to_bits())
                }
                (false, Class::W32) => {
                    self.constant(class, u64::from((f64::from_bits(b) as f32).to_bits()))
                }
                _ => self.constant(class, b),
            });
        }
        if s == "WARP_SZ" {
            return Ok(self.constant(class, 32));
        }
        if let Some((r, c)) = self.special_register(s) {
            return match (c, class) {
                (a, b) if a == b => Ok(r),
                (Class::W32, Class::W64 | Class::W16) => {
                    let d = self.alloc(class);
                    let (f, x) = ops::convert(
                        &[],
                        if class == Class::W64 { "u64" } else { "u16" },
                        "u32",
                        class,
                        c,
                    )
                    .ok_or("cvt")?;
                    self.emit(f, d, [r, 0, 0], x);
                    Ok(d)
                }
                _ => Err(format!("width of {s}")),
            };
        }
        if !s.starts_with('%')
            && let Some((base, off)) = s.rsplit_once('+')
        {
            let off = parse::integer(off.trim()).ok_or_else(|| format!("operand {s}"))? as u64;
            let v = self.address_of(base.trim())?.0.wrapping_add(off);
            return Ok(self.constant(class, v));
        }
        match self.find(s)? {
            Sym::Reg(r, c) if c == class => Ok(r),
            Sym::Reg(_, c) => Err(format!("register {s} is {c:?}, wanted {class:?}")),
            Sym::Param(v) | Sym::Local(v) | Sym::Shared(v) | Sym::Global(v) => {
                Ok(self.constant(class, v))
            }
        }
    }

    pub(super) fn address_of(&mut self, name: &'a str) -> Res<(u64, Space)> {
        Ok(match self.find(name)? {
            Sym::Param(v) => (v, Space::Param),
            Sym::Local(v) => (v, Space::Local),
            Sym::Shared(v) => (v, Space::Shared),
            Sym::Global(v) => (v, Space::Global),
            Sym::Reg(..) => return Err(format!("{name} is a register")),
        })
    }

    pub(super) fn dest(&mut self, s: &'a str, class: Class) -> Res<u32> {
        if s == "_" {
            return Ok(self.sink(class));
        }
        match self.find(s)? {
            Sym::Reg(r, c) if c == class => Ok(r),
            other => Err(format!("destination {s} is {other:?}, wanted {class:?}")),
        }
    }

    /// A register operand in whatever class it was declared.
    pub(super) fn any(&mut self, s: &'a str, default: Class) -> Res<(u32, Class)> {
        if s == "_" {
            return Ok((self.sink(default), default));
        }
        if s.starts_with('%') || !s.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
            if let Some(r) = self.special_register(s) {
                return Ok(r);
            }
            if let Sym::Reg(r, c) = self.find(s)? {
                return Ok((r, c));
            }
        }
        Ok((self.operand(s, default)?, default))
    }

    /// `[base+offset]`: base register, whether it has 32 bits, offset, and a symbol's space.
    pub(super) fn address(&mut self, s: &'a str) -> Res<(u32, bool, u64, Option<Space>)> {
        let inner = s
            .trim()
            .strip_prefix('[')
            .and_then(|s| s.strip_suffix(']'))
            .ok_or_else(|| format!("address {s}"))?
            .trim();
        let (base, off) = match inner.rsplit_once('+') {
            Some((b, o)) => {
                (b.trim(), parse::integer(o.trim()).ok_or_else(|| format!("offset in {s}"))? as u64)
            }
            None => (inner, 0),
        };
        if let Some(v) = parse::integer(base) {
            return Ok((self.constant(Class::W64, v as u64), false, off, None));
        }
        match self.find(base)? {
            Sym::Reg(r, Class::W64) => Ok((r, false, off, None)),
            Sym::Reg(r, Class::W32) => Ok((r, true, off, None)),
            Sym::Reg(..) => Err(format!("address register {base}")),
            _ => {
                let (v, space) = self.address_of(base)?;
                Ok((self.constant(Class::W64, v), false, off, Some(space)))
            }
        }
    }

    pub(super) fn space(&self, parts: &[&str], symbol: Option<Space>) -> Space {
        let named = parts.iter().find_map(|p| match p.split("::").next().unwrap_or(p) {
            "global" | "const" => Some(Space::Global),
            "shared" => Some(Space::Shared),
            "local" => Some(Space::Local),
            "param" => Some(Space::Param),
            _ => None,
        });
        match (named, symbol) {
            (Some(Space::Param), Some(s)) => s,
            (Some(Space::Param), None) if self.frames.last().is_some_and(|f| f.inlined) => {
                Space::Local
            }
            (Some(s), _) => s,
            (None, s) => s.unwrap_or(Space::Generic),
        }
    }
}
