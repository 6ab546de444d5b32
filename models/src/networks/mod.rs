//! The networks of Stable Diffusion, each in one file beside its reference, and their
//! configurations.

mod clip;
mod config;
mod controlnet;
mod image_encoder;
mod ip_adapter;
mod pixels;
mod resampler;
mod resnet;
mod rrdb;
mod safety;
mod srvgg;
mod text_encoder;
mod unet;
mod upscaler;
mod vae;
mod vae_tiles;
mod vision;

pub(crate) use self::config::CrossAttentionPlace;
pub use self::config::{
    AddedConfig, ClipConfig, ClipTextConfig, ControlNetConfig, MidBlock, UNetConfig, UNetPart,
    VaeConfig,
};
pub use self::controlnet::{ControlBatch, ControlNetModel};
pub use self::image_encoder::{EncoderFolder, ImageEncoder};
pub use self::ip_adapter::IpAdapterModel;
pub use self::safety::{SafetyChecker, SafetyResult};
pub use self::text_encoder::{ClipTextModel, PooledStates, PooledToken};
pub use self::unet::{Conditioning, Residuals, UNet2DConditionModel};
pub use self::upscaler::UpscalerNetwork;
pub use self::vae::{Decoder, Encoder};
pub(crate) use self::vae_tiles::{OVERLAP, Part, Tiled, tiles};
