//! The safety checker of Stable Diffusion v1.x, which flags images as NSFW. CLIP's vision tower
//! turns an image into an embedding, whose cosines with those of some concepts are compared with
//! thresholds. What becomes of a flagged image is the caller's decision.
//!
//! Reference: diffusers 0.42 `pipelines/stable_diffusion/safety_checker.py`; transformers
//! `models/clip/modeling_clip.py`, `CLIPVisionModel`, and its `CLIPImageProcessor` over Pillow.

mod config;

use candle_core::{D, DType, Device, Tensor};

use self::config::{Preprocessor, SafetyConfig};
use super::clip::ClipTransformer;
use crate::error::{Error, Result};
use crate::files::{Source, Weights};
use crate::layers::LayerBuilder;
use crate::ops::{Epilogue, LayerNorm, Linear, in_pool};
use crate::picture::{Rgb, resized_part};

/// Number of NSFW concepts.
const CONCEPTS: usize = 17;
/// Number of special care concepts.
const SPECIAL_CONCEPTS: usize = 3;
/// Added to all later scores once a special care concept is found (`adjustment` in diffusers).
const SPECIAL_CARE: f32 = 0.01;

/// The checker.
pub struct SafetyChecker {
    config: SafetyConfig,
    preprocessor: Preprocessor,
    device: Device,
    /// (3 p p) -> hidden
    patch_embedding: Linear,
    class_embedding: Tensor,
    position_embedding: Tensor,
    pre_layernorm: LayerNorm,
    transformer: ClipTransformer,
    post_layernorm: LayerNorm,
    visual_projection: Linear,
    concepts: ConceptEmbeds,
    special: ConceptEmbeds,
}

/// Concept embeddings of unit length (D, n) f32, and the cosine above which an image matches each.
struct ConceptEmbeds {
    columns: Tensor,
    thresholds: Vec<f32>,
}

/// Scores: the cosines minus the thresholds, rounded as in diffusers.
#[derive(Debug, Clone, PartialEq)]
pub struct SafetyResult {
    /// Of the special care concepts.
    pub special: Vec<f32>,
    /// Of the NSFW concepts; above 0 the image is flagged.
    pub concepts: Vec<f32>,
}

impl SafetyResult {
    /// From the cosines of an image and the thresholds.
    fn new(special: (&[f32], &[f32]), concepts: (&[f32], &[f32])) -> Self {
        let mut care = 0.0;
        let mut scores = |(cosines, thresholds): (&[f32], &[f32]), calls_for_care: bool| {
            let score = |(cosine, threshold): (&f32, &f32)| {
                let score = ((cosine - threshold + care) * 1000.0).round_ties_even() / 1000.0;
                if calls_for_care && score > 0.0 {
                    care = SPECIAL_CARE;
                }
                score
            };
            cosines.iter().zip(thresholds).map(score).collect()
        };
        Self { special: scores(special, true), concepts: scores(concepts, false) }
    }

    /// Whether the image is flagged as NSFW.
    pub fn nsfw(&self) -> bool {
        self.concepts.iter().any(|score| *score > 0.0)
    }
}

impl SafetyChecker {
    /// Builds the checker from `safety_checker/` and `feature_extractor/`.
    pub fn load(source: &Source, weights: &Weights, device: &Device, dtype: DType) -> Result<Self> {
        let config = SafetyConfig::read(source)?;
        let preprocessor = Preprocessor::read(source, config.image_size)?;
        let root = LayerBuilder::new(weights, device, dtype);
        // transformers 5 writes the tower with one prefix less than older files have.
        let new = root.pp("vision_model");
        let p = if new.has("pre_layrnorm.weight") { new } else { new.pp("vision_model") };
        let (width, eps) = (config.transformer.hidden_size, config.transformer.layer_norm_eps);
        let patch = config.patch_size;
        let embeddings = p.pp("embeddings");
        let shape = [width, 3, patch, patch];
        let kernel = embeddings.tensor("patch_embedding.weight", &shape)?.flatten_from(1)?;
        let patches = (config.image_size / patch).pow(2);
        let outputs = config.projection_dim;
        let checker = Self {
            patch_embedding: Linear::new(&kernel, None, device, dtype)?,
            class_embedding: embeddings.placed("class_embedding", &[width])?,
            position_embedding: embeddings
                .placed("position_embedding.weight", &[patches + 1, width])?,
            // Spelled so in the files.
            pre_layernorm: p.pp("pre_layrnorm").layer_norm(width, eps)?,
            transformer: ClipTransformer::load(&p, &config.transformer, false)?,
            post_layernorm: p.pp("post_layernorm").layer_norm(width, eps)?,
            visual_projection: root.linears(&["visual_projection"], width, outputs, false)?,
            concepts: ConceptEmbeds::load(&root, "concept_embeds", CONCEPTS, outputs)?,
            special: ConceptEmbeds::load(&root, "special_care_embeds", SPECIAL_CONCEPTS, outputs)?,
            device: device.clone(),
            config,
            preprocessor,
        };
        weights.finish(|name| name.ends_with("embeddings.position_ids"));
        Ok(checker)
    }

