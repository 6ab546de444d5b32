//! Stable Diffusion v1.x and v2.x, from the files of a model to the pixels of a picture.
//!
//! The road: a [`Spec`] goes into [`Pipeline::begin`], which encodes the prompt ([`prompt`],
//! [`tokenizer`], [`text_encoder`]) and draws the noise ([`noise`]), over a picture where there is
//! one to begin with; the [`Trajectory`] that comes out is taken step by step through
//! [`Pipeline::step`] (the [`unet`] for many trajectories at once, then each one's [`denoiser`] and
//! [`sampler`]) and ends in [`Pipeline::decode`] (the [`vae`]), and where the model brings a checker
//! in [`Pipeline::judge`] ([`safety`]).
//!
//! This crate does not know that a server exists: no runtime, no environment, no clock.

mod adapted;
mod checkpoint;
pub mod config;
pub mod demo;
pub mod denoiser;
pub mod device;
mod error;
mod hires;
mod info;
mod lora;
pub mod noise;
mod ops;
mod pickle;
pub mod pipeline;
mod preview;
pub mod prompt;
mod resample;
pub mod safety;
pub mod sampler;
pub mod schedule;
mod shelf;
mod spec;
mod start;
pub mod text_encoder;
mod textual_inversion;
pub mod tokenizer;
pub mod unet;
pub mod vae;
pub mod weights;

pub use adapted::Mix;
pub use device::{DeviceName, Precision, Work};
pub use error::{Error, Result};
pub use info::{Defaults, Memory, ModelInfo};
pub use ops::{instructions, keep_freed_memory, return_freed_memory};
pub use pipeline::{Checking, Extras, LoadOptions, Pipeline, Trajectory};
pub use shelf::Folder;
pub use spec::{
    Hires, Loras, MAX_STEPS, PromptSyntax, Rgb, Scheduler, Size, Spec, Start, Upscaler,
};
pub use textual_inversion::{Learned, LearnedWord};
pub use weights::{Checkpoint, Source, parameters};
