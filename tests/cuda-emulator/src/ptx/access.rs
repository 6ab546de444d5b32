//! Loads, stores, atomics and asynchronous copies, with bounds and alignment checks.
use super::exec::{Cx, Lane, bits};
use super::ir::{Exec, Inst, Space, TAG_SHIFT, tag};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

pub const ILLEGAL_ADDRESS: i32 = 700;
pub const MISALIGNED_ADDRESS: i32 = 716;
pub const LAUNCH_FAILED: i32 = 719;

/// Packs what a memory instruction needs besides registers into `Inst::c`.
#[derive(Clone, Copy)]
pub struct Access {
    pub space: Space,
    /// Elements of a vector access (1, 2, 4 or 8).
    pub count: u32,
    /// The address register has 32 bits.
    pub narrow: bool,
    /// Also write the old value (`atom`, not `red`).
    pub fetch: bool,
}

impl Access {
    pub fn pack(self) -> u32 {
        self.space as u32
            | self.count << 4
            | u32::from(self.narrow) << 8
            | u32::from(self.fetch) << 9
    }
    fn of(c: u32) -> Self {
        let space = [Space::Generic, Space::Global, Space::Shared, Space::Local, Space::Param]
            [(c & 15) as usize];
        Access { space, count: c >> 4 & 15, narrow: c >> 8 & 1 != 0, fetch: c >> 9 & 1 != 0 }
    }
}

/// A value in memory, moved through u64.
trait Cell: Copy {
    fn to64(self) -> u64;
    fn from64(v: u64) -> Self;
}
macro_rules! cell {
    ($($t:ty),*) => {$(impl Cell for $t {
        #[inline(always)]
        fn to64(self) -> u64 { self as u64 }
        #[inline(always)]
        fn from64(v: u64) -> Self { v as $t }
    })*};
}
cell!(u8, i8, u16, i16, u32, i32, u64);

/// What an access does to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Atomic,
}

/// The shared memory of a block and, under `EMUCUDA_RACECHECK`, who touched its bytes.
#[derive(Default)]
pub struct Shared {
    pub bytes: Vec<u8>,
    pub shadow: Vec<Shadow>,
    /// Barriers passed, counted over all blocks.
    pub epoch: u32,
}

/// Accesses to a byte since the last barrier; warps are numbered from 1, 0 is none.
#[derive(Clone, Copy, Default)]
pub struct Shadow {
    epoch: u32,
    writer: u16,
    reader: u16,
    atomic: bool,
}

impl Shadow {
    /// Notes an access; true if another warp's access to the byte is not ordered with it.
    fn clash(&mut self, epoch: u32, warp: u16, kind: Kind) -> bool {
        if self.epoch != epoch {
            *self = Shadow { epoch, ..Shadow::default() };
        }
        let other = |w: u16| w != 0 && w != warp;
        let written = other(self.writer) && !(kind == Kind::Atomic && self.atomic);
        let read = kind != Kind::Read && other(self.reader);
        if kind == Kind::Read {
            self.reader = if other(self.reader) { u16::MAX } else { warp };
        } else {
            (self.writer, self.atomic) = (warp, kind == Kind::Atomic);
        }
        written || read
    }
}

