//! From noise to latents: the noise levels of a run, what a UNet's output means, the samplers, and
//! torch's random numbers. Not the UNet, and not the loop over evaluations, which is the caller's.
//!
//! A sampler is a row in `table.rs` and a function in a file of its family; a schedule is a row and
//! a function in `sigmas.rs`. `plan.rs` makes a run of them:
//!
//! ```text
//! rehearsal, takeover > plan > config > names > samplers > table > algorithm
//!     > pndm, ddpm, euler, dpmpp, deis, unipc, lcm > state > ahead, denoiser > schedule
//! ```

mod ahead;
mod algorithm;
mod betas;
mod brownian;
mod class_config;
mod config;
mod ddpm;
mod deis;
mod denoiser;
mod dpmpp;
mod euler;
mod lcm;
mod names;
mod noise;
mod options;
mod plan;
mod pndm;
mod rehearsal;
mod restart;
mod samplers;
mod schedule;
mod sigmas;
mod spacing;
mod spelling;
mod state;
mod table;
mod takeover;
mod unipc;

pub use self::algorithm::Sampler;
pub use self::config::SchedulerConfig;
pub use self::denoiser::{guide, rescale};
pub use self::names::SamplerName;
pub use self::noise::Noise;
pub use self::options::{Churn, SamplerOptions};
pub(crate) use self::plan::share_of;
pub use self::plan::{Run, Span};
pub use self::schedule::Evaluation;
pub use self::sigmas::SigmaSchedule;
pub use self::state::{Outputs, SamplerState};
