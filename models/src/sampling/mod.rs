//! From noise to latents: the noise levels of a run, what a UNet's output means, the samplers, and
//! torch's random numbers. Not the UNet, and not the loop over evaluations, which is the caller's.
//!
//! A sampler is a row in `algorithm.rs` and a function in a file of its family; a sigma schedule is
//! a row and a function in `sigmas.rs`. `plan.rs` makes a run of them:
//!
//! ```text
//! plan > config > algorithm > pndm, ddpm, euler, dpmpp, unipc, lcm > state > denoiser > schedule
//! ```

mod algorithm;
mod betas;
mod config;
mod ddpm;
mod denoiser;
mod dpmpp;
mod euler;
mod lcm;
mod noise;
mod plan;
mod pndm;
mod schedule;
mod sigmas;
mod spacing;
mod state;
mod unipc;

pub use self::algorithm::{Sampler, SamplerName};
pub use self::config::SchedulerConfig;
pub use self::denoiser::{guide, rescale};
pub use self::noise::Noise;
pub use self::schedule::Evaluation;
pub use self::sigmas::SigmaSchedule;
pub use self::state::SamplerState;
