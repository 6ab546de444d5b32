//! Gaussian noise, number for number as `torch.Generator("cpu")` draws it. The only file that
//! draws random numbers, and not one of tensors: it returns plain values.
//!
//! Sources, all in ATen: `core/MT19937RNGEngine.h` (the generator),
//! `native/cpu/DistributionTemplates.h` `normal_fill` (16 values and more) and
//! `core/DistributionsHelper.h` `normal_distribution` (fewer than 16).

use std::f64::consts::TAU;

/// Words of the state (Matsumoto and Nishimura 1998, table II).
const N: usize = 624;
/// Offset of the word that is combined with each word of the state.
const M: usize = 397;
/// Draws of fewer values take the serial path; others are made in blocks of this size.
const BLOCK: usize = 16;

/// The stream of one image: `torch.Generator("cpu").manual_seed(seed)`.
#[derive(Debug, Clone)]
pub struct Noise {
    seed: u64,
    state: [u32; N],
    /// Index of the next word; `N` when the state must be renewed first.
    next: usize,
    /// The second value of the last serial pair; draws in blocks do not touch it.
    spare: Option<f64>,
}

impl Noise {
    /// The stream of a seed. The engine is seeded with its lower 32 bits, as in torch.
    pub fn new(seed: u64) -> Self {
        let mut state = [0; N];
        state[0] = (seed & 0xffff_ffff) as u32;
        for j in 1..N {
            let word: u32 = state[j - 1] ^ (state[j - 1] >> 30);
            state[j] = word.wrapping_mul(1_812_433_253).wrapping_add(j as u32);
        }
        Self { seed, state, next: N, spare: None }
    }

    /// The stream of another seed, whose Brownian motion is that of this one's: AUTOMATIC1111's
    /// `eta_noise_seed_delta`.
    pub fn moved(&self, by: i64) -> Self {
        Self { seed: self.seed, ..Self::new(self.seed.wrapping_add_signed(by)) }
    }

    /// The seed of the stream.
    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// The next `n` standard normal values: `torch.randn(n, generator=...)` in f32.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        if n < BLOCK {
            return (0..n).map(|_| self.serial() as f32).collect();
        }
        let mut values: Vec<f32> = (0..n).map(|_| self.uniform()).collect();
        values.chunks_exact_mut(BLOCK).for_each(box_muller);
        if !n.is_multiple_of(BLOCK) {
            // The last block is drawn again and overlaps the one before.
            let last = &mut values[n - BLOCK..];
            last.iter_mut().for_each(|value| *value = self.uniform());
            box_muller(last);
        }
        values
    }

    /// One value by the transform in double precision, which makes two and keeps one.
    fn serial(&mut self) -> f64 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        let (u1, u2) = (self.uniform_double(), self.uniform_double());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let (sin, cos) = (TAU * u1).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.word() & 0x00ff_ffff) as f32 / 16_777_216.0
    }

    /// Uniform in [0, 1) with 53 bits; the first word is the upper half.
    fn uniform_double(&mut self) -> f64 {
        let word = u64::from(self.word()) << 32 | u64::from(self.word());
        (word & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
    }

    /// The next tempered word of the Mersenne twister.
    fn word(&mut self) -> u32 {
        if self.next == N {
            self.renew();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn renew(&mut self) {
        for i in 0..N {
            let joined = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twist = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (joined >> 1) ^ twist;
        }
        self.next = 0;
    }
}

/// Sixteen uniforms to sixteen normals in place: the first eight are radii, the others angles.
fn box_muller(block: &mut [f32]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = (-2.0 * (1.0 - *a).ln()).sqrt();
        let (sin, cos) = (TAU as f32 * *b).sin_cos();
        (*a, *b) = (radius * cos, radius * sin);
    }
}
