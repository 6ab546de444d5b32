//! The sigma schedules: which sigmas a run goes through between its largest and its smallest. One
//! row each; the model's own sigmas are those of its timesteps, and have no function here.

use std::fmt;

/// A sigma schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SigmaSchedule {
    /// The sigmas of the timesteps, spaced as the model's scheduler configuration has it.
    Model,
    /// Karras et al. 2022, equation 5.
    Karras,
}

/// The `n` sigmas from `max` down to `min`.
type Sigmas = fn(max: f64, min: f64, n: usize) -> Vec<f64>;

/// What is particular to one schedule.
struct Row {
    schedule: SigmaSchedule,
    /// The name in requests, and as the ending of a sampler's name: `dpmpp_2m_karras`.
    name: &'static str,
    /// AUTOMATIC1111's name.
    a1111_name: &'static str,
    /// AUTOMATIC1111's label, also the ending of its older samplers' labels: "DPM++ 2M Karras".
    title: &'static str,
    /// None where the sigmas are those of the timesteps.
    sigmas: Option<Sigmas>,
}

const SCHEDULES: [Row; 2] = [
    Row {
        schedule: SigmaSchedule::Model,
        name: "model",
        a1111_name: "uniform",
        title: "Uniform",
        sigmas: None,
    },
    Row {
        schedule: SigmaSchedule::Karras,
        name: "karras",
        a1111_name: "karras",
        title: "Karras",
        sigmas: Some(karras),
    },
];

impl SigmaSchedule {
    /// Every schedule, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        SCHEDULES.iter().map(|row| row.schedule)
    }

    fn row(self) -> &'static Row {
        let row = SCHEDULES.iter().find(|row| row.schedule == self);
        row.expect("every variant has a row; a test walks them")
    }

    /// The name in requests: `karras`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// AUTOMATIC1111's name: `karras`.
    pub fn a1111_name(self) -> &'static str {
        self.row().a1111_name
    }

    /// AUTOMATIC1111's label: `Karras`.
    pub fn title(self) -> &'static str {
        self.row().title
    }

    /// How the sigmas follow from the largest and the smallest; none for those of the timesteps.
    pub(super) fn sigmas(self) -> Option<Sigmas> {
        self.row().sigmas
    }
}

impl fmt::Display for SigmaSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Karras et al. 2022, equation 5, with rho = 7.
fn karras(max: f64, min: f64, n: usize) -> Vec<f64> {
    let (max, min) = (max.powf(1.0 / 7.0), min.powf(1.0 / 7.0));
    let ramp = |i: usize| i as f64 / (n.max(2) - 1) as f64;
    (0..n).map(|i| (max + ramp(i) * (min - max)).powi(7)).collect()
}

/// The sigma of a timestep, from the ascending sigmas of all: `numpy.interp` over 0, 1, 2, ...
pub(super) fn interpolate(table: &[f64], timestep: f64) -> f64 {
    let low = (timestep.max(0.0) as usize).min(table.len() - 1);
    let high = (low + 1).min(table.len() - 1);
    table[low] + (table[high] - table[low]) * (timestep - low as f64).clamp(0.0, 1.0)
}

/// The inverse of [`interpolate`], linear in the logarithms of the sigmas.
pub(super) fn timestep_of(table: &[f64], sigma: f64) -> f64 {
    let log = |sigma: f64| f64::from(sigma.ln() as f32);
    let below = table.iter().filter(|&&s| log(s) <= sigma.ln()).count();
    let low = below.saturating_sub(1).min(table.len().saturating_sub(2));
    let (from, to) = (log(table[low]), log(table[(low + 1).min(table.len() - 1)]));
    low as f64 + ((sigma.ln() - from) / (to - from)).clamp(0.0, 1.0)
}