    /// Scores an image.
    pub fn check(&self, picture: &Rgb) -> Result<SafetyResult> {
        let embedding = self.embed(&self.preprocess(picture)?)?;
        let (special, concepts) =
            (self.special.cosines(&embedding)?, self.concepts.cosines(&embedding)?);
        Ok(SafetyResult::new(
            (&special, &self.special.thresholds),
            (&concepts, &self.concepts.thresholds),
        ))
    }

    /// The preprocessed image (3, S, S) f32 on the CPU: resized, cropped at the centre to S pixels,
    /// normalized.
    pub fn preprocess(&self, picture: &Rgb) -> Result<Tensor> {
        let (edge, side) = (self.preprocessor.shortest_edge, self.config.image_size);
        let longer = |long: usize, short: usize| edge * long / short;
        let (width, height) = match (picture.width, picture.height) {
            (w, h) if w <= h => (edge, longer(h, w)),
            (w, h) => (longer(w, h), edge),
        };
        let corner = ((width - side) / 2, (height - side) / 2);
        let bytes = resized_part(picture, (width, height), corner, side);
        let value = |i: usize| {
            let (channel, pixel) = (i / (side * side), i % (side * side));
            let byte = bytes[3 * pixel + channel];
            let rescaled = (f64::from(byte) * self.preprocessor.rescale_factor) as f32;
            (rescaled - self.preprocessor.mean[channel]) / self.preprocessor.std[channel]
        };
        let values = (0..3 * side * side).map(value).collect();
        Ok(Tensor::from_vec(values, (3, side, side), &Device::Cpu)?)
    }

    /// A preprocessed image (3, S, S) -> its embedding (1, D) f32.
    pub fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let (p, width) = (self.config.patch_size, self.config.transformer.hidden_size);
        let n = self.config.image_size / p;
        let pixels = pixels.narrow(1, 0, n * p)?.narrow(2, 0, n * p)?.contiguous()?;
        let patches = pixels.reshape((3, n, p, n, p))?.permute((1, 3, 0, 2, 4))?;
        let patches = patches.contiguous()?.reshape((1, n * n, 3 * p * p))?;
        let dtype = self.position_embedding.dtype();
        let patches = patches.to_device(&self.device)?.to_dtype(dtype)?;
        let patches = self.patch_embedding.forward(&patches, Epilogue::NONE)?;
        let class = self.class_embedding.reshape((1, 1, width))?;
        let tokens = Tensor::cat(&[&class, &patches], 1)?; // (1, 1 + n n, hidden)
        let x = self.pre_layernorm.forward(&tokens.broadcast_add(&self.position_embedding)?)?;
        let x = in_pool(&self.device, || self.transformer.forward(x, 0, &[]))?;
        let pooled = self.post_layernorm.forward(&x.narrow(1, 0, 1)?.contiguous()?)?;
        let embedding =
            self.visual_projection.forward(&pooled, Epilogue::NONE)?.to_dtype(DType::F32)?;
        Ok(embedding.reshape((1, self.config.projection_dim))?)
    }
}

impl ConceptEmbeds {
    fn load(p: &LayerBuilder<'_>, name: &str, count: usize, width: usize) -> Result<Self> {
        let embeds = unit(&p.tensor(name, &[count, width])?)?;
        let thresholds = p.tensor(&format!("{name}_weights"), &[count])?.to_vec1()?;
        Ok(Self { columns: embeds.t()?.contiguous()?, thresholds })
    }

    fn cosines(&self, embedding: &Tensor) -> Result<Vec<f32>> {
        let embedding = unit(&embedding.to_device(&Device::Cpu)?)?;
        let cosines = embedding.matmul(&self.columns)?.flatten_all()?.to_vec1::<f32>()?;
        if cosines.iter().any(|cosine| cosine.is_nan()) {
            // NaN is not above any threshold, so the image would pass.
            return Err(Error::Compute(candle_core::Error::Msg(
                "the image's embedding contains NaN".into(),
            )));
        }
        Ok(cosines)
    }
}

/// Rows of unit length, as torch's `normalize` makes them.
fn unit(rows: &Tensor) -> Result<Tensor> {
    let norms = rows.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.clamp(1e-12, f32::INFINITY)?;
    Ok(rows.broadcast_div(&norms)?)
}
