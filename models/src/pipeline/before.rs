//! The input image before the first step, where the VAE encodes it in tiles: each tile is a step, and
//! one more makes the first latents.

use super::init::{InitialLatents, Inputs, Start};
use super::load::LoadedModel;
use super::spec::Spec;
use super::vae::Vae;
use crate::error::Result;
use crate::networks::{Part, Tiled};
use crate::ops::tiling;
use crate::sampling::{Noise, SamplerState};

/// The pictures that are being encoded.
pub(super) struct Before {
    start: Start,
    tiles: Inputs<Tiled>,
    tile_work: usize,
}

/// What such a step computes.
pub(super) enum BeforeStep {
    Tile(Part),
    Begun(Box<(InitialLatents, SamplerState, Noise)>),
}

/// The first latents of an image. Where its pictures are encoded in tiles, what is before them, and
/// nothing yet.
pub(super) fn begin(
    model: &LoadedModel,
    spec: &Spec,
    sampler: &SamplerState,
    noise: &mut Noise,
) -> Result<(Option<Before>, InitialLatents)> {
    let (unet, vae) = (model.unet.config(), &model.vae);
    let inpainting = unet.in_channels > unet.out_channels;
    let start = Start::of(spec, inpainting, (vae.config(), &model.device));
    let pictures = start.pictures()?;
    if spec.has_vae_tiles() {
        let tiles = pictures.each().map(|pixels| vae.tiles_to_encode(pixels))?;
        let tiles = Inputs { picture: tiles.picture.flatten(), rest: tiles.rest.flatten() };
        // All are of one size.
        if tiles.iter().next().is_some() {
            let begun = start.nothing()?;
            return Ok((Some(Before { start, tiles, tile_work: vae.tile_work() }), begun));
        }
    }
    let encode = || pictures.map(|pixels| vae.encode(&pixels));
    let encoded = tiling(spec.tiling, encode)?;
    Ok((None, start.begin(encoded, sampler, noise)?))
}

impl Before {
    /// The steps that are left.
    pub(super) fn left(&self) -> usize {
        self.tiles.iter().map(Tiled::left).sum::<usize>() + 1
    }

    /// The work that is left, in pixels times rows times UNet calls.
    pub(super) fn work_left(&self) -> usize {
        self.left().saturating_mul(self.tile_work)
    }

    /// Computes the next step. Changes nothing.
    pub(super) fn step(
        &self,
        vae: &Vae,
        sampler: &SamplerState,
        noise: &Noise,
    ) -> Result<BeforeStep> {
        if let Some(tiled) = self.tiles.iter().find(|tiled| tiled.left() > 0) {
            return Ok(BeforeStep::Tile(tiled.next(|pixels| vae.moments(pixels))?));
        }
        let encoded = self.tiles.each().map(|tiled| vae.config().distribution(&tiled.joined()?))?;
        let mut noise = noise.clone();
        let mut begun = self.start.begin(encoded, sampler, &mut noise)?;
        let (mut sampler, latents) = (sampler.clone(), &begun.latents);
        let of_steps = begun.step_noise.as_mut().unwrap_or(&mut noise);
        sampler.draw_ahead(latents.shape(), of_steps, latents.device())?;
        Ok(BeforeStep::Begun(Box::new((begun, sampler, noise))))
    }

    /// Takes a tile that was computed.
    pub(super) fn lay(&mut self, tile: Part) {
        if let Some(tiled) = self.tiles.iter_mut().find(|tiled| tiled.left() > 0) {
            tiled.lay(tile);
        }
    }
}
