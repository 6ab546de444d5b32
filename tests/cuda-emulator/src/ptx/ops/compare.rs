//! Comparisons into a predicate.
use super::super::exec::Cx;
use super::super::ir::{Exec, Inst};
use super::super::math::{BF16, F16};
use super::half::half_cmp;

/// Comparison `cmp` of `ty` into a predicate.
#[allow(clippy::neg_cmp_op_on_partial_ord, clippy::double_comparisons)] // the unordered comparisons
pub fn compare(cmp: &str, ty: &str) -> Option<Exec> {
    macro_rules! cmp {
        ($t:ty, $e:expr) => {
            exec!(c, i => c.compare::<$t>(i, $e))
        };
    }
    macro_rules! float {
        ($m:ident) => {
            match cmp {
                "eq" => $m!(|a, b| a == b),
                "ne" => $m!(|a, b| a < b || a > b),
                "lt" => $m!(|a, b| a < b),
                "le" => $m!(|a, b| a <= b),
                "gt" => $m!(|a, b| a > b),
                "ge" => $m!(|a, b| a >= b),
                "equ" => $m!(|a, b| !(a < b || a > b)),
                "neu" => $m!(|a, b| a != b),
                "ltu" => $m!(|a, b| !(a >= b)),
                "leu" => $m!(|a, b| !(a > b)),
                "gtu" => $m!(|a, b| !(a <= b)),
                "geu" => $m!(|a, b| !(a < b)),
                "num" => $m!(|a, b| !a.is_nan() && !b.is_nan()),
                "nan" => $m!(|a, b| a.is_nan() || b.is_nan()),
                _ => return None,
            }
        };
    }
    macro_rules! f32s {
        ($e:expr) => {
            cmp!(f32, $e)
        };
    }
    macro_rules! f64s {
        ($e:expr) => {
            cmp!(f64, $e)
        };
    }
    macro_rules! f16s {
        ($e:expr) => {
            exec!(c, i => half_cmp::<F16>(c, i, $e))
        };
    }
    macro_rules! bf16s {
        ($e:expr) => {
            exec!(c, i => half_cmp::<BF16>(c, i, $e))
        };
    }
    Some(match (ty, cmp) {
        ("f32", _) => float!(f32s),
        ("f64", _) => float!(f64s),
        ("f16", _) => float!(f16s),
        ("bf16", _) => float!(bf16s),
        (_, "eq") => width!(ty, cmp, |a, b| a == b),
        (_, "ne") => width!(ty, cmp, |a, b| a != b),
        (_, "lo") => width!(ty, cmp, |a, b| a < b),
        (_, "ls") => width!(ty, cmp, |a, b| a <= b),
        (_, "hi") => width!(ty, cmp, |a, b| a > b),
        (_, "hs") => width!(ty, cmp, |a, b| a >= b),
        (_, "lt") => signed!(ty, cmp, |a, b| a < b),
        (_, "le") => signed!(ty, cmp, |a, b| a <= b),
        (_, "gt") => signed!(ty, cmp, |a, b| a > b),
        (_, "ge") => signed!(ty, cmp, |a, b| a >= b),
        _ => return None,
    })
}
