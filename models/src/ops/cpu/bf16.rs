//! Conversions between f32 and bf16.

use half::bf16;

use super::simd::vectorized;

vectorized! {
    /// Rounds to the nearest bf16, ties to even.
    pub(super) fn narrow(wide: &[f32], narrow: &mut [bf16]) {
        for (wide, narrow) in wide.iter().zip(narrow) {
            *narrow = bf16::from_bits(rounded(*wide));
        }
    }
}

/// The bits of the nearest bf16, ties to even.
#[inline(always)]
pub(super) fn rounded(wide: f32) -> u16 {
    let bits = wide.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // A NaN stays one.
    let bits = if wide.is_nan() { bits | 1 << 22 } else { rounded };
    (bits >> 16) as u16
}

vectorized! {
    pub(super) fn widen(narrow: &[bf16], wide: &mut [f32]) {
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::random;

    #[test]
    fn numbers_are_narrowed_as_half_does_it() {
        let mut wide = random(4096, 2);
        wide.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, 1e-41]);
        wide.extend([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F80_0001].map(f32::from_bits));
        let mut narrowed = vec![bf16::ZERO; wide.len()];
        narrow(&wide, &mut narrowed);
        for (wide, narrow) in wide.iter().zip(&narrowed) {
            assert_eq!(narrow.to_bits(), bf16::from_f32(*wide).to_bits(), "{wide}");
        }
    }
}
