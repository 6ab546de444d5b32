//! The input image of a request and its mask: decoded, and in the size of the images.

use ::image::DynamicImage;
use sd_models::{Img2Img, MaskedStart, ModelInfo, Sampler, Size};

use super::draw::DrawRequest;
use super::error::ValidationError;
use super::images::{MaskArea, Transparency};
use super::limits::Limits;
use crate::image::{self, InpaintOptions, Inpainting};

/// Denoising strength of image-to-image, as in diffusers; there that of inpainting is 1.
const DEFAULT_STRENGTH: f64 = 0.8;

/// Those of image-to-image and of inpainting with Stable Diffusion XL.
const XL_STRENGTHS: [f64; 2] = [0.3, 0.9999];

/// The input image and mask of a request.
pub(super) struct Input {
    image: DynamicImage,
    mask: Option<DynamicImage>,
    pub(super) strength: f64,
}

impl DrawRequest {
    /// Memory that the input image, mask and control pictures take at most in the size of the images,
    /// and what is laid over these, in bytes.
    pub fn input_bytes(&self, limits: &Limits) -> usize {
        const COLORS: usize = 3;
        const MASK: usize = 1;
        const OVERLAY: usize = 4;
        let sides = self.width.zip(self.height).map(|(width, height)| width.saturating_mul(height));
        let pixels = sides.map_or(limits.max_pixels, |pixels| pixels.min(limits.max_pixels));
        // Of other APIs' masks, and of ours once its options are read.
        let is_laid_over = self.inpaint.is_some()
            || self.mask_blur.is_some()
            || self.mask_padding.is_some()
            || self.mask_fill.is_some();
        let overlay = if is_laid_over { OVERLAY.saturating_mul(limits.max_pixels) } else { 0 };
        let input = self.image.as_ref().map_or(0, |_| pixels.saturating_mul(COLORS + MASK));
        let nets = self.controlnets.as_ref().map_or(0, Vec::len);
        let has_hires = self.hires_width.is_some() || self.hires_height.is_some();
        let of_net = pixels.saturating_add(if has_hires { limits.max_pixels } else { 0 });
        let controls = nets.saturating_mul(COLORS).saturating_mul(of_net);
        let all = input.saturating_add(overlay).saturating_add(controls);
        all.saturating_add(self.ip_picture_bytes())
    }

    /// Decodes the input image and its mask.
    pub(super) fn input(
        &mut self,
        limits: &Limits,
        model: &ModelInfo,
    ) -> Result<Option<Input>, ValidationError> {
        self.read_mask_options()?;
        let Some(image) = &self.image else {
            let dependent = [
                ("mask", self.mask.is_some()),
                ("strength", self.strength.is_some()),
                ("denoising_start", self.span().start.is_some()),
            ];
            return self.reject_without("image", dependent);
        };
        if self.strength.is_some() && self.span().start.is_some() {
            let [strength, start] = ["strength", "denoising_start"].map(|name| self.names.of(name));
            self.warnings.push(format!("{strength} has no effect with {start}"));
        }
        let max_pixels = limits.max_input_pixels;
        let image = image.decode(self.names.of("image"), max_pixels)?;
        if let Some(InpaintOptions { only_masked: Some(_), .. }) = self.inpaint
            && image.width() as usize * image.height() as usize > limits.max_pixels
        {
            let (width, height, most) = (image.width(), image.height(), limits.max_pixels);
            let only_masked = self.names.of("mask_padding");
            let reason = format!(
                "is {width}x{height}, the size of the result with {only_masked}; at most {most} \
                 pixels are generated"
            );
            return Err(self.range("image", reason));
        }
        let name = self.names.of("mask");
        let mask = self.mask.as_ref().map(|mask| mask.decode(name, max_pixels)).transpose()?;
        // As in OpenAI's API.
        if let (MaskArea::Transparent, Some(mask)) = (self.mask_area, &mask)
            && (mask.width(), mask.height()) != (image.width(), image.height())
        {
            let (width, height) = (mask.width(), mask.height());
            let (w, h) = (image.width(), image.height());
            let reason = format!("is {width}x{height}; it must be {w}x{h} as the image is");
            return Err(self.range("mask", reason));
        }
        if self.inpaint.is_none()
            && matches!(self.mask_area, MaskArea::White)
            && mask.as_ref().is_some_and(image::is_transparent)
        {
            let warning =
                format!("{name} is transparent in places: their hidden colours were used");
            self.warnings.push(warning);
        }
        let mask = if self.inpaint.is_some() { mask.map(image::opaque_mask) } else { mask };
        let mask = self.mask_area.mask(name, mask, &image)?;
        let is_mask = matches!(self.mask_area, MaskArea::Transparent);
        let image = match self.transparency {
            Transparency::White => image::on_white(image),
            Transparency::Ignored => {
                if !is_mask && image::is_transparent(&image) {
                    let name = self.names.of("image");
                    let warning =
                        format!("{name} is transparent in places: their hidden colours were used");
                    self.warnings.push(warning);
                }
                image
            }
        };
        let strength = match (self.mask_area, &mask) {
            // The pixels below transparency are no part of the image.
            (MaskArea::Transparent, Some(_)) => 1.0,
            (_, mask) if model.is_xl => XL_STRENGTHS[usize::from(mask.is_some())],
            _ => DEFAULT_STRENGTH,
        };
        Ok(Some(Input { image, mask, strength: self.strength.unwrap_or(strength) }))
    }

