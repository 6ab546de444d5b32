//! Lowers a kernel's statements to `ir`: names become register offsets, literals and addresses
//! become constant registers, device functions are inlined, control flow becomes basic blocks.
mod collective;
mod convert;
mod memory;
mod names;

use super::exec::Cx;
use super::ir::{Block, Class, Exec, Inst, Kernel, P_TRUE, Param, Special, TAG_SHIFT, Term, tag};
use super::ops;
use super::parse::{self, Func, Item, Unit};
use super::warp;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

type Res<T> = Result<T, String>;

#[derive(Clone, Copy, Debug)]
enum Sym {
    Reg(u32, Class),
    Param(u64),
    Local(u64),
    Shared(u64),
    Global(u64),
}

#[derive(Default)]
struct Scope<'a> {
    names: HashMap<&'a str, Sym>,
    /// `.reg .b32 %r<44>`: prefix, count, class.
    ranges: Vec<(&'a str, u32, Class)>,
    targets: HashMap<&'a str, Vec<&'a str>>,
}

/// A function being lowered: the kernel itself or an inlined call.
struct Frame<'a> {
    labels: HashMap<&'a str, u32>,
    ret: u32,
    inlined: bool,
}

struct Lower<'a> {
    unit: &'a Unit<'a>,
    globals: &'a HashMap<String, u64>,
    insts: Vec<Inst>,
    blocks: Vec<Block>,
    block_start: usize,
    /// Block number of each label.
    labels: Vec<u32>,
    ext: Vec<u32>,
    lines: u32,
    preds: u32,
    consts: HashMap<(Class, u64), u32>,
    specials: HashMap<Special, u32>,
    shared: usize,
    shared_names: HashMap<&'a str, u64>,
    local: usize,
    scopes: Vec<Scope<'a>>,
    frames: Vec<Frame<'a>>,
    sinks: HashMap<Class, u32>,
    guard: (u32, u32),
    line: u32,
    has_barrier: bool,
    dyn_base: u64,
    uses_dynamic: bool,
}

static NEXT_ID: AtomicUsize = AtomicUsize::new(1);

/// Lowers entry `name`. `globals` holds the addresses of the module's variables.
pub fn kernel(unit: &Unit<'_>, globals: &HashMap<String, u64>, name: &str) -> Res<Kernel> {
    // dynamic shared memory follows the static, whose size is known after a first pass
    let (k, dynamic) = lower(unit, globals, name, 0)?;
    if !dynamic || k.shared == 0 {
        return Ok(k);
    }
    let base = k.shared.next_multiple_of(128);
    let (mut k, _) = lower(unit, globals, name, base)?;
    k.shared = base;
    Ok(k)
}

