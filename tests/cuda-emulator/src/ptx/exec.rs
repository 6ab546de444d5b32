//! Runs a kernel: blocks spread over the cores, the warps of a block in turn, the 32 lanes of a
//! warp together. A diverged warp is a set of fragments (block number, lane mask); the fragment
//! furthest back runs first and merges with those it meets, which reconverges structured code.
use super::access::{LAUNCH_FAILED, Shadow, Shared};
use super::ir::{Block, Class, Inst, Kernel, NONE, P_TRUE, Red, RedOp, Special, Term};
use crate::memory::{self, Table};
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// 64 bytes of register file.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

/// A plain value a register lane can hold.
pub trait Lane: Copy + Default + PartialEq + 'static {}
impl Lane for u16 {}
impl Lane for i16 {}
impl Lane for u32 {}
impl Lane for i32 {}
impl Lane for u64 {}
impl Lane for i64 {}
impl Lane for f32 {}
impl Lane for f64 {}

/// Why a kernel was stopped.
#[derive(Clone, Debug)]
pub struct Fault {
    pub code: i32,
    pub message: String,
    pub line: u32,
    pub lane: u32,
}

/// What all blocks of a launch share.
pub struct Env<'a> {
    pub kernel: &'a Kernel,
    pub params: &'a [u8],
    pub table: &'a Table,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dyn_shared: usize,
}

/// Execution context of the warp that is running.
pub struct Cx<'a> {
    regs: &'a mut [Line],
    preds: &'a mut [u32],
    pub local: &'a mut [u8],
    /// Lanes the current instruction runs for.
    pub mask: u32,
    pub env: &'a Env<'a>,
    pub shared: &'a mut Shared,
    pub warp: u32,
    pub fault: Option<Fault>,
    /// The allocation hit last.
    pub recent: (u64, u64),
}

pub const FULL: u32 = !0;

impl Cx<'_> {
    /// The 32 lanes of the register at byte offset `off`.
    #[inline(always)]
    pub fn reg<T: Lane>(&self, off: u32) -> &[T; 32] {
        debug_assert!(off as usize + 32 * size_of::<T>() <= self.regs.len() * 64);
        // SAFETY: lowering gives out offsets inside the register file, aligned to 64 bytes, and
        // any bit pattern is a value of the `Lane` types.
        unsafe { &*self.regs.as_ptr().cast::<u8>().add(off as usize).cast() }
    }
    #[inline(always)]
    pub fn reg_mut<T: Lane>(&mut self, off: u32) -> &mut [T; 32] {
        debug_assert!(off as usize + 32 * size_of::<T>() <= self.regs.len() * 64);
        // SAFETY: as in `reg`.
        unsafe { &mut *self.regs.as_mut_ptr().cast::<u8>().add(off as usize).cast() }
    }
    /// Writes the active lanes.
    #[inline(always)]
    pub fn put<T: Lane>(&mut self, off: u32, out: &[T; 32]) {
        let mask = self.mask;
        let d = self.reg_mut::<T>(off);
        if mask == FULL {
            *d = *out;
        } else {
            for l in 0..32 {
                d[l] = if mask >> l & 1 != 0 { out[l] } else { d[l] };
            }
        }
    }
    #[inline(always)]
    pub fn pred(&self, p: u32) -> u32 {
        self.preds[p as usize]
    }
    #[inline(always)]
    pub fn put_pred(&mut self, p: u32, bits: u32) {
        let m = self.mask;
        let d = &mut self.preds[p as usize];
        *d = (*d & !m) | (bits & m);
    }
    #[inline(always)]
    pub fn map1<A: Lane, R: Lane>(&mut self, i: &Inst, f: impl Fn(A) -> R) {
        let a = self.reg::<A>(i.a);
        let mut out = [R::default(); 32];
        for l in 0..32 {
            out[l] = f(a[l]);
        }
        self.put(i.d, &out);
    }
    #[inline(always)]
    pub fn map2<A: Lane, B: Lane, R: Lane>(&mut self, i: &Inst, f: impl Fn(A, B) -> R) {
        let (a, b) = (self.reg::<A>(i.a), self.reg::<B>(i.b));
        let mut out = [R::default(); 32];
        for l in 0..32 {
            out[l] = f(a[l], b[l]);
        }
        self.put(i.d, &out);
    }
    #[inline(always)]
    pub fn map3<A: Lane, B: Lane, C: Lane, R: Lane>(&mut self, i: &Inst, f: impl Fn(A, B, C) -> R) {
        let (a, b, c) = (self.reg::<A>(i.a), self.reg::<B>(i.b), self.reg::<C>(i.c));
        let mut out = [R::default(); 32];
        for l in 0..32 {
            out[l] = f(a[l], b[l], c[l]);
        }
        self.put(i.d, &out);
    }
    /// As `map2`, for costly functions: only the active lanes are computed.
    #[inline(always)]
    pub fn lanes2<A: Lane, B: Lane, R: Lane>(&mut self, i: &Inst, f: impl Fn(A, B) -> R) {
        let mut out = [R::default(); 32];
        let (a, b) = (self.reg::<A>(i.a), self.reg::<B>(i.b));
        for l in bits(self.mask) {
            out[l] = f(a[l], b[l]);
        }
        self.put(i.d, &out);
    }
    /// Sets predicate `d` from a comparison.
    #[inline(always)]
    pub fn compare<T: Lane>(&mut self, i: &Inst, f: impl Fn(T, T) -> bool) {
        let (a, b) = (self.reg::<T>(i.a), self.reg::<T>(i.b));
        let mut m = 0u32;
        for l in 0..32 {
            m |= u32::from(f(a[l], b[l])) << l;
        }
        self.put_pred(i.d, m);
    }
    pub fn fail(&mut self, code: i32, lane: u32, line: u32, message: String) {
        if self.fault.is_none() {
            self.fault = Some(Fault { code, message, line, lane });
        }
    }
    pub fn ext(&self, at: u32, n: usize) -> &[u32] {
        &self.env.kernel.ext[at as usize..at as usize + n]
    }
}

