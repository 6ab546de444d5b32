//! Latents as a picture: by the VAE's decoder, as a whole or tile by tile. Not which latents, and not
//! previews.

use candle_core::Tensor;

use super::load::LoadedModel;
use crate::error::{Error, Result};
use crate::networks::{Part, Tiled};
use crate::ops::tiling;
use crate::picture::Rgb;

/// How the VAE takes the pictures of an image.
#[derive(Clone, Copy)]
pub(super) struct VaeMode {
    /// Whether the opposite edges of a picture meet.
    pub(super) tiling: bool,
    /// Whether what is larger than a tile is in tiles.
    pub(super) tiles: bool,
}

/// The picture of latents (1, C, h, w), unscaled.
pub(super) fn picture(model: &LoadedModel, latents: &Tensor, mode: VaeMode) -> Result<Rgb> {
    let image = match tiles(model, latents, mode)? {
        Some(tiled) => tiled.run(|latents| model.vae.decode(latents)),
        None => tiling(mode.tiling, || model.vae.decode(latents)),
    };
    rgb(&image?)
}

/// Latents (1, C, h, w), unscaled, in tiles, if there are to be any and they are larger than one.
pub(super) fn tiles(model: &LoadedModel, latents: &Tensor, mode: VaeMode) -> Result<Option<Tiled>> {
    if mode.tiles { model.vae.tiles_to_decode(latents) } else { Ok(None) }
}

/// The next of these tiles. Changes nothing.
pub(super) fn tile(model: &LoadedModel, tiled: &Tiled) -> Result<Part> {
    tiled.next(|latents| model.vae.decode(latents))
}

/// The bytes of an image (1, H, W, 3) f32 on the CPU.
pub(super) fn rgb(image: &Tensor) -> Result<Rgb> {
    let (_, height, width, _) = image.dims4()?;
    let values = image.flatten_all()?.to_vec1::<f32>()?;
    // Rounds half to even, as numpy.
    let byte = |v: f32| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
    Ok(Rgb { width, height, data: values.into_iter().map(byte).collect() })
}

/// An error of the VAE. A model alone draws finite numbers: what was added to it is the request's.
pub(super) fn named(error: Error, nets: &[String]) -> Error {
    match error {
        Error::NotFinite(what) if !nets.is_empty() => {
            let nets = nets.join(", ");
            let reason = format!("{nets} make NaN or infinite numbers of {what}");
            Error::Spec { field: "controlnets", reason }
        }
        other => other,
    }
}
