//! One loop, compiled three times. [`vectorized!`] turns a plain function over slices into a
//! dispatcher that runs the copy compiled for AVX-512, for AVX2 or for the baseline of the target,
//! the best that the processor has. The loops hold no intrinsics: the compiler vectorises them. In
//! their bodies `FMA` is whether multiply-add is one instruction.

/// Instruction sets that every loop is compiled for, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best one of this processor; in tests no better than [`tests::ALLOWED`].
    pub(crate) fn detect() -> Self {
        #[cfg(test)]
        return Self::best().max(*tests::ALLOWED);
        #[cfg(not(test))]
        Self::best()
    }

    /// For the log.
    pub(super) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Portable => "SSE2",
            #[cfg(not(target_arch = "x86_64"))]
            Self::Portable => "portable",
        }
    }

    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

macro_rules! vectorized {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn body<const FMA: bool>($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512($($arg: $ty),*) { body::<true>($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) { body::<true>($($arg),*) }
            match $crate::ops::cpu::simd::Isa::detect() {
                // SAFETY: detect() has just found these instructions on this processor.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::cpu::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::cpu::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                $crate::ops::cpu::simd::Isa::Portable => body::<false>($($arg),*),
            }
        }
    };
}
pub(crate) use vectorized;

/// a * b + c, rounded once if `FMA`. (Without the instruction `mul_add` would call libm.)
#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// A polynomial by Horner's rule, the highest coefficient first.
#[inline(always)]
fn horner<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    coefficients[1..].iter().fold(coefficients[0], |p, c| fma::<FMA>(p, x, *c))
}

/// e^x within about 2 ulp for x in [-87, 88], clamped outside (Cephes `expf`).
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = fma::<FMA>(n, 2.121_944_4e-4, fma::<FMA>(n, -0.693_359_4, x));
    let p = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let y = fma::<FMA>(horner::<FMA, 6>(r, p), r * r, r + 1.0);
    // The integer is in the low bits of `rounded`; shifted left it is the exponent of 2^n.
    y * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

/// The error function within a few ulp (Eigen's rational approximation).
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    const P: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const Q: [f32; 5] =
        [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    x * horner::<FMA, 7>(s, P) / horner::<FMA, 5>(s, Q)
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use std::process::Command;
    use std::sync::LazyLock;

    use super::*;

    const VARIABLE: &str = "SD_TEST_ISA";

    /// The best instruction set that the variable allows.
    pub(super) static ALLOWED: LazyLock<Isa> = LazyLock::new(|| {
        let allowed = std::env::var(VARIABLE).unwrap_or_default();
        let named = |isa: &Isa| format!("{isa:?}") == allowed;
        sets().into_iter().find(named).unwrap_or_else(Isa::best)
    });

    /// Those of this processor, the best first.
    pub(in crate::ops) fn sets() -> Vec<Isa> {
        #[cfg(target_arch = "x86_64")]
        let all = [Isa::Avx512, Isa::Avx2, Isa::Portable];
        #[cfg(not(target_arch = "x86_64"))]
        let all = [Isa::Portable];
        all.into_iter().filter(|isa| *isa >= Isa::best()).collect()
    }

    /// As on a processor with a smaller instruction set.
    #[test]
    fn the_kernels_pass_their_tests_with_every_instruction_set() {
        if std::env::var_os(VARIABLE).is_some() {
            return;
        }
        for isa in &sets()[1..] {
            let tests = std::env::current_exe().unwrap();
            let done = Command::new(tests).arg("ops::").env(VARIABLE, format!("{isa:?}")).output();
            let done = done.unwrap();
            assert!(done.status.success(), "{isa:?}: {}", String::from_utf8_lossy(&done.stdout));
        }
    }

    #[test]
    fn exp_and_erf_are_close() {
        for i in -8600..8700 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            for got in [exp::<true>(x), exp::<false>(x)].map(f64::from) {
                assert!((got / want - 1.0).abs() < 4e-7, "exp({x}) = {got}, not {want}");
            }
        }
        // erf(x) = 2/sqrt(pi) * integral of exp(-t^2), here by Simpson's rule in f64.
        for i in -60..=60 {
            let x = f64::from(i) / 10.0;
            let f = |t: f64| (-t * t).exp();
            let h = x / 1000.0;
            let sum: f64 = (0..1000)
                .map(|k| {
                    f(f64::from(k) * h)
                        + 4.0 * f((f64::from(k) + 0.5) * h)
                        + f(f64::from(k + 1) * h)
                })
                .sum();
            let want = sum * h / 6.0 * std::f64::consts::FRAC_2_SQRT_PI;
            for got in [erf::<true>(x as f32), erf::<false>(x as f32)].map(f64::from) {
                assert!((got - want).abs() < 3e-7, "erf({x}) = {got}, not {want}");
            }
        }
    }
}
