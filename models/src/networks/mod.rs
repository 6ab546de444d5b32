//! The networks of Stable Diffusion, each in one file beside its reference, and their
//! configurations.

mod clip;
mod config;
mod controlnet;
mod pixels;
mod resnet;
mod rrdb;
mod safety;
mod srvgg;
mod text_encoder;
mod unet;
mod upscaler;
mod vae;

pub use self::config::{
    AddedConfig, ClipConfig, ClipTextConfig, ControlNetConfig, MidBlock, UNetConfig, VaeConfig,
};
pub use self::controlnet::{ControlBatch, ControlNetModel};
pub use self::safety::{SafetyChecker, SafetyResult};
pub use self::text_encoder::{ClipTextModel, PooledStates, PooledToken};
pub(crate) use self::unet::SIZES;
pub use self::unet::{Conditioning, Residuals, UNet2DConditionModel};
pub use self::upscaler::UpscalerNetwork;
pub use self::vae::{Decoder, Encoder};