    /// The input image and mask in the size of the images.
    pub(super) fn img2img(
        &mut self,
        Input { image, mask, strength }: Input,
        size: Size,
        takes_all_steps: bool,
    ) -> Img2Img {
        let (fit, masked_start) = (self.fit, self.masked_start);
        let inpainting = mask
            .as_ref()
            .zip(self.inpaint)
            .map(|(mask, options)| Inpainting::new(&image, &mask.to_luma8(), size, fit, options));
        let (picture, mask, masked_start) = match inpainting {
            Some(Some(Inpainting { picture, mask, overlay })) => {
                self.overlay = Some(overlay);
                let options = self.inpaint.map(|options| self.parameters_of(options));
                self.parameters.extend(options.into_iter().flatten());
                (picture, Some(mask), masked_start)
            }
            Some(None) => {
                self.warnings.push("nothing is masked: the whole image was generated".into());
                let picture = image::resize_to(&image, size, fit);
                (picture, None, MaskedStart::Picture)
            }
            None => {
                let picture = image::resize_to(&image, size, fit);
                let mask = mask.map(|mask| image::fit_mask(&mask, size, fit));
                let has_mask = mask.is_some();
                let start = if has_mask { masked_start } else { MaskedStart::Picture };
                (picture, mask, start)
            }
        };
        Img2Img { picture, strength, takes_all_steps, mask, masked_start }
    }

    /// Whether an input image leaves all steps to take, and the share of them that it leaves. With a
    /// start its strength has no effect.
    pub(super) fn share_of_steps(
        &self,
        input: Option<&Input>,
        model: &ModelInfo,
        sampler: Sampler,
    ) -> (bool, f64) {
        let Some(Input { mask, strength, .. }) = input else { return (false, 1.0) };
        let takes_all = model.takes_all_steps(sampler, mask.is_some());
        let all = takes_all || self.span().start.is_some();
        (takes_all, if all { 1.0 } else { *strength })
    }

    /// AUTOMATIC1111's names and values of how a mask is used.
    fn parameters_of(&self, options: InpaintOptions) -> Vec<(&'static str, String)> {
        let InpaintOptions { blur, only_masked, fill } = options;
        let not_masked = matches!(self.mask_area, MaskArea::Black);
        let content = match self.masked_start {
            MaskedStart::Noise => Some("latent noise"),
            MaskedStart::Zero => Some("latent nothing"),
            MaskedStart::Picture => fill.then_some("fill"),
        };
        let all = [
            ("Mask mode", not_masked.then(|| "Inpaint not masked".to_owned())),
            ("Mask blur", (blur > 0.0).then(|| blur.to_string())),
            ("Inpaint area", only_masked.map(|_| "Only masked".to_owned())),
            ("Masked area padding", only_masked.map(|padding| padding.to_string())),
            ("Masked content", content.map(str::to_owned)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

impl Input {
    /// Whether a part of the image is inpainted.
    pub(super) fn has_mask(&self) -> bool {
        self.mask.is_some()
    }

    /// The warning that the image gives the images a size other than its own, as no image has sides
    /// that are no multiples of 8.
    pub(super) fn rounded(&self, name: &str, size: Size) -> Option<String> {
        let [width, height] = [self.image.width(), self.image.height()];
        let is_whole = width.is_multiple_of(8) && height.is_multiple_of(8);
        let drawn = format!("{}x{}", size.width(), size.height());
        let warning = || format!("{name} is {width}x{height}, no multiples of 8: {drawn} is drawn");
        (!is_whole).then(warning)
    }

    /// The size of the images, if the request gives none.
    pub(super) fn size(&self, limits: &Limits, model: &ModelInfo) -> Size {
        size_of(&self.image, limits, model)
    }
}

/// An image's own size in whole multiples of what the model can generate, downscaled in its
/// proportions if it is too large.
pub(super) fn size_of(image: &DynamicImage, limits: &Limits, model: &ModelInfo) -> Size {
    let (width, height) = (f64::from(image.width()), f64::from(image.height()));
    let scale = (limits.max_pixels as f64 / (width * height)).sqrt().min(1.0);
    let side = |side: f64| ((side * scale) as usize / model.multiple).max(1) * model.multiple;
    Size::new(side(width), side(height)).unwrap_or(model.defaults.size)
}
