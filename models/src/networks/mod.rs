//! The networks of Stable Diffusion, each in one file beside its reference, and their configurations.

mod config;
mod resnet;
mod safety;
mod text_encoder;
mod unet;
mod vae;

pub use self::config::{ClipTextConfig, UNetConfig, VaeConfig};
pub use self::safety::{SafetyChecker, SafetyResult};
pub use self::text_encoder::ClipTextModel;
pub use self::unet::UNet2DConditionModel;
pub use self::vae::{Decoder, Encoder};
