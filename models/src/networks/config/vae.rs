//! `vae/config.json`.

use serde_json::{Value, json};

use super::levels::check_levels;
use crate::error::Result;
use crate::files::{Keys, Source};
use crate::networks::vae_tiles::OVERLAP;

/// `vae/config.json` of an `AutoencoderKL`.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    /// Channels of an input image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level, outermost first; every level but the last halves the sides.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of an encoder level; a decoder level has one more.
    pub layers_per_block: usize,
    /// Side of the tiles in which it may be computed, in pixels; 0 if no side is known.
    pub sample_size: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Factor of the latents after encoding.
    pub scaling_factor: f64,
    /// Mean and standard deviation of the latents by channel, which Stable Diffusion XL's pipelines
    /// take out of them.
    pub latents: Option<Vec<(f64, f64)>>,
    /// Whether Stable Diffusion XL's pipelines compute it in f32 where the model is in f16, in which
    /// it would overflow.
    pub force_upcast: bool,
    /// Whether the mid block has attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
}

impl VaeConfig {
    /// Reads `vae/config.json`.
    pub fn read(source: &Source) -> Result<Self> {
        Self::read_scaled(source, 0.18215)
    }

    /// The same, with the scaling factor of files that do not tell it.
    pub(crate) fn read_scaled(source: &Source, scaling_factor: f64) -> Result<Self> {
        let mut keys = Keys::read(source, "vae/config.json")?;
        keys.only("_class_name", &[json!("AutoencoderKL")])?;
        let block_out_channels: Vec<usize> = keys.take("block_out_channels", vec![64])?;
        for (key, name) in
            [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")]
        {
            let types: Vec<String> = keys.take(key, vec![name.into()])?;
            if types.len() != block_out_channels.len() || types.iter().any(|t| t != name) {
                let count = block_out_channels.len();
                return Err(keys.invalid(key, format!("{types:?} must be {count} times {name:?}")));
            }
        }
        keys.only("act_fn", &[json!("silu"), json!("swish")])?;
        keys.only("shift_factor", &[json!(0), json!(0.0)])?;
        let scaling_factor: f64 = keys.take("scaling_factor", scaling_factor)?;
        // In f32, in which latents are divided by it.
        let in_f32 = scaling_factor as f32;
        if in_f32 == 0.0 || !in_f32.is_finite() || !in_f32.recip().is_finite() {
            return Err(keys.invalid("scaling_factor", format!("{scaling_factor} is no scale")));
        }
        let latent_channels = keys.count("latent_channels", 1, 4)?;
        let config = Self {
            latents: latents(&mut keys, latent_channels)?,
            sample_size: sample_size(&mut keys)?,
            force_upcast: keys.take("force_upcast", true)?,
            in_channels: keys.count("in_channels", 1, 3)?,
            out_channels: keys.count("out_channels", 1, 3)?,
            latent_channels,
            layers_per_block: keys.count("layers_per_block", 0, 1)?,
            norm_num_groups: keys.count("norm_num_groups", 1, 32)?,
            scaling_factor,
            mid_block_add_attention: keys.take("mid_block_add_attention", true)?,
            use_quant_conv: keys.take("use_quant_conv", true)?,
            use_post_quant_conv: keys.take("use_post_quant_conv", true)?,
            block_out_channels,
        };
        let groups = config.norm_num_groups;
        check_levels(&keys, &config.block_out_channels)?;
        if let Some(channels) =
            config.block_out_channels.iter().find(|c| groups == 0 || **c == 0 || **c % groups != 0)
        {
            let reason = format!("{groups} does not divide {channels} channels");
            return Err(keys.invalid("norm_num_groups", reason));
        }
        if config.out_channels != 3 || config.in_channels != 3 {
            return Err(keys.invalid("out_channels", "must be 3, the channels of an image"));
        }
        keys.drop_idle(&[]);
        keys.finish()?;
        Ok(config)
    }

    /// Side of its tiles in latent pixels; `None` if a quarter of that is no whole number, so that tiles
    /// cannot be joined.
    pub fn tile(&self) -> Option<usize> {
        let side = self.sample_size / self.scale();
        let is_whole = self.sample_size.is_multiple_of(OVERLAP * self.scale());
        (side > 0 && is_whole).then_some(side)
    }

    /// Pixels per latent pixel, along one side.
    pub fn scale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// `sample_size`, as diffusers reads it: the number, or the first of a list.
fn sample_size(keys: &mut Keys) -> Result<usize> {
    let value: Value = keys.take("sample_size", json!(32))?;
    let side = value.get(0).unwrap_or(&value).as_u64().unwrap_or_default();
    Ok(usize::try_from(side).unwrap_or_default())
}

/// `latents_mean` and `latents_std`, of which diffusers uses both or none.
fn latents(keys: &mut Keys, channels: usize) -> Result<Option<Vec<(f64, f64)>>> {
    let mut take = |key| -> Result<Option<Vec<f64>>> {
        let values: Option<Vec<f64>> = keys.take(key, None)?;
        if values.as_ref().is_some_and(|values| values.len() != channels) {
            return Err(keys.invalid(key, format!("must have {channels} numbers, one a channel")));
        }
        Ok(values)
    };
    let (means, deviations) = (take("latents_mean")?, take("latents_std")?);
    let (Some(means), Some(deviations)) = (means, deviations) else { return Ok(None) };
    let is_scale = |value: f64| (value as f32) > 0.0 && (value as f32).recip().is_finite();
    if let Some(value) = deviations.iter().find(|value| !is_scale(**value)) {
        return Err(keys.invalid("latents_std", format!("{value} is no deviation")));
    }
    if let Some(value) = means.iter().find(|value| !(**value as f32).is_finite()) {
        return Err(keys.invalid("latents_mean", format!("{value} is no mean")));
    }
    Ok(Some(means.into_iter().zip(deviations).collect()))
}