/// The set lanes of a mask.
#[inline(always)]
pub fn bits(mut m: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (m != 0).then(|| {
            let l = m.trailing_zeros() as usize;
            m &= m - 1;
            l
        })
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Run,
    Sync,
    Bar,
}

/// Lanes of a warp that stand at the same block.
#[derive(Clone, Copy)]
struct Frag {
    pc: u32,
    mask: u32,
    wait: Wait,
}

#[derive(Default)]
struct WarpState {
    regs: Vec<Line>,
    preds: Vec<u32>,
    local: Vec<u8>,
    live: u32,
    frags: Vec<Frag>,
    /// Barrier the warp stands at: number and thread count (0: all of the block).
    bar: Option<(u32, u32)>,
    /// The barrier's reduction and the lanes whose predicate is set.
    red: Option<Red>,
    votes: u32,
    warp: u32,
}

/// Buffers a worker keeps between launches.
#[derive(Default)]
struct Scratch {
    warps: Vec<WarpState>,
    shared: Shared,
    /// Kernel and launch the constants and thread indices are set up for.
    key: (usize, [u32; 3], [u32; 3], usize),
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `EMUCUDA_ORDER=reverse`: blocks and warps run last to first, which shows up code that needs
/// an order no barrier asks for.
fn reversed() -> bool {
    static ORDER: OnceLock<bool> = OnceLock::new();
    *ORDER.get_or_init(|| std::env::var("EMUCUDA_ORDER").is_ok_and(|v| v == "reverse"))
}

/// `EMUCUDA_RACECHECK`: accesses to shared memory that no barrier orders are errors.
fn racecheck() -> bool {
    static CHECK: OnceLock<bool> = OnceLock::new();
    *CHECK.get_or_init(|| std::env::var_os("EMUCUDA_RACECHECK").is_some())
}

/// Runs a grid; returns the number of lane instructions executed.
pub fn launch(env: &Env<'_>) -> Result<u64, (Fault, String)> {
    let blocks = env.grid.iter().map(|&g| g as usize).product::<usize>();
    let threads = env.block.iter().map(|&b| b as usize).product::<usize>();
    let next = AtomicUsize::new(0);
    let count = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let failed: Mutex<Option<(Fault, String)>> = Mutex::new(None);
    let workers =
        if blocks * threads <= 1024 { 1 } else { rayon::current_num_threads().min(blocks) };
    let chunk = (blocks / (workers * 8)).clamp(1, 64);
    let work = || {
        SCRATCH.with_borrow_mut(|s| {
            s.prepare(env, threads);
            let mut sum = 0;
            while !stop.load(Ordering::Relaxed) {
                let from = next.fetch_add(chunk, Ordering::Relaxed);
                if from >= blocks {
                    break;
                }
                for b in from..blocks.min(from + chunk) {
                    let b = if reversed() { blocks - 1 - b } else { b };
                    let g = env.grid.map(|x| x as usize);
                    let at = [b % g[0], b / g[0] % g[1], b / (g[0] * g[1])].map(|x| x as u32);
                    if let Err((fault, warp)) = s.run_block(env, threads, at, &mut sum) {
                        let tid = warp * 32 + fault.lane;
                        failed
                            .lock()
                            .unwrap()
                            .get_or_insert((fault, format!("block {at:?} thread {tid}")));
                        stop.store(true, Ordering::Relaxed);
                        return;
                    }
                }
            }
            count.fetch_add(sum, Ordering::Relaxed);
        });
    };
    if workers == 1 {
        work();
    } else {
        rayon::scope(|s| (0..workers).for_each(|_| s.spawn(|_| work())));
    }
    match failed.into_inner().unwrap() {
        Some(f) => Err(f),
        None => Ok(count.into_inner()),
    }
}

impl Scratch {
    /// Sizes the buffers and fills in what stays the same for all blocks of the launch.
    fn prepare(&mut self, env: &Env<'_>, threads: usize) {
        let k = env.kernel;
        let key = (k.id, env.grid, env.block, env.dyn_shared);
        if self.key == key {
            return;
        }
        self.key = key;
        self.shared.bytes.resize(k.shared + env.dyn_shared, 0);
        if racecheck() {
            self.shared.shadow.resize(k.shared + env.dyn_shared, Shadow::default());
        }
        let n = if k.has_barrier { threads.div_ceil(32) } else { 1 };
        self.warps.resize_with(n.max(self.warps.len()), WarpState::default);
        for (w, ws) in self.warps.iter_mut().enumerate().take(n) {
            ws.regs.resize(ws.regs.len().max(k.lines as usize), Line([0; 64]));
            ws.preds.resize(ws.preds.len().max(k.preds as usize), 0);
            ws.local.resize(k.local * 32, 0);
            ws.preds[P_TRUE as usize] = FULL;
            for &(off, class, v) in &k.consts {
                match class {
                    Class::P => ws.preds[off as usize] = v as u32,
                    Class::W16 => ws.set(off, &[v as u16; 32]),
                    Class::W32 => ws.set(off, &[v as u32; 32]),
                    Class::W64 => ws.set(off, &[v; 32]),
                }
            }
            ws.set_warp(env, w as u32);
        }
    }

