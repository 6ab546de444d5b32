//! Additions with the carry flag.
use super::super::exec::{Cx, Lane};
use super::super::ir::{Exec, Inst, P_CARRY};

/// Sum with the carry flag; `put` and `take` say whether it is written and read.
macro_rules! carry {
    ($t:ty, $wide:ty, $take:expr, $put:expr, |$c:ident, $i:ident, $l:ident| $lhs:expr, $rhs:expr, $sub:expr) => {
        exec!($c, $i => {
            let cin = if $take { $c.pred(P_CARRY) } else { 0 };
            let (mut out, mut flags) = ([0 as $t; 32], 0u32);
            for $l in 0..32usize {
                let (x, y, k): ($t, $t, $t) = ($lhs, $rhs, (cin >> $l & 1) as $t);
                let s = if $sub {
                    (x as $wide).wrapping_sub(y as $wide).wrapping_sub(k as $wide)
                } else {
                    x as $wide + y as $wide + k as $wide
                };
                out[$l] = s as $t;
                flags |= u32::from(s >> <$t>::BITS != 0) << $l;
            }
            $c.put($i.d, &out);
            if $put {
                $c.put_pred(P_CARRY, flags);
            }
        })
    };
}
macro_rules! carry_modes {
    ($take:expr, $put:expr, $t:ty, $w:ty, |$c:ident, $i:ident, $l:ident| $lhs:expr, $rhs:expr, $sub:expr) => {
        match ($take, $put) {
            (true, true) => carry!($t, $w, true, true, |$c, $i, $l| $lhs, $rhs, $sub),
            (true, false) => carry!($t, $w, true, false, |$c, $i, $l| $lhs, $rhs, $sub),
            _ => carry!($t, $w, false, true, |$c, $i, $l| $lhs, $rhs, $sub),
        }
    };
}

pub(super) fn carry_op(base: &str, mods: &[&str], ty: &str) -> Option<(Exec, usize)> {
    let (take, put) = (base.ends_with('c'), mods.contains(&"cc"));
    macro_rules! both {
        (|$c:ident, $i:ident, $l:ident| $lhs:expr, $rhs:expr, $sub:expr) => {
            match ty {
                "u32" | "s32" => carry_modes!(
                    take,
                    put,
                    u32,
                    u64,
                    |$c, $i, $l| $lhs(&*$c, $i, $l),
                    $rhs(&*$c, $i, $l),
                    $sub
                ),
                "u64" | "s64" => carry_modes!(
                    take,
                    put,
                    u64,
                    u128,
                    |$c, $i, $l| $lhs(&*$c, $i, $l),
                    $rhs(&*$c, $i, $l),
                    $sub
                ),
                _ => return None,
            }
        };
    }
    fn ra<T: Lane>(c: &Cx<'_>, i: &Inst, l: usize) -> T {
        c.reg::<T>(i.a)[l]
    }
    fn rb<T: Lane>(c: &Cx<'_>, i: &Inst, l: usize) -> T {
        c.reg::<T>(i.b)[l]
    }
    fn rc<T: Lane>(c: &Cx<'_>, i: &Inst, l: usize) -> T {
        c.reg::<T>(i.c)[l]
    }
    trait Mul: Lane {
        fn lo(a: Self, b: Self) -> Self;
        fn hi(a: Self, b: Self) -> Self;
    }
    impl Mul for u32 {
        fn lo(a: u32, b: u32) -> u32 {
            a.wrapping_mul(b)
        }
        fn hi(a: u32, b: u32) -> u32 {
            (u64::from(a) * u64::from(b) >> 32) as u32
        }
    }
    impl Mul for u64 {
        fn lo(a: u64, b: u64) -> u64 {
            a.wrapping_mul(b)
        }
        fn hi(a: u64, b: u64) -> u64 {
            (u128::from(a) * u128::from(b) >> 64) as u64
        }
    }
    fn lo<T: Mul>(c: &Cx<'_>, i: &Inst, l: usize) -> T {
        T::lo(ra(c, i, l), rb(c, i, l))
    }
    fn hi<T: Mul>(c: &Cx<'_>, i: &Inst, l: usize) -> T {
        T::hi(ra(c, i, l), rb(c, i, l))
    }
    let signed_hi = mods.contains(&"hi") && ty.starts_with('s');
    Some(match base {
        _ if signed_hi => return None,
        "add" | "addc" => (both!(|c, i, l| ra, rb, false), 2),
        "sub" | "subc" => (both!(|c, i, l| ra, rb, true), 2),
        "mad" | "madc" if mods.contains(&"lo") => (both!(|c, i, l| lo, rc, false), 3),
        "mad" | "madc" if mods.contains(&"hi") => (both!(|c, i, l| hi, rc, false), 3),
        _ => return None,
    })
}