fn lower(
    unit: &Unit<'_>,
    globals: &HashMap<String, u64>,
    name: &str,
    dyn_base: usize,
) -> Res<(Kernel, bool)> {
    let func = unit.funcs.get(name).ok_or("no such function")?;
    let body = func.body.ok_or("function without a body")?;
    let mut params = Vec::new();
    let mut names = HashMap::new();
    let mut offset = 0usize;
    for p in &func.params {
        offset = offset.next_multiple_of(p.align.max(1));
        names.insert(p.name, Sym::Param(offset as u64));
        params.push(Param { offset, size: p.size });
        offset += p.size;
    }
    let mut lw = Lower {
        unit,
        globals,
        insts: Vec::new(),
        blocks: Vec::new(),
        block_start: 0,
        labels: Vec::new(),
        ext: Vec::new(),
        lines: 0,
        preds: 2,
        consts: HashMap::new(),
        specials: HashMap::new(),
        shared: 0,
        shared_names: HashMap::new(),
        local: 0,
        scopes: vec![Scope { names, ..Scope::default() }],
        frames: Vec::new(),
        sinks: HashMap::new(),
        guard: (P_TRUE, 0),
        line: 0,
        has_barrier: false,
        dyn_base: dyn_base as u64,
        uses_dynamic: false,
    };
    lw.function(body, false)?;
    lw.end(Term::Exit);
    let labels = std::mem::take(&mut lw.labels);
    for b in &mut lw.blocks {
        match &mut b.term {
            Term::Jump(t) => *t = labels[*t as usize],
            Term::Branch { target, fall, .. } => {
                (*target, *fall) = (labels[*target as usize], labels[*fall as usize])
            }
            Term::Sync { next, .. } | Term::Bar { next, .. } => *next = labels[*next as usize],
            Term::Switch { targets, .. } => {
                targets.iter_mut().for_each(|t| *t = labels[*t as usize])
            }
            Term::Exit => {}
        }
    }
    if let Some(bad) = lw.blocks.iter().find(|b| matches!(b.term, Term::Jump(u32::MAX))) {
        return Err(format!("jump to a label that is not defined (block {bad:?})"));
    }
    let k = Kernel {
        name: name.to_string(),
        id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
        insts: lw.insts,
        blocks: lw.blocks,
        ext: lw.ext,
        lines: lw.lines,
        preds: lw.preds,
        consts: lw.consts.into_iter().map(|((c, v), off)| (off, c, v)).collect(),
        specials: lw.specials.into_iter().map(|(s, off)| (off, s)).collect(),
        params,
        param_bytes: offset,
        shared: lw.shared,
        local: lw.local.next_multiple_of(16),
        has_barrier: lw.has_barrier,
        source: body.to_string(),
    };
    Ok((k, lw.uses_dynamic))
}
impl<'a> Lower<'a> {
    fn alloc(&mut self, class: Class) -> u32 {
        if class == Class::P {
            self.preds += 1;
            self.preds - 1
        } else {
            self.lines += class.lines();
            (self.lines - class.lines()) * 64
        }
    }
    fn constant(&mut self, class: Class, v: u64) -> u32 {
        let v = match class {
            Class::P => u64::from(v as u32),
            Class::W16 => u64::from(v as u16),
            Class::W32 => u64::from(v as u32),
            Class::W64 => v,
        };
        if let Some(&r) = self.consts.get(&(class, v)) {
            return r;
        }
        let r = self.alloc(class);
        self.consts.insert((class, v), r);
        r
    }
    fn special(&mut self, s: Special) -> u32 {
        if let Some(&r) = self.specials.get(&s) {
            return r;
        }
        let r = self.alloc(if s == Special::Clock64 { Class::W64 } else { Class::W32 });
        self.specials.insert(s, r);
        r
    }
    /// A register whose value nobody wants.
    fn sink(&mut self, class: Class) -> u32 {
        if let Some(&r) = self.sinks.get(&class) {
            return r;
        }
        let r = self.alloc(class);
        self.sinks.insert(class, r);
        r
    }
    fn emit(&mut self, f: Exec, d: u32, abc: [u32; 3], x: u64) {
        let (guard, neg) = self.guard;
        self.insts.push(Inst {
            f,
            d,
            a: abc[0],
            b: abc[1],
            c: abc[2],
            x,
            guard,
            neg,
            line: self.line,
        });
    }
    fn list(&mut self, regs: &[u32]) -> u32 {
        self.ext.extend_from_slice(regs);
        (self.ext.len() - regs.len()) as u32
    }
    fn new_label(&mut self) -> u32 {
        self.labels.push(u32::MAX);
        self.labels.len() as u32 - 1
    }
    fn end(&mut self, term: Term) {
        let end = self.insts.len();
        self.blocks.push(Block { start: self.block_start as u32, end: end as u32, term });
        self.block_start = end;
    }
    fn place(&mut self, label: u32) {
        if self.insts.len() != self.block_start {
            self.end(Term::Jump(label));
        }
        self.labels[label as usize] = self.blocks.len() as u32;
    }
    fn label(&mut self, name: &'a str) -> u32 {
        let f = self.frames.len() - 1;
        if let Some(&l) = self.frames[f].labels.get(name) {
            return l;
        }
        let l = self.new_label();
        self.frames[f].labels.insert(name, l);
        l
    }
    /// Ends the block with a jump, taken by the guarded lanes only.
    fn jump(&mut self, target: u32) {
        let (guard, neg) = self.guard;
        if guard == P_TRUE && neg == 0 {
            self.end(Term::Jump(target));
        } else {
            let fall = self.new_label();
            self.end(Term::Branch { guard, neg, target, fall });
            self.place(fall);
        }
    }

