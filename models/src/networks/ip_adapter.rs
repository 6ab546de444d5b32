//! IP-Adapters: pictures as prompts. A picture's features become a few tokens, to which every cross
//! attention of the UNet attends by keys and values of their own, beside those of the prompt.
//!
//! Ye, Zhang, Liu, Han and Yang 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for
//! Text-to-Image Diffusion Models". Reference: diffusers 0.42 `models/embeddings.py`
//! (`ImageProjection`, `IPAdapterFullImageProjection`, `IPAdapterPlusImageProjection`) and
//! `models/attention_processor.py` (`IPAdapterAttnProcessor2_0`).
//!
//! Shapes: L tokens of the image encoder, N tokens of a picture, D channels of a prompt, W those of
//! the keys and values of all cross attentions together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};

use super::config::{UNetConfig, UNetPart};
use super::image_encoder::{EncoderFolder, ImageEncoder, bytes_of};
use super::resampler::Resampler;
use super::vision::Normalization;
use crate::error::{Error, Result};
use crate::files::{IpAdapterFile, Weights};
use crate::layers::{LayerBuilder, activation_dtype};
use crate::ops::{Activation, Epilogue, LayerNorm, Linear, cast, in_pool};
use crate::picture::{Rgb, clip_crop, lanczos};

/// An IP-Adapter.
pub struct IpAdapterModel {
    id: u64,
    name: String,
    encoder: Arc<ImageEncoder>,
    projection: Projection,
    /// (.., D) -> (.., W), in the order of the UNet's own.
    to_kv: Linear,
    /// Channels of each cross attention.
    channels: Vec<usize>,
    device: Device,
    /// Of activations.
    dtype: DType,
    bytes: u64,
    warnings: Vec<String>,
}

/// How the features of a picture become tokens.
enum Projection {
    /// Of its embedding (1, E): a linear layer to all tokens at once, and a norm.
    Embedding { proj: Linear, norm: LayerNorm, tokens: usize },
    /// Of the hidden states (1, L, E), a token each: two linear layers and a norm ("full").
    States { linear: [Linear; 2], norm: LayerNorm },
    /// Of the hidden states, by attention to them ("plus").
    Resampler(Resampler),
}

impl IpAdapterModel {
    /// Pixels of the pictures of an adapter, along one side. Blocks: reads folders and headers.
    ///
    /// # Errors
    /// Files that are no IP-Adapter, and those without an image encoder that fits.
    pub fn side(file: &IpAdapterFile) -> Result<usize> {
        Ok(EncoderFolder::find(file)?.side())
    }

    /// A picture as an adapter with an image encoder of `side` sees it: its shorter side resized to
    /// that, and the middle of it.
    pub fn picture(picture: &Rgb, side: usize) -> Rgb {
        clip_crop(picture, side, side)
    }

    /// The same of the whole picture, out of its proportions, as AUTOMATIC1111's extension shows it.
    pub fn stretched(picture: &Rgb, side: usize) -> Rgb {
        lanczos(picture, (side, side))
    }

    /// Bytes of the weights of a file, in a type. Blocks: reads its header.
    pub(crate) fn file_bytes(file: &IpAdapterFile, dtype: DType) -> Result<u64> {
        Ok(bytes_of(&file.weights()?, dtype))
    }

    /// Reads the adapter of a file for a UNet; its image encoder was read before.
    ///
    /// # Errors
    /// Files that are no IP-Adapter, and that of another UNet.
    pub fn read(
        file: &IpAdapterFile,
        encoder: Arc<ImageEncoder>,
        unet: &UNetConfig,
        (device, dtype): (&Device, DType),
    ) -> Result<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let weights = file.weights()?;
        check(&weights, unet).map_err(|reason| Error::config(weights.file_names(), reason))?;
        let p = LayerBuilder::new(&weights, device, dtype);
        let places = unet.cross_attentions();
        let to_kv = to_kv(&p, unet)?;
        let adapter = Self {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            name: file.name(),
            projection: Projection::load(&p.pp("image_proj"), unet.cross_attention_dim)?,
            to_kv,
            channels: places.iter().map(|place| place.channels).collect(),
            device: device.clone(),
            dtype: activation_dtype(device, dtype),
            bytes: bytes_of(&weights, dtype),
            warnings: {
                weights.finish(|_| false);
                encoder.warnings().iter().cloned().chain(weights.warnings()).collect()
            },
            encoder,
        };
        Ok(adapter)
    }

    /// A unique id of this read, for comparison.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The name by which requests select it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its image encoder.
    pub(crate) fn encoder(&self) -> &Arc<ImageEncoder> {
        &self.encoder
    }

    /// Bytes of its weights, without the image encoder's.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is odd about its files.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The tokens (1, N, D) of a picture, as [`Self::picture`] makes it; without one those of the
    /// unconditional row: of an embedding of zeros, or of the hidden states of pixels that are zero
    /// after normalization.
    pub fn tokens(&self, picture: Option<&Rgb>) -> Result<Tensor> {
        let side = self.encoder.side();
        let pixels = match picture {
            Some(picture) if (picture.width, picture.height) != (side, side) => {
                let reason = format!("{:?} must have a picture of {side}x{side}", self.name);
                return Err(Error::Spec { field: "ip_adapter", reason });
            }
            Some(picture) => Normalization::default().of(picture)?,
            None => Tensor::zeros((3, side, side), DType::F32, &Device::Cpu)?,
        };
        let tower = &self.encoder.tower();
        let features = match (&self.projection, picture) {
            (Projection::Embedding { .. }, None) => {
                Tensor::zeros((1, tower.config().projection_dim), DType::F32, &self.device)?
            }
            (Projection::Embedding { .. }, Some(_)) => tower.embed(&pixels)?,
            _ => tower.states(&pixels)?,
        };
        self.project(&features)
    }

    /// Features of a picture, (1, E) or (1, L, E) f32, -> its tokens (1, N, D).
    fn project(&self, features: &Tensor) -> Result<Tensor> {
        let features = cast(&features.contiguous()?, self.dtype)?;
        in_pool(&self.device, || match &self.projection {
            Projection::Embedding { proj, norm, tokens } => {
                let x = proj.forward(&features, Epilogue::NONE)?; // (1, N D)
                let width = x.dim(1)? / tokens;
                Ok(norm.forward(&x.reshape((1, *tokens, width))?)?)
            }
            Projection::States { linear, norm } => {
                let x = linear[0].forward(&features, Epilogue::activation(Activation::Gelu))?;
                Ok(norm.forward(&linear[1].forward(&x, Epilogue::NONE)?)?)
            }
            Projection::Resampler(resampler) => resampler.forward(&features),
        })
    }

    /// Tokens (1, N, D) -> the keys and values of all cross attentions (1, N, W), with the values of
    /// each times its scale: what attends to them is added times that.
    pub(crate) fn keys_values(&self, tokens: &Tensor, scales: &[f64]) -> Result<Tensor> {
        let kv = in_pool(&self.device, || self.to_kv.forward(tokens, Epilogue::NONE))?;
        if scales.iter().all(|scale| *scale == 1.0) {
            return Ok(kv);
        }
        let mut factors = Vec::new();
        for (channels, scale) in self.channels.iter().zip(scales) {
            factors.extend(std::iter::repeat_n(1.0, *channels));
            factors.extend(std::iter::repeat_n(*scale as f32, *channels));
        }
        let width = factors.len();
        let factors = Tensor::from_vec(factors, (1, 1, width), kv.device())?;
        Ok(kv.broadcast_mul(&cast(&factors, kv.dtype())?)?)
    }
}