impl Cx<'_> {
    /// Reports accesses of different warps to the same shared byte without a barrier between.
    fn check_race(&mut self, i: &Inst, addr: &[u64; 32], size: u64, kind: Kind) -> Option<()> {
        let (epoch, warp) = (self.shared.epoch, self.warp as u16 + 1);
        for l in bits(self.mask) {
            let at = addr[l] as usize..(addr[l] + size) as usize;
            if self.shared.shadow[at].iter_mut().fold(false, |c, s| c | s.clash(epoch, warp, kind))
            {
                let m = format!("race between warps on shared memory at {:#x}", addr[l]);
                self.fail(LAUNCH_FAILED, l as u32, i.line, m);
                return None;
            }
        }
        Some(())
    }

    /// Host pointers for the active lanes' addresses, each good for `size` bytes.
    fn pointers(&mut self, i: &Inst, a: Access, size: u64, kind: Kind) -> Option<[*mut u8; 32]> {
        let mut addr = [0u64; 32];
        if a.narrow {
            let r = self.reg::<u32>(i.a);
            for l in 0..32 {
                addr[l] = u64::from(r[l].wrapping_add(i.x as u32));
            }
        } else {
            let r = self.reg::<u64>(i.a);
            for l in 0..32 {
                addr[l] = r[l].wrapping_add(i.x);
            }
        }
        self.resolve(i, a.space, &addr, size, kind)
    }

    fn resolve(
        &mut self,
        i: &Inst,
        space: Space,
        addr: &[u64; 32],
        size: u64,
        kind: Kind,
    ) -> Option<[*mut u8; 32]> {
        let first = addr[self.mask.trailing_zeros() as usize & 31];
        let (mut lo, mut hi, mut all) = (first, first, first);
        for l in 0..32 {
            let x = if self.mask >> l & 1 != 0 { addr[l] } else { first };
            lo = lo.min(x);
            hi = hi.max(x);
            all |= x;
        }
        if all & (size - 1) != 0 {
            let l = bits(self.mask).find(|&l| addr[l] & (size - 1) != 0).unwrap_or(0);
            self.fail(
                MISALIGNED_ADDRESS,
                l as u32,
                i.line,
                format!("misaligned {size}-byte access to {:#x}", addr[l]),
            );
            return None;
        }
        match space {
            Space::Global => self.check_global(i, addr, lo, hi, size)?,
            Space::Generic => {
                if hi >> TAG_SHIFT == 0 {
                    self.check_global(i, addr, lo, hi, size)?;
                } else {
                    return self.generic(i, addr, size, kind);
                }
            }
            Space::Shared | Space::Param | Space::Local => {
                let limit = match space {
                    Space::Shared => self.shared.bytes.len(),
                    Space::Param => self.env.params.len(),
                    _ => self.local.len() / 32,
                } as u64;
                if hi.saturating_add(size) > limit {
                    let l = bits(self.mask)
                        .find(|&l| addr[l].saturating_add(size) > limit)
                        .unwrap_or(0);
                    let m = format!(
                        "{space:?} access of {size} bytes at {:#x}, limit {limit}",
                        addr[l]
                    );
                    self.fail(ILLEGAL_ADDRESS, l as u32, i.line, m);
                    return None;
                }
                if space == Space::Shared && !self.shared.shadow.is_empty() {
                    self.check_race(i, addr, size, kind)?;
                }
                let step = if space == Space::Local { limit as usize } else { 0 };
                let base = match space {
                    Space::Shared => self.shared.bytes.as_mut_ptr(),
                    Space::Param => self.env.params.as_ptr().cast_mut(),
                    _ => self.local.as_mut_ptr(),
                };
                let mut p = [base; 32];
                for l in 0..32 {
                    p[l] = base.wrapping_add(addr[l] as usize + l * step);
                }
                return Some(p);
            }
        }
        Some(addr.map(|a| a as *mut u8))
    }

    /// Generic addresses some of which are tagged: lane by lane.
    fn generic(
        &mut self,
        i: &Inst,
        addr: &[u64; 32],
        size: u64,
        kind: Kind,
    ) -> Option<[*mut u8; 32]> {
        let mut out = [std::ptr::null_mut(); 32];
        let mask = self.mask;
        for l in bits(mask) {
            let space = [Space::Shared, Space::Local, Space::Param]
                .into_iter()
                .find(|&s| addr[l] >> TAG_SHIFT == tag(s) >> TAG_SHIFT)
                .unwrap_or(Space::Global);
            let mut one = [0; 32];
            one[l] = addr[l] - tag(space);
            self.mask = 1 << l;
            let p = self.resolve(i, space, &one, size, kind);
            self.mask = mask;
            out[l] = p?[l];
        }
        Some(out)
    }

    fn check_global(
        &mut self,
        i: &Inst,
        addr: &[u64; 32],
        lo: u64,
        hi: u64,
        size: u64,
    ) -> Option<()> {
        let inside = |r: (u64, u64), lo: u64, hi: u64| r.0 <= lo && hi.saturating_add(size) <= r.1;
        if inside(self.recent, lo, hi) {
            return Some(());
        }
        if let Some(r) = self.env.table.find(lo)
            && inside(r, lo, hi)
        {
            self.recent = r;
            return Some(());
        }
        for l in bits(self.mask) {
            match self.env.table.find(addr[l]) {
                Some(r) if inside(r, addr[l], addr[l]) => {}
                _ => {
                    let m = format!(
                        "access of {size} bytes at {:#x}: {}",
                        addr[l],
                        self.env.table.describe(addr[l])
                    );
                    self.fail(ILLEGAL_ADDRESS, l as u32, i.line, m);
                    return None;
                }
            }
        }
        Some(())
    }
}

