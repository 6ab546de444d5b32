//! CLIP's vision tower around its transformer ([`super::clip`]), which the safety checker and the
//! image encoder of IP-Adapters have in common.
//!
//! Reference: transformers `models/clip/modeling_clip.py`, `CLIPVisionModelWithProjection`.

use candle_core::{DType, Device, Tensor};

use super::clip::ClipTransformer;
use super::config::VisionConfig;
use crate::error::Result;
use crate::files::Weights;
use crate::layers::LayerBuilder;
use crate::ops::{Epilogue, LayerNorm, Linear, cast, in_pool};
use crate::picture::Rgb;

/// Prefixes of its names but for the projection's: transformers 5 writes one less than older files of
/// the safety checker have.
const PREFIXES: [&str; 3] = ["vision_model.", "vision_model.vision_model.", ""];

/// The tower.
pub(super) struct VisionTower {
    config: VisionConfig,
    device: Device,
    /// (3 p p) -> hidden
    patch_embedding: Linear,
    class_embedding: Tensor,
    position_embedding: Tensor,
    pre_layernorm: LayerNorm,
    transformer: ClipTransformer,
    post_layernorm: LayerNorm,
    visual_projection: Linear,
}

impl VisionTower {
    /// What the names of a tower begin with.
    pub(super) fn prefix(weights: &Weights) -> &'static str {
        let has = |p: &&str| weights.shape(&format!("{p}pre_layrnorm.weight")).is_some();
        PREFIXES.into_iter().find(has).unwrap_or(PREFIXES[0])
    }

    pub(super) fn load(root: &LayerBuilder<'_>, config: VisionConfig) -> Result<Self> {
        let p = match Self::prefix(root.weights()).trim_end_matches('.') {
            "" => root.clone(),
            prefix => root.pp(prefix),
        };
        let (width, eps) = (config.transformer.hidden_size, config.transformer.layer_norm_eps);
        let patch = config.patch_size;
        let embeddings = p.pp("embeddings");
        let shape = [width, 3, patch, patch];
        let kernel = embeddings.tensor("patch_embedding.weight", &shape)?.flatten_from(1)?;
        let patches = (config.image_size / patch).pow(2);
        Ok(Self {
            patch_embedding: Linear::new(&kernel, None, root.device(), root.dtype())?,
            class_embedding: embeddings.placed("class_embedding", &[width])?,
            position_embedding: embeddings
                .placed("position_embedding.weight", &[patches + 1, width])?,
            // Spelled so in the files.
            pre_layernorm: p.pp("pre_layrnorm").layer_norm(width, eps)?,
            transformer: ClipTransformer::load(&p, &config.transformer, false)?,
            post_layernorm: p.pp("post_layernorm").layer_norm(width, eps)?,
            visual_projection: root.linears(
                &["visual_projection"],
                width,
                config.projection_dim,
                false,
            )?,
            device: root.device().clone(),
            config,
        })
    }

    pub(super) fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// A preprocessed picture (3, S, S) f32 -> its embedding (1, D) f32.
    pub(super) fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.begin(pixels)?;
        let x = in_pool(&self.device, || self.transformer.forward(x, 0, &[]))?;
        let pooled = self.post_layernorm.forward(&x.narrow(1, 0, 1)?.contiguous()?)?;
        let embedding =
            cast(&self.visual_projection.forward(&pooled, Epilogue::NONE)?, DType::F32)?;
        Ok(embedding.reshape((1, self.config.projection_dim))?)
    }

    /// A preprocessed picture (3, S, S) f32 -> its hidden states before the last layer (1, 1 + n n,
    /// hidden) f32: transformers' `hidden_states[-2]`.
    pub(super) fn states(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.begin(pixels)?;
        let x = in_pool(&self.device, || self.transformer.forward(x, 1, &[]))?;
        Ok(cast(&x, DType::F32)?)
    }

    /// (3, S, S) f32 -> what the layers begin with (1, 1 + n n, hidden)
    fn begin(&self, pixels: &Tensor) -> Result<Tensor> {
        let (p, width) = (self.config.patch_size, self.config.transformer.hidden_size);
        let n = self.config.image_size / p;
        let pixels = pixels.narrow(1, 0, n * p)?.narrow(2, 0, n * p)?.contiguous()?;
        let patches = pixels.reshape((3, n, p, n, p))?.permute((1, 3, 0, 2, 4))?;
        let patches = patches.contiguous()?.reshape((1, n * n, 3 * p * p))?;
        let dtype = self.position_embedding.dtype();
        let patches = cast(&patches.to_device(&self.device)?, dtype)?;
        let patches = self.patch_embedding.forward(&patches, Epilogue::NONE)?;
        let class = self.class_embedding.reshape((1, 1, width))?;
        let tokens = Tensor::cat(&[&class, &patches], 1)?; // (1, 1 + n n, hidden)
        Ok(self.pre_layernorm.forward(&tokens.broadcast_add(&self.position_embedding)?)?)
    }
}

/// Mean and deviation of red, green and blue, by which CLIP's pictures are normalized.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Normalization {
    pub(super) rescale_factor: f64,
    pub(super) mean: [f32; 3],
    pub(super) std: [f32; 3],
}

impl Default for Normalization {
    /// That of `CLIPImageProcessor`.
    fn default() -> Self {
        Self {
            rescale_factor: 1.0 / 255.0,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl Normalization {
    /// A picture of S x S pixels -> (3, S, S) f32 on the CPU.
    pub(super) fn of(&self, picture: &Rgb) -> Result<Tensor> {
        let Rgb { width, height, ref data } = *picture;
        let value = |i: usize| {
            let (channel, pixel) = (i / (width * height), i % (width * height));
            let rescaled = (f64::from(data[3 * pixel + channel]) * self.rescale_factor) as f32;
            (rescaled - self.mean[channel]) / self.std[channel]
        };
        let values = (0..3 * width * height).map(value).collect();
        Ok(Tensor::from_vec(values, (3, height, width), &Device::Cpu)?)
    }
}