    fn function(&mut self, body: &'a str, inlined: bool) -> Res<()> {
        if self.frames.len() > 32 {
            return Err("recursive call".into());
        }
        let ret = self.new_label();
        self.frames.push(Frame { labels: HashMap::new(), ret, inlined });
        let depth = self.scopes.len();
        let mut pending = None;
        for item in parse::statements(body, 1)? {
            match item {
                Item::Open => self.scopes.push(Scope::default()),
                Item::Close if self.scopes.len() > depth => {
                    self.scopes.pop();
                }
                Item::Close => return Err("unbalanced braces".into()),
                Item::Label(name) => {
                    pending = Some(name);
                    let l = self.label(name);
                    self.place(l);
                }
                Item::Targets(t) => {
                    let name = pending.take().ok_or("branch targets without a label")?;
                    self.scopes.last_mut().unwrap().targets.insert(name, t);
                }
                Item::Decl(kind, text) => self.declare(kind, text)?,
                Item::Inst { guard, op, args, line } => {
                    self.line = line;
                    self.guard = (P_TRUE, 0);
                    if let Some((p, neg)) = guard {
                        self.guard = (self.operand(p, Class::P)?, if neg { !0 } else { 0 });
                    }
                    self.inst(op, &args)
                        .map_err(|e| format!("line {line}: `{op} {}`: {e}", args.join(", ")))?;
                }
            }
        }
        self.place(ret);
        let frame = self.frames.pop().unwrap();
        match frame.labels.iter().find(|&(_, &l)| self.labels[l as usize] == u32::MAX) {
            Some((name, _)) => Err(format!("label {name} is not defined")),
            None => Ok(()),
        }
    }