impl Projection {
    fn load(p: &LayerBuilder<'_>, width: usize) -> Result<Self> {
        let proj = p.pp("proj");
        if proj.has("weight") {
            let (outputs, inputs) = (proj.side("weight", 0), proj.side("weight", 1));
            let tokens = (outputs / width).max(1);
            return Ok(Self::Embedding {
                proj: proj.linear(inputs, tokens * width)?,
                norm: p.pp("norm").layer_norm(width, 1e-5)?,
                tokens,
            });
        }
        if proj.has("3.weight") {
            let inputs = proj.side("0.weight", 1);
            return Ok(Self::States {
                linear: [proj.pp(0).linear(inputs, inputs)?, proj.pp(2).linear(inputs, width)?],
                norm: proj.pp(3).layer_norm(width, 1e-5)?,
            });
        }
        Ok(Self::Resampler(Resampler::load(p, width)?))
    }
}

/// The number of a cross attention in the file, for each in the order of the UNet's keys and values:
/// theirs is that in which diffusers finds the attentions, with the middle last, and self attentions
/// are counted too.
fn numbers(unet: &UNetConfig) -> Vec<usize> {
    let places = unet.cross_attentions();
    let mut order: Vec<_> = (0..places.len()).collect();
    // The sort is stable.
    order.sort_by_key(|k| places[*k].part == UNetPart::Middle);
    let mut numbers = vec![0; places.len()];
    for (position, k) in order.into_iter().enumerate() {
        numbers[k] = 2 * position + 1;
    }
    numbers
}

/// The key and value projections of all cross attentions, in the order of the UNet's.
fn to_kv(p: &LayerBuilder<'_>, unet: &UNetConfig) -> Result<Linear> {
    let mut parts = Vec::new();
    for (place, number) in unet.cross_attentions().iter().zip(numbers(unet)) {
        for name in ["to_k_ip", "to_v_ip"] {
            let p = p.pp("ip_adapter").pp(number).pp(name);
            parts.push(p.part(unet.cross_attention_dim, place.channels, false)?);
        }
    }
    Ok(p.stack(&parts)?)
}

/// Checks that an adapter is one of a UNet. The error reads on from the file's name.
fn check(weights: &Weights, unet: &UNetConfig) -> std::result::Result<(), String> {
    let width = unet.cross_attention_dim;
    let first = weights.shape("ip_adapter.1.to_k_ip.weight");
    let own = first.and_then(|shape| shape.get(1)).copied();
    if let Some(own) = own.filter(|own| *own != width) {
        return Err(format!(
            "is an IP-Adapter of another model: it is for prompts of {own} channels, the model's \
             have {width}"
        ));
    }
    let count = weights.names().filter(|name| name.ends_with(".to_k_ip.weight")).count();
    let wanted = unet.cross_attentions().len();
    if count != wanted {
        return Err(format!(
            "is an IP-Adapter of another model: it has keys for {count} cross attentions, the UNet \
             has {wanted}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Source;

    #[test]
    fn attentions_are_numbered_as_in_diffusers() {
        let unet = UNetConfig::read(&Source::Demo).unwrap();
        let places = unet.cross_attentions();
        let numbers = numbers(&unet);
        let middle = places.iter().position(|place| place.part == UNetPart::Middle).unwrap();
        assert_eq!(numbers[0], 1);
        assert_eq!(numbers[middle], 2 * places.len() - 1);
        assert_eq!(numbers[middle + 1], numbers[middle - 1] + 2);
    }
}
