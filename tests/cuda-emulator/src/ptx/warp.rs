//! Instructions in which the lanes of a warp work together, and calls out of a kernel.
use super::access::ILLEGAL_ADDRESS;
use super::exec::{Cx, FULL, bits};
use super::ir::{Exec, Inst, Space};
use super::math::{BF16, F16, Half};

pub const ASSERT: i32 = 710;

pub fn nop(_: &mut Cx<'_>, _: &Inst) {}

/// `d|p = shfl(a, b, c)`; `ext[i.x..]` is `[predicate, mode]`.
pub fn shuffle(c: &mut Cx<'_>, i: &Inst) {
    let (p, mode) = (c.ext(i.x as u32, 2)[0], c.ext(i.x as u32, 2)[1]);
    let (a, b, k) = (c.reg::<u32>(i.a), c.reg::<u32>(i.b), c.reg::<u32>(i.c));
    let (mut out, mut ok) = ([0u32; 32], 0u32);
    for l in 0..32u32 {
        let (bv, cv) = (b[l as usize] & 31, k[l as usize]);
        let (clamp, seg) = (cv & 31, cv >> 8 & 31);
        let max = (l & seg) | (clamp & !seg);
        let (j, in_range) = match mode {
            0 => {
                let j = l.wrapping_sub(bv) as i32;
                (j as u32, j >= max as i32)
            }
            1 => (l + bv, l + bv <= max),
            2 => (l ^ bv, l ^ bv <= max),
            _ => {
                let j = (l & seg) | (bv & !seg);
                (j, j <= max)
            }
        };
        ok |= u32::from(in_range) << l;
        out[l as usize] = a[if in_range { j & 31 } else { l } as usize];
    }
    c.put(i.d, &out);
    c.put_pred(p, ok);
}

/// `vote` of predicate `a`: `x` is all, any, uni or ballot.
pub fn vote(c: &mut Cx<'_>, i: &Inst) {
    let m = c.mask;
    let p = c.pred(i.a) & m;
    match i.x {
        0 => c.put_pred(i.d, if p == m { FULL } else { 0 }),
        1 => c.put_pred(i.d, if p != 0 { FULL } else { 0 }),
        2 => c.put_pred(i.d, if p == m || p == 0 { FULL } else { 0 }),
        _ => c.put(i.d, &[p; 32]),
    }
}

pub fn active_mask(c: &mut Cx<'_>, i: &Inst) {
    c.put(i.d, &[c.mask; 32]);
}

/// `match.any` (`x` = 0) and `match.all` (`x` = 1, predicate in `b`) on 32-bit values.
pub fn match_lanes(c: &mut Cx<'_>, i: &Inst) {
    let (m, a) = (c.mask, *c.reg::<u32>(i.a));
    let same = |l: usize| bits(m).filter(|&k| a[k] == a[l]).fold(0, |r, k| r | 1 << k);
    if i.x == 0 {
        let out: [u32; 32] = std::array::from_fn(same);
        c.put(i.d, &out);
    } else {
        let all = same(m.trailing_zeros() as usize) == m;
        c.put(i.d, &[if all { m } else { 0 }; 32]);
        c.put_pred(i.b, if all { FULL } else { 0 });
    }
}

pub fn redux(op: &str, ty: &str) -> Option<Exec> {
    macro_rules! redux {
        ($t:ty, $e:expr) => {{
            fn run(c: &mut Cx<'_>, i: &Inst) {
                let a = c.reg::<u32>(i.a);
                let r = bits(c.mask).map(|l| a[l] as $t).reduce($e).unwrap_or(0);
                c.put(i.d, &[r as u32; 32]);
            }
            run as Exec
        }};
    }
    Some(match (op, ty) {
        ("add", _) => redux!(u32, |a, b| a.wrapping_add(b)),
        ("min", "s32") => redux!(i32, |a, b| a.min(b)),
        ("max", "s32") => redux!(i32, |a, b| a.max(b)),
        ("min", _) => redux!(u32, |a, b| a.min(b)),
        ("max", _) => redux!(u32, |a, b| a.max(b)),
        ("and", _) => redux!(u32, |a, b| a & b),
        ("or", _) => redux!(u32, |a, b| a | b),
        ("xor", _) => redux!(u32, |a, b| a ^ b),
        _ => return None,
    })
}

/// `mma.m16n8kN`: `ext[i.a..]` lists the registers of d, a, b and c; `i.b` is N.
/// Products are summed in f32 in order of k, as far as PTX says anything about the order.
fn mma<const HALF_ACC: bool>(
    c: &mut Cx<'_>,
    i: &Inst,
    get: impl Fn(&Cx<'_>, u32, usize, usize) -> f32,
    per: usize,
) {
    let k = i.b as usize;
    let (na, nb) = (16 * k / (32 * per), 8 * k / (32 * per));
    let nc = if HALF_ACC { 2 } else { 4 };
    let regs = c.ext(i.a, nc + na + nb + nc).to_vec();
    let (d, rest) = regs.split_at(nc);
    let (a, rest) = rest.split_at(na);
    let (b, cc) = rest.split_at(nb);
    // gather the fragments into whole matrices
    let (mut ma, mut mb) = ([[0f32; 16]; 16], [[0f32; 8]; 16]);
    for l in 0..32 {
        let (g, t) = (l >> 2, l & 3);
        for e in 0..na * per {
            // register e/per holds rows g and g+8 in turn, then the next columns
            let (r, h) = (e / per, e % per);
            ma[g + 8 * (r & 1)][t * per + h + 4 * per * (r >> 1)] = get(c, a[r], l, h);
        }
        for e in 0..nb * per {
            let (r, h) = (e / per, e % per);
            mb[t * per + h + 4 * per * r][g] = get(c, b[r], l, h);
        }
    }
    let mut out = vec![[0f32; 32]; 4];
    for l in 0..32 {
        let (g, t) = (l >> 2, l & 3);
        for e in 0..4 {
            let (row, col) = (g + 8 * (e >> 1), t * 2 + (e & 1));
            let start = if HALF_ACC {
                F16::widen(&[(c.reg::<u32>(cc[e >> 1])[l] >> (16 * (e & 1))) as u16])[0]
            } else {
                c.reg::<f32>(cc[e])[l]
            };
            out[e][l] = (0..k).fold(start, |s, x| s + ma[row][x] * mb[x][col]);
        }
    }
    if HALF_ACC {
        for r in 0..2 {
            let (lo, hi) = (F16::narrow(&out[2 * r]), F16::narrow(&out[2 * r + 1]));
            let v: [u32; 32] = std::array::from_fn(|l| u32::from(lo[l]) | u32::from(hi[l]) << 16);
            c.put(d[r], &v);
        }
    } else {
        for e in 0..4 {
            c.put(d[e], &out[e]);
        }
    }
}

fn half_at<H: Half>(c: &Cx<'_>, r: u32, l: usize, h: usize) -> f32 {
    H::widen(&[(c.reg::<u32>(r)[l] >> (16 * h)) as u16])[0]
}
fn tf32_at(c: &Cx<'_>, r: u32, l: usize, _: usize) -> f32 {
    f32::from_bits(c.reg::<u32>(r)[l] & !0x1fff)
}

/// The matrix instruction for an input and an accumulator type.
pub fn mma_fn(input: &str, acc: &str) -> Option<Exec> {
    fn f16_f32(c: &mut Cx<'_>, i: &Inst) {
        mma::<false>(c, i, half_at::<F16>, 2);
    }
    fn f16_f16(c: &mut Cx<'_>, i: &Inst) {
        mma::<true>(c, i, half_at::<F16>, 2);
    }
    fn bf16(c: &mut Cx<'_>, i: &Inst) {
        mma::<false>(c, i, half_at::<BF16>, 2);
    }
    fn tf32(c: &mut Cx<'_>, i: &Inst) {
        mma::<false>(c, i, tf32_at, 1);
    }
    Some(match (input, acc) {
        ("f16", "f32") => f16_f32,
        ("f16", "f16") => f16_f16,
        ("bf16", "f32") => bf16,
        ("tf32", "f32") => tf32,
        _ => return None,
    })
}

/// `ldmatrix`: destination registers `ext[i.d..]`, `b` of them; address register `a` (wide if `c`
/// is 0), offset `x & 0xffffffff`, transposed if bit 32 of `x` is set.
pub fn ldmatrix(c: &mut Cx<'_>, i: &Inst) {
    let n = i.b as usize;
    let trans = i.x >> 32 != 0;
    let addr = |c: &Cx<'_>, l: usize| {
        let base = if i.c == 1 { u64::from(c.reg::<u32>(i.a)[l]) } else { c.reg::<u64>(i.a)[l] };
        base.wrapping_add(i.x as u32 as i32 as u64)
    };
    let mut rows = [[0u16; 8]; 32];
    for (l, row) in rows.iter_mut().enumerate().take(8 * n) {
        match c.shared_row(i, addr(c, l), l) {
            Some(r) => *row = r,
            None => return,
        }
    }
    for m in 0..n {
        let out: [u32; 32] = std::array::from_fn(|l| {
            let (r, q) = (l >> 2, 2 * (l & 3));
            let at = |e: usize| if trans { rows[8 * m + q + e][r] } else { rows[8 * m + r][q + e] };
            u32::from(at(0)) | u32::from(at(1)) << 16
        });
        let d = c.ext(i.d, n)[m];
        c.put(d, &out);
    }
}

/// How a `wmma` fragment lies in registers: lane l holds the elements l*per .. (l+1)*per of the
/// row-major matrix, halves two to a register, repeated if there is room. (PTX leaves it open.)
pub struct Fragment {
    pub rows: u32,
    pub cols: u32,
    /// 0: f16, 1: bf16, 2: f32.
    pub ty: u32,
    pub regs: Vec<u32>,
}

impl Fragment {
    /// As a list for `ext`, and back.
    pub fn list(&self) -> Vec<u32> {
        [&[self.rows, self.cols, self.ty, self.regs.len() as u32], &self.regs[..]].concat()
    }
    fn read(c: &Cx<'_>, at: &mut u32) -> Self {
        let h = c.ext(*at, 4);
        let (rows, cols, ty, n) = (h[0], h[1], h[2], h[3]);
        let regs = c.ext(*at + 4, n as usize).to_vec();
        *at += 4 + n;
        Fragment { rows, cols, ty, regs }
    }
    fn per(&self) -> usize {
        (self.rows * self.cols / 32) as usize
    }
    fn get(&self, c: &Cx<'_>, lane: usize, e: usize) -> u32 {
        if self.ty == 2 {
            c.reg::<u32>(self.regs[e])[lane]
        } else {
            c.reg::<u32>(self.regs[e / 2])[lane] >> (16 * (e % 2)) & 0xffff
        }
    }
    fn put(&self, c: &mut Cx<'_>, lane: usize, e: usize, v: u32) {
        let step = self.per();
        let slots = self.regs.len() * if self.ty == 2 { 1 } else { 2 };
        for e in (e..slots).step_by(step) {
            if self.ty == 2 {
                c.reg_mut::<u32>(self.regs[e])[lane] = v;
            } else {
                let r = &mut c.reg_mut::<u32>(self.regs[e / 2])[lane];
                *r = *r & !(0xffff << (16 * (e % 2))) | v << (16 * (e % 2));
            }
        }
    }
    fn matrix(&self, c: &Cx<'_>) -> Vec<f32> {
        let per = self.per();
        (0..per * 32)
            .map(|e| {
                let v = self.get(c, e / per, e % per);
                match self.ty {
                    0 => F16::widen(&[v as u16])[0],
                    1 => BF16::widen(&[v as u16])[0],
                    _ => f32::from_bits(v),
                }
            })
            .collect()
    }
}

/// `wmma.load` and `wmma.store` (`b` = 1): address register `a` with offset `x`, a list at `d`:
/// space, 32-bit address, row-major, stride register, fragment.
pub fn wmma_move(c: &mut Cx<'_>, i: &Inst) {
    let [space, narrow, row, stride] = [0, 1, 2, 3].map(|k| c.ext(i.d, 4)[k]);
    let f = Fragment::read(c, &mut (i.d + 4));
    let (size, store) = (if f.ty == 2 { 4 } else { 2 }, i.b == 1);
    let space =
        [Space::Generic, Space::Global, Space::Shared, Space::Local, Space::Param][space as usize];
    let base = if narrow == 1 { c.reg::<u32>(i.a).map(u64::from) } else { *c.reg::<u64>(i.a) };
    let ld = *c.reg::<u32>(stride);
    for e in 0..f.per() {
        let addr: [u64; 32] = std::array::from_fn(|l| {
            let k = (l * f.per() + e) as u32;
            let (r, q) = (k / f.cols, k % f.cols);
            let at = if row == 1 { r * ld[l] + q } else { q * ld[l] + r };
            base[l].wrapping_add(i.x).wrapping_add(u64::from(at) * size)
        });
        let Some(p) = c.elements(i, space, &addr, size, store) else { return };
        for l in bits(c.mask) {
            // SAFETY: `elements` checked each address for `size` bytes and their alignment.
            unsafe {
                match (store, size) {
                    (true, 4) => *p[l].cast::<u32>() = f.get(c, l, e),
                    (true, _) => *p[l].cast::<u16>() = f.get(c, l, e) as u16,
                    (false, 4) => f.put(c, l, e, *p[l].cast::<u32>()),
                    (false, _) => f.put(c, l, e, u32::from(*p[l].cast::<u16>())),
                }
            }
        }
    }
}

/// `wmma.mma`: the fragments d, a, b and c are listed at `ext[i.d..]`.
pub fn wmma_mma(c: &mut Cx<'_>, i: &Inst) {
    let mut at = i.d;
    let [d, a, b, acc] = std::array::from_fn(|_| Fragment::read(c, &mut at));
    let (ma, mb, mut out) = (a.matrix(c), b.matrix(c), acc.matrix(c));
    let (n, k) = (b.cols as usize, b.rows as usize);
    for (e, o) in out.iter_mut().enumerate() {
        *o = (0..k).fold(*o, |s, x| s + ma[e / n * k + x] * mb[x * n + e % n]);
    }
    let per = d.per();
    for (e, v) in out.into_iter().enumerate() {
        let v = if d.ty == 2 { v.to_bits() } else { u32::from(F16::narrow(&[v])[0]) };
        d.put(c, e / per, e % per, v);
    }
}

/// 8 bytes at `off` of a lane's local memory.
fn local64(c: &Cx<'_>, lane: usize, off: u32) -> u64 {
    let at = lane * (c.local.len() / 32) + off as usize;
    c.local.get(at..at + 8).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()))
}