    fn inst(&mut self, op: &'a str, args: &[&'a str]) -> Res<()> {
        let parts: Vec<&str> = op.split('.').collect();
        let ty = *parts.last().unwrap();
        let unsupported = || Err("unsupported instruction".to_string());
        match parts[0] {
            "ret" => {
                let l = self.frames.last().unwrap().ret;
                self.jump(l);
            }
            "exit" => {
                let l = self.frames[0].ret;
                self.jump(l);
            }
            "trap" => self.emit(warp::trap, 0, [0; 3], 0),
            "brkpt" | "nanosleep" | "membar" | "fence" | "prefetch" | "prefetchu" | "discard"
            | "applypriority" | "griddepcontrol" => {}
            "bra" => {
                let l = self.label(args[0]);
                self.jump(l);
            }
            "brx" => {
                let index = self.operand(args[0], Class::W32)?;
                let names = self
                    .scopes
                    .iter()
                    .rev()
                    .find_map(|s| s.targets.get(args[1]))
                    .cloned()
                    .ok_or("unknown branch targets")?;
                let targets = names.into_iter().map(|n| self.label(n)).collect();
                self.end(Term::Switch { index, targets });
            }
            "call" => self.around(|s| s.call(args))?,
            "ld" | "ldu" => self.load(&parts, args)?,
            "st" => self.store(&parts, args)?,
            "atom" | "red" => self.atomic(&parts, args)?,
            "cp" => self.copy_async(&parts, args)?,
            "bar" | "barrier" => self.barrier(&parts, args)?,
            "shfl" | "vote" | "match" | "redux" | "mma" | "ldmatrix" => {
                self.collective(&parts, args)?
            }
            "activemask" => {
                let d = self.dest(args[0], Class::W32)?;
                self.emit(warp::active_mask, d, [0; 3], 0);
            }
            "setp" | "set" => self.compare(&parts, args)?,
            "cvt" => self.convert(&parts, args)?,
            "cvta" => self.convert_address(&parts, args)?,
            "isspacep" => {
                fn test(c: &mut Cx<'_>, i: &Inst) {
                    let want = i.x;
                    c.compare::<u64>(&Inst { b: i.a, ..*i }, |a, _| a >> TAG_SHIFT == want);
                }
                let (d, a) = (self.dest(args[0], Class::P)?, self.operand(args[1], Class::W64)?);
                let space = self.space(&parts[1..2], None);
                self.emit(test, d, [a, 0, 0], tag(space) >> TAG_SHIFT);
            }
            "mov" if args.iter().any(|a| a.starts_with('{')) => self.repack(ty, args)?,
            "lop3" => {
                let d = self.dest(args[0], Class::W32)?;
                let abc = [
                    self.operand(args[1], Class::W32)?,
                    self.operand(args[2], Class::W32)?,
                    self.operand(args[3], Class::W32)?,
                ];
                let table = parse::integer(args[4]).ok_or("lop3 table")? as u64;
                self.emit(ops::lop3, d, abc, table);
            }
            "wmma" => self.wmma(&parts, args)?,
            "fns" | "tex" | "suld" | "sust" | "wgmma" => return unsupported(),
            _ => {
                let Some(alu) = ops::alu(&parts) else { return unsupported() };
                if args.len() < alu.src.len() + 1 {
                    return Err("too few operands".into());
                }
                let d = self.dest(args[0], alu.dst)?;
                let mut r = [0u32; 4];
                for (k, &c) in alu.src.iter().enumerate() {
                    r[k] = self.operand(args[k + 1], c)?;
                }
                let x = if alu.src.len() == 4 { u64::from(r[3]) } else { alu.x };
                self.emit(alu.f, d, [r[0], r[1], r[2]], x);
            }
        }
        Ok(())
    }

    /// Lowers a whole statement under a branch when it is guarded.
    fn around(&mut self, f: impl FnOnce(&mut Self) -> Res<()>) -> Res<()> {
        let (guard, neg) = std::mem::replace(&mut self.guard, (P_TRUE, 0));
        if guard == P_TRUE && neg == 0 {
            return f(self);
        }
        let (target, fall) = (self.new_label(), self.new_label());
        self.end(Term::Branch { guard, neg, target, fall });
        self.place(target);
        f(self)?;
        self.place(fall);
        Ok(())
    }

    fn call(&mut self, args: &[&'a str]) -> Res<()> {
        let inner = |s: &'a str| s.strip_prefix('(').and_then(|s| s.strip_suffix(')'));
        let at = usize::from(inner(args[0]).is_some());
        let list = |s: Option<&&'a str>| {
            s.and_then(|s| inner(s)).map(parse::split_args).unwrap_or_default()
        };
        let (rets, name, actual) =
            (list(if at == 1 { args.first() } else { None }), args[at], list(args.get(at + 1)));
        let place = |s: &mut Self, n: &'a str| s.address_of(n).map(|a| a.0);
        let actual: Vec<u64> = actual.into_iter().map(|n| place(self, n)).collect::<Res<_>>()?;
        let rets: Vec<u64> = rets.into_iter().map(|n| place(self, n)).collect::<Res<_>>()?;
        let func: Option<&Func<'a>> = self.unit.funcs.get(name);
        let Some(Func { params, rets: formal_rets, body: Some(body), .. }) = func else {
            let f: Exec = match name {
                "__assertfail" => warp::assert_fail,
                "vprintf" => warp::printf,
                _ => {
                    eprintln!("emucuda: function {name} has no definition");
                    warp::missing
                }
            };
            let offs: Vec<u32> = actual.iter().map(|&a| a as u32).collect();
            let a = self.list(&offs);
            self.emit(f, 0, [a, 0, 0], 0);
            return Ok(());
        };
        let formals = params
            .iter()
            .map(|p| p.name)
            .zip(actual)
            .chain(formal_rets.iter().map(|p| p.name).zip(rets));
        let names = formals.map(|(n, a)| (n, Sym::Local(a))).collect();
        let outer = std::mem::replace(&mut self.scopes, vec![Scope { names, ..Scope::default() }]);
        let r = self.function(body, true);
        self.scopes = outer;
        r.map_err(|e| format!("in {name}: {e}"))
    }

    fn vector(&mut self, s: &'a str) -> Vec<&'a str> {
        match s.strip_prefix('{').and_then(|s| s.strip_suffix('}')) {
            Some(list) => parse::split_args(list),
            None => vec![s],
        }
    }
}
