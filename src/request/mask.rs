//! The options of a mask that diffusers has not: AUTOMATIC1111's, with its arithmetic.

use std::str::FromStr;

use sd_models::MaskedStart;

use super::draw::DrawRequest;
use super::error::ValidationError;
use super::images::MaskArea;
use crate::image::InpaintOptions;

/// What the masked area begins as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum MaskedContent {
    #[default]
    Original,
    /// The colours around it.
    Fill,
    Noise,
    Nothing,
}

impl FromStr for MaskedContent {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name.trim().to_ascii_lowercase().as_str() {
            "original" => Ok(Self::Original),
            "fill" => Ok(Self::Fill),
            "noise" | "latent noise" => Ok(Self::Noise),
            "nothing" | "latent nothing" => Ok(Self::Nothing),
            _ => Err(format!("{name:?} is unknown; known are original, fill, noise, nothing")),
        }
    }
}

impl DrawRequest {
    /// Does what the options of the mask ask for; those that change nothing ask for nothing. With
    /// another than `mask_invert`, the result keeps what is not masked.
    pub(super) fn read_mask_options(&mut self) -> Result<(), ValidationError> {
        let content = self.choice::<MaskedContent>("mask_fill", self.mask_fill.as_ref())?;
        let (content, padding) = (content.unwrap_or_default(), self.mask_padding);
        let blur = self.mask_blur.unwrap_or(0.0);
        let is_inverted = self.mask_invert.unwrap_or(false);
        let fill = content != MaskedContent::Original;
        let asked = [
            ("mask_blur", blur > 0.0),
            ("mask_padding", padding.is_some()),
            ("mask_fill", fill),
            ("mask_invert", is_inverted),
        ];
        if self.mask.is_none() {
            self.reject_without::<(), _>("mask", asked)?;
            return Ok(());
        }
        let Some((first, _)) = asked.into_iter().find(|(_, asked)| *asked) else { return Ok(()) };
        if matches!(self.mask_area, MaskArea::Transparent) {
            let reason = "is for a mask whose white areas are inpainted: mask_image";
            return Err(self.range(first, reason));
        }
        if is_inverted {
            self.mask_area = MaskArea::Black;
        }
        self.masked_start = match content {
            MaskedContent::Noise => MaskedStart::Noise,
            MaskedContent::Nothing => MaskedStart::Zero,
            MaskedContent::Original | MaskedContent::Fill => MaskedStart::Picture,
        };
        if blur > 0.0 || padding.is_some() || fill {
            // What is not masked has the size of the base pass.
            if self.hires_width.or(self.hires_height).is_some() {
                return Err(self.range(first, "is not supported with a hires pass"));
            }
            self.inpaint = Some(InpaintOptions { blur, only_masked: padding, fill });
        }
        Ok(())
    }
}