/// The NUL-terminated string at a device address.
fn text(c: &Cx<'_>, addr: u64) -> String {
    let Some((lo, hi)) = c.env.table.find(addr) else { return format!("<{addr:#x}>") };
    debug_assert!(lo <= addr);
    // SAFETY: the table says that addr..hi is allocated device memory.
    let b = unsafe { std::slice::from_raw_parts(addr as *const u8, (hi - addr) as usize) };
    String::from_utf8_lossy(&b[..b.iter().position(|&x| x == 0).unwrap_or(b.len())]).into_owned()
}

/// `__assertfail(message, file, line, function, char size)`: offsets of the arguments in `ext[i.a..]`.
pub fn assert_fail(c: &mut Cx<'_>, i: &Inst) {
    let l = c.mask.trailing_zeros() as usize;
    let arg = |c: &Cx<'_>, k: usize| local64(c, l, c.ext(i.a, 5)[k]);
    let (m, f, line, func) =
        (text(c, arg(c, 0)), text(c, arg(c, 1)), arg(c, 2) as u32, text(c, arg(c, 3)));
    c.fail(ASSERT, l as u32, i.line, format!("{f}:{line}: {func}: assertion `{m}` failed"));
}

/// `vprintf(format, arguments)`.
pub fn printf(c: &mut Cx<'_>, i: &Inst) {
    for l in bits(c.mask) {
        let (fmt, mut args) =
            (text(c, local64(c, l, c.ext(i.a, 2)[0])), local64(c, l, c.ext(i.a, 2)[1]));
        let mut out = String::new();
        let mut parts = fmt.split('%');
        out.push_str(parts.next().unwrap_or(""));
        while let Some(p) = parts.next() {
            let Some(e) = p.find(|ch: char| ch.is_ascii_alphabetic() && !"hlzjt".contains(ch))
            else {
                out.push('%');
                out.push_str(parts.next().unwrap_or(""));
                continue;
            };
            let kind = p.as_bytes()[e];
            let wide = p[..e].contains(['l', 'z', 'j']) || b"fFeEgGaAspP".contains(&kind);
            args = if wide { args.next_multiple_of(8) } else { args };
            // the argument block lies in local memory
            let raw = local64(c, l, (args & 0xffff_ffff) as u32);
            args += if wide { 8 } else { 4 };
            let v = if wide { raw } else { u64::from(raw as u32) };
            out += &match kind {
                b'd' | b'i' => {
                    if wide {
                        (v as i64).to_string()
                    } else {
                        (v as u32 as i32).to_string()
                    }
                }
                b'x' | b'X' => format!("{v:x}"),
                b'p' => format!("{v:#x}"),
                b's' => text(c, v),
                b'c' => (v as u8 as char).to_string(),
                b'u' => v.to_string(),
                _ => f64::from_bits(v).to_string(),
            };
            out.push_str(&p[e + 1..]);
        }
        print!("{out}");
    }
}

/// A call of a function that is not there.
pub fn missing(c: &mut Cx<'_>, i: &Inst) {
    c.fail(
        ILLEGAL_ADDRESS,
        c.mask.trailing_zeros(),
        i.line,
        "call of an undefined function".into(),
    );
}

pub fn trap(c: &mut Cx<'_>, i: &Inst) {
    c.fail(ILLEGAL_ADDRESS, c.mask.trailing_zeros(), i.line, "trap".into());
}