fn load<M: Cell, R: Lane + Cell>(cx: &mut Cx<'_>, i: &Inst) {
    let a = Access::of(i.c);
    let n = a.count as usize;
    let Some(p) = cx.pointers(i, a, (n * size_of::<M>()) as u64, Kind::Read) else { return };
    let mask = cx.mask;
    for e in 0..n {
        let d = if n == 1 { i.d } else { cx.ext(i.d, n)[e] };
        let d = cx.reg_mut::<R>(d);
        for l in bits(mask) {
            // SAFETY: `pointers` checked bounds and alignment of all `n` elements.
            d[l] = R::from64(unsafe { *p[l].cast::<M>().add(e) }.to64());
        }
    }
}

fn store<M: Cell, R: Lane + Cell>(cx: &mut Cx<'_>, i: &Inst) {
    let a = Access::of(i.c);
    let n = a.count as usize;
    let Some(p) = cx.pointers(i, a, (n * size_of::<M>()) as u64, Kind::Write) else { return };
    for e in 0..n {
        let b = if n == 1 { i.b } else { cx.ext(i.b, n)[e] };
        let b = cx.reg::<R>(b);
        for l in bits(cx.mask) {
            // SAFETY: as in `load`.
            unsafe { *p[l].cast::<M>().add(e) = M::from64(b[l].to64()) };
        }
    }
}

macro_rules! by_width {
    ($f:ident, $m:ty, $reg:expr) => {
        match $reg {
            16 => $f::<$m, u16> as Exec,
            32 => $f::<$m, u32> as Exec,
            _ => $f::<$m, u64> as Exec,
        }
    };
}

/// The load (or store) of a PTX type to (from) registers of `reg` bits.
pub fn load_fn(ty: &str, reg: u32) -> Option<Exec> {
    Some(match ty {
        "u8" | "b8" => by_width!(load, u8, reg),
        "s8" => by_width!(load, i8, reg),
        "u16" | "b16" | "f16" | "bf16" => by_width!(load, u16, reg),
        "s16" => by_width!(load, i16, reg),
        "u32" | "b32" | "f32" | "f16x2" => by_width!(load, u32, reg),
        "s32" => by_width!(load, i32, reg),
        "u64" | "b64" | "s64" | "f64" => load::<u64, u64>,
        _ => return None,
    })
}
pub fn store_fn(ty: &str, reg: u32) -> Option<Exec> {
    Some(match ty {
        "u8" | "b8" | "s8" => by_width!(store, u8, reg),
        "u16" | "b16" | "f16" | "bf16" | "s16" => by_width!(store, u16, reg),
        "u32" | "b32" | "f32" | "f16x2" | "s32" => by_width!(store, u32, reg),
        "u64" | "b64" | "s64" | "f64" => store::<u64, u64>,
        _ => return None,
    })
}

