//! Instructions that several lanes execute together: barriers, shuffles, votes, matrix products.
use super::{Lower, Res};
use crate::ptx::ir::{Class, NONE, Red, RedOp, Term};
use crate::ptx::warp;

impl<'a> Lower<'a> {
    pub(super) fn barrier(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        if parts.contains(&"warp") {
            return self.sync(args[0], |s| {
                s.emit(warp::nop, 0, [0; 3], 0);
                Ok(())
            });
        }
        let reduce = parts.contains(&"red");
        if !(reduce || parts.contains(&"sync")) || parts.contains(&"cluster") {
            return Err("unsupported barrier".into());
        }
        self.has_barrier = true;
        self.around(|s| {
            let (mut rest, mut red) = (args, None);
            if reduce {
                let (op, class) = match parts[parts.len() - 2] {
                    "popc" => (RedOp::Count, Class::W32),
                    "and" => (RedOp::And, Class::P),
                    _ => (RedOp::Or, Class::P),
                };
                let pred = s.operand(args[args.len() - 1], Class::P)?;
                red = Some(Red { op, pred, dst: s.dest(args[0], class)? });
                rest = &args[1..args.len() - 1];
            }
            let id = s.operand(rest[0], Class::W32)?;
            let count = if rest.len() > 1 { s.operand(rest[1], Class::W32)? } else { NONE };
            let next = s.new_label();
            s.end(Term::Bar { id, count, next, red });
            s.place(next);
            Ok(())
        })
    }

    /// Puts the instruction `f` emits into a block of its own that waits for `members`.
    pub(super) fn sync(
        &mut self,
        members: &'a str,
        f: impl FnOnce(&mut Self) -> Res<()>,
    ) -> Res<()> {
        let members = self.operand(members, Class::W32)?;
        let (here, next) = (self.new_label(), self.new_label());
        self.place(here);
        f(self)?;
        self.end(Term::Sync { members, next });
        self.place(next);
        Ok(())
    }

    pub(super) fn collective(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let ty = *parts.last().unwrap();
        let sync = parts.contains(&"sync");
        let all = "-1";
        match parts[0] {
            "shfl" => {
                let (d, p) =
                    args[0].split_once('|').map_or((args[0], "_"), |(d, p)| (d.trim(), p.trim()));
                let (d, p) = (self.dest(d, Class::W32)?, self.dest(p, Class::P)?);
                let mode = ["up", "down", "bfly", "idx"]
                    .iter()
                    .position(|m| parts.contains(m))
                    .ok_or("mode")? as u32;
                let abc = [
                    self.operand(args[1], Class::W32)?,
                    self.operand(args[2], Class::W32)?,
                    self.operand(args[3], Class::W32)?,
                ];
                let x = self.list(&[p, mode]);
                self.sync(if sync { args[4] } else { all }, |s| {
                    s.emit(warp::shuffle, d, abc, x.into());
                    Ok(())
                })
            }
            "vote" => {
                let mode = ["all", "any", "uni", "ballot"]
                    .iter()
                    .position(|m| parts.contains(m))
                    .ok_or("mode")?;
                let d = self.dest(args[0], if mode == 3 { Class::W32 } else { Class::P })?;
                let a = self.operand(args[1], Class::P)?;
                self.sync(if sync { args[2] } else { all }, |s| {
                    s.emit(warp::vote, d, [a, 0, 0], mode as u64);
                    Ok(())
                })
            }
            "match" => {
                let (d, p) =
                    args[0].split_once('|').map_or((args[0], "_"), |(d, p)| (d.trim(), p.trim()));
                let (d, p, a) = (
                    self.dest(d, Class::W32)?,
                    self.dest(p, Class::P)?,
                    self.operand(args[1], Class::W32)?,
                );
                let x = u64::from(parts.contains(&"all"));
                self.sync(args[2], |s| {
                    s.emit(warp::match_lanes, d, [a, p, 0], x);
                    Ok(())
                })
            }
            "redux" => {
                let f = warp::redux(parts[2], ty).ok_or("operation")?;
                let (d, a) = (self.dest(args[0], Class::W32)?, self.operand(args[1], Class::W32)?);
                self.sync(args[2], |s| {
                    s.emit(f, d, [a, 0, 0], 0);
                    Ok(())
                })
            }
            "mma" => {
                let shape = parts
                    .iter()
                    .find(|p| p.starts_with("m16n8k"))
                    .ok_or("only m16n8k8 and m16n8k16")?;
                let k = shape["m16n8k".len()..].parse().map_err(|_| "shape")?;
                let n = parts.len();
                let f = warp::mma_fn(parts[n - 3], ty).ok_or("types")?;
                if !matches!((k, parts[n - 3]), (16 | 8, "f16" | "bf16") | (8, "tf32")) {
                    return Err("unsupported shape".into());
                }
                let mut regs = Vec::new();
                for a in args {
                    for r in self.vector(a) {
                        regs.push(self.operand(r, Class::W32)?);
                    }
                }
                let list = self.list(&regs);
                self.sync(all, |s| {
                    s.emit(f, 0, [list, k, 0], 0);
                    Ok(())
                })
            }
            _ => {
                if !parts.contains(&"m8n8") || ty != "b16" {
                    return Err("unsupported ldmatrix".into());
                }
                let mut regs = Vec::new();
                for r in self.vector(args[0]) {
                    regs.push(self.dest(r, Class::W32)?);
                }
                let (a, narrow, off, _) = self.address(args[1])?;
                let x = u64::from(off as u32) | u64::from(parts.contains(&"trans")) << 32;
                let list = self.list(&regs);
                self.sync(all, |s| {
                    s.emit(warp::ldmatrix, list, [a, regs.len() as u32, narrow.into()], x);
                    Ok(())
                })
            }
        }
    }

