//! Where the timesteps of a run lie among those of the training. Arithmetic on numbers of steps
//! only; noise levels are in [`super::betas`] and [`super::sigmas`].

/// A spacing by its name in diffusers' `timestep_spacing` (Lin et al. 2024, table 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Spacing {
    Leading,
    Trailing,
    Linspace,
}

impl Spacing {
    /// `n` timesteps of `train`, descending, not rounded. Leading ones are moved up by `offset`.
    pub(super) fn timesteps(self, n: usize, train: usize, offset: u32) -> Vec<f64> {
        let (train, parts) = (train as f64, n as f64);
        // numpy.arange steps by the difference of its first two values.
        let difference = (train - train / parts) - train;
        let at = |i: usize| match self {
            Self::Linspace => (n - 1 - i) as f64 * ((train - 1.0) / (parts - 1.0).max(1.0)),
            Self::Leading => (n - 1 - i) as f64 * (train / parts).floor() + f64::from(offset),
            Self::Trailing => (train + i as f64 * difference).round_ties_even() - 1.0,
        };
        (0..n).map(at).collect()
    }
}
