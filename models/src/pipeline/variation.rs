//! Variations of an image: its first noise mixed with that of a second seed.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/rng.py`, `slerp` and `ImageRNG.first`.

use crate::sampling::Noise;

/// A second seed, and its share of the first noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Variation {
    /// Seed of the second noise.
    pub seed: u64,
    /// 0 is the noise of the first seed, 1 that of the second.
    pub strength: f64,
}

impl Variation {
    /// Mixes the noise (C, h, w) of the first seed by spherical linear interpolation. As in the
    /// reference, the vectors are the columns of each channel.
    pub(super) fn mix(self, noise: &mut [f32], (h, w): (usize, usize)) {
        let second = Noise::new(self.seed).normal(noise.len());
        for (low, high) in noise.chunks_exact_mut(h * w).zip(second.chunks_exact(h * w)) {
            for x in 0..w {
                let column = |plane: &[f32]| -> Vec<f64> {
                    plane.iter().skip(x).step_by(w).map(|value| f64::from(*value)).collect()
                };
                let (a, b) = (column(low), column(high));
                let (first, second) = self.shares(&a, &b);
                for (y, (a, b)) in a.iter().zip(&b).enumerate() {
                    low[y * w + x] = (first * a + second * b) as f32;
                }
            }
        }
    }

    /// The factors of two vectors.
    fn shares(self, a: &[f64], b: &[f64]) -> (f64, f64) {
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        let angle = cosine.clamp(-1.0, 1.0).acos();
        let sine = angle.sin();
        // Of parallel vectors, such as columns of one pixel, the limit.
        if sine < 1e-6 {
            return (1.0 - self.strength, self.strength);
        }
        let share = |part: f64| (part * angle).sin() / sine;
        (share(1.0 - self.strength), share(self.strength))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixed(strength: f64, (h, w): (usize, usize)) -> Vec<f32> {
        let mut noise = Noise::new(1).normal(4 * h * w);
        Variation { seed: 2, strength }.mix(&mut noise, (h, w));
        noise
    }

    #[test]
    fn the_ends_are_the_two_noises() {
        for size in [(6, 8), (1, 8)] {
            let of = |seed| Noise::new(seed).normal(4 * size.0 * size.1);
            assert_eq!(mixed(0.0, size), of(1));
            assert_eq!(mixed(1.0, size), of(2));
            let middle = mixed(0.5, size);
            assert!(middle.iter().all(|value| value.is_finite()) && middle != of(1));
        }
    }

    #[test]
    fn a_mixture_is_still_noise_of_unit_variance() {
        let middle = mixed(0.5, (64, 64));
        let variance = middle.iter().map(|x| x * x).sum::<f32>() / middle.len() as f32;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
    }
}
