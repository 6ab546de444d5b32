//! Loads, stores, atomics and asynchronous copies.
use super::{Lower, Res};
use crate::ptx::access::{self, Access};
use crate::ptx::ir::Class;
use crate::ptx::ops::class_of;
use crate::ptx::parse;

const ATOM_OPS: [&str; 11] =
    ["add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas", "sub"];

impl<'a> Lower<'a> {
    pub(super) fn load(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let ty = *parts.last().unwrap();
        let (a, narrow, x, sym) = self.address(args[1])?;
        let names = self.vector(args[0]);
        let access = Access {
            space: self.space(parts, sym),
            count: names.len() as u32,
            narrow,
            fetch: false,
        };
        let (mut regs, mut class) = (Vec::new(), Class::W32);
        for n in names {
            let (r, c) = self.any(n, class_of(ty).ok_or("type")?)?;
            regs.push(r);
            class = c;
        }
        let f = access::load_fn(ty, class.lines() * 16).ok_or("type")?;
        let d = if regs.len() == 1 { regs[0] } else { self.list(&regs) };
        self.emit(f, d, [a, 0, access.pack()], x);
        Ok(())
    }

    pub(super) fn store(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let ty = *parts.last().unwrap();
        let (a, narrow, x, sym) = self.address(args[0])?;
        let names = self.vector(args[1]);
        let access = Access {
            space: self.space(parts, sym),
            count: names.len() as u32,
            narrow,
            fetch: false,
        };
        let (mut regs, mut class) = (Vec::new(), Class::W32);
        for n in names {
            let (r, c) = self.any(n, class_of(ty).ok_or("type")?)?;
            regs.push(r);
            class = c;
        }
        let f = access::store_fn(ty, class.lines() * 16).ok_or("type")?;
        let b = if regs.len() == 1 { regs[0] } else { self.list(&regs) };
        self.emit(f, 0, [a, b, access.pack()], x);
        Ok(())
    }

    pub(super) fn atomic(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let ty = *parts.last().unwrap();
        let class = class_of(ty).ok_or("type")?;
        let op = *parts[1..].iter().find(|p| ATOM_OPS.contains(p)).ok_or("atomic operation")?;
        let fetch = parts[0] == "atom";
        let (d, rest) = if fetch { (self.dest(args[0], class)?, &args[1..]) } else { (0, args) };
        let (a, narrow, x, sym) = self.address(rest[0])?;
        let b = self.operand(rest[1], class)?;
        let c = if rest.len() > 2 { self.operand(rest[2], class)? } else { b };
        let f = access::atomic_fn(op, ty).ok_or("unsupported atomic")?;
        let list = self.list(&[b, c]);
        let access = Access { space: self.space(parts, sym), count: 1, narrow, fetch };
        self.emit(f, d, [a, list, access.pack()], x);
        Ok(())
    }

    pub(super) fn copy_async(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        if !parts.contains(&"async") || parts.contains(&"bulk") || parts.contains(&"mbarrier") {
            return Err("unsupported instruction".into());
        }
        if args.len() < 3 {
            return Ok(()); // commit_group, wait_group, wait_all: copies are made at once
        }
        let (d, d_narrow, d_off, _) = self.address(args[0])?;
        let (a, a_narrow, a_off, _) = self.address(args[1])?;
        let n = parse::integer(args[2]).ok_or("size")? as u32;
        if a_narrow {
            return Err("32-bit global address".into());
        }
        let take = match args.get(3) {
            Some(s) => self.operand(s, Class::W32)?,
            None => self.constant(Class::W32, u64::from(n)),
        };
        let list = self.list(&[d_off as u32, a_off as u32, u32::from(d_narrow), n]);
        self.emit(access::copy_async, d, [a, take, list], 0);
        Ok(())
    }
}
