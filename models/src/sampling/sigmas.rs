//! The schedules: which sigmas a run goes through. One row each, with its names and its function;
//! the model's own sigmas are those of its timesteps, and have no function here.

use std::fmt;
use std::str::FromStr;

use statrs::function::beta::inv_beta_reg;

use super::spelling::spelt;

/// A schedule: the spacing of the noise levels of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SigmaSchedule {
    /// The sigmas of the timesteps, spaced as the model's scheduler configuration has it.
    Model,
    /// Karras et al. 2022, equation 5.
    Karras,
    /// Evenly spaced logarithms.
    Exponential,
    /// Logarithms along a power of the steps, which is 1: k-diffusion's.
    Polyexponential,
    /// Timesteps evenly spaced from the last on: diffusers' trailing.
    SgmUniform,
    /// Every so-many-th sigma of the training, from the last on.
    Simple,
    /// Timesteps evenly spaced from the last to the first.
    Normal,
    /// Every so-many-th sigma of the training, from the second on.
    DdimUniform,
    /// Quantiles of the beta distribution (Lee et al. 2024).
    Beta,
    /// Evenly spaced arcus tangents (Sabour et al. 2024, appendix).
    KlOptimal,
    /// Sabour et al. 2024, "Align Your Steps".
    AlignYourSteps,
}

/// Where the sigmas of a schedule come from. `n` is the number of steps.
#[derive(Clone, Copy)]
pub(super) enum Levels {
    /// The timesteps, in the model's own spacing.
    Timesteps,
    /// The timesteps, in trailing spacing.
    Trailing,
    /// Between the largest and the smallest sigma, as in diffusers: the sampler's class decides
    /// what these are, how timesteps are rounded, and where the run ends.
    Between(fn(max: f64, min: f64, n: usize) -> Vec<f64>),
    /// From the ascending sigmas of the training, as in k-diffusion: timesteps may be fractions.
    /// The last sigma is the end of the run.
    Training(fn(table: &[f64], n: usize) -> Vec<f64>),
}

/// What is particular to one schedule.
struct Row {
    schedule: SigmaSchedule,
    /// The name in requests, and as the ending of a sampler's name: `dpmpp_2m_karras`.
    name: &'static str,
    /// AUTOMATIC1111's name.
    a1111_name: &'static str,
    /// AUTOMATIC1111's label, also the ending of its older samplers' labels: "DPM++ 2M Karras".
    title: &'static str,
    /// Other names.
    aliases: &'static [&'static str],
    levels: Levels,
}

/// In the order of the documentation.
static SCHEDULES: [Row; 11] = [
    Row {
        schedule: SigmaSchedule::Model,
        name: "model",
        a1111_name: "uniform",
        title: "Uniform",
        aliases: &[],
        levels: Levels::Timesteps,
    },
    row(SigmaSchedule::Karras, ["karras", "Karras"], Levels::Between(karras)),
    row(SigmaSchedule::Exponential, ["exponential", "Exponential"], Levels::Between(exponential)),
    row(
        SigmaSchedule::Polyexponential,
        ["polyexponential", "Polyexponential"],
        Levels::Training(|table, n| ended(exponential(table[table.len() - 1], table[0], n))),
    ),
    Row {
        aliases: &["SGMUniform", "trailing"],
        ..row(SigmaSchedule::SgmUniform, ["sgm_uniform", "SGM Uniform"], Levels::Trailing)
    },
    row(SigmaSchedule::Simple, ["simple", "Simple"], Levels::Training(simple)),
    row(SigmaSchedule::Normal, ["normal", "Normal"], Levels::Training(normal)),
    Row {
        a1111_name: "ddim",
        aliases: &["ddim"],
        ..row(SigmaSchedule::DdimUniform, ["ddim_uniform", "DDIM"], Levels::Training(ddim_uniform))
    },
    row(SigmaSchedule::Beta, ["beta", "Beta"], Levels::Between(beta)),
    row(SigmaSchedule::KlOptimal, ["kl_optimal", "KL Optimal"], Levels::Training(kl_optimal)),
    row(
        SigmaSchedule::AlignYourSteps,
        ["align_your_steps", "Align Your Steps"],
        Levels::Training(|_, n| align_your_steps(&OF_SD, n)),
    ),
];

const fn row(schedule: SigmaSchedule, names: [&'static str; 2], levels: Levels) -> Row {
    let [name, title] = names;
    Row { schedule, name, a1111_name: name, title, aliases: &[], levels }
}

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

    /// All names in requests, separated by commas.
    pub fn list() -> String {
        Self::all().map(Self::name).collect::<Vec<_>>().join(", ")
    }

    /// Where the sigmas come from, of a model that is Stable Diffusion XL or not.
    pub(super) fn levels(self, is_xl: bool) -> Levels {
        match self {
            Self::AlignYourSteps if is_xl => Levels::Training(|_, n| align_your_steps(&OF_XL, n)),
            _ => self.row().levels,
        }
    }

    /// The number of steps that a run of `n` steps takes on it.
    pub fn steps(self, n: usize) -> usize {
        const TRAINING: usize = 1000;
        match self {
            Self::DdimUniform => (TRAINING - 1).div_ceil(ddim_stride(TRAINING, n.max(1))),
            _ => n,
        }
    }
}

impl fmt::Display for SigmaSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SigmaSchedule {
    type Err = String;

