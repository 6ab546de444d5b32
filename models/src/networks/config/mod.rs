//! The networks' configuration files, field for field under the same names.
//!
//! Unknown keys and unsupported values are errors that name file and key: nothing that could change
//! the image is ignored. Keys that only record how a file was made or trained are listed as such.

mod attentions;
mod clip;
mod controlnet;
mod levels;
mod unet;
mod vae;
mod vision;

pub(crate) use self::attentions::CrossAttentionPlace;
pub use self::attentions::UNetPart;
pub(super) use self::clip::EndToken;
pub use self::clip::{ClipConfig, ClipTextConfig};
pub use self::controlnet::ControlNetConfig;
pub use self::unet::{AddedConfig, MidBlock, UNetConfig};
pub use self::vae::VaeConfig;
pub(super) use self::vision::VisionConfig;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Source;

    #[test]
    fn the_demo_model_is_understood() {
        let unet = UNetConfig::read(&Source::Demo).unwrap();
        assert_eq!(unet.block_out_channels, [64, 128, 192]);
        assert_eq!(unet.down_cross_attention, [true, true, false]);
        assert_eq!(unet.heads, [4, 4, 4]);
        assert_eq!(VaeConfig::read(&Source::Demo).unwrap().scale(), 8);
        assert_eq!(ClipTextConfig::read(&Source::Demo).unwrap().transformer.hidden_size, 128);
    }
}
