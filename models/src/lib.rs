//! Stable Diffusion 1.x, 2.x and XL, from the files of a model to the pixels of an image.
//!
//! A [`Spec`] goes into [`Pipeline::begin`], which encodes the prompt ([`text`],
//! [`networks::ClipTextModel`]) and draws the noise ([`sampling::Noise`]), for image-to-image on
//! the latents of an input image. [`Pipeline::step`] takes the [`Trajectory`] that `begin` returns
//! from step to step: the UNet ([`networks::UNet2DConditionModel`]) for many trajectories at once,
//! then each one's sampler ([`sampling::SamplerState`]). [`Pipeline::decode`] runs the VAE
//! ([`networks::Decoder`]), and [`Pipeline::check_safety`] the safety checker
//! ([`networks::SafetyChecker`]) of models that have one.
//!
//! Nothing in this crate depends on the server: no runtime, no environment, no clock.

mod error;
pub mod files;
mod layers;
pub mod networks;
mod ops;
mod picture;
pub mod pipeline;
pub mod sampling;
pub mod text;

pub use error::{Error, Result};
pub use files::{AssetDir, AssetFile, Checkpoint, FileVersion, Source};
pub use layers::LoraStack;
pub use networks::UNetPart;
pub use ops::{
    KernelStats, cpu_isa, cuda_uuids, keep_freed_memory, return_freed_memory, return_host_memory,
};
pub use picture::{CANNY, Interpolation, Preprocessor, Rgb, Size, THRESHOLD, otsu};
pub use pipeline::{
    AddOns, BlockScale, Chosen, Control, ControlMode, ControlNets, ControlPasses, ControlRule,
    Defaults, DeviceName, Enlarge, Enlargement, Extension, FreeBytes, Hires, Img2Img, IpAdapter,
    IpAdapters, IpScale, LatentUpscaler, LoadOptions, MAX_CONTROL_SCALE, MAX_IP_SCALE,
    MAX_NOISE_SCALE, MAX_STEPS, MaskedStart, MemoryEstimate, ModelInfo, NamedFiles, Pass,
    PassLoras, PictureUpscaler, Pipeline, PipelineParts, Precision, PromptSyntax, REAL_ESRGAN,
    Refiner, SafetyMode, SingleFiles, Spec, TILE_WORK, Trajectory, Upscaler, Variation, XlOptions,
    check_pipeline, parameters,
};
pub use sampling::{Churn, Sampler, SamplerName, SamplerOptions, SigmaSchedule, Span};
pub use text::{Embeddings, LoraUse, Loras, PlaceholderToken, PromptRole, unread};
