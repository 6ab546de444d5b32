//! How an instruction becomes a function over the 32 lanes of a warp.

macro_rules! exec {
    ($c:ident, $i:ident => $body:expr) => {{
        fn run($c: &mut Cx<'_>, $i: &Inst) {
            $body
        }
        run as Exec
    }};
}
macro_rules! op1 {
    ($a:ty => $r:ty, $e:expr) => {
        exec!(c, i => c.map1::<$a, $r>(i, $e))
    };
}
macro_rules! op2 {
    ($t:ty, $e:expr) => {
        exec!(c, i => c.map2::<$t, $t, $t>(i, $e))
    };
    ($a:ty, $b:ty => $r:ty, $e:expr) => {
        exec!(c, i => c.map2::<$a, $b, $r>(i, $e))
    };
}
macro_rules! op3 {
    ($t:ty, $e:expr) => {
        exec!(c, i => c.map3::<$t, $t, $t, $t>(i, $e))
    };
    ($a:ty, $b:ty, $d:ty => $r:ty, $e:expr) => {
        exec!(c, i => c.map3::<$a, $b, $d, $r>(i, $e))
    };
}
/// Applies macro `$m` to the unsigned type of the width of `$ty`.
macro_rules! width {
    ($ty:expr, $m:ident, $e:expr) => {
        match $ty {
            "u16" | "s16" | "b16" => $m!(u16, $e),
            "u32" | "s32" | "b32" => $m!(u32, $e),
            "u64" | "s64" | "b64" => $m!(u64, $e),
            _ => return None,
        }
    };
}
/// The same, keeping the sign.
macro_rules! signed {
    ($ty:expr, $m:ident, $e:expr) => {
        match $ty {
            "u16" | "b16" => $m!(u16, $e),
            "s16" => $m!(i16, $e),
            "u32" | "b32" => $m!(u32, $e),
            "s32" => $m!(i32, $e),
            "u64" | "b64" => $m!(u64, $e),
            "s64" => $m!(i64, $e),
            _ => return None,
        }
    };
}
macro_rules! un {
    ($t:ty, $e:expr) => {
        op1!($t => $t, $e)
    };
}
macro_rules! div2 {
    ($t:ty, $e:expr) => {
        exec!(c, i => c.lanes2::<$t, $t, $t>(i, $e))
    };
}
macro_rules! shift {
    ($t:ty, $e:expr) => {
        op2!($t, u32 => $t, $e)
    };
}
/// Half-precision operations on one (u16) or two (u32) values a lane, computed in f32.
macro_rules! half_op {
    ($ty:expr, $m:ident, $e:expr) => {
        match $ty {
            "f16" => exec!(c, i => $m::<F16, u16, 32>(c, i, $e)),
            "bf16" => exec!(c, i => $m::<BF16, u16, 32>(c, i, $e)),
            "f16x2" => exec!(c, i => $m::<F16, u32, 64>(c, i, $e)),
            "bf16x2" => exec!(c, i => $m::<BF16, u32, 64>(c, i, $e)),
            _ => return None,
        }
    };
}