    /// The name in requests, or AUTOMATIC1111's name or label, in any case.
    fn from_str(name: &str) -> Result<Self, String> {
        let is = |known: &&str| spelt(known) == spelt(name);
        let matches =
            |row: &&Row| [row.name, row.a1111_name, row.title].iter().chain(row.aliases).any(is);
        let row = SCHEDULES.iter().find(matches);
        row.map(|row| row.schedule)
            .ok_or_else(|| format!("{name:?} is unknown; known are {}", Self::list()))
    }
}

/// The `i`-th of `n` values from `first` to `last`.
fn between(first: f64, last: f64, i: usize, n: usize) -> f64 {
    first + (last - first) * (i as f64 / (n.max(2) - 1) as f64)
}

/// A run to sigma 0.
fn ended(mut sigmas: Vec<f64>) -> Vec<f64> {
    sigmas.push(0.0);
    sigmas
}

/// Karras et al. 2022, equation 5, with rho = 7.
pub(super) fn karras(max: f64, min: f64, n: usize) -> Vec<f64> {
    let (max, min) = (max.powf(1.0 / 7.0), min.powf(1.0 / 7.0));
    (0..n).map(|i| between(max, min, i, n).powi(7)).collect()
}

fn exponential(max: f64, min: f64, n: usize) -> Vec<f64> {
    (0..n).map(|i| between(max.ln(), min.ln(), i, n).exp()).collect()
}

/// Lee et al. 2024, "Beta Sampling is All You Need", with alpha = beta = 0.6.
fn beta(max: f64, min: f64, n: usize) -> Vec<f64> {
    let quantile = |p: f64| match p {
        p if p <= 0.0 => 0.0,
        p if p >= 1.0 => 1.0,
        p => inv_beta_reg(0.6, 0.6, p),
    };
    (0..n).map(|i| min + quantile(between(1.0, 0.0, i, n)) * (max - min)).collect()
}

/// ComfyUI's `simple_scheduler`.
fn simple(table: &[f64], n: usize) -> Vec<f64> {
    let stride = table.len() as f64 / n as f64;
    let sigma = |i: usize| table[table.len() - 1 - (i as f64 * stride) as usize];
    ended((0..n).map(sigma).collect())
}

/// ComfyUI's `normal_scheduler`.
fn normal(table: &[f64], n: usize) -> Vec<f64> {
    let last = (table.len() - 1) as f64;
    let sigma = |i: usize| {
        let timestep = between(last, 0.0, i, n);
        let low = (timestep as usize).min(table.len().saturating_sub(2));
        let high = (low + 1).min(table.len() - 1);
        let (from, to) = (table[low].ln(), table[high].ln());
        (from + (to - from) * (timestep - low as f64)).exp()
    };
    ended((0..n).map(sigma).collect())
}

/// ComfyUI's `ddim_scheduler`: the number of steps is rounded up to a whole stride.
fn ddim_uniform(table: &[f64], n: usize) -> Vec<f64> {
    let stride = ddim_stride(table.len(), n);
    let ascending: Vec<f64> = table.iter().skip(1).step_by(stride).copied().collect();
    ended(ascending.into_iter().rev().collect())
}

fn ddim_stride(train: usize, n: usize) -> usize {
    (train / n).max(1)
}

/// AUTOMATIC1111's `kl_optimal`, which ends at the smallest sigma.
fn kl_optimal(table: &[f64], n: usize) -> Vec<f64> {
    let (max, min) = (table[table.len() - 1].atan(), table[0].atan());
    (0..=n).map(|i| between(max, min, i, n + 1).tan()).collect()
}

/// The ten steps of Sabour et al. 2024 for Stable Diffusion 1.5, and for XL.
const OF_SD: [f64; 11] =
    [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029];
const OF_XL: [f64; 11] =
    [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029];

/// As many steps as asked, interpolated in logarithms.
fn align_your_steps(sigmas: &[f64; 11], n: usize) -> Vec<f64> {
    let logarithms = sigmas.map(f64::ln);
    let sigma =
        |i: usize| interpolate(&logarithms, between(0.0, (sigmas.len() - 1) as f64, i, n)).exp();
    ended((0..n).map(sigma).collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_schedule_finds_it() {
        for schedule in SigmaSchedule::all() {
            for name in [schedule.name(), schedule.a1111_name(), schedule.title()] {
                assert_eq!(name.to_uppercase().parse(), Ok(schedule));
            }
        }
        assert_eq!("SGMUniform".parse(), Ok(SigmaSchedule::SgmUniform));
        assert!("turbo".parse::<SigmaSchedule>().unwrap_err().contains("align_your_steps"));
    }

    #[test]
    fn the_steps_of_each_family_are_its_own() {
        let sigmas = |is_xl, n| match SigmaSchedule::AlignYourSteps.levels(is_xl) {
            Levels::Training(levels) => levels(&[], n),
            _ => panic!("no sigmas of the training"),
        };
        for (is_xl, published, third_of_five) in [(false, OF_SD, 1.396), (true, OF_XL, 0.862)] {
            let eleven = sigmas(is_xl, 11);
            let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-9;
            assert!(eleven.iter().zip(published.iter().chain(&[0.0])).all(near), "{eleven:?}");
            assert_eq!(eleven.len(), 12);
            assert!(near((&sigmas(is_xl, 5)[2], &(third_of_five))), "{is_xl}");
        }
        // numpy.interp of the logarithms at 2.5, which is between the third and the fourth.
        assert!((sigmas(true, 5)[1] - (3.771_f64 * 2.181).sqrt()).abs() < 1e-9);
    }
}