    fn run_block(
        &mut self,
        env: &Env<'_>,
        threads: usize,
        at: [u32; 3],
        sum: &mut u64,
    ) -> Result<(), (Fault, u32)> {
        let n = threads.div_ceil(32) as u32;
        let live = |w: u32| {
            if (w + 1) * 32 <= threads as u32 { FULL } else { FULL >> (32 - threads % 32) }
        };
        self.shared.epoch = self.shared.epoch.wrapping_add(1);
        if memory::poisoned() {
            self.shared.bytes.fill(0xff);
        }
        if !env.kernel.has_barrier {
            for w in 0..n {
                let w = if reversed() { n - 1 - w } else { w };
                let ws = &mut self.warps[0];
                if ws.warp != w {
                    ws.set_warp(env, w);
                }
                ws.begin(env, at, live(w));
                ws.run(env, &mut self.shared, sum).map_err(|f| (f, w))?;
            }
            return Ok(());
        }
        for w in 0..n {
            self.warps[w as usize].begin(env, at, live(w));
        }
        let warps = &mut self.warps[..n as usize];
        loop {
            for w in 0..n {
                let w = if reversed() { n - 1 - w } else { w };
                let ws = &mut warps[w as usize];
                if ws.bar.is_none() && ws.live != 0 {
                    ws.run(env, &mut self.shared, sum).map_err(|f| (f, w))?;
                }
            }
            let total: u32 = warps.iter().map(|w| w.live.count_ones()).sum();
            if total == 0 {
                return Ok(());
            }
            let mut released = false;
            let waiting: Vec<_> = warps
                .iter()
                .filter_map(|w| Some((w.bar?.0, w.live.count_ones(), w.votes.count_ones())))
                .collect();
            for ws in warps.iter_mut() {
                let Some((id, need)) = ws.bar else { continue };
                let there = waiting.iter().filter(|w| w.0 == id);
                let (here, votes) = there.fold((0, 0), |s, w| (s.0 + w.1, s.1 + w.2));
                if here >= if need == 0 { total } else { need.min(total) } {
                    ws.release(here, votes);
                    released = true;
                }
            }
            self.shared.epoch = self.shared.epoch.wrapping_add(1);
            if !released {
                let f = Fault {
                    code: LAUNCH_FAILED,
                    message: "barrier deadlock".into(),
                    line: 0,
                    lane: 0,
                };
                return Err((f, 0));
            }
        }
    }
}

impl WarpState {
    fn set<T: Lane>(&mut self, off: u32, v: &[T; 32]) {
        assert!(off as usize + 32 * size_of::<T>() <= self.regs.len() * 64);
        // SAFETY: checked above; registers are aligned to 64 bytes.
        unsafe { *self.regs.as_mut_ptr().cast::<u8>().add(off as usize).cast() = *v }
    }

