//! One loop, compiled three times. [`vectorized!`] turns a plain function over slices into a
//! dispatcher that runs the copy built for AVX-512, for AVX2 or for the baseline of the target,
//! whichever the processor has. The loops hold no intrinsics: the compiler vectorises them.

/// Instruction sets for which there is a copy of every loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best one of this processor.
    pub(crate) fn detect() -> Self {
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
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512($($arg: $ty),*) { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) { body($($arg),*) }
            match $crate::ops::simd::Isa::detect() {
                // SAFETY: detect() has just found these instructions on this processor.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                $crate::ops::simd::Isa::Portable => body($($arg),*),
            }
        }
    };
}
pub(crate) use vectorized;

/// e^x to about two units in the last place for x in [-87, 88], flat outside (Cephes `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5.000_000_3e-1;
    let y = p * r * r + r + 1.0;
    // The integer stands in the low bits of `rounded`; moved up it is the exponent of 2^n.
    y * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

/// The error function to a few units in the last place (the rational approximation of Eigen).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let p = -2.726_142_3e-10;
    let p = p * s + 2.770_681_4e-8;
    let p = p * s - 2.101_024e-6;
    let p = p * s - 5.692_506_4e-5;
    let p = p * s - 7.349_906_3e-4;
    let p = p * s - 2.954_6e-3;
    let p = p * s - 1.609_603_3e-2;
    let q = -1.456_607_2e-5;
    let q = q * s - 2.133_740_6e-4;
    let q = q * s - 1.682_827e-3;
    let q = q * s - 7.373_329e-3;
    let q = q * s - 1.426_473_9e-2;
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_erf_are_close() {
        for i in -8600..8700 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 4e-7, "exp({x}) = {got}, not {want}");
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
            let got = f64::from(erf(x as f32));
            assert!((got - want).abs() < 3e-7, "erf({x}) = {got}, not {want}");
        }
    }
}
