//! The picture between the base pass and the hires pass, where it is the picture that is upscaled:
//! decoded, enlarged and encoded again, each a step.

use candle_core::Tensor;

use super::enlarge::{Enlarge, EnlargeStep, Enlargement, LoadedUpscaler};
use super::hires::{HiresPass, HiresUpscaler, UpscaledLatents, covering};
use super::load::LoadedModel;
use super::spec::Hires;
use super::upscaler::{PictureUpscaler, Upscaler};
use crate::error::{Error, Result};
use crate::ops::tiling;
use crate::picture::{Rgb, Size, lanczos};

/// What the next step does.
pub(crate) enum Between {
    Decode,
    Enlarge(Enlargement),
    Encode(Rgb),
}

/// What such a step computes.
pub(crate) enum BetweenStep {
    Decoded(Between),
    Enlarged(EnlargeStep),
    Encoded(Box<UpscaledLatents>),
}

/// How much larger a picture of one size becomes that is to cover another.
pub(super) fn scale(from: Size, to: Size) -> f64 {
    let (width, height) = covering(from, to);
    let by = |side: usize, of: usize| side as f64 / of as f64;
    by(width, from.width()).max(by(height, from.height()))
}

/// How the image of a hires pass is upscaled, by the upscaler that was read for it.
pub(super) fn upscaler(
    hires: &Hires,
    from: Size,
    upscalers: &[LoadedUpscaler],
) -> Result<HiresUpscaler> {
    let picture = match (&hires.upscaler, upscalers.first()) {
        (Upscaler::Latent(upscaler), _) => return Ok(HiresUpscaler::Latent(*upscaler)),
        (Upscaler::Picture(_), read) => read.cloned().unwrap_or(LoadedUpscaler::None),
    };
    let scale = scale(from, hires.size);
    let steps = match picture {
        // As in AUTOMATIC1111, only what becomes larger is upscaled.
        LoadedUpscaler::None => 0,
        _ if scale <= 1.0 => 0,
        _ => picture.steps("hires_upscaler", (from.width(), from.height()), scale)?,
    };
    // Beside decoding and encoding.
    Ok(HiresUpscaler::Picture(picture, steps + 2))
}

/// The next step of a picture between two passes, whose base pass had this size. Changes nothing.
pub(super) fn step(
    model: &LoadedModel,
    (from, is_tiling): (Size, bool),
    (hires, between): (&HiresPass, &Between),
    decode: impl FnOnce() -> Result<Rgb>,
) -> Result<BetweenStep> {
    Ok(match between {
        Between::Decode => {
            let (picture, scale) = (decode()?, scale(from, hires.size));
            BetweenStep::Decoded(match &hires.upscaler {
                HiresUpscaler::Picture(upscaler, 3..) => {
                    let name = PictureUpscaler::None;
                    let enlarge =
                        Enlarge { picture, scale, canvas: None, upscaler: name, second: None };
                    let upscalers = vec![upscaler.clone()];
                    Between::Enlarge(Enlargement::new(&enlarge, upscalers, &model.device)?)
                }
                _ => Between::Encode(picture),
            })
        }
        Between::Enlarge(enlargement) => {
            BetweenStep::Enlarged(enlargement.step().map_err(|error| match error {
                Error::Spec { reason, .. } => Error::Spec { field: "hires_upscaler", reason },
                other => other,
            })?)
        }
        Between::Encode(picture) => {
            let picture = fitted(picture, from, hires.size);
            let latents = tiling(is_tiling, || encoded(model, &picture))?;
            BetweenStep::Encoded(Box::new(hires.begin_with(latents)?))
        }
    })
}

/// The mean of the latents of a picture (1, C, h, w) f32, scaled.
fn encoded(model: &LoadedModel, picture: &Rgb) -> Result<Tensor> {
    let value = |byte: &u8| f32::from(*byte) / 255.0 * 2.0 - 1.0;
    let pixels: Vec<f32> = picture.data.iter().map(value).collect();
    let shape = (1, picture.height, picture.width, 3);
    let (mean, _) = model.vae.encode(&Tensor::from_vec(pixels, shape, &model.device)?)?;
    model.vae.config().scaled(&mean)
}

/// A picture in the size of the hires pass: covering it, and cropped at the centre.
fn fitted(picture: &Rgb, from: Size, to: Size) -> Rgb {
    let covering = covering(from, to);
    let whole = (picture.width, picture.height) == covering;
    let resized = (!whole).then(|| lanczos(picture, covering));
    resized.as_ref().unwrap_or(picture).on_canvas((to.width(), to.height()))
}