    /// Fills the special registers that depend on the warp and the launch only.
    fn set_warp(&mut self, env: &Env<'_>, warp: u32) {
        self.warp = warp;
        let [bx, by, _] = env.block;
        let lane: [u32; 32] = std::array::from_fn(|l| l as u32);
        let threads: u32 = env.block.iter().product();
        for &(off, s) in &env.kernel.specials {
            let v = match s {
                Special::Tid(0) => lane.map(|l| (warp * 32 + l) % bx),
                Special::Tid(1) => lane.map(|l| (warp * 32 + l) / bx % by),
                Special::Tid(_) => lane.map(|l| (warp * 32 + l) / (bx * by)),
                Special::Ntid(d) => [env.block[d as usize]; 32],
                Special::Nctaid(d) => [env.grid[d as usize]; 32],
                Special::Ctaid(_) => continue,
                Special::Lane => lane,
                Special::Warp => [warp; 32],
                Special::NWarp => [threads.div_ceil(32); 32],
                Special::LaneMask(k) => lane.map(|l| {
                    let (eq, lt) = (1u32 << l, (1u32 << l) - 1);
                    [eq, lt | eq, lt, !lt, !(lt | eq)][k as usize]
                }),
                Special::DynShared => [env.dyn_shared as u32; 32],
                Special::TotalShared => [(env.kernel.shared + env.dyn_shared) as u32; 32],
                Special::Zero32 | Special::Clock32 => [0; 32],
                Special::One32 => [1; 32],
                Special::Clock64 => {
                    self.set(off, &[0u64; 32]);
                    continue;
                }
            };
            self.set(off, &v);
        }
    }

    /// Puts the warp at the kernel's entry in block `at`.
    fn begin(&mut self, env: &Env<'_>, at: [u32; 3], live: u32) {
        for &(off, s) in &env.kernel.specials {
            if let Special::Ctaid(d) = s {
                self.set(off, &[at[d as usize]; 32]);
            }
        }
        self.live = live;
        (self.bar, self.red, self.votes) = (None, None, 0);
        self.frags.clear();
        self.frags.push(Frag { pc: 0, mask: live, wait: Wait::Run });
    }

    /// Lets the warp go on from a barrier that `here` threads reached, `votes` of them in favour.
    fn release(&mut self, here: u32, votes: u32) {
        if let Some(red) = self.red.take() {
            match red.op {
                RedOp::Count => self.set(red.dst, &[votes; 32]),
                op => {
                    let yes = if op == RedOp::And { votes == here } else { votes > 0 };
                    self.preds[red.dst as usize] = if yes { FULL } else { 0 };
                }
            }
        }
        (self.bar, self.votes) = (None, 0);
        for f in &mut self.frags {
            f.wait = Wait::Run;
        }
    }