/// A word that can be updated atomically.
trait Atom: Lane {
    /// # Safety
    /// `p` must be aligned and valid.
    unsafe fn update(p: *mut u8, f: impl Fn(Self) -> Self) -> Self;
}
macro_rules! atom {
    ($t:ty, $a:ty) => {
        impl Atom for $t {
            #[inline(always)]
            unsafe fn update(p: *mut u8, f: impl Fn(Self) -> Self) -> Self {
                // SAFETY: promised by the caller.
                let cell = unsafe { <$a>::from_ptr(p.cast()) };
                let mut old = cell.load(Ordering::Relaxed);
                loop {
                    match cell.compare_exchange_weak(
                        old,
                        f(old),
                        Ordering::SeqCst,
                        Ordering::Relaxed,
                    ) {
                        Ok(o) => return o,
                        Err(o) => old = o,
                    }
                }
            }
        }
    };
}
atom!(u16, AtomicU16);
atom!(u32, AtomicU32);
atom!(u64, AtomicU64);

/// `d = [a]; [a] = f([a], b, c)`; operand registers `b` and `c` are in `ext[i.b..]`.
fn atomic<T: Atom>(cx: &mut Cx<'_>, i: &Inst, f: impl Fn(T, T, T) -> T) {
    let a = Access::of(i.c);
    let Some(p) = cx.pointers(i, a, size_of::<T>() as u64, Kind::Atomic) else { return };
    let (rb, rc) = (cx.ext(i.b, 2)[0], cx.ext(i.b, 2)[1]);
    let (b, c) = (*cx.reg::<T>(rb), *cx.reg::<T>(rc));
    for l in bits(cx.mask) {
        // SAFETY: `pointers` checked the address.
        let old = unsafe { T::update(p[l], |o| f(o, b[l], c[l])) };
        if a.fetch {
            cx.reg_mut::<T>(i.d)[l] = old;
        }
    }
}

pub fn atomic_fn(op: &str, ty: &str) -> Option<Exec> {
    macro_rules! at {
        ($t:ty, $e:expr) => {{
            fn x(cx: &mut Cx<'_>, i: &Inst) {
                atomic::<$t>(cx, i, $e)
            }
            x as Exec
        }};
    }
    fn h(a: u16, b: u16, f: impl Fn(f32, f32) -> f32) -> u16 {
        half::f16::from_f32(f(super::math::f16_to32(a), super::math::f16_to32(b))).to_bits()
    }
    fn bh(a: u16, b: u16, f: impl Fn(f32, f32) -> f32) -> u16 {
        super::math::bf16_bits(f(super::math::bf16_to32(a), super::math::bf16_to32(b)))
    }
    fn pair(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
        u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
    }
    Some(match (op, ty) {
        ("add", "u32" | "s32") => at!(u32, |o, b, _| o.wrapping_add(b)),
        ("add", "u64" | "s64") => at!(u64, |o, b, _| o.wrapping_add(b)),
        ("add", "f32") => at!(u32, |o, b, _| (f32::from_bits(o) + f32::from_bits(b)).to_bits()),
        ("add", "f64") => at!(u64, |o, b, _| (f64::from_bits(o) + f64::from_bits(b)).to_bits()),
        ("add", "f16") => at!(u16, |o, b, _| h(o, b, |x, y| x + y)),
        ("add", "bf16") => at!(u16, |o, b, _| bh(o, b, |x, y| x + y)),
        ("add", "f16x2") => at!(u32, |o, b, _| pair(o, b, |x, y| h(x, y, |x, y| x + y))),
        ("add", "bf16x2") => at!(u32, |o, b, _| pair(o, b, |x, y| bh(x, y, |x, y| x + y))),
        ("min", "u32") => at!(u32, |o, b, _| o.min(b)),
        ("max", "u32") => at!(u32, |o, b, _| o.max(b)),
        ("min", "s32") => at!(u32, |o, b, _| (o as i32).min(b as i32) as u32),
        ("max", "s32") => at!(u32, |o, b, _| (o as i32).max(b as i32) as u32),
        ("min", "u64") => at!(u64, |o, b, _| o.min(b)),
        ("max", "u64") => at!(u64, |o, b, _| o.max(b)),
        ("min", "s64") => at!(u64, |o, b, _| (o as i64).min(b as i64) as u64),
        ("max", "s64") => at!(u64, |o, b, _| (o as i64).max(b as i64) as u64),
        ("and", "b32") => at!(u32, |o, b, _| o & b),
        ("or", "b32") => at!(u32, |o, b, _| o | b),
        ("xor", "b32") => at!(u32, |o, b, _| o ^ b),
        ("and", "b64") => at!(u64, |o, b, _| o & b),
        ("or", "b64") => at!(u64, |o, b, _| o | b),
        ("xor", "b64") => at!(u64, |o, b, _| o ^ b),
        ("inc", "u32") => at!(u32, |o, b, _| if o >= b { 0 } else { o + 1 }),
        ("dec", "u32") => at!(u32, |o, b, _| if o == 0 || o > b { b } else { o - 1 }),
        ("exch", "b32" | "u32" | "s32" | "f32") => at!(u32, |_, b, _| b),
        ("exch", "b64" | "u64" | "s64") => at!(u64, |_, b, _| b),
        ("cas", "b16") => at!(u16, |o, b, c| if o == b { c } else { o }),
        ("cas", "b32" | "u32" | "s32") => at!(u32, |o, b, c| if o == b { c } else { o }),
        ("cas", "b64" | "u64" | "s64") => at!(u64, |o, b, c| if o == b { c } else { o }),
        _ => return None,
    })
}

