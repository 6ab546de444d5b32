//! The input image and mask of AUTOMATIC1111's API.

use schemars::JsonSchema;
use sd_models::MaskedStart;
use serde::Deserialize;
use serde_json::Value;

use super::nothing::{is_noop, is_off};
use crate::image::{Fit, InpaintOptions};
use crate::request::{
    DrawRequest, Fields, ImageFile, Limits, MaskArea, Transparency, ValidationError,
};

/// Default denoising strength.
const DEFAULT_STRENGTH: f64 = 0.75;

/// Default blur of a mask, in pixels.
const DEFAULT_MASK_BLUR: f64 = 4.0;

/// The fields of image-to-image.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct InitImage {
    /// The input image, in base64 or as a data URL.
    #[schemars(required, extend("minItems" = 1, "maxItems" = 1))]
    init_images: Option<Vec<ImageFile>>,
    /// Mask of inpainting: white areas are inpainted, black areas are preserved.
    mask: Option<ImageFile>,
    /// Whether black areas are inpainted and white areas are preserved.
    inpainting_mask_invert: Option<Value>,
    /// Denoising strength. Default: 0.75.
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    denoising_strength: Option<f64>,
    /// Whether only the masked area is generated, in the size of the request, and put back into the
    /// input image. Default: true.
    inpaint_full_res: Option<Value>,
    /// Pixels around the masked area that are generated with it. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 256))]
    inpaint_full_res_padding: Option<u32>,
    /// Blur of the mask in pixels. Default: 4.
    #[schemars(extend("minimum" = 0, "maximum" = 64))]
    mask_blur: Option<f64>,
    /// The same in one direction; both must be alike.
    #[schemars(extend("minimum" = 0, "maximum" = 64))]
    mask_blur_x: Option<f64>,
    /// The same in the other direction.
    #[schemars(extend("minimum" = 0, "maximum" = 64))]
    mask_blur_y: Option<f64>,
    /// What the masked area begins as: 0 the colours around it, 1 the input image, 2 noise, 3
    /// nothing. Default: 0.
    #[schemars(extend("minimum" = 0, "maximum" = 3))]
    inpainting_fill: Option<u8>,
    /// How the input image fills the size: 0 stretched, 1 cropped, 2 with continued edges.
    #[schemars(extend("minimum" = 0, "maximum" = 2))]
    resize_mode: Option<u8>,
}

impl InitImage {
    /// Takes the fields of image-to-image out.
    pub(crate) fn read(fields: &mut Fields, limits: &Limits) -> Result<Self, ValidationError> {
        fields.drop_if("mask", is_noop);
        fields.drop_if("mask_round", |value| !is_off(value));
        if let Some((name, _)) = fields.take(&["mask_round"])? {
            return Err(ValidationError::range(&name, "is not supported: it may be true"));
        }
        fields.read(limits)
    }

    /// Adds the input image and its mask to a request.
    pub(crate) fn add_to(self, draw: &mut DrawRequest) -> Result<(), ValidationError> {
        let image = self.init_images.and_then(|mut images| images.pop());
        let missing =
            || ValidationError::malformed("init_images", "must contain an image in base64");
        draw.image = Some(image.ok_or_else(missing)?);
        draw.strength = Some(self.denoising_strength.unwrap_or(DEFAULT_STRENGTH));
        draw.transparency = Transparency::White;
        draw.mask = self.mask;
        if self.inpainting_mask_invert.is_some_and(|value| !is_off(&value)) {
            draw.mask_area = MaskArea::Black;
        }
        draw.fit = match self.resize_mode {
            None | Some(0) => Fit::Stretch,
            Some(1) => Fit::Crop,
            Some(_) => Fit::Pad,
        };
        draw.masked_start = match self.inpainting_fill {
            Some(2) => MaskedStart::Noise,
            Some(3) => MaskedStart::Zero,
            _ => MaskedStart::Picture,
        };
        let both = self.mask_blur.unwrap_or(DEFAULT_MASK_BLUR);
        let [x, y] = [self.mask_blur_x, self.mask_blur_y].map(|blur| blur.unwrap_or(both));
        if x != y {
            return Err(ValidationError::range("mask_blur_x", "must be the same as mask_blur_y"));
        }
        let only_masked = self.inpaint_full_res.is_none_or(|value| !is_off(&value));
        draw.inpaint = draw.mask.is_some().then_some(InpaintOptions {
            blur: x,
            only_masked: only_masked.then_some(self.inpaint_full_res_padding.unwrap_or(0)),
            fill: self.inpainting_fill != Some(1),
        });
        Ok(())
    }
}