    /// Runs until all lanes have left or wait at a barrier.
    fn run(&mut self, env: &Env<'_>, shared: &mut Shared, sum: &mut u64) -> Result<(), Fault> {
        let k = env.kernel;
        let frags = &mut self.frags;
        let mut cx = Cx {
            regs: &mut self.regs,
            preds: &mut self.preds,
            local: &mut self.local,
            mask: 0,
            env,
            shared,
            warp: self.warp,
            fault: None,
            recent: (0, 0),
        };
        let mut spins = 0u32;
        'pick: loop {
            // the runnable fragment furthest back; it takes in the others that stand there
            spins += 1;
            let runnable = frags.iter().filter(|f| f.wait == Wait::Run);
            let best = if spins & 0xffff == 0 {
                runnable.max_by_key(|f| f.pc)
            } else {
                runnable.min_by_key(|f| f.pc)
            };
            let Some(&Frag { mut pc, .. }) = best else {
                if frags.is_empty() {
                    return Ok(());
                }
                if frags.iter().all(|f| f.wait == Wait::Bar) {
                    return Ok(());
                }
                // lanes named by a .sync instruction will never come: go on without them
                frags.iter_mut().filter(|f| f.wait == Wait::Sync).for_each(|f| f.wait = Wait::Run);
                self.live = frags.iter().fold(0, |m, f| m | f.mask);
                sync_partial(&mut cx, k, frags, sum);
                continue;
            };
            let mut mask = 0;
            frags.retain(|f| {
                let here = f.pc == pc && f.wait != Wait::Bar;
                mask |= if here { f.mask } else { 0 };
                !here
            });
            loop {
                let block = &k.blocks[pc as usize];
                let body = &k.insts[block.start as usize..block.end as usize];
                if let Term::Sync { members, next } = block.term {
                    // everything but the last instruction has run when the fragment comes back to wait
                    let want =
                        cx.reg::<u32>(members)[mask.trailing_zeros() as usize & 31] & self.live;
                    if want & !mask != 0 {
                        frags.push(Frag { pc, mask, wait: Wait::Sync });
                        continue 'pick;
                    }
                    run_body(&mut cx, body, mask, sum);
                    pc = next;
                } else {
                    run_body(&mut cx, body, mask, sum);
                    match block.term {
                        Term::Jump(t) => pc = t,
                        Term::Branch { guard, neg, target, fall } => {
                            let p = cx.pred(guard) ^ neg;
                            let (yes, no) = (mask & p, mask & !p);
                            if no == 0 {
                                pc = target;
                            } else if yes == 0 {
                                pc = fall;
                            } else {
                                frags.push(Frag { pc: target, mask: yes, wait: Wait::Run });
                                frags.push(Frag { pc: fall, mask: no, wait: Wait::Run });
                                if let Some(f) = cx.fault.take() {
                                    return Err(f);
                                }
                                continue 'pick;
                            }
                        }
                        Term::Exit => {
                            self.live &= !mask;
                            if let Some(f) = cx.fault.take() {
                                return Err(f);
                            }
                            // lanes waiting for these need not wait any more
                            frags
                                .iter_mut()
                                .filter(|f| f.wait == Wait::Sync)
                                .for_each(|f| f.wait = Wait::Run);
                            continue 'pick;
                        }
                        Term::Bar { id, count, next, red } => {
                            self.red = red;
                            self.votes |= red.map_or(0, |r| cx.pred(r.pred) & mask);
                            let l = mask.trailing_zeros() as usize & 31;
                            let n = if count == NONE { 0 } else { cx.reg::<u32>(count)[l] };
                            self.bar = Some((cx.reg::<u32>(id)[l], n));
                            frags.push(Frag { pc: next, mask, wait: Wait::Bar });
                            if let Some(f) = cx.fault.take() {
                                return Err(f);
                            }
                            continue 'pick;
                        }
                        Term::Switch { index, ref targets } => {
                            let idx = *cx.reg::<u32>(index);
                            for l in bits(mask) {
                                let t = targets[(idx[l] as usize).min(targets.len() - 1)];
                                frags.push(Frag { pc: t, mask: 1 << l, wait: Wait::Run });
                            }
                            continue 'pick;
                        }
                        Term::Sync { .. } => unreachable!(),
                    }
                }
                if let Some(f) = cx.fault.take() {
                    return Err(f);
                }
                if !frags.is_empty() {
                    // someone else may stand here, or further back
                    frags.push(Frag { pc, mask, wait: Wait::Run });
                    continue 'pick;
                }
            }
        }
    }
}

#[inline(always)]
fn run_body(cx: &mut Cx<'_>, body: &[Inst], mask: u32, sum: &mut u64) {
    for i in body {
        cx.mask = mask & (cx.pred(i.guard) ^ i.neg);
        if cx.mask != 0 {
            (i.f)(cx, i);
        }
    }
    *sum += body.len() as u64 * u64::from(mask.count_ones());
}

/// Executes waiting `.sync` instructions with the lanes that are there.
fn sync_partial(cx: &mut Cx<'_>, k: &Kernel, frags: &mut [Frag], sum: &mut u64) {
    for f in frags.iter_mut() {
        let b: &Block = &k.blocks[f.pc as usize];
        if let (Term::Sync { next, .. }, Wait::Run) = (&b.term, f.wait) {
            run_body(cx, &k.insts[b.start as usize..b.end as usize], f.mask, sum);
            f.pc = *next;
        }
    }
}

/// Runs a kernel with its parameters laid out as bytes.
pub fn run_kernel(
    kernel: &Arc<Kernel>,
    params: &[u8],
    table: &Table,
    grid: [u32; 3],
    block: [u32; 3],
    dyn_shared: usize,
) -> Result<u64, (Fault, String)> {
    launch(&Env { kernel, params, table, grid, block, dyn_shared })
}