    /// A fragment of `wmma`; `role` is a, b, c or d.
    pub(super) fn fragment(
        &mut self,
        role: &str,
        shape: [u32; 3],
        ty: &str,
        regs: &'a str,
    ) -> Res<warp::Fragment> {
        let [m, n, k] = shape;
        let (rows, cols) = match role {
            "a" => (m, k),
            "b" => (k, n),
            _ => (m, n),
        };
        let ty = ["f16", "bf16", "f32"]
            .iter()
            .position(|t| *t == ty)
            .ok_or("unsupported element type")? as u32;
        let mut list = Vec::new();
        for r in self.vector(regs) {
            list.push(self.operand(r, Class::W32)?);
        }
        Ok(warp::Fragment { rows, cols, ty, regs: list })
    }

    pub(super) fn wmma(&mut self, parts: &[&str], args: &[&'a str]) -> Res<()> {
        let n = parts.len();
        let digits = |p: &str| -> Option<[u32; 3]> {
            let mut it = p.strip_prefix('m')?.split(['n', 'k']).map(str::parse);
            Some([it.next()?.ok()?, it.next()?.ok()?, it.next()?.ok()?])
        };
        let shape = parts.iter().find_map(|p| digits(p)).ok_or("shape")?;
        let move_of = |s: &mut Self,
                       address: &'a str,
                       regs: &'a str,
                       stride: Option<&&'a str>,
                       store: u32|
         -> Res<()> {
            let (a, narrow, x, sym) = s.address(address)?;
            let f = s.fragment(parts[2], shape, parts[n - 1], regs)?;
            let row = parts.contains(&"row");
            let stride = match stride {
                Some(r) => s.operand(r, Class::W32)?,
                None => s.constant(Class::W32, u64::from(if row { f.cols } else { f.rows })),
            };
            let head = [s.space(&parts[5..], sym) as u32, narrow.into(), row.into(), stride];
            let list = s.list(&[&head[..], &f.list()].concat());
            s.sync("-1", |s| {
                s.emit(warp::wmma_move, list, [a, store, 0], x);
                Ok(())
            })
        };
        match parts[1] {
            "load" => move_of(self, args[1], args[0], args.get(2), 0),
            "store" => move_of(self, args[0], args[1], args.get(2), 1),
            "mma" => {
                // either d and c types, or d, a, b and c types
                let (dt, ct) = (
                    if parts[n - 3] == parts[n - 2] && parts[n - 2] == "bf16" {
                        parts[n - 4]
                    } else {
                        parts[n - 2]
                    },
                    parts[n - 1],
                );
                let input = if parts.contains(&"bf16") { "bf16" } else { "f16" };
                let mut list = Vec::new();
                for ((role, ty), regs) in
                    [("d", dt), ("a", input), ("b", input), ("c", ct)].into_iter().zip(args)
                {
                    list.extend(self.fragment(role, shape, ty, regs)?.list());
                }
                let list = self.list(&list);
                self.sync("-1", |s| {
                    s.emit(warp::wmma_mma, list, [0; 3], 0);
                    Ok(())
                })
            }
            _ => Err("unsupported wmma".into()),
        }
    }
}
