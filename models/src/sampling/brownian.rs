//! Noise from one Brownian motion, number for number as torchsde 0.2.6 makes it in
//! `BrownianInterval` with `halfway_tree`, which k-diffusion and diffusers use: the noise of a step
//! and of its first half are correlated, and do not depend on the number of steps.
//!
//! The interval of all sigmas is halved until a half ends at the time in question, to six decimals.
//! Each half's increment is drawn from the seed of its place in the tree, by numpy's
//! `SeedSequence`.

use super::noise::Noise;

/// A Brownian motion over sigma, of `values` values.
pub(super) struct Brownian {
    pub(super) seed: u64,
    /// The smallest and the largest sigma.
    pub(super) least: f64,
    pub(super) most: f64,
    pub(super) values: usize,
}

impl Brownian {
    /// The increment between two sigmas, of unit variance.
    pub(super) fn between(&self, from: f64, to: f64) -> Vec<f32> {
        let scale = 1.0 / (to as f32 - from as f32).abs().sqrt();
        let (begin, end) = (self.until(from.min(to)), self.until(from.max(to)));
        // The motion's time is sigma, which falls in a run.
        let sign = if from > to { -1.0 } else { 1.0 };
        let values = begin.into_iter().zip(end);
        values.map(|(begin, end)| sign * (end - begin) as f32 * scale).collect()
    }

    /// The motion from the smallest sigma to another.
    fn until(&self, sigma: f64) -> Vec<f64> {
        let at = rounded(sigma.clamp(self.least, self.most));
        let (mut start, mut end) = (rounded(self.least), rounded(self.most));
        let mut sum = vec![0.0; self.values];
        let root = (self.most - self.least).sqrt() as f32;
        let mut whole: Vec<f32> =
            self.draw(seed(self.seed, None)).iter().map(|value| value * root).collect();
        let (mut key, mut depth) = (0_u32, 0_u32);
        loop {
            if at >= end {
                add(&mut sum, &whole);
                return sum;
            }
            if at <= start {
                return sum;
            }
            let middle = rounded(0.5 * (end + start));
            let (left, right) = (middle - start, end - middle);
            let reciprocal = 1.0 / (end - start);
            let deviation = (left * right * reciprocal).sqrt() as f32;
            let drawn = self.draw(seed(self.seed, Some([key, depth])));
            let half = whole
                .iter()
                .zip(drawn)
                .map(|(whole, drawn)| left as f32 * whole * reciprocal as f32 + deviation * drawn);
            let half: Vec<f32> = half.collect();
            (key, depth) = (key * 2, depth + 1);
            if at < middle {
                (whole, end) = (half, middle);
            } else {
                add(&mut sum, &half);
                whole.iter_mut().zip(&half).for_each(|(whole, half)| *whole -= half);
                (start, key) = (middle, key + 1);
            }
        }
    }

    fn draw(&self, seed: u32) -> Vec<f32> {
        Noise::new(seed.into()).normal(self.values)
    }
}

fn add(sum: &mut [f64], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(*value));
}

/// Python's `round(x, 6)`.
fn rounded(x: f64) -> f64 {
    format!("{x:.6}").parse().unwrap_or(x)
}

/// The first word of numpy's `SeedSequence(entropy, spawn_key=key, pool_size=24)`.
fn seed(entropy: u64, key: Option<[u32; 2]>) -> u32 {
    const POOL: usize = 24;
    let mut words = vec![entropy as u32];
    if entropy > u64::from(u32::MAX) {
        words.push((entropy >> 32) as u32);
    }
    if let Some(key) = key {
        words.resize(POOL, 0);
        words.extend(key);
    }
    let mut constant = 0x43b0_d7e5_u32;
    let mut hash = |mut value: u32| {
        value ^= constant;
        constant = constant.wrapping_mul(0x931e_8875);
        value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    };
    let mix = |x: u32, y: u32| {
        let mixed = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
        mixed ^ (mixed >> 16)
    };
    let mut pool = [0; POOL];
    for (i, word) in pool.iter_mut().enumerate() {
        *word = hash(words.get(i).copied().unwrap_or(0));
    }
    for from in 0..POOL {
        for to in (0..POOL).filter(|to| *to != from) {
            pool[to] = mix(pool[to], hash(pool[from]));
        }
    }
    for word in words.iter().skip(POOL) {
        for to in &mut pool {
            *to = mix(*to, hash(*word));
        }
    }
    let constant = 0x8b51_f9dd_u32;
    let word = (pool[0] ^ constant).wrapping_mul(constant.wrapping_mul(0x58f3_8ded));
    word ^ (word >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_that_of_torchsde() {
        // numpy's SeedSequence(7, pool_size=24), and with spawn_key=(5, 3).
        assert_eq!(seed(7, None), 1_376_543_887);
        assert_eq!(seed(7, Some([5, 3])), 1_167_487_741);
        // torchsde's BrownianInterval of entropy 7, first two of 16 values.
        let single = f64::from(0.029_167_53_f32);
        let motion = Brownian { seed: 7, least: single, most: 14.614_646_911_621_094, values: 16 };
        let single = |sigma: f32| f64::from(sigma);
        for (from, to, expected) in [
            (single(5.1), single(14.6), [0.296_819_48_f32, -0.060_080_424]),
            (single(5.1), 8.0, [-0.665_097_7, 0.326_204]),
            (single(0.1), single(0.5), [1.137_595_3, -0.268_452_5]),
        ] {
            let root = (to - from).sqrt() as f32;
            for (ours, expected) in motion.between(from, to).into_iter().zip(expected) {
                assert!((ours * root - expected).abs() < 2e-6, "{ours} {expected}");
            }
        }
    }
}
