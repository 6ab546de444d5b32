//! The picture between the base pass and the hires pass, where it is the picture that is upscaled:
//! decoded, enlarged and encoded again, each a step, or with tiles of the VAE each tile one.

use candle_core::Tensor;

use super::decode::{self, VaeMode};
use super::enlarge::{Enlarge, EnlargeStep, Enlargement, LoadedUpscaler};
use super::hires::{HiresPass, HiresUpscaler, UpscaledLatents, covering};
use super::load::LoadedModel;
use super::spec::{Hires, Spec};
use super::upscaler::{PictureUpscaler, Upscaler};
use super::vae::Vae;
use crate::error::{Error, Result};
use crate::networks::{Part, Tiled};
use crate::ops::tiling;
use crate::picture::{Rgb, Size, lanczos};

/// What the next step does.
pub(crate) enum Between {
    Decode,
    DecodeTiles(Tiled),
    Enlarge(Enlargement),
    Encode(Rgb),
    EncodeTiles(Tiled),
}

/// What such a step computes.
pub(crate) enum BetweenStep {
    Next(Between),
    Tile(Part),
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
    spec: &Spec,
    hires: &Hires,
    upscalers: &[LoadedUpscaler],
    vae: &Vae,
) -> Result<HiresUpscaler> {
    let upscaler = match (&hires.upscaler, upscalers.first()) {
        (Upscaler::Latent(upscaler), _) => return Ok(HiresUpscaler::Latent(*upscaler)),
        (Upscaler::Picture(_), read) => read.cloned().unwrap_or(LoadedUpscaler::None),
    };
    let (from, to) = (spec.size, hires.size);
    let scale = scale(from, to);
    // As in AUTOMATIC1111, only what becomes larger is upscaled.
    let enlarges = scale > 1.0 && !matches!(upscaler, LoadedUpscaler::None);
    let of_upscaler = match enlarges {
        true => upscaler.steps("hires_upscaler", (from.width(), from.height()), scale)?,
        false => 0,
    };
    // One step that decodes and one that encodes; or one that cuts tiles, each of them, and one that
    // joins them.
    let of_vae = [from, to].map(|size| match vae.tiles(size) {
        tiles @ 1.. if spec.has_vae_tiles() => tiles + 2,
        _ => 1,
    });
    let steps = of_upscaler + of_vae.iter().sum::<usize>();
    // Decoding and encoding take about as long as a UNet call.
    let of_whole = if of_vae[1] > 1 { vae.tile_work() } else { to.pixels() };
    let step_work = upscaler.tile_work().max(of_whole);
    Ok(HiresUpscaler::Picture { upscaler, enlarges, steps, step_work })
}

/// The next step of a picture between two passes, whose base pass had this size and made these latents,
/// unscaled. Changes nothing.
pub(super) fn step(
    model: &LoadedModel,
    (from, mode): (Size, VaeMode),
    (hires, between): (&HiresPass, &Between),
    latents: impl Fn() -> Result<Tensor>,
) -> Result<BetweenStep> {
    let decoded = |picture: Rgb| -> Result<BetweenStep> {
        let HiresUpscaler::Picture { upscaler, enlarges: true, .. } = &hires.upscaler else {
            return Ok(BetweenStep::Next(Between::Encode(picture)));
        };
        let (scale, name) = (scale(from, hires.size), PictureUpscaler::None);
        let enlarge = Enlarge { picture, scale, canvas: None, upscaler: name, second: None };
        let enlargement = Enlargement::new(&enlarge, vec![upscaler.clone()], &model.device)?;
        Ok(BetweenStep::Next(Between::Enlarge(enlargement)))
    };
    let encoded = |latents| Ok(BetweenStep::Encoded(Box::new(hires.begin_with(latents)?)));
    match between {
        Between::Decode => {
            let latents = latents()?;
            match decode::tiles(model, &latents, mode)? {
                Some(tiled) => Ok(BetweenStep::Next(Between::DecodeTiles(tiled))),
                None => decoded(decode::picture(model, &latents, mode)?),
            }
        }
        Between::DecodeTiles(tiled) if tiled.left() > 0 => {
            decode::tile(model, tiled).map(BetweenStep::Tile)
        }
        Between::DecodeTiles(tiled) => decoded(decode::rgb(&tiled.joined()?)?),
        Between::Enlarge(enlargement) => {
            let step = enlargement.step().map_err(|error| match error {
                Error::Spec { reason, .. } => Error::Spec { field: "hires_upscaler", reason },
                other => other,
            });
            step.map(BetweenStep::Enlarged)
        }
        Between::Encode(picture) => {
            let pixels = pixels(model, &fitted(picture, from, hires.size))?;
            let tiles = mode.tiles.then(|| model.vae.tiles_to_encode(&pixels));
            if let Some(tiled) = tiles.transpose()?.flatten() {
                return Ok(BetweenStep::Next(Between::EncodeTiles(tiled)));
            }
            encoded(tiling(mode.tiling, || mean(model, &model.vae.moments(&pixels)?))?)
        }
        Between::EncodeTiles(tiled) if tiled.left() > 0 => {
            tiled.next(|pixels| model.vae.moments(pixels)).map(BetweenStep::Tile)
        }
        Between::EncodeTiles(tiled) => encoded(mean(model, &tiled.joined()?)?),
    }
}

/// The pixels of a picture (1, H, W, 3) in -1..1.
fn pixels(model: &LoadedModel, picture: &Rgb) -> Result<Tensor> {
    let value = |byte: &u8| f32::from(*byte) / 255.0 * 2.0 - 1.0;
    let pixels: Vec<f32> = picture.data.iter().map(value).collect();
    let shape = (1, picture.height, picture.width, 3);
    Ok(Tensor::from_vec(pixels, shape, &model.device)?)
}

/// The mean of what the encoder says of a picture: latents (1, C, h, w) f32, scaled.
fn mean(model: &LoadedModel, moments: &Tensor) -> Result<Tensor> {
    let config = model.vae.config();
    let (mean, _) = config.distribution(moments)?;
    config.scaled(&mean.to_device(&model.device)?)
}

/// A picture in the size of the hires pass: covering it, and cropped at the centre.
fn fitted(picture: &Rgb, from: Size, to: Size) -> Rgb {
    let covering = covering(from, to);
    let whole = (picture.width, picture.height) == covering;
    let resized = (!whole).then(|| lanczos(picture, covering));
    resized.as_ref().unwrap_or(picture).on_canvas((to.width(), to.height()))
}