/// `cp.async`: copies `ext = [size register]` bytes from global to shared at once, zero-filling up
/// to the access size. `d`: shared address, `a`: global address, `x`: access size, `c`: packed.
pub fn copy_async(cx: &mut Cx<'_>, i: &Inst) {
    let [dst_off, src_off, dst_narrow, n] = [0, 1, 2, 3].map(|k| cx.ext(i.c, 4)[k]);
    let dst: [u64; 32] =
        if dst_narrow == 1 { cx.reg::<u32>(i.d).map(u64::from) } else { *cx.reg::<u64>(i.d) };
    let dst = dst.map(|d| (d.wrapping_add(dst_off as i32 as u64)) & ((1 << TAG_SHIFT) - 1));
    let src = cx.reg::<u64>(i.a).map(|s| s.wrapping_add(src_off as i32 as u64));
    let take = *cx.reg::<u32>(i.b);
    let Some(d) = cx.resolve(i, Space::Shared, &dst, u64::from(n), Kind::Write) else { return };
    let full = cx.mask;
    let some = bits(full).filter(|&l| take[l] > 0).fold(0, |m, l| m | 1 << l);
    if some != 0 {
        cx.mask = some;
        let s = cx.resolve(i, Space::Global, &src, u64::from(n), Kind::Read);
        cx.mask = full;
        let Some(s) = s else { return };
        for l in bits(some) {
            // SAFETY: both ranges were checked for `n` bytes.
            unsafe { std::ptr::copy_nonoverlapping(s[l], d[l], take[l].min(n) as usize) };
        }
    }
    for l in bits(full).filter(|&l| take[l] < n) {
        // SAFETY: inside the checked destination.
        unsafe { d[l].add(take[l] as usize).write_bytes(0, (n - take[l]) as usize) };
    }
}

impl Cx<'_> {
    /// Host pointers to `size` bytes at each lane's address in `space` (for `wmma`).
    pub fn elements(
        &mut self,
        i: &Inst,
        space: Space,
        addr: &[u64; 32],
        size: u64,
        write: bool,
    ) -> Option<[*mut u8; 32]> {
        self.resolve(i, space, addr, size, if write { Kind::Write } else { Kind::Read })
    }

    /// Reads 16 bytes of shared memory for a lane (for `ldmatrix`).
    pub fn shared_row(&mut self, i: &Inst, addr: u64, lane: usize) -> Option<[u16; 8]> {
        let mask = self.mask;
        self.mask = 1 << lane;
        let mut a = [0; 32];
        a[lane] = addr & ((1 << TAG_SHIFT) - 1);
        let p = self.resolve(i, Space::Shared, &a, 16, Kind::Read);
        self.mask = mask;
        // SAFETY: 16 aligned bytes were checked.
        Some(unsafe { *p?[lane].cast() })
    }
}
